//! The store on PostgreSQL, which several gateways may share: one connection that appends, one for all else that is written, some
//! that read, one that listens.
//!
//! What keeps the gateways apart is in the database alone. A position is taken from `log_head`, whose row a transaction locks
//! last and holds until its commit: positions follow the order of commits. A stream is moved on from where it was read, or
//! not at all. A device's row is locked before it, its configuration or its sensors' settings are changed.
//! [`changes`] tells the other gateways.

mod changes;
mod chunks;
mod config;
mod devices;
mod identity;
mod latest;
mod log;
mod rows;
pub(super) use rows::log_page;

pub use changes::PostgresChanges;

use super::{Change, Migrated, StoreError, rows::text};
use crate::config::Storage;
use sqlx::{
    Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    runtime::{Builder, Runtime},
    sync::{Mutex, MutexGuard},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

/// Up to how many bytes of batches an entry of the log fits one of the server's pages of 8 KiB, with some room for further columns. What is
/// longer goes out of line, in pieces of 2 KB that have an index.
pub(super) const IN_LINE_BYTES_MAX: usize = 8_000;

/// What the server does with a connection whose gateway is gone in the middle of a transaction: nobody waits longer for its locks.
const ABANDONED_TRANSACTION_TIMEOUT: &str = "10s";
/// How long a statement waits for what another transaction has locked: longer than that of a gateway that is gone has it.
const LOCK_TIMEOUT: &str = "12s";
/// How long the server may take to answer; longer than it waits for locks.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a read, or a page of one, may take, with the wait for a connection: an answer may be large, and the network slow.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for the server and all pages, so that it does not go on with what nobody waits for.
const READ_STATEMENT_TIMEOUT: &str = "30s";

/// See the module.
#[derive(Clone)]
pub struct PostgresStore {
    shared: Arc<Shared>,
}

struct Shared {
    options: PgConnectOptions,
    // Tells this gateway's notifications from those of the others.
    gateway: Uuid,
    // What devices send waits for nothing else that this gateway writes.
    appender: Mutex<Slot>,
    writer: Mutex<Slot>,
    readers: PgPool,
    io: Io,
}

/// A way of this gateway to write: one transaction at a time.
struct Slot {
    options: PgConnectOptions,
    // None after a failure: the next transaction begins on a new connection.
    connection: Option<PgConnection>,
    // Whether this connection holds the lock of the gateway that merges.
    leads: bool,
    closed: bool,
}

impl PostgresStore {
    pub async fn open(settings: &Storage) -> Result<Self, StoreError> {
        Self::migrate(settings).await?.log();
        let (options, io) = (connect_options(settings)?, Io::new()?);
        let mut writer = answered(io.connect(&options)).await?;
        if answered(super::copy::is_unfinished(&mut writer)).await? {
            return Err(StoreError::Unfinished);
        }
        let readers = PgPoolOptions::new()
            .max_connections(settings.readers)
            // Longer than any read waits, so that it says itself that nothing came.
            .acquire_timeout(2 * READ_TIMEOUT)
            // The pool itself would wait for ever for the answer to a read that was given up, and one connection be fewer.
            .after_release(|connection, _| {
                Box::pin(async { Ok(timeout(ANSWER_TIMEOUT, connection.ping()).await.is_ok_and(|answer| answer.is_ok())) })
            })
            .connect_with(options.clone().options([("default_transaction_read_only", "on"), ("statement_timeout", READ_STATEMENT_TIMEOUT)]))
            .await?;
        // Planning an append for the arrays at hand copies them several times, and finds the same plan each time.
        let appends = options.clone().options([("plan_cache_mode", "force_generic_plan")]);
        let slot = |options, connection| Mutex::new(Slot { options, connection, leads: false, closed: false });
        let (appender, writer) = (slot(appends, None), slot(options.clone(), Some(writer)));
        Ok(Self { shared: Arc::new(Shared { options, gateway: Uuid::new_v4(), appender, writer, readers, io }) })
    }

    /// Under sqlx's advisory lock: of several gateways that start at once one migrates, and the others wait for it.
    pub async fn migrate(settings: &Storage) -> Result<Migrated, StoreError> {
        // A connection of its own: a migration may take longer than others wait for locks.
        let mut connection = answered(PgConnection::connect_with(&url_options(settings)?)).await?;
        let migrated = super::migrate(&sqlx::migrate!("migrations/postgres"), &mut connection).await?;
        connection.close().await?;
        Ok(migrated)
    }

    pub async fn begin(&self) -> Result<PostgresTx<'_>, StoreError> {
        match self.begin_on(&self.shared.writer).await {
            // The connection that was there may have broken long ago, unnoticed. That of the appends is not tried again: what the writer
            // remembers may be of a server whose last commits are gone with it.
            Err(StoreError::Database(_)) => self.begin_on(&self.shared.writer).await,
            begun => begun,
        }
    }

    pub async fn begin_append(&self) -> Result<PostgresTx<'_>, StoreError> {
        self.begin_on(&self.shared.appender).await
    }

    /// Whether a transaction that appends is under way.
    pub fn is_appending(&self) -> bool {
        self.shared.appender.try_lock().is_err()
    }

    async fn begin_on<'a>(&'a self, slot: &'a Mutex<Slot>) -> Result<PostgresTx<'a>, StoreError> {
        let mut writer = slot.lock().await;
        if writer.closed {
            return Err(StoreError::Closed);
        }
        let mut connection = match writer.connection.take() {
            Some(connection) => connection,
            None => {
                writer.leads = false;
                answered(self.shared.io.connect(&writer.options)).await?
            }
        };
        answered(sqlx::raw_sql("BEGIN").execute(&mut connection)).await?;
        Ok(PostgresTx { writer, connection, gateway: self.shared.gateway })
    }

    /// Takes the log's head as well: whoever holds it, such as a transaction of which a broken connection left the outcome
    /// open, has come to its end when this has.
    pub async fn probe_write(&self) -> Result<(), StoreError> {
        let mut tx = self.begin_append().await?;
        answered(sqlx::query("UPDATE log_head SET position = position").execute(&mut tx.connection)).await?;
        let update = sqlx::query("UPDATE progress SET position = position + 1 WHERE name = 'write_probe'");
        answered(update.execute(&mut tx.connection)).await?;
        tx.commit_then(|_| ()).await
    }

    pub async fn close(&self) {
        self.shared.readers.close().await;
        for writer in [&self.shared.appender, &self.shared.writer] {
            let mut writer = writer.lock().await;
            writer.closed = true;
            if let Some(connection) = writer.connection.take()
                && let Err(error) = connection.close().await
            {
                tracing::warn!(%error, "store.close_failed");
            }
        }
    }

    fn readers(&self) -> &PgPool {
        &self.shared.readers
    }
}

