//! Lines of the log that say something once that goes on and on.

use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// How long after a line there is no other one of its kind, unless it is said otherwise.
const INTERVAL: Duration = Duration::from_secs(10);

/// Lets one line of a kind pass in a while, ten seconds by default, and counts those that it leaves out.
#[derive(Debug)]
pub struct Sparing {
    interval: Duration,
    told: Mutex<Told>,
}

impl Default for Sparing {
    fn default() -> Self {
        Self::every(INTERVAL)
    }
}

#[derive(Debug, Default)]
struct Told {
    last: Option<Instant>,
    left_out: u64,
}

impl Sparing {
    /// Lets one line pass in each interval.
    pub fn every(interval: Duration) -> Self {
        Self { interval, told: Mutex::default() }
    }

    /// Whether a line may be written now; if so, how many were left out since the last one.
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut told = self.told.lock();
        if told.last.is_some_and(|last| now < last + self.interval) {
            told.left_out += 1;
            return None;
        }
        told.last = Some(now);
        Some(std::mem::take(&mut told.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_passes_in_a_while_and_says_how_many_did_not() {
        let (sparing, began) = (Sparing::default(), Instant::now());
        let pass_after = |elapsed| sparing.pass_at(began + elapsed);
        assert_eq!(pass_after(Duration::ZERO), Some(0));
        assert_eq!(pass_after(INTERVAL / 2), None);
        assert_eq!(pass_after(INTERVAL - Duration::from_nanos(1)), None);
        assert_eq!(pass_after(INTERVAL), Some(2));
        assert_eq!(pass_after(INTERVAL * 3), Some(0));
    }
}
