//! What is kept: the log of batches, the chunks merged from it, the registry, the configurations.
//!
//! Reads run beside one another; writes go through one [`WriteTx`] at a time, which either commits whole or leaves nothing.
//! After a write has failed its connection is thrown away, so the next one begins from what the store itself then holds.

pub mod copy;
mod either;
mod identity;
mod postgres;
mod rows;
mod sqlite;
#[cfg(test)]
pub mod test_databases;

pub use either::{Store, Unmerged, WriteTx};
pub use identity::{AuditQuery, AuditRow, CredentialKind, CredentialRow, OperatorKey, OperatorRow};
pub use postgres::PostgresChanges;
pub use sqlite::backup;

use crate::history::chunk::Chunk;
use crate::model::{BatchReject, BatchSummary, DeviceId, Labels, Position, StreamId, Timestamp, ValueKind};
use bytes::Bytes;
use sqlx::migrate::{Migrate, Migrator};

/// Why the store could not do what was asked. Not for clients: they are told [`crate::error::Error::StoreUnavailable`].
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The data directory can't be made or opened.
    #[error("cannot use the data directory {path}")]
    Directory {
        /// The directory.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// Another process works on the data directory.
    #[error("the data directory {path} is in use by another gateway: stop that one, or give this one its own (storage.data_dir)")]
    InUse {
        /// The directory.
        path: String,
    },
    /// The store has been closed: the gateway is being stopped.
    #[error("the store is closed")]
    Closed,
    /// The database refused or failed.
    #[error("the database failed")]
    Database(#[source] sqlx::Error),
    /// The disk that the database is on is full.
    #[error("the database's disk is full: free some space, or enlarge it, and the gateway goes on by itself")]
    DiskFull(#[source] sqlx::Error),
    /// The disk that the database is on fails.
    #[error("the database's disk fails: the system's log says more; once it takes writes, the gateway goes on by itself")]
    DiskFails(#[source] sqlx::Error),
    /// The database server is there, or is not, but says nothing.
    #[error("the database does not answer: nothing came from it for {seconds} s")]
    NoAnswer {
        /// How long it was waited for.
        seconds: u64,
    },
    /// The database's tables could not be brought to this version's form.
    #[error("the database could not be migrated")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// A row holds what this program can't have written.
    #[error("the database is damaged: {0}")]
    Damaged(String),
    /// The database is a copy that was not finished.
    #[error("the database is being copied, or was not copied whole: let `tidegate copy` end first")]
    Unfinished,
    /// Another gateway may have merged since this one has looked.
    #[error("another gateway may have taken over merging")]
    NotLeading,
    /// A stream's row is not as the transaction read it.
    #[error("{changed} of {expected} stream rows were as they had been read: somebody else writes to the database")]
    StreamConflict {
        /// How many rows the update changed.
        changed: u64,
        /// How many it should have.
        expected: u64,
    },
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        let code = error.as_database_error().and_then(|error| error.code());
        match code.as_deref() {
            // SQLITE_FULL, and SQLITE_IOERR_SHMSIZE, where there was no room for the WAL's index; disk_full, PostgreSQL.
            Some("13" | "4874" | "53100") => Self::DiskFull(error),
            // io_error, PostgreSQL.
            Some("58030") => Self::DiskFails(error),
            // SQLITE_IOERR, of which the higher bytes say where. PostgreSQL's codes have five places, these at most four.
            Some(code) if code.len() < 5 && code.parse().is_ok_and(|code: u32| code & 0xff == 10) => Self::DiskFails(error),
            _ => Self::Database(error),
        }
    }
}

impl StoreError {
    /// Whether another gateway was quicker: nothing has happened, and the same may be tried again from what the store now holds.
    pub fn is_conflict(&self) -> bool {
        /// PostgreSQL's codes for a serialization failure and a deadlock.
        const LOST_AGAINST_ANOTHER: [&str; 2] = ["40001", "40P01"];
        match self {
            Self::StreamConflict { .. } => true,
            Self::Database(sqlx::Error::Database(error)) => error.code().is_some_and(|code| LOST_AGAINST_ANOTHER.contains(&&*code)),
            _ => false,
        }
    }
}

/// What another gateway on the same database has changed; says where to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The log, up to a position.
    Log(Position),
    /// A device, or what its sensors allow; or it was deleted.
    Device(DeviceKey),
    /// A device's configuration, or how far it has come.
    Config(DeviceKey),
    /// Some credentials were revoked, or are of operators that were changed.
    Revocations,
}

/// What bringing a database to this version's form took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migrated {
    /// The migrations that were applied now: number and name.
    pub applied: Vec<(i64, String)>,
    /// The number of the last one.
    pub version: i64,
}

