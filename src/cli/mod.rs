//! The command line: the gateway itself, and what an operator does with a running one.
//!
//! Standard output carries only what was asked for, in a form that other programs can read; all that is about the command
//! itself goes to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage.
#![allow(clippy::print_stderr, reason = "standard error is where a command talks to its user")]

mod backup;
mod client;
mod configure;
mod copy;
mod credential;
mod credentials;
mod dead_letter;
mod device;
mod export;
mod failure;
mod follow;
mod health;
mod ledger;
mod operator;
pub(crate) mod parse;
mod print;
mod progress;
mod query;
mod retry;
mod set;
mod show;

pub use credentials::CredentialArgs;
pub use failure::Failure;

use crate::{
    config::{Config, SettingFlags, Sources},
    store::Store,
};
use clap::{Args, Parser, Subcommand};
use std::{
    future::Future,
    io::{self, BufWriter, Write},
    path::PathBuf,
    process::ExitCode,
};
use tokio::runtime;

/// What the command line says.
#[derive(Debug, Parser)]
#[command(
    name = "tidegate",
    version,
    about = "An IoT telemetry ingestion gateway. Without a command it serves, with the settings below.",
    args_conflicts_with_subcommands = true,
    max_term_width = 120
)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    gateway: GatewayArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gateway (what happens without a command).
    Serve(GatewayArgs),
    /// Bring the database to this version's form, as a start of the gateway does, and say what that took.
    Migrate(GatewayArgs),
    /// Print the settings in effect as a commented file; or get, set and watch the configuration of devices.
    Config(ConfigArgs),
    /// Register, show, change and delete devices.
    #[command(subcommand)]
    Device(device::DeviceCommand),
    /// Show what became of all that devices sent: stored, received again, rejected and why, lost by the device.
    Ledger(ledger::LedgerArgs),
    /// List, show, replay and delete rejected batches.
    #[command(subcommand)]
    DeadLetter(dead_letter::DeadLetterCommand),
    /// Make, list and revoke the tokens of devices.
    #[command(subcommand)]
    Credential(credential::CredentialCommand),
    /// Make, list and revoke the keys with which devices enrol.
    #[command(subcommand)]
    EnrolmentKey(credential::EnrolmentKeyCommand),
    /// Make a new device with an enrolment key (as the token), and print the device's token.
    Enrol(credential::EnrolArgs),
    /// Add, list, change and delete operators, and manage their tokens.
    #[command(subcommand)]
    Operator(operator::OperatorCommand),
    /// Show what operators changed, newest first.
    Audit(operator::AuditArgs),
    /// Show as whom the gateway knows the caller.
    Whoami(operator::ListArgs),
    /// Show readings as they are stored.
    Follow(follow::FollowArgs),
    /// Read stored readings.
    Query(query::QueryArgs),
    /// Write the stored readings of many devices to a file: CSV or Parquet.
    Export(export::ExportArgs),
    /// Copy the embedded database, also while the gateway runs.
    Backup(backup::BackupArgs),
    /// Copy the embedded database to PostgreSQL, while no gateway runs on either.
    Copy(copy::CopyArgs),
    /// Ask the gateway whether it serves: exit code 0 when it does. For container health checks.
    Health(health::HealthArgs),
}

/// Where the gateway's settings come from.
#[derive(Debug, Args)]
struct GatewayArgs {
    /// The settings file (TOML); `tidegate config` prints one.
    #[arg(long = "config", value_name = "FILE", env = "TIDEGATE_CONFIG_FILE")]
    file: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Settings (each also an environment variable: --grpc-listen is TIDEGATE_GRPC_LISTEN)")]
    settings: SettingFlags,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
struct ConfigArgs {
    #[command(subcommand)]
    command: Option<configure::ConfigCommand>,
    #[command(flatten)]
    gateway: GatewayArgs,
}

impl GatewayArgs {
    fn load(self) -> Result<Config, Failure> {
        let Self { file, settings: SettingFlags(flags) } = self;
        let environment =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))).collect();
        Config::load(&Sources { file, environment, flags }).map_err(|error| Failure::Usage(error.to_string()))
    }
}

/// Parses the process's arguments, does what they say, and tells how it went.
pub fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let command = cli.command.unwrap_or(Command::Serve(cli.gateway));
    let mut out = BufWriter::new(io::stdout().lock());
    let out: &mut dyn Write = &mut out;
    match command {
        Command::Serve(gateway) => return serve(gateway.load()?),
        Command::Migrate(gateway) => block_on(migrate(gateway.load()?, out))?,
        Command::Config(ConfigArgs { command: None, gateway }) => out.write_all(gateway.load()?.to_commented_toml().as_bytes())?,
        Command::Config(ConfigArgs { command: Some(command), .. }) => block_on(configure::run(command, out))?,
        Command::Device(command) => block_on(device::run(command, out))?,
        Command::Ledger(args) => block_on(ledger::run(args, out))?,
        Command::DeadLetter(command) => block_on(dead_letter::run(command, out))?,
        Command::Credential(command) => block_on(credential::run(command, out))?,
        Command::EnrolmentKey(command) => block_on(credential::run_keys(command, out))?,
        Command::Enrol(args) => block_on(credential::enrol(args, out))?,
        Command::Operator(command) => block_on(operator::run(command, out))?,
        Command::Audit(args) => block_on(operator::audit(args, out))?,
        Command::Whoami(args) => block_on(operator::whoami(args, out))?,
        Command::Follow(args) => block_on(follow::run(args, out))?,
        Command::Query(args) => block_on(query::run(args, out))?,
        Command::Export(args) => block_on(export::run(args, out))?,
        Command::Backup(args) => block_on(backup::run(args, out))?,
        Command::Copy(args) => block_on(copy::run(args, out))?,
        Command::Health(args) => block_on(health::run(args))?,
    }
    out.flush()?;
    Ok(())
}

