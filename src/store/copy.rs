//! The embedded database, copied to PostgreSQL while no gateway runs on either.
//!
//! Table by table in the order of their keys, some rows at a time. How far a copy has come is what the target's tables hold:
//! one that was cut off goes on behind the last key. In the end both are read once more, side by side. Keys, sequences and
//! positions stay as they are, so that to devices and followers it is the same database in another place.
//!
//! Which tables and columns there are is asked of the target. A table that a later migration adds is copied as well.

use super::{StoreError, postgres, rows::text, sqlite::SqliteStore};
use crate::config::Storage;
use futures_util::{Stream, TryStreamExt};
use sqlx::{
    AssertSqlSafe, Connection, PgConnection, Row, SqlitePool,
    postgres::{PgArguments, PgRow},
    query::Query,
    sqlite::{SqliteArguments, SqliteRow},
};

/// What one statement inserts at the most.
const ROWS_PER_STATEMENT: usize = 2_000;
const BYTES_PER_STATEMENT: usize = 8 << 20;
/// The row of `progress` by which a target is known as one that is not whole yet.
const UNFINISHED: &str = "copying";

/// What was copied and compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// How many tables.
    pub tables: u64,
    /// How many rows they have.
    pub rows: u64,
    /// How many of them were there already, from a copy that was cut off.
    pub rows_before: u64,
}

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// One of the databases can't be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// One of the databases failed.
    #[error("the databases could not be read and written")]
    Database(#[from] sqlx::Error),
    /// The target is somebody's.
    #[error("the database to copy to is in use already: name an empty one")]
    NotEmpty,
    /// The copy is not what it should be.
    #[error("table {table} differs behind its row {row}: did somebody write to one of the databases?")]
    Differs {
        /// The table.
        table: String,
        /// So many rows are alike.
        row: u64,
    },
    /// The target has a column that this program does not know how to copy.
    #[error("column {column} of table {table} has a type that can't be copied")]
    Column {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
}

/// Copies the database in `source.data_dir` to the one that `target.url` names, and compares the two. `told` hears of each table
/// and of its rows that are done.
pub async fn copy(source: &Storage, target: &Storage, mut told: impl FnMut(&str, u64)) -> Result<Copied, CopyError> {
    // Opening it keeps every gateway away, and both are brought to one form.
    let source = SqliteStore::open(source).await?;
    postgres::PostgresStore::migrate(target).await?;
    let mut target = PgConnection::connect_with(&postgres::url_options(target)?).await?;
    begin(&mut target).await?;
    let tables = tables(source.readers(), &mut target).await?;
    let mut copied = Copied { tables: tables.len() as u64, rows: 0, rows_before: 0 };
    for table in &tables {
        let new = table.copy(source.readers(), &mut target, |rows| told(&table.name, rows)).await?;
        let all = table.compare(source.readers(), &mut target).await?;
        copied.rows += all;
        copied.rows_before += all - new;
    }
    finish(source.readers(), &mut target, &tables).await?;
    target.close().await?;
    source.close().await;
    Ok(copied)
}

/// Whether a database is a copy that was not finished; no gateway may begin on it.
pub(super) async fn is_unfinished(database: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT EXISTS (SELECT FROM progress WHERE name = $1)").bind(UNFINISHED).fetch_one(database).await
}

/// Takes an empty database, or one that an earlier copy has begun.
async fn begin(target: &mut PgConnection) -> Result<(), CopyError> {
    if is_unfinished(target).await? {
        return Ok(());
    }
    // A gateway that asks for credentials makes an operator when it first begins.
    let empty = "SELECT NOT EXISTS (SELECT FROM devices) AND NOT EXISTS (SELECT FROM operators) \
                 AND NOT EXISTS (SELECT FROM credentials) AND (SELECT position = 0 FROM log_head)";
    if !sqlx::query_scalar::<_, bool>(empty).fetch_one(&mut *target).await? {
        return Err(CopyError::NotEmpty);
    }
    sqlx::query("INSERT INTO progress (name, position) VALUES ($1, 0)").bind(UNFINISHED).execute(target).await?;
    Ok(())
}

/// What is no table of rows: how far things have come. With it the copy is whole.
async fn finish(source: &SqlitePool, target: &mut PgConnection, tables: &[Table]) -> Result<(), CopyError> {
    let progress: Vec<(String, i64)> = sqlx::query_as("SELECT name, position FROM progress").fetch_all(source).await?;
    let mut tx = target.begin().await?;
    for (name, position) in progress {
        let upsert = "INSERT INTO progress (name, position) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET position = excluded.position";
        sqlx::query(upsert).bind(name).bind(position).execute(&mut *tx).await?;
    }
    sqlx::query("UPDATE log_head SET position = $1").bind(last_key_given(source, "log", "position").await?).execute(&mut *tx).await?;
    for table in tables {
        let Some(identity) = &table.identity else { continue };
        let last = last_key_given(source, &table.name, identity).await?;
        if last > 0 {
            let set = "SELECT setval(pg_get_serial_sequence($1, $2), $3)";
            sqlx::query(set).bind(&table.name).bind(identity).bind(last).execute(&mut *tx).await?;
        }
    }
    sqlx::query("DELETE FROM progress WHERE name = $1").bind(UNFINISHED).execute(&mut *tx).await?;
    Ok(tx.commit().await?)
}

/// The highest key that a table ever gave out, also to a row that is deleted.
async fn last_key_given(source: &SqlitePool, table: &str, column: &str) -> Result<i64, sqlx::Error> {
    let highest = format!(
        "SELECT max(coalesce((SELECT max(\"{column}\") FROM \"{table}\"), 0), \
             coalesce((SELECT seq FROM sqlite_sequence WHERE name = '{table}'), 0))"
    );
    sqlx::query_scalar(AssertSqlSafe(highest)).fetch_one(source).await
}

/// A table that both databases have.
struct Table {
    name: String,
    columns: Vec<Column>,
    /// The primary key, as places in `columns`.
    key: Vec<usize>,
    /// The column whose values the database gives out.
    identity: Option<String>,
}

struct Column {
    name: String,
    kind: Kind,
    /// The target's own type.
    data_type: String,
    /// What the source says for it.
    source: String,
}

/// How a column's values travel.
#[derive(Clone, Copy)]
enum Kind {
    Integer,
    Real,
    Text,
    Bytes,
}

/// One value.
#[derive(Debug, Clone, PartialEq)]
enum Cell {
    Integer(Option<i64>),
    Real(Option<u64>),
    Text(Option<String>),
    Bytes(Option<Vec<u8>>),
}

impl Cell {
    fn bytes(&self) -> usize {
        match self {
            Self::Text(Some(text)) => text.len(),
            Self::Bytes(Some(bytes)) => bytes.len(),
            _ => 8,
        }
    }
}

/// All but those that [`finish`] writes, and the migrations' own.
async fn tables(source: &SqlitePool, target: &mut PgConnection) -> Result<Vec<Table>, CopyError> {
    let names: Vec<String> = sqlx::query_scalar(
        "SELECT table_name::text FROM information_schema.tables \
         WHERE table_schema = current_schema() AND table_type = 'BASE TABLE' \
             AND table_name NOT IN ('_sqlx_migrations', 'log_head', 'progress') \
         ORDER BY table_name",
    )
    .fetch_all(&mut *target)
    .await?;
    let mut tables = Vec::with_capacity(names.len());
    for name in names {
        tables.push(Table::find(name, source, target).await?);
    }
    Ok(tables)
}

impl Table {
    async fn find(name: String, source: &SqlitePool, target: &mut PgConnection) -> Result<Self, CopyError> {
        let described: Vec<(String, String, bool)> = sqlx::query_as(
            "SELECT column_name::text, data_type::text, is_identity = 'YES' FROM information_schema.columns \
             WHERE table_schema = current_schema() AND table_name = $1 ORDER BY ordinal_position",
        )
        .bind(&name)
        .fetch_all(&mut *target)
        .await?;
        let keys: Vec<String> = sqlx::query_scalar(
            "SELECT attname::text FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey) \
             WHERE indrelid = $1::regclass AND indisprimary ORDER BY array_position(indkey::int2[], attnum)",
        )
        .bind(&name)
        .fetch_all(target)
        .await?;
        let known: Vec<String> = sqlx::query_scalar("SELECT name FROM pragma_table_info(?)").bind(&name).fetch_all(source).await?;
        let identity = described.iter().find(|(_, _, identity)| *identity).map(|(column, _, _)| column.clone());
        let columns = described.into_iter().map(|(column, data_type, _)| Column::new(&name, column, data_type, &known));
        let columns = columns.collect::<Result<Vec<_>, _>>()?;
        let key = keys.iter().filter_map(|key| columns.iter().position(|column| column.name == *key)).collect();
        Ok(Self { name, columns, key, identity })
    }

    /// Copies what is behind the target's last row; returns how many rows that were.
    async fn copy(&self, source: &SqlitePool, target: &mut PgConnection, mut told: impl FnMut(u64)) -> Result<u64, CopyError> {
        let behind = self.last_key(target).await?;
        let mut rows = self.source_rows(source, behind);
        let (mut batch, mut bytes, mut copied) = (Vec::new(), 0, 0);
        loop {
            let row = rows.try_next().await?;
            let ended = row.is_none();
            if let Some(row) = row {
                bytes += row.iter().map(Cell::bytes).sum::<usize>();
                batch.push(row);
            }
            if batch.len() >= ROWS_PER_STATEMENT || bytes >= BYTES_PER_STATEMENT || (ended && !batch.is_empty()) {
                copied += batch.len() as u64;
                self.insert(target, std::mem::take(&mut batch)).await?;
                bytes = 0;
                told(copied);
            }
            if ended {
                return Ok(copied);
            }
        }
    }

    /// Reads both, and returns how many rows each has.
    async fn compare(&self, source: &SqlitePool, target: &mut PgConnection) -> Result<u64, CopyError> {
        let mut from = self.source_rows(source, None);
        let select = format!("SELECT {} FROM \"{}\" ORDER BY {}", self.target_columns(), self.name, self.key_order(""));
        let mut to = sqlx::query(AssertSqlSafe(select)).fetch(target);
        let mut alike = 0;
        loop {
            let (expected, found) = (from.try_next().await?, to.try_next().await?);
            let found = found.map(|row| self.target_row(&row)).transpose()?;
            match (expected, found) {
                (None, None) => return Ok(alike),
                (expected, found) if expected == found => alike += 1,
                _ => return Err(CopyError::Differs { table: self.name.clone(), row: alike }),
            }
        }
    }

    async fn last_key(&self, target: &mut PgConnection) -> Result<Option<Vec<Cell>>, CopyError> {
        let select = format!("SELECT {} FROM \"{}\" ORDER BY {} LIMIT 1", self.target_columns(), self.name, self.key_order(" DESC"));
        let row = sqlx::query(AssertSqlSafe(select)).fetch_optional(target).await?;
        let row = row.map(|row| self.target_row(&row)).transpose()?;
        Ok(row.map(|row| self.key.iter().map(|&place| row[place].clone()).collect()))
    }

    /// The source's rows behind a key, in the order of keys.
    fn source_rows<'a>(
        &'a self,
        source: &'a SqlitePool,
        behind: Option<Vec<Cell>>,
    ) -> impl Stream<Item = Result<Vec<Cell>, sqlx::Error>> + Unpin + 'a {
        let columns = self.columns.iter().map(|column| column.source.as_str()).collect::<Vec<_>>().join(", ");
        let key = self.key.iter().map(|&place| format!("\"{}\"", self.columns[place].name)).collect::<Vec<_>>().join(", ");
        let places = vec!["?"; self.key.len()].join(", ");
        let behind_it = if behind.is_some() { format!("WHERE ({key}) > ({places})") } else { String::new() };
        let select = format!("SELECT {columns} FROM \"{}\" {behind_it} ORDER BY {key}", self.name);
        let query = behind.into_iter().flatten().fold(sqlx::query(AssertSqlSafe(select)), bind_to_source);
        query.fetch(source).and_then(|row| std::future::ready(self.source_row(&row)))
    }

    /// A row as the target will have it: PostgreSQL knows no NUL.
    fn source_row(&self, row: &SqliteRow) -> Result<Vec<Cell>, sqlx::Error> {
        let cell = |(place, column): (usize, &Column)| {
            Ok(match column.kind {
                Kind::Integer => Cell::Integer(row.try_get(place)?),
                Kind::Real => Cell::Real(row.try_get::<Option<f64>, _>(place)?.map(f64::to_bits)),
                Kind::Text => Cell::Text(row.try_get::<Option<String>, _>(place)?.map(|cell| text(&cell).into_owned())),
                Kind::Bytes => Cell::Bytes(row.try_get(place)?),
            })
        };
        self.columns.iter().enumerate().map(cell).collect()
    }

    fn target_row(&self, row: &PgRow) -> Result<Vec<Cell>, sqlx::Error> {
        let cell = |(place, column): (usize, &Column)| {
            Ok(match column.kind {
                Kind::Integer => Cell::Integer(row.try_get(place)?),
                Kind::Real => Cell::Real(row.try_get::<Option<f64>, _>(place)?.map(f64::to_bits)),
                Kind::Text => Cell::Text(row.try_get(place)?),
                Kind::Bytes => Cell::Bytes(row.try_get(place)?),
            })
        };
        self.columns.iter().enumerate().map(cell).collect()
    }

    fn target_columns(&self) -> String {
        let column = |column: &Column| match column.data_type.as_str() {
            "boolean" => format!("\"{}\"::int::bigint", column.name),
            "integer" | "smallint" => format!("\"{}\"::bigint", column.name),
            _ => format!("\"{}\"", column.name),
        };
        self.columns.iter().map(column).collect::<Vec<_>>().join(", ")
    }

    /// As SQLite orders them: texts by their bytes.
    fn key_order(&self, direction: &str) -> String {
        let part = |&place: &usize| {
            let Column { name, kind, .. } = &self.columns[place];
            let collation = if matches!(kind, Kind::Text) { " COLLATE \"C\"" } else { "" };
            format!("\"{name}\"{collation}{direction}")
        };
        self.key.iter().map(part).collect::<Vec<_>>().join(", ")
    }

    async fn insert(&self, target: &mut PgConnection, rows: Vec<Vec<Cell>>) -> Result<(), sqlx::Error> {
        let names = self.columns.iter().map(|column| format!("\"{}\"", column.name)).collect::<Vec<_>>().join(", ");
        let arrays = self.columns.iter().enumerate().map(|(place, column)| format!("${}::{}[]", place + 1, column.kind.array()));
        let arrays = arrays.collect::<Vec<_>>().join(", ");
        let values = self.columns.iter().map(|Column { name, data_type, .. }| match data_type.as_str() {
            "boolean" => format!("\"{name}\"::int::boolean"),
            data_type => format!("\"{name}\"::{data_type}"),
        });
        let values = values.collect::<Vec<_>>().join(", ");
        let insert = format!(
            "INSERT INTO \"{}\" ({names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM UNNEST({arrays}) AS row ({names})",
            self.name
        );
        let mut query = sqlx::query(AssertSqlSafe(insert));
        let mut columns: Vec<Vec<Cell>> = self.columns.iter().map(|_| Vec::with_capacity(rows.len())).collect();
        for (place, cell) in rows.into_iter().flat_map(|row| row.into_iter().enumerate()) {
            columns[place].push(cell);
        }
        for (column, cells) in self.columns.iter().zip(columns) {
            query = bind_column(query, column.kind, cells);
        }
        query.execute(target).await?;
        Ok(())
    }
}

