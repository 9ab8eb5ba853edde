//! Devices whose clocks are off.

use crate::support::{
    TestGateway,
    client::{SECOND, T0, TestDevice, column, devices, encode, frame, live, temperatures},
    database::{Database, on_each_database},
    eventually,
    script::Script,
    streams::Link,
};
use bytes::Bytes;
use prost::Message;
use std::{process::Command, time::Duration};
use tidegate::{
    client::Channel,
    config::ClockCorrection,
    error::StatusFacts,
    model::{
        Timestamp,
        columns::{Values, device_times, times_from_deltas},
    },
    pb::{
        self, connect_request, dead_letter_service_client::DeadLetterServiceClient, export_readings_response, follow_response,
        query_readings_response, reading_service_client::ReadingServiceClient,
    },
};
use tonic::Code;

on_each_database!(
    readings_show_a_clock_that_is_ahead,
    times_too_far_ahead_are_rejected_and_those_too_old_too,
    a_clock_that_is_off_is_corrected_as_long_as_it_is,
    without_the_setting_a_clock_that_is_off_is_not_corrected,
    a_gateway_that_starts_again_corrects_when_it_has_measured_again,
    a_device_does_not_say_a_correction_itself,
    a_rejected_batch_keeps_its_correction,
);

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
    let link = Link::open_with_clock(&device, -7_200_000_000).await;
    measured(-7_200.0, -7_200.0).await;
    assert_eq!((gateway.metric(AHEAD).await, gateway.metric(BEHIND).await), (Some(0.0), Some(1.0)));
    drop(link);
    let _link = Link::open_with_clock(&device, 0).await;
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

const CORRECTED: &str = "tidegate_devices_clock_corrected";
const DAY: i64 = 86_400_000_000;

/// A gateway that corrects, and merges at once.
async fn correcting(on: Database) -> TestGateway {
    on.gateway_with(|config| {
        config.devices.clock_correction = ClockCorrection::Measured;
        config.history.unmerged_bytes_max = 1;
    })
    .await
}

/// Of a column the times, and those by the device's clock.
fn times(column: &pb::ReadingColumn) -> Vec<(i64, i64)> {
    let times = times_from_deltas(column.base_time_us, &column.time_deltas_us).expect("in range");
    let own = device_times(&times, &column.clock_corrections_us).expect("as many");
    times.into_iter().zip(own).collect()
}

async fn queried(channel: &Channel, device: &str) -> Vec<(i64, i64)> {
    let request = pb::QueryReadingsRequest { device: device.into(), ..Default::default() };
    let mut answer = ReadingServiceClient::new(channel.clone()).query_readings(request).await.expect("answered").into_inner();
    let mut found = Vec::new();
    while let Some(response) = answer.message().await.expect("no error") {
        if let Some(query_readings_response::Message::Readings(column)) = response.message {
            found.extend(times(&column));
        }
    }
    found
}

async fn exported(channel: &Channel) -> Vec<(i64, i64)> {
    let mut answer = ReadingServiceClient::new(channel.clone()).export_readings(pb::ExportReadingsRequest::default()).await;
    let answer = answer.as_mut().expect("answered").get_mut();
    let mut found = Vec::new();
    while let Some(response) = answer.message().await.expect("no error") {
        if let Some(export_readings_response::Message::Readings(readings)) = response.message {
            found.extend(times(&readings.column.expect("set")));
        }
    }
    found
}

/// What a follower that begins at the beginning is shown until it is live.
async fn followed(channel: &Channel) -> Vec<(i64, i64)> {
    let start = Some(pb::follow_request::Start::Beginning(true));
    let mut stream = live(channel).follow(pb::FollowRequest { start, ..Default::default() }).await.expect("begun").into_inner();
    let mut found = Vec::new();
    loop {
        match stream.message().await.expect("no error").expect("not the end").message {
            Some(follow_response::Message::Readings(live)) => {
                for frame in pb::Batch::decode(live.batch).expect("a batch").frames {
                    let times = times_from_deltas(frame.base_time_us, &frame.time_deltas_us).expect("in range");
                    found.extend(times.into_iter().map(|time| (time, time - frame.clock_correction_us)));
                }
            }
            Some(follow_response::Message::Synced(_)) => return found,
            _ => {}
        }
    }
}

