//! Guarantee: every call has an id, is counted with the status that the client saw, and is never left open in the counts;
//! a panic ends one call and nothing else.

use super::support::{Gateway, eventually, follow, position_of, reason, soon};
use crate::pb::UploadRequest;
use futures_util::stream;
use tonic::{Code, Request, codegen::http::uri::PathAndQuery};

const FOLLOW: &str = r#"{method="tidegate.v1.LiveService/Follow"}"#;
const UPLOAD: &str = r#"{method="tidegate.v1.TelemetryService/Upload"}"#;

fn ended(method: &str, code: &str) -> String {
    format!(r#"tidegate_grpc_requests_total{{method="{method}",code="{code}"}}"#)
}

#[tokio::test]
async fn a_stream_that_the_client_gives_up_is_counted_as_cancelled() {
    let gateway = Gateway::start(|_| ()).await;
    let mut messages = gateway.live().await.follow(follow("hang")).await.expect("it begins").into_inner();
    soon("the first message", messages.message()).await.expect("well").expect("a message");
    assert_eq!(gateway.value(&format!("tidegate_grpc_requests_in_flight{FOLLOW}")), 1.0);

    drop(messages);
    eventually("the call ends", || gateway.value(&ended("tidegate.v1.LiveService/Follow", "CANCELLED")) == 1.0).await;
    assert_eq!(gateway.value(&format!("tidegate_grpc_requests_in_flight{FOLLOW}")), 0.0);
    assert_eq!(gateway.value(&format!("tidegate_grpc_requests_started_total{FOLLOW}")), 1.0);
    assert_eq!(gateway.value(&format!("tidegate_grpc_messages_received_total{FOLLOW}")), 1.0);
    assert_eq!(gateway.value(&format!("tidegate_grpc_messages_sent_total{FOLLOW}")), 1.0);
    assert_eq!(gateway.value(&format!("tidegate_grpc_request_duration_seconds_count{FOLLOW}")), 1.0);
}

#[tokio::test]
async fn messages_and_statuses_are_counted_by_method() {
    let gateway = Gateway::start(|_| ()).await;
    let mut client = gateway.telemetry().await;
    let requests = (1..=300).map(|sequence| UploadRequest { sequence, stream_id: vec![7; 1000].into(), ..Default::default() });
    client.upload(stream::iter(requests.collect::<Vec<_>>())).await.expect("all is read");
    eventually("the call ends", || gateway.value(&ended("tidegate.v1.TelemetryService/Upload", "OK")) == 1.0).await;
    assert_eq!(gateway.value(&format!("tidegate_grpc_messages_received_total{UPLOAD}")), 300.0);
    assert_eq!(gateway.value(&format!("tidegate_grpc_messages_sent_total{UPLOAD}")), 1.0);
}

#[tokio::test]
async fn what_is_not_served_is_unknown_whatever_its_path_is() {
    let gateway = Gateway::start(|_| ()).await;
    for path in ["/tidegate.v1.TelemetryService/Other", "/other.Service/Method"] {
        let mut client = tonic::client::Grpc::new(gateway.channel().await);
        client.ready().await.expect("connected");
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        let status = client.unary(Request::new(()), PathAndQuery::from_static(path), codec).await.expect_err("not served");
        assert_eq!(status.code(), Code::Unimplemented);
    }
    eventually("both calls end", || gateway.value(&ended("unknown", "UNIMPLEMENTED")) == 2.0).await;
}

#[tokio::test]
async fn a_callers_sane_id_is_kept_and_others_get_one() {
    let gateway = Gateway::start(|_| ()).await;
    let mut client = gateway.telemetry().await;
    let mut request = Request::new(position_of(""));
    request.metadata_mut().insert("x-request-id", "job-7".parse().expect("ASCII"));
    let response = client.get_upload_position(request).await.expect("it answers");
    assert_eq!(response.metadata().get("x-request-id").expect("set"), "job-7");

    let response = client.get_upload_position(position_of("")).await.expect("it answers");
    let id = response.metadata().get("x-request-id").expect("set").to_str().expect("ASCII");
    id.parse::<uuid::Uuid>().expect("a UUID");

    let status = client.get_upload_position(position_of("panic")).await.expect_err("it panics");
    assert!(status.metadata().contains_key("x-request-id"), "an error has one, too");
}

#[tokio::test]
async fn handlers_see_the_peer() {
    let gateway = Gateway::start(|_| ()).await;
    let port = gateway.telemetry().await.get_upload_position(position_of("peer")).await.expect("it answers").into_inner();
    assert!(port.last_durable_sequence > 0);
}

#[tokio::test]
async fn a_panic_before_the_response_is_an_internal_error_of_that_call_alone() {
    let gateway = Gateway::start(|_| ()).await;
    let mut client = gateway.telemetry().await;
    let status = client.get_upload_position(position_of("panic")).await.expect_err("it panics");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Internal, "INTERNAL"));
    assert!(!status.message().contains("as asked"), "the cause is for the log");
    client.get_upload_position(position_of("")).await.expect("the connection goes on");
    let method = "tidegate.v1.TelemetryService/GetUploadPosition";
    eventually("the call ends", || gateway.value(&ended(method, "INTERNAL")) == 1.0).await;
    assert_eq!((gateway.value("tidegate_panics_total"), gateway.services.at_work()), (1.0, 0));
}

#[tokio::test]
async fn a_panic_after_the_first_message_ends_the_stream_with_trailers() {
    // In the stream itself, and in the work that drives one.
    for behaviour in ["panic", "driven_panic"] {
        let gateway = Gateway::start(|_| ()).await;
        let mut messages = gateway.live().await.follow(follow(behaviour)).await.expect("it begins").into_inner();
        soon("the first message", messages.message()).await.expect("well").expect("a message");
        let status = soon("the panic", messages.message()).await.expect_err("it panics");
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Internal, "INTERNAL"), "{behaviour}");
        eventually("the call ends", || gateway.value(&ended("tidegate.v1.LiveService/Follow", "INTERNAL")) == 1.0).await;
        assert_eq!((gateway.value("tidegate_panics_total"), gateway.services.at_work()), (1.0, 0), "{behaviour}");
    }
}
