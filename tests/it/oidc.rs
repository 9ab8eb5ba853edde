//! Operators by the tokens of an OpenID Connect provider.

use crate::support::{
    TestGateway,
    certificates::Authority,
    client::{devices, live},
    eventually,
    identity::{admin, device, with_token},
    jwt::{AUDIENCE, ISSUER, SigningKey, changed, claims, jwks, now},
    oidc::{Answer, Provider, trust},
    process::GatewayProcess,
    soon,
};
use serde_json::json;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tidegate::{
    client::Channel,
    error::StatusFacts,
    model::Timestamp,
    pb::{self, OperatorRole, operator_service_client::OperatorServiceClient},
};
use tonic::{Code, Status, Streaming};

const FAILED: &str = "tidegate_oidc_key_fetches_total{outcome=\"failed\"}";
const FETCHED: &str = "tidegate_oidc_key_fetches_total{outcome=\"fetched\"}";
const FETCH_TIME: &str = "tidegate_oidc_keys_fetched_timestamp_seconds";
/// Longer than any test: what is fetched is fetched for another reason.
const NEVER: Duration = Duration::from_secs(24 * 3600);
const OFTEN: Duration = Duration::from_millis(50);

fn reason(status: &Status) -> String {
    StatusFacts::of(status).reason().to_owned()
}

fn by(gateway: &TestGateway, token: &str) -> Channel {
    with_token(gateway.grpc, token)
}

async fn whoami(channel: &Channel) -> Result<pb::GetIdentityResponse, Status> {
    let answer = OperatorServiceClient::new(channel.clone()).get_identity(pb::GetIdentityRequest {}).await?;
    Ok(answer.into_inner())
}

async fn follow(channel: &Channel) -> Streaming<pb::FollowResponse> {
    let start = Some(pb::follow_request::Start::Beginning(true));
    live(channel).follow(pb::FollowRequest { start, ..Default::default() }).await.expect("it begins").into_inner()
}

/// Reads a stream to its end, which must be an error; its reason.
async fn end_of(stream: &mut Streaming<pb::FollowResponse>) -> String {
    loop {
        match soon("the stream's end", stream.message()).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended well"),
            Err(status) => return reason(&status),
        }
    }
}

/// A gateway that has the keys from an address, which are there.
async fn gateway_of(provider: &Provider, refresh_interval: Duration) -> TestGateway {
    let gateway = TestGateway::start_with(|config| {
        trust(config, provider.url());
        config.oidc.refresh_interval = refresh_interval;
    })
    .await;
    counts(&gateway, FETCHED, 1.0).await;
    gateway
}

/// Waits until a metric has come to a value.
async fn counts(gateway: &TestGateway, series: &str, value: f64) {
    eventually(series, || async { gateway.metric(series).await.filter(|found| *found >= value) }).await;
}

/// Scenario: a viewer of Berlin and an operator of every device come with tokens of the provider. Guarantee: each may do what its role
/// says, with the devices that its scope says, and the audit log names them.
#[tokio::test]
async fn role_and_scope_of_a_token_bite_and_the_audit_log_names_its_operator() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let file = directory.path().join("jwks.json");
    let key = SigningKey::rsa("k1", "RS256");
    std::fs::write(&file, jwks(&[&key])).expect("written");
    let gateway = TestGateway::start_with(|config| trust(config, file.display().to_string())).await;
    let root = admin(&gateway);
    device(&root, "pump-b", "berlin").await;
    device(&root, "pump-p", "paris").await;

    let alice = by(&gateway, &key.token(&changed(claims("alice", "viewer", "site=berlin"), &json!({ "jti": "t-1" }))));
    let found = whoami(&alice).await.expect("she is known");
    assert_eq!((found.actor.as_str(), found.role(), found.scope.as_str()), ("oidc/alice", OperatorRole::Viewer, "site=berlin"));
    let listed = devices(&alice).list_devices(pb::ListDevicesRequest::default()).await.expect("she may look").into_inner();
    assert_eq!(listed.devices.iter().map(|device| device.id.as_str()).collect::<Vec<_>>(), ["pump-b"]);
    let delete = |id: &str| pb::DeleteDeviceRequest { device: id.into(), etag: String::new() };
    assert_eq!(reason(&devices(&alice).delete_device(delete("pump-b")).await.expect_err("no more")), "PERMISSION_DENIED");
    let bob = by(&gateway, &key.token(&claims("bob", "operator", "*")));
    devices(&bob).delete_device(delete("pump-p")).await.expect("he may");

    let mut operators = OperatorServiceClient::new(root);
    let mut entries = async |actor: &str| -> Vec<(String, String, String)> {
        let request = pb::ListAuditEntriesRequest { actor: actor.into(), ..Default::default() };
        let entries = operators.list_audit_entries(request).await.expect("answered").into_inner().entries;
        entries.into_iter().map(|entry| (entry.credential, entry.resource, entry.outcome)).collect()
    };
    let entry = |credential: &str, resource: &str, outcome: &str| (credential.to_owned(), resource.to_owned(), outcome.to_owned());
    assert_eq!(entries("oidc/alice").await, [entry("t-1", "", "PERMISSION_DENIED")]);
    assert_eq!(entries("oidc/bob").await, [entry("", "devices/pump-p", "OK")]);
}

