//! The background work on what is stored: merging the log, pruning what of it is merged, deleting what is too old or too much.

use super::{
    merger::{Merged, Merger},
    pace::{Haste, promptly},
};
use crate::{
    config::{Config, History},
    fleet::Registry,
    live::{Latest, Tail},
    model::{Position, Timestamp},
    store::{LogSize, Store, StoreError},
    telemetry::Metrics,
};
use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// How often to look whether there is something to do.
const TICK: Duration = Duration::from_millis(250);
/// What is deleted of the log at once; [`Haste::at_once`] says how many of these in one transaction.
const SLICE_BYTES: usize = 512 << 10;
const SLICE_ROWS: usize = 1_000;
const ROWS_PER_READ: usize = 10_000;
/// How many chunks one transaction deletes at the most.
const CHUNKS_PER_DELETION: usize = 64;
/// How many chunks one transaction of merging writes and deletes; how many where it is behind, and where it does not rest any more.
const CHUNKS_MERGED: usize = 32;
const CHUNKS_MERGED_HURRIED: usize = 128;
const CHUNKS_MERGED_RESTLESS: usize = 512;
/// How many times as much as usual is done at once where merging does not rest.
const AT_ONCE_RESTLESS: usize = 8;
/// How many seconds to rest for each that a transaction is open: of a way into the store that is busy the background has a tenth.
const REST: f64 = 9.0;
/// How many seconds to rest at the least for each of work, until more than `history.unmerged_bytes_max` waits: what can be done in its
/// time is done so that nobody notices. Little in the crate's own tests, which wait for rounds.
const LEISURE: f64 = if cfg!(test) { 0.5 } else { 12.0 };
/// From so many times `history.unmerged_bytes_max` on the rests are shorter and the transactions larger, as queries read all of it.
const BACKLOG_HURRIED: f64 = 4.0;
/// At so many times there is no rest, and most is done in larger steps.
const BACKLOG_RESTLESS: f64 = 16.0;
/// How long deleting may keep merging waiting that has much to do.
const DELETING_MAX: Duration = Duration::from_secs(10);
/// After how long what has failed is tried again at the latest, when much waits.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);
/// What is kept free of what a round has pruned: more than that, as its bytes are those of the batches alone, and rounds differ.
const KEPT_OF_PRUNED: u64 = 2;

/// Who does the work in the background.
pub struct Upkeep {
    store: Store,
    latest: Arc<Latest>,
    tail: Arc<Tail>,
    merger: Merger,
    history: History,
    replay_window: Duration,
    replay_bytes_max: usize,
    replay: Replay,
    // Of what came in behind this position, since the start or since this gateway leads, how many bytes of batches are merged.
    leads_behind: Position,
    merged_bytes: u64,
    // How many bytes of batches up to it wait, about.
    earlier_bytes: u64,
    // By the current round, bytes of batches.
    pruned_bytes: u64,
    // Whether the last round did.
    failed: bool,
}

/// What of the log is merged and still kept.
#[derive(Default)]
struct Replay {
    slices: VecDeque<Slice>,
    bytes: usize,
    through: Position,
}

struct Slice {
    through: Position,
    receive_time: Timestamp,
    rows: usize,
    bytes: usize,
}

impl Upkeep {
    /// The work on what `store` holds.
    pub fn new(config: &Config, store: Store, registry: Registry, latest: Arc<Latest>, tail: Arc<Tail>, metrics: &Metrics) -> Self {
        let store = store.giving_way();
        let merger = Merger::new(store.clone(), registry, metrics);
        let (replay_window, replay_bytes_max) = (config.live.replay_window, config.live.replay_bytes_max);
        let leads_behind = *tail.head().borrow();
        Self {
            store,
            latest,
            tail,
            merger,
            history: config.history.clone(),
            replay_window,
            replay_bytes_max,
            replay: Replay::default(),
            leads_behind,
            merged_bytes: 0,
            earlier_bytes: 0,
            pruned_bytes: 0,
            failed: false,
        }
    }

