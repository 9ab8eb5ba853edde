//! What the operating system says of a process (proc(5)).

use anyhow::{Context, bail};
use std::{process::Command, time::Duration};

/// The kernel counts processor time for user space in hundredths of a second, whatever its own clock does.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a process has used.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// Processor time, in user and system mode.
    pub cpu: Duration,
    /// Memory that is resident.
    pub resident_bytes: u64,
    /// The most that ever was.
    pub resident_peak_bytes: u64,
}

/// What a process has used so far.
pub fn usage(pid: u32) -> anyhow::Result<Usage> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("the process has ended")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("the process has ended")?;
    Ok(Usage {
        cpu: cpu_of(&stat).context("/proc/PID/stat is not as expected")?,
        resident_bytes: kib_of(&status, "VmRSS:").unwrap_or(0) << 10,
        resident_peak_bytes: kib_of(&status, "VmHWM:").unwrap_or(0) << 10,
    })
}

/// What this process has used so far.
pub fn own_usage() -> anyhow::Result<Usage> {
    usage(std::process::id())
}

fn cpu_of(stat: &str) -> Option<Duration> {
    // Behind the program's name, which may have anything in it; then utime and stime are the 12th and 13th.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks = fields.next()?.parse::<f64>().ok()? + fields.next()?.parse::<f64>().ok()?;
    Some(Duration::from_secs_f64(ticks / TICKS_PER_SECOND))
}

fn kib_of(status: &str, key: &str) -> Option<u64> {
    status.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

/// Sends a signal by its name.
pub fn signal(pid: u32, name: &str) -> anyhow::Result<()> {
    // The shell's own kill: the program is missing on slim systems.
    let sent = Command::new("sh").args(["-c", &format!("kill -s {name} {pid}")]).status()?;
    if !sent.success() {
        bail!("cannot send {name} to process {pid}");
    }
    Ok(())
}

/// The machine in a line: processor, how many, memory, kernel.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model =
        cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("a processor", |(_, model)| model);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let memory_gib = kib_of(&read("/proc/meminfo"), "MemTotal:").unwrap_or(0) as f64 / f64::from(1 << 20);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{model}, {processors} cores, {memory_gib:.0} GiB, Linux {}", kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_spaces_does_not_shift_the_fields() {
        let stat = "7 (a) b) (c) S 1 7 7 0 -1 4194304 10 0 0 0 150 50 0 0 20 0 3 0 100 1 1";
        assert_eq!(cpu_of(stat), Some(Duration::from_secs(2)));
    }

    #[test]
    fn this_process_is_found() {
        let usage = own_usage().expect("we run");
        assert!(usage.resident_bytes > 0 && usage.resident_peak_bytes >= usage.resident_bytes);
    }
}
