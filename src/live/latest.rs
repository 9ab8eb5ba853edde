//! The latest reading of each sensor, in memory; written to the store now and then, so that a start need not read the
//! whole log.

use crate::{
    fleet::{Device, Registry, Sensors},
    model::{
        DeviceId, LatestReading, LatestReadings, Position, Timestamp,
        batch::{decode_stored, latest_in_place},
        columns::{Value, Values},
        latest::place_of,
    },
    pb,
    store::{DeviceKey, LatestRow, LogRow, SensorRow, Store, StoreError},
};
use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

const ROWS_PER_READ: usize = 256;
const BYTES_PER_READ: usize = 4 << 20;
/// How many rows one transaction saves, so that ingest does not wait for long.
const ROWS_PER_SAVE: usize = 256;
/// How often what has changed is saved: so much of the log a start reads again, and what came in during a save.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);
/// How many times as long as a transaction took a save at an interval rests behind it, so that devices do not wait for one after the other.
const REST: u32 = 4;
/// How long it rests at the most, all in all: the save of a large fleet must end before too much else has come in.
const RESTS_MAX: Duration = Duration::from_millis(2_500);

/// See the [module](self).
///
/// The lock is taken for each group of batches, so whoever reads takes no more under it than shared pointers.
#[derive(Default)]
pub struct Latest {
    state: Mutex<State>,
    // All readings up to this position are in the store. Held while saving: of two savers the older could write a row last.
    saved: tokio::sync::Mutex<Position>,
}

#[derive(Default)]
struct State {
    position: Position,
    devices: HashMap<DeviceKey, DeviceLatest>,
}

/// What a committed entry of the log has for the latest values.
pub enum EntryLatest {
    /// These readings.
    Found(LatestReadings),
    /// What is to be found in its batches. All of their sensors are in the registry: a batch's are, before the batch is anywhere.
    In(Bytes),
}

/// The latest readings of a device as of one moment.
#[derive(Clone)]
pub struct DeviceLatest {
    /// The device, as the last batch that was added had it.
    pub device: Arc<Device>,
    // Of the last batch that was added.
    position: Position,
    // By sensor number. Copied by the next change while somebody reads it.
    readings: Arc<Vec<Reading>>,
}

#[derive(Clone)]
struct Reading {
    sensor_key: i64,
    time: Timestamp,
    // What was added to that.
    clock_correction: i64,
    value: Value,
    // Of the entry that it came with.
    position: Position,
}

impl Latest {
    /// What the store holds, brought up to the end of the log.
    pub async fn load(store: &Store, registry: &Registry) -> Result<Self, StoreError> {
        let latest = Self::default();
        let saved = latest.reload(store, registry).await?;
        *latest.saved.lock().await = saved;
        latest.catch_up(store, registry).await?;
        Ok(latest)
    }

    /// Takes over what is saved in the store, and says as of which position that is.
    pub async fn reload(&self, store: &Store, registry: &Registry) -> Result<Position, StoreError> {
        let (saved, rows) = store.latest().await?;
        for LatestRow { device, batch, .. } in rows {
            if let Some(device) = registry.by_key(device).await? {
                let (readings, _) = stored_readings(&device, batch)?;
                self.state.lock().add(&device, readings, saved);
            }
        }
        self.state.lock().position = saved;
        Ok(saved)
    }

    /// Takes over what the log holds behind the last batch that was added. Not while batches are being added.
    pub async fn catch_up(&self, store: &Store, registry: &Registry) -> Result<(), StoreError> {
        let mut behind = self.state.lock().position;
        loop {
            let rows = store.read_log(behind, ROWS_PER_READ, BYTES_PER_READ).await?;
            let Some(last) = rows.last() else { return Ok(()) };
            behind = last.position;
            for row in rows {
                if let Some(device) = registry.by_key(row.device).await? {
                    self.add_stored(store, &device, &row).await?;
                }
            }
            self.state.lock().position = behind;
        }
    }

