//! A gateway that is attacked while a well-behaved client uses it.
//!
//! In the ordinary run an attack lasts a moment, and what is asserted are errors, memory and recovery. With
//! `TIDEGATE_TEST_ABUSE_SECONDS=30` it lasts that long, and the client's p99 is held against the undisturbed one, both measured in
//! turn in the same run.

use super::{
    PATIENCE,
    client::{TestDevice, nth_batch},
    eventually, http_get, metric,
    process::GatewayProcess,
    soon,
};
use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// How many connections attack at once.
const ATTACKERS: usize = 4;
/// By how much the gateway's memory may grow.
const GROWTH_BYTES_MAX: u64 = 64 << 20;
/// By which factor the p99 may.
const P99_FACTOR_MAX: f64 = 5.0;
/// How often the client is measured with and without the attack when its latency counts.
const ROUNDS: u32 = 6;
/// Limits that a test can wait for, and a database that is never so large that memory grows by it.
const FLAGS: [&str; 5] = [
    "--grpc-unread-timeout=1s",
    "--grpc-message-timeout=1s",
    "--grpc-idle-timeout=1s",
    "--grpc-keepalive-timeout=1s",
    "--grpc-keepalive-interval=2s",
];

/// One attacked gateway.
pub struct Siege {
    pub gateway: GatewayProcess,
    device: TestDevice,
    sequence: u64,
    resident_bytes_max: u64,
    _data: TempDir,
}

impl Siege {
    pub async fn start() -> Self {
        let data = TempDir::new().expect("a temporary directory");
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let gateway = GatewayProcess::start_on(data.path(), any, any, &FLAGS).await;
        let device = TestDevice::new(&gateway.channel(), "well-behaved");
        let mut siege = Self { gateway, device, sequence: 0, resident_bytes_max: 0, _data: data };
        siege.use_for(Duration::from_millis(300)).await;
        siege
    }

    /// Attacks with several connections at once, each anew when it was ended; `attack` tells whether all was as it must be.
    pub async fn withstands<F>(mut self, name: &str, attack: impl Fn(SocketAddr) -> F + Clone + Send + 'static)
    where
        F: Future<Output = ()>,
    {
        let seconds = std::env::var("TIDEGATE_TEST_ABUSE_SECONDS").ok().map(|text| text.parse::<u32>().expect("a number of seconds"));
        let resident_before = resident_bytes(self.gateway.pid());
        self.resident_bytes_max = 0;
        let (rounds, round) = seconds.map_or((1, Duration::from_secs(1)), |seconds| (ROUNDS, Duration::from_secs(seconds.into()) / ROUNDS));
        let (mut calm, mut attacked) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            calm.push(self.use_for(round / 3).await);
            let stop = CancellationToken::new();
            let attackers = self.attackers(stop.clone(), attack.clone());
            {
                let _stop = stop.drop_guard();
                attacked.push(self.use_for(round).await);
            }
            let ended = tokio::task::spawn_blocking(move || attackers.join().is_ok()).await;
            assert!(ended.expect("no panic"), "{name}: see above");
        }
        self.assert_recovered().await;
        let growth = self.resident_bytes_max.saturating_sub(resident_before);
        let (calm, attacked) = (median(calm), median(attacked));
        let factor = attacked.as_secs_f64() / calm.as_secs_f64();
        eprintln!("{name}: p99 {calm:?}, attacked {attacked:?} ({factor:.1} times), memory +{:.1} MiB", growth as f64 / f64::from(1 << 20));
        assert!(growth < GROWTH_BYTES_MAX, "{name}: memory grew by {growth} bytes");
        assert!(seconds.is_none() || factor < P99_FACTOR_MAX, "{name}: the p99 grew from {calm:?} to {attacked:?}");
    }

    /// The value of a metric of the gateway.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        let (_, text) = http_get(self.gateway.http, "/metrics").await?;
        metric(&text, series)
    }

    /// On a thread of their own, so that they don't keep the client from being quick. Told to stop, each attacks its last connection
    /// to the end, too; the thread panics when that takes too long.
    fn attackers<F>(&self, stop: CancellationToken, attack: impl Fn(SocketAddr) -> F + Send + 'static) -> thread::JoinHandle<()>
    where
        F: Future<Output = ()>,
    {
        let address = self.gateway.grpc;
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let attacker = || async {
                while !stop.is_cancelled() {
                    attack(address).await;
                }
            };
            runtime.block_on(async {
                let mut all = std::pin::pin!(futures_util::future::join_all((0..ATTACKERS).map(|_| attacker())));
                tokio::select! {
                    _ = &mut all => return,
                    () = stop.cancelled() => {}
                }
                tokio::time::timeout(PATIENCE, all).await.expect("the attackers' connections are ended");
            });
        })
    }

    /// Uploads batch by batch, none of which may fail; the p99 of how long each took.
    pub async fn use_for(&mut self, duration: Duration) -> Duration {
        let (began, mut latencies) = (Instant::now(), Vec::new());
        while began.elapsed() < duration {
            self.sequence += 1;
            let asked = Instant::now();
            let response = soon("the upload", self.device.upload([(self.sequence, nth_batch(self.sequence))])).await;
            latencies.push(asked.elapsed());
            assert_eq!(response.expect("a well-behaved client is served").last_durable_sequence, self.sequence);
            self.resident_bytes_max = self.resident_bytes_max.max(resident_bytes(self.gateway.pid()));
        }
        latencies.sort();
        latencies[latencies.len() * 99 / 100]
    }

    /// Nothing of the attack is left, and the gateway does what it did before.
    async fn assert_recovered(&mut self) {
        self.use_for(Duration::from_millis(100)).await;
        eventually("the attackers' connections and calls are gone", || async {
            let (_, text) = http_get(self.gateway.http, "/metrics").await?;
            let in_flight =
                text.lines().filter(|line| line.starts_with("tidegate_grpc_requests_in_flight{") && !line.ends_with(" 0")).count();
            (metric(&text, "tidegate_grpc_connections_open")? <= 1.0 && in_flight == 0).then_some(())
        })
        .await;
        let stored = self.device.ledger().await.stored.expect("set");
        assert_eq!(stored.batches, self.sequence, "each batch once");
    }
}

fn median(mut values: Vec<Duration>) -> Duration {
    values.sort();
    values[values.len() / 2]
}

/// Memory of a process that is resident (proc(5)).
pub fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("Linux says so") << 10
}
