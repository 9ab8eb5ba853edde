//! Apache Parquet, row group by row group.
//!
//! The crate's own writer cannot go on with a file whose end is not written. So each row group is made on its own, in memory,
//! and what a file's footer says of the groups is kept here, and saved in the form of such a footer.

use super::{Failure, Rows};
use crate::model::columns::Values;
use parquet::{
    basic::Compression,
    data_type::{ByteArray, ByteArrayType, DataType, DoubleType, Int64Type},
    errors::ParquetError,
    file::{
        metadata::{FileMetaData, ParquetMetaData, ParquetMetaDataReader, ParquetMetaDataWriter, RowGroupMetaData},
        properties::{EnabledStatistics, WriterProperties},
        writer::{SerializedFileWriter, SerializedRowGroupWriter},
    },
    schema::{parser::parse_message_type, types::TypePtr},
};
use std::sync::Arc;

/// What a file begins and ends with.
pub const MAGIC: &[u8] = b"PAR1";
/// What stands behind the footer's own bytes: their length, and the magic.
const FOOTER_END_BYTES: usize = 8;

/// Every value has its number, switches as 0 and 1; text has none. What a double rounds of an integer, `int64_value` has in full.
const COLUMNS: &str = "message readings {
    REQUIRED INT64 time (TIMESTAMP(MICROS, true));
    REQUIRED BYTE_ARRAY device (STRING);
    REQUIRED BYTE_ARRAY sensor (STRING);
    REQUIRED BYTE_ARRAY unit (STRING);
    OPTIONAL DOUBLE value;
    OPTIONAL INT64 int64_value;
    OPTIONAL BYTE_ARRAY text_value (STRING);
";
const DEVICE_TIME: &str = "REQUIRED INT64 device_time (TIMESTAMP(MICROS, true));";

impl From<ParquetError> for Failure {
    fn from(error: ParquetError) -> Self {
        Self::Failed(format!("the Parquet file can't be written: {error}"))
    }
}

/// The groups that were written, and the rows that are to become the next.
#[derive(Default)]
pub struct RowGroups {
    written: Vec<RowGroupMetaData>,
    times: Vec<i64>,
    // Where the file has this column.
    device_times: Option<Vec<i64>>,
    devices: Vec<ByteArray>,
    sensors: Vec<ByteArray>,
    units: Vec<ByteArray>,
    doubles: Optional<f64>,
    integers: Optional<i64>,
    texts: Optional<ByteArray>,
}

/// A column that has a value in some rows.
struct Optional<T> {
    values: Vec<T>,
    // 1 where there is a value: Parquet's definition level.
    levels: Vec<i16>,
}

impl<T> Default for Optional<T> {
    fn default() -> Self {
        Self { values: Vec::new(), levels: Vec::new() }
    }
}

impl<T> Optional<T> {
    fn some(&mut self, values: impl IntoIterator<Item = T>) {
        self.values.extend(values);
    }

    /// For rows of which all or none were given to [`some`](Self::some).
    fn levels(&mut self, rows: usize, have_values: bool) {
        self.levels.resize(self.levels.len() + rows, i16::from(have_values));
    }
}

impl RowGroups {
    /// Of a new file, with or without the times by the devices' clocks.
    pub fn new(device_time: bool) -> Self {
        Self { device_times: device_time.then(Vec::new), ..Self::default() }
    }

    /// With the groups of a [footer](Self::footer).
    pub fn restore(device_time: bool, footer: &[u8]) -> Result<Self, Failure> {
        let metadata = ParquetMetaDataReader::decode_metadata(&footer[..footer.len().saturating_sub(FOOTER_END_BYTES)])?;
        Ok(Self { written: metadata.row_groups().to_vec(), ..Self::new(device_time) })
    }

    /// Takes rows for the next group.
    pub fn take(&mut self, rows: &Rows) {
        let count = rows.len();
        self.times.extend_from_slice(&rows.times);
        if let Some(times) = &mut self.device_times {
            times.extend_from_slice(&rows.device_times);
        }
        // Copies of these share one text.
        for (column, text) in [(&mut self.devices, &rows.device), (&mut self.sensors, &rows.sensor), (&mut self.units, &rows.unit)] {
            let text = ByteArray::from(text.as_str());
            column.resize(column.len() + count, text);
        }
        match &rows.values {
            Values::Double(values) => self.doubles.some(values.iter().copied()),
            Values::Int64(values) => {
                self.doubles.some(values.iter().map(|&value| value as f64));
                self.integers.some(values.iter().copied());
            }
            Values::Bool(values) => self.doubles.some(values.iter().map(|&on| f64::from(u8::from(on)))),
            Values::Text(values) => self.texts.some(values.iter().map(|text| ByteArray::from(text.as_str()))),
        }
        let is_text = matches!(rows.values, Values::Text(_));
        self.doubles.levels(count, !is_text);
        self.integers.levels(count, matches!(rows.values, Values::Int64(_)));
        self.texts.levels(count, is_text);
    }

