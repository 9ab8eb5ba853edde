//! How far a device's clock is from the gateway's.
//!
//! Two things tell. On a Connect stream the device may answer the Welcome with a `ClockSample`: four times, two of each clock, which
//! give the offset and how far wrong it can be at the most, the network being slower one way than the other (RFC 5905 section 8). And
//! readings tell, with every device: one with the time `t` that came in at `r` was measured earlier than `r`, so that the clock is
//! ahead by `t − r` at least. That is a lower bound alone: a clock that is behind looks like readings that come late.
//!
//! Where the settings ask for it, the times of readings are [corrected](crate::model::correction) by an offset that was measured. What is
//! added to them stays the same as long as further measurements allow it, so that times keep their distances.

use super::{Device, Registry};
use crate::{
    config::{self, ClockCorrection},
    model::Timestamp,
    telemetry::{Metrics, names},
};
use parking_lot::Mutex;
use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

/// For how long, and up to twice as long, the highest lead of readings counts.
const WINDOW: Duration = Duration::from_secs(600);
/// By how many microseconds a correction may be further from a measurement than that can be wrong, and stays: clocks drift.
const CORRECTION_TOLERANCE: i64 = 10_000;

/// An estimate of a device's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockOffset {
    /// By how many microseconds the device's clock is ahead of the gateway's; negative: behind.
    pub micros: i64,
    /// By how many microseconds the true offset may differ from that. `None` where readings alone tell: then it is a lower bound.
    pub uncertainty_micros: Option<i64>,
    /// When that was seen, by the gateway's clock.
    pub time: Timestamp,
}

/// What is thought of a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Standing {
    /// Not known to be off.
    #[default]
    Right,
    /// Ahead by more than is allowed, for certain.
    Ahead,
    /// Behind by more than is allowed, for certain.
    Behind,
}

impl ClockOffset {
    fn highest(&self) -> i64 {
        self.uncertainty_micros.map_or(i64::MAX, |uncertainty| self.micros.saturating_add(uncertainty))
    }

    fn lowest(&self) -> i64 {
        self.micros.saturating_sub(self.uncertainty_micros.unwrap_or(0))
    }

    /// What is thought of a clock that may be `max` off; 0: anything.
    pub fn standing(&self, max: Duration) -> Standing {
        let max = i64::try_from(max.as_micros()).unwrap_or(i64::MAX);
        match (self.lowest(), self.highest()) {
            _ if max == 0 => Standing::Right,
            (lowest, _) if lowest > max => Standing::Ahead,
            (_, highest) if highest < -max => Standing::Behind,
            _ => Standing::Right,
        }
    }

    /// What is to be added to the device's times by this measurement, microseconds, when `before` was until now; 0: nothing.
    fn correction(&self, before: i64, max: Duration) -> i64 {
        let Some(uncertainty) = self.uncertainty_micros else { return 0 };
        let stays = before != 0 && self.micros.saturating_add(before).saturating_abs() <= uncertainty.saturating_add(CORRECTION_TOLERANCE);
        match self.standing(max) {
            _ if stays => before,
            Standing::Right => 0,
            Standing::Ahead | Standing::Behind => -self.micros,
        }
    }
}

/// A message to a device and the answer.
#[derive(Debug, Clone, Copy)]
pub struct Exchange {
    /// When the message was sent, by the gateway's clock.
    pub sent: Timestamp,
    /// When it came, by the device's.
    pub received: Timestamp,
    /// When the device answered, by its clock.
    pub answered: Timestamp,
    /// How long after `sent` the answer came.
    pub round_trip: Duration,
}

impl Exchange {
    /// The offset; `None` when a clock was set meanwhile, so that the times contradict one another.
    fn offset(&self) -> Option<ClockOffset> {
        let round_trip = i64::try_from(self.round_trip.as_micros()).ok()?;
        let held = self.answered.micros() - self.received.micros();
        let delay = round_trip.checked_sub(held).filter(|delay| held >= 0 && *delay >= 0)?;
        let there = self.received.micros() - self.sent.micros();
        let back = self.answered.micros() - self.sent.micros() - round_trip;
        let time = self.sent.saturating_add(self.round_trip);
        Some(ClockOffset { micros: (there + back) / 2, uncertainty_micros: Some(delay / 2 + 1), time })
    }
}

