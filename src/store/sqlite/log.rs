//! The log: appending to it, reading it, and what is kept beside it in the same transaction.

use super::{
    Places, ROWS_PER_STATEMENT, SqliteStore, SqliteTx,
    rows::{add_count, column, count_column, dead_letter_row, key_column, log_page, log_size, time_column},
};
use crate::{
    model::{Position, StreamId, Timestamp, batch::reason_name},
    store::{
        Count, DeadLetterRow, DeviceKey, LedgerRow, LogRow, LogSize, NewLogRow, NewRejection, StoreError, StreamChange, StreamRow,
        rows::{as_integer, log_parts},
    },
};
use futures_util::{TryStreamExt, stream::BoxStream};
use sqlx::{AssertSqlSafe, Row, sqlite::SqliteRow};
use std::collections::HashMap;

/// About how many bytes of batches one statement appends: so many stay in the processor's cache while they are copied from hand to hand.
const BYTES_PER_STATEMENT: usize = 256 << 10;
/// How many streams a ledger shows.
const LEDGER_STREAMS_MAX: usize = 100;

impl SqliteTx<'_> {
    pub async fn stream(&mut self, device: DeviceKey, stream_id: StreamId, now: Timestamp) -> Result<StreamRow, StoreError> {
        let found = sqlx::query("SELECT stream_key, last_sequence FROM streams WHERE device_id = ? AND stream_id = ?")
            .bind(device.0)
            .bind(stream_id.as_bytes().to_vec())
            .fetch_optional(&mut self.connection)
            .await?;
        if let Some(row) = found {
            return Ok(StreamRow { key: column(&row, "stream_key")?, last_sequence: count_column(&row, "last_sequence")? });
        }
        let key = sqlx::query_scalar("INSERT INTO streams (device_id, stream_id, last_sequence, stored_batches, stored_readings, duplicate_batches, duplicate_readings, lost_batches, lost_readings, receive_time) VALUES (?, ?, 0, 0, 0, 0, 0, 0, 0, ?) RETURNING stream_key")
            .bind(device.0)
            .bind(stream_id.as_bytes().to_vec())
            .bind(now.micros())
            .fetch_one(&mut self.connection)
            .await?;
        Ok(StreamRow { key, last_sequence: 0 })
    }

    /// Nobody else writes: what was read is what is there.
    pub async fn lock_streams(
        &mut self,
        _streams: &[(DeviceKey, StreamId)],
    ) -> Result<Vec<((DeviceKey, StreamId), StreamRow)>, StoreError> {
        Ok(Vec::new())
    }

    pub async fn append(&mut self, rows: &[NewLogRow]) -> Result<Position, StoreError> {
        let first = self.last_position().await? + 1;
        self.last_position = Some(first - 1 + rows.len() as i64);
        self.bytes += rows.iter().map(|row| row.batch.len()).sum::<usize>();
        let head = "log (position, device_id, stream_key, sequence, receive_time, first_time, last_time, readings, batches, batch)";
        let mut next = first;
        for part in log_parts(rows, BYTES_PER_STATEMENT) {
            let numbered: Vec<(i64, &NewLogRow)> = (next..).zip(part).collect();
            next += part.len() as i64;
            self.insert_rows(head, 10, "", &numbered, |query, (position, row)| {
                query
                    .bind(*position)
                    .bind(row.device.0)
                    .bind(row.stream_key)
                    .bind(as_integer(row.last_sequence))
                    .bind(row.receive_time.micros())
                    .bind(row.summary.first_time.micros())
                    .bind(row.summary.last_time.micros())
                    .bind(i64::from(row.summary.readings))
                    .bind(row.batches as i64)
                    .bind(row.batch.to_vec())
            })
            .await?;
        }
        Ok(Position(first))
    }

    /// The sequence that AUTOINCREMENT keeps: positions are never used again, also when the end of the log was deleted.
    async fn last_position(&mut self) -> Result<i64, StoreError> {
        if let Some(last) = self.last_position {
            return Ok(last);
        }
        let query = sqlx::query_scalar("SELECT seq FROM sqlite_sequence WHERE name = 'log'");
        Ok(query.fetch_optional(&mut self.connection).await?.unwrap_or(0))
    }

    pub async fn advance_streams(&mut self, changes: &[StreamChange]) -> Result<(), StoreError> {
        self.count_pages(changes.iter().map(|change| change.key));
        let mut changed = 0;
        for chunk in changes.chunks(ROWS_PER_STATEMENT) {
            let places = Places::of(chunk.len(), 10);
            // What a device says it lost is its own word: the sum stays an integer, whatever it says.
            let sql = format!(
                "UPDATE streams SET last_sequence = new.column3, \
                 stored_batches = stored_batches + new.column4, stored_readings = stored_readings + new.column5, \
                 duplicate_batches = duplicate_batches + new.column6, duplicate_readings = duplicate_readings + new.column7, \
                 lost_batches = lost_batches + new.column8, \
                 lost_readings = lost_readings + min(new.column9, 9223372036854775807 - lost_readings), receive_time = max(receive_time, new.column10) \
                 FROM (VALUES {}) AS new WHERE streams.stream_key = new.column1 AND streams.last_sequence = new.column2",
                places.tuples()
            );
            let mut query = sqlx::query(AssertSqlSafe(sql));
            for change in chunk {
                let counts = [change.stored, change.duplicate, change.lost];
                query = query.bind(change.key).bind(as_integer(change.sequence_before)).bind(as_integer(change.sequence_after));
                for count in counts {
                    query = query.bind(as_integer(count.batches)).bind(as_integer(count.readings));
                }
                query = query.bind(change.receive_micros);
            }
            changed += places.pad(query).execute(&mut self.connection).await?.rows_affected();
        }
        let expected = changes.len() as u64;
        if changed == expected { Ok(()) } else { Err(StoreError::StreamConflict { changed, expected }) }
    }

    pub async fn reject(&mut self, rows: &[NewRejection], kept_max: u32) -> Result<(), StoreError> {
        self.bytes += rows.iter().map(|row| row.batch.len()).sum::<usize>();
        let head = "rejected_batches (device_id, stream_key, sequence, receive_time, reason, field, message, readings, batch)";
        self.insert_rows(head, 9, "", rows, |query, row| {
            query
                .bind(row.device.0)
                .bind(row.stream_key)
                .bind(as_integer(row.sequence))
                .bind(row.receive_time.micros())
                .bind(reason_name(row.reject.reason))
                .bind(&row.reject.field)
                .bind(&row.reject.message)
                .bind(as_integer(row.reject.readings))
                .bind(row.batch.to_vec())
        })
        .await?;
        for row in rows {
            sqlx::query("INSERT INTO rejected_counts (device_id, reason, batches, readings) VALUES (?, ?, 1, ?) ON CONFLICT (device_id, reason) DO UPDATE SET batches = batches + 1, readings = readings + excluded.readings")
                .bind(row.device.0)
                .bind(reason_name(row.reject.reason))
                .bind(as_integer(row.reject.readings))
                .execute(&mut self.connection)
                .await?;
        }
        sqlx::query("DELETE FROM rejected_batches WHERE rejection_id <= (SELECT max(rejection_id) FROM rejected_batches) - ?")
            .bind(i64::from(kept_max))
            .execute(&mut self.connection)
            .await?;
        Ok(())
    }

    pub async fn take_dead_letter(&mut self, device: DeviceKey, id: i64) -> Result<Option<(String, u64)>, StoreError> {
        let row = sqlx::query("DELETE FROM rejected_batches WHERE device_id = ? AND rejection_id = ? RETURNING reason, readings")
            .bind(device.0)
            .bind(id)
            .fetch_optional(&mut self.connection)
            .await?;
        row.map(|row| Ok((column(&row, "reason")?, count_column(&row, "readings")?))).transpose()
    }

    pub async fn uncount_rejected(&mut self, device: DeviceKey, reason: &str, readings: u64) -> Result<(), StoreError> {
        sqlx::query("UPDATE rejected_counts SET batches = batches - 1, readings = readings - ? WHERE device_id = ? AND reason = ?")
            .bind(as_integer(readings))
            .bind(device.0)
            .bind(reason)
            .execute(&mut self.connection)
            .await?;
        Ok(())
    }
}

