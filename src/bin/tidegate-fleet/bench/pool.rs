//! Batches that are encoded before the run: sending one is a copy of its bytes with other numbers in it.

use bytes::{BufMut, BytesMut};
use prost::{Message, encoding::encode_varint};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tidegate::{
    model::{StreamId, Timestamp},
    pb,
};

/// Ten sensors as a machine may have them.
const SENSORS: [(&str, &str); 10] = [
    ("temperature", "Cel"),
    ("humidity", "%RH"),
    ("pressure", "Pa"),
    ("battery_voltage", "V"),
    ("motor_current", "A"),
    ("active_power", "W"),
    ("flow_rate", "m3/s"),
    ("vibration_rms", "m/s2"),
    ("illuminance", "lx"),
    ("tank_level", "m"),
];
/// How much the pool's batches take together: no more than a processor's cache holds, and long enough that values do not come
/// again soon.
const POOL_BYTES: usize = 512 << 10;
/// Between two rows.
pub const INTERVAL_US: i64 = 1_000_000;
/// Times begin so long ago that sending a thousand times faster than time passes does not reach the present.
const AGE_US: i64 = 3_000 * 86_400 * INTERVAL_US;
/// The length of a varint of microseconds since the epoch, from 1987 to 4253.
const TIME_VARINT_BYTES: usize = 8;
/// A gRPC message's prefix: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;
// The keys of fields (number and wire type), as bytes.
const FRAMES_KEY: u8 = 0x0a;
const BASE_TIME_KEY: u8 = 0x08;
const UPLOAD_SEQUENCE_KEY: u8 = 0x18;
const UPLOAD_BATCH_KEY: u8 = 0x22;
const CONNECT_BATCH_KEY: u8 = 0x12;
const LINK_SEQUENCE_KEY: u8 = 0x08;
const LINK_BATCH_KEY: u8 = 0x12;

/// How a batch is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many sensors.
    pub sensors: usize,
    /// How many instants.
    pub rows: usize,
}

impl Shape {
    /// A batch of so many readings: of up to ten sensors, a tenth of the readings each.
    pub fn of(readings: usize) -> Self {
        let sensors = if readings.is_multiple_of(SENSORS.len()) { SENSORS.len() } else { 1 };
        Self { sensors, rows: readings / sensors }
    }

    /// How many readings.
    pub fn readings(self) -> u64 {
        (self.sensors * self.rows) as u64
    }
}

/// The name of a sensor, as a query names it.
pub fn sensor(index: usize) -> &'static str {
    SENSORS[index].0
}

/// The batches, which all devices share; each begins at another one.
pub struct Pool {
    shape: Shape,
    batches: Vec<Vec<u8>>,
    /// Where in a batch its time is.
    time_at: usize,
    start_us: i64,
}

impl Pool {
    /// Made from a seed, so that two runs send the same.
    pub fn new(shape: Shape) -> Self {
        Self::beginning(shape, AGE_US)
    }

    /// Whose times begin now: for devices that send about as many rows as time passes.
    pub fn of_now(shape: Shape) -> Self {
        Self::beginning(shape, 0)
    }

    fn beginning(shape: Shape, age_us: i64) -> Self {
        let mut walks: Vec<Walk> = (0..shape.sensors).map(|sensor| Walk::new(sensor as u64)).collect();
        let first = encode(shape, &mut walks);
        let time_at = time_offset(&first);
        let count = (POOL_BYTES / first.len()).max(4);
        let batches = std::iter::once(first).chain(std::iter::repeat_with(|| encode(shape, &mut walks))).take(count).collect();
        let now_us = Timestamp::now().micros();
        Self { shape, batches, time_at, start_us: now_us - now_us % INTERVAL_US - age_us }
    }

    /// How its batches are laid out.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The time of a stream's first row.
    pub fn start_us(&self) -> i64 {
        self.start_us
    }

    /// Room for any of its messages, about.
    pub fn message_bytes(&self) -> usize {
        self.batches[0].len() + 32
    }

