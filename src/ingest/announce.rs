//! What follows a commit: what is durable comes to the latest values and the tail, and then is acknowledged.

use super::{Outcome, Reply, Run, Submitted, metrics::IngestMetrics, run::RunBatch};
use crate::{
    config::Config,
    error::Error,
    fleet::ClockWatch,
    live::{Latest, Publisher, TailEntry},
    model::{BatchSummary, Position},
    store::NewLogRow,
};
use bytes::Bytes;
use std::{ops::Range, sync::Arc, time::Duration};
use tokio::sync::{mpsc, oneshot};

/// A group that was committed.
pub(super) struct Durable {
    pub runs: Vec<Submitted>,
    /// Of each run.
    pub decisions: Vec<Result<Vec<Reply>, Error>>,
    /// The position of the first of the entries.
    pub first: Position,
    pub entries: Vec<Entry>,
    /// Of each entry.
    pub rows: Vec<NewLogRow>,
}

/// A group that is announced beside the next commit; then `done` is told.
pub(super) struct Announcement {
    pub durable: Durable,
    pub done: oneshot::Sender<()>,
}

/// Tells everybody what is durable: one group after the other.
pub(super) struct Announcer {
    pub publisher: Arc<Publisher>,
    latest: Arc<Latest>,
    metrics: Arc<IngestMetrics>,
    clocks: ClockWatch,
    time_skew_max: Duration,
}

impl Announcer {
    pub fn new(config: &Config, publisher: Arc<Publisher>, latest: Arc<Latest>, metrics: Arc<IngestMetrics>) -> Self {
        let (clocks, time_skew_max) = (ClockWatch::new(&config.devices), config.ingest.time_skew_max);
        Self { publisher, latest, metrics, clocks, time_skew_max }
    }

    /// Announces what comes, as long as anything can.
    pub async fn run(&self, mut announcements: mpsc::Receiver<Announcement>) {
        while let Some(Announcement { durable, done }) = announcements.recv().await {
            self.announce(durable).await;
            // The writer may have come to its end by a panic.
            let _ = done.send(());
        }
    }

    pub async fn announce(&self, durable: Durable) {
        let Durable { runs: waiting, decisions, first, entries, rows } = durable;
        self.metrics.count(&waiting, &decisions);
        let mut tail = Vec::with_capacity(rows.len());
        let (mut runs, mut replies) = (Vec::with_capacity(waiting.len()), Vec::with_capacity(waiting.len()));
        for (Submitted { mut run, reply, .. }, decision) in waiting.into_iter().zip(&decisions) {
            run.settle();
            if !is_all_stored(decision) {
                run.forget_latest();
            }
            run.device.see(run.receive_time);
            if let Some(lead) = run.lead(self.time_skew_max) {
                self.clocks.see(&run.device, lead, run.receive_time);
            }
            runs.push(run);
            replies.push(reply);
        }
        let turn = self.publisher.turn(first).await;
        let mut latest = Vec::with_capacity(rows.len());
        for (position, (entry, row)) in (first.0..).map(Position).zip(entries.iter().zip(rows)) {
            // Others may have read it from the store already.
            if !turn.is_next(position) {
                continue;
            }
            let run = &mut runs[entry.run];
            if let Some(found) = run.take_latest(&entry.batches, &row.batch) {
                latest.push((position, run.device.clone(), found));
            }
            tail.push(TailEntry {
                position,
                device: run.device.clone(),
                receive_time: row.receive_time,
                batches: row.batches as u64,
                batch: row.batch,
            });
        }
        if let Err(error) = self.latest.add(latest) {
            tracing::error!(error = &error as &dyn std::error::Error, "latest.not_known: what was stored is not among the latest values");
        }
        // Before the acknowledgements: who was told that a batch is stored, and follows, must find it.
        turn.publish(tail);
        // With the runs their bytes are given back: a call that is answered finds room.
        drop(runs);
        for (reply, decision) in replies.into_iter().zip(decisions) {
            // The caller may be gone; the batches are stored all the same, and duplicates when they come again.
            let _ = reply.send(decision);
        }
    }
}

fn is_all_stored(decision: &Result<Vec<Reply>, Error>) -> bool {
    decision.as_ref().is_ok_and(|replies| replies.iter().all(|reply| matches!(reply.outcome, Outcome::Stored { .. })))
}

/// An entry of the log: consecutive batches of one run. Encoded batches one behind the other are one batch with the frames
/// of all (protobuf concatenates repeated fields), so that nothing is encoded again.
pub(super) struct Entry {
    pub run: usize,
    pub batches: Range<usize>,
    bytes: Range<usize>,
    stream_key: i64,
    last_sequence: u64,
    summary: BatchSummary,
}

impl Entry {
    pub fn new(run: usize, number: usize, stream_key: i64, batch: &RunBatch, summary: BatchSummary) -> Self {
        Self { run, batches: number..number + 1, bytes: batch.range.clone(), stream_key, last_sequence: batch.sequence, summary }
    }

    /// Whether the next one becomes part of this one: not if this one is kept in line as it is, and would not be with it.
    pub fn goes_on_with(&self, next: &Self, in_line_bytes_max: usize) -> bool {
        let follows = self.run == next.run && self.batches.end == next.batches.start && self.last_sequence + 1 == next.last_sequence;
        follows && (self.bytes.len() > in_line_bytes_max || next.bytes.end - self.bytes.start <= in_line_bytes_max)
    }

    pub fn extend(&mut self, next: &Self) {
        self.batches.end = next.batches.end;
        self.bytes.end = next.bytes.end;
        self.last_sequence = next.last_sequence;
        self.summary = self.summary.and(next.summary);
    }

    /// The rows of all entries of one run.
    pub fn rows<'a>(entries: &'a [Self], Submitted { run, bytes, .. }: &'a Submitted) -> impl Iterator<Item = NewLogRow> + 'a {
        // As long as they are in the live tail a small part would hold all of the run, of which most was not stored.
        let stored: usize = entries.iter().map(|entry| entry.bytes.len()).sum();
        let is_small_part = stored < bytes.len() / 2;
        entries.iter().map(move |entry| {
            let batch = bytes.slice(entry.bytes.clone());
            entry.row(run, if is_small_part { Bytes::copy_from_slice(&batch) } else { batch })
        })
    }

    fn row(&self, run: &Run, batch: Bytes) -> NewLogRow {
        NewLogRow {
            device: run.device.key,
            stream_key: self.stream_key,
            batches: self.batches.len(),
            last_sequence: self.last_sequence,
            receive_time: run.receive_time,
            summary: self.summary,
            batch,
        }
    }
}
