//! What reading costs: `cargo bench --bench history [DEVICES]`.
//!
//! A fleet of devices with ten sensors each, a day at 1 Hz with two decimals, is put into the log in batches of 100 readings, merged
//! and pruned. Then one sensor's day is read by QueryReadings over TCP, and beside it by a prepared statement from a plain table that
//! has the same readings, keyed by sensor and time. 116 devices are 100 million readings.
#![allow(clippy::print_stdout, reason = "it is what this program is for")]

use anyhow::{Context, Result};
use bytes::Bytes;
use prost::Message;
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tidegate::{
    app::Gateway,
    config::Config,
    fleet::Registry,
    history::{Upkeep, chunk::Chunk},
    live::{Latest, Tail},
    model::{BatchSummary, DeviceId, Labels, Position, StreamId, Timestamp, ValueKind, columns::Values},
    pb::{self, reading_service_client::ReadingServiceClient},
    store::{NewLogRow, SensorRow, Store},
    telemetry::Metrics,
};
use tonic::transport::Endpoint;

const SENSORS: usize = 10;
const SECONDS: usize = 86_400;
const INSTANTS_PER_BATCH: usize = 10;
const BATCHES_PER_COMMIT: usize = 1_000;
const T0: i64 = 1_767_225_600_000_000;
const SECOND: i64 = 1_000_000;
const TRIES: usize = 21;

