use super::*;

const NOW: i64 = 1_700_000_000_000_000;

fn limits() -> BatchLimits {
    BatchLimits {
        bytes_max: 1 << 20,
        readings_max: 1000,
        sensors_max: 3,
        time_skew_max: Duration::from_secs(3600),
        reading_age_max: Duration::ZERO,
    }
}

fn column(sensor: &str, unit: &str, values: Values) -> pb::Column {
    pb::Column { sensor: sensor.into(), unit: unit.into(), values: Some(values.into()) }
}

fn frame(base: i64, deltas: &[i64], columns: Vec<pb::Column>) -> pb::Frame {
    pb::Frame { base_time_us: base, time_deltas_us: deltas.to_vec(), columns, ..Default::default() }
}

fn check(frames: Vec<pb::Frame>) -> Result<CheckedBatch, BatchReject> {
    check_with(&limits(), frames)
}

fn check_with(limits: &BatchLimits, frames: Vec<pb::Frame>) -> Result<CheckedBatch, BatchReject> {
    let bytes = pb::Batch { frames }.encode_to_vec().into();
    CheckedBatch::check(&bytes, limits, Timestamp::from_micros(NOW).expect("in range"), |_| None)
}

/// The sensors of a batch whose device has none yet.
fn new_sensors(checked: &CheckedBatch) -> &BTreeMap<String, SensorUse> {
    let BatchSensors::New(sensors) = &checked.sensors else { panic!("the device has no sensors") };
    sensors
}

#[test]
fn a_good_batch_is_summed_up() {
    let frames = vec![
        frame(
            NOW,
            &[10, -20],
            vec![column("t", "Cel", Values::Double(vec![1.0, 2.0, 3.0])), column("n", "", Values::Int64(vec![1, 2, 3]))],
        ),
        frame(NOW + 10, &[], vec![column("t", "", Values::Double(vec![4.0]))]),
    ];
    let bytes: Bytes = pb::Batch { frames: frames.clone() }.encode_to_vec().into();
    let checked = check(frames).expect("good");
    assert_eq!(checked.summary.readings, 7);
    assert_eq!((checked.summary.first_time.micros(), checked.summary.last_time.micros()), (NOW - 10, NOW + 10));
    let t = &new_sensors(&checked)["t"];
    assert_eq!((t.unit.as_str(), t.kind), ("Cel", ValueKind::Double));

    // The device has them.
    let known = |column: &scan::Column<'_>| Some(KnownSensor { key: i64::from(column.sensor == b"t"), allow_non_finite: false });
    let checked = CheckedBatch::check(&bytes, &limits(), Timestamp::from_micros(NOW).expect("in range"), known).expect("good");
    let BatchSensors::Known(latest) = checked.sensors else { panic!("the device has all sensors") };
    let value_of = |key| latest.iter().find(|reading| reading.sensor_key == key).map(|reading| (reading.time.micros(), &reading.value));
    assert_eq!(value_of(1), Some((NOW + 10, &Value::Double(4.0))), "of one time the later in the batch");
    assert_eq!(value_of(0), Some((NOW + 10, &Value::Int64(2))), "the latest time, not the last row");
    let columns = decode_stored(bytes, |_| true).expect("it was decoded before");
    let read = columns.iter().map(|column| column.latest().map(|(time, value)| (column.sensor.as_str(), time.micros(), value)));
    let expected = [("t", Value::Double(2.0)), ("n", Value::Int64(2)), ("t", Value::Double(4.0))];
    assert!(read.eq(expected.map(|(sensor, value)| Some((sensor, NOW + 10, value)))), "what is stored says the same");
}

