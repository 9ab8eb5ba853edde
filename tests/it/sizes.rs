//! Answers are cut to what clients take by default, and what is in memory for them is bounded.

use crate::support::{
    TestGateway,
    client::{SECOND, T0, TestDevice, column, configs, devices, encode, frame, live, query},
    eventually, soon,
};
use std::{collections::BTreeSet, time::Duration};
use tidegate::{
    error::StatusFacts,
    model::columns::Values,
    pb::{self, configure_request, configure_response, follow_response, reading_service_client::ReadingServiceClient, set_config},
};
use tonic::{Code, Request};

const TEXTS_PER_BATCH: usize = 250;

/// A batch of nearly 1 MiB: as many texts of one sensor as a batch takes, a second apart.
fn texts(sequence: u64) -> bytes::Bytes {
    let begin = T0 + i64::try_from(sequence).expect("small") * 1_000 * SECOND;
    encode(vec![frame(begin, vec![column("note", "", Values::Text(vec!["x".repeat(4_096); TEXTS_PER_BATCH]))])])
}

fn query_of(device: &TestDevice) -> pb::QueryReadingsRequest {
    pb::QueryReadingsRequest { device: device.id.clone(), ..Default::default() }
}

#[tokio::test]
async fn a_query_of_long_texts_comes_in_small_pieces_until_it_takes_too_much_memory() {
    let gateway = TestGateway::start_with(|config| config.query.bytes_max = 8 << 20).await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    device.upload((1..=6).map(|sequence| (sequence, texts(sequence)))).await.expect("accepted");
    let (times, values) = query(&channel, query_of(&device)).await.expect("6 MB in pieces").remove("note").expect("there");
    assert_eq!((times.len(), values.len()), (6 * TEXTS_PER_BATCH, 6 * TEXTS_PER_BATCH));
    device.upload((7..=9).map(|sequence| (sequence, texts(sequence)))).await.expect("accepted");
    let status = query(&channel, query_of(&device)).await.expect_err("9 MB");
    let info = StatusFacts::of(&status).info.expect("ErrorInfo");
    assert_eq!((status.code(), info.reason.as_str()), (Code::ResourceExhausted, "QUERY_TOO_LARGE"));
    assert_eq!((info.metadata["setting"].as_str(), info.metadata["limit"].as_str()), ("query.bytes_max", "8388608"));
}

/// Scenario: of one sensor there are more readings than go into one piece, those of even seconds first and then those between them, and
/// they are merged while they are asked for. Guarantee: each comes once, in the order of time.
#[tokio::test]
async fn a_query_of_many_readings_that_are_being_merged_has_each_once() {
    const READINGS: i64 = 100_000;
    let gateway = TestGateway::start_with(|config| config.history.unmerged_bytes_max = 1).await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    let half = |offset: i64, batch: i64| {
        let seconds = (batch * 5_000..(batch + 1) * 5_000).map(|nth| 2 * nth + offset);
        encode(vec![pb::Frame {
            base_time_us: T0 + (batch * 10_000 + offset) * SECOND,
            time_deltas_us: vec![2 * SECOND; 4_999],
            columns: vec![column("count", "", Values::Int64(seconds.collect()))],
            ..Default::default()
        }])
    };
    let batches = (0..2).flat_map(|offset| (0..READINGS / 10_000).map(move |batch| half(offset, batch)));
    let upload = device.upload((1..).zip(batches));
    let asking = async {
        loop {
            let answer = query(&channel, query_of(&device)).await;
            let Ok(mut answer) = answer else { continue };
            let Some((times, values)) = answer.remove("count") else { continue };
            assert!(times.is_sorted_by(|a, b| a < b), "in order, and once");
            let Values::Int64(values) = values else { panic!("another kind") };
            assert!(times.iter().map(|time| (time - T0) / SECOND).eq(values), "each with its value");
            if times.len() as i64 == READINGS {
                return;
            }
        }
    };
    let (uploaded, ()) = tokio::join!(upload, soon("all are there", asking));
    uploaded.expect("accepted");
}

#[tokio::test]
async fn an_answer_that_is_not_read_counts_against_the_queries_until_it_is_dropped() {
    let gateway = TestGateway::start_with(|config| config.query.concurrent_max = 1).await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    // More than the connection holds without being read.
    device.upload((1..=8).map(|sequence| (sequence, texts(sequence)))).await.expect("accepted");
    let mut client = ReadingServiceClient::new(channel.clone());
    let unread = client.query_readings(query_of(&device)).await.expect("begun").into_inner();
    let mut second = Request::new(query_of(&device));
    second.set_timeout(Duration::from_millis(500));
    let status = client.query_readings(second).await.expect_err("there may be one answer at a time");
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
    drop(unread);
    let answer = soon("the place is free", query(&channel, query_of(&device))).await.expect("answered");
    assert_eq!(answer["note"].0.len(), 8 * TEXTS_PER_BATCH);
}

/// Scenario: an answer that nobody reads holds all that queries may. Guarantee: one that needs much, too, waits for it; one that needs
/// little does not.
#[tokio::test]
async fn what_is_not_merged_is_held_within_one_limit_for_all_queries() {
    let gateway = TestGateway::start_with(|config| config.query.memory_bytes_max = 4 << 20).await;
    let channel = gateway.channel();
    let (large, small) = (TestDevice::new(&channel, "pump-1"), TestDevice::new(&channel, "pump-2"));
    large.upload((1..=8).map(|sequence| (sequence, texts(sequence)))).await.expect("accepted");
    small.upload_nth([1]).await.expect("accepted");
    let mut client = ReadingServiceClient::new(channel.clone());
    let unread = client.query_readings(query_of(&large)).await.expect("more than all of it, but alone").into_inner();
    let mut second = Request::new(query_of(&large));
    second.set_timeout(Duration::from_millis(500));
    let status = client.query_readings(second).await.expect_err("all is held");
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
    assert_eq!(soon("a small answer", query(&channel, query_of(&small))).await.expect("answered")["t"].0.len(), 10);
    drop(unread);
    let answer = soon("there is room", query(&channel, query_of(&large))).await.expect("answered");
    assert_eq!(answer["note"].0.len(), 8 * TEXTS_PER_BATCH);
}

