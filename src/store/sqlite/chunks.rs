//! The chunks: what the log was merged into.

use super::{
    PAGE_BYTES, Places, ROWS_PER_STATEMENT, SqliteStore, SqliteTx,
    rows::{chunk, column, count_column},
};
use crate::{
    history::chunk::Chunk,
    model::Position,
    store::{ChunkSpan, Count, Extent, NewChunk, StoreError},
};
use sqlx::AssertSqlSafe;

/// How many pages one step gives back to the file system, so that ingest does not wait for long.
const RELEASED_PAGES_PER_STEP: u64 = 32;
/// How much free space is kept at the least.
const FREE_BYTES_KEPT: u64 = 16 << 20;
/// How many of the chunks that are written together have their entries in one page of the index, about.
const CHUNKS_PER_INDEX_PAGE: usize = 4;

impl SqliteTx<'_> {
    pub async fn replace_chunks(&mut self, gone: &[i64], new: &[NewChunk]) -> Result<(), StoreError> {
        for keys in gone.chunks(ROWS_PER_STATEMENT) {
            let places = Places::of(keys.len(), 1);
            let sql = format!("DELETE FROM chunks WHERE chunk_id IN ({})", places.list());
            let query = keys.iter().fold(sqlx::query(AssertSqlSafe(sql)), |query, key| query.bind(*key));
            places.pad(query).execute(&mut self.connection).await?;
        }
        self.bytes += new.iter().map(|new| new.chunk.stored_bytes()).sum::<usize>();
        // Of the index, in which a sensor has some entries.
        self.bytes += (gone.len() + new.len()) * PAGE_BYTES as usize / CHUNKS_PER_INDEX_PAGE;
        let head = "chunks (sensor_id, first_time, last_time, readings, complete, time_base, time_step, time_unit, time_factor, \
                    encoding, value_base, value_divisor, points, clock_corrections)";
        let tail = "AND EXISTS (SELECT 1 FROM sensors JOIN devices USING (device_id) WHERE sensor_id = column1)";
        self.insert_rows(head, 14, tail, new, |query, NewChunk { sensor_key, complete, chunk }| {
            query
                .bind(*sensor_key)
                .bind(chunk.first_time)
                .bind(chunk.last_time)
                .bind(chunk.readings as i64)
                .bind(*complete)
                .bind(chunk.time_base)
                .bind(chunk.time_step)
                .bind(chunk.time_unit)
                .bind(chunk.time_factor)
                .bind(chunk.encoding.as_str())
                .bind(chunk.value_base)
                .bind(chunk.value_divisor)
                .bind(&chunk.points)
                .bind(&chunk.clock_corrections)
        })
        .await?;
        Ok(())
    }

    pub async fn set_merged(&mut self, position: Position) -> Result<(), StoreError> {
        let query = sqlx::query("UPDATE progress SET position = ? WHERE name = 'merged'");
        query.bind(position.0).execute(&mut self.connection).await?;
        Ok(())
    }

    pub async fn prune_log(&mut self, through: Position) -> Result<u64, StoreError> {
        let deleted = sqlx::query("DELETE FROM log WHERE position <= ?").bind(through.0).execute(&mut self.connection).await?;
        let query = sqlx::query("UPDATE progress SET position = ? WHERE name = 'log_pruned'");
        query.bind(through.0).execute(&mut self.connection).await?;
        Ok(deleted.rows_affected())
    }

    pub async fn delete_oldest_chunks(&mut self, before: Option<i64>, chunks_max: usize) -> Result<Count, StoreError> {
        let readings: Vec<i64> = sqlx::query_scalar(
            "DELETE FROM chunks WHERE chunk_id IN (SELECT chunk_id FROM chunks INDEXED BY chunks_by_last_time WHERE last_time < ? ORDER BY last_time LIMIT ?) RETURNING readings",
        )
        .bind(before.unwrap_or(i64::MAX))
        .bind(chunks_max as i64)
        .fetch_all(&mut self.connection)
        .await?;
        Ok(Count { batches: readings.len() as u64, readings: readings.iter().sum::<i64>().unsigned_abs() })
    }
}

impl SqliteStore {
    pub async fn merged_position(&self) -> Result<Position, StoreError> {
        self.progress("merged").await
    }

    pub async fn latest_position(&self) -> Result<Position, StoreError> {
        self.progress("latest_readings").await
    }

    pub(super) async fn progress(&self, name: &str) -> Result<Position, StoreError> {
        let query = sqlx::query_scalar("SELECT position FROM progress WHERE name = ?");
        Ok(Position(query.bind(name).fetch_one(self.readers()).await?))
    }

