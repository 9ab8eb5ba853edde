//! The kill loop: a fleet sends while the gateway, or the database's server, is killed at random moments and started again.
//! In the end all that was acknowledged is there once, and nothing more, and a follower has seen it so; and the ledgers add up, also that of
//! a device of whose batches some are rejected.
//!
//! `TIDEGATE_TEST_KILLS=100 cargo test --release --test it kills -- --nocapture` is the long one.

use crate::support::{
    channel,
    client::{T0, TestDevice, nth_batch, temperatures},
    eventually, http_get,
    load::{Witness, log},
    metric,
    postgres::{self, PostgresServer},
    process::GatewayProcess,
    random::seeded,
    script::{Script, fleet},
    soon,
};
use bytes::Bytes;
use rand::{Rng, rngs::SmallRng};
use std::{net::SocketAddr, process::Command, time::Duration};
use tempfile::TempDir;
use tidegate::pb::{self, RejectReason};
use tokio::{task::JoinHandle, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::Code;

/// How many kills; more than in every run when the environment asks for it.
fn kills() -> u32 {
    std::env::var("TIDEGATE_TEST_KILLS").map_or(5, |kills| kills.parse().expect("TIDEGATE_TEST_KILLS is a number"))
}

/// So that some kills come while the log is merged.
const MERGES_OFTEN: &str = "--history-unmerged-bytes-max=1";
/// A long run has more than is kept for followers by default, and all of the log is compared.
const KEEPS_THE_LOG: &str = "--live-replay-bytes-max=4294967296";

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

    /// Returns in the middle of its work: some batches on, and at any moment then.
    async fn works(&self, random: &mut SmallRng) {
        let http = self.gateway.http;
        let stored = || async { metric(&http_get(http, "/metrics").await?.1, "tidegate_stored_batches_total") };
        let enough = stored().await.unwrap_or_default() + f64::from(random.random_range(1..300));
        eventually("batches are stored", || async { (stored().await? >= enough).then_some(()) }).await;
        any_moment(random, 10).await;
    }

    /// Dies, and lives again.
    async fn dies(self, random: &mut SmallRng) -> Self {
        let (grpc, http) = (self.gateway.grpc, self.gateway.http);
        self.gateway.kill();
        let command = || -> Command {
            let mut command = GatewayProcess::command(self.directory.path(), grpc, http);
            command.args(&self.flags);
            command
        };
        // A start is a moment like any other.
        while random.random_ratio(1, 4) {
            let starting = GatewayProcess::spawn(command());
            any_moment(random, 150).await;
            starting.kill();
        }
        let gateway = GatewayProcess::run(command()).await;
        Self { gateway, flags: self.flags, directory: self.directory }
    }
}

/// Not a wait for anything: the moment of a kill is chance.
async fn any_moment(random: &mut SmallRng, millis_max: u64) {
    tokio::time::sleep(Duration::from_micros(random.random_range(0..millis_max * 1_000))).await;
}

/// A fleet that sends until it is told to stop, and then verifies.
fn start_fleet(victim: &Victim) -> Script {
    let mut simulate = fleet();
    simulate.args(["simulate", "--devices", "50", "--duration", "1000h", "--interval", "20ms", "--batch", "12"]);
    simulate.args(["--verify", "--json", "--quiet", "--endpoint", &format!("http://{}", victim.gateway.grpc)]);
    Script::start(simulate)
}

/// A device of whose batches some can't be stored, for two reasons. Each of its calls begins with the last batch that it was told is dealt
/// with, and one that was not answered is made again.
struct Offender {
    device: TestDevice,
    stop: CancellationToken,
    /// The last sequence that it was told is dealt with, and how many batches it was told are duplicates.
    told: JoinHandle<(u64, u64)>,
}

impl Offender {
    const BATCHES_PER_CALL: u64 = 20;

    fn start(victim: &Victim) -> Self {
        let (device, stop) = (TestDevice::new(&channel(victim.gateway.grpc), "offender"), CancellationToken::new());
        let told = tokio::spawn(Self::send(device.clone(), stop.clone()));
        Self { device, stop, told }
    }

