//! Points in time, as readings have them.

use std::{fmt, time::Duration};

/// Microseconds since 1970-01-01T00:00:00Z, in the years 0001 to 9999 (the range of `google.protobuf.Timestamp`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// 0001-01-01T00:00:00Z.
    pub const MIN: Self = Self(-62_135_596_800_000_000);
    /// The last microsecond of the year 9999.
    pub const MAX: Self = Self(253_402_300_799_999_999);

    /// From microseconds since the epoch; `None` outside of the range.
    pub fn from_micros(micros: i64) -> Option<Self> {
        (Self::MIN.0..=Self::MAX.0).contains(&micros).then_some(Self(micros))
    }

    /// Microseconds since the epoch.
    pub fn micros(self) -> i64 {
        self.0
    }

    /// The machine's clock.
    pub fn now() -> Self {
        let now = jiff::Timestamp::now().as_microsecond();
        Self::from_micros(now).unwrap_or(if now < 0 { Self::MIN } else { Self::MAX })
    }

    /// Later by `duration`, at most [`MAX`](Self::MAX).
    pub fn saturating_add(self, duration: Duration) -> Self {
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        Self(self.0.saturating_add(micros).min(Self::MAX.0))
    }

    /// Earlier by `duration`, at least [`MIN`](Self::MIN).
    pub fn saturating_sub(self, duration: Duration) -> Self {
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        Self(self.0.saturating_sub(micros).max(Self::MIN.0))
    }

    /// From the protobuf type, to the microsecond below; the error says what is allowed.
    pub fn from_proto(proto: &prost_types::Timestamp) -> Result<Self, String> {
        if !(0..1_000_000_000).contains(&proto.nanos) {
            return Err(format!("nanos {} is not in 0 to 999,999,999", proto.nanos));
        }
        (proto.seconds.checked_mul(1_000_000))
            .and_then(|micros| micros.checked_add(i64::from(proto.nanos / 1_000)))
            .and_then(Self::from_micros)
            .ok_or_else(|| format!("{} seconds is not in the years 0001 to 9999", proto.seconds))
    }

    /// As the protobuf type.
    pub fn to_proto(self) -> prost_types::Timestamp {
        let (seconds, micros) = (self.0.div_euclid(1_000_000), self.0.rem_euclid(1_000_000));
        prost_types::Timestamp { seconds, nanos: micros as i32 * 1_000 }
    }
}

/// RFC 3339, in UTC.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(timestamp) => timestamp.fmt(f),
            // jiff ends a day before the year 9999 does, so that every zone's local time fits.
            Err(_) => write!(f, "{} µs since the epoch", self.0),
        }
    }
}

/// A positive protobuf duration, to the microsecond below; the error says what is wrong.
pub fn duration_from_proto(proto: &prost_types::Duration) -> Result<Duration, String> {
    if proto.seconds < 0 || !(0..1_000_000_000).contains(&proto.nanos) {
        return Err(format!("{} s {} ns is not a duration of 0 or more", proto.seconds, proto.nanos));
    }
    Ok(Duration::new(proto.seconds.unsigned_abs(), proto.nanos.unsigned_abs() / 1_000 * 1_000))
}

/// The protobuf duration of so many microseconds, which may be negative.
pub fn duration_to_proto(micros: i64) -> prost_types::Duration {
    prost_types::Duration { seconds: micros / 1_000_000, nanos: (micros % 1_000_000) as i32 * 1_000 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protobuf_timestamps_round_trip_to_the_microsecond() {
        for micros in [0, 1, -1, -1_500_000, Timestamp::MIN.0, Timestamp::MAX.0] {
            let time = Timestamp::from_micros(micros).expect("in range");
            assert_eq!(Timestamp::from_proto(&time.to_proto()), Ok(time));
        }
        assert!(Timestamp::from_proto(&prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }).is_err());
        assert!(Timestamp::from_proto(&prost_types::Timestamp { seconds: 0, nanos: -1 }).is_err());
    }

    #[test]
    fn shifts_stay_in_range() {
        assert_eq!(Timestamp::MAX.saturating_add(Duration::MAX), Timestamp::MAX);
        assert_eq!(Timestamp::MIN.saturating_sub(Duration::from_secs(1)), Timestamp::MIN);
    }
}
