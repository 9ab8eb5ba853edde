//! W3C Trace Context (<https://www.w3.org/TR/trace-context/>): which trace a call is part of.

use http::{HeaderMap, HeaderName, HeaderValue};
use std::fmt;

/// The header that names the trace, and the caller's span in it.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// The header with what tracing systems say to one another.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// How long a `tracestate` may be to be handed on: what every participant must be able to (section 3.3.1.5).
const TRACE_STATE_BYTES_MAX: usize = 512;
/// How many entries it may have (section 3.3.1.1).
const TRACE_STATE_ENTRIES_MAX: usize = 32;
/// `00-` trace id `-` parent id `-` flags.
const TRACEPARENT_BYTES: usize = 55;
/// The flag that says that the caller may have recorded the trace.
const SAMPLED: u8 = 1;

/// A trace: 16 bytes, not all of them 0. Shown as hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceId(u128);

/// A span of a trace: 8 bytes, not all of them 0. Shown as hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanId(u64);

impl TraceId {
    /// A new one, all bytes of which are random.
    pub fn random() -> Self {
        Self(rand::random::<u128>().max(1))
    }

    /// As in OTLP.
    pub fn as_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// The part that is random with every maker of ids (section 7.2): what a share of traces is chosen by.
    pub fn low_half(self) -> u64 {
        self.0 as u64
    }
}

impl SpanId {
    /// A new one.
    pub fn random() -> Self {
        Self(rand::random::<u64>().max(1))
    }

    /// As in OTLP.
    pub fn as_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What the `traceparent` of a call says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    /// The trace.
    pub trace_id: TraceId,
    /// The span of who calls, or who answers.
    pub span_id: SpanId,
    /// Whether that span may have been recorded.
    pub sampled: bool,
}

impl TraceParent {
    /// The first span of a new trace.
    pub fn new_trace() -> Self {
        Self { trace_id: TraceId::random(), span_id: SpanId::random(), sampled: false }
    }

    /// A new span of the same trace.
    pub fn next_span(self) -> Self {
        Self { span_id: SpanId::random(), ..self }
    }

    /// What a caller says; `None` when that is nothing, or not as the specification has it.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let value = values.next()?;
        // Two contradict one another.
        if values.next().is_some() { None } else { Self::parse(value.as_bytes()) }
    }

    /// Section 3.2: of later versions it is read what this one has (section 4.3).
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (known, rest) = bytes.split_at_checked(TRACEPARENT_BYTES)?;
        let [v1, v2, b'-', ids @ .., b'-', f1, f2] = known else { return None };
        let (trace_id, span_id) = ids.split_at_checked(32)?;
        let version = hex(&[*v1, *v2])?;
        let as_long_as_its_version = if version == 0 { rest.is_empty() } else { rest.first().is_none_or(|&byte| byte == b'-') };
        let [b'-', span_id @ ..] = span_id else { return None };
        let (trace_id, span_id, flags) = (hex(trace_id)?, hex(span_id)?, hex(&[*f1, *f2])?);
        (version != 0xff && as_long_as_its_version && trace_id != 0 && span_id != 0).then(|| Self {
            trace_id: TraceId(trace_id),
            span_id: SpanId(u64::try_from(span_id).expect("it has 16 digits")),
            sampled: flags & u128::from(SAMPLED) != 0,
        })
    }

    /// The header's value.
    pub fn to_header(self) -> HeaderValue {
        HeaderValue::from_str(&self.to_string()).expect("it is visible ASCII")
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = if self.sampled { SAMPLED } else { 0 };
        write!(f, "00-{}-{}-{flags:02x}", self.trace_id, self.span_id)
    }
}

/// Lower-case hexadecimal digits, at most 32.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, digit| match digit {
        b'0'..=b'9' => Some(number << 4 | u128::from(digit - b'0')),
        b'a'..=b'f' => Some(number << 4 | u128::from(digit - b'a' + 10)),
        _ => None,
    })
}

/// The `tracestate` that came along with a good `traceparent`; empty when there is none, or it is not to be handed on.
pub fn trace_state(headers: &HeaderMap) -> String {
    let values: Option<Vec<&str>> = headers.get_all(TRACESTATE).iter().map(|value| value.to_str().ok()).collect();
    // Several are one list (RFC 9110 section 5.3).
    let list = values.unwrap_or_default().join(",");
    let entries: Vec<&str> = list.split(',').map(|entry| entry.trim_matches([' ', '\t'])).filter(|entry| !entry.is_empty()).collect();
    let good =
        list.len() <= TRACE_STATE_BYTES_MAX && entries.len() <= TRACE_STATE_ENTRIES_MAX && entries.iter().all(|entry| is_entry(entry));
    if good { entries.join(",") } else { String::new() }
}

/// Section 3.3.1.3: `key=value`, with the characters that each may have.
fn is_entry(entry: &str) -> bool {
    let Some((key, value)) = entry.split_once('=') else { return false };
    let in_key = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-*/@".contains(c);
    let begins_well = key.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let in_value = |c: char| (' '..='~').contains(&c) && c != '=';
    begins_well && key.len() <= 256 && key.chars().all(in_key) && !value.is_empty() && value.len() <= 256 && value.chars().all(in_value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(name: HeaderName, values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (name.clone(), HeaderValue::from_str(value).expect("HTTP allows it"))).collect()
    }

    fn parent(values: &[&str]) -> Option<TraceParent> {
        TraceParent::of(&headers(TRACEPARENT, values))
    }

    #[test]
    fn what_is_written_reads_back() {
        let example = parent(&[EXAMPLE]).expect("the specification's own");
        assert_eq!(example.to_string(), EXAMPLE);
        assert_eq!((example.trace_id.to_string().as_str(), example.sampled), ("0af7651916cd43dd8448eb211c80319c", true));
        for parent in [TraceParent::new_trace(), example.next_span()] {
            assert_eq!(TraceParent::parse(parent.to_header().as_bytes()), Some(parent));
        }
        assert_ne!(example.next_span().span_id, example.span_id);
    }

    #[test]
    fn flags_and_versions_that_are_not_known_are_left_alone() {
        let unsampled = parent(&["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-fe"]).expect("good");
        assert!(!unsampled.sampled);
        let later =
            ["cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more"];
        assert!(later.iter().all(|later| parent(&[later]) == parent(&[EXAMPLE])));
    }

    #[test]
    fn what_is_not_as_specified_is_ignored() {
        for bad in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01.",
            "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01.more",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-B7AD6B7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319cb-7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331_01",
            "0g-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(parent(&[bad]), None, "{bad:?}");
        }
        assert_eq!(parent(&[]), None);
        assert_eq!(parent(&[EXAMPLE, EXAMPLE]), None, "two of them");
    }

    #[test]
    fn a_trace_state_is_one_list_or_dropped() {
        let state = |values: &[&str]| trace_state(&headers(TRACESTATE, values));
        assert_eq!(
            state(&["congo=t61rcWkgMzE, rojo=00f067aa0ba902b7", "tenant@vendor=1"]),
            "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7,tenant@vendor=1"
        );
        let many = vec!["a=1"; 33];
        for dropped in [&["no entry"][..], &["=1"], &["a="], &["A=1"], &["a=1=2"], &many, &[&format!("a={}", "x".repeat(257))], &[]] {
            assert_eq!(state(dropped), "", "{dropped:?}");
        }
    }
}
