//! A recording: a CSV file with a column of times and columns of numbers.

use crate::Usage;
use clap::ValueEnum;
use csv::StringRecord;
use jiff::{civil::DateTime, tz::TimeZone};
use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};
use tidegate::model::{Timestamp, batch::check_sensor_name};

/// How many rows are looked at to find out what the columns hold.
const SAMPLE_ROWS: usize = 100;
/// Below this, a number in the first row is hardly a count since 1970: it would be before 1973.
const EPOCH_SECONDS_MIN: f64 = 1e8;

/// How times are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TimeFormat {
    /// ISO 8601, with a T or a space before the time of day; UTC where there is no zone.
    Iso,
    /// Seconds since 1970-01-01T00:00:00Z; fractions are allowed.
    S,
    /// Milliseconds since then.
    Ms,
    /// Microseconds since then.
    Us,
    /// Nanoseconds since then.
    Ns,
}

impl TimeFormat {
    /// The time in microseconds since the epoch, finer parts cut off.
    fn parse(self, text: &str) -> Option<i64> {
        let micros = match self {
            Self::Iso => parse_iso(text)?,
            Self::S => scaled(text, 1e6)?,
            Self::Ms => scaled(text, 1e3)?,
            Self::Us => scaled(text, 1.0)?,
            Self::Ns => text.parse::<i64>().ok()?.div_euclid(1_000),
        };
        Timestamp::from_micros(micros).map(Timestamp::micros)
    }

    /// What `text` seems to be written in.
    fn guess(text: &str) -> Option<Self> {
        if parse_iso(text).is_some() {
            return Some(Self::Iso);
        }
        let number: f64 = text.parse().ok()?;
        match number.abs() {
            count if !(EPOCH_SECONDS_MIN..1e20).contains(&count) => None,
            count if count < 1e11 => Some(Self::S),
            count if count < 1e14 => Some(Self::Ms),
            count if count < 1e17 => Some(Self::Us),
            _ => Some(Self::Ns),
        }
    }
}

fn parse_iso(text: &str) -> Option<i64> {
    let zoned = text.parse::<jiff::Timestamp>().ok();
    let time = zoned.or_else(|| text.parse::<DateTime>().ok()?.to_zoned(TimeZone::UTC).ok().map(|time| time.timestamp()))?;
    Some(time.as_nanosecond().div_euclid(1_000) as i64)
}

fn scaled(text: &str, factor: f64) -> Option<i64> {
    match text.parse::<i64>() {
        Ok(count) => count.checked_mul(factor as i64),
        // A double holds today's time to a quarter of a microsecond.
        Err(_) => {
            text.parse::<f64>().ok().map(|count| (count * factor).round()).filter(|micros| micros.abs() < 1e18).map(|micros| micros as i64)
        }
    }
}

/// What of the file to take; what is not said is found out.
#[derive(Debug, Default)]
pub struct Choices {
    pub time_column: Option<String>,
    pub time_format: Option<TimeFormat>,
    pub sensor_columns: Vec<String>,
    pub delimiter: Option<u8>,
}

/// A file whose layout is known.
#[derive(Debug)]
pub struct Recording {
    path: PathBuf,
    pub delimiter: u8,
    pub time_column: (usize, String),
    pub time_format: TimeFormat,
    /// Place and name of each.
    pub sensor_columns: Vec<(usize, String)>,
}

/// One row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub time_us: i64,
    /// One for each of the recording's sensor columns.
    pub values: Vec<Option<f64>>,
}

impl Recording {
    /// Finds out the layout of the file at `path`.
    pub fn open(path: &Path, choices: &Choices) -> Result<Self, Usage> {
        let shown = path.display();
        let delimiter = match choices.delimiter {
            Some(delimiter) => delimiter,
            None => guess_delimiter(path)?,
        };
        let mut reader = reader(path, delimiter)?;
        let header = reader.headers().map_err(|error| Usage(format!("{shown}: {error}")))?.clone();
        let sample: Vec<StringRecord> =
            reader.records().take(SAMPLE_ROWS).collect::<Result<_, _>>().map_err(|error| Usage(format!("{shown}: {error}")))?;
        if sample.is_empty() {
            return Err(Usage(format!("{shown} has no rows below its header")));
        }
        let (time_index, time_format) = find_time(&header, &sample, choices).map_err(|why| Usage(format!("{shown}: {why}")))?;
        let sensor_columns = find_sensors(&header, &sample, time_index, choices).map_err(|why| Usage(format!("{shown}: {why}")))?;
        let time_column = (time_index, header[time_index].to_owned());
        Ok(Self { path: path.to_owned(), delimiter, time_column, time_format, sensor_columns })
    }

