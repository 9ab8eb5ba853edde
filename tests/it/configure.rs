//! Configure: an operator sets configurations, and watches devices take them.

use crate::support::{
    client::{TestDevice, configs, devices},
    database::{Database, on_each_database},
    soon,
    streams::{Desk, Link, create, device_target, step},
};
use serde_json::{Value, json};
use tidegate::{
    error::StatusFacts,
    pb::{self, ConfigOutcome, ConfigState, configure_response, set_config, watch_config},
};
use tonic::Code;

on_each_database!(
    a_configuration_is_accepted_delivered_and_applied_and_the_operator_sees_each_step,
    a_device_made_again_under_its_id_gets_a_revision_that_it_has_never_seen,
    an_etag_that_is_not_current_and_a_device_that_is_not_there_are_refused,
    a_request_that_is_sent_twice_is_carried_out_once,
    a_selector_sets_all_that_match_and_a_watch_sees_where_they_stand_and_what_comes,
    every_request_has_an_end_that_counts_its_devices,
    a_desk_watches_a_limited_number_of_selectors,
    a_stop_interrupts_a_request_for_many_devices,
);

async fn a_configuration_is_accepted_delivered_and_applied_and_the_operator_sees_each_step(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    let (mut link, _) = Link::open(&device, 0).await;
    let mut desk = Desk::open(&channel).await;
    desk.set("first", device_target("pump-1"), json!({"interval": 60, "on": true}), "").await;
    assert_eq!(desk.step().await, step("pump-1", 1, ConfigState::Accepted));
    assert_eq!(link.next_config().await, (1, json!({"interval": 60, "on": true})));
    assert_eq!(desk.step().await, step("pump-1", 1, ConfigState::Delivered));
    link.report(1, ConfigOutcome::Applied, "").await;
    assert_eq!(desk.step().await, step("pump-1", 1, ConfigState::Applied));

    desk.set("second", device_target("pump-1"), json!({"interval": -1}), "r1").await;
    assert_eq!(desk.step().await, step("pump-1", 2, ConfigState::Accepted));
    link.next_config().await;
    assert_eq!(desk.step().await, step("pump-1", 2, ConfigState::Delivered));
    link.report(2, ConfigOutcome::Rejected, "interval must be positive").await;
    let rejected = desk.event().await;
    assert_eq!((rejected.state(), rejected.detail.as_str()), (ConfigState::Rejected, "interval must be positive"));
    assert_eq!(rejected.request_id, "second");

    let state = configs(&channel).get_config(pb::GetConfigRequest { device: "pump-1".into() }).await.expect("set").into_inner();
    let state = state.config.expect("set");
    assert_eq!((state.state(), state.applied_revision, state.desired.expect("set").revision), (ConfigState::Rejected, 1, 2));

    // Applied at first, then given up.
    desk.set("third", device_target("pump-1"), json!({}), "").await;
    link.next_config().await;
    link.report(3, ConfigOutcome::Applied, "").await;
    while desk.step().await != step("pump-1", 3, ConfigState::Applied) {}
    link.report(3, ConfigOutcome::Reverted, "lost the network").await;
    assert_eq!(desk.step().await, step("pump-1", 3, ConfigState::Reverted));
    let state = configs(&channel).get_config(pb::GetConfigRequest { device: "pump-1".into() }).await.expect("set").into_inner();
    assert_eq!(state.config.expect("set").applied_revision, 1, "it is back at what it had applied before");
}

/// Scenario: a device is deleted, and one with its id is made that gets another configuration. Guarantee: the device in the
/// field, which remembers the old one's revision, gets the new one.
async fn a_device_made_again_under_its_id_gets_a_revision_that_it_has_never_seen(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    create(&channel, "pump-1", &[]).await;
    let mut desk = Desk::open(&channel).await;
    desk.set("old", device_target("pump-1"), json!({"n": "old"}), "").await;
    let old = desk.event().await;
    let request = pb::DeleteDeviceRequest { device: "pump-1".into(), ..Default::default() };
    devices(&channel).delete_device(request).await.expect("deleted");
    create(&channel, "pump-1", &[]).await;

    desk.set("stale", device_target("pump-1"), json!({}), &old.etag).await;
    assert_eq!(desk.refusal().await.reason, "CONFIG_ETAG_MISMATCH");
    desk.set("new", device_target("pump-1"), json!({"n": "new"}), "").await;
    assert_eq!(desk.step().await, step("pump-1", old.revision + 1, ConfigState::Accepted));
    let (mut link, _) = Link::open(&TestDevice::new(&channel, "pump-1"), old.revision).await;
    assert_eq!(link.next_config().await, (old.revision + 1, json!({"n": "new"})));
}

