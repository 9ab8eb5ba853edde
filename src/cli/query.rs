//! `tidegate query`: stored readings, as a table, CSV or JSON lines.

use super::{
    Failure,
    client::{ClientArgs, MESSAGE_BYTES_MAX},
    export::Rows,
    parse,
    print::{self, Table},
};
use crate::{
    model::Timestamp,
    pb::{self, query_readings_response::Message, reading_service_client::ReadingServiceClient},
};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::{io::Write, time::Duration};

#[derive(Debug, Args)]
pub struct QueryArgs {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = parse::device)]
    device: String,
    /// Only this sensor; may be given several times.
    #[arg(long = "sensor", value_name = "NAME")]
    sensors: Vec<String>,
    /// The first time to read: RFC 3339, or before now such as -1h.
    #[arg(long, value_name = "TIME", value_parser = parse::time, allow_hyphen_values = true)]
    start: Option<Timestamp>,
    /// The time before which to stop, as --start.
    #[arg(long, value_name = "TIME", value_parser = parse::time, allow_hyphen_values = true)]
    end: Option<Timestamp>,
    /// Aggregate over spans of this length: count, smallest, largest, mean, first and last value.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    bucket: Option<Duration>,
    /// Also show each reading's time by the device's clock, which is another where the gateway corrected it.
    #[arg(long, conflicts_with = "bucket")]
    device_time: bool,
    /// How to print.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Columns for people, sensor by sensor.
    Table,
    /// RFC 4180, with a line of names.
    Csv,
    /// One JSON object a line.
    Json,
}

/// Writes an answer as it comes in; nothing of it is kept.
pub async fn run(args: QueryArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let QueryArgs { device, sensors, start, end, bucket, device_time, format, client } = args;
    let request = pb::QueryReadingsRequest {
        device,
        sensors,
        start_time: start.map(Timestamp::to_proto),
        end_time: end.map(Timestamp::to_proto),
        bucket: bucket.map(parse::duration_to_proto),
    };
    let mut service = ReadingServiceClient::new(client.connect().await?).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut stream = client.answer(service.query_readings(request)).await?;
    let mut printer = Printer::new(format, bucket.is_some(), device_time, out)?;
    while let Some(response) = client.next(&mut stream).await? {
        match response.message {
            Some(Message::Readings(column)) => printer.readings(column)?,
            Some(Message::Buckets(column)) => printer.buckets(&column)?,
            Some(Message::Summary(summary)) => {
                if summary.readings == 0 {
                    eprintln!("no readings");
                }
                return Ok(());
            }
            None => {}
        }
    }
    Err(Failure::Failed("the answer ended before its summary: what was printed is not all".to_owned()))
}

const READING_NAMES: [&str; 4] = ["time", "sensor", "value", "unit"];
const DEVICE_TIME: &str = "device_time";
const BUCKET_NAMES: [&str; 9] = ["time", "sensor", "unit", "count", "min", "max", "avg", "first", "last"];

struct Printer<'a> {
    format: Format,
    device_time: bool,
    /// The sensor whose heading was printed last.
    sensor: Option<String>,
    out: &'a mut dyn Write,
}

impl<'a> Printer<'a> {
    fn new(format: Format, buckets: bool, device_time: bool, out: &'a mut dyn Write) -> Result<Self, Failure> {
        if format == Format::Csv {
            let mut rows = csv::Writer::from_writer(Vec::new());
            let names = if buckets { &BUCKET_NAMES[..] } else { &READING_NAMES[..] };
            rows.write_record(names.iter().copied().chain(device_time.then_some(DEVICE_TIME)))?;
            write_csv(rows, out)?;
        }
        Ok(Self { format, device_time, sensor: None, out })
    }

    fn readings(&mut self, column: pb::ReadingColumn) -> Result<(), Failure> {
        let Rows { sensor, unit, times, device_times, values, .. } = Rows::of(String::new(), column)?;
        self.heading(&sensor, &unit)?;
        let (mut table, mut rows) = (Table::bare(), csv::Writer::from_writer(Vec::new()));
        for (row, &time) in times.iter().enumerate() {
            let value = values.get(row).expect("as many values as times");
            let own = self.device_time.then(|| print::time(device_times[row]));
            match self.format {
                Format::Table => table.row([print::time(time), print::value(&value)].into_iter().chain(own)),
                Format::Csv => {
                    rows.write_record([print::time(time), sensor.clone(), print::value(&value), unit.clone()].into_iter().chain(own))?
                }
                Format::Json => {
                    let mut line = json!({"time": print::time(time), "sensor": sensor, "value": print::json_value(&value), "unit": unit});
                    if let Some(own) = own {
                        line[DEVICE_TIME] = own.into();
                    }
                    writeln!(self.out, "{line}")?;
                }
            }
        }
        table.write(self.out, "  ")?;
        write_csv(rows, self.out)
    }

    fn buckets(&mut self, column: &pb::BucketColumn) -> Result<(), Failure> {
        let new = self.heading(&column.sensor, &column.unit)?;
        let mut table = if new && self.format == Format::Table {
            Table::new(&["TIME", "COUNT", "MIN", "MAX", "AVG", "FIRST", "LAST"])
        } else {
            Table::bare()
        };
        let mut rows = csv::Writer::from_writer(Vec::new());
        for (row, (&time, count)) in column.start_times_us.iter().zip(&column.counts).enumerate() {
            let (time, count) = (print::time(time), count.to_string());
            // A text sensor has counts only.
            let numbers =
                [&column.minimums, &column.maximums, &column.averages, &column.firsts, &column.lasts].map(|all| all.get(row).copied());
            let texts = numbers.map(|number| number.map(print::double).unwrap_or_default());
            match self.format {
                Format::Table => table.row([time, count].into_iter().chain(texts)),
                Format::Csv => {
                    let head = [&time, &column.sensor, &column.unit, &count].map(String::as_str);
                    rows.write_record(head.into_iter().chain(texts.iter().map(String::as_str)))?;
                }
                Format::Json => {
                    let mut line = json!({"time": time, "sensor": column.sensor, "unit": column.unit, "count": column.counts[row]});
                    for (name, number) in BUCKET_NAMES[4..].iter().zip(numbers) {
                        line[*name] = number.map(print::json_double).into();
                    }
                    writeln!(self.out, "{line}")?;
                }
            }
        }
        table.write(self.out, "  ")?;
        write_csv(rows, self.out)
    }

