//! The latest reading of each of some sensors.

use super::{Timestamp, columns::Value};

/// A sensor's latest reading in a batch: of several at that time the last.
#[derive(Debug, Clone, PartialEq)]
pub struct LatestReading {
    /// The sensor's number in the store.
    pub sensor_key: i64,
    /// The reading's time.
    pub time: Timestamp,
    /// What the gateway has added to it, microseconds; 0: nothing.
    pub clock_correction: i64,
    /// Its value.
    pub value: Value,
}

/// The latest reading of each sensor of several batches, in the order of the sensors' numbers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LatestReadings(Vec<LatestReading>);

impl LatestReadings {
    /// Takes over those of the next batch, in which each sensor is once.
    pub fn absorb(&mut self, mut next: Vec<LatestReading>) {
        if self.0.is_empty() {
            if !next.is_sorted_by_key(|reading| reading.sensor_key) {
                next.sort_unstable_by_key(|reading| reading.sensor_key);
            }
            self.0 = next;
            return;
        }
        // Mostly it is the same sensors once more, some time later.
        if self.0.len() == next.len() && self.0.iter().zip(&next).all(|(old, new)| old.sensor_key == new.sensor_key && old.time <= new.time)
        {
            self.0 = next;
            return;
        }
        let (mut hint, mut added) = (0, Vec::new());
        for reading in next {
            match place_of(&self.0, |earlier| earlier.sensor_key, reading.sensor_key, hint) {
                Ok(index) => {
                    hint = index + 1;
                    if self.0[index].time <= reading.time {
                        self.0[index] = reading;
                    }
                }
                Err(index) => {
                    hint = index;
                    added.push(reading);
                }
            }
        }
        if !added.is_empty() {
            self.0.append(&mut added);
            // Two that are in order, one behind the other, are what it is quick with.
            self.0.sort_by_key(|reading| reading.sensor_key);
        }
    }

    /// Takes no more room than it has to.
    pub fn shrink_to_fit(&mut self) {
        self.0.shrink_to_fit();
    }
}

impl From<LatestReadings> for Vec<LatestReading> {
    fn from(latest: LatestReadings) -> Self {
        latest.0
    }
}

/// Where a key is among `sorted` ones; the error is where it would have to be. `hint` is looked at first: batches name their sensors mostly in
/// the order of their numbers.
pub fn place_of<T>(sorted: &[T], key_of: impl Fn(&T) -> i64, key: i64, hint: usize) -> Result<usize, usize> {
    if sorted.get(hint).is_some_and(|at_hint| key_of(at_hint) == key) {
        return Ok(hint);
    }
    sorted.binary_search_by_key(&key, key_of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        /// Guarantee: what is known of several batches is, of each sensor, its latest reading, and of several at that time the last.
        #[test]
        fn of_each_sensor_the_latest_reading_is_kept_and_of_several_at_a_time_the_last(
            batches in prop::collection::vec(prop::collection::vec((0..6_i64, 0..4_i64), 0..6), 0..8),
        ) {
            let (mut latest, mut expected) = (LatestReadings::default(), BTreeMap::new());
            for (number, batch) in batches.into_iter().enumerate() {
                // Each sensor once, in whatever order.
                let mut next: Vec<LatestReading> = Vec::new();
                for (sensor_key, seconds) in batch {
                    if next.iter().all(|reading| reading.sensor_key != sensor_key) {
                        let time = Timestamp::from_micros(seconds * 1_000_000).expect("in range");
                        next.push(LatestReading { sensor_key, time, clock_correction: 0, value: Value::Int64(number as i64) });
                    }
                }
                for reading in &next {
                    let known = expected.entry(reading.sensor_key).or_insert_with(|| reading.clone());
                    if reading.time >= known.time {
                        *known = reading.clone();
                    }
                }
                latest.absorb(next);
            }
            prop_assert_eq!(Vec::from(latest), expected.into_values().collect::<Vec<_>>());
        }
    }
}
