//! Clients that are slow on purpose, and messages that are not what they say: nobody is waited for for ever, what they hold is given
//! back, and memory is bounded meanwhile.

use crate::support::{
    TestGateway,
    client::{TestDevice, nth_batch},
    eventually,
    h2_raw::{
        CANCEL, END_HEADERS, END_STREAM, INITIAL_WINDOW_SIZE, RawConnection, WINDOW_MAX, call, call_fields, connect, field, frame, kind,
        whole_call, window_update,
    },
    siege::Siege,
    soon,
};
use futures_util::future::join_all;
use prost::Message;
use std::{net::SocketAddr, time::Duration};
use tidegate::pb::telemetry_service_client::TelemetryServiceClient;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;

const UPLOAD: &str = "/tidegate.v1.TelemetryService/Upload";
const FOLLOW: &str = "/tidegate.v1.LiveService/Follow";
const QUERY: &str = "/tidegate.v1.ReadingService/QueryReadings";
const EXPORT: &str = "/tidegate.v1.ReadingService/ExportReadings";
const CONFIGURE: &str = "/tidegate.v1.ConfigService/Configure";
const REFLECT: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// The numbers of a client's first streams.
fn streams(count: u32) -> impl Iterator<Item = u32> + Clone {
    (0..count).map(|nth| 2 * nth + 1)
}

/// A connection, unless the gateway was too busy to take one in time.
async fn open(address: SocketAddr, values: &[(u16, u32)]) -> Option<RawConnection> {
    RawConnection::open(address, values).await.ok()
}

/// Sends all, and waits until each of its streams is answered or reset, or the connection ended.
async fn send_and_wait(connection: &mut RawConnection, bytes: &[u8], streams: usize) -> usize {
    let all = connection.read.until(|seen| seen.answered + seen.resets.len() == streams);
    let (_, seen) = tokio::join!(connection.write.write_all(bytes), all);
    seen.answered + seen.resets.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections() {
    let attack = |address: SocketAddr| async move {
        let silent = join_all((0..50).map(|_| async move {
            let Ok(mut stream) = connect(address).await else { return };
            assert_eq!(stream.read(&mut [0; 64]).await.unwrap_or(0), 0, "it is closed without a word");
        }));
        let begun = join_all((0..50).map(|_| async move {
            // It never answers a PING either.
            if let Some(mut connection) = open(address, &[]).await {
                connection.read.until_end().await;
            }
        }));
        tokio::join!(silent, begun);
    };
    Siege::start().await.withstands("half-open connections", attack).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_that_are_not_read() {
    let device = [&[0x0a, 12][..], b"well-behaved"].concat();
    let attack = move |address| {
        let device = device.clone();
        async move {
            let calls: Vec<u8> = streams(60)
                .zip([(FOLLOW, &b""[..]), (QUERY, &device), (EXPORT, b"")].into_iter().cycle())
                .flat_map(|(stream, (path, message))| whole_call(stream, path, message))
                .collect();
            let Some(mut connection) = open(address, &[(INITIAL_WINDOW_SIZE, 0)]).await else { return };
            // Queries wait for one another before they are refused.
            let all = connection.read.until(|seen| seen.answered + seen.resets.len() == 60);
            let (_, seen) = tokio::join!(connection.write.write_all(&calls), all);
            assert!(seen.resets.iter().all(|(_, code)| *code == CANCEL), "{seen:?}");
        }
    };
    Siege::start().await.withstands("responses that are not read", attack).await;
}

/// More than all buffers of both operating systems take, and a window that lets it be sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_not_read() {
    let mut siege = Siege::start().await;
    let question = [&[0x22, 23][..], b"tidegate.v1.LiveService"].concat();
    let ended = "tidegate_grpc_connections_ended_total{reason=\"unread\"}";
    let mut connection = open(siege.gateway.grpc, &[(INITIAL_WINDOW_SIZE, WINDOW_MAX)]).await.expect("it is idle");
    connection.write.write_all(&window_update(0, WINDOW_MAX - 65_535)).await.expect("it reads");
    let calls: Vec<u8> = streams(900).flat_map(|stream| whole_call(stream, REFLECT, &question)).collect();
    let asking = connection.write.write_all(&calls);
    let closing = eventually("it is closed", || async { siege.metric(ended).await.filter(|count| *count >= 1.0) });
    // Asking may be cut off by the end, which is what is waited for.
    tokio::join!(async { drop(soon("asked", asking).await) }, closing);
    siege.use_for(Duration::from_millis(100)).await;
}

/// The client has not heard of the end yet when it calls.
#[tokio::test]
async fn calls_that_begin_as_their_idle_connection_is_ended_are_served() {
    let gateway = TestGateway::start_with(|config| config.grpc.idle_timeout = Duration::from_millis(100)).await;
    let mut connection = open(gateway.grpc, &[]).await.expect("it is idle");
    let ended = "tidegate_grpc_connections_ended_total{reason=\"idle\"}";
    eventually("it is told to go", || async { gateway.metric(ended).await.filter(|count| *count >= 1.0) }).await;
    let devices: Vec<TestDevice> = (0..5).map(|nth| TestDevice::new(&gateway.channel(), &format!("belated-{nth}"))).collect();
    let calls =
        streams(5).zip(&devices).map(|(stream, device)| whole_call(stream, UPLOAD, &device.request(1, nth_batch(1)).encode_to_vec()));
    connection.write.write_all(&calls.collect::<Vec<_>>().concat()).await.expect("it is open");
    soon("the answers", connection.read.until(|seen| seen.answered == 5)).await;
    for device in devices {
        assert_eq!(device.ledger().await.stored.expect("set").batches, 1);
    }
}

/// Nobody has to be cut off who is told in time.
#[tokio::test]
async fn an_upload_on_an_old_connection_is_answered_with_what_is_durable() {
    let gateway = TestGateway::start_with(|config| {
        config.grpc.connection_age_max = Duration::from_millis(100);
        config.grpc.connection_age_grace = Duration::from_secs(6);
    })
    .await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let (more, requests) = mpsc::channel(1);
    more.send(device.request(1, nth_batch(1))).await.expect("there is room");
    let response = soon("the answer", TelemetryServiceClient::new(gateway.channel()).upload(ReceiverStream::new(requests))).await;
    assert_eq!(response.expect("answered").into_inner().last_durable_sequence, 1);
    drop(more);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_at_a_time() {
    let attack = |address| async move {
        let Some(RawConnection { mut write, mut read }) = open(address, &[]).await else { return };
        let calls: Vec<u8> =
            streams(50).flat_map(|stream| [call(stream, UPLOAD), frame(kind::DATA, 0, stream, &[0, 0, 1, 0, 0])].concat()).collect();
        let bytes: Vec<u8> = streams(50).flat_map(|stream| frame(kind::DATA, 0, stream, &[0])).collect();
        let dripping = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(50));
            let mut going = write.write_all(&calls).await.is_ok();
            while going {
                ticks.tick().await;
                going = write.write_all(&bytes).await.is_ok();
            }
            std::future::pending::<()>().await
        };
        tokio::select! {
            _ = read.until(|seen| seen.answered == 50) => {}
            () = dripping => {}
        }
    };
    Siege::start().await.withstands("a byte at a time", attack).await;
}

