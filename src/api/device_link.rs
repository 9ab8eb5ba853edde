//! `DeviceLinkService`: all that an always-on device and the gateway tell each other, on one stream.

use super::{
    ResponseStream,
    driven::{Outbound, driven},
    parse,
    telemetry::check_numbers,
    telemetry::rejected_batch,
};
use crate::{
    auth::Caller,
    error::{Error, Failure, Violations},
    fleet::{ClockWatch, Configs, Device, Exchange, Registry},
    ingest::{Envelope, Ingest, Lane, Outcome, Reply, hold_back},
    limits::OpenCall,
    middleware::Draining,
    model::{DeviceId, StreamId, Timestamp, structs},
    pb::{self, connect_request, connect_response, device_link_service_server::DeviceLinkService},
    store::{ConfigOutcome, ConfigReportRow, ConfigStateRow, Store, StoreError},
};
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesOrdered};
use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// How many messages may wait for a device that does not read.
const OUTBOUND_MAX: usize = 16;
/// The most bytes in the detail of a report.
const DETAIL_BYTES_MAX: usize = 1024;

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct DeviceLinkApi {
    /// Where batches go.
    pub ingest: Ingest,
    /// Whose they are.
    pub registry: Registry,
    /// What the devices should be configured like.
    pub configs: Configs,
    /// Compares the devices' clocks with the gateway's.
    pub clocks: ClockWatch,
    /// Where stream ids stand.
    pub store: Store,
    /// How many batches of a call may wait for their commit.
    pub unacknowledged_max: usize,
}

#[tonic::async_trait]
impl DeviceLinkService for DeviceLinkApi {
    type ConnectStream = ResponseStream<pb::ConnectResponse>;

    async fn connect(&self, request: Request<Streaming<pb::ConnectRequest>>) -> Result<Response<Self::ConnectStream>, Status> {
        let (caller, drain) = (Caller::of(request.extensions()), Draining::of(request.extensions()));
        let (api, mut inbound) = (self.clone(), request.into_inner());
        // What is done seldom is boxed, here and below: its room would else be part of every link, and most links are idle.
        let work = move |outbound| async move {
            let mut link = Box::pin(Link::begin(&api, &caller, &drain, &mut inbound, &outbound)).await?;
            link.serve(&drain, &mut inbound).await
        };
        Ok(Response::new(driven(OUTBOUND_MAX, work).boxed()))
    }
}

/// One device's stream.
struct Link<'a> {
    api: &'a DeviceLinkApi,
    device: Arc<Device>,
    stream_id: Option<StreamId>,
    lane: Lane,
    // Whether the last run had.
    small_batches: bool,
    pending: FuturesOrdered<BoxFuture<'static, Result<Vec<Reply>, Error>>>,
    unacknowledged: usize,
    // The sequence that was last asked for: pipelined batches behind a hole all miss the same one, which is told once.
    gap_told: Option<u64>,
    // The revision that the device has, or was sent: it is not sent again.
    known_revision: u64,
    // When the Welcome was sent, until the device has answered with its clock.
    welcomed: Option<(Timestamp, Instant)>,
    _open: OpenCall,
    outbound: &'a Outbound<pb::ConnectResponse>,
}

impl<'a> Link<'a> {
    /// Waits for the device's Hello, and answers it.
    async fn begin(
        api: &'a DeviceLinkApi,
        caller: &Caller,
        drain: &CancellationToken,
        inbound: &mut Streaming<pb::ConnectRequest>,
        outbound: &'a Outbound<pb::ConnectResponse>,
    ) -> Result<Self, Status> {
        let first = tokio::select! {
            first = inbound.message() => first?,
            () = drain.cancelled() => return Err(Error::Draining.into()),
        };
        let Some(pb::ConnectRequest { message: Some(connect_request::Message::Hello(hello)) }) = first else {
            return Err(Error::invalid("hello", "the first message of the stream must be a Hello").into());
        };
        Self::greet(api, caller, hello, outbound).await
    }

