//! How long acknowledgements take at half of the highest rate, beside what the disk takes for a sync.

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

/// The rate is measured in so many parts, with the disk's syncs between them.
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
    /// Readings per second while latencies were measured.
    pub rate: f64,
    pub acknowledgement: Quantiles,
    pub disk_sync: Quantiles,
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
        let Self { machine, store, batch, connections, rate_max, rate, .. } = self;
        let ratio = self.acknowledgement.p99_us as f64 / self.disk_sync.p99_us.max(1) as f64;
        format!(
            "Measured on {machine}; {}, batches of {batch}, {connections} connections, {:.2} M readings/s, half of the {:.2} that Connect streams reach.\n\n| | samples | p50, ms | p99, ms | max, ms |\n|---|---|---|---|---|\n{}{}\nThe acknowledgement's p99 is {ratio:.1} times that of the sync.\n",
            store.name(),
            rate / 1e6,
            rate_max / 1e6,
            self.acknowledgement.to_row("acknowledgement"),
            self.disk_sync.to_row("write and fdatasync of 4 KiB"),
        )
    }
}

pub async fn run(arguments: &Latency) -> anyhow::Result<Outcome> {
    let Latency { fleet, duration, common } = arguments;
    let data = DataDir::new(common.data_dir.as_deref())?;
    let server = Server::start(&common.gateway(fleet.store)?, data.path()).await?;
    let channels = call::connect(&server.endpoint(), fleet.connections).await?;
    let pool = Arc::new(Pool::new(Shape::of(fleet.batch as usize)));
    let mut links = Links::new(pool, &channels, fleet.devices);

    links.run(*duration / 10, Pace::Max, &Arc::new(Measured::new())).await?;
    let fastest = Arc::new(Measured::new());
    let took = links.run(*duration, Pace::Max, &fastest).await?;
    let rate_max = fastest.readings.load(Relaxed) as f64 / took.as_secs_f64();

    let half = Arc::new(Measured::new());
    let mut syncs = Histogram::new_with_bounds(1, 600_000_000, 3)?;
    let mut took = Duration::ZERO;
    for _ in 0..PARTS {
        sync_for(SYNC_DURATION, data.path(), &mut syncs)?;
        took += links.run(*duration / PARTS, Pace::Rate(rate_max / 2.0), &half).await?;
    }
    let rate = half.readings.load(Relaxed) as f64 / took.as_secs_f64();
    let acknowledgement = Quantiles::of(&half.latencies_us.lock());
    let Fleet { batch, connections, store, .. } = *fleet;
    let disk_sync = Quantiles::of(&syncs);
    Ok(Outcome { machine: process::machine(), store, batch, connections, rate_max, rate, acknowledgement, disk_sync })
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
