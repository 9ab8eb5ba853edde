//! `tidegate follow`: readings as they are stored, across restarts of the gateway.

use super::{
    Failure,
    client::{ClientArgs, MESSAGE_BYTES_MAX},
    parse, print,
    retry::reconnecting,
    until_interrupted,
};
use crate::{
    model::{Timestamp, columns::Values, columns::times_from_deltas},
    pb::{self, follow_request::Start, follow_response::Message, live_service_client::LiveServiceClient},
};
use clap::Args;
use prost::Message as _;
use serde_json::{Value as Json, json};
use std::{convert::Infallible, io::Write, ops::ControlFlow, time::Duration};

/// How long the gateway may be silent before it says that it is alive.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// How long without a word, heartbeats included, until the gateway counts as gone.
const SILENCE_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub struct FollowArgs {
    /// Only this device; may be given several times.
    #[arg(long = "device", value_name = "ID", value_parser = parse::device)]
    devices: Vec<String>,
    /// Only devices whose labels match, such as 'site=berlin,!retired'.
    #[arg(long, value_name = "SELECTOR", default_value = "", hide_default_value = true, value_parser = parse::selector)]
    selector: String,
    /// Only sensors of this name; may be given several times.
    #[arg(long = "sensor", value_name = "NAME")]
    sensors: Vec<String>,
    /// Where to begin: `latest` (the latest value of each sensor, then live), `live`, `beginning`, a time (RFC 3339, or before
    /// now such as -1h), or the resume_token of a line of --json.
    #[arg(long, value_name = "WHERE", default_value = "latest", value_parser = parse_start, allow_hyphen_values = true)]
    from: Start,
    /// End when the past that --from asks for has been shown, instead of following on.
    #[arg(long)]
    until_live: bool,
    /// One JSON object a message, with the token to resume from behind it.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
}

fn parse_start(text: &str) -> Result<Start, Infallible> {
    Ok(match text {
        "latest" => Start::Latest(true),
        "live" => Start::LiveOnly(true),
        "beginning" => Start::Beginning(true),
        _ => match parse::time(text) {
            Ok(time) => Start::ReceiveTime(Timestamp::to_proto(time)),
            Err(_) => Start::ResumeToken(text.to_owned()),
        },
    })
}

pub async fn run(args: FollowArgs, out: &mut dyn Write) -> Result<(), Failure> {
    until_interrupted(follow(args, out)).await
}

/// Follows until it is interrupted or the gateway refuses.
async fn follow(args: FollowArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let FollowArgs { devices, selector, sensors, from, until_live, json, client } = args;
    let mut request = pb::FollowRequest {
        devices,
        label_selector: selector,
        sensors,
        start: Some(from),
        heartbeat_interval: Some(parse::duration_to_proto(HEARTBEAT_INTERVAL)),
    };
    let show = Show { json, until_live };
    reconnecting(async |answered| follow_once(&client, &mut request, show, out, answered).await).await
}

/// What is shown, and how.
#[derive(Clone, Copy)]
struct Show {
    json: bool,
    until_live: bool,
}

/// Follows on one stream; `request` is kept at where the next one has to begin.
async fn follow_once(
    client: &ClientArgs,
    request: &mut pb::FollowRequest,
    show: Show,
    out: &mut dyn Write,
    answered: &mut bool,
) -> Result<ControlFlow<()>, Failure> {
    let mut service = LiveServiceClient::new(client.connect().await?).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut stream = client.answer(service.follow(request.clone())).await?;
    loop {
        let Ok(message) = tokio::time::timeout(SILENCE_MAX, stream.message()).await else {
            return Err(Failure::TimedOut(SILENCE_MAX));
        };
        let Some(response) = message? else { return Ok(ControlFlow::Continue(())) };
        *answered = true;
        let token = response.resume_token;
        if let Some(message) = response.message {
            let live = matches!(message, Message::Synced(_));
            if show.json {
                write_json(message, &token, out)?
            } else {
                write_lines(message, out)?
            }
            out.flush()?;
            if live && show.until_live {
                return Ok(ControlFlow::Break(()));
            }
        }
        if !token.is_empty() {
            request.start = Some(Start::ResumeToken(token));
        }
    }
}

/// One reading, ready to be shown.
struct Reading {
    time_us: i64,
    // By the device's clock.
    device_time_us: i64,
    sensor: String,
    value: crate::model::columns::Value,
    unit: String,
}

fn decode(batch: bytes::Bytes) -> Result<pb::Batch, Failure> {
    pb::Batch::decode(batch).map_err(|why| Failure::Failed(format!("the gateway sent what is not a batch: {why}")))
}

/// The readings of a batch: row by row, as they were sampled.
fn readings(batch: pb::Batch) -> Vec<Reading> {
    let mut readings = Vec::new();
    for frame in batch.frames {
        let times = times_from_deltas(frame.base_time_us, &frame.time_deltas_us).unwrap_or_default();
        let columns: Vec<(String, String, Values)> =
            frame.columns.into_iter().filter_map(|column| Some((column.sensor, column.unit, column.values?.into()))).collect();
        for (row, &time_us) in times.iter().enumerate() {
            for (sensor, unit, values) in &columns {
                if let Some(value) = values.get(row) {
                    let device_time_us = time_us.wrapping_sub(frame.clock_correction_us);
                    readings.push(Reading { time_us, device_time_us, sensor: sensor.clone(), value, unit: unit.clone() });
                }
            }
        }
    }
    readings
}

fn write_lines(message: Message, out: &mut dyn Write) -> Result<(), Failure> {
    let (device, batch) = match message {
        Message::Latest(latest) => (latest.device, latest.batch.unwrap_or_default()),
        Message::Readings(live) => (live.device, decode(live.batch)?),
        Message::Synced(_) | Message::Heartbeat(_) => return Ok(()),
    };
    for Reading { time_us, sensor, value, unit, .. } in readings(batch) {
        let line = format!(
            "{}  {device}  {}  {} {}",
            print::time(time_us),
            print::shown(&sensor),
            print::shown(&print::value(&value)),
            print::shown(&unit)
        );
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn write_json(message: Message, token: &str, out: &mut dyn Write) -> Result<(), Failure> {
    let one = |r: Reading| {
        let mut one = json!({"time": print::time(r.time_us), "sensor": r.sensor, "value": print::json_value(&r.value), "unit": r.unit});
        if r.device_time_us != r.time_us {
            one["device_time"] = print::time(r.device_time_us).into();
        }
        one
    };
    let all = |batch: pb::Batch| readings(batch).into_iter().map(one).collect::<Vec<Json>>();
    let mut line = match message {
        Message::Latest(latest) => json!({"type": "latest", "device": latest.device, "readings": all(latest.batch.unwrap_or_default())}),
        Message::Readings(live) => json!({
            "type": "readings",
            "device": live.device,
            "receive_time": print::proto_time(live.receive_time.as_ref()),
            "readings": all(decode(live.batch)?),
        }),
        Message::Synced(_) => json!({"type": "synced"}),
        Message::Heartbeat(_) => json!({"type": "heartbeat"}),
    };
    line["resume_token"] = Json::from(token);
    Ok(writeln!(out, "{line}")?)
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
