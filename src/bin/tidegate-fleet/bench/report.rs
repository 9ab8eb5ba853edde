//! Results: as text, as JSON, and in the documentation.

use super::{arguments::Reference, matrix::Cell, process};
use anyhow::{Context, bail};
use serde::Serialize;
use std::{path::Path, time::Duration};

/// What was measured of one server.
#[derive(Debug, Clone, Serialize)]
pub struct Side {
    /// Acknowledged readings per second: the median of the slices.
    pub rate: f64,
    /// Processor seconds for a million readings.
    pub cpu_seconds_per_million: f64,
    /// Memory that is resident at the end.
    pub resident_bytes: u64,
    /// The most that ever was.
    pub resident_peak_bytes: u64,
}

/// What a run of the matrix measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What it ran on.
    pub machine: String,
    /// What the gateway was compared with.
    pub reference: Reference,
    /// By how much syncs were delayed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slow_sync_seconds: Option<f64>,
    /// One for each combination.
    pub cells: Vec<Cell>,
}

impl Report {
    pub fn new(cells: Vec<Cell>, reference: Reference, slow_sync: Option<Duration>) -> Self {
        Self { machine: process::machine(), reference, slow_sync_seconds: slow_sync.map(|delay| delay.as_secs_f64()), cells }
    }

    /// The table of the documentation.
    pub fn to_markdown(&self) -> String {
        let reference = self.reference.name();
        let mut text = format!(
            "Measured on {}.\n\n| store | batch | connections | gateway, M/s | {reference}, M/s | ratio | CPU s/M | {reference}, CPU s/M | client CPU | RSS peak, MiB | RSS at the end, MiB |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
            self.machine
        );
        for cell in &self.cells {
            let (ours, theirs) = (&cell.gateway, &cell.reference);
            text += &format!(
                "| {} | {} | {} | {:.2} | {:.2} | **{:.2}** | {:.3} | {:.3} | {:.0} % | {:.0} | {:.0} |\n",
                cell.store.name(),
                cell.batch,
                cell.connections,
                ours.rate / 1e6,
                theirs.rate / 1e6,
                cell.ratio,
                ours.cpu_seconds_per_million,
                theirs.cpu_seconds_per_million,
                cell.client_cpu_share * 100.0,
                mib(ours.resident_peak_bytes),
                mib(ours.resident_bytes),
            );
        }
        text
    }
}

impl Cell {
    /// A line on the terminal.
    pub fn show(&self) {
        println!(
            "{:10} batch {:4}, {:4} connections: {:6.2} of {:6.2} M/s, ratio {:.2}, CPU {:.3} and {:.3} s/M, client {:.0} %, RSS peak {:.0} MiB, end {:.0} MiB",
            self.store.name(),
            self.batch,
            self.connections,
            self.gateway.rate / 1e6,
            self.reference.rate / 1e6,
            self.ratio,
            self.gateway.cpu_seconds_per_million,
            self.reference.cpu_seconds_per_million,
            self.client_cpu_share * 100.0,
            mib(self.gateway.resident_peak_bytes),
            mib(self.gateway.resident_bytes),
        );
    }
}

/// In MiB.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// The median; 0 of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_unstable_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        len if len % 2 == 1 => values[len / 2],
        len => (values[len / 2 - 1] + values[len / 2]) / 2.0,
    }
}

/// Puts text between the two markers of a section of PERFORMANCE.md; the prose around it stays.
pub fn write_section(directory: &Path, section: &str, text: &str) -> anyhow::Result<()> {
    let path = directory.join("PERFORMANCE.md");
    let page = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let (begin, end) = (format!("<!-- bench:{section} -->\n"), format!("<!-- /bench:{section} -->"));
    let Some((before, rest)) = page.split_once(&begin) else { bail!("{} has no marker {begin}", path.display()) };
    let Some((_, after)) = rest.split_once(&end) else { bail!("{} has no marker {end}", path.display()) };
    std::fs::write(&path, format!("{before}{begin}\n{}\n\n{end}{after}", text.trim()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median([]), 0.0);
    }

    #[test]
    fn a_section_is_replaced_and_what_is_around_it_stays() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("PERFORMANCE.md");
        std::fs::write(&path, "before\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nafter\n").expect("written");
        write_section(directory.path(), "x", "new").expect("markers are there");
        write_section(directory.path(), "x", "newer").expect("markers are still there");
        let page = std::fs::read_to_string(&path).expect("readable");
        assert_eq!(page, "before\n<!-- bench:x -->\n\nnewer\n\n<!-- /bench:x -->\nafter\n");
        assert!(write_section(directory.path(), "y", "").is_err());
    }
}