/// What a message's prefix announces is not believed before it comes.
#[tokio::test(flavor = "multi_thread")]
async fn lengths_that_lie() {
    let attack = |address| async move {
        let Some(mut connection) = open(address, &[]).await else { return };
        // A megabyte, 4 GiB, and a flag that there is not, by turns; and an end amid the message.
        let prefixes = [([0, 0, 0x10, 0, 0], 0), ([0, 0xff, 0xff, 0xff, 0xff], 0), ([9, 0, 0, 0, 1], 0), ([0, 0, 0, 0, 9], END_STREAM)];
        let calls: Vec<u8> = streams(100)
            .zip(prefixes.into_iter().cycle())
            .flat_map(|(stream, (prefix, flags))| [call(stream, UPLOAD), frame(kind::DATA, flags, stream, &prefix)].concat())
            .collect();
        send_and_wait(&mut connection, &calls, 100).await;
    };
    Siege::start().await.withstands("lengths that lie", attack).await;
}

/// A value in a list in a value in a list …: deeper than any stack.
#[tokio::test(flavor = "multi_thread")]
async fn deeply_nested_messages() {
    let mut message: Vec<u8> = vec![];
    for key in [0x0a, 0x32].into_iter().cycle().take(4_000) {
        // From the inside out, reversed: the bytes of the inner message, its length, its key.
        let mut length = Vec::new();
        prost::encoding::encode_varint(message.len() as u64, &mut length);
        message.extend(length.iter().rev());
        message.push(key);
    }
    message.reverse();
    // ConfigureRequest.set.config.fields[""]
    for key in [0x12, 0x0a, 0x22, 0x0a] {
        let mut outer = vec![key];
        prost::encoding::encode_varint(message.len() as u64, &mut outer);
        outer.append(&mut message);
        message = outer;
    }
    let attack = move |address| {
        let calls: Vec<u8> = streams(4).flat_map(|stream| whole_call(stream, CONFIGURE, &message)).collect();
        async move {
            let Some(mut connection) = open(address, &[]).await else { return };
            let answered = send_and_wait(&mut connection, &calls, 4).await;
            assert_eq!(answered, 4, "each is refused by itself");
        }
    };
    Siege::start().await.withstands("deeply nested messages", attack).await;
}

/// The gateway takes nothing that is compressed: so there is no bomb.
#[tokio::test(flavor = "multi_thread")]
async fn compressed_messages() {
    let mut siege = Siege::start().await;
    let unimplemented = "tidegate_grpc_requests_total{method=\"tidegate.v1.TelemetryService/Upload\",code=\"UNIMPLEMENTED\"}";
    let mut connection = open(siege.gateway.grpc, &[]).await.expect("it is idle");
    let headers = [call_fields(UPLOAD), field("grpc-encoding", "gzip")].concat();
    let calls: Vec<u8> = streams(100)
        .flat_map(|stream| {
            [frame(kind::HEADERS, END_HEADERS, stream, &headers), frame(kind::DATA, 0, stream, &[1, 0, 0, 0, 1, 0])].concat()
        })
        .collect();
    let answered = soon("all are answered", send_and_wait(&mut connection, &calls, 100)).await;
    assert_eq!(answered, 100);
    // A call is counted when its answer is gone, which the client may have by then.
    eventually("each is counted", || async { siege.metric(unimplemented).await.filter(|calls| *calls == 100.0) }).await;
    siege.use_for(Duration::from_millis(100)).await;
}
