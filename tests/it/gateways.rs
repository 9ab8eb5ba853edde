//! Two gateways on one PostgreSQL database: devices and operators may come to either.

use crate::support::{
    TestGateway,
    client::{TestDevice, devices, live, nth_batch, nth_temperatures},
    eventually,
    postgres::{self, PostgresServer},
    soon,
    streams::{Desk, Link, device_target, step},
};
use serde_json::json;
use std::collections::BTreeMap;
use tidegate::client::Channel;
use tidegate::{
    config::DatabaseUrl,
    error::StatusFacts,
    pb::{self, ConfigOutcome, ConfigState, follow_request::Start, follow_response::Message},
};
use tonic::Streaming;

/// Two gateways on an empty database; `None` where there is no PostgreSQL.
async fn two_gateways() -> Option<(TestGateway, TestGateway)> {
    if !postgres::is_there() {
        return None;
    }
    let url = DatabaseUrl::new(PostgresServer::shared().database());
    // At once: only one of them makes the tables.
    Some(tokio::join!(
        TestGateway::start_with(|config| config.storage.url = url.clone()),
        TestGateway::start_with(|config| config.storage.url = url.clone())
    ))
}

async fn follow(channel: &Channel) -> Streaming<pb::FollowResponse> {
    let request = pb::FollowRequest { start: Some(Start::Beginning(true)), ..Default::default() };
    live(channel).follow(request).await.expect("the call begins").into_inner()
}

/// The next `count` batches that a follower is shown: device and bytes.
async fn shown(follower: &mut Streaming<pb::FollowResponse>, count: usize) -> Vec<(String, bytes::Bytes)> {
    let mut shown = Vec::new();
    while shown.len() < count {
        let response = soon("the next message", follower.message()).await.expect("no error").expect("not the end");
        if let Some(Message::Readings(readings)) = response.message {
            shown.push((readings.device, readings.batch));
        }
    }
    shown
}

/// Scenario: devices send to both gateways at once. Guarantee: followers on either see every batch once, each device's in
/// order, and all followers in the same order.
#[tokio::test(flavor = "multi_thread")]
async fn followers_on_either_gateway_see_what_comes_to_both_in_one_order() {
    const DEVICES: usize = 6;
    const BATCHES: u64 = 40;
    let Some((a, b)) = two_gateways().await else { return };
    let (mut on_a, mut on_b) = (follow(&a.channel()).await, follow(&b.channel()).await);
    let sending = (0..DEVICES).map(|index| {
        let gateway = if index % 2 == 0 { &a } else { &b };
        let device = TestDevice::new(&gateway.channel(), &format!("pump-{index}"));
        tokio::spawn(async move {
            for sequence in 1..=BATCHES {
                device.upload_nth([sequence]).await.expect("accepted");
            }
        })
    });
    for device in sending.collect::<Vec<_>>() {
        soon("all is sent", device).await.expect("no panic");
    }
    let all = DEVICES * BATCHES as usize;
    let (seen_on_a, seen_on_b) = tokio::join!(shown(&mut on_a, all), shown(&mut on_b, all));
    assert_eq!(seen_on_a, seen_on_b);
    let mut by_device: BTreeMap<String, Vec<bytes::Bytes>> = BTreeMap::new();
    for (device, batch) in seen_on_a {
        by_device.entry(device).or_default().push(batch);
    }
    let expected: Vec<bytes::Bytes> = (1..=BATCHES).map(nth_batch).collect();
    assert_eq!(by_device.len(), DEVICES);
    assert!(by_device.values().all(|batches| *batches == expected));
}

/// Scenario: a device changes over to the other gateway in mid-stream, and back. Guarantee: nothing is lost, doubled or
/// refused, though each gateway remembers where the stream was when it left.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_moves_to_the_other_gateway_in_mid_stream_and_back() {
    let Some((a, b)) = two_gateways().await else { return };
    let on_a = TestDevice::new(&a.channel(), "pump-1");
    let on_b = on_a.on(&b.channel());
    on_a.upload_nth(1..=3).await.expect("accepted");
    assert_eq!(on_b.position().await, 3);
    on_b.upload_nth(3..=6).await.expect("accepted");
    on_a.upload_nth(5..=9).await.expect("accepted");
    assert_eq!(on_b.upload_nth(8..=12).await.expect("accepted").last_durable_sequence, 12);
    for device in [&on_a, &on_b] {
        assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=12));
    }
    assert_eq!(on_a.ledger().await.stored.map(|tally| tally.batches), Some(12));
    for gateway in [&a, &b] {
        assert_eq!(gateway.metric("tidegate_commit_failures_total").await.unwrap_or(0.0), 0.0, "no conflict is a failure");
    }
}

