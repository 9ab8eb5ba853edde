//! Desired configurations and how far they have come.

use super::{
    PostgresStore, PostgresTx,
    rows::{count_column, key_column, revision_row, state_row},
    text,
};
use crate::{
    model::{DeviceId, Timestamp},
    store::{Change, ConfigOutcome, ConfigReportRow, ConfigRevisionRow, ConfigStateRow, DeviceKey, StoreError, rows::as_integer},
};

impl PostgresTx<'_> {
    pub async fn latest_config(&mut self, device: DeviceKey) -> Result<Option<ConfigRevisionRow>, StoreError> {
        let row = sqlx::query("SELECT * FROM config_revisions WHERE device_id = $1 ORDER BY revision DESC LIMIT 1")
            .bind(device.0)
            .fetch_optional(&mut self.connection)
            .await?;
        row.as_ref().map(revision_row).transpose()
    }

    pub async fn retired_revision(&mut self, id: &DeviceId) -> Result<u64, StoreError> {
        let query = sqlx::query("SELECT revision FROM retired_configs WHERE id = $1");
        let row = query.bind(id.as_str()).fetch_optional(&mut self.connection).await?;
        row.map_or(Ok(0), |row| count_column(&row, "revision"))
    }

    /// Remembers the highest revision of a device that is about to be deleted, for [`retired_revision`](Self::retired_revision).
    pub(super) async fn retire_configs(&mut self, device: DeviceKey) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO retired_configs (id, revision) \
             SELECT id, desired_revision FROM devices JOIN config_states USING (device_id) WHERE device_id = $1 \
             ON CONFLICT (id) DO UPDATE SET revision = excluded.revision",
        )
        .bind(device.0)
        .execute(&mut self.connection)
        .await?;
        Ok(())
    }

    pub async fn config_of_request(&mut self, device: DeviceKey, request_id: &str) -> Result<Option<ConfigRevisionRow>, StoreError> {
        let row = sqlx::query("SELECT * FROM config_revisions WHERE device_id = $1 AND request_id = $2 AND request_id <> ''")
            .bind(device.0)
            .bind(text(request_id))
            .fetch_optional(&mut self.connection)
            .await?;
        row.as_ref().map(revision_row).transpose()
    }

    pub async fn insert_config(&mut self, device: DeviceKey, row: &ConfigRevisionRow) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO config_revisions (device_id, revision, config, request_id, comment, create_time) VALUES ($1, $2, $3, $4, $5, $6)",
        )
        .bind(device.0)
        .bind(as_integer(row.revision))
        .bind(text(&row.config))
        .bind(text(&row.request_id))
        .bind(text(&row.comment))
        .bind(row.create_time.micros())
        .execute(&mut self.connection)
        .await?;
        sqlx::query(
            "INSERT INTO config_states (device_id, desired_revision) VALUES ($1, $2) \
             ON CONFLICT (device_id) DO UPDATE SET desired_revision = excluded.desired_revision",
        )
        .bind(device.0)
        .bind(as_integer(row.revision))
        .execute(&mut self.connection)
        .await?;
        self.notify(Change::Config(device)).await
    }

    pub async fn note_delivered(&mut self, device: DeviceKey, revision: u64, now: Timestamp) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE config_states SET delivered_revision = $2, delivered_time = $3 WHERE device_id = $1 AND delivered_revision < $2",
        )
        .bind(device.0)
        .bind(as_integer(revision))
        .bind(now.micros())
        .execute(&mut self.connection)
        .await?;
        self.changed(device, done.rows_affected() > 0).await
    }

    pub async fn note_report(&mut self, device: DeviceKey, report: &ConfigReportRow) -> Result<bool, StoreError> {
        let known = sqlx::query("SELECT 1 FROM config_revisions WHERE device_id = $1 AND revision = $2")
            .bind(device.0)
            .bind(as_integer(report.revision))
            .fetch_optional(&mut self.connection)
            .await?;
        let changed = known.is_some() && (self.note_applied(device, report).await? | self.note_last_report(device, report).await?);
        self.changed(device, changed).await
    }

    /// Notes what the device runs with after its report. Whether that changed.
    async fn note_applied(&mut self, device: DeviceKey, report: &ConfigReportRow) -> Result<bool, StoreError> {
        let statement = match report.outcome {
            ConfigOutcome::Applied => {
                "UPDATE config_states SET previous_applied_revision = applied_revision, applied_revision = $2 \
                 WHERE device_id = $1 AND applied_revision <> $2 AND reported_revision <= $2"
            }
            // What was refused or given up is not what it runs with, whatever it said before.
            ConfigOutcome::Rejected | ConfigOutcome::Reverted => {
                "UPDATE config_states SET applied_revision = previous_applied_revision, previous_applied_revision = 0 \
                 WHERE device_id = $1 AND applied_revision = $2"
            }
        };
        let query = sqlx::query(statement).bind(device.0).bind(as_integer(report.revision));
        Ok(query.execute(&mut self.connection).await?.rows_affected() > 0)
    }

    /// Notes the report as the device's last one. Whether it is.
    async fn note_last_report(&mut self, device: DeviceKey, report: &ConfigReportRow) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE config_states SET reported_revision = $2, reported_outcome = $3, reported_detail = $4, reported_time = $5 \
             WHERE device_id = $1 AND reported_revision <= $2 \
             AND (reported_revision <> $2 OR reported_outcome <> $3 OR reported_detail <> $4)",
        )
        .bind(device.0)
        .bind(as_integer(report.revision))
        .bind(report.outcome.code())
        .bind(text(&report.detail))
        .bind(report.time.micros())
        .execute(&mut self.connection)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    async fn changed(&mut self, device: DeviceKey, changed: bool) -> Result<bool, StoreError> {
        if changed {
            self.notify(Change::Config(device)).await?;
        }
        Ok(changed)
    }
}

impl PostgresStore {
    pub async fn config(&self, device: DeviceKey) -> Result<Option<(ConfigRevisionRow, ConfigStateRow)>, StoreError> {
        let row = sqlx::query(
            "SELECT * FROM config_states s JOIN config_revisions r ON r.device_id = s.device_id AND r.revision = s.desired_revision \
             WHERE s.device_id = $1",
        )
        .bind(device.0)
        .fetch_optional(self.readers())
        .await?;
        row.as_ref().map(|row| Ok((revision_row(row)?, state_row(row)?))).transpose()
    }

    pub async fn config_revisions(&self, device: DeviceKey, before: u64, rows_max: usize) -> Result<Vec<ConfigRevisionRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM config_revisions WHERE device_id = $1 AND revision < $2 ORDER BY revision DESC LIMIT $3")
            .bind(device.0)
            .bind(as_integer(before))
            .bind(rows_max as i64)
            .fetch_all(self.readers())
            .await?;
        rows.iter().map(revision_row).collect()
    }

    pub async fn unsettled_configs(&self, after: DeviceKey, rows_max: usize) -> Result<Vec<DeviceKey>, StoreError> {
        let rows = sqlx::query(
            "SELECT device_id FROM config_states WHERE device_id > $1 AND desired_revision <> reported_revision ORDER BY device_id LIMIT $2",
        )
        .bind(after.0)
        .bind(rows_max as i64)
        .fetch_all(self.readers())
        .await?;
        rows.iter().map(key_column).collect()
    }
}
