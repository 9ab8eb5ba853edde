//! Every test runs on both backends.

use super::*;
use proptest::prelude::*;
use std::future::Future;

fn batch(number: u64) -> EncodedBatch {
    EncodedBatch { bytes: Bytes::from(vec![number as u8; 10]), readings: 10 + number }
}

fn limits(batches_max: usize, when_full: WhenFull) -> QueueLimits {
    QueueLimits { batches_max, when_full, ..QueueLimits::default() }
}

/// Runs `test` on a queue in memory, then on one on disk.
async fn on_both<F: Future<Output = ()>>(limits: QueueLimits, test: impl Fn(Queue) -> F) {
    test(Queue::in_memory(StreamId::new(), limits.clone())).await;
    let folder = tempfile::tempdir().expect("a folder");
    test(Queue::on_disk(&folder.path().join("queue.sqlite"), limits).await.expect("opens")).await;
}

async fn push(queue: &Queue, numbers: std::ops::RangeInclusive<u64>) {
    for number in numbers {
        assert_eq!(queue.push(batch(number)).await.expect("room"), number);
    }
}

async fn held(queue: &Queue) -> Vec<u64> {
    held_bytes(queue).await.into_iter().map(|(sequence, _)| sequence).collect()
}

async fn held_bytes(queue: &Queue) -> Vec<(u64, Bytes)> {
    let mut batches: Vec<(u64, Bytes)> = Vec::new();
    while let Some(batch) = queue.peek_from(batches.last().map_or(0, |last| last.0 + 1)).await.expect("reads") {
        batches.push((batch.sequence, batch.bytes));
    }
    batches
}

#[tokio::test]
async fn batches_stay_until_they_are_acknowledged() {
    on_both(QueueLimits::default(), |queue| async move {
        push(&queue, 1..=4).await;
        let third = queue.peek_from(3).await.expect("reads").expect("there");
        assert_eq!((third.sequence, third.bytes, third.readings), (3, batch(3).bytes, 13));
        assert_eq!(queue.acknowledge_through(2).await.expect("writes"), Acknowledged { batches: 2, readings: 23 });
        assert_eq!(held(&queue).await, [3, 4]);
        assert_eq!(queue.status().pending_bytes, 20);
        assert_eq!(queue.acknowledge_through(2).await.expect("writes"), Acknowledged::default(), "once more changes nothing");
        queue.acknowledge_through(4).await.expect("writes");
        queue.wait_until_empty().await;
        push(&queue, 5..=5).await;
    })
    .await;
}

#[tokio::test]
async fn a_full_queue_loses_the_oldest_and_says_so_with_the_next() {
    on_both(limits(3, WhenFull::DropOldest), |queue| async move {
        push(&queue, 1..=5).await;
        let first = queue.peek_from(0).await.expect("reads").expect("there");
        assert_eq!((first.sequence, first.lost), (3, Lost { batches: 2, readings: 11 + 12 }));
        assert_eq!(queue.status().lost, first.lost);
    })
    .await;
}

#[tokio::test]
async fn what_may_have_reached_the_gateway_is_not_lost() {
    on_both(limits(3, WhenFull::DropOldest), |queue| async move {
        push(&queue, 1..=3).await;
        queue.peek_from(1).await.expect("reads");
        push(&queue, 4..=4).await;
        assert_eq!(held(&queue).await, [1, 3, 4], "1 is on its way");
        assert_eq!(queue.peek_from(3).await.expect("reads").expect("there").lost.batches, 1);
        // All three are on their way, 3 and 4 perhaps from a call that has ended and that the gateway still works on: the
        // new ones are lost, and told with the one after them.
        push(&queue, 5..=5).await;
        queue.resume_from(0).await.expect("writes");
        push(&queue, 6..=6).await;
        assert_eq!(held(&queue).await, [1, 3, 4]);
        queue.resume_from(4).await.expect("writes");
        push(&queue, 7..=7).await;
        let last = queue.peek_from(5).await.expect("reads").expect("there");
        assert_eq!((last.sequence, last.lost), (7, Lost { batches: 2, readings: 15 + 16 }));
    })
    .await;
}

