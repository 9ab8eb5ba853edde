//! A token of an issuer (JWT, RFC 7519, signed as RFC 7515 says), and what is asked of it (RFC 8725).

use super::keys::Algorithm;
use crate::{
    auth::Role,
    config,
    model::{LabelSelector, Timestamp},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

/// How long a token may be.
pub const TOKEN_BYTES_MAX: usize = 8 << 10;
/// How long a subject, a name or a token's id may be. OpenID Connect Core 1.0, section 2, allows as much of a subject.
const TEXT_BYTES_MAX: usize = 255;
const SHOWN_CHARS_MAX: usize = 64;
/// The scope of every device, for issuers that leave out claims that are empty.
const EVERY_DEVICE: &str = "*";

/// Why a token is not taken. `Display` is for the gateway's log: its caller is not told.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("it has {0} bytes: at most {TOKEN_BYTES_MAX} are taken")]
    TooLong(usize),
    #[error("it is not a signed JWT: {0}")]
    Malformed(&'static str),
    #[error("its algorithm is {0:?}, which is not taken")]
    Algorithm(String),
    #[error("its header is critical of what is not understood (crit)")]
    Critical,
    #[error("it is a token of the type {0:?}, which is for something else")]
    Type(String),
    #[error("no key of the issuer has its kid {0:?}")]
    UnknownKey(String),
    #[error("the issuer's key is not for its algorithm")]
    UnfitKey,
    #[error("several keys of the issuer could be its own, and it does not say which (kid)")]
    AmbiguousKey,
    #[error("its signature is not the issuer's")]
    Signature,
    #[error("its issuer is {0}, which is not oidc.issuer")]
    Issuer(String),
    #[error("it is for {0}, not for oidc.audience")]
    Audience(String),
    #[error("it has expired")]
    Expired,
    #[error("its {0} is in the future")]
    Early(&'static str),
    #[error("its claim {name:?} is not as it must be: {must}")]
    Claim { name: String, must: &'static str },
    #[error("the issuer's keys were never fetched, or not since it has new ones")]
    KeysUnavailable,
}

/// A token whose signature nobody has looked at.
pub struct Jwt<'a> {
    pub algorithm: Algorithm,
    pub key_id: Option<String>,
    /// What is signed.
    pub message: &'a [u8],
    pub signature: Vec<u8>,
    payload: Vec<u8>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    typ: Option<String>,
    // Also when it is null.
    #[serde(default, deserialize_with = "some")]
    crit: Option<Value>,
}

fn some<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl<'a> Jwt<'a> {
    /// Takes a token apart. Keys that its header brings or points to are not looked at.
    pub fn parse(token: &'a str) -> Result<Self, Refusal> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(Refusal::TooLong(token.len()));
        }
        let three = || Refusal::Malformed("it has not three parts");
        let (message, signature) = token.rsplit_once('.').ok_or_else(three)?;
        let (header, payload) = message.split_once('.').filter(|(_, payload)| !payload.contains('.')).ok_or_else(three)?;
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| Refusal::Malformed("a part is not base64url"));
        let header: Header =
            serde_json::from_slice(&decode(header)?).map_err(|_| Refusal::Malformed("its header is not a JSON object with alg"))?;
        let algorithm = Algorithm::parse(&header.alg).ok_or_else(|| Refusal::Algorithm(shown(&header.alg)))?;
        if header.crit.is_some() {
            return Err(Refusal::Critical);
        }
        if let Some(kind) = header.typ.filter(|kind| !is_for_callers(kind)) {
            return Err(Refusal::Type(shown(&kind)));
        }
        let (payload, signature) = (decode(payload)?, decode(signature)?);
        Ok(Self { algorithm, key_id: header.kid, message: message.as_bytes(), signature, payload })
    }

    /// What it says, when that is as `wanted`; to be asked when the signature is good.
    pub fn claims(&self, wanted: &config::Oidc, now: Timestamp) -> Result<Claims, Refusal> {
        let all: Map<String, Value> =
            serde_json::from_slice(&self.payload).map_err(|_| Refusal::Malformed("its claims are not a JSON object"))?;
        let all = All(&all);
        match all.0.get("iss") {
            Some(Value::String(issuer)) if *issuer == wanted.issuer => {}
            other => return Err(Refusal::Issuer(other.unwrap_or(&Value::Null).to_string())),
        }
        let audience = all.0.get("aud").unwrap_or(&Value::Null);
        let is_wanted = |one: &Value| one.as_str() == Some(wanted.audience.as_str());
        if !is_wanted(audience) && !audience.as_array().is_some_and(|several| several.iter().any(is_wanted)) {
            return Err(Refusal::Audience(audience.to_string()));
        }
        let expire_time = all.time("exp")?.ok_or_else(|| refused("exp", "there, and seconds since 1970"))?.saturating_add(wanted.leeway);
        if expire_time <= now {
            return Err(Refusal::Expired);
        }
        for name in ["nbf", "iat"] {
            if all.time(name)?.is_some_and(|time| time > now.saturating_add(wanted.leeway)) {
                return Err(Refusal::Early(name));
            }
        }
        let id = if all.0.contains_key("jti") { Some(all.text("jti")?.to_owned()) } else { None };
        let subject = all.text("sub")?.to_owned();
        let name = all.text(&wanted.name_claim)?.to_owned();
        let (role, scope) = (all.role(&wanted.role_claim)?, all.scope(&wanted.scope_claim)?);
        Ok(Claims { subject, name, id, role, scope, expire_time })
    }
}