#[test]
fn every_fault_of_form_has_its_reason() {
    let t = |values: Vec<f64>| column("t", "Cel", Values::Double(values));
    let cases: Vec<(Vec<pb::Frame>, RejectReason, &str)> = vec![
        (vec![], RejectReason::Empty, ""),
        (vec![frame(NOW, &[], vec![])], RejectReason::Empty, "frames[0]"),
        (vec![frame(NOW, &[], vec![pb::Column { sensor: "t".into(), ..Default::default() }])], RejectReason::Empty, "frames[0].columns[0]"),
        (vec![frame(NOW, &[1], vec![t(vec![1.0])])], RejectReason::LengthMismatch, "frames[0].columns[0]"),
        (vec![frame(NOW, &[], vec![t(vec![])])], RejectReason::LengthMismatch, "frames[0].columns[0]"),
        (vec![frame(NOW, &[], vec![t(vec![1.0]), t(vec![1.0])])], RejectReason::SensorRepeated, "frames[0]"),
        (vec![frame(NOW, &[], vec![column("", "", Values::Double(vec![1.0]))])], RejectReason::SensorNameInvalid, "frames[0].columns[0]"),
        (vec![frame(NOW, &[], vec![column(" t", "", Values::Double(vec![1.0]))])], RejectReason::SensorNameInvalid, "frames[0].columns[0]"),
        (
            vec![frame(NOW, &[], vec![column("t", &"x".repeat(33), Values::Double(vec![1.0]))])],
            RejectReason::UnitInvalid,
            "frames[0].columns[0]",
        ),
        (
            vec![frame(NOW, &[], vec![t(vec![1.0])]), frame(NOW, &[], vec![column("t", "", Values::Bool(vec![true]))])],
            RejectReason::KindChanged,
            "frames[1].columns[0]",
        ),
        (
            vec![frame(NOW, &[], vec![t(vec![1.0])]), frame(NOW, &[], vec![column("t", "K", Values::Double(vec![1.0]))])],
            RejectReason::UnitChanged,
            "frames[1].columns[0]",
        ),
        (
            vec![frame(NOW, &[], (0..4).map(|n| column(&format!("s{n}"), "", Values::Bool(vec![true]))).collect())],
            RejectReason::TooManySensors,
            "frames[0]",
        ),
        (vec![frame(NOW + 3_600_000_001, &[], vec![t(vec![1.0])])], RejectReason::TimeInFuture, "frames[0]"),
        (vec![frame(i64::MAX, &[], vec![t(vec![1.0])])], RejectReason::TimeInFuture, "frames[0]"),
        (vec![frame(i64::MIN, &[], vec![t(vec![1.0])])], RejectReason::TimeTooOld, "frames[0]"),
        (vec![frame(i64::MAX, &[i64::MAX], vec![t(vec![1.0, 2.0])])], RejectReason::TimeTooOld, "frames[0]"),
        (vec![frame(NOW, &[0; 1000], vec![t(vec![1.0; 1001])])], RejectReason::TooLarge, ""),
        (
            vec![frame(NOW, &[], vec![column("t", "", Values::Text(vec!["x".repeat(4097)]))])],
            RejectReason::TextTooLong,
            "frames[0].columns[0]",
        ),
    ];
    for (frames, reason, field) in cases {
        let shown = format!("{frames:?}");
        let found = check(frames).expect_err(&shown);
        assert_eq!((found.reason, found.field.as_str()), (reason, field), "{shown}");
        assert!(!found.message.is_empty());
    }
}

#[test]
fn bytes_that_are_no_batch_are_malformed_and_too_many_are_too_large() {
    let now = Timestamp::from_micros(NOW).expect("in range");
    let found = CheckedBatch::check(&Bytes::from_static(&[0xff; 8]), &limits(), now, |_| None).expect_err("no batch");
    assert_eq!(found.reason, RejectReason::Malformed);
    let small = BatchLimits { bytes_max: 4, ..limits() };
    assert_eq!(
        CheckedBatch::check(&Bytes::from_static(&[0; 5]), &small, now, |_| None).expect_err("too large").reason,
        RejectReason::TooLarge
    );
}

#[test]
fn an_allowed_age_is_enforced_when_set() {
    let young = BatchLimits { reading_age_max: Duration::from_secs(10), ..limits() };
    let at = |time| vec![frame(time, &[], vec![column("t", "", Values::Double(vec![1.0]))])];
    assert!(check_with(&young, at(NOW - 10_000_000)).is_ok());
    assert_eq!(check_with(&young, at(NOW - 10_000_001)).expect_err("old").reason, RejectReason::TimeTooOld);
}

#[test]
fn non_finite_values_are_pointed_at() {
    let checked = check(vec![frame(
        NOW,
        &[1],
        vec![column("t", "", Values::Double(vec![1.0, f64::NAN])), column("u", "", Values::Double(vec![1.0, 2.0]))],
    )])
    .expect("form is good");
    assert_eq!(new_sensors(&checked)["t"].non_finite.as_deref(), Some("frames[0].columns[0]"));
    assert_eq!(new_sensors(&checked)["u"].non_finite, None);
}

#[test]
fn columns_are_decoded_and_filtered() {
    let frames = vec![frame(NOW, &[5], vec![column("a", "", Values::Bool(vec![true, false])), column("b", "", Values::Int64(vec![7, 8]))])];
    let bytes: Bytes = pb::Batch { frames }.encode_to_vec().into();
    let only_b = decode_stored(bytes.clone(), |name| name == "b").expect("a batch");
    assert_eq!(
        only_b,
        [DecodedColumn { sensor: "b".into(), times: vec![NOW, NOW + 5], clock_correction: 0, values: Values::Int64(vec![7, 8]) }]
    );
    let left = retain_columns(bytes.clone(), |name| name == "b").expect("a batch").expect("b is left");
    assert_eq!(decode_stored(left, |_| true).expect("a batch"), only_b);
    assert_eq!(retain_columns(bytes.clone(), |_| true).expect("a batch"), Some(bytes.clone()));
    assert_eq!(retain_columns(bytes, |_| false).expect("a batch"), None);
}

#[test]
fn reasons_have_names_both_ways() {
    assert_eq!(reason_name(RejectReason::NonFinite), "NON_FINITE");
    assert_eq!(reason_from_name("NON_FINITE"), Some(RejectReason::NonFinite));
}

/// What is asked of the two ways to check a batch: in place, where the device has the sensors, and decoded.
mod in_place {
    use super::*;
    use proptest::prelude::*;

    const ROWS_MAX: usize = 4;

