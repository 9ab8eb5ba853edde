//! `tidegate copy`: the embedded database to PostgreSQL, for one gateway that becomes several.

use super::{Failure, progress::Shown};
use crate::{
    config::{Config, DatabaseUrl, Storage},
    store::{backup, copy},
};
use clap::Args;
use std::{io::Write, path::PathBuf, time::Instant};

#[derive(Debug, Args)]
pub struct CopyArgs {
    /// The data directory of a gateway that is stopped: sqlite:./tidegate-data.
    #[arg(long, value_name = "sqlite:DIRECTORY", value_parser = directory)]
    from: PathBuf,
    /// An empty PostgreSQL database: postgres://USER@HOST/DATABASE; the password may come from PGPASSWORD or a passfile. When a
    /// copy was cut off, the same command goes on with it.
    #[arg(long, value_name = "URL", value_parser = database)]
    to: String,
    /// No progress on standard error.
    #[arg(long)]
    quiet: bool,
}

fn directory(text: &str) -> Result<PathBuf, String> {
    let directory = text.strip_prefix("sqlite:").filter(|directory| !directory.is_empty());
    directory.map(PathBuf::from).ok_or_else(|| "write it like sqlite:./tidegate-data".to_owned())
}

fn database(text: &str) -> Result<String, String> {
    let good = !text.is_empty() && DatabaseUrl::is_allowed(text);
    good.then(|| text.to_owned()).ok_or_else(|| "write it like postgres://tidegate@127.0.0.1/tidegate".to_owned())
}

pub async fn run(args: CopyArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let CopyArgs { from, to, quiet } = args;
    if !backup::database_file(&from).exists() {
        return Err(Failure::Failed(format!("there is no database in {}", from.display())));
    }
    let defaults = Config::default().storage;
    let source = Storage { data_dir: from, ..defaults.clone() };
    let target = Storage { url: DatabaseUrl::new(to), ..defaults };
    let begin = Instant::now();
    let bar = Shown::unless(quiet).rows();
    let copied = tokio::select! {
        copied = copy::copy(&source, &target, |table, rows| {
            bar.set_message(table.to_owned());
            bar.set_position(rows);
        }) => copied.map_err(|error| Failure::Failed(format!("{:#}", anyhow::Error::from(error))))?,
        interrupt = tokio::signal::ctrl_c() => {
            interrupt?;
            return Err(Failure::Failed("interrupted: the same command goes on with it".to_owned()));
        }
    };
    bar.finish_and_clear();
    let seconds = begin.elapsed().as_secs_f64();
    writeln!(out, "{} rows in {} tables, compared, in {seconds:.1} s", copied.rows, copied.tables)?;
    if copied.rows_before > 0 {
        writeln!(out, "{} of them were there, from a copy that was cut off", copied.rows_before)?;
    }
    Ok(writeln!(out, "{} holds all of it: start the gateways with it as storage.url", target.url)?)
}
