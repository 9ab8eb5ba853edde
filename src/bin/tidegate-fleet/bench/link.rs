//! The load of always-on devices: Connect calls, at a fixed rate or with so many batches in flight, whose acknowledgements
//! are timed.

use super::{
    call,
    pool::{Pool, Stream},
    upload::device_name,
};
use anyhow::bail;
use bytes::{Bytes, BytesMut};
use hdrhistogram::Histogram;
use http_body::{Body, Frame};
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};
use tidegate::{
    model::StreamId,
    pb::{self, connect_response::Message},
};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinSet,
    time::Instant,
};
use tonic::{Status, Streaming, transport::Channel};

/// How much is written at once.
const CHUNK_BYTES: usize = 16 << 10;
/// How many batches a device has in flight when it is to be as fast as it can; the client library's default.
const IN_FLIGHT_MAX: u64 = 16;
/// How often batches are handed out: the granularity of the runtime's timers.
const TICK: Duration = Duration::from_millis(1);
/// A tick that comes so late was held up by the load itself, and the time counts.
const LATE: Duration = Duration::from_millis(2);

/// How fast the devices send.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// Each as soon as an acknowledgement makes room.
    Max,
    /// So many readings per second in all, whatever the acknowledgements do.
    Rate(f64),
}

/// What acknowledgements told.
pub struct Measured {
    /// Readings that were acknowledged.
    pub readings: AtomicU64,
    /// Microseconds from handing a batch to the connection to its acknowledgement.
    pub latencies_us: Mutex<Histogram<u64>>,
}

impl Measured {
    pub fn new() -> Self {
        let latencies_us = Histogram::new_with_bounds(1, 600_000_000, 3).expect("the bounds are good");
        Self { readings: AtomicU64::new(0), latencies_us: Mutex::new(latencies_us) }
    }

    /// The latencies up to now, which are then forgotten.
    pub fn take(&self) -> Histogram<u64> {
        let mut latencies = self.latencies_us.lock();
        let taken = latencies.clone();
        latencies.reset();
        taken
    }
}

/// Devices that are linked to one server.
pub struct Links {
    pool: Arc<Pool>,
    devices: Vec<Link>,
}

struct Link {
    number: u32,
    stream: Stream,
    channel: Channel,
    next: u64,
}

/// What a device sends, and what it waits for.
struct Line {
    due: UnboundedSender<u64>,
    in_flight: Arc<Mutex<VecDeque<Instant>>>,
}

impl Line {
    fn send(&self, sequence: u64, now: Instant) {
        self.in_flight.lock().push_back(now);
        // An error says that the call has failed, which its reader tells.
        let _ = self.due.send(sequence);
    }
}

impl Links {
    /// So many devices on the connections in turn.
    pub fn new(pool: Arc<Pool>, channels: &[Channel], devices: u32) -> Self {
        let link = |number: u32| Link {
            number,
            stream: Stream { device: device_name(number), id: StreamId::new() },
            channel: channels[number as usize % channels.len()].clone(),
            next: 1,
        };
        Self { pool, devices: (0..devices).map(link).collect() }
    }

    /// Connects them, lets them send for so long, and waits for all acknowledgements. Returns how long that took from when all were connected.
    pub async fn run(&mut self, duration: Duration, pace: Pace, measured: &Arc<Measured>) -> anyhow::Result<Duration> {
        let batch_readings = self.pool.shape().readings();
        let mut lines = Vec::with_capacity(self.devices.len());
        let mut readers = JoinSet::new();
        let (welcome, mut welcomes) = unbounded_channel();
        for link in &self.devices {
            let (due, queue) = unbounded_channel();
            let hello = Some(link.stream.clone());
            let body = Outgoing { pool: self.pool.clone(), device: link.number, hello, queue, chunk: BytesMut::new() };
            let line = Line { due, in_flight: Arc::default() };
            let reader = Reader {
                acknowledged: link.next - 1,
                in_flight: line.in_flight.clone(),
                measured: measured.clone(),
                batch_readings,
                refill: matches!(pace, Pace::Max).then(|| line.due.downgrade()),
                welcome: welcome.clone(),
            };
            readers.spawn(reader.run(link.number, link.channel.clone(), body));
            lines.push(line);
        }
        // A call that is only beginning is no slow acknowledgement.
        for _ in &self.devices {
            tokio::select! {
                _ = welcomes.recv() => {}
                Some(ended) = readers.join_next() => {
                    ended??;
                    bail!("a call ended before it was welcomed");
                }
            }
        }
        let began = Instant::now();
        match pace {
            Pace::Rate(rate) => self.hand_out(&lines, began + duration, rate / batch_readings as f64, &mut readers).await?,
            Pace::Max => {
                for (link, line) in self.devices.iter_mut().zip(&lines) {
                    (link.next..link.next + IN_FLIGHT_MAX).for_each(|sequence| line.send(sequence, began));
                }
                tokio::time::sleep_until(began + duration).await;
            }
        }
        drop(lines);
        while let Some(ended) = readers.join_next().await {
            let (number, acknowledged) = ended??;
            self.devices[number as usize].next = acknowledged + 1;
        }
        Ok(began.elapsed())
    }

