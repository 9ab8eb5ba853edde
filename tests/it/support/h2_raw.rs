//! HTTP/2 by hand (RFC 9113): frames that no well-behaved client would send.

use socket2::{SockRef, TcpKeepalive};
use std::{io, net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

/// Types of frames.
pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// Flags of frames.
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// Error codes.
pub const CANCEL: u32 = 8;
pub const ENHANCE_YOUR_CALM: u32 = 11;

/// The settings that say how much may be sent ahead on a stream.
pub const INITIAL_WINDOW_SIZE: u16 = 4;

/// The largest window that there is.
pub const WINDOW_MAX: u32 = (1 << 31) - 1;

/// An encoded frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

pub fn settings(values: &[(u16, u32)]) -> Vec<u8> {
    let payload: Vec<u8> = values.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
    frame(kind::SETTINGS, 0, 0, &payload)
}

pub fn ping() -> Vec<u8> {
    frame(kind::PING, 0, 0, b"tidegate")
}

pub fn reset(stream: u32) -> Vec<u8> {
    frame(kind::RST_STREAM, 0, stream, &CANCEL.to_be_bytes())
}

pub fn window_update(stream: u32, increment: u32) -> Vec<u8> {
    frame(kind::WINDOW_UPDATE, 0, stream, &increment.to_be_bytes())
}

/// A field line as a literal that is not indexed (RFC 7541 section 6.2.2). Both are shorter than 2^14 bytes.
pub fn field(name: &str, value: &str) -> Vec<u8> {
    let mut line = vec![0];
    for text in [name, value] {
        // A 7-bit prefix integer; without Huffman coding.
        match text.len() {
            short @ ..127 => line.push(short as u8),
            long => line.extend([127, (long - 127) as u8 | 0x80, ((long - 127) >> 7) as u8]),
        }
        line.extend(text.as_bytes());
    }
    line
}

/// The field lines of a call.
pub fn call_fields(path: &str) -> Vec<u8> {
    let fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test"), ("te", "trailers")];
    let mut block: Vec<u8> = fields.iter().flat_map(|(name, value)| field(name, value)).collect();
    block.extend(field("content-type", "application/grpc"));
    block
}

/// The HEADERS that begin a call.
pub fn call(stream: u32, path: &str) -> Vec<u8> {
    frame(kind::HEADERS, END_HEADERS, stream, &call_fields(path))
}

/// The HEADERS and the DATA of a call with one message.
pub fn whole_call(stream: u32, path: &str, message: &[u8]) -> Vec<u8> {
    let mut body = vec![0];
    body.extend((message.len() as u32).to_be_bytes());
    body.extend(message);
    [call(stream, path), frame(kind::DATA, END_STREAM, stream, &body)].concat()
}

/// What the gateway sent on a connection until it ended, as far as tests look at it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Ending {
    /// The code of the last GOAWAY.
    pub goaway: Option<u32>,
    /// The codes of RST_STREAM, by stream.
    pub resets: Vec<(u32, u32)>,
    /// Streams that were answered to their end.
    pub answered: usize,
}

/// A connection on which nothing is sent yet.
///
/// One that the gateway's operating system forgot, as the queue was full at the last step of the handshake, is found out by probes:
/// who only reads would wait for its end for ever.
pub async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    let second = Duration::from_secs(1);
    SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(second).with_interval(second))?;
    Ok(stream)
}

/// A connection whose preface and SETTINGS are sent.
pub struct RawConnection {
    pub write: OwnedWriteHalf,
    pub read: RawReader,
}

impl RawConnection {
    pub async fn open(address: SocketAddr, values: &[(u16, u32)]) -> io::Result<Self> {
        let stream = connect(address).await?;
        stream.set_nodelay(true)?;
        let (read, mut write) = stream.into_split();
        write.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        write.write_all(&settings(values)).await?;
        Ok(Self { write, read: RawReader(BufReader::new(read)) })
    }

    /// Sends the same again and again, and reads, until the gateway ends the connection.
    pub async fn flood(mut self, bytes: &[u8]) -> Ending {
        let flood = bytes.repeat((16_384 / bytes.len()).max(1));
        let sending = async {
            // An error says that the connection has ended, which the reader sees, too.
            while self.write.write_all(&flood).await.is_ok() {}
            std::future::pending::<()>().await
        };
        tokio::select! {
            ending = self.read.until_end() => ending,
            () = sending => unreachable!("it pends"),
        }
    }
}

/// The frames that the gateway sends.
pub struct RawReader(BufReader<OwnedReadHalf>);

impl RawReader {
    /// The next frame: type, flags, stream, payload.
    pub async fn next(&mut self) -> io::Result<(u8, u8, u32, Vec<u8>)> {
        let mut header = [0; 9];
        self.0.read_exact(&mut header).await?;
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = header;
        let mut payload = vec![0; u32::from_be_bytes([0, l0, l1, l2]) as usize];
        self.0.read_exact(&mut payload).await?;
        Ok((kind, flags, u32::from_be_bytes([s0, s1, s2, s3]), payload))
    }

    /// Reads on until the connection ends.
    pub async fn until_end(&mut self) -> Ending {
        self.until(|_| false).await
    }

    /// Reads on until what came is enough, or the connection ends.
    pub async fn until(&mut self, enough: impl Fn(&Ending) -> bool) -> Ending {
        let mut ending = Ending::default();
        while !enough(&ending) {
            let Ok((kind, flags, stream, payload)) = self.next().await else { break };
            let code = |at: usize| payload.get(at..at + 4).and_then(|code| code.try_into().ok()).map(u32::from_be_bytes);
            match kind {
                kind::GOAWAY => ending.goaway = code(4),
                kind::RST_STREAM => ending.resets.extend(code(0).map(|code| (stream, code))),
                kind::HEADERS | kind::DATA if flags & END_STREAM != 0 => ending.answered += 1,
                _ => {}
            }
        }
        ending
    }
}
