//! Batches as they come in.

use crate::{
    model::{
        BatchLimits, CheckedBatch, LatestReading, Timestamp, ValueKind,
        batch::{BatchSensors, DecodedColumn, KnownSensor, decode_stored, retain_columns},
        columns::{Value, Values, times_from_deltas},
        correction::Correction,
        scan::{self, Unusual},
    },
    pb,
};
use bytes::Bytes;
use prost::Message;
use std::time::Duration;

/// Guarantees: nothing panics; what is read in place prost decodes to the same; a batch of sensors that are known is what it is when they are
/// not; what was checked can be read back; and a batch whose times are corrected is the same but for these.
pub fn batch(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let decoded = pb::Batch::decode(bytes.clone());
    if let (Ok(columns), Ok(batch)) = (scan_all(&bytes), &decoded) {
        assert!(columns == decode_all(batch), "read in place: {columns:?}");
    }
    if let Ok(batch) = &decoded {
        correct(&bytes, batch);
    }
    let limits = BatchLimits {
        bytes_max: 1 << 20,
        readings_max: 10_000,
        sensors_max: 100,
        time_skew_max: Duration::from_secs(3600),
        reading_age_max: Duration::ZERO,
    };
    let received = Timestamp::from_micros(1_800_000_000_000_000).expect("in range");
    let unknown = CheckedBatch::check(&bytes, &limits, received, |_| None);
    if let Ok(checked) = &unknown {
        read_back(&bytes, checked);
    }
    let mut names = Vec::new();
    let known = CheckedBatch::check(&bytes, &limits, received, |column| know(&mut names, column));
    if let Ok(CheckedBatch { summary, sensors: BatchSensors::Known(latest) }) = known {
        let unknown = unknown.expect("what is good of sensors that are known is good");
        assert_eq!(unknown.summary, summary);
        let BatchSensors::New(uses) = unknown.sensors else { panic!("none is known") };
        assert_eq!(latest.len(), uses.len());
        let columns = decode_stored(bytes, |_| true).expect("it was decoded before");
        for LatestReading { sensor_key, time, value, .. } in latest {
            let of_sensor = columns.iter().filter(|column| column.sensor == names[sensor_key as usize].0);
            let expected =
                of_sensor.filter_map(DecodedColumn::latest).reduce(|earlier, next| if next.0 < earlier.0 { earlier } else { next });
            let (expected_time, expected_value) = expected.expect("it has a reading");
            assert_eq!(expected_time, time);
            assert!(same(&expected_value, &value), "{expected_value:?} is not {value:?}");
        }
    }
}

/// By an hour either way.
fn correct(bytes: &Bytes, sent: &pb::Batch) {
    let latest = Timestamp::from_micros(1_800_000_000_000_000).expect("in range");
    for micros in [-3_600_000_000, 3_600_000_000] {
        let Some(corrected) = (Correction { micros, latest }).of(bytes) else { continue };
        let mut again = pb::Batch::decode(corrected.batch).expect("its own output");
        for (frame, sent) in again.frames.iter_mut().zip(&sent.frames) {
            assert!(sent.clock_correction_us == 0 && [0, micros].contains(&frame.clock_correction_us));
            assert!(frame.clock_correction_us == micros || !corrected.whole);
            frame.base_time_us -= std::mem::take(&mut frame.clock_correction_us);
        }
        // Bytes, as a NaN is not equal to itself.
        assert!(again.encode_to_vec() == sent.encode_to_vec(), "{again:?}");
    }
}

/// Of doubles the bits.
fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Double(one), Value::Double(other)) => one.to_bits() == other.to_bits(),
        (one, other) => one == other,
    }
}

