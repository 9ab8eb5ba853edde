//! What the background work counts.

use crate::telemetry::{Metrics, names};
use metrics::{Counter, Gauge, Histogram};

/// Handles of the metrics; see `docs/METRICS.md`.
pub(super) struct HistoryMetrics {
    pub merged_readings: Counter,
    pub merge_seconds: Histogram,
    pub merge_failures: Counter,
    pub unmerged_batches: Gauge,
    pub chunks_written: Counter,
    pub pruned_batches: Counter,
    pub expired_readings: Counter,
}

impl HistoryMetrics {
    pub fn new(metrics: &Metrics) -> Self {
        let counter = |name| metrics.counter(name, &[]);
        Self {
            merged_readings: counter(names::MERGED_READINGS),
            merge_seconds: metrics.histogram(names::MERGE_DURATION, &[]),
            merge_failures: counter(names::MERGE_FAILURES),
            unmerged_batches: metrics.gauge(names::UNMERGED_BATCHES, &[]),
            chunks_written: counter(names::CHUNKS_WRITTEN),
            pruned_batches: counter(names::PRUNED_BATCHES),
            expired_readings: counter(names::EXPIRED_READINGS),
        }
    }
}
