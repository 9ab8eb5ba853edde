//! The writer: one task that owns the way into the log.
//!
//! It drains whatever waits and commits it as one transaction. While that commit is under way the next group gathers, so
//! groups grow with the load and no timer is needed. Duplicates are found by the stream's row, read in the transaction that
//! moves it on: a batch is stored exactly once, whatever was interrupted. Acknowledgements, the tail and the latest values
//! come after the commit.
//!
//! After a failed commit it is not known what the store holds. The writer then forgets all that it had in memory, answers
//! UNAVAILABLE, and takes nothing until the store has proved, on a new connection, that it takes a durable write.

use super::{
    Ingest, Outcome, Reply, Run, Submitted,
    admission::Admission,
    announce::{Announcement, Announcer, Durable, Entry},
    metrics::IngestMetrics,
    run::{Checked, RunBatch},
    stall::watched,
};
use crate::{
    config::Config,
    error::Error,
    fleet::{Device, Missing, MissingCause, Registry},
    limits::DeviceLimits,
    live::{Latest, Publisher, Tail},
    model::{BatchLimits, BatchReject, BatchSummary, Position, StreamId, Timestamp},
    store::{DeviceKey, NewLogRow, NewRejection, SensorRow, Store, StoreError, StreamChange, StreamRow, WriteTx},
    telemetry::{Metrics, Readiness, Sparing},
};
use bytes::Bytes;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
    task::JoinError,
};

/// The streams whose place is kept in memory; beyond that all are forgotten and read again when they are needed.
const STREAMS_CACHED_MAX: usize = 200_000;
/// How often one group may meet another gateway at its streams before that counts as a failure.
const CONFLICTS_MAX: usize = 10;
/// How long the writer waits before it asks a failed store again.
const RECOVERY_INTERVAL: Duration = Duration::from_millis(500);
/// How long a gateway has nothing to commit before it asks its database whether it is there.
const IDLE_PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// The readiness component that the writer speaks for.
pub const COMPONENT: &str = "store";

