//! Every way in which a call can fail, and the one place where a [`Status`] is made.
//!
//! `docs/ERRORS.md` says of each reason what the client, the operator and support each do; a test holds the two together.

use crate::{
    model::{BatchReject, DeviceId, Position, StreamId, Violation, batch::reason_name},
    store::{Count, StoreError},
};
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{BadRequest, ErrorDetails, ErrorInfo, FieldViolation, StatusExt};

/// `google.rpc.ErrorInfo.domain` of every error that the gateway makes.
pub const DOMAIN: &str = "tidegate";

/// Why a call failed. `Display` is what the client is told: it holds nothing that is internal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Fields of the request are not as they must be: all of them.
    #[error("{}", summary(.0))]
    InvalidArgument(Vec<Violation>),
    /// No such device.
    #[error("there is no device {0}")]
    DeviceNotFound(DeviceId),
    /// The id is taken.
    #[error("the device {0} exists already")]
    DeviceExists(DeviceId),
    /// The device was changed by somebody else.
    #[error("the device {device} has changed: its etag is {current:?}; read it and try again")]
    DeviceEtagMismatch {
        /// Which.
        device: DeviceId,
        /// Its etag now.
        current: String,
    },
    /// No such sensor.
    #[error("the device {device} has no sensor {sensor:?}")]
    SensorNotFound {
        /// Of which device.
        device: DeviceId,
        /// The name that was asked for.
        sensor: String,
    },
    /// The device was never given a configuration.
    #[error("no configuration was ever set for the device {0}")]
    ConfigNotFound(DeviceId),
    /// The configuration was changed by somebody else.
    #[error("the configuration of the device {device} has changed: its etag is {current:?}; read it and try again")]
    ConfigEtagMismatch {
        /// Of which device.
        device: DeviceId,
        /// The current etag; empty when there is no configuration.
        current: String,
    },
    /// The configuration is larger than what is taken.
    #[error("the configuration has {bytes} bytes as JSON: at most {bytes_max} are taken")]
    ConfigTooLarge {
        /// Its size as JSON.
        bytes: usize,
        /// The most that is taken.
        bytes_max: usize,
    },
    /// A batch skipped sequences.
    #[error("the device {device} sent sequence {received} of stream {stream_id}, but {expected} is expected next: send again from there")]
    SequenceGap {
        /// Which device.
        device: DeviceId,
        /// Of which of its streams.
        stream_id: StreamId,
        /// The last durable sequence plus 1.
        expected: u64,
        /// The sequence that came.
        received: u64,
    },
    /// A resume token points before what the log still holds.
    #[error("the resume token is older than the log, which begins at {}: follow from the beginning, or query", .oldest.0)]
    PositionExpired {
        /// The oldest position that is left.
        oldest: Position,
    },
    /// A query would read more than one may.
    #[error("the range holds more than one query reads, {limit} ({setting}): ask for less time or fewer sensors")]
    QueryTooLarge {
        /// The setting that holds the limit that was reached.
        setting: &'static str,
        /// Its value.
        limit: usize,
    },
    /// The database does not take writes, or does not answer.
    #[error("the store is not available; nothing of this call that was not acknowledged is stored: try again later")]
    StoreUnavailable,
    /// A limit on concurrent work is reached.
    #[error("the gateway has reached its limit of {limit} ({setting}): try again later")]
    Overloaded {
        /// The setting that holds the limit.
        setting: &'static str,
        /// Its value.
        limit: usize,
    },
    /// A rate of a device or operator is used up.
    #[error("{}", rate_limited(setting, *limit, *retry_after, accepted.as_ref()))]
    RateLimited {
        /// The setting that holds the rate, and names its unit.
        setting: &'static str,
        /// Its value.
        limit: u64,
        /// After how long it may be used again.
        retry_after: Duration,
        /// What of an upload was stored before.
        accepted: Option<Count>,
    },
    /// The gateway is being stopped, or the connection has served its time.
    #[error("the gateway is being stopped, or the connection has served its time: connect again, here or to another gateway")]
    Draining,
    /// The call's deadline passed.
    #[error("the deadline of {0:?} has passed")]
    DeadlineExceeded(Duration),
    /// The client did not send what was waited for.
    #[error("nothing that was complete came in {limit:?} ({setting}): connect again")]
    TooSlow {
        /// The setting that holds the limit.
        setting: &'static str,
        /// Its value.
        limit: Duration,
    },
    /// The call needs a credential, and has none.
    #[error("this needs a credential: a token in the metadata `authorization: Bearer TOKEN`, or a client certificate")]
    CredentialMissing,
    /// The credential is none that the gateway knows.
    #[error("the credential is not known: mistyped, revoked, or of another gateway")]
    CredentialInvalid,
    /// The credential has expired.
    #[error("the credential has expired")]
    CredentialExpired,
    /// The credential was revoked while the call was open, or what its owner may do was changed.
    #[error("the credential was revoked, or what its owner may do was changed")]
    CredentialRevoked,
    /// A token of the provider can't be verified yet.
    #[error("the keys of the OpenID Connect provider are not there, so that no token of it can be verified: try again later")]
    KeysUnavailable,
    /// Whoever calls may not do this, whether what it names exists or not.
    #[error("the caller may not do this")]
    PermissionDenied,
    /// There is no such credential to manage.
    #[error("there is no credential {0:?}")]
    CredentialNotFound(String),
    /// As many devices as an enrolment key is for have enrolled with it.
    #[error("the enrolment key is used up")]
    EnrolmentKeyUsedUp,
    /// No operator has this name.
    #[error("there is no operator {0:?}")]
    OperatorNotFound(String),
    /// An operator has this name.
    #[error("there is an operator {0:?} already")]
    OperatorExists(String),
    /// No rejected batch of the device that is still kept has this number.
    #[error(
        "there is no rejected batch {0} of this device: it was replayed or deleted, or so many were rejected since that it is no longer kept"
    )]
    DeadLetterNotFound(i64),
    /// A rejected batch still can't be stored.
    #[error("the batch {dead_letter} still can't be stored: {reject}")]
    StillRejected {
        /// Its number.
        dead_letter: i64,
        /// Why.
        reject: Box<BatchReject>,
    },
    /// A defect of the gateway. The cause is in its log under the request id.
    #[error("internal error; the gateway's log has the cause under this request id")]
    Internal,
}

