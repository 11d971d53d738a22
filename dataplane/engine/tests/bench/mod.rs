//! A store over a well-behaved drive in memory, with the smallest loop around it.

pub mod memory;

use memory::PlainMemory;
use penstock_engine::format::format;
use penstock_engine::*;
use penstock_wire::label::{Geometry, Label};
use penstock_wire::*;
use std::collections::HashMap;

pub const SEGMENT: SegmentId = SegmentId([2; 16]);

pub struct Bench {
    pub label: Label,
    pub media: Vec<u8>,
    pub mem: PlainMemory,
    pub store: Store,
    pub fx: Effects,
    now: u64,
    pub next_io: u32,
    /// Who begins the commands, and of which volume.
    pub host: HostId,
    pub segment: SegmentId,
    pub replies: HashMap<u32, Status>,
    pub orders: HashMap<u64, Result<(), OrderError>>,
    pub notices: Vec<Notice>,
    /// Words to peers with their payload, in order.
    pub sent: Vec<(NodeId, PeerWord, Vec<u8>)>,
    /// The drive says so many ms later that it has done something.
    pub late: u64,
    done: Vec<(u64, DiskId)>,
    /// Openings, and what the node has written down of the last one.
    pub openings: u8,
    pub witness: Option<Generation>,
}

pub fn config(label: &Label) -> StoreConfig {
    StoreConfig {
        geometry: Geometry::of(&label.stores[0]).unwrap(),
        incarnation: label.incarnation,
        store: 0,
        barrier: Barrier::Flush,
        fenced: None,
        accept_lost_log: false,
        limits: Limits::default(),
        replication: Replication { node: label.node, ..Replication::default() },
        canary: None,
    }
}

/// Of a drive, unless a test says otherwise.
pub const DRIVE_BLOCKS: u64 = 12_000;
/// Of its log, unless a test says otherwise.
pub const RING_BLOCKS: u64 = 2048;

impl Bench {
    pub fn new() -> Self {
        Self::on_node(1)
    }

    /// A store on a drive of its own, on node `no`.
    pub fn on_node(no: u8) -> Self {
        Self::on_drive(no, 9, DRIVE_BLOCKS)
    }

    /// On a drive of so many blocks, and formatted for that life.
    pub fn on_drive(no: u8, life: u8, blocks: u64) -> Self {
        Self::with_ring(no, life, blocks, RING_BLOCKS)
    }

    /// The same with a log of so many blocks.
    pub fn with_ring(no: u8, life: u8, blocks: u64, ring: u64) -> Self {
        let (node, drive) = (NodeId([no; 16]), DriveId([no; 16]));
        let label = Label::plan(ClusterId([1; 16]), node, drive, Incarnation([life; 16]), blocks, 1, ring).unwrap();
        let mut media = vec![0; blocks as usize * BLOCK];
        for (at, block) in format(&label).unwrap() {
            media[at.0 as usize * BLOCK..][..BLOCK].copy_from_slice(&block);
        }
        Self::over(label, media)
    }

    /// Opens what is on the drive.
    pub fn over(label: Label, media: Vec<u8>) -> Self {
        let store = Store::new(config(&label));
        let mut bench = Self {
            label,
            media,
            mem: PlainMemory::new(false),
            store,
            fx: Effects::default(),
            now: 0,
            next_io: 0,
            host: HostId::default(),
            segment: SEGMENT,
            replies: HashMap::new(),
            orders: HashMap::new(),
            notices: Vec::new(),
            sent: Vec::new(),
            late: 0,
            done: Vec::new(),
            openings: 0,
            witness: None,
        };
        bench.reopen();
        bench
    }

    /// The process dies and comes back; the drive keeps what it has.
    pub fn reopen(&mut self) {
        self.reopen_as(None);
    }

    /// The same, with a fence that was recorded before or without.
    pub fn reopen_as(&mut self, fenced: Option<FenceReason>) {
        self.openings += 1;
        let mut config = StoreConfig { fenced, ..config(&self.label) };
        let mut life = [self.openings; 16];
        life[0] = self.label.node.0[0];
        (config.replication.life, config.replication.witness) = (Incarnation(life), self.witness);
        self.store = Store::new(config);
        self.mem = PlainMemory::new(self.mem.direct);
        self.fx.clear();
        self.notices.clear();
        self.sent.clear();
        self.done.clear();
        self.run();
        let opened = self.store.view().recovery.generation;
        if opened > 0 {
            self.witness = self.witness.max(Some(Generation(opened)));
        }
    }

    /// Turns the loop until nothing is out.
    pub fn run(&mut self) {
        assert!(self.turns(100_000), "the loop does not come to rest: {:?}", self.store.view());
    }

