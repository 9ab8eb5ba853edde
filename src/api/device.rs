//! `DeviceService`: the registry and the ledger.

use super::parse;
use crate::{
    auth::{Authenticator, Caller},
    error::{Error, Failure, Violations},
    fleet::{Device, Missing, MissingCause, Registry},
    live::Latest,
    model::{
        DeviceId, Labels, StreamId, Timestamp, ValueKind,
        batch::{check_sensor_name, reason_from_name},
        time::duration_to_proto,
        units,
    },
    pb::{self, device_service_server::DeviceService},
    store::{Count, DeviceRow, SensorRow, Store, StoreError},
};
use prost::Message;
use std::{sync::Arc, time::Duration};
use tokio::sync::Notify;
use tonic::{Request, Response, Status};

const DISPLAY_NAME_BYTES_MAX: usize = 255;
const PAGE_SIZE_DEFAULT: usize = 100;
const PAGE_SIZE_MAX: usize = 1_000;

/// See the module.
pub struct DeviceApi {
    /// The devices.
    pub registry: Registry,
    /// Their ledgers.
    pub store: Store,
    /// Forgets deleted devices.
    pub latest: Arc<Latest>,
    /// Wakes who deletes what deleted devices left.
    pub purge: Arc<Notify>,
    /// Learns that the credentials of deleted devices are void.
    pub auth: Authenticator,
    /// How many sensors a device may have.
    pub sensors_max: usize,
    /// How long nothing may be heard of a device before it is silent.
    pub silent_after: Duration,
}