    /// Above a sensor's part of a table; whether this is where it begins.
    fn heading(&mut self, sensor: &str, unit: &str) -> Result<bool, Failure> {
        if self.sensor.as_deref() == Some(sensor) {
            return Ok(false);
        }
        if self.format == Format::Table {
            let unit = if unit.is_empty() { String::new() } else { format!(" ({})", print::shown(unit)) };
            writeln!(self.out, "{}{unit}", print::shown(sensor))?;
        }
        self.sensor = Some(sensor.to_owned());
        Ok(true)
    }
}

/// The rows of one message at once: flushing a [`csv::Writer`] flushes what is below it too.
fn write_csv(rows: csv::Writer<Vec<u8>>, out: &mut dyn Write) -> Result<(), Failure> {
    let rows = rows.into_inner().map_err(|error| error.into_error())?;
    Ok(out.write_all(&rows)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(format: Format, buckets: bool, print: impl Fn(&mut Printer<'_>)) -> String {
        let mut out = Vec::new();
        let mut printer = Printer::new(format, buckets, false, &mut out).expect("memory takes it");
        print(&mut printer);
        String::from_utf8(out).expect("UTF-8")
    }

    fn column(base_time_us: i64) -> pb::ReadingColumn {
        let values = pb::reading_column::Values::TextValues(pb::TextValues { values: vec!["on".into(), "a,\"b\"".into()] });
        pb::ReadingColumn {
            sensor: "state".into(),
            unit: String::new(),
            base_time_us,
            time_deltas_us: vec![1_000_000],
            values: Some(values),
            clock_corrections_us: vec![],
        }
    }

    fn bucket_column() -> pb::BucketColumn {
        pb::BucketColumn {
            sensor: "flow".into(),
            unit: "l/s".into(),
            kind: 1,
            start_times_us: vec![0],
            counts: vec![2],
            minimums: vec![f64::NAN],
            maximums: vec![3.0],
            averages: vec![2.5],
            firsts: vec![2.0],
            lasts: vec![3.0],
        }
    }

    #[test]
    fn csv_has_names_and_quotes_what_needs_it() {
        assert_eq!(
            printed(Format::Csv, false, |printer| printer.readings(column(0)).expect("printed")),
            "time,sensor,value,unit\n1970-01-01T00:00:00.000Z,state,on,\n1970-01-01T00:00:01.000Z,state,\"a,\"\"b\"\"\",\n"
        );
        assert_eq!(
            printed(Format::Csv, true, |printer| printer.buckets(&bucket_column()).expect("printed")),
            "time,sensor,unit,count,min,max,avg,first,last\n1970-01-01T00:00:00.000Z,flow,l/s,2,NaN,3,2.5,2,3\n"
        );
    }

    #[test]
    fn the_time_by_the_devices_clock_is_shown_when_asked_for() {
        for (format, expected) in [
            (Format::Csv, "time,sensor,value,unit,device_time\n1970-01-01T00:00:00.000Z,state,on,,1970-01-01T00:00:05.000Z\n"),
            (Format::Json, "\"device_time\":\"1970-01-01T00:00:05.000Z\""),
            (Format::Table, "1970-01-01T00:00:00.000Z  on     1970-01-01T00:00:05.000Z"),
        ] {
            let mut out = Vec::new();
            let column = pb::ReadingColumn { clock_corrections_us: vec![-5_000_000, 0], ..column(0) };
            Printer::new(format, false, true, &mut out).expect("memory takes it").readings(column).expect("printed");
            let text = String::from_utf8(out).expect("UTF-8");
            assert!(text.contains(expected), "{text}");
        }
        let mut out = Vec::new();
        let mut printer = Printer::new(Format::Csv, false, true, &mut out).expect("memory takes it");
        assert!(printer.readings(pb::ReadingColumn { clock_corrections_us: vec![1], ..column(0) }).is_err(), "not one a reading");
    }

    #[test]
    fn a_table_names_each_sensor_once() {
        let text = printed(Format::Table, false, |printer| {
            printer.readings(column(0)).expect("printed");
            printer.readings(column(5_000_000)).expect("printed");
        });
        assert_eq!(text.lines().filter(|line| *line == "state").count(), 1, "{text}");
        assert_eq!(text.lines().count(), 5);
        let text = printed(Format::Table, true, |printer| printer.buckets(&bucket_column()).expect("printed"));
        assert_eq!(text.lines().next(), Some("flow (l/s)"));
    }

    #[test]
    fn json_is_one_object_a_line() {
        let text = printed(Format::Json, true, |printer| printer.buckets(&bucket_column()).expect("printed"));
        let line: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((&line["min"], &line["avg"], &line["count"]), (&json!("NaN"), &json!(2.5), &json!(2)));
    }

    #[test]
    fn a_column_that_does_not_add_up_is_an_error() {
        let mut out = Vec::new();
        let mut printer = Printer::new(Format::Csv, false, false, &mut out).expect("memory takes it");
        assert!(printer.readings(pb::ReadingColumn { time_deltas_us: vec![], ..column(0) }).is_err());
    }
}
