//! `tidegate-fleet`: a fleet of simulated devices, and the replay of recorded ones, that check what the gateway made of it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program's output")]

mod batches;
mod bench;
mod cli;
mod follow;
mod gateway;
mod identity;
mod recording;
mod reference;
mod replay;
mod report;
mod send;
mod sensors;
mod simulate;
mod verify;

use clap::Parser;
use std::process::ExitCode;

/// What the user asked for cannot be done as asked: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// How a run ended; for the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// All was acknowledged, nothing rejected, and what was verified is right.
    Good,
    /// Something of that is not so.
    Bad,
}

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("tidegate-fleet: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match cli.command {
            cli::Command::Simulate(arguments) => simulate::run(arguments).await,
            cli::Command::Replay(arguments) => replay::run(arguments).await,
            cli::Command::Bench(arguments) => bench::run(*arguments).await,
            cli::Command::NullSink(arguments) => reference::run_null_sink(arguments).await,
            cli::Command::Bare(arguments) => reference::run_bare(arguments).await,
        }
    });
    match result {
        Ok(Verdict::Good) => ExitCode::SUCCESS,
        Ok(Verdict::Bad) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("tidegate-fleet: {error:#}");
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}
