//! When the connections of an address may begin.
//!
//! What a connection leaves behind may have cost more than to open the next one: calls that it had open when it went, or a protocol
//! that it broke. A limit on one connection is none then for who ends it and comes again at once. So what it cost is charged to the
//! address, whose next connection begins when that is over, and those behind it a little later each. Nobody waits for long: behind the
//! same NAT or proxy are others, and a network that fails takes many calls with it which nobody is to blame for. So this slows who comes
//! again and again; who comes with very many connections at once, `grpc.connections_max` stops.

use parking_lot::Mutex;
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, sleep_until};

/// What a connection costs that was for nothing: it broke a protocol, flooded, or most of its calls were refused.
pub const FUTILE_COST: Duration = Duration::from_millis(100);

/// How long a connection waits at the most.
const WAIT_MAX: Duration = Duration::from_millis(500);
/// How far connections come apart meanwhile.
const APART: Duration = Duration::from_millis(5);
/// How many addresses are known at the most. An attack from more of them is one for the network to stop.
const ADDRESSES_MAX: usize = 1_024;

/// See the [module](self).
#[derive(Debug, Default)]
pub struct Arrivals {
    // When what was charged is over.
    free_at: Mutex<HashMap<IpAddr, Instant>>,
}

/// What an address is charged.
#[derive(Debug, Clone)]
pub struct Account {
    arrivals: Arc<Arrivals>,
    address: IpAddr,
}

impl Account {
    /// That of `address`.
    pub fn of(arrivals: &Arc<Arrivals>, address: IpAddr) -> Self {
        Self { arrivals: arrivals.clone(), address: client(address) }
    }

    /// Has the next connections wait for so much longer.
    pub fn charge(&self, cost: Duration) {
        if !cost.is_zero() {
            self.arrivals.charge(self.address, cost, Instant::now());
        }
    }

    /// Waits until a connection may begin that has just come in.
    pub async fn may_begin(&self) {
        if let Some(begins_at) = self.begins_at(Instant::now()) {
            sleep_until(begins_at).await;
        }
    }

    /// When a connection may begin that has come in now; `None`: at once.
    pub fn begins_at(&self, now: Instant) -> Option<Instant> {
        self.arrivals.begins_at(self.address, now)
    }
}

impl Arrivals {
    fn charge(&self, address: IpAddr, cost: Duration, now: Instant) {
        let mut all = self.free_at.lock();
        if all.len() >= ADDRESSES_MAX {
            all.retain(|_, free_at| *free_at > now);
        }
        if all.len() < ADDRESSES_MAX || all.contains_key(&address) {
            let free_at = all.entry(address).or_insert(now);
            *free_at = ((*free_at).max(now) + cost).min(now + WAIT_MAX);
        }
    }

    fn begins_at(&self, address: IpAddr, now: Instant) -> Option<Instant> {
        let mut all = self.free_at.lock();
        if all.is_empty() {
            return None;
        }
        let free_at = all.get_mut(&address)?;
        if *free_at <= now {
            all.remove(&address);
            return None;
        }
        let begins_at = *free_at;
        *free_at = (begins_at + APART).min(now + WAIT_MAX);
        Some(begins_at)
    }
}

/// What stands for a client: of a global IPv6 address its /64, in which a host changes its address as it likes (RFC 8981). Other
/// prefixes may stand for many: 64:ff9b::/96 for all of IPv4, fe80::/64 for all on the link.
fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if v6.segments()[0] & 0xe000 == 0x2000 => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: Duration = Duration::from_millis(100);

    fn account(arrivals: &Arc<Arrivals>, address: &str) -> Account {
        Account::of(arrivals, address.parse().expect("an address"))
    }

    #[test]
    fn who_is_charged_waits_and_others_do_not() {
        let (arrivals, now) = (Arc::default(), Instant::now());
        let (dear, other) = (account(&arrivals, "192.0.2.1"), account(&arrivals, "192.0.2.2"));
        assert_eq!(dear.begins_at(now), None);
        arrivals.charge(dear.address, COST, now);
        arrivals.charge(dear.address, COST, now);
        assert_eq!(dear.begins_at(now), Some(now + 2 * COST));
        assert_eq!(dear.begins_at(now), Some(now + 2 * COST + APART), "one after the other");
        assert_eq!(other.begins_at(now), None);
        assert_eq!(dear.begins_at(now + WAIT_MAX), None);
        assert!(arrivals.free_at.lock().is_empty(), "what is over is forgotten");
    }

    #[test]
    fn nobody_waits_for_long() {
        let (arrivals, now) = (Arc::default(), Instant::now());
        let dear = account(&arrivals, "192.0.2.1");
        (0..1_000).for_each(|_| arrivals.charge(dear.address, COST, now));
        let last = (0..1_000).filter_map(|_| dear.begins_at(now)).max();
        assert_eq!(last, Some(now + WAIT_MAX));
    }

    #[test]
    fn however_many_addresses_there_are_a_bounded_number_is_known() {
        let (arrivals, now) = (Arrivals::default(), Instant::now());
        (0..2 * ADDRESSES_MAX as u32).for_each(|nth| arrivals.charge(IpAddr::V4(nth.into()), COST, now));
        assert_eq!(arrivals.free_at.lock().len(), ADDRESSES_MAX);
        arrivals.charge(IpAddr::V4(0.into()), COST, now);
        assert_eq!(arrivals.begins_at(IpAddr::V4(0.into()), now), Some(now + 2 * COST), "those that are known are charged on");
        let later = now + WAIT_MAX;
        arrivals.charge(IpAddr::V4(u32::MAX.into()), COST, later);
        assert_eq!(arrivals.begins_at(IpAddr::V4(u32::MAX.into()), later), Some(later + COST), "and others when those are free");
    }

    #[test]
    fn the_addresses_of_a_client_are_one() {
        let client = |address: &str| client(address.parse().expect("an address"));
        assert_eq!(client("2001:db8:1:2::3"), client("2001:db8:1:2:ffff::4"));
        assert_eq!(client("::ffff:192.0.2.1"), client("192.0.2.1"));
        for (one, other) in [("2001:db8:1:2::3", "2001:db8:1:3::3"), ("64:ff9b::1", "64:ff9b::2"), ("fe80::1", "fe80::2")] {
            assert_ne!(client(one), client(other));
        }
    }
}
