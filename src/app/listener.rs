//! Takes connections and serves HTTP/2 on each.
//!
//! Invariants: at most `grpc.connections_max` connections are open; no error of one connection, and none of the operating
//! system, ends the listener; when [`Listener::serve`] returns, every connection is closed and no work on a call is left.

use super::io::GrpcIo;
use crate::{
    config::Grpc,
    telemetry::{Metrics, names},
    tls::{PeerCertificate, Tls},
};
use bytes::Bytes;
use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics::{Counter, Gauge};
use std::{convert::Infallible, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::server::{Connected, TcpConnectInfo};
use tower::{BoxError, Service, ServiceExt};

/// How long accepting pauses after an error such as EMFILE: connections that end meanwhile make room, and the log stays readable.
const ACCEPT_PAUSE: Duration = Duration::from_millis(250);

/// How much of one response may wait to be sent: what a client that reads slowly, or grants a huge window, costs in memory.
const SEND_BUFFER_BYTES_MAX: usize = 64 << 10;

/// The length of the client connection preface (RFC 9113 section 3.4).
const PREFACE_BYTES: usize = 24;

/// How long the calls of a connection whose client certificate was revoked are given to end well.
const REVOKED_LINGER: Duration = Duration::from_millis(500);

/// How a listener is told to stop.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Take no more connections and no more calls; let open calls end.
    pub drain: CancellationToken,
    /// Close what is left, once draining.
    pub cut: CancellationToken,
}

/// A bound socket, and how connections are served.
pub struct Listener {
    socket: TcpListener,
    local_addr: SocketAddr,
    connections_max: usize,
    tls: Option<Tls>,
    server: Server,
}

impl Listener {
    /// Binds `grpc.listen`.
    pub async fn bind(config: &Grpc, metrics: &Metrics) -> io::Result<Self> {
        let socket = TcpListener::bind(config.listen).await?;
        let local_addr = socket.local_addr()?;
        Ok(Self { socket, local_addr, connections_max: config.connections_max, tls: None, server: Server::new(config, metrics) })
    }

    /// The same that speaks TLS, when there is any to speak.
    pub fn with_tls(self, tls: Option<Tls>) -> Self {
        Self { tls, ..self }
    }

    /// The address with the port that was bound.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until it is told to stop.
    ///
    /// At `stop.drain` the socket is closed and every connection gets a GOAWAY: its open calls go on, and it is closed when
    /// they have ended and all is sent. At `stop.cut` what is left is closed as it is. Both return when all is closed.
    pub async fn serve<S, B>(self, service: S, stop: Stop)
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let Self { socket, connections_max, tls, server, .. } = self;
        let free = Arc::new(Semaphore::new(connections_max));
        while let Some((stream, permit)) = stop.drain.run_until_cancelled(server.accept(&socket, &free)).await {
            server.metrics.accepted.increment(1);
            let open = OpenConnection::new(&server.metrics.open, permit);
            let (connection, tls, service, stop) = (server.clone(), tls.clone(), service.clone(), stop.clone());
            server.tasks.spawn(async move {
                let _open = open;
                // Not an error of the gateway: peers go away, speak other protocols, break rules.
                if let Err(error) = connection.serve(stream, tls, service, stop).await {
                    tracing::debug!(error, "connection.failed");
                }
            });
        }
        drop(socket);
        server.tasks.close();
        server.tasks.wait().await;
    }
}

#[derive(Clone)]
struct ListenerMetrics {
    accepted: Counter,
    accept_errors: Counter,
    open: Gauge,
}

/// How a connection is served.
#[derive(Clone)]
struct Server {
    http: http2::Builder<Tasks>,
    preface_timeout: Duration,
    metrics: ListenerMetrics,
    /// Connections, and the calls on them.
    tasks: TaskTracker,
}

impl Server {
    fn new(config: &Grpc, metrics: &Metrics) -> Self {
        let tasks = TaskTracker::new();
        let mut http = http2::Builder::new(Tasks(tasks.clone()));
        // The limits on reset streams (CVE-2023-44487, CVE-2025-8671) are left at hyper's defaults.
        http.timer(TokioTimer::new())
            .initial_stream_window_size(config.stream_window_bytes)
            .initial_connection_window_size(config.connection_window_bytes)
            .max_concurrent_streams(config.streams_per_connection_max)
            .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
            .max_header_list_size(config.header_bytes_max)
            .keep_alive_interval(config.keepalive_interval)
            .keep_alive_timeout(config.keepalive_timeout);
        let metrics = ListenerMetrics {
            accepted: metrics.counter(names::GRPC_CONNECTIONS, &[]),
            accept_errors: metrics.counter(names::GRPC_ACCEPT_ERRORS, &[]),
            open: metrics.gauge(names::GRPC_CONNECTIONS_OPEN, &[]),
        };
        Self { http, preface_timeout: config.keepalive_timeout, metrics, tasks }
    }

