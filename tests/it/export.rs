//! Exports: whole, resumed after any break, cancelled, and as files that other programs read.

use crate::support::{
    TestGateway,
    client::{SECOND, T0, TestDevice, column, devices, encode, frame, nth_temperatures},
    eventually, metric,
    process::GatewayProcess,
    script::{Script, python},
    soon,
};
use std::{net::SocketAddr, path::Path, process::Command, time::Duration};
use tempfile::TempDir;
use tidegate::client::Channel;
use tidegate::{
    config::Config,
    error::StatusFacts,
    model::columns::{Values, times_from_deltas},
    pb::{self, export_readings_response::Message, reading_service_client::ReadingServiceClient},
};
use tonic::{Code, Status, Streaming};

const MERGED: &str = "tidegate_merged_readings_total";
const IN_FLIGHT: &str = r#"tidegate_grpc_requests_in_flight{method="tidegate.v1.ReadingService/ExportReadings"}"#;

/// Spans are halved by what is not merged yet.
fn never_merge(config: &mut Config) {
    config.query.readings_max = 150;
    config.history.merge_interval = Duration::from_secs(24 * 3600);
}

async fn export(channel: &Channel, request: pb::ExportReadingsRequest) -> Result<Streaming<pb::ExportReadingsResponse>, Status> {
    Ok(ReadingServiceClient::new(channel.clone()).export_readings(request).await?.into_inner())
}

/// What came of an export: a row a reading, the tokens behind each message, and the summary if it came.
#[derive(Debug, Default, PartialEq)]
struct Exported {
    rows: Vec<(String, String, i64, String)>,
    tokens: Vec<(usize, String)>,
    summary: Option<pb::ExportSummary>,
}

/// Reads on until the end, or until there are so many messages with data.
async fn read(stream: &mut Streaming<pb::ExportReadingsResponse>, messages_max: usize) -> Result<Exported, Status> {
    let mut exported = Exported::default();
    while exported.tokens.len() < messages_max
        && let Some(response) = soon("a message", stream.message()).await?
    {
        match response.message.expect("set") {
            Message::Readings(readings) => {
                let column = readings.column.expect("set");
                let times = times_from_deltas(column.base_time_us, &column.time_deltas_us).expect("times");
                let values: Values = column.values.expect("set").into();
                let value = |row| format!("{:?}", values.get(row).expect("as many"));
                let rows = times.iter().enumerate().map(|(row, &time)| (readings.device.clone(), column.sensor.clone(), time, value(row)));
                exported.rows.extend(rows);
                exported.tokens.push((exported.rows.len(), response.resume_token));
            }
            Message::Progress(progress) => {
                assert!(progress.readings <= progress.readings_estimated && progress.devices <= progress.devices_total, "{progress:?}");
            }
            Message::Summary(summary) => exported.summary = Some(summary),
        }
    }
    Ok(exported)
}

async fn read_all(channel: &Channel, request: pb::ExportReadingsRequest) -> Exported {
    let mut stream = export(channel, request).await.expect("begun");
    read(&mut stream, usize::MAX).await.expect("to the end")
}

/// Some devices with sensors of all kinds, in several batches each.
async fn fill(channel: &Channel) {
    for (name, site) in [("a-1", "berlin"), ("b-2", "paris"), ("c-3", "berlin")] {
        let labels = [("site".to_owned(), site.to_owned())].into();
        let device = pb::Device { id: name.into(), labels, ..Default::default() };
        devices(channel).create_device(pb::CreateDeviceRequest { device: Some(device) }).await.expect("created");
        let batch = |begin: i64| {
            encode(vec![frame(
                T0 + begin * SECOND,
                vec![
                    column("count", "1", Values::Int64((begin..begin + 10).map(|row| (1 << 60) + row).collect())),
                    column("flow", "l/s", Values::Double((begin..begin + 10).map(|row| row as f64 / 8.0).collect())),
                    column("on", "", Values::Bool((begin..begin + 10).map(|row| row % 3 == 0).collect())),
                    column("state", "", Values::Text((begin..begin + 10).map(|row| format!("s,\"{row}\"")).collect())),
                ],
            )])
        };
        let batches = (0..20).map(|number| (number + 1, batch(number as i64 * 10)));
        TestDevice::new(channel, name).upload(batches).await.expect("accepted");
    }
}

