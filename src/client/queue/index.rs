//! What a queue holds, and what becomes of it: the same for both backends, and without any input or output.
//!
//! Each change is first planned, then written (by the disk backend), then applied: a failed write changes nothing.

use super::{QueueError, QueueLimits, WhenFull};
use crate::model::StreamId;
use bytes::Bytes;
use std::collections::VecDeque;

/// Batches and readings that the device lost before it could send them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lost {
    /// Batches.
    pub batches: u64,
    /// Readings in them.
    pub readings: u64,
}

impl std::ops::AddAssign for Lost {
    fn add_assign(&mut self, other: Self) {
        self.batches += other.batches;
        self.readings += other.readings;
    }
}

/// One batch. Its bytes are here in memory, or on disk under its sequence.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub sequence: u64,
    pub readings: u64,
    pub bytes_len: usize,
    pub bytes: Option<Bytes>,
    /// What was lost right before this batch.
    pub lost: Lost,
}

/// The batches in the order of their sequences. Invariant: an entry's sequence less its `lost.batches` follows on the entry
/// before it; behind the last entry, `lost_at_end` leads to `last_sequence`.
#[derive(Debug, Clone)]
pub(super) struct Index {
    stream_id: StreamId,
    /// Whether the stream id is derived from what is pushed: then the gateway may well be ahead of the queue.
    replay: bool,
    entries: VecDeque<Entry>,
    bytes: usize,
    /// The last sequence that was given out.
    last_sequence: u64,
    /// Lost behind the last entry; goes with the next batch.
    lost_at_end: Lost,
    /// Lost since the queue was opened.
    lost_total: Lost,
    /// Batches up to this one may have reached the gateway, or are still on their way there from a call that has ended.
    sent_through: u64,
    /// Batches up to this one are durable at the gateway.
    acknowledged_through: u64,
}

/// What a push will do.
#[derive(Debug)]
pub(super) enum PushPlan {
    /// The batch is queued.
    Queue {
        /// Under which sequence.
        sequence: u64,
        /// Entries from this place on …
        drop_at: usize,
        /// … so many are lost to make room.
        dropped: usize,
        /// What is lost right before the entry that follows the dropped ones, these included.
        lost_before_heir: Lost,
        /// The sequence of that entry.
        heir: u64,
    },
    /// The batch itself is lost: all others may have reached the gateway already.
    Lose {
        /// Under which sequence.
        sequence: u64,
        /// What is lost at the end, this batch included.
        lost_at_end: Lost,
    },
    /// The gateway has this sequence of a replay already.
    Known {
        /// Which.
        sequence: u64,
    },
}

impl Index {
    /// From what was stored.
    pub fn new(stream_id: StreamId, entries: VecDeque<Entry>, last_sequence: u64, lost_at_end: Lost, sent_through: u64) -> Self {
        let bytes = entries.iter().map(|entry| entry.bytes_len).sum();
        let (replay, lost_total) = (false, Lost::default());
        Self { stream_id, replay, entries, bytes, last_sequence, lost_at_end, lost_total, sent_through, acknowledged_through: 0 }
    }

    /// One that holds nothing.
    pub fn empty(stream_id: StreamId) -> Self {
        Self::new(stream_id, VecDeque::new(), 0, Lost::default(), 0)
    }

    /// Whether it is the queue of a replay.
    pub fn is_replay(&self) -> bool {
        self.replay
    }

    /// The same for the queue of a replay.
    pub fn for_replay(self) -> Self {
        Self { replay: true, ..self }
    }

    pub fn stream_id(&self) -> StreamId {
        self.stream_id
    }

    pub fn pending_batches(&self) -> usize {
        self.entries.len()
    }

    pub fn pending_bytes(&self) -> usize {
        self.bytes
    }

    pub fn last_sequence(&self) -> u64 {
        self.last_sequence
    }

    pub fn acknowledged_through(&self) -> u64 {
        self.acknowledged_through
    }

    pub fn lost_total(&self) -> Lost {
        self.lost_total
    }

    /// Decides what a push of a batch of this size does.
    pub fn plan_push(&self, bytes_len: usize, readings: u64, limits: &QueueLimits) -> Result<PushPlan, QueueError> {
        let bytes_max = limits.batch_bytes_max.min(limits.bytes_max);
        if bytes_len > bytes_max {
            return Err(QueueError::BatchTooLarge { bytes: bytes_len, bytes_max });
        }
        let sequence = self.last_sequence + 1;
        if self.replay && sequence <= self.acknowledged_through {
            return Ok(PushPlan::Known { sequence });
        }
        let fits = |batches: usize, bytes: usize| batches < limits.batches_max.max(1) && bytes + bytes_len <= limits.bytes_max;
        // What may have reached the gateway stays: it may be stored already, and would then be counted twice, as stored and as lost.
        let drop_at = self.entries.partition_point(|entry| entry.sequence <= self.sent_through);
        let (mut dropped, mut bytes_left) = (0, self.bytes);
        while !fits(self.entries.len() - dropped, bytes_left) {
            if limits.when_full == WhenFull::Refuse {
                return Err(QueueError::Full { batches: self.entries.len(), bytes: self.bytes });
            }
            let Some(victim) = self.entries.get(drop_at + dropped) else {
                let mut lost_at_end = self.lost_at_end;
                lost_at_end += Lost { batches: 1, readings };
                return Ok(PushPlan::Lose { sequence, lost_at_end });
            };
            bytes_left -= victim.bytes_len;
            dropped += 1;
        }
        let mut lost_before_heir = Lost::default();
        for victim in self.entries.range(drop_at..drop_at + dropped) {
            lost_before_heir += victim.lost;
            lost_before_heir += Lost { batches: 1, readings: victim.readings };
        }
        let heir = match self.entries.get(drop_at + dropped) {
            Some(entry) => {
                lost_before_heir += entry.lost;
                entry.sequence
            }
            None => {
                lost_before_heir += self.lost_at_end;
                sequence
            }
        };
        Ok(PushPlan::Queue { sequence, drop_at, dropped, lost_before_heir, heir })
    }

