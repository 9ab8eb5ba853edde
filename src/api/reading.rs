//! `ReadingService`: what is stored, read back.

use super::{ResponseStream, parse};
use crate::{
    error::{Error, Violations},
    fleet::{Device, Registry},
    history::{Answer, Query, Reader, SensorReadings},
    model::{
        DeviceId, Timestamp,
        columns::{Values, deltas_from_times},
    },
    pb::{self, query_readings_response::Message, reading_service_server::ReadingService},
};
use futures_util::{StreamExt, stream};
use std::{sync::Arc, time::Duration};
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
}

#[tonic::async_trait]
impl ReadingService for ReadingApi {
    type QueryReadingsStream = ResponseStream<pb::QueryReadingsResponse>;

    async fn query_readings(&self, request: Request<pb::QueryReadingsRequest>) -> Result<Response<Self::QueryReadingsStream>, Status> {
        let (device, query, bucket) = parse(request.into_inner())?;
        let device = self.registry.get(&device).await?;
        let Answer { sensors, permit } = self.reader.read(&device, query).await?;
        let readings = sensors.values().map(|found| found.len() as u64).sum();
        // Encoded piece by piece, as the client takes them.
        let pieces = sensors.into_iter().flat_map(move |(name, found)| pieces(&device, name, found, bucket));
        let summary = std::iter::once(Message::Summary(pb::QuerySummary { readings }));
        let messages = stream::unfold((pieces.chain(summary), permit), |(mut messages, permit)| async {
            let message = messages.next()?;
            Some((Ok(pb::QueryReadingsResponse { message: Some(message) }), (messages, permit)))
        });
        Ok(Response::new(messages.boxed()))
    }
}

fn parse(request: pb::QueryReadingsRequest) -> Result<(DeviceId, Query, Option<Duration>), Error> {
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
    let query = Query { sensors: request.sensors.into_iter().collect(), start_time, end_time };
    Ok((device.ok_or(Error::Internal)?, query, bucket))
}

fn pieces(device: &Arc<Device>, name: String, found: SensorReadings, bucket: Option<Duration>) -> impl Iterator<Item = Message> + use<> {
    let unit = device.sensor(&name).map_or_else(String::new, |sensor| sensor.unit);
    let kind = found.values.kind();
    // Spans are few where readings are many, so one of the two is nothing here.
    let (buckets, found) = match bucket {
        Some(length) => (found.buckets(length), None),
        None => (Vec::new(), Some(found)),
    };
    let mut begin = 0;
    std::iter::from_fn(move || {
        let end = found.as_ref().map_or(buckets.len().min(begin + ROWS_PER_MESSAGE), |found| piece_end(&found.values, begin));
        let range = begin..end;
        if range.is_empty() {
            return None;
        }
        begin = end;
        let (sensor, unit) = (name.clone(), unit.clone());
        Some(match &found {
            Some(found) => {
                let (base_time_us, time_deltas_us) = deltas_from_times(&found.times[range.clone()]);
                let values = Some(found.values.slice(range).into());
                Message::Readings(pb::ReadingColumn { sensor, unit, base_time_us, time_deltas_us, values })
            }
            None => {
                let spans = &buckets[range];
                let numbers = |of: fn(&crate::history::Bucket) -> f64| match kind {
                    crate::model::ValueKind::Text => Vec::new(),
                    _ => spans.iter().map(of).collect(),
                };
                Message::Buckets(pb::BucketColumn {
                    sensor,
                    unit,
                    kind: kind.code(),
                    start_times_us: spans.iter().map(|span| span.start).collect(),
                    counts: spans.iter().map(|span| span.count).collect(),
                    minimums: numbers(|span| span.minimum),
                    maximums: numbers(|span| span.maximum),
                    averages: numbers(|span| span.average()),
                    firsts: numbers(|span| span.first),
                    lasts: numbers(|span| span.last),
                })
            }
        })
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