    fn put_batch(&self, device: u32, sequence: u64, out: &mut BytesMut) {
        let at = out.len() + self.time_at;
        out.put_slice(self.batch(device, sequence));
        let time_us = self.start_us + (sequence as i64 - 1) * self.shape.rows as i64 * INTERVAL_US;
        let mut place = &mut out[at..at + TIME_VARINT_BYTES];
        encode_varint(time_us.unsigned_abs(), &mut place);
    }

    /// What a batch holds, decoded.
    pub fn frame(&self, device: u32, sequence: u64) -> pb::Frame {
        let mut bytes = BytesMut::new();
        self.put_batch(device, sequence, &mut bytes);
        pb::Batch::decode(bytes.freeze()).expect("its own encoding").frames.remove(0)
    }

    /// Appends a message of an Upload call; the first of a call says whose it is.
    pub fn put_upload(&self, who: Option<&Stream>, device: u32, sequence: u64, out: &mut BytesMut) {
        let prefix_at = begin_message(out);
        if let Some(who) = who {
            let head = pb::UploadRequest { device: who.device.clone(), stream_id: who.id_bytes(), ..Default::default() };
            head.encode(out).expect("a buffer that grows");
        }
        out.put_u8(UPLOAD_SEQUENCE_KEY);
        encode_varint(sequence, out);
        out.put_u8(UPLOAD_BATCH_KEY);
        encode_varint(self.batch(device, sequence).len() as u64, out);
        self.put_batch(device, sequence, out);
        end_message(out, prefix_at);
    }

    /// Appends a batch as a message of a Connect call.
    pub fn put_link_batch(&self, device: u32, sequence: u64, out: &mut BytesMut) {
        let prefix_at = begin_message(out);
        let mut head = [0_u8; 24];
        let mut rest = &mut head[..];
        rest.put_u8(LINK_SEQUENCE_KEY);
        encode_varint(sequence, &mut rest);
        rest.put_u8(LINK_BATCH_KEY);
        encode_varint(self.batch(device, sequence).len() as u64, &mut rest);
        let unused = rest.len();
        let head = &head[..head.len() - unused];
        out.put_u8(CONNECT_BATCH_KEY);
        encode_varint(head.len() as u64 + self.batch(device, sequence).len() as u64, out);
        out.put_slice(head);
        self.put_batch(device, sequence, out);
        end_message(out, prefix_at);
    }

    fn batch(&self, device: u32, sequence: u64) -> &[u8] {
        // Any number will do that puts devices at different places.
        let index = (u64::from(device) * 7_919 + sequence) % self.batches.len() as u64;
        &self.batches[index as usize]
    }
}

/// One device's stream.
#[derive(Debug, Clone)]
pub struct Stream {
    /// The device's id.
    pub device: String,
    /// The stream id.
    pub id: StreamId,
}

impl Stream {
    fn id_bytes(&self) -> bytes::Bytes {
        self.id.as_bytes().to_vec().into()
    }

    /// Appends the first message of a Connect call.
    pub fn put_hello(&self, out: &mut BytesMut) {
        let hello = pb::Hello { device: self.device.clone(), stream_id: self.id_bytes(), applied_revision: 0 };
        let prefix_at = begin_message(out);
        let message = pb::ConnectRequest { message: Some(pb::connect_request::Message::Hello(hello)) };
        message.encode(out).expect("a buffer that grows");
        end_message(out, prefix_at);
    }
}

fn begin_message(out: &mut BytesMut) -> usize {
    out.put_bytes(0, PREFIX_BYTES);
    out.len() - PREFIX_BYTES
}

fn end_message(out: &mut BytesMut, prefix_at: usize) {
    let len = (out.len() - prefix_at - PREFIX_BYTES) as u32;
    out[prefix_at + 1..prefix_at + PREFIX_BYTES].copy_from_slice(&len.to_be_bytes());
}

/// A value of two decimals that walks.
struct Walk {
    rng: SmallRng,
    hundredths: i64,
}

