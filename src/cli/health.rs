//! `tidegate health`.

use super::{CredentialArgs, Failure, client::ClientArgs};
use clap::Args;
use std::time::Duration;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// How long a health check waits unless told otherwise: shorter than what container engines give it.
const TIMEOUT: &str = "2s";

#[derive(Debug, Args)]
pub struct HealthArgs {
    /// The service to ask for, such as tidegate.v1.TelemetryService; empty: the gateway as a whole.
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    service: String,
    /// Where the gateway's gRPC is.
    #[arg(long, value_name = "URL", env = "TIDEGATE_ENDPOINT", default_value = super::client::ENDPOINT, value_parser = super::client::parse_endpoint)]
    endpoint: String,
    /// How long to wait for the answer.
    #[arg(long, value_name = "DURATION", default_value = TIMEOUT, value_parser = super::parse::duration)]
    timeout: Duration,
    #[command(flatten)]
    credentials: CredentialArgs,
}

pub async fn run(args: HealthArgs) -> Result<(), Failure> {
    // The gateway answers it to everybody: a container whose token is taken away is no less healthy.
    let credentials = CredentialArgs { token_file: None, ..args.credentials };
    let client = ClientArgs { endpoint: args.endpoint, timeout: args.timeout, credentials };
    // One timeout around both: connecting and asking.
    let check = async {
        let mut health = HealthClient::new(client.connect().await?);
        client.answer(health.check(client.request(HealthCheckRequest { service: args.service.clone() }))).await
    };
    let answer = tokio::time::timeout(client.timeout, check).await.unwrap_or(Err(Failure::TimedOut(client.timeout)))?;
    match answer.status() {
        ServingStatus::Serving => Ok(()),
        status => {
            let of = if args.service.is_empty() { String::new() } else { format!(" for {}", args.service) };
            Err(Failure::Failed(format!("{} is {}{of}", client.endpoint, status.as_str_name())))
        }
    }
}
