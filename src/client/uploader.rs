//! The upload of a device that wakes up now and then, hands over what it measured, and sleeps again.

use super::{
    backoff::{Backoff, BackoffSettings},
    channel::Channel,
    queue::{Queue, QueueError, QueuedBatch, Resumed, SEQUENCE_MAX},
};
use crate::{
    error::{Reason, StatusFacts},
    model::{DeviceId, StreamId},
    pb::{self, telemetry_service_client::TelemetryServiceClient},
};
use bytes::Bytes;
use futures_util::{Stream, stream};
use parking_lot::Mutex;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::Instant;
use tonic::{Code, Request, Status};

/// How an uploader behaves.
#[derive(Debug, Clone)]
pub struct UploaderSettings {
    /// How many batches one call carries; a longer queue takes several calls. Default 1,000.
    pub call_batches_max: usize,
    /// How long one call may take. Default 60 s.
    pub call_timeout: Duration,
    /// How long to go on trying while nothing is taken; then the wake-up ends with an error. Default 5 minutes.
    pub give_up_after: Duration,
    /// Send every batch of the queue without asking what the gateway has of it already: it counts that as duplicates. For
    /// who does not trust the position, or wants to see it proved. Only for a replay's queue, which is the same each time.
    /// Default no.
    pub resend_known: bool,
    /// The waits between tries.
    pub backoff: BackoffSettings,
}

impl Default for UploaderSettings {
    fn default() -> Self {
        Self {
            call_batches_max: 1_000,
            call_timeout: Duration::from_secs(60),
            give_up_after: Duration::from_secs(300),
            resend_known: false,
            backoff: BackoffSettings::default(),
        }
    }
}

