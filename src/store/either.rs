//! One face for both databases: each method says what every store does, and hands on to the one that the gateway runs on.

use super::{
    AuditQuery, AuditRow, ChunkSpan, ConfigReportRow, ConfigRevisionRow, ConfigStateRow, Count, CredentialKind, CredentialRow,
    DeadLetterRow, DeviceKey, DeviceRow, Extent, LatestRow, LedgerRow, LogRow, LogSize, Migrated, NewChunk, NewLogRow, NewRejection,
    OperatorKey, OperatorRow, SensorRow, StoreError, StreamChange, StreamRow,
    postgres::{self, PostgresChanges, PostgresStore, PostgresTx, answered, read},
    sqlite::{self, SqliteStore, SqliteTx},
};
use crate::{
    config::Storage,
    history::chunk::Chunk,
    model::{DeviceId, Labels, Position, StreamId, Timestamp},
};
use futures_util::{
    StreamExt,
    stream::{BoxStream, Fuse},
};
use sqlx::{postgres::PgRow, sqlite::SqliteRow};
use std::collections::HashMap;

/// The store that the gateway runs on. Cheap to clone.
#[derive(Clone)]
pub enum Store {
    /// One file, one gateway.
    Sqlite(SqliteStore),
    /// A database that several gateways may share.
    Postgres(PostgresStore),
}

