//! The one way by which committed batches come to the tail and to the latest values: in the order of positions, without a hole,
//! each once, whichever gateway on the database committed them.
//!
//! The writer brings what it has committed itself; what others have committed is read from the store, when a position shows that
//! something is missing, or when they say so.

use super::{Latest, Tail, TailEntry};
use crate::{
    fleet::Registry,
    model::Position,
    store::{LogRow, Store, StoreError},
};
use std::sync::Arc;
use tokio::sync::{Mutex, MutexGuard};

const ROWS_PER_READ: usize = 256;
const BYTES_PER_READ: usize = 4 << 20;

/// See the [module](self).
pub struct Publisher {
    store: Store,
    registry: Registry,
    tail: Arc<Tail>,
    latest: Arc<Latest>,
    // All up to here is published.
    through: Mutex<Position>,
}

/// The right to publish next.
pub struct Turn<'a> {
    publisher: &'a Publisher,
    through: MutexGuard<'a, Position>,
    // Whether what is before the writer's batches could be read; else they are published later, with it.
    whole: bool,
}

impl Publisher {
    /// One that goes on behind the end of `tail`.
    pub fn new(store: Store, registry: Registry, tail: Arc<Tail>, latest: Arc<Latest>) -> Self {
        let through = Mutex::new(*tail.head().borrow());
        Self { store, registry, tail, latest, through }
    }

    /// Waits for the turn of the batches that this gateway has committed from `first` on, and publishes what others have
    /// committed before.
    pub async fn turn(&self, first: Position) -> Turn<'_> {
        let mut through = self.through.lock().await;
        let mut whole = true;
        if through.0 + 1 < first.0 {
            match self.read(&mut through, first).await {
                // What is still missing is gone with its device.
                Ok(()) => through.0 = through.0.max(first.0 - 1),
                Err(error) => {
                    whole = false;
                    tracing::warn!(error = &error as &dyn std::error::Error, "live.read_failed: trying again with the next batch");
                }
            }
        }
        Turn { publisher: self, through, whole }
    }

    /// Publishes all that the store has.
    pub async fn catch_up(&self) -> Result<(), StoreError> {
        self.read(&mut *self.through.lock().await, Position(i64::MAX)).await
    }

    /// Publishes what the store has, unless all up to a position is published.
    pub async fn catch_up_to(&self, position: Position) -> Result<(), StoreError> {
        let mut through = self.through.lock().await;
        if *through < position { self.read(&mut through, Position(i64::MAX)).await } else { Ok(()) }
    }

    /// Publishes what the store has behind `through` and before `end`.
    async fn read(&self, through: &mut Position, end: Position) -> Result<(), StoreError> {
        while through.0 + 1 < end.0 {
            let Some(rows) = self.store.read_log_unbroken(*through, ROWS_PER_READ, BYTES_PER_READ).await? else {
                *through = self.skip_pruned().await?;
                continue;
            };
            let rows: Vec<LogRow> = rows.into_iter().take_while(|row| row.position < end).collect();
            let Some(last) = rows.last().map(|row| row.position) else { break };
            let mut entries = Vec::with_capacity(rows.len());
            for row in rows {
                if let Some(device) = self.registry.by_key(row.device).await? {
                    self.latest.add_stored(&self.store, &device, &row).await?;
                    entries.push(TailEntry {
                        position: row.position,
                        device,
                        receive_time: row.receive_time,
                        batches: row.batches,
                        batch: row.batch,
                    });
                }
            }
            self.tail.publish(entries);
            *through = last;
        }
        Ok(())
    }

    /// Goes on behind what others have pruned before this gateway could read it. Followers find their place gone, and are told;
    /// the latest values are saved before anything is pruned.
    async fn skip_pruned(&self) -> Result<Position, StoreError> {
        let pruned = self.store.pruned_position().await?;
        self.latest.reload(&self.store, &self.registry).await?;
        self.tail.begin_after(pruned);
        Ok(pruned)
    }
}

impl Turn<'_> {
    /// Whether the batch at this position is still to be published.
    pub fn is_next(&self, position: Position) -> bool {
        self.whole && position > *self.through
    }

    /// Publishes batches that are [next](Self::is_next), which are already among the latest values.
    pub fn publish(mut self, entries: Vec<TailEntry>) {
        if let Some(last) = entries.last() {
            *self.through = last.position;
        }
        self.publisher.tail.publish(entries);
    }
}
