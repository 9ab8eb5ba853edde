//! A query: one device's readings of a span of time, sensor by sensor, in the order of time.
//!
//! What is not merged yet is read first, and kept; then the chunks, a few at a time as the answer is taken. So what is merged in
//! between is seen at least once, and what is seen twice is one reading of one time all the same. No transaction stays open for
//! a client that takes its time.
//!
//! How much is not merged is not known before it is read. So a query begins with little room, and when that does not do it drops
//! what it has and asks for more: what waits for room holds nothing, and so no two wait for each other.

use super::{
    buckets::{Bucket, Buckets},
    chunk::READINGS_MAX,
    merger::decoded,
    series::Series,
    slow::{DatabaseTime, SlowQueries},
};
use crate::{
    config,
    error::{Error, Failure},
    fleet::Device,
    model::{
        DeviceId, Timestamp,
        batch::{DecodedColumn, decode_stored},
        scan::{self, Unusual},
    },
    store::{LogRow, SensorRow, Store, StoreError},
};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

/// How long a query waits for others to end: less than a client's patience and a stop's grace.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// How much of what is not merged a query may hold that asks for no room: for most that does.
const OWN_BYTES: usize = 256 << 10;
/// How many times as much room a query asks for when what it had does not do.
const ROOM_FACTOR: usize = 4;
/// How much of what is not merged is read, and then decoded, at once: about, as no batch is cut.
const UNMERGED_PAGE_BYTES: usize = 128 << 10;
/// How many chunks are in memory at once: a few tens of thousands of readings.
const CHUNKS_PER_READ: usize = 4;
/// How many readings that are not merged go into one piece at the most: a chunk of them. Each answer that is not read holds one piece.
const UNMERGED_PER_READ: usize = READINGS_MAX;
/// How many spans come together in one piece.
const BUCKETS_PER_PIECE: usize = 8_192;

/// What to read.
#[derive(Debug, Clone)]
pub struct Query {
    /// Of these sensors; empty: of all.
    pub sensors: HashSet<String>,
    /// The first time.
    pub start_time: Timestamp,
    /// The time before which to stop; `None`: to the end.
    pub end_time: Option<Timestamp>,
    /// The length of the spans to aggregate over; `None`: the readings themselves.
    pub bucket: Option<Duration>,
}

impl Query {
    fn wants_sensor(&self, name: &str) -> bool {
        self.sensors.is_empty() || self.sensors.contains(name)
    }

    fn end_micros(&self) -> i64 {
        self.end_time.map_or(i64::MAX, Timestamp::micros)
    }
}

/// Who answers queries. Cheap to clone.
#[derive(Clone)]
pub struct Reader {
    store: Store,
    limits: config::Query,
    places: Arc<Semaphore>,
    // Bytes of `query.memory_bytes_max`.
    memory: Arc<Semaphore>,
    // One of those that need more than their own: what they read is much to decode, and what comes in has its share of the processors.
    turn: Arc<Semaphore>,
    slow: SlowQueries,
}

/// Some of an answer: of one sensor, behind what was given before.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// Readings.
    Readings(SensorRow, Series),
    /// Aggregated readings.
    Buckets(SensorRow, Vec<Bucket>),
}

/// The answer to a query, read as it is taken: by sensor, in the order of names.
pub struct Answer {
    store: Store,
    query: Query,
    sensors: std::vec::IntoIter<SensorRow>,
    unmerged: HashMap<String, Series>,
    current: Option<Current>,
    readings: u64,
    database: DatabaseTime,
    permits: Permits,
    // Of the sensor whose last piece was given.
    given: Option<OwnedSemaphorePermit>,
}

/// What a query has while it is worked on.
struct Permits {
    _place: OwnedSemaphorePermit,
    // None: it holds so little that it needs none.
    memory: Option<OwnedSemaphorePermit>,
    turn: Option<OwnedSemaphorePermit>,
}

impl Permits {
    /// Takes out what stands for some bytes, to be given back when they are.
    fn split_memory(&mut self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let memory = self.memory.as_mut()?;
        memory.split(bytes.min(memory.num_permits()))
    }

