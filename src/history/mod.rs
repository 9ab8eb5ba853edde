//! What was stored, for reading: the log is merged into chunks in the background, and a query reads the two as one.

mod buckets;
pub mod chunk;
mod corrections;
pub mod export;
mod gather;
mod json;
mod merger;
mod metrics;
mod pace;
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

#[cfg(test)]
mod model_tests;
