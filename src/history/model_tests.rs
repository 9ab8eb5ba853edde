//! Guarantee: whatever is uploaded, late or again, and however merging, pruning, retention, restarts and cut-off passes come in
//! between, a query has each sensor's readings of all stored batches, of one time the one stored last, and what was added to its time; and nothing else but what
//! retention took.

use super::{merger::Merger, pace::Haste, *};
use crate::{
    config::{ClockCorrection, Config, Storage},
    fleet::{ClockWatch, Device, Exchange, Registry},
    ingest::{Envelope, Ingest, Lane, Outcome, writer::writer},
    live::{Latest, Tail},
    model::{DeviceId, StreamId, Timestamp, columns::Values},
    pb,
    store::{Store, test_databases},
    telemetry::{Metrics, Readiness},
};
use proptest::prelude::*;
use prost::Message;
use std::{
    collections::{BTreeMap, HashSet},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::{task::JoinHandle, time::timeout};

const SENSORS: usize = 5;
const RESTLESS: Haste = Haste { rest: 0.0, leisure: 0.0, chunks_per_transaction: 3, at_once: 1 };

/// Sensor and time, and the value and what was added to the time.
type Reading = ((usize, i64), (i64, i64));

#[derive(Debug, Clone)]
enum Step {
    Upload(Upload),
    /// The last batch once more.
    Duplicate,
    /// A batch whose predecessor is missing.
    Gap,
    Merge,
    /// A pass that ends after being polled so often.
    CutMerge(usize),
    Prune,
    /// Deletes what is before a time.
    Expire(i64),
    Restart,
    /// The device's clock is set, and measured: so many microseconds ahead.
    Clock(i64),
    Query(i64, i64),
}

/// Frames of some sensors each: the first time, the time between rows, how many rows.
#[derive(Debug, Clone)]
struct Upload {
    sensors: HashSet<usize>,
    begin: i64,
    pace: i64,
    rows: i64,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let upload = (prop::collection::hash_set(0..SENSORS, 1..=SENSORS), prop_oneof![3 => 0..2_000_i64, 1 => 0..60_i64], 1..4_i64, 1..50_i64)
        .prop_map(|(sensors, begin, pace, rows)| Step::Upload(Upload { sensors, begin, pace, rows }));
    let step = prop_oneof![
        12 => upload,
        1 => Just(Step::Duplicate),
        1 => Just(Step::Gap),
        4 => Just(Step::Merge),
        3 => (1..40_usize).prop_map(Step::CutMerge),
        2 => Just(Step::Prune),
        1 => (0..500_i64).prop_map(Step::Expire),
        1 => Just(Step::Restart),
        1 => (-2..3_i64).prop_map(|minutes| Step::Clock(minutes * 120_000_000)),
        2 => (0..2_000_i64, 0..1_000_i64).prop_map(|(begin, length)| Step::Query(begin, begin + length)),
    ];
    prop::collection::vec(step, 1..50)
}

/// A gateway's parts, as it runs them.
struct Running {
    store: Store,
    ingest: Ingest,
    device: Arc<Device>,
    clocks: ClockWatch,
    merger: Merger,
    upkeep: Upkeep,
    reader: Reader,
    writing: JoinHandle<()>,
}

impl Running {
    async fn open(storage: &Storage) -> Self {
        let mut config = Config { storage: storage.clone(), ..Config::default() };
        config.live.replay_window = Duration::ZERO;
        config.devices.clock_correction = ClockCorrection::Measured;
        let metrics = Metrics::new();
        let store = Store::open(&config.storage).await.expect("opened");
        let registry = Registry::new(store.clone(), true, 10);
        let device = registry.get_or_register(&DeviceId::parse("pump-1").expect("good")).await.expect("registered");
        let tail = Arc::new(Tail::new(store.last_position().await.expect("read"), 1 << 20));
        let latest = Arc::new(Latest::load(&store, &registry).await.expect("read"));
        let (ingest, writer) =
            writer(&config, store.clone(), registry.clone(), tail.clone(), latest.clone(), &metrics, Readiness::starting(&[]));
        let merger = Merger::new(store.giving_way(), registry.clone(), &metrics);
        let upkeep = Upkeep::new(&config, store.clone(), registry, latest, tail, &metrics);
        let reader = Reader::new(store.clone(), &config.query, config.log.slow_query);
        let clocks = ClockWatch::new(&config.devices);
        Self { store, ingest, device, clocks, merger, upkeep, reader, writing: tokio::spawn(writer.run()) }
    }

    async fn close(self) {
        let Self { store, ingest, writing, .. } = self;
        drop(ingest);
        writing.await.expect("no panic");
        store.close().await;
    }

    /// Waits until it is the one that merges: a server notices in its own time that a connection which did so is gone.
    async fn leads(&self) {
        let asking = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(1));
            while !self.store.lead_upkeep().await.expect("asked") {
                ticks.tick().await;
            }
        };
        timeout(Duration::from_secs(60), asking).await.expect("there is no other gateway");
    }

    async fn send(&self, stream: StreamId, sequence: u64, batch: Vec<u8>) -> Outcome {
        let envelope = Envelope { sequence, batch: batch.into(), lost_batches: 0, lost_readings: 0 };
        let run = self.ingest.begin(&self.device, stream, Lane::Live, envelope).await.expect("admitted");
        let replies = self.ingest.submit(run).await.expect("handed in").replies().await.expect("answered");
        replies.into_iter().next().expect("one").outcome
    }

    /// Lets the device's clock be ahead by `micros`.
    fn set_clock(&self, micros: i64) {
        let time = |micros| Timestamp::from_micros(micros).expect("in range");
        let exchange = Exchange { sent: time(0), received: time(micros), answered: time(micros), round_trip: Duration::ZERO };
        self.clocks.measure(&self.device, exchange);
        assert_eq!(self.device.clock.correction(), -micros);
    }

    async fn query(&self, begin: i64, end: i64) -> BTreeMap<(usize, i64), (i64, i64)> {
        let time = |micros| Timestamp::from_micros(micros).expect("in range");
        let query = Query { sensors: HashSet::new(), start_time: time(begin), end_time: Some(time(end)), bucket: None };
        let mut answer = self.reader.read(&self.device, query).await.expect("answered");
        let mut found = BTreeMap::new();
        while let Some(piece) = answer.next().await.expect("answered") {
            let Piece::Readings(sensor, readings) = piece else { panic!("not asked for") };
            let Values::Int64(values) = readings.values else { panic!("not integers") };
            let sensor = sensor.name[1..].parse().expect("a number");
            let mut corrections = readings.clock_corrections.into_iter();
            for (time, value) in readings.times.into_iter().zip(values) {
                let last = found.range((sensor, i64::MIN)..(sensor + 1, i64::MIN)).next_back().map(|((_, time), _)| *time);
                assert!(last.is_none_or(|last| last < time), "in the order of time");
                found.insert((sensor, time), (value, corrections.next().unwrap_or(0)));
            }
        }
        found
    }
}

