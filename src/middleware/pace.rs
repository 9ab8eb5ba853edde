//! Ends calls whose client sends too slowly: a message that is begun must be completed, and a call must be used. Until a message
//! is complete it takes memory: all large ones together have a bound, and what would go beyond it waits. Those that fit into the
//! call's flow-control window take no more than any call may, and wait for nobody: who begins many large messages holds up
//! others that are large, but no device that sends as devices do.
//!
//! As it is looked at where each message ends, the messages that come in are counted here, too.
//!
//! Only time in which the handler waits for the client counts. A call of which the client does not wait for the end may be
//! silent as long as it likes: keepalive tells whether the client is still there.

use super::{frames::MessageCounter, method::Method, patience::Patience};
use crate::{
    config::Grpc,
    error::Error,
    telemetry::{Metrics, names},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use metrics::Counter;
use std::{
    ops::RangeInclusive,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;
use tonic::Status;
use tower::{BoxError, Layer, Service};

/// What room for incomplete messages is given out in.
const ROOM_BYTES: usize = 1 << 10;

/// A time limit, and the setting that holds it.
type Limit = (&'static str, Duration);

#[derive(Debug)]
struct Limits {
    /// For the first message, and any that has begun.
    message: Limit,
    /// Between two messages of an upload.
    idle: Limit,
    /// Which messages need room: longer than the call's window, and not so long that they are refused.
    needing_bytes: RangeInclusive<usize>,
    /// How much room there is in all.
    room_max: u32,
    room: Arc<Semaphore>,
}

impl Limits {
    /// How much room the message needs that is not complete, if there is one.
    fn needed(&self, messages: &MessageCounter) -> u32 {
        let bytes = messages.announced_bytes() as usize;
        if self.needing_bytes.contains(&bytes) { (bytes.div_ceil(ROOM_BYTES) as u32).min(self.room_max) } else { 0 }
    }
}

/// Keeps clients at their pace; see the module.
#[derive(Debug, Clone)]
pub struct PaceLayer {
    limits: Arc<Limits>,
    received: Received,
}

/// How many messages came in, by [`Method::index`].
type Received = Arc<[Counter]>;

impl PaceLayer {
    /// With the limits of the settings.
    pub fn new(config: &Grpc, metrics: &Metrics) -> Self {
        let room_max = u32::try_from(config.incoming_bytes_max / ROOM_BYTES).unwrap_or(u32::MAX);
        let limits = Limits {
            message: ("grpc.message_timeout", config.message_timeout),
            idle: ("grpc.idle_timeout", config.idle_timeout),
            needing_bytes: config.stream_window_bytes as usize + 1..=config.message_bytes_max,
            room_max,
            room: Arc::new(Semaphore::new(room_max as usize)),
        };
        let received = |method: &'static Method| metrics.counter(names::GRPC_MESSAGES_RECEIVED, &[("method", method.name.as_str().into())]);
        Self { limits: Arc::new(limits), received: Method::all().iter().map(received).collect() }
    }
}

impl<S> Layer<S> for PaceLayer {
    type Service = PaceService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        PaceService { inner, limits: self.limits.clone(), received: self.received.clone() }
    }
}

/// [`PaceLayer`]'s service.
#[derive(Debug, Clone)]
pub struct PaceService<S> {
    inner: S,
    limits: Arc<Limits>,
    received: Received,
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
        let method = Method::of(request.uri().path());
        let pace = Pace {
            is_upload: method.answers_at_the_end,
            received: self.received[method.index].clone(),
            limits: self.limits.clone(),
            messages: MessageCounter::default(),
            begun: false,
            patience: Patience::default(),
        };
        self.inner.call(request.map(|inner| PacedBody { inner, pace, room: None, held: None }))
    }
}

/// How the client of a call is doing.
struct Pace {
    limits: Arc<Limits>,
    /// Whether the client must go on between two messages, too.
    is_upload: bool,
    received: Counter,
    messages: MessageCounter,
    /// Whether a message has come.
    begun: bool,
    patience: Patience,
}

impl Pace {
    /// Waits for the client. Ready when that has taken too long.
    fn poll_too_slow(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let owes_message = !self.begun || self.messages.is_amid_message();
        let limit = if owes_message { Some(self.limits.message) } else { self.is_upload.then_some(self.limits.idle) };
        let Some((setting, limit)) = limit else { return Poll::Pending };
        self.patience.poll_exhausted(limit, cx).map(|()| Error::TooSlow { setting, limit })
    }

    /// Takes note of what has come; whether it completed a message.
    fn note(&mut self, data: &[u8]) -> bool {
        let messages = self.messages.feed(data);
        self.received.increment(messages);
        let completed = messages > 0;
        self.begun |= completed;
        if completed {
            self.patience.renew()
        } else {
            self.patience.renew_if_unattended()
        }
        completed
    }
}

/// Data that is given on when there is room for the message that it begins.
struct Held {
    data: Bytes,
    needed: u32,
    room: PollSemaphore,
}

pin_project_lite::pin_project! {
    /// A request body that is not waited for for ever.
    pub struct PacedBody<A> {
        #[pin]
        inner: A,
        pace: Pace,
        // Of the message that is coming.
        room: Option<OwnedSemaphorePermit>,
        held: Option<Box<Held>>,
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
        if this.held.is_none() {
            let Poll::Ready(frame) = this.inner.poll_frame(cx) else {
                let error = ready!(this.pace.poll_too_slow(cx));
                return Poll::Ready(Some(Err(error.into())));
            };
            let frame = frame.map(|frame| frame.map_err(|error| Status::from_error(error.into())));
            let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) else { return Poll::Ready(frame) };
            if this.pace.note(data) {
                *this.room = None;
            }
            let needed = if this.room.is_some() { 0 } else { this.pace.limits.needed(&this.pace.messages) };
            if needed == 0 {
                return Poll::Ready(frame);
            }
            *this.held = Some(Box::new(Held { data: data.clone(), needed, room: PollSemaphore::new(this.pace.limits.room.clone()) }));
        }
        if let Some(held) = this.held.as_mut() {
            *this.room = ready!(held.room.poll_acquire_many(cx, held.needed));
            // Which once a message the client had no part in.
            this.pace.patience.renew();
        }
        Poll::Ready(this.held.take().map(|held| Ok(Frame::data(held.data))))
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