    fn values(rows: usize) -> impl Strategy<Value = Values> {
        let doubles = prop_oneof![8 => any::<f64>(), 1 => Just(f64::NAN), 1 => Just(f64::INFINITY), 4 => Just(0.0)];
        prop_oneof![
            prop::collection::vec(doubles, rows).prop_map(Values::Double),
            prop::collection::vec(any::<i64>(), rows).prop_map(Values::Int64),
            prop::collection::vec(any::<bool>(), rows).prop_map(Values::Bool),
            prop::collection::vec(".{0,3}", rows).prop_map(Values::Text),
        ]
    }

    fn frames() -> impl Strategy<Value = Vec<pb::Frame>> {
        let one = (0..ROWS_MAX).prop_flat_map(|deltas| {
            let rows = prop_oneof![9 => Just(deltas + 1), 1 => 0..ROWS_MAX];
            let column = (0..4_usize, 0..2_usize, rows.prop_flat_map(values));
            let columns = prop::collection::vec(column, 0..4);
            (NOW - 5..NOW + 5, prop::collection::vec(-3..3_i64, deltas), columns).prop_map(|(base, deltas, columns)| {
                let columns = columns.into_iter().map(|(name, unit, values)| column_of(name, unit, values)).collect();
                frame(base, &deltas, columns)
            })
        });
        prop::collection::vec(one, 0..4)
    }

    fn column_of(name: usize, unit: usize, values: Values) -> pb::Column {
        // A sensor's kind is part of its name, so that batches agree more often than not.
        column(&format!("{}-{name}", values.kind()), ["", "Cel"][unit], values)
    }

    /// All sensors that the batches above may have, with the unit.
    fn known(column: &scan::Column<'_>) -> Option<KnownSensor> {
        let (kind, number) = std::str::from_utf8(column.sensor).ok()?.split_once('-')?;
        let key = number.parse::<i64>().ok()? + 10 * i64::from(column.values.kind.code());
        let agrees = kind == column.values.kind.as_str() && [b"".as_slice(), b"Cel"].contains(&column.unit);
        agrees.then_some(KnownSensor { key, allow_non_finite: false })
    }

    /// The latest readings as the latest values take them over: of one time the later column.
    fn latest(readings: impl IntoIterator<Item = LatestReading>) -> BTreeMap<i64, (Timestamp, String)> {
        let mut latest = BTreeMap::new();
        for LatestReading { sensor_key, time, value, .. } in readings {
            if latest.get(&sensor_key).is_none_or(|(earlier, _)| *earlier <= time) {
                latest.insert(sensor_key, (time, format!("{value:?}")));
            }
        }
        latest
    }

    fn key(name: &str, kind: ValueKind) -> i64 {
        let number = name.rsplit('-').next().and_then(|number| number.parse::<i64>().ok());
        number.expect("a number") + 10 * i64::from(kind.code())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn both_ways_come_to_the_same(frames in frames()) {
            let bytes: Bytes = pb::Batch { frames }.encode_to_vec().into();
            let now = Timestamp::from_micros(NOW).expect("in range");
            let limits = BatchLimits { sensors_max: 100, time_skew_max: Duration::from_micros(4), ..limits() };
            let decoded = CheckedBatch::check(&bytes, &limits, now, |_| None);
            let in_place = check_in_place(&bytes, false, &limits, now, known);
            match (decoded, in_place) {
                (Ok(decoded), Ok((summary, found))) => {
                    prop_assert_eq!(decoded.summary, summary);
                    let columns = decode_stored(bytes, |_| true).expect("it was decoded before");
                    let read = columns.iter().map(|column| {
                        let (time, value) = column.latest().expect("it has a reading");
                        let sensor_key = key(&column.sensor, column.values.kind());
                        LatestReading { sensor_key, time, clock_correction: column.clock_correction, value }
                    });
                    prop_assert_eq!(latest(read), latest(found));
                }
                // Whether infinities are allowed the decoded check leaves to the registry.
                (Ok(decoded), Err(Unusual)) => {
                    prop_assert!(new_sensors(&decoded).values().any(|used| used.non_finite.is_some()), "a good batch was found unusual");
                }
                (Err(reject), Ok(_)) => prop_assert!(false, "taken in place: {reject}"),
                (Err(_), Err(Unusual)) => {}
            }
        }

        /// Damaged bytes: what is taken in place decodes, and to as many readings; nothing panics.
        #[test]
        fn what_is_taken_in_place_is_a_batch(frames in frames(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
            let mut bytes = pb::Batch { frames }.encode_to_vec();
            for (index, byte) in changes {
                if !bytes.is_empty() {
                    let index = index.index(bytes.len());
                    bytes[index] = byte;
                }
            }
            let bytes: Bytes = bytes.into();
            let now = Timestamp::from_micros(NOW).expect("in range");
            let limits = BatchLimits { sensors_max: 100, ..limits() };
            if let Ok((summary, _)) = check_in_place(&bytes, false, &limits, now, known) {
                let decoded = CheckedBatch::check(&bytes, &limits, now, |_| None);
                prop_assert_eq!(decoded.map(|checked| checked.summary), Ok(summary));
            }
        }
    }
}
