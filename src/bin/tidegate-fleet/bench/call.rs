//! Streaming calls whose request body is made of ready bytes, so that the client takes as little of the machine as it can.

use anyhow::anyhow;
use bytes::Bytes;
use http::{Request, header};
use http_body::Body;
use prost::Message;
use tonic::{
    Status, Streaming,
    codec::Codec,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;
use tower::{Service, ServiceExt};

/// The path of the always-on devices' call.
pub const CONNECT: &str = "/tidegate.v1.DeviceLinkService/Connect";

/// A client's connections, each of its own.
pub async fn connect(endpoint: &Endpoint, connections: u32) -> anyhow::Result<Vec<Channel>> {
    let mut channels = Vec::with_capacity(connections as usize);
    for _ in 0..connections {
        channels.push(endpoint.connect().await?);
    }
    Ok(channels)
}

/// Calls `path` with messages that have their gRPC prefix already.
pub async fn call<B, M>(channel: &Channel, path: &'static str, body: B) -> Result<Streaming<M>, Status>
where
    B: Body<Data = Bytes, Error = Status> + Send + 'static,
    M: Message + Default + 'static,
{
    let request = Request::post(path)
        .header(header::TE, "trailers")
        .header(header::CONTENT_TYPE, "application/grpc")
        .body(tonic::body::Body::new(body))
        .map_err(|error| Status::internal(error.to_string()))?;
    let mut channel = channel.clone();
    let ready = channel.ready().await.map_err(|error| Status::from_error(Box::new(error)))?;
    let response = ready.call(request).await.map_err(|error| Status::from_error(Box::new(error)))?;
    if let Some(status) = Status::from_header_map(response.headers())
        && status.code() != tonic::Code::Ok
    {
        return Err(status);
    }
    let (parts, body) = response.into_parts();
    let decoder = ProstCodec::<M, M>::default().decoder();
    Ok(Streaming::new_response(decoder, body, parts.status, None, None))
}

/// The one message of a call that answers with one.
pub async fn single<M>(mut answer: Streaming<M>) -> anyhow::Result<M> {
    let message = answer.message().await?.ok_or_else(|| anyhow!("the call ended without an answer"))?;
    // The status is behind the message.
    answer.trailers().await?;
    Ok(message)
}