    /// Gives back all but what stands for some bytes that stay in memory.
    fn keep_memory(&mut self, bytes: usize) {
        self.memory = self.split_memory(bytes);
        self.turn = None;
    }
}

/// The sensor that is being read.
struct Current {
    sensor: SensorRow,
    // All before this time was given.
    from: i64,
    unmerged: Series,
    memory: Option<OwnedSemaphorePermit>,
    // How many of these were given.
    taken: usize,
    buckets: Option<Buckets>,
}

impl Reader {
    /// Reads from `store`, within the limits of the settings. For which the database works for longer than `slow` is logged; 0: none.
    pub fn new(store: Store, limits: &config::Query, slow: Duration) -> Self {
        let (places, memory) = (Arc::new(Semaphore::new(limits.concurrent_max)), Arc::new(Semaphore::new(limits.memory_bytes_max)));
        Self { store, limits: limits.clone(), places, memory, turn: Arc::new(Semaphore::new(1)), slow: SlowQueries::new(slow) }
    }

    /// The same, for answers of which each may hold a quarter of what all may together.
    pub fn sparing(&self) -> Self {
        let bytes_max = self.limits.bytes_max.min(self.limits.memory_bytes_max / 4);
        Self { limits: config::Query { bytes_max, ..self.limits.clone() }, ..self.clone() }
    }

    /// Begins to answer a query from all that is stored. Waits for a while when there are as many answers as there may be, or
    /// they hold as much as they may.
    pub async fn read(&self, device: &Device, query: Query) -> Result<Answer, Failure> {
        let until = Instant::now() + WAIT_MAX;
        let overloaded = |setting, limit| Error::Overloaded { setting, limit };
        let place = taken(&self.places, 1, until, overloaded("query.concurrent_max", self.limits.concurrent_max)).await?;
        let mut database = self.slow.begin(&device.id);
        let mut permits = Permits { _place: place, memory: None, turn: None };
        let mut room = OWN_BYTES.min(self.limits.bytes_max);
        let overlay = loop {
            let found;
            (found, permits) = self.read_unmerged(device, &query, room, &mut database, permits).await?;
            match found {
                Found::All(overlay) => break overlay,
                Found::Much => {
                    let refusal = overloaded("query.concurrent_max", self.limits.concurrent_max);
                    permits.turn = Some(taken(&self.turn, 1, until, refusal).await?);
                    continue;
                }
                Found::TooMuch if room == self.limits.bytes_max => {
                    return Err(Error::QueryTooLarge { setting: "query.bytes_max", limit: room }.into());
                }
                Found::TooMuch => {}
            }
            permits.keep_memory(0);
            room = room.saturating_mul(ROOM_FACTOR).min(self.limits.bytes_max);
            // One that is larger than all of it takes all of it, and is alone.
            let (bytes, limit) = (room.min(self.limits.memory_bytes_max), self.limits.memory_bytes_max);
            let refusal = || overloaded("query.memory_bytes_max", limit);
            permits.memory = Some(taken(&self.memory, bytes, until, refusal()).await?);
            permits.turn = Some(taken(&self.turn, 1, until, refusal()).await?);
        };
        permits.keep_memory(overlay.bytes);
        // After the log: whatever it has is registered.
        let mut sensors = database.of(self.store.sensors(device.key)).await?;
        sensors.retain(|sensor| query.wants_sensor(&sensor.name));
        sensors.sort_by(|a, b| a.name.cmp(&b.name));
        let (store, sensors, unmerged) = (self.store.clone(), sensors.into_iter(), overlay.sensors);
        Ok(Answer { store, query, sensors, unmerged, current: None, readings: 0, database, permits, given: None })
    }

