//! The latest reading of each sensor, as of a position of the log.

use super::{
    SqliteStore,
    rows::{column, key_column, time_column},
};
use crate::{
    model::Position,
    store::{LatestRow, StoreError},
};
use bytes::Bytes;

impl SqliteStore {
    pub async fn latest(&self) -> Result<(Position, Vec<LatestRow>), StoreError> {
        let mut tx = self.readers().begin().await?;
        let position: i64 = sqlx::query_scalar("SELECT position FROM progress WHERE name = 'latest_readings'").fetch_one(&mut *tx).await?;
        let rows = sqlx::query("SELECT * FROM latest_readings").fetch_all(&mut *tx).await?;
        let latest = rows.iter().map(|row| {
            Ok(LatestRow {
                sensor_key: column(row, "sensor_id")?,
                device: key_column(row)?,
                time: time_column(row, "time")?,
                batch: Bytes::from(column::<Vec<u8>>(row, "batch")?),
                position: Position(position),
            })
        });
        Ok((Position(position), latest.collect::<Result<_, StoreError>>()?))
    }

    pub async fn save_latest(&self, rows: &[LatestRow], position: Option<Position>) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        tx.count_pages(rows.iter().map(|row| row.sensor_key));
        let head = "latest_readings (sensor_id, device_id, time, batch)";
        let tail = "AND column2 IN (SELECT device_id FROM devices) \
                    ON CONFLICT (sensor_id) DO UPDATE SET time = excluded.time, batch = excluded.batch";
        tx.insert_rows(head, 4, tail, rows, |query, row| {
            query.bind(row.sensor_key).bind(row.device.0).bind(row.time.micros()).bind(row.batch.to_vec())
        })
        .await?;
        if let Some(position) = position {
            let update = sqlx::query("UPDATE progress SET position = ? WHERE name = 'latest_readings'");
            update.bind(position.0).execute(&mut tx.connection).await?;
        }
        tx.commit().await
    }
}
