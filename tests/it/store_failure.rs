//! A store that stops taking writes: nothing is acknowledged, everybody is told, and it mends by itself.

use crate::support::{
    client::{TestDevice, devices, nth_temperatures},
    eventually, health_is, http_get,
    process::GatewayProcess,
};
use std::process::Command;
use tempfile::TempDir;
use tidegate::error::StatusFacts;
use tonic::Code;

/// Limits how large files of the process may grow: each write beyond it fails, as on a full disk (setrlimit(2)).
fn limit_file_size(gateway: &GatewayProcess, limit: &str) {
    let limited = Command::new("prlimit").args(["--pid", &gateway.pid().to_string(), &format!("--fsize={limit}:unlimited")]).status();
    assert!(limited.expect("prlimit (util-linux) runs").success());
}

#[tokio::test]
async fn a_full_disk_stops_acknowledgements_and_nothing_else_and_the_gateway_recovers_by_itself() {
    let directory = TempDir::new().expect("a temporary directory");
    let gateway = GatewayProcess::start(directory.path()).await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload_nth(1..=5).await.expect("accepted");

    limit_file_size(&gateway, "1");
    let status = device.upload_nth(6..=8).await.expect_err("nothing can be written");
    assert_eq!((status.code(), StatusFacts::of(&status).reason()), (Code::Unavailable, "STORE_UNAVAILABLE"), "{status:?}");
    assert!(StatusFacts::of(&status).retry_after.is_some(), "it says when to try again");
    let (code, text) =
        eventually("readiness says so", || async { http_get(gateway.http, "/readyz").await.filter(|(code, _)| *code == 503) }).await;
    assert!(code == 503 && text.contains("store: not ready"), "{text}");
    health_is(&gateway, false).await;
    // A change of which it is not known whether it happened: the device is not lost over it.
    let change = tidegate::pb::Device { id: "pump-1".into(), display_name: "Pump".into(), ..Default::default() };
    let change = tidegate::pb::UpdateDeviceRequest { device: Some(change), update_mask: None };
    let refused = devices(&gateway.channel()).update_device(change.clone()).await.expect_err("nothing can be written");
    assert_eq!(StatusFacts::of(&refused).reason(), "STORE_UNAVAILABLE");
    // Reading goes on.
    assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=5));
    assert_eq!(device.upload_nth(6..=8).await.expect_err("still").code(), Code::Unavailable);

    limit_file_size(&gateway, "unlimited");
    eventually("it recovers", || async { http_get(gateway.http, "/readyz").await.filter(|(code, _)| *code == 200) }).await;
    devices(&gateway.channel()).update_device(change).await.expect("changed now");
    let position = device.position().await;
    let response = device.upload_nth(1..=8).await.expect("accepted again");
    assert_eq!(response.last_durable_sequence, 8, "at {position} before");
    assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=8));
    assert_eq!(device.ledger().await.stored.map(|tally| tally.batches), Some(8));
    health_is(&gateway, true).await;
}
