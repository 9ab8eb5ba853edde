//! Ends connections that are used to wear the gateway out, which the HTTP/2 implementation alone would put up with.
//!
//! Two things end it, and are watched for at the price of a look at each frame's header:
//! - PING, SETTINGS, WINDOW_UPDATE, PRIORITY, RST_STREAM, empty DATA and unknown frames make work and carry nothing, and so does
//!   more metadata than a call needs. A few are part of every connection, and clients answer what they are sent with some. A client
//!   that sends many more is not read from until its [rate](ControlRate) is free again, so that a flood waits where it comes from;
//!   one that goes on all the same gets a GOAWAY with ENHANCE_YOUR_CALM (RFC 9113 section 10.5). Were it ended at once, it would
//!   come again at once.
//! - A client whose operating system takes nothing more of what is sent would be waited for until its own end.
//!
//! Calls that are reset are dear besides: a frame or two begin one, and it costs some hundred times what they do. A client may have many,
//! all at once. So for a while behind each the next calls come apart, and others have their turn between them. That goes for those that the gateway resets,
//! too, but not where nothing is wrong (NO_ERROR): so it ends an upload that it answers before the client is done.
//!
//! Besides, a connection that ends at a drain, for its age or for being idle waits behind its last byte for a while until the client
//! closes, too.
//! Closed at once, with something unread in it, it would be reset, and a client that gives back a window at that moment would lose the end
//! of its responses (RFC 1122 section 4.2.2.13).

use super::{
    arrivals::{Account, FUTILE_COST},
    control_rate::{ControlLimits, ControlRate, Flood, units_of},
    frames::{FrameHeader, FrameScanner},
};
use crate::middleware::Patience;
use metrics::Counter;
use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

/// The client connection preface (RFC 9113 section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The error code of RFC 9113 section 7.
const ENHANCE_YOUR_CALM: u8 = 11;

/// How far calls come apart, on average: so that even with all its calls reset a connection has them at no more than five hundred a second.
pub const CALLS_APART: Duration = Duration::from_millis(2);
/// For how long they do behind each that was reset: who has half of all its calls reset is slowed all the time.
const APART_FOR: Duration = Duration::from_millis(4);
/// And behind any number of them: nobody is slowed for long behind the last one.
const APART_FOR_MAX: Duration = Duration::from_millis(500);
/// How much is read at once meanwhile. There are but a few calls in it.
const SHORT_READ_BYTES: usize = 512;

/// How long a connection whose end was sent waits for the client to close. What comes meanwhile is thrown away.
pub const LINGER: Duration = Duration::from_secs(1);

/// What a connection may do.
pub struct IoLimits {
    /// How many control frames a client may send, beside those that answer DATA.
    pub control: ControlLimits,
    /// How long a client may take nothing of what is sent.
    pub unread_timeout: Duration,
    /// Counts connections that were ended for too many control frames.
    pub flooding: Counter,
    /// Counts connections that were ended for not being read.
    pub unread: Counter,
}

/// A connection whose client has begun to speak HTTP/2; see the [module](self).
pub struct GuardedIo<T> {
    inner: T,
    limits: Arc<IoLimits>,
    account: Account,
    /// How much of the preface, which was read to get here, is still to be shown.
    preface_bytes: u8,
    inbound: FrameScanner,
    outbound: FrameScanner,
    control: ControlRate,
    last_stream: u32,
    // Until when calls come apart.
    apart_until: Option<Instant>,
    patience: Patience,
    // Cancelled when the gateway has the connection end in good order.
    ending: Option<CancellationToken>,
    // Whether the end was sent, and the client has yet to close.
    lingers: bool,
}

