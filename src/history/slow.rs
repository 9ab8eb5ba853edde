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
        DatabaseTime { slow: self.clone(), device: device.clone(), call: Span::current(), spent: Duration::ZERO, reads: 0, reading: None }
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
    // When the read began that has not ended.
    reading: Option<Instant>,
}

impl DatabaseTime {
    /// Waits for the database, and adds how long that took.
    pub async fn of<T>(&mut self, read: impl Future<Output = T>) -> T {
        self.reading = Some(Instant::now());
        self.reads += 1;
        let result = read.await;
        self.note_read();
        result
    }

    fn note_read(&mut self) {
        self.spent += self.reading.take().map_or(Duration::ZERO, |began| began.elapsed());
    }
}

impl Drop for DatabaseTime {
    fn drop(&mut self) {
        // One that nobody waits for any more: given up, as it took long.
        self.note_read();
        let Self { slow, device, call, spent, reads, .. } = self;
        if slow.after.is_zero() || *spent <= slow.after {
            return;
        }
        if let Some(left_out) = slow.told.pass() {
            let _entered = call.enter();
            tracing::warn!(%device, reads, duration_ms = spent.as_secs_f64() * 1e3, left_out, "query.slow");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    /// Whether a query is told of whose two reads take a moment each.
    async fn is_told(after: Duration) -> bool {
        let slow = SlowQueries::new(after);
        let mut database = slow.begin(&DeviceId::parse("pump-1").expect("good"));
        for _ in 0..2 {
            database.of(tokio::time::sleep(Duration::from_millis(1))).await;
        }
        assert!(database.reads == 2 && database.spent >= Duration::from_millis(2), "{database:?}");
        drop(database);
        slow.told.pass().is_none()
    }

    #[tokio::test]
    async fn a_query_that_is_given_up_amid_a_read_is_told() {
        let slow = SlowQueries::new(Duration::from_nanos(1));
        let mut database = slow.begin(&DeviceId::parse("pump-1").expect("good"));
        assert!(database.of(std::future::pending::<()>()).now_or_never().is_none());
        drop(database);
        assert!(slow.told.pass().is_none());
    }

    #[tokio::test]
    async fn a_query_is_told_of_when_its_reads_together_took_too_long() {
        assert!(is_told(Duration::from_nanos(1)).await);
        assert!(!is_told(Duration::from_secs(3600)).await);
        assert!(!is_told(Duration::ZERO).await, "none is slow");
    }
}
