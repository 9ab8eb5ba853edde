//! What a pass has read of the log, by sensor.

use super::series::Series;
use crate::{
    fleet::Device,
    model::{
        ValueKind,
        batch::{DecodedColumn, decode_stored},
    },
    store::{DeviceKey, LogRow, StoreError},
};
use std::{collections::HashMap, sync::Arc};

/// See the [module](self).
#[derive(Default)]
pub struct Gather {
    devices: HashMap<DeviceKey, GatheredDevice>,
    sensors: Vec<Gathered>,
    /// Columns of sensors that the registry did not know: another gateway may have registered them, or they are gone.
    unknown: Vec<(DeviceKey, DecodedColumn)>,
    bytes: usize,
}

struct GatheredDevice {
    // None: it was deleted.
    device: Option<Arc<Device>>,
    sensors: HashMap<String, usize>,
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

impl Gather {
    /// How much memory the readings take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether rows of this device can be added.
    pub fn knows(&self, key: DeviceKey) -> bool {
        self.devices.contains_key(&key)
    }

    /// Makes a device known; `None` when it was deleted.
    pub fn introduce(&mut self, key: DeviceKey, device: Option<Arc<Device>>) {
        self.devices.insert(key, GatheredDevice { device, sensors: HashMap::new() });
    }

    /// Takes the readings of rows of known devices.
    pub fn add(&mut self, rows: Vec<LogRow>) -> Result<(), StoreError> {
        for LogRow { position, device, batch, .. } in rows {
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

    /// The devices of which sensors are unknown.
    pub fn unknown(&self) -> Vec<Arc<Device>> {
        let mut keys: Vec<DeviceKey> = self.unknown.iter().map(|(key, _)| *key).collect();
        keys.dedup();
        keys.iter().filter_map(|key| self.devices.get(key)?.device.clone()).collect()
    }

    /// Takes the readings of sensors that have become known, and leaves out the others: they are gone with their device.
    pub fn add_unknown(&mut self) -> Result<(), StoreError> {
        for (device, column) in std::mem::take(&mut self.unknown) {
            self.take(device, column)?;
        }
        Ok(())
    }

    /// Takes a column, or gives it back when its sensor is not known.
    fn take(&mut self, key: DeviceKey, column: DecodedColumn) -> Result<Option<DecodedColumn>, StoreError> {
        let Some(GatheredDevice { device: Some(device), sensors }) = self.devices.get_mut(&key) else { return Ok(None) };
        let index = match sensors.get(&column.sensor) {
            Some(index) => *index,
            None => {
                let Some(sensor) = device.sensor(&column.sensor) else { return Ok(Some(column)) };
                self.sensors.push(Gathered { sensor_key: sensor.key, kind: sensor.kind, readings: Series::new(sensor.kind) });
                sensors.insert(sensor.name, self.sensors.len() - 1);
                self.sensors.len() - 1
            }
        };
        let readings = Series { times: column.times, values: column.values };
        self.bytes += readings.memory_bytes();
        if self.sensors[index].readings.append(readings) {
            return Ok(None);
        }
        Err(StoreError::Damaged(format!("two kinds of values in sensor {:?} of device {}", column.sensor, device.id)))
    }

    /// All readings, in the order of sensors: their chunks are written to neighbouring places.
    pub fn into_sensors(mut self) -> Vec<Gathered> {
        self.sensors.sort_unstable_by_key(|gathered| gathered.sensor_key);
        self.sensors.into_iter().map(|gathered| Gathered { readings: gathered.readings.sorted(), ..gathered }).collect()
    }
}
