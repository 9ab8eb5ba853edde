//! What one stream has sent by now: batches that were admitted and checked, one behind the other in one buffer.

use super::{Ingest, Lane, Outcome, Pending, Reply, admission::Permit};
use crate::{
    error::Error,
    fleet::{Device, Sensors, account::Waiting},
    model::{
        BatchReject, CheckedBatch, StreamId, Timestamp,
        batch::{BatchSensors, RejectReason, reason_name},
        correction::{Corrected, Correction},
    },
    store::{DeadLetterRow, SensorRow},
};
use bytes::Bytes;
use std::{collections::HashMap, ops::Range, sync::Arc, time::Duration};

/// How many batches go on together at the most: with a device that has a backlog, others need not wait long for their turn.
const BATCHES_MAX: usize = 256;
/// As many bytes, after which no further batch is added.
const BYTES_ENOUGH: usize = 64 << 10;

/// A batch that is rejected for one of these is kept without a correction of its times, so that it is judged once more as it was sent. With
/// any other reason it is a batch of which the gateway knows that it says no correction but the gateway's own. One without readings would only grow.
const KEPT_AS_SENT: [RejectReason; 3] = [RejectReason::Malformed, RejectReason::TooLarge, RejectReason::Empty];

/// A batch as a device sends it.
#[derive(Debug, Clone, Default)]
pub struct Envelope {
    /// Its number in its stream.
    pub sequence: u64,
    /// Its bytes: a `tidegate.v1.Batch`, not yet checked.
    pub batch: Bytes,
    /// How many sequences right before this one the device lost.
    pub lost_batches: u64,
    /// How many readings were in them.
    pub lost_readings: u64,
}

/// Batches of one stream that were admitted and checked, on their way to the writer together.
pub struct Run {
    /// Whose batches these are.
    pub device: Arc<Device>,
    /// Of which stream.
    pub stream_id: StreamId,
    /// When they came in.
    pub receive_time: Timestamp,
    pub(super) batches: Vec<RunBatch>,
    // Copied out of the connection's buffer, of which even a small batch would hold all for as long as it is in the live tail.
    bytes: Vec<u8>,
    // What the device had when the run began: a sensor that it has is never taken away.
    sensors: Arc<Sensors>,
    admitted: Permit,
    waiting: Waiting,
    times: Times,
    // The number of the rejected batch that it is: it is judged once more, outside of its stream's order.
    pub(super) dead_letter: Option<i64>,
}

/// Whose the times in a run's batches are.
#[derive(Clone, Copy)]
enum Times {
    /// The device's, as they came.
    AsSent,
    /// The device's, to which so many microseconds are to be added.
    ToCorrect(i64),
    /// Of batches that were looked at before: they may have been corrected then.
    Corrected,
}

/// A batch of a run.
pub(super) struct RunBatch {
    pub sequence: u64,
    pub lost_batches: u64,
    pub lost_readings: u64,
    /// Where its bytes are in the run's.
    pub range: Range<usize>,
    /// What was added to all of its times now, microseconds.
    pub clock_correction: i64,
    pub checked: Result<CheckedBatch, BatchReject>,
}

impl RunBatch {
    pub fn readings(&self) -> u64 {
        match &self.checked {
            Ok(checked) => u64::from(checked.summary.readings),
            Err(reject) => reject.readings,
        }
    }
}

impl RunBatch {
    /// Whether sequences are missing between the last durable one and this, other than those that the device lost.
    pub fn leaves_gap(&self, last_sequence: u64) -> bool {
        self.sequence.saturating_sub(last_sequence) > self.lost_batches.saturating_add(1)
    }

    /// What the latest values need to know of it, which it need not keep.
    pub fn take_sensors(&mut self) -> BatchSensors {
        match &mut self.checked {
            Ok(checked) => std::mem::replace(&mut checked.sensors, BatchSensors::Known(Vec::new())),
            Err(_) => BatchSensors::Known(Vec::new()),
        }
    }
}