/// Why a wake-up ended with batches left in the queue. They stay there for the next one.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The gateway refuses the call, and will refuse it again.
    #[error("the gateway refuses the upload")]
    Refused(#[source] Box<Status>),
    /// Nothing was taken for [`UploaderSettings::give_up_after`].
    #[error("the gateway took nothing for {0:?}")]
    GaveUp(Duration, #[source] Option<Box<Status>>),
    /// The device's own queue failed.
    #[error("the local queue failed")]
    Queue(#[from] QueueError),
}

/// What became of a wake-up's batches, as the gateway's responses told. What a failed call had stored is seen only by its
/// leaving the queue.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct UploadSummary {
    /// Stored.
    pub accepted: pb::Tally,
    /// Stored before, and sent again.
    pub duplicate: pb::Tally,
    /// Found to be stored before they were sent.
    pub known: pb::Tally,
    /// Never to be stored, by reason.
    pub rejected_counts: BTreeMap<pb::RejectReason, pb::Tally>,
    /// The first rejected batches, one by one; at most 100.
    pub rejected: Vec<pb::RejectedBatch>,
    /// Calls that failed and were made again.
    pub retries: u64,
    /// Batches that were sent more than once.
    pub batches_sent_again: u64,
    /// Batches that the gateway asked for although it had acknowledged them, as one does that was restored from a backup.
    /// They are gone, and were told lost.
    pub forgotten_batches: u64,
    /// The stream id that the queue took, since its file was older than its stream: see [`Queue::resume_from`].
    pub new_stream_id: Option<StreamId>,
    /// The last durable sequence.
    pub last_durable_sequence: u64,
}

/// The most entries in [`UploadSummary::rejected`].
const REJECTED_SHOWN_MAX: usize = 100;

/// Sends what a queue holds, one wake-up at a time.
#[derive(Debug)]
pub struct Uploader {
    device: DeviceId,
    queue: Queue,
    client: TelemetryServiceClient<Channel>,
    settings: UploaderSettings,
    /// The highest sequence that was ever sent.
    sent_through: u64,
    /// The highest sequence that was found to be forgotten in this wake-up.
    forgotten_through: u64,
    /// With `resend_known`: the gateway misses what it had acknowledged, and has to be asked from where.
    ask: bool,
}

impl Uploader {
    /// An uploader of `device` for what `queue` holds.
    pub fn new(device: DeviceId, queue: Queue, channel: impl Into<Channel>, settings: UploaderSettings) -> Self {
        let client = TelemetryServiceClient::new(channel.into());
        Self { device, queue, client, settings, sent_through: 0, forgotten_through: 0, ask: false }
    }

    /// One wake-up: asks where the gateway stands, and sends until the queue is empty.
    ///
    /// A call that fails is made again after a wait, and one that the gateway answers early, as it does when it is being
    /// stopped, is followed by another from where it stands.
    ///
    /// # Errors
    /// See [`UploadError`]; what is not acknowledged stays in the queue.
    pub async fn upload(&mut self) -> Result<UploadSummary, UploadError> {
        let mut summary = UploadSummary::default();
        let mut backoff = Backoff::new(self.settings.backoff);
        let mut progress = Instant::now();
        self.forgotten_through = 0;
        loop {
            let before = self.position();
            let status = match self.try_once(&mut summary).await? {
                Ok(()) if self.queue.status().pending_batches == 0 => return Ok(summary),
                Ok(()) => None,
                Err(status) if is_final(&status) => return Err(UploadError::Refused(Box::new(status))),
                Err(status) => Some(status),
            };
            if self.position() != before {
                progress = Instant::now();
                backoff.reset();
                if status.is_none() {
                    continue;
                }
            }
            summary.retries += u64::from(status.is_some());
            let delay = backoff.next_delay(status.as_ref().and_then(|status| StatusFacts::of(status).retry_after));
            if progress.elapsed() + delay > self.settings.give_up_after {
                return Err(UploadError::GaveUp(progress.elapsed(), status.map(Box::new)));
            }
            tracing::debug!(device = %self.device, ?status, ?delay, "upload.retry");
            tokio::time::sleep(delay).await;
        }
    }

    /// How far the queue's stream has come; what is pushed meanwhile does not change it.
    fn position(&self) -> (StreamId, u64) {
        let status = self.queue.status();
        (status.stream_id, status.acknowledged_through)
    }

    /// What the gateway is asked for, or the last acknowledged sequence when all is to be sent again.
    async fn resume_position(&mut self) -> Result<u64, Status> {
        if self.settings.resend_known && self.queue.is_replay().await && !std::mem::take(&mut self.ask) {
            return Ok(self.queue.status().acknowledged_through);
        }
        let stream_id = self.queue.stream_id().as_bytes().to_vec().into();
        let question = pb::GetUploadPositionRequest { device: self.device.to_string(), stream_id };
        let response = self.client.get_upload_position(self.timed(question)).await?;
        Ok(response.into_inner().last_durable_sequence.min(SEQUENCE_MAX))
    }

    /// One question for the position, and one call with what follows it.
    async fn try_once(&mut self, summary: &mut UploadSummary) -> Result<Result<(), Status>, QueueError> {
        let position = match self.resume_position().await {
            Ok(position) => position,
            Err(status) => return Ok(Err(status)),
        };
        let known = match self.queue.resume_from(position).await? {
            Resumed::Behind(known) => known,
            Resumed::NewStream { stream_id, taken } => {
                (self.sent_through, self.forgotten_through) = (0, 0);
                (summary.new_stream_id, summary.last_durable_sequence) = (Some(stream_id), 0);
                summary.known.batches += taken.batches;
                summary.known.readings += taken.readings;
                return Ok(Ok(()));
            }
        };
        summary.known.batches += known.batches;
        summary.known.readings += known.readings;
        summary.last_durable_sequence = position;
        if self.queue.status().pending_batches == 0 {
            return Ok(Ok(()));
        }

        let sending = Arc::new(Mutex::new(Sending::new(position, self)));
        let result = self.client.upload(self.timed(self.requests(position + 1, sending.clone()))).await;
        let (through, failed) = {
            let mut sending = sending.lock();
            (self.sent_through, self.forgotten_through) = (sending.sent_through, sending.forgotten_through);
            summary.batches_sent_again += sending.sent_again;
            summary.forgotten_batches += sending.forgotten;
            (sending.through, sending.failed.take())
        };
        if let Some(error) = failed {
            return Err(error);
        }
        let response = match result {
            Ok(response) => response.into_inner(),
            Err(status) => {
                self.ask = is_gap(&status);
                return Ok(Err(status));
            }
        };
        // Never forget what was not sent, whatever the gateway says.
        let last_durable = response.last_durable_sequence.min(through);
        self.queue.acknowledge_through(last_durable).await?;
        add(summary, response);
        summary.last_durable_sequence = last_durable;
        Ok(Ok(()))
    }

    fn timed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.settings.call_timeout);
        request
    }

    /// What the queue holds from `next` on.
    fn requests(&self, next: u64, sending: Arc<Mutex<Sending>>) -> impl Stream<Item = pb::UploadRequest> + Send + 'static {
        struct Cursor {
            queue: Queue,
            device: String,
            stream_id: StreamId,
            is_first: bool,
            next: u64,
            left: usize,
            sending: Arc<Mutex<Sending>>,
        }
        let left = self.settings.call_batches_max.max(1);
        let (queue, device, stream_id) = (self.queue.clone(), self.device.to_string(), self.queue.stream_id());
        let cursor = Cursor { queue, device, stream_id, is_first: true, next, left, sending };
        stream::unfold(cursor, |mut cursor| async move {
            cursor.left = cursor.left.checked_sub(1)?;
            let batch = match cursor.queue.peek_from(cursor.next).await {
                Ok(batch) => batch?,
                Err(error) => {
                    // A stream of requests has no errors: it ends, and the call's maker looks here.
                    cursor.sending.lock().failed = Some(error);
                    return None;
                }
            };
            // A call that was given up may outlive its stream id by a moment: another stream's batch is not for it.
            if cursor.queue.stream_id() != cursor.stream_id {
                return None;
            }
            let missing = batch.sequence - cursor.next;
            cursor.sending.lock().note(cursor.next, &batch);
            cursor.next = batch.sequence + 1;
            // Only the first message needs them.
            let is_first = std::mem::take(&mut cursor.is_first);
            let request = pb::UploadRequest {
                device: std::mem::take(&mut cursor.device),
                stream_id: if is_first { Bytes::copy_from_slice(cursor.stream_id.as_bytes()) } else { Bytes::new() },
                sequence: batch.sequence,
                batch: batch.bytes,
                lost_batches: missing,
                // How many readings a part of what was lost had is not known.
                lost_readings: if missing < batch.lost.batches { 0 } else { batch.lost.readings },
            };
            Some((request, cursor))
        })
    }
}

