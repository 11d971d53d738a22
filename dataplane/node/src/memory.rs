//! The memory of one core: buffers of the engine by size class, and the payloads of host commands.
//!
//! Buffers come out of chunks of DMA memory that a class keeps once it has them, so that the fast path allocates nothing.
//! Not here: who may look at what and when: `spdk_rs::lend` counts that, and panics.

use penstock_engine::{BufId, IoId, Memory, Part};
use penstock_wire::peer::FRAME_BLOCKS_MAX;
use penstock_wire::{BLOCK, crc32c};
use spdk_rs::dma::DmaBuf;
use spdk_rs::lend::{HostSlab, LendBuf, Payload, SourcePart, TargetPart};

/// Blocks of each class. 264 is a whole batch: 1 MiB of payload and its header.
/// The last is all that a frame of a peer may bring for one word.
const CLASSES: [u32; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 264, 512, FRAME_BLOCKS_MAX];
/// Classes from here on leave a quarter of the memory to the smaller ones: what peers send may be as much as there is, and writing it to the log
/// takes a header's buffer.
const LARGE: u32 = 128;
/// A class grows by about this much at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// Where buffers come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// What every device can reach.
    Dma,
    /// For tests without SPDK, and drives that are files.
    Heap,
}

#[derive(Default)]
struct Class {
    free: Vec<LendBuf>,
}

struct Entry {
    buf: Option<LendBuf>,
    class: u8,
    blocks: u32,
    owner: Owner,
}

/// Whose code runs, and so whose a buffer is that is taken meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// The core's own.
    Core,
    /// The store with this place on the core.
    Store(u32),
}

/// Counts since the start.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct MemoryCounters {
    /// Buffers given to the engine.
    pub buffers: u64,
    /// Times there was none.
    pub shortages: u64,
    /// Chunks taken from SPDK: no longer grows once warm.
    pub chunks: u64,
    /// Bytes copied between payloads and buffers.
    pub copied_bytes: u64,
}

pub struct NodeMemory {
    source: Source,
    classes: [Class; CLASSES.len()],
    entries: Vec<Entry>,
    free_ids: Vec<u32>,
    /// Bytes that may be taken in chunks.
    limit_bytes: usize,
    taken_bytes: usize,
    pub host: HostSlab,
    pub counters: MemoryCounters,
    pub owner: Owner,
}

impl NodeMemory {
    pub fn new(source: Source, limit_bytes: usize) -> Self {
        Self {
            source,
            classes: Default::default(),
            entries: Vec::with_capacity(1024),
            free_ids: Vec::with_capacity(1024),
            limit_bytes,
            taken_bytes: 0,
            host: HostSlab::with_capacity(1024),
            counters: MemoryCounters::default(),
            owner: Owner::Core,
        }
    }

    /// Takes back what a store that will not run again holds, but for what a device still has; says how many buffers those are.
    pub fn take_back(&mut self, owner: Owner) -> usize {
        let mut lent = 0;
        for at in 0..self.entries.len() {
            let entry = &self.entries[at];
            let Some(buf) = entry.buf.as_ref().filter(|_| entry.owner == owner) else { continue };
            if buf.is_lent() {
                lent += 1;
            } else {
                self.free(BufId(at as u32));
            }
        }
        lent
    }

    /// Makes a buffer another's.
    pub fn hand_over(&mut self, buf: BufId, owner: Owner) {
        self.entries[buf.0 as usize].owner = owner;
    }

    /// The bytes of these parts, in order, piece by piece.
    pub fn copier<'a>(&'a self, parts: &'a [Part]) -> Copier<'a> {
        Copier { memory: self, parts, at: 0 }
    }

    /// Bytes of all chunks.
    pub fn taken_bytes(&self) -> usize {
        self.taken_bytes
    }

    /// Buffers that the engine holds.
    pub fn buffers_out(&self) -> usize {
        self.entries.len() - self.free_ids.len()
    }

    /// A buffer as a command's payload, which the engine names otherwise from here on; it comes back by [`Self::put_buf`].
    pub fn take_buf(&mut self, buf: BufId) -> LendBuf {
        self.free_ids.push(buf.0);
        self.entries[buf.0 as usize].buf.take().expect("a buffer is taken by who has it")
    }

    pub fn put_buf(&mut self, buf: LendBuf) {
        let class = CLASSES.iter().position(|&size| size as usize * BLOCK == buf.len());
        self.classes[class.expect("it was taken from here")].free.push(buf);
    }

