//! A query: one device's readings of a span of time, sensor by sensor, in the order of time.

use crate::{
    config,
    error::{Error, Failure},
    fleet::Device,
    model::{
        DeviceId, Position, Timestamp,
        batch::{DecodedColumn, decode_stored},
        columns::Values,
    },
    store::{LogRow, Store, StoreError},
};
use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// How long a query waits for others to end: less than a client's patience and a stop's grace.
const WAIT_MAX: Duration = Duration::from_secs(10);
const ROWS_PER_READ: usize = 1_024;
const BYTES_PER_READ: usize = 4 << 20;

/// What to read.
#[derive(Debug, Clone)]
pub struct Query {
    /// Of these sensors; empty: of all.
    pub sensors: HashSet<String>,
    /// The first time.
    pub start_time: Timestamp,
    /// The time before which to stop; `None`: to the end.
    pub end_time: Option<Timestamp>,
}

impl Query {
    fn wants_sensor(&self, name: &str) -> bool {
        self.sensors.is_empty() || self.sensors.contains(name)
    }

    fn wants_time(&self, micros: i64) -> bool {
        micros >= self.start_time.micros() && self.end_time.is_none_or(|end| micros < end.micros())
    }
}

/// Who answers queries. Cheap to clone.
#[derive(Clone)]
pub struct Reader {
    store: Store,
    limits: config::Query,
    permits: Arc<Semaphore>,
}

/// The answer to a query.
#[derive(Debug)]
pub struct Answer {
    /// By sensor, in the order of names.
    pub sensors: BTreeMap<String, SensorReadings>,
    /// To be held for as long as anything of the answer is in memory: it bounds how many answers there are.
    pub permit: OwnedSemaphorePermit,
}

/// Readings of one sensor: in the order of time, one at a time.
#[derive(Debug, Clone, PartialEq)]
pub struct SensorReadings {
    /// Microseconds since the epoch.
    pub times: Vec<i64>,
    /// The values.
    pub values: Values,
}

impl Reader {
    /// Reads from `store`, within the limits of the settings.
    pub fn new(store: Store, limits: &config::Query) -> Self {
        Self { store, limits: limits.clone(), permits: Arc::new(Semaphore::new(limits.concurrent_max)) }
    }

    /// Answers a query from all that is stored when it begins. Waits for a while when there are as many answers as there may be.
    pub async fn read(&self, device: &Device, query: Query) -> Result<Answer, Failure> {
        let permit = match timeout(WAIT_MAX, self.permits.clone().acquire_owned()).await {
            Ok(permit) => permit.map_err(|_| Error::Draining)?,
            Err(_) => return Err(Error::Overloaded { setting: "query.concurrent_max", limit: self.limits.concurrent_max }.into()),
        };
        let (start_time, end_time) = (query.start_time, query.end_time);
        let (device, key) = (device.id.clone(), device.key);
        let mut gathered = Gathered { device, query, limits: self.limits.clone(), permit, sensors: BTreeMap::new(), readings: 0, bytes: 0 };
        let (mut after, mut more) = (Position(0), true);
        while more {
            let page = self.store.read_device_log(key, after, start_time, end_time, ROWS_PER_READ, BYTES_PER_READ).await?;
            after = page.rows.last().map_or(after, |row| row.position);
            more = page.more;
            gathered = aside(move || gathered.with(page.rows)).await?;
        }
        aside(move || Ok(gathered.into_answer())).await
    }
}

/// Runs what takes a while on a thread that nobody else waits for.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Internal)?
}

/// What has been read so far.
struct Gathered {
    device: DeviceId,
    query: Query,
    limits: config::Query,
    // Here, and not with who asked: when the caller goes away, this is in memory until the work on it ends.
    permit: OwnedSemaphorePermit,
    sensors: BTreeMap<String, SensorReadings>,
    readings: usize,
    bytes: usize,
}

impl Gathered {
    fn with(mut self, rows: Vec<LogRow>) -> Result<Self, Failure> {
        for row in rows {
            let columns = decode_stored(row.batch, |sensor| self.query.wants_sensor(sensor))
                .map_err(|why| StoreError::Damaged(format!("the batch at position {} of device {}: {why}", row.position.0, self.device)))?;
            for column in columns {
                self.add(column)?;
            }
        }
        Ok(self)
    }

    fn add(&mut self, column: DecodedColumn) -> Result<(), Failure> {
        let DecodedColumn { sensor, mut times, mut values } = column;
        if !times.iter().all(|&time| self.query.wants_time(time)) {
            let rows: Vec<usize> = (0..times.len()).filter(|&row| self.query.wants_time(times[row])).collect();
            values = values.select(&rows);
            times = rows.into_iter().map(|row| times[row]).collect();
        }
        if times.is_empty() {
            return Ok(());
        }
        self.readings += times.len();
        self.bytes += size_of_val(times.as_slice()) + values.memory_bytes();
        let limits =
            [("query.readings_max", self.readings, self.limits.readings_max), ("query.bytes_max", self.bytes, self.limits.bytes_max)];
        if let Some((setting, _, limit)) = limits.into_iter().find(|(_, found, limit)| found > limit) {
            return Err(Error::QueryTooLarge { setting, limit }.into());
        }
        let kind = values.kind();
        let found = self.sensors.entry(sensor).or_insert_with(|| SensorReadings { times: Vec::new(), values: Values::new(kind) });
        found.times.append(&mut times);
        if found.values.append(values) {
            return Ok(());
        }
        Err(StoreError::Damaged(format!("two kinds of values in one sensor of device {}", self.device)).into())
    }

