//! The embedded store: one SQLite file in WAL mode, one connection that writes, some that read.

pub mod backup;
mod checkpoint;
mod chunks;
mod config;
mod devices;
mod identity;
mod latest;
mod log;
mod rows;
pub(super) use rows::log_page;

use self::checkpoint::{Checkpointer, WalGrowth};
use super::{Migrated, StoreError};
use crate::config::Storage;
use sqlx::{
    AssertSqlSafe, Connection, SqliteConnection, SqlitePool,
    query::Query,
    sqlite::{SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use std::{collections::HashSet, fs::File, path::Path, sync::Arc, time::Duration};
use tokio::sync::{Mutex, MutexGuard};

/// The name of the database file in the data directory.
const DATABASE_FILE: &str = "tidegate.db";
/// The page size of new databases, in bytes: each page is written to the WAL by calls of its own, and entries of the log and
/// chunks are large.
const PAGE_BYTES: u32 = 16 << 10;
/// The page cache of the connection that writes, in KiB (negative in SQLite's own convention). The operating system caches what is read
/// anew, and four times as much made ingest no faster.
const WRITER_CACHE_KIB: &str = "-4096";
/// The same of a connection that reads: what it reads it seldom reads again.
const READER_CACHE_KIB: &str = "-2048";
/// How many rows with little in them share a page, about.
const ROWS_PER_PAGE: i64 = 200;
/// How many rows one statement writes at the most.
const ROWS_PER_STATEMENT: usize = 512;

type SqliteQuery<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

/// See the module.
#[derive(Clone)]
pub struct SqliteStore {
    shared: Arc<Shared>,
    gives_way: bool,
}

struct Shared {
    options: SqliteConnectOptions,
    // Of the two locks the first is taken first.
    checkpointer: Mutex<Checkpointer>,
    writer: Mutex<Writer>,
    wal: WalGrowth,
    readers: SqlitePool,
    // One connection, made by who first reads with it.
    background: SqlitePool,
}

/// The one way to write.
struct Writer {
    // None after a failure: the next transaction begins on a new connection, with nothing but what the file holds.
    connection: Option<SqliteConnection>,
    // Of the log, as its last transaction on this connection left it.
    last_position: Option<i64>,
    // The lock on the data directory; None once the store is closed.
    lock: Option<File>,
}

impl SqliteStore {
    /// Opens the database in `settings.data_dir`, makes it when there is none, and brings its tables to this version's form.
    pub async fn open(settings: &Storage) -> Result<Self, StoreError> {
        let lock = lock_directory(&settings.data_dir)?;
        let options = connect_options(settings);
        let mut writer = SqliteConnection::connect_with(&options).await?;
        enable_incremental_vacuum(&mut writer).await?;
        migrate_on(&mut writer).await?.log();
        let pool = SqlitePoolOptions::new().idle_timeout(None).max_lifetime(None).acquire_timeout(Duration::from_secs(30));
        let read_only = options.clone().create_if_missing(false).read_only(true).pragma("cache_size", READER_CACHE_KIB);
        let background = pool.clone().max_connections(1).connect_lazy_with(read_only.clone());
        // All at once, and for good: the thread of a connection that is made later gives way to others if the one does that makes it.
        let readers = pool.min_connections(settings.readers).max_connections(settings.readers).connect_with(read_only).await?;
        let (wal, woken) = WalGrowth::new();
        let writer = Mutex::new(Writer { connection: Some(writer), last_position: None, lock: Some(lock) });
        let shared = Arc::new(Shared { options, checkpointer: Mutex::new(Checkpointer::Open(None)), writer, wal, readers, background });
        tokio::spawn(checkpoint::run(Arc::downgrade(&shared), woken));
        Ok(Self { shared, gives_way: false })
    }

    pub async fn migrate(settings: &Storage) -> Result<Migrated, StoreError> {
        let _lock = lock_directory(&settings.data_dir)?;
        let mut connection = SqliteConnection::connect_with(&connect_options(settings)).await?;
        enable_incremental_vacuum(&mut connection).await?;
        let migrated = migrate_on(&mut connection).await?;
        connection.close().await?;
        Ok(migrated)
    }

    /// Begins a transaction; waits for the one before it to end.
    pub async fn begin(&self) -> Result<SqliteTx<'_>, StoreError> {
        let mut writer = self.shared.writer.lock().await;
        if writer.lock.is_none() {
            return Err(StoreError::Closed);
        }
        let mut connection = match writer.connection.take() {
            Some(connection) => connection,
            None => {
                writer.last_position = None;
                SqliteConnection::connect_with(&self.shared.options).await?
            }
        };
        sqlx::query("BEGIN IMMEDIATE").execute(&mut connection).await?;
        Ok(SqliteTx { wal: &self.shared.wal, bytes: 0, last_position: writer.last_position, writer, connection })
    }

    pub async fn probe_write(&self) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE progress SET position = position + 1 WHERE name = 'write_probe'").execute(&mut tx.connection).await?;
        tx.commit().await
    }

    /// Reads with a connection of its own; see [`Store::giving_way`](super::Store::giving_way).
    pub fn giving_way(&self) -> Self {
        Self { gives_way: true, ..self.clone() }
    }

    /// Ends all connections, after what is under way, and gives the data directory back.
    pub async fn close(&self) {
        self.shared.background.close().await;
        self.shared.readers.close().await;
        if let Err(error) = self.shared.checkpointer.lock().await.close().await {
            tracing::warn!(%error, "store.close_failed");
        }
        let mut writer = self.shared.writer.lock().await;
        if let Some(connection) = writer.connection.take()
            && let Err(error) = connection.close().await
        {
            tracing::warn!(%error, "store.close_failed");
        }
        // Unlocked and not only closed: a process that another thread is just spawning may hold a copy of the file for a moment.
        if let Some(lock) = writer.lock.take()
            && let Err(error) = lock.unlock()
        {
            tracing::warn!(%error, "store.unlock_failed");
        }
    }

    pub(in crate::store) fn readers(&self) -> &SqlitePool {
        if self.gives_way { &self.shared.background } else { &self.shared.readers }
    }
}

