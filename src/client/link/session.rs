//! One connection of a link, from the Hello to its end.

use super::{ConfigDecision, LinkError, LinkEvent, Revert, Worker};
use crate::{
    client::queue::{QueueStatus, Resumed, SEQUENCE_MAX},
    model::{Timestamp, structs},
    pb::{self, connect_request, connect_response::Message},
};
use std::{collections::VecDeque, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// `ConfigReport.detail` may have this many bytes.
const DETAIL_BYTES_MAX: usize = 1024;

pub(super) struct Session<'a> {
    worker: &'a mut Worker,
    /// `None` once the device has closed its side.
    outbound: Option<mpsc::Sender<pb::ConnectRequest>>,
    inbound: Streaming<pb::ConnectResponse>,
    queue_status: watch::Receiver<QueueStatus>,
    /// Messages other than batches that wait to be sent.
    outbox: VecDeque<connect_request::Message>,
    /// The next sequence to send: the gateway has, or is being sent, all before it.
    next: u64,
    /// The queue has nothing to send up to this one: what was there is lost. The next batch tells so.
    nothing_through: u64,
    /// The highest sequence that an acknowledgement can rightly name.
    known_through: u64,
    in_flight: VecDeque<InFlight>,
    /// When the gateway last acknowledged something, or had nothing to acknowledge.
    progress: Instant,
    /// The sequence to which a gap made the session go back, until that one is acknowledged.
    rewound_to: Option<u64>,
    stop_deadline: Option<Instant>,
}

struct InFlight {
    sequence: u64,
    sent: Instant,
}

impl<'a> Session<'a> {
    /// Connects, and serves until the link is told to stop or the connection ends, which is the error.
    pub async fn run(worker: &'a mut Worker) -> Result<(), LinkError> {
        let stop = worker.stop.clone();
        let welcome_timeout = worker.settings.welcome_timeout;
        let mut session = tokio::select! {
            opened = timeout(welcome_timeout, Self::open(worker)) => {
                opened.map_err(|_| LinkError::Timeout { awaited: "welcome", timeout: welcome_timeout })??
            }
            () = stop.cancelled() => return Ok(()),
        };
        session.serve().await
    }

    async fn open(worker: &'a mut Worker) -> Result<Self, LinkError> {
        worker.look_for_revert();
        let (outbound, requests) = mpsc::channel(worker.settings.in_flight_batches_max.max(1));
        let hello = pb::Hello {
            device: worker.device.to_string(),
            stream_id: worker.queue.stream_id().as_bytes().to_vec().into(),
            applied_revision: worker.applied_revision,
        };
        // The Hello is there before the call is made: gateways may answer nothing, not even headers, before they have it.
        outbound.try_send(request(connect_request::Message::Hello(hello))).expect("a new channel has room");
        let mut inbound = worker.client.connect(ReceiverStream::new(requests)).await.map_err(call_error)?.into_inner();
        let welcome = match inbound.message().await.map_err(call_error)? {
            Some(pb::ConnectResponse { message: Some(Message::Welcome(welcome)) }) => welcome,
            Some(pb::ConnectResponse { message: Some(Message::Draining(_)) }) => return Err(LinkError::Draining),
            _ => return Err(LinkError::NotWelcomed),
        };

        let welcomed = Timestamp::now();
        let last = welcome.last_durable_sequence.min(SEQUENCE_MAX);
        let queue_status = worker.queue.watch();
        let taken = match worker.queue.resume_from(last).await? {
            Resumed::Behind(taken) => taken,
            Resumed::NewStream { stream_id, taken } => {
                worker.sent_through = 0;
                worker.observer.observe(&LinkEvent::StreamChanged { stream_id, last_durable_sequence: last, taken });
                return Err(LinkError::StreamChanged);
            }
        };
        worker.observer.observe(&LinkEvent::Connected { last_durable_sequence: last });
        worker.observer.observe(&LinkEvent::Acknowledged { through: last, taken });
        let sample = welcome.server_time.map(|server_time| clock_sample(server_time, welcomed));
        let outbox = sample.into_iter().chain(worker.revert.iter().map(reverted)).collect();
        Ok(Self {
            worker,
            outbound: Some(outbound),
            inbound,
            queue_status,
            outbox,
            next: last + 1,
            nothing_through: 0,
            known_through: last,
            in_flight: VecDeque::new(),
            progress: Instant::now(),
            rewound_to: None,
            stop_deadline: None,
        })
    }

