//! The log, the streams and the ledgers.

use super::*;
use crate::support::database::on_each_database;
use tidegate::{
    model::{BatchReject, batch::RejectReason},
    store::{Count, NewRejection, StoreError, StreamChange},
};

on_each_database!(
    positions_follow_one_another_and_what_is_not_committed_leaves_none,
    a_page_of_the_log_ends_at_its_limits,
    streams_move_on_from_where_they_were_read_or_not_at_all,
    whoever_reads_on_behind_what_is_pruned_is_told,
    a_position_is_found_by_the_time_that_it_came_in_before,
    a_ledger_adds_up_all_streams_and_rejections,
    what_is_not_merged_is_read_by_device_and_time,
    a_closed_store_takes_nothing,
);

async fn positions_follow_one_another_and_what_is_not_committed_leaves_none(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    assert_eq!(store.last_position().await.expect("read"), Position(0));
    let first = fixture.append(&[entry(*device, 1, 1, b"a"), entry(*device, 2, 2, b"b")]).await;
    assert_eq!(first, Position(1));

    let mut tx = store.begin().await.expect("begun");
    tx.append(&[entry(*device, 3, 3, b"never")]).await.expect("appended");
    tx.rollback().await.expect("rolled back");
    let mut tx = store.begin().await.expect("begun");
    tx.append(&[entry(*device, 3, 3, b"never, either")]).await.expect("appended");
    drop(tx);
    assert_eq!(store.last_position().await.expect("read"), Position(2));
    store.probe_write().await.expect("it takes writes");

    let several = NewLogRow { batches: 3, last_sequence: 5, ..entry(*device, 5, 9, b"cde") };
    assert_eq!(fixture.append(&[several]).await, Position(3));
    let row = |position, seconds, batches, batch| LogRow {
        position: Position(position),
        device: *device,
        receive_time: at(seconds),
        batches,
        batch: bytes::Bytes::from_static(batch),
    };
    assert_eq!(fixture.log().await, [row(1, 1, 1, b"a"), row(2, 2, 1, b"b"), row(3, 9, 3, b"cde")]);
    assert_eq!(store.last_position().await.expect("read"), Position(3));
    store.close().await;
}

async fn a_page_of_the_log_ends_at_its_limits(database: Database) {
    let fixture = Fixture::on(database).await;
    let rows: Vec<NewLogRow> = (1..=6).map(|sequence| entry(fixture.device, sequence, 0, b"0123456789")).collect();
    fixture.append(&rows).await;
    let page = async |after, rows_max, bytes_max| {
        let rows = fixture.store.read_log(Position(after), rows_max, bytes_max).await.expect("read");
        rows.iter().map(|row| row.position.0).collect::<Vec<_>>()
    };
    assert_eq!(page(0, 4, usize::MAX).await, [1, 2, 3, 4]);
    assert_eq!(page(4, 4, usize::MAX).await, [5, 6]);
    assert_eq!(page(0, 4, 1).await, [1], "at least one");
    assert_eq!(page(0, 4, 20).await, [1, 2]);
    assert_eq!(page(0, 4, 21).await, [1, 2, 3], "none behind the one that reaches the limit");
    assert_eq!(page(6, 4, usize::MAX).await, [0; 0]);
    let sizes = fixture.store.log_sizes(Position(4), 10).await.expect("read");
    assert_eq!(sizes.iter().map(|size| (size.position.0, size.bytes)).collect::<Vec<_>>(), [(5, 10), (6, 10)]);
    fixture.store.close().await;
}

fn advance(key: i64, sequence_before: u64, sequence_after: u64) -> StreamChange {
    let stored = Count { batches: sequence_after - sequence_before, readings: 10 * (sequence_after - sequence_before) };
    StreamChange { key, sequence_before, sequence_after, stored, receive_micros: at(1).micros(), ..StreamChange::default() }
}

