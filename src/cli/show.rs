//! `tidegate device show`.

use super::{
    Failure,
    client::ClientArgs,
    configure::{config_json, state_name},
    device::{device_json, get, labels_text, or_dash},
    parse,
    print::{Table, proto_time, seconds, stream_text},
};
use crate::{
    client::Channel,
    error::{Reason, StatusFacts},
    model::{ValueKind, batch::reason_name},
    pb::{self, config_service_client::ConfigServiceClient, device_service_client::DeviceServiceClient},
};
use clap::Args;
use serde_json::{Value as Json, json};
use std::io::{self, Write};

#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The device.
    #[arg(value_name = "ID", value_parser = parse::device)]
    id: String,
    /// One JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
}

/// All that the gateway knows of a device.
struct Shown {
    device: pb::Device,
    sensors: Vec<pb::Sensor>,
    ledger: pb::Ledger,
    config: Option<pb::DeviceConfig>,
}

pub async fn run(args: ShowArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let ShowArgs { id, json, client } = args;
    let channel = client.connect().await?;
    let mut service = DeviceServiceClient::new(channel.clone());
    let device = get(&client, &mut service, &id).await?;
    let sensors = client.request(pb::ListSensorsRequest { device: id.clone() });
    let sensors = client.answer(service.list_sensors(sensors)).await?.sensors;
    let ledger = client.request(pb::GetLedgerRequest { device: id.clone() });
    let ledger = client.answer(service.get_ledger(ledger)).await?.ledger.unwrap_or_default();
    let config = config_if_any(&client, channel, &id).await?;
    let shown = Shown { device, sensors, ledger, config };
    if json {
        writeln!(out, "{}", shown.to_json()?)?
    } else {
        shown.write(out)?
    }
    Ok(())
}

/// As far as it is known: `0.002 s ahead, ±0.001 s`.
fn clock_line(clock: &pb::ClockOffset) -> String {
    let offset = clock.offset.as_ref().map_or(0.0, seconds);
    let direction = if offset < 0.0 { "behind" } else { "ahead" };
    let shown = match &clock.uncertainty {
        Some(uncertainty) => format!("{:.3} s {direction}, ±{:.3} s", offset.abs(), seconds(uncertainty)),
        None if offset < 0.0 => format!("at most {:.3} s behind, by its readings", offset.abs()),
        None => format!("at least {offset:.3} s ahead, by its readings"),
    };
    match &clock.correction {
        Some(correction) => format!("{shown}; its times are corrected by {:+.3} s", seconds(correction)),
        None => shown,
    }
}

/// The state of the device's configuration, when it was ever given one.
async fn config_if_any(client: &ClientArgs, channel: Channel, id: &str) -> Result<Option<pb::DeviceConfig>, Failure> {
    let request = client.request(pb::GetConfigRequest { device: id.to_owned() });
    match client.answer(ConfigServiceClient::new(channel).get_config(request)).await {
        Ok(answer) => Ok(answer.config),
        Err(Failure::Call(status)) if StatusFacts::of(&status).reason() == Reason::ConfigNotFound.as_str() => Ok(None),
        Err(failure) => Err(failure),
    }
}

impl Shown {
    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let Self { device, sensors, ledger, config } = self;
        let mut head = Table::bare();
        for (name, text) in [
            ("device", device.id.clone()),
            ("name", device.display_name.clone()),
            ("labels", labels_text(device)),
            ("registered", proto_time(device.create_time.as_ref())),
            ("last received", proto_time(device.last_receive_time.as_ref())),
            ("last seen", proto_time(device.last_seen_time.as_ref())),
            ("clock", device.clock_offset.as_ref().map(clock_line).unwrap_or_default()),
            ("configuration", config.as_ref().map(config_line).unwrap_or_else(|| "none".to_owned())),
        ] {
            head.row([name.to_owned(), or_dash(&text)]);
        }
        head.write(out, "")?;

        writeln!(out)?;
        let mut table = Table::new(&["SENSOR", "UNIT", "KIND", "NOTE"]);
        for sensor in sensors {
            table.row([sensor.name.clone(), or_dash(&sensor.unit), kind_name(sensor).to_owned(), note(sensor)]);
        }
        table.write(out, "")?;

        writeln!(out)?;
        let mut table = Table::new(&["ACCOUNT", "BATCHES", "READINGS"]);
        for (name, batches, readings) in accounts(ledger) {
            table.row([name, batches.to_string(), readings.to_string()]);
        }
        table.write(out, "")?;

