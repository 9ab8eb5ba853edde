//! How much one device and one operator may do.
//!
//! Rates are kept by the generic cell rate algorithm (ITU-T I.371, as a virtual schedule): of each that is held to a rate one number is
//! known, the time up to which it has used the rate. What is sent is taken first and paid for afterwards, so that nothing is too large
//! for a rate, and a device that sends a minute's readings at once then has a minute.

use crate::{
    config::Limits,
    error::Error,
    store::Count,
    telemetry::{Metrics, names},
};
use metrics::Counter;
use std::{
    sync::{
        Arc, LazyLock,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::{Duration, Instant},
};

/// How far ahead a rate may be used: who was idle may send a second's worth at once.
const BURST: Duration = Duration::from_secs(1);

/// For how long an upload is held back. Who would have to wait for longer is told when to come again, and holds nothing meanwhile.
pub const HELD_BACK_MAX: Duration = Duration::from_secs(5);

/// So much a second; 0: any amount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    setting: &'static str,
    per_second: u64,
}

/// How far one has used a rate. Two limits of one rate must not share a meter.
#[derive(Debug, Default)]
// The time up to which it is used, in nanoseconds since `now` began to count.
pub struct Meter(AtomicU64);

fn now() -> u64 {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    // Later than any time that a fresh meter holds.
    nanos(BEGAN.elapsed().saturating_add(BURST))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Rate {
    /// Of a setting.
    pub fn new(setting: &'static str, per_second: u64) -> Self {
        Self { setting, per_second }
    }

    /// How long it takes until `meter` may use it again; `None`: it may now.
    fn wait(self, meter: &Meter, now: u64) -> Option<Duration> {
        if self.per_second == 0 {
            return None;
        }
        let ahead = meter.0.load(Relaxed).saturating_sub(now).saturating_sub(nanos(BURST));
        (ahead > 0).then(|| Duration::from_nanos(ahead))
    }

    /// `amount` is used, whether it was free or not.
    fn spend(self, meter: &Meter, amount: u64, now: u64) {
        if self.per_second == 0 {
            return;
        }
        let cost = u128::from(amount) * 1_000_000_000 / u128::from(self.per_second);
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        // Never fails: it always has a new value.
        let _ = meter.0.fetch_update(Relaxed, Relaxed, |used| Some(used.max(now).saturating_add(cost)));
    }

    fn refusal(self, retry_after: Duration) -> Error {
        Error::RateLimited { setting: self.setting, limit: self.per_second, retry_after, accepted: None }
    }
}

/// What a device has used.
#[derive(Debug, Default)]
pub struct DeviceUsage {
    readings: Meter,
    bytes: Meter,
    calls: Arc<AtomicUsize>,
}

/// What an operator has used with one credential, or with all tokens that a provider gave to it.
#[derive(Debug, Default)]
pub struct OperatorUsage {
    rate: Meter,
    calls: Arc<AtomicUsize>,
}

/// One of a number of calls that may be open; over when it is dropped.
#[derive(Debug)]
pub struct OpenCall(Option<Arc<AtomicUsize>>);

impl Drop for OpenCall {
    fn drop(&mut self) {
        if let Some(open) = &self.0 {
            open.fetch_sub(1, AcqRel);
        }
    }
}

/// How many calls may be open at once; 0: any number.
#[derive(Debug, Clone, Copy)]
struct CallsMax {
    setting: &'static str,
    max: usize,
}

impl CallsMax {
    fn open(self, calls: &Arc<AtomicUsize>) -> Result<OpenCall, Error> {
        if self.max == 0 {
            return Ok(OpenCall(None));
        }
        let more = |open| (open < self.max).then_some(open + 1);
        match calls.fetch_update(AcqRel, Acquire, more) {
            Ok(_) => Ok(OpenCall(Some(calls.clone()))),
            Err(_) => Err(Error::Overloaded { setting: self.setting, limit: self.max }),
        }
    }
}

/// Refusals at a limit, counted.
#[derive(Clone)]
struct Refusals(Arc<[(&'static str, Counter)]>);

impl Refusals {
    fn new(metrics: &Metrics, settings: &[&'static str]) -> Self {
        Self(settings.iter().map(|&setting| (setting, metrics.counter(names::LIMIT_REFUSALS, &[("setting", setting.into())]))).collect())
    }

    fn count(&self, error: Error) -> Error {
        if let Error::RateLimited { setting: limit, .. } | Error::Overloaded { setting: limit, .. } = &error
            && let Some((_, counter)) = self.0.iter().find(|(setting, _)| setting == limit)
        {
            counter.increment(1);
        }
        error
    }
}

/// What each device may do. Cheap to clone.
#[derive(Clone)]
pub struct DeviceLimits {
    readings: Rate,
    bytes: Rate,
    calls: CallsMax,
    refusals: Refusals,
    held_back: Counter,
}

impl DeviceLimits {
    /// As the settings say.
    pub fn new(settings: &Limits, metrics: &Metrics) -> Self {
        let readings = Rate::new("limits.device_readings_per_second", settings.device_readings_per_second);
        let bytes = Rate::new("limits.device_bytes_per_second", settings.device_bytes_per_second);
        let calls = CallsMax { setting: "limits.device_calls_max", max: settings.device_calls_max };
        let refusals = Refusals::new(metrics, &[readings.setting, bytes.setting, calls.setting]);
        Self { readings, bytes, calls, refusals, held_back: metrics.counter(names::UPLOAD_WAITS, &[]) }
    }

    /// Counts one more call of a device that sends batches.
    pub fn open(&self, device: &DeviceUsage) -> Result<OpenCall, Error> {
        self.calls.open(&device.calls).map_err(|error| self.refusals.count(error))
    }

    /// How long a device has to wait before its next batch is taken, if it has to; the error when that would be too long.
    pub fn held_back(&self, device: &DeviceUsage) -> Result<Option<Duration>, Error> {
        if self.are_off() {
            return Ok(None);
        }
        let now = now();
        let waits = [(self.readings, &device.readings), (self.bytes, &device.bytes)];
        let longest = waits.into_iter().filter_map(|(rate, meter)| Some((rate.wait(meter, now)?, rate))).max_by_key(|(wait, _)| *wait);
        match longest {
            Some((wait, rate)) if wait > HELD_BACK_MAX => Err(self.refusals.count(rate.refusal(wait))),
            longest => Ok(longest.map(|(wait, _)| wait)),
        }
    }

    /// Counts a batch that waits for its device's rate.
    pub fn count_held_back(&self) {
        self.held_back.increment(1);
    }

    /// Whether nothing has to be waited for.
    pub fn are_free(&self, device: &DeviceUsage) -> bool {
        self.are_off() || {
            let now = now();
            self.readings.wait(&device.readings, now).is_none() && self.bytes.wait(&device.bytes, now).is_none()
        }
    }

    /// A batch came in.
    pub fn spend(&self, device: &DeviceUsage, readings: u64, bytes: usize) {
        if !self.are_off() {
            let now = now();
            self.readings.spend(&device.readings, readings, now);
            self.bytes.spend(&device.bytes, bytes as u64, now);
        }
    }

    fn are_off(&self) -> bool {
        self.readings.per_second == 0 && self.bytes.per_second == 0
    }
}

/// What each operator may do with one credential. Cheap to clone.
#[derive(Clone)]
pub struct OperatorLimits {
    rate: Rate,
    calls: CallsMax,
    refusals: Refusals,
}

impl OperatorLimits {
    /// As the settings say.
    pub fn new(settings: &Limits, metrics: &Metrics) -> Self {
        let rate = Rate::new("limits.operator_calls_per_second", settings.operator_calls_per_second);
        let calls = CallsMax { setting: "limits.operator_calls_max", max: settings.operator_calls_max };
        Self { rate, calls, refusals: Refusals::new(metrics, &[rate.setting, calls.setting]) }
    }

    /// Begins a call.
    pub fn open(&self, operator: &OperatorUsage) -> Result<OpenCall, Error> {
        let now = now();
        let opened = match self.rate.wait(&operator.rate, now) {
            Some(wait) => Err(self.rate.refusal(wait)),
            None => self.calls.open(&operator.calls),
        };
        if opened.is_ok() {
            self.rate.spend(&operator.rate, 1, now);
        }
        opened.map_err(|error| self.refusals.count(error))
    }
}

impl Error {
    /// The same, when it is a rate that is used up, with what of the call was dealt with before.
    pub fn after(self, taken: Count) -> Self {
        match self {
            Self::RateLimited { setting, limit, retry_after, .. } => {
                Self::RateLimited { setting, limit, retry_after, accepted: Some(taken) }
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_rate_is_used_a_second_ahead_and_then_waited_for() {
        let (rate, meter, begin) = (Rate::new("a", 10), Meter::default(), now());
        // A second's worth at once, and the one that goes beyond it.
        for _ in 0..11 {
            assert_eq!(rate.wait(&meter, begin), None);
            rate.spend(&meter, 1, begin);
        }
        assert_eq!(rate.wait(&meter, begin), Some(Duration::from_millis(100)));
        assert_eq!(rate.wait(&meter, begin + SECOND / 10), None);
        // From then on as many as the rate says.
        let mut taken = 0;
        for tenth in 1..=100 {
            let at = begin + tenth * SECOND / 10;
            if rate.wait(&meter, at).is_none() {
                rate.spend(&meter, 1, at);
                taken += 1;
            }
        }
        assert_eq!(taken, 100);
    }

    #[test]
    fn what_is_larger_than_the_rate_is_taken_and_paid_for() {
        let (rate, meter, begin) = (Rate::new("a", 1), Meter::default(), now());
        assert_eq!(rate.wait(&meter, begin), None);
        rate.spend(&meter, 61, begin);
        assert_eq!(rate.wait(&meter, begin), Some(Duration::from_secs(60)));
        assert_eq!(rate.wait(&meter, begin + 60 * SECOND), None);
        // Idle time is not saved up beyond a second.
        rate.spend(&meter, 3, begin + 10_000 * SECOND);
        assert_eq!(rate.wait(&meter, begin + 10_000 * SECOND), Some(Duration::from_secs(2)));
        rate.spend(&meter, u64::MAX, begin);
        assert!(rate.wait(&meter, begin) > Some(Duration::from_secs(1_000_000)), "it does not overflow");
    }

    #[test]
    fn without_a_rate_nothing_is_waited_for_or_kept() {
        let (rate, meter) = (Rate::new("a", 0), Meter::default());
        rate.spend(&meter, u64::MAX, now());
        assert_eq!(rate.wait(&meter, now()), None);
        assert_eq!(meter.0.into_inner(), 0);
    }

    #[test]
    fn only_so_many_calls_are_open_at_once() {
        let (limit, calls) = (CallsMax { setting: "a", max: 2 }, Arc::new(AtomicUsize::new(0)));
        let first = limit.open(&calls).expect("the first");
        let _second = limit.open(&calls).expect("the second");
        assert!(matches!(limit.open(&calls), Err(Error::Overloaded { setting: "a", limit: 2 })));
        drop(first);
        let _third = limit.open(&calls).expect("one has ended");
        assert!(limit.open(&calls).is_err());
    }
}