    async fn greet(
        api: &'a DeviceLinkApi,
        caller: &Caller,
        hello: pb::Hello,
        outbound: &'a Outbound<pb::ConnectResponse>,
    ) -> Result<Self, Status> {
        let mut violations = Violations::new();
        let device = violations.check("hello.device", DeviceId::parse(&hello.device));
        let stream_id = if hello.stream_id.is_empty() { None } else { parse::stream_id(&mut violations, &hello.stream_id) };
        violations.into_result()?;
        let device = device.ok_or(Error::Internal)?;
        caller.may_act_as(&device)?;
        let device = api.registry.get_or_register(&device).await?;
        device.see(Timestamp::now());
        let open = api.ingest.open(&device)?;
        let last_durable_sequence = match stream_id {
            Some(stream_id) => api.store.last_sequence(device.key, stream_id).await.map_err(Failure::from)?,
            None => 0,
        };
        // What the device runs with is sent again unless the store knows that it does.
        let state = api.configs.state(device.key).await.map_err(Failure::from)?;
        let reported = state.and_then(|(_, state)| reported_on(&state, hello.applied_revision));
        let (server_time, sent) = (Timestamp::now(), Instant::now());
        let link = Self {
            api,
            device,
            stream_id,
            lane: Lane::default(),
            small_batches: true,
            pending: FuturesOrdered::new(),
            unacknowledged: 0,
            gap_told: None,
            known_revision: reported.unwrap_or(0),
            welcomed: Some((server_time, sent)),
            _open: open,
            outbound,
        };
        let welcome = pb::Welcome { last_durable_sequence, server_time: Some(server_time.to_proto()) };
        link.send(connect_response::Message::Welcome(welcome)).await;
        Ok(link)
    }

    /// How long a message has to wait, if it has to: a batch of a device that sends more than it may.
    fn held_back(&self, message: &pb::ConnectRequest, held: &mut bool) -> Result<Option<Duration>, Error> {
        if is_batch(message) { self.api.ingest.held_back(&self.device, held) } else { Ok(None) }
    }

    async fn serve(&mut self, drain: &CancellationToken, inbound: &mut Streaming<pb::ConnectRequest>) -> Result<(), Status> {
        let mut pokes = self.device.config_pokes();
        Box::pin(self.send_config()).await?;
        // Not made anew with each message: that takes the lock that all calls share.
        let mut drained = pin!(drain.cancelled());
        let (mut next, mut open, mut held, mut refused) = (None, true, false, None);
        while open || next.is_some() || !self.pending.is_empty() {
            let room =
                self.unacknowledged < self.api.unacknowledged_max && self.api.ingest.hands_in_more(self.pending.len(), self.small_batches);
            // What is no batch, and was read already, goes through.
            let waits = !room && next.as_ref().is_some_and(is_batch);
            let held_back = match &next {
                Some(message) if !waits => match self.held_back(message, &mut held) {
                    Ok(held_back) => held_back,
                    Err(error) => {
                        // What was taken is acknowledged before the refusal.
                        (refused, next, open) = (Some(error), None, false);
                        continue;
                    }
                },
                _ => None,
            };
            if !waits
                && held_back.is_none()
                && let Some(message) = next.take()
            {
                let received;
                // A run is worth an allocation, which is little beside its commit.
                (received, next) = Box::pin(self.receive(message, inbound)).await?;
                // What came in before is handed in all the same.
                open = !received?;
                continue;
            }
            tokio::select! {
                message = inbound.message(), if open && next.is_none() && room => {
                    next = message?;
                    open = next.is_some();
                }
                Some(replies) = self.pending.next() => self.acknowledge(replies).await?,
                Ok(()) = pokes.changed(), if open => Box::pin(self.send_config()).await?,
                () = hold_back(held_back) => {}
                () = &mut drained, if open || next.is_some() => (open, next) = (false, None),
            }
        }
        if let Some(refused) = refused {
            return Err(refused.into());
        }
        if drain.is_cancelled() {
            self.send(connect_response::Message::Draining(pb::Draining {})).await;
        }
        Ok(())
    }

    /// Does what a message asks for; of a batch, also with those that have already come in behind it. Says whether the device
    /// has closed its side, or how the stream has failed, and gives back what is still to be done.
    async fn receive(&mut self, message: pb::ConnectRequest, inbound: &mut Streaming<pb::ConnectRequest>) -> Result<Received, Status> {
        match message.message {
            Some(connect_request::Message::Batch(batch)) => return self.receive_batches(batch, inbound).await,
            Some(connect_request::Message::ConfigReport(report)) => {
                let report = parse_report(report)?;
                Box::pin(self.api.configs.note_report(&self.device, &report)).await.map_err(Failure::from)?;
            }
            Some(connect_request::Message::ClockSample(sample)) => self.compare_clocks(&sample)?,
            Some(connect_request::Message::Hello(_)) => return Err(Error::invalid("hello", "only the first message may be a Hello").into()),
            // A newer client may say what this gateway does not know.
            None => {}
        }
        Ok((Ok(false), None))
    }

