//! `CredentialService`: the tokens of devices, and the keys with which new devices make their own identities.

use super::parse;
use crate::{
    auth::{Caller, Directory, Issue, Principal},
    error::{Error, Failure, Violations},
    fleet::{Device, Registry, to_the_end},
    model::{DeviceId, Labels, Timestamp},
    pb::{self, credential_service_server::CredentialService},
    store::{CredentialKind, CredentialRow},
};
use std::{sync::Arc, time::Duration};
use tonic::{Request, Response, Status};

const USES_MAX: i64 = 1_000_000;
/// How long an enrolment key may be good: it lies about in many places.
const ENROLMENT_KEY_AGE_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct CredentialApi {
    /// The devices.
    pub registry: Registry,
    /// The credentials.
    pub directory: Directory,
}

#[tonic::async_trait]
impl CredentialService for CredentialApi {
    async fn create_device_credential(
        &self,
        request: Request<pb::CreateDeviceCredentialRequest>,
    ) -> Result<Response<pb::CreateDeviceCredentialResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let request = request.into_inner();
        caller.about(parse::resource(&request.device));
        let mut violations = Violations::new();
        let id = violations.check("device", DeviceId::parse(&request.device));
        parse::description(&mut violations, "description", &request.description);
        let expire_time = parse::expire_time(&mut violations, "expire_time", request.expire_time.as_ref());
        violations.into_result()?;
        let device = caller.device(&self.registry, &id.ok_or(Error::Internal)?).await?;
        let (row, token) = self.issue_for(&device, request.description, expire_time).await?;
        Ok(Response::new(pb::CreateDeviceCredentialResponse { credential: Some(encode_credential(row)), token }))
    }

    async fn list_device_credentials(
        &self,
        request: Request<pb::ListDeviceCredentialsRequest>,
    ) -> Result<Response<pb::ListDeviceCredentialsResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let device = caller.device(&self.registry, &parse::device(&request.into_inner().device)?).await?;
        let rows = self.directory.credentials(CredentialKind::Device, device.key.0).await.map_err(Failure::from)?;
        Ok(Response::new(pb::ListDeviceCredentialsResponse { credentials: rows.into_iter().map(encode_credential).collect() }))
    }

    async fn revoke_device_credential(
        &self,
        request: Request<pb::RevokeDeviceCredentialRequest>,
    ) -> Result<Response<pb::RevokeDeviceCredentialResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let request = request.into_inner();
        caller.about(parse::resource(&request.device));
        let device = caller.device(&self.registry, &parse::device(&request.device)?).await?;
        self.directory.revoke(CredentialKind::Device, device.key.0, &request.credential).await?;
        Ok(Response::new(pb::RevokeDeviceCredentialResponse {}))
    }

    async fn create_enrolment_key(
        &self,
        request: Request<pb::CreateEnrolmentKeyRequest>,
    ) -> Result<Response<pb::CreateEnrolmentKeyResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let issue = parse_key(request.into_inner().enrolment_key.unwrap_or_default())?;
        caller.may_label(&issue.labels)?;
        let (row, key) = self.directory.issue(issue).await?;
        caller.about(format!("enrolmentKeys/{}", row.id));
        Ok(Response::new(pb::CreateEnrolmentKeyResponse { enrolment_key: Some(encode_key(row)), key }))
    }

    async fn list_enrolment_keys(
        &self,
        request: Request<pb::ListEnrolmentKeysRequest>,
    ) -> Result<Response<pb::ListEnrolmentKeysResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let rows = self.directory.credentials(CredentialKind::Enrolment, 0).await.map_err(Failure::from)?;
        let visible = rows.into_iter().filter(|row| caller.scope().matches(&row.labels));
        Ok(Response::new(pb::ListEnrolmentKeysResponse { enrolment_keys: visible.map(encode_key).collect() }))
    }

    async fn revoke_enrolment_key(
        &self,
        request: Request<pb::RevokeEnrolmentKeyRequest>,
    ) -> Result<Response<pb::RevokeEnrolmentKeyResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let id = request.into_inner().enrolment_key;
        let row = self.directory.enrolment_key(&id).await;
        // As with devices: one that can't be seen is like one that is not there.
        match (&row, caller.scope().is_empty()) {
            (Ok(row), _) => caller.may_label(&row.labels)?,
            (Err(Failure::Refused(_)), false) => return Err(Error::PermissionDenied.into()),
            _ => {}
        }
        let id = row?.id;
        caller.about(format!("enrolmentKeys/{id}"));
        self.directory.revoke(CredentialKind::Enrolment, 0, &id).await?;
        Ok(Response::new(pb::RevokeEnrolmentKeyResponse {}))
    }

    async fn enrol(&self, request: Request<pb::EnrolRequest>) -> Result<Response<pb::EnrolResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let pb::EnrolRequest { device, display_name } = request.into_inner();
        caller.about(parse::resource(&device));
        let mut violations = Violations::new();
        let id = violations.check("device", DeviceId::parse(&device));
        parse::description(&mut violations, "display_name", &display_name);
        violations.into_result()?;
        let Principal::Enrolment { key, labels } = &caller.grant.principal else { return Err(Error::PermissionDenied.into()) };
        let (api, key, labels, id) = (self.clone(), key.clone(), labels.clone(), id.ok_or(Error::Internal)?);
        // A device without its token could not enrol again.
        let (row, token) = to_the_end(async move { api.enrol_as(&id, labels, &display_name, &key).await }).await?;
        Ok(Response::new(pb::EnrolResponse { credential: Some(encode_credential(row)), token }))
    }
}

