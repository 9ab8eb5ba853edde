//! Devices and sensors.

use super::*;
use crate::support::database::on_each_database;
use tidegate::store::{ConfigRevisionRow, LatestRow};

on_each_database!(
    devices_are_registered_once_and_listed_in_the_order_of_bytes,
    a_device_is_changed_from_the_revision_that_was_read,
    of_a_sensor_the_first_word_on_it_stays,
    what_a_deleted_device_left_is_purged,
);

async fn devices_are_registered_once_and_listed_in_the_order_of_bytes(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    let mut tx = store.begin().await.expect("begun");
    let labels = Labels::parse("labels", [("site".to_owned(), "Köln".to_owned())]).expect("good");
    let made = tx.insert_device(&device_id("a"), &labels, "Pumpe \"A\"\u{0}", at(7)).await.expect("inserted").expect("the id is free");
    assert!(tx.insert_device(&device_id("pump-1"), &labels, "", at(7)).await.expect("asked").is_none(), "the id is taken");
    tx.commit().await.expect("committed");
    for id in ["B", "pump-1:2", "pump-10", "Z.z"] {
        register(store, id).await;
    }
    let found = store.device(&device_id("a")).await.expect("read").expect("there");
    assert_eq!(found, made);
    assert_eq!((found.labels, found.revision, found.create_time, found.update_time), (labels, 1, at(7), at(7)));
    // PostgreSQL's texts can't have a NUL.
    assert_eq!(found.display_name.replace('\u{fffd}', "\0"), "Pumpe \"A\"\0");
    assert_eq!(store.device_by_key(*device).await.expect("read").map(|row| row.id), Some(device_id("pump-1")));
    assert_eq!(store.device(&device_id("A")).await.expect("read"), None, "ids differ by case");
    let page = async |after, rows_max| {
        let rows = store.devices(after, rows_max).await.expect("read");
        rows.iter().map(|row| row.id.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(page("", 3).await, ["B", "Z.z", "a"]);
    assert_eq!(page("a", 10).await, ["pump-1", "pump-10", "pump-1:2"]);
    assert_eq!(store.devices_len().await.expect("read"), 6);
    store.close().await;
}

async fn a_device_is_changed_from_the_revision_that_was_read(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    let labels = Labels::parse("labels", [("floor".to_owned(), "2".to_owned())]).expect("good");
    let mut tx = store.begin().await.expect("begun");
    let updated = tx.update_device(*device, 1, &labels, "new", at(5)).await.expect("asked").expect("it is at 1");
    assert_eq!((updated.revision, updated.update_time, updated.create_time), (2, at(5), at(0)));
    assert_eq!(tx.update_device(*device, 1, &labels, "never", at(6)).await.expect("asked"), None, "it is at 2");
    assert_eq!(tx.lock_device(*device).await.expect("read").as_ref(), Some(&updated));
    tx.commit().await.expect("committed");
    assert_eq!(store.device_by_key(*device).await.expect("read"), Some(updated));
    store.close().await;
}

async fn of_a_sensor_the_first_word_on_it_stays(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    let pressure = fixture.sensor("pressure").await;
    fixture.sensor("Pressure").await;
    let mut tx = store.begin().await.expect("begun");
    let other =
        SensorRow { unit: "bar".into(), kind: ValueKind::Text, allow_non_finite: true, create_time: at(9), ..new_sensor("pressure") };
    assert_eq!(tx.insert_sensor(*device, &other).await.expect("asked"), pressure, "the row that is there");
    let said = tx.set_sensor_unit(&SensorRow { unit: "Pa".into(), ..pressure.clone() }).await.expect("written");
    assert_eq!(said.unit, "Pa");
    assert_eq!(tx.set_sensor_unit(&SensorRow { unit: "bar".into(), ..pressure.clone() }).await.expect("asked").unit, "Pa");
    tx.set_sensor_allowance(&SensorRow { allow_non_finite: true, ..pressure.clone() }).await.expect("written");
    tx.commit().await.expect("committed");
    let sensors = store.sensors(*device).await.expect("read");
    assert_eq!(sensors.iter().map(|sensor| &*sensor.name).collect::<Vec<_>>(), ["Pressure", "pressure"]);
    assert_eq!(sensors[1], SensorRow { unit: "Pa".into(), allow_non_finite: true, ..pressure });
    store.close().await;
}

async fn what_a_deleted_device_left_is_purged(database: Database) {
    let fixture = Fixture::on(database).await;
    let Fixture { store, device, .. } = &fixture;
    let stays = register(store, "pump-2").await;
    let sensor = fixture.sensor("t").await;
    let mut tx = store.begin().await.expect("begun");
    tx.stream(*device, stream_id(1), at(0)).await.expect("made");
    let config = ConfigRevisionRow { revision: 4, config: "{}".into(), request_id: "r".into(), comment: String::new(), create_time: at(0) };
    tx.insert_config(*device, &config).await.expect("inserted");
    tx.commit().await.expect("committed");
    fixture.append(&[entry(*device, 1, 0, b"goes"), entry(stays, 1, 0, b"stays"), entry(*device, 2, 0, b"goes")]).await;
    chunks::replace(store, &[], &[chunks::chunk(sensor.key, 0..10)]).await;
    let latest = |sensor_key, device| LatestRow { sensor_key, device, time: at(0), batch: "x".into(), position: Position(1) };
    store.save_latest(&[latest(sensor.key, *device), latest(77, stays)], Some(Position(3))).await.expect("saved");

    fixture.delete_device().await;
    assert_eq!(store.device_by_key(*device).await.expect("read"), None);
    let mut tx = store.begin().await.expect("begun");
    assert_eq!(tx.lock_device(*device).await.expect("read"), None);
    assert_eq!(tx.retired_revision(&device_id("pump-1")).await.expect("read"), 4);
    tx.rollback().await.expect("rolled back");
    store.purge_deleted().await.expect("purged");
    assert_eq!(fixture.log().await.iter().map(|row| &row.batch[..]).collect::<Vec<_>>(), [b"stays"]);
    assert_eq!(store.last_sequence(*device, stream_id(1)).await.expect("read"), 0);
    assert_eq!(store.sensors(*device).await.expect("read"), []);
    assert_eq!(store.config(*device).await.expect("read"), None);
    assert_eq!(store.config_revisions(*device, u64::MAX, 10).await.expect("read"), []);
    assert_eq!(chunks::firsts(store, sensor.key).await, [0; 0]);
    let (_, rows) = store.latest().await.expect("read");
    assert_eq!(rows.iter().map(|row| row.sensor_key).collect::<Vec<_>>(), [77]);

    // Nor comes anything of it back.
    chunks::replace(store, &[], &[chunks::chunk(sensor.key, 0..10)]).await;
    store.save_latest(&[latest(sensor.key, *device)], None).await.expect("saved");
    assert_eq!(chunks::firsts(store, sensor.key).await, [0; 0]);
    assert_eq!(store.latest().await.expect("read").1.len(), 1);
    assert!(register(store, "pump-1").await > stays, "a device's number is never used again");
    store.close().await;
}
