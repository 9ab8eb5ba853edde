//! The gateway beside a null sink, or beside itself without what is to be measured, for sizes of batches and numbers of connections.

use super::{
    arguments::{Common, Matrix, Reference, Store},
    call,
    pool::{Pool, Shape},
    process,
    report::{Report, Side, median},
    server::{DataDir, Kind, Server, Setup},
    slow_sync,
    upload::{Slice, Uploaders},
};
use serde::Serialize;
use std::{sync::Arc, time::Duration};

/// What was measured of one combination.
#[derive(Debug, Serialize)]
pub struct Cell {
    pub store: Store,
    pub batch: u32,
    pub connections: u32,
    pub devices: u32,
    /// The gateway.
    pub gateway: Side,
    /// What it is compared with.
    pub reference: Side,
    /// The gateway's rate by the reference's: the median of neighbouring slices.
    pub ratio: f64,
    /// What the client took of the processors, as a share of one, beside the gateway.
    pub client_cpu_share: f64,
}

pub async fn run(arguments: &Matrix, common: &Common) -> anyhow::Result<Report> {
    let mut cells = Vec::new();
    for store in arguments.store.each() {
        for &batch in &arguments.batch {
            for &connections in &arguments.connections {
                let cell = cell(arguments, common, store, batch, connections).await?;
                if !common.json {
                    cell.show();
                }
                cells.push(cell);
            }
        }
    }
    Ok(Report::new(cells, arguments.reference(), arguments.slow_sync))
}

/// One server with its load.
struct Rig {
    server: Server,
    uploaders: Uploaders,
    slices: Vec<Slice>,
    server_cpu: Duration,
    client_cpu: Duration,
    // Removed after the server has ended.
    _data: DataDir,
}

impl Rig {
    async fn start(setup: &Setup, pool: &Arc<Pool>, fleet: (u32, u32), common: &Common) -> anyhow::Result<Self> {
        let (connections, devices) = fleet;
        let data = DataDir::new(common.data_dir.as_deref())?;
        let server = Server::start(setup, data.path()).await?;
        let channels = call::connect(&server.endpoint()?, connections).await?;
        let uploaders = Uploaders::new(pool.clone(), &channels, devices);
        Ok(Self { server, uploaders, slices: Vec::new(), server_cpu: Duration::ZERO, client_cpu: Duration::ZERO, _data: data })
    }

    /// Registers the devices and their sensors, and fills what is filled once.
    async fn warm_up(&mut self, duration: Duration) -> anyhow::Result<()> {
        self.uploaders.run(duration / 2).await?;
        self.server.pause()
    }

    /// One slice, while the other server stands still.
    async fn slice(&mut self, duration: Duration) -> anyhow::Result<()> {
        self.server.resume()?;
        let (server, client) = (self.server.usage()?.cpu, process::own_usage()?.cpu);
        self.slices.push(self.uploaders.run(duration).await?);
        self.server_cpu += self.server.usage()?.cpu - server;
        self.client_cpu += process::own_usage()?.cpu - client;
        self.server.pause()
    }

    fn side(&self) -> anyhow::Result<Side> {
        let readings: u64 = self.slices.iter().map(|slice| slice.readings).sum();
        let usage = self.server.usage()?;
        Ok(Side {
            rate: median(self.slices.iter().map(Slice::rate)),
            cpu_seconds_per_million: self.server_cpu.as_secs_f64() * 1e6 / readings as f64,
            resident_bytes: usage.resident_bytes,
            resident_peak_bytes: usage.resident_peak_bytes,
        })
    }

    fn client_cpu_share(&self) -> f64 {
        self.client_cpu.as_secs_f64() / self.slices.iter().map(|slice| slice.elapsed.as_secs_f64()).sum::<f64>()
    }
}

async fn cell(arguments: &Matrix, common: &Common, store: Store, batch: u32, connections: u32) -> anyhow::Result<Cell> {
    let pool = Arc::new(Pool::new(Shape::of(batch as usize)));
    let mut gateway = common.gateway(store)?;
    let reference = match arguments.reference() {
        Reference::NullSink => Setup::of(Kind::NullSink),
        Reference::WithoutDelay | Reference::WithoutTls => gateway.clone(),
        Reference::Bare => Setup { kind: Kind::Bare, ..gateway.clone() },
    };
    let library = arguments.slow_sync.map(slow_sync::Library::build).transpose()?;
    if let Some(library) = &library {
        gateway.preload = library.variables();
    }
    arguments.tls.apply(&mut gateway)?;
    let devices = arguments.devices;
    let mut ours = Rig::start(&gateway, &pool, (connections, devices), common).await?;
    let mut theirs = Rig::start(&reference, &pool, (connections, devices), common).await?;
    ours.warm_up(arguments.slice_duration).await?;
    theirs.warm_up(arguments.slice_duration).await?;
    for _ in 0..arguments.slices {
        ours.slice(arguments.slice_duration).await?;
        theirs.slice(arguments.slice_duration).await?;
    }
    let (gateway, reference) = (ours.side()?, theirs.side()?);
    // Killed and not asked to stop: what it has still to do is of no interest.
    Ok(Cell {
        store,
        batch,
        connections,
        devices,
        gateway,
        reference,
        ratio: ratio_of_neighbours(&ours.slices, &theirs.slices),
        client_cpu_share: ours.client_cpu_share(),
    })
}

/// Each slice by those before and after it of the other server: what the machine does meanwhile changes slowly.
fn ratio_of_neighbours(ours: &[Slice], theirs: &[Slice]) -> f64 {
    let after = ours.iter().zip(theirs);
    let before = ours.iter().skip(1).zip(theirs);
    median(after.chain(before).map(|(our, their)| our.rate() / their.rate()))
}
