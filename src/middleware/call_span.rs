//! The span of a call, as a collector of traces is told of it.
//!
//! Names and attributes are those of OpenTelemetry's semantic conventions for RPC
//! (<https://opentelemetry.io/docs/specs/semconv/rpc/grpc/>).

use super::{
    method::{Family, Method},
    request_id::RequestId,
};
use crate::trace::{TraceParent, Tracer, attribute, trace_state};
use http::HeaderMap;
use opentelemetry_proto::tonic::{
    common::v1::any_value::Value,
    trace::v1::{Span, SpanFlags, Status, span::SpanKind, status::StatusCode},
};
use std::{
    fmt,
    net::SocketAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tonic::Code;

/// A span that has begun.
pub struct CallSpan {
    tracer: Tracer,
    span: Span,
}

impl fmt::Debug for CallSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallSpan").finish_non_exhaustive()
    }
}

impl CallSpan {
    /// Begins the span `this`, whose caller's is `parent`.
    pub fn begin(
        tracer: Tracer,
        this: TraceParent,
        parent: Option<TraceParent>,
        headers: &HeaderMap,
        method: &Method,
        (id, peer): (&RequestId, Option<SocketAddr>),
    ) -> Self {
        let text = |key, text: &str| attribute(key, Value::StringValue(text.to_owned()));
        let mut attributes = vec![text("rpc.system", "grpc"), text("tidegate.request_id", id.as_str())];
        if method.family != Family::Unknown
            && let Some((service, name)) = method.name.split_once('/')
        {
            attributes.extend([text("rpc.service", service), text("rpc.method", name)]);
        }
        if let Some(peer) = peer {
            let port = attribute("network.peer.port", Value::IntValue(peer.port().into()));
            attributes.extend([text("network.peer.address", &peer.ip().to_string()), port]);
        }
        let remote = if parent.is_some() { SpanFlags::ContextIsRemoteMask as u32 } else { 0 };
        let span = Span {
            trace_id: this.trace_id.as_bytes().to_vec(),
            span_id: this.span_id.as_bytes().to_vec(),
            trace_state: parent.map(|_| trace_state(headers)).unwrap_or_default(),
            parent_span_id: parent.map(|parent| parent.span_id.as_bytes().to_vec()).unwrap_or_default(),
            // Sampled, as W3C Trace Context has it.
            flags: 1 | SpanFlags::ContextHasIsRemoteMask as u32 | remote,
            name: method.name.clone(),
            kind: SpanKind::Server as i32,
            start_time_unix_nano: nanos(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()),
            attributes,
            ..Span::default()
        };
        Self { tracer, span }
    }

    /// Hands the span in: the call took so long, and ended with this status.
    pub fn end(mut self, took: Duration, code: Code) {
        self.span.end_time_unix_nano = self.span.start_time_unix_nano.saturating_add(nanos(took));
        self.span.attributes.push(attribute("rpc.grpc.status_code", Value::IntValue(i64::from(i32::from(code)))));
        if is_servers_fault(code) {
            self.span.status = Some(Status { code: StatusCode::Error as i32, ..Status::default() });
        }
        self.tracer.record(self.span);
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The codes that make a server's span an error; the others are the client's affair.
fn is_servers_fault(code: Code) -> bool {
    matches!(code, Code::Unknown | Code::DeadlineExceeded | Code::Unimplemented | Code::Internal | Code::Unavailable | Code::DataLoss)
}
