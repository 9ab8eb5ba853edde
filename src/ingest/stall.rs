//! A store that neither commits nor fails.

use super::writer::COMPONENT;
use crate::telemetry::Readiness;
use std::{future::Future, pin::pin, time::Duration};

/// How long a commit may take until the gateway says that it is not ready: far longer than any disk takes that works.
const STALLED_AFTER: Duration = Duration::from_secs(5);

/// Waits for what the store is asked to do; when it takes too long, says not ready until it is done. It can't be given up: nobody would know what
/// became of it.
pub(super) async fn watched<T, E>(readiness: &Readiness, what: &str, commit: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let mut commit = pin!(commit);
    if let Ok(done) = tokio::time::timeout(STALLED_AFTER, &mut commit).await {
        return done;
    }
    tracing::warn!("store.stalled: no batch is acknowledged until {what} that is under way is done");
    readiness.set(COMPONENT, Err(format!("{what} has taken more than {} s: look at the database and its disk", STALLED_AFTER.as_secs())));
    let done = commit.await;
    // What has failed is for the recovery to tell.
    if done.is_ok() {
        tracing::info!("store.goes_on");
        readiness.set(COMPONENT, Ok(()));
    }
    done
}
