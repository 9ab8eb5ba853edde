//! The databases that a gateway may run on, for tests of what must hold on each.

use super::{TestGateway, postgres::PostgresServer};
use sqlx::{ConnectOptions, Connection, PgConnection, SqliteConnection, sqlite::SqliteConnectOptions};
use std::path::Path;
use tidegate::config::{Config, DatabaseUrl, Storage};

/// What a test's gateways run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Database {
    Sqlite,
    Postgres,
}

impl Database {
    /// The settings of an empty database; a file is in the directory.
    pub fn storage(self, directory: &Path) -> Storage {
        let url = match self {
            Self::Sqlite => String::new(),
            Self::Postgres => PostgresServer::shared().database(),
        };
        Storage { url: DatabaseUrl::new(url), data_dir: directory.to_owned(), ..Config::default().storage }
    }

    /// A gateway with default settings, on an empty database.
    pub async fn gateway(self) -> TestGateway {
        self.gateway_with(|_| {}).await
    }

    /// A gateway with changed settings, on an empty database.
    pub async fn gateway_with(self, change: impl FnOnce(&mut Config)) -> TestGateway {
        TestGateway::start_with(|config| {
            config.storage = self.storage(&config.storage.data_dir);
            change(config);
        })
        .await
    }
}

/// A transaction that others' writes wait for; over when it is dropped.
pub enum WritesHeld {
    Sqlite { _connection: SqliteConnection },
    Postgres { _connection: PgConnection },
}

impl WritesHeld {
    pub async fn hold(storage: &Storage) -> Self {
        if storage.url.is_empty() {
            let file = SqliteConnectOptions::new().filename(storage.data_dir.join("tidegate.db"));
            let mut connection = file.connect().await.expect("the database is there");
            sqlx::query("BEGIN IMMEDIATE").execute(&mut connection).await.expect("nobody writes");
            return Self::Sqlite { _connection: connection };
        }
        let mut connection = PgConnection::connect(storage.url.expose()).await.expect("the server is there");
        sqlx::raw_sql("BEGIN; LOCK TABLE streams IN EXCLUSIVE MODE").execute(&mut connection).await.expect("nobody writes");
        Self::Postgres { _connection: connection }
    }
}

/// Makes a test on each database of every function that is named: functions that take the [`Database`].
macro_rules! on_each_database {
    ($($test:ident),+ $(,)?) => {
        mod on_sqlite {
            $(
                #[tokio::test]
                async fn $test() {
                    super::$test($crate::support::database::Database::Sqlite).await;
                }
            )+
        }

        mod on_postgres {
            $(
                #[tokio::test]
                async fn $test() {
                    if $crate::support::postgres::is_there() {
                        super::$test($crate::support::database::Database::Postgres).await;
                    }
                }
            )+
        }
    };
}

pub(crate) use on_each_database;
