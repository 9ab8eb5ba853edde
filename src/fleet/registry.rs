//! The registry of devices and sensors: the store's rows, kept at hand for the hot path.
//!
//! A [`Device`] is loaded when it is first asked for and then shared by all that have to do with it.

use super::{account::DeviceAccount, clock::DeviceClock, sensors::Sensors, to_the_end};
use crate::{
    error::{Error, Failure},
    limits::DeviceUsage,
    model::{
        BatchReject, DeviceId, LabelSelector, Labels, Timestamp,
        batch::{RejectReason, SensorUse},
        ids::quoted,
    },
    store::{DeviceKey, DeviceRow, SensorRow, Store, StoreError, WriteTx},
};
use parking_lot::RwLock;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU8, AtomicUsize, Ordering},
    },
};
use tokio::sync::{OnceCell, watch};

/// The registry. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    shared: Arc<Shared>,
}

struct Shared {
    store: Store,
    auto_register: bool,
    devices_max: usize,
    // How many devices there are; counted when it is first needed.
    registered: OnceCell<AtomicUsize>,
    cache: RwLock<Cache>,
}

#[derive(Default)]
struct Cache {
    by_id: HashMap<DeviceId, Arc<Device>>,
    by_key: HashMap<DeviceKey, Arc<Device>>,
    // Deleted while this process runs.
    buried: HashSet<DeviceKey>,
}

/// A registered device, as long as anybody needs it.
pub struct Device {
    /// Its number in the store.
    pub key: DeviceKey,
    /// Its id.
    pub id: DeviceId,
    /// What is known of its clock.
    pub clock: DeviceClock,
    // In microseconds, `NEVER` before it is seen. Not in the store: a write for each sign of life would cost more than it tells.
    seen: AtomicI64,
    /// What it has used of what it may.
    pub usage: DeviceUsage,
    /// What of its account is not in the store.
    pub account: DeviceAccount,
    row: RwLock<DeviceRow>,
    // Replaced as a whole when a sensor comes or changes, so that the hot path holds no lock while it looks.
    sensors: RwLock<Arc<Sensors>>,
    standing: AtomicU8,
    config_poke: watch::Sender<()>,
}

// What a device's `seen` is before this process has seen it.
const NEVER: i64 = i64::MIN;

// What a device's `standing` is.
const REGISTERED: u8 = 0;
const DELETED: u8 = 1;
const UNKNOWN: u8 = 2;

impl Device {
    fn new(row: DeviceRow, sensors: Vec<SensorRow>) -> Self {
        Self {
            key: row.key,
            id: row.id.clone(),
            clock: DeviceClock::default(),
            seen: AtomicI64::new(NEVER),
            usage: DeviceUsage::default(),
            account: DeviceAccount::default(),
            row: RwLock::new(row),
            sensors: RwLock::new(Arc::new(Sensors::default().with(sensors))),
            standing: AtomicU8::new(REGISTERED),
            config_poke: watch::Sender::new(()),
        }
    }

    /// What the store holds of it.
    pub fn row(&self) -> DeviceRow {
        self.row.read().clone()
    }

    /// Notes that it was heard of; an older time than is known changes nothing.
    pub fn see(&self, time: Timestamp) {
        self.seen.fetch_max(time.micros(), Ordering::Relaxed);
    }

    /// When it was last heard of since this process began; `None` when it was not.
    pub fn last_seen(&self) -> Option<Timestamp> {
        Some(self.seen.load(Ordering::Relaxed)).filter(|micros| *micros != NEVER).and_then(Timestamp::from_micros)
    }

    /// Whether its labels match.
    pub fn matches(&self, selector: &LabelSelector) -> bool {
        selector.is_empty() || selector.matches(&self.row.read().labels)
    }

    /// Whether it was deleted.
    pub fn is_deleted(&self) -> bool {
        self.standing.load(Ordering::Acquire) == DELETED
    }

    /// Whether what is under way for it may go on: a deleted device is [`Error::DeviceNotFound`]; one of which it is not known
    /// what the store holds, after a failed commit, is [`Error::StoreUnavailable`] until it is asked for anew.
    pub fn check(&self) -> Result<(), Error> {
        match self.standing.load(Ordering::Acquire) {
            REGISTERED => Ok(()),
            DELETED => Err(Error::DeviceNotFound(self.id.clone())),
            _ => Err(Error::StoreUnavailable),
        }
    }