/// After how many polls of tasks a busy thread looks for what came in. With the usual 61, whose polls may take a tenth of a millisecond
/// each when somebody sends what is expensive to refuse, everybody's next message would lie in its socket for that long.
const EVENT_INTERVAL: u32 = 8;

fn serve(config: Config) -> Result<(), Failure> {
    let failed = |error: anyhow::Error| Failure::Failed(format!("{error:#}"));
    crate::telemetry::logs::init(&config.log).map_err(|error| failed(error.into()))?;
    let runtime = runtime::Builder::new_multi_thread().enable_all().event_interval(EVENT_INTERVAL).build()?;
    let in_time = runtime.block_on(crate::app::serve(config)).map_err(failed)?;
    // All that is worth waiting for has been waited for; a thread that hangs in the file system is not to hold up the exit.
    runtime.shutdown_background();
    if in_time { Ok(()) } else { Err(Failure::Failed("the grace period (shutdown.grace) was too short to end well".to_owned())) }
}

async fn migrate(config: Config, out: &mut dyn Write) -> Result<(), Failure> {
    let migrated = Store::migrate(&config.storage).await;
    let migrated = migrated.map_err(|error| Failure::Failed(format!("{:#}", anyhow::Error::from(error))))?;
    for (version, name) in &migrated.applied {
        writeln!(out, "applied {version:04} {name}")?;
    }
    writeln!(out, "the database is at version {:04}", migrated.version)?;
    Ok(())
}

/// Runs a command that talks to a gateway: one thread is enough for it.
fn block_on(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}

/// Runs `command` until it ends or ctrl-C is pressed, which is how one ends a command that has no end.
async fn until_interrupted(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::select! {
        result = command => result,
        interrupt = tokio::signal::ctrl_c() => Ok(interrupt?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, error::ErrorKind};

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("tidegate").chain(args.iter().copied()))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn without_a_command_it_serves_with_the_flags() {
        let cli = parse(&["--grpc-listen", "127.0.0.1:0", "--insecure"]).expect("flags of serve");
        assert!(cli.command.is_none());
        assert_eq!(cli.gateway.settings.0, [("insecure", "true".to_owned()), ("grpc.listen", "127.0.0.1:0".to_owned())]);
        let Some(Command::Serve(gateway)) = parse(&["serve", "--config", "x.toml"]).expect("serve").command else { panic!("not serve") };
        assert_eq!(gateway.file, Some("x.toml".into()));
    }

    #[test]
    fn config_is_the_settings_file_and_its_subcommands_are_about_devices() {
        let Some(Command::Config(bare)) = parse(&["config", "--log-format", "json"]).expect("bare").command else { panic!("not config") };
        assert!(bare.command.is_none());
        assert_eq!(bare.gateway.load().expect("allowed").log.format, "json");
        let Some(Command::Config(of_device)) = parse(&["config", "get", "pump-1"]).expect("get").command else { panic!("not config") };
        assert!(of_device.command.is_some());
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for good in [
            &["config", "set", "pump-1", "{}"][..],
            &["config", "set", "pump-1", "--wait", "30s", "{}"],
            &["config", "set", "pump-1", "-", "--etag", "x", "--comment", "-"],
            &["config", "set", "--selector", "site=berlin", "{}", "--wait", "30s"],
            &["config", "watch"],
            &["config", "watch", "pump-1"],
        ] {
            parse(good).unwrap_or_else(|error| panic!("{good:?}: {error}"));
        }
        for bad in [
            &["config", "set"][..],
            &["config", "set", "--selector", "site=berlin", "{}", "--etag", "x"],
            &["config", "watch", "pump-1", "--selector", "site=berlin"],
        ] {
            let error = parse(bad).expect_err("contradicts itself");
            assert!(matches!(error.kind(), ErrorKind::ArgumentConflict | ErrorKind::MissingRequiredArgument), "{bad:?}: {error}");
        }
    }

    #[test]
    fn wrong_usage_is_told_before_anything_is_connected() {
        for bad in [
            &["query", "pump-1", "--start", "yesterday"][..],
            &["query", "pump-1", "--bucket", "often"],
            &["query", "pump-1", "--format", "xml"],
            &["device", "create", "pump-1", "--label", "berlin"],
            &["device", "create", "pump 1"],
            &["follow", "--endpoint", "ftp://gateway"],
            &["follow", "--selector", "=,"],
            &["health", "--timeout", "0s"],
        ] {
            assert_eq!(parse(bad).expect_err("wrong").exit_code(), 2, "{bad:?}");
        }
    }
}
