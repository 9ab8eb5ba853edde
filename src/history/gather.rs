//! What a pass has read of the log, by sensor.

use super::series::Series;
use crate::{
    fleet::{Device, Sensors, sensors::Cursor},
    model::{
        ValueKind,
        batch::{DecodedColumn, decode_stored},
        scan::{self, Unusual},
    },
    store::{DeviceKey, LogRow, LogSize, StoreError},
};
use std::{collections::HashMap, sync::Arc};

/// See the [module](self).
#[derive(Default)]
pub struct Gather {
    devices: HashMap<DeviceKey, GatheredDevice>,
    sensors: Vec<Gathered>,
    /// Columns of sensors that the registry did not know: another gateway may have registered them, or they are gone.
    unknown: Vec<(DeviceKey, DecodedColumn)>,
    // Of the frame at hand; kept for its memory.
    times: Vec<i64>,
    bytes: usize,
    /// The rows that were read.
    pub rows: Vec<LogSize>,
}

struct GatheredDevice {
    // None: it was deleted.
    device: Option<Arc<Device>>,
    sensors: Arc<Sensors>,
    /// Where the readings of each of `sensors` are gathered.
    places: Vec<Option<usize>>,
}

/// New readings of a sensor.
pub struct Gathered {
    /// The sensor's number.
    pub sensor_key: i64,
    /// The kind of its values.
    pub kind: ValueKind,
    /// The readings, as they came.
    pub readings: Series,
}

impl GatheredDevice {
    fn new(device: Option<Arc<Device>>) -> Self {
        let sensors = device.as_ref().map_or_else(Arc::default, |device| device.sensors());
        let places = vec![None; sensors.len()];
        Self { device, sensors, places }
    }

    /// Looks anew which sensors the device has. Those that it had are still there, maybe with other numbers.
    fn renew(&mut self) {
        let Some(device) = &self.device else { return };
        let sensors = device.sensors();
        let mut places = vec![None; sensors.len()];
        for (index, place) in self.places.iter().enumerate() {
            if let Some(now) = sensors.index(&self.sensors.at(index).name) {
                places[now] = *place;
            }
        }
        (self.sensors, self.places) = (sensors, places);
    }

    /// Where the readings of the sensor with this number among the device's are gathered.
    fn place(&mut self, index: usize, gathered: &mut Vec<Gathered>) -> usize {
        *self.places[index].get_or_insert_with(|| {
            let sensor = self.sensors.at(index);
            gathered.push(Gathered { sensor_key: sensor.key, kind: sensor.kind, readings: Series::new(sensor.kind) });
            gathered.len() - 1
        })
    }
}

impl Gather {
    /// How much memory the readings take, about.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether rows of this device can be added.
    pub fn knows(&self, key: DeviceKey) -> bool {
        self.devices.contains_key(&key)
    }

    /// Makes a device known; `None` when it was deleted.
    pub fn introduce(&mut self, key: DeviceKey, device: Option<Arc<Device>>) {
        self.devices.insert(key, GatheredDevice::new(device));
    }

    /// Takes the readings of rows of known devices.
    pub fn add(&mut self, rows: Vec<LogRow>) -> Result<(), StoreError> {
        for LogRow { position, device, receive_time, batch, .. } in rows {
            self.rows.push(LogSize { position, receive_time, bytes: batch.len() });
            // Columns that were taken before the reader gave up come twice then; of one time the last is kept, which is the same.
            if self.add_in_place(device, &batch).is_ok() {
                continue;
            }
            let columns = decode_stored(batch, |_| true)
                .map_err(|why| StoreError::Damaged(format!("the batch at position {}: {why}", position.0)))?;
            for column in columns {
                if let Some(column) = self.take(device, column)? {
                    self.unknown.push((device, column));
                }
            }
        }
        Ok(())
    }

    /// Takes the readings of a batch from its bytes, if it is written as usual and all its sensors are known.
    fn add_in_place(&mut self, key: DeviceKey, batch: &[u8]) -> Result<(), Unusual> {
        let Some(device) = self.devices.get_mut(&key).filter(|device| device.device.is_some()) else { return Ok(()) };
        let mut cursor = Cursor::default();
        for frame in scan::frames(batch) {
            let frame = frame?;
            self.times.clear();
            for time in frame.times() {
                self.times.push(time?);
            }
            for column in frame.columns() {
                let column = column?;
                let index = device.sensors.index_of(&column, &mut cursor).ok_or(Unusual)?;
                let place = device.place(index, &mut self.sensors);
                self.bytes += self.sensors[place].readings.append_encoded(&self.times, frame.clock_correction, &column.values)?;
            }
        }
        Ok(())
    }

    /// The devices of which sensors are unknown.
    pub fn unknown(&self) -> Vec<Arc<Device>> {
        let mut keys: Vec<DeviceKey> = self.unknown.iter().map(|(key, _)| *key).collect();
        keys.dedup();
        keys.iter().filter_map(|key| self.devices.get(key)?.device.clone()).collect()
    }

    /// Takes the readings of sensors that have become known, and leaves out the others: they are gone with their device.
    pub fn add_unknown(&mut self) -> Result<(), StoreError> {
        for (key, column) in std::mem::take(&mut self.unknown) {
            if let Some(known) = self.devices.get_mut(&key) {
                known.renew();
            }
            self.take(key, column)?;
        }
        Ok(())
    }

    /// Takes a column, or gives it back when its sensor is not known.
    fn take(&mut self, key: DeviceKey, column: DecodedColumn) -> Result<Option<DecodedColumn>, StoreError> {
        let Some(known) = self.devices.get_mut(&key) else { return Ok(None) };
        let Some(device) = known.device.clone() else { return Ok(None) };
        if !column.is_whole() {
            return Err(StoreError::Damaged(format!("not as many values as times in a batch of device {}", device.id)));
        }
        let Some(index) = known.sensors.index(&column.sensor) else { return Ok(Some(column)) };
        let place = known.place(index, &mut self.sensors);
        let readings = Series::from((column.times, column.values)).corrected_by(column.clock_correction);
        self.bytes += readings.memory_bytes();
        if self.sensors[place].readings.append(readings) {
            return Ok(None);
        }
        Err(StoreError::Damaged(format!("two kinds of values in sensor {:?} of device {}", column.sensor, device.id)))
    }

    /// All readings, as they came, in the order of sensors: their chunks are written to neighbouring places.
    pub fn into_sensors(mut self) -> Vec<Gathered> {
        self.sensors.sort_unstable_by_key(|gathered| gathered.sensor_key);
        self.sensors
    }
}