async fn an_etag_that_is_not_current_and_a_device_that_is_not_there_are_refused(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    create(&channel, "pump-1", &[]).await;
    let mut desk = Desk::open(&channel).await;
    desk.set("a", device_target("pump-1"), json!({"n": 1}), "r7").await;
    let refusal = desk.refusal().await;
    assert_eq!((refusal.reason.as_str(), refusal.current_etag.as_str()), ("CONFIG_ETAG_MISMATCH", ""));
    desk.set("b", device_target("pump-1"), json!({"n": 1}), "").await;
    let etag = desk.event().await.etag;
    desk.set("c", device_target("pump-1"), json!({"n": 2}), &etag).await;
    desk.event().await;
    desk.set("d", device_target("pump-1"), json!({"n": 3}), &etag).await;
    assert_eq!(desk.refusal().await.current_etag, "r2");
    desk.set("e", device_target("pump-9"), json!({}), "").await;
    assert_eq!(desk.refusal().await.reason, "DEVICE_NOT_FOUND");
    desk.set("", device_target("pump 1"), Value::Null, "").await;
    let refusal = desk.refusal().await;
    assert_eq!(refusal.reason, "INVALID_ARGUMENT");
    assert!(refusal.message.contains("set.request_id") && refusal.message.contains("set.device") && refusal.message.contains("set.config"));
    desk.set("f", device_target("pump-1"), json!({"text": "x".repeat(70_000)}), "").await;
    assert_eq!(desk.refusal().await.reason, "CONFIG_TOO_LARGE");
    desk.set("g", set_config::Target::LabelSelector(String::new()), json!({}), "").await;
    assert_eq!(desk.refusal().await.reason, "INVALID_ARGUMENT", "an empty selector would be everything");
    let missing = configs(&channel).get_config(pb::GetConfigRequest { device: "pump-9".into() }).await.expect_err("no such device");
    assert_eq!(missing.code(), Code::NotFound);
}

async fn a_request_that_is_sent_twice_is_carried_out_once(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    create(&channel, "pump-1", &[]).await;
    let mut desk = Desk::open(&channel).await;
    desk.set("same", device_target("pump-1"), json!({"n": 1}), "").await;
    desk.set("same", device_target("pump-1"), json!({"n": 1}), "").await;
    assert_eq!(desk.step().await, step("pump-1", 1, ConfigState::Accepted));
    assert_eq!(desk.step().await, step("pump-1", 1, ConfigState::Accepted));
    desk.set("other", device_target("pump-1"), json!({"n": 2}), "").await;
    assert_eq!(desk.step().await, step("pump-1", 2, ConfigState::Accepted));
}

async fn a_selector_sets_all_that_match_and_a_watch_sees_where_they_stand_and_what_comes(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    for (id, site) in [("a", "berlin"), ("b", "paris"), ("c", "berlin")] {
        create(&channel, id, &[("site", site)]).await;
    }
    let mut desk = Desk::open(&channel).await;
    desk.set("all", set_config::Target::LabelSelector("site=berlin".into()), json!({"n": 1}), "").await;
    assert_eq!(desk.step().await, step("a", 1, ConfigState::Accepted));
    assert_eq!(desk.step().await, step("c", 1, ConfigState::Accepted));
    assert_eq!(desk.done().await, ("all".to_owned(), 2, 0));

    let mut watcher = Desk::open(&channel).await;
    watcher.watch(watch_config::Target::LabelSelector(String::new())).await;
    assert_eq!(watcher.step().await, step("a", 1, ConfigState::Accepted));
    assert_eq!(watcher.step().await, step("c", 1, ConfigState::Accepted));
    assert!(matches!(watcher.next().await, configure_response::Message::WatchStarted(_)));
    let (mut link, _) = Link::open(&TestDevice::new(&channel, "c"), 0).await;
    link.next_config().await;
    assert_eq!(watcher.step().await, step("c", 1, ConfigState::Delivered));
    desk.set("b", device_target("b"), json!({"n": 2}), "").await;
    assert_eq!(watcher.step().await, step("b", 1, ConfigState::Accepted));
}

