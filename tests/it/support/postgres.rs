//! A real PostgreSQL server: one for all tests of a process, or one of its own that a test may kill.
//!
//! A shell stands between the test and the server. It waits for the end of its standard input, which comes with the end of the
//! test's process however that ends, then stops the server, and removes what it was asked to.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// The superuser of the servers; everybody on this machine is trusted.
const USER: &str = "tidegate";
/// How long the server may take to answer. Long, as machines are slow; reached only by a failing test.
const PATIENCE: Duration = Duration::from_secs(60);
/// Starts the program behind the directory with all its arguments, tells its process id, and stops it at the end of input.
const KEEPER: &str = r#"
remove="$1"; shift
"$@" </dev/null >&2 & server=$!
echo "$server"
read -r _
kill -QUIT "$server" 2>/dev/null
# One that has just begun does not hear that yet.
(sleep 5; kill -KILL "$server") >/dev/null 2>&1 & last=$!
wait "$server"
kill "$last"
[ -z "$remove" ] || rm -rf "$remove"
"#;

/// A server that runs, or has been killed. Stopped when it is dropped.
pub struct PostgresServer {
    keeper: Child,
    pid: u32,
    port: u16,
    data: PathBuf,
    databases: AtomicU32,
    directory: Option<TempDir>,
}

/// Whether there is PostgreSQL on this machine. Where there is none, the tests that need it say that they are skipped; in CI
/// that is a failure.
pub fn is_there() -> bool {
    static SAID: OnceLock<bool> = OnceLock::new();
    *SAID.get_or_init(|| {
        let found = programs().is_some();
        if !found {
            let why = "PostgreSQL's initdb, postgres and psql are needed, in PATH or in /usr/lib/postgresql/*/bin";
            assert!(std::env::var_os("CI").is_none(), "{why}");
            // Past the test harness, which keeps what a passing test prints.
            let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
        }
        found
    })
}

/// The directory that has the server's programs; of several versions the latest.
fn programs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|version| version.path().join("bin"));
    let mut debian: Vec<PathBuf> = debian.collect();
    debian.sort();
    let is_whole = |bin: &PathBuf| ["initdb", "postgres", "psql"].iter().all(|program| bin.join(program).exists());
    std::env::split_paths(&path).chain(debian.into_iter().rev()).find(is_whole)
}

/// The server's programs refuse to run as root: then they run as another user.
fn command(program: &Path) -> Command {
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n");
    if !is_root {
        return Command::new(program);
    }
    let (user, group) = unprivileged_user();
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".into()]).arg(program);
    command
}

fn unprivileged_user() -> (u32, u32) {
    let id = |flag| {
        let output = Command::new("id").args([flag, "postgres"]).output().ok()?;
        String::from_utf8(output.stdout).ok()?.trim().parse().ok()
    };
    // Debian's package makes the user; nobody and nogroup are everywhere.
    id("-u").zip(id("-g")).unwrap_or((65534, 65534))
}

