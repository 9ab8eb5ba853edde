//! What kind of call each method is, which says how long it may take: the one table.

use super::method::Method;
use crate::config::Grpc;
use std::{sync::LazyLock, time::Duration};

/// What kind of call a method is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Asks for something small, and is answered at once.
    Read,
    /// Changes something, and is answered when that is durable.
    Write,
    /// Is answered with a stream, which ends as soon as the client has taken it and holds a place among those that are worked on.
    Query,
    /// Moves as much as there is, in one direction; cut off, it is taken up where it was.
    Transfer,
    /// Goes on for as long as both sides are there.
    Session,
}

impl Class {
    /// The class of a method.
    pub fn of(method: &Method) -> Self {
        BY_INDEX[method.index]
    }

    /// How long a call may take, by the settings.
    pub fn deadline_max(self, settings: &Grpc) -> Duration {
        match self {
            Self::Read | Self::Write => settings.unary_deadline_max,
            // No stream lasts for longer than all streams may.
            Self::Query => settings.query_deadline_max.min(settings.streaming_deadline_max),
            Self::Transfer | Self::Session => settings.streaming_deadline_max,
        }
    }
}

/// Every method that is served.
pub const CLASSES: &[(&str, Class)] = &[
    ("tidegate.v1.TelemetryService/Upload", Class::Transfer),
    ("tidegate.v1.TelemetryService/GetUploadPosition", Class::Read),
    ("tidegate.v1.DeviceLinkService/Connect", Class::Session),
    ("tidegate.v1.LiveService/Follow", Class::Session),
    ("tidegate.v1.ReadingService/QueryReadings", Class::Query),
    ("tidegate.v1.ReadingService/ExportReadings", Class::Transfer),
    ("tidegate.v1.ConfigService/Configure", Class::Session),
    ("tidegate.v1.ConfigService/GetConfig", Class::Read),
    ("tidegate.v1.ConfigService/ListConfigRevisions", Class::Read),
    ("tidegate.v1.DeviceService/CreateDevice", Class::Write),
    ("tidegate.v1.DeviceService/GetDevice", Class::Read),
    ("tidegate.v1.DeviceService/ListDevices", Class::Read),
    ("tidegate.v1.DeviceService/UpdateDevice", Class::Write),
    ("tidegate.v1.DeviceService/DeleteDevice", Class::Write),
    ("tidegate.v1.DeviceService/ListSensors", Class::Read),
    ("tidegate.v1.DeviceService/UpdateSensor", Class::Write),
    ("tidegate.v1.DeviceService/GetLedger", Class::Read),
    ("tidegate.v1.DeadLetterService/ListDeadLetters", Class::Read),
    ("tidegate.v1.DeadLetterService/GetDeadLetter", Class::Read),
    ("tidegate.v1.DeadLetterService/ReplayDeadLetter", Class::Write),
    ("tidegate.v1.DeadLetterService/DeleteDeadLetter", Class::Write),
    ("tidegate.v1.CredentialService/CreateDeviceCredential", Class::Write),
    ("tidegate.v1.CredentialService/ListDeviceCredentials", Class::Read),
    ("tidegate.v1.CredentialService/RevokeDeviceCredential", Class::Write),
    ("tidegate.v1.CredentialService/CreateEnrolmentKey", Class::Write),
    ("tidegate.v1.CredentialService/ListEnrolmentKeys", Class::Read),
    ("tidegate.v1.CredentialService/RevokeEnrolmentKey", Class::Write),
    ("tidegate.v1.CredentialService/Enrol", Class::Write),
    ("tidegate.v1.OperatorService/GetIdentity", Class::Read),
    ("tidegate.v1.OperatorService/CreateOperator", Class::Write),
    ("tidegate.v1.OperatorService/GetOperator", Class::Read),
    ("tidegate.v1.OperatorService/ListOperators", Class::Read),
    ("tidegate.v1.OperatorService/UpdateOperator", Class::Write),
    ("tidegate.v1.OperatorService/DeleteOperator", Class::Write),
    ("tidegate.v1.OperatorService/CreateOperatorToken", Class::Write),
    ("tidegate.v1.OperatorService/ListOperatorTokens", Class::Read),
    ("tidegate.v1.OperatorService/RevokeOperatorToken", Class::Write),
    ("tidegate.v1.OperatorService/ListAuditEntries", Class::Read),
    ("grpc.health.v1.Health/Check", Class::Read),
    ("grpc.health.v1.Health/Watch", Class::Session),
    // A generic client keeps it for as long as it wants to know something.
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Class::Session),
    ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Class::Session),
    // What is not served is refused at once.
    ("unknown", Class::Read),
];

static BY_INDEX: LazyLock<Vec<Class>> = LazyLock::new(|| {
    let class = |method: &Method| CLASSES.iter().find(|(name, _)| *name == method.name).map(|(_, class)| *class);
    // Without a row, as short as it can be; a test sees to it that there is none.
    Method::all().iter().map(|method| class(method).unwrap_or(Class::Read)).collect()
});

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_method_has_one_row_and_no_other_has() {
        let served: Vec<&str> = Method::all().iter().map(|method| method.name.as_str()).collect();
        let rows: Vec<&str> = CLASSES.iter().map(|(name, _)| *name).collect();
        assert_eq!(BTreeSet::from_iter(&served), BTreeSet::from_iter(&rows));
        assert_eq!(rows.len(), BTreeSet::from_iter(&rows).len(), "a method has two rows");
    }

    #[test]
    fn a_class_is_of_streams_or_of_single_messages() {
        for method in Method::all() {
            let class = Class::of(method);
            assert_eq!(method.streaming, !matches!(class, Class::Read | Class::Write), "{} is a {class:?}", method.name);
        }
    }

    /// The names of methods follow the AIPs: what begins so changes nothing, and all else does.
    #[test]
    fn what_gets_and_lists_is_a_read() {
        for method in Method::all().iter().filter(|method| !method.streaming && method.name.starts_with("tidegate.")) {
            let name = method.name.rsplit('/').next().expect("a name");
            let is_read = name.starts_with("Get") || name.starts_with("List");
            assert_eq!(Class::of(method) == Class::Read, is_read, "{name}");
        }
    }
}
