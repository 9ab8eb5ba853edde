//! The rules of sequences without a database, and a writer that is compared with them.

use super::{Envelope, Ingest, Lane, Outcome, Run, writer::writer};
use crate::{
    config::{Config, Storage},
    fleet::{Device, Registry},
    live::{Latest, Tail},
    model::{
        BatchReject, DeviceId, StreamId,
        batch::{RejectReason, reason_name},
        columns::Values,
    },
    pb,
    store::{Count, LedgerRow, Store},
    telemetry::{Metrics, Readiness},
};
use prost::Message;
use std::{collections::BTreeMap, sync::Arc};
use tokio::task::JoinHandle;

/// How many streams the device has.
pub(crate) const STREAMS: usize = 3;

/// What a batch holds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Content {
    Good,
    WrongKind,
    Malformed,
}

/// What happens.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// Batches handed in one after the other, without waiting for replies between them.
    Send(Vec<Sent>),
    Restart,
}

/// A batch that is sent.
#[derive(Debug, Clone)]
pub(crate) struct Sent {
    pub stream: usize,
    /// The sequence less the one that the model expects.
    pub ahead: i64,
    pub lost: u64,
    pub content: Content,
}

/// The bytes of a batch.
/// Two of a stream that follow one another may have the same times.
pub(super) fn batch(sequence: u64, content: Content) -> Vec<u8> {
    let values = match content {
        Content::Good => Values::Double(vec![0.5, sequence as f64]),
        Content::WrongKind => Values::Bool(vec![true, false]),
        Content::Malformed => return vec![0xff; 4],
    };
    let column = pb::Column { sensor: "t".into(), unit: "Cel".into(), values: Some(values.into()) };
    let frame = pb::Frame {
        base_time_us: (sequence / 2) as i64 * 1_000_000,
        time_deltas_us: vec![1_000],
        columns: vec![column],
        ..Default::default()
    };
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
pub(crate) struct Running {
    store: Store,
    ingest: Ingest,
    registry: Registry,
    latest: Arc<Latest>,
    writing: JoinHandle<()>,
}

impl Running {
    /// Starts it on what a database holds.
    pub(crate) async fn open(storage: &Storage) -> Self {
        let config = Config { storage: storage.clone(), ..Config::default() };
        let store = Store::open(&config.storage).await.expect("opened");
        let registry = Registry::new(store.clone(), true, usize::MAX);
        let tail = Arc::new(Tail::new(store.last_position().await.expect("read"), 1 << 20));
        let latest = Arc::new(Latest::load(&store, &registry).await.expect("read"));
        let readiness = Readiness::starting(&[]);
        let (ingest, writer) = writer(&config, store.clone(), registry.clone(), tail, latest.clone(), &Metrics::new(), readiness);
        Self { store, ingest, registry, latest, writing: tokio::spawn(writer.run()) }
    }

    async fn device(&self, id: &DeviceId) -> Arc<Device> {
        self.registry.get_or_register(id).await.expect("registered")
    }

    /// Ends it with all that it has taken.
    pub(crate) async fn close(self) {
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

/// The latest readings of a device.
fn shown(latest: &Latest, device: &DeviceId) -> Vec<pb::Batch> {
    let (_, found) = latest.snapshot(|id| id == device);
    found.iter().flat_map(|found| found.batches(|_| true)).collect()
}

/// Takes the steps with a device that the database does not know yet, and compares what becomes of each batch, the log and the ledger with the
/// rules, and the latest readings with those that a start finds in the log. Gives the writer back, for more.
pub(crate) async fn check(steps: Vec<Step>, storage: &Storage, mut running: Running, device: &DeviceId) -> Running {
    let streams: Vec<StreamId> = (0..STREAMS).map(|_| StreamId::new()).collect();
    let mut model = Model::default();
    let before = running.store.last_position().await.expect("read");
    let mut device_now = running.device(device).await;
    for step in steps {
        let Step::Send(sends) = step else {
            running.close().await;
            running = Running::open(storage).await;
            device_now = running.device(device).await;
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
                run = Some(running.ingest.begin(&device_now, streams[sent.stream], Lane::Live, envelope).await.expect("admitted"));
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
    let log = running.store.read_log(before, 10_000, usize::MAX).await.expect("read");
    assert!(log.windows(2).all(|pair| pair[0].position < pair[1].position));
    // An entry of the log may hold several batches, one behind the other.
    assert_eq!(log.into_iter().flat_map(|row| row.batch.to_vec()).collect::<Vec<_>>(), model.log.concat());
    let ledger = running.store.ledger(device_now.key).await.expect("read");
    let rejected = model.rejected.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect();
    let (stored, duplicate, lost) = (model.stored, model.duplicate, model.lost);
    assert_eq!(ledger, LedgerRow { stored, duplicate, lost, rejected, streams: ledger.streams.clone() });
    for (stream_id, last) in streams.iter().zip(model.last) {
        assert_eq!(running.store.last_sequence(device_now.key, *stream_id).await.expect("read"), last);
    }
    assert_eq!(device_now.account.pending(), Count::default(), "nothing waits for ever");
    let in_log = Latest::load(&running.store, &running.registry).await.expect("read");
    assert_eq!(shown(&running.latest, device), shown(&in_log, device));
    running
}
