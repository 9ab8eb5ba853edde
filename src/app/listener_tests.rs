//! Guarantee: open calls end well at a drain and at the latest at the cut; no peer can take the listener down or keep a place.

use super::{super::guarded_io::LINGER, Account, CALLS_APART, CALLS_LEFT_FREE, Calls, FUTILE_COST, Server};
use crate::{
    config::Config,
    middleware::tests::support::{Gateway, LARGE_MESSAGES, eventually, follow, position_of, soon},
    pb::UploadRequest,
    telemetry::Metrics,
};
use futures_util::{StreamExt, future::join_all};
use std::{
    net::Ipv4Addr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;

#[tokio::test]
async fn a_drain_lets_open_calls_end_and_takes_no_new_connections() {
    let gateway = Gateway::start(|_| ()).await;
    let (send, requests) = mpsc::channel(4);
    let mut client = gateway.telemetry().await;
    let upload = tokio::spawn(async move { client.upload(ReceiverStream::new(requests)).await });
    send.send(UploadRequest { sequence: 1, ..Default::default() }).await.expect("the call is open");
    eventually("the call is open", || gateway.services.at_work() == 1).await;
    let mut idle = gateway.telemetry().await;
    idle.get_upload_position(position_of("")).await.expect("it answers");

    gateway.stop.drain.cancel();
    eventually("connections without calls are closed", || gateway.value("tidegate_grpc_connections_open") == 1.0).await;
    TcpStream::connect(gateway.address).await.expect_err("the socket is closed");
    drop(idle);

    send.send(UploadRequest { sequence: 2, ..Default::default() }).await.expect("the call goes on");
    drop(send);
    let response = soon("the response", upload).await.expect("no panic").expect("the call ends well");
    assert_eq!(response.into_inner().last_durable_sequence, 2);
    soon("all is closed without a cut", gateway.serving).await.expect("no panic");
    assert_eq!(gateway.calls.open(), 0);
}

#[tokio::test]
async fn a_response_is_whole_although_the_drain_begins_before_it_is_read() {
    let gateway = Gateway::start(|_| ()).await;
    let mut messages = gateway.live().await.follow(follow("large")).await.expect("it begins").into_inner();
    soon("the first message", messages.message()).await.expect("well").expect("a message");
    gateway.stop.drain.cancel();
    eventually("the socket is closed", || std::net::TcpStream::connect(gateway.address).is_err()).await;
    assert_eq!(gateway.services.at_work(), 1, "flow control holds the rest back");

    let rest = messages.map(|message| message.expect("not cut")).count();
    assert_eq!(soon("the end", rest).await, LARGE_MESSAGES);
    soon("all is closed without a cut", gateway.serving).await.expect("no panic");
}

/// Scenario: a client that has yet to read the end still sends. Guarantee: it gets no reset for that; see [`LINGER`].
#[tokio::test]
async fn behind_its_end_a_connection_waits_for_the_client_to_close() {
    const PING: u8 = 6;
    const ACK: u8 = 1;
    let gateway = Gateway::start(|_| ()).await;
    let mut client = TcpStream::connect(gateway.address).await.expect("it listens");
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("it is taken");
    let mut header = [0; 9];
    soon("HTTP/2 has begun", client.read_exact(&mut header)).await.expect("SETTINGS");
    let drained = Instant::now();
    gateway.stop.drain.cancel();
    loop {
        let mut payload = vec![0; usize::from(u16::from_be_bytes([header[1], header[2]]))];
        client.read_exact(&mut payload).await.expect("a whole frame");
        if header[3] == PING {
            client.write_all(&[&[0, 0, 8, PING, ACK, 0, 0, 0, 0][..], &payload].concat()).await.expect("it is taken");
        }
        if soon("a frame or the end", client.read_exact(&mut header)).await.is_err() {
            break;
        }
    }
    eventually("it is closed", || gateway.value("tidegate_grpc_connections_open") == 0.0).await;
    assert!(drained.elapsed() >= LINGER, "{:?}", drained.elapsed());
    drop(client);
}

#[tokio::test]
async fn a_cut_ends_what_is_left() {
    let gateway = Gateway::start(|_| ()).await;
    let mut messages = gateway.live().await.follow(follow("hang")).await.expect("it begins").into_inner();
    soon("the first message", messages.message()).await.expect("well").expect("a message");
    gateway.stop.drain.cancel();
    eventually("the socket is closed", || std::net::TcpStream::connect(gateway.address).is_err()).await;
    assert_eq!((gateway.services.at_work(), gateway.serving.is_finished()), (1, false));

    gateway.stop.cut.cancel();
    soon("all is closed", gateway.serving).await.expect("no panic");
    assert_eq!((gateway.services.at_work(), gateway.calls.open()), (0, 0), "no work is left when serve returns");
    soon("the client sees it", messages.message()).await.expect_err("the connection was closed");
}

#[tokio::test]
async fn a_connection_above_the_limit_waits_for_its_turn() {
    let gateway = Gateway::start(|config| config.connections_max = 1).await;
    let mut first = gateway.telemetry().await;
    first.get_upload_position(position_of("")).await.expect("it answers");
    // In the listen queue: the operating system has answered, the gateway has not.
    let second = TcpStream::connect(gateway.address).await.expect("there is room in the queue");
    first.get_upload_position(position_of("")).await.expect("it answers");
    assert_eq!(gateway.value("tidegate_grpc_connections_total"), 1.0);

    drop(first);
    eventually("the second is accepted", || gateway.value("tidegate_grpc_connections_total") == 2.0).await;
    assert_eq!(gateway.value("tidegate_grpc_connections_open"), 1.0);
    drop(second);
    eventually("it is closed", || gateway.value("tidegate_grpc_connections_open") == 0.0).await;
}

#[tokio::test]
async fn who_connects_and_says_nothing_does_not_keep_a_place() {
    let gateway = Gateway::start(|config| config.keepalive_timeout = Duration::from_millis(50)).await;
    let mut silent = TcpStream::connect(gateway.address).await.expect("it listens");
    silent.write_all(b"PRI * HTTP").await.expect("a part of the preface");
    assert_eq!(soon("the end", silent.read(&mut [0; 64])).await.unwrap_or(0), 0, "it is closed");
    eventually("it is closed", || gateway.value("tidegate_grpc_connections_open") == 0.0).await;
}

#[tokio::test]
async fn other_protocols_do_no_harm() {
    let gateway = Gateway::start(|_| ()).await;
    for noise in [&b"GET / HTTP/1.1\r\nhost: gateway\r\n\r\n"[..], &[0xff; 4096]] {
        let mut stream = TcpStream::connect(gateway.address).await.expect("it listens");
        stream.write_all(noise).await.expect("it is taken");
        let mut answer = Vec::new();
        // Closed, perhaps after a GOAWAY, perhaps with a reset.
        let _ = soon("the end", stream.read_to_end(&mut answer)).await;
    }
    gateway.telemetry().await.get_upload_position(position_of("")).await.expect("it serves on");
}

/// Scenario: a client comes again as soon as its connection has been ended. Guarantee: it is served, but not as often as it likes.
#[tokio::test]
async fn who_comes_over_and_over_for_nothing_waits() {
    const CONNECTIONS: u32 = 5;
    // DATA on stream 0, which there is not (RFC 9113 section 6.1); and another protocol.
    let broken = &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..];
    for noise in [broken, b"GET /readings HTTP/1.1\r\nhost: gateway\r\n\r\n"] {
        let gateway = Gateway::start(|_| ()).await;
        let began = Instant::now();
        for _ in 0..CONNECTIONS {
            let mut stream = TcpStream::connect(gateway.address).await.expect("it listens");
            stream.write_all(noise).await.expect("it is taken");
            let _ = soon("the end", stream.read_to_end(&mut Vec::new())).await;
            eventually("it is closed", || gateway.value("tidegate_grpc_connections_open") == 0.0).await;
        }
        assert!(began.elapsed() >= FUTILE_COST * (CONNECTIONS - 1), "{:?}", began.elapsed());
        gateway.telemetry().await.get_upload_position(position_of("")).await.expect("it serves on");
    }
}