#[tokio::test]
async fn a_queue_that_refuses_loses_nothing() {
    on_both(limits(2, WhenFull::Refuse), |queue| async move {
        push(&queue, 1..=2).await;
        assert!(matches!(queue.push(batch(3)).await, Err(QueueError::Full { batches: 2, bytes: 20 })));
        let waiting = tokio::spawn({
            let queue = queue.clone();
            async move { queue.push_when_room(batch(3)).await.expect("there will be room") }
        });
        queue.acknowledge_through(1).await.expect("writes");
        assert_eq!(waiting.await.expect("no panic"), 3);
        assert_eq!(held(&queue).await, [2, 3]);
    })
    .await;
}

#[tokio::test]
async fn a_batch_that_no_gateway_takes_is_refused() {
    let limits = QueueLimits { bytes_max: 9, ..QueueLimits::default() };
    on_both(limits, |queue| async move {
        assert!(matches!(queue.push(batch(1)).await, Err(QueueError::BatchTooLarge { bytes: 10, bytes_max: 9 })));
        assert_eq!(queue.status().last_sequence, 0, "it has used no sequence");
    })
    .await;
}

#[tokio::test]
async fn what_the_gateway_has_of_a_replay_is_not_queued_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("queue.sqlite");
    let on_disk = Queue::replay_on_disk(&path, StreamId::new(), QueueLimits::default());
    for queue in [Queue::replay_in_memory(StreamId::new(), QueueLimits::default()), on_disk.await.expect("opens")] {
        assert_eq!(queue.resume_from(2).await.expect("writes"), Resumed::Behind(Acknowledged::default()));
        push(&queue, 1..=3).await;
        assert_eq!(held(&queue).await, [3]);
    }
}

/// The gateway is at 5, the queue at 2: it came back with an old image, and numbers again what it measures from then on.
#[tokio::test]
async fn a_queue_that_is_older_than_its_stream_loses_nothing_that_is_new() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("queue.sqlite");
    let open = || async { Queue::on_disk(&path, QueueLimits::default()).await.expect("opens") };
    let queue = open().await;
    let old = queue.stream_id();
    push(&queue, 1..=2).await;
    held(&queue).await;
    queue.close().await;

    // Measured before the gateway is there, with a restart in between.
    let queue = open().await;
    push(&queue, 3..=4).await;
    queue.close().await;
    let queue = open().await;
    push(&queue, 5..=8).await;
    let resumed = queue.resume_from(5).await.expect("writes");
    let new = queue.stream_id();
    assert_ne!(new, old);
    assert_eq!(resumed, Resumed::NewStream { stream_id: new, taken: Acknowledged { batches: 2, readings: 23 } });
    assert_eq!(queue.resume_from(0).await.expect("writes"), Resumed::Behind(Acknowledged::default()));
    for _ in 0..2 {
        let pending = held_bytes(&queue).await;
        assert_eq!(pending, (1..=6).map(|number| (number, batch(number + 2).bytes)).collect::<Vec<_>>());
    }
    assert_eq!(queue.push(batch(9)).await.expect("room"), 7);
    queue.close().await;

    let queue = open().await;
    assert_eq!((queue.stream_id(), queue.status().last_sequence), (new, 7));
    assert_eq!(held(&queue).await, [1, 2, 3, 4, 5, 6, 7]);
    assert!(
        matches!(queue.resume_from(7).await.expect("writes"), Resumed::Behind(Acknowledged { batches: 7, .. })),
        "it may all have been sent"
    );
}

#[tokio::test]
async fn what_an_outdated_queue_lost_is_told_under_the_new_stream_id() {
    on_both(limits(3, WhenFull::DropOldest), |queue| async move {
        push(&queue, 1..=5).await;
        queue.resume_from(u64::MAX).await.expect("writes");
        let first = queue.peek_from(0).await.expect("reads").expect("there");
        assert_eq!((first.sequence, first.lost), (3, Lost { batches: 2, readings: 11 + 12 }));
        queue.resume_from(u64::MAX).await.expect("writes");
        push(&queue, 3..=3).await;
        let first = queue.peek_from(0).await.expect("reads").expect("there");
        assert_eq!((first.sequence, first.bytes, first.lost), (1, batch(4).bytes, Lost::default()), "3 had been sent");
    })
    .await;
}

