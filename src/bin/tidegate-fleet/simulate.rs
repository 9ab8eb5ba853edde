//! Devices that are made up: each measures, queues and sends like a real one.

use crate::{
    Verdict,
    cli::Simulate,
    follow::LogReader,
    gateway,
    identity::Identity,
    report::{Count, DeviceObserver, Progress, Stats, Summary},
    sensors::{Batches, Schedule},
    verify::{Account, BySensor, Differences, Reader, compare, compare_counts},
};
use futures_util::{StreamExt, TryStreamExt, stream};
use parking_lot::Mutex;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};
use tidegate::{
    client::{Channel, ConfigDecision, DeviceLink, Queue, QueueLimits, WhenFull},
    model::{DeviceId, StreamId, Timestamp, columns::Value},
};
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

const DEVICES_PER_CONNECTION: u32 = 250;
/// What a device keeps while the gateway is away; a device whose queue is full stops measuring until there is room.
const QUEUE_LIMITS: QueueLimits =
    QueueLimits { batches_max: 10_000, bytes_max: 16 << 20, batch_bytes_max: 1 << 20, when_full: WhenFull::Refuse };
/// For how many devices tokens are made at once.
const TOKENS_MADE_AT_ONCE: usize = 16;
/// How many devices are verified at once.
const VERIFIED_AT_ONCE: usize = 4;
/// How many readings are read back at once.
const WINDOW_READINGS: usize = 200_000;
/// How many devices with differences are told of.
const DEVICES_SHOWN_MAX: usize = 10;

/// The run's facts that every device needs.
struct Fleet {
    seed: u64,
    schedule: Schedule,
    devices: u32,
    began: Instant,
    deadline: Instant,
    stats: Arc<Stats>,
    interrupted: CancellationToken,
}

/// What became of one device.
struct DeviceRun {
    device: u32,
    /// Its first so many batches are acknowledged.
    acknowledged_batches: u64,
    /// These are all that it measured.
    all_acknowledged: bool,
    rejected: Count,
}

/// What verifying found.
#[derive(Debug, Default, Serialize)]
struct Verification {
    devices: u64,
    readings_equal: u64,
    devices_with_differences: u64,
    differences: BTreeMap<String, Differences>,
}

#[derive(Debug, Serialize)]
struct Output {
    command: &'static str,
    endpoint: String,
    devices: u32,
    seed: u64,
    #[serde(flatten)]
    summary: Summary,
    #[serde(skip_serializing_if = "Option::is_none")]
    verification: Option<Verification>,
}

pub async fn run(arguments: Simulate) -> anyhow::Result<Verdict> {
    let common = &arguments.common;
    let progress = Progress::choose(common.json, common.quiet);
    let connections = arguments.connections.unwrap_or(arguments.devices.div_ceil(DEVICES_PER_CONNECTION));
    let channels = gateway::connect(common, connections).await?;
    let reader = Reader::new(channels[0].clone());
    let ways = ways(&channels, arguments.seed, arguments.devices).await?;
    let before = match common.verify {
        true => Some(Before::find(&reader, &channels[0], arguments.seed, arguments.devices).await?),
        false => None,
    };

    let fleet = Arc::new(fleet(&arguments));
    interrupt_on_ctrl_c(fleet.interrupted.clone());
    let done = CancellationToken::new();
    let shown = tokio::spawn(progress.show(fleet.stats.clone(), done.clone()));
    let runs = run_devices(&fleet, ways).await?;
    done.cancel();
    shown.await?;

    let summary = fleet.stats.summary();
    let verification = match &before {
        Some(before) => Some(verify(&fleet, &reader, &runs, before, progress).await?),
        None => None,
    };
    let good = summary.is_good() && verification.as_ref().is_none_or(|found| found.devices_with_differences == 0);
    let output = Output {
        command: "simulate",
        endpoint: common.endpoint.clone(),
        devices: arguments.devices,
        seed: arguments.seed,
        summary,
        verification,
    };
    match common.json {
        true => println!("{}", serde_json::to_string(&output)?),
        false => print(&output),
    }
    Ok(if good { Verdict::Good } else { Verdict::Bad })
}

fn fleet(arguments: &Simulate) -> Fleet {
    let interval = arguments.interval;
    let rows = (arguments.duration.as_micros() / interval.as_micros()).clamp(1, 1 << 40) as u64;
    // Whole milliseconds are easier to read.
    let start_us = Timestamp::now().micros() / 1_000 * 1_000;
    let began = Instant::now();
    Fleet {
        seed: arguments.seed,
        schedule: Schedule { start_us, interval_us: interval.as_micros() as i64, rows, batch_readings_max: u64::from(arguments.batch) },
        devices: arguments.devices,
        began,
        // Each device begins within the first interval.
        deadline: began + arguments.duration + interval + arguments.common.drain_timeout,
        stats: Arc::new(Stats::new()),
        interrupted: CancellationToken::new(),
    }
}

