//! The gateway's settings: defaults, then a TOML file, then the environment, then flags.
//!
//! [`SETTINGS`] is the list of all of them. The commented file that `tidegate config` prints, the flags, the environment
//! variables, the documentation's table and the checks are all made from it.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, parser::ValueSource};
use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Format, Serialized, Toml},
    value::{Dict, Map, Value},
};
use jiff::{SignedDuration, fmt::serde::unsigned_duration::friendly::compact::required as duration};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

mod database_url;
mod defaults;
mod jwks;
mod settings;

pub use database_url::DatabaseUrl;
pub use jwks::JwksLocation;
pub use settings::{Allowed, SETTINGS, Setting};

/// All settings, typed. See [`SETTINGS`] for what each means.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Config {
    pub insecure: bool,
    pub grpc: Grpc,
    pub tls: Tls,
    pub auth: Auth,
    pub oidc: Oidc,
    pub http: Http,
    pub storage: Storage,
    pub ingest: Ingest,
    pub devices: Devices,
    pub limits: Limits,
    pub live: Live,
    pub history: History,
    pub query: Query,
    pub export: Export,
    pub shutdown: Shutdown,
    pub log: Log,
    pub tracing: Tracing,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Grpc {
    pub listen: SocketAddr,
    pub connections_max: usize,
    pub streams_per_connection_max: u32,
    pub stream_window_bytes: u32,
    pub connection_window_bytes: u32,
    pub header_bytes_max: u32,
    pub message_bytes_max: usize,
    pub incoming_bytes_max: usize,
    #[serde(with = "duration")]
    pub keepalive_interval: Duration,
    #[serde(with = "duration")]
    pub keepalive_timeout: Duration,
    pub unary_calls_max: usize,
    pub streaming_calls_max: usize,
    #[serde(with = "duration")]
    pub unary_deadline_max: Duration,
    #[serde(with = "duration")]
    pub query_deadline_max: Duration,
    #[serde(with = "duration")]
    pub streaming_deadline_max: Duration,
    #[serde(with = "duration")]
    pub message_timeout: Duration,
    #[serde(with = "duration")]
    pub unread_timeout: Duration,
    #[serde(with = "duration")]
    pub idle_timeout: Duration,
    #[serde(with = "duration")]
    pub connection_age_max: Duration,
    #[serde(with = "duration")]
    pub connection_age_grace: Duration,
    pub control_frames_per_second_max: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Tls {
    pub certificate_file: PathBuf,
    pub key_file: PathBuf,
    pub client_ca_file: PathBuf,
    pub client_crl_file: PathBuf,
    #[serde(with = "duration")]
    pub reload_interval: Duration,
    #[serde(with = "duration")]
    pub handshake_timeout: Duration,
    pub handshakes_max: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Auth {
    pub mode: AuthMode,
    pub admin_token_file: PathBuf,
    #[serde(with = "duration")]
    pub audit_age: Duration,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Oidc {
    pub issuer: String,
    pub audience: String,
    pub jwks: String,
    pub ca_file: PathBuf,
    #[serde(with = "duration")]
    pub refresh_interval: Duration,
    #[serde(with = "duration")]
    pub leeway: Duration,
    pub name_claim: String,
    pub role_claim: String,
    pub scope_claim: String,
}

/// Whether callers are asked who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuthMode {
    /// Everybody may do everything.
    Open,
    /// Everybody needs a credential.
    Required,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Http {
    pub listen: SocketAddr,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Storage {
    pub url: DatabaseUrl,
    pub data_dir: PathBuf,
    pub may_lose_commits_on_power_loss: bool,
    pub readers: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Ingest {
    pub pending_bytes_max: usize,
    #[serde(with = "duration")]
    pub backlog_age: Duration,
    pub backlog_bytes_max: usize,
    pub commit_batches_max: usize,
    pub batch_bytes_max: usize,
    pub batch_readings_max: usize,
    pub unacknowledged_batches_max: usize,
    #[serde(with = "duration")]
    pub time_skew_max: Duration,
    #[serde(with = "duration")]
    pub reading_age_max: Duration,
    pub rejected_batches_kept_max: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Devices {
    pub auto_register: bool,
    pub devices_max: usize,
    pub sensors_max: usize,
    pub config_bytes_max: usize,
    #[serde(with = "duration")]
    pub reconcile_interval: Duration,
    #[serde(with = "duration")]
    pub clock_offset_max: Duration,
    pub clock_correction: ClockCorrection,
    #[serde(with = "duration")]
    pub silent_after: Duration,
}

/// What is done about a device's clock that is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClockCorrection {
    /// The times of its readings stay as they are.
    Off,
    /// A measured offset is taken off the times of its readings.
    Measured,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Limits {
    pub device_readings_per_second: u64,
    pub device_bytes_per_second: u64,
    pub device_calls_max: usize,
    pub operator_calls_per_second: u64,
    pub operator_calls_max: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Live {
    pub tail_bytes_max: usize,
    #[serde(with = "duration")]
    pub replay_window: Duration,
    pub replay_bytes_max: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct History {
    #[serde(with = "duration")]
    pub merge_interval: Duration,
    pub unmerged_bytes_max: usize,
    #[serde(with = "duration")]
    pub retention_age: Duration,
    pub retention_bytes_max: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Query {
    pub readings_max: usize,
    pub bytes_max: usize,
    pub memory_bytes_max: usize,
    pub concurrent_max: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Export {
    pub concurrent_max: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Shutdown {
    #[serde(with = "duration")]
    pub notice: Duration,
    #[serde(with = "duration")]
    pub grace: Duration,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Log {
    pub filter: String,
    pub format: String,
    #[serde(with = "duration")]
    pub slow_call: Duration,
    #[serde(with = "duration")]
    pub slow_commit: Duration,
    #[serde(with = "duration")]
    pub slow_query: Duration,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "SETTINGS documents each")]
pub struct Tracing {
    pub otlp_endpoint: String,
    pub sample_ratio: f64,
    pub service_name: String,
}

impl Tls {
    /// Each with the key of its setting, and the file without which it means nothing.
    fn files_that_need_others(&self) -> [(&'static str, &Path, &'static str, &Path); 4] {
        [
            ("tls.certificate_file", &self.certificate_file, "tls.key_file", &self.key_file),
            ("tls.key_file", &self.key_file, "tls.certificate_file", &self.certificate_file),
            ("tls.client_ca_file", &self.client_ca_file, "tls.certificate_file", &self.certificate_file),
            ("tls.client_crl_file", &self.client_crl_file, "tls.client_ca_file", &self.client_ca_file),
        ]
    }
}

impl Oidc {
    /// Whether tokens of a provider are taken.
    pub fn is_on(&self) -> bool {
        !self.issuer.is_empty()
    }

    /// Each setting that does not go with the others, and what it must be.
    fn wrong_relations(&self, mode: AuthMode) -> Vec<(&'static str, &'static str)> {
        let is_https = JwksLocation::parse(&self.jwks).is_some_and(|location| location.is_https());
        let names_more = !self.audience.is_empty() || !self.jwks.is_empty();
        let wrong = [
            (self.is_on() && mode == AuthMode::Open, "oidc.issuer", "empty while auth.mode is open, as nobody is asked who they are"),
            (
                self.is_on() && self.audience.is_empty(),
                "oidc.audience",
                "not empty while oidc.issuer is not: tokens that the provider made for others would be taken",
            ),
            (self.is_on() && self.jwks.is_empty(), "oidc.jwks", "not empty while oidc.issuer is not"),
            (!self.is_on() && names_more, "oidc.issuer", "not empty while oidc.audience or oidc.jwks is not"),
            (!self.ca_file.as_os_str().is_empty() && !is_https, "oidc.ca_file", "empty unless oidc.jwks is an https:// address"),
        ];
        wrong.into_iter().filter(|(is_wrong, ..)| *is_wrong).map(|(_, key, allowed)| (key, allowed)).collect()
    }
}

/// A setting that the gateway does not start with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongSetting {
    /// The setting's key, such as `grpc.listen`.
    pub key: String,
    /// The value that was found.
    pub value: String,
    /// Where it was found: a file, an environment variable, a flag.
    pub source: String,
    /// What is allowed.
    pub allowed: String,
}

impl fmt::Display for WrongSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, value, source, allowed } = self;
        write!(f, "wrong setting {key} = {value} (from {source}); allowed: {allowed}")
    }
}

/// Environment variables of ours that are no settings of the gateway: those of the commands.
const OTHER_VARIABLES: [&str; 7] = [
    "TIDEGATE_CONFIG_FILE",
    "TIDEGATE_ENDPOINT",
    "TIDEGATE_CA_FILE",
    "TIDEGATE_CLIENT_CERTIFICATE_FILE",
    "TIDEGATE_CLIENT_KEY_FILE",
    "TIDEGATE_TOKEN",
    "TIDEGATE_TOKEN_FILE",
];

/// Why there are no settings to start with.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file or a value in it is not TOML, or a file that was named is not there.
    #[error("cannot read the settings file {path}: {why}")]
    File {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// All settings that are wrong.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Wrong(Vec<WrongSetting>),
}

/// Why the gateway listens to this machine alone.
const UNSECURED: &str = "a loopback address such as 127.0.0.1, unless auth.mode is required and, for grpc.listen, tls.certificate_file is set: \
     everybody who can connect could read and write, or read along; or --insecure";

/// Where settings come from besides the defaults; later ones win.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The TOML file.
    pub file: Option<PathBuf>,
    /// Environment variables: all of the process, of which those named `TIDEGATE_…` count.
    pub environment: Vec<(String, String)>,
    /// Flags: key and value.
    pub flags: Vec<(&'static str, String)>,
}

impl Config {
    /// Merges and checks all sources; the error names every wrong setting with its value and what is allowed.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        let mut figment = Figment::from(Serialized::defaults(Self::default()));
        if let Some(path) = &sources.file {
            let text = std::fs::read_to_string(path).map_err(|why| file_error(path, &why))?;
            text.parse::<toml::Table>().map_err(|why| file_error(path, &why))?;
            figment = figment.merge(OneSource { name: path.display().to_string(), data: Toml::string(&text) });
        }
        for setting in SETTINGS {
            let variable = setting.variable();
            if let Some((_, value)) = sources.environment.iter().find(|(name, _)| *name == variable) {
                figment = figment.merge(One { source: format!("environment variable {variable}"), setting, value: value.clone() });
            }
            if let Some((_, value)) = sources.flags.iter().rev().find(|(key, _)| *key == setting.key) {
                figment = figment.merge(One { source: format!("flag {}", setting.flag()), setting, value: value.clone() });
            }
        }
        let mut wrong = unknown_keys(&figment)?;
        wrong.extend(sources.environment.iter().filter_map(|(name, _)| unknown_variable(name)));
        wrong.extend(SETTINGS.iter().filter_map(|setting| check_value(&figment, setting)));
        if !wrong.is_empty() {
            return Err(ConfigError::Wrong(wrong));
        }
        let config: Self =
            figment.extract().map_err(|error| ConfigError::Wrong(error.into_iter().map(|one| one_error(&figment, &one)).collect()))?;
        match config.check_relations(&figment) {
            wrong if wrong.is_empty() => Ok(config),
            wrong => Err(ConfigError::Wrong(wrong)),
        }
    }

    /// Where the token of the first administrator is left.
    pub fn admin_token_file(&self) -> PathBuf {
        match self.auth.admin_token_file.as_os_str().is_empty() {
            true => self.storage.data_dir.join("admin-token"),
            false => self.auth.admin_token_file.clone(),
        }
    }

    /// Limits that relate to one another, and what is only allowed with `insecure`.
    fn check_relations(&self, figment: &Figment) -> Vec<WrongSetting> {
        let mut wrong = Vec::new();
        let mut refuse = |key: &str, allowed: String| wrong.push(wrong_setting(figment, key, allowed));
        let asks = self.auth.mode == AuthMode::Required;
        let secured = asks && !self.tls.certificate_file.as_os_str().is_empty();
        // Metrics and probes show no readings, and nothing can be changed there.
        for (key, address, secured) in [("grpc.listen", self.grpc.listen, secured), ("http.listen", self.http.listen, asks)] {
            if !address.ip().is_loopback() && !secured && !self.insecure {
                refuse(key, UNSECURED.into());
            }
        }
        if self.ingest.batch_bytes_max > self.ingest.pending_bytes_max {
            refuse("ingest.batch_bytes_max", format!("at most ingest.pending_bytes_max, which is {}", self.ingest.pending_bytes_max));
        }
        if self.ingest.batch_bytes_max > self.grpc.message_bytes_max {
            refuse("ingest.batch_bytes_max", format!("at most grpc.message_bytes_max, which is {}", self.grpc.message_bytes_max));
        }
        if self.grpc.stream_window_bytes > self.grpc.connection_window_bytes {
            refuse(
                "grpc.stream_window_bytes",
                format!("at most grpc.connection_window_bytes, which is {}", self.grpc.connection_window_bytes),
            );
        }
        for (key, file, needed_key, needed) in self.tls.files_that_need_others() {
            if !file.as_os_str().is_empty() && needed.as_os_str().is_empty() {
                refuse(key, format!("empty while {needed_key} is"));
            }
        }
        for (key, allowed) in self.oidc.wrong_relations(self.auth.mode) {
            refuse(key, allowed.into());
        }
        if self.devices.clock_correction == ClockCorrection::Measured && self.devices.clock_offset_max.is_zero() {
            refuse("devices.clock_correction", "off while devices.clock_offset_max is 0s, which is any offset".into());
        }
        if self.grpc.message_bytes_max > self.grpc.incoming_bytes_max {
            refuse("grpc.message_bytes_max", format!("at most grpc.incoming_bytes_max, which is {}", self.grpc.incoming_bytes_max));
        }
        if self.export.concurrent_max >= self.query.concurrent_max {
            refuse("export.concurrent_max", format!("less than query.concurrent_max, which is {}", self.query.concurrent_max));
        }
        if self.shutdown.notice >= self.shutdown.grace {
            refuse("shutdown.notice", "less than shutdown.grace".into());
        }
        wrong
    }

    /// The settings as a TOML file, each with its meaning, its default, what is allowed, its variable and its flag.
    pub fn to_commented_toml(&self) -> String {
        let (values, defaults) = (Figment::from(Serialized::defaults(self)), Figment::from(Serialized::defaults(Self::default())));
        let mut text = String::from(
            "# Tidegate's settings: what is in effect. Each can also be set by its environment variable or flag, which win over this file.\n",
        );
        let mut section = "";
        for setting in SETTINGS {
            let (of, name) = setting.key.rsplit_once('.').unwrap_or(("", setting.key));
            if of != section {
                section = of;
                text += &format!("\n[{section}]\n");
            }
            let default = show(&defaults, setting.key);
            text += &format!(
                "\n# {}\n# Allowed: {}. Default: {default}. {}, {}\n",
                setting.doc,
                setting.allowed,
                setting.variable(),
                setting.flag()
            );
            text += &format!("{name} = {}\n", show(&values, setting.key));
        }
        text
    }
}

fn file_error(path: &std::path::Path, why: &dyn fmt::Display) -> ConfigError {
    ConfigError::File { path: path.display().to_string(), why: why.to_string().trim_end().to_owned() }
}

/// A provider under another name, for error messages.
struct OneSource<P> {
    name: String,
    data: P,
}

impl<P: Provider> Provider for OneSource<P> {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        self.data.data()
    }
}

/// One setting from text: an environment variable or a flag.
struct One {
    source: String,
    setting: &'static Setting,
    value: String,
}

impl Provider for One {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.source.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        let value = match self.setting.allowed {
            Allowed::Flag | Allowed::Count(_) | Allowed::Bytes(_) | Allowed::Ratio => {
                self.value.parse().unwrap_or_else(|_| Value::from(self.value.clone()))
            }
            Allowed::Address
            | Allowed::Path
            | Allowed::File
            | Allowed::DatabaseUrl
            | Allowed::Jwks
            | Allowed::Text(_)
            | Allowed::HttpUrl
            | Allowed::Duration(_)
            | Allowed::OneOf(_)
            | Allowed::LogFilter => Value::from(self.value.clone()),
        };
        let dict = figment::util::nest(self.setting.key, value).into_dict().expect("a key with a value nests into a dictionary");
        Ok(Profile::Default.collect(dict))
    }
}

/// What is set but is no setting.
fn unknown_keys(figment: &Figment) -> Result<Vec<WrongSetting>, ConfigError> {
    let all: Dict =
        figment.extract().map_err(|error| ConfigError::Wrong(error.into_iter().map(|one| one_error(figment, &one)).collect()))?;
    let mut keys = Vec::new();
    for (name, value) in &all {
        match value.as_dict() {
            Some(section) => keys.extend(section.keys().map(|key| format!("{name}.{key}"))),
            None => keys.push(name.clone()),
        }
    }
    keys.retain(|key| SETTINGS.iter().all(|setting| setting.key != key));
    let unknown = |key: &String| wrong_setting(figment, key, "there is no such setting; `tidegate config` prints all".into());
    Ok(keys.iter().map(unknown).collect())
}

/// A variable that looks like a setting and is none: a slip of the pen that would else go unnoticed.
fn unknown_variable(name: &str) -> Option<WrongSetting> {
    let rest = name.strip_prefix("TIDEGATE_")?;
    let known = SETTINGS.iter().any(|setting| setting.variable() == name) || OTHER_VARIABLES.contains(&name) || rest.starts_with("TEST_");
    // Kubernetes sets these for each service whose name begins with tidegate: TIDEGATE_DB_PORT_5432_TCP_ADDR and such.
    let of_kubernetes = ["_SERVICE_HOST", "_SERVICE_PORT", "_PORT"].iter().any(|part| name.ends_with(part))
        || name.contains("_SERVICE_PORT_")
        || name.contains("_PORT_");
    let allowed = || "there is no such setting; `tidegate config` prints all".to_owned();
    let source = format!("environment variable {name}");
    // It may be somebody else's, and a secret.
    let value = || "(not shown)".to_owned();
    (!known && !of_kubernetes).then(|| WrongSetting { key: name.to_owned(), value: value(), source, allowed: allowed() })
}

fn check_value(figment: &Figment, setting: &Setting) -> Option<WrongSetting> {
    let value = figment.find_value(setting.key).ok();
    let fits = value.as_ref().is_some_and(|value| setting.allowed.takes(value));
    (!fits).then(|| wrong_setting(figment, setting.key, setting.allowed.to_string()))
}

fn wrong_setting(figment: &Figment, key: &str, allowed: String) -> WrongSetting {
    let source = figment.find_metadata(key).map_or("the defaults".into(), |metadata| metadata.name.to_string());
    WrongSetting { key: key.to_owned(), value: show(figment, key), source, allowed }
}

fn one_error(figment: &Figment, error: &figment::Error) -> WrongSetting {
    wrong_setting(figment, &error.path.join("."), error.kind.to_string())
}

/// The value as it stands in TOML; a database's address without its password.
fn show(figment: &Figment, key: &str) -> String {
    let is_database = SETTINGS.iter().any(|setting| setting.key == key && matches!(setting.allowed, Allowed::DatabaseUrl));
    if is_database && let Ok(url) = figment.extract_inner::<DatabaseUrl>(key) {
        return toml::Value::String(url.to_string()).to_string();
    }
    match figment.extract_inner::<toml::Value>(key) {
        Ok(value) => value.to_string(),
        Err(_) => "(none)".into(),
    }
}

/// The flags of all settings, for [`clap`].
#[derive(Debug, Clone, Default)]
pub struct SettingFlags(pub Vec<(&'static str, String)>);

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let given = SETTINGS.iter().filter(|setting| matches.value_source(setting.key) == Some(ValueSource::CommandLine));
        self.0 = given.filter_map(|setting| Some((setting.key, matches.get_one::<String>(setting.key)?.clone()))).collect();
        Ok(())
    }
}

impl Args for SettingFlags {
    fn augment_args(command: Command) -> Command {
        SETTINGS.iter().fold(command, |command, setting| {
            let arg = Arg::new(setting.key).long(setting.flag()[2..].to_owned()).help(setting.doc).value_name(setting.allowed.value_name());
            command.arg(match setting.allowed {
                Allowed::Flag => arg.num_args(0..=1).require_equals(true).default_missing_value("true").action(ArgAction::Set),
                _ => arg.action(ArgAction::Set),
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Reads a duration as the settings do: `250ms`, `1h 30m`.
fn parse_duration(text: &str) -> Option<Duration> {
    text.parse::<SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