/// What should be there.
#[derive(Default)]
struct Model {
    readings: BTreeMap<(usize, i64), (i64, i64)>,
    // What is before it may be gone.
    expired: i64,
}

impl Model {
    fn check(&self, found: &BTreeMap<(usize, i64), (i64, i64)>, begin: i64, end: i64) {
        let asked = |time: &i64| (begin..end).contains(time);
        for ((sensor, time), value) in found {
            assert_eq!(self.readings.get(&(*sensor, *time)), Some(value), "sensor {sensor} at {time}");
        }
        for (reading, value) in self.readings.iter().filter(|((_, time), _)| asked(time) && *time >= self.expired) {
            assert_eq!(found.get(reading), Some(value), "{reading:?}");
        }
    }
}

/// As a device sends it whose clock is ahead by `ahead`, and what is stored of it.
fn batch(upload: &Upload, number: i64, ahead: i64) -> (Vec<u8>, Vec<Reading>) {
    let times: Vec<i64> = (0..upload.rows).map(|row| upload.begin + row * upload.pace).collect();
    let values: Vec<i64> = (0..upload.rows).map(|row| number * 100 + row).collect();
    let column = |sensor: &usize| pb::Column {
        sensor: format!("s{sensor}"),
        unit: String::new(),
        values: Some(Values::Int64(values.clone()).into()),
    };
    let columns = upload.sensors.iter().map(column).collect();
    let frame =
        pb::Frame { base_time_us: times[0] + ahead, time_deltas_us: vec![upload.pace; times.len() - 1], columns, ..Default::default() };
    let rows = upload.sensors.iter().flat_map(|sensor| times.iter().zip(&values).map(|(time, value)| ((*sensor, *time), (*value, -ahead))));
    (pb::Batch { frames: vec![frame] }.encode_to_vec(), rows.collect())
}