/// As much of what a stranger says as the log has room for.
pub fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS_MAX).collect()
}

/// ID tokens (`JWT`, or nothing) and access tokens (RFC 9068). A logout token or a security event is signed by the same keys.
fn is_for_callers(kind: &str) -> bool {
    let kind = kind.to_ascii_lowercase();
    matches!(kind.strip_prefix("application/").unwrap_or(&kind), "jwt" | "at+jwt")
}

fn refused(name: &str, must: &'static str) -> Refusal {
    Refusal::Claim { name: name.to_owned(), must }
}

/// What a good token says.
#[derive(Debug)]
pub struct Claims {
    /// Who, as the issuer knows it: never given to anybody else.
    pub subject: String,
    /// Who, for people.
    pub name: String,
    /// The token's id, where it has one.
    pub id: Option<String>,
    /// What it may do.
    pub role: Role,
    /// With which devices.
    pub scope: LabelSelector,
    /// Until when, with the leeway.
    pub expire_time: Timestamp,
}

struct All<'a>(&'a Map<String, Value>);

impl All<'_> {
    fn text(&self, name: &str) -> Result<&str, Refusal> {
        let text = self.0.get(name).and_then(Value::as_str);
        text.filter(|text| (1..=TEXT_BYTES_MAX).contains(&text.len()) && !text.contains(char::is_control))
            .ok_or_else(|| refused(name, "a text of 1 to 255 bytes without control characters"))
    }

    /// A NumericDate (RFC 7519 section 2): seconds, perhaps with a fraction.
    fn time(&self, name: &'static str) -> Result<Option<Timestamp>, Refusal> {
        let Some(value) = self.0.get(name) else { return Ok(None) };
        let seconds = value.as_f64().ok_or_else(|| refused(name, "seconds since 1970"))?;
        // Saturates.
        let micros = ((seconds * 1e6) as i64).clamp(Timestamp::MIN.micros(), Timestamp::MAX.micros());
        Ok(Timestamp::from_micros(micros))
    }

    /// A role, or several of which the highest counts: each may do what those below it may. A list may have other words, too.
    fn role(&self, name: &str) -> Result<Role, Refusal> {
        let role = match self.0.get(name) {
            Some(Value::String(role)) => Role::from_name(role),
            Some(Value::Array(several)) => several.iter().filter_map(Value::as_str).filter_map(Role::from_name).max(),
            _ => None,
        };
        role.ok_or_else(|| refused(name, "viewer, operator or admin (oidc.role_claim)"))
    }

    /// A selector. A token without it is refused rather than let to every device: issuers leave out what is not set for a user.
    fn scope(&self, name: &str) -> Result<LabelSelector, Refusal> {
        if name.is_empty() {
            return Ok(LabelSelector::default());
        }
        let scope = match self.0.get(name).and_then(Value::as_str) {
            Some(EVERY_DEVICE) => Some(LabelSelector::default()),
            // An attribute that is there and empty was most likely forgotten.
            Some(text) if !text.trim().is_empty() => LabelSelector::parse(text).ok(),
            _ => None,
        };
        scope.ok_or_else(|| refused(name, "a label selector, or * for every device (oidc.scope_claim)"))
    }
}