/// Scenario: the file of keys is replaced while a stream is open, and the gateway is told so. Guarantee: the stream of the key that is
/// gone ends, its token opens no other one, and tokens of the new key are good.
#[tokio::test]
async fn a_new_file_of_keys_takes_the_place_of_the_old_one() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let file = directory.path().join("jwks.json");
    let (old, new) = (SigningKey::p256("old"), SigningKey::ed25519("new"));
    std::fs::write(&file, jwks(&[&old])).expect("written");
    let gateway = TestGateway::start_with(|config| {
        trust(config, file.display().to_string());
        config.oidc.refresh_interval = NEVER;
    })
    .await;
    let of_old = by(&gateway, &old.token(&claims("alice", "viewer", "*")));
    let mut stream = follow(&of_old).await;
    std::fs::write(&file, jwks(&[&new])).expect("written");
    gateway.reload();
    assert_eq!(end_of(&mut stream).await, "CREDENTIAL_REVOKED");
    assert_eq!(reason(&whoami(&of_old).await.expect_err("its key is gone")), "CREDENTIAL_INVALID");
    whoami(&by(&gateway, &new.token(&claims("alice", "viewer", "*")))).await.expect("its key is there");
}

/// Scenario: the provider exchanges its key, and an operator comes with a token of the new one; then strangers come with made-up
/// keys. Guarantee: the provider is asked at once, and not once for each stranger.
#[tokio::test]
async fn a_token_of_a_new_key_has_the_provider_asked_but_not_without_end() {
    let (old, new, stranger) = (SigningKey::p256("old"), SigningKey::rsa("new", "PS256"), SigningKey::p256("stranger"));
    let provider = Provider::start(Answer::Keys(jwks(&[&old]))).await;
    let gateway = gateway_of(&provider, NEVER).await;
    let alice = claims("alice", "viewer", "*");
    whoami(&by(&gateway, &old.token(&alice))).await.expect("its key is there");
    assert_eq!(provider.asked(), 1);
    provider.answer(Answer::Keys(jwks(&[&old, &new])));
    let of_new = by(&gateway, &new.token(&alice));
    // All at once: they wait for one answer.
    let (one, two) = tokio::join!(whoami(&of_new), whoami(&of_new));
    one.and(two).expect("the provider says that the key is its own");
    assert_eq!(provider.asked(), 2);
    for _ in 0..20 {
        let refused = whoami(&by(&gateway, &stranger.token(&alice))).await.expect_err("the provider has no such key");
        assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unauthenticated, "CREDENTIAL_INVALID"));
    }
    assert!(provider.asked() <= 2 + 20 / 2, "asked {} times", provider.asked());
    counts(&gateway, "tidegate_auth_refusals_total{reason=\"CREDENTIAL_INVALID\"}", 20.0).await;
}