/// A thread for the sockets of the connections that write. The runtime's own threads look at sockets only between the tasks of all calls: each
/// step of a transaction, and each part of a large statement, would wait for these.
struct Io {
    // Always there, but for the drop.
    runtime: Option<Runtime>,
}

impl Io {
    fn new() -> Result<Self, StoreError> {
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("postgres").enable_all().build();
        Ok(Self { runtime: Some(runtime.map_err(sqlx::Error::Io)?) })
    }

    async fn connect(&self, options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
        let (runtime, options) = (self.runtime.as_ref().ok_or(sqlx::Error::WorkerCrashed)?, options.clone());
        let connecting = AbortOnDropHandle::new(runtime.spawn(async move { PgConnection::connect_with(&options).await }));
        connecting.await.map_err(|_| sqlx::Error::WorkerCrashed)?
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        // Does not wait for it, which a task must not.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn connect_options(settings: &Storage) -> Result<PgConnectOptions, StoreError> {
    let synchronous_commit = if settings.may_lose_commits_on_power_loss { "off" } else { "on" };
    Ok(url_options(settings)?.options([
        ("synchronous_commit", synchronous_commit),
        ("idle_in_transaction_session_timeout", ABANDONED_TRANSACTION_TIMEOUT),
        ("lock_timeout", LOCK_TIMEOUT),
        // The locks of a gateway whose machine is gone go within half a minute.
        ("tcp_keepalives_idle", "10"),
        ("tcp_keepalives_interval", "5"),
        ("tcp_keepalives_count", "3"),
    ]))
}

pub(in crate::store) fn url_options(settings: &Storage) -> Result<PgConnectOptions, StoreError> {
    let options: PgConnectOptions = settings.url.expose().parse()?;
    Ok(options.application_name("tidegate").options([("client_min_messages", "warning")]))
}

/// A transaction that writes.
pub struct PostgresTx<'a> {
    writer: MutexGuard<'a, Slot>,
    // Only given back to the writer by a commit or an orderly rollback; after a failure it is closed.
    connection: PgConnection,
    gateway: Uuid,
}

impl PostgresTx<'_> {
    /// See [`Store`](super::Store) and [`WriteTx`](super::WriteTx) for what the methods here and in the modules below do.
    pub async fn commit_then(mut self, tell: impl FnOnce(bool)) -> Result<(), StoreError> {
        let committed = answered(sqlx::raw_sql("COMMIT").execute(&mut self.connection)).await;
        tell(committed.is_ok());
        committed?;
        self.writer.connection = Some(self.connection);
        Ok(())
    }

    pub async fn rollback(mut self) -> Result<(), StoreError> {
        answered(sqlx::raw_sql("ROLLBACK").execute(&mut self.connection)).await?;
        self.writer.connection = Some(self.connection);
        Ok(())
    }

    /// Tells the other gateways when this transaction commits.
    async fn notify(&mut self, change: Change) -> Result<(), StoreError> {
        sqlx::query("SELECT pg_notify($1, $2)")
            .bind(changes::CHANNEL)
            .bind(changes::payload(self.gateway, change))
            .execute(&mut self.connection)
            .await?;
        Ok(())
    }
}

