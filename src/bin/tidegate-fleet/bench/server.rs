//! The servers that are measured: processes of their own, started from beside this program.

use super::process::{self, Usage};
use anyhow::{Context, bail};
use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Stdio},
    time::Duration,
};
use tidegate::client::{Credentials, endpoint_with};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::Instant,
};
use tonic::transport::Endpoint;

/// How long a server may take to start or to answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a server is asked whether it is ready.
const READY_INTERVAL: Duration = Duration::from_millis(20);

/// Nothing is so old.
const NO_BACKLOG: &str = "--ingest-backlog-age=87600000h";

/// What a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The `tidegate` beside this program.
    Gateway,
    /// This program's null sink.
    NullSink,
    /// This program's gateway without layers.
    Bare,
}

/// How a server is started.
#[derive(Debug, Clone)]
pub struct Setup {
    /// What it is.
    pub kind: Kind,
    /// Where it takes calls; none: on a free port.
    pub listen: Option<SocketAddr>,
    /// Further flags.
    pub flags: Vec<String>,
    /// Whether it tells backlogs by their age. Else it takes all that comes for live: the batches of a benchmark have times of long ago.
    pub judges_age: bool,
    /// A command that it is started under.
    pub under: Vec<String>,
    /// A library to be loaded before all others, and its variables.
    pub preload: Vec<(&'static str, String)>,
    /// What its clients trust, if it speaks TLS: a certificate, PEM.
    pub authority: Option<Vec<u8>>,
}

impl Setup {
    /// A server with the default settings.
    pub fn of(kind: Kind) -> Self {
        Self { kind, listen: None, flags: Vec::new(), judges_age: false, under: Vec::new(), preload: Vec::new(), authority: None }
    }
}

/// A running server. It ends when it is dropped.
pub struct Server {
    child: Child,
    grpc: SocketAddr,
    http: SocketAddr,
    authority: Option<Vec<u8>>,
}

impl Server {
    /// Starts a server on an empty or a kept directory, and waits until it is ready.
    pub async fn start(setup: &Setup, data_dir: &Path) -> anyhow::Result<Self> {
        let own = std::env::current_exe()?;
        let (program, command) = match setup.kind {
            Kind::Gateway => (own.with_file_name("tidegate"), "serve"),
            Kind::NullSink => (own, "null-sink"),
            Kind::Bare => (own, "bare"),
        };
        let mut command_line = match setup.under.split_first() {
            Some((wrapper, arguments)) => {
                let mut wrapped = Command::new(wrapper);
                wrapped.args(arguments).arg(&program);
                wrapped
            }
            None => Command::new(&program),
        };
        let listen = setup.listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
        command_line.args([command, &format!("--grpc-listen={listen}"), "--http-listen=127.0.0.1:0", "--log-format=json"]);
        command_line.arg("--storage-data-dir").arg(data_dir).args(&setup.flags).envs(setup.preload.iter().cloned());
        if !setup.judges_age {
            command_line.arg(NO_BACKLOG);
        }
        // Settings of the surroundings are not what is measured.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TIDEGATE_")) {
            command_line.env_remove(name);
        }
        let mut child = command_line
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{} does not start; build it first", program.display()))?;
        let log = BufReader::new(child.stderr.take().context("the log is a pipe")?);
        let addresses = tokio::task::spawn_blocking(move || addresses(log)).await?;
        // Made before anything can fail, so that the process never outlives us.
        let unbound = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut server = Self { child, grpc: unbound, http: unbound, authority: setup.authority.clone() };
        (server.grpc, server.http) = addresses?;
        server.wait_ready().await?;
        Ok(server)
    }

    /// Where it takes calls.
    pub fn endpoint(&self) -> anyhow::Result<Endpoint> {
        let endpoint = match &self.authority {
            None => Endpoint::from_shared(format!("http://{}", self.grpc))?,
            Some(authority) => {
                let credentials = Credentials { authorities: Some(authority.clone()), ..Credentials::default() };
                endpoint_with(&format!("https://localhost:{}", self.grpc.port()), &credentials)?
            }
        };
        Ok(endpoint.tcp_nodelay(true))
    }

    /// Where it listens.
    pub fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    /// What it has used so far.
    pub fn usage(&self) -> anyhow::Result<Usage> {
        process::usage(self.child.id())
    }

    /// Takes its processor away, so that whatever it has still to do costs the other one nothing.
    pub fn pause(&self) -> anyhow::Result<()> {
        process::signal(self.child.id(), "STOP")
    }

    /// Lets it go on.
    pub fn resume(&self) -> anyhow::Result<()> {
        process::signal(self.child.id(), "CONT")
    }

    /// The sum of a metric's series; `None` when there is no such metric.
    pub async fn metric(&self, name: &str) -> anyhow::Result<Option<f64>> {
        let (_, text) = get(self.http, "/metrics").await?;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with([' ', '{']).then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
        });
        Ok(values.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value)))
    }

    async fn wait_ready(&self) -> anyhow::Result<()> {
        let (began, mut ticks) = (Instant::now(), tokio::time::interval(READY_INTERVAL));
        while !matches!(get(self.http, "/readyz").await, Ok((200, _))) {
            if began.elapsed() > PATIENCE {
                bail!("the server was not ready in {PATIENCE:?}");
            }
            ticks.tick().await;
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An error says that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both addresses from the log, which is then read on so that the server never waits for its reader; warnings are shown.
fn addresses(mut log: BufReader<ChildStderr>) -> anyhow::Result<(SocketAddr, SocketAddr)> {
    let mut line = String::new();
    let mut said = String::new();
    while log.read_line(&mut line)? > 0 {
        if let Some(found) = serving(&line) {
            std::thread::spawn(move || show_errors(log));
            return Ok(found);
        }
        said += &std::mem::take(&mut line);
    }
    bail!("the server did not start: {}", said.trim())
}

fn serving(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let event: serde_json::Value = serde_json::from_str(line).ok()?;
    (event["message"] == "gateway.serving").then_some(())?;
    Some((event["grpc"].as_str()?.parse().ok()?, event["http"].as_str()?.parse().ok()?))
}

fn show_errors(log: BufReader<ChildStderr>) {
    for line in log.lines().map_while(Result::ok) {
        if line.contains("\"level\":\"ERROR\"") {
            eprintln!("tidegate-fleet: the server says {line}");
        }
    }
}

/// A plain HTTP/1.1 GET: status and body.
async fn get(address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let asked = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        anyhow::Ok(answer)
    };
    let answer = tokio::time::timeout(PATIENCE, asked).await??;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no HTTP status")?;
    Ok((status, body.to_owned()))
}

/// A directory for one server's data, removed when it is dropped.
pub struct DataDir {
    path: PathBuf,
}

impl DataDir {
    /// A new one in `parent`, or where temporary files go.
    pub fn new(parent: Option<&Path>) -> anyhow::Result<Self> {
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        let path = parent.join(format!("tidegate-bench-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What all files in it take.
    pub fn bytes(&self) -> anyhow::Result<u64> {
        let mut bytes = 0;
        for entry in std::fs::read_dir(&self.path)? {
            bytes += entry?.metadata()?.len();
        }
        Ok(bytes)
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
