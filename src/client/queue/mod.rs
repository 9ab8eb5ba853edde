//! The local queue of a stream id: what a device has measured and the gateway has not acknowledged yet.
//!
//! Batches are numbered 1, 2, 3 … without a hole as they are pushed, and stay until the gateway has them. In memory, or in a
//! SQLite file so that a restart or a power cut loses nothing that was pushed; both behave alike.
//!
//! A queue's file may be older than its stream, as one that came back with the image of a whole device: then the gateway has
//! sequences that this queue has yet to give out, with other readings. The queue notices this when it resumes, since it knows
//! what it may have sent; it then takes a new stream id, and what it never sent is numbered from 1 again. Nothing is lost by that.

mod disk;
mod index;

pub use super::batch::EncodedBatch;
use crate::model::StreamId;
use bytes::Bytes;
use disk::Disk;
use index::Index;
pub use index::Lost;
use std::{future::Future, path::Path, sync::Arc};
use tokio::sync::{Mutex, watch};

/// The highest sequence that there is: a gateway that names a higher one is wrong.
pub const SEQUENCE_MAX: u64 = i64::MAX as u64;

/// What a queue may hold.
#[derive(Debug, Clone)]
pub struct QueueLimits {
    /// Batches; default 100,000.
    pub batches_max: usize,
    /// Bytes of encoded batches; default 64 MiB.
    pub bytes_max: usize,
    /// Bytes of one batch; default 1 MiB, which is what a gateway takes by default. A larger one would never get through.
    pub batch_bytes_max: usize,
    /// What becomes of a batch that does not fit.
    pub when_full: WhenFull,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self { batches_max: 100_000, bytes_max: 64 << 20, batch_bytes_max: 1 << 20, when_full: WhenFull::DropOldest }
    }
}

/// What a full queue does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// Loses the oldest batches that cannot have reached the gateway yet (when there are none: the new one), and tells the
    /// gateway with the next batch how much was lost.
    DropOldest,
    /// Refuses the new batch with [`QueueError::Full`].
    Refuse,
}

/// Why a queue did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// There is no room, and [`WhenFull::Refuse`] is set.
    #[error("the queue is full with {batches} batches of {bytes} bytes")]
    Full {
        /// The batches it holds.
        batches: usize,
        /// Their bytes.
        bytes: usize,
    },
    /// No gateway would take the batch.
    #[error("the batch has {bytes} bytes: at most {bytes_max} are queued; make smaller batches")]
    BatchTooLarge {
        /// Its bytes.
        bytes: usize,
        /// The most.
        bytes_max: usize,
    },
    /// The file could not be read or written, or another process uses it.
    #[error("the queue's file")]
    Disk(#[from] sqlx::Error),
    /// The file holds what this program cannot have written.
    #[error("the queue's file is damaged: {0}")]
    Damaged(String),
}

/// A batch on its way to the gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueuedBatch {
    /// Its number.
    pub sequence: u64,
    /// The encoded [`Batch`](crate::pb::Batch).
    pub bytes: Bytes,
    /// How many readings it has.
    pub readings: u64,
    /// What the device lost right before it.
    pub lost: Lost,
}

/// What an acknowledgement took out of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Acknowledged {
    /// Batches.
    pub batches: u64,
    /// Readings in them.
    pub readings: u64,
}

/// How a queue goes on after [`Queue::resume_from`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resumed {
    /// Behind the gateway's position.
    Behind(Acknowledged),
    /// Under a new stream id: the gateway's position was ahead of anything that this queue can have sent.
    NewStream {
        /// The new id: the gateway is to be asked for its position, or to be sent a Hello, once more.
        stream_id: StreamId,
        /// What had been sent under the old one, and is at the gateway.
        taken: Acknowledged,
    },
}

/// How a queue stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStatus {
    /// The stream id whose batches these are.
    pub stream_id: StreamId,
    /// The last sequence that was given out; 0 when none was.
    pub last_sequence: u64,
    /// Batches that are not acknowledged.
    pub pending_batches: usize,
    /// Their bytes.
    pub pending_bytes: usize,
    /// Every batch up to this one is durable at the gateway, as far as this process was told.
    pub acknowledged_through: u64,
    /// What was lost for want of room since the queue was opened.
    pub lost: Lost,
}

