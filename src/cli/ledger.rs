//! `tidegate ledger`: what became of all that devices sent, device by device and in total.

use super::{
    Failure,
    client::ClientArgs,
    parse,
    print::{Table, shown, stream_text},
};
use crate::{
    error::{Reason, StatusFacts},
    model::batch::reason_name,
    pb::{self, device_service_client::DeviceServiceClient},
};
use clap::Args;
use serde_json::{Value as Json, json};
use std::{collections::BTreeMap, io::Write};

const PAGE_SIZE: i32 = 1_000;

#[derive(Debug, Args)]
pub struct LedgerArgs {
    /// The device. Default: all devices.
    #[arg(value_name = "DEVICE", value_parser = parse::device, conflicts_with = "selector")]
    device: Option<String>,
    /// Only devices whose labels match, such as 'site=berlin,!retired'.
    #[arg(long, value_name = "SELECTOR", default_value = "", hide_default_value = true, value_parser = parse::selector)]
    selector: String,
    /// One JSON object a line; the last one is the total.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
}

/// Batches and readings.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Tally {
    batches: u64,
    readings: u64,
}

impl Tally {
    fn add(&mut self, more: Self) {
        self.batches = self.batches.saturating_add(more.batches);
        self.readings = self.readings.saturating_add(more.readings);
    }

    fn json(self) -> Json {
        json!({"batches": self.batches, "readings": self.readings})
    }
}

impl From<Option<pb::Tally>> for Tally {
    fn from(tally: Option<pb::Tally>) -> Self {
        let pb::Tally { batches, readings } = tally.unwrap_or_default();
        Self { batches, readings }
    }
}

/// What became of what was received, and what was never sent.
#[derive(Debug, Default)]
struct Account {
    stored: Tally,
    duplicate: Tally,
    rejected: BTreeMap<&'static str, Tally>,
    pending: Tally,
    lost: Tally,
}

impl Account {
    fn of(ledger: &pb::Ledger) -> Self {
        let rejected = ledger.rejected.iter().map(|count| {
            let pb::RejectedCount { batches, readings, .. } = *count;
            (reason_name(count.reason()), Tally { batches, readings })
        });
        Self {
            stored: ledger.stored.into(),
            duplicate: ledger.duplicate.into(),
            rejected: rejected.collect(),
            pending: ledger.pending.into(),
            lost: ledger.lost.into(),
        }
    }

    fn add(&mut self, other: &Self) {
        self.stored.add(other.stored);
        self.duplicate.add(other.duplicate);
        self.pending.add(other.pending);
        self.lost.add(other.lost);
        for (reason, tally) in &other.rejected {
            self.rejected.entry(reason).or_default().add(*tally);
        }
    }

    fn rejected(&self) -> Tally {
        let mut sum = Tally::default();
        self.rejected.values().for_each(|tally| sum.add(*tally));
        sum
    }

    fn received(&self) -> Tally {
        let mut sum = self.rejected();
        sum.add(self.stored);
        sum.add(self.duplicate);
        sum.add(self.pending);
        sum
    }

    fn json(&self, device: Option<&str>) -> Json {
        let rejected: serde_json::Map<String, Json> =
            self.rejected.iter().map(|(reason, tally)| ((*reason).to_owned(), tally.json())).collect();
        json!({
            "device": device,
            "received": self.received().json(),
            "stored": self.stored.json(),
            "duplicate": self.duplicate.json(),
            "rejected": rejected,
            "pending": self.pending.json(),
            "lost": self.lost.json(),
        })
    }

    fn row(&self, name: &str) -> [String; 8] {
        let reasons: Vec<String> = self.rejected.iter().map(|(reason, tally)| format!("{reason} {}", tally.batches)).collect();
        [
            name.to_owned(),
            self.received().batches.to_string(),
            self.stored.batches.to_string(),
            self.duplicate.batches.to_string(),
            self.rejected().batches.to_string(),
            self.pending.batches.to_string(),
            self.lost.batches.to_string(),
            reasons.join(", "),
        ]
    }
}

fn cause_name(cause: pb::MissingCause) -> &'static str {
    match cause {
        pb::MissingCause::Lost => "lost",
        pb::MissingCause::Awaited => "awaited",
        pb::MissingCause::Unspecified => "-",
    }
}

fn missing_json(range: &pb::MissingRange) -> Json {
    json!({
        "stream_id": stream_text(&range.stream_id),
        "first_sequence": range.first_sequence,
        "last_sequence": range.last_sequence,
        "cause": cause_name(range.cause()),
    })
}

/// The ranges that are missing of a device, and whether there are more.
fn missing_rows<'a>(device: &'a str, ledger: &'a pb::Ledger) -> impl Iterator<Item = [String; 4]> + 'a {
    let ranges = ledger.missing.iter().map(|range| {
        let sequences = match (range.first_sequence, range.last_sequence) {
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}-{last}"),
        };
        [device.to_owned(), stream_text(&range.stream_id), sequences, cause_name(range.cause()).to_owned()]
    });
    let more = ledger.missing_truncated.then(|| [device, "-", "more than this gateway has seen", "lost"].map(str::to_owned));
    ranges.chain(more)
}

