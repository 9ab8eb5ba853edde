//! Ends calls at their deadline: the work on them stops, and the client is told.
//!
//! A client says how long it waits in `grpc-timeout` (gRPC over HTTP/2); the settings bound it, and stand in for it, by the
//! class of the method (`class.rs`).
//! While a client does not read, HTTP/2 flow control keeps its response from being asked for more, so that a deadline that
//! passes then takes effect when the client reads on; that it does is `unread`'s concern.

use super::{class::Class, method::Method, status, unread};
use crate::{config::Grpc, error::Error};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;
use tower::{Layer, Service};

const GRPC_TIMEOUT: &str = "grpc-timeout";

/// `TimeoutValue` has at most 8 digits, so no timeout overflows.
const TIMEOUT_DIGITS_MAX: usize = 8;

/// When a call ends at the latest. In the extensions of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline(pub Instant);

/// Keeps deadlines; see the module.
#[derive(Debug, Clone)]
pub struct DeadlineLayer {
    // Of each method, by its index.
    most: Arc<[Duration]>,
}

impl DeadlineLayer {
    /// With the bounds of the settings.
    pub fn new(config: &Grpc) -> Self {
        Self { most: Method::all().iter().map(|method| Class::of(method).deadline_max(config)).collect() }
    }

    /// How long a call of this method with these headers may take.
    fn timeout(&self, method: &Method, headers: &HeaderMap) -> Result<Duration, Error> {
        let max = self.most[method.index];
        let Some(value) = headers.get(GRPC_TIMEOUT) else { return Ok(max) };
        let asked = parse(value).ok_or_else(|| Error::invalid(GRPC_TIMEOUT, "1 to 8 digits and one of H, M, S, m, u, n are allowed"))?;
        Ok(asked.min(max))
    }
}

/// `TimeoutValue TimeoutUnit`.
pub(crate) fn parse(value: &HeaderValue) -> Option<Duration> {
    let (unit, digits) = value.as_bytes().split_last()?;
    if !(1..=TIMEOUT_DIGITS_MAX).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value = digits.iter().fold(0, |value, digit| value * 10 + u64::from(digit - b'0'));
    match unit {
        b'H' => Some(Duration::from_secs(value * 3600)),
        b'M' => Some(Duration::from_secs(value * 60)),
        b'S' => Some(Duration::from_secs(value)),
        b'm' => Some(Duration::from_millis(value)),
        b'u' => Some(Duration::from_micros(value)),
        b'n' => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = DeadlineService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        DeadlineService { inner, limits: self.clone() }
    }
}

/// [`DeadlineLayer`]'s service.
#[derive(Debug, Clone)]
pub struct DeadlineService<S> {
    inner: S,
    limits: DeadlineLayer,
}

impl<S, A, B> Service<Request<A>> for DeadlineService<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    B: Body<Data = Bytes>,
{
    type Response = Response<DeadlineBody<B>>;
    type Error = S::Error;
    type Future = DeadlineFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<A>) -> Self::Future {
        match self.limits.timeout(Method::of(request.uri().path()), request.headers()) {
            Ok(timeout) => {
                let deadline = Instant::now() + timeout;
                request.extensions_mut().insert(Deadline(deadline));
                DeadlineFuture::Running { inner: self.inner.call(request), sleep: sleep_until(deadline), timeout }
            }
            Err(error) => DeadlineFuture::Refused { status: Some(error.into()) },
        }
    }
}

pin_project_lite::pin_project! {
    /// [`DeadlineService`]'s future.
    #[project = DeadlineProjection]
    #[derive(Debug)]
    #[allow(missing_docs, reason = "its variants are the layer's own")]
    pub enum DeadlineFuture<F> {
        Running {
            #[pin]
            inner: F,
            #[pin]
            sleep: Sleep,
            timeout: Duration,
        },
        Refused { status: Option<Status> },
    }
}

impl<F, B, E> Future for DeadlineFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<DeadlineBody<B>>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let status = match self.as_mut().project() {
            DeadlineProjection::Running { inner, sleep, timeout } => {
                // The work first: an answer that is there is given.
                if let Poll::Ready(result) = inner.poll(cx) {
                    let body = |inner| DeadlineBody { inner: Some(inner), sleep: Some(sleep_until(sleep.deadline())), timeout: *timeout };
                    return Poll::Ready(result.map(|response| response.map(body)));
                }
                ready!(sleep.poll(cx));
                Status::from(Error::DeadlineExceeded(*timeout))
            }
            DeadlineProjection::Refused { status } => status.take().expect("a future is not polled after its end"),
        };
        // The work is dropped here and not whenever somebody drops this future.
        self.set(Self::Refused { status: None });
        Poll::Ready(Ok(status.into_http()))
    }
}

