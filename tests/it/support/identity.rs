//! A gateway that asks for credentials, and those who have some.

use super::{TestGateway, channel, database::Database};
use std::net::SocketAddr;
use tidegate::{
    client::Channel,
    config::{AuthMode, Config},
    pb::{
        self, OperatorRole, credential_service_client::CredentialServiceClient, device_service_client::DeviceServiceClient,
        operator_service_client::OperatorServiceClient,
    },
};

/// Starts a gateway that asks for credentials.
pub async fn start(on: Database) -> TestGateway {
    start_with(on, |_| {}).await
}

/// The same with changed settings.
pub async fn start_with(on: Database, change: impl FnOnce(&mut Config)) -> TestGateway {
    on.gateway_with(|config| {
        config.auth.mode = AuthMode::Required;
        change(config);
    })
    .await
}

/// A connection that shows a token.
pub fn with_token(address: SocketAddr, token: &str) -> Channel {
    channel_of(address, Some(token))
}

fn channel_of(address: SocketAddr, token: Option<&str>) -> Channel {
    let plain = tonic::transport::Endpoint::from_shared(format!("http://{address}")).expect("a URI").connect_lazy();
    Channel::new(plain, token).expect("a token")
}

/// The first administrator, by the token that the gateway has left in its data directory.
pub fn admin(gateway: &TestGateway) -> Channel {
    let token = std::fs::read_to_string(gateway.data_dir().join("admin-token")).expect("left at the first start");
    with_token(gateway.grpc, token.trim())
}

/// Somebody without a credential.
pub fn stranger(gateway: &TestGateway) -> Channel {
    channel(gateway.grpc)
}

/// Registers a device at a site.
pub async fn device(admin: &Channel, id: &str, site: &str) {
    let labels = [("site".to_owned(), site.to_owned())].into();
    let device = Some(pb::Device { id: id.into(), labels, ..Default::default() });
    DeviceServiceClient::new(admin.clone()).create_device(pb::CreateDeviceRequest { device }).await.expect("created");
}

/// A new token of a device: its id, and all of it.
pub async fn device_token(admin: &Channel, id: &str) -> (String, String) {
    let request = pb::CreateDeviceCredentialRequest { device: id.into(), ..Default::default() };
    let made = CredentialServiceClient::new(admin.clone()).create_device_credential(request).await.expect("made").into_inner();
    (made.credential.expect("set").id, made.token)
}

/// A new operator with a token: the token's id, and all of it.
pub async fn operator_token(admin: &Channel, name: &str, role: OperatorRole, scope: &str) -> (String, String) {
    let mut operators = OperatorServiceClient::new(admin.clone());
    let operator = Some(pb::Operator { name: name.into(), role: role.into(), scope: scope.into(), ..Default::default() });
    operators.create_operator(pb::CreateOperatorRequest { operator }).await.expect("created");
    let request = pb::CreateOperatorTokenRequest { operator: name.into(), ..Default::default() };
    let made = operators.create_operator_token(request).await.expect("made").into_inner();
    (made.credential.expect("set").id, made.token)
}

/// A new enrolment key: its id, and all of it.
pub async fn enrolment_key(admin: &Channel, site: &str, uses_max: i64) -> (String, String) {
    let soon = tidegate::model::Timestamp::now().saturating_add(std::time::Duration::from_secs(3600));
    let labels = [("site".to_owned(), site.to_owned())].into();
    let key = pb::EnrolmentKey { labels, uses_max, expire_time: Some(soon.to_proto()), ..Default::default() };
    let request = pb::CreateEnrolmentKeyRequest { enrolment_key: Some(key) };
    let made = CredentialServiceClient::new(admin.clone()).create_enrolment_key(request).await.expect("made").into_inner();
    (made.enrolment_key.expect("set").id, made.key)
}
