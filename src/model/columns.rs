//! Values in columns, one kind a column.

use super::ValueKind;
use crate::pb;
use std::ops::Range;

/// One value of a sensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// See [`ValueKind::Double`].
    Double(f64),
    /// See [`ValueKind::Int64`].
    Int64(i64),
    /// See [`ValueKind::Bool`].
    Bool(bool),
    /// See [`ValueKind::Text`].
    Text(String),
}

impl Value {
    /// The value's kind.
    pub fn kind(&self) -> ValueKind {
        match self {
            Self::Double(_) => ValueKind::Double,
            Self::Int64(_) => ValueKind::Int64,
            Self::Bool(_) => ValueKind::Bool,
            Self::Text(_) => ValueKind::Text,
        }
    }
}

/// A column of values of one kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// See [`ValueKind::Double`].
    Double(Vec<f64>),
    /// See [`ValueKind::Int64`].
    Int64(Vec<i64>),
    /// See [`ValueKind::Bool`].
    Bool(Vec<bool>),
    /// See [`ValueKind::Text`].
    Text(Vec<String>),
}

impl Values {
    /// An empty column.
    pub fn new(kind: ValueKind) -> Self {
        match kind {
            ValueKind::Double => Self::Double(Vec::new()),
            ValueKind::Int64 => Self::Int64(Vec::new()),
            ValueKind::Bool => Self::Bool(Vec::new()),
            ValueKind::Text => Self::Text(Vec::new()),
        }
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Double(values) => values.len(),
            Self::Int64(values) => values.len(),
            Self::Bool(values) => values.len(),
            Self::Text(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values' kind.
    pub fn kind(&self) -> ValueKind {
        match self {
            Self::Double(_) => ValueKind::Double,
            Self::Int64(_) => ValueKind::Int64,
            Self::Bool(_) => ValueKind::Bool,
            Self::Text(_) => ValueKind::Text,
        }
    }

    /// The value at `index`; `None` behind the end.
    pub fn get(&self, index: usize) -> Option<Value> {
        match self {
            Self::Double(values) => values.get(index).copied().map(Value::Double),
            Self::Int64(values) => values.get(index).copied().map(Value::Int64),
            Self::Bool(values) => values.get(index).copied().map(Value::Bool),
            Self::Text(values) => values.get(index).cloned().map(Value::Text),
        }
    }

    /// Takes the values of `other` behind its own; `false`, and nothing taken, when they are of another kind.
    pub fn append(&mut self, other: Values) -> bool {
        match (self, other) {
            (Self::Double(own), Self::Double(mut more)) => own.append(&mut more),
            (Self::Int64(own), Self::Int64(mut more)) => own.append(&mut more),
            (Self::Bool(own), Self::Bool(mut more)) => own.append(&mut more),
            (Self::Text(own), Self::Text(mut more)) => own.append(&mut more),
            _ => return false,
        }
        true
    }

    /// Keeps the first `len` values only.
    pub fn truncate(&mut self, len: usize) {
        match self {
            Self::Double(values) => values.truncate(len),
            Self::Int64(values) => values.truncate(len),
            Self::Bool(values) => values.truncate(len),
            Self::Text(values) => values.truncate(len),
        }
    }

    /// The values at `indexes`, in their order; no index may be there twice.
    pub fn select(self, indexes: &[usize]) -> Self {
        match self {
            Self::Double(values) => Self::Double(indexes.iter().map(|&index| values[index]).collect()),
            Self::Int64(values) => Self::Int64(indexes.iter().map(|&index| values[index]).collect()),
            Self::Bool(values) => Self::Bool(indexes.iter().map(|&index| values[index]).collect()),
            // Moved and not copied: texts may be most of what is in memory.
            Self::Text(mut values) => Self::Text(indexes.iter().map(|&index| std::mem::take(&mut values[index])).collect()),
        }
    }

    /// A copy of the values of a range of rows.
    pub fn slice(&self, rows: Range<usize>) -> Self {
        match self {
            Self::Double(values) => Self::Double(values[rows].to_vec()),
            Self::Int64(values) => Self::Int64(values[rows].to_vec()),
            Self::Bool(values) => Self::Bool(values[rows].to_vec()),
            Self::Text(values) => Self::Text(values[rows].to_vec()),
        }
    }

    /// How much memory the values take.
    pub fn memory_bytes(&self) -> usize {
        match self {
            Self::Double(values) => size_of_val(values.as_slice()),
            Self::Int64(values) => size_of_val(values.as_slice()),
            Self::Bool(values) => size_of_val(values.as_slice()),
            Self::Text(values) => size_of_val(values.as_slice()) + values.iter().map(String::len).sum::<usize>(),
        }
    }
}

impl From<Value> for Values {
    fn from(value: Value) -> Self {
        match value {
            Value::Double(value) => Self::Double(vec![value]),
            Value::Int64(value) => Self::Int64(vec![value]),
            Value::Bool(value) => Self::Bool(vec![value]),
            Value::Text(value) => Self::Text(vec![value]),
        }
    }
}

/// The two messages that have a column of values have each a generated type of their own for it, which are alike.
macro_rules! wire_values {
    ($wire:path) => {
        impl From<$wire> for Values {
            fn from(values: $wire) -> Self {
                use $wire as Wire;
                match values {
                    Wire::DoubleValues(column) => Self::Double(column.values),
                    Wire::Int64Values(column) => Self::Int64(column.values),
                    Wire::BoolValues(column) => Self::Bool(column.values),
                    Wire::TextValues(column) => Self::Text(column.values),
                }
            }
        }

        impl From<Values> for $wire {
            fn from(values: Values) -> Self {
                match values {
                    Values::Double(values) => Self::DoubleValues(pb::DoubleValues { values }),
                    Values::Int64(values) => Self::Int64Values(pb::Int64Values { values }),
                    Values::Bool(values) => Self::BoolValues(pb::BoolValues { values }),
                    Values::Text(values) => Self::TextValues(pb::TextValues { values }),
                }
            }
        }
    };
}

wire_values!(pb::column::Values);
wire_values!(pb::reading_column::Values);

/// The times of a base and its deltas, in microseconds; `None` when one overflows.
pub fn times_from_deltas(base: i64, deltas: &[i64]) -> Option<Vec<i64>> {
    let mut time = base;
    let mut times = Vec::with_capacity(deltas.len() + 1);
    times.push(time);
    for delta in deltas {
        time = time.checked_add(*delta)?;
        times.push(time);
    }
    Some(times)
}

/// The times by the device's clock, of times as they are stored and what was added to each; the latter may be empty for nothing. `None` when
/// they are not as many.
pub fn device_times(times: &[i64], clock_corrections: &[i64]) -> Option<Vec<i64>> {
    match clock_corrections.len() {
        0 => Some(times.to_vec()),
        len if len == times.len() => Some(times.iter().zip(clock_corrections).map(|(time, added)| time.wrapping_sub(*added)).collect()),
        _ => None,
    }
}

/// The base and the deltas of `times`; a base of 0 when there are none.
pub fn deltas_from_times(times: &[i64]) -> (i64, Vec<i64>) {
    (times.first().copied().unwrap_or(0), times.windows(2).map(|pair| pair[1].wrapping_sub(pair[0])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn times_round_trip(times in prop::collection::vec(-1i64 << 60..1 << 60, 1..50)) {
            let (base, deltas) = deltas_from_times(&times);
            prop_assert_eq!(times_from_deltas(base, &deltas), Some(times));
        }
    }

    #[test]
    fn an_overflow_is_no_time() {
        assert_eq!(times_from_deltas(i64::MAX, &[1]), None);
    }
}
