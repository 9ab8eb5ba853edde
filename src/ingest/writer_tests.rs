//! Guarantee: whatever devices send, in whatever order, over whatever restarts, the log holds each accepted batch once and
//! in order, every batch gets the outcome that the rules of sequences give it, and the ledger adds up.

use super::*;
use crate::{
    config::Storage,
    fleet::Registry,
    ingest::{Envelope, Lane},
    live::tail::TailRead,
    model::{
        DeviceId, Timestamp,
        batch::{RejectReason, reason_name},
        columns::Values,
    },
    pb,
    store::{Count, LedgerRow, test_databases},
};
use proptest::prelude::*;
use prost::Message;
use tempfile::TempDir;
use tokio::task::JoinHandle;

const STREAMS: usize = 3;

/// What a batch holds.
#[derive(Debug, Clone, Copy)]
enum Content {
    Good,
    WrongKind,
    Malformed,
}

#[derive(Debug, Clone)]
enum Step {
    /// Batches handed in one after the other, without waiting for replies between them.
    Send(Vec<Sent>),
    Restart,
}

#[derive(Debug, Clone)]
struct Sent {
    stream: usize,
    /// The sequence less the one that the model expects.
    ahead: i64,
    lost: u64,
    content: Content,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let content = prop_oneof![6 => Just(Content::Good), 1 => Just(Content::WrongKind), 1 => Just(Content::Malformed)];
    let sent = (0..STREAMS, prop_oneof![6 => Just(0_i64), 3 => -3..=3_i64], prop_oneof![4 => Just(0_u64), 1 => 0..4_u64], content)
        .prop_map(|(stream, ahead, lost, content)| Sent { stream, ahead, lost, content });
    let step = prop_oneof![8 => prop::collection::vec(sent, 1..12).prop_map(Step::Send), 1 => Just(Step::Restart)];
    prop::collection::vec(step, 1..12)
}

fn batch(sequence: u64, content: Content) -> Vec<u8> {
    let values = match content {
        Content::Good => Values::Double(vec![sequence as f64, 0.5]),
        Content::WrongKind => Values::Bool(vec![true, false]),
        Content::Malformed => return vec![0xff; 4],
    };
    let column = pb::Column { sensor: "t".into(), unit: "Cel".into(), values: Some(values.into()) };
    let frame = pb::Frame { base_time_us: sequence as i64 * 1_000_000, time_deltas_us: vec![1_000], columns: vec![column] };
    pb::Batch { frames: vec![frame] }.encode_to_vec()
}

/// The rules, without a database.
#[derive(Default)]
struct Model {
    last: [u64; STREAMS],
    log: Vec<Vec<u8>>,
    stored: Count,
    duplicate: Count,
    lost: Count,
    rejected: BTreeMap<&'static str, Count>,
    // The first good batch fixes the sensor's kind; the first of all may fix the wrong one.
    kind: Option<bool>,
}

impl Model {
    fn send(&mut self, sent: &Sent, sequence: u64, bytes: &[u8]) -> Outcome {
        let readings = if matches!(sent.content, Content::Malformed) { 0 } else { 2 };
        let last = &mut self.last[sent.stream];
        if sequence <= *last {
            self.duplicate.add(readings);
            return Outcome::Duplicate { readings };
        }
        if sequence > *last + 1 + sent.lost {
            return Outcome::Gap { expected: *last + 1 };
        }
        let skipped = sequence - *last - 1;
        self.lost.batches += skipped;
        self.lost.readings += skipped * 2;
        *last = sequence;
        let is_double = matches!(sent.content, Content::Good);
        let reject = match sent.content {
            Content::Malformed => Some(("MALFORMED", 0)),
            _ if *self.kind.get_or_insert(is_double) != is_double => Some(("KIND_CHANGED", 2)),
            _ => None,
        };
        match reject {
            Some((reason, readings)) => {
                self.rejected.entry(reason).or_default().add(readings);
                Outcome::Rejected(BatchReject { reason: RejectReason::Unspecified, field: String::new(), message: reason.into(), readings })
            }
            None => {
                self.log.push(bytes.to_vec());
                self.stored.add(2);
                Outcome::Stored { readings: 2 }
            }
        }
    }
}

/// A writer on a store, as the gateway runs it.
struct Running {
    store: Store,
    ingest: Ingest,
    device: Arc<Device>,
    writing: JoinHandle<()>,
}

