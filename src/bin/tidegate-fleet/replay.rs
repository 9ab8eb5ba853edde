//! A recording, sent as a device would have.

use crate::{
    Usage, Verdict,
    batches::Batches,
    cli::{Replay, Speed},
    follow::LogReader,
    gateway,
    identity::Identity,
    recording::{Choices, Recording, TimeFormat},
    report::{Count, Progress, Stats, Summary},
    send::{Unsettled, pace, upload},
    verify::{Account, BySensor, Differences, Reader, compare, compare_counts},
};
use anyhow::Context;
use serde::Serialize;
use std::{collections::BTreeMap, sync::Arc};
use tidegate::{
    client::{Channel, Queue, QueueLimits, WhenFull},
    model::{StreamId, columns::Value},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// What waits to be sent at the most.
pub const QUEUE_LIMITS: QueueLimits =
    QueueLimits { batches_max: 2_000, bytes_max: 64 << 20, batch_bytes_max: 4 << 20, when_full: WhenFull::Refuse };
const BATCH_READINGS: u32 = 100;
/// How many readings are read back at once.
const WINDOW_READINGS: usize = 200_000;

#[derive(Debug, Serialize)]
struct Output {
    command: &'static str,
    endpoint: String,
    device: String,
    stream_id: String,
    sensors: Vec<String>,
    #[serde(flatten)]
    summary: Summary,
    /// Batches of this stream id that the gateway had before the run.
    known_batches: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    verification: Option<Verification>,
}

/// What verifying found.
#[derive(Debug, Serialize)]
struct Verification {
    /// By sensor.
    sensors: BTreeMap<String, Differences>,
    /// What this run has added to the log.
    stored: Count,
    /// How the log and the ledger differ from what this run sent.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    differences: Vec<String>,
}

impl Verification {
    fn is_good(&self) -> bool {
        self.differences.is_empty() && self.sensors.values().all(Differences::none)
    }
}

pub async fn run(arguments: Replay) -> anyhow::Result<Verdict> {
    let common = &arguments.common;
    if arguments.resend && arguments.speed != Speed::Max {
        return Err(Usage("--resend goes with --speed max only".to_owned()).into());
    }
    let progress = Progress::choose(common.json, common.quiet);
    let choices = Choices {
        time_column: arguments.time_column.clone(),
        time_format: arguments.time_format,
        sensor_columns: arguments.sensor_columns.clone(),
        delimiter: arguments.delimiter,
    };
    let recording = Recording::open(&arguments.csv, &choices)?;
    let units = units(&recording, &arguments.units)?;
    if progress != Progress::Silent {
        announce(&recording);
    }
    let batch = batch_readings(&arguments);
    let queue = open_queue(&arguments, &recording, &units, batch).await?;
    let operator = gateway::connect(common, 1).await?.remove(0);
    let channel = Identity::ask(&operator).await?.of_device(&operator, &arguments.device).await?;
    let known_batches = gateway::upload_position(&channel, arguments.device.as_str(), queue.stream_id()).await?;

    let reader = Reader::new(operator.clone());
    let before = match common.verify {
        true => Some(Before::find(&reader, &operator, &arguments).await?),
        false => None,
    };

    let stats = Arc::new(Stats::new());
    let done = CancellationToken::new();
    let shown = tokio::spawn(progress.show(stats.clone(), done.clone()));
    let mut batches = Batches::new(&recording, &units, batch)?;
    let unsettled = Unsettled::new(&stats, known_batches);
    let result = match arguments.speed {
        Speed::Max => upload(&arguments, &mut batches, &queue, channel, unsettled).await,
        Speed::Factor(factor) => pace(&arguments, &mut batches, &queue, channel, unsettled, factor).await,
    };
    done.cancel();
    shown.await?;
    let settled = result?;

    let verification = match &before {
        Some(before) => {
            let all_acknowledged = stats.summary().unacknowledged_readings == 0;
            let (stored, differences) = before.compare(&reader, &arguments, settled, all_acknowledged).await?;
            let sensors = verify(&recording, arguments.device.as_str(), &reader, progress).await?;
            Some(Verification { sensors, stored, differences })
        }
        None => None,
    };
    let output = Output {
        command: "replay",
        endpoint: common.endpoint.clone(),
        device: arguments.device.to_string(),
        stream_id: queue.stream_id().to_string(),
        sensors: recording.sensor_columns.iter().map(|(_, name)| name.clone()).collect(),
        summary: stats.summary(),
        known_batches,
        verification,
    };
    queue.close().await;
    match common.json {
        true => println!("{}", serde_json::to_string(&output)?),
        false => print(&output),
    }
    let verified = output.verification.as_ref().is_none_or(Verification::is_good);
    Ok(if output.summary.is_good() && verified { Verdict::Good } else { Verdict::Bad })
}

fn announce(recording: &Recording) {
    let sensors: Vec<&str> = recording.sensor_columns.iter().map(|(_, name)| name.as_str()).collect();
    let zone = if recording.time_format == TimeFormat::Iso { "; times without a zone are taken as UTC" } else { "" };
    eprintln!("times: {:?} ({:?}{zone}); sensors: {sensors:?}", recording.time_column.1, recording.time_format);
}

/// The unit of each of the recording's sensors.
fn units(recording: &Recording, given: &[(String, String)]) -> Result<Vec<String>, Usage> {
    let known = |name: &String| recording.sensor_columns.iter().any(|(_, column)| column == name);
    if let Some((name, _)) = given.iter().find(|(name, _)| !known(name)) {
        let sensors: Vec<&str> = recording.sensor_columns.iter().map(|(_, name)| name.as_str()).collect();
        return Err(Usage(format!("--units names {name:?}, which is not among the sensors {sensors:?}")));
    }
    let of = |column: &String| given.iter().find(|(name, _)| name == column).map_or(String::new(), |(_, unit)| unit.clone());
    Ok(recording.sensor_columns.iter().map(|(_, column)| of(column)).collect())
}

/// The most readings in a batch; `None`: each row is a batch of its own.
fn batch_readings(arguments: &Replay) -> Option<u32> {
    arguments.batch.or(match arguments.speed {
        Speed::Max => Some(BATCH_READINGS),
        Speed::Factor(_) => None,
    })
}

async fn open_queue(arguments: &Replay, recording: &Recording, units: &[String], batch: Option<u32>) -> anyhow::Result<Queue> {
    let stream_id = match arguments.stream_id {
        Some(uuid) => StreamId::parse(uuid.as_bytes()).map_err(Usage)?,
        None if arguments.new_stream => StreamId::new(),
        None => derived_stream_id(arguments, recording, units, batch)?,
    };
    let Some(path) = &arguments.queue else { return Ok(Queue::replay_in_memory(stream_id, QUEUE_LIMITS)) };
    let queue = Queue::replay_on_disk(path, stream_id, QUEUE_LIMITS)
        .await
        .with_context(|| format!("the queue in {} cannot be opened", path.display()))?;
    if queue.stream_id() != stream_id {
        let other = queue.stream_id();
        return Err(Usage(format!(
            "the queue in {} is of another replay (stream id {other}, not {stream_id}): use another file",
            path.display()
        ))
        .into());
    }
    Ok(queue)
}

/// The same for the same replay: the device, all that is sent and how it is cut into batches.
fn derived_stream_id(arguments: &Replay, recording: &Recording, units: &[String], batch: Option<u32>) -> anyhow::Result<StreamId> {
    let mut hasher = blake3::Hasher::new_derive_key("tidegate-fleet replay stream id v1");
    let batch = batch.unwrap_or(0);
    let layout = (&recording.time_column, recording.time_format, &recording.sensor_columns, units, recording.delimiter, batch);
    hasher.update(format!("{:?} {layout:?}\n", arguments.device).as_bytes());
    hasher.update_reader(std::fs::File::open(&arguments.csv)?)?;
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    Ok(StreamId::from(Uuid::new_v8(bytes)))
}

/// How the gateway stands before the run.
struct Before {
    log: LogReader,
    account: Account,
}

impl Before {
    async fn find(reader: &Reader, channel: &Channel, arguments: &Replay) -> anyhow::Result<Self> {
        let account = reader.account(arguments.device.as_str()).await?;
        Ok(Self { log: LogReader::at_end(channel.clone()).await?, account })
    }

    /// What the log has of the run, and how that and the ledger differ from what was `settled`.
    async fn compare(
        &self,
        reader: &Reader,
        arguments: &Replay,
        settled: Count,
        all_acknowledged: bool,
    ) -> anyhow::Result<(Count, Vec<String>)> {
        let device = arguments.device.to_string();
        let log = self.log.counts(std::slice::from_ref(&device)).await?.remove(&device).unwrap_or_default();
        let ledger = reader.account(&device).await?.since(self.account);
        Ok((log, compare_counts(settled.less(ledger.rejected), ledger.stored, log, all_acknowledged)))
    }
}

/// Reads every sensor back and compares it with the recording: at each time the value of its last row.
async fn verify(recording: &Recording, device: &str, reader: &Reader, progress: Progress) -> anyhow::Result<BTreeMap<String, Differences>> {
    let mut latest: Vec<BTreeMap<i64, f64>> = vec![BTreeMap::new(); recording.sensor_columns.len()];
    for row in recording.rows()? {
        let row = row?;
        for (sensor, value) in row.values.iter().enumerate() {
            if let Some(value) = value {
                latest[sensor].insert(row.time_us, *value);
            }
        }
    }
    let bar = progress.bar("verifying sensors", latest.len() as u64);
    let mut verification = BTreeMap::new();
    for ((_, name), readings) in recording.sensor_columns.iter().zip(latest) {
        let readings: Vec<(i64, Value)> = readings.into_iter().map(|(time, value)| (time, Value::Double(value))).collect();
        let mut differences = Differences::default();
        // From one part's first time up to the next part's, so that nothing between them is overlooked.
        for (part, window) in readings.chunks(WINDOW_READINGS).enumerate() {
            let behind = readings.get((part + 1) * WINDOW_READINGS).map(|next| next.0 - 1);
            let last_us = behind.unwrap_or(window[window.len() - 1].0);
            let found = reader.query(device, std::slice::from_ref(name), window[0].0, last_us).await?;
            let expected = BySensor::from([(name.clone(), window.to_vec())]);
            differences.add(compare(&expected, &found));
        }
        bar.inc(1);
        verification.insert(name.clone(), differences);
    }
    bar.finish_and_clear();
    Ok(verification)
}

fn print(output: &Output) {
    println!("stream id       {}", output.stream_id);
    output.summary.print();
    if output.known_batches > 0 {
        println!("known           {} batches were stored before", output.known_batches);
    }
    let Some(verification) = &output.verification else { return };
    for (sensor, differences) in &verification.sensors {
        let Differences { equal, missing, wrong, extra, examples } = differences;
        println!("verified        {sensor}: {equal} equal, {missing} missing, {wrong} wrong, {extra} too many");
        examples.iter().for_each(|example| println!("    {example}"));
        if *extra > 0 {
            println!("    Was something else sent for this device and these times?");
        }
    }
    match verification.differences.as_slice() {
        [] => println!("verified        the run's {} batches: each once in the log, and in the ledger", verification.stored.batches),
        differences => differences.iter().for_each(|difference| println!("verified        {difference}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn units_are_those_of_the_sensors() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        write!(file, "t,a,b\n2020-01-02,1,2\n").expect("written");
        let recording = Recording::open(file.path(), &Choices::default()).expect("a recording");
        let unit = |name: &str| [(name.to_owned(), "m".to_owned())];
        assert_eq!(units(&recording, &unit("b")).expect("known"), ["", "m"]);
        assert!(units(&recording, &unit("c")).is_err());
    }
}
