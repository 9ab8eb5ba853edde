//! Ends connections that are used to wear the gateway out, which the HTTP/2 implementation alone would put up with.
//!
//! Two things are watched, at the price of a look at each frame's header:
//! - PING, SETTINGS, WINDOW_UPDATE, PRIORITY, RST_STREAM, empty DATA and unknown frames make work and carry nothing, and so does
//!   more metadata than a call needs. A few are part of every connection, and clients answer what they are sent with some. A client
//!   that sends many more is not read from until its [rate](ControlRate) is free again, so that a flood waits where it comes from;
//!   one that goes on all the same gets a GOAWAY with ENHANCE_YOUR_CALM (RFC 9113 section 10.5). Were it ended at once, it would
//!   come again at once.
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
            patience: Patience::default(),
        })
    }

    fn show_preface(&mut self, buf: &mut ReadBuf<'_>) {
        let left = &PREFACE[PREFACE.len() - usize::from(self.preface_bytes)..];
        let shown = left.len().min(buf.remaining());
        buf.put_slice(&left[..shown]);
        self.preface_bytes -= shown as u8;
    }

    /// Looks at what the client sends.
    fn note_received(&mut self, bytes: &[u8]) -> Result<(), Flood> {
        let (mut units, last_stream) = (0, &mut self.last_stream);
        self.inbound.feed(bytes, |frame| {
            if frame.kind == FrameHeader::HEADERS {
                *last_stream = frame.stream.max(*last_stream);
            }
            units += units_of(frame);
        });
        self.control.take(units, &self.limits.control)
    }

    /// Looks at what was sent to the client, which is the first `count` bytes of these pieces.
    fn note_sent(&mut self, pieces: &[IoSlice<'_>], mut count: usize) {
        let mut data_frames = 0;
        for piece in pieces {
            let sent = &piece[..piece.len().min(count)];
            count -= sent.len();
            self.outbound.feed(sent, |frame| data_frames += u32::from(frame.kind == FrameHeader::DATA));
        }
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
        ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
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
