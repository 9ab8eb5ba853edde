//! A `Configure` stream: one operator's desk.
//!
//! A desk looks at the store's state whenever it is poked, and shows what it has not shown yet. It remembers no more of a
//! device than which step it showed last.

use super::{
    config::{ConfigApi, Target, parse_set, parse_watch},
    driven::Outbound,
};
use crate::{
    auth::{Caller, PendingEntry, Role},
    error::{Error, Failure, Reason},
    fleet::{ConfigChange, Device, configs::etag},
    middleware::RequestId,
    model::{DeviceId, LabelSelector, Labels, Timestamp},
    pb::{self, configure_request, configure_response},
    store::{AuditRow, ConfigOutcome, ConfigRevisionRow, ConfigStateRow, DeviceKey},
};
use parking_lot::Mutex;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming, transport::server::TcpConnectInfo};

/// How many devices one desk watches by their ids, counting those that it has set. A few dozen bytes each.
const DEVICES_WATCHED_MAX: usize = 100_000;
/// How many selectors one desk watches. Each is compared with each device that comes a step further.
const SELECTORS_WATCHED_MAX: usize = 16;
/// How many devices are read at once.
const DEVICES_PER_READ: usize = 1_000;

/// Whose desk it is, and where from.
pub struct Call {
    caller: Caller,
    peer: String,
    request_id: String,
}

impl Call {
    /// That of a request.
    pub fn of(extensions: &http::Extensions) -> Self {
        let peer = extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr);
        Self {
            caller: Caller::of(extensions),
            peer: peer.map(|peer| peer.to_string()).unwrap_or_default(),
            request_id: extensions.get::<RequestId>().map(ToString::to_string).unwrap_or_default(),
        }
    }
}

/// See the module.
pub struct Desk {
    api: ConfigApi,
    drain: CancellationToken,
    call: Call,
    pokes: broadcast::Receiver<DeviceKey>,
    watching: Watching,
    // The last step that was shown of each device: what comes after it is news.
    shown: HashMap<DeviceKey, Mark>,
    // Whether the operator has asked to watch, and so stays when there is nothing more to set.
    stays: bool,
    outbound: Outbound<pb::ConfigureResponse>,
}

impl Desk {
    /// One that watches nothing yet.
    pub fn new(api: ConfigApi, call: Call, drain: CancellationToken, outbound: Outbound<pb::ConfigureResponse>) -> Self {
        Self { pokes: api.configs.pokes(), api, call, drain, watching: Watching::default(), shown: HashMap::new(), stays: false, outbound }
    }

    /// Answers until there is nothing more to say.
    pub async fn run(mut self, mut inbound: Streaming<pb::ConfigureRequest>) -> Result<(), Status> {
        let drain = self.drain.clone();
        let mut open = true;
        // A desk that only sets is done when it has been answered; one that watches stays until the operator leaves.
        while open || self.stays {
            tokio::select! {
                message = inbound.message(), if open => match message?.map(|request| request.message) {
                    Some(Some(configure_request::Message::Set(set))) => self.set(set).await?,
                    Some(Some(configure_request::Message::Watch(watch))) => self.watch(watch).await?,
                    Some(None) => return Err(Error::invalid("message", "neither `set` nor `watch` is there").into()),
                    None => open = false,
                },
                poke = self.pokes.recv(), if !self.watching.is_empty() => match poke {
                    Ok(key) => self.show_news_of(key).await?,
                    // Too many to keep: look at all that is watched.
                    Err(broadcast::error::RecvError::Lagged(_)) => self.show_all_news().await?,
                    Err(broadcast::error::RecvError::Closed) => return Ok(()),
                },
                () = drain.cancelled() => return Err(Error::Draining.into()),
            }
        }
        Ok(())
    }

    async fn set(&mut self, set: pb::SetConfig) -> Result<(), Status> {
        let mut done = pb::SetConfigDone { request_id: set.request_id.clone(), accepted: 0, refused: 0 };
        // Whether it may be asked for at all, before what is asked for is looked at.
        let allowed = self.call.caller.needs(Role::Operator);
        match allowed.and_then(|()| parse_set(set)) {
            Ok((Target::Device(id), change)) => {
                let note = self.note(format!("devices/{id}"));
                let result = self.set_one(&id, change, &mut done).await;
                write(note, result.as_ref().map_or_else(Status::code, |code| *code)).await;
                result?;
            }
            Ok((Target::Matching(selector), change)) => {
                let note = self.note(format!("devices?{selector}"));
                let result = self.set_matching(&selector, &change, &mut done).await;
                write(note, result.as_ref().map_or_else(Status::code, |()| Code::Ok)).await;
                result?;
            }
            Err(error) => {
                write(self.note(String::new()), error.reason().code()).await;
                self.refuse(&done.request_id, "", error).await?;
            }
        }
        self.send(configure_response::Message::SetDone(done)).await;
        Ok(())
    }

