//! `tidegate export`: the readings of many devices, as CSV or Parquet; goes on after an interruption.

mod part;
mod rows;

use super::{
    Failure,
    client::{ClientArgs, MESSAGE_BYTES_MAX},
    parse,
    progress::Shown,
    retry::reconnecting,
};
use crate::{
    model::Timestamp,
    pb::{self, export_readings_response::Message, reading_service_client::ReadingServiceClient},
};
use clap::Args;
use indicatif::ProgressBar;
pub use part::refuse_existing;
use part::{PartFile, Stream};
pub use rows::Rows;
use rows::{Format, Layout};
use std::{io::Write, ops::ControlFlow, path::PathBuf};

#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    what: What,
    /// CSV in long form (time, device, sensor, unit, value), or Parquet. By default what FILE's ending says, else csv.
    #[arg(long, value_enum, conflicts_with = "resume")]
    format: Option<Format>,
    /// Also a column device_time: the time by the device's clock, which is another where the gateway corrected it.
    #[arg(long, conflicts_with = "resume")]
    device_time: bool,
    /// The file to make; one that is there is never overwritten. Until it is whole it is called FILE.part. Without: standard output.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Go on with an export to FILE that was interrupted.
    #[arg(long, requires = "output")]
    resume: bool,
    /// No progress on standard error.
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
struct What {
    /// Only this device; may be given several times.
    #[arg(long = "device", value_name = "ID", value_parser = parse::device, conflicts_with = "resume")]
    devices: Vec<String>,
    /// Only devices whose labels match, such as 'site=berlin,!retired'.
    #[arg(long, value_name = "SELECTOR", default_value = "", hide_default_value = true, value_parser = parse::selector, conflicts_with = "resume")]
    selector: String,
    /// Only sensors of this name; may be given several times.
    #[arg(long = "sensor", value_name = "NAME", conflicts_with = "resume")]
    sensors: Vec<String>,
    /// The first time to export: RFC 3339, or before now such as -1h.
    #[arg(long, value_name = "TIME", value_parser = parse::time, allow_hyphen_values = true, conflicts_with = "resume")]
    start: Option<Timestamp>,
    /// The time before which to stop, as --start.
    #[arg(long, value_name = "TIME", value_parser = parse::time, allow_hyphen_values = true, conflicts_with = "resume")]
    end: Option<Timestamp>,
}

/// Where an export goes.
pub trait Sink {
    /// The request that goes on behind all that was taken.
    fn request(&self) -> pb::ExportReadingsRequest;
    /// Takes readings, and the token behind them.
    fn take(&mut self, rows: &Rows, token: String) -> Result<(), Failure>;
    /// Makes all that was taken durable, where that means anything: it will be gone on from there.
    fn checkpoint(&mut self) -> Result<(), Failure>;
    /// All was taken, so many readings: checks that, and makes it whole.
    fn finish(&mut self, summary: pb::ExportSummary) -> Result<(), Failure>;
    /// What to do about an export that was interrupted.
    fn hint(&self) -> String;
}

pub async fn run(args: ExportArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let ExportArgs { what, format, device_time, output, resume, quiet, client } = args;
    let What { devices, selector, sensors, start, end } = what;
    let request = pb::ExportReadingsRequest {
        devices,
        label_selector: selector,
        sensors,
        start_time: start.map(Timestamp::to_proto),
        end_time: end.map(Timestamp::to_proto),
        resume_token: String::new(),
    };
    let mut sink: Box<dyn Sink + '_> = match (output, format) {
        (Some(file), _) if resume => Box::new(PartFile::resume(file)?),
        (Some(file), format) => {
            let format = format.unwrap_or_else(|| Format::of(&file));
            Box::new(PartFile::create(file, Layout { format, device_time }, request)?)
        }
        (None, Some(Format::Parquet)) => return Err(Failure::Usage("Parquet goes to a file: say which with --output".to_owned())),
        (None, _) => Box::new(Stream::new(out, Layout { format: Format::Csv, device_time }, request)?),
    };
    let bar = Shown::unless(quiet).readings();
    let exporting = reconnecting(async |answered| export_once(&client, sink.as_mut(), &bar, answered).await);
    let exported = tokio::select! {
        exported = exporting => exported,
        interrupt = tokio::signal::ctrl_c() => interrupt.map_err(Failure::from).and(Err(Failure::Failed("interrupted".to_owned()))),
    };
    bar.finish_and_clear();
    match exported {
        // Nobody is there to read more of it, or the disk is full.
        Err(failure @ Failure::Io(_)) => Err(failure),
        Err(failure) => {
            sink.checkpoint()?;
            Err(Failure::Failed(format!("{}\n  {}", failure.text(), sink.hint())))
        }
        Ok(()) => Ok(()),
    }
}

/// Exports on one call, from where the sink stands.
async fn export_once(client: &ClientArgs, sink: &mut dyn Sink, bar: &ProgressBar, answered: &mut bool) -> Result<ControlFlow<()>, Failure> {
    let mut service = ReadingServiceClient::new(client.connect().await?).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut stream = client.answer(service.export_readings(sink.request())).await?;
    while let Some(response) = client.next(&mut stream).await? {
        *answered = true;
        match response.message {
            Some(Message::Readings(readings)) => {
                let rows = Rows::from_wire(readings)?;
                sink.take(&rows, response.resume_token)?;
                bar.inc(rows.len() as u64);
            }
            Some(Message::Progress(progress)) => show(bar, &progress),
            Some(Message::Summary(summary)) => {
                sink.finish(summary)?;
                return Ok(ControlFlow::Break(()));
            }
            None => {}
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn show(bar: &ProgressBar, progress: &pb::ExportProgress) {
    bar.set_length(progress.readings_estimated);
    bar.set_position(progress.readings);
    let end = progress.estimated_end_time.as_ref().and_then(|end| Timestamp::from_proto(end).ok());
    let left = end.map_or(0, |end| end.micros().saturating_sub(Timestamp::now().micros()).max(0) / 1_000_000);
    let pb::ExportProgress { devices, devices_total, readings_per_second, .. } = progress;
    bar.set_message(format!("{devices}/{devices_total} devices, {readings_per_second:.0} readings/s, {left} s left"));
}
