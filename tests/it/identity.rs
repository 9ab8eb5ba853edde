//! Credentials: made, shown, revoked and used up, on one gateway and on two.

use crate::support::{
    TestGateway,
    certificates::{Authority, mutual_settings},
    client::{TestDevice, devices, live, nth_batch},
    database::{Database, on_each_database},
    eventually,
    identity::{admin, device, device_token, enrolment_key, operator_token, start, with_token},
    postgres::{self, PostgresServer},
    soon,
    streams::{Desk, Link, device_target},
};
use serde_json::json;
use std::{os::unix::fs::PermissionsExt, time::Instant};
use tidegate::{
    client::{Channel, connect_lazy_with},
    config::{AuthMode, DatabaseUrl},
    error::StatusFacts,
    pb::{self, OperatorRole, credential_service_client::CredentialServiceClient, operator_service_client::OperatorServiceClient},
};
use tonic::Status;

on_each_database!(
    a_revoked_token_ends_its_streams_and_opens_none,
    an_enrolment_key_makes_as_many_devices_as_it_is_for,
    a_deleted_device_does_not_come_back_with_its_token,
    what_operators_change_is_in_the_audit_log,
    a_scope_hides_devices_everywhere,
);

fn reason(status: &Status) -> String {
    StatusFacts::of(status).reason().to_owned()
}

/// Reads a link to its end, which must be an error; its reason.
async fn end_of(link: &mut Link) -> String {
    loop {
        match soon("the stream's end", link.down.message()).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended well"),
            Err(status) => return reason(&status),
        }
    }
}

async fn revoke(admin: &Channel, device: &str, credential: &str) {
    let request = pb::RevokeDeviceCredentialRequest { device: device.into(), credential: credential.into() };
    CredentialServiceClient::new(admin.clone()).revoke_device_credential(request).await.expect("revoked");
}

/// Scenario: a device has two tokens and a stream open with each; one is revoked. Guarantee: its stream ends, it opens no other
/// one, and the stream of the other token goes on.
async fn a_revoked_token_ends_its_streams_and_opens_none(on: Database) {
    let gateway = start(on).await;
    let root = admin(&gateway);
    device(&root, "pump-1", "berlin").await;
    let (old, new) = (device_token(&root, "pump-1").await, device_token(&root, "pump-1").await);
    let with_old = TestDevice::new(&with_token(gateway.grpc, &old.1), "pump-1");
    let with_new = TestDevice::new(&with_token(gateway.grpc, &new.1), "pump-1");
    let (mut old_link, _) = Link::open(&with_old, 0).await;
    let (mut new_link, _) = Link::open(&with_new, 0).await;

    let begun = Instant::now();
    revoke(&root, "pump-1", &old.0).await;
    assert_eq!(end_of(&mut old_link).await, "CREDENTIAL_REVOKED");
    eprintln!("the stream ended {:?} after the revocation was asked for", begun.elapsed());
    let refused = with_old.upload_nth([1]).await.expect_err("it is void");
    assert_eq!(reason(&refused), "CREDENTIAL_INVALID");
    new_link.send_batch(1, nth_batch(1)).await;
    new_link.acknowledged(1).await;
}

async fn an_enrolment_key_makes_as_many_devices_as_it_is_for(on: Database) {
    let gateway = start(on).await;
    let root = admin(&gateway);
    let (_, key) = enrolment_key(&root, "berlin", 2).await;
    let mut enrolment = CredentialServiceClient::new(with_token(gateway.grpc, &key));
    let mut enrol = async |id: &str| {
        let request = pb::EnrolRequest { device: id.into(), display_name: String::new() };
        enrolment.enrol(request).await.map(|response| response.into_inner().token)
    };
    let token = enrol("pump-1").await.expect("the first");
    assert_eq!(reason(&enrol("pump-1").await.expect_err("its id is taken")), "DEVICE_EXISTS");
    enrol("pump-2").await.expect("the second: a refusal uses nothing up");
    assert_eq!(reason(&enrol("pump-3").await.expect_err("there were two")), "ENROLMENT_KEY_USED_UP");

    TestDevice::new(&with_token(gateway.grpc, &token), "pump-1").upload_nth([1]).await.expect("it is known");
    let found = devices(&root).get_device(pb::GetDeviceRequest { device: "pump-1".into() }).await.expect("there").into_inner();
    assert_eq!(found.device.expect("set").labels["site"], "berlin");
}

