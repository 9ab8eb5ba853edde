//! `tidegate migrate`, for those who bring a database to a new version's form before its gateways start; and what `tidegate
//! backup` says of a database that is not its own.

use crate::support::{
    client::{TestDevice, nth_temperatures},
    database::{Database, on_each_database},
    process::GatewayProcess,
};
use std::process::{Command, Output};
use tempfile::TempDir;
use tidegate::config::Storage;

on_each_database!(a_gateway_starts_on_what_migrate_made);

fn tidegate(arguments: &[&str], storage: &Storage) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.args(arguments).arg("--storage-data-dir").arg(&storage.data_dir).arg("--storage-url").arg(storage.url.expose());
    command.output().expect("the binary runs")
}

async fn a_gateway_starts_on_what_migrate_made(database: Database) {
    let directory = TempDir::new().expect("a temporary directory");
    let storage = database.storage(directory.path());
    let migrate = || {
        let output = tidegate(&["migrate"], &storage);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let told = migrate();
    let last = told.lines().last().expect("it says something").to_owned();
    let version: usize = last.strip_prefix("the database is at version ").expect(&told).parse().expect("a number");
    assert_eq!(told.lines().filter(|line| line.starts_with("applied ")).count(), version, "{told}");
    assert!(told.starts_with("applied 0001 initial\n"), "{told}");
    assert_eq!(migrate(), format!("{last}\n"), "the second time there is nothing to do");

    let any = ([127, 0, 0, 1], 0).into();
    let url = format!("--storage-url={}", storage.url.expose());
    let gateway = GatewayProcess::start_on(directory.path(), any, any, &[&url]).await;
    assert!(!gateway.log().contains("store.migrated"), "{}", gateway.log());
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload_nth(1..=3).await.expect("accepted");
    assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=3));
}

#[test]
fn a_backup_of_a_shared_database_is_left_to_its_own_tools() {
    let directory = TempDir::new().expect("a temporary directory");
    let url = tidegate::config::DatabaseUrl::new("postgres://tide:s3cret@127.0.0.1:1/gate");
    let storage = Storage { url, data_dir: directory.path().join("data"), ..tidegate::config::Config::default().storage };
    let copy = directory.path().join("copy.db");
    let output = tidegate(&["backup", "--to", copy.to_str().expect("UTF-8")], &storage);
    let message = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!((output.status.code(), output.stdout), (Some(1), vec![]), "{message}");
    assert!(message.contains("storage.url") && message.contains("pg_dump"), "{message}");
    assert!(!message.contains("s3cret"), "{message}");
    assert!(std::fs::read_dir(directory.path()).expect("readable").next().is_none(), "nothing is left behind");
}
