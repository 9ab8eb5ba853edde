//! Guarantee: retention deletes what its settings name and nothing else, the file becomes smaller for it, and of a deleted device
//! no chunk is left.

use super::*;
use crate::{
    fleet::Device,
    model::{BatchSummary, DeviceId, ValueKind, columns::Values},
    pb,
    store::{NewLogRow, SensorRow, test_databases},
};
use prost::Message;
use tempfile::TempDir;

const HOUR: i64 = 3_600_000_000;
const MIB: u64 = 1 << 20;
/// What SQLite's file keeps free at the least.
const FREE_BYTES_KEPT: u64 = 16 * MIB;

struct Fixture {
    directory: TempDir,
    config: Config,
    store: Store,
    registry: Registry,
    device: Arc<Device>,
}

impl Fixture {
    async fn open(change: impl FnOnce(&mut Config)) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let mut config = Config::default();
        config.storage.data_dir = directory.path().into();
        config.live.replay_window = Duration::ZERO;
        change(&mut config);
        let store = Store::open(&config.storage).await.expect("opened");
        let registry = Registry::new(store.clone(), true, 10);
        let device = registry.get_or_register(&DeviceId::parse("pump-1").expect("good")).await.expect("registered");
        let (name, unit, kind, create_time) = ("note".to_owned(), String::new(), ValueKind::Text, Timestamp::now());
        let sensor = SensorRow { key: 0, name, unit, kind, allow_non_finite: false, create_time };
        registry.save_sensor(&device, sensor).await.expect("registered");
        Self { directory, config, store, registry, device }
    }

    /// Appends texts of a size from a time on, one a second.
    async fn append(&self, begin: i64, texts: usize, bytes: usize) {
        let values = Values::Text(vec!["x".repeat(bytes); texts]);
        let column = pb::Column { sensor: "note".into(), unit: String::new(), values: Some(values.into()) };
        let frame =
            pb::Frame { base_time_us: begin, time_deltas_us: vec![1_000_000; texts - 1], columns: vec![column], ..Default::default() };
        let time = Timestamp::now();
        let row = NewLogRow {
            device: self.device.key,
            stream_key: 1,
            batches: 1,
            last_sequence: 1,
            receive_time: time,
            summary: BatchSummary { readings: texts as u32, first_time: time, last_time: time },
            batch: pb::Batch { frames: vec![frame] }.encode_to_vec().into(),
        };
        let mut tx = self.store.begin().await.expect("begun");
        tx.append(&[row]).await.expect("appended");
        tx.commit().await.expect("committed");
    }

    async fn round(&self) {
        self.upkeep().await.round().await.expect("done");
    }

    async fn upkeep(&self) -> Upkeep {
        self.upkeep_behind(Position(0)).await
    }

    /// Of a gateway that has started when the log ended there.
    async fn upkeep_behind(&self, head: Position) -> Upkeep {
        let latest = Arc::new(Latest::load(&self.store, &self.registry).await.expect("read"));
        let tail = Arc::new(Tail::new(head, 1 << 20));
        Upkeep::new(&self.config, self.store.clone(), self.registry.clone(), latest, tail, &Metrics::new())
    }

    /// How many readings the chunks have, and the time of the first.
    async fn merged(&self) -> (usize, Option<i64>) {
        let sensors = self.store.sensors(self.device.key).await.expect("read");
        let key = sensors.first().map_or(1, |sensor| sensor.key);
        let chunks = self.store.read_chunks(key, i64::MIN, i64::MAX, 1_000).await.expect("read");
        (chunks.iter().map(|chunk| chunk.readings).sum(), chunks.first().map(|chunk| chunk.first_time))
    }
}

#[tokio::test]
async fn chunks_go_when_all_of_their_readings_are_too_old() {
    let fixture = Fixture::open(|config| config.history.retention_age = Duration::from_secs(24 * 3600)).await;
    let now = Timestamp::now().micros();
    fixture.append(now - 30 * HOUR, 60, 10).await;
    fixture.append(now - HOUR, 60, 10).await;
    fixture.round().await;
    // Merged in one pass, they are in chunks of one size, the older of which can go on its own.
    let (readings, first) = fixture.merged().await;
    assert!((60..120).contains(&readings) && first.is_some_and(|first| first >= now - 30 * HOUR), "{readings} from {first:?}");
}

