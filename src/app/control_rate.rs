//! How much a client may ask of a connection beside what carries something: a token bucket.

use super::frames::FrameHeader;
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until};

/// For how long the rate may be used ahead: what belongs to a burst of calls comes at once.
pub const BURST: Duration = Duration::from_secs(2);

/// What of a frame costs as much as a frame.
const BYTES_PER_UNIT: u32 = 256;

/// What a call costs that is begun to be thrown away: much more than a frame, but that happens to clients that mean well.
const UNITS_PER_RESET: u32 = 4;

/// Metadata of a call that costs nothing: as much as common proxies let through, so that a large token of who calls is among it.
const FREE_HEADER_BYTES: u32 = 8 << 10;

/// How many control frames a client may answer each DATA frame with: WINDOW_UPDATE for the stream and for the connection,
/// and the PING with which some measure the bandwidth.
const UNITS_PER_DATA_FRAME: u32 = 3;

/// What a frame that a client sends costs, in control frames.
pub fn units_of(frame: FrameHeader) -> u32 {
    match frame.kind {
        FrameHeader::DATA if frame.payload_bytes > 0 || frame.flags & FrameHeader::END_STREAM != 0 => 0,
        FrameHeader::HEADERS => frame.payload_bytes.saturating_sub(FREE_HEADER_BYTES) / BYTES_PER_UNIT,
        FrameHeader::RST_STREAM => UNITS_PER_RESET,
        _ => 1 + frame.payload_bytes / BYTES_PER_UNIT,
    }
}

/// How a client that uses more than its rate is treated.
#[derive(Debug, Clone, Copy)]
pub struct ControlLimits {
    /// How many units it may use a second.
    pub units_per_second_max: u32,
    /// For how long it is held to that before it is taken for an attacker.
    pub held_max: Duration,
}

/// It has been held to its rate for as long as it may be, and still sends more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flood;

/// What a client has used of its rate.
///
/// Who keeps to it costs an addition for each frame, and is never asked for the time but once in many frames; a timer has only who
/// is held back.
#[derive(Debug)]
pub struct ControlRate {
    // Used since the time was last looked at.
    units: u32,
    // What answers to DATA may use besides.
    answers: u32,
    // When nothing would be used any longer, were there no more to come.
    unused_at: Instant,
    // Since when there was always more than it may send.
    held_since: Option<Instant>,
    held: Option<Pin<Box<Sleep>>>,
}

impl ControlRate {
    /// Of which nothing is used.
    pub fn new() -> Self {
        Self { units: 0, answers: 0, unused_at: Instant::now(), held_since: None, held: None }
    }

    /// DATA frames were sent, which the client may answer, now or later; at most as many at once as it may send without any.
    pub fn allow_answers_to(&mut self, data_frames: u32, limits: &ControlLimits) {
        let burst = limits.units_per_second_max.saturating_mul(BURST.as_secs() as u32);
        self.answers = self.answers.saturating_add(data_frames.saturating_mul(UNITS_PER_DATA_FRAME)).min(burst);
    }

    /// Uses some of it, be it there or not.
    pub fn take(&mut self, units: u32, limits: &ControlLimits) -> Result<(), Flood> {
        let answers = units.min(self.answers);
        self.answers -= answers;
        self.units = self.units.saturating_add(units - answers);
        // Asking for the time costs more than all the rest.
        if self.units > limits.units_per_second_max / 16 {
            self.held = self.settle(Instant::now(), limits)?.map(|free_at| Box::pin(sleep_until(free_at)));
        }
        Ok(())
    }

    /// Counts what was used until `now`; until when the client is to be held, if it is.
    fn settle(&mut self, now: Instant, limits: &ControlLimits) -> Result<Option<Instant>, Flood> {
        self.unused_at = self.unused_at.max(now) + Duration::from_secs(1) * std::mem::take(&mut self.units) / limits.units_per_second_max;
        let free_at = self.unused_at - BURST;
        if free_at <= now {
            self.held_since = None;
            return Ok(None);
        }
        let held_until = *self.held_since.get_or_insert(now) + limits.held_max;
        // No longer than that, however much it has sent at once: keepalive must not end it without a word.
        if now >= held_until { Err(Flood) } else { Ok(Some(free_at.min(held_until))) }
    }

    /// Holds the client for at least so long, which says nothing against it.
    pub fn hold_for(&mut self, duration: Duration) {
        let until = Instant::now() + duration;
        if self.held.as_ref().is_none_or(|held| held.deadline() < until) {
            self.held = Some(Box::pin(sleep_until(until)));
        }
    }