impl<T: AsyncRead + AsyncWrite + Unpin> GuardedIo<T> {
    /// Waits for the client connection preface.
    ///
    /// hyper's keepalive begins behind the preface: to wait for it here lets the caller limit how long.
    pub async fn accept(mut inner: T, limits: Arc<IoLimits>, account: Account) -> io::Result<Self> {
        let mut preface = [0; PREFACE.len()];
        inner.read_exact(&mut preface).await?;
        if preface != *PREFACE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self {
            inner,
            limits,
            account,
            preface_bytes: PREFACE.len() as u8,
            inbound: FrameScanner::default(),
            outbound: FrameScanner::default(),
            control: ControlRate::new(),
            last_stream: 0,
            apart_until: None,
            patience: Patience::default(),
            ending: None,
            lingers: false,
        })
    }

    /// Behind its end it waits for the client to close, if that comes once `ending` is cancelled.
    pub fn linger_when(&mut self, ending: CancellationToken) {
        self.ending = Some(ending);
    }

    fn show_preface(&mut self, buf: &mut ReadBuf<'_>) {
        let left = &PREFACE[PREFACE.len() - usize::from(self.preface_bytes)..];
        let shown = left.len().min(buf.remaining());
        buf.put_slice(&left[..shown]);
        self.preface_bytes -= shown as u8;
    }

    fn poll_inner(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.apart_until = self.apart_until.filter(|until| Instant::now() < *until);
        if self.apart_until.is_none() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let bytes = SHORT_READ_BYTES.min(buf.remaining());
        let mut short = ReadBuf::new(buf.initialize_unfilled_to(bytes));
        ready!(Pin::new(&mut self.inner).poll_read(cx, &mut short))?;
        let read = short.filled().len();
        buf.advance(read);
        Poll::Ready(Ok(()))
    }

    /// Looks at what the client sends.
    fn note_received(&mut self, bytes: &[u8]) -> Result<(), Flood> {
        let (mut units, mut calls, mut resets, last_stream) = (0, 0, 0, &mut self.last_stream);
        self.inbound.feed(bytes, |frame| {
            match frame.kind {
                FrameHeader::HEADERS => {
                    *last_stream = frame.stream.max(*last_stream);
                    calls += 1;
                }
                FrameHeader::RST_STREAM => resets += 1,
                _ => {}
            }
            units += units_of(frame);
        });
        self.control.take(units, &self.limits.control)?;
        if calls > 0 && self.apart_until.is_some() {
            self.control.hold_for(CALLS_APART * calls);
        }
        self.note_resets(resets);
        Ok(())
    }

    fn note_resets(&mut self, resets: u32) {
        if resets > 0 {
            let now = Instant::now();
            let until = self.apart_until.map_or(now, |until| until.max(now)) + APART_FOR * resets;
            self.apart_until = Some(until.min(now + APART_FOR_MAX));
        }
    }

    /// Looks at what was sent to the client, which is the first `count` bytes of these pieces.
    fn note_sent(&mut self, pieces: &[IoSlice<'_>], mut count: usize) {
        let (mut data_frames, mut resets) = (0, 0);
        for piece in pieces {
            let sent = &piece[..piece.len().min(count)];
            count -= sent.len();
            self.outbound.feed(sent, |frame| match frame.kind {
                FrameHeader::DATA => data_frames += 1,
                FrameHeader::RST_STREAM => resets += u32::from(frame.error_code != FrameHeader::NO_ERROR),
                _ => {}
            });
        }
        self.note_resets(resets);
        self.control.allow_answers_to(data_frames, &self.limits.control);
    }

    /// Tells the client why its connection ends, if there is room for it: who floods and does not read is not waited for.
    fn say_goaway(&mut self, cx: &mut Context<'_>) {
        if self.outbound.is_between_frames() {
            let [s0, s1, s2, s3] = self.last_stream.to_be_bytes();
            let frame = [0, 0, 8, FrameHeader::GOAWAY, 0, 0, 0, 0, 0, s0, s1, s2, s3, 0, 0, 0, ENHANCE_YOUR_CALM];
            let _ = Pin::new(&mut self.inner).poll_write(cx, &frame);
            let _ = Pin::new(&mut self.inner).poll_flush(cx);
        }
    }

    /// Waits for the client to close.
    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut bytes = [0; 4 << 10];
        while self.patience.poll_exhausted(LINGER, cx).is_pending() {
            let mut buf = ReadBuf::new(&mut bytes);
            let read = ready!(Pin::new(&mut self.inner).poll_read(cx, &mut buf));
            if read.is_err() || buf.filled().is_empty() {
                break;
            }
        }
        Poll::Ready(())
    }

    /// What writing came to, unless it has taken too long.
    fn with_patience<R>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if written.is_ready() {
            return written;
        }
        ready!(self.patience.poll_exhausted(self.limits.unread_timeout, cx));
        self.limits.unread.increment(1);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for GuardedIo<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.preface_bytes > 0 {
            this.show_preface(buf);
            return Poll::Ready(Ok(()));
        }
        ready!(this.control.poll_free(cx));
        let before = buf.filled().len();
        ready!(this.poll_inner(cx, buf))?;
        if this.note_received(&buf.filled()[before..]).is_err() {
            buf.set_filled(before);
            this.limits.flooding.increment(1);
            this.account.charge(FUTILE_COST);
            this.say_goaway(cx);
            return Poll::Ready(Err(io::Error::other("too many control frames")));
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for GuardedIo<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.inner).poll_write_vectored(cx, pieces);
        if let Poll::Ready(Ok(count)) = written {
            this.note_sent(pieces, count);
            this.patience.renew();
        }
        this.with_patience(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.inner).poll_flush(cx);
        this.with_patience(cx, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.lingers {
            let shut = Pin::new(&mut this.inner).poll_shutdown(cx);
            ready!(this.with_patience(cx, shut))?;
            if !this.ending.as_ref().is_some_and(CancellationToken::is_cancelled) {
                return Poll::Ready(Ok(()));
            }
            this.lingers = true;
            this.patience = Patience::default();
        }
        this.poll_closed(cx).map(Ok)
    }
}

