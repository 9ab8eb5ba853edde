//! What a run counts, and how it is shown.

use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    io::IsTerminal,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tidegate::{
    client::{LinkEvent, LinkObserver},
    model::batch::reason_name,
    pb,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Progress is printed so often where it is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
const TERMINAL_INTERVAL: Duration = Duration::from_millis(250);

/// Longer latencies count as this: an hour. The bound is given, since recording with saturation does not widen a histogram.
const LATENCY_MAX_US: u64 = 3_600_000_000;
/// How many rejected batches are told one by one.
const EXAMPLES_MAX: usize = 5;

/// Batches and readings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Count {
    pub batches: u64,
    pub readings: u64,
}

impl Count {
    pub fn add(&mut self, batches: u64, readings: u64) {
        self.batches += batches;
        self.readings += readings;
    }

    /// The difference; none where `other` is more.
    pub fn less(self, other: Self) -> Self {
        Self { batches: self.batches.saturating_sub(other.batches), readings: self.readings.saturating_sub(other.readings) }
    }
}

/// Counters that all devices of a run share.
#[derive(Debug)]
pub struct Stats {
    began: Instant,
    pub generated_readings: AtomicU64,
    acknowledged_batches: AtomicU64,
    acknowledged_readings: AtomicU64,
    /// When the last acknowledgement came, in microseconds after `began`.
    last_acknowledged_us: AtomicU64,
    connected: AtomicU64,
    pub retries: AtomicU64,
    reconnects: AtomicU64,
    pub duplicates: AtomicU64,
    rejected: Mutex<BTreeMap<&'static str, Count>>,
    rejected_examples: Mutex<Vec<String>>,
    /// Microseconds.
    latency: Mutex<Histogram<u64>>,
    /// The longest that a device was between two acknowledgements.
    longest_gap_us: AtomicU64,
}

impl Stats {
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            generated_readings: AtomicU64::new(0),
            acknowledged_batches: AtomicU64::new(0),
            acknowledged_readings: AtomicU64::new(0),
            last_acknowledged_us: AtomicU64::new(0),
            connected: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
            duplicates: AtomicU64::new(0),
            rejected: Mutex::default(),
            rejected_examples: Mutex::default(),
            latency: Mutex::new(Histogram::new_with_max(LATENCY_MAX_US, 3).expect("3 significant digits are allowed")),
            longest_gap_us: AtomicU64::new(0),
        }
    }

    pub fn acknowledged(&self, batches: u64, readings: u64) {
        if batches > 0 {
            self.acknowledged_batches.fetch_add(batches, Relaxed);
            self.acknowledged_readings.fetch_add(readings, Relaxed);
            self.last_acknowledged_us.fetch_max(self.began.elapsed().as_micros() as u64, Relaxed);
        }
    }

    pub fn rejected(&self, reason: pb::RejectReason, batches: u64, readings: u64) {
        self.rejected.lock().entry(reason_name(reason)).or_default().add(batches, readings);
    }

    /// Keeps the first few, to be shown.
    pub fn rejected_example(&self, rejected: &pb::RejectedBatch) {
        let mut examples = self.rejected_examples.lock();
        if examples.len() < EXAMPLES_MAX {
            let at = if rejected.field.is_empty() { String::new() } else { format!(" at {}", rejected.field) };
            examples.push(format!("batch {}{at}: {}", rejected.sequence, rejected.message));
        }
    }

    fn readings_per_second(&self) -> f64 {
        let seconds = self.last_acknowledged_us.load(Relaxed) as f64 / 1e6;
        if seconds > 0.0 { self.acknowledged_readings.load(Relaxed) as f64 / seconds } else { 0.0 }
    }

    /// The figures as they are now.
    pub fn summary(&self) -> Summary {
        let latency = self.latency.lock();
        let at = |quantile: f64| latency.value_at_quantile(quantile) as f64 / 1e3;
        let generated = self.generated_readings.load(Relaxed);
        let acknowledged = Count { batches: self.acknowledged_batches.load(Relaxed), readings: self.acknowledged_readings.load(Relaxed) };
        Summary {
            seconds: self.last_acknowledged_us.load(Relaxed) as f64 / 1e6,
            readings: generated,
            acknowledged,
            unacknowledged_readings: generated.saturating_sub(acknowledged.readings),
            readings_per_second: self.readings_per_second().round(),
            ack_latency_ms: (!latency.is_empty()).then(|| Latency {
                p50: at(0.5),
                p90: at(0.9),
                p99: at(0.99),
                max: latency.max() as f64 / 1e3,
            }),
            longest_ack_gap_ms: self.longest_gap_us.load(Relaxed) as f64 / 1e3,
            retries: self.retries.load(Relaxed),
            reconnects: self.reconnects.load(Relaxed),
            duplicates: self.duplicates.load(Relaxed),
            rejected: self.rejected.lock().clone(),
            rejected_examples: self.rejected_examples.lock().clone(),
        }
    }

    fn progress_line(&self, readings_per_second: f64) -> String {
        let acknowledged = self.acknowledged_readings.load(Relaxed);
        let pending = self.generated_readings.load(Relaxed).saturating_sub(acknowledged);
        let (connected, reconnects) = (self.connected.load(Relaxed), self.reconnects.load(Relaxed));
        format!(
            "{readings_per_second:.0} readings/s, {acknowledged} acknowledged, {pending} pending, {connected} connected, {reconnects} reconnects"
        )
    }
}

