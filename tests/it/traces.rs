//! Distributed traces: a call is a span of its caller's trace, which a collector is told of; and one that is away harms nothing.

use crate::support::{
    TestGateway,
    client::{TestDevice, devices},
    eventually, soon,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tidegate::{
    client::Channel,
    pb::{self, telemetry_service_client::TelemetryServiceClient},
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, metadata::MetadataMap};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

/// A collector in this process.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Told>>>);

/// A span, and what it is of.
#[derive(Debug, Clone)]
struct Told {
    resource: Vec<KeyValue>,
    span: Span,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut told = self.0.lock().expect("no panic under the lock");
        for of_resource in request.into_inner().resource_spans {
            let resource = of_resource.resource.expect("set").attributes;
            let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            told.extend(spans.map(|span| Told { resource: resource.clone(), span }));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Starts one; with where it is.
    async fn start() -> (Self, String) {
        let collector = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = endpoint(listener.local_addr().expect("bound"));
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(collector.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (collector, endpoint)
    }

    fn told(&self) -> Vec<Told> {
        self.0.lock().expect("no panic under the lock").clone()
    }
}

impl Told {
    fn trace(&self) -> String {
        hex(&self.span.trace_id)
    }

    fn attribute(&self, key: &str) -> String {
        attribute(&self.span.attributes, key)
    }
}

fn endpoint(address: SocketAddr) -> String {
    format!("http://{address}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The value as text; empty where there is no such attribute.
fn attribute(attributes: &[KeyValue], key: &str) -> String {
    let found = attributes.iter().find(|attribute| attribute.key == key).and_then(|attribute| attribute.value.clone());
    match found.and_then(|AnyValue { value }| value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        None => String::new(),
        other => panic!("{key} is {other:?}"),
    }
}

/// A gateway that tells a collector of this share of traces, besides those that their callers record.
async fn gateway(endpoint: &str, sample_ratio: f64) -> TestGateway {
    let endpoint = endpoint.to_owned();
    TestGateway::start_with(|config| {
        (config.tracing.otlp_endpoint, config.tracing.sample_ratio) = (endpoint, sample_ratio);
        config.tracing.service_name = "tidegate-test".into();
        config.shutdown.grace = Duration::from_secs(8);
    })
    .await
}

/// Asks for a device's position by a call with these headers; the answer's.
async fn ask(channel: &Channel, headers: &[(&'static str, &str)]) -> MetadataMap {
    let device = TestDevice::new(channel, "pump-1");
    let stream_id = device.stream_id.as_bytes().to_vec().into();
    let mut request = Request::new(pb::GetUploadPositionRequest { device: device.id, stream_id });
    for (name, value) in headers {
        request.metadata_mut().insert(*name, value.parse().expect("ASCII"));
    }
    TelemetryServiceClient::new(channel.clone()).get_upload_position(request).await.expect("answered").metadata().clone()
}

/// The parts of the `traceparent` of an answer: trace, span, flags.
fn traceparent(answer: &MetadataMap) -> [String; 3] {
    let text = answer.get("traceparent").expect("it is told").to_str().expect("ASCII");
    let parts: Vec<&str> = text.split('-').collect();
    assert_eq!((parts.len(), parts[0]), (4, "00"), "{text}");
    [parts[1].to_owned(), parts[2].to_owned(), parts[3].to_owned()]
}

/// Scenario: a caller that records its trace makes a call, and one that does not, which the gateway is not set to record, either; then the
/// gateway stops. Guarantee: by then the collector has the first call as the caller's child, and nothing else.
#[tokio::test]
async fn a_call_is_a_span_of_its_callers_trace() {
    let (collector, endpoint) = Collector::start().await;
    let gateway = gateway(&endpoint, 0.0).await;
    let channel = gateway.channel();
    let unrecorded = ask(&channel, &[("traceparent", &format!("00-{TRACE}-{CALLER}-00"))]).await;
    assert_eq!(traceparent(&unrecorded)[2], "00");
    let headers =
        [("traceparent", format!("00-{TRACE}-{CALLER}-01")), ("tracestate", "vendor=opaque".into()), ("x-request-id", "the-first".into())];
    let answer = ask(&channel, &headers.each_ref().map(|(name, value)| (*name, value.as_str()))).await;
    let mut missing = Request::new(pb::GetDeviceRequest { device: "missing".into() });
    missing.metadata_mut().insert("traceparent", headers[0].1.parse().expect("ASCII"));
    devices(&channel).get_device(missing).await.expect_err("there is none");
    assert!(gateway.stop().await, "in time");

    let told = collector.told();
    let [first, second] = &told[..] else { panic!("{told:?}") };
    assert_eq!([first.trace(), hex(&first.span.span_id), "01".into()], traceparent(&answer));
    assert_eq!((first.trace().as_str(), hex(&first.span.parent_span_id).as_str()), (TRACE, CALLER));
    assert_eq!((first.span.name.as_str(), first.span.kind()), ("tidegate.v1.TelemetryService/GetUploadPosition", SpanKind::Server));
    assert_eq!((first.span.trace_state.as_str(), first.attribute("tidegate.request_id").as_str()), ("vendor=opaque", "the-first"));
    assert!(first.span.start_time_unix_nano <= first.span.end_time_unix_nano);
    for (told, service, method, status) in
        [(first, "tidegate.v1.TelemetryService", "GetUploadPosition", "0"), (second, "tidegate.v1.DeviceService", "GetDevice", "5")]
    {
        let rpc = ["rpc.system", "rpc.service", "rpc.method", "rpc.grpc.status_code"].map(|key| told.attribute(key));
        assert_eq!(rpc, ["grpc", service, method, status].map(str::to_owned));
        assert_eq!(told.attribute("network.peer.address"), "127.0.0.1");
        assert_eq!(
            told.span.status.clone().unwrap_or_default().code(),
            StatusCode::Unset,
            "what a client does wrong is no error of the gateway"
        );
        assert_eq!(attribute(&told.resource, "service.name"), "tidegate-test");
        assert_eq!(attribute(&told.resource, "service.version"), env!("CARGO_PKG_VERSION"));
    }
}

#[tokio::test]
async fn a_call_of_no_trace_or_of_a_wrong_one_begins_one() {
    // Without a collector, as it is for most: the caller is told all the same.
    let gateway = TestGateway::start().await;
    let channel = gateway.channel();
    let mut traces = Vec::new();
    for traceparent_sent in
        ["00-00000000000000000000000000000000-b7ad6b7169203331-01", "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"]
    {
        let [trace, span, flags] = traceparent(&ask(&channel, &[("traceparent", traceparent_sent)]).await);
        assert!(trace.len() == 32 && trace != TRACE && span.len() == 16 && span != CALLER && flags == "00", "{trace} {span} {flags}");
        traces.push(trace);
    }
    assert_ne!(traces[0], traces[1]);
}

/// Scenario: a device's client and a command make calls. Guarantee: each says which trace a call is of: a new one for each call, and one
/// for all calls of a command, which is recorded whatever the gateway is set to.
#[tokio::test]
async fn clients_say_which_trace_their_calls_are_of() {
    let (collector, endpoint) = Collector::start().await;
    let gateway_of_all = gateway(&endpoint, 1.0).await;
    let device = TestDevice::new(&gateway_of_all.channel(), "pump-1");
    device.upload_nth(1..=2).await.expect("stored");
    device.position().await;
    assert!(gateway_of_all.stop().await, "in time");
    let told = collector.told();
    let [upload, position] = &told[..] else { panic!("{told:?}") };
    assert_eq!((upload.attribute("rpc.method").as_str(), position.attribute("rpc.method").as_str()), ("Upload", "GetUploadPosition"));
    assert!(told.iter().all(|told| !told.span.parent_span_id.is_empty()), "the client's span is there");
    assert_ne!(upload.trace(), position.trace());

    let gateway_of_none = gateway(&endpoint, 0.0).await;
    let command = gateway_of_none.channel().in_one_trace();
    ask(&gateway_of_none.channel(), &[]).await;
    ask(&command, &[]).await;
    ask(&command, &[]).await;
    assert!(gateway_of_none.stop().await, "in time");
    let told = collector.told();
    let [first, second] = &told[2..] else { panic!("{told:?}") };
    assert_eq!(first.trace(), second.trace());
    assert_ne!(first.span.parent_span_id, second.span.parent_span_id);
}

/// Scenario: nobody listens where the collector should be, or somebody who never answers. Guarantee: calls go on, what is lost is
/// counted, and a stop takes no longer than the collector would be waited for.
#[tokio::test]
async fn a_collector_that_is_away_harms_nothing() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let gateway_without = gateway(&endpoint(nobody), 1.0).await;
    ask(&gateway_without.channel(), &[]).await;
    let lost = "tidegate_trace_spans_dropped_total{reason=\"export_failed\"}";
    eventually("the span is lost", || async { (gateway_without.metric(lost).await >= Some(1.0)).then_some(()) }).await;
    ask(&gateway_without.channel(), &[]).await;
    assert!(gateway_without.stop().await, "in time");

    let gateway_waiting = gateway(&endpoint(silent.local_addr().expect("bound")), 1.0).await;
    ask(&gateway_waiting.channel(), &[]).await;
    let accepting = tokio::task::spawn_blocking(move || silent.accept().map(|accepted| (accepted, silent)));
    let _connection = soon("the exporter connects", accepting).await.expect("no panic").expect("accepted");
    ask(&gateway_waiting.channel(), &[]).await;
    assert!(gateway_waiting.stop().await, "in time");
}
