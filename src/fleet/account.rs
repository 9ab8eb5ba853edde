//! What belongs to a device's account and is not in the store: what waits for its commit, and which sequences are missing.
//!
//! The store counts what is lost and does not say which sequences these were, as a row for each would be one more thing to write on the
//! way to an acknowledgement. So a gateway remembers the last of them that it has seen.

use crate::{model::StreamId, store::Count};
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// How many missing ranges of a device are remembered, over all its streams.
pub const MISSING_MAX: usize = 64;

/// See the module.
#[derive(Debug, Default)]
pub struct DeviceAccount {
    pending: Arc<Tally>,
    missing: Mutex<VecDeque<Missing>>,
}

#[derive(Debug, Default)]
struct Tally {
    batches: AtomicU64,
    readings: AtomicU64,
}

/// Batches that wait for their commit; no longer once it is dropped.
#[derive(Debug)]
pub struct Waiting {
    account: Arc<Tally>,
    count: Count,
}

/// Sequences of a stream that the gateway has not received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The stream.
    pub stream_id: StreamId,
    /// The sequences.
    pub sequences: RangeInclusive<u64>,
    /// Why they are missing.
    pub cause: MissingCause,
}

/// Why sequences are missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MissingCause {
    /// The device has told that it lost them: they never come.
    Lost,
    /// The device has sent what comes behind them, which was refused: they have to come first.
    Awaited,
}

impl DeviceAccount {
    /// Begins to count what waits.
    pub fn waiting(&self) -> Waiting {
        Waiting { account: self.pending.clone(), count: Count::default() }
    }

    /// What waits now.
    pub fn pending(&self) -> Count {
        Count { batches: self.pending.batches.load(Relaxed), readings: self.pending.readings.load(Relaxed) }
    }

    /// Remembers that sequences are missing; when there are too many, the oldest are forgotten, first of those that are awaited: they may
    /// have come.
    pub fn miss(&self, missing: Missing) {
        let mut known = self.missing.lock();
        // What a stream waits for is one range, which a further try only moves.
        if missing.cause == MissingCause::Awaited {
            known.retain(|old| old.cause != MissingCause::Awaited || old.stream_id != missing.stream_id);
        }
        if known.len() >= MISSING_MAX {
            let oldest = known.iter().position(|old| old.cause == MissingCause::Awaited).unwrap_or(0);
            known.remove(oldest);
        }
        known.push_back(missing);
    }

    /// What is remembered to be missing, the last that was found last. What was awaited may have come since: see [`Missing::behind`].
    pub fn missing(&self) -> Vec<Missing> {
        self.missing.lock().iter().cloned().collect()
    }
}

impl Missing {
    /// How many sequences they are.
    pub fn batches(&self) -> u64 {
        self.sequences.end() - self.sequences.start() + 1
    }

    /// What of it is behind the last durable sequence of its stream, if anything is.
    pub fn behind(self, last_durable: u64) -> Option<Self> {
        let sequences = *self.sequences.start().max(&(last_durable + 1))..=*self.sequences.end();
        (!sequences.is_empty()).then_some(Self { sequences, ..self })
    }
}

impl Waiting {
    /// One batch more waits.
    pub fn add(&mut self, readings: u64) {
        self.count.add(readings);
        self.account.batches.fetch_add(1, Relaxed);
        self.account.readings.fetch_add(readings, Relaxed);
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.account.batches.fetch_sub(self.count.batches, Relaxed);
        self.account.readings.fetch_sub(self.count.readings, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(stream_id: StreamId, sequences: RangeInclusive<u64>) -> Missing {
        Missing { stream_id, sequences, cause: MissingCause::Lost }
    }

    #[test]
    fn what_waits_is_counted_until_it_is_dropped() {
        let account = DeviceAccount::default();
        let (mut one, mut other) = (account.waiting(), account.waiting());
        one.add(10);
        other.add(1);
        other.add(2);
        assert_eq!(account.pending(), Count { batches: 3, readings: 13 });
        drop(other);
        assert_eq!(account.pending(), Count { batches: 1, readings: 10 });
        drop(one);
        assert_eq!(account.pending(), Count::default());
    }

    #[test]
    fn what_is_awaited_is_one_range_that_ends_when_it_came() {
        let (account, stream_id) = (DeviceAccount::default(), StreamId::new());
        let awaited = |sequences| Missing { stream_id, sequences, cause: MissingCause::Awaited };
        account.miss(awaited(3..=4));
        account.miss(awaited(3..=9));
        assert_eq!(account.missing(), [awaited(3..=9)]);
        let behind = |last_durable| awaited(3..=9).behind(last_durable);
        assert_eq!((behind(2), behind(7), behind(9)), (Some(awaited(3..=9)), Some(awaited(8..=9)), None));
    }

    #[test]
    fn the_oldest_is_forgotten_when_there_are_too_many() {
        let (account, stream_id) = (DeviceAccount::default(), StreamId::new());
        let ranges = (1..=MISSING_MAX as u64 + 1).map(|number| lost(stream_id, 2 * number..=2 * number));
        ranges.clone().for_each(|missing| account.miss(missing));
        assert_eq!(account.missing(), ranges.skip(1).collect::<Vec<_>>());
    }
}