/// The latest value's time and correction, as a follower is shown them at first.
async fn latest(channel: &Channel) -> (i64, i64) {
    let mut stream = live(channel).follow(pb::FollowRequest::default()).await.expect("begun").into_inner();
    match stream.message().await.expect("no error").expect("not the end").message {
        Some(follow_response::Message::Latest(latest)) => {
            let frame = &latest.batch.as_ref().expect("set").frames[0];
            (frame.base_time_us, frame.base_time_us - frame.clock_correction_us)
        }
        other => panic!("not the latest value: {other:?}"),
    }
}

/// Sends a batch on a link; the reasons for which it was rejected.
async fn send(link: &mut Link, sequence: u64, batch: Bytes) -> Vec<pb::RejectReason> {
    link.send_batch(sequence, batch).await;
    let acks = link.acknowledged(sequence).await;
    acks.iter().flat_map(|ack| &ack.rejected).map(|rejected| rejected.reason()).collect()
}

/// The times of a device's readings as they are read back, by which it is checked that all ways show them.
async fn shown_everywhere(channel: &Channel, device: &str) -> Vec<(i64, i64)> {
    let shown = queried(channel, device).await;
    assert_eq!(exported(channel).await, shown);
    let mut followed = followed(channel).await;
    followed.sort_unstable();
    assert_eq!(followed, shown);
    shown
}

/// Scenario: a device a day ahead connects, sends, is set an hour further, and is set right at last. Guarantee: its readings stand under
/// about the time at which they came in, and what stands there less what was added is the time that it sent.
async fn a_clock_that_is_off_is_corrected_as_long_as_it_is(on: Database) {
    let gateway = correcting(on).await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "hasty");
    let (began, mut sent) = (in_seconds(0), Vec::new());
    let mut link = Link::open_with_clock(&device, DAY).await;
    for sequence in 1..=3 {
        let time = in_seconds(0) + DAY;
        sent.extend([time, time + 1_000]);
        let both = encode(vec![pb::Frame {
            time_deltas_us: vec![1_000],
            ..frame(time, vec![column("t", "Cel", Values::Double(vec![1.0, 2.0]))])
        }]);
        assert_eq!(send(&mut link, sequence, both).await, []);
    }
    sent.sort_unstable();
    let shown = shown_everywhere(&channel, "hasty").await;
    assert_eq!(shown.iter().map(|(_, own)| *own).collect::<Vec<_>>(), sent);
    assert_eq!(latest(&channel).await, shown[5]);
    let first = shown[0].0 - shown[0].1;
    assert!((-DAY - 60 * SECOND..=-DAY + 60 * SECOND).contains(&first) && shown.iter().all(|(time, own)| time - own == first), "{shown:?}");
    assert!(shown.iter().all(|(time, _)| (began - 60 * SECOND..in_seconds(60)).contains(time)), "{shown:?}");
    assert_eq!((gateway.metric(CORRECTED).await, gateway.metric(AHEAD).await), (Some(1.0), Some(1.0)));
    let clock = clock_of(&channel, "hasty").await.expect("it is known");
    assert!((seconds(clock.correction) * 1e6 - first as f64).abs() < 1.0, "{clock:?}");

    // By an upload, too; and a clock that is set an hour further is corrected by as much more.
    drop(link);
    device.upload([(4, temperatures(in_seconds(0) + DAY, &[3.0]))]).await.expect("stored");
    let mut link = Link::open_with_clock(&device, DAY + 3_600 * SECOND).await;
    assert_eq!(send(&mut link, 5, temperatures(in_seconds(3_600) + DAY, &[4.0])).await, []);
    let shown = shown_everywhere(&channel, "hasty").await;
    let (set, before): (Vec<_>, Vec<_>) = shown.into_iter().partition(|(_, own)| *own > in_seconds(1_800) + DAY);
    assert_eq!(before.iter().map(|(time, own)| time - own).collect::<Vec<_>>(), [first; 7]);
    assert!(matches!(set[..], [(time, own)] if (-DAY - 3_660 * SECOND..-DAY - 3_540 * SECOND).contains(&(time - own))), "{set:?}");
    // What comes again is a duplicate, whatever it would be corrected by now.
    link.send_batch(4, temperatures(in_seconds(0) + DAY, &[3.0])).await;
    assert_eq!(link.acknowledged(5).await[0].duplicate_batches, 1);
    drop(link);

    let mut link = Link::open_with_clock(&device, 0).await;
    let right = in_seconds(0);
    assert_eq!(send(&mut link, 6, temperatures(right, &[5.0])).await, []);
    assert!(shown_everywhere(&channel, "hasty").await.contains(&(right, right)));
    assert_eq!(gateway.metric(CORRECTED).await, Some(0.0));
    assert_eq!(clock_of(&channel, "hasty").await.expect("it is known").correction, None);
    assert!(gateway.stop().await);
}

