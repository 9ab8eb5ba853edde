//! Refuses calls at once when as many are open as the settings allow.
//!
//! A queue here would only hide the overload: callers would wait, give up and come again. The answer says when to.

use super::{
    body::GuardedBody,
    method::{Family, Method},
};
use crate::{
    config::Grpc,
    error::Error,
    telemetry::{Metrics, names},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use metrics::Counter;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;
use tower::{Layer, Service};

/// How many calls of a kind may be open.
#[derive(Clone)]
struct Limit {
    setting: &'static str,
    limit: usize,
    free: Arc<Semaphore>,
    shed: Counter,
}

impl Limit {
    fn new(metrics: &Metrics, setting: &'static str, limit: usize) -> Self {
        let shed = metrics.counter(names::GRPC_REQUESTS_SHED, &[("setting", setting.into())]);
        Self { setting, limit, free: Arc::new(Semaphore::new(limit)), shed }
    }

    fn admit(&self) -> Result<OwnedSemaphorePermit, Error> {
        self.free.clone().try_acquire_owned().map_err(|_| {
            self.shed.increment(1);
            Error::Overloaded { setting: self.setting, limit: self.limit }
        })
    }
}

/// Limits the open calls, unary and streaming each for itself, for all connections together; see the module.
#[derive(Clone)]
pub struct ShedLayer {
    unary: Limit,
    streaming: Limit,
}

impl ShedLayer {
    /// With the limits of the settings.
    pub fn new(config: &Grpc, metrics: &Metrics) -> Self {
        Self {
            unary: Limit::new(metrics, "grpc.unary_calls_max", config.unary_calls_max),
            streaming: Limit::new(metrics, "grpc.streaming_calls_max", config.streaming_calls_max),
        }
    }

    /// The permit for a call. Probes need none: a gateway that is busy is not dead.
    fn admit(&self, method: &Method) -> Result<Option<OwnedSemaphorePermit>, Error> {
        match (method.family, method.streaming) {
            (Family::Health, _) => Ok(None),
            (_, false) => self.unary.admit().map(Some),
            (_, true) => self.streaming.admit().map(Some),
        }
    }
}

impl<S> Layer<S> for ShedLayer {
    type Service = ShedService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ShedService { inner, limits: self.clone() }
    }
}

/// [`ShedLayer`]'s service.
#[derive(Clone)]
pub struct ShedService<S> {
    inner: S,
    limits: ShedLayer,
}

impl<S, A, B> Service<Request<A>> for ShedService<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    B: Body<Data = Bytes>,
{
    type Response = Response<ShedBody<B>>;
    type Error = S::Error;
    type Future = ShedFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        match self.limits.admit(Method::of(request.uri().path())) {
            Ok(permit) => ShedFuture::Admitted { inner: self.inner.call(request), permit },
            Err(error) => ShedFuture::Refused { status: Some(error.into()) },
        }
    }
}

/// [`ShedService`]'s response body: holds the permit.
pub type ShedBody<B> = GuardedBody<B, OwnedSemaphorePermit>;

pin_project_lite::pin_project! {
    /// [`ShedService`]'s future.
    #[project = ShedProjection]
    #[allow(missing_docs, reason = "its variants are the layer's own")]
    pub enum ShedFuture<F> {
        Admitted {
            #[pin]
            inner: F,
            permit: Option<OwnedSemaphorePermit>,
        },
        Refused { status: Option<Status> },
    }
}

impl<F, B, E> Future for ShedFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<ShedBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            ShedProjection::Admitted { inner, permit } => {
                let result = ready!(inner.poll(cx));
                Poll::Ready(result.map(|response| response.map(|body| GuardedBody::new(body, permit.take()))))
            }
            ShedProjection::Refused { status } => Poll::Ready(Ok(status.take().expect("a future is not polled after its end").into_http())),
        }
    }
}
