//! TLS of the gRPC listener: handshakes with the files of the settings, which may be replaced while the gateway runs.
//!
//! Invariants: what can't be used never takes the place of what could; open connections keep what they were made with, but one
//! whose client certificate is no longer good ends; who does not finish its handshake does not keep a place.

mod files;
pub(crate) mod peer;

pub use files::TlsError;
pub use peer::PeerCertificate;

use crate::{
    config,
    telemetry::{Metrics, names},
};
use files::{Fingerprint, Loaded};
use metrics::{Counter, Gauge};
use parking_lot::{Mutex, RwLock};
use std::{
    io,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    net::TcpStream,
    sync::{Notify, Semaphore},
    time,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;

/// From how many connections on the list of certificates is first looked through for those that are closed.
const PEERS_SWEPT_FROM: usize = 64;

/// See the [module](self). Cheap to clone: all clones are one.
#[derive(Clone)]
pub struct Tls(Arc<Shared>);

struct Shared {
    settings: config::Tls,
    current: RwLock<Arc<Loaded>>,
    // The files that were last looked at, good or bad: each change is told once.
    seen: Mutex<Fingerprint>,
    peers: Mutex<Peers>,
    handshakes: Semaphore,
    metrics: TlsMetrics,
}

struct TlsMetrics {
    done: Counter,
    failed: Counter,
    timed_out: Counter,
    loaded: Counter,
    refused: Counter,
    expiry: Gauge,
}

impl TlsMetrics {
    fn new(metrics: &Metrics) -> Self {
        let handshakes = |outcome: &'static str| metrics.counter(names::TLS_HANDSHAKES, &[("outcome", outcome.into())]);
        let reloads = |outcome: &'static str| metrics.counter(names::TLS_RELOADS, &[("outcome", outcome.into())]);
        Self {
            done: handshakes("done"),
            failed: handshakes("failed"),
            timed_out: handshakes("timed_out"),
            loaded: reloads("loaded"),
            refused: reloads("refused"),
            expiry: metrics.gauge(names::TLS_CERTIFICATE_EXPIRY, &[]),
        }
    }
}

/// The certificates of the clients that are connected.
#[derive(Default)]
struct Peers {
    open: Vec<Weak<PeerCertificate>>,
    swept_at: usize,
}

impl Peers {
    fn add(&mut self, peer: &Arc<PeerCertificate>) {
        // Twice what was left last time: each entry is looked at a bounded number of times.
        if self.open.len() >= self.swept_at.max(PEERS_SWEPT_FROM) {
            self.open.retain(|peer| peer.strong_count() > 0);
            self.swept_at = 2 * self.open.len();
        }
        self.open.push(Arc::downgrade(peer));
    }
}

impl Tls {
    /// Reads the files of the settings; `None` when they name no certificate.
    pub fn load(settings: &config::Tls, metrics: &Metrics) -> Result<Option<Self>, TlsError> {
        if settings.certificate_file.as_os_str().is_empty() {
            return Ok(None);
        }
        let seen = Fingerprint::of(settings);
        let loaded = Loaded::read(settings)?;
        let metrics = TlsMetrics::new(metrics);
        metrics.expiry.set(loaded.expiry_seconds as f64);
        Ok(Some(Self(Arc::new(Shared {
            settings: settings.clone(),
            current: RwLock::new(Arc::new(loaded)),
            seen: Mutex::new(seen),
            peers: Mutex::default(),
            handshakes: Semaphore::new(settings.handshakes_max),
            metrics,
        }))))
    }

    /// Does the handshake on a new connection; gives the client's certificate along, when it has shown one.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<(TlsStream<TcpStream>, Option<Arc<PeerCertificate>>)> {
        let metrics = &self.0.metrics;
        match time::timeout(self.0.settings.handshake_timeout, self.handshake(stream)).await {
            Ok(Ok(accepted)) => {
                metrics.done.increment(1);
                Ok(accepted)
            }
            Ok(Err(error)) => {
                metrics.failed.increment(1);
                Err(error)
            }
            Err(_) => {
                metrics.timed_out.increment(1);
                Err(io::ErrorKind::TimedOut.into())
            }
        }
    }

    async fn handshake(&self, stream: TcpStream) -> io::Result<(TlsStream<TcpStream>, Option<Arc<PeerCertificate>>)> {
        // Not before it has something to say: who connects and is silent takes no place from those who speak.
        stream.readable().await?;
        let _place = self.0.handshakes.acquire().await.expect("the semaphore is never closed");
        let loaded = self.0.current.read().clone();
        let stream = TlsAcceptor::from(loaded.server.clone()).accept(stream).await?;
        let Some(chain) = stream.get_ref().1.peer_certificates() else { return Ok((stream, None)) };
        let peer = Arc::new(PeerCertificate::new(chain).map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))?);
        self.0.peers.lock().add(&peer);
        // The files may have been replaced since the handshake began, when this one was not on the list yet.
        if !Arc::ptr_eq(&loaded, &self.0.current.read()) {
            self.revoke_unless_good(&peer);
        }
        Ok((stream, Some(peer)))
    }

    /// Looks at the files until `stop`: at each `now`, and at the interval of the settings.
    pub async fn watch(self, now: Arc<Notify>, stop: CancellationToken) {
        let mut ticks = time::interval(self.0.settings.reload_interval.max(Duration::from_millis(1)));
        loop {
            let look = async {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = now.notified() => {}
                }
            };
            if stop.run_until_cancelled(look).await.is_none() {
                return;
            }
            let tls = self.clone();
            // Reading files and checking thousands of signatures is nothing for the threads that serve.
            if tokio::task::spawn_blocking(move || tls.look()).await.is_err() {
                tracing::error!("tls.reload_panicked: what was there stays in use");
            }
        }
    }

    /// Takes over the files if they have changed and are good.
    fn look(&self) {
        let fingerprint = Fingerprint::of(&self.0.settings);
        if std::mem::replace(&mut *self.0.seen.lock(), fingerprint) == fingerprint {
            return;
        }
        match Loaded::read(&self.0.settings) {
            Ok(loaded) => {
                self.0.metrics.expiry.set(loaded.expiry_seconds as f64);
                self.0.metrics.loaded.increment(1);
                *self.0.current.write() = Arc::new(loaded);
                let revoked = self.revoke_all_unless_good();
                tracing::info!(revoked, "tls.reloaded");
            }
            Err(error) => {
                self.0.metrics.refused.increment(1);
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "tls.reload_refused: what was there stays in use");
            }
        }
    }

    fn revoke_all_unless_good(&self) -> usize {
        let peers: Vec<_> = self.0.peers.lock().open.iter().filter_map(Weak::upgrade).collect();
        peers.iter().filter(|peer| self.revoke_unless_good(peer)).count()
    }

    /// Whether the certificate is no longer good; its connection is then told.
    fn revoke_unless_good(&self, peer: &PeerCertificate) -> bool {
        let loaded = self.0.current.read().clone();
        let good = loaded.clients.as_ref().is_some_and(|clients| peer.is_good(clients.as_ref()));
        if !good {
            peer.revoked.cancel();
        }
        !good
    }
}
