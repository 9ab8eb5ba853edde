//! Somebody who calls.

use crate::{
    error::{Error, Failure},
    fleet::{Device, Registry},
    limits::OperatorUsage,
    model::{DeviceId, LabelSelector, Labels, Timestamp},
    pb,
    tls::PeerCertificate,
};
use http::Extensions;
use parking_lot::Mutex;
use std::{
    pin::Pin,
    sync::{Arc, LazyLock, OnceLock},
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// What an operator may do. Each role may also do what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// See.
    Viewer,
    /// Change devices.
    Operator,
    /// Manage operators.
    Admin,
}

impl Role {
    /// The number that stands for it in the store and, as `tidegate.v1.OperatorRole`, on the wire.
    pub fn code(self) -> i32 {
        match self {
            Self::Viewer => pb::OperatorRole::Viewer as i32,
            Self::Operator => pb::OperatorRole::Operator as i32,
            Self::Admin => pb::OperatorRole::Admin as i32,
        }
    }

    /// The role of a [`code`](Self::code).
    pub fn from_code(code: i32) -> Option<Self> {
        [Self::Viewer, Self::Operator, Self::Admin].into_iter().find(|role| role.code() == code)
    }

    /// The role of a [name](Self::as_str).
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Viewer, Self::Operator, Self::Admin].into_iter().find(|role| role.as_str() == name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

/// An operator that calls.
#[derive(Debug, Clone)]
pub struct Operator {
    /// Who: `operators/alice`, or `oidc/alice`, as a provider calls it.
    pub actor: String,
    /// What it may do.
    pub role: Role,
    /// With which devices.
    pub scope: LabelSelector,
}

/// Who calls.
#[derive(Debug, Clone)]
pub enum Principal {
    /// Nobody is asked who they are: everybody may do everything.
    Open,
    /// Somebody who has shown nothing.
    Anonymous,
    /// A device.
    Device(DeviceId),
    /// An operator.
    Operator(Operator),
    /// A device that is to be.
    Enrolment {
        /// The id of its key.
        key: String,
        /// The labels that it will have.
        labels: Labels,
    },
}

/// What a credential stands for. All calls with one credential share it.
#[derive(Debug)]
pub struct Grant {
    /// Who has it.
    pub principal: Principal,
    /// The id of the token; empty where it has none, or there is no token. Of a provider's token, `SUBJECT/ID` where the operator goes by
    /// another name than its subject.
    pub credential: String,
    /// When it expires.
    pub expire_time: Option<Timestamp>,
    /// Cancelled when it is revoked. `None`: it can't be.
    pub revoked: Option<CancellationToken>,
    /// What an operator has used with it of what it may do; shared by the tokens that a provider gave to one subject.
    pub usage: Arc<OperatorUsage>,
}

impl Grant {
    /// What needs no credential.
    pub fn without_credential(principal: Principal) -> Self {
        Self { principal, credential: String::new(), expire_time: None, revoked: None, usage: Arc::default() }
    }

    /// What a client certificate stands for.
    pub fn of_certificate(peer: &PeerCertificate) -> Result<Self, Error> {
        let device = peer.device.clone().map_err(|_| Error::CredentialInvalid)?;
        Ok(Self {
            principal: Principal::Device(device),
            credential: String::new(),
            expire_time: Some(peer.expire_time),
            revoked: Some(peer.revoked.clone()),
            usage: Arc::default(),
        })
    }

    /// Why it is no longer good, if so.
    pub fn check(&self) -> Result<(), Error> {
        if self.revoked.as_ref().is_some_and(CancellationToken::is_cancelled) {
            return Err(Error::CredentialRevoked);
        }
        match self.expire_time {
            Some(time) if time <= Timestamp::now() => Err(Error::CredentialExpired),
            _ => Ok(()),
        }
    }

    /// Who, for people and the audit log.
    pub fn actor(&self) -> String {
        match &self.principal {
            Principal::Open | Principal::Anonymous => String::new(),
            Principal::Device(id) => format!("devices/{id}"),
            Principal::Operator(operator) => operator.actor.clone(),
            Principal::Enrolment { key, .. } => format!("enrolmentKeys/{key}"),
        }
    }

    /// What ends the calls that were begun with it; `None` where nothing does.
    pub fn ending(&self) -> Option<Pin<Box<Ending>>> {
        let left = self.expire_time.map(|time| Duration::from_micros((time.micros() - Timestamp::now().micros()).max(0).unsigned_abs()));
        let revoked = self.revoked.clone();
        (revoked.is_some() || left.is_some()).then(|| {
            let revoked = revoked.map(CancellationToken::cancelled_owned);
            Box::pin(Ending { revoked, expired: left.map(sleep) })
        })
    }
}

pin_project_lite::pin_project! {
    /// Waits for the end of a [`Grant`], and says how it came.
    pub struct Ending {
        #[pin]
        revoked: Option<WaitForCancellationFutureOwned>,
        #[pin]
        expired: Option<Sleep>,
    }
}

impl Future for Ending {
    type Output = Error;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Error> {
        let this = self.project();
        if this.revoked.as_pin_mut().is_some_and(|revoked| revoked.poll(cx).is_ready()) {
            return Poll::Ready(Error::CredentialRevoked);
        }
        match this.expired.as_pin_mut() {
            Some(expired) => expired.poll(cx).map(|()| Error::CredentialExpired),
            None => Poll::Pending,
        }
    }
}

/// Who made a call, and what it was about, as far as that is found out on its way in: for who tells of its end. In the extensions of its
/// request. Cheap to clone: all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Attribution(Arc<(OnceLock<Arc<Grant>>, OnceLock<String>)>);

impl Attribution {
    /// Who has the call: `operators/alice`. Empty where nobody was asked, or not yet.
    pub fn actor(&self) -> String {
        self.0.0.get().map(|grant| grant.actor()).unwrap_or_default()
    }

    /// The first thing that the call was about: `devices/pump-1`. Empty where it came to none.
    pub fn resource(&self) -> &str {
        self.0.1.get().map_or("", String::as_str)
    }

    fn set_resource(&self, resource: impl FnOnce() -> String) {
        self.0.1.get_or_init(resource);
    }
}

/// Who makes this call. In the extensions of its request.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Who.
    pub grant: Arc<Grant>,
    /// What the call is about, where that is noted.
    pub resource: Option<Arc<Mutex<String>>>,
    // Where somebody tells of its end.
    attribution: Option<Attribution>,
}

