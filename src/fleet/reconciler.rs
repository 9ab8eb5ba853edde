//! Compares desired with reported configuration from time to time, so that a poke that got lost delays a device, no more.
//!
//! Only links are poked. Watchers are not, as nothing has changed; nor is a device loaded that has no link, as it will look for
//! itself when it connects.

use super::Registry;
use crate::store::{DeviceKey, Store, StoreError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const DEVICES_PER_READ: usize = 500;

/// Runs until `stop`.
pub async fn run(store: Store, registry: Registry, interval: Duration, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        if let Err(error) = reconcile(&store, &registry).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "config.reconcile_failed: trying again at the next interval");
        }
    }
}

pub(super) async fn reconcile(store: &Store, registry: &Registry) -> Result<(), StoreError> {
    let mut after = DeviceKey(0);
    loop {
        let unsettled = store.unsettled_configs(after, DEVICES_PER_READ).await?;
        for &key in &unsettled {
            if let Some(device) = registry.loaded(key) {
                device.poke_config();
            }
        }
        match unsettled.last() {
            Some(&last) if unsettled.len() == DEVICES_PER_READ => after = last,
            _ => return Ok(()),
        }
    }
}
