use super::*;
use crate::{
    client::{
        batch::EncodedBatch,
        connect_lazy,
        fake::{FakeGateway, Fault},
        queue::{QueueLimits, WhenFull},
    },
    model::StreamId,
};
use parking_lot::Mutex;
use proptest::prelude::*;
use std::future::Future;

const PATIENCE: Duration = Duration::from_secs(20);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    within(what, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

fn settings() -> LinkSettings {
    LinkSettings {
        in_flight_batches_max: 4,
        ack_timeout: PATIENCE,
        backoff: BackoffSettings { base: Duration::from_millis(1), cap: Duration::from_millis(5) },
        ..LinkSettings::default()
    }
}

fn queue() -> Queue {
    Queue::in_memory(StreamId::new(), QueueLimits::default())
}

fn builder(gateway: &FakeGateway, queue: &Queue) -> DeviceLinkBuilder {
    let channel = connect_lazy(&gateway.endpoint()).expect("a good endpoint");
    DeviceLink::builder(DeviceId::parse("pump-1").expect("good"), queue.clone(), channel).settings(settings())
}

fn batch(number: u64) -> EncodedBatch {
    EncodedBatch { bytes: number.to_be_bytes().to_vec().into(), readings: 1 }
}

async fn push(queue: &Queue, numbers: std::ops::RangeInclusive<u64>) {
    for number in numbers {
        queue.push(batch(number)).await.expect("room");
    }
}

fn expected(numbers: std::ops::RangeInclusive<u64>) -> Vec<(u64, bytes::Bytes)> {
    numbers.map(|number| (number, batch(number).bytes)).collect()
}

/// What an observer saw, by the names of the events.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    fn count(&self, name: &str) -> usize {
        self.0.lock().iter().filter(|event| event.starts_with(name)).count()
    }
}

impl LinkObserver for Seen {
    fn observe(&self, event: &LinkEvent<'_>) {
        self.0.lock().push(format!("{event:?}"));
    }
}

/// A gateway that fails as told stores every batch once and in order; returns what the observer saw.
async fn survives(faults: Vec<Fault>, batches: u64) -> Seen {
    let gateway = FakeGateway::start().await;
    let (queue, seen) = (queue(), Seen::default());
    // Only a silent gateway is to be left: a slow machine is none. One that misses the last batch is silent, too.
    let silent = faults.iter().any(|fault| matches!(fault, Fault::Mute | Fault::Miss));
    let ack_timeout = if silent { Duration::from_millis(150) } else { PATIENCE };
    gateway.set_faults(faults);
    let settings = LinkSettings { ack_timeout, ..settings() };
    let link = builder(&gateway, &queue).settings(settings).observer(seen.clone()).start();
    push(&queue, 1..=batches).await;
    within("everything is acknowledged", link.flush()).await;
    within("the link stops", link.stop()).await;
    assert_eq!(gateway.stored(queue.stream_id()).batches, expected(1..=batches));
    seen
}

#[tokio::test]
async fn batches_arrive_in_order_and_leave_the_queue() {
    let seen = survives(vec![], 100).await;
    assert_eq!(seen.count("Sent"), 100);
    assert_eq!(seen.count("BatchAcknowledged"), 100);
    assert_eq!(seen.count("Disconnected"), 0);
}

#[tokio::test]
async fn a_lost_acknowledgement_is_found_out_by_the_next_welcome() {
    let seen = survives(vec![Fault::None, Fault::FailAfter], 10).await;
    assert_eq!(seen.count("Disconnected"), 1);
    assert_eq!(seen.count("Duplicates"), 0, "the Welcome says what need not be sent again");
}

#[tokio::test]
async fn a_last_batch_that_the_gateway_missed_is_sent_again() {
    let seen = survives(vec![Fault::None, Fault::None, Fault::Miss], 3).await;
    assert_eq!(seen.count("Disconnected"), 1, "nothing follows it that would tell of the gap");
}

#[tokio::test]
async fn a_gateway_that_falls_silent_is_left() {
    let seen = survives(vec![Fault::Mute], 6).await;
    assert!(seen.count("Disconnected { error: Timeout") >= 1);
}

#[tokio::test]
async fn a_gap_is_sent_again_once() {
    let seen = survives(vec![Fault::None, Fault::Miss], 12).await;
    assert_eq!(seen.count("SequenceGap"), 1, "the gaps of what was on its way say nothing new");
    assert_eq!(seen.count("Disconnected"), 0);
}

#[tokio::test]
async fn a_draining_gateway_is_left_and_found_again() {
    let seen = survives(vec![Fault::None, Fault::None, Fault::Drain], 10).await;
    assert_eq!(seen.count("Disconnected { error: Draining"), 1);
}

