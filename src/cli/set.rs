//! `tidegate config set`: a new desired configuration, and whether the devices took it.

use super::{
    Failure,
    client::ClientArgs,
    configure::{refused, state_name, write_event},
    parse, retry,
};
use crate::{
    model::structs,
    pb::{
        self, ConfigState, config_service_client::ConfigServiceClient, configure_request, configure_response::Message, set_config::Target,
    },
};
use clap::Args;
use std::{collections::BTreeMap, io::Write, time::Duration};
use tokio::time::timeout;
use tokio_stream::StreamExt;
use uuid::Uuid;

#[derive(Debug, Args)]
#[command(
    override_usage = "tidegate config set [OPTIONS] <DEVICE> <JSON>\n       tidegate config set [OPTIONS] --selector <SELECTOR> <JSON>"
)]
pub struct SetArgs {
    /// The device; left out with --selector.
    #[arg(value_name = "DEVICE", required = true)]
    first: String,
    /// The whole configuration: a JSON object, @FILE, or - for standard input.
    #[arg(value_name = "JSON")]
    second: Option<String>,
    /// Instead of a device: all devices whose labels match, such as 'site=berlin,!retired'.
    #[arg(long, value_name = "SELECTOR", value_parser = parse::selector_not_empty)]
    selector: Option<String>,
    /// Only when this is still the etag of the current configuration (from `get`).
    #[arg(long, value_name = "ETAG", default_value = "", hide_default_value = true, conflicts_with = "selector")]
    etag: String,
    /// Why, for the history.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    comment: String,
    /// Wait for so long until every device has applied it; fail when one rejects or reverts it, or is not done by then.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    wait: Option<Duration>,
    /// One JSON object an event.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
}

pub async fn run(args: SetArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let (target, config) = target(args.first, args.second, args.selector)?;
    let SetArgs { etag, comment, wait, json, client, .. } = args;
    let mut progress = Progress::new(Uuid::now_v7().to_string(), wait.is_some(), json);
    let set = pb::SetConfig {
        request_id: progress.request_id.clone(),
        config: Some(structs::from_json(&parse::json_object(&config).map_err(Failure::Usage)?)),
        etag,
        comment,
        target: Some(target),
    };
    let request = pb::ConfigureRequest { message: Some(configure_request::Message::Set(set)) };

    let ended = match wait {
        None => timeout(client.timeout, configure(&client, &request, &mut progress, out)).await,
        Some(wait) => timeout(wait, until_settled(&client, &request, &mut progress, out)).await,
    };
    match ended {
        Ok(result) => result?,
        Err(_) if progress.devices.is_empty() || wait.is_none() => return Err(Failure::TimedOut(wait.unwrap_or(client.timeout))),
        // The outcome names the devices that are not done.
        Err(_) => {}
    }
    progress.outcome(wait)
}

/// Whom it is for, and the configuration's text.
fn target(first: String, second: Option<String>, selector: Option<String>) -> Result<(Target, String), Failure> {
    match (first, second, selector) {
        (device, Some(config), None) => Ok((Target::Device(parse::device(&device).map_err(Failure::Usage)?), config)),
        (config, None, Some(selector)) => Ok((Target::LabelSelector(selector), config)),
        (_, None, None) => Err(Failure::Usage("two are needed: a device and a JSON object, or --selector and a JSON object".to_owned())),
        (_, Some(_), Some(_)) => Err(Failure::Usage("a device and --selector are one too many: give one of them".to_owned())),
    }
}

/// Sets under the same request id again while the gateway is away: it answers with the revision that it has.
async fn until_settled(
    client: &ClientArgs,
    request: &pb::ConfigureRequest,
    progress: &mut Progress,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let mut backoff = retry::backoff();
    loop {
        match configure(client, request, progress, out).await {
            Err(failure) if failure.is_passing() && !progress.devices.is_empty() => retry::wait(&mut backoff, &failure).await,
            result => return result,
        }
    }
}

