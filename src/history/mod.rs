//! Reading back what is stored.

pub mod query;

pub use query::{Answer, Bucket, Query, Reader, SensorReadings};
