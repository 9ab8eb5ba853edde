//! How long to wait before trying again.

use rand::Rng;
use std::time::Duration;

/// The most that a gateway's `RetryInfo` is followed: a mistake there must not silence a device for a day.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);

/// The bounds of a [`Backoff`].
#[derive(Debug, Clone, Copy)]
pub struct BackoffSettings {
    /// The first wait is at most this long, each further one at most twice as long as the one before; default 100 ms.
    pub base: Duration,
    /// No wait is longer than this, what the gateway asks for aside; default 30 s.
    pub cap: Duration,
}

impl Default for BackoffSettings {
    fn default() -> Self {
        Self { base: Duration::from_millis(100), cap: Duration::from_secs(30) }
    }
}

/// Exponential backoff with full jitter.
///
/// Each wait is chosen evenly from nothing to a bound that doubles. After an outage a fleet so comes back spread out rather
/// than in waves. Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
#[derive(Debug, Clone)]
pub struct Backoff {
    settings: BackoffSettings,
    attempts: u32,
}

impl Backoff {
    /// One that has not waited yet.
    pub fn new(settings: BackoffSettings) -> Self {
        Self { settings, attempts: 0 }
    }

    /// The next wait. `retry_after` is what the gateway asked for (`RetryInfo`): the jitter comes on top of it.
    pub fn next_delay(&mut self, retry_after: Option<Duration>) -> Duration {
        let bound = self.bound();
        self.attempts = self.attempts.saturating_add(1);
        retry_after.unwrap_or_default().min(RETRY_AFTER_MAX) + rand::rng().random_range(Duration::ZERO..=bound)
    }

    /// To be called after success: the next wait is short again.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }

    fn bound(&self) -> Duration {
        let factor = 1u32.checked_shl(self.attempts).unwrap_or(u32::MAX);
        self.settings.base.saturating_mul(factor).min(self.settings.cap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: BackoffSettings = BackoffSettings { base: Duration::from_millis(100), cap: Duration::from_secs(1) };

    #[test]
    fn the_bound_doubles_up_to_the_cap() {
        let mut backoff = Backoff::new(SETTINGS);
        let mut bounds_ms = Vec::new();
        for _ in 0..6 {
            bounds_ms.push(backoff.bound().as_millis());
            assert!(backoff.next_delay(None) <= SETTINGS.cap);
        }
        assert_eq!(bounds_ms, [100, 200, 400, 800, 1_000, 1_000]);
        (0..100).for_each(|_| assert!(backoff.next_delay(None) <= SETTINGS.cap));
        backoff.reset();
        assert_eq!(backoff.bound(), SETTINGS.base);
    }

    #[test]
    fn what_the_gateway_asks_for_is_the_least_and_is_bounded() {
        let mut backoff = Backoff::new(SETTINGS);
        let asked = Duration::from_secs(7);
        for _ in 0..20 {
            let delay = backoff.next_delay(Some(asked));
            assert!((asked..=asked + SETTINGS.cap).contains(&delay), "{delay:?}");
        }
        assert!(backoff.next_delay(Some(Duration::MAX)) <= RETRY_AFTER_MAX + SETTINGS.cap);
    }

    #[test]
    fn waits_are_spread() {
        let delays: std::collections::BTreeSet<Duration> = (0..50).map(|_| Backoff::new(SETTINGS).next_delay(None)).collect();
        assert!(delays.len() > 25, "{delays:?}");
    }
}
