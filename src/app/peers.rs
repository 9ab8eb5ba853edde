//! Other gateways on the same database: what they change is taken over here.
//!
//! A notification says where to look. While the connection that brings them is lost some may be missed: then everything is
//! looked at anew. Beside that the log is looked at from time to time.

use crate::{
    auth::Authenticator,
    fleet::{Configs, Registry},
    live::{Latest, Publisher},
    store::{Change, DeviceKey, PostgresChanges, Store, StoreError},
};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// How often the log is looked at without having been told to.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long to wait before a lost connection is made anew.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// See the [module](self).
pub(super) struct Peers {
    pub store: Store,
    pub publisher: Arc<Publisher>,
    pub latest: Arc<Latest>,
    pub registry: Registry,
    pub configs: Configs,
    pub auth: Authenticator,
}

impl Peers {
    /// Runs until `stop`, or at once to the end where there can be no others.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            match stop.run_until_cancelled(self.follow()).await {
                None | Some(Ok(false)) => return,
                Some(Ok(true)) => tracing::warn!("peers.lost: looking at everything anew"),
                Some(Err(error)) => tracing::warn!(error = &error as &dyn std::error::Error, "peers.failed: trying again"),
            }
            if stop.run_until_cancelled(tokio::time::sleep(RETRY_INTERVAL)).await.is_none() {
                return;
            }
        }
    }

    /// Follows until the connection is lost. `false`: there can be no others.
    async fn follow(&self) -> Result<bool, StoreError> {
        let Some(changes) = self.store.changes().await? else { return Ok(false) };
        // What was changed before is not told any more.
        self.look_at_all().await?;
        tokio::select! {
            followed = self.follow_changes(changes) => followed.map(|()| true),
            failed = self.look_at_log() => Err(failed),
        }
    }

    async fn follow_changes(&self, mut changes: PostgresChanges) -> Result<(), StoreError> {
        while let Some(change) = changes.next().await? {
            match change {
                Change::Log(position) => self.publisher.catch_up_to(position).await?,
                Change::Device(device) => self.look_at_device(device).await?,
                Change::Config(device) => self.look_at_config(device),
                Change::Revocations => self.auth.catch_up().await?,
            }
        }
        Ok(())
    }

    async fn look_at_log(&self) -> StoreError {
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.publisher.catch_up().await {
                return error;
            }
            if let Err(error) = self.auth.catch_up().await {
                return error;
            }
        }
    }

    async fn look_at_all(&self) -> Result<(), StoreError> {
        for device in self.registry.all_loaded() {
            self.look_at_device(device).await?;
            self.look_at_config(device);
        }
        self.auth.catch_up().await?;
        self.publisher.catch_up().await
    }

    async fn look_at_device(&self, device: DeviceKey) -> Result<(), StoreError> {
        if self.registry.renew(device).await? {
            self.latest.forget(device);
        }
        Ok(())
    }

    fn look_at_config(&self, device: DeviceKey) {
        if let Some(device) = self.registry.loaded(device) {
            device.poke_config();
        }
        self.configs.poke_watchers(device);
    }
}
