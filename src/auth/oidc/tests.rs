#[path = "../../../tests/it/support/jwt.rs"]
#[allow(dead_code, reason = "shared with the tests of the whole gateway")]
mod jwt;

use super::*;
use crate::config::Config;
use crate::{auth::Role, limits::OperatorLimits, model::LabelSelector};
use jwt::{AUDIENCE, ISSUER, SigningKey, changed, claims as good, encode, hs256, jwks, message, now};
use serde_json::{Value, json};
use std::path::Path;

fn settings(jwks: &Path) -> config::Oidc {
    config::Oidc { issuer: ISSUER.into(), audience: AUDIENCE.into(), jwks: jwks.display().to_string(), ..Config::default().oidc }
}

struct Provider {
    oidc: Oidc,
    file: tempfile::NamedTempFile,
}

impl Provider {
    async fn with(jwks: &str, change: impl FnOnce(&mut config::Oidc)) -> Self {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), jwks).expect("written");
        let mut settings = settings(file.path());
        change(&mut settings);
        let oidc = Oidc::load(&settings, &Metrics::new()).await.expect("it loads").expect("it is on");
        Self { oidc, file }
    }

    async fn of(keys: &[&SigningKey]) -> Self {
        Self::with(&jwks(keys), |_| {}).await
    }

    async fn exchange(&self, keys: &[&SigningKey]) {
        std::fs::write(self.file.path(), jwks(keys)).expect("written");
        self.oidc.fetch().await.expect("they are good");
    }
}

