//! Guarantee: a chunk gives back what it was made of, to the last bit, and whatever else stands in a row is no panic.

use super::*;
use proptest::prelude::*;

const T0: i64 = 1_767_225_600_000_000;

/// As bits, so that the sign of a zero counts; every NaN as one.
fn bits(values: &Values) -> Vec<u64> {
    match values {
        Values::Double(values) => values.iter().map(|value| if value.is_nan() { 1 } else { value.to_bits() }).collect(),
        _ => Vec::new(),
    }
}

fn round_trip(times: &[i64], values: &Values) -> Chunk {
    let chunk = Chunk::encode(times, values);
    let (decoded_times, decoded) = chunk.decode(values.kind()).expect("its own output");
    assert_eq!(decoded_times, times, "{chunk:?}");
    match values {
        Values::Double(_) => assert_eq!(bits(&decoded), bits(values), "{chunk:?}"),
        _ => assert_eq!(&decoded, values, "{chunk:?}"),
    }
    let elements: Vec<serde_json::Value> = serde_json::from_str(&chunk.points).expect("JSON");
    assert_eq!((elements.len(), chunk.readings), (times.len(), times.len()));
    chunk
}

/// Strictly increasing times: at an even pace, nearly so, or anyhow.
fn times(readings: usize) -> impl Strategy<Value = Vec<i64>> {
    let even = (1..100_000_000_i64).prop_map(move |step| (0..readings as i64).map(|k| T0 + k * step).collect());
    let nearly = prop::collection::vec(0..900_i64, readings)
        .prop_map(|late| late.into_iter().zip(0..).map(|(late, k): (i64, i64)| T0 + k * 1_000_000 + late * 1_000).collect());
    let anyhow = prop::collection::btree_set(-62_135_596_800_000_000..253_402_300_799_999_999_i64, readings)
        .prop_map(|times| times.into_iter().collect());
    prop_oneof![even, nearly, anyhow]
}

fn values(readings: usize) -> impl Strategy<Value = Values> {
    let decimals = (0..6_u32, prop::collection::vec(-1_000_000..1_000_000_i64, readings))
        .prop_map(|(decimals, values)| Values::Double(values.iter().map(|&v| v as f64 / 10_f64.powi(decimals as i32)).collect()));
    let single =
        prop::collection::vec(-100.0..100.0_f32, readings).prop_map(|values| Values::Double(values.into_iter().map(f64::from).collect()));
    let any_double = prop::collection::vec(prop_oneof![4 => any::<f64>(), 1 => Just(-0.0), 1 => Just(f64::NAN), 1 => Just(0.1)], readings);
    prop_oneof![
        decimals,
        single,
        any_double.prop_map(Values::Double),
        prop::collection::vec(any::<i64>(), readings).prop_map(Values::Int64),
        prop::collection::vec(-50..50_i64, readings).prop_map(Values::Int64),
        prop::collection::vec(any::<bool>(), readings).prop_map(Values::Bool),
        prop::collection::vec(any::<String>(), readings).prop_map(Values::Text),
    ]
}

proptest! {
    #[test]
    fn every_bit_comes_back((times, values) in (1..40_usize).prop_flat_map(|readings| (times(readings), values(readings)))) {
        round_trip(&times, &values);
    }

    #[test]
    fn what_is_no_chunk_is_no_panic(points in "[\\[\\]0-9,\"a\\\\u-]{0,20}", unit in 0..3_i64, factor in 0..20_i64) {
        for encoding in [Encoding::Decimal, Encoding::Integer, Encoding::Real, Encoding::Text] {
            let mut chunk = Chunk::encode(&[1], &Values::Bool(vec![true]));
            chunk.points.clone_from(&points);
            (chunk.encoding, chunk.time_unit, chunk.time_factor) = (encoding, unit, factor);
            for kind in [ValueKind::Double, ValueKind::Int64, ValueKind::Bool, ValueKind::Text] {
                let _ = chunk.decode(kind);
            }
        }
    }
}

#[test]
fn measured_values_are_small_integers() {
    let even: Vec<i64> = (0..4).map(|k| T0 + k * 1_000_000).collect();
    let chunk = round_trip(&even, &Values::Double(vec![21.5, 21.25, 20.0, 21.53]));
    assert_eq!((chunk.value_base, chunk.value_divisor, chunk.points.as_str()), (2_000, 100.0, "[150,125,0,153]"));
    // One is 7 ms late: the pace stays, and only that one has a time number.
    let late = [even[0], even[1] + 7_000, even[2], even[3]];
    let chunk = round_trip(&late, &Values::Double(vec![21.5, 21.25, 20.0, 21.53]));
    assert_eq!((chunk.time_step, chunk.time_unit, chunk.time_factor), (1_000_000, 1_000, 1_000));
    assert_eq!(chunk.points, "[150,7125,0,153]");
    // Single precision: a power of two.
    let chunk = round_trip(&even[..2], &Values::Double(vec![f64::from(21.53_f32), f64::from(21.54_f32)]));
    assert_eq!((chunk.encoding, chunk.value_divisor), (Encoding::Decimal, 524_288.0));
}

#[test]
fn what_has_no_small_form_stands_as_it_is() {
    let chunk = round_trip(&[T0, T0 + 5, T0 + 6], &Values::Double(vec![-0.0, f64::NEG_INFINITY, 1e300]));
    assert_eq!(chunk.points, r#"[[0,-0.0],[2,"-Infinity"],[0,1e300]]"#);
    let chunk = round_trip(&[T0, T0 + 1], &Values::Int64(vec![i64::MIN, i64::MAX]));
    assert_eq!((chunk.value_base, chunk.points.as_str()), (0, "[-9223372036854775808,9223372036854775807]"));
    let chunk = round_trip(&[T0], &Values::Text(vec!["a\"\\\n\u{1F600}".into()]));
    assert_eq!(chunk.points, "[\"a\\\"\\\\\\u000a\u{1F600}\"]");
}
