//! The command line of the benchmarks.

use super::server::{Kind, Setup};
use crate::{Usage, cli::duration};
use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use std::{path::PathBuf, time::Duration};

/// Without a mode: throughput for sizes of batches and numbers of connections.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Bench {
    #[command(subcommand)]
    pub mode: Option<Mode>,
    #[command(flatten)]
    pub matrix: Matrix,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Subcommand)]
pub enum Mode {
    /// How long acknowledgements take at parts of the highest rate, up to half of it, beside the disk's own sync.
    Latency(Latency),
    /// Whether the rate of the last tenth of a long run is that of the first.
    Soak(Soak),
    /// A fixed rate for a while, and what memory it takes.
    Paced(Paced),
    /// One day of one sensor out of many, beside a plain SQLite table.
    Query(Query),
    /// How many bytes a reading takes when it is merged.
    Rest(Rest),
    /// Whether acknowledgements of live readings take longer while other devices flush a backlog.
    Backlog(Backlog),
    /// What open connections cost that say nothing, and how all come back when the gateway was killed.
    Idle(Idle),
}

/// What all modes have.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Where the servers keep their data, each in a directory of its own that is removed afterwards. Default: where temporary files go.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// The database of the gateways on PostgreSQL: one made for this, as what is stored in it stays.
    #[arg(long, value_name = "URL")]
    pub postgres_url: Option<String>,
    /// Start the gateway under this command, such as a profiler.
    #[arg(long, value_delimiter = ' ', value_name = "COMMAND")]
    pub under: Vec<String>,
    /// Print the result as one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
    /// Write the result into this directory's PERFORMANCE.md, between the markers of its section, and performance.svg.
    #[arg(long, value_name = "DIR")]
    pub write_docs: Option<PathBuf>,
}

impl Common {
    /// The gateway, with its default settings.
    pub fn gateway(&self, store: Store) -> anyhow::Result<Setup> {
        let flags = match store {
            Store::Sqlite => Vec::new(),
            Store::Postgres => {
                let url = self.postgres_url.as_ref().ok_or_else(|| Usage("--store postgres needs --postgres-url".to_owned()))?;
                vec![format!("--storage-url={url}")]
            }
        };
        Ok(Setup { flags, under: self.under.clone(), ..Setup::of(Kind::Gateway) })
    }
}

#[derive(Debug, Clone, Args)]
pub struct Matrix {
    /// Readings in a batch.
    #[arg(long, value_delimiter = ',', default_value = "1,10,100,1000", value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N,…")]
    pub batch: Vec<u32>,
    /// Connections that the devices share.
    #[arg(long, value_delimiter = ',', default_value = "1,100,1000", value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "N,…")]
    pub connections: Vec<u32>,
    /// Devices, each with a call of its own.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "N")]
    pub devices: u32,
    /// How often each of the two servers has its turn.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=1_000), value_name = "N")]
    pub slices: u32,
    /// For how long.
    #[arg(long, default_value = "2s", value_parser = duration, value_name = "DURATION")]
    pub slice_duration: Duration,
    /// Where the gateway stores.
    #[arg(long, value_enum, default_value = "sqlite", value_name = "STORE")]
    pub store: Stores,
    /// Compare the gateway on a disk whose sync takes so much longer with the gateway without that delay.
    #[arg(long, conflicts_with = "certificate_file", value_parser = duration, value_name = "DURATION")]
    pub slow_sync: Option<Duration>,
    /// Compare the gateway with itself without the layers around its services.
    #[arg(long, conflicts_with_all = ["slow_sync", "certificate_file"])]
    pub bare: bool,
    // Compares the gateway with itself without TLS.
    #[command(flatten)]
    pub tls: Tls,
}

/// Whether the gateway speaks TLS.
#[derive(Debug, Clone, Args)]
pub struct Tls {
    /// Speak TLS: the gateway's certificate for localhost, PEM. The devices trust it, so it is signed by itself. `bench` then compares the gateway with itself without TLS.
    #[arg(long, requires = "key_file", value_name = "FILE")]
    certificate_file: Option<PathBuf>,
    /// The certificate's private key, PEM.
    #[arg(long, requires = "certificate_file", value_name = "FILE")]
    key_file: Option<PathBuf>,
}

impl Tls {
    pub fn is_on(&self) -> bool {
        self.certificate_file.is_some()
    }

    /// Has the gateway speak TLS, if it is to, and the devices trust it.
    pub fn apply(&self, setup: &mut Setup) -> anyhow::Result<()> {
        let Some((certificate, key)) = self.certificate_file.as_deref().zip(self.key_file.as_deref()) else { return Ok(()) };
        let flags = [("certificate", certificate), ("key", key)].map(|(what, file)| format!("--tls-{what}-file={}", file.display()));
        setup.flags.extend(flags);
        setup.authority = Some(std::fs::read(certificate).with_context(|| format!("cannot read {}", certificate.display()))?);
        Ok(())
    }
}

/// What the gateway is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    NullSink,
    /// Itself, without the delay of its syncs.
    WithoutDelay,
    /// Itself, without the layers around its services.
    Bare,
    /// Itself, without TLS.
    WithoutTls,
}

