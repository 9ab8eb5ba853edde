//! The list of settings.

use super::{DatabaseUrl, JwksLocation};
use figment::value::Value;
use std::{fmt, net::SocketAddr, ops::RangeInclusive, time::Duration};

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// Its place in the TOML file: `section.name`.
    pub key: &'static str,
    /// What it means.
    pub doc: &'static str,
    /// Which values it takes.
    pub allowed: Allowed,
}

/// Which values a setting takes.
#[derive(Debug, Clone)]
pub enum Allowed {
    /// IP address and port; port 0 picks a free one.
    Address,
    /// `true` or `false`.
    Flag,
    /// A directory.
    Path,
    /// A file; may be empty.
    File,
    /// Where a PostgreSQL database is; may be empty.
    DatabaseUrl,
    /// Where the keys of an OpenID Connect provider are; may be empty.
    Jwks,
    /// A text of so many characters, none of them a control character.
    Text(RangeInclusive<usize>),
    /// Where something is that is spoken to over HTTP; may be empty.
    HttpUrl,
    /// A share of all.
    Ratio,
    /// A number of things.
    Count(RangeInclusive<u64>),
    /// A number of bytes.
    Bytes(RangeInclusive<u64>),
    /// Such as `250ms`, `30s`, `1h 30m`.
    Duration(RangeInclusive<Duration>),
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// Directives of `tracing_subscriber::EnvFilter`.
    LogFilter,
}

impl Setting {
    /// The environment variable: `TIDEGATE_GRPC_LISTEN`.
    pub fn variable(&self) -> String {
        format!("TIDEGATE_{}", self.key.to_uppercase().replace('.', "_"))
    }

    /// The flag: `--grpc-listen`.
    pub fn flag(&self) -> String {
        format!("--{}", self.key.replace(['.', '_'], "-"))
    }
}

impl Allowed {
    /// Whether `value` is allowed.
    pub fn takes(&self, value: &Value) -> bool {
        let number = value
            .to_u128()
            .and_then(|number| u64::try_from(number).ok())
            .or_else(|| value.to_i128().and_then(|number| u64::try_from(number).ok()));
        match self {
            Self::Address => value.as_str().is_some_and(|text| text.parse::<SocketAddr>().is_ok()),
            Self::Flag => value.to_bool().is_some(),
            Self::Path => value.as_str().is_some_and(|text| !text.is_empty()),
            Self::File => value.as_str().is_some(),
            Self::DatabaseUrl => value.as_str().is_some_and(DatabaseUrl::is_allowed),
            Self::Jwks => value.as_str().is_some_and(|text| text.is_empty() || JwksLocation::parse(text).is_some()),
            Self::Text(range) => {
                value.as_str().is_some_and(|text| range.contains(&text.chars().count()) && !text.contains(char::is_control))
            }
            Self::HttpUrl => value.as_str().is_some_and(|text| text.is_empty() || is_http_url(text)),
            Self::Ratio => value.to_f64().or(number.map(|number| number as f64)).is_some_and(|ratio| (0.0..=1.0).contains(&ratio)),
            Self::Count(range) | Self::Bytes(range) => number.is_some_and(|number| range.contains(&number)),
            Self::Duration(range) => value.as_str().and_then(super::parse_duration).is_some_and(|duration| range.contains(&duration)),
            Self::OneOf(words) => value.as_str().is_some_and(|text| words.contains(&text)),
            Self::LogFilter => value.as_str().is_some_and(|text| text.parse::<tracing_subscriber::EnvFilter>().is_ok()),
        }
    }

