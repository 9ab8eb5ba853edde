//! Calls of any method, with a request given as bytes: on the wire all kinds of calls are alike.

use super::soon;
use bytes::{Buf, BufMut, Bytes};
use http::uri::PathAndQuery;
use tidegate::client::Channel;
use tonic::{
    Code, Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// Messages as they are.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buf.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let bytes = buf.remaining();
        Ok(Some(buf.copy_to_bytes(bytes)))
    }
}

/// Calls a method with one message, and says how it began: the first message, or the code that the call ended with.
pub async fn call(channel: &Channel, method: &str, message: Vec<u8>) -> (Code, Bytes) {
    let mut client = tonic::client::Grpc::new(channel.clone());
    let path: PathAndQuery = format!("/{method}").parse().expect("a path");
    let answered = async {
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let request = Request::new(tokio_stream::once(Bytes::from(message)));
        let mut stream = client.streaming(request, path, Raw).await?.into_inner();
        stream.message().await
    };
    match soon(method, answered).await {
        Ok(first) => (Code::Ok, first.unwrap_or_default()),
        Err(status) => (status.code(), Bytes::new()),
    }
}
