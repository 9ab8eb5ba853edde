//! When a device was last heard of.

use crate::support::{
    client::{TestDevice, devices, temperatures},
    database::{Database, on_each_database},
    streams::Link,
};
use tidegate::{client::Channel, model::Timestamp, pb};

on_each_database!(a_device_is_seen_when_it_connects_and_when_it_uploads);

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
