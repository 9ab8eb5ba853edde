//! How long acknowledgements take at parts of the highest rate, up to half of it, beside what the disk takes for a sync.

use super::{
    arguments::{Fleet, Latency, Store},
    call,
    link::{Links, Measured, Pace},
    pool::{Pool, Shape},
    process,
    server::{DataDir, Server},
};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::{fs::File, io::Write, path::Path, sync::Arc, sync::atomic::Ordering::Relaxed, time::Duration};
use tokio::time::Instant;

/// At which shares of the highest rate.
const SHARES: [f64; 4] = [0.05, 0.1, 0.25, 0.5];
/// Each rate is measured in so many parts, with the disk's syncs between them.
const PARTS: u32 = 5;
/// For how long the disk is measured each time.
const SYNC_DURATION: Duration = Duration::from_secs(1);
/// What is written before each sync: a page.
const SYNC_BYTES: usize = 4 << 10;

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub machine: String,
    pub store: Store,
    pub batch: u32,
    pub connections: u32,
    /// Readings per second when each device sends as fast as it is acknowledged.
    pub rate_max: f64,
    /// From the lowest rate to half of the highest.
    pub acknowledgements: Vec<Acknowledgements>,
    pub disk_sync: Quantiles,
}

/// Latencies at one rate.
#[derive(Debug, Serialize)]
pub struct Acknowledgements {
    /// Readings per second that were acknowledged.
    pub rate: f64,
    pub latency: Quantiles,
}

/// In microseconds.
#[derive(Debug, Serialize)]
pub struct Quantiles {
    pub samples: u64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

impl Quantiles {
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile);
        Self { samples: histogram.len(), p50_us: at(0.5), p99_us: at(0.99), max_us: histogram.max() }
    }

    /// As a row of a table.
    pub fn to_row(&self, what: &str) -> String {
        let ms = |us: u64| us as f64 / 1e3;
        format!("| {what} | {} | {:.3} | {:.3} | {:.3} |\n", self.samples, ms(self.p50_us), ms(self.p99_us), ms(self.max_us))
    }
}

impl Outcome {
    /// The table of the documentation.
    pub fn to_markdown(&self) -> String {
        let Self { machine, store, batch, connections, rate_max, .. } = self;
        let rows: String = self
            .acknowledgements
            .iter()
            .map(|Acknowledgements { rate, latency }| {
                latency.to_row(&format!("acknowledgement at {:.2} M/s, {:.0} % of the highest rate", rate / 1e6, 100.0 * rate / rate_max))
            })
            .collect();
        let p99_us = self.acknowledgements.last().map_or(0, |half| half.latency.p99_us);
        format!(
            "Measured on {machine}; {}, batches of {batch}, {connections} connections; Connect streams reach {:.2} M readings/s.\n\n| | samples | p50, ms | p99, ms | max, ms |\n|---|---|---|---|---|\n{rows}{}\nThe acknowledgement's p99 at half of the highest rate is {:.1} times that of the sync.\n",
            store.name(),
            rate_max / 1e6,
            self.disk_sync.to_row("write and fdatasync of 4 KiB"),
            p99_us as f64 / self.disk_sync.p99_us.max(1) as f64,
        )
    }
}

pub async fn run(arguments: &Latency) -> anyhow::Result<Outcome> {
    let Latency { fleet, duration, common } = arguments;
    let data = DataDir::new(common.data_dir.as_deref())?;
    let server = Server::start(&common.gateway(fleet.store)?, data.path()).await?;
    let channels = call::connect(&server.endpoint()?, fleet.connections).await?;
    let pool = Arc::new(Pool::new(Shape::of(fleet.batch as usize)));
    let mut links = Links::new(pool, &channels, fleet.devices);

    links.run(*duration / 10, Pace::Max, &Arc::new(Measured::new())).await?;
    let fastest = Arc::new(Measured::new());
    let took = links.run(*duration, Pace::Max, &fastest).await?;
    let rate_max = fastest.readings.load(Relaxed) as f64 / took.as_secs_f64();

    let mut syncs = Histogram::new_with_bounds(1, 600_000_000, 3)?;
    let mut acknowledgements = Vec::with_capacity(SHARES.len());
    for share in SHARES {
        let (measured, mut took) = (Arc::new(Measured::new()), Duration::ZERO);
        for _ in 0..PARTS {
            sync_for(SYNC_DURATION, data.path(), &mut syncs)?;
            took += links.run(*duration / PARTS, Pace::Rate(rate_max * share), &measured).await?;
        }
        let rate = measured.readings.load(Relaxed) as f64 / took.as_secs_f64();
        let latency = Quantiles::of(&measured.latencies_us.lock());
        acknowledgements.push(Acknowledgements { rate, latency });
    }
    let Fleet { batch, connections, store, .. } = *fleet;
    let disk_sync = Quantiles::of(&syncs);
    Ok(Outcome { machine: process::machine(), store, batch, connections, rate_max, acknowledgements, disk_sync })
}

/// Appends to a file and syncs it, again and again.
fn sync_for(duration: Duration, directory: &Path, took_us: &mut Histogram<u64>) -> anyhow::Result<()> {
    let path = directory.join("sync-probe");
    let mut file = File::create(&path)?;
    let began = Instant::now();
    while began.elapsed() < duration {
        let write_began = Instant::now();
        file.write_all(&[0; SYNC_BYTES])?;
        file.sync_data()?;
        took_us.saturating_record(write_began.elapsed().as_micros() as u64);
    }
    Ok(std::fs::remove_file(&path)?)
}
