//! A chunk: readings of one sensor in the order of time, as one row that plain SQL can read.
//!
//! `points` is a JSON array, an element a reading, so that `json_each` of SQLite and `json_array_elements` of PostgreSQL take it
//! apart; the columns beside it say how an element `k` becomes a reading:
//!
//! | `time_unit` | `time_factor` | element | its time number `t` | its value `v` |
//! |---|---|---|---|---|
//! | 0 | | `v` | 0 | the element |
//! | > 0 | > 0 | an integer | element / `time_factor` | element % `time_factor` |
//! | > 0 | 0 | `[t, v]` | the first | the second |
//!
//! The time is `time_base + k * time_step + t * time_unit`: readings at an even pace have no time numbers, and of others most are
//! small. `clock_corrections` says what was added to the times as they came in, NULL when nothing was: `[[k, micros], ...]`, each for the
//! elements from k to the next one's, the first from 0. The value depends on `encoding`: `decimal` is `(value_base + v) / value_divisor`, `integer` is `value_base + v`, `real` and
//! `text` are `v` itself. Decoding gives back every bit, except of a NaN, of which there is one.

use super::json;
use crate::model::{ValueKind, columns::Values};

/// How many readings a chunk has at the most; few in the crate's own tests, so that there are several.
pub const READINGS_MAX: usize = if cfg!(test) { 64 } else { 8_192 };

/// What values are scaled with: `f64` has each of them exactly.
const POWERS_OF_TEN: [f64; 13] = [1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12];
/// The largest power of two that values are scaled with: sensors that measure in single precision need no more.
const BINARY_DIGITS_MAX: i32 = 40;
/// The largest integer that is scaled: up to here rounding by means of [`ROUNDER`] is right.
const SCALED_MAX: f64 = (1_u64 << 50) as f64;
/// One and a half times 2^52.
const ROUNDER: f64 = 6_755_399_441_055_744.0;

/// See the [module](self).
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// The time of the first reading, microseconds since the epoch.
    pub first_time: i64,
    /// The time of the last reading.
    pub last_time: i64,
    /// How many readings there are.
    pub readings: usize,
    /// Where times are counted from.
    pub time_base: i64,
    /// The pace of the readings.
    pub time_step: i64,
    /// What one time number is worth; 0: there are none.
    pub time_unit: i64,
    /// What time numbers are multiplied with in the elements; 0: they stand on their own.
    pub time_factor: i64,
    /// What the values are.
    pub encoding: Encoding,
    /// What is added to a value.
    pub value_base: i64,
    /// What a value is then divided by.
    pub value_divisor: f64,
    /// The elements.
    pub points: String,
    /// What was added to the times as they came in, as runs; `None`: nothing.
    pub clock_corrections: Option<String>,
}

/// What the values of a chunk are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Doubles that are integers divided by one power of ten or two.
    Decimal,
    /// Integers and switches.
    Integer,
    /// Doubles as they are.
    Real,
    /// Texts.
    Text,
}

impl Encoding {
    /// The word for it in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Decimal => "decimal",
            Self::Integer => "integer",
            Self::Real => "real",
            Self::Text => "text",
        }
    }

    /// The encoding of a [word](Self::as_str).
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Decimal, Self::Integer, Self::Real, Self::Text].into_iter().find(|encoding| encoding.as_str() == word)
    }
}

/// Times and values.
pub type Columns = (Vec<i64>, Values);

impl Chunk {
    /// How many bytes it takes in the store, about.
    pub fn stored_bytes(&self) -> usize {
        self.points.len() + self.clock_corrections.as_ref().map_or(0, String::len)
    }

