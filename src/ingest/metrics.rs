//! What the writer counts.

use super::{Lane, Outcome, Reply, Submitted};
use crate::{
    error::Error,
    model::batch::{RejectReason, reason_name},
    store::Count,
    telemetry::{Metrics, names},
};
use metrics::{Counter, Histogram};

/// Handles of the writer's metrics; see `docs/METRICS.md`.
pub(super) struct IngestMetrics {
    pub stored_batches: Counter,
    pub stored_readings: Counter,
    pub stored_bytes: Counter,
    pub duplicate_batches: Counter,
    pub duplicate_readings: Counter,
    pub backlog_batches: Counter,
    pub replayed_batches: Counter,
    pub sequence_gaps: Counter,
    pub unavailable_batches: Counter,
    pub commit_seconds: Histogram,
    pub commit_batches: Histogram,
    pub commit_failures: Counter,
    rejected: Vec<(RejectReason, Counter, Counter)>,
}

impl IngestMetrics {
    pub fn new(metrics: &Metrics) -> Self {
        let counter = |name| metrics.counter(name, &[]);
        let reasons = (1..).map_while(|code| RejectReason::try_from(code).ok());
        let rejected = reasons.map(|reason| {
            let labels = [("reason", reason_name(reason).into())];
            (reason, metrics.counter(names::REJECTED_BATCHES, &labels), metrics.counter(names::REJECTED_READINGS, &labels))
        });
        Self {
            stored_batches: counter(names::STORED_BATCHES),
            stored_readings: counter(names::STORED_READINGS),
            stored_bytes: counter(names::STORED_BYTES),
            duplicate_batches: counter(names::DUPLICATE_BATCHES),
            duplicate_readings: counter(names::DUPLICATE_READINGS),
            backlog_batches: counter(names::BACKLOG_BATCHES),
            replayed_batches: counter(names::REPLAYED_BATCHES),
            sequence_gaps: counter(names::SEQUENCE_GAPS),
            unavailable_batches: counter(names::UNAVAILABLE_BATCHES),
            commit_seconds: metrics.histogram(names::COMMIT_DURATION, &[]),
            commit_batches: metrics.histogram(names::COMMIT_BATCHES, &[]),
            commit_failures: counter(names::COMMIT_FAILURES),
            rejected: rejected.collect(),
        }
    }

    /// Counts what became of the batches of a group.
    pub fn count(&self, runs: &[Submitted], decisions: &[Result<Vec<Reply>, Error>]) {
        let (mut stored, mut duplicate, mut bytes) = (Count::default(), Count::default(), 0);
        for (Submitted { run, .. }, decision) in runs.iter().zip(decisions) {
            let Ok(replies) = decision else { continue };
            if run.dead_letter.is_some() {
                // It was received, and counted, when it was rejected.
                let replayed = replies.iter().filter(|reply| matches!(reply.outcome, Outcome::Stored { .. })).count();
                self.replayed_batches.increment(replayed as u64);
                continue;
            }
            if run.lane() == Lane::Backlog {
                self.backlog_batches.increment(run.batches.len() as u64);
            }
            for (batch, Reply { sequence, outcome, .. }) in run.batches.iter().zip(replies) {
                match outcome {
                    Outcome::Stored { readings } => {
                        stored.add(*readings);
                        bytes += batch.range.len() as u64;
                    }
                    Outcome::Duplicate { readings } => duplicate.add(*readings),
                    Outcome::Rejected(reject) => {
                        self.rejected(reject.reason, reject.readings);
                        tracing::warn!(device = %run.device.id, stream_id = %run.stream_id, sequence, %reject, "batch.rejected");
                    }
                    Outcome::Gap { .. } => self.sequence_gaps.increment(1),
                }
            }
        }
        self.stored_batches.increment(stored.batches);
        self.stored_readings.increment(stored.readings);
        self.stored_bytes.increment(bytes);
        self.duplicate_batches.increment(duplicate.batches);
        self.duplicate_readings.increment(duplicate.readings);
    }

    fn rejected(&self, reason: RejectReason, readings: u64) {
        if let Some((_, batches, in_them)) = self.rejected.iter().find(|(of, ..)| *of == reason) {
            batches.increment(1);
            in_them.increment(readings);
        }
    }
}
