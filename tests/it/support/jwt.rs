//! An issuer of tokens: key pairs, their public side as JWKs, and tokens signed by them.
//!
//! The crate's own tests use it, too, so that it is of nothing but libraries.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    hmac,
    rand::SystemRandom,
    rsa::{KeyPair as RsaKeyPair, PublicKeyComponents},
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaEncoding},
};
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// ring makes no RSA keys. This one is for nothing else.
const RSA_KEY: &[u8] = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/rsa_2048.pk8"));

pub const ISSUER: &str = "https://sso.example.com/realms/tide";
pub const AUDIENCE: &str = "tidegate";

enum Pair {
    Rsa(Box<RsaKeyPair>, &'static str),
    P256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

/// A key pair with an id.
pub struct SigningKey {
    pub id: String,
    pair: Pair,
}

impl SigningKey {
    /// With the one RSA key that there is, for `RS256` or `PS256`.
    pub fn rsa(id: &str, algorithm: &'static str) -> Self {
        Self { id: id.into(), pair: Pair::Rsa(Box::new(RsaKeyPair::from_pkcs8(RSA_KEY).expect("a key")), algorithm) }
    }

    pub fn p256(id: &str) -> Self {
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("random numbers");
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.as_ref(), &random).expect("a key");
        Self { id: id.into(), pair: Pair::P256(pair) }
    }

    pub fn ed25519(id: &str) -> Self {
        let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("random numbers");
        Self { id: id.into(), pair: Pair::Ed25519(Ed25519KeyPair::from_pkcs8(key.as_ref()).expect("a key")) }
    }

    pub fn algorithm(&self) -> &'static str {
        match &self.pair {
            Pair::Rsa(_, algorithm) => algorithm,
            Pair::P256(_) => "ES256",
            Pair::Ed25519(_) => "EdDSA",
        }
    }

    /// Its public side.
    pub fn jwk(&self) -> Value {
        match &self.pair {
            Pair::Rsa(pair, _) => {
                let public = PublicKeyComponents::<Vec<u8>>::from(pair.public());
                json!({ "kty": "RSA", "kid": self.id, "use": "sig", "n": encode(public.n), "e": encode(public.e) })
            }
            Pair::P256(pair) => {
                let point = pair.public_key().as_ref();
                json!({ "kty": "EC", "crv": "P-256", "kid": self.id, "x": encode(&point[1..33]), "y": encode(&point[33..]) })
            }
            Pair::Ed25519(pair) => json!({ "kty": "OKP", "crv": "Ed25519", "kid": self.id, "x": encode(pair.public_key()) }),
        }
    }

    /// A token of its own.
    pub fn token(&self, claims: &Value) -> String {
        self.sign(&json!({ "alg": self.algorithm(), "kid": self.id, "typ": "JWT" }), claims)
    }

    /// Signs as it can, whatever the header says.
    pub fn sign(&self, header: &Value, claims: &Value) -> String {
        let message = message(header, claims);
        let (random, bytes) = (SystemRandom::new(), message.as_bytes());
        let signature = match &self.pair {
            Pair::Rsa(pair, algorithm) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                let how: &dyn RsaEncoding = if *algorithm == "PS256" { &RSA_PSS_SHA256 } else { &RSA_PKCS1_SHA256 };
                pair.sign(how, &random, bytes, &mut signature).expect("signed");
                encode(signature)
            }
            Pair::P256(pair) => encode(pair.sign(&random, bytes).expect("signed")),
            Pair::Ed25519(pair) => encode(pair.sign(bytes)),
        };
        format!("{message}.{signature}")
    }
}

/// The JWKS of several keys.
pub fn jwks(keys: &[&SigningKey]) -> String {
    json!({ "keys": keys.iter().map(|key| key.jwk()).collect::<Vec<_>>() }).to_string()
}

/// A token that is signed by a shared secret.
pub fn hs256(secret: &[u8], header: &Value, claims: &Value) -> String {
    let message = message(header, claims);
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), message.as_bytes());
    format!("{message}.{}", encode(tag))
}

/// What of a token is signed.
pub fn message(header: &Value, claims: &Value) -> String {
    format!("{}.{}", encode(header.to_string()), encode(claims.to_string()))
}

/// The claims of a good token of an hour.
pub fn claims(subject: &str, role: &str, scope: &str) -> Value {
    let now = now();
    json!({
        "iss": ISSUER, "aud": AUDIENCE, "sub": subject, "iat": now, "exp": now + 3600,
        "tidegate_role": role, "tidegate_scope": scope,
    })
}

/// The same with some of them changed; null takes one away.
pub fn changed(mut claims: Value, changes: &Value) -> Value {
    for (name, value) in changes.as_object().expect("an object") {
        let all = claims.as_object_mut().expect("an object");
        match value {
            Value::Null => all.remove(name),
            value => all.insert(name.clone(), value.clone()),
        };
    }
    claims
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

pub fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}
