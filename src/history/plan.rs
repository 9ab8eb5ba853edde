//! Where new readings go: which chunks are written anew for them.

use super::chunk::READINGS_MAX;
use crate::store::ChunkSpan;
use std::ops::Range;

/// A chunk of so many readings is complete: nothing is folded into it any more.
pub const READINGS_COMPLETE: usize = READINGS_MAX / 2;
/// A chunk of so many bytes is complete, too: texts may be long.
pub const BYTES_COMPLETE: usize = 512 << 10;
/// How many chunks of about one size become one. A reading is so written anew once for each eightfold size of its chunk, four
/// times at the most.
const FOLDED: usize = 8;

/// Readings and the chunks in whose place they go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrite {
    /// The chunks that are read and replaced, by their index.
    pub chunks: Range<usize>,
    /// The new readings that go among theirs, by their index; never empty.
    pub rows: Range<usize>,
}

/// What to write for new readings at `times`, strictly increasing, of a sensor that has the chunks `spans` around them.
///
/// Chunks that have new readings between their first and their last are written anew. Readings between chunks become chunks of
/// their own, into which small ones before them are folded when enough of them have come together.
pub fn plan(times: &[i64], spans: &[ChunkSpan]) -> Vec<Rewrite> {
    let mut rewrites: Vec<Rewrite> = Vec::new();
    let (mut row, mut next) = (0, 0);
    while row < times.len() {
        while spans.get(next).is_some_and(|span| span.last_time < times[row]) {
            next += 1;
        }
        let (first_row, first_chunk) = (row, next);
        let mut readings = 0;
        // As long as one reaches into the other, but not for ever: what is rewritten at once is in memory at once.
        while row < times.len() && readings < READINGS_MAX {
            let before = spans.get(next).map_or(times.len(), |span| times.partition_point(|&time| time < span.first_time));
            if before > row {
                readings += before - row;
                row = before;
            } else if times[row] <= spans[next].last_time {
                let through = times.partition_point(|&time| time <= spans[next].last_time);
                readings += through - row + spans[next].readings;
                row = through;
                next += 1;
            } else {
                break;
            }
        }
        let free_from = rewrites.last().map_or(0, |rewrite| rewrite.chunks.end);
        let folded = fold(&spans[free_from..first_chunk], readings);
        rewrites.push(Rewrite { chunks: first_chunk - folded..next, rows: first_row..row });
    }
    rewrites
}

/// How many of the last of some chunks become one with `readings` behind them.
fn fold(before: &[ChunkSpan], mut readings: usize) -> usize {
    let mut folded = 0;
    loop {
        let complete = readings >= READINGS_COMPLETE;
        let rest = &before[..before.len() - folded];
        let smaller = |span: &&ChunkSpan| !span.complete && (complete || size_class(span.readings) <= size_class(readings));
        let found: Vec<usize> = rest.iter().rev().take_while(smaller).map(|span| span.readings).collect();
        // Behind a complete chunk nothing would come that folds what is left before it.
        let enough = if complete { 1 } else { FOLDED - 1 };
        if found.len() < enough {
            return folded;
        }
        folded += found.len();
        readings += found.iter().sum::<usize>();
    }
}

fn size_class(readings: usize) -> u32 {
    readings.max(1).ilog2() / FOLDED.ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span(key: i64, times: Range<i64>, readings: usize) -> ChunkSpan {
        ChunkSpan {
            key,
            sensor_key: 1,
            first_time: times.start,
            last_time: times.end - 1,
            readings,
            complete: readings >= READINGS_COMPLETE,
        }
    }

    #[test]
    fn eight_of_a_size_become_one() {
        let spans: Vec<ChunkSpan> = (0..7).map(|k| span(k, k * 10..k * 10 + 10, 10)).collect();
        let times: Vec<i64> = (100..110).collect();
        assert_eq!(plan(&times, &spans[..6]), [Rewrite { chunks: 6..6, rows: 0..10 }]);
        assert_eq!(plan(&times, &spans), [Rewrite { chunks: 0..7, rows: 0..10 }]);
    }

    #[test]
    fn late_readings_take_only_the_chunks_that_they_reach_into() {
        let spans = [span(1, 0..10, 5_000), span(2, 20..30, 5_000), span(3, 40..50, 5_000)];
        assert_eq!(plan(&[25, 60], &spans), [Rewrite { chunks: 1..2, rows: 0..1 }, Rewrite { chunks: 3..3, rows: 1..2 }]);
        assert_eq!(plan(&[12, 35], &spans), [Rewrite { chunks: 1..1, rows: 0..1 }, Rewrite { chunks: 2..2, rows: 1..2 }]);
    }

    proptest! {
        /// Every reading is written once, no chunk twice, and what is written does not reach over what stays.
        #[test]
        fn a_plan_keeps_the_order(
            lengths in prop::collection::vec((1..40_i64, 1..20_i64, prop_oneof![1..100_usize, 4_000..8_000_usize]), 0..20),
            times in prop::collection::btree_set(-20..700_i64, 1..60),
        ) {
            let mut at = 0;
            let spans: Vec<ChunkSpan> = (0..).zip(lengths).map(|(key, (length, gap, readings))| {
                let begin = at + gap;
                at = begin + length;
                span(key, begin..at, readings)
            }).collect();
            let times: Vec<i64> = times.into_iter().collect();
            let rewrites = plan(&times, &spans);
            let (mut row, mut chunk) = (0, 0);
            let mut end = i64::MIN;
            for Rewrite { chunks, rows } in rewrites {
                prop_assert_eq!(rows.start, row);
                prop_assert!(rows.end > row && chunks.start >= chunk);
                let inside = spans[chunks.clone()].iter().flat_map(|span| [span.first_time, span.last_time]);
                let inside: Vec<i64> = inside.chain(times[rows.clone()].iter().copied()).collect();
                let (first, last) = (*inside.iter().min().expect("rows"), *inside.iter().max().expect("rows"));
                prop_assert!(first > end && spans[..chunks.start].iter().all(|span| span.last_time < first));
                prop_assert!(spans[chunks.end..].iter().all(|span| span.first_time > last));
                (row, chunk, end) = (rows.end, chunks.end, last);
            }
            prop_assert_eq!(row, times.len());
        }
    }
}