    async fn serve(&mut self) -> Result<(), LinkError> {
        loop {
            let may_send = self.may_send();
            let (deadline, awaited, limit) = self.deadline();
            let stop = self.worker.stop.clone();
            tokio::select! {
                message = self.inbound.message() => match message.map_err(call_error)? {
                    Some(response) => self.receive(response).await?,
                    None if self.stop_deadline.is_some() => return Ok(()),
                    None => return Err(LinkError::Ended),
                },
                permit = reserve(&self.outbound), if may_send => match permit {
                    Some(permit) => self.send(permit).await?,
                    // The call takes nothing more: its status follows from `inbound`.
                    None => self.outbound = None,
                },
                changed = self.queue_status.changed(), if !may_send => changed.expect("the worker holds the queue"),
                Ok(()) = self.worker.reverts.changed(), if self.stop_deadline.is_none() => {
                    self.worker.take_revert();
                    self.outbox.extend(self.worker.revert.iter().map(reverted));
                }
                () = stop.cancelled(), if self.stop_deadline.is_none() => {
                    self.outbound = None;
                    self.stop_deadline = Some(Instant::now() + self.worker.settings.stop_timeout);
                }
                () = sleep_until(deadline) => return match self.stop_deadline {
                    Some(_) => Ok(()),
                    None => Err(LinkError::Timeout { awaited, timeout: limit }),
                },
            }
        }
    }

    fn may_send(&self) -> bool {
        let in_flight_max = self.worker.settings.in_flight_batches_max.max(1);
        let unsent = self.worker.queue.status().last_sequence > self.nothing_through.max(self.next - 1);
        let batch_waits = unsent && self.in_flight.len() < in_flight_max;
        self.outbound.is_some() && (batch_waits || !self.outbox.is_empty())
    }

    /// Until when something must have come, and what.
    fn deadline(&self) -> (Instant, &'static str, Duration) {
        const FAR: Duration = Duration::from_secs(24 * 3600);
        let limit = self.worker.settings.ack_timeout;
        match self.stop_deadline {
            Some(deadline) => (deadline, "end of the stream", self.worker.settings.stop_timeout),
            None if self.in_flight.is_empty() => (Instant::now() + FAR + FAR, "message", FAR),
            None => (self.progress + limit, "acknowledgement", limit),
        }
    }

    async fn send(&mut self, permit: mpsc::OwnedPermit<pb::ConnectRequest>) -> Result<(), LinkError> {
        if let Some(message) = self.outbox.pop_front() {
            permit.send(request(message));
            return Ok(());
        }
        let last_sequence = self.worker.queue.status().last_sequence;
        let Some(batch) = self.worker.queue.peek_from(self.next).await? else {
            // All from here on were lost: the next push gets a sequence behind them.
            self.nothing_through = last_sequence;
            return Ok(());
        };
        let (sequence, readings) = (batch.sequence, batch.readings);
        let missing = sequence - self.next;
        if missing > batch.lost.batches {
            self.worker.observer.observe(&LinkEvent::Forgotten { batches: missing - batch.lost.batches });
        }
        // How many readings a part of what was lost had is not known.
        let lost_readings = if missing < batch.lost.batches { 0 } else { batch.lost.readings };
        let message = pb::LinkBatch { sequence, batch: batch.bytes, lost_batches: missing, lost_readings };
        permit.send(request(connect_request::Message::Batch(message)));

        let retry = sequence <= self.worker.sent_through;
        self.worker.sent_through = self.worker.sent_through.max(sequence);
        self.known_through = self.known_through.max(sequence);
        self.next = sequence + 1;
        if self.in_flight.is_empty() {
            self.progress = Instant::now();
        }
        self.in_flight.push_back(InFlight { sequence, sent: Instant::now() });
        self.worker.observer.observe(&LinkEvent::Sent { sequence, readings, retry });
        Ok(())
    }

    async fn receive(&mut self, response: pb::ConnectResponse) -> Result<(), LinkError> {
        match response.message {
            Some(Message::Ack(ack)) => self.acknowledge(ack).await?,
            Some(Message::SequenceGap(gap)) => self.rewind(gap),
            Some(Message::ConfigUpdate(update)) => self.configure(update),
            Some(Message::Draining(_)) => return Err(LinkError::Draining),
            // A message that a later version of the contract may add, or a second Welcome: nothing to do.
            Some(Message::Welcome(_)) | None => {}
        }
        Ok(())
    }

