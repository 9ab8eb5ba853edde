//! The registry of devices and sensors.

use super::{
    SqliteStore, SqliteTx,
    rows::{device_row, sensor_row},
};
use crate::{
    model::{DeviceId, Labels, Timestamp},
    store::{CredentialKind, DeviceKey, DeviceRow, SensorRow, StoreError},
};
use sqlx::Row;

/// How many rows of a deleted device one transaction deletes, so that ingest does not wait for long.
const DELETED_ROWS_PER_TRANSACTION: i64 = 500;
/// How many rows of the log one transaction looks at.
const SCANNED_ROWS_PER_TRANSACTION: i64 = 5_000;

impl SqliteTx<'_> {
    pub async fn insert_device(
        &mut self,
        id: &DeviceId,
        labels: &Labels,
        display_name: &str,
        now: Timestamp,
    ) -> Result<Option<DeviceRow>, StoreError> {
        let row = sqlx::query("INSERT INTO devices (id, labels, display_name, revision, create_time, update_time) VALUES (?, ?, ?, 1, ?, ?) ON CONFLICT (id) DO NOTHING RETURNING *")
            .bind(id.as_str())
            .bind(labels.to_json())
            .bind(display_name)
            .bind(now.micros())
            .bind(now.micros())
            .fetch_optional(&mut self.connection)
            .await?;
        row.as_ref().map(device_row).transpose()
    }

    pub async fn lock_device(&mut self, device: DeviceKey) -> Result<Option<DeviceRow>, StoreError> {
        let query = sqlx::query("SELECT * FROM devices WHERE device_id = ?");
        let row = query.bind(device.0).fetch_optional(&mut self.connection).await?;
        row.as_ref().map(device_row).transpose()
    }

    pub async fn update_device(
        &mut self,
        device: DeviceKey,
        revision: i64,
        labels: &Labels,
        display_name: &str,
        now: Timestamp,
    ) -> Result<Option<DeviceRow>, StoreError> {
        let row = sqlx::query("UPDATE devices SET labels = ?, display_name = ?, revision = revision + 1, update_time = ? WHERE device_id = ? AND revision = ? RETURNING *")
            .bind(labels.to_json())
            .bind(display_name)
            .bind(now.micros())
            .bind(device.0)
            .bind(revision)
            .fetch_optional(&mut self.connection)
            .await?;
        row.as_ref().map(device_row).transpose()
    }

    pub async fn delete_device(&mut self, device: DeviceKey) -> Result<(), StoreError> {
        self.retire_configs(device).await?;
        self.revoke_owned(CredentialKind::Device, device.0, Timestamp::now()).await?;
        sqlx::query("DELETE FROM devices WHERE device_id = ?").bind(device.0).execute(&mut self.connection).await?;
        sqlx::query("INSERT OR IGNORE INTO deleted_devices (device_id) VALUES (?)").bind(device.0).execute(&mut self.connection).await?;
        Ok(())
    }

    pub async fn insert_sensor(&mut self, device: DeviceKey, sensor: &SensorRow) -> Result<SensorRow, StoreError> {
        let row = sqlx::query("INSERT INTO sensors (device_id, name, unit, kind, allow_non_finite, create_time) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (device_id, name) DO UPDATE SET name = name RETURNING *")
            .bind(device.0)
            .bind(&sensor.name)
            .bind(&sensor.unit)
            .bind(sensor.kind.code())
            .bind(sensor.allow_non_finite)
            .bind(sensor.create_time.micros())
            .fetch_one(&mut self.connection)
            .await?;
        sensor_row(&row)
    }

    pub async fn set_sensor_unit(&mut self, sensor: &SensorRow) -> Result<SensorRow, StoreError> {
        let statement = "UPDATE sensors SET unit = CASE unit WHEN '' THEN ? ELSE unit END WHERE sensor_id = ? RETURNING *";
        let row = sqlx::query(statement).bind(&sensor.unit).bind(sensor.key).fetch_optional(&mut self.connection).await?;
        row.as_ref().map_or_else(|| Ok(sensor.clone()), sensor_row)
    }

    pub async fn set_sensor_allowance(&mut self, sensor: &SensorRow) -> Result<(), StoreError> {
        let query = sqlx::query("UPDATE sensors SET allow_non_finite = ? WHERE sensor_id = ?");
        query.bind(sensor.allow_non_finite).bind(sensor.key).execute(&mut self.connection).await?;
        Ok(())
    }
}

impl SqliteStore {
    pub async fn device(&self, id: &DeviceId) -> Result<Option<DeviceRow>, StoreError> {
        let row = sqlx::query("SELECT * FROM devices WHERE id = ?").bind(id.as_str()).fetch_optional(self.readers()).await?;
        row.as_ref().map(device_row).transpose()
    }

    pub async fn device_by_key(&self, device: DeviceKey) -> Result<Option<DeviceRow>, StoreError> {
        let row = sqlx::query("SELECT * FROM devices WHERE device_id = ?").bind(device.0).fetch_optional(self.readers()).await?;
        row.as_ref().map(device_row).transpose()
    }

