//! The chunks: what the log was merged into.

use super::{
    PostgresStore, PostgresTx, answered,
    rows::{chunk, column, count_column},
};
use crate::{
    history::chunk::Chunk,
    model::Position,
    store::{ChunkSpan, Count, Extent, NewChunk, StoreError},
};
use sqlx::postgres::{PgBindIterExt, PgRow};

/// The advisory lock of the one gateway that merges: "tidegate" as a number.
const UPKEEP_LOCK: i64 = 0x7469_6465_6761_7465;
/// What a chunk takes beside its points: its other columns and its index entries, about.
const CHUNK_OVERHEAD_BYTES: i64 = 250;

impl PostgresTx<'_> {
    /// Only for the gateway that leads, on the connection that it leads on: what it read of the chunks is so what is there.
    ///
    /// The devices' rows are held until the commit: another gateway that deletes one of them waits, and then purges these chunks.
    pub async fn replace_chunks(&mut self, gone: &[i64], new: &[NewChunk]) -> Result<(), StoreError> {
        if !self.writer.leads {
            return Err(StoreError::NotLeading);
        }
        sqlx::query("DELETE FROM chunks WHERE chunk_id = ANY($1)").bind(gone).execute(&mut self.connection).await?;
        let of_chunk = || new.iter().map(|new| &new.chunk);
        // The sensors are looked up one by one: with = ANY the planner went through all of them.
        sqlx::query(
            "WITH kept AS (SELECT sensor_id FROM (SELECT DISTINCT unnest($1::bigint[]) AS sensor_id) AS named \
                 JOIN sensors USING (sensor_id) JOIN devices USING (device_id) ORDER BY device_id FOR KEY SHARE OF devices) \
             INSERT INTO chunks (sensor_id, first_time, last_time, readings, complete, time_base, time_step, time_unit, time_factor, \
                 encoding, value_base, value_divisor, points, clock_corrections) \
             SELECT new.* FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::boolean[], $6::bigint[], $7::bigint[], \
                 $8::bigint[], $9::bigint[], $10::text[], $11::bigint[], $12::double precision[], $13::text[], $14::text[]) \
                 AS new (sensor_id, first_time, last_time, readings, complete, time_base, time_step, time_unit, time_factor, \
                     encoding, value_base, value_divisor, points, clock_corrections) \
             WHERE sensor_id IN (SELECT sensor_id FROM kept)",
        )
        .bind(new.iter().map(|new| new.sensor_key).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.first_time).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.last_time).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.readings as i64).bind_iter())
        .bind(new.iter().map(|new| new.complete).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.time_base).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.time_step).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.time_unit).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.time_factor).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.encoding.as_str()).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.value_base).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.value_divisor).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.points.as_str()).bind_iter())
        .bind(of_chunk().map(|chunk| chunk.clock_corrections.as_deref()).bind_iter())
        .execute(&mut self.connection)
        .await?;
        Ok(())
    }

    pub async fn set_merged(&mut self, position: Position) -> Result<(), StoreError> {
        let query = sqlx::query("UPDATE progress SET position = $1 WHERE name = 'merged'");
        query.bind(position.0).execute(&mut self.connection).await?;
        Ok(())
    }

    pub async fn prune_log(&mut self, through: Position) -> Result<u64, StoreError> {
        let deleted = sqlx::query("DELETE FROM log WHERE position <= $1").bind(through.0).execute(&mut self.connection).await?;
        let query = sqlx::query("UPDATE progress SET position = greatest(position, $1) WHERE name = 'log_pruned'");
        query.bind(through.0).execute(&mut self.connection).await?;
        Ok(deleted.rows_affected())
    }

    pub async fn delete_oldest_chunks(&mut self, before: Option<i64>, chunks_max: usize) -> Result<Count, StoreError> {
        let readings: Vec<i64> = sqlx::query_scalar(
            "DELETE FROM chunks WHERE chunk_id IN (SELECT chunk_id FROM chunks WHERE last_time < $1 ORDER BY last_time LIMIT $2) \
             RETURNING readings",
        )
        .bind(before.unwrap_or(i64::MAX))
        .bind(chunks_max as i64)
        .fetch_all(&mut self.connection)
        .await?;
        Ok(Count { batches: readings.len() as u64, readings: readings.iter().sum::<i64>().unsigned_abs() })
    }
}

impl PostgresStore {
    pub async fn merged_position(&self) -> Result<Position, StoreError> {
        self.progress("merged").await
    }

    pub async fn latest_position(&self) -> Result<Position, StoreError> {
        self.progress("latest_readings").await
    }

    pub(super) async fn progress(&self, name: &str) -> Result<Position, StoreError> {
        let query = sqlx::query_scalar("SELECT position FROM progress WHERE name = $1");
        Ok(Position(query.bind(name).fetch_one(self.readers()).await?))
    }

