//! `ReadingService.ExportReadings`: a long answer, with how far it has come between the data.

use super::{ReadingApi, ResponseStream, driven::Outbound, driven::driven, parse, reading::reading_messages};
use crate::{
    auth::Caller,
    error::{Error, Violations},
    history::{Export, Part, Place, Selection, Span, Standing},
    model::{DeviceId, Timestamp, batch::check_sensor_name},
    pb::{self, export_readings_response::Message, query_readings_response},
};
use futures_util::{FutureExt, StreamExt};
use prost::Message as _;
use std::{pin::pin, time::Duration};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;
use tonic::Status;

const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Messages that may be ready before the client takes them.
const MESSAGES_AHEAD: usize = 1;
/// Where the resume tokens of this version begin.
const TOKEN_PREFIX: &str = "x1";

/// Begins an export. The work on it is part of the answer, and stands still while the client does not read.
pub async fn export(
    api: &ReadingApi,
    caller: &Caller,
    drain: CancellationToken,
    mut request: pb::ExportReadingsRequest,
) -> Result<ResponseStream<pb::ExportReadingsResponse>, Status> {
    let token = std::mem::take(&mut request.resume_token);
    let ticket = Ticket::of(&request);
    caller.about(subject(&request));
    let (mut selection, from) = parse(request, &ticket, &token)?;
    selection.labels = selection.labels.and(caller.scope());
    if !caller.scope().is_empty() {
        for device in &selection.devices {
            caller.device(&api.registry, device).await?;
        }
    }
    let readings = from.as_ref().map_or(0, |place| place.readings);
    let export = api.exporter.begin(selection, from).await?;
    let work = move |outbound| async move {
        let sender = Sender::new(ticket, readings, outbound);
        tokio::select! {
            done = sender.send_all(export) => done,
            () = drain.cancelled() => Err(Error::Draining.into()),
        }
    };
    Ok(driven(MESSAGES_AHEAD, work).boxed())
}

/// What is exported, for the audit log.
fn subject(request: &pb::ExportReadingsRequest) -> String {
    match request.devices.as_slice() {
        [] => format!("devices?{}", request.label_selector),
        [one] => format!("devices/{one}"),
        [one, others @ ..] => format!("devices/{one} and {} more", others.len()),
    }
}

fn parse(request: pb::ExportReadingsRequest, ticket: &Ticket, token: &str) -> Result<(Selection, Option<Place>), Error> {
    let mut violations = Violations::new();
    let devices = parse::devices(&mut violations, "devices", &request.devices);
    let labels = parse::selector(&mut violations, &request.label_selector);
    parse::check_count(&mut violations, "sensors", request.sensors.len());
    for (index, sensor) in request.sensors.iter().enumerate() {
        violations.check(&format!("sensors[{index}]"), check_sensor_name(sensor));
    }
    let start = parse::time(&mut violations, "start_time", request.start_time.as_ref()).unwrap_or(Timestamp::MIN);
    let end = parse::time(&mut violations, "end_time", request.end_time.as_ref());
    if end.is_some_and(|end| end < start) {
        violations.add("end_time", "it is before start_time");
    }
    let from = if token.is_empty() { None } else { violations.check("resume_token", ticket.place(token)) };
    violations.into_result()?;
    Ok((Selection { devices, labels, sensors: request.sensors.into_iter().collect(), span: Span { start, end } }, from))
}

/// What the tokens of one export have in common: a fingerprint of what is exported. With a token of another one a client would
/// get a whole that fits nothing.
pub(crate) struct Ticket(String);

impl Ticket {
    /// Of a request without its token.
    pub(crate) fn of(request: &pb::ExportReadingsRequest) -> Self {
        Self(blake3::hash(&request.encode_to_vec()).to_hex()[..16].to_owned())
    }

    /// What its tokens have in common.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn fingerprint(&self) -> &str {
        &self.0
    }

    pub(crate) fn token(&self, place: &Place) -> String {
        let Place { device, span: Span { start, end }, sensor, time, readings } = place;
        let end = end.map(|end| end.micros().to_string()).unwrap_or_default();
        // The sensor last: its name may hold anything.
        format!("{TOKEN_PREFIX}/{}/{readings}/{}/{end}/{}/{device}/{sensor}", self.0, start.micros(), time.micros())
    }

    pub(crate) fn place(&self, token: &str) -> Result<Place, String> {
        let no_token = || "this is not a resume_token that the gateway gave".to_owned();
        let mut parts = token.splitn(8, '/');
        let mut part = || parts.next().ok_or_else(no_token);
        let time = |text: &str| text.parse().ok().and_then(Timestamp::from_micros).ok_or_else(no_token);
        if part()? != TOKEN_PREFIX {
            return Err(no_token());
        }
        if part()? != self.0 {
            return Err("the token is of an export of something else: the other fields must be as they were".to_owned());
        }
        let readings = part()?.parse().map_err(|_| no_token())?;
        let start = time(part()?)?;
        let end = match part()? {
            "" => None,
            end => Some(time(end)?),
        };
        let time = time(part()?)?;
        let device = DeviceId::parse(part()?).map_err(|_| no_token())?;
        Ok(Place { device, span: Span { start, end }, sensor: part()?.to_owned(), time, readings })
    }
}

