//! Counts gRPC messages in the bytes that carry them.

/// A flag byte and the message's length as 4 bytes, big-endian (gRPC over HTTP/2, `Length-Prefixed-Message`).
const PREFIX_BYTES: usize = 5;

/// Counts the messages whose last byte has passed, however the bytes are cut into pieces.
#[derive(Debug, Default)]
pub struct MessageCounter {
    /// How many bytes of the next message's prefix are there.
    prefix_bytes: usize,
    /// The length in the prefix, as far as it has come; then how much of the message is still to come.
    message_bytes: u32,
    /// The length of the message that is coming.
    announced_bytes: u32,
}

impl MessageCounter {
    /// Whether a message has begun and is not complete.
    pub fn is_amid_message(&self) -> bool {
        self.prefix_bytes > 0
    }

    /// How long the message is that has begun and is not complete, as its prefix says; 0 when there is none.
    pub fn announced_bytes(&self) -> u32 {
        if self.prefix_bytes == PREFIX_BYTES { self.announced_bytes } else { 0 }
    }

    /// Takes the next bytes, and tells how many messages they complete.
    pub fn feed(&mut self, mut bytes: &[u8]) -> u64 {
        let mut messages = 0;
        while !bytes.is_empty() {
            // What an upload sends is mostly many whole messages, each of which costs no more than a look at its length.
            while self.prefix_bytes == 0
                && let Some((&[_, length @ ..], rest)) = bytes.split_first_chunk::<PREFIX_BYTES>()
                && let Some(rest) = rest.get(u32::from_be_bytes(length) as usize..)
            {
                messages += 1;
                bytes = rest;
            }
            while self.prefix_bytes < PREFIX_BYTES {
                let Some((byte, rest)) = bytes.split_first() else { return messages };
                // The flag byte, which comes first, is shifted out by the four of the length.
                self.message_bytes = self.message_bytes << 8 | u32::from(*byte);
                self.prefix_bytes += 1;
                self.announced_bytes = self.message_bytes;
                bytes = rest;
            }
            let here = bytes.len().min(self.message_bytes as usize);
            self.message_bytes -= here as u32;
            bytes = &bytes[here..];
            if self.message_bytes == 0 {
                messages += 1;
                self.prefix_bytes = 0;
            }
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wire(lengths: &[usize]) -> Vec<u8> {
        let prefixed = |length: &usize| {
            let mut message = vec![1];
            message.extend((*length as u32).to_be_bytes());
            // All ones: a body byte that is taken for a prefix byte yields a wrong length.
            message.resize(PREFIX_BYTES + length, 0xff);
            message
        };
        lengths.iter().flat_map(prefixed).collect()
    }

    proptest! {
        #[test]
        fn messages_are_counted_however_they_are_cut(
            lengths in prop::collection::vec(0usize..700, 0..20),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
        ) {
            let bytes = wire(&lengths);
            let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).chain([bytes.len()]).collect();
            ends.sort_unstable();
            let (mut counter, mut start, mut seen) = (MessageCounter::default(), 0, 0);
            for end in ends {
                seen += counter.feed(&bytes[start..end]);
                start = end;
                let mut passed = 0;
                let complete = lengths.iter().filter(|length| { passed += PREFIX_BYTES + **length; passed <= end }).count();
                prop_assert_eq!(seen, complete as u64);
                let complete_bytes: usize = lengths[..complete].iter().map(|length| PREFIX_BYTES + length).sum();
                prop_assert_eq!(counter.is_amid_message(), complete_bytes < end);
            }
        }
    }

    #[test]
    fn a_message_of_4_gib_is_not_taken_for_many() {
        let mut counter = MessageCounter::default();
        assert_eq!(counter.feed(&[0, 0xff, 0xff, 0xff, 0xff]), 0);
        assert_eq!((0..100).map(|_| counter.feed(&[0; 1000])).sum::<u64>(), 0);
    }
}
