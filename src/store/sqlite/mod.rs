//! The embedded store: one SQLite file in WAL mode, one connection that writes, some that read.

pub mod backup;
mod chunks;
mod config;
mod devices;
mod latest;
mod log;
mod rows;

use super::{Migrated, StoreError};
use crate::config::Storage;
use sqlx::{
    AssertSqlSafe, Connection, SqliteConnection, SqlitePool,
    query::Query,
    sqlite::{SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use std::{fs::File, path::Path, sync::Arc, time::Duration};
use tokio::sync::{Mutex, MutexGuard};

/// The name of the database file in the data directory.
const DATABASE_FILE: &str = "tidegate.db";
/// How much the WAL grows before its pages are moved to the database. Small values make commits wait for moves.
const WAL_PAGES_BEFORE_CHECKPOINT: &str = "2500";
/// The page size of new databases, in bytes: each page is written to the WAL by calls of its own, and entries of the log and
/// chunks are large.
const PAGE_BYTES: u32 = 16 << 10;
/// The page cache of the connection that writes, and of each that reads, in KiB (negative in SQLite's own convention).
const WRITER_CACHE_KIB: &str = "-32768";
/// The same of a connection that reads: what it reads it seldom reads again, and the operating system caches it as well.
const READER_CACHE_KIB: &str = "-4096";
/// How many rows one statement inserts: few sizes, so that each is prepared once.
const ROWS_PER_STATEMENT: [usize; 5] = [512, 128, 32, 8, 1];

type SqliteQuery<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;

/// See the module.
#[derive(Clone)]
pub struct SqliteStore {
    shared: Arc<Shared>,
}

struct Shared {
    options: SqliteConnectOptions,
    writer: Mutex<Writer>,
    readers: SqlitePool,
}

/// The one way to write.
struct Writer {
    // None after a failure: the next transaction begins on a new connection, with nothing but what the file holds.
    connection: Option<SqliteConnection>,
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
        let readers = SqlitePoolOptions::new()
            .max_connections(settings.readers)
            .acquire_timeout(Duration::from_secs(30))
            .connect_with(options.clone().create_if_missing(false).read_only(true).pragma("cache_size", READER_CACHE_KIB))
            .await?;
        Ok(Self {
            shared: Arc::new(Shared { options, writer: Mutex::new(Writer { connection: Some(writer), lock: Some(lock) }), readers }),
        })
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
            None => SqliteConnection::connect_with(&self.shared.options).await?,
        };
        sqlx::query("BEGIN IMMEDIATE").execute(&mut connection).await?;
        Ok(SqliteTx { writer, connection })
    }

    pub async fn probe_write(&self) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE progress SET position = position + 1 WHERE name = 'write_probe'").execute(&mut tx.connection).await?;
        tx.commit().await
    }

    /// Ends all connections, after what is under way, and gives the data directory back.
    pub async fn close(&self) {
        self.shared.readers.close().await;
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

    fn readers(&self) -> &SqlitePool {
        &self.shared.readers
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
        .pragma("wal_autocheckpoint", WAL_PAGES_BEFORE_CHECKPOINT)
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
    writer: MutexGuard<'a, Writer>,
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
        Ok(())
    }

    /// Leaves nothing of it, and keeps the connection.
    pub async fn rollback(mut self) -> Result<(), StoreError> {
        sqlx::query("ROLLBACK").execute(&mut self.connection).await?;
        self.writer.connection = Some(self.connection);
        Ok(())
    }

    /// Runs `INSERT … VALUES` for all rows, some hundred rows a statement. Returns how many rows were changed.
    async fn insert_rows<'q, T>(
        &mut self,
        head: &str,
        columns: usize,
        tail: &str,
        rows: &'q [T],
        bind: impl Fn(SqliteQuery<'q>, &'q T) -> SqliteQuery<'q>,
    ) -> Result<u64, StoreError> {
        let mut changed = 0;
        for chunk in in_statements(rows) {
            let tuple = format!("({})", vec!["?"; columns].join(", "));
            let sql = format!("{head} VALUES {} {tail}", vec![tuple.as_str(); chunk.len()].join(", "));
            let query = chunk.iter().fold(sqlx::query(AssertSqlSafe(sql)), &bind);
            changed += query.execute(&mut self.connection).await?.rows_affected();
        }
        Ok(changed)
    }
}

/// `rows` in runs of the [`ROWS_PER_STATEMENT`].
fn in_statements<T>(mut rows: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = ROWS_PER_STATEMENT.into_iter().find(|&size| size <= rows.len())?;
        let (chunk, rest) = rows.split_at(size);
        rows = rest;
        Some(chunk)
    })
}
