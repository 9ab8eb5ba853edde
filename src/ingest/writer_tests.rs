//! Guarantee: whatever devices send, in whatever order, over whatever restarts, the log holds each accepted batch once and
//! in order, every batch gets the outcome that the rules of sequences give it, and the ledger adds up.

use super::*;
use crate::{
    config::Storage,
    fleet::Registry,
    ingest::{
        Envelope, Lane,
        rules::{Content, Running, STREAMS, Sent, Step, batch, check},
    },
    live::tail::TailRead,
    model::{CheckedBatch, DeviceId, Timestamp, batch::BatchSensors, columns::Values},
    pb,
    store::test_databases,
};
use proptest::prelude::*;
use prost::Message;
use tempfile::TempDir;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let content = prop_oneof![6 => Just(Content::Good), 1 => Just(Content::WrongKind), 1 => Just(Content::Malformed)];
    let sent = (0..STREAMS, prop_oneof![6 => Just(0_i64), 3 => -3..=3_i64], prop_oneof![4 => Just(0_u64), 1 => 0..4_u64], content)
        .prop_map(|(stream, ahead, lost, content)| Sent { stream, ahead, lost, content });
    let step = prop_oneof![8 => prop::collection::vec(sent, 1..12).prop_map(Step::Send), 1 => Just(Step::Restart)];
    prop::collection::vec(step, 1..12)
}

/// A device, and a writer that does not run yet, on a new database.
struct Fixture {
    store: Store,
    registry: Registry,
    device: Arc<Device>,
    tail: Arc<Tail>,
    latest: Arc<Latest>,
    ingest: Ingest,
    writer: Writer,
}

impl Fixture {
    async fn open(config: &Config) -> Self {
        let store = Store::open(&config.storage).await.expect("opened");
        let registry = Registry::new(store.clone(), true, 10);
        let device = registry.get_or_register(&DeviceId::parse("pump-1").expect("good")).await.expect("registered");
        let tail = Arc::new(Tail::new(Position(0), 1 << 20));
        let latest = Arc::new(Latest::load(&store, &registry).await.expect("read"));
        let readiness = Readiness::starting(&[]);
        let (ingest, writer) = writer(config, store.clone(), registry.clone(), tail.clone(), latest.clone(), &Metrics::new(), readiness);
        Self { store, registry, device, tail, latest, ingest, writer }
    }
}

/// Scenario: much waits for its commit. Guarantee: a call with small batches hands in nothing more until its own run is committed.
#[tokio::test]
async fn where_much_waits_a_call_with_small_batches_has_one_run_at_a_time() {
    let directory = TempDir::new().expect("a temporary directory");
    let mut config = Config::default();
    config.storage.data_dir = directory.path().into();
    config.ingest.pending_bytes_max = 64 << 10;
    let Fixture { store, device, ingest, writer: _writer, .. } = Fixture::open(&config).await;
    let begin = async |batch: Vec<u8>| {
        let envelope = Envelope { sequence: 1, batch: batch.into(), ..Envelope::default() };
        ingest.begin(&device, StreamId::new(), Lane::Live, envelope).await.expect("room")
    };

    let small = begin(batch(1, Content::Good)).await;
    assert!(small.has_small_batches());
    assert!(ingest.hands_in_more(1, true), "little waits");
    let large = begin(vec![0; 20 << 10]).await;
    assert!(!large.has_small_batches());
    assert!(!ingest.hands_in_more(1, true));
    assert!(ingest.hands_in_more(0, true), "nothing of its own waits");
    assert!(ingest.hands_in_more(1, false), "large batches are taken as ever");
    drop(large);
    assert!(ingest.hands_in_more(1, true));
    store.close().await;
}

/// Scenario: a commit fails, and yet the store has it. Guarantee: once the store is back, followers and the latest values have
/// what it holds, and the device's next batch is judged by it.
#[tokio::test]
async fn what_a_commit_of_unknown_outcome_stored_is_told_when_the_store_is_back() {
    let directory = TempDir::new().expect("a temporary directory");
    let mut config = Config::default();
    config.storage.data_dir = directory.path().into();
    let Fixture { store, device, tail, latest, writer, .. } = Fixture::open(&config).await;
    let _somebody_follows = tail.head();

    let bytes: bytes::Bytes = batch(1, Content::Good).into();
    let now = Timestamp::now();
    let checked = CheckedBatch::check(&bytes, &limits(&config), now, device.sensors().finder()).expect("good");
    let BatchSensors::New(uses) = &checked.sensors else { panic!("the device has no sensors") };
    let sensors = device.judge(uses, checked.summary.readings, &HashMap::new(), 10, now).expect("agrees");
    let mut tx = store.begin().await.expect("begun");
    let stream = tx.stream(device.key, StreamId::new(), now).await.expect("made");
    tx.insert_sensor(device.key, &sensors[0]).await.expect("inserted");
    let row = NewLogRow {
        device: device.key,
        stream_key: stream.key,
        batches: 1,
        last_sequence: 1,
        receive_time: now,
        summary: checked.summary,
        batch: bytes.clone(),
    };
    tx.append(&[row]).await.expect("appended");
    tx.commit().await.expect("committed");
    assert!(device.sensor("t").is_none(), "nobody was told");

    writer.catch_up().await.expect("the store is well");
    let TailRead::Entries(entries) = tail.read(Position(0), 10, usize::MAX) else { panic!("followers were told nothing") };
    assert_eq!((entries.len(), &entries[0].batch), (1, &bytes));
    assert_eq!(device.sensor("t").map(|sensor| sensor.kind), Some(crate::model::ValueKind::Double));
    let (position, found) = latest.snapshot(|_| true);
    assert_eq!((position, found.len()), (Position(1), 1));
}

