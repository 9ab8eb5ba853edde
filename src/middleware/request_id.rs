//! Names each call, and sees to it that all that is logged about it carries the name.
//!
//! A caller's `x-request-id` is kept when it is sane, so one id goes through all that a caller uses. So does the id of the trace that its
//! `traceparent` names; where it names none, a trace begins here. Both are told to the caller.

use super::{
    call_span::CallSpan,
    method::Method,
    status::{Outcome, code_name},
};
use crate::{
    auth::Attribution,
    trace::{TRACEPARENT, TraceParent, Tracer},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tonic::transport::server::TcpConnectInfo;
use tower::{Layer, Service};
use tracing::Span;
use uuid::Uuid;

/// The metadata that carries it, in requests and in responses.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// How long a caller's id may be.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// The name of one call: 1 to 128 visible ASCII characters. In the extensions of its request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestId(HeaderValue);

impl RequestId {
    /// The caller's id, or a new UUID version 7.
    fn of(headers: &HeaderMap) -> Self {
        let sane =
            |value: &&HeaderValue| (1..=REQUEST_ID_BYTES_MAX).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic);
        Self(headers.get(REQUEST_ID).filter(sane).cloned().unwrap_or_else(Self::generate))
    }

    fn generate() -> HeaderValue {
        HeaderValue::from_str(Uuid::now_v7().hyphenated().encode_lower(&mut Uuid::encode_buffer())).expect("a UUID is visible ASCII")
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        self.0.to_str().expect("it is visible ASCII")
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is told of calls when they are over, besides their metrics. The default: nothing.
#[derive(Debug, Clone, Default)]
pub struct CallReports {
    /// How long a unary call may take before it is logged as slow; 0: any time.
    pub slow_call: Duration,
    /// Where the spans of calls go.
    pub tracer: Option<Tracer>,
}

/// Names calls; see the module.
#[derive(Debug, Clone)]
pub struct RequestIdLayer {
    reports: CallReports,
}

impl RequestIdLayer {
    /// Tells `reports` of calls.
    pub fn new(reports: CallReports) -> Self {
        Self { reports }
    }
}

impl<S> Layer<S> for RequestIdLayer {
    type Service = RequestIdService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        RequestIdService { inner, reports: self.reports.clone() }
    }
}

/// [`RequestIdLayer`]'s service.
#[derive(Debug, Clone)]
pub struct RequestIdService<S> {
    inner: S,
    reports: CallReports,
}

impl<S, A, B> Service<Request<A>> for RequestIdService<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    B: Body<Data = Bytes>,
{
    type Response = Response<RequestIdBody<B>>;
    type Error = S::Error;
    type Future = RequestIdFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<A>) -> Self::Future {
        let id = RequestId::of(request.headers());
        let peer = request.extensions().get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
        let method = Method::of(request.uri().path());
        let parent = TraceParent::of(request.headers());
        let mut trace = parent.map_or_else(TraceParent::new_trace, TraceParent::next_span);
        let recording = self.reports.tracer.as_ref().filter(|tracer| tracer.samples(trace)).map(|tracer| {
            trace.sampled = true;
            Box::new(CallSpan::begin(tracer.clone(), trace, parent, request.headers(), method, (&id, peer)))
        });
        // Of the highest level, so that it is there for each line that log.filter lets through.
        let span = tracing::error_span!(
            "call",
            method = method.name,
            request_id = %id,
            trace_id = %trace.trace_id,
            peer = peer.map(tracing::field::display)
        );
        request.extensions_mut().insert(id.clone());
        // A stream is not slow when it is long.
        let slow_call = self.reports.slow_call;
        let slow = (!method.streaming && !slow_call.is_zero()).then(|| (slow_call, Attribution::default()));
        if let Some((_, attribution)) = &slow {
            request.extensions_mut().insert(attribution.clone());
        }
        let log = CallLog { span, started: Instant::now(), outcome: Outcome::default(), slow, recording };
        let inner = log.span.in_scope(|| self.inner.call(request));
        RequestIdFuture { inner, id, trace, log: Some(log) }
    }
}

/// Logs the end of a call when it is dropped.
#[derive(Debug)]
struct CallLog {
    span: Span,
    started: Instant,
    outcome: Outcome,
    // How long it may take, where that is judged, and who it is that waits.
    slow: Option<(Duration, Attribution)>,
    recording: Option<Box<CallSpan>>,
}

impl Drop for CallLog {
    fn drop(&mut self) {
        let _entered = self.span.enter();
        let (duration, code) = (self.started.elapsed(), self.outcome.code());
        let status = code_name(code);
        let duration_ms = duration.as_secs_f64() * 1e3;
        tracing::debug!(status, duration_ms, "call.ended");
        if let Some((may_take, attribution)) = &self.slow
            && duration > *may_take
        {
            tracing::warn!(actor = attribution.actor(), resource = attribution.resource(), status, duration_ms, "call.slow");
        }
        if let Some(recording) = self.recording.take() {
            recording.end(duration, code);
        }
    }
}

pin_project_lite::pin_project! {
    /// [`RequestIdService`]'s future.
    #[derive(Debug)]
    pub struct RequestIdFuture<F> {
        #[pin]
        inner: F,
        id: RequestId,
        trace: TraceParent,
        log: Option<CallLog>,
    }
}

impl<F, B, E> Future for RequestIdFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body<Data = Bytes>,
{
    type Output = Result<Response<RequestIdBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let log = this.log.as_mut().expect("a future is not polled after its end");
        let result = ready!(log.span.in_scope(|| this.inner.poll(cx)));
        let mut log = this.log.take().expect("it was there above");
        Poll::Ready(result.map(|mut response| {
            log.outcome.see_response(&response);
            response.headers_mut().insert(REQUEST_ID, this.id.0.clone());
            response.headers_mut().insert(TRACEPARENT, this.trace.to_header());
            response.map(|inner| RequestIdBody { inner, log })
        }))
    }
}

pin_project_lite::pin_project! {
    /// [`RequestIdService`]'s response body.
    #[derive(Debug)]
    pub struct RequestIdBody<B> {
        #[pin]
        inner: B,
        log: CallLog,
    }
}

impl<B: Body<Data = Bytes>> Body for RequestIdBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        let frame = ready!(this.log.span.in_scope(|| this.inner.poll_frame(cx)));
        this.log.outcome.see_frame(frame.as_ref());
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sane_id_of_the_caller_is_kept() {
        let id_of = |bytes: &[u8]| {
            let headers = HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_bytes(bytes).expect("HTTP allows it"))]);
            RequestId::of(&headers).to_string()
        };
        assert_eq!(id_of(b"job-7/3"), "job-7/3");
        assert_eq!(id_of(&[b'x'; 128]), "x".repeat(128));
        for not_sane in [&b""[..], b"two words", b"caf\xc3\xa9", &[b'x'; 129]] {
            let made: Uuid = id_of(not_sane).parse().expect("a UUID was made instead");
            assert_eq!(made.get_version_num(), 7);
        }
    }
}