#[tokio::test]
async fn an_export_is_whole_in_order_and_narrowed_as_asked() {
    let gateway = TestGateway::start().await;
    let channel = gateway.channel();
    fill(&channel).await;
    let all = read_all(&channel, pb::ExportReadingsRequest::default()).await;
    assert_eq!(all.rows.len(), 3 * 4 * 200);
    assert!(all.rows.is_sorted_by(|a, b| (&a.0, &a.1, a.2) < (&b.0, &b.1, b.2)));
    assert_eq!(all.summary, Some(pb::ExportSummary { readings: 2_400, devices: 3 }));
    let time = |second: i64| Some(prost_types::Timestamp { seconds: T0 / SECOND + second, nanos: 0 });
    let narrowed = read_all(
        &channel,
        pb::ExportReadingsRequest {
            devices: vec!["c-3".into(), "b-2".into(), "c-3".into()],
            label_selector: "site=berlin".into(),
            sensors: vec!["flow".into(), "none".into()],
            start_time: time(50),
            end_time: time(60),
            ..Default::default()
        },
    )
    .await;
    let expected: Vec<_> = all
        .rows
        .iter()
        .filter(|(device, sensor, at, _)| device == "c-3" && sensor == "flow" && (50..60).contains(&((at - T0) / SECOND)))
        .cloned()
        .collect();
    assert_eq!((narrowed.rows, expected.len()), (expected, 10));
    let unknown = pb::ExportReadingsRequest { devices: vec!["nobody".into()], ..Default::default() };
    let refused = export(&channel, unknown).await.expect_err("no such device");
    assert_eq!((refused.code(), StatusFacts::of(&refused).reason()), (Code::NotFound, "DEVICE_NOT_FOUND"));
    assert!(gateway.stop().await);
}

/// Scenario: an export is broken off behind each of its messages; from the log, with spans that are halved since each holds too
/// much of what is not merged, and from chunks. Guarantee: with the token it goes on without a gap or a repetition, and only for
/// the same request.
#[tokio::test]
async fn an_export_goes_on_from_each_of_its_tokens() {
    for merged in [false, true] {
        let gateway = TestGateway::start_with(|config| {
            never_merge(config);
            if merged {
                config.history.unmerged_bytes_max = 1;
            }
        })
        .await;
        let channel = gateway.channel();
        fill(&channel).await;
        if merged {
            eventually("all is merged", || async { (gateway.metric(MERGED).await >= Some(2_400.0)).then_some(()) }).await;
        }
        let all = read_all(&channel, pb::ExportReadingsRequest::default()).await;
        let mut sorted = all.rows.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!((all.rows.len(), sorted.len()), (2_400, 2_400), "each reading once");
        assert!(merged || all.tokens.len() > 12, "several spans a device: {}", all.tokens.len());
        for (rows, token) in &all.tokens {
            let rest = read_all(&channel, pb::ExportReadingsRequest { resume_token: token.clone(), ..Default::default() }).await;
            assert!(rest.rows == all.rows[*rows..], "{token}");
            assert_eq!(rest.summary, all.summary);
        }
        let token = all.tokens[0].1.clone();
        for resume_token in [token, "nonsense".to_owned()] {
            let other = pb::ExportReadingsRequest { sensors: vec!["flow".into()], resume_token, ..Default::default() };
            let refused = export(&channel, other).await.expect_err("of another export");
            assert_eq!(StatusFacts::of(&refused).violations[0].field, "resume_token");
        }
        assert!(gateway.stop().await);
    }
}

#[tokio::test]
async fn an_export_of_which_the_device_at_the_token_is_gone_goes_on_with_the_next() {
    let gateway = TestGateway::start().await;
    let channel = gateway.channel();
    fill(&channel).await;
    let all = read_all(&channel, pb::ExportReadingsRequest::default()).await;
    let (_, token) = all.tokens.iter().find(|(rows, _)| *rows > 800).expect("in the second device");
    devices(&channel).delete_device(pb::DeleteDeviceRequest { device: "b-2".into(), etag: String::new() }).await.expect("deleted");
    let rest = read_all(&channel, pb::ExportReadingsRequest { resume_token: token.clone(), ..Default::default() }).await;
    assert!(rest.rows == all.rows[1_600..], "the third device");
    assert!(gateway.stop().await);
}

