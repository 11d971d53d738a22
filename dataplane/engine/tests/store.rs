//! A store over a well-behaved drive: each behaviour in a few lines. Faults and order belong to the simulator.

use penstock_engine::format::format;
use penstock_engine::*;
use penstock_wire::label::{Geometry, Label};
use penstock_wire::*;
use std::collections::HashMap;

/// Buffers and payloads in plain memory.
#[derive(Default)]
struct Mem {
    bufs: HashMap<u32, Vec<u8>>,
    next: u32,
    host: HashMap<u32, Vec<u8>>,
    direct: bool,
}

impl Memory for Mem {
    fn alloc(&mut self, blocks: u32) -> Option<BufId> {
        self.next += 1;
        self.bufs.insert(self.next, vec![0xdd; blocks as usize * BLOCK]);
        Some(BufId(self.next))
    }
    fn free(&mut self, buf: BufId) {
        self.bufs.remove(&buf.0).expect("freed once");
    }
    fn bytes(&self, buf: BufId) -> &[u8] {
        &self.bufs[&buf.0]
    }
    fn bytes_mut(&mut self, buf: BufId) -> &mut [u8] {
        self.bufs.get_mut(&buf.0).unwrap()
    }
    fn host_direct(&self, _: IoId) -> bool {
        self.direct
    }
    fn host_crc(&self, io: IoId, offset: u32) -> u32 {
        crc32c(&self.host[&io.0][offset as usize..][..BLOCK])
    }
    fn host_to_buf(&mut self, io: IoId, offset: u32, buf: BufId, at: u32, len: u32) {
        let from = self.host[&io.0][offset as usize..][..len as usize].to_vec();
        self.bytes_mut(buf)[at as usize..][..len as usize].copy_from_slice(&from);
    }
    fn buf_to_host(&mut self, buf: BufId, at: u32, io: IoId, offset: u32, len: u32) {
        let from = self.bytes(buf)[at as usize..][..len as usize].to_vec();
        self.host.get_mut(&io.0).unwrap()[offset as usize..][..len as usize].copy_from_slice(&from);
    }
    fn host_zero(&mut self, io: IoId, offset: u32, len: u32) {
        self.host.get_mut(&io.0).unwrap()[offset as usize..][..len as usize].fill(0);
    }
    fn host_differs(&self, io: IoId, offset: u32, buf: BufId, at: u32, len: u32) -> Option<u32> {
        let (a, b) = (&self.host[&io.0][offset as usize..][..len as usize], &self.bytes(buf)[at as usize..][..len as usize]);
        a.iter().zip(b).position(|(a, b)| a != b).map(|at| at as u32)
    }
}

const SEGMENT: SegmentId = SegmentId([2; 16]);

struct Bench {
    label: Label,
    media: Vec<u8>,
    mem: Mem,
    store: Store,
    fx: Effects,
    now: u64,
    next_io: u32,
    replies: HashMap<u32, Status>,
    orders: HashMap<u64, Result<(), OrderError>>,
    notices: Vec<Notice>,
}

fn config(label: &Label) -> StoreConfig {
    StoreConfig {
        geometry: Geometry::of(&label.stores[0]).unwrap(),
        incarnation: label.incarnation,
        store: 0,
        barrier: Barrier::Flush,
        fenced: None,
        accept_lost_log: false,
        limits: Limits::default(),
        canary: None,
    }
}

impl Bench {
    fn new() -> Self {
        let label = Label::plan(ClusterId([1; 16]), NodeId([1; 16]), DriveId([1; 16]), Incarnation([9; 16]), 12_000, 1, 2048).unwrap();
        let mut media = vec![0; 12_000 * BLOCK];
        for (at, block) in format(&label).unwrap() {
            media[at.0 as usize * BLOCK..][..BLOCK].copy_from_slice(&block);
        }
        let store = Store::new(config(&label));
        let mut bench = Self {
            label,
            media,
            mem: Mem::default(),
            store,
            fx: Effects::default(),
            now: 0,
            next_io: 0,
            replies: HashMap::new(),
            orders: HashMap::new(),
            notices: Vec::new(),
        };
        bench.run();
        bench
    }

