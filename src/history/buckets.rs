//! What the readings of spans of time come to.

use super::series::Series;
use crate::model::columns::Values;
use std::time::Duration;

/// Aggregates readings that come piece by piece, in the order of time.
pub struct Buckets {
    length: i64,
    buckets: Vec<Bucket>,
}

impl Buckets {
    /// Spans of this length; they begin at multiples of it since the epoch.
    pub fn new(length: Duration) -> Self {
        Self { length: i64::try_from(length.as_micros()).unwrap_or(i64::MAX).max(1), buckets: Vec::new() }
    }

    /// Takes the next readings.
    pub fn add(&mut self, readings: &Series) {
        for (row, &time) in readings.times.iter().enumerate() {
            let start = time.div_euclid(self.length).saturating_mul(self.length);
            match self.buckets.last_mut() {
                Some(bucket) if bucket.start == start => bucket.add(number(&readings.values, row)),
                _ => self.buckets.push(Bucket::new(start, number(&readings.values, row))),
            }
        }
    }

    /// The spans that are complete, as soon as there are `least` of them.
    pub fn take_complete(&mut self, least: usize) -> Option<Vec<Bucket>> {
        (self.buckets.len() > least).then(|| {
            let last = self.buckets.split_off(self.buckets.len() - 1);
            std::mem::replace(&mut self.buckets, last)
        })
    }

    /// All that are left.
    pub fn finish(self) -> Vec<Bucket> {
        self.buckets
    }
}

/// The value of a row as a number: switches as 0 and 1; text has none.
fn number(values: &Values, row: usize) -> f64 {
    match values {
        Values::Double(values) => values[row],
        Values::Int64(values) => values[row] as f64,
        Values::Bool(values) => f64::from(u8::from(values[row])),
        Values::Text(_) => f64::NAN,
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

    #[test]
    fn buckets_begin_at_multiples_of_their_length_also_before_1970() {
        let rows = [(-1, 1.0), (0, 2.0), (9, f64::NAN), (10, 6.0), (11, 4.0), (35, f64::NAN)];
        let mut buckets = Buckets::new(Duration::from_micros(10));
        // In pieces of any size.
        for piece in rows.chunks(4) {
            let (times, values) = piece.iter().copied().unzip();
            buckets.add(&Series::from((times, Values::Double(values))));
        }
        let complete = buckets.take_complete(3).expect("four, the last of them open");
        let shown: Vec<_> = complete.iter().map(|b| (b.start, b.count, b.minimum, b.maximum, b.average(), b.first)).collect();
        assert_eq!(shown, [(-10, 1, 1.0, 1.0, 1.0, 1.0), (0, 2, 2.0, 2.0, 2.0, 2.0), (10, 2, 4.0, 6.0, 5.0, 6.0)]);
        let rest = buckets.finish();
        assert!(rest.len() == 1 && rest[0].average().is_nan() && rest[0].minimum.is_nan() && rest[0].count == 1);
    }
}
