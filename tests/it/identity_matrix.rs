//! Who may call what: every RPC, for everybody, on devices inside and outside of their scope and on one that is not there.

use crate::support::{
    database::Database,
    identity::{admin, device, device_token, enrolment_key, operator_token, start_with, stranger, with_token},
    jwt::{SigningKey, claims, jwks},
    oidc::trust,
    raw::call,
};
use prost::Message;
use std::collections::BTreeSet;
use tidegate::{
    client::Channel,
    middleware::Method,
    model::StreamId,
    pb::{self, OperatorRole},
};
use tonic::Code;

/// Who may call.
#[derive(Clone, Copy, PartialEq)]
enum Who {
    Anybody,
    AnyIdentity,
    Itself,
    Viewers,
    Operators,
    Admins,
    Enrolment,
}

/// What a call is about: whether a scope decides.
#[derive(Clone, Copy, PartialEq)]
enum About {
    /// One device, by its id.
    Device,
    /// Not one device: what is outside of the scope is left out.
    Nothing,
}

struct Row {
    method: &'static str,
    who: Who,
    about: About,
    request: fn(&str) -> Vec<u8>,
}

const fn row(method: &'static str, who: Who, about: About, request: fn(&str) -> Vec<u8>) -> Row {
    Row { method, who, about, request }
}

fn empty(_: &str) -> Vec<u8> {
    Vec::new()
}

/// A request whose first field is the device's id, as it is in most.
fn id(device: &str) -> Vec<u8> {
    pb::GetDeviceRequest { device: device.into() }.encode_to_vec()
}

fn stream_id() -> bytes::Bytes {
    StreamId::new().as_bytes().to_vec().into()
}

fn upload(device: &str) -> Vec<u8> {
    pb::UploadRequest { device: device.into(), stream_id: stream_id(), sequence: 1, ..Default::default() }.encode_to_vec()
}

fn position(device: &str) -> Vec<u8> {
    pb::GetUploadPositionRequest { device: device.into(), stream_id: stream_id() }.encode_to_vec()
}

fn hello(device: &str) -> Vec<u8> {
    let hello = pb::Hello { device: device.into(), stream_id: stream_id(), ..Default::default() };
    pb::ConnectRequest { message: Some(pb::connect_request::Message::Hello(hello)) }.encode_to_vec()
}

fn export(device: &str) -> Vec<u8> {
    pb::ExportReadingsRequest { devices: vec![device.into()], ..Default::default() }.encode_to_vec()
}

/// That is of no device, so that nothing is made when it is allowed.
fn update_device(device: &str) -> Vec<u8> {
    let device = pb::Device { id: device.into(), etag: "999999".into(), ..Default::default() };
    let update_mask = Some(prost_types::FieldMask { paths: vec!["display_name".into()] });
    pb::UpdateDeviceRequest { device: Some(device), update_mask }.encode_to_vec()
}

fn delete_device(device: &str) -> Vec<u8> {
    pb::DeleteDeviceRequest { device: device.into(), etag: "999999".into() }.encode_to_vec()
}

/// Of a device that is there: it is not made once more. Of one that is not: its labels are out of every scope.
fn create_device(device: &str) -> Vec<u8> {
    let labels = [("site".to_owned(), if device == "absent" { "nowhere" } else { "berlin" }.to_owned())].into();
    pb::CreateDeviceRequest { device: Some(pb::Device { id: device.into(), labels, ..Default::default() }) }.encode_to_vec()
}

