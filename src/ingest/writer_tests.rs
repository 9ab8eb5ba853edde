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
    model::{CheckedBatch, DeviceId, Timestamp, batch::BatchSensors},
    store::test_databases,
};
use proptest::prelude::*;
use std::ops::RangeInclusive;
use tempfile::TempDir;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let content = prop_oneof![6 => Just(Content::Good), 1 => Just(Content::WrongKind), 1 => Just(Content::Malformed)];
    let sent = (0..STREAMS, prop_oneof![6 => Just(0_i64), 3 => -3..=3_i64], prop_oneof![4 => Just(0_u64), 1 => 0..4_u64], content)
        .prop_map(|(stream, ahead, lost, content)| Sent { stream, ahead, lost, content });
    let step = prop_oneof![8 => prop::collection::vec(sent, 1..12).prop_map(Step::Send), 1 => Just(Step::Restart)];
    prop::collection::vec(step, 1..12)
}

/// Scenario: much waits for its commit. Guarantee: a call with small batches hands in nothing more until its own run is committed.
#[tokio::test]
async fn where_much_waits_a_call_with_small_batches_has_one_run_at_a_time() {
    let directory = TempDir::new().expect("a temporary directory");
    let mut config = Config::default();
    config.storage.data_dir = directory.path().into();
    config.ingest.pending_bytes_max = 64 << 10;
    let store = Store::open(&config.storage).await.expect("opened");
    let registry = Registry::new(store.clone(), true, 10);
    let device = registry.get_or_register(&DeviceId::parse("pump-1").expect("good")).await.expect("registered");
    let tail = Arc::new(Tail::new(Position(0), 1 << 20));
    let latest = Arc::new(Latest::load(&store, &registry).await.expect("read"));
    let (ingest, _writer) = writer(&config, store.clone(), registry, tail, latest, &Metrics::new(), Readiness::starting(&[]));
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
    let store = Store::open(&config.storage).await.expect("opened");
    let registry = Registry::new(store.clone(), true, 10);
    let device = registry.get_or_register(&DeviceId::parse("pump-1").expect("good")).await.expect("registered");
    let tail = Arc::new(Tail::new(Position(0), 1 << 20));
    let _somebody_follows = tail.head();
    let latest = Arc::new(Latest::load(&store, &registry).await.expect("read"));
    let readiness = Readiness::starting(&[]);
    let (_, writer) = writer(&config, store.clone(), registry, tail.clone(), latest.clone(), &Metrics::new(), readiness);

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

/// Two runs of one stream: five batches of 2 KiB, then two of 16 KiB. Returns the bytes of the log's entries, in KiB.
///
/// Guarantee: whatever entries a run becomes, followers are shown all of it, and the latest readings are those of its last batch.
async fn check_entries(storage: Storage) -> Vec<usize> {
    let config = Config { storage, ..Config::default() };
    let store = Store::open(&config.storage).await.expect("opened");
    let registry = Registry::new(store.clone(), true, 10);
    let device = registry.get_or_register(&DeviceId::parse("pump-1").expect("good")).await.expect("registered");
    let tail = Arc::new(Tail::new(Position(0), 1 << 20));
    let _somebody_follows = tail.head();
    let latest = Arc::new(Latest::load(&store, &registry).await.expect("read"));
    let (ingest, writer) =
        writer(&config, store.clone(), registry.clone(), tail.clone(), latest.clone(), &Metrics::new(), Readiness::starting(&[]));
    let writing = tokio::spawn(writer.run());

    let stream_id = StreamId::new();
    let runs: [(RangeInclusive<u64>, usize); 2] = [(1..=5, 2 << 10), (6..=7, 16 << 10)];
    let mut sent = Vec::new();
    for (sequences, bytes) in runs {
        let mut batches = sequences.clone().map(|sequence| {
            let one = batch(sequence, Content::Good);
            Envelope { sequence, batch: one.repeat(bytes / one.len()).into(), ..Envelope::default() }
        });
        let first = batches.next().expect("there is one");
        sent.extend_from_slice(&first.batch);
        let mut run = ingest.begin(&device, stream_id, Lane::Live, first).await.expect("admitted");
        for envelope in batches {
            sent.extend_from_slice(&envelope.batch);
            ingest.add(&mut run, envelope).expect("there is room");
        }
        let replies = ingest.submit(run).await.expect("admitted").replies().await.expect("answered");
        assert_eq!(replies.last().expect("there are some").durable_through, *sequences.end());
    }
    let TailRead::Entries(shown) = tail.read(Position(0), 100, usize::MAX) else { panic!("followers were told nothing") };
    assert_eq!(shown.iter().map(|entry| entry.batches).sum::<u64>(), 7);
    assert_eq!(shown.iter().flat_map(|entry| entry.batch.to_vec()).collect::<Vec<_>>(), sent);
    let found = |latest: &Latest| {
        let (position, found) = latest.snapshot(|_| true);
        (position, found.iter().flat_map(|found| found.batches(|_| true)).collect::<Vec<_>>())
    };
    let in_log = Latest::load(&store, &registry).await.expect("read");
    assert_eq!(found(&latest), found(&in_log));

    let log = store.read_log(Position(0), 100, usize::MAX).await.expect("read");
    drop(ingest);
    writing.await.expect("no panic");
    store.close().await;
    log.iter().map(|row| row.batch.len().div_ceil(1 << 10)).collect()
}

#[tokio::test]
async fn a_run_is_one_entry() {
    let directory = TempDir::new().expect("a temporary directory");
    assert_eq!(check_entries(test_databases::sqlite(directory.path())).await, [10, 32]);
}

#[tokio::test]
async fn on_postgres_entries_fit_a_page_unless_one_of_their_batches_does_not() {
    if let Some(storage) = test_databases::postgres() {
        assert_eq!(check_entries(storage).await, [6, 4, 32]);
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
