//! Answers that a call's own work sends, without a task of its own.

use futures_util::{
    FutureExt, StreamExt, future,
    stream::{self, PollNext, Stream},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// What the work on a call sends its answers into. Sending waits while `messages_max` of them are unread, and never fails:
/// who reads them is dropped only together with the work.
///
/// Boxed, as a channel has room for 32 messages from its beginning, and most calls that are open have none.
pub struct Outbound<T>(mpsc::Sender<Box<Result<T, Status>>>);

impl<T> Clone for Outbound<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Outbound<T> {
    /// Sends a message.
    pub async fn send(&self, message: T) {
        self.deliver(Ok(message)).await;
    }

    async fn deliver(&self, item: Result<T, Status>) {
        // See the type: there is nobody left to tell of an error.
        let _ = self.0.send(Box::new(item)).await;
    }
}

/// The messages that `work` sends, and behind them the error that it ends with.
///
/// The work goes on as the stream is polled, and is dropped with it. So it is part of the response's body, for all that the
/// middleware does about one: a panic is caught and counted, log lines carry the call's span, and a call that is cancelled or
/// past its deadline stops where it is. Like every body it stands still while the peer does not read.
pub fn driven<T, W, F>(messages_max: usize, work: W) -> impl Stream<Item = Result<T, Status>>
where
    W: FnOnce(Outbound<T>) -> F,
    F: Future<Output = Result<(), Status>>,
{
    let (sender, messages) = mpsc::channel(messages_max);
    let outbound = Outbound(sender);
    // Not an async block around the work, which would have room for it twice.
    let work = work(outbound.clone()).then(async move |ended| {
        if let Err(status) = ended {
            outbound.deliver(Err(status)).await;
        }
    });
    // Sends nothing by itself, and drops the senders when it is done, which ends the messages.
    let work = stream::once(work).filter_map(|()| future::ready(None));
    // The work first, so that what it sends is found at once.
    stream::select_with_strategy(work, ReceiverStream::new(messages).map(|item| *item), |_: &mut ()| PollNext::Left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::{panic::AssertUnwindSafe, sync::Arc};
    use tonic::Code;

    #[tokio::test]
    async fn messages_come_in_order_and_the_error_behind_them() {
        let numbers = driven(4, async |outbound| {
            for number in 1..=100 {
                outbound.send(number).await;
            }
            Err(Error::Draining.into())
        });
        let mut items: Vec<_> = numbers.collect().await;
        let status = items.pop().expect("not empty").expect_err("the end");
        assert_eq!(status.code(), Code::Unavailable);
        let numbers: Vec<i32> = items.into_iter().map(|item| item.expect("a number")).collect();
        assert_eq!(numbers, Vec::from_iter(1..=100));
    }

    #[tokio::test]
    async fn a_message_is_there_as_soon_as_it_is_sent() {
        let mut messages = Box::pin(driven(4, async |outbound| {
            outbound.send("first").await;
            future::pending().await
        }));
        let first = messages.next().now_or_never().flatten().expect("without another wake-up").expect("well");
        assert_eq!(first, "first");
        assert!(messages.next().now_or_never().is_none(), "the work goes on");
    }

    #[tokio::test]
    async fn work_that_is_done_well_ends_the_stream() {
        assert_eq!(driven::<(), _, _>(1, async |_| Ok(())).count().await, 0);
    }

    /// What middleware::panic does for a body it can do for this one.
    #[tokio::test]
    async fn a_panic_is_one_of_who_polls() {
        let mut messages = Box::pin(driven::<(), _, _>(1, async |_| panic!("as asked")));
        let polled = AssertUnwindSafe(messages.next()).catch_unwind().await;
        assert!(polled.is_err());
    }

    #[tokio::test]
    async fn the_work_is_dropped_with_the_stream() {
        let held = Arc::new(());
        let part = held.clone();
        let mut messages = Box::pin(driven(1, |outbound| async move {
            let _part = part;
            outbound.send(()).await;
            future::pending().await
        }));
        messages.next().await.expect("a message").expect("well");
        assert_eq!(Arc::strong_count(&held), 2);
        drop(messages);
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
