//! Benchmarks of the gateway, which runs as a process of its own beside what it is compared with.
//!
//! Both servers are up all the time and get the same load in turn, a short slice each; the one whose turn it is not is stopped
//! (SIGSTOP), so that work it has put off is paid for in its own slices. Only acknowledged readings count.

mod arguments;
mod backlog;
mod call;
mod idle;
mod latency;
mod link;
mod matrix;
mod pool;
mod process;
mod query;
mod report;
mod rest;
mod server;
mod slow_sync;
mod soak;
mod svg;
mod upload;

pub use arguments::Bench;

use crate::Verdict;
use anyhow::bail;
use arguments::{Common, Mode, Reference};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

pub async fn run(arguments: Bench) -> anyhow::Result<Verdict> {
    let mut terminate = signal(SignalKind::terminate())?;
    // Dropping the work ends the servers and removes their data.
    tokio::select! {
        result = measure(arguments) => result,
        _ = terminate.recv() => bail!("terminated"),
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            bail!("interrupted")
        }
    }
}

async fn measure(arguments: Bench) -> anyhow::Result<Verdict> {
    let Bench { mode, matrix, common } = arguments;
    match mode {
        None => {
            let report = matrix::run(&matrix, &common).await?;
            publish(&common, report.reference.section(), &report, &report.to_markdown())?;
            if let (Some(directory), Reference::NullSink) = (&common.write_docs, report.reference) {
                std::fs::write(directory.join("performance.svg"), svg::draw(&report.cells))?;
            }
        }
        Some(Mode::Latency(arguments)) => {
            let outcome = latency::run(&arguments).await?;
            publish(&arguments.common, "latency", &outcome, &outcome.to_markdown())?;
        }
        Some(Mode::Soak(arguments)) => {
            let outcome = soak::soak(&arguments).await?;
            publish(&arguments.common, "soak", &outcome, &outcome.to_markdown("as fast as it goes"))?;
        }
        Some(Mode::Paced(arguments)) => {
            let outcome = soak::paced(&arguments).await?;
            publish(&arguments.common, "paced", &outcome, &outcome.to_markdown("at a fixed rate"))?;
        }
        Some(Mode::Query(arguments)) => {
            let outcome = query::run(&arguments).await?;
            publish(&arguments.common, "query", &outcome, &outcome.to_markdown())?;
        }
        Some(Mode::Rest(arguments)) => {
            let outcome = rest::run(&arguments).await?;
            publish(&arguments.common, "rest", &outcome, &outcome.to_markdown())?;
        }
        Some(Mode::Backlog(arguments)) => {
            let outcome = backlog::run(&arguments).await?;
            publish(&arguments.common, "backlog", &outcome, &outcome.to_markdown())?;
        }
        Some(Mode::Idle(arguments)) => {
            let outcome = idle::run(&arguments).await?;
            publish(&arguments.common, arguments.section(), &outcome, &outcome.to_markdown())?;
        }
    }
    Ok(Verdict::Good)
}

/// Prints a result, and writes it into the documentation when asked to.
fn publish(common: &Common, section: &str, result: &impl Serialize, markdown: &str) -> anyhow::Result<()> {
    match common.json {
        true => println!("{}", serde_json::to_string(result)?),
        false => println!("\n{markdown}"),
    }
    match &common.write_docs {
        Some(directory) => report::write_section(directory, section, markdown),
        None => Ok(()),
    }
}
