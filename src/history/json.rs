//! JSON arrays of numbers and texts, as fast as their bytes can be gone through.

/// Writes one array.
pub struct Writer {
    bytes: Vec<u8>,
    integers: itoa::Buffer,
    reals: ryu::Buffer,
}

impl Writer {
    /// An array of about `elements`.
    pub fn new(elements: usize) -> Self {
        let mut bytes = Vec::with_capacity(elements * 5 + 2);
        bytes.push(b'[');
        Self { bytes, integers: itoa::Buffer::new(), reals: ryu::Buffer::new() }
    }

    /// Adds an integer.
    #[inline]
    pub fn integer(&mut self, value: i64) {
        if let 0..=9 = value {
            self.bytes.extend_from_slice(&[b'0' + value as u8, b',']);
        } else {
            self.bytes.extend_from_slice(self.integers.format(value).as_bytes());
            self.bytes.push(b',');
        }
    }

    /// Adds a double: a number that has a point or an exponent, so that SQL takes it for no integer, or a string when it is not finite.
    pub fn real(&mut self, value: f64) {
        let text = match value {
            _ if value.is_finite() => self.reals.format_finite(value),
            _ if value.is_nan() => "\"NaN\"",
            _ if value > 0.0 => "\"Infinity\"",
            _ => "\"-Infinity\"",
        };
        self.bytes.extend_from_slice(text.as_bytes());
        self.bytes.push(b',');
    }

    /// Adds a text.
    pub fn text(&mut self, text: &str) {
        self.bytes.push(b'"');
        for &byte in text.as_bytes() {
            match byte {
                b'"' | b'\\' => self.bytes.extend_from_slice(&[b'\\', byte]),
                0..0x20 => {
                    let hex = |digit: u8| b"0123456789abcdef"[usize::from(digit)];
                    self.bytes.extend_from_slice(&[b'\\', b'u', b'0', b'0', hex(byte >> 4), hex(byte & 15)]);
                }
                _ => self.bytes.push(byte),
            }
        }
        self.bytes.extend_from_slice(b"\",");
    }

    /// Adds an array of a number and what `value` adds.
    pub fn pair(&mut self, number: i64, value: impl FnOnce(&mut Self)) {
        self.bytes.push(b'[');
        self.integer(number);
        value(self);
        self.close();
        self.bytes.push(b',');
    }

    /// The array.
    pub fn finish(mut self) -> String {
        self.close();
        String::from_utf8(self.bytes).expect("made of ASCII and whole strings")
    }

    /// Puts the bracket in the place of the last comma.
    fn close(&mut self) {
        if self.bytes.last() == Some(&b',') {
            self.bytes.pop();
        }
        self.bytes.push(b']');
    }
}

/// Reads one array as [`Writer`] writes it: without white space. Whatever else it finds is `None`.
pub struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    /// Begins to read.
    pub fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    /// Steps over the bracket or comma before an element; `None` where there is neither.
    #[inline]
    pub fn next_element(&mut self) -> Option<()> {
        self.expect(if self.at == 0 { b'[' } else { b',' })
    }

    /// Whether all was read.
    pub fn ended(&self) -> bool {
        &self.text.as_bytes()[self.at..] == b"]"
    }

    /// Steps over a byte, which must be this one.
    #[inline]
    pub fn expect(&mut self, byte: u8) -> Option<()> {
        (*self.text.as_bytes().get(self.at)? == byte).then(|| self.at += 1)
    }

    /// Reads an integer.
    #[inline]
    pub fn integer(&mut self) -> Option<i64> {
        let negative = self.expect(b'-').is_some();
        let rest = &self.text.as_bytes()[self.at..];
        let (mut value, mut digits) = (0_u64, 0);
        while let Some(digit) = rest.get(digits).map(|byte| byte.wrapping_sub(b'0'))
            && digit < 10
        {
            value = value.wrapping_mul(10).wrapping_add(u64::from(digit));
            digits += 1;
        }
        self.at += digits;
        let value = value as i64; // 2^63 becomes the smallest integer, which is its own negative
        (digits > 0).then_some(if negative { value.wrapping_neg() } else { value })
    }

    /// Reads a double.
    pub fn real(&mut self) -> Option<f64> {
        if self.text.as_bytes().get(self.at) == Some(&b'"') {
            return self.text()?.parse().ok().filter(|value: &f64| !value.is_finite());
        }
        let rest = &self.text[self.at..];
        let end = rest.find([',', ']'])?;
        self.at += end;
        rest[..end].parse().ok()
    }

    /// Reads a text.
    pub fn text(&mut self) -> Option<String> {
        self.expect(b'"')?;
        let mut text = String::new();
        loop {
            let rest = &self.text[self.at..];
            let end = rest.find(['"', '\\'])?;
            text.push_str(&rest[..end]);
            self.at += end + 1;
            if rest.as_bytes()[end] == b'"' {
                return Some(text);
            }
            let escape = self.text.get(self.at..)?.chars().next()?;
            self.at += escape.len_utf8();
            match escape {
                'u' => {
                    let code = u32::from_str_radix(self.text.get(self.at..self.at + 4)?, 16).ok()?;
                    text.push(char::from_u32(code)?);
                    self.at += 4;
                }
                '"' | '\\' => text.push(escape),
                _ => return None,
            }
        }
    }
}
