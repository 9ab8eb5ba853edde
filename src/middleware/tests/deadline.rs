//! Guarantee: at a call's deadline the work on it stops and the client is told DEADLINE_EXCEEDED, wherever the call stands.

use super::support::{Gateway, Services, doors, eventually, follow, position_of, reason, soon};
use crate::{
    config::Config,
    middleware::{CallReports, CallTracker, stack},
    pb::UploadRequest,
    telemetry::Metrics,
};
use futures_util::{StreamExt, stream};
use http::Request;
use std::time::Duration;
use tonic::{Code, Status, body::Body};
use tower::ServiceExt;

const SHORT: Duration = Duration::from_secs(1);

async fn assert_ended(gateway: &Gateway, status: Status) {
    assert_eq!((status.code(), reason(&status).as_str()), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"), "{status:?}");
    eventually("the handler's work is dropped", || gateway.services.at_work() == 0).await;
}

#[tokio::test]
async fn during_a_unary_call() {
    let gateway = Gateway::start(|config| config.unary_deadline_max = SHORT).await;
    let mut client = gateway.telemetry().await;
    let status = soon("the deadline", client.get_upload_position(position_of("hang"))).await.expect_err("it hangs");
    assert_ended(&gateway, status).await;
    // The connection is as good as before.
    client.get_upload_position(position_of("")).await.expect("the next call is not harmed");
}

#[tokio::test]
async fn while_the_client_never_ends_its_stream() {
    let gateway = Gateway::start(|config| config.streaming_deadline_max = SHORT).await;
    let requests = stream::iter([UploadRequest::default()]).chain(stream::pending());
    let status = soon("the deadline", gateway.telemetry().await.upload(requests)).await.expect_err("it never ends");
    assert_ended(&gateway, status).await;
}

#[tokio::test]
async fn after_the_first_message_of_a_response() {
    let gateway = Gateway::start(|config| config.streaming_deadline_max = SHORT).await;
    let mut messages = gateway.live().await.follow(follow("hang")).await.expect("it begins").into_inner();
    soon("the first message", messages.message()).await.expect("well").expect("a message");
    let status = soon("the deadline", messages.message()).await.expect_err("it hangs");
    assert_ended(&gateway, status).await;
}

#[tokio::test]
async fn while_there_is_always_one_more_message() {
    let gateway = Gateway::start(|config| config.streaming_deadline_max = SHORT).await;
    let mut messages = gateway.live().await.follow(follow("flood")).await.expect("it begins").into_inner();
    let drained = async {
        loop {
            if let Err(status) = messages.message().await {
                return status;
            }
        }
    };
    assert_ended(&gateway, soon("the deadline", drained).await).await;
}

#[tokio::test]
async fn handlers_know_their_deadline() {
    let gateway = Gateway::start(|config| config.unary_deadline_max = Duration::from_secs(1000)).await;
    let left = gateway.telemetry().await.get_upload_position(position_of("deadline")).await.expect("it answers");
    assert!((1..1000).contains(&left.into_inner().last_durable_sequence));
}

/// Without tonic's client, which would end the call itself at the timeout that it asks for.
#[tokio::test]
async fn what_the_client_asks_for_is_kept_or_refused() {
    let services = Services::default();
    let stack =
        stack(&Config::default().grpc, CallReports::default(), &Metrics::new(), &doors(), &CallTracker::new(), services.routes().await);
    let ask = |timeout: &str| {
        // GetUploadPositionRequest { device: "hang" }
        let message = Body::new(http_body_util::Full::from(&b"\0\0\0\0\x06\x0a\x04hang"[..]));
        let request = Request::post("/tidegate.v1.TelemetryService/GetUploadPosition").header("content-type", "application/grpc");
        let request = request.header("grpc-timeout", timeout).body(message).expect("well-formed");
        let response = stack.clone().oneshot(request);
        async { Status::from_header_map(soon("an answer", response).await.expect("infallible").headers()).expect("trailers only") }
    };
    let passed = ask("20m").await;
    assert_eq!((passed.code(), reason(&passed).as_str()), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"));
    assert_eq!(services.at_work(), 0);
    let malformed = ask("soon").await;
    assert_eq!((malformed.code(), reason(&malformed).as_str()), (Code::InvalidArgument, "INVALID_ARGUMENT"));
}