/// Why something that both checks and stores did not happen.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It can't be done; the caller is told why.
    #[error(transparent)]
    Refused(#[from] Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<Failure> for Error {
    /// Ends the way of a store's error: it is logged here, and the client is told no more than that the store failed.
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(error) => error,
            Failure::Store(error) => {
                let damaged = matches!(error, StoreError::Damaged(_));
                tracing::error!(error = &error as &dyn std::error::Error, "store.failed");
                if damaged { Self::Internal } else { Self::StoreUnavailable }
            }
        }
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        Error::from(failure).into()
    }
}

/// The stable name of a cause: `google.rpc.ErrorInfo.reason`, and the label of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the name of a variant of `Error`")]
pub enum Reason {
    InvalidArgument,
    DeviceNotFound,
    DeviceExists,
    DeviceEtagMismatch,
    SensorNotFound,
    ConfigNotFound,
    ConfigEtagMismatch,
    ConfigTooLarge,
    SequenceGap,
    PositionExpired,
    QueryTooLarge,
    StoreUnavailable,
    Overloaded,
    RateLimited,
    Draining,
    DeadlineExceeded,
    TooSlow,
    CredentialMissing,
    CredentialInvalid,
    CredentialExpired,
    CredentialRevoked,
    KeysUnavailable,
    PermissionDenied,
    CredentialNotFound,
    EnrolmentKeyUsedUp,
    OperatorNotFound,
    OperatorExists,
    DeadLetterNotFound,
    StillRejected,
    Internal,
}

