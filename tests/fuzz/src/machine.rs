//! A store with the smallest loop around it, over media that shares its unchanged blocks with the image it began as.

use penstock_engine::*;
use penstock_wire::label::Geometry;
use penstock_wire::superblock::{NO_EXTENT, Superblock};
use penstock_wire::*;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, OnceLock};

pub type Block = Box<[u8; BLOCK]>;

pub const INCARNATION: Incarnation = Incarnation([9; 16]);
/// Smaller than a label allows, so that an open reads little.
pub const GEOMETRY: Geometry = Geometry { ring_start: BlockAddr(4), ring_blocks: 1024, extents_start: BlockAddr(1040), extents: 192 };
/// Turns after which a store that still wants something is taken to want it for ever.
const TURNS_MAX: usize = 20_000;

/// A store's blocks; those that are not here are zeros.
#[derive(Clone, Default)]
pub struct Media {
    base: Arc<HashMap<u64, Block>>,
    changed: BTreeMap<u64, Block>,
    pub unreadable: BTreeSet<u64>,
}

impl Media {
    pub fn blank() -> Self {
        let mut media = Self::default();
        let first = Superblock {
            incarnation: INCARNATION,
            store: 0,
            write_count: 1,
            generation: Generation(0),
            log_seq: Seq(1),
            log_at: RingPos(0),
            checkpoint: 0,
            directory: [NO_EXTENT; 2],
            directory_parts: 0,
            directory_len: 0,
            directory_crc: 0,
        };
        for slot in Geometry::superblock_slots(1) {
            first.encode_into(&mut media.block_mut(slot.0)[..]);
        }
        media
    }

    /// The same bytes, with all of them shared by later clones.
    pub fn settled(mut self) -> Self {
        let mut base = Arc::unwrap_or_clone(std::mem::take(&mut self.base));
        base.extend(std::mem::take(&mut self.changed));
        Self { base: Arc::new(base), ..Self::default() }
    }

    pub fn read(&self, at: u64) -> [u8; BLOCK] {
        self.changed.get(&at).or_else(|| self.base.get(&at)).map_or([0; BLOCK], |block| **block)
    }

    pub fn block_mut(&mut self, at: u64) -> &mut [u8; BLOCK] {
        let base = &self.base;
        self.changed.entry(at).or_insert_with(|| base.get(&at).cloned().unwrap_or_else(|| Box::new([0; BLOCK])))
    }

    pub fn read_many(&self, at: u64, blocks: u64) -> Vec<u8> {
        (at..at + blocks).flat_map(|at| self.read(at)).collect()
    }

    pub fn write_many(&mut self, at: u64, bytes: &[u8]) {
        for (i, block) in bytes.chunks_exact(BLOCK).enumerate() {
            self.block_mut(at + i as u64).copy_from_slice(block);
        }
    }
}

/// A seeded bug of the engine, named by `PENSTOCK_FUZZ_CANARY`: shows that the targets see what they look for.
fn canary() -> Option<Canary> {
    static CANARY: OnceLock<Option<Canary>> = OnceLock::new();
    *CANARY.get_or_init(|| {
        let name = std::env::var("PENSTOCK_FUZZ_CANARY").ok()?;
        let found = Canary::ALL.into_iter().find(|canary| format!("{canary:?}") == name);
        Some(found.unwrap_or_else(|| panic!("no canary {name}; there are {:?}", Canary::ALL)))
    })
}

#[derive(Default)]
struct Mem {
    bufs: HashMap<u32, Vec<u8>>,
    next: u32,
    host: HashMap<u32, Vec<u8>>,
}

impl Memory for Mem {
    fn alloc(&mut self, blocks: u32) -> Option<BufId> {
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
        false
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
        let (a, b) = (&self.host[&io.0][offset as usize..][..len as usize], &self.bufs[&buf.0][at as usize..][..len as usize]);
        a.iter().zip(b).position(|(a, b)| a != b).map(|at| at as u32)
    }
}

