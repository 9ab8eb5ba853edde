//! Corrects the times of a batch whose device's clock is known to be off.
//!
//! That is done once, as the batch comes in: its bytes are written anew with other times, and each frame says what was added to them, so
//! that the device's own are known for ever. All behind this works on the corrected times.

use super::{
    Timestamp,
    columns::times_from_deltas,
    scan::{self, Unusual},
};
use crate::pb;
use bytes::Bytes;
use prost::Message;

/// What to add to the times of a device's readings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Correction {
    /// So many microseconds; not 0.
    pub micros: i64,
    /// No reading that comes in now was measured later.
    pub latest: Timestamp,
}

impl Correction {
    /// A batch with its times corrected. `None` when it is to be judged as it is: nothing in it is to be corrected, it is none, or it says
    /// itself that it was corrected.
    pub fn of(self, batch: &Bytes) -> Option<Bytes> {
        match self.in_place(batch) {
            Ok(corrected) => corrected,
            Err(Unusual) => self.decoded(batch),
        }
        .map(Bytes::from)
    }

    fn in_place(self, batch: &[u8]) -> Result<Option<Vec<u8>>, Unusual> {
        let (mut corrected, mut any) = (Vec::with_capacity(batch.len() + batch.len() / 8), false);
        for frame in scan::frames(batch) {
            let mut frame = frame?;
            if frame.clock_correction != 0 {
                return Err(Unusual);
            }
            any |= self.applies_to(frame.sum_up_times()?.last) && frame.correct(self.micros);
            frame.write_to(&mut corrected)?;
        }
        Ok(any.then_some(corrected))
    }

    fn decoded(self, batch: &Bytes) -> Option<Vec<u8>> {
        let mut batch = pb::Batch::decode(batch.clone()).ok()?;
        if batch.frames.iter().any(|frame| frame.clock_correction_us != 0) {
            return None;
        }
        let mut any = false;
        for frame in &mut batch.frames {
            let last = times_from_deltas(frame.base_time_us, &frame.time_deltas_us).and_then(|times| times.into_iter().max());
            let corrected = frame.base_time_us.checked_add(self.micros).filter(|_| last.is_some_and(|last| self.applies_to(last)));
            if let Some(base_time_us) = corrected {
                (frame.base_time_us, frame.clock_correction_us, any) = (base_time_us, self.micros, true);
            }
        }
        any.then(|| batch.encode_to_vec())
    }

    /// Whether a frame was sampled by the clock that the correction is for. One that would then come from the future was not: the clock
    /// that was behind has been set, or was not yet behind when these readings were made.
    fn applies_to(self, last: i64) -> bool {
        self.micros < 0 || last.saturating_add(self.micros) <= self.latest.micros()
    }
}

#[cfg(test)]
#[path = "correction_tests.rs"]
mod tests;
