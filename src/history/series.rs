//! Readings of one sensor in memory.

use super::chunk::Columns;
use crate::model::{
    ValueKind,
    columns::Values,
    scan::{RawValues, Unusual},
};
use std::ops::Range;

/// Readings of one sensor: times, and a value and a correction for each.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Microseconds since the epoch.
    pub times: Vec<i64>,
    /// The values.
    pub values: Values,
    /// What was added to each of the times as it came in, microseconds; empty when nothing was to any.
    pub clock_corrections: Vec<i64>,
}

impl From<Columns> for Series {
    fn from((times, values): Columns) -> Self {
        Self { times, values, clock_corrections: Vec::new() }
    }
}

impl Series {
    /// No readings.
    pub fn new(kind: ValueKind) -> Self {
        Self::from((Vec::new(), Values::new(kind)))
    }

    /// With the same added to all times.
    pub fn corrected_by(mut self, clock_correction: i64) -> Self {
        if clock_correction != 0 {
            self.clock_corrections = vec![clock_correction; self.len()];
        }
        self
    }

    /// How many readings there are.
    pub fn len(&self) -> usize {
        self.times.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.times.is_empty()
    }

    /// How much memory they take.
    pub fn memory_bytes(&self) -> usize {
        size_of_val(self.times.as_slice()) + size_of_val(self.clock_corrections.as_slice()) + self.values.memory_bytes()
    }

    /// Takes readings behind its own, as they come; `false` when their values are of another kind.
    pub fn append(&mut self, mut other: Self) -> bool {
        if self.is_empty() && self.values.kind() == other.values.kind() {
            *self = other;
            return true;
        }
        let before = self.len();
        self.times.append(&mut other.times);
        if self.has_corrections() || other.has_corrections() {
            self.clock_corrections.resize(before, 0);
            self.clock_corrections.append(&mut other.clock_corrections);
            self.clock_corrections.resize(self.times.len(), 0);
        }
        self.values.append(other.values)
    }

    fn has_corrections(&self) -> bool {
        !self.clock_corrections.is_empty()
    }

    /// Takes a column of a stored batch, and what was added to its times, behind its own readings; all of it, or after an error nothing.
    /// Says how much memory that takes, texts as in the batch.
    pub fn append_encoded(&mut self, times: &[i64], clock_correction: i64, values: &RawValues<'_>) -> Result<usize, Unusual> {
        let taken = self.append_values(values);
        if taken.is_ok() && self.values.len() == self.times.len() + times.len() {
            if self.has_corrections() || clock_correction != 0 {
                self.clock_corrections.resize(self.times.len(), 0);
                self.clock_corrections.resize(self.times.len() + times.len(), clock_correction);
            }
            self.times.extend_from_slice(times);
            let integers = if clock_correction == 0 { 1 } else { 2 };
            return Ok(integers * size_of_val(times) + values.memory_bytes(times.len()));
        }
        self.values.truncate(self.times.len());
        Err(Unusual)
    }

    fn append_values(&mut self, values: &RawValues<'_>) -> Result<(), Unusual> {
        match &mut self.values {
            Values::Double(own) => own.extend(values.doubles()?),
            Values::Int64(own) if values.kind == ValueKind::Int64 => append(own, values.integers(), |value| value)?,
            Values::Bool(own) if values.kind == ValueKind::Bool => append(own, values.integers(), |value| value != 0)?,
            Values::Text(own) => append(own, values.texts(), str::to_owned)?,
            Values::Int64(_) | Values::Bool(_) => return Err(Unusual),
        }
        Ok(())
    }

    /// A copy of some of them.
    pub fn slice(&self, rows: Range<usize>) -> Self {
        let clock_corrections = self.corrections(rows.clone());
        Self { times: self.times[rows.clone()].to_vec(), values: self.values.slice(rows), clock_corrections }
    }

    /// A copy of the corrections of some of them; empty when nothing was added to any.
    pub fn corrections(&self, rows: Range<usize>) -> Vec<i64> {
        match self.clock_corrections.get(rows) {
            Some(some) if some.iter().any(|&micros| micros != 0) => some.to_vec(),
            _ => Vec::new(),
        }
    }

