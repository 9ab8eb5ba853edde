//! From a batch to an acknowledgement: admission by bytes, the check, then the [`writer`], which commits in groups.
//!
//! ```text
//! api ── a run: what a stream has sent by now ──▶ admission (a permit in bytes, held until the commit)
//!                                                     │ check
//!                                                     ▼
//!                                                  writer: one transaction for all runs that wait
//!                                                     │ dedupe, judge, append, commit
//!                                                     ▼ what is durable
//!       outcomes ◀── reply ◀───────────────────── announce ──▶ live: latest, tail
//! ```
//!
//! A device that sends faster than commits end has several batches waiting when its call is looked at again. They go on
//! together, as a [`Run`]: so what a batch costs on its way falls as the load grows, as with the group commit behind it.

mod admission;
mod announce;
mod metrics;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod rules;
mod run;
mod stall;
pub mod writer;

pub use admission::Lane;
pub use run::{Envelope, Run};

use crate::{
    error::Error,
    fleet::Device,
    limits::{DeviceLimits, OpenCall},
    model::{BatchLimits, BatchReject},
    telemetry::Metrics,
};
use admission::Admission;
use bytes::Bytes;
use std::{sync::Arc, time::Duration};
use tokio::sync::{mpsc, oneshot};

/// The highest sequence: what a signed 64-bit column holds.
pub const SEQUENCE_MAX: u64 = i64::MAX as u64;

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
    /// The batch's sequence.
    pub sequence: u64,
    /// What became of it.
    pub outcome: Outcome,
    /// The last durable sequence of its stream, with this batch.
    pub durable_through: u64,
}

/// A run that waits for its commit.
pub struct Pending {
    /// How many batches it has.
    pub batches: usize,
    reply: oneshot::Receiver<Result<Vec<Reply>, Error>>,
}

impl Pending {
    /// Waits for the commit; a reply for each batch, in order. The error says that nothing is known to be stored.
    pub async fn replies(self) -> Result<Vec<Reply>, Error> {
        // Without an answer the writer has ended, which it only does after all that was submitted.
        self.reply.await.unwrap_or(Err(Error::Draining))
    }
}

/// Where batches are handed in. Cheap to clone; the writer ends when the last clone is gone.
#[derive(Clone)]
pub struct Ingest {
    limits: Arc<BatchLimits>,
    clock_offset_max: Duration,
    device_limits: DeviceLimits,
    admission: Admission,
    sender: mpsc::Sender<Submitted>,
    // Whether batches are thrown away instead of being handed to the writer: see `into_null_sink`.
    discards: bool,
}

/// A run on its way to the writer.
struct Submitted {
    run: Run,
    // The batches of the run, one behind the other.
    bytes: Bytes,
    reply: oneshot::Sender<Result<Vec<Reply>, Error>>,
}

impl Ingest {
    /// A null sink, for benchmarks: it checks and admits batches as ever, and then throws them away and acknowledges them.
    /// What a gateway is slower than this is what storing costs.
    pub fn into_null_sink(self) -> Self {
        Self { discards: true, ..self }
    }

    /// Hands a run in. Runs of one stream must be handed in one after the other, in order.
    pub async fn submit(&self, mut run: Run) -> Result<Pending, Error> {
        run.close();
        let batches = run.len();
        let (reply, receiver) = oneshot::channel();
        if self.discards {
            let _ = reply.send(Ok(run.discard()));
            return Ok(Pending { batches, reply: receiver });
        }
        let bytes = run.pack();
        self.sender.send(Submitted { run, bytes, reply }).await.map_err(|_| Error::Draining)?;
        Ok(Pending { batches, reply: receiver })
    }

    /// Whether a call hands in more while `pending_runs` of its runs wait for their commit. A call with small batches has one run at a time
    /// where much waits already, of all calls together.
    pub fn hands_in_more(&self, pending_runs: usize, small_batches: bool) -> bool {
        pending_runs == 0 || !small_batches || !self.admission.is_crowded()
    }

    /// Counts a call by which a device sends batches as open, while there may be one more.
    pub fn open(&self, device: &Device) -> Result<OpenCall, Error> {
        self.device_limits.open(&device.usage)
    }

    /// How long the device's next batch has to wait, if it has to, as it sends more than it may; the error when that would be too long.
    /// `held` says whether the same batch was found to have to wait before, so that it is counted once.
    pub fn held_back(&self, device: &Device, held: &mut bool) -> Result<Option<Duration>, Error> {
        let wait = self.device_limits.held_back(&device.usage)?;
        if wait.is_some() && !*held {
            self.device_limits.count_held_back();
        }
        *held = wait.is_some();
        Ok(wait)
    }

    /// How what comes in behind a run, in the same call, is to be admitted.
    pub fn lane_behind(&self, run: &Run) -> Lane {
        self.admission.lane_behind(run)
    }

    /// Shows at each scrape how many bytes of batches wait for their commit.
    pub fn show_pending(&self, metrics: &Metrics) {
        self.admission.show(metrics);
    }
}

/// Waits for as long as a batch is held back; for ever when none is.
pub async fn hold_back(held_back: Option<Duration>) {
    match held_back {
        Some(held_back) => tokio::time::sleep(held_back).await,
        None => std::future::pending().await,
    }
}
