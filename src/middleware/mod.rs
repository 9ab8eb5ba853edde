//! What every gRPC call passes on its way in and out: one tower layer a file, composed by [`stack()`].
//!
//! A layer is a `Layer`, a `Service`, a `Future` and, as most have to see how a call ends, a response body; none is boxed.
//! What has to happen at the end of a call happens when its state is dropped, so it also happens when the client goes away.

mod authenticate;
mod authorize;
mod body;
mod call_span;
mod class;
pub mod deadline;
pub mod drain;
pub(crate) mod frames;
mod method;
pub mod metrics;
pub mod pace;
pub mod panic;
mod patience;
pub mod quota;
pub mod request_id;
pub mod shed;
mod stack;
mod status;
mod unread;

pub use deadline::Deadline;
pub use drain::{CallTracker, Draining};
pub use method::{Family, Method};
pub use metrics::RefusedCalls;
pub use patience::Patience;
pub use request_id::{CallReports, RequestId};
pub use stack::{Doors, no_layers, stack};
pub use status::code_name;
pub use unread::CallTask;

#[cfg(test)]
pub(crate) mod tests;
