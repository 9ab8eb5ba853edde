//! What connections cost that are open and say nothing, each with a Connect stream of its own, and what it is like when all of
//! them come back at once.

use super::{
    arguments::{Idle, Store},
    call, pool, process,
    report::mib,
    server::{DataDir, Server, Setup},
    upload::device_name,
};
use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use http_body::Frame;
use http_body_util::StreamBody;
use parking_lot::Mutex;
use serde::Serialize;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tidegate::{
    app::open_files,
    client::{Backoff, BackoffSettings},
    model::StreamId,
    pb::{self, connect_response::Message},
};
use tokio::{sync::Semaphore, task::JoinSet, time::Instant};
use tonic::{Status, Streaming, transport::Endpoint};

/// How many links are made at once before the storm.
const CONNECTING_MAX: usize = 64;
/// How long to wait for all links.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// How long after the last link memory is looked at: what making them took is done with.
const SETTLE: Duration = Duration::from_secs(3);

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub machine: String,
    pub connections: u32,
    pub tls: bool,
    /// Before the connections, and with them.
    pub resident_before_bytes: u64,
    pub resident_bytes: u64,
    pub bytes_per_connection: f64,
    /// When the gateway was killed and started again.
    pub storm: Option<Storm>,
}

/// How all links came back.
#[derive(Debug, Serialize)]
pub struct Storm {
    /// From the restarted gateway's readiness until so many of the links were there again.
    pub half_seconds: f64,
    pub p99_seconds: f64,
    pub all_seconds: f64,
    /// Tries that failed although the gateway was ready.
    pub failed_tries: u64,
    /// The most memory while they came.
    pub resident_peak_bytes: u64,
}

impl Outcome {
    /// The table of the documentation.
    pub fn to_markdown(&self) -> String {
        let mut text = format!(
            "Measured on {}, {} TLS.\n\n| connections | RSS before, MiB | RSS with them, MiB | KiB a connection |\n|---|---|---|---|\n| {} | {:.1} | {:.1} | **{:.1}** |\n",
            self.machine,
            if self.tls { "with" } else { "without" },
            self.connections,
            mib(self.resident_before_bytes),
            mib(self.resident_bytes),
            self.bytes_per_connection / 1024.0,
        );
        if let Some(storm) = &self.storm {
            text += &format!(
                "\nKilled and started again: half of the links were back {:.1} s after it was ready, 99 % after {:.1} s, all after {:.1} s; {} tries failed meanwhile. RSS peak {:.0} MiB.\n",
                storm.half_seconds,
                storm.p99_seconds,
                storm.all_seconds,
                storm.failed_tries,
                mib(storm.resident_peak_bytes),
            );
        }
        text
    }
}

pub async fn run(arguments: &Idle) -> anyhow::Result<Outcome> {
    let Idle { connections, storm, tls, common } = arguments;
    let files = open_files::raise_limit();
    if files <= u64::from(*connections) {
        bail!("the limit on open files is {files}, and each connection is one: raise the hard limit");
    }
    let data = DataDir::new(common.data_dir.as_deref())?;
    let mut setup = common.gateway(Store::Sqlite)?;
    tls.apply(&mut setup)?;
    let server = Server::start(&setup, data.path()).await?;
    // Links try for ever: what can never be connected to is told here.
    call::connect(&server.endpoint()?, 1).await?;
    let resident_before_bytes = server.usage()?.resident_bytes;
    setup.listen = Some(server.grpc());
    let fleet = Arc::new(Fleet::new(server.endpoint()?));
    let mut links = JoinSet::new();
    for number in 0..*connections {
        links.spawn(fleet.clone().keep_linked(number));
    }
    fleet.all_linked(*connections).await?;
    tokio::time::sleep(SETTLE).await;
    let resident_bytes = server.usage()?.resident_bytes;
    let storm = if *storm { Some(reconnect(server, &setup, &data, &fleet, *connections).await?) } else { None };
    let bytes_per_connection = resident_bytes.saturating_sub(resident_before_bytes) as f64 / f64::from(*connections);
    Ok(Outcome {
        machine: process::machine(),
        connections: *connections,
        tls: tls.is_on(),
        resident_before_bytes,
        resident_bytes,
        bytes_per_connection,
        storm,
    })
}

/// Kills the gateway, starts it again, and waits until all are back.
async fn reconnect(server: Server, setup: &Setup, data: &DataDir, fleet: &Fleet, connections: u32) -> anyhow::Result<Storm> {
    drop(server);
    fleet.linked.lock().clear();
    let server = Server::start(setup, data.path()).await?;
    let (ready, failed_before) = (Instant::now(), fleet.failed_tries.load(Relaxed));
    fleet.all_linked(connections).await?;
    let linked = fleet.linked.lock().clone();
    let after = |share: f64| {
        let index = ((linked.len() - 1) as f64 * share) as usize;
        linked[index].saturating_duration_since(ready).as_secs_f64()
    };
    Ok(Storm {
        half_seconds: after(0.5),
        p99_seconds: after(0.99),
        all_seconds: after(1.0),
        failed_tries: fleet.failed_tries.load(Relaxed) - failed_before,
        resident_peak_bytes: server.usage()?.resident_peak_bytes,
    })
}

/// The devices that keep their links.
struct Fleet {
    endpoint: Endpoint,
    connecting: Semaphore,
    /// When each link was made, in that order.
    linked: Mutex<Vec<Instant>>,
    failed_tries: AtomicU64,
    /// How the last of them failed.
    failure: Mutex<String>,
}

impl Fleet {
    fn new(endpoint: Endpoint) -> Self {
        let connecting = Semaphore::new(CONNECTING_MAX);
        Self { endpoint, connecting, linked: Mutex::default(), failed_tries: AtomicU64::new(0), failure: Mutex::default() }
    }

    async fn all_linked(&self, connections: u32) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let linked = self.linked.lock().len();
            if linked >= connections as usize {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                bail!("only {linked} of {connections} are linked; the last failure: {}", self.failure.lock());
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// The first link in its turn; each further one as a device does it: at once, then with backoff.
    async fn keep_linked(self: Arc<Self>, number: u32) {
        let mut backoff = Backoff::new(BackoffSettings::default());
        let mut turn = self.connecting.acquire().await.ok();
        loop {
            match self.link(number).await {
                Ok(mut answers) => {
                    turn.take();
                    backoff.reset();
                    self.linked.lock().push(Instant::now());
                    while let Ok(Some(_)) = answers.message().await {}
                }
                Err(error) => {
                    self.failed_tries.fetch_add(1, Relaxed);
                    *self.failure.lock() = format!("{error:#}");
                }
            }
            tokio::time::sleep(backoff.next_delay(None)).await;
        }
    }

    /// Connects and is welcomed.
    async fn link(&self, number: u32) -> anyhow::Result<Streaming<pb::ConnectResponse>> {
        let mut hello = BytesMut::new();
        pool::Stream { device: device_name(number), id: StreamId::new() }.put_hello(&mut hello);
        let hello = stream::iter([Ok::<_, Status>(Frame::data(Bytes::from(hello)))]);
        let channel = self.endpoint.connect().await?;
        let mut answers: Streaming<pb::ConnectResponse> =
            call::call(&channel, call::CONNECT, StreamBody::new(hello.chain(stream::pending()))).await?;
        let first = answers.message().await?.context("the link ended at once")?;
        match first.message {
            Some(Message::Welcome(_)) => Ok(answers),
            other => bail!("no welcome: {other:?}"),
        }
    }
}
