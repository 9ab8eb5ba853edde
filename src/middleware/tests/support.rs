//! A small real gateway: the listener and the stack around services whose behaviour the caller chooses, on a free port.

use crate::{
    api::driven::driven,
    app::listener::{Listener, Stop},
    auth::{AuditLog, Authenticator},
    config::{Config, Grpc},
    error::StatusFacts,
    limits::OperatorLimits,
    middleware::{CallReports, CallTracker, Deadline, Doors, stack},
    pb::{
        FollowRequest, FollowResponse, GetUploadPositionRequest, GetUploadPositionResponse, Heartbeat, UploadRequest, UploadResponse,
        follow_response::Message,
        live_service_client::LiveServiceClient,
        live_service_server::{LiveService, LiveServiceServer},
        telemetry_service_client::TelemetryServiceClient,
        telemetry_service_server::{TelemetryService, TelemetryServiceServer},
    },
    telemetry::Metrics,
};
use futures_util::{Stream, StreamExt, stream};
use std::{net::SocketAddr, pin::Pin, sync::Arc, time::Duration};
use tokio::task::JoinHandle;
use tonic::{
    Request, Response, Status, Streaming,
    service::Routes,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::health_client::HealthClient;

/// Long enough for the slowest machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

/// How many messages of 64 KiB "large" sends.
pub const LARGE_MESSAGES: usize = 500;

/// Waits until `condition` holds.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let poll = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, poll).await.unwrap_or_else(|_| panic!("in vain: {what}"));
}

/// Waits for what must happen.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("in vain: {what}"))
}

/// Services that do what the device's name in a request says. Work that is under way holds a clone of `work`.
#[derive(Debug, Clone, Default)]
pub struct Services {
    work: Arc<()>,
}

impl Services {
    /// How many calls the handlers are at work on.
    pub fn at_work(&self) -> usize {
        Arc::strong_count(&self.work) - 1
    }
}

/// What the stack gets and clones as it likes: only calls count as work.
#[derive(Clone)]
struct Handlers(std::sync::Weak<()>);

impl Handlers {
    fn begin(&self) -> Arc<()> {
        self.0.upgrade().expect("the test holds the services")
    }
}

#[tonic::async_trait]
impl TelemetryService for Handlers {
    async fn upload(&self, request: Request<Streaming<UploadRequest>>) -> Result<Response<UploadResponse>, Status> {
        let _work = self.begin();
        let mut requests = request.into_inner();
        let mut last_durable_sequence = 0;
        while let Some(request) = requests.message().await? {
            last_durable_sequence = request.sequence;
        }
        Ok(Response::new(UploadResponse { last_durable_sequence, ..Default::default() }))
    }

    async fn get_upload_position(&self, request: Request<GetUploadPositionRequest>) -> Result<Response<GetUploadPositionResponse>, Status> {
        let _work = self.begin();
        let remote_port = request.remote_addr().map_or(0, |address| address.port());
        let deadline = request.extensions().get::<Deadline>().copied();
        let last_durable_sequence = match request.into_inner().device.as_str() {
            "hang" => std::future::pending().await,
            "panic" => panic!("as asked"),
            "peer" => u64::from(remote_port),
            "deadline" => deadline.map_or(0, |Deadline(at)| at.duration_since(tokio::time::Instant::now()).as_secs()),
            _ => 1,
        };
        Ok(Response::new(GetUploadPositionResponse { last_durable_sequence }))
    }
}

#[tonic::async_trait]
impl LiveService for Handlers {
    type FollowStream = Pin<Box<dyn Stream<Item = Result<FollowResponse, Status>> + Send>>;