    fn compare_clocks(&mut self, sample: &pb::ClockSample) -> Result<(), Error> {
        let came = Instant::now();
        let mut violations = Violations::new();
        let mut time = |field, time: &Option<_>| {
            let time = time.as_ref().ok_or_else(|| "it is required".to_owned());
            violations.check(field, time.and_then(Timestamp::from_proto))
        };
        let server_time = time("clock_sample.server_time", &sample.server_time);
        let received = time("clock_sample.receive_time", &sample.receive_time);
        let answered = time("clock_sample.send_time", &sample.send_time);
        violations.into_result()?;
        if let (Some(received), Some(answered)) = (received, answered)
            && let Some((sent, at)) = self.welcomed.take()
            && server_time == Some(sent)
        {
            self.api.clocks.measure(&self.device, Exchange { sent, received, answered, round_trip: came.duration_since(at) });
        }
        Ok(())
    }

    async fn receive_batches(&mut self, first: pb::LinkBatch, inbound: &mut Streaming<pb::ConnectRequest>) -> Result<Received, Status> {
        let stream_id = self.check_batch(&first)?;
        let first = envelope(first);
        let mut run = loop {
            tokio::select! {
                biased;
                run = self.api.ingest.begin(&self.device, stream_id, self.lane, first.clone()) => break run?,
                // One with a backlog may wait for its turn for long, and its device for what it handed in before.
                Some(replies) = self.pending.next() => self.acknowledge(replies).await?,
            }
        };
        let (mut ended, mut left) = (Ok(false), None);
        let room = self.api.unacknowledged_max.saturating_sub(self.unacknowledged);
        while left.is_none() && run.len() < room && !run.is_full() {
            match inbound.message().now_or_never() {
                Some(Ok(Some(pb::ConnectRequest { message: Some(connect_request::Message::Batch(batch)) }))) => {
                    left = match self.check_batch(&batch) {
                        Ok(_) => self.api.ingest.add(&mut run, envelope(batch)).err().map(message),
                        Err(error) => {
                            ended = Err(error.into());
                            break;
                        }
                    };
                }
                Some(Ok(Some(other))) => left = Some(other),
                Some(Ok(None)) => {
                    ended = Ok(true);
                    break;
                }
                Some(Err(status)) => {
                    ended = Err(status);
                    break;
                }
                None => break,
            }
        }
        (self.lane, self.small_batches) = (self.api.ingest.lane_behind(&run), run.has_small_batches());
        let pending = self.api.ingest.submit(run).await?;
        self.unacknowledged += pending.batches;
        self.pending.push_back(pending.replies().boxed());
        Ok((ended, left))
    }

    fn check_batch(&self, batch: &pb::LinkBatch) -> Result<StreamId, Error> {
        let mut violations = Violations::new();
        check_numbers(&mut violations, batch.sequence, batch.lost_batches, batch.lost_readings);
        if self.stream_id.is_none() {
            violations.add("hello.stream_id", "it was empty: a stream with batches needs one");
        }
        violations.into_result()?;
        self.stream_id.ok_or(Error::Internal)
    }

