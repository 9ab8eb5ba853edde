//! Guarantee: what is logged about a call, also by its handler and also about its response, carries the call's id, and its
//! end is logged once.

use super::support::{Gateway, eventually, follow, position_of, soon};
use crate::{config::Log, telemetry::logs};
use parking_lot::Mutex;
use std::{io, sync::Arc};
use tonic::Request;

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

#[tokio::test]
async fn every_line_about_a_call_has_its_id() {
    let lines = Lines::default();
    let config = Log { filter: "off,tidegate=debug".into(), format: "json".into() };
    let writer = lines.clone();
    let log = logs::dispatch(&config, move || writer.clone(), false).expect("the filter is good");
    // While there is just one log, tracing-core asks the current thread's whether an event that it sees for the first time
    // is of interest, and the other tests' threads have none: with a second one it asks all logs.
    let _second = logs::dispatch(&config, io::sink, false).expect("the filter is good");
    // The test's runtime has one thread, this one: its log is that of the gateway.
    let _guard = tracing::dispatcher::set_default(&log);

    let gateway = Gateway::start(|_| ()).await;
    let mut unary = Request::new(position_of("panic"));
    unary.metadata_mut().insert("x-request-id", "first".parse().expect("ASCII"));
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
}
