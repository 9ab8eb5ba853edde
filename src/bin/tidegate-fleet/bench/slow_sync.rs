//! A disk that syncs slowly: a library, loaded before all others, that delays fsync and fdatasync.

use super::server::DataDir;
use anyhow::{Context, bail};
use std::{path::PathBuf, process::Command, time::Duration};

const SOURCE: &str = include_str!("../../../../benches/slow_sync.c");

/// The compiled library.
pub struct Library {
    path: PathBuf,
    delay: Duration,
    _directory: DataDir,
}

impl Library {
    /// Compiles it with the machine's C compiler.
    pub fn build(delay: Duration) -> anyhow::Result<Self> {
        let directory = DataDir::new(None)?;
        let (source, path) = (directory.path().join("slow_sync.c"), directory.path().join("slow_sync.so"));
        std::fs::write(&source, SOURCE)?;
        let mut compiler = Command::new("cc");
        compiler.args(["-O2", "-shared", "-fPIC", "-o"]).arg(&path).arg(&source).arg("-ldl");
        if !compiler.status().context("--slow-sync needs a C compiler named cc")?.success() {
            bail!("slow_sync.c does not compile");
        }
        Ok(Self { path, delay, _directory: directory })
    }

    /// What a process must have in its environment.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        vec![("LD_PRELOAD", self.path.display().to_string()), ("SLOW_SYNC_US", self.delay.as_micros().to_string())]
    }
}