impl SqliteStore {
    pub async fn last_sequence(&self, device: DeviceKey, stream_id: StreamId) -> Result<u64, StoreError> {
        let row = sqlx::query("SELECT last_sequence FROM streams WHERE device_id = ? AND stream_id = ?")
            .bind(device.0)
            .bind(stream_id.as_bytes().to_vec())
            .fetch_optional(self.readers())
            .await?;
        row.map_or(Ok(0), |row| count_column(&row, "last_sequence"))
    }

    pub async fn last_position(&self) -> Result<Position, StoreError> {
        let last: Option<i64> =
            sqlx::query_scalar("SELECT seq FROM sqlite_sequence WHERE name = 'log'").fetch_optional(self.readers()).await?;
        Ok(Position(last.unwrap_or(0)))
    }

    pub async fn pruned_position(&self) -> Result<Position, StoreError> {
        self.progress("log_pruned").await
    }

    pub async fn position_before(&self, time: Timestamp) -> Result<Position, StoreError> {
        let (mut low, mut high) = (self.pruned_position().await?.0 + 1, self.last_position().await?.0 + 1);
        // Binary search by primary key: there is no index on the receive time, which would cost each append.
        while low < high {
            let middle = low + (high - low) / 2;
            let row = sqlx::query("SELECT position, receive_time FROM log WHERE position >= ? ORDER BY position LIMIT 1")
                .bind(middle)
                .fetch_optional(self.readers())
                .await?;
            match row {
                Some(row) if time_column(&row, "receive_time")? < time => low = column::<i64>(&row, "position")? + 1,
                _ => high = middle,
            }
        }
        Ok(Position(low - 1))
    }

