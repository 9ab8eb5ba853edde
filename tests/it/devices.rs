//! The registry: devices are made, found, changed and deleted with all that is theirs.

use crate::support::{
    client::{T0, TestDevice, column, devices, encode, frame, nth_temperatures},
    database::{Database, on_each_database},
    eventually,
};
use tidegate::{error::StatusFacts, model::columns::Values, pb};
use tonic::{Code, Status};

on_each_database!(
    devices_are_created_read_changed_and_listed_in_pages,
    sensors_are_registered_by_what_is_uploaded_and_odd_units_are_flagged,
    a_deleted_device_is_gone_with_its_readings_and_its_id_can_be_used_anew,
    the_registry_takes_so_many_devices_and_no_more,
    without_auto_registration_only_known_devices_can_upload,
    queries_are_bounded_in_time_by_sensor_and_in_size_and_sum_up_in_buckets,
);

fn device(id: &str, labels: &[(&str, &str)]) -> pb::Device {
    let labels = labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    pb::Device { id: id.into(), labels, ..Default::default() }
}

fn reason(status: &Status) -> String {
    StatusFacts::of(status).reason().to_owned()
}

async fn devices_are_created_read_changed_and_listed_in_pages(on: Database) {
    let gateway = on.gateway().await;
    let mut client = devices(&gateway.channel());
    let create = |device| pb::CreateDeviceRequest { device: Some(device) };
    for index in 0..25 {
        let site = if index % 2 == 0 { "berlin" } else { "paris" };
        client.create_device(create(device(&format!("pump-{index:02}"), &[("site", site)]))).await.expect("created");
    }
    let taken = client.create_device(create(device("pump-03", &[]))).await.expect_err("the id is taken");
    assert_eq!((taken.code(), reason(&taken).as_str()), (Code::AlreadyExists, "DEVICE_EXISTS"));
    let bad = client.create_device(create(device("no good", &[("", "x"), ("y", "a,b")]))).await.expect_err("bad");
    assert_eq!(StatusFacts::of(&bad).violations.len(), 3);

    let mut seen = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = pb::ListDevicesRequest { label_selector: "site=berlin".into(), page_size: 5, page_token, ..Default::default() };
        let page = client.list_devices(request).await.expect("listed").into_inner();
        assert!(page.devices.len() <= 5);
        seen.extend(page.devices.into_iter().map(|device| device.id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, (0..25).step_by(2).map(|index| format!("pump-{index:02}")).collect::<Vec<_>>());

    let got = client.get_device(pb::GetDeviceRequest { device: "pump-00".into() }).await.expect("there").into_inner().device.expect("set");
    let changed = pb::Device { display_name: "Pump 0".into(), labels: [].into(), ..got.clone() };
    let mask = prost_types::FieldMask { paths: vec!["display_name".into()] };
    let update = |device, update_mask| pb::UpdateDeviceRequest { device: Some(device), update_mask };
    let updated = client.update_device(update(changed.clone(), Some(mask))).await.expect("updated").into_inner().device.expect("set");
    assert_eq!((updated.display_name.as_str(), &updated.labels), ("Pump 0", &got.labels), "only what the mask names");
    let stale = client.update_device(update(changed.clone(), None)).await.expect_err("the etag is the old one");
    assert_eq!((stale.code(), reason(&stale).as_str()), (Code::Aborted, "DEVICE_ETAG_MISMATCH"));
    let whole = client.update_device(update(pb::Device { etag: String::new(), ..changed }, None)).await.expect("updated");
    assert!(whole.into_inner().device.expect("set").labels.is_empty());

    let gateway = gateway.restart().await;
    let again = devices(&gateway.channel()).get_device(pb::GetDeviceRequest { device: "pump-00".into() }).await.expect("there");
    assert_eq!(again.into_inner().device.expect("set").display_name, "Pump 0");
}

async fn sensors_are_registered_by_what_is_uploaded_and_odd_units_are_flagged(on: Database) {
    let gateway = on.gateway().await;
    let pump = TestDevice::new(&gateway.channel(), "pump-1");
    let columns = vec![
        column("rpm", "rev/fortnight", Values::Int64(vec![1])),
        column("t", "", Values::Double(vec![1.0])),
        column("state", "", Values::Text(vec!["on".into()])),
    ];
    pump.upload([(1, encode(vec![frame(T0, columns)]))]).await.expect("accepted");
    // A unit may be said later, once.
    pump.upload([(2, encode(vec![frame(T0 + 1, vec![column("t", "Cel", Values::Double(vec![1.0]))])]))]).await.expect("accepted");
    let mut client = devices(&gateway.channel());
    let sensors = client.list_sensors(pb::ListSensorsRequest { device: "pump-1".into() }).await.expect("listed").into_inner().sensors;
    let shown: Vec<_> =
        sensors.iter().map(|sensor| (sensor.name.as_str(), sensor.unit.as_str(), sensor.unit_registered, sensor.kind)).collect();
    assert_eq!(shown, [("rpm", "rev/fortnight", false, 2), ("state", "", false, 4), ("t", "Cel", true, 1)]);
}

async fn a_deleted_device_is_gone_with_its_readings_and_its_id_can_be_used_anew(on: Database) {
    let gateway = on.gateway().await;
    let pump = TestDevice::new(&gateway.channel(), "pump-1");
    let other = TestDevice::new(&gateway.channel(), "pump-2");
    pump.upload_nth(1..=3).await.expect("accepted");
    other.upload_nth(1..=2).await.expect("accepted");
    let mut client = devices(&gateway.channel());
    let delete = |etag: &str| pb::DeleteDeviceRequest { device: "pump-1".into(), etag: etag.into() };
    assert_eq!(client.delete_device(delete("99")).await.expect_err("not its etag").code(), Code::Aborted);
    client.delete_device(delete("")).await.expect("deleted");
    let gone = client.get_device(pb::GetDeviceRequest { device: "pump-1".into() }).await.expect_err("gone");
    assert_eq!(reason(&gone), "DEVICE_NOT_FOUND");
    assert_eq!(pump.position().await, 0, "its streams are gone, too");

    pump.upload_nth(1..=1).await.expect("the id is free for a new device");
    assert_eq!(pump.stored_temperatures().await, nth_temperatures(1..=1));
    assert_eq!(other.stored_temperatures().await, nth_temperatures(1..=2));
    let gateway = gateway.restart().await;
    assert_eq!(pump.on(&gateway.channel()).stored_temperatures().await, nth_temperatures(1..=1));
    eventually("a follower sees only what is left", || async {
        let request = pb::FollowRequest { start: Some(pb::follow_request::Start::Beginning(true)), ..Default::default() };
        let mut shown = crate::support::client::live(&gateway.channel()).follow(request).await.ok()?.into_inner();
        let mut batches = 0;
        while let Some(response) = shown.message().await.ok()? {
            match response.message? {
                pb::follow_response::Message::Readings(readings) => batches += readings.batches,
                _ => break,
            }
        }
        (batches == 3).then_some(())
    })
    .await;
}

async fn the_registry_takes_so_many_devices_and_no_more(on: Database) {
    let gateway = on.gateway_with(|config| config.devices.devices_max = 2).await;
    TestDevice::new(&gateway.channel(), "a").upload_nth([1]).await.expect("the first");
    TestDevice::new(&gateway.channel(), "b").upload_nth([1]).await.expect("the second");
    let refused = TestDevice::new(&gateway.channel(), "c").upload_nth([1]).await.expect_err("the third");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "OVERLOADED"));
    assert_eq!(StatusFacts::of(&refused).info.expect("set").metadata["setting"], "devices.devices_max");
    TestDevice::new(&gateway.channel(), "a").upload_nth([1]).await.expect("a known one");
    let again = pb::CreateDeviceRequest { device: Some(device("a", &[])) };
    assert_eq!(reason(&devices(&gateway.channel()).create_device(again).await.expect_err("it is there")), "DEVICE_EXISTS");
    let delete = pb::DeleteDeviceRequest { device: "a".into(), ..Default::default() };
    devices(&gateway.channel()).delete_device(delete).await.expect("deleted");
    // Many at once for the one place that is free.
    let rush = (0..20).map(|index| {
        let late = TestDevice::new(&gateway.channel(), &format!("late-{index}"));
        tokio::spawn(async move { late.upload_nth([1]).await.is_ok() })
    });
    let mut taken = 0;
    for one in rush.collect::<Vec<_>>() {
        taken += usize::from(crate::support::soon("each is answered", one).await.expect("no panic"));
    }
    assert_eq!(taken, 1);
}

