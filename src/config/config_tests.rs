use super::*;

fn load(environment: &[(&str, &str)], flags: &[(&'static str, &str)]) -> Result<Config, ConfigError> {
    let owned = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    Config::load(&Sources { file: None, environment: owned(environment), flags: flags.iter().map(|(k, v)| (*k, v.to_string())).collect() })
}

fn load_file(text: &str) -> Result<Config, ConfigError> {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), text).expect("written");
    Config::load(&Sources { file: Some(file.path().into()), ..Sources::default() })
}

fn wrong(result: Result<Config, ConfigError>) -> Vec<WrongSetting> {
    match result {
        Err(ConfigError::Wrong(wrong)) => wrong,
        other => panic!("expected wrong settings, got {other:?}"),
    }
}

#[test]
fn the_list_names_every_setting_once() {
    let dict: Dict = Figment::from(Serialized::defaults(Config::default())).extract().expect("a dictionary");
    let mut typed = Vec::new();
    for (name, value) in &dict {
        match value.as_dict() {
            Some(section) => typed.extend(section.keys().map(|key| format!("{name}.{key}"))),
            None => typed.push(name.clone()),
        }
    }
    let mut listed: Vec<String> = SETTINGS.iter().map(|setting| setting.key.to_owned()).collect();
    typed.sort();
    listed.sort();
    assert_eq!(typed, listed);
}

#[test]
fn the_defaults_are_allowed_and_the_printed_file_reads_back_as_what_it_shows() {
    let defaults = load(&[], &[]).expect("allowed");
    assert_eq!(defaults, Config::default());
    let mut changed = defaults;
    changed.shutdown.grace = Duration::from_millis(90_500);
    changed.ingest.commit_batches_max = 7;
    changed.log.filter = "info,tidegate=\"debug\"".into();
    changed.log.filter = "info,tidegate=debug".into();
    let text = changed.to_commented_toml();
    assert_eq!(load_file(&text).expect("its own output"), changed, "{text}");
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "[ingest]\ncommit_batches_max = 1\nbatch_readings_max = 1\nbatch_bytes_max = 2000\n").expect("written");
    let config = Config::load(&Sources {
        file: Some(file.path().into()),
        environment: vec![
            ("TIDEGATE_INGEST_COMMIT_BATCHES_MAX".into(), "2".into()),
            ("TIDEGATE_INGEST_BATCH_READINGS_MAX".into(), "2".into()),
        ],
        flags: vec![("ingest.commit_batches_max", "3".into())],
    })
    .expect("allowed");
    assert_eq!((config.ingest.commit_batches_max, config.ingest.batch_readings_max, config.ingest.batch_bytes_max), (3, 2, 2000));
}

#[test]
fn a_wrong_setting_is_named_with_its_value_its_source_and_what_is_allowed() {
    let found = wrong(load(&[("TIDEGATE_GRPC_LISTEN", "localhost")], &[("ingest.commit_batches_max", "0"), ("shutdown.grace", "soon")]));
    let shown: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        [
            "wrong setting grpc.listen = \"localhost\" (from environment variable TIDEGATE_GRPC_LISTEN); allowed: IP:PORT",
            "wrong setting ingest.commit_batches_max = 0 (from flag --ingest-commit-batches-max); allowed: 1 to 10000",
            "wrong setting shutdown.grace = \"soon\" (from flag --shutdown-grace); allowed: a duration of 1s to 1h",
        ]
    );
}

#[test]
fn unknown_settings_and_broken_files_are_refused() {
    let found = wrong(load_file("[grpc]\nlissten = \"127.0.0.1:1\"\n"));
    assert_eq!((found[0].key.as_str(), found.len()), ("grpc.lissten", 1));
    assert!(matches!(load_file("[grpc\n"), Err(ConfigError::File { .. })));
    let missing = Config::load(&Sources { file: Some("/nonexistent/tidegate.toml".into()), ..Sources::default() });
    assert!(matches!(missing, Err(ConfigError::File { .. })));
}