    /// What stands for the value in `--help`.
    pub fn value_name(&self) -> &'static str {
        match self {
            Self::Address => "IP:PORT",
            Self::Flag => "BOOL",
            Self::Path => "DIR",
            Self::File => "FILE",
            Self::DatabaseUrl => "URL",
            Self::Jwks => "FILE|URL",
            Self::Text(_) => "TEXT",
            Self::HttpUrl => "URL",
            Self::Ratio => "RATIO",
            Self::Count(_) => "N",
            Self::Bytes(_) => "BYTES",
            Self::Duration(_) => "DURATION",
            Self::OneOf(_) => "WORD",
            Self::LogFilter => "FILTER",
        }
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address => f.write_str("IP:PORT"),
            Self::Flag => f.write_str("true or false"),
            Self::Path => f.write_str("a directory"),
            Self::File => f.write_str("a file, or empty"),
            Self::DatabaseUrl => f.write_str("postgres://USER:PASSWORD@HOST:PORT/DATABASE, or empty; `***` is not a password"),
            Self::Jwks => f.write_str("a file, https://HOST/PATH, http://HOST/PATH with a loopback address or localhost, or empty"),
            Self::Text(range) => write!(f, "{} to {} characters", range.start(), range.end()),
            Self::HttpUrl => f.write_str("an http or https address, or empty"),
            Self::Ratio => f.write_str("0 to 1"),
            Self::Count(range) => write!(f, "{} to {}", range.start(), range.end()),
            Self::Bytes(range) => write!(f, "{} to {} bytes", range.start(), range.end()),
            Self::Duration(range) => write!(f, "a duration of {:#} to {:#}", friendly(range.start()), friendly(range.end())),
            Self::OneOf(words) => f.write_str(&words.join(" or ")),
            Self::LogFilter => f.write_str("directives such as info or info,tidegate=debug"),
        }
    }
}

fn is_http_url(text: &str) -> bool {
    let Ok(uri) = text.parse::<http::Uri>() else { return false };
    matches!(uri.scheme_str(), Some("http" | "https")) && uri.authority().is_some_and(|authority| !authority.host().is_empty())
}

fn friendly(duration: &Duration) -> jiff::SignedDuration {
    jiff::SignedDuration::try_from(*duration).unwrap_or(jiff::SignedDuration::MAX)
}

const fn seconds(range: RangeInclusive<u64>) -> Allowed {
    Allowed::Duration(Duration::from_secs(*range.start())..=Duration::from_secs(*range.end()))
}