pub async fn run(args: LedgerArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let LedgerArgs { device, selector, json, client } = args;
    let mut service = DeviceServiceClient::new(client.connect().await?);
    let mut table = Table::new(&["DEVICE", "RECEIVED", "STORED", "DUPLICATE", "REJECTED", "PENDING", "LOST", "WHY REJECTED"]);
    let mut missing = Vec::new();
    let (mut total, mut devices) = (Account::default(), 0_u64);
    let mut list = pb::ListDevicesRequest { label_selector: selector, page_size: PAGE_SIZE, ..Default::default() };
    loop {
        let (ids, next) = match &device {
            Some(id) => (vec![id.clone()], String::new()),
            None => {
                let page = client.answer(service.list_devices(client.request(list.clone()))).await?;
                (page.devices.into_iter().map(|device| device.id).collect(), page.next_page_token)
            }
        };
        for id in ids {
            let request = client.request(pb::GetLedgerRequest { device: id.clone() });
            let ledger = match client.answer(service.get_ledger(request)).await {
                Ok(answer) => answer.ledger.unwrap_or_default(),
                // Deleted since it was listed.
                Err(Failure::Call(status)) if device.is_none() && StatusFacts::of(&status).reason() == Reason::DeviceNotFound.as_str() => {
                    continue;
                }
                Err(failure) => return Err(failure),
            };
            let account = Account::of(&ledger);
            match json {
                true => {
                    let mut line = account.json(Some(&id));
                    line["missing"] = ledger.missing.iter().map(missing_json).collect();
                    line["missing_truncated"] = ledger.missing_truncated.into();
                    writeln!(out, "{line}")?
                }
                false => {
                    table.row(account.row(&shown(&id)));
                    missing.extend(missing_rows(&shown(&id), &ledger));
                }
            }
            total.add(&account);
            devices += 1;
        }
        if next.is_empty() {
            break;
        }
        list.page_token = next;
    }
    if json {
        return Ok(writeln!(out, "{}", total.json(None))?);
    }
    if device.is_none() {
        table.row(total.row(&format!("total of {devices}")));
    }
    table.write(out, "")?;
    if !missing.is_empty() {
        let mut table = Table::new(&["DEVICE", "STREAM ID", "MISSING", "WHY"]);
        missing.into_iter().for_each(|row| table.row(row));
        writeln!(out)?;
        table.write(out, "")?;
    }
    let (stored, received) = (total.stored.readings, total.received().readings);
    Ok(writeln!(out, "\nThese are batches. Of {received} readings that were received {stored} are stored.")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told_range_by_range_and_that_there_is_more() {
        let range = |first_sequence, last_sequence, cause: pb::MissingCause| pb::MissingRange {
            stream_id: vec![7; 16].into(),
            first_sequence,
            last_sequence,
            cause: cause.into(),
        };
        let missing = vec![range(2, 4, pb::MissingCause::Lost), range(9, 9, pb::MissingCause::Awaited)];
        let ledger = pb::Ledger { missing, missing_truncated: true, ..Default::default() };
        let rows: Vec<String> = missing_rows("pump-1", &ledger).map(|row| row.join(" ")).collect();
        let id = "07070707-0707-0707-0707-070707070707";
        let expected =
            [format!("pump-1 {id} 2-4 lost"), format!("pump-1 {id} 9 awaited"), "pump-1 - more than this gateway has seen lost".to_owned()];
        assert_eq!(rows, expected);
    }

    #[test]
    fn what_was_received_is_the_sum_of_what_became_of_it() {
        let ledger = pb::Ledger {
            stored: Some(pb::Tally { batches: 3, readings: 30 }),
            duplicate: Some(pb::Tally { batches: 1, readings: 10 }),
            rejected: vec![
                pb::RejectedCount { reason: pb::RejectReason::NonFinite.into(), batches: 2, readings: 20 },
                pb::RejectedCount { reason: pb::RejectReason::Malformed.into(), batches: 1, readings: 0 },
            ],
            pending: Some(pb::Tally { batches: 1, readings: 5 }),
            lost: Some(pb::Tally { batches: 5, readings: 50 }),
            ..Default::default()
        };
        let mut total = Account::of(&ledger);
        total.add(&Account::of(&ledger));
        assert_eq!(total.received(), Tally { batches: 16, readings: 130 });
        assert_eq!(total.row("total")[7], "MALFORMED 2, NON_FINITE 4");
        assert_eq!(total.json(None)["rejected"]["NON_FINITE"]["batches"], 4);
        assert_eq!(total.lost, Tally { batches: 10, readings: 100 });
    }
}