    /// The process dies and comes back; the drive keeps what it has.
    fn reopen(&mut self) {
        self.store = Store::new(config(&self.label));
        self.mem = Mem { direct: self.mem.direct, ..Mem::default() };
        self.fx.clear();
        self.notices.clear();
        self.run();
    }

    /// Turns the loop until nothing is out.
    fn run(&mut self) {
        for _ in 0..100_000 {
            self.store.settle(&mut self.mem, &mut self.fx);
            let effects = std::mem::take(&mut self.fx);
            if effects.list.is_empty() {
                return;
            }
            for effect in &effects.list {
                match effect {
                    Effect::Disk(op) => {
                        self.carry_out(op, effects.parts_of(op));
                        self.store.apply(Event::DiskDone { id: op.id, ok: true }, &mut self.mem, &mut self.fx);
                    }
                    Effect::Reply { io, status } => {
                        self.replies.insert(io.0, *status);
                    }
                    Effect::OrderDone { id, result } => {
                        self.orders.insert(id.0, result.clone());
                    }
                    Effect::Notice(notice) => self.notices.push(notice.clone()),
                }
            }
        }
        panic!("the loop does not come to rest: {:?}", self.store.view());
    }

    fn carry_out(&mut self, op: &DiskOp, parts: &[Part]) {
        let mut at = (self.label.stores[0].start.0 + op.at.0) as usize * BLOCK;
        for part in parts {
            let len = part.blocks() as usize * BLOCK;
            let memory = match *part {
                Part::Buf { buf, first, .. } => &mut self.mem.bufs.get_mut(&buf.0).unwrap()[first as usize * BLOCK..][..len],
                Part::Host { io, offset, .. } => &mut self.mem.host.get_mut(&io.0).unwrap()[offset as usize..][..len],
            };
            match op.kind {
                DiskKind::Read => memory.copy_from_slice(&self.media[at..at + len]),
                DiskKind::Write => self.media[at..at + len].copy_from_slice(memory),
                DiskKind::Flush => {}
            }
            at += len;
        }
    }

    fn tick(&mut self, ms: u64) {
        self.now += ms;
        self.store.apply(Event::Tick { now: Millis(self.now) }, &mut self.mem, &mut self.fx);
        self.run();
    }

    fn order(&mut self, order: Order) -> Result<(), OrderError> {
        let id = self.orders.len() as u64 + 1;
        self.store.apply(Event::Order { id: OrderId(id), order }, &mut self.mem, &mut self.fx);
        self.run();
        self.tick(1);
        self.orders[&id].clone()
    }

    fn create(&mut self, blocks: u64) {
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

    fn host(&mut self, op: HostOp, payload: Vec<u8>) -> (Status, Vec<u8>) {
        let io = self.next_io;
        self.next_io += 1;
        self.mem.host.insert(io, payload);
        let replica = self.store.replica_of(SEGMENT).unwrap();
        self.store.apply(Event::Host { io: IoId(io), replica, op }, &mut self.mem, &mut self.fx);
        self.run();
        (self.replies[&io], self.mem.host.remove(&io).unwrap())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Status {
        self.host(HostOp::Write(Span { offset, len: bytes.len() as u64 }), bytes.to_vec()).0
    }

    fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let (status, bytes) = self.host(HostOp::Read(Span { offset, len }), vec![0xcc; len as usize]);
        assert_eq!(status, Status::Ok);
        bytes
    }

    fn audit(&self) {
        let start = self.label.stores[0].start;
        self.store.audit(|at| self.media[(start.0 + at.0) as usize * BLOCK..][..BLOCK].try_into().unwrap()).unwrap();
    }
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 7) as u8 ^ seed).collect()
}

#[test]
fn written_blocks_read_back_from_log_from_extents_and_after_reopening() {
    for direct in [false, true] {
        let mut bench = Bench::new();
        bench.mem.direct = direct;
        bench.create(1000);
        let data = pattern(1, 3 * BLOCK);
        assert_eq!(bench.write(5 * BLOCK as u64, &data), Status::Ok);
        assert_eq!(bench.read(5 * BLOCK as u64, data.len() as u64), data);
        bench.reopen();
        assert_eq!(bench.read(5 * BLOCK as u64, data.len() as u64), data, "from the redone log");
        bench.order(Order::Drain).unwrap();
        assert_eq!(bench.store.view().undrained_extents, 0);
        assert_eq!(bench.read(5 * BLOCK as u64, data.len() as u64), data, "from the extent");
        bench.reopen();
        assert_eq!(bench.read(5 * BLOCK as u64, data.len() as u64), data, "from the extent, map loaded");
        assert_eq!(bench.read(0, BLOCK as u64), vec![0; BLOCK]);
        bench.audit();
    }
}