    /// The sequences that a plan drops: from, through.
    pub fn dropped_sequences(&self, plan: &PushPlan) -> Option<(u64, u64)> {
        match *plan {
            PushPlan::Queue { drop_at, dropped, .. } if dropped > 0 => {
                Some((self.entries[drop_at].sequence, self.entries[drop_at + dropped - 1].sequence))
            }
            _ => None,
        }
    }

    /// What is lost behind the last entry once the plan is applied.
    pub fn lost_at_end_after(&self, plan: &PushPlan) -> Lost {
        match *plan {
            PushPlan::Queue { .. } => Lost::default(),
            PushPlan::Lose { lost_at_end, .. } => lost_at_end,
            PushPlan::Known { .. } => self.lost_at_end,
        }
    }

    /// What is lost right before the pushed batch once the plan is applied.
    pub fn lost_before_pushed(&self, plan: &PushPlan) -> Lost {
        match *plan {
            PushPlan::Queue { sequence, heir, lost_before_heir, .. } if heir == sequence => lost_before_heir,
            PushPlan::Queue { .. } => self.lost_at_end,
            _ => Lost::default(),
        }
    }

    /// Does what was planned. Returns the batch's sequence.
    pub fn apply_push(&mut self, plan: &PushPlan, bytes_len: usize, bytes: Option<Bytes>, readings: u64) -> u64 {
        let lost = self.lost_before_pushed(plan);
        self.lost_at_end = self.lost_at_end_after(plan);
        let sequence = match *plan {
            PushPlan::Known { sequence } => sequence,
            PushPlan::Lose { sequence, .. } => {
                self.lost_total += Lost { batches: 1, readings };
                sequence
            }
            PushPlan::Queue { sequence, drop_at, dropped, lost_before_heir, heir } => {
                for victim in self.entries.drain(drop_at..drop_at + dropped) {
                    self.bytes -= victim.bytes_len;
                    self.lost_total += Lost { batches: 1, readings: victim.readings };
                }
                if heir != sequence {
                    self.entries[drop_at].lost = lost_before_heir;
                }
                self.bytes += bytes_len;
                self.entries.push_back(Entry { sequence, readings, bytes_len, bytes, lost });
                sequence
            }
        };
        self.last_sequence = sequence;
        sequence
    }

    /// The first batch whose sequence is `sequence` or higher.
    pub fn entry_from(&self, sequence: u64) -> Option<&Entry> {
        self.entries.get(self.entries.partition_point(|entry| entry.sequence < sequence))
    }

    /// Notes that batches up to `sequence` are about to be sent.
    pub fn set_sent(&mut self, sequence: u64) {
        self.sent_through = self.sent_through.max(sequence);
    }

    pub fn sent_through(&self) -> u64 {
        self.sent_through
    }

    /// Whether a gateway that has the stream up to `sequence` got a part of that from elsewhere.
    pub fn is_outdated_by(&self, sequence: u64) -> bool {
        !self.replay && sequence > self.sent_through
    }

    /// Gives what was never sent numbers from 1 on, under another stream id; what may have been sent is taken out.
    pub fn renumber(&mut self, stream_id: StreamId) {
        let base = self.sent_through;
        self.acknowledge_through(base);
        // What is lost behind the last entry may begin with batches that the gateway has counted under the old stream id.
        let behind = self.last_sequence - base;
        if self.entries.is_empty() && self.lost_at_end.batches > behind {
            self.lost_at_end = Lost { batches: behind, readings: 0 };
        }
        self.entries.iter_mut().for_each(|entry| entry.sequence -= base);
        self.last_sequence = behind;
        (self.stream_id, self.sent_through, self.acknowledged_through) = (stream_id, 0, 0);
    }

    /// What is lost behind the last entry.
    pub fn lost_at_end(&self) -> Lost {
        self.lost_at_end
    }

    /// What is lost right before the first entry.
    pub fn lost_at_front(&self) -> Lost {
        self.entries.front().map_or(Lost::default(), |entry| entry.lost)
    }

    /// How many batches and readings an acknowledgement through `sequence` will take out.
    pub fn count_through(&self, sequence: u64) -> (u64, u64) {
        let taken = self.entries.iter().take_while(|entry| entry.sequence <= sequence);
        taken.fold((0, 0), |(batches, readings), entry| (batches + 1, readings + entry.readings))
    }

    /// Takes out what is durable at the gateway.
    pub fn acknowledge_through(&mut self, sequence: u64) {
        // A replay is told of batches that it has yet to push; anybody else cannot be.
        let sequence = if self.replay { sequence } else { sequence.min(self.last_sequence) };
        self.acknowledged_through = self.acknowledged_through.max(sequence);
        while let Some(entry) = self.entries.front().filter(|entry| entry.sequence <= sequence) {
            self.bytes -= entry.bytes_len;
            self.entries.pop_front();
        }
        if let Some(front) = self.entries.front_mut() {
            // More than this cannot be missing before it. How many readings a part of them had is not known.
            let missing_max = (front.sequence - 1).saturating_sub(self.acknowledged_through);
            if front.lost.batches > missing_max {
                front.lost = Lost { batches: missing_max, readings: 0 };
            }
        }
    }
}
