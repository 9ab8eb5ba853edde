//! Metrics of the process, read from `/proc/self` at each scrape; where there is none they are left out.
//!
//! They are written here and not through the recorder, whose counters are whole numbers: processor time is not.

use super::names::{self, Metric};
use std::{fmt::Write, fs};

/// The unit of times in `/proc`, which the kernel fixes for all programs whatever its own clock is (`USER_HZ`, time(7)).
const TICKS_PER_SECOND: f64 = 100.0;

/// Appends them to an exposition.
pub fn render(text: &mut String) {
    let stat = fs::read_to_string("/proc/self/stat").ok().and_then(|text| Stat::parse(&text));
    let boot_time = fs::read_to_string("/proc/stat").ok().and_then(|text| number_after(&text, "btime "));
    let memory = fs::read_to_string("/proc/self/status").ok().and_then(|text| number_after(&text, "VmRSS:"));
    // Less the descriptor that the listing itself takes.
    let open = fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count().saturating_sub(1) as f64);
    write(text, names::PROCESS_START_TIME, boot_time.zip(stat).map(|(boot, stat)| boot + stat.started_seconds));
    write(text, names::PROCESS_CPU, stat.map(|stat| stat.cpu_seconds));
    write(text, names::PROCESS_RESIDENT_MEMORY, memory.map(|kibibytes| kibibytes * 1024.0));
    write(text, names::PROCESS_OPEN_FDS, open);
}

fn write(text: &mut String, name: &str, value: Option<f64>) {
    let metric = Metric::named(name).expect("METRICS has a row for each name");
    if let Some(value) = value {
        let kind = metric.kind.as_str();
        writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}\n{name} {value}\n", metric.help).expect("a String takes all text");
    }
}

fn number_after(text: &str, label: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(label))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What is read from `/proc/self/stat` (proc_pid_stat(5)).
#[derive(Debug, Clone, Copy, PartialEq)]
struct Stat {
    cpu_seconds: f64,
    /// After the machine's boot.
    started_seconds: f64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The second field is the program's name in parentheses and may hold anything, also spaces and parentheses.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // `fields` begins with the third field.
        let seconds = |number: usize| Some(fields.get(number - 3)?.parse::<f64>().ok()? / TICKS_PER_SECOND);
        Some(Self { cpu_seconds: seconds(14)? + seconds(15)?, started_seconds: seconds(22)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_with_a_parenthesis_does_not_shift_the_fields() {
        let text = "8745 (a) b) R 1 1 1 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 1 0 227202 3133440 390";
        assert_eq!(Stat::parse(text), Some(Stat { cpu_seconds: 3.0, started_seconds: 2272.02 }));
        assert_eq!(Stat::parse("8745 (cat) R 1"), None);
    }
}