#[test]
fn sub_block_writes_merge_with_what_stands() {
    let mut bench = Bench::new();
    bench.create(100);
    let base = pattern(1, 2 * BLOCK);
    bench.write(0, &base);
    assert_eq!(bench.write(512, &[7; 512]), Status::Ok);
    assert_eq!(bench.write(BLOCK as u64 - 512, &[8; 1024]), Status::Ok);
    let mut expected = base;
    expected[512..1024].fill(7);
    expected[BLOCK - 512..BLOCK + 512].fill(8);
    assert_eq!(bench.read(0, 2 * BLOCK as u64), expected);
    assert_eq!(bench.read(512, 1024), expected[512..1536]);
}

#[test]
fn zeroed_span_reads_zeros_and_gives_its_extents_back() {
    let mut bench = Bench::new();
    bench.create(1000);
    bench.write(0, &pattern(3, 64 * BLOCK));
    bench.order(Order::Drain).unwrap();
    let free = bench.store.view().extents_free;
    let (status, _) = bench.host(HostOp::Zero(Span { offset: 512, len: 48 * BLOCK as u64 }), Vec::new());
    assert_eq!(status, Status::Ok);
    let bytes = bench.read(0, 64 * BLOCK as u64);
    let mut expected = pattern(3, 64 * BLOCK);
    expected[512..512 + 48 * BLOCK].fill(0);
    assert_eq!(bytes, expected);
    bench.order(Order::Drain).unwrap();
    bench.run();
    assert_eq!(bench.read(0, 64 * BLOCK as u64), expected);
    assert!(bench.store.view().extents_free >= free + 2, "{} then {}", free, bench.store.view().extents_free);
    bench.audit();
}

#[test]
fn compare_and_write_tells_where_it_differs_and_writes_only_what_was_expected() {
    let mut bench = Bench::new();
    bench.create(100);
    bench.write(0, &pattern(1, BLOCK));
    let span = Span { offset: 0, len: 512 };
    let mut payload = pattern(1, BLOCK)[..512].to_vec();
    payload[100] ^= 1;
    payload.extend([9; 512]);
    assert_eq!(bench.host(HostOp::CompareWrite(span), payload.clone()).0, Status::Miscompare { at: 100 });
    payload[100] ^= 1;
    assert_eq!(bench.host(HostOp::CompareWrite(span), payload).0, Status::Ok);
    assert_eq!(bench.read(0, 512), [9; 512]);
}

#[test]
fn spans_outside_the_volume_are_refused() {
    let mut bench = Bench::new();
    bench.create(10);
    assert_eq!(bench.write(10 * BLOCK as u64, &[0; 512]), Status::OutOfRange);
    assert_eq!(bench.write(u64::MAX - 511, &[0; 512]), Status::OutOfRange);
    assert_eq!(bench.write(100, &[0; 512]), Status::Invalid);
    assert_eq!(bench.host(HostOp::Read(Span { offset: 0, len: 0 }), Vec::new()).0, Status::Invalid);
}

#[test]
fn volume_written_many_times_over_the_log_keeps_the_newest_and_its_books() {
    let mut bench = Bench::new();
    bench.create(600);
    for round in 0..60u8 {
        for at in 0..10u64 {
            assert_eq!(bench.write(at * 60 * BLOCK as u64, &pattern(round ^ at as u8, 40 * BLOCK)), Status::Ok);
            bench.tick(1);
        }
    }
    for at in 0..10u64 {
        assert_eq!(bench.read(at * 60 * BLOCK as u64, 40 * BLOCK as u64), pattern(59 ^ at as u8, 40 * BLOCK));
    }
    assert!(bench.store.view().counters.checkpoints > 3);
    bench.order(Order::Drain).unwrap();
    bench.audit();
    bench.reopen();
    for at in 0..10u64 {
        assert_eq!(bench.read(at * 60 * BLOCK as u64, 40 * BLOCK as u64), pattern(59 ^ at as u8, 40 * BLOCK));
    }
    bench.audit();
}

