//! Takes connections and serves HTTP/2 on each.
//!
//! Invariants: at most `grpc.connections_max` connections are open; no error of one connection, and none of the operating
//! system, ends the listener; when [`Listener::serve`] returns, every connection is closed and no work on a call is left.

use super::{
    arrivals::{Account, Arrivals, FUTILE_COST},
    control_rate::ControlLimits,
    guarded_io::{CALLS_APART, GuardedIo, IoLimits},
    io::GrpcIo,
};
use crate::{
    config::Grpc,
    middleware::{CallTask, Draining, RefusedCalls},
    telemetry::{Metrics, names},
    tls::{PeerCertificate, Tls},
};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics::{Counter, Gauge};
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    ops::Range,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{self, Instant},
};
use tokio_rustls::rustls;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::server::{Connected, TcpConnectInfo};
use tower::{BoxError, Service, ServiceExt};

/// How long accepting pauses after an error such as EMFILE: connections that end meanwhile make room, and the log stays readable.
const ACCEPT_PAUSE: Duration = Duration::from_millis(250);

/// How many connections may wait to be accepted, as far as the operating system allows it (`net.core.somaxconn`). When all devices
/// come back at once, one that finds the queue full waits for a second or more until its SYN is sent again; the usual 128 are too few.
const LISTEN_QUEUE: u32 = 4_096;

/// How much of one response may wait to be sent: what a client that reads slowly, or grants a huge window, costs in memory.
const SEND_BUFFER_BYTES_MAX: usize = 64 << 10;

/// For how long a client that floods is held to its rate before its connection is ended.
const FLOOD_HELD_MAX: Duration = Duration::from_secs(10);

/// By which factor connections become older or less old than the setting says: made all at once, they should not end all at once.
const AGE_JITTER: Range<f64> = 0.9..1.1;

/// How many calls a connection may leave open at no cost: as many as a device has.
const CALLS_LEFT_FREE: usize = 8;

/// For how long the calls of a connection that has served its time are let be, and for half of their grace at the most: the client that begins one did
/// not know of the end. Most are over by then, and only what goes on for longer is told to go elsewhere.
const LET_BE_MAX: Duration = Duration::from_secs(5);

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
    server: Arc<Server>,
}

impl Listener {
    /// Binds `grpc.listen`.
    pub async fn bind(config: &Grpc, metrics: &Metrics) -> io::Result<Self> {
        let socket = listen(config.listen)?;
        let local_addr = socket.local_addr()?;
        Ok(Self { socket, local_addr, connections_max: config.connections_max, tls: None, server: Arc::new(Server::new(config, metrics)) })
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
    /// they have ended, all is sent and the client has closed, for which it waits a second at the most. At `stop.cut` what is left is
    /// closed as it is. Both return when all is closed.
    pub async fn serve<S, B>(self, service: S, stop: Stop)
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let Self { socket, connections_max, tls, server, .. } = self;
        let free = Arc::new(Semaphore::new(connections_max));
        while let Some((stream, client, permit)) = stop.drain.run_until_cancelled(server.accept(&socket, &free)).await {
            server.metrics.accepted.increment(1);
            let open = OpenConnection::new(&server.metrics.open, permit);
            let connection = server.clone().serve(stream, client, tls.clone(), service.clone(), stop.clone());
            server.tasks.spawn(connection.map(move |ended| {
                let _open = open;
                // Not an error of the gateway: peers go away, speak other protocols, break rules.
                if let Err(error) = ended {
                    tracing::debug!(error, "connection.failed");
                }
            }));
        }
        drop(socket);
        server.tasks.close();
        server.tasks.wait().await;
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A gateway that starts again takes its port back while connections of the one before are not forgotten yet.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(LISTEN_QUEUE)
}

#[derive(Clone)]
struct ListenerMetrics {
    accepted: Counter,
    accept_errors: Counter,
    open: Gauge,
    no_preface: Counter,
    idle: Counter,
    old: Counter,
    unread_calls: Counter,
}

impl ListenerMetrics {
    fn new(metrics: &Metrics) -> Self {
        Self {
            accepted: metrics.counter(names::GRPC_CONNECTIONS, &[]),
            accept_errors: metrics.counter(names::GRPC_ACCEPT_ERRORS, &[]),
            open: metrics.gauge(names::GRPC_CONNECTIONS_OPEN, &[]),
            no_preface: ended(metrics, "preface"),
            idle: ended(metrics, "idle"),
            old: ended(metrics, "age"),
            unread_calls: metrics.counter(names::GRPC_REQUESTS_UNREAD, &[]),
        }
    }
}

fn ended(metrics: &Metrics, reason: &'static str) -> Counter {
    metrics.counter(names::GRPC_CONNECTIONS_ENDED, &[("reason", reason.into())])
}

/// How connections are served.
struct Server {
    config: Grpc,
    io_limits: Arc<IoLimits>,
    metrics: ListenerMetrics,
    arrivals: Arc<Arrivals>,
    /// Connections, and the calls on them.
    tasks: TaskTracker,
}

impl Server {
    fn new(config: &Grpc, metrics: &Metrics) -> Self {
        let io_limits = IoLimits {
            control: ControlLimits {
                units_per_second_max: config.control_frames_per_second_max,
                // Behind a flood that is held back wait the answer to keepalive, and the room for what it reads, which must not end it without a word.
                held_max: FLOOD_HELD_MAX.min(config.keepalive_timeout).min(config.unread_timeout),
            },
            unread_timeout: config.unread_timeout,
            flooding: ended(metrics, "flood"),
            unread: ended(metrics, "unread"),
        };
        Self {
            config: config.clone(),
            io_limits: Arc::new(io_limits),
            metrics: ListenerMetrics::new(metrics),
            arrivals: Arc::default(),
            tasks: TaskTracker::new(),
        }
    }

