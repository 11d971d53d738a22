//! A store over a well-behaved drive: each behaviour in a few lines. Faults and order belong to the simulator.

mod bench;
mod clones;
mod faults;
mod forged;
mod group;
mod reserve;
mod snapshots;

use bench::{Bench, SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::*;

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

/// Gives an order and turns the loop until it is answered, and no further.
fn carry_out(bench: &mut Bench, id: u64, order: Order) {
    bench.store.apply(Event::Order { id: OrderId(id), order }, &mut bench.mem, &mut bench.fx);
    for _ in 0..100 {
        if !bench.orders.contains_key(&id) {
            bench.turns(1);
        }
    }
    assert_eq!(bench.orders.get(&id), Some(&Ok(())));
}

#[test]
fn replica_that_came_and_went_while_the_drain_was_at_work_is_not_made_again_over_its_successor() {
    let mut bench = Bench::new();
    bench.create(7000);
    for extent in 0..400 {
        assert_eq!(bench.write(extent * EXTENT as u64, &pattern(1, BLOCK)), Status::Ok);
    }
    bench.store.apply(Event::Order { id: OrderId(70), order: Order::Drain }, &mut bench.mem, &mut bench.fx);
    bench.turns(1);
    // Later than what this drain has to reach, so that what comes after it is redone over the checkpoint at its end.
    bench.begin(HostOp::Write(Span { offset: 6999 * BLOCK as u64, len: BLOCK as u64 }), pattern(2, BLOCK));
    bench.turns(2);
    let segment = SegmentId([5; 16]);
    let (volume, replica) = (VolumeId([5; 16]), ReplicaId([5; 16]));
    let shape = Box::new(ReplicaShape { volume, segment, replica, segment_no: 0, blocks: 100, logical_block: 512, name: "w".into() });
    carry_out(&mut bench, 71, Order::Create(shape.clone()));
    carry_out(&mut bench, 72, Order::Delete { segment });
    carry_out(&mut bench, 73, Order::Create(shape));
    let stands = bench.store.replica_of(segment);
    assert!(stands.is_some());
    let checkpoints = bench.store.view().counters.checkpoints;
    for _ in 0..40 {
        bench.turns(1);
        let after = Bench::over(bench.label.clone(), bench.media.clone());
        assert_eq!(after.store.replica_of(segment), stands);
    }
    assert!(bench.store.view().counters.checkpoints > checkpoints, "a checkpoint was among them");
}

#[test]
fn order_that_found_no_memory_for_its_batch_keeps_the_store_awake_and_is_carried_out() {
    let mut bench = Bench::new();
    bench.create(1000);
    bench.run();
    bench.tick(1000);
    assert!(bench.store.is_quiescent());
    bench.mem.limit = bench.mem.held();
    bench.store.apply(
        Event::Order { id: OrderId(77), order: Order::Resize { segment: SEGMENT, blocks: 500 } },
        &mut bench.mem,
        &mut bench.fx,
    );
    bench.run();
    assert_eq!((bench.orders.get(&77), bench.store.is_quiescent()), (None, false));
    bench.mem.limit = usize::MAX;
    bench.tick(1);
    assert_eq!(bench.orders.get(&77), Some(&Ok(())));
}

#[test]
fn blocks_that_are_overwritten_before_the_log_needs_their_room_are_never_drained() {
    let mut bench = Bench::new();
    bench.create(600);
    let cold = pattern(200, 8 * BLOCK);
    assert_eq!(bench.write(592 * BLOCK as u64, &cold), Status::Ok);
    // 200 blocks in turn, ten times the log: each is written anew when less than a sixth of the log lies between.
    for round in 0..100u8 {
        for at in 0..10u64 {
            assert_eq!(bench.write(at * 20 * BLOCK as u64, &pattern(round ^ at as u8, 20 * BLOCK)), Status::Ok);
        }
        bench.tick(1);
    }
    let counters = bench.store.view().counters;
    assert!(counters.checkpoints >= 20, "{} checkpoints gave log back", counters.checkpoints);
    assert_eq!(counters.drained_blocks, 8, "the cold ones, once");
    bench.reopen();
    for at in 0..10u64 {
        assert_eq!(bench.read(at * 20 * BLOCK as u64, 20 * BLOCK as u64), pattern(99 ^ at as u8, 20 * BLOCK));
    }
    assert_eq!(bench.read(592 * BLOCK as u64, 8 * BLOCK as u64), cold);
    bench.order(Order::Drain).unwrap();
    assert_eq!(bench.store.view().counters.drained_blocks, 200);
    bench.audit();
}

#[test]
fn batches_found_written_in_one_turn_share_a_barrier() {
    let mut bench = Bench::new();
    bench.create(1000);
    let before = bench.store.view().counters;
    let span = |at: u64| Span { offset: at * 128 * BLOCK as u64, len: 128 * BLOCK as u64 };
    let ios: Vec<u32> = (0..6).map(|at| bench.begin(HostOp::Write(span(at)), pattern(at as u8, 128 * BLOCK))).collect();
    bench.run();
    assert!(ios.iter().all(|io| bench.replies[io] == Status::Ok));
    let after = bench.store.view().counters;
    assert_eq!((after.log_batches - before.log_batches, after.log_flushes - before.log_flushes), (6, 1));
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
fn log_in_which_many_blocks_rotted_is_looked_ahead_in_once() {
    let mut bench = Bench::new();
    bench.create(1000);
    for block in 0..=40 {
        assert_eq!(bench.write(block * BLOCK as u64, &pattern(block as u8, BLOCK)), Status::Ok);
    }
    let start = bench.label.stores[0].start.0;
    for (_, block, at, _) in bench.store.data_blocks() {
        bench.media[(start + at.0) as usize * BLOCK] ^= u8::from(block < 40);
    }
    bench.reopen();
    let report = bench.store.view().recovery;
    assert_eq!(report.lost_blocks, 40);
    assert!(report.bytes < 3 * 2048 * BLOCK as u64, "{} bytes were read", report.bytes);
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

/// A volume deleted from a full store, or discarded, and its space written at once: wherever the process dies, the log that wants the space
/// back finds it, though the map on the drive still has the deleted volume in it.
#[test]
fn full_store_comes_back_when_it_dies_while_freed_space_is_written_again() {
    let mut full = Bench::new();
    full.create(100_000);
    let mut at = 0;
    while full.write(at * 256 * BLOCK as u64, &pattern(at as u8, 256 * BLOCK)) == Status::Ok {
        at += 1;
        full.tick(1);
    }
    full.order(Order::Drain).unwrap();
    let media = full.media.clone();
    let cases = (1..16).step_by(3).flat_map(|before| [(before, 2), (before, 4), (before, 7)]);
    for (deleted, before, after) in cases.flat_map(|(before, after)| [(true, before, after), (false, before, after)]) {
        let mut bench = Bench::over(full.label.clone(), media.clone());
        if deleted {
            bench.order(Order::Delete { segment: SEGMENT }).unwrap();
            bench.create(100_000);
        } else {
            bench.host(HostOp::Zero(Span { offset: 0, len: 50_000 * BLOCK as u64 }), Vec::new());
        }
        bench.pass(600);
        for _ in 0..before {
            bench.turns(1);
        }
        for at in 0..6u64 {
            let at = at + 200; // where nothing was
            bench.begin(HostOp::Write(Span { offset: at * 256 * BLOCK as u64, len: 256 * BLOCK as u64 }), pattern(7, 256 * BLOCK));
        }
        for _ in 0..after {
            bench.turns(1);
        }
        bench.reopen();
        assert_eq!(bench.store.view().stage, Stage::Serving, "deleted {deleted}, {before} turns, then {after}");
        bench.order(Order::Drain).unwrap();
        for _ in 0..5 {
            bench.tick(600);
        }
        bench.audit();
    }
}

fn usage(bench: &Bench) -> (u64, u64) {
    let usage = bench.store.usage(ReplicaNo(0));
    (usage.allocated_extents, usage.undrained_blocks)
}

#[test]
fn replica_counts_its_extents_and_its_undrained_blocks() {
    let mut bench = Bench::new();
    bench.create(1000);
    assert_eq!(usage(&bench), (0, 0));
    bench.write(0, &pattern(1, 20 * BLOCK));
    assert_eq!(usage(&bench), (0, 20));
    bench.write(BLOCK as u64, &pattern(2, 3 * BLOCK));
    assert_eq!(usage(&bench), (0, 20), "overwritten in the log");
    let zero = |block: u64, blocks: u64| HostOp::Zero(Span { offset: block * BLOCK as u64, len: blocks * BLOCK as u64 });
    bench.host(zero(0, 2), Vec::new());
    assert_eq!(usage(&bench), (0, 18), "a discarded block is no data");
    bench.reopen();
    assert_eq!(usage(&bench), (0, 18), "redone");
    bench.audit();
    bench.order(Order::Drain).unwrap();
    assert_eq!(usage(&bench), (2, 0));
    bench.write(0, &pattern(3, BLOCK));
    bench.write(40 * BLOCK as u64, &pattern(3, BLOCK));
    assert_eq!(usage(&bench), (2, 2));
    bench.reopen();
    assert_eq!(usage(&bench), (2, 2), "told by the checkpoint, no page is loaded");
    assert_eq!(bench.store.view().pages_cached, 0);
    bench.order(Order::Drain).unwrap();
    bench.host(zero(16, 1000 - 16), Vec::new());
    bench.order(Order::Drain).unwrap();
    assert_eq!(usage(&bench), (1, 0));
    bench.audit();
    bench.order(Order::Delete { segment: SEGMENT }).unwrap();
    bench.order(Order::Drain).unwrap();
    assert_eq!(usage(&bench), (0, 0));
    bench.audit();
}
