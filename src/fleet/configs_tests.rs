use super::*;
use crate::{
    config::Storage,
    fleet::{Registry, reconciler},
    model::{DeviceId, Labels},
    store::ConfigOutcome,
};
use futures_util::FutureExt;
use std::{panic::AssertUnwindSafe, time::Duration};
use tempfile::TempDir;
use tokio::sync::broadcast::error::TryRecvError;

/// A store with its registry and configurations.
struct Fleet {
    store: Store,
    registry: Registry,
    configs: Configs,
    _directory: TempDir,
}

impl Fleet {
    async fn new() -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let settings = Storage { data_dir: directory.path().to_owned(), ..crate::config::Config::default().storage };
        let store = Store::open(&settings).await.expect("opened");
        let registry = Registry::new(store.clone(), false, 10);
        Self { configs: Configs::new(store.clone(), 1_000), registry, store, _directory: directory }
    }

    async fn create(&self) -> Arc<Device> {
        let id = DeviceId::parse("pump-1").expect("an id");
        self.registry.create(&id, Labels::default(), "").await.expect("created")
    }

    async fn set(&self, device: &Arc<Device>, etag: &str) -> Result<u64, Error> {
        let change = ConfigChange { config: "{}".into(), request_id: String::new(), etag: etag.into(), comment: String::new() };
        Ok(self.configs.set(device, change).await?.revision)
    }

    /// Has the device report; returns the revision that it then counts as running with.
    async fn report(&self, device: &Device, revision: u64, outcome: ConfigOutcome) -> u64 {
        let report = ConfigReportRow { revision, outcome, detail: String::new(), time: Timestamp::now() };
        self.configs.note_report(device, &report).await.expect("noted");
        self.state(device).await.applied_revision
    }

    async fn state(&self, device: &Device) -> ConfigStateRow {
        self.configs.state(device.key).await.expect("read").expect("set").1
    }
}

#[tokio::test]
async fn revisions_grow_for_an_id_also_when_its_device_is_deleted_and_made_again() {
    let fleet = Fleet::new().await;
    let first = fleet.create().await;
    for revision in 1..=3 {
        assert_eq!(fleet.set(&first, "").await.expect("set"), revision);
    }
    fleet.registry.delete(&first, None, || ()).await.expect("deleted");
    // One that was never configured has nothing to remember, and makes nothing be forgotten.
    let unconfigured = fleet.create().await;
    fleet.registry.delete(&unconfigured, None, || ()).await.expect("deleted");

    let second = fleet.create().await;
    let mismatch = fleet.set(&second, "r3").await.expect_err("the etag of another device");
    assert!(matches!(mismatch, Error::ConfigEtagMismatch { current, .. } if current.is_empty()));
    assert_eq!(fleet.set(&second, "").await.expect("set"), 4);
    // What the device says of the configuration that it had in its former life is no word on this one.
    assert_eq!(fleet.report(&second, 3, ConfigOutcome::Applied).await, 0);
    assert_eq!(fleet.state(&second).await.reported, None);

    fleet.registry.delete(&second, None, || ()).await.expect("deleted");
    fleet.store.purge_deleted().await.expect("purged");
    let third = fleet.create().await;
    assert_eq!(fleet.set(&third, "").await.expect("set"), 5);
}

#[tokio::test]
async fn a_device_that_goes_back_runs_with_what_it_had_before() {
    use ConfigOutcome::{Applied, Rejected, Reverted};
    let fleet = Fleet::new().await;
    let device = fleet.create().await;
    for _ in 1..=7 {
        fleet.set(&device, "").await.expect("set");
    }
    // (report, what it runs with then)
    for (step, (revision, outcome, applied)) in [
        (4, Applied, 4),
        (5, Applied, 5),
        (5, Applied, 5), // told again
        (5, Reverted, 4),
        (5, Reverted, 4),
        (4, Applied, 4), // older than the last report: void
        (5, Applied, 5), // tried again
        (6, Rejected, 5),
        (5, Reverted, 4), // older, but what it runs with
        (7, Reverted, 4), // it never said that it had applied it
        (7, Applied, 7),
        (7, Rejected, 4),
        (8, Applied, 4), // never set
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(fleet.report(&device, revision, outcome).await, applied, "step {step}: {revision} {outcome:?}");
    }
    let last = fleet.state(&device).await.reported.expect("reported");
    assert_eq!((last.revision, last.outcome), (7, Rejected));
}

#[tokio::test]
async fn a_deleted_device_is_not_found_whatever_the_etag_is() {
    let fleet = Fleet::new().await;
    let device = fleet.create().await;
    fleet.set(&device, "").await.expect("set");
    fleet.registry.delete(&device, None, || ()).await.expect("deleted");
    for etag in ["", "r1", "r9"] {
        let error = fleet.set(&device, etag).await.expect_err("it is gone");
        assert!(matches!(error, Error::DeviceNotFound(_)), "{etag:?}: {error}");
    }
}

/// Scenario: a device reports and its connection breaks. Guarantee: who watches is told what was stored.
#[tokio::test]
async fn what_was_begun_is_stored_and_told_although_its_caller_is_gone() {
    let fleet = Fleet::new().await;
    let device = fleet.create().await;
    fleet.set(&device, "").await.expect("set");
    let mut watcher = fleet.configs.pokes();
    let report = ConfigReportRow { revision: 1, outcome: ConfigOutcome::Applied, detail: String::new(), time: Timestamp::now() };
    let noted = fleet.configs.note_report(&device, &report).now_or_never();
    assert!(noted.is_none(), "it is dropped halfway");
    let poke = tokio::time::timeout(Duration::from_secs(20), watcher.recv()).await.expect("told");
    assert_eq!((poke, fleet.state(&device).await.applied_revision), (Ok(device.key), 1));
}

#[tokio::test]
async fn a_panic_in_it_is_the_callers() {
    let panicked = AssertUnwindSafe(to_the_end(async { panic!("as asked") })).catch_unwind().await;
    let payload = panicked.map(|(): ()| ()).expect_err("it panics");
    assert_eq!(payload.downcast_ref(), Some(&"as asked"));
}

#[tokio::test]
async fn reconciling_wakes_links_and_neither_watchers_nor_devices_that_are_away() {
    let fleet = Fleet::new().await;
    let linked = fleet.create().await;
    let id = DeviceId::parse("pump-2").expect("an id");
    let away = fleet.registry.create(&id, Labels::default(), "").await.expect("created");
    for device in [&linked, &away] {
        fleet.set(device, "").await.expect("set");
    }
    // As after a restart: nothing is loaded but what connects.
    let registry = Registry::new(fleet.store.clone(), false, 10);
    let linked = registry.get(&linked.id).await.expect("there");
    let (mut link, mut watcher) = (linked.config_pokes(), fleet.configs.pokes());
    reconciler::reconcile(&fleet.store, &registry).await.expect("reconciled");
    assert!(link.has_changed().expect("open"));
    assert_eq!(watcher.try_recv(), Err(TryRecvError::Empty));
    assert!(registry.loaded(away.key).is_none());

    // A device that has reported is left alone.
    link.mark_unchanged();
    fleet.report(&linked, 1, ConfigOutcome::Rejected).await;
    reconciler::reconcile(&fleet.store, &registry).await.expect("reconciled");
    assert!(!link.has_changed().expect("open"));
}