    /// What of a query is not merged.
    ///
    /// The permits go along: when the caller goes away, all this is in memory until the work on it ends.
    async fn read_unmerged(
        &self,
        device: &Device,
        query: &Query,
        room: usize,
        database: &mut DatabaseTime,
        permits: Permits,
    ) -> Result<(Found, Permits), Failure> {
        let mut overlay = Overlay {
            device: device.id.clone(),
            query: query.clone(),
            readings_max: self.limits.readings_max,
            room,
            sensors: HashMap::new(),
            readings: 0,
            bytes: 0,
            times: Vec::new(),
        };
        // All as of one moment: else a later reading of the same time could be merged in between, and the earlier one be preferred to it.
        let mut unmerged = self.store.read_unmerged(device.key, query.start_time, query.end_time);
        let mut bytes_read = 0;
        loop {
            let rows = database.of(unmerged.next_page(UNMERGED_PAGE_BYTES)).await?;
            if rows.is_empty() {
                break;
            }
            bytes_read += rows.iter().map(|row| row.batch.len()).sum::<usize>();
            if permits.turn.is_none() && bytes_read > OWN_BYTES {
                return Ok((Found::Much, permits));
            }
            // Decoded here, and not on threads that come and go: what those allocate and others free the allocator keeps for them, which
            // came to ten times what queries held.
            if !overlay.add(rows)? {
                return Ok((Found::TooMuch, permits));
            }
            tokio::task::yield_now().await;
        }
        if overlay.sensors.values().all(Series::is_sorted) {
            return Ok((Found::All(Box::new(overlay)), permits));
        }
        aside(move || {
            overlay.sensors.values_mut().for_each(|series| *series = std::mem::replace(series, Series::new(series.values.kind())).sorted());
            Ok((Found::All(Box::new(overlay)), permits))
        })
        .await
    }
}

/// Takes permits as soon as there are so many; `otherwise` when there are not by then.
async fn taken(from: &Arc<Semaphore>, count: usize, until: Instant, otherwise: Error) -> Result<OwnedSemaphorePermit, Error> {
    let count = u32::try_from(count).map_err(|_| Error::Internal)?;
    match timeout_at(until, from.clone().acquire_many_owned(count)).await {
        Ok(permits) => permits.map_err(|_| Error::Draining),
        Err(_) => Err(otherwise),
    }
}

/// Runs what takes a while on a thread that nobody else waits for.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Internal)?
}

/// What came of reading what is not merged.
enum Found {
    /// All of it.
    All(Box<Overlay>),
    /// So much of the log to go through, however little of it is asked for, that one query at a time does it.
    Much,
    /// More readings than there is room for.
    TooMuch,
}

/// What of the log is not merged, by sensor.
struct Overlay {
    device: DeviceId,
    query: Query,
    readings_max: usize,
    // How many bytes it may take.
    room: usize,
    sensors: HashMap<String, Series>,
    readings: usize,
    bytes: usize,
    // Of the frame at hand; kept for its memory.
    times: Vec<i64>,
}

