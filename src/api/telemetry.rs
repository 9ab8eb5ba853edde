//! `TelemetryService`: a device hands over one wake-up's batches.

use super::parse;
use crate::{
    auth::Caller,
    error::{Error, Failure, Violations},
    fleet::{Device, Registry},
    ingest::{Envelope, Ingest, Lane, Outcome, Pending, Reply, SEQUENCE_MAX, hold_back},
    middleware::Draining,
    model::{BatchReject, DeviceId, StreamId, Timestamp, batch::RejectReason},
    pb::{self, telemetry_service_server::TelemetryService},
    store::{Count, Store},
};
use futures_util::{FutureExt, StreamExt, stream::FuturesOrdered};
use std::{collections::BTreeMap, pin::pin, sync::Arc};
use tonic::{Request, Response, Status, Streaming};

/// How many rejected batches an answer names one by one.
const REJECTED_SHOWN_MAX: usize = 100;

/// See the module.
pub struct TelemetryApi {
    /// Where batches go.
    pub ingest: Ingest,
    /// Whose they are.
    pub registry: Registry,
    /// Where stream ids stand.
    pub store: Store,
    /// How many batches of a call may wait for their commit.
    pub unacknowledged_max: usize,
}

#[tonic::async_trait]
impl TelemetryService for TelemetryApi {
    async fn upload(&self, request: Request<Streaming<pb::UploadRequest>>) -> Result<Response<pb::UploadResponse>, Status> {
        let (caller, drain) = (Caller::of(request.extensions()), Draining::of(request.extensions()));
        let mut inbound = request.into_inner();
        // Not made anew with each message: that takes the lock that all calls share.
        let mut drained = pin!(drain.cancelled());
        let first = tokio::select! {
            first = inbound.message() => first?,
            () = &mut drained => return Err(Error::Draining.into()),
        };
        let Some(first) = first else {
            return Err(Error::invalid("device", "the call has no message; the first one names the device").into());
        };
        let (device, stream_id) = parse_first(&first)?;
        caller.may_act_as(&device)?;
        // What is done seldom is boxed, here and below: its room would else be part of every call.
        let device = Box::pin(self.registry.get_or_register(&device)).await?;
        device.see(Timestamp::now());
        let _open = self.ingest.open(&device)?;
        let mut upload = Upload { device, stream_id, lane: Lane::default(), small_batches: true, last: 0, summary: Summary::default() };
        let mut pending = FuturesOrdered::new();
        let (mut next, mut open, mut unacknowledged) = (Some(envelope(first)), true, 0);
        let (mut held, mut refused) = (false, None);
        while open || next.is_some() || !pending.is_empty() {
            let room = unacknowledged < self.unacknowledged_max && self.ingest.hands_in_more(pending.len(), upload.small_batches);
            let held_back = match &next {
                Some(_) if room => match self.ingest.held_back(&upload.device, &mut held) {
                    Ok(held_back) => held_back,
                    Err(error) => {
                        // What was taken is committed, and told together with the refusal.
                        (refused, next, open) = (Some(error), None, false);
                        continue;
                    }
                },
                _ => None,
            };
            if room
                && held_back.is_none()
                && let Some(first) = next.take()
            {
                let batches_max = self.unacknowledged_max - unacknowledged;
                // A run is worth an allocation, which is little beside its commit.
                let Gathered { submitted, left, ended } = Box::pin(upload.gather(&self.ingest, first, batches_max, &mut inbound)).await?;
                unacknowledged += submitted.batches;
                pending.push_back(submitted.replies());
                // What came in before is handed in all the same.
                open = !ended?;
                next = left;
                continue;
            }
            tokio::select! {
                message = inbound.message(), if open && next.is_none() && room => match message? {
                    Some(message) => {
                        upload.check_same(&message)?;
                        next = Some(envelope(message));
                    }
                    None => open = false,
                },
                Some(replies) = pending.next() => {
                    let replies = replies?;
                    unacknowledged -= replies.len();
                    replies.into_iter().try_for_each(|reply| upload.take(reply))?;
                }
                () = hold_back(held_back) => {}
                // What was taken is committed and told; the device goes on elsewhere.
                () = &mut drained, if open || next.is_some() => (open, next) = (false, None),
            }
        }
        match refused {
            Some(refused) => Err(refused.after(upload.summary.stored()).into()),
            None => Ok(Response::new(upload.summary.into_response(upload.last))),
        }
    }

    async fn get_upload_position(
        &self,
        request: Request<pb::GetUploadPositionRequest>,
    ) -> Result<Response<pb::GetUploadPositionResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let request = request.into_inner();
        let mut violations = Violations::new();
        let device = violations.check("device", DeviceId::parse(&request.device));
        let stream_id = parse::stream_id(&mut violations, &request.stream_id);
        let (Some(device), Some(stream_id)) = (device, stream_id) else { return Err(violations.into_error().into()) };
        caller.may_act_as(&device)?;
        let last_durable_sequence = match self.registry.get(&device).await {
            Ok(device) => self.store.last_sequence(device.key, stream_id).await.map_err(Failure::from)?,
            Err(Failure::Refused(Error::DeviceNotFound(_))) => 0,
            Err(failure) => return Err(failure.into()),
        };
        Ok(Response::new(pb::GetUploadPositionResponse { last_durable_sequence }))
    }
}

fn parse_first(first: &pb::UploadRequest) -> Result<(DeviceId, StreamId), Error> {
    let mut violations = Violations::new();
    let device = violations.check("device", DeviceId::parse(&first.device));
    let stream_id = parse::stream_id(&mut violations, &first.stream_id);
    check_numbers(&mut violations, first.sequence, first.lost_batches, first.lost_readings);
    violations.into_result()?;
    device.zip(stream_id).ok_or(Error::Internal)
}