    pub async fn chunks_around(&self, extents: &[Extent]) -> Result<Vec<ChunkSpan>, StoreError> {
        let wanted: Vec<[i64; 3]> = extents.iter().map(|extent| [extent.sensor_key, extent.first_time, extent.last_time]).collect();
        let wanted = serde_json::to_string(&wanted).expect("integers");
        // All from one index; per sensor one search, as many entries as are behind the last complete chunk, and those further on.
        // One row in all, as each row costs more than its spans.
        let found: String = sqlx::query_scalar(
            "SELECT json_group_array(json_array(c.chunk_id, c.sensor_id, c.first_time, c.last_time, c.readings, c.complete)) \
             FROM json_each(?) w CROSS JOIN chunks c INDEXED BY chunks_by_sensor \
             WHERE c.sensor_id = w.value ->> 0 AND c.first_time <= w.value ->> 2 AND c.last_time >= coalesce( \
                 (SELECT f.last_time FROM chunks f INDEXED BY chunks_by_sensor \
                  WHERE f.sensor_id = w.value ->> 0 AND f.last_time < w.value ->> 1 AND f.complete ORDER BY f.last_time DESC LIMIT 1), \
                 -9223372036854775808)",
        )
        .bind(wanted)
        .fetch_one(self.readers())
        .await?;
        let spans: Vec<(i64, i64, i64, i64, usize, u8)> = serde_json::from_str(&found).map_err(damaged)?;
        let span = |(key, sensor_key, first_time, last_time, readings, complete)| ChunkSpan {
            key,
            sensor_key,
            first_time,
            last_time,
            readings,
            complete: complete != 0,
        };
        Ok(spans.into_iter().map(span).collect())
    }

    pub async fn read_chunks(&self, sensor_key: i64, start: i64, end: i64, chunks_max: usize) -> Result<Vec<Chunk>, StoreError> {
        let rows = sqlx::query("SELECT * FROM chunks INDEXED BY chunks_by_sensor WHERE sensor_id = ? AND last_time >= ? AND first_time < ? ORDER BY last_time LIMIT ?")
            .bind(sensor_key)
            .bind(start)
            .bind(end)
            .bind(chunks_max as i64)
            .fetch_all(self.readers())
            .await?;
        rows.iter().map(chunk).collect()
    }

    pub async fn chunks(&self, keys: &[i64]) -> Result<Vec<(i64, Chunk)>, StoreError> {
        let rows = sqlx::query("SELECT * FROM chunks WHERE chunk_id IN (SELECT value FROM json_each(?))")
            .bind(serde_json::to_string(keys).expect("integers"))
            .fetch_all(self.readers())
            .await?;
        rows.iter().map(|row| Ok((column(row, "chunk_id")?, chunk(row)?))).collect()
    }

    pub async fn used_bytes(&self) -> Result<u64, StoreError> {
        let [pages, free, page_bytes] = self.page_counts().await?;
        Ok((pages - free) * page_bytes)
    }

    pub async fn file_bytes(&self) -> Result<u64, StoreError> {
        let [pages, _, page_bytes] = self.page_counts().await?;
        Ok(pages * page_bytes)
    }

    pub async fn release_space(&self, kept_bytes: u64) -> Result<bool, StoreError> {
        let [pages, free, page_bytes] = self.page_counts().await?;
        let kept = ((pages - free) / 8).max(FREE_BYTES_KEPT / page_bytes) + kept_bytes / page_bytes;
        let surplus = free.saturating_sub(kept);
        if surplus == 0 {
            return Ok(false);
        }
        let mut tx = self.begin().await?;
        let released = surplus.min(RELEASED_PAGES_PER_STEP);
        tx.bytes = (released * page_bytes) as usize;
        let sql = format!("PRAGMA incremental_vacuum({released})");
        // A page is released with each step of the statement: it must be gone through.
        sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut tx.connection).await?;
        tx.commit().await?;
        Ok(surplus > RELEASED_PAGES_PER_STEP)
    }

    /// How many pages the database has, how many of them are free, and how large each is.
    async fn page_counts(&self) -> Result<[u64; 3], StoreError> {
        let sql = "SELECT page_count AS pages, freelist_count AS free, page_size AS bytes FROM pragma_page_count, pragma_freelist_count, pragma_page_size";
        let row = sqlx::query(sql).fetch_one(self.readers()).await?;
        Ok([count_column(&row, "pages")?, count_column(&row, "free")?, count_column(&row, "bytes")?])
    }
}

fn damaged(error: serde_json::Error) -> StoreError {
    StoreError::Damaged(format!("chunks: {error}"))
}