    /// Acknowledges a run, and with it all behind it that are already dealt with.
    async fn acknowledge(&mut self, first: Result<Vec<Reply>, Error>) -> Result<(), Status> {
        let mut ack = pb::BatchAck::default();
        let (mut gap, mut failed) = (None, None);
        let mut next = Some(first);
        while let Some(replies) = next {
            match replies {
                Ok(replies) => {
                    self.unacknowledged -= replies.len();
                    replies.into_iter().for_each(|reply| note(&mut ack, &mut gap, reply));
                }
                Err(error) => {
                    // Only after what is known of the batches before it is told: a rejection is told once.
                    failed = Some(error);
                    break;
                }
            }
            next = self.pending.next().now_or_never().flatten();
        }
        if ack.last_durable_sequence > 0 {
            self.gap_told = self.gap_told.filter(|&expected| ack.last_durable_sequence < expected);
            self.send(connect_response::Message::Ack(ack)).await;
        }
        if let Some(gap) = gap
            && self.gap_told != Some(gap.expected_sequence)
        {
            self.gap_told = Some(gap.expected_sequence);
            self.send(connect_response::Message::SequenceGap(gap)).await;
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Sends the latest configuration, unless the device has it. A device that was deleted meanwhile is told that it was.
    async fn send_config(&mut self) -> Result<(), Status> {
        self.device.check()?;
        let Some((desired, _)) = self.api.configs.state(self.device.key).await.map_err(Failure::from)? else { return Ok(()) };
        if desired.revision <= self.known_revision {
            return Ok(());
        }
        let damaged = |why| Failure::from(StoreError::Damaged(format!("revision {} of {}: {why}", desired.revision, self.device.id)));
        let config = serde_json::from_str(&desired.config).map_err(damaged)?;
        let update = pb::ConfigUpdate { revision: desired.revision, config: Some(structs::from_json(&config)) };
        self.send(connect_response::Message::ConfigUpdate(update)).await;
        self.known_revision = desired.revision;
        self.api.configs.note_delivered(&self.device, desired.revision).await.map_err(Failure::from)?;
        Ok(())
    }

    // Borrows nothing of the link, whose pending replies can't be shared between threads.
    fn send(&self, message: connect_response::Message) -> impl Future<Output = ()> + use<'a> {
        let outbound = self.outbound;
        async move { outbound.send(pb::ConnectResponse { message: Some(message) }).await }
    }
}

/// Whether the device has closed its side, or how the stream has failed; and a message that is still to be done.
type Received = (Result<bool, Status>, Option<pb::ConnectRequest>);

fn envelope(batch: pb::LinkBatch) -> Envelope {
    let pb::LinkBatch { sequence, batch, lost_batches, lost_readings } = batch;
    Envelope { sequence, batch, lost_batches, lost_readings }
}

fn message(envelope: Envelope) -> pb::ConnectRequest {
    let Envelope { sequence, batch, lost_batches, lost_readings } = envelope;
    let batch = pb::LinkBatch { sequence, batch, lost_batches, lost_readings };
    pb::ConnectRequest { message: Some(connect_request::Message::Batch(batch)) }
}

/// Adds what became of a batch to what is told together. A hole is told only if nothing behind it closes it.
fn note(ack: &mut pb::BatchAck, gap: &mut Option<pb::SequenceGap>, reply: Reply) {
    let Reply { sequence, outcome, durable_through } = reply;
    match outcome {
        Outcome::Gap { expected } => {
            gap.get_or_insert(pb::SequenceGap { expected_sequence: expected, received_sequence: sequence });
        }
        Outcome::Stored { .. } => {
            ack.last_durable_sequence = durable_through;
            *gap = None;
        }
        Outcome::Duplicate { .. } => {
            ack.last_durable_sequence = durable_through;
            ack.duplicate_batches += 1;
        }
        Outcome::Rejected(reject) => {
            ack.last_durable_sequence = durable_through;
            ack.rejected.push(rejected_batch(sequence, &reject));
            *gap = None;
        }
    }
}

/// The revision that the device runs with, when its report on it is in the store.
fn reported_on(state: &ConfigStateRow, applied_revision: u64) -> Option<u64> {
    let reported = state.reported.as_ref()?;
    let known = reported.revision == state.desired_revision
        && (reported.outcome != ConfigOutcome::Applied || reported.revision == applied_revision);
    known.then_some(reported.revision)
}

fn is_batch(message: &pb::ConnectRequest) -> bool {
    matches!(message.message, Some(connect_request::Message::Batch(_)))
}

fn parse_report(report: pb::ConfigReport) -> Result<ConfigReportRow, Error> {
    let mut violations = Violations::new();
    if report.revision == 0 {
        violations.add("config_report.revision", "0 is not a revision");
    }
    if report.detail.len() > DETAIL_BYTES_MAX {
        violations.add("config_report.detail", format!("{} bytes: at most {DETAIL_BYTES_MAX} are allowed", report.detail.len()));
    }
    let outcome = ConfigOutcome::from_code(report.outcome);
    let outcome = violations.check("config_report.outcome", outcome.ok_or_else(|| format!("{} is not an outcome", report.outcome)));
    violations.into_result()?;
    let outcome = outcome.ok_or(Error::Internal)?;
    Ok(ConfigReportRow { revision: report.revision, outcome, detail: report.detail, time: Timestamp::now() })
}