    pub async fn devices(&self, after: &str, rows_max: usize) -> Result<Vec<DeviceRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM devices WHERE id > ? ORDER BY id LIMIT ?")
            .bind(after)
            .bind(rows_max as i64)
            .fetch_all(self.readers())
            .await?;
        rows.iter().map(device_row).collect()
    }

    pub async fn devices_len(&self) -> Result<usize, StoreError> {
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM devices").fetch_one(self.readers()).await?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    pub async fn silent_devices_len(&self, since: Timestamp) -> Result<usize, StoreError> {
        let statement = "SELECT count(*) FROM devices WHERE create_time < ?1 AND NOT EXISTS \
             (SELECT 1 FROM streams WHERE streams.device_id = devices.device_id AND last_sequence > 0 AND receive_time >= ?1)";
        let count: i64 = sqlx::query_scalar(statement).bind(since.micros()).fetch_one(self.readers()).await?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    pub async fn last_receive_time(&self, device: DeviceKey) -> Result<Option<Timestamp>, StoreError> {
        let row = sqlx::query("SELECT max(receive_time) AS receive_time FROM streams WHERE device_id = ? AND last_sequence > 0")
            .bind(device.0)
            .fetch_one(self.readers())
            .await?;
        let time: Option<i64> = row.try_get("receive_time")?;
        Ok(time.and_then(Timestamp::from_micros))
    }

    pub async fn sensors(&self, device: DeviceKey) -> Result<Vec<SensorRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM sensors WHERE device_id = ? ORDER BY name").bind(device.0).fetch_all(self.readers()).await?;
        rows.iter().map(sensor_row).collect()
    }

    pub async fn purge_deleted(&self) -> Result<(), StoreError> {
        let gone: Vec<i64> = sqlx::query_scalar("SELECT device_id FROM deleted_devices").fetch_all(self.readers()).await?;
        for device in gone {
            self.delete_log(device).await?;
            for statement in [
                "DELETE FROM chunks WHERE chunk_id IN (SELECT chunk_id FROM chunks JOIN sensors USING (sensor_id) WHERE device_id = ? LIMIT ?)",
                "DELETE FROM rejected_batches WHERE rejection_id IN (SELECT rejection_id FROM rejected_batches WHERE device_id = ? LIMIT ?)",
                "DELETE FROM latest_readings WHERE sensor_id IN (SELECT sensor_id FROM latest_readings WHERE device_id = ? LIMIT ?)",
                "DELETE FROM config_revisions WHERE (device_id, revision) IN (SELECT device_id, revision FROM config_revisions WHERE device_id = ? LIMIT ?)",
                "DELETE FROM streams WHERE stream_key IN (SELECT stream_key FROM streams WHERE device_id = ? LIMIT ?)",
                "DELETE FROM sensors WHERE sensor_id IN (SELECT sensor_id FROM sensors WHERE device_id = ? LIMIT ?)",
                "DELETE FROM rejected_counts WHERE (device_id, reason) IN (SELECT device_id, reason FROM rejected_counts WHERE device_id = ? LIMIT ?)",
                "DELETE FROM config_states WHERE device_id IN (SELECT device_id FROM config_states WHERE device_id = ? LIMIT ?)",
            ] {
                self.delete_in_steps(statement, device).await?;
            }
            let mut tx = self.begin().await?;
            sqlx::query("DELETE FROM deleted_devices WHERE device_id = ?").bind(device).execute(&mut tx.connection).await?;
            tx.commit().await?;
        }
        Ok(())
    }

    /// Goes through the log once, as it has no index by device.
    async fn delete_log(&self, device: i64) -> Result<(), StoreError> {
        // By rows that there are, and not by positions: between these a restored backup has a gap that takes for ever.
        let step = "SELECT max(position) FROM (SELECT position FROM log WHERE position > ? ORDER BY position LIMIT ?) AS step";
        let mut after = self.pruned_position().await?.0;
        loop {
            let end: Option<i64> =
                sqlx::query_scalar(step).bind(after).bind(SCANNED_ROWS_PER_TRANSACTION).fetch_one(self.readers()).await?;
            let Some(end) = end else { return Ok(()) };
            let mut tx = self.begin().await?;
            let query = sqlx::query("DELETE FROM log WHERE position > ? AND position <= ? AND device_id = ?");
            query.bind(after).bind(end).bind(device).execute(&mut tx.connection).await?;
            tx.commit().await?;
            after = end;
        }
    }

    async fn delete_in_steps(&self, statement: &'static str, device: i64) -> Result<(), StoreError> {
        loop {
            let mut tx = self.begin().await?;
            let query = sqlx::query(statement).bind(device).bind(DELETED_ROWS_PER_TRANSACTION);
            let deleted = query.execute(&mut tx.connection).await?.rows_affected();
            tx.commit().await?;
            if deleted < DELETED_ROWS_PER_TRANSACTION as u64 {
                return Ok(());
            }
        }
    }
}
