//! How a recording's batches get to the gateway: as fast as it takes them, or at the pace of the recorded times.

use crate::{
    batches::Batches,
    cli::Replay,
    gateway,
    report::{Count, DeviceObserver, Stats},
};
use anyhow::anyhow;
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use tidegate::client::{
    Channel, ConfigDecision, DeviceLink, LinkError, LinkEvent, LinkObserver, Queue, QueueError, UploadError, UploadSummary, Uploader,
    UploaderSettings,
};
use tokio::time::Instant;

/// The batches that were queued and are not known to be acknowledged.
pub struct Unsettled<'a> {
    stats: &'a Arc<Stats>,
    /// Sequence and readings of each.
    batches: VecDeque<(u64, u64)>,
    /// The gateway had so many before the run.
    known_batches: u64,
    /// Those that it did not have before, and has now.
    settled: Count,
}

impl<'a> Unsettled<'a> {
    pub fn new(stats: &'a Arc<Stats>, known_batches: u64) -> Self {
        Self { stats, batches: VecDeque::new(), known_batches, settled: Count::default() }
    }

    fn add(&mut self, sequence: u64, readings: u64) {
        self.stats.generated_readings.fetch_add(readings, Relaxed);
        self.batches.push_back((sequence, readings));
    }

    fn settle(&mut self, queue: &Queue) {
        let through = queue.status().acknowledged_through;
        while let Some((sequence, readings)) = self.batches.pop_front_if(|(sequence, _)| *sequence <= through) {
            self.stats.acknowledged(1, readings);
            if sequence > self.known_batches {
                self.settled.add(1, readings);
            }
        }
    }
}

