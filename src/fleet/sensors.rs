//! The sensors of one device as of one moment, arranged for the hot path.

use crate::{
    model::{ValueKind, batch::KnownSensor, scan},
    store::SensorRow,
};
use std::collections::HashMap;

/// See the [module](self). It never changes: a device gets a new one.
#[derive(Debug, Default)]
pub struct Sensors {
    // In the order of their registration, which is mostly that in which the device's batches name them.
    rows: Vec<SensorRow>,
    by_name: HashMap<String, usize>,
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
        Self { rows: all, by_name }
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

    /// The number of a column's sensor among these; it is looked for first at `next`, which is then moved on. Behind the last comes the first, as
    /// each frame of a batch mostly names all.
    pub fn index_of(&self, column: &scan::Column<'_>, next: &mut usize) -> Option<usize> {
        let expected = if *next < self.rows.len() { *next } else { 0 };
        let is_next = self.rows.get(expected).is_some_and(|row| row.name.as_bytes() == column.sensor);
        let index = if is_next { expected } else { *self.by_name.get(std::str::from_utf8(column.sensor).ok()?)? };
        *next = index + 1;
        Some(index)
    }

    /// The sensor with a number among these.
    pub fn at(&self, index: usize) -> &SensorRow {
        &self.rows[index]
    }

    /// Finds the sensors of columns, for [`crate::model::CheckedBatch::check`].
    pub fn finder(&self) -> impl FnMut(&scan::Column<'_>) -> Option<KnownSensor> {
        let mut next = 0;
        move |column| {
            let row = self.at(self.index_of(column, &mut next)?);
            agrees(row, column.unit, column.values.kind).then_some(KnownSensor { key: row.key, allow_non_finite: row.allow_non_finite })
        }
    }
}

fn agrees(row: &SensorRow, unit: &[u8], kind: ValueKind) -> bool {
    row.kind == kind && (unit.is_empty() || row.unit.as_bytes() == unit)
}
