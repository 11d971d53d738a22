//! Buffers and payloads of a store in plain memory: for the tests here and for the fuzz targets (tests/fuzz). Not here: what
//! the simulator's memory watches over, such as a buffer that is freed while a device holds it.

use penstock_engine::{BufId, IoId, Memory, Part};
use penstock_wire::{BLOCK, crc32c};
use std::collections::HashMap;

pub struct PlainMemory {
    bufs: HashMap<u32, Vec<u8>>,
    next: u32,
    /// Payloads by command.
    pub host: HashMap<u32, Vec<u8>>,
    /// Whether payloads may go to the device as they are.
    pub direct: bool,
    /// Blocks that there are.
    pub limit: usize,
}

impl PlainMemory {
    pub fn new(direct: bool) -> Self {
        Self { bufs: HashMap::new(), next: 0, host: HashMap::new(), direct, limit: usize::MAX }
    }

    /// Buffers that are not given back.
    pub fn held(&self) -> usize {
        self.bufs.len()
    }

    /// The bytes that a part of a device command names.
    pub fn part_mut(&mut self, part: &Part) -> &mut [u8] {
        let (memory, first) = match *part {
            Part::Buf { buf, first, .. } => (self.bufs.get_mut(&buf.0), first as usize * BLOCK),
            Part::Host { io, offset, .. } => (self.host.get_mut(&io.0), offset as usize),
        };
        &mut memory.expect("what a command names is there")[first..][..part.blocks() as usize * BLOCK]
    }
}

impl Memory for PlainMemory {
    fn alloc(&mut self, blocks: u32) -> Option<BufId> {
        let out: usize = self.bufs.values().map(|buf| buf.len() / BLOCK).sum();
        if out + blocks as usize > self.limit {
            return None;
        }
        self.next += 1;
        self.bufs.insert(self.next, vec![0xdd; blocks as usize * BLOCK]);
        Some(BufId(self.next))
    }
    fn free(&mut self, buf: BufId) {
        self.bufs.remove(&buf.0).expect("a buffer is freed once");
    }
    fn bytes(&self, buf: BufId) -> &[u8] {
        &self.bufs[&buf.0]
    }
    fn bytes_mut(&mut self, buf: BufId) -> &mut [u8] {
        self.bufs.get_mut(&buf.0).expect("the buffer is allocated")
    }
    fn host_direct(&self, _: IoId) -> bool {
        self.direct
    }
    fn host_crc(&self, io: IoId, offset: u32) -> u32 {
        crc32c(&self.host[&io.0][offset as usize..][..BLOCK])
    }
    fn host_to_buf(&mut self, io: IoId, offset: u32, buf: BufId, at: u32, len: u32) {
        let from = &self.host[&io.0][offset as usize..][..len as usize];
        self.bufs.get_mut(&buf.0).expect("the buffer is allocated")[at as usize..][..len as usize].copy_from_slice(from);
    }
    fn buf_to_host(&mut self, buf: BufId, at: u32, io: IoId, offset: u32, len: u32) {
        let from = &self.bufs[&buf.0][at as usize..][..len as usize];
        self.host.get_mut(&io.0).expect("the command is held")[offset as usize..][..len as usize].copy_from_slice(from);
    }
    fn host_zero(&mut self, io: IoId, offset: u32, len: u32) {
        self.host.get_mut(&io.0).expect("the command is held")[offset as usize..][..len as usize].fill(0);
    }
    fn host_differs(&self, io: IoId, offset: u32, buf: BufId, at: u32, len: u32) -> Option<u32> {
        let (a, b) = (&self.host[&io.0][offset as usize..][..len as usize], &self.bytes(buf)[at as usize..][..len as usize]);
        a.iter().zip(b).position(|(a, b)| a != b).map(|at| at as u32)
    }
}
