//! Merges the log into chunks.
//!
//! A pass reads the log behind the position 'merged', as much as fits into memory, and writes what it read among the sensors'
//! chunks, in several transactions so that ingest gets its turn; the last one moves 'merged' on. A pass that is cut off is done
//! again from where it began. That changes nothing that it had written: a reading that is already in a chunk is replaced by
//! itself, since of one time the later position wins, and the log is read in the order of positions. Meanwhile, as long as 'merged'
//! stands, queries take these readings from the log, which they prefer.
//!
//! A pass decodes and encodes for milliseconds between its awaits: it belongs on a thread that no calls wait for.

use super::{
    chunk::{Chunk, READINGS_MAX},
    corrections,
    gather::{Gather, Gathered},
    metrics::HistoryMetrics,
    pace::Haste,
    plan::{self, BYTES_COMPLETE, READINGS_COMPLETE},
    series::Series,
};
use crate::{
    fleet::Registry,
    model::{Position, ValueKind, columns::Values},
    store::{ChunkSpan, Extent, LogSize, NewChunk, Store, StoreError},
    telemetry::Metrics,
};
use std::{collections::HashMap, iter::Peekable, ops::Range, time::Instant};

// Small in the crate's own tests, so that there a few readings come to several passes, steps and transactions.
const ROWS_PER_READ: usize = if cfg!(test) { 3 } else { 4_096 };
/// How many rows a pass reads first, as long as it does not know how large they are.
const ROWS_OF_FIRST_READ: usize = if cfg!(test) { 3 } else { 16 };
const BYTES_PER_READ: usize = 128 << 10;
/// How many bytes of readings a pass holds, about; buffers that grow take up to twice as much. Twice as many where it goes in larger steps.
const PASS_BYTES_MAX: usize = if cfg!(test) { 8 << 10 } else { 16 << 20 };
/// Of how many sensors the chunks are looked up at once.
const SENSORS_PER_STEP: usize = if cfg!(test) { 2 } else { 1_024 };
/// How many readings are put in order at once, or decoded and encoded, those of the chunks that are written anew among them; about, as
/// those of one sensor are put in order together.
const READINGS_PER_PIECE: usize = if cfg!(test) { 100 } else { 16 << 10 };
/// What one transaction writes at the most, about, so that ingest does not wait for long; it may end sooner, by
/// [`Haste::chunks_per_transaction`]. A part is not divided.
const BYTES_PER_TRANSACTION: usize = 256 << 10;

/// See the [module](self).
pub struct Merger {
    store: Store,
    registry: Registry,
    pub(super) metrics: HistoryMetrics,
}

/// Chunks that wait for their transaction.
#[derive(Default)]
struct Writes {
    gone: Vec<i64>,
    new: Vec<NewChunk>,
    bytes: usize,
}

impl Writes {
    fn is_full(&self, haste: Haste) -> bool {
        self.bytes >= BYTES_PER_TRANSACTION * haste.at_once || self.new.len() + self.gone.len() >= haste.chunks_per_transaction
    }
}

/// What goes in the place of some chunks of a sensor.
struct Work {
    sensor_key: i64,
    kind: ValueKind,
    /// The chunks.
    old: Vec<i64>,
    new: Series,
    /// Of the chunks and the new ones together, about: those of a chunk of long texts count as what a chunk may have.
    readings: usize,
}

/// What a pass has merged.
#[derive(Debug, PartialEq, Eq)]
pub struct Merged {
    /// Behind which position.
    pub after: Position,
    /// Up to which position.
    pub through: Position,
    /// The rows, in order.
    pub rows: Vec<LogSize>,
}

impl Merger {
    /// Merges what `store` holds.
    pub fn new(store: Store, registry: Registry, metrics: &Metrics) -> Self {
        Self { store, registry, metrics: HistoryMetrics::new(metrics) }
    }

