//! The engine's memory as the simulator gives it: every rule of `port` about who owns which bytes is an assertion here.
//!
//! A buffer that a device command holds may not be freed or borrowed mutably, and not be read at all while the device
//! fills it; a payload that one holds may not be touched or answered. Allocation fails now and then. Payloads that are
//! not `host_direct` are guest memory: the guest changes them behind the engine's back, between any two looks at them.
//! Not here: what the bytes mean.

use std::cell::{Cell, RefCell};

use penstock_engine::{BufId, IoId, Memory, Part};
use penstock_wire::crc32c;

use crate::rng::Rng;
use crate::stamp::BLOCK;

/// How a device command uses the memory it names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hold {
    /// The device reads it: a write to the drive.
    Source,
    /// The device fills it: a read from the drive.
    Target,
}

#[derive(Default, Clone, Copy)]
struct Holds {
    source: u32,
    target: u32,
}

impl Holds {
    fn any(self) -> bool {
        self.source + self.target > 0
    }
}

struct Buf {
    bytes: Vec<u8>,
    live: bool,
    holds: Holds,
}

struct Payload {
    data: RefCell<Vec<u8>>,
    direct: bool,
    /// What the guest will have put there by the end, if it meddles.
    other: Option<Vec<u8>>,
    /// Looks at the payload after which the guest meddles.
    fuse: Cell<u32>,
    live: bool,
    holds: Holds,
}

/// Memory of one store. Dropped with it at a crash.
pub struct SimMemory {
    bufs: Vec<Buf>,
    free: Vec<u32>,
    /// What freed buffers lay in: a simulation allocates all the time.
    spare: Vec<Vec<u8>>,
    payloads: Vec<Payload>,
    /// Blocks that may be out at once.
    limit_blocks: u64,
    out_blocks: u64,
    fail_one_in: u32,
    rng: Rng,
    pub alloc_failures: u64,
    pub scribbles: Cell<u64>,
}

impl SimMemory {
    pub fn new(limit_blocks: u64, fail_one_in: u32, rng: Rng) -> Self {
        SimMemory {
            bufs: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            payloads: Vec::new(),
            limit_blocks,
            out_blocks: 0,
            fail_one_in,
            rng,
            alloc_failures: 0,
            scribbles: Cell::new(0),
        }
    }

    /// Allocation no longer fails by chance, only by the limit.
    pub fn calm(&mut self) {
        self.fail_one_in = 0;
    }

    /// Hands a command's payload over; `other` is what a meddling guest changes it to after some looks.
    pub fn put(&mut self, io: IoId, data: Vec<u8>, direct: bool, other: Option<Vec<u8>>) {
        assert!(!direct || other.is_none(), "private memory does not change");
        let fuse = Cell::new(if other.is_some() { self.rng.below(4) as u32 } else { u32::MAX });
        let payload = Payload { data: RefCell::new(data), direct, other, fuse, live: true, holds: Holds::default() };
        let at = io.0 as usize;
        if at == self.payloads.len() {
            self.payloads.push(payload);
        } else {
            assert!(!self.payloads[at].live, "the host reuses {io:?} before its reply");
            self.payloads[at] = payload;
        }
    }

    /// Takes a payload back at the reply.
    pub fn take(&mut self, io: IoId) -> Vec<u8> {
        let p = &mut self.payloads[io.0 as usize];
        assert!(p.live, "reply to {io:?}, which is not out");
        assert!(!p.holds.any(), "reply to {io:?} while the device holds its payload");
        p.live = false;
        p.data.take()
    }

    /// A device command takes or gives back a part.
    pub fn hold(&mut self, part: Part, how: Hold) {
        let holds = match part {
            Part::Buf { buf, first, blocks } => {
                let b = self.live_buf(buf);
                let len = b.bytes.len() / BLOCK;
                assert!((first + blocks) as usize <= len && blocks > 0, "{part:?} leaves its buffer of {len} blocks");
                &mut self.bufs[buf.0 as usize].holds
            }
            Part::Host { io, offset, blocks } => {
                let p = self.live_payload(io);
                assert!(p.direct, "{part:?}: guest memory handed to the device");
                let len = p.data.borrow().len();
                assert!((offset as usize).is_multiple_of(BLOCK) && blocks > 0, "{part:?} is not made of whole blocks");
                assert!(offset as usize + blocks as usize * BLOCK <= len, "{part:?} leaves its payload of {len} bytes");
                &mut self.payloads[io.0 as usize].holds
            }
        };
        match how {
            Hold::Source => {
                assert_eq!(holds.target, 0, "{part:?} is written to the drive while the drive fills it");
                holds.source += 1;
            }
            Hold::Target => {
                assert_eq!(holds.source, 0, "{part:?} is filled while the drive reads it");
                holds.target += 1;
            }
        }
    }