    /// The next connection, as soon as one more may be open: until then it waits in the listen queue.
    async fn accept(&self, socket: &TcpListener, free: &Arc<Semaphore>) -> (TcpStream, OwnedSemaphorePermit) {
        let permit = free.clone().acquire_owned().await.expect("the semaphore is never closed");
        loop {
            match socket.accept().await {
                Ok((stream, _)) => return (stream, permit),
                // Gone before it was accepted: that one's own matter (accept(2)).
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {}
                Err(error) => {
                    self.metrics.accept_errors.increment(1);
                    tracing::warn!(%error, "connection.accept_failed");
                    time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn serve<S, B>(self, stream: TcpStream, tls: Option<Tls>, service: S, stop: Stop) -> Result<(), BoxError>
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        // Acknowledgements are small and somebody waits for each: never hold one back to fill a packet.
        stream.set_nodelay(true)?;
        let info: TcpConnectInfo = stream.connect_info();
        // Who has not even begun has no calls that could be waited for.
        let Some(secured) = stop.drain.run_until_cancelled(Secured::new(stream, tls)).await else { return Ok(()) };
        let Secured { io, peer } = secured?;
        let Some(opened) = stop.drain.run_until_cancelled(time::timeout(self.preface_timeout, preface(io))).await else {
            return Ok(());
        };
        let revoked = peer.as_ref().map(|peer| peer.revoked.clone()).unwrap_or_default();
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(info.clone());
            if let Some(peer) = &peer {
                request.extensions_mut().insert(peer.clone());
            }
            service.clone().oneshot(request)
        });
        let mut connection = pin!(self.http.serve_connection(TokioIo::new(opened??), service));
        tokio::select! {
            ended = connection.as_mut() => return Ok(ended?),
            () = stop.drain.cancelled() => {}
            () = revoked.cancelled() => {}
        }
        connection.as_mut().graceful_shutdown();
        tokio::select! {
            ended = connection => Ok(ended?),
            () = stop.cut.cancelled() => Ok(()),
            () = async { revoked.cancelled().await; time::sleep(REVOKED_LINGER).await } => Ok(()),
        }
    }
}

/// A connection behind its handshake, if there is one.
struct Secured {
    io: GrpcIo,
    peer: Option<Arc<PeerCertificate>>,
}

impl Secured {
    async fn new(stream: TcpStream, tls: Option<Tls>) -> io::Result<Self> {
        let Some(tls) = tls else { return Ok(Self { io: GrpcIo::Plain(stream), peer: None }) };
        let (stream, peer) = tls.accept(stream).await?;
        Ok(Self { io: GrpcIo::Tls(Box::new(stream)), peer })
    }
}

/// Waits for the client connection preface, and puts it back in front of what follows.
///
/// hyper's keepalive begins behind the preface: without a limit here, whoever connects and says nothing keeps a place forever.
async fn preface<T: AsyncRead + AsyncWrite>(stream: T) -> io::Result<impl AsyncRead + AsyncWrite + Unpin> {
    let (mut read, write) = tokio::io::split(stream);
    let mut preface = [0; PREFACE_BYTES];
    read.read_exact(&mut preface).await?;
    Ok(tokio::io::join(AsyncReadExt::chain(io::Cursor::new(preface), read), write))
}

/// Spawns hyper's tasks, one for each call, where they can be waited for.
#[derive(Clone)]
struct Tasks(TaskTracker);

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

/// Counts a connection as open until it is dropped.
struct OpenConnection {
    open: Gauge,
    _permit: OwnedSemaphorePermit,
}

impl OpenConnection {
    fn new(open: &Gauge, permit: OwnedSemaphorePermit) -> Self {
        open.increment(1);
        Self { open: open.clone(), _permit: permit }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.open.decrement(1);
    }
}

#[cfg(test)]
#[path = "listener_tests.rs"]
mod tests;
