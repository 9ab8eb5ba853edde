//! Follow: the past that was asked for, a marker, then live; each reading once, in order, however slow the follower.

use crate::support::{
    client::{SECOND, T0, TestDevice, column, devices, encode, frame, live, nth_batch, nth_temperatures},
    database::{Database, on_each_database},
    soon,
};
use tidegate::client::Channel;
use tidegate::{
    error::StatusFacts,
    model::{batch::decode_stored, columns::Values},
    pb::{self, follow_request::Start, follow_response::Message},
};
use tonic::{Code, Status, Streaming};

on_each_database!(
    latest_values_then_the_marker_then_live,
    a_replay_from_the_beginning_and_one_that_was_there_all_along_show_the_same,
    a_token_resumes_without_a_gap_or_a_repetition_also_after_a_restart,
    a_follower_that_is_slow_is_served_from_the_store_and_holds_nobody_up,
    filters_by_device_label_and_sensor,
    a_replay_by_time_begins_with_what_came_in_then,
    silence_is_filled_with_heartbeats_and_a_stop_is_told,
    bad_requests_are_refused_with_every_violation,
    a_cancelled_follower_leaves_nothing_open,
);

/// A follower, and what it was shown.
struct Follower {
    stream: Streaming<pb::FollowResponse>,
    token: String,
}

impl Follower {
    async fn open(channel: &Channel, request: pb::FollowRequest) -> Self {
        let stream = live(channel).follow(request).await.expect("the call begins").into_inner();
        Self { stream, token: String::new() }
    }

    async fn from(channel: &Channel, start: Start) -> Self {
        Self::open(channel, pb::FollowRequest { start: Some(start), ..Default::default() }).await
    }

    async fn try_next(&mut self) -> Result<Option<Message>, Status> {
        let Some(response) = soon("the next message", self.stream.message()).await? else { return Ok(None) };
        if !response.resume_token.is_empty() {
            self.token = response.resume_token;
        }
        Ok(Some(response.message.expect("set")))
    }

    async fn next(&mut self) -> Message {
        self.try_next().await.expect("no error").expect("not the end")
    }

    /// The temperatures of `device` up to `count`, without other messages between them than markers.
    async fn temperatures(&mut self, device: &str, count: usize) -> Vec<(i64, f64)> {
        let mut found = Vec::new();
        while found.len() < count {
            if let Message::Readings(readings) = self.next().await {
                assert_eq!(readings.device, device);
                found.extend(decode(readings.batch));
            }
        }
        found
    }
}

fn decode(batch: bytes::Bytes) -> Vec<(i64, f64)> {
    let columns = decode_stored(batch, |sensor| sensor == "t").expect("a batch");
    let rows = columns.into_iter().flat_map(|column| match column.values {
        Values::Double(values) => column.times.into_iter().zip(values).collect::<Vec<_>>(),
        other => panic!("not temperatures: {other:?}"),
    });
    rows.collect()
}

async fn latest_values_then_the_marker_then_live(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    device.upload_nth(1..=3).await.expect("accepted");
    // After a restart too, though the latest values may not have been written down.
    let gateway = gateway.restart().await;
    let channel = gateway.channel();
    let device = device.on(&channel);

    let mut follower = Follower::open(&channel, pb::FollowRequest::default()).await;
    let Message::Latest(latest) = follower.next().await else { panic!("the latest values come first") };
    assert_eq!(latest.device, "pump-1");
    let frames = latest.batch.expect("set").frames;
    assert_eq!((frames.len(), frames[0].base_time_us, frames[0].columns[0].unit.as_str()), (1, T0 + 39 * SECOND, "Cel"));
    assert!(matches!(follower.next().await, Message::Synced(_)));
    device.upload_nth(4..=5).await.expect("accepted");
    assert_eq!(follower.temperatures("pump-1", 20).await, nth_temperatures(4..=5));
}

