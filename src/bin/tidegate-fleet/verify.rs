//! Whether the gateway has what was sent: every reading with its value and nothing more, each batch once in the log, and the
//! ledger agrees.

use crate::{
    gateway::{describe, retry},
    report::Count,
};
use anyhow::{Context, anyhow, bail};
use serde::Serialize;
use std::{cmp::Ordering, collections::BTreeMap, time::Duration};
use tidegate::{
    client::Channel,
    model::{
        Timestamp,
        columns::{Value, Values, times_from_deltas},
    },
    pb::{
        self, device_service_client::DeviceServiceClient, query_readings_response::Message, reading_service_client::ReadingServiceClient,
    },
};
use tonic::{Code, Status};

/// How many differences of a device are told one by one.
const EXAMPLES_MAX: usize = 5;
/// How long a gateway that is away is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The readings of one device's sensors, in the order of time.
pub type BySensor = BTreeMap<String, Vec<(i64, Value)>>;

/// How what is stored differs from what was sent.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Differences {
    /// Readings that were found as they were sent.
    pub equal: u64,
    /// Sent, and not found.
    pub missing: u64,
    /// Found with another value.
    pub wrong: u64,
    /// Found, and not sent; or found twice.
    pub extra: u64,
    /// The first few in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<String>,
}

impl Differences {
    pub fn none(&self) -> bool {
        self.missing + self.wrong + self.extra == 0
    }

    pub fn add(&mut self, other: Self) {
        self.equal += other.equal;
        self.missing += other.missing;
        self.wrong += other.wrong;
        self.extra += other.extra;
        let room = EXAMPLES_MAX.saturating_sub(self.examples.len());
        self.examples.extend(other.examples.into_iter().take(room));
    }

    fn example(&mut self, text: impl FnOnce() -> String) {
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(text());
        }
    }
}

/// Compares what was sent with what is stored.
pub fn compare(expected: &BySensor, found: &BySensor) -> Differences {
    let mut differences = Differences::default();
    let nothing = Vec::new();
    let sensors = expected.keys().chain(found.keys().filter(|sensor| !expected.contains_key(*sensor)));
    for sensor in sensors {
        let pair = (expected.get(sensor).unwrap_or(&nothing), found.get(sensor).unwrap_or(&nothing));
        compare_sensor(sensor, pair.0, pair.1, &mut differences);
    }
    differences
}

fn compare_sensor(sensor: &str, expected: &[(i64, Value)], found: &[(i64, Value)], differences: &mut Differences) {
    let (mut sent, mut stored) = (expected.iter().peekable(), found.iter().peekable());
    let at = |time: i64| Timestamp::from_micros(time).map_or_else(|| time.to_string(), |time| time.to_string());
    loop {
        let order = match (sent.peek(), stored.peek()) {
            (None, None) => return,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(sent), Some(stored)) => sent.0.cmp(&stored.0),
        };
        let sent = if order.is_le() { sent.next() } else { None };
        let stored = if order.is_ge() { stored.next() } else { None };
        match (sent, stored) {
            (Some((_, sent)), Some((_, stored))) if sent == stored => differences.equal += 1,
            (Some((time, sent)), Some((_, stored))) => {
                differences.wrong += 1;
                differences.example(|| format!("{sensor} at {}: {sent:?} was sent, {stored:?} is stored", at(*time)));
            }
            (Some((time, sent)), None) => {
                differences.missing += 1;
                differences.example(|| format!("{sensor} at {}: {sent:?} was sent, nothing is stored", at(*time)));
            }
            (None, Some((time, stored))) => {
                differences.extra += 1;
                differences.example(|| format!("{sensor} at {}: {stored:?} is stored, and was not sent", at(*time)));
            }
            (None, None) => unreachable!("one of them comes first"),
        }
    }
}

/// What the ledger and the log say of a device and a run, less what they should, in words. Unless all was acknowledged, more
/// may be stored than is `expected`.
pub fn compare_counts(expected: Count, ledger: Count, log: Count, all_acknowledged: bool) -> Vec<String> {
    let differs = |found: Count| found != expected && (all_acknowledged || found.batches < expected.batches);
    let mut differences = Vec::new();
    for (place, found) in [("the ledger counts", ledger), ("the log has", log)] {
        if differs(found) {
            let Count { batches, readings } = found;
            let text = format!("{place} {batches} batches with {readings} readings more than before the run");
            differences.push(format!("{text}; it should be {} with {}", expected.batches, expected.readings));
        }
    }
    if ledger != log && differences.is_empty() {
        differences.push(format!("the ledger counts {ledger:?} of the run as stored, the log has {log:?}"));
    }
    differences
}

/// What the ledger says of a device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Account {
    pub stored: Count,
    pub rejected: Count,
}

impl Account {
    /// What has come since `before`.
    pub fn since(self, before: Self) -> Self {
        Self { stored: self.stored.less(before.stored), rejected: self.rejected.less(before.rejected) }
    }
}

/// Reads back what a gateway has.
#[derive(Debug, Clone)]
pub struct Reader {
    readings: ReadingServiceClient<Channel>,
    devices: DeviceServiceClient<Channel>,
}

impl Reader {
    pub fn new(channel: Channel) -> Self {
        Self { readings: ReadingServiceClient::new(channel.clone()), devices: DeviceServiceClient::new(channel) }
    }