    fn into_answer(self) -> Answer {
        let sensors = self.sensors.into_iter().map(|(name, found)| (name, found.sorted())).collect();
        Answer { sensors, permit: self.permit }
    }
}

impl SensorReadings {
    /// In the order of time; of several readings of one time the last, which is the one stored last.
    fn sorted(self) -> Self {
        if self.times.is_sorted_by(|a, b| a < b) {
            return self;
        }
        let mut order: Vec<usize> = (0..self.times.len()).collect();
        order.sort_by_key(|&row| self.times[row]); // stable: readings of one time stay in the order of storing
        let mut kept: Vec<usize> = Vec::with_capacity(order.len());
        for row in order {
            match kept.last_mut() {
                Some(last) if self.times[*last] == self.times[row] => *last = row,
                _ => kept.push(row),
            }
        }
        Self { times: kept.iter().map(|&row| self.times[row]).collect(), values: self.values.select(&kept) }
    }

    /// How many readings there are.
    pub fn len(&self) -> usize {
        self.times.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.times.is_empty()
    }

    /// What the readings of each span of `length` come to; spans begin at multiples of it since the epoch.
    pub fn buckets(&self, length: Duration) -> Vec<Bucket> {
        let length = i64::try_from(length.as_micros()).unwrap_or(i64::MAX).max(1);
        let mut buckets: Vec<Bucket> = Vec::new();
        for (row, &time) in self.times.iter().enumerate() {
            let start = time.div_euclid(length).saturating_mul(length);
            match buckets.last_mut() {
                Some(bucket) if bucket.start == start => bucket.add(self.number(row)),
                _ => buckets.push(Bucket::new(start, self.number(row))),
            }
        }
        buckets
    }

    /// The value of a row as a number: switches as 0 and 1; text has none.
    fn number(&self, row: usize) -> f64 {
        match &self.values {
            Values::Double(values) => values[row],
            Values::Int64(values) => values[row] as f64,
            Values::Bool(values) => f64::from(u8::from(values[row])),
            Values::Text(_) => f64::NAN,
        }
    }
}

/// What the readings of a span of time come to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bucket {
    /// Where the span begins: microseconds since the epoch.
    pub start: i64,
    /// How many readings there are.
    pub count: u64,
    /// The smallest value; NaN when there is none but NaN.
    pub minimum: f64,
    /// The largest value, as `minimum`.
    pub maximum: f64,
    /// The first value.
    pub first: f64,
    /// The last value.
    pub last: f64,
    // Of the values that are not NaN.
    sum: f64,
    numbers: u64,
}

impl Bucket {
    fn new(start: i64, value: f64) -> Self {
        let mut bucket = Self { start, count: 0, minimum: f64::NAN, maximum: f64::NAN, first: value, last: value, sum: 0.0, numbers: 0 };
        bucket.add(value);
        bucket
    }

    fn add(&mut self, value: f64) {
        self.count += 1;
        self.last = value;
        if !value.is_nan() {
            // f64::min and max take the other value where one is NaN.
            self.minimum = self.minimum.min(value);
            self.maximum = self.maximum.max(value);
            self.sum += value;
            self.numbers += 1;
        }
    }

    /// The arithmetic mean; NaN when there is no value but NaN.
    pub fn average(&self) -> f64 {
        if self.numbers == 0 { f64::NAN } else { self.sum / self.numbers as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readings(rows: &[(i64, f64)]) -> SensorReadings {
        SensorReadings { times: rows.iter().map(|row| row.0).collect(), values: Values::Double(rows.iter().map(|row| row.1).collect()) }
    }

    #[test]
    fn of_one_time_the_reading_stored_last_wins() {
        let sorted = readings(&[(3, 1.0), (1, 2.0), (3, 3.0), (2, 4.0), (1, 5.0)]).sorted();
        assert_eq!(sorted, readings(&[(1, 5.0), (2, 4.0), (3, 3.0)]));
    }

    #[test]
    fn buckets_begin_at_multiples_of_their_length_also_before_1970() {
        let buckets =
            readings(&[(-1, 1.0), (0, 2.0), (9, f64::NAN), (10, 6.0), (11, 4.0), (35, f64::NAN)]).buckets(Duration::from_micros(10));
        let shown: Vec<_> = buckets.iter().map(|b| (b.start, b.count, b.minimum, b.maximum, b.average(), b.first)).collect();
        assert_eq!(shown[..3], [(-10, 1, 1.0, 1.0, 1.0, 1.0), (0, 2, 2.0, 2.0, 2.0, 2.0), (10, 2, 4.0, 6.0, 5.0, 6.0)]);
        assert!(buckets[3].average().is_nan() && buckets[3].minimum.is_nan() && buckets[3].count == 1);
    }
}
