//! Holds each operator to the calls that it may make: how many a second, and how many at once.

use super::body::GuardedBody;
use crate::{
    auth::{Caller, Principal},
    limits::{OpenCall, OperatorLimits},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};
use tonic::Status;
use tower::{Layer, Service};

/// Limits what operators call; see the module.
#[derive(Clone)]
pub struct QuotaLayer(OperatorLimits);

impl QuotaLayer {
    /// With these limits.
    pub fn new(limits: OperatorLimits) -> Self {
        Self(limits)
    }
}

impl<S> Layer<S> for QuotaLayer {
    type Service = QuotaService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        QuotaService { inner, limits: self.0.clone() }
    }
}

/// [`QuotaLayer`]'s service.
#[derive(Clone)]
pub struct QuotaService<S> {
    inner: S,
    limits: OperatorLimits,
}

impl<S, A, B> Service<Request<A>> for QuotaService<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    B: Body<Data = Bytes>,
{
    type Response = Response<QuotaBody<B>>;
    type Error = S::Error;
    type Future = QuotaFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let grant = Caller::of(request.extensions()).grant;
        let opened = match &grant.principal {
            Principal::Operator(_) => self.limits.open(&grant.usage).map(Some),
            _ => Ok(None),
        };
        match opened {
            Ok(open) => QuotaFuture::Opened { inner: self.inner.call(request), open },
            Err(error) => QuotaFuture::Refused { status: Some(error.into()) },
        }
    }
}

/// [`QuotaService`]'s response body: holds the call's place.
pub type QuotaBody<B> = GuardedBody<B, OpenCall>;

pin_project_lite::pin_project! {
    /// [`QuotaService`]'s future.
    #[project = QuotaProjection]
    #[allow(missing_docs, reason = "its variants are the layer's own")]
    pub enum QuotaFuture<F> {
        Opened {
            #[pin]
            inner: F,
            open: Option<OpenCall>,
        },
        Refused { status: Option<Status> },
    }
}

impl<F, B, E> Future for QuotaFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<QuotaBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            QuotaProjection::Opened { inner, open } => {
                let result = ready!(inner.poll(cx));
                Poll::Ready(result.map(|response| response.map(|body| GuardedBody::new(body, open.take()))))
            }
            QuotaProjection::Refused { status } => {
                Poll::Ready(Ok(status.take().expect("a future is not polled after its end").into_http()))
            }
        }
    }
}
