//! How far a long command has come, on standard error.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal};

/// Whether progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown(bool);

impl Shown {
    /// Shown where there is a terminal to show it on, unless it shall be quiet.
    pub fn unless(quiet: bool) -> Self {
        Self(!quiet && io::stderr().is_terminal())
    }

    /// A bar of `total` bytes.
    pub fn bytes(self, total: u64) -> ProgressBar {
        self.bar(total, "{wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}")
    }

    /// A bar of readings, whose number is not yet known.
    pub fn readings(self) -> ProgressBar {
        self.bar(0, "{wide_bar} {human_pos}/{human_len}  {msg}")
    }

    /// A count of rows, with what they are of.
    pub fn rows(self) -> ProgressBar {
        self.bar(0, "{spinner} {msg} {human_pos}")
    }

    fn bar(self, total: u64, template: &str) -> ProgressBar {
        match self.0 {
            true => ProgressBar::new(total).with_style(ProgressStyle::with_template(template).expect("a good template")),
            false => ProgressBar::hidden(),
        }
    }
}
