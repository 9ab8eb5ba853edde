//! What only a database that several gateways share has: they come in between one another, and it may be far away.

use super::*;
use crate::support::{
    eventually,
    postgres::{self, PostgresServer},
    proxy::{Proxy, Way},
    soon,
};
use tidegate::{
    config::DatabaseUrl,
    store::{Extent, LatestRow, StoreError},
};

/// The store of another gateway on the same database.
async fn another(fixture: &Fixture) -> Store {
    Store::open(&fixture.settings).await.expect("opened")
}

/// Scenario: a device is deleted while another gateway writes chunks and latest readings of it. Guarantee: they are not
/// left behind, whichever comes first.
// psql is waited for where the deletion runs: it needs a thread of its own.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_while_its_device_is_deleted_goes_with_it() {
    if !postgres::is_there() {
        return;
    }
    let fixture = Fixture::on(Database::Postgres).await;
    let (store, other) = (&fixture.store, another(&fixture).await);
    let sensor = fixture.sensor("t").await;
    assert!(store.lead_upkeep().await.expect("asked"));
    assert!(!other.lead_upkeep().await.expect("asked"), "one gateway merges");

    let mut merging = store.begin().await.expect("begun");
    merging.replace_chunks(&[], &[chunks::chunk(sensor.key, 0..10)]).await.expect("written");
    let device = fixture.device;
    let deleting = tokio::spawn(async move {
        let mut tx = other.begin().await.expect("begun");
        tx.lock_device(device).await.expect("read").expect("there");
        tx.delete_device(device).await.expect("deleted");
        tx.commit().await.expect("committed");
        other.purge_deleted().await.expect("purged");
        other
    });
    let (_, database) = fixture.settings.url.expose().rsplit_once('/').expect("a database");
    eventually("the deletion waits, or is done", || async {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        let waits = PostgresServer::shared().psql(database, waiting).expect("read").trim() != "0";
        (waits || deleting.is_finished()).then_some(())
    })
    .await;
    merging.commit().await.expect("committed");
    let other = soon("the deletion", deleting).await.expect("no panic");
    assert_eq!(chunks::firsts(store, sensor.key).await, [0; 0]);

    let latest = LatestRow { sensor_key: sensor.key, device, time: at(0), batch: "x".into(), position: Position(1) };
    store.save_latest(&[latest], None).await.expect("saved");
    assert_eq!(store.latest().await.expect("read").1, []);
    other.close().await;
    store.close().await;
}

/// Scenario: the server, or the network before it, hangs. Guarantee: nothing waits for it for ever, neither reads nor the steps of
/// the work in the background; and when it is back, all goes on, on new connections.
#[tokio::test]
async fn whatever_is_asked_of_a_server_that_hangs_ends_with_an_error() {
    if !postgres::is_there() {
        return;
    }
    let url = PostgresServer::shared().database();
    let (host, rest) = url.rsplit_once(':').expect("a port");
    let (port, database) = rest.split_once('/').expect("a database");
    let proxy = Proxy::start(port.parse().expect("a port")).await;
    let url = DatabaseUrl::new(format!("{host}:{}/{database}", proxy.port));
    let store = Store::open(&Storage { url, readers: 2, ..tidegate::config::Config::default().storage }).await.expect("opened");
    let device = register(&store, "pump-1").await;
    let mut tx = store.begin().await.expect("begun");
    tx.delete_device(device).await.expect("deleted");
    tx.commit().await.expect("committed");

    proxy.set(Way::Stalled);
    fn failed<T>(answer: Result<T, StoreError>) -> Option<StoreError> {
        answer.err()
    }
    let extent = Extent { sensor_key: 1, first_time: 0, last_time: 1 };
    let errors = soon("all end", async {
        let reading = async {
            tokio::join!(
                async { failed(store.read_log_unbroken(Position(0), 1, 1).await) },
                async { failed(store.read_unmerged(device, at(0), None).next_page(1).await) },
                async { failed(store.chunks_around(&[extent]).await) },
                async { failed(store.latest().await) },
                async { failed(store.ledger(device).await) },
                async { failed(store.used_bytes().await) },
            )
        };
        let working = async {
            tokio::join!(
                async { failed(store.lead_upkeep().await) },
                async { failed(store.save_latest(&[], Some(Position(1))).await) },
                async { failed(store.purge_deleted().await) },
                async { failed(store.changes().await) },
            )
        };
        let (a, b) = tokio::join!(reading, working);
        [a.0, a.1, a.2, a.3, a.4, a.5, b.0, b.1, b.2, b.3]
    })
    .await;
    for (number, error) in errors.iter().enumerate() {
        assert!(error.is_some(), "the {number}th was answered");
    }
    assert!(matches!(errors[0], Some(StoreError::NoAnswer { .. })), "{errors:?}");

    proxy.set(Way::Open);
    eventually("it is read again", || async { store.latest().await.ok() }).await;
    eventually("it is written again", || async { store.purge_deleted().await.ok() }).await;
    store.close().await;
}
