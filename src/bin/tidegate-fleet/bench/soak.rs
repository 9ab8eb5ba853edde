//! Long runs: whether the rate holds as data grows, and whether memory does at a fixed rate.

use super::{
    arguments::{Paced, Soak, Store},
    call,
    link::{Links, Measured, Pace},
    pool::{Pool, Shape},
    process,
    report::mib,
    server::{DataDir, Server},
    upload::Uploaders,
};
use serde::Serialize;
use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use tokio::time::Instant;

const SLICE_DURATION: Duration = Duration::from_secs(2);
const SHOWN_INTERVAL: Duration = Duration::from_secs(10);
/// The gateway's metric of what waits to be merged.
const UNMERGED: &str = "tidegate_unmerged_entries";

/// How things stood at some time.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    pub seconds: f64,
    /// Readings acknowledged so far.
    pub readings: u64,
    pub resident_bytes: u64,
    /// `None` when the gateway does not say.
    pub unmerged_entries: Option<f64>,
    /// All files of the data directory.
    pub disk_bytes: u64,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub machine: String,
    pub store: Store,
    pub batch: u32,
    pub readings: u64,
    /// Readings per second over all.
    pub rate: f64,
    /// Of the first and the last tenth.
    pub rate_first_tenth: f64,
    pub rate_last_tenth: f64,
    pub resident_peak_bytes: u64,
    pub samples: Vec<Sample>,
}

impl Outcome {
    /// The table of the documentation.
    pub fn to_markdown(&self, what: &str) -> String {
        let mut text = format!(
            "Measured on {}; {}, batches of {}: {what}. {:.1} million readings at {:.2} M/s; the first tenth {:.2} M/s, the last {:.2} M/s ({:+.0} %). RSS peak {:.0} MiB.\n\n| after, s | readings, millions | RSS, MiB | unmerged entries | on disk, bytes a reading |\n|---|---|---|---|---|\n",
            self.machine,
            self.store.name(),
            self.batch,
            self.readings as f64 / 1e6,
            self.rate / 1e6,
            self.rate_first_tenth / 1e6,
            self.rate_last_tenth / 1e6,
            (self.rate_last_tenth / self.rate_first_tenth - 1.0) * 100.0,
            mib(self.resident_peak_bytes),
        );
        // Ten are enough to see whether something grows.
        let step = self.samples.len().div_ceil(10).max(1);
        self.samples.iter().skip(step - 1).step_by(step).for_each(|sample| text += &sample.to_row());
        text
    }
}

impl Sample {
    fn to_row(&self) -> String {
        let unmerged = self.unmerged_entries.map_or("–".to_owned(), |batches| format!("{batches:.0}"));
        let per_reading = self.disk_bytes as f64 / self.readings.max(1) as f64;
        format!(
            "| {:.0} | {:.1} | {:.0} | {unmerged} | {per_reading:.1} |\n",
            self.seconds,
            self.readings as f64 / 1e6,
            mib(self.resident_bytes)
        )
    }
}

/// A gateway that is looked at now and then.
struct Watched {
    server: Server,
    data: DataDir,
    began: Instant,
    samples: Vec<Sample>,
    shown: bool,
}

impl Watched {
    fn new(server: Server, data: DataDir, shown: bool) -> Self {
        Self { server, data, began: Instant::now(), samples: Vec::new(), shown }
    }

    async fn look(&mut self, readings: u64) -> anyhow::Result<()> {
        let sample = Sample {
            seconds: self.began.elapsed().as_secs_f64(),
            readings,
            resident_bytes: self.server.usage()?.resident_bytes,
            unmerged_entries: self.server.metric(UNMERGED).await?,
            disk_bytes: self.data.bytes()?,
        };
        if self.shown {
            print!("{}", sample.to_row());
        }
        self.samples.push(sample);
        Ok(())
    }

    /// The rate between two shares of the run, by the samples around them.
    fn rate_between(&self, from: f64, to: f64) -> f64 {
        let (Some(first), Some(last)) = (self.samples.first(), self.samples.last()) else { return 0.0 };
        let at = |share: f64| first.readings as f64 + share * (last.readings - first.readings) as f64;
        let before = self.samples.iter().rfind(|sample| sample.readings as f64 <= at(from)).unwrap_or(first);
        let behind = self.samples.iter().find(|sample| sample.readings as f64 >= at(to)).unwrap_or(last);
        (behind.readings - before.readings) as f64 / (behind.seconds - before.seconds).max(f64::EPSILON)
    }

    fn outcome(self, store: Store, batch: u32) -> anyhow::Result<Outcome> {
        Ok(Outcome {
            machine: process::machine(),
            store,
            batch,
            readings: self.samples.last().map_or(0, |sample| sample.readings),
            rate: self.rate_between(0.0, 1.0),
            rate_first_tenth: self.rate_between(0.0, 0.1),
            rate_last_tenth: self.rate_between(0.9, 1.0),
            resident_peak_bytes: self.server.usage()?.resident_peak_bytes,
            samples: self.samples,
        })
    }
}

/// As fast as it goes, until so many readings are stored.
pub async fn soak(arguments: &Soak) -> anyhow::Result<Outcome> {
    let Soak { readings, fleet, common } = arguments;
    let data = DataDir::new(common.data_dir.as_deref())?;
    let server = Server::start(&common.gateway(fleet.store)?, data.path()).await?;
    let channels = call::connect(&server.endpoint()?, fleet.connections).await?;
    let pool = Arc::new(Pool::new(Shape::of(fleet.batch as usize)));
    let mut uploaders = Uploaders::new(pool, &channels, fleet.devices);
    let mut stored = uploaders.run(SLICE_DURATION / 4).await?.readings;
    let mut watched = Watched::new(server, data, !common.json);
    watched.look(stored).await?;
    // At least one slice behind the first, which also made the connections and registered the devices.
    while stored < *readings || watched.samples.len() < 2 {
        stored += uploaders.run(SLICE_DURATION).await?.readings;
        watched.look(stored).await?;
    }
    watched.outcome(fleet.store, fleet.batch)
}

/// At a fixed rate for a while.
pub async fn paced(arguments: &Paced) -> anyhow::Result<Outcome> {
    let Paced { rate, duration, fleet, common } = arguments;
    let data = DataDir::new(common.data_dir.as_deref())?;
    let server = Server::start(&common.gateway(fleet.store)?, data.path()).await?;
    let channels = call::connect(&server.endpoint()?, fleet.connections).await?;
    let pool = Arc::new(Pool::new(Shape::of(fleet.batch as usize)));
    let mut links = Links::new(pool, &channels, fleet.devices);
    let measured = Arc::new(Measured::new());
    let mut watched = Watched::new(server, data, !common.json);
    watched.look(0).await?;
    let mut ticks = tokio::time::interval_at(Instant::now() + SHOWN_INTERVAL, SHOWN_INTERVAL);
    {
        let mut run = std::pin::pin!(links.run(*duration, Pace::Rate(*rate as f64), &measured));
        loop {
            tokio::select! {
                ended = &mut run => {
                    ended?;
                    break;
                }
                _ = ticks.tick() => watched.look(measured.readings.load(Relaxed)).await?,
            }
        }
    }
    watched.look(measured.readings.load(Relaxed)).await?;
    watched.outcome(fleet.store, fleet.batch)
}