/// One device's view of the run's counters.
#[derive(Debug)]
pub struct DeviceObserver {
    pub stats: Arc<Stats>,
    pub rejected: Arc<Mutex<Count>>,
    connected: AtomicBool,
    was_connected: AtomicBool,
    /// When its last acknowledgement came, in microseconds after the run began; 0 before the first.
    last_acknowledged_us: AtomicU64,
}

impl DeviceObserver {
    pub fn new(stats: Arc<Stats>) -> Self {
        Self {
            stats,
            rejected: Arc::default(),
            connected: AtomicBool::new(false),
            was_connected: AtomicBool::new(false),
            last_acknowledged_us: AtomicU64::new(0),
        }
    }

    fn acknowledged(&self, batches: u64, readings: u64) {
        self.stats.acknowledged(batches, readings);
        let now_us = self.stats.began.elapsed().as_micros() as u64;
        let last_us = self.last_acknowledged_us.swap(now_us, Relaxed);
        if last_us > 0 {
            self.stats.longest_gap_us.fetch_max(now_us.saturating_sub(last_us), Relaxed);
        }
    }
}

impl LinkObserver for DeviceObserver {
    fn observe(&self, event: &LinkEvent<'_>) {
        let stats = &self.stats;
        match event {
            LinkEvent::Connected { .. } => {
                self.connected.store(true, Relaxed);
                stats.connected.fetch_add(1, Relaxed);
                stats.reconnects.fetch_add(u64::from(self.was_connected.swap(true, Relaxed)), Relaxed);
            }
            LinkEvent::Disconnected { .. } => {
                stats.connected.fetch_sub(u64::from(self.connected.swap(false, Relaxed)), Relaxed);
            }
            LinkEvent::Sent { retry, .. } => drop(stats.retries.fetch_add(u64::from(*retry), Relaxed)),
            LinkEvent::Acknowledged { taken, .. } => self.acknowledged(taken.batches, taken.readings),
            LinkEvent::BatchAcknowledged { latency, .. } => {
                let micros = latency.as_micros() as u64;
                stats.latency.lock().saturating_record(micros.max(1));
            }
            LinkEvent::Duplicates { batches } => drop(stats.duplicates.fetch_add(*batches, Relaxed)),
            LinkEvent::Rejected(rejected) => {
                self.rejected.lock().add(1, rejected.readings);
                stats.rejected(rejected.reason(), 1, rejected.readings);
                stats.rejected_example(rejected);
            }
            _ => {}
        }
    }
}

