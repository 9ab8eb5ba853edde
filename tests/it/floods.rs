//! Floods and malformed HTTP/2, frame by frame: each attacker's connection is ended with the right code, memory stays where it
//! was, and who behaves well notices nothing.

use crate::support::{
    TestGateway,
    h2_raw::{
        self, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, Ending, RawConnection, WINDOW_MAX, call, call_fields, field, frame, kind, ping,
        reset, settings, whole_call, window_update,
    },
    siege::Siege,
    soon,
};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::io::AsyncWriteExt;

const UPLOAD: &str = "/tidegate.v1.TelemetryService/Upload";
const FOLLOW: &str = "/tidegate.v1.LiveService/Follow";

async fn open(address: SocketAddr) -> RawConnection {
    loop {
        // A gateway that is busy may find that the preface came too late.
        if let Ok(connection) = RawConnection::open(address, &[]).await {
            return connection;
        }
    }
}

/// The number of a client's `nth` stream.
fn stream(nth: u32) -> u32 {
    2 * nth + 1
}

/// Told to calm down. A GOAWAY can be lost where the attacker left no room for it, but then the connection ends as well.
fn assert_calmed(ending: &Ending) {
    assert!(matches!(ending.goaway, Some(ENHANCE_YOUR_CALM) | None), "{ending:?}");
}

async fn flood(address: SocketAddr, begin: Vec<u8>, bytes: Vec<u8>) {
    let mut connection = open(address).await;
    connection.write.write_all(&begin).await.expect("it reads");
    assert_calmed(&connection.flood(&bytes).await);
}

/// That the code is told is not left to the floods, whose attackers may lose it.
#[tokio::test]
async fn who_floods_is_told_why_it_ends() {
    let siege = Siege::start().await;
    let mut connection = open(siege.gateway.grpc).await;
    // The end may come while there is more to send.
    let pings = ping().repeat(50_000);
    let (_, ending) = tokio::join!(connection.write.write_all(&pings), connection.read.until_end());
    assert_eq!(ending, Ending { goaway: Some(ENHANCE_YOUR_CALM), ..Ending::default() });
    assert_eq!(siege.metric("tidegate_grpc_connections_ended_total{reason=\"flood\"}").await, Some(1.0));
}

/// Scenario: a client sends at once what it may send in four seconds, and a call behind it. Guarantee: it is answered all of it.
#[tokio::test]
async fn a_burst_is_held_back_and_nothing_of_it_is_lost() {
    const PINGS: usize = 4_000;
    let gateway = TestGateway::start_with(|config| config.grpc.control_frames_per_second_max = PINGS as u32 / 4).await;
    let mut connection = open(gateway.grpc).await;
    let burst = [ping().repeat(PINGS), whole_call(1, FOLLOW, b"")].concat();
    let began = Instant::now();
    let answers = async {
        let (mut pongs, mut answered) = (0, false);
        while pongs < PINGS || !answered {
            match connection.read.next().await.expect("it goes on") {
                (kind::PING, ..) => pongs += 1,
                (kind::HEADERS, ..) => answered = true,
                (kind::GOAWAY, ..) => panic!("it is ended"),
                _ => {}
            }
        }
    };
    let (written, ()) = tokio::join!(connection.write.write_all(&burst), soon("all is answered", answers));
    written.expect("it reads");
    // Two seconds' worth are free.
    assert!(began.elapsed() > Duration::from_millis(1_500), "it was not held back");
}