    /// The rows that were taken as a group that stands at this place of the file.
    pub fn flush(&mut self, at: u64) -> Result<Vec<u8>, Failure> {
        if self.times.is_empty() {
            return Ok(Vec::new());
        }
        let empty = Self::new(self.device_times.is_some());
        let rows = std::mem::replace(self, empty);
        let mut file = self.new_file()?;
        let mut group = file.next_row_group()?;
        write_column::<Int64Type>(&mut group, &rows.times, None)?;
        write_column::<ByteArrayType>(&mut group, &rows.devices, None)?;
        write_column::<ByteArrayType>(&mut group, &rows.sensors, None)?;
        write_column::<ByteArrayType>(&mut group, &rows.units, None)?;
        write_column::<DoubleType>(&mut group, &rows.doubles.values, Some(&rows.doubles.levels))?;
        write_column::<Int64Type>(&mut group, &rows.integers.values, Some(&rows.integers.levels))?;
        write_column::<ByteArrayType>(&mut group, &rows.texts.values, Some(&rows.texts.levels))?;
        if let Some(times) = &rows.device_times {
            write_column::<Int64Type>(&mut group, times, None)?;
        }
        let metadata = group.close()?;
        file.flush().map_err(ParquetError::from)?;
        let bytes = file.inner()[MAGIC.len()..].to_vec();
        self.written = rows.written;
        let ordinal = i32::try_from(self.written.len()).unwrap_or(i32::MAX);
        let moved = i64::try_from(at).unwrap_or(i64::MAX) - MAGIC.len() as i64;
        self.written.push(moved_by(moved, ordinal, &metadata)?);
        Ok(bytes)
    }

    /// The end of a file that has the groups that were written.
    pub fn footer(&self) -> Result<Vec<u8>, Failure> {
        let rows = self.written.iter().map(RowGroupMetaData::num_rows).sum();
        let of_empty = self.new_file()?.close()?;
        let of_empty = of_empty.file_metadata();
        let of_file = FileMetaData::new(
            of_empty.version(),
            rows,
            Some(concat!("tidegate ", env!("CARGO_PKG_VERSION")).to_owned()),
            None,
            of_empty.schema_descr_ptr(),
            of_empty.column_orders().cloned(),
        );
        let metadata = ParquetMetaData::new(of_file, self.written.clone());
        let mut footer = Vec::new();
        ParquetMetaDataWriter::new(&mut footer, &metadata).finish()?;
        Ok(footer)
    }

    fn new_file(&self) -> Result<SerializedFileWriter<Vec<u8>>, ParquetError> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_statistics_enabled(EnabledStatistics::Chunk)
            // Indexes of pages stand behind all groups, where there is no place for them here.
            .set_offset_index_disabled(true)
            .build();
        let device_time = if self.device_times.is_some() { DEVICE_TIME } else { "" };
        let schema: TypePtr = Arc::new(parse_message_type(&format!("{COLUMNS}{device_time} }}"))?);
        SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties))
    }
}

fn write_column<T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, Vec<u8>>,
    values: &[T::T],
    levels: Option<&[i16]>,
) -> Result<(), ParquetError> {
    let mut column = group.next_column()?.expect("the schema has this column");
    column.typed::<T>().write_batch(values, levels, None)?;
    column.close()
}

/// The same group, further back in a file.
fn moved_by(bytes: i64, ordinal: i32, group: &RowGroupMetaData) -> Result<RowGroupMetaData, ParquetError> {
    let columns = group.columns().iter().map(|column| {
        let dictionary = column.dictionary_page_offset().map(|offset| offset + bytes);
        let data = column.data_page_offset() + bytes;
        column.clone().into_builder().set_dictionary_page_offset(dictionary).set_data_page_offset(data).build()
    });
    let columns = columns.collect::<Result<Vec<_>, _>>()?;
    let begin = group.file_offset().map_or(bytes, |offset| offset + bytes);
    group.clone().into_builder().set_column_metadata(columns).set_file_offset(begin).set_ordinal(ordinal).build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use parquet::{
        file::reader::{FileReader, SerializedFileReader},
        record::RowAccessor,
    };

    #[test]
    fn the_times_by_the_devices_clock_are_a_column_of_their_own_also_when_it_is_gone_on_with() {
        let rows = |time| Rows {
            device: "pump-1".to_owned(),
            sensor: "flow".to_owned(),
            unit: "l/s".to_owned(),
            times: vec![time],
            device_times: vec![time + 7],
            values: Values::Double(vec![0.5]),
        };
        let mut groups = RowGroups::new(true);
        groups.take(&rows(1));
        let mut file = [MAGIC, &groups.flush(MAGIC.len() as u64).expect("written")].concat();
        let mut groups = RowGroups::restore(true, &groups.footer().expect("written")).expect("its own output");
        groups.take(&rows(2));
        file.extend(groups.flush(file.len() as u64).expect("written"));
        file.extend(groups.footer().expect("written"));
        let read = SerializedFileReader::new(Bytes::from(file)).expect("a file");
        let read = read.get_row_iter(None).expect("rows").map(|row| row.expect("a row"));
        let times: Vec<(i64, i64)> =
            read.map(|row| (row.get_timestamp_micros(0).expect("set"), row.get_timestamp_micros(7).expect("set"))).collect();
        assert_eq!(times, [(1, 8), (2, 9)]);
    }
}