async fn streams_move_on_from_where_they_were_read_or_not_at_all(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    let mut tx = store.begin().await.expect("begun");
    let made = tx.stream(*device, stream_id(1), at(0)).await.expect("made");
    let other = tx.stream(*device, stream_id(2), at(0)).await.expect("made");
    assert_eq!((made.last_sequence, other.last_sequence), (0, 0));
    assert_ne!(made.key, other.key);
    assert_eq!(tx.stream(*device, stream_id(1), at(0)).await.expect("found"), made);
    tx.advance_streams(&[advance(made.key, 0, 3), advance(other.key, 0, 1)]).await.expect("they are where they were read");
    tx.commit().await.expect("committed");
    assert_eq!(store.last_sequence(*device, stream_id(1)).await.expect("read"), 3);
    assert_eq!(store.last_sequence(*device, stream_id(3)).await.expect("read"), 0, "there is none");

    let mut tx = store.begin().await.expect("begun");
    let conflict = tx.advance_streams(&[advance(made.key, 2, 4), advance(other.key, 1, 2)]).await.expect_err("one is at 3");
    assert!(conflict.is_conflict(), "{conflict:?}");
    drop(tx);
    let mut tx = store.begin().await.expect("begun");
    assert_eq!(tx.stream(*device, stream_id(2), at(0)).await.expect("found").last_sequence, 1, "neither was moved");
    let locked = tx.lock_streams(&[(*device, stream_id(1)), (*device, stream_id(9))]).await.expect("read");
    let expected = if store.is_shared() { vec![((*device, stream_id(1)), 3)] } else { vec![] };
    assert_eq!(locked.into_iter().map(|(stream, row)| (stream, row.last_sequence)).collect::<Vec<_>>(), expected);
    tx.rollback().await.expect("rolled back");
    store.close().await;
}

async fn whoever_reads_on_behind_what_is_pruned_is_told(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    let rows: Vec<NewLogRow> = (1..=5).map(|sequence| entry(*device, sequence, 0, b"x")).collect();
    fixture.append(&rows).await;
    let mut tx = store.begin().await.expect("begun");
    assert_eq!(tx.prune_log(Position(3)).await.expect("deleted"), 3);
    tx.commit().await.expect("committed");
    assert_eq!(store.pruned_position().await.expect("read"), Position(3));
    let unbroken = async |after| {
        let rows = store.read_log_unbroken(Position(after), 10, usize::MAX).await.expect("read");
        rows.map(|rows| rows.iter().map(|row| row.position.0).collect::<Vec<_>>())
    };
    assert_eq!((unbroken(2).await, unbroken(3).await, unbroken(5).await), (None, Some(vec![4, 5]), Some(vec![])));
    let mut tx = store.begin().await.expect("begun");
    tx.prune_log(Position(5)).await.expect("deleted");
    tx.commit().await.expect("committed");
    assert_eq!(fixture.append(&[entry(*device, 6, 0, b"x")]).await, Position(6), "positions are never used again");
    store.close().await;
}

async fn a_position_is_found_by_the_time_that_it_came_in_before(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    let rows: Vec<NewLogRow> = (1..=3_u8).map(|number| entry(*device, number.into(), i64::from(number) * 10, b"x")).collect();
    fixture.append(&rows).await;
    let before = async |seconds| store.position_before(at(seconds)).await.expect("found").0;
    assert_eq!([before(5).await, before(10).await, before(11).await, before(30).await, before(99).await], [0, 0, 1, 2, 3]);
    let mut tx = store.begin().await.expect("begun");
    tx.prune_log(Position(2)).await.expect("deleted");
    tx.commit().await.expect("committed");
    assert_eq!([before(5).await, before(99).await], [2, 3]);
    store.close().await;
}

fn rejection(device: DeviceKey, sequence: u64, reason: RejectReason, readings: u64) -> NewRejection {
    let reject = BatchReject { reason, field: "frames[0]".into(), message: "no\0good".into(), readings };
    NewRejection { device, stream_key: 1, sequence, receive_time: at(0), reject, batch: bytes::Bytes::from_static(b"\xff\x00") }
}

