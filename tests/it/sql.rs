//! Guarantee: what is stored can be read with nothing but Debian's `sqlite3` and `psql`, beside the running gateway, as docs/SQL.md
//! says.

use crate::support::{
    TestGateway,
    client::{SECOND, T0, TestDevice, column, encode, frame},
    eventually,
    postgres::{self, PostgresServer},
    script::skipped,
    streams::Link,
};
use std::{path::Path, process::Command};
use tidegate::{
    config::{ClockCorrection, DatabaseUrl},
    model::{Timestamp, columns::Values},
    pb,
};

const PAGE: &str = include_str!("../../docs/SQL.md");

fn sqlite3(data_dir: &Path, sql: &str) -> Option<String> {
    let database = data_dir.join("tidegate.db");
    let output = Command::new("sqlite3").arg("-readonly").arg("-cmd").arg(".timeout 10000").arg(database).arg(sql).output().ok()?;
    assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).expect("UTF-8"))
}

/// The page's examples in a language, with what its placeholders stand for.
fn examples(language: &str) -> Vec<String> {
    let blocks = PAGE.split("```").skip(1).step_by(2).filter_map(|block| block.strip_prefix(language)?.strip_prefix('\n'));
    blocks.map(str::to_owned).collect()
}

/// Every kind of values, late times, and what has no small form.
fn batches() -> Vec<pb::Frame> {
    let even = frame(
        T0,
        vec![
            column("temperature", "Cel", Values::Double(vec![21.5, 21.25, -0.5, 1e100])),
            column("starts", "", Values::Int64(vec![9_007_199_254_740_993, -1, 0, i64::MAX])),
            column("running", "", Values::Bool(vec![true, false, true, true])),
            column("state", "", Values::Text(vec!["idle".into(), "it's \"on\"".into(), "ü".into(), String::new()])),
        ],
    );
    let uneven = pb::Frame {
        base_time_us: T0,
        time_deltas_us: vec![SECOND + 7, SECOND, SECOND - 9],
        columns: vec![
            column("pressure", "Pa", Values::Double(vec![100_000.25, 100_000.5, 100_000.75, 100_001.0])),
            column("noise", "", Values::Double(vec![0.1 + 0.2, 1e-9, 2.5, 1e100])),
            column("note", "", Values::Text(vec!["a".into(), "b".into(), "c".into(), "d".into()])),
        ],
        ..Default::default()
    };
    vec![even, uneven]
}

