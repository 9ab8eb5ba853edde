//! Disks that fail: whatever they refuse, tear or forget, what was acknowledged is there, once; and when the disk is well again,
//! so is the gateway.

use crate::support::{
    client::{SECOND, T0, TestDevice, devices, temperatures},
    disk::{FaultyDisk, SmallDisk},
    eventually, health_is, http_get,
    identity::with_token,
    load::{Load, log},
    metric, not_ready,
    process::GatewayProcess,
    random::seeded,
    soon,
};
use bytes::Bytes;
use rand::Rng;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tidegate::{error::StatusFacts, pb};
use tonic::Code;

/// So that some faults come while the log is merged.
const MERGES_OFTEN: &str = "--history-unmerged-bytes-max=1";

/// Everybody is told, as long as the disk fails.
async fn is_told(gateway: &GatewayProcess, why: &str) {
    not_ready(gateway, why).await;
    health_is(gateway, false).await;
    let status = TestDevice::new(&gateway.channel(), "another").upload_nth(1..=1).await.expect_err("nothing is acknowledged");
    assert_eq!((status.code(), StatusFacts::of(&status).reason()), (Code::Unavailable, "STORE_UNAVAILABLE"), "{status:?}");
    assert!(StatusFacts::of(&status).retry_after.is_some(), "it says when to try again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fails_stops_acknowledgements_until_it_is_well() {
    let disk = FaultyDisk::new();
    let gateway = disk.start(&[MERGES_OFTEN]).await;
    let load = Load::start(&gateway.channel(), 5);
    for (fault, why) in [
        ("fsync EIO", "the database's disk fails"),
        ("pwrite ENOSPC", "the database's disk is full: free some space"),
        ("pwrite EIO", "the database's disk fails"),
    ] {
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
    let mut gateway = disk.start(&[MERGES_OFTEN]).await;
    let load = Load::start(&gateway.channel(), 5);
    for _ in 0..5 {
        load.runs_on(random.random_range(100..600)).await;
        gateway.kill();
        disk.cut_power(&mut random);
        gateway = disk.start(&[MERGES_OFTEN]).await;
        load.moves_to(&gateway.channel()).await;
    }
    load.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn power_that_is_cut_after_a_failed_sync_takes_nothing_that_was_acknowledged() {
    let mut random = seeded("power cuts after failed syncs");
    let disk = FaultyDisk::new();
    let mut gateway = disk.start(&[MERGES_OFTEN]).await;
    let load = Load::start(&gateway.channel(), 5);
    for _ in 0..2 {
        load.runs_on(random.random_range(20..100)).await;
        disk.fail("fsync EIO");
        is_told(&gateway, "the database's disk fails").await;
        disk.heal();
        load.runs_on(random.random_range(20..100)).await;
        gateway.kill();
        disk.cut_power(&mut random);
        gateway = disk.start(&[MERGES_OFTEN]).await;
        load.moves_to(&gateway.channel()).await;
    }
    load.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_called_so_and_is_well_when_there_is_room_again() {
    let Some(disk) = SmallDisk::mount(16) else { return };
    let data_dir = disk.path().join("data");
    let mut gateway = GatewayProcess::start(&data_dir).await;
    let load = Load::start(&gateway.channel(), 5);
    for _ in 0..3 {
        load.runs_on(30).await;
        disk.fill();
        is_told(&gateway, "the database's disk is full: free some space").await;
        disk.clear();
        health_is(&gateway, true).await;
    }
    // A start without room says so, too, and harms nothing.
    load.runs_on(30).await;
    gateway.kill();
    disk.fill();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let command = || GatewayProcess::command(&data_dir, any, any);
    gateway = GatewayProcess::serving(command()).await;
    // A commit in whose middle it was killed has left room in the WAL for a few pages, which the load then takes.
    load.moves_to(&gateway.channel()).await;
    is_told(&gateway, "the database's disk is full: free some space").await;
    disk.clear();
    health_is(&gateway, true).await;
    load.runs_on(30).await;
    load.ends_well().await;
    // After a start of the machine there may be no room even to open the database.
    gateway.kill();
    std::fs::remove_file(data_dir.join("tidegate.db-shm")).expect("removed");
    disk.fill();
    let mut starting = GatewayProcess::spawn(command());
    assert!(!starting.wait().await.success());
    assert!(starting.log().contains("disk is full: free some space"), "{}", starting.log());
}

/// Waits until the gateway reads no more, and looks all the while that no more waits for a commit than may.
async fn reads_no_more(gateway: &GatewayProcess, pending_bytes_max: f64) -> f64 {
    let series = "tidegate_grpc_messages_received_total{method=\"tidegate.v1.TelemetryService/Upload\"}";
    let (mut last, mut looks) = (0.0, 0);
    let look = async {
        while looks < 10 {
            let (_, text) = http_get(gateway.http, "/metrics").await.expect("answered");
            let pending = metric(&text, "tidegate_pending_bytes").expect("there is one");
            assert!(pending <= pending_bytes_max, "{pending} bytes wait");
            let read = metric(&text, series).unwrap_or_default();
            looks = if read > 0.0 && read == last { looks + 1 } else { 0 };
            last = read;
        }
    };
    soon("no more is read", look).await;
    last
}

/// A batch of some 8 kB.
fn large_batch(sequence: u64) -> Bytes {
    let first = i64::try_from(sequence).expect("small") * 1_000;
    temperatures(T0 + first * SECOND, &vec![1.0; 1_000])
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_bounded_while_the_disk_stalls_and_all_goes_on_when_it_does() {
    const DEVICES: u64 = 20;
    const PENDING_BYTES_MAX: usize = 65_536;
    let disk = FaultyDisk::new();
    let gateway = disk.start(&[&format!("--ingest-pending-bytes-max={PENDING_BYTES_MAX}"), "--ingest-batch-bytes-max=16384"]).await;
    let devices: Vec<TestDevice> = (0..DEVICES).map(|number| TestDevice::new(&gateway.channel(), &format!("pump-{number}"))).collect();
    for device in &devices {
        device.upload([(1, large_batch(1))]).await.expect("accepted");
    }
    disk.fail("fsync stall");
    let uploads: Vec<_> = devices
        .iter()
        .cloned()
        .map(|device| tokio::spawn(async move { device.upload((1..=30).map(|n| (n, large_batch(n)))).await }))
        .collect();
    let read = reads_no_more(&gateway, PENDING_BYTES_MAX as f64).await;
    // What waits, one batch a call that waits for room, and those that were there before.
    let admitted = PENDING_BYTES_MAX / large_batch(1).len();
    assert!(read <= admitted as f64 + 2.0 * DEVICES as f64, "{read} batches were read, {admitted} may wait");
    not_ready(&gateway, "a commit has taken more than").await;
    disk.heal();
    health_is(&gateway, true).await;
    for upload in uploads {
        let response = soon("the upload ends", upload).await.expect("no panic").expect("accepted");
        assert_eq!(response.last_durable_sequence, 30);
    }
}

/// Scenario: a device hands over a backlog of thousands of batches, and another one a single batch behind it. Guarantee: that
/// one waits for no more than what a call may have waiting.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_does_not_hold_up_another_device() {
    const BACKLOG: u64 = 3_000;
    let disk = FaultyDisk::new();
    let gateway = disk.start(&[MERGES_OFTEN]).await;
    let (busy, other) = (TestDevice::new(&gateway.channel(), "busy"), TestDevice::new(&gateway.channel(), "other"));
    other.upload_nth(1..=1).await.expect("accepted");
    busy.upload_nth(1..=1).await.expect("accepted");
    // While the disk stalls both have time to hand over what they may.
    disk.fail("fsync stall");
    let backlog = tokio::spawn(async move { busy.upload_nth(1..=BACKLOG).await });
    reads_no_more(&gateway, f64::MAX).await;
    let late = other.clone();
    let single = tokio::spawn(async move { late.upload_nth(2..=2).await });
    reads_no_more(&gateway, f64::MAX).await;
    disk.heal();
    soon("the single batch is stored", single).await.expect("no panic").expect("accepted");
    soon("the backlog is stored", backlog).await.expect("no panic").expect("accepted");
    let stored = log(&gateway.channel()).await;
    assert_eq!(stored.iter().map(|entry| entry.batches).sum::<u64>(), BACKLOG + 2);
    let last = stored.iter().rposition(|entry| entry.device == other.id).expect("it is stored");
    let before: u64 = stored[..last].iter().map(|entry| entry.batches).sum();
    let unacknowledged_max = tidegate::config::Config::default().ingest.unacknowledged_batches_max as u64;
    assert!(before <= unacknowledged_max + 3, "{before} batches were before it");
}

/// Scenario: an operator changes something while the disk stalls, so that neither the change nor its entry in the audit log can be
/// written. Guarantee: the call ends at its deadline, and not when the disk goes on.
#[tokio::test(flavor = "multi_thread")]
async fn an_operators_call_ends_while_the_disk_stalls() {
    let disk = FaultyDisk::new();
    let gateway = disk.start(&["--auth-mode=required", "--grpc-unary-deadline-max=1s"]).await;
    let token = std::fs::read_to_string(disk.data_dir().join("admin-token")).expect("left at the first start");
    let mut registry = devices(&with_token(gateway.grpc, token.trim()));
    let create = |id: &str| pb::CreateDeviceRequest { device: Some(pb::Device { id: id.into(), ..Default::default() }) };
    registry.create_device(create("before")).await.expect("the disk is well");
    disk.fail("fsync stall");
    let status = soon("the call ends", registry.create_device(create("meanwhile"))).await.expect_err("it cannot be known to be done");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    disk.heal();
    health_is(&gateway, true).await;
    registry.create_device(create("after")).await.expect("the disk is well again");
}

/// Scenario: a disk hangs while a device uploads and an operator registers another one. Guarantee: what took long is in the log, with what
/// is needed to find out whom it concerned; and what did not is not.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_slow_disk_holds_up_is_told_in_the_log() {
    let disk = FaultyDisk::new();
    let gateway = disk.start(&["--log-slow-call=2s", "--log-slow-commit=2s"]).await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload_nth(1..=1).await.expect("accepted");
    disk.fail("fsync stall");
    let sending = device.clone();
    let upload = tokio::spawn(async move { sending.upload_nth(2..=3).await });
    not_ready(&gateway, "a commit has taken more than").await;
    let mut registry = devices(&gateway.channel());
    let create = pb::CreateDeviceRequest { device: Some(pb::Device { id: "pump-2".into(), ..Default::default() }) };
    let mut create = tonic::Request::new(create);
    create.metadata_mut().insert("x-request-id", "registering".parse().expect("ASCII"));
    let creating = tokio::spawn(async move { registry.create_device(create).await });
    let in_flight = "tidegate_grpc_requests_in_flight{method=\"tidegate.v1.DeviceService/CreateDevice\"}";
    let held_up = || async {
        let (_, text) = http_get(gateway.http, "/metrics").await?;
        (metric(&text, in_flight)? > 0.0).then_some(())
    };
    eventually("it is held up, too", held_up).await;
    let began = Instant::now();
    eventually("for longer than is quick", || async { (began.elapsed() > Duration::from_millis(2_500)).then_some(()) }).await;
    disk.heal();
    soon("the upload ends", upload).await.expect("no panic").expect("accepted");
    soon("it is registered", creating).await.expect("no panic").expect("registered");
    device.upload_nth(4..=4).await.expect("accepted");

    let lines = |event: &'static str| {
        let gateway = &gateway;
        eventually(event, move || async move {
            let lines: Vec<serde_json::Value> = gateway.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            let told: Vec<_> = lines.into_iter().filter(|line| line["message"] == event).collect();
            (!told.is_empty()).then_some(told)
        })
    };
    let (commits, calls) = (lines("commit.slow").await, lines("call.slow").await);
    assert_eq!((commits.len(), calls.len()), (1, 1), "{commits:?} {calls:?}");
    assert_eq!(
        (&commits[0]["batches"], &commits[0]["readings"], &commits[0]["left_out"]),
        (&2.into(), &20.into(), &0.into()),
        "{commits:?}"
    );
    assert!(commits[0]["bytes"].as_u64() > Some(0) && commits[0]["duration_ms"].as_f64() > Some(2_000.0), "{commits:?}");
    assert_eq!((&calls[0]["resource"], &calls[0]["status"]), (&"devices/pump-2".into(), &"OK".into()), "{calls:?}");
    assert_eq!((&calls[0]["span"]["request_id"], &calls[0]["level"]), (&"registering".into(), &"WARN".into()), "{calls:?}");
}
