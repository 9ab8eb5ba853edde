//! What the background work counts.

use crate::telemetry::{Metrics, names};
use metrics::{Counter, Gauge, Histogram};

/// Handles of the metrics; see `docs/METRICS.md`.
pub(super) struct HistoryMetrics {
    pub merged_readings: Counter,
    pub merge_seconds: Histogram,
    pub merge_failures: Counter,
    pub unmerged_entries: Gauge,
    pub chunks_written: Counter,
    pub pruned_entries: Counter,
    pub expired_readings: Counter,
}

impl HistoryMetrics {
    pub fn new(metrics: &Metrics) -> Self {
        let counter = |name| metrics.counter(name, &[]);
        Self {
            merged_readings: counter(names::MERGED_READINGS),
            merge_seconds: metrics.histogram(names::MERGE_DURATION, &[]),
            merge_failures: counter(names::MERGE_FAILURES),
            unmerged_entries: metrics.gauge(names::UNMERGED_ENTRIES, &[]),
            chunks_written: counter(names::CHUNKS_WRITTEN),
            pruned_entries: counter(names::PRUNED_ENTRIES),
            expired_readings: counter(names::EXPIRED_READINGS),
        }
    }
}
