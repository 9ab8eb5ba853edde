//! The way to the gateway.

use crate::{Usage, cli::Common};
use anyhow::anyhow;
use std::{future::Future, time::Duration};
use tidegate::{
    client::{Backoff, BackoffSettings, Channel, connect_lazy_with},
    error::StatusFacts,
    model::StreamId,
    pb::{GetUploadPositionRequest, telemetry_service_client::TelemetryServiceClient},
};
use tokio::time::Instant;
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// How long the first answer may take.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// So many connections to the gateway, which has answered on the first.
pub async fn connect(common: &Common, connections: u32) -> anyhow::Result<Vec<Channel>> {
    let endpoint = &common.endpoint;
    let credentials = common.credentials.load().map_err(|failure| Usage(failure.text()))?;
    let channels = (0..connections).map(|_| connect_lazy_with(endpoint, &credentials)).collect::<Result<Vec<_>, _>>().map_err(|why| {
        Usage(format!("cannot connect to {endpoint:?}: {:#}; write it like http://127.0.0.1:50051", anyhow::Error::from(why)))
    })?;
    // A gateway answers it to anybody.
    let client = HealthClient::new(channels[0].clone());
    retry(FIRST_ANSWER_TIMEOUT, async || client.clone().check(HealthCheckRequest::default()).await)
        .await
        .map_err(|status| no_answer(endpoint, &status))?;
    Ok(channels)
}

/// What the gateway has of a stream id.
pub async fn upload_position(channel: &Channel, device: &str, stream_id: StreamId) -> anyhow::Result<u64> {
    let client = TelemetryServiceClient::new(channel.clone());
    let question = GetUploadPositionRequest { device: device.to_owned(), stream_id: stream_id.as_bytes().to_vec().into() };
    let answer = retry(FIRST_ANSWER_TIMEOUT, async || client.clone().get_upload_position(question.clone()).await).await;
    let answer = answer.map_err(|status| anyhow!("the gateway does not say where to resume: {}", describe(&status)))?;
    Ok(answer.into_inner().last_durable_sequence)
}

fn no_answer(endpoint: &str, status: &Status) -> anyhow::Error {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Unknown => anyhow!(
            "no gateway answers at {endpoint} ({}); is it running? Name another address with --endpoint or TIDEGATE_ENDPOINT",
            root_cause(status)
        ),
        _ => anyhow!("the gateway at {endpoint} refuses: {}", describe(status)),
    }
}

/// The innermost cause, such as "Connection refused (os error 111)".
fn root_cause(status: &Status) -> String {
    let mut cause: &dyn std::error::Error = status;
    while let Some(next) = cause.source() {
        cause = next;
    }
    if std::ptr::addr_eq(cause, status) { status.message().to_owned() } else { cause.to_string() }
}

/// A status in a line.
pub fn describe(status: &Status) -> String {
    let reason = StatusFacts::of(status).reason().to_owned();
    let reason = if reason.is_empty() { format!("{:?}", status.code()) } else { reason };
    format!("{reason}: {}", status.message())
}

/// Makes a call again while the gateway is away, for so long.
pub async fn retry<T, F: Future<Output = Result<T, Status>>>(patience: Duration, mut call: impl FnMut() -> F) -> Result<T, Status> {
    let mut backoff = Backoff::new(BackoffSettings { cap: Duration::from_secs(2), ..BackoffSettings::default() });
    let began = Instant::now();
    loop {
        let status = match call().await {
            Ok(answer) => return Ok(answer),
            Err(status) => status,
        };
        let delay = backoff.next_delay(StatusFacts::of(&status).retry_after);
        let transient = matches!(status.code(), Code::Unavailable | Code::ResourceExhausted | Code::Unknown | Code::Cancelled);
        // A query that is too large is also RESOURCE_EXHAUSTED, but will be as large again.
        if !transient || StatusFacts::of(&status).reason() == "QUERY_TOO_LARGE" || began.elapsed() + delay > patience {
            return Err(status);
        }
        tokio::time::sleep(delay).await;
    }
}