/// The first Ctrl-C stops the measuring; what was measured is still sent. A second one ends the program.
fn interrupt_on_ctrl_c(interrupted: CancellationToken) {
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            interrupted.cancel();
        }
        if tokio::signal::ctrl_c().await.is_ok() {
            std::process::exit(130);
        }
    });
}

fn device_name(seed: u64, device: u32) -> DeviceId {
    DeviceId::parse(&format!("sim-{seed}-{device:04}")).expect("letters, digits and hyphens")
}

impl Fleet {
    /// When a device samples: the devices' first rows are spread over one interval.
    fn schedule_of(&self, device: u32) -> Schedule {
        let phase_us = self.schedule.interval_us * i64::from(device - 1) / i64::from(self.devices);
        Schedule { start_us: self.schedule.start_us + phase_us, ..self.schedule }
    }

    fn batches(&self, device: u32) -> Batches {
        Batches::new(self.seed, device, self.schedule_of(device))
    }
}

/// Each device's way to the gateway, in the order of their numbers.
async fn ways(channels: &[Channel], seed: u64, devices: u32) -> anyhow::Result<Vec<Channel>> {
    let identity = &Identity::ask(&channels[0]).await?;
    let ways = (1..=devices).map(|device| async move {
        let channel = &channels[device as usize % channels.len()];
        identity.of_device(channel, &device_name(seed, device)).await
    });
    stream::iter(ways).buffered(TOKENS_MADE_AT_ONCE).try_collect().await
}

async fn run_devices(fleet: &Arc<Fleet>, ways: Vec<Channel>) -> anyhow::Result<Vec<DeviceRun>> {
    let mut tasks = JoinSet::new();
    for (device, channel) in (1..).zip(ways) {
        tasks.spawn(run_device(fleet.clone(), device, channel));
    }
    let mut runs = Vec::with_capacity(fleet.devices as usize);
    while let Some(run) = tasks.join_next().await {
        runs.push(run??);
    }
    runs.sort_unstable_by_key(|run| run.device);
    Ok(runs)
}

async fn run_device(fleet: Arc<Fleet>, device: u32, channel: Channel) -> anyhow::Result<DeviceRun> {
    let queue = Queue::in_memory(StreamId::new(), QUEUE_LIMITS);
    let observer = DeviceObserver::new(fleet.stats.clone());
    let rejected: Arc<Mutex<Count>> = observer.rejected.clone();
    let link = DeviceLink::builder(device_name(fleet.seed, device), queue.clone(), channel)
        .observer(observer)
        .config_handler(|_: u64, _: &serde_json::Map<_, _>| ConfigDecision::Applied)
        .start();

    let measured = tokio::time::timeout_at(fleet.deadline, async {
        measure(&fleet, device, &queue).await?;
        link.flush().await;
        anyhow::Ok(())
    });
    // At the deadline the summary tells what is not acknowledged.
    if let Ok(result) = measured.await {
        result?;
    }
    link.stop().await;
    let status = queue.status();
    let acknowledged_batches = status.acknowledged_through.min(status.last_sequence);
    let rejected = *rejected.lock();
    let all_acknowledged = acknowledged_batches == status.last_sequence;
    Ok(DeviceRun { device, acknowledged_batches, all_acknowledged, rejected })
}

/// Queues what the device measures. It wakes once a batch, when the batch is complete.
async fn measure(fleet: &Fleet, device: u32, queue: &Queue) -> anyhow::Result<()> {
    let mut batches = fleet.batches(device);
    while let Some(timed) = batches.next_batch() {
        let due = Duration::from_micros((timed.complete_us - fleet.schedule.start_us).unsigned_abs());
        if fleet.interrupted.run_until_cancelled(tokio::time::sleep_until(fleet.began + due)).await.is_none() {
            return Ok(());
        }
        fleet.stats.generated_readings.fetch_add(timed.batch.readings, Relaxed);
        queue.push_when_room(timed.batch).await?;
    }
    Ok(())
}

/// How the gateway stands before the run.
struct Before {
    log: LogReader,
    /// Of each device.
    accounts: Vec<Account>,
}

impl Before {
    async fn find(reader: &Reader, channel: &Channel, seed: u64, devices: u32) -> anyhow::Result<Self> {
        let accounts = (1..=devices).map(|device| async move { reader.account(device_name(seed, device).as_str()).await });
        let accounts = stream::iter(accounts).buffered(VERIFIED_AT_ONCE).try_collect().await?;
        Ok(Self { log: LogReader::at_end(channel.clone()).await?, accounts })
    }
}

