//! What operators see: metrics, logs, readiness.
//!
//! [`Metrics`] belongs to one gateway, not to the process: tests run several gateways in one process, and each counts for
//! itself. Whoever counts something asks [`Metrics`] for its handles once and keeps them; a handle is an atomic number.

pub mod logs;
pub mod names;
mod process;
mod readiness;
mod sparing;

pub use names::{Kind, METRICS, Metric};
pub use readiness::{Readiness, ReadinessState};
pub use sparing::Sparing;

use crate::model::Timestamp;
use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, SharedString};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use parking_lot::Mutex;
use std::{fmt, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// How often the recorded observations of histograms are put into their buckets: bounds the memory they take between scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// One gateway's metrics. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    on_scrape: Mutex<Vec<Box<dyn Fn() + Send>>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Describes all of [`METRICS`]; nothing is counted yet.
    pub fn new() -> Self {
        let recorder = METRICS.iter().fold(PrometheusBuilder::new(), with_buckets).build_recorder();
        for metric in METRICS {
            match metric.kind {
                Kind::Counter => recorder.describe_counter(metric.name.into(), None, metric.help.into()),
                Kind::Gauge => recorder.describe_gauge(metric.name.into(), None, metric.help.into()),
                Kind::Histogram { .. } => recorder.describe_histogram(metric.name.into(), None, metric.help.into()),
            }
        }
        let metrics = Self(Arc::new(Inner { handle: recorder.handle(), recorder, on_scrape: Mutex::default() }));
        metrics.gauge(names::BUILD_INFO, &[("version", env!("CARGO_PKG_VERSION").into())]).set(1);
        let clock = metrics.gauge(names::CLOCK, &[]);
        metrics.on_scrape(move || clock.set(Timestamp::now().micros() as f64 / 1e6));
        metrics
    }

    /// The counter of this name and these label values; it is shown, with 0, from now on.
    ///
    /// # Panics
    /// When [`METRICS`] has no such counter with these labels: so it is with the other kinds.
    pub fn counter(&self, name: &'static str, labels: &[(&'static str, SharedString)]) -> Counter {
        self.0.recorder.register_counter(&key(name, labels, |kind| kind == Kind::Counter), &METADATA)
    }

    /// The gauge of this name and these label values.
    pub fn gauge(&self, name: &'static str, labels: &[(&'static str, SharedString)]) -> Gauge {
        self.0.recorder.register_gauge(&key(name, labels, |kind| kind == Kind::Gauge), &METADATA)
    }

    /// The histogram of this name and these label values.
    pub fn histogram(&self, name: &'static str, labels: &[(&'static str, SharedString)]) -> Histogram {
        self.0.recorder.register_histogram(&key(name, labels, |kind| matches!(kind, Kind::Histogram { .. })), &METADATA)
    }

    /// Calls `set` before each [`render`](Self::render): for gauges of what is at hand anyway.
    pub fn on_scrape(&self, set: impl Fn() + Send + 'static) {
        self.0.on_scrape.lock().push(Box::new(set));
    }

    /// All metrics in Prometheus' text exposition format 0.0.4.
    pub fn render(&self) -> String {
        self.0.on_scrape.lock().iter().for_each(|set| set());
        let mut text = self.0.handle.render();
        process::render(&mut text);
        text
    }

    /// Keeps histograms from growing between scrapes, until `stop`.
    pub async fn run_upkeep(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.0.handle.run_upkeep();
        }
    }
}

/// The recorder asks for it and does not use it.
static METADATA: Metadata<'static> = Metadata::new("tidegate", Level::INFO, None);

fn with_buckets(builder: PrometheusBuilder, metric: &Metric) -> PrometheusBuilder {
    match metric.kind {
        Kind::Histogram { buckets } => builder
            .set_buckets_for_metric(Matcher::Full(metric.name.into()), buckets)
            .expect("every histogram in METRICS has at least one bucket"),
        Kind::Counter | Kind::Gauge => builder,
    }
}

fn key(name: &'static str, labels: &[(&'static str, SharedString)], is_kind: fn(Kind) -> bool) -> Key {
    let metric = Metric::named(name);
    let fits = |metric: &Metric| is_kind(metric.kind) && metric.labels.iter().copied().eq(labels.iter().map(|(name, _)| *name));
    assert!(metric.is_some_and(fits), "METRICS has no {name} of this kind with these labels");
    Key::from_parts(name, labels.iter().map(|(name, value)| Label::new(*name, value.clone())).collect::<Vec<_>>())
}

#[cfg(test)]
#[path = "telemetry_tests.rs"]
mod tests;
