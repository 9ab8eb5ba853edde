//! Devices whose clocks are off.

use crate::support::{
    TestGateway,
    client::{TestDevice, devices, temperatures},
    database::{Database, on_each_database},
    eventually,
    streams::Link,
};
use std::time::Duration;
use tidegate::{
    client::Channel,
    model::Timestamp,
    pb::{self, connect_request},
};
use tonic::Code;

on_each_database!(readings_show_a_clock_that_is_ahead, times_too_far_ahead_are_rejected_and_those_too_old_too);

const AHEAD: &str = "tidegate_devices_clock_off{direction=\"ahead\"}";
const BEHIND: &str = "tidegate_devices_clock_off{direction=\"behind\"}";

async fn clock_of(channel: &Channel, id: &str) -> Option<pb::ClockOffset> {
    let request = pb::GetDeviceRequest { device: id.into() };
    devices(channel).get_device(request).await.expect("it is there").into_inner().device.expect("set").clock_offset
}

fn seconds(duration: Option<prost_types::Duration>) -> f64 {
    let duration = duration.expect("set");
    duration.seconds as f64 + f64::from(duration.nanos) / 1e9
}

fn in_seconds(seconds: u64) -> i64 {
    Timestamp::now().saturating_add(Duration::from_secs(seconds)).micros()
}

async fn readings_show_a_clock_that_is_ahead(on: Database) {
    let gateway = on.gateway_with(|config| config.devices.clock_offset_max = Duration::from_secs(60)).await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "hasty");
    device.upload([(1, temperatures(in_seconds(0) - 7_200_000_000, &[1.0]))]).await.expect("stored");
    let late = clock_of(&channel, "hasty").await.expect("its reading tells");
    assert!(seconds(late.offset) < -7_000.0 && late.uncertainty.is_none(), "{late:?}");
    assert_eq!(gateway.metric(BEHIND).await, Some(0.0), "its readings may be late");

    device.upload([(2, temperatures(in_seconds(600), &[1.0]))]).await.expect("stored");
    let ahead = clock_of(&channel, "hasty").await.expect("set");
    assert!((500.0..=600.0).contains(&seconds(ahead.offset)) && ahead.uncertainty.is_none(), "{ahead:?}");
    assert_eq!((gateway.metric(AHEAD).await, gateway.metric(BEHIND).await), (Some(1.0), Some(0.0)));

    // What is rejected tells, too: that it is later than is allowed.
    let other = TestDevice::new(&channel, "from-the-future");
    other.upload([(1, temperatures(in_seconds(100_000), &[1.0]))]).await.expect("rejected, which is an answer");
    assert_eq!(seconds(clock_of(&channel, "from-the-future").await.expect("set").offset), 3_600.0);
    assert_eq!(gateway.metric(AHEAD).await, Some(2.0));

    let delete = pb::DeleteDeviceRequest { device: "from-the-future".into(), ..Default::default() };
    devices(&channel).delete_device(delete).await.expect("deleted");
    assert_eq!(gateway.metric(AHEAD).await, Some(1.0));
}

async fn times_too_far_ahead_are_rejected_and_those_too_old_too(on: Database) {
    let gateway = on
        .gateway_with(|config| {
            config.ingest.time_skew_max = Duration::from_secs(300);
            config.ingest.reading_age_max = Duration::from_secs(3_600);
        })
        .await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let old = in_seconds(0) - 7_200_000_000;
    let batches = [(1, in_seconds(0)), (2, in_seconds(600)), (3, old), (4, in_seconds(100))];
    let answer = device.upload(batches.map(|(sequence, time)| (sequence, temperatures(time, &[1.0])))).await.expect("answered");
    let rejected: Vec<_> = answer.rejected.iter().map(|rejected| (rejected.sequence, rejected.reason())).collect();
    assert_eq!(rejected, [(2, pb::RejectReason::TimeInFuture), (3, pb::RejectReason::TimeTooOld)]);
    assert_eq!(device.stored_temperatures().await.len(), 2);
}

/// Answers the Welcome with the times of a clock that is `micros` ahead.
async fn connect_with_clock(device: &TestDevice, micros: i64) -> Link {
    let (link, welcome) = Link::open(device, 0).await;
    let by_its_clock = || Timestamp::from_micros(Timestamp::now().micros() + micros).map(Timestamp::to_proto);
    let sample = pb::ClockSample { server_time: welcome.server_time, receive_time: by_its_clock(), send_time: by_its_clock() };
    link.say(connect_request::Message::ClockSample(sample)).await;
    link
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_on_a_link_shows_its_clock_which_may_be_behind() {
    let gateway = TestGateway::start().await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "slow");
    let measured = async |least: f64, most: f64| {
        eventually("the clocks are compared", || async {
            let clock = clock_of(&channel, "slow").await?;
            let (offset, uncertainty) = (seconds(clock.offset), seconds(clock.uncertainty));
            (offset + uncertainty >= least && offset - uncertainty <= most).then_some(clock)
        })
        .await
    };
    let link = connect_with_clock(&device, -7_200_000_000).await;
    measured(-7_200.0, -7_200.0).await;
    assert_eq!((gateway.metric(AHEAD).await, gateway.metric(BEHIND).await), (Some(0.0), Some(1.0)));
    drop(link);
    let _link = connect_with_clock(&device, 0).await;
    measured(0.0, 0.0).await;
    assert_eq!(gateway.metric(BEHIND).await, Some(0.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_that_is_none_is_refused_and_one_of_another_welcome_has_no_effect() {
    let gateway = TestGateway::start().await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    let (mut link, _) = Link::open(&device, 0).await;
    let now = Some(Timestamp::now().to_proto());
    let foreign = pb::ClockSample { server_time: Some(Timestamp::MIN.to_proto()), receive_time: now, send_time: now };
    link.say(connect_request::Message::ClockSample(foreign)).await;
    link.say(connect_request::Message::ClockSample(pb::ClockSample { receive_time: now, ..Default::default() })).await;
    let refused = link.try_next().await.expect_err("times are missing");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("clock_sample.server_time") && refused.message().contains("clock_sample.send_time"), "{refused:?}");
    assert_eq!(clock_of(&channel, "pump-1").await, None);
}