/// What a gateway knows of one device's clock, since the gateway began.
#[derive(Debug, Default)]
pub struct DeviceClock {
    known: Mutex<Known>,
    // Beside the rest, as it is looked at with each run of batches.
    correction: AtomicI64,
}

#[derive(Debug, Default)]
struct Known {
    measured: Option<ClockOffset>,
    // The highest lead of readings since the window began, and in the one right before.
    window: Option<Window>,
    before: Option<i64>,
    standing: Standing,
}

#[derive(Debug)]
struct Window {
    began: Timestamp,
    last: Timestamp,
    lead: i64,
}

impl DeviceClock {
    /// The estimate; `None` when nothing tells.
    pub fn offset(&self) -> Option<ClockOffset> {
        self.known.lock().offset()
    }

    /// Whether the clock is off, as of the last time that anything told.
    pub fn standing(&self) -> Standing {
        self.known.lock().standing
    }

    /// What is added to the times of the device's readings as they come in, microseconds; 0: nothing.
    pub fn correction(&self) -> i64 {
        self.correction.load(Ordering::Relaxed)
    }
}

impl Known {
    /// What readings tell.
    fn bound(&self) -> Option<ClockOffset> {
        self.window.as_ref().map(|window| ClockOffset {
            micros: self.before.map_or(window.lead, |before| before.max(window.lead)),
            uncertainty_micros: None,
            time: window.last,
        })
    }

    fn offset(&self) -> Option<ClockOffset> {
        let bound = self.bound();
        match (self.measured, bound) {
            // The clock was set since, or goes too fast.
            (Some(measured), Some(bound)) if bound.micros > measured.highest() => Some(bound),
            (Some(measured), _) => Some(measured),
            (None, bound) => bound,
        }
    }

    /// Readings were ahead by this much when they came in.
    fn see(&mut self, lead: i64, now: Timestamp) {
        match &mut self.window {
            Some(window) if now < window.began.saturating_add(WINDOW) => {
                window.lead = window.lead.max(lead);
                window.last = now;
            }
            window => {
                self.before = window.as_ref().filter(|window| now < window.began.saturating_add(2 * WINDOW)).map(|window| window.lead);
                *window = Some(Window { began: now, last: now, lead });
            }
        }
    }

    /// Forgets the measurement when readings contradict it by more than a clock may be off: then it was set since. By less, it goes too fast.
    fn forget_refuted(&mut self, max: Duration) {
        let max = i64::try_from(max.as_micros()).unwrap_or(i64::MAX);
        let bound = self.bound();
        self.measured = self.measured.filter(|measured| bound.is_none_or(|bound| bound.micros <= measured.highest().saturating_add(max)));
    }

    /// A measurement says more than all readings before it.
    fn measure(&mut self, offset: ClockOffset) {
        *self = Self { measured: Some(offset), standing: self.standing, ..Self::default() };
    }
}

/// Compares clocks, and tells of those that are off, or has them corrected. Cheap to copy.
#[derive(Debug, Clone, Copy)]
pub struct ClockWatch {
    offset_max: Duration,
    correction: ClockCorrection,
}

impl ClockWatch {
    /// As the settings say.
    pub fn new(settings: &config::Devices) -> Self {
        Self { offset_max: settings.clock_offset_max, correction: settings.clock_correction }
    }

    /// The device answered.
    pub fn measure(self, device: &Device, exchange: Exchange) {
        if let Some(offset) = exchange.offset() {
            self.note(device, |known| known.measure(offset));
        }
    }

    /// The newest of readings that came in was `lead` microseconds ahead of the gateway's clock; mostly it is behind.
    pub fn see(self, device: &Device, lead: i64, now: Timestamp) {
        self.note(device, |known| known.see(lead, now));
    }