async fn without_the_setting_a_clock_that_is_off_is_not_corrected(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "hasty");
    let mut link = Link::open_with_clock(&device, DAY).await;
    assert_eq!(send(&mut link, 1, temperatures(in_seconds(0) + DAY, &[1.0])).await, [pb::RejectReason::TimeInFuture]);
    let behind = TestDevice::new(&gateway.channel(), "slow");
    let mut link = Link::open_with_clock(&behind, -DAY).await;
    let time = in_seconds(0) - DAY;
    assert_eq!(send(&mut link, 1, temperatures(time, &[1.0])).await, []);
    assert_eq!(queried(&gateway.channel(), "slow").await, [(time, time)]);
    assert_eq!(gateway.metric(CORRECTED).await, Some(0.0));
    assert!(gateway.stop().await);
}

async fn a_gateway_that_starts_again_corrects_when_it_has_measured_again(on: Database) {
    let gateway = correcting(on).await;
    let device = TestDevice::new(&gateway.channel(), "slow");
    let mut link = Link::open_with_clock(&device, -DAY).await;
    assert_eq!(send(&mut link, 1, temperatures(in_seconds(0) - DAY, &[1.0])).await, []);
    // The clock was set meanwhile: these would come from the future.
    let right = in_seconds(0);
    assert_eq!(gateway.metric(CORRECTED).await, Some(1.0));
    assert_eq!(send(&mut link, 2, temperatures(right, &[2.0])).await, []);
    assert_eq!(gateway.metric(CORRECTED).await, Some(0.0), "nor is what it sends from now on");
    drop(link);
    let before = shown_everywhere(&gateway.channel(), "slow").await;
    assert_eq!((before.len(), before.contains(&(right, right))), (2, true), "{before:?}");

    let gateway = gateway.restart().await;
    let device = device.on(&gateway.channel());
    assert_eq!(queried(&gateway.channel(), "slow").await, before);
    assert_eq!(latest(&gateway.channel()).await, before[1]);
    let unknown = in_seconds(0) - DAY;
    device.upload([(3, temperatures(unknown, &[3.0]))]).await.expect("stored");
    assert!(queried(&gateway.channel(), "slow").await.contains(&(unknown, unknown)));
    let mut link = Link::open_with_clock(&device, -DAY).await;
    let known = in_seconds(0) - DAY;
    assert_eq!(send(&mut link, 4, temperatures(known, &[4.0])).await, []);
    assert!(queried(&gateway.channel(), "slow").await.iter().any(|(time, own)| *own == known && *time > known));
    assert!(gateway.stop().await);
}

/// A batch that says a correction.
fn forged(value: f64) -> Bytes {
    let frame = frame(in_seconds(0), vec![column("t", "Cel", Values::Double(vec![value]))]);
    encode(vec![pb::Frame { clock_correction_us: 5, ..frame }])
}

async fn a_device_does_not_say_a_correction_itself(on: Database) {
    let gateway = correcting(on).await;
    let device = TestDevice::new(&gateway.channel(), "liar");
    let answer = device.upload([(1, forged(1.0))]).await.expect("answered");
    assert_eq!(answer.rejected[0].reason(), pb::RejectReason::Malformed);
    assert_eq!(answer.rejected[0].field, "frames[0].clock_correction_us");
    let mut link = Link::open_with_clock(&device, DAY).await;
    assert_eq!(send(&mut link, 2, forged(2.0)).await, [pb::RejectReason::Malformed], "nor when it is corrected");
    for letter in kept(&gateway.channel(), "liar").await {
        let refused = replay(&gateway.channel(), "liar", letter).await.expect_err("it says so still");
        assert_eq!(StatusFacts::of(&refused).reason(), "STILL_REJECTED");
    }
    assert_eq!(queried(&gateway.channel(), "liar").await, []);
    assert!(gateway.stop().await);
}

