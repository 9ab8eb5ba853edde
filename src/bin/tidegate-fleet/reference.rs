//! What benchmarks compare with: a null sink, which is a gateway that checks what it gets, throws it away, and acknowledges it; and a
//! gateway without the layers around its services.

use crate::{Usage, Verdict};
use clap::Args;
use tidegate::config::{Config, SettingFlags, Sources};

/// A server to compare with.
#[derive(Debug, Args)]
pub struct Reference {
    /// The gateway's settings. A file and the environment are not looked at.
    #[command(flatten)]
    pub settings: SettingFlags,
}

impl Reference {
    fn load(self) -> anyhow::Result<Config> {
        let SettingFlags(flags) = self.settings;
        let config = Config::load(&Sources { flags, ..Sources::default() }).map_err(|error| Usage(error.to_string()))?;
        tidegate::telemetry::logs::init(&config.log)?;
        Ok(config)
    }
}

pub async fn run_null_sink(arguments: Reference) -> anyhow::Result<Verdict> {
    Ok(verdict(tidegate::app::serve_null_sink(arguments.load()?).await?))
}

pub async fn run_bare(arguments: Reference) -> anyhow::Result<Verdict> {
    Ok(verdict(tidegate::app::serve_bare(arguments.load()?).await?))
}

fn verdict(ended_well: bool) -> Verdict {
    if ended_well { Verdict::Good } else { Verdict::Bad }
}
