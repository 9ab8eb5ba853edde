//! Every metric of the gateway: its name with the label values that are allowed, and [`METRICS`], the list of all.
//!
//! Names follow the rules that `promtool check metrics` checks: base units, `_total` for counters, a help text for each.
//! Label values are bounded: nothing that a client can choose becomes one. `docs/METRICS.md` is held to this list by a test.

/// Which kind of metric it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only grows while the process runs.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations in buckets.
    Histogram {
        /// The buckets' upper bounds, ascending; `+Inf` is added.
        buckets: &'static [f64],
    },
}

impl Kind {
    /// As in the exposition format's `TYPE` line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram { .. } => "histogram",
        }
    }
}

/// What is known of one metric before it has a value.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// The name.
    pub name: &'static str,
    /// The kind.
    pub kind: Kind,
    /// What is counted or measured, as in the name: `requests`, `seconds`.
    pub unit: &'static str,
    /// The names of the labels.
    pub labels: &'static [&'static str],
    /// The meaning, as in the exposition format's `HELP` line.
    pub help: &'static str,
}

impl Metric {
    /// The row of [`METRICS`] with this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        METRICS.iter().find(|metric| metric.name == name)
    }
}

/// Bounds for calls: from half a millisecond to an hour, since streams are calls too.
pub const CALL_SECONDS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0, 3600.0];

/// Bounds for commits: from a fast disk's sync to a stuck one's.
pub const COMMIT_SECONDS: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];
/// Bounds for the sizes of groups.
pub const COMMIT_SIZES: &[f64] = &[1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 10000.0];

