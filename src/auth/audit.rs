//! The audit log: what operators did.

use super::Caller;
use crate::{
    model::Timestamp,
    store::{AuditQuery, AuditRow, Store, StoreError},
};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How often what is old is deleted.
const CLEANING_INTERVAL: Duration = Duration::from_secs(3600);
/// How long revocations are remembered: longer than a gateway goes without looking at them.
const REVOCATIONS_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Where operator actions are noted. Cheap to clone.
#[derive(Clone)]
pub struct AuditLog {
    // None: nothing is noted, as nobody is asked who they are.
    store: Option<Store>,
    age_max: Duration,
}

impl AuditLog {
    /// One that notes nothing.
    pub fn off() -> Self {
        Self { store: None, age_max: Duration::ZERO }
    }

    /// One that keeps entries for `age_max`.
    pub fn new(store: Store, age_max: Duration) -> Self {
        Self { store: Some(store), age_max }
    }

    /// Notes a call. Failing to is told in the gateway's log, with all that was to be noted.
    pub async fn note(&self, row: AuditRow) {
        let Some(store) = &self.store else { return };
        let insert = async {
            let mut tx = store.begin().await?;
            tx.insert_audit(&row).await?;
            tx.commit().await
        };
        if let Err(error) = insert.await {
            tracing::error!(error = &error as &dyn std::error::Error, entry = ?row, "audit.failed");
        }
    }

    /// Whether calls of somebody are noted.
    pub fn notes(&self, caller: &Caller) -> bool {
        self.store.is_some() && !caller.grant.actor().is_empty()
    }

    /// Entries, newest first.
    pub async fn read(&self, query: &AuditQuery) -> Result<Vec<AuditRow>, StoreError> {
        match &self.store {
            Some(store) => store.audit(query).await,
            None => Ok(Vec::new()),
        }
    }

    /// Deletes what is old, until `stop`.
    pub async fn keep_short(self, stop: CancellationToken) {
        let Some(store) = self.store else { return };
        let mut ticks = tokio::time::interval(CLEANING_INTERVAL);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let now = Timestamp::now();
            let clean = async {
                let mut tx = store.begin().await?;
                let entries = tx.forget_identity_before(now.saturating_sub(self.age_max), now.saturating_sub(REVOCATIONS_AGE)).await?;
                tx.commit().await?;
                Ok::<_, StoreError>(entries)
            };
            match clean.await {
                Ok(0) => {}
                Ok(entries) => tracing::info!(entries, "audit.forgotten"),
                Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "audit.cleaning_failed"),
            }
        }
    }
}