/// The sensor of a column, as a device has it that has all that may be: one of each name, of the kind and unit that came first.
fn know(names: &mut Vec<(String, ValueKind, Vec<u8>)>, column: &scan::Column<'_>) -> Option<KnownSensor> {
    let name = std::str::from_utf8(column.sensor).ok().filter(|name| crate::model::batch::check_sensor_name(name).is_ok())?;
    let unit = std::str::from_utf8(column.unit).ok().filter(|unit| unit.len() <= 32 && !unit.contains(char::is_control))?;
    let (kind, unit) = (column.values.kind, unit.as_bytes());
    let place = names.iter().position(|(known, ..)| known == name).unwrap_or_else(|| {
        names.push((name.to_owned(), kind, unit.to_vec()));
        names.len() - 1
    });
    let (_, known_kind, known_unit) = &names[place];
    let agrees = *known_kind == kind && (unit.is_empty() || known_unit == unit);
    agrees.then_some(KnownSensor { key: place as i64, allow_non_finite: true })
}

/// Sensor, unit, times, what was added to them, and values of a column; of doubles the bits.
type Column = (Vec<u8>, Vec<u8>, Vec<i64>, i64, Comparable);

#[derive(Debug, PartialEq)]
enum Comparable {
    Bits(Vec<u64>),
    Integers(Vec<i64>),
    Texts(Vec<String>),
}

fn scan_all(bytes: &[u8]) -> Result<Vec<Column>, Unusual> {
    let mut columns = Vec::new();
    for frame in scan::frames(bytes) {
        let frame = frame?;
        let times = frame.times().collect::<Result<Vec<i64>, Unusual>>()?;
        for column in frame.columns() {
            let scan::Column { sensor, unit, values } = column?;
            let values = match values.kind {
                ValueKind::Double => Comparable::Bits(values.doubles()?.map(f64::to_bits).collect()),
                ValueKind::Int64 | ValueKind::Bool => Comparable::Integers(values.integers().collect::<Result<_, _>>()?),
                ValueKind::Text => Comparable::Texts(values.texts().map(|text| text.map(str::to_owned)).collect::<Result<_, _>>()?),
            };
            columns.push((sensor.to_vec(), unit.to_vec(), times.clone(), frame.clock_correction, values));
        }
    }
    Ok(columns)
}

fn decode_all(batch: &pb::Batch) -> Vec<Column> {
    let columns = batch.frames.iter().flat_map(|frame| frame.columns.iter().map(move |column| (frame, column)));
    let decoded = columns.map(|(frame, column)| {
        let times = times_from_deltas(frame.base_time_us, &frame.time_deltas_us).expect("it was summed up in place");
        let values = match Values::from(column.values.clone().expect("it was found in place")) {
            Values::Double(values) => Comparable::Bits(values.into_iter().map(f64::to_bits).collect()),
            Values::Int64(values) => Comparable::Integers(values),
            Values::Bool(values) => Comparable::Integers(values.into_iter().map(i64::from).collect()),
            Values::Text(values) => Comparable::Texts(values),
        };
        (column.sensor.clone().into_bytes(), column.unit.clone().into_bytes(), times, frame.clock_correction_us, values)
    });
    decoded.collect()
}

/// What was checked is read back whole, and filtered.
fn read_back(bytes: &Bytes, checked: &CheckedBatch) {
    let columns = decode_stored(bytes.clone(), |_| true).expect("it was decoded before");
    let readings: usize = columns.iter().map(|column| column.values.len()).sum();
    assert_eq!(readings, checked.summary.readings as usize);
    assert!(columns.iter().all(|column| column.times.len() == column.values.len()));
    let times = || columns.iter().flat_map(|column| column.times.iter().copied());
    assert_eq!(times().min(), Some(checked.summary.first_time.micros()));
    assert_eq!(times().max(), Some(checked.summary.last_time.micros()));
    assert_eq!(retain_columns(bytes.clone(), |_| true), Ok(Some(bytes.clone())));
    let first = &columns[0].sensor;
    let of_first = retain_columns(bytes.clone(), |name| name == first).expect("decoded before").expect("the first is left");
    let left = decode_stored(of_first, |_| true).expect("its own output");
    assert_eq!(left.len(), columns.iter().filter(|column| column.sensor == *first).count());
}
