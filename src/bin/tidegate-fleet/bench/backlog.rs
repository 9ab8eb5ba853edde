//! Whether acknowledgements of live readings take longer while other devices flush what they kept during an outage.

use super::{
    arguments::{Backlog, Store},
    call,
    latency::Quantiles,
    link::{Links, Measured, Pace},
    pool::{Pool, Shape},
    process,
    server::{DataDir, Server, Setup},
    upload::Uploaders,
};
use anyhow::bail;
use serde::Serialize;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// The connections of the live devices.
const LIVE_CONNECTIONS: u32 = 50;
/// How long the live devices have to open their links.
const WARM_UP: Duration = Duration::from_secs(3);
/// How often to say how long acknowledgements take, as flushing a backlog takes minutes.
const TOLD_EVERY: Duration = Duration::from_secs(5);
/// Longer than any run.
const FOREVER: Duration = Duration::from_secs(86_400);
/// Where the numbers of the devices with a backlog begin.
const BACKLOG_DEVICES_FROM: u32 = 50_000;

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub machine: String,
    pub store: Store,
    pub batch: u32,
    pub live_devices: u32,
    /// Batches per second of all of them.
    pub live_rate: u32,
    pub backlog_devices: u32,
    pub backlog_batches_each: u64,
    /// Readings per second of the backlog.
    pub backlog_rate: f64,
    pub alone: Quantiles,
    pub beside_backlog: Quantiles,
}

impl Outcome {
    /// The table of the documentation.
    pub fn to_markdown(&self) -> String {
        let Self { machine, store, batch, live_devices, live_rate, backlog_devices, backlog_batches_each, backlog_rate, .. } = self;
        format!(
            "Measured on {machine}; {}, batches of {batch}; {live_devices} live devices with {live_rate} batches/s together, {backlog_devices} devices with {backlog_batches_each} batches each, which were flushed at {:.2} M readings/s.\n\n| live acknowledgements | samples | p50, ms | p99, ms | max, ms |\n|---|---|---|---|---|\n{}{}\nThe p99 beside the backlog is {:.1} times that without it.\n",
            store.name(),
            backlog_rate / 1e6,
            self.alone.to_row("alone"),
            self.beside_backlog.to_row("beside the backlog"),
            self.beside_backlog.p99_us as f64 / self.alone.p99_us.max(1) as f64,
        )
    }
}

pub async fn run(arguments: &Backlog) -> anyhow::Result<Outcome> {
    let Backlog { batch, live_devices, live_rate, devices, batches, duration, store, common } = arguments;
    let data = DataDir::new(common.data_dir.as_deref())?;
    // By its own settings it tells the two apart.
    let setup = Setup { judges_age: true, ..common.gateway(*store)? };
    let server = Server::start(&setup, data.path()).await?;
    let shape = Shape::of(*batch as usize);
    let live_channels = call::connect(&server.endpoint()?, LIVE_CONNECTIONS.min(*live_devices)).await?;
    let mut live = Links::new(Arc::new(Pool::of_now(shape)), &live_channels, *live_devices);
    let pace = Pace::Rate(f64::from(*live_rate) * shape.readings() as f64);

    // One run for all of it, as the opening of links is not what is measured.
    let measured = Arc::new(Measured::new());
    let live = tokio::spawn({
        let measured = measured.clone();
        async move { live.run(FOREVER, pace, &measured).await }
    });
    tokio::time::sleep(WARM_UP).await;
    measured.take();
    tokio::time::sleep(*duration).await;
    let alone = Quantiles::of(&measured.take());
    eprint!("{}", alone.to_row("alone"));

    let channels = call::connect(&server.endpoint()?, *devices).await?;
    let mut uploaders = Uploaders::numbered(Arc::new(Pool::new(shape)), &channels, BACKLOG_DEVICES_FROM..BACKLOG_DEVICES_FROM + devices);
    let mut beside_backlog = measured.take();
    let flushed = {
        let mut flushing = std::pin::pin!(uploaders.send_each(*batches));
        let began = Instant::now();
        loop {
            let flushed = tokio::time::timeout(TOLD_EVERY, &mut flushing).await;
            let latest = measured.take();
            beside_backlog.add(&latest)?;
            match flushed {
                Ok(flushed) => break flushed?,
                Err(_) => eprint!("{}", Quantiles::of(&latest).to_row(&format!("{:.0} s", began.elapsed().as_secs_f64()))),
            }
        }
    };
    let beside_backlog = Quantiles::of(&beside_backlog);
    if live.is_finished() {
        live.await??;
        bail!("the live devices ended before the backlog was flushed");
    }
    live.abort();
    Ok(Outcome {
        machine: process::machine(),
        store: *store,
        batch: *batch,
        live_devices: *live_devices,
        live_rate: *live_rate,
        backlog_devices: *devices,
        backlog_batches_each: *batches,
        backlog_rate: flushed.rate(),
        alone,
        beside_backlog,
    })
}
