//! Distributed traces: how a call says which one it is part of, and how the gateway's own part is told to a collector.
//!
//! A [`TraceParent`] goes along with every call, in and out. [`Tracer`] and [`SpanExporter`] are there when `tracing.otlp_endpoint` is set.

mod context;
mod export;

pub use context::{SpanId, TRACEPARENT, TRACESTATE, TraceId, TraceParent, trace_state};
pub use export::{SpanExporter, Tracer, attribute, exporter};
