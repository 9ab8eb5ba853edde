//! The log: appending to it, reading it, and what is kept beside it in the same transaction.

use super::{
    PostgresStore, PostgresTx, changes,
    rows::{add_count, column, count_column, dead_letter_row, key_column, log_page, log_size, time_column},
    text,
};
use crate::{
    model::{Position, StreamId, Timestamp, batch::reason_name},
    store::{
        Count, DeadLetterRow, DeviceKey, LedgerRow, LogRow, LogSize, NewLogRow, NewRejection, StoreError, StreamChange, StreamRow,
        rows::{as_integer, log_parts},
    },
};
use futures_util::{TryStreamExt, stream::BoxStream};
use sqlx::{
    Row,
    postgres::{PgBindIterExt, PgRow},
};
use std::collections::HashMap;

/// How many streams a ledger shows.
const LEDGER_STREAMS_MAX: usize = 100;
/// How many bytes of batches one statement appends, about. A statement is copied several times on its way, on both sides: in parts what is
/// copied stays in the processor's cache. Each part is a round trip for which other gateways that append wait.
const BYTES_PER_APPEND: usize = 512 << 10;

impl PostgresTx<'_> {
    pub async fn stream(&mut self, device: DeviceKey, stream_id: StreamId, now: Timestamp) -> Result<StreamRow, StoreError> {
        let found = sqlx::query("SELECT stream_key, last_sequence FROM streams WHERE device_id = $1 AND stream_id = $2")
            .bind(device.0)
            .bind(stream_id.as_bytes().as_slice())
            .fetch_optional(&mut self.connection)
            .await?;
        if let Some(row) = found {
            return Ok(StreamRow { key: column(&row, "stream_key")?, last_sequence: count_column(&row, "last_sequence")? });
        }
        // The device's row is held until the commit: it can't be deleted by another gateway, and leave this stream behind.
        let made: Option<i64> = sqlx::query_scalar(
            "INSERT INTO streams (device_id, stream_id, last_sequence, stored_batches, stored_readings, duplicate_batches, \
                 duplicate_readings, lost_batches, lost_readings, receive_time) \
             SELECT device_id, $2, 0, 0, 0, 0, 0, 0, 0, $3 FROM devices WHERE device_id = $1 FOR KEY SHARE \
             ON CONFLICT (device_id, stream_id) DO NOTHING RETURNING stream_key",
        )
        .bind(device.0)
        .bind(stream_id.as_bytes().as_slice())
        .bind(now.micros())
        .fetch_optional(&mut self.connection)
        .await?;
        // Another gateway has just made it, or has deleted the device.
        let key = made.ok_or(StoreError::StreamConflict { changed: 0, expected: 1 })?;
        Ok(StreamRow { key, last_sequence: 0 })
    }

    pub async fn lock_streams(&mut self, streams: &[(DeviceKey, StreamId)]) -> Result<Vec<((DeviceKey, StreamId), StreamRow)>, StoreError> {
        let rows = sqlx::query(
            "SELECT device_id, stream_id, stream_key, last_sequence FROM streams \
             JOIN unnest($1::bigint[], $2::bytea[]) AS wanted (device_id, stream_id) USING (device_id, stream_id) \
             ORDER BY stream_key FOR UPDATE OF streams",
        )
        .bind(streams.iter().map(|(device, _)| device.0).bind_iter())
        .bind(streams.iter().map(|(_, stream_id)| stream_id.as_bytes().as_slice()).bind_iter())
        .fetch_all(&mut self.connection)
        .await?;
        let locked = rows.iter().map(|row| {
            let stream_id = StreamId::parse(row.try_get("stream_id")?).map_err(StoreError::Damaged)?;
            let stream = StreamRow { key: column(row, "stream_key")?, last_sequence: count_column(row, "last_sequence")? };
            Ok(((key_column(row)?, stream_id), stream))
        });
        locked.collect()
    }

    pub async fn append(&mut self, rows: &[NewLogRow]) -> Result<Position, StoreError> {
        let mut first = None;
        for part in log_parts(rows, BYTES_PER_APPEND) {
            let position = self.append_part(part).await?;
            first.get_or_insert(position);
        }
        Ok(first.unwrap_or(Position(0)))
    }

    /// Takes positions, appends, and has the commit wake the other gateways: one round trip.
    async fn append_part(&mut self, rows: &[NewLogRow]) -> Result<Position, StoreError> {
        let count = rows.len() as i64;
        let first: i64 = sqlx::query_scalar(
            "WITH head AS (UPDATE log_head SET position = position + $1 RETURNING position - $1 AS before), \
             appended AS ( \
                 INSERT INTO log (position, device_id, stream_key, sequence, receive_time, first_time, last_time, readings, batches, batch) \
                 SELECT (SELECT before FROM head) + generate_series(1, $1), unnest($2::bigint[]), unnest($3::bigint[]), unnest($4::bigint[]), \
                     unnest($5::bigint[]), unnest($6::bigint[]), unnest($7::bigint[]), unnest($8::bigint[]), unnest($9::bigint[]), \
                     unnest($10::bytea[])) \
             SELECT before + 1 FROM head, pg_notify($11, $12 || (before + $1))",
        )
        .bind(count)
        .bind(rows.iter().map(|row| row.device.0).bind_iter())
        .bind(rows.iter().map(|row| row.stream_key).bind_iter())
        .bind(rows.iter().map(|row| as_integer(row.last_sequence)).bind_iter())
        .bind(rows.iter().map(|row| row.receive_time.micros()).bind_iter())
        .bind(rows.iter().map(|row| row.summary.first_time.micros()).bind_iter())
        .bind(rows.iter().map(|row| row.summary.last_time.micros()).bind_iter())
        .bind(rows.iter().map(|row| i64::from(row.summary.readings)).bind_iter())
        .bind(rows.iter().map(|row| row.batches as i64).bind_iter())
        .bind(rows.iter().map(|row| row.batch.as_ref()).bind_iter())
        .bind(changes::CHANNEL)
        .bind(changes::log_payload(self.gateway))
        .fetch_one(&mut self.connection)
        .await?;
        Ok(Position(first))
    }

    pub async fn advance_streams(&mut self, changes: &[StreamChange]) -> Result<(), StoreError> {
        // What a device says it lost is its own word: the sum stays an integer, whatever it says.
        let done = sqlx::query(
            "UPDATE streams AS old SET last_sequence = new.sequence_after, \
                 stored_batches = old.stored_batches + new.stored_batches, stored_readings = old.stored_readings + new.stored_readings, \
                 duplicate_batches = old.duplicate_batches + new.duplicate_batches, \
                 duplicate_readings = old.duplicate_readings + new.duplicate_readings, \
                 lost_batches = old.lost_batches + new.lost_batches, \
                 lost_readings = old.lost_readings + least(new.lost_readings, 9223372036854775807 - old.lost_readings), \
                 receive_time = greatest(old.receive_time, new.receive_time) \
             FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[], \
                 $9::bigint[], $10::bigint[]) \
                 AS new (stream_key, sequence_before, sequence_after, stored_batches, stored_readings, duplicate_batches, \
                     duplicate_readings, lost_batches, lost_readings, receive_time) \
             WHERE old.stream_key = new.stream_key AND old.last_sequence = new.sequence_before",
        )
        .bind(changes.iter().map(|change| change.key).bind_iter())
        .bind(changes.iter().map(|change| as_integer(change.sequence_before)).bind_iter())
        .bind(changes.iter().map(|change| as_integer(change.sequence_after)).bind_iter())
        .bind(changes.iter().map(|change| as_integer(change.stored.batches)).bind_iter())
        .bind(changes.iter().map(|change| as_integer(change.stored.readings)).bind_iter())
        .bind(changes.iter().map(|change| as_integer(change.duplicate.batches)).bind_iter())
        .bind(changes.iter().map(|change| as_integer(change.duplicate.readings)).bind_iter())
        .bind(changes.iter().map(|change| as_integer(change.lost.batches)).bind_iter())
        .bind(changes.iter().map(|change| as_integer(change.lost.readings)).bind_iter())
        .bind(changes.iter().map(|change| change.receive_micros).bind_iter())
        .execute(&mut self.connection)
        .await?;
        let (changed, expected) = (done.rows_affected(), changes.len() as u64);
        if changed == expected { Ok(()) } else { Err(StoreError::StreamConflict { changed, expected }) }
    }

    pub async fn reject(&mut self, rows: &[NewRejection], kept_max: u32) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO rejected_batches (device_id, stream_key, sequence, receive_time, reason, field, message, readings, batch) \
             SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::text[], \
                 $8::bigint[], $9::bytea[])",
        )
        .bind(rows.iter().map(|row| row.device.0).bind_iter())
        .bind(rows.iter().map(|row| row.stream_key).bind_iter())
        .bind(rows.iter().map(|row| as_integer(row.sequence)).bind_iter())
        .bind(rows.iter().map(|row| row.receive_time.micros()).bind_iter())
        .bind(rows.iter().map(|row| reason_name(row.reject.reason)).bind_iter())
        .bind(rows.iter().map(|row| text(&row.reject.field).into_owned()).bind_iter())
        .bind(rows.iter().map(|row| text(&row.reject.message).into_owned()).bind_iter())
        .bind(rows.iter().map(|row| as_integer(row.reject.readings)).bind_iter())
        .bind(rows.iter().map(|row| row.batch.as_ref()).bind_iter())
        .execute(&mut self.connection)
        .await?;
        sqlx::query(
            "INSERT INTO rejected_counts AS counted (device_id, reason, batches, readings) \
             SELECT device_id, reason, count(*), sum(readings)::bigint FROM unnest($1::bigint[], $2::text[], $3::bigint[]) \
                 AS new (device_id, reason, readings) GROUP BY device_id, reason ORDER BY device_id, reason \
             ON CONFLICT (device_id, reason) DO UPDATE \
                 SET batches = counted.batches + excluded.batches, readings = counted.readings + excluded.readings",
        )
        .bind(rows.iter().map(|row| row.device.0).bind_iter())
        .bind(rows.iter().map(|row| reason_name(row.reject.reason)).bind_iter())
        .bind(rows.iter().map(|row| as_integer(row.reject.readings)).bind_iter())
        .execute(&mut self.connection)
        .await?;
        sqlx::query("DELETE FROM rejected_batches WHERE rejection_id <= (SELECT max(rejection_id) FROM rejected_batches) - $1")
            .bind(i64::from(kept_max))
            .execute(&mut self.connection)
            .await?;
        Ok(())
    }

    pub async fn take_dead_letter(&mut self, device: DeviceKey, id: i64) -> Result<Option<(String, u64)>, StoreError> {
        let row = sqlx::query("DELETE FROM rejected_batches WHERE device_id = $1 AND rejection_id = $2 RETURNING reason, readings")
            .bind(device.0)
            .bind(id)
            .fetch_optional(&mut self.connection)
            .await?;
        row.map(|row| Ok((column(&row, "reason")?, count_column(&row, "readings")?))).transpose()
    }

    pub async fn uncount_rejected(&mut self, device: DeviceKey, reason: &str, readings: u64) -> Result<(), StoreError> {
        sqlx::query("UPDATE rejected_counts SET batches = batches - 1, readings = readings - $3 WHERE device_id = $1 AND reason = $2")
            .bind(device.0)
            .bind(reason)
            .bind(as_integer(readings))
            .execute(&mut self.connection)
            .await?;
        Ok(())
    }
}

