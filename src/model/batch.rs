//! A batch as it came in: the check of its bytes, and what the check learned.
//!
//! The bytes themselves are what is stored and shown to followers (but see [`correction`](super::correction)). Nearly all batches are of sensors that their device is known
//! to have and are well formed: these are checked where they lie, without decoding them. All others are decoded, to learn new
//! sensors or to say what is wrong.

use super::{
    Timestamp, ValueKind,
    columns::{Value, Values, times_from_deltas},
    ids::quoted,
    latest::LatestReading,
    scan::{self, Unusual},
    units::UNIT_BYTES_MAX,
};
use crate::pb;
use bytes::Bytes;
use prost::Message;
use std::{collections::BTreeMap, fmt, time::Duration};

pub use pb::RejectReason;

/// The most bytes in a sensor's name.
pub const SENSOR_NAME_BYTES_MAX: usize = 128;
/// The most bytes in a text value.
pub const TEXT_VALUE_BYTES_MAX: usize = 4096;

/// What a batch may be at the most; from the gateway's settings.
#[derive(Debug, Clone)]
pub struct BatchLimits {
    /// Encoded bytes.
    pub bytes_max: usize,
    /// Readings.
    pub readings_max: usize,
    /// Sensors: as many as its device may have.
    pub sensors_max: usize,
    /// How much later than the gateway's clock a reading's time may be.
    pub time_skew_max: Duration,
    /// How old a reading may be when it is received; zero: any age.
    pub reading_age_max: Duration,
}

/// Why a batch can never be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchReject {
    /// The reason, for machines.
    pub reason: RejectReason,
    /// The path in the batch, such as `frames[0].columns[2]`; empty for the whole batch.
    pub field: String,
    /// What was found and what is allowed, for people.
    pub message: String,
    /// How many readings the batch has; 0 when it could not be read.
    pub readings: u64,
}

impl fmt::Display for BatchReject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = if self.field.is_empty() { "" } else { " at " };
        write!(f, "{}{at}{}: {}", reason_name(self.reason), self.field, self.message)
    }
}

/// The reason without the enum's prefix, as in metrics and the store: `NON_FINITE`.
pub fn reason_name(reason: RejectReason) -> &'static str {
    reason.as_str_name().trim_start_matches("REJECT_REASON_")
}

/// The reason of a [`reason_name`].
pub fn reason_from_name(name: &str) -> Option<RejectReason> {
    RejectReason::from_str_name(&format!("REJECT_REASON_{name}"))
}

/// The extent of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchSummary {
    /// How many readings it has; at least 1.
    pub readings: u32,
    /// The earliest time in it.
    pub first_time: Timestamp,
    /// The latest time in it.
    pub last_time: Timestamp,
}

impl BatchSummary {
    /// The extent of both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            readings: self.readings.saturating_add(other.readings),
            first_time: self.first_time.min(other.first_time),
            last_time: self.last_time.max(other.last_time),
        }
    }
}

/// What a batch says of one sensor.
#[derive(Debug, Clone, PartialEq)]
pub struct SensorUse {
    /// The unit's symbol; empty when the batch does not say.
    pub unit: String,
    /// The kind of its values.
    pub kind: ValueKind,
    /// The path of the first column with NaN or an infinity.
    pub non_finite: Option<String>,
    /// The path of its first column.
    pub field: String,
}

/// A sensor that the device has, of the kind and the unit that a column says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownSensor {
    /// Its number in the store.
    pub key: i64,
    /// Whether NaN and the infinities are stored.
    pub allow_non_finite: bool,
}

/// The sensors of a batch.
#[derive(Debug, Clone, PartialEq)]
pub enum BatchSensors {
    /// The device has all of them, as the batch says: nothing is left to be judged. Of each its latest reading.
    Known(Vec<LatestReading>),
    /// Whether the device's sensors agree with them is for the registry to say. By name.
    New(BTreeMap<String, SensorUse>),
}

