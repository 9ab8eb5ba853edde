//! Finds HTTP/2 frames in the bytes that carry them, by their headers, and of RST_STREAM also what it says.

/// The length of a frame's header (RFC 9113 section 4.1).
const HEADER_BYTES: usize = 9;

/// What a frame's header says. The numbers are RFC 9113's (section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// How long the rest of the frame is.
    pub payload_bytes: u32,
    /// Its type.
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// The stream that it belongs to; 0 for the connection.
    pub stream: u32,
    /// Of RST_STREAM the error code (section 7); else 0.
    pub error_code: u32,
}

impl FrameHeader {
    /// DATA.
    pub const DATA: u8 = 0;
    /// HEADERS.
    pub const HEADERS: u8 = 1;
    /// RST_STREAM.
    pub const RST_STREAM: u8 = 3;
    /// GOAWAY.
    pub const GOAWAY: u8 = 7;
    /// Of RST_STREAM: nothing is wrong.
    pub const NO_ERROR: u32 = 0;
    /// On DATA and HEADERS: the sender's last frame of the stream.
    pub const END_STREAM: u8 = 1;

    fn parse([length @ .., kind, flags, s0, s1, s2, s3]: [u8; HEADER_BYTES]) -> Self {
        let payload_bytes = length.iter().fold(0, |bytes, byte| bytes << 8 | u32::from(*byte));
        // The highest bit is reserved.
        let stream = u32::from_be_bytes([s0, s1, s2, s3]) & (u32::MAX >> 1);
        Self { payload_bytes, kind, flags, stream, error_code: 0 }
    }
}

/// Follows one direction of a connection, however its bytes are cut into pieces.
#[derive(Debug, Default)]
pub struct FrameScanner {
    header: [u8; HEADER_BYTES],
    header_bytes: u8,
    payload_bytes: u32,
    // A RST_STREAM whose payload has not come to its end.
    reset: Option<FrameHeader>,
}

impl FrameScanner {
    /// Takes the next bytes, and calls `found` with each header that they complete; with that of RST_STREAM at its end.
    pub fn feed(&mut self, mut bytes: &[u8], mut found: impl FnMut(FrameHeader)) {
        loop {
            let skipped = bytes.len().min(self.payload_bytes as usize);
            self.payload_bytes -= skipped as u32;
            if let Some(reset) = &mut self.reset {
                let code = bytes[..skipped].iter();
                reset.error_code = code.fold(reset.error_code, |code, byte| code << 8 | u32::from(*byte));
                if self.payload_bytes == 0 {
                    found(*reset);
                    self.reset = None;
                }
            }
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return;
            }
            let have = usize::from(self.header_bytes);
            let taken = bytes.len().min(HEADER_BYTES - have);
            self.header[have..have + taken].copy_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            self.header_bytes += taken as u8;
            if usize::from(self.header_bytes) < HEADER_BYTES {
                return;
            }
            let header = FrameHeader::parse(self.header);
            (self.header_bytes, self.payload_bytes) = (0, header.payload_bytes);
            if header.kind == FrameHeader::RST_STREAM && header.payload_bytes > 0 {
                self.reset = Some(header);
            } else {
                found(header);
            }
        }
    }

    /// Whether the last frame is complete: another one may follow here.
    pub fn is_between_frames(&self) -> bool {
        self.header_bytes == 0 && self.payload_bytes == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_are_found_however_they_are_cut(
            frames in prop::collection::vec((0u32..400, prop_oneof![any::<u8>(), Just(FrameHeader::RST_STREAM)], any::<u8>(), 0u32..1 << 31), 0..20),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
        ) {
            let expected: Vec<FrameHeader> = frames
                .iter()
                .map(|&(payload_bytes, kind, flags, stream)| {
                    let code_bytes = if kind == FrameHeader::RST_STREAM { payload_bytes.min(4) } else { 0 };
                    FrameHeader { payload_bytes, kind, flags, stream, error_code: ((1_u64 << (8 * code_bytes)) - 1) as u32 }
                })
                .collect();
            let mut bytes = Vec::new();
            for FrameHeader { payload_bytes, kind, flags, stream, .. } in &expected {
                bytes.extend_from_slice(&payload_bytes.to_be_bytes()[1..]);
                bytes.extend([*kind, *flags]);
                // With the reserved bit, which says nothing.
                bytes.extend((stream | 1 << 31).to_be_bytes());
                // All ones: what is taken for a header by mistake is a wrong one.
                bytes.resize(bytes.len() + *payload_bytes as usize, 0xff);
            }
            let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).chain([bytes.len()]).collect();
            ends.sort_unstable();
            let (mut scanner, mut found, mut start) = (FrameScanner::default(), Vec::new(), 0);
            for end in ends {
                scanner.feed(&bytes[start..end], |header| found.push(header));
                start = end;
            }
            prop_assert_eq!(found, expected);
            prop_assert!(scanner.is_between_frames());
        }
    }
}
