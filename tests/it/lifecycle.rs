//! Starting and stopping: a restart is unnoticeable, and what can't start says why.

use crate::support::{
    TestGateway,
    client::{TestDevice, links, nth_batch, nth_temperatures},
    process::GatewayProcess,
    soon,
};
use std::process::Command;
use tempfile::TempDir;
use tidegate::{
    error::StatusFacts,
    pb::{self, connect_request, connect_response, telemetry_service_client::TelemetryServiceClient},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

#[tokio::test]
async fn a_stop_is_told_to_probes_first_answers_uploads_and_ends_links_with_all_acknowledged() {
    let gateway = TestGateway::start().await;
    let channel = gateway.channel();
    let mut health = HealthClient::new(channel.clone());
    let of_all = HealthCheckRequest { service: String::new() };
    let mut watch = health.watch(of_all.clone()).await.expect("watched").into_inner();
    assert_eq!(soon("the first status", watch.message()).await.expect("no error").expect("set").status(), ServingStatus::Serving);

    // An upload that never says a word, one whose device has more to say, and a link with batches on their way.
    let (_silent, requests) = mpsc::channel(1);
    let mut client = TelemetryServiceClient::new(channel.clone());
    let silent = tokio::spawn(async move { client.upload(ReceiverStream::new(requests)).await });
    let device = TestDevice::new(&channel, "pump-1");
    let (upload, requests) = mpsc::channel(8);
    upload.send(device.request(1, nth_batch(1))).await.expect("open");
    let mut client = TelemetryServiceClient::new(channel.clone());
    let uploading = tokio::spawn(async move { client.upload(ReceiverStream::new(requests)).await });
    let linked = TestDevice::new(&channel, "pump-2");
    let (up, requests) = mpsc::channel(64);
    let say = |message| pb::ConnectRequest { message: Some(message) };
    let stream_id = linked.stream_id.as_bytes().to_vec().into();
    up.send(say(connect_request::Message::Hello(pb::Hello { device: "pump-2".into(), stream_id, applied_revision: 0 })))
        .await
        .expect("open");
    let mut link = links(&channel).connect(ReceiverStream::new(requests)).await.expect("the call begins").into_inner();
    assert!(matches!(
        soon("the welcome", link.message()).await.expect("no error").and_then(|response| response.message),
        Some(connect_response::Message::Welcome(_))
    ));
    for sequence in 1..=30 {
        let batch = pb::LinkBatch { sequence, batch: nth_batch(sequence), ..Default::default() };
        up.send(say(connect_request::Message::Batch(batch))).await.expect("open");
    }
    let series = "tidegate_stored_batches_total";
    crate::support::eventually("the upload's batch is stored", || async { (gateway.metric(series).await >= Some(1.0)).then_some(()) })
        .await;

    gateway.begin_stop();
    assert_eq!(soon("the news", watch.message()).await.expect("no error").expect("set").status(), ServingStatus::NotServing);
    let refused = soon("the silent upload's end", silent).await.expect("no panic").expect_err("it never began");
    assert_eq!(StatusFacts::of(&refused).reason(), "DRAINING");
    let response = soon("the upload's answer", uploading).await.expect("no panic").expect("OK, before the device closed its side");
    assert_eq!(response.into_inner().last_durable_sequence, 1);
    let mut acknowledged = 0;
    let mut draining = false;
    while let Some(response) = soon("the link's end", link.message()).await.expect("ends with OK") {
        match response.message.expect("set") {
            connect_response::Message::Ack(ack) => acknowledged = ack.last_durable_sequence,
            connect_response::Message::Draining(_) => draining = true,
            other => panic!("unexpected: {other:?}"),
        }
    }
    assert!(draining, "the device is told to go elsewhere");
    let gateway = gateway.restart().await;
    let channel = gateway.channel();
    assert_eq!(linked.on(&channel).position().await, acknowledged, "what was taken was acknowledged");
    assert_eq!(linked.on(&channel).stored_temperatures().await, nth_temperatures(1..=acknowledged));
    let now = HealthClient::new(channel).check(of_all).await.expect("checked").into_inner();
    assert_eq!(now.status(), ServingStatus::Serving);
}

/// A device that lost its network says nothing any more, and so does not close its connection either.
#[tokio::test]
async fn a_peer_that_is_gone_does_not_hold_up_the_stop() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let gateway = TestGateway::start().await;
    let mut peer = tokio::net::TcpStream::connect(gateway.grpc).await.expect("it listens");
    // The connection preface with empty SETTINGS (RFC 9113 section 3.4).
    peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").await.expect("it reads");
    let mut settings = [0; 9];
    soon("the gateway's SETTINGS", peer.read_exact(&mut settings)).await.expect("it answers");
    assert_eq!(settings[3], 4, "the type of SETTINGS");
    assert!(gateway.stop().await, "stopped in time, though the peer never answers");
}

