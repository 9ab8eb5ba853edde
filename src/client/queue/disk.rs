//! A queue's rows in a SQLite file.

use super::{
    EncodedBatch, QueueError,
    index::{Entry, Index, Lost, PushPlan},
};
use crate::model::StreamId;
use bytes::Bytes;
use sqlx::{
    Row, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteLockingMode, SqlitePoolOptions, SqliteSynchronous},
};
use std::{
    collections::VecDeque,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS meta (
    id            INTEGER PRIMARY KEY CHECK (id = 1),
    stream_id     BLOB    NOT NULL,
    last_sequence INTEGER NOT NULL,
    lost_batches  INTEGER NOT NULL,
    lost_readings INTEGER NOT NULL,
    sent_through  INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS batches (
    sequence      INTEGER PRIMARY KEY,
    readings      INTEGER NOT NULL,
    bytes         BLOB    NOT NULL,
    lost_batches  INTEGER NOT NULL,
    lost_readings INTEGER NOT NULL
) STRICT;";

/// How long to wait for another process to let go of the file.
const BUSY_TIMEOUT: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(super) struct Disk {
    pool: SqlitePool,
    /// Whether this process sends: then what it pushes counts as sent when the file is opened again. Until then the file
    /// says what earlier processes may have sent.
    sends: AtomicBool,
}

impl Disk {
    /// Opens the file, or makes it with the stream id that `new_stream_id` gives.
    pub async fn open(path: &Path, new_stream_id: StreamId) -> Result<(Self, Index), QueueError> {
        // FULL: what was pushed is there after a power cut. EXCLUSIVE: two processes on one queue would give out the same
        // sequences; the second one is refused.
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .locking_mode(SqliteLockingMode::Exclusive)
            .busy_timeout(BUSY_TIMEOUT);
        let pool = SqlitePoolOptions::new().max_connections(1).idle_timeout(None).max_lifetime(None).connect_with(options).await?;
        sqlx::raw_sql(SCHEMA).execute(&pool).await?;
        sqlx::query("INSERT INTO meta VALUES (1, ?, 0, 0, 0, 0) ON CONFLICT DO NOTHING")
            .bind(new_stream_id.as_bytes().as_slice())
            .execute(&pool)
            .await?;

        let meta = sqlx::query("SELECT stream_id, last_sequence, lost_batches, lost_readings, sent_through FROM meta");
        let meta = meta.fetch_one(&pool).await?;
        let stream_id = StreamId::parse(meta.try_get(0)?).map_err(QueueError::Damaged)?;
        let lost_at_end = Lost { batches: unsigned(&meta, 2)?, readings: unsigned(&meta, 3)? };
        let rows = sqlx::query("SELECT sequence, readings, length(bytes), lost_batches, lost_readings FROM batches ORDER BY sequence");
        let entries = rows.fetch_all(&pool).await?.iter().map(entry).collect::<Result<VecDeque<_>, _>>()?;
        let index = Index::new(stream_id, entries, unsigned(&meta, 1)?, lost_at_end, unsigned(&meta, 4)?);
        Ok((Self { pool, sends: AtomicBool::new(false) }, index))
    }

    /// Makes a planned push durable.
    pub async fn push(&self, index: &Index, plan: &PushPlan, batch: &EncodedBatch) -> Result<(), QueueError> {
        let mut transaction = self.pool.begin().await?;
        if let Some((from, through)) = index.dropped_sequences(plan) {
            let delete = sqlx::query("DELETE FROM batches WHERE sequence BETWEEN ? AND ?");
            delete.bind(from as i64).bind(through as i64).execute(&mut *transaction).await?;
        }
        if let PushPlan::Queue { sequence, dropped: 1.., lost_before_heir, heir, .. } = *plan
            && heir != sequence
        {
            sqlx::query("UPDATE batches SET lost_batches = ?, lost_readings = ? WHERE sequence = ?")
                .bind(lost_before_heir.batches as i64)
                .bind(lost_before_heir.readings as i64)
                .bind(heir as i64)
                .execute(&mut *transaction)
                .await?;
        }
        let (PushPlan::Queue { sequence, .. } | PushPlan::Lose { sequence, .. } | PushPlan::Known { sequence }) = *plan;
        if let PushPlan::Queue { .. } = plan {
            let lost = index.lost_before_pushed(plan);
            // REPLACE: a commit that failed may be on disk nevertheless, as a row that the index does not know.
            sqlx::query("INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?, ?)")
                .bind(sequence as i64)
                .bind(batch.readings as i64)
                .bind(batch.bytes.as_ref())
                .bind(lost.batches as i64)
                .bind(lost.readings as i64)
                .execute(&mut *transaction)
                .await?;
        }
        let lost_at_end = index.lost_at_end_after(plan);
        sqlx::query("UPDATE meta SET last_sequence = ?1, lost_batches = ?2, lost_readings = ?3, sent_through = iif(?4, ?1, sent_through)")
            .bind(sequence as i64)
            .bind(lost_at_end.batches as i64)
            .bind(lost_at_end.readings as i64)
            .bind(self.sends.load(Relaxed))
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Notes that from now on all that is queued may be sent; that costs a write once.
    pub async fn begin_sending(&self) -> Result<(), QueueError> {
        if !self.sends.load(Relaxed) {
            sqlx::query("UPDATE meta SET sent_through = last_sequence").execute(&self.pool).await?;
            self.sends.store(true, Relaxed);
        }
        Ok(())
    }

    /// Makes durable what [`Index::renumber`] has done to `index`, whose sequences were higher by `base` before.
    pub async fn renumber(&self, index: &Index, base: u64) -> Result<(), QueueError> {
        let mut transaction = self.pool.begin().await?;
        sqlx::query("DELETE FROM batches WHERE sequence <= ?").bind(base as i64).execute(&mut *transaction).await?;
        // By way of negative numbers, so that no row is given a number that another still has.
        sqlx::query("UPDATE batches SET sequence = ? - sequence").bind(base as i64).execute(&mut *transaction).await?;
        sqlx::query("UPDATE batches SET sequence = -sequence").execute(&mut *transaction).await?;
        let front = index.lost_at_front();
        sqlx::query("UPDATE batches SET lost_batches = ?, lost_readings = ? WHERE sequence = (SELECT min(sequence) FROM batches)")
            .bind(front.batches as i64)
            .bind(front.readings as i64)
            .execute(&mut *transaction)
            .await?;
        sqlx::query("UPDATE meta SET stream_id = ?, last_sequence = ?, lost_batches = ?, lost_readings = ?, sent_through = 0")
            .bind(index.stream_id().as_bytes().as_slice())
            .bind(index.last_sequence() as i64)
            .bind(index.lost_at_end().batches as i64)
            .bind(index.lost_at_end().readings as i64)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        self.sends.store(false, Relaxed);
        Ok(())
    }

    /// The bytes of a queued batch.
    pub async fn bytes(&self, sequence: u64) -> Result<Bytes, QueueError> {
        let row = sqlx::query("SELECT bytes FROM batches WHERE sequence = ?").bind(sequence as i64).fetch_optional(&self.pool).await?;
        let row = row.ok_or_else(|| QueueError::Damaged(format!("the row of batch {sequence} is gone")))?;
        Ok(row.try_get::<Vec<u8>, _>(0)?.into())
    }

    /// Forgets batches.
    pub async fn delete_through(&self, sequence: u64) -> Result<(), QueueError> {
        let sequence = i64::try_from(sequence).unwrap_or(i64::MAX);
        sqlx::query("DELETE FROM batches WHERE sequence <= ?").bind(sequence).execute(&self.pool).await?;
        Ok(())
    }

    /// Lets go of the file.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

fn unsigned(row: &sqlx::sqlite::SqliteRow, column: usize) -> Result<u64, QueueError> {
    let number: i64 = row.try_get(column)?;
    u64::try_from(number).map_err(|_| QueueError::Damaged(format!("{number} is not a count")))
}

fn entry(row: &sqlx::sqlite::SqliteRow) -> Result<Entry, QueueError> {
    Ok(Entry {
        sequence: unsigned(row, 0)?,
        readings: unsigned(row, 1)?,
        bytes_len: unsigned(row, 2)? as usize,
        bytes: None,
        lost: Lost { batches: unsigned(row, 3)?, readings: unsigned(row, 4)? },
    })
}
