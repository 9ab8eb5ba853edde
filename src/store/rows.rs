//! From a database's rows to the store's types: the same code for both databases, whose row types have no common one.

use super::NewLogRow;
use std::borrow::Cow;

/// The rows in parts of about `bytes_enough` of batches: each ends with the row that reaches them.
pub(super) fn log_parts(rows: &[NewLogRow], bytes_enough: usize) -> impl Iterator<Item = &[NewLogRow]> {
    let mut bytes = 0;
    rows.chunk_by(move |row, _| {
        bytes += row.batch.len();
        let goes_on = bytes < bytes_enough;
        if !goes_on {
            bytes = 0;
        }
        goes_on
    })
}

/// Text as PostgreSQL takes it: it knows no NUL.
pub(super) fn text(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { text.replace('\0', "\u{fffd}").into() } else { text.into() }
}

/// The functions that read rows of type `$row`.
macro_rules! row_readers {
    ($row:ty, $database:ty) => {
        use crate::{
            history::chunk::{Chunk, Encoding},
            model::{DeviceId, Labels, Position, StreamId, Timestamp, ValueKind},
            store::{
                AuditRow, ConfigOutcome, ConfigReportRow, ConfigRevisionRow, ConfigStateRow, Count, CredentialKind, CredentialRow,
                DeadLetterRow, DeviceKey, DeviceRow, LogRow, LogSize, OperatorKey, OperatorRow, SensorRow, StoreError,
            },
        };
        use bytes::Bytes;
        use futures_util::{Stream, TryStreamExt};
        use sqlx::Row;

        /// A column of a row; an error here means a damaged database, as the statements and tables are this program's.
        pub fn column<'r, T: sqlx::Decode<'r, $database> + sqlx::Type<$database>>(row: &'r $row, name: &str) -> Result<T, StoreError> {
            Ok(row.try_get(name)?)
        }

        pub fn time_column(row: &$row, name: &str) -> Result<Timestamp, StoreError> {
            let micros: i64 = column(row, name)?;
            Timestamp::from_micros(micros).ok_or_else(|| StoreError::Damaged(format!("{name} holds {micros}, which is not a time")))
        }

        pub fn count_column(row: &$row, name: &str) -> Result<u64, StoreError> {
            let count: i64 = column(row, name)?;
            u64::try_from(count).map_err(|_| StoreError::Damaged(format!("{name} holds {count}, which is not a count")))
        }

        pub fn key_column(row: &$row) -> Result<DeviceKey, StoreError> {
            Ok(DeviceKey(column(row, "device_id")?))
        }

        pub fn log_row(row: &$row) -> Result<LogRow, StoreError> {
            Ok(LogRow {
                position: Position(column(row, "position")?),
                device: key_column(row)?,
                receive_time: time_column(row, "receive_time")?,
                batches: count_column(row, "batches")?,
                batch: Bytes::from(column::<Vec<u8>>(row, "batch")?),
            })
        }

        pub fn dead_letter_row(row: &$row) -> Result<DeadLetterRow, StoreError> {
            Ok(DeadLetterRow {
                id: column(row, "rejection_id")?,
                stream_id: StreamId::parse(row.try_get("stream_id")?).map_err(StoreError::Damaged)?,
                sequence: count_column(row, "sequence")?,
                receive_time: time_column(row, "receive_time")?,
                reason: column(row, "reason")?,
                field: column(row, "field")?,
                message: column(row, "message")?,
                readings: count_column(row, "readings")?,
                size_bytes: count_column(row, "size_bytes")?,
                batch: Bytes::from(column::<Vec<u8>>(row, "batch")?),
            })
        }

        pub fn add_count(count: &mut Count, row: &$row, batches: &str, readings: &str) -> Result<(), StoreError> {
            // Devices say themselves how much they lost: the sum of it may be anything.
            count.batches = count.batches.saturating_add(count_column(row, batches)?);
            count.readings = count.readings.saturating_add(count_column(row, readings)?);
            Ok(())
        }

        pub fn device_row(row: &$row) -> Result<DeviceRow, StoreError> {
            let id: &str = row.try_get("id")?;
            let labels: &str = row.try_get("labels")?;
            Ok(DeviceRow {
                key: key_column(row)?,
                id: DeviceId::parse(id).map_err(StoreError::Damaged)?,
                labels: Labels::from_json(labels).map_err(|why| StoreError::Damaged(format!("the labels of device {id}: {why}")))?,
                display_name: column(row, "display_name")?,
                revision: column(row, "revision")?,
                create_time: time_column(row, "create_time")?,
                update_time: time_column(row, "update_time")?,
            })
        }

        pub fn operator_row(row: &$row) -> Result<OperatorRow, StoreError> {
            Ok(OperatorRow {
                key: OperatorKey(column(row, "operator_id")?),
                name: column(row, "name")?,
                role: column(row, "role")?,
                scope: column(row, "scope")?,
                create_time: time_column(row, "create_time")?,
                update_time: time_column(row, "update_time")?,
            })
        }

        pub fn credential_row(row: &$row) -> Result<CredentialRow, StoreError> {
            let (id, labels): (String, String) = (column(row, "id")?, column(row, "labels")?);
            let (kind, expire_micros): (i32, i64) = (column(row, "kind")?, column(row, "expire_time")?);
            let damaged = |what: &str| StoreError::Damaged(format!("the {what} of credential {id}"));
            Ok(CredentialRow {
                kind: CredentialKind::from_code(kind).ok_or_else(|| damaged("kind"))?,
                labels: Labels::from_json(&labels).map_err(|_| damaged("labels"))?,
                owner: column(row, "owner")?,
                secret_hash: column(row, "secret_hash")?,
                description: column(row, "description")?,
                uses: count_column(row, "uses")?,
                uses_max: count_column(row, "uses_max")?,
                create_time: time_column(row, "create_time")?,
                expire_time: if expire_micros == 0 { None } else { Some(time_column(row, "expire_time")?) },
                id,
            })
        }

        pub fn audit_row(row: &$row) -> Result<AuditRow, StoreError> {
            Ok(AuditRow {
                key: column(row, "entry_id")?,
                time: time_column(row, "time")?,
                actor: column(row, "actor")?,
                credential: column(row, "credential")?,
                method: column(row, "method")?,
                resource: column(row, "resource")?,
                outcome: column(row, "outcome")?,
                peer: column(row, "peer")?,
                request_id: column(row, "request_id")?,
            })
        }

        pub fn sensor_row(row: &$row) -> Result<SensorRow, StoreError> {
            let kind: i32 = column(row, "kind")?;
            Ok(SensorRow {
                key: column(row, "sensor_id")?,
                name: column(row, "name")?,
                unit: column(row, "unit")?,
                kind: ValueKind::from_code(kind).ok_or_else(|| StoreError::Damaged(format!("{kind} is not a value kind")))?,
                allow_non_finite: column(row, "allow_non_finite")?,
                create_time: time_column(row, "create_time")?,
            })
        }

        pub fn revision_row(row: &$row) -> Result<ConfigRevisionRow, StoreError> {
            Ok(ConfigRevisionRow {
                revision: count_column(row, "revision")?,
                config: column(row, "config")?,
                request_id: column(row, "request_id")?,
                comment: column(row, "comment")?,
                create_time: time_column(row, "create_time")?,
            })
        }

        pub fn state_row(row: &$row) -> Result<ConfigStateRow, StoreError> {
            let delivered = count_column(row, "delivered_revision")?;
            let outcome: i32 = column(row, "reported_outcome")?;
            let reported = match ConfigOutcome::from_code(outcome) {
                None => None,
                Some(outcome) => Some(ConfigReportRow {
                    revision: count_column(row, "reported_revision")?,
                    outcome,
                    detail: column(row, "reported_detail")?,
                    time: time_column(row, "reported_time")?,
                }),
            };
            Ok(ConfigStateRow {
                desired_revision: count_column(row, "desired_revision")?,
                delivered: if delivered == 0 { None } else { Some((delivered, time_column(row, "delivered_time")?)) },
                reported,
                applied_revision: count_column(row, "applied_revision")?,
            })
        }

        /// Takes rows until they have `bytes_max`, or there are no more.
        pub async fn log_page(
            mut found: impl Stream<Item = Result<$row, sqlx::Error>> + Unpin,
            bytes_max: usize,
        ) -> Result<Vec<LogRow>, StoreError> {
            let (mut rows, mut bytes) = (Vec::new(), 0);
            while bytes < bytes_max
                && let Some(row) = found.try_next().await?
            {
                let row = log_row(&row)?;
                bytes += row.batch.len();
                rows.push(row);
            }
            Ok(rows)
        }

        pub fn log_size(row: &$row) -> Result<LogSize, StoreError> {
            let (position, receive_time) = (Position(column(row, "position")?), time_column(row, "receive_time")?);
            Ok(LogSize { position, receive_time, bytes: column::<i64>(row, "bytes")?.unsigned_abs() as usize })
        }

        pub fn chunk(row: &$row) -> Result<Chunk, StoreError> {
            let encoding: &str = row.try_get("encoding")?;
            Ok(Chunk {
                first_time: column(row, "first_time")?,
                last_time: column(row, "last_time")?,
                readings: count_column(row, "readings")? as usize,
                time_base: column(row, "time_base")?,
                time_step: column(row, "time_step")?,
                time_unit: column(row, "time_unit")?,
                time_factor: column(row, "time_factor")?,
                encoding: Encoding::parse(encoding).ok_or_else(|| StoreError::Damaged(format!("{encoding} is no encoding of chunks")))?,
                value_base: column(row, "value_base")?,
                value_divisor: column(row, "value_divisor")?,
                points: column(row, "points")?,
                clock_corrections: column(row, "clock_corrections")?,
            })
        }
    };
}

