//! Ends calls whose client sends too slowly: a message that is begun must be completed, and a call must be used.
//!
//! Only time in which the handler waits for the client counts. A call of which the client knows the end only by its answer may
//! be silent as long as it likes: keepalive tells whether the client is still there.

use super::{frames::MessageCounter, method::Method, patience::Patience};
use crate::{config::Grpc, error::Error};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tonic::Status;
use tower::{BoxError, Layer, Service};

/// A time limit, and the setting that holds it.
type Limit = (&'static str, Duration);

/// Keeps clients at their pace; see the module.
#[derive(Debug, Clone, Copy)]
pub struct PaceLayer {
    message: Limit,
    idle: Limit,
}

impl PaceLayer {
    /// With the limits of the settings.
    pub fn new(config: &Grpc) -> Self {
        Self { message: ("grpc.message_timeout", config.message_timeout), idle: ("grpc.idle_timeout", config.idle_timeout) }
    }
}

impl<S> Layer<S> for PaceLayer {
    type Service = PaceService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        PaceService { inner, limits: *self }
    }
}

/// [`PaceLayer`]'s service.
#[derive(Debug, Clone)]
pub struct PaceService<S> {
    inner: S,
    limits: PaceLayer,
}

impl<S, A, B> Service<Request<A>> for PaceService<S>
where
    S: Service<Request<PacedBody<A>>, Response = Response<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let PaceLayer { message, idle } = self.limits;
        let between = Method::of(request.uri().path()).answers_at_the_end.then_some(idle);
        let body =
            |inner| PacedBody { inner, message, between, messages: MessageCounter::default(), begun: false, patience: Patience::default() };
        self.inner.call(request.map(body))
    }
}

pin_project_lite::pin_project! {
    /// A request body that is not waited for for ever.
    pub struct PacedBody<A> {
        #[pin]
        inner: A,
        message: Limit,
        // Between two messages.
        between: Option<Limit>,
        messages: MessageCounter,
        // Whether a message has come.
        begun: bool,
        patience: Patience,
    }
}

impl<A> Body for PacedBody<A>
where
    A: Body<Data = Bytes>,
    A::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.project();
        let Poll::Ready(frame) = this.inner.poll_frame(cx) else {
            let owes_message = !*this.begun || this.messages.is_amid_message();
            let Some((setting, limit)) = (if owes_message { Some(*this.message) } else { *this.between }) else { return Poll::Pending };
            ready!(this.patience.poll_exhausted(limit, cx));
            return Poll::Ready(Some(Err(Error::TooSlow { setting, limit }.into())));
        };
        let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref());
        match data.is_some_and(|data| this.messages.feed(data) > 0) {
            true => {
                *this.begun = true;
                this.patience.renew();
            }
            false => this.patience.renew_if_unattended(),
        }
        Poll::Ready(frame.map(|frame| frame.map_err(|error| Status::from_error(error.into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
