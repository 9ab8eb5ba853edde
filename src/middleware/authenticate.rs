//! Finds out who calls, and ends the call when its credential does.
//!
//! Once a call, and nothing a message: behind its beginning a call costs a look at whether its credential was revoked.

use super::status;
use crate::{
    auth::{Attribution, Authenticator, Caller, Ending, Grant, Identity},
    config::Grpc,
    error::{Error, Failure, Reason},
    telemetry::{Metrics, names},
};
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use metrics::Counter;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::timeout;
use tonic::Status;
use tower::{Layer, Service};

/// Calls refused for want of a right or a credential, by reason.
#[derive(Clone)]
pub struct Refusals(Arc<[(Reason, Counter)]>);

impl Refusals {
    /// The reasons that are counted.
    pub const REASONS: [Reason; 6] = [
        Reason::CredentialMissing,
        Reason::CredentialInvalid,
        Reason::CredentialExpired,
        Reason::CredentialRevoked,
        Reason::KeysUnavailable,
        Reason::PermissionDenied,
    ];

    /// All at 0.
    pub fn new(metrics: &Metrics) -> Self {
        let counter = |reason: Reason| (reason, metrics.counter(names::AUTH_REFUSALS, &[("reason", reason.as_str().into())]));
        Self(Self::REASONS.into_iter().map(counter).collect())
    }

    /// Counts one.
    pub fn count(&self, error: &Error) {
        if let Some((_, counter)) = self.0.iter().find(|(reason, _)| *reason == error.reason()) {
            counter.increment(1);
        }
    }
}

/// Finds out who calls; see the module.
#[derive(Clone)]
pub struct AuthenticateLayer {
    auth: Authenticator,
    patience: Duration,
    refusals: Refusals,
}

impl AuthenticateLayer {
    /// Asks `auth`, for as long as any call may take that is not a stream: its deadline begins behind that.
    pub fn new(config: &Grpc, auth: Authenticator, refusals: Refusals) -> Self {
        Self { auth, patience: config.unary_deadline_max, refusals }
    }
}

impl<S> Layer<S> for AuthenticateLayer {
    type Service = AuthenticateService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        AuthenticateService { inner, layer: self.clone() }
    }
}

/// [`AuthenticateLayer`]'s service.
#[derive(Clone)]
pub struct AuthenticateService<S> {
    inner: S,
    layer: AuthenticateLayer,
}

impl<S, A, B> Service<Request<A>> for AuthenticateService<S>
where
    S: Service<Request<A>, Response = Response<B>> + Clone,
    B: Body<Data = Bytes>,
{
    type Response = Response<AuthenticateBody<B>>;
    type Error = S::Error;
    type Future = AuthenticateFuture<S, A, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let refusals = self.layer.refusals.clone();
        let state = match self.layer.auth.identify(request.headers(), request.extensions()) {
            Ok(Identity::Known(grant)) => State::begin(&mut self.inner, request, grant),
            Ok(Identity::Unknown(token)) => {
                let AuthenticateLayer { auth, patience, .. } = self.layer.clone();
                let asked = async move {
                    let asked = timeout(patience, auth.look_up(&token)).await;
                    asked.unwrap_or_else(|_| Err(Error::DeadlineExceeded(patience).into()))
                };
                // The one that was asked whether it is ready.
                let next = self.inner.clone();
                let inner = std::mem::replace(&mut self.inner, next);
                State::Asking { asked: asked.boxed(), call: Some((inner, request)) }
            }
            Err(error) => State::Refused { error: Some(error) },
        };
        AuthenticateFuture { state, refusals }
    }
}

pin_project_lite::pin_project! {
    /// [`AuthenticateService`]'s future.
    pub struct AuthenticateFuture<S, A, F> {
        #[pin]
        state: State<S, A, F>,
        refusals: Refusals,
    }
}

pin_project_lite::pin_project! {
    #[project = StateProjection]
    enum State<S, A, F> {
        // A credential that is not at hand. Boxed: it is seldom.
        Asking {
            asked: BoxFuture<'static, Result<Arc<Grant>, Failure>>,
            call: Option<(S, Request<A>)>,
        },
        Running {
            #[pin]
            inner: F,
            ending: Option<Pin<Box<Ending>>>,
        },
        Refused { error: Option<Error> },
    }
}

impl<S: Service<Request<A>>, A> State<S, A, S::Future> {
    fn begin(inner: &mut S, mut request: Request<A>, grant: Arc<Grant>) -> Self {
        let ending = grant.ending();
        let caller = match request.extensions().get::<Attribution>() {
            Some(attribution) => Caller::attributed(grant, attribution.clone()),
            None => Caller::new(grant),
        };
        request.extensions_mut().insert(caller);
        Self::Running { inner: inner.call(request), ending }
    }
}

impl<S, A, B> Future for AuthenticateFuture<S, A, S::Future>
where
    S: Service<Request<A>, Response = Response<B>>,
{
    type Output = Result<Response<AuthenticateBody<B>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            let next = match this.state.as_mut().project() {
                StateProjection::Asking { asked, call } => match ready!(asked.poll_unpin(cx)) {
                    Ok(grant) => {
                        let (mut inner, request) = call.take().expect("it is called once");
                        State::begin(&mut inner, request, grant)
                    }
                    Err(failure) => State::Refused { error: Some(failure.into()) },
                },
                StateProjection::Running { inner, ending } => {
                    if let Poll::Ready(result) = inner.poll(cx) {
                        let (ending, refusals) = (ending.take(), this.refusals.clone());
                        let body = |inner| AuthenticateBody { inner: Some(inner), ending, refusals: Some(refusals) };
                        return Poll::Ready(result.map(|response| response.map(body)));
                    }
                    let Some(ending) = ending else { return Poll::Pending };
                    State::Refused { error: Some(ready!(ending.poll_unpin(cx))) }
                }
                StateProjection::Refused { error } => {
                    let error = error.take().expect("a future is not polled after its end");
                    this.refusals.count(&error);
                    return Poll::Ready(Ok(Status::from(error).into_http()));
                }
            };
            // What was under way is dropped here.
            this.state.set(next);
        }
    }
}

pin_project_lite::pin_project! {
    /// [`AuthenticateService`]'s response body. The default is empty: the body of a refusal.
    pub struct AuthenticateBody<B> {
        // None: it ended.
        #[pin]
        inner: Option<B>,
        ending: Option<Pin<Box<Ending>>>,
        refusals: Option<Refusals>,
    }
}

impl<B> Default for AuthenticateBody<B> {
    fn default() -> Self {
        Self { inner: None, ending: None, refusals: None }
    }
}

impl<B: Body<Data = Bytes>> Body for AuthenticateBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        let Some(inner) = this.inner.as_mut().as_pin_mut() else { return Poll::Ready(None) };
        // The credential first: a stream that always has more must end, too.
        if let Some(ending) = this.ending
            && let Poll::Ready(error) = ending.poll_unpin(cx)
        {
            this.inner.set(None);
            this.refusals.iter().for_each(|refusals| refusals.count(&error));
            return Poll::Ready(Some(Ok(status::trailers(error))));
        }
        inner.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}
