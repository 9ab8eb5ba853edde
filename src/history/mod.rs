//! What was stored, for reading: the log is merged into chunks in the background, and a query reads the two as one.

mod buckets;
pub mod chunk;
pub mod export;
mod gather;
mod json;
mod merger;
mod metrics;
mod plan;
mod query;
mod series;
mod slow;
mod upkeep;

pub use buckets::Bucket;
pub use export::{Export, Exporter, Part, Place, Selection, Span, Standing};
pub use query::{Answer, Piece, Query, Reader};
pub use series::Series;
pub use upkeep::Upkeep;

use crate::store::StoreError;
use tokio::{runtime::Handle, task::spawn_blocking};

/// Does a transaction on a thread that does not give way to others, as the one that merges does: while it is open, the writer
/// waits, and with it every device.
async fn promptly<T: Send + 'static>(work: impl Future<Output = Result<T, StoreError>> + Send + 'static) -> Result<T, StoreError> {
    let runtime = Handle::current();
    match spawn_blocking(move || runtime.block_on(work)).await {
        Ok(done) => done,
        Err(failed) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The gateway is at its end, and the work was not begun.
            Err(_) => Err(StoreError::Closed),
        },
    }
}

#[cfg(test)]
mod model_tests;
