//! A response body that holds something for as long as it lasts.

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::{
    pin::Pin,
    task::{Context, Poll},
};

pin_project_lite::pin_project! {
    /// A body with a guard that is released when the body is dropped: at its end, or when the client goes away.
    /// The default is empty and holds nothing: the body of a refusal.
    #[derive(Debug)]
    pub struct GuardedBody<B, G> {
        // Dropped before the guard: what the guard stands for is over only then.
        #[pin]
        inner: Option<B>,
        guard: Option<G>,
    }
}

impl<B, G> GuardedBody<B, G> {
    pub fn new(inner: B, guard: Option<G>) -> Self {
        Self { inner: Some(inner), guard }
    }
}

impl<B, G> Default for GuardedBody<B, G> {
    fn default() -> Self {
        Self { inner: None, guard: None }
    }
}

impl<B: Body<Data = Bytes>, G> Body for GuardedBody<B, G> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        self.project().inner.as_pin_mut().map_or(Poll::Ready(None), |inner| inner.poll_frame(cx))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}