impl Reason {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 30] = [
        Self::InvalidArgument,
        Self::DeviceNotFound,
        Self::DeviceExists,
        Self::DeviceEtagMismatch,
        Self::SensorNotFound,
        Self::ConfigNotFound,
        Self::ConfigEtagMismatch,
        Self::ConfigTooLarge,
        Self::SequenceGap,
        Self::PositionExpired,
        Self::QueryTooLarge,
        Self::StoreUnavailable,
        Self::Overloaded,
        Self::RateLimited,
        Self::Draining,
        Self::DeadlineExceeded,
        Self::TooSlow,
        Self::CredentialMissing,
        Self::CredentialInvalid,
        Self::CredentialExpired,
        Self::CredentialRevoked,
        Self::KeysUnavailable,
        Self::PermissionDenied,
        Self::CredentialNotFound,
        Self::EnrolmentKeyUsedUp,
        Self::OperatorNotFound,
        Self::OperatorExists,
        Self::DeadLetterNotFound,
        Self::StillRejected,
        Self::Internal,
    ];

    /// The name: upper snake case, as AIP-193 asks for.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::DeviceNotFound => "DEVICE_NOT_FOUND",
            Self::DeviceExists => "DEVICE_EXISTS",
            Self::DeviceEtagMismatch => "DEVICE_ETAG_MISMATCH",
            Self::SensorNotFound => "SENSOR_NOT_FOUND",
            Self::ConfigNotFound => "CONFIG_NOT_FOUND",
            Self::ConfigEtagMismatch => "CONFIG_ETAG_MISMATCH",
            Self::ConfigTooLarge => "CONFIG_TOO_LARGE",
            Self::SequenceGap => "SEQUENCE_GAP",
            Self::PositionExpired => "POSITION_EXPIRED",
            Self::QueryTooLarge => "QUERY_TOO_LARGE",
            Self::StoreUnavailable => "STORE_UNAVAILABLE",
            Self::Overloaded => "OVERLOADED",
            Self::RateLimited => "RATE_LIMITED",
            Self::Draining => "DRAINING",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::TooSlow => "TOO_SLOW",
            Self::CredentialMissing => "CREDENTIAL_MISSING",
            Self::CredentialInvalid => "CREDENTIAL_INVALID",
            Self::CredentialExpired => "CREDENTIAL_EXPIRED",
            Self::CredentialRevoked => "CREDENTIAL_REVOKED",
            Self::KeysUnavailable => "KEYS_UNAVAILABLE",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::CredentialNotFound => "CREDENTIAL_NOT_FOUND",
            Self::EnrolmentKeyUsedUp => "ENROLMENT_KEY_USED_UP",
            Self::OperatorNotFound => "OPERATOR_NOT_FOUND",
            Self::OperatorExists => "OPERATOR_EXISTS",
            Self::DeadLetterNotFound => "DEAD_LETTER_NOT_FOUND",
            Self::StillRejected => "STILL_REJECTED",
            Self::Internal => "INTERNAL",
        }
    }

    /// The gRPC code that goes with it.
    pub fn code(self) -> Code {
        match self {
            Self::InvalidArgument | Self::ConfigTooLarge => Code::InvalidArgument,
            Self::DeviceNotFound
            | Self::SensorNotFound
            | Self::ConfigNotFound
            | Self::CredentialNotFound
            | Self::OperatorNotFound
            | Self::DeadLetterNotFound => Code::NotFound,
            Self::DeviceExists | Self::OperatorExists => Code::AlreadyExists,
            Self::DeviceEtagMismatch | Self::ConfigEtagMismatch => Code::Aborted,
            Self::SequenceGap | Self::EnrolmentKeyUsedUp | Self::StillRejected => Code::FailedPrecondition,
            Self::CredentialMissing | Self::CredentialInvalid | Self::CredentialExpired | Self::CredentialRevoked => Code::Unauthenticated,
            Self::PermissionDenied => Code::PermissionDenied,
            Self::PositionExpired => Code::OutOfRange,
            Self::QueryTooLarge | Self::Overloaded | Self::RateLimited => Code::ResourceExhausted,
            Self::StoreUnavailable | Self::KeysUnavailable | Self::Draining => Code::Unavailable,
            Self::DeadlineExceeded | Self::TooSlow => Code::DeadlineExceeded,
            Self::Internal => Code::Internal,
        }
    }

    /// How long a client waits at the least before it tries again; `None` where trying the same again does not help.
    pub fn retry_after(self) -> Option<Duration> {
        match self {
            Self::StoreUnavailable | Self::KeysUnavailable | Self::Overloaded => Some(Duration::from_secs(2)),
            Self::RateLimited => Some(Duration::from_secs(1)),
            Self::Draining => Some(Duration::from_millis(500)),
            _ => None,
        }
    }
}

