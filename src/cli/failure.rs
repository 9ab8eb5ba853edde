//! How a command fails, and what its user is told.

use crate::error::{Reason, StatusFacts};
use std::{error::Error as _, fmt::Write as _, io, process::ExitCode, time::Duration};
use tonic::{Code, Status};

/// Why a command did not do what it was asked for.
#[derive(Debug)]
pub enum Failure {
    /// The arguments or settings are wrong.
    Usage(String),
    /// Nothing answers where the gateway should be.
    Unreachable {
        /// Where.
        endpoint: String,
        /// The cause, from the network.
        why: String,
    },
    /// The gateway did not answer in time.
    TimedOut(Duration),
    /// The gateway refused, or the connection broke.
    Call(Box<Status>),
    /// Reading or writing on this side failed.
    Io(io::Error),
    /// Anything else, in words.
    Failed(String),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Call(Box::new(status))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<csv::Error> for Failure {
    fn from(error: csv::Error) -> Self {
        Self::Io(error.into())
    }
}

impl Failure {
    /// Tells the user, and says how the process ends.
    pub fn report(&self) -> ExitCode {
        match self {
            // Who reads our output has seen enough: `tidegate … | head` ends like any other command there.
            Self::Io(error) if error.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
            _ => eprintln!("error: {}", self.text()),
        }
        ExitCode::from(if matches!(self, Self::Usage(_)) { 2 } else { 1 })
    }

    /// What happened and what to do, over one or more lines.
    pub fn text(&self) -> String {
        match self {
            Self::Usage(text) | Self::Failed(text) => text.clone(),
            Self::Unreachable { endpoint, why } => format!(
                "no gateway answers at {endpoint}: {why}\n  Is it running? Start it with `tidegate serve`, or say where it is with --endpoint or TIDEGATE_ENDPOINT."
            ),
            Self::TimedOut(after) => {
                format!(
                    "the gateway did not answer within {after:?}\n  --timeout lets it take longer; `tidegate health` tells whether it serves."
                )
            }
            Self::Call(status) => status_text(status),
            Self::Io(error) => error.to_string(),
        }
    }

    /// Whether the same call may do better in a moment: the gateway is away, stopping, or busy.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::TimedOut(_) => true,
            Self::Call(status) => {
                status.source().is_some()
                    || matches!(
                        status.code(),
                        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::ResourceExhausted | Code::Internal
                    )
            }
            Self::Usage(_) | Self::Io(_) | Self::Failed(_) => false,
        }
    }

    /// How long the gateway asks to wait before the next try.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Call(status) => StatusFacts::of(status).retry_after,
            _ => None,
        }
    }
}

fn status_text(status: &Status) -> String {
    if status.source().is_some() {
        return format!("the connection to the gateway broke: {}", status.message());
    }
    let facts = StatusFacts::of(status);
    let mut text = if status.message().is_empty() { status.code().to_string() } else { status.message().to_owned() };
    for violation in &facts.violations {
        let _ = write!(text, "\n  field {}: {}", violation.field, violation.description);
    }
    if let Some(info) = &facts.info {
        let mut metadata: Vec<String> = info.metadata.iter().map(|(key, value)| format!("{key}={value}")).collect();
        metadata.sort();
        let _ = write!(text, "\n  reason: {}", [vec![info.reason.clone()], metadata].concat().join(" "));
    } else {
        let _ = write!(text, "\n  code: {:?}", status.code());
    }
    if let Some(delay) = facts.retry_after {
        let _ = write!(text, "\n  try again in {delay:?}");
    }
    if let Some(hint) = Reason::ALL.into_iter().find(|reason| reason.as_str() == facts.reason()).and_then(hint) {
        let _ = write!(text, "\n  {hint}");
    }
    text
}

/// What an operator at a terminal can do about it.
fn hint(reason: Reason) -> Option<&'static str> {
    match reason {
        Reason::DeviceNotFound => Some("`tidegate device list` shows all devices."),
        Reason::DeviceExists => Some("`tidegate device show` shows it, `tidegate device update` changes it."),
        Reason::SensorNotFound => Some("`tidegate device show` shows a device's sensors."),
        Reason::ConfigNotFound => Some("`tidegate config set` sets one."),
        Reason::ConfigEtagMismatch => Some("`tidegate config get` shows the current configuration and its etag."),
        Reason::DeviceEtagMismatch => Some("`tidegate device show` shows the device as it is now."),
        Reason::PositionExpired => Some("Follow with `--from beginning`, or read the past with `tidegate query`."),
        Reason::QueryTooLarge => Some("Narrow it with --start, --end and --sensor."),
        Reason::CredentialMissing => Some("--token-file or TIDEGATE_TOKEN names a token."),
        Reason::CredentialInvalid | Reason::CredentialExpired | Reason::CredentialRevoked => {
            Some("An administrator can make a new token: `tidegate operator token create`; one of a provider comes from there.")
        }
        Reason::PermissionDenied => Some("`tidegate whoami` shows your role and scope."),
        Reason::OperatorNotFound => Some("`tidegate operator list` shows all operators."),
        Reason::OperatorExists => Some("`tidegate operator update` changes it."),
        Reason::DeadLetterNotFound => Some("`tidegate dead-letter list` shows the rejected batches that are still kept."),
        Reason::StillRejected => Some("`tidegate dead-letter show` shows what was received."),
        Reason::Internal => Some("The gateway's log has the cause."),
        Reason::InvalidArgument
        | Reason::ConfigTooLarge
        | Reason::SequenceGap
        | Reason::StoreUnavailable
        | Reason::Overloaded
        | Reason::RateLimited
        | Reason::Draining
        | Reason::DeadlineExceeded
        | Reason::TooSlow
        | Reason::KeysUnavailable
        | Reason::CredentialNotFound
        | Reason::EnrolmentKeyUsedUp => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::{Error, Violations},
        model::DeviceId,
    };

    #[test]
    fn a_refusal_is_told_with_its_reason_its_facts_and_what_to_do() {
        let failure = Failure::from(Status::from(Error::DeviceNotFound(DeviceId::parse("pump-9").expect("good"))));
        assert_eq!(
            failure.text(),
            "there is no device pump-9\n  reason: DEVICE_NOT_FOUND device=pump-9\n  `tidegate device list` shows all devices."
        );
        assert!(!failure.is_passing());
    }

    #[test]
    fn every_violation_has_its_line() {
        let mut violations = Violations::new();
        (0..5).for_each(|index| violations.add(format!("devices[{index}]"), "bad"));
        let text = Failure::from(Status::from(violations.into_error())).text();
        assert_eq!(text.lines().filter(|line| line.starts_with("  field devices[")).count(), 5, "{text}");
    }

    #[test]
    fn what_passes_is_told_with_when_to_try_again() {
        let failure = Failure::from(Status::from(Error::StoreUnavailable));
        assert!(failure.is_passing());
        assert_eq!(failure.retry_after(), Some(Duration::from_secs(2)));
        assert!(failure.text().contains("try again in 2s"), "{}", failure.text());
    }

    #[test]
    fn an_error_without_details_shows_its_code() {
        assert_eq!(Failure::from(Status::unimplemented("no such method")).text(), "no such method\n  code: Unimplemented");
    }
}
