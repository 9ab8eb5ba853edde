//! `tidegate operator`, `tidegate audit` and `tidegate whoami`: who operates the gateway, and what they did.

use super::{
    Failure,
    client::ClientArgs,
    credential::{from_now, print},
    parse,
    print::{Table, proto_time},
};
use crate::pb::{self, OperatorRole, operator_service_client::OperatorServiceClient};
use clap::{Args, Subcommand, ValueEnum};
use std::{io::Write, time::Duration};

#[derive(Debug, Subcommand)]
pub enum OperatorCommand {
    /// Add an operator; `tidegate operator token create` then makes a token for it.
    Create(SetArgs),
    /// List operators with their roles and scopes.
    List(ListArgs),
    /// Change role and scope of an operator; its open streams end.
    Update(SetArgs),
    /// Delete an operator with its tokens; its open streams end.
    Delete(NameArgs),
    /// Make, list and revoke the tokens of an operator.
    #[command(subcommand)]
    Token(TokenCommand),
}

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token, and print it: it is shown this once.
    Create(CreateTokenArgs),
    /// List the tokens, without their secrets.
    List(NameArgs),
    /// Make a token void, and end the streams that are open with it.
    Revoke(RevokeTokenArgs),
}

/// What an operator may do.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum RoleArg {
    /// See devices, configurations and readings.
    Viewer,
    /// Also change them, and manage the tokens of devices.
    Operator,
    /// Also manage operators.
    Admin,
}

impl From<RoleArg> for OperatorRole {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Viewer => Self::Viewer,
            RoleArg::Operator => Self::Operator,
            RoleArg::Admin => Self::Admin,
        }
    }
}

