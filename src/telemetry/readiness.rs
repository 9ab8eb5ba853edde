//! Whether the gateway can do its work, and if not, why.

use std::{collections::BTreeMap, fmt};
use tokio::sync::watch;

/// What each component says of itself. Cheap to clone: all clones are one.
///
/// `/readyz` and `grpc.health.v1` both follow it.
#[derive(Debug, Clone)]
pub struct Readiness(watch::Sender<ReadinessState>);

/// What the components said last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadinessState(BTreeMap<&'static str, Result<(), String>>);

impl Readiness {
    /// All components are starting: none is ready yet.
    pub fn starting(components: &[&'static str]) -> Self {
        let state = components.iter().map(|component| (*component, Err("starting".to_owned()))).collect();
        Self(watch::Sender::new(ReadinessState(state)))
    }

    /// A component says that it is ready, or why it is not. Subscribers are woken when that is news.
    pub fn set(&self, component: &'static str, state: Result<(), String>) {
        self.0.send_if_modified(|all| {
            let news = all.0.get(component) != Some(&state);
            all.0.insert(component, state);
            news
        });
    }

    /// Whether all components are ready.
    pub fn is_ready(&self) -> bool {
        self.0.borrow().is_ready()
    }

    /// Follows the changes.
    pub fn subscribe(&self) -> watch::Receiver<ReadinessState> {
        self.0.subscribe()
    }

    /// The state at this moment.
    pub fn state(&self) -> ReadinessState {
        self.0.borrow().clone()
    }
}

impl ReadinessState {
    /// Whether all components are ready.
    pub fn is_ready(&self) -> bool {
        self.0.values().all(Result::is_ok)
    }
}

/// A line for each component: `store: ready` or `store: not ready: disk full`.
impl fmt::Display for ReadinessState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(component, state)| match state {
            Ok(()) => writeln!(f, "{component}: ready"),
            Err(why) => writeln!(f, "{component}: not ready: {why}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_means_every_component_and_only_news_wakes() {
        let readiness = Readiness::starting(&["store", "listener"]);
        let mut follower = readiness.subscribe();
        assert!(!readiness.is_ready());
        readiness.set("store", Ok(()));
        assert!(!readiness.is_ready(), "the listener is still starting");
        readiness.set("listener", Ok(()));
        assert!(follower.borrow_and_update().is_ready());

        readiness.set("store", Ok(()));
        assert!(!follower.has_changed().expect("open"), "nothing new was said");
        readiness.set("store", Err("disk full".into()));
        assert!(follower.has_changed().expect("open"));
        assert_eq!(readiness.state().to_string(), "listener: ready\nstore: not ready: disk full\n");
    }
}
