//! The kill loop: a fleet sends while the gateway is killed at random moments and started again. In the end all that was
//! acknowledged is there once, and nothing more, and a follower has seen it so.
//!
//! `TIDEGATE_TEST_KILLS=100 cargo test --release --test it kills -- --nocapture` is the long one.

use crate::support::{
    channel,
    client::live,
    eventually, http_get,
    load::log,
    metric,
    process::GatewayProcess,
    random::seeded,
    script::{Script, fleet},
};
use bytes::Bytes;
use rand::{Rng, rngs::SmallRng};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tempfile::TempDir;
use tidegate::pb::{self, follow_request::Start, follow_response::Message};
use tonic::{Status, transport::Channel};

/// How many kills; more than in every run when the environment asks for it.
fn kills() -> u32 {
    std::env::var("TIDEGATE_TEST_KILLS").map_or(5, |kills| kills.parse().expect("TIDEGATE_TEST_KILLS is a number"))
}

/// A gateway that is killed and started again on the same data and addresses.
struct Victim {
    gateway: GatewayProcess,
    flags: Vec<String>,
    directory: TempDir,
}

impl Victim {
    async fn start(flags: &[&str]) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let gateway = GatewayProcess::start_on(directory.path(), any, any, flags).await;
        Self { gateway, flags: flags.iter().map(|flag| (*flag).to_owned()).collect(), directory }
    }

    /// Kills it in the middle of its work: some batches after it has begun to store, and at any moment then.
    async fn dies_at_work(self, random: &mut SmallRng) -> Self {
        let Self { gateway, flags, directory } = self;
        let (grpc, http) = (gateway.grpc, gateway.http);
        let enough = f64::from(random.random_range(1..300));
        eventually("batches are stored", || async {
            let (_, text) = http_get(http, "/metrics").await?;
            (metric(&text, "tidegate_stored_batches_total")? >= enough).then_some(())
        })
        .await;
        any_moment(random, 10).await;
        gateway.kill();
        let command = || {
            let mut command = GatewayProcess::command(directory.path(), grpc, http);
            command.args(&flags);
            command
        };
        // A start is a moment like any other.
        while random.random_ratio(1, 4) {
            let starting = GatewayProcess::spawn(command());
            any_moment(random, 150).await;
            starting.kill();
        }
        let gateway = GatewayProcess::run(command()).await;
        Self { gateway, flags, directory }
    }
}

/// Not a wait for anything: the moment of a kill is chance.
async fn any_moment(random: &mut SmallRng, millis_max: u64) {
    tokio::time::sleep(Duration::from_micros(random.random_range(0..millis_max * 1_000))).await;
}

/// A fleet that sends until it is told to stop, and then verifies.
fn start_fleet(grpc: SocketAddr) -> Script {
    let mut simulate = fleet();
    simulate.args(["simulate", "--devices", "50", "--duration", "1000h", "--interval", "20ms", "--batch", "12"]);
    simulate.args(["--verify", "--json", "--quiet", "--endpoint", &format!("http://{grpc}")]);
    Script::start(simulate)
}

/// A batch as a follower sees it: whose, and its bytes.
type Seen = (String, Bytes);

/// Follows from the beginning, over all breaks by token, for ever.
async fn follow(channel: Channel, seen: Arc<Mutex<Vec<Seen>>>) {
    let mut start = Start::Beginning(true);
    loop {
        // The gateway is away, or has gone away: on from the last token.
        let _: Result<(), Status> = read(&channel, &mut start, |batch| seen.lock().expect("no panic under the lock").push(batch)).await;
        tokio::task::yield_now().await;
    }
}

/// Reads what follows `start`, and moves `start` on, until the stream ends.
async fn read(channel: &Channel, start: &mut Start, mut take: impl FnMut(Seen)) -> Result<(), Status> {
    let request = pb::FollowRequest { start: Some(start.clone()), ..Default::default() };
    let mut stream = live(channel).follow(request).await?.into_inner();
    while let Some(response) = stream.message().await? {
        if let Some(Message::Readings(readings)) = response.message {
            take((readings.device, readings.batch));
        }
        *start = Start::ResumeToken(response.resume_token);
    }
    Ok(())
}

/// Both ends of the loop: the fleet's own verification, and what the follower saw.
async fn all_is_there_once(fleet: Script, channel: &Channel, seen: &Mutex<Vec<Seen>>) {
    fleet.signal("INT");
    let output: serde_json::Value = serde_json::from_str(&fleet.succeeds().await).expect("one JSON object");
    let log = log(channel).await;
    assert_eq!(output["acknowledged"]["batches"], log.len(), "{output}");
    eventually("the follower is at the end", || async { (seen.lock().expect("no panic under the lock").len() >= log.len()).then_some(()) })
        .await;
    assert!(*seen.lock().expect("no panic under the lock") == log, "the follower saw each batch once, in the order of the log");
    eprintln!("{} batches, {} connections anew, {} duplicates", log.len(), output["reconnects"], output["duplicates"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_while_the_gateway_is_killed() {
    let mut random = seeded("kills of the gateway");
    let mut victim = Victim::start(&[]).await;
    let channel = channel(victim.gateway.grpc);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let following = tokio::spawn(follow(channel.clone(), seen.clone()));
    let fleet = start_fleet(victim.gateway.grpc);
    for _ in 0..kills() {
        victim = victim.dies_at_work(&mut random).await;
    }
    all_is_there_once(fleet, &channel, &seen).await;
    following.abort();
}
