//! How the work in the background leaves the devices their share of the way into the store.
//!
//! One transaction writes at a time, so that what merging, pruning and retention write is what the writer waits for. What they compute
//! costs less: it is done on a thread that gives way to all others.

use crate::store::{Store, StoreError, WriteTx};
use futures_util::future::BoxFuture;
use std::time::{Duration, Instant};
use tokio::{runtime::Handle, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

/// A transaction that takes longer than this is not rested from for longer: something is wrong, and all wait anyway.
const COUNTED_MAX: Duration = Duration::from_secs(1);

/// How fast to go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Haste {
    /// How many seconds to rest for each that a transaction is open.
    pub rest: f64,
}

impl Haste {
    /// Does a transaction, and rests.
    pub async fn write<T: Send + 'static>(
        self,
        store: &Store,
        work: impl for<'a> FnOnce(&'a mut WriteTx<'_>) -> BoxFuture<'a, Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = store.clone();
        let (done, open) = promptly(async move {
            let mut tx = store.begin().await?;
            let began = Instant::now();
            let done = work(&mut tx).await?;
            tx.commit().await?;
            Ok((done, began.elapsed()))
        })
        .await?;
        match open.min(COUNTED_MAX).mul_f64(self.rest) {
            Duration::ZERO => tokio::task::yield_now().await,
            rest => tokio::time::sleep(rest).await,
        }
        Ok(done)
    }
}

/// Does what writes on a thread that does not give way to others: on a busy machine each of its steps would wait for its turn, and
/// the writer, and with it every device, for all of them. When the caller goes away the work ends, too.
pub async fn promptly<T: Send + 'static>(work: impl Future<Output = Result<T, StoreError>> + Send + 'static) -> Result<T, StoreError> {
    let (runtime, stop) = (Handle::current(), CancellationToken::new());
    let stopped = stop.clone();
    let _stop = stop.drop_guard();
    let done = spawn_blocking(move || runtime.block_on(stopped.run_until_cancelled(work))).await;
    match done.map_err(tokio::task::JoinError::try_into_panic) {
        Ok(done) => done.unwrap_or(Err(StoreError::Closed)),
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The gateway is at its end, and the work was not begun.
        Err(Err(_)) => Err(StoreError::Closed),
    }
}