impl PostgresStore {
    pub async fn last_sequence(&self, device: DeviceKey, stream_id: StreamId) -> Result<u64, StoreError> {
        let row = sqlx::query("SELECT last_sequence FROM streams WHERE device_id = $1 AND stream_id = $2")
            .bind(device.0)
            .bind(stream_id.as_bytes().as_slice())
            .fetch_optional(self.readers())
            .await?;
        row.map_or(Ok(0), |row| count_column(&row, "last_sequence"))
    }

    pub async fn last_position(&self) -> Result<Position, StoreError> {
        Ok(Position(sqlx::query_scalar("SELECT position FROM log_head").fetch_one(self.readers()).await?))
    }

    pub async fn pruned_position(&self) -> Result<Position, StoreError> {
        self.progress("log_pruned").await
    }

    pub async fn position_before(&self, time: Timestamp) -> Result<Position, StoreError> {
        let (mut low, mut high) = (self.pruned_position().await?.0 + 1, self.last_position().await?.0 + 1);
        // Binary search by primary key: there is no index on the receive time, which would cost each append.
        while low < high {
            let middle = low + (high - low) / 2;
            let row = sqlx::query("SELECT position, receive_time FROM log WHERE position >= $1 ORDER BY position LIMIT 1")
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
            sqlx::query("SELECT position, device_id, receive_time, batches, batch FROM log WHERE position > $1 ORDER BY position LIMIT $2");
        let found = query.bind(after.0).bind(rows_max as i64).fetch(self.readers());
        log_page(found, bytes_max).await
    }

    pub async fn read_log_unbroken(&self, after: Position, rows_max: usize, bytes_max: usize) -> Result<Option<Vec<LogRow>>, StoreError> {
        // One snapshot: what is deleted after it is still read, what is deleted before it is noticed.
        let mut tx = self.readers().begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        let pruned: i64 = sqlx::query_scalar("SELECT position FROM progress WHERE name = 'log_pruned'").fetch_one(&mut *tx).await?;
        if after.0 < pruned {
            return Ok(None);
        }
        let query =
            sqlx::query("SELECT position, device_id, receive_time, batches, batch FROM log WHERE position > $1 ORDER BY position LIMIT $2");
        let found = query.bind(after.0).bind(rows_max as i64).fetch(&mut *tx);
        log_page(found, bytes_max).await.map(Some)
    }

    pub fn read_unmerged(
        &self,
        device: DeviceKey,
        start_time: Timestamp,
        end_time: Option<Timestamp>,
    ) -> BoxStream<'_, Result<PgRow, sqlx::Error>> {
        // One statement, and so one snapshot: a row is either behind 'merged' here, or in the chunks for whoever reads them later.
        sqlx::query(
            "SELECT position, device_id, receive_time, batches, batch FROM log \
             WHERE position > (SELECT position FROM progress WHERE name = 'merged') \
                 AND device_id = $1 AND last_time >= $2 AND first_time < $3 ORDER BY position",
        )
        .bind(device.0)
        .bind(start_time.micros())
        .bind(end_time.map_or(i64::MAX, Timestamp::micros))
        .fetch(self.readers())
    }