    /// Ready when the client may go on.
    pub fn poll_free(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(held) = &mut self.held {
            ready!(held.as_mut().poll(cx));
            self.held = None;
        }
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    const LIMITS: ControlLimits = ControlLimits { units_per_second_max: 1_000, held_max: Duration::from_secs(10) };

    /// Sends so many units in pieces of a hundred, each as soon as it may; when it could go on.
    fn send(rate: &mut ControlRate, units: u32, mut now: Instant) -> Result<Instant, Flood> {
        for _ in 0..units / 100 {
            rate.units += 100;
            now = rate.settle(now, &LIMITS)?.unwrap_or(now);
        }
        Ok(now)
    }

    #[test]
    fn a_burst_is_free_and_more_is_held_to_the_rate() {
        let mut rate = ControlRate::new();
        let begin = Instant::now();
        assert_eq!(send(&mut rate, 2_000, begin), Ok(begin));
        assert_eq!(send(&mut rate, 8_000, begin), Ok(begin + Duration::from_secs(8)));
    }

    #[test]
    fn who_always_sends_more_is_found_out_and_who_rests_is_not() {
        let mut rate = ControlRate::new();
        let mut now = Instant::now();
        for _ in 0..10 {
            now = send(&mut rate, 10_000, now).expect("there was a rest") + BURST;
        }
        now = send(&mut rate, 12_000, now).expect("for as long as it may");
        assert_eq!(send(&mut rate, 100, now), Err(Flood));
    }

    #[test]
    fn who_was_not_held_before_is_held_first() {
        let mut rate = ControlRate::new();
        let mut now = Instant::now();
        // Always something used, for a minute, but never too much.
        assert_eq!(send(&mut rate, 2_000, now), Ok(now));
        for _ in 0..40 {
            now += Duration::from_millis(1_500);
            assert_eq!(send(&mut rate, 1_500, now), Ok(now));
        }
        assert_eq!(send(&mut rate, 1_000, now), Ok(now + Duration::from_secs(1)));
    }

    #[test]
    fn who_sends_far_too_much_at_once_is_held_no_longer_than_others() {
        let mut rate = ControlRate::new();
        let begin = Instant::now();
        rate.units = 1_000_000;
        assert_eq!(rate.settle(begin, &LIMITS), Ok(Some(begin + LIMITS.held_max)));
        rate.units = 1;
        assert_eq!(rate.settle(begin + LIMITS.held_max, &LIMITS), Err(Flood));
    }

    #[test]
    fn answers_to_data_are_free_though_they_come_later_and_together() {
        let mut rate = ControlRate::new();
        for _ in 0..100 {
            for _ in 0..600 {
                rate.allow_answers_to(1, &LIMITS);
            }
            assert_eq!(rate.take(1_200, &LIMITS), Ok(()));
        }
        assert!(rate.units == 0 && rate.held.is_none());
    }

    #[test]
    fn who_keeps_to_the_rate_may_go_on_for_ever() {
        let mut rate = ControlRate::new();
        let mut now = Instant::now();
        for _ in 0..10_000 {
            assert_eq!(send(&mut rate, 100, now), Ok(now));
            now += Duration::from_millis(100);
        }
    }

    #[tokio::test]
    async fn who_is_held_goes_on_when_it_may() {
        let mut rate = ControlRate::new();
        let limits = ControlLimits { units_per_second_max: 100, ..LIMITS };
        rate.take(210, &limits).expect("no flood");
        assert!(rate.held.is_some());
        poll_fn(|cx| rate.poll_free(cx)).await;
        assert!(rate.held.is_none());
    }

    #[test]
    fn a_frame_costs_what_it_carries_beside_the_data() {
        let frame = |kind, payload_bytes, flags| units_of(FrameHeader { kind, payload_bytes, flags, stream: 1, error_code: 0 });
        assert_eq!((frame(FrameHeader::DATA, 16_384, 0), frame(FrameHeader::DATA, 0, FrameHeader::END_STREAM)), (0, 0));
        assert_eq!(frame(FrameHeader::DATA, 0, 0), 1);
        assert_eq!((frame(FrameHeader::HEADERS, 5_000, 0), frame(FrameHeader::HEADERS, 16_384, 0)), (0, 32));
        assert_eq!(frame(FrameHeader::RST_STREAM, 4, 0), 4);
        // PING, and a CONTINUATION.
        assert_eq!((frame(6, 8, 0), frame(9, 2_560, 0)), (1, 11));
    }
}