    pub fn release(&mut self, part: Part, how: Hold) {
        let holds = match part {
            Part::Buf { buf, .. } => &mut self.bufs[buf.0 as usize].holds,
            Part::Host { io, .. } => &mut self.payloads[io.0 as usize].holds,
        };
        match how {
            Hold::Source => holds.source -= 1,
            Hold::Target => holds.target -= 1,
        }
    }

    /// The device's view of a part, block by block. For the device alone.
    pub fn device_read(&self, part: Part, block: u32, out: &mut [u8; BLOCK]) {
        match part {
            Part::Buf { buf, first, .. } => {
                let at = (first + block) as usize * BLOCK;
                out.copy_from_slice(&self.bufs[buf.0 as usize].bytes[at..at + BLOCK]);
            }
            Part::Host { io, offset, .. } => {
                let at = offset as usize + block as usize * BLOCK;
                out.copy_from_slice(&self.payloads[io.0 as usize].data.borrow()[at..at + BLOCK]);
            }
        }
    }

    /// Appends a part's bytes to what leaves for a peer: a device may be reading them meanwhile, but nothing may be changing them.
    pub fn copy_out(&self, part: Part, out: &mut Vec<u8>) {
        let len = part.blocks() as usize * BLOCK;
        match part {
            Part::Buf { buf, first, .. } => {
                let from = first as usize * BLOCK;
                out.extend_from_slice(&self.bytes(buf)[from..from + len]);
            }
            Part::Host { io, offset, .. } => {
                let (from, p) = (offset as usize, self.look(io));
                assert!(p.direct, "{part:?}: guest memory sent to a peer");
                out.extend_from_slice(&p.data.borrow()[from..from + len]);
            }
        }
    }

    pub fn device_fill(&mut self, part: Part, block: u32, page: &[u8; BLOCK]) {
        match part {
            Part::Buf { buf, first, .. } => {
                let at = (first + block) as usize * BLOCK;
                self.bufs[buf.0 as usize].bytes[at..at + BLOCK].copy_from_slice(page);
            }
            Part::Host { io, offset, .. } => {
                let at = offset as usize + block as usize * BLOCK;
                self.payloads[io.0 as usize].data.borrow_mut()[at..at + BLOCK].copy_from_slice(page);
            }
        }
    }

    /// Blocks that the engine holds.
    pub fn out_blocks(&self) -> u64 {
        self.out_blocks
    }

    fn live_buf(&self, buf: BufId) -> &Buf {
        let b = self.bufs.get(buf.0 as usize).unwrap_or_else(|| panic!("{buf:?} was never given"));
        assert!(b.live, "{buf:?} is used after it was freed");
        b
    }

    fn live_payload(&self, io: IoId) -> &Payload {
        let p = self.payloads.get(io.0 as usize).unwrap_or_else(|| panic!("{io:?} was never out"));
        assert!(p.live, "the payload of {io:?} is used after the reply");
        p
    }

    /// A look at a payload that may be changed by: it may have been swapped since the last one.
    fn look(&self, io: IoId) -> &Payload {
        let p = self.live_payload(io);
        assert_eq!(p.holds.target, 0, "the payload of {io:?} is read while the device fills it");
        if let Some(other) = &p.other {
            match p.fuse.get() {
                0 => {
                    p.data.borrow_mut().copy_from_slice(other);
                    p.fuse.set(u32::MAX);
                    self.scribbles.set(self.scribbles.get() + 1);
                }
                u32::MAX => {}
                n => p.fuse.set(n - 1),
            }
        }
        p
    }
}

impl Memory for SimMemory {
    fn alloc(&mut self, blocks: u32) -> Option<BufId> {
        assert!(blocks > 0, "an empty buffer");
        if self.rng.one_in(self.fail_one_in) || self.out_blocks + u64::from(blocks) > self.limit_blocks {
            self.alloc_failures += 1;
            return None;
        }
        self.out_blocks += u64::from(blocks);
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.resize(blocks as usize * BLOCK, 0xdb);
        let buf = Buf { bytes, live: true, holds: Holds::default() };
        // Late reuse would hide a stale id; an early one shows what it does. Both are wanted.
        if self.free.len() > 8 || !self.free.is_empty() && self.rng.one_in(2) {
            let i = self.rng.below(self.free.len() as u64) as usize;
            let at = self.free.swap_remove(i);
            self.bufs[at as usize] = buf;
            Some(BufId(at))
        } else {
            self.bufs.push(buf);
            Some(BufId(self.bufs.len() as u32 - 1))
        }
    }