/// Calls begun. `method`: the full names of the RPCs that are served, such as `tidegate.v1.TelemetryService/Upload`, or `unknown`.
pub const GRPC_REQUESTS_STARTED: &str = "tidegate_grpc_requests_started_total";
/// Calls ended. `method`: as [`GRPC_REQUESTS_STARTED`]. `code`: the 17 names of gRPC status codes, such as `OK`, `DEADLINE_EXCEEDED`.
pub const GRPC_REQUESTS: &str = "tidegate_grpc_requests_total";
/// How long calls took, to the end of the response. `method`: as [`GRPC_REQUESTS_STARTED`].
pub const GRPC_REQUEST_DURATION: &str = "tidegate_grpc_request_duration_seconds";
/// Calls that are open. `method`: as [`GRPC_REQUESTS_STARTED`].
pub const GRPC_REQUESTS_IN_FLIGHT: &str = "tidegate_grpc_requests_in_flight";
/// Messages that clients sent. `method`: as [`GRPC_REQUESTS_STARTED`].
pub const GRPC_MESSAGES_RECEIVED: &str = "tidegate_grpc_messages_received_total";
/// Messages sent to clients. `method`: as [`GRPC_REQUESTS_STARTED`].
pub const GRPC_MESSAGES_SENT: &str = "tidegate_grpc_messages_sent_total";
/// Calls refused at a limit. `setting`: `grpc.unary_calls_max`, `grpc.streaming_calls_max`.
pub const GRPC_REQUESTS_SHED: &str = "tidegate_grpc_requests_shed_total";
/// Connections that are open.
pub const GRPC_CONNECTIONS_OPEN: &str = "tidegate_grpc_connections_open";
/// Connections that the gateway ended. `reason`: `flood`, `unread`, `preface`, `idle`, `age`.
pub const GRPC_CONNECTIONS_ENDED: &str = "tidegate_grpc_connections_ended_total";
/// Calls reset as their clients did not read.
pub const GRPC_REQUESTS_UNREAD: &str = "tidegate_grpc_requests_unread_total";
/// Connections accepted.
pub const GRPC_CONNECTIONS: &str = "tidegate_grpc_connections_total";
/// Connections that the operating system could not hand over.
pub const GRPC_ACCEPT_ERRORS: &str = "tidegate_grpc_accept_errors_total";
/// Calls refused for want of a right or a credential. `reason`: `CREDENTIAL_MISSING`, `CREDENTIAL_INVALID`, `CREDENTIAL_EXPIRED`,
/// `CREDENTIAL_REVOKED`, `KEYS_UNAVAILABLE`, `PERMISSION_DENIED`.
pub const AUTH_REFUSALS: &str = "tidegate_auth_refusals_total";
/// TLS handshakes. `outcome`: `done`, `failed`, `timed_out`.
pub const TLS_HANDSHAKES: &str = "tidegate_tls_handshakes_total";
/// Changes of the TLS files. `outcome`: `loaded`, `refused`.
pub const TLS_RELOADS: &str = "tidegate_tls_reloads_total";
/// When the gateway's certificate expires.
pub const TLS_CERTIFICATE_EXPIRY: &str = "tidegate_tls_certificate_expiry_timestamp_seconds";
/// Looks at an OpenID Connect provider's keys. `outcome`: `fetched`, `failed`.
pub const OIDC_KEY_FETCHES: &str = "tidegate_oidc_key_fetches_total";
/// When the keys were last fetched.
pub const OIDC_KEYS_FETCHED: &str = "tidegate_oidc_keys_fetched_timestamp_seconds";
/// Calls refused at a limit on one device or operator. `setting`: `limits.device_readings_per_second`, `limits.device_bytes_per_second`,
/// `limits.device_calls_max`, `limits.operator_calls_per_second`, `limits.operator_calls_max`.
pub const LIMIT_REFUSALS: &str = "tidegate_limit_refusals_total";
/// Batches that waited for their device's rate.
pub const UPLOAD_WAITS: &str = "tidegate_upload_waits_total";
/// Panics in the work on calls.
pub const PANICS: &str = "tidegate_panics_total";
/// 1 while the gateway is ready to do its work, as `/readyz` says; else 0.
pub const READY: &str = "tidegate_ready";
/// Batches committed to the log.
pub const STORED_BATCHES: &str = "tidegate_stored_batches_total";
/// Readings in them.
pub const STORED_READINGS: &str = "tidegate_stored_readings_total";
/// Their bytes.
pub const STORED_BYTES: &str = "tidegate_stored_bytes_total";
/// Batches that came again.
pub const DUPLICATE_BATCHES: &str = "tidegate_duplicate_batches_total";
/// Readings in them.
pub const DUPLICATE_READINGS: &str = "tidegate_duplicate_readings_total";
/// Batches that can never be stored. `reason`: the names of `tidegate.v1.RejectReason` without their prefix.
pub const REJECTED_BATCHES: &str = "tidegate_rejected_batches_total";
/// Readings in them. `reason`: as [`REJECTED_BATCHES`].
pub const REJECTED_READINGS: &str = "tidegate_rejected_readings_total";
/// Rejected batches that were stored after all; they are not among the stored ones.
pub const REPLAYED_BATCHES: &str = "tidegate_replayed_batches_total";
/// Batches that skipped sequences.
pub const SEQUENCE_GAPS: &str = "tidegate_sequence_gaps_total";
/// Batches refused while the store took none.
pub const UNAVAILABLE_BATCHES: &str = "tidegate_unavailable_batches_total";
/// How long a group's commit took.
pub const COMMIT_DURATION: &str = "tidegate_commit_duration_seconds";
/// How many batches a group had.
pub const COMMIT_BATCHES: &str = "tidegate_commit_batches";
/// Commits that failed.
pub const COMMIT_FAILURES: &str = "tidegate_commit_failures_total";
/// Batches that were admitted as backlog.
pub const BACKLOG_BATCHES: &str = "tidegate_backlog_batches_total";
/// Bytes of them that wait for their commit.
pub const BACKLOG_PENDING_BYTES: &str = "tidegate_backlog_pending_bytes";
/// Bytes of batches that wait for their commit.
pub const PENDING_BYTES: &str = "tidegate_pending_bytes";
/// Readings merged.
pub const MERGED_READINGS: &str = "tidegate_merged_readings_total";
/// How long passes took.
pub const MERGE_DURATION: &str = "tidegate_merge_duration_seconds";
/// Background work that failed.
pub const MERGE_FAILURES: &str = "tidegate_merge_failures_total";
/// Batches that wait to be merged.
pub const UNMERGED_ENTRIES: &str = "tidegate_unmerged_entries";
/// Chunks written.
pub const CHUNKS_WRITTEN: &str = "tidegate_chunks_written_total";
/// Merged batches deleted from the log.
pub const PRUNED_ENTRIES: &str = "tidegate_pruned_entries_total";
/// Readings deleted by retention.
pub const EXPIRED_READINGS: &str = "tidegate_expired_readings_total";
/// What the database takes up.
pub const STORAGE_BYTES: &str = "tidegate_storage_bytes";
/// What is left where the embedded database is.
pub const STORAGE_FREE_BYTES: &str = "tidegate_storage_free_bytes";
/// Devices whose clocks are off. `direction`: `ahead`, `behind`.
pub const DEVICES_CLOCK_OFF: &str = "tidegate_devices_clock_off";
/// Devices of which nothing comes in.
pub const DEVICES_SILENT: &str = "tidegate_devices_silent";
/// Spans that the collector took.
pub const TRACE_SPANS_EXPORTED: &str = "tidegate_trace_spans_exported_total";
/// Spans that are lost. `reason`: `queue_full`, `export_failed`.
pub const TRACE_SPANS_DROPPED: &str = "tidegate_trace_spans_dropped_total";
/// Devices whose readings get other times.
pub const DEVICES_CLOCK_CORRECTED: &str = "tidegate_devices_clock_corrected";
/// The gateway's clock.
pub const CLOCK: &str = "tidegate_clock_seconds";
/// Always 1. `version`: the version of the running gateway.
pub const BUILD_INFO: &str = "tidegate_build_info";
/// When the process began.
pub const PROCESS_START_TIME: &str = "process_start_time_seconds";
/// Processor time that was used.
pub const PROCESS_CPU: &str = "process_cpu_seconds_total";
/// Memory that is resident.
pub const PROCESS_RESIDENT_MEMORY: &str = "process_resident_memory_bytes";
/// File descriptors that are open.
pub const PROCESS_OPEN_FDS: &str = "process_open_fds";

