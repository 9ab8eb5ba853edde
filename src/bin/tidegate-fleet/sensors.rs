//! What a simulated device measures: six sensors whose values follow from the seed, the device's number and the row alone.
//!
//! So a batch can be made again at any time to be compared with what was stored, and no reading has to be kept.

use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::f64::consts::TAU;
use tidegate::{
    client::{BatchBuilder, EncodedBatch},
    model::columns::Value,
};

/// The most readings in a row.
#[cfg(test)]
const ROW_READINGS_MAX: usize = 6;
/// A batch is sent no later than with the first row that is so long after its first.
const BATCH_SPAN_MAX_US: i64 = 5_000_000;
const DAY_S: f64 = 86_400.0;
const STATES: [&str; 4] = ["idle", "starting", "running", "fault"];

/// When a device samples, and how it batches.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    /// The time of the first row: microseconds since the epoch.
    pub start_us: i64,
    /// Between two rows.
    pub interval_us: i64,
    /// How many rows.
    pub rows: u64,
    /// The most readings in a batch.
    pub batch_readings_max: u64,
}

/// One reading.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    pub sensor: &'static str,
    pub unit: &'static str,
    pub time_us: i64,
    pub value: Value,
}

/// One device's sensors.
#[derive(Debug)]
struct Sensors {
    rng: SmallRng,
    climate_c: f64,
    swing_c: f64,
    /// Where in the day the run begins, for this device: 0 to 1.
    day_phase: f64,
    weather_c: f64,
    battery_v_per_hour: f64,
    state: usize,
    counter: i64,
    door_open: bool,
    /// A sensor that is out of order, and for how many more rows.
    missing: Option<(usize, u32)>,
}

impl Sensors {
    fn new(seed: u64, device: u32) -> Self {
        // Any mixing will do that keeps neighbouring devices apart.
        let mut rng = SmallRng::seed_from_u64(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(device));
        Self {
            climate_c: rng.random_range(8.0..26.0),
            swing_c: rng.random_range(2.0..9.0),
            day_phase: rng.random(),
            weather_c: 0.0,
            battery_v_per_hour: rng.random_range(0.001..0.05),
            state: rng.random_range(0..STATES.len()),
            counter: rng.random_range(0..1_000_000),
            door_open: false,
            missing: None,
            rng,
        }
    }

    /// The values of the row that is `elapsed_s` after the first.
    fn sample(&mut self, elapsed_s: f64) -> [(&'static str, &'static str, Option<Value>); 6] {
        let rng = &mut self.rng;
        self.weather_c = 0.999 * self.weather_c + rng.random_range(-0.05..0.05);
        let daily_c = self.swing_c * (TAU * (elapsed_s / DAY_S + self.day_phase)).sin();
        let warmer_c = daily_c + self.weather_c;
        let temperature = self.climate_c + warmer_c + rng.random_range(-0.1..0.1);
        let humidity = (58.0 - 2.5 * warmer_c + rng.random_range(-1.0..1.0)).clamp(0.0, 100.0);
        let battery = 4.15 - (self.battery_v_per_hour * elapsed_s / 3_600.0) % 0.75 + rng.random_range(-0.01..0.01);
        if rng.random_bool(0.01) {
            self.state = rng.random_range(0..STATES.len());
        }
        if STATES[self.state] == "running" {
            self.counter += rng.random_range(0..5);
        }
        if rng.random_bool(0.005) {
            self.door_open = !self.door_open;
        }
        self.missing = match self.missing {
            Some((_, 0)) => None,
            Some((sensor, rows)) => Some((sensor, rows - 1)),
            None if rng.random_bool(0.002) => Some((rng.random_range(0..6), rng.random_range(3..30))),
            None => None,
        };
        let mut row = [
            ("temperature", "Cel", Some(Value::Double(rounded(temperature)))),
            ("humidity", "%RH", Some(Value::Double(rounded(humidity)))),
            ("battery", "V", Some(Value::Double(rounded(battery)))),
            ("state", "", Some(Value::Text(STATES[self.state].to_owned()))),
            ("items", "count", Some(Value::Int64(self.counter))),
            ("door", "", Some(Value::Bool(self.door_open))),
        ];
        if let Some((sensor, _)) = self.missing {
            row[sensor].2 = None;
        }
        row
    }
}

/// To two decimals, as sensors give their values.
fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// A batch, and when it is complete.
#[derive(Debug)]
pub struct TimedBatch {
    pub batch: EncodedBatch,
    /// The time of its last reading: microseconds since the epoch.
    pub complete_us: i64,
}

/// The batches of one device, in their order; the same each time.
#[derive(Debug)]
pub struct Batches {
    sensors: Sensors,
    schedule: Schedule,
    next_row: u64,
    /// Readings that were sampled and are not in a batch yet, in reverse.
    waiting: Vec<Reading>,
    /// The batch that was given out last.
    readings: Vec<Reading>,
}

