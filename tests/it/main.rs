//! Tests of the whole gateway through its doors: real gateways on free ports, real files, real clients.
//!
//! One binary, so that it is linked once.
#![allow(clippy::print_stderr, reason = "a skipped test says so, and an attack what it came to")]

mod support;

mod backup;
mod bench;
mod cli;
mod clocks;
mod configure;
mod copy;
mod dead_letters;
mod devices;
#[cfg(target_os = "linux")]
mod disk_failure;
mod export;
mod fleet;
#[cfg(target_os = "linux")]
mod floods;
mod follow;
mod formats;
mod gateways;
mod identity;
mod identity_matrix;
mod kills;
mod lifecycle;
mod limits;
mod link;
mod migrate;
mod null_sink;
mod oidc;
mod postgres;
mod postgres_failure;
mod python;
mod readme;
mod seen;
mod sizes;
#[cfg(target_os = "linux")]
mod slow;
mod sql;
mod store;
mod store_failure;
mod tls;
mod traces;
mod upload;
