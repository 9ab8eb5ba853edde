//! Calling a gateway.

use super::{CredentialArgs, Failure, parse};
use crate::client::{Channel, ChannelError, channel::endpoint_with};
use clap::Args;
use std::{error::Error as _, future::Future, time::Duration};
use tonic::{Code, Request, Response, Status, Streaming, transport::Endpoint};

/// More than the largest batch that a gateway can be set to take: an operator's tool trusts the gateway's limits.
pub const MESSAGE_BYTES_MAX: usize = 512 << 20;

/// Where a gateway with default settings is.
pub const ENDPOINT: &str = "http://127.0.0.1:50051";

/// Where the gateway is, and how long it may take.
#[derive(Debug, Clone, Args)]
pub struct ClientArgs {
    /// Where the gateway's gRPC is.
    #[arg(long, value_name = "URL", env = "TIDEGATE_ENDPOINT", default_value = ENDPOINT, value_parser = parse_endpoint)]
    pub endpoint: String,
    /// How long to wait for the gateway's next answer.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse::duration)]
    pub timeout: Duration,
    #[command(flatten)]
    pub credentials: CredentialArgs,
}

/// An `http` or `https` address; without a scheme it is taken as `http`.
pub fn parse_endpoint(text: &str) -> Result<String, String> {
    let url = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let endpoint =
        Endpoint::from_shared(url.clone()).map_err(|why| format!("{text:?} is not an address such as http://127.0.0.1:50051: {why}"))?;
    match endpoint.uri().authority().is_some_and(|authority| !authority.host().is_empty())
        && (url.starts_with("http://") || url.starts_with("https://"))
    {
        true => Ok(url),
        false => Err(format!("{text:?} is not an address such as http://127.0.0.1:50051")),
    }
}

impl ClientArgs {
    /// A connection to the gateway.
    pub async fn connect(&self) -> Result<Channel, Failure> {
        let credentials = self.credentials.load()?;
        let unusable = |error: ChannelError| Failure::Usage(format!("{:#}", anyhow::Error::from(error)));
        let endpoint = endpoint_with(&self.endpoint, &credentials)
            .map_err(unusable)?
            .user_agent(concat!("tidegate-cli/", env!("CARGO_PKG_VERSION")))
            .map_err(|why| Failure::Usage(why.to_string()))?
            .connect_timeout(self.timeout)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(10));
        let connected = endpoint.connect().await.map_err(|error| {
            let mut why: &dyn std::error::Error = &error;
            while let Some(source) = why.source() {
                why = source;
            }
            Failure::Unreachable { endpoint: self.endpoint.clone(), why: why.to_string() }
        })?;
        Ok(Channel::new(connected, credentials.token.as_deref()).map_err(unusable)?.in_one_trace())
    }

    /// A unary request with the deadline.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    /// The answer to a unary call, or the beginning of a stream.
    pub async fn answer<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Failure> {
        match tokio::time::timeout(self.timeout, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failure(status)),
            Err(_) => Err(Failure::TimedOut(self.timeout)),
        }
    }

    /// A stream's next message, when it must come soon.
    pub async fn next<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>, Failure> {
        match tokio::time::timeout(self.timeout, stream.message()).await {
            Ok(message) => Ok(message?),
            Err(_) => Err(Failure::TimedOut(self.timeout)),
        }
    }

    /// tonic reports a deadline that passed on this side as CANCELLED, and nobody else cancels here.
    fn failure(&self, status: Status) -> Failure {
        match status.code() {
            Code::Cancelled if status.source().is_some() => Failure::TimedOut(self.timeout),
            _ => status.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_http_or_https() {
        assert_eq!(parse_endpoint("gateway:50051"), Ok("http://gateway:50051".to_owned()));
        assert_eq!(parse_endpoint("http://[::1]:1"), Ok("http://[::1]:1".to_owned()));
        assert_eq!(parse_endpoint("https://gateway"), Ok("https://gateway".to_owned()));
        for bad in ["ftp://gateway", "", "http://", "a b"] {
            assert!(parse_endpoint(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[tokio::test]
    async fn where_nobody_listens_the_user_is_told_how_to_start_one() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
        let client =
            ClientArgs { endpoint: format!("http://{free}"), timeout: Duration::from_secs(5), credentials: CredentialArgs::default() };
        let failure = client.connect().await.expect_err("nobody listens");
        assert!(failure.text().contains("Is it running? Start it with `tidegate serve`"), "{}", failure.text());
        assert!(failure.is_passing());
    }
}
