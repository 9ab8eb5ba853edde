//! Where an export goes: to standard output, or to a file that can be gone on with.
//!
//! What is exported is appended to `FILE.part`. From time to time that is synced, and then `FILE.part.state` says how long it is
//! and with which token the export goes on behind that: whatever stands behind this length is cut off when it does.

use super::{
    Failure, Sink,
    rows::{CHECKPOINT_READINGS, Encoder, Layout, Rows},
};
use crate::{model::Timestamp, pb};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{self, Seek, Write},
    path::{Path, PathBuf},
};

/// Standard output: it is whole when it ends well.
pub struct Stream<'a> {
    out: &'a mut dyn Write,
    encoder: Encoder,
    request: pb::ExportReadingsRequest,
    readings: u64,
}

impl<'a> Stream<'a> {
    /// CSV, with the line of names.
    pub fn new(out: &'a mut dyn Write, layout: Layout, request: pb::ExportReadingsRequest) -> Result<Self, Failure> {
        let encoder = Encoder::new(layout);
        out.write_all(encoder.head())?;
        Ok(Self { out, encoder, request, readings: 0 })
    }
}

impl Sink for Stream<'_> {
    fn request(&self) -> pb::ExportReadingsRequest {
        self.request.clone()
    }

    fn take(&mut self, rows: &Rows, token: String) -> Result<(), Failure> {
        self.out.write_all(&self.encoder.take(rows)?)?;
        self.readings += rows.len() as u64;
        self.request.resume_token = token;
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<(), Failure> {
        Ok(self.out.flush()?)
    }

    fn finish(&mut self, summary: pb::ExportSummary) -> Result<(), Failure> {
        check_whole(self.readings, summary.readings)
    }

    fn hint(&self) -> String {
        "What was printed is not all: with --output FILE an export can be gone on with.".to_owned()
    }
}

fn check_whole(found: u64, told: u64) -> Result<(), Failure> {
    match found == told {
        true => Ok(()),
        false => Err(Failure::Failed(format!("the gateway exported {told} readings, but {found} came: the export is of no use"))),
    }
}

/// See the [module](self).
pub struct PartFile {
    whole: PathBuf,
    part: File,
    encoder: Encoder,
    // As of the last checkpoint; the token and the readings are further.
    state: State,
    readings_at_checkpoint: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    #[serde(flatten)]
    layout: Layout,
    bytes: u64,
    readings: u64,
    token: String,
    devices: Vec<String>,
    label_selector: String,
    sensors: Vec<String>,
    start_time_us: Option<i64>,
    end_time_us: Option<i64>,
}

impl PartFile {
    /// A new export to the file `whole`.
    pub fn create(whole: PathBuf, layout: Layout, request: pb::ExportReadingsRequest) -> Result<Self, Failure> {
        let micros = |time: Option<&prost_types::Timestamp>| time.and_then(|time| Timestamp::from_proto(time).ok()).map(Timestamp::micros);
        let state = State {
            layout,
            bytes: 0,
            readings: 0,
            token: String::new(),
            start_time_us: micros(request.start_time.as_ref()),
            end_time_us: micros(request.end_time.as_ref()),
            devices: request.devices,
            label_selector: request.label_selector,
            sensors: request.sensors,
        };
        refuse_existing(&whole)?;
        let path = beside(&whole, ".part");
        let part = File::create_new(&path).map_err(|why| match why.kind() {
            io::ErrorKind::AlreadyExists => Failure::Failed(format!(
                "{} is there already: an export was interrupted\n  --resume goes on with it; to begin anew, delete it.",
                path.display()
            )),
            _ => why.into(),
        })?;
        let mut file = Self { whole, part, encoder: Encoder::new(layout), state, readings_at_checkpoint: 0 };
        file.part.write_all(file.encoder.head())?;
        file.checkpoint()?;
        Ok(file)
    }

