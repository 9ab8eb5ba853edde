//! A consistent copy of the database, made while a gateway writes to it.
//!
//! `VACUUM INTO` reads one snapshot: in WAL mode that neither waits for the writer nor holds it up. What it costs is that the
//! WAL cannot begin anew until the copy is made, and so grows by what is written meanwhile.

use super::DATABASE_FILE;
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use std::{
    fs::File,
    io::{Error, ErrorKind},
    path::{Path, PathBuf},
    time::Duration,
};

/// How far a copy's positions are set ahead.
///
/// A copy is a fork: the gateway goes on giving out positions, and one that is started on the copy must not give out the same
/// for other batches, or a follower with a token of the first would silently miss some of the second. 2^40 positions take
/// weeks at a million batches a second, and fit 2^23 times, for copies of copies.
const POSITIONS_AHEAD: i64 = 1 << 40;

/// A copy that was made and looked through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// How many devices it has.
    pub devices: u64,
    /// How large its file is.
    pub bytes: u64,
}

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The copy can't be made durable.
    #[error("cannot write {path}")]
    File {
        /// The copy.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The database can't be read, or the copy not written.
    #[error("the database could not be copied")]
    Database(#[from] sqlx::Error),
    /// What was copied does not hold together.
    #[error("the copy is damaged, and so may be the database: {0}")]
    Damaged(String),
}

/// The database file in a data directory.
pub fn database_file(data_dir: &Path) -> PathBuf {
    data_dir.join(DATABASE_FILE)
}

/// How large a copy will be, about: the pages that are in use.
pub async fn bytes_estimate(database: &Path) -> Result<u64, CopyError> {
    let mut source = SqliteConnection::connect_with(&reading(database)).await?;
    let pages = "SELECT (page_count - freelist_count) * page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size";
    let bytes: i64 = sqlx::query_scalar(pages).fetch_one(&mut source).await?;
    source.close().await?;
    Ok(u64::try_from(bytes).unwrap_or(0))
}

/// Copies the database to the file `copy`, which must not be there: all that is committed when it begins. Durable when it
/// returns, and checked.
pub async fn copy(database: &Path, copy: &Path) -> Result<Copied, CopyError> {
    let in_file = |source| CopyError::File { path: copy.display().to_string(), source };
    let path = copy.to_str().ok_or_else(|| in_file(Error::new(ErrorKind::InvalidInput, "its name is not UTF-8")))?;
    let mut source = SqliteConnection::connect_with(&reading(database)).await?;
    sqlx::query("VACUUM INTO ?").bind(path).execute(&mut source).await?;
    source.close().await?;

    let mut copied = SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(copy)).await?;
    set_ahead(&mut copied).await?;
    let found: Vec<String> = sqlx::query_scalar("PRAGMA quick_check(10)").fetch_all(&mut copied).await?;
    if found != ["ok"] {
        return Err(CopyError::Damaged(found.join("; ")));
    }
    let devices: i64 = sqlx::query_scalar("SELECT count(*) FROM devices").fetch_one(&mut copied).await?;
    copied.close().await?;

    let file = File::open(copy).map_err(in_file)?;
    file.sync_all().map_err(in_file)?;
    let bytes = file.metadata().map_err(in_file)?.len();
    Ok(Copied { devices: u64::try_from(devices).unwrap_or(0), bytes })
}

/// See [`POSITIONS_AHEAD`].
async fn set_ahead(copied: &mut SqliteConnection) -> Result<(), CopyError> {
    // AUTOINCREMENT's own table, in which a table has no row before its first.
    let ahead = "UPDATE sqlite_sequence SET seq = seq + ? WHERE name = 'log'";
    if sqlx::query(ahead).bind(POSITIONS_AHEAD).execute(&mut *copied).await?.rows_affected() == 0 {
        let first = "INSERT INTO sqlite_sequence (name, seq) VALUES ('log', ?)";
        sqlx::query(first).bind(POSITIONS_AHEAD).execute(copied).await?;
    }
    Ok(())
}

fn reading(database: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new().filename(database).read_only(true).busy_timeout(Duration::from_secs(5))
}
