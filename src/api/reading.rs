//! `ReadingService`: what is stored, read back.

use super::{ResponseStream, export::export, parse};
use crate::{
    auth::Caller,
    error::{Error, Violations},
    fleet::Registry,
    history::{Answer, Bucket, Exporter, Piece, Query, Reader, Series},
    middleware::Draining,
    model::{
        DeviceId, Timestamp, ValueKind,
        columns::{Values, deltas_from_times},
    },
    pb::{self, query_readings_response::Message, reading_service_server::ReadingService},
    store::SensorRow,
};
use futures_util::{StreamExt, stream};
use std::{collections::VecDeque, time::Duration};
use tonic::{Request, Response, Status};

/// How many readings or spans one message holds at the most.
const ROWS_PER_MESSAGE: usize = 8_192;
const BUCKET_RANGE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(366 * 24 * 3600));

/// See the module.
pub struct ReadingApi {
    /// The devices.
    pub registry: Registry,
    /// Who answers.
    pub reader: Reader,
    /// Who exports.
    pub exporter: Exporter,
}

#[tonic::async_trait]
impl ReadingService for ReadingApi {
    type QueryReadingsStream = ResponseStream<pb::QueryReadingsResponse>;

    async fn query_readings(&self, request: Request<pb::QueryReadingsRequest>) -> Result<Response<Self::QueryReadingsStream>, Status> {
        let caller = Caller::of(request.extensions());
        let (device, query) = parse(request.into_inner())?;
        let device = caller.device(&self.registry, &device).await?;
        let answer = self.reader.read(&device, query).await?;
        // Read and encoded piece by piece, as the client takes them.
        let messages = stream::try_unfold(Some((answer, VecDeque::new())), next_message);
        Ok(Response::new(messages.boxed()))
    }

    type ExportReadingsStream = ResponseStream<pb::ExportReadingsResponse>;

    async fn export_readings(&self, request: Request<pb::ExportReadingsRequest>) -> Result<Response<Self::ExportReadingsStream>, Status> {
        let (caller, drain) = (Caller::of(request.extensions()), Draining::of(request.extensions()));
        Ok(Response::new(export(self, &caller, drain, request.into_inner()).await?))
    }
}

/// An answer, and the messages that its last piece came to; `None` when the summary was sent.
type State = Option<(Answer, VecDeque<Message>)>;

async fn next_message(state: State) -> Result<Option<(pb::QueryReadingsResponse, State)>, Status> {
    let Some((mut answer, mut waiting)) = state else { return Ok(None) };
    if waiting.is_empty()
        && let Some(piece) = answer.next().await?
    {
        waiting = match piece {
            Piece::Readings(sensor, readings) => reading_messages(&sensor, &readings),
            Piece::Buckets(sensor, buckets) => buckets.chunks(ROWS_PER_MESSAGE).map(|buckets| bucket_message(&sensor, buckets)).collect(),
        };
    }
    let (message, state) = match waiting.pop_front() {
        Some(message) => (message, Some((answer, waiting))),
        None => (Message::Summary(pb::QuerySummary { readings: answer.readings() }), None),
    };
    Ok(Some((pb::QueryReadingsResponse { message: Some(message) }, state)))
}

fn parse(request: pb::QueryReadingsRequest) -> Result<(DeviceId, Query), Error> {
    let mut violations = Violations::new();
    let device = violations.check("device", DeviceId::parse(&request.device));
    parse::check_count(&mut violations, "sensors", request.sensors.len());
    let start_time = parse::time(&mut violations, "start_time", request.start_time.as_ref()).unwrap_or(Timestamp::MIN);
    let end_time = parse::time(&mut violations, "end_time", request.end_time.as_ref());
    if end_time.is_some_and(|end| end < start_time) {
        violations.add("end_time", "it is before start_time");
    }
    let bucket = parse::duration(&mut violations, "bucket", request.bucket.as_ref(), BUCKET_RANGE);
    violations.into_result()?;
    let query = Query { sensors: request.sensors.into_iter().collect(), start_time, end_time, bucket };
    Ok((device.ok_or(Error::Internal)?, query))
}

pub(super) fn reading_messages(sensor: &SensorRow, readings: &Series) -> VecDeque<Message> {
    let mut messages = VecDeque::new();
    let mut begin = 0;
    while begin < readings.len() {
        let end = piece_end(&readings.values, begin);
        let (base_time_us, time_deltas_us) = deltas_from_times(&readings.times[begin..end]);
        let values = Some(readings.values.slice(begin..end).into());
        let (name, unit) = (sensor.name.clone(), sensor.unit.clone());
        let clock_corrections_us = readings.corrections(begin..end);
        let column = pb::ReadingColumn { sensor: name, unit, base_time_us, time_deltas_us, values, clock_corrections_us };
        messages.push_back(Message::Readings(column));
        begin = end;
    }
    messages
}

fn bucket_message(sensor: &SensorRow, buckets: &[Bucket]) -> Message {
    let numbers = |of: fn(&Bucket) -> f64| match sensor.kind {
        ValueKind::Text => Vec::new(),
        _ => buckets.iter().map(of).collect(),
    };
    Message::Buckets(pb::BucketColumn {
        sensor: sensor.name.clone(),
        unit: sensor.unit.clone(),
        kind: sensor.kind.code(),
        start_times_us: buckets.iter().map(|bucket| bucket.start).collect(),
        counts: buckets.iter().map(|bucket| bucket.count).collect(),
        minimums: numbers(|bucket| bucket.minimum),
        maximums: numbers(|bucket| bucket.maximum),
        averages: numbers(Bucket::average),
        firsts: numbers(|bucket| bucket.first),
        lasts: numbers(|bucket| bucket.last),
    })
}

/// Where the piece of `values` that begins at `begin` ends; where it begins only when nothing is left.
fn piece_end(values: &Values, begin: usize) -> usize {
    let end = values.len().min(begin + ROWS_PER_MESSAGE);
    let Values::Text(texts) = values else { return end };
    let mut bytes = 0;
    let fit = texts[begin..end].iter().take_while(|text| {
        let fits = bytes < pb::MESSAGE_BYTES;
        bytes += text.len();
        fits
    });
    begin + fit.count()
}