/// A store and all that its loop keeps.
pub struct Machine {
    pub media: Media,
    pub store: Store,
    mem: Mem,
    fx: Effects,
    now: u64,
    next_io: u32,
    replies: HashMap<u32, Status>,
}

impl Machine {
    pub fn open(media: Media) -> Self {
        let config = StoreConfig {
            geometry: GEOMETRY,
            incarnation: INCARNATION,
            store: 0,
            barrier: Barrier::Flush,
            fenced: None,
            accept_lost_log: true,
            limits: Limits::default(),
            canary: canary(),
        };
        let store = Store::new(config);
        let mut machine = Self { media, store, mem: Mem::default(), fx: Effects::default(), now: 0, next_io: 0, replies: HashMap::new() };
        machine.run();
        machine
    }

    /// Turns the loop until nothing is out.
    fn run(&mut self) {
        for _ in 0..TURNS_MAX {
            self.store.settle(&mut self.mem, &mut self.fx);
            let effects = std::mem::take(&mut self.fx);
            if effects.list.is_empty() {
                return;
            }
            for effect in &effects.list {
                match effect {
                    Effect::Disk(op) => {
                        let ok = self.carry_out(op, effects.parts_of(op));
                        self.store.apply(Event::DiskDone { id: op.id, ok }, &mut self.mem, &mut self.fx);
                    }
                    Effect::Reply { io, status } => {
                        assert!(self.replies.insert(io.0, *status).is_none(), "command {io:?} is answered twice");
                    }
                    Effect::OrderDone { .. } | Effect::Notice(_) => {}
                }
            }
        }
        panic!("the store does not come to rest: {:?}", self.store.view());
    }

    fn carry_out(&mut self, op: &DiskOp, parts: &[Part]) -> bool {
        let end = GEOMETRY.extents_start.0 + GEOMETRY.extents * EXTENT_BLOCKS;
        assert!(op.at.0 + u64::from(op.blocks) <= end, "a command leaves the store: {op:?}");
        let mut at = op.at.0;
        let mut ok = true;
        for part in parts {
            let (memory, first) = match *part {
                Part::Buf { buf, first, .. } => (self.mem.bufs.get_mut(&buf.0), first as usize * BLOCK),
                Part::Host { io, offset, .. } => (self.mem.host.get_mut(&io.0), offset as usize),
            };
            let memory = memory.expect("what a command names is there");
            for block in memory[first..][..part.blocks() as usize * BLOCK].chunks_exact_mut(BLOCK) {
                match op.kind {
                    DiskKind::Read if self.media.unreadable.contains(&at) => ok = false,
                    DiskKind::Read => block.copy_from_slice(&self.media.read(at)),
                    DiskKind::Write => {
                        self.media.unreadable.remove(&at);
                        self.media.block_mut(at).copy_from_slice(block);
                    }
                    DiskKind::Flush => {}
                }
                at += 1;
            }
        }
        ok
    }

    pub fn tick(&mut self, ms: u64) {
        self.now += ms;
        self.store.apply(Event::Tick { now: Millis(self.now) }, &mut self.mem, &mut self.fx);
        self.run();
    }

    pub fn order(&mut self, order: Order) {
        self.store.apply(Event::Order { id: OrderId(1), order }, &mut self.mem, &mut self.fx);
        self.run();
        self.tick(1);
    }

    /// One host command from beginning to end; `None` when it was not answered.
    pub fn host(&mut self, replica: ReplicaNo, op: HostOp, payload: Vec<u8>) -> (Option<Status>, Vec<u8>) {
        let io = self.next_io;
        self.next_io += 1;
        self.mem.host.insert(io, payload);
        self.store.apply(Event::Host { io: IoId(io), replica, op }, &mut self.mem, &mut self.fx);
        self.run();
        for _ in 0..200 {
            if self.replies.contains_key(&io) {
                break;
            }
            self.tick(10);
        }
        let status = self.replies.remove(&io);
        let payload = if status.is_some() { self.mem.host.remove(&io).unwrap_or_default() } else { Vec::new() };
        (status, payload)
    }
}