impl Walk {
    fn new(seed: u64) -> Self {
        Self { rng: SmallRng::seed_from_u64(seed), hundredths: 2_000 + 317 * seed as i64 }
    }

    fn next(&mut self) -> f64 {
        self.hundredths += self.rng.random_range(-9..=9);
        self.hundredths as f64 / 100.0
    }
}

fn encode(shape: Shape, walks: &mut [Walk]) -> Vec<u8> {
    let columns = walks.iter_mut().zip(SENSORS).map(|(walk, (sensor, unit))| {
        let values = (0..shape.rows).map(|_| walk.next()).collect();
        let values = Some(pb::column::Values::DoubleValues(pb::DoubleValues { values }));
        pb::Column { sensor: sensor.to_owned(), unit: unit.to_owned(), values }
    });
    // A time of the right length; what is sent has its own.
    let base_time_us = Timestamp::now().micros();
    let frame =
        pb::Frame { base_time_us, time_deltas_us: vec![INTERVAL_US; shape.rows - 1], columns: columns.collect(), ..Default::default() };
    pb::Batch { frames: vec![frame] }.encode_to_vec()
}

/// Where the first frame's `base_time_us` begins: behind the key and length of the frame and its own key.
fn time_offset(batch: &[u8]) -> usize {
    let length_bytes = batch[1..].iter().take_while(|byte| **byte >= 0x80).count() + 1;
    let at = 1 + length_bytes + 1;
    assert!(batch[0] == FRAMES_KEY && batch[at - 1] == BASE_TIME_KEY, "prost encodes fields in the order of their numbers");
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn stream() -> Stream {
        Stream { device: "d".to_owned(), id: StreamId::new() }
    }

    /// The message behind the prefix, which must be all that there is.
    fn message<M: Message + Default>(bytes: &[u8]) -> M {
        let (prefix, message) = bytes.split_at(PREFIX_BYTES);
        assert_eq!(prefix, [&[0][..], &(message.len() as u32).to_be_bytes()].concat());
        M::decode(message).expect("well formed")
    }

    fn batch(bytes: &[u8]) -> pb::Frame {
        pb::Batch::decode(bytes).expect("well formed").frames.remove(0)
    }

    #[test]
    fn shapes_are_of_as_many_readings_as_asked_for() {
        for readings in [1, 10, 100, 1_000] {
            assert_eq!(Shape::of(readings).readings(), readings as u64);
        }
        assert_eq!(Shape::of(100), Shape { sensors: 10, rows: 10 });
    }

    #[test]
    fn what_is_patched_is_what_the_contract_says() {
        let pool = Pool::new(Shape::of(100));
        let stream = stream();
        let mut bytes = BytesMut::new();
        pool.put_upload(Some(&stream), 3, 1, &mut bytes);
        let first: pb::UploadRequest = message(&bytes);
        assert_eq!((first.device.as_str(), first.stream_id, first.sequence), ("d", stream.id_bytes(), 1));
        assert_eq!(batch(&first.batch).base_time_us, pool.start_us());

        bytes.clear();
        pool.put_link_batch(3, 20_000, &mut bytes);
        let later: pb::ConnectRequest = message(&bytes);
        let Some(pb::connect_request::Message::Batch(later)) = later.message else { panic!("not a batch") };
        assert_eq!(later.sequence, 20_000);
        let frame = batch(&later.batch);
        assert_eq!(frame.base_time_us, pool.start_us() + 19_999 * 10 * INTERVAL_US, "the next row after those of the batch before");
        assert!(frame.columns.iter().all(|column| column.values.is_some()) && frame.columns.len() == 10);
    }

    #[test]
    fn neighbouring_batches_have_other_values() {
        let pool = Pool::new(Shape::of(1));
        let values = (1..50).map(|sequence| {
            let mut bytes = BytesMut::new();
            pool.put_batch(1, sequence, &mut bytes);
            format!("{:?}", batch(&bytes).columns[0].values)
        });
        assert!(values.collect::<BTreeSet<_>>().len() > 10);
    }
}
