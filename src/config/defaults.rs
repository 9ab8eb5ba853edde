//! What is in effect where nothing else is said.

use super::{
    Auth, AuthMode, ClockCorrection, Config, DatabaseUrl, Devices, Export, Grpc, History, Http, Ingest, Limits, Live, Log, Oidc, Query,
    Shutdown, Storage, Tls, Tracing,
};
use std::{net::SocketAddr, path::PathBuf, time::Duration};

impl Default for Config {
    fn default() -> Self {
        const MIB: usize = 1 << 20;
        Self {
            insecure: false,
            grpc: Grpc {
                listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
                connections_max: 20_000,
                streams_per_connection_max: 1_000,
                stream_window_bytes: 16 << 10,
                connection_window_bytes: 1 << 20,
                header_bytes_max: 16 << 10,
                message_bytes_max: MIB + (64 << 10),
                incoming_bytes_max: 16 * MIB,
                keepalive_interval: Duration::from_secs(60),
                keepalive_timeout: Duration::from_secs(20),
                unary_calls_max: 1_024,
                streaming_calls_max: 20_000,
                unary_deadline_max: Duration::from_secs(60),
                query_deadline_max: Duration::from_secs(3600),
                streaming_deadline_max: Duration::from_secs(24 * 3600),
                message_timeout: Duration::from_secs(60),
                unread_timeout: Duration::from_secs(120),
                idle_timeout: Duration::from_secs(300),
                connection_age_max: Duration::ZERO,
                connection_age_grace: Duration::from_secs(60),
                control_frames_per_second_max: 1_000,
            },
            tls: Tls {
                certificate_file: PathBuf::new(),
                key_file: PathBuf::new(),
                client_ca_file: PathBuf::new(),
                client_crl_file: PathBuf::new(),
                reload_interval: Duration::from_secs(10),
                handshake_timeout: Duration::from_secs(10),
                handshakes_max: 1_000,
            },
            auth: Auth { mode: AuthMode::Open, admin_token_file: PathBuf::new(), audit_age: Duration::from_secs(90 * 24 * 3600) },
            oidc: Oidc {
                issuer: String::new(),
                audience: String::new(),
                jwks: String::new(),
                ca_file: PathBuf::new(),
                refresh_interval: Duration::from_secs(300),
                leeway: Duration::from_secs(30),
                name_claim: "sub".into(),
                role_claim: "tidegate_role".into(),
                scope_claim: "tidegate_scope".into(),
            },
            http: Http { listen: SocketAddr::from(([127, 0, 0, 1], 9464)) },
            storage: Storage {
                url: DatabaseUrl::default(),
                data_dir: "./tidegate-data".into(),
                may_lose_commits_on_power_loss: false,
                readers: 4,
            },
            ingest: Ingest {
                pending_bytes_max: 24 * MIB,
                backlog_age: Duration::from_secs(300),
                backlog_bytes_max: MIB / 16,
                commit_batches_max: 8_000,
                batch_bytes_max: MIB,
                batch_readings_max: 100_000,
                unacknowledged_batches_max: 256,
                time_skew_max: Duration::from_secs(3600),
                reading_age_max: Duration::ZERO,
                rejected_batches_kept_max: 1_000,
            },
            devices: Devices {
                auto_register: true,
                devices_max: 1_000_000,
                sensors_max: 1_000,
                config_bytes_max: 64 << 10,
                reconcile_interval: Duration::from_secs(30),
                clock_offset_max: Duration::from_secs(60),
                clock_correction: ClockCorrection::Off,
                silent_after: Duration::from_secs(600),
            },
            limits: Limits {
                device_readings_per_second: 0,
                device_bytes_per_second: 0,
                device_calls_max: 0,
                operator_calls_per_second: 0,
                operator_calls_max: 0,
            },
            live: Live { tail_bytes_max: 8 * MIB, replay_window: Duration::from_secs(3600), replay_bytes_max: 64 * MIB },
            history: History {
                merge_interval: Duration::from_secs(60),
                unmerged_bytes_max: 64 * MIB,
                retention_age: Duration::ZERO,
                retention_bytes_max: 0,
            },
            query: Query { readings_max: 5_000_000, bytes_max: 256 * MIB, memory_bytes_max: 8 * MIB, concurrent_max: 8 },
            export: Export { concurrent_max: 2 },
            shutdown: Shutdown { notice: Duration::ZERO, grace: Duration::from_secs(25) },
            log: Log {
                filter: "info".into(),
                format: "text".into(),
                slow_call: Duration::ZERO,
                slow_commit: Duration::from_secs(1),
                slow_query: Duration::from_secs(10),
            },
            tracing: Tracing { otlp_endpoint: String::new(), sample_ratio: 0.01, service_name: "tidegate".into() },
        }
    }
}