/// Checks what numbers a batch; it is the same on every way that a batch comes in.
pub fn check_numbers(violations: &mut Violations, sequence: u64, lost_batches: u64, lost_readings: u64) {
    if !(1..=SEQUENCE_MAX).contains(&sequence) {
        violations.add("sequence", format!("{sequence} is not in 1 to 2^63-1"));
    } else if lost_batches >= sequence {
        violations.add("lost_batches", format!("{lost_batches}: there are only {} sequences before {sequence}", sequence - 1));
    }
    if lost_readings > SEQUENCE_MAX {
        violations.add("lost_readings", format!("{lost_readings} is not in 0 to 2^63-1"));
    }
}

/// A rejection as the device is told.
pub fn rejected_batch(sequence: u64, reject: &BatchReject) -> pb::RejectedBatch {
    let BatchReject { reason, field, message, readings } = reject;
    pb::RejectedBatch { sequence, reason: *reason as i32, field: field.clone(), message: message.clone(), readings: *readings }
}

fn envelope(message: pb::UploadRequest) -> Envelope {
    let pb::UploadRequest { sequence, batch, lost_batches, lost_readings, .. } = message;
    Envelope { sequence, batch, lost_batches, lost_readings }
}

/// What has come in of a call by now, and was handed in.
struct Gathered {
    submitted: Pending,
    // What found no room in the run.
    left: Option<Envelope>,
    // Whether the device has closed its side, or how the call has failed.
    ended: Result<bool, Status>,
}

/// One call.
struct Upload {
    device: Arc<Device>,
    stream_id: StreamId,
    lane: Lane,
    // Whether the last run had.
    small_batches: bool,
    last: u64,
    summary: Summary,
}

impl Upload {
    fn check_same(&self, message: &pb::UploadRequest) -> Result<(), Error> {
        let mut violations = Violations::new();
        if !message.device.is_empty() && message.device != self.device.id.as_str() {
            violations.add("device", format!("the call is of device {}: another one needs a call of its own", self.device.id));
        }
        if !message.stream_id.is_empty() && *message.stream_id != *self.stream_id.as_bytes() {
            violations.add("stream_id", format!("the call is of stream {}: another one needs a call of its own", self.stream_id));
        }
        check_numbers(&mut violations, message.sequence, message.lost_batches, message.lost_readings);
        violations.into_result()
    }

    /// Hands in a run of `first` and of what else has already come in, up to `batches_max` batches.
    async fn gather(
        &mut self,
        ingest: &Ingest,
        first: Envelope,
        batches_max: usize,
        inbound: &mut Streaming<pb::UploadRequest>,
    ) -> Result<Gathered, Error> {
        let mut run = ingest.begin(&self.device, self.stream_id, self.lane, first).await?;
        let (mut left, mut ended) = (None, Ok(false));
        while left.is_none() && run.len() < batches_max && !run.is_full() {
            match inbound.message().now_or_never() {
                None => break,
                Some(Ok(Some(message))) => match self.check_same(&message) {
                    Ok(()) => left = ingest.add(&mut run, envelope(message)).err(),
                    Err(error) => ended = Err(error.into()),
                },
                Some(Ok(None)) => ended = Ok(true),
                Some(Err(status)) => ended = Err(status),
            }
            if !matches!(ended, Ok(false)) {
                break;
            }
        }
        (self.lane, self.small_batches) = (ingest.lane_behind(&run), run.has_small_batches());
        Ok(Gathered { submitted: ingest.submit(run).await?, left, ended })
    }

    fn take(&mut self, Reply { sequence, outcome, durable_through }: Reply) -> Result<(), Error> {
        self.last = self.last.max(durable_through);
        match outcome {
            Outcome::Stored { readings } => add(&mut self.summary.accepted, readings),
            Outcome::Duplicate { readings } => add(&mut self.summary.duplicate, readings),
            Outcome::Rejected(reject) => self.summary.add_rejected(sequence, &reject),
            Outcome::Gap { expected } => {
                let device = self.device.id.clone();
                return Err(Error::SequenceGap { device, stream_id: self.stream_id, expected, received: sequence });
            }
        }
        Ok(())
    }
}

fn add(tally: &mut pb::Tally, readings: u64) {
    tally.batches += 1;
    tally.readings += readings;
}

#[derive(Default)]
struct Summary {
    accepted: pb::Tally,
    duplicate: pb::Tally,
    rejected: Vec<pb::RejectedBatch>,
    rejected_counts: BTreeMap<i32, pb::RejectedCount>,
}

impl Summary {
    fn add_rejected(&mut self, sequence: u64, reject: &BatchReject) {
        let reason: RejectReason = reject.reason;
        let count = self.rejected_counts.entry(reason as i32).or_default();
        count.reason = reason as i32;
        count.batches += 1;
        count.readings += reject.readings;
        if self.rejected.len() < REJECTED_SHOWN_MAX {
            self.rejected.push(rejected_batch(sequence, reject));
        }
    }

    fn stored(&self) -> Count {
        Count { batches: self.accepted.batches, readings: self.accepted.readings }
    }

    fn into_response(self, last_durable_sequence: u64) -> pb::UploadResponse {
        pb::UploadResponse {
            last_durable_sequence,
            accepted: Some(self.accepted),
            duplicate: Some(self.duplicate),
            rejected_counts: self.rejected_counts.into_values().collect(),
            rejected: self.rejected,
        }
    }
}