    /// A host command's payload; the id is the engine's name for it until [`Self::take_io`].
    pub fn put_io(&mut self, payload: Payload) -> IoId {
        IoId(self.host.put(payload))
    }

    pub fn take_io(&mut self, io: IoId) -> Payload {
        self.host.take(io.0)
    }

    fn grow(&mut self, class: usize) -> bool {
        let piece = CLASSES[class] as usize * BLOCK;
        let chunk = (CHUNK_BYTES / piece).max(1) * piece;
        let limit = if CLASSES[class] >= LARGE { self.limit_bytes / 4 * 3 } else { self.limit_bytes };
        if self.taken_bytes + chunk > limit {
            return false;
        }
        match self.source {
            Source::Dma => match DmaBuf::zeroed(chunk) {
                Ok(memory) => self.classes[class].free.extend(LendBuf::carve(memory, piece)),
                Err(_) => return false,
            },
            Source::Heap => self.classes[class].free.extend((0..chunk / piece).map(|_| LendBuf::heap(piece))),
        }
        self.taken_bytes += chunk;
        self.counters.chunks += 1;
        true
    }

    fn entry(&self, buf: BufId) -> (&LendBuf, usize) {
        let entry = &self.entries[buf.0 as usize];
        (entry.buf.as_ref().expect("the engine names buffers that it has"), entry.blocks as usize * BLOCK)
    }

    fn entry_mut(&mut self, buf: BufId) -> (&mut LendBuf, usize) {
        let entry = &mut self.entries[buf.0 as usize];
        (entry.buf.as_mut().expect("the engine names buffers that it has"), entry.blocks as usize * BLOCK)
    }

    /// Memory for a device to read.
    pub fn lend_source(&self, part: Part) -> SourcePart {
        match part {
            Part::Buf { buf, first, blocks } => {
                let (lend, len) = self.entry(buf);
                let (start, end) = (first as usize * BLOCK, (first + blocks) as usize * BLOCK);
                assert!(end <= len, "{part:?} leaves its buffer of {len} bytes");
                lend.lend_source(start..end)
            }
            Part::Host { io, offset, blocks } => {
                let start = offset as usize;
                self.host.lend_source(io.0, start..start + blocks as usize * BLOCK)
            }
        }
    }

    /// Memory for a device to fill.
    pub fn lend_target(&mut self, part: Part) -> TargetPart {
        match part {
            Part::Buf { buf, first, blocks } => {
                let (lend, len) = self.entry_mut(buf);
                let (start, end) = (first as usize * BLOCK, (first + blocks) as usize * BLOCK);
                assert!(end <= len, "{part:?} leaves its buffer of {len} bytes");
                lend.lend_target(start..end)
            }
            Part::Host { io, offset, blocks } => {
                let start = offset as usize;
                self.host.lend_target(io.0, start..start + blocks as usize * BLOCK)
            }
        }
    }
}

/// See [`NodeMemory::copier`].
pub struct Copier<'a> {
    memory: &'a NodeMemory,
    parts: &'a [Part],
    /// Bytes of the first part that are copied already.
    at: usize,
}

impl Copier<'_> {
    /// The next bytes; there must be that many.
    pub fn copy(&mut self, to: &mut [u8]) {
        let mut done = 0;
        while done < to.len() {
            let (first, rest) = self.parts.split_first().expect("no more is copied than there is");
            let len = first.blocks() as usize * BLOCK;
            let count = (to.len() - done).min(len - self.at);
            let piece = &mut to[done..done + count];
            match *first {
                Part::Buf { buf, first, .. } => {
                    let start = first as usize * BLOCK + self.at;
                    piece.copy_from_slice(&self.memory.bytes(buf)[start..start + count]);
                }
                Part::Host { io, offset, .. } => self.memory.host.copy_out(io.0, offset as usize + self.at, piece),
            }
            done += count;
            self.at += count;
            if self.at == len {
                (self.parts, self.at) = (rest, 0);
            }
        }
    }
}

impl Memory for NodeMemory {
    fn alloc(&mut self, blocks: u32) -> Option<BufId> {
        let class = CLASSES.iter().position(|&size| size >= blocks);
        let Some(class) = class else { panic!("a buffer of {blocks} blocks is larger than the largest class") };
        let mut found = self.classes[class].free.pop();
        if found.is_none() && self.grow(class) {
            found = self.classes[class].free.pop();
        }
        let Some(buf) = found else {
            self.counters.shortages += 1;
            return None;
        };
        self.counters.buffers += 1;
        let entry = Entry { buf: Some(buf), class: class as u8, blocks, owner: self.owner };
        Some(BufId(match self.free_ids.pop() {
            Some(id) => {
                self.entries[id as usize] = entry;
                id
            }
            None => {
                self.entries.push(entry);
                self.entries.len() as u32 - 1
            }
        }))
    }

