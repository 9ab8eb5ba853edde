//! Connect: batches up and acknowledgements down, configurations down and reports up, on one stream.

use crate::support::{
    client::{TestDevice, configs, links, nth_batch, nth_temperatures, temperatures},
    database::{Database, on_each_database},
    eventually, soon,
    streams::{Desk, Link, create, device_target, step},
};
use serde_json::json;
use tidegate::{
    error::StatusFacts,
    pb::{self, ConfigOutcome, ConfigState, RejectReason, connect_request, connect_response},
};
use tokio::sync::mpsc;

on_each_database!(
    batches_are_acknowledged_on_the_stream_and_resumed_after_a_break,
    a_gap_does_not_end_the_stream_and_the_device_goes_on_from_what_is_expected,
    a_device_that_closes_its_side_gets_its_last_acknowledgements_and_an_ok,
    an_offline_device_gets_the_latest_revision_when_it_connects_and_only_that,
    a_stream_that_does_not_begin_with_hello_and_reports_of_nothing_are_refused,
);

async fn batches_are_acknowledged_on_the_stream_and_resumed_after_a_break(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let (mut link, welcome) = Link::open(&device, 0).await;
    assert_eq!(welcome.last_durable_sequence, 0);
    for sequence in 1..=100 {
        link.send_batch(sequence, nth_batch(sequence)).await;
    }
    let acks = link.acknowledged(100).await;
    assert!(acks.iter().all(|ack| ack.duplicate_batches == 0 && ack.rejected.is_empty()));
    drop(link);

    let (mut link, welcome) = Link::open(&device, 0).await;
    assert_eq!(welcome.last_durable_sequence, 100);
    link.send_batch(100, nth_batch(100)).await;
    link.send_batch(101, temperatures(i64::MAX, &[1.0])).await;
    link.send_batch(102, nth_batch(102)).await;
    let acks = link.acknowledged(102).await;
    assert_eq!(acks.iter().map(|ack| ack.duplicate_batches).sum::<u64>(), 1);
    let rejected: Vec<_> = acks.iter().flat_map(|ack| &ack.rejected).map(|rejected| (rejected.sequence, rejected.reason())).collect();
    assert_eq!(rejected, [(101, RejectReason::TimeInFuture)]);
    assert_eq!(device.stored_temperatures().await, nth_temperatures((1..=100).chain([102])));
}

async fn a_gap_does_not_end_the_stream_and_the_device_goes_on_from_what_is_expected(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let (mut link, _) = Link::open(&device, 0).await;
    link.send_batch(1, nth_batch(1)).await;
    link.acknowledged(1).await;
    for sequence in [3, 4, 5] {
        link.send_batch(sequence, nth_batch(sequence)).await;
    }
    match link.next().await {
        connect_response::Message::SequenceGap(gap) => assert_eq!((gap.expected_sequence, gap.received_sequence), (2, 3)),
        other => panic!("not a gap: {other:?}"),
    }
    for sequence in 2..=5 {
        link.send_batch(sequence, nth_batch(sequence)).await;
    }
    link.acknowledged(5).await;
    assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=5));
}

async fn a_device_that_closes_its_side_gets_its_last_acknowledgements_and_an_ok(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let (mut link, _) = Link::open(&device, 0).await;
    for sequence in 1..=20 {
        link.send_batch(sequence, nth_batch(sequence)).await;
    }
    let (closed, _) = mpsc::channel(1);
    link.up = closed;
    link.acknowledged(20).await;
    assert_eq!(link.try_next().await.expect("OK"), None);
}

async fn an_offline_device_gets_the_latest_revision_when_it_connects_and_only_that(on: Database) {
    let gateway = on.gateway().await;
    let channel = gateway.channel();
    create(&channel, "pump-1", &[]).await;
    let mut desk = Desk::open(&channel).await;
    for revision in 1..=3 {
        desk.set(&format!("set-{revision}"), device_target("pump-1"), json!({"n": revision}), "").await;
        assert_eq!(desk.step().await, step("pump-1", revision, ConfigState::Accepted));
    }
    let gateway = gateway.restart().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let (mut link, _) = Link::open(&device, 0).await;
    assert_eq!(link.next_config().await, (3, json!({"n": 3})));
    link.report(3, ConfigOutcome::Applied, "").await;
    let mut client = configs(&gateway.channel());
    eventually("the report is stored", || {
        let mut client = client.clone();
        async move {
            let got = client.get_config(pb::GetConfigRequest { device: "pump-1".into() }).await.ok()?.into_inner();
            (got.config?.applied_revision == 3).then_some(())
        }
    })
    .await;
    drop(link);

    // Who runs with the latest is sent nothing; who has forgotten it is sent it again.
    let (mut link, _) = Link::open(&device, 3).await;
    link.send_batch(1, nth_batch(1)).await;
    link.acknowledged(1).await;
    let (mut reset, _) = Link::open(&TestDevice { stream_id: tidegate::model::StreamId::new(), ..device.clone() }, 0).await;
    assert_eq!(reset.next_config().await.0, 3);

    let list =
        |page_size, page_token: &str| pb::ListConfigRevisionsRequest { device: "pump-1".into(), page_size, page_token: page_token.into() };
    let first = client.list_config_revisions(list(2, "")).await.expect("listed").into_inner();
    let numbers = |page: &pb::ListConfigRevisionsResponse| page.revisions.iter().map(|revision| revision.revision).collect::<Vec<_>>();
    assert_eq!(numbers(&first), [3, 2]);
    let second = client.list_config_revisions(list(2, &first.next_page_token)).await.expect("listed").into_inner();
    assert_eq!((numbers(&second), second.next_page_token.as_str()), (vec![1], ""));
}

async fn a_stream_that_does_not_begin_with_hello_and_reports_of_nothing_are_refused(on: Database) {
    let gateway = on.gateway().await;
    let device = TestDevice::new(&gateway.channel(), "pump-1");
    let batch = connect_request::Message::Batch(pb::LinkBatch { sequence: 1, ..Default::default() });
    let request = tokio_stream::iter([pb::ConnectRequest { message: Some(batch) }]);
    let mut answer = links(&device.channel).connect(request).await.expect("the call begins").into_inner();
    let status = soon("the refusal", answer.message()).await.expect_err("no hello");
    assert_eq!(StatusFacts::of(&status).violations[0].field, "hello");

    let (mut link, _) = Link::open(&device, 0).await;
    link.report(0, ConfigOutcome::Unspecified, "").await;
    let status = link.try_next().await.expect_err("nonsense");
    assert_eq!(StatusFacts::of(&status).violations.len(), 2);
}
