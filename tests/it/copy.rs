//! The embedded database becomes one of PostgreSQL: `tidegate copy`.

use crate::formats::restore;
use crate::support::{
    TestGateway,
    client::{TestDevice, nth_temperatures},
    config,
    postgres::{self, PostgresServer},
    process::GatewayProcess,
    script::Script,
};
use std::{path::Path, process::Command};
use tempfile::TempDir;
use tidegate::{
    app::Gateway,
    config::{AuthMode, Config, DatabaseUrl},
};

fn copy(from: &Path, to: &str) -> Script {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.args(["copy", "--from", &format!("sqlite:{}", from.display()), "--to", to, "--quiet"]);
    Script::start(command)
}

/// Scenario: a gateway with SQLite, whose log is partly merged, is stopped and copied. Guarantee: on PostgreSQL its devices go on
/// where they were, all readings are there once, and positions and keys go on behind those that were given out.
#[tokio::test(flavor = "multi_thread")]
async fn devices_go_on_where_they_were() {
    if !postgres::is_there() {
        return;
    }
    let directory = TempDir::new().expect("a temporary directory");
    let gateway = GatewayProcess::start(directory.path()).await;
    let devices = ["pump-1", "pump-2"].map(|name| TestDevice::new(&gateway.channel(), name));
    for device in &devices {
        device.upload_nth(1..=50).await.expect("accepted");
    }
    gateway.kill();

    let server = PostgresServer::shared();
    let url = server.database();
    let told = copy(directory.path(), &url).succeeds().await;
    assert!(told.contains("compared") && told.contains("storage.url"), "{told}");
    copy(directory.path(), &url).fails_saying(1, "in use already").await;
    // A gateway that asks for credentials has begun on it, and has operators that are nobody else's.
    let in_use = server.database();
    let with_operators = |config: &mut Config| {
        config.storage.url = DatabaseUrl::new(in_use.clone());
        config.auth.mode = AuthMode::Required;
    };
    TestGateway::start_with(with_operators).await.stop().await;
    copy(directory.path(), &in_use).fails_saying(1, "in use already").await;

    let gateway = TestGateway::start_with(|config| config.storage.url = DatabaseUrl::new(url)).await;
    for device in devices {
        let device = device.on(&gateway.channel());
        device.upload_nth(40..=60).await.expect("accepted");
        assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=60));
    }
    let new = TestDevice::new(&gateway.channel(), "pump-3");
    new.upload_nth(1..=5).await.expect("its keys are new ones");
    assert!(gateway.stop().await);
}

/// Scenario: a copy is cut off at some moment. Guarantee: no gateway begins on what there is, and the same command goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_cut_off_goes_on() {
    if !postgres::is_there() {
        return;
    }
    let directory = TempDir::new().expect("a temporary directory");
    let gateway = GatewayProcess::start(directory.path()).await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload_nth(1..=100).await.expect("accepted");
    gateway.kill();

    let server = PostgresServer::private();
    let url = server.database();
    copy(directory.path(), &url).succeeds().await;
    // As if it had been cut off in the midst of a table.
    let cut = "INSERT INTO progress VALUES ('copying', 0); DELETE FROM log WHERE position > 1; DELETE FROM streams";
    server.psql("test_0", cut).expect("done");
    let elsewhere = TempDir::new().expect("a temporary directory");
    let mut settings = config(elsewhere.path());
    settings.storage.url = DatabaseUrl::new(url.clone());
    let refused = Gateway::build(settings).await.err().expect("it is not whole");
    assert!(refused.to_string().contains("not copied whole"), "{refused}");
    let told = copy(directory.path(), &url).succeeds().await;
    assert!(told.contains("from a copy that was cut off"), "{told}");
    let gateway = TestGateway::start_with(|config| config.storage.url = DatabaseUrl::new(url)).await;
    let device = device.on(&gateway.channel());
    assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=100));
    assert!(gateway.stop().await);
}

/// What was added to the times of what is merged is part of it.
#[tokio::test]
async fn corrections_of_times_are_copied() {
    if !postgres::is_there() {
        return;
    }
    let directory = restore(include_str!("../fixtures/sqlite_0005.sql")).await;
    let server = PostgresServer::private();
    copy(directory.path(), &server.database()).succeeds().await;
    assert_eq!(server.psql("test_0", "SELECT clock_corrections FROM chunks").expect("read").trim(), "[[0,-2000000]]");
}
