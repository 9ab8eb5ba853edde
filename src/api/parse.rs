//! What several services read from their requests.

use crate::{
    error::{Error, Violations},
    model::{DeviceId, LabelSelector, StreamId, Timestamp, ids::DEVICE_ID_CHARS_MAX},
};
use std::time::Duration;

/// The most entries in a list of devices or sensors to select.
const SELECTED_MAX: usize = 1_000;
/// The most bytes in what a credential is for.
const DESCRIPTION_BYTES_MAX: usize = 255;
/// Where the paging tokens of this version begin.
const PAGE_TOKEN_PREFIX: &str = "p1.";

/// A device's id, when nothing else of the request has to be checked.
pub fn device(text: &str) -> Result<DeviceId, Error> {
    DeviceId::parse(text).map_err(|why| Error::invalid("device", why))
}

/// A device, as the audit log names it: at most about as long as a good id is.
pub fn resource(device: &str) -> String {
    format!("devices/{}", device.chars().filter(|c| !c.is_control()).take(DEVICE_ID_CHARS_MAX).collect::<String>())
}

/// What a credential is for, for people.
pub fn description(violations: &mut Violations, field: &str, text: &str) {
    if text.len() > DESCRIPTION_BYTES_MAX || text.chars().any(char::is_control) {
        violations.add(field, format!("at most {DESCRIPTION_BYTES_MAX} bytes of UTF-8 without control characters are allowed"));
    }
}

/// When a credential expires, which must be later than now.
pub fn expire_time(violations: &mut Violations, field: &str, time_of: Option<&prost_types::Timestamp>) -> Option<Timestamp> {
    let time = time(violations, field, time_of)?;
    if time <= Timestamp::now() {
        violations.add(field, "it is not in the future");
    }
    Some(time)
}

/// Ids of devices to select.
pub fn devices(violations: &mut Violations, field: &str, texts: &[String]) -> Vec<DeviceId> {
    check_count(violations, field, texts.len());
    let parsed = texts.iter().enumerate().map(|(index, text)| violations.check(&format!("{field}[{index}]"), DeviceId::parse(text)));
    parsed.collect::<Vec<_>>().into_iter().flatten().collect()
}

/// Notes when there are too many entries in a list to select by.
pub fn check_count(violations: &mut Violations, field: &str, count: usize) {
    if count > SELECTED_MAX {
        violations.add(field, format!("{count} entries: at most {SELECTED_MAX} are allowed"));
    }
}

/// A label selector.
pub fn selector(violations: &mut Violations, text: &str) -> LabelSelector {
    violations.check("label_selector", LabelSelector::parse(text)).unwrap_or_default()
}

/// A stream id.
pub fn stream_id(violations: &mut Violations, bytes: &[u8]) -> Option<StreamId> {
    violations.check("stream_id", StreamId::parse(bytes))
}

/// A time that may be missing.
pub fn time(violations: &mut Violations, field: &str, time: Option<&prost_types::Timestamp>) -> Option<Timestamp> {
    time.and_then(|time| violations.check(field, Timestamp::from_proto(time)))
}

/// A duration that may be missing, in a range.
pub fn duration(
    violations: &mut Violations,
    field: &str,
    duration: Option<&prost_types::Duration>,
    (least, most): (Duration, Duration),
) -> Option<Duration> {
    let found = violations.check(field, crate::model::time::duration_from_proto(duration?))?;
    if !(least..=most).contains(&found) {
        violations.add(field, format!("{found:?} is not in {least:?} to {most:?}"));
        return None;
    }
    Some(found)
}

/// The size of a page (AIP-158): 0 stands for the default, what is too large for the most.
pub fn page_size(violations: &mut Violations, size: i32, default: usize, most: usize) -> usize {
    match usize::try_from(size) {
        Ok(0) => default,
        Ok(size) => size.min(most),
        Err(_) => {
            violations.add("page_size", format!("{size} is negative"));
            default
        }
    }
}

/// What a page token stands for; empty for the first page.
pub fn page_token(violations: &mut Violations, token: &str) -> String {
    if token.is_empty() {
        return String::new();
    }
    match token.strip_prefix(PAGE_TOKEN_PREFIX) {
        Some(text) => text.to_owned(),
        None => {
            violations.add("page_token", "this is not a next_page_token that the gateway gave");
            String::new()
        }
    }
}

/// The token of the page behind `last`.
pub fn next_page_token(last: impl std::fmt::Display) -> String {
    format!("{PAGE_TOKEN_PREFIX}{last}")
}
