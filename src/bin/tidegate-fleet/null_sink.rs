//! A null sink: a gateway that checks what it gets, throws it away, and acknowledges it. What benchmarks compare with.

use crate::{Usage, Verdict};
use clap::Args;
use tidegate::config::{Config, SettingFlags, Sources};

#[derive(Debug, Args)]
pub struct NullSink {
    /// The gateway's settings. A file and the environment are not looked at.
    #[command(flatten)]
    pub settings: SettingFlags,
}

pub async fn run(arguments: NullSink) -> anyhow::Result<Verdict> {
    let SettingFlags(flags) = arguments.settings;
    let config = Config::load(&Sources { flags, ..Sources::default() }).map_err(|error| Usage(error.to_string()))?;
    tidegate::telemetry::logs::init(&config.log)?;
    Ok(if tidegate::app::serve_null_sink(config).await? { Verdict::Good } else { Verdict::Bad })
}
