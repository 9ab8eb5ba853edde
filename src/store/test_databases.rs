//! The databases that the crate's own tests run on.

#[path = "../../tests/it/support/postgres.rs"]
#[allow(dead_code, reason = "shared with the tests of the whole gateway, which use more of it")]
mod postgres;

use crate::config::{Config, DatabaseUrl, Storage};
use std::path::Path;

/// The settings of the embedded database in a directory.
pub fn sqlite(directory: &Path) -> Storage {
    Storage { data_dir: directory.to_owned(), ..Config::default().storage }
}

/// The settings of an empty PostgreSQL database; `None` where there is no PostgreSQL.
pub fn postgres() -> Option<Storage> {
    let url = postgres::is_there().then(|| postgres::PostgresServer::shared().database())?;
    Some(Storage { url: DatabaseUrl::new(url), ..Config::default().storage })
}