/// What the writer works on.
pub struct Writer {
    store: Store,
    registry: Registry,
    announcer: Arc<Announcer>,
    // Of the last group; it may still be under way.
    announcing: Option<oneshot::Receiver<()>>,
    metrics: Arc<IngestMetrics>,
    readiness: Readiness,
    receiver: mpsc::Receiver<Submitted>,
    commit_batches_max: usize,
    sensors_max: usize,
    rejected_kept_max: u32,
    slow_commit: Duration,
    slow_told: Sparing,
    streams: HashMap<(DeviceKey, StreamId), StreamRow>,
    // Another gateway was quicker with a stream of the group: its rows are locked before they are read.
    contended: bool,
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
    let device_limits = DeviceLimits::new(&config.limits, metrics);
    let ingest = Ingest {
        limits: Arc::new(limits(config)),
        clock_offset_max: config.devices.clock_offset_max,
        device_limits,
        admission: Admission::new(settings),
        sender,
        discards: false,
    };
    let metrics = Arc::new(IngestMetrics::new(metrics));
    let publisher = Arc::new(Publisher::new(store.clone(), registry.clone(), tail, latest.clone()));
    let writer = Writer {
        announcer: Arc::new(Announcer::new(config, publisher, latest, metrics.clone())),
        announcing: None,
        store,
        registry,
        metrics,
        readiness,
        receiver,
        commit_batches_max: settings.commit_batches_max,
        sensors_max: config.devices.sensors_max,
        rejected_kept_max: settings.rejected_batches_kept_max,
        slow_commit: config.log.slow_commit,
        slow_told: Sparing::default(),
        streams: HashMap::new(),
        contended: false,
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
    /// What it tells followers by, for others who have something to tell.
    pub fn publisher(&self) -> Arc<Publisher> {
        self.announcer.publisher.clone()
    }

    /// Runs until every [`Ingest`] is gone and all that was handed in is committed.
    pub async fn run(mut self) {
        let announcer = self.announcer.clone();
        let (announcements, next) = mpsc::channel(1);
        let runtime = Handle::current();
        // On a thread of its own, as the writer: there it goes on beside the next commit.
        let announcing = tokio::task::spawn_blocking(move || runtime.block_on(announcer.run(next)));
        self.write(&announcements).await;
        drop(announcements);
        if let Err(Ok(panic)) = announcing.await.map_err(JoinError::try_into_panic) {
            std::panic::resume_unwind(panic);
        }
    }

    async fn write(&mut self, announcements: &mpsc::Sender<Announcement>) {
        // Ready is who can write: a disk may be full at the start already.
        match self.store.probe_write().await {
            Ok(()) => self.readiness.set(COMPONENT, Ok(())),
            Err(error) => self.recover(error).await,
        }
        let mut waiting = Vec::new();
        while self.receive(&mut waiting).await {
            let began = Instant::now();
            match watched(&self.readiness.clone(), "a commit", self.commit(&waiting)).await {
                Ok(committed) => {
                    let took = began.elapsed();
                    self.metrics.commit_seconds.record(took);
                    self.metrics.commit_batches.record(waiting.iter().map(|submitted| submitted.run.len()).sum::<usize>() as f64);
                    self.tell_if_slow(took, &waiting);
                    self.announce(std::mem::take(&mut waiting), committed, announcements).await;
                }
                Err(error) => {
                    self.refuse(&mut waiting);
                    self.metrics.commit_failures.increment(1);
                    self.announced().await;
                    self.recover(error).await;
                }
            }
        }
        self.announced().await;
    }

    /// Logs a commit that took long. A disk that is slow is so again and again, and says so once in a while.
    fn tell_if_slow(&self, took: Duration, committed: &[Submitted]) {
        if self.slow_commit.is_zero() || took <= self.slow_commit {
            return;
        }
        let Some(left_out) = self.slow_told.pass() else { return };
        let batches: usize = committed.iter().map(|submitted| submitted.run.len()).sum();
        let readings: u64 = committed.iter().flat_map(|submitted| &submitted.run.batches).map(RunBatch::readings).sum();
        let bytes: usize = committed.iter().map(|submitted| submitted.bytes.len()).sum();
        tracing::warn!(batches, readings, bytes, duration_ms = took.as_secs_f64() * 1e3, left_out, "commit.slow");
    }

    /// Waits for a run, and takes what else waits; whether there is any.
    async fn receive(&mut self, waiting: &mut Vec<Submitted>) -> bool {
        let mut next = loop {
            // A file is there as long as the machine is, and an idle disk is left alone.
            if !self.store.is_shared() {
                break self.receiver.recv().await;
            }
            match tokio::time::timeout(IDLE_PROBE_INTERVAL, self.receiver.recv()).await {
                Ok(received) => break received,
                Err(_) => self.probe().await,
            }
        };
        let mut batches = 0;
        while let Some(submitted) = next {
            batches += submitted.run.len();
            waiting.push(submitted);
            next = if batches < self.commit_batches_max { self.receiver.try_recv().ok() } else { None };
        }
        !waiting.is_empty()
    }

    /// Finds out whether a database on the network still takes writes, of which a gateway that has nothing to commit would not hear.
    async fn probe(&mut self) {
        if let Err(error) = watched(&self.readiness.clone(), "a probe", self.store.probe_write()).await {
            self.recover(error).await;
        }
    }

    /// Commits all of `waiting` that is to be stored, and says of each batch what became of it.
    ///
    /// Where another gateway on the same database was quicker with one of the streams, what is known of the group's streams and
    /// devices is forgotten, and the group is decided once more with the streams' rows locked.
    async fn commit(&mut self, waiting: &[Submitted]) -> Result<Committed, StoreError> {
        for _ in 0..CONFLICTS_MAX {
            match self.try_commit(waiting).await {
                Err(error) if error.is_conflict() => tracing::debug!(%error, "store.conflict"),
                result => return result,
            }
            self.contended = true;
            let streams = streams_of(waiting);
            self.streams.retain(|stream, _| !streams.contains(stream));
            let devices: HashSet<DeviceKey> = streams.into_iter().map(|(device, _)| device).collect();
            for device in devices {
                self.registry.renew(device).await?;
            }
        }
        self.try_commit(waiting).await
    }

    async fn try_commit(&mut self, waiting: &[Submitted]) -> Result<Committed, StoreError> {
        let mut group = Group::default();
        let store = self.store.clone();
        let mut tx = store.begin_append().await?;
        let (first, rows) = match self.fill(&mut tx, &mut group, waiting).await {
            Ok(Some(written)) => written,
            Ok(None) => {
                tx.rollback().await?;
                return Ok(Committed { first: Position(0), rows: Vec::new(), group });
            }
            Err(error) => {
                if error.is_conflict() {
                    tx.rollback().await?;
                }
                return Err(error);
            }
        };
        let sensors = std::mem::take(&mut group.sensors);
        tx.commit_then(|committed| {
            if committed {
                sensors.into_values().for_each(|staged| staged.device.learn(staged.rows.into_values()));
            }
        })
        .await?;
        Ok(Committed { first, rows, group })
    }

    /// Writes all of `waiting` that is to be stored: the log's new rows and the position of the first; `None` when nothing changes.
    async fn fill(
        &mut self,
        tx: &mut WriteTx<'_>,
        group: &mut Group,
        waiting: &[Submitted],
    ) -> Result<Option<(Position, Vec<NewLogRow>)>, StoreError> {
        if std::mem::take(&mut self.contended) {
            let streams: Vec<(DeviceKey, StreamId)> = streams_of(waiting).into_iter().collect();
            self.streams.extend(tx.lock_streams(&streams).await?);
        }
        for (index, Submitted { run, bytes, .. }) in waiting.iter().enumerate() {
            let decision = self.decide(tx, group, index, run, bytes).await?;
            group.decisions.push(decision);
        }
        if group.is_empty() {
            return Ok(None);
        }
        let changes: Vec<StreamChange> = group.streams.values().copied().filter(changes_anything).collect();
        tx.advance_streams(&changes).await?;
        if !group.rejections.is_empty() {
            tx.reject(&group.rejections, self.rejected_kept_max).await?;
        }
        let of_runs = group.entries.chunk_by(|entry, next| entry.run == next.run);
        let rows: Vec<NewLogRow> = of_runs.flat_map(|entries| Entry::rows(entries, &waiting[entries[0].run])).collect();
        // Last, as all other gateways that append wait from here to the commit.
        let first = if rows.is_empty() { Position(0) } else { tx.append(&rows).await? };
        Ok(Some((first, rows)))
    }

    /// Says of each batch of a run what is to become of it, and adds what is to be stored to the group.
    async fn decide(
        &self,
        tx: &mut WriteTx<'_>,
        group: &mut Group,
        index: usize,
        run: &Run,
        bytes: &Bytes,
    ) -> Result<Result<Vec<Reply>, Error>, StoreError> {
        let device = &run.device;
        if let Err(error) = device.check() {
            return Ok(Err(error));
        }
        let stream = (device.key, run.stream_id);
        let mut change = match group.streams.get(&stream) {
            Some(staged) => *staged,
            None => {
                let row = match self.streams.get(&stream) {
                    // What looks like a gap may be no more than a stream that another gateway has moved on.
                    Some(row) if !self.store.is_shared() || !run.leaves_gap(row.last_sequence) => *row,
                    _ => tx.stream(device.key, run.stream_id, run.receive_time).await?,
                };
                unchanged(row)
            }
        };
        if let Some(id) = run.dead_letter {
            let outcome = self.replay(tx, group, index, run, &mut change, id).await?;
            group.streams.insert(stream, change);
            return Ok(Ok(vec![Reply { sequence: run.batches[0].sequence, outcome, durable_through: change.sequence_after }]));
        }
        let mut replies = Vec::with_capacity(run.len());
        for (number, batch) in run.batches.iter().enumerate() {
            let expected = change.sequence_after + 1;
            let outcome = match place(&mut change, batch, run.receive_time) {
                Place::Next => match self.judge(tx, group, run, batch).await? {
                    Ok(summary) => {
                        change.stored.add(batch.readings());
                        group.add_entry(Entry::new(index, number, change.key, batch, summary), self.store.in_line_bytes_max());
                        Outcome::Stored { readings: batch.readings() }
                    }
                    Err(reject) => {
                        group.rejections.push(rejection(run, change.key, batch, &reject, bytes));
                        Outcome::Rejected(reject)
                    }
                },
                Place::Known => Outcome::Duplicate { readings: batch.readings() },
                Place::Behind => Outcome::Gap { expected },
            };
            if expected < batch.sequence {
                let (cause, last) = match outcome {
                    // Not those right before it, which the device has lost.
                    Outcome::Gap { .. } => (MissingCause::Awaited, batch.sequence - 1 - batch.lost_batches),
                    _ => (MissingCause::Lost, batch.sequence - 1),
                };
                group.missing.push((index, Missing { stream_id: run.stream_id, sequences: expected..=last, cause }));
            }
            replies.push(Reply { sequence: batch.sequence, outcome, durable_through: change.sequence_after });
        }
        group.streams.insert(stream, change);
        Ok(Ok(replies))
    }

    /// Says of a batch that was rejected what is to become of it now. Its place in its stream it had when it was rejected, so that all
    /// that moves on is what is counted.
    async fn replay(
        &self,
        tx: &mut WriteTx<'_>,
        group: &mut Group,
        index: usize,
        run: &Run,
        change: &mut StreamChange,
        id: i64,
    ) -> Result<Outcome, StoreError> {
        let batch = &run.batches[0];
        let summary = match self.judge(tx, group, run, batch).await? {
            Ok(summary) => summary,
            Err(reject) => return Ok(Outcome::Rejected(reject)),
        };
        let Some((reason, counted)) = tx.take_dead_letter(run.device.key, id).await? else {
            return Ok(Outcome::Duplicate { readings: batch.readings() });
        };
        tx.uncount_rejected(run.device.key, &reason, counted).await?;
        change.stored.add(batch.readings());
        group.add_entry(Entry::new(index, 0, change.key, batch, summary), self.store.in_line_bytes_max());
        Ok(Outcome::Stored { readings: batch.readings() })
    }

    /// Whether a batch can be stored; if so, the sensors that it brings are.
    async fn judge(
        &self,
        tx: &mut WriteTx<'_>,
        group: &mut Group,
        run: &Run,
        batch: &RunBatch,
    ) -> Result<Result<BatchSummary, BatchReject>, StoreError> {
        let Checked { summary, new_sensors } = match &batch.checked {
            Ok(checked) => checked,
            Err(reject) => return Ok(Err(reject.as_ref().clone())),
        };
        let Some(sensors) = new_sensors else { return Ok(Ok(*summary)) };
        loop {
            let staged = group.sensors.get(&run.device.key).map_or(&group.no_sensors, |staged| &staged.rows);
            let changes = match run.device.judge(sensors, summary.readings, staged, self.sensors_max, run.receive_time) {
                Ok(changes) => changes,
                Err(reject) => return Ok(Err(reject)),
            };
            // A sensor that the store knows and the registry does not, after a commit of unknown outcome, may be of another
            // kind: then the batch is judged once more, by what the store has.
            if changes.is_empty() || stage_sensors(tx, group, &run.device, changes).await? {
                return Ok(Ok(*summary));
            }
        }
    }

    /// Has everybody told what is now durable, and goes on with what waits meanwhile.
    async fn announce(&mut self, waiting: Vec<Submitted>, committed: Committed, announcements: &mpsc::Sender<Announcement>) {
        let Committed { first, rows, group } = committed;
        if self.streams.len() + group.streams.len() > STREAMS_CACHED_MAX {
            self.streams.clear();
        }
        for (key, change) in group.streams {
            // A stream that only ever had a gap was not stored: its number is not its own.
            if change.sequence_after > 0 {
                self.streams.insert(key, StreamRow { key: change.key, last_sequence: change.sequence_after });
            }
        }
        for (index, missing) in group.missing {
            waiting[index].run.device.account.miss(missing);
        }
        let durable = Durable { runs: waiting, decisions: group.decisions, first, entries: group.entries, rows };
        self.announced().await;
        if self.receiver.is_empty() {
            return self.announcer.announce(durable).await;
        }
        let (done, announced) = oneshot::channel();
        self.announcing = Some(announced);
        // If the thread is gone, nobody says that it is done.
        let _ = announcements.send(Announcement { durable, done }).await;
    }

    /// Waits until all that is durable is announced.
    async fn announced(&mut self) {
        if let Some(announcing) = self.announcing.take() {
            // Half a gateway is worse than none: what fails there ends the writer, too.
            announcing.await.expect("what is durable is announced");
        }
    }

    /// Answers all that waits with UNAVAILABLE.
    fn refuse(&mut self, waiting: &mut Vec<Submitted>) {
        while let Ok(submitted) = self.receiver.try_recv() {
            waiting.push(submitted);
        }
        for Submitted { mut run, reply, .. } in waiting.drain(..) {
            self.metrics.unavailable_batches.increment(run.len() as u64);
            run.settle();
            let _ = reply.send(Err(Error::StoreUnavailable));
        }
    }

    /// Waits until the store takes writes again. Everything in memory is forgotten: the store's own state is the truth.
    async fn recover(&mut self, first_error: StoreError) {
        self.streams.clear();
        let why = chain(&first_error);
        tracing::error!(error = %why, "store.takes_no_writes: no batch is acknowledged until the store takes writes again");
        self.readiness.set(COMPONENT, Err(why));
        let mut waiting = Vec::new();
        let mut ticks = tokio::time::interval(RECOVERY_INTERVAL);
        ticks.tick().await;
        loop {
            tokio::select! {
                received = self.receiver.recv() => match received {
                    Some(submitted) => {
                        waiting.push(submitted);
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
        self.announcer.publisher.catch_up().await
    }
}

/// What one transaction is to do.
#[derive(Default)]
struct Group {
    // Of each run.
    decisions: Vec<Result<Vec<Reply>, Error>>,
    // In the order of streams, so that rows are locked in one order where several gateways write.
    streams: BTreeMap<(DeviceKey, StreamId), StreamChange>,
    entries: Vec<Entry>,
    rejections: Vec<NewRejection>,
    // Of which run, and what.
    missing: Vec<(usize, Missing)>,
    sensors: HashMap<DeviceKey, StagedSensors>,
    no_sensors: HashMap<String, SensorRow>,
}

impl Group {
    fn is_empty(&self) -> bool {
        !self.streams.values().any(changes_anything)
    }

    /// Adds an entry, as part of the last one if it goes on where that one ends.
    fn add_entry(&mut self, entry: Entry, in_line_bytes_max: usize) {
        match self.entries.last_mut() {
            Some(last) if last.goes_on_with(&entry, in_line_bytes_max) => last.extend(&entry),
            _ => self.entries.push(entry),
        }
    }
}

struct Committed {
    // The position of the first of the rows.
    first: Position,
    rows: Vec<NewLogRow>,
    group: Group,
}

fn unchanged(row: StreamRow) -> StreamChange {
    let (sequence_before, sequence_after) = (row.last_sequence, row.last_sequence);
    StreamChange { key: row.key, sequence_before, sequence_after, ..StreamChange::default() }
}

/// The streams of all runs, in the order of their rows' locks.
fn streams_of(waiting: &[Submitted]) -> BTreeSet<(DeviceKey, StreamId)> {
    waiting.iter().map(|Submitted { run, .. }| (run.device.key, run.stream_id)).collect()
}

/// Where a batch stands in its stream.
enum Place {
    /// It is the next one.
    Next,
    /// It was dealt with before.
    Known,
    /// Others have to come before it.
    Behind,
}

/// Finds a batch's place, and moves the stream on if it is the next one.
fn place(change: &mut StreamChange, batch: &RunBatch, receive_time: Timestamp) -> Place {
    let last = change.sequence_after;
    if batch.sequence <= last {
        change.duplicate.add(batch.readings());
        change.receive_micros = receive_time.micros();
        return Place::Known;
    }
    // The sequences that the device says it lost close the hole before this one.
    if batch.leaves_gap(last) {
        return Place::Behind;
    }
    let skipped = batch.sequence - last - 1;
    change.lost.batches = change.lost.batches.saturating_add(skipped);
    if skipped > 0 {
        change.lost.readings = change.lost.readings.saturating_add(batch.lost_readings);
    }
    change.sequence_after = batch.sequence;
    change.receive_micros = receive_time.micros();
    Place::Next
}

fn rejection(run: &Run, stream_key: i64, batch: &RunBatch, reject: &BatchReject, bytes: &Bytes) -> NewRejection {
    NewRejection {
        device: run.device.key,
        stream_key,
        sequence: batch.sequence,
        receive_time: run.receive_time,
        reject: reject.clone(),
        batch: bytes.slice(batch.range.clone()),
    }
}

struct StagedSensors {
    device: Arc<Device>,
    rows: HashMap<String, SensorRow>,
}

fn changes_anything(change: &StreamChange) -> bool {
    change.sequence_after != change.sequence_before || change.duplicate.batches > 0 || change.stored.batches > 0
}

/// Writes sensors that are new or have their unit said; whether all are as the batch has them.
async fn stage_sensors(tx: &mut WriteTx<'_>, group: &mut Group, device: &Arc<Device>, changes: Vec<SensorRow>) -> Result<bool, StoreError> {
    let staged = group.sensors.entry(device.key).or_insert_with(|| StagedSensors { device: device.clone(), rows: HashMap::new() });
    let mut as_wanted = true;
    for change in changes {
        let row = if change.key == 0 { tx.insert_sensor(device.key, &change).await? } else { tx.set_sensor_unit(&change).await? };
        as_wanted &= row.kind == change.kind && row.unit == change.unit;
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