async fn a_replay_from_the_beginning_and_one_that_was_there_all_along_show_the_same(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    let mut early = Follower::from(&channel, Start::LiveOnly(true)).await;
    assert!(matches!(early.next().await, Message::Synced(_)));
    device.upload_nth(1..=20).await.expect("accepted");
    assert_eq!(early.temperatures("pump-1", 200).await, nth_temperatures(1..=20));

    let mut late = Follower::from(&channel, Start::Beginning(true)).await;
    assert_eq!(late.temperatures("pump-1", 200).await, nth_temperatures(1..=20));
    assert!(matches!(late.next().await, Message::Synced(_)));
}

async fn a_token_resumes_without_a_gap_or_a_repetition_also_after_a_restart(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    // One by one: what comes in together is shown together.
    for sequence in 1..=10 {
        device.upload_nth([sequence]).await.expect("accepted");
    }
    let mut follower = Follower::from(&gateway.channel(), Start::Beginning(true)).await;
    let mut seen = follower.temperatures("pump-1", 40).await;
    let token = follower.token.clone();
    drop(follower);
    let gateway = gateway.restart().await;
    device.on(&gateway.channel()).upload_nth(11..=12).await.expect("accepted");
    let mut follower = Follower::from(&gateway.channel(), Start::ResumeToken(token)).await;
    seen.extend(follower.temperatures("pump-1", 80).await);
    assert_eq!(seen, nth_temperatures(1..=12));
}

async fn a_follower_that_is_slow_is_served_from_the_store_and_holds_nobody_up(on: Database) {
    // A tail that holds a few batches only: whoever reads slower than these come falls behind it.
    let gateway = on.gateway_with(|config| config.live.tail_bytes_max = 64 << 10).await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    let mut slow = Follower::from(&gateway.channel(), Start::LiveOnly(true)).await;
    assert!(matches!(slow.next().await, Message::Synced(_)));
    // Far more than the tail and the stream's flow-control window hold together, while the follower reads nothing.
    device.upload_nth(1..=3_000).await.expect("accepted: nobody waits for the follower");
    assert_eq!(slow.temperatures("pump-1", 30_000).await, nth_temperatures(1..=3_000));
}

async fn filters_by_device_label_and_sensor(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    for (id, site) in [("a", "berlin"), ("b", "paris"), ("c", "berlin")] {
        let device = pb::Device { id: id.into(), labels: [("site".to_owned(), site.to_owned())].into(), ..Default::default() };
        devices(&channel).create_device(pb::CreateDeviceRequest { device: Some(device) }).await.expect("created");
        let batch = encode(vec![frame(T0, vec![column("t", "", Values::Double(vec![1.0])), column("u", "", Values::Bool(vec![true]))])]);
        TestDevice::new(&channel, id).upload([(1, batch)]).await.expect("accepted");
    }
    let show = async |request: pb::FollowRequest| {
        let mut follower = Follower::open(&channel, pb::FollowRequest { start: Some(Start::Beginning(true)), ..request }).await;
        let mut shown = Vec::new();
        while let Message::Readings(readings) = follower.next().await {
            let sensors = decode_stored(readings.batch, |_| true).expect("a batch");
            shown.extend(sensors.into_iter().map(|column| format!("{}.{}", readings.device, column.sensor)));
        }
        shown
    };
    let all = pb::FollowRequest::default();
    assert_eq!(show(all.clone()).await, ["a.t", "a.u", "b.t", "b.u", "c.t", "c.u"]);
    assert_eq!(show(pb::FollowRequest { devices: vec!["b".into(), "none".into()], ..all.clone() }).await, ["b.t", "b.u"]);
    assert_eq!(
        show(pb::FollowRequest { label_selector: "site=berlin".into(), sensors: vec!["u".into()], ..all.clone() }).await,
        ["a.u", "c.u"]
    );
    assert_eq!(show(pb::FollowRequest { sensors: vec!["v".into()], ..all }).await, [""; 0]);
}

