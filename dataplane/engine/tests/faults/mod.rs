//! Bugs that the simulator found, each said as the few steps that show it: failed flushes, failed reads, fences, power cuts.
//!
//! Not here: chance. Seeds are the simulator's.

use crate::bench::{Bench, SEGMENT, config, pattern};
use penstock_engine::*;
use penstock_wire::BLOCK;
use std::collections::{BTreeMap, BTreeSet};

/// A bench whose drive has a volatile cache, and fails when told to.
struct Faulty {
    bench: Bench,
    /// What a power cut leaves.
    durable: Vec<u8>,
    /// Blocks that were written since the last flush.
    cached: BTreeSet<u64>,
    /// The next flush fails, and forgets what it should have saved.
    flush_fails: bool,
    /// Reads of these blocks of the store fail so many times more.
    unreadable: BTreeMap<u64, u32>,
    /// So many reads fail next, whatever they read.
    reads_fail: u32,
    /// Commands that the drive keeps to itself.
    holds: Option<DiskKind>,
}

impl Faulty {
    fn new() -> Self {
        let mut bench = Bench::new();
        bench.create(200);
        bench.tick(20);
        let durable = bench.media.clone();
        Self { bench, durable, cached: BTreeSet::new(), flush_fails: false, unreadable: BTreeMap::new(), reads_fail: 0, holds: None }
    }

    fn keep(&mut self, blocks: impl IntoIterator<Item = u64>) {
        for block in blocks {
            let at = block as usize * BLOCK;
            self.durable[at..at + BLOCK].copy_from_slice(&self.bench.media[at..at + BLOCK]);
        }
    }

    /// Turns the loop until nothing is out, or what is out is held. Returns the blocks of the drive that were written last.
    fn run(&mut self) -> std::ops::Range<u64> {
        let mut last = 0..0;
        for _ in 0..10_000 {
            let b = &mut self.bench;
            b.store.settle(&mut b.mem, &mut b.fx);
            let effects = std::mem::take(&mut b.fx);
            if effects.list.is_empty() {
                return last;
            }
            for effect in &effects.list {
                match effect {
                    Effect::Disk(op) if self.holds == Some(op.kind) => {}
                    Effect::Disk(op) => {
                        let mut ok = true;
                        let start = self.bench.label.stores[0].start.0 + op.at.0;
                        if op.kind == DiskKind::Read {
                            ok = self.reads_fail == 0;
                            self.reads_fail = self.reads_fail.saturating_sub(1);
                            for (_, times) in self.unreadable.range_mut(op.at.0..op.at.0 + u64::from(op.blocks)) {
                                ok &= *times == 0;
                                *times = times.saturating_sub(1);
                            }
                        }
                        if ok {
                            self.bench.carry_out(op, effects.parts_of(op));
                        }
                        match op.kind {
                            DiskKind::Read => {}
                            DiskKind::Write => {
                                last = start..start + u64::from(op.blocks);
                                self.cached.extend(last.clone());
                            }
                            DiskKind::Flush => {
                                ok = !std::mem::take(&mut self.flush_fails);
                                let cached = std::mem::take(&mut self.cached);
                                if ok {
                                    self.keep(cached);
                                }
                            }
                        }
                        let b = &mut self.bench;
                        b.store.apply(Event::DiskDone { id: op.id, ok }, &mut b.mem, &mut b.fx);
                    }
                    Effect::Reply { io, status } => {
                        self.bench.replies.insert(io.0, *status);
                    }
                    Effect::OrderDone { id, result } => {
                        self.bench.orders.insert(id.0, result.clone());
                    }
                    Effect::Notice(notice) => self.bench.notices.push(notice.clone()),
                    Effect::Send { .. } => unreachable!("no volume here has several replicas"),
                }
            }
        }
        panic!("the loop does not come to rest: {:?}", self.bench.store.view());
    }

    fn host(&mut self, op: HostOp, payload: Vec<u8>) -> (Option<Status>, Vec<u8>) {
        let io = self.bench.begin(op, payload);
        self.run();
        let status = self.bench.replies.get(&io).copied();
        (status, self.bench.mem.host.get(&io).cloned().unwrap_or_default())
    }

    fn write(&mut self, block: u64, bytes: Vec<u8>) -> Option<Status> {
        self.host(HostOp::Write(Span { offset: block * BLOCK as u64, len: bytes.len() as u64 }), bytes).0
    }