/// A handle to a queue; clones share it. One part of a program pushes, one [`DeviceLink`](super::DeviceLink) or
/// [`Uploader`](super::Uploader) sends.
#[derive(Debug, Clone)]
pub struct Queue(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: QueueLimits,
    index: Mutex<Index>,
    disk: Option<Disk>,
    status: watch::Sender<QueueStatus>,
}

impl Queue {
    /// A queue in memory, empty. `stream_id` is normally [`StreamId::new`].
    pub fn in_memory(stream_id: StreamId, limits: QueueLimits) -> Self {
        Self::new(limits, Index::empty(stream_id), None)
    }

    /// The queue in the SQLite file at `path`, which is made when it is not there, then with a new stream id.
    ///
    /// # Errors
    /// When the file cannot be opened, is damaged, or another process uses it.
    pub async fn on_disk(path: &Path, limits: QueueLimits) -> Result<Self, QueueError> {
        let (disk, index) = Disk::open(path, StreamId::new()).await?;
        Ok(Self::new(limits, index, Some(disk)))
    }

    /// A queue in memory for a replay: each time the same batches are pushed from the first on, and `stream_id` is derived
    /// from them. What the gateway has of it already is not queued again.
    pub fn replay_in_memory(stream_id: StreamId, limits: QueueLimits) -> Self {
        Self::new(limits, Index::empty(stream_id).for_replay(), None)
    }

    /// As [`replay_in_memory`](Self::replay_in_memory), in the file at `path`; there the replay goes on behind what was pushed
    /// before. A file that is there keeps its own stream id: compare [`stream_id`](Self::stream_id).
    ///
    /// # Errors
    /// As [`on_disk`](Self::on_disk).
    pub async fn replay_on_disk(path: &Path, stream_id: StreamId, limits: QueueLimits) -> Result<Self, QueueError> {
        let (disk, index) = Disk::open(path, stream_id).await?;
        Ok(Self::new(limits, index.for_replay(), Some(disk)))
    }

    fn new(limits: QueueLimits, index: Index, disk: Option<Disk>) -> Self {
        let status = watch::Sender::new(status_of(&index));
        Self(Arc::new(Shared { limits, index: Mutex::new(index), disk, status }))
    }

    /// The stream id whose batches these are. It may change in [`resume_from`](Self::resume_from).
    pub fn stream_id(&self) -> StreamId {
        self.status().stream_id
    }

    /// Whether this is the queue of a replay.
    pub async fn is_replay(&self) -> bool {
        self.0.index.lock().await.is_replay()
    }

    /// How the queue stands now.
    pub fn status(&self) -> QueueStatus {
        *self.0.status.borrow()
    }

    /// For waiting on changes.
    pub fn watch(&self) -> watch::Receiver<QueueStatus> {
        self.0.status.subscribe()
    }

    /// Appends a batch and returns its sequence. A queue on disk has it on disk then; when the future is dropped before its
    /// end, the batch is queued nevertheless.
    ///
    /// # Errors
    /// [`QueueError::Full`] under [`WhenFull::Refuse`], [`QueueError::BatchTooLarge`], or the disk's.
    pub async fn push(&self, batch: EncodedBatch) -> Result<u64, QueueError> {
        self.to_its_end(|queue| async move {
            let mut index = queue.0.index.lock().await;
            let plan = index.plan_push(batch.bytes.len(), batch.readings, &queue.0.limits)?;
            if let Some(disk) = &queue.0.disk {
                disk.push(&index, &plan, &batch).await?;
            }
            let (bytes_len, bytes) = (batch.bytes.len(), queue.0.disk.is_none().then_some(batch.bytes));
            let sequence = index.apply_push(&plan, bytes_len, bytes, batch.readings);
            queue.0.status.send_replace(status_of(&index));
            Ok(sequence)
        })
        .await
    }

    /// As [`push`](Self::push), but waits for room where that would refuse.
    ///
    /// # Errors
    /// As `push`, other than [`QueueError::Full`].
    pub async fn push_when_room(&self, batch: EncodedBatch) -> Result<u64, QueueError> {
        let mut status = self.watch();
        loop {
            status.mark_unchanged();
            match self.push(batch.clone()).await {
                Err(QueueError::Full { .. }) => status.changed().await.expect("the sender lives as long as self"),
                result => return result,
            }
        }
    }