async fn a_ledger_adds_up_all_streams_and_rejections(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    let idle = register(store, "idle").await;
    assert_eq!(store.last_receive_time(*device).await.expect("read"), None);
    let count = |batches, readings| Count { batches, readings };
    for round in 0..2 {
        let mut tx = store.begin().await.expect("begun");
        for number in [1, 2] {
            let stream = tx.stream(*device, stream_id(number), at(0)).await.expect("made");
            // What a device says it lost may be anything.
            let (duplicate, lost) = (count(1, 2), count(1, if number == 1 { u64::MAX } else { 0 }));
            let moved = advance(stream.key, round, round + 1);
            let receive_micros = at(i64::from(number) + 10 * round as i64).micros();
            tx.advance_streams(&[StreamChange { duplicate, lost, receive_micros, ..moved }]).await.expect("moved on");
        }
        let late = [rejection(*device, 1, RejectReason::TimeTooOld, 3), rejection(*device, 2, RejectReason::TimeTooOld, 4)];
        tx.reject(&late, 2).await.expect("kept");
        tx.reject(&[rejection(*device, 3, RejectReason::Malformed, 0)], 2).await.expect("kept");
        tx.commit().await.expect("committed");
    }
    let ledger = store.ledger(*device).await.expect("read");
    assert_eq!((ledger.stored, ledger.duplicate), (count(4, 40), count(4, 8)));
    assert_eq!((ledger.lost.batches, ledger.lost.readings), (4, i64::MAX as u64));
    let rejected = [("MALFORMED".to_owned(), count(2, 0)), ("TIME_TOO_OLD".to_owned(), count(4, 14))];
    assert_eq!(ledger.rejected, rejected, "all are counted, however few are kept");
    assert_eq!(ledger.streams, [(stream_id(2), 2, at(12)), (stream_id(1), 2, at(11))], "the last heard of first");
    assert_eq!(store.last_receive_time(*device).await.expect("read"), Some(at(12)));
    let readings = store.stored_readings(&[*device, idle, DeviceKey(999)]).await.expect("read");
    assert_eq!(readings.into_iter().collect::<Vec<_>>(), [(*device, 40)]);
    assert_eq!(store.ledger(idle).await.expect("read"), Default::default());
    store.close().await;
}

async fn what_is_not_merged_is_read_by_device_and_time(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    let other = register(store, "pump-2").await;
    let spanning = |sequence, first, last| {
        let summary = BatchSummary { readings: 2, first_time: at(first), last_time: at(last) };
        NewLogRow { summary, ..entry(*device, sequence, 0, b"0123456789") }
    };
    fixture.append(&[spanning(1, 0, 9), spanning(2, 10, 19), entry(other, 1, 15, b"x"), spanning(3, 5, 25), spanning(4, 30, 39)]).await;
    let unmerged = async |start, end: Option<i64>, bytes_max| {
        let (mut rows, mut pages) = (store.read_unmerged(*device, at(start), end.map(at)), Vec::new());
        loop {
            let page = rows.next_page(bytes_max).await.expect("read");
            pages.push(page.iter().map(|row| row.position.0).collect::<Vec<_>>());
            if page.is_empty() {
                return pages;
            }
        }
    };
    assert_eq!(unmerged(0, None, usize::MAX).await, [vec![1, 2, 4, 5], vec![]]);
    assert_eq!(unmerged(19, Some(30), usize::MAX).await, [vec![2, 4], vec![]], "the end is not in the span, the start is");
    assert_eq!(unmerged(0, None, 20).await, [vec![1, 2], vec![4, 5], vec![]]);
    let mut begun = store.read_unmerged(*device, at(0), None);
    let first = begun.next_page(1).await.expect("read");
    let mut tx = store.begin().await.expect("begun");
    tx.set_merged(Position(2)).await.expect("noted");
    tx.commit().await.expect("committed");
    assert_eq!(store.merged_position().await.expect("read"), Position(2));
    assert_eq!(unmerged(0, None, usize::MAX).await, [vec![4, 5], vec![]]);
    let rest = begun.next_page(usize::MAX).await.expect("read");
    assert_eq!((first.len(), rest.len()), (1, 3), "as of when it was begun");
    drop(begun);
    store.close().await;
}

async fn a_closed_store_takes_nothing(database: Database) {
    let fixture = Fixture::on(database).await;
    fixture.store.close().await;
    assert!(matches!(fixture.store.begin().await.err(), Some(StoreError::Closed)));
    assert!(fixture.store.last_position().await.is_err());
    let again = Store::open(&fixture.settings).await.expect("it may be opened again");
    assert_eq!(again.device_by_key(fixture.device).await.expect("read").map(|row| row.id), Some(device_id("pump-1")));
    again.close().await;
}
