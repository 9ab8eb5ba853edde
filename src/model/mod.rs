//! What the gateway works on: values that were checked once, where they came in, and are right from then on.
//!
//! Nothing in here knows a database or a connection.

pub mod batch;
pub mod columns;
pub mod correction;
pub mod ids;
pub mod labels;
pub mod latest;
pub mod scan;
pub mod structs;
pub mod time;
pub mod units;

pub use batch::{BatchLimits, BatchReject, BatchSummary, CheckedBatch};
pub use ids::{DeviceId, StreamId};
pub use labels::{LabelSelector, Labels};
pub use latest::{LatestReading, LatestReadings};
pub use time::Timestamp;

/// A batch's place in the log: strictly increasing in the order of commits. Clients see it only inside opaque tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position(pub i64);

/// The type of a sensor's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ValueKind {
    /// IEEE 754 binary64.
    Double,
    /// Signed 64-bit integer.
    Int64,
    /// True or false.
    Bool,
    /// UTF-8 text.
    Text,
}

impl ValueKind {
    /// The number that stands for the kind in the store and, as `tidegate.v1.ValueKind`, on the wire.
    pub fn code(self) -> i32 {
        match self {
            Self::Double => 1,
            Self::Int64 => 2,
            Self::Bool => 3,
            Self::Text => 4,
        }
    }

    /// The kind of a [`code`](Self::code); `None` for a number that stands for no kind.
    pub fn from_code(code: i32) -> Option<Self> {
        [Self::Double, Self::Int64, Self::Bool, Self::Text].into_iter().find(|kind| kind.code() == code)
    }

    /// The kind's name, as in messages and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Double => "double",
            Self::Int64 => "int64",
            Self::Bool => "bool",
            Self::Text => "text",
        }
    }
}

impl std::fmt::Display for ValueKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A request field that is not as it must be; every one of a request's is reported at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The path of the field, such as `devices[2]`.
    pub field: String,
    /// What was found and what is allowed.
    pub description: String,
}

impl Violation {
    /// A violation of `field`.
    pub fn new(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self { field: field.into(), description: description.into() }
    }
}
