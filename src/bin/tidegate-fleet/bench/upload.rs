//! The load at full speed: each device uploads batches in one call for as long as a slice lasts.

use super::{
    call,
    pool::{Pool, Stream},
};
use anyhow::bail;
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use std::{
    ops::Range,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};
use tidegate::{model::StreamId, pb};
use tokio::{task::JoinSet, time::Instant};
use tonic::{Status, transport::Channel};

const UPLOAD: &str = "/tidegate.v1.TelemetryService/Upload";
/// How much is written at once: the most that one HTTP/2 frame holds by default (RFC 9113 section 4.2).
const CHUNK_BYTES: usize = 16 << 10;
/// Longer than any run.
const FOREVER: Duration = Duration::from_secs(86_400);

/// Devices that upload to one server.
pub struct Uploaders {
    pool: Arc<Pool>,
    devices: Vec<Device>,
}

struct Device {
    number: u32,
    stream: Stream,
    channel: Channel,
    /// All up to it are acknowledged.
    acknowledged: u64,
}

/// What became of a slice.
#[derive(Debug, Clone, Copy, Default)]
pub struct Slice {
    /// Readings that were acknowledged.
    pub readings: u64,
    /// From its beginning to the last acknowledgement.
    pub elapsed: Duration,
}

impl Slice {
    /// Readings per second.
    pub fn rate(&self) -> f64 {
        self.readings as f64 / self.elapsed.as_secs_f64()
    }
}

impl Uploaders {
    /// So many devices on the connections in turn.
    pub fn new(pool: Arc<Pool>, channels: &[Channel], devices: u32) -> Self {
        Self::numbered(pool, channels, 0..devices)
    }

    /// The devices of these numbers.
    pub fn numbered(pool: Arc<Pool>, channels: &[Channel], numbers: Range<u32>) -> Self {
        let device = |number: u32| Device {
            number,
            stream: Stream { device: device_name(number), id: StreamId::new() },
            channel: channels[number as usize % channels.len()].clone(),
            acknowledged: 0,
        };
        Self { pool, devices: numbers.map(device).collect() }
    }

    /// Lets them upload for so long, and waits for all acknowledgements.
    pub async fn run(&mut self, duration: Duration) -> anyhow::Result<Slice> {
        self.run_until(Instant::now() + duration, u64::MAX).await
    }

    /// Lets each upload so many batches, however long it takes.
    pub async fn send_each(&mut self, batches: u64) -> anyhow::Result<Slice> {
        self.run_until(Instant::now() + FOREVER, batches).await
    }

    async fn run_until(&mut self, end: Instant, batches_each: u64) -> anyhow::Result<Slice> {
        let stop = Arc::new(AtomicBool::new(false));
        let began = Instant::now();
        let mut uploads = JoinSet::new();
        for device in self.devices.drain(..) {
            uploads.spawn(device.upload(self.pool.clone(), stop.clone(), batches_each));
        }
        let mut slice = Slice::default();
        let mut timer = std::pin::pin!(tokio::time::sleep_until(end));
        while !uploads.is_empty() {
            tokio::select! {
                () = &mut timer, if !stop.load(Relaxed) => stop.store(true, Relaxed),
                Some(uploaded) = uploads.join_next() => {
                    let (device, readings) = uploaded??;
                    slice.readings += readings;
                    self.devices.push(device);
                }
            }
        }
        slice.elapsed = began.elapsed();
        Ok(slice)
    }
}

/// The id of a device by its number.
pub fn device_name(number: u32) -> String {
    format!("bench-{number:05}")
}

impl Device {
    /// One call. Returns how many readings were acknowledged.
    async fn upload(mut self, pool: Arc<Pool>, stop: Arc<AtomicBool>, batches_max: u64) -> anyhow::Result<(Self, u64)> {
        let (next, first) = (self.acknowledged + 1, Some(self.stream.clone()));
        let body = Upload { pool, device: self.number, first, next, batches_left: batches_max, stop, chunk: BytesMut::new() };
        let answer: pb::UploadResponse = call::single(call::call(&self.channel, UPLOAD, body).await?).await?;
        let accepted = answer.accepted.unwrap_or_default();
        if !answer.rejected_counts.is_empty() || self.acknowledged + accepted.batches != answer.last_durable_sequence {
            bail!("{}: not all was accepted: {answer:?}", self.stream.device);
        }
        self.acknowledged = answer.last_durable_sequence;
        Ok((self, accepted.readings))
    }
}

/// A request's body, written as it is asked for.
struct Upload {
    pool: Arc<Pool>,
    device: u32,
    /// Said in the first message.
    first: Option<Stream>,
    next: u64,
    batches_left: u64,
    stop: Arc<AtomicBool>,
    chunk: BytesMut,
}

impl Body for Upload {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if this.stop.load(Relaxed) && this.first.is_none() {
            return Poll::Ready(None);
        }
        this.chunk.reserve(CHUNK_BYTES + this.pool.message_bytes());
        // As many messages as fit, but at least one.
        while this.chunk.is_empty() || this.chunk.len() + this.pool.message_bytes() <= CHUNK_BYTES {
            if this.batches_left == 0 {
                break;
            }
            this.batches_left -= 1;
            this.pool.put_upload(this.first.take().as_ref(), this.device, this.next, &mut this.chunk);
            this.next += 1;
        }
        Poll::Ready((!this.chunk.is_empty()).then(|| Ok(Frame::data(this.chunk.split().freeze()))))
    }
}
