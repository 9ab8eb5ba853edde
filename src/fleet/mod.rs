//! The devices: who they are, what they measure, and how they are configured.

pub mod account;
pub mod clock;
pub mod configs;
pub mod reconciler;
pub mod registry;
pub mod sensors;
pub mod silence;

pub use account::{DeviceAccount, Missing, MissingCause};
pub use clock::{ClockOffset, ClockWatch, Exchange};
pub use configs::{ConfigChange, Configs};
pub use registry::{Device, Registry};
pub use sensors::Sensors;

use std::panic::resume_unwind;
use tokio::task::JoinError;

/// Runs `work` to its end, also when the caller goes away: a call may be cancelled at any moment, but what is known in memory,
/// and what those who watch are told, must follow what was committed. A panic goes on in the caller.
pub(crate) async fn to_the_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(tracing::Instrument::in_current_span(work)).await.map_err(JoinError::try_into_panic) {
        Ok(done) => done,
        Err(Ok(panic)) => resume_unwind(panic),
        // The runtime is ending, and the caller with it.
        Err(Err(_)) => std::future::pending().await,
    }
}