    /// Works until `stop`: at each interval, and when enough has come in.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last_round = Instant::now();
        loop {
            if stop.run_until_cancelled(ticks.tick()).await.is_none() {
                return;
            }
            if !self.is_due(last_round.elapsed()) {
                continue;
            }
            last_round = Instant::now();
            if stop.run_until_cancelled(self.try_round()).await.is_none() {
                return;
            }
            if self.failed {
                last_round = Instant::now();
            }
        }
    }

    async fn try_round(&mut self) {
        let done = self.round().await;
        self.failed = done.is_err();
        if let Err(error) = done {
            self.merger.metrics.merge_failures.increment(1);
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "history.failed: trying again at the next interval, or in a minute if much waits"
            );
        }
    }

    /// Whether it is time for a round, so long after the last one began or failed. However much waits, what has failed is not tried again at once.
    fn is_due(&self, since_last: Duration) -> bool {
        let early = if self.failed { RETRY_INTERVAL } else { Duration::ZERO };
        since_last >= self.history.merge_interval || (since_last >= early && self.has_much_to_merge())
    }

    /// Merges all that waits, prunes and deletes.
    pub async fn round(&mut self) -> Result<(), StoreError> {
        self.pruned_bytes = 0;
        if !self.store.lead_upkeep().await? {
            // Another gateway does it.
            (self.leads_behind, self.merged_bytes, self.earlier_bytes) = (*self.tail.head().borrow(), self.tail.appended_bytes(), 0);
            return Ok(());
        }
        // What comes in meanwhile is for the next round: as long as devices send there would always be more.
        let end = self.store.last_position().await?;
        while let Some(through) = self.merge().await? {
            self.prune().await?;
            self.show_backlog().await?;
            if through >= end {
                break;
            }
        }
        self.prune().await?;
        self.expire().await
    }

    /// Does a pass of merging, and counts what it leaves; up to which position, or `None` when there was nothing to merge.
    async fn merge(&mut self) -> Result<Option<Position>, StoreError> {
        let appended = self.tail.appended_bytes();
        let Some(Merged { after, through, rows }) = self.merger.pass(|| self.haste()).await? else {
            (self.merged_bytes, self.earlier_bytes) = (appended, 0);
            return Ok(None);
        };
        let bytes: u64 = rows.iter().map(|row| row.bytes as u64).sum();
        let newer = rows.partition_point(|row| row.position <= self.leads_behind);
        self.merged_bytes += rows[newer..].iter().map(|row| row.bytes as u64).sum::<u64>();
        // Nobody has counted these when they came in; they will be of the size of those that were just merged.
        let earlier = (self.leads_behind.0 - through.0).max(0) as u64;
        self.earlier_bytes = earlier * (bytes / rows.len().max(1) as u64);
        self.replay.extend(&self.store, after).await?;
        self.replay.add(&rows, through);
        Ok(Some(through))
    }

    /// About how many bytes of batches wait to be merged. What waited at the start counts from the first pass on.
    fn backlog_bytes(&self) -> u64 {
        self.earlier_bytes + self.tail.appended_bytes().saturating_sub(self.merged_bytes)
    }

    fn has_much_to_merge(&self) -> bool {
        self.backlog_bytes() >= self.history.unmerged_bytes_max as u64
    }

    /// When much waits the rests are shorter, and the transactions larger.
    fn haste(&self) -> Haste {
        haste_behind(self.backlog_bytes() as f64 / self.history.unmerged_bytes_max as f64)
    }

    async fn show_backlog(&self) -> Result<(), StoreError> {
        let (last, merged) = (self.store.last_position().await?, self.store.merged_position().await?);
        self.merger.metrics.unmerged_entries.set((last.0 - merged.0) as f64);
        Ok(())
    }

    /// Deletes what of the log is merged and no longer kept for followers.
    pub async fn prune(&mut self) -> Result<(), StoreError> {
        let merged = self.store.merged_position().await?;
        self.replay.extend(&self.store, merged).await?;
        let mut saved = self.store.latest_position().await?;
        while let Some((slices, through)) = self.replay.expired(self.replay_window, self.replay_bytes_max, self.haste().at_once) {
            // A start reads the latest values from the log behind those that are saved.
            if through > saved {
                let (latest, store) = (self.latest.clone(), self.store.clone());
                // As fast as it goes: merging waits for it, and where what is pruned is minutes old it was saved at an interval.
                promptly(async move { latest.save(&store).await }).await?;
                saved = self.store.latest_position().await?;
            }
            if through > saved {
                break;
            }
            let pruned = self.haste().write(&self.store, move |tx| Box::pin(tx.prune_log(through))).await?;
            self.merger.metrics.pruned_entries.increment(pruned);
            self.pruned_bytes += self.replay.forget(slices) as u64;
        }
        Ok(())
    }

    /// Deletes what is too old, and of the oldest what is too much; gives back the space. When that takes long, the rest is for the next
    /// round: of deleting when much is to be merged, of giving back when anything is.
    pub async fn expire(&self) -> Result<(), StoreError> {
        let until = Instant::now() + DELETING_MAX;
        let age = self.history.retention_age;
        if !age.is_zero() {
            self.expire_before(Timestamp::now().saturating_sub(age).micros(), until).await?;
        }
        if self.history.retention_bytes_max > 0 {
            self.expire_beyond(self.history.retention_bytes_max, until).await?;
        }
        // What the log has left comes in again until the next round, if the devices go on: a file that becomes shorter and longer again and again
        // keeps the disk busy. If they do not, the next round gives it back.
        let kept = KEPT_OF_PRUNED * self.pruned_bytes;
        while Instant::now() < until || self.backlog_bytes() == 0 {
            let store = self.store.clone();
            if !self.haste().write_with(async move { store.release_space(kept).await }).await? {
                break;
            }
        }
        Ok(())
    }

    pub(super) async fn expire_before(&self, time: i64, until: Instant) -> Result<(), StoreError> {
        while self.delete_oldest(Some(time), until).await? > 0 {}
        Ok(())
    }

    /// To count what is used may take as long as many deletions: it is done after those that are expected to free half of what is too much, and
    /// at the latest after as many as all before. What comes in meanwhile makes a deletion seem to free less, so the most counts that one has freed.
    async fn expire_beyond(&self, bytes_max: u64, until: Instant) -> Result<(), StoreError> {
        // Cheap to know, where what is used is not: of that it is known that it is no more, or only estimated to be.
        if self.store.file_bytes().await? <= bytes_max {
            return Ok(());
        }
        let (mut used, mut deletions, mut freed_by_one) = (self.store.used_bytes().await?, 0, 0);
        while used > bytes_max {
            let next = deletions_for_half(used - bytes_max, freed_by_one, deletions);
            for _ in 0..next {
                if self.delete_oldest(None, until).await? == 0 {
                    return Ok(());
                }
            }
            deletions += next;
            let left = self.store.used_bytes().await?;
            freed_by_one = freed_by_one.max(used.saturating_sub(left) / next);
            used = left;
        }
        Ok(())
    }

    fn may_go_on(&self, until: Instant) -> bool {
        Instant::now() < until || !self.has_much_to_merge()
    }

    /// Deletes some of the oldest chunks, if it may go on; how many.
    async fn delete_oldest(&self, before: Option<i64>, until: Instant) -> Result<u64, StoreError> {
        if !self.may_go_on(until) {
            return Ok(0);
        }
        // Not at leisure: there is too much, and may be more before the next round.
        let haste = Haste { leisure: 0.0, ..self.haste() };
        let deleted = haste.write(&self.store, move |tx| Box::pin(tx.delete_oldest_chunks(before, CHUNKS_PER_DELETION))).await?;
        self.merger.metrics.expired_readings.increment(deleted.readings);
        Ok(deleted.batches)
    }
}

