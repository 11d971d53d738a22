//! Choices read from the fuzzer's bytes: zeros once they are used up.

pub struct Choices<'a> {
    bytes: &'a [u8],
}

/// Values at which limits break.
const EDGES: [u64; 16] =
    [0, 1, 2, 15, 16, 127, 255, 256, 0xffff, 0x10000, 0x7fff_ffff, 0xffff_fffe, 0xffff_ffff, 1 << 62, u64::MAX - 1, u64::MAX];

impl<'a> Choices<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub fn is_over(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn rest(&self) -> &'a [u8] {
        self.bytes
    }

    pub fn u8(&mut self) -> u8 {
        match self.bytes.split_first() {
            Some((first, rest)) => {
                self.bytes = rest;
                *first
            }
            None => 0,
        }
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    pub fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    /// One of `len` things.
    pub fn pick(&mut self, len: usize) -> usize {
        usize::from(self.u16()) % len.max(1)
    }

    /// A new value for a field that holds `now`: an edge, a neighbour, or anything.
    pub fn value(&mut self, now: u64) -> u64 {
        match self.u8() {
            edge @ 0..128 => EDGES[usize::from(edge) % EDGES.len()],
            near @ 128..200 => now.wrapping_add(u64::from(near)).wrapping_sub(163),
            _ => self.u64(),
        }
    }
}
