//! Ends connections that are used to wear the gateway out, which the HTTP/2 implementation alone would put up with.
//!
//! Three things are watched, at the price of a look at each frame's header:
//! - PING, SETTINGS, WINDOW_UPDATE, PRIORITY, RST_STREAM, empty DATA and unknown frames make work and carry nothing, and so does
//!   more metadata than a call needs. A few are part of every connection, and clients answer what they are sent with some. A client
//!   that sends many more is not read from until its [rate](ControlRate) is free again, so that a flood waits where it comes from;
//!   one that goes on all the same gets a GOAWAY with ENHANCE_YOUR_CALM (RFC 9113 section 10.5). Were it ended at once, it would
//!   come again at once.
//! - Calls that end by RST_STREAM, whoever sent it, are dear: a frame or two begin one, and it costs some hundred times what they do.
//!   A client may have many, and all at once. So behind each the next few calls come a little apart, and others have their turn between them.
//! - A client whose operating system takes nothing more of what is sent would be waited for until its own end.

use super::{
    control_rate::{ControlLimits, ControlRate, Flood, units_of},
    frames::{FrameHeader, FrameScanner},
};
use crate::middleware::Patience;
use metrics::Counter;
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// The client connection preface (RFC 9113 section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The error code of RFC 9113 section 7.
const ENHANCE_YOUR_CALM: u8 = 11;

/// How many of the calls behind one that was reset come apart,
const CALLS_APART: u32 = 2;

/// as long as so many at the most are to,
const CALLS_APART_MAX: u32 = 256;

/// by how much,
const APART: Duration = Duration::from_millis(2);

/// and how much is read at once meanwhile, in which there are but a few.
const SHORT_READ_BYTES: usize = 512;

/// What a connection may do.
#[derive(Clone)]
pub struct IoLimits {
    /// How many control frames a client may send, beside those that answer DATA.
    pub control: ControlLimits,
    /// How long a client may take nothing of what is sent.
    pub unread_timeout: Duration,
    /// Counts connections that were ended for the first.
    pub flooding: Counter,
    /// Counts connections that were ended for the second.
    pub unread: Counter,
}

/// A connection whose client has begun to speak HTTP/2; see the [module](self).
pub struct GuardedIo<T> {
    inner: T,
    limits: IoLimits,
    /// How much of the preface, which was read to get here, is still to be shown.
    preface_bytes: u8,
    inbound: FrameScanner,
    outbound: FrameScanner,
    control: ControlRate,
    last_stream: u32,
    // How many calls still come apart.
    calls_apart: u32,
    patience: Patience,
}

