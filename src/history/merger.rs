//! Merges the log into chunks.
//!
//! A pass reads the log behind the position 'merged', as much as fits into memory, and writes what it read among the sensors'
//! chunks, in several transactions so that ingest gets its turn; the last one moves 'merged' on. A pass that is cut off is done
//! again from where it began. That changes nothing that it had written: a reading that is already in a chunk is replaced by
//! itself, since of one time the later position wins, and the log is read in the order of positions. Meanwhile, as long as 'merged'
//! stands, queries take these readings from the log, which they prefer.

use super::{
    chunk::{Chunk, READINGS_MAX},
    gather::{Gather, Gathered},
    metrics::HistoryMetrics,
    plan::{self, BYTES_COMPLETE, READINGS_COMPLETE},
    series::Series,
};
use crate::{
    fleet::Registry,
    model::{Position, ValueKind, columns::Values},
    store::{ChunkSpan, Extent, NewChunk, Store, StoreError},
    telemetry::Metrics,
};
use std::{
    ops::Range,
    time::{Duration, Instant},
};

// Small in the crate's own tests, so that there a few readings come to several passes, steps and transactions.
const ROWS_PER_READ: usize = if cfg!(test) { 3 } else { 4_096 };
const BYTES_PER_READ: usize = 2 << 20;
/// How many bytes of readings a pass holds, about; buffers that grow take up to twice as much.
const PASS_BYTES_MAX: usize = if cfg!(test) { 8 << 10 } else { 16 << 20 };
/// The sensors that are written at once: with the chunks that they fold into one another, they are in memory together.
const SENSORS_PER_STEP: usize = if cfg!(test) { 2 } else { 128 };
/// What one transaction writes at the most, about, so that ingest does not wait for long.
const BYTES_PER_TRANSACTION: usize = 1 << 20;
const CHUNKS_PER_TRANSACTION: usize = if cfg!(test) { 3 } else { 256 };
/// How long the work rests for each second that it took, unless there is too much of it: then it takes a third of a core.
const REST: u32 = 2;

/// See the [module](self).
pub struct Merger {
    store: Store,
    registry: Registry,
    pub(super) metrics: HistoryMetrics,
}

/// How fast to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Haste {
    /// Leaving most of the time to others.
    Paced,
    /// Without a rest: the backlog is too large.
    Full,
}

/// Chunks that wait for their transaction.
#[derive(Default)]
struct Writes {
    gone: Vec<i64>,
    new: Vec<NewChunk>,
    bytes: usize,
}

impl Writes {
    fn is_full(&self) -> bool {
        self.bytes >= BYTES_PER_TRANSACTION || self.new.len() + self.gone.len() >= CHUNKS_PER_TRANSACTION
    }
}

/// What goes in the place of some chunks of a sensor.
struct Work {
    sensor_key: i64,
    kind: ValueKind,
    old: Vec<Chunk>,
    new: Series,
}

impl Merger {
    /// Merges what `store` holds.
    pub fn new(store: Store, registry: Registry, metrics: &Metrics) -> Self {
        Self { store, registry, metrics: HistoryMetrics::new(metrics) }
    }

    /// Does a pass; whether there was anything to merge.
    pub async fn pass(&self, haste: Haste) -> Result<bool, StoreError> {
        let mut began = Instant::now();
        let pass_began = began;
        let merged = self.store.merged_position().await?;
        let (gather, through) = self.gather(merged).await?;
        if through == merged {
            return Ok(false);
        }
        let mut sensors = aside(move || Ok(gather.into_sensors())).await?.into_iter().peekable();
        let mut writes = Writes::default();
        let mut readings = 0;
        while sensors.peek().is_some() {
            let step: Vec<Gathered> = sensors.by_ref().take(SENSORS_PER_STEP).collect();
            readings += step.iter().map(|gathered| gathered.readings.len() as u64).sum::<u64>();
            self.place(step, &mut writes).await?;
            if writes.is_full() {
                self.write(std::mem::take(&mut writes), None).await?;
                rest(haste, &mut began).await;
            }
        }
        self.write(writes, Some(through)).await?;
        self.metrics.merged_readings.increment(readings);
        self.metrics.merge_seconds.record(pass_began.elapsed());
        rest(haste, &mut began).await;
        Ok(true)
    }

    /// Reads the log behind `merged`, and how far.
    async fn gather(&self, merged: Position) -> Result<(Gather, Position), StoreError> {
        let (mut gather, mut through) = (Gather::default(), merged);
        while gather.bytes() < PASS_BYTES_MAX {
            let rows = self.store.read_log(through, ROWS_PER_READ, BYTES_PER_READ).await?;
            let Some(last) = rows.last() else { break };
            through = last.position;
            for row in &rows {
                if !gather.knows(row.device) {
                    gather.introduce(row.device, self.registry.by_key(row.device).await?);
                }
            }
            gather = aside(move || gather.add(rows).map(|()| gather)).await?;
            for device in gather.unknown() {
                device.learn(self.store.sensors(device.key).await?);
            }
            gather.add_unknown()?;
        }
        Ok((gather, through))
    }