        writeln!(out)?;
        let mut table = Table::new(&["STREAM ID", "LAST SEQUENCE", "LAST RECEIVED"]);
        for stream in &ledger.streams {
            table.row([
                stream_text(&stream.stream_id),
                stream.last_durable_sequence.to_string(),
                proto_time(stream.last_receive_time.as_ref()),
            ]);
        }
        table.write(out, "")
    }

    fn to_json(&self) -> Result<Json, Failure> {
        let Self { device, sensors, ledger, config } = self;
        let tally = |tally: Option<pb::Tally>| {
            let pb::Tally { batches, readings } = tally.unwrap_or_default();
            json!({"batches": batches, "readings": readings})
        };
        let rejected: serde_json::Map<String, Json> = (ledger.rejected.iter())
            .map(|count| (reason_name(count.reason()).to_owned(), json!({"batches": count.batches, "readings": count.readings})))
            .collect();
        let streams: Vec<Json> = (ledger.streams.iter())
            .map(|stream| {
                let time = proto_time(stream.last_receive_time.as_ref());
                json!({"stream_id": stream_text(&stream.stream_id), "last_durable_sequence": stream.last_durable_sequence, "last_receive_time": time})
            })
            .collect();
        Ok(json!({
            "device": device_json(device),
            "sensors": sensors.iter().map(|sensor| json!({
                "name": sensor.name,
                "unit": sensor.unit,
                "unit_registered": sensor.unit_registered,
                "kind": kind_name(sensor),
                "allow_non_finite": sensor.allow_non_finite,
                "create_time": proto_time(sensor.create_time.as_ref()),
            })).collect::<Vec<_>>(),
            "ledger": {
                "stored": tally(ledger.stored),
                "duplicate": tally(ledger.duplicate),
                "rejected": rejected,
                "pending": tally(ledger.pending),
                "lost": tally(ledger.lost),
                "streams": streams,
            },
            "config": config.as_ref().map(config_json).transpose()?,
        }))
    }
}

fn config_line(config: &pb::DeviceConfig) -> String {
    let desired = config.desired.as_ref().map_or(0, |desired| desired.revision);
    let applied = match config.applied_revision {
        0 => "the device never reported one".to_owned(),
        revision => format!("the device runs with revision {revision}"),
    };
    let detail = if config.detail.is_empty() { String::new() } else { format!(" ({})", config.detail) };
    format!("revision {desired} is {}{detail}; {applied}", state_name(config.state()))
}

fn kind_name(sensor: &pb::Sensor) -> &'static str {
    ValueKind::from_code(sensor.kind).map_or("-", ValueKind::as_str)
}

fn note(sensor: &pb::Sensor) -> String {
    let mut notes = Vec::new();
    if !sensor.unit.is_empty() && !sensor.unit_registered {
        notes.push("the unit is not in the SenML registries");
    }
    if sensor.allow_non_finite {
        notes.push("takes NaN and infinities");
    }
    notes.join("; ")
}

fn accounts(ledger: &pb::Ledger) -> Vec<(String, u64, u64)> {
    let line = |name: &str, tally: Option<pb::Tally>| {
        let pb::Tally { batches, readings } = tally.unwrap_or_default();
        (name.to_owned(), batches, readings)
    };
    let mut lines = vec![line("stored", ledger.stored), line("duplicate", ledger.duplicate)];
    lines.extend(ledger.rejected.iter().map(|count| (format!("rejected {}", reason_name(count.reason())), count.batches, count.readings)));
    lines.push(line("pending", ledger.pending));
    lines.push(line("lost by the device", ledger.lost));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pump() -> Shown {
        let tally = |batches, readings| Some(pb::Tally { batches, readings });
        Shown {
            device: pb::Device { id: "pump-1".into(), labels: [("site".into(), "berlin".into())].into(), ..Default::default() },
            sensors: vec![
                pb::Sensor { name: "flow".into(), unit: "gpm".into(), kind: 1, ..Default::default() },
                pb::Sensor { name: "temperature".into(), unit: "Cel".into(), unit_registered: true, kind: 1, ..Default::default() },
            ],
            ledger: pb::Ledger {
                stored: tally(3, 30),
                rejected: vec![pb::RejectedCount { reason: pb::RejectReason::NonFinite.into(), batches: 1, readings: 10 }],
                ..Default::default()
            },
            config: None,
        }
    }

    #[test]
    fn unregistered_units_are_flagged_and_the_account_is_complete() {
        let mut out = Vec::new();
        pump().write(&mut out).expect("memory takes it");
        let text = String::from_utf8(out).expect("UTF-8");
        let flagged: Vec<&str> = text.lines().filter(|line| line.contains("not in the SenML registries")).collect();
        assert_eq!(flagged, ["flow         gpm   double  the unit is not in the SenML registries"]);
        for line in
            ["labels         site=berlin", "configuration  none", "stored               3        30", "rejected NON_FINITE  1        10"]
        {
            assert!(text.lines().any(|shown| shown == line), "{line:?} is missing in:\n{text}");
        }
    }

    #[test]
    fn the_json_has_the_same() {
        let json = pump().to_json().expect("no configuration to fail on");
        assert_eq!(json["ledger"]["rejected"]["NON_FINITE"]["readings"], 10);
        assert_eq!(json["sensors"][0]["unit_registered"], false);
        assert_eq!(json["config"], Json::Null);
    }
}