#[tokio::test(flavor = "multi_thread")]
async fn pings() {
    Siege::start().await.withstands("PING", |address| flood(address, vec![], ping())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_frames() {
    Siege::start().await.withstands("SETTINGS", |address| flood(address, vec![], settings(&[(h2_raw::INITIAL_WINDOW_SIZE, 65_535)]))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn priorities() {
    let priority = frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 3, 16]);
    Siege::start().await.withstands("PRIORITY", move |address| flood(address, vec![], priority.clone())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn window_updates() {
    Siege::start().await.withstands("WINDOW_UPDATE", |address| flood(address, vec![], window_update(0, 1))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_frames() {
    Siege::start().await.withstands("unknown frames", |address| flood(address, vec![], frame(0xfa, 0, 0, b""))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_data() {
    let attack = |address| flood(address, call(1, UPLOAD), frame(kind::DATA, 0, 1, b""));
    Siege::start().await.withstands("empty DATA", attack).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn continuations_without_end() {
    let begin = frame(kind::HEADERS, END_STREAM, 1, &call_fields(UPLOAD));
    let more = frame(kind::CONTINUATION, 0, 1, &field("x", "y"));
    Siege::start().await.withstands("CONTINUATION", move |address| flood(address, begin.clone(), more.clone())).await;
}

/// CVE-2023-44487.
#[tokio::test(flavor = "multi_thread")]
async fn rapid_reset() {
    let attack = |address| async move {
        let streams: Vec<u8> = (0..20_000).flat_map(|nth| [call(stream(nth), FOLLOW), reset(stream(nth))].concat()).collect();
        let mut connection = open(address).await;
        let (_, ending) = tokio::join!(connection.write.write_all(&streams), connection.read.until_end());
        assert_calmed(&ending);
    };
    Siege::start().await.withstands("rapid reset", attack).await;
}

/// The same with calls that have begun to be answered, which the HTTP/2 implementation takes for well-behaved. So it is, up to the
/// rate that is allowed: on a slow machine that is not reached, and the client stops after a while.
#[tokio::test(flavor = "multi_thread")]
async fn reset_of_answered_calls() {
    const AT_ONCE: u32 = 100;
    let attack = |address| async move {
        let (mut connection, began) = (open(address).await, Instant::now());
        for begun in (0..15_000).step_by(AT_ONCE as usize) {
            if began.elapsed() > Duration::from_secs(10) {
                return;
            }
            let streams = || (begun..begun + AT_ONCE).map(stream);
            let calls: Vec<u8> = streams().flat_map(|stream| whole_call(stream, FOLLOW, b"")).collect();
            let resets: Vec<u8> = streams().flat_map(reset).collect();
            if connection.write.write_all(&calls).await.is_err() {
                return;
            }
            let mut answered = 0;
            while answered < AT_ONCE {
                match connection.read.next().await {
                    Ok((kind::HEADERS, ..)) => answered += 1,
                    Ok((kind::GOAWAY, _, _, payload)) => return assert_eq!(payload[4..8], ENHANCE_YOUR_CALM.to_be_bytes()),
                    Ok(_) => {}
                    Err(_) => return,
                }
            }
            if connection.write.write_all(&resets).await.is_err() {
                return;
            }
        }
    };
    Siege::start().await.withstands("reset of answered calls", attack).await;
}

/// CVE-2025-8671: what the client sends makes the gateway itself reset its streams.
#[tokio::test(flavor = "multi_thread")]
async fn resets_that_the_gateway_is_driven_to() {
    let attack = |address| async move {
        let streams: Vec<u8> =
            (0..20_000).flat_map(|nth| [whole_call(stream(nth), FOLLOW, b""), window_update(stream(nth), WINDOW_MAX)].concat()).collect();
        let mut connection = open(address).await;
        let (_, ending) = tokio::join!(connection.write.write_all(&streams), connection.read.until_end());
        assert_calmed(&ending);
    };
    Siege::start().await.withstands("server-side resets", attack).await;
}

/// More than the metadata of a call may be: each call is refused by itself, and the connection goes on.
#[tokio::test(flavor = "multi_thread")]
async fn huge_headers() {
    let attack = |address| async move {
        let mut connection = open(address).await;
        let value = "v".repeat(3_000);
        for nth in 0..200 {
            let mut block = call_fields(UPLOAD);
            (0..6).for_each(|_| block.extend(field("x", &value)));
            let (first, rest) = block.split_at(16_000);
            let begin = frame(kind::HEADERS, END_STREAM, stream(nth), first);
            let call = [begin, frame(kind::CONTINUATION, END_HEADERS, stream(nth), rest)].concat();
            // Ended, if there are too many.
            if connection.write.write_all(&call).await.is_err() {
                break;
            }
        }
        drop(connection.write);
        let ending = connection.read.until(|ending| ending.answered + ending.resets.len() == 200).await;
        assert!(ending.answered > 0 || ending.goaway.is_some() || !ending.resets.is_empty(), "{ending:?}");
    };
    Siege::start().await.withstands("huge headers", attack).await;
}

/// A field line of a byte on the wire that stands for one of 4 kB in the table (RFC 7541 section 7.3), thousands of times a call.
#[tokio::test(flavor = "multi_thread")]
async fn header_bombs() {
    let attack = |address| async move {
        let mut connection = open(address).await;
        // A literal with incremental indexing becomes entry 62, the first of the dynamic table.
        let mut entry = field("x", &"v".repeat(3_900));
        entry[0] = 0x40;
        let mut block = [call_fields(UPLOAD), entry].concat();
        block.resize(16_000, 0x80 | 62);
        let mut bombs = Vec::new();
        for nth in 0..200 {
            bombs.extend(frame(kind::HEADERS, END_STREAM | END_HEADERS, stream(nth), &block));
        }
        let (_, ending) =
            tokio::join!(connection.write.write_all(&bombs), connection.read.until(|ending| ending.answered + ending.resets.len() == 200));
        assert!(ending.goaway.is_some() || ending.answered + ending.resets.len() == 200, "{ending:?}");
    };
    Siege::start().await.withstands("header bombs", attack).await;
}
