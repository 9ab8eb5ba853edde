//! Chunks as they stand in the store.

use super::Input;
use crate::{
    history::chunk::{Chunk, Encoding},
    model::{Timestamp, ValueKind, columns::Values},
};

/// Guarantees: no row makes it panic; and what a row decodes to becomes the same again by way of a new chunk.
pub fn chunk(data: &[u8]) {
    let mut input = Input(data);
    let (what, time_unit) = (input.byte(), i64::from(input.byte()));
    let (encoding, kind) = match what % 5 {
        0 => (Encoding::Decimal, ValueKind::Double),
        1 => (Encoding::Integer, ValueKind::Int64),
        2 => (Encoding::Integer, ValueKind::Bool),
        3 => (Encoding::Real, ValueKind::Double),
        _ => (Encoding::Text, ValueKind::Text),
    };
    let time_factor = if what & 0x80 == 0 { 0 } else { input.integer() };
    let mut chunk = Chunk {
        first_time: 0,
        last_time: 0,
        readings: 0,
        time_base: input.integer(),
        time_step: input.integer(),
        time_unit,
        time_factor,
        encoding,
        value_base: input.integer(),
        value_divisor: f64::from_le_bytes(input.array()),
        points: input.rest_as_text().into_owned(),
        clock_corrections: None,
    };
    // The number of readings is known besides: none other is taken.
    let elements: Option<Vec<serde_json::Value>> = serde_json::from_str(&chunk.points).ok();
    chunk.readings = elements.map_or(1, |elements| elements.len());
    let Some((times, values)) = chunk.decode(kind) else { return };
    assert_eq!((times.len(), values.len(), values.kind()), (chunk.readings, chunk.readings, kind));
    let in_range = times.iter().all(|&time| Timestamp::from_micros(time).is_some());
    if times.is_empty() || !in_range || !times.is_sorted_by(|earlier, later| earlier < later) {
        return;
    }
    let again = Chunk::encode(&times, &values);
    let (times_again, values_again) = again.decode(kind).expect("its own output");
    assert_eq!(times_again, times, "{again:?}");
    assert!(same(&values, &values_again), "{again:?}");
}

/// To the bit, but for a NaN, of which there is one.
fn same(some: &Values, others: &Values) -> bool {
    match (some, others) {
        (Values::Double(some), Values::Double(others)) => {
            let bits = |value: &f64| if value.is_nan() { f64::NAN.to_bits() } else { value.to_bits() };
            some.iter().map(bits).eq(others.iter().map(bits))
        }
        (some, others) => some == others,
    }
}
