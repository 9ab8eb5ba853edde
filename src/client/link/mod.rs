//! The link of an always-on device: one `Connect` stream, kept up for as long as the device runs.

mod session;

use super::{
    backoff::{Backoff, BackoffSettings},
    channel::Channel,
    queue::{Acknowledged, Queue, QueueError},
};
use crate::{
    error::StatusFacts,
    model::{DeviceId, StreamId},
    pb::{self, device_link_service_client::DeviceLinkServiceClient},
};
use serde_json::{Map, Value as Json};
use session::Session;
use std::{sync::Arc, time::Duration};
use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Status;

/// How a link behaves.
#[derive(Debug, Clone)]
pub struct LinkSettings {
    /// How many batches may be sent without being acknowledged; default 16.
    pub in_flight_batches_max: usize,
    /// How long the gateway may take to welcome the device; default 10 s.
    pub welcome_timeout: Duration,
    /// How long the gateway may let sent batches wait without acknowledging any; then the link connects again. Default 60 s.
    pub ack_timeout: Duration,
    /// How long stopping waits for the acknowledgements of what was sent; default 5 s.
    pub stop_timeout: Duration,
    /// The waits between connections.
    pub backoff: BackoffSettings,
}

impl Default for LinkSettings {
    fn default() -> Self {
        Self {
            in_flight_batches_max: 16,
            welcome_timeout: Duration::from_secs(10),
            ack_timeout: Duration::from_secs(60),
            stop_timeout: Duration::from_secs(5),
            backoff: BackoffSettings::default(),
        }
    }
}

/// Why a connection ended, or did not come about.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The call failed: the network's fault, or the gateway's answer.
    #[error("the gateway cannot be reached or refused the call ({:?})", .0.code())]
    Call(#[source] Box<Status>),
    /// The gateway is being stopped.
    #[error("the gateway is being stopped")]
    Draining,
    /// The gateway ended the stream although the device had not.
    #[error("the gateway ended the stream")]
    Ended,
    /// The gateway's first message was not a Welcome.
    #[error("the gateway did not begin with a Welcome")]
    NotWelcomed,
    /// The queue's file is older than its stream, so the queue took another stream id ([`LinkEvent::StreamChanged`]).
    #[error("the local queue is older than its stream, and goes on under another stream id")]
    StreamChanged,
    /// The gateway was silent for too long.
    #[error("no {awaited} came within {timeout:?}")]
    Timeout {
        /// What was waited for.
        awaited: &'static str,
        /// For how long.
        timeout: Duration,
    },
    /// The device's own queue failed.
    #[error("the local queue failed")]
    Queue(#[from] QueueError),
}

impl LinkError {
    /// How long the gateway asked the device to wait.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Call(status) => StatusFacts::of(status).retry_after,
            _ => None,
        }
    }
}

/// What happens on a link, for counting and showing.
#[derive(Debug)]
#[non_exhaustive]
pub enum LinkEvent<'a> {
    /// The gateway welcomed the device.
    Connected {
        /// What the gateway has already.
        last_durable_sequence: u64,
    },
    /// A batch was handed to the connection.
    Sent {
        /// Its number.
        sequence: u64,
        /// How many readings it has.
        readings: u64,
        /// Whether it had been sent before.
        retry: bool,
    },
    /// The gateway has batches durably; they have left the queue.
    Acknowledged {
        /// Up to this one.
        through: u64,
        /// How many that were.
        taken: Acknowledged,
    },
    /// One batch was acknowledged on the connection on which it was sent.
    BatchAcknowledged {
        /// Its number.
        sequence: u64,
        /// How long that took from its sending.
        latency: Duration,
    },
    /// The gateway had batches before, that were sent again.
    Duplicates {
        /// How many.
        batches: u64,
    },
    /// A batch can never be stored.
    Rejected(&'a pb::RejectedBatch),
    /// The gateway misses batches: the link sends again from the expected one.
    SequenceGap {
        /// Where it sends from.
        expected: u64,
    },
    /// The gateway asked for batches that it had acknowledged, as one does that was restored from a backup. They are gone.
    Forgotten {
        /// How many.
        batches: u64,
    },
    /// The gateway has more of the stream than this queue can have sent: the queue's file is older than its stream, as one
    /// that came back with a device's image. What was never sent is sent under a new stream id.
    StreamChanged {
        /// The new stream id.
        stream_id: StreamId,
        /// How far the gateway has the old one.
        last_durable_sequence: u64,
        /// What the queue had sent under the old one, and is at the gateway.
        taken: Acknowledged,
    },
    /// A configuration came and was answered.
    Configured {
        /// Its revision.
        revision: u64,
        /// What the device did.
        decision: &'a ConfigDecision,
    },
    /// The connection is gone, or did not come about.
    Disconnected {
        /// Why.
        error: &'a LinkError,
        /// When the link tries again.
        retry_in: Duration,
    },
}

/// Sees what happens on a link. It is called on the link's task and must be quick.
pub trait LinkObserver: Send + Sync + 'static {
    /// Something happened.
    fn observe(&self, event: &LinkEvent<'_>);
}

impl<F: Fn(&LinkEvent<'_>) + Send + Sync + 'static> LinkObserver for F {
    fn observe(&self, event: &LinkEvent<'_>) {
        self(event);
    }
}

/// What a device did with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigDecision {
    /// It runs with it.
    Applied,
    /// It refused, and runs with what it had; the text says why.
    Rejected(String),
}

/// Applies configurations. It is called on the link's task: what takes long belongs elsewhere.
pub trait ConfigHandler: Send + 'static {
    /// `config` replaces what the device had. The gateway may send a revision again when it missed the answer.
    fn apply(&mut self, revision: u64, config: &Map<String, Json>) -> ConfigDecision;
}