#[tonic::async_trait]
impl DeviceService for DeviceApi {
    async fn create_device(&self, request: Request<pb::CreateDeviceRequest>) -> Result<Response<pb::CreateDeviceResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let device = request.into_inner().device.unwrap_or_default();
        caller.about(parse::resource(&device.id));
        let mut violations = Violations::new();
        let id = violations.check("device.id", DeviceId::parse(&device.id));
        let labels = violations.check_all(Labels::parse("device.labels", device.labels)).unwrap_or_default();
        check_display_name(&mut violations, &device.display_name);
        violations.into_result()?;
        caller.may_label(&labels)?;
        let id = id.ok_or(Error::Internal)?;
        let created = match self.registry.create(&id, labels, &device.display_name).await {
            // Whether it is one that the caller may see.
            Err(failure @ Failure::Refused(Error::DeviceExists(_))) => {
                caller.device(&self.registry, &id).await?;
                Err(failure)
            }
            created => created,
        }?;
        Ok(Response::new(pb::CreateDeviceResponse { device: Some(encode_device(created.row(), Some(&created), None)) }))
    }

    async fn get_device(&self, request: Request<pb::GetDeviceRequest>) -> Result<Response<pb::GetDeviceResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let device = self.find(&caller, &request.into_inner().device).await?;
        let last_receive_time = self.store.last_receive_time(device.key).await.map_err(Failure::from)?;
        Ok(Response::new(pb::GetDeviceResponse { device: Some(encode_device(device.row(), Some(&device), last_receive_time)) }))
    }

    async fn list_devices(&self, request: Request<pb::ListDevicesRequest>) -> Result<Response<pb::ListDevicesResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let request = request.into_inner();
        let mut violations = Violations::new();
        let selector = parse::selector(&mut violations, &request.label_selector).and(caller.scope());
        let page_size = parse::page_size(&mut violations, request.page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX);
        let after = parse::page_token(&mut violations, &request.page_token);
        violations.into_result()?;
        let (rows, mut more) = self.registry.list(&selector, &after, page_size).await.map_err(Failure::from)?;
        let (mut devices, mut bytes) = (Vec::with_capacity(rows.len()), 0);
        // Where the next page begins: behind the last that was looked at, also when it is not listed.
        let mut last = None;
        let silent_since = Timestamp::now().saturating_sub(self.silent_after);
        for row in rows {
            if bytes >= pb::MESSAGE_BYTES {
                more = true;
                break;
            }
            let last_receive_time = self.store.last_receive_time(row.key).await.map_err(Failure::from)?;
            let loaded = self.registry.loaded(row.key);
            last = Some(row.id.clone());
            if request.silent && last_seen(loaded.as_deref(), last_receive_time).unwrap_or(row.create_time) >= silent_since {
                continue;
            }
            let device = encode_device(row, loaded.as_deref(), last_receive_time);
            bytes += device.encoded_len();
            devices.push(device);
        }
        let next_page_token = last.filter(|_| more).map(|id| parse::next_page_token(id.as_str())).unwrap_or_default();
        Ok(Response::new(pb::ListDevicesResponse { devices, next_page_token }))
    }

    async fn update_device(&self, request: Request<pb::UpdateDeviceRequest>) -> Result<Response<pb::UpdateDeviceResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let pb::UpdateDeviceRequest { device, update_mask } = request.into_inner();
        let new = device.unwrap_or_default();
        caller.about(parse::resource(&new.id));
        let mut violations = Violations::new();
        let id = violations.check("device.id", DeviceId::parse(&new.id));
        let etag = parse_etag(&mut violations, "device.etag", &new.etag);
        let paths = update_mask.map_or_else(|| vec!["labels".to_owned(), "display_name".to_owned()], |mask| mask.paths);
        let (mut labels, mut display_name) = (None, None);
        for path in &paths {
            match path.as_str() {
                "labels" => labels = violations.check_all(Labels::parse("device.labels", new.labels.clone())),
                "display_name" => {
                    check_display_name(&mut violations, &new.display_name);
                    display_name = Some(new.display_name.clone());
                }
                _ => violations.add("update_mask", format!("{path:?} can't be updated: labels and display_name can")),
            }
        }
        violations.into_result()?;
        let device = caller.device(&self.registry, &id.ok_or(Error::Internal)?).await?;
        // A device is not moved out of the scope of who moves it.
        labels.iter().try_for_each(|labels| caller.may_label(labels))?;
        let updated = self.registry.update(&device, etag, move |row| {
            row.labels = labels.unwrap_or_else(|| row.labels.clone());
            row.display_name = display_name.unwrap_or_else(|| row.display_name.clone());
        });
        let row = updated.await?;
        let last_receive_time = self.store.last_receive_time(device.key).await.map_err(Failure::from)?;
        Ok(Response::new(pb::UpdateDeviceResponse { device: Some(encode_device(row, Some(&device), last_receive_time)) }))
    }

    async fn delete_device(&self, request: Request<pb::DeleteDeviceRequest>) -> Result<Response<pb::DeleteDeviceResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let request = request.into_inner();
        caller.about(parse::resource(&request.device));
        let mut violations = Violations::new();
        let etag = parse_etag(&mut violations, "etag", &request.etag);
        violations.into_result()?;
        let device = self.find(&caller, &request.device).await?;
        let (latest, purge, gone) = (self.latest.clone(), self.purge.clone(), device.clone());
        let forget = move || {
            latest.forget(gone.key);
            purge.notify_one();
            tracing::info!(device = %gone.id, "device.deleted");
        };
        self.registry.delete(&device, etag, forget).await?;
        self.auth.catch_up().await.map_err(Failure::from)?;
        Ok(Response::new(pb::DeleteDeviceResponse {}))
    }

    async fn list_sensors(&self, request: Request<pb::ListSensorsRequest>) -> Result<Response<pb::ListSensorsResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let device = self.find(&caller, &request.into_inner().device).await?;
        let rows = self.store.sensors(device.key).await.map_err(Failure::from)?;
        Ok(Response::new(pb::ListSensorsResponse { sensors: rows.into_iter().map(encode_sensor).collect() }))
    }

    async fn update_sensor(&self, request: Request<pb::UpdateSensorRequest>) -> Result<Response<pb::UpdateSensorResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let request = request.into_inner();
        caller.about(parse::resource(&request.device));
        let device = self.find(&caller, &request.device).await?;
        let new = request.sensor.unwrap_or_default();
        let mut violations = Violations::new();
        violations.check("sensor.name", check_sensor_name(&new.name));
        let known = device.sensor(&new.name);
        let kind = match &known {
            Some(sensor) => Some(sensor.kind),
            None if !request.allow_missing => {
                violations.into_result()?;
                return Err(Error::SensorNotFound { device: device.id.clone(), sensor: new.name }.into());
            }
            None => violations.check("sensor.kind", ValueKind::from_code(new.kind).ok_or_else(|| format!("{} is not a kind", new.kind))),
        };
        if known.is_none() && device.sensors_len() >= self.sensors_max {
            violations
                .add("sensor.name", format!("the device has {} sensors: no more are allowed (devices.sensors_max)", device.sensors_len()));
        }
        if new.allow_non_finite && kind.is_some_and(|kind| kind != ValueKind::Double) {
            violations.add("sensor.allow_non_finite", "only a sensor of kind DOUBLE can have NaN and infinities");
        }
        violations.into_result()?;
        let row = SensorRow {
            key: 0,
            name: new.name,
            unit: known.map_or_else(String::new, |sensor| sensor.unit),
            kind: kind.ok_or(Error::Internal)?,
            allow_non_finite: new.allow_non_finite,
            create_time: Timestamp::now(),
        };
        let saved = self.registry.save_sensor(&device, row).await?;
        Ok(Response::new(pb::UpdateSensorResponse { sensor: Some(encode_sensor(saved)) }))
    }

    async fn get_ledger(&self, request: Request<pb::GetLedgerRequest>) -> Result<Response<pb::GetLedgerResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let device = self.find(&caller, &request.into_inner().device).await?;
        let row = self.store.ledger(device.key).await.map_err(Failure::from)?;
        let rejected = row.rejected.into_iter().map(|(reason, count)| pb::RejectedCount {
            reason: reason_from_name(&reason).unwrap_or_default() as i32,
            batches: count.batches,
            readings: count.readings,
        });
        let missing = self.missing(&device, &row.streams).await.map_err(Failure::from)?;
        let lost_known = missing.iter().filter(|missing| missing.cause == MissingCause::Lost).map(Missing::batches);
        let missing_truncated = lost_known.fold(0, u64::saturating_add) < row.lost.batches;
        let streams = row.streams.into_iter().map(|(stream_id, last_durable_sequence, time)| pb::StreamPosition {
            stream_id: stream_id.as_bytes().to_vec().into(),
            last_durable_sequence,
            last_receive_time: Some(time.to_proto()),
        });
        let ledger = pb::Ledger {
            device: device.id.to_string(),
            stored: Some(encode_count(row.stored)),
            duplicate: Some(encode_count(row.duplicate)),
            rejected: rejected.collect(),
            lost: Some(encode_count(row.lost)),
            streams: streams.collect(),
            pending: Some(encode_count(device.account.pending())),
            missing: missing.into_iter().map(encode_missing).collect(),
            missing_truncated,
        };
        Ok(Response::new(pb::GetLedgerResponse { ledger: Some(ledger) }))
    }
}

