//! Disks that fail on command: `tests/shim/disk.c`, between a gateway in a process of its own and its files; and a small one.

use super::{process::GatewayProcess, script::skipped};
use rand::{Rng, RngCore, rngs::SmallRng};
use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use tempfile::TempDir;

/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// A disk with the shim before it.
pub struct FaultyDisk {
    directory: TempDir,
}

/// A small disk of its own, in memory; unmounted when it is dropped.
pub struct SmallDisk {
    directory: TempDir,
}

impl SmallDisk {
    /// `None` where that is not allowed, which in CI is a failure.
    pub fn mount(mebibytes: u32) -> Option<Self> {
        let directory = TempDir::new().expect("a temporary directory");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tidegate-test"]).arg(directory.path());
        if !mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
            let why = "only root may mount the small disk that this test fills";
            assert!(std::env::var_os("CI").is_none(), "{why}");
            skipped(why);
            return None;
        }
        Some(Self { directory })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Leaves no byte of room.
    pub fn fill(&self) {
        let mut filler = File::create(self.filler()).expect("made");
        let full = std::iter::repeat_with(|| filler.write_all(&[0; 4096])).find_map(Result::err).expect("no disk is endless");
        assert_eq!(full.kind(), ErrorKind::StorageFull);
    }

    /// Gives the room back.
    pub fn clear(&self) {
        fs::remove_file(self.filler()).expect("removed");
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a gateway may only just be ending.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// What one write replaced.
struct Undo {
    offset: u64,
    size_before: u64,
    bytes: Vec<u8>,
}

impl FaultyDisk {
    pub fn new() -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/shim/disk.c");
        let mut compile = Command::new("cc");
        compile.args(["-O1", "-shared", "-fPIC", "-o"]).arg(directory.path().join("disk.so")).arg(source);
        // A C compiler is there: the embedded database was compiled with one.
        assert!(compile.status().expect("cc runs").success(), "the shim compiles");
        fs::create_dir(directory.path().join("data")).expect("made");
        Self { directory }
    }

    /// Where the gateway keeps its data.
    pub fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Starts a gateway on this disk; returns when it is ready.
    pub async fn start(&self, flags: &[&str]) -> GatewayProcess {
        let any = ([127, 0, 0, 1], 0).into();
        let mut command = GatewayProcess::command(&self.data_dir(), any, any);
        command.args(flags).env("LD_PRELOAD", self.directory.path().join("disk.so")).env("FAULTY_DISK", self.directory.path());
        GatewayProcess::run(command).await
    }

    /// From now on a call fails, as in `fsync EIO`.
    pub fn fail(&self, fault: &str) {
        let new = self.directory.path().join("fault.new");
        fs::write(&new, fault).expect("written");
        fs::rename(new, self.directory.path().join("fault")).expect("renamed");
    }

    /// All is well again.
    pub fn heal(&self) {
        fs::remove_file(self.directory.path().join("fault")).expect("there was a fault");
    }

    /// Makes of the files what a power cut may leave, after the gateway was killed: what was written since the last sync is
    /// on the disk, or not, or is garbage, each sector by itself.
    pub fn cut_power(&self, random: &mut SmallRng) {
        for name in ["tidegate.db", "tidegate.db-wal"] {
            let undo_file = self.directory.path().join(format!("{name}.undo"));
            let Ok(undo) = fs::read(&undo_file) else { continue };
            let file = File::options().write(true).open(self.data_dir().join(name)).expect("opened");
            for undo in parse(&undo).into_iter().rev() {
                undo.apply(&file, random);
            }
            fs::remove_file(undo_file).expect("removed");
        }
        // Shared memory; it is not there after a start of the machine.
        let _ = fs::remove_file(self.data_dir().join("tidegate.db-shm"));
    }
}

impl Undo {
    fn apply(&self, file: &File, random: &mut SmallRng) {
        let size = file.metadata().expect("read").len();
        let sectors = self.bytes.chunks(SECTOR_BYTES).enumerate();
        for (offset, old) in sectors.map(|(sector, old)| (self.offset + (sector * SECTOR_BYTES) as u64, old)) {
            let mut garbage = [0; SECTOR_BYTES];
            random.fill_bytes(&mut garbage);
            match random.random_range(0..5) {
                0 | 1 => file.write_all_at(old, offset).expect("written"),
                2 => file.write_all_at(&garbage[..old.len()], offset).expect("written"),
                _ => {}
            }
        }
        match random.random_range(0..4) {
            // What was appended may be there with any bytes in it.
            0 if size > self.size_before => {
                let mut garbage = vec![0; usize::try_from(size - self.size_before).expect("it was written")];
                random.fill_bytes(&mut garbage);
                file.write_all_at(&garbage, self.size_before).expect("written");
            }
            1 if size > self.size_before => file.set_len(random.random_range(self.size_before..size)).expect("cut"),
            2 => file.set_len(self.size_before).expect("cut"),
            _ => {}
        }
    }
}

/// The records of an undo file, in the order of the writes.
fn parse(mut undo: &[u8]) -> Vec<Undo> {
    let mut records = Vec::new();
    while let Some((header, rest)) = undo.split_at_checked(24) {
        let number = |at: usize| u64::from_ne_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        let (bytes, rest) = rest.split_at(usize::try_from(number(8)).expect("it was written"));
        records.push(Undo { offset: number(0), size_before: number(16), bytes: bytes.to_vec() });
        undo = rest;
    }
    records
}
