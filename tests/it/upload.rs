//! Upload: what is acknowledged is stored exactly once, and what can't be stored is told.

use crate::support::{
    client::{SECOND, T0, TestDevice, column, devices, encode, frame, nth_batch, nth_temperatures, temperatures},
    database::{Database, on_each_database},
    eventually,
};
use tidegate::{
    error::StatusFacts,
    model::columns::Values,
    pb::{self, MissingCause, RejectReason},
};
use tonic::Code;

on_each_database!(
    what_is_acknowledged_is_stored_and_what_comes_again_is_not_stored_again,
    a_hole_is_refused_with_the_sequence_that_is_expected_and_what_is_before_it_is_stored,
    sequences_that_the_device_lost_close_the_hole_and_are_accounted_for,
    a_device_that_says_it_lost_more_than_there_can_be_harms_nobody,
    what_waits_for_its_commit_is_pending,
    what_is_missing_is_told_by_its_sequences_and_as_awaited_until_it_comes,
    a_batch_that_can_never_be_stored_is_told_counted_and_does_not_block_those_behind_it,
    what_comes_behind_old_readings_is_backlog,
    nan_is_stored_where_the_sensor_allows_it,
    every_violation_of_a_request_is_told_at_once,
    one_stream_fed_from_many_connections_at_once_is_stored_once,
    of_two_readings_of_one_time_the_later_stored_wins,
    all_kinds_of_values_come_back_as_they_went_in,
);

async fn what_is_acknowledged_is_stored_and_what_comes_again_is_not_stored_again(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    assert_eq!(device.position().await, 0);

    let first = device.upload_nth(1..=5).await.expect("accepted");
    assert_eq!(first.last_durable_sequence, 5);
    assert_eq!(first.accepted, Some(pb::Tally { batches: 5, readings: 50 }));

    let again = device.upload_nth(3..=7).await.expect("accepted");
    assert_eq!(again.last_durable_sequence, 7);
    assert_eq!(again.duplicate, Some(pb::Tally { batches: 3, readings: 30 }));
    assert_eq!(again.accepted, Some(pb::Tally { batches: 2, readings: 20 }));

    let late = device.upload_nth(1..=2).await.expect("accepted");
    assert_eq!(late.last_durable_sequence, 7, "the stream's place, not that of the call's batches");
    assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=7));

    let gateway = gateway.restart().await;
    let device = device.on(&gateway.channel());
    assert_eq!(device.position().await, 7);
    assert_eq!(device.upload_nth(7..=8).await.expect("accepted").duplicate, Some(pb::Tally { batches: 1, readings: 10 }));
    let ledger = device.ledger().await;
    assert_eq!(ledger.stored, Some(pb::Tally { batches: 8, readings: 80 }));
    assert_eq!(ledger.duplicate, Some(pb::Tally { batches: 6, readings: 60 }));
    assert!(gateway.stop().await);
}

async fn a_hole_is_refused_with_the_sequence_that_is_expected_and_what_is_before_it_is_stored(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let status = device.upload_nth([1, 2, 5, 6]).await.expect_err("3 is missing");
    assert_eq!(status.code(), Code::FailedPrecondition);
    let info = StatusFacts::of(&status).info.expect("ErrorInfo");
    assert_eq!((info.reason.as_str(), info.metadata["expected_sequence"].as_str()), ("SEQUENCE_GAP", "3"));
    assert_eq!(device.position().await, 2);

    let new = TestDevice::new(&gateway.channel(), "pump-2");
    let status = new.upload_nth([2]).await.expect_err("a stream begins with 1");
    assert_eq!(StatusFacts::of(&status).info.expect("ErrorInfo").metadata["expected_sequence"], "1");
    assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=2));
}

async fn sequences_that_the_device_lost_close_the_hole_and_are_accounted_for(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload_nth([1]).await.expect("accepted");
    let after_loss = pb::UploadRequest { lost_batches: 3, lost_readings: 30, ..device.request(5, nth_batch(5)) };
    let too_little = pb::UploadRequest { lost_batches: 2, ..after_loss.clone() };
    assert_eq!(device.upload_requests(vec![too_little]).await.expect_err("2 is still missing").code(), Code::FailedPrecondition);
    let response = device.upload_requests(vec![after_loss.clone(), after_loss]).await.expect("accepted");
    assert_eq!((response.last_durable_sequence, response.duplicate.map(|tally| tally.batches)), (5, Some(1)));
    assert_eq!(device.ledger().await.lost, Some(pb::Tally { batches: 3, readings: 30 }));
}

