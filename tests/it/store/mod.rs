//! The conformance suite of the store: what the methods of `Store` and `WriteTx` promise, on each database.

mod chunks;
mod configs;
mod identity;
mod log;
mod registry;
mod shared;

use crate::support::{
    client::{SECOND, T0},
    database::Database,
};
use tempfile::TempDir;
use tidegate::{
    config::Storage,
    model::{BatchSummary, DeviceId, Labels, Position, StreamId, Timestamp, ValueKind},
    store::{DeviceKey, LogRow, NewLogRow, SensorRow, Store},
};

/// The time that is so many seconds behind [`T0`].
fn at(seconds: i64) -> Timestamp {
    Timestamp::from_micros(T0 + seconds * SECOND).expect("in range")
}

fn device_id(id: &str) -> DeviceId {
    DeviceId::parse(id).expect("good")
}

/// A store that was empty, and a device in it.
struct Fixture {
    store: Store,
    settings: Storage,
    device: DeviceKey,
    _directory: TempDir,
}

impl Fixture {
    async fn on(database: Database) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let settings = database.storage(directory.path());
        let store = Store::open(&settings).await.expect("opened");
        let device = register(&store, "pump-1").await;
        Self { store, settings, device, _directory: directory }
    }

    /// Appends entries in a transaction of their own.
    async fn append(&self, rows: &[NewLogRow]) -> Position {
        let mut tx = self.store.begin().await.expect("begun");
        let first = tx.append(rows).await.expect("appended");
        tx.commit().await.expect("committed");
        first
    }

    /// All of the log.
    async fn log(&self) -> Vec<LogRow> {
        self.store.read_log(Position(0), 1_000, usize::MAX).await.expect("read")
    }

    async fn sensor(&self, name: &str) -> SensorRow {
        let mut tx = self.store.begin().await.expect("begun");
        let sensor = tx.insert_sensor(self.device, &new_sensor(name)).await.expect("inserted");
        tx.commit().await.expect("committed");
        sensor
    }

    async fn delete_device(&self) {
        let mut tx = self.store.begin().await.expect("begun");
        assert!(tx.lock_device(self.device).await.expect("read").is_some());
        tx.delete_device(self.device).await.expect("deleted");
        tx.commit().await.expect("committed");
    }
}

async fn register(store: &Store, id: &str) -> DeviceKey {
    let mut tx = store.begin().await.expect("begun");
    let row = tx.insert_device(&device_id(id), &Labels::default(), "", at(0)).await.expect("inserted");
    tx.commit().await.expect("committed");
    row.expect("the id is free").key
}

fn new_sensor(name: &str) -> SensorRow {
    SensorRow { key: 0, name: name.into(), unit: String::new(), kind: ValueKind::Double, allow_non_finite: false, create_time: at(0) }
}

/// An entry of one batch, which came in at a time with readings of that time.
fn entry(device: DeviceKey, sequence: u64, seconds: i64, batch: &'static [u8]) -> NewLogRow {
    NewLogRow {
        device,
        stream_key: 1,
        batches: 1,
        last_sequence: sequence,
        receive_time: at(seconds),
        summary: BatchSummary { readings: 1, first_time: at(seconds), last_time: at(seconds) },
        batch: bytes::Bytes::from_static(batch),
    }
}

/// A stream id that is the same in each run.
fn stream_id(number: u8) -> StreamId {
    StreamId::parse(&[number; 16]).expect("not nil")
}
