//! Readings as rows of a file.

mod parquet;

use self::parquet::RowGroups;
use super::Failure;
use crate::{
    cli::print,
    model::columns::{Values, device_times, times_from_deltas},
    pb,
};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// How many readings are written until they are made durable; with Parquet, how many are in one row group.
pub const CHECKPOINT_READINGS: u64 = 250_000;

/// The form of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Format {
    /// RFC 4180, with a line of names.
    Csv,
    /// Apache Parquet, compressed with Snappy.
    Parquet,
}

impl Format {
    /// What a file's ending says.
    pub fn of(file: &Path) -> Self {
        match file.extension() {
            Some(ending) if ending.eq_ignore_ascii_case("parquet") => Self::Parquet,
            _ => Self::Csv,
        }
    }
}

/// What is in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub format: Format,
    /// Whether there is a column for the time by the device's clock.
    #[serde(default)]
    pub device_time: bool,
}

/// Readings of one sensor.
#[derive(Debug)]
pub struct Rows {
    pub device: String,
    pub sensor: String,
    pub unit: String,
    pub times: Vec<i64>,
    /// By the device's clock.
    pub device_times: Vec<i64>,
    pub values: Values,
}

impl Rows {
    pub fn from_wire(readings: pb::ExportedReadings) -> Result<Self, Failure> {
        Self::of(readings.device, readings.column.unwrap_or_default())
    }

    /// Those of a column of a device.
    pub fn of(device: String, column: pb::ReadingColumn) -> Result<Self, Failure> {
        let pb::ReadingColumn { sensor, unit, base_time_us, time_deltas_us, values, clock_corrections_us } = column;
        let times = times_from_deltas(base_time_us, &time_deltas_us).unwrap_or_default();
        let values = values.map(Values::from).filter(|values| values.len() == times.len());
        match values.zip(device_times(&times, &clock_corrections_us)) {
            Some((values, device_times)) => Ok(Self { device, sensor, unit, times, device_times, values }),
            None => Err(Failure::Failed(format!("the gateway sent a column of sensor {sensor:?} that does not add up"))),
        }
    }

    pub fn len(&self) -> usize {
        self.times.len()
    }
}

/// What turns rows into the bytes of a file.
pub enum Encoder {
    /// Each row at once; whether with the time by the device's clock.
    Csv { device_time: bool },
    /// Many rows at a time.
    Parquet(Box<RowGroups>),
}

impl Encoder {
    pub fn new(Layout { format, device_time }: Layout) -> Self {
        match format {
            Format::Csv => Self::Csv { device_time },
            Format::Parquet => Self::Parquet(Box::new(RowGroups::new(device_time))),
        }
    }

    /// As it was when it was [saved](Self::save).
    pub fn restore(layout: Layout, saved: &[u8]) -> Result<Self, Failure> {
        match layout.format {
            Format::Csv => Ok(Self::new(layout)),
            Format::Parquet => Ok(Self::Parquet(Box::new(RowGroups::restore(layout.device_time, saved)?))),
        }
    }

    /// What it has to remember of what it has flushed.
    pub fn save(&self) -> Result<Vec<u8>, Failure> {
        match self {
            Self::Csv { .. } => Ok(Vec::new()),
            Self::Parquet(groups) => groups.footer(),
        }
    }

    /// What a file begins with.
    pub fn head(&self) -> &'static [u8] {
        match self {
            Self::Csv { device_time: false } => b"time,device,sensor,unit,value\n",
            Self::Csv { device_time: true } => b"time,device,sensor,unit,value,device_time\n",
            Self::Parquet(_) => parquet::MAGIC,
        }
    }

    /// Takes rows; returns what is to be written of them now.
    pub fn take(&mut self, rows: &Rows) -> Result<Vec<u8>, Failure> {
        match self {
            Self::Csv { device_time } => csv_lines(rows, *device_time),
            Self::Parquet(groups) => {
                groups.take(rows);
                Ok(Vec::new())
            }
        }
    }

    /// What is still to be written of the rows that were taken, at this place of the file.
    pub fn flush(&mut self, at: u64) -> Result<Vec<u8>, Failure> {
        match self {
            Self::Csv { .. } => Ok(Vec::new()),
            Self::Parquet(groups) => groups.flush(at),
        }
    }

    /// What a file ends with.
    pub fn tail(&self) -> Result<Vec<u8>, Failure> {
        self.save()
    }
}

fn csv_lines(rows: &Rows, device_time: bool) -> Result<Vec<u8>, Failure> {
    let mut lines = csv::Writer::from_writer(Vec::new());
    for (row, &time) in rows.times.iter().enumerate() {
        let value = rows.values.get(row).expect("as many values as times");
        let own = device_time.then(|| print::time(rows.device_times[row]));
        let columns = [&print::time(time), &rows.device, &rows.sensor, &rows.unit, &print::value(&value)];
        lines.write_record(columns.into_iter().chain(&own))?;
    }
    Ok(lines.into_inner().map_err(|error| error.into_error())?)
}