    fn free(&mut self, buf: BufId) {
        let entry = &mut self.entries[buf.0 as usize];
        // Looked at before it is taken: a store that falls here must not take a device's memory with it.
        let is_lent = entry.buf.as_ref().expect("the engine frees a buffer once").is_lent();
        assert!(!is_lent, "{buf:?} is freed while a device has it");
        let lend = entry.buf.take().expect("just seen");
        self.classes[usize::from(entry.class)].free.push(lend);
        self.free_ids.push(buf.0);
    }

    fn bytes(&self, buf: BufId) -> &[u8] {
        let (lend, len) = self.entry(buf);
        &lend.bytes()[..len]
    }

    fn bytes_mut(&mut self, buf: BufId) -> &mut [u8] {
        let (lend, len) = self.entry_mut(buf);
        &mut lend.bytes_mut()[..len]
    }

    fn host_direct(&self, io: IoId) -> bool {
        self.host.is_direct(io.0)
    }

    fn host_crc(&self, io: IoId, offset: u32) -> u32 {
        self.host.look(io.0, offset as usize, BLOCK, crc32c)
    }

    fn host_to_buf(&mut self, io: IoId, offset: u32, buf: BufId, at: u32, len: u32) {
        let entry = &mut self.entries[buf.0 as usize];
        let lend = entry.buf.as_mut().expect("the engine names buffers that it has");
        let (at, len) = (at as usize, len as usize);
        self.counters.copied_bytes += len as u64;
        self.host.copy_out(io.0, offset as usize, &mut lend.bytes_mut()[at..at + len]);
    }

    fn buf_to_host(&mut self, buf: BufId, at: u32, io: IoId, offset: u32, len: u32) {
        let entry = &self.entries[buf.0 as usize];
        let lend = entry.buf.as_ref().expect("the engine names buffers that it has");
        let (at, len) = (at as usize, len as usize);
        self.counters.copied_bytes += len as u64;
        self.host.copy_in(io.0, offset as usize, &lend.bytes()[at..at + len]);
    }

    fn host_zero(&mut self, io: IoId, offset: u32, len: u32) {
        self.host.zero(io.0, offset as usize, len as usize);
    }

    fn host_differs(&self, io: IoId, offset: u32, buf: BufId, at: u32, len: u32) -> Option<u32> {
        let (lend, _) = self.entry(buf);
        let ours = &lend.bytes()[at as usize..(at + len) as usize];
        let mut done = 0;
        for piece in ours.chunks(BLOCK) {
            let differs =
                self.host.look(io.0, offset as usize + done, piece.len(), |theirs| theirs.iter().zip(piece).position(|(a, b)| a != b));
            if let Some(at) = differs {
                return Some((done + at) as u32);
            }
            done += piece.len();
        }
        None
    }
}