    /// All rows from the first on.
    pub fn rows(&self) -> Result<impl Iterator<Item = Result<Row, Usage>> + '_, Usage> {
        let records = reader(&self.path, self.delimiter)?.into_records();
        Ok(records.map(|record| self.row(&record.map_err(|error| Usage(format!("{}: {error}", self.path.display())))?)))
    }

    fn row(&self, record: &StringRecord) -> Result<Row, Usage> {
        let fault = |column: &str, text: &str, wanted: &str| {
            let line = record.position().map_or(0, csv::Position::line);
            Usage(format!("{}: line {line}, column {column:?}: {text:?} is not {wanted}", self.path.display()))
        };
        let (time_index, time_name) = &self.time_column;
        let time = record.get(*time_index).unwrap_or_default();
        let time_us = self.time_format.parse(time).ok_or_else(|| {
            fault(time_name, time, &format!("a time in the format {:?} in the years 0001 to 9999", self.time_format).to_lowercase())
        })?;
        let values = self.sensor_columns.iter().map(|(index, name)| {
            let text = record.get(*index).unwrap_or_default();
            value(text).ok_or_else(|| fault(name, text, "a finite number, nor a missing value"))
        });
        Ok(Row { time_us, values: values.collect::<Result<_, _>>()? })
    }
}

/// A cell's value, `Some(None)` for a missing one; `None` when it is neither.
fn value(text: &str) -> Option<Option<f64>> {
    if ["", "nan", "na", "n/a", "null", "none"].iter().any(|missing| text.eq_ignore_ascii_case(missing)) {
        return Some(None);
    }
    text.parse().ok().filter(|value: &f64| value.is_finite()).map(Some)
}

fn reader(path: &Path, delimiter: u8) -> Result<csv::Reader<File>, Usage> {
    let file = File::open(path).map_err(|error| Usage(format!("{} cannot be read: {error}", path.display())))?;
    Ok(csv::ReaderBuilder::new().delimiter(delimiter).trim(csv::Trim::All).from_reader(file))
}

/// The candidate that stands most often in the header.
fn guess_delimiter(path: &Path) -> Result<u8, Usage> {
    let unreadable = |error: std::io::Error| Usage(format!("{} cannot be read: {error}", path.display()));
    let mut header = String::new();
    BufReader::new(File::open(path).map_err(unreadable)?).read_line(&mut header).map_err(unreadable)?;
    let mut quoted = false;
    let mut counts = [(b',', 0), (b';', 0), (b'\t', 0), (b'|', 0)];
    for byte in header.bytes() {
        quoted ^= byte == b'"';
        if let Some((_, count)) = counts.iter_mut().find(|(candidate, _)| *candidate == byte && !quoted) {
            *count += 1;
        }
    }
    // Of equals the first: a file of one column has none of them.
    Ok(counts.iter().rev().max_by_key(|(_, count)| *count).expect("there are candidates").0)
}

fn names(header: &StringRecord) -> String {
    header.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")
}

/// The place of the column with this name, or else with this number from 1.
fn find_column(header: &StringRecord, wanted: &str) -> Result<usize, String> {
    let named = header.iter().position(|name| name == wanted);
    let numbered = || wanted.parse::<usize>().ok().and_then(|number| number.checked_sub(1)).filter(|index| *index < header.len());
    named.or_else(numbered).ok_or_else(|| format!("there is no column {wanted:?}; there are {}", names(header)))
}

fn find_time(header: &StringRecord, sample: &[StringRecord], choices: &Choices) -> Result<(usize, TimeFormat), String> {
    let first = &sample[0];
    let Some(wanted) = &choices.time_column else {
        // Written times before counts: a measured number may look like a count.
        let candidates = (0..first.len()).filter_map(|index| Some((index, TimeFormat::guess(&first[index])?)));
        let found = candidates.min_by_key(|(index, format)| (*format != TimeFormat::Iso, *index));
        let (index, guessed) = found.ok_or_else(|| format!("no column holds times; name one of {} with --time-column", names(header)))?;
        return Ok((index, choices.time_format.unwrap_or(guessed)));
    };
    let index = find_column(header, wanted)?;
    let text = first.get(index).unwrap_or_default();
    let format = choices.time_format.or_else(|| TimeFormat::guess(text));
    format
        .map(|format| (index, format))
        .ok_or_else(|| format!("{text:?} in column {wanted:?} is not a time; or say how it is written with --time-format"))
}