    /// The entry of what was asked to be set, if there is to be one: also when the operator leaves while it is set or told.
    fn note(&self, resource: String) -> Option<PendingEntry> {
        let Call { caller, peer, request_id } = &self.call;
        if !self.api.audit.notes(caller) {
            return None;
        }
        let row = AuditRow {
            key: 0,
            time: Timestamp::now(),
            actor: caller.grant.actor(),
            credential: caller.grant.credential.clone(),
            method: "tidegate.v1.ConfigService/Configure".to_owned(),
            resource: String::new(),
            outcome: String::new(),
            peer: peer.clone(),
            request_id: request_id.clone(),
        };
        Some(PendingEntry::new(self.api.audit.clone(), row, Arc::new(Mutex::new(resource))))
    }

    async fn set_matching(&mut self, selector: &LabelSelector, change: &ConfigChange, done: &mut pb::SetConfigDone) -> Result<(), Status> {
        let selector = &selector.clone().and(self.call.caller.scope());
        let mut after = String::new();
        loop {
            let (rows, more) = self.api.registry.list(selector, &after, DEVICES_PER_READ).await.map_err(Failure::from)?;
            for row in &rows {
                self.may_go_on()?;
                self.set_one(&row.id, change.clone(), done).await?;
            }
            match rows.last() {
                Some(last) if more => after = last.id.to_string(),
                _ => return Ok(()),
            }
        }
    }

    /// What became of it as a whole, which was told.
    async fn set_one(&mut self, id: &DeviceId, change: ConfigChange, done: &mut pb::SetConfigDone) -> Result<Code, Status> {
        match self.set_and_watch(id, change).await {
            Ok((device, row)) => {
                done.accepted += 1;
                self.show(device.key, id, &row.request_id, Step::accepted(&row)).await;
                // A poke may have been told to somebody who did not watch the device yet.
                self.show_news(device.key, id).await?;
                Ok(Code::Ok)
            }
            Err(error) => {
                done.refused += 1;
                let code = error.reason().code();
                self.refuse(&done.request_id, id.as_str(), error).await?;
                Ok(code)
            }
        }
    }

    async fn set_and_watch(&mut self, id: &DeviceId, change: ConfigChange) -> Result<(Arc<Device>, ConfigRevisionRow), Error> {
        let device = self.call.caller.device(&self.api.registry, id).await?;
        // Before anything is changed.
        self.watching.check_room_for(device.key, "set.target")?;
        let row = self.api.configs.set(&device, change).await?;
        self.watching.devices.insert(device.key);
        Ok((device, row))
    }

    async fn watch(&mut self, watch: pb::WatchConfig) -> Result<(), Status> {
        let started = match parse_watch(&watch) {
            Ok(Target::Device(id)) => match self.watch_one(&id).await {
                Ok(key) => self.show_standing(key, &id).await,
                Err(error) => return self.refuse("", id.as_str(), error).await,
            },
            Ok(Target::Matching(selector)) => match self.watch_matching(&selector) {
                Ok(selector) => self.look_at(&selector, Look::Standing).await,
                Err(error) => return self.refuse("", "", error).await,
            },
            Err(error) => return self.refuse("", "", error).await,
        };
        started?;
        self.stays = true;
        self.send(configure_response::Message::WatchStarted(pb::WatchStarted {})).await;
        Ok(())
    }

    fn watch_matching(&mut self, selector: &LabelSelector) -> Result<LabelSelector, Error> {
        let visible = selector.clone().and(self.call.caller.scope());
        self.watching.add_selector(&visible).map(|()| visible)
    }

    async fn watch_one(&mut self, id: &DeviceId) -> Result<DeviceKey, Error> {
        let device = self.call.caller.device(&self.api.registry, id).await?;
        self.watching.check_room_for(device.key, "watch.target")?;
        self.watching.devices.insert(device.key);
        Ok(device.key)
    }

