//! The end of the log in memory, while somebody follows.
//!
//! The writer puts each committed batch here and never waits for a reader. A follower keeps a position of its own: as long
//! as the tail reaches back to it, it reads here; when it has fallen behind, it reads the store until it is back. So a
//! follower misses nothing, however slow, and costs the writer nothing.

use crate::{
    fleet::Device,
    model::{Position, Timestamp},
};
use bytes::Bytes;
use parking_lot::RwLock;
use std::{collections::VecDeque, sync::Arc};
use tokio::sync::watch;

/// What an entry costs besides its batch's bytes.
const ENTRY_OVERHEAD_BYTES: usize = 128;

/// A committed entry of the log.
#[derive(Clone)]
pub struct TailEntry {
    /// Its place in the log.
    pub position: Position,
    /// Whose it is.
    pub device: Arc<Device>,
    /// When it came in.
    pub receive_time: Timestamp,
    /// How many batches it holds.
    pub batches: u64,
    /// Their bytes, one behind the other.
    pub batch: Bytes,
}

impl TailEntry {
    fn cost_bytes(&self) -> usize {
        self.batch.len() + ENTRY_OVERHEAD_BYTES
    }
}

/// See the [module](self).
pub struct Tail {
    state: RwLock<State>,
    head: watch::Sender<Position>,
    bytes_max: usize,
}

struct State {
    // Every entry behind this position is in `entries`.
    begins_after: Position,
    entries: VecDeque<TailEntry>,
    bytes: usize,
    appended_bytes: u64,
}

/// What [`Tail::read`] found.
pub enum TailRead {
    /// The next entries, in order; never empty.
    Entries(Vec<TailEntry>),
    /// Nothing is behind the position.
    UpToDate,
    /// The tail does not reach back so far: read the store.
    Behind,
}

impl Tail {
    /// An empty tail behind `head`, the last position of the log.
    pub fn new(head: Position, bytes_max: usize) -> Self {
        let state = State { begins_after: head, entries: VecDeque::new(), bytes: 0, appended_bytes: 0 };
        Self { state: RwLock::new(state), head: watch::Sender::new(head), bytes_max }
    }

    /// Adds what was committed, in the order of positions, and wakes the followers.
    pub fn publish(&self, entries: impl IntoIterator<Item = TailEntry>) {
        let mut last = None;
        {
            let mut state = self.state.write();
            for entry in entries {
                last = Some(entry.position);
                state.bytes += entry.cost_bytes();
                state.appended_bytes += entry.batch.len() as u64;
                state.entries.push_back(entry);
            }
            // One that comes later reads the store up to here.
            let bytes_max = if self.head.receiver_count() > 0 { self.bytes_max } else { 0 };
            while state.bytes > bytes_max
                && let Some(oldest) = state.entries.pop_front()
            {
                state.bytes -= oldest.cost_bytes();
                state.begins_after = oldest.position;
            }
        }
        if let Some(last) = last {
            self.head.send_replace(last);
        }
    }

    /// The entries behind `after`: at most `entries_max`, and no further one when there are `bytes_max`.
    pub fn read(&self, after: Position, entries_max: usize, bytes_max: usize) -> TailRead {
        let state = self.state.read();
        if after < state.begins_after {
            return TailRead::Behind;
        }
        let first = state.entries.partition_point(|entry| entry.position <= after);
        let mut bytes = 0;
        let fitting = state.entries.range(first..).take(entries_max).take_while(|entry| {
            let fits = bytes < bytes_max;
            bytes += entry.batch.len();
            fits
        });
        let entries: Vec<TailEntry> = fitting.cloned().collect();
        if entries.is_empty() { TailRead::UpToDate } else { TailRead::Entries(entries) }
    }

    /// Forgets all entries, and begins anew behind a position that is further on.
    pub fn begin_after(&self, position: Position) {
        let mut state = self.state.write();
        (state.begins_after, state.bytes) = (position, 0);
        state.entries.clear();
        drop(state);
        self.head.send_replace(position);
    }

    /// Every entry behind this position is in the tail.
    pub fn begins_after(&self) -> Position {
        self.state.read().begins_after
    }

    /// How many bytes of batches have been added since the gateway started.
    pub fn appended_bytes(&self) -> u64 {
        self.state.read().appended_bytes
    }

    /// The last committed position; wakes with each commit.
    pub fn head(&self) -> watch::Receiver<Position> {
        self.head.subscribe()
    }
}