impl Overlay {
    /// Takes the readings that are asked for; whether there was room for them.
    fn add(&mut self, rows: Vec<LogRow>) -> Result<bool, Failure> {
        for row in rows {
            let before = (self.readings, self.bytes);
            let taken = self.add_in_place(&row.batch);
            if taken.is_ok() {
                self.check_count()?;
                if self.bytes > self.room {
                    return Ok(false);
                }
                continue;
            }
            // What was taken before the reader gave up comes twice then; of one time the last is kept, which is the same.
            (self.readings, self.bytes) = before;
            let columns = decode_stored(row.batch, |sensor| self.query.wants_sensor(sensor))
                .map_err(|why| StoreError::Damaged(format!("the batch at position {} of device {}: {why}", row.position.0, self.device)))?;
            for column in columns {
                self.add_column(column)?;
                if self.bytes > self.room {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Takes the readings of a batch from its bytes, as far as there is room; if it is written as usual, and of no frame only some of the
    /// times are asked for.
    fn add_in_place(&mut self, batch: &[u8]) -> Result<(), Unusual> {
        let wanted = self.query.start_time.micros()..self.query.end_micros();
        // Looked at as a whole first, so that nothing is taken that the caller takes anew.
        for frame in scan::frames(batch) {
            let frame = frame?;
            let times = frame.sum_up_times()?;
            if wanted.contains(&times.first) != wanted.contains(&times.last) || (times.first < wanted.start && times.last >= wanted.end) {
                return Err(Unusual);
            }
            frame.columns().try_for_each(|column| column.map(drop))?;
        }
        for frame in scan::frames(batch) {
            let frame = frame?;
            self.times.clear();
            for time in frame.times() {
                self.times.push(time?);
            }
            if !self.times.iter().all(|time| wanted.contains(time)) {
                continue;
            }
            for column in frame.columns() {
                let column = column?;
                let sensor = std::str::from_utf8(column.sensor).map_err(|_| Unusual)?;
                if !self.query.wants_sensor(sensor) {
                    continue;
                }
                let series = match self.sensors.get_mut(sensor) {
                    Some(series) => series,
                    None => self.sensors.entry(sensor.to_owned()).or_insert(Series::new(column.values.kind)),
                };
                self.bytes += series.append_encoded(&self.times, frame.clock_correction, &column.values)?;
                self.readings += self.times.len();
                if self.bytes > self.room {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn check_count(&self) -> Result<(), Error> {
        if self.readings > self.readings_max {
            return Err(Error::QueryTooLarge { setting: "query.readings_max", limit: self.readings_max });
        }
        Ok(())
    }

    fn add_column(&mut self, column: DecodedColumn) -> Result<(), Failure> {
        if !column.is_whole() {
            return Err(StoreError::Damaged(format!("not as many values as times in a batch of device {}", self.device)).into());
        }
        let DecodedColumn { sensor, times, clock_correction, values } = column;
        let (start, end) = (self.query.start_time.micros(), self.query.end_micros());
        let wanted = |time: &i64| (start..end).contains(time);
        let all = Series::from((times, values));
        let series = match all.times.iter().all(wanted) {
            true => all,
            false => {
                let rows: Vec<usize> = (0..all.len()).filter(|&row| wanted(&all.times[row])).collect();
                all.select(&rows)
            }
        }
        .corrected_by(clock_correction);
        self.readings += series.len();
        self.bytes += series.memory_bytes();
        self.check_count()?;
        let kind = series.values.kind();
        if self.sensors.entry(sensor).or_insert_with(|| Series::new(kind)).append(series) {
            return Ok(());
        }
        Err(StoreError::Damaged(format!("two kinds of values in one sensor of device {}", self.device)).into())
    }
}

impl Answer {
    /// How many readings were given, or went into what was.
    pub fn readings(&self) -> u64 {
        self.readings
    }

    /// The next piece; never empty. `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Piece>, Failure> {
        // Who asks for the next piece no longer has the last one.
        self.given = None;
        loop {
            let Some(mut current) = self.current.take() else {
                let Some(sensor) = self.sensors.next() else { return Ok(None) };
                let unmerged = self.unmerged.remove(&sensor.name).unwrap_or_else(|| Series::new(sensor.kind));
                let buckets = self.query.bucket.map(Buckets::new);
                let memory = self.permits.split_memory(unmerged.memory_bytes());
                let from = self.query.start_time.micros();
                self.current = Some(Current { sensor, from, unmerged, memory, taken: 0, buckets });
                continue;
            };
            let (readings, more) = current.read(&self.store, &mut self.database, self.query.end_micros()).await?;
            self.readings += readings.len() as u64;
            let piece = current.piece(readings, more);
            if more {
                self.current = Some(current);
            } else {
                self.given = current.memory;
            }
            if piece.is_some() {
                return Ok(piece);
            }
        }
    }
}

impl Current {
    /// The next readings, and whether there may be more.
    async fn read(&mut self, store: &Store, database: &mut DatabaseTime, end: i64) -> Result<(Series, bool), StoreError> {
        let chunks = database.of(store.read_chunks(self.sensor.key, self.from, end, CHUNKS_PER_READ)).await?;
        let mut more = chunks.len() == CHUNKS_PER_READ;
        let mut until = match chunks.last() {
            Some(last) if more => end.min(last.last_time + 1),
            _ => end,
        };
        if let Some(&time) = self.unmerged.times.get(self.taken + UNMERGED_PER_READ)
            && time < until
        {
            (until, more) = (time, true);
        }
        let mut readings = Series::new(self.sensor.kind);
        for chunk in &chunks {
            // From where the last read ended: the chunks may have become others since.
            readings.append(decoded(chunk, self.sensor.kind, self.sensor.key)?.between(self.from, until));
        }
        let due = self.taken..self.unmerged.times.partition_point(|&time| time < until);
        if !due.is_empty() {
            self.taken = due.end;
            // What the log says goes before what a chunk says.
            readings.append(self.unmerged.slice(due));
            readings = readings.sorted();
        }
        self.from = until;
        Ok((readings, more))
    }

    fn piece(&mut self, readings: Series, more: bool) -> Option<Piece> {
        let sensor = || self.sensor.clone();
        let Some(mut buckets) = self.buckets.take() else {
            return (!readings.is_empty()).then(|| Piece::Readings(sensor(), readings));
        };
        buckets.add(&readings);
        if !more {
            let rest = buckets.finish();
            return (!rest.is_empty()).then(|| Piece::Buckets(sensor(), rest));
        }
        let complete = buckets.take_complete(BUCKETS_PER_PIECE);
        let piece = complete.map(|complete| Piece::Buckets(sensor(), complete));
        self.buckets = Some(buckets);
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Position, columns::Values},
        pb,
        store::DeviceKey,
    };
    use prost::Message;

    /// Ten readings a frame, a second apart, of two sensors; the query asks for those of one from 1 s to 25 s, and for no more of them.
    #[test]
    fn of_a_batch_that_is_half_asked_for_each_reading_is_taken_and_counted_once() {
        let second = |second: i64| Timestamp::from_micros(second * 1_000_000).expect("in range");
        let frame = |begin: i64| {
            let column = |sensor: &str| pb::Column {
                sensor: sensor.into(),
                unit: String::new(),
                values: Some(Values::Int64((begin..begin + 10).collect()).into()),
            };
            let columns = vec![column("level"), column("flow")];
            pb::Frame { base_time_us: second(begin).micros(), time_deltas_us: vec![1_000_000; 9], columns, ..Default::default() }
        };
        let row = |frames: Vec<pb::Frame>| LogRow {
            position: Position(1),
            device: DeviceKey(1),
            receive_time: second(0),
            batches: 1,
            batch: pb::Batch { frames }.encode_to_vec().into(),
        };
        let query = Query { sensors: HashSet::from(["level".into()]), start_time: second(1), end_time: Some(second(25)), bucket: None };
        let device = DeviceId::parse("pump-1").expect("good");
        let mut overlay =
            Overlay { device, query, readings_max: 24, room: 24 * 16, sensors: HashMap::new(), readings: 0, bytes: 0, times: Vec::new() };
        let rows = vec![row(vec![frame(10), frame(0)]), row(vec![frame(30), frame(20)]), row(vec![frame(40)])];
        assert!(overlay.add(rows).expect("not too many"), "there is room for exactly these");
        let level = overlay.sensors.remove("level").expect("asked for").sorted();
        assert!(overlay.sensors.is_empty());
        assert_eq!(level.times, (1..25).map(|at| second(at).micros()).collect::<Vec<_>>());
        assert_eq!(level.values, Values::Int64((1..25).collect()));
        assert!(overlay.add(vec![row(vec![frame(11)])]).is_err(), "and for no more");
    }

    #[tokio::test]
    async fn who_waits_for_room_for_too_long_is_told_which_limit_it_is() {
        let memory = Arc::new(Semaphore::new(10));
        let refusal = || Error::Overloaded { setting: "query.memory_bytes_max", limit: 10 };
        let until = Instant::now();
        let held = taken(&memory, 8, until, refusal()).await.expect("free");
        let refused = taken(&memory, 3, until, refusal()).await.expect_err("held");
        assert!(matches!(refused, Error::Overloaded { setting: "query.memory_bytes_max", limit: 10 }));
        drop(held);
        assert_eq!(taken(&memory, 10, until, refusal()).await.expect("free, though it is late").num_permits(), 10);
    }
}
