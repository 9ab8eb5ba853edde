//! `OperatorService`: operators, their tokens, and what they did.

use super::{credential::encode_credential, parse};
use crate::{
    auth::{AuditLog, Caller, Directory, Issue, Principal, Role},
    error::{Error, Failure, Violations},
    model::{LabelSelector, Timestamp},
    pb::{self, operator_service_server::OperatorService},
    store::{AuditQuery, AuditRow, CredentialKind, OperatorRow},
};
use tonic::{Request, Response, Status};

const NAME_CHARS_MAX: usize = 64;
const PAGE_SIZE_DEFAULT: usize = 100;
const PAGE_SIZE_MAX: usize = 1_000;

/// See the module.
pub struct OperatorApi {
    /// Operators and tokens.
    pub directory: Directory,
    /// What they did.
    pub audit: AuditLog,
}

#[tonic::async_trait]
impl OperatorService for OperatorApi {
    async fn get_identity(&self, request: Request<pb::GetIdentityRequest>) -> Result<Response<pb::GetIdentityResponse>, Status> {
        let Caller { grant, .. } = Caller::of(request.extensions());
        let (role, scope) = match &grant.principal {
            Principal::Operator(operator) => (operator.role.code(), operator.scope.to_string()),
            _ => (pb::OperatorRole::Unspecified as i32, String::new()),
        };
        let expire_time = grant.expire_time.map(Timestamp::to_proto);
        let credential = grant.credential.clone();
        Ok(Response::new(pb::GetIdentityResponse { actor: grant.actor(), role, scope, credential, expire_time }))
    }

    async fn create_operator(&self, request: Request<pb::CreateOperatorRequest>) -> Result<Response<pb::CreateOperatorResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let wanted = parse_operator(request.into_inner().operator.unwrap_or_default())?;
        caller.about(resource(&wanted.name));
        let created = self.directory.create_operator(&wanted.name, wanted.role, &wanted.scope).await?;
        Ok(Response::new(pb::CreateOperatorResponse { operator: Some(encode_operator(created)) }))
    }

    async fn get_operator(&self, request: Request<pb::GetOperatorRequest>) -> Result<Response<pb::GetOperatorResponse>, Status> {
        let found = self.directory.operator(&request.into_inner().operator).await?;
        Ok(Response::new(pb::GetOperatorResponse { operator: Some(encode_operator(found)) }))
    }

    async fn list_operators(&self, request: Request<pb::ListOperatorsRequest>) -> Result<Response<pb::ListOperatorsResponse>, Status> {
        let request = request.into_inner();
        let mut violations = Violations::new();
        let page_size = parse::page_size(&mut violations, request.page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX);
        let after = parse::page_token(&mut violations, &request.page_token);
        violations.into_result()?;
        let mut rows = self.directory.operators(&after, page_size + 1).await.map_err(Failure::from)?;
        let more = rows.len() > page_size;
        rows.truncate(page_size);
        let next_page_token = rows.last().filter(|_| more).map(|last| parse::next_page_token(&last.name)).unwrap_or_default();
        Ok(Response::new(pb::ListOperatorsResponse { operators: rows.into_iter().map(encode_operator).collect(), next_page_token }))
    }

    async fn update_operator(&self, request: Request<pb::UpdateOperatorRequest>) -> Result<Response<pb::UpdateOperatorResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let wanted = parse_operator(request.into_inner().operator.unwrap_or_default())?;
        caller.about(resource(&wanted.name));
        if caller.grant.actor() == resource(&wanted.name) && wanted.role != Role::Admin {
            return Err(Error::invalid("operator.role", "nobody takes the role ADMIN from themselves: another administrator can").into());
        }
        let updated = self.directory.update_operator(&wanted.name, wanted.role, &wanted.scope).await?;
        Ok(Response::new(pb::UpdateOperatorResponse { operator: Some(encode_operator(updated)) }))
    }

    async fn delete_operator(&self, request: Request<pb::DeleteOperatorRequest>) -> Result<Response<pb::DeleteOperatorResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let name = request.into_inner().operator;
        self.directory.operator(&name).await?;
        caller.about(resource(&name));
        if caller.grant.actor() == resource(&name) {
            return Err(Error::invalid("operator", "nobody deletes themselves: another administrator can").into());
        }
        self.directory.delete_operator(&name).await?;
        Ok(Response::new(pb::DeleteOperatorResponse {}))
    }

    async fn create_operator_token(
        &self,
        request: Request<pb::CreateOperatorTokenRequest>,
    ) -> Result<Response<pb::CreateOperatorTokenResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let request = request.into_inner();
        let mut violations = Violations::new();
        parse::description(&mut violations, "description", &request.description);
        let expire_time = parse::expire_time(&mut violations, "expire_time", request.expire_time.as_ref());
        violations.into_result()?;
        let operator = self.directory.operator(&request.operator).await?;
        caller.about(resource(&operator.name));
        let issue = Issue::token(CredentialKind::Operator, operator.key.0, request.description, expire_time);
        let (row, token) = self.directory.issue(issue).await?;
        Ok(Response::new(pb::CreateOperatorTokenResponse { credential: Some(encode_credential(row)), token }))
    }

    async fn list_operator_tokens(
        &self,
        request: Request<pb::ListOperatorTokensRequest>,
    ) -> Result<Response<pb::ListOperatorTokensResponse>, Status> {
        let operator = self.directory.operator(&request.into_inner().operator).await?;
        let rows = self.directory.credentials(CredentialKind::Operator, operator.key.0).await.map_err(Failure::from)?;
        Ok(Response::new(pb::ListOperatorTokensResponse { credentials: rows.into_iter().map(encode_credential).collect() }))
    }

    async fn revoke_operator_token(
        &self,
        request: Request<pb::RevokeOperatorTokenRequest>,
    ) -> Result<Response<pb::RevokeOperatorTokenResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let request = request.into_inner();
        let operator = self.directory.operator(&request.operator).await?;
        caller.about(resource(&operator.name));
        self.directory.revoke(CredentialKind::Operator, operator.key.0, &request.credential).await?;
        Ok(Response::new(pb::RevokeOperatorTokenResponse {}))
    }

    async fn list_audit_entries(
        &self,
        request: Request<pb::ListAuditEntriesRequest>,
    ) -> Result<Response<pb::ListAuditEntriesResponse>, Status> {
        let query = parse_audit(request.into_inner())?;
        let page_size = query.rows_max;
        let mut rows = self.audit.read(&AuditQuery { rows_max: page_size + 1, ..query }).await.map_err(Failure::from)?;
        let more = rows.len() > page_size;
        rows.truncate(page_size);
        let next_page_token = rows.last().filter(|_| more).map(|last| parse::next_page_token(last.key)).unwrap_or_default();
        Ok(Response::new(pb::ListAuditEntriesResponse { entries: rows.into_iter().map(encode_entry).collect(), next_page_token }))
    }
}

