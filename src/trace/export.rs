//! Finished spans on their way to a collector, by OTLP over gRPC (<https://opentelemetry.io/docs/specs/otlp/>).
//!
//! Whatever the collector does, calls don't notice: a span that finds the queue full, or that the collector does not take, is
//! dropped and counted. Nothing is sent twice.

use super::TraceParent;
use crate::{
    client::{ChannelError, Credentials, channel::endpoint_with},
    config,
    telemetry::{Metrics, Sparing, names},
};
use metrics::Counter;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, trace_service_client::TraceServiceClient},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span},
};
use std::{fmt, time::Duration};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, transport::Channel};
use uuid::Uuid;

/// How many finished spans may wait: some MiB.
const QUEUE_SPANS_MAX: usize = 2_048;
/// How many go in one request at the most.
const REQUEST_SPANS_MAX: usize = 512;
/// How long a span waits for others to go with.
const GATHER_INTERVAL: Duration = Duration::from_secs(1);
/// How long the collector may take for a request.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection to it is asked whether it is still there, while a request is under way.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// Where finished spans are handed in. Cheap to clone.
#[derive(Clone)]
pub struct Tracer {
    sender: mpsc::Sender<Span>,
    // Traces whose ids' lower half is less are recorded; 2^64: all.
    sampled_below: u128,
    queue_full: Counter,
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer").finish_non_exhaustive()
    }
}

impl Tracer {
    /// Whether a call is to be recorded: whenever its caller is, and else the given share of traces, by their ids, so that
    /// all gateways decide alike. A caller that says that it is not recorded had no part in that: devices' clients record nothing.
    pub fn samples(&self, trace: TraceParent) -> bool {
        trace.sampled || u128::from(trace.trace_id.low_half()) < self.sampled_below
    }

    /// Hands a span in, without waiting.
    pub fn record(&self, span: Span) {
        if self.sender.try_send(span).is_err() {
            self.queue_full.increment(1);
        }
    }
}

/// What takes the spans to the collector.
pub struct SpanExporter {
    receiver: mpsc::Receiver<Span>,
    client: TraceServiceClient<Channel>,
    resource: Resource,
    exported: Counter,
    failed: Counter,
    told: Sparing,
}

/// Makes both; `None` when no collector is set.
///
/// # Errors
/// When the collector's address can't be used.
pub fn exporter(config: &config::Tracing, metrics: &Metrics) -> Result<Option<(Tracer, SpanExporter)>, ChannelError> {
    if config.otlp_endpoint.is_empty() {
        return Ok(None);
    }
    let endpoint = endpoint_with(&config.otlp_endpoint, &Credentials::default())?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(CONNECT_TIMEOUT);
    let (sender, receiver) = mpsc::channel(QUEUE_SPANS_MAX);
    let dropped = |reason: &'static str| metrics.counter(names::TRACE_SPANS_DROPPED, &[("reason", reason.into())]);
    let sampled_below = (config.sample_ratio * (u64::MAX as f64 + 1.0)) as u128;
    let tracer = Tracer { sender, sampled_below, queue_full: dropped("queue_full") };
    let exporter = SpanExporter {
        receiver,
        client: TraceServiceClient::new(endpoint.connect_lazy()),
        resource: resource(&config.service_name),
        exported: metrics.counter(names::TRACE_SPANS_EXPORTED, &[]),
        failed: dropped("export_failed"),
        told: Sparing::default(),
    };
    Ok(Some((tracer, exporter)))
}

impl SpanExporter {
    /// Exports until `stop`, and then what is left. Whoever stops it gives it the time for that, and need not wait for longer.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut spans = Vec::with_capacity(REQUEST_SPANS_MAX);
        let mut ticks = tokio::time::interval(GATHER_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let room = REQUEST_SPANS_MAX - spans.len();
            tokio::select! {
                received = self.receiver.recv_many(&mut spans, room) => if received > 0 && received < room { continue },
                _ = ticks.tick() => {}
                () = stop.cancelled() => break,
            }
            if self.receiver.is_closed() && self.receiver.is_empty() && spans.is_empty() {
                return;
            }
            self.export(&mut spans).await;
        }
        while let Ok(span) = self.receiver.try_recv() {
            spans.push(span);
            if spans.len() == REQUEST_SPANS_MAX {
                self.export(&mut spans).await;
            }
        }
        self.export(&mut spans).await;
    }

    async fn export(&mut self, spans: &mut Vec<Span>) {
        if spans.is_empty() {
            return;
        }
        let count = spans.len() as u64;
        let spans = std::mem::replace(spans, Vec::with_capacity(REQUEST_SPANS_MAX));
        let scope =
            InstrumentationScope { name: env!("CARGO_PKG_NAME").into(), version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
        let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, ..Default::default() }];
        let resource_spans = vec![ResourceSpans { resource: Some(self.resource.clone()), scope_spans, ..Default::default() }];
        let export = self.client.export(Request::new(ExportTraceServiceRequest { resource_spans }));
        // Around all of it: the endpoint's own timeout ends with the head of the response.
        let exported = timeout(EXPORT_TIMEOUT, export).await;
        match exported.unwrap_or_else(|_| Err(Status::deadline_exceeded("the collector has not answered in time"))) {
            Ok(response) => {
                let partial = response.into_inner().partial_success.unwrap_or_default();
                let refused = u64::try_from(partial.rejected_spans).unwrap_or(0).min(count);
                self.exported.increment(count - refused);
                if refused > 0 {
                    self.lost(refused, &partial.error_message);
                }
            }
            Err(status) => self.lost(count, &why(&status)),
        }
    }

    fn lost(&self, spans: u64, why: &str) {
        self.failed.increment(spans);
        if let Some(left_out) = self.told.pass() {
            tracing::warn!(spans, why, left_out, "trace.export_failed: the collector did not take these spans, which are lost");
        }
    }
}

/// A status with its causes, for a person: that nobody listens is in the last of them.
fn why(status: &Status) -> String {
    let causes = std::iter::successors(std::error::Error::source(status), |cause| cause.source());
    causes.fold(format!("{:?}: {}", status.code(), status.message()), |text, cause| format!("{text}: {cause}"))
}

/// What all spans are of: <https://opentelemetry.io/docs/specs/semconv/resource/service/>.
fn resource(service_name: &str) -> Resource {
    let attributes = [
        ("service.name", service_name.to_owned()),
        ("service.version", env!("CARGO_PKG_VERSION").to_owned()),
        ("service.instance.id", Uuid::new_v4().to_string()),
    ];
    Resource {
        attributes: attributes.into_iter().map(|(key, value)| attribute(key, Value::StringValue(value))).collect(),
        ..Default::default()
    }
}

/// An attribute of a span or a resource.
pub fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.into(), value: Some(AnyValue { value: Some(value) }), ..Default::default() }
}
