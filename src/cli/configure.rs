//! `tidegate config get|set|watch`: the configuration of devices.

use super::{
    Failure,
    client::ClientArgs,
    parse,
    print::{self, Table, proto_time},
    retry::reconnecting,
    set, until_interrupted,
};
use crate::{
    model::structs,
    pb::{
        self, ConfigState, config_service_client::ConfigServiceClient, configure_request, configure_response::Message, watch_config::Target,
    },
};
use clap::{Args, Subcommand};
use serde_json::{Value as Json, json};
use std::{
    collections::HashMap,
    io::{self, Write},
    ops::ControlFlow,
};
use tokio_stream::StreamExt;

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Show the configuration that a device should have, and what it said about it.
    Get(GetArgs),
    /// Set the configuration of a device, or of all that match a selector.
    Set(set::SetArgs),
    /// Watch devices take their configuration.
    Watch(WatchArgs),
}

#[derive(Debug, Args)]
pub struct GetArgs {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = parse::device)]
    device: String,
    /// One JSON object; `.desired.config` in it is what `set` takes.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct WatchArgs {
    /// Only this device.
    #[arg(value_name = "DEVICE", value_parser = parse::device, conflicts_with = "selector")]
    device: Option<String>,
    /// Only devices whose labels match, such as 'site=berlin,!retired'.
    #[arg(long, value_name = "SELECTOR", default_value = "", hide_default_value = true, value_parser = parse::selector)]
    selector: String,
    /// One JSON object an event.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
}

pub async fn run(command: ConfigCommand, out: &mut dyn Write) -> Result<(), Failure> {
    match command {
        ConfigCommand::Get(args) => get(args, out).await,
        ConfigCommand::Set(args) => set::run(args, out).await,
        ConfigCommand::Watch(args) => until_interrupted(watch(args, out)).await,
    }
}

async fn get(args: GetArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let GetArgs { device, json, client } = args;
    let mut service = ConfigServiceClient::new(client.connect().await?);
    let answer = client.answer(service.get_config(client.request(pb::GetConfigRequest { device }))).await?;
    let config = answer.config.unwrap_or_default();
    let as_json = config_json(&config)?;
    if json {
        return Ok(writeln!(out, "{as_json}")?);
    }
    let desired = config.desired.clone().unwrap_or_default();
    let mut head = Table::bare();
    for (name, text) in [
        ("device", config.device.clone()),
        ("revision", desired.revision.to_string()),
        ("etag", desired.etag.clone()),
        ("set", proto_time(desired.create_time.as_ref())),
        ("comment", desired.comment.clone()),
        ("state", format!("{} since {}", state_name(config.state()), proto_time(config.state_time.as_ref()))),
        ("detail", config.detail.clone()),
        (
            "applied",
            if config.applied_revision == 0 { "none reported".to_owned() } else { format!("revision {}", config.applied_revision) },
        ),
    ] {
        if !text.is_empty() {
            head.row([name.to_owned(), text]);
        }
    }
    head.write(out, "")?;
    Ok(writeln!(out, "\n{:#}", as_json["desired"]["config"])?)
}

/// The state without the enum's prefix: `APPLIED`.
pub fn state_name(state: ConfigState) -> &'static str {
    state.as_str_name().trim_start_matches("CONFIG_STATE_")
}

/// The state of a configuration as JSON, with the names of the .proto file.
pub fn config_json(config: &pb::DeviceConfig) -> Result<Json, Failure> {
    let desired = config.desired.clone().unwrap_or_default();
    let object = structs::to_json(&desired.config.unwrap_or_default()).map_err(Failure::Failed)?;
    Ok(json!({
        "device": config.device,
        "desired": {
            "revision": desired.revision,
            "etag": desired.etag,
            "config": object,
            "create_time": proto_time(desired.create_time.as_ref()),
            "request_id": desired.request_id,
            "comment": desired.comment,
        },
        "state": state_name(config.state()),
        "detail": config.detail,
        "state_time": proto_time(config.state_time.as_ref()),
        "applied_revision": config.applied_revision,
    }))
}

/// Writes one step of a configuration.
pub fn write_event(event: &pb::ConfigEvent, json: bool, out: &mut dyn Write) -> io::Result<()> {
    let (time, state) = (proto_time(event.event_time.as_ref()), state_name(event.state()));
    let pb::ConfigEvent { request_id, device, revision, detail, etag, .. } = event;
    if json {
        let line = json!({
            "request_id": request_id, "device": device, "revision": revision, "state": state,
            "event_time": time, "detail": detail, "etag": etag,
        });
        writeln!(out, "{line}")?;
    } else {
        let detail = if detail.is_empty() { String::new() } else { format!("  {}", print::shown(detail)) };
        writeln!(out, "{time}  {device}  revision {revision}  {state}{detail}")?;
    }
    out.flush()
}

/// A request that could not be carried out, as a failure of the command.
pub fn refused(refusal: &pb::ConfigRefusal) -> String {
    let pb::ConfigRefusal { device, reason, message, current_etag, .. } = refusal;
    let etag = if current_etag.is_empty() { String::new() } else { format!(" current_etag={current_etag}") };
    let device = if device.is_empty() { String::new() } else { format!(" device={device}") };
    format!("{message}\n  reason: {reason}{device}{etag}")
}

async fn watch(args: WatchArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let WatchArgs { device, selector, json, client } = args;
    let target = device.map_or(Target::LabelSelector(selector), Target::Device);
    let request = pb::ConfigureRequest { message: Some(configure_request::Message::Watch(pb::WatchConfig { target: Some(target) })) };
    // What was last shown of each device: a new stream begins with where each stands, which is mostly known.
    let mut shown = HashMap::new();
    reconnecting(async |answered| watch_once(&client, &request, &mut shown, json, out, answered).await).await
}

async fn watch_once(
    client: &ClientArgs,
    request: &pb::ConfigureRequest,
    shown: &mut HashMap<String, (u64, ConfigState)>,
    json: bool,
    out: &mut dyn Write,
    answered: &mut bool,
) -> Result<ControlFlow<()>, Failure> {
    let mut service = ConfigServiceClient::new(client.connect().await?);
    let requests = tokio_stream::once(request.clone()).chain(tokio_stream::pending());
    let mut stream = client.answer(service.configure(requests)).await?;
    while let Some(response) = stream.message().await? {
        *answered = true;
        match response.message {
            Some(Message::Event(event)) => {
                let step = (event.revision, event.state());
                if shown.insert(event.device.clone(), step) != Some(step) {
                    write_event(&event, json, out)?;
                }
            }
            Some(Message::Refusal(refusal)) => return Err(Failure::Failed(refused(&refusal))),
            Some(Message::WatchStarted(_) | Message::SetDone(_)) | None => {}
        }
    }
    Ok(ControlFlow::Continue(()))
}