impl Reference {
    /// As it is written in text.
    pub fn name(self) -> &'static str {
        match self {
            Self::NullSink => "null sink",
            Self::WithoutDelay => "without the delay",
            Self::Bare => "without layers",
            Self::WithoutTls => "without TLS",
        }
    }

    /// The section of PERFORMANCE.md.
    pub fn section(self) -> &'static str {
        match self {
            Self::NullSink => "throughput",
            Self::WithoutDelay => "slow-sync",
            Self::Bare => "layers",
            Self::WithoutTls => "tls",
        }
    }
}

impl Matrix {
    /// What the gateway is compared with.
    pub fn reference(&self) -> Reference {
        match (self.slow_sync, self.bare, self.tls.is_on()) {
            (Some(_), _, _) => Reference::WithoutDelay,
            (None, true, _) => Reference::Bare,
            (None, false, true) => Reference::WithoutTls,
            (None, false, false) => Reference::NullSink,
        }
    }
}

/// Which databases are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stores {
    Sqlite,
    Postgres,
    Both,
}

impl Stores {
    /// One after the other.
    pub fn each(self) -> Vec<Store> {
        match self {
            Self::Sqlite => vec![Store::Sqlite],
            Self::Postgres => vec![Store::Postgres],
            Self::Both => vec![Store::Sqlite, Store::Postgres],
        }
    }
}

/// A database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Store {
    Sqlite,
    Postgres,
}

impl Store {
    /// As it is written in text.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sqlite => "SQLite",
            Self::Postgres => "PostgreSQL",
        }
    }
}

/// The devices of a mode that measures one combination.
#[derive(Debug, Clone, Args)]
pub struct Fleet {
    /// Readings in a batch.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N")]
    pub batch: u32,
    /// Connections that the devices share.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "N")]
    pub connections: u32,
    /// Devices, each with a call of its own.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "N")]
    pub devices: u32,
    /// Where the gateway stores.
    #[arg(long, value_enum, default_value = "sqlite", value_name = "STORE")]
    pub store: Store,
}

#[derive(Debug, Clone, Args)]
pub struct Latency {
    #[command(flatten)]
    pub fleet: Fleet,
    /// For how long each of the rates is measured.
    #[arg(long, default_value = "20s", value_parser = duration, value_name = "DURATION")]
    pub duration: Duration,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Clone, Args)]
pub struct Soak {
    /// How many readings in all.
    #[arg(default_value_t = 200_000_000, value_parser = clap::value_parser!(u64).range(1_000_000..), value_name = "READINGS")]
    pub readings: u64,
    #[command(flatten)]
    pub fleet: Fleet,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Clone, Args)]
pub struct Paced {
    /// Readings per second.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..), value_name = "R")]
    pub rate: u64,
    /// For how long.
    #[arg(long, default_value = "10m", value_parser = duration, value_name = "DURATION")]
    pub duration: Duration,
    #[command(flatten)]
    pub fleet: Fleet,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Clone, Args)]
pub struct Idle {
    /// How many connections, each with a link of its own. Both programs need a file descriptor for each: the hard limit counts.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N")]
    pub connections: u32,
    /// Kill the gateway and start it again, so that all come back at once.
    #[arg(long)]
    pub storm: bool,
    #[command(flatten)]
    pub tls: Tls,
    #[command(flatten)]
    pub common: Common,
}

impl Idle {
    /// The section of PERFORMANCE.md.
    pub fn section(&self) -> &'static str {
        if self.tls.is_on() { "idle-tls" } else { "idle" }
    }
}

#[derive(Debug, Clone, Args)]
pub struct Backlog {
    /// Readings in a batch.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N")]
    pub batch: u32,
    /// Devices that send what they measure.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "N")]
    pub live_devices: u32,
    /// Batches per second of all of them together.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "R")]
    pub live_rate: u32,
    /// Devices that flush a backlog, each on a connection of its own.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "N")]
    pub devices: u32,
    /// How many batches each of them has.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..), value_name = "N")]
    pub batches: u64,
    /// For how long the live devices are measured without the backlog.
    #[arg(long, default_value = "20s", value_parser = duration, value_name = "DURATION")]
    pub duration: Duration,
    /// Where the gateway stores.
    #[arg(long, value_enum, default_value = "sqlite", value_name = "STORE")]
    pub store: Store,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Clone, Args)]
pub struct Query {
    /// How many readings are stored.
    #[arg(long, default_value_t = 100_000_000, value_parser = clap::value_parser!(u64).range(1_000_000..), value_name = "N")]
    pub readings: u64,
    /// How many readings the plain table holds, of as many sensors as make that many; they are put in in the order of its key, its best case.
    #[arg(long, default_value_t = 20_000_000, value_parser = clap::value_parser!(u64).range(100_000..), value_name = "N")]
    pub table_readings: u64,
    /// How often each of the two answers.
    #[arg(long, default_value_t = 51, value_parser = clap::value_parser!(u32).range(1..=10_000), value_name = "N")]
    pub repeats: u32,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Clone, Args)]
pub struct Rest {
    /// How many readings are stored.
    #[arg(long, default_value_t = 20_000_000, value_parser = clap::value_parser!(u64).range(1_000_000..), value_name = "N")]
    pub readings: u64,
    /// Where the gateway stores.
    #[arg(long, value_enum, default_value = "sqlite", value_name = "STORE")]
    pub store: Stores,
    #[command(flatten)]
    pub common: Common,
}