    /// Turns the loop as often at most; true when nothing is out.
    pub fn turns(&mut self, most: usize) -> bool {
        for _ in 0..most {
            self.store.settle(&mut self.mem, &mut self.fx);
            let effects = std::mem::take(&mut self.fx);
            if effects.list.is_empty() {
                return true;
            }
            for effect in &effects.list {
                match effect {
                    Effect::Disk(op) => {
                        self.carry_out(op, effects.parts_of(op));
                        if self.late > 0 {
                            self.done.push((self.now + self.late, op.id));
                        } else {
                            self.store.apply(Event::DiskDone { id: op.id, ok: true }, &mut self.mem, &mut self.fx);
                        }
                    }
                    Effect::Reply { io, status } => {
                        self.replies.insert(io.0, *status);
                    }
                    Effect::OrderDone { id, result } => {
                        self.orders.insert(id.0, result.clone());
                    }
                    Effect::Notice(notice) => self.notices.push(notice.clone()),
                    Effect::Send { node, word, first_part, part_count } => {
                        let parts = &effects.parts[*first_part as usize..(*first_part + *part_count) as usize];
                        let payload = parts.iter().flat_map(|part| self.mem.part_mut(part).to_vec()).collect();
                        self.sent.push((*node, (**word).clone(), payload));
                    }
                }
            }
        }
        false
    }

    pub fn carry_out(&mut self, op: &DiskOp, parts: &[Part]) {
        let mut at = (self.label.stores[0].start.0 + op.at.0) as usize * BLOCK;
        for part in parts {
            let memory = self.mem.part_mut(part);
            let len = memory.len();
            match op.kind {
                DiskKind::Read => memory.copy_from_slice(&self.media[at..at + len]),
                DiskKind::Write => self.media[at..at + len].copy_from_slice(memory),
                DiskKind::Flush => {}
            }
            at += len;
        }
    }

    /// Time passes, without a turn.
    pub fn pass(&mut self, ms: u64) {
        self.now += ms;
        self.store.apply(Event::Tick { now: Millis(self.now) }, &mut self.mem, &mut self.fx);
        for (_, id) in self.done.extract_if(.., |(due, _)| *due <= self.now) {
            self.store.apply(Event::DiskDone { id, ok: true }, &mut self.mem, &mut self.fx);
        }
    }

    pub fn tick(&mut self, ms: u64) {
        self.pass(ms);
        self.run();
    }

    pub fn order(&mut self, order: Order) -> Result<(), OrderError> {
        let id = self.orders.len() as u64 + 1;
        self.store.apply(Event::Order { id: OrderId(id), order }, &mut self.mem, &mut self.fx);
        self.run();
        self.tick(1);
        self.orders[&id].clone()
    }

    pub fn create(&mut self, blocks: u64) {
        let shape = ReplicaShape {
            volume: VolumeId([2; 16]),
            segment: SEGMENT,
            replica: ReplicaId([3; 16]),
            segment_no: 0,
            blocks,
            logical_block: 512,
            name: "v".into(),
        };
        self.order(Order::Create(Box::new(shape))).unwrap();
    }

    /// A volume with one replica, beside whatever is there.
    pub fn create_other(&mut self, blocks: u64) {
        let id = [self.orders.len() as u8 + 100; 16];
        let shape = ReplicaShape {
            volume: VolumeId(id),
            segment: SegmentId(id),
            replica: ReplicaId(id),
            segment_no: 0,
            blocks,
            logical_block: 512,
            name: "w".into(),
        };
        self.order(Order::Create(Box::new(shape))).unwrap();
    }

    /// Sends a command without turning the loop.
    pub fn begin(&mut self, op: HostOp, payload: Vec<u8>) -> u32 {
        let io = self.next_io;
        self.next_io += 1;
        self.mem.host.insert(io, payload);
        let replica = self.store.replica_of(self.segment).unwrap();
        self.store.apply(Event::Host { io: IoId(io), replica, host: self.host, op }, &mut self.mem, &mut self.fx);
        io
    }

    pub fn host(&mut self, op: HostOp, payload: Vec<u8>) -> (Status, Vec<u8>) {
        let io = self.begin(op, payload);
        self.run();
        (self.replies[&io], self.mem.host.remove(&io).unwrap())
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Status {
        self.host(HostOp::Write(Span { offset, len: bytes.len() as u64 }), bytes.to_vec()).0
    }

    pub fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let (status, bytes) = self.host(HostOp::Read(Span { offset, len }), vec![0xcc; len as usize]);
        assert_eq!(status, Status::Ok);
        bytes
    }

    pub fn audit(&self) {
        let start = self.label.stores[0].start;
        self.store.audit(|at| self.media[(start.0 + at.0) as usize * BLOCK..][..BLOCK].try_into().unwrap()).unwrap();
    }
}

pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 7) as u8 ^ seed).collect()
}
