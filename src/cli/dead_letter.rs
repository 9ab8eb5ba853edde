//! `tidegate dead-letter`: the batches that were rejected.

use super::{
    Failure,
    client::ClientArgs,
    parse,
    print::{Table, proto_time, shown},
};
use crate::{
    client::Channel,
    error::{Reason, StatusFacts},
    model::batch::reason_name,
    pb::{self, dead_letter_service_client::DeadLetterServiceClient},
};
use clap::{Args, Subcommand};
use serde_json::json;
use std::io::Write;
use uuid::Uuid;

const PAGE_SIZE: i32 = 1_000;

#[derive(Debug, Subcommand)]
pub enum DeadLetterCommand {
    /// List the rejected batches of a device that are still kept, the oldest first.
    List(ListArgs),
    /// Write the bytes of a rejected batch, a tidegate.v1.Batch if it is one, to standard output.
    Show(OneArgs),
    /// Have rejected batches judged once more, and stored if they can be: after what they were rejected for was mended.
    Replay(ReplayArgs),
    /// Delete a rejected batch. It is still counted as rejected.
    Delete(OneArgs),
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = parse::device)]
    device: String,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct OneArgs {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = parse::device)]
    device: String,
    /// The number of the rejected batch.
    #[arg(value_name = "ID")]
    id: i64,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = parse::device)]
    device: String,
    /// The numbers of the rejected batches.
    #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
    ids: Vec<i64>,
    /// All of the device that are still kept.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    client: ClientArgs,
}

pub async fn run(command: DeadLetterCommand, out: &mut dyn Write) -> Result<(), Failure> {
    match command {
        DeadLetterCommand::List(args) => list(args, out).await,
        DeadLetterCommand::Replay(args) => replay(args, out).await,
        DeadLetterCommand::Show(OneArgs { device, id, client }) => {
            let mut service = DeadLetterServiceClient::new(client.connect().await?);
            let request = client.request(pb::GetDeadLetterRequest { device, id });
            let found = client.answer(service.get_dead_letter(request)).await?.dead_letter.unwrap_or_default();
            Ok(out.write_all(&found.batch)?)
        }
        DeadLetterCommand::Delete(OneArgs { device, id, client }) => {
            let mut service = DeadLetterServiceClient::new(client.connect().await?);
            client.answer(service.delete_dead_letter(client.request(pb::DeleteDeadLetterRequest { device, id }))).await?;
            Ok(writeln!(out, "{id} is deleted")?)
        }
    }
}

async fn list(ListArgs { device, json, client }: ListArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let letters = kept(&client, client.connect().await?, &device).await?;
    if json {
        for letter in &letters {
            writeln!(out, "{}", to_json(letter))?;
        }
        return Ok(());
    }
    let mut table = Table::new(&["ID", "RECEIVED", "SEQUENCE", "READINGS", "REASON", "WHERE", "WHY"]);
    for letter in &letters {
        table.row([
            letter.id.to_string(),
            proto_time(letter.receive_time.as_ref()),
            letter.sequence.to_string(),
            letter.readings.to_string(),
            reason_name(letter.reason()).to_owned(),
            shown(&letter.field),
            shown(&letter.message),
        ]);
    }
    Ok(table.write(out, "")?)
}

/// One after the other, in their order, and on behind one that is still rejected.
async fn replay(ReplayArgs { device, mut ids, all, client }: ReplayArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let channel = client.connect().await?;
    if all {
        ids = kept(&client, channel.clone(), &device).await?.into_iter().map(|letter| letter.id).collect();
    }
    let mut service = DeadLetterServiceClient::new(channel);
    let mut still_rejected = 0;
    for &id in &ids {
        let request = client.request(pb::ReplayDeadLetterRequest { device: device.clone(), id });
        match client.answer(service.replay_dead_letter(request)).await {
            Ok(stored) => writeln!(out, "{id} is stored: {} readings", stored.stored_readings)?,
            Err(Failure::Call(status)) if StatusFacts::of(&status).reason() == Reason::StillRejected.as_str() => {
                still_rejected += 1;
                writeln!(out, "{}", shown(status.message()))?;
            }
            // Of all that were kept a moment ago it need not be any more.
            Err(Failure::Call(status)) if all && StatusFacts::of(&status).reason() == Reason::DeadLetterNotFound.as_str() => {}
            Err(failure) => return Err(failure),
        }
    }
    match still_rejected {
        0 => Ok(()),
        some => Err(Failure::Failed(format!("{some} of {} batches still can't be stored", ids.len()))),
    }
}

/// All that are kept of a device.
async fn kept(client: &ClientArgs, channel: Channel, device: &str) -> Result<Vec<pb::DeadLetter>, Failure> {
    let mut service = DeadLetterServiceClient::new(channel);
    let mut request = pb::ListDeadLettersRequest { device: device.to_owned(), page_size: PAGE_SIZE, page_token: String::new() };
    let mut letters = Vec::new();
    loop {
        let page = client.answer(service.list_dead_letters(client.request(request.clone()))).await?;
        letters.extend(page.dead_letters);
        if page.next_page_token.is_empty() {
            return Ok(letters);
        }
        request.page_token = page.next_page_token;
    }
}

fn to_json(letter: &pb::DeadLetter) -> serde_json::Value {
    json!({
        "id": letter.id,
        "stream_id": Uuid::from_slice(&letter.stream_id).map(|id| id.to_string()).unwrap_or_default(),
        "sequence": letter.sequence,
        "receive_time": proto_time(letter.receive_time.as_ref()),
        "reason": reason_name(letter.reason()),
        "field": letter.field,
        "message": letter.message,
        "readings": letter.readings,
        "size_bytes": letter.size_bytes,
    })
}