impl DeviceApi {
    async fn find(&self, caller: &Caller, id: &str) -> Result<Arc<Device>, Failure> {
        caller.device(&self.registry, &parse::device(id)?).await
    }

    /// What this gateway knows to be missing of a device. `streams` are those whose place is known already.
    async fn missing(&self, device: &Device, streams: &[(StreamId, u64, Timestamp)]) -> Result<Vec<Missing>, StoreError> {
        let mut missing = Vec::new();
        for seen in device.account.missing() {
            if seen.cause == MissingCause::Lost {
                missing.push(seen);
                continue;
            }
            let last_durable = match streams.iter().find(|(id, ..)| *id == seen.stream_id) {
                Some((_, last_sequence, _)) => *last_sequence,
                None => self.store.last_sequence(device.key, seen.stream_id).await?,
            };
            missing.extend(seen.behind(last_durable));
        }
        Ok(missing)
    }
}

fn check_display_name(violations: &mut Violations, name: &str) {
    if name.len() > DISPLAY_NAME_BYTES_MAX {
        violations.add("device.display_name", format!("{} bytes: at most {DISPLAY_NAME_BYTES_MAX} are allowed", name.len()));
    }
}

/// The revision that a device's etag stands for; `None` without an etag. One that was never given out matches no revision.
fn parse_etag(violations: &mut Violations, field: &str, etag: &str) -> Option<i64> {
    if etag.is_empty() {
        return None;
    }
    violations.check(field, etag.parse().map_err(|_| "this is not an etag that the gateway gave".to_owned()))
}

/// When the device was last heard of, as far as this gateway and the store know.
fn last_seen(loaded: Option<&Device>, last_receive_time: Option<Timestamp>) -> Option<Timestamp> {
    loaded.and_then(Device::last_seen).max(last_receive_time)
}

/// `loaded` is what this gateway knows of the device besides what is stored.
fn encode_device(row: DeviceRow, loaded: Option<&Device>, last_receive_time: Option<Timestamp>) -> pb::Device {
    let clock = loaded.and_then(|device| device.clock.offset());
    let correction = loaded.map(|device| device.clock.correction()).filter(|micros| *micros != 0).map(duration_to_proto);
    pb::Device {
        id: row.id.to_string(),
        labels: row.labels.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        display_name: row.display_name,
        create_time: Some(row.create_time.to_proto()),
        update_time: Some(row.update_time.to_proto()),
        last_receive_time: last_receive_time.map(Timestamp::to_proto),
        etag: row.revision.to_string(),
        last_seen_time: last_seen(loaded, last_receive_time).map(Timestamp::to_proto),
        clock_offset: clock.map(|clock| pb::ClockOffset {
            offset: Some(duration_to_proto(clock.micros)),
            uncertainty: clock.uncertainty_micros.map(duration_to_proto),
            measure_time: Some(clock.time.to_proto()),
            correction,
        }),
    }
}

fn encode_sensor(row: SensorRow) -> pb::Sensor {
    pb::Sensor {
        unit_registered: units::is_registered(&row.unit),
        name: row.name,
        unit: row.unit,
        kind: row.kind.code(),
        allow_non_finite: row.allow_non_finite,
        create_time: Some(row.create_time.to_proto()),
    }
}

fn encode_count(count: Count) -> pb::Tally {
    pb::Tally { batches: count.batches, readings: count.readings }
}

fn encode_missing(missing: Missing) -> pb::MissingRange {
    let cause = match missing.cause {
        MissingCause::Lost => pb::MissingCause::Lost,
        MissingCause::Awaited => pb::MissingCause::Awaited,
    };
    pb::MissingRange {
        stream_id: missing.stream_id.as_bytes().to_vec().into(),
        first_sequence: *missing.sequences.start(),
        last_sequence: *missing.sequences.end(),
        cause: cause.into(),
    }
}
