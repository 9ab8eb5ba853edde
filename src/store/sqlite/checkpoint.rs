//! Moves the pages of the WAL to the database, beside the commits.
//!
//! Left to itself SQLite does this in the commit that finds the WAL long enough, and all batches of that commit wait until some
//! ten megabytes are copied and synced. Here it is done on a connection of its own: what there is while commits go on, and only
//! for the little that came meanwhile the writer is held back, so that the WAL begins anew at its start.

use super::{PAGE_BYTES, Shared, StoreError};
use sqlx::{Connection, SqliteConnection};
use std::sync::{
    Weak,
    atomic::{AtomicU64, Ordering},
};
use tokio::sync::mpsc;

/// After how many bytes, as [`WalGrowth`] counts them. A commit that syncs while pages are moved takes several times as long: it is
/// better done seldom, when there is much. Of small commits most are the same pages again and again, which are moved once.
const BYTES: u64 = if cfg!(test) { 1 << 20 } else { 128 << 20 };
/// What a transaction writes besides what it counts itself: the last pages of tables and indexes, and that of progress.
const BYTES_PER_TRANSACTION: u64 = 3 * PAGE_BYTES as u64;
/// After so many pages commits do it after all: whatever is wrong here, the WAL has an end.
pub const PAGES_IN_COMMIT: &str = "25000";
/// How often what there is is moved while commits go on, at the most; each time there is less.
const ROUNDS_BESIDE_COMMITS: usize = 4;
/// When a round has moved no more pages than these, the writer need not wait for long until the rest is.
const PAGES_LEFT: i64 = 256;

/// How much the WAL has grown, and who is told when it is much.
///
/// That is an estimate. SQLite knows the number of pages, but says it in a file that nobody else may open: to close it again would
/// end the locks of this process (<https://sqlite.org/howtocorrupt.html>, section 2.2).
pub struct WalGrowth {
    bytes: AtomicU64,
    wake: mpsc::Sender<()>,
}

impl WalGrowth {
    /// Nothing yet. What wakes is for [`run`].
    pub fn new() -> (Self, mpsc::Receiver<()>) {
        let (wake, woken) = mpsc::channel(1);
        (Self { bytes: AtomicU64::new(0), wake }, woken)
    }

    /// Counts a transaction that has written so many bytes of values.
    pub fn add_commit(&self, bytes: usize) {
        let added = bytes as u64 + BYTES_PER_TRANSACTION;
        if self.bytes.fetch_add(added, Ordering::Relaxed) + added >= BYTES {
            // Full: it is at work already, or about to be.
            let _ = self.wake.try_send(());
        }
    }
}

/// The connection that this is done on.
pub enum Checkpointer {
    /// At the next time on this one, or on a new one after a failure.
    Open(Option<SqliteConnection>),
    /// Never again.
    Closed,
}

impl Checkpointer {
    /// Ends the connection, after what is under way.
    pub async fn close(&mut self) -> Result<(), sqlx::Error> {
        match std::mem::replace(self, Self::Closed) {
            Self::Open(Some(connection)) => connection.close().await,
            _ => Ok(()),
        }
    }
}

/// Works when woken, as long as there is the store.
pub async fn run(shared: Weak<Shared>, mut woken: mpsc::Receiver<()>) {
    while woken.recv().await.is_some() {
        let Some(shared) = shared.upgrade() else { return };
        shared.wal.bytes.store(0, Ordering::Relaxed);
        if let Err(error) = checkpoint(&shared).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "store.checkpoint_failed: trying again when more is written");
        }
    }
}

async fn checkpoint(shared: &Shared) -> Result<(), StoreError> {
    let mut checkpointer = shared.checkpointer.lock().await;
    let Checkpointer::Open(connection) = &mut *checkpointer else { return Ok(()) };
    let mut at_work = match connection.take() {
        Some(connection) => connection,
        None => SqliteConnection::connect_with(&shared.options).await?,
    };
    let mut moved = 0;
    for _ in 0..ROUNDS_BESIDE_COMMITS {
        let before = std::mem::replace(&mut moved, move_pages(&mut at_work).await?);
        if moved - before <= PAGES_LEFT {
            break;
        }
    }
    let _held_back = shared.writer.lock().await;
    move_pages(&mut at_work).await?;
    *connection = Some(at_work);
    Ok(())
}

/// All that no reader needs where it is. Returns how many of the WAL's pages are moved since it began anew.
async fn move_pages(connection: &mut SqliteConnection) -> Result<i64, sqlx::Error> {
    let (_busy, _pages, moved): (i64, i64, i64) = sqlx::query_as("PRAGMA wal_checkpoint(PASSIVE)").fetch_one(connection).await?;
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::super::{DATABASE_FILE, PAGE_BYTES, SqliteStore};
    use crate::config::{Config, Storage};
    use std::time::Duration;

    /// Each probe is a page of the WAL, whose file keeps its length when the WAL begins anew: that it does not grow with a hundred
    /// probes shows that all before them was moved.
    #[tokio::test]
    async fn a_long_wal_is_moved_beside_the_commits() {
        let directory = tempfile::tempdir().expect("a directory");
        let settings = Storage { data_dir: directory.path().to_owned(), ..Config::default().storage };
        let store = SqliteStore::open(&settings).await.expect("opened");
        let wal = directory.path().join(format!("{DATABASE_FILE}-wal"));
        let bytes = || std::fs::metadata(&wal).expect("the WAL is there").len();
        let stops_growing = async {
            let mut before = bytes();
            loop {
                for _ in 0..100 {
                    store.probe_write().await.expect("written");
                }
                let now = bytes();
                if now < before + 50 * u64::from(PAGE_BYTES) {
                    return;
                }
                before = now;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), stops_growing).await.expect("it begins anew");
        store.close().await;
    }

    /// A commit of a large fleet writes a page for each few streams, however little is in them.
    #[tokio::test]
    async fn rows_far_apart_count_as_the_pages_that_they_are_in() {
        let directory = tempfile::tempdir().expect("a directory");
        let settings = Storage { data_dir: directory.path().to_owned(), ..Config::default().storage };
        let store = SqliteStore::open(&settings).await.expect("opened");
        let mut tx = store.begin().await.expect("begun");
        tx.count_pages([1, 2, 3].into_iter());
        assert_eq!(tx.bytes, PAGE_BYTES as usize);
        tx.count_pages((0..100).map(|nth| nth * 10_000));
        assert_eq!(tx.bytes, 101 * PAGE_BYTES as usize);
        tx.rollback().await.expect("nothing was written");
        store.close().await;
    }
}
