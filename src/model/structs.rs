//! JSON objects as `google.protobuf.Struct`, and back.

use prost_types::{ListValue, Struct, Value, value::Kind};
use serde_json::{Map, Number, Value as Json};

/// How deeply a configuration may be nested. Protobuf decoders allow 100 levels of messages, of which each level here takes three.
pub const DEPTH_MAX: usize = 32;

/// The object as JSON; the error says which value JSON does not have.
pub fn to_json(object: &Struct) -> Result<Map<String, Json>, String> {
    object_to_json(object, DEPTH_MAX)
}

fn object_to_json(object: &Struct, depth: usize) -> Result<Map<String, Json>, String> {
    object.fields.iter().map(|(key, value)| Ok((key.clone(), value_to_json(value, depth)?))).collect()
}

fn value_to_json(value: &Value, depth: usize) -> Result<Json, String> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(format!("nested more than {DEPTH_MAX} levels deep"));
    };
    Ok(match &value.kind {
        None => return Err("a value of no kind".to_owned()),
        Some(Kind::NullValue(_)) => Json::Null,
        Some(Kind::BoolValue(flag)) => Json::Bool(*flag),
        Some(Kind::StringValue(text)) => Json::String(text.clone()),
        Some(Kind::NumberValue(number)) => Json::Number(number_to_json(*number)?),
        Some(Kind::ListValue(list)) => Json::Array(list.values.iter().map(|value| value_to_json(value, depth)).collect::<Result<_, _>>()?),
        Some(Kind::StructValue(object)) => Json::Object(object_to_json(object, depth)?),
    })
}

/// A whole number as an integer, so that `60` is stored and shown as `60` and not as `60.0`.
fn number_to_json(number: f64) -> Result<Number, String> {
    const EXACT_INTEGER_MAX: f64 = 9_007_199_254_740_992.0; // 2^53
    if number.fract() == 0.0 && number.abs() <= EXACT_INTEGER_MAX && !(number == 0.0 && number.is_sign_negative()) {
        return Ok(Number::from(number as i64));
    }
    Number::from_f64(number).ok_or_else(|| format!("{number} is not a number that JSON has"))
}

/// The JSON object as a protobuf one. Integers beyond 2^53 lose their last digits: protobuf's numbers are doubles.
pub fn from_json(object: &Map<String, Json>) -> Struct {
    Struct { fields: object.iter().map(|(key, value)| (key.clone(), value_from_json(value))).collect() }
}

fn value_from_json(value: &Json) -> Value {
    let kind = match value {
        Json::Null => Kind::NullValue(0),
        Json::Bool(flag) => Kind::BoolValue(*flag),
        Json::String(text) => Kind::StringValue(text.clone()),
        Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Json::Array(values) => Kind::ListValue(ListValue { values: values.iter().map(value_from_json).collect() }),
        Json::Object(object) => Kind::StructValue(from_json(object)),
    };
    Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_round_trip() {
        let json = serde_json::json!({"interval": 60, "gain": 0.25, "on": true, "off": null, "names": ["a", {"b": []}], "minus": -0.0});
        let object = json.as_object().expect("an object");
        assert_eq!(&to_json(&from_json(object)).expect("JSON values only"), object);
    }

    #[test]
    fn what_json_does_not_have_is_refused() {
        let of = |kind| Struct { fields: [("x".to_owned(), Value { kind })].into() };
        assert!(to_json(&of(Some(Kind::NumberValue(f64::NAN)))).is_err());
        assert!(to_json(&of(None)).is_err());
        let mut deep = Value { kind: Some(Kind::BoolValue(true)) };
        for _ in 0..=DEPTH_MAX {
            deep = Value { kind: Some(Kind::ListValue(ListValue { values: vec![deep] })) };
        }
        assert!(to_json(&of(deep.kind)).is_err());
    }
}