/// Polls a future at most so often, and then drops it, wherever it is: also right behind its last poll, in the midst of a transaction.
async fn cut_off<T>(polls: usize, future: impl Future<Output = T>) {
    let mut future = pin!(future);
    let mut left = polls;
    std::future::poll_fn(|context| {
        left = left.saturating_sub(1);
        match future.as_mut().poll(context) {
            Poll::Pending if left > 0 => Poll::Pending,
            _ => Poll::Ready(()),
        }
    })
    .await;
}

async fn check(steps: Vec<Step>, storage: &Storage) {
    let stream = StreamId::new();
    let (mut model, mut sequence) = (Model::default(), 0);
    let mut last_batch = None;
    let mut ahead = 0;
    let mut running = Running::open(storage).await;
    for step in steps {
        match step {
            Step::Upload(upload) => {
                sequence += 1;
                let (bytes, rows) = batch(&upload, sequence as i64, ahead);
                assert!(matches!(running.send(stream, sequence, bytes.clone()).await, Outcome::Stored { .. }));
                model.readings.extend(rows);
                last_batch = Some(bytes);
            }
            Step::Duplicate => {
                let Some(bytes) = last_batch.clone() else { continue };
                assert!(matches!(running.send(stream, sequence, bytes).await, Outcome::Duplicate { .. }));
            }
            Step::Gap => {
                let Some(bytes) = last_batch.clone() else { continue };
                assert!(matches!(running.send(stream, sequence + 2, bytes).await, Outcome::Gap { .. }));
            }
            Step::Merge => {
                running.leads().await;
                while running.merger.pass(|| RESTLESS).await.expect("merged").is_some() {}
            }
            Step::CutMerge(polls) => {
                running.leads().await;
                let haste = Haste { at_once: 1 + polls % 8, ..RESTLESS };
                cut_off(polls, running.merger.pass(|| haste)).await;
            }
            Step::Prune => running.upkeep.prune().await.expect("pruned"),
            Step::Expire(before) => {
                model.expired = model.expired.max(before);
                running.upkeep.expire_before(before, Instant::now() + Duration::from_secs(60)).await.expect("deleted");
            }
            Step::Restart => {
                running.close().await;
                running = Running::open(storage).await;
                running.set_clock(ahead);
            }
            Step::Clock(micros) => {
                ahead = micros;
                running.set_clock(ahead);
            }
            Step::Query(begin, end) => model.check(&running.query(begin, end).await, begin, end),
        }
    }
    model.check(&running.query(-10, 10_000).await, -10, 10_000);
    running.leads().await;
    running.upkeep.round().await.expect("merged and pruned");
    assert_eq!(running.store.pruned_position().await.expect("read"), running.store.last_position().await.expect("read"));
    model.check(&running.query(-10, 10_000).await, -10, 10_000);
    running.close().await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_query_has_what_was_stored(steps in steps()) {
        let directory = TempDir::new().expect("a temporary directory");
        run(check(steps, &test_databases::sqlite(directory.path())));
    }
}

proptest! {
    // Fewer, as each makes a database of its own.
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn a_query_has_what_was_stored_on_postgres(steps in steps()) {
        if let Some(storage) = test_databases::postgres() {
            run(check(steps, &storage));
        }
    }
}

fn run(check: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime").block_on(check);
}
