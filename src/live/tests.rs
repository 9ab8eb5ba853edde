//! Followers and the latest values on a store of their own, without a gateway around them.

use super::{EntryLatest, Filter, Follower, Item, Latest, Start, Tail, TailEntry, follower::Sources};
use crate::{
    config::Config,
    error::{Error, Failure},
    fleet::{Device, Registry},
    model::{
        BatchSummary, CheckedBatch, DeviceId, LatestReadings, Position, Timestamp, ValueKind,
        batch::{BatchLimits, BatchSensors, decode_stored},
        columns::Values,
    },
    pb,
    store::{NewLogRow, SensorRow, Store},
};
use bytes::Bytes;
use prost::Message;
use sqlx::{ConnectOptions, Connection, sqlite::SqliteConnectOptions};
use std::{collections::HashSet, sync::Arc, time::Duration};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

struct Fixture {
    directory: TempDir,
    store: Store,
    registry: Registry,
}

impl Fixture {
    async fn open() -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let mut config = Config::default();
        config.storage.data_dir = directory.path().into();
        let store = Store::open(&config.storage).await.expect("opened");
        let registry = Registry::new(store.clone(), true, config.devices.devices_max);
        Self { directory, store, registry }
    }

    /// A device with these sensors.
    async fn device(&self, id: &str, sensors: &[String]) -> Arc<Device> {
        let device = self.registry.get_or_register(&DeviceId::parse(id).expect("good")).await.expect("registered");
        let create_time = Timestamp::now();
        for name in sensors.iter().cloned() {
            let row = SensorRow { key: 0, name, unit: String::new(), kind: ValueKind::Double, allow_non_finite: false, create_time };
            self.registry.save_sensor(&device, row).await.expect("registered");
        }
        device
    }

    /// Appends batches of a device to the log; nobody else is told.
    async fn append(&self, device: &Device, batches: &[Bytes]) -> Vec<Position> {
        let time = Timestamp::now();
        let summary = BatchSummary { readings: 1, first_time: time, last_time: time };
        let rows: Vec<NewLogRow> = (1..)
            .zip(batches)
            .map(|(sequence, batch)| NewLogRow {
                device: device.key,
                stream_key: 1,
                batches: 1,
                last_sequence: sequence,
                receive_time: time,
                summary,
                batch: batch.clone(),
            })
            .collect();
        let mut tx = self.store.begin().await.expect("begun");
        let first = tx.append(&rows).await.expect("appended");
        tx.commit().await.expect("committed");
        (first.0..).take(rows.len()).map(Position).collect()
    }

    fn sources(&self, tail: Tail) -> Sources {
        Sources {
            store: self.store.clone(),
            tail: Arc::new(tail),
            latest: Arc::new(Latest::default()),
            registry: self.registry.clone(),
            drain: CancellationToken::new(),
        }
    }
}

/// One reading of each of the sensors, all at a time in seconds.
fn batch(sensors: &[String], seconds: i64, value: f64) -> Bytes {
    let column = |name: &String| {
        let values = Values::Double(vec![value]);
        pb::Column { sensor: name.clone(), unit: String::new(), values: Some(values.into()) }
    };
    let frame = pb::Frame {
        base_time_us: seconds * 1_000_000,
        time_deltas_us: vec![],
        columns: sensors.iter().map(column).collect(),
        ..Default::default()
    };
    pb::Batch { frames: vec![frame] }.encode_to_vec().into()
}

fn latest_of(device: &Device, batch: Bytes) -> EntryLatest {
    let limits = BatchLimits {
        bytes_max: 1 << 20,
        readings_max: 100_000,
        sensors_max: 1_000,
        time_skew_max: Duration::ZERO,
        reading_age_max: Duration::ZERO,
    };
    let checked = CheckedBatch::check(&batch, &limits, Timestamp::now(), device.sensors().finder()).expect("good");
    let BatchSensors::Known(next) = checked.sensors else { panic!("the device has all of them") };
    let mut latest = LatestReadings::default();
    latest.absorb(next);
    EntryLatest::Found(latest)
}

/// A batch was committed at a position.
fn add(latest: &Latest, position: i64, device: &Arc<Device>, batch: Bytes) {
    latest.add([(Position(position), device.clone(), latest_of(device, batch))]).expect("readable");
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("s{index}")).collect()
}

/// The latest time in microseconds and value of each sensor, of all devices.
fn shown(latest: &Latest) -> Vec<(String, i64, Values)> {
    let (_, devices) = latest.snapshot(|_| true);
    let batches = devices.iter().flat_map(|device| device.batches(|_| true));
    let columns = batches.flat_map(|batch| decode_stored(batch.encode_to_vec().into(), |_| true).expect("a batch"));
    columns.map(|column| (column.sensor, column.times[0], column.values)).collect()
}

async fn until_synced(follower: &mut Follower) -> (Vec<Item>, Position) {
    let mut before = Vec::new();
    loop {
        match follower.next().await.expect("no error") {
            Item::Synced(position) => return (before, position),
            item => before.push(item),
        }
    }
}

