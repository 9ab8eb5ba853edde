//! The gateway as a whole: build, run, drain. The one module that knows all others.

mod arrivals;
mod control_rate;
pub(crate) mod frames;
mod guarded_io;
mod health;
mod io;
pub mod listener;
pub mod open_files;
mod peers;
pub mod signals;
mod space;

use crate::{
    api::{ConfigApi, CredentialApi, DeadLetterApi, DeviceApi, DeviceLinkApi, LiveApi, OperatorApi, ReadingApi, TelemetryApi},
    auth::{AuditLog, Authenticator, Directory, Oidc, OidcError},
    client::ChannelError,
    config::{AuthMode, Config},
    fleet::{ClockWatch, Configs, Registry, reconciler, silence},
    history::{Exporter, Reader, Upkeep},
    http::HttpServer,
    ingest::{
        Ingest,
        writer::{self, Writer},
    },
    limits::OperatorLimits,
    live::{Latest, Tail, follower::Sources},
    middleware::{CallReports, CallTracker, Doors, no_layers, stack},
    pb,
    store::{Store, StoreError},
    telemetry::{Metrics, Readiness},
    tls::{Tls, TlsError},
    trace::{self, SpanExporter},
};
use listener::{Listener, Stop};
use peers::Peers;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    runtime::Handle,
    sync::Notify,
    task::{JoinError, JoinHandle, JoinSet},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

/// The readiness component that speaks for the gateway's own life: starting, serving, stopping.
const COMPONENT: &str = "gateway";
/// What is kept of the grace period for writing down what is in memory.
const CLOSING_RESERVE: Duration = Duration::from_millis(500);
/// How long connections without calls are given to close: to send what is left, and [`LINGER`](guarded_io::LINGER) behind that. A peer
/// that lost its network never answers the GOAWAY, and a fleet always has some of these.
const CONNECTION_LINGER: Duration = Duration::from_secs(2);
/// The nice value of what nobody waits for: a tenth of what another thread gets, when the processors are all busy.
#[cfg(target_os = "linux")]
const BACKGROUND_NICE: i32 = 10;