/// Scenario: clients go away in the middle, and one that does not read. Guarantee: nothing of theirs stays, and what they
/// held others can have.
#[tokio::test]
async fn a_cancelled_export_leaves_nothing_behind() {
    let gateway = TestGateway::start_with(|config| config.export.concurrent_max = 1).await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    let batch = |begin: i64| encode(vec![frame(begin, vec![column("t", "Cel", Values::Double((0..50_000).map(f64::from).collect()))])]);
    let batches = (0..10).map(|number| (number + 1, batch(T0 - number as i64 * 50_000 * SECOND)));
    device.upload(batches).await.expect("accepted");
    for _ in 0..3 {
        let mut stream = export(&channel, pb::ExportReadingsRequest::default()).await.expect("begun");
        read(&mut stream, 2).await.expect("two messages");
        let refused = export(&channel, pb::ExportReadingsRequest::default()).await.expect_err("there is one");
        assert_eq!(StatusFacts::of(&refused).info.expect("set").metadata["setting"], "export.concurrent_max");
        drop(stream);
        eventually("no call is open", || async { (gateway.metric(IN_FLIGHT).await == Some(0.0)).then_some(()) }).await;
    }
    // Read to the end at last, it is all there.
    assert_eq!(read_all(&channel, pb::ExportReadingsRequest::default()).await.rows.len(), 500_000);
    assert!(gateway.stop().await);
}

#[tokio::test]
async fn a_stop_ends_an_export_with_a_token_to_go_on_at_the_next_gateway() {
    let gateway = TestGateway::start_with(never_merge).await;
    let channel = gateway.channel();
    fill(&channel).await;
    let all = read_all(&channel, pb::ExportReadingsRequest::default()).await;
    let mut stream = export(&channel, pb::ExportReadingsRequest::default()).await.expect("begun");
    let mut begun = read(&mut stream, 3).await.expect("three messages");
    gateway.begin_stop();
    let refused = loop {
        match read(&mut stream, 1).await {
            Ok(more) => {
                begun.rows.extend(more.rows);
                begun.tokens.extend(more.tokens);
                assert_eq!(more.summary, None, "it was stopped before its end");
            }
            Err(status) => break status,
        }
    };
    assert_eq!(StatusFacts::of(&refused).reason(), "DRAINING");
    let gateway = gateway.restart().await;
    let token = begun.tokens.pop().expect("some").1;
    let rest = read_all(&gateway.channel(), pb::ExportReadingsRequest { resume_token: token, ..Default::default() }).await;
    begun.rows.extend(rest.rows);
    assert!(begun.rows == all.rows, "the same in the same order");
    assert!(gateway.stop().await);
}

