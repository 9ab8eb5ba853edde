//! Trying again, for the commands that stay connected.

use super::Failure;
use crate::client::{Backoff, BackoffSettings};
use std::{ops::ControlFlow, time::Duration};
use tonic::Status;

/// A person watches: the first wait need not be as short as a device's.
const BACKOFF: BackoffSettings = BackoffSettings { base: Duration::from_millis(500), cap: Duration::from_secs(30) };

/// The waits of one command.
pub fn backoff() -> Backoff {
    Backoff::new(BACKOFF)
}

/// Tells the user of `failure`, and waits.
pub async fn wait(backoff: &mut Backoff, failure: &Failure) {
    let wait = backoff.next_delay(failure.retry_after());
    eprintln!("{}; connecting again in {:.1} s", failure.text().lines().next().unwrap_or_default(), wait.as_secs_f64());
    tokio::time::sleep(wait).await;
}

/// Runs `stream` until it breaks off by itself, and runs it again whenever the gateway ends it or it fails for a reason that
/// passes.
///
/// `stream` sets its flag when the gateway has answered. A gateway that never did is more likely a wrong address than an
/// outage, so that is the end.
pub async fn reconnecting(mut stream: impl AsyncFnMut(&mut bool) -> Result<ControlFlow<()>, Failure>) -> Result<(), Failure> {
    let mut backoff = backoff();
    let mut ever_answered = false;
    loop {
        let mut answered = false;
        let failure = match stream(&mut answered).await {
            Ok(ControlFlow::Break(())) => return Ok(()),
            Ok(ControlFlow::Continue(())) => Status::unavailable("the gateway ended the stream").into(),
            Err(failure) => failure,
        };
        ever_answered |= answered;
        if !ever_answered || !failure.is_passing() {
            return Err(failure);
        }
        if answered {
            backoff.reset();
        }
        wait(&mut backoff, &failure).await;
    }
}