    fn read(&mut self, block: u64) -> (Option<Status>, Vec<u8>) {
        self.host(HostOp::Read(Span { offset: block * BLOCK as u64, len: BLOCK as u64 }), vec![0xcc; BLOCK])
    }

    /// The process dies and the next opens the store.
    fn reopen(&mut self, fenced: Option<FenceReason>) -> std::ops::Range<u64> {
        let b = &mut self.bench;
        b.store = Store::new(StoreConfig { fenced, ..config(&b.label) });
        b.fx.clear();
        b.notices.clear();
        self.run()
    }

    fn power_cut(&mut self) {
        self.bench.media.clone_from(&self.durable);
        self.cached.clear();
    }

    /// Block 0 is acknowledged as `old`, then written as `new`, whose flush fails.
    fn fence(&mut self, old: u8, new: u8) {
        assert_eq!(self.write(0, pattern(old, BLOCK)), Some(Status::Ok));
        self.bench.pass(20);
        self.run();
        self.flush_fails = true;
        assert_eq!(self.write(0, pattern(new, BLOCK)), Some(Status::Fenced));
    }
}

#[test]
fn batch_that_recovery_dropped_stays_dropped_where_the_log_begins_at_its_place() {
    let mut bench = Bench::new();
    bench.create(200);
    bench.write(0, &pattern(1, BLOCK));
    bench.tick(20);
    let before = bench.media.clone();
    bench.late = 5;
    let zeros = Span { offset: 8 * BLOCK as u64, len: BLOCK as u64 };
    bench.begin(HostOp::Zero(zeros), Vec::new());
    bench.turns(2);
    let written: Vec<usize> = (0..before.len()).step_by(BLOCK).filter(|at| bench.media[*at..][..BLOCK] != before[*at..][..BLOCK]).collect();
    bench.begin(HostOp::Write(Span { offset: 0, len: BLOCK as u64 }), pattern(2, BLOCK));
    bench.turns(2);
    // The power goes before the barrier. Of the two batches the second stays, behind as many blocks as the next opening's record takes.
    assert_eq!(written.len(), 1);
    bench.media[written[0]..][..BLOCK].copy_from_slice(&before[written[0]..][..BLOCK]);
    bench.late = 0;
    bench.reopen();
    assert_eq!(bench.store.view().recovery.dropped_batches, 2, "the one that is missing and the one behind it");
    assert_eq!(bench.read(0, BLOCK as u64), pattern(1, BLOCK));
    bench.order(Order::Drain).unwrap();
    bench.reopen();
    assert_eq!(bench.store.view().recovery.batches, 0);
    assert_eq!(bench.read(0, BLOCK as u64), pattern(1, BLOCK));
    bench.order(Order::Drain).unwrap();
    bench.audit();
}

#[test]
fn what_a_failed_flush_forgot_and_the_next_life_showed_outlives_a_power_cut() {
    let mut faulty = Faulty::new();
    faulty.fence(1, 2);
    faulty.reopen(None);
    assert_eq!(faulty.bench.store.view().recovery.rewritten_batches, 1);
    assert_eq!(faulty.read(0), (Some(Status::Ok), pattern(2, BLOCK)), "still readable");
    assert_eq!(faulty.write(1, pattern(3, BLOCK)), Some(Status::Ok));
    faulty.power_cut();
    faulty.reopen(None);
    assert_eq!(faulty.read(0), (Some(Status::Ok), pattern(2, BLOCK)));
    assert_eq!(faulty.read(1), (Some(Status::Ok), pattern(3, BLOCK)));
}

#[test]
fn fenced_store_shows_no_block_that_nothing_proves_durable() {
    let mut faulty = Faulty::new();
    assert_eq!(faulty.write(1, pattern(9, BLOCK)), Some(Status::Ok));
    faulty.fence(1, 2);
    faulty.reopen(Some(FenceReason::FlushFailed));
    assert_eq!(faulty.read(0).0, Some(Status::Unrecovered));
    assert_eq!(faulty.read(1), (Some(Status::Ok), pattern(9, BLOCK)));
    faulty.power_cut();
    faulty.reopen(None);
    assert_eq!(faulty.read(0), (Some(Status::Ok), pattern(1, BLOCK)));
}