/// Waits no longer than [`ANSWER_TIMEOUT`]: a server that hangs, and a network that forgot the connection, would hold up all who
/// want to write for ever. What becomes of the transaction is then unknown, as it is when its connection breaks.
pub(super) async fn answered<T, E>(answer: impl Future<Output = Result<T, E>>) -> Result<T, StoreError>
where
    StoreError: From<E>,
{
    within(ANSWER_TIMEOUT, answer).await
}

/// Waits no longer than [`READ_TIMEOUT`] for what is read.
pub(super) async fn read<T, E>(answer: impl Future<Output = Result<T, E>>) -> Result<T, StoreError>
where
    StoreError: From<E>,
{
    within(READ_TIMEOUT, answer).await
}

async fn within<T, E>(limit: Duration, answer: impl Future<Output = Result<T, E>>) -> Result<T, StoreError>
where
    StoreError: From<E>,
{
    match timeout(limit, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(StoreError::NoAnswer { seconds: limit.as_secs() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Position, Timestamp, batch::BatchSummary},
        store::{DeviceKey, NewLogRow, test_databases},
    };
    use bytes::Bytes;

    fn row(number: u8, bytes: usize) -> NewLogRow {
        let now = Timestamp::now();
        NewLogRow {
            device: DeviceKey(1),
            stream_key: 1,
            batches: 1,
            last_sequence: number.into(),
            receive_time: now,
            summary: BatchSummary { readings: 1, first_time: now, last_time: now },
            batch: Bytes::from(vec![number; bytes]),
        }
    }

    #[tokio::test]
    async fn an_append_waits_for_nothing_else_that_its_gateway_writes() {
        let Some(storage) = test_databases::postgres() else { return };
        let store = PostgresStore::open(&storage).await.expect("opened");
        let other = store.begin().await.expect("begun");
        assert!(!store.is_appending());
        let append = timeout(Duration::from_secs(60), store.begin_append()).await.expect("does not wait").expect("begun");
        assert!(store.is_appending());
        append.rollback().await.expect("ended");
        other.rollback().await.expect("ended");
        store.close().await;
    }

    #[tokio::test]
    async fn a_connection_that_broke_unnoticed_is_made_anew_but_for_appends() {
        let Some(storage) = test_databases::postgres() else { return };
        let store = PostgresStore::open(&storage).await.expect("opened");
        store.begin().await.expect("begun").rollback().await.expect("ended");
        store.begin_append().await.expect("begun").rollback().await.expect("ended");
        // Waits until they are gone.
        let end = "SELECT bool_and(pg_terminate_backend(pid, 60000)) FROM pg_stat_activity \
                   WHERE datname = current_database() AND application_name = 'tidegate' AND pid <> pg_backend_pid()";
        let mut connection = PgConnection::connect(storage.url.expose()).await.expect("connected");
        let ended: Option<bool> = sqlx::query_scalar(end).fetch_one(&mut connection).await.expect("ended");
        assert_eq!(ended, Some(true));
        store.begin().await.expect("begun on a new connection").rollback().await.expect("ended");
        assert!(matches!(store.begin_append().await, Err(StoreError::Database(_))));
        store.begin_append().await.expect("begun on a new connection").rollback().await.expect("ended");
        store.close().await;
    }

    #[tokio::test]
    async fn what_is_appended_in_parts_has_positions_one_after_the_other() {
        let Some(storage) = test_databases::postgres() else { return };
        let store = PostgresStore::open(&storage).await.expect("opened");
        let rows: Vec<NewLogRow> = (1..=5).map(|number| row(number, 300 << 10)).collect();
        let mut tx = store.begin_append().await.expect("begun");
        let firsts = [tx.append(&rows).await.expect("appended"), tx.append(&rows[..1]).await.expect("appended")];
        assert_eq!(firsts, [Position(1), Position(6)]);
        tx.commit_then(|_| ()).await.expect("committed");
        let read = store.read_log(Position(0), 10, usize::MAX).await.expect("read");
        let read: Vec<(i64, u8, usize)> = read.iter().map(|row| (row.position.0, row.batch[0], row.batch.len())).collect();
        assert_eq!(
            read,
            [1, 2, 3, 4, 5, 1].into_iter().zip(1..).map(|(number, position)| (position, number, 300 << 10)).collect::<Vec<_>>()
        );
        store.close().await;
    }

    #[tokio::test]
    async fn an_entry_that_fits_a_page_stays_in_it() {
        let Some(storage) = test_databases::postgres() else { return };
        let store = PostgresStore::open(&storage).await.expect("opened");
        let mut connection = PgConnection::connect(storage.url.expose()).await.expect("connected");
        for (bytes, goes_out_of_line) in [(IN_LINE_BYTES_MAX, false), (IN_LINE_BYTES_MAX + 200, true)] {
            let mut tx = store.begin_append().await.expect("begun");
            tx.append(&[row(1, bytes)]).await.expect("appended");
            tx.commit_then(|_| ()).await.expect("committed");
            let out_of_line = "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE relname = 'log'";
            let out_of_line: i64 = sqlx::query_scalar(out_of_line).fetch_one(&mut connection).await.expect("read");
            assert_eq!(out_of_line > 0, goes_out_of_line, "{bytes} bytes");
        }
        store.close().await;
    }
}
