//! Rate, errors and duration of calls by method, and the messages that they answer with. Those that come in are counted where it is looked at
//! anyway where each of them ends: in [`super::pace`].

use super::{
    frames::MessageCounter,
    method::Method,
    status::{Outcome, code_name},
};
use crate::telemetry::{Metrics, names};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use metrics::{Counter, Gauge, Histogram};
use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Instant,
};
use tonic::Code;
use tower::{Layer, Service};

/// gRPC has this many status codes.
const CODES: usize = Code::Unauthenticated as usize + 1;

/// One method's handles.
struct MethodMetrics {
    method: &'static Method,
    metrics: Metrics,
    started: Counter,
    in_flight: Gauge,
    duration: Histogram,
    sent: Counter,
    /// By code. Made when the code is first seen: most methods never see most codes.
    ended: [OnceLock<Counter>; CODES],
}

impl MethodMetrics {
    fn new(metrics: &Metrics, method: &'static Method) -> Self {
        let labels = [("method", method.name.as_str().into())];
        Self {
            method,
            metrics: metrics.clone(),
            started: metrics.counter(names::GRPC_REQUESTS_STARTED, &labels),
            in_flight: metrics.gauge(names::GRPC_REQUESTS_IN_FLIGHT, &labels),
            duration: metrics.histogram(names::GRPC_REQUEST_DURATION, &labels),
            sent: metrics.counter(names::GRPC_MESSAGES_SENT, &labels),
            ended: [const { OnceLock::new() }; CODES],
        }
    }

    fn ended(&self, code: Code) -> &Counter {
        self.ended[code as usize].get_or_init(|| {
            let labels = [("method", self.method.name.as_str().into()), ("code", code_name(code).into())];
            self.metrics.counter(names::GRPC_REQUESTS, &labels)
        })
    }
}

/// Measures calls; see the module.
#[derive(Clone)]
pub struct MetricsLayer {
    /// By [`Method::index`].
    methods: Arc<[Arc<MethodMetrics>]>,
}

impl MetricsLayer {
    /// Makes the handles of all methods.
    pub fn new(metrics: &Metrics) -> Self {
        Self { methods: Method::all().iter().map(|method| Arc::new(MethodMetrics::new(metrics, method))).collect() }
    }
}

impl<S> Layer<S> for MetricsLayer {
    type Service = MetricsService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        MetricsService { inner, methods: self.methods.clone() }
    }
}

/// [`MetricsLayer`]'s service.
#[derive(Clone)]
pub struct MetricsService<S> {
    inner: S,
    methods: Arc<[Arc<MethodMetrics>]>,
}

impl<S, A, B> Service<Request<A>> for MetricsService<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    B: Body<Data = Bytes>,
{
    type Response = Response<MetricsBody<B>>;
    type Error = S::Error;
    type Future = MetricsFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let metrics = &self.methods[Method::of(request.uri().path()).index];
        let record = CallRecord::start(metrics.clone(), request.extensions().get().cloned());
        MetricsFuture { inner: self.inner.call(request), record: Some(record) }
    }
}

/// Whether the same call would be refused again, as far as its code tells. INTERNAL is among them as a message that can't be decoded
/// comes to it; so does a fault of the gateway, whose caller then waits a little, too.
fn is_refusal(code: Code) -> bool {
    match code {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Internal
        | Code::Unauthenticated => true,
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Unavailable
        | Code::DataLoss => false,
    }
}

/// How many calls of a connection were refused for what they asked, or who asked. In the extensions of each request.
#[derive(Debug, Clone, Default)]
pub struct RefusedCalls(Arc<AtomicUsize>);

impl RefusedCalls {
    /// One more.
    pub fn note(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// How many so far.
    pub fn count(&self) -> usize {
        self.0.load(Relaxed)
    }
}

/// A call that is open; it is counted as ended when it is dropped.
struct CallRecord {
    metrics: Arc<MethodMetrics>,
    started: Instant,
    outcome: Outcome,
    messages: MessageCounter,
    // Of a request that came by no connection: none.
    refused: Option<RefusedCalls>,
}

impl CallRecord {
    fn start(metrics: Arc<MethodMetrics>, refused: Option<RefusedCalls>) -> Self {
        metrics.started.increment(1);
        metrics.in_flight.increment(1);
        Self { metrics, started: Instant::now(), outcome: Outcome::default(), messages: MessageCounter::default(), refused }
    }
}

impl Drop for CallRecord {
    fn drop(&mut self) {
        self.metrics.in_flight.decrement(1);
        self.metrics.duration.record(self.started.elapsed());
        let code = self.outcome.code();
        self.metrics.ended(code).increment(1);
        if let (true, Some(refused)) = (is_refusal(code), &self.refused) {
            refused.note();
        }
    }
}

pin_project_lite::pin_project! {
    /// [`MetricsService`]'s future.
    pub struct MetricsFuture<F> {
        #[pin]
        inner: F,
        record: Option<CallRecord>,
    }
}

impl<F, B, E> Future for MetricsFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body<Data = Bytes>,
{
    type Output = Result<Response<MetricsBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = ready!(this.inner.poll(cx));
        let mut record = this.record.take().expect("a future is not polled after its end");
        Poll::Ready(result.map(|response| {
            record.outcome.see_response(&response);
            response.map(|inner| MetricsBody { inner, record })
        }))
    }
}

pin_project_lite::pin_project! {
    /// [`MetricsService`]'s response body.
    pub struct MetricsBody<B> {
        #[pin]
        inner: B,
        record: CallRecord,
    }
}

impl<B: Body<Data = Bytes>> Body for MetricsBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        let frame = ready!(this.inner.poll_frame(cx));
        this.record.outcome.see_frame(frame.as_ref());
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            this.record.metrics.sent.increment(this.record.messages.feed(data));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