    fn note(self, device: &Device, learn: impl FnOnce(&mut Known)) {
        let mut known = device.clock.known.lock();
        learn(&mut known);
        known.forget_refuted(self.offset_max);
        let Some(offset) = known.offset() else { return };
        let (before, now) = (known.standing, offset.standing(self.offset_max));
        known.standing = now;
        // Under the lock: of two that tell at once, the later one decides.
        let corrected_before = device.clock.correction();
        let corrected = match (self.correction, known.measured) {
            (ClockCorrection::Measured, Some(measured)) => measured.correction(corrected_before, self.offset_max),
            _ => 0,
        };
        device.clock.correction.store(corrected, Ordering::Relaxed);
        drop(known);
        let offset_seconds = offset.micros as f64 / 1e6;
        match now {
            _ if now == before => {}
            Standing::Right => tracing::info!(device = %device.id, offset_seconds, "device.clock_right"),
            Standing::Ahead | Standing::Behind => tracing::warn!(device = %device.id, offset_seconds, "device.clock_off"),
        }
        if corrected != corrected_before {
            let correction_seconds = corrected as f64 / 1e6;
            tracing::info!(device = %device.id, offset_seconds, correction_seconds, "device.clock_corrected");
        }
    }

    /// Shows at each scrape how many devices' clocks are off, and how many are corrected.
    pub fn show(self, registry: &Registry, metrics: &Metrics) {
        let gauge = |direction: &'static str| metrics.gauge(names::DEVICES_CLOCK_OFF, &[("direction", direction.into())]);
        let (ahead, behind, registry) = (gauge("ahead"), gauge("behind"), registry.clone());
        let corrected = metrics.gauge(names::DEVICES_CLOCK_CORRECTED, &[]);
        metrics.on_scrape(move || {
            let (mut are_ahead, mut are_behind, mut are_corrected) = (0_u32, 0_u32, 0_u32);
            registry.each_loaded(|device| {
                match device.clock.standing() {
                    Standing::Ahead => are_ahead += 1,
                    Standing::Behind => are_behind += 1,
                    Standing::Right => {}
                }
                are_corrected += u32::from(device.clock.correction() != 0);
            });
            ahead.set(are_ahead);
            behind.set(are_behind);
            corrected.set(are_corrected);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_micros(1_700_000_000_000_000 + micros).expect("in range")
    }

    const SECOND: i64 = 1_000_000;

    #[test]
    fn an_exchange_tells_the_offset_as_well_as_the_delay_allows() {
        // 5 s ahead; 30 ms there, 10 ms back, and 1 s in between.
        let exchange = Exchange {
            sent: at(0),
            received: at(5 * SECOND + 30_000),
            answered: at(6 * SECOND + 30_000),
            round_trip: Duration::from_micros(1_040_000),
        };
        let offset = exchange.offset().expect("the times agree");
        assert_eq!((offset.micros, offset.uncertainty_micros), (5 * SECOND + 10_000, Some(20_001)));
        assert!(offset.lowest() <= 5 * SECOND && 5 * SECOND <= offset.highest());
        assert_eq!(offset.time, at(1_040_000));
    }

    #[test]
    fn times_that_contradict_one_another_tell_nothing() {
        let exchange = |answered, micros| Exchange {
            sent: at(0),
            received: at(10),
            answered: at(answered),
            round_trip: Duration::from_micros(micros),
        };
        assert_eq!(exchange(9, 100).offset(), None, "answered before it came");
        assert_eq!(exchange(200, 100).offset(), None, "held for longer than it was away");
        assert!(exchange(110, 100).offset().is_some());
    }

    #[test]
    fn readings_tell_how_far_ahead_a_clock_is_at_least() {
        let mut known = Known::default();
        assert_eq!(known.offset(), None);
        known.see(-3 * SECOND, at(0));
        known.see(2 * SECOND, at(1));
        known.see(-SECOND, at(2));
        assert_eq!(known.offset(), Some(ClockOffset { micros: 2 * SECOND, uncertainty_micros: None, time: at(2) }));
        // It counts for the rest of its window, and the one behind it.
        known.see(-SECOND, at(600 * SECOND));
        assert_eq!(known.offset().map(|offset| offset.micros), Some(2 * SECOND));
        known.see(-SECOND, at(1200 * SECOND));
        assert_eq!(known.offset().map(|offset| offset.micros), Some(-SECOND));
        // After a silence nothing of before does.
        known.see(9 * SECOND, at(1201 * SECOND));
        known.see(-5 * SECOND, at(9000 * SECOND));
        assert_eq!(known.offset().map(|offset| offset.micros), Some(-5 * SECOND));
    }

    #[test]
    fn a_measurement_stands_until_readings_contradict_it() {
        let mut known = Known::default();
        known.see(60 * SECOND, at(0));
        let measured = ClockOffset { micros: SECOND, uncertainty_micros: Some(10), time: at(1) };
        known.measure(measured);
        assert_eq!(known.offset(), Some(measured), "what readings said before no longer counts");
        known.see(SECOND + 10, at(2));
        assert_eq!(known.offset(), Some(measured));
        known.see(SECOND + 11, at(3));
        assert_eq!(known.offset().map(|offset| (offset.micros, offset.uncertainty_micros)), Some((SECOND + 11, None)));
    }

    #[test]
    fn a_correction_stays_as_long_as_measurements_allow_it() {
        let max = Duration::from_secs(60);
        let correction = |micros, uncertainty, before| {
            ClockOffset { micros, uncertainty_micros: Some(uncertainty), time: at(0) }.correction(before, max)
        };
        assert_eq!(correction(3600 * SECOND, 500, 0), -3600 * SECOND);
        assert_eq!(correction(-3600 * SECOND, 500, 0), 3600 * SECOND);
        assert_eq!(correction(3600 * SECOND + 10_500, 500, -3600 * SECOND), -3600 * SECOND, "within the measurement and the tolerance");
        assert_eq!(correction(3600 * SECOND + 10_501, 500, -3600 * SECOND), -3600 * SECOND - 10_501);
        assert_eq!(correction(3700 * SECOND, 200 * SECOND, -3600 * SECOND), -3600 * SECOND, "a poor measurement changes nothing");
        assert_eq!(correction(0, 500, -3600 * SECOND), 0, "the clock is right again");
        assert_eq!(correction(60 * SECOND, 500, 0), 0, "not off for certain");
        assert_eq!(ClockOffset { micros: 3600 * SECOND, uncertainty_micros: None, time: at(0) }.correction(0, max), 0, "a bound alone");
    }

    #[test]
    fn a_measurement_is_forgotten_when_readings_show_that_the_clock_was_set() {
        let (mut known, max) = (Known::default(), Duration::from_secs(60));
        let measured = ClockOffset { micros: -3600 * SECOND, uncertainty_micros: Some(10), time: at(1) };
        known.measure(measured);
        known.see(-3550 * SECOND, at(2));
        known.forget_refuted(max);
        assert_eq!(known.measured, Some(measured), "it goes too fast");
        known.see(-SECOND, at(3));
        known.forget_refuted(max);
        known.see(-7200 * SECOND, at(9000 * SECOND));
        assert_eq!(known.offset().map(|offset| (offset.micros, offset.uncertainty_micros)), Some((-7200 * SECOND, None)));
    }

    #[test]
    fn off_is_only_what_is_certain() {
        let max = Duration::from_secs(60);
        let standing = |micros, uncertainty_micros| ClockOffset { micros, uncertainty_micros, time: at(0) }.standing(max);
        assert_eq!(standing(61 * SECOND, None), Standing::Ahead);
        assert_eq!(standing(-3600 * SECOND, None), Standing::Right, "its readings may be late");
        assert_eq!(standing(-61 * SECOND, Some(SECOND / 2)), Standing::Behind);
        assert_eq!(standing(-61 * SECOND, Some(2 * SECOND)), Standing::Right);
        assert_eq!(standing(61 * SECOND, Some(2 * SECOND)), Standing::Right);
        assert_eq!(standing(60 * SECOND, None), Standing::Right);
        assert_eq!(ClockOffset { micros: i64::MAX, uncertainty_micros: None, time: at(0) }.standing(Duration::ZERO), Standing::Right);
    }
}
