use super::*;
use crate::model::{
    BatchLimits, CheckedBatch,
    batch::{RejectReason, decode_stored},
    columns::Values,
};
use proptest::prelude::*;
use std::time::Duration;

const NOW: i64 = 1_700_000_000_000_000;
const DAY: i64 = 86_400_000_000;

fn frame(base: i64, deltas: &[i64]) -> pb::Frame {
    let values = Values::Int64((0..=deltas.len() as i64).collect());
    let column = |sensor: &str| pb::Column { sensor: sensor.into(), unit: "V".into(), values: Some(values.clone().into()) };
    pb::Frame { base_time_us: base, time_deltas_us: deltas.to_vec(), columns: vec![column("a"), column("b")], ..Default::default() }
}

fn encoded(frames: Vec<pb::Frame>) -> Bytes {
    pb::Batch { frames }.encode_to_vec().into()
}

fn by(micros: i64) -> Correction {
    Correction { micros, latest: Timestamp::from_micros(NOW + 60_000_000).expect("in range") }
}

fn check(bytes: &Bytes, corrected: bool) -> Result<CheckedBatch, RejectReason> {
    let limits = BatchLimits {
        bytes_max: 1 << 20,
        readings_max: 1000,
        sensors_max: 3,
        time_skew_max: Duration::from_secs(3600),
        reading_age_max: Duration::ZERO,
    };
    let now = Timestamp::from_micros(NOW).expect("in range");
    let check = if corrected {
        CheckedBatch::check_corrected(bytes, &limits, now, |_| None)
    } else {
        CheckedBatch::check(bytes, &limits, now, |_| None)
    };
    check.map_err(|reject| reject.reason)
}

#[test]
fn times_are_corrected_and_the_devices_own_are_kept() {
    let sent = encoded(vec![frame(NOW + DAY, &[5, -3]), frame(NOW + DAY - 9, &[])]);
    assert_eq!(check(&sent, false).map(drop), Err(RejectReason::TimeInFuture));
    let corrected = by(-DAY).of(&sent).expect("corrected").batch;
    let checked = check(&corrected, true).expect("good");
    assert_eq!((checked.summary.first_time.micros(), checked.summary.last_time.micros()), (NOW - 9, NOW + 5));
    let columns = decode_stored(corrected, |_| true).expect("a batch");
    let own: Vec<Vec<i64>> =
        columns.iter().map(|column| column.times.iter().map(|time| time - column.clock_correction).collect()).collect();
    assert_eq!(own[0], [NOW + DAY, NOW + DAY + 5, NOW + DAY + 2]);
    assert_eq!(own[2], [NOW + DAY - 9]);
}

#[test]
fn what_would_come_from_the_future_was_not_measured_by_that_clock() {
    let (set, not_yet) = (frame(NOW, &[]), frame(NOW - DAY, &[]));
    assert_eq!(by(DAY).of(&encoded(vec![set.clone()])), None);
    let corrected = by(DAY).of(&encoded(vec![set.clone(), not_yet])).expect("corrected in part");
    assert!(!corrected.whole);
    let frames = pb::Batch::decode(corrected.batch).expect("a batch").frames;
    assert_eq!(frames[0], set);
    assert_eq!((frames[1].base_time_us, frames[1].clock_correction_us), (NOW, DAY));
}

#[test]
fn a_device_does_not_say_a_correction_itself() {
    let forged = encoded(vec![frame(NOW, &[]), pb::Frame { clock_correction_us: 1, ..frame(NOW, &[]) }]);
    assert_eq!(by(-DAY).of(&forged), None);
    assert_eq!(check(&forged, false).map(drop), Err(RejectReason::Malformed));
    let corrected = by(-DAY).of(&encoded(vec![frame(NOW + DAY, &[])])).expect("corrected").batch;
    assert_eq!(by(-DAY).of(&corrected), None, "nor where the gateway writes it");
    assert_eq!(check(&corrected, false).map(drop), Err(RejectReason::Malformed));
    // Behind what the gateway would write in front, a later one would go before it.
    let behind: Bytes = [&[0x0a, 4, 0x18 | 2, 0, 0x20, 2][..]].concat().into();
    assert_eq!(pb::Batch::decode(behind.clone()).expect("a batch").frames[0].clock_correction_us, 1);
    assert_eq!(by(-DAY).of(&behind), None);
}

#[test]
fn times_beyond_all_years_and_what_is_no_batch_are_left_to_be_judged() {
    assert_eq!(by(-DAY).of(&encoded(vec![frame(i64::MIN, &[])])), None);
    assert_eq!(by(DAY).of(&encoded(vec![frame(i64::MAX, &[1])])), None);
    assert_eq!(by(DAY).of(&Bytes::from_static(&[0xff; 9])), None);
    let corrected = by(-DAY).of(&encoded(vec![frame(Timestamp::MIN.micros() + 1, &[])])).expect("it fits").batch;
    assert_eq!(check(&corrected, true).map(drop), Err(RejectReason::TimeTooOld));
}

proptest! {
    /// As decoding, adding and encoding would have it, whichever way it is done.
    #[test]
    fn in_place_is_as_decoded(
        frames in prop::collection::vec((-3_i64..3, prop::collection::vec(-5_i64..5, 0..5)), 1..5),
        days in prop_oneof![-3_i64..0, 1_i64..3],
        micros in 0_i64..1_000_000,
    ) {
        let frames: Vec<pb::Frame> = frames.iter().map(|(day, deltas)| frame(NOW + day * DAY, deltas)).collect();
        let (correction, sent) = (by(days * DAY + micros), encoded(frames.clone()));
        let in_place = correction.in_place(&sent).expect("as encoders write it");
        let decoded = correction.decoded(&sent);
        let read = |corrected: Option<Corrected>| corrected.map(|Corrected { batch, whole }| (pb::Batch::decode(batch).expect("a batch"), whole));
        prop_assert_eq!(read(in_place.clone()), read(decoded));
        let Some(corrected) = in_place else { return Ok(()) };
        // It is read in place again, with the correction.
        let read: Vec<(i64, usize)> = scan::frames(&corrected.batch)
            .map(|frame| {
                let frame = frame.expect("usual");
                let first = frame.times().next().expect("a time").expect("usual");
                (first - frame.clock_correction, frame.columns().filter(Result::is_ok).count())
            })
            .collect();
        prop_assert_eq!(read, frames.iter().map(|frame| (frame.base_time_us, 2)).collect::<Vec<_>>());
    }
}
