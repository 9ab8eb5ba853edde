//! Connections to PostgreSQL that break and stall: the outcome of a commit is what the server says, and never a guess.

use crate::support::{
    channel, health_is,
    load::{Load, Witness, log},
    not_ready,
    postgres::{self, PostgresServer},
    process::GatewayProcess,
    proxy::{Proxy, Way},
};
use tempfile::TempDir;

/// A gateway that has but one way to its server.
struct Bridge {
    server: PostgresServer,
    proxy: Proxy,
    gateway: GatewayProcess,
    _directory: TempDir,
}

impl Bridge {
    async fn start() -> Self {
        let server = PostgresServer::private();
        let url = server.database();
        let (host, rest) = url.rsplit_once(':').expect("a port");
        let (port, database) = rest.split_once('/').expect("a database");
        let proxy = Proxy::start(port.parse().expect("a port")).await;
        let url = format!("{host}:{}/{database}", proxy.port);
        let directory = TempDir::new().expect("a temporary directory");
        let any = ([127, 0, 0, 1], 0).into();
        let gateway = GatewayProcess::start_on(directory.path(), any, any, &[&format!("--storage-url={url}")]).await;
        Self { server, proxy, gateway, _directory: directory }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_cut_is_stored_or_not_as_the_server_says() {
    if !postgres::is_there() {
        return;
    }
    let bridge = Bridge::start().await;
    let Bridge { server, proxy, gateway, .. } = &bridge;
    let witness = Witness::start(channel(gateway.grpc));
    let load = Load::start(&gateway.channel(), 5);
    for way in [Way::CutBeforeCommit, Way::CutInCommit, Way::CutAfterCommit].into_iter().cycle().take(12) {
        load.runs_on(20).await;
        proxy.set(way);
        proxy.was_cut().await;
        not_ready(gateway, "").await;
        let told = load.acknowledged();
        proxy.set(Way::Open);
        health_is(gateway, true).await;
        assert!(load.acknowledged() >= told);
    }
    load.ends_well().await;
    witness.saw(&log(&gateway.channel()).await).await;
    let counts = server.psql("test_0", "SELECT count(*) = count(DISTINCT (stream_key, sequence)) FROM log").expect("read");
    assert_eq!(counts.trim(), "t", "each once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_answer_is_not_waited_for_for_ever() {
    if !postgres::is_there() {
        return;
    }
    let bridge = Bridge::start().await;
    let Bridge { proxy, gateway, .. } = &bridge;
    let load = Load::start(&gateway.channel(), 5);
    load.runs_on(20).await;
    proxy.set(Way::Stalled);
    not_ready(gateway, "a commit has taken more than").await;
    health_is(gateway, false).await;
    let told = load.acknowledged();
    // In time it gives up, and asks again on connections that do not answer, either.
    not_ready(gateway, "the database does not answer").await;
    assert_eq!(load.acknowledged(), told, "nothing is acknowledged meanwhile");
    // The old connections are lost, as the network has forgotten them.
    proxy.set(Way::Closed);
    proxy.set(Way::Open);
    health_is(gateway, true).await;
    load.runs_on(20).await;
    load.ends_well().await;
}

/// Scenario: the server hangs while no device sends. Guarantee: the gateway says so all the same, and when it is over.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_gateway_finds_out_that_its_server_hangs() {
    if !postgres::is_there() {
        return;
    }
    let bridge = Bridge::start().await;
    let Bridge { proxy, gateway, .. } = &bridge;
    health_is(gateway, true).await;
    proxy.set(Way::Stalled);
    not_ready(gateway, "a probe has taken more than").await;
    health_is(gateway, false).await;
    proxy.set(Way::Closed);
    proxy.set(Way::Open);
    health_is(gateway, true).await;
}

/// Scenario: a device hands the same batches to two gateways at once. Guarantee: each is stored once.
#[tokio::test(flavor = "multi_thread")]
async fn two_gateways_that_are_fed_one_stream_at_once_store_each_batch_once() {
    if !postgres::is_there() {
        return;
    }
    let server = PostgresServer::shared();
    let (directories, url) = ([(); 2].map(|()| TempDir::new().expect("a temporary directory")), server.database());
    let any = ([127, 0, 0, 1], 0).into();
    let flags = [&*format!("--storage-url={url}")];
    let (a, b) = tokio::join!(
        GatewayProcess::start_on(directories[0].path(), any, any, &flags),
        GatewayProcess::start_on(directories[1].path(), any, any, &flags)
    );
    let witnesses = [&a, &b].map(|gateway| Witness::start(channel(gateway.grpc)));
    let mut load = Load::start(&a.channel(), 5);
    load.also_through(&b.channel());
    load.runs_on(400).await;
    load.ends_well().await;
    let log = log(&a.channel()).await;
    for witness in &witnesses {
        witness.saw(&log).await;
    }
}
