//! Clients that nobody here wrote: Python's gRPC against the real gateway.

use crate::support::{
    TestGateway,
    process::GatewayProcess,
    script::{Script, fleet, python, skipped},
};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

#[tokio::test(flavor = "multi_thread")]
async fn all_four_kinds_of_calls_with_their_metadata_deadlines_and_error_details() {
    let Some(mut conformance) = python("tests/python/conformance.py") else { return };
    let gateway = TestGateway::start().await;
    conformance.args(["--grpc", &gateway.grpc.to_string(), "--http", &gateway.http.to_string()]);
    Script::start(conformance).succeeds().await;
    assert!(gateway.stop().await);
}

#[tokio::test]
async fn a_stop_is_seen_by_probes_and_followers() {
    let Some(mut check) = python("tests/python/drain_check.py") else { return };
    let directory = TempDir::new().expect("a temporary directory");
    let any = ([127, 0, 0, 1], 0).into();
    let mut gateway = GatewayProcess::start_on(directory.path(), any, any, &["--shutdown-notice=3s"]).await;
    check.args(["--grpc", &gateway.grpc.to_string()]);
    let mut check = Script::start(check);
    check.printed("watching").await;
    gateway.signal("TERM");
    check.succeeds().await;
    assert_eq!(gateway.wait().await.code(), Some(0), "{}", gateway.log());
}

/// The examples as a user has them: copied with the contract, the stubs made by their own script.
struct Examples {
    folder: PathBuf,
    path: String,
}

impl Examples {
    /// `None` where there is no Python for them.
    fn install(into: &Path) -> Option<Self> {
        let python = python("deploy/examples/python/generate.sh")?;
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = into.join("deploy/examples/python");
        std::fs::create_dir_all(folder.parent().expect("not the root")).expect("made");
        for (from, to) in [("proto", into.to_owned()), ("deploy/examples/python", into.join("deploy/examples"))] {
            let copied = std::process::Command::new("cp").arg("-r").arg(root.join(from)).arg(to).status().expect("cp runs");
            assert!(copied.success());
        }
        // The scripts say python3, as an activated environment has it.
        let bin = Path::new(python.get_program()).parent().unwrap_or(Path::new("")).to_string_lossy().into_owned();
        let path = format!("{bin}:{}", std::env::var("PATH").unwrap_or_default());
        let path = path.trim_start_matches(':').to_owned();
        let made = std::process::Command::new(folder.join("generate.sh")).env("PATH", &path).status().expect("a shell runs");
        assert!(made.success());
        Some(Self { folder, path })
    }