/// Sums of what devices say must not be what stops the writer for everybody.
async fn a_device_that_says_it_lost_more_than_there_can_be_harms_nobody(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let all = i64::MAX as u64;
    let lossy = |sequence| pb::UploadRequest { lost_batches: 1, lost_readings: all, ..device.request(sequence, nth_batch(sequence)) };
    device.upload_requests(vec![lossy(2), lossy(4), lossy(6)]).await.expect("accepted");
    device.upload_requests(vec![lossy(8)]).await.expect("accepted");
    assert_eq!(device.ledger().await.lost, Some(pb::Tally { batches: 4, readings: all }));
    let too_many = pb::UploadRequest { lost_readings: all + 1, ..lossy(10) };
    assert_eq!(device.upload_requests(vec![too_many]).await.expect_err("out of range").code(), Code::InvalidArgument);
    TestDevice::new(&gateway.channel(), "pump-2").upload_nth([1]).await.expect("accepted");
}

/// Scenario: the database takes no write for a while. Guarantee: what waits is pending in the ledger, until it is stored.
async fn what_waits_for_its_commit_is_pending(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload_nth([1]).await.expect("accepted");
    assert_eq!(device.ledger().await.pending, Some(pb::Tally::default()));

    let held = gateway.hold_writes().await;
    let (uploaded, pending) = tokio::join!(
        // On a slow machine the gateway may give up the write before all is seen.
        eventually("it is stored", || async { device.upload_nth([2, 3]).await.ok() }),
        async {
            let pending = eventually("it waits", || async { device.ledger().await.pending.filter(|pending| pending.batches > 0) }).await;
            drop(held);
            pending
        }
    );
    assert_eq!(pending.readings, pending.batches * 10);
    assert_eq!(uploaded.last_durable_sequence, 3);
    let ledger = device.ledger().await;
    assert_eq!(ledger.stored, Some(pb::Tally { batches: 3, readings: 30 }));
    assert_eq!(ledger.pending, Some(pb::Tally::default()), "who was answered finds nothing waiting");
}

async fn what_is_missing_is_told_by_its_sequences_and_as_awaited_until_it_comes(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let missing = async |device: &TestDevice| {
        let ledger = device.ledger().await;
        let stream_id = device.request(1, nth_batch(1)).stream_id;
        assert!(ledger.missing.iter().all(|range| range.stream_id == stream_id));
        let ranges = ledger.missing.iter().map(|range| (range.first_sequence, range.last_sequence, range.cause()));
        (ranges.collect::<Vec<_>>(), ledger.missing_truncated)
    };
    device.upload_nth([3]).await.expect_err("a stream begins with 1");
    assert_eq!(missing(&device).await, (vec![(1, 2, MissingCause::Awaited)], false), "also of a stream that has nothing stored");
    device.upload_nth([1, 5]).await.expect_err("2 is missing");
    assert_eq!(missing(&device).await, (vec![(2, 4, MissingCause::Awaited)], false));
    device.upload_nth([2, 3]).await.expect("accepted");
    assert_eq!(missing(&device).await, (vec![(4, 4, MissingCause::Awaited)], false));
    let after_loss = pb::UploadRequest { lost_batches: 3, ..device.request(7, nth_batch(7)) };
    device.upload_requests(vec![after_loss]).await.expect("accepted");
    assert_eq!(missing(&device).await, (vec![(4, 6, MissingCause::Lost)], false));

    let gateway = gateway.restart().await;
    let device = device.on(&gateway.channel());
    assert_eq!(missing(&device).await, (vec![], true), "how much is lost is stored, which sequences are not");
    let after_loss = pb::UploadRequest { lost_batches: 1, ..device.request(9, nth_batch(9)) };
    device.upload_requests(vec![after_loss]).await.expect("accepted");
    assert_eq!(missing(&device).await, (vec![(8, 8, MissingCause::Lost)], true));
}

