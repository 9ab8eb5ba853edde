//! Tidegate, an IoT telemetry ingestion gateway: devices push readings over gRPC, an acknowledged reading is in the database
//! exactly once, and on every follower's screen in milliseconds.
//!
//! # The two flows
//!
//! **A batch**, from the wire to the disk to a follower:
//!
//! 1. [`app::listener`] takes the connection, [`middleware::stack()`] is what each call goes through;
//! 2. [`api`] turns messages into [`model`] values: [`api::TelemetryApi`] for `Upload`, [`api::DeviceLinkApi`] for `Connect`;
//! 3. [`ingest::Ingest::begin`] admits the batch by its bytes and checks it ([`model::CheckedBatch`]); with what else has come in
//!    of its stream it is an [`ingest::Run`], which [`ingest::Ingest::submit`] hands on;
//! 4. [`ingest::writer`] drains all that waits into one transaction: duplicates are found, the device's sensors agree
//!    ([`fleet::Device::judge`]), the bytes are appended to the log of the [`store`];
//! 5. after the commit the device has its acknowledgement, [`live::Tail`] and [`live::Latest`] the batch, and each
//!    [`live::Follower`] shows it;
//! 6. [`history`] reads it back.
//!
//! **A configuration change**, from the operator to the device and back:
//!
//! 1. [`api::ConfigApi`] makes a new revision in [`fleet::Configs`], and pokes;
//! 2. the device's link in [`api::DeviceLinkApi`] compares desired and known revision, and sends the latest;
//! 3. the device reports; the report is stored, and the operators who watch see it. [`fleet::reconciler`] repairs lost pokes.
//!
//! [`auth`] knows who calls, and who may call what; [`limits`] how much. [`app`] is the one module that knows all others: it builds, runs and drains the
//! gateway. [`client`] is the device's side, [`cli`] the operator's.

/// For all binaries, so that what is measured beside one another differs in nothing else.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

pub mod api;
pub mod app;
pub mod auth;
pub mod cli;
pub mod client;
pub mod config;
pub mod error;
pub mod fleet;
pub mod history;
pub mod http;
pub mod ingest;
pub mod limits;
pub mod live;
pub mod middleware;
pub mod model;
pub mod pb;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod trace;

#[cfg(test)]
mod docs_tests;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