    pub async fn read_log(&self, after: Position, rows_max: usize, bytes_max: usize) -> Result<Vec<LogRow>, StoreError> {
        let query =
            sqlx::query("SELECT position, device_id, receive_time, batches, batch FROM log WHERE position > ? ORDER BY position LIMIT ?");
        let found = query.bind(after.0).bind(rows_max as i64).fetch(self.readers());
        log_page(found, bytes_max).await
    }

    pub async fn read_log_unbroken(&self, after: Position, rows_max: usize, bytes_max: usize) -> Result<Option<Vec<LogRow>>, StoreError> {
        // One snapshot: what is deleted after it is still read, what is deleted before it is noticed.
        let mut tx = self.readers().begin().await?;
        let pruned: i64 = sqlx::query_scalar("SELECT position FROM progress WHERE name = 'log_pruned'").fetch_one(&mut *tx).await?;
        if after.0 < pruned {
            return Ok(None);
        }
        let query =
            sqlx::query("SELECT position, device_id, receive_time, batches, batch FROM log WHERE position > ? ORDER BY position LIMIT ?");
        let found = query.bind(after.0).bind(rows_max as i64).fetch(&mut *tx);
        log_page(found, bytes_max).await.map(Some)
    }

    pub fn read_unmerged(
        &self,
        device: DeviceKey,
        start_time: Timestamp,
        end_time: Option<Timestamp>,
    ) -> BoxStream<'_, Result<SqliteRow, sqlx::Error>> {
        // One statement, and so one snapshot: a row is either behind 'merged' here, or in the chunks for whoever reads them later.
        sqlx::query("SELECT position, device_id, receive_time, batches, batch FROM log WHERE position > (SELECT position FROM progress WHERE name = 'merged') AND device_id = ? AND last_time >= ? AND first_time < ? ORDER BY position")
            .bind(device.0)
            .bind(start_time.micros())
            .bind(end_time.map_or(i64::MAX, Timestamp::micros))
            .fetch(self.readers())
    }

    pub async fn log_sizes(&self, after: Position, rows_max: usize) -> Result<Vec<LogSize>, StoreError> {
        let query =
            sqlx::query("SELECT position, receive_time, length(batch) AS bytes FROM log WHERE position > ? ORDER BY position LIMIT ?");
        let rows = query.bind(after.0).bind(rows_max as i64).fetch_all(self.readers()).await?;
        rows.iter().map(log_size).collect()
    }

    pub async fn stored_readings(&self, devices: &[DeviceKey]) -> Result<HashMap<DeviceKey, u64>, StoreError> {
        let keys: Vec<i64> = devices.iter().map(|device| device.0).collect();
        let rows = sqlx::query(
            "SELECT device_id, sum(stored_readings) AS readings FROM streams WHERE device_id IN (SELECT value FROM json_each(?)) \
             GROUP BY device_id HAVING sum(stored_readings) > 0",
        )
        .bind(serde_json::to_string(&keys).expect("integers"))
        .fetch_all(self.readers())
        .await?;
        rows.iter().map(|row| Ok((key_column(row)?, count_column(row, "readings")?))).collect()
    }

    pub async fn dead_letters(&self, device: DeviceKey, after: i64, rows_max: usize) -> Result<Vec<DeadLetterRow>, StoreError> {
        let rows = sqlx::query(
            "SELECT rejection_id, stream_id, rejected.sequence, rejected.receive_time, reason, field, message, readings, \
                 length(batch) AS size_bytes, x'' AS batch \
             FROM rejected_batches rejected JOIN streams USING (stream_key) \
             WHERE rejected.device_id = ? AND rejection_id > ? ORDER BY rejection_id LIMIT ?",
        )
        .bind(device.0)
        .bind(after)
        .bind(rows_max as i64)
        .fetch_all(self.readers())
        .await?;
        rows.iter().map(dead_letter_row).collect()
    }

    pub async fn dead_letter(&self, device: DeviceKey, id: i64) -> Result<Option<DeadLetterRow>, StoreError> {
        let row = sqlx::query(
            "SELECT rejection_id, stream_id, rejected.sequence, rejected.receive_time, reason, field, message, readings, \
                 length(batch) AS size_bytes, batch \
             FROM rejected_batches rejected JOIN streams USING (stream_key) WHERE rejected.device_id = ? AND rejection_id = ?",
        )
        .bind(device.0)
        .bind(id)
        .fetch_optional(self.readers())
        .await?;
        row.as_ref().map(dead_letter_row).transpose()
    }

    pub async fn ledger(&self, device: DeviceKey) -> Result<LedgerRow, StoreError> {
        let mut ledger = LedgerRow::default();
        // One read transaction: both tables as of the same commit.
        let mut tx = self.readers().begin().await?;
        let query = sqlx::query("SELECT * FROM streams WHERE device_id = ? ORDER BY receive_time DESC, stream_key DESC");
        let mut streams = query.bind(device.0).fetch(&mut *tx);
        while let Some(row) = streams.try_next().await? {
            if ledger.streams.len() < LEDGER_STREAMS_MAX {
                let id = StreamId::parse(row.try_get("stream_id")?).map_err(StoreError::Damaged)?;
                ledger.streams.push((id, count_column(&row, "last_sequence")?, time_column(&row, "receive_time")?));
            }
            add_count(&mut ledger.stored, &row, "stored_batches", "stored_readings")?;
            add_count(&mut ledger.duplicate, &row, "duplicate_batches", "duplicate_readings")?;
            add_count(&mut ledger.lost, &row, "lost_batches", "lost_readings")?;
        }
        drop(streams);
        let rejected =
            sqlx::query("SELECT reason, batches, readings FROM rejected_counts WHERE device_id = ? AND batches > 0 ORDER BY reason")
                .bind(device.0)
                .fetch_all(&mut *tx)
                .await?;
        for row in &rejected {
            let mut count = Count::default();
            add_count(&mut count, row, "batches", "readings")?;
            ledger.rejected.push((column(row, "reason")?, count));
        }
        Ok(ledger)
    }
}
