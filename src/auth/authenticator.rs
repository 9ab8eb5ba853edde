//! Finds out who calls.
//!
//! What was once looked up is kept at hand, so that a call costs a hash and a look into a map. A revocation makes that void:
//! the store numbers them, and each gateway looks at those that it has not seen, at once when it is told, and each second.

use super::{Grant, Oidc, Operator, Presented, Principal, Role};
use crate::{
    error::{Error, Failure},
    model::LabelSelector,
    store::{CredentialKind, CredentialRow, DeviceKey, OperatorKey, Store, StoreError},
    tls::PeerCertificate,
};
use http::{Extensions, HeaderMap, header::AUTHORIZATION};
use parking_lot::RwLock;
use std::{collections::HashMap, sync::Arc};
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;

/// From how many credentials at hand on those that no call is open with are forgotten.
const KNOWN_MAX: usize = 100_000;
/// How many credentials are looked up at once: guessing must not keep others from the database.
const LOOKUPS_MAX: usize = 16;
/// How often a lookup begins anew because something was revoked meanwhile.
const TRIES_MAX: usize = 5;

/// Finds out who a caller is. Cheap to clone: all clones are one.
#[derive(Clone)]
pub struct Authenticator(Arc<Shared>);

struct Shared {
    // None: nobody is asked.
    store: Option<Store>,
    // None: only tokens of the gateway's own are taken.
    oidc: Option<Oidc>,
    nobody: Arc<Grant>,
    known: RwLock<Cache>,
    lookups: Semaphore,
    /// The last revocation that was seen.
    seen: Mutex<i64>,
}

#[derive(Default)]
struct Cache {
    by_id: HashMap<String, Known>,
    // Counts the times that something was revoked.
    generation: u64,
    // Twice how many were left when some were forgotten last: each is looked at a bounded number of times.
    sweep_at: usize,
}

struct Known {
    kind: CredentialKind,
    hash: Vec<u8>,
    grant: Arc<Grant>,
}

/// What is known at once of a caller.
pub enum Identity {
    /// Who it is.
    Known(Arc<Grant>),
    /// It has to be looked up.
    Unknown(String),
}

impl Authenticator {
    /// One that asks nobody who they are.
    pub fn open() -> Self {
        Self::new(None, None, 0, Principal::Open)
    }

    /// One that asks everybody, for what `store` holds, or for a token of the provider that `oidc` knows.
    pub async fn required(store: Store, oidc: Option<Oidc>) -> Result<Self, StoreError> {
        let seen = store.last_revocation().await?;
        Ok(Self::new(Some(store), oidc, seen, Principal::Anonymous))
    }

    fn new(store: Option<Store>, oidc: Option<Oidc>, seen: i64, nobody: Principal) -> Self {
        Self(Arc::new(Shared {
            store,
            oidc,
            nobody: Arc::new(Grant::without_credential(nobody)),
            known: RwLock::default(),
            lookups: Semaphore::new(LOOKUPS_MAX),
            seen: Mutex::new(seen),
        }))
    }

    /// Who makes a request, as far as that is known without asking the store. A token counts more than a certificate.
    pub fn identify(&self, headers: &HeaderMap, extensions: &Extensions) -> Result<Identity, Error> {
        if self.0.store.is_none() {
            return Ok(Identity::Known(self.0.nobody.clone()));
        }
        let Some(token) = bearer_token(headers)? else {
            return match extensions.get::<Arc<PeerCertificate>>() {
                Some(peer) => Grant::of_certificate(peer).and_then(good).map(Identity::Known),
                None => Ok(Identity::Known(self.0.nobody.clone())),
            };
        };
        if let Some(oidc) = self.provider_of(token) {
            return match oidc.known(token) {
                Some(grant) => good(grant).map(Identity::Known),
                None => Ok(Identity::Unknown(token.to_owned())),
            };
        }
        let presented = Presented::parse(token).ok_or(Error::CredentialInvalid)?;
        match self.0.known.read().by_id.get(presented.id) {
            Some(known) if presented.is(known.kind, &known.hash) => good(known.grant.clone()).map(Identity::Known),
            Some(_) => Err(Error::CredentialInvalid),
            None => Ok(Identity::Unknown(token.to_owned())),
        }
    }

