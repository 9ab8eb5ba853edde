//! Values on the command line. The errors say what is allowed: clap shows them with the argument's name.

use crate::model::{DeviceId, LabelSelector, Timestamp};
use jiff::SpanRelativeTo;
use serde_json::{Map, Value as Json};
use std::{io::Read, time::Duration};

/// A duration above zero, such as `250ms`, `5m`, `1h 30m`, `7d`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let span: jiff::Span = text.parse().map_err(|_| format!("{text:?} is not a duration such as 250ms, 5m, 1h or 7d"))?;
    let duration = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| format!("{text:?}: weeks are the longest unit"))?;
    match Duration::try_from(duration) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err(format!("{text:?} is not above zero")),
    }
}

/// A point in time: RFC 3339, or before now as in `-1h`, or `now`.
pub fn time(text: &str) -> Result<Timestamp, String> {
    time_before(text, Timestamp::now())
}

fn time_before(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    if text == "now" {
        return Ok(now);
    }
    if let Some(ago) = text.strip_prefix('-') {
        return duration(ago).map(|ago| now.saturating_sub(ago));
    }
    let parsed: Result<jiff::Timestamp, _> = text.parse();
    (parsed.ok())
        .and_then(|time| Timestamp::from_micros(time.as_microsecond()))
        .ok_or_else(|| format!("{text:?} is not a time: RFC 3339 such as 2026-11-21T05:22:01Z, or before now such as -1h, or now"))
}

/// A device's id.
pub fn device(text: &str) -> Result<String, String> {
    DeviceId::parse(text).map(|id| id.as_str().to_owned())
}

/// A label selector.
pub fn selector(text: &str) -> Result<String, String> {
    LabelSelector::parse(text).map(|_| text.to_owned())
}

/// A selector that asks for something: what changes devices is not to hit all of them by an empty variable.
pub fn selector_not_empty(text: &str) -> Result<String, String> {
    match LabelSelector::parse(text)?.is_empty() {
        false => Ok(text.to_owned()),
        true => Err("a selector that selects something is needed here, such as site=berlin".to_owned()),
    }
}

/// `key=value`.
pub fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not key=value"))?;
    Ok((key.to_owned(), value.to_owned()))
}

/// A JSON object: itself, `@file`, or `-` for standard input.
pub fn json_object(text: &str) -> Result<Map<String, Json>, String> {
    let (source, json) = match (text, text.strip_prefix('@')) {
        ("-", _) => {
            let mut json = String::new();
            std::io::stdin().read_to_string(&mut json).map_err(|why| format!("cannot read standard input: {why}"))?;
            ("standard input", json)
        }
        (_, Some(path)) => (path, std::fs::read_to_string(path).map_err(|why| format!("cannot read {path}: {why}"))?),
        (_, None) => ("the argument", text.to_owned()),
    };
    serde_json::from_str(&json).map_err(|why| format!("{source} is not a JSON object: {why}"))
}

/// As the protobuf type.
pub fn duration_to_proto(duration: Duration) -> prost_types::Duration {
    let seconds = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    prost_types::Duration { seconds, nanos: duration.subsec_nanos().cast_signed() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_absolute_or_before_now() {
        let now = Timestamp::from_micros(1_000_000_000_000_000).expect("in range");
        for (text, micros) in [
            ("now", now.micros()),
            ("-1h", now.micros() - 3_600_000_000),
            ("-7d", now.micros() - 7 * 86_400_000_000),
            ("1970-01-01T00:00:01Z", 1_000_000),
            ("1970-01-01T02:00:00+01:00", 3_600_000_000),
        ] {
            assert_eq!(time_before(text, now).map(Timestamp::micros), Ok(micros), "{text}");
        }
        for bad in ["", "yesterday", "1h", "+1h", "--1h", "2026-11-21", "2026-11-21T05:22:01", "-0s"] {
            assert!(time_before(bad, now).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn durations_are_above_zero() {
        assert_eq!(duration("1h 30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in ["", "5", "0s", "-5m", "1 month"] {
            assert!(duration(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn configurations_are_objects_given_or_in_a_file() {
        assert_eq!(json_object(r#"{"interval": 5}"#).expect("an object")["interval"], 5);
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), r#"{"on": true}"#).expect("written");
        assert_eq!(json_object(&format!("@{}", file.path().display())).expect("an object")["on"], true);
        for bad in ["[]", "5", "{", "", "@/nonexistent.json"] {
            assert!(json_object(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_change_is_not_for_every_device_by_accident() {
        assert!(selector("").is_ok() && selector_not_empty("").is_err() && selector_not_empty("site=berlin").is_ok());
    }
}
