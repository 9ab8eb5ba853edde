//! Rows of SQLite.

use sqlx::sqlite::SqliteRow;

super::super::rows::row_readers!(SqliteRow, sqlx::Sqlite);
