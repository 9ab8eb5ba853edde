//! How times, values and tables look.

use crate::model::{Timestamp, columns::Value};
use serde_json::{Number, Value as Json};
use std::io::{self, Write};

/// RFC 3339 in UTC to the millisecond, or to the microsecond where that is not exact.
pub fn time(micros: i64) -> String {
    match jiff::Timestamp::from_microsecond(micros) {
        Ok(time) if micros % 1_000 == 0 => format!("{time:.3}"),
        Ok(time) => format!("{time:.6}"),
        // Beyond jiff's range, by a day at the most.
        Err(_) => format!("{micros}us"),
    }
}

/// A protobuf time; empty when there is none.
pub fn proto_time(time_of: Option<&prost_types::Timestamp>) -> String {
    time_of.and_then(|proto| Timestamp::from_proto(proto).ok()).map(|at| time(at.micros())).unwrap_or_default()
}

/// A protobuf duration in seconds.
pub fn seconds(duration: &prost_types::Duration) -> f64 {
    duration.seconds as f64 + f64::from(duration.nanos) / 1e9
}

/// A number in the fewest digits that read back as the same.
pub fn double(number: f64) -> String {
    const PLAIN: std::ops::Range<f64> = 1e-5..1e16;
    if number == 0.0 || !number.is_finite() || PLAIN.contains(&number.abs()) { number.to_string() } else { format!("{number:e}") }
}

/// A value as it stands in a table of other programs.
pub fn value(value: &Value) -> String {
    match value {
        Value::Double(number) => double(*number),
        Value::Int64(number) => number.to_string(),
        Value::Bool(on) => on.to_string(),
        Value::Text(text) => text.clone(),
    }
}

/// A number as JSON; what JSON has no number for is text, as in protobuf's JSON.
pub fn json_double(number: f64) -> Json {
    Number::from_f64(number).map_or_else(|| Json::String(number.to_string().replace("inf", "Infinity")), Json::Number)
}

/// A value as JSON.
pub fn json_value(value: &Value) -> Json {
    match value {
        Value::Double(number) => json_double(*number),
        Value::Int64(number) => Json::from(*number),
        Value::Bool(on) => Json::Bool(*on),
        Value::Text(text) => Json::String(text.clone()),
    }
}

/// Text of a device for a terminal: it may hold what would move the cursor or forge a line.
pub fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// A stream id as a UUID is written; `-` for what is none.
pub fn stream_text(id: &[u8]) -> String {
    uuid::Uuid::from_slice(id).map_or_else(|_| "-".to_owned(), |uuid| uuid.to_string())
}

/// Rows under headings, each column as wide as its widest cell.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With a row of headings.
    pub fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(ToString::to_string).collect()] }
    }

    /// Without headings.
    pub fn bare() -> Self {
        Self { rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| shown(&cell)).collect());
    }

    /// Writes it, each line behind `indent`.
    pub fn write(&self, out: &mut dyn Write, indent: &str) -> io::Result<()> {
        let mut widths: Vec<usize> = Vec::new();
        for row in &self.rows {
            widths.resize(widths.len().max(row.len()), 0);
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for row in &self.rows {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
            writeln!(out, "{}", format!("{indent}{}", cells.join("  ")).trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_show_milliseconds_or_what_is_needed() {
        assert_eq!(time(1_795_238_521_000_000), "2026-11-21T05:22:01.000Z");
        assert_eq!(time(1_795_238_521_000_007), "2026-11-21T05:22:01.000007Z");
        assert_eq!(time(-1), "1969-12-31T23:59:59.999999Z");
    }

    #[test]
    fn numbers_read_back_as_they_were() {
        for number in [0.0, -0.0, 21.37, 1e300, -2.5e-9, 73.93588199999998, f64::MAX, f64::INFINITY] {
            assert_eq!(double(number).parse::<f64>().map(f64::to_bits), Ok(number.to_bits()));
            assert!(double(number).len() < 25);
        }
        assert_eq!(json_double(f64::NEG_INFINITY), "-Infinity");
        assert_eq!(json_double(f64::NAN), "NaN");
    }

    #[test]
    fn columns_line_up_and_a_device_cannot_forge_lines() {
        let mut table = Table::new(&["ID", "NAME"]);
        table.row(["pump-1".to_owned(), "a\nb\u{1b}[2J".to_owned()]);
        let mut out = Vec::new();
        table.write(&mut out, " ").expect("memory takes it");
        assert_eq!(String::from_utf8(out).expect("UTF-8"), " ID      NAME\n pump-1  a\\nb\\u{1b}[2J\n");
    }
}
