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

/// A batch with other times than it came with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corrected {
    /// Its bytes.
    pub batch: Bytes,
    /// Whether all of its frames have.
    pub whole: bool,
}

impl Correction {
    /// A batch with its times corrected. `None` when it is to be judged as it is: nothing in it is to be corrected, it is none, or it says
    /// itself that it was corrected.
    pub fn of(self, batch: &Bytes) -> Option<Corrected> {
        match self.in_place(batch) {
            Ok(corrected) => corrected,
            Err(Unusual) => self.decoded(batch),
        }
    }

    fn in_place(self, batch: &[u8]) -> Result<Option<Corrected>, Unusual> {
        let (mut corrected, mut any, mut whole) = (Vec::with_capacity(batch.len() + batch.len() / 8), false, true);
        for frame in scan::frames(batch) {
            let mut frame = frame?;
            if frame.clock_correction != 0 {
                return Err(Unusual);
            }
            let is_corrected = self.applies_to(frame.sum_up_times()?.last) && frame.correct(self.micros);
            (any, whole) = (any || is_corrected, whole && is_corrected);
            frame.write_to(&mut corrected)?;
        }
        Ok(any.then(|| Corrected { batch: corrected.into(), whole }))
    }

    fn decoded(self, batch: &Bytes) -> Option<Corrected> {
        let mut batch = pb::Batch::decode(batch.clone()).ok()?;
        if batch.frames.iter().any(|frame| frame.clock_correction_us != 0) {
            return None;
        }
        let (mut any, mut whole) = (false, true);
        for frame in &mut batch.frames {
            let last = times_from_deltas(frame.base_time_us, &frame.time_deltas_us).and_then(|times| times.into_iter().max());
            let corrected = frame.base_time_us.checked_add(self.micros).filter(|_| last.is_some_and(|last| self.applies_to(last)));
            match corrected {
                Some(base_time_us) => (frame.base_time_us, frame.clock_correction_us, any) = (base_time_us, self.micros, true),
                None => whole = false,
            }
        }
        any.then(|| Corrected { batch: batch.encode_to_vec().into(), whole })
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
