use super::*;
use crate::{
    client::{
        batch::EncodedBatch,
        connect_lazy,
        fake::{FakeGateway, Fault},
        queue::QueueLimits,
    },
    model::StreamId,
};
use proptest::prelude::*;

fn settings() -> UploaderSettings {
    UploaderSettings {
        call_batches_max: 7,
        give_up_after: Duration::from_secs(20),
        backoff: BackoffSettings { base: Duration::from_millis(1), cap: Duration::from_millis(5) },
        ..UploaderSettings::default()
    }
}

fn uploader(gateway: &FakeGateway, queue: &Queue) -> Uploader {
    let channel = connect_lazy(&gateway.endpoint()).expect("a good endpoint");
    Uploader::new(DeviceId::parse("pump-1").expect("good"), queue.clone(), channel, settings())
}

fn batch(number: u64) -> EncodedBatch {
    EncodedBatch { bytes: number.to_be_bytes().to_vec().into(), readings: 1 }
}

async fn filled(stream_id: StreamId, batches: u64) -> Queue {
    let queue = Queue::replay_in_memory(stream_id, QueueLimits::default());
    for number in 1..=batches {
        queue.push(batch(number)).await.expect("room");
    }
    queue
}

fn expected(batches: u64) -> Vec<(u64, Bytes)> {
    (1..=batches).map(|number| (number, batch(number).bytes)).collect()
}

async fn survives(faults: Vec<Fault>, batches: u64) -> UploadSummary {
    let gateway = FakeGateway::start().await;
    gateway.set_faults(faults);
    let queue = filled(StreamId::new(), batches).await;
    let summary = uploader(&gateway, &queue).upload().await.expect("it goes on until all is taken");
    assert_eq!(gateway.stored(queue.stream_id()).batches, expected(batches));
    assert_eq!(summary.last_durable_sequence, batches);
    summary
}

#[tokio::test]
async fn a_long_queue_takes_several_calls() {
    let summary = survives(vec![], 30).await;
    assert_eq!((summary.accepted.batches, summary.retries, summary.batches_sent_again), (30, 0, 0));
}

#[tokio::test]
async fn an_early_answer_is_followed_by_another_call() {
    let summary = survives(vec![Fault::None, Fault::Drain], 5).await;
    assert_eq!((summary.accepted.batches, summary.retries), (5, 0));
}

#[tokio::test]
async fn a_failed_call_is_made_again_from_where_the_gateway_stands() {
    let summary = survives(vec![Fault::None, Fault::None, Fault::FailAfter], 5).await;
    assert_eq!((summary.known.batches, summary.accepted.batches, summary.retries), (3, 2, 1));
    assert_eq!(summary.duplicate.batches, 0);
}

#[tokio::test]
async fn the_same_again_adds_nothing() {
    let gateway = FakeGateway::start().await;
    let stream_id = StreamId::new();
    uploader(&gateway, &filled(stream_id, 9).await).upload().await.expect("taken");
    let summary = uploader(&gateway, &filled(stream_id, 9).await).upload().await.expect("known");
    assert_eq!((summary.known.batches, summary.accepted.batches), (9, 0));
    assert_eq!(gateway.stored(stream_id).batches, expected(9));
}

#[tokio::test]
async fn all_is_sent_again_when_told_so() {
    let gateway = FakeGateway::start().await;
    let stream_id = StreamId::new();
    uploader(&gateway, &filled(stream_id, 30).await).upload().await.expect("taken");
    let mut again = uploader(&gateway, &filled(stream_id, 30).await);
    again.settings.resend_known = true;
    // The second of the calls fails, and is made again whole.
    gateway.set_faults((1..=10).map(|number| if number == 10 { Fault::FailAfter } else { Fault::None }));
    let summary = again.upload().await.expect("taken");
    assert_eq!((summary.duplicate.batches, summary.known.batches, summary.last_durable_sequence), (30, 0, 30));
    assert_eq!(summary.retries, 1);
    assert_eq!(gateway.stored(stream_id).batches, expected(30));
}