    async fn acknowledge(&mut self, ack: pb::BatchAck) -> Result<(), LinkError> {
        // Never forget what was not sent, whatever the gateway says.
        let through = ack.last_durable_sequence.min(self.known_through);
        let now = Instant::now();
        let taken = self.worker.queue.acknowledge_through(through).await?;
        let observer = &self.worker.observer;
        while let Some(batch) = self.in_flight.pop_front_if(|batch| batch.sequence <= through) {
            observer.observe(&LinkEvent::BatchAcknowledged { sequence: batch.sequence, latency: now - batch.sent });
        }
        observer.observe(&LinkEvent::Acknowledged { through, taken });
        if ack.duplicate_batches > 0 {
            observer.observe(&LinkEvent::Duplicates { batches: ack.duplicate_batches });
        }
        ack.rejected.iter().for_each(|rejected| observer.observe(&LinkEvent::Rejected(rejected)));
        self.next = self.next.max(through + 1);
        self.rewound_to = self.rewound_to.filter(|&expected| through < expected);
        self.progress = now;
        if taken.batches > 0 {
            self.worker.backoff.reset();
        }
        Ok(())
    }

    /// Sends again from where the gateway expects. Each batch that was on its way is answered with a gap of its own:
    /// the first makes the session go back, the others say nothing new.
    fn rewind(&mut self, gap: pb::SequenceGap) {
        // What was not sent cannot have been taken, whatever the gateway says.
        let expected = gap.expected_sequence.clamp(1, self.next);
        if self.rewound_to == Some(expected) {
            return;
        }
        self.worker.observer.observe(&LinkEvent::SequenceGap { expected });
        self.rewound_to = Some(expected);
        (self.next, self.nothing_through) = (expected, 0);
        self.in_flight.retain(|batch| batch.sequence < expected);
    }

    fn configure(&mut self, update: pb::ConfigUpdate) {
        let revision = update.revision;
        self.worker.look_for_revert();
        match self.worker.revert.take() {
            Some(revert) if revert.revision == revision => {
                // The gateway has not got the report yet: the device is not to try the same once more.
                self.outbox.push_back(reverted(&revert));
                self.worker.revert = Some(revert);
                return;
            }
            // Another revision supersedes it.
            _ => {}
        }
        let decision = if revision == self.worker.applied_revision {
            ConfigDecision::Applied
        } else {
            match (structs::to_json(&update.config.unwrap_or_default()), &mut self.worker.config_handler) {
                (Ok(config), Some(handler)) => handler.apply(revision, &config),
                (Ok(_), None) => ConfigDecision::Rejected("the device takes no configuration".to_owned()),
                (Err(why), _) => ConfigDecision::Rejected(why),
            }
        };
        let (outcome, detail) = match &decision {
            ConfigDecision::Applied => (pb::ConfigOutcome::Applied, String::new()),
            ConfigDecision::Rejected(why) => (pb::ConfigOutcome::Rejected, cut(why)),
        };
        if decision == ConfigDecision::Applied {
            self.worker.applied_revision = revision;
        }
        self.worker.observer.observe(&LinkEvent::Configured { revision, decision: &decision });
        let report = pb::ConfigReport { revision, outcome: outcome as i32, detail };
        self.outbox.push_back(connect_request::Message::ConfigReport(report));
    }
}

/// A place in the channel to the call; `None` when the call has ended, or the device has closed its side.
async fn reserve(outbound: &Option<mpsc::Sender<pb::ConnectRequest>>) -> Option<mpsc::OwnedPermit<pb::ConnectRequest>> {
    outbound.clone()?.reserve_owned().await.ok()
}

fn request(message: connect_request::Message) -> pb::ConnectRequest {
    pb::ConnectRequest { message: Some(message) }
}

fn call_error(status: Status) -> LinkError {
    LinkError::Call(Box::new(status))
}

/// Lets the gateway compare the clocks; what is between now and the sending counts as the network's delay.
fn clock_sample(server_time: prost_types::Timestamp, welcomed: Timestamp) -> connect_request::Message {
    connect_request::Message::ClockSample(pb::ClockSample {
        server_time: Some(server_time),
        receive_time: Some(welcomed.to_proto()),
        send_time: Some(Timestamp::now().to_proto()),
    })
}

fn reverted(revert: &Revert) -> connect_request::Message {
    let outcome = pb::ConfigOutcome::Reverted as i32;
    connect_request::Message::ConfigReport(pb::ConfigReport { revision: revert.revision, outcome, detail: cut(&revert.detail) })
}

/// At most [`DETAIL_BYTES_MAX`], cut between characters.
fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(DETAIL_BYTES_MAX)].to_owned()
}
