//! What the tests share: gateways in this process and of their own, and clients.

pub mod certificates;
pub mod client;
pub mod database;
#[cfg(target_os = "linux")]
pub mod disk;
pub mod h2_raw;
pub mod identity;
#[allow(dead_code, reason = "shared with the crate's own tests, which use more of it")]
pub mod jwt;
pub mod load;
pub mod oidc;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod random;
pub mod raw;
pub mod script;
#[cfg(target_os = "linux")]
pub mod siege;
pub mod streams;

use database::WritesHeld;
use std::{future::Future, net::SocketAddr, path::Path, sync::Arc, time::Duration};
use tempfile::TempDir;
use tidegate::{app::Gateway, client::Channel, config::Config};
use tokio::{sync::Notify, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// How long a test waits for what must happen. Long, as machines are slow; reached only by a failing test.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for `future`; fails the test when it takes too long.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("did not happen in {PATIENCE:?}: {what}"))
}

/// Asks again until the answer is there; fails the test when it takes too long.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let asking = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(10));
        loop {
            ticks.tick().await;
            if let Some(answer) = ask().await {
                return answer;
            }
        }
    };
    soon(what, asking).await
}

/// The settings of a gateway on free ports.
pub fn config(data_dir: &Path) -> Config {
    let mut config = Config::default();
    config.grpc.listen = ([127, 0, 0, 1], 0).into();
    config.http.listen = ([127, 0, 0, 1], 0).into();
    config.storage.data_dir = data_dir.to_owned();
    config
}

/// A gateway in this process.
pub struct TestGateway {
    pub grpc: SocketAddr,
    pub http: SocketAddr,
    config: Config,
    stop: CancellationToken,
    reload: Arc<Notify>,
    running: JoinHandle<bool>,
    directory: TempDir,
}

impl TestGateway {
    /// With default settings, on an empty directory.
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// With changed settings, on an empty directory.
    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let mut config = config(directory.path());
        change(&mut config);
        Self::run(config, directory).await
    }

    /// With default settings, on what a directory holds.
    pub async fn start_on(directory: TempDir) -> Self {
        Self::run(config(directory.path()), directory).await
    }

    async fn run(config: Config, directory: TempDir) -> Self {
        let gateway = Gateway::build(config.clone()).await.expect("the gateway starts");
        let (grpc, http, reload) = (gateway.grpc_addr(), gateway.http_addr(), gateway.reload());
        let stop = CancellationToken::new();
        let running = tokio::spawn(gateway.run_until(stop.clone().cancelled_owned()));
        let started = Self { grpc, http, config, stop, reload, running, directory };
        eventually("ready", || async { (started.http_status("/readyz").await == 200).then_some(()) }).await;
        started
    }

    /// Has it look at its files, without waiting for it.
    pub fn reload(&self) {
        self.reload.notify_one();
    }

    /// Asks it to stop, without waiting for it.
    pub fn begin_stop(&self) {
        self.stop.cancel();
    }

    /// Stops it; whether all came to its end within the grace period.
    pub async fn stop(self) -> bool {
        self.stop.cancel();
        soon("the gateway stops", self.running).await.expect("the gateway does not panic")
    }

    /// Stops it, and starts another one with the same settings on the same data.
    pub async fn restart(self) -> Self {
        self.stop.cancel();
        assert!(soon("the gateway stops", self.running).await.expect("the gateway does not panic"), "stopped in time");
        Self::run(self.config, self.directory).await
    }

    /// A connection of its own.
    pub fn channel(&self) -> Channel {
        channel(self.grpc)
    }

    /// Where its data is.
    pub fn data_dir(&self) -> &Path {
        self.directory.path()
    }

    /// Keeps it from writing to its database, which reading is not kept from, until the hold is dropped. A gateway on SQLite gives a write up
    /// when it has waited for 5 s.
    pub async fn hold_writes(&self) -> WritesHeld {
        WritesHeld::hold(&self.config.storage).await
    }

    /// The status of a GET.
    pub async fn http_status(&self, path: &str) -> u16 {
        http_get(self.http, path).await.map_or(0, |(status, _)| status)
    }

    /// The value of a metric, with its labels as in the exposition; `None` while it has none.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        let (_, text) = http_get(self.http, "/metrics").await?;
        metric(&text, series)
    }
}

/// The value of a series in the text exposition.
pub fn metric(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

/// A connection that is made when it is first used.
pub fn channel(address: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{address}")).expect("a URI").tcp_nodelay(true).connect_lazy().into()
}

/// Waits until the health service says that the gateway serves, or that it does not.
pub async fn health_is(gateway: &process::GatewayProcess, serving: bool) {
    let check = || async {
        let answer = HealthClient::new(gateway.channel()).check(HealthCheckRequest { service: String::new() }).await.ok()?;
        ((answer.into_inner().status() == ServingStatus::Serving) == serving).then_some(())
    };
    eventually("health says so", check).await;
}

/// Waits until readiness says no, and why.
pub async fn not_ready(gateway: &process::GatewayProcess, why: &str) {
    let said = format!("store: not ready: {why}");
    let ready = || async { http_get(gateway.http, "/readyz").await.filter(|(code, text)| *code == 503 && text.contains(&said)) };
    eventually("readiness says why", ready).await;
}

/// A plain HTTP/1.1 GET: status and body. `None` when nobody answers.
pub async fn http_get(address: SocketAddr, path: &str) -> Option<(u16, String)> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.ok()?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}
