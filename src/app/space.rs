//! How much of the disk the database takes up, and how much is left, for the metrics.

use crate::{
    config::Storage,
    store::Store,
    telemetry::{Metrics, names},
};
use std::{path::Path, time::Duration};
use tokio_util::sync::CancellationToken;

/// A disk does not fill in seconds, and counting costs the database a query.
const INTERVAL: Duration = Duration::from_secs(15);

/// Looks until `stop`. What can't be found out stays as it was found last.
pub async fn watch(store: Store, settings: Storage, metrics: Metrics, stop: CancellationToken) {
    let used = metrics.gauge(names::STORAGE_BYTES, &[]);
    // Another machine's disk is nothing that a gateway could see.
    let free = (!store.is_shared()).then(|| metrics.gauge(names::STORAGE_FREE_BYTES, &[]));
    let mut ticks = tokio::time::interval(INTERVAL);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Ok(bytes) = store.file_bytes().await {
            used.set(bytes as f64);
        }
        if let Some((free, bytes)) = free.as_ref().zip(free_bytes(&settings.data_dir)) {
            free.set(bytes as f64);
        }
    }
}

/// What this process may still write.
fn free_bytes(directory: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(directory).ok()?;
    Some(found.f_bavail * found.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_room_and_none_has_none() {
        let directory = tempfile::TempDir::new().expect("a directory");
        assert!(free_bytes(directory.path()).is_some_and(|bytes| bytes > 0));
        assert_eq!(free_bytes(&directory.path().join("missing")), None);
    }
}
