//! The README's commands do what it shows, and its device works.

use crate::support::{
    client::TestDevice,
    process::GatewayProcess,
    script::{Script, python},
};
use std::{
    path::Path,
    process::{Command, Stdio},
};
use tempfile::TempDir;

/// The first fenced block of a language.
fn block(language: &str) -> String {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).expect("there is a README");
    let (_, rest) = text.split_once(&format!("```{language}\n")).expect("it has such a block");
    rest.split_once("```").expect("the block ends").0.to_owned()
}

/// Numbers differ from run to run, and with them the width of columns.
fn without_numbers(text: &str) -> Vec<String> {
    let masked = |line: &str| {
        let mut shown = String::new();
        for character in line.chars() {
            match character {
                '0'..='9' if shown.ends_with('#') => {}
                '0'..='9' => shown.push('#'),
                // Of a number with decimals.
                '.' if shown.ends_with('#') => {}
                ' ' if shown.ends_with(' ') => {}
                other => shown.push(other),
            }
        }
        shown
    };
    text.lines().map(|line| masked(line.trim_end())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tour_shows_what_its_commands_print() {
    let directory = TempDir::new().expect("a temporary directory");
    let gateway = GatewayProcess::start(directory.path()).await;
    let binaries = Path::new(env!("CARGO_BIN_EXE_tidegate")).parent().expect("a folder");
    let path = format!("{}:{}", binaries.display(), std::env::var("PATH").expect("set"));
    let tour = block("console");
    let mut commands = 0;
    for step in tour.split("$ ").filter(|step| !step.is_empty()) {
        let (command, shown) = step.split_once('\n').expect("a command ends with its line");
        if command.starts_with("cargo build") {
            continue; // The binaries under test are built.
        }
        let mut shell = Command::new("sh");
        shell.args(["-c", command]).env("PATH", &path).env("TIDEGATE_ENDPOINT", format!("http://{}", gateway.grpc)).stdin(Stdio::null());
        let printed = Script::start(shell).succeeds().await;
        assert_eq!(without_numbers(&printed), without_numbers(shown), "{command}\n{printed}");
        commands += 1;
    }
    assert!(commands >= 5, "{tour}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_device_in_python_works_as_it_is_printed() {
    let Some(interpreter) = python("README.md") else { return };
    let directory = TempDir::new().expect("a temporary directory");
    let gateway = GatewayProcess::start(directory.path()).await;
    let device = block("python");
    assert!(device.contains("127.0.0.1:50051"), "the address is replaced by that of the test's gateway");
    let script = directory.path().join("device.py");
    let stubs = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python");
    // The stubs as the other checks have them; the rest is the README's text.
    let text = format!(
        "import sys; sys.path.insert(0, {stubs:?}); import stubs\n{}",
        device.replace("127.0.0.1:50051", &gateway.grpc.to_string())
    );
    std::fs::write(&script, text).expect("written");
    let mut command = Command::new(interpreter.get_program());
    command.arg(&script).env("PYTHONDONTWRITEBYTECODE", "1");
    let printed = Script::start(command).succeeds().await;
    assert_eq!(printed, "3 readings are durable; the next batch is 2\n");
    let stored = TestDevice::new(&gateway.channel(), "pump-1").stored().await;
    assert_eq!(stored["temperature"].0.len(), 3);
}
