//! Limits on one device and one operator.

use crate::support::{
    TestGateway,
    client::{SECOND, T0, TestDevice, devices, links, live, nth_batch, nth_temperatures, temperatures},
    database::{Database, on_each_database},
    eventually,
    identity::{self, admin, operator_token, with_token},
    streams::Link,
};
use bytes::Bytes;
use std::time::Duration;
use tidegate::{
    client::Channel,
    config::Config,
    error::StatusFacts,
    pb::{self, OperatorRole, connect_request, connect_response, credential_service_client::CredentialServiceClient},
};
use tonic::{Code, Status};

on_each_database!(
    a_device_that_sends_too_much_is_held_back_and_loses_nothing,
    who_would_wait_for_long_is_told_what_is_stored_and_when_to_come_again,
    a_device_has_so_many_calls_and_no_more,
    an_upload_that_is_held_back_ends_when_the_gateway_drains,
    a_link_that_is_held_back_ends_when_the_gateway_drains,
    an_upload_that_is_held_back_ends_when_its_client_goes_away,
    an_upload_that_is_held_back_ends_when_its_credential_is_revoked,
    an_upload_that_is_held_back_ends_at_its_deadline,
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

/// The second batch of a device waits for 4.5 s, once the first is taken; the gateway has one stream at a time.
fn hold_long(config: &mut Config) {
    config.limits.device_readings_per_second = 2;
    (config.limits.device_calls_max, config.grpc.streaming_calls_max) = (1, 1);
}

fn eleven_readings(sequence: u64) -> Bytes {
    temperatures(T0 + sequence as i64 * 60 * SECOND, &[0.5; 11])
}

/// Waits until the first batch of a call is stored, and the second held back.
async fn is_held_back(gateway: &TestGateway) {
    for counter in ["tidegate_stored_batches_total", "tidegate_upload_waits_total"] {
        eventually(counter, || async { gateway.metric(counter).await.filter(|count| *count >= 1.0) }).await;
    }
}

/// The place of a device's stream, by a link of its own; `None` while that is refused, as its other call is still open.
async fn position_by_link(device: &TestDevice) -> Option<u64> {
    let stream_id = device.stream_id.as_bytes().to_vec().into();
    let hello = pb::Hello { device: device.id.clone(), stream_id, applied_revision: 0 };
    let hello = pb::ConnectRequest { message: Some(connect_request::Message::Hello(hello)) };
    let answer = links(&device.channel).connect(tokio_stream::iter([hello])).await.ok()?;
    match answer.into_inner().message().await.ok()??.message? {
        connect_response::Message::Welcome(welcome) => Some(welcome.last_durable_sequence),
        other => panic!("not welcome: {other:?}"),
    }
}

/// The call that was held back has ended and given back what it held; and it did not wait until its second batch was taken.
async fn assert_given_up(gateway: &TestGateway, device: &TestDevice) {
    let position = eventually("another call may begin", || position_by_link(device)).await;
    assert_eq!(position, 1, "the call lasted until its second batch was taken");
    assert_eq!(gateway.metric("tidegate_pending_bytes").await, Some(0.0));
}

async fn an_upload_that_is_held_back_ends_when_the_gateway_drains(on: Database) {
    let gateway = on.gateway_with(hold_long).await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let upload = device.upload([1, 2].map(|sequence| (sequence, eleven_readings(sequence))));
    let (answer, ()) = tokio::join!(upload, async {
        is_held_back(&gateway).await;
        gateway.begin_stop();
    });
    assert_eq!(answer.expect("what was taken is told").last_durable_sequence, 1, "it was held back until the second was taken");
    assert!(gateway.stop().await, "nothing is left that has to be cut off");
}

async fn a_link_that_is_held_back_ends_when_the_gateway_drains(on: Database) {
    let gateway = on.gateway_with(hold_long).await;
    let (mut link, _) = Link::open(&TestDevice::new(&gateway.channel(), "pump-1"), 0).await;
    for sequence in [1, 2] {
        link.send_batch(sequence, eleven_readings(sequence)).await;
    }
    link.acknowledged(1).await;
    is_held_back(&gateway).await;
    gateway.begin_stop();
    let last = link.next().await;
    assert!(matches!(last, connect_response::Message::Draining(_)), "it was held back until the second was taken: {last:?}");
    assert!(gateway.stop().await, "nothing is left that has to be cut off");
}

async fn an_upload_that_is_held_back_ends_when_its_client_goes_away(on: Database) {
    let gateway = on.gateway_with(hold_long).await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let upload = device.upload([1, 2].map(|sequence| (sequence, eleven_readings(sequence))));
    tokio::select! {
        answer = upload => panic!("it was not held back: {answer:?}"),
        () = is_held_back(&gateway) => {}
    }
    assert_given_up(&gateway, &device).await;
}

async fn an_upload_that_is_held_back_ends_when_its_credential_is_revoked(on: Database) {
    let gateway = identity::start_with(on, hold_long).await;
    let root = admin(&gateway);
    identity::device(&root, "pump-1", "berlin").await;
    let (held, other) = (identity::device_token(&root, "pump-1").await, identity::device_token(&root, "pump-1").await);
    let device = TestDevice::new(&with_token(gateway.grpc, &held.1), "pump-1");
    let upload = device.upload([1, 2].map(|sequence| (sequence, eleven_readings(sequence))));
    let (answer, ()) = tokio::join!(upload, async {
        is_held_back(&gateway).await;
        let request = pb::RevokeDeviceCredentialRequest { device: "pump-1".into(), credential: held.0.clone() };
        CredentialServiceClient::new(root.clone()).revoke_device_credential(request).await.expect("revoked");
    });
    let refused = answer.expect_err("its credential is void");
    assert_eq!(StatusFacts::of(&refused).reason(), "CREDENTIAL_REVOKED", "{refused:?}");
    assert_given_up(&gateway, &device.on(&with_token(gateway.grpc, &other.1))).await;
}

async fn an_upload_that_is_held_back_ends_at_its_deadline(on: Database) {
    let deadline = Duration::from_secs(1);
    let gateway = on
        .gateway_with(|config| {
            hold_long(config);
            config.grpc.streaming_deadline_max = deadline;
        })
        .await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload([(1, eleven_readings(1))]).await.expect("the first is taken");
    let refused = device.upload([(2, eleven_readings(2))]).await.expect_err("its deadline comes first");
    assert_eq!(StatusFacts::of(&refused).reason(), "DEADLINE_EXCEEDED", "{refused:?}");
    assert_given_up(&gateway, &device).await;
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