    /// What is stored of these sensors (empty: of all) from `first_us` through `last_us`.
    pub async fn query(&self, device: &str, sensors: &[String], first_us: i64, last_us: i64) -> anyhow::Result<BySensor> {
        let time = |micros: i64| Timestamp::from_micros(micros).map(Timestamp::to_proto);
        let request = pb::QueryReadingsRequest {
            device: device.to_owned(),
            sensors: sensors.to_vec(),
            start_time: time(first_us),
            end_time: time(last_us + 1),
            bucket: None,
        };
        match retry(PATIENCE, async || self.query_once(request.clone()).await).await {
            Ok(answer) => answer.with_context(|| format!("the readings of {device}")),
            // Of a device that never sent anything.
            Err(status) if status.code() == Code::NotFound => Ok(BySensor::new()),
            Err(status) => Err(anyhow!("the readings of {device} cannot be read: {}", describe(&status))),
        }
    }

    /// The inner error is for an answer that is not as the contract says: asking again does not help.
    async fn query_once(&self, request: pb::QueryReadingsRequest) -> Result<anyhow::Result<BySensor>, Status> {
        let mut stream = self.readings.clone().query_readings(request).await?.into_inner();
        let (mut found, mut count) = (BySensor::new(), 0);
        while let Some(response) = stream.message().await? {
            match response.message {
                Some(Message::Readings(column)) => match append(&mut found, column) {
                    Ok(readings) => count += readings,
                    Err(error) => return Ok(Err(error)),
                },
                Some(Message::Summary(summary)) if summary.readings == count => return Ok(Ok(found)),
                other => return Ok(Err(anyhow!("after {count} readings came {other:?}"))),
            }
        }
        Ok(Err(anyhow!("the answer ended without a summary")))
    }

    /// What the ledger says; nothing for a device that there is not yet.
    pub async fn account(&self, device: &str) -> anyhow::Result<Account> {
        let request = pb::GetLedgerRequest { device: device.to_owned() };
        match retry(PATIENCE, async || self.devices.clone().get_ledger(request.clone()).await).await {
            Ok(response) => {
                let ledger = response.into_inner().ledger.unwrap_or_default();
                let stored = ledger.stored.unwrap_or_default();
                let mut account = Account { stored: Count { batches: stored.batches, readings: stored.readings }, ..Account::default() };
                ledger.rejected.iter().for_each(|rejected| account.rejected.add(rejected.batches, rejected.readings));
                Ok(account)
            }
            Err(status) if status.code() == Code::NotFound => Ok(Account::default()),
            Err(status) => Err(anyhow!("the ledger of {device} cannot be read: {}", describe(&status))),
        }
    }
}

/// Takes a column behind what was found of its sensor. Returns how many readings it has.
fn append(found: &mut BySensor, column: pb::ReadingColumn) -> anyhow::Result<u64> {
    let times = times_from_deltas(column.base_time_us, &column.time_deltas_us).context("a time that overflows")?;
    let values: Values = column.values.context("a column without values")?.into();
    if values.len() != times.len() {
        bail!("a column of {} with {} values for {} times", column.sensor, values.len(), times.len());
    }
    let readings = times.into_iter().enumerate().filter_map(|(row, time)| Some((time, values.get(row)?)));
    let count = values.len() as u64;
    found.entry(column.sensor).or_default().extend(readings);
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sensor(readings: &[(i64, f64)]) -> BySensor {
        [("t".to_owned(), readings.iter().map(|&(time, value)| (time, Value::Double(value))).collect())].into()
    }

    #[test]
    fn every_kind_of_difference_is_counted() {
        let found =
            compare(&sensor(&[(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]), &sensor(&[(1, 1.0), (3, 9.0), (4, 4.0), (4, 4.0), (5, 5.0)]));
        assert_eq!((found.equal, found.missing, found.wrong, found.extra), (2, 1, 1, 2));
        assert_eq!(found.examples.len(), 4);
        assert!(!found.none());
    }

    #[test]
    fn a_sensor_that_was_not_sent_or_not_stored_is_a_difference() {
        assert_eq!(compare(&sensor(&[(1, 1.0)]), &BySensor::new()).missing, 1);
        assert_eq!(compare(&BySensor::new(), &sensor(&[(1, 1.0)])).extra, 1);
        assert!(compare(&sensor(&[(1, 1.0)]), &sensor(&[(1, 1.0)])).none());
    }

    #[test]
    fn a_batch_that_is_stored_twice_or_not_at_all_is_told() {
        let count = |batches| Count { batches, readings: 10 * batches };
        assert!(compare_counts(count(3), count(3), count(3), true).is_empty());
        assert_eq!(compare_counts(count(3), count(3), count(4), true).len(), 1);
        assert_eq!(compare_counts(count(3), count(2), count(2), false).len(), 2);
        assert!(compare_counts(count(3), count(4), count(4), false).is_empty(), "its acknowledgement was lost");
        assert_eq!(compare_counts(count(3), count(4), count(5), false).len(), 1);
    }

    #[test]
    fn columns_become_readings() {
        let values = Some(Values::Int64(vec![7, 8]).into());
        let column = pb::ReadingColumn { sensor: "n".to_owned(), base_time_us: 5, time_deltas_us: vec![2], values, ..Default::default() };
        let mut found = BySensor::new();
        assert_eq!(append(&mut found, column.clone()).expect("good"), 2);
        assert_eq!(found["n"], [(5, Value::Int64(7)), (7, Value::Int64(8))]);
        assert!(append(&mut found, pb::ReadingColumn { time_deltas_us: vec![], ..column }).is_err());
    }
}