/// Once for each database, which is written anew for it when it has tables already. Without it the file would never shrink.
async fn enable_incremental_vacuum(writer: &mut SqliteConnection) -> Result<(), StoreError> {
    const INCREMENTAL: i64 = 2;
    let mode: i64 = sqlx::query_scalar("PRAGMA auto_vacuum").fetch_one(&mut *writer).await?;
    if mode != INCREMENTAL {
        sqlx::query("PRAGMA auto_vacuum = INCREMENTAL").execute(&mut *writer).await?;
        sqlx::query("VACUUM").execute(writer).await?;
    }
    Ok(())
}

fn connect_options(settings: &Storage) -> SqliteConnectOptions {
    let synchronous = if settings.may_lose_commits_on_power_loss { SqliteSynchronous::Normal } else { SqliteSynchronous::Full };
    SqliteConnectOptions::new()
        .filename(settings.data_dir.join(DATABASE_FILE))
        .create_if_missing(true)
        .page_size(PAGE_BYTES)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(synchronous)
        .busy_timeout(Duration::from_secs(5))
        .foreign_keys(false)
        .pragma("wal_autocheckpoint", checkpoint::PAGES_IN_COMMIT)
        .pragma("cache_size", WRITER_CACHE_KIB)
        .statement_cache_capacity(128)
}

async fn migrate_on(connection: &mut SqliteConnection) -> Result<Migrated, StoreError> {
    super::migrate(&sqlx::migrate!("migrations/sqlite"), connection).await
}

/// Makes the data directory when it is not there, and keeps other gateways away from it.
fn lock_directory(directory: &Path) -> Result<File, StoreError> {
    let path = || directory.display().to_string();
    let open = || {
        std::fs::create_dir_all(directory)?;
        File::options().create(true).truncate(false).write(true).open(directory.join("tidegate.lock"))
    };
    let in_directory = |source| StoreError::Directory { path: path(), source };
    let file = open().map_err(in_directory)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StoreError::InUse { path: path() }),
        Err(std::fs::TryLockError::Error(error)) => Err(in_directory(error)),
    }
}