/// The numbers of a device's rejected batches.
async fn kept(channel: &Channel, device: &str) -> Vec<i64> {
    let request = pb::ListDeadLettersRequest { device: device.into(), ..Default::default() };
    let listed = DeadLetterServiceClient::new(channel.clone()).list_dead_letters(request).await.expect("listed").into_inner();
    assert!(!listed.dead_letters.is_empty());
    listed.dead_letters.into_iter().map(|letter| letter.id).collect()
}

async fn replay(channel: &Channel, device: &str, id: i64) -> Result<u64, tonic::Status> {
    let request = pb::ReplayDeadLetterRequest { device: device.into(), id };
    Ok(DeadLetterServiceClient::new(channel.clone()).replay_dead_letter(request).await?.into_inner().stored_readings)
}

/// Scenario: a batch is corrected, and rejected for its values; the gateway starts again, and knows nothing of the device's clock; then
/// the cause is mended. Guarantee: the batch is stored with the correction of then.
async fn a_rejected_batch_keeps_its_correction(on: Database) {
    let gateway = correcting(on).await;
    let device = TestDevice::new(&gateway.channel(), "hasty");
    let mut link = Link::open_with_clock(&device, DAY).await;
    let time = in_seconds(0) + DAY;
    assert_eq!(send(&mut link, 1, temperatures(time, &[f64::NAN])).await, [pb::RejectReason::NonFinite]);
    drop(link);
    let gateway = gateway.restart().await;
    let channel = gateway.channel();
    let sensor = pb::Sensor { name: "t".into(), kind: pb::ValueKind::Double.into(), allow_non_finite: true, ..Default::default() };
    let request = pb::UpdateSensorRequest { device: "hasty".into(), sensor: Some(sensor), allow_missing: true };
    devices(&channel).update_sensor(request).await.expect("updated");
    let letter = kept(&channel, "hasty").await[0];
    assert_eq!(replay(&channel, "hasty", letter).await.expect("mended"), 1);
    let shown = queried(&channel, "hasty").await;
    assert!(shown.len() == 1 && shown[0].1 == time && shown[0].0 < time - DAY + 60 * SECOND, "{shown:?}");
    assert!(gateway.stop().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_show_both_times() {
    let gateway = TestGateway::start_with(|config| config.devices.clock_correction = ClockCorrection::Measured).await;
    let device = TestDevice::new(&gateway.channel(), "slow");
    let mut link = Link::open_with_clock(&device, T0 - in_seconds(0)).await;
    assert_eq!(send(&mut link, 1, temperatures(T0, &[1.5])).await, []);
    let run = async |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        command.args(arguments).args(["--endpoint", &gateway.grpc.to_string()]);
        Script::start(command).succeeds().await
    };
    let exported = run(&["export", "--device-time", "--quiet"]).await;
    let lines: Vec<&str> = exported.lines().collect();
    assert_eq!((lines[0], lines.len()), ("time,device,sensor,unit,value,device_time", 2));
    assert!(lines[1].ends_with(",slow,t,Cel,1.5,2026-01-01T00:00:00.000Z") && !lines[1].starts_with("2026-01-01T"), "{exported}");
    let queried = run(&["query", "slow", "--format", "csv", "--device-time"]).await;
    assert!(queried.trim_end().ends_with(",t,1.5,Cel,2026-01-01T00:00:00.000Z"), "{queried}");
    let followed = run(&["follow", "--json", "--from", "beginning", "--until-live"]).await;
    assert!(followed.contains("\"device_time\":\"2026-01-01T00:00:00.000Z\""), "{followed}");
    let shown = run(&["device", "show", "slow"]).await;
    assert!(shown.contains("behind, ±") && shown.contains("its times are corrected by +"), "{shown}");
    drop(link);
    assert!(gateway.stop().await);
}
