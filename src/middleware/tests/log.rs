//! Guarantee: what is logged about a call, also by its handler and also about its response, carries the call's id, and its
//! end is logged once.

use super::support::{Gateway, eventually, follow, position_of, soon};
use crate::{
    config::{Config, Log},
    middleware::CallReports,
    telemetry::logs,
};
use parking_lot::Mutex;
use std::{io, sync::Arc, time::Duration};
use tonic::Request;
use tracing::{Dispatch, dispatcher::DefaultGuard};

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Lines {
    /// The events of this name.
    fn events(&self, name: &str) -> Vec<serde_json::Value> {
        let text = String::from_utf8(self.0.lock().clone()).expect("JSON is UTF-8");
        let events = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a JSON object a line"));
        events.filter(|event| event["message"] == name).collect()
    }
}

/// A log that is read by the test, whose runtime has one thread, this one: its log is that of the gateway. As long as the guards live.
fn log_of_this_thread(filter: &str) -> (Lines, (Dispatch, DefaultGuard)) {
    let lines = Lines::default();
    let config = Log { filter: filter.into(), format: "json".into(), ..Config::default().log };
    let writer = lines.clone();
    let log = logs::dispatch(&config, move || writer.clone(), false).expect("the filter is good");
    // While there is just one log, tracing-core asks the current thread's whether an event that it sees for the first time
    // is of interest, and the other tests' threads have none: with a second one it asks all logs.
    let second = logs::dispatch(&config, io::sink, false).expect("the filter is good");
    (lines, (second, tracing::dispatcher::set_default(&log)))
}

#[tokio::test]
async fn every_line_about_a_call_has_its_id() {
    let (lines, _guards) = log_of_this_thread("off,tidegate=debug");
    let gateway = Gateway::start(|_| ()).await;
    let mut unary = Request::new(position_of("panic"));
    unary.metadata_mut().insert("x-request-id", "first".parse().expect("ASCII"));
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    unary.metadata_mut().insert("traceparent", traceparent.parse().expect("ASCII"));
    gateway.telemetry().await.get_upload_position(unary).await.expect_err("it panics");
    let mut stream = Request::new(follow("panic"));
    stream.metadata_mut().insert("x-request-id", "second".parse().expect("ASCII"));
    let mut messages = gateway.live().await.follow(stream).await.expect("it begins").into_inner();
    soon("the first message", messages.message()).await.expect("well").expect("a message");
    soon("the panic", messages.message()).await.expect_err("it panics");
    eventually("both ends are logged", || lines.events("call.ended").len() == 2).await;

    let (panics, ends) = (lines.events("call.panicked"), lines.events("call.ended"));
    assert_eq!((panics.len(), ends.len()), (2, 2));
    for (index, (id, method)) in [("first", "TelemetryService/GetUploadPosition"), ("second", "LiveService/Follow")].iter().enumerate() {
        assert_eq!((&panics[index]["request_id"], &panics[index]["panic"]), (&(*id).into(), &"as asked".into()));
        let end = &ends[index];
        assert_eq!((&end["span"]["request_id"], &end["status"]), (&(*id).into(), &"INTERNAL".into()), "{end}");
        assert_eq!(end["span"]["method"], format!("tidegate.v1.{method}"));
        assert!(end["span"]["peer"].as_str().is_some_and(|peer| peer.starts_with("127.0.0.1:")), "{end}");
        assert!(end["duration_ms"].is_f64(), "{end}");
    }
    let trace_id = |index: usize| ends[index]["span"]["trace_id"].as_str().expect("a text");
    assert_eq!((trace_id(0), trace_id(1).len()), ("0af7651916cd43dd8448eb211c80319c", 32));
    assert_ne!(trace_id(0), trace_id(1), "the second began a trace");
}

/// Scenario: of the log only warnings are wanted; whatever takes any time is slow. Guarantee: a unary call is told of with its id and its
/// status, a stream is not, and where nothing is slow neither is.
#[tokio::test]
async fn a_slow_call_is_told_of_once_and_a_long_stream_is_not() {
    let (lines, _guards) = log_of_this_thread("off,tidegate=warn");
    for (slow_call, told) in [(Duration::from_nanos(1), 1), (Duration::ZERO, 0), (Duration::from_secs(3600), 0)] {
        lines.0.lock().clear();
        let gateway = Gateway::start_reporting(CallReports { slow_call, tracer: None }, |_| ()).await;
        let mut stream = gateway.live().await.follow(follow("")).await.expect("it begins").into_inner();
        while soon("the stream ends", stream.message()).await.expect("well").is_some() {}
        let mut unary = Request::new(position_of("quick"));
        unary.metadata_mut().insert("x-request-id", "first".parse().expect("ASCII"));
        gateway.telemetry().await.get_upload_position(unary).await.expect("answered");
        eventually("both are over", || gateway.calls.open() == 0).await;

        let slow = lines.events("call.slow");
        assert_eq!(slow.len(), told, "{slow:?}");
        for line in slow {
            assert_eq!((&line["level"], &line["status"]), (&"WARN".into(), &"OK".into()), "{line}");
            assert_eq!((&line["span"]["request_id"], &line["actor"]), (&"first".into(), &"".into()), "{line}");
            assert_eq!(line["span"]["method"], "tidegate.v1.TelemetryService/GetUploadPosition", "{line}");
            assert!(line["duration_ms"].is_f64(), "{line}");
        }
    }
}