async fn verify(fleet: &Fleet, reader: &Reader, runs: &[DeviceRun], before: &Before, progress: Progress) -> anyhow::Result<Verification> {
    let bar = progress.bar("verifying devices", runs.len() as u64);
    let mut verification = Verification { devices: runs.len() as u64, ..Verification::default() };
    let names: Vec<String> = runs.iter().map(|run| device_name(fleet.seed, run.device).to_string()).collect();
    let log = before.log.counts(&names).await?;
    let checks = runs.iter().zip(&before.accounts).zip(&names).map(|((run, before), name)| {
        let log = log.get(name).copied().unwrap_or_default();
        verify_device(fleet, reader, run, *before, log)
    });
    let mut checks = stream::iter(checks).buffered(VERIFIED_AT_ONCE);
    let mut device = 0;
    while let Some(differences) = checks.try_next().await? {
        bar.inc(1);
        device += 1;
        verification.readings_equal += differences.equal;
        if !differences.none() || !differences.examples.is_empty() {
            verification.devices_with_differences += 1;
            if verification.differences.len() < DEVICES_SHOWN_MAX {
                verification.differences.insert(device_name(fleet.seed, device).to_string(), differences);
            }
        }
    }
    bar.finish_and_clear();
    Ok(verification)
}

/// Measures once more what was acknowledged, and compares it with what is stored, a span of time after the other; and with
/// the ledger, and with what the `log` has of the run.
async fn verify_device(fleet: &Fleet, reader: &Reader, run: &DeviceRun, before: Account, log: Count) -> anyhow::Result<Differences> {
    let name = device_name(fleet.seed, run.device);
    let mut batches = fleet.batches(run.device);
    let (mut differences, mut sent) = (Differences::default(), Count::default());
    let mut span = Span::default();
    for number in 1..=run.acknowledged_batches {
        let readings = batches.next_readings();
        sent.add(1, readings.len() as u64);
        for reading in readings {
            span.take(reading.sensor, reading.time_us, reading.value.clone());
        }
        if span.readings >= WINDOW_READINGS || number == run.acknowledged_batches {
            let (sensors, first_us, last_us) = span.close(number == run.acknowledged_batches);
            let found = reader.query(name.as_str(), &[], first_us, last_us).await?;
            differences.add(compare(&sensors, &found));
        }
    }

    let ledger = reader.account(name.as_str()).await?.since(before).stored;
    // What is not acknowledged may be stored, or not.
    differences.examples.extend(compare_counts(sent.less(run.rejected), ledger, log, run.all_acknowledged));
    Ok(differences)
}

/// Readings of a span of time, to be compared at once.
#[derive(Default)]
struct Span {
    sensors: BySensor,
    readings: usize,
    first_us: Option<i64>,
    last_us: i64,
}

impl Span {
    fn take(&mut self, sensor: &str, time_us: i64, value: Value) {
        self.first_us.get_or_insert(time_us);
        self.last_us = time_us;
        self.readings += 1;
        match self.sensors.get_mut(sensor) {
            Some(readings) => readings.push((time_us, value)),
            None => drop(self.sensors.insert(sensor.to_owned(), vec![(time_us, value)])),
        }
    }

    /// The span's readings, and its first and last time. Unless it is the final one, the next span begins with the readings
    /// of the last time: a row may be in two batches.
    fn close(&mut self, is_final: bool) -> (BySensor, i64, i64) {
        let first_us = self.first_us.unwrap_or(self.last_us);
        let end_us = if is_final { self.last_us + 1 } else { self.last_us };
        let mut sensors = std::mem::take(&mut self.sensors);
        for (sensor, readings) in &mut sensors {
            let kept = readings.split_off(readings.partition_point(|reading| reading.0 < end_us));
            if !kept.is_empty() {
                self.sensors.insert(sensor.clone(), kept);
            }
        }
        self.readings = self.sensors.values().map(Vec::len).sum();
        self.first_us = Some(end_us);
        (sensors, first_us, end_us - 1)
    }
}

fn print(output: &Output) {
    output.summary.print();
    let Some(found) = &output.verification else { return };
    match found.devices_with_differences {
        0 => println!("verified        {} readings of {} devices: all there, once, and nothing more", found.readings_equal, found.devices),
        bad => println!("verified        {bad} of {} devices differ", found.devices),
    }
    for (device, differences) in &found.differences {
        let Differences { missing, wrong, extra, .. } = differences;
        println!("  {device}: {missing} missing, {wrong} wrong, {extra} too many");
        differences.examples.iter().for_each(|example| println!("    {example}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_meet_without_a_gap_and_do_not_split_a_row() {
        let mut span = Span::default();
        for (sensor, time_us) in [("a", 1), ("b", 1), ("a", 2)] {
            span.take(sensor, time_us, Value::Bool(true));
        }
        let (first, first_us, last_us) = span.close(false);
        assert_eq!((first_us, last_us), (1, 1));
        assert_eq!(first.values().map(Vec::len).sum::<usize>(), 2);
        span.take("b", 2, Value::Bool(true));
        let (second, first_us, last_us) = span.close(true);
        assert_eq!((first_us, last_us), (2, 2));
        assert_eq!(second.values().filter(|readings| readings.len() == 1).count(), 2);
    }
}
