//! What the log has of a run: every batch that was stored since a place in it, as a follower sees them. Readings that are
//! queried are merged by their times, so that a batch that was stored twice does not show there; here it does.

use crate::{
    gateway::{describe, retry},
    report::Count,
    verify::PATIENCE,
};
use anyhow::anyhow;
use parking_lot::Mutex;
use prost::Message as _;
use std::collections::BTreeMap;
use tidegate::client::Channel;
use tidegate::pb::{
    self, FollowRequest, FollowResponse, follow_request::Start, follow_response::Message, live_service_client::LiveServiceClient,
};
use tonic::Status;

/// So many devices a follower may name.
const DEVICES_MAX: usize = 1_000;
/// More than the largest batch that a gateway takes unless its limits were raised a lot.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// The log from a place on.
#[derive(Debug, Clone)]
pub struct LogReader {
    live: LiveServiceClient<Channel>,
    /// The place.
    begin: String,
}

impl LogReader {
    /// The log from its present end on.
    pub async fn at_end(channel: Channel) -> anyhow::Result<Self> {
        let live = LiveServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let mut reader = Self { live, begin: String::new() };
        reader.begin = reader.read(Start::LiveOnly(true), &[], |_, _, _| {}).await?;
        Ok(reader)
    }

    /// How many batches, and readings in them, were stored of each of these devices; of those that have any.
    pub async fn counts(&self, devices: &[String]) -> anyhow::Result<BTreeMap<String, Count>> {
        let mut counts = BTreeMap::<String, Count>::new();
        for group in devices.chunks(DEVICES_MAX) {
            let add = |device: String, batches: u64, readings: u64| counts.entry(device).or_default().add(batches, readings);
            self.read(Start::ResumeToken(self.begin.clone()), group, add).await?;
        }
        Ok(counts)
    }

    /// Gives each message's device and numbers of batches and readings to `take`, up to the present end; returns that place.
    async fn read(&self, start: Start, devices: &[String], take: impl FnMut(String, u64, u64)) -> anyhow::Result<String> {
        let request = FollowRequest { devices: devices.to_vec(), start: Some(start), ..FollowRequest::default() };
        // After a break it goes on behind the last message.
        let progress = Mutex::new((request, take));
        let read = retry(PATIENCE, async || {
            let request = progress.lock().0.clone();
            let mut stream = self.live.clone().follow(request).await?.into_inner();
            while let Some(FollowResponse { message, resume_token }) = stream.message().await? {
                let (request, take) = &mut *progress.lock();
                match message {
                    Some(Message::Readings(batch)) => take(batch.device, batch.batches, readings(&batch.batch)?),
                    Some(Message::Synced(_)) => return Ok(resume_token),
                    _ => {}
                }
                request.start = Some(Start::ResumeToken(resume_token));
            }
            Err(Status::unavailable("the gateway ended the stream"))
        });
        read.await.map_err(|status| anyhow!("the log cannot be followed: {}", describe(&status)))
    }
}

fn readings(batch: &[u8]) -> Result<u64, Status> {
    let batch = pb::Batch::decode(batch).map_err(|error| Status::data_loss(format!("what was stored is not a batch: {error}")))?;
    Ok(batch.frames.iter().map(|frame| (frame.time_deltas_us.len() as u64 + 1) * frame.columns.len() as u64).sum())
}