#[derive(Debug, Args)]
pub struct SetArgs {
    /// The operator's name.
    name: String,
    /// What it may do.
    #[arg(long)]
    role: RoleArg,
    /// Only with devices whose labels match, such as site=berlin.
    #[arg(long, value_name = "SELECTOR", default_value = "", hide_default_value = true, value_parser = parse::selector)]
    scope: String,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct NameArgs {
    /// The operator's name.
    name: String,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub struct CreateTokenArgs {
    /// The operator's name.
    name: String,
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
pub struct RevokeTokenArgs {
    /// The operator's name.
    name: String,
    /// The token's id: its part between the first two `_`.
    #[arg(value_name = "ID")]
    credential: String,
    #[command(flatten)]
    client: ClientArgs,
}

pub async fn run(command: OperatorCommand, out: &mut dyn Write) -> Result<(), Failure> {
    match command {
        OperatorCommand::Create(args) => {
            let (operator, client) = args.operator();
            let mut service = OperatorServiceClient::new(client.connect().await?);
            let created = client.answer(service.create_operator(client.request(pb::CreateOperatorRequest { operator }))).await?;
            Ok(writeln!(out, "{} is added", created.operator.unwrap_or_default().name)?)
        }
        OperatorCommand::Update(args) => {
            let (operator, client) = args.operator();
            let mut service = OperatorServiceClient::new(client.connect().await?);
            let updated = client.answer(service.update_operator(client.request(pb::UpdateOperatorRequest { operator }))).await?;
            Ok(writeln!(out, "{} is changed", updated.operator.unwrap_or_default().name)?)
        }
        OperatorCommand::List(ListArgs { client }) => list(&client, out).await,
        OperatorCommand::Delete(NameArgs { name, client }) => {
            let mut service = OperatorServiceClient::new(client.connect().await?);
            let request = pb::DeleteOperatorRequest { operator: name.clone() };
            client.answer(service.delete_operator(client.request(request))).await?;
            Ok(writeln!(out, "{name} is deleted")?)
        }
        OperatorCommand::Token(command) => run_token(command, out).await,
    }
}

impl SetArgs {
    fn operator(self) -> (Option<pb::Operator>, ClientArgs) {
        let Self { name, role, scope, client } = self;
        (Some(pb::Operator { name, role: OperatorRole::from(role).into(), scope, ..Default::default() }), client)
    }
}

async fn list(client: &ClientArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let mut service = OperatorServiceClient::new(client.connect().await?);
    let mut table = Table::new(&["NAME", "ROLE", "SCOPE", "CREATED"]);
    let mut page_token = String::new();
    loop {
        let request = client.request(pb::ListOperatorsRequest { page_size: 0, page_token });
        let page = client.answer(service.list_operators(request)).await?;
        for operator in page.operators {
            let role = role_name(operator.role());
            table.row([operator.name, role, operator.scope, proto_time(operator.create_time.as_ref())]);
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(table.write(out, "")?);
        }
    }
}

async fn run_token(command: TokenCommand, out: &mut dyn Write) -> Result<(), Failure> {
    match command {
        TokenCommand::Create(CreateTokenArgs { name, description, expires, client }) => {
            let mut service = OperatorServiceClient::new(client.connect().await?);
            let request = pb::CreateOperatorTokenRequest { operator: name, description, expire_time: expires.map(from_now) };
            Ok(writeln!(out, "{}", client.answer(service.create_operator_token(client.request(request))).await?.token)?)
        }
        TokenCommand::List(NameArgs { name, client }) => {
            let mut service = OperatorServiceClient::new(client.connect().await?);
            let request = client.request(pb::ListOperatorTokensRequest { operator: name });
            print(&client.answer(service.list_operator_tokens(request)).await?.credentials, out)
        }
        TokenCommand::Revoke(RevokeTokenArgs { name, credential, client }) => {
            let mut service = OperatorServiceClient::new(client.connect().await?);
            let request = pb::RevokeOperatorTokenRequest { operator: name, credential: credential.clone() };
            client.answer(service.revoke_operator_token(client.request(request))).await?;
            Ok(writeln!(out, "{credential} is void")?)
        }
    }
}

#[derive(Debug, Args)]
pub struct AuditArgs {
    /// Only of this actor, such as operators/alice.
    #[arg(long, value_name = "ACTOR", default_value = "", hide_default_value = true)]
    actor: String,
    /// Only on this resource, such as devices/pump-1.
    #[arg(long, value_name = "RESOURCE", default_value = "", hide_default_value = true)]
    resource: String,
    /// Only of so long ago until now, such as 24h.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    since: Option<Duration>,
    /// At most so many entries.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(i32).range(1..=1_000))]
    limit: i32,
    #[command(flatten)]
    client: ClientArgs,
}

/// `tidegate audit`: newest first.
pub async fn audit(args: AuditArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let AuditArgs { actor, resource, since, limit, client } = args;
    let start_time = since.map(|ago| crate::model::Timestamp::now().saturating_sub(ago).to_proto());
    let request = pb::ListAuditEntriesRequest { actor, resource, start_time, page_size: limit, ..Default::default() };
    let mut service = OperatorServiceClient::new(client.connect().await?);
    let page = client.answer(service.list_audit_entries(client.request(request))).await?;
    let mut table = Table::new(&["TIME", "ACTOR", "METHOD", "RESOURCE", "OUTCOME", "PEER"]);
    for entry in page.entries {
        table.row([proto_time(entry.time.as_ref()), entry.actor, entry.method, entry.resource, entry.outcome, entry.peer]);
    }
    Ok(table.write(out, "")?)
}

/// `tidegate whoami`.
pub async fn whoami(ListArgs { client }: ListArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let mut service = OperatorServiceClient::new(client.connect().await?);
    let found = client.answer(service.get_identity(client.request(pb::GetIdentityRequest {}))).await?;
    let role = role_name(found.role());
    let who = if found.actor.is_empty() { "everybody: the gateway asks for no credentials".to_owned() } else { found.actor };
    writeln!(out, "{who}")?;
    for (name, value) in [("role", role), ("scope", found.scope), ("credential", found.credential)] {
        if !value.is_empty() {
            writeln!(out, "{name}: {value}")?;
        }
    }
    Ok(())
}

fn role_name(role: OperatorRole) -> String {
    match role {
        OperatorRole::Unspecified => String::new(),
        role => role.as_str_name().trim_start_matches("OPERATOR_ROLE_").to_lowercase(),
    }
}
