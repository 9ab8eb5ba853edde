//! How the work in the background leaves the devices their share of the way into the store.
//!
//! One transaction writes at a time, so that what merging, pruning and retention write is what the writer waits for. PostgreSQL does both at
//! once, but then has less of the disk and the processors for each. What they read and compute costs less, as it is done by threads that
//! give way to all others; but even these have the processor for a moment before they give it up, and so rest after each small piece.

use crate::store::{Store, StoreError, WriteTx};
use futures_util::future::BoxFuture;
use std::time::{Duration, Instant};
use tokio::{
    runtime::Handle,
    task::{JoinError, spawn_blocking},
};
use tokio_util::sync::CancellationToken;

/// A transaction that takes longer than this is not rested from for longer: something is wrong, and all wait anyway.
const COUNTED_MAX: Duration = Duration::from_secs(1);
/// The same at leisure: what takes longer than this has mostly waited itself, for a processor or the disk, and few pieces are so large.
const COUNTED_AT_LEISURE_MAX: Duration = Duration::from_millis(20);

/// How fast to go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Haste {
    /// How many seconds to rest for each that a transaction is open or had to wait for the one before it, whichever is less: who need not
    /// wait long is in nobody's way. Where it waits for nobody, for each that it is open, if an append of this gateway's was open when it began.
    pub rest: f64,
    /// How many seconds to rest at the least for each of reading, of computing and of a transaction, also where nobody waits for it.
    pub leisure: f64,
    /// How many chunks a transaction of merging writes and deletes, so that devices do not wait for long: few, or more where merging is
    /// behind, as each transaction has a sync of its own.
    pub chunks_per_transaction: usize,
    /// How many times as much as usual is read, computed or deleted at once: on a busy machine the threads that do it wait for a processor at each
    /// step, which may take longer than the step.
    pub at_once: usize,
}

impl Haste {
    /// Does a transaction, and rests from it.
    pub async fn write<T: Send + 'static>(
        self,
        store: &Store,
        work: impl for<'a> FnOnce(&'a mut WriteTx<'_>) -> BoxFuture<'a, Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = store.clone();
        let written = promptly(async move {
            let asked = Instant::now();
            let mut tx = store.begin().await?;
            // Who waits for nobody may still share the disk and the processors with what devices send.
            let waited = if store.is_appending_beside() { Duration::MAX } else { asked.elapsed() };
            let began = Instant::now();
            let done = work(&mut tx).await?;
            tx.commit().await?;
            Ok((done, began.elapsed(), waited))
        });
        let (done, open, waited) = written.await?;
        self.rest_from(open, open.min(waited)).await;
        Ok(done)
    }

    /// Does what makes a transaction of its own, and rests from all of it, the time included that it waited for the writer.
    pub async fn write_with<T: Send + 'static>(
        self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let began = Instant::now();
        let done = promptly(work).await?;
        let took = began.elapsed();
        self.rest_from(took, took).await;
        Ok(done)
    }

    /// Rests from what was read and computed since `began`: a small piece, so that nobody waits for long.
    pub async fn rest_from_piece(self, began: Instant) {
        self.rest_from(began.elapsed(), Duration::ZERO).await;
    }

    /// Rests from what took so long, and kept others waiting for a part of it.
    async fn rest_from(self, took: Duration, kept_waiting: Duration) {
        let at_leisure = took.min(COUNTED_AT_LEISURE_MAX).mul_f64(self.leisure);
        match kept_waiting.min(COUNTED_MAX).mul_f64(self.rest).max(at_leisure) {
            Duration::ZERO => tokio::task::yield_now().await,
            rest => tokio::time::sleep(rest).await,
        }
    }
}

/// Does what writes on a thread of its own that does not give way to others: on a busy machine each of its steps would wait for its turn,
/// and the writer, and with it every device, for all of them. When the caller goes away the work ends, too.
pub async fn promptly<T: Send + 'static>(work: impl Future<Output = Result<T, StoreError>> + Send + 'static) -> Result<T, StoreError> {
    let (runtime, stop) = (Handle::current(), CancellationToken::new());
    let stopped = stop.clone();
    let _stop = stop.drop_guard();
    // A new thread gives way as the one does that makes it: so a task of the runtime's has it made.
    let task = tokio::spawn(async move { spawn_blocking(move || runtime.block_on(stopped.run_until_cancelled(work))).await });
    match task.await.flatten().map_err(JoinError::try_into_panic) {
        Ok(done) => done.unwrap_or(Err(StoreError::Closed)),
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The gateway is at its end, and the work was not begun.
        Err(Err(_)) => Err(StoreError::Closed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, model::Position, store::test_databases};
    use futures_util::{FutureExt, future::pending};
    use tokio::sync::oneshot;

    const RESTLESS: Haste = Haste { rest: 0.0, leisure: 0.0, chunks_per_transaction: 1, at_once: 1 };

    #[tokio::test]
    async fn a_transaction_that_is_given_up_leaves_nothing_and_goes_out_of_the_way() {
        let directory = tempfile::tempdir().expect("a directory");
        let config = Config { storage: test_databases::sqlite(directory.path()), ..Config::default() };
        let store = Store::open(&config.storage).await.expect("opened");
        let (open, is_open) = oneshot::channel();
        let given_up = RESTLESS.write(&store, move |tx| {
            async move {
                tx.set_merged(Position(7)).await?;
                let _ = open.send(());
                pending().await
            }
            .boxed()
        });
        tokio::select! {
            done = given_up => { let () = done.expect("it never ends"); }
            opened = is_open => opened.expect("it was begun"),
        }
        // Waits for the one before it, which is about to end.
        RESTLESS.write(&store, |tx| tx.set_merged(Position(3)).boxed()).await.expect("written");
        assert_eq!(store.merged_position().await.expect("read"), Position(3));
        store.close().await;
    }

    #[tokio::test]
    async fn a_panic_is_the_callers() {
        let panics = std::panic::AssertUnwindSafe(promptly::<()>(async { panic!("as it happens") })).catch_unwind();
        assert!(panics.await.is_err());
    }

    /// Linux shows it for each thread.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_that_gives_way_has_its_transactions_made_by_one_that_does_not() {
        let nice = || rustix::process::getpriority_process(None).expect("known");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let handle = runtime.handle().clone();
        let before = nice();
        let of_both = std::thread::spawn(move || {
            rustix::process::setpriority_process(None, before + 5).expect("lower");
            (nice(), handle.block_on(promptly(async move { Ok(nice()) })).expect("done"))
        });
        assert_eq!(of_both.join().expect("no panic"), (before + 5, before));
    }
}