    async fn show_news_of(&mut self, key: DeviceKey) -> Result<(), Status> {
        match self.api.registry.by_key(key).await.map_err(Failure::from)? {
            Some(device) if self.sees(key, &device.row().labels) => self.show_news(key, &device.id).await,
            _ => Ok(()),
        }
    }

    async fn show_all_news(&mut self) -> Result<(), Status> {
        self.pokes = self.api.configs.pokes();
        self.look_at(&LabelSelector::default(), Look::News).await
    }

    /// Whether a device is watched, and still one that the operator may see.
    fn sees(&self, key: DeviceKey, labels: &Labels) -> bool {
        self.watching.includes(key, labels) && self.call.caller.scope().matches(labels)
    }

    /// Looks at the watched devices among those that match.
    async fn look_at(&mut self, selector: &LabelSelector, look: Look) -> Result<(), Status> {
        let mut after = String::new();
        loop {
            let (rows, more) = self.api.registry.list(selector, &after, DEVICES_PER_READ).await.map_err(Failure::from)?;
            for row in rows.iter().filter(|row| self.sees(row.key, &row.labels)).collect::<Vec<_>>() {
                self.may_go_on()?;
                match look {
                    Look::News => self.show_news(row.key, &row.id).await?,
                    Look::Standing => self.show_standing(row.key, &row.id).await?,
                }
            }
            match rows.last() {
                Some(last) if more => after = last.id.to_string(),
                _ => return Ok(()),
            }
        }
    }

    /// Shows where the device stands, when it was never shown.
    async fn show_standing(&mut self, key: DeviceKey, id: &DeviceId) -> Result<(), Status> {
        if self.shown.contains_key(&key) {
            return self.show_news(key, id).await;
        }
        let Some((desired, state)) = self.api.configs.state(key).await.map_err(Failure::from)? else { return Ok(()) };
        if let Some(step) = Step::all(&desired, &state).pop() {
            self.show(key, id, &desired.request_id, step).await;
        }
        Ok(())
    }

    /// Shows the steps behind the one that was shown last.
    async fn show_news(&mut self, key: DeviceKey, id: &DeviceId) -> Result<(), Status> {
        let Some((desired, state)) = self.api.configs.state(key).await.map_err(Failure::from)? else { return Ok(()) };
        let steps = Step::all(&desired, &state);
        let news_from = match self.shown.get(&key) {
            Some(shown) if shown.revision > desired.revision => return Ok(()),
            Some(shown) if shown.revision == desired.revision => match steps.iter().position(|step| step.mark == *shown) {
                Some(index) => index + 1,
                // The last step was replaced, as applied by reverted.
                None => steps.len() - 1,
            },
            _ => 0,
        };
        for step in steps.into_iter().skip(news_from) {
            self.show(key, id, &desired.request_id, step).await;
        }
        Ok(())
    }

    async fn show(&mut self, key: DeviceKey, id: &DeviceId, request_id: &str, step: Step) {
        let Step { mark, detail } = step;
        if self.shown.get(&key).is_none_or(|shown| shown.revision <= mark.revision) {
            self.shown.insert(key, mark);
        }
        let event = pb::ConfigEvent {
            request_id: request_id.to_owned(),
            device: id.to_string(),
            revision: mark.revision,
            state: mark.state as i32,
            event_time: Some(mark.time.to_proto()),
            detail,
            etag: etag(mark.revision),
        };
        self.send(configure_response::Message::Event(event)).await;
    }

    async fn refuse(&self, request_id: &str, device: &str, error: Error) -> Result<(), Status> {
        let current_etag = match &error {
            Error::ConfigEtagMismatch { current, .. } => current.clone(),
            _ => String::new(),
        };
        match error.reason() {
            reason @ (Reason::InvalidArgument
            | Reason::DeviceNotFound
            | Reason::PermissionDenied
            | Reason::ConfigEtagMismatch
            | Reason::ConfigTooLarge) => {
                let refusal = pb::ConfigRefusal {
                    request_id: request_id.to_owned(),
                    device: device.to_owned(),
                    reason: reason.as_str().to_owned(),
                    message: error.to_string(),
                    current_etag,
                };
                self.send(configure_response::Message::Refusal(refusal)).await;
                Ok(())
            }
            // What is no fault of this one request ends the stream.
            _ => Err(error.into()),
        }
    }

