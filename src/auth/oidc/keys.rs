//! The keys of an issuer (JWKS, RFC 7517), and what a good signature by one of them is (RFC 7518, RFC 8037).

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
    VerificationAlgorithm,
};
use serde::Deserialize;
use std::{ops::RangeInclusive, sync::Arc};

/// How many keys an issuer may have; it has a few.
const KEYS_MAX: usize = 100;
/// The sizes of RSA moduli that are taken: 2,048 to 8,192 bits.
const MODULUS_BYTES: RangeInclusive<usize> = 256..=1024;
/// The size of a coordinate on P-256, and of a key on Curve25519.
const POINT_BYTES: usize = 32;
/// What is before the coordinates of a point that is not compressed (SEC 1, 2.3.3).
const UNCOMPRESSED: u8 = 4;

/// How a token is signed (`alg`). Only signatures by a key pair: whoever has the keys that are published here can make none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    Rs256,
    Ps256,
    Es256,
    EdDsa,
}

impl Algorithm {
    /// By its registered name; `None` for all others, among them `none` and those with a shared secret.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "PS256" => Self::Ps256,
            "ES256" => Self::Es256,
            // The second is its name since RFC 9864.
            "EdDSA" | "Ed25519" => Self::EdDsa,
            _ => return None,
        })
    }
}

/// A public key.
#[derive(Debug, PartialEq, Eq)]
pub struct Key {
    id: Option<String>,
    // The one that it is for, if it says so.
    algorithm: Option<Algorithm>,
    material: Material,
}

#[derive(Debug, PartialEq, Eq)]
enum Material {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    P256(Vec<u8>),
    Ed25519(Vec<u8>),
}

/// Why a set of keys can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KeySetError {
    /// It is not the JSON of a set.
    #[error("this is not a JSON Web Key Set")]
    Json(#[from] serde_json::Error),
    /// It has more keys than are looked at.
    #[error("it has {0} keys: at most {KEYS_MAX} are taken")]
    TooMany(usize),
    /// No signature could be verified by it.
    #[error("none of its {0} keys can be used: it needs one of RS256, PS256, ES256 or EdDSA that is for signatures")]
    Unusable(usize),
}

/// Why no key is a token's.
#[derive(Debug, PartialEq, Eq)]
pub enum NoKey {
    /// None has its id.
    Unknown,
    /// What has its id is not for its algorithm.
    Unfit,
    /// Several could be its.
    Ambiguous,
}

/// All keys of an issuer that can be used; never empty.
#[derive(Debug)]
pub struct KeySet(Vec<Arc<Key>>);

/// A key as it comes (RFC 7517 section 4).
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    #[serde(rename = "use")]
    usage: Option<String>,
    key_ops: Option<Vec<String>>,
    alg: Option<String>,
    kid: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl KeySet {
    /// Reads a set. Keys that can't be used, whatever they are, are passed over (RFC 7517 section 5).
    pub fn parse(json: &[u8]) -> Result<Self, KeySetError> {
        #[derive(Deserialize)]
        struct Jwks {
            keys: Vec<serde_json::Value>,
        }
        let Jwks { keys } = serde_json::from_slice(json)?;
        let all = keys.len();
        if all > KEYS_MAX {
            return Err(KeySetError::TooMany(all));
        }
        let keys: Vec<_> = keys.into_iter().filter_map(|key| Key::of(serde_json::from_value(key).ok()?).map(Arc::new)).collect();
        if keys.is_empty() { Err(KeySetError::Unusable(all)) } else { Ok(Self(keys)) }
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has the same key.
    pub fn contains(&self, key: &Key) -> bool {
        self.0.iter().any(|own| **own == *key)
    }

    /// Whether `other` has all of them.
    pub fn are_in(&self, other: &Self) -> bool {
        self.0.iter().all(|key| other.contains(key))
    }

    /// The key of a token. One without an id has the only key that fits.
    pub fn find(&self, algorithm: Algorithm, id: Option<&str>) -> Result<&Arc<Key>, NoKey> {
        let named = |key: &&Arc<Key>| id.is_none() || key.id.as_deref() == id;
        let mut fitting = self.0.iter().filter(named).filter(|key| key.fits(algorithm));
        match (fitting.next(), fitting.next()) {
            (Some(key), None) => Ok(key),
            (Some(_), Some(_)) => Err(NoKey::Ambiguous),
            (None, _) if id.is_some() && !self.0.iter().any(|key| named(&key)) => Err(NoKey::Unknown),
            (None, _) => Err(NoKey::Unfit),
        }
    }
}

impl Key {
    fn of(jwk: Jwk) -> Option<Self> {
        let signs = jwk.usage.as_deref().is_none_or(|usage| usage == "sig");
        let verifies = jwk.key_ops.as_ref().is_none_or(|operations| operations.iter().any(|operation| operation == "verify"));
        if !signs || !verifies {
            return None;
        }
        let bytes = |text: &Option<String>| URL_SAFE_NO_PAD.decode(text.as_ref()?).ok();
        let point = |text: &Option<String>| bytes(text).filter(|bytes| bytes.len() == POINT_BYTES);
        let material = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("RSA", _) => {
                let (n, e) = (number(bytes(&jwk.n)?), number(bytes(&jwk.e)?));
                MODULUS_BYTES.contains(&n.len()).then_some(Material::Rsa { n, e })?
            }
            ("EC", Some("P-256")) => Material::P256([vec![UNCOMPRESSED], point(&jwk.x)?, point(&jwk.y)?].concat()),
            ("OKP", Some("Ed25519")) => Material::Ed25519(point(&jwk.x)?),
            _ => return None,
        };
        let algorithm = match jwk.alg {
            Some(name) => Some(Algorithm::parse(&name)?),
            None => None,
        };
        let key = Self { id: jwk.kid, algorithm: None, material };
        // One that says that it is for what it can't do is for nothing.
        algorithm.is_none_or(|algorithm| key.fits(algorithm)).then_some(Self { algorithm, ..key })
    }

    /// Whether a signature of `algorithm` can be by it.
    fn fits(&self, algorithm: Algorithm) -> bool {
        let kind = match self.material {
            Material::Rsa { .. } => matches!(algorithm, Algorithm::Rs256 | Algorithm::Ps256),
            Material::P256(_) => algorithm == Algorithm::Es256,
            Material::Ed25519(_) => algorithm == Algorithm::EdDsa,
        };
        kind && self.algorithm.is_none_or(|own| own == algorithm)
    }

    /// Whether `signature` is its own of `message`.
    pub fn has_signed(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        let by_point =
            |how: &'static dyn VerificationAlgorithm, point: &[u8]| UnparsedPublicKey::new(how, point).verify(message, signature);
        let verified = match (&self.material, algorithm) {
            (Material::Rsa { n, e }, Algorithm::Rs256) => {
                RsaPublicKeyComponents { n, e }.verify(&RSA_PKCS1_2048_8192_SHA256, message, signature)
            }
            (Material::Rsa { n, e }, Algorithm::Ps256) => {
                RsaPublicKeyComponents { n, e }.verify(&RSA_PSS_2048_8192_SHA256, message, signature)
            }
            (Material::P256(point), Algorithm::Es256) => by_point(&ECDSA_P256_SHA256_FIXED, point),
            (Material::Ed25519(point), Algorithm::EdDsa) => by_point(&ED25519, point),
            _ => return false,
        };
        verified.is_ok()
    }
}

/// A number without the zeros before it, which some issuers write although RFC 7518 section 2 wants none.
fn number(bytes: Vec<u8>) -> Vec<u8> {
    bytes.into_iter().skip_while(|byte| *byte == 0).collect()
}
