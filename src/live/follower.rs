//! One follower: what it wants to see, and where it is.

use super::{DeviceLatest, Latest, Tail, TailEntry, tail::TailRead};
use crate::{
    error::{Error, Failure},
    fleet::{Device, Registry},
    model::{DeviceId, LabelSelector, Position, Timestamp, batch::retain_columns},
    pb,
    store::{DeviceKey, LogRow, Store, StoreError},
};
use bytes::Bytes;
use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

const ENTRIES_PER_READ: usize = 64;
const BYTES_PER_READ: usize = 1 << 20;

/// Which readings a follower wants.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of these devices; empty: of any.
    pub devices: HashSet<DeviceId>,
    /// Of devices whose labels match.
    pub labels: LabelSelector,
    /// Of sensors with these names; empty: of any.
    pub sensors: HashSet<String>,
}

impl Filter {
    fn wants_id(&self, id: &DeviceId) -> bool {
        self.devices.is_empty() || self.devices.contains(id)
    }

    fn wants_device(&self, device: &Device) -> bool {
        self.wants_id(&device.id) && device.matches(&self.labels)
    }

    fn wants_sensor(&self, name: &str) -> bool {
        self.sensors.is_empty() || self.sensors.contains(name)
    }
}

/// Where a follower begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the latest values.
    Latest,
    /// With what comes.
    Live,
    /// With the oldest batch in the log.
    Beginning,
    /// With the first batch that came in at or after a time.
    ReceiveTime(Timestamp),
    /// Behind a position.
    After(Position),
}

/// What a follower is shown.
#[derive(Debug, Clone, PartialEq)]
pub enum Item {
    /// The latest readings of a device.
    Latest {
        /// The device.
        device: DeviceId,
        /// One reading a sensor, of some of its sensors.
        batch: pb::Batch,
    },
    /// Readings of a stored entry of the log.
    Readings {
        /// The device.
        device: DeviceId,
        /// When it came in.
        receive_time: Timestamp,
        /// How many batches it holds.
        batches: u64,
        /// The batches, less what the follower does not want.
        batch: Bytes,
        /// Where it stands.
        position: Position,
    },
    /// The past that was asked for has been shown.
    Synced(Position),
    /// Nothing to show for a while; all up to here was shown, or is not wanted.
    Heartbeat(Position),
}

/// What all followers share.
#[derive(Clone)]
pub struct Sources {
    /// The log.
    pub store: Store,
    /// Its end in memory.
    pub tail: Arc<Tail>,
    /// The latest values.
    pub latest: Arc<Latest>,
    /// The devices.
    pub registry: Registry,
    /// Cancelled when the gateway is being stopped.
    pub drain: CancellationToken,
}

/// See the [module](self).
pub struct Follower {
    sources: Sources,
    filter: Filter,
    // All up to here has been shown, or was not wanted.
    cursor: Position,
    // When the cursor reaches this, the past has been shown. `None`: it has.
    sync_at: Option<Position>,
    // Devices whose latest readings are still to be shown.
    latest: Vec<DeviceLatest>,
    ready: VecDeque<Item>,
    head: watch::Receiver<Position>,
    heartbeat_interval: Duration,
    heartbeat_at: Instant,
    // Devices of rows that were read from the store.
    devices: HashMap<DeviceKey, Option<Arc<Device>>>,
}

impl Follower {
    /// Begins to follow.
    pub async fn new(sources: Sources, filter: Filter, start: Start, heartbeat_interval: Duration) -> Result<Self, Failure> {
        let head = sources.tail.head();
        let mut follower = Self {
            filter,
            cursor: Position(0),
            sync_at: None,
            latest: Vec::new(),
            ready: VecDeque::new(),
            heartbeat_interval,
            heartbeat_at: Instant::now() + heartbeat_interval,
            devices: HashMap::new(),
            head,
            sources,
        };
        Box::pin(follower.seek(start)).await?;
        Ok(follower)
    }

    async fn seek(&mut self, start: Start) -> Result<(), Failure> {
        let end = *self.head.borrow();
        self.sync_at = Some(end);
        self.cursor = match start {
            Start::Live => end,
            Start::Latest => {
                let (position, found) = self.sources.latest.snapshot(|id| self.filter.wants_id(id));
                self.latest = found;
                self.sync_at = Some(position);
                position
            }
            Start::Beginning => self.sources.store.pruned_position().await?,
            Start::ReceiveTime(time) => self.sources.store.position_before(time).await?,
            // A commit is in the store, and may have been shown, before the head says so.
            Start::After(position) if position > end && position > self.sources.store.last_position().await? => {
                return Err(Error::invalid("resume_token", "the token is ahead of the log: it is from another database").into());
            }
            Start::After(position) => {
                let pruned = self.sources.store.pruned_position().await?;
                if position < pruned {
                    return Err(Error::PositionExpired { oldest: Position(pruned.0 + 1) }.into());
                }
                position
            }
        };
        Ok(())
    }

