//! `grpc.health.v1`: what probes and load balancers are told, which follows the readiness.

use crate::{
    pb,
    telemetry::{Metrics, Readiness, names},
};
use prost::Message;
use tokio_util::sync::CancellationToken;
use tonic_health::{
    ServingStatus,
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};

/// Sets the health of every service. Cheap to clone.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
    // Every service of the descriptor set, and "" for the gateway as a whole.
    services: Vec<String>,
}

impl Health {
    /// The reporter, and the service that answers. What it answers before the first [`set`](Self::set) means nothing.
    pub fn new() -> (Self, HealthServer<HealthService>) {
        let set = prost_types::FileDescriptorSet::decode(pb::DESCRIPTOR_SET).expect("the build made the descriptor set");
        let named = set.file.iter().flat_map(|file| file.service.iter().map(|service| format!("{}.{}", file.package(), service.name())));
        let services = named.chain([String::new()]).collect();
        let reporter = HealthReporter::new();
        let server = HealthServer::new(HealthService::from_health_reporter(reporter.clone()));
        (Self { reporter, services }, server)
    }

    /// Says of every service whether it can do its work: each needs the store, so all are alike.
    pub async fn set(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in &self.services {
            self.reporter.set_service_status(service, status).await;
        }
    }

    /// Follows the readiness until `stop`.
    pub async fn follow(self, readiness: Readiness, metrics: Metrics, stop: CancellationToken) {
        let mut changes = readiness.subscribe();
        let ready = metrics.gauge(names::READY, &[]);
        loop {
            let is_ready = changes.borrow_and_update().is_ready();
            ready.set(f64::from(u8::from(is_ready)));
            self.set(is_ready).await;
            match stop.run_until_cancelled(changes.changed()).await {
                Some(Ok(())) => {}
                _ => return,
            }
        }
    }
}