impl Batches {
    /// Device number `device` of the fleet with this seed.
    pub fn new(seed: u64, device: u32, schedule: Schedule) -> Self {
        Self { sensors: Sensors::new(seed, device), schedule, next_row: 0, waiting: Vec::new(), readings: Vec::new() }
    }

    /// The next batch's readings; empty behind the last.
    pub fn next_readings(&mut self) -> &[Reading] {
        self.readings.clear();
        while (self.readings.len() as u64) < self.schedule.batch_readings_max {
            if self.waiting.is_empty() {
                let next_us = self.row_time_us(self.next_row);
                let span_reached = self.readings.first().is_some_and(|first| next_us - first.time_us >= BATCH_SPAN_MAX_US);
                if self.next_row == self.schedule.rows || span_reached {
                    break;
                }
                self.sample(next_us);
            }
            self.readings.extend(self.waiting.pop());
        }
        &self.readings
    }

    /// The next batch.
    pub fn next_batch(&mut self) -> Option<TimedBatch> {
        let mut builder = BatchBuilder::new();
        for reading in self.next_readings() {
            builder.push(reading.sensor, reading.unit, reading.time_us, reading.value.clone());
        }
        let complete_us = self.readings.last()?.time_us;
        builder.finish().map(|batch| TimedBatch { batch, complete_us })
    }

    fn row_time_us(&self, row: u64) -> i64 {
        self.schedule.start_us + row as i64 * self.schedule.interval_us
    }

    fn sample(&mut self, time_us: i64) {
        let elapsed_s = (time_us - self.schedule.start_us) as f64 / 1e6;
        let row = self.sensors.sample(elapsed_s);
        let readings = row.into_iter().rev().filter_map(|(sensor, unit, value)| Some(Reading { sensor, unit, time_us, value: value? }));
        self.waiting.extend(readings);
        self.next_row += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn all(seed: u64, device: u32, schedule: Schedule) -> Vec<Vec<Reading>> {
        let mut batches = Batches::new(seed, device, schedule);
        std::iter::from_fn(|| Some(batches.next_readings().to_vec()).filter(|readings| !readings.is_empty())).collect()
    }

    const SCHEDULE: Schedule = Schedule { start_us: 1_000, interval_us: 1_000_000, rows: 2_000, batch_readings_max: 100 };

    #[test]
    fn a_seed_and_a_device_give_the_same_readings_each_time() {
        assert_eq!(all(7, 3, SCHEDULE), all(7, 3, SCHEDULE));
        assert_ne!(all(7, 3, SCHEDULE), all(7, 4, SCHEDULE));
        assert_ne!(all(7, 3, SCHEDULE), all(8, 3, SCHEDULE));
    }

    #[test]
    fn the_size_of_batches_does_not_change_the_readings() {
        let small = Schedule { batch_readings_max: 7, ..SCHEDULE };
        let batches = all(7, 3, small);
        assert!(batches.iter().all(|batch| batch.len() <= 7));
        assert_eq!(batches.concat(), all(7, 3, SCHEDULE).concat());
    }

    #[test]
    fn a_batch_ends_after_five_seconds_or_when_it_is_full() {
        assert!(all(1, 1, SCHEDULE)[0].len() <= 5 * ROW_READINGS_MAX);
        let fast = Schedule { interval_us: 1_000, ..SCHEDULE };
        assert_eq!(all(1, 1, fast)[0].len(), 100);
        let slow = Schedule { interval_us: 60_000_000, rows: 3, ..SCHEDULE };
        assert_eq!(all(1, 1, slow).len(), 3);
    }

    #[test]
    fn values_are_plausible_and_sometimes_missing() {
        let batches = all(1, 1, SCHEDULE);
        let readings = batches.concat();
        assert!(readings.len() < 2_000 * ROW_READINGS_MAX, "a sensor drops out now and then");
        assert!(readings.len() > 2_000 * (ROW_READINGS_MAX - 1), "one at a time");
        for reading in &readings {
            match (&reading.value, reading.sensor) {
                (Value::Double(value), "temperature") => assert!((-20.0..60.0).contains(value)),
                (Value::Double(value), "humidity") => assert!((0.0..=100.0).contains(value)),
                (Value::Double(value), "battery") => assert!((3.0..4.3).contains(value)),
                (Value::Text(_), "state") | (Value::Int64(_), "items") | (Value::Bool(_), "door") => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(readings.iter().map(|reading| reading.sensor).collect::<BTreeSet<_>>().len(), ROW_READINGS_MAX);
    }

    #[test]
    fn a_batch_is_complete_with_its_last_reading() {
        let mut batches = Batches::new(1, 1, SCHEDULE);
        let first = batches.next_batch().expect("rows");
        assert_eq!(first.complete_us, SCHEDULE.start_us + 4 * SCHEDULE.interval_us);
        assert_eq!(first.batch.readings, all(1, 1, SCHEDULE)[0].len() as u64);
    }
}