impl CredentialApi {
    async fn enrol_as(&self, id: &DeviceId, labels: Labels, name: &str, key: &str) -> Result<(CredentialRow, String), Failure> {
        self.directory.use_enrolment_key(key).await?;
        let device = match self.registry.create(id, labels, name).await {
            Ok(device) => device,
            Err(failure) => {
                self.directory.give_back_enrolment_key(key).await?;
                return Err(failure);
            }
        };
        tracing::info!(device = %id, key, "device.enrolled");
        self.issue_for(&device, format!("enrolled with {key}"), None).await
    }

    async fn issue_for(
        &self,
        device: &Arc<Device>,
        description: String,
        expire_time: Option<Timestamp>,
    ) -> Result<(CredentialRow, String), Failure> {
        self.directory.issue(Issue::token(CredentialKind::Device, device.key.0, description, expire_time)).await
    }
}

fn parse_key(key: pb::EnrolmentKey) -> Result<Issue, Error> {
    let mut violations = Violations::new();
    parse::description(&mut violations, "enrolment_key.description", &key.description);
    let labels = violations.check_all(Labels::parse("enrolment_key.labels", key.labels)).unwrap_or_default();
    if !(1..=USES_MAX).contains(&key.uses_max) {
        violations.add("enrolment_key.uses_max", format!("{} is not in 1 to {USES_MAX}", key.uses_max));
    }
    let expire_time = parse::expire_time(&mut violations, "enrolment_key.expire_time", key.expire_time.as_ref());
    if expire_time.is_none_or(|time| time > Timestamp::now().saturating_add(ENROLMENT_KEY_AGE_MAX)) {
        violations.add("enrolment_key.expire_time", "it is needed, and must be within a year");
    }
    violations.into_result()?;
    let uses_max = key.uses_max.unsigned_abs();
    Ok(Issue { kind: CredentialKind::Enrolment, owner: 0, description: key.description, expire_time, labels, uses_max })
}

/// What is shown of a token.
pub fn encode_credential(row: CredentialRow) -> pb::Credential {
    pb::Credential {
        id: row.id,
        description: row.description,
        create_time: Some(row.create_time.to_proto()),
        expire_time: row.expire_time.map(Timestamp::to_proto),
    }
}

fn encode_key(row: CredentialRow) -> pb::EnrolmentKey {
    pb::EnrolmentKey {
        id: row.id,
        description: row.description,
        labels: row.labels.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        uses_max: i64::try_from(row.uses_max).unwrap_or(i64::MAX),
        uses: i64::try_from(row.uses).unwrap_or(i64::MAX),
        create_time: Some(row.create_time.to_proto()),
        expire_time: row.expire_time.map(Timestamp::to_proto),
    }
}
