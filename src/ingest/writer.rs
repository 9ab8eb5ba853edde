//! The writer: one task that owns the way into the log.
//!
//! It drains whatever waits and commits it as one transaction. While that commit is under way the next group gathers, so
//! groups grow with the load and no timer is needed. Duplicates are found by the stream's row, read in the transaction that
//! moves it on: a batch is stored exactly once, whatever was interrupted. Acknowledgements, the tail and the latest values
//! come after the commit.
//!
//! After a failed commit it is not known what the store holds. The writer then forgets all that it had in memory, answers
//! UNAVAILABLE, and takes nothing until the store has proved, on a new connection, that it takes a durable write.

use super::{Append, Ingest, Outcome, Reply, metrics::IngestMetrics, stall::watched};
use crate::{
    config::Config,
    error::Error,
    fleet::{Device, Registry},
    live::{Latest, Tail, TailEntry},
    model::{BatchLimits, BatchReject, CheckedBatch, Position, StreamId},
    store::{DeviceKey, LogRow, NewLogRow, NewRejection, SensorRow, Store, StoreError, StreamChange, StreamRow, WriteTx},
    telemetry::{Metrics, Readiness},
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{Semaphore, mpsc};

/// The streams whose place is kept in memory; beyond that all are forgotten and read again when they are needed.
const STREAMS_CACHED_MAX: usize = 200_000;
/// How much of the log is read at once after a failure.
const ROWS_PER_READ: usize = 256;
const BYTES_PER_READ: usize = 4 << 20;
/// How long the writer waits before it asks a failed store again.
const RECOVERY_INTERVAL: Duration = Duration::from_millis(500);
/// The readiness component that the writer speaks for.
pub const COMPONENT: &str = "store";

/// What the writer works on.
pub struct Writer {
    store: Store,
    registry: Registry,
    tail: Arc<Tail>,
    latest: Arc<Latest>,
    metrics: IngestMetrics,
    readiness: Readiness,
    receiver: mpsc::Receiver<Append>,
    commit_batches_max: usize,
    sensors_max: usize,
    rejected_kept_max: u32,
    streams: HashMap<(DeviceKey, StreamId), StreamRow>,
}

/// Makes the writer, and the handle by which batches come to it.
pub fn writer(
    config: &Config,
    store: Store,
    registry: Registry,
    tail: Arc<Tail>,
    latest: Arc<Latest>,
    metrics: &Metrics,
    readiness: Readiness,
) -> (Ingest, Writer) {
    let settings = &config.ingest;
    let (sender, receiver) = mpsc::channel(settings.commit_batches_max);
    let ingest = Ingest {
        limits: Arc::new(limits(config)),
        admission: Arc::new(Semaphore::new(settings.pending_bytes_max)),
        pending_bytes_max: settings.pending_bytes_max,
        sender,
        discards: false,
    };
    let writer = Writer {
        store,
        registry,
        tail,
        latest,
        metrics: IngestMetrics::new(metrics),
        readiness,
        receiver,
        commit_batches_max: settings.commit_batches_max,
        sensors_max: config.devices.sensors_max,
        rejected_kept_max: settings.rejected_batches_kept_max,
        streams: HashMap::new(),
    };
    (ingest, writer)
}

fn limits(config: &Config) -> BatchLimits {
    BatchLimits {
        bytes_max: config.ingest.batch_bytes_max,
        readings_max: config.ingest.batch_readings_max,
        sensors_max: config.devices.sensors_max,
        time_skew_max: config.ingest.time_skew_max,
        reading_age_max: config.ingest.reading_age_max,
    }
}

impl Writer {
    /// Runs until every [`Ingest`] is gone and all that was handed in is committed.
    pub async fn run(mut self) {
        // Ready is who can write: a disk may be full at the start already.
        match self.store.probe_write().await {
            Ok(()) => self.readiness.set(COMPONENT, Ok(())),
            Err(error) => self.recover(error).await,
        }
        let mut waiting = Vec::with_capacity(self.commit_batches_max);
        while self.receiver.recv_many(&mut waiting, self.commit_batches_max).await > 0 {
            let began = Instant::now();
            match watched(&self.readiness.clone(), self.commit(&waiting)).await {
                Ok(committed) => {
                    self.metrics.commit_seconds.record(began.elapsed());
                    self.metrics.commit_batches.record(waiting.len() as f64);
                    self.publish(std::mem::take(&mut waiting), committed);
                    waiting.reserve(self.commit_batches_max);
                }
                Err(error) => {
                    self.refuse(&mut waiting);
                    self.recover(error).await;
                }
            }
        }
    }

    /// Commits all of `appends` that is to be stored, and says of each what became of it.
    async fn commit(&mut self, appends: &[Append]) -> Result<Committed, StoreError> {
        let mut group = Group::default();
        let mut tx = self.store.begin().await?;
        for append in appends {
            let decision = self.decide(&mut tx, &mut group, append).await?;
            group.decisions.push(decision);
        }
        if group.is_empty() {
            tx.rollback().await?;
            return Ok(Committed { first: Position(0), group });
        }
        let first = if group.log.is_empty() { Position(0) } else { tx.append(&group.log).await? };
        let changes: Vec<StreamChange> = group.streams.values().map(|staged| staged.change).filter(changes_anything).collect();
        tx.advance_streams(&changes).await?;
        if !group.rejections.is_empty() {
            tx.reject(&group.rejections, self.rejected_kept_max).await?;
        }
        let sensors = std::mem::take(&mut group.sensors);
        tx.commit_then(|committed| {
            if committed {
                sensors.into_values().for_each(|staged| staged.device.learn(staged.rows.into_values()));
            }
        })
        .await?;
        Ok(Committed { first, group })
    }

    async fn decide(&self, tx: &mut WriteTx<'_>, group: &mut Group, append: &Append) -> Result<Result<Reply, Error>, StoreError> {
        let device = &append.device;
        if let Err(error) = device.check() {
            return Ok(Err(error));
        }
        let stream = match group.streams.get_mut(&(device.key, append.stream_id)) {
            Some(staged) => staged,
            None => {
                let row = match self.streams.get(&(device.key, append.stream_id)) {
                    Some(row) => *row,
                    None => tx.stream(device.key, append.stream_id, append.receive_time).await?,
                };
                group.streams.entry((device.key, append.stream_id)).or_insert(Staged::at(row))
            }
        };
        let change = &mut stream.change;
        let last = change.sequence_after;
        if append.sequence <= last {
            change.duplicate.add(append.readings());
            change.receive_micros = append.receive_time.micros();
            return Ok(Ok(Reply { outcome: Outcome::Duplicate { readings: append.readings() }, durable_through: last }));
        }
        // The sequences that the device says it lost close the hole before this one.
        if append.sequence - last > append.lost_batches.saturating_add(1) {
            return Ok(Ok(Reply { outcome: Outcome::Gap { expected: last + 1 }, durable_through: last }));
        }
        let skipped = append.sequence - last - 1;
        change.lost.batches = change.lost.batches.saturating_add(skipped);
        if skipped > 0 {
            change.lost.readings = change.lost.readings.saturating_add(append.lost_readings);
        }
        change.sequence_after = append.sequence;
        change.receive_micros = append.receive_time.micros();
        let stream_key = change.key;

        match self.judge(tx, group, append).await? {
            Ok(checked) => {
                if let Some(stream) = group.streams.get_mut(&(device.key, append.stream_id)) {
                    stream.change.stored.add(append.readings());
                }
                group.log.push(NewLogRow {
                    device: device.key,
                    stream_key,
                    sequence: append.sequence,
                    receive_time: append.receive_time,
                    summary: checked.summary,
                    batch: checked.bytes.clone(),
                });
                Ok(Ok(Reply { outcome: Outcome::Stored { readings: append.readings() }, durable_through: append.sequence }))
            }
            Err(reject) => {
                group.rejections.push(NewRejection {
                    device: device.key,
                    stream_key,
                    sequence: append.sequence,
                    receive_time: append.receive_time,
                    reject: reject.clone(),
                    batch: append.bytes.clone(),
                });
                Ok(Ok(Reply { outcome: Outcome::Rejected(reject), durable_through: append.sequence }))
            }
        }
    }

    /// Whether the batch can be stored; if so, the sensors that it brings are.
    async fn judge<'a>(
        &self,
        tx: &mut WriteTx<'_>,
        group: &mut Group,
        append: &'a Append,
    ) -> Result<Result<&'a CheckedBatch, BatchReject>, StoreError> {
        let checked = match &append.batch {
            Ok(checked) => checked,
            Err(reject) => return Ok(Err(reject.clone())),
        };
        let device = &append.device;
        loop {
            let staged = group.sensors.get(&device.key).map_or(&group.no_sensors, |staged| &staged.rows);
            let changes = match device.judge(checked, staged, self.sensors_max, append.receive_time) {
                Ok(changes) => changes,
                Err(reject) => return Ok(Err(reject)),
            };
            // A sensor that the store knows and the registry does not, after a commit of unknown outcome, may be of another
            // kind: then the batch is judged once more, by what the store has.
            if changes.is_empty() || stage_sensors(tx, group, device, changes).await? {
                return Ok(Ok(checked));
            }
        }
    }

    /// Tells everybody what is now durable.
    fn publish(&mut self, appends: Vec<Append>, Committed { first, group }: Committed) {
        if self.streams.len() + group.streams.len() > STREAMS_CACHED_MAX {
            self.streams.clear();
        }
        for (key, staged) in group.streams {
            // A stream that only ever had a gap was not stored: its number is not its own.
            if staged.change.sequence_after > 0 {
                self.streams.insert(key, StreamRow { key: staged.change.key, last_sequence: staged.change.sequence_after });
            }
        }
        let mut position = first;
        let mut entries = Vec::with_capacity(group.log.len());
        let mut replies = Vec::with_capacity(appends.len());
        for (append, decision) in appends.into_iter().zip(group.decisions) {
            self.count(&append, &decision);
            if let (Ok(Reply { outcome: Outcome::Stored { .. }, .. }), Ok(CheckedBatch { bytes, sensors, .. })) = (&decision, append.batch)
            {
                let Append { device, receive_time, .. } = append;
                self.latest.add(position, &device, sensors);
                entries.push(TailEntry { position, device, receive_time, batch: bytes });
                position = Position(position.0 + 1);
            }
            replies.push((append.reply, decision));
        }
        for (reply, decision) in replies {
            // The caller may be gone; the batch is stored all the same, and a duplicate when it comes again.
            let _ = reply.send(decision);
        }
        self.tail.publish(entries);
    }

    fn count(&self, append: &Append, decision: &Result<Reply, Error>) {
        let readings = append.readings();
        match decision.as_ref().map(|reply| &reply.outcome) {
            Ok(Outcome::Stored { .. }) => {
                self.metrics.stored_batches.increment(1);
                self.metrics.stored_readings.increment(readings);
                self.metrics.stored_bytes.increment(append.bytes.len() as u64);
            }
            Ok(Outcome::Duplicate { .. }) => {
                self.metrics.duplicate_batches.increment(1);
                self.metrics.duplicate_readings.increment(readings);
            }
            Ok(Outcome::Rejected(reject)) => {
                self.metrics.rejected(reject.reason, readings);
                tracing::warn!(device = %append.device.id, stream_id = %append.stream_id, sequence = append.sequence, %reject, "batch.rejected");
            }
            Ok(Outcome::Gap { .. }) => self.metrics.sequence_gaps.increment(1),
            Err(_) => {}
        }
    }

    /// Answers all that waits with UNAVAILABLE.
    fn refuse(&mut self, waiting: &mut Vec<Append>) {
        while let Ok(append) = self.receiver.try_recv() {
            waiting.push(append);
        }
        self.metrics.unavailable_batches.increment(waiting.len() as u64);
        for append in waiting.drain(..) {
            let _ = append.reply.send(Err(Error::StoreUnavailable));
        }
    }

    /// Waits until the store takes writes again. Everything in memory is forgotten: the store's own state is the truth.
    async fn recover(&mut self, first_error: StoreError) {
        self.metrics.commit_failures.increment(1);
        self.streams.clear();
        let why = chain(&first_error);
        tracing::error!(error = %why, "store.commit_failed: no batch is acknowledged until the store takes writes again");
        self.readiness.set(COMPONENT, Err(why));
        let mut waiting = Vec::new();
        let mut ticks = tokio::time::interval(RECOVERY_INTERVAL);
        ticks.tick().await;
        loop {
            tokio::select! {
                received = self.receiver.recv() => match received {
                    Some(append) => {
                        waiting.push(append);
                        self.refuse(&mut waiting);
                    }
                    None => return,
                },
                _ = ticks.tick() => match self.catch_up().await {
                    Ok(()) => break,
                    Err(error) => self.readiness.set(COMPONENT, Err(chain(&error))),
                },
            }
        }
        tracing::info!("store.recovered");
        self.readiness.set(COMPONENT, Ok(()));
    }
}