    /// Hands batches out to the devices in turn.
    async fn hand_out(
        &mut self,
        lines: &[Line],
        end: Instant,
        batches_per_second: f64,
        readers: &mut JoinSet<anyhow::Result<(u32, u64)>>,
    ) -> anyhow::Result<()> {
        let mut ticks = tokio::time::interval(TICK);
        let began = Instant::now();
        let (mut sent, mut turn) = (0_u64, 0);
        loop {
            let due_at = ticks.tick().await;
            if due_at >= end {
                return Ok(());
            }
            if let Some(ended) = readers.try_join_next() {
                ended??;
                bail!("a call ended although its device had more to send");
            }
            let now = Instant::now();
            // The runtime's timers are late by up to a tick, which is not the gateway's fault.
            let at = if now.duration_since(due_at) > LATE { due_at } else { now };
            let due = (due_at.duration_since(began).as_secs_f64() * batches_per_second) as u64;
            for _ in sent..due {
                lines[turn].send(self.devices[turn].next, at);
                self.devices[turn].next += 1;
                turn = (turn + 1) % lines.len();
            }
            sent = due.max(sent);
        }
    }
}

/// Reads one device's acknowledgements.
struct Reader {
    acknowledged: u64,
    in_flight: Arc<Mutex<VecDeque<Instant>>>,
    measured: Arc<Measured>,
    batch_readings: u64,
    /// Where the next batch goes for each that is acknowledged, as long as there is to be one.
    refill: Option<tokio::sync::mpsc::WeakUnboundedSender<u64>>,
    /// Told when the gateway has welcomed the device.
    welcome: UnboundedSender<()>,
}

impl Reader {
    async fn run(mut self, number: u32, channel: Channel, body: Outgoing) -> anyhow::Result<(u32, u64)> {
        let mut answers: Streaming<pb::ConnectResponse> = call::call(&channel, call::CONNECT, body).await?;
        while let Some(answer) = answers.message().await? {
            match answer.message {
                Some(Message::Ack(ack)) if ack.rejected.is_empty() && ack.duplicate_batches == 0 => self.take(ack.last_durable_sequence),
                Some(Message::Welcome(_)) => {
                    let _ = self.welcome.send(());
                }
                Some(Message::ConfigUpdate(_)) | None => {}
                Some(other) => bail!("{}: {other:?}", device_name(number)),
            }
        }
        match self.in_flight.lock().len() {
            0 => Ok((number, self.acknowledged)),
            left => bail!("{}: {left} batches were not acknowledged", device_name(number)),
        }
    }

    fn take(&mut self, last_durable_sequence: u64) {
        let now = Instant::now();
        let batches = last_durable_sequence - self.acknowledged;
        self.measured.readings.fetch_add(batches * self.batch_readings, Relaxed);
        let mut in_flight = self.in_flight.lock();
        {
            let mut latencies = self.measured.latencies_us.lock();
            for sent in in_flight.drain(..batches as usize) {
                latencies.saturating_record(now.duration_since(sent).as_micros() as u64);
            }
        }
        let refill = self.refill.as_ref().and_then(|due| due.upgrade());
        if let Some(due) = refill {
            let first = last_durable_sequence + in_flight.len() as u64 + 1;
            for sequence in first..first + batches {
                in_flight.push_back(now);
                let _ = due.send(sequence);
            }
        }
        self.acknowledged = last_durable_sequence;
    }
}

/// A request's body: what is due.
struct Outgoing {
    pool: Arc<Pool>,
    device: u32,
    /// Said first.
    hello: Option<Stream>,
    queue: UnboundedReceiver<u64>,
    chunk: BytesMut,
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if let Some(stream) = this.hello.take() {
            stream.put_hello(&mut this.chunk);
        }
        let mut ended = false;
        while this.chunk.is_empty() || this.chunk.len() + this.pool.message_bytes() <= CHUNK_BYTES {
            match this.queue.poll_recv(context) {
                Poll::Ready(Some(sequence)) => this.pool.put_link_batch(this.device, sequence, &mut this.chunk),
                Poll::Ready(None) => {
                    ended = true;
                    break;
                }
                Poll::Pending => break,
            }
        }
        match this.chunk.is_empty() {
            false => Poll::Ready(Some(Ok(Frame::data(this.chunk.split().freeze())))),
            true if ended => Poll::Ready(None),
            true => Poll::Pending,
        }
    }
}