/// Scenario: the provider is away when the gateway starts, comes, and goes away again. Guarantee: until it comes operators are told to
/// try again later; then they are known, also when it is away.
#[tokio::test]
async fn without_keys_operators_are_told_to_come_again_and_keys_outlive_the_provider() {
    let key = SigningKey::ed25519("k1");
    let provider = Provider::start(Answer::Away).await;
    let gateway = TestGateway::start_with(|config| {
        trust(config, provider.url());
        config.oidc.refresh_interval = OFTEN;
    })
    .await;
    let alice = by(&gateway, &key.token(&claims("alice", "viewer", "*")));
    let early = whoami(&alice).await.expect_err("there are no keys");
    assert_eq!((early.code(), reason(&early).as_str()), (Code::Unavailable, "KEYS_UNAVAILABLE"));
    assert!(StatusFacts::of(&early).retry_after.is_some());
    counts(&gateway, FAILED, 2.0).await;
    assert_eq!(gateway.metric(FETCH_TIME).await, Some(0.0));
    whoami(&admin(&gateway)).await.expect("the gateway's own tokens need no provider");

    let keys = Answer::Keys(jwks(&[&key]));
    provider.answer(keys.clone());
    eventually("she is known", || async { whoami(&alice).await.ok() }).await;
    let fetched = gateway.metric(FETCH_TIME).await.expect("there with an issuer");
    assert!(fetched > 0.0);
    let large = format!("HTTP/1.1 200 OK\r\ncontent-length: 300000\r\n\r\n{}", " ".repeat(300_000));
    let bad = [
        Answer::Away,
        Answer::Keys("{\"keys\": []}".into()),
        Answer::Raw("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n".into()),
        Answer::Raw(format!("HTTP/1.1 302 Found\r\nlocation: {}\r\ncontent-length: 0\r\n\r\n", provider.url())),
        Answer::Raw("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"keys\"".into()),
        Answer::Raw(large),
        Answer::Raw("\u{16}\u{3}\u{1} this is not HTTP".into()),
    ];
    for answer in bad {
        let failed = gateway.metric(FAILED).await.expect("there");
        provider.answer(answer);
        counts(&gateway, FAILED, failed + 2.0).await;
        let bob = by(&gateway, &key.token(&claims("bob", "viewer", "*")));
        whoami(&bob).await.expect("the keys that were there stay in use");
    }
    provider.answer(keys);
    eventually("they are fetched again", || async { gateway.metric(FETCH_TIME).await.filter(|time| *time > fetched) }).await;
}

/// Scenario: a token expires while a stream is open with it. Guarantee: the stream ends then, and says why; no other one is opened.
#[tokio::test]
async fn a_stream_ends_when_its_token_expires() {
    let key = SigningKey::ed25519("k1");
    let provider = Provider::start(Answer::Keys(jwks(&[&key]))).await;
    let gateway = TestGateway::start_with(|config| {
        trust(config, provider.url());
        config.oidc.leeway = Duration::from_secs(1);
    })
    .await;
    counts(&gateway, FETCHED, 1.0).await;
    let expiry = now() + 4;
    let alice = by(&gateway, &key.token(&changed(claims("alice", "viewer", "*"), &json!({ "exp": expiry }))));
    let expire_time = whoami(&alice).await.expect("not yet").expire_time.expect("it expires");
    let end = expire_time.seconds * 1_000_000 + i64::from(expire_time.nanos) / 1_000;
    assert_eq!(expire_time.seconds.unsigned_abs(), expiry + 1, "with the leeway");
    assert_eq!(end_of(&mut follow(&alice).await).await, "CREDENTIAL_EXPIRED");
    let late = Timestamp::now().micros() - end;
    assert!(late >= 0, "not before its time");
    eprintln!("the stream ended {:?} after its token", Duration::from_micros(late.unsigned_abs()));
    assert_eq!(reason(&whoami(&alice).await.expect_err("it has expired")), "CREDENTIAL_EXPIRED");
}

/// Scenario: one operator has two tokens. Guarantee: limits count the operator's calls, not the tokens'.
#[tokio::test]
async fn limits_hold_an_operator_and_not_its_token() {
    let key = SigningKey::p256("k1");
    let provider = Provider::start(Answer::Keys(jwks(&[&key]))).await;
    let gateway = TestGateway::start_with(|config| {
        trust(config, provider.url());
        config.limits.operator_calls_max = 1;
    })
    .await;
    counts(&gateway, FETCHED, 1.0).await;
    let token = |subject: &str, id: &str| key.token(&changed(claims(subject, "viewer", "*"), &json!({ "jti": id })));
    let open = follow(&by(&gateway, &token("alice", "1"))).await;
    let again = by(&gateway, &token("alice", "2"));
    assert_eq!(reason(&whoami(&again).await.expect_err("one is open")), "OVERLOADED");
    whoami(&by(&gateway, &token("bob", "1"))).await.expect("he has none open");
    drop(open);
    eventually("it is over", || async { whoami(&again).await.ok() }).await;
}

