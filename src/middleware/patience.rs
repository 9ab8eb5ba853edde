//! How long something may go on without progress.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep};

/// Runs out when there is no progress for as long as a limit says, or a little longer: at the latest after twice that.
///
/// Noting progress costs a store and no more: what is done for each message must not touch a timer. The timer is set once,
/// and when it rings it is looked whether there has been progress since. Whoever never waits has none.
#[derive(Debug, Default)]
pub struct Patience {
    timer: Option<Pin<Box<Sleep>>>,
    progressed: bool,
}

impl Patience {
    /// There was progress.
    pub fn renew(&mut self) {
        self.progressed = true;
    }

    /// Nobody has waited for some time, if the timer has rung unheard: that time was not lost by whom is waited for.
    pub fn renew_if_unattended(&mut self) {
        self.progressed |= self.timer.as_ref().is_some_and(|timer| timer.is_elapsed());
    }

    /// Ready when it has run out; to be polled while something is waited for.
    pub fn poll_exhausted(&mut self, limit: Duration, cx: &mut Context<'_>) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| {
            self.progressed = false;
            Box::pin(sleep(limit))
        });
        loop {
            ready!(timer.as_mut().poll(cx));
            if !std::mem::take(&mut self.progressed) {
                return Poll::Ready(());
            }
            timer.as_mut().reset(Instant::now() + limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{FutureExt, future::poll_fn};

    const LIMIT: Duration = Duration::from_millis(20);

    async fn exhausted(patience: &mut Patience) {
        poll_fn(|cx| patience.poll_exhausted(LIMIT, cx)).await;
    }

    #[tokio::test]
    async fn it_runs_out_without_progress_and_is_renewed_by_it() {
        let (mut patience, began) = (Patience::default(), Instant::now());
        patience.renew();
        assert_eq!(exhausted(&mut patience).now_or_never(), None);
        patience.renew();
        exhausted(&mut patience).await;
        assert!(began.elapsed() >= LIMIT * 2, "what was there before the wait does not count, what came in it does");
    }

    #[tokio::test]
    async fn time_in_which_nobody_waited_does_not_count() {
        let mut patience = Patience::default();
        assert_eq!(exhausted(&mut patience).now_or_never(), None);
        poll_fn(|cx| patience.timer.as_mut().expect("set").as_mut().poll(cx)).await;
        patience.renew_if_unattended();
        assert_eq!(exhausted(&mut patience).now_or_never(), None);
    }
}
