//! Guarantee: a client that owes the rest of a message, the first of its call or the next of its upload is not waited for for ever.

use super::support::{Gateway, Services, doors, eventually, reason, soon};
use crate::{
    config::Config,
    middleware::{CallReports, CallTracker, stack},
    pb::UploadRequest,
    telemetry::Metrics,
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::Request;
use http_body::Frame;
use http_body_util::StreamBody;
use std::time::Duration;
use tonic::{Code, Status, body::Body};
use tower::ServiceExt;

const SHORT: Duration = Duration::from_millis(50);

fn assert_too_slow(status: &Status) {
    assert_eq!((status.code(), reason(status).as_str()), (Code::DeadlineExceeded, "TOO_SLOW"), "{status:?}");
}

#[tokio::test]
async fn the_first_message_of_a_call_must_come() {
    let gateway = Gateway::start(|config| config.message_timeout = SHORT).await;
    let status = soon("the end", gateway.telemetry().await.upload(stream::pending())).await.expect_err("nothing was sent");
    assert_too_slow(&status);
    eventually("the handler's work is over", || gateway.services.at_work() == 0).await;
}

#[tokio::test]
async fn an_upload_must_go_on_or_end() {
    let gateway = Gateway::start(|config| config.idle_timeout = SHORT).await;
    let requests = stream::iter([UploadRequest::default()]).chain(stream::pending());
    let status = soon("the end", gateway.telemetry().await.upload(requests)).await.expect_err("it does not go on");
    assert_too_slow(&status);
    eventually("the handler's work is over", || gateway.services.at_work() == 0).await;
}

/// A byte now and then is no progress.
#[tokio::test]
async fn a_message_that_is_begun_must_be_completed() {
    let mut config = Config::default().grpc;
    config.message_timeout = SHORT;
    let services = Services::default();
    let stack = stack(&config, CallReports::default(), &Metrics::new(), &doors(), &CallTracker::new(), services.routes().await);
    let drip = stream::unfold(tokio::time::interval(SHORT / 10), |mut ticks| async {
        ticks.tick().await;
        Some((Ok::<_, Status>(Frame::data(Bytes::from_static(&[0]))), ticks))
    });
    // The first message's length is 2^16.
    let begin = stream::iter([Ok(Frame::data(Bytes::from_static(&[0, 0, 1, 0, 0])))]);
    let request = Request::post("/tidegate.v1.TelemetryService/Upload").header("content-type", "application/grpc");
    let request = request.body(Body::new(StreamBody::new(begin.chain(drip)))).expect("well-formed");
    let response = soon("the end", stack.oneshot(request)).await.expect("infallible");
    assert_too_slow(&Status::from_header_map(response.headers()).expect("a refusal"));
    assert_eq!(services.at_work(), 0);
}

/// As many as there is room for take it; the others wait, and take their turn when that is given back.
#[tokio::test]
async fn messages_that_are_not_complete_share_a_bound() {
    let mut config = Config::default().grpc;
    (config.message_bytes_max, config.incoming_bytes_max) = (64 << 10, 64 << 10);
    let services = Services::default();
    let stack = stack(&config, CallReports::default(), &Metrics::new(), &doors(), &CallTracker::new(), services.routes().await);
    let upload = |body| {
        let request = Request::post("/tidegate.v1.TelemetryService/Upload").header("content-type", "application/grpc");
        stack.clone().oneshot(request.body(body).expect("well-formed"))
    };
    let begun = Bytes::from_static(&[0, 0, 1, 0, 0]);
    let (rest, pieces) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, Status>>(4);
    rest.try_send(Ok(Frame::data(begun))).expect("room");
    let first = tokio::spawn(upload(Body::new(StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(pieces)))));
    eventually("the first has come in", || rest.capacity() == 4).await;
    let whole = Bytes::from_iter([0, 0, 1, 0, 0].into_iter().chain(field_of_64_kib()));
    let (begin, end) = (whole.slice(..100), whole.slice(100..));
    let pieces = stream::iter([begin, end].map(|piece| Ok::<_, Status>(Frame::data(piece))));
    let mut second = tokio::spawn(upload(Body::new(StreamBody::new(pieces))));
    assert!(tokio::time::timeout(SHORT, &mut second).await.is_err(), "it waits for room");
    drop(rest);
    soon("the first ends, as its message never came", first).await.expect("no panic").expect("infallible");
    let response = soon("the second has its turn", second).await.expect("no panic").expect("infallible");
    assert_eq!(response.headers().get(Status::GRPC_STATUS), None, "its status is in the trailers, behind a message");
}

/// An UploadRequest of 2^16 bytes: a field that nobody knows, number 1000.
fn field_of_64_kib() -> impl Iterator<Item = u8> {
    let length = (1 << 16) - 5;
    [0xc2, 0x3e, (length & 0x7f) as u8 | 0x80, (length >> 7 & 0x7f) as u8 | 0x80, (length >> 14) as u8]
        .into_iter()
        .chain(std::iter::repeat_n(0, length))
}
