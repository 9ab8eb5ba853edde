//! PostgreSQL as the store: what the server's end, and the gateway's, leave behind.

use crate::support::{
    TestGateway,
    client::{TestDevice, nth_temperatures},
    eventually, http_get,
    postgres::{self, PostgresServer},
};
use tidegate::{config::DatabaseUrl, error::StatusFacts};

/// Scenario: the server is killed, and started again. Guarantee: nothing is acknowledged meanwhile, everybody is told, and the
/// gateway goes on by itself from what the server holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_stops_acknowledgements_and_the_gateway_recovers_by_itself() {
    if !postgres::is_there() {
        return;
    }
    let mut server = PostgresServer::private();
    let url = server.database();
    let gateway = TestGateway::start_with(|config| config.storage.url = DatabaseUrl::new(url)).await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload_nth(1..=5).await.expect("accepted");

    server.kill();
    let status = device.upload_nth(6..=8).await.expect_err("nothing can be written");
    assert_eq!(StatusFacts::of(&status).reason(), "STORE_UNAVAILABLE", "{status:?}");
    eventually("readiness says so", || async { http_get(gateway.http, "/readyz").await.filter(|(code, _)| *code == 503) }).await;

    server.start_again();
    eventually("it recovers", || async { http_get(gateway.http, "/readyz").await.filter(|(code, _)| *code == 200) }).await;
    device.upload_nth(1..=8).await.expect("accepted again");
    assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=8));
    let sums = "SELECT sum(batches), count(DISTINCT (stream_key, sequence)) = count(*), max(position) = count(*) FROM log";
    assert_eq!(server.psql("test_0", sums).expect("read").trim(), "8|t|t", "each once, and positions without a hole");
    assert!(gateway.stop().await);
}
