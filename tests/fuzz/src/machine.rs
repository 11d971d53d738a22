//! A store with the smallest loop around it, over media that shares its unchanged blocks with the image it began as.

use crate::plain_memory::PlainMemory;
use penstock_engine::*;
use penstock_wire::label::Geometry;
use penstock_wire::superblock::Superblock;
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
        let first = Superblock::first(INCARNATION, 0);
        for slot in Geometry::superblock_slots(first.write_count) {
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

/// A store and all that its loop keeps.
pub struct Machine {
    pub media: Media,
    pub store: Store,
    mem: PlainMemory,
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
            replication: penstock_engine::Replication::default(),
            canary: canary(),
        };
        let store = Store::new(config);
        let mut machine =
            Self { media, store, mem: PlainMemory::new(false), fx: Effects::default(), now: 0, next_io: 0, replies: HashMap::new() };
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
                    Effect::OrderDone { .. } | Effect::Notice(_) | Effect::Send { .. } => {}
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
            for block in self.mem.part_mut(part).chunks_exact_mut(BLOCK) {
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
        self.store.apply(Event::Host { io: IoId(io), replica, host: HostId::default(), op }, &mut self.mem, &mut self.fx);
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