/// A batch that is well formed.
#[derive(Debug, Clone)]
pub struct CheckedBatch {
    /// The extent.
    pub summary: BatchSummary,
    /// The sensors.
    pub sensors: BatchSensors,
}

impl CheckedBatch {
    /// Checks a batch as a device sent it. `received` is the gateway's clock; `known` finds the sensor of a column in what is known of
    /// the device, if it is there, of that kind and unit.
    pub fn check(
        bytes: &Bytes,
        limits: &BatchLimits,
        received: Timestamp,
        known: impl FnMut(&scan::Column<'_>) -> Option<KnownSensor>,
    ) -> Result<Self, BatchReject> {
        if bytes.len() > limits.bytes_max {
            return Err(reject(RejectReason::TooLarge, "", format!("{} bytes: at most {} are taken", bytes.len(), limits.bytes_max)));
        }
        Self::check_either(bytes, false, limits, received, known)
    }

    /// Checks a batch, as [`check`](Self::check) does, of which the gateway may have corrected the times: its size in bytes was seen to
    /// when it came in.
    pub fn check_corrected(
        bytes: &Bytes,
        limits: &BatchLimits,
        received: Timestamp,
        known: impl FnMut(&scan::Column<'_>) -> Option<KnownSensor>,
    ) -> Result<Self, BatchReject> {
        Self::check_either(bytes, true, limits, received, known)
    }

    fn check_either(
        bytes: &Bytes,
        corrected: bool,
        limits: &BatchLimits,
        received: Timestamp,
        known: impl FnMut(&scan::Column<'_>) -> Option<KnownSensor>,
    ) -> Result<Self, BatchReject> {
        match check_in_place(bytes, corrected, limits, received, known) {
            Ok((summary, latest)) => Ok(Self { summary, sensors: BatchSensors::Known(latest) }),
            Err(Unusual) => Self::decode_and_check(bytes, corrected, limits, received),
        }
    }

    /// Checks all that can be seen from the batch alone.
    fn decode_and_check(bytes: &Bytes, corrected: bool, limits: &BatchLimits, received: Timestamp) -> Result<Self, BatchReject> {
        let size = bytes.len();
        let batch = pb::Batch::decode(bytes.clone())
            .map_err(|why| reject(RejectReason::Malformed, "", format!("the bytes are not a tidegate.v1.Batch: {why}")))?;
        let readings = batch.frames.iter().map(|frame| (frame.time_deltas_us.len() + 1).saturating_mul(frame.columns.len()));
        let readings = readings.fold(0_usize, usize::saturating_add);
        (if corrected { Ok(()) } else { check_uncorrected(&batch) })
            .and_then(|()| check_decoded(batch, readings, limits, received))
            .map(|(summary, sensors)| Self { summary, sensors: BatchSensors::New(sensors) })
            // Columns may be shorter than they should be, but no reading takes less than a byte.
            .map_err(|reject| BatchReject { readings: readings.min(size) as u64, ..reject })
    }
}

/// A batch of several frames that has more columns and sensors than this is decoded: to look for each would take long.
const FOLDED_MAX: usize = 128;
/// About what a column takes whose sensor has one reading.
const COLUMN_BYTES: usize = 24;
/// For so many sensors of a batch there is room from the beginning, so that it need not be moved to grow; of more it is not known whether a batch
/// has them.
const LATEST_EXPECTED_MAX: usize = 8;
/// No sensor's number: that of a reading which another has taken the place of.
const FOLDED: i64 = i64::MIN;

impl BatchLimits {
    /// The earliest and the latest time that are taken now.
    fn times(&self, received: Timestamp) -> (Timestamp, Timestamp) {
        let earliest = if self.reading_age_max.is_zero() { Timestamp::MIN } else { received.saturating_sub(self.reading_age_max) };
        (earliest, received.saturating_add(self.time_skew_max))
    }
}

/// Whether all is as it should be, read from the bytes as they are. What is not is for [`CheckedBatch::decode_and_check`] to name.
fn check_in_place(
    bytes: &[u8],
    corrected: bool,
    limits: &BatchLimits,
    received: Timestamp,
    mut known: impl FnMut(&scan::Column<'_>) -> Option<KnownSensor>,
) -> Result<(BatchSummary, Vec<LatestReading>), Unusual> {
    let (earliest, latest_time) = limits.times(received);
    let (mut readings, mut first, mut last) = (0_usize, i64::MAX, i64::MIN);
    let mut latest: Vec<LatestReading> = Vec::with_capacity((bytes.len() / COLUMN_BYTES).clamp(1, LATEST_EXPECTED_MAX));
    for frame in scan::frames(bytes) {
        let frame = frame?;
        if frame.clock_correction != 0 && !corrected {
            return Err(Unusual);
        }
        let times = frame.sum_up_times()?;
        (first, last) = (first.min(times.first), last.max(times.last));
        let time = Timestamp::from_micros(times.last).ok_or(Unusual)?;
        let (columns_before, mut highest_key) = (latest.len(), i64::MIN);
        for column in frame.columns() {
            let column = column?;
            let KnownSensor { key, allow_non_finite } = known(&column).ok_or(Unusual)?;
            // A device that names its sensors in the order of their numbers has none looked for.
            if key <= highest_key && latest[columns_before..].iter().any(|before| before.sensor_key == key) {
                return Err(Unusual);
            }
            highest_key = highest_key.max(key);
            let value = check_values(&column.values, times.rows, times.last_row, allow_non_finite)?;
            latest.push(LatestReading { sensor_key: key, time, clock_correction: frame.clock_correction, value });
        }
        let columns = latest.len() - columns_before;
        fold(&mut latest, columns_before)?;
        readings = readings.saturating_add(times.rows.saturating_mul(columns));
        if columns == 0 || readings > limits.readings_max {
            return Err(Unusual);
        }
    }
    if readings == 0 || first < earliest.micros() || last > latest_time.micros() {
        return Err(Unusual);
    }
    let time = |micros| Timestamp::from_micros(micros).ok_or(Unusual);
    let summary =
        BatchSummary { readings: u32::try_from(readings).map_err(|_| Unusual)?, first_time: time(first)?, last_time: time(last)? };
    Ok((summary, latest))
}

/// The latest reading of each sensor in a stored batch, read from the bytes as they are; `None` for a batch that is to be decoded.
pub fn latest_in_place(bytes: &[u8], known: impl FnMut(&scan::Column<'_>) -> Option<KnownSensor>) -> Option<Vec<LatestReading>> {
    let any = BatchLimits {
        bytes_max: usize::MAX,
        readings_max: usize::MAX,
        sensors_max: usize::MAX,
        time_skew_max: Duration::ZERO,
        reading_age_max: Duration::ZERO,
    };
    check_in_place(bytes, true, &any, Timestamp::MAX, known).ok().map(|(_, latest)| latest)
}

/// Makes one of several readings of a sensor: the latest, of several at that time the last. `latest` has one of each sensor
/// before `added`, and one of each from there on.
fn fold(latest: &mut Vec<LatestReading>, added: usize) -> Result<(), Unusual> {
    if added == 0 {
        return Ok(());
    }
    if latest.len() > FOLDED_MAX {
        return Err(Unusual);
    }
    let (known, new) = latest.split_at_mut(added);
    for reading in new.iter_mut() {
        if let Some(earlier) = known.iter_mut().find(|earlier| earlier.sensor_key == reading.sensor_key) {
            if reading.time >= earlier.time {
                std::mem::swap(reading, earlier);
            }
            reading.sensor_key = FOLDED;
        }
    }
    latest.retain(|reading| reading.sensor_key != FOLDED);
    Ok(())
}

/// Whether a column has `rows` values that can be stored; the one of `latest_row`.
fn check_values(values: &scan::RawValues<'_>, rows: usize, latest_row: usize, allow_non_finite: bool) -> Result<Value, Unusual> {
    match values.kind {
        ValueKind::Double => {
            let mut values = values.doubles()?;
            let is_good = values.len() == rows && (allow_non_finite || values.clone().all(f64::is_finite));
            let latest = values.nth(latest_row).ok_or(Unusual)?;
            if is_good { Ok(Value::Double(latest)) } else { Err(Unusual) }
        }
        ValueKind::Int64 => nth_of_exactly(rows, latest_row, values.integers()).map(Value::Int64),
        ValueKind::Bool => nth_of_exactly(rows, latest_row, values.integers()).map(|value| Value::Bool(value != 0)),
        ValueKind::Text => {
            let texts =
                values.texts().map(|text| text.and_then(|text| if text.len() <= TEXT_VALUE_BYTES_MAX { Ok(text) } else { Err(Unusual) }));
            nth_of_exactly(rows, latest_row, texts).map(|text| Value::Text(text.to_owned()))
        }
    }
}

fn nth_of_exactly<T>(rows: usize, row: usize, values: impl Iterator<Item = Result<T, Unusual>>) -> Result<T, Unusual> {
    let (mut count, mut found) = (0, None);
    for value in values {
        let value = value?;
        if count == row {
            found = Some(value);
        }
        count += 1;
    }
    found.filter(|_| count == rows).ok_or(Unusual)
}

fn reject(reason: RejectReason, field: impl Into<String>, message: impl Into<String>) -> BatchReject {
    BatchReject { reason, field: field.into(), message: message.into(), readings: 0 }
}

/// A device says its own times.
fn check_uncorrected(batch: &pb::Batch) -> Result<(), BatchReject> {
    match batch.frames.iter().position(|frame| frame.clock_correction_us != 0) {
        None => Ok(()),
        Some(index) => {
            let field = format!("frames[{index}].clock_correction_us");
            Err(reject(RejectReason::Malformed, field, "only the gateway says by how much it has corrected times"))
        }
    }
}

fn check_decoded(
    batch: pb::Batch,
    readings: usize,
    limits: &BatchLimits,
    received: Timestamp,
) -> Result<(BatchSummary, BTreeMap<String, SensorUse>), BatchReject> {
    if readings > limits.readings_max {
        return Err(reject(RejectReason::TooLarge, "", format!("{readings} readings: at most {} are taken", limits.readings_max)));
    }
    let (earliest_allowed, latest_allowed) = limits.times(received);

    let mut extent: Option<(Timestamp, Timestamp)> = None;
    let mut sensors = BTreeMap::new();
    for (index, frame) in batch.frames.into_iter().enumerate() {
        let path = format!("frames[{index}]");
        if frame.columns.is_empty() {
            return Err(reject(RejectReason::Empty, path, "the frame has no columns"));
        }
        let (rows, first, last) = check_times(&frame, &path, earliest_allowed, latest_allowed)?;
        let (earliest, latest) = extent.unwrap_or((first, last));
        extent = Some((earliest.min(first), latest.max(last)));
        check_columns(frame.columns, &path, rows, &mut sensors)?;
        // Here already, and not only with the device's other sensors: what the check gathers is bounded by it.
        if sensors.len() > limits.sensors_max {
            let message = format!("{} sensors up to here: a device may have {} (devices.sensors_max)", sensors.len(), limits.sensors_max);
            return Err(reject(RejectReason::TooManySensors, path, message));
        }
    }
    let Some((first_time, last_time)) = extent else {
        return Err(reject(RejectReason::Empty, "", "the batch has no frames"));
    };
    let readings = u32::try_from(readings).map_err(|_| reject(RejectReason::TooLarge, "", format!("{readings} readings")))?;
    Ok((BatchSummary { readings, first_time, last_time }, sensors))
}

/// How many times the frame has, the earliest and the latest of them.
fn check_times(
    frame: &pb::Frame,
    path: &str,
    earliest_allowed: Timestamp,
    latest_allowed: Timestamp,
) -> Result<(usize, Timestamp, Timestamp), BatchReject> {
    let out_of_range = || reject(RejectReason::TimeTooOld, path, "a time is outside of the years 0001 to 9999");
    let times = times_from_deltas(frame.base_time_us, &frame.time_deltas_us).ok_or_else(out_of_range)?;
    let (mut first, mut last) = (times[0], times[0]);
    for &time in &times[1..] {
        first = first.min(time);
        last = last.max(time);
    }
    let last = match Timestamp::from_micros(last) {
        Some(last) => last,
        None if last > Timestamp::MAX.micros() => Timestamp::MAX,
        None => return Err(out_of_range()),
    };
    if last > latest_allowed {
        return Err(reject(
            RejectReason::TimeInFuture,
            path,
            format!("the time {last} is later than {latest_allowed}, the latest that is taken now"),
        ));
    }
    let first = Timestamp::from_micros(first).ok_or_else(out_of_range)?;
    if first < earliest_allowed {
        return Err(reject(
            RejectReason::TimeTooOld,
            path,
            format!("the time {first} is before {earliest_allowed}, the earliest that is taken now"),
        ));
    }
    Ok((times.len(), first, last))
}

fn check_columns(
    columns: Vec<pb::Column>,
    frame_path: &str,
    rows: usize,
    sensors: &mut BTreeMap<String, SensorUse>,
) -> Result<(), BatchReject> {
    let mut names: Vec<String> = Vec::with_capacity(columns.len());
    for (index, column) in columns.into_iter().enumerate() {
        let path = format!("{frame_path}.columns[{index}]");
        check_sensor_name(&column.sensor).map_err(|why| reject(RejectReason::SensorNameInvalid, &path, why))?;
        check_unit(&column.unit).map_err(|why| reject(RejectReason::UnitInvalid, &path, why))?;
        let values: Values = match column.values {
            Some(values) => values.into(),
            None => return Err(reject(RejectReason::Empty, path, format!("the column of {} has no values", quoted(&column.sensor)))),
        };
        if values.len() != rows {
            let message = format!("the column of {} has {} values for {rows} times", quoted(&column.sensor), values.len());
            return Err(reject(RejectReason::LengthMismatch, path, message));
        }
        check_text(&values, &path)?;
        names.push(column.sensor.clone());
        add_use(sensors, column.sensor, column.unit, &values, path)?;
    }
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(reject(RejectReason::SensorRepeated, frame_path, format!("the frame has two columns of {}", quoted(&pair[0])))),
    }
}

fn add_use(
    sensors: &mut BTreeMap<String, SensorUse>,
    sensor: String,
    unit: String,
    values: &Values,
    field: String,
) -> Result<(), BatchReject> {
    let non_finite = match values {
        Values::Double(values) if values.iter().any(|value| !value.is_finite()) => Some(field.clone()),
        _ => None,
    };
    let kind = values.kind();
    let Some(earlier) = sensors.get_mut(&sensor) else {
        sensors.insert(sensor, SensorUse { unit, kind, non_finite, field });
        return Ok(());
    };
    if earlier.kind != kind {
        let message = format!("{} has {kind} values here and {} values in {}", quoted(&sensor), earlier.kind, earlier.field);
        return Err(reject(RejectReason::KindChanged, field, message));
    }
    if !unit.is_empty() && !earlier.unit.is_empty() && earlier.unit != unit {
        let message = format!("{} has the unit {unit:?} here and {:?} in {}", quoted(&sensor), earlier.unit, earlier.field);
        return Err(reject(RejectReason::UnitChanged, field, message));
    }
    if earlier.unit.is_empty() {
        earlier.unit = unit;
    }
    if earlier.non_finite.is_none() {
        earlier.non_finite = non_finite;
    }
    Ok(())
}

/// Checks a sensor's name; the error says what is allowed.
pub fn check_sensor_name(name: &str) -> Result<(), String> {
    let fits = (1..=SENSOR_NAME_BYTES_MAX).contains(&name.len());
    if fits && !name.contains(char::is_control) && name.trim() == name {
        return Ok(());
    }
    Err(format!(
        "{} is not a sensor name: 1 to {SENSOR_NAME_BYTES_MAX} bytes of UTF-8 without control characters, not beginning or ending with white space",
        quoted(name)
    ))
}

fn check_unit(unit: &str) -> Result<(), String> {
    if unit.len() <= UNIT_BYTES_MAX && !unit.contains(char::is_control) {
        return Ok(());
    }
    Err(format!("{} is not a unit: at most {UNIT_BYTES_MAX} bytes of UTF-8 without control characters", quoted(unit)))
}

fn check_text(values: &Values, path: &str) -> Result<(), BatchReject> {
    let Values::Text(texts) = values else { return Ok(()) };
    match texts.iter().position(|text| text.len() > TEXT_VALUE_BYTES_MAX) {
        None => Ok(()),
        Some(row) => {
            let message = format!("the text of row {row} has {} bytes: at most {TEXT_VALUE_BYTES_MAX} are taken", texts[row].len());
            Err(reject(RejectReason::TextTooLong, path, message))
        }
    }
}

/// One column of a stored batch.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodedColumn {
    /// The sensor's name.
    pub sensor: String,
    /// Microseconds since the epoch, one a value.
    pub times: Vec<i64>,
    /// What the gateway has added to the times, microseconds; 0: nothing.
    pub clock_correction: i64,
    /// The values.
    pub values: Values,
}

impl DecodedColumn {
    /// Whether there is a value for each time.
    pub fn is_whole(&self) -> bool {
        self.times.len() == self.values.len()
    }

    /// Its latest reading: of several at that time the last.
    pub fn latest(&self) -> Option<(Timestamp, Value)> {
        let (row, &time) = self.times.iter().enumerate().max_by_key(|(_, time)| **time)?;
        Some((Timestamp::from_micros(time)?, self.values.get(row)?))
    }
}

/// The columns of a batch that was checked before it was stored, those whose sensor `wanted` asks for.
///
/// The error is for bytes that no check can have let pass: the store has been damaged.
pub fn decode_stored(bytes: Bytes, mut wanted: impl FnMut(&str) -> bool) -> Result<Vec<DecodedColumn>, prost::DecodeError> {
    let batch = pb::Batch::decode(bytes)?;
    let mut columns = Vec::new();
    for frame in batch.frames {
        let times = times_from_deltas(frame.base_time_us, &frame.time_deltas_us).unwrap_or_default();
        for column in frame.columns {
            if let (true, Some(values)) = (wanted(&column.sensor), column.values) {
                let clock_correction = frame.clock_correction_us;
                columns.push(DecodedColumn { sensor: column.sensor, times: times.clone(), clock_correction, values: values.into() });
            }
        }
    }
    Ok(columns)
}

/// A stored batch less the columns that `wanted` does not ask for; `None` when nothing is left.
pub fn retain_columns(bytes: Bytes, mut wanted: impl FnMut(&str) -> bool) -> Result<Option<Bytes>, prost::DecodeError> {
    let mut batch = pb::Batch::decode(bytes.clone())?;
    let columns_before: usize = batch.frames.iter().map(|frame| frame.columns.len()).sum();
    for frame in &mut batch.frames {
        frame.columns.retain(|column| wanted(&column.sensor));
    }
    batch.frames.retain(|frame| !frame.columns.is_empty());
    let columns_after: usize = batch.frames.iter().map(|frame| frame.columns.len()).sum();
    Ok(match columns_after {
        0 => None,
        _ if columns_after == columns_before => Some(bytes),
        _ => Some(batch.encode_to_vec().into()),
    })
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
