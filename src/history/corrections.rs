//! What was added to the times of a chunk's readings, as a column that plain SQL can read.
//!
//! A device's clock is corrected by the same for a long time: runs say it, a JSON array `[[k, micros], ...]` in the order of `k`, the number
//! of the first reading to whose time so much was added.

/// The runs of these corrections; `None` when all are 0, as nearly always.
pub fn encode(corrections: &[i64]) -> Option<String> {
    corrections.iter().find(|&&micros| micros != 0)?;
    let mut runs: Vec<(usize, i64)> = Vec::new();
    for (first, &micros) in corrections.iter().enumerate() {
        if runs.last().is_none_or(|(_, before)| *before != micros) {
            runs.push((first, micros));
        }
    }
    Some(serde_json::to_string(&runs).expect("numbers"))
}

/// The correction of each of so many readings; `None` when these can't be the runs that were written.
pub fn decode(runs: &str, readings: usize) -> Option<Vec<i64>> {
    let runs: Vec<(usize, i64)> = serde_json::from_str(runs).ok()?;
    let mut corrections = Vec::with_capacity(readings);
    let ends = runs.iter().skip(1).map(|(first, _)| *first).chain([readings]);
    for ((first, micros), end) in runs.iter().zip(ends) {
        if *first != corrections.len() || end <= *first || end > readings {
            return None;
        }
        corrections.resize(end, *micros);
    }
    (corrections.len() == readings).then_some(corrections)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs_are_what_the_view_reads() {
        assert_eq!(encode(&[0, 0, -5, -5, 7]).as_deref(), Some("[[0,0],[2,-5],[4,7]]"));
        assert_eq!(encode(&[0, 0]), None);
        for damaged in ["", "[]", "[[1,5]]", "[[0,5],[0,6]]", "[[0,5],[3,6]]", "[[0,5],[2,6],[1,7]]"] {
            assert_eq!(decode(damaged, 3), None, "{damaged}");
        }
    }

    proptest! {
        #[test]
        fn corrections_round_trip(corrections in prop::collection::vec(prop_oneof![Just(0_i64), -2_i64..3, any::<i64>()], 1..50)) {
            match encode(&corrections) {
                Some(runs) => prop_assert_eq!(decode(&runs, corrections.len()), Some(corrections)),
                None => prop_assert!(corrections.iter().all(|micros| *micros == 0)),
            }
        }
    }
}