/// What sends an export, and tells how far it has come.
struct Sender {
    ticket: Ticket,
    outbound: Outbound<pb::ExportReadingsResponse>,
    readings: u64,
    readings_before: u64,
    begin: Instant,
    ticks: Interval,
}

impl Sender {
    fn new(ticket: Ticket, readings: u64, outbound: Outbound<pb::ExportReadingsResponse>) -> Self {
        let begin = Instant::now();
        let mut ticks = interval_at(begin + PROGRESS_INTERVAL, PROGRESS_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { ticket, outbound, readings, readings_before: readings, begin, ticks }
    }

    async fn send_all(mut self, mut export: Export) -> Result<(), Status> {
        self.tell(export.standing()).await;
        while let Some(part) = self.next(&mut export).await? {
            self.send_part(part, export.standing()).await?;
        }
        let summary = pb::ExportSummary { readings: self.readings, devices: export.standing().devices };
        self.send(Message::Summary(summary), String::new()).await;
        Ok(())
    }

    /// The next part; tells of the progress while it takes long.
    async fn next(&mut self, export: &mut Export) -> Result<Option<Part>, Error> {
        let standing = export.standing();
        let mut next = pin!(export.next());
        loop {
            tokio::select! {
                part = &mut next => return Ok(part?),
                _ = self.ticks.tick() => self.tell(standing).await,
            }
        }
    }

    async fn send_part(&mut self, part: Part, standing: Standing) -> Result<(), Error> {
        let Part { device, span, sensor, readings } = part;
        for message in reading_messages(&sensor, &readings) {
            let query_readings_response::Message::Readings(column) = message else { return Err(Error::Internal) };
            self.readings += 1 + column.time_deltas_us.len() as u64;
            let last = column.base_time_us + column.time_deltas_us.iter().sum::<i64>();
            let time = Timestamp::from_micros(last).ok_or(Error::Internal)?;
            let place = Place { device: device.id.clone(), span, sensor: sensor.name.clone(), time, readings: self.readings };
            let readings = pb::ExportedReadings { device: device.id.to_string(), column: Some(column) };
            self.send(Message::Readings(readings), self.ticket.token(&place)).await;
            if self.ticks.tick().now_or_never().is_some() {
                self.tell(standing).await;
            }
        }
        Ok(())
    }

    async fn tell(&self, standing: Standing) {
        let readings_estimated = standing.estimate(self.readings);
        let readings_per_second = (self.readings - self.readings_before) as f64 / self.begin.elapsed().as_secs_f64().max(1e-3);
        let seconds_left = (readings_estimated - self.readings) as f64 / readings_per_second;
        let time_left = Duration::try_from_secs_f64(seconds_left).ok();
        let progress = pb::ExportProgress {
            readings: self.readings,
            readings_estimated,
            devices: standing.devices,
            devices_total: standing.devices_total,
            readings_per_second,
            estimated_end_time: time_left.map(|left| Timestamp::now().saturating_add(left).to_proto()),
        };
        self.send(Message::Progress(progress), String::new()).await;
    }

    async fn send(&self, message: Message, resume_token: String) {
        self.outbound.send(pb::ExportReadingsResponse { message: Some(message), resume_token }).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_back_by_the_same_request_only() {
        let request = pb::ExportReadingsRequest { label_selector: "site=berlin".into(), ..Default::default() };
        let ticket = Ticket::of(&request);
        for (end, sensor) in [(None, "a/b/c"), (Some(Timestamp::MAX), "flow")] {
            let place = Place {
                device: DeviceId::parse("pump:1.a_b-c").expect("good"),
                span: Span { start: Timestamp::MIN, end },
                sensor: sensor.to_owned(),
                time: Timestamp::now(),
                readings: u64::MAX,
            };
            let token = ticket.token(&place);
            assert_eq!(ticket.place(&token), Ok(place));
            let other = Ticket::of(&pb::ExportReadingsRequest::default());
            assert!(other.place(&token).expect_err("of another export").contains("something else"));
        }
        for bad in ["", "x1", "t1.5", "x1/"] {
            assert!(ticket.place(bad).is_err(), "{bad:?} was taken");
        }
    }
}