#[test]
fn open_batch_kept_by_a_power_cut_that_takes_the_tail_makes_no_corruption_of_it() {
    let mut faulty = Faulty::new();
    assert_eq!(faulty.write(0, pattern(1, BLOCK)), Some(Status::Ok));
    faulty.bench.pass(20);
    faulty.run();
    // Written, and the process dies before its flush: in the cache alone.
    faulty.holds = Some(DiskKind::Flush);
    assert_eq!(faulty.write(0, pattern(2, BLOCK)), None);
    // The next life writes its Open batch, and the power goes under that one's flush: of all that is cached, it alone stays.
    let open = faulty.reopen(None);
    assert!(!open.is_empty());
    faulty.keep(open);
    faulty.holds = None;
    faulty.power_cut();
    faulty.reopen(None);
    assert_eq!(faulty.bench.store.view().recovery.lost_blocks, 0);
    assert_eq!(faulty.read(0), (Some(Status::Ok), pattern(1, BLOCK)));
}

#[test]
fn newest_batch_with_a_block_that_cannot_be_read_at_first_is_no_tear() {
    let mut faulty = Faulty::new();
    assert_eq!(faulty.write(0, pattern(4, 3 * BLOCK)), Some(Status::Ok));
    let (_, _, place, _) = faulty.bench.store.data_blocks()[1];
    // Once with its neighbours, then twice by itself.
    faulty.unreadable.insert(place.0, 3);
    faulty.reopen(None);
    assert_eq!(faulty.bench.store.view().recovery.dropped_batches, 0);
    assert_eq!(faulty.read(1).1, pattern(4, 3 * BLOCK)[BLOCK..2 * BLOCK]);
}

#[test]
fn map_page_that_cannot_be_read_at_first_is_not_lost() {
    let mut faulty = Faulty::new();
    assert_eq!(faulty.write(0, pattern(4, BLOCK)), Some(Status::Ok));
    faulty.bench.order(Order::Drain).unwrap();
    faulty.reopen(None);
    // The first read of a life that finds nothing in the log is of the page.
    faulty.reads_fail = 1;
    assert_eq!(faulty.read(0), (Some(Status::Ok), pattern(4, BLOCK)));
    faulty.reopen(None);
    faulty.reads_fail = 2;
    assert_eq!(faulty.read(0).0, Some(Status::Unrecovered), "twice is lost");
}

#[test]
fn drain_of_a_block_that_cannot_be_read_loses_no_neighbour() {
    let mut faulty = Faulty::new();
    assert_eq!(faulty.write(0, pattern(4, 3 * BLOCK)), Some(Status::Ok));
    let (_, _, place, _) = faulty.bench.store.data_blocks()[1];
    faulty.unreadable.insert(place.0, u32::MAX);
    let b = &mut faulty.bench;
    b.store.apply(Event::Order { id: OrderId(77), order: Order::Drain }, &mut b.mem, &mut b.fx);
    faulty.run();
    assert_eq!(faulty.bench.orders.get(&77), Some(&Ok(())));
    assert_eq!(faulty.read(0).1, pattern(4, 3 * BLOCK)[..BLOCK]);
    assert_eq!(faulty.read(1).0, Some(Status::Unrecovered));
    assert_eq!(faulty.read(2).1, pattern(4, 3 * BLOCK)[2 * BLOCK..]);
}

#[test]
fn order_whose_batch_is_out_when_the_store_is_fenced_is_answered_once() {
    let mut bench = Bench::new();
    bench.create(200);
    let answers = |bench: &Bench| bench.fx.list.iter().filter(|effect| matches!(effect, Effect::OrderDone { id: OrderId(77), .. })).count();
    let order = Order::Resize { segment: SEGMENT, blocks: 300 };
    bench.store.apply(Event::Order { id: OrderId(77), order }, &mut bench.mem, &mut bench.fx);
    bench.store.settle(&mut bench.mem, &mut bench.fx);
    let out = bench.fx.list.iter().find_map(|effect| if let Effect::Disk(op) = effect { Some(*op) } else { None });
    let out = out.expect("its batch goes out");
    bench.fx.clear();
    bench.store.apply(Event::Fence(FenceReason::Drive), &mut bench.mem, &mut bench.fx);
    bench.store.apply(Event::DiskDone { id: out.id, ok: true }, &mut bench.mem, &mut bench.fx);
    assert_eq!(answers(&bench), 1);
}
