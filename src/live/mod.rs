//! Followers: the latest values, a replay of the log, then what is being stored, each reading once.

pub mod follower;
pub mod latest;
pub mod publisher;
pub mod tail;

pub use follower::{Filter, Follower, Item, Start};
pub use latest::{DeviceLatest, EntryLatest, Latest};
pub use publisher::Publisher;
pub use tail::{Tail, TailEntry};

#[cfg(test)]
mod tests;
