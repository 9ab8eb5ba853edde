//! The list of metrics, what is rendered from it, and its documentation.

use super::*;
use std::collections::{BTreeMap, BTreeSet};

/// Label values for a metric, whatever its labels are.
fn any_labels(metric: &Metric) -> Vec<(&'static str, SharedString)> {
    metric.labels.iter().map(|name| (*name, "x".into())).collect()
}

#[test]
fn every_metric_is_exposed_with_its_help_and_type() {
    let metrics = Metrics::new();
    for metric in METRICS.iter().filter(|metric| !metric.name.starts_with("process_")) {
        match metric.kind {
            Kind::Counter => metrics.counter(metric.name, &any_labels(metric)).increment(1),
            Kind::Gauge => metrics.gauge(metric.name, &any_labels(metric)).set(1),
            Kind::Histogram { .. } => metrics.histogram(metric.name, &any_labels(metric)).record(1),
        }
    }
    let text = metrics.render();
    for metric in METRICS {
        assert!(text.contains(&format!("# HELP {} {}\n", metric.name, metric.help)), "{}", metric.name);
        assert!(text.contains(&format!("# TYPE {} {}\n", metric.name, metric.kind.as_str())), "{}", metric.name);
    }
}

/// The rules of `promtool check metrics` that names can break.
#[test]
fn names_are_as_prometheus_wants_them() {
    for metric in METRICS {
        let Metric { name, kind, unit, .. } = *metric;
        assert!(name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'_')), "{name}");
        assert!(name.starts_with("tidegate_") || name.starts_with("process_"), "{name}");
        assert_eq!(kind == Kind::Counter, name.ends_with("_total"), "{name}");
        assert!(["_count", "_sum", "_bucket"].iter().all(|suffix| !name.ends_with(suffix)), "{name}");
        assert!(["counter", "gauge", "histogram", "milliseconds", "kilobytes"].iter().all(|word| !name.contains(word)), "{name}");
        assert!(name.contains(unit) && metric.help.ends_with('.'), "{name}");
        if let Kind::Histogram { buckets } = kind {
            assert!(!buckets.is_empty() && buckets.is_sorted_by(|a, b| a < b), "{name}");
        }
    }
    let distinct: BTreeSet<_> = METRICS.iter().map(|metric| metric.name).collect();
    assert_eq!(distinct.len(), METRICS.len());
}

#[test]
fn the_page_lists_exactly_the_metrics() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/METRICS.md")).expect("the page is there");
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let documented: BTreeMap<String, (String, String, String)> = rows
        .map(|row| {
            let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
            let [name, kind, labels, help] = cells.try_into().expect("name, kind, labels, meaning");
            // `method`: …; `code`: …
            let labels = labels.split("; ").filter_map(|label| Some(label.split_once(':')?.0.trim_matches('`'))).collect::<Vec<_>>();
            (name.trim_matches('`').to_owned(), (kind.to_owned(), labels.join(","), help.to_owned()))
        })
        .collect();
    let wanted = METRICS
        .iter()
        .map(|metric| (metric.name.to_owned(), (metric.kind.as_str().to_owned(), metric.labels.join(","), metric.help.to_owned())))
        .collect::<BTreeMap<_, _>>();
    assert_eq!(documented, wanted);
}

#[test]
fn each_gateway_of_a_process_counts_for_itself() {
    let (one, other) = (Metrics::new(), Metrics::new());
    one.counter(names::PANICS, &[]).increment(3);
    other.counter(names::PANICS, &[]).increment(0);
    assert!(one.render().contains("\ntidegate_panics_total 3\n"));
    assert!(other.render().contains("\ntidegate_panics_total 0\n"));
}

#[test]
#[should_panic(expected = "METRICS has no tidegate_panics_total of this kind")]
fn what_is_not_in_the_list_is_not_counted() {
    Metrics::new().gauge(names::PANICS, &[]).set(1);
}