impl<T> Drop for GuardedIo<T> {
    fn drop(&mut self) {
        // Else who resets calls would come again at once, without a past. As much as for calls that are left open.
        if let Some(until) = self.apart_until {
            let calls = until.saturating_duration_since(Instant::now()).div_duration_f64(APART_FOR);
            self.account.charge(CALLS_APART.mul_f64(calls));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::net::Ipv4Addr;
    use tokio::{
        io::{AsyncWriteExt, DuplexStream, duplex},
        net::{TcpListener, TcpStream},
        time::timeout,
    };

    const CALLS: u32 = 30;
    const CALL_BYTES: usize = 100;
    const CANCEL: u32 = 8;

    fn frame(kind: u8, stream: u32, bytes: usize) -> Vec<u8> {
        let payload = bytes - 9;
        let mut frame = vec![0, 0, payload as u8, kind, 0];
        frame.extend(stream.to_be_bytes());
        frame.resize(bytes, 0);
        frame
    }

    fn calls() -> Vec<u8> {
        (0..CALLS).flat_map(|nth| frame(FrameHeader::HEADERS, 2 * nth + 1, CALL_BYTES)).collect()
    }

    fn reset(error_code: u32) -> Vec<u8> {
        let mut reset = frame(FrameHeader::RST_STREAM, 1, 13);
        reset[9..].copy_from_slice(&error_code.to_be_bytes());
        reset
    }

    fn limits() -> IoLimits {
        IoLimits {
            control: ControlLimits { units_per_second_max: 1_000, held_max: Duration::from_secs(10) },
            unread_timeout: Duration::from_secs(60),
            flooding: Counter::noop(),
            unread: Counter::noop(),
        }
    }

    fn account() -> Account {
        Account::of(&Arc::default(), Ipv4Addr::LOCALHOST.into())
    }

    /// Of a client that has sent these frames.
    async fn connection(frames: &[u8]) -> (DuplexStream, GuardedIo<DuplexStream>) {
        let (mut client, gateway) = duplex(64 << 10);
        client.write_all(&[PREFACE, frames].concat()).await.expect("there is room");
        let mut connection = GuardedIo::accept(gateway, Arc::new(limits()), account()).await.expect("it is HTTP/2");
        connection.read_exact(&mut [0; PREFACE.len()]).await.expect("shown once more");
        (client, connection)
    }

    /// How long it takes to read all calls.
    async fn read_calls(connection: &mut GuardedIo<DuplexStream>) -> Duration {
        let (began, mut read) = (Instant::now(), vec![0; calls().len()]);
        connection.read_exact(&mut read).await.expect("all");
        assert_eq!(read, calls());
        began.elapsed()
    }

    #[tokio::test]
    async fn calls_come_as_they_are_sent() {
        let (_client, mut connection) = connection(&calls()).await;
        read_calls(&mut connection).now_or_never().expect("at once");
    }

    #[tokio::test]
    async fn behind_calls_that_were_reset_others_come_apart() {
        let resets = reset(CANCEL).repeat(100);
        let (_client, mut connection) = connection(&[resets.clone(), calls()].concat()).await;
        connection.read_exact(&mut vec![0; resets.len()]).await.expect("the resets");
        // Nobody is held behind the last of them.
        assert!(read_calls(&mut connection).await >= CALLS_APART * (CALLS - (SHORT_READ_BYTES / CALL_BYTES) as u32 - 1));
    }

    #[tokio::test]
    async fn the_next_connection_goes_on_where_this_one_ended() {
        let (_client, mut connection) = connection(&[]).await;
        connection.note_resets(100);
        let (account, now) = (connection.account.clone(), Instant::now());
        assert_eq!(account.begins_at(now), None);
        drop(connection);
        assert!(account.begins_at(now).is_some());
    }

    #[tokio::test]
    async fn not_for_long() {
        let (_client, mut connection) = connection(&calls()).await;
        connection.note_resets(u32::from(u16::MAX));
        assert!(connection.apart_until.expect("for a while") <= Instant::now() + APART_FOR_MAX);
        connection.apart_until = Some(Instant::now());
        read_calls(&mut connection).now_or_never().expect("at once");
    }

    #[tokio::test]
    async fn calls_that_the_gateway_resets_count_where_something_is_wrong() {
        let (_client, mut connection) = connection(&[]).await;
        connection.write_all(&reset(FrameHeader::NO_ERROR)).await.expect("sent");
        assert_eq!(connection.apart_until, None);
        connection.write_all(&reset(CANCEL)).await.expect("sent");
        assert!(connection.apart_until.is_some());
    }

    /// A connection over TCP, whose client has sent something that nobody has read.
    async fn connection_over_tcp() -> (TcpStream, GuardedIo<TcpStream>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let mut client = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("it listens");
        client.write_all(&[PREFACE, &frame(0, 1, 100)[..]].concat()).await.expect("there is room");
        let (gateway, _) = listener.accept().await.expect("connected");
        (client, GuardedIo::accept(gateway, Arc::new(limits()), account()).await.expect("it is HTTP/2"))
    }

    fn cancelled() -> CancellationToken {
        let token = CancellationToken::new();
        token.cancel();
        token
    }

    #[tokio::test]
    async fn the_last_bytes_arrive_though_the_client_sends_until_then() {
        let (mut client, mut connection) = connection_over_tcp().await;
        connection.linger_when(cancelled());
        let end = tokio::spawn(async move {
            connection.write_all(b"the end").await?;
            connection.shutdown().await
        });
        let mut read = Vec::new();
        client.read_to_end(&mut read).await.expect("no reset");
        assert_eq!(read, b"the end");
        client.write_all(b"what it gives back").await.expect("no reset");
        assert!(!end.is_finished(), "the client has not closed");
        drop(client);
        end.await.expect("no panic").expect("ended");
    }

    #[tokio::test]
    async fn a_client_that_does_not_close_is_not_waited_for_for_long() {
        for sends_on in [false, true] {
            let (mut client, mut connection) = connection(&[]).await;
            connection.linger_when(cancelled());
            let client = tokio::spawn(async move {
                while sends_on && client.write_all(&[0; 1 << 10]).await.is_ok() {}
                client
            });
            let sent = Instant::now();
            timeout(Duration::from_secs(60), connection.shutdown()).await.expect("in time").expect("ended");
            assert!(sent.elapsed() >= LINGER);
            drop(connection);
            client.await.expect("no panic");
        }
    }

    #[tokio::test]
    async fn any_other_end_waits_for_nobody() {
        let (_client, mut connection) = connection(&[]).await;
        connection.linger_when(CancellationToken::new());
        connection.shutdown().now_or_never().expect("at once").expect("ended");
    }
}