/// The figures of a run.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// From the start to the last acknowledgement.
    pub seconds: f64,
    /// That the devices had.
    pub readings: u64,
    /// Dealt with by the gateway, rejected ones included.
    pub acknowledged: Count,
    pub unacknowledged_readings: u64,
    pub readings_per_second: f64,
    /// From the sending of a batch to its acknowledgement; none where only one answer came for many batches.
    pub ack_latency_ms: Option<Latency>,
    /// The longest that a linked device was between two acknowledgements, its own pauses between batches included.
    pub longest_ack_gap_ms: f64,
    /// Batches that were sent more than once.
    pub retries: u64,
    pub reconnects: u64,
    /// Batches that the gateway had before.
    pub duplicates: u64,
    pub rejected: BTreeMap<&'static str, Count>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rejected_examples: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct Latency {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Summary {
    /// Whether all was taken and nothing rejected.
    pub fn is_good(&self) -> bool {
        self.unacknowledged_readings == 0 && self.rejected.is_empty()
    }

    /// For people.
    pub fn print(&self) {
        println!("readings        {}", self.readings);
        println!("acknowledged    {} in {} batches", self.acknowledged.readings, self.acknowledged.batches);
        println!("rate            {:.0} readings/s over {:.1} s", self.readings_per_second, self.seconds);
        if let Some(Latency { p50, p90, p99, max }) = &self.ack_latency_ms {
            println!("ack latency     p50 {p50:.2} ms, p90 {p90:.2} ms, p99 {p99:.2} ms, max {max:.2} ms");
        }
        if self.longest_ack_gap_ms > 0.0 {
            println!("longest gap     {:.2} s between two acknowledgements of a device", self.longest_ack_gap_ms / 1e3);
        }
        println!("sent again      {} batches, {} of them duplicates; {} reconnects", self.retries, self.duplicates, self.reconnects);
        for (reason, count) in &self.rejected {
            println!("rejected        {} readings in {} batches: {reason}", count.readings, count.batches);
        }
        self.rejected_examples.iter().for_each(|example| println!("    {example}"));
        if self.unacknowledged_readings > 0 {
            println!("unacknowledged  {} readings: raise --drain-timeout, or look at the gateway", self.unacknowledged_readings);
        }
    }
}

/// Where progress goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    Terminal,
    Plain,
    Silent,
}

impl Progress {
    pub fn choose(json: bool, quiet: bool) -> Self {
        match (quiet, std::io::stderr().is_terminal(), json) {
            (true, _, _) | (false, false, true) => Self::Silent,
            (false, true, _) => Self::Terminal,
            (false, false, false) => Self::Plain,
        }
    }

    /// A bar for `total` steps; hidden where there is no terminal.
    pub fn bar(self, what: &'static str, total: u64) -> ProgressBar {
        match self {
            Self::Terminal => ProgressBar::new(total)
                .with_style(ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}").expect("a good template"))
                .with_message(what),
            Self::Plain => {
                eprintln!("{what} …");
                ProgressBar::hidden()
            }
            Self::Silent => ProgressBar::hidden(),
        }
    }

    /// Shows how a run goes, until `done`.
    pub async fn show(self, stats: Arc<Stats>, done: CancellationToken) {
        let period = match self {
            Self::Terminal => TERMINAL_INTERVAL,
            Self::Plain => PLAIN_INTERVAL,
            Self::Silent => return,
        };
        let line = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {msg}").expect("a good template"));
        let mut ticks = tokio::time::interval(period);
        ticks.tick().await;
        let (mut last, mut since) = (0, Instant::now());
        while done.run_until_cancelled(ticks.tick()).await.is_some() {
            let acknowledged = stats.acknowledged_readings.load(Relaxed);
            let rate = (acknowledged - last) as f64 / since.elapsed().as_secs_f64();
            (last, since) = (acknowledged, Instant::now());
            match self {
                Self::Terminal => {
                    line.set_message(stats.progress_line(rate));
                    line.tick();
                }
                _ => eprintln!("{}", stats.progress_line(rate)),
            }
        }
        line.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Latencies come out as they went in, to the histogram's three digits, also those far beyond the first.
    #[test]
    fn latencies_are_recorded_as_they_are() {
        let observer = DeviceObserver::new(Arc::new(Stats::new()));
        for millis in [1, 40, 40, 40, 5_000] {
            observer.observe(&LinkEvent::BatchAcknowledged { sequence: 1, latency: Duration::from_millis(millis) });
        }
        let latency = observer.stats.summary().ack_latency_ms.expect("recorded");
        for (found, expected) in [(latency.p50, 40.0), (latency.max, 5_000.0)] {
            assert!((found - expected).abs() <= expected / 500.0, "{found} ms is not {expected} ms");
        }
    }
}