pin_project_lite::pin_project! {
    /// [`DeadlineService`]'s response body.
    #[derive(Debug)]
    pub struct DeadlineBody<B> {
        // None: it ended, or its deadline passed.
        #[pin]
        inner: Option<B>,
        #[pin]
        sleep: Option<Sleep>,
        timeout: Duration,
    }
}

/// Empty: the body of a refusal.
impl<B> Default for DeadlineBody<B> {
    fn default() -> Self {
        Self { inner: None, sleep: None, timeout: Duration::ZERO }
    }
}

impl<B: Body<Data = Bytes>> Body for DeadlineBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        let (Some(inner), Some(sleep)) = (this.inner.as_mut().as_pin_mut(), this.sleep.as_pin_mut()) else { return Poll::Ready(None) };
        unread::note_asked();
        // The deadline first: a stream that always has more must end, too.
        if sleep.poll(cx).is_ready() {
            this.inner.set(None);
            return Poll::Ready(Some(Ok(status::trailers(Error::DeadlineExceeded(*this.timeout)))));
        }
        let frame = ready!(inner.poll_frame(cx));
        if frame.is_some() {
            unread::note_given();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn timeout(value: &'static str) -> Option<Duration> {
        parse(&HeaderValue::from_static(value))
    }

    #[test]
    fn timeouts_are_read_as_the_specification_says() {
        assert_eq!(timeout("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(timeout("2M"), Some(Duration::from_secs(120)));
        assert_eq!(timeout("3S"), Some(Duration::from_secs(3)));
        assert_eq!(timeout("04m"), Some(Duration::from_millis(4)));
        assert_eq!(timeout("5u"), Some(Duration::from_micros(5)));
        assert_eq!(timeout("0n"), Some(Duration::ZERO));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for malformed in ["", "H", "1", "100000000n", "+1S", "-1S", "1s", "1 S", " 1S", "1.5S", "0x1S"] {
            assert_eq!(timeout(malformed), None, "{malformed:?}");
        }
    }

    fn settings(unary: u64, query: u64, streaming: u64) -> Grpc {
        let [unary_deadline_max, query_deadline_max, streaming_deadline_max] = [unary, query, streaming].map(Duration::from_secs);
        Grpc { unary_deadline_max, query_deadline_max, streaming_deadline_max, ..Config::default().grpc }
    }

    #[test]
    fn no_stream_lasts_for_longer_than_all_streams_may() {
        let layer = DeadlineLayer::new(&settings(60, 1800, 600));
        let query = Method::of("/tidegate.v1.ReadingService/QueryReadings");
        assert_eq!(layer.timeout(query, &HeaderMap::new()).expect("none is asked for"), Duration::from_secs(600));
    }

    #[test]
    fn the_settings_bound_what_a_client_asks_for_and_stand_in_for_it() {
        let layer = DeadlineLayer::new(&settings(60, 1800, 3600));
        let unary = Method::of("/tidegate.v1.TelemetryService/GetUploadPosition");
        let streaming = Method::of("/grpc.health.v1.Health/Watch");
        let query = Method::of("/tidegate.v1.ReadingService/QueryReadings");
        let asks =
            |value: &'static str| HeaderMap::from_iter([(http::HeaderName::from_static(GRPC_TIMEOUT), HeaderValue::from_static(value))]);
        let seconds = |method, headers| layer.timeout(method, &headers).expect("well-formed").as_secs();
        assert_eq!([unary, query, streaming].map(|method| seconds(method, HeaderMap::new())), [60, 1800, 3600]);
        assert_eq!([unary, query, streaming].map(|method| seconds(method, asks("61S"))), [60, 61, 61]);
        assert_eq!([unary, query, streaming].map(|method| seconds(method, asks("2H"))), [60, 1800, 3600]);
        assert!(matches!(layer.timeout(unary, &asks("soon")), Err(Error::InvalidArgument(_))));
    }
}
