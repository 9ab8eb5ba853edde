//! The sensors of one device as of one moment, arranged for the hot path.

use crate::{
    model::{ValueKind, batch::KnownSensor, scan},
    store::SensorRow,
};
use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// See the [module](self). Its sensors never change: a device with others gets a new one. Only their order is learnt.
#[derive(Debug, Default)]
pub struct Sensors {
    // In the order of their registration: of those that came in one batch alphabetically.
    rows: Vec<SensorRow>,
    by_name: HashMap<String, usize>,
    // Which of them a batch named behind each, and, as the last, which it named first: a device mostly keeps to an order. No more than a
    // guess, so that it does not matter which of two batches that are read at once has its say.
    successors: Vec<AtomicUsize>,
}

/// How far the sensors of a batch were looked for; see [`Sensors::index_of`].
#[derive(Debug, Default)]
pub struct Cursor {
    last: Option<usize>,
}

impl Sensors {
    /// These and `rows`, which take the place of those with the same names. No name may be twice in `rows`.
    pub fn with(&self, rows: impl IntoIterator<Item = SensorRow>) -> Self {
        let mut all = self.rows.clone();
        for row in rows {
            match self.by_name.get(&row.name) {
                Some(&index) => all[index] = row,
                None => all.push(row),
            }
        }
        all.sort_by_key(|row| row.key);
        let by_name = all.iter().enumerate().map(|(index, row)| (row.name.clone(), index)).collect();
        let successors = (0..=all.len()).map(|index| AtomicUsize::new(if index + 1 < all.len() { index + 1 } else { 0 })).collect();
        Self { rows: all, by_name, successors }
    }

    /// A sensor by its name.
    pub fn get(&self, name: &str) -> Option<&SensorRow> {
        self.index(name).map(|index| self.at(index))
    }

    /// A sensor's number among these.
    pub fn index(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// A sensor by its number.
    pub fn by_key(&self, key: i64) -> Option<&SensorRow> {
        self.rows.binary_search_by_key(&key, |row| row.key).ok().map(|index| &self.rows[index])
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The number of a column's sensor among these. It is looked for first where a batch before had it: behind the column
    /// before, which `cursor` remembers.
    #[inline]
    pub fn index_of(&self, column: &scan::Column<'_>, cursor: &mut Cursor) -> Option<usize> {
        let successor = self.successors.get(cursor.last.unwrap_or(self.rows.len()))?;
        let guess = successor.load(Relaxed);
        let is_right = self.rows.get(guess).is_some_and(|row| row.name.as_bytes() == column.sensor);
        let index = if is_right { guess } else { self.look_up(column, successor)? };
        cursor.last = Some(index);
        Some(index)
    }

    #[cold]
    fn look_up(&self, column: &scan::Column<'_>, successor: &AtomicUsize) -> Option<usize> {
        let index = self.index(std::str::from_utf8(column.sensor).ok()?)?;
        successor.store(index, Relaxed);
        Some(index)
    }

    /// The sensor with a number among these.
    pub fn at(&self, index: usize) -> &SensorRow {
        &self.rows[index]
    }

    /// Finds the sensors of columns, for [`crate::model::CheckedBatch::check`].
    pub fn finder(&self) -> impl FnMut(&scan::Column<'_>) -> Option<KnownSensor> {
        let mut cursor = Cursor::default();
        move |column| {
            let row = self.at(self.index_of(column, &mut cursor)?);
            agrees(row, column.unit, column.values.kind).then_some(KnownSensor { key: row.key, allow_non_finite: row.allow_non_finite })
        }
    }
}

fn agrees(row: &SensorRow, unit: &[u8], kind: ValueKind) -> bool {
    row.kind == kind && (unit.is_empty() || row.unit.as_bytes() == unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Timestamp, pb};
    use prost::Message;

    fn sensors(names: &[&str]) -> Sensors {
        let row = |(name, key): (&&str, i64)| SensorRow {
            key,
            name: (*name).to_owned(),
            unit: String::new(),
            kind: ValueKind::Double,
            allow_non_finite: false,
            create_time: Timestamp::now(),
        };
        Sensors::default().with(names.iter().zip(1..).map(row))
    }

    /// The numbers of the sensors that a batch names, and how many of them were guessed right.
    fn find(sensors: &Sensors, names: &[&str]) -> (Vec<Option<usize>>, usize) {
        let (mut cursor, mut guessed) = (Cursor::default(), 0);
        let numbers = names.iter().map(|name| {
            let batch = pb::Batch { frames: vec![pb::Frame { columns: vec![column(name)], ..Default::default() }] }.encode_to_vec();
            let frame = scan::frames(&batch).next().expect("one").expect("as usual");
            let column = frame.columns().next().expect("one").expect("as usual");
            let guess = sensors.successors.get(cursor.last.unwrap_or(sensors.len())).map(|guess| guess.load(Relaxed));
            let index = sensors.index_of(&column, &mut cursor);
            guessed += usize::from(index.is_some() && index == guess);
            index
        });
        (numbers.collect(), guessed)
    }

    fn column(name: &str) -> pb::Column {
        let values = Some(pb::column::Values::DoubleValues(pb::DoubleValues { values: vec![1.0] }));
        pb::Column { sensor: name.to_owned(), unit: String::new(), values }
    }

    #[test]
    fn learns_the_order_in_which_a_device_names_its_sensors() {
        let sensors = sensors(&["a", "b", "c", "d"]);
        let order = ["c", "a", "d"];
        let numbers = vec![Some(2), Some(0), Some(3)];
        assert_eq!(find(&sensors, &order), (numbers.clone(), 0));
        assert_eq!(find(&sensors, &order), (numbers, 3));
        // Two frames that name them in turn.
        let twice = [order, order].concat();
        find(&sensors, &twice);
        assert_eq!(find(&sensors, &twice).1, 6);
        // What it learnt is a guess, and no more.
        assert_eq!(find(&sensors, &["a", "b", "unknown", "c", "d"]).0, [Some(0), Some(1), None, Some(2), Some(3)]);
    }

    #[test]
    fn expects_the_order_of_registration_at_first() {
        let sensors = sensors(&["b", "a", "c"]);
        assert_eq!(find(&sensors, &["b", "a", "c", "b"]), (vec![Some(0), Some(1), Some(2), Some(0)], 4));
        assert_eq!(find(&Sensors::default(), &["a"]).0, [None]);
    }
}