    pub async fn log_sizes(&self, after: Position, rows_max: usize) -> Result<Vec<LogSize>, StoreError> {
        let query = sqlx::query(
            "SELECT position, receive_time, length(batch)::bigint AS bytes FROM log WHERE position > $1 ORDER BY position LIMIT $2",
        );
        let rows = query.bind(after.0).bind(rows_max as i64).fetch_all(self.readers()).await?;
        rows.iter().map(log_size).collect()
    }

    pub async fn stored_readings(&self, devices: &[DeviceKey]) -> Result<HashMap<DeviceKey, u64>, StoreError> {
        let query = sqlx::query(
            "SELECT device_id, sum(stored_readings)::bigint AS readings FROM streams WHERE device_id = ANY($1) \
             GROUP BY device_id HAVING sum(stored_readings) > 0",
        );
        let rows = query.bind(devices.iter().map(|device| device.0).bind_iter()).fetch_all(self.readers()).await?;
        rows.iter().map(|row| Ok((key_column(row)?, count_column(row, "readings")?))).collect()
    }

    pub async fn dead_letters(&self, device: DeviceKey, after: i64, rows_max: usize) -> Result<Vec<DeadLetterRow>, StoreError> {
        let rows = sqlx::query(
            "SELECT rejection_id, stream_id, rejected.sequence, rejected.receive_time, reason, field, message, readings, \
                 octet_length(batch)::bigint AS size_bytes, ''::bytea AS batch \
             FROM rejected_batches rejected JOIN streams USING (stream_key) \
             WHERE rejected.device_id = $1 AND rejection_id > $2 ORDER BY rejection_id LIMIT $3",
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
                 octet_length(batch)::bigint AS size_bytes, batch \
             FROM rejected_batches rejected JOIN streams USING (stream_key) WHERE rejected.device_id = $1 AND rejection_id = $2",
        )
        .bind(device.0)
        .bind(id)
        .fetch_optional(self.readers())
        .await?;
        row.as_ref().map(dead_letter_row).transpose()
    }

    pub async fn ledger(&self, device: DeviceKey) -> Result<LedgerRow, StoreError> {
        let mut ledger = LedgerRow::default();
        // One snapshot: both tables as of the same commit.
        let mut tx = self.readers().begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        let query = sqlx::query("SELECT * FROM streams WHERE device_id = $1 ORDER BY receive_time DESC, stream_key DESC");
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
            sqlx::query("SELECT reason, batches, readings FROM rejected_counts WHERE device_id = $1 AND batches > 0 ORDER BY reason")
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