impl Ingest {
    /// Begins a run with its first batch; waits while too many bytes wait for their commit already.
    pub async fn begin(&self, device: &Arc<Device>, stream_id: StreamId, lane: Lane, first: Envelope) -> Result<Run, Error> {
        let times = match device.clock.correction() {
            0 => Times::AsSent,
            micros => Times::ToCorrect(micros),
        };
        self.begin_as(None, times, device, stream_id, lane, first).await
    }

    async fn begin_as(
        &self,
        dead_letter: Option<i64>,
        times: Times,
        device: &Arc<Device>,
        stream_id: StreamId,
        lane: Lane,
        first: Envelope,
    ) -> Result<Run, Error> {
        let admitted = self.admission.admit(lane, first.batch.len()).await?;
        let mut run = Run {
            device: device.clone(),
            stream_id,
            receive_time: Timestamp::now(),
            batches: Vec::new(),
            bytes: Vec::with_capacity(first.batch.len()),
            sensors: device.sensors(),
            admitted,
            waiting: device.account.waiting(),
            times,
            dead_letter,
        };
        self.push(&mut run, first);
        Ok(run)
    }

    /// Has a batch that was rejected judged once more. Of the outcomes, `Duplicate` says that it is no longer kept.
    pub async fn replay(&self, device: &Arc<Device>, rejected: DeadLetterRow) -> Result<Pending, Error> {
        let DeadLetterRow { id, stream_id, sequence, batch, reason, .. } = rejected;
        let kept_as_sent = KEPT_AS_SENT.into_iter().any(|kept| reason_name(kept) == reason);
        let times = if kept_as_sent { Times::AsSent } else { Times::Corrected };
        let envelope = Envelope { sequence, batch, ..Envelope::default() };
        let run = self.begin_as(Some(id), times, device, stream_id, Lane::Live, envelope).await?;
        self.submit(run).await
    }

    /// Adds a batch to a run, if there is room for it without waiting; else it is given back, for a run of its own.
    pub fn add(&self, run: &mut Run, next: Envelope) -> Result<(), Envelope> {
        if run.is_full()
            || !self.device_limits.are_free(&run.device.usage)
            || !self.admission.admit_with(&mut run.admitted, next.batch.len())
        {
            return Err(next);
        }
        self.push(run, next);
        Ok(())
    }

    fn push(&self, run: &mut Run, envelope: Envelope) {
        let Envelope { sequence, batch, lost_batches, lost_readings } = envelope;
        let size = batch.len();
        let (batch, clock_correction, checked) = self.check(run, batch);
        let readings = match &checked {
            Ok(checked) => u64::from(checked.summary.readings),
            Err(reject) => reject.readings,
        };
        // What is replayed was paid for, and accounted for, when it came.
        if run.dead_letter.is_none() {
            self.device_limits.spend(&run.device.usage, readings, size);
            run.waiting.add(readings);
        }
        let begin = run.bytes.len();
        run.bytes.extend_from_slice(&batch);
        let range = begin..run.bytes.len();
        run.batches.push(RunBatch { sequence, lost_batches, lost_readings, range, clock_correction, checked });
    }

    /// Checks a batch, with its times corrected where the device's clock is known to be off: what is kept of it, and what was added to all of them.
    fn check(&self, run: &Run, batch: Bytes) -> (Bytes, i64, Result<CheckedBatch, BatchReject>) {
        let (limits, received, sensors) = (&self.limits, run.receive_time, &run.sensors);
        match run.times {
            Times::ToCorrect(micros) if batch.len() <= limits.bytes_max => {
                // By as much a clock may be ahead that is not known to be off.
                let correction = Correction { micros, latest: received.saturating_add(self.clock_offset_max) };
                if let Some(Corrected { batch: corrected, whole }) = correction.of(&batch) {
                    let checked = CheckedBatch::check_corrected(&corrected, limits, received, sensors.finder());
                    if !checked.as_ref().is_err_and(|reject| KEPT_AS_SENT.contains(&reject.reason)) {
                        return (corrected, if whole { micros } else { 0 }, checked);
                    }
                }
            }
            Times::Corrected => {
                let checked = CheckedBatch::check_corrected(&batch, limits, received, sensors.finder());
                return (batch, 0, checked);
            }
            Times::ToCorrect(_) | Times::AsSent => {}
        }
        let checked = CheckedBatch::check(&batch, limits, received, sensors.finder());
        (batch, 0, checked)
    }
}