static EVERY_DEVICE: LazyLock<LabelSelector> = LazyLock::new(LabelSelector::default);

impl Caller {
    /// Who has a grant.
    pub fn new(grant: Arc<Grant>) -> Self {
        Self { grant, resource: None, attribution: None }
    }

    /// Who has a grant, and is to be named when it is told how the call went.
    pub fn attributed(grant: Arc<Grant>, attribution: Attribution) -> Self {
        attribution.0.0.get_or_init(|| grant.clone());
        Self { attribution: Some(attribution), ..Self::new(grant) }
    }

    /// Who makes a request: nobody, unless it came through the layers that find out.
    pub fn of(extensions: &Extensions) -> Self {
        let nobody = || Self::new(Arc::new(Grant::without_credential(Principal::Anonymous)));
        extensions.get::<Self>().cloned().unwrap_or_else(nobody)
    }

    /// Says what the call is about, for the audit log.
    pub fn about(&self, resource: impl Into<String>) {
        let resource = resource.into();
        self.attribute(|| resource.clone());
        if let Some(noted) = &self.resource {
            *noted.lock() = resource;
        }
    }

    fn attribute(&self, resource: impl FnOnce() -> String) {
        if let Some(attribution) = &self.attribution {
            attribution.set_resource(resource);
        }
    }

    /// Whether it may do what is a device's own.
    pub fn may_act_as(&self, device: &DeviceId) -> Result<(), Error> {
        self.attribute(|| format!("devices/{device}"));
        match &self.grant.principal {
            Principal::Open => Ok(()),
            Principal::Device(own) if own == device => Ok(()),
            _ => Err(Error::PermissionDenied),
        }
    }

    /// Whether it has a role, or a higher one.
    pub fn needs(&self, role: Role) -> Result<(), Error> {
        match &self.grant.principal {
            Principal::Open => Ok(()),
            Principal::Operator(operator) if operator.role >= role => Ok(()),
            _ => Err(Error::PermissionDenied),
        }
    }

    /// Which devices it may have to do with.
    pub fn scope(&self) -> &LabelSelector {
        match &self.grant.principal {
            Principal::Operator(operator) => &operator.scope,
            _ => &EVERY_DEVICE,
        }
    }

    /// Whether devices with such labels are in its scope.
    pub fn may_label(&self, labels: &Labels) -> Result<(), Error> {
        if self.scope().matches(labels) { Ok(()) } else { Err(Error::PermissionDenied) }
    }

    /// A device that is in its scope. Who may not see every device is told of one that is not there what it is told of one that it
    /// may not see (AIP-211).
    pub async fn device(&self, registry: &Registry, id: &DeviceId) -> Result<Arc<Device>, Failure> {
        self.attribute(|| format!("devices/{id}"));
        let found = registry.get(id).await;
        if self.scope().is_empty() {
            return found;
        }
        match found {
            Ok(device) if device.matches(self.scope()) => Ok(device),
            Ok(_) | Err(Failure::Refused(Error::DeviceNotFound(_))) => Err(Error::PermissionDenied.into()),
            Err(failure) => Err(failure),
        }
    }
}