impl Error {
    /// One bad field.
    pub fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self::InvalidArgument(vec![Violation::new(field, description)])
    }

    /// The cause's stable name.
    pub fn reason(&self) -> Reason {
        match self {
            Self::InvalidArgument(_) => Reason::InvalidArgument,
            Self::DeviceNotFound(_) => Reason::DeviceNotFound,
            Self::DeviceExists(_) => Reason::DeviceExists,
            Self::DeviceEtagMismatch { .. } => Reason::DeviceEtagMismatch,
            Self::SensorNotFound { .. } => Reason::SensorNotFound,
            Self::ConfigNotFound(_) => Reason::ConfigNotFound,
            Self::ConfigEtagMismatch { .. } => Reason::ConfigEtagMismatch,
            Self::ConfigTooLarge { .. } => Reason::ConfigTooLarge,
            Self::SequenceGap { .. } => Reason::SequenceGap,
            Self::PositionExpired { .. } => Reason::PositionExpired,
            Self::QueryTooLarge { .. } => Reason::QueryTooLarge,
            Self::StoreUnavailable => Reason::StoreUnavailable,
            Self::Overloaded { .. } => Reason::Overloaded,
            Self::RateLimited { .. } => Reason::RateLimited,
            Self::Draining => Reason::Draining,
            Self::DeadlineExceeded(_) => Reason::DeadlineExceeded,
            Self::TooSlow { .. } => Reason::TooSlow,
            Self::CredentialMissing => Reason::CredentialMissing,
            Self::CredentialInvalid => Reason::CredentialInvalid,
            Self::CredentialExpired => Reason::CredentialExpired,
            Self::CredentialRevoked => Reason::CredentialRevoked,
            Self::KeysUnavailable => Reason::KeysUnavailable,
            Self::PermissionDenied => Reason::PermissionDenied,
            Self::CredentialNotFound(_) => Reason::CredentialNotFound,
            Self::EnrolmentKeyUsedUp => Reason::EnrolmentKeyUsedUp,
            Self::OperatorNotFound(_) => Reason::OperatorNotFound,
            Self::OperatorExists(_) => Reason::OperatorExists,
            Self::DeadLetterNotFound(_) => Reason::DeadLetterNotFound,
            Self::StillRejected { .. } => Reason::StillRejected,
            Self::Internal => Reason::Internal,
        }
    }

    /// How long the client waits before it tries again.
    fn retry_after(&self) -> Option<Duration> {
        let least = self.reason().retry_after();
        match self {
            Self::RateLimited { retry_after, .. } => least.max(Some(*retry_after)),
            _ => least,
        }
    }

    /// `ErrorInfo.metadata`: the facts of the message, for machines.
    fn metadata(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::DeviceNotFound(device) | Self::DeviceExists(device) | Self::ConfigNotFound(device) => {
                vec![("device", device.to_string())]
            }
            Self::DeviceEtagMismatch { device, current } | Self::ConfigEtagMismatch { device, current } => {
                vec![("device", device.to_string()), ("current_etag", current.clone())]
            }
            Self::SensorNotFound { device, sensor } => vec![("device", device.to_string()), ("sensor", sensor.clone())],
            Self::ConfigTooLarge { bytes, bytes_max } => vec![("bytes", bytes.to_string()), ("bytes_max", bytes_max.to_string())],
            Self::SequenceGap { device, stream_id, expected, received } => vec![
                ("device", device.to_string()),
                ("stream_id", stream_id.to_string()),
                ("expected_sequence", expected.to_string()),
                ("received_sequence", received.to_string()),
            ],
            Self::QueryTooLarge { setting, limit } | Self::Overloaded { setting, limit } => {
                vec![("setting", (*setting).to_owned()), ("limit", limit.to_string())]
            }
            Self::RateLimited { setting, limit, accepted, .. } => {
                let rate = [("setting", (*setting).to_owned()), ("limit", limit.to_string())];
                let accepted = accepted
                    .map(|count| [("accepted_batches", count.batches.to_string()), ("accepted_readings", count.readings.to_string())]);
                rate.into_iter().chain(accepted.into_iter().flatten()).collect()
            }
            Self::DeadlineExceeded(deadline) => vec![("deadline_ms", deadline.as_millis().to_string())],
            Self::TooSlow { setting, limit } => vec![("setting", (*setting).to_owned()), ("limit_ms", limit.as_millis().to_string())],
            Self::CredentialNotFound(credential) => vec![("credential", credential.clone())],
            Self::OperatorNotFound(operator) | Self::OperatorExists(operator) => vec![("operator", operator.clone())],
            Self::DeadLetterNotFound(id) => vec![("dead_letter", id.to_string())],
            Self::StillRejected { dead_letter, reject } => vec![
                ("dead_letter", dead_letter.to_string()),
                ("reject_reason", reason_name(reject.reason).to_owned()),
                ("field", reject.field.clone()),
            ],
            Self::InvalidArgument(_)
            | Self::PositionExpired { .. }
            | Self::StoreUnavailable
            | Self::Draining
            | Self::CredentialMissing
            | Self::CredentialInvalid
            | Self::CredentialExpired
            | Self::CredentialRevoked
            | Self::KeysUnavailable
            | Self::PermissionDenied
            | Self::EnrolmentKeyUsedUp
            | Self::Internal => vec![],
        }
    }
}

