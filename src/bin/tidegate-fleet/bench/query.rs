//! One day of one sensor out of many: QueryReadings beside the same read from a plain SQLite table, in turn.

use super::{
    arguments::{Common, Query, Store},
    call,
    pool::{self, INTERVAL_US, Pool, Shape},
    process,
    report::median,
    rest::pruned,
    server::{DataDir, Server},
    upload::{Uploaders, device_name},
};
use anyhow::{Context, bail};
use rusqlite::{Connection, params};
use serde::Serialize;
use std::{hint::black_box, sync::Arc, time::Duration};
use tidegate::{
    model::{Timestamp, columns::times_from_deltas},
    pb::{self, query_readings_response::Message, reading_column::Values, reading_service_client::ReadingServiceClient},
};
use tokio::time::Instant;
use tonic::transport::Channel;

/// The rows that are asked for: a day at one a second.
const DAY_ROWS: u64 = 86_400;
/// How many rows each sensor has: the day, and something before and behind it.
pub(super) const ROWS_PER_SENSOR: u64 = 100_000;
/// Batches of a thousand: what is measured is not how they come in.
pub(super) const SHAPE: Shape = Shape { sensors: 10, rows: 100 };
pub(super) const CONNECTIONS: u32 = 10;
/// The gateway's metric of readings that were merged.
const MERGED: &str = "tidegate_merged_readings_total";
const MERGE_TIMEOUT: Duration = Duration::from_secs(1_800);
const MERGE_ASKED_INTERVAL: Duration = Duration::from_millis(500);
/// The page cache of the table's connection, in KiB: all that is read again is in memory, as it is in the gateway's case.
const CACHE_KIB: i64 = 262_144;

/// What was measured; times are medians.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub machine: String,
    pub stored_readings: u64,
    pub table_readings: u64,
    pub rows: u64,
    pub gateway_seconds: f64,
    pub table_seconds: f64,
    /// The table's time by the gateway's: how many times as fast the gateway is.
    pub speedup: f64,
    /// Both once before anything is warm.
    pub gateway_first_seconds: f64,
    pub table_first_seconds: f64,
    pub gateway_bytes_per_reading: f64,
    pub table_bytes_per_reading: f64,
}

impl Outcome {
    /// The table of the documentation.
    pub fn to_markdown(&self) -> String {
        let row = |what: &str, readings: u64, median: f64, first: f64, bytes: f64| {
            format!("| {what} | {:.0} | {:.2} | {:.2} | {bytes:.1} |\n", readings as f64 / 1e6, median * 1e3, first * 1e3)
        };
        format!(
            "Measured on {}; {} rows of one sensor.\n\n| | readings stored, millions | median, ms | first time, ms | bytes a reading |\n|---|---|---|---|---|\n{}{}\nThe gateway is {:.2} times as fast.\n",
            self.machine,
            self.rows,
            row("QueryReadings", self.stored_readings, self.gateway_seconds, self.gateway_first_seconds, self.gateway_bytes_per_reading),
            row("plain SQLite table", self.table_readings, self.table_seconds, self.table_first_seconds, self.table_bytes_per_reading),
            self.speedup
        )
    }
}

pub async fn run(arguments: &Query) -> anyhow::Result<Outcome> {
    let Query { readings, table_readings, repeats, common } = arguments;
    let pool = Arc::new(Pool::new(SHAPE));
    let stored = Gateway::fill(&pool, *readings, common).await?;
    let table = Table::fill(&pool, (*table_readings).min(stored.readings), common)?;
    let start_us = pool.start_us() + (ROWS_PER_SENSOR - DAY_ROWS) as i64 / 2 * INTERVAL_US;
    let end_us = start_us + DAY_ROWS as i64 * INTERVAL_US;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for repeat in 0..=u64::from(*repeats) {
        // Another sensor each time, so that none is any warmer than the others.
        let sensor = repeat * 37 % table.sensors;
        let began = Instant::now();
        let from_gateway = black_box(stored.read(sensor, start_us, end_us).await?);
        ours.push(began.elapsed().as_secs_f64());
        let began = Instant::now();
        let from_table = black_box(table.read(sensor, start_us, end_us)?);
        theirs.push(began.elapsed().as_secs_f64());
        if from_gateway != from_table || from_table.len() as u64 != DAY_ROWS {
            bail!("the two answers differ: {} readings and {}", from_gateway.len(), from_table.len());
        }
    }
    let (gateway_first_seconds, table_first_seconds) = (ours.remove(0), theirs.remove(0));
    let (gateway_seconds, table_seconds) = (median(ours), median(theirs));
    Ok(Outcome {
        machine: process::machine(),
        stored_readings: stored.readings,
        table_readings: table.sensors * ROWS_PER_SENSOR,
        rows: DAY_ROWS,
        gateway_seconds,
        table_seconds,
        speedup: table_seconds / gateway_seconds,
        gateway_first_seconds,
        table_first_seconds,
        gateway_bytes_per_reading: stored.data.bytes()? as f64 / stored.readings as f64,
        table_bytes_per_reading: table.data.bytes()? as f64 / (table.sensors * ROWS_PER_SENSOR) as f64,
    })
}