    /// The next connection, as soon as one more may be open: until then it waits in the listen queue.
    async fn accept(&self, socket: &TcpListener, free: &Arc<Semaphore>) -> (TcpStream, IpAddr, OwnedSemaphorePermit) {
        let permit = free.clone().acquire_owned().await.expect("the semaphore is never closed");
        loop {
            match socket.accept().await {
                Ok((stream, client)) => return (stream, client.ip(), permit),
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

    /// Serves one connection until its end.
    ///
    /// What is over when HTTP/2 begins is boxed: the future is there for each of thousands of connections that do nothing.
    #[allow(clippy::manual_async_fn, reason = "an async fn has room for its arguments twice")]
    fn serve<S, B>(
        self: Arc<Self>,
        stream: TcpStream,
        client: IpAddr,
        tls: Option<Tls>,
        service: S,
        stop: Stop,
    ) -> impl Future<Output = Result<(), BoxError>> + Send + 'static
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        async move {
            let info: TcpConnectInfo = stream.connect_info();
            // Who has not even begun has no calls that could be waited for.
            let account = Account::of(&self.arrivals, client);
            let begun = stop.drain.run_until_cancelled(Box::pin(self.begin(stream, &account, tls))).await;
            let Some(begun) = begun else { return Ok(()) };
            let (mut io, peer) = begun.inspect_err(|error| {
                if speaks_something_else(error) {
                    account.charge(FUTILE_COST);
                }
            })?;
            let revoked = peer.as_ref().map(|peer| peer.revoked.clone());
            // Ending, the connection goes as soon as it has no calls; draining, these are told to end, too.
            let draining = stop.drain.child_token();
            let ending = draining.child_token();
            io.linger_when(ending.clone());
            let calls = Arc::new(Calls::default());
            let service = service_fn({
                let (draining, refused) = (Draining(draining.clone()), calls.refused.clone());
                move |mut request: Request<Incoming>| {
                    request.extensions_mut().insert(info.clone());
                    request.extensions_mut().insert(draining.clone());
                    if let Some(peer) = &peer {
                        request.extensions_mut().insert(peer.clone());
                    }
                    request.extensions_mut().insert(refused.clone());
                    service.clone().oneshot(request)
                }
            });
            let mut connection = pin!(self.http(&calls).serve_connection(TokioIo::new(io), service));
            tokio::select! {
                ended = connection.as_mut() => return self.settle(&account, &calls, ended),
                () = draining.cancelled() => {}
                () = self.served_its_time(&calls) => ending.cancel(),
                () = revocation(&revoked) => {}
            }
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => self.settle(&account, &calls, ended),
                () = stop.cut.cancelled() => Ok(()),
                () = async { revocation(&revoked).await; time::sleep(REVOKED_LINGER).await } => Ok(()),
                // At a stop of the whole gateway that decides alone.
                () = self.grace(&draining), if !stop.drain.is_cancelled() => Ok(()),
            }
        }
    }

    /// Waits as long as the calls of a connection that has served its time may take, and tells them of it when some of that is over.
    async fn grace(&self, draining: &CancellationToken) {
        let let_be = LET_BE_MAX.min(self.config.connection_age_grace / 2);
        time::sleep(let_be).await;
        draining.cancel();
        time::sleep(self.config.connection_age_grace - let_be).await;
    }

    /// Charges what a connection left behind to the address that it came from.
    fn settle(&self, account: &Account, calls: &Calls, ended: hyper::Result<()>) -> Result<(), BoxError> {
        if calls.mostly_refused() || ended.as_ref().err().is_some_and(has_broken_rules) {
            account.charge(FUTILE_COST);
        }
        let left_open = calls.open.load(Relaxed).saturating_sub(CALLS_LEFT_FREE);
        account.charge(CALLS_APART * u32::try_from(left_open).unwrap_or(u32::MAX));
        Ok(ended?)
    }

    /// Does what comes before HTTP/2: the TLS handshake, if there is to be one, and the client's preface.
    async fn begin(
        &self,
        stream: TcpStream,
        account: &Account,
        tls: Option<Tls>,
    ) -> Result<(GuardedIo<GrpcIo>, Option<Arc<PeerCertificate>>), BoxError> {
        account.may_begin().await;
        // Acknowledgements are small and somebody waits for each: never hold one back to fill a packet.
        stream.set_nodelay(true)?;
        let Secured { io, peer } = Secured::new(stream, tls).await?;
        let preface = time::timeout(self.config.keepalive_timeout, GuardedIo::accept(io, self.io_limits.clone(), account.clone())).await;
        let io = preface.inspect_err(|_| self.metrics.no_preface.increment(1))??;
        Ok((io, peer))
    }

    fn http(&self, calls: &Arc<Calls>) -> http2::Builder<CallSpawner> {
        let Grpc { unread_timeout, keepalive_interval, keepalive_timeout, .. } = self.config;
        let spawner =
            CallSpawner { tasks: self.tasks.clone(), calls: calls.clone(), unread_timeout, unread: self.metrics.unread_calls.clone() };
        let mut http = http2::Builder::new(spawner);
        // The limits on reset streams (CVE-2023-44487, CVE-2025-8671) are left at hyper's defaults.
        http.timer(TokioTimer::new())
            .initial_stream_window_size(self.config.stream_window_bytes)
            .initial_connection_window_size(self.config.connection_window_bytes)
            .max_concurrent_streams(self.config.streams_per_connection_max)
            .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
            .max_header_list_size(self.config.header_bytes_max)
            .keep_alive_interval(keepalive_interval)
            .keep_alive_timeout(keepalive_timeout);
        http
    }

    /// Waits until a connection is old, or has had no call for long.
    async fn served_its_time(&self, calls: &Calls) {
        let Grpc { idle_timeout, connection_age_max, .. } = self.config;
        let old_at = (!connection_age_max.is_zero()).then(|| Instant::now() + connection_age_max.mul_f64(rand::random_range(AGE_JITTER)));
        loop {
            let begun = calls.begun.load(Relaxed);
            let look_at = Instant::now() + idle_timeout;
            time::sleep_until(old_at.map_or(look_at, |old_at| old_at.min(look_at))).await;
            if old_at.is_some_and(|old_at| old_at <= Instant::now()) {
                return self.metrics.old.increment(1);
            }
            if calls.open.load(Relaxed) == 0 && calls.begun.load(Relaxed) == begun {
                return self.metrics.idle.increment(1);
            }
        }
    }
}

/// Ends when the client's certificate was revoked; where there is none, never.
async fn revocation(revoked: &Option<CancellationToken>) {
    match revoked {
        Some(revoked) => revoked.cancelled().await,
        None => std::future::pending().await,
    }
}

/// Whether a connection failed before HTTP/2 for what its client sent: no TLS that does, or another protocol. Who does not trust the
/// gateway's certificate has done nothing wrong.
fn speaks_something_else(error: &BoxError) -> bool {
    let Some(error) = error.downcast_ref::<io::Error>() else { return false };
    let tls = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    error.kind() == io::ErrorKind::InvalidData && !matches!(tls, Some(rustls::Error::AlertReceived(_)))
}

/// Whether the HTTP/2 implementation ended a connection for what its client sent.
fn has_broken_rules(error: &hyper::Error) -> bool {
    std::error::Error::source(error)
        .and_then(|source| source.downcast_ref::<h2::Error>())
        .is_some_and(|error| error.is_go_away() && error.is_library())
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

/// The calls on one connection.
#[derive(Default)]
struct Calls {
    begun: AtomicUsize,
    open: AtomicUsize,
    refused: RefusedCalls,
    beginnings: Mutex<Beginnings>,
}

impl Calls {
    /// Whether most of the calls that there were have been refused.
    fn mostly_refused(&self) -> bool {
        self.refused.count() > self.begun.load(Relaxed) / 2
    }
}

/// A connection's calls begin one after the other: one that begins hundreds at once gets no more turns than those with a single call,
/// which would else wait behind all of them.
#[derive(Default)]
struct Beginnings {
    under_way: bool,
    waiting: VecDeque<Box<dyn FnOnce() + Send>>,
}

/// A call that begins, until it was polled once.
struct Beginning(Arc<Calls>);

impl Beginning {
    /// Runs `begin` with it, now or when those before it have begun.
    fn of(calls: &Arc<Calls>, begin: impl FnOnce(Self) + Send + 'static) {
        let beginning = Self(calls.clone());
        let mut beginnings = calls.beginnings.lock();
        if !beginnings.under_way {
            beginnings.under_way = true;
            drop(beginnings);
            return begin(beginning);
        }
        beginnings.waiting.push_back(Box::new(move || begin(beginning)));
    }
}

impl Drop for Beginning {
    fn drop(&mut self) {
        let mut beginnings = self.0.beginnings.lock();
        let next = beginnings.waiting.pop_front();
        beginnings.under_way = next.is_some();
        if beginnings.waiting.is_empty() {
            // Most connections never have any.
            beginnings.waiting = VecDeque::new();
        }
        drop(beginnings);
        // Without a runtime, which is ending then, those behind it go as it does.
        if let Some(begin) = next.filter(|_| Handle::try_current().is_ok()) {
            begin();
        }
    }
}

/// Spawns hyper's tasks, one for each call, where they can be waited for.
#[derive(Clone)]
struct CallSpawner {
    tasks: TaskTracker,
    calls: Arc<Calls>,
    unread_timeout: Duration,
    unread: Counter,
}

impl<F> hyper::rt::Executor<F> for CallSpawner
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, serving: F) {
        self.calls.begun.fetch_add(1, Relaxed);
        let open = OpenCall::new(self.calls.clone());
        let call = CallTask::new(serving, self.unread_timeout, self.unread.clone());
        let tasks = self.tasks.clone();
        Beginning::of(&self.calls, move |beginning| {
            tasks.spawn(Running { call, beginning: Some(beginning), _open: open });
        });
    }
}

pin_project_lite::pin_project! {
    /// A call's task. Not an async block, which would have room for the call twice.
    struct Running<C> {
        #[pin]
        call: C,
        beginning: Option<Beginning>,
        _open: OpenCall,
    }
}

impl<C: Future> Future for Running<C> {
    type Output = C::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let this = self.project();
        let polled = this.call.poll(cx);
        this.beginning.take();
        polled
    }
}

/// Counts a call as open until it is dropped.
struct OpenCall(Arc<Calls>);

impl OpenCall {
    fn new(calls: Arc<Calls>) -> Self {
        calls.open.fetch_add(1, Relaxed);
        Self(calls)
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
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
