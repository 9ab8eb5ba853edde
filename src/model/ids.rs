//! The names that devices go by.

use std::{fmt, sync::Arc};
use uuid::Uuid;

/// The most characters in a device's id.
pub const DEVICE_ID_CHARS_MAX: usize = 128;

/// A device's id: 1 to 128 characters of `A-Z a-z 0-9 . _ : -`, beginning with a letter or digit. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(Arc<str>);

impl DeviceId {
    /// Checks `text`; the error says what is allowed.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bytes = text.as_bytes();
        let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"._:-".contains(byte);
        if (1..=DEVICE_ID_CHARS_MAX).contains(&bytes.len()) && bytes[0].is_ascii_alphanumeric() && bytes.iter().all(allowed) {
            return Ok(Self(text.into()));
        }
        Err(format!(
            "{} is not a device id: 1 to {DEVICE_ID_CHARS_MAX} characters of A-Z a-z 0-9 . _ : - beginning with a letter or digit",
            quoted(text)
        ))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A device's name for one local queue of batches: a UUID made when the queue was made.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(Uuid);

impl StreamId {
    /// From the 16 bytes of a UUID; the nil UUID names nothing and is refused.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        match Uuid::from_slice(bytes) {
            Ok(uuid) if !uuid.is_nil() => Ok(Self(uuid)),
            Ok(_) => Err("the nil UUID is not a stream id".to_owned()),
            Err(_) => Err(format!("{} bytes are not a stream id: it is the 16 bytes of a UUID", bytes.len())),
        }
    }

    /// A new one, for a new queue.
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// The UUID's 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The UUID.
    pub fn uuid(self) -> Uuid {
        self.0
    }
}

impl Default for StreamId {
    fn default() -> Self {
        Self::new()
    }
}

impl From<Uuid> for StreamId {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `text` in quotes for an error message: control characters escaped, and cut to a length that a log can bear.
pub fn quoted(text: &str) -> String {
    const CHARS_SHOWN_MAX: usize = 64;
    let mut shown: String = text.chars().take(CHARS_SHOWN_MAX).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_ids_are_checked() {
        for good in ["a", "pump-1", "00:1A:2b", "site.berlin_3", &"x".repeat(128)] {
            assert_eq!(DeviceId::parse(good).expect(good).as_str(), good);
        }
        for bad in ["", "-a", ".", "a b", "a/b", "ä", "a\n", &"x".repeat(129)] {
            assert!(DeviceId::parse(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn stream_ids_are_uuids_and_not_nil() {
        let id = StreamId::new();
        assert_eq!(StreamId::parse(id.as_bytes()), Ok(id));
        assert!(StreamId::parse(&[0; 16]).is_err());
        assert!(StreamId::parse(&[1; 15]).is_err());
    }

    #[test]
    fn quoting_escapes_and_cuts() {
        assert_eq!(quoted("a\n"), "\"a\\n\"");
        assert!(quoted(&"x".repeat(1000)).len() < 80);
    }
}
