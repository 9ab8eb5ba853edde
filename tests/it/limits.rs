//! Limits on one device and one operator.

use crate::support::{
    client::{TestDevice, devices, live, nth_batch, nth_temperatures},
    database::{Database, on_each_database},
    eventually,
    identity::{self, admin, operator_token, with_token},
    streams::Link,
};
use std::time::Duration;
use tidegate::{
    client::Channel,
    error::StatusFacts,
    pb::{self, OperatorRole},
};
use tonic::{Code, Status};

on_each_database!(
    a_device_that_sends_too_much_is_held_back_and_loses_nothing,
    who_would_wait_for_long_is_told_what_is_stored_and_when_to_come_again,
    a_device_has_so_many_calls_and_no_more,
);

fn refusals(setting: &str) -> String {
    format!("tidegate_limit_refusals_total{{setting=\"{setting}\"}}")
}

fn assert_refused(status: &Status, reason: &str, setting: &str, limit: &str) {
    let info = StatusFacts::of(status).info.expect("set");
    assert_eq!((status.code(), info.reason.as_str()), (Code::ResourceExhausted, reason), "{status:?}");
    assert_eq!((info.metadata["setting"].as_str(), info.metadata["limit"].as_str()), (setting, limit));
    assert!(status.message().contains(setting), "{status:?}");
}

async fn a_device_that_sends_too_much_is_held_back_and_loses_nothing(on: Database) {
    // A batch has 10 readings: 200 of them are 1 s ahead and 1 s more.
    let gateway = on.gateway_with(|config| config.limits.device_readings_per_second = 1_000).await;
    let channel = gateway.channel();
    let (hasty, linked, other) =
        (TestDevice::new(&channel, "hasty"), TestDevice::new(&channel, "linked"), TestDevice::new(&channel, "other"));
    let upload = hasty.upload_nth(1..=200);
    let link = async {
        let (mut link, _) = Link::open(&linked, 0).await;
        for sequence in 1..=200 {
            link.send_batch(sequence, nth_batch(sequence)).await;
        }
        link.acknowledged(200).await;
    };
    let waits = async || gateway.metric("tidegate_upload_waits_total").await.expect("set");
    let (answer, few) = tokio::join!(upload, other.upload_nth(1..=3));
    assert_eq!(answer.expect("held back, and taken").last_durable_sequence, 200);
    assert_eq!(few.expect("of its own rate it has used little").last_durable_sequence, 3);
    let of_upload = waits().await;
    assert!((1.0..=200.0).contains(&of_upload), "no batch counts twice: {of_upload}");
    link.await;
    let of_link = waits().await - of_upload;
    assert!((1.0..=200.0).contains(&of_link), "no batch counts twice: {of_link}");
    assert_eq!(gateway.metric(&refusals("limits.device_readings_per_second")).await, Some(0.0));
    for device in [&hasty, &linked] {
        assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=200));
    }
}

async fn who_would_wait_for_long_is_told_what_is_stored_and_when_to_come_again(on: Database) {
    let gateway = on.gateway_with(|config| config.limits.device_bytes_per_second = 10).await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "chatty");
    // The first is taken, and takes the rate of many seconds.
    let refused = device.upload_nth([1, 2]).await.expect_err("the second would wait for long");
    assert_refused(&refused, "RATE_LIMITED", "limits.device_bytes_per_second", "10");
    let facts = StatusFacts::of(&refused);
    assert!(facts.retry_after >= Some(Duration::from_secs(5)), "{facts:?}");
    let metadata = facts.info.expect("set").metadata;
    assert_eq!((metadata["accepted_batches"].as_str(), metadata["accepted_readings"].as_str()), ("1", "10"));
    assert_eq!(device.position().await, 1, "what was accepted is durable");
    let again = device.upload_nth([2]).await.expect_err("it has not waited");
    assert_refused(&again, "RATE_LIMITED", "limits.device_bytes_per_second", "10");
    assert_eq!(gateway.metric(&refusals("limits.device_bytes_per_second")).await, Some(2.0));

    let linked = TestDevice::new(&channel, "linked");
    let (mut link, _) = Link::open(&linked, 0).await;
    link.send_batch(1, nth_batch(1)).await;
    link.send_batch(2, nth_batch(2)).await;
    link.acknowledged(1).await;
    let refused = link.try_next().await.expect_err("the second would wait for long");
    assert_refused(&refused, "RATE_LIMITED", "limits.device_bytes_per_second", "10");
}

async fn a_device_has_so_many_calls_and_no_more(on: Database) {
    let gateway = on.gateway_with(|config| config.limits.device_calls_max = 1).await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    let (link, _) = Link::open(&device, 0).await;
    let refused = device.upload_nth([1]).await.expect_err("it has a call open");
    assert_refused(&refused, "OVERLOADED", "limits.device_calls_max", "1");
    TestDevice::new(&channel, "pump-2").upload_nth([1]).await.expect("another device has its own");
    drop(link);
    eventually("its call has ended", || async { device.upload_nth([1]).await.ok() }).await;
}

/// Asks once.
async fn ask(channel: &Channel) -> Result<(), Status> {
    devices(channel).list_devices(pb::ListDevicesRequest::default()).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_calls_too_often_is_told_when_to_come_again() {
    let gateway = identity::start_with(Database::Sqlite, |config| config.limits.operator_calls_per_second = 5).await;
    let root = admin(&gateway);
    let (_, alice) = operator_token(&root, "alice", OperatorRole::Viewer, "").await;
    let (_, bob) = operator_token(&root, "bob", OperatorRole::Viewer, "").await;
    let (alice, bob) = (with_token(gateway.grpc, &alice), with_token(gateway.grpc, &bob));
    let refused = eventually("more is refused than is allowed", || async { ask(&alice).await.err() }).await;
    assert_refused(&refused, "RATE_LIMITED", "limits.operator_calls_per_second", "5");
    assert!(StatusFacts::of(&refused).retry_after >= Some(Duration::from_secs(1)), "{refused:?}");
    ask(&bob).await.expect("another operator has a rate of his own");
    eventually("it is free again", || async { ask(&alice).await.ok() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_has_so_many_calls_and_no_more() {
    let gateway = identity::start_with(Database::Sqlite, |config| config.limits.operator_calls_max = 1).await;
    let root = admin(&gateway);
    let (_, alice) = operator_token(&root, "alice", OperatorRole::Viewer, "").await;
    let alice = with_token(gateway.grpc, &alice);
    let follow = live(&alice).follow(pb::FollowRequest::default()).await.expect("it follows");
    assert_refused(&ask(&alice).await.expect_err("it has a call open"), "OVERLOADED", "limits.operator_calls_max", "1");
    ask(&root).await.expect("another operator has its own");
    drop(follow);
    eventually("the call has ended", || async { ask(&alice).await.ok() }).await;
}
