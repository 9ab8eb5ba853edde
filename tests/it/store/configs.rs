//! Desired configurations, and how far they have come.

use super::*;
use crate::support::database::on_each_database;
use tidegate::store::{ConfigOutcome, ConfigReportRow, ConfigRevisionRow, ConfigStateRow};

on_each_database!(revisions_are_kept_and_the_last_is_desired, a_report_says_what_the_device_runs_with);

fn revision(number: u64, request_id: &str) -> ConfigRevisionRow {
    let config = format!(r#"{{"interval":{number},"name":"ü"}}"#);
    ConfigRevisionRow { revision: number, config, request_id: request_id.into(), comment: "why".into(), create_time: at(0) }
}

async fn set(fixture: &Fixture, revisions: &[ConfigRevisionRow]) {
    let mut tx = fixture.store.begin().await.expect("begun");
    for revision in revisions {
        tx.insert_config(fixture.device, revision).await.expect("inserted");
    }
    tx.commit().await.expect("committed");
}

async fn revisions_are_kept_and_the_last_is_desired(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    assert_eq!(store.config(*device).await.expect("read"), None);
    let other = register(store, "pump-2").await;
    set(&fixture, &[revision(1, "first"), revision(2, ""), revision(3, "third")]).await;
    let mut tx = store.begin().await.expect("begun");
    tx.insert_config(other, &revision(1, "first")).await.expect("inserted");
    assert_eq!(tx.latest_config(*device).await.expect("read"), Some(revision(3, "third")));
    assert_eq!(tx.config_of_request(*device, "first").await.expect("read"), Some(revision(1, "first")));
    assert_eq!(tx.config_of_request(*device, "").await.expect("read"), None, "that names no request");
    assert_eq!(tx.config_of_request(*device, "second").await.expect("read"), None);
    assert_eq!(tx.retired_revision(&device_id("pump-1")).await.expect("read"), 0);
    tx.commit().await.expect("committed");
    let (desired, state) = store.config(*device).await.expect("read").expect("set");
    assert_eq!(desired, revision(3, "third"));
    assert_eq!(state, ConfigStateRow { desired_revision: 3, delivered: None, reported: None, applied_revision: 0 });
    let numbers = async |before, rows_max| {
        let rows = store.config_revisions(*device, before, rows_max).await.expect("read");
        rows.iter().map(|row| row.revision).collect::<Vec<_>>()
    };
    assert_eq!((numbers(u64::MAX, 2).await, numbers(2, 10).await), (vec![3, 2], vec![1]));
    assert_eq!(store.unsettled_configs(DeviceKey(0), 10).await.expect("read"), [*device, other]);
    assert_eq!(store.unsettled_configs(*device, 10).await.expect("read"), [other]);
    assert_eq!(store.unsettled_configs(DeviceKey(0), 1).await.expect("read"), [*device]);
    store.close().await;
}

async fn a_report_says_what_the_device_runs_with(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    set(&fixture, &[revision(1, ""), revision(2, ""), revision(3, "")]).await;
    let delivered = async |number| {
        let mut tx = store.begin().await.expect("begun");
        let changed = tx.note_delivered(*device, number, at(1)).await.expect("noted");
        tx.commit().await.expect("committed");
        changed
    };
    assert_eq!([delivered(2).await, delivered(2).await, delivered(1).await], [true, false, false]);
    let report = |number, outcome| ConfigReportRow { revision: number, outcome, detail: "so".into(), time: at(2) };
    let reported = async |number, outcome| {
        let mut tx = store.begin().await.expect("begun");
        let changed = tx.note_report(*device, &report(number, outcome)).await.expect("noted");
        tx.commit().await.expect("committed");
        let (_, state) = store.config(*device).await.expect("read").expect("set");
        assert_eq!((state.desired_revision, state.delivered), (3, Some((2, at(1)))));
        (changed, state.reported.map(|report| (report.revision, report.outcome)), state.applied_revision)
    };
    use ConfigOutcome::{Applied, Rejected, Reverted};
    assert_eq!(reported(9, Applied).await, (false, None, 0), "there never was such a revision");
    assert_eq!(reported(1, Applied).await, (true, Some((1, Applied)), 1));
    assert_eq!(reported(1, Applied).await, (false, Some((1, Applied)), 1), "it said so before");
    assert_eq!(reported(2, Rejected).await, (true, Some((2, Rejected)), 1));
    assert_eq!(reported(1, Applied).await, (false, Some((2, Rejected)), 1), "old news");
    assert_eq!(reported(3, Applied).await, (true, Some((3, Applied)), 3));
    assert_eq!(store.unsettled_configs(DeviceKey(0), 10).await.expect("read"), []);
    assert_eq!(reported(3, Reverted).await, (true, Some((3, Reverted)), 1), "back to what it had");
    store.close().await;
}