    /// Does a pass; `None` when there was nothing to merge.
    pub async fn pass(&self, haste: impl Fn() -> Haste) -> Result<Option<Merged>, StoreError> {
        let began = Instant::now();
        let merged = self.store.merged_position().await?;
        let (mut gather, through) = self.gather(merged, &haste).await?;
        if through == merged {
            return Ok(None);
        }
        let rows = std::mem::take(&mut gather.rows);
        let mut sensors = gather.into_sensors().into_iter().peekable();
        let mut writes = Writes::default();
        let mut readings = 0;
        while sensors.peek().is_some() {
            let began = Instant::now();
            let mut works = self.plan(take_step(&mut sensors, haste())).await?.into_iter().peekable();
            haste().rest_from_piece(began).await;
            while works.peek().is_some() {
                let began = Instant::now();
                let part = take_part(&mut works, haste());
                readings += part.iter().map(|work| work.new.len() as u64).sum::<u64>();
                self.place(part, &mut writes).await?;
                haste().rest_from_piece(began).await;
                if writes.is_full(haste()) {
                    self.write(std::mem::take(&mut writes), None, haste()).await?;
                }
            }
        }
        self.write(writes, Some(through), haste()).await?;
        self.metrics.merged_readings.increment(readings);
        self.metrics.merge_seconds.record(began.elapsed());
        Ok(Some(Merged { after: merged, through, rows }))
    }

    /// Reads the log behind `merged`, and how far.
    async fn gather(&self, merged: Position, haste: impl Fn() -> Haste) -> Result<(Gather, Position), StoreError> {
        let (mut gather, mut through, mut rows_max) = (Gather::default(), merged, ROWS_OF_FIRST_READ);
        while gather.bytes() < pass_bytes_max(haste()) {
            let began = Instant::now();
            let bytes_max = BYTES_PER_READ * haste().at_once;
            let rows = self.store.read_log(through, rows_max, bytes_max).await?;
            let Some(last) = rows.last() else { break };
            through = last.position;
            // The database reads ahead; so it is not asked for what would be thrown away.
            let bytes: usize = rows.iter().map(|row| row.batch.len()).sum();
            rows_max = (rows.len() * bytes_max / bytes.max(1)).clamp(1, ROWS_PER_READ);
            for row in &rows {
                if !gather.knows(row.device) {
                    gather.introduce(row.device, self.registry.by_key(row.device).await?);
                }
            }
            gather.add(rows)?;
            for device in gather.unknown() {
                device.learn(self.store.sensors(device.key).await?);
            }
            gather.add_unknown()?;
            haste().rest_from_piece(began).await;
        }
        Ok((gather, through))
    }

    /// Finds out in the place of which chunks the new readings of some sensors go.
    async fn plan(&self, sensors: Vec<Gathered>) -> Result<Vec<Work>, StoreError> {
        let sensors: Vec<Gathered> = sensors
            .into_iter()
            .filter(|gathered| !gathered.readings.is_empty())
            .map(|gathered| Gathered { readings: gathered.readings.sorted(), ..gathered })
            .collect();
        let extents: Vec<Extent> = sensors.iter().map(extent).collect();
        let mut spans = self.store.chunks_around(&extents).await?;
        spans.sort_unstable_by_key(|span| (span.sensor_key, span.last_time));
        let mut works = Vec::with_capacity(sensors.len());
        for Gathered { sensor_key, kind, readings } in sensors {
            let around = &spans[of_sensor(&spans, sensor_key)];
            for rewrite in plan::plan(&readings.times, around) {
                let replaced = &around[rewrite.chunks];
                let in_them: usize = replaced.iter().map(|span| weight(span, kind)).sum();
                works.push(Work {
                    sensor_key,
                    kind,
                    old: replaced.iter().map(|span| span.key).collect(),
                    readings: in_them + rewrite.rows.len(),
                    new: readings.slice(rewrite.rows),
                });
            }
        }
        Ok(works)
    }

    /// Makes the chunks of some works.
    async fn place(&self, works: Vec<Work>, writes: &mut Writes) -> Result<(), StoreError> {
        let gone: Vec<i64> = works.iter().flat_map(|work| &work.old).copied().collect();
        let old = if gone.is_empty() { Vec::new() } else { self.store.chunks(&gone).await? };
        writes.gone.extend(gone);
        let old: HashMap<i64, Chunk> = old.into_iter().collect();
        for work in works {
            let new = work.chunks(&old)?;
            writes.bytes += new.iter().map(|new| new.chunk.stored_bytes()).sum::<usize>();
            writes.new.extend(new);
        }
        Ok(())
    }