const fn setting(key: &'static str, allowed: Allowed, doc: &'static str) -> Setting {
    Setting { key, doc, allowed }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const DAY: u64 = 24 * 3600;

/// Every setting, in the order of the commented file.
pub static SETTINGS: &[Setting] = &[
    setting(
        "insecure",
        Allowed::Flag,
        "Listen on other than loopback addresses although no credentials are asked for, or without TLS: everybody who can connect can read and write, or read along.",
    ),
    setting("grpc.listen", Allowed::Address, "Where devices and operators connect."),
    setting(
        "grpc.connections_max",
        Allowed::Count(1..=1_000_000),
        "How many connections may be open at once; further ones wait in the listen queue.",
    ),
    setting(
        "grpc.streams_per_connection_max",
        Allowed::Count(1..=100_000),
        "How many calls one connection may have open at once (SETTINGS_MAX_CONCURRENT_STREAMS, RFC 9113).",
    ),
    setting(
        "grpc.stream_window_bytes",
        Allowed::Bytes(1..=GIB),
        "How much one call may send ahead of being read (HTTP/2 flow control). Bounds memory and, over slow links, speed: window / round trip time.",
    ),
    setting("grpc.connection_window_bytes", Allowed::Bytes(1..=GIB), "How much all calls of one connection may send ahead of being read."),
    setting("grpc.header_bytes_max", Allowed::Bytes(KIB..=MIB), "How large the metadata of one call may be."),
    setting(
        "grpc.message_bytes_max",
        Allowed::Bytes(KIB..=GIB),
        "How large one message may be; a larger one ends its call with OUT_OF_RANGE.",
    ),
    setting(
        "grpc.incoming_bytes_max",
        Allowed::Bytes(64 * KIB..=64 * GIB),
        "How much memory all messages may take together that have begun to come in, are not complete, and are larger than grpc.stream_window_bytes; further ones wait for room.",
    ),
    setting("grpc.keepalive_interval", seconds(1..=DAY), "How long a connection may be silent before the gateway pings it."),
    setting("grpc.keepalive_timeout", seconds(1..=DAY), "How long a ping may stay unanswered before the connection is ended."),
    setting(
        "grpc.unary_calls_max",
        Allowed::Count(1..=1_000_000),
        "How many unary calls may be worked on at once; further ones are refused with OVERLOADED.",
    ),
    setting(
        "grpc.streaming_calls_max",
        Allowed::Count(1..=10_000_000),
        "How many streaming calls may be open at once; further ones are refused with OVERLOADED.",
    ),
    setting(
        "grpc.unary_deadline_max",
        seconds(1..=DAY),
        "How long a unary call may take: the deadline where the client sets none, and the most that it may set. To find out who calls, and to note what an operator does, it may take as long again.",
    ),
    setting(
        "grpc.query_deadline_max",
        seconds(1..=365 * DAY),
        "How long a query may take until its client has all of the answer, which holds one of query.concurrent_max meanwhile; at most grpc.streaming_deadline_max.",
    ),
    setting(
        "grpc.streaming_deadline_max",
        seconds(1..=365 * DAY),
        "How long a streaming call may last: the deadline where the client sets none, and the most that it may set.",
    ),
    setting(
        "grpc.message_timeout",
        seconds(1..=DAY),
        "How long the first message of a call, and the rest of any that has begun, may take to come in; then, at the latest after twice that, the call ends with TOO_SLOW.",
    ),
    setting(
        "grpc.unread_timeout",
        seconds(1..=DAY),
        "How long a client may take nothing of what it is sent; then, at the latest after twice that, its call is reset, or its connection closed when that is what stands still.",
    ),
    setting(
        "grpc.idle_timeout",
        seconds(1..=365 * DAY),
        "How long a connection may be without a call, and an upload without a message; then, at the latest after twice that, it is ended. A Connect stream may be silent.",
    ),
    setting(
        "grpc.connection_age_max",
        seconds(0..=365 * DAY),
        "How old a connection becomes, give or take a tenth; then its client is told to make a new one, so that load balancers can spread clients anew. 0s: any age.",
    ),
    setting(
        "grpc.connection_age_grace",
        seconds(1..=DAY),
        "How long the calls of a connection that is idle or old may take to end. After half of that, 5 s at the most, they are told; then they are cut off.",
    ),
    setting(
        "grpc.control_frames_per_second_max",
        Allowed::Count(1..=1_000_000),
        "How many HTTP/2 frames that carry nothing (PING, SETTINGS …) a client may send a second on one connection, beside those that answer what it is sent; RST_STREAM counts as four, and metadata beyond 8 KiB a call as one for each 256 bytes. Twice as many may come at once; a client that sends more is not read from until the rate is free again, and gets ENHANCE_YOUR_CALM when that has gone on for 10 s (or grpc.keepalive_timeout or grpc.unread_timeout, if that is less).",
    ),
    setting(
        "tls.certificate_file",
        Allowed::File,
        "The gateway's certificate and those up to its authority (PEM); empty: gRPC without TLS.",
    ),
    setting("tls.key_file", Allowed::File, "The certificate's private key (PEM)."),
    setting(
        "tls.client_ca_file",
        Allowed::File,
        "The authorities whose client certificates devices may show (PEM); empty: client certificates are not asked for.",
    ),
    setting(
        "tls.client_crl_file",
        Allowed::File,
        "The revocation lists of these authorities (PEM). With it a certificate whose issuer has no list in it is refused.",
    ),
    setting(
        "tls.reload_interval",
        seconds(1..=DAY),
        "How often these four files are looked at for changes; SIGHUP does so at once. Open connections go on, but for those whose client certificate is no longer good.",
    ),
    setting("tls.handshake_timeout", seconds(1..=600), "How long a TLS handshake may take."),
    setting(
        "tls.handshakes_max",
        Allowed::Count(1..=1_000_000),
        "How many TLS handshakes may be under way at once; further ones wait, within their time.",
    ),
    setting(
        "auth.mode",
        Allowed::OneOf(&["open", "required"]),
        "Whether callers are asked who they are. open: everybody may do everything. required: everybody needs a token or a client certificate, but for health checks.",
    ),
    setting(
        "auth.admin_token_file",
        Allowed::File,
        "Where the token of the first administrator is left, when there is no operator yet; empty: admin-token in storage.data_dir.",
    ),
    setting("auth.audit_age", seconds(3600..=10_000 * 365 * DAY), "How long entries of the audit log are kept."),
    setting(
        "oidc.issuer",
        Allowed::Text(0..=1000),
        "The OpenID Connect provider whose JWTs operators may show as their tokens: the claim iss, letter for letter. Empty: none.",
    ),
    setting("oidc.audience", Allowed::Text(0..=1000), "What these tokens must be for: the claim aud, or one of several."),
    setting(
        "oidc.jwks",
        Allowed::Jwks,
        "The provider's keys (JWKS, RFC 7517): a file, or an address that is asked without following redirects.",
    ),
    setting(
        "oidc.ca_file",
        Allowed::File,
        "The authorities that the certificate of this address must be of (PEM), in the place of the public ones; empty: the public ones.",
    ),
    setting(
        "oidc.refresh_interval",
        seconds(1..=DAY),
        "How often the keys are looked at; SIGHUP, and a token of a key that is not among them, do so at once, the latter every 10 s at most.",
    ),
    setting(
        "oidc.leeway",
        seconds(0..=600),
        "How far the provider's clock may be from the gateway's: by so much a token is good before its nbf and iat and after its exp, when its open calls end.",
    ),
    setting(
        "oidc.name_claim",
        Allowed::Text(1..=255),
        "The claim that names an operator in the audit log. Limits count by sub all the same.",
    ),
    setting(
        "oidc.role_claim",
        Allowed::Text(1..=255),
        "The claim that has an operator's role: viewer, operator or admin, or a list of which the highest of these counts. A token without it is refused.",
    ),
    setting(
        "oidc.scope_claim",
        Allowed::Text(0..=255),
        "The claim that has an operator's scope: a label selector such as site=berlin, or * for every device. A token without it is refused. Empty: every device for everybody.",
    ),
    setting("http.listen", Allowed::Address, "Where /metrics, /livez and /readyz are served."),
    setting(
        "storage.url",
        Allowed::DatabaseUrl,
        "The PostgreSQL database, which several gateways may share; empty: the embedded SQLite in storage.data_dir. Its password is never shown; it may come from PGPASSWORD or a passfile instead.",
    ),
    setting("storage.data_dir", Allowed::Path, "Where the embedded SQLite database is kept; made when it is not there."),
    setting(
        "storage.may_lose_commits_on_power_loss",
        Allowed::Flag,
        "Do not wait for the disk at each commit: faster on slow disks, but a power cut or a kernel crash loses the last acknowledged batches.",
    ),
    setting(
        "storage.readers",
        Allowed::Count(1..=64),
        "How many connections read from the database at once. In SQLite merging reads with one more.",
    ),
    setting(
        "ingest.pending_bytes_max",
        Allowed::Bytes(64 * KIB..=64 * GIB),
        "How many bytes of batches may wait for their commit, each counted with 256 bytes or 1 KiB more; at the limit the gateway stops reading uploads (HTTP/2 flow control), and beyond a quarter of it a call whose batches are below 4 KiB is read from when what it sent is committed.",
    ),
    setting(
        "ingest.backlog_age",
        seconds(1..=10_000 * 365 * DAY),
        "How old the newest reading of what a call sends may be before the rest of the call is taken for a backlog, which is admitted behind live readings.",
    ),
    setting(
        "ingest.backlog_bytes_max",
        Allowed::Bytes(64 * KIB..=64 * GIB),
        "How many bytes of batches of all backlogs, each counted with 1 KiB more, may wait for their commit: the less, the less live readings notice of them.",
    ),
    setting(
        "ingest.commit_batches_max",
        Allowed::Count(1..=10_000),
        "After how many batches a transaction takes no more; what one stream has sent by then, at most 256 batches, is not divided.",
    ),
    setting(
        "ingest.batch_bytes_max",
        Allowed::Bytes(KIB..=256 * MIB),
        "How large a batch may be, encoded; a larger one is rejected with TOO_LARGE.",
    ),
    setting(
        "ingest.batch_readings_max",
        Allowed::Count(1..=10_000_000),
        "How many readings a batch may have; one with more is rejected with TOO_LARGE.",
    ),
    setting(
        "ingest.unacknowledged_batches_max",
        Allowed::Count(1..=10_000),
        "How many batches of one call may wait for their commit at the most; while as many do, the call is not read from.",
    ),
    setting(
        "ingest.time_skew_max",
        seconds(0..=100 * 365 * DAY),
        "How much later than the gateway's clock a reading's time may be; later ones are rejected with TIME_IN_FUTURE.",
    ),
    setting(
        "ingest.reading_age_max",
        seconds(0..=10_000 * 365 * DAY),
        "How old a reading may be when it is received; older ones are rejected with TIME_TOO_OLD. 0s: any age.",
    ),
    setting(
        "ingest.rejected_batches_kept_max",
        Allowed::Count(0..=1_000_000),
        "How many rejected batches are kept for inspection; older ones are deleted, their counts stay.",
    ),
    setting(
        "devices.auto_register",
        Allowed::Flag,
        "Register a device when it first uploads or connects; otherwise it must be created before.",
    ),
    setting(
        "devices.devices_max",
        Allowed::Count(1..=100_000_000),
        "How many devices may be registered; a further one is refused with OVERLOADED.",
    ),
    setting(
        "devices.sensors_max",
        Allowed::Count(1..=100_000),
        "How many sensors a device may have; a batch that brings more is rejected with TOO_MANY_SENSORS.",
    ),
    setting("devices.config_bytes_max", Allowed::Bytes(KIB..=MIB), "How large a device's configuration may be, as JSON."),
    setting(
        "devices.reconcile_interval",
        seconds(1..=DAY),
        "How often connected devices are compared with their desired configuration, to repair what a lost notification left.",
    ),
    setting(
        "devices.clock_offset_max",
        seconds(0..=365 * DAY),
        "How far a device's clock may be from the gateway's before it is logged and counted as off. 0s: any offset.",
    ),
    setting(
        "devices.clock_correction",
        Allowed::OneOf(&["off", "measured"]),
        "Whether readings of a device whose clock is off for certain, by an offset that its ClockSample told, get it taken off their times as they come in; both times are kept.",
    ),
    setting(
        "devices.silent_after",
        seconds(1..=365 * DAY),
        "How long nothing may be heard of a device before it is listed as silent; more than the longest sleep of the devices.",
    ),
    setting(
        "limits.device_readings_per_second",
        Allowed::Count(0..=1_000_000_000),
        "How many readings of one device are taken a second, over time; one that sends more is held back, and refused with RATE_LIMITED when it would have to wait for more than 5 s. 0: any number.",
    ),
    setting(
        "limits.device_bytes_per_second",
        Allowed::Bytes(0..=1024 * GIB),
        "How many bytes of batches of one device are taken a second, in the same way. 0: any number.",
    ),
    setting(
        "limits.device_calls_max",
        Allowed::Count(0..=1_000_000),
        "How many Upload and Connect calls of one device may be open at once; a further one is refused with OVERLOADED. A device whose network broke may have a dead one until keepalive ends it. 0: any number.",
    ),
    setting(
        "limits.operator_calls_per_second",
        Allowed::Count(0..=1_000_000),
        "How many calls an operator may begin a second, over time, with one credential; a further one is refused with RATE_LIMITED. 0: any number.",
    ),
    setting(
        "limits.operator_calls_max",
        Allowed::Count(0..=1_000_000),
        "How many calls of an operator with one credential may be open at once; a further one is refused with OVERLOADED. 0: any number.",
    ),
    setting(
        "live.tail_bytes_max",
        Allowed::Bytes(64 * KIB..=16 * GIB),
        "How much of the log's end is kept in memory while somebody follows; slower followers read the database.",
    ),
    setting(
        "live.replay_window",
        seconds(0..=365 * DAY),
        "How long a batch that is merged stays in the log, for followers to resume at; what is not merged stays anyway.",
    ),
    setting(
        "live.replay_bytes_max",
        Allowed::Bytes(0..=1024 * GIB),
        "How many bytes of merged batches stay in the log at the most; the oldest go first, also when they are younger than live.replay_window.",
    ),
    setting("history.merge_interval", seconds(1..=DAY), "How often the log is merged into chunks, which is what makes reading quick."),
    setting(
        "history.unmerged_bytes_max",
        Allowed::Bytes(1..=64 * GIB),
        "How many bytes of batches may come in before they are merged without waiting for the interval. As long as less waits, merging rests twelve times as long as each of its steps takes, 240 ms at the most; from there on less. When four times as much waits, merging begins to take more than a tenth of the time for which devices keep the database busy, and at sixteen times all that it needs, in larger steps.",
    ),
    setting(
        "history.retention_age",
        seconds(0..=10_000 * 365 * DAY),
        "How old readings become: a chunk is deleted when all of its readings are older. 0s: any age.",
    ),
    setting(
        "history.retention_bytes_max",
        Allowed::Bytes(0..=1024 * 1024 * GIB),
        "How much of the disk what is stored may take; beyond that the oldest readings are deleted. The files are larger by what is kept free for what comes in, and by SQLite's WAL. 0: no limit.",
    ),
    setting(
        "query.readings_max",
        Allowed::Count(1..=1_000_000_000),
        "How many readings that are not merged yet one query may hold; one with more is refused with QUERY_TOO_LARGE. Merged ones are read as the client takes them.",
    ),
    setting(
        "query.bytes_max",
        Allowed::Bytes(MIB..=64 * GIB),
        "How much memory the readings of one query that are not merged yet may take, about; one with more is refused with QUERY_TOO_LARGE.",
    ),
    setting(
        "query.memory_bytes_max",
        Allowed::Bytes(MIB..=4 * GIB - 1),
        "How much memory the readings that are not merged yet may take in all queries together, about, beside 256 KiB for each; one that needs more than is left waits for 10 s, and is then refused with OVERLOADED; one that needs more than all of it is answered while no other has any of it.",
    ),
    setting(
        "query.concurrent_max",
        Allowed::Count(2..=1_000),
        "How many queries are worked on at once, each until the client has taken its answer; further ones wait for 10 s, and are then refused with OVERLOADED. Those that go through more than 256 KiB of batches that are not merged do so one at a time, and wait for one another as long.",
    ),
    setting(
        "export.concurrent_max",
        Allowed::Count(1..=1_000),
        "How many exports may be under way at once; a further one is refused with OVERLOADED. Each has one query at a time: query.concurrent_max must be larger, so that some are left for others.",
    ),
    setting(
        "shutdown.notice",
        Allowed::Duration(Duration::ZERO..=Duration::from_secs(3600)),
        "How long the gateway still takes new calls after it said NOT_SERVING, so that load balancers look elsewhere first.",
    ),
    setting("shutdown.grace", seconds(1..=3600), "How long stopping may take in all; then what is left is cut off."),
    setting("log.filter", Allowed::LogFilter, "What is logged to standard error."),
    setting("log.format", Allowed::OneOf(&["text", "json"]), "How it is written."),
    setting(
        "log.slow_call",
        seconds(0..=DAY),
        "How long a unary call may take before it is logged as slow, with who made it and what it was about; streams may take as long as they like. 0s: any time.",
    ),
    setting(
        "log.slow_commit",
        seconds(0..=DAY),
        "How long a commit of batches may take before it is logged as slow, at most once in 10 s. 0s: any time.",
    ),
    setting(
        "log.slow_query",
        seconds(0..=DAY),
        "How long the database may work for one query or a piece of an export, all in all, before that is logged as slow, at most once in 10 s. 0s: any time.",
    ),
    setting(
        "tracing.otlp_endpoint",
        Allowed::HttpUrl,
        "Where spans of calls are sent by OpenTelemetry's protocol (OTLP over gRPC), such as http://127.0.0.1:4317; empty: nowhere.",
    ),
    setting(
        "tracing.sample_ratio",
        Allowed::Ratio,
        "Which share of traces is recorded, of those whose caller does not say that it records them; those whose caller does are recorded always.",
    ),
    setting("tracing.service_name", Allowed::Text(1..=255), "What the gateway is called in traces (service.name)."),
];