    /// Takes over an entry of the log; positions must come in order.
    pub async fn add_stored(&self, store: &Store, device: &Arc<Device>, row: &LogRow) -> Result<(), StoreError> {
        let (mut readings, whole) = stored_readings(device, row.batch.clone())?;
        if !whole {
            // Another gateway has registered some sensors, or a commit of unknown outcome has.
            device.learn(store.sensors(device.key).await?);
            (readings, _) = stored_readings(device, row.batch.clone())?;
        }
        let mut state = self.state.lock();
        state.position = row.position;
        state.add(device, readings, row.position);
        Ok(())
    }

    /// Takes over committed entries, whose positions must come in order. The error is of batches that cannot be read; all others are
    /// taken over.
    pub fn add(&self, entries: impl IntoIterator<Item = (Position, Arc<Device>, EntryLatest)>) -> Result<(), StoreError> {
        let mut added = Ok(());
        // Before the lock, for which others wait.
        let mut found = |device: &Device, latest| match latest {
            EntryLatest::Found(latest) => latest.into(),
            EntryLatest::In(batch) => stored_readings(device, batch).map(|(latest, _)| latest).unwrap_or_else(|error| {
                added = Err(error);
                Vec::new()
            }),
        };
        let entries = entries.into_iter().map(|(position, device, latest)| (position, found(&device, latest), device));
        let entries: Vec<(Position, Vec<LatestReading>, Arc<Device>)> = entries.collect();
        let mut state = self.state.lock();
        for (position, latest, device) in entries {
            state.position = position;
            state.add(&device, latest, position);
        }
        added
    }

    /// The latest readings of the devices that are `wanted`, and the position that they are as of.
    pub fn snapshot(&self, wanted: impl Fn(&DeviceId) -> bool) -> (Position, Vec<DeviceLatest>) {
        self.state.lock().select(|latest| wanted(&latest.device.id))
    }

    /// Forgets a deleted device.
    pub fn forget(&self, device: DeviceKey) {
        self.state.lock().devices.remove(&device);
    }

    /// Writes what has changed to the store, as fast as it goes.
    ///
    /// The position goes with the last of the rows. When only some of the rows come to be written, they are ahead of the
    /// position, and a start reads what is in them from the log again; which comes to the same, as it is the latest all the same.
    pub async fn save(&self, store: &Store) -> Result<(), StoreError> {
        self.save_resting(store, Duration::ZERO).await
    }

    /// The same, with rests between the transactions, for so long at the most.
    async fn save_resting(&self, store: &Store, mut rests_max: Duration) -> Result<(), StoreError> {
        let mut saved = self.saved.lock().await;
        let behind = *saved;
        let (position, mut changed) = self.state.lock().select(|latest| latest.position > behind);
        // In the order of the table, as each transaction writes all pages that its rows are in.
        changed.sort_unstable_by_key(|latest| latest.device.key);
        let mut rows = changed.into_iter().flat_map(|latest| latest.rows(behind)).peekable();
        // Also when only old readings came in, which change nothing: the log may be pruned up to the position.
        let mut whole = position == behind;
        while !whole {
            let slice: Vec<LatestRow> = rows.by_ref().take(ROWS_PER_SAVE).collect();
            whole = rows.peek().is_none();
            let began = Instant::now();
            store.save_latest(&slice, whole.then_some(position)).await?;
            let rest = rests_max.min(began.elapsed() * REST);
            if !whole && !rest.is_zero() {
                rests_max -= rest;
                tokio::time::sleep(rest).await;
            }
        }
        *saved = position;
        Ok(())
    }

    /// Saves at each interval until `stop`.
    pub async fn run(self: Arc<Self>, store: Store, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(SAVE_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            // At the stop the last save does it all.
            let Some(saved) = stop.run_until_cancelled(self.save_resting(&store, RESTS_MAX)).await else { return };
            if let Err(error) = saved {
                tracing::warn!(error = &error as &dyn std::error::Error, "latest.save_failed: trying again at the next interval");
            }
        }
    }
}

impl State {
    fn select(&self, wanted: impl Fn(&DeviceLatest) -> bool) -> (Position, Vec<DeviceLatest>) {
        (self.position, self.devices.values().filter(|latest| wanted(latest)).cloned().collect())
    }