async fn a_batch_that_can_never_be_stored_is_told_counted_and_does_not_block_those_behind_it(on: Database) {
    let gateway = on.gateway_with(|config| config.devices.sensors_max = 2).await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let one = |columns| encode(vec![frame(T0, columns)]);
    let bad = [
        (one(vec![column("t", "Cel", Values::Int64(vec![1]))]), RejectReason::KindChanged),
        (one(vec![column("t", "K", Values::Double(vec![1.0]))]), RejectReason::UnitChanged),
        (one(vec![column("t", "Cel", Values::Double(vec![f64::NAN]))]), RejectReason::NonFinite),
        (one(vec![column("u", "", Values::Bool(vec![true])), column("v", "", Values::Bool(vec![true]))]), RejectReason::TooManySensors),
        (temperatures(i64::MAX, &[1.0]), RejectReason::TimeInFuture),
        (encode(vec![]), RejectReason::Empty),
        (bytes::Bytes::from_static(b"\xff\xff"), RejectReason::Malformed),
    ];
    let mut batches = vec![(1, nth_batch(1))];
    batches.extend((2..).zip(bad.iter().map(|(batch, _)| batch.clone())));
    batches.push((9, nth_batch(9)));
    let response = device.upload(batches).await.expect("the call does not fail");
    assert_eq!(response.accepted, Some(pb::Tally { batches: 2, readings: 20 }));
    assert_eq!(response.last_durable_sequence, 9);
    let told: Vec<(u64, RejectReason)> = response.rejected.iter().map(|rejected| (rejected.sequence, rejected.reason())).collect();
    assert_eq!(told, (2..).zip(bad.iter().map(|(_, reason)| *reason)).collect::<Vec<_>>());
    assert!(response.rejected.iter().all(|rejected| !rejected.message.is_empty()));
    assert_eq!(response.rejected[0].field, "frames[0].columns[0]");
    assert_eq!(response.rejected_counts.iter().map(|count| count.batches).sum::<u64>(), 7);

    let again = device.upload([(2, bad[0].0.clone())]).await.expect("answered");
    assert_eq!(again.duplicate.map(|tally| tally.batches), Some(1), "a rejected batch has used its sequence");

    let gateway = gateway.restart().await;
    let device = device.on(&gateway.channel());
    let ledger = device.ledger().await;
    assert_eq!((ledger.stored.map(|tally| tally.batches), ledger.rejected.len()), (Some(2), 7));
    assert_eq!(device.stored_temperatures().await, nth_temperatures([1, 9]));
}

/// Scenario: a device sends what it kept, and goes on with what it measures now. Guarantee: what comes behind old readings is admitted as
/// backlog, what comes behind new ones is not, and the order of the stream stays.
async fn what_comes_behind_old_readings_is_backlog(on: Database) {
    let gateway = on.gateway_with(|config| config.ingest.backlog_age = std::time::Duration::from_secs(3600)).await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let backlog = async || gateway.metric("tidegate_backlog_batches_total").await.unwrap_or_default();
    let now = tidegate::model::Timestamp::now().micros();
    let fresh = |sequence: u64| (sequence, temperatures(now + sequence as i64 * SECOND, &[1.0]));
    device.upload((1..=100).map(fresh)).await.expect("accepted");
    assert_eq!(backlog().await, 0.0);
    // More than one run takes.
    device.upload_nth(101..=1_500).await.expect("accepted");
    let old = backlog().await;
    assert!(0.0 < old && old < 1_400.0, "all but the first run of the call: {old}");
    device.upload((1_501..=1_600).map(fresh)).await.expect("accepted");
    assert_eq!(backlog().await, old, "a new call begins as a live one");
    assert_eq!(device.ledger().await.stored.map(|tally| tally.batches), Some(1_600));
}