/// Sends the request and takes the answers, until there is nothing more to wait for.
async fn configure(
    client: &ClientArgs,
    request: &pb::ConfigureRequest,
    progress: &mut Progress,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let mut service = ConfigServiceClient::new(client.connect().await?);
    let requests = tokio_stream::once(request.clone()).chain(tokio_stream::pending());
    let mut stream = client.answer(service.configure(requests)).await?;
    progress.begin();
    while !progress.is_over() {
        let Some(response) = stream.message().await? else {
            return Err(tonic::Status::unavailable("the gateway ended the stream").into());
        };
        match response.message {
            Some(Message::Event(event)) if progress.event(&event) => write_event(&event, progress.json, out)?,
            Some(Message::Event(_) | Message::WatchStarted(_)) | None => {}
            Some(Message::Refusal(refusal)) => progress.refusals.push(refused(&refusal)),
            Some(Message::SetDone(_)) => progress.answered = true,
        }
    }
    Ok(())
}

/// How far the devices have come with the new revision.
#[derive(Debug)]
struct Progress {
    request_id: String,
    /// Whether devices are to apply it, or the gateway just to accept it.
    apply: bool,
    json: bool,
    /// Whether the gateway has answered for all devices that the request hit, which may be none.
    answered: bool,
    devices: BTreeMap<String, (u64, Step)>,
    refusals: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Reached(ConfigState),
    Failed(String),
}

impl Progress {
    fn new(request_id: String, apply: bool, json: bool) -> Self {
        Self { request_id, apply, json, answered: false, devices: BTreeMap::new(), refusals: Vec::new() }
    }

    /// A new stream answers for all devices again.
    fn begin(&mut self) {
        self.answered = false;
        self.refusals.clear();
    }

    /// Takes in a step; whether it is one of this request and news.
    fn event(&mut self, event: &pb::ConfigEvent) -> bool {
        let known = self.devices.get(&event.device);
        if event.request_id != self.request_id {
            if let Some((revision, Step::Reached(state))) = known
                && event.revision > *revision
                && *state != ConfigState::Applied
            {
                let why = format!("revision {revision} was replaced by revision {}", event.revision);
                self.devices.insert(event.device.clone(), (event.revision, Step::Failed(why)));
            }
            return false;
        }
        let step = match event.state() {
            state @ (ConfigState::Rejected | ConfigState::Reverted) => {
                Step::Failed(format!("{} {}", state_name(state), event.detail).trim_end().to_owned())
            }
            state => Step::Reached(state),
        };
        // On a new stream the gateway begins again with what it has told before.
        let news = match (known, &step) {
            (Some((_, Step::Reached(before))), Step::Reached(now)) => now > before,
            (Some((_, Step::Failed(_))), _) => false,
            _ => true,
        };
        if news {
            self.devices.insert(event.device.clone(), (event.revision, step));
        }
        news
    }

    fn is_over(&self) -> bool {
        let settled = |(_, step): &(u64, Step)| !self.apply || matches!(step, Step::Failed(_) | Step::Reached(ConfigState::Applied));
        self.answered && self.devices.values().all(settled)
    }

    /// What the command says in the end.
    fn outcome(&self, wait: Option<Duration>) -> Result<(), Failure> {
        let mut lines = self.refusals.clone();
        for (device, (revision, step)) in &self.devices {
            match step {
                Step::Failed(why) => lines.push(format!("{device}: {why}")),
                Step::Reached(state) if self.apply && *state != ConfigState::Applied => {
                    let wait = wait.unwrap_or_default();
                    lines.push(format!("{device}: revision {revision} is {} and not applied after {wait:?}", state_name(*state)));
                }
                Step::Reached(_) => {}
            }
        }
        if lines.is_empty() && self.devices.is_empty() {
            lines.push("no device matches the selector: nothing was changed".to_owned());
        }
        if lines.is_empty() { Ok(()) } else { Err(Failure::Failed(lines.join("\n"))) }
    }
}

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
