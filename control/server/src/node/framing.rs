//! Finds the end of one JSON object in a stream of bytes, in one pass: SPDK marks it by nothing else.

/// What has been seen of the object so far.
#[derive(Debug, Default)]
pub struct Framing {
    depth: u32,
    in_text: bool,
    escaped: bool,
    whole: bool,
}

impl Framing {
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Looks at the bytes that follow those seen before. Anything after the object's end is whitespace or an error
    /// that parsing the whole will find.
    pub fn scan(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.in_text {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_text = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_text = true,
                b'{' | b'[' => self.depth = self.depth.saturating_add(1),
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    self.whole |= self.depth == 0;
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn framing_ends_with_the_object_wherever_it_is_cut(
            text in "\\PC{0,20}", n: i64, cut in 0usize..200, inner in proptest::collection::vec("[\\[\\]{}\"\\\\a]{0,6}", 0..4)
        ) {
            let bytes = serde_json::to_vec(&serde_json::json!({"a": text, "b": [n, {"c": inner}]})).unwrap();
            let cut = cut % bytes.len();
            let mut framing = Framing::default();
            framing.scan(&bytes[..cut]);
            prop_assert!(!framing.is_whole());
            framing.scan(&bytes[cut..]);
            prop_assert!(framing.is_whole());
        }
        #[test]
        fn framing_of_any_bytes_never_panics(bytes: Vec<u8>) {
            Framing::default().scan(&bytes);
        }
    }
}
