//! Guarantee: at a limit on open calls further ones are refused at once, with what to do; probes are not, and a call that
//! ends makes room.

use super::support::{Gateway, eventually, follow, position_of, soon};
use crate::error::StatusFacts;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;

fn assert_overloaded(status: &Status, setting: &str) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let StatusFacts { info, retry_after, .. } = StatusFacts::of(status);
    let info = info.expect("every error has it");
    assert_eq!((info.reason.as_str(), info.metadata["setting"].as_str(), info.metadata["limit"].as_str()), ("OVERLOADED", setting, "1"));
    assert!(retry_after > Some(Duration::ZERO));
}

#[tokio::test]
async fn unary_calls() {
    let gateway = Gateway::start(|config| config.unary_calls_max = 1).await;
    let mut client = gateway.telemetry().await;
    let open = tokio::spawn({
        let mut client = client.clone();
        async move { client.get_upload_position(position_of("hang")).await }
    });
    eventually("the call is open", || gateway.services.at_work() == 1).await;

    let status = soon("the refusal", client.get_upload_position(position_of(""))).await.expect_err("one is open");
    assert_overloaded(&status, "grpc.unary_calls_max");
    assert_eq!(gateway.value(r#"tidegate_grpc_requests_shed_total{setting="grpc.unary_calls_max"}"#), 1.0);
    gateway.health().await.check(HealthCheckRequest::default()).await.expect("probes are exempt");
    gateway.live().await.follow(follow("hang")).await.expect("streams have a limit of their own");

    open.abort();
    eventually("the call is given up", || gateway.calls.open() == 0).await;
    client.get_upload_position(position_of("")).await.expect("there is room again");
}

#[tokio::test]
async fn streams_hold_their_place_to_the_end_of_the_response() {
    let gateway = Gateway::start(|config| config.streaming_calls_max = 1).await;
    let mut client = gateway.live().await;
    let mut open = client.follow(follow("hang")).await.expect("it begins").into_inner();
    soon("the first message", open.message()).await.expect("well").expect("a message");

    let status = client.follow(follow("hang")).await.expect_err("one is open");
    assert_overloaded(&status, "grpc.streaming_calls_max");
    gateway.health().await.watch(HealthCheckRequest::default()).await.expect("probes are exempt");

    drop(open);
    eventually("the stream is given up", || gateway.calls.open() == 0).await;
    client.follow(follow("")).await.expect("there is room again");
}
