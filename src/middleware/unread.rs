//! Ends calls whose client does not take what it is sent.
//!
//! While HTTP/2 flow control holds a response back, nobody asks its body for more: no deadline in there is looked at, and the
//! memory, the query and the place that the call has are kept for it. So the task that serves the call looks from outside. The
//! body says what it waits for: for the client as long as something that it gave has not led to the next question, else
//! for the gateway's own work, which may take its time.

use super::patience::Patience;
use metrics::Counter;
use std::{
    cell::Cell,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

tokio::task_local! {
    static RESPONSE: Cell<Response>;
}

/// What a call's response has done while its task was polled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Response {
    /// Nothing.
    Untouched,
    /// It was asked for more and has none: the gateway is to go on.
    Asked,
    /// It gave something, and was not asked again: the client is to go on.
    Given,
}

/// Says that the response was asked for more.
pub fn note_asked() {
    note(Response::Asked);
}

/// Says that the response has given something to send.
pub fn note_given() {
    note(Response::Given);
}

fn note(response: Response) {
    // Without a task that looks at it, as in a test of a layer alone, there is nobody to tell.
    let _ = RESPONSE.try_with(|cell| cell.set(response));
}

pin_project_lite::pin_project! {
    /// The task that serves a call, which ends it when the client takes nothing for too long.
    pub struct CallTask<F> {
        // None: it was ended.
        #[pin]
        serving: Option<F>,
        given: bool,
        patience: Patience,
        timeout: Duration,
        ended: Counter,
    }
}

impl<F> CallTask<F> {
    /// Serves a call; `ended` counts those that are ended.
    pub fn new(serving: F, timeout: Duration, ended: Counter) -> Self {
        Self { serving: Some(serving), given: false, patience: Patience::default(), timeout, ended }
    }
}

impl<F: Future<Output = ()>> Future for CallTask<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let Some(serving) = this.serving.as_mut().as_pin_mut() else { return Poll::Ready(()) };
        let (served, response) = RESPONSE.sync_scope(Cell::new(Response::Untouched), || (serving.poll(cx), RESPONSE.with(Cell::get)));
        if served.is_ready() {
            return served;
        }
        if response != Response::Untouched {
            *this.given = response == Response::Given;
            this.patience.renew();
        }
        if !*this.given {
            return Poll::Pending;
        }
        ready!(this.patience.poll_exhausted(*this.timeout, cx));
        this.ended.increment(1);
        // The stream is reset with it.
        this.serving.set(None);
        Poll::Ready(())
    }
}