    /// Why a change can't be made of the device as it is; the caller holds the transaction that would make it.
    fn refusal(&self, row: &DeviceRow, etag_revision: Option<i64>) -> Option<Error> {
        if let Err(error) = self.check() {
            return Some(error);
        }
        let stale = etag_revision.is_some_and(|revision| revision != row.revision);
        stale.then(|| Error::DeviceEtagMismatch { device: self.id.clone(), current: row.revision.to_string() })
    }

    /// A sensor by its name.
    pub fn sensor(&self, name: &str) -> Option<SensorRow> {
        self.sensors.read().get(name).cloned()
    }

    /// All its sensors as of now.
    pub fn sensors(&self) -> Arc<Sensors> {
        self.sensors.read().clone()
    }

    /// How many sensors it has.
    pub fn sensors_len(&self) -> usize {
        self.sensors.read().len()
    }

    /// Takes over sensors that are in the store, and the units of those that are known already: these are said once. All else of them may
    /// have changed since `rows` were read.
    pub fn learn(&self, rows: impl IntoIterator<Item = SensorRow>) {
        self.take_over(rows, |row, known| SensorRow { unit: row.unit, ..known.clone() });
    }

    /// The same, and takes over what an operator may set of them: for who holds a transaction of [`Store::begin`], as they do who set it.
    fn learn_settings(&self, rows: impl IntoIterator<Item = SensorRow>) {
        self.take_over(rows, |row, _| row);
    }

    fn take_over(&self, rows: impl IntoIterator<Item = SensorRow>, of_known: impl Fn(SensorRow, &SensorRow) -> SensorRow) {
        let mut sensors = self.sensors.write();
        let rows = rows.into_iter().map(|mut row| {
            let Some(known) = sensors.get(&row.name) else { return row };
            // It never becomes unsaid: `row` may have been read before it was said.
            if row.unit.is_empty() {
                row.unit.clone_from(&known.unit);
            }
            of_known(row, known)
        });
        *sensors = Arc::new(sensors.with(rows));
    }

    /// Tells the device's link to compare desired and applied configuration. Carries no data: a lost or doubled poke harms nothing.
    pub fn poke_config(&self) {
        self.config_poke.send_replace(());
    }

    /// Wakes at each [`poke_config`](Self::poke_config) from now on.
    pub fn config_pokes(&self) -> watch::Receiver<()> {
        self.config_poke.subscribe()
    }

    /// Compares a batch's sensors with the device's; `staged` are sensors of transactions that are not yet committed.
    ///
    /// Returns the rows that the batch makes or changes: sensors seen for the first time, and units said for the first time.
    pub fn judge(
        &self,
        sensors: &BTreeMap<String, SensorUse>,
        readings: u32,
        staged: &HashMap<String, SensorRow>,
        sensors_max: usize,
        now: Timestamp,
    ) -> Result<Vec<SensorRow>, BatchReject> {
        let known = self.sensors();
        let mut changes = Vec::new();
        let mut new = 0;
        for (name, used) in sensors {
            let reject =
                |reason, field: &str, message| BatchReject { reason, field: field.to_owned(), message, readings: u64::from(readings) };
            let sensor = staged.get(name).or_else(|| known.get(name));
            if let Some(field) = &used.non_finite
                && !sensor.is_some_and(|sensor| sensor.allow_non_finite)
            {
                let message =
                    format!("{} has NaN or an infinity, which the sensor does not allow (UpdateSensor can allow it)", quoted(name));
                return Err(reject(RejectReason::NonFinite, field, message));
            }
            let Some(sensor) = sensor else {
                new += 1;
                changes.push(SensorRow {
                    key: 0,
                    name: name.clone(),
                    unit: used.unit.clone(),
                    kind: used.kind,
                    allow_non_finite: false,
                    create_time: now,
                });
                continue;
            };
            if sensor.kind != used.kind {
                let message = format!("{} has {} values, and had {} values before", quoted(name), used.kind, sensor.kind);
                return Err(reject(RejectReason::KindChanged, &used.field, message));
            }
            if !used.unit.is_empty() && used.unit != sensor.unit {
                if !sensor.unit.is_empty() {
                    let message = format!("{} has the unit {:?}, and had {:?} before", quoted(name), used.unit, sensor.unit);
                    return Err(reject(RejectReason::UnitChanged, &used.field, message));
                }
                changes.push(SensorRow { unit: used.unit.clone(), ..sensor.clone() });
            }
        }
        let staged_new = staged.keys().filter(|name| known.get(name).is_none()).count();
        if new > 0 && known.len() + staged_new + new > sensors_max {
            let message = format!(
                "{} sensors are known and the batch brings {new} more: at most {sensors_max} are allowed (devices.sensors_max)",
                known.len() + staged_new
            );
            return Err(BatchReject { reason: RejectReason::TooManySensors, field: String::new(), message, readings: u64::from(readings) });
        }
        Ok(changes)
    }
}

