//! `LiveService`: operators follow what is being stored.

use super::{ResponseStream, parse};
use crate::{
    auth::Caller,
    error::{Error, Violations},
    live::{Filter, Follower, Item, Start, follower::Sources},
    middleware::Draining,
    model::{Position, batch::check_sensor_name},
    pb::{self, follow_request, follow_response, live_service_server::LiveService},
};
use futures_util::{StreamExt, stream};
use std::time::Duration;
use tonic::{Request, Response, Status};

const HEARTBEAT_DEFAULT: Duration = Duration::from_secs(15);
const HEARTBEAT_RANGE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));
/// Where the resume tokens of this version begin.
const TOKEN_PREFIX: &str = "t1.";

/// See the module.
pub struct LiveApi {
    /// What followers read.
    pub sources: Sources,
}

#[tonic::async_trait]
impl LiveService for LiveApi {
    type FollowStream = ResponseStream<pb::FollowResponse>;

    async fn follow(&self, request: Request<pb::FollowRequest>) -> Result<Response<Self::FollowStream>, Status> {
        let sources = Sources { drain: Draining::of(request.extensions()), ..self.sources.clone() };
        let caller = Caller::of(request.extensions());
        let (mut filter, start, heartbeat) = parse(request.into_inner())?;
        filter.labels = filter.labels.and(caller.scope());
        let follower = Follower::new(sources, filter, start, heartbeat).await?;
        // Pulled by the connection: a follower that does not read costs nothing but its place.
        let items = stream::unfold(Some(follower), |follower| async move {
            let mut follower = follower?;
            match follower.next().await {
                Ok(item) => Some((Ok(encode(item)), Some(follower))),
                Err(failure) => Some((Err(Status::from(failure)), None)),
            }
        });
        Ok(Response::new(items.boxed()))
    }
}

fn parse(request: pb::FollowRequest) -> Result<(Filter, Start, Duration), Error> {
    let mut violations = Violations::new();
    let devices = parse::devices(&mut violations, "devices", &request.devices);
    let labels = parse::selector(&mut violations, &request.label_selector);
    parse::check_count(&mut violations, "sensors", request.sensors.len());
    for (index, sensor) in request.sensors.iter().enumerate() {
        violations.check(&format!("sensors[{index}]"), check_sensor_name(sensor));
    }
    let heartbeat = parse::duration(&mut violations, "heartbeat_interval", request.heartbeat_interval.as_ref(), HEARTBEAT_RANGE);
    let start = match request.start {
        None => Start::Latest,
        Some(follow_request::Start::Latest(set)) => flag(&mut violations, "latest", set, Start::Latest),
        Some(follow_request::Start::LiveOnly(set)) => flag(&mut violations, "live_only", set, Start::Live),
        Some(follow_request::Start::Beginning(set)) => flag(&mut violations, "beginning", set, Start::Beginning),
        Some(follow_request::Start::ReceiveTime(time)) => {
            parse::time(&mut violations, "receive_time", Some(&time)).map_or(Start::Live, Start::ReceiveTime)
        }
        Some(follow_request::Start::ResumeToken(token)) => {
            violations.check("resume_token", parse_token(&token)).map_or(Start::Live, Start::After)
        }
    };
    violations.into_result()?;
    let filter = Filter { devices: devices.into_iter().collect(), labels, sensors: request.sensors.into_iter().collect() };
    Ok((filter, start, heartbeat.unwrap_or(HEARTBEAT_DEFAULT)))
}

/// One of the starts that are chosen by setting a flag: what a flag that is set to false would mean nobody knows.
fn flag(violations: &mut Violations, field: &str, set: bool, start: Start) -> Start {
    if !set {
        violations.add(field, "must be true; leave it out to begin elsewhere");
    }
    start
}

pub(crate) fn parse_token(token: &str) -> Result<Position, String> {
    let position = token.strip_prefix(TOKEN_PREFIX).and_then(|text| i64::from_str_radix(text, 16).ok());
    position.filter(|&position| position >= 0).map(Position).ok_or_else(|| "this is not a resume_token that the gateway gave".to_owned())
}

pub(crate) fn token(position: Position) -> String {
    format!("{TOKEN_PREFIX}{:x}", position.0)
}

fn encode(item: Item) -> pb::FollowResponse {
    use follow_response::Message;
    let (message, resume_token) = match item {
        Item::Latest { device, batch } => {
            (Message::Latest(pb::LatestReadings { device: device.to_string(), batch: Some(batch) }), String::new())
        }
        Item::Readings { device, receive_time, batches, batch, position } => {
            let readings = pb::LiveReadings { device: device.to_string(), receive_time: Some(receive_time.to_proto()), batches, batch };
            (Message::Readings(readings), token(position))
        }
        Item::Synced(position) => (Message::Synced(pb::Synced {}), token(position)),
        Item::Heartbeat(position) => (Message::Heartbeat(pb::Heartbeat {}), token(position)),
    };
    pb::FollowResponse { message: Some(message), resume_token }
}