impl Migrated {
    fn log(&self) {
        for (version, name) in &self.applied {
            tracing::info!(version, name, "store.migrated");
        }
    }
}

/// Brings a database to this version's form, with nobody else at it meanwhile.
async fn migrate<C: Migrate>(migrator: &Migrator, connection: &mut C) -> Result<Migrated, StoreError> {
    connection.lock().await?;
    connection.ensure_migrations_table(&migrator.table_name).await?;
    let before = connection.list_applied_migrations(&migrator.table_name).await?;
    migrator.run_direct(None, connection, false).await?;
    connection.unlock().await?;
    let new = migrator.iter().filter(|migration| before.iter().all(|applied| applied.version != migration.version));
    let applied = new.map(|migration| (migration.version, migration.description.to_string())).collect();
    Ok(Migrated { applied, version: migrator.iter().map(|migration| migration.version).max().unwrap_or(0) })
}

/// A device's number in the store; never used for another device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceKey(pub i64);

/// A registered device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRow {
    /// Its number.
    pub key: DeviceKey,
    /// Its id.
    pub id: DeviceId,
    /// Its labels.
    pub labels: Labels,
    /// A name for people.
    pub display_name: String,
    /// How often it was updated, plus 1.
    pub revision: i64,
    /// When it was registered.
    pub create_time: Timestamp,
    /// When it was last updated.
    pub update_time: Timestamp,
}

/// A registered sensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SensorRow {
    /// Its number; 0 before it is stored.
    pub key: i64,
    /// Its name.
    pub name: String,
    /// Its unit's symbol; empty when it was never said.
    pub unit: String,
    /// The kind of its values.
    pub kind: ValueKind,
    /// Whether NaN and the infinities are stored.
    pub allow_non_finite: bool,
    /// When it was registered.
    pub create_time: Timestamp,
}

/// How far a stream id has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamRow {
    /// Its number.
    pub key: i64,
    /// The last durable sequence; 0 for a new one.
    pub last_sequence: u64,
}

/// An entry to append to the log: one batch, or several of one stream that follow one another.
#[derive(Debug, Clone)]
pub struct NewLogRow {
    /// Whose it is.
    pub device: DeviceKey,
    /// Of which stream.
    pub stream_key: i64,
    /// How many batches it holds.
    pub batches: usize,
    /// The sequence of the last of them in the stream.
    pub last_sequence: u64,
    /// When they came in.
    pub receive_time: Timestamp,
    /// Their extent.
    pub summary: BatchSummary,
    /// Their bytes, one behind the other, which is the encoding of one batch with the frames of all.
    pub batch: Bytes,
}

/// A batch to keep aside.
#[derive(Debug, Clone)]
pub struct NewRejection {
    /// Whose it is.
    pub device: DeviceKey,
    /// Of which stream.
    pub stream_key: i64,
    /// Its sequence in the stream.
    pub sequence: u64,
    /// When it came in.
    pub receive_time: Timestamp,
    /// Why.
    pub reject: BatchReject,
    /// Its bytes.
    pub batch: Bytes,
}

/// A batch that was kept aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterRow {
    /// Its number.
    pub id: i64,
    /// Which stream it came in.
    pub stream_id: StreamId,
    /// Its sequence there.
    pub sequence: u64,
    /// When it came in.
    pub receive_time: Timestamp,
    /// Why it was rejected: the reason's name.
    pub reason: String,
    /// Where its fault is.
    pub field: String,
    /// What its fault is.
    pub message: String,
    /// How many readings it has; 0 when it can't be read.
    pub readings: u64,
    /// How many bytes.
    pub size_bytes: u64,
    /// Its bytes; empty in a list.
    pub batch: Bytes,
}

/// What one transaction adds to a stream's row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamChange {
    /// The stream's number.
    pub key: i64,
    /// The last sequence as the transaction read it.
    pub sequence_before: u64,
    /// The last sequence as it shall be.
    pub sequence_after: u64,
    /// Stored by this transaction.
    pub stored: Count,
    /// Received again.
    pub duplicate: Count,
    /// Lost by the device, as it says.
    pub lost: Count,
    /// When the last batch came in, microseconds since the epoch.
    pub receive_micros: i64,
}

