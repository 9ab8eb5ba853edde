//! The registry of devices and sensors.

use super::{
    PostgresStore, PostgresTx, answered, read,
    rows::{device_row, key_column, sensor_row},
    text,
};
use crate::{
    model::{DeviceId, Labels, Timestamp},
    store::{Change, CredentialKind, DeviceKey, DeviceRow, SensorRow, StoreError},
};
use sqlx::Row;

/// How many rows of a deleted device one transaction deletes, so that nobody waits for long.
const DELETED_ROWS_PER_TRANSACTION: i64 = 500;
/// How many rows of the log one transaction looks at.
const SCANNED_ROWS_PER_TRANSACTION: i64 = 5_000;

impl PostgresTx<'_> {
    pub async fn insert_device(
        &mut self,
        id: &DeviceId,
        labels: &Labels,
        display_name: &str,
        now: Timestamp,
    ) -> Result<Option<DeviceRow>, StoreError> {
        let row = sqlx::query(
            "INSERT INTO devices (id, labels, display_name, revision, create_time, update_time) VALUES ($1, $2, $3, 1, $4, $4) \
             ON CONFLICT (id) DO NOTHING RETURNING *",
        )
        .bind(id.as_str())
        .bind(labels.to_json())
        .bind(text(display_name))
        .bind(now.micros())
        .fetch_optional(&mut self.connection)
        .await?;
        row.as_ref().map(device_row).transpose()
    }

    pub async fn lock_device(&mut self, device: DeviceKey) -> Result<Option<DeviceRow>, StoreError> {
        let query = sqlx::query("SELECT * FROM devices WHERE device_id = $1 FOR NO KEY UPDATE");
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
        let row = sqlx::query(
            "UPDATE devices SET labels = $3, display_name = $4, revision = revision + 1, update_time = $5 \
             WHERE device_id = $1 AND revision = $2 RETURNING *",
        )
        .bind(device.0)
        .bind(revision)
        .bind(labels.to_json())
        .bind(text(display_name))
        .bind(now.micros())
        .fetch_optional(&mut self.connection)
        .await?;
        self.notify(Change::Device(device)).await?;
        row.as_ref().map(device_row).transpose()
    }

    /// Its streams go at once: a gateway that still takes batches for it finds no row to move on.
    pub async fn delete_device(&mut self, device: DeviceKey) -> Result<(), StoreError> {
        self.retire_configs(device).await?;
        self.revoke_owned(CredentialKind::Device, device.0, Timestamp::now()).await?;
        for statement in [
            "DELETE FROM devices WHERE device_id = $1",
            "DELETE FROM streams WHERE device_id = $1",
            "INSERT INTO deleted_devices (device_id) VALUES ($1) ON CONFLICT DO NOTHING",
        ] {
            sqlx::query(statement).bind(device.0).execute(&mut self.connection).await?;
        }
        self.notify(Change::Device(device)).await
    }

    pub async fn insert_sensor(&mut self, device: DeviceKey, sensor: &SensorRow) -> Result<SensorRow, StoreError> {
        let row = sqlx::query(
            "INSERT INTO sensors AS kept (device_id, name, unit, kind, allow_non_finite, create_time) VALUES ($1, $2, $3, $4, $5, $6) \
             ON CONFLICT (device_id, name) DO UPDATE SET name = kept.name RETURNING *",
        )
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
        let statement = "UPDATE sensors SET unit = CASE unit WHEN '' THEN $2 ELSE unit END WHERE sensor_id = $1 RETURNING *";
        let row = sqlx::query(statement).bind(sensor.key).bind(&sensor.unit).fetch_optional(&mut self.connection).await?;
        // Gone with its device, which the stream's row will tell as well.
        let Some(row) = row else { return Ok(sensor.clone()) };
        self.notify(Change::Device(key_column(&row)?)).await?;
        sensor_row(&row)
    }

    pub async fn set_sensor_allowance(&mut self, sensor: &SensorRow) -> Result<(), StoreError> {
        let device: Option<i64> = sqlx::query_scalar("UPDATE sensors SET allow_non_finite = $2 WHERE sensor_id = $1 RETURNING device_id")
            .bind(sensor.key)
            .bind(sensor.allow_non_finite)
            .fetch_optional(&mut self.connection)
            .await?;
        match device {
            Some(device) => self.notify(Change::Device(DeviceKey(device))).await,
            None => Ok(()),
        }
    }
}

impl PostgresStore {
    pub async fn device(&self, id: &DeviceId) -> Result<Option<DeviceRow>, StoreError> {
        let row = sqlx::query("SELECT * FROM devices WHERE id = $1").bind(id.as_str()).fetch_optional(self.readers()).await?;
        row.as_ref().map(device_row).transpose()
    }

    pub async fn device_by_key(&self, device: DeviceKey) -> Result<Option<DeviceRow>, StoreError> {
        let row = sqlx::query("SELECT * FROM devices WHERE device_id = $1").bind(device.0).fetch_optional(self.readers()).await?;
        row.as_ref().map(device_row).transpose()
    }