async fn nan_is_stored_where_the_sensor_allows_it(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let of_kind = |kind| pb::Sensor { name: "t".into(), kind, allow_non_finite: true, ..Default::default() };
    let mut operator = devices(&gateway.channel());
    operator
        .create_device(pb::CreateDeviceRequest { device: Some(pb::Device { id: "pump-1".into(), ..Default::default() }) })
        .await
        .expect("created");
    let request = |sensor, allow_missing| pb::UpdateSensorRequest { device: "pump-1".into(), sensor: Some(sensor), allow_missing };
    let missing = operator.update_sensor(request(of_kind(1), false)).await.expect_err("there is no such sensor yet");
    assert_eq!(StatusFacts::of(&missing).reason(), "SENSOR_NOT_FOUND");
    assert_eq!(operator.update_sensor(request(of_kind(2), true)).await.expect_err("an int64 has no NaN").code(), Code::InvalidArgument);
    operator.update_sensor(request(of_kind(1), true)).await.expect("registered");

    let response = device.upload([(1, temperatures(T0, &[1.0, f64::NAN, f64::NEG_INFINITY]))]).await.expect("answered");
    assert_eq!(response.accepted.map(|tally| tally.readings), Some(3), "{response:?}");
    let stored = device.stored_temperatures().await;
    assert!(stored[1].1.is_nan() && stored[2] == (T0 + 2 * SECOND, f64::NEG_INFINITY));
}

async fn every_violation_of_a_request_is_told_at_once(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let bad = pb::UploadRequest { device: "no/good".into(), stream_id: vec![1].into(), sequence: 0, ..device.request(1, nth_batch(1)) };
    let status = device.upload_requests(vec![bad]).await.expect_err("bad");
    assert_eq!(status.code(), Code::InvalidArgument);
    let fields: Vec<String> = StatusFacts::of(&status).violations.into_iter().map(|violation| violation.field).collect();
    assert_eq!(fields, ["device", "stream_id", "sequence"]);

    let other = pb::UploadRequest { device: "pump-2".into(), ..device.request(2, nth_batch(2)) };
    let status = device.upload_requests(vec![device.request(1, nth_batch(1)), other]).await.expect_err("two devices in one call");
    assert_eq!(StatusFacts::of(&status).violations[0].field, "device");
    assert_eq!(device.upload_requests(vec![]).await.expect_err("nothing at all").code(), Code::InvalidArgument);
}

async fn one_stream_fed_from_many_connections_at_once_is_stored_once(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let feeds: Vec<_> = (0..8)
        .map(|_| {
            let feed = device.on(&gateway.channel());
            // A feed that is ahead of the others' commits gets a gap; it goes on from where it is told to.
            tokio::spawn(async move {
                while feed.position().await < 40 {
                    let next = feed.position().await + 1;
                    let _ = feed.upload_nth(next..=40.min(next + 9)).await;
                }
            })
        })
        .collect();
    for feed in feeds {
        crate::support::soon("all feeds are done", feed).await.expect("no panic");
    }
    assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=40));
    assert_eq!(device.ledger().await.stored, Some(pb::Tally { batches: 40, readings: 400 }));
}

async fn of_two_readings_of_one_time_the_later_stored_wins(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let twice = pb::Frame { time_deltas_us: vec![0, SECOND], ..frame(T0, vec![column("t", "Cel", Values::Double(vec![1.0, 2.0, 3.0]))]) };
    device.upload([(1, encode(vec![twice])), (2, temperatures(T0 + SECOND, &[4.0]))]).await.expect("accepted");
    assert_eq!(device.stored_temperatures().await, [(T0, 2.0), (T0 + SECOND, 4.0)]);
}

async fn all_kinds_of_values_come_back_as_they_went_in(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let columns = [
        ("bool", Values::Bool(vec![true, false])),
        ("double", Values::Double(vec![-0.0, f64::MIN_POSITIVE])),
        ("int64", Values::Int64(vec![i64::MIN, i64::MAX])),
        ("text", Values::Text(vec![String::new(), "läuft ✓".into()])),
    ];
    let all = columns.iter().map(|(name, values)| column(name, "", values.clone())).collect();
    device.upload([(1, encode(vec![frame(T0, all)]))]).await.expect("accepted");
    let stored = device.stored().await;
    for (name, values) in columns {
        assert_eq!(stored[name], (vec![T0, T0 + SECOND], values));
    }
}