/// A transaction that writes. Dropped before [`commit`](Self::commit) it leaves nothing.
pub enum WriteTx<'a> {
    /// Into the file.
    Sqlite(SqliteTx<'a>),
    /// Into the shared database.
    Postgres(PostgresTx<'a>),
}

/// Rows of the log that are not in the chunks, in order. All are as of one moment, however long it takes to take them.
pub enum Unmerged<'a> {
    /// Of the file.
    Sqlite(Fuse<BoxStream<'a, Result<SqliteRow, sqlx::Error>>>),
    /// Of the shared database.
    Postgres(Fuse<BoxStream<'a, Result<PgRow, sqlx::Error>>>),
}

impl Unmerged<'_> {
    /// The next rows, until they have `bytes_max`; none at the end.
    pub async fn next_page(&mut self, bytes_max: usize) -> Result<Vec<LogRow>, StoreError> {
        match self {
            Self::Sqlite(rows) => sqlite::log_page(rows, bytes_max).await,
            Self::Postgres(rows) => read(postgres::log_page(rows, bytes_max)).await,
        }
    }
}

/// Methods that call the same method of the store or transaction at hand; those of the store only read.
macro_rules! hand_on {
    () => {};
    ($(#[$doc:meta])* async fn $name:ident(&self $(, $arg:ident: $type:ty)* $(,)?) -> $result:ty; $($rest:tt)*) => {
        $(#[$doc])*
        pub async fn $name(&self $(, $arg: $type)*) -> $result {
            match self {
                Self::Sqlite(store) => store.$name($($arg),*).await,
                Self::Postgres(store) => read(store.$name($($arg),*)).await,
            }
        }
        hand_on! { $($rest)* }
    };
    ($(#[$doc:meta])* async fn $name:ident(&mut self $(, $arg:ident: $type:ty)* $(,)?) -> $result:ty; $($rest:tt)*) => {
        $(#[$doc])*
        pub async fn $name(&mut self $(, $arg: $type)*) -> $result {
            match self {
                Self::Sqlite(tx) => tx.$name($($arg),*).await,
                Self::Postgres(tx) => answered(tx.$name($($arg),*)).await,
            }
        }
        hand_on! { $($rest)* }
    };
}

impl Store {
    /// Opens the database that the settings name, makes it when there is none, and brings its tables to this version's form.
    pub async fn open(settings: &Storage) -> Result<Self, StoreError> {
        if settings.url.is_empty() {
            Ok(Self::Sqlite(SqliteStore::open(settings).await?))
        } else {
            Ok(Self::Postgres(PostgresStore::open(settings).await?))
        }
    }

    /// Brings the tables of the database that the settings name to this version's form, and says what that took.
    pub async fn migrate(settings: &Storage) -> Result<Migrated, StoreError> {
        if settings.url.is_empty() { SqliteStore::migrate(settings).await } else { PostgresStore::migrate(settings).await }
    }

    /// The same store for work in the background. SQLite reads for it on a connection of its own, which is opened by who reads first: its
    /// thread inherits that one's priority.
    pub fn giving_way(&self) -> Self {
        match self {
            Self::Sqlite(store) => Self::Sqlite(store.giving_way()),
            Self::Postgres(store) => Self::Postgres(store.clone()),
        }
    }

    /// Whether other gateways may write to the same database.
    pub fn is_shared(&self) -> bool {
        matches!(self, Self::Postgres(_))
    }

    /// Up to how many bytes of batches an entry of the log is kept in line with the rest of its row; a larger one costs more.
    pub fn in_line_bytes_max(&self) -> usize {
        match self {
            Self::Sqlite(_) => usize::MAX,
            Self::Postgres(_) => postgres::IN_LINE_BYTES_MAX,
        }
    }

    /// What other gateways on the same database change from now on; `None` where there are no others.
    pub async fn changes(&self) -> Result<Option<PostgresChanges>, StoreError> {
        match self {
            Self::Sqlite(_) => Ok(None),
            Self::Postgres(store) => Ok(Some(answered(store.changes()).await?)),
        }
    }

    /// Begins the transaction that appends what devices have sent; waits for the one before it to end. On PostgreSQL it waits for no
    /// other one of this gateway's.
    pub async fn begin_append(&self) -> Result<WriteTx<'_>, StoreError> {
        match self {
            Self::Sqlite(store) => Ok(WriteTx::Sqlite(store.begin().await?)),
            Self::Postgres(store) => Ok(WriteTx::Postgres(store.begin_append().await?)),
        }
    }

    /// Whether a transaction that appends goes on beside one that was begun by [`begin`](Self::begin).
    pub fn is_appending_beside(&self) -> bool {
        match self {
            Self::Sqlite(_) => false,
            Self::Postgres(store) => store.is_appending(),
        }
    }

    /// Begins a transaction that appends nothing; waits for the one before it to end.
    pub async fn begin(&self) -> Result<WriteTx<'_>, StoreError> {
        match self {
            Self::Sqlite(store) => Ok(WriteTx::Sqlite(store.begin().await?)),
            Self::Postgres(store) => Ok(WriteTx::Postgres(store.begin().await?)),
        }
    }

    /// Ends all connections, after what is under way.
    pub async fn close(&self) {
        match self {
            Self::Sqlite(store) => store.close().await,
            Self::Postgres(store) => store.close().await,
        }
    }

    /// Whether the database takes a durable write now.
    pub async fn probe_write(&self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(store) => store.probe_write().await,
            Self::Postgres(store) => store.probe_write().await,
        }
    }

    /// Whether this gateway is, or from now on can be, the one that merges, prunes and expires what all have stored.
    pub async fn lead_upkeep(&self) -> Result<bool, StoreError> {
        match self {
            Self::Sqlite(_) => Ok(true),
            Self::Postgres(store) => store.lead_upkeep().await,
        }
    }

    /// Gives some of what deleting left free back to the file system; whether there is more to give. An eighth of what is used, and 16 MiB at
    /// the least, is kept for what is written next, and `kept_bytes` besides.
    pub async fn release_space(&self, kept_bytes: u64) -> Result<bool, StoreError> {
        match self {
            Self::Sqlite(store) => store.release_space(kept_bytes).await,
            // The server's own vacuum does it.
            Self::Postgres(_) => Ok(false),
        }
    }

    /// Deletes what deleted devices left, some rows a transaction, until nothing is left.
    pub async fn purge_deleted(&self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(store) => store.purge_deleted().await,
            Self::Postgres(store) => store.purge_deleted().await,
        }
    }

    /// Writes latest readings that changed, unless later ones of another gateway are there, but none of a device that was deleted
    /// meanwhile: nobody would delete them any more. With a `position`, what is there is now as of it.
    pub async fn save_latest(&self, rows: &[LatestRow], position: Option<Position>) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(store) => store.save_latest(rows, position).await,
            Self::Postgres(store) => store.save_latest(rows, position).await,
        }
    }

    /// Begins to read what of a device's batches is not in the chunks, of those that reach into the times.
    pub fn read_unmerged(&self, device: DeviceKey, start_time: Timestamp, end_time: Option<Timestamp>) -> Unmerged<'_> {
        match self {
            Self::Sqlite(store) => Unmerged::Sqlite(store.read_unmerged(device, start_time, end_time).fuse()),
            Self::Postgres(store) => Unmerged::Postgres(store.read_unmerged(device, start_time, end_time).fuse()),
        }
    }

    hand_on! {
        /// The last durable sequence of a stream; 0 when there is no such stream.
        async fn last_sequence(&self, device: DeviceKey, stream_id: StreamId) -> Result<u64, StoreError>;

        /// The last position that was ever given out; 0 before the first.
        async fn last_position(&self) -> Result<Position, StoreError>;

        /// All positions up to this one are gone from the log for good; 0 while none is.
        async fn pruned_position(&self) -> Result<Position, StoreError>;

        /// The position of the last batch that came in before `time`; 0 when none did.
        ///
        /// Positions are in the order of commits and receive times nearly so: a batch that came in within the same moment may
        /// stand on either side.
        async fn position_before(&self, time: Timestamp) -> Result<Position, StoreError>;

        /// The rows behind `after`, in order: at most `rows_max`, and no further one when there are `bytes_max`.
        async fn read_log(&self, after: Position, rows_max: usize, bytes_max: usize) -> Result<Vec<LogRow>, StoreError>;

        /// As [`read_log`](Self::read_log); `None` when rows behind `after` have been deleted since they were merged.
        async fn read_log_unbroken(&self, after: Position, rows_max: usize, bytes_max: usize) -> Result<Option<Vec<LogRow>>, StoreError>;

        /// How large the rows behind `after` are, in order: at most `rows_max`.
        async fn log_sizes(&self, after: Position, rows_max: usize) -> Result<Vec<LogSize>, StoreError>;

        /// All of the log up to this position is in the chunks.
        async fn merged_position(&self) -> Result<Position, StoreError>;

        /// The latest readings that are stored are as of this position.
        async fn latest_position(&self) -> Result<Position, StoreError>;

        /// The chunks that new readings of some sensors reach into, and of those before them the last that is complete and all behind
        /// it, in the order of sensors as asked for, each in the order of time.
        async fn chunks_around(&self, extents: &[Extent]) -> Result<Vec<ChunkSpan>, StoreError>;

        /// The chunks of a sensor that have readings at or after `start` and before `end`, in the order of time: at most `chunks_max`.
        async fn read_chunks(&self, sensor_key: i64, start: i64, end: i64, chunks_max: usize) -> Result<Vec<Chunk>, StoreError>;

        /// The chunks with these numbers, in no order; those that are gone are left out.
        async fn chunks(&self, keys: &[i64]) -> Result<Vec<(i64, Chunk)>, StoreError>;

        /// How much of the disk the database needs for what is in it.
        async fn used_bytes(&self) -> Result<u64, StoreError>;

        /// How much of the disk the database takes up, with what is free in it.
        async fn file_bytes(&self) -> Result<u64, StoreError>;

        /// How many readings were ever stored of each of some devices; those of which none was are left out.
        async fn stored_readings(&self, devices: &[DeviceKey]) -> Result<HashMap<DeviceKey, u64>, StoreError>;

        /// The batches of a device that were kept aside, without their bytes, in the order of their numbers from behind `after`.
        async fn dead_letters(&self, device: DeviceKey, after: i64, rows_max: usize) -> Result<Vec<DeadLetterRow>, StoreError>;

        /// A batch of a device that was kept aside; `None` when it is not there.
        async fn dead_letter(&self, device: DeviceKey, id: i64) -> Result<Option<DeadLetterRow>, StoreError>;

        /// The account of a device: the sums over all of its streams, and those that were last heard of, the last first.
        async fn ledger(&self, device: DeviceKey) -> Result<LedgerRow, StoreError>;

        /// A device by its id.
        async fn device(&self, id: &DeviceId) -> Result<Option<DeviceRow>, StoreError>;

        /// A device by its number.
        async fn device_by_key(&self, device: DeviceKey) -> Result<Option<DeviceRow>, StoreError>;

        /// Devices in the order of their ids, behind the id `after`: at most `rows_max`.
        async fn devices(&self, after: &str, rows_max: usize) -> Result<Vec<DeviceRow>, StoreError>;

        /// How many devices are registered.
        async fn devices_len(&self) -> Result<usize, StoreError>;

        /// How many devices were registered before `since`, and sent no batch since then.
        async fn silent_devices_len(&self, since: Timestamp) -> Result<usize, StoreError>;

        /// When a batch of the device last came in.
        async fn last_receive_time(&self, device: DeviceKey) -> Result<Option<Timestamp>, StoreError>;

        /// The sensors of a device, in the order of their names.
        async fn sensors(&self, device: DeviceKey) -> Result<Vec<SensorRow>, StoreError>;

        /// How far the device's configuration has come, with its desired revision; `None` when none was ever set.
        async fn config(&self, device: DeviceKey) -> Result<Option<(ConfigRevisionRow, ConfigStateRow)>, StoreError>;

        /// The revisions of a device before `before`, newest first: at most `rows_max`.
        async fn config_revisions(&self, device: DeviceKey, before: u64, rows_max: usize) -> Result<Vec<ConfigRevisionRow>, StoreError>;

        /// The devices behind `after` whose desired revision has not been reported on: at most `rows_max`, by number.
        async fn unsettled_configs(&self, after: DeviceKey, rows_max: usize) -> Result<Vec<DeviceKey>, StoreError>;

        /// All latest readings, and the position that they are as of.
        async fn latest(&self) -> Result<(Position, Vec<LatestRow>), StoreError>;

        /// How many operators there are.
        async fn operators_len(&self) -> Result<usize, StoreError>;

        /// An operator by its name.
        async fn operator(&self, name: &str) -> Result<Option<OperatorRow>, StoreError>;

        /// An operator by its number.
        async fn operator_by_key(&self, operator: OperatorKey) -> Result<Option<OperatorRow>, StoreError>;

        /// Operators in the order of their names, behind the name `after`: at most `rows_max`.
        async fn operators(&self, after: &str, rows_max: usize) -> Result<Vec<OperatorRow>, StoreError>;

        /// A credential by its id.
        async fn credential(&self, id: &str) -> Result<Option<CredentialRow>, StoreError>;

        /// The credentials of a device or an operator, or all enrolment keys (of owner 0), in the order of their creation.
        async fn credentials(&self, kind: CredentialKind, owner: i64) -> Result<Vec<CredentialRow>, StoreError>;

        /// The number of the last revocation; 0 when there is none.
        async fn last_revocation(&self) -> Result<i64, StoreError>;

        /// The revocations behind a number, in the order of commits: number and credential.
        async fn revocations_after(&self, after: i64) -> Result<Vec<(i64, String)>, StoreError>;

        /// Entries of the audit log, newest first.
        async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditRow>, StoreError>;
    }
}