    async fn write(&self, Writes { gone, new, .. }: Writes, merged: Option<Position>, haste: Haste) -> Result<(), StoreError> {
        let written = new.len() as u64;
        haste
            .write(&self.store, move |tx| {
                Box::pin(async move {
                    tx.replace_chunks(&gone, &new).await?;
                    match merged {
                        Some(merged) => tx.set_merged(merged).await,
                        None => Ok(()),
                    }
                })
            })
            .await?;
        self.metrics.chunks_written.increment(written);
        Ok(())
    }
}

/// The more readings are in a pass, the more share what a chunk costs.
fn pass_bytes_max(haste: Haste) -> usize {
    if haste.at_once > 1 { 2 * PASS_BYTES_MAX } else { PASS_BYTES_MAX }
}

fn extent(gathered: &Gathered) -> Extent {
    let times = &gathered.readings.times;
    Extent { sensor_key: gathered.sensor_key, first_time: times[0], last_time: times[times.len() - 1] }
}

/// As how many readings those of a chunk count that is written anew: long texts are few.
fn weight(span: &ChunkSpan, kind: ValueKind) -> usize {
    if span.complete && kind == ValueKind::Text { READINGS_MAX } else { span.readings }
}

/// Where a sensor's spans are, among those sorted by sensor.
fn of_sensor(spans: &[ChunkSpan], sensor_key: i64) -> Range<usize> {
    spans.partition_point(|span| span.sensor_key < sensor_key)..spans.partition_point(|span| span.sensor_key <= sensor_key)
}

/// The next sensors: as many as have [`READINGS_PER_PIECE`] times [`Haste::at_once`], but at least one, and no more than are looked up at once.
fn take_step(sensors: &mut Peekable<impl Iterator<Item = Gathered>>, haste: Haste) -> Vec<Gathered> {
    let (mut step, mut readings) = (Vec::new(), 0);
    while let Some(gathered) = sensors.next_if(|_| readings < READINGS_PER_PIECE * haste.at_once && step.len() < SENSORS_PER_STEP) {
        readings += gathered.readings.len();
        step.push(gathered);
    }
    step
}

/// The next works: as many as have [`READINGS_PER_PIECE`] times [`Haste::at_once`], but at least one, and no more than one transaction is to write.
fn take_part(works: &mut Peekable<impl Iterator<Item = Work>>, haste: Haste) -> Vec<Work> {
    let (mut part, mut readings, mut chunks) = (Vec::new(), 0, 0);
    while let Some(work) = works.next_if(|_| readings < READINGS_PER_PIECE * haste.at_once && chunks < haste.chunks_per_transaction) {
        readings += work.readings;
        chunks += work.old.len() + 1;
        part.push(work);
    }
    part
}

impl Work {
    /// What is written, with the chunks that it replaces among `old`.
    fn chunks(self, old: &HashMap<i64, Chunk>) -> Result<Vec<NewChunk>, StoreError> {
        let Self { sensor_key, kind, new, .. } = self;
        let mut readings = Series::new(kind);
        for chunk in self.old.iter().filter_map(|key| old.get(key)) {
            readings.append(decoded(chunk, kind, sensor_key)?);
        }
        readings.append(new);
        let readings = readings.sorted();
        Ok(split(&readings).into_iter().map(|rows| new_chunk(sensor_key, &readings.slice(rows))).collect())
    }
}

fn new_chunk(sensor_key: i64, readings: &Series) -> NewChunk {
    let chunk =
        Chunk { clock_corrections: corrections::encode(&readings.clock_corrections), ..Chunk::encode(&readings.times, &readings.values) };
    NewChunk { sensor_key, complete: chunk.readings >= READINGS_COMPLETE || chunk.points.len() >= BYTES_COMPLETE, chunk }
}

/// The readings of a chunk.
pub(super) fn decoded(chunk: &Chunk, kind: ValueKind, sensor_key: i64) -> Result<Series, StoreError> {
    let damaged = || StoreError::Damaged(format!("the chunk of sensor {sensor_key} that begins at {} cannot be read", chunk.first_time));
    let readings = chunk.decode(kind).map(Series::from).ok_or_else(damaged)?;
    match &chunk.clock_corrections {
        None => Ok(readings),
        Some(runs) => Ok(Series { clock_corrections: corrections::decode(runs, readings.len()).ok_or_else(damaged)?, ..readings }),
    }
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