#[tokio::test]
async fn the_process_ends_with_0_on_sigterm_and_at_once_on_a_second_signal() {
    let directory = TempDir::new().expect("a temporary directory");
    let mut gateway = GatewayProcess::start(directory.path()).await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload_nth(1..=5).await.expect("accepted");
    gateway.signal("TERM");
    assert_eq!(gateway.wait().await.code(), Some(0), "{}", gateway.log());

    // A notice that is longer than the test's patience: only the second signal ends it.
    let any = ([127, 0, 0, 1], 0).into();
    let mut gateway = GatewayProcess::start_on(directory.path(), any, any, &["--shutdown-notice=59m", "--shutdown-grace=1h"]).await;
    gateway.signal("INT");
    crate::support::eventually("it drains", || async { gateway.log().contains("gateway.draining").then_some(()) }).await;
    gateway.signal("INT");
    assert_eq!(gateway.wait().await.code(), Some(130));
}

#[tokio::test]
async fn a_kill_at_any_moment_loses_nothing_that_was_acknowledged() {
    let directory = TempDir::new().expect("a temporary directory");
    let mut gateway = GatewayProcess::start(directory.path()).await;
    let mut device = TestDevice::new(&gateway.channel(), "pump-1");
    let mut acknowledged = 0;
    for round in 1..=8_u64 {
        // Killed while it uploads, at a moment that depends on how far it has come.
        let uploading = device.clone();
        let goal = round * 400;
        let upload = tokio::spawn(async move {
            let mut last = uploading.position().await;
            while last < goal {
                match uploading.upload_nth(last + 1..=goal.min(last + 7)).await {
                    Ok(response) => last = response.last_durable_sequence,
                    Err(_) => break,
                }
            }
            last
        });
        let kill_at = acknowledged + round * 23;
        crate::support::eventually("some batches are stored", || {
            let device = device.clone();
            let done = upload.is_finished();
            async move { (done || device.position().await >= kill_at).then_some(()) }
        })
        .await;
        gateway.kill();
        acknowledged = soon("the upload ends", upload).await.expect("no panic").max(acknowledged);
        gateway = GatewayProcess::start(directory.path()).await;
        device = device.on(&gateway.channel());
        let position = device.position().await;
        assert!(position >= acknowledged, "acknowledged {acknowledged}, stored {position}");
        assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=position));
        assert_eq!(device.ledger().await.stored, Some(pb::Tally { batches: position, readings: position * 10 }));
        acknowledged = position;
    }
}

#[tokio::test]
async fn a_gateway_that_cannot_start_says_why_and_what_is_allowed() {
    let directory = TempDir::new().expect("a temporary directory");
    let running = GatewayProcess::start(directory.path()).await;
    let run = |flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        let output = command.arg("serve").args(["--http-listen=127.0.0.1:0"]).args(flags).output().expect("it runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let data_dir = format!("--storage-data-dir={}", directory.path().display());
    let (code, text) = run(&["--grpc-listen=127.0.0.1:0", &data_dir]);
    assert!(code == Some(1) && text.contains("in use by another gateway"), "{code:?} {text}");
    let other = TempDir::new().expect("a temporary directory");
    let other_dir = format!("--storage-data-dir={}", other.path().display());
    let (code, text) = run(&[&format!("--grpc-listen={}", running.grpc), &other_dir]);
    assert!(code == Some(1) && text.contains(&running.grpc.to_string()) && text.contains("grpc.listen"), "{code:?} {text}");
    let (code, text) = run(&["--grpc-listen=0.0.0.0:0", &other_dir]);
    assert!(code == Some(2) && text.contains("grpc.listen = \"0.0.0.0:0\"") && text.contains("--insecure"), "{code:?} {text}");
    let (code, text) = run(&["--ingest-commit-batches-max=0"]);
    assert!(code == Some(2) && text.contains("ingest.commit_batches_max = 0") && text.contains("1 to 10000"), "{code:?} {text}");
}