/// Why the gateway can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store can't be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An address can't be listened on.
    #[error("cannot listen on {address} ({setting}): is another program there?")]
    Listen {
        /// The setting that holds the address.
        setting: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The TLS files can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The keys of the OpenID Connect provider can't be used.
    #[error(transparent)]
    Oidc(#[from] OidcError),
    /// Spans can't be sent to `tracing.otlp_endpoint`.
    #[error("tracing.otlp_endpoint can't be used")]
    Tracing(#[source] ChannelError),
    /// The descriptor set can't be served.
    #[error("the reflection service can't be built")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A gateway that is ready to run.
pub struct Gateway {
    config: Config,
    store: Store,
    writer: Writer,
    latest: Arc<Latest>,
    upkeep: Upkeep,
    configs: Configs,
    registry: Registry,
    purge: Arc<Notify>,
    metrics: Metrics,
    readiness: Readiness,
    health: health::Health,
    calls: CallTracker,
    stop: Stop,
    routes: Routes,
    listener: Listener,
    tls: Option<Tls>,
    oidc: Option<Oidc>,
    doors: Doors,
    reports: CallReports,
    exporter: Option<SpanExporter>,
    reload: Arc<Notify>,
    http: HttpServer,
    // Whether there are no layers around the services: see `build_bare`.
    bare: bool,
}

impl Gateway {
    /// Opens the store, catches up with it, and binds both addresses; nothing is served yet.
    pub async fn build(config: Config) -> Result<Self, StartError> {
        Self::build_with(config, |ingest| ingest).await
    }

    /// The same with a null sink ([`Ingest::into_null_sink`]) in the place of the log, to measure a gateway against. There is
    /// no setting for it: nobody's gateway throws away what it acknowledges by a slip of the pen.
    pub async fn build_null_sink(config: Config) -> Result<Self, StartError> {
        Self::build_with(config, Ingest::into_null_sink).await
    }

    /// The same without the layers around the services, for whoever calls: no identity, no limits, no deadlines, no metrics of calls. To
    /// measure what these cost, and nothing else; there is no setting for it, either.
    pub async fn build_bare(config: Config) -> Result<Self, StartError> {
        Ok(Self { bare: true, ..Self::build(config).await? })
    }

    async fn build_with(config: Config, sink: impl FnOnce(Ingest) -> Ingest) -> Result<Self, StartError> {
        let metrics = Metrics::new();
        let readiness = Readiness::starting(&[COMPONENT, writer::COMPONENT]);
        // Before the store is opened: what can't be listened on should not touch the data.
        let listen_error = |setting, address| move |source| StartError::Listen { setting, address, source };
        let tls = Tls::load(&config.tls, &metrics)?;
        let oidc = Oidc::load(&config.oidc, &metrics).await?;
        let (tracer, exporter) = trace::exporter(&config.tracing, &metrics).map_err(StartError::Tracing)?.unzip();
        let reports = CallReports { slow_call: config.log.slow_call, tracer };
        let listener = Listener::bind(&config.grpc, &metrics).await.map_err(listen_error("grpc.listen", config.grpc.listen))?;
        let listener = listener.with_tls(tls.clone());
        let http = HttpServer::bind(config.http.listen).await.map_err(listen_error("http.listen", config.http.listen))?;

        let store = Store::open(&config.storage).await?;
        let doors = doors(&config, &store, oidc.clone(), &metrics).await?;
        let directory = Directory::new(store.clone(), doors.auth.clone());
        if config.auth.mode == AuthMode::Required {
            directory.begin(&config.admin_token_file()).await?;
        }
        let registry = Registry::new(store.clone(), config.devices.auto_register, config.devices.devices_max);
        let configs = Configs::new(store.clone(), config.devices.config_bytes_max);
        let tail = Arc::new(Tail::new(store.last_position().await?, config.live.tail_bytes_max));
        let latest = Arc::new(Latest::load(&store, &registry).await?);
        let (ingest, writer) =
            writer::writer(&config, store.clone(), registry.clone(), tail.clone(), latest.clone(), &metrics, readiness.clone());
        ingest.show_pending(&metrics);
        ClockWatch::new(&config.devices).show(&registry, &metrics);
        let ingest = sink(ingest);

        let upkeep = Upkeep::new(&config, store.clone(), registry.clone(), latest.clone(), tail.clone(), &metrics);

        let stop = Stop::default();
        let purge = Arc::new(Notify::new());
        let sources = Sources { store: store.clone(), tail, latest: latest.clone(), registry: registry.clone(), drain: stop.drain.clone() };
        let (health, health_service) = health::Health::new();
        health.set(false).await;
        let services =
            Services { config: &config, ingest, registry: &registry, configs: &configs, sources, purge: &purge, doors: &doors, directory };
        let routes = services.routes()?.add_service(health_service);
        let calls = CallTracker::new();
        Ok(Self {
            config,
            store,
            writer,
            latest,
            upkeep,
            configs,
            registry,
            purge,
            metrics,
            readiness,
            health,
            calls,
            stop,
            routes,
            listener,
            tls,
            oidc,
            doors,
            reports,
            exporter,
            reload: Arc::default(),
            http,
            bare: false,
        })
    }

    /// Notified, it has the gateway look at its files at once, as SIGHUP does.
    pub fn reload(&self) -> Arc<Notify> {
        self.reload.clone()
    }

    /// Where gRPC is served, with the port that was bound.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.listener.local_addr()
    }

    /// Where metrics and probes are served, with the port that was bound.
    pub fn http_addr(&self) -> SocketAddr {
        self.http.local_addr()
    }

    /// Says in the log where it is served; programs that start a gateway on port 0 read it there.
    fn announce(&self) {
        tracing::info!(
            grpc = %self.grpc_addr(),
            http = %self.http_addr(),
            data_dir = %self.config.storage.data_dir.display(),
            version = env!("CARGO_PKG_VERSION"),
            "gateway.serving"
        );
    }

    /// Serves until `stop_signal`, then drains: says NOT_SERVING, takes no more calls, lets the open ones end, commits what
    /// was taken. Returns whether all that came to its end within the grace period.
    pub async fn run_until(self, stop_signal: impl Future<Output = ()>) -> bool {
        let Self {
            config,
            store,
            writer,
            latest,
            upkeep,
            configs,
            registry,
            purge,
            metrics,
            readiness,
            health,
            calls,
            stop,
            routes,
            listener,
            tls,
            oidc,
            doors,
            reports,
            exporter,
            reload,
            http,
            bare,
        } = self;
        let background = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(metrics.clone().run_upkeep(background.clone()));
        tasks.spawn(latest.clone().run(store.clone(), background.clone()));
        // On a thread of its own that gives way to all others: it computes for long, and nobody waits for it.
        let (runtime, upkeep_stop) = (Handle::current(), background.clone());
        tasks.spawn_blocking(move || {
            give_way();
            runtime.block_on(upkeep.run(upkeep_stop));
        });
        let (publisher, registry_of_peers) = (writer.publisher(), registry.clone());
        let peers = Peers {
            store: store.clone(),
            publisher,
            latest: latest.clone(),
            registry: registry_of_peers,
            configs,
            auth: doors.auth.clone(),
        };
        tasks.spawn(peers.run(background.clone()));
        let interval = config.devices.reconcile_interval;
        tasks.spawn(reconciler::run(store.clone(), registry, interval, background.clone()));
        tasks.spawn(silence::watch(store.clone(), config.devices.silent_after, metrics.clone(), background.clone()));
        tasks.spawn(run_purge(store.clone(), purge, background.clone()));
        tasks.spawn(health.clone().follow(readiness.clone(), metrics.clone(), background.clone()));
        tasks.spawn(doors.audit.clone().keep_short(background.clone()));
        tasks.spawn(look_at_files(reload, tls, oidc.clone(), background.clone()));
        if let Some(oidc) = oidc {
            // Not until the end of the calls: those that wait for it would be waited for.
            tasks.spawn(oidc.run(stop.drain.clone()));
        }
        if let Some(exporter) = exporter {
            tasks.spawn(exporter.run(background.clone()));
        }
        tasks.spawn(space::watch(store.clone(), config.storage.clone(), metrics.clone(), background.clone()));
        let http_stop = background.clone();
        let (http_metrics, http_readiness) = (metrics.clone(), readiness.clone());
        tasks.spawn(async move {
            if let Err(error) = http.serve(http_metrics, http_readiness, http_stop).await {
                tracing::error!(%error, "http.failed");
            }
        });

        // On a thread of its own: among the tasks of all calls it would wait for its turn at each step of a transaction.
        let runtime = Handle::current();
        let mut writing = tokio::task::spawn_blocking(move || runtime.block_on(writer.run()));
        let mut serving = match bare {
            true => tokio::spawn(listener.serve(no_layers(routes), stop.clone())),
            false => tokio::spawn(listener.serve(stack(&config.grpc, reports, &metrics, &doors, &calls, routes), stop.clone())),
        };
        readiness.set(COMPONENT, Ok(()));

        // Both run as long as the gateway does: if one ends, it has failed, and a restart is better than half a gateway.
        let failed = tokio::select! {
            () = stop_signal => false,
            ended = &mut writing => failed("writer", ended),
            ended = &mut serving => failed("listener", ended),
        };
        let deadline = Instant::now() + config.shutdown.grace;
        tracing::info!(grace = ?config.shutdown.grace, open_calls = calls.open(), "gateway.draining");
        readiness.set(COMPONENT, Err("being stopped".to_owned()));
        // At once, and not when the task that follows the readiness comes to it: the probes must know before the GOAWAY.
        health.set(false).await;
        tokio::time::sleep(config.shutdown.notice).await;
        stop.drain.cancel();

        let cut_at = deadline - CLOSING_RESERVE.min(config.shutdown.grace / 2);
        let idle = timeout_at(cut_at, calls.wait_idle()).await.is_ok();
        if !idle {
            tracing::warn!(open_calls = calls.open(), "gateway.cut: the grace period is over, what is left is cut off");
        } else if !ended_by(cut_at.min(Instant::now() + CONNECTION_LINGER), &mut serving).await {
            tracing::debug!("gateway.cut: no call is open; peers that do not close their connections are gone");
        }
        stop.cut.cancel();
        // With the last connection the last service is gone, and with that the last way to the writer, which then ends.
        let served = idle && ended_by(deadline, &mut serving).await;
        let committed = ended_by(deadline, &mut writing).await;
        background.cancel();
        // Before the last save, so that none of theirs is in between.
        let _ = timeout_at(deadline.min(Instant::now() + CONNECTION_LINGER), async { while tasks.join_next().await.is_some() {} }).await;
        tasks.shutdown().await;
        let _ = timeout_at(deadline, doors.audit.settled()).await;
        // A disk that hangs must not keep the process: what is not written down now the next start reads from the log.
        let saved = matches!(timeout_at(deadline, latest.save(&store)).await, Ok(Ok(())));
        let closed = timeout_at(deadline, store.close()).await.is_ok();
        let in_time = served && committed && closed;
        tracing::info!(in_time, latest_saved = saved, "gateway.stopped");
        in_time && !failed
    }
}

/// Lets the machine's other threads go before this one. Linux has such a priority for each thread; elsewhere there is none to set.
fn give_way() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, BACKGROUND_NICE) {
        tracing::debug!(%error, "gateway.priority: what is done in the background is not put behind what devices wait for");
    }
}