/// A temperature with two decimals: a day's swing, and noise.
fn value(sensor: usize, second: usize) -> f64 {
    let mut noise = (sensor as u64) << 32 ^ second as u64;
    noise = (noise ^ noise >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    noise = (noise ^ noise >> 27).wrapping_mul(0x94D0_49BB_1331_11EB) >> 33;
    let swing = (std::f64::consts::TAU * second as f64 / SECONDS as f64).sin() * (2 + sensor % 7) as f64;
    ((8 + sensor % 18) as f64 * 100.0 + swing * 100.0 + (noise % 20) as f64).round() / 100.0
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Processor time of this process.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks = stat.rsplit(')').next().unwrap_or("").split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}

fn encoding() {
    let times: Vec<i64> = (0..8_192).map(|second| T0 + second * SECOND).collect();
    let late: Vec<i64> = times.iter().enumerate().map(|(second, time)| time + (second as i64 * 7_919 % 40) * 1_000).collect();
    let values = Values::Double((0..8_192).map(|second| value(3, second)).collect());
    let precise = Values::Double((0..8_192).map(|second| value(3, second) * std::f64::consts::PI).collect());
    println!("chunks of 8,192 readings | encode M/s | decode M/s | bytes a reading");
    for (name, times, values) in
        [("1 Hz, two decimals", &times, &values), ("late by up to 39 ms", &late, &values), ("full precision", &times, &precise)]
    {
        let chunk = Chunk::encode(times, values);
        let rate = |work: &dyn Fn()| {
            let took = (0..TRIES).map(|_| {
                let began = Instant::now();
                (0..20).for_each(|_| work());
                began.elapsed()
            });
            20.0 * 8_192.0 / median(took.collect()).as_secs_f64() / 1e6
        };
        let encode = rate(&|| drop(std::hint::black_box(Chunk::encode(times, values))));
        let decode = rate(&|| drop(std::hint::black_box(chunk.decode(ValueKind::Double))));
        println!("{name} | {encode:.0} | {decode:.0} | {:.2}", chunk.points.len() as f64 / 8_192.0);
    }
}

fn batch(device: usize, first: usize) -> Bytes {
    let seconds = first..first + INSTANTS_PER_BATCH;
    let column = |sensor: usize| {
        let values = seconds.clone().map(|second| value(device * SENSORS + sensor, second)).collect();
        pb::Column { sensor: format!("temperature-{sensor}"), unit: "Cel".into(), values: Some(Values::Double(values).into()) }
    };
    let columns = (0..SENSORS).map(column).collect();
    let frame = pb::Frame {
        base_time_us: T0 + first as i64 * SECOND,
        time_deltas_us: vec![SECOND; INSTANTS_PER_BATCH - 1],
        columns,
        ..Default::default()
    };
    pb::Batch { frames: vec![frame] }.encode_to_vec().into()
}

/// The log of the whole fleet, in the order in which batches would come in; merged as it goes on.
async fn fill(config: &Config, devices: usize) -> Result<()> {
    let metrics = Metrics::new();
    let store = Store::open(&config.storage).await?;
    let registry = Registry::new(store.clone(), true, devices);
    let mut streams = Vec::with_capacity(devices);
    for device in 0..devices {
        let device =
            registry.create(&DeviceId::parse(&format!("device-{device}")).map_err(anyhow::Error::msg)?, Labels::default(), "").await?;
        for sensor in 0..SENSORS {
            let (name, unit) = (format!("temperature-{sensor}"), "Cel".to_owned());
            let create_time = Timestamp::now();
            registry
                .save_sensor(&device, SensorRow { key: 0, name, unit, kind: ValueKind::Double, allow_non_finite: false, create_time })
                .await?;
        }
        let mut tx = store.begin().await?;
        streams.push((device.key, tx.stream(device.key, StreamId::new(), Timestamp::now()).await?));
        tx.commit().await?;
    }
    let latest = Arc::new(Latest::load(&store, &registry).await?);
    let tail = Arc::new(Tail::new(Position(0), 1 << 20));
    let mut upkeep = Upkeep::new(config, store.clone(), registry.clone(), latest.clone(), tail, &metrics);
    let (mut merging, mut cpu, mut rows) = (Duration::ZERO, 0.0, Vec::new());
    for first in (0..SECONDS).step_by(INSTANTS_PER_BATCH) {
        for (device, (key, stream)) in streams.iter().enumerate() {
            let time = |second: usize| Timestamp::from_micros(T0 + second as i64 * SECOND).context("a time");
            let summary = BatchSummary {
                readings: (INSTANTS_PER_BATCH * SENSORS) as u32,
                first_time: time(first)?,
                last_time: time(first + INSTANTS_PER_BATCH - 1)?,
            };
            let last_sequence = (first / INSTANTS_PER_BATCH + 1) as u64;
            let batch = batch(device, first);
            rows.push(NewLogRow {
                device: *key,
                stream_key: stream.key,
                batches: 1,
                last_sequence,
                receive_time: Timestamp::now(),
                summary,
                batch,
            });
        }
        if rows.len() >= BATCHES_PER_COMMIT {
            let mut tx = store.begin().await?;
            tx.append(&rows).await?;
            tx.commit().await?;
            rows.clear();
        }
        // As often as the default interval would have it.
        if first / 60 != (first + INSTANTS_PER_BATCH) / 60 || first + INSTANTS_PER_BATCH >= SECONDS {
            let (began, cpu_before) = (Instant::now(), cpu_seconds());
            if !rows.is_empty() {
                let mut tx = store.begin().await?;
                tx.append(&std::mem::take(&mut rows)).await?;
                tx.commit().await?;
            }
            latest.catch_up(&store, &registry).await?;
            upkeep.round().await?;
            merging += began.elapsed();
            cpu += cpu_seconds() - cpu_before;
        }
    }
    store.close().await;
    let readings = (devices * SENSORS * SECONDS) as f64;
    let bytes = std::fs::metadata(config.storage.data_dir.join("tidegate.db"))?.len() as f64;
    println!("\n{:.1} M readings of {} sensors, merged each minute", readings / 1e6, devices * SENSORS);
    println!(
        "merge, prune and latest values: {:.2} M readings/s of processor time; paced: {:.2} M/s",
        readings / cpu / 1e6,
        readings / merging.as_secs_f64() / 1e6
    );
    println!("at rest: {:.2} bytes a reading, the whole file", bytes / readings);
    Ok(())
}

async fn query(config: &Config, device: &str) -> Result<(Duration, Duration)> {
    let gateway = Gateway::build(config.clone()).await?;
    let endpoint = Endpoint::from_shared(format!("http://{}", gateway.grpc_addr()))?.tcp_nodelay(true);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(gateway.run_until(async {
        let _ = stopped.await;
    }));
    let mut client = ReadingServiceClient::new(endpoint.connect().await?);
    let mut took = [Vec::new(), Vec::new()];
    for (bucket, took) in [None, Some(prost_types::Duration { seconds: 600, nanos: 0 })].into_iter().zip(&mut took) {
        for _ in 0..TRIES {
            let began = Instant::now();
            let request =
                pb::QueryReadingsRequest { device: device.into(), sensors: vec!["temperature-3".into()], bucket, ..Default::default() };
            let mut answer = client.query_readings(request).await?.into_inner();
            let mut readings = 0;
            while let Some(response) = answer.message().await? {
                if let Some(pb::query_readings_response::Message::Summary(summary)) = response.message {
                    readings = summary.readings;
                }
            }
            anyhow::ensure!(readings == SECONDS as u64, "{readings} readings");
            took.push(began.elapsed());
        }
    }
    drop(stop);
    running.await?;
    let [raw, buckets] = took;
    Ok((median(raw), median(buckets)))
}

/// The same readings in a plain table.
fn plain(path: &Path, devices: usize, device: usize) -> Result<Duration> {
    let mut database = rusqlite::Connection::open(path)?;
    database.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF; CREATE TABLE readings (sensor_id INTEGER, time INTEGER, value REAL, PRIMARY KEY (sensor_id, time)) WITHOUT ROWID;")?;
    let tx = database.transaction()?;
    let mut insert = tx.prepare("INSERT INTO readings VALUES (?, ?, ?)")?;
    for sensor in 0..devices * SENSORS {
        for second in 0..SECONDS {
            insert.execute((sensor as i64, T0 + second as i64 * SECOND, value(sensor, second)))?;
        }
    }
    drop(insert);
    tx.commit()?;
    let mut statement =
        database.prepare("SELECT time, value FROM readings WHERE sensor_id = ? AND time >= ? AND time < ? ORDER BY time")?;
    let mut took = Vec::new();
    for _ in 0..TRIES {
        let began = Instant::now();
        let rows =
            statement.query_map(((device * SENSORS + 3) as i64, T0, T0 + SECONDS as i64 * SECOND), |row| Ok((row.get(0)?, row.get(1)?)))?;
        let (times, values): (Vec<i64>, Vec<f64>) = rows.collect::<Result<Vec<(i64, f64)>, _>>()?.into_iter().unzip();
        anyhow::ensure!(times.len() == SECONDS && values.len() == SECONDS);
        took.push(began.elapsed());
    }
    Ok(median(took))
}

fn main() -> Result<()> {
    let devices = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(12);
    let directory = TempDir::new()?;
    let mut config = Config::default();
    config.storage.data_dir = directory.path().join("gateway");
    (config.grpc.listen, config.http.listen) = (([127, 0, 0, 1], 0).into(), ([127, 0, 0, 1], 0).into());
    config.live.replay_window = Duration::ZERO;
    encoding();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(fill(&config, devices))?;
    let device = devices / 2;
    let (raw, buckets) = runtime.block_on(query(&config, &format!("device-{device}")))?;
    let plain = plain(&directory.path().join("plain.db"), devices, device)?;
    println!(
        "\none sensor, {SECONDS} readings: QueryReadings over TCP {raw:.1?}, as means of ten minutes {buckets:.1?}; prepared statement on a plain table {plain:.1?}"
    );
    Ok(())
}
