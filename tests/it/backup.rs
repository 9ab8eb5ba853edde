//! A backup of a running gateway, and a gateway that is started on it.

use crate::support::{
    TestGateway,
    client::{TestDevice, live, nth_batch, nth_temperatures},
    eventually,
    process::GatewayProcess,
    script::Script,
    soon,
};
use std::{
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use tempfile::TempDir;
use tidegate::{
    client::{EncodedBatch, Queue, QueueLimits, Uploader, UploaderSettings},
    model::{DeviceId, StreamId},
    pb::{self, follow_request::Start, follow_response::Message},
};

fn backup(data_dir: &Path, to: &Path) -> Script {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.arg("backup").arg("--to").arg(to).arg("--storage-data-dir").arg(data_dir);
    Script::start(command)
}

/// An empty directory with a backup in it, as one restores it.
fn restored(copy: &Path) -> TempDir {
    let directory = TempDir::new().expect("a temporary directory");
    std::fs::copy(copy, directory.path().join("tidegate.db")).expect("copied");
    directory
}

/// Scenario: a device uploads all the time while the backup is made. Guarantee: all that was acknowledged before is in it, as
/// are whole batches only, each once; and the device was served meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_has_all_that_was_acknowledged_before_it_and_nothing_doubled() {
    let directory = TempDir::new().expect("a temporary directory");
    let gateway = GatewayProcess::start(directory.path()).await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let (acknowledged, enough) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let uploading = tokio::spawn({
        let (device, acknowledged, enough) = (device.clone(), acknowledged.clone(), enough.clone());
        async move {
            while !enough.load(Ordering::Relaxed) {
                let last = acknowledged.load(Ordering::Relaxed);
                let response = device.upload_nth(last + 1..=last + 20).await.expect("accepted");
                acknowledged.store(response.last_durable_sequence, Ordering::Relaxed);
            }
        }
    });
    let reaches = async |sequence| {
        eventually("further batches are acknowledged", || async { (acknowledged.load(Ordering::Relaxed) >= sequence).then_some(()) }).await;
    };
    reaches(500).await;
    let before = acknowledged.load(Ordering::Relaxed);
    let copy = directory.path().join("copy.db");
    let told = backup(directory.path(), &copy).succeeds().await;
    assert!(told.starts_with(&format!("{}: 1 devices, ", copy.display())) && told.contains("checked"), "{told}");
    reaches(acknowledged.load(Ordering::Relaxed) + 100).await;
    enough.store(true, Ordering::Relaxed);
    soon("the upload ends", uploading).await.expect("no panic");

    let gateway = TestGateway::start_on(restored(&copy)).await;
    let device = device.on(&gateway.channel());
    let position = device.position().await;
    assert!(position >= before, "{before} were acknowledged, {position} are in the backup");
    assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=position));
    assert_eq!(device.ledger().await.stored, Some(pb::Tally { batches: position, readings: position * 10 }));
    let resumed = device.upload_nth(position + 1..=position + 3).await.expect("accepted");
    assert_eq!(resumed.last_durable_sequence, position + 3);
    assert!(gateway.stop().await);
}

/// Scenario: a gateway goes on after its backup, is lost, and comes back from the backup. Guarantee: the device says what is
/// gone and goes on; a follower goes on with the token that it has, and misses nothing of what is stored from then on.
#[tokio::test(flavor = "multi_thread")]
async fn devices_and_followers_go_on_with_a_restored_gateway() {
    let directory = TempDir::new().expect("a temporary directory");
    let copy = directory.path().join("copy.db");
    let data = directory.path().join("data");
    let gateway = GatewayProcess::start(&data).await;
    let queue = Queue::in_memory(StreamId::new(), QueueLimits::default());
    let id = DeviceId::parse("pump-1").expect("good");
    let upload = async |channel, sequences: std::ops::RangeInclusive<u64>| {
        for sequence in sequences {
            queue.push(EncodedBatch { bytes: nth_batch(sequence), readings: 10 }).await.expect("room");
        }
        Uploader::new(id.clone(), queue.clone(), channel, UploaderSettings::default()).upload().await.expect("taken")
    };
    upload(gateway.channel(), 1..=5).await;
    backup(&data, &copy).succeeds().await;
    upload(gateway.channel(), 6..=8).await;
    let request = pb::FollowRequest { start: Some(Start::LiveOnly(true)), ..Default::default() };
    let mut follower = live(&gateway.channel()).follow(request).await.expect("followed").into_inner();
    let token = soon("Synced", follower.message()).await.expect("no error").expect("a message").resume_token;
    drop(gateway);

    let gateway = TestGateway::start_on(restored(&copy)).await;
    let request = pb::FollowRequest { start: Some(Start::ResumeToken(token)), ..Default::default() };
    let mut follower = live(&gateway.channel()).follow(request).await.expect("the token is good").into_inner();
    let summary = upload(gateway.channel(), 9..=9).await;
    assert_eq!((summary.forgotten_batches, summary.last_durable_sequence), (3, 9));
    let device = TestDevice { stream_id: queue.stream_id(), ..TestDevice::new(&gateway.channel(), "pump-1") };
    assert_eq!(device.stored_temperatures().await, nth_temperatures((1..=5).chain([9])));
    assert_eq!(device.ledger().await.lost.expect("set").batches, 3);
    let shown = async {
        loop {
            match follower.message().await.expect("no error").expect("it goes on").message {
                Some(Message::Readings(readings)) => return readings.batch,
                _ => continue,
            }
        }
    };
    assert_eq!(soon("the first batch after the restore", shown).await, nth_batch(9));
    drop(follower);
    assert!(gateway.stop().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_overwrites_nothing_leaves_nothing_behind_and_needs_no_running_gateway() {
    let directory = TempDir::new().expect("a temporary directory");
    let data = directory.path().join("data");
    let copy = directory.path().join("copy.db");
    backup(&data, &copy).fails(1).await;
    let gateway = GatewayProcess::start(&data).await;
    TestDevice::new(&gateway.channel(), "pump-1").upload_nth(1..=3).await.expect("accepted");
    drop(gateway);
    std::fs::write(&copy, "somebody's").expect("written");
    backup(&data, &copy).fails(1).await;
    assert_eq!(std::fs::read(&copy).expect("readable"), b"somebody's");
    std::fs::remove_file(&copy).expect("removed");
    backup(&data, &copy).succeeds().await;
    let names: Vec<_> = std::fs::read_dir(directory.path()).expect("readable").map(|entry| entry.expect("readable").file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}