impl Writer {
    /// Proves that the store takes writes, and tells of what a commit of unknown outcome stored after all.
    async fn catch_up(&self) -> Result<(), StoreError> {
        self.store.probe_write().await?;
        let mut told = *self.tail.head().borrow();
        loop {
            let rows = self.store.read_log(told, ROWS_PER_READ, BYTES_PER_READ).await?;
            let Some(last) = rows.last() else { break };
            told = last.position;
            let mut entries = Vec::with_capacity(rows.len());
            for LogRow { position, device, receive_time, batch } in rows {
                if let Some(device) = self.registry.by_key(device).await? {
                    // The batch may have brought some that the registry was not told of.
                    device.learn(self.store.sensors(device.key).await?);
                    entries.push(TailEntry { position, device, receive_time, batch });
                }
            }
            self.tail.publish(entries);
        }
        self.latest.catch_up(&self.store, &self.registry).await
    }
}

/// What one transaction is to do.
#[derive(Default)]
struct Group {
    decisions: Vec<Result<Reply, Error>>,
    // In the order of streams, so that rows are locked in one order where several gateways write.
    streams: BTreeMap<(DeviceKey, StreamId), Staged>,
    log: Vec<NewLogRow>,
    rejections: Vec<NewRejection>,
    sensors: HashMap<DeviceKey, StagedSensors>,
    no_sensors: HashMap<String, SensorRow>,
}