/// Notes that a part of the gateway has ended by itself.
fn failed(part: &str, ended: Result<(), JoinError>) -> bool {
    let why = ended.err().map(|error| error.to_string());
    tracing::error!(part, why, "gateway.failed: a part of the gateway has ended, so that it stops as a whole");
    true
}

/// Waits for a task until a deadline; whether it has ended. One that has ended before is not waited for again.
async fn ended_by(deadline: Instant, task: &mut JoinHandle<()>) -> bool {
    task.is_finished() || timeout_at(deadline, task).await.is_ok()
}

/// Has everything that comes from files looked at, at each `reload` and when its own time comes.
async fn look_at_files(reload: Arc<Notify>, tls: Option<Tls>, oidc: Option<Oidc>, stop: CancellationToken) {
    let now = Arc::<Notify>::default();
    let hand_on = async {
        loop {
            reload.notified().await;
            now.notify_one();
            oidc.iter().for_each(Oidc::look_soon);
        }
    };
    let watch = async {
        if let Some(tls) = tls {
            tls.watch(now.clone(), stop.clone()).await;
        }
    };
    stop.run_until_cancelled(async { tokio::join!(hand_on, watch) }).await;
}

async fn doors(config: &Config, store: &Store, oidc: Option<Oidc>, metrics: &Metrics) -> Result<Doors, StoreError> {
    let limits = OperatorLimits::new(&config.limits, metrics);
    Ok(match config.auth.mode {
        AuthMode::Open => Doors { auth: Authenticator::open(), audit: AuditLog::off(), limits },
        AuthMode::Required => {
            let audit = AuditLog::new(store.clone(), config.auth.audit_age);
            Doors { auth: Authenticator::required(store.clone(), oidc).await?, audit, limits }
        }
    })
}