    /// Those at or after `start` and before `end`.
    pub fn between(self, start: i64, end: i64) -> Self {
        let rows = self.times.partition_point(|&time| time < start)..self.times.partition_point(|&time| time < end);
        if rows == (0..self.len()) { self } else { self.slice(rows) }
    }

    /// Whether they are in the order of time, and each time is there once.
    pub fn is_sorted(&self) -> bool {
        self.times.is_sorted_by(|a, b| a < b)
    }

    /// In the order of time; of several readings of one time the last, which is the one stored last.
    pub fn sorted(self) -> Self {
        if self.is_sorted() {
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
        self.select(&kept)
    }

    /// The readings of these rows, in their order; no row may be there twice.
    pub fn select(self, rows: &[usize]) -> Self {
        let select = |all: &[i64]| rows.iter().filter_map(|&row| all.get(row).copied()).collect();
        Self { times: select(&self.times), clock_corrections: select(&self.clock_corrections), values: self.values.select(rows) }
    }
}

fn append<T, U>(own: &mut Vec<U>, values: impl Iterator<Item = Result<T, Unusual>>, convert: impl Fn(T) -> U) -> Result<(), Unusual> {
    for value in values {
        own.push(convert(value?));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::scan, pb};
    use prost::Message;

    /// A field that nobody knows behind the texts: the reader in place gives up when it has read some.
    #[test]
    fn of_a_column_that_cannot_be_read_in_place_nothing_is_taken() {
        let texts = pb::TextValues { values: vec!["a".into(), "b".into()] };
        let mut values = texts.encode_to_vec();
        values.extend([0x78, 1]);
        let length = |bytes: &[u8]| u8::try_from(bytes.len()).expect("short");
        let column: Vec<u8> = [&[0x0a, 1, b's', 0x32, length(&values)], values.as_slice()].concat();
        let frame: Vec<u8> = [&[0x12, 1, 2, 0x1a, length(&column)], column.as_slice()].concat();
        let batch: Vec<u8> = [&[0x0a, length(&frame)], frame.as_slice()].concat();
        assert_eq!(pb::Batch::decode(batch.as_slice()).expect("a batch").frames[0].columns[0].sensor, "s");
        let frame = scan::frames(&batch).next().expect("one").expect("usual");
        let column = frame.columns().next().expect("one").expect("usual");
        let before = Series::from((vec![1], Values::Text(vec!["before".into()])));
        let mut readings = before.clone();
        assert_eq!(readings.append_encoded(&[2, 3], 5, &column.values), Err(Unusual));
        assert_eq!(readings, before);
    }

    #[test]
    fn of_one_time_the_reading_stored_last_wins() {
        let readings = |rows: &[(i64, f64)]| {
            Series::from((rows.iter().map(|row| row.0).collect(), Values::Double(rows.iter().map(|row| row.1).collect())))
        };
        let sorted = readings(&[(3, 1.0), (1, 2.0), (3, 3.0), (2, 4.0), (1, 5.0)]).sorted();
        assert_eq!(sorted, readings(&[(1, 5.0), (2, 4.0), (3, 3.0)]));
        assert_eq!(sorted.between(2, 3), readings(&[(2, 4.0)]));
    }

    #[test]
    fn each_reading_keeps_its_correction() {
        let readings = |times: &[i64], micros| Series::from((times.to_vec(), Values::Int64(times.to_vec()))).corrected_by(micros);
        let mut all = readings(&[5, 6], 0);
        assert!(all.append(readings(&[1, 2], -7)) && all.append(readings(&[2, 9], 0)));
        assert_eq!(all.clock_corrections, [0, 0, -7, -7, 0, 0]);
        let sorted = all.sorted();
        assert_eq!((sorted.times.as_slice(), sorted.clock_corrections.as_slice()), (&[1, 2, 5, 6, 9][..], &[-7, 0, 0, 0, 0][..]));
        assert_eq!(sorted.slice(1..5), readings(&[2, 5, 6, 9], 0));
        assert_eq!(sorted.slice(0..1), readings(&[1], -7));
        let mut empty = readings(&[], 0);
        assert!(empty.append(readings(&[1], 3)));
        assert_eq!(empty, readings(&[1], 3));
    }
}