/// An operator as the audit log names it.
fn resource(name: &str) -> String {
    format!("operators/{name}")
}

/// What an operator shall be.
struct Wanted {
    name: String,
    role: Role,
    scope: String,
}

fn parse_operator(operator: pb::Operator) -> Result<Wanted, Error> {
    let mut violations = Violations::new();
    violations.check("operator.name", check_name(&operator.name));
    let role = Role::from_code(operator.role).ok_or_else(|| format!("{} is not a role", operator.role));
    let role = violations.check("operator.role", role);
    let scope = violations.check("operator.scope", LabelSelector::parse(&operator.scope)).unwrap_or_default();
    if role == Some(Role::Admin) && !scope.is_empty() {
        violations.add("operator.scope", "an administrator has none: it could give itself any other");
    }
    violations.into_result()?;
    Ok(Wanted { name: operator.name, role: role.ok_or(Error::Internal)?, scope: scope.to_string() })
}

fn check_name(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._@-".contains(&byte);
    let begins_well = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    match begins_well && name.len() <= NAME_CHARS_MAX && name.bytes().all(allowed) {
        true => Ok(()),
        false => Err(format!("1 to {NAME_CHARS_MAX} characters of A-Z a-z 0-9 . _ @ - are needed, beginning with a letter or digit")),
    }
}

fn parse_audit(request: pb::ListAuditEntriesRequest) -> Result<AuditQuery, Error> {
    let mut violations = Violations::new();
    let start = parse::time(&mut violations, "start_time", request.start_time.as_ref()).unwrap_or(Timestamp::MIN);
    let end = parse::time(&mut violations, "end_time", request.end_time.as_ref()).unwrap_or(Timestamp::MAX);
    let rows_max = parse::page_size(&mut violations, request.page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX);
    let before = match parse::page_token(&mut violations, &request.page_token).as_str() {
        "" => Some(i64::MAX),
        text => violations.check("page_token", text.parse().map_err(|_| "this is not a next_page_token that the gateway gave".to_owned())),
    };
    violations.into_result()?;
    Ok(AuditQuery { actor: request.actor, resource: request.resource, start, end, before: before.ok_or(Error::Internal)?, rows_max })
}

fn encode_operator(row: OperatorRow) -> pb::Operator {
    pb::Operator {
        name: row.name,
        role: row.role,
        scope: row.scope,
        create_time: Some(row.create_time.to_proto()),
        update_time: Some(row.update_time.to_proto()),
    }
}

fn encode_entry(row: AuditRow) -> pb::AuditEntry {
    pb::AuditEntry {
        time: Some(row.time.to_proto()),
        actor: row.actor,
        credential: row.credential,
        method: row.method,
        resource: row.resource,
        outcome: row.outcome,
        peer: row.peer,
        request_id: row.request_id,
    }
}