#[tokio::test]
async fn the_oldest_go_when_there_is_too_much_and_the_file_becomes_smaller() {
    let mut fixture = Fixture::open(|_| {}).await;
    let now = Timestamp::now().micros();
    for part in 0..40 {
        fixture.append(now + part * HOUR / 10, 300, 4_000).await;
    }
    fixture.round().await;
    assert_eq!(fixture.merged().await, (12_000, Some(now)));
    let used = fixture.store.used_bytes().await.expect("read");
    assert!(used > 40 * MIB, "{used} bytes");

    fixture.config.history.retention_bytes_max = 8 * MIB;
    fixture.round().await;
    let (readings, first) = fixture.merged().await;
    assert!((100..3_000).contains(&readings) && first > Some(now), "{readings} from {first:?}");
    assert!(fixture.store.used_bytes().await.expect("read") <= 8 * MIB);
    // The file is cut when the WAL is moved into it.
    fixture.store.close().await;
    let file = std::fs::metadata(fixture.directory.path().join("tidegate.db")).expect("there").len();
    assert!(file <= 8 * MIB + FREE_BYTES_KEPT + MIB, "{file} bytes");
}

#[test]
fn what_is_used_is_counted_again_before_too_much_could_be_deleted() {
    let at = |too_much: u64, freed_by_one: u64, deletions: u64| deletions_for_half(too_much * MIB, freed_by_one * MIB, deletions);
    assert_eq!([at(100, 0, 0), at(100, 0, 8)], [1, 1], "what one frees is not known");
    assert_eq!([at(99, 1, 1), at(97, 1, 3), at(90, 1, 10)], [1, 3, 10], "at the most as many as before");
    assert_eq!([at(60, 1, 60), at(20, 1, 60), at(1, 1, 60)], [30, 10, 1], "half of what is too much");
}

#[tokio::test]
async fn what_the_log_leaves_is_kept_for_what_comes_in_until_a_round_finds_nothing() {
    let fixture = Fixture::open(|config| config.history.retention_bytes_max = 8 * MIB).await;
    for part in 0..40 {
        fixture.append(part * HOUR, 300, 4_000).await;
    }
    let free = async || fixture.store.file_bytes().await.expect("read") - fixture.store.used_bytes().await.expect("read");
    let mut upkeep = fixture.upkeep().await;
    upkeep.round().await.expect("done");
    assert!(free().await > 40 * MIB, "the log's place is kept");
    upkeep.round().await.expect("done");
    assert!(free().await <= FREE_BYTES_KEPT, "given back");
}

#[tokio::test]
async fn of_a_deleted_device_no_chunk_is_left_and_none_comes_after() {
    let fixture = Fixture::open(|_| {}).await;
    fixture.append(0, 60, 10).await;
    fixture.round().await;
    assert_eq!(fixture.merged().await.0, 60);
    fixture.append(HOUR, 60, 10).await;
    fixture.registry.delete(&fixture.device, None, || ()).await.expect("deleted");
    fixture.round().await;
    fixture.store.purge_deleted().await.expect("purged");
    assert_eq!(fixture.merged().await.0, 0);
    assert_eq!(fixture.store.log_sizes(Position(0), 10).await.expect("read"), []);
}

#[tokio::test]
async fn what_waits_since_before_the_start_is_counted_by_the_size_of_what_is_merged() {
    let fixture = Fixture::open(|_| ()).await;
    for part in 0..100 {
        fixture.append(part * HOUR, 10, 1_000).await;
    }
    let mut upkeep = fixture.upkeep_behind(fixture.store.last_position().await.expect("read")).await;
    assert_eq!(upkeep.backlog_bytes(), 0);
    let merged = upkeep.merge().await.expect("merged");
    assert!(merged > Some(Position(0)) && merged < Some(Position(50)), "a pass is small here: {merged:?}");
    // All entries are of about one size.
    let left = 100 - merged.expect("checked").0 as u64;
    assert!((left * 10_000..left * 10_200).contains(&upkeep.backlog_bytes()), "{} of {left} entries", upkeep.backlog_bytes());
    upkeep.round().await.expect("done");
    assert_eq!(upkeep.backlog_bytes(), 0);
}

#[tokio::test]
async fn what_has_failed_is_not_tried_again_at_once_however_much_waits() {
    let fixture = Fixture::open(|config| {
        config.history.unmerged_bytes_max = 1_000;
        config.history.merge_interval = 2 * RETRY_INTERVAL;
    })
    .await;
    let mut upkeep = fixture.upkeep().await;
    let due = |upkeep: &Upkeep| [0, 1, 2].map(|times| upkeep.is_due(times * RETRY_INTERVAL));
    assert_eq!(due(&upkeep), [false, false, true]);
    upkeep.earlier_bytes = 2_000;
    assert_eq!(due(&upkeep), [true, true, true]);
    fixture.store.close().await;
    upkeep.try_round().await;
    assert_eq!(due(&upkeep), [false, true, true]);
}