    pub async fn devices(&self, after: &str, rows_max: usize) -> Result<Vec<DeviceRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM devices WHERE id > $1 ORDER BY id LIMIT $2")
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
        let statement = "SELECT count(*) FROM devices WHERE create_time < $1 AND NOT EXISTS \
             (SELECT 1 FROM streams WHERE streams.device_id = devices.device_id AND last_sequence > 0 AND receive_time >= $1)";
        let count: i64 = sqlx::query_scalar(statement).bind(since.micros()).fetch_one(self.readers()).await?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    pub async fn last_receive_time(&self, device: DeviceKey) -> Result<Option<Timestamp>, StoreError> {
        let row = sqlx::query("SELECT max(receive_time) AS receive_time FROM streams WHERE device_id = $1 AND last_sequence > 0")
            .bind(device.0)
            .fetch_one(self.readers())
            .await?;
        let time: Option<i64> = row.try_get("receive_time")?;
        Ok(time.and_then(Timestamp::from_micros))
    }

    pub async fn sensors(&self, device: DeviceKey) -> Result<Vec<SensorRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM sensors WHERE device_id = $1 ORDER BY name").bind(device.0).fetch_all(self.readers()).await?;
        rows.iter().map(sensor_row).collect()
    }

    pub async fn purge_deleted(&self) -> Result<(), StoreError> {
        let gone: Vec<i64> = read(sqlx::query_scalar("SELECT device_id FROM deleted_devices").fetch_all(self.readers())).await?;
        for device in gone {
            self.delete_log(device).await?;
            for statement in [
                "DELETE FROM chunks WHERE chunk_id IN \
                     (SELECT chunk_id FROM chunks JOIN sensors USING (sensor_id) WHERE device_id = $1 LIMIT $2)",
                // In the order in which the oldest of all are deleted, which may go on beside it.
                "DELETE FROM rejected_batches WHERE rejection_id IN \
                     (SELECT rejection_id FROM rejected_batches WHERE device_id = $1 ORDER BY rejection_id LIMIT $2 FOR UPDATE)",
                "DELETE FROM latest_readings WHERE sensor_id IN (SELECT sensor_id FROM latest_readings WHERE device_id = $1 LIMIT $2)",
                "DELETE FROM config_revisions WHERE (device_id, revision) IN \
                     (SELECT device_id, revision FROM config_revisions WHERE device_id = $1 LIMIT $2)",
                "DELETE FROM streams WHERE stream_key IN (SELECT stream_key FROM streams WHERE device_id = $1 LIMIT $2)",
                "DELETE FROM sensors WHERE sensor_id IN (SELECT sensor_id FROM sensors WHERE device_id = $1 LIMIT $2)",
                "DELETE FROM rejected_counts WHERE (device_id, reason) IN \
                     (SELECT device_id, reason FROM rejected_counts WHERE device_id = $1 LIMIT $2)",
                "DELETE FROM config_states WHERE device_id IN (SELECT device_id FROM config_states WHERE device_id = $1 LIMIT $2)",
            ] {
                self.delete_in_steps(statement, device).await?;
            }
            let mut tx = self.begin().await?;
            let done = sqlx::query("DELETE FROM deleted_devices WHERE device_id = $1").bind(device);
            answered(done.execute(&mut tx.connection)).await?;
            tx.commit_then(|_| ()).await?;
        }
        Ok(())
    }

    /// Goes through the log once, as it has no index by device.
    async fn delete_log(&self, device: i64) -> Result<(), StoreError> {
        // By rows that there are, and not by positions: between these a restored backup has a gap that takes for ever.
        let step = "SELECT max(position) FROM (SELECT position FROM log WHERE position > $1 ORDER BY position LIMIT $2) AS step";
        let mut after = read(self.pruned_position()).await?.0;
        loop {
            let step = sqlx::query_scalar(step).bind(after).bind(SCANNED_ROWS_PER_TRANSACTION);
            let end: Option<i64> = read(step.fetch_one(self.readers())).await?;
            let Some(end) = end else { return Ok(()) };
            let mut tx = self.begin().await?;
            let query = sqlx::query("DELETE FROM log WHERE position > $1 AND position <= $2 AND device_id = $3");
            answered(query.bind(after).bind(end).bind(device).execute(&mut tx.connection)).await?;
            tx.commit_then(|_| ()).await?;
            after = end;
        }
    }

    async fn delete_in_steps(&self, statement: &'static str, device: i64) -> Result<(), StoreError> {
        loop {
            let mut tx = self.begin().await?;
            let query = sqlx::query(statement).bind(device).bind(DELETED_ROWS_PER_TRANSACTION);
            let deleted = answered(query.execute(&mut tx.connection)).await?.rows_affected();
            tx.commit_then(|_| ()).await?;
            // Another gateway may be at it as well: fewer than asked for does not mean that nothing is left.
            if deleted == 0 {
                return Ok(());
            }
        }
    }
}
