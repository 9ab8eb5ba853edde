//! The device side: what a device written in Rust uses to hand its readings to a gateway.
//!
//! A device pushes batches into a [`Queue`], in memory or on disk. An always-on device then keeps a [`DeviceLink`], which
//! sends them as they come, takes configurations, and connects again whenever it must. A device that sleeps makes an
//! [`Uploader`] when it wakes up. Either way a batch leaves the queue only when the gateway has it durably, and is stored
//! exactly once however often the connection breaks.
//!
//! ```no_run
//! use std::{path::Path, time::Duration};
//! use tidegate::{
//!     client::{BatchBuilder, ConfigDecision, DeviceLink, Queue, QueueLimits, connect_lazy},
//!     model::{DeviceId, Timestamp, columns::Value},
//! };
//!
//! # fn thermometer() -> f64 { 21.5 }
//! #[tokio::main(flavor = "current_thread")]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let device = DeviceId::parse("boiler-7")?;
//!     let queue = Queue::on_disk(Path::new("readings.sqlite"), QueueLimits::default()).await?;
//!     let link = DeviceLink::builder(device, queue.clone(), connect_lazy("http://127.0.0.1:50051")?)
//!         .config_handler(|revision: u64, config: &serde_json::Map<_, _>| {
//!             println!("revision {revision}: {config:?}");
//!             ConfigDecision::Applied
//!         })
//!         .start();
//!
//!     let mut batch = BatchBuilder::new();
//!     for _ in 0..60 {
//!         batch.push("temperature", "Cel", Timestamp::now().micros(), Value::Double(thermometer()));
//!         tokio::time::sleep(Duration::from_secs(1)).await;
//!     }
//!     if let Some(batch) = batch.finish() {
//!         queue.push(batch).await?;
//!     }
//!     link.flush().await;
//!     link.stop().await;
//!     Ok(())
//! }
//! ```

pub mod backoff;
pub mod batch;
pub mod channel;
pub mod link;
pub mod queue;
pub mod uploader;

#[cfg(test)]
mod fake;

pub use backoff::{Backoff, BackoffSettings};
pub use batch::{BatchBuilder, EncodedBatch};
pub use channel::{Channel, ChannelError, Credentials, connect_lazy, connect_lazy_with, endpoint_with};
pub use link::{ConfigDecision, ConfigHandler, DeviceLink, LinkError, LinkEvent, LinkObserver, LinkSettings};
pub use queue::{Queue, QueueError, QueueLimits, QueueStatus, Resumed, WhenFull};
pub use uploader::{UploadError, UploadSummary, Uploader, UploaderSettings};
