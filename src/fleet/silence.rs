//! How many devices are silent, for the metrics.

use crate::{
    model::Timestamp,
    store::Store,
    telemetry::{Metrics, names},
};
use std::time::Duration;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// How often they are counted at the most: each time the database looks at all devices.
const INTERVAL: Duration = Duration::from_secs(60);

/// Counts the devices of which nothing came in for `silent_after`, until `stop`. What can't be found out stays as it was found last.
///
/// The store alone is asked, so that all gateways on one database say the same.
pub async fn watch(store: Store, silent_after: Duration, metrics: Metrics, stop: CancellationToken) {
    let silent = metrics.gauge(names::DEVICES_SILENT, &[]);
    let mut ticks = tokio::time::interval(INTERVAL.min(silent_after));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        match store.silent_devices_len(Timestamp::now().saturating_sub(silent_after)).await {
            Ok(count) => silent.set(count as f64),
            Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "device.silence_unknown: counting again later"),
        }
    }
}
