//! Admission: how many bytes of batches may be on their way to their commit, and how many of these may be backlog.
//!
//! A device that comes back from an outage sends all that it has kept, as fast as it can. Were it admitted like the others, what it
//! sends would stand in front of what they have just measured. So it has a narrow lane of its own, for as long as the newest reading
//! of what a call sends is old: only so many bytes of all such calls are on their way at once. The calls take turns at it, in the order in
//! which they ask. Who has its turn hands in all that it has by then, and only what it leaves is for the next one: a few large runs are less in
//! the way of live readings than many small ones, of which each wakes a call, a connection and a client. Nobody starves, and the order within
//! a stream is that of its call.
//!
//! A narrow lane alone is not enough where the processors are what is scarce: as soon as a commit ends, the next bytes would come in. So
//! beside live calls the lane rests: what was given out comes back only after four times as long as it was held, at most 100 ms, and
//! the processors and the disk belong to live readings meanwhile.
//!
//! Where much waits for its commit already, a small batch that is taken at once mostly waits longer, and takes memory meanwhile. Then a call with
//! small batches has one run at a time: it reads on when that one is committed, and what has come by then goes together as the next one, which
//! costs a good deal less than many runs of a few batches. While little waits, calls read on at once, so that a few fast devices do not wait for
//! each commit.

use super::run::Run;
use crate::{
    config,
    error::Error,
    telemetry::{Metrics, names},
};
use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// What a run costs besides its batches' bytes, with the first of them and the latest readings of a dozen sensors; and each further batch
/// with sensors that are new, of which more is kept.
const RUN_OVERHEAD_BYTES: usize = 1024;
/// What each further batch of a run costs besides its bytes, when the device is known to have its sensors.
const BATCH_OVERHEAD_BYTES: usize = 256;
/// With how much more each batch is counted in the backlog's lane: small ones cost processor time.
const BACKLOG_OVERHEAD_BYTES: usize = 1024;
/// How many times as long as a part of the backlog's lane was held it rests.
const REST: u32 = 4;
/// How long it rests at the most: after a commit that took long for a reason of its own, a backlog need not stand still.
const REST_MAX: Duration = Duration::from_millis(100);
/// Of the whole budget the part beyond which it is crowded.
const CROWDED_PART: usize = 4;
/// After how long a call looks whether there is room though it is not its turn.
const TURN_MAX: Duration = Duration::from_millis(if cfg!(test) { 20 } else { 1_000 });
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
    backlog: BacklogLane,
    backlog_age: Duration,
}

/// What is held from admission to commit.
pub(super) struct Permit {
    all: OwnedSemaphorePermit,
    backlog: Option<LanePart>,
}

impl Permit {
    pub fn lane(&self) -> Lane {
        if self.backlog.is_some() { Lane::Backlog } else { Lane::Live }
    }

