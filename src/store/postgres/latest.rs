//! The latest reading of each sensor, as of a position of the log.

use super::{
    PostgresStore, answered,
    rows::{column, key_column, time_column},
};
use crate::{
    model::Position,
    store::{LatestRow, StoreError},
};
use bytes::Bytes;
use sqlx::postgres::PgBindIterExt;

impl PostgresStore {
    pub async fn latest(&self) -> Result<(Position, Vec<LatestRow>), StoreError> {
        let mut tx = self.readers().begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        let position: i64 = sqlx::query_scalar("SELECT position FROM progress WHERE name = 'latest_readings'").fetch_one(&mut *tx).await?;
        let rows = sqlx::query("SELECT * FROM latest_readings").fetch_all(&mut *tx).await?;
        let latest = rows.iter().map(|row| {
            Ok(LatestRow {
                sensor_key: column(row, "sensor_id")?,
                device: key_column(row)?,
                time: time_column(row, "time")?,
                batch: Bytes::from(column::<Vec<u8>>(row, "batch")?),
                position: Position(column(row, "position")?),
            })
        });
        Ok((Position(position), latest.collect::<Result<_, StoreError>>()?))
    }

    pub async fn save_latest(&self, rows: &[LatestRow], position: Option<Position>) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        // In one order, as another gateway may be saving the same sensors; and with the devices' rows held until the commit, so that
        // another gateway that deletes one of them purges what is saved here.
        let insert = sqlx::query(
            "WITH registered AS (SELECT device_id FROM devices WHERE device_id = ANY($2) ORDER BY device_id FOR KEY SHARE) \
             INSERT INTO latest_readings AS kept (sensor_id, device_id, time, batch, position) \
             SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bytea[], $5::bigint[]) \
                 AS new (sensor_id, device_id, time, batch, position) \
             WHERE device_id IN (SELECT device_id FROM registered) ORDER BY sensor_id \
             ON CONFLICT (sensor_id) DO UPDATE SET time = excluded.time, batch = excluded.batch, position = excluded.position \
             WHERE kept.position < excluded.position",
        )
        .bind(rows.iter().map(|row| row.sensor_key).bind_iter())
        .bind(rows.iter().map(|row| row.device.0).bind_iter())
        .bind(rows.iter().map(|row| row.time.micros()).bind_iter())
        .bind(rows.iter().map(|row| row.batch.as_ref()).bind_iter())
        .bind(rows.iter().map(|row| row.position.0).bind_iter());
        answered(insert.execute(&mut tx.connection)).await?;
        if let Some(position) = position {
            let update = sqlx::query("UPDATE progress SET position = greatest(position, $1) WHERE name = 'latest_readings'");
            answered(update.bind(position.0).execute(&mut tx.connection)).await?;
        }
        tx.commit_then(|_| ()).await
    }
}
