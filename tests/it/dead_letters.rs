//! What was rejected is kept, and stored after all once what was wrong is mended: once, and the ledger adds up.

use crate::support::{
    client::{T0, TestDevice, devices, nth_batch, nth_temperatures, temperatures},
    database::{Database, on_each_database},
    load,
};
use futures_util::future::join_all;
use tidegate::{
    client::Channel,
    error::StatusFacts,
    pb::{self, RejectReason, dead_letter_service_client::DeadLetterServiceClient},
};
use tonic::Status;

on_each_database!(
    a_rejected_batch_is_stored_when_its_cause_is_mended,
    of_replays_at_once_one_stores_it,
    pages_of_rejected_batches_are_whole,
    a_deleted_one_is_still_counted,
);

fn dead_letters(channel: &Channel) -> DeadLetterServiceClient<Channel> {
    DeadLetterServiceClient::new(channel.clone())
}

async fn list(channel: &Channel) -> Vec<pb::DeadLetter> {
    let request = pb::ListDeadLettersRequest { device: "pump-1".into(), ..Default::default() };
    dead_letters(channel).list_dead_letters(request).await.expect("listed").into_inner().dead_letters
}

async fn replay(channel: &Channel, id: i64) -> Result<u64, Status> {
    let request = pb::ReplayDeadLetterRequest { device: "pump-1".into(), id };
    Ok(dead_letters(channel).replay_dead_letter(request).await?.into_inner().stored_readings)
}

fn reason(result: Result<u64, Status>) -> String {
    StatusFacts::of(&result.expect_err("refused")).reason().to_owned()
}

/// The operator's mend: the sensor takes NaN.
async fn allow_nan(channel: &Channel) {
    let sensor = pb::Sensor { name: "t".into(), allow_non_finite: true, ..Default::default() };
    let request = pb::UpdateSensorRequest { device: "pump-1".into(), sensor: Some(sensor), allow_missing: false };
    devices(channel).update_sensor(request).await.expect("updated");
}

/// What became of the batches: stored, duplicate, and rejected for which reason how many.
async fn account(device: &TestDevice) -> (u64, u64, Vec<(RejectReason, u64, u64)>) {
    let ledger = device.ledger().await;
    let batches = |tally: Option<pb::Tally>| tally.unwrap_or_default().batches;
    let rejected = ledger.rejected.iter().map(|count| (count.reason(), count.batches, count.readings)).collect();
    (batches(ledger.stored), batches(ledger.duplicate), rejected)
}

const NAN_AT: i64 = T0 - 1_000_000;

async fn a_rejected_batch_is_stored_when_its_cause_is_mended(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let nan = temperatures(NAN_AT, &[f64::NAN]);
    device.upload([(1, nth_batch(1)), (2, nan.clone()), (3, temperatures(i64::MAX, &[1.0]))]).await.expect("answered");
    let kept = list(&gateway.channel()).await;
    let told: Vec<_> = kept.iter().map(|letter| (letter.sequence, letter.reason(), letter.readings, letter.batch.is_empty())).collect();
    assert_eq!(told, [(2, RejectReason::NonFinite, 1, true), (3, RejectReason::TimeInFuture, 1, true)]);
    assert_eq!(kept[0].stream_id, device.stream_id.as_bytes().to_vec());
    let request = pb::GetDeadLetterRequest { device: "pump-1".into(), id: kept[0].id };
    let whole = dead_letters(&gateway.channel()).get_dead_letter(request).await.expect("there").into_inner().dead_letter.expect("set");
    assert_eq!((whole.size_bytes, whole.batch), (nan.len() as u64, nan));

    assert_eq!(reason(replay(&gateway.channel(), kept[0].id).await), "STILL_REJECTED");
    let both = vec![(RejectReason::NonFinite, 1, 1), (RejectReason::TimeInFuture, 1, 1)];
    assert_eq!(account(&device).await, (1, 0, both));

    allow_nan(&gateway.channel()).await;
    let before = load::log(&gateway.channel()).await.len();
    assert_eq!(replay(&gateway.channel(), kept[0].id).await.expect("mended"), 1);
    assert_eq!(reason(replay(&gateway.channel(), kept[0].id).await), "DEAD_LETTER_NOT_FOUND");
    let gateway = gateway.restart().await;
    let device = device.on(&gateway.channel());
    assert_eq!(reason(replay(&gateway.channel(), kept[0].id).await), "DEAD_LETTER_NOT_FOUND");
    assert_eq!(account(&device).await, (2, 0, vec![(RejectReason::TimeInFuture, 1, 1)]));
    assert_eq!(load::log(&gateway.channel()).await.len(), before + 1, "followers see it once");

    // The stream is where it was: a replay has no place in it.
    assert_eq!(device.position().await, 3);
    device.upload_nth([4]).await.expect("accepted");
    let stored = device.stored_temperatures().await;
    assert!(stored[0].0 == NAN_AT && stored[0].1.is_nan());
    assert_eq!(stored[1..], nth_temperatures([1, 4]));
}