/// What a call's stream of requests has done so far.
struct Sending {
    through: u64,
    sent_through: u64,
    sent_again: u64,
    forgotten_through: u64,
    forgotten: u64,
    failed: Option<QueueError>,
}

impl Sending {
    fn new(position: u64, uploader: &Uploader) -> Self {
        let Uploader { sent_through, forgotten_through, .. } = *uploader;
        Self { through: position, sent_through, sent_again: 0, forgotten_through, forgotten: 0, failed: None }
    }

    /// `expected` is the sequence that the gateway misses first.
    fn note(&mut self, expected: u64, batch: &QueuedBatch) {
        let sequence = batch.sequence;
        self.sent_again += u64::from(sequence <= self.sent_through);
        self.sent_through = self.sent_through.max(sequence);
        self.through = sequence;
        let forgotten_through = (sequence - 1).saturating_sub(batch.lost.batches);
        if forgotten_through >= expected {
            // A call that is made again misses the same.
            self.forgotten += (forgotten_through + 1).saturating_sub(expected.max(self.forgotten_through + 1));
            self.forgotten_through = self.forgotten_through.max(forgotten_through);
        }
    }
}

fn add(summary: &mut UploadSummary, response: pb::UploadResponse) {
    let add_tally = |total: &mut pb::Tally, more: pb::Tally| {
        total.batches += more.batches;
        total.readings += more.readings;
    };
    add_tally(&mut summary.accepted, response.accepted.unwrap_or_default());
    add_tally(&mut summary.duplicate, response.duplicate.unwrap_or_default());
    for count in response.rejected_counts {
        let total = summary.rejected_counts.entry(count.reason()).or_default();
        add_tally(total, pb::Tally { batches: count.batches, readings: count.readings });
    }
    let room = REJECTED_SHOWN_MAX.saturating_sub(summary.rejected.len());
    summary.rejected.extend(response.rejected.into_iter().take(room));
}

/// Whether the same call would fail again. A gap is not final: the next try asks for the position first.
fn is_final(status: &Status) -> bool {
    match status.code() {
        Code::InvalidArgument
        | Code::NotFound
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented
        | Code::OutOfRange => true,
        Code::FailedPrecondition => !is_gap(status),
        _ => false,
    }
}

fn is_gap(status: &Status) -> bool {
    StatusFacts::of(status).reason() == Reason::SequenceGap.as_str()
}

#[cfg(test)]
#[path = "uploader_tests.rs"]
mod tests;