async fn without_auto_registration_only_known_devices_can_upload(on: Database) {
    let gateway = on.gateway_with(|config| config.devices.auto_register = false).await;
    let pump = TestDevice::new(&gateway.channel(), "pump-1");
    let refused = pump.upload_nth([1]).await.expect_err("unknown");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::NotFound, "DEVICE_NOT_FOUND"));
    devices(&gateway.channel()).create_device(pb::CreateDeviceRequest { device: Some(device("pump-1", &[])) }).await.expect("created");
    pump.upload_nth([1]).await.expect("known");
}

async fn queries_are_bounded_in_time_by_sensor_and_in_size_and_sum_up_in_buckets(on: Database) {
    let gateway = on.gateway_with(|config| config.query.readings_max = 50).await;
    let channel = gateway.channel();
    let pump = TestDevice::new(&channel, "pump-1");
    pump.upload_nth(1..=6).await.expect("accepted");
    let at = |row: i64| Some(prost_types::Timestamp { seconds: T0 / 1_000_000 + row, nanos: 0 });
    let request = pb::QueryReadingsRequest { device: "pump-1".into(), start_time: at(15), end_time: at(18), ..Default::default() };
    let (times, _) = crate::support::client::query(&channel, request.clone()).await.expect("answered").remove("t").expect("there");
    assert_eq!(times, [T0 + 15_000_000, T0 + 16_000_000, T0 + 17_000_000]);
    let none = pb::QueryReadingsRequest { sensors: vec!["u".into()], ..request.clone() };
    assert!(crate::support::client::query(&channel, none).await.expect("answered").is_empty());
    let all = pb::QueryReadingsRequest { start_time: None, end_time: None, ..request.clone() };
    let too_large = crate::support::client::query(&channel, all).await.expect_err("60 readings");
    assert_eq!((too_large.code(), reason(&too_large).as_str()), (Code::ResourceExhausted, "QUERY_TOO_LARGE"));

    let bucket = Some(prost_types::Duration { seconds: 10, nanos: 0 });
    let summed = pb::QueryReadingsRequest { start_time: at(20), end_time: at(60), bucket, ..request };
    let mut client = pb::reading_service_client::ReadingServiceClient::new(channel.clone());
    let mut answer = client.query_readings(summed).await.expect("answered").into_inner();
    let first = answer.message().await.expect("no error").expect("buckets").message.expect("set");
    let pb::query_readings_response::Message::Buckets(buckets) = first else { panic!("not buckets: {first:?}") };
    assert_eq!((buckets.unit.as_str(), buckets.kind(), buckets.counts), ("Cel", pb::ValueKind::Double, vec![10; 4]));
    assert_eq!((buckets.minimums[0], buckets.maximums[0], buckets.firsts[3], buckets.lasts[3]), (2.0, 2.9, 5.0, 5.9));
    assert!((buckets.averages[1] - 3.45).abs() < 1e-9);
    assert_eq!(buckets.start_times_us[0], T0 + 20_000_000);
}