impl Group {
    fn is_empty(&self) -> bool {
        !self.streams.values().any(|staged| changes_anything(&staged.change))
    }
}

struct Committed {
    first: Position,
    group: Group,
}

struct Staged {
    change: StreamChange,
}

impl Staged {
    fn at(row: StreamRow) -> Self {
        let (sequence_before, sequence_after) = (row.last_sequence, row.last_sequence);
        Self { change: StreamChange { key: row.key, sequence_before, sequence_after, ..StreamChange::default() } }
    }
}

struct StagedSensors {
    device: Arc<Device>,
    rows: HashMap<String, SensorRow>,
}

fn changes_anything(change: &StreamChange) -> bool {
    change.sequence_after != change.sequence_before || change.duplicate.batches > 0
}

/// Writes sensors that are new or have their unit said; whether all are as the batch has them.
async fn stage_sensors(tx: &mut WriteTx<'_>, group: &mut Group, device: &Arc<Device>, changes: Vec<SensorRow>) -> Result<bool, StoreError> {
    let staged = group.sensors.entry(device.key).or_insert_with(|| StagedSensors { device: device.clone(), rows: HashMap::new() });
    let mut as_wanted = true;
    for change in changes {
        let row = if change.key == 0 {
            let row = tx.insert_sensor(device.key, &change).await?;
            as_wanted &= row.kind == change.kind && row.unit == change.unit;
            row
        } else {
            tx.set_sensor_unit(&change).await?;
            change
        };
        staged.rows.insert(row.name.clone(), row);
    }
    Ok(as_wanted)
}

/// An error with all its causes, for a person.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
