//! Operators by the tokens of an OpenID Connect provider: JWTs whose signature is checked against the provider's keys.
//!
//! [`claims`] reads tokens, [`keys`] verifies signatures, [`source`] gets keys, and this module keeps what came of it: the keys that are
//! in use, and the tokens that were verified by them, so that a token is verified once and all its calls share one
//! [`Grant`]; those of one subject also what it has used of its limits.
//!
//! Invariants: a token is at hand only as long as its key is among those in use; keys are exchanged for such as can be used, and
//! never for none; what strangers send makes the gateway ask the provider a bounded number of times.

mod claims;
mod keys;
mod source;
#[cfg(test)]
mod tests;

use super::{Grant, Operator, Principal};
use crate::{
    client::{Backoff, BackoffSettings},
    config::{self, JwksLocation},
    error::Error,
    limits::OperatorUsage,
    model::Timestamp,
    telemetry::{Metrics, Sparing, names},
};
use claims::{Claims, Jwt, Refusal, TOKEN_BYTES_MAX, shown};
use keys::{Key, KeySet, KeySetError, NoKey};
use metrics::{Counter, Gauge};
use parking_lot::{Mutex, RwLock};
use source::{Source, SourceError};
use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};
use tokio::{
    sync::{Semaphore, watch},
    time::{error::Elapsed, timeout},
};
use tokio_util::sync::CancellationToken;

/// From how many tokens at hand on those that no call is open with are forgotten.
const TOKENS_MAX: usize = 10_000;
/// How long it may take to get the keys.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// How often keys are looked at because a token names one that is not among them, at the most. A provider that has exchanged its keys
/// is asked at once; strangers who make up names do not have it asked without end.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// How many calls wait for that at once.
const WAITING_MAX: usize = 64;
/// How soon keys are looked at again when that failed: within a second, and later within a minute, or the settings' interval.
const RETRIES: BackoffSettings = BackoffSettings { base: Duration::from_secs(1), cap: Duration::from_secs(60) };
/// How often a refused token is told at the level of the default log, at the most: its callers are not known.
const TOLD_INTERVAL: Duration = Duration::from_secs(1);