impl NodeMemory {
    /// Copies payload bytes out for the node's own use: the ranges of a deallocate.
    pub fn copy_payload(&self, io: IoId, offset: usize, out: &mut [u8]) {
        self.host.copy_out(io.0, offset, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> NodeMemory {
        NodeMemory::new(Source::Heap, 64 << 20)
    }

    fn payload(bytes: &[u8]) -> Payload {
        let mut buf = LendBuf::heap(bytes.len().next_multiple_of(BLOCK));
        buf.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        Payload::Buf { buf, len: bytes.len() }
    }

    #[test]
    fn buffer_has_the_length_asked_for_and_its_id_is_reused() {
        let mut m = memory();
        for blocks in [1, 2, 3, 5, 100, 257, 512] {
            let id = m.alloc(blocks).unwrap();
            assert_eq!(m.bytes(id).len(), blocks as usize * BLOCK);
            m.bytes_mut(id).fill(1);
            m.free(id);
            assert_eq!(m.alloc(blocks), Some(id));
            m.free(id);
        }
        assert_eq!(m.buffers_out(), 0);
    }

    #[test]
    fn large_buffers_leave_room_for_small_ones() {
        let mut m = memory();
        let large: Vec<BufId> = std::iter::from_fn(|| m.alloc(FRAME_BLOCKS_MAX)).collect();
        assert_eq!(large.len(), 12, "three quarters of 64 MiB");
        assert!(m.alloc(2).is_some(), "a header's");
    }

    #[test]
    fn warm_memory_takes_no_more_chunks() {
        let mut m = memory();
        let mut once = || {
            let ids: Vec<_> = (0..64).map(|n| m.alloc(1 + n % 16).unwrap()).collect();
            ids.into_iter().for_each(|id| m.free(id));
            m.counters.chunks
        };
        let warm = once();
        assert!((0..100).all(|_| once() == warm));
    }

    #[test]
    fn memory_past_its_limit_is_refused_until_something_is_freed() {
        let mut m = NodeMemory::new(Source::Heap, 6 << 20);
        let mut ids = Vec::new();
        while let Some(id) = m.alloc(264) {
            ids.push(id);
        }
        assert_eq!((ids.len(), m.counters.shortages), (4, 1));
        m.free(ids.pop().unwrap());
        assert!(m.alloc(260).is_some());
    }

    #[test]
    fn payload_moves_to_buffers_and_back() {
        let mut m = memory();
        let bytes: Vec<u8> = (0..8192u32).map(|n| (n / 7) as u8).collect();
        let io = m.put_io(payload(&bytes));
        assert!(m.host_direct(io));
        assert_eq!(m.host_crc(io, 4096), crc32c(&bytes[4096..]));
        let buf = m.alloc(2).unwrap();
        m.host_to_buf(io, 100, buf, 4, 5000);
        assert_eq!(m.bytes(buf)[4..5004], bytes[100..5100]);
        assert_eq!(m.host_differs(io, 100, buf, 4, 5000), None);
        m.bytes_mut(buf)[4 + 4500] ^= 1;
        assert_eq!(m.host_differs(io, 100, buf, 4, 5000), Some(4500));
        m.bytes_mut(buf).fill(9);
        m.buf_to_host(buf, 0, io, 0, 8);
        m.host_zero(io, 1, 2);
        let mut head = [0; 4];
        m.copy_payload(io, 0, &mut head);
        assert_eq!(head, [9, 0, 0, 9]);
        m.free(buf);
        m.take_io(io);
    }

    #[test]
    fn parts_are_copied_in_order_whatever_the_pieces_are() {
        let mut m = memory();
        let bytes: Vec<u8> = (0..3 * BLOCK).map(|n| (n / 11) as u8).collect();
        let io = m.put_io(payload(&bytes));
        let buf = m.alloc(4).unwrap();
        m.bytes_mut(buf).iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 5) as u8);
        let parts =
            [Part::Buf { buf, first: 1, blocks: 2 }, Part::Host { io, offset: 4096, blocks: 2 }, Part::Buf { buf, first: 0, blocks: 1 }];
        let want = [&m.bytes(buf)[4096..3 * 4096], &bytes[4096..], &m.bytes(buf)[..4096]].concat();
        for piece in [1000, 4096, 20480] {
            let mut copier = m.copier(&parts);
            let mut got = vec![0; want.len()];
            got.chunks_mut(piece).for_each(|to| copier.copy(to));
            assert_eq!(got, want);
        }
        m.free(buf);
        m.take_io(io);
    }

    #[test]
    fn payload_of_half_a_block_is_not_direct() {
        let mut m = memory();
        let io = m.put_io(payload(&[1; 512]));
        assert!(!m.host_direct(io));
    }

    #[test]
    fn buffers_of_a_fallen_store_come_back_but_for_those_that_a_device_has() {
        let mut m = memory();
        m.owner = Owner::Store(1);
        let (lent, kept) = (m.alloc(4).unwrap(), m.alloc(1).unwrap());
        m.owner = Owner::Store(2);
        let others = m.alloc(1).unwrap();
        let part = m.lend_target(Part::Buf { buf: lent, first: 0, blocks: 4 });
        assert_eq!(m.take_back(Owner::Store(1)), 1);
        assert_eq!(m.buffers_out(), 2, "{kept:?} is free, {lent:?} and {others:?} are not");
        drop(part);
        assert_eq!(m.take_back(Owner::Store(1)), 0);
        assert_eq!(m.buffers_out(), 1);
        m.free(others);
    }

    #[test]
    #[should_panic(expected = "freed while a device has it")]
    fn buffer_freed_under_the_device_panics() {
        let mut m = memory();
        let buf = m.alloc(1).unwrap();
        let _part = m.lend_source(Part::Buf { buf, first: 0, blocks: 1 });
        m.free(buf);
    }
}