#[test]
fn full_store_refuses_new_extents_overwrites_go_on_and_deletes_make_room() {
    let mut bench = Bench::new();
    bench.create(100_000);
    let mut written = 0;
    let full = loop {
        match bench.write(written * 16 * BLOCK as u64, &pattern(written as u8, 16 * BLOCK)) {
            Status::Ok => written += 1,
            status => break status,
        }
        bench.tick(1);
    };
    assert_eq!(full, Status::NoSpace);
    assert!(written > 400, "{written} extents fit");
    assert_eq!(bench.write(0, &pattern(77, BLOCK)), Status::Ok, "an overwrite needs no space");
    assert_eq!(bench.read(0, BLOCK as u64), pattern(77, BLOCK));
    bench.order(Order::Delete { segment: SEGMENT }).unwrap();
    bench.tick(1000);
    for _ in 0..100 {
        bench.tick(10);
    }
    bench.create(100_000);
    assert_eq!(bench.write(0, &pattern(1, 16 * BLOCK)), Status::Ok);
    assert_eq!(bench.read(BLOCK as u64 * 16, BLOCK as u64), vec![0; BLOCK], "nothing of the deleted volume shows");
    bench.order(Order::Drain).unwrap();
    bench.audit();
}

#[test]
fn shrunk_and_grown_volume_reads_zeros_where_it_was_cut() {
    let mut bench = Bench::new();
    bench.create(200);
    bench.write(0, &pattern(5, 200 * BLOCK));
    bench.order(Order::Drain).unwrap();
    bench.order(Order::Resize { segment: SEGMENT, blocks: 50 }).unwrap();
    assert_eq!(bench.write(50 * BLOCK as u64, &[0; 512]), Status::OutOfRange);
    bench.order(Order::Resize { segment: SEGMENT, blocks: 300 }).unwrap();
    let bytes = bench.read(0, 250 * BLOCK as u64);
    assert_eq!(bytes[..50 * BLOCK], pattern(5, 200 * BLOCK)[..50 * BLOCK]);
    assert!(bytes[50 * BLOCK..].iter().all(|byte| *byte == 0));
    bench.reopen();
    assert!(bench.read(50 * BLOCK as u64, 100 * BLOCK as u64).iter().all(|byte| *byte == 0));
}

#[test]
fn rotten_extent_is_an_error_and_scrub_finds_it() {
    let mut bench = Bench::new();
    bench.create(200);
    bench.write(0, &pattern(5, 20 * BLOCK));
    bench.order(Order::Drain).unwrap();
    let (_, _, place, _) = bench.store.data_blocks()[3];
    let at = (bench.label.stores[0].start.0 + place.0) as usize * BLOCK + 77;
    bench.media[at] ^= 1;
    let (status, _) = bench.host(HostOp::Read(Span { offset: 3 * BLOCK as u64, len: BLOCK as u64 }), vec![0; BLOCK]);
    assert_eq!(status, Status::Unrecovered);
    assert_eq!(bench.read(4 * BLOCK as u64, BLOCK as u64), pattern(5, 20 * BLOCK)[4 * BLOCK..5 * BLOCK]);
    bench.order(Order::ScrubStart).unwrap();
    for _ in 0..10 {
        bench.tick(10);
    }
    assert!(bench.notices.contains(&Notice::ScrubDone { blocks: 20, corrupt: 1 }), "{:?}", bench.notices);
}

#[test]
fn stopped_store_has_nothing_left_to_redo() {
    let mut bench = Bench::new();
    bench.create(200);
    bench.write(0, &pattern(5, 20 * BLOCK));
    bench.order(Order::Stop).unwrap();
    assert_eq!(bench.store.view().stage, Stage::Stopped);
    bench.reopen();
    assert_eq!(bench.store.view().recovery.entries, 0);
    assert_eq!(bench.read(0, BLOCK as u64), pattern(5, BLOCK));
}