async fn a_deleted_device_does_not_come_back_with_its_token(on: Database) {
    let gateway = start(on).await;
    let root = admin(&gateway);
    device(&root, "pump-1", "berlin").await;
    let (_, token) = device_token(&root, "pump-1").await;
    let pump = TestDevice::new(&with_token(gateway.grpc, &token), "pump-1");
    pump.upload_nth([1]).await.expect("it is known");
    let request = pb::DeleteDeviceRequest { device: "pump-1".into(), etag: String::new() };
    devices(&root).delete_device(request).await.expect("deleted");
    assert_eq!(reason(&pump.upload_nth([2]).await.expect_err("it is gone")), "CREDENTIAL_INVALID");
    device(&root, "pump-1", "berlin").await;
    assert_eq!(reason(&pump.upload_nth([2]).await.expect_err("that is another one")), "CREDENTIAL_INVALID");
}

async fn what_operators_change_is_in_the_audit_log(on: Database) {
    let gateway = start(on).await;
    let root = admin(&gateway);
    device(&root, "pump-1", "berlin").await;
    let (_, token) = operator_token(&root, "alice", OperatorRole::Viewer, "").await;
    let alice = with_token(gateway.grpc, &token);
    let request = pb::DeleteDeviceRequest { device: "pump-1".into(), etag: String::new() };
    devices(&alice).delete_device(request).await.expect_err("she may only look");
    let mut desk = Desk::open(&alice).await;
    desk.set("r1", device_target("pump-1"), json!({}), "").await;
    assert_eq!(desk.refusal().await.reason, "PERMISSION_DENIED");
    let mut desk = Desk::open(&root).await;
    desk.set("r2", device_target("pump-1"), json!({}), "").await;
    assert_eq!(desk.event().await.device, "pump-1");

    let operators = OperatorServiceClient::new(root);
    let entries = async |actor: &str| -> Vec<(String, String, String)> {
        let request = pb::ListAuditEntriesRequest { actor: actor.into(), ..Default::default() };
        let entries = operators.clone().list_audit_entries(request).await.expect("answered").into_inner().entries;
        let short = |method: &str| method.rsplit('/').next().unwrap_or_default().to_owned();
        entries.into_iter().map(|entry| (short(&entry.method), entry.resource, entry.outcome)).collect()
    };
    let entry = |method: &str, resource: &str, outcome: &str| (method.to_owned(), resource.to_owned(), outcome.to_owned());
    let denied = "PERMISSION_DENIED";
    assert_eq!(entries("operators/alice").await, [entry("Configure", "", denied), entry("DeleteDevice", "", denied)]);
    // The desk notes behind its answer.
    let configured = entry("Configure", "devices/pump-1", "OK");
    let found = eventually("the desk's note is there", || async {
        let found = entries("operators/admin").await;
        found.contains(&configured).then_some(found)
    })
    .await;
    let rest: Vec<_> = found.into_iter().filter(|entry| *entry != configured).collect();
    let expected = [
        entry("CreateOperatorToken", "operators/alice", "OK"),
        entry("CreateOperator", "operators/alice", "OK"),
        entry("CreateDevice", "devices/pump-1", "OK"),
    ];
    assert_eq!(rest, expected);
}