#[tokio::test]
async fn what_the_gateway_asks_to_wait_is_waited() {
    let gateway = FakeGateway::start().await;
    let (queue, seen) = (queue(), Seen::default());
    gateway.set_faults([Fault::FailBefore]);
    let link = builder(&gateway, &queue).observer(seen.clone()).start();
    push(&queue, 1..=1).await;
    until("the failure is seen", || seen.count("Disconnected") == 1).await;
    assert_eq!(seen.count("Disconnected { error: Call(Status { code: Unavailable"), 1);
    assert!(seen.0.lock().iter().any(|event| event.contains("retry_in: 2")), "STORE_UNAVAILABLE asks for two seconds");
    within("it stops during the wait", link.stop()).await;
    assert_eq!(queue.status().pending_batches, 1, "what was not acknowledged stays");
}

#[tokio::test]
async fn a_rejected_batch_is_told_and_not_sent_again() {
    let gateway = FakeGateway::start().await;
    let (queue, seen) = (queue(), Seen::default());
    gateway.set_faults([Fault::None, Fault::Reject]);
    let link = builder(&gateway, &queue).observer(seen.clone()).start();
    push(&queue, 1..=3).await;
    within("everything is dealt with", link.flush()).await;
    link.stop().await;
    assert_eq!(seen.count("Rejected(RejectedBatch { sequence: 2"), 1);
    assert_eq!(seen.count("Sent"), 3);
    let sequences: Vec<u64> = gateway.stored(queue.stream_id()).batches.iter().map(|batch| batch.0).collect();
    assert_eq!(sequences, [1, 3]);
}

#[tokio::test]
async fn what_a_full_queue_lost_is_told() {
    let gateway = FakeGateway::start().await;
    let limits = QueueLimits { batches_max: 3, when_full: WhenFull::DropOldest, ..QueueLimits::default() };
    let queue = Queue::in_memory(StreamId::new(), limits);
    push(&queue, 1..=10).await;
    let link = builder(&gateway, &queue).start();
    within("the rest is acknowledged", link.flush()).await;
    link.stop().await;
    let stored = gateway.stored(queue.stream_id());
    assert_eq!(stored.batches, expected(8..=10));
    assert_eq!(stored.lost, (7, 7));
}

#[tokio::test]
async fn a_gateway_restored_from_a_backup_is_told_what_is_gone() {
    let gateway = FakeGateway::start().await;
    let (queue, seen) = (queue(), Seen::default());
    let link = builder(&gateway, &queue).observer(seen.clone()).start();
    push(&queue, 1..=5).await;
    within("all is acknowledged", link.flush()).await;
    gateway.set_last(queue.stream_id(), 2);
    gateway.cut();
    push(&queue, 6..=6).await;
    within("the link goes on", link.flush()).await;
    link.stop().await;
    assert_eq!(seen.count("Forgotten { batches: 3 }"), 1);
    assert_eq!(gateway.stored(queue.stream_id()).lost, (3, 0));
}

/// The gateway is at 5, the queue at 2: its file came back with an old image.
#[tokio::test]
async fn a_queue_that_is_older_than_its_stream_goes_on_under_another() {
    let gateway = FakeGateway::start().await;
    let (queue, seen) = (queue(), Seen::default());
    let old = queue.stream_id();
    gateway.set_last(old, 5);
    push(&queue, 1..=8).await;
    let link = builder(&gateway, &queue).observer(seen.clone()).start();
    within("all is acknowledged", link.flush()).await;
    link.stop().await;
    assert_eq!((seen.count("StreamChanged"), seen.count("Disconnected { error: StreamChanged")), (1, 1));
    assert_eq!(gateway.stored(queue.stream_id()).batches, expected(1..=8));
    assert_eq!(gateway.stored(old).batches, []);
}

#[tokio::test]
async fn a_position_that_cannot_be_is_survived() {
    let gateway = FakeGateway::start().await;
    let queue = Queue::replay_in_memory(StreamId::new(), QueueLimits::default());
    gateway.set_last(queue.stream_id(), u64::MAX);
    let link = builder(&gateway, &queue).start();
    until("the Welcome came", || gateway.hellos().len() == 1 && queue.status().acknowledged_through > 0).await;
    push(&queue, 1..=1).await;
    within("it stops", link.stop()).await;
}