async fn every_request_has_an_end_that_counts_its_devices(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    create(&channel, "a", &[("site", "berlin")]).await;
    let mut desk = Desk::open(&channel).await;
    desk.set("one", device_target("a"), json!({}), "").await;
    assert_eq!(desk.step().await, step("a", 1, ConfigState::Accepted));
    assert_eq!(desk.done().await, ("one".to_owned(), 1, 0));
    desk.set("none", set_config::Target::LabelSelector("site=paris".into()), json!({}), "").await;
    assert_eq!(desk.done().await, ("none".to_owned(), 0, 0));
    desk.set("missing", device_target("b"), json!({}), "").await;
    assert_eq!(desk.refusal().await.device, "b");
    assert_eq!(desk.done().await, ("missing".to_owned(), 0, 1));
    desk.set("large", set_config::Target::LabelSelector("site=berlin".into()), json!({"text": "x".repeat(70_000)}), "").await;
    assert_eq!(desk.refusal().await.device, "a");
    assert_eq!(desk.done().await, ("large".to_owned(), 0, 1));
    desk.set("wrong", device_target("pump 1"), json!({}), "").await;
    assert_eq!(desk.refusal().await.device, "");
    assert_eq!(desk.done().await, ("wrong".to_owned(), 0, 0));

    // It has only set, and tried to watch what is not there: nothing keeps it.
    desk.watch(watch_config::Target::Device("b".into())).await;
    assert_eq!(desk.refusal().await.reason, "DEVICE_NOT_FOUND");
    desk.close().await;
}

async fn a_desk_watches_a_limited_number_of_selectors(on: Database) {
    let gateway = on.gateway().await;
    let mut desk = Desk::open(&gateway.channel()).await;
    for number in 0..16 {
        desk.watch(watch_config::Target::LabelSelector(format!("site=s{number}"))).await;
        assert!(matches!(desk.next().await, configure_response::Message::WatchStarted(_)));
    }
    desk.watch(watch_config::Target::LabelSelector("site=s16".into())).await;
    let refusal = desk.refusal().await;
    assert_eq!(refusal.reason, "INVALID_ARGUMENT");
    assert!(refusal.message.contains("watch.label_selector: this stream watches 16 selectors"), "{}", refusal.message);
    desk.watch(watch_config::Target::LabelSelector("site=s3".into())).await;
    assert!(matches!(desk.next().await, configure_response::Message::WatchStarted(_)), "it is watched already");
}

/// Scenario: the gateway is stopped while it sets the configuration of many devices. Guarantee: it does not go on to the last
/// of them first; the operator, told so, sends the request again elsewhere.
async fn a_stop_interrupts_a_request_for_many_devices(on: Database) {
    const DEVICES: usize = 200;
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    for number in 0..DEVICES {
        create(&channel, &format!("d-{number}"), &[("site", "berlin")]).await;
    }
    let mut desk = Desk::open(&channel).await;
    desk.set("many", set_config::Target::LabelSelector("site=berlin".into()), json!({}), "").await;
    desk.event().await;
    gateway.begin_stop();
    let mut accepted = 1;
    let status = loop {
        match soon("the next message", desk.down.message()).await {
            Ok(Some(pb::ConfigureResponse { message: Some(configure_response::Message::Event(_)) })) => accepted += 1,
            Ok(other) => panic!("not an event: {other:?}"),
            Err(status) => break status,
        }
    };
    assert_eq!(StatusFacts::of(&status).reason(), "DRAINING");
    assert!(accepted < DEVICES, "{accepted} were set");
    assert!(gateway.stop().await);
}