fn operator(grant: &Grant) -> (&str, Role, &LabelSelector) {
    match &grant.principal {
        Principal::Operator(operator) => (&operator.actor, operator.role, &operator.scope),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_good_token_of_each_algorithm_is_an_operator() {
    let keys = [SigningKey::rsa("r", "RS256"), SigningKey::rsa("p", "PS256"), SigningKey::p256("e"), SigningKey::ed25519("d")];
    let provider = Provider::of(&keys.iter().collect::<Vec<_>>()).await;
    for key in &keys {
        let claims = changed(good("alice", "operator", "site=berlin"), &json!({ "jti": "j-1" }));
        let grant = provider.oidc.verify_now(&key.token(&claims)).unwrap_or_else(|refusal| panic!("{}: {refusal}", key.id));
        let berlin = LabelSelector::parse("site=berlin").expect("a selector");
        assert_eq!(operator(&grant), ("oidc/alice", Role::Operator, &berlin));
        assert_eq!((grant.credential.as_str(), grant.revoked.is_some()), ("j-1", true));
        let end = i64::try_from(now() + 3600 + 30).expect("small") * 1_000_000;
        assert!((end - 60_000_000..=end).contains(&grant.expire_time.expect("it expires").micros()), "its exp and the leeway");
    }
}

#[tokio::test]
async fn claims_may_have_other_names_and_forms() {
    let key = SigningKey::ed25519("d");
    let change = |settings: &mut config::Oidc| {
        settings.name_claim = "email".into();
        settings.role_claim = "groups".into();
        settings.scope_claim = String::new();
    };
    let provider = Provider::with(&jwks(&[&key]), change).await;
    let changes = json!({ "aud": ["other", AUDIENCE], "email": "a@example.com", "groups": ["staff", "operator", "viewer", 7], "jti": "j-1",
        "iat": now() as f64 + 20.5, "nbf": now() + 20, "exp": now() - 20, "tidegate_scope": null });
    let grant = provider.oidc.verify_now(&key.token(&changed(good("alice", "", ""), &changes))).expect("within the leeway");
    assert_eq!(operator(&grant), ("oidc/a@example.com", Role::Operator, &LabelSelector::default()));
    assert_eq!(grant.credential, "alice/j-1", "a name may pass to somebody else");
}

/// Each row: what is changed of a good token's claims, and why it is refused.
#[tokio::test]
async fn claims_that_are_not_as_they_must_be_are_refused() {
    let key = SigningKey::p256("e");
    let provider = Provider::of(&[&key]).await;
    let long = "x".repeat(256);
    let rows = [
        (json!({ "iss": "https://sso.example.com/realms/tide/" }), "its issuer is"),
        (json!({ "iss": null }), "its issuer is"),
        (json!({ "iss": [ISSUER] }), "its issuer is"),
        (json!({ "aud": "other" }), "it is for"),
        (json!({ "aud": ["other", "tidegate2"] }), "it is for"),
        (json!({ "aud": null }), "it is for"),
        (json!({ "aud": { "tidegate": AUDIENCE } }), "it is for"),
        (json!({ "exp": now() - 31 }), "it has expired"),
        (json!({ "exp": -1e300 }), "it has expired"),
        (json!({ "exp": null }), "\"exp\" is not"),
        (json!({ "exp": "4102444800" }), "\"exp\" is not"),
        (json!({ "nbf": now() + 60 }), "its nbf is in the future"),
        (json!({ "nbf": false }), "\"nbf\" is not"),
        (json!({ "iat": now() + 60 }), "its iat is in the future"),
        (json!({ "iat": 1e300 }), "its iat is in the future"),
        (json!({ "sub": null }), "\"sub\" is not"),
        (json!({ "sub": "" }), "\"sub\" is not"),
        (json!({ "sub": "a\nb" }), "\"sub\" is not"),
        (json!({ "sub": long }), "\"sub\" is not"),
        (json!({ "sub": 7 }), "\"sub\" is not"),
        (json!({ "jti": 7 }), "\"jti\" is not"),
        (json!({ "tidegate_role": null }), "\"tidegate_role\" is not"),
        (json!({ "tidegate_role": "root" }), "\"tidegate_role\" is not"),
        (json!({ "tidegate_role": "Admin" }), "\"tidegate_role\" is not"),
        (json!({ "tidegate_role": [] }), "\"tidegate_role\" is not"),
        (json!({ "tidegate_role": { "admin": true } }), "\"tidegate_role\" is not"),
        (json!({ "tidegate_scope": null }), "\"tidegate_scope\" is not"),
        (json!({ "tidegate_scope": " " }), "\"tidegate_scope\" is not"),
        (json!({ "tidegate_scope": "site=a,=b" }), "\"tidegate_scope\" is not"),
        (json!({ "tidegate_scope": ["site=a"] }), "\"tidegate_scope\" is not"),
    ];
    for (changes, why) in rows {
        let token = key.token(&changed(good("alice", "viewer", "*"), &changes));
        let refusal = provider.oidc.verify_now(&token).expect_err(&changes.to_string());
        assert!(refusal.to_string().contains(why), "{changes}: {refusal}");
        let told = if why == "it has expired" { "CREDENTIAL_EXPIRED" } else { "CREDENTIAL_INVALID" };
        assert_eq!(provider.oidc.verify(&token).await.expect_err("as before").reason().as_str(), told, "{changes}");
    }
}

/// Each row: a token that is no good, and why.
#[tokio::test]
async fn tokens_that_nobody_has_signed_well_are_refused() {
    let (rsa, p256, ed25519) = (SigningKey::rsa("r", "RS256"), SigningKey::p256("e"), SigningKey::ed25519("d"));
    let stranger = SigningKey::p256("e");
    let provider = Provider::of(&[&rsa, &p256, &ed25519, &SigningKey::p256("e2")]).await;
    let claims = good("alice", "admin", "*");
    let header = |changes: Value| changed(json!({ "alg": "ES256", "kid": "e", "typ": "JWT" }), &changes);
    let signed = |changes: Value| p256.sign(&header(changes), &claims);
    let modulus = rsa.jwk()["n"].as_str().expect("a text").to_owned();
    let token = p256.token(&claims);
    let (signed_part, signature) = token.rsplit_once('.').expect("three parts");
    // The header with crit: null: `changed` would take it away.
    let crit_null = json!({ "alg": "ES256", "kid": "e", "crit": null });
    let rows = [
        (format!("{}.", message(&header(json!({ "alg": "none" })), &claims)), "its algorithm is \"none\""),
        (format!("{}.", message(&header(json!({ "alg": "nOnE" })), &claims)), "its algorithm is \"nOnE\""),
        (hs256(modulus.as_bytes(), &header(json!({ "alg": "HS256", "kid": "r" })), &claims), "its algorithm is \"HS256\""),
        (hs256(modulus.as_bytes(), &header(json!({ "alg": "RS256", "kid": "r" })), &claims), "its signature"),
        (signed(json!({ "alg": "ES384" })), "its algorithm is \"ES384\""),
        (signed(json!({ "alg": "RS256" })), "is not for its algorithm"),
        (signed(json!({ "alg": "ES256", "kid": "r" })), "is not for its algorithm"),
        (signed(json!({ "alg": "EdDSA", "kid": "d" })), "its signature"),
        (rsa.sign(&header(json!({ "alg": "PS256", "kid": "r" })), &claims), "its signature"),
        (stranger.token(&claims), "its signature"),
        (format!("{signed_part}."), "its signature"),
        (format!("{}.{signature}", message(&header(json!({})), &good("mallory", "admin", "*"))), "its signature"),
        (signed(json!({ "kid": "unknown" })), "no key of the issuer has its kid"),
        (signed(json!({ "kid": null })), "several keys"),
        (signed(json!({ "kid": 7 })), "its header is not"),
        (signed(json!({ "crit": ["exp"] })), "critical"),
        (p256.sign(&crit_null, &claims), "critical"),
        (signed(json!({ "typ": "logout+jwt" })), "of the type \"logout+jwt\""),
        (format!("{token}.x"), "not a signed JWT"),
        (format!("a.b.{token}"), "not a signed JWT"),
        (format!("{token}="), "not base64url"),
        (format!("{}.{signature}", encode("{}")), "not a signed JWT"),
        (p256.sign(&header(json!({})), &json!("text")), "its claims are not a JSON object"),
        (p256.token(&changed(claims.clone(), &json!({ "more": "x".repeat(TOKEN_BYTES_MAX) }))), "bytes: at most"),
        (".".to_owned(), "not a signed JWT"),
    ];
    for (token, why) in rows {
        let refusal = provider.oidc.verify_now(&token).expect_err(why);
        assert!(refusal.to_string().contains(why), "{why}: {refusal}");
    }
    provider.oidc.verify_now(&token).expect("the one that is not changed is good");
    provider.oidc.verify_now(&signed(json!({ "typ": "at+JWT" }))).expect("an access token is good");
    let header = json!({ "alg": "RS256" });
    provider.oidc.verify_now(&rsa.sign(&header, &claims)).expect("without a kid it is of the only key that fits");
}

#[test]
fn keys_that_cannot_be_used_are_passed_over() {
    let key = SigningKey::p256("e");
    let with = |changes: Value| changed(key.jwk(), &changes);
    let unusable = [
        json!({ "kty": "oct", "k": encode("secret"), "alg": "HS256" }),
        with(json!({ "use": "enc" })),
        with(json!({ "key_ops": ["encrypt"] })),
        with(json!({ "alg": "ES384" })),
        with(json!({ "alg": "EdDSA" })),
        with(json!({ "crv": "P-384" })),
        with(json!({ "x": encode([1; 31]) })),
        with(json!({ "y": null })),
        with(json!({ "kid": 7 })),
        json!({ "kty": "RSA", "n": encode([255; 128]), "e": "AQAB" }),
        json!("text"),
    ];
    for key in &unusable {
        let set = json!({ "keys": [key] }).to_string();
        assert!(matches!(KeySet::parse(set.as_bytes()), Err(KeySetError::Unusable(1))), "{key}");
    }
    let mut all = unusable.to_vec();
    all.push(with(json!({ "alg": "ES256", "use": "sig", "key_ops": ["verify"] })));
    assert_eq!(KeySet::parse(json!({ "keys": all }).to_string().as_bytes()).expect("one is good").len(), 1);
    for bad in ["", "[]", "{}", "{\"keys\": {}}"] {
        assert!(matches!(KeySet::parse(bad.as_bytes()), Err(KeySetError::Json(_))), "{bad}");
    }
    assert!(matches!(KeySet::parse(b"{\"keys\": []}"), Err(KeySetError::Unusable(0))));
    let many = json!({ "keys": vec![key.jwk(); 101] }).to_string();
    assert!(matches!(KeySet::parse(many.as_bytes()), Err(KeySetError::TooMany(101))));
}

#[tokio::test]
async fn a_token_is_verified_once_and_a_subject_has_one_account_of_its_calls() {
    let key = SigningKey::ed25519("d");
    let provider = Provider::of(&[&key]).await;
    let token = |id: &str, subject: &str| key.token(&changed(good(subject, "viewer", "*"), &json!({ "jti": id })));
    let (first, second) = (token("1", "alice"), token("2", "alice"));
    assert!(provider.oidc.known(&first).is_none());
    let grant = provider.oidc.verify(&first).await.expect("good");
    let again = provider.oidc.known(&first).expect("it was verified");
    assert!(Arc::ptr_eq(&grant, &again) && Arc::ptr_eq(&grant, &provider.oidc.verify(&first).await.expect("good")));
    let other = provider.oidc.verify(&second).await.expect("good");
    assert!(!Arc::ptr_eq(&grant, &other) && Arc::ptr_eq(&grant.usage, &other.usage));
    let bob = provider.oidc.verify(&token("3", "bob")).await.expect("good");
    assert!(!Arc::ptr_eq(&grant.usage, &bob.usage));

    let mut limits = Config::default().limits;
    limits.operator_calls_max = 1;
    let limits = OperatorLimits::new(&limits, &Metrics::new());
    let _open = limits.open(&grant.usage).expect("the first call");
    limits.open(&other.usage).expect_err("with another token of the same subject");
    limits.open(&bob.usage).expect("of another one");
}

#[tokio::test]
async fn tokens_of_a_key_that_is_gone_are_void_and_those_of_others_are_not() {
    let (old, new) = (SigningKey::p256("old"), SigningKey::p256("new"));
    let provider = Provider::of(&[&old, &new]).await;
    let claims = good("alice", "viewer", "*");
    let (of_old, of_new) = (old.token(&claims), new.token(&claims));
    let (ended, stays) = (provider.oidc.verify(&of_old).await.expect("good"), provider.oidc.verify(&of_new).await.expect("good"));
    provider.exchange(&[&new]).await;
    ended.check().expect_err("its key is gone");
    assert!(provider.oidc.known(&of_old).is_none());
    stays.check().expect("its key is there");
    assert!(provider.oidc.known(&of_new).is_some());
    // Another key by the same id is another key.
    provider.exchange(&[&SigningKey::p256("new")]).await;
    stays.check().expect_err("its key is gone");
}

#[tokio::test]
async fn what_is_not_needed_is_forgotten() {
    let key = SigningKey::ed25519("d");
    let provider = Provider::with(&jwks(&[&key]), |settings| settings.leeway = Duration::ZERO).await;
    let token = |subject: &str, exp: f64| key.token(&changed(good(subject, "viewer", "*"), &json!({ "exp": exp })));
    let soon = Timestamp::now().micros() as f64 / 1e6 + 2.0;
    provider.oidc.verify(&token("alice", soon)).await.expect("good");
    let held = provider.oidc.verify(&token("bob", soon)).await.expect("good");
    provider.oidc.verify(&token("carol", soon + 3600.0)).await.expect("good");
    while held.check().is_ok() {
        tokio::task::yield_now().await;
    }
    provider.oidc.fetch().await.expect("the same keys");
    let known = provider.oidc.0.known.read();
    assert_eq!((known.tokens.len(), known.usages.len()), (2, 2), "an expired token without a call is gone");
}

#[tokio::test]
async fn bad_keys_never_take_the_place_of_good_ones() {
    let key = SigningKey::ed25519("d");
    let provider = Provider::of(&[&key]).await;
    for bad in ["", "{\"keys\": []}", "<html>"] {
        std::fs::write(provider.file.path(), bad).expect("written");
        provider.oidc.fetch().await.expect_err(bad);
    }
    provider.oidc.verify(&key.token(&good("alice", "viewer", "*"))).await.expect("the key is still there");
}

#[tokio::test]
async fn a_start_needs_the_files_that_are_named() {
    let mut settings = settings(Path::new("/nonexistent/jwks.json"));
    let missing = Oidc::load(&settings, &Metrics::new()).await.err().expect("there is no file");
    assert!(matches!(missing, OidcError::Source(SourceError::File { .. })), "{missing:?}");
    settings.jwks = "https://127.0.0.1:1/keys".into();
    settings.ca_file = "/nonexistent/ca.pem".into();
    let missing = Oidc::load(&settings, &Metrics::new()).await.err().expect("there is no file");
    assert!(matches!(missing, OidcError::Source(SourceError::Authorities { .. })), "{missing:?}");
    settings.ca_file = "".into();
    let oidc = Oidc::load(&settings, &Metrics::new()).await.expect("an address may answer later").expect("it is on");
    let early = oidc.verify(&SigningKey::p256("e").token(&good("alice", "viewer", "*"))).await.expect_err("there are no keys");
    assert_eq!(early.reason().as_str(), "KEYS_UNAVAILABLE");
}
