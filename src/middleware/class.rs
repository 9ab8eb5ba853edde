//! What kind of call each method is, which says how long it may take: the one table.

use super::method::Method;
use crate::config::Grpc;
use std::{sync::LazyLock, time::Duration};

/// What kind of call a method is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Is answered with one message, at once or when what it changes is durable.
    Unary,
    /// Is answered with a stream, which ends as soon as the client has taken it and holds a place among those that are worked on.
    Query,
    /// Goes on for as long as both sides are there, or moves as much as there is; cut off, it is taken up where it was.
    Stream,
}

impl Class {
    /// The class of a method.
    pub fn of(method: &Method) -> Self {
        BY_INDEX[method.index]
    }

    /// How long a call may take, by the settings.
    pub fn deadline_max(self, settings: &Grpc) -> Duration {
        match self {
            Self::Unary => settings.unary_deadline_max,
            // No stream lasts for longer than all streams may.
            Self::Query => settings.query_deadline_max.min(settings.streaming_deadline_max),
            Self::Stream => settings.streaming_deadline_max,
        }
    }
}

/// Every method that is served.
pub const CLASSES: &[(&str, Class)] = &[
    ("tidegate.v1.TelemetryService/Upload", Class::Stream),
    ("tidegate.v1.TelemetryService/GetUploadPosition", Class::Unary),
    ("tidegate.v1.DeviceLinkService/Connect", Class::Stream),
    ("tidegate.v1.LiveService/Follow", Class::Stream),
    ("tidegate.v1.ReadingService/QueryReadings", Class::Query),
    ("tidegate.v1.ReadingService/ExportReadings", Class::Stream),
    ("tidegate.v1.ConfigService/Configure", Class::Stream),
    ("tidegate.v1.ConfigService/GetConfig", Class::Unary),
    ("tidegate.v1.ConfigService/ListConfigRevisions", Class::Unary),
    ("tidegate.v1.DeviceService/CreateDevice", Class::Unary),
    ("tidegate.v1.DeviceService/GetDevice", Class::Unary),
    ("tidegate.v1.DeviceService/ListDevices", Class::Unary),
    ("tidegate.v1.DeviceService/UpdateDevice", Class::Unary),
    ("tidegate.v1.DeviceService/DeleteDevice", Class::Unary),
    ("tidegate.v1.DeviceService/ListSensors", Class::Unary),
    ("tidegate.v1.DeviceService/UpdateSensor", Class::Unary),
    ("tidegate.v1.DeviceService/GetLedger", Class::Unary),
    ("tidegate.v1.DeadLetterService/ListDeadLetters", Class::Unary),
    ("tidegate.v1.DeadLetterService/GetDeadLetter", Class::Unary),
    ("tidegate.v1.DeadLetterService/ReplayDeadLetter", Class::Unary),
    ("tidegate.v1.DeadLetterService/DeleteDeadLetter", Class::Unary),
    ("tidegate.v1.CredentialService/CreateDeviceCredential", Class::Unary),
    ("tidegate.v1.CredentialService/ListDeviceCredentials", Class::Unary),
    ("tidegate.v1.CredentialService/RevokeDeviceCredential", Class::Unary),
    ("tidegate.v1.CredentialService/CreateEnrolmentKey", Class::Unary),
    ("tidegate.v1.CredentialService/ListEnrolmentKeys", Class::Unary),
    ("tidegate.v1.CredentialService/RevokeEnrolmentKey", Class::Unary),
    ("tidegate.v1.CredentialService/Enrol", Class::Unary),
    ("tidegate.v1.OperatorService/GetIdentity", Class::Unary),
    ("tidegate.v1.OperatorService/CreateOperator", Class::Unary),
    ("tidegate.v1.OperatorService/GetOperator", Class::Unary),
    ("tidegate.v1.OperatorService/ListOperators", Class::Unary),
    ("tidegate.v1.OperatorService/UpdateOperator", Class::Unary),
    ("tidegate.v1.OperatorService/DeleteOperator", Class::Unary),
    ("tidegate.v1.OperatorService/CreateOperatorToken", Class::Unary),
    ("tidegate.v1.OperatorService/ListOperatorTokens", Class::Unary),
    ("tidegate.v1.OperatorService/RevokeOperatorToken", Class::Unary),
    ("tidegate.v1.OperatorService/ListAuditEntries", Class::Unary),
    ("grpc.health.v1.Health/Check", Class::Unary),
    ("grpc.health.v1.Health/Watch", Class::Stream),
    // A generic client keeps it for as long as it wants to know something.
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Class::Stream),
    ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Class::Stream),
    // What is not served is refused at once.
    ("unknown", Class::Unary),
];

static BY_INDEX: LazyLock<Vec<Class>> = LazyLock::new(|| {
    let class = |method: &Method| CLASSES.iter().find(|(name, _)| *name == method.name).map(|(_, class)| *class);
    // Without a row, as short as it can be; a test sees to it that there is none.
    Method::all().iter().map(|method| class(method).unwrap_or(Class::Unary)).collect()
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
            assert_eq!(method.streaming, !matches!(class, Class::Unary), "{} is a {class:?}", method.name);
        }
    }
}
