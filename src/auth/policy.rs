//! Who may call what: the one table.
//!
//! It decides by method alone. Which device a device may act as, and which devices an operator may see, the handlers ask the
//! [`Caller`](super::Caller).

use super::{Principal, Role};
use crate::{error::Error, middleware::Method};
use std::sync::LazyLock;

/// Who may call a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody, also without a credential.
    Anybody,
    /// Everybody with a credential.
    AnyIdentity,
    /// Devices.
    Device,
    /// Operators of a role, or a higher one.
    Operator(Role),
    /// Devices that are to be.
    Enrolment,
}

impl Access {
    /// Whether somebody may call.
    pub fn check(self, principal: &Principal) -> Result<(), Error> {
        let may = match (self, principal) {
            (_, Principal::Open) | (Self::Anybody, _) => true,
            (_, Principal::Anonymous) => return Err(Error::CredentialMissing),
            (Self::AnyIdentity, _) => true,
            (Self::Device, principal) => matches!(principal, Principal::Device(_)),
            (Self::Enrolment, principal) => matches!(principal, Principal::Enrolment { .. }),
            (Self::Operator(role), Principal::Operator(operator)) => operator.role >= role,
            (Self::Operator(_), _) => false,
        };
        if may { Ok(()) } else { Err(Error::PermissionDenied) }
    }
}

/// What is decided of a method.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Who may call it.
    pub access: Access,
    /// Whether calls of it are noted in the audit log.
    pub audited: bool,
}

/// Not noted.
const fn quiet(access: Access) -> Rule {
    Rule { access, audited: false }
}

/// Noted in the audit log.
const fn audited(access: Access) -> Rule {
    Rule { access, audited: true }
}

const VIEWER: Access = Access::Operator(Role::Viewer);
const OPERATOR: Access = Access::Operator(Role::Operator);
const ADMIN: Access = Access::Operator(Role::Admin);

/// Every method that is served.
pub const POLICY: &[(&str, Rule)] = &[
    // A device: only as itself.
    ("tidegate.v1.TelemetryService/Upload", quiet(Access::Device)),
    ("tidegate.v1.TelemetryService/GetUploadPosition", quiet(Access::Device)),
    ("tidegate.v1.DeviceLinkService/Connect", quiet(Access::Device)),
    // Operators: only the devices in their scope.
    ("tidegate.v1.LiveService/Follow", quiet(VIEWER)),
    ("tidegate.v1.ReadingService/QueryReadings", quiet(VIEWER)),
    ("tidegate.v1.ReadingService/ExportReadings", audited(VIEWER)),
    // To set needs the role OPERATOR, and is noted: the desk sees to it.
    ("tidegate.v1.ConfigService/Configure", quiet(VIEWER)),
    ("tidegate.v1.ConfigService/GetConfig", quiet(VIEWER)),
    ("tidegate.v1.ConfigService/ListConfigRevisions", quiet(VIEWER)),
    ("tidegate.v1.DeviceService/CreateDevice", audited(OPERATOR)),
    ("tidegate.v1.DeviceService/GetDevice", quiet(VIEWER)),
    ("tidegate.v1.DeviceService/ListDevices", quiet(VIEWER)),
    ("tidegate.v1.DeviceService/UpdateDevice", audited(OPERATOR)),
    ("tidegate.v1.DeviceService/DeleteDevice", audited(OPERATOR)),
    ("tidegate.v1.DeviceService/ListSensors", quiet(VIEWER)),
    ("tidegate.v1.DeviceService/UpdateSensor", audited(OPERATOR)),
    ("tidegate.v1.DeviceService/GetLedger", quiet(VIEWER)),
    ("tidegate.v1.DeadLetterService/ListDeadLetters", quiet(VIEWER)),
    ("tidegate.v1.DeadLetterService/GetDeadLetter", quiet(VIEWER)),
    ("tidegate.v1.DeadLetterService/ReplayDeadLetter", audited(OPERATOR)),
    ("tidegate.v1.DeadLetterService/DeleteDeadLetter", audited(OPERATOR)),
    ("tidegate.v1.CredentialService/CreateDeviceCredential", audited(OPERATOR)),
    ("tidegate.v1.CredentialService/ListDeviceCredentials", quiet(OPERATOR)),
    ("tidegate.v1.CredentialService/RevokeDeviceCredential", audited(OPERATOR)),
    ("tidegate.v1.CredentialService/CreateEnrolmentKey", audited(OPERATOR)),
    ("tidegate.v1.CredentialService/ListEnrolmentKeys", quiet(OPERATOR)),
    ("tidegate.v1.CredentialService/RevokeEnrolmentKey", audited(OPERATOR)),
    // A new device, with an enrolment key.
    ("tidegate.v1.CredentialService/Enrol", audited(Access::Enrolment)),
    // Everybody may know who they are.
    ("tidegate.v1.OperatorService/GetIdentity", quiet(Access::AnyIdentity)),
    ("tidegate.v1.OperatorService/CreateOperator", audited(ADMIN)),
    ("tidegate.v1.OperatorService/GetOperator", quiet(ADMIN)),
    ("tidegate.v1.OperatorService/ListOperators", quiet(ADMIN)),
    ("tidegate.v1.OperatorService/UpdateOperator", audited(ADMIN)),
    ("tidegate.v1.OperatorService/DeleteOperator", audited(ADMIN)),
    ("tidegate.v1.OperatorService/CreateOperatorToken", audited(ADMIN)),
    ("tidegate.v1.OperatorService/ListOperatorTokens", quiet(ADMIN)),
    ("tidegate.v1.OperatorService/RevokeOperatorToken", audited(ADMIN)),
    ("tidegate.v1.OperatorService/ListAuditEntries", quiet(ADMIN)),
    // Load balancers and container engines have no credentials, and are told no more than whether to send calls here.
    ("grpc.health.v1.Health/Check", quiet(Access::Anybody)),
    ("grpc.health.v1.Health/Watch", quiet(Access::Anybody)),
    // The contract is public, but work for strangers is not done.
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", quiet(Access::AnyIdentity)),
    ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", quiet(Access::AnyIdentity)),
    // What is not served: a stranger is not told that it is not.
    ("unknown", quiet(Access::AnyIdentity)),
];

static BY_INDEX: LazyLock<Vec<Rule>> = LazyLock::new(|| {
    let rule = |method: &Method| POLICY.iter().find(|(name, _)| *name == method.name).map(|(_, rule)| *rule);
    // A method without a row is an administrator's; a test sees to it that there is none.
    Method::all().iter().map(|method| rule(method).unwrap_or(audited(ADMIN))).collect()
});

impl Rule {
    /// The rule for a method.
    pub fn of(method: &Method) -> Self {
        BY_INDEX[method.index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_method_has_one_row_and_no_other_has() {
        let served: Vec<&str> = Method::all().iter().map(|method| method.name.as_str()).collect();
        let rows: Vec<&str> = POLICY.iter().map(|(name, _)| *name).collect();
        assert_eq!(BTreeSet::from_iter(&served), BTreeSet::from_iter(&rows));
        assert_eq!(rows.len(), BTreeSet::from_iter(&rows).len(), "a method has two rows");
    }
}
