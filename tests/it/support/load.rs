//! Devices that send without a pause while something is done to the gateway, and what they were told.

use super::{
    client::{TestDevice, live, nth_batch, nth_temperatures},
    eventually, soon,
};
use bytes::Bytes;
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use tidegate::pb::{self, follow_request::Start, follow_response::Message};
use tokio::{sync::watch, task::JoinHandle};
use tonic::transport::Channel;

const BATCHES_PER_CALL: u64 = 3;

/// See the [module](self).
pub struct Load {
    channel: watch::Sender<Option<Channel>>,
    senders: Vec<Sender>,
}

struct Sender {
    device: TestDevice,
    acknowledged: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Load {
    /// So many devices begin to send.
    pub fn start(channel: &Channel, devices: usize) -> Self {
        let (sender, receiver) = watch::channel(Some(channel.clone()));
        let senders = (1..=devices).map(|number| {
            let device = TestDevice::new(channel, &format!("load-{number}"));
            let acknowledged = Arc::new(AtomicU64::new(0));
            let task = tokio::spawn(send(device.clone(), acknowledged.clone(), receiver.clone()));
            Sender { device, acknowledged, task }
        });
        Self { senders: senders.collect(), channel: sender }
    }

    /// How many batches are acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.senders.iter().map(|sender| sender.acknowledged.load(Relaxed)).sum()
    }

    /// Waits until so many more are.
    pub async fn runs_on(&self, batches: u64) {
        let enough = self.acknowledged() + batches;
        eventually("batches are acknowledged", || async { (self.acknowledged() >= enough).then_some(()) }).await;
    }

    /// The gateway is elsewhere from now on. It must have what was acknowledged before.
    pub async fn moves_to(&self, channel: &Channel) {
        for sender in &self.senders {
            let acknowledged = sender.acknowledged.load(Relaxed);
            let position = sender.device.on(channel).position().await;
            assert!(position >= acknowledged, "{}: {acknowledged} was acknowledged, and {position} is there", sender.device.id);
        }
        self.channel.send_replace(Some(channel.clone()));
    }

    /// Ends the sending, and compares what the gateway has with what was acknowledged: all of it, once, and nothing more.
    pub async fn ends_well(self) {
        let Some(channel) = self.channel.send_replace(None) else { return };
        let mut expected = BTreeMap::new();
        for Sender { device, acknowledged, task } in self.senders {
            soon("a device ends", task).await.expect("no panic");
            let device = device.on(&channel);
            // The answer to the last call may have been lost.
            let (acknowledged, stored) = (acknowledged.load(Relaxed), device.position().await);
            assert!((acknowledged..=acknowledged + BATCHES_PER_CALL).contains(&stored), "{}: {acknowledged}, {stored}", device.id);
            assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=stored), "{}", device.id);
            assert_eq!(device.ledger().await.stored.map(|tally| tally.batches), Some(stored), "{}", device.id);
            expected.insert(device.id, (1..=stored).map(nth_batch).collect::<Vec<_>>());
        }
        let mut found = BTreeMap::<String, Vec<Bytes>>::new();
        for (device, batch) in log(&channel).await {
            found.entry(device).or_default().push(batch);
        }
        assert!(found == expected, "the log has each batch once, in order");
    }
}

/// Sends batch by batch; after an error asks where to go on.
async fn send(device: TestDevice, acknowledged: Arc<AtomicU64>, mut channel: watch::Receiver<Option<Channel>>) {
    loop {
        let Some(now) = channel.borrow_and_update().clone() else { return };
        let device = device.on(&now);
        let next = acknowledged.load(Relaxed) + 1;
        // Each call ends with the gateway, at the latest with what stalls it.
        match soon("an answer", device.upload_nth(next..next + BATCHES_PER_CALL)).await {
            Ok(response) => acknowledged.store(response.last_durable_sequence, Relaxed),
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

/// All batches of the log, each with its device.
pub async fn log(channel: &Channel) -> Vec<(String, Bytes)> {
    let request = pb::FollowRequest { start: Some(Start::Beginning(true)), ..Default::default() };
    let mut stream = live(channel).follow(request).await.expect("the call begins").into_inner();
    let mut found = Vec::new();
    loop {
        let response = soon("the next message", stream.message()).await.expect("no error").expect("not the end");
        match response.message.expect("set") {
            Message::Readings(readings) => found.push((readings.device, readings.batch)),
            Message::Synced(_) => return found,
            _ => {}
        }
    }
}