async fn of_replays_at_once_one_stores_it(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    device.upload([(1, nth_batch(1)), (2, temperatures(NAN_AT, &[f64::NAN]))]).await.expect("answered");
    allow_nan(&channel).await;
    let id = list(&channel).await[0].id;
    let results = join_all((0..8).map(|_| replay(&channel, id))).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    assert_eq!(account(&device).await, (2, 0, vec![]));
    assert_eq!(device.stored_temperatures().await.len(), 11);
}

async fn pages_of_rejected_batches_are_whole(on: Database) {
    let gateway = on.gateway_with(|config| config.ingest.rejected_batches_kept_max = 5).await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    device.upload((1..=7).map(|sequence| (sequence, bytes::Bytes::from_static(b"\xff\xff")))).await.expect("answered");
    TestDevice::new(&gateway.channel(), "pump-2").upload([(1, nth_batch(1))]).await.expect("accepted");
    let mut request = pb::ListDeadLettersRequest { device: "pump-1".into(), page_size: 2, page_token: String::new() };
    let mut sequences = Vec::new();
    loop {
        let page = dead_letters(&gateway.channel()).list_dead_letters(request.clone()).await.expect("listed").into_inner();
        assert!((1..=2).contains(&page.dead_letters.len()));
        sequences.extend(page.dead_letters.iter().map(|letter| letter.sequence));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(sequences, [3, 4, 5, 6, 7], "the last five are kept");
    assert_eq!(account(&device).await, (0, 0, vec![(RejectReason::Malformed, 7, 0)]));
    let of_another = pb::GetDeadLetterRequest { device: "pump-2".into(), id: 3 };
    let status = dead_letters(&gateway.channel()).get_dead_letter(of_another).await.expect_err("it is not pump-2's");
    assert_eq!(StatusFacts::of(&status).reason(), "DEAD_LETTER_NOT_FOUND");
    let forged = pb::ListDeadLettersRequest { page_token: "p1.x".into(), ..request };
    let status = dead_letters(&gateway.channel()).list_dead_letters(forged).await.expect_err("not a token");
    assert_eq!(StatusFacts::of(&status).reason(), "INVALID_ARGUMENT");
}

async fn a_deleted_one_is_still_counted(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    device.upload([(1, bytes::Bytes::from_static(b"\xff\xff"))]).await.expect("answered");
    let request = pb::DeleteDeadLetterRequest { device: "pump-1".into(), id: list(&channel).await[0].id };
    dead_letters(&channel).delete_dead_letter(request.clone()).await.expect("deleted");
    let status = dead_letters(&channel).delete_dead_letter(request).await.expect_err("it is gone");
    assert_eq!(StatusFacts::of(&status).reason(), "DEAD_LETTER_NOT_FOUND");
    assert!(list(&channel).await.is_empty());
    assert_eq!(account(&device).await, (0, 0, vec![(RejectReason::Malformed, 1, 0)]));
}
