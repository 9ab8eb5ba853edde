//! Refuses calls that are not the caller's to make, and notes those of operators that change something.
//!
//! A call that is noted is answered when its note is in the store, but does not wait for that for ever; one that its client gives up is
//! noted as CANCELLED.

use super::{authenticate::Refusals, body::GuardedBody, method::Method, request_id::RequestId, status::code_in};
use crate::{
    auth::{AuditLog, Caller, PendingEntry, Rule},
    config::Grpc,
    error::Error,
    model::Timestamp,
    store::AuditRow,
};
use bytes::Bytes;
use http::{Extensions, Request, Response};
use http_body::Body;
use parking_lot::Mutex;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    task::JoinHandle,
    time::{Timeout, timeout},
};
use tonic::{Code, Status, transport::server::TcpConnectInfo};
use tower::{Layer, Service};

/// Holds calls to the policy; see the module.
#[derive(Clone)]
pub struct AuthorizeLayer {
    audit: AuditLog,
    patience: Duration,
    refusals: Refusals,
}

impl AuthorizeLayer {
    /// Notes in `audit`, and waits for that as long as for any call that is not a stream.
    pub fn new(config: &Grpc, audit: AuditLog, refusals: Refusals) -> Self {
        Self { audit, patience: config.unary_deadline_max, refusals }
    }
}

impl<S> Layer<S> for AuthorizeLayer {
    type Service = AuthorizeService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        AuthorizeService { inner, layer: self.clone() }
    }
}

/// [`AuthorizeLayer`]'s service.
#[derive(Clone)]
pub struct AuthorizeService<S> {
    inner: S,
    layer: AuthorizeLayer,
}

impl<S, A, B> Service<Request<A>> for AuthorizeService<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    B: Body<Data = Bytes>,
{
    type Response = Response<AuthorizeBody<B>>;
    type Error = S::Error;
    type Future = AuthorizeFuture<S::Future, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<A>) -> Self::Future {
        let method = Method::of(request.uri().path());
        let (rule, mut caller) = (Rule::of(method), Caller::of(request.extensions()));
        let note = (rule.audited && self.layer.audit.notes(&caller)).then(|| {
            let resource = Arc::<Mutex<String>>::default();
            caller.resource = Some(resource.clone());
            PendingEntry::new(self.layer.audit.clone(), row(method, &caller, request.extensions()), resource)
        });
        match rule.access.check(&caller.grant.principal) {
            Ok(()) => {
                if note.is_some() {
                    request.extensions_mut().insert(caller);
                }
                AuthorizeFuture::Running { inner: self.inner.call(request), note, patience: self.layer.patience }
            }
            Err(error) => {
                self.layer.refusals.count(&error);
                AuthorizeFuture::Refused { error: Some(error), note, patience: self.layer.patience }
            }
        }
    }
}

fn row(method: &Method, caller: &Caller, extensions: &Extensions) -> AuditRow {
    let peer = extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
    AuditRow {
        key: 0,
        time: Timestamp::now(),
        actor: caller.grant.actor(),
        credential: caller.grant.credential.clone(),
        method: method.name.clone(),
        resource: String::new(),
        outcome: String::new(),
        peer: peer.map(|peer| peer.to_string()).unwrap_or_default(),
        request_id: extensions.get::<RequestId>().map(ToString::to_string).unwrap_or_default(),
    }
}

/// [`AuthorizeService`]'s response body.
pub type AuthorizeBody<B> = GuardedBody<B, ()>;

pin_project_lite::pin_project! {
    /// [`AuthorizeService`]'s future.
    #[project = AuthorizeProjection]
    #[allow(missing_docs, private_interfaces, reason = "its variants are the layer's own")]
    pub enum AuthorizeFuture<F, B> {
        Running {
            #[pin]
            inner: F,
            note: Option<PendingEntry>,
            patience: Duration,
        },
        Refused {
            error: Option<Error>,
            note: Option<PendingEntry>,
            patience: Duration,
        },
        Noting {
            // Boxed: most calls are not noted.
            written: Pin<Box<Timeout<JoinHandle<()>>>>,
            response: Option<Response<AuthorizeBody<B>>>,
            patience: Duration,
        },
    }
}

impl<F, B, E> Future for AuthorizeFuture<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<AuthorizeBody<B>>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let (response, note, patience) = match self.as_mut().project() {
                AuthorizeProjection::Running { inner, note, patience } => match ready!(inner.poll(cx)) {
                    Ok(response) => (response.map(|body| GuardedBody::new(body, None)), note.take(), *patience),
                    Err(error) => return Poll::Ready(Err(error)),
                },
                AuthorizeProjection::Refused { error, note, patience } => {
                    let error = error.take().expect("a future is not polled after its end");
                    (Status::from(error).into_http(), note.take(), *patience)
                }
                AuthorizeProjection::Noting { written, response, patience } => {
                    let response = match ready!(written.as_mut().poll(cx)) {
                        // A panic of it was told by the runtime; the call is answered all the same.
                        Ok(_) => response.take().expect("a future is not polled after its end"),
                        Err(_) => Status::from(Error::DeadlineExceeded(*patience)).into_http(),
                    };
                    return Poll::Ready(Ok(response));
                }
            };
            let code = code_in(response.headers()).unwrap_or(Code::Ok);
            let Some(written) = note.and_then(|mut note| note.write(code)) else { return Poll::Ready(Ok(response)) };
            self.set(Self::Noting { written: Box::pin(timeout(patience, written)), response: Some(response), patience });
        }
    }
}