/// Scenario: the same stream is fed to both gateways at once. Guarantee: each batch is stored once.
#[tokio::test(flavor = "multi_thread")]
async fn one_stream_fed_to_both_gateways_at_once_is_stored_once() {
    const BATCHES: u64 = 60;
    let Some((a, b)) = two_gateways().await else { return };
    let device = TestDevice::new(&a.channel(), "pump-1");
    let feeding = [a.channel(), b.channel(), a.channel(), b.channel()].map(|channel| {
        let device = device.on(&channel);
        tokio::spawn(async move {
            for sequence in 1..=BATCHES {
                device.upload_nth([sequence]).await.expect("stored, or a duplicate");
            }
        })
    });
    for feeder in feeding {
        soon("all is sent", feeder).await.expect("no panic");
    }
    assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=BATCHES));
    let ledger = device.ledger().await;
    assert_eq!(ledger.stored.map(|tally| tally.batches), Some(BATCHES));
    assert_eq!(ledger.duplicate.map(|tally| tally.batches), Some(BATCHES * 3));
}

/// Scenario: an operator at one gateway configures a device that is linked to the other. Guarantee: the device gets it, and its
/// report reaches the operator.
#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_set_at_one_gateway_reaches_a_device_at_the_other_and_its_report_comes_back() {
    let Some((a, b)) = two_gateways().await else { return };
    let (mut link, _) = Link::open(&TestDevice::new(&b.channel(), "pump-1"), 0).await;
    let mut desk = Desk::open(&a.channel()).await;
    desk.set("first", device_target("pump-1"), json!({"n": 1}), "").await;
    assert_eq!(desk.step().await, step("pump-1", 1, ConfigState::Accepted));
    assert_eq!(link.next_config().await, (1, json!({"n": 1})));
    assert_eq!(desk.step().await, step("pump-1", 1, ConfigState::Delivered));
    link.report(1, ConfigOutcome::Applied, "").await;
    assert_eq!(desk.step().await, step("pump-1", 1, ConfigState::Applied));
}

/// Scenario: a device that both gateways know is changed, and then deleted, at one. Guarantee: the other one sees both; what is
/// sent to it for the deleted device is for a new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_and_a_deletion_at_one_gateway_are_seen_at_the_other() {
    let Some((a, b)) = two_gateways().await else { return };
    let on_a = TestDevice::new(&a.channel(), "pump-1");
    let on_b = on_a.on(&b.channel());
    on_a.upload_nth([1]).await.expect("accepted");
    on_b.upload_nth([2]).await.expect("accepted");
    let get = async |channel: &Channel| devices(channel).get_device(pb::GetDeviceRequest { device: "pump-1".into() }).await;
    let device = get(&b.channel()).await.expect("there").into_inner().device.expect("set");
    let changed = pb::Device { display_name: "Pump".into(), etag: device.etag.clone(), ..device.clone() };
    let update = |device| pb::UpdateDeviceRequest { device: Some(device), update_mask: None };
    devices(&a.channel()).update_device(update(changed.clone())).await.expect("changed");
    let stale = devices(&b.channel()).update_device(update(changed)).await.expect_err("its etag is the old one here, too");
    assert_eq!(StatusFacts::of(&stale).reason(), "DEVICE_ETAG_MISMATCH");
    eventually("the other one has the new name", || async {
        let device = get(&b.channel()).await.ok()?.into_inner().device?;
        (device.display_name == "Pump").then_some(())
    })
    .await;

    let delete = pb::DeleteDeviceRequest { device: "pump-1".into(), ..Default::default() };
    devices(&a.channel()).delete_device(delete).await.expect("deleted");
    eventually("it is gone at the other one", || async { get(&b.channel()).await.err() }).await;
    on_b.upload_nth([1]).await.expect("the id is free for a new device");
    assert_eq!(on_b.stored_temperatures().await, nth_temperatures([1]));
    assert_eq!(on_a.stored_temperatures().await, nth_temperatures([1]), "and both know the new one");
}