#[tokio::test]
async fn a_push_whose_future_is_dropped_leaves_a_whole_queue() {
    let folder = tempfile::tempdir().expect("a folder");
    let queue = Queue::on_disk(&folder.path().join("queue.sqlite"), limits(2, WhenFull::DropOldest)).await.expect("opens");
    for number in 1..=40 {
        // Polled a different number of times, to be dropped at each of its steps.
        let mut pushing = std::pin::pin!(queue.push(batch(number)));
        for _ in 0..number {
            if futures_util::poll!(pushing.as_mut()).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    let last = queue.push(batch(41)).await.expect("room");
    assert_eq!(last, 41, "each was pushed once it had begun");
    assert_eq!(held(&queue).await, [40, 41]);
}

#[tokio::test]
async fn a_queue_on_disk_survives_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("queue.sqlite");
    let open = || Queue::on_disk(&path, limits(3, WhenFull::DropOldest));
    let queue = open().await.expect("opens");
    let stream_id = queue.stream_id();
    push(&queue, 1..=5).await;
    assert!(matches!(open().await, Err(QueueError::Disk(_))), "a second process would give out the same sequences");
    queue.close().await;

    let queue = open().await.expect("opens again");
    assert_eq!(queue.stream_id(), stream_id);
    let first = queue.peek_from(0).await.expect("reads").expect("there");
    assert_eq!((first.sequence, first.bytes, first.lost.batches), (3, batch(3).bytes, 2));
    assert_eq!(queue.status().last_sequence, 5);
    queue.close().await;

    // Any of the three may have been sent before the restart: the new one is lost.
    let queue = open().await.expect("opens again");
    push(&queue, 6..=6).await;
    assert_eq!(held(&queue).await, [3, 4, 5]);
    queue.acknowledge_through(5).await.expect("writes");
    queue.close().await;

    let queue = open().await.expect("opens once more");
    push(&queue, 7..=7).await;
    let only = queue.peek_from(0).await.expect("reads").expect("there");
    assert_eq!((only.sequence, only.lost), (7, Lost { batches: 1, readings: 16 }));
}

#[derive(Debug, Clone)]
enum Step {
    Push,
    Send(u64),
    Acknowledge(u64),
    Resume,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Push),
        2 => (1u64..4).prop_map(Step::Send),
        2 => (0u64..4).prop_map(Step::Acknowledge),
        1 => Just(Step::Resume),
        1 => Just(Step::Reopen),
    ]
}

/// A gateway that follows the sequence rules, fed from a queue: whatever happens, each sequence is stored or told lost, once.
async fn account(steps: Vec<Step>, path: Option<&Path>) {
    let limits = limits(4, WhenFull::DropOldest);
    let mut queue = match path {
        Some(path) => Queue::on_disk(path, limits.clone()).await.expect("opens"),
        None => Queue::in_memory(StreamId::new(), limits.clone()),
    };
    let (mut pushed, mut next, mut stored, mut told) = (0, 1, Lost::default(), Lost::default());
    for step in steps.into_iter().chain([Step::Push, Step::Resume, Step::Send(u64::MAX), Step::Resume, Step::Push, Step::Send(u64::MAX)]) {
        match step {
            Step::Push => {
                pushed += 1;
                assert_eq!(queue.push(batch(pushed)).await.expect("room"), pushed);
            }
            Step::Send(most) => {
                for _ in 0..most {
                    let Some(batch) = queue.peek_from(next).await.expect("reads") else { break };
                    assert_eq!(batch.sequence - batch.lost.batches, next, "each sequence is sent or told lost");
                    stored += Lost { batches: 1, readings: batch.readings };
                    told += batch.lost;
                    next = batch.sequence + 1;
                }
            }
            Step::Acknowledge(behind) => drop(queue.acknowledge_through((next - 1).saturating_sub(behind)).await.expect("writes")),
            Step::Resume => {
                let resumed = queue.resume_from(next - 1).await.expect("writes");
                assert!(matches!(resumed, Resumed::Behind(_)), "nobody else sends");
            }
            Step::Reopen => {
                if let Some(path) = path {
                    queue.close().await;
                    queue = Queue::on_disk(path, limits.clone()).await.expect("opens again");
                }
            }
        }
        assert!(queue.status().pending_batches <= 4);
    }
    assert_eq!((stored.batches + told.batches, next - 1), (pushed, pushed));
    assert_eq!(stored.readings + told.readings, (1..=pushed).map(|number| batch(number).readings).sum::<u64>());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_batch_is_accounted_for(steps in prop::collection::vec(step(), 0..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let folder = tempfile::tempdir().expect("a folder");
        runtime.block_on(async {
            account(steps.clone(), None).await;
            account(steps, Some(&folder.path().join("queue.sqlite"))).await;
        });
    }
}
