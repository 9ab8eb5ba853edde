//! What is counted on the wire beside those who read it: HTTP/2 frames, and gRPC messages.

use super::Input;
use crate::{app::frames::FrameScanner, middleware::frames::MessageCounter};

/// Guarantee: however the bytes are cut, the same is found.
pub fn frames(data: &[u8]) {
    let mut input = Input(data);
    let piece = usize::from(input.byte()) + 1;
    let pieces = || input.0.chunks(piece);

    let (mut whole, mut cut) = (FrameScanner::default(), FrameScanner::default());
    let (mut found_in_whole, mut found_in_cut) = (Vec::new(), Vec::new());
    whole.feed(input.0, |header| found_in_whole.push(header));
    pieces().for_each(|bytes| cut.feed(bytes, |header| found_in_cut.push(header)));
    assert_eq!(found_in_whole, found_in_cut);
    assert_eq!(whole.is_between_frames(), cut.is_between_frames());

    let (mut whole, mut cut) = (MessageCounter::default(), MessageCounter::default());
    let counted = whole.feed(input.0);
    assert_eq!(counted, pieces().map(|bytes| cut.feed(bytes)).sum::<u64>());
    assert_eq!(whole.is_amid_message(), cut.is_amid_message());
    assert_eq!(whole.announced_bytes(), cut.announced_bytes());
}
