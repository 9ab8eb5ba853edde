//! What the fuzz targets in `fuzz/` call: each takes any bytes, and panics when a guarantee does not hold.
//!
//! `cargo test` takes the seeds in `fuzz/seeds` through them, as they are and with a few bytes changed; see `docs/FUZZING.md`.

mod batch;
mod chunk;
mod frames;
mod text;
mod upload;

pub use batch::batch;
pub use chunk::chunk;
pub use frames::frames;
pub use text::text;
pub use upload::upload;

/// Takes fields off the beginning of some bytes; what is not there is 0.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let (here, rest) = self.0.split_at(self.0.len().min(N));
        self.0 = rest;
        std::array::from_fn(|index| here.get(index).copied().unwrap_or(0))
    }

    fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    fn integer(&mut self) -> i64 {
        i64::from_le_bytes(self.array())
    }

    fn rest_as_text(self) -> std::borrow::Cow<'a, str> {
        String::from_utf8_lossy(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Target = (&'static str, fn(&[u8]));

    /// The seeds of a target.
    fn seeds(target: &str) -> Vec<Vec<u8>> {
        let directory = format!("{}/fuzz/seeds/{target}", env!("CARGO_MANIFEST_DIR"));
        let mut files: Vec<_> = std::fs::read_dir(directory).expect("seeds").map(|file| file.expect("readable").path()).collect();
        files.sort();
        files.iter().map(|path| std::fs::read(path).expect("readable")).collect()
    }

    #[test]
    fn every_target_takes_its_seeds() {
        let targets: [Target; 5] = [("batch", batch), ("chunk", chunk), ("frames", frames), ("text", text), ("upload", upload)];
        for (target, take) in targets {
            let seeds = seeds(target);
            assert!(!seeds.is_empty(), "{target} has no seeds");
            seeds.iter().for_each(|seed| take(seed));
        }
        upload::clean_up();
    }

    /// A seed with a few bytes changed, and cut off somewhere.
    fn changed(target: &str) -> impl Strategy<Value = Vec<u8>> {
        let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
        (prop::sample::select(seeds(target)), changes, any::<prop::sample::Index>(), any::<bool>()).prop_map(
            |(mut seed, changes, end, cut)| {
                for (index, byte) in changes {
                    if !seed.is_empty() {
                        let index = index.index(seed.len());
                        seed[index] = byte;
                    }
                }
                if cut {
                    seed.truncate(end.index(seed.len() + 1));
                }
                seed
            },
        )
    }

    proptest! {
        #[test]
        fn changed_batches(bytes in changed("batch")) {
            batch(&bytes);
        }

        #[test]
        fn changed_chunks(bytes in changed("chunk")) {
            chunk(&bytes);
        }

        #[test]
        fn changed_texts(bytes in changed("text")) {
            text(&bytes);
        }
    }
}