/// As fast as the gateway takes it: fills the queue, hands it over, and so on. Returns what was new to the gateway.
pub async fn upload(
    arguments: &Replay,
    batches: &mut Batches<'_>,
    queue: &Queue,
    channel: Channel,
    mut unsettled: Unsettled<'_>,
) -> anyhow::Result<Count> {
    let settings =
        UploaderSettings { give_up_after: arguments.common.drain_timeout, resend_known: arguments.resend, ..UploaderSettings::default() };
    let mut uploader = Uploader::new(arguments.device.clone(), queue.clone(), channel, settings);
    // Those that an interrupted replay has queued on disk have their numbers already.
    let (mut sequence, queued_before) = (1, queue.status().last_sequence);
    let mut next = batches.next_batch()?;
    loop {
        while let Some(timed) = &next {
            if sequence > queued_before {
                match queue.push(timed.batch.clone()).await {
                    Ok(_) => {}
                    Err(QueueError::Full { .. }) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            unsettled.add(sequence, timed.batch.readings);
            sequence += 1;
            next = batches.next_batch()?;
        }
        let result = uploader.upload().await;
        unsettled.settle(queue);
        match result {
            Ok(summary) => count(unsettled.stats, &summary),
            Err(UploadError::GaveUp(waited, status)) => {
                let why = status.map_or(String::new(), |status| format!(": {}", gateway::describe(&status)));
                eprintln!("tidegate-fleet: the gateway took nothing for {waited:.0?}{why}");
                return Ok(unsettled.settled);
            }
            Err(UploadError::Refused(status)) => return Err(anyhow!("the gateway refuses the upload: {}", gateway::describe(&status))),
            Err(error) => return Err(error.into()),
        }
        if next.is_none() {
            return Ok(unsettled.settled);
        }
    }
}

fn count(stats: &Stats, summary: &UploadSummary) {
    stats.retries.fetch_add(summary.batches_sent_again, Relaxed);
    stats.duplicates.fetch_add(summary.duplicate.batches, Relaxed);
    for (reason, tally) in &summary.rejected_counts {
        stats.rejected(*reason, tally.batches, tally.readings);
    }
    summary.rejected.iter().for_each(|rejected| stats.rejected_example(rejected));
}

/// At the pace of the recorded times. Returns what was new to the gateway.
pub async fn pace(
    arguments: &Replay,
    batches: &mut Batches<'_>,
    queue: &Queue,
    channel: Channel,
    mut unsettled: Unsettled<'_>,
    factor: f64,
) -> anyhow::Result<Count> {
    let observer = DeviceObserver::new(unsettled.stats.clone());
    let disconnected = Arc::new(Mutex::new(String::new()));
    let last_error = disconnected.clone();
    let link = DeviceLink::builder(arguments.device.clone(), queue.clone(), channel)
        // Acknowledgements are counted by sequence: what the gateway had before never enters the queue.
        .observer(move |event: &LinkEvent<'_>| match event {
            LinkEvent::Acknowledged { .. } => {}
            event => {
                if let LinkEvent::Disconnected { error, .. } = event {
                    *last_error.lock() = match error {
                        LinkError::Call(status) => format!(": {}", gateway::describe(status)),
                        error => format!(": {error}"),
                    };
                }
                observer.observe(event);
            }
        })
        .config_handler(|_: u64, _: &serde_json::Map<_, _>| ConfigDecision::Applied)
        .start();
    let drain_timeout = arguments.common.drain_timeout;
    let began = Instant::now();
    let (mut sequence, queued_before) = (1, queue.status().last_sequence);
    let mut first_us = None;
    while let Some(timed) = batches.next_batch()? {
        let readings = timed.batch.readings;
        if sequence > queued_before {
            // A time that goes backwards is due at once.
            let recorded_us = (timed.complete_us - *first_us.get_or_insert(timed.complete_us)).max(0);
            let due = Duration::try_from_secs_f64(recorded_us as f64 / 1e6 / factor).unwrap_or(Duration::MAX);
            if let Some(due) = began.checked_add(due) {
                tokio::time::sleep_until(due).await;
            }
            // Whatever is acknowledged makes room.
            let Ok(pushed) = tokio::time::timeout(drain_timeout, queue.push_when_room(timed.batch)).await else {
                unsettled.add(sequence, readings);
                eprintln!("tidegate-fleet: the gateway took nothing for {drain_timeout:.0?}{}", disconnected.lock());
                link.stop().await;
                unsettled.settle(queue);
                return Ok(unsettled.settled);
            };
            pushed?;
        }
        unsettled.add(sequence, readings);
        unsettled.settle(queue);
        sequence += 1;
    }
    // At the deadline the summary tells what is not acknowledged.
    let _ = tokio::time::timeout(drain_timeout, link.flush()).await;
    link.stop().await;
    unsettled.settle(queue);
    Ok(unsettled.settled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::{Cli, Command},
        recording::{Choices, Recording},
        replay::QUEUE_LIMITS,
    };
    use clap::Parser;
    use std::io::Write;
    use tidegate::{client::connect_lazy, model::StreamId};

    /// The queue is full and nobody takes anything.
    #[tokio::test]
    async fn a_paced_replay_gives_up_when_the_gateway_is_gone() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        writeln!(file, "t,a").expect("written");
        (0..2_010).for_each(|row| writeln!(file, "{},1", 1_600_000_000 + row).expect("written"));
        let csv = file.path().display().to_string();
        let arguments = ["tidegate-fleet", "replay", "--device", "d", "--csv", &csv, "--speed", "1000000x", "--drain-timeout", "50ms"];
        let Command::Replay(arguments) = Cli::parse_from(arguments).command else { panic!("not a replay") };
        let recording = Recording::open(file.path(), &Choices::default()).expect("a recording");
        let units = [String::new()];
        let mut batches = Batches::new(&recording, &units, None).expect("readable");
        let queue = Queue::replay_in_memory(StreamId::new(), QUEUE_LIMITS);
        let unused = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let channel = connect_lazy(&format!("http://{}", unused.local_addr().expect("bound"))).expect("a good endpoint");
        drop(unused);
        let stats = Arc::new(Stats::new());
        let paced = pace(&arguments, &mut batches, &queue, channel, Unsettled::new(&stats, 0), 1e6);
        let settled = tokio::time::timeout(Duration::from_secs(60), paced).await.expect("it gives up").expect("no failure of its own");
        assert_eq!(settled, Count::default());
        assert!(!stats.summary().is_good());
    }
}
