//! The chunks, and the latest readings.

use super::*;
use crate::support::database::on_each_database;
use std::ops::Range;
use tidegate::{
    history::chunk::Chunk,
    model::columns::Values,
    store::{Extent, LatestRow, NewChunk},
};

on_each_database!(
    a_chunk_comes_back_as_it_was_written,
    chunks_are_found_by_the_times_that_they_reach_into,
    new_readings_find_the_chunks_around_them,
    the_chunks_that_end_first_are_deleted_first,
    the_latest_readings_are_as_of_a_position,
);

/// A chunk with a reading a second.
pub fn chunk(sensor_key: i64, seconds: Range<i64>) -> NewChunk {
    let (times, values): (Vec<i64>, Vec<f64>) = seconds.map(|second| (at(second).micros(), second as f64 / 100.0)).unzip();
    NewChunk { sensor_key, complete: false, chunk: Chunk::encode(&times, &Values::Double(values)) }
}

/// Puts chunks in the place of others, as the gateway that merges does.
pub async fn replace(store: &Store, gone: &[i64], new: &[NewChunk]) {
    assert!(store.lead_upkeep().await.expect("asked"), "there is no other gateway");
    let mut tx = store.begin().await.expect("begun");
    tx.replace_chunks(gone, new).await.expect("written");
    tx.commit().await.expect("committed");
}

/// In which second each chunk of a sensor begins.
pub async fn firsts(store: &Store, sensor_key: i64) -> Vec<i64> {
    firsts_within(store, sensor_key, i64::MIN..i64::MAX, 1_000).await
}

async fn firsts_within(store: &Store, sensor_key: i64, times: Range<i64>, chunks_max: usize) -> Vec<i64> {
    let chunks = store.read_chunks(sensor_key, times.start, times.end, chunks_max).await.expect("read");
    chunks.iter().map(|chunk| (chunk.first_time - T0) / SECOND).collect()
}

async fn a_chunk_comes_back_as_it_was_written(database: Database) {
    let fixture = Fixture::on(database).await;
    let sensor = fixture.sensor("t").await;
    let times = [at(0).micros(), at(1).micros() + 7, at(5).micros() - 1];
    let values = [
        Values::Double(vec![21.5, -0.25, 1e300]),
        Values::Int64(vec![i64::MIN, 0, i64::MAX]),
        Values::Bool(vec![true, false, true]),
        Values::Text(vec!["".into(), "it's \"ü\"\n\u{0}".into(), "\\u0000".into()]),
    ];
    for values in values {
        let clock_corrections = matches!(values, Values::Bool(_)).then(|| "[[0,0],[1,-5]]".to_owned());
        let chunk = Chunk { clock_corrections, ..Chunk::encode(&times, &values) };
        let spans = fixture.store.chunks_around(&[extent(sensor.key, 0, 10)]).await.expect("read");
        let gone: Vec<i64> = spans.iter().map(|span| span.key).collect();
        replace(&fixture.store, &gone, &[NewChunk { sensor_key: sensor.key, complete: true, chunk: chunk.clone() }]).await;
        let found = fixture.store.read_chunks(sensor.key, i64::MIN, i64::MAX, 10).await.expect("read");
        assert_eq!(found, [chunk], "the one before is gone");
        assert_eq!(found[0].decode(values.kind()), Some((times.to_vec(), values)));
    }
    fixture.store.close().await;
}

fn extent(sensor_key: i64, first: i64, last: i64) -> Extent {
    Extent { sensor_key, first_time: at(first).micros(), last_time: at(last).micros() }
}

async fn chunks_are_found_by_the_times_that_they_reach_into(database: Database) {
    let fixture = Fixture::on(database).await;
    let (sensor, other) = (fixture.sensor("t").await.key, fixture.sensor("u").await.key);
    let new = [20..30, 0..10, 10..20, 40..50].map(|seconds| chunk(sensor, seconds));
    replace(&fixture.store, &[], &new).await;
    replace(&fixture.store, &[], &[chunk(other, 0..100)]).await;
    let within =
        async |first, end, chunks_max| firsts_within(&fixture.store, sensor, at(first).micros()..at(end).micros(), chunks_max).await;
    assert_eq!(within(0, 100, 10).await, [0, 10, 20, 40], "in the order of time");
    assert_eq!(within(0, 100, 2).await, [0, 10]);
    assert_eq!(within(9, 10, 10).await, [0], "the start is in the span, the end is not");
    assert_eq!(within(9, 11, 10).await, [0, 10]);
    assert_eq!(within(30, 40, 10).await, [0; 0]);

    let spans = fixture.store.chunks_around(&[extent(sensor, 0, 99)]).await.expect("read");
    let mut keys: Vec<i64> = spans.iter().filter(|span| span.first_time != at(20).micros()).map(|span| span.key).collect();
    keys.push(999);
    let named = fixture.store.chunks(&keys).await.expect("read");
    let mut named: Vec<_> = named.iter().map(|(key, chunk)| (keys.contains(key), (chunk.first_time - T0) / SECOND)).collect();
    named.sort_unstable();
    assert_eq!(named, [(true, 0), (true, 10), (true, 40)]);
    fixture.store.close().await;
}

