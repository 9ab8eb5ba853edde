//! What a batch costs before it is admitted: its check, for the sizes that devices send.
#![allow(missing_docs, reason = "criterion's macros make public items")]

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use prost::Message;
use std::{hint::black_box, time::Duration};
use tidegate::{
    model::{BatchLimits, CheckedBatch, Timestamp, batch::KnownSensor, scan::Column},
    pb,
};

fn batch(sensors: usize, rows: usize) -> Bytes {
    let column = |sensor: usize| {
        let values = (0..rows).map(|row| (2_000 + 7 * row + sensor) as f64 / 100.0).collect();
        let values = Some(pb::column::Values::DoubleValues(pb::DoubleValues { values }));
        pb::Column { sensor: format!("temperature_{sensor}"), unit: "Cel".to_owned(), values }
    };
    let base_time_us = 1_767_225_600_000_000;
    let frame = pb::Frame {
        base_time_us,
        time_deltas_us: vec![1_000_000; rows - 1],
        columns: (0..sensors).map(column).collect(),
        ..Default::default()
    };
    pb::Batch { frames: vec![frame] }.encode_to_vec().into()
}

fn check(criterion: &mut Criterion) {
    let limits = BatchLimits {
        bytes_max: 1 << 20,
        readings_max: 100_000,
        sensors_max: 1_000,
        time_skew_max: Duration::from_secs(3_600),
        reading_age_max: Duration::ZERO,
    };
    let mut group = criterion.benchmark_group("check");
    for (sensors, rows) in [(1, 1), (10, 1), (10, 10), (10, 100)] {
        let bytes = batch(sensors, rows);
        group.throughput(Throughput::Elements((sensors * rows) as u64));
        let size = sensors * rows;
        // A batch of sensors that the device has, and one that has to be decoded since they are new.
        let mut key = 0;
        let mut known = |_: &Column<'_>| {
            key += 1;
            Some(KnownSensor { key, allow_non_finite: false })
        };
        group.bench_function(BenchmarkId::new("known", size), |bencher| {
            bencher.iter(|| CheckedBatch::check(black_box(&bytes), &limits, Timestamp::now(), &mut known).expect("a good batch"));
        });
        group.bench_function(BenchmarkId::new("new", size), |bencher| {
            bencher.iter(|| CheckedBatch::check(black_box(&bytes), &limits, Timestamp::now(), |_| None).expect("a good batch"));
        });
    }
    group.finish();
}

criterion_group!(benches, check);
criterion_main!(benches);
