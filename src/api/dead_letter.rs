//! `DeadLetterService`: what was rejected, to be looked at and to be stored after all.

use super::parse;
use crate::{
    auth::Caller,
    error::{Error, Failure, Violations},
    fleet::{Device, Registry},
    ingest::{Ingest, Outcome},
    model::{DeviceId, batch::reason_from_name},
    pb::{self, dead_letter_service_server::DeadLetterService},
    store::{DeadLetterRow, Store},
};
use std::sync::Arc;
use tonic::{Request, Response, Status};

const PAGE_SIZE_DEFAULT: usize = 100;
const PAGE_SIZE_MAX: usize = 1_000;

/// See the module.
pub struct DeadLetterApi {
    /// The devices.
    pub registry: Registry,
    /// What of theirs was rejected.
    pub store: Store,
    /// Where it is judged once more.
    pub ingest: Ingest,
}

#[tonic::async_trait]
impl DeadLetterService for DeadLetterApi {
    async fn list_dead_letters(
        &self,
        request: Request<pb::ListDeadLettersRequest>,
    ) -> Result<Response<pb::ListDeadLettersResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let request = request.into_inner();
        let mut violations = Violations::new();
        let id = violations.check("device", DeviceId::parse(&request.device));
        let page_size = parse::page_size(&mut violations, request.page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX);
        let token = parse::page_token(&mut violations, &request.page_token);
        let after = match token.is_empty() {
            true => Some(0),
            false => violations.check("page_token", token.parse().map_err(|_| "this is not one that the gateway gave".to_owned())),
        };
        violations.into_result()?;
        let device = caller.device(&self.registry, &id.ok_or(Error::Internal)?).await?;
        let after = after.ok_or(Error::Internal)?;
        let mut rows = self.store.dead_letters(device.key, after, page_size + 1).await.map_err(Failure::from)?;
        let more = rows.len() > page_size;
        rows.truncate(page_size);
        let next_page_token = rows.last().filter(|_| more).map(|row| parse::next_page_token(row.id)).unwrap_or_default();
        Ok(Response::new(pb::ListDeadLettersResponse { dead_letters: rows.into_iter().map(encode).collect(), next_page_token }))
    }

    async fn get_dead_letter(&self, request: Request<pb::GetDeadLetterRequest>) -> Result<Response<pb::GetDeadLetterResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let pb::GetDeadLetterRequest { device, id } = request.into_inner();
        let (_, row) = self.find(&caller, &device, id).await?;
        Ok(Response::new(pb::GetDeadLetterResponse { dead_letter: Some(encode(row)) }))
    }

    async fn replay_dead_letter(
        &self,
        request: Request<pb::ReplayDeadLetterRequest>,
    ) -> Result<Response<pb::ReplayDeadLetterResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let pb::ReplayDeadLetterRequest { device, id } = request.into_inner();
        caller.about(parse::resource(&device));
        let (device, row) = self.find(&caller, &device, id).await?;
        let replies = self.ingest.replay(&device, row).await?.replies().await?;
        match replies.into_iter().next().map(|reply| reply.outcome) {
            Some(Outcome::Stored { readings }) => {
                tracing::info!(device = %device.id, dead_letter = id, readings, "dead_letter.replayed");
                Ok(Response::new(pb::ReplayDeadLetterResponse { stored_readings: readings }))
            }
            Some(Outcome::Rejected(reject)) => Err(Error::StillRejected { dead_letter: id, reject: Box::new(reject) }.into()),
            // Somebody else was quicker.
            Some(Outcome::Duplicate { .. }) => Err(Error::DeadLetterNotFound(id).into()),
            Some(Outcome::Gap { .. }) | None => Err(Error::Internal.into()),
        }
    }

    async fn delete_dead_letter(
        &self,
        request: Request<pb::DeleteDeadLetterRequest>,
    ) -> Result<Response<pb::DeleteDeadLetterResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let pb::DeleteDeadLetterRequest { device, id } = request.into_inner();
        caller.about(parse::resource(&device));
        let (device, _) = self.find(&caller, &device, id).await?;
        let mut tx = self.store.begin().await.map_err(Failure::from)?;
        let deleted = tx.take_dead_letter(device.key, id).await.map_err(Failure::from)?;
        tx.commit().await.map_err(Failure::from)?;
        match deleted {
            Some(_) => Ok(Response::new(pb::DeleteDeadLetterResponse {})),
            None => Err(Error::DeadLetterNotFound(id).into()),
        }
    }
}

impl DeadLetterApi {
    async fn find(&self, caller: &Caller, device: &str, id: i64) -> Result<(Arc<Device>, DeadLetterRow), Failure> {
        let device = caller.device(&self.registry, &parse::device(device)?).await?;
        let row = self.store.dead_letter(device.key, id).await?.ok_or(Error::DeadLetterNotFound(id))?;
        Ok((device, row))
    }
}

fn encode(row: DeadLetterRow) -> pb::DeadLetter {
    pb::DeadLetter {
        id: row.id,
        stream_id: row.stream_id.as_bytes().to_vec().into(),
        sequence: row.sequence,
        receive_time: Some(row.receive_time.to_proto()),
        reason: reason_from_name(&row.reason).unwrap_or_default() as i32,
        field: row.field,
        message: row.message,
        readings: row.readings,
        size_bytes: row.size_bytes,
        batch: row.batch,
    }
}