impl Registry {
    /// The registry of what `store` holds: at most `devices_max` devices.
    pub fn new(store: Store, auto_register: bool, devices_max: usize) -> Self {
        Self { shared: Arc::new(Shared { store, auto_register, devices_max, registered: OnceCell::new(), cache: RwLock::default() }) }
    }

    /// The device, or [`Error::DeviceNotFound`].
    pub async fn get(&self, id: &DeviceId) -> Result<Arc<Device>, Failure> {
        if let Some(device) = self.shared.cache.read().by_id.get(id) {
            return Ok(device.clone());
        }
        match self.shared.store.device(id).await? {
            Some(row) => self.load(row).await,
            None => Err(Error::DeviceNotFound(id.clone()).into()),
        }
    }

    /// The device for an upload: registered now if it is new and the settings allow it.
    pub async fn get_or_register(&self, id: &DeviceId) -> Result<Arc<Device>, Failure> {
        match self.get(id).await {
            Err(Failure::Refused(Error::DeviceNotFound(_))) if self.shared.auto_register => {}
            found => return found,
        }
        match self.create(id, Labels::default(), "").await {
            // Somebody else was quicker, which is as well.
            Err(Failure::Refused(Error::DeviceExists(_))) => self.get(id).await,
            created => created,
        }
    }

    /// The device with this number; `None` when it was deleted.
    pub async fn by_key(&self, key: DeviceKey) -> Result<Option<Arc<Device>>, StoreError> {
        if let Some(device) = self.shared.cache.read().by_key.get(&key) {
            return Ok(Some(device.clone()));
        }
        match self.shared.store.device_by_key(key).await? {
            None => Ok(None),
            Some(row) => match self.load(row).await {
                Ok(device) => Ok(Some(device)),
                Err(Failure::Store(error)) => Err(error),
                Err(Failure::Refused(_)) => Ok(None),
            },
        }
    }

    /// Takes over what another gateway has changed of a device, when it is loaded. Whether the device is gone.
    pub async fn renew(&self, key: DeviceKey) -> Result<bool, StoreError> {
        let Some(device) = self.loaded(key) else { return Ok(false) };
        let Some(row) = self.shared.store.device_by_key(key).await? else {
            self.bury(&device);
            device.poke_config();
            return Ok(true);
        };
        // With the transaction in hand: what an operator sets meanwhile on this gateway would be undone by what was read before.
        let tx = self.shared.store.begin().await?;
        let sensors = self.shared.store.sensors(key).await?;
        device.learn_settings(sensors);
        tx.rollback().await?;
        // Of two reads that overtake one another the older changes nothing.
        let mut known = device.row.write();
        if known.revision < row.revision {
            *known = row;
        }
        Ok(false)
    }

    /// Looks at all devices that are loaded. `look` must be quick: others wait.
    pub fn each_loaded(&self, mut look: impl FnMut(&Device)) {
        self.shared.cache.read().by_key.values().for_each(|device| look(device));
    }

    /// The numbers of all devices that are loaded.
    pub fn all_loaded(&self) -> Vec<DeviceKey> {
        self.shared.cache.read().by_key.keys().copied().collect()
    }

    /// The device with this number, when it is loaded, as it is while anybody has to do with it.
    pub fn loaded(&self, key: DeviceKey) -> Option<Arc<Device>> {
        self.shared.cache.read().by_key.get(&key).cloned()
    }