    /// Nothing is added to it any more: what it leaves of the backlog's lane is for the next one.
    pub fn close(&self) {
        if let Some(part) = &self.backlog {
            part.lane.call_next();
        }
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
struct BacklogLane {
    budget: Budget,
    // Calls whoever waits longest. Nothing is given out to one that waits: while its client does not read it is not looked at, and
    // would keep what others could have.
    turn: Arc<Notify>,
    live: LastLive,
}

impl BacklogLane {
    fn new(bytes_max: usize) -> Self {
        Self { budget: Budget::new(bytes_max), turn: Arc::default(), live: LastLive::new() }
    }

    async fn take(&self, bytes: usize) -> LanePart {
        let mut asked = false;
        loop {
            let mut turn = pin!(self.turn.notified());
            turn.as_mut().enable();
            // It may be its own turn. Once it had that and there was not room enough, it is for those to say who make more.
            if !std::mem::replace(&mut asked, true) {
                self.call_next();
            }
            // In vain is the turn of a call that is not looked at.
            let _ = tokio::time::timeout(TURN_MAX, turn).await;
            if let Some(bytes) = self.budget.take_now(bytes + BACKLOG_OVERHEAD_BYTES) {
                return LanePart { bytes: Some(bytes), since: Instant::now(), lane: self.clone() };
            }
        }
    }

    /// Whoever waits longest has the next turn, if there is room for much.
    fn call_next(&self) {
        if self.budget.free.available_permits() >= self.budget.bytes_max / 2 {
            self.turn.notify_one();
        }
    }
}

/// A part of the backlog's lane, which rests before it comes back when live batches come in.
struct LanePart {
    bytes: Option<OwnedSemaphorePermit>,
    since: Instant,
    lane: BacklogLane,
}

impl LanePart {
    fn merge(&mut self, more: OwnedSemaphorePermit) {
        match &mut self.bytes {
            Some(bytes) => bytes.merge(more),
            none => *none = Some(more),
        }
    }
}

impl Drop for LanePart {
    fn drop(&mut self) {
        let (bytes, lane) = (self.bytes.take(), self.lane.clone());
        let give_back = move || {
            drop(bytes);
            lane.call_next();
        };
        // Without a runtime the gateway is at its end, and nobody waits.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if self.lane.live.is_recent() => {
                let rest = (self.since.elapsed() * REST).min(REST_MAX);
                runtime.spawn(async move {
                    tokio::time::sleep(rest).await;
                    give_back();
                });
            }
            _ => give_back(),
        }
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

    /// What is larger than all of it takes all of it.
    fn cost(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.min(self.bytes_max)).unwrap_or(u32::MAX)
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
        Self { all: Budget::new(pending_bytes_max), backlog: BacklogLane::new(backlog_bytes_max), backlog_age }
    }

    /// Admits a batch; waits while too many bytes are on their way already.
    pub async fn admit(&self, lane: Lane, bytes: usize) -> Result<Permit, Error> {
        let backlog = match lane {
            Lane::Live => None,
            Lane::Backlog => Some(self.backlog.take(bytes).await),
        };
        Ok(Permit { all: self.all.take(bytes + RUN_OVERHEAD_BYTES).await?, backlog })
    }

    /// Admits a further batch, if that is possible without waiting; `as_known` says whether it is likely to have no new sensors.
    pub fn admit_with(&self, permit: &mut Permit, bytes: usize, as_known: bool) -> bool {
        let overhead = if as_known { BATCH_OVERHEAD_BYTES } else { RUN_OVERHEAD_BYTES };
        let part = match &permit.backlog {
            None => None,
            Some(_) => match self.backlog.budget.take_now(bytes + BACKLOG_OVERHEAD_BYTES) {
                None => return false,
                taken => taken,
            },
        };
        let Some(all) = self.all.take_now(bytes + overhead) else { return false };
        permit.all.merge(all);
        if let (Some(held), Some(more)) = (&mut permit.backlog, part) {
            held.merge(more);
        }
        true
    }