/// A transaction that writes. Dropped before [`commit`](Self::commit) it leaves nothing.
pub struct SqliteTx<'a> {
    wal: &'a WalGrowth,
    // Of values that take much room, and of pages that are written for little.
    bytes: usize,
    writer: MutexGuard<'a, Writer>,
    // Of the log, if that is known.
    last_position: Option<i64>,
    // Only given back to the writer by a commit or an orderly rollback; after a failure it is closed.
    connection: SqliteConnection,
}

impl SqliteTx<'_> {
    /// See [`Store`](super::Store) and [`WriteTx`](super::WriteTx) for what the methods here and in the modules below do.
    pub async fn commit(self) -> Result<(), StoreError> {
        self.commit_then(|_| ()).await
    }

    /// As [`commit`](Self::commit), and then tells whether that went well, before the next transaction can begin: what is known
    /// in memory of the rows is so never behind what a transaction finds.
    pub async fn commit_then(mut self, tell: impl FnOnce(bool)) -> Result<(), StoreError> {
        let committed = sqlx::query("COMMIT").execute(&mut self.connection).await;
        tell(committed.is_ok());
        committed?;
        self.writer.connection = Some(self.connection);
        self.writer.last_position = self.last_position;
        self.wal.add_commit(self.bytes);
        Ok(())
    }

    /// Leaves nothing of it, and keeps the connection.
    pub async fn rollback(mut self) -> Result<(), StoreError> {
        sqlx::query("ROLLBACK").execute(&mut self.connection).await?;
        self.writer.connection = Some(self.connection);
        Ok(())
    }

    /// Counts the pages of small rows that are written where they are: by their keys, which come in the order of the table.
    fn count_pages(&mut self, keys: impl Iterator<Item = i64>) {
        let pages: HashSet<i64> = keys.map(|key| key / ROWS_PER_PAGE).collect();
        self.bytes += pages.len() * PAGE_BYTES as usize;
    }

    /// Inserts all rows that meet `tail`, some hundred rows a statement; `head` names the table and its columns. Returns how many
    /// rows were changed.
    async fn insert_rows<'q, T>(
        &mut self,
        head: &str,
        columns: usize,
        tail: &str,
        rows: &'q [T],
        bind: impl Fn(SqliteQuery<'q>, &'q T) -> SqliteQuery<'q>,
    ) -> Result<u64, StoreError> {
        let mut changed = 0;
        for rows in rows.chunks(ROWS_PER_STATEMENT) {
            let places = Places::of(rows.len(), columns);
            // All who call this give their transaction up when it fails: so with OR FAIL SQLite need not keep what would undo the statement alone.
            let sql = format!("INSERT OR FAIL INTO {head} SELECT * FROM (VALUES {}) WHERE column1 IS NOT NULL {tail}", places.tuples());
            let query = rows.iter().fold(sqlx::query(AssertSqlSafe(sql)), &bind);
            changed += places.pad(query).execute(&mut self.connection).await?.rows_affected();
        }
        Ok(changed)
    }
}

/// The placeholders of a statement that takes some rows: room for a power of two of them, so that there are few statements and
/// each is prepared once. What is left over is bound to NULL.
struct Places {
    rows: usize,
    room: usize,
    columns: usize,
}

impl Places {
    fn of(rows: usize, columns: usize) -> Self {
        Self { rows, room: rows.next_power_of_two(), columns }
    }

    /// `(?, …), …`
    fn tuples(&self) -> String {
        let tuple = format!("({}), ", list(self.columns));
        let mut tuples = tuple.repeat(self.room);
        tuples.truncate(tuples.len() - ", ".len());
        tuples
    }

    /// `?, …`, of rows with one column.
    fn list(&self) -> String {
        list(self.room)
    }

    fn pad<'q>(&self, query: SqliteQuery<'q>) -> SqliteQuery<'q> {
        (0..(self.room - self.rows) * self.columns).fold(query, |query, _| query.bind(None::<i64>))
    }
}

fn list(places: usize) -> String {
    let mut list = "?, ".repeat(places);
    list.truncate(list.len() - ", ".len());
    list
}