    /// Registers a device.
    pub async fn create(&self, id: &DeviceId, labels: Labels, display_name: &str) -> Result<Arc<Device>, Failure> {
        let (registry, id, display_name) = (self.clone(), id.clone(), display_name.to_owned());
        to_the_end(async move {
            let shared = &registry.shared;
            // Before the transaction: from then on the number is kept along.
            let count = async || shared.store.devices_len().await.map(AtomicUsize::new);
            let registered = shared.registered.get_or_try_init(count).await?;
            let mut tx = shared.store.begin().await?;
            let Some(row) = tx.insert_device(&id, &labels, &display_name, Timestamp::now()).await? else {
                tx.rollback().await?;
                return Err(Error::DeviceExists(id).into());
            };
            // What other gateways register and delete is not kept along.
            if shared.store.is_shared() {
                registered.store(shared.store.devices_len().await?, Ordering::Release);
            }
            if registered.load(Ordering::Acquire) >= shared.devices_max {
                tx.rollback().await?;
                return Err(Error::Overloaded { setting: "devices.devices_max", limit: shared.devices_max }.into());
            }
            // After a failure it may be one too many, which the limit bears.
            tx.commit_then(|_| {
                registered.fetch_add(1, Ordering::AcqRel);
            })
            .await?;
            registry.load(row).await
        })
        .await
    }

    /// Changes labels and display name of a device; `etag_revision`, when given, must be its revision.
    pub async fn update(
        &self,
        device: &Arc<Device>,
        etag_revision: Option<i64>,
        change: impl FnOnce(&mut DeviceRow) + Send + 'static,
    ) -> Result<DeviceRow, Failure> {
        let (registry, device) = (self.clone(), device.clone());
        to_the_end(async move {
            let (mut tx, mut row) = registry.begin_change(&device, etag_revision).await?;
            let revision = row.revision;
            change(&mut row);
            let updated = tx.update_device(device.key, revision, &row.labels, &row.display_name, Timestamp::now()).await?;
            let Some(updated) = updated else {
                tx.rollback().await?;
                return Err(Error::DeviceNotFound(device.id.clone()).into());
            };
            tx.commit_then(|committed| match committed {
                true => device.row.write().clone_from(&updated),
                false => registry.distrust(&device),
            })
            .await?;
            Ok(updated)
        })
        .await
    }

    /// Registers or changes a sensor. Its kind is that of the sensor that is there, if one is.
    pub async fn save_sensor(&self, device: &Arc<Device>, sensor: SensorRow) -> Result<SensorRow, Failure> {
        let (registry, device) = (self.clone(), device.clone());
        to_the_end(async move {
            let (mut tx, _) = registry.begin_change(&device, None).await?;
            let mut stored = tx.insert_sensor(device.key, &sensor).await?;
            stored.allow_non_finite = sensor.allow_non_finite;
            tx.set_sensor_allowance(&stored).await?;
            tx.commit_then(|committed| match committed {
                true => device.learn_settings([stored.clone()]),
                false => registry.distrust(&device),
            })
            .await?;
            Ok(stored)
        })
        .await
    }

    /// Takes a device out of the registry, and then calls `gone`. What it left is deleted by [`Store::purge_deleted`].
    pub async fn delete(
        &self,
        device: &Arc<Device>,
        etag_revision: Option<i64>,
        gone: impl FnOnce() + Send + 'static,
    ) -> Result<(), Failure> {
        let (registry, device) = (self.clone(), device.clone());
        to_the_end(async move {
            // Either a batch of the device is committed before, and purged, or it is refused: the writer looks whether a device is deleted
            // with its transaction in hand, which in SQLite excludes ours, and in PostgreSQL finds no row of the stream to move on.
            let (mut tx, _) = registry.begin_change(&device, etag_revision).await?;
            tx.delete_device(device.key).await?;
            tx.commit_then(|committed| match committed {
                true => registry.bury(&device),
                false => registry.distrust(&device),
            })
            .await?;
            // Whoever is linked as this device finds that it is gone.
            device.poke_config();
            gone();
            Ok(())
        })
        .await
    }

