//! From single readings to the columns of a batch.

use crate::{
    model::columns::{Value, Values, deltas_from_times},
    pb,
};
use bytes::Bytes;
use prost::Message;

/// A batch as it is queued and sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedBatch {
    /// The encoded [`pb::Batch`].
    pub bytes: Bytes,
    /// How many readings it has; at least 1.
    pub readings: u64,
}

/// Gathers readings into a batch.
///
/// Readings that follow each other with the same time and different sensors are a row: they were sampled together. A row
/// with the same sensors as the row before it goes into the same frame; another set of sensors, such as when one has no
/// value, begins a new frame. So the batch keeps the order in which the readings came, and where one sensor has two
/// readings of the same time, the later one wins as the contract says.
///
/// Nothing is checked here: the gateway checks, and rejects a batch as a whole. Leave out values that are not finite.
#[derive(Debug, Default)]
pub struct BatchBuilder {
    frames: Vec<FrameDraft>,
    row: RowDraft,
    readings: u64,
}

#[derive(Debug)]
struct FrameDraft {
    times_us: Vec<i64>,
    columns: Vec<ColumnDraft>,
}

#[derive(Debug)]
struct ColumnDraft {
    sensor: String,
    unit: String,
    values: Values,
}

#[derive(Debug, Default)]
struct RowDraft {
    time_us: i64,
    cells: Vec<ColumnDraft>,
}

impl BatchBuilder {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one reading. `unit` is the SenML symbol, empty for none; `time_us` is in microseconds since the Unix epoch.
    pub fn push(&mut self, sensor: &str, unit: &str, time_us: i64, value: Value) {
        if self.row.time_us != time_us || self.row.cells.iter().any(|cell| cell.sensor == sensor) {
            self.close_row();
        }
        self.row.time_us = time_us;
        self.row.cells.push(ColumnDraft { sensor: sensor.to_owned(), unit: unit.to_owned(), values: value.into() });
        self.readings += 1;
    }

    /// How many readings it has so far.
    pub fn readings(&self) -> u64 {
        self.readings
    }

    /// The batch, and an empty builder again; `None` when it has no readings.
    pub fn finish(&mut self) -> Option<EncodedBatch> {
        self.close_row();
        let readings = std::mem::take(&mut self.readings);
        let frames = std::mem::take(&mut self.frames).into_iter().map(FrameDraft::into_proto).collect();
        (readings > 0).then(|| EncodedBatch { bytes: pb::Batch { frames }.encode_to_vec().into(), readings })
    }

    fn close_row(&mut self) {
        let row = std::mem::take(&mut self.row);
        if row.cells.is_empty() {
            return;
        }
        // Only the last frame may take the row: an earlier one would put it before rows that came before it.
        let row = match self.frames.last_mut() {
            Some(frame) => match frame.append(row) {
                Ok(()) => return,
                Err(row) => row,
            },
            None => row,
        };
        self.frames.push(FrameDraft { times_us: vec![row.time_us], columns: row.cells });
    }
}

impl FrameDraft {
    /// Takes the row, or gives it back when it has other sensors.
    fn append(&mut self, row: RowDraft) -> Result<(), RowDraft> {
        if row.cells.len() != self.columns.len() {
            return Err(row);
        }
        let same = |cell: &ColumnDraft, column: &ColumnDraft| {
            cell.sensor == column.sensor && cell.unit == column.unit && cell.values.kind() == column.values.kind()
        };
        let places: Option<Vec<usize>> = (row.cells.iter().enumerate())
            .map(|(place, cell)| match same(cell, &self.columns[place]) {
                true => Some(place),
                false => self.columns.iter().position(|column| same(cell, column)),
            })
            .collect();
        let Some(places) = places else { return Err(row) };
        self.times_us.push(row.time_us);
        for (place, cell) in places.into_iter().zip(row.cells) {
            let taken = self.columns[place].values.append(cell.values);
            debug_assert!(taken, "the kinds were compared");
        }
        Ok(())
    }

    fn into_proto(self) -> pb::Frame {
        let (base_time_us, time_deltas_us) = deltas_from_times(&self.times_us);
        let columns = self.columns.into_iter().map(|column| pb::Column {
            sensor: column.sensor,
            unit: column.unit,
            values: Some(column.values.into()),
        });
        pb::Frame { base_time_us, time_deltas_us, columns: columns.collect(), ..Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BatchLimits, CheckedBatch, Timestamp, batch::decode_stored};
    use proptest::prelude::*;
    use std::time::Duration;

    fn frames(builder: &mut BatchBuilder) -> Vec<pb::Frame> {
        let batch = builder.finish().expect("has readings");
        pb::Batch::decode(batch.bytes).expect("own encoding").frames
    }

    #[test]
    fn rows_with_the_same_sensors_share_a_frame() {
        let mut builder = BatchBuilder::new();
        for time_us in [30, 20, 20] {
            builder.push("t", "Cel", time_us, Value::Double(1.5));
            builder.push("on", "", time_us, Value::Bool(true));
        }
        assert_eq!(builder.readings(), 6);
        let frames = frames(&mut builder);
        assert_eq!(frames.len(), 1);
        assert_eq!((frames[0].base_time_us, frames[0].time_deltas_us.as_slice()), (30, [-10, 0].as_slice()));
        assert_eq!(frames[0].columns.iter().map(|column| column.sensor.as_str()).collect::<Vec<_>>(), ["t", "on"]);
        assert_eq!(builder.finish(), None, "finishing empties it");
    }

    #[test]
    fn a_missing_value_puts_its_row_into_another_frame() {
        let mut builder = BatchBuilder::new();
        for (time_us, both) in [(1, true), (2, false), (3, true)] {
            builder.push("a", "", time_us, Value::Int64(time_us));
            if both {
                builder.push("b", "", time_us, Value::Int64(time_us));
            }
        }
        let sizes: Vec<usize> = frames(&mut builder).iter().map(|frame| frame.columns.len()).collect();
        assert_eq!(sizes, [2, 1, 2]);
    }

    proptest! {
        /// Whatever is put in comes out of the encoded batch, for each sensor in its order, and the gateway's check takes it.
        #[test]
        fn readings_come_out_in_their_order(readings in prop::collection::vec((0usize..4, -50i64..50, -9i64..9), 1..60)) {
            let sensors = ["a", "b", "c", "d"];
            let mut builder = BatchBuilder::new();
            let mut expected = vec![Vec::new(); sensors.len()];
            for &(sensor, time_us, value) in &readings {
                builder.push(sensors[sensor], "m", time_us, Value::Int64(value));
                expected[sensor].push((time_us, Value::Int64(value)));
            }
            let batch = builder.finish().expect("has readings");
            prop_assert_eq!(batch.readings, readings.len() as u64);
            let limits = BatchLimits { bytes_max: 1 << 20, readings_max: 1_000, sensors_max: 100, time_skew_max: Duration::ZERO, reading_age_max: Duration::ZERO };
            let checked = CheckedBatch::check(&batch.bytes, &limits, Timestamp::now(), |_| None).expect("well formed");
            prop_assert_eq!(u64::from(checked.summary.readings), batch.readings);

            let mut found = vec![Vec::new(); sensors.len()];
            for column in decode_stored(batch.bytes, |_| true).expect("own encoding") {
                let place = sensors.iter().position(|sensor| *sensor == column.sensor).expect("one of ours");
                found[place].extend((0..column.times.len()).map(|row| (column.times[row], column.values.get(row).expect("as long"))));
            }
            prop_assert_eq!(found, expected);
        }
    }
}