    /// Whether so much is on its way already that a call with small batches had better have one run at a time.
    pub fn is_crowded(&self) -> bool {
        self.all.bytes_max - self.all.free.available_permits() > self.all.bytes_max / CROWDED_PART
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
        for (budget, name) in [(&self.all, names::PENDING_BYTES), (&self.backlog.budget, names::BACKLOG_PENDING_BYTES)] {
            let gauge = metrics.gauge(name, &[]);
            // Not the handle to the writer itself: that would keep it from ending.
            let Budget { free, bytes_max } = budget.clone();
            metrics.on_scrape(move || gauge.set((bytes_max - free.available_permits()) as f64));
        }
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

    /// A call that waits for the lane and is looked at once.
    macro_rules! waiting {
        ($admission:expr, $bytes:expr) => {{
            let mut waiting = Box::pin($admission.admit(Lane::Backlog, $bytes));
            assert!((&mut waiting).now_or_never().is_none(), "it has to wait");
            waiting
        }};
    }

    #[tokio::test]
    async fn a_backlog_leaves_the_room_beyond_its_lane_to_others() {
        let admission = admission();
        let admit = |lane| admission.admit(lane, 7 << 10).now_or_never().map(|permit| permit.expect("open"));
        let backlog = [admit(Lane::Backlog).expect("room"), admit(Lane::Backlog).expect("room")];
        assert!(admit(Lane::Backlog).is_none(), "its lane is full");
        let live: Vec<_> = std::iter::from_fn(|| admit(Lane::Live)).collect();
        assert_eq!(live.len(), 6, "live batches have all that is left");
        drop(backlog);
        assert_eq!(admit(Lane::Backlog).expect("room again").lane(), Lane::Backlog);
    }

    #[tokio::test]
    async fn who_has_its_turn_takes_all_that_it_wants_and_the_next_one_what_is_left() {
        let admission = admission();
        let before = admission.admit(Lane::Backlog, 15 << 10).await.expect("open");
        let (first, mut second) = (waiting!(admission, 1 << 10), waiting!(admission, 1 << 10));
        drop(before);
        let mut first = first.await.expect("open");
        assert!((&mut second).now_or_never().is_none(), "it is not its turn");
        assert!(admission.admit_with(&mut first, 1 << 10, true));
        assert!(admission.admit_with(&mut first, 1 << 10, true));
        assert!((&mut second).now_or_never().is_none(), "there may be more");
        first.close();
        second.await.expect("open");
    }

    #[tokio::test]
    async fn a_call_that_is_not_looked_at_keeps_nobody_waiting_for_long() {
        let admission = admission();
        let before = admission.admit(Lane::Backlog, 15 << 10).await.expect("open");
        let (_stalled, next) = (waiting!(admission, 15 << 10), waiting!(admission, 15 << 10));
        drop(before);
        next.await.expect("open");
    }

    #[tokio::test]
    async fn who_goes_away_leaves_its_turn_to_the_next_one() {
        let admission = admission();
        let all = admission.admit(Lane::Live, 63 << 10).await.expect("open");
        let (first, next) = (waiting!(admission, 15 << 10), waiting!(admission, 15 << 10));
        drop(first);
        drop(all);
        next.await.expect("open");
    }

    #[tokio::test]
    async fn beside_live_batches_the_lane_rests() {
        let admission = admission();
        let all_of_it = || admission.admit(Lane::Backlog, 16 << 10);
        drop(all_of_it().await.expect("open"));
        drop(all_of_it().now_or_never().expect("nobody else sends: it comes back at once"));
        admission.backlog.live.see();
        drop(all_of_it().await.expect("open"));
        assert!(all_of_it().now_or_never().is_none(), "it rests");
        all_of_it().await.expect("it comes back");
    }

    #[tokio::test]
    async fn a_run_grows_only_by_what_both_budgets_have() {
        let admission = admission();
        let mut permit = admission.admit(Lane::Backlog, 7 << 10).now_or_never().expect("room").expect("open");
        assert!(admission.admit_with(&mut permit, 7 << 10, true));
        assert!(!admission.admit_with(&mut permit, 7 << 10, true));
        let mut live = admission.admit(Lane::Live, 31 << 10).now_or_never().expect("room").expect("open");
        assert!(!admission.admit_with(&mut live, 31 << 10, true));
        drop(permit);
        // Half of the budget is left.
        let most = (32 << 10) - BATCH_OVERHEAD_BYTES;
        assert!(!admission.admit_with(&mut live, most, false), "more is kept of one with new sensors");
        assert!(!admission.admit_with(&mut live, most + 1, true), "it is counted with more than its bytes");
        assert!(admission.admit_with(&mut live, most, true));
    }

    #[tokio::test]
    async fn it_is_crowded_while_more_than_a_quarter_is_given_out() {
        let admission = admission();
        let quarter = admission.admit(Lane::Live, 15 << 10).now_or_never().expect("room").expect("open");
        assert!(!admission.is_crowded());
        let more = admission.admit(Lane::Live, 0).now_or_never().expect("room").expect("open");
        assert!(admission.is_crowded());
        drop(more);
        assert!(!admission.is_crowded());
        drop(quarter);
    }

    #[tokio::test]
    async fn a_batch_larger_than_its_budget_takes_all_of_it() {
        let admission = admission();
        let large = admission.admit(Lane::Backlog, 1 << 20).now_or_never().expect("room").expect("open");
        assert!(admission.admit(Lane::Live, 1).now_or_never().is_none());
        drop(large);
        assert!(admission.admit(Lane::Live, 1).now_or_never().is_some());
    }
}
