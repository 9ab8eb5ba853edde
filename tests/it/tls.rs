//! TLS: certificates that are replaced while the gateway runs, client certificates, and clients that do not finish.

use crate::support::{
    TestGateway,
    certificates::{Authority, mutual_settings, settings},
    client::{TestDevice, nth_batch},
    eventually, http_get, soon,
    streams::Link,
};
use std::time::{Duration, Instant};
use tidegate::{
    client::{Channel, Credentials, connect_lazy_with},
    pb::{GetUploadPositionRequest, telemetry_service_client::TelemetryServiceClient},
};
use tokio::{io::AsyncReadExt, net::TcpStream};
use tonic::{Code, Status};

const RELOADED: &str = "tidegate_tls_reloads_total{outcome=\"loaded\"}";
const REFUSED: &str = "tidegate_tls_reloads_total{outcome=\"refused\"}";

fn channel(gateway: &TestGateway, credentials: &Credentials) -> Channel {
    connect_lazy_with(&format!("https://localhost:{}", gateway.grpc.port()), credentials).expect("good credentials")
}

async fn open(channel: Channel, device: &str) -> Link {
    Link::open(&TestDevice::new(&channel, device), 0).await.0
}

/// Reads a stream to its end.
async fn ended(link: &mut Link) {
    while let Ok(Some(_)) = link.down.message().await {}
}

async fn ask(channel: Channel, device: &str) -> Result<u64, Status> {
    let stream_id = tidegate::model::StreamId::new().as_bytes().to_vec().into();
    let request = GetUploadPositionRequest { device: device.to_owned(), stream_id };
    Ok(TelemetryServiceClient::new(channel).get_upload_position(request).await?.into_inner().last_durable_sequence)
}

/// Waits until a counter is at `value`.
async fn counted(gateway: &TestGateway, series: &str, value: f64) {
    eventually(series, || async { (gateway.metric(series).await == Some(value)).then_some(()) }).await;
}

/// Scenario: a client that trusts the authority, one that does not, and one without TLS. Guarantee: only the first is served, and
/// the metrics tell when the certificate expires.
#[tokio::test]
async fn only_who_trusts_the_certificate_speaks_with_the_gateway() {
    let authority = Authority::new();
    let tls = settings(&authority, &authority.server());
    let gateway = TestGateway::start_with(|config| config.tls = tls).await;
    assert_eq!(ask(channel(&gateway, &authority.trust()), "pump-1").await.expect("answered"), 0);
    let stranger = Authority::new();
    assert_eq!(ask(channel(&gateway, &stranger.trust()), "pump-1").await.expect_err("not trusted").code(), Code::Unavailable);
    ask(gateway.channel(), "pump-1").await.expect_err("no TLS");
    let expiry = gateway.metric("tidegate_tls_certificate_expiry_timestamp_seconds").await;
    assert_eq!(expiry, Some(3_999_974_400.0), "2096-10-02");
    counted(&gateway, "tidegate_tls_handshakes_total{outcome=\"done\"}", 1.0).await;
}

/// Scenario: the certificate is replaced by one of another authority, then by what is none, while a stream is open. Guarantee: the
/// stream goes on; new connections see the new certificate, also after the bad file.
#[tokio::test]
async fn a_new_certificate_is_taken_without_dropping_connections_and_a_bad_one_is_not() {
    let (old, new) = (Authority::new(), Authority::new());
    let tls = settings(&old, &old.server());
    let gateway = TestGateway::start_with(|config| config.tls = tls).await;
    let mut link = open(channel(&gateway, &old.trust()), "pump-1").await;

    let pair = new.server();
    old.write("server.pem", &pair.certificate);
    old.write("server.key", &pair.key);
    gateway.reload();
    counted(&gateway, RELOADED, 1.0).await;
    ask(channel(&gateway, &new.trust()), "pump-1").await.expect("the new authority is trusted");
    ask(channel(&gateway, &old.trust()), "pump-1").await.expect_err("the old one says nothing of the new certificate");

    old.write("server.key", "this is not a key");
    gateway.reload();
    counted(&gateway, REFUSED, 1.0).await;
    ask(channel(&gateway, &new.trust()), "pump-1").await.expect("what was there is still in use");
    link.send_batch(1, nth_batch(1)).await;
    link.acknowledged(1).await;
}

/// Scenario: a device's certificate is revoked while its stream is open. Guarantee: its connection ends within a second of the
/// reload, it is not let in again, and another device's stream goes on.
#[tokio::test]
async fn a_revoked_certificate_ends_its_connection() {
    let authority = Authority::new();
    let tls = mutual_settings(&authority, &authority.server());
    let gateway = TestGateway::start_with(|config| config.tls = tls).await;
    let (stolen, other) = (authority.device("pump-1", 11), authority.device_by_common_name("pump-2", 12));
    let mut stolen_link = open(channel(&gateway, &authority.trust_as(&stolen)), "pump-1").await;
    let mut other_link = open(channel(&gateway, &authority.trust_as(&other)), "pump-2").await;

    authority.write("clients.crl", &authority.revocation_list(&[&stolen]));
    let begun = Instant::now();
    gateway.reload();
    soon("the end of the stolen one's stream", ended(&mut stolen_link)).await;
    eprintln!("the stream ended {:?} after the reload", begun.elapsed());
    ask(channel(&gateway, &authority.trust_as(&stolen)), "pump-1").await.expect_err("it is revoked");
    other_link.send_batch(1, nth_batch(1)).await;
    other_link.acknowledged(1).await;
}

/// Scenario: a client connects and says nothing. Guarantee: it is gone after the handshake's time, and is counted.
#[tokio::test]
async fn who_does_not_finish_the_handshake_does_not_keep_a_place() {
    let authority = Authority::new();
    let mut tls = settings(&authority, &authority.server());
    tls.handshake_timeout = Duration::from_millis(50);
    let gateway = TestGateway::start_with(|config| config.tls = tls).await;
    let mut silent = TcpStream::connect(gateway.grpc).await.expect("it listens");
    assert_eq!(soon("the end", silent.read(&mut [0; 16])).await.unwrap_or(0), 0);
    counted(&gateway, "tidegate_tls_handshakes_total{outcome=\"timed_out\"}", 1.0).await;
    assert!(http_get(gateway.http, "/readyz").await.is_some());
}