/// Batches and the readings in them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Batches.
    pub batches: u64,
    /// Readings.
    pub readings: u64,
}

impl Count {
    /// Counts one more batch.
    pub fn add(&mut self, readings: u64) {
        self.batches = self.batches.saturating_add(1);
        self.readings = self.readings.saturating_add(readings);
    }
}

/// An entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRow {
    /// Its place.
    pub position: Position,
    /// Whose it is.
    pub device: DeviceKey,
    /// When it came in.
    pub receive_time: Timestamp,
    /// How many batches it holds.
    pub batches: u64,
    /// Their bytes, one behind the other.
    pub batch: Bytes,
}

/// A row of the log without its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogSize {
    /// Its place.
    pub position: Position,
    /// When it came in.
    pub receive_time: Timestamp,
    /// How large its batch is.
    pub bytes: usize,
}

/// New readings of a sensor: which chunks are around them?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The sensor's number.
    pub sensor_key: i64,
    /// The first time, microseconds since the epoch.
    pub first_time: i64,
    /// The last time.
    pub last_time: i64,
}

/// A chunk without its readings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSpan {
    /// Its number.
    pub key: i64,
    /// Its sensor's number.
    pub sensor_key: i64,
    /// The time of its first reading, microseconds since the epoch.
    pub first_time: i64,
    /// The time of its last reading.
    pub last_time: i64,
    /// How many readings it has.
    pub readings: usize,
    /// Whether it is large enough to stay as it is.
    pub complete: bool,
}

/// A chunk to store.
#[derive(Debug, Clone, PartialEq)]
pub struct NewChunk {
    /// Its sensor's number.
    pub sensor_key: i64,
    /// Whether it is large enough to stay as it is.
    pub complete: bool,
    /// The chunk.
    pub chunk: Chunk,
}

/// A device's account.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LedgerRow {
    /// Stored.
    pub stored: Count,
    /// Received again.
    pub duplicate: Count,
    /// Lost by the device, as it says.
    pub lost: Count,
    /// Rejected, by the reason's name.
    pub rejected: Vec<(String, Count)>,
    /// The streams that were last heard of: id, last durable sequence, when the last batch came in.
    pub streams: Vec<(StreamId, u64, Timestamp)>,
}

/// The latest reading of a sensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatestRow {
    /// The sensor's number.
    pub sensor_key: i64,
    /// Its device's number.
    pub device: DeviceKey,
    /// The reading's time.
    pub time: Timestamp,
    /// The reading, as an encoded batch of its own.
    pub batch: Bytes,
    /// The position of the batch that it came with, or one behind it.
    pub position: Position,
}

/// One numbered state of a device's desired configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigRevisionRow {
    /// The number.
    pub revision: u64,
    /// The configuration: a JSON object.
    pub config: String,
    /// The request id that it was set under; may be empty.
    pub request_id: String,
    /// Why it was set.
    pub comment: String,
    /// When it was set.
    pub create_time: Timestamp,
}

/// How far a device's latest configuration has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigStateRow {
    /// The latest revision; 0 when none was ever set.
    pub desired_revision: u64,
    /// The last revision that was sent to the device, and when.
    pub delivered: Option<(u64, Timestamp)>,
    /// The device's last report.
    pub reported: Option<ConfigReportRow>,
    /// The revision that the device runs with, by its reports: the last one that it applied and has not refused or gone back
    /// from since; 0 when it reported none.
    pub applied_revision: u64,
}

/// A device's last word on a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigReportRow {
    /// The revision.
    pub revision: u64,
    /// What the device did with it.
    pub outcome: ConfigOutcome,
    /// What it said about it.
    pub detail: String,
    /// When it said so.
    pub time: Timestamp,
}

/// What a device did with a revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigOutcome {
    /// It runs with it.
    Applied,
    /// It refused it.
    Rejected,
    /// It went back to what it had before.
    Reverted,
}

impl ConfigOutcome {
    /// The number that stands for it in the store and, as `tidegate.v1.ConfigOutcome`, on the wire.
    pub fn code(self) -> i32 {
        match self {
            Self::Applied => 1,
            Self::Rejected => 2,
            Self::Reverted => 3,
        }
    }

    /// The outcome of a [`code`](Self::code).
    pub fn from_code(code: i32) -> Option<Self> {
        [Self::Applied, Self::Rejected, Self::Reverted].into_iter().find(|outcome| outcome.code() == code)
    }
}