    /// Finds out what the new readings of some sensors are written as.
    async fn place(&self, sensors: Vec<Gathered>, writes: &mut Writes) -> Result<(), StoreError> {
        let sensors: Vec<Gathered> = sensors.into_iter().filter(|gathered| !gathered.readings.is_empty()).collect();
        let extents: Vec<Extent> = sensors.iter().map(extent).collect();
        let mut spans = self.store.chunks_around(&extents).await?;
        spans.sort_unstable_by_key(|span| (span.sensor_key, span.last_time));
        let mut works = Vec::with_capacity(sensors.len());
        for Gathered { sensor_key, kind, readings } in sensors {
            let around = &spans[of_sensor(&spans, sensor_key)];
            for rewrite in plan::plan(&readings.times, around) {
                let replaced = &around[rewrite.chunks];
                let old = match replaced {
                    [] => Vec::new(),
                    [first, .., last] | [first @ last] => {
                        self.store.read_chunks(sensor_key, first.first_time, last.last_time + 1, replaced.len()).await?
                    }
                };
                writes.gone.extend(replaced.iter().map(|span| span.key));
                works.push(Work { sensor_key, kind, old, new: readings.slice(rewrite.rows) });
            }
        }
        let new = aside(move || works.into_iter().map(Work::chunks).collect::<Result<Vec<_>, _>>()).await?;
        writes.new.extend(new.into_iter().flatten());
        writes.bytes = writes.new.iter().map(|new| new.chunk.points.len()).sum();
        Ok(())
    }

    async fn write(&self, Writes { gone, new, .. }: Writes, merged: Option<Position>) -> Result<(), StoreError> {
        let mut tx = self.store.begin().await?;
        tx.replace_chunks(&gone, &new).await?;
        if let Some(merged) = merged {
            tx.set_merged(merged).await?;
        }
        tx.commit().await?;
        self.metrics.chunks_written.increment(new.len() as u64);
        Ok(())
    }
}

fn extent(gathered: &Gathered) -> Extent {
    let times = &gathered.readings.times;
    Extent { sensor_key: gathered.sensor_key, first_time: times[0], last_time: times[times.len() - 1] }
}

/// Where a sensor's spans are, among those sorted by sensor.
fn of_sensor(spans: &[ChunkSpan], sensor_key: i64) -> Range<usize> {
    spans.partition_point(|span| span.sensor_key < sensor_key)..spans.partition_point(|span| span.sensor_key <= sensor_key)
}

impl Work {
    fn chunks(self) -> Result<Vec<NewChunk>, StoreError> {
        let Self { sensor_key, kind, old, new } = self;
        let mut readings = Series::new(kind);
        for chunk in &old {
            readings.append(decoded(chunk, kind, sensor_key)?);
        }
        readings.append(new);
        let readings = readings.sorted();
        Ok(split(&readings).into_iter().map(|rows| new_chunk(sensor_key, &readings.slice(rows))).collect())
    }
}

fn new_chunk(sensor_key: i64, readings: &Series) -> NewChunk {
    let chunk = Chunk::encode(&readings.times, &readings.values);
    NewChunk { sensor_key, complete: chunk.readings >= READINGS_COMPLETE || chunk.points.len() >= BYTES_COMPLETE, chunk }
}

/// The readings of a chunk.
pub(super) fn decoded(chunk: &Chunk, kind: ValueKind, sensor_key: i64) -> Result<Series, StoreError> {
    let damaged = || StoreError::Damaged(format!("the chunk of sensor {sensor_key} that begins at {} cannot be read", chunk.first_time));
    chunk.decode(kind).map(Series::from).ok_or_else(damaged)
}

/// Rows for a chunk each: of about one size, and of texts not much more than a complete chunk's bytes.
fn split(readings: &Series) -> Vec<Range<usize>> {
    let pieces = readings.len().div_ceil(READINGS_MAX).max(1);
    let even = (0..pieces).map(|piece| readings.len() * piece / pieces..readings.len() * (piece + 1) / pieces);
    let Values::Text(texts) = &readings.values else { return even.collect() };
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for rows in even {
        let (mut begin, mut bytes) = (rows.start, 0);
        for row in rows.clone() {
            bytes += texts[row].len();
            if bytes >= BYTES_COMPLETE {
                ranges.push(begin..row + 1);
                (begin, bytes) = (row + 1, 0);
            }
        }
        ranges.extend((begin < rows.end).then_some(begin..rows.end));
    }
    ranges
}

/// Rests after a piece of work that began at `began`; the next one begins now.
async fn rest(haste: Haste, began: &mut Instant) {
    match haste {
        Haste::Paced => tokio::time::sleep(began.elapsed().min(Duration::from_secs(1)) * REST).await,
        Haste::Full => tokio::task::yield_now().await,
    }
    *began = Instant::now();
}

/// Runs what takes a while on a thread that nobody else waits for.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T, StoreError> + Send + 'static) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(StoreError::Closed),
    }
}