const MATRIX: &[Row] = &[
    row("tidegate.v1.TelemetryService/Upload", Who::Itself, About::Device, upload),
    row("tidegate.v1.TelemetryService/GetUploadPosition", Who::Itself, About::Device, position),
    row("tidegate.v1.DeviceLinkService/Connect", Who::Itself, About::Device, hello),
    row("tidegate.v1.LiveService/Follow", Who::Viewers, About::Nothing, empty),
    row("tidegate.v1.ReadingService/QueryReadings", Who::Viewers, About::Device, id),
    row("tidegate.v1.ReadingService/ExportReadings", Who::Viewers, About::Device, export),
    row("tidegate.v1.ConfigService/Configure", Who::Viewers, About::Nothing, empty),
    row("tidegate.v1.ConfigService/GetConfig", Who::Viewers, About::Device, id),
    row("tidegate.v1.ConfigService/ListConfigRevisions", Who::Viewers, About::Device, id),
    row("tidegate.v1.DeviceService/CreateDevice", Who::Operators, About::Device, create_device),
    row("tidegate.v1.DeviceService/GetDevice", Who::Viewers, About::Device, id),
    row("tidegate.v1.DeviceService/ListDevices", Who::Viewers, About::Nothing, empty),
    row("tidegate.v1.DeviceService/UpdateDevice", Who::Operators, About::Device, update_device),
    row("tidegate.v1.DeviceService/DeleteDevice", Who::Operators, About::Device, delete_device),
    row("tidegate.v1.DeviceService/ListSensors", Who::Viewers, About::Device, id),
    row("tidegate.v1.DeviceService/UpdateSensor", Who::Operators, About::Device, id),
    row("tidegate.v1.DeviceService/GetLedger", Who::Viewers, About::Device, id),
    row("tidegate.v1.DeadLetterService/ListDeadLetters", Who::Viewers, About::Device, id),
    row("tidegate.v1.DeadLetterService/GetDeadLetter", Who::Viewers, About::Device, id),
    row("tidegate.v1.DeadLetterService/ReplayDeadLetter", Who::Operators, About::Device, id),
    row("tidegate.v1.DeadLetterService/DeleteDeadLetter", Who::Operators, About::Device, id),
    row("tidegate.v1.CredentialService/CreateDeviceCredential", Who::Operators, About::Device, id),
    row("tidegate.v1.CredentialService/ListDeviceCredentials", Who::Operators, About::Device, id),
    row("tidegate.v1.CredentialService/RevokeDeviceCredential", Who::Operators, About::Device, id),
    row("tidegate.v1.CredentialService/CreateEnrolmentKey", Who::Operators, About::Nothing, empty),
    row("tidegate.v1.CredentialService/ListEnrolmentKeys", Who::Operators, About::Nothing, empty),
    // There is no such key; who has a scope is not told that there is none.
    row("tidegate.v1.CredentialService/RevokeEnrolmentKey", Who::Operators, About::Device, |_| Vec::new()),
    row("tidegate.v1.CredentialService/Enrol", Who::Enrolment, About::Nothing, empty),
    row("tidegate.v1.OperatorService/GetIdentity", Who::AnyIdentity, About::Nothing, empty),
    row("tidegate.v1.OperatorService/CreateOperator", Who::Admins, About::Nothing, empty),
    row("tidegate.v1.OperatorService/GetOperator", Who::Admins, About::Nothing, empty),
    row("tidegate.v1.OperatorService/ListOperators", Who::Admins, About::Nothing, empty),
    row("tidegate.v1.OperatorService/UpdateOperator", Who::Admins, About::Nothing, empty),
    row("tidegate.v1.OperatorService/DeleteOperator", Who::Admins, About::Nothing, empty),
    row("tidegate.v1.OperatorService/CreateOperatorToken", Who::Admins, About::Nothing, empty),
    row("tidegate.v1.OperatorService/ListOperatorTokens", Who::Admins, About::Nothing, empty),
    row("tidegate.v1.OperatorService/RevokeOperatorToken", Who::Admins, About::Nothing, empty),
    row("tidegate.v1.OperatorService/ListAuditEntries", Who::Admins, About::Nothing, empty),
    row("grpc.health.v1.Health/Check", Who::Anybody, About::Nothing, empty),
    row("grpc.health.v1.Health/Watch", Who::Anybody, About::Nothing, empty),
    row("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Who::AnyIdentity, About::Nothing, empty),
    row("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Who::AnyIdentity, About::Nothing, empty),
    row("unknown", Who::AnyIdentity, About::Nothing, empty),
];

/// Somebody who calls.
struct Caller {
    name: &'static str,
    channel: Channel,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Stranger,
    /// With a token that is none.
    Forger,
    /// As `pump-berlin`.
    Device,
    /// Rank, and whether only of `site=berlin`.
    Operator(u8, bool),
    Enrolment,
}

/// What the gateway must say: only these three are told apart.
fn expected(row: &Row, kind: Kind, target: &str) -> &'static str {
    let rank = match row.who {
        Who::Viewers => 1,
        Who::Operators => 2,
        Who::Admins => 3,
        _ => u8::MAX,
    };
    let may = match (row.who, kind) {
        (_, Kind::Forger) => return "unauthenticated",
        (Who::Anybody, _) => true,
        (_, Kind::Stranger) => return "unauthenticated",
        (Who::AnyIdentity, _) | (Who::Enrolment, Kind::Enrolment) => true,
        (Who::Itself, Kind::Device) => target == "pump-berlin",
        (_, Kind::Operator(has, scoped)) => has >= rank && !(scoped && row.about == About::Device && hidden(row, target)),
        _ => false,
    };
    if may { "allowed" } else { "denied" }
}

/// What somebody of `site=berlin` may not see.
fn hidden(row: &Row, target: &str) -> bool {
    row.method.ends_with("RevokeEnrolmentKey") || target != "pump-berlin"
}

#[test]
fn every_method_that_is_served_has_its_row() {
    let served: BTreeSet<&str> = Method::all().iter().map(|method| method.name.as_str()).collect();
    let rows: BTreeSet<&str> = MATRIX.iter().map(|row| row.method).collect();
    assert_eq!(served, rows);
    assert_eq!(rows.len(), MATRIX.len());
}

/// Scenario: everybody calls everything, about a device in Berlin, one in Paris, and one that is not there. Guarantee: each is
/// allowed what the matrix says, and what is refused is refused alike whether the device is there or not.
#[tokio::test]
async fn everybody_may_do_what_the_matrix_says_and_nothing_else() {
    let keys = tempfile::NamedTempFile::new().expect("a file");
    let (key, other_key) = (SigningKey::p256("k1"), SigningKey::p256("k1"));
    std::fs::write(keys.path(), jwks(&[&key])).expect("written");
    let gateway = start_with(Database::Sqlite, |config| trust(config, keys.path().display().to_string())).await;
    let provided = |key: &SigningKey, role: &str, scope: &str| with_token(gateway.grpc, &key.token(&claims(role, role, scope)));
    let root = admin(&gateway);
    device(&root, "pump-berlin", "berlin").await;
    device(&root, "pump-paris", "paris").await;
    let of = |token: (String, String)| with_token(gateway.grpc, &token.1);
    let (berlin, all) = ("site=berlin", "");
    let forged = format!("tgo_{}_{}", "a".repeat(16), "A".repeat(43));
    let callers = [
        ("stranger", stranger(&gateway), Kind::Stranger),
        ("forger", with_token(gateway.grpc, &forged), Kind::Forger),
        ("device", of(device_token(&root, "pump-berlin").await), Kind::Device),
        ("viewer", of(operator_token(&root, "viewer", OperatorRole::Viewer, all).await), Kind::Operator(1, false)),
        ("viewer of berlin", of(operator_token(&root, "viewer-b", OperatorRole::Viewer, berlin).await), Kind::Operator(1, true)),
        ("operator", of(operator_token(&root, "operator", OperatorRole::Operator, all).await), Kind::Operator(2, false)),
        ("operator of berlin", of(operator_token(&root, "operator-b", OperatorRole::Operator, berlin).await), Kind::Operator(2, true)),
        ("administrator", of(operator_token(&root, "root", OperatorRole::Admin, all).await), Kind::Operator(3, false)),
        ("provider's viewer of berlin", provided(&key, "viewer", berlin), Kind::Operator(1, true)),
        ("provider's operator", provided(&key, "operator", "*"), Kind::Operator(2, false)),
        ("provider's administrator", provided(&key, "admin", "*"), Kind::Operator(3, false)),
        ("forger of the provider's", provided(&other_key, "admin", "*"), Kind::Forger),
        ("enrolment key", of(enrolment_key(&root, "berlin", 5).await), Kind::Enrolment),
    ];
    let mut wrong = Vec::new();
    for (name, channel, kind) in callers {
        let caller = Caller { name, channel, kind };
        for row in MATRIX {
            for target in ["pump-berlin", "pump-paris", "absent"] {
                // It would be made, and then be there.
                let makes_it = row.method.ends_with("CreateDevice") && target == "absent";
                let want = expected(row, caller.kind, target);
                if makes_it && want == "allowed" {
                    continue;
                }
                let (code, _) = call(&caller.channel, row.method, (row.request)(target)).await;
                let got = match code {
                    Code::Unauthenticated => "unauthenticated",
                    Code::PermissionDenied => "denied",
                    _ => "allowed",
                };
                if got != want {
                    wrong.push(format!("{} calls {} about {target}: {got} ({code:?}), not {want}", caller.name, row.method));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