async fn a_replay_by_time_begins_with_what_came_in_then(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    let mut all = Follower::from(&channel, Start::LiveOnly(true)).await;
    assert!(matches!(all.next().await, Message::Synced(_)));
    let mut receive_times = Vec::new();
    for sequence in 1..=5 {
        device.upload([(sequence, nth_batch(sequence))]).await.expect("accepted");
        let Message::Readings(readings) = all.next().await else { panic!("readings") };
        receive_times.push(readings.receive_time.expect("set"));
    }
    let mut later = Follower::from(&channel, Start::ReceiveTime(receive_times[2])).await;
    assert_eq!(later.temperatures("pump-1", 30).await, nth_temperatures(3..=5));
}

async fn silence_is_filled_with_heartbeats_and_a_stop_is_told(on: Database) {
    let gateway = on.gateway().await;
    let second = prost_types::Duration { seconds: 1, nanos: 0 };
    let mut follower =
        Follower::open(&gateway.channel(), pb::FollowRequest { heartbeat_interval: Some(second), ..Default::default() }).await;
    assert!(matches!(follower.next().await, Message::Synced(_)));
    assert!(matches!(follower.next().await, Message::Heartbeat(_)));
    assert!(!follower.token.is_empty(), "a heartbeat says where to resume");
    gateway.begin_stop();
    let status = loop {
        match follower.try_next().await {
            Ok(Some(Message::Heartbeat(_))) => {}
            Ok(other) => panic!("ended with {other:?}"),
            Err(status) => break status,
        }
    };
    assert_eq!((status.code(), StatusFacts::of(&status).reason()), (Code::Unavailable, "DRAINING"));
    assert!(StatusFacts::of(&status).retry_after.is_some());
    assert!(gateway.stop().await, "a follower does not hold up the stop");
}

async fn bad_requests_are_refused_with_every_violation(on: Database) {
    let gateway = on.gateway().await;
    let request = pb::FollowRequest {
        devices: vec!["ok".into(), "not ok".into()],
        label_selector: "=".into(),
        sensors: vec![" x".into()],
        heartbeat_interval: Some(prost_types::Duration { seconds: 0, nanos: 1 }),
        start: Some(Start::ResumeToken("nonsense".into())),
    };
    let status = live(&gateway.channel()).follow(request).await.expect_err("bad");
    let fields: Vec<String> = StatusFacts::of(&status).violations.into_iter().map(|violation| violation.field).collect();
    assert_eq!(fields, ["devices[1]", "label_selector", "sensors[0]", "heartbeat_interval", "resume_token"]);
    for (field, start) in [("latest", Start::Latest(false)), ("live_only", Start::LiveOnly(false)), ("beginning", Start::Beginning(false))]
    {
        let request = pb::FollowRequest { start: Some(start), ..Default::default() };
        let status = live(&gateway.channel()).follow(request).await.expect_err("neither one nor the other");
        let violations = StatusFacts::of(&status).violations;
        assert_eq!(violations.iter().map(|violation| violation.field.as_str()).collect::<Vec<_>>(), [field]);
    }
    let ahead = pb::FollowRequest { start: Some(Start::ResumeToken("t1.ff".into())), ..Default::default() };
    assert_eq!(live(&gateway.channel()).follow(ahead).await.expect_err("nothing is there yet").code(), Code::InvalidArgument);
}

async fn a_cancelled_follower_leaves_nothing_open(on: Database) {
    let gateway = on.gateway().await;
    let mut follower = Follower::open(&gateway.channel(), pb::FollowRequest::default()).await;
    assert!(matches!(follower.next().await, Message::Synced(_)));
    let series = "tidegate_grpc_requests_in_flight{method=\"tidegate.v1.LiveService/Follow\"}";
    assert_eq!(gateway.metric(series).await, Some(1.0));
    drop(follower);
    crate::support::eventually("the gauge is back at zero", || async { (gateway.metric(series).await == Some(0.0)).then_some(()) }).await;
}
