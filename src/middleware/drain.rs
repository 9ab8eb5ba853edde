//! Knows which calls are open, so that a stop can wait for them, and ends those that would never end.
//!
//! The gateway's own streams are told of a stop by their handlers and end well. The streams of `grpc.health.v1` and
//! `grpc.reflection` know nothing of it: they are ended here, as each would keep its connection open to the last moment.

use super::{
    body::GuardedBody,
    method::{Family, Method},
    status,
};
use crate::error::Error;
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tower::{Layer, Service};

/// Counts the calls that are open, but for health checks. Cheap to clone: all clones are one.
#[derive(Debug, Clone)]
pub struct CallTracker(TaskTracker);

impl Default for CallTracker {
    fn default() -> Self {
        Self::new()
    }
}

impl CallTracker {
    /// None is open.
    pub fn new() -> Self {
        let calls = TaskTracker::new();
        // It is waited for being empty; "closed" is only its word for being waited for.
        calls.close();
        Self(calls)
    }

    /// How many calls are open.
    pub fn open(&self) -> usize {
        self.0.len()
    }

    /// Waits until no call is open.
    ///
    /// By then the gateway has no work left; the last bytes of the responses may still be on their way out: wait for
    /// [`Listener::serve`](crate::app::listener::Listener::serve) for these.
    pub async fn wait_idle(&self) {
        self.0.wait().await;
    }
}

/// Cancelled when the gateway is being stopped, and some seconds after a call's connection has begun to end, as it is old or was idle: what
/// could go on for ever ends then. In the extensions of each request.
#[derive(Debug, Clone, Default)]
pub struct Draining(pub CancellationToken);

impl Draining {
    /// That of a request; of one that came by no connection, one that never is.
    pub fn of(extensions: &http::Extensions) -> CancellationToken {
        extensions.get::<Self>().cloned().unwrap_or_default().0
    }
}

/// Tracks calls and ends foreign streams; see the module.
#[derive(Debug, Clone)]
pub struct DrainLayer {
    calls: CallTracker,
}

impl DrainLayer {
    /// Tracks calls with `calls`.
    pub fn new(calls: CallTracker) -> Self {
        Self { calls }
    }
}

impl<S> Layer<S> for DrainLayer {
    type Service = DrainService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        DrainService { inner, layer: self.clone() }
    }
}

/// [`DrainLayer`]'s service.
#[derive(Debug, Clone)]
pub struct DrainService<S> {
    inner: S,
    layer: DrainLayer,
}

impl<S, A, B> Service<Request<A>> for DrainService<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    B: Body<Data = Bytes>,
{
    type Response = Response<DrainBody<B>>;
    type Error = S::Error;
    type Future = DrainFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let Method { family, streaming, .. } = *Method::of(request.uri().path());
        let open = (family != Family::Health).then(|| self.layer.calls.0.token());
        let foreign_stream = streaming && matches!(family, Family::Health | Family::Reflection);
        let drain = foreign_stream.then(|| Draining::of(request.extensions()));
        DrainFuture { inner: self.inner.call(request), open, drain }
    }
}

pin_project_lite::pin_project! {
    /// [`DrainService`]'s future.
    #[derive(Debug)]
    pub struct DrainFuture<F> {
        // Dropped before the token.
        #[pin]
        inner: F,
        open: Option<TaskTrackerToken>,
        drain: Option<CancellationToken>,
    }
}

impl<F, B, E> Future for DrainFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<DrainBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = ready!(this.inner.poll(cx));
        let (open, drain) = (this.open.take(), this.drain.take());
        let body = |inner| GuardedBody::new(EndingBody { inner: Some(inner), drain: drain.map(CancellationToken::cancelled_owned) }, open);
        Poll::Ready(result.map(|response| response.map(body)))
    }
}

/// [`DrainService`]'s response body.
pub type DrainBody<B> = GuardedBody<EndingBody<B>, TaskTrackerToken>;

pin_project_lite::pin_project! {
    /// A body that ends when the gateway is being stopped, if it is a foreign stream's.
    #[derive(Debug)]
    pub struct EndingBody<B> {
        // None: it was ended.
        #[pin]
        inner: Option<B>,
        #[pin]
        drain: Option<WaitForCancellationFutureOwned>,
    }
}

impl<B: Body<Data = Bytes>> Body for EndingBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        let Some(inner) = this.inner.as_mut().as_pin_mut() else { return Poll::Ready(None) };
        // The body first: a health watch's last word, NOT_SERVING, goes out before its end.
        if let Poll::Ready(frame) = inner.poll_frame(cx) {
            return Poll::Ready(frame);
        }
        let Some(drain) = this.drain.as_pin_mut() else { return Poll::Pending };
        ready!(drain.poll(cx));
        this.inner.set(None);
        Poll::Ready(Some(Ok(status::trailers(Error::Draining))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}