    /// The first batch with this sequence or a higher one, about to be sent: from now on it may have reached the gateway.
    ///
    /// # Errors
    /// The disk's.
    pub async fn peek_from(&self, sequence: u64) -> Result<Option<QueuedBatch>, QueueError> {
        let mut index = self.0.index.lock().await;
        let Some(entry) = index.entry_from(sequence).cloned() else { return Ok(None) };
        let bytes = match (entry.bytes, &self.0.disk) {
            (Some(bytes), _) => bytes,
            (None, Some(disk)) => {
                disk.begin_sending().await?;
                disk.bytes(entry.sequence).await?
            }
            (None, None) => unreachable!("without a disk the bytes are in memory"),
        };
        index.set_sent(entry.sequence);
        Ok(Some(QueuedBatch { sequence: entry.sequence, bytes, readings: entry.readings, lost: entry.lost }))
    }

    /// Forgets every batch up to `sequence`, since the gateway has them durably.
    ///
    /// # Errors
    /// The disk's; then nothing is forgotten.
    pub async fn acknowledge_through(&self, sequence: u64) -> Result<Acknowledged, QueueError> {
        self.to_its_end(move |queue| async move {
            let mut index = queue.0.index.lock().await;
            queue.acknowledge(&mut index, sequence).await
        })
        .await
    }

    /// As [`acknowledge_through`](Self::acknowledge_through), when the gateway has just said that it has the stream up to
    /// `sequence`. When the queue cannot have sent that much, it takes a new stream id: see the module's description.
    ///
    /// # Errors
    /// The disk's; then nothing is changed.
    pub async fn resume_from(&self, sequence: u64) -> Result<Resumed, QueueError> {
        self.to_its_end(move |queue| async move {
            let mut index = queue.0.index.lock().await;
            if !index.is_outdated_by(sequence) {
                return Ok(Resumed::Behind(queue.acknowledge(&mut index, sequence).await?));
            }
            let (base, stream_id) = (index.sent_through(), StreamId::new());
            let (batches, readings) = index.count_through(base);
            let mut renumbered = index.clone();
            renumbered.renumber(stream_id);
            if let Some(disk) = &queue.0.disk {
                disk.renumber(&renumbered, base).await?;
            }
            tracing::warn!(old = %index.stream_id(), new = %stream_id, sequence, sent_through = base, "queue.outdated");
            *index = renumbered;
            queue.0.status.send_replace(status_of(&index));
            Ok(Resumed::NewStream { stream_id, taken: Acknowledged { batches, readings } })
        })
        .await
    }

    async fn acknowledge(&self, index: &mut Index, sequence: u64) -> Result<Acknowledged, QueueError> {
        let (batches, readings) = index.count_through(sequence);
        if let (Some(disk), 1..) = (&self.0.disk, batches) {
            disk.delete_through(sequence).await?;
        }
        index.acknowledge_through(sequence);
        let status = status_of(index);
        self.0.status.send_if_modified(|current| std::mem::replace(current, status) != status);
        Ok(Acknowledged { batches, readings })
    }

    /// Makes a change whole even when the caller's future is dropped between the disk's part of it and the index's. In memory
    /// there is nothing between them.
    async fn to_its_end<T, F>(&self, change: impl FnOnce(Self) -> F) -> Result<T, QueueError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, QueueError>> + Send + 'static,
    {
        let change = change(self.clone());
        if self.0.disk.is_none() {
            return change.await;
        }
        match tokio::spawn(change).await {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // The runtime is being shut down.
            Err(_) => Err(QueueError::Disk(sqlx::Error::WorkerCrashed)),
        }
    }

    /// Waits until everything that was pushed is acknowledged.
    pub async fn wait_until_empty(&self) {
        self.watch().wait_for(|status| status.pending_batches == 0).await.expect("the sender lives as long as self");
    }

    /// Lets go of the file, so that another process, or this one again, may open it. A queue in memory has nothing to do.
    pub async fn close(self) {
        let _changing = self.0.index.lock().await;
        if let Some(disk) = &self.0.disk {
            disk.close().await;
        }
    }
}

fn status_of(index: &Index) -> QueueStatus {
    QueueStatus {
        stream_id: index.stream_id(),
        last_sequence: index.last_sequence(),
        pending_batches: index.pending_batches(),
        pending_bytes: index.pending_bytes(),
        acknowledged_through: index.acknowledged_through(),
        lost: index.lost_total(),
    }
}

#[cfg(test)]
mod tests;