#[tokio::test]
async fn the_latest_readings_of_a_device_with_much_text_come_in_several_messages() {
    let gateway = TestGateway::start_with(|config| config.devices.sensors_max = 1_200).await;
    let channel = gateway.channel();
    let device = TestDevice::new(&channel, "pump-1");
    let text = |index: usize| column(&format!("s{index}"), "", Values::Text(vec!["x".repeat(4_096)]));
    let batches = (0..6).map(|batch| encode(vec![frame(T0, (batch * 200..batch * 200 + 200).map(text).collect())]));
    device.upload((1..).zip(batches)).await.expect("accepted");
    let mut shown = live(&channel).follow(pb::FollowRequest::default()).await.expect("begun").into_inner();
    let mut sensors = BTreeSet::new();
    loop {
        let response = soon("the next message", shown.message()).await.expect("small enough").expect("not the end");
        match response.message.expect("set") {
            follow_response::Message::Latest(latest) => {
                let columns = latest.batch.expect("set").frames.into_iter().flat_map(|frame| frame.columns);
                columns.for_each(|column| assert!(sensors.insert(column.sensor), "each sensor once"));
            }
            other => {
                assert!(matches!(other, follow_response::Message::Synced(_)), "{other:?}");
                break;
            }
        }
    }
    assert_eq!(sensors.len(), 1_200);
}

#[tokio::test]
async fn pages_of_large_devices_are_short_and_all_of_them_are_whole() {
    let gateway = TestGateway::start().await;
    let mut client = devices(&gateway.channel());
    let labels = |value: &str| (0..64).map(|index| (format!("{}{index:02}", "k".repeat(61)), value.repeat(255))).collect();
    let ids: Vec<String> = (0..250).map(|index| format!("pump-{index:03}")).collect();
    for id in &ids {
        let device = pb::Device { id: id.clone(), labels: labels("v"), ..Default::default() };
        client.create_device(pb::CreateDeviceRequest { device: Some(device) }).await.expect("created");
    }
    let (mut found, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = pb::ListDevicesRequest { page_size: 1_000, page_token, ..Default::default() };
        let page = client.list_devices(request).await.expect("small enough").into_inner();
        found.extend(page.devices.into_iter().map(|device| device.id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(found, ids);
}

#[tokio::test]
async fn pages_of_large_configurations_are_short_and_all_of_them_are_whole() {
    const REVISIONS: u64 = 75;
    let gateway = TestGateway::start().await;
    let channel = gateway.channel();
    let device = pb::Device { id: "pump-1".into(), ..Default::default() };
    devices(&channel).create_device(pb::CreateDeviceRequest { device: Some(device) }).await.expect("created");
    let set = |request: u64| {
        let text = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue("x".repeat(60_000))) };
        let set = pb::SetConfig {
            request_id: request.to_string(),
            target: Some(set_config::Target::Device("pump-1".into())),
            config: Some(prost_types::Struct { fields: [("text".to_owned(), text)].into() }),
            ..Default::default()
        };
        pb::ConfigureRequest { message: Some(configure_request::Message::Set(set)) }
    };
    let requests = tokio_stream::iter((1..=REVISIONS).map(set));
    let mut events = configs(&channel).configure(requests).await.expect("begun").into_inner();
    let mut accepted = 0;
    while accepted < REVISIONS {
        let response = soon("all are accepted", events.message()).await.expect("no error").expect("not the end");
        if let Some(configure_response::Message::SetDone(done)) = response.message {
            accepted += done.accepted;
        }
    }
    let (mut found, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = pb::ListConfigRevisionsRequest { device: "pump-1".into(), page_size: 1_000, page_token };
        let page = configs(&channel).list_config_revisions(request).await.expect("small enough").into_inner();
        found.extend(page.revisions.into_iter().map(|revision| revision.revision));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(found, (1..=REVISIONS).rev().collect::<Vec<_>>());
}

#[tokio::test]
async fn a_ledger_shows_the_last_streams_and_counts_all_however_much_devices_say() {
    let gateway = TestGateway::start().await;
    let channel = gateway.channel();
    let batch = crate::support::client::temperatures(T0, &[1.0]);
    let streams: Vec<TestDevice> = (0..103).map(|_| TestDevice::new(&channel, "pump-1")).collect();
    for (index, stream) in streams.iter().enumerate() {
        let lost_readings = if index < 3 { i64::MAX as u64 } else { 0 };
        let lost = pb::UploadRequest { lost_batches: 1, lost_readings, ..stream.request(2, batch.clone()) };
        stream.upload_requests(vec![lost]).await.expect("accepted");
    }
    let ledger = eventually("all is counted", || async {
        let ledger = streams[0].ledger().await;
        (ledger.stored == Some(pb::Tally { batches: 103, readings: 103 })).then_some(ledger)
    })
    .await;
    assert_eq!(ledger.lost, Some(pb::Tally { batches: 103, readings: u64::MAX }));
    let last: Vec<&[u8]> = streams[3..].iter().rev().map(|stream| &stream.stream_id.as_bytes()[..]).collect();
    assert_eq!(ledger.streams.iter().map(|stream| &stream.stream_id[..]).collect::<Vec<_>>(), last);
}