impl PostgresServer {
    /// The server that all tests of this process share; it stays until the process ends.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<PostgresServer> = OnceLock::new();
        SHARED.get_or_init(|| {
            let directory = TempDir::new().expect("a temporary directory").keep();
            Self::start_in(&directory, Some(&directory))
        })
    }

    /// A server of its own, which the test may [`kill`](Self::kill).
    pub fn private() -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let mut server = Self::start_in(directory.path(), None);
        server.directory = Some(directory);
        server
    }

    fn start_in(directory: &Path, remove: Option<&Path>) -> Self {
        let data = directory.join("data");
        std::fs::create_dir(&data).expect("made");
        if command(Path::new("true")).get_program() == "setpriv" {
            let (user, group) = unprivileged_user();
            std::os::unix::fs::chown(&data, Some(user), Some(group)).expect("root may");
            std::os::unix::fs::chown(directory, Some(user), Some(group)).expect("root may");
        }
        let programs = programs().expect("is_there() was asked");
        let made = command(&programs.join("initdb"))
            .args(["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--username", USER, "-D"])
            .arg(&data)
            .output()
            .expect("initdb runs");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let port = free_port();
        let (keeper, pid) = run(&data, port, remove);
        let server = Self { keeper, pid, port, data, databases: AtomicU32::new(0), directory: None };
        server.wait_until_it_answers();
        server
    }

    /// A new, empty database: its address.
    pub fn database(&self) -> String {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let made = self.psql("postgres", &format!("CREATE DATABASE {name}"));
        assert!(made.is_some(), "the database is made");
        format!("postgres://{USER}@127.0.0.1:{}/{name}", self.port)
    }

    /// Runs SQL as the stock client does: what it prints, a row a line, or `None` when it fails.
    pub fn psql(&self, database: &str, sql: &str) -> Option<String> {
        let programs = programs().expect("is_there() was asked");
        let output = Command::new(programs.join("psql"))
            .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", USER, "-d", database, "-c", sql, "-p"])
            .arg(self.port.to_string())
            .stdin(Stdio::null())
            .output()
            .expect("psql runs");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// SIGKILL to the server, which ends at once and with all its processes, as after a power cut less what the disk had not.
    pub fn kill(&mut self) {
        signal("KILL", self.pid);
        let _ = self.keeper.stdin.take();
        self.keeper.wait().expect("its own child");
    }

    /// Starts it again on what it holds, after [`kill`](Self::kill).
    pub fn start_again(&mut self) {
        // What is left of the killed one keeps the data directory for a moment.
        let deadline = Instant::now() + PATIENCE;
        loop {
            (self.keeper, self.pid) = run(&self.data, self.port, None);
            if self.answers_by(deadline) {
                return;
            }
            assert!(Instant::now() < deadline, "the server does not start again");
        }
    }

    fn wait_until_it_answers(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.psql("postgres", "SELECT 1").is_none() {
            assert!(Instant::now() < deadline, "the server does not answer");
            std::thread::yield_now();
        }
    }

    /// Whether it answers; `false` as soon as it has ended.
    fn answers_by(&mut self, deadline: Instant) -> bool {
        while Instant::now() < deadline {
            if self.psql("postgres", "SELECT 1").is_some() {
                return true;
            }
            if !Path::new(&format!("/proc/{}", self.pid)).exists() {
                let _ = self.keeper.stdin.take();
                self.keeper.wait().expect("its own child");
                return false;
            }
        }
        false
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        let _ = self.keeper.stdin.take();
        let _ = self.keeper.wait();
        self.directory = None;
    }
}

/// Runs the server under its keeper.
fn run(data: &Path, port: u16, remove: Option<&Path>) -> (Child, u32) {
    let programs = programs().expect("is_there() was asked");
    let server = command(&programs.join("postgres"));
    let mut command = Command::new("sh");
    command.args(["-c", KEEPER, "keeper"]).arg(remove.unwrap_or(Path::new(""))).arg(server.get_program()).args(server.get_args());
    command.arg("-D").arg(data).args(["-h", "127.0.0.1", "-p", &port.to_string(), "-c", "max_connections=300"]);
    command.args(["-c", "unix_socket_directories=", "-c", "log_min_messages=fatal"]);
    // Not in the test's process group: ctrl-C is for the test, and the keeper stops the server when it is gone.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut keeper = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("a shell runs");
    let mut pid = String::new();
    BufReader::new(keeper.stdout.take().expect("piped")).read_line(&mut pid).expect("the keeper tells it");
    (keeper, pid.trim().parse().expect("a process id"))
}

fn signal(name: &str, pid: u32) {
    // The shell's own kill: the program is missing on slim systems.
    let sent = Command::new("sh").args(["-c", &format!("kill -s {name} {pid}")]).status().expect("a shell runs");
    assert!(sent.success(), "kill -s {name}");
}

fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("bound").port()
}
