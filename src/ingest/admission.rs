//! Admission: how many bytes of batches may be on their way to their commit, and how many of these may be backlog.
//!
//! A device that comes back from an outage sends all that it has kept, as fast as it can. Were it admitted like the others, what it
//! sends would stand in front of what they have just measured. So it has a narrow lane of its own: as long as the newest reading
//! of what a call sends is old, it goes on only in its turn. One device has its turn at a time, in the order in which they ask, and sends
//! on what it has in one run: a few large runs are less in the way of live readings than many small ones, of which each wakes a task,
//! a connection and a client. Nobody starves, and the order within a stream is that of its call.
//!
//! A narrow lane alone is not enough where the processors are what is scarce: as soon as a commit ends, the next turn would begin. So
//! beside live calls the lane rests: the next turn begins only after as long again as the last one took, and
//! the processors and the disk belong to live readings meanwhile.

use super::run::Run;
use crate::{
    config,
    error::Error,
    telemetry::{Metrics, names},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What a waiting batch costs besides its bytes.
const BATCH_OVERHEAD_BYTES: usize = 1 << 10;
/// How long the backlog's lane rests behind a turn at the most: after a commit that took long for a reason of its own, a backlog need not stand still.
const REST_MAX: Duration = Duration::from_millis(100);
/// How long after the last live batch the lane still rests.
const LIVE_FOR: Duration = Duration::from_secs(1);

/// How what a call sends is admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lane {
    /// As all that was measured just now.
    #[default]
    Live,
    /// As what was kept during an outage.
    Backlog,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(super) struct Admission {
    all: Budget,
    backlog: Turns,
    backlog_age: Duration,
}

/// What is held from admission to commit.
pub(super) struct Permit {
    all: OwnedSemaphorePermit,
    turn: Option<Turn>,
}

impl Permit {
    pub fn lane(&self) -> Lane {
        if self.turn.is_some() { Lane::Backlog } else { Lane::Live }
    }
}

/// When the last live batch came in. Cheap to clone.
#[derive(Clone)]
struct LastLive {
    began: Instant,
    // In milliseconds after `began`; 0 before the first.
    millis: Arc<AtomicU64>,
}

impl LastLive {
    fn new() -> Self {
        Self { began: Instant::now(), millis: Arc::default() }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    fn see(&self) {
        self.millis.store(self.now(), Relaxed);
    }

    fn is_recent(&self) -> bool {
        let last = self.millis.load(Relaxed);
        last > 0 && self.now().saturating_sub(last) < LIVE_FOR.as_millis() as u64
    }
}

/// The lane of backlogs. Cheap to clone.
#[derive(Clone)]
struct Turns {
    free: Arc<Semaphore>,
    /// How many bytes one may take.
    bytes_max: usize,
    // Of the turn that somebody has.
    bytes: Arc<AtomicUsize>,
    live: LastLive,
}

/// The turn of a device with a backlog; the lane rests behind it when live batches come in.
struct Turn {
    taken: Option<OwnedSemaphorePermit>,
    lane: Turns,
    since: Instant,
}

impl Turns {
    fn new(bytes_max: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(1)), bytes_max, bytes: Arc::default(), live: LastLive::new() }
    }

    async fn take(&self, bytes: usize) -> Result<Turn, Error> {
        let taken = self.free.clone().acquire_owned().await.map_err(|_| Error::Draining)?;
        self.bytes.store(bytes + BATCH_OVERHEAD_BYTES, Relaxed);
        Ok(Turn { taken: Some(taken), lane: self.clone(), since: Instant::now() })
    }
}

impl Turn {
    /// Takes a further batch in the same turn, if that is not too much for one.
    fn extend(&self, bytes: usize) -> bool {
        let all = self.lane.bytes.load(Relaxed) + bytes + BATCH_OVERHEAD_BYTES;
        let room = all <= self.lane.bytes_max;
        if room {
            self.lane.bytes.store(all, Relaxed);
        }
        room
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.lane.bytes.store(0, Relaxed);
        if !self.lane.live.is_recent() {
            return;
        }
        // Without a runtime the gateway is at its end, and nobody waits.
        let (Some(taken), Ok(runtime)) = (self.taken.take(), tokio::runtime::Handle::try_current()) else { return };
        let rest = self.since.elapsed().min(REST_MAX);
        runtime.spawn(async move {
            tokio::time::sleep(rest).await;
            drop(taken);
        });
    }
}

/// Bytes that are given out and come back.
#[derive(Clone)]
struct Budget {
    free: Arc<Semaphore>,
    bytes_max: usize,
}

impl Budget {
    fn new(bytes_max: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(bytes_max)), bytes_max }
    }

    /// A batch that is larger than all of it takes all of it.
    fn cost(&self, bytes: usize) -> u32 {
        u32::try_from((bytes + BATCH_OVERHEAD_BYTES).min(self.bytes_max)).unwrap_or(u32::MAX)
    }

    async fn take(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Error> {
        self.free.clone().acquire_many_owned(self.cost(bytes)).await.map_err(|_| Error::Draining)
    }

    fn take_now(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        self.free.clone().try_acquire_many_owned(self.cost(bytes)).ok()
    }
}

