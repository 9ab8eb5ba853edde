//! When the connections of an address may begin.
//!
//! What a connection leaves behind may have cost more than to open the next one: calls that it had open when it went, or a protocol
//! that it broke. A limit on one connection is none then for who ends it and comes again at once. So what it cost is charged to the
//! address, which begins its next connection when that is over, and connections meanwhile one after the other. Nobody waits for long:
//! behind the same NAT or proxy are others, and a network that fails takes many calls with it which nobody is to blame for.

use parking_lot::Mutex;
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};
use tokio::time::Instant;

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

impl Arrivals {
    /// Has the next connections from `address` wait for so much longer.
    pub fn charge(&self, address: IpAddr, cost: Duration) {
        let now = Instant::now();
        let mut all = self.free_at.lock();
        if all.len() >= ADDRESSES_MAX {
            all.retain(|_, free_at| *free_at > now);
        }
        let address = network(address);
        if all.len() < ADDRESSES_MAX || all.contains_key(&address) {
            let free_at = all.entry(address).or_insert(now);
            *free_at = ((*free_at).max(now) + cost).min(now + WAIT_MAX);
        }
    }

    /// When a connection from `address` may begin that has just come in; `None`: at once.
    pub fn begins_at(&self, address: IpAddr) -> Option<Instant> {
        let now = Instant::now();
        let mut all = self.free_at.lock();
        if all.is_empty() {
            return None;
        }
        let address = network(address);
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

/// What stands for a client: of an IPv6 address the network, within which it has all addresses to itself (RFC 4291 section 2.5.1).
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: Duration = Duration::from_millis(100);

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn who_is_charged_waits_and_others_do_not() {
        let (arrivals, began) = (Arrivals::default(), Instant::now());
        let (dear, other) = (address("192.0.2.1"), address("192.0.2.2"));
        assert_eq!(arrivals.begins_at(dear), None);
        arrivals.charge(dear, COST);
        arrivals.charge(dear, COST);
        let first = arrivals.begins_at(dear).expect("it waits");
        assert!(first >= began + 2 * COST);
        assert_eq!(arrivals.begins_at(dear), Some(first + APART), "one after the other");
        assert_eq!(arrivals.begins_at(other), None);
    }

    #[test]
    fn nobody_waits_for_long() {
        let (arrivals, dear) = (Arrivals::default(), address("192.0.2.1"));
        (0..1_000).for_each(|_| arrivals.charge(dear, COST));
        let last = (0..1_000).filter_map(|_| arrivals.begins_at(dear)).last().expect("it waits");
        assert!(last <= Instant::now() + WAIT_MAX);
    }

    #[test]
    fn what_is_over_is_forgotten() {
        let (arrivals, dear) = (Arrivals::default(), address("192.0.2.1"));
        arrivals.charge(dear, Duration::ZERO);
        assert_eq!(arrivals.begins_at(dear), None);
        assert!(arrivals.free_at.lock().is_empty());
    }

    #[test]
    fn however_many_addresses_there_are_a_bounded_number_is_known() {
        let arrivals = Arrivals::default();
        (0..2 * ADDRESSES_MAX as u32).for_each(|nth| arrivals.charge(IpAddr::V4(nth.into()), COST));
        assert!(arrivals.free_at.lock().len() <= ADDRESSES_MAX);
    }

    #[test]
    fn a_network_is_one_client() {
        let arrivals = Arrivals::default();
        arrivals.charge(address("2001:db8:1:2::3"), COST);
        assert!(arrivals.begins_at(address("2001:db8:1:2:ffff::4")).is_some());
        assert_eq!(arrivals.begins_at(address("2001:db8:1:3::3")), None);
        arrivals.charge(address("::ffff:192.0.2.1"), COST);
        assert!(arrivals.begins_at(address("192.0.2.1")).is_some());
    }
}
