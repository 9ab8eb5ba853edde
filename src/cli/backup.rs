//! `tidegate backup`: a copy of the embedded database, made beside a running gateway.

use super::{Failure, GatewayArgs, export::refuse_existing, progress::Shown};
use crate::store::backup::{self, CopyError};
use clap::Args;
use indicatif::HumanBytes;
use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How often the copy's size is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub struct BackupArgs {
    /// The file to make; one that is there is never overwritten. To restore it, put it as tidegate.db into an empty data directory.
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// No progress on standard error.
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    gateway: GatewayArgs,
}

pub async fn run(args: BackupArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let BackupArgs { to, quiet, gateway } = args;
    let config = gateway.load()?;
    if !config.storage.url.is_empty() {
        let why = "storage.url names a PostgreSQL database: pg_dump copies it while gateways run\n  Without storage.url the embedded database is copied.";
        return Err(Failure::Failed(why.to_owned()));
    }
    let database = backup::database_file(&config.storage.data_dir);
    if !database.exists() {
        return Err(Failure::Failed(format!("there is no database at {}\n  --storage-data-dir says where it is.", database.display())));
    }
    refuse_existing(&to)?;
    let begin = Instant::now();
    let partial = Partial::beside(&to)?;
    let bar = Shown::unless(quiet).bytes(backup::bytes_estimate(&database).await?);
    let copied = tokio::select! {
        copied = backup::copy(&database, &partial.0) => copied?,
        () = watch(&partial.0, |bytes| bar.set_position(bytes)) => unreachable!("it has no end"),
        interrupt = tokio::signal::ctrl_c() => {
            interrupt?;
            return Err(Failure::Failed("interrupted: there is no backup".to_owned()));
        }
    };
    bar.finish_and_clear();
    partial.become_file(&to)?;
    let size = HumanBytes(copied.bytes);
    Ok(writeln!(out, "{}: {} devices, {size}, checked, in {:.1} s", to.display(), copied.devices, begin.elapsed().as_secs_f64())?)
}

impl From<CopyError> for Failure {
    fn from(error: CopyError) -> Self {
        Self::Failed(format!("{:#}", anyhow::Error::from(error)))
    }
}

/// Tells of the size of a file as it grows.
async fn watch(file: &Path, tell: impl Fn(u64)) {
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    loop {
        ticks.tick().await;
        tell(file.metadata().map_or(0, |found| found.len()));
    }
}

/// A copy that is not whole yet, beside the file that it will be. Deleted when it does not become one.
struct Partial(PathBuf);

impl Partial {
    /// Of a name that no other process uses.
    fn beside(file: &Path) -> Result<Self, Failure> {
        let name = file.file_name().ok_or_else(|| Failure::Usage(format!("{} names no file", file.display())))?;
        let partial = file.with_file_name(format!("{}.{}.partial", name.to_string_lossy(), std::process::id()));
        // Of a process of this number that was killed.
        match std::fs::remove_file(&partial) {
            Err(why) if why.kind() != io::ErrorKind::NotFound => Err(why.into()),
            _ => Ok(Self(partial)),
        }
    }

    /// Takes its name, and makes that durable.
    fn become_file(&self, file: &Path) -> Result<(), Failure> {
        refuse_existing(file)?;
        std::fs::rename(&self.0, file)?;
        let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Ok(File::open(directory)?.sync_all()?)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // It is not there when all went well, and SQLite's journal only when it did not.
        let mut journal = self.0.clone().into_os_string();
        journal.push("-journal");
        for file in [self.0.as_os_str(), &journal] {
            let _ = std::fs::remove_file(file);
        }
    }
}