/// Why the provider's keys can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OidcError {
    /// They can't be read.
    #[error("cannot get the keys of oidc.jwks")]
    Source(#[from] SourceError),
    /// What was read is not keys.
    #[error("cannot use the keys of oidc.jwks")]
    Keys(#[from] KeySetError),
    /// They take too long.
    #[error("oidc.jwks did not answer within {FETCH_TIMEOUT:?}")]
    Timeout(#[from] Elapsed),
}

/// Finds out who an operator is by a token of an OpenID Connect provider. Cheap to clone: all clones are one.
#[derive(Clone)]
pub struct Oidc(Arc<Shared>);

struct Shared {
    settings: config::Oidc,
    source: Source,
    known: RwLock<Known>,
    looks: watch::Sender<Looks>,
    next_look: Mutex<Option<Instant>>,
    told: Sparing,
    waiting: Semaphore,
    metrics: OidcMetrics,
}

#[derive(Default)]
struct Known {
    // None: they were never fetched.
    keys: Option<Arc<KeySet>>,
    tokens: HashMap<TokenHash, Verified>,
    // By subject.
    usages: HashMap<String, Weak<OperatorUsage>>,
    // Twice how many were left when some were forgotten last: each is looked at a bounded number of times.
    sweep_at: usize,
}

type TokenHash = [u8; blake3::OUT_LEN];

struct Verified {
    key: Arc<Key>,
    grant: Arc<Grant>,
}

/// Looks at the keys: how many were asked for, and which of these is answered.
#[derive(Clone, Copy, Default)]
struct Looks {
    asked: u64,
    done: u64,
    // Whether the last one found keys.
    current: bool,
}

struct OidcMetrics {
    fetched: Counter,
    failed: Counter,
    fetch_time: Gauge,
}

impl OidcMetrics {
    fn new(metrics: &Metrics) -> Self {
        let fetches = |outcome: &'static str| metrics.counter(names::OIDC_KEY_FETCHES, &[("outcome", outcome.into())]);
        let fetch_time = metrics.gauge(names::OIDC_KEYS_FETCHED, &[]);
        fetch_time.set(0);
        Self { fetched: fetches("fetched"), failed: fetches("failed"), fetch_time }
    }
}

impl Oidc {
    /// As the settings say; `None` when they name no issuer. Keys in a file must be there; from an address they come when
    /// [`run`](Self::run) does.
    pub async fn load(settings: &config::Oidc, metrics: &Metrics) -> Result<Option<Self>, OidcError> {
        let Some(location) = JwksLocation::parse(&settings.jwks).filter(|_| settings.is_on()) else { return Ok(None) };
        let source = Source::new(settings, location);
        source.check()?;
        let oidc = Self(Arc::new(Shared {
            settings: settings.clone(),
            source,
            known: RwLock::default(),
            looks: watch::Sender::default(),
            next_look: Mutex::default(),
            told: Sparing::every(TOLD_INTERVAL),
            waiting: Semaphore::new(WAITING_MAX),
            metrics: OidcMetrics::new(metrics),
        }));
        if oidc.0.source.is_file() {
            oidc.fetch().await?;
        }
        Ok(Some(oidc))
    }

    /// Whether a token is one for here. The gateway's own have no dot.
    pub fn is_jwt(token: &str) -> bool {
        token.contains('.')
    }

    /// What a token that was verified before stands for, good or expired.
    pub fn known(&self, token: &str) -> Option<Arc<Grant>> {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        self.0.known.read().tokens.get(&hash(token)).map(|verified| verified.grant.clone())
    }

    /// What a token stands for. Waits for the provider only if the token names a key that is not among those in use.
    pub async fn verify(&self, token: &str) -> Result<Arc<Grant>, Error> {
        let verified = match self.verify_now(token) {
            Err(Refusal::UnknownKey(_)) => match self.look_anew().await {
                true => self.verify_now(token),
                false => Err(Refusal::KeysUnavailable),
            },
            other => other,
        };
        verified.map_err(|refusal| self.refuse(&refusal))
    }

    fn verify_now(&self, token: &str) -> Result<Arc<Grant>, Refusal> {
        let jwt = Jwt::parse(token)?;
        let keys = self.0.known.read().keys.clone().ok_or(Refusal::KeysUnavailable)?;
        let unknown = || Refusal::UnknownKey(shown(jwt.key_id.as_deref().unwrap_or_default()));
        let key = keys.find(jwt.algorithm, jwt.key_id.as_deref()).map_err(|no_key| match no_key {
            NoKey::Unknown => unknown(),
            NoKey::Unfit => Refusal::UnfitKey,
            NoKey::Ambiguous => Refusal::AmbiguousKey,
        })?;
        if !key.has_signed(jwt.algorithm, jwt.message, &jwt.signature) {
            return Err(Refusal::Signature);
        }
        let claims = jwt.claims(&self.0.settings, Timestamp::now())?;
        self.learn(token, key, claims).ok_or_else(unknown)
    }

    /// Keeps what was verified, unless the key was exchanged meanwhile.
    fn learn(&self, token: &str, key: &Arc<Key>, claims: Claims) -> Option<Arc<Grant>> {
        let Claims { subject, name, id, role, scope, expire_time } = claims;
        let mut known = self.0.known.write();
        let known = &mut *known;
        if !known.keys.as_ref().is_some_and(|keys| keys.contains(key)) {
            return None;
        }
        if known.tokens.len() >= known.sweep_at.max(TOKENS_MAX) {
            known.tokens.retain(|_, verified| verified.is_in_use());
            known.usages.retain(|_, usage| usage.strong_count() > 0);
            known.sweep_at = 2 * known.tokens.len();
        }
        let usage = known.usages.get(&subject).and_then(Weak::upgrade).unwrap_or_default();
        known.usages.insert(subject.clone(), Arc::downgrade(&usage));
        // A name may pass to somebody else, a subject may not.
        let subject = (self.0.settings.name_claim != "sub").then_some(subject);
        let credential = subject.into_iter().chain(id).collect::<Vec<_>>().join("/");
        let grant = Arc::new(Grant {
            principal: Principal::Operator(Operator { actor: format!("oidc/{name}"), role, scope }),
            credential,
            expire_time: Some(expire_time),
            revoked: Some(CancellationToken::new()),
            usage,
        });
        // Somebody else may have verified it meanwhile: all must share one.
        Some(known.tokens.entry(hash(token)).or_insert(Verified { key: key.clone(), grant }).grant.clone())
    }

    /// Says in the log why a token is refused, and no more to its caller than of any other.
    fn refuse(&self, refusal: &Refusal) -> Error {
        match self.0.told.pass() {
            Some(left_out) => tracing::info!(why = %refusal, left_out, "oidc.refused"),
            None => tracing::debug!(why = %refusal, "oidc.refused"),
        }
        match refusal {
            Refusal::Expired => Error::CredentialExpired,
            Refusal::KeysUnavailable => Error::KeysUnavailable,
            _ => Error::CredentialInvalid,
        }
    }

    /// Has the keys looked at because of a token whose key is not among them; whether those that are in use then are the provider's.
    async fn look_anew(&self) -> bool {
        let Ok(_place) = self.0.waiting.try_acquire() else { return false };
        let mut looks = self.0.looks.subscribe();
        {
            let mut next = self.0.next_look.lock();
            let now = Instant::now();
            if next.is_none_or(|next| next <= now) {
                *next = Some(now + LOOK_INTERVAL);
                self.look_soon();
            }
        }
        // Also of the one that somebody else has asked for.
        let asked = looks.borrow().asked;
        looks.wait_for(|looks| looks.done >= asked).await.is_ok_and(|looks| looks.current)
    }

    /// Has the keys looked at without waiting for the interval of the settings.
    pub fn look_soon(&self) {
        self.0.looks.send_modify(|looks| looks.asked += 1);
    }

    /// Looks at the keys until `stop`: at the interval of the settings, soon after it failed, and when it is asked to.
    pub async fn run(self, stop: CancellationToken) {
        // Those who wait for keys then need not wait any longer, and are not told that theirs are wrong.
        let _end = Ending(&self);
        let mut looks = self.0.looks.subscribe();
        let mut backoff = Backoff::new(RETRIES);
        let interval = self.0.settings.refresh_interval;
        let look_again = async {
            loop {
                let asked = looks.borrow_and_update().asked;
                let wait = match self.fetch().await {
                    Ok(()) => {
                        backoff.reset();
                        interval
                    }
                    Err(error) => {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(error, "oidc.keys_failed: those that were there, if any, stay in use");
                        backoff.next_delay(None).min(interval)
                    }
                };
                self.0.looks.send_modify(|looks| looks.done = asked);
                // Either is the time to look again; the sender is never dropped.
                let _ = timeout(wait, looks.wait_for(|looks| looks.asked > looks.done)).await;
            }
        };
        stop.run_until_cancelled(look_again).await;
    }

    /// Gets the keys, and takes them over.
    async fn fetch(&self) -> Result<(), OidcError> {
        let fetched = async {
            let json = timeout(FETCH_TIMEOUT, self.0.source.read()).await??;
            Ok(KeySet::parse(&json)?)
        };
        let fetched = fetched.await.map(|keys| self.take_over(keys));
        let count = if fetched.is_ok() { &self.0.metrics.fetched } else { &self.0.metrics.failed };
        count.increment(1);
        self.0.looks.send_modify(|looks| looks.current = fetched.is_ok());
        fetched
    }

    /// Puts keys in the place of those in use, and ends the calls whose tokens were verified by one that is gone.
    fn take_over(&self, keys: KeySet) {
        let now = Timestamp::now();
        self.0.metrics.fetch_time.set(now.micros() as f64 / 1e6);
        let mut ended = 0;
        let mut known = self.0.known.write();
        known.tokens.retain(|_, verified| {
            let stays = keys.contains(&verified.key);
            if !stays {
                verified.grant.revoked.iter().for_each(CancellationToken::cancel);
                ended += 1;
            }
            stays && (verified.is_in_use() || verified.grant.expire_time.is_some_and(|time| time > now))
        });
        known.usages.retain(|_, usage| usage.strong_count() > 0);
        let are_new = !known.keys.as_ref().is_some_and(|old| old.len() == keys.len() && keys.are_in(old));
        if are_new {
            tracing::info!(keys = keys.len(), tokens_ended = ended, "oidc.keys_taken_over");
        }
        known.keys = Some(Arc::new(keys));
    }
}

/// Ends the waiting for looks that will not be.
struct Ending<'a>(&'a Oidc);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.0.looks.send_modify(|looks| (looks.done, looks.current) = (u64::MAX, false));
    }
}

impl Verified {
    /// Whether a call is open with it: each holds it, besides the map.
    fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.grant) > 1
    }
}

fn hash(token: &str) -> TokenHash {
    *blake3::hash(token.as_bytes()).as_bytes()
}