#[tokio::test]
async fn a_configuration_is_applied_once_and_reported_each_time() {
    let gateway = FakeGateway::start().await;
    gateway.set_config(7, serde_json::json!({"interval": 60}));
    let queue = queue();
    let applied = Arc::new(Mutex::new(Vec::new()));
    let handler = {
        let applied = applied.clone();
        move |revision: u64, config: &Map<String, Json>| {
            applied.lock().push((revision, config["interval"].clone()));
            ConfigDecision::Applied
        }
    };
    let link = builder(&gateway, &queue).config_handler(handler).start();
    until("the report came", || gateway.reports().len() == 1).await;
    assert_eq!(gateway.reports()[0].outcome(), pb::ConfigOutcome::Applied);
    gateway.cut();
    until("the device connects with what it has", || gateway.hellos().last().is_some_and(|hello| hello.applied_revision == 7)).await;
    assert_eq!(*applied.lock(), [(7, Json::from(60))]);

    link.report_reverted(7, 0, "no network with it");
    until("the device went back", || gateway.reports().len() == 2).await;
    assert_eq!(gateway.reports()[1].outcome(), pb::ConfigOutcome::Reverted);
    link.stop().await;
}

/// The connection breaks around the report, once and again: it is told on each, with the revision that the device runs with,
/// until there is another revision.
#[tokio::test]
async fn a_reverted_configuration_is_told_whatever_breaks_and_is_not_tried_again() {
    let gateway = FakeGateway::start().await;
    gateway.set_config(7, serde_json::json!({}));
    let (queue, applied) = (queue(), Arc::new(Mutex::new(Vec::new())));
    let handler = {
        let applied = applied.clone();
        move |revision: u64, _: &Map<String, Json>| {
            applied.lock().push(revision);
            ConfigDecision::Applied
        }
    };
    let link = builder(&gateway, &queue).config_handler(handler).applied_revision(3).start();
    until("7 is applied", || gateway.reports().len() == 1).await;

    gateway.cut();
    link.report_reverted(7, 3, "no network with it");
    for _ in 0..2 {
        let (hellos, reports) = (gateway.hellos().len(), gateway.reports().len());
        gateway.cut();
        until("it connects again", || gateway.hellos().len() > hellos && gateway.reports().len() > reports).await;
        let report = gateway.reports().pop().expect("seen");
        assert_eq!((report.revision, report.outcome(), report.detail.as_str()), (7, pb::ConfigOutcome::Reverted, "no network with it"));
        assert_eq!(gateway.hellos().last().expect("seen").applied_revision, 3);
    }
    assert_eq!(*applied.lock(), [7], "what the gateway sends again is not applied again");

    gateway.set_config(8, serde_json::json!({}));
    gateway.cut();
    until("8 is applied", || gateway.reports().last().is_some_and(|report| report.revision == 8)).await;
    let reports = gateway.reports().len();
    gateway.cut();
    until("it connects with 8", || gateway.hellos().last().is_some_and(|hello| hello.applied_revision == 8)).await;
    link.stop().await;
    assert_eq!(gateway.reports().len(), reports, "nothing is told of 7 any more");
}

#[tokio::test]
async fn a_refused_configuration_is_reported_with_its_reason() {
    let gateway = FakeGateway::start().await;
    gateway.set_config(3, serde_json::json!({}));
    let queue = queue();
    let refuse = |_: u64, _: &Map<String, Json>| ConfigDecision::Rejected("ä".repeat(2_000));
    let link = builder(&gateway, &queue).config_handler(refuse).start();
    until("the report came", || gateway.reports().len() == 1).await;
    let report = gateway.reports().remove(0);
    assert_eq!((report.revision, report.outcome()), (3, pb::ConfigOutcome::Rejected));
    assert_eq!(report.detail, "ä".repeat(512), "cut to 1024 bytes");
    link.stop().await;
}

#[tokio::test]
async fn a_gateway_that_is_away_is_tried_again_until_the_link_is_stopped() {
    let unused = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = unused.local_addr().expect("bound");
    drop(unused);
    let (queue, seen) = (queue(), Seen::default());
    let channel = connect_lazy(&format!("http://{address}")).expect("a good endpoint");
    let device = DeviceId::parse("pump-1").expect("good");
    let link = DeviceLink::builder(device, queue.clone(), channel).settings(settings()).observer(seen.clone()).start();
    push(&queue, 1..=3).await;
    until("several attempts failed", || seen.count("Disconnected") > 3).await;
    within("it stops although nobody answers", link.stop()).await;
    assert_eq!(queue.status().pending_batches, 3);
}

fn fault() -> impl Strategy<Value = Fault> {
    use Fault::{Cut, Drain, FailAfter, Miss, Mute, None};
    prop::sample::select(vec![None, None, None, None, FailAfter, Cut, Miss, Drain, Mute])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// However the connection fails, the gateway ends up with each batch exactly once and in order.
    #[test]
    fn any_failures_leave_each_batch_exactly_once(faults in prop::collection::vec(fault(), 0..24), batches in 1u64..30) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(survives(faults, batches));
    }
}
