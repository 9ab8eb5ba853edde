//! The reference pages say of everything that there is what it is, and of nothing else.

use crate::{
    config::{Config, SETTINGS},
    error::Reason,
    model::batch::reason_name,
    pb,
    telemetry::Metric,
};
use prost::Message;
use std::collections::BTreeSet;

const API: &str = include_str!("../docs/API.md");
const ERRORS: &str = include_str!("../docs/ERRORS.md");
const SETTINGS_PAGE: &str = include_str!("../docs/SETTINGS.md");

/// The headings of the third level, with the text below each.
fn entries(page: &str) -> Vec<(&str, &str)> {
    let sections = page.split("\n### ").skip(1);
    sections.map(|section| section.split("\n## ").next().unwrap_or(section)).filter_map(|section| section.split_once('\n')).collect()
}

fn headings(page: &str) -> BTreeSet<String> {
    entries(page).into_iter().map(|(heading, _)| heading.to_owned()).collect()
}

/// `InvalidArgument` as `INVALID_ARGUMENT`.
fn upper_snake(name: &str) -> String {
    let mut upper = String::new();
    for (index, c) in name.char_indices() {
        if index > 0 && c.is_uppercase() {
            upper.push('_');
        }
        upper.push(c.to_ascii_uppercase());
    }
    upper
}

#[test]
fn every_reason_has_its_section_with_its_code_and_nothing_else_has() {
    let code = |reason: Reason| upper_snake(&format!("{:?}", reason.code()));
    let expected = Reason::ALL.into_iter().map(|reason| format!("`{}` ({})", reason.as_str(), code(reason))).collect();
    assert_eq!(headings(ERRORS), expected);
}

#[test]
fn every_reason_says_what_each_does_and_when_to_try_again() {
    for (heading, text) in entries(ERRORS) {
        for who in ["Client", "Operator", "Support"] {
            assert!(text.contains(&format!("- **{who}:** ")), "{heading} does not say what {who} does");
        }
        let reason = Reason::ALL.into_iter().find(|reason| heading.starts_with(&format!("`{}`", reason.as_str()))).expect("the other test");
        let told = reason.retry_after().map(|delay| format!("`RetryInfo`: {} s.", delay.as_secs_f64()));
        match told {
            Some(told) => assert!(text.contains(&told), "{heading} does not say {told:?}"),
            None => assert!(!text.contains("`RetryInfo`"), "{heading} speaks of RetryInfo"),
        }
    }
}

#[test]
fn the_page_of_errors_has_every_reject_reason_and_no_other() {
    let table = ERRORS.split("## Rejected batches").nth(1).expect("the section");
    let told: BTreeSet<&str> = table.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`')).map(|(name, _)| name).collect();
    let all = (1..).map_while(|number| pb::RejectReason::try_from(number).ok()).map(reason_name).collect();
    assert_eq!(told, all);
}

#[test]
fn the_page_of_the_api_has_every_rpc_with_its_kind_and_no_other() {
    let set = prost_types::FileDescriptorSet::decode(pb::DESCRIPTOR_SET).expect("made by the build");
    let mut expected = BTreeSet::new();
    for service in set.file.iter().filter(|file| file.package() == "tidegate.v1").flat_map(|file| &file.service) {
        for method in &service.method {
            let kind = match (method.client_streaming(), method.server_streaming()) {
                (false, false) => "unary",
                (true, false) => "client streaming",
                (false, true) => "server streaming",
                (true, true) => "bidirectional streaming",
            };
            expected.insert(format!("`{}.{}` ({kind})", service.name(), method.name()));
        }
    }
    assert!(!expected.is_empty());
    assert_eq!(headings(API), expected);
}

#[test]
fn every_rpc_names_its_users_its_errors_and_what_happens_twice() {
    for (heading, text) in entries(API) {
        for what in ["Who", "Errors", "Twice"] {
            assert!(text.contains(&format!("- **{what}:** ")), "{heading} does not say {what:?}");
        }
        let errors = text.split("- **Errors:** ").nth(1).and_then(|rest| rest.split("- **Twice:** ").next()).expect("checked above");
        for name in errors.split('`').skip(1).step_by(2).filter(|name| name.chars().all(|c| c.is_ascii_uppercase() || c == '_')) {
            assert!(Reason::ALL.iter().any(|reason| reason.as_str() == name), "{heading} names {name}, which is no reason");
        }
    }
}

/// The table that the page must have; paste it from the failure's message.
fn settings_table() -> String {
    let defaults: toml::Table = Config::default().to_commented_toml().parse().expect("its own output");
    let default = |key: &str| match key.split_once('.') {
        Some((section, name)) => defaults[section][name].to_string(),
        None => defaults[key].to_string(),
    };
    let mut table = String::from("| setting | default | allowed | meaning |\n|---|---|---|---|\n");
    for setting in SETTINGS {
        table += &format!("| `{}` | `{}` | {} | {} |\n", setting.key, default(setting.key), setting.allowed, setting.doc);
    }
    table
}

#[test]
fn the_page_of_settings_has_the_table_of_all_settings() {
    let table = settings_table();
    assert!(SETTINGS_PAGE.contains(&table), "docs/SETTINGS.md must have this table:\n{table}");
    let rows = SETTINGS_PAGE.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(rows, SETTINGS.len(), "docs/SETTINGS.md has rows that are no settings");
}

const OPERATIONS: &str = include_str!("../docs/OPERATIONS.md");
const RULES: &str = include_str!("../deploy/prometheus/rules.yml");
const DASHBOARDS: [&str; 2] =
    [include_str!("../deploy/grafana/dashboards/gateway.json"), include_str!("../deploy/grafana/dashboards/readings.json")];

#[test]
fn the_page_of_operations_has_every_alert_and_no_other() {
    let alerts = RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).map(str::to_owned).collect();
    assert_eq!(headings(OPERATIONS), alerts);
}

/// The names of metrics in a text, without what a histogram's series have behind it.
fn metric_names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
    let names = words.filter(|word| (word.starts_with("tidegate_") || word.starts_with("process_")) && !word.contains(':'));
    names.map(|name| ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name)).collect()
}

#[test]
fn rules_and_dashboards_name_metrics_that_there_are() {
    let mut named = metric_names(RULES);
    for dashboard in DASHBOARDS {
        let dashboard: serde_json::Value = serde_json::from_str(dashboard).expect("JSON");
        assert!(dashboard["panels"].as_array().is_some_and(|panels| !panels.is_empty()));
    }
    named.extend(metric_names(DASHBOARDS[0]));
    assert!(named.len() > 20, "{named:?}");
    for name in named {
        assert!(Metric::named(name).is_some(), "{name} is no metric");
    }
}
