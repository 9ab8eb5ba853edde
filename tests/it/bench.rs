//! The benchmarks run and their results are what they say; how fast it is is not a matter of tests.

use crate::support::{
    certificates::Authority,
    script::{Script, fleet},
};

async fn bench(arguments: &[&str]) -> serde_json::Value {
    let mut bench = fleet();
    bench.arg("bench").args(arguments).args(["--json"]);
    serde_json::from_str(&Script::start(bench).succeeds().await).expect("one JSON object")
}

#[tokio::test(flavor = "multi_thread")]
async fn both_servers_of_a_throughput_run_acknowledge() {
    let report = bench(&["--batch=1,100", "--connections=2", "--devices=4", "--slices=2", "--slice-duration=100ms"]).await;
    let cells = report["cells"].as_array().expect("a list");
    assert_eq!(cells.len(), 2);
    for cell in cells {
        assert!(cell["ratio"].as_f64() > Some(0.0), "{cell}");
        for server in ["gateway", "reference"] {
            assert!(cell[server]["rate"].as_f64() > Some(0.0), "{cell}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_without_layers_acknowledges_and_stores() {
    let report = bench(&["--bare", "--batch=10", "--connections=2", "--devices=4", "--slices=2", "--slice-duration=100ms"]).await;
    assert_eq!(report["reference"], "bare");
    assert!(report["cells"][0]["reference"]["rate"].as_f64() > Some(0.0), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_with_tls_is_compared_with_itself_without() {
    let authority = Authority::new();
    let server = authority.server();
    // With that of its authority, as the file is also what devices trust.
    let certificate = authority.write("cert.pem", &format!("{}{}", server.certificate, authority.pem)).display().to_string();
    let key = authority.write("key.pem", &server.key).display().to_string();
    let with_tls = ["--certificate-file", &certificate, "--key-file", &key];
    let small = ["--batch=10", "--connections=2", "--devices=4", "--slices=2", "--slice-duration=100ms"];
    let report = bench(&[&with_tls[..], &small].concat()).await;
    assert_eq!(report["reference"], "without_tls");
    for server in ["gateway", "reference"] {
        assert!(report["cells"][0][server]["rate"].as_f64() > Some(0.0), "{report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_whose_certificate_devices_refuse_is_not_measured() {
    let authority = Authority::new();
    let server = authority.server();
    // By itself it proves nothing.
    let certificate = authority.write("cert.pem", &server.certificate).display().to_string();
    let key = authority.write("key.pem", &server.key).display().to_string();
    for run in [&["--slices=1"][..], &["idle", "--connections=1"]] {
        let mut bench = fleet();
        bench.arg("bench").args(run).args(["--certificate-file", &certificate, "--key-file", &key]);
        Script::start(bench).fails_saying(1, "UnknownIssuer").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledgement_of_a_link_is_timed() {
    let outcome = bench(&["latency", "--batch=10", "--connections=2", "--devices=4", "--duration=1s"]).await;
    let rates = outcome["acknowledgements"].as_array().expect("several");
    assert!(!rates.is_empty() && rates.iter().all(|at| at["latency"]["samples"].as_u64() > Some(0)), "{outcome}");
    assert!(outcome["disk_sync"]["p99_us"].as_u64() > Some(0), "{outcome}");

    let outcome = bench(&["paced", "--rate=1000", "--batch=10", "--connections=2", "--devices=4", "--duration=1s"]).await;
    let readings = outcome["readings"].as_u64().expect("a number");
    assert!((500..=1_000).contains(&readings), "as many as the rate says, and all of them acknowledged: {outcome}");
}

#[tokio::test(flavor = "multi_thread")]
async fn live_acknowledgements_are_timed_beside_a_backlog() {
    let outcome = bench(&["backlog", "--live-devices=4", "--live-rate=50", "--devices=2", "--batches=500", "--duration=1s"]).await;
    for part in ["alone", "beside_backlog"] {
        assert!(outcome[part]["samples"].as_u64() > Some(0), "{outcome}");
    }
    assert!(outcome["backlog_rate"].as_f64() > Some(0.0), "{outcome}");
}

#[tokio::test(flavor = "multi_thread")]
async fn links_that_lost_their_gateway_all_come_back() {
    let outcome = bench(&["idle", "--connections=500", "--storm"]).await;
    assert!(outcome["bytes_per_connection"].as_f64() > Some(0.0), "{outcome}");
    assert!(outcome["storm"]["half_seconds"].as_f64() > Some(0.0), "{outcome}");
}