/// How many deletions free half of the bytes that are too much, as far as is known what one frees: at least one, and no more than there were.
fn deletions_for_half(too_much: u64, freed_by_one: u64, deletions: u64) -> u64 {
    let half = (too_much / 2).checked_div(freed_by_one).unwrap_or(0);
    half.clamp(1, deletions.max(1))
}

/// How fast to go when so many times `history.unmerged_bytes_max` wait.
fn haste_behind(backlog: f64) -> Haste {
    let restless = backlog >= BACKLOG_RESTLESS;
    Haste {
        rest: REST * ((BACKLOG_RESTLESS - backlog) / (BACKLOG_RESTLESS - BACKLOG_HURRIED)).clamp(0.0, 1.0),
        leisure: LEISURE * ((BACKLOG_HURRIED - backlog) / (BACKLOG_HURRIED - 1.0)).clamp(0.0, 1.0),
        chunks_per_transaction: if restless {
            CHUNKS_MERGED_RESTLESS
        } else if backlog > BACKLOG_HURRIED {
            CHUNKS_MERGED_HURRIED
        } else {
            CHUNKS_MERGED
        },
        at_once: if restless { AT_ONCE_RESTLESS } else { 1 },
    }
}

impl Replay {
    /// Notes what is merged and was not noted when it was.
    async fn extend(&mut self, store: &Store, merged: Position) -> Result<(), StoreError> {
        while self.through < merged {
            let rows = store.log_sizes(self.through, ROWS_PER_READ).await?;
            let Some(last) = rows.last() else { break };
            let through = last.position.min(merged);
            self.add(&rows[..rows.partition_point(|row| row.position <= through)], through);
        }
        Ok(())
    }

    /// Notes that these rows are merged, up to a position.
    fn add(&mut self, rows: &[LogSize], through: Position) {
        for row in rows {
            self.bytes += row.bytes;
            match self.slices.back_mut() {
                Some(slice) if slice.rows < SLICE_ROWS && slice.bytes < SLICE_BYTES => {
                    (slice.through, slice.receive_time) = (row.position, row.receive_time);
                    slice.rows += 1;
                    slice.bytes += row.bytes;
                }
                _ => {
                    let (through, receive_time) = (row.position, row.receive_time);
                    self.slices.push_back(Slice { through, receive_time, rows: 1, bytes: row.bytes });
                }
            }
        }
        self.through = through;
    }

    /// Of the oldest slices those that are not to be kept, but no more than `slices_max`: how many they are, and where the last ends.
    fn expired(&self, window: Duration, bytes_max: usize, slices_max: usize) -> Option<(usize, Position)> {
        let (old, mut bytes) = (Timestamp::now().saturating_sub(window), self.bytes);
        let expired = self.slices.iter().take(slices_max).take_while(|slice| {
            let expired = slice.receive_time <= old || bytes > bytes_max;
            bytes -= slice.bytes;
            expired
        });
        (1..).zip(expired).last().map(|(slices, last)| (slices, last.through))
    }

    /// Forgets so many of the oldest slices; how many bytes of batches they had.
    fn forget(&mut self, slices: usize) -> usize {
        let bytes = self.slices.drain(..slices).map(|slice| slice.bytes).sum();
        self.bytes -= bytes;
        bytes
    }
}

#[cfg(test)]
#[path = "upkeep_tests.rs"]
mod tests;