fn rate_limited(setting: &str, limit: u64, retry_after: Duration, accepted: Option<&Count>) -> String {
    let stored = accepted.map(|count| format!("; {} batches with {} readings of this call are stored", count.batches, count.readings));
    let seconds = retry_after.as_secs_f64().ceil().max(1.0);
    format!("the rate of {limit} ({setting}) is used up: try again in {seconds} s{}", stored.unwrap_or_default())
}

fn summary(violations: &[Violation]) -> String {
    let shown: Vec<String> = violations.iter().take(3).map(|violation| format!("{}: {}", violation.field, violation.description)).collect();
    let more = violations.len().saturating_sub(shown.len());
    let more = if more == 0 { String::new() } else { format!("; and {more} more") };
    format!("{}{more}", shown.join("; "))
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let reason = error.reason();
        let mut details = ErrorDetails::new();
        details.set_error_info(
            reason.as_str(),
            DOMAIN,
            error.metadata().into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<std::collections::HashMap<_, _>>(),
        );
        if let Error::InvalidArgument(violations) = &error {
            for violation in violations {
                details.add_bad_request_violation(&violation.field, &violation.description);
            }
        }
        if let Some(delay) = error.retry_after() {
            details.set_retry_info(Some(delay));
        }
        Status::with_error_details(reason.code(), error.to_string(), details)
    }
}

/// Collects the violations of a request, so that a client is told all of them at once.
#[derive(Debug, Default)]
pub struct Violations(Vec<Violation>);

impl Violations {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the value of a good field, or notes why it is bad.
    pub fn check<T>(&mut self, field: &str, result: Result<T, String>) -> Option<T> {
        result.map_err(|description| self.add(field, description)).ok()
    }

    /// Takes the value of a good field, or notes all that is bad about it.
    pub fn check_all<T>(&mut self, result: Result<T, Vec<Violation>>) -> Option<T> {
        result.map_err(|violations| self.0.extend(violations)).ok()
    }

    /// Notes one.
    pub fn add(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.0.push(Violation::new(field, description));
    }

    /// The error, when there is any violation.
    pub fn into_result(self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::InvalidArgument(self.0)) }
    }

    /// The error of a request that is known to have a violation.
    pub fn into_error(self) -> Error {
        debug_assert!(!self.0.is_empty());
        Error::InvalidArgument(self.0)
    }
}

/// What a peer can read out of a [`Status`] that the gateway made; for our own clients.
#[derive(Debug, Clone, Default)]
pub struct StatusFacts {
    /// `ErrorInfo`, when there is one.
    pub info: Option<ErrorInfo>,
    /// All of `BadRequest`'s violations.
    pub violations: Vec<FieldViolation>,
    /// `RetryInfo.retry_delay`.
    pub retry_after: Option<Duration>,
}

impl StatusFacts {
    /// Reads the details; all empty when there are none.
    pub fn of(status: &Status) -> Self {
        let details = status.get_error_details();
        Self {
            info: details.error_info().cloned(),
            violations: details.bad_request().map(|BadRequest { field_violations }| field_violations.clone()).unwrap_or_default(),
            retry_after: details.retry_info().and_then(|info| info.retry_delay),
        }
    }

    /// `ErrorInfo.reason`; empty when there is none.
    pub fn reason(&self) -> &str {
        self.info.as_ref().map_or("", |info| &info.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_all_that_the_error_knows() {
        let device = DeviceId::parse("pump-1").expect("good");
        let error = Error::SequenceGap { device, stream_id: StreamId::new(), expected: 4, received: 9 };
        let status = Status::from(error);
        assert_eq!(status.code(), Code::FailedPrecondition);
        let info = StatusFacts::of(&status).info.expect("set");
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("SEQUENCE_GAP", DOMAIN));
        assert_eq!(info.metadata["expected_sequence"], "4");
    }

    #[test]
    fn every_violation_is_in_the_details_and_retries_are_told() {
        let mut violations = Violations::new();
        (0..5).for_each(|index| violations.add(format!("f{index}"), "bad"));
        let status = Status::from(violations.into_error());
        assert_eq!(StatusFacts::of(&status).violations.len(), 5);
        assert!(status.message().ends_with("and 2 more"));
        assert_eq!(StatusFacts::of(&Error::StoreUnavailable.into()).retry_after, Some(Duration::from_secs(2)));
    }
}