#[test]
fn the_oldest_of_the_replay_goes_a_slice_at_a_time_or_several() {
    let now = Timestamp::now();
    let of = |position| LogSize { position: Position(position), receive_time: now, bytes: SLICE_BYTES };
    let mut replay = Replay::default();
    replay.add(&Vec::from_iter((1..=5).map(of)), Position(5));
    let day = Duration::from_secs(24 * 3600);
    let expired = |replay: &Replay, slices_kept, slices_max| replay.expired(day, slices_kept * SLICE_BYTES, slices_max);
    assert_eq!(expired(&replay, 5, 9), None);
    assert_eq!(expired(&replay, 2, 1), Some((1, Position(1))));
    assert_eq!(expired(&replay, 2, 9), Some((3, Position(3))), "no more than is too much");
    assert_eq!(replay.expired(Duration::ZERO, usize::MAX, 9), Some((5, Position(5))), "all are too old");
    assert_eq!(replay.forget(3), 3 * SLICE_BYTES);
    assert_eq!((expired(&replay, 2, 9), expired(&replay, 1, 9)), (None, Some((1, Position(4)))));
}

#[test]
fn the_more_waits_the_less_merging_rests_and_the_more_it_writes_at_once() {
    let usual = Haste { rest: REST, leisure: LEISURE, chunks_per_transaction: CHUNKS_MERGED, at_once: 1 };
    assert_eq!([0.0, 1.0].map(haste_behind), [usual; 2]);
    assert!((0.0..LEISURE).contains(&haste_behind(2.0).leisure));
    assert_eq!([2.0, BACKLOG_HURRIED].map(|backlog| Haste { leisure: LEISURE, ..haste_behind(backlog) }), [usual; 2]);
    assert_eq!(haste_behind(BACKLOG_HURRIED).leisure, 0.0);
    let behind = haste_behind(BACKLOG_HURRIED + 1.0);
    assert!(behind.rest < REST && behind.chunks_per_transaction == CHUNKS_MERGED_HURRIED && behind.at_once == 1, "{behind:?}");
    assert!(haste_behind(BACKLOG_HURRIED + 2.0).rest < behind.rest);
    let restless = Haste { rest: 0.0, leisure: 0.0, chunks_per_transaction: CHUNKS_MERGED_RESTLESS, at_once: AT_ONCE_RESTLESS };
    assert_eq!(haste_behind(BACKLOG_RESTLESS), restless);
    assert_eq!(haste_behind(2.0 * BACKLOG_RESTLESS).rest, 0.0);
}

/// Of two gateways on one database one merges, and when it is gone the other one goes on.
#[tokio::test]
async fn another_gateway_takes_over() {
    let Some(storage) = test_databases::postgres() else { return };
    let fixture = Fixture::open(|config| config.storage = storage).await;
    let other = Store::open(&fixture.config.storage).await.expect("opened");
    assert!(other.lead_upkeep().await.expect("asked"), "there is no other gateway");
    fixture.append(0, 60, 10).await;
    let mut upkeep = fixture.upkeep().await;
    upkeep.earlier_bytes = 1_000;
    upkeep.round().await.expect("done");
    assert_eq!((fixture.merged().await.0, upkeep.backlog_bytes()), (0, 0), "that is for the other one");
    other.close().await;
    let takes_over = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(1));
        while fixture.merged().await.0 < 60 {
            ticks.tick().await;
            upkeep.round().await.expect("done");
        }
    };
    // The server notices in its own time that the other one is gone.
    tokio::time::timeout(Duration::from_secs(60), takes_over).await.expect("merged");
    assert_eq!(fixture.store.log_sizes(Position(0), 10).await.expect("read"), [], "and pruned");
}

/// Linux shows it for each thread.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn what_is_merged_is_read_by_a_thread_that_gives_way() {
    /// The threads of this process's SQLite connections that give way so much.
    fn readers(nice: i32) -> usize {
        let threads = std::fs::read_dir("/proc/self/task").expect("the threads").flatten();
        // "number (name) state …", of which the 17th word is the nice value; a thread may be gone meanwhile.
        let stats = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
        let of_sqlite = stats.filter_map(|stat| stat.split_once("(sqlx-sqlite")?.1.rsplit_once(") ").map(|(_, words)| words.to_owned()));
        of_sqlite.filter(|words| words.split(' ').nth(16) == Some(&*nice.to_string())).count()
    }
    let fixture = Fixture::open(|_| ()).await;
    fixture.append(0, 10, 10).await;
    let runtime = tokio::runtime::Handle::current();
    let merging = std::thread::spawn(move || {
        let before = rustix::process::getpriority_process(None).expect("known");
        rustix::process::setpriority_process(None, before + 7).expect("lower");
        // As it is now: there is a lowest.
        let nice = rustix::process::getpriority_process(None).expect("known");
        assert!(nice > before, "run this with a higher priority");
        runtime.block_on(fixture.round());
        (readers(nice), runtime.block_on(fixture.merged()).0)
    });
    let (readers, merged) = merging.join().expect("no panic");
    assert_eq!((readers, merged), (1, 10));
}