impl WriteTx<'_> {
    /// Makes all of it durable. After an error it is not known whether the transaction happened: read the store.
    pub async fn commit(self) -> Result<(), StoreError> {
        self.commit_then(|_| ()).await
    }

    /// As [`commit`](Self::commit), and then tells whether that went well, before the next transaction can begin on the same
    /// connection: what is known in memory of the rows that only such transactions change is so never behind what the next one finds.
    pub async fn commit_then(self, tell: impl FnOnce(bool)) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(tx) => tx.commit_then(tell).await,
            Self::Postgres(tx) => tx.commit_then(tell).await,
        }
    }

    /// Leaves nothing of it, and keeps the connection.
    pub async fn rollback(self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(tx) => tx.rollback().await,
            Self::Postgres(tx) => tx.rollback().await,
        }
    }

    hand_on! {
        /// Where a stream stands; a new one is made when there is none.
        async fn stream(&mut self, device: DeviceKey, stream_id: StreamId, now: Timestamp) -> Result<StreamRow, StoreError>;

        /// Reads where streams stand, and keeps other gateways from moving them on until the commit. Streams that are not there
        /// are left out, as are all where no other gateway can be.
        async fn lock_streams(&mut self, streams: &[(DeviceKey, StreamId)]) -> Result<Vec<((DeviceKey, StreamId), StreamRow)>, StoreError>;

        /// Appends to the log; returns the first of the new positions, which follow one another without a hole. All others who
        /// append to a shared database wait from here to the commit, so it comes last.
        async fn append(&mut self, rows: &[NewLogRow]) -> Result<Position, StoreError>;

        /// Puts new chunks in the place of others, but no chunk of a device that was deleted meanwhile: nobody would delete it any more.
        async fn replace_chunks(&mut self, gone: &[i64], new: &[NewChunk]) -> Result<(), StoreError>;

        /// Notes that all of the log up to a position is in the chunks.
        async fn set_merged(&mut self, position: Position) -> Result<(), StoreError>;

        /// Deletes the log up to a position. Returns how many batches that were.
        async fn prune_log(&mut self, through: Position) -> Result<u64, StoreError>;

        /// Deletes the chunks whose last readings are the oldest, only of those that end before `before` if that is given: at most
        /// `chunks_max`. Returns how many readings of how many chunks are gone.
        async fn delete_oldest_chunks(&mut self, before: Option<i64>, chunks_max: usize) -> Result<Count, StoreError>;

        /// Moves streams on, each from where this transaction read it: a row that is elsewhere is a conflict, and nothing may be committed.
        async fn advance_streams(&mut self, changes: &[StreamChange]) -> Result<(), StoreError>;

        /// Keeps rejected batches aside and counts them; of all that are kept, those before the last `kept_max` are deleted.
        async fn reject(&mut self, rows: &[NewRejection], kept_max: u32) -> Result<(), StoreError>;

        /// Deletes a batch that was kept aside; its reason and how many readings it has, or `None` when it is not there.
        async fn take_dead_letter(&mut self, device: DeviceKey, id: i64) -> Result<Option<(String, u64)>, StoreError>;

        /// Counts a batch that was rejected as one that was not.
        async fn uncount_rejected(&mut self, device: DeviceKey, reason: &str, readings: u64) -> Result<(), StoreError>;

        /// Registers a device; `None` when the id is taken.
        async fn insert_device(
            &mut self,
            id: &DeviceId,
            labels: &Labels,
            display_name: &str,
            now: Timestamp,
        ) -> Result<Option<DeviceRow>, StoreError>;

        /// What the store holds of a device, which no other gateway changes until the commit; `None` when it was deleted.
        async fn lock_device(&mut self, device: DeviceKey) -> Result<Option<DeviceRow>, StoreError>;

        /// Changes a device that is still at `revision`; `None` when it is not.
        async fn update_device(
            &mut self,
            device: DeviceKey,
            revision: i64,
            labels: &Labels,
            display_name: &str,
            now: Timestamp,
        ) -> Result<Option<DeviceRow>, StoreError>;

        /// Takes a device out of the registry; what it left elsewhere is for [`Store::purge_deleted`].
        async fn delete_device(&mut self, device: DeviceKey) -> Result<(), StoreError>;

        /// Registers a sensor; the row that is there when the name is taken.
        async fn insert_sensor(&mut self, device: DeviceKey, sensor: &SensorRow) -> Result<SensorRow, StoreError>;

        /// Writes a sensor's unit, unless one was said before; the row that is then there.
        async fn set_sensor_unit(&mut self, sensor: &SensorRow) -> Result<SensorRow, StoreError>;

        /// Writes what a sensor allows.
        async fn set_sensor_allowance(&mut self, sensor: &SensorRow) -> Result<(), StoreError>;

        /// The latest revision; `None` when none was ever set.
        async fn latest_config(&mut self, device: DeviceKey) -> Result<Option<ConfigRevisionRow>, StoreError>;

        /// The highest revision that an earlier device of this id had; 0 when there was none.
        async fn retired_revision(&mut self, id: &DeviceId) -> Result<u64, StoreError>;

        /// The revision that was set under a request id.
        async fn config_of_request(&mut self, device: DeviceKey, request_id: &str) -> Result<Option<ConfigRevisionRow>, StoreError>;

        /// Adds a revision and makes it the desired one.
        async fn insert_config(&mut self, device: DeviceKey, row: &ConfigRevisionRow) -> Result<(), StoreError>;

        /// Notes that a revision was sent to the device. Whether anything changed.
        async fn note_delivered(&mut self, device: DeviceKey, revision: u64, now: Timestamp) -> Result<bool, StoreError>;

        /// Adds an operator; `None` when the name is taken.
        async fn insert_operator(&mut self, name: &str, role: i32, scope: &str, now: Timestamp) -> Result<Option<OperatorRow>, StoreError>;

        /// Changes an operator, and tells all gateways to look at its tokens anew; `None` when there is none.
        async fn update_operator(&mut self, operator: OperatorKey, role: i32, scope: &str, now: Timestamp) -> Result<Option<OperatorRow>, StoreError>;

        /// Deletes an operator with its tokens; whether there was one.
        async fn delete_operator(&mut self, operator: OperatorKey, now: Timestamp) -> Result<bool, StoreError>;

        /// Adds a credential, whose id is new.
        async fn insert_credential(&mut self, row: &CredentialRow) -> Result<(), StoreError>;

        /// Deletes a credential, and tells all gateways; whether there was one.
        async fn revoke_credential(&mut self, id: &str, now: Timestamp) -> Result<bool, StoreError>;

        /// Counts one more device that an enrolment key enrols; whether it may.
        async fn use_enrolment_key(&mut self, id: &str) -> Result<bool, StoreError>;

        /// Takes back what [`use_enrolment_key`](Self::use_enrolment_key) has counted.
        async fn give_back_enrolment_key(&mut self, id: &str) -> Result<(), StoreError>;

        /// Adds an entry to the audit log.
        async fn insert_audit(&mut self, row: &AuditRow) -> Result<(), StoreError>;

        /// Deletes revocations from before a time.
        async fn forget_revocations_before(&mut self, time: Timestamp) -> Result<(), StoreError>;

        /// Deletes the oldest entries of the audit log, from before a time; at most so many. How many that were.
        async fn forget_audit_before(&mut self, time: Timestamp, rows_max: usize) -> Result<u64, StoreError>;

        /// Notes what a device reported. A report on a revision that was never set is void, as is one on a revision older than
        /// the last reported one, unless it says that the device went back from what it runs with. Whether anything changed.
        async fn note_report(&mut self, device: DeviceKey, report: &ConfigReportRow) -> Result<bool, StoreError>;
    }
}
