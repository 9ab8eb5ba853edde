//! A panic in the work on a call ends that call with INTERNAL, and nothing else.

use super::{request_id::RequestId, status};
use crate::{
    error::Error,
    telemetry::{Metrics, names},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use metrics::Counter;
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll, ready},
};
use tonic::Status;
use tower::{Layer, Service};

/// Catches panics; see the module.
#[derive(Clone)]
pub struct CatchPanicLayer {
    panics: Counter,
}

impl CatchPanicLayer {
    /// Makes the handle that panics are counted with.
    pub fn new(metrics: &Metrics) -> Self {
        Self { panics: metrics.counter(names::PANICS, &[]) }
    }
}

impl<S> Layer<S> for CatchPanicLayer {
    type Service = CatchPanicService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        CatchPanicService { inner, panics: self.panics.clone() }
    }
}

/// [`CatchPanicLayer`]'s service.
#[derive(Clone)]
pub struct CatchPanicService<S> {
    inner: S,
    panics: Counter,
}

impl<S, A, B> Service<Request<A>> for CatchPanicService<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    B: Body<Data = Bytes>,
{
    type Response = Response<CatchPanicBody<B>>;
    type Error = S::Error;
    type Future = CatchPanicFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let catcher = Catcher { panics: self.panics.clone(), request_id: request.extensions().get().cloned() };
        let inner = catcher.catch(|| self.inner.call(request));
        CatchPanicFuture { inner, catcher: Some(catcher) }
    }
}

/// Runs pieces of the work on one call.
struct Catcher {
    panics: Counter,
    request_id: Option<RequestId>,
}

impl Catcher {
    /// `None` when `work` panicked.
    ///
    /// What panicked may be in a state that nobody thought of: the caller drops it and does not touch it again.
    fn catch<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        catch_unwind(AssertUnwindSafe(work)).inspect_err(|payload| self.report(payload.as_ref())).ok()
    }

    fn report(&self, payload: &(dyn Any + Send)) {
        let text = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let request_id = self.request_id.as_ref().map(tracing::field::display);
        tracing::error!(request_id, panic = text.unwrap_or("(not a text)"), "call.panicked");
        self.panics.increment(1);
    }
}

pin_project_lite::pin_project! {
    /// [`CatchPanicService`]'s future.
    pub struct CatchPanicFuture<F> {
        // None: it panicked.
        #[pin]
        inner: Option<F>,
        catcher: Option<Catcher>,
    }
}

impl<F, B, E> Future for CatchPanicFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<CatchPanicBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let catcher = this.catcher.as_ref().expect("a future is not polled after its end");
        let polled = this.inner.as_mut().as_pin_mut().and_then(|inner| catcher.catch(|| inner.poll(cx)));
        let Some(polled) = polled else {
            this.inner.set(None);
            return Poll::Ready(Ok(Status::from(Error::Internal).into_http()));
        };
        let result = ready!(polled);
        Poll::Ready(result.map(|response| response.map(|inner| CatchPanicBody { inner: Some(inner), catcher: this.catcher.take() })))
    }
}

pin_project_lite::pin_project! {
    /// [`CatchPanicService`]'s response body.
    pub struct CatchPanicBody<B> {
        // None: it panicked.
        #[pin]
        inner: Option<B>,
        catcher: Option<Catcher>,
    }
}

impl<B> Default for CatchPanicBody<B> {
    fn default() -> Self {
        Self { inner: None, catcher: None }
    }
}

impl<B: Body<Data = Bytes>> Body for CatchPanicBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        let (Some(inner), Some(catcher)) = (this.inner.as_mut().as_pin_mut(), this.catcher) else { return Poll::Ready(None) };
        catcher.catch(|| inner.poll_frame(cx)).unwrap_or_else(|| {
            this.inner.set(None);
            Poll::Ready(Some(Ok(status::trailers(Error::Internal))))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}
