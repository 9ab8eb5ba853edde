//! Tokens for the devices. A device acts only as itself, so whoever plays many of them needs a token for each: with an operator's
//! token the fleet registers its devices and has these made.

use crate::gateway::describe;
use anyhow::{Context, anyhow};
use tidegate::{
    client::Channel,
    model::DeviceId,
    pb::{
        CreateDeviceCredentialRequest, CreateDeviceRequest, Device, GetIdentityRequest, ListDeviceCredentialsRequest, OperatorRole,
        RevokeDeviceCredentialRequest, credential_service_client::CredentialServiceClient, device_service_client::DeviceServiceClient,
        operator_service_client::OperatorServiceClient,
    },
};
use tonic::{Code, Status};

/// By this the fleet knows the tokens that it has made.
const DESCRIPTION: &str = "tidegate-fleet";
/// How many of them a device keeps: runs of one device may overlap, and one that was cut off can't revoke its own.
const TOKENS_KEPT: usize = 4;

/// Whose part the fleet may take.
pub struct Identity {
    makes_tokens: bool,
}

impl Identity {
    /// Asks the gateway who is calling.
    pub async fn ask(channel: &Channel) -> anyhow::Result<Self> {
        let identity = OperatorServiceClient::new(channel.clone()).get_identity(GetIdentityRequest {}).await;
        let identity = identity.map_err(|status| anyhow!("the gateway does not say who this is: {}", describe(&status)))?;
        Ok(Self { makes_tokens: identity.into_inner().role() != OperatorRole::Unspecified })
    }

    /// The channel as a device is to use it: with a token of the device's own, unless the caller is the device, or nobody is asked.
    pub async fn of_device(&self, channel: &Channel, device: &DeviceId) -> anyhow::Result<Channel> {
        if !self.makes_tokens {
            return Ok(channel.clone());
        }
        let token = make_token(channel, device.as_str()).await;
        let token = token.map_err(|status| anyhow!(describe(&status))).with_context(|| format!("no token for {device}"))?;
        Ok(channel.with_token(&token)?)
    }
}

async fn make_token(channel: &Channel, device: &str) -> Result<String, Status> {
    let named = Device { id: device.to_owned(), ..Device::default() };
    match DeviceServiceClient::new(channel.clone()).create_device(CreateDeviceRequest { device: Some(named) }).await {
        Err(status) if status.code() != Code::AlreadyExists => return Err(status),
        _ => {}
    }
    let mut credentials = CredentialServiceClient::new(channel.clone());
    let list = ListDeviceCredentialsRequest { device: device.to_owned() };
    let known = credentials.list_device_credentials(list).await?.into_inner().credentials;
    // The oldest first.
    let own: Vec<_> = known.into_iter().filter(|credential| credential.description == DESCRIPTION).collect();
    for credential in &own[..(own.len() + 1).saturating_sub(TOKENS_KEPT)] {
        let revoke = RevokeDeviceCredentialRequest { device: device.to_owned(), credential: credential.id.clone() };
        credentials.revoke_device_credential(revoke).await?;
    }
    let create = CreateDeviceCredentialRequest {
        device: device.to_owned(),
        description: DESCRIPTION.to_owned(),
        ..CreateDeviceCredentialRequest::default()
    };
    Ok(credentials.create_device_credential(create).await?.into_inner().token)
}