impl<F: FnMut(u64, &Map<String, Json>) -> ConfigDecision + Send + 'static> ConfigHandler for F {
    fn apply(&mut self, revision: u64, config: &Map<String, Json>) -> ConfigDecision {
        self(revision, config)
    }
}

/// Makes a [`DeviceLink`].
pub struct DeviceLinkBuilder {
    worker: Worker,
}

impl DeviceLinkBuilder {
    /// How the link behaves.
    pub fn settings(mut self, settings: LinkSettings) -> Self {
        self.worker.backoff = Backoff::new(settings.backoff);
        self.worker.settings = settings;
        self
    }

    /// Who sees what happens.
    pub fn observer(mut self, observer: impl LinkObserver) -> Self {
        self.worker.observer = Arc::new(observer);
        self
    }

    /// Who applies configurations. Without one, each is answered as rejected.
    pub fn config_handler(mut self, handler: impl ConfigHandler) -> Self {
        self.worker.config_handler = Some(Box::new(handler));
        self
    }

    /// The revision that the device runs with from before; 0, the default, for none.
    pub fn applied_revision(mut self, revision: u64) -> Self {
        self.worker.applied_revision = revision;
        self
    }

    /// Starts the link. Needs a Tokio runtime.
    pub fn start(mut self) -> DeviceLink {
        let stop = CancellationToken::new();
        let reverts = watch::Sender::new(None);
        self.worker.stop = stop.clone();
        self.worker.reverts = reverts.subscribe();
        let queue = self.worker.queue.clone();
        DeviceLink { queue, reverts, stop: stop.drop_guard(), task: tokio::spawn(self.worker.run()) }
    }
}

/// A device's link: sends what its queue holds and takes configurations, and connects again whenever the connection is lost,
/// until it is stopped or dropped.
#[derive(Debug)]
pub struct DeviceLink {
    queue: Queue,
    reverts: watch::Sender<Option<Revert>>,
    stop: DropGuard,
    task: JoinHandle<()>,
}

impl DeviceLink {
    /// A link of `device` that sends what `queue` holds. Several links may share a channel.
    pub fn builder(device: DeviceId, queue: Queue, channel: impl Into<Channel>) -> DeviceLinkBuilder {
        let channel = channel.into();
        let (_, reverts) = watch::channel(None);
        let settings = LinkSettings::default();
        let worker = Worker {
            device,
            queue,
            client: DeviceLinkServiceClient::new(channel),
            backoff: Backoff::new(settings.backoff),
            settings,
            observer: Arc::new(|_: &LinkEvent<'_>| {}),
            config_handler: None,
            applied_revision: 0,
            sent_through: 0,
            reverts,
            revert: None,
            stop: CancellationToken::new(),
        };
        DeviceLinkBuilder { worker }
    }

    /// Waits until everything in the queue is acknowledged; for as long as that takes.
    pub async fn flush(&self) {
        self.queue.wait_until_empty().await;
    }

    /// Tells the gateway that the device went back from `revision`, which it had reported as applied, to `running` (0: to no
    /// configuration), and why. It is told on each connection until another revision comes, so that no break loses it.
    pub fn report_reverted(&self, revision: u64, running: u64, detail: impl Into<String>) {
        self.reverts.send_replace(Some(Revert { revision, running, detail: detail.into() }));
    }

    /// Sends nothing more, waits a moment for the acknowledgements of what was sent, and ends. What is not acknowledged
    /// stays in the queue.
    pub async fn stop(self) {
        drop(self.stop);
        if let Err(error) = self.task.await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

/// A device that went back from a revision.
#[derive(Debug, Clone)]
struct Revert {
    revision: u64,
    /// The revision that the device runs with since.
    running: u64,
    detail: String,
}

/// What a link is from one connection to the next.
struct Worker {
    device: DeviceId,
    queue: Queue,
    client: DeviceLinkServiceClient<Channel>,
    settings: LinkSettings,
    backoff: Backoff,
    observer: Arc<dyn LinkObserver>,
    config_handler: Option<Box<dyn ConfigHandler>>,
    applied_revision: u64,
    /// The highest sequence that was ever sent.
    sent_through: u64,
    reverts: watch::Receiver<Option<Revert>>,
    /// The last one, until another revision comes.
    revert: Option<Revert>,
    stop: CancellationToken,
}

impl Worker {
    /// Takes note of a revert that the device may have made since.
    fn look_for_revert(&mut self) {
        if self.reverts.has_changed().unwrap_or(false) {
            self.take_revert();
        }
    }

    /// Takes note of the device's last revert, unless a later revision has been applied already.
    fn take_revert(&mut self) {
        let revert = self.reverts.borrow_and_update().clone();
        let Some(revert) = revert.filter(|revert| revert.revision >= self.applied_revision) else { return };
        if revert.revision == self.applied_revision {
            self.applied_revision = revert.running;
        }
        self.revert = Some(revert);
    }

    async fn run(mut self) {
        while !self.stop.is_cancelled() {
            let began = Instant::now();
            let Err(error) = Session::run(&mut self).await else { return };
            if began.elapsed() > self.settings.backoff.cap {
                self.backoff.reset();
            }
            let retry_in = self.backoff.next_delay(error.retry_after());
            tracing::debug!(device = %self.device, error = &error as &dyn std::error::Error, ?retry_in, "link.disconnected");
            self.observer.observe(&LinkEvent::Disconnected { error: &error, retry_in });
            tokio::select! {
                () = tokio::time::sleep(retry_in) => {}
                () = self.stop.cancelled() => return,
            }
        }
    }
}

#[cfg(test)]
mod tests;
