//! Devices that send without a pause while something is done to the gateway, and what they were told.

use super::{
    client::{TestDevice, live, nth_batch, nth_temperatures},
    eventually, soon,
};
use bytes::Bytes;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use tidegate::client::Channel;
use tidegate::pb::{self, follow_request::Start, follow_response::Message};
use tokio::{sync::watch, task::JoinHandle};
use tonic::Status;

const BATCHES_PER_CALL: u64 = 3;

/// See the [module](self).
pub struct Load {
    // The first is the one that moves.
    channels: Vec<watch::Sender<Option<Channel>>>,
    senders: Vec<Sender>,
}

struct Sender {
    device: TestDevice,
    acknowledged: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    /// So many devices begin to send.
    pub fn start(channel: &Channel, devices: usize) -> Self {
        let senders = (1..=devices).map(|number| {
            let device = TestDevice::new(channel, &format!("load-{number}"));
            Sender { device, acknowledged: Arc::default(), tasks: vec![] }
        });
        let mut load = Self { channels: vec![], senders: senders.collect() };
        load.also_through(channel);
        load
    }

    /// From now on the devices hand each batch to this gateway, too, at the same time.
    pub fn also_through(&mut self, channel: &Channel) {
        let (sender, receiver) = watch::channel(Some(channel.clone()));
        for Sender { device, acknowledged, tasks } in &mut self.senders {
            tasks.push(tokio::spawn(send(device.clone(), acknowledged.clone(), receiver.clone())));
        }
        self.channels.push(sender);
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
        self.channels[0].send_replace(Some(channel.clone()));
    }

    /// Ends the sending, and compares what the gateway has with what was acknowledged: all of it, once, and nothing more.
    pub async fn ends_well(self) {
        let mut channels: Vec<Channel> = self.channels.iter().filter_map(|channel| channel.send_replace(None)).collect();
        let channel = channels.swap_remove(0);
        let mut expected = BTreeMap::new();
        for Sender { device, acknowledged, tasks } in self.senders {
            for task in tasks {
                soon("a device ends", task).await.expect("no panic");
            }
            let device = device.on(&channel);
            // The answer to the last call may have been lost.
            let (acknowledged, stored) = (acknowledged.load(Relaxed), device.position().await);
            assert!((acknowledged..=acknowledged + BATCHES_PER_CALL).contains(&stored), "{}: {acknowledged}, {stored}", device.id);
            assert_eq!(device.stored_temperatures().await, nth_temperatures(1..=stored), "{}", device.id);
            assert_eq!(device.ledger().await.stored.map(|tally| tally.batches), Some(stored), "{}", device.id);
            expected.insert(device.id, (1..=stored).flat_map(nth_batch).collect::<Vec<u8>>());
        }
        // Batches one behind the other, however many of them an entry holds.
        let mut found = BTreeMap::<String, Vec<u8>>::new();
        for entry in log(&channel).await {
            found.entry(entry.device).or_default().extend(entry.bytes);
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
            Ok(response) => drop(acknowledged.fetch_max(response.last_durable_sequence, Relaxed)),
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

/// An entry of the log as a follower sees it.
#[derive(Debug, PartialEq)]
pub struct Seen {
    /// Whose it is.
    pub device: String,
    /// How many batches it holds.
    pub batches: u64,
    /// Their bytes.
    pub bytes: Bytes,
}

impl From<pb::LiveReadings> for Seen {
    fn from(readings: pb::LiveReadings) -> Self {
        Self { device: readings.device, batches: readings.batches, bytes: readings.batch }
    }
}

/// A follower from the beginning, which goes on by its token whenever the gateway was away.
pub struct Witness {
    seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

impl Witness {
    pub fn start(channel: Channel) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sees = seen.clone();
        let task = tokio::spawn(async move {
            let mut start = Start::Beginning(true);
            loop {
                // However it ends: on from the last token.
                let _ = follow(&channel, &mut start, |batch| sees.lock().expect("no panic under the lock").push(batch)).await;
                tokio::task::yield_now().await;
            }
        });
        Self { seen, task }
    }

    /// It saw each entry of the log once, in its order.
    pub async fn saw(&self, log: &[Seen]) {
        let seen = || self.seen.lock().expect("no panic under the lock");
        eventually("the follower is at the end", || async { (seen().len() >= log.len()).then_some(()) }).await;
        assert!(*seen() == log, "the follower saw each entry once, in the order of the log");
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Takes what follows `start`, and moves `start` on, until the stream ends.
async fn follow(channel: &Channel, start: &mut Start, mut take: impl FnMut(Seen)) -> Result<(), Status> {
    let request = pb::FollowRequest { start: Some(start.clone()), ..Default::default() };
    let mut stream = live(channel).follow(request).await?.into_inner();
    while let Some(response) = stream.message().await? {
        if let Some(Message::Readings(readings)) = response.message {
            take(readings.into());
        }
        *start = Start::ResumeToken(response.resume_token);
    }
    Ok(())
}

/// All entries of the log.
pub async fn log(channel: &Channel) -> Vec<Seen> {
    let request = pb::FollowRequest { start: Some(Start::Beginning(true)), ..Default::default() };
    let mut stream = live(channel).follow(request).await.expect("the call begins").into_inner();
    let mut found = Vec::new();
    loop {
        let response = soon("the next message", stream.message()).await.expect("no error").expect("not the end");
        match response.message.expect("set") {
            Message::Readings(readings) => found.push(readings.into()),
            Message::Synced(_) => return found,
            _ => {}
        }
    }
}
