//! Rows of PostgreSQL.

use sqlx::postgres::PgRow;

super::super::rows::row_readers!(PgRow, sqlx::Postgres);
