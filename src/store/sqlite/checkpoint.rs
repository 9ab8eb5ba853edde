//! Moves the pages of the WAL to the database, beside the commits.
//!
//! Left to itself SQLite does this in the commit that finds the WAL long enough, and all batches of that commit wait until some
//! ten megabytes are copied and synced. Here it is done on a connection of its own: what there is while commits go on, and only
//! for the little that came meanwhile the writer is held back, so that the WAL begins anew at its start.

use super::{DATABASE_FILE, Shared, StoreError};
use sqlx::{Connection, SqliteConnection};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Weak,
};
use tokio::sync::mpsc;

/// How long the WAL grows, in pages.
const PAGES: u32 = if cfg!(test) { 20 } else { 1_000 };
/// After so many pages commits do it after all: whatever is wrong here, the WAL has an end.
pub const PAGES_IN_COMMIT: &str = "25000";
/// How often what there is is moved while commits go on; each time there is less.
const ROUNDS_BESIDE_COMMITS: usize = 2;
/// Where the index of the WAL says how many pages the WAL has (<https://sqlite.org/walformat.html>, section 2.1).
const PAGES_OFFSET: u64 = 16;

/// How the writer tells that the WAL is long.
pub struct WalWatch {
    index: PathBuf,
    wake: mpsc::Sender<()>,
}

impl WalWatch {
    /// Watches the WAL of the database in a directory. What wakes is for [`run`].
    pub fn new(directory: &Path) -> (Self, mpsc::Receiver<()>) {
        let (wake, woken) = mpsc::channel(1);
        (Self { index: directory.join(format!("{DATABASE_FILE}-shm")), wake }, woken)
    }

    /// Looks how long the WAL is after a commit.
    pub fn note_commit(&self) {
        if self.pages().is_ok_and(|pages| pages >= PAGES) {
            // Full: it is at work already, or about to be.
            let _ = self.wake.try_send(());
        }
    }

    fn pages(&self) -> std::io::Result<u32> {
        let mut pages = [0; 4];
        File::open(&self.index)?.read_exact_at(&mut pages, PAGES_OFFSET)?;
        Ok(u32::from_ne_bytes(pages))
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
    for _ in 0..ROUNDS_BESIDE_COMMITS {
        move_pages(&mut at_work).await?;
    }
    let _held_back = shared.writer.lock().await;
    move_pages(&mut at_work).await?;
    *connection = Some(at_work);
    Ok(())
}

/// All that no reader needs where it is.
async fn move_pages(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").fetch_all(connection).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::super::SqliteStore;
    use crate::config::{Config, Storage};
    use std::time::Duration;

    /// Each probe is a page of the WAL. That it begins anew shows that all of it was moved.
    #[tokio::test]
    async fn a_long_wal_is_moved_beside_the_commits() {
        let directory = tempfile::tempdir().expect("a directory");
        let settings = Storage { data_dir: directory.path().to_owned(), ..Config::default().storage };
        let store = SqliteStore::open(&settings).await.expect("opened");
        let begins_anew = async {
            let mut before = 0;
            loop {
                store.probe_write().await.expect("written");
                let pages = store.shared.wal.pages().expect("the index is there");
                if pages < before {
                    return before;
                }
                before = pages;
            }
        };
        let longest = tokio::time::timeout(Duration::from_secs(30), begins_anew).await.expect("it begins anew");
        assert!(longest >= super::PAGES, "no sooner than it is long: {longest}");
        store.close().await;
    }
}
