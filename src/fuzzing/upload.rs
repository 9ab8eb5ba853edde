//! Uploads: a gateway's writer on a database, and what it is asked to do.

use super::Input;
use crate::{
    config::{Config, Storage},
    ingest::rules::{Content, Running, STREAMS, Sent, Step, check},
    model::DeviceId,
};
use std::sync::{Mutex, PoisonError};
use tokio::runtime::{Builder, Runtime};

/// How many batches one input sends at the most.
const SENT_MAX: usize = 48;
/// How many inputs use one database: what a restart takes grows with it.
const DEVICES_MAX: u64 = 256;
/// What stands for a gateway that starts again, once in an input: it takes as long as a hundred batches.
const RESTART: u8 = 0xff;

/// One writer for all inputs, each of which is a device of its own: a database for each would take far longer than the input.
struct Bench {
    runtime: Runtime,
    storage: Storage,
    running: Running,
    devices: u64,
}

impl Bench {
    fn new() -> Self {
        let data_dir = std::env::temp_dir().join(format!("tidegate-fuzz-{}", std::process::id()));
        // Of one of the same number before.
        let _ = std::fs::remove_dir_all(&data_dir);
        std::fs::create_dir_all(&data_dir).expect("the directory for temporary files is there");
        let storage = Storage { data_dir, may_lose_commits_on_power_loss: true, ..Config::default().storage };
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let running = runtime.block_on(Running::open(&storage));
        Self { runtime, storage, running, devices: 0 }
    }

    /// Ends it, and removes what it has left on the disk.
    fn end(self) {
        let Self { runtime, storage, running, .. } = self;
        runtime.block_on(running.close());
        std::fs::remove_dir_all(storage.data_dir).expect("it is ours");
    }
}

static BENCH: Mutex<Option<Bench>> = Mutex::new(None);

/// Guarantee: whatever is sent, in whatever order, over whatever restarts, each batch has the outcome that the rules of sequences give it, the
/// log has what was acknowledged as stored once and in order, and the ledger adds up.
pub fn upload(data: &[u8]) {
    let mut bench = BENCH.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(used_up) = bench.take_if(|bench| bench.devices >= DEVICES_MAX) {
        used_up.end();
    }
    let Bench { runtime, storage, running, devices } = bench.take().unwrap_or_else(Bench::new);
    let device = DeviceId::parse(&format!("pump-{devices}")).expect("good");
    let running = runtime.block_on(check(steps(data), &storage, running, &device));
    *bench = Some(Bench { runtime, storage, running, devices: devices + 1 });
}

/// Removes what the inputs have left on the disk.
#[cfg(test)]
pub(super) fn clean_up() {
    if let Some(bench) = BENCH.lock().unwrap_or_else(PoisonError::into_inner).take() {
        bench.end();
    }
}

/// Three bytes are a batch: its stream, its content and whether all before it is waited for; how far ahead it is; what is lost before it.
fn steps(data: &[u8]) -> Vec<Step> {
    let (mut input, mut steps, mut sends, mut restarted) = (Input(data), Vec::new(), Vec::new(), false);
    for _ in 0..SENT_MAX {
        if input.0.is_empty() {
            break;
        }
        let what = input.byte();
        if what & 0x80 != 0 && !sends.is_empty() {
            steps.push(Step::Send(std::mem::take(&mut sends)));
        }
        if what == RESTART && !std::mem::replace(&mut restarted, true) {
            steps.push(Step::Restart);
            continue;
        }
        let content = match what >> 2 & 7 {
            0 => Content::Malformed,
            1 => Content::WrongKind,
            _ => Content::Good,
        };
        let ahead = match input.byte() {
            near @ 0..0x80 => i64::from(near % 8) - 3,
            far => i64::from(far as i8),
        };
        sends.push(Sent { stream: usize::from(what & 3) % STREAMS, ahead, lost: u64::from(input.byte() % 8), content });
    }
    steps.push(Step::Send(sends));
    steps
}