/// Four readings that are one chunk: of a device whose clock is not known, and, between them, of when it is known to stand at [`T0`].
async fn send_with_a_clock_that_is_behind(gateway: &TestGateway) {
    let device = TestDevice::new(&gateway.channel(), "slow");
    let temperatures = |values: &[f64]| vec![column("t", "Cel", Values::Double(values.to_vec()))];
    let now = Timestamp::now().micros();
    let around = pb::Frame { time_deltas_us: vec![now - T0], ..frame(T0 + 100 * SECOND, temperatures(&[1.0, 4.0])) };
    device.upload([(1, encode(vec![around]))]).await.expect("accepted");
    let mut link = Link::open_with_clock(&device, T0 - now).await;
    link.send_batch(2, encode(vec![frame(T0, temperatures(&[2.0, 3.0]))])).await;
    link.acknowledged(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite3_reads_the_times_by_the_devices_clock() {
    if Command::new("sqlite3").arg("-version").output().is_err() {
        return skipped("sqlite3 is not there");
    }
    let gateway = TestGateway::start_with(|config| {
        config.history.unmerged_bytes_max = 1;
        config.devices.clock_correction = ClockCorrection::Measured;
    })
    .await;
    send_with_a_clock_that_is_behind(&gateway).await;
    let sql = "SELECT value, device_time, device_time = time FROM readings WHERE device = 'slow' ORDER BY time_us";
    let all = || async { sqlite3(gateway.data_dir(), sql).filter(|rows| rows.lines().count() == 4) };
    let rows = eventually("all is merged", all).await;
    let rows: Vec<&str> = rows.lines().collect();
    let corrected = ["1.0|2026-01-01T00:01:40.000000Z|1", "2.0|2026-01-01T00:00:00.000000Z|0", "3.0|2026-01-01T00:00:01.000000Z|0"];
    assert_eq!(rows[..3], corrected);
    assert!(rows[3].starts_with("4.0|") && rows[3].ends_with("|1"), "{rows:?}");
    assert!(gateway.stop().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn psql_reads_the_times_by_the_devices_clock() {
    if !postgres::is_there() {
        return;
    }
    let server = PostgresServer::shared();
    let url = server.database();
    let database = url.rsplit('/').next().expect("it has a name").to_owned();
    let gateway = TestGateway::start_with(|config| {
        config.storage.url = DatabaseUrl::new(url);
        config.history.unmerged_bytes_max = 1;
        config.devices.clock_correction = ClockCorrection::Measured;
    })
    .await;
    send_with_a_clock_that_is_behind(&gateway).await;
    let sql = "SELECT value, (extract(epoch FROM device_time) * 1000000)::bigint, device_time = time FROM readings \
               WHERE device = 'slow' ORDER BY time_us";
    let all = || async { server.psql(&database, sql).filter(|rows| rows.lines().count() == 4) };
    let rows = eventually("all is merged", all).await;
    let rows: Vec<&str> = rows.lines().collect();
    let corrected = [(1, T0 + 100 * SECOND, 't'), (2, T0, 'f'), (3, T0 + SECOND, 'f')];
    assert_eq!(rows[..3], corrected.map(|(value, time, same)| format!("{value}|{time}|{same}")));
    assert!(rows[3].starts_with("4|") && rows[3].ends_with("|t"), "{rows:?}");
    assert!(gateway.stop().await);
}

#[tokio::test]
async fn sqlite3_reads_every_kind_of_values_and_the_pages_examples() {
    let gateway = TestGateway::start_with(|config| config.history.unmerged_bytes_max = 1).await;
    if Command::new("sqlite3").arg("-version").output().is_err() {
        return skipped("sqlite3 is not there");
    }
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload([(1, encode(batches()))]).await.expect("accepted");
    let count = || async { sqlite3(gateway.data_dir(), "SELECT count(*) FROM readings").filter(|count| count.trim() == "28") };
    eventually("all is merged", count).await;

    let rows = |sensor: &str| {
        let sql = format!("SELECT time, value, text FROM readings WHERE device = 'pump-1' AND sensor = '{sensor}' ORDER BY time_us");
        sqlite3(gateway.data_dir(), &sql).expect("sqlite3 runs").lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let even = |row: &str, value: &str| format!("2026-01-01T00:00:0{row}Z|{value}");
    let temperatures = [("0.000000", "21.5|"), ("1.000000", "21.25|"), ("2.000000", "-0.5|"), ("3.000000", "1.0e+100|")];
    assert_eq!(rows("temperature"), temperatures.map(|(time, value)| even(time, value)));
    let starts = ["9007199254740993|", "-1|", "0|", "9223372036854775807|"];
    assert_eq!(rows("starts").iter().map(|row| &row[28..]).collect::<Vec<_>>(), starts);
    assert_eq!(rows("running").iter().map(|row| &row[28..]).collect::<Vec<_>>(), ["1|", "0|", "1|", "1|"]);
    assert_eq!(rows("state").iter().map(|row| &row[28..]).collect::<Vec<_>>(), ["|idle", "|it's \"on\"", "|ü", "|"]);
    let pressures = [("0.000000", "100000.25|"), ("1.000007", "100000.5|"), ("2.000007", "100000.75|"), ("2.999998", "100001.0|")];
    assert_eq!(rows("pressure"), pressures.map(|(time, value)| even(time, value)));
    assert_eq!(rows("noise").iter().map(|row| &row[28..]).collect::<Vec<_>>(), ["0.3|", "1.0e-09|", "2.5|", "1.0e+100|"]);
    assert_eq!(rows("note").iter().map(|row| &row[28..]).collect::<Vec<_>>(), ["|a", "|b", "|c", "|d"]);

    let examples = examples("sql sqlite");
    assert!(examples.len() >= 3, "docs/SQL.md has examples");
    for example in examples {
        let answer = sqlite3(gateway.data_dir(), &example).expect("sqlite3 runs");
        assert!(!answer.trim().is_empty(), "finds something: {example}");
    }
    gateway.stop().await;
}

// The client is waited for where the gateway runs: it needs a thread of its own.
#[tokio::test(flavor = "multi_thread")]
async fn psql_reads_every_kind_of_values_and_the_pages_examples() {
    if !postgres::is_there() {
        return;
    }
    let server = PostgresServer::shared();
    let url = server.database();
    let database = url.rsplit('/').next().expect("it has a name").to_owned();
    let gateway = TestGateway::start_with(|config| {
        config.storage.url = DatabaseUrl::new(url);
        config.history.unmerged_bytes_max = 1;
    })
    .await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload([(1, encode(batches()))]).await.expect("accepted");
    let psql = |sql: &str| server.psql(&database, sql);
    let count = || async { psql("SELECT count(*) FROM readings").filter(|count| count.trim() == "28") };
    eventually("all is merged", count).await;

    let rows = |sensor: &str| {
        let sql = format!("SELECT time_us, value, text FROM readings WHERE device = 'pump-1' AND sensor = '{sensor}' ORDER BY time_us");
        psql(&sql).expect("it is SQL").lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let at = |times: [i64; 4], values: [&str; 4]| -> Vec<String> {
        times.iter().zip(values).map(|(time, value)| format!("{}|{value}", T0 + time)).collect()
    };
    let even = [0, SECOND, 2 * SECOND, 3 * SECOND];
    let uneven = [0, SECOND + 7, 2 * SECOND + 7, 3 * SECOND - 2];
    assert_eq!(rows("temperature"), at(even, ["21.5|", "21.25|", "-0.5|", "1e+100|"]));
    assert_eq!(rows("running"), at(even, ["1|", "0|", "1|", "1|"]));
    assert_eq!(rows("state"), at(even, ["|idle", "|it's \"on\"", "|ü", "|"]));
    assert_eq!(rows("pressure"), at(uneven, ["100000.25|", "100000.5|", "100000.75|", "100001|"]));
    assert_eq!(rows("noise"), at(uneven, ["0.30000000000000004|", "1e-09|", "2.5|", "1e+100|"]));
    assert_eq!(rows("note"), at(uneven, ["|a", "|b", "|c", "|d"]));

    let examples = examples("sql psql");
    assert!(examples.len() >= 3, "docs/SQL.md has examples");
    for example in examples {
        let answer = psql(&example).unwrap_or_else(|| panic!("it is SQL: {example}"));
        assert!(!answer.trim().is_empty(), "finds something: {example}");
    }
    assert!(gateway.stop().await);
}
