//! Labels of devices, and the selectors that match them.

use super::{Violation, ids::quoted};
use std::{collections::BTreeMap, fmt};

/// The most labels a device has.
pub const LABELS_MAX: usize = 64;
/// The most characters in a label's key.
pub const KEY_CHARS_MAX: usize = 63;
/// The most bytes in a label's value.
pub const VALUE_BYTES_MAX: usize = 255;
/// The most requirements in a selector.
pub const REQUIREMENTS_MAX: usize = 32;

/// The labels of a device, such as `site=berlin`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    /// Checks all keys and values; `field` is the request's field that they came in.
    pub fn parse(field: &str, pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self, Vec<Violation>> {
        let mut labels = BTreeMap::new();
        let mut violations = Vec::new();
        for (key, value) in pairs {
            if let Err(description) = check_key(&key).and_then(|()| check_value(&value)) {
                violations.push(Violation::new(format!("{field}[{}]", quoted(&key)), description));
            }
            labels.insert(key, value);
        }
        if labels.len() > LABELS_MAX {
            violations.push(Violation::new(field, format!("{} labels: at most {LABELS_MAX} are allowed", labels.len())));
        }
        if violations.is_empty() { Ok(Self(labels)) } else { Err(violations) }
    }

    /// The pairs, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The labels as a JSON object, as the store keeps them.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&self.0).expect("a map of strings is JSON")
    }

    /// Back from [`to_json`](Self::to_json).
    pub fn from_json(json: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(json).map(Self)
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (key, value)) in self.iter().enumerate() {
            write!(f, "{}{key}={value}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

fn check_key(key: &str) -> Result<(), String> {
    let bytes = key.as_bytes();
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"._/-".contains(byte);
    if (1..=KEY_CHARS_MAX).contains(&bytes.len()) && bytes[0].is_ascii_alphanumeric() && bytes.iter().all(allowed) {
        return Ok(());
    }
    Err(format!(
        "{} is not a label key: 1 to {KEY_CHARS_MAX} characters of A-Z a-z 0-9 . _ / - beginning with a letter or digit",
        quoted(key)
    ))
}

fn check_value(value: &str) -> Result<(), String> {
    if value.len() <= VALUE_BYTES_MAX && !value.contains(|c: char| c.is_control() || c == ',') {
        return Ok(());
    }
    Err(format!("{} is not a label value: 0 to {VALUE_BYTES_MAX} bytes of UTF-8 without control characters and commas", quoted(value)))
}

/// Requirements that a device's labels must all meet; none at all matches every device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector(Vec<Requirement>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    Equals(String, String),
    Differs(String, String),
    Exists(String),
    Missing(String),
}

impl LabelSelector {
    /// Parses comma-separated requirements: `key=value`, `key!=value`, `key`, `!key`.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let requirements = text.split(',').map(|part| Requirement::parse(part.trim())).collect::<Result<Vec<_>, _>>()?;
        if requirements.len() > REQUIREMENTS_MAX {
            return Err(format!("{} requirements: at most {REQUIREMENTS_MAX} are allowed", requirements.len()));
        }
        Ok(Self(requirements))
    }

    /// Whether every device matches.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The requirements of both.
    pub fn and(mut self, other: &Self) -> Self {
        self.0.extend(other.0.iter().filter(|requirement| !self.0.contains(requirement)).cloned().collect::<Vec<_>>());
        self
    }

    /// Whether `labels` meet every requirement.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::Equals(key, value) => labels.0.get(key) == Some(value),
            Requirement::Differs(key, value) => labels.0.get(key) != Some(value),
            Requirement::Exists(key) => labels.0.contains_key(key),
            Requirement::Missing(key) => !labels.0.contains_key(key),
        })
    }
}

impl Requirement {
    fn parse(part: &str) -> Result<Self, String> {
        let (requirement, key, value) = if let Some((key, value)) = part.split_once("!=") {
            (Self::Differs(key.to_owned(), value.to_owned()), key, value)
        } else if let Some((key, value)) = part.split_once('=') {
            (Self::Equals(key.to_owned(), value.to_owned()), key, value)
        } else if let Some(key) = part.strip_prefix('!') {
            (Self::Missing(key.to_owned()), key, "")
        } else {
            (Self::Exists(part.to_owned()), part, "")
        };
        check_key(key)
            .and_then(|()| check_value(value))
            .map_err(|why| format!("{} is not a requirement (key=value, key!=value, key or !key): {why}", quoted(part)))?;
        Ok(requirement)
    }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, requirement) in self.0.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { "," })?;
            match requirement {
                Requirement::Equals(key, value) => write!(f, "{key}={value}")?,
                Requirement::Differs(key, value) => write!(f, "{key}!={value}")?,
                Requirement::Exists(key) => f.write_str(key)?,
                Requirement::Missing(key) => write!(f, "!{key}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        Labels::parse("labels", pairs.iter().map(|(k, v)| (k.to_string(), v.to_string()))).expect("good labels")
    }

    #[test]
    fn selectors_match_as_they_say() {
        let berlin = labels(&[("site", "berlin"), ("floor", "3")]);
        for (selector, expected) in [
            ("", true),
            ("site=berlin", true),
            ("site=berlin, floor=3", true),
            ("site=berlin,floor=4", false),
            ("site!=paris", true),
            ("site!=berlin", false),
            ("room!=1", true),
            ("floor", true),
            ("room", false),
            ("!room", true),
            ("!site", false),
        ] {
            let parsed = LabelSelector::parse(selector).expect(selector);
            assert_eq!(LabelSelector::parse(&parsed.to_string()), Ok(parsed.clone()), "its text is read back");
            assert_eq!(parsed.matches(&berlin), expected, "{selector}");
        }
    }

    #[test]
    fn both_of_two_selectors_must_match() {
        let parse = |text| LabelSelector::parse(text).expect("good");
        let both = parse("site=berlin").and(&parse("floor,site=berlin"));
        assert_eq!(both.to_string(), "site=berlin,floor");
        assert!(!parse("site=berlin").and(&parse("site=paris")).matches(&labels(&[("site", "berlin")])));
        assert!(parse("").and(&parse("")).is_empty());
    }

    #[test]
    fn bad_selectors_are_refused() {
        for bad in ["=x", "a b=c", "a=b,", "!", "!=x", "a=\u{7}"] {
            assert!(LabelSelector::parse(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn every_bad_label_is_reported() {
        let pairs = [("ok", "x"), ("", "x"), ("y", "a,b")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(Labels::parse("device.labels", pairs).expect_err("two are bad").len(), 2);
    }

    #[test]
    fn labels_survive_the_store() {
        let some = labels(&[("site", "köln"), ("empty", "")]);
        assert_eq!(Labels::from_json(&some.to_json()).expect("own JSON"), some);
    }
}