    /// An error when the gateway is being stopped: asked between two devices, of which there may be many.
    fn may_go_on(&self) -> Result<(), Error> {
        if self.drain.is_cancelled() { Err(Error::Draining) } else { Ok(()) }
    }

    async fn send(&self, message: configure_response::Message) {
        self.outbound.send(pb::ConfigureResponse { message: Some(message) }).await;
    }
}

/// Writes an entry, which is there before the answer.
async fn write(note: Option<PendingEntry>, code: Code) {
    if let Some(written) = note.and_then(|mut note| note.write(code)) {
        // A panic of it was told by the runtime; the operator is answered all the same.
        let _ = written.await;
    }
}

/// Which devices a desk watches.
#[derive(Default)]
struct Watching {
    devices: HashSet<DeviceKey>,
    selectors: Vec<LabelSelector>,
}

impl Watching {
    fn includes(&self, key: DeviceKey, labels: &Labels) -> bool {
        self.devices.contains(&key) || self.selectors.iter().any(|selector| selector.matches(labels))
    }

    fn is_empty(&self) -> bool {
        self.devices.is_empty() && self.selectors.is_empty()
    }

    /// Whether it may be added to the devices; `field` is blamed when not.
    fn check_room_for(&self, key: DeviceKey, field: &str) -> Result<(), Error> {
        if self.devices.len() < DEVICES_WATCHED_MAX || self.devices.contains(&key) {
            return Ok(());
        }
        Err(Error::invalid(
            field,
            format!("this stream watches {DEVICES_WATCHED_MAX} devices, which is the most: use another one for more"),
        ))
    }

    fn add_selector(&mut self, selector: &LabelSelector) -> Result<(), Error> {
        if self.selectors.contains(selector) {
            return Ok(());
        }
        if self.selectors.len() >= SELECTORS_WATCHED_MAX {
            let why = format!("this stream watches {SELECTORS_WATCHED_MAX} selectors, which is the most: use another one for more");
            return Err(Error::invalid("watch.label_selector", why));
        }
        self.selectors.push(selector.clone());
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Look {
    Standing,
    News,
}

/// One step of a revision on its way to a device.
#[derive(Debug)]
pub struct Step {
    /// Which one.
    pub mark: Mark,
    /// What the device said about it.
    pub detail: String,
}

/// All by which one step differs from another of the same device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The revision.
    pub revision: u64,
    /// How far it has come.
    pub state: pb::ConfigState,
    /// When it came there.
    pub time: Timestamp,
}

impl Step {
    fn new(revision: u64, state: pb::ConfigState, time: Timestamp) -> Self {
        Self { mark: Mark { revision, state, time }, detail: String::new() }
    }

    fn accepted(desired: &ConfigRevisionRow) -> Self {
        Self::new(desired.revision, pb::ConfigState::Accepted, desired.create_time)
    }

    /// All steps that the desired revision has come, in order; at least the first.
    pub fn all(desired: &ConfigRevisionRow, state: &ConfigStateRow) -> Vec<Self> {
        let revision = desired.revision;
        let mut steps = vec![Self::accepted(desired)];
        if let Some((delivered, time)) = state.delivered
            && delivered == revision
        {
            steps.push(Self::new(revision, pb::ConfigState::Delivered, time));
        }
        if let Some(report) = state.reported.as_ref().filter(|report| report.revision == revision) {
            let state = match report.outcome {
                ConfigOutcome::Applied => pb::ConfigState::Applied,
                ConfigOutcome::Rejected => pb::ConfigState::Rejected,
                ConfigOutcome::Reverted => pb::ConfigState::Reverted,
            };
            steps.push(Self { detail: report.detail.clone(), ..Self::new(revision, state, report.time) });
        }
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_desk_watches_a_limited_number_of_devices_and_none_twice() {
        let mut watching = Watching::default();
        for key in 0..DEVICES_WATCHED_MAX as i64 {
            watching.check_room_for(DeviceKey(key), "set.target").expect("room");
            watching.devices.insert(DeviceKey(key));
        }
        watching.check_room_for(DeviceKey(5), "set.target").expect("watched already");
        let error = watching.check_room_for(DeviceKey(-1), "set.target").expect_err("full");
        assert_eq!(error.to_string(), "set.target: this stream watches 100000 devices, which is the most: use another one for more");
    }
}