#[tokio::test]
async fn a_replay_of_which_nothing_is_wanted_has_heartbeats_that_move_on() {
    let fixture = Fixture::open().await;
    let device = fixture.device("other", &[]).await;
    let batch = batch(&names(1), 1, 1.0);
    let positions = fixture.append(&device, &vec![batch.clone(); 300]).await;
    let end = positions[299];
    let in_store = Tail::new(end, 1 << 20);
    let in_memory = Tail::new(Position(0), 1 << 20);
    let _somebody_follows = in_memory.head();
    in_memory.publish(positions.iter().map(|&position| TailEntry {
        position,
        device: device.clone(),
        receive_time: Timestamp::now(),
        batches: 1,
        batch: batch.clone(),
    }));
    for tail in [in_store, in_memory] {
        let filter = Filter { devices: HashSet::from([DeviceId::parse("wanted").expect("good")]), ..Filter::default() };
        // Due at all times, so that the test does not depend on the time that reading takes.
        let mut follower = Follower::new(fixture.sources(tail), filter, Start::Beginning, Duration::ZERO).await.expect("begun");
        let (before, synced) = until_synced(&mut follower).await;
        assert_eq!(synced, end);
        let tokens: Vec<Position> = before
            .into_iter()
            .map(|item| match item {
                Item::Heartbeat(position) => position,
                other => panic!("nothing is wanted: {other:?}"),
            })
            .collect();
        assert!(tokens.len() > 1 && tokens[0] < end && tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    }
}

#[tokio::test]
async fn without_a_follower_nothing_is_kept_in_memory_and_the_next_one_misses_nothing() {
    let fixture = Fixture::open().await;
    let device = fixture.device("pump-1", &[]).await;
    let batch = batch(&names(1), 1, 1.0);
    let mut positions = fixture.append(&device, &vec![batch.clone(); 2]).await;
    let sources = fixture.sources(Tail::new(Position(positions[0].0 - 1), 1 << 20));
    let tail = sources.tail.clone();
    let publish = |positions: &[Position]| {
        tail.publish(positions.iter().map(|&position| TailEntry {
            position,
            device: device.clone(),
            receive_time: Timestamp::now(),
            batches: 1,
            batch: batch.clone(),
        }));
    };
    publish(&positions[..2]);
    assert_eq!(tail.begins_after(), positions[1], "nobody follows");
    let mut follower = Follower::new(sources, Filter::default(), Start::Beginning, Duration::from_secs(60)).await.expect("begun");
    let position_of = |item| match item {
        Item::Readings { position, .. } => position,
        other => panic!("not readings: {other:?}"),
    };
    let (before, synced) = until_synced(&mut follower).await;
    let mut shown: Vec<Position> = before.into_iter().map(position_of).collect();
    assert_eq!((&shown[..], synced), (&positions[..], positions[1]), "from the store");
    positions.extend(fixture.append(&device, &vec![batch.clone(); 2]).await);
    publish(&positions[2..]);
    assert_eq!(tail.begins_after(), positions[1], "somebody follows");
    // From the tail: the store has them no longer.
    let mut tx = fixture.store.begin().await.expect("begun");
    tx.prune_log(positions[3]).await.expect("pruned");
    tx.commit().await.expect("committed");
    shown.extend([follower.next().await, follower.next().await].map(|item| position_of(item.expect("no error"))));
    assert_eq!(shown, positions);
    drop(follower);
    positions.extend(fixture.append(&device, &vec![batch.clone(); 2]).await);
    publish(&positions[4..]);
    assert_eq!(tail.begins_after(), positions[5], "nobody follows any more");
}

#[tokio::test]
async fn a_follower_whose_place_in_the_log_is_pruned_while_it_reads_is_told() {
    let fixture = Fixture::open().await;
    let device = fixture.device("pump-1", &[]).await;
    let positions = fixture.append(&device, &vec![batch(&names(1), 1, 1.0); 300]).await;
    let sources = fixture.sources(Tail::new(positions[299], 1 << 20));
    let mut follower = Follower::new(sources, Filter::default(), Start::Beginning, Duration::from_secs(60)).await.expect("begun");
    let mut shown = vec![follower.next().await.expect("the first")];
    let mut tx = fixture.store.begin().await.expect("begun");
    tx.prune_log(positions[200]).await.expect("pruned");
    tx.commit().await.expect("committed");
    let refused = loop {
        match follower.next().await {
            Ok(item) => shown.push(item),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Failure::Refused(Error::PositionExpired { oldest }) if oldest == positions[201]), "{refused:?}");
    let shown: Vec<Position> = shown
        .into_iter()
        .map(|item| match item {
            Item::Readings { position, .. } => position,
            other => panic!("not readings: {other:?}"),
        })
        .collect();
    assert_eq!(shown, positions[..shown.len()], "without a hole up to there");
}

#[tokio::test]
async fn a_token_of_a_commit_that_the_tail_has_not_been_told_of_yet_is_good() {
    let fixture = Fixture::open().await;
    let device = fixture.device("pump-1", &[]).await;
    let positions = fixture.append(&device, &vec![batch(&names(1), 1, 1.0); 3]).await;
    let sources = fixture.sources(Tail::new(Position(0), 1 << 20));
    let follow = |position| Follower::new(sources.clone(), Filter::default(), Start::After(position), Duration::from_secs(60));
    let mut follower = follow(positions[1]).await.expect("the store has it");
    assert_eq!(until_synced(&mut follower).await, (vec![], positions[1]));
    assert!(follow(Position(positions[2].0 + 1)).await.is_err(), "the store does not have it");
}

#[tokio::test]
async fn only_wanted_devices_are_in_a_snapshot_and_it_stays_as_it_was() {
    let fixture = Fixture::open().await;
    let sensors = names(1);
    let latest = Latest::default();
    let (a, b) = (fixture.device("a", &sensors).await, fixture.device("b", &sensors).await);
    add(&latest, 1, &a, batch(&sensors, 5, 1.0));
    add(&latest, 2, &b, batch(&sensors, 5, 1.0));
    let (position, found) = latest.snapshot(|id| *id == b.id);
    add(&latest, 3, &b, batch(&sensors, 6, 2.0));
    assert_eq!((position, found.len(), found[0].device.key), (Position(2), 1, b.key));
    let times = |devices: &[super::DeviceLatest]| devices[0].batches(|_| true)[0].frames[0].base_time_us;
    assert_eq!(times(&found), 5_000_000);
    assert_eq!(times(&latest.snapshot(|id| *id == b.id).1), 6_000_000);
}

#[tokio::test]
async fn nothing_of_a_deleted_device_is_kept_or_saved() {
    let fixture = Fixture::open().await;
    let sensors = names(1);
    let (late, saved_late) = (fixture.device("late", &sensors).await, fixture.device("saved-late", &sensors).await);
    let latest = Latest::default();
    // Its batch was under way when it was deleted.
    fixture.registry.delete(&late, None, || ()).await.expect("deleted");
    latest.forget(late.key);
    add(&latest, 1, &late, batch(&sensors, 5, 1.0));
    assert_eq!(shown(&latest), []);
    // It was deleted when its reading was about to be saved.
    add(&latest, 2, &saved_late, batch(&sensors, 5, 1.0));
    fixture.registry.delete(&saved_late, None, || ()).await.expect("deleted");
    fixture.store.purge_deleted().await.expect("purged");
    latest.save(&fixture.store).await.expect("saved");
    assert_eq!(fixture.store.latest().await.expect("read").1, []);
}

#[tokio::test]
async fn a_start_from_a_position_that_is_behind_the_saved_readings_comes_to_the_same() {
    let fixture = Fixture::open().await;
    let sensors = names(1);
    let device = fixture.device("pump-1", &sensors).await;
    // Twice the same time, and one that comes late.
    let batches = [(5, 1.0), (5, 2.0), (4, 3.0)].map(|(time, value)| batch(&sensors, time, value));
    fixture.append(&device, &batches).await;
    let expected = [("s0".to_owned(), 5_000_000, Values::Double(vec![2.0]))];
    let latest = Latest::load(&fixture.store, &fixture.registry).await.expect("read");
    assert_eq!(shown(&latest), expected);
    latest.save(&fixture.store).await.expect("saved");
    for behind in 0..=3 {
        fixture.store.save_latest(&[], Some(Position(behind))).await.expect("saved");
        assert_eq!(shown(&Latest::load(&fixture.store, &fixture.registry).await.expect("read")), expected, "from {behind}");
    }
}

#[tokio::test]
async fn a_save_that_breaks_off_leaves_the_position_and_the_next_one_makes_it_whole() {
    let fixture = Fixture::open().await;
    let sensors = names(600);
    let device = fixture.device("pump-1", &sensors).await;
    let positions = fixture.append(&device, &[batch(&sensors, 5, 1.0)]).await;
    let latest = Latest::load(&fixture.store, &fixture.registry).await.expect("read");
    let options = SqliteConnectOptions::new().filename(fixture.directory.path().join("tidegate.db"));
    let mut connection = options.connect().await.expect("connected");
    let full = "CREATE TRIGGER full BEFORE INSERT ON latest_readings WHEN (SELECT count(*) FROM latest_readings) >= 550 \
                BEGIN SELECT RAISE(ABORT, 'full'); END";
    sqlx::query(full).execute(&mut connection).await.expect("made");
    latest.save(&fixture.store).await.expect_err("full");
    let (position, rows) = fixture.store.latest().await.expect("read");
    assert!(position == Position(0) && (1..550).contains(&rows.len()), "{} rows as of {position:?}", rows.len());
    sqlx::query("DROP TRIGGER full").execute(&mut connection).await.expect("dropped");
    connection.close().await.expect("closed");
    latest.save(&fixture.store).await.expect("saved");
    let (position, rows) = fixture.store.latest().await.expect("read");
    assert_eq!((position, rows.len()), (positions[0], 600));
}
