//! Python scripts and our own programs, run beside a test.

use super::eventually;
use std::{
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

/// A program that runs, and what it has printed.
pub struct Script {
    child: Child,
    name: String,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl Script {
    pub fn start(mut command: Command) -> Self {
        let name = format!("{command:?}");
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs");
        let (stdout, reads_stdout) = gather(child.stdout.take().expect("piped"));
        let (stderr, reads_stderr) = gather(child.stderr.take().expect("piped"));
        Self { child, name, stdout, stderr, readers: vec![reads_stdout, reads_stderr] }
    }

    /// Sends a signal by its name.
    pub fn signal(&self, name: &str) {
        super::process::signal(self.child.id(), name);
    }

    /// Waits until it has printed this line.
    pub async fn printed(&mut self, line: &str) {
        self.prints(|printed| printed == line).await;
    }

    /// Waits until it has printed such a line.
    pub async fn prints(&mut self, is_such: impl Fn(&str) -> bool) {
        eventually("a line is printed", || {
            let found = self.output().lines().any(&is_such);
            let ended = self.child.try_wait().expect("its own child").is_some();
            assert!(found || !ended, "{} ended: {}{}", self.name, self.output(), self.errors());
            async move { found.then_some(()) }
        })
        .await;
    }

    /// Waits for its end, which must be a good one; returns what it printed.
    pub async fn succeeds(self) -> String {
        self.fails(0).await
    }

    /// Waits for its end with this exit code, and an error that says so.
    pub async fn fails_saying(self, code: i32, what: &str) {
        let (_, errors) = self.ends(code).await;
        assert!(errors.contains(what), "{errors}");
    }

    /// Waits for its end with this exit code; returns what it printed.
    pub async fn fails(self, code: i32) -> String {
        self.ends(code).await.0
    }

    async fn ends(mut self, code: i32) -> (String, String) {
        let status = eventually("the program ends", || {
            let ended = self.child.try_wait().expect("its own child");
            async move { ended }
        })
        .await;
        // What it printed last may still be in the pipes.
        for reader in std::mem::take(&mut self.readers) {
            reader.join().expect("no panic");
        }
        assert_eq!(status.code(), Some(code), "{}: {status}\n{}{}", self.name, self.output(), self.errors());
        (self.output(), self.errors())
    }

    fn output(&self) -> String {
        self.stdout.lock().expect("no panic under the lock").clone()
    }

    fn errors(&self) -> String {
        self.stderr.lock().expect("no panic under the lock").clone()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // An error says that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn gather(pipe: impl Read + Send + 'static) -> (Arc<Mutex<String>>, JoinHandle<()>) {
    let gathered = Arc::new(Mutex::new(String::new()));
    let into = gathered.clone();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let mut into = into.lock().expect("no panic under the lock");
            *into += &line;
            into.push('\n');
        }
    });
    (gathered, reader)
}

/// Says why a test is not run: past the test harness, which keeps what a passing test prints.
pub fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// A Python with gRPC, for the scripts in `tests/python`; `None` where there is none, which in CI is a failure.
pub fn python(script: &str) -> Option<Command> {
    let interpreter = std::env::var("TIDEGATE_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let needed = "import grpc, grpc_tools, grpc_health.v1, grpc_status, grpc_reflection, pyarrow.parquet";
    let found = Command::new(&interpreter).args(["-c", needed]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        let why = format!(
            "{interpreter} with the packages of tests/python/requirements.txt is needed for {script} (TIDEGATE_TEST_PYTHON names one)"
        );
        assert!(std::env::var_os("CI").is_none(), "{why}");
        skipped(&why);
        return None;
    }
    let mut command = Command::new(interpreter);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(script)).env("PYTHONDONTWRITEBYTECODE", "1");
    Some(command)
}

/// The fleet's binary.
pub fn fleet() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tidegate-fleet"))
}
