//! Queries that the database works on for long.

use crate::{model::DeviceId, telemetry::Sparing};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tracing::Span;

/// What is slow, and when that was last told. Cheap to clone: all clones are one.
#[derive(Debug, Clone)]
pub struct SlowQueries {
    // 0: nothing is.
    after: Duration,
    told: Arc<Sparing>,
}

impl SlowQueries {
    /// A query is slow when the database has worked for longer than `after`; 0: none is.
    pub fn new(after: Duration) -> Self {
        Self { after, told: Arc::default() }
    }

    /// Begins a query about a device, with no time spent.
    pub fn begin(&self, device: &DeviceId) -> DatabaseTime {
        DatabaseTime { slow: self.clone(), device: device.clone(), call: Span::current(), spent: Duration::ZERO, reads: 0 }
    }
}

/// How long the database has worked for one query. It is told at the query's end, also when nobody waits for it any more.
#[derive(Debug)]
pub struct DatabaseTime {
    slow: SlowQueries,
    device: DeviceId,
    call: Span,
    spent: Duration,
    reads: u64,
}

impl DatabaseTime {
    /// Waits for the database, and adds how long that took.
    pub async fn of<T>(&mut self, read: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let result = read.await;
        self.spent += began.elapsed();
        self.reads += 1;
        result
    }
}

impl Drop for DatabaseTime {
    fn drop(&mut self) {
        let Self { slow, device, call, spent, reads } = self;
        if slow.after.is_zero() || *spent <= slow.after {
            return;
        }
        if let Some(left_out) = slow.told.pass() {
            let _entered = call.enter();
            tracing::warn!(%device, reads, duration_ms = spent.as_secs_f64() * 1e3, left_out, "query.slow");
        }
    }
}