/// Scenario: a viewer of Berlin lists and follows while devices in Berlin and Paris send. Guarantee: it sees Berlin alone.
async fn a_scope_hides_devices_everywhere(on: Database) {
    let gateway = start(on).await;
    let root = admin(&gateway);
    for (id, site) in [("pump-b", "berlin"), ("pump-p", "paris")] {
        device(&root, id, site).await;
    }
    let (_, token) = operator_token(&root, "bert", OperatorRole::Viewer, "site=berlin").await;
    let bert = with_token(gateway.grpc, &token);
    let listed = devices(&bert).list_devices(pb::ListDevicesRequest::default()).await.expect("answered").into_inner();
    assert_eq!(listed.devices.iter().map(|device| device.id.as_str()).collect::<Vec<_>>(), ["pump-b"]);

    let start = Some(pb::follow_request::Start::Beginning(true));
    let mut shown = live(&bert).follow(pb::FollowRequest { start, ..Default::default() }).await.expect("it begins").into_inner();
    for id in ["pump-p", "pump-b"] {
        let (_, token) = device_token(&root, id).await;
        TestDevice::new(&with_token(gateway.grpc, &token), id).upload_nth([1]).await.expect("stored");
    }
    let first = loop {
        let response = soon("readings", shown.message()).await.expect("no error").expect("not the end");
        if let Some(pb::follow_response::Message::Readings(readings)) = response.message {
            break readings.device;
        }
    };
    assert_eq!(first, "pump-b", "Paris sent before");
}

/// Guarantee: the first start leaves a token that only its owner may read; a second start makes no other.
#[tokio::test]
async fn the_first_token_is_its_owners_alone_and_made_once() {
    let gateway = start(Database::Sqlite).await;
    let path = gateway.data_dir().join("admin-token");
    assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    std::fs::remove_file(&path).expect("taken away");
    let gateway = gateway.restart().await;
    assert!(!gateway.data_dir().join("admin-token").exists());
}

/// Scenario: a token is revoked on one gateway while its stream is open on the other. Guarantee: it ends there, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_reaches_the_other_gateway() {
    if !postgres::is_there() {
        return;
    }
    let url = DatabaseUrl::new(PostgresServer::shared().database());
    let settings = |config: &mut tidegate::config::Config| {
        config.storage.url = url.clone();
        config.auth.mode = AuthMode::Required;
    };
    let here = TestGateway::start_with(settings).await;
    let there = TestGateway::start_with(settings).await;
    let root = admin(&here);
    device(&root, "pump-1", "berlin").await;
    let (id, token) = device_token(&root, "pump-1").await;
    let (mut link, _) = Link::open(&TestDevice::new(&with_token(there.grpc, &token), "pump-1"), 0).await;
    let begun = Instant::now();
    revoke(&root, "pump-1", &id).await;
    assert_eq!(end_of(&mut link).await, "CREDENTIAL_REVOKED");
    eprintln!("the stream on the other gateway ended {:?} after the revocation was asked for", begun.elapsed());
}

/// Scenario: a device shows a client certificate, for itself and for another device; then it is revoked. Guarantee: it may act as
/// itself only, and its stream ends with a reason.
#[tokio::test]
async fn a_client_certificate_is_a_devices_identity() {
    let authority = Authority::new();
    let tls = mutual_settings(&authority, &authority.server());
    let gateway = TestGateway::start_with(|config| {
        config.tls = tls;
        config.auth.mode = AuthMode::Required;
    })
    .await;
    let pair = authority.device("pump-1", 11);
    let endpoint = format!("https://localhost:{}", gateway.grpc.port());
    let channel = connect_lazy_with(&endpoint, &authority.trust_as(&pair)).expect("good");
    TestDevice::new(&channel, "pump-1").upload_nth([1]).await.expect("as itself");
    let refused = TestDevice::new(&channel, "pump-2").upload_nth([1]).await.expect_err("as another");
    assert_eq!(reason(&refused), "PERMISSION_DENIED");

    let (mut link, _) = Link::open(&TestDevice::new(&channel, "pump-1"), 0).await;
    authority.write("clients.crl", &authority.revocation_list(&[&pair]));
    gateway.reload();
    assert_eq!(end_of(&mut link).await, "CREDENTIAL_REVOKED");
    eventually("it is counted", || async {
        gateway.metric("tidegate_auth_refusals_total{reason=\"CREDENTIAL_REVOKED\"}").await.filter(|count| *count >= 1.0)
    })
    .await;
}