#[tokio::test]
async fn who_is_refused_over_and_over_waits() {
    const CONNECTIONS: u32 = 5;
    let gateway = Gateway::start(|_| ()).await;
    let began = Instant::now();
    for _ in 0..CONNECTIONS {
        let mut client = gateway.health().await;
        let refused = client.check(HealthCheckRequest { service: "unheard.of".into() }).await.expect_err("there is no such service");
        assert_eq!(refused.code(), Code::NotFound);
        drop(client);
        eventually("it is closed", || gateway.value("tidegate_grpc_connections_open") == 0.0).await;
    }
    assert!(began.elapsed() >= FUTILE_COST * (CONNECTIONS - 1), "{:?}", began.elapsed());
}

#[tokio::test]
async fn who_leaves_many_calls_open_waits() {
    const CALLS: usize = CALLS_LEFT_FREE + 50;
    let gateway = Arc::new(Gateway::start(|_| ()).await);
    let client = tokio::task::spawn_blocking({
        let gateway = gateway.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let calls: Vec<_> = runtime.block_on(async {
                let client = gateway.live().await;
                let calls = (0..CALLS).map(|_| {
                    let mut client = client.clone();
                    async move { client.follow(follow("hang")).await.expect("it begins") }
                });
                join_all(calls).await
            });
            let left = Instant::now();
            // With its connection, and before its calls: none of them is reset, as when a process is killed.
            drop(runtime);
            drop(calls);
            left
        }
    });
    let left = soon("the client", client).await.expect("no panic");
    eventually("it is closed", || gateway.value("tidegate_grpc_connections_open") == 0.0).await;
    gateway.telemetry().await.get_upload_position(position_of("")).await.expect("it is served");
    assert!(left.elapsed() >= CALLS_APART * 50, "{:?}", left.elapsed());
}