    /// The chunk of some readings to whose times nothing was added: at least one, their times those of [`Timestamp`](crate::model::Timestamp)s and strictly increasing.
    pub fn encode(times: &[i64], values: &Values) -> Self {
        let (first_time, last_time) = (times[0], times[times.len() - 1]);
        let pace = Pace::of(times);
        let numbers = match values {
            Values::Double(values) => Scaled::doubles(values),
            Values::Int64(values) => Some(Scaled::integers(values)),
            Values::Bool(values) => Some(Scaled { base: 0, divisor: 1.0, numbers: values.iter().map(|&on| i64::from(on)).collect() }),
            Values::Text(_) => None,
        };
        let encoding = match (values, &numbers) {
            (Values::Text(_), _) => Encoding::Text,
            (Values::Double(_), Some(_)) => Encoding::Decimal,
            (Values::Double(_), None) => Encoding::Real,
            _ => Encoding::Integer,
        };
        let time_factor = numbers.as_ref().and_then(|scaled| pace.factor(&scaled.numbers)).unwrap_or(0);
        let mut writer = json::Writer::new(times.len());
        match (&numbers, values) {
            (Some(scaled), _) if time_factor > 0 => {
                pace.numbers.iter().zip(&scaled.numbers).for_each(|(time, value)| writer.integer(time * time_factor + value));
            }
            (Some(scaled), _) => pace.write(&mut writer, scaled.numbers.iter(), |writer, value| writer.integer(*value)),
            (None, Values::Double(values)) => pace.write(&mut writer, values.iter(), |writer, value| writer.real(*value)),
            (None, Values::Text(texts)) => pace.write(&mut writer, texts.iter(), |writer, text| writer.text(text)),
            (None, _) => {} // integers and switches always have numbers
        }
        let (value_base, value_divisor) = numbers.map_or((0, 1.0), |scaled| (scaled.base, scaled.divisor));
        Self {
            first_time,
            last_time,
            readings: times.len(),
            time_base: pace.base,
            time_step: pace.step,
            time_unit: pace.unit,
            time_factor,
            encoding,
            value_base,
            value_divisor,
            points: writer.finish(),
            clock_corrections: None,
        }
    }

    /// The readings of a chunk of a sensor of this kind; `None` when these can't be the bytes that were written.
    pub fn decode(&self, kind: ValueKind) -> Option<Columns> {
        let (base, divisor) = (self.value_base, self.value_divisor);
        let (times, values) = match (self.encoding, kind) {
            (Encoding::Decimal, ValueKind::Double) => {
                let (times, values) = self.decode_numbers(|number| base.wrapping_add(number) as f64 / divisor)?;
                (times, Values::Double(values))
            }
            (Encoding::Integer, ValueKind::Int64) => {
                let (times, values) = self.decode_numbers(|number| base.wrapping_add(number))?;
                (times, Values::Int64(values))
            }
            (Encoding::Integer, ValueKind::Bool) => {
                let (times, values) = self.decode_numbers(|number| number != 0)?;
                (times, Values::Bool(values))
            }
            (Encoding::Real, ValueKind::Double) => {
                let (times, values) = self.decode_elements(json::Reader::real)?;
                (times, Values::Double(values))
            }
            (Encoding::Text, ValueKind::Text) => {
                let (times, values) = self.decode_elements(json::Reader::text)?;
                (times, Values::Text(values))
            }
            _ => return None,
        };
        (times.len() == self.readings).then_some((times, values))
    }

    fn decode_numbers<T>(&self, value: impl Fn(i64) -> T) -> Option<(Vec<i64>, Vec<T>)> {
        if self.time_unit == 0 || self.time_factor <= 0 {
            return self.decode_elements(|reader| reader.integer().map(&value));
        }
        let (mut times, mut values) = (Vec::with_capacity(self.readings), Vec::with_capacity(self.readings));
        let mut reader = json::Reader::new(&self.points);
        let mut even = self.time_base;
        while let Some(()) = reader.next_element() {
            let number = reader.integer()?;
            // Most are on time, and a division is much of the work here.
            let (late, number) =
                if number < self.time_factor { (0, number) } else { (number / self.time_factor, number % self.time_factor) };
            times.push(even.wrapping_add(late.wrapping_mul(self.time_unit)));
            values.push(value(number));
            even = even.wrapping_add(self.time_step);
        }
        reader.ended().then_some((times, values))
    }

    fn decode_elements<'a, T>(&'a self, value: impl Fn(&mut json::Reader<'a>) -> Option<T>) -> Option<(Vec<i64>, Vec<T>)> {
        let (mut times, mut values) = (Vec::with_capacity(self.readings), Vec::with_capacity(self.readings));
        let mut reader = json::Reader::new(&self.points);
        let mut even = self.time_base;
        while let Some(()) = reader.next_element() {
            if self.time_unit == 0 {
                times.push(even);
                values.push(value(&mut reader)?);
            } else {
                reader.expect(b'[')?;
                times.push(even.wrapping_add(reader.integer()?.wrapping_mul(self.time_unit)));
                reader.expect(b',')?;
                values.push(value(&mut reader)?);
                reader.expect(b']')?;
            }
            even = even.wrapping_add(self.time_step);
        }
        reader.ended().then_some((times, values))
    }
}

/// How the times of a chunk go on.
struct Pace {
    base: i64,
    step: i64,
    unit: i64,
    // Empty for an even pace.
    numbers: Vec<i64>,
}

