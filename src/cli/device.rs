//! `tidegate device`: the registry of devices.

use super::{
    Failure,
    client::ClientArgs,
    parse,
    print::{Table, proto_time, seconds},
    show,
};
use crate::{
    client::Channel,
    pb::{self, device_service_client::DeviceServiceClient},
};
use clap::{Args, Subcommand};
use serde_json::json;
use std::{
    collections::BTreeMap,
    io::{self, IsTerminal, Write},
};

#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// Register a device.
    Create(CreateArgs),
    /// List devices, in the order of their ids.
    List(ListArgs),
    /// Show a device: its sensors, its account of readings, and where its configuration stands.
    Show(show::ShowArgs),
    /// Change a device's labels or name.
    Update(UpdateArgs),
    /// Delete a device with its readings, sensors, configuration and account.
    Delete(DeleteArgs),
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The new device's id.
    #[arg(value_name = "ID", value_parser = parse::device)]
    id: String,
    /// A label, such as site=berlin; may be given several times.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse::label)]
    labels: Vec<(String, String)>,
    /// A name for people.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    display_name: String,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only devices whose labels match, such as 'site=berlin,!retired'.
    #[arg(long, value_name = "SELECTOR", default_value = "", hide_default_value = true, value_parser = parse::selector)]
    selector: String,
    /// Only devices of which nothing was heard for the gateway's setting devices.silent_after.
    #[arg(long)]
    silent: bool,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("change").required(true).multiple(true)))]
pub struct UpdateArgs {
    /// The device.
    #[arg(value_name = "ID", value_parser = parse::device)]
    id: String,
    /// A label to add or change; may be given several times. The others stay.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse::label, group = "change")]
    labels: Vec<(String, String)>,
    /// The key of a label to take away; may be given several times.
    #[arg(long = "remove-label", value_name = "KEY", group = "change")]
    removed: Vec<String>,
    /// The new name for people.
    #[arg(long, value_name = "TEXT", group = "change")]
    display_name: Option<String>,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// The device.
    #[arg(value_name = "ID", value_parser = parse::device)]
    id: String,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    client: ClientArgs,
}

pub async fn run(command: DeviceCommand, out: &mut dyn Write) -> Result<(), Failure> {
    match command {
        DeviceCommand::Create(args) => create(args, out).await,
        DeviceCommand::List(args) => list(args, out).await,
        DeviceCommand::Show(args) => show::run(args, out).await,
        DeviceCommand::Update(args) => update(args, out).await,
        DeviceCommand::Delete(args) => delete(args, out).await,
    }
}

async fn create(args: CreateArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let CreateArgs { id, labels, display_name, client } = args;
    let device = pb::Device { id, labels: labels.into_iter().collect(), display_name, ..Default::default() };
    let mut service = DeviceServiceClient::new(client.connect().await?);
    let created = client.answer(service.create_device(client.request(pb::CreateDeviceRequest { device: Some(device) }))).await?;
    Ok(writeln!(out, "{} is registered", created.device.unwrap_or_default().id)?)
}

async fn list(args: ListArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let mut service = DeviceServiceClient::new(args.client.connect().await?);
    let mut request = pb::ListDevicesRequest { label_selector: args.selector, page_size: 1_000, silent: args.silent, ..Default::default() };
    let mut headings = true;
    loop {
        let page = args.client.answer(service.list_devices(args.client.request(request.clone()))).await?;
        if args.json {
            for device in &page.devices {
                writeln!(out, "{}", device_json(device))?;
            }
        } else {
            device_table(&page.devices, headings).write(out, "")?;
        }
        headings = false;
        if page.next_page_token.is_empty() {
            return Ok(());
        }
        request.page_token = page.next_page_token;
    }
}

fn device_table(devices: &[pb::Device], headings: bool) -> Table {
    let mut table = if headings { Table::new(&["ID", "NAME", "LABELS", "LAST RECEIVED"]) } else { Table::bare() };
    for device in devices {
        let received = proto_time(device.last_receive_time.as_ref());
        table.row([device.id.clone(), or_dash(&device.display_name), or_dash(&labels_text(device)), or_dash(&received)]);
    }
    table
}

/// An empty cell would make a table hard to read and to cut.
pub fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// `key=value,…` in the order of the keys.
pub fn labels_text(device: &pb::Device) -> String {
    let labels: BTreeMap<_, _> = device.labels.iter().collect();
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

/// The device as JSON, with the names of the .proto file.
pub fn device_json(device: &pb::Device) -> serde_json::Value {
    json!({
        "id": device.id,
        "labels": device.labels.iter().collect::<BTreeMap<_, _>>(),
        "display_name": device.display_name,
        "create_time": proto_time(device.create_time.as_ref()),
        "update_time": proto_time(device.update_time.as_ref()),
        "last_receive_time": device.last_receive_time.as_ref().map(|time| proto_time(Some(time))),
        "last_seen_time": device.last_seen_time.as_ref().map(|time| proto_time(Some(time))),
        "etag": device.etag,
        "clock_offset": device.clock_offset.as_ref().map(|clock| json!({
            "offset_seconds": clock.offset.as_ref().map(seconds),
            "uncertainty_seconds": clock.uncertainty.as_ref().map(seconds),
            "measure_time": proto_time(clock.measure_time.as_ref()),
            "correction_seconds": clock.correction.as_ref().map(seconds),
        })),
    })
}

/// The device as it is now.
pub async fn get(client: &ClientArgs, service: &mut DeviceServiceClient<Channel>, id: &str) -> Result<pb::Device, Failure> {
    let request = client.request(pb::GetDeviceRequest { device: id.to_owned() });
    let answer = client.answer(service.get_device(request)).await?;
    answer.device.ok_or_else(|| Failure::Failed("the gateway's answer holds no device".to_owned()))
}

/// Reads the device, changes it, and writes it back under its etag, so that nobody else's change is undone.
async fn update(args: UpdateArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let UpdateArgs { id, labels, removed, display_name, client } = args;
    let mut service = DeviceServiceClient::new(client.connect().await?);
    let mut device = get(&client, &mut service, &id).await?;
    let mut paths = Vec::new();
    if !labels.is_empty() || !removed.is_empty() {
        paths.push("labels".to_owned());
        device.labels.extend(labels);
        device.labels.retain(|key, _| !removed.contains(key));
    }
    if let Some(display_name) = display_name {
        paths.push("display_name".to_owned());
        device.display_name = display_name;
    }
    let request = pb::UpdateDeviceRequest { device: Some(device), update_mask: Some(prost_types::FieldMask { paths }) };
    let updated = client.answer(service.update_device(client.request(request))).await?.device.unwrap_or_default();
    Ok(device_table(&[updated], true).write(out, "")?)
}

async fn delete(args: DeleteArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let DeleteArgs { id, yes, client } = args;
    let mut service = DeviceServiceClient::new(client.connect().await?);
    let device = get(&client, &mut service, &id).await?;
    if !yes {
        confirm(&id)?;
    }
    let request = pb::DeleteDeviceRequest { device: id.clone(), etag: device.etag };
    client.answer(service.delete_device(client.request(request))).await?;
    Ok(writeln!(out, "{id} is deleted")?)
}

fn confirm(id: &str) -> Result<(), Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::Usage("there is no terminal to ask at: say --yes to delete the device and all its readings".to_owned()));
    }
    eprint!("This deletes {id} with all its readings. Type its id to go on: ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    if answer.trim() == id { Ok(()) } else { Err(Failure::Failed("nothing was deleted".to_owned())) }
}