impl Column {
    fn new(table: &str, name: String, data_type: String, known: &[String]) -> Result<Self, CopyError> {
        let kind = match data_type.as_str() {
            "bigint" | "integer" | "smallint" | "boolean" => Kind::Integer,
            "double precision" => Kind::Real,
            "text" => Kind::Text,
            "bytea" => Kind::Bytes,
            _ => return Err(CopyError::Column { table: table.to_owned(), column: name }),
        };
        let source = match (table, known.contains(&name)) {
            (_, true) => format!("\"{name}\""),
            // One gateway knows without it: all of its latest readings are of the position up to which it has saved them.
            ("latest_readings", _) if name == "position" => "(SELECT position FROM progress WHERE name = 'latest_readings')".to_owned(),
            _ => return Err(CopyError::Column { table: table.to_owned(), column: name }),
        };
        Ok(Self { name, kind, data_type, source })
    }
}

impl Kind {
    fn array(self) -> &'static str {
        match self {
            Self::Integer => "bigint",
            Self::Real => "double precision",
            Self::Text => "text",
            Self::Bytes => "bytea",
        }
    }
}

type SqliteQuery<'q> = Query<'q, sqlx::Sqlite, SqliteArguments>;
type PgQuery<'q> = Query<'q, sqlx::Postgres, PgArguments>;

fn bind_to_source(query: SqliteQuery<'_>, cell: Cell) -> SqliteQuery<'_> {
    match cell {
        Cell::Integer(value) => query.bind(value),
        Cell::Real(value) => query.bind(value.map(f64::from_bits)),
        Cell::Text(value) => query.bind(value),
        Cell::Bytes(value) => query.bind(value),
    }
}

fn bind_column(query: PgQuery<'_>, kind: Kind, cells: Vec<Cell>) -> PgQuery<'_> {
    macro_rules! column {
        ($cell:ident) => {
            cells.into_iter().map(|cell| if let Cell::$cell(value) = cell { value } else { None })
        };
    }
    match kind {
        Kind::Integer => query.bind(column!(Integer).collect::<Vec<_>>()),
        Kind::Real => query.bind(column!(Real).map(|bits| bits.map(f64::from_bits)).collect::<Vec<_>>()),
        Kind::Text => query.bind(column!(Text).collect::<Vec<_>>()),
        Kind::Bytes => query.bind(column!(Bytes).collect::<Vec<_>>()),
    }
}
