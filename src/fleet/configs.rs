//! Desired and applied configuration: what operators set, what devices got and reported.
//!
//! What is written is told to those who watch, also when the call that it was written for is gone by then.

use super::{registry::Device, to_the_end};
use crate::{
    error::{Error, Failure},
    model::Timestamp,
    store::{ConfigReportRow, ConfigRevisionRow, ConfigStateRow, DeviceKey, Store, StoreError, WriteTx},
};
use std::sync::Arc;
use tokio::sync::broadcast;

/// How many pokes a watcher may be behind before it looks at all its devices anew.
const POKES_KEPT: usize = 4_096;

/// The configurations of all devices. Cheap to clone.
#[derive(Clone)]
pub struct Configs {
    store: Store,
    bytes_max: usize,
    pokes: broadcast::Sender<DeviceKey>,
}

/// A change that an operator asks for.
#[derive(Debug, Clone)]
pub struct ConfigChange {
    /// The whole configuration: a JSON object.
    pub config: String,
    /// The caller's id of the request.
    pub request_id: String,
    /// The etag that must be current; empty: whatever is.
    pub etag: String,
    /// Why.
    pub comment: String,
}

/// The etag of a revision.
pub fn etag(revision: u64) -> String {
    format!("r{revision}")
}

impl Configs {
    /// The configurations in `store`.
    pub fn new(store: Store, bytes_max: usize) -> Self {
        Self { store, bytes_max, pokes: broadcast::Sender::new(POKES_KEPT) }
    }

    /// Wakes watchers with the number of each device whose configuration may have come further.
    pub fn pokes(&self) -> broadcast::Receiver<DeviceKey> {
        self.pokes.subscribe()
    }

    /// Makes a new revision the desired one; under a request id that the device's history knows, the revision of then.
    ///
    /// Its number is above all that were ever used under the device's id, also by devices that were deleted since.
    pub async fn set(&self, device: &Arc<Device>, change: ConfigChange) -> Result<ConfigRevisionRow, Failure> {
        if change.config.len() > self.bytes_max {
            return Err(Error::ConfigTooLarge { bytes: change.config.len(), bytes_max: self.bytes_max }.into());
        }
        let (configs, device) = (self.clone(), device.clone());
        to_the_end(async move { configs.write_revision(&device, change).await }).await
    }

    async fn write_revision(&self, device: &Device, change: ConfigChange) -> Result<ConfigRevisionRow, Failure> {
        let mut tx = self.store.begin().await?;
        // Asked with the transaction in our hands, and the device's row locked: who deletes it holds one, too.
        let there = tx.lock_device(device.key).await?.is_some();
        if let Err(error) = if there { device.check() } else { Err(Error::DeviceNotFound(device.id.clone())) } {
            tx.rollback().await?;
            return Err(error.into());
        }
        if let Some(earlier) = tx.config_of_request(device.key, &change.request_id).await? {
            tx.rollback().await?;
            return Ok(earlier);
        }
        let latest = tx.latest_config(device.key).await?.map(|row| row.revision);
        let current = latest.map(etag).unwrap_or_default();
        if !change.etag.is_empty() && change.etag != current {
            tx.rollback().await?;
            return Err(Error::ConfigEtagMismatch { device: device.id.clone(), current }.into());
        }
        let before = match latest {
            Some(revision) => revision,
            None => tx.retired_revision(&device.id).await?,
        };
        let row = ConfigRevisionRow {
            revision: before + 1,
            config: change.config,
            request_id: change.request_id,
            comment: change.comment,
            create_time: Timestamp::now(),
        };
        tx.insert_config(device.key, &row).await?;
        // Also after a failure, which may have happened all the same: a poke too many harms nobody.
        tx.commit_then(|_| {
            device.poke_config();
            self.poke_watchers(device.key);
        })
        .await?;
        Ok(row)
    }

    /// The desired configuration and how far it has come; `None` when none was ever set.
    pub async fn state(&self, device: DeviceKey) -> Result<Option<(ConfigRevisionRow, ConfigStateRow)>, StoreError> {
        self.store.config(device).await
    }

    /// Notes that a revision was sent to the device.
    pub async fn note_delivered(&self, device: &Device, revision: u64) -> Result<(), StoreError> {
        let (configs, device) = (self.clone(), device.key);
        to_the_end(async move {
            let mut tx = configs.store.begin().await?;
            let changed = tx.note_delivered(device, revision, Timestamp::now()).await?;
            configs.commit_step(tx, device, changed).await
        })
        .await
    }

    /// Notes what the device reported.
    pub async fn note_report(&self, device: &Device, report: &ConfigReportRow) -> Result<(), StoreError> {
        let (configs, device, report) = (self.clone(), device.key, report.clone());
        to_the_end(async move {
            let mut tx = configs.store.begin().await?;
            let changed = tx.note_report(device, &report).await?;
            configs.commit_step(tx, device, changed).await
        })
        .await
    }

    /// Commits, and tells who watches when the device's configuration has come further.
    async fn commit_step(&self, tx: WriteTx<'_>, device: DeviceKey, changed: bool) -> Result<(), StoreError> {
        // Also after a failure: it may have happened all the same.
        let tell = |_| {
            if changed {
                self.poke_watchers(device);
            }
        };
        tx.commit_then(tell).await
    }

    /// Tells who watches that a device's configuration may have come further.
    pub fn poke_watchers(&self, device: DeviceKey) {
        // An error only says that nobody watches.
        let _ = self.pokes.send(device);
    }
}

#[cfg(test)]
#[path = "configs_tests.rs"]
mod tests;
