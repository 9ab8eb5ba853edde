//! The binary as a user has it: its commands against a gateway that it started itself.

use prost::Message;
use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};
use tidegate::pb::{self, telemetry_service_client::TelemetryServiceClient};

fn tidegate() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TIDEGATE_")) {
        command.env_remove(name);
    }
    command
}

/// `tidegate` without a command, on free ports; killed when the test ends.
struct Gateway {
    process: Child,
    endpoint: String,
    token: String,
    data: tempfile::TempDir,
}

impl Gateway {
    fn start() -> Self {
        Self::start_with(&[])
    }

    fn start_with(settings: &[&str]) -> Self {
        let data = tempfile::tempdir().expect("a directory");
        let mut process = tidegate()
            .args(["--grpc-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--log-format", "json", "--storage-data-dir"])
            .arg(data.path())
            .args(settings)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let mut log = BufReader::new(process.stderr.take().expect("piped")).lines();
        let serving = (log.by_ref().map(|line| line.expect("UTF-8")))
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(&line).ok())
            .find(|event| event["message"] == "gateway.serving")
            .expect("the log tells that it serves");
        let endpoint = format!("http://{}", serving["grpc"].as_str().expect("its address"));
        // A pipe that nobody reads would block the gateway's log at last.
        std::thread::spawn(move || log.for_each(drop));
        Self { process, endpoint, token: String::new(), data }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = tidegate();
        command.args(arguments).env("TIDEGATE_ENDPOINT", &self.endpoint);
        if !self.token.is_empty() {
            command.env("TIDEGATE_TOKEN", &self.token);
        }
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary runs")
    }

    /// It serves before it has proved that its database takes writes.
    fn wait_until_healthy(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.run(&["health"]).status.success() {
            assert!(Instant::now() < deadline, "the gateway does not become healthy");
        }
    }

    /// The output of a command that succeeds.
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// The message of a command that ends with `code`.
    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let message = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?} printed {:?}", String::from_utf8_lossy(&output.stdout));
        message
    }

    /// Stores `rows` readings of pump-1's temperature, one a second.
    fn upload(&self, rows: usize) {
        let values = pb::column::Values::DoubleValues(pb::DoubleValues { values: (0..rows).map(|row| row as f64 + 0.5).collect() });
        let column = pb::Column { sensor: "temperature".into(), unit: "Cel".into(), values: Some(values) };
        let frame = pb::Frame { base_time_us: 0, time_deltas_us: vec![1_000_000; rows - 1], columns: vec![column], ..Default::default() };
        let batch = pb::Batch { frames: vec![frame] }.encode_to_vec();
        let request = pb::UploadRequest {
            device: "pump-1".into(),
            stream_id: vec![7; 16].into(),
            sequence: 1,
            batch: batch.into(),
            ..Default::default()
        };
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let response = runtime.block_on(async {
            let endpoint = tonic::transport::Endpoint::from_shared(self.endpoint.clone()).expect("an address");
            let mut client = TelemetryServiceClient::new(endpoint.connect().await.expect("it listens"));
            client.upload(tokio_stream::once(request)).await.expect("stored").into_inner()
        });
        assert_eq!(response.accepted.unwrap_or_default().readings as usize, rows);
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Scenario: a gateway that asks for credentials, from its first start to an operator and devices that have theirs. Guarantee: each
/// command does what it says, for those who may, and is noted.
#[test]
fn tokens_from_the_first_administrators_to_a_devices() {
    let mut gateway = Gateway::start_with(&["--auth-mode", "required"]);
    assert!(gateway.fails(1, &["device", "list"]).contains("reason: CREDENTIAL_MISSING"));
    gateway.wait_until_healthy();
    let first = std::fs::read_to_string(gateway.data.path().join("admin-token")).expect("left at the first start");
    gateway.token = first.trim().to_owned();
    assert!(gateway.ok(&["whoami"]).starts_with("operators/admin\nrole: admin\n"));
    gateway.ok(&["operator", "create", "alice", "--role", "operator", "--scope", "site=berlin"]);
    assert!(gateway.ok(&["operator", "list"]).contains("alice"));
    let alice = gateway.ok(&["operator", "token", "create", "alice", "--expires", "90d"]).trim().to_owned();

    let admin = std::mem::replace(&mut gateway.token, alice);
    assert!(gateway.fails(1, &["operator", "list"]).contains("reason: PERMISSION_DENIED"));
    gateway.ok(&["device", "create", "pump-1", "--label", "site=berlin"]);
    assert!(gateway.fails(1, &["device", "create", "pump-2", "--label", "site=paris"]).contains("reason: PERMISSION_DENIED"));
    let token = gateway.ok(&["credential", "create", "pump-1", "--description", "in the cabinet"]);
    let id = token.split('_').nth(1).expect("its id");
    assert!(token.starts_with("tgd_") && gateway.ok(&["credential", "list", "pump-1"]).contains(id));
    assert_eq!(gateway.ok(&["credential", "revoke", "pump-1", id]), format!("{id} is void\n"));
    assert!(gateway.fails(1, &["credential", "revoke", "pump-1", id]).contains("reason: CREDENTIAL_NOT_FOUND"));
    let key = gateway.ok(&["enrolment-key", "create", "--uses", "1", "--expires", "7d", "--label", "site=berlin"]).trim().to_owned();
    assert!(gateway.ok(&["enrolment-key", "list"]).contains("0 of 1"));

    let alice = std::mem::replace(&mut gateway.token, key);
    gateway.token = gateway.ok(&["enrol", "pump-3"]).trim().to_owned();
    assert_eq!(gateway.ok(&["whoami"]).lines().next(), Some("devices/pump-3"));
    gateway.token = alice;
    assert!(gateway.ok(&["device", "show", "pump-3"]).contains("site=berlin"));
    gateway.token = admin;
    let audit = gateway.ok(&["audit", "--actor", "operators/alice", "--since", "1h"]);
    for noted in ["RevokeDeviceCredential", "CreateEnrolmentKey", "devices/pump-1", "PERMISSION_DENIED"] {
        assert!(audit.contains(noted), "{noted} is not in {audit}");
    }
}

/// Scenario: an operator's day with one device. Guarantee: each command does what it says, and says so.
#[test]
fn a_device_from_its_registration_to_its_deletion() {
    let gateway = Gateway::start();
    gateway.wait_until_healthy();
    assert_eq!(gateway.ok(&["health"]), "");
    assert_eq!(gateway.ok(&["device", "create", "pump-1", "--label", "site=berlin"]), "pump-1 is registered\n");
    assert!(gateway.fails(1, &["device", "create", "pump-1"]).contains("reason: DEVICE_EXISTS device=pump-1"));
    gateway.upload(3);

    assert!(gateway.ok(&["device", "list", "--selector", "site=berlin"]).contains("pump-1"));
    assert_eq!(gateway.ok(&["device", "list", "--selector", "site=paris", "--json"]), "");
    gateway.ok(&["device", "update", "pump-1", "--remove-label", "site", "--display-name", "Pump"]);
    let shown: serde_json::Value = serde_json::from_str(&gateway.ok(&["device", "show", "pump-1", "--json"])).expect("JSON");
    assert_eq!((&shown["device"]["display_name"], &shown["device"]["labels"]), (&"Pump".into(), &serde_json::json!({})));
    assert_eq!((&shown["ledger"]["stored"]["readings"], &shown["sensors"][0]["unit_registered"]), (&3.into(), &true.into()));

    assert_eq!(
        gateway.ok(&["query", "pump-1", "--start", "1970-01-01T00:00:01Z", "--format", "csv"]),
        "time,sensor,value,unit\n1970-01-01T00:00:01.000Z,temperature,1.5,Cel\n1970-01-01T00:00:02.000Z,temperature,2.5,Cel\n"
    );
    let bucket: serde_json::Value =
        serde_json::from_str(&gateway.ok(&["query", "pump-1", "--bucket", "1m", "--format", "json"])).expect("one line of JSON");
    assert_eq!((&bucket["count"], &bucket["avg"]), (&3.into(), &1.5.into()));

    let ledger = gateway.ok(&["ledger"]);
    assert!(ledger.contains("\ntotal of 1 ") && ledger.ends_with("Of 3 readings that were received 3 are stored.\n"), "{ledger}");
    let total: Vec<serde_json::Value> =
        gateway.ok(&["ledger", "--json"]).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((&total[0]["device"], &total[1]["device"]), (&"pump-1".into(), &serde_json::Value::Null));
    assert_eq!(total[1]["received"], serde_json::json!({"batches": 1, "readings": 3}));
    assert_eq!(gateway.ok(&["dead-letter", "list", "pump-1", "--json"]), "");
    assert_eq!(gateway.ok(&["dead-letter", "replay", "pump-1", "--all"]), "");
    assert!(gateway.fails(1, &["dead-letter", "replay", "pump-1", "7"]).contains("reason: DEAD_LETTER_NOT_FOUND dead_letter=7"));

    assert!(gateway.fails(2, &["device", "delete", "pump-1"]).contains("--yes"));
    assert_eq!(gateway.ok(&["device", "delete", "pump-1", "--yes"]), "pump-1 is deleted\n");
    assert!(gateway.fails(1, &["device", "show", "pump-1"]).contains("reason: DEVICE_NOT_FOUND"));
}

#[test]
fn a_configuration_is_set_shown_and_guarded_by_its_etag() {
    let gateway = Gateway::start();
    gateway.ok(&["device", "create", "pump-1", "--label", "site=berlin"]);
    assert!(gateway.fails(1, &["config", "get", "pump-1"]).contains("CONFIG_NOT_FOUND"));
    assert!(gateway.ok(&["config", "set", "pump-1", r#"{"interval_s": 5}"#]).contains("ACCEPTED"));
    assert!(gateway.ok(&["config", "set", "--selector", "site=berlin", r#"{"interval_s": 6}"#]).contains("revision 2"));
    let shown: serde_json::Value = serde_json::from_str(&gateway.ok(&["config", "get", "pump-1", "--json"])).expect("JSON");
    assert_eq!(shown["desired"]["config"], serde_json::json!({"interval_s": 6}));
    assert!(gateway.fails(1, &["config", "set", "pump-1", "{}", "--etag", "stale"]).contains("CONFIG_ETAG_MISMATCH"));
    assert!(gateway.fails(1, &["config", "set", "--selector", "site=paris", "{}"]).contains("no device matches"));
    assert!(gateway.fails(2, &["config", "set", "pump-1", "[]"]).contains("not a JSON object"));
    let waited = gateway.run(&["config", "set", "pump-1", "{}", "--wait", "300ms"]);
    assert_eq!(waited.status.code(), Some(1), "no device is there to apply it");
    assert!(String::from_utf8_lossy(&waited.stderr).contains("not applied after 300ms"));
}

/// Scenario: `tidegate follow` is ended by ctrl-C. Guarantee: it has shown what was stored, and ends with 0.
#[test]
fn a_follower_ends_well_when_it_is_interrupted() {
    let gateway = Gateway::start();
    gateway.upload(2);
    let mut follower = gateway.command(&["follow", "--from", "beginning"]).stdout(Stdio::piped()).spawn().expect("the binary runs");
    let mut lines = BufReader::new(follower.stdout.take().expect("piped")).lines().map(|line| line.expect("UTF-8"));
    assert_eq!(lines.next().expect("a reading"), "1970-01-01T00:00:00.000Z  pump-1  temperature  0.5 Cel");
    assert_eq!(lines.next().expect("a reading"), "1970-01-01T00:00:01.000Z  pump-1  temperature  1.5 Cel");
    let interrupted = Command::new("sh").args(["-c", &format!("kill -INT {}", follower.id())]).status().expect("a shell runs");
    assert!(interrupted.success());
    assert_eq!(lines.next(), None);
    assert!(follower.wait().expect("it ends").success());
}

/// Scenario: `tidegate query … | head -1`. Guarantee: it ends without a complaint when nobody reads on.
#[test]
fn a_closed_pipe_is_no_error() {
    let gateway = Gateway::start();
    gateway.upload(50_000);
    let mut query = gateway.command(&["query", "pump-1", "--format", "json"]);
    let mut query = query.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
    let mut first = String::new();
    BufReader::new(query.stdout.take().expect("piped")).read_line(&mut first).expect("UTF-8");
    assert!(first.contains("\"value\":0.5"), "{first}");
    // The pipe is closed here, with most of the answer unread.
    let mut complaints = String::new();
    query.stderr.take().expect("piped").read_to_string(&mut complaints).expect("UTF-8");
    assert_eq!(complaints, "");
    assert!(query.wait().expect("it ends").success());
}

#[test]
fn without_a_gateway_the_user_is_told_what_to_do() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
    let output = tidegate().args(["health", "--endpoint", &free.to_string()]).output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("Is it running? Start it with `tidegate serve`"));
}

#[test]
fn the_settings_in_effect_are_printed_and_wrong_ones_are_wrong_usage() {
    let output = tidegate().args(["config", "--log-format", "json"]).env("TIDEGATE_QUERY_CONCURRENT_MAX", "3").output().expect("runs");
    let settings: toml::Table = String::from_utf8(output.stdout).expect("UTF-8").parse().expect("TOML");
    assert_eq!((settings["log"]["format"].as_str(), settings["query"]["concurrent_max"].as_integer()), (Some("json"), Some(3)));
    let output = tidegate().args(["--grpc-listen", "nowhere"]).output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("wrong setting grpc.listen"));
}