    /// By a lock of the session that writes: it is gone with the connection, and so is what was under way on it.
    pub async fn lead_upkeep(&self) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        if !tx.writer.leads {
            let query = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)").bind(UPKEEP_LOCK);
            tx.writer.leads = answered(query.fetch_one(&mut tx.connection)).await?;
        }
        let leads = tx.writer.leads;
        tx.commit_then(|_| ()).await?;
        Ok(leads)
    }

    pub async fn chunks_around(&self, extents: &[Extent]) -> Result<Vec<ChunkSpan>, StoreError> {
        // All from one index; per sensor one search, as many entries as are behind the last complete chunk, and those further on.
        let rows = sqlx::query(
            "SELECT c.chunk_id, c.sensor_id, c.first_time, c.last_time, c.readings, c.complete \
             FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS w (sensor_id, first_time, last_time) \
             CROSS JOIN LATERAL ( \
                 SELECT * FROM chunks WHERE chunks.sensor_id = w.sensor_id AND chunks.first_time <= w.last_time \
                     AND chunks.last_time >= coalesce( \
                         (SELECT f.last_time FROM chunks f WHERE f.sensor_id = w.sensor_id AND f.last_time < w.first_time AND f.complete \
                          ORDER BY f.last_time DESC LIMIT 1), \
                         -9223372036854775808)) AS c",
        )
        .bind(extents.iter().map(|extent| extent.sensor_key).bind_iter())
        .bind(extents.iter().map(|extent| extent.first_time).bind_iter())
        .bind(extents.iter().map(|extent| extent.last_time).bind_iter())
        .fetch_all(self.readers())
        .await?;
        rows.iter().map(chunk_span).collect()
    }

    pub async fn chunks(&self, keys: &[i64]) -> Result<Vec<(i64, Chunk)>, StoreError> {
        let rows = sqlx::query("SELECT * FROM chunks WHERE chunk_id = ANY($1)").bind(keys).fetch_all(self.readers()).await?;
        rows.iter().map(|row| Ok((column(row, "chunk_id")?, chunk(row)?))).collect()
    }

    pub async fn read_chunks(&self, sensor_key: i64, start: i64, end: i64, chunks_max: usize) -> Result<Vec<Chunk>, StoreError> {
        let rows =
            sqlx::query("SELECT * FROM chunks WHERE sensor_id = $1 AND last_time >= $2 AND first_time < $3 ORDER BY last_time LIMIT $4")
                .bind(sensor_key)
                .bind(start)
                .bind(end)
                .bind(chunks_max as i64)
                .fetch_all(self.readers())
                .await?;
        rows.iter().map(chunk).collect()
    }

    /// An estimate, as what deleting leaves free stays in the files for what comes next: the readings in chunks, by the size of
    /// those that are deleted next, the batches in the log, and the rest as it is.
    pub async fn used_bytes(&self) -> Result<u64, StoreError> {
        let row = sqlx::query(
            "SELECT pg_database_size(current_database()) - pg_total_relation_size('chunks') - pg_total_relation_size('log') AS others, \
                 coalesce((SELECT sum(octet_length(batch)) FROM log), 0)::bigint AS log, \
                 coalesce((SELECT sum(readings) FROM chunks), 0)::float8 AS readings, \
                 coalesce((SELECT sum(pg_column_size(points) + $1)::float8 / sum(readings) \
                     FROM (SELECT points, readings FROM chunks ORDER BY last_time LIMIT 100) AS sample), 0)::float8 AS bytes",
        )
        .bind(CHUNK_OVERHEAD_BYTES)
        .fetch_one(self.readers())
        .await?;
        let (others, log): (i64, i64) = (column(&row, "others")?, column(&row, "log")?);
        let (readings, bytes): (f64, f64) = (column(&row, "readings")?, column(&row, "bytes")?);
        Ok(others.saturating_add(log).unsigned_abs().saturating_add((readings * bytes) as u64))
    }

    pub async fn file_bytes(&self) -> Result<u64, StoreError> {
        let bytes: i64 = sqlx::query_scalar("SELECT pg_database_size(current_database())").fetch_one(self.readers()).await?;
        Ok(bytes.unsigned_abs())
    }
}

fn chunk_span(row: &PgRow) -> Result<ChunkSpan, StoreError> {
    Ok(ChunkSpan {
        key: column(row, "chunk_id")?,
        sensor_key: column(row, "sensor_id")?,
        first_time: column(row, "first_time")?,
        last_time: column(row, "last_time")?,
        readings: count_column(row, "readings")? as usize,
        complete: column(row, "complete")?,
    })
}
