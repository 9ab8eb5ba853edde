//! Disks that fail: whatever they refuse, tear or forget, what was acknowledged is there, once; and when the disk is well again,
//! so is the gateway.

use crate::support::{
    client::TestDevice, disk::FaultyDisk, eventually, health_is, http_get, load::Load, process::GatewayProcess, random::seeded,
};
use rand::Rng;
use tidegate::error::StatusFacts;
use tonic::Code;

/// Says no, and why, as long as the disk does.
async fn is_told(gateway: &GatewayProcess, why: &str) {
    let (_, text) =
        eventually("readiness says so", || async { http_get(gateway.http, "/readyz").await.filter(|(code, _)| *code == 503) }).await;
    assert!(text.contains("store: not ready") && text.contains(why), "{text}");
    health_is(gateway, false).await;
    let status = TestDevice::new(&gateway.channel(), "another").upload_nth(1..=1).await.expect_err("nothing is acknowledged");
    assert_eq!((status.code(), StatusFacts::of(&status).reason()), (Code::Unavailable, "STORE_UNAVAILABLE"), "{status:?}");
    assert!(StatusFacts::of(&status).retry_after.is_some(), "it says when to try again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fails_stops_acknowledgements_until_it_is_well() {
    let disk = FaultyDisk::new();
    let gateway = disk.start(&[]).await;
    let load = Load::start(&gateway.channel(), 5);
    for (fault, why) in [("fsync EIO", "disk I/O error"), ("pwrite ENOSPC", "free some space"), ("pwrite EIO", "disk I/O error")] {
        load.runs_on(30).await;
        disk.fail(fault);
        is_told(&gateway, why).await;
        let told = load.acknowledged();
        // A second look, as the first acknowledgement that is wrong may come later.
        is_told(&gateway, why).await;
        assert_eq!(load.acknowledged(), told, "{fault}");
        disk.heal();
        health_is(&gateway, true).await;
    }
    load.runs_on(30).await;
    load.ends_well().await;
}

/// Scenario: the machine loses its power, again and again, and its disk keeps any part of what was written since the last
/// sync. Guarantee: what was acknowledged is there.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_outlives_a_power_cut_that_tears_the_wal() {
    let mut random = seeded("power cuts");
    let disk = FaultyDisk::new();
    let mut gateway = disk.start(&[]).await;
    let load = Load::start(&gateway.channel(), 5);
    for _ in 0..5 {
        load.runs_on(random.random_range(100..600)).await;
        gateway.kill();
        disk.cut_power(&mut random);
        gateway = disk.start(&[]).await;
        load.moves_to(&gateway.channel()).await;
    }
    load.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn power_that_is_cut_after_a_failed_sync_takes_nothing_that_was_acknowledged() {
    let mut random = seeded("power cuts after failed syncs");
    let disk = FaultyDisk::new();
    let mut gateway = disk.start(&[]).await;
    let load = Load::start(&gateway.channel(), 5);
    for _ in 0..2 {
        load.runs_on(random.random_range(20..100)).await;
        disk.fail("fsync EIO");
        is_told(&gateway, "disk I/O error").await;
        disk.heal();
        load.runs_on(random.random_range(20..100)).await;
        gateway.kill();
        disk.cut_power(&mut random);
        gateway = disk.start(&[]).await;
        load.moves_to(&gateway.channel()).await;
    }
    load.ends_well().await;
}
