//! `ConfigService`: operators set desired configurations and watch devices take them.

use super::{
    ResponseStream,
    desk::{Call, Desk, Step},
    driven::driven,
    parse,
};
use crate::{
    auth::{AuditLog, Caller},
    error::{Error, Failure, Violations},
    fleet::{ConfigChange, Configs, Device, Registry, configs::etag},
    middleware::Draining,
    model::{DeviceId, LabelSelector, structs},
    pb::{self, config_service_server::ConfigService, set_config, watch_config},
    store::{ConfigRevisionRow, Store, StoreError},
};
use futures_util::StreamExt;
use prost::Message;
use tonic::{Request, Response, Status, Streaming};

/// How many messages may wait for an operator who does not read.
const OUTBOUND_MAX: usize = 64;
const REQUEST_ID_CHARS_MAX: usize = 64;
const COMMENT_BYTES_MAX: usize = 1024;
const PAGE_SIZE_DEFAULT: usize = 50;
const PAGE_SIZE_MAX: usize = 1_000;
/// Few, as each may be as large as a configuration.
const REVISIONS_PER_READ: usize = 16;

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct ConfigApi {
    /// The devices.
    pub registry: Registry,
    /// Their configurations.
    pub configs: Configs,
    /// The history.
    pub store: Store,
    /// Where it is noted what operators set.
    pub audit: AuditLog,
}

#[tonic::async_trait]
impl ConfigService for ConfigApi {
    type ConfigureStream = ResponseStream<pb::ConfigureResponse>;

    async fn configure(&self, request: Request<Streaming<pb::ConfigureRequest>>) -> Result<Response<Self::ConfigureStream>, Status> {
        let (call, drain) = (Call::of(request.extensions()), Draining::of(request.extensions()));
        let inbound = request.into_inner();
        let api = self.clone();
        let responses = driven(OUTBOUND_MAX, move |outbound| Desk::new(api, call, drain, outbound).run(inbound));
        Ok(Response::new(responses.boxed()))
    }

    async fn get_config(&self, request: Request<pb::GetConfigRequest>) -> Result<Response<pb::GetConfigResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let device = caller.device(&self.registry, &parse::device(&request.into_inner().device)?).await?;
        let found = self.configs.state(device.key).await.map_err(Failure::from)?;
        let (desired, state) = found.ok_or_else(|| Error::ConfigNotFound(device.id.clone()))?;
        let step = Step::all(&desired, &state).pop().ok_or(Error::Internal)?;
        let config = pb::DeviceConfig {
            device: device.id.to_string(),
            desired: Some(encode_revision(&device, desired)?),
            state: step.mark.state as i32,
            detail: step.detail,
            state_time: Some(step.mark.time.to_proto()),
            applied_revision: state.applied_revision,
        };
        Ok(Response::new(pb::GetConfigResponse { config: Some(config) }))
    }

    async fn list_config_revisions(
        &self,
        request: Request<pb::ListConfigRevisionsRequest>,
    ) -> Result<Response<pb::ListConfigRevisionsResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let request = request.into_inner();
        let mut violations = Violations::new();
        let id = violations.check("device", DeviceId::parse(&request.device));
        let page_size = parse::page_size(&mut violations, request.page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX);
        let before = match parse::page_token(&mut violations, &request.page_token).as_str() {
            "" => Some(i64::MAX as u64),
            text => {
                violations.check("page_token", text.parse().map_err(|_| "this is not a next_page_token that the gateway gave".to_owned()))
            }
        };
        violations.into_result()?;
        let device = caller.device(&self.registry, &id.ok_or(Error::Internal)?).await?;
        let before = before.ok_or(Error::Internal)?;
        let (revisions, more) = self.revisions_page(&device, before, page_size).await?;
        let last = revisions.last().filter(|_| more);
        let next_page_token = last.map(|last| parse::next_page_token(last.revision)).unwrap_or_default();
        Ok(Response::new(pb::ListConfigRevisionsResponse { revisions, next_page_token }))
    }
}