    /// The next item; waits for it. The error ends the stream.
    pub async fn next(&mut self) -> Result<Item, Failure> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                self.heartbeat_at = Instant::now() + self.heartbeat_interval;
                return Ok(item);
            }
            if self.latest.is_empty() && self.sync_at.is_some_and(|position| self.cursor >= position) {
                self.sync_at = None;
                self.ready.push_back(Item::Synced(self.cursor));
                continue;
            }
            if self.sources.drain.is_cancelled() {
                return Err(Error::Draining.into());
            }
            // Made when they are asked for: all of them at once would be much to hold for a follower that reads slowly.
            if let Some(latest) = self.latest.pop() {
                self.show_latest(&latest).await?;
                self.give_way().await;
                continue;
            }
            // Noted before reading, so that a commit after the read wakes us.
            self.head.mark_unchanged();
            match self.sources.tail.read(self.cursor, ENTRIES_PER_READ, BYTES_PER_READ) {
                TailRead::Entries(entries) => {
                    self.take_entries(entries)?;
                    self.give_way().await;
                }
                TailRead::Behind => {
                    // Boxed, as all that asks the database: thousands of followers that are up to date need no room for it.
                    Box::pin(self.read_store()).await?;
                    self.give_way().await;
                }
                TailRead::UpToDate => {
                    tokio::select! {
                        () = self.sources.drain.cancelled() => {}
                        changed = self.head.changed() => changed.map_err(|_| Error::Draining)?,
                        () = tokio::time::sleep_until(self.heartbeat_at) => {}
                    }
                }
            }
            // Also while catching up: nothing of what was read may have been wanted.
            if self.ready.is_empty() && Instant::now() >= self.heartbeat_at {
                self.ready.push_back(Item::Heartbeat(self.cursor));
            }
        }
    }

    /// Lets others run before more is read: as long as nothing is shown, this would go on without a pause.
    async fn give_way(&self) {
        if self.ready.is_empty() {
            tokio::task::yield_now().await;
        }
    }

    async fn show_latest(&mut self, latest: &DeviceLatest) -> Result<(), Failure> {
        if let Some(device) = self.device(latest.device.key).await?
            && self.filter.wants_device(&device)
        {
            let batches = latest.batches(|sensor| self.filter.wants_sensor(sensor));
            self.ready.extend(batches.into_iter().map(|batch| Item::Latest { device: device.id.clone(), batch }));
        }
        Ok(())
    }

    fn take_entries(&mut self, entries: Vec<TailEntry>) -> Result<(), Failure> {
        for entry in entries {
            self.cursor = entry.position;
            self.show(entry)?;
        }
        Ok(())
    }

    async fn read_store(&mut self) -> Result<(), Failure> {
        // Asked before the read: what leaves the tail later may not have been in the store when it was read.
        let tail_begins_after = self.sources.tail.begins_after();
        let Some(rows) = self.sources.store.read_log_unbroken(self.cursor, ENTRIES_PER_READ, BYTES_PER_READ).await? else {
            let pruned = self.sources.store.pruned_position().await?;
            return Err(Error::PositionExpired { oldest: Position(pruned.0 + 1) }.into());
        };
        if rows.is_empty() {
            // The rows up to where the tail began are gone with their devices: go on there.
            self.cursor = self.cursor.max(tail_begins_after);
        }
        for LogRow { position, device, receive_time, batches, batch } in rows {
            self.cursor = position;
            if let Some(device) = self.device(device).await? {
                self.show(TailEntry { position, device, receive_time, batches, batch })?;
            }
        }
        Ok(())
    }

    fn show(&mut self, entry: TailEntry) -> Result<(), Failure> {
        let TailEntry { position, device, receive_time, batches, batch } = entry;
        if !self.filter.wants_device(&device) {
            return Ok(());
        }
        let left = if self.filter.sensors.is_empty() {
            Some(batch)
        } else {
            let damaged = |why| StoreError::Damaged(format!("the batch at position {}: {why}", position.0));
            retain_columns(batch, |sensor| self.filter.wants_sensor(sensor)).map_err(damaged)?
        };
        if let Some(batch) = left {
            self.ready.push_back(Item::Readings { device: device.id.clone(), receive_time, batches, batch, position });
        }
        Ok(())
    }

    async fn device(&mut self, key: DeviceKey) -> Result<Option<Arc<Device>>, StoreError> {
        if let Some(known) = self.devices.get(&key)
            && known.as_ref().is_none_or(|device| device.check().is_ok())
        {
            return Ok(known.clone());
        }
        let device = Box::pin(self.sources.registry.by_key(key)).await?;
        self.devices.insert(key, device.clone());
        Ok(device)
    }
}