/// A batch of about so many bytes with one sensor, whose last reading is so many seconds after the epoch.
fn batch_of(sensor: &str, seconds: i64, bytes: usize) -> Vec<u8> {
    let values: Vec<f64> = (0..bytes / 9).map(|nth| nth as f64).collect();
    let base_time_us = seconds * 1_000_000 - values.len() as i64 + 1;
    let column = pb::Column { sensor: sensor.into(), unit: "Cel".into(), values: Some(Values::Double(values.clone()).into()) };
    let frame = pb::Frame { base_time_us, time_deltas_us: vec![1; values.len() - 1], columns: vec![column], ..Default::default() };
    pb::Batch { frames: vec![frame] }.encode_to_vec()
}

/// Sends runs of one stream, each given by the bytes of its batches, of which the first has a sensor that the others lack and the second the
/// latest time of all. Returns how many batches each entry of the log has that they become.
///
/// Guarantee: whatever entries a run becomes, followers are shown all of it, and the latest readings are those of all of its batches.
async fn check_entries(storage: Storage, runs: &[&[usize]]) -> Vec<u64> {
    let config = Config { storage, ..Config::default() };
    let Fixture { store, registry, device, tail, latest, ingest, writer } = Fixture::open(&config).await;
    let _somebody_follows = tail.head();
    let writing = tokio::spawn(writer.run());

    let (stream_id, mut sequences, mut sent) = (StreamId::new(), 1.., Vec::new());
    // The first run has the sensors registered: what a run's latest readings are is known of those that are.
    let registering: &[usize] = &[100, 100];
    for (number, bytes) in std::iter::once(&registering).chain(runs).enumerate() {
        let mut envelopes = bytes.iter().enumerate().zip(&mut sequences).map(|((nth, bytes), sequence)| {
            let (sensor, later) = [("a", 0), ("b", 9)].get(nth).copied().unwrap_or(("b", nth as i64 - 2));
            Envelope { sequence, batch: batch_of(sensor, 10 * number as i64 + later + 1, *bytes).into(), ..Envelope::default() }
        });
        let first = envelopes.next().expect("there is one");
        sent.extend_from_slice(&first.batch);
        let mut run = ingest.begin(&device, stream_id, Lane::Live, first).await.expect("admitted");
        for envelope in envelopes {
            sent.extend_from_slice(&envelope.batch);
            ingest.add(&mut run, envelope).expect("there is room");
        }
        let replies = ingest.submit(run).await.expect("admitted").replies().await.expect("answered");
        assert!(replies.iter().all(|reply| matches!(reply.outcome, Outcome::Stored { .. })), "{replies:?}");
        let found = |latest: &Latest| {
            let (position, found) = latest.snapshot(|_| true);
            (position, found.iter().flat_map(|found| found.batches(|_| true)).collect::<Vec<_>>())
        };
        let in_log = Latest::load(&store, &registry).await.expect("read");
        assert_eq!(found(&latest), found(&in_log), "run {number}");
    }
    let TailRead::Entries(shown) = tail.read(Position(0), 100, usize::MAX) else { panic!("followers were told nothing") };
    assert_eq!(shown.iter().flat_map(|entry| entry.batch.to_vec()).collect::<Vec<_>>(), sent);

    let log = store.read_log(Position(0), 100, usize::MAX).await.expect("read");
    drop(ingest);
    writing.await.expect("no panic");
    store.close().await;
    let batches: Vec<u64> = log.iter().map(|row| row.batches).collect();
    assert_eq!(shown.iter().map(|entry| entry.batches).collect::<Vec<_>>(), batches);
    batches[1..].to_vec()
}

const KB: usize = 1_000;
const RUNS: [&[usize]; 3] = [&[2 * KB; 9], &[12 * KB; 2], &[3 * KB, 12 * KB, KB]];

#[tokio::test]
async fn a_run_is_one_entry() {
    let directory = TempDir::new().expect("a temporary directory");
    assert_eq!(check_entries(test_databases::sqlite(directory.path()), &RUNS).await, [9, 2, 3]);
}

#[tokio::test]
async fn on_postgres_entries_fit_a_page_unless_one_of_their_batches_does_not() {
    if let Some(storage) = test_databases::postgres() {
        assert_eq!(check_entries(storage, &RUNS).await, [3, 3, 3, 2, 1, 2]);
    }
}

async fn check_on(steps: Vec<Step>, storage: Storage) {
    let device = DeviceId::parse("pump-1").expect("good");
    let running = Running::open(&storage).await;
    check(steps, &storage, running, &device).await.close().await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn the_log_and_the_ledger_are_what_the_rules_say(steps in steps()) {
        let directory = TempDir::new().expect("a temporary directory");
        run(check_on(steps, test_databases::sqlite(directory.path())));
    }
}

proptest! {
    // Fewer, as each makes a database of its own.
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn the_log_and_the_ledger_are_what_the_rules_say_on_postgres(steps in steps()) {
        if let Some(storage) = test_databases::postgres() {
            run(check_on(steps, storage));
        }
    }
}

fn run(check: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(check);
}