impl Running {
    async fn open(storage: &Storage) -> Self {
        let config = Config { storage: storage.clone(), ..Config::default() };
        let store = Store::open(&config.storage).await.expect("opened");
        let registry = Registry::new(store.clone(), true, 10);
        let device = registry.get_or_register(&DeviceId::parse("pump-1").expect("good")).await.expect("registered");
        let tail = Arc::new(Tail::new(store.last_position().await.expect("read"), 1 << 20));
        let latest = Arc::new(Latest::load(&store, &registry).await.expect("read"));
        let (ingest, writer) = writer(&config, store.clone(), registry, tail, latest, &Metrics::new(), Readiness::starting(&[]));
        Self { store, ingest, device, writing: tokio::spawn(writer.run()) }
    }

    async fn close(self) {
        drop(self.ingest);
        self.writing.await.expect("no panic");
        self.store.close().await;
    }
}

/// The outcome, with a rejection's reason only.
fn comparable(outcome: Outcome) -> (Outcome, String) {
    match outcome {
        Outcome::Rejected(reject) => {
            let reason = if reject.reason == RejectReason::Unspecified { reject.message } else { reason_name(reject.reason).to_owned() };
            (Outcome::Gap { expected: 0 }, reason)
        }
        other => (other, String::new()),
    }
}

async fn check(steps: Vec<Step>, storage: &Storage) {
    let streams: Vec<StreamId> = (0..STREAMS).map(|_| StreamId::new()).collect();
    let mut model = Model::default();
    let mut running = Running::open(storage).await;
    for step in steps {
        let Step::Send(sends) = step else {
            running.close().await;
            running = Running::open(storage).await;
            continue;
        };
        let (mut pending, mut expected_replies, mut run) = (Vec::new(), Vec::new(), None::<Run>);
        for sent in sends {
            let expected = model.last[sent.stream] as i64 + 1;
            let sequence = (expected + sent.ahead).max(1) as u64;
            let bytes = batch(sequence, sent.content);
            let lost_batches = sent.lost.min(sequence - 1);
            let sent = Sent { lost: lost_batches, ..sent };
            let skipped = sequence.saturating_sub(expected as u64);
            let envelope = Envelope { sequence, batch: bytes.clone().into(), lost_batches, lost_readings: skipped * 2 };
            let outcome = model.send(&sent, sequence, &bytes);
            expected_replies.push((sequence, comparable(outcome), model.last[sent.stream]));
            // Batches of one stream that come behind one another are one run, as they are when they come in fast.
            let left = match run.take_if(|run| run.stream_id != streams[sent.stream]) {
                Some(whole) => {
                    pending.push(running.ingest.submit(whole).await.expect("admitted"));
                    Some(envelope)
                }
                None => match &mut run {
                    Some(run) => running.ingest.add(run, envelope).err(),
                    None => Some(envelope),
                },
            };
            if let Some(envelope) = left {
                assert!(run.is_none(), "there is room for all");
                run = Some(running.ingest.begin(&running.device, streams[sent.stream], Lane::Live, envelope).await.expect("admitted"));
            }
        }
        if let Some(run) = run {
            pending.push(running.ingest.submit(run).await.expect("admitted"));
        }
        let mut replies = Vec::new();
        for pending in pending {
            replies.extend(pending.replies().await.expect("answered"));
        }
        let shown = replies.into_iter().map(|reply| (reply.sequence, comparable(reply.outcome), reply.durable_through));
        assert_eq!(shown.collect::<Vec<_>>(), expected_replies);
    }
    let log = running.store.read_log(Position(0), 10_000, usize::MAX).await.expect("read");
    assert!(log.windows(2).all(|pair| pair[0].position < pair[1].position));
    // An entry of the log may hold several batches, one behind the other.
    assert_eq!(log.into_iter().flat_map(|row| row.batch.to_vec()).collect::<Vec<_>>(), model.log.concat());
    let ledger = running.store.ledger(running.device.key).await.expect("read");
    let rejected = model.rejected.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect();
    let (stored, duplicate, lost) = (model.stored, model.duplicate, model.lost);
    assert_eq!(ledger, LedgerRow { stored, duplicate, lost, rejected, streams: ledger.streams.clone() });
    for (stream_id, last) in streams.iter().zip(model.last) {
        assert_eq!(running.store.last_sequence(running.device.key, *stream_id).await.expect("read"), last);
    }
    running.close().await;
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn the_log_and_the_ledger_are_what_the_rules_say(steps in steps()) {
        let directory = TempDir::new().expect("a temporary directory");
        run(check(steps, &test_databases::sqlite(directory.path())));
    }
}

proptest! {
    // Fewer, as each makes a database of its own.
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn the_log_and_the_ledger_are_what_the_rules_say_on_postgres(steps in steps()) {
        if let Some(storage) = test_databases::postgres() {
            run(check(steps, &storage));
        }
    }
}

fn run(check: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(check);
}
