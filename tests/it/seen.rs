//! When a device was last heard of.

use crate::support::{
    client::{TestDevice, devices, temperatures},
    database::{Database, on_each_database},
    eventually,
    streams::Link,
};
use std::time::Duration;
use tidegate::{client::Channel, model::Timestamp, pb};

on_each_database!(a_device_is_seen_when_it_connects_and_when_it_uploads, silent_devices_are_listed_alone);

/// When it was seen and when something was received of it, in microseconds; the list must say the same.
async fn seen_and_received(channel: &Channel, id: &str) -> (Option<i64>, Option<i64>) {
    let request = pb::GetDeviceRequest { device: id.into() };
    let device = devices(channel).get_device(request).await.expect("it is there").into_inner().device.expect("set");
    let listed = devices(channel).list_devices(pb::ListDevicesRequest::default()).await.expect("listed").into_inner().devices;
    assert_eq!(listed, std::slice::from_ref(&device));
    let micros = |time: Option<prost_types::Timestamp>| time.map(|time| Timestamp::from_proto(&time).expect("in range").micros());
    (micros(device.last_seen_time), micros(device.last_receive_time))
}

/// Scenario: a device is registered, connects without a batch, and uploads. Guarantee: each sign of life shows.
async fn a_device_is_seen_when_it_connects_and_when_it_uploads(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    let registered = pb::Device { id: "pump-1".into(), ..Default::default() };
    devices(&channel).create_device(pb::CreateDeviceRequest { device: Some(registered) }).await.expect("registered");
    assert_eq!(seen_and_received(&channel, "pump-1").await, (None, None));

    let before = Timestamp::now().micros();
    let (link, _) = Link::open(&device, 0).await;
    let (connected, received) = seen_and_received(&channel, "pump-1").await;
    assert!(connected >= Some(before) && received.is_none(), "{connected:?} {received:?}");
    drop(link);

    device.upload([(1, temperatures(before, &[1.0]))]).await.expect("stored");
    let (uploaded, received) = seen_and_received(&channel, "pump-1").await;
    assert!(uploaded >= connected && uploaded >= received && received >= connected, "{connected:?} {uploaded:?} {received:?}");
}

const SILENT: &str = "tidegate_devices_silent";

/// The ids of the silent devices, and the number of pages of two that it took.
async fn silent(channel: &Channel) -> (Vec<String>, usize) {
    let mut request = pb::ListDevicesRequest { silent: true, page_size: 2, ..Default::default() };
    let (mut ids, mut pages) = (Vec::new(), 0);
    loop {
        let page = devices(channel).list_devices(request.clone()).await.expect("listed").into_inner();
        ids.extend(page.devices.into_iter().map(|device| device.id));
        pages += 1;
        if page.next_page_token.is_empty() {
            return (ids, pages);
        }
        request.page_token = page.next_page_token;
    }
}

/// Scenario: of five devices, some of which were never heard of, one speaks again. Guarantee: it alone leaves the list, and pages
/// without a silent device do not end it.
async fn silent_devices_are_listed_alone(on: Database) {
    let patient = on.gateway_with(|config| config.devices.silent_after = Duration::from_secs(3600)).await;
    register_five(&patient.channel()).await;
    assert_eq!(silent(&patient.channel()).await, (vec![], 3), "they are new; and an empty page is not the last");

    let gateway = on.gateway_with(|config| config.devices.silent_after = Duration::from_secs(1)).await;
    let channel = gateway.channel();
    register_five(&channel).await;
    eventually("all are silent", || async { (silent(&channel).await.0 == ["a", "b", "c", "d", "e"]).then_some(()) }).await;
    eventually("they are counted", || async { (gateway.metric(SILENT).await == Some(5.0)).then_some(()) }).await;
    let device = TestDevice::new(&channel, "c");
    // Again and again: on a slow machine it may be silent once more before the list is made.
    eventually("one is not", || async {
        let (_link, _) = Link::open(&device, 0).await;
        (silent(&channel).await.0 == ["a", "b", "d", "e"]).then_some(())
    })
    .await;
    let mut sequences = 1..;
    eventually("one is not counted", || {
        let batch = device.upload_nth(sequences.next());
        async {
            batch.await.expect("accepted");
            (gateway.metric(SILENT).await == Some(4.0)).then_some(())
        }
    })
    .await;
    eventually("until it is silent again", || async { (gateway.metric(SILENT).await == Some(5.0)).then_some(()) }).await;
}

async fn register_five(channel: &Channel) {
    for id in ["a", "b", "c", "d", "e"] {
        let device = pb::Device { id: id.into(), ..Default::default() };
        devices(channel).create_device(pb::CreateDeviceRequest { device: Some(device) }).await.expect("registered");
    }
}
