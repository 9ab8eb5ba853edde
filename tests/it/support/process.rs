//! A gateway in a process of its own, as it is deployed: for what ends processes.

use super::{channel, eventually, http_get};
use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
};
use tidegate::client::Channel;

/// See the [module](self). Killed when it is dropped.
pub struct GatewayProcess {
    child: Child,
    pub grpc: SocketAddr,
    pub http: SocketAddr,
    log: Arc<Mutex<String>>,
}

impl GatewayProcess {
    /// On free ports.
    pub async fn start(data_dir: &Path) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self::start_on(data_dir, any, any, &[]).await
    }

    /// On given addresses, with further flags; returns when it is ready.
    pub async fn start_on(data_dir: &Path, grpc: SocketAddr, http: SocketAddr, flags: &[&str]) -> Self {
        let mut command = Self::command(data_dir, grpc, http);
        command.args(flags);
        Self::run(command).await
    }

    /// The program and its flags, for what a test adds.
    pub fn command(data_dir: &Path, grpc: SocketAddr, http: SocketAddr) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        command.args(["serve", "--log-format=json", "--grpc-listen", &grpc.to_string(), "--http-listen", &http.to_string()]);
        command.arg("--storage-data-dir").arg(data_dir);
        command
    }

    /// Starts a [`command`](Self::command); returns when it is ready.
    pub async fn run(command: Command) -> Self {
        let started = Self::serving(command).await;
        let http = started.http;
        eventually("ready", || async move { http_get(http, "/readyz").await.filter(|(status, _)| *status == 200) }).await;
        started
    }

    /// Starts a [`command`](Self::command); returns when it serves, ready or not.
    pub async fn serving(command: Command) -> Self {
        let mut started = Self::spawn(command);
        (started.grpc, started.http) = eventually("the gateway serves", || {
            let found = started.addresses();
            assert!(started.child.try_wait().expect("its own child").is_none(), "the gateway ended: {}", started.log());
            async move { found }
        })
        .await;
        started
    }

    /// Starts a [`command`](Self::command), and waits for nothing: where it serves is not known yet.
    pub fn spawn(mut command: Command) -> Self {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the gateway's binary runs");
        let log = Arc::new(Mutex::new(String::new()));
        let lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let written = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut log = written.lock().expect("no panic under the lock");
                *log += &line;
                log.push('\n');
            }
        });
        let unknown = SocketAddr::from(([127, 0, 0, 1], 0));
        Self { child, grpc: unknown, http: unknown, log }
    }

    fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        let log = self.log();
        let event: serde_json::Value = serde_json::from_str(log.lines().find(|line| line.contains("gateway.serving"))?).ok()?;
        Some((event["grpc"].as_str()?.parse().ok()?, event["http"].as_str()?.parse().ok()?))
    }

    /// All that it logged so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("no panic under the lock").clone()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A connection of its own.
    pub fn channel(&self) -> Channel {
        channel(self.grpc)
    }

    /// Sends a signal by its name.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// SIGKILL: no chance to write anything down.
    pub fn kill(mut self) {
        self.child.kill().expect("its own child");
        self.child.wait().expect("its own child");
    }

    /// Waits for its end.
    pub async fn wait(&mut self) -> ExitStatus {
        eventually("the gateway ends", || {
            let ended = self.child.try_wait().expect("its own child");
            async move { ended }
        })
        .await
    }
}

impl Drop for GatewayProcess {
    fn drop(&mut self) {
        // An error says that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal by its name to a process.
pub fn signal(pid: u32, name: &str) {
    // The shell's own kill: the program is missing on slim systems.
    let sent = Command::new("sh").args(["-c", &format!("kill -s {name} {pid}")]).status().expect("a shell runs");
    assert!(sent.success(), "kill -s {name}");
}