impl<T: AsyncRead + AsyncWrite + Unpin> GuardedIo<T> {
    /// Waits for the client connection preface.
    ///
    /// hyper's keepalive begins behind the preface: to wait for it here lets the caller limit how long.
    pub async fn accept(mut inner: T, limits: IoLimits) -> io::Result<Self> {
        let mut preface = [0; PREFACE.len()];
        inner.read_exact(&mut preface).await?;
        if preface != *PREFACE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self {
            inner,
            limits,
            preface_bytes: PREFACE.len() as u8,
            inbound: FrameScanner::default(),
            outbound: FrameScanner::default(),
            control: ControlRate::new(),
            last_stream: 0,
            calls_apart: 0,
            patience: Patience::default(),
        })
    }

    fn show_preface(&mut self, buf: &mut ReadBuf<'_>) {
        let left = &PREFACE[PREFACE.len() - usize::from(self.preface_bytes)..];
        let shown = left.len().min(buf.remaining());
        buf.put_slice(&left[..shown]);
        self.preface_bytes -= shown as u8;
    }

    fn poll_inner(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.calls_apart == 0 {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let mut piece = [0; SHORT_READ_BYTES];
        let mut piece = ReadBuf::new(&mut piece[..SHORT_READ_BYTES.min(buf.remaining())]);
        ready!(Pin::new(&mut self.inner).poll_read(cx, &mut piece))?;
        buf.put_slice(piece.filled());
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
        let apart = self.calls_apart.min(calls);
        self.calls_apart -= apart;
        self.note_resets(resets);
        if apart > 0 {
            self.control.hold_for(APART * apart);
        }
        Ok(())
    }

    fn note_resets(&mut self, resets: u32) {
        self.calls_apart = self.calls_apart.saturating_add(resets.saturating_mul(CALLS_APART)).min(CALLS_APART_MAX);
    }

    /// Looks at what was sent to the client, which is the first `count` bytes of these pieces.
    fn note_sent(&mut self, pieces: &[IoSlice<'_>], mut count: usize) {
        let (mut data_frames, mut resets) = (0, 0);
        for piece in pieces {
            let sent = &piece[..piece.len().min(count)];
            count -= sent.len();
            self.outbound.feed(sent, |frame| match frame.kind {
                FrameHeader::DATA => data_frames += 1,
                FrameHeader::RST_STREAM => resets += 1,
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
        let shut = Pin::new(&mut this.inner).poll_shutdown(cx);
        this.with_patience(cx, shut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use tokio::{
        io::{AsyncWriteExt, DuplexStream, duplex},
        time::Instant,
    };

    const RESETS: u32 = 10;
    const CALLS: u32 = 30;
    const CALL_BYTES: usize = 100;

    fn frame(kind: u8, stream: u32, bytes: usize) -> Vec<u8> {
        let payload = bytes - 9;
        let mut frame = vec![0, 0, payload as u8, kind, 0];
        frame.extend(stream.to_be_bytes());
        frame.resize(bytes, 0);
        frame
    }

    /// Of a client that has sent these frames.
    async fn connection(frames: &[Vec<u8>]) -> (DuplexStream, GuardedIo<DuplexStream>) {
        let (mut client, gateway) = duplex(64 << 10);
        client.write_all(&[PREFACE.as_slice(), &frames.concat()].concat()).await.expect("there is room");
        let limits = IoLimits {
            control: ControlLimits { units_per_second_max: 1_000, held_max: Duration::from_secs(10) },
            unread_timeout: Duration::from_secs(60),
            flooding: Counter::noop(),
            unread: Counter::noop(),
        };
        let mut connection = GuardedIo::accept(gateway, limits).await.expect("it is HTTP/2");
        connection.read_exact(&mut [0; PREFACE.len()]).await.expect("shown once more");
        (client, connection)
    }

    fn calls() -> Vec<Vec<u8>> {
        (0..CALLS).map(|nth| frame(FrameHeader::HEADERS, 2 * nth + 1, CALL_BYTES)).collect()
    }

    #[tokio::test]
    async fn calls_come_as_they_are_sent() {
        let (_client, mut connection) = connection(&calls()).await;
        let mut read = vec![0; CALLS as usize * CALL_BYTES];
        connection.read_exact(&mut read).now_or_never().expect("at once").expect("all");
        assert_eq!(read, calls().concat());
    }

    #[tokio::test]
    async fn behind_calls_that_were_reset_some_come_apart() {
        let resets: Vec<Vec<u8>> = (0..RESETS).map(|nth| frame(FrameHeader::RST_STREAM, 2 * nth + 1, 13)).collect();
        let (_client, mut connection) = connection(&[resets.clone(), calls()].concat()).await;
        connection.read_exact(&mut vec![0; resets.concat().len()]).await.expect("the resets");
        let (began, mut read) = (Instant::now(), vec![0; CALLS as usize * CALL_BYTES]);
        connection.read_exact(&mut read).await.expect("all");
        assert!(began.elapsed() >= APART * RESETS * CALLS_APART);
        assert_eq!((read, connection.calls_apart), (calls().concat(), 0));
    }

    #[tokio::test]
    async fn who_resets_the_calls_makes_no_difference() {
        let (_client, mut connection) = connection(&[]).await;
        connection.write_all(&frame(FrameHeader::RST_STREAM, 1, 13)).await.expect("sent");
        assert_eq!(connection.calls_apart, CALLS_APART);
    }
}