    async fn follow(&self, request: Request<FollowRequest>) -> Result<Response<Self::FollowStream>, Status> {
        let work = self.begin();
        let heartbeat = || FollowResponse { message: Some(Message::Heartbeat(Heartbeat {})), ..Default::default() };
        let large = || Ok(FollowResponse { resume_token: "x".repeat(64 << 10), ..Default::default() });
        let first = stream::iter([Ok(heartbeat())]);
        let then: Self::FollowStream = match request.into_inner().devices.first().map_or("", String::as_str) {
            "hang" => Box::pin(stream::pending()),
            // Behind a pause, as tonic sends messages that are there at once together, and loses them together.
            "panic" => Box::pin(stream::once(tokio::task::yield_now()).map(|()| panic!("as asked"))),
            "driven_panic" => Box::pin(driven(1, async |_| {
                tokio::task::yield_now().await;
                panic!("as asked")
            })),
            // More than the client's windows take at once.
            "large" => Box::pin(stream::repeat_with(large).take(LARGE_MESSAGES)),
            "flood" => Box::pin(stream::repeat_with(move || Ok(heartbeat()))),
            _ => Box::pin(stream::empty()),
        };
        let stream = first.chain(then).map(move |item| {
            let _part_of = &work;
            item
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

/// Doors that stand open.
pub fn doors() -> Doors {
    Doors { auth: Authenticator::open(), audit: AuditLog::off(), limits: OperatorLimits::new(&Config::default().limits, &Metrics::new()) }
}

/// All that serves, and what tests look at.
pub struct Gateway {
    pub address: SocketAddr,
    pub metrics: Metrics,
    pub services: Services,
    pub calls: CallTracker,
    pub stop: Stop,
    pub serving: JoinHandle<()>,
}

impl Gateway {
    /// Starts it with changed settings.
    pub async fn start(change: impl FnOnce(&mut Grpc)) -> Self {
        Self::start_reporting(CallReports::default(), change).await
    }

    /// The same with what is told of calls.
    pub async fn start_reporting(reports: CallReports, change: impl FnOnce(&mut Grpc)) -> Self {
        let mut config = Config::default().grpc;
        config.listen.set_port(0);
        change(&mut config);
        let (metrics, calls, stop, services) = (Metrics::new(), CallTracker::new(), Stop::default(), Services::default());
        let listener = Listener::bind(&config, &metrics).await.expect("a free port");
        let address = listener.local_addr();
        let stack = stack(&config, reports, &metrics, &doors(), &calls, services.routes().await);
        let serving = tokio::spawn(listener.serve(stack, stop.clone()));
        Self { address, metrics, services, calls, stop, serving }
    }

    /// A new connection.
    pub async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).expect("an address is a URI");
        soon("connecting", endpoint.connect()).await.expect("it listens")
    }

    /// A client on a new connection.
    pub async fn telemetry(&self) -> TelemetryServiceClient<Channel> {
        TelemetryServiceClient::new(self.channel().await)
    }

    /// A client on a new connection.
    pub async fn live(&self) -> LiveServiceClient<Channel> {
        LiveServiceClient::new(self.channel().await)
    }

    /// A client on a new connection.
    pub async fn health(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel().await)
    }

    /// The value of a series such as `tidegate_panics_total`; 0 when it is not shown.
    pub fn value(&self, series: &str) -> f64 {
        let text = self.metrics.render();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().expect("a number"))
    }
}

impl Services {
    /// They, and tonic's health service.
    pub async fn routes(&self) -> Routes {
        let handlers = Handlers(Arc::downgrade(&self.work));
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
        Routes::new(TelemetryServiceServer::new(handlers.clone())).add_service(LiveServiceServer::new(handlers)).add_service(health)
    }
}

/// A request for the named behaviour.
pub fn position_of(device: &str) -> GetUploadPositionRequest {
    GetUploadPositionRequest { device: device.into(), ..Default::default() }
}

/// A request for the named behaviour.
pub fn follow(device: &str) -> FollowRequest {
    FollowRequest { devices: vec![device.into()], ..Default::default() }
}

/// `ErrorInfo.reason` of an error.
pub fn reason(status: &Status) -> String {
    StatusFacts::of(status).reason().to_owned()
}