/// Guarantee: keys come over TLS only from whom the authorities of the settings speak for.
#[tokio::test]
async fn keys_over_tls_need_an_authority_that_is_trusted() {
    let (authority, other) = (Authority::new(), Authority::new());
    let key = SigningKey::p256("k1");
    let provider = Provider::start_tls(Answer::Keys(jwks(&[&key])), &authority.server()).await;
    let url = format!("https://localhost:{}/keys?of=tide", provider.address.port());
    let start = async |authorities: &Authority| {
        let ca_file = authorities.write("ca.pem", &authorities.pem);
        TestGateway::start_with(|config| {
            trust(config, url.clone());
            config.oidc.ca_file = ca_file;
            config.oidc.refresh_interval = OFTEN;
        })
        .await
    };
    let token = key.token(&claims("alice", "viewer", "*"));
    let trusting = start(&authority).await;
    counts(&trusting, FETCHED, 1.0).await;
    whoami(&by(&trusting, &token)).await.expect("its keys are there");
    let distrustful = start(&other).await;
    counts(&distrustful, FAILED, 2.0).await;
    assert_eq!(reason(&whoami(&by(&distrustful, &token)).await.expect_err("there are no keys")), "KEYS_UNAVAILABLE");
}

/// Scenario: the gateway is stopped while a call waits for a provider that does not answer. Guarantee: the stop does not wait for it,
/// and the call is told to try again.
#[tokio::test]
async fn a_stop_does_not_wait_for_the_provider() {
    let key = SigningKey::p256("k1");
    let provider = Provider::start(Answer::Keys(jwks(&[&key]))).await;
    let gateway = TestGateway::start_with(|config| {
        trust(config, provider.url());
        config.oidc.refresh_interval = NEVER;
        // Shorter than the provider is waited for.
        config.shutdown.grace = Duration::from_secs(8);
    })
    .await;
    counts(&gateway, FETCHED, 1.0).await;
    provider.answer(Answer::Silence);
    let waiting = by(&gateway, &SigningKey::p256("k2").token(&claims("alice", "viewer", "*")));
    let call = tokio::spawn(async move { whoami(&waiting).await });
    eventually("the provider is asked", || async { (provider.asked() == 2).then_some(()) }).await;
    let begun = Instant::now();
    assert!(gateway.stop().await, "in time");
    eprintln!("stopped after {:?}", begun.elapsed());
    let ended = soon("the call's end", call).await.expect("no panic").expect_err("its key is not known");
    assert_eq!(reason(&ended), "KEYS_UNAVAILABLE");
}

/// Guarantee: why a token is refused is in the log and not in the answer; a gateway whose keys are not there does not start, and says so.
#[tokio::test]
async fn what_is_wrong_is_told_in_the_log() {
    let directory = tempfile::TempDir::new().expect("a directory");
    let file = directory.path().join("jwks.json");
    let key = SigningKey::p256("k1");
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let command = || {
        let mut command = GatewayProcess::command(&directory.path().join("data"), any, any);
        command.args(["--auth-mode=required", "--oidc-issuer", ISSUER, "--oidc-audience", AUDIENCE, "--oidc-jwks"]).arg(&file);
        command
    };
    let mut failed = GatewayProcess::spawn(command());
    assert!(!failed.wait().await.success());
    eventually("it says why", || async { failed.log().contains("cannot get the keys of oidc.jwks").then_some(()) }).await;

    std::fs::write(&file, jwks(&[&key])).expect("written");
    let gateway = GatewayProcess::run(command()).await;
    let elsewhere = changed(claims("alice", "viewer", "*"), &json!({ "iss": "https://elsewhere.example.com" }));
    let refused = whoami(&with_token(gateway.grpc, &key.token(&elsewhere))).await.expect_err("of another issuer");
    assert!(!format!("{refused:?}").contains("issuer"), "{refused:?}");
    let told = || async { gateway.log().contains("https://elsewhere.example.com").then(|| gateway.log()) };
    let log = eventually("it says why", told).await;
    assert!(log.contains("oidc.refused") && !log.contains(&key.token(&elsewhere)), "{log}");
}