#[test]
fn what_a_connection_leaves_behind_is_charged_to_its_address() {
    let charged = |begun: usize, refused: usize, open: usize| {
        let server = Server::new(&Config::default().grpc, &Metrics::new());
        let account = Account::of(&server.arrivals, Ipv4Addr::LOCALHOST.into());
        let calls = Calls::default();
        calls.begun.store(begun, Relaxed);
        calls.open.store(open, Relaxed);
        (0..refused).for_each(|_| calls.refused.note());
        let began = tokio::time::Instant::now();
        server.settle(&account, &calls, Ok(())).expect("it ended well");
        // As of then, so that it is not over, however long this takes.
        account.begins_at(began).map_or(Duration::ZERO, |begins_at| begins_at - began)
    };
    assert_eq!(charged(0, 0, 0), Duration::ZERO, "a probe");
    assert_eq!(charged(4, 2, 0), Duration::ZERO, "as many calls were for something");
    assert!(charged(3, 3, 0) >= FUTILE_COST);
    assert_eq!(charged(CALLS_LEFT_FREE, 0, CALLS_LEFT_FREE), Duration::ZERO, "a device that lost its network");
    assert!(charged(100, 0, CALLS_LEFT_FREE + 50) >= CALLS_APART * 50);
}

#[tokio::test]
async fn one_connection_carries_many_calls_at_once() {
    let gateway = Gateway::start(|_| ()).await;
    let client = gateway.live().await;
    let streams = futures_util::stream::iter(0..200).map(|_| {
        let mut client = client.clone();
        async move { client.follow(follow("")).await.expect("it begins").into_inner().count().await }
    });
    let messages: usize = streams.buffer_unordered(100).fold(0, async |sum, count| sum + count).await;
    assert_eq!((messages, gateway.value("tidegate_grpc_connections_total")), (200, 1.0));
}

#[tokio::test]
async fn a_client_that_takes_nothing_loses_its_call_and_keeps_its_connection() {
    let gateway = Gateway::start(|config| config.unread_timeout = Duration::from_millis(50)).await;
    let mut client = gateway.live().await;
    let mut unread = client.follow(follow("large")).await.expect("it begins").into_inner();
    eventually("the call is ended", || gateway.value("tidegate_grpc_requests_unread_total") == 1.0).await;
    eventually("its work is dropped", || gateway.services.at_work() == 0).await;
    // What had been sent before is there, and then the stream is reset.
    let end = async {
        loop {
            match unread.message().await {
                Ok(Some(_)) => {}
                end => return end,
            }
        }
    };
    soon("the end", end).await.expect_err("it was reset");
    client.follow(follow("")).await.expect("the connection is as good as before");
    assert_eq!(gateway.value("tidegate_grpc_connections_total"), 1.0);
}

#[tokio::test]
async fn a_call_that_waits_for_the_gateway_is_not_taken_for_unread() {
    let gateway = Gateway::start(|config| config.unread_timeout = Duration::from_millis(1)).await;
    let mut messages = gateway.live().await.follow(follow("hang")).await.expect("it begins").into_inner();
    soon("the first message", messages.message()).await.expect("well").expect("a message");
    tokio::time::timeout(Duration::from_millis(100), messages.message()).await.expect_err("it goes on");
    assert_eq!((gateway.services.at_work(), gateway.value("tidegate_grpc_requests_unread_total")), (1, 0.0));
}

#[tokio::test]
async fn a_connection_without_calls_is_closed_and_one_with_a_silent_call_is_not() {
    let gateway = Gateway::start(|config| config.idle_timeout = Duration::from_millis(50)).await;
    let mut messages = gateway.live().await.follow(follow("hang")).await.expect("it begins").into_inner();
    soon("the first message", messages.message()).await.expect("well").expect("a message");
    let mut idle = gateway.telemetry().await;
    idle.get_upload_position(position_of("")).await.expect("it answers");
    eventually("it is told to go", || gateway.value("tidegate_grpc_connections_ended_total{reason=\"idle\"}") == 1.0).await;
    eventually("it is closed", || gateway.value("tidegate_grpc_connections_open") == 1.0).await;
    assert_eq!(gateway.services.at_work(), 1);
}

#[tokio::test]
async fn an_old_connection_takes_no_new_calls_and_gives_the_open_ones_time() {
    let gateway = Gateway::start(|config| {
        config.connection_age_max = Duration::from_millis(50);
        config.connection_age_grace = Duration::from_millis(50);
    })
    .await;
    let mut messages = gateway.live().await.follow(follow("hang")).await.expect("it begins").into_inner();
    soon("the first message", messages.message()).await.expect("well").expect("a message");
    soon("the end", messages.message()).await.expect_err("the grace period is over, and it hangs on");
    eventually("its work is dropped", || gateway.services.at_work() == 0).await;
    assert!(gateway.value("tidegate_grpc_connections_ended_total{reason=\"age\"}") >= 1.0);
}
