//! `tidegate credential`, `tidegate enrolment-key` and `tidegate enrol`: how devices are known.

use super::{
    Failure,
    client::ClientArgs,
    parse,
    print::{Table, proto_time},
};
use crate::{
    model::Timestamp,
    pb::{self, credential_service_client::CredentialServiceClient},
};
use clap::{Args, Subcommand};
use std::{io::Write, time::Duration};

#[derive(Debug, Subcommand)]
pub enum CredentialCommand {
    /// Make a token for a device, and print it: it is shown this once.
    Create(CreateArgs),
    /// List the tokens of a device, without their secrets.
    List(ListArgs),
    /// Make a token void, and end the streams that are open with it.
    Revoke(RevokeArgs),
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = parse::device)]
    device: String,
    /// What the token is for.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    description: String,
    /// After how long it expires, such as 90d. Default: never.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    expires: Option<Duration>,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = parse::device)]
    device: String,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct RevokeArgs {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = parse::device)]
    device: String,
    /// The token's id: its part between the first two `_`.
    #[arg(value_name = "ID")]
    credential: String,
    #[command(flatten)]
    client: ClientArgs,
}

pub async fn run(command: CredentialCommand, out: &mut dyn Write) -> Result<(), Failure> {
    match command {
        CredentialCommand::Create(CreateArgs { device, description, expires, client }) => {
            let mut service = CredentialServiceClient::new(client.connect().await?);
            let request = pb::CreateDeviceCredentialRequest { device, description, expire_time: expires.map(from_now) };
            let made = client.answer(service.create_device_credential(client.request(request))).await?;
            Ok(writeln!(out, "{}", made.token)?)
        }
        CredentialCommand::List(ListArgs { device, client }) => {
            let mut service = CredentialServiceClient::new(client.connect().await?);
            let request = client.request(pb::ListDeviceCredentialsRequest { device });
            print(&client.answer(service.list_device_credentials(request)).await?.credentials, out)
        }
        CredentialCommand::Revoke(RevokeArgs { device, credential, client }) => {
            let mut service = CredentialServiceClient::new(client.connect().await?);
            let request = pb::RevokeDeviceCredentialRequest { device, credential: credential.clone() };
            client.answer(service.revoke_device_credential(client.request(request))).await?;
            Ok(writeln!(out, "{credential} is void")?)
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum EnrolmentKeyCommand {
    /// Make a key with which new devices make their own identities, and print it: it is shown this once.
    Create(CreateKeyArgs),
    /// List the keys, without their secrets.
    List(ListKeysArgs),
    /// Make a key void; the devices that it has enrolled stay.
    Revoke(RevokeKeyArgs),
}

#[derive(Debug, Args)]
pub struct CreateKeyArgs {
    /// How many devices may enrol with it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=1_000_000))]
    uses: i64,
    /// After how long it expires, such as 7d.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    expires: Duration,
    /// A label that the devices get; may be given several times.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse::label)]
    labels: Vec<(String, String)>,
    /// What the key is for.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    description: String,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct ListKeysArgs {
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct RevokeKeyArgs {
    /// The key's id: its part between the first two `_`.
    #[arg(value_name = "ID")]
    key: String,
    #[command(flatten)]
    client: ClientArgs,
}

pub async fn run_keys(command: EnrolmentKeyCommand, out: &mut dyn Write) -> Result<(), Failure> {
    match command {
        EnrolmentKeyCommand::Create(CreateKeyArgs { uses, expires, labels, description, client }) => {
            let mut service = CredentialServiceClient::new(client.connect().await?);
            let labels = labels.into_iter().collect();
            let expire_time = Some(from_now(expires));
            let key = pb::EnrolmentKey { description, labels, uses_max: uses, expire_time, ..Default::default() };
            let request = client.request(pb::CreateEnrolmentKeyRequest { enrolment_key: Some(key) });
            Ok(writeln!(out, "{}", client.answer(service.create_enrolment_key(request)).await?.key)?)
        }
        EnrolmentKeyCommand::List(ListKeysArgs { client }) => {
            let mut service = CredentialServiceClient::new(client.connect().await?);
            let keys = client.answer(service.list_enrolment_keys(client.request(pb::ListEnrolmentKeysRequest {}))).await?;
            let mut table = Table::new(&["ID", "USES", "EXPIRES", "DESCRIPTION"]);
            for key in keys.enrolment_keys {
                let uses = format!("{} of {}", key.uses, key.uses_max);
                table.row([key.id, uses, proto_time(key.expire_time.as_ref()), key.description]);
            }
            Ok(table.write(out, "")?)
        }
        EnrolmentKeyCommand::Revoke(RevokeKeyArgs { key, client }) => {
            let mut service = CredentialServiceClient::new(client.connect().await?);
            let request = pb::RevokeEnrolmentKeyRequest { enrolment_key: key.clone() };
            client.answer(service.revoke_enrolment_key(client.request(request))).await?;
            Ok(writeln!(out, "{key} is void")?)
        }
    }
}

#[derive(Debug, Args)]
pub struct EnrolArgs {
    /// The new device's id.
    #[arg(value_name = "DEVICE", value_parser = parse::device)]
    device: String,
    /// A name for people.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    display_name: String,
    #[command(flatten)]
    client: ClientArgs,
}

/// Prints the new device's token.
pub async fn enrol(args: EnrolArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let EnrolArgs { device, display_name, client } = args;
    let mut service = CredentialServiceClient::new(client.connect().await?);
    let enrolled = client.answer(service.enrol(client.request(pb::EnrolRequest { device, display_name }))).await?;
    Ok(writeln!(out, "{}", enrolled.token)?)
}

/// The time so long from now.
pub fn from_now(after: Duration) -> prost_types::Timestamp {
    Timestamp::now().saturating_add(after).to_proto()
}

/// Prints what is known of tokens.
pub fn print(credentials: &[pb::Credential], out: &mut dyn Write) -> Result<(), Failure> {
    let mut table = Table::new(&["ID", "CREATED", "EXPIRES", "DESCRIPTION"]);
    for pb::Credential { id, description, create_time, expire_time } in credentials {
        let expires = expire_time.as_ref().map_or_else(|| "never".to_owned(), |time| proto_time(Some(time)));
        table.row([id.clone(), proto_time(create_time.as_ref()), expires, description.clone()]);
    }
    Ok(table.write(out, "")?)
}
