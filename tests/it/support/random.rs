//! Chance that can be repeated.

use rand::{SeedableRng, rngs::SmallRng};
use std::hash::{BuildHasher, RandomState};

/// A generator whose seed is printed; TIDEGATE_TEST_SEED sets it.
pub fn seeded(what: &str) -> SmallRng {
    let given = std::env::var("TIDEGATE_TEST_SEED").ok();
    let seed = given.map_or_else(|| RandomState::new().hash_one(what), |seed| seed.parse().expect("TIDEGATE_TEST_SEED is a number"));
    eprintln!("{what}: TIDEGATE_TEST_SEED={seed}");
    SmallRng::seed_from_u64(seed)
}