fn tidegate_export(endpoint: SocketAddr, arguments: &[&str]) -> Script {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.args(["export", "--endpoint", &endpoint.to_string()]).args(arguments);
    Script::start(command)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_writes_csv_to_standard_output_and_to_a_file_that_it_never_overwrites() {
    let gateway = TestGateway::start().await;
    fill(&gateway.channel()).await;
    let printed = tidegate_export(gateway.grpc, &["--device", "b-2", "--end", "2026-01-01T00:00:02Z"]).succeeds().await;
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!((lines[0], lines.len()), ("time,device,sensor,unit,value", 9));
    assert_eq!(lines[1], "2026-01-01T00:00:00.000Z,b-2,count,1,1152921504606846976");
    assert_eq!(lines[8], "2026-01-01T00:00:01.000Z,b-2,state,,\"s,\"\"1\"\"\"");

    let directory = TempDir::new().expect("a temporary directory");
    let file = directory.path().join("all.csv");
    let output = file.display().to_string();
    tidegate_export(gateway.grpc, &["--output", &output]).succeeds().await;
    assert_eq!(std::fs::read_to_string(&file).expect("readable").lines().count(), 2_401);
    assert_eq!(std::fs::read_dir(directory.path()).expect("readable").count(), 1, "nothing else is left");
    tidegate_export(gateway.grpc, &["--output", &output]).fails(1).await;
    tidegate_export(gateway.grpc, &["--output", &format!("{output}2"), "--resume"]).fails(1).await;
    tidegate_export(gateway.grpc, &["--output", &output, "--resume", "--device", "b-2"]).fails(2).await;
    assert!(gateway.stop().await);
}

/// Many readings of one device, so that an export takes a while.
async fn fill_much(channel: &Channel, batches: u64) {
    let device = TestDevice::new(channel, "pump-1");
    let values: Vec<f64> = (0..50_000).map(f64::from).collect();
    let batch = |number: u64| {
        let begin = T0 - i64::try_from(number).expect("small") * 50_000 * SECOND;
        encode(vec![frame(begin, vec![column("t", "Cel", Values::Double(values.clone()))])])
    };
    device.upload((1..=batches).map(|number| (number, batch(number)))).await.expect("accepted");
}

/// Scenario: the gateway is killed while `tidegate export` runs, so that it is interrupted; and comes back. Guarantee: with
/// --resume the file becomes what it had been without, byte by byte for CSV, reading by reading for Parquet.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_command_goes_on_after_a_kill_of_the_gateway() {
    let directory = TempDir::new().expect("a temporary directory");
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let flags = &["--query-readings-max=100000"];
    let gateway = GatewayProcess::start_on(&directory.path().join("data"), any, any, flags).await;
    fill_much(&gateway.channel(), 16).await;
    let path = |name: &str| directory.path().join(name).display().to_string();
    tidegate_export(gateway.grpc, &["--output", &path("whole.csv")]).succeeds().await;
    tidegate_export(gateway.grpc, &["--output", &path("whole.parquet")]).succeeds().await;

    let (grpc, http) = (gateway.grpc, gateway.http);
    let mut gateway = Some(gateway);
    for name in ["cut.csv", "cut.parquet"] {
        let output = path(name);
        let command = tidegate_export(grpc, &["--output", &output]);
        eventually("something was made durable", || async {
            // What stands behind the line of JSON is not text.
            let state = std::fs::read(format!("{output}.part.state")).unwrap_or_default();
            let state: serde_json::Value = serde_json::from_slice(state.split(|&byte| byte == b'\n').next()?).ok()?;
            (state["readings"].as_u64()? > 0).then_some(())
        })
        .await;
        drop(gateway.take());
        command.signal("INT");
        command.fails(1).await;
        assert!(!Path::new(&output).exists(), "it is not whole");
        gateway = Some(GatewayProcess::start_on(&directory.path().join("data"), grpc, http, flags).await);
        tidegate_export(grpc, &["--output", &output, "--resume"]).succeeds().await;
    }
    assert!(std::fs::read(path("cut.csv")).expect("readable") == std::fs::read(path("whole.csv")).expect("readable"), "the same bytes");
    let Some(mut check) = python("tests/python/parquet_check.py") else { return };
    check.args(["equal", &path("whole.parquet"), &path("cut.parquet"), "--rows", "800000"]);
    Script::start(check).succeeds().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parquet_file_is_read_by_others_as_what_the_csv_file_says() {
    let Some(mut check) = python("tests/python/parquet_check.py") else { return };
    let gateway = TestGateway::start().await;
    fill(&gateway.channel()).await;
    let directory = TempDir::new().expect("a temporary directory");
    let path = |name: &str| directory.path().join(name).display().to_string();
    tidegate_export(gateway.grpc, &["--output", &path("all.csv")]).succeeds().await;
    tidegate_export(gateway.grpc, &["--output", &path("all.parquet")]).succeeds().await;
    tidegate_export(gateway.grpc, &["--output", &path("none.parquet"), "--selector", "site=nowhere"]).succeeds().await;
    check.args(["csv", &path("all.parquet"), &path("all.csv"), "--none", &path("none.parquet")]);
    Script::start(check).succeeds().await;
    assert!(gateway.stop().await);
}

/// Scenario: what is acknowledged before an export, while a device uploads on. Guarantee: it is all in the export.
#[tokio::test]
async fn what_was_acknowledged_before_is_exported_whatever_comes_meanwhile() {
    let gateway = TestGateway::start_with(never_merge).await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    device.upload_nth(1..=50).await.expect("accepted");
    let mut stream = export(&channel, pb::ExportReadingsRequest::default()).await.expect("begun");
    device.upload_nth(51..=100).await.expect("accepted");
    let exported = read(&mut stream, usize::MAX).await.expect("to the end");
    let times: Vec<i64> = exported.rows.iter().map(|row| row.2).collect();
    assert!(times.is_sorted_by(|a, b| a < b), "in order, each once");
    let before = nth_temperatures(1..=50);
    assert_eq!(times[..before.len()], before.iter().map(|row| row.0).collect::<Vec<_>>());
    let text = crate::support::http_get(gateway.http, "/metrics").await.expect("served").1;
    assert_eq!(metric(&text, "tidegate_panics_total").unwrap_or(0.0), 0.0);
    assert!(gateway.stop().await);
}