impl Admission {
    pub fn new(settings: &config::Ingest) -> Self {
        let config::Ingest { pending_bytes_max, backlog_bytes_max, backlog_age, .. } = *settings;
        Self { all: Budget::new(pending_bytes_max), backlog: Turns::new(backlog_bytes_max), backlog_age }
    }

    /// Admits a batch; waits while too many bytes are on their way already.
    pub async fn admit(&self, lane: Lane, bytes: usize) -> Result<Permit, Error> {
        let turn = match lane {
            Lane::Live => None,
            Lane::Backlog => Some(self.backlog.take(bytes).await?),
        };
        Ok(Permit { all: self.all.take(bytes).await?, turn })
    }

    /// Admits a further batch, if that is possible without waiting.
    pub fn admit_with(&self, permit: &mut Permit, bytes: usize) -> bool {
        if permit.turn.as_ref().is_some_and(|turn| !turn.extend(bytes)) {
            return false;
        }
        let Some(more) = self.all.take_now(bytes) else { return false };
        permit.all.merge(more);
        true
    }

    /// How what comes in behind a run is admitted: by how old the newest of its readings was when it came in.
    pub fn lane_behind(&self, run: &Run) -> Lane {
        match run.newest_time() {
            Some(newest) if newest.saturating_add(self.backlog_age) < run.receive_time => Lane::Backlog,
            Some(_) => {
                self.backlog.live.see();
                Lane::Live
            }
            // Nothing of it can be stored, which says nothing about what comes next.
            None => run.lane(),
        }
    }

    /// Shows at each scrape how many bytes are on their way.
    pub fn show(&self, metrics: &Metrics) {
        // Not the handle to the writer itself: that would keep it from ending.
        let (pending, Budget { free, bytes_max }) = (metrics.gauge(names::PENDING_BYTES, &[]), self.all.clone());
        metrics.on_scrape(move || pending.set((bytes_max - free.available_permits()) as f64));
        let (pending, bytes) = (metrics.gauge(names::BACKLOG_PENDING_BYTES, &[]), self.backlog.bytes.clone());
        metrics.on_scrape(move || pending.set(bytes.load(Relaxed) as f64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn admission() -> Admission {
        let defaults = config::Config::default().ingest;
        Admission::new(&config::Ingest { pending_bytes_max: 64 << 10, backlog_bytes_max: 16 << 10, ..defaults })
    }

    #[test]
    fn a_backlog_leaves_the_room_beyond_its_turn_to_others() {
        let admission = admission();
        let admit = |lane| admission.admit(lane, 7 << 10).now_or_never().map(|permit| permit.expect("open"));
        let mut backlog = admit(Lane::Backlog).expect("room");
        assert!(admission.admit_with(&mut backlog, 7 << 10));
        assert!(!admission.admit_with(&mut backlog, 7 << 10), "that is too much for a turn");
        assert!(admit(Lane::Backlog).is_none(), "one at a time");
        let live: Vec<_> = std::iter::from_fn(|| admit(Lane::Live)).collect();
        assert_eq!(live.len(), 6, "live batches have all that is left");
        drop(backlog);
        assert_eq!(admit(Lane::Backlog).expect("room again").lane(), Lane::Backlog);
    }

    #[tokio::test]
    async fn who_asked_first_has_the_next_turn() {
        let admission = admission();
        let turn = || Box::pin(admission.admit(Lane::Backlog, 1 << 10));
        let (now, mut first, mut second) = (turn().await.expect("open"), turn(), turn());
        assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
        drop(now);
        assert!((&mut second).now_or_never().is_none());
        drop(first.await.expect("open"));
        second.await.expect("open");
    }

    #[tokio::test]
    async fn beside_live_batches_the_lane_rests() {
        let admission = admission();
        let turn = || admission.admit(Lane::Backlog, 1 << 10);
        drop(turn().await.expect("open"));
        drop(turn().now_or_never().expect("nobody else sends: the next one has its turn at once"));
        admission.backlog.live.see();
        drop(turn().await.expect("open"));
        assert!(turn().now_or_never().is_none(), "it rests");
        turn().await.expect("it goes on");
    }

    #[test]
    fn a_run_grows_only_by_what_is_left_of_all() {
        let admission = admission();
        let mut live = admission.admit(Lane::Live, 31 << 10).now_or_never().expect("room").expect("open");
        let backlog = admission.admit(Lane::Backlog, 7 << 10).now_or_never().expect("room").expect("open");
        assert!(!admission.admit_with(&mut live, 31 << 10));
        drop(backlog);
        assert!(admission.admit_with(&mut live, 31 << 10));
    }

    #[test]
    fn a_batch_larger_than_its_budget_takes_all_of_it() {
        let admission = admission();
        let large = admission.admit(Lane::Backlog, 1 << 20).now_or_never().expect("room").expect("open");
        assert!(admission.admit(Lane::Live, 1).now_or_never().is_none());
        drop(large);
        assert!(admission.admit(Lane::Live, 1).now_or_never().is_some());
    }
}