    fn free(&mut self, buf: BufId) {
        let b = self.live_buf(buf);
        assert!(!b.holds.any(), "{buf:?} is freed while the device holds it");
        self.out_blocks -= (b.bytes.len() / BLOCK) as u64;
        let b = &mut self.bufs[buf.0 as usize];
        b.live = false;
        let mut bytes = std::mem::take(&mut b.bytes);
        bytes.clear();
        self.spare.push(bytes);
        self.free.push(buf.0);
    }

    fn bytes(&self, buf: BufId) -> &[u8] {
        let b = self.live_buf(buf);
        assert_eq!(b.holds.target, 0, "{buf:?} is read while the device fills it");
        &b.bytes
    }

    fn bytes_mut(&mut self, buf: BufId) -> &mut [u8] {
        let b = self.live_buf(buf);
        assert!(!b.holds.any(), "{buf:?} is changed while the device holds it");
        &mut self.bufs[buf.0 as usize].bytes
    }

    fn host_direct(&self, io: IoId) -> bool {
        self.live_payload(io).direct
    }

    fn host_crc(&self, io: IoId, offset: u32) -> u32 {
        let at = offset as usize;
        crc32c(&self.look(io).data.borrow()[at..at + BLOCK])
    }

    fn host_to_buf(&mut self, io: IoId, offset: u32, buf: BufId, at: u32, len: u32) {
        self.look(io);
        let data = self.payloads[io.0 as usize].data.take();
        self.bytes_mut(buf)[at as usize..(at + len) as usize].copy_from_slice(&data[offset as usize..(offset + len) as usize]);
        self.payloads[io.0 as usize].data.replace(data);
    }

    fn buf_to_host(&mut self, buf: BufId, at: u32, io: IoId, offset: u32, len: u32) {
        let p = self.live_payload(io);
        assert!(!p.holds.any(), "the payload of {io:?} is changed while the device holds it");
        let from = &self.bytes(buf)[at as usize..(at + len) as usize];
        p.data.borrow_mut()[offset as usize..(offset + len) as usize].copy_from_slice(from);
    }

    fn host_zero(&mut self, io: IoId, offset: u32, len: u32) {
        let p = self.live_payload(io);
        assert!(!p.holds.any(), "the payload of {io:?} is zeroed while the device holds it");
        p.data.borrow_mut()[offset as usize..(offset + len) as usize].fill(0);
    }

    fn host_differs(&self, io: IoId, offset: u32, buf: BufId, at: u32, len: u32) -> Option<u32> {
        let p = self.look(io);
        let data = p.data.borrow();
        let theirs = &data[offset as usize..(offset + len) as usize];
        let ours = &self.bytes(buf)[at as usize..(at + len) as usize];
        theirs.iter().zip(ours).position(|(a, b)| a != b).map(|i| i as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> SimMemory {
        SimMemory::new(16, 0, Rng::new(1))
    }

    #[test]
    #[should_panic(expected = "freed while the device holds it")]
    fn buffer_freed_under_the_device_is_caught() {
        let mut m = memory();
        let buf = m.alloc(1).expect("room");
        m.hold(Part::Buf { buf, first: 0, blocks: 1 }, Hold::Source);
        m.free(buf);
    }

    #[test]
    #[should_panic(expected = "used after it was freed")]
    fn buffer_used_after_free_is_caught() {
        let mut m = memory();
        let buf = m.alloc(1).expect("room");
        m.free(buf);
        m.bytes(buf);
    }

    #[test]
    #[should_panic(expected = "while the device holds its payload")]
    fn reply_under_the_device_is_caught() {
        let mut m = memory();
        m.put(IoId(0), vec![0; BLOCK], true, None);
        m.hold(Part::Host { io: IoId(0), offset: 0, blocks: 1 }, Hold::Target);
        m.take(IoId(0));
    }

    #[test]
    fn alloc_past_the_limit_fails_until_something_is_freed() {
        let mut m = memory();
        let a = m.alloc(10).expect("room");
        assert_eq!(m.alloc(7), None);
        m.free(a);
        assert!(m.alloc(7).is_some());
    }

    #[test]
    fn guest_payload_changes_between_two_looks() {
        let mut m = memory();
        let (a, b) = (vec![1; BLOCK], vec![2; BLOCK]);
        let (crc_a, crc_b) = (crc32c(&a), crc32c(&b));
        m.put(IoId(0), a, false, Some(b));
        let looks: Vec<u32> = (0..5).map(|_| m.host_crc(IoId(0), 0)).collect();
        assert_eq!(*looks.last().expect("five"), crc_b);
        assert!(looks.iter().all(|c| *c == crc_a || *c == crc_b));
    }
}
