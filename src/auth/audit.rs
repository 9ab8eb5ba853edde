//! The audit log: what operators did.

use super::Caller;
use crate::{
    middleware::code_name,
    model::Timestamp,
    store::{AuditQuery, AuditRow, Store, StoreError},
};
use parking_lot::Mutex;
use std::{sync::Arc, time::Duration};
use tokio::{runtime::Handle, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Code;

/// How often what is old is deleted.
const CLEANING_INTERVAL: Duration = Duration::from_secs(3600);
/// How long revocations are remembered: longer than a gateway goes without looking at them.
const REVOCATIONS_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// How many entries one transaction deletes, which others wait for.
const FORGOTTEN_AT_ONCE: u64 = 1_000;
/// How much of what a call was about is kept: what callers send is not to fill the log.
const RESOURCE_CHARS_MAX: usize = 512;

/// An entry to come: written when it is known how the call ended, or as CANCELLED when it is dropped before.
pub struct PendingEntry {
    row: Option<AuditRow>,
    resource: Arc<Mutex<String>>,
    audit: AuditLog,
}

impl PendingEntry {
    /// An entry with the resource that is in `resource` at the end.
    pub fn new(audit: AuditLog, row: AuditRow, resource: Arc<Mutex<String>>) -> Self {
        Self { row: Some(row), resource, audit }
    }

    /// Writes it on a task of its own, which goes on when the client goes away.
    pub fn write(&mut self, code: Code) -> Option<JoinHandle<()>> {
        let mut row = self.row.take()?;
        row.time = Timestamp::now();
        row.resource = std::mem::take(&mut *self.resource.lock());
        row.outcome = code_name(code).to_owned();
        let audit = self.audit.clone();
        let writes = audit.writes.clone();
        Some(writes.spawn_on(async move { audit.note(row).await }, &Handle::try_current().ok()?))
    }
}

impl Drop for PendingEntry {
    fn drop(&mut self) {
        self.write(Code::Cancelled);
    }
}

/// Where operator actions are noted. Cheap to clone.
#[derive(Clone)]
pub struct AuditLog {
    // None: nothing is noted, as nobody is asked who they are.
    store: Option<Store>,
    age_max: Duration,
    // Those under way, which their calls need not wait for to the end.
    writes: TaskTracker,
}

impl AuditLog {
    /// One that notes nothing.
    pub fn off() -> Self {
        Self { store: None, age_max: Duration::ZERO, writes: TaskTracker::new() }
    }

    /// One that keeps entries for `age_max`.
    pub fn new(store: Store, age_max: Duration) -> Self {
        Self { store: Some(store), age_max, writes: TaskTracker::new() }
    }

    /// Notes a call. Failing to is told in the gateway's log, with all that was to be noted.
    pub async fn note(&self, mut row: AuditRow) {
        let Some(store) = &self.store else { return };
        row.resource = row.resource.chars().filter(|c| !c.is_control()).take(RESOURCE_CHARS_MAX).collect();
        let insert = async {
            let mut tx = store.begin().await?;
            tx.insert_audit(&row).await?;
            tx.commit().await
        };
        if let Err(error) = insert.await {
            tracing::error!(error = &error as &dyn std::error::Error, entry = ?row, "audit.failed");
        }
    }

    /// Waits until all entries are written, when no more calls come.
    pub async fn settled(&self) {
        self.writes.close();
        self.writes.wait().await;
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
            let clean = async {
                let now = Timestamp::now();
                let mut tx = store.begin().await?;
                tx.forget_revocations_before(now.saturating_sub(REVOCATIONS_AGE)).await?;
                tx.commit().await?;
                let (mut entries, mut forgotten) = (0, FORGOTTEN_AT_ONCE);
                while forgotten == FORGOTTEN_AT_ONCE {
                    let mut tx = store.begin().await?;
                    forgotten = tx.forget_audit_before(now.saturating_sub(self.age_max), FORGOTTEN_AT_ONCE as usize).await?;
                    tx.commit().await?;
                    entries += forgotten;
                }
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
