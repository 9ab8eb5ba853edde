//! The simulated fleet, whose own verification must hold whatever happens to the gateway.

use crate::support::{
    TestGateway,
    database::Database,
    eventually, http_get, identity, metric,
    process::GatewayProcess,
    script::{Script, fleet},
};
use tempfile::TempDir;
use tidegate::pb::{self, OperatorRole, credential_service_client::CredentialServiceClient};

#[tokio::test(flavor = "multi_thread")]
async fn a_simulated_fleet_finds_all_that_was_acknowledged() {
    let gateway = TestGateway::start().await;
    let mut simulate = fleet();
    simulate.args(["simulate", "--devices", "100", "--duration", "3s", "--interval", "100ms", "--batch", "12"]);
    simulate.args(["--verify", "--json", "--endpoint", &format!("http://{}", gateway.grpc)]);
    let summary: serde_json::Value = serde_json::from_str(&Script::start(simulate).succeeds().await).expect("one JSON object");
    let acknowledged = summary["acknowledged"]["readings"].as_f64().expect("a number");
    assert!(acknowledged > 0.0);
    assert_eq!(gateway.metric("tidegate_stored_readings_total").await, Some(acknowledged));
}

/// Each device acts as itself alone, so each gets a token; those of earlier runs do not pile up.
#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_with_an_operators_token_makes_tokens_for_its_devices() {
    let gateway = identity::start(Database::Sqlite).await;
    let root = identity::admin(&gateway);
    let directory = TempDir::new().expect("a temporary directory");
    let (_, token) = identity::operator_token(&root, "player", OperatorRole::Operator, "").await;
    let token_file = directory.path().join("token");
    std::fs::write(&token_file, token).expect("written");
    for _ in 0..6 {
        let mut simulate = fleet();
        simulate.args(["simulate", "--devices", "3", "--duration", "300ms", "--interval", "100ms", "--batch", "6"]);
        simulate.args(["--verify", "--quiet", "--endpoint", &format!("http://{}", gateway.grpc), "--token-file"]).arg(&token_file);
        Script::start(simulate).succeeds().await;
    }
    let list = pb::ListDeviceCredentialsRequest { device: "sim-1-0001".into() };
    let kept = CredentialServiceClient::new(root).list_device_credentials(list).await.expect("listed").into_inner();
    assert_eq!(kept.credentials.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_loses_and_doubles_nothing_while_the_gateway_is_killed_and_restarted() {
    let directory = TempDir::new().expect("a temporary directory");
    let mut gateway = GatewayProcess::start(directory.path()).await;
    let (grpc, http) = (gateway.grpc, gateway.http);
    let mut simulate = fleet();
    simulate.args(["simulate", "--devices", "50", "--duration", "8s", "--interval", "100ms", "--batch", "12"]);
    simulate.args(["--verify", "--json", "--quiet", "--endpoint", &format!("http://{grpc}")]);
    let fleet = Script::start(simulate);
    for round in 1..=3 {
        // In the middle of the traffic: so many batches after the last start that every round is killed elsewhere.
        let stored = f64::from(round * 17);
        eventually("batches are stored", || async {
            let (_, text) = http_get(http, "/metrics").await?;
            (metric(&text, "tidegate_stored_batches_total")? >= stored).then_some(())
        })
        .await;
        gateway.kill();
        gateway = GatewayProcess::start_on(directory.path(), grpc, http, &[]).await;
    }
    let summary: serde_json::Value = serde_json::from_str(&fleet.succeeds().await).expect("one JSON object");
    assert!(summary["reconnects"].as_u64() > Some(0), "{summary}");
}

/// A replay's verification counts what this run has added, in the log too.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_adds_its_batches_once_however_often_it_is_run() {
    let gateway = TestGateway::start().await;
    let directory = TempDir::new().expect("a temporary directory");
    let csv = directory.path().join("recording.csv");
    let rows: String = (0..250).map(|row| format!("{},{row},{}\n", 1_583_749_000 + row, 2 * row)).collect();
    std::fs::write(&csv, format!("time,a,b\n{rows}")).expect("written");
    let replay = |more: &[&str]| {
        let mut replay = fleet();
        replay.args(["replay", "--device", "replayed", "--verify", "--json", "--endpoint", &format!("http://{}", gateway.grpc), "--csv"]);
        replay.arg(&csv).args(more);
        Script::start(replay)
    };
    for (more, stored) in [(&[] as &[&str], 5), (&[], 0), (&["--resend"], 0), (&["--new-stream"], 5)] {
        let output: serde_json::Value = serde_json::from_str(&replay(more).succeeds().await).expect("one JSON object");
        assert_eq!(output["verification"]["stored"]["batches"], stored, "{more:?}: {output}");
    }
    replay(&["--resend", "--speed", "1x"]).fails(2).await;
    replay(&["--resend", "--queue", "queue.sqlite"]).fails(2).await;
}