impl ConfigApi {
    /// The revisions before `before`, newest first: at most `revisions_max`, and no further one when they are a message full;
    /// and whether there are more.
    async fn revisions_page(
        &self,
        device: &Device,
        mut before: u64,
        revisions_max: usize,
    ) -> Result<(Vec<pb::ConfigRevision>, bool), Failure> {
        let (mut page, mut bytes) = (Vec::new(), 0);
        loop {
            let rows = self.store.config_revisions(device.key, before, REVISIONS_PER_READ).await?;
            let Some(last) = rows.last() else { return Ok((page, false)) };
            before = last.revision;
            for row in rows {
                if page.len() >= revisions_max || bytes >= pb::MESSAGE_BYTES {
                    return Ok((page, true));
                }
                let revision = encode_revision(device, row)?;
                bytes += revision.encoded_len();
                page.push(revision);
            }
        }
    }
}

/// Whom a request is about.
pub(super) enum Target {
    Device(DeviceId),
    Matching(LabelSelector),
}

pub(super) fn parse_set(set: pb::SetConfig) -> Result<(Target, ConfigChange), Error> {
    let mut violations = Violations::new();
    let fits = (1..=REQUEST_ID_CHARS_MAX).contains(&set.request_id.len()) && set.request_id.bytes().all(|byte| byte.is_ascii_graphic());
    if !fits {
        violations.add("set.request_id", format!("1 to {REQUEST_ID_CHARS_MAX} printable ASCII characters are needed"));
    }
    if set.comment.len() > COMMENT_BYTES_MAX {
        violations.add("set.comment", format!("{} bytes: at most {COMMENT_BYTES_MAX} are allowed", set.comment.len()));
    }
    let target = match &set.target {
        Some(set_config::Target::Device(id)) => violations.check("set.device", DeviceId::parse(id)).map(Target::Device),
        Some(set_config::Target::LabelSelector(text)) => {
            if !set.etag.is_empty() {
                violations.add("set.etag", "it names one device's revision: it can't go with a selector");
            }
            let selector = violations.check("set.label_selector", LabelSelector::parse(text));
            if selector.as_ref().is_some_and(LabelSelector::is_empty) {
                violations.add("set.label_selector", "an empty selector would set every device");
            }
            selector.map(Target::Matching)
        }
        None => {
            violations.add("set.target", "neither `device` nor `label_selector` is there");
            None
        }
    };
    let config = match &set.config {
        Some(config) => violations.check("set.config", structs::to_json(config)),
        None => {
            violations.add("set.config", "it is missing; an empty object is a configuration");
            None
        }
    };
    violations.into_result()?;
    let (target, config) = target.zip(config).ok_or(Error::Internal)?;
    let config = serde_json::Value::Object(config).to_string();
    Ok((target, ConfigChange { config, request_id: set.request_id, etag: set.etag, comment: set.comment }))
}

pub(super) fn parse_watch(watch: &pb::WatchConfig) -> Result<Target, Error> {
    match &watch.target {
        Some(watch_config::Target::Device(id)) => {
            DeviceId::parse(id).map(Target::Device).map_err(|why| Error::invalid("watch.device", why))
        }
        Some(watch_config::Target::LabelSelector(text)) => {
            LabelSelector::parse(text).map(Target::Matching).map_err(|why| Error::invalid("watch.label_selector", why))
        }
        None => Err(Error::invalid("watch.target", "neither `device` nor `label_selector` is there")),
    }
}

fn encode_revision(device: &Device, row: ConfigRevisionRow) -> Result<pb::ConfigRevision, Failure> {
    let config = serde_json::from_str(&row.config);
    let config = config.map_err(|why| StoreError::Damaged(format!("revision {} of {}: {why}", row.revision, device.id)))?;
    Ok(pb::ConfigRevision {
        revision: row.revision,
        etag: etag(row.revision),
        config: Some(structs::from_json(&config)),
        create_time: Some(row.create_time.to_proto()),
        request_id: row.request_id,
        comment: row.comment,
    })
}
