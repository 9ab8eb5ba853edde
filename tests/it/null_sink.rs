//! The null sink of benchmarks does all that a gateway does, except storing.

use crate::support::{
    client::{TestDevice, nth_batch, temperatures},
    config, soon,
};
use tempfile::TempDir;
use tidegate::{app::Gateway, pb};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn a_null_sink_checks_and_acknowledges_and_stores_nothing() {
    let directory = TempDir::new().expect("a temporary directory");
    let sink = Gateway::build_null_sink(config(directory.path())).await.expect("it starts");
    let channel = crate::support::channel(sink.grpc_addr());
    let stop = CancellationToken::new();
    let running = tokio::spawn(sink.run_until(stop.clone().cancelled_owned()));

    let device = TestDevice::new(&channel, "pump-1");
    let no_values = temperatures(0, &[]);
    let response = device.upload([(1, nth_batch(1)), (2, no_values), (3, nth_batch(3))]).await.expect("accepted");
    assert_eq!((response.last_durable_sequence, response.accepted), (3, Some(pb::Tally { batches: 2, readings: 20 })));
    assert_eq!(response.rejected_counts.len(), 1, "what no gateway takes is rejected");
    assert_eq!(device.ledger().await.stored, Some(pb::Tally::default()));
    assert!(device.stored_temperatures().await.is_empty());

    stop.cancel();
    assert!(soon("the sink stops", running).await.expect("no panic"), "with the last call its writer ends, too");
}