/// What the services are made of.
struct Services<'a> {
    config: &'a Config,
    ingest: Ingest,
    registry: &'a Registry,
    configs: &'a Configs,
    sources: Sources,
    purge: &'a Arc<Notify>,
    doors: &'a Doors,
    directory: Directory,
}

impl Services<'_> {
    fn routes(self) -> Result<Routes, StartError> {
        let Self { config, ingest, registry, configs, sources, purge, doors, directory } = self;
        let message_bytes_max = config.grpc.message_bytes_max;
        let unacknowledged_max = config.ingest.unacknowledged_batches_max;
        let store = sources.store.clone();
        let telemetry = TelemetryApi { ingest: ingest.clone(), registry: registry.clone(), store: store.clone(), unacknowledged_max };
        let dead_letter = DeadLetterApi { ingest: ingest.clone(), registry: registry.clone(), store: store.clone() };
        let device_link = DeviceLinkApi {
            ingest,
            registry: registry.clone(),
            configs: configs.clone(),
            clocks: ClockWatch::new(&config.devices),
            store: store.clone(),
            unacknowledged_max,
        };
        let device = DeviceApi {
            registry: registry.clone(),
            store: store.clone(),
            latest: sources.latest.clone(),
            purge: purge.clone(),
            auth: doors.auth.clone(),
            sensors_max: config.devices.sensors_max,
            silent_after: config.devices.silent_after,
        };
        let audit = doors.audit.clone();
        let config_api = ConfigApi { registry: registry.clone(), configs: configs.clone(), store: store.clone(), audit: audit.clone() };
        let credential = CredentialApi { registry: registry.clone(), directory: directory.clone() };
        let operator = OperatorApi { directory, audit };
        let reader = Reader::new(store.clone(), &config.query, config.log.slow_query);
        let exporter = Exporter::new(store, registry.clone(), reader.clone(), config.export.concurrent_max);
        let reading = ReadingApi { registry: registry.clone(), reader, exporter };

        macro_rules! service {
            ($module:ident, $server:ident, $api:expr) => {
                pb::$module::$server::new($api).max_decoding_message_size(message_bytes_max)
            };
        }
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(pb::DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        Ok(Routes::new(service!(telemetry_service_server, TelemetryServiceServer, telemetry))
            .add_service(service!(device_link_service_server, DeviceLinkServiceServer, device_link))
            .add_service(service!(live_service_server, LiveServiceServer, LiveApi { sources }))
            .add_service(service!(config_service_server, ConfigServiceServer, config_api))
            .add_service(service!(reading_service_server, ReadingServiceServer, reading))
            .add_service(service!(dead_letter_service_server, DeadLetterServiceServer, dead_letter))
            .add_service(service!(device_service_server, DeviceServiceServer, device))
            .add_service(service!(credential_service_server, CredentialServiceServer, credential))
            .add_service(service!(operator_service_server, OperatorServiceServer, operator))
            .add_service(reflection().build_v1()?)
            // Older tools still ask by this name.
            .add_service(reflection().build_v1alpha()?))
    }
}