#[tokio::test]
async fn what_a_gateway_restored_from_a_backup_has_forgotten_is_told_also_when_all_is_sent_again() {
    for resend_known in [false, true] {
        let gateway = FakeGateway::start().await;
        let queue = Queue::in_memory(StreamId::new(), QueueLimits::default());
        let mut uploader = uploader(&gateway, &queue);
        uploader.settings.resend_known = resend_known;
        for number in 1..=5 {
            queue.push(batch(number)).await.expect("room");
        }
        uploader.upload().await.expect("taken");
        gateway.set_last(queue.stream_id(), 2);
        gateway.set_faults([Fault::FailBefore]);
        queue.push(batch(6)).await.expect("room");
        let summary = uploader.upload().await.expect("taken");
        assert_eq!((summary.forgotten_batches, gateway.stored(queue.stream_id()).lost), (3, (3, 0)));
    }
}

/// The gateway is ahead of the queue: its file came back with an old image.
#[tokio::test]
async fn a_queue_that_is_older_than_its_stream_goes_on_under_another() {
    let gateway = FakeGateway::start().await;
    let queue = Queue::in_memory(StreamId::new(), QueueLimits::default());
    gateway.set_last(queue.stream_id(), u64::MAX);
    for number in 1..=9 {
        queue.push(batch(number)).await.expect("room");
    }
    let summary = uploader(&gateway, &queue).upload().await.expect("taken");
    assert_eq!((summary.new_stream_id, summary.accepted.batches), (Some(queue.stream_id()), 9));
    assert_eq!(gateway.stored(queue.stream_id()).batches, expected(9));
}

/// A device that measures as fast as it sends is getting on, however long its queue stays.
#[tokio::test]
async fn a_queue_that_does_not_get_shorter_is_no_reason_to_give_up() {
    let gateway = FakeGateway::start().await;
    let queue = Queue::in_memory(StreamId::new(), QueueLimits::default());
    let channel = connect_lazy(&gateway.endpoint()).expect("a good endpoint");
    let settings = UploaderSettings { call_batches_max: 1, give_up_after: Duration::ZERO, ..settings() };
    let mut uploader = Uploader::new(DeviceId::parse("pump-1").expect("good"), queue.clone(), channel, settings);
    queue.push(batch(1)).await.expect("room");
    let measuring = async {
        for number in 2..=40 {
            let mut status = queue.watch();
            queue.push(batch(number)).await.expect("room");
            status.wait_for(|status| status.acknowledged_through >= number - 1).await.expect("the queue is there");
        }
    };
    let (result, ()) = tokio::join!(uploader.upload(), measuring);
    result.expect("it goes on");
    assert_eq!(gateway.stored(queue.stream_id()).last, queue.status().acknowledged_through);
}

#[tokio::test]
async fn rejected_batches_are_in_the_summary() {
    let gateway = FakeGateway::start().await;
    gateway.set_faults([Fault::Reject]);
    let queue = filled(StreamId::new(), 3).await;
    let summary = uploader(&gateway, &queue).upload().await.expect("dealt with");
    assert_eq!(summary.rejected_counts[&pb::RejectReason::KindChanged].batches, 1);
    assert_eq!((summary.rejected[0].sequence, summary.accepted.batches), (1, 2));
}

#[tokio::test]
async fn it_gives_up_when_nobody_answers_and_the_queue_keeps_all() {
    let unused = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let channel = connect_lazy(&format!("http://{}", unused.local_addr().expect("bound"))).expect("a good endpoint");
    drop(unused);
    let queue = filled(StreamId::new(), 3).await;
    let settings = UploaderSettings { give_up_after: Duration::from_millis(50), ..settings() };
    let mut uploader = Uploader::new(DeviceId::parse("pump-1").expect("good"), queue.clone(), channel, settings);
    assert!(matches!(uploader.upload().await, Err(UploadError::GaveUp(_, Some(_)))));
    assert_eq!(queue.status().pending_batches, 3);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// However the calls fail, the gateway ends up with each batch exactly once and in order.
    #[test]
    fn any_failures_leave_each_batch_exactly_once(
        faults in prop::collection::vec(
            prop::sample::select(vec![Fault::None, Fault::None, Fault::None, Fault::FailAfter, Fault::Cut, Fault::Drain]),
            0..24,
        ),
        batches in 1u64..30,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(survives(faults, batches));
    }
}