#[test]
fn a_variable_that_is_no_setting_is_refused_unless_it_is_somebody_elses() {
    let found = wrong(load(&[("TIDEGATE_STORAGE_DATADIR", "/data")], &[]));
    assert_eq!((found[0].key.as_str(), found[0].value.as_str()), ("TIDEGATE_STORAGE_DATADIR", "(not shown)"));
    let others = [
        ("TIDEGATE_ENDPOINT", "x"),
        ("TIDEGATE_PORT_50051_TCP", "tcp://10.0.0.1:50051"),
        ("TIDEGATE_SERVICE_HOST", "10.0.0.1"),
        ("TIDEGATE_DB_PORT_5432_TCP_ADDR", "10.0.0.2"),
    ];
    assert!(load(&others, &[]).is_ok());
}

#[test]
fn only_loopback_without_credentials_unless_insecure() {
    let open = [("grpc.listen", "0.0.0.0:50051"), ("http.listen", "[::]:9464")];
    let keys: Vec<String> = wrong(load(&[], &open)).into_iter().map(|wrong| wrong.key).collect();
    assert_eq!(keys, ["grpc.listen", "http.listen"]);
    assert!(load(&[("TIDEGATE_INSECURE", "true")], &open).is_ok());
    assert!(load(&[], &[("grpc.listen", "[::1]:0")]).is_ok());
}

#[test]
fn limits_that_relate_are_checked_together() {
    let found = wrong(load(&[], &[("ingest.batch_bytes_max", "8388608"), ("export.concurrent_max", "8"), ("shutdown.notice", "25s")]));
    let keys: Vec<&str> = found.iter().map(|wrong| wrong.key.as_str()).collect();
    assert_eq!(keys, ["ingest.batch_bytes_max", "export.concurrent_max", "shutdown.notice"]);
}

#[test]
fn what_is_said_of_a_provider_goes_together() {
    let keys = |flags: &[(&'static str, &str)]| match load(&[], flags) {
        Ok(_) => Vec::new(),
        Err(_) => wrong(load(&[], flags)).into_iter().map(|wrong| wrong.key).collect(),
    };
    let issuer = ("oidc.issuer", "https://sso.example.com");
    let required = ("auth.mode", "required");
    let (audience, jwks) = (("oidc.audience", "tidegate"), ("oidc.jwks", "https://sso.example.com/keys"));
    assert_eq!(keys(&[required, issuer, audience, jwks, ("oidc.ca_file", "ca.pem")]), [""; 0]);
    assert_eq!(keys(&[issuer, audience, jwks]), ["oidc.issuer"], "nobody is asked who they are");
    assert_eq!(keys(&[required, issuer]), ["oidc.audience", "oidc.jwks"]);
    assert_eq!(keys(&[required, audience]), ["oidc.issuer"]);
    assert_eq!(keys(&[required, issuer, audience, ("oidc.jwks", "http://sso.example.com/keys")]), ["oidc.jwks"]);
    assert_eq!(keys(&[required, issuer, audience, ("oidc.jwks", "jwks.json"), ("oidc.ca_file", "ca.pem")]), ["oidc.ca_file"]);
    assert_eq!(keys(&[required, ("oidc.role_claim", "")]), ["oidc.role_claim"]);
}

#[test]
fn a_collectors_address_has_a_scheme_and_a_share_is_at_most_all() {
    let flags = [("tracing.otlp_endpoint", "collector:4317"), ("tracing.sample_ratio", "1.5"), ("tracing.service_name", "")];
    let keys: Vec<String> = wrong(load(&[], &flags)).into_iter().map(|wrong| wrong.key).collect();
    assert_eq!(keys, ["tracing.otlp_endpoint", "tracing.sample_ratio", "tracing.service_name"]);
    for (text, ratio) in [("1", 1.0), ("0", 0.0), ("0.25", 0.25)] {
        let flags = [("tracing.otlp_endpoint", "https://collector:4317"), ("tracing.sample_ratio", text)];
        assert_eq!(load(&[], &flags).expect("allowed").tracing.sample_ratio, ratio);
    }
}