    fn start(&self, script: &str, arguments: &[&str]) -> Script {
        let mut command = std::process::Command::new("python3");
        command.arg("-u").arg(self.folder.join(script)).args(arguments).current_dir(&self.folder).env("PATH", &self.path);
        Script::start(command)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_devices_upload_resume_and_take_their_configuration() {
    let directory = TempDir::new().expect("a temporary directory");
    let Some(examples) = Examples::install(directory.path()) else { return };
    let gateway = TestGateway::start().await;
    let address = gateway.grpc.to_string();
    let csv = recording(directory.path());
    let csv_name = csv.display().to_string();

    // A device that wakes up now and then, and does so twice.
    for _ in 0..2 {
        examples.start("device.py", &["--gateway", &address, "--device", "py-1", "--csv", &csv_name]).succeeds().await;
    }
    let mut check = python("tests/python/replay_check.py").expect("found before");
    check.args(["query", "--grpc", &address, "--device", "py-1", "--csv"]).arg(&csv);
    Script::start(check).succeeds().await;

    // A device that is always on, an operator who configures it, and one who watches.
    let _device = examples.start("link_device.py", &["--gateway", &address, "--device", "py-2"]);
    let mut watch = examples.start("watch.py", &["--gateway", &address, "--device", "py-2"]);
    watch.prints(|line| line.contains(" py-2 temperature ") && line.ends_with(" Cel")).await;
    let configure = |config| examples.start("configure.py", &["--gateway", &address, "py-2", config]);
    let taken = configure(r#"{"interval_s": 0.05}"#).succeeds().await;
    let states: Vec<&str> = taken.lines().map(|line| line.rsplit(' ').next().unwrap_or_default()).collect();
    assert_eq!(states, ["CONFIG_STATE_ACCEPTED", "CONFIG_STATE_DELIVERED", "CONFIG_STATE_APPLIED"]);
    let refused = configure(r#"{"interval_s": -1}"#).fails(1).await;
    assert!(refused.contains("CONFIG_STATE_REJECTED interval_s is -1.0"), "{refused}");
}

/// A gateway that came back without its data is told what is gone, and takes what follows.
#[tokio::test(flavor = "multi_thread")]
async fn the_example_devices_go_on_with_a_gateway_that_has_lost_its_data() {
    let directory = TempDir::new().expect("a temporary directory");
    let Some(examples) = Examples::install(directory.path()) else { return };
    for _ in 0..2 {
        let gateway = TestGateway::start().await;
        let address = gateway.grpc.to_string();
        examples.start("device.py", &["--gateway", &address, "--device", "py-1", "--count", "500"]).succeeds().await;
        assert_eq!(gateway.metric("tidegate_stored_batches_total").await, Some(5.0));
    }
    let gateway = TestGateway::start().await;
    let address = gateway.grpc.to_string();
    let _device = examples.start("link_device.py", &["--gateway", &address, "--device", "py-1", "--queue", "py-1.queue"]);
    let mut watch = examples.start("watch.py", &["--gateway", &address, "--device", "py-1"]);
    watch.prints(|line| line.contains(" py-1 temperature ")).await;
}

/// A recording as they are found: times that stand twice and go backwards, a gap, empty cells, a name with a space.
fn recording(directory: &Path) -> PathBuf {
    let mut text = String::from("time;temperature;Volume Flow\n");
    for row in 0..2_500_i64 {
        let second = match row {
            700 => 699,              // stands twice
            900 => 850,              // goes backwards
            1_500.. => row + 86_400, // a day's gap before it
            _ => row,
        };
        let at = jiff::Timestamp::from_second(1_583_749_000 + second).expect("in range");
        let flow = if row % 50 < 5 { String::new() } else { format!("{}", row % 97) };
        text += &format!("{};{:.3};{flow}\n", at.strftime("%Y-%m-%d %H:%M:%S"), 20.0 + (row as f64 / 100.0).sin());
    }
    let path = directory.join("recording.csv");
    std::fs::write(&path, text).expect("written");
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_recording_is_stored_and_followed_as_it_stands_in_the_file() {
    let directory = TempDir::new().expect("a temporary directory");
    replay_and_check(&recording(directory.path())).await;
}

/// The recordings in the folder that `TIDEGATE_TEST_DATA` names; they are not part of this repository.
#[tokio::test(flavor = "multi_thread")]
async fn recordings_of_real_sensors_are_stored_and_followed_as_they_stand_in_the_file() {
    let Some(folder) = std::env::var_os("TIDEGATE_TEST_DATA") else {
        skipped("TIDEGATE_TEST_DATA names no folder with recordings");
        return;
    };
    let files = std::fs::read_dir(&folder).expect("TIDEGATE_TEST_DATA is a folder").map(|entry| entry.expect("readable").path());
    let recordings: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|extension| extension == "csv")).collect();
    assert!(!recordings.is_empty(), "there is no recording in {}", folder.display());
    for recording in recordings {
        replay_and_check(&recording).await;
    }
}

/// Replays a file while one follower watches, replays it again, and lets another follower see all from the beginning;
/// what is stored and what both saw is compared with the file by Python.
async fn replay_and_check(csv: &Path) {
    if python("tests/python/replay_check.py").is_none() {
        return;
    }
    let gateway = TestGateway::start().await;
    let check = |mode: &str, more: &[&str]| {
        let mut check = python("tests/python/replay_check.py").expect("found before");
        check.args([mode, "--grpc", &gateway.grpc.to_string(), "--device", "replayed", "--csv"]).arg(csv).args(more);
        // What such columns hold is a person's judgement of the other columns, and no sensor's reading.
        check.args(["--ignore", "anomaly", "--ignore", "changepoint"]);
        Script::start(check)
    };
    let replay = |more: &[&str]| {
        let mut replay = fleet();
        replay.args(["replay", "--device", "replayed", "--verify", "--json", "--endpoint", &format!("http://{}", gateway.grpc)]);
        replay.arg("--sensor-columns").arg(sensor_columns(csv).join(",")).arg("--csv").arg(csv).args(more);
        Script::start(replay)
    };
    let mut live = check("follow", &["--from", "live"]);
    live.printed("synced").await;
    replay(&[]).succeeds().await;
    live.succeeds().await;
    check("query", &[]).succeeds().await;

    let stored = gateway.metric("tidegate_stored_batches_total").await;
    replay(&[]).succeeds().await;
    assert_eq!(gateway.metric("tidegate_duplicate_batches_total").await, Some(0.0), "what is known to be there is not even sent");
    replay(&["--resend"]).succeeds().await;
    assert_eq!(gateway.metric("tidegate_duplicate_batches_total").await, stored, "all of it came again");
    assert_eq!(gateway.metric("tidegate_stored_batches_total").await, stored, "and added nothing");
    check("query", &[]).succeeds().await;
    check("follow", &["--from", "beginning"]).succeeds().await;
    assert!(gateway.stop().await);
}

fn sensor_columns(csv: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(csv).expect("readable");
    let header = text.lines().next().expect("a header");
    let delimiter = if header.contains(';') { ';' } else { ',' };
    let columns = header.split(delimiter).skip(1).map(str::trim);
    columns.filter(|name| !["anomaly", "changepoint"].contains(name)).map(str::to_owned).collect()
}