    async fn send(device: TestDevice, stop: CancellationToken) -> (u64, u64) {
        let (mut last, mut duplicates) = (0, 0);
        // The most of what is stored between two kills is the fleet's.
        let mut calls = tokio::time::interval(Duration::from_millis(200));
        calls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            calls.tick().await;
            // The last call is answered, too.
            let stopping = stop.is_cancelled();
            let call = (last.max(1)..=last + Self::BATCHES_PER_CALL).map(|sequence| (sequence, Self::batch(sequence)));
            match device.upload(call).await {
                Ok(answer) => {
                    last = answer.last_durable_sequence;
                    duplicates += answer.duplicate.unwrap_or_default().batches;
                    if stopping {
                        return (last, duplicates);
                    }
                }
                Err(status) => assert_ne!(status.code(), Code::FailedPrecondition, "what was acknowledged is gone: {status}"),
            }
        }
    }

    fn batch(sequence: u64) -> Bytes {
        match Self::reason(sequence) {
            None => nth_batch(sequence),
            Some(RejectReason::NonFinite) => temperatures(T0, &[f64::NAN]),
            Some(_) => temperatures(i64::MAX, &[1.0]),
        }
    }

    fn reason(sequence: u64) -> Option<RejectReason> {
        match sequence % 7 {
            3 => Some(RejectReason::NonFinite),
            5 => Some(RejectReason::TimeInFuture),
            _ => None,
        }
    }

    /// Ends it; its ledger counts each of its batches once, by what became of it, and adds up. Returns how many are to be stored.
    async fn ends_accounted_for(&mut self) -> u64 {
        self.stop.cancel();
        let (last, told) = soon("its last call is answered", &mut self.told).await.expect("no panic");
        assert_eq!(self.device.position().await, last);
        let ledger = self.device.ledger().await;
        let count = |reason| (1..=last).filter(|&sequence| Self::reason(sequence) == reason).count() as u64;
        let batches = |tally: Option<pb::Tally>| tally.unwrap_or_default().batches;
        assert_eq!(batches(ledger.stored), count(None), "{ledger:?}");
        let rejected: Vec<_> = ledger.rejected.iter().map(|rejected| (rejected.reason(), rejected.batches)).collect();
        assert_eq!(rejected, [RejectReason::NonFinite, RejectReason::TimeInFuture].map(|reason| (reason, count(Some(reason)))));
        let duplicates = batches(ledger.duplicate);
        assert!(duplicates >= told, "{told} told, {ledger:?}");
        assert_eq!((batches(ledger.pending), ledger.missing.len()), (0, 0), "{ledger:?}");
        eprintln!("{last} batches of the offender, {duplicates} duplicates");
        count(None)
    }
}

/// Ends the fleet, which verifies all that was acknowledged, and compares what it and the follower saw with the log.
async fn all_is_there_once(fleet: Script, mut offender: Offender, victim: &Victim, witness: Witness) {
    let offended = offender.ends_accounted_for().await;
    fleet.signal("INT");
    let output: serde_json::Value = serde_json::from_str(&fleet.succeeds().await).expect("one JSON object");
    let log = log(&channel(victim.gateway.grpc)).await;
    let batches = |offends: bool| -> u64 {
        log.iter().filter(|entry| (entry.device == offender.device.id) == offends).map(|entry| entry.batches).sum()
    };
    assert_eq!(output["acknowledged"]["batches"], batches(false), "{output}");
    assert_eq!(batches(true), offended, "of the offender");
    witness.saw(&log).await;
    eprintln!("{} batches, {} connections anew, {} duplicates", batches(false), output["reconnects"], output["duplicates"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_while_the_gateway_is_killed() {
    let mut random = seeded("kills of the gateway");
    let mut victim = Victim::start(&[MERGES_OFTEN, KEEPS_THE_LOG]).await;
    let witness = Witness::start(channel(victim.gateway.grpc));
    let fleet = start_fleet(&victim);
    let offender = Offender::start(&victim);
    for _ in 0..kills() {
        victim.works(&mut random).await;
        victim = victim.dies(&mut random).await;
    }
    all_is_there_once(fleet, offender, &victim, witness).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_while_gateway_and_server_are_killed() {
    if !postgres::is_there() {
        return;
    }
    let mut random = seeded("kills of gateway and server");
    let mut server = PostgresServer::private();
    let mut victim = Victim::start(&[MERGES_OFTEN, KEEPS_THE_LOG, &format!("--storage-url={}", server.database())]).await;
    let witness = Witness::start(channel(victim.gateway.grpc));
    let fleet = start_fleet(&victim);
    let offender = Offender::start(&victim);
    for kill in 0..kills() {
        victim.works(&mut random).await;
        if kill % 2 == 0 {
            victim = victim.dies(&mut random).await;
        } else {
            // It says so, and goes on by itself.
            server.kill();
            tokio::task::block_in_place(|| server.start_again());
        }
    }
    all_is_there_once(fleet, offender, &victim, witness).await;
}