    fn add(&mut self, device: &Arc<Device>, latest: impl IntoIterator<Item = LatestReading>, position: Position) {
        // Looked at under the lock: what came in after `forget` would stay for good.
        if device.is_deleted() {
            return;
        }
        let new = || DeviceLatest { device: device.clone(), position, readings: Arc::default() };
        let found = self.devices.entry(device.key).or_insert_with(new);
        found.position = position;
        // After a failed commit the registry has another one, which knows all sensors of the batches that come by it.
        if !Arc::ptr_eq(&found.device, device) {
            found.device = device.clone();
        }
        let readings = Arc::make_mut(&mut found.readings);
        let mut next = 0;
        for LatestReading { sensor_key, time, clock_correction, value } in latest {
            let reading = Reading { sensor_key, time, clock_correction, value, position };
            let found = place_of(readings, |reading| reading.sensor_key, sensor_key, next);
            match found {
                Ok(index) if readings[index].time > time => {}
                Ok(index) => readings[index] = reading,
                Err(index) => readings.insert(index, reading),
            }
            next = found.unwrap_or_else(|index| index) + 1;
        }
    }
}

/// The latest reading of each column of a stored entry whose sensor is known, and whether all are.
fn stored_readings(device: &Device, batch: Bytes) -> Result<(Vec<LatestReading>, bool), StoreError> {
    let known = device.sensors();
    if let Some(latest) = latest_in_place(&batch, known.finder()) {
        return Ok((latest, true));
    }
    let columns = decode_stored(batch, |_| true).map_err(|why| StoreError::Damaged(format!("a batch of {}: {why}", device.id)))?;
    let whole = columns.iter().all(|column| known.get(&column.sensor).is_some());
    let readings = columns.into_iter().filter_map(|column| {
        let (time, value) = column.latest()?;
        let sensor_key = known.get(&column.sensor)?.key;
        Some(LatestReading { sensor_key, time, clock_correction: column.clock_correction, value })
    });
    Ok((readings.collect(), whole))
}

impl DeviceLatest {
    /// The readings of the sensors that are `wanted`, a frame for each time, in batches of about [`pb::MESSAGE_BYTES`] at the most.
    pub fn batches(&self, wanted: impl Fn(&str) -> bool) -> Vec<pb::Batch> {
        let known = self.device.sensors();
        let mut named: Vec<(&SensorRow, &Reading)> = self.named(&known).filter(|(sensor, _)| wanted(&sensor.name)).collect();
        named.sort_unstable_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        let (mut batches, mut frames, mut bytes) = (Vec::new(), BTreeMap::new(), 0);
        for (sensor, reading) in named {
            let frame = frames.entry((reading.time, reading.clock_correction)).or_insert_with(|| reading.frame());
            let column = reading.column(sensor);
            bytes += column.encoded_len();
            frame.columns.push(column);
            if bytes >= pb::MESSAGE_BYTES {
                batches.push(pb::Batch { frames: std::mem::take(&mut frames).into_values().collect() });
                bytes = 0;
            }
        }
        if !frames.is_empty() {
            batches.push(pb::Batch { frames: frames.into_values().collect() });
        }
        batches
    }

    /// The rows of the readings that came `behind` a position.
    fn rows(&self, behind: Position) -> Vec<LatestRow> {
        let known = self.device.sensors();
        let changed = self.named(&known).filter(|(_, reading)| reading.position > behind);
        let rows = changed.map(|(sensor, reading)| {
            let frame = pb::Frame { columns: vec![reading.column(sensor)], ..reading.frame() };
            let batch = pb::Batch { frames: vec![frame] }.encode_to_vec().into();
            LatestRow { sensor_key: reading.sensor_key, device: self.device.key, time: reading.time, batch, position: reading.position }
        });
        rows.collect()
    }

    fn named<'a>(&'a self, known: &'a Sensors) -> impl Iterator<Item = (&'a SensorRow, &'a Reading)> {
        self.readings.iter().filter_map(|reading| Some((known.by_key(reading.sensor_key)?, reading)))
    }
}

impl Reading {
    fn frame(&self) -> pb::Frame {
        pb::Frame { base_time_us: self.time.micros(), clock_correction_us: self.clock_correction, ..Default::default() }
    }

    fn column(&self, sensor: &SensorRow) -> pb::Column {
        let values: Values = self.value.clone().into();
        pb::Column { sensor: sensor.name.clone(), unit: sensor.unit.clone(), values: Some(values.into()) }
    }
}
