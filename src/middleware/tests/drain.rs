//! Guarantee: idle means that no call is open but health checks; streams that know nothing of a stop are ended at one.

use super::support::{Gateway, eventually, follow, soon};
use futures_util::FutureExt;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;

#[tokio::test]
async fn idle_waits_for_calls_and_not_for_probes() {
    let gateway = Gateway::start(|_| ()).await;
    let mut watch = gateway.health().await.watch(HealthCheckRequest::default()).await.expect("it begins").into_inner();
    soon("the first report", watch.message()).await.expect("well").expect("a report");
    soon("idle: a probe is not waited for", gateway.calls.wait_idle()).await;

    let open = gateway.live().await.follow(follow("hang")).await.expect("it begins");
    assert_eq!(gateway.calls.open(), 1);
    assert!(gateway.calls.wait_idle().now_or_never().is_none());
    drop(open);
    soon("idle: the call was given up", gateway.calls.wait_idle()).await;
    assert_eq!(gateway.services.at_work(), 0, "idle means that the work is over");
}

#[tokio::test]
async fn a_health_watch_does_not_keep_the_gateway_from_stopping() {
    let gateway = Gateway::start(|_| ()).await;
    let mut watch = gateway.health().await.watch(HealthCheckRequest::default()).await.expect("it begins").into_inner();
    soon("the first report", watch.message()).await.expect("well").expect("a report");
    gateway.stop.drain.cancel();
    let status = soon("the end", watch.message()).await.expect_err("it is ended");
    assert_eq!(status.code(), Code::Unavailable);
    soon("the gateway stops without a cut", gateway.serving).await.expect("no panic");
}

#[tokio::test]
async fn calls_of_a_broken_connection_are_over() {
    let gateway = Gateway::start(|_| ()).await;
    let mut client = gateway.live().await;
    let open = client.follow(follow("hang")).await.expect("it begins");
    drop((open, client));
    eventually("the connection is closed", || gateway.value("tidegate_grpc_connections_open") == 0.0).await;
    soon("idle", gateway.calls.wait_idle()).await;
}