pub(super) use row_readers;

/// A count as the databases keep it. Sequences and counts are checked to be below 2^63 where they come in.
pub(super) fn as_integer(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::log_parts;
    use crate::{
        model::{BatchSummary, Timestamp},
        store::{DeviceKey, NewLogRow},
    };

    #[test]
    fn parts_have_all_rows_in_order_and_end_with_the_one_that_fills_them() {
        let now = Timestamp::now();
        let summary = BatchSummary { readings: 1, first_time: now, last_time: now };
        let row = |bytes: usize| NewLogRow {
            device: DeviceKey(1),
            stream_key: 1,
            batches: 1,
            last_sequence: 1,
            receive_time: now,
            summary,
            batch: vec![0; bytes].into(),
        };
        let sizes = |sizes: &[usize]| {
            let rows: Vec<NewLogRow> = sizes.iter().map(|&bytes| row(bytes)).collect();
            log_parts(&rows, 10).map(|part| part.iter().map(|row| row.batch.len()).collect()).collect::<Vec<Vec<usize>>>()
        };
        assert!(sizes(&[]).is_empty());
        assert_eq!(sizes(&[4, 4, 4, 1, 20, 9, 1, 5]), [vec![4, 4, 4], vec![1, 20], vec![9, 1], vec![5]]);
    }
}