impl Run {
    /// How many batches it has; at least 1.
    #[allow(clippy::len_without_is_empty, reason = "a run is never empty")]
    pub fn len(&self) -> usize {
        self.batches.len()
    }

    /// How it was admitted.
    pub(super) fn lane(&self) -> Lane {
        self.admitted.lane()
    }

    /// The time of the newest reading in it; `None` when nothing of it can be stored.
    pub(super) fn newest_time(&self) -> Option<Timestamp> {
        self.batches.iter().filter_map(|batch| batch.checked.as_ref().ok()).map(|checked| checked.summary.last_time).max()
    }

    /// By how many microseconds its newest reading was ahead of the gateway's clock by the device's, which mostly is less than 0. Of one that was
    /// rejected for that, it is known to be more than `time_skew_max`. `None` when nothing tells, as what
    /// came in long ago and is replayed now.
    pub(super) fn lead(&self, time_skew_max: Duration) -> Option<i64> {
        if self.dead_letter.is_some() {
            return None;
        }
        let newest = |batch: &RunBatch| {
            let newest = match &batch.checked {
                Ok(checked) => checked.summary.last_time,
                Err(reject) if reject.reason == RejectReason::TimeInFuture => self.receive_time.saturating_add(time_skew_max),
                Err(_) => return None,
            };
            Some(newest.micros() - batch.clock_correction - self.receive_time.micros())
        };
        self.batches.iter().filter_map(newest).max()
    }

    /// Nothing more is added to it.
    pub(super) fn close(&self) {
        self.admitted.close();
    }

    /// Whether its first batch leaves a gap.
    pub fn leaves_gap(&self, last_sequence: u64) -> bool {
        self.batches.first().is_some_and(|batch| batch.leaves_gap(last_sequence))
    }

    /// Whether it is large enough to go on without waiting for more.
    pub fn is_full(&self) -> bool {
        self.batches.len() >= BATCHES_MAX || self.bytes.len() >= BYTES_ENOUGH
    }

    /// What a null sink says of it. The device has learnt its sensors, as with a gateway, so that the next batch is checked
    /// in the same way.
    pub(super) fn discard(self) -> Vec<Reply> {
        let Self { device, batches, receive_time, .. } = self;
        let replies = batches.into_iter().map(|batch| {
            let outcome = match &batch.checked {
                Ok(checked) => Outcome::Stored { readings: u64::from(checked.summary.readings) },
                Err(reject) => Outcome::Rejected(reject.clone()),
            };
            if let Ok(CheckedBatch { sensors: BatchSensors::New(uses), summary }) = &batch.checked
                && let Ok(rows) = device.judge(uses, summary.readings, &HashMap::new(), usize::MAX, receive_time)
            {
                let unused = device.sensors_len() as i64 + 1;
                device.learn((unused..).zip(rows).map(|(key, row)| SensorRow { key: if row.key == 0 { key } else { row.key }, ..row }));
            }
            Reply { sequence: batch.sequence, outcome, durable_through: batch.sequence }
        });
        replies.collect()
    }

    /// Its batches wait no longer: they are in the store, or refused. Before the device is answered, so that it does not find what it was
    /// told of still waiting.
    pub(super) fn settle(&mut self) {
        self.waiting = self.device.account.waiting();
    }

    /// The bytes of its batches, one behind the other.
    pub(super) fn take_bytes(&mut self) -> Bytes {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.shrink_to_fit();
        bytes.into()
    }
}
