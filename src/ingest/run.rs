//! What one stream has sent by now: batches that were admitted and checked, one behind the other in one buffer.

use super::{Ingest, Lane, Outcome, Pending, Reply, admission::Permit};
use crate::{
    error::Error,
    fleet::{Device, Sensors, account::Waiting},
    live::EntryLatest,
    model::{
        BatchReject, BatchSummary, CheckedBatch, LatestReadings, StreamId, Timestamp,
        batch::{BatchSensors, RejectReason, SensorUse, reason_name},
        correction::{Corrected, Correction},
    },
    store::{DeadLetterRow, SensorRow},
};
use bytes::Bytes;
use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
    time::Duration,
};

/// How many batches go on together at the most: with a device that has a backlog, others need not wait long for their turn.
const BATCHES_MAX: usize = 256;
/// As many bytes, after which no further batch is added.
const BYTES_ENOUGH: usize = 64 << 10;
/// Batches of fewer bytes, on average, cost more each by itself than together.
const SMALL_BATCH_BYTES: usize = 4 << 10;
/// How much a thread keeps for its next run. A single batch may be many times as large.
const ROOM_BYTES_MAX: usize = 4 * BYTES_ENOUGH;

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
    // Of all of its batches together; None when one has something that is not known until it is stored.
    latest: Option<LatestReadings>,
    admitted: Permit,
    waiting: Waiting,
    times: Times,
    // The number of the rejected batch that it is: it is judged once more, outside of its stream's order.
    pub(super) dead_letter: Option<i64>,
}

thread_local! {
    // That of the thread's last run, which is mostly large enough and in the processor's cache.
    static ROOM: Cell<Room> = Cell::default();
}

/// Where a run grows, until it is known how large it is.
#[derive(Default)]
struct Room {
    batches: Vec<RunBatch>,
    bytes: Vec<u8>,
}

impl Room {
    fn give_back(mut self) {
        if self.bytes.capacity() > ROOM_BYTES_MAX {
            self.bytes = Vec::new();
        }
        self.bytes.clear();
        ROOM.set(self);
    }
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
    pub checked: Result<Checked, Box<BatchReject>>,
}

/// What is left to know of a batch that is well formed. Many of these wait for a commit: it is small.
pub(super) struct Checked {
    pub summary: BatchSummary,
    /// Whether the device's sensors agree with these is for the writer to say. None: they do.
    pub new_sensors: Option<BTreeMap<String, SensorUse>>,
}

impl RunBatch {
    pub fn readings(&self) -> u64 {
        match &self.checked {
            Ok(checked) => u64::from(checked.summary.readings),
            Err(reject) => reject.readings,
        }
    }

    /// Whether sequences are missing between the last durable one and this, other than those that the device lost.
    pub fn leaves_gap(&self, last_sequence: u64) -> bool {
        self.sequence.saturating_sub(last_sequence) > self.lost_batches.saturating_add(1)
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
        let Room { batches, bytes } = ROOM.take();
        let mut run = Run {
            device: device.clone(),
            stream_id,
            receive_time: Timestamp::now(),
            batches,
            bytes,
            sensors: device.sensors(),
            latest: Some(LatestReadings::default()),
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
            || !self.admission.admit_with(&mut run.admitted, next.batch.len(), run.latest.is_some())
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
        let begin = run.bytes.len();
        run.bytes.extend_from_slice(&batch);
        let range = begin..run.bytes.len();
        let batch = RunBatch { sequence, lost_batches, lost_readings, range, clock_correction, checked: run.take_over(checked) };
        // What is replayed was paid for, and accounted for, when it came.
        if run.dead_letter.is_none() {
            self.device_limits.spend(&run.device.usage, batch.readings(), size);
            run.waiting.add(batch.readings());
        }
        run.batches.push(batch);
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

    /// Takes over what was found in its next batch. The latest readings of all batches are kept together: with each they would take
    /// several times as much memory as its bytes.
    fn take_over(&mut self, checked: Result<CheckedBatch, BatchReject>) -> Result<Checked, Box<BatchReject>> {
        let CheckedBatch { summary, sensors } = checked.map_err(|reject| {
            self.latest = None;
            Box::new(reject)
        })?;
        let new_sensors = match sensors {
            BatchSensors::Known(latest) => {
                if let Some(all) = &mut self.latest {
                    all.absorb(latest);
                }
                None
            }
            BatchSensors::New(sensors) => {
                self.latest = None;
                Some(sensors)
            }
        };
        Ok(Checked { summary, new_sensors })
    }

    /// Not all of its batches are stored: what is known of the latest readings of all together is of no use.
    pub(super) fn forget_latest(&mut self) {
        self.latest = None;
    }

    /// What the entry of the log with these of its batches has for the latest values; `None` where a later one of its entries has it too, as
    /// what is known is of all of its batches together. Were not all stored, that is to be forgotten before.
    pub(super) fn take_latest(&mut self, batches: &Range<usize>, entry: &Bytes) -> Option<EntryLatest> {
        if self.latest.is_some() && batches.end < self.len() {
            return None;
        }
        Some(self.latest.take().map_or_else(|| EntryLatest::In(entry.clone()), EntryLatest::Found))
    }

    /// Nothing more is added to it.
    pub(super) fn close(&self) {
        self.admitted.close();
    }

    /// Whether its batches are so small that what each costs besides its bytes is what counts.
    pub fn has_small_batches(&self) -> bool {
        self.bytes.len() < self.len() * SMALL_BATCH_BYTES
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
        let Self { device, mut batches, bytes, receive_time, .. } = self;
        let replies = batches.drain(..).map(|batch| {
            let outcome = match &batch.checked {
                Ok(checked) => Outcome::Stored { readings: u64::from(checked.summary.readings) },
                Err(reject) => Outcome::Rejected(reject.as_ref().clone()),
            };
            if let Ok(Checked { summary, new_sensors: Some(uses) }) = &batch.checked
                && let Ok(rows) = device.judge(uses, summary.readings, &HashMap::new(), usize::MAX, receive_time)
            {
                let unused = device.sensors_len() as i64 + 1;
                device.learn((unused..).zip(rows).map(|(key, row)| SensorRow { key: if row.key == 0 { key } else { row.key }, ..row }));
            }
            Reply { sequence: batch.sequence, outcome, durable_through: batch.sequence }
        });
        let replies = replies.collect();
        Room { batches, bytes }.give_back();
        replies
    }

    /// Its batches wait no longer: they are in the store, or refused. Before the device is answered, so that it does not find what it was
    /// told of still waiting.
    pub(super) fn settle(&mut self) {
        self.waiting = self.device.account.waiting();
    }

    /// Takes the bytes of its batches, one behind the other. What is left needs no more room than it has to.
    pub(super) fn pack(&mut self) -> Bytes {
        let (mut batches, mut bytes) = (std::mem::take(&mut self.batches), std::mem::take(&mut self.bytes));
        self.batches.reserve_exact(batches.len());
        self.batches.append(&mut batches);
        if let Some(latest) = &mut self.latest {
            latest.shrink_to_fit();
        }
        let packed = if bytes.capacity() > ROOM_BYTES_MAX {
            let mut bytes = std::mem::take(&mut bytes);
            bytes.shrink_to_fit();
            bytes.into()
        } else {
            Bytes::copy_from_slice(&bytes)
        };
        Room { batches, bytes }.give_back();
        packed
    }
}