    /// Devices in the order of their ids, behind the id `after`, that match: at most `devices_max`, and whether there are more.
    pub async fn list(&self, selector: &LabelSelector, after: &str, devices_max: usize) -> Result<(Vec<DeviceRow>, bool), StoreError> {
        const ROWS_PER_READ: usize = 1_000;
        let (mut found, mut after) = (Vec::new(), after.to_owned());
        loop {
            let rows = self.shared.store.devices(&after, ROWS_PER_READ).await?;
            let last_page = rows.len() < ROWS_PER_READ;
            for row in rows {
                after = row.id.to_string();
                if selector.matches(&row.labels) {
                    if found.len() == devices_max {
                        return Ok((found, true));
                    }
                    found.push(row);
                }
            }
            if last_page {
                return Ok((found, false));
            }
        }
    }

    /// Begins a transaction that changes a device, unless it can't be changed: nobody else changes it until the commit.
    pub(super) async fn begin_change(&self, device: &Device, etag_revision: Option<i64>) -> Result<(WriteTx<'_>, DeviceRow), Failure> {
        let mut tx = self.shared.store.begin().await?;
        let Some(row) = tx.lock_device(device.key).await? else {
            tx.rollback().await?;
            // By another gateway.
            self.bury(device);
            return Err(Error::DeviceNotFound(device.id.clone()).into());
        };
        if let Some(refusal) = device.refusal(&row, etag_revision) {
            tx.rollback().await?;
            return Err(refusal.into());
        }
        Ok((tx, row))
    }

    async fn load(&self, row: DeviceRow) -> Result<Arc<Device>, Failure> {
        let sensors = self.shared.store.sensors(row.key).await?;
        let loaded = Arc::new(Device::new(row, sensors));
        let mut cache = self.shared.cache.write();
        // It may have been deleted since its row was read: numbers are never used again, so this is for good.
        if cache.buried.contains(&loaded.key) {
            return Err(Error::DeviceNotFound(loaded.id.clone()).into());
        }
        // Somebody else may have loaded it meanwhile: all must share one.
        let device = cache.by_key.entry(loaded.key).or_insert(loaded).clone();
        cache.by_id.insert(device.id.clone(), device.clone());
        Ok(device)
    }

    /// A deleted device is never found again.
    fn bury(&self, device: &Device) {
        device.standing.store(DELETED, Ordering::Release);
        if !self.shared.cache.write().buried.insert(device.key) {
            return;
        }
        if let Some(registered) = self.shared.registered.get() {
            let _ = registered.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| count.checked_sub(1));
        }
        self.forget(device);
    }

    /// The next who asks for the device reads the store.
    fn forget(&self, device: &Device) {
        let mut cache = self.shared.cache.write();
        cache.by_id.remove(&device.id);
        cache.by_key.remove(&device.key);
    }

    /// After a failed commit it is not known what the store holds of the device: those who have it at hand must not go on
    /// with it, and the next who asks reads the store.
    fn distrust(&self, device: &Device) {
        device.standing.store(UNKNOWN, Ordering::Release);
        self.forget(device);
        device.poke_config();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, model::ValueKind, store::test_databases};

    #[tokio::test]
    async fn what_is_learnt_of_a_sensor_late_undoes_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let config = Config { storage: test_databases::sqlite(directory.path()), ..Config::default() };
        let store = Store::open(&config.storage).await.expect("opened");
        let registry = Registry::new(store.clone(), true, usize::MAX);
        let device = registry.get_or_register(&DeviceId::parse("pump").expect("an id")).await.expect("registered");
        let row = |unit: &str, allow_non_finite| SensorRow {
            key: 1,
            name: "t".to_owned(),
            unit: unit.to_owned(),
            kind: ValueKind::Double,
            allow_non_finite,
            create_time: Timestamp::now(),
        };
        let known = || {
            let sensors = device.sensors.read();
            let sensor = sensors.get("t").expect("known");
            (sensor.unit.clone(), sensor.allow_non_finite)
        };
        device.learn([row("", false)]);
        assert_eq!(known(), (String::new(), false));
        // An operator's transaction found the unit that a batch had said, whose own transaction tells of it later.
        device.learn_settings([row("C", true)]);
        device.learn([row("C", false)]);
        assert_eq!(known(), ("C".to_owned(), true));
        // What was read before the batch said it.
        device.learn_settings([row("", false)]);
        assert_eq!(known(), ("C".to_owned(), false));
        store.close().await;
    }
}
