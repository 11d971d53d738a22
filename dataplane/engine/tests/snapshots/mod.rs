//! Snapshots over a well-behaved drive: what they hold, what they cost, and what comes back.

use crate::bench::{Bench, SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::layer::SnapshotShape;
use penstock_wire::*;

const B: u64 = BLOCK as u64;

fn shape(no: u8) -> SnapshotShape {
    SnapshotShape { id: SnapshotId([no; 16]), name: format!("s{no}") }
}

impl Bench {
    fn snapshot(&mut self, no: u8) -> LayerNo {
        self.order(Order::Snapshot { segment: SEGMENT, snapshot: Box::new(shape(no)) }).unwrap();
        self.layer(no).expect("it was taken")
    }

    fn unsnapshot(&mut self, no: u8) {
        self.order(Order::Unsnapshot { segment: SEGMENT, snapshot: shape(no).id }).unwrap();
        assert_eq!(self.layer(no), None);
    }

    fn layer(&self, no: u8) -> Option<LayerNo> {
        let snapshots = self.store.snapshots(self.store.replica_of(SEGMENT).unwrap());
        snapshots.iter().find(|view| view.snapshot == shape(no)).map(|view| view.layer)
    }

    fn read_snapshot(&mut self, no: u8, offset: u64, len: u64) -> Vec<u8> {
        let layer = self.layer(no).expect("it stands");
        let (status, bytes) = self.host(HostOp::ReadSnapshot(layer, Span { offset, len }), vec![0xcc; len as usize]);
        assert_eq!(status, Status::Ok);
        bytes
    }

    fn zero(&mut self, offset: u64, len: u64) {
        assert_eq!(self.host(HostOp::Zero(Span { offset, len }), Vec::new()).0, Status::Ok);
    }
}

#[test]
fn snapshot_keeps_what_was_written_before_it_in_the_log_in_extents_and_after_reopening() {
    for drained_first in [false, true] {
        let mut bench = Bench::new();
        bench.create(1000);
        bench.write(0, &pattern(1, 20 * BLOCK));
        if drained_first {
            bench.order(Order::Drain).unwrap();
        }
        bench.snapshot(1);
        bench.write(5 * B, &pattern(2, 2 * BLOCK));
        bench.write(900 * B, &pattern(3, BLOCK));
        let mut live = pattern(1, 20 * BLOCK);
        live[5 * BLOCK..7 * BLOCK].copy_from_slice(&pattern(2, 2 * BLOCK));
        let judge = |bench: &mut Bench| {
            assert_eq!(bench.read_snapshot(1, 0, 20 * B), pattern(1, 20 * BLOCK));
            assert_eq!(bench.read_snapshot(1, 900 * B, B), vec![0; BLOCK]);
            assert_eq!(bench.read(0, 20 * B), live);
            assert_eq!(bench.read(900 * B, B), pattern(3, BLOCK));
        };
        judge(&mut bench);
        bench.reopen();
        judge(&mut bench);
        bench.order(Order::Drain).unwrap();
        judge(&mut bench);
        bench.audit();
        bench.reopen();
        judge(&mut bench);
        bench.audit();
    }
}

#[test]
fn discard_over_a_snapshot_reads_zeros_and_leaves_the_snapshot_its_blocks() {
    let mut bench = Bench::new();
    bench.create(1000);
    bench.write(0, &pattern(1, 64 * BLOCK));
    bench.snapshot(1);
    bench.zero(8 * B, 40 * B);
    for round in 0..3 {
        let mut live = pattern(1, 64 * BLOCK);
        live[8 * BLOCK..48 * BLOCK].fill(0);
        assert_eq!(bench.read(0, 64 * B), live, "round {round}");
        assert_eq!(bench.read_snapshot(1, 0, 64 * B), pattern(1, 64 * BLOCK), "round {round}");
        match round {
            0 => bench.order(Order::Drain).unwrap(),
            _ => bench.reopen(),
        }
        bench.audit();
    }
    // What reads as zeros already takes no more of the map.
    bench.read(8 * B, B);
    let pages = bench.store.view().counters.checkpoint_pages;
    bench.zero(8 * B, 40 * B);
    bench.order(Order::Drain).unwrap();
    assert_eq!(bench.store.view().counters.checkpoint_pages, pages);
}

#[test]
fn shrink_over_a_snapshot_keeps_it_and_what_grows_back_is_zeros() {
    let mut bench = Bench::new();
    bench.create(1000);
    bench.write(600 * B, &pattern(1, 30 * BLOCK));
    bench.snapshot(1);
    for blocks in [610, 1000] {
        bench.order(Order::Resize { segment: SEGMENT, blocks }).unwrap();
    }
    bench.snapshot(2);
    for _ in 0..2 {
        assert_eq!(bench.read_snapshot(1, 600 * B, 30 * B), pattern(1, 30 * BLOCK));
        let mut live = pattern(1, 30 * BLOCK);
        live[10 * BLOCK..].fill(0);
        assert_eq!(bench.read(600 * B, 30 * B), live);
        assert_eq!(bench.read_snapshot(2, 600 * B, 30 * B), live);
        bench.order(Order::Drain).unwrap();
        bench.audit();
        bench.reopen();
    }
    let layer = bench.layer(1).unwrap();
    let beyond = HostOp::ReadSnapshot(layer, Span { offset: 1000 * B, len: B });
    assert_eq!(bench.host(beyond, vec![0; BLOCK]).0, Status::OutOfRange);
}

#[test]
fn snapshot_costs_no_extent_before_something_is_written_over_it() {
    let mut bench = Bench::new();
    bench.create(5000);
    bench.write(0, &pattern(1, 200 * BLOCK));
    bench.order(Order::Drain).unwrap();
    let usage = |bench: &Bench| bench.store.usage(bench.store.replica_of(SEGMENT).unwrap());
    let before = usage(&bench).allocated_extents;
    for no in 1..=9 {
        bench.snapshot(no);
    }
    bench.order(Order::Drain).unwrap();
    assert_eq!(usage(&bench).allocated_extents, before);
    assert_eq!(usage(&bench).snapshot_extents, before);
    bench.write(3 * B, &pattern(2, BLOCK));
    bench.order(Order::Drain).unwrap();
    assert_eq!(usage(&bench).allocated_extents, before + 1);
    for no in 1..=9 {
        assert_eq!(bench.read_snapshot(no, 0, 200 * B), pattern(1, 200 * BLOCK));
    }
}

#[test]
fn snapshot_ordered_again_is_the_same_and_another_of_its_id_is_refused() {
    let mut bench = Bench::new();
    bench.create(100);
    let layer = bench.snapshot(1);
    bench.write(0, &pattern(1, BLOCK));
    assert_eq!(bench.snapshot(1), layer);
    assert_eq!(bench.read_snapshot(1, 0, B), vec![0; BLOCK]);
    let other = SnapshotShape { name: "another".into(), ..shape(1) };
    let refused = bench.order(Order::Snapshot { segment: SEGMENT, snapshot: Box::new(other) });
    assert_eq!(refused, Err(OrderError::OtherSnapshot("s1".into())));
    let refused = bench.order(Order::Snapshot { segment: SegmentId([77; 16]), snapshot: Box::new(shape(1)) });
    assert_eq!(refused, Err(OrderError::NoSuchSegment));
    let gone = HostOp::ReadSnapshot(LayerNo(5), Span { offset: 0, len: B });
    assert_eq!(bench.host(gone, vec![0; BLOCK]).0, Status::NotReady);
}

#[test]
fn writes_sent_with_the_marker_are_on_one_side_of_it_and_none_lacks_space() {
    let mut bench = Bench::new();
    bench.create(2000);
    for at in 0..30u64 {
        bench.write(at * 16 * B, &pattern(1, BLOCK));
    }
    bench.order(Order::Drain).unwrap();
    // All of these have their extents, until the marker takes them away.
    let before: Vec<u32> = (0..10).map(|at| bench.begin(HostOp::Write(Span { offset: at * 16 * B, len: B }), pattern(2, BLOCK))).collect();
    let order = Order::Snapshot { segment: SEGMENT, snapshot: Box::new(shape(1)) };
    bench.store.apply(Event::Order { id: OrderId(99), order }, &mut bench.mem, &mut bench.fx);
    bench.turns(1);
    let after: Vec<u32> = (10..20).map(|at| bench.begin(HostOp::Write(Span { offset: at * 16 * B, len: B }), pattern(3, BLOCK))).collect();
    bench.run();
    assert!(before.iter().chain(&after).all(|io| bench.replies[io] == Status::Ok));
    assert_eq!(bench.orders[&99], Ok(()));
    for _ in 0..2 {
        for at in 0..30 {
            let (old, new) = (pattern(1, BLOCK), if at < 10 { pattern(2, BLOCK) } else { pattern(3, BLOCK) });
            let live = if at < 20 { new.clone() } else { old.clone() };
            assert_eq!(bench.read(at * 16 * B, B), live, "block {at}");
            let kept = bench.read_snapshot(1, at * 16 * B, B);
            assert!(kept == old || at < 10 && kept == new, "block {at}");
        }
        bench.order(Order::Drain).unwrap();
        bench.audit();
        bench.reopen();
    }
}

#[test]
fn discard_of_a_whole_volume_over_a_snapshot_is_refused_where_the_map_has_no_space_for_it() {
    let mut bench = Bench::new();
    bench.create(1_000_000);
    // An extent a page, until nothing fits.
    let mut pages = 0;
    while bench.write(pages * 768 * B, &pattern(1, BLOCK)) == Status::Ok {
        pages += 1;
    }
    bench.snapshot(1);
    let all = Span { offset: 0, len: 1_000_000 * B };
    assert_eq!(bench.host(HostOp::Zero(all), Vec::new()).0, Status::NoSpace);
    for page in 0..pages {
        assert_eq!(bench.read_snapshot(1, page * 768 * B, B), pattern(1, BLOCK));
    }
    bench.order(Order::Drain).unwrap();
    bench.audit();
}

#[test]
fn write_that_finds_no_space_is_refused_while_snapshots_come_and_go() {
    let mut bench = Bench::new();
    bench.create(100_000);
    let mut written = 0;
    while bench.write(written * 16 * B, &pattern(written as u8, 16 * BLOCK)) == Status::Ok {
        written += 1;
    }
    let write = bench.begin(HostOp::Write(Span { offset: written * 16 * B, len: B }), pattern(1, BLOCK));
    for turn in 0..20_000u64 {
        if bench.replies.contains_key(&write) {
            break;
        }
        if turn.is_multiple_of(2) {
            let snapshot = Box::new(shape(1));
            let order = if turn.is_multiple_of(4) {
                Order::Snapshot { segment: SEGMENT, snapshot }
            } else {
                Order::Unsnapshot { segment: SEGMENT, snapshot: snapshot.id }
            };
            bench.store.apply(Event::Order { id: OrderId(1000 + turn), order }, &mut bench.mem, &mut bench.fx);
        }
        bench.turns(1);
    }
    assert_eq!(bench.replies.get(&write), Some(&Status::NoSpace));
}

#[test]
fn removed_snapshot_is_merged_under_writes_that_never_rest() {
    let mut bench = Bench::new();
    bench.create(100_000);
    for extent in 0..64 {
        bench.write(extent * 16 * B, &pattern(extent as u8, 16 * BLOCK));
    }
    bench.snapshot(1);
    let write_on = |bench: &mut Bench, turn: u64| {
        let at = turn * 7 % 64 * 16 * B;
        bench.begin(HostOp::Write(Span { offset: at, len: 16 * B }), pattern(turn as u8, 16 * BLOCK));
        bench.turns(2);
    };
    (0..200).for_each(|turn| write_on(&mut bench, turn));
    assert!(bench.layer(1).is_some());
    let order = Order::Unsnapshot { segment: SEGMENT, snapshot: shape(1).id };
    bench.store.apply(Event::Order { id: OrderId(1000), order }, &mut bench.mem, &mut bench.fx);
    let held = |bench: &Bench| bench.store.usage(ReplicaNo(0)).snapshot_extents;
    let merged = (0..4000).find(|turn| {
        write_on(&mut bench, *turn);
        held(&bench) == 0
    });
    assert!(merged.is_some(), "writes that never rest keep what a removed snapshot holds, {} extents", held(&bench));
    bench.run();
    bench.audit();
}

#[test]
fn write_that_finds_no_space_gets_what_a_removed_snapshot_held_while_snapshots_come_and_go() {
    let mut bench = Bench::new();
    bench.create(1_000_000);
    // What the snapshot holds lies on many pages. The last of them alone give something back: what was written anew over them.
    for (round, anew) in [0..250, 240..250].into_iter().enumerate() {
        for at in anew {
            assert_eq!(bench.write(at * 48 * 16 * B, &pattern(round as u8, 16 * BLOCK)), Status::Ok);
        }
        if round == 0 {
            bench.snapshot(1);
        }
    }
    let mut filled = 0;
    while bench.write((filled * 48 + 1) * 16 * B, &pattern(filled as u8, 16 * BLOCK)) == Status::Ok {
        filled += 1;
    }
    let unsnapshot = |no: u8| Order::Unsnapshot { segment: SEGMENT, snapshot: shape(no).id };
    bench.store.apply(Event::Order { id: OrderId(1000), order: unsnapshot(1) }, &mut bench.mem, &mut bench.fx);
    let write = bench.begin(HostOp::Write(Span { offset: (filled * 48 + 1) * 16 * B, len: B }), pattern(1, BLOCK));
    for turn in 0..20_000u64 {
        if bench.replies.contains_key(&write) {
            break;
        }
        let snapshot = Box::new(shape(2));
        let order = if turn.is_multiple_of(2) { Order::Snapshot { segment: SEGMENT, snapshot } } else { unsnapshot(2) };
        bench.store.apply(Event::Order { id: OrderId(1001 + turn), order }, &mut bench.mem, &mut bench.fx);
        bench.turns(1);
    }
    assert_eq!(bench.replies.get(&write), Some(&Status::Ok), "{:?}", bench.store.view());
    bench.run();
    bench.audit();
}

#[test]
fn scrub_reads_what_snapshots_hold() {
    let mut bench = Bench::new();
    bench.create(1000);
    bench.write(0, &pattern(1, 20 * BLOCK));
    bench.snapshot(1);
    bench.write(0, &pattern(2, 20 * BLOCK));
    bench.order(Order::Drain).unwrap();
    bench.order(Order::ScrubStart).unwrap();
    for _ in 0..50 {
        bench.tick(10);
    }
    assert!(bench.notices.contains(&Notice::ScrubDone { blocks: 40, corrupt: 0 }), "{:?}", bench.notices);
}

/// Three snapshots with writes and discards between them; what each holds, and what is live.
fn stacked(bench: &mut Bench) -> Vec<Vec<u8>> {
    bench.create(2000);
    let mut now = vec![0; 200 * BLOCK];
    let mut held = Vec::new();
    for no in 1..=4u8 {
        // A base of all, then single blocks, runs, and zeros, so that extents meet in every way.
        let writes: &[(usize, usize)] = match no {
            1 => &[(0, 180)],
            2 => &[(3, 1), (16, 16), (40, 9), (190, 4)],
            3 => &[(4, 1), (44, 2), (100, 30)],
            _ => &[(5, 1), (16, 3), (41, 14), (191, 1)],
        };
        for (at, count) in writes {
            let bytes = pattern(no * 16 + *at as u8, count * BLOCK);
            bench.write(*at as u64 * B, &bytes);
            now[at * BLOCK..(at + count) * BLOCK].copy_from_slice(&bytes);
        }
        if no > 1 {
            let at = 60 + usize::from(no) * 5;
            bench.zero(at as u64 * B, 20 * B);
            now[at * BLOCK..(at + 20) * BLOCK].fill(0);
        }
        if no < 4 {
            bench.snapshot(no);
        }
        held.push(now.clone());
    }
    held
}

#[test]
fn removed_snapshots_leave_the_others_what_they_hold_in_any_order_and_give_all_back() {
    for order in [[1, 2, 3], [3, 2, 1], [2, 1, 3], [2, 3, 1], [1, 3, 2], [3, 1, 2]] {
        for drained_first in [false, true] {
            let mut bench = Bench::new();
            let held = stacked(&mut bench);
            if drained_first {
                bench.order(Order::Drain).unwrap();
            }
            for (at, no) in order.into_iter().enumerate() {
                bench.unsnapshot(no);
                for round in 0..3 {
                    let when = format!("{order:?}, {no} gone, round {round}");
                    assert_eq!(bench.read(0, 200 * B), held[3], "{when}");
                    for kept in &order[at + 1..] {
                        assert_eq!(bench.read_snapshot(*kept, 0, 200 * B), held[usize::from(*kept) - 1], "{when}, of {kept}");
                    }
                    match round {
                        0 => bench.order(Order::Drain).unwrap(),
                        _ => bench.reopen(),
                    }
                    bench.audit();
                }
            }
            bench.order(Order::Drain).unwrap();
            let usage = bench.store.usage(bench.store.replica_of(SEGMENT).unwrap());
            assert_eq!(usage.snapshot_extents, 0, "{order:?}");
            assert!(usage.allocated_extents <= 13, "{order:?}: {usage:?}");
        }
    }
}

#[test]
fn merge_that_a_crash_undid_leaves_nothing_bad_for_the_merge_of_the_layer_beneath() {
    let mut undone = 0;
    for turns in 0..24 {
        let mut bench = Bench::new();
        bench.create(100);
        bench.write(0, &pattern(1, 16 * BLOCK));
        bench.snapshot(1);
        bench.write(0, &pattern(2, 4 * BLOCK));
        bench.snapshot(2);
        bench.write(0, &pattern(3, BLOCK));
        bench.order(Order::Drain).unwrap();
        let covered = bench.media.chunks(BLOCK).rposition(|block| *block == pattern(2, BLOCK)).expect("it is in an extent");
        bench.unsnapshot(2);
        // The live layer's block covers one of four: it goes to where they lie, and the drive dies before or after the map says so.
        let order = |bench: &mut Bench, id: u64, order: Order| {
            bench.store.apply(Event::Order { id: OrderId(id), order }, &mut bench.mem, &mut bench.fx);
        };
        order(&mut bench, 99, Order::Drain);
        bench.turns(turns);
        undone += u32::from(bench.media[covered * BLOCK..][..BLOCK] != pattern(2, BLOCK) && !bench.orders.contains_key(&99));
        order(&mut bench, 98, Order::Unsnapshot { segment: SEGMENT, snapshot: shape(1).id });
        while !bench.orders.contains_key(&98) {
            assert!(!bench.turns(1), "the order is not done");
        }
        bench.orders.clear();
        for _ in 0..2 {
            bench.reopen();
            bench.order(Order::Drain).unwrap();
            bench.audit();
            let mut live = pattern(1, 16 * BLOCK);
            live[..4 * BLOCK].copy_from_slice(&pattern(2, 4 * BLOCK));
            live[..BLOCK].copy_from_slice(&pattern(3, BLOCK));
            assert_eq!(bench.read(0, 16 * B), live, "after {turns} turns");
            assert_eq!(bench.store.view().counters.corrupt_blocks, 0, "after {turns} turns");
        }
        let usage = bench.store.usage(bench.store.replica_of(SEGMENT).unwrap());
        assert_eq!((usage.allocated_extents, usage.snapshot_extents), (1, 0), "after {turns} turns");
    }
    assert!(undone > 0);
}

#[test]
fn removal_is_idempotent_and_a_removed_snapshot_is_not_read() {
    let mut bench = Bench::new();
    bench.create(100);
    bench.write(0, &pattern(1, BLOCK));
    let layer = bench.snapshot(1);
    bench.unsnapshot(1);
    bench.unsnapshot(1);
    let read = HostOp::ReadSnapshot(layer, Span { offset: 0, len: B });
    assert_eq!(bench.host(read, vec![0; BLOCK]).0, Status::NotReady);
    let nowhere = Order::Unsnapshot { segment: SegmentId([77; 16]), snapshot: shape(1).id };
    assert_eq!(bench.order(nowhere), Err(OrderError::NoSuchSegment));
    // Its number and id are free for another, which is not the same layer.
    assert_ne!(bench.snapshot(1), layer);
    assert_eq!(bench.read_snapshot(1, 0, B), pattern(1, BLOCK));
}

#[test]
fn volume_deleted_with_its_snapshots_gives_all_back() {
    let mut bench = Bench::new();
    let free = bench.store.view().extents_free;
    stacked(&mut bench);
    bench.order(Order::Drain).unwrap();
    bench.unsnapshot(2);
    bench.order(Order::Delete { segment: SEGMENT }).unwrap();
    bench.order(Order::Drain).unwrap();
    bench.tick(1000);
    bench.audit();
    let view = bench.store.view();
    assert!(view.extents_free + 4 >= free, "{free} extents were free, {} are", view.extents_free);
    assert!(view.quiescent);
}
