//! What earlier versions wrote is read by this one. `tests/fixtures` has databases of the tables' versions 1, 2, 3 and 5, as SQL; of PostgreSQL
//! of 3 and 5.
//!
//! A fixture also keeps its migration from being edited: the database holds a hash of it.

use crate::support::{
    TestGateway,
    client::{T0, TestDevice, configs, nth_batch, nth_temperatures},
    postgres::{self, PostgresServer},
};
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use tempfile::TempDir;
use tidegate::{
    config::DatabaseUrl,
    model::StreamId,
    pb::{self, ConfigState},
};

/// The database of a fixture in a data directory, as a gateway of then left it.
pub async fn restore(fixture: &str) -> TempDir {
    let directory = TempDir::new().expect("a temporary directory");
    let url = format!("sqlite://{}?mode=rwc", directory.path().join("tidegate.db").display());
    let mut database = SqliteConnection::connect(&url).await.expect("made");
    sqlx::raw_sql(AssertSqlSafe(fixture.to_owned())).execute(&mut database).await.expect("the fixture is SQL");
    database.close().await.expect("closed");
    directory
}

/// The device of every fixture: batches 1, 2 and 4 stored, 3 rejected, configuration 1 applied.
async fn check(gateway: TestGateway) {
    let channel = gateway.channel();
    let stream_id = StreamId::parse(&std::array::from_fn::<u8, 16, _>(|index| index as u8 + 1)).expect("a UUID");
    let device = TestDevice { stream_id, ..TestDevice::new(&channel, "pump-1") };
    assert_eq!(device.position().await, 4);
    assert_eq!(device.stored_temperatures().await, nth_temperatures([1, 2, 4]));
    let ledger = device.ledger().await;
    assert_eq!(ledger.stored, Some(pb::Tally { batches: 3, readings: 30 }));
    assert_eq!(ledger.rejected[0].reason(), pb::RejectReason::KindChanged);
    let config = configs(&channel).get_config(pb::GetConfigRequest { device: "pump-1".into() }).await.expect("set").into_inner();
    let config = config.config.expect("set");
    assert_eq!((config.state(), config.applied_revision), (ConfigState::Applied, 1));
    let mut follower = crate::support::client::live(&channel).follow(pb::FollowRequest::default()).await.expect("begun").into_inner();
    let latest = follower.message().await.expect("no error").expect("a message").message;
    let Some(pb::follow_response::Message::Latest(latest)) = latest else { panic!("not the latest values: {latest:?}") };
    assert_eq!(latest.batch.expect("set").frames[0].base_time_us, T0 + 49_000_000);

    // And it goes on from there.
    let response = device.upload([(4, nth_batch(4)), (5, nth_batch(5))]).await.expect("accepted");
    assert_eq!((response.last_durable_sequence, response.duplicate.map(|tally| tally.batches)), (5, Some(1)));
    assert!(gateway.stop().await);
}

async fn check_sqlite(fixture: &str) {
    check(TestGateway::start_on(restore(fixture).await).await).await;
}

#[tokio::test]
async fn a_database_of_version_1_is_read_and_written() {
    check_sqlite(include_str!("../fixtures/sqlite_0001.sql")).await;
}

/// Some of it is merged.
#[tokio::test]
async fn a_database_of_version_2_is_read_and_written() {
    check_sqlite(include_str!("../fixtures/sqlite_0002.sql")).await;
}

/// Its log has an entry of several batches.
#[tokio::test]
async fn a_database_of_version_3_is_read_and_written() {
    check_sqlite(include_str!("../fixtures/sqlite_0003.sql")).await;
}

/// Something was added to the times of what is merged.
#[tokio::test]
async fn a_database_of_version_5_is_read_and_written() {
    check_sqlite(include_str!("../fixtures/sqlite_0005.sql")).await;
}

async fn check_postgres(fixture: &str) {
    if !postgres::is_there() {
        return;
    }
    let url = PostgresServer::shared().database();
    let mut database = PgConnection::connect(&url).await.expect("it is there");
    sqlx::raw_sql(AssertSqlSafe(fixture.to_owned())).execute(&mut database).await.expect("the fixture is SQL");
    database.close().await.expect("closed");
    check(TestGateway::start_with(|config| config.storage.url = DatabaseUrl::new(url)).await).await;
}

#[tokio::test]
async fn a_postgres_database_of_version_3_is_read_and_written() {
    check_postgres(include_str!("../fixtures/postgres_0003.sql")).await;
}

#[tokio::test]
async fn a_postgres_database_of_version_5_is_read_and_written() {
    check_postgres(include_str!("../fixtures/postgres_0005.sql")).await;
}