const fn metric(name: &'static str, kind: Kind, unit: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind, unit, labels, help }
}

/// All metrics.
pub static METRICS: &[Metric] = &[
    metric(GRPC_REQUESTS_STARTED, Kind::Counter, "requests", &["method"], "Calls begun."),
    metric(GRPC_REQUESTS, Kind::Counter, "requests", &["method", "code"], "Calls ended, by gRPC status code."),
    metric(
        GRPC_REQUEST_DURATION,
        Kind::Histogram { buckets: CALL_SECONDS },
        "seconds",
        &["method"],
        "How long calls took, from their beginning to the end of the response.",
    ),
    metric(GRPC_REQUESTS_IN_FLIGHT, Kind::Gauge, "requests", &["method"], "Calls that are open; a stream is until its response ends."),
    metric(GRPC_MESSAGES_RECEIVED, Kind::Counter, "messages", &["method"], "Messages that clients sent."),
    metric(GRPC_MESSAGES_SENT, Kind::Counter, "messages", &["method"], "Messages sent to clients."),
    metric(
        GRPC_REQUESTS_SHED,
        Kind::Counter,
        "requests",
        &["setting"],
        "Calls refused at a limit on concurrent work, by the setting that holds it.",
    ),
    metric(GRPC_CONNECTIONS_OPEN, Kind::Gauge, "connections", &[], "Connections that are open."),
    metric(GRPC_CONNECTIONS, Kind::Counter, "connections", &[], "Connections accepted."),
    metric(
        GRPC_CONNECTIONS_ENDED,
        Kind::Counter,
        "connections",
        &["reason"],
        "Connections that the gateway ended: too many control frames; nothing was taken of what was sent; HTTP/2 was not begun in time; no call for long; its age.",
    ),
    metric(
        GRPC_REQUESTS_UNREAD,
        Kind::Counter,
        "requests",
        &[],
        "Calls that were reset as their clients took nothing of what they were sent.",
    ),
    metric(
        GRPC_ACCEPT_ERRORS,
        Kind::Counter,
        "errors",
        &[],
        "Connections that the operating system could not hand over, for example for want of file descriptors.",
    ),
    metric(
        AUTH_REFUSALS,
        Kind::Counter,
        "refusals",
        &["reason"],
        "Calls refused, or ended, for want of a credential or a right to make them, by the reason that the caller was told.",
    ),
    metric(TLS_HANDSHAKES, Kind::Counter, "handshakes", &["outcome"], "TLS handshakes that came to an end, by how."),
    metric(
        TLS_RELOADS,
        Kind::Counter,
        "reloads",
        &["outcome"],
        "Changes of the TLS files that were taken over, or refused because the files can't be used.",
    ),
    metric(
        TLS_CERTIFICATE_EXPIRY,
        Kind::Gauge,
        "seconds",
        &[],
        "When the first certificate of the gateway's chain expires, in seconds since 1970-01-01T00:00:00Z; not shown without TLS.",
    ),
    metric(
        OIDC_KEY_FETCHES,
        Kind::Counter,
        "fetches",
        &["outcome"],
        "Times that the keys of the OpenID Connect provider were read or asked for, by whether there were some that can be used.",
    ),
    metric(
        OIDC_KEYS_FETCHED,
        Kind::Gauge,
        "seconds",
        &[],
        "When the keys of the OpenID Connect provider were last fetched, in seconds since 1970-01-01T00:00:00Z; 0: never; not shown without oidc.issuer.",
    ),
    metric(
        LIMIT_REFUSALS,
        Kind::Counter,
        "refusals",
        &["setting"],
        "Calls refused, or ended, at a limit on one device or operator, by the setting that holds it.",
    ),
    metric(
        UPLOAD_WAITS,
        Kind::Counter,
        "waits",
        &[],
        "Batches that had to wait, as their device sends more than limits.device_readings_per_second or limits.device_bytes_per_second.",
    ),
    metric(PANICS, Kind::Counter, "panics", &[], "Panics in the work on calls; each is a defect of the gateway."),
    metric(READY, Kind::Gauge, "ready", &[], "1 while the gateway is ready to do its work, as /readyz says; else 0."),
    metric(STORED_BATCHES, Kind::Counter, "batches", &[], "Batches committed to the log."),
    metric(STORED_READINGS, Kind::Counter, "readings", &[], "Readings in the batches committed to the log."),
    metric(STORED_BYTES, Kind::Counter, "bytes", &[], "Bytes of the batches committed to the log, as they were received."),
    metric(DUPLICATE_BATCHES, Kind::Counter, "batches", &[], "Batches that came again and were not stored again."),
    metric(DUPLICATE_READINGS, Kind::Counter, "readings", &[], "Readings in the batches that came again."),
    metric(REJECTED_BATCHES, Kind::Counter, "batches", &["reason"], "Batches that can never be stored and were kept aside, by reason."),
    metric(REJECTED_READINGS, Kind::Counter, "readings", &["reason"], "Readings in the rejected batches, as far as these could be read."),
    metric(
        DEVICES_CLOCK_OFF,
        Kind::Gauge,
        "devices",
        &["direction"],
        "Devices that this gateway has seen whose clocks are further off than devices.clock_offset_max, by direction.",
    ),
    metric(
        DEVICES_CLOCK_CORRECTED,
        Kind::Gauge,
        "devices",
        &[],
        "Devices whose readings get other times at this gateway, as their clocks are off (devices.clock_correction).",
    ),
    metric(
        DEVICES_SILENT,
        Kind::Gauge,
        "devices",
        &[],
        "Devices that sent no batch for devices.silent_after, by what is stored: all gateways on one database tell the same number.",
    ),
    metric(TRACE_SPANS_EXPORTED, Kind::Counter, "spans", &[], "Spans that the collector at tracing.otlp_endpoint has taken."),
    metric(
        TRACE_SPANS_DROPPED,
        Kind::Counter,
        "spans",
        &["reason"],
        "Spans that are lost, as too many waited or the collector did not take them, by reason.",
    ),
    metric(
        BACKLOG_BATCHES,
        Kind::Counter,
        "batches",
        &[],
        "Batches that came in behind old ones, and were admitted in the lane of backlogs.",
    ),
    metric(
        BACKLOG_PENDING_BYTES,
        Kind::Gauge,
        "bytes",
        &[],
        "Bytes that are taken of the lane of backlogs, by batches on their way and by the rest that it has behind them beside live ones; at ingest.backlog_bytes_max devices with a backlog wait.",
    ),
    metric(
        REPLAYED_BATCHES,
        Kind::Counter,
        "batches",
        &[],
        "Rejected batches that an operator had stored after all; not counted as stored here.",
    ),
    metric(SEQUENCE_GAPS, Kind::Counter, "gaps", &[], "Batches that skipped sequences, and were refused until those before them come."),
    metric(
        UNAVAILABLE_BATCHES,
        Kind::Counter,
        "batches",
        &[],
        "Batches refused because the store took no writes; devices send them again.",
    ),
    metric(
        COMMIT_DURATION,
        Kind::Histogram { buckets: COMMIT_SECONDS },
        "seconds",
        &[],
        "How long it took to commit a group of batches, from deciding on the first to the durable commit.",
    ),
    metric(COMMIT_BATCHES, Kind::Histogram { buckets: COMMIT_SIZES }, "batches", &[], "How many batches were committed as one group."),
    metric(
        COMMIT_FAILURES,
        Kind::Counter,
        "failures",
        &[],
        "Commits that failed; after each the gateway takes nothing until the store has recovered.",
    ),
    metric(
        PENDING_BYTES,
        Kind::Gauge,
        "bytes",
        &[],
        "Bytes of batches that wait for their commit; at ingest.pending_bytes_max uploads are no longer read.",
    ),
    metric(
        MERGED_READINGS,
        Kind::Counter,
        "readings",
        &[],
        "Readings merged from the log into chunks; those of a pass that is done again count again.",
    ),
    metric(
        MERGE_DURATION,
        Kind::Histogram { buckets: CALL_SECONDS },
        "seconds",
        &[],
        "How long passes that merge the log took, with the pauses that leave ingest its turn.",
    ),
    metric(MERGE_FAILURES, Kind::Counter, "failures", &[], "Rounds of merging, pruning and retention that failed and are tried again."),
    metric(
        UNMERGED_ENTRIES,
        Kind::Gauge,
        "entries",
        &[],
        "Entries of the log, each of one or several batches, that were not merged when the last pass ended, about.",
    ),
    metric(CHUNKS_WRITTEN, Kind::Counter, "chunks", &[], "Chunks written."),
    metric(PRUNED_ENTRIES, Kind::Counter, "entries", &[], "Merged entries deleted from the log, as they are no longer kept for followers."),
    metric(EXPIRED_READINGS, Kind::Counter, "readings", &[], "Readings deleted by retention."),
    metric(
        STORAGE_BYTES,
        Kind::Gauge,
        "bytes",
        &[],
        "Bytes that the database takes up, with what is free in its files; looked at every 15 s.",
    ),
    metric(
        STORAGE_FREE_BYTES,
        Kind::Gauge,
        "bytes",
        &[],
        "Bytes that are left on the file system of the embedded database; PostgreSQL's machine tells of its own.",
    ),
    metric(CLOCK, Kind::Gauge, "seconds", &[], "The gateway's clock at the scrape, in seconds since 1970-01-01T00:00:00Z."),
    metric(BUILD_INFO, Kind::Gauge, "info", &["version"], "Always 1; the label tells the version of the running gateway."),
    metric(PROCESS_START_TIME, Kind::Gauge, "seconds", &[], "When the process began, in seconds since 1970-01-01T00:00:00Z."),
    metric(PROCESS_CPU, Kind::Counter, "seconds", &[], "Processor time that the process has used, in user and system mode."),
    metric(PROCESS_RESIDENT_MEMORY, Kind::Gauge, "bytes", &[], "Memory of the process that is resident."),
    metric(PROCESS_OPEN_FDS, Kind::Gauge, "fds", &[], "File descriptors that the process has open."),
];
