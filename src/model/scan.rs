//! Reads an encoded batch where it lies, without decoding it into messages.
//!
//! Protobuf allows one message to be written in many ways: fields in any order or several times, packed or not, with fields
//! that nobody knows. What encoders really write is one of them: fields in the order of their numbers, each once, numbers
//! packed. This reader takes that form only, and yields [`Unusual`] for all else; the caller then lets prost decode the bytes.
//! So it is small, and whatever it accepts prost decodes to the same.
//!
//! One field stands elsewhere: a frame's `clock_correction_us`, which only the gateway writes, is its first, so that it is known before the
//! readings are.

use super::{Timestamp, ValueKind};

const VARINT: u64 = 0;
const BYTES: u64 = 2;

/// The bytes are not as encoders write a batch: damaged, or merely unusual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unusual;

/// What is left to read.
#[derive(Debug, Clone, Copy)]
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    #[inline]
    fn varint(&mut self) -> Result<u64, Unusual> {
        match self.0 {
            [byte, rest @ ..] if *byte < 0x80 => {
                self.0 = rest;
                Ok(u64::from(*byte))
            }
            _ => self.long_varint(),
        }
    }

    #[inline]
    fn long_varint(&mut self) -> Result<u64, Unusual> {
        let mut value = 0;
        for (index, &byte) in self.0.iter().take(10).enumerate() {
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte < 0x80 {
                // The tenth byte has room for one bit.
                if index == 9 && byte > 1 {
                    return Err(Unusual);
                }
                self.0 = &self.0[index + 1..];
                return Ok(value);
            }
        }
        Err(Unusual)
    }

    /// The bytes of a field whose tag has been read.
    #[inline]
    fn bytes(&mut self) -> Result<&'a [u8], Unusual> {
        let length = usize::try_from(self.varint()?).map_err(|_| Unusual)?;
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(Unusual)?;
        self.0 = rest;
        Ok(bytes)
    }

    /// Whether the next field is this one; if so, its tag is read. Tags of the fields known here take one byte.
    #[inline]
    fn field(&mut self, number: u64, wire_type: u64) -> bool {
        match self.0 {
            [tag, rest @ ..] if u64::from(*tag) == number << 3 | wire_type => {
                self.0 = rest;
                true
            }
            _ => false,
        }
    }

    /// The bytes of the next field if it is this one, else nothing.
    #[inline]
    fn optional_bytes(&mut self, number: u64) -> Result<&'a [u8], Unusual> {
        if self.field(number, BYTES) { self.bytes() } else { Ok(&[]) }
    }
}

fn zigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

fn to_zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63) as u64
}

fn write_varint(mut value: u64, bytes: &mut Vec<u8>) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// The frames of a batch.
pub fn frames(batch: &[u8]) -> impl Iterator<Item = Result<Frame<'_>, Unusual>> {
    let mut input = Input(batch);
    std::iter::from_fn(move || {
        if input.0.is_empty() {
            return None;
        }
        let frame = if input.field(1, BYTES) { input.bytes().and_then(Frame::read) } else { Err(Unusual) };
        if frame.is_err() {
            input.0 = &[];
        }
        Some(frame)
    })
}

/// A `tidegate.v1.Frame`.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// What the gateway has added to the times, microseconds; 0: nothing.
    pub clock_correction: i64,
    base_time: i64,
    deltas: &'a [u8],
    columns: Input<'a>,
}

/// The times of a frame, summed up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// How many there are; at least 1.
    pub rows: usize,
    /// The earliest, microseconds since the epoch.
    pub first: i64,
    /// The latest.
    pub last: i64,
    /// The last row that has the latest time.
    pub last_row: usize,
}

impl<'a> Frame<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, Unusual> {
        let mut input = Input(bytes);
        let clock_correction = if input.field(4, VARINT) { zigzag(input.varint()?) } else { 0 };
        let base_time = if input.field(1, VARINT) { input.varint()? as i64 } else { 0 };
        let deltas = input.optional_bytes(2)?;
        Ok(Self { clock_correction, base_time, deltas, columns: input })
    }

    /// Adds to all times, which have nothing added to them yet; whether they still are times.
    pub fn correct(&mut self, micros: i64) -> bool {
        let Some(base_time) = self.base_time.checked_add(micros) else { return false };
        (self.base_time, self.clock_correction) = (base_time, micros);
        true
    }

    /// Appends the frame to an encoded batch, the columns as they are. A field behind them that is none is [`Unusual`].
    pub fn write_to(&self, batch: &mut Vec<u8>) -> Result<(), Unusual> {
        let mut columns = self.columns;
        while !columns.0.is_empty() {
            if !columns.field(3, BYTES) {
                return Err(Unusual);
            }
            columns.bytes()?;
        }
        let mut head = Vec::with_capacity(40);
        for (number, value) in [(4, to_zigzag(self.clock_correction)), (1, self.base_time as u64)] {
            if value != 0 {
                write_varint(number << 3 | VARINT, &mut head);
                write_varint(value, &mut head);
            }
        }
        if !self.deltas.is_empty() {
            write_varint(2 << 3 | BYTES, &mut head);
            write_varint(self.deltas.len() as u64, &mut head);
        }
        let parts = [&head, self.deltas, self.columns.0];
        write_varint(1 << 3 | BYTES, batch);
        write_varint(parts.iter().map(|part| part.len() as u64).sum(), batch);
        parts.iter().for_each(|part| batch.extend_from_slice(part));
        Ok(())
    }

    /// The times, one a row, in microseconds since the epoch. A sum beyond what 64 bits hold is [`Unusual`].
    pub fn times(&self) -> impl Iterator<Item = Result<i64, Unusual>> + use<'a> {
        let (mut time, mut input, mut is_first) = (self.base_time, Input(self.deltas), true);
        std::iter::from_fn(move || {
            if std::mem::take(&mut is_first) {
                return Some(Ok(time));
            }
            if input.0.is_empty() {
                return None;
            }
            let next = input.varint().and_then(|delta| time.checked_add(zigzag(delta)).ok_or(Unusual));
            match next {
                Ok(next) => time = next,
                Err(Unusual) => input.0 = &[],
            }
            Some(next)
        })
    }

    /// Reads all times once. Times outside of the years 0001 to 9999 are [`Unusual`].
    pub fn sum_up_times(&self) -> Result<Times, Unusual> {
        let mut times = Times { rows: 0, first: i64::MAX, last: i64::MIN, last_row: 0 };
        for time in self.times() {
            let time = time?;
            times.first = times.first.min(time);
            if time >= times.last {
                (times.last, times.last_row) = (time, times.rows);
            }
            times.rows += 1;
        }
        let in_range = times.first >= Timestamp::MIN.micros() && times.last <= Timestamp::MAX.micros();
        if in_range { Ok(times) } else { Err(Unusual) }
    }

    /// The columns.
    pub fn columns(&self) -> impl Iterator<Item = Result<Column<'a>, Unusual>> + use<'a> {
        let mut input = self.columns;
        std::iter::from_fn(move || {
            if input.0.is_empty() {
                return None;
            }
            let column = if input.field(3, BYTES) { input.bytes().and_then(Column::read) } else { Err(Unusual) };
            if column.is_err() {
                input.0 = &[];
            }
            Some(column)
        })
    }
}