async fn new_readings_find_the_chunks_around_them(database: Database) {
    let fixture = Fixture::on(database).await;
    let (sensor, other) = (fixture.sensor("t").await.key, fixture.sensor("u").await.key);
    let complete = |seconds| NewChunk { complete: true, ..chunk(sensor, seconds) };
    replace(&fixture.store, &[], &[complete(0..10), complete(10..20), chunk(sensor, 20..30), chunk(sensor, 30..40)]).await;
    replace(&fixture.store, &[], &[chunk(other, 0..10)]).await;
    let around = async |extents: &[Extent]| {
        let mut spans = fixture.store.chunks_around(extents).await.expect("read");
        spans.sort_unstable_by_key(|span| (span.sensor_key, span.last_time));
        assert!(spans.iter().all(|span| span.readings == 10 && span.last_time - span.first_time == 9 * SECOND));
        spans.iter().map(|span| (span.sensor_key, (span.first_time - T0) / SECOND, span.complete)).collect::<Vec<_>>()
    };
    let of = |first, is_complete| (sensor, first, is_complete);
    // Behind all: the last that is complete, and what follows it.
    assert_eq!(around(&[extent(sensor, 50, 60)]).await, [of(10, true), of(20, false), of(30, false)]);
    assert_eq!(around(&[extent(sensor, 12, 13)]).await, [of(0, true), of(10, true)]);
    assert_eq!(around(&[extent(sensor, -9, -8)]).await, []);
    assert_eq!(around(&[extent(sensor, 12, 25), extent(other, 3, 4)]).await, [of(0, true), of(10, true), of(20, false), (other, 0, false)]);
    assert_eq!(around(&[]).await, []);
    fixture.store.close().await;
}

async fn the_chunks_that_end_first_are_deleted_first(database: Database) {
    let fixture = Fixture::on(database).await;
    let (sensor, other) = (fixture.sensor("t").await.key, fixture.sensor("u").await.key);
    let used = fixture.store.used_bytes().await.expect("read");
    replace(&fixture.store, &[], &[chunk(sensor, 0..10), chunk(other, 5..8), chunk(sensor, 10..20), chunk(other, 20..30)]).await;
    assert!(fixture.store.used_bytes().await.expect("read") >= used);
    let delete = async |before: Option<i64>, chunks_max| {
        let mut tx = fixture.store.begin().await.expect("begun");
        let deleted = tx.delete_oldest_chunks(before.map(|before| at(before).micros()), chunks_max).await.expect("deleted");
        tx.commit().await.expect("committed");
        (deleted.batches, deleted.readings)
    };
    assert_eq!(delete(Some(7), 10).await, (0, 0), "a chunk goes when all of it is older");
    assert_eq!(delete(Some(10), 1).await, (1, 3), "the one that ends first");
    assert_eq!(delete(Some(10), 10).await, (1, 10));
    assert_eq!(delete(None, 10).await, (2, 20));
    assert_eq!((firsts(&fixture.store, sensor).await, firsts(&fixture.store, other).await), (vec![], vec![]));
    assert!(!fixture.store.release_space(1 << 30).await.expect("asked"), "there is less than is to be kept");
    fixture.store.close().await;
}

async fn the_latest_readings_are_as_of_a_position(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    let row = |sensor_key, seconds, batch: &'static str, position| LatestRow {
        sensor_key,
        device: *device,
        time: at(seconds),
        batch: batch.into(),
        position: Position(position),
    };
    assert_eq!(store.latest().await.expect("read"), (Position(0), vec![]));
    store.save_latest(&[row(1, 1, "a", 3), row(2, 1, "b", 3)], None).await.expect("saved");
    assert_eq!(store.latest_position().await.expect("read"), Position(0), "only some are saved");
    store.save_latest(&[row(2, 2, "c", 5)], Some(Position(5))).await.expect("saved");
    store.save_latest(&[row(3, 3, "d", 6)], Some(Position(6))).await.expect("saved");
    let (position, mut rows) = store.latest().await.expect("read");
    rows.sort_unstable_by_key(|row| row.sensor_key);
    assert_eq!((position, store.latest_position().await.expect("read")), (Position(6), Position(6)));
    let found: Vec<_> = rows.iter().map(|row| (row.sensor_key, row.time, &row.batch[..])).collect();
    assert_eq!(found, [(1, at(1), &b"a"[..]), (2, at(2), b"c"), (3, at(3), b"d")]);
    assert!(rows.iter().all(|row| row.device == *device && row.position <= position));
    store.close().await;
}