    /// Goes on with an export to the file `whole`.
    pub fn resume(whole: PathBuf) -> Result<Self, Failure> {
        refuse_existing(&whole)?;
        let path = beside(&whole, ".part.state");
        let saved = fs::read(&path).map_err(|why| Failure::Failed(format!("there is nothing to resume: {}: {why}", path.display())))?;
        let damaged = |why: String| Failure::Failed(format!("{} is damaged: {why}", path.display()));
        let (json, of_encoder) = saved.split_at(saved.iter().position(|&byte| byte == b'\n').map_or(saved.len(), |end| end + 1));
        let state: State = serde_json::from_slice(json).map_err(|why| damaged(why.to_string()))?;
        let encoder = Encoder::restore(state.layout, of_encoder)?;
        let mut part = File::options().read(true).write(true).open(beside(&whole, ".part"))?;
        if part.metadata()?.len() < state.bytes {
            return Err(damaged("FILE.part is shorter than it says".to_owned()));
        }
        part.set_len(state.bytes)?;
        part.seek(io::SeekFrom::End(0))?;
        Ok(Self { whole, part, encoder, readings_at_checkpoint: state.readings, state })
    }

    fn save_state(&self) -> Result<(), Failure> {
        let mut saved = serde_json::to_vec(&self.state).map_err(io::Error::from)?;
        saved.push(b'\n');
        saved.extend(self.encoder.save()?);
        let (new, path) = (beside(&self.whole, ".part.state.new"), beside(&self.whole, ".part.state"));
        let mut file = File::create(&new)?;
        file.write_all(&saved)?;
        file.sync_all()?;
        Ok(fs::rename(new, path)?)
    }
}

impl Sink for PartFile {
    fn request(&self) -> pb::ExportReadingsRequest {
        let time = |micros: Option<i64>| micros.and_then(Timestamp::from_micros).map(Timestamp::to_proto);
        pb::ExportReadingsRequest {
            devices: self.state.devices.clone(),
            label_selector: self.state.label_selector.clone(),
            sensors: self.state.sensors.clone(),
            start_time: time(self.state.start_time_us),
            end_time: time(self.state.end_time_us),
            resume_token: self.state.token.clone(),
        }
    }

    fn take(&mut self, rows: &Rows, token: String) -> Result<(), Failure> {
        self.part.write_all(&self.encoder.take(rows)?)?;
        self.state.readings += rows.len() as u64;
        self.state.token = token;
        match self.state.readings - self.readings_at_checkpoint >= CHECKPOINT_READINGS {
            true => self.checkpoint(),
            false => Ok(()),
        }
    }

    fn checkpoint(&mut self) -> Result<(), Failure> {
        let at = self.part.stream_position()?;
        self.part.write_all(&self.encoder.flush(at)?)?;
        self.part.sync_all()?;
        self.state.bytes = self.part.stream_position()?;
        self.save_state()?;
        self.readings_at_checkpoint = self.state.readings;
        Ok(())
    }

    fn finish(&mut self, summary: pb::ExportSummary) -> Result<(), Failure> {
        self.checkpoint()?;
        check_whole(self.state.readings, summary.readings)?;
        self.part.write_all(&self.encoder.tail()?)?;
        self.part.sync_all()?;
        refuse_existing(&self.whole)?;
        fs::rename(beside(&self.whole, ".part"), &self.whole)?;
        fs::remove_file(beside(&self.whole, ".part.state"))?;
        eprintln!("{}: {} readings of {} devices", self.whole.display(), summary.readings, summary.devices);
        Ok(())
    }

    fn hint(&self) -> String {
        format!("{} readings are kept: --resume --output {} goes on behind them.", self.state.readings, self.whole.display())
    }
}

/// The file's name with something behind it.
fn beside(file: &Path, ending: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Nothing is ever overwritten.
pub fn refuse_existing(file: &Path) -> Result<(), Failure> {
    match file.symlink_metadata() {
        Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(why) => Err(why.into()),
        Ok(_) => Err(Failure::Failed(format!("{} is there already: nothing is overwritten", file.display()))),
    }
}