/// Stores about so many readings, and waits until they are merged; how many there are.
pub(super) async fn fill(server: &Server, channels: &[Channel], pool: &Arc<Pool>, readings: u64, silent: bool) -> anyhow::Result<u64> {
    let devices = (readings / (ROWS_PER_SENSOR * SHAPE.sensors as u64)).clamp(1, 10_000) as u32;
    let mut uploaders = Uploaders::new(pool.clone(), channels, devices);
    let slice = uploaders.send_each(ROWS_PER_SENSOR / SHAPE.rows as u64).await?;
    if !silent {
        println!("stored {} readings in {:.1} s", slice.readings, slice.elapsed.as_secs_f64());
    }
    let began = Instant::now();
    let mut ticks = tokio::time::interval(MERGE_ASKED_INTERVAL);
    while server.metric(MERGED).await?.context("the gateway does not say how much is merged")? < slice.readings as f64 {
        if began.elapsed() > MERGE_TIMEOUT {
            bail!("not merged within {MERGE_TIMEOUT:?}");
        }
        ticks.tick().await;
    }
    if !silent {
        println!("merged after another {:.1} s", began.elapsed().as_secs_f64());
    }
    Ok(slice.readings)
}

/// A gateway that holds the readings, merged.
struct Gateway {
    client: ReadingServiceClient<Channel>,
    readings: u64,
    // Ends before its data is removed.
    _server: Server,
    data: DataDir,
}

impl Gateway {
    async fn fill(pool: &Arc<Pool>, readings: u64, common: &Common) -> anyhow::Result<Self> {
        let data = DataDir::new(common.data_dir.as_deref())?;
        let server = Server::start(&common.gateway(Store::Sqlite)?, data.path()).await?;
        let channels = call::connect(&server.endpoint()?, CONNECTIONS).await?;
        let readings = fill(&server, &channels, pool, readings, common.json).await?;
        // Deleting would take a part of the processors from both. It goes in rounds: one more may be due.
        pruned(&server).await?;
        Ok(Self { client: ReadingServiceClient::new(channels[0].clone()), readings, _server: server, data })
    }

    /// All readings of a range of time, as pairs.
    async fn read(&self, sensor: u64, start_us: i64, end_us: i64) -> anyhow::Result<Vec<(i64, f64)>> {
        let (device, sensor) = place(sensor);
        let time = |micros| Timestamp::from_micros(micros).map(Timestamp::to_proto);
        let request = pb::QueryReadingsRequest {
            device: device_name(device),
            sensors: vec![pool::sensor(sensor).to_owned()],
            start_time: time(start_us),
            end_time: time(end_us),
            bucket: None,
        };
        let mut answer = self.client.clone().query_readings(request).await?.into_inner();
        let mut readings = Vec::new();
        while let Some(part) = answer.message().await? {
            if let Some(Message::Readings(pb::ReadingColumn { base_time_us, time_deltas_us, values: Some(values), .. })) = part.message {
                let Values::DoubleValues(values) = values else { bail!("not doubles") };
                let times = times_from_deltas(base_time_us, &time_deltas_us).context("times out of range")?;
                readings.extend(times.into_iter().zip(values.values));
            }
        }
        Ok(readings)
    }
}

/// The device and the sensor in it, of a sensor's number over all.
fn place(sensor: u64) -> (u32, usize) {
    let sensors = SHAPE.sensors as u64;
    ((sensor / sensors) as u32, (sensor % sensors) as usize)
}

/// The same readings as rows.
struct Table {
    connection: Connection,
    sensors: u64,
    data: DataDir,
}

impl Table {
    fn fill(pool: &Pool, readings: u64, common: &Common) -> anyhow::Result<Self> {
        let data = DataDir::new(common.data_dir.as_deref())?;
        let mut connection = Connection::open(data.path().join("table.db"))?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
        connection.execute_batch(
            "CREATE TABLE readings (sensor INTEGER, time INTEGER, value REAL, PRIMARY KEY (sensor, time)) STRICT, WITHOUT ROWID",
        )?;
        let devices = (readings / (ROWS_PER_SENSOR * SHAPE.sensors as u64)).max(1) as u32;
        for device in 0..devices {
            let transaction = connection.transaction()?;
            insert_device(&transaction, pool, device)?;
            transaction.commit()?;
        }
        connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE); ANALYZE")?;
        Ok(Self { connection, sensors: u64::from(devices) * SHAPE.sensors as u64, data })
    }

    fn read(&self, sensor: u64, start_us: i64, end_us: i64) -> rusqlite::Result<Vec<(i64, f64)>> {
        let query = "SELECT time, value FROM readings WHERE sensor = ?1 AND time >= ?2 AND time < ?3 ORDER BY time";
        let mut statement = self.connection.prepare_cached(query)?;
        let rows = statement.query_map(params![sensor as i64, start_us, end_us], |row| Ok((row.get(0)?, row.get(1)?)))?;
        rows.collect()
    }
}

/// All rows of a device, in the order of the key.
fn insert_device(connection: &Connection, pool: &Pool, device: u32) -> anyhow::Result<()> {
    let mut insert = connection.prepare_cached("INSERT INTO readings VALUES (?1, ?2, ?3)")?;
    let frames: Vec<_> = (1..=ROWS_PER_SENSOR / SHAPE.rows as u64).map(|sequence| pool.frame(device, sequence)).collect();
    for sensor in 0..SHAPE.sensors {
        let key = i64::from(device) * SHAPE.sensors as i64 + sensor as i64;
        for frame in &frames {
            let Some(pb::column::Values::DoubleValues(column)) = &frame.columns[sensor].values else { bail!("not doubles") };
            for (row, value) in column.values.iter().enumerate() {
                insert.execute(params![key, frame.base_time_us + row as i64 * INTERVAL_US, value])?;
            }
        }
    }
    Ok(())
}
