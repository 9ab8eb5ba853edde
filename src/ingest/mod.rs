//! From a checked batch to an acknowledgement: admission by bytes, then the [`writer`], which commits in groups.
//!
//! ```text
//! api ── submit ──▶ admission (a permit in bytes, held until the commit) ──▶ writer: one transaction for all that waits
//!                                                                              │ dedupe, judge, append, commit
//!       Outcome ◀── reply after the commit ◀───────────────────────────────────┤
//!                                                              live: tail, latest
//! ```

mod metrics;
mod stall;
pub mod writer;

use crate::{
    error::Error,
    fleet::Device,
    model::{BatchLimits, BatchReject, CheckedBatch, StreamId, Timestamp},
    telemetry::{Metrics, names},
};
use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

/// What a waiting batch costs besides its bytes.
const BATCH_OVERHEAD_BYTES: usize = 512;
/// The highest sequence: what a signed 64-bit column holds.
pub const SEQUENCE_MAX: u64 = i64::MAX as u64;

/// A batch as a device sends it.
#[derive(Debug, Clone, Default)]
pub struct Envelope {
    /// Its number in its stream.
    pub sequence: u64,
    /// Its bytes: a `tidegate.v1.Batch`, not yet checked.
    pub batch: Bytes,
    /// How many sequences right before this one the device lost.
    pub lost_batches: u64,
    /// How many readings were in them.
    pub lost_readings: u64,
}

/// What became of a batch; durable when it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is in the log.
    Stored {
        /// How many readings it has.
        readings: u64,
    },
    /// It was dealt with before.
    Duplicate {
        /// How many readings it has; 0 when it can't be read.
        readings: u64,
    },
    /// It can never be stored, and is kept aside.
    Rejected(BatchReject),
    /// It skips sequences and was not looked at.
    Gap {
        /// The sequence that should have come.
        expected: u64,
    },
}

/// The writer's word on a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// What became of it.
    pub outcome: Outcome,
    /// The last durable sequence of its stream, with this batch.
    pub durable_through: u64,
}

/// A batch on its way to the writer.
struct Append {
    device: Arc<Device>,
    stream_id: StreamId,
    sequence: u64,
    lost_batches: u64,
    lost_readings: u64,
    receive_time: Timestamp,
    batch: Result<CheckedBatch, BatchReject>,
    // The bytes as they came: what is kept aside when the batch is rejected.
    bytes: Bytes,
    reply: oneshot::Sender<Result<Reply, Error>>,
    _permit: OwnedSemaphorePermit,
}

impl Append {
    fn readings(&self) -> u64 {
        match &self.batch {
            Ok(checked) => u64::from(checked.summary.readings),
            Err(reject) => reject.readings,
        }
    }
}

/// A batch that waits for its commit.
pub struct Pending {
    /// Its sequence.
    pub sequence: u64,
    reply: oneshot::Receiver<Result<Reply, Error>>,
}

impl Pending {
    /// Waits for the commit. The error says that nothing is known to be stored.
    pub async fn reply(self) -> (u64, Result<Reply, Error>) {
        // Without an answer the writer has ended, which it only does after all that was submitted.
        (self.sequence, self.reply.await.unwrap_or(Err(Error::Draining)))
    }
}

/// Where batches are handed in. Cheap to clone; the writer ends when the last clone is gone.
#[derive(Clone)]
pub struct Ingest {
    limits: Arc<BatchLimits>,
    admission: Arc<Semaphore>,
    pending_bytes_max: usize,
    sender: mpsc::Sender<Append>,
    // Whether batches are thrown away instead of being handed to the writer: see `into_null_sink`.
    discards: bool,
}

impl Ingest {
    /// A null sink, for benchmarks: it checks and admits batches as ever, and then throws them away and acknowledges them.
    /// What a gateway is slower than this is what storing costs.
    pub fn into_null_sink(self) -> Self {
        Self { discards: true, ..self }
    }

    /// Hands a batch in; waits while too many bytes wait for their commit already. Batches of one stream must be handed in
    /// one after the other, in order.
    pub async fn submit(&self, device: &Arc<Device>, stream_id: StreamId, envelope: Envelope) -> Result<Pending, Error> {
        let Envelope { sequence, batch, lost_batches, lost_readings } = envelope;
        // Out of the connection's buffer, of which even a small batch would hold all for as long as it is in the live tail.
        let bytes = Bytes::copy_from_slice(&batch);
        let cost = (bytes.len() + BATCH_OVERHEAD_BYTES).min(self.pending_bytes_max);
        let cost = u32::try_from(cost).unwrap_or(u32::MAX);
        let permit = self.admission.clone().acquire_many_owned(cost).await.map_err(|_| Error::Draining)?;

        let receive_time = Timestamp::now();
        let batch = CheckedBatch::check(bytes.clone(), &self.limits, receive_time);
        let (reply, receiver) = oneshot::channel();
        if self.discards {
            let _ = reply.send(Ok(discarded(batch, sequence)));
            return Ok(Pending { sequence, reply: receiver });
        }
        let device = device.clone();
        let append =
            Append { device, stream_id, sequence, lost_batches, lost_readings, receive_time, batch, bytes, reply, _permit: permit };
        self.sender.send(append).await.map_err(|_| Error::Draining)?;
        Ok(Pending { sequence, reply: receiver })
    }

    /// Shows at each scrape how many bytes of batches wait for their commit.
    pub fn show_pending(&self, metrics: &Metrics) {
        let gauge = metrics.gauge(names::PENDING_BYTES, &[]);
        // Not the handle itself: it would keep the writer from ending.
        let (admission, pending_bytes_max) = (self.admission.clone(), self.pending_bytes_max);
        metrics.on_scrape(move || gauge.set((pending_bytes_max - admission.available_permits()) as f64));
    }
}

/// What a null sink says of a batch.
fn discarded(batch: Result<CheckedBatch, BatchReject>, sequence: u64) -> Reply {
    let outcome = match batch {
        Ok(checked) => Outcome::Stored { readings: u64::from(checked.summary.readings) },
        Err(reject) => Outcome::Rejected(reject),
    };
    Reply { outcome, durable_through: sequence }
}
