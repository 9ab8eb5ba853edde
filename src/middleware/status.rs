//! How a call's status stands in headers and trailers.

use crate::error::Error;
use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;
use tonic::{Code, Status};

/// The status that headers or trailers carry.
pub fn code_in(headers: &HeaderMap) -> Option<Code> {
    headers.get(Status::GRPC_STATUS).map(|value| Code::from_bytes(value.as_bytes()))
}

/// The frame that ends a response, which had begun, with an error.
pub fn trailers(error: Error) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    Status::from(error).add_header(&mut trailers).expect("a percent-encoded message and base64 details are header values");
    Frame::trailers(trailers)
}

/// The code's name as the gRPC specification writes it: the label of metrics.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// Learns a call's status from what passes. A call of which it has learnt none when it is over was given up by the client.
#[derive(Debug, Default)]
pub struct Outcome(Option<Code>);

impl Outcome {
    /// Looks at the beginning of a response, which may be all of it.
    pub fn see_response<B: http_body::Body>(&mut self, response: &http::Response<B>) {
        self.0 = code_in(response.headers()).or_else(|| response.body().is_end_stream().then_some(Code::Unknown));
    }

    /// Looks at a piece of the body, or its end.
    pub fn see_frame<E>(&mut self, frame: Option<&Result<Frame<Bytes>, E>>) {
        match frame {
            Some(Ok(frame)) => self.0 = frame.trailers_ref().map(|trailers| code_in(trailers).unwrap_or(Code::Unknown)).or(self.0),
            // An end without a status: what a client makes of it.
            Some(Err(_)) | None => self.0 = self.0.or(Some(Code::Unknown)),
        }
    }

    /// The status, now that the call is over.
    pub fn code(&self) -> Code {
        self.0.unwrap_or(Code::Cancelled)
    }
}
