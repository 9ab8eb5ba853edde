//! What readings take at rest: merged, and no longer kept in the log for followers.

use super::{
    arguments::{Rest, Store},
    call,
    pool::Pool,
    process,
    query::{CONNECTIONS, ROWS_PER_SENSOR, SHAPE, fill},
    server::{DataDir, Server},
};
use anyhow::{Context, bail};
use serde::Serialize;
use sqlx::{Connection, PgConnection};
use std::{path::Path, sync::Arc, time::Duration};
use tokio::time::Instant;

/// The gateway merges at once what comes in, and keeps nothing of it for followers: as it is some time after the last reading.
const FLAGS: [&str; 2] = ["--history-merge-interval=1s", "--live-replay-window=0s"];
/// The gateway's metrics of what is not merged, and of what was deleted from the log.
const UNMERGED: &str = "tidegate_unmerged_entries";
const PRUNED: &str = "tidegate_pruned_entries_total";
/// How long the file is, which the gateway looks at four times a minute.
const STORED_BYTES: &str = "tidegate_storage_bytes";
const PRUNE_TIMEOUT: Duration = Duration::from_secs(600);
const ASKED_INTERVAL: Duration = Duration::from_secs(1);
/// After so many times without a further deletion, and without a file that becomes shorter, there is nothing left to delete.
const UNCHANGED_TIMES: u32 = 20;

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub machine: String,
    pub stores: Vec<Size>,
}

/// Of one store.
#[derive(Debug, Serialize)]
pub struct Size {
    pub store: Store,
    pub readings: u64,
    /// All files of SQLite; the whole database of PostgreSQL, with its catalog.
    pub bytes: u64,
}

impl Size {
    fn per_reading(&self) -> f64 {
        self.bytes as f64 / self.readings as f64
    }
}

impl Outcome {
    /// The table of the documentation.
    pub fn to_markdown(&self) -> String {
        let mut text = format!(
            "Measured on {}; {} rows of each sensor.\n\n| store | readings, millions | whole database, MiB | bytes a reading |\n|---|---|---|---|\n",
            self.machine, ROWS_PER_SENSOR
        );
        for size in &self.stores {
            let mib = size.bytes as f64 / f64::from(1 << 20);
            text += &format!("| {} | {:.1} | {mib:.1} | {:.2} |\n", size.store.name(), size.readings as f64 / 1e6, size.per_reading());
        }
        text
    }
}

pub async fn run(arguments: &Rest) -> anyhow::Result<Outcome> {
    let mut stores = Vec::new();
    for store in arguments.store.each() {
        stores.push(measure(store, arguments).await?);
    }
    Ok(Outcome { machine: process::machine(), stores })
}

async fn measure(store: Store, arguments: &Rest) -> anyhow::Result<Size> {
    let Rest { readings, common, .. } = arguments;
    let data = DataDir::new(common.data_dir.as_deref())?;
    let mut setup = common.gateway(store)?;
    setup.flags.extend(FLAGS.map(str::to_owned));
    let server = Server::start(&setup, data.path()).await?;
    let channels = call::connect(&server.endpoint()?, CONNECTIONS).await?;
    let readings = fill(&server, &channels, &Arc::new(Pool::new(SHAPE)), *readings, common.json).await?;
    pruned(&server).await?;
    if server.metric(PRUNED).await?.unwrap_or_default() == 0.0 {
        bail!("nothing of the log was deleted");
    }
    // Its files grow smaller only when it has ended.
    drop((channels, server));
    let bytes = match store {
        Store::Sqlite => sqlite_bytes(data.path())?,
        Store::Postgres => postgres_bytes(common.postgres_url.as_deref().context("the gateway had one")?).await?,
    };
    Ok(Size { store, readings, bytes })
}

/// Waits until nothing more of the log has gone for a while.
pub(super) async fn pruned(server: &Server) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut ticks = tokio::time::interval(ASKED_INTERVAL);
    let (mut before, mut unchanged) = (None, 0);
    while unchanged < UNCHANGED_TIMES {
        ticks.tick().await;
        let now = (server.metric(PRUNED).await?, server.metric(STORED_BYTES).await?);
        let settled = Some(now) == before && server.metric(UNMERGED).await? == Some(0.0);
        unchanged = if settled { unchanged + 1 } else { 0 };
        before = Some(now);
        if began.elapsed() > PRUNE_TIMEOUT {
            bail!("the log is not emptied within {PRUNE_TIMEOUT:?}");
        }
    }
    Ok(())
}

/// The database and its log, which the gateway's killing left as it was: both are read once more, as at a start.
fn sqlite_bytes(data: &Path) -> anyhow::Result<u64> {
    let file = data.join("tidegate.db");
    let connection = rusqlite::Connection::open(&file).with_context(|| format!("cannot open {}", file.display()))?;
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
    connection.close().map_err(|(_, error)| error)?;
    Ok(std::fs::metadata(&file)?.len())
}

/// After what autovacuum does by itself within minutes.
async fn postgres_bytes(url: &str) -> anyhow::Result<u64> {
    let mut connection = PgConnection::connect(url).await?;
    sqlx::query("VACUUM").execute(&mut connection).await?;
    let bytes: i64 = sqlx::query_scalar("SELECT pg_database_size(current_database())").fetch_one(&mut connection).await?;
    connection.close().await?;
    u64::try_from(bytes).context("a size is not negative")
}