/// Deletes what deleted devices left: at the start, as a stop may have come in between, and after each deletion.
async fn run_purge(store: Store, purge: Arc<Notify>, stop: CancellationToken) {
    loop {
        if let Err(error) = store.purge_deleted().await {
            tracing::warn!(error = &error as &dyn std::error::Error, "device.purge_failed: trying again after the next deletion or start");
        }
        if stop.run_until_cancelled(purge.notified()).await.is_none() {
            return;
        }
    }
}

fn warn_of_openness(config: &Config) {
    let who = if config.insecure { "--insecure lets that be more than this machine" } else { "only this machine can connect" };
    if config.auth.mode == AuthMode::Open {
        tracing::warn!("gateway.open: no credentials are asked for, so everybody who can connect can read and write; {who}");
    } else if config.tls.certificate_file.as_os_str().is_empty() {
        tracing::warn!("gateway.clear: there is no TLS, so everybody on the way can read along, tokens too; {who}");
    }
}

/// Runs a gateway until SIGTERM or ctrl-C. An error says why it could not start; `Ok(false)`, that the grace period was too
/// short for it to end well.
pub async fn serve(config: Config) -> anyhow::Result<bool> {
    let mut signals = signals::Signals::install()?;
    open_files::raise_limit_for(config.grpc.connections_max);
    let gateway = Gateway::build(config).await?;
    gateway.announce();
    signals.reload_with(gateway.reload());
    warn_of_openness(&gateway.config);
    Ok(gateway.run_until(signals.stop()).await)
}

/// Runs a gateway without layers ([`Gateway::build_bare`]) until SIGTERM or ctrl-C, as [`serve`] does one with them.
pub async fn serve_bare(config: Config) -> anyhow::Result<bool> {
    let signals = signals::Signals::install()?;
    let gateway = Gateway::build_bare(config).await?;
    gateway.announce();
    tracing::warn!("gateway.bare: nobody is asked for anything, and nothing is limited or counted");
    Ok(gateway.run_until(signals.stop()).await)
}

/// Runs a null sink ([`Gateway::build_null_sink`]) until SIGTERM or ctrl-C, as [`serve`] does a gateway.
pub async fn serve_null_sink(config: Config) -> anyhow::Result<bool> {
    let signals = signals::Signals::install()?;
    let gateway = Gateway::build_null_sink(config).await?;
    gateway.announce();
    tracing::warn!("gateway.null_sink: nothing is stored, and everything is acknowledged");
    Ok(gateway.run_until(signals.stop()).await)
}