/// A `tidegate.v1.Column`. Texts are as they came: not known to be UTF-8.
#[derive(Debug, Clone, Copy)]
pub struct Column<'a> {
    /// The sensor's name.
    pub sensor: &'a [u8],
    /// The unit's symbol; may be empty.
    pub unit: &'a [u8],
    /// The values.
    pub values: RawValues<'a>,
}

/// The values of a column, encoded.
#[derive(Debug, Clone, Copy)]
pub struct RawValues<'a> {
    /// What they are.
    pub kind: ValueKind,
    bytes: &'a [u8],
}

impl<'a> Column<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, Unusual> {
        let mut input = Input(bytes);
        let sensor = input.optional_bytes(1)?;
        let unit = input.optional_bytes(2)?;
        let kinds = [(3, ValueKind::Double), (4, ValueKind::Int64), (5, ValueKind::Bool), (6, ValueKind::Text)];
        let (_, kind) = kinds.into_iter().find(|(number, _)| input.field(*number, BYTES)).ok_or(Unusual)?;
        let mut message = Input(input.bytes()?);
        let is_last = input.0.is_empty();
        // Numbers are packed into one field; texts are a field each.
        let bytes = match kind {
            ValueKind::Text => message.0,
            _ => {
                let packed = message.optional_bytes(1)?;
                if message.0.is_empty() { packed } else { return Err(Unusual) }
            }
        };
        if is_last { Ok(Self { sensor, unit, values: RawValues { kind, bytes } }) } else { Err(Unusual) }
    }
}

impl<'a> RawValues<'a> {
    /// How much memory `rows` of these values take, about, when they are decoded.
    pub fn memory_bytes(&self, rows: usize) -> usize {
        match self.kind {
            ValueKind::Double | ValueKind::Int64 => rows * 8,
            ValueKind::Bool => rows,
            ValueKind::Text => rows * size_of::<String>() + self.bytes.len(),
        }
    }

    /// The values of a column of doubles, which it must be.
    pub fn doubles(&self) -> Result<impl ExactSizeIterator<Item = f64> + Clone + use<'a>, Unusual> {
        let (values, rest) = self.bytes.as_chunks::<8>();
        let whole = rest.is_empty() && self.kind == ValueKind::Double;
        if whole { Ok(values.iter().map(|bytes| f64::from_le_bytes(*bytes))) } else { Err(Unusual) }
    }

    /// The values of a column of integers or switches (as 0 and 1), which it must be.
    pub fn integers(&self) -> impl Iterator<Item = Result<i64, Unusual>> + use<'a> {
        let (mut input, kind) = (Input(self.bytes), self.kind);
        std::iter::from_fn(move || {
            if input.0.is_empty() {
                return None;
            }
            let value = input.varint().and_then(|value| match kind {
                ValueKind::Int64 => Ok(zigzag(value)),
                ValueKind::Bool => Ok(i64::from(value != 0)),
                ValueKind::Double | ValueKind::Text => Err(Unusual),
            });
            if value.is_err() {
                input.0 = &[];
            }
            Some(value)
        })
    }

    /// The values of a column of texts, which it must be.
    pub fn texts(&self) -> impl Iterator<Item = Result<&'a str, Unusual>> + use<'a> {
        let (mut input, kind) = (Input(self.bytes), self.kind);
        std::iter::from_fn(move || {
            if input.0.is_empty() {
                return None;
            }
            let is_text = kind == ValueKind::Text && input.field(1, BYTES);
            let bytes = if is_text { input.bytes() } else { Err(Unusual) };
            let text = bytes.and_then(|bytes| std::str::from_utf8(bytes).map_err(|_| Unusual));
            if text.is_err() {
                input.0 = &[];
            }
            Some(text)
        })
    }
}
