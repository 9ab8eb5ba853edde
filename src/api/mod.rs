//! The gRPC services, one a file. Each parses, calls, and encodes; what it calls knows nothing of the wire.

mod config;
mod credential;
mod dead_letter;
mod desk;
mod device;
mod device_link;
pub(crate) mod driven;
pub(crate) mod export;
pub(crate) mod live;
mod operator;
pub(crate) mod parse;
mod reading;
mod telemetry;

pub use config::ConfigApi;
pub use credential::CredentialApi;
pub use dead_letter::DeadLetterApi;
pub use device::DeviceApi;
pub use device_link::DeviceLinkApi;
pub use live::LiveApi;
pub use operator::OperatorApi;
pub use reading::ReadingApi;
pub use telemetry::TelemetryApi;

use futures_util::stream::BoxStream;
use tonic::Status;

/// What a streaming call answers with.
type ResponseStream<T> = BoxStream<'static, Result<T, Status>>;