impl Pace {
    fn of(times: &[i64]) -> Self {
        let (base, steps) = (times[0], times.len() - 1);
        let step = if steps == 0 { 0 } else { times[1] - base };
        if times.windows(2).all(|pair| pair[1] - pair[0] == step) {
            return Self { base, step, unit: 0, numbers: Vec::new() };
        }
        let unit = times.iter().try_fold(0, |unit, &time| match greatest_common_divisor(unit, time - base) {
            1 => Err(1),
            unit => Ok(unit),
        });
        let unit = unit.unwrap_or_else(|one| one);
        let mean = (times[steps] - base) / steps as i64;
        let step = (mean + unit / 2) / unit * unit;
        let late = |(k, time): (usize, &i64)| time - base - k as i64 * step;
        let earliest = times.iter().enumerate().map(late).min().unwrap_or(0);
        let numbers = times.iter().enumerate().map(|time| (late(time) - earliest) / unit).collect();
        Self { base: base + earliest, step, unit, numbers }
    }

    /// The power of ten with which a time number and a value fit into one integer; `None` when they don't, or there are no time numbers.
    fn factor(&self, values: &[i64]) -> Option<i64> {
        let time_max = *self.numbers.iter().max()?;
        let value_max = *values.iter().max()?;
        if values.iter().any(|&value| value < 0) {
            return None;
        }
        let factor = 10_i64.checked_pow(value_max.checked_ilog10().unwrap_or(0) + 1)?;
        time_max.checked_mul(factor)?.checked_add(factor).map(|_| factor)
    }

    fn write<T>(&self, writer: &mut json::Writer, values: impl Iterator<Item = T>, write: impl Fn(&mut json::Writer, T)) {
        if self.unit == 0 {
            values.for_each(|value| write(writer, value));
        } else {
            self.numbers.iter().zip(values).for_each(|(time, value)| writer.pair(*time, |writer| write(writer, value)));
        }
    }
}

fn greatest_common_divisor(mut a: i64, mut b: i64) -> i64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Values as integers above a base.
struct Scaled {
    base: i64,
    divisor: f64,
    numbers: Vec<i64>,
}

impl Scaled {
    fn integers(values: &[i64]) -> Self {
        let (min, max) = (values.iter().min().copied().unwrap_or(0), values.iter().max().copied().unwrap_or(0));
        let base = if max.checked_sub(min).is_some() { min } else { 0 };
        Self { base, divisor: 1.0, numbers: values.iter().map(|value| value - base).collect() }
    }

    /// `None` when no divisor makes integers of all values that become the very same values again.
    fn doubles(values: &[f64]) -> Option<Self> {
        let divisor = power_of_ten(values).or_else(|| power_of_two(values))?;
        // Checked all at once: a value that was exact with a smaller divisor may have become too large.
        let numbers = values.iter().map(|&value| scale(value, divisor)).collect::<Option<Vec<i64>>>()?;
        Some(Self { divisor, ..Self::integers(&numbers) })
    }
}

/// The smallest power of ten that makes integers of all values.
fn power_of_ten(values: &[f64]) -> Option<f64> {
    let mut divisors = POWERS_OF_TEN.into_iter();
    let mut divisor = divisors.next()?;
    // A value that is exact with a divisor is so with any greater one, as that is the same fraction.
    for &value in values {
        while scale(value, divisor).is_none() {
            divisor = divisors.next()?;
        }
    }
    Some(divisor)
}

/// The smallest power of two that does.
fn power_of_two(values: &[f64]) -> Option<f64> {
    let digits = |value: &f64| {
        let (exponent, fraction) = ((value.to_bits() >> 52 & 0x7ff) as i32, value.to_bits() << 12 >> 12);
        let lowest = if fraction == 0 { 0 } else { 52 - fraction.trailing_zeros() as i32 };
        lowest - (exponent - 1023)
    };
    let digits = values.iter().filter(|value| **value != 0.0).map(digits).max()?.max(0);
    (digits <= BINARY_DIGITS_MAX).then(|| 2_f64.powi(digits))
}

/// `value` times `divisor` as an integer, when dividing that gives every bit of the value again.
fn scale(value: f64, divisor: f64) -> Option<i64> {
    let number = value * divisor;
    if number.abs() >= SCALED_MAX || number.is_nan() {
        return None;
    }
    // Adding this leaves no digits behind the point, and the integer in the low bits.
    let number = ((number + ROUNDER).to_bits() as i64).wrapping_sub(ROUNDER.to_bits() as i64);
    ((number as f64 / divisor).to_bits() == value.to_bits()).then_some(number)
}

#[cfg(test)]
#[path = "chunk_tests.rs"]
mod tests;