    /// Looks up whose a token is, or verifies it.
    pub async fn look_up(&self, token: &str) -> Result<Arc<Grant>, Failure> {
        if let Some(oidc) = self.provider_of(token) {
            return Ok(good(oidc.verify(token).await?)?);
        }
        let (Some(store), Some(presented)) = (&self.0.store, Presented::parse(token)) else {
            return Err(Error::CredentialInvalid.into());
        };
        let _permit = self.0.lookups.acquire().await.expect("the semaphore is never closed");
        for _ in 0..TRIES_MAX {
            let generation = self.0.known.read().generation;
            let row = store.credential(presented.id).await?.filter(|row| presented.is(row.kind, &row.secret_hash));
            let Some(row) = row else { break };
            let Some(principal) = principal(store, &row).await? else { break };
            let revoked = Some(CancellationToken::new());
            let grant =
                Arc::new(Grant { principal, credential: row.id.clone(), expire_time: row.expire_time, revoked, usage: Arc::default() });
            if let Some(grant) = self.learn(generation, Known { kind: row.kind, hash: row.secret_hash, grant }) {
                return Ok(good(grant)?);
            }
        }
        Err(Error::CredentialInvalid.into())
    }

    /// Who knows a token that is not the gateway's own.
    fn provider_of(&self, token: &str) -> Option<&Oidc> {
        self.0.oidc.as_ref().filter(|_| Oidc::is_jwt(token))
    }

    /// Keeps what was looked up, unless something was revoked since: perhaps this.
    fn learn(&self, generation: u64, new: Known) -> Option<Arc<Grant>> {
        let mut known = self.0.known.write();
        if known.generation != generation {
            return None;
        }
        if known.by_id.len() >= known.sweep_at.max(KNOWN_MAX) {
            known.by_id.retain(|_, known| is_in_use(&known.grant));
            known.sweep_at = 2 * known.by_id.len();
        }
        // Somebody else may have looked it up meanwhile: all must share one.
        Some(known.by_id.entry(new.grant.credential.clone()).or_insert(new).grant.clone())
    }

    /// Ends what was begun with credentials that were revoked since this was last called.
    pub async fn catch_up(&self) -> Result<(), StoreError> {
        let Some(store) = &self.0.store else { return Ok(()) };
        let mut seen = self.0.seen.lock().await;
        let revocations = store.revocations_after(*seen).await?;
        let Some((last, _)) = revocations.last() else { return Ok(()) };
        *seen = *last;
        let mut known = self.0.known.write();
        known.generation += 1;
        for (_, credential) in &revocations {
            if let Some(Known { grant, .. }) = known.by_id.remove(credential) {
                grant.revoked.iter().for_each(CancellationToken::cancel);
            }
        }
        Ok(())
    }
}

/// Whether a call is open with it: each holds it, besides the map.
fn is_in_use(grant: &Arc<Grant>) -> bool {
    Arc::strong_count(grant) > 1
}

fn good(grant: impl Into<Arc<Grant>>) -> Result<Arc<Grant>, Error> {
    let grant = grant.into();
    grant.check().map(|()| grant)
}

/// Whose a credential is; `None` when its owner is gone.
async fn principal(store: &Store, row: &CredentialRow) -> Result<Option<Principal>, StoreError> {
    match row.kind {
        CredentialKind::Device => {
            let device = store.device_by_key(DeviceKey(row.owner)).await?;
            Ok(device.map(|device| Principal::Device(device.id)))
        }
        CredentialKind::Operator => {
            let Some(operator) = store.operator_by_key(OperatorKey(row.owner)).await? else { return Ok(None) };
            let damaged = || StoreError::Damaged(format!("the role or scope of operator {}", operator.name));
            let role = Role::from_code(operator.role).ok_or_else(damaged)?;
            let scope = LabelSelector::parse(&operator.scope).map_err(|_| damaged())?;
            Ok(Some(Principal::Operator(Operator { actor: format!("operators/{}", operator.name), role, scope })))
        }
        CredentialKind::Enrolment => Ok(Some(Principal::Enrolment { key: row.id.clone(), labels: row.labels.clone() })),
    }
}

/// The token of the metadata `authorization: Bearer TOKEN` (RFC 6750); `None` without one.
fn bearer_token(headers: &HeaderMap) -> Result<Option<&str>, Error> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let token = value.to_str().ok().and_then(|text| text.split_once(' '));
    match (token, values.next()) {
        (Some((scheme, token)), None) if scheme.eq_ignore_ascii_case("bearer") => Ok(Some(token.trim())),
        _ => Err(Error::CredentialInvalid),
    }
}
