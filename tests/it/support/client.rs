//! A device and an operator, as a test needs them: on the generated stubs, without the comforts of the `client` module.

use bytes::Bytes;
use prost::Message;
use std::collections::BTreeMap;
use tidegate::client::Channel;
use tidegate::{
    model::{StreamId, columns::Values},
    pb::{
        self, config_service_client::ConfigServiceClient, device_link_service_client::DeviceLinkServiceClient,
        device_service_client::DeviceServiceClient, live_service_client::LiveServiceClient, reading_service_client::ReadingServiceClient,
        telemetry_service_client::TelemetryServiceClient,
    },
};
use tonic::Status;

/// A time that readings begin at: 2026-01-01T00:00:00Z.
pub const T0: i64 = 1_767_225_600_000_000;
/// A second in microseconds.
pub const SECOND: i64 = 1_000_000;

/// A column of one sensor.
pub fn column(sensor: &str, unit: &str, values: Values) -> pb::Column {
    pb::Column { sensor: sensor.into(), unit: unit.into(), values: Some(values.into()) }
}

/// A frame of rows a second apart.
pub fn frame(begin: i64, columns: Vec<pb::Column>) -> pb::Frame {
    let rows = match columns.first().and_then(|column| column.values.clone()) {
        Some(values) => Values::from(values).len(),
        None => 1,
    };
    pb::Frame { base_time_us: begin, time_deltas_us: vec![SECOND; rows.saturating_sub(1)], columns, ..Default::default() }
}

/// An encoded batch.
pub fn encode(frames: Vec<pb::Frame>) -> Bytes {
    pb::Batch { frames }.encode_to_vec().into()
}

/// A batch of one sensor `t` in °C: a value a second.
pub fn temperatures(begin: i64, values: &[f64]) -> Bytes {
    encode(vec![frame(begin, vec![column("t", "Cel", Values::Double(values.to_vec()))])])
}

/// The batch that a device sends as its `sequence`th: ten temperatures that no other sequence has.
pub fn nth_batch(sequence: u64) -> Bytes {
    let first = i64::try_from(sequence).expect("small") * 10;
    let values: Vec<f64> = (0..10).map(|row| (first + row) as f64 / 10.0).collect();
    temperatures(T0 + first * SECOND, &values)
}

/// A device with one stream.
#[derive(Clone)]
pub struct TestDevice {
    pub id: String,
    pub stream_id: StreamId,
    pub channel: Channel,
}

impl TestDevice {
    pub fn new(channel: &Channel, id: &str) -> Self {
        Self { id: id.into(), stream_id: StreamId::new(), channel: channel.clone() }
    }

    /// The same device on another connection.
    pub fn on(&self, channel: &Channel) -> Self {
        Self { channel: channel.clone(), ..self.clone() }
    }

    pub fn request(&self, sequence: u64, batch: Bytes) -> pb::UploadRequest {
        let stream_id = self.stream_id.as_bytes().to_vec().into();
        pb::UploadRequest { device: self.id.clone(), stream_id, sequence, batch, lost_batches: 0, lost_readings: 0 }
    }

    /// Uploads numbered batches in one call.
    pub async fn upload(&self, batches: impl IntoIterator<Item = (u64, Bytes)>) -> Result<pb::UploadResponse, Status> {
        self.upload_requests(batches.into_iter().map(|(sequence, batch)| self.request(sequence, batch)).collect()).await
    }

    pub async fn upload_requests(&self, requests: Vec<pb::UploadRequest>) -> Result<pb::UploadResponse, Status> {
        let mut client = TelemetryServiceClient::new(self.channel.clone());
        Ok(client.upload(tokio_stream::iter(requests)).await?.into_inner())
    }

    /// Uploads the [`nth_batch`]es of `sequences`.
    pub async fn upload_nth(&self, sequences: impl IntoIterator<Item = u64>) -> Result<pb::UploadResponse, Status> {
        self.upload(sequences.into_iter().map(|sequence| (sequence, nth_batch(sequence)))).await
    }

    pub async fn position(&self) -> u64 {
        let mut client = TelemetryServiceClient::new(self.channel.clone());
        let request = pb::GetUploadPositionRequest { device: self.id.clone(), stream_id: self.stream_id.as_bytes().to_vec().into() };
        client.get_upload_position(request).await.expect("answered").into_inner().last_durable_sequence
    }

    /// All stored readings, by sensor: times and values.
    pub async fn stored(&self) -> BTreeMap<String, (Vec<i64>, Values)> {
        query(&self.channel, pb::QueryReadingsRequest { device: self.id.clone(), ..Default::default() }).await.expect("answered")
    }

    /// The stored temperatures.
    pub async fn stored_temperatures(&self) -> Vec<(i64, f64)> {
        match self.stored().await.remove("t") {
            Some((times, Values::Double(values))) => times.into_iter().zip(values).collect(),
            Some(other) => panic!("not temperatures: {other:?}"),
            None => vec![],
        }
    }

    pub async fn ledger(&self) -> pb::Ledger {
        let request = pb::GetLedgerRequest { device: self.id.clone() };
        devices(&self.channel).get_ledger(request).await.expect("answered").into_inner().ledger.expect("set")
    }
}

/// The temperatures of the [`nth_batch`]es.
pub fn nth_temperatures(sequences: impl IntoIterator<Item = u64>) -> Vec<(i64, f64)> {
    let rows = sequences.into_iter().flat_map(|sequence| (0..10).map(move |row| i64::try_from(sequence).expect("small") * 10 + row));
    rows.map(|row| (T0 + row * SECOND, row as f64 / 10.0)).collect()
}

/// Reads an answer whole, and checks that it says it is.
pub async fn query(channel: &Channel, request: pb::QueryReadingsRequest) -> Result<BTreeMap<String, (Vec<i64>, Values)>, Status> {
    use pb::query_readings_response::Message;
    let mut answer = ReadingServiceClient::new(channel.clone()).query_readings(request).await?.into_inner();
    let mut found: BTreeMap<String, (Vec<i64>, Values)> = BTreeMap::new();
    let mut summary = None;
    while let Some(response) = answer.message().await? {
        match response.message.expect("set") {
            Message::Readings(column) => {
                let values: Values = column.values.expect("set").into();
                let times = tidegate::model::columns::times_from_deltas(column.base_time_us, &column.time_deltas_us).expect("times");
                let entry = found.entry(column.sensor).or_insert_with(|| (vec![], Values::new(values.kind())));
                entry.0.extend(times);
                assert!(entry.1.append(values), "one kind a sensor");
            }
            Message::Buckets(_) => panic!("not asked for"),
            Message::Summary(end) => summary = Some(end.readings),
        }
    }
    let count: usize = found.values().map(|(times, _)| times.len()).sum();
    assert_eq!(summary, Some(count as u64), "the summary counts what was sent");
    Ok(found)
}

pub fn devices(channel: &Channel) -> DeviceServiceClient<Channel> {
    DeviceServiceClient::new(channel.clone())
}

pub fn live(channel: &Channel) -> LiveServiceClient<Channel> {
    LiveServiceClient::new(channel.clone())
}

pub fn configs(channel: &Channel) -> ConfigServiceClient<Channel> {
    ConfigServiceClient::new(channel.clone())
}

pub fn links(channel: &Channel) -> DeviceLinkServiceClient<Channel> {
    DeviceLinkServiceClient::new(channel.clone())
}
