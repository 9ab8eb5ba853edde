//! The command line.

use crate::{bench::Bench, recording::TimeFormat, reference::Reference};
use clap::{Args, Parser, Subcommand};
use jiff::SignedDuration;
use std::{path::PathBuf, time::Duration};
use tidegate::{cli::CredentialArgs, model::DeviceId};
use uuid::Uuid;

/// Simulated and replayed devices for a Tidegate gateway.
///
/// Exit code 0: everything was acknowledged, nothing was rejected, and what was verified is right. 1: something of that is
/// not so. 2: wrong usage.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Lets a number of made-up devices send for a while.
    Simulate(Simulate),
    /// Sends a recording, a CSV file, as a device.
    Replay(Replay),
    /// Measures the gateway that is built beside this program.
    Bench(Box<Bench>),
    /// Runs a server that checks and acknowledges batches as a gateway does, and throws them away.
    #[command(hide = true)]
    NullSink(Reference),
    /// Runs a gateway without the layers around its services.
    #[command(hide = true)]
    Bare(Reference),
}

/// What both have.
#[derive(Debug, Args)]
pub struct Common {
    /// The gateway.
    #[arg(long, env = "TIDEGATE_ENDPOINT", default_value = "http://127.0.0.1:50051", value_name = "URL")]
    pub endpoint: String,
    #[command(flatten)]
    pub credentials: CredentialArgs,
    /// Read everything back afterwards, and compare it with what was sent.
    #[arg(long)]
    pub verify: bool,
    /// Print the summary as one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
    /// No progress on standard error.
    #[arg(long)]
    pub quiet: bool,
    /// How long to wait for the last acknowledgements.
    #[arg(long, default_value = "60s", value_parser = duration, value_name = "DURATION")]
    pub drain_timeout: Duration,
}

#[derive(Debug, Args)]
pub struct Simulate {
    /// How many devices.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N")]
    pub devices: u32,
    /// For how long they measure; such as 60s or "1h 30m".
    #[arg(long, default_value = "60s", value_parser = duration, value_name = "DURATION")]
    pub duration: Duration,
    /// How often each device samples its six sensors.
    #[arg(long, default_value = "1s", value_parser = duration, value_name = "DURATION")]
    pub interval: Duration,
    /// The most readings in a batch. A batch is sent when it has so many, but no later than with the first row that is 5 s
    /// after the batch's first; so at an interval of 1s a batch has 5 rows, and at 5s or more each row is sent at once.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "READINGS")]
    pub batch: u32,
    /// How many connections the devices share. Default: one for every 250 devices.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "C")]
    pub connections: Option<u32>,
    /// The same seed gives the same devices and the same values; times begin with the run.
    #[arg(long, default_value_t = 1, value_name = "S")]
    pub seed: u64,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Args)]
pub struct Replay {
    /// The device's id.
    #[arg(long, value_parser = DeviceId::parse, value_name = "NAME")]
    pub device: DeviceId,
    /// The recording: a CSV file with a header. Times are ISO 8601, UTC where they name no zone, or counts since
    /// 1970-01-01T00:00:00Z. Empty cells, and NaN, NA and null, are missing values.
    #[arg(long, value_name = "FILE")]
    pub csv: PathBuf,
    /// The column with the times: its name, or its number from 1. Default: the first that holds times.
    #[arg(long, value_name = "COLUMN")]
    pub time_column: Option<String>,
    /// How times are written. Default: guessed from the first.
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub time_format: Option<TimeFormat>,
    /// The columns to send: names separated by commas. Default: all others whose first rows hold numbers.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub sensor_columns: Vec<String>,
    /// What stands between columns. Default: guessed from the header.
    #[arg(long, value_parser = delimiter, value_name = "CHARACTER")]
    pub delimiter: Option<u8>,
    /// The columns' units, as SenML symbols: name=unit, separated by commas.
    #[arg(long, value_delimiter = ',', value_parser = unit, value_name = "NAME=UNIT")]
    pub units: Vec<(String, String)>,
    /// How fast: `max`, or a factor to the recorded times such as 1x or 60x.
    #[arg(long, default_value = "max", value_parser = speed, value_name = "SPEED")]
    pub speed: Speed,
    /// The most readings in a batch. Default: 100; with another speed than max, each row is a batch of its own.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "READINGS")]
    pub batch: Option<u32>,
    /// The stream id. Default: one that is derived from the device, the file, the columns and the batch size, so that
    /// the same replay again adds nothing.
    #[arg(long, value_name = "UUID")]
    pub stream_id: Option<Uuid>,
    /// A new stream id: everything is stored once more.
    #[arg(long, conflicts_with = "stream_id")]
    pub new_stream: bool,
    /// Send all of it, also what the gateway has already: it counts that as duplicates and stores nothing twice. Only with
    /// --speed max, and without --queue.
    #[arg(long, conflicts_with = "queue")]
    pub resend: bool,
    /// Keep the local queue in this SQLite file: a replay that was interrupted goes on where it was.
    #[arg(long, conflicts_with = "new_stream", value_name = "FILE")]
    pub queue: Option<PathBuf>,
    #[command(flatten)]
    pub common: Common,
}

/// How fast a recording is replayed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Speed {
    /// As fast as the gateway takes it.
    Max,
    /// So many times as fast as it was recorded.
    Factor(f64),
}

/// Reads a duration.
pub fn duration(text: &str) -> Result<Duration, String> {
    const MAX: Duration = Duration::from_secs(365 * 24 * 3600);
    let parsed: SignedDuration = text.parse().map_err(|error: jiff::Error| format!("{error}; write it like 60s or \"1h 30m\""))?;
    match Duration::try_from(parsed) {
        Ok(duration) if (Duration::from_millis(1)..=MAX).contains(&duration) => Ok(duration),
        _ => Err("at least 1ms and at most 365 days".to_owned()),
    }
}

fn delimiter(text: &str) -> Result<u8, String> {
    match text.as_bytes() {
        [byte] if byte.is_ascii() && !byte.is_ascii_alphanumeric() => Ok(*byte),
        b"\\t" | b"tab" => Ok(b'\t'),
        _ => Err("one character such as ';', or tab".to_owned()),
    }
}

fn unit(text: &str) -> Result<(String, String), String> {
    let (name, unit) = text.split_once('=').ok_or("write it as NAME=UNIT")?;
    Ok((name.trim().to_owned(), unit.trim().to_owned()))
}

fn speed(text: &str) -> Result<Speed, String> {
    let factor = text.strip_suffix('x').and_then(|factor| factor.parse::<f64>().ok());
    match factor.filter(|factor| factor.is_finite() && *factor > 0.0) {
        Some(factor) => Ok(Speed::Factor(factor)),
        None if text == "max" => Ok(Speed::Max),
        None => Err("max, or a factor such as 1x or 60x".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn values_are_read_or_refused() {
        assert_eq!(duration("1h 30m"), Ok(Duration::from_secs(5_400)));
        assert!(duration("-1s").is_err() && duration("0s").is_err() && duration("soon").is_err());
        assert_eq!(speed("60x"), Ok(Speed::Factor(60.0)));
        assert!(speed("0x").is_err() && speed("fast").is_err());
        assert_eq!((delimiter(";"), delimiter("tab")), (Ok(b';'), Ok(b'\t')));
        assert_eq!(unit("Volume Flow=l/s"), Ok(("Volume Flow".to_owned(), "l/s".to_owned())));
    }
}
