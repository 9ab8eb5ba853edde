//! All layers, in their order.

use super::{
    authenticate::{AuthenticateLayer, Refusals},
    authorize::AuthorizeLayer,
    deadline::DeadlineLayer,
    drain::{CallTracker, DrainLayer},
    metrics::MetricsLayer,
    pace::PaceLayer,
    panic::CatchPanicLayer,
    quota::QuotaLayer,
    request_id::{CallReports, RequestIdLayer},
    shed::ShedLayer,
};
use crate::{
    auth::{AuditLog, Authenticator, Caller, Grant, Principal},
    config::Grpc,
    limits::OperatorLimits,
    telemetry::Metrics,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use std::{convert::Infallible, sync::Arc};
use tonic::{Status, service::Routes};
use tower::{BoxError, Service, ServiceBuilder};

/// Who decides who may come in, and who notes it.
#[derive(Clone)]
pub struct Doors {
    /// Finds out who calls.
    pub auth: Authenticator,
    /// Notes what operators do.
    pub audit: AuditLog,
    /// How much they may do.
    pub limits: OperatorLimits,
}

/// Puts all layers around the services. At a stop `calls` tells when the work is over.
pub fn stack<A>(
    config: &Grpc,
    reports: CallReports,
    metrics: &Metrics,
    doors: &Doors,
    calls: &CallTracker,
    routes: Routes,
) -> impl Service<
    Request<A>,
    Response = Response<impl Body<Data = Bytes, Error = Status> + Send + 'static>,
    Error = Infallible,
    Future: Send + 'static,
> + Clone
+ Send
+ 'static
where
    A: Body<Data = Bytes> + Send + 'static,
    A::Error: Into<BoxError>,
{
    let refusals = Refusals::new(metrics);
    ServiceBuilder::new()
        // Outermost, as an idle gateway is one where all that the others log and count about calls is logged and counted.
        .layer(DrainLayer::new(calls.clone()))
        // Around all that may log, so that every line has the id; and every answer carries it, also a refusal.
        .layer(RequestIdLayer::new(reports))
        // Outside of all that answers by itself, so that panics, refusals and passed deadlines are counted as what the client sees.
        .layer(MetricsLayer::new(metrics))
        // Inside of the id, which its report names, and of the metrics, which count the INTERNAL; around all that has more to do.
        .layer(CatchPanicLayer::new(metrics))
        // Before all that costs something: a refusal must be cheap when there is too much to do.
        .layer(ShedLayer::new(config, metrics))
        // Behind the limits, so that guessing is limited, too; before a caller is given anything.
        .layer(AuthenticateLayer::new(config, doors.auth.clone(), refusals.clone()))
        // Behind that, as it needs to know who calls; around all that could tell whether anything exists.
        .layer(AuthorizeLayer::new(config, doors.audit.clone(), refusals))
        // Behind that, so that what it refuses is noted, too.
        .layer(QuotaLayer::new(doors.limits.clone()))
        // What it ends is the handler's work alone.
        .layer(DeadlineLayer::new(config))
        // Innermost: it tells the handler, which ends its call itself, as it does with everything that is wrong with a request.
        .layer(PaceLayer::new(config, metrics))
        .service(routes.prepare())
}

/// The services without a layer, which may be called by everybody: what [`stack()`] costs is measured against this.
pub fn no_layers<A>(
    routes: Routes,
) -> impl Service<Request<A>, Response = Response<tonic::body::Body>, Error = Infallible, Future: Send + 'static> + Clone + Send + 'static
where
    A: Body<Data = Bytes> + Send + 'static,
    A::Error: Into<BoxError>,
{
    let everybody = Caller::new(Arc::new(Grant::without_credential(Principal::Open)));
    let as_everybody = move |mut request: Request<A>| {
        request.extensions_mut().insert(everybody.clone());
        request
    };
    ServiceBuilder::new().map_request(as_everybody).service(routes.prepare())
}