fn find_sensors(
    header: &StringRecord,
    sample: &[StringRecord],
    time_index: usize,
    choices: &Choices,
) -> Result<Vec<(usize, String)>, String> {
    let indexes: Vec<usize> = if choices.sensor_columns.is_empty() {
        let is_numeric = |index: &usize| {
            let values: Vec<Option<Option<f64>>> = sample.iter().map(|row| value(row.get(*index).unwrap_or_default())).collect();
            values.iter().all(Option::is_some) && values.iter().any(|value| matches!(value, Some(Some(_))))
        };
        (0..header.len()).filter(|index| *index != time_index).filter(is_numeric).collect()
    } else {
        choices.sensor_columns.iter().map(|name| find_column(header, name.trim())).collect::<Result<_, _>>()?
    };
    if indexes.is_empty() {
        return Err(format!(
            "no column but the time's holds numbers in the first rows; name some of {} with --sensor-columns",
            names(header)
        ));
    }
    let mut columns: Vec<(usize, String)> = Vec::new();
    for index in indexes {
        let name = header[index].to_owned();
        check_sensor_name(&name)?;
        if index == time_index || columns.iter().any(|(_, other)| *other == name) {
            return Err(format!("the column {name:?} is named twice"));
        }
        columns.push((index, name));
    }
    Ok(columns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(text.as_bytes()).expect("written");
        file
    }

    fn open(text: &str) -> (Recording, Vec<Result<Row, Usage>>) {
        let file = file(text);
        let recording = Recording::open(file.path(), &Choices::default()).expect("a recording");
        let rows = recording.rows().expect("readable").collect();
        (recording, rows)
    }

    const NOON_US: i64 = 1_577_880_000_000_000; // 2020-01-01T12:00:00Z

    #[test]
    fn times_are_read_in_every_notation() {
        for text in ["2020-01-01 12:00:00", "2020-01-01T12:00:00", "2020-01-01T12:00:00Z", "2020-01-01 13:00:00+01:00", "2020-01-01T12:00"]
        {
            assert_eq!(TimeFormat::guess(text).and_then(|format| format.parse(text)), Some(NOON_US), "{text}");
        }
        for (text, format) in [
            ("1577880000", TimeFormat::S),
            ("1577880000.000000", TimeFormat::S),
            ("1577880000000", TimeFormat::Ms),
            ("1577880000000000", TimeFormat::Us),
            ("1577880000000000999", TimeFormat::Ns),
        ] {
            assert_eq!(TimeFormat::guess(text), Some(format), "{text}");
            assert_eq!(format.parse(text), Some(NOON_US), "{text}");
        }
        assert_eq!(TimeFormat::guess("21.5"), None);
        assert_eq!(TimeFormat::S.parse("99999999999999"), None, "beyond the year 9999");
    }

    #[test]
    fn the_layout_is_found_out() {
        let (recording, rows) = open("label;when;Flow Rate;state\n1700000001;2020-01-01 12:00:00;1,5;x\n".replace("1,5", "1.5").as_str());
        assert_eq!((recording.delimiter, recording.time_column.clone()), (b';', (1, "when".to_owned())));
        assert_eq!(recording.sensor_columns, [(0, "label".to_owned()), (2, "Flow Rate".to_owned())]);
        assert_eq!(rows[0].as_ref().expect("good"), &Row { time_us: NOON_US, values: vec![Some(1_700_000_001.0), Some(1.5)] });
    }

    #[test]
    fn missing_values_are_not_numbers() {
        let (_, rows) = open("t,a,b\n2020-01-01,,2\n2020-01-02,NaN,3\n2020-01-03,1,null\n");
        let values: Vec<Vec<Option<f64>>> = rows.into_iter().map(|row| row.expect("good").values).collect();
        assert_eq!(values, [[None, Some(2.0)], [None, Some(3.0)], [Some(1.0), None]]);
    }

    #[test]
    fn faults_name_the_line_and_the_column() {
        let good = "2020-01-01,1\n".repeat(SAMPLE_ROWS);
        let (_, rows) = open(&format!("t,a\n{good}2020-01-01,1.2.3\n"));
        let fault = rows.into_iter().find_map(Result::err).expect("a fault").to_string();
        assert!(fault.contains("line 102, column \"a\": \"1.2.3\""), "{fault}");
        let (_, rows) = open(&format!("t,a\n{good}yesterday,1\n"));
        let fault = rows.into_iter().find_map(Result::err).expect("a fault").to_string();
        assert!(fault.contains("line 102, column \"t\": \"yesterday\""), "{fault}");
    }

    #[test]
    fn wrong_choices_say_what_there_is() {
        let file = file("t,a,b\n2020-01-01,1,x\n");
        let open = |choices| Recording::open(file.path(), &choices).expect_err("a fault").to_string();
        let unknown = open(Choices { sensor_columns: vec!["c".to_owned()], ..Choices::default() });
        assert!(unknown.contains("no column \"c\"; there are \"t\", \"a\", \"b\""), "{unknown}");
        let no_time = open(Choices { time_column: Some("3".to_owned()), ..Choices::default() });
        assert!(no_time.contains("--time-format"), "{no_time}");
    }
}
