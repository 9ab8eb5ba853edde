//! A recording, cut into batches.

use crate::{
    Usage,
    recording::{Recording, Row},
};
use std::collections::VecDeque;
use tidegate::{
    client::{BatchBuilder, EncodedBatch},
    model::columns::Value,
};

/// The recording's batches, the same each time.
pub struct Batches<'a> {
    rows: Box<dyn Iterator<Item = Result<Row, Usage>> + 'a>,
    sensors: Vec<(&'a str, &'a str)>,
    /// `None`: one row.
    readings_max: Option<u32>,
    waiting: VecDeque<(usize, i64, f64)>,
}

pub struct TimedBatch {
    pub batch: EncodedBatch,
    /// The time of its last reading.
    pub complete_us: i64,
}

impl<'a> Batches<'a> {
    pub fn new(recording: &'a Recording, units: &'a [String], readings_max: Option<u32>) -> Result<Self, Usage> {
        let sensors = recording.sensor_columns.iter().zip(units).map(|((_, name), unit)| (name.as_str(), unit.as_str())).collect();
        Ok(Self { rows: Box::new(recording.rows()?), sensors, readings_max, waiting: VecDeque::new() })
    }

    pub fn next_batch(&mut self) -> Result<Option<TimedBatch>, Usage> {
        let mut builder = BatchBuilder::new();
        let mut complete_us = 0;
        while self.readings_max.is_none_or(|max| builder.readings() < u64::from(max)) {
            if let Some((sensor, time_us, value)) = self.waiting.pop_front() {
                let (name, unit) = self.sensors[sensor];
                builder.push(name, unit, time_us, Value::Double(value));
                complete_us = time_us;
                continue;
            }
            if self.readings_max.is_none() && builder.readings() > 0 {
                break;
            }
            let Some(row) = self.rows.next().transpose()? else { break };
            let values = row.values.iter().enumerate();
            self.waiting.extend(values.filter_map(|(sensor, value)| Some((sensor, row.time_us, (*value)?))));
        }
        Ok(builder.finish().map(|batch| TimedBatch { batch, complete_us }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recording::Choices;
    use std::io::Write;
    use tidegate::model::batch::decode_stored;

    #[test]
    fn batches_hold_the_rows_in_their_order_and_no_missing_values() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        write!(file, "t,a,b\n2020-01-02,1,2\n2020-01-01,3,\n2020-01-01,4,5\n").expect("written");
        let recording = Recording::open(file.path(), &Choices::default()).expect("a recording");
        let units = ["".to_owned(), "m".to_owned()];
        let mut batches = Batches::new(&recording, &units, Some(3)).expect("readable");
        let mut values = Vec::new();
        let mut sizes = Vec::new();
        while let Some(timed) = batches.next_batch().expect("good rows") {
            sizes.push(timed.batch.readings);
            for column in decode_stored(timed.batch.bytes, |sensor| sensor == "a").expect("own encoding") {
                values.extend((0..column.times.len()).filter_map(|row| column.values.get(row)));
            }
        }
        assert_eq!(sizes, [3, 2]);
        assert_eq!(values, [1.0, 3.0, 4.0].map(Value::Double));
        let mut batches = Batches::new(&recording, &units, None).expect("readable");
        let rows: Vec<u64> = std::iter::from_fn(|| batches.next_batch().expect("good rows")).map(|timed| timed.batch.readings).collect();
        assert_eq!(rows, [2, 1, 2], "each row is a batch, whatever it misses");
    }
}
