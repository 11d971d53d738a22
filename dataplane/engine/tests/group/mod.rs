//! Three stores of one group over well-behaved drives: each behaviour in a few lines. Faults of drives and order belong to the simulator.

mod admit;
mod clones;
pub mod cluster;
mod compare;
mod force;
mod full_log;
mod join;
mod log_only;
mod rebuild;
mod repair;
mod restart;
mod room;
mod snapshots;

use crate::bench::{SEGMENT, pattern};
use cluster::{Cluster, carries_payload, is_append};
use penstock_engine::*;
use penstock_wire::*;

const B: u64 = BLOCK as u64;

#[test]
fn three_members_elect_one_leader_that_serves_and_others_do_not() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    for at in 0..3 {
        let standing = cluster.standing(at);
        assert_eq!(standing.serves, at == leader, "{standing:?}");
        assert_eq!(standing.leader, Some(NodeId([leader as u8 + 1; 16])));
        assert!(cluster.nodes[at].notices.iter().any(|notice| matches!(notice, Notice::Standing { .. })));
        if at != leader {
            assert_eq!(cluster.write(at, 0, &pattern(1, BLOCK)), Status::NotReady);
            assert_eq!(cluster.host(at, HostOp::Read(Span { offset: 0, len: B }), vec![0; BLOCK]).0, Status::NotReady);
        }
    }
    cluster.audit();
}

#[test]
fn write_is_applied_by_every_member_and_read_back_at_the_leader() {
    for direct in [false, true] {
        let mut cluster = Cluster::new(3);
        cluster.nodes.iter_mut().for_each(|node| node.mem.direct = direct);
        let leader = cluster.leader();
        let data = pattern(1, 5 * BLOCK);
        assert_eq!(cluster.write(leader, 3 * B, &data), Status::Ok);
        assert_eq!(cluster.read(leader, 3 * B, 5 * B), data);
        cluster.agree();
        for node in &cluster.nodes {
            assert_eq!(node.store.data_blocks().len(), 5, "every member has the blocks");
        }
        cluster.audit();
        assert_eq!(cluster.read(leader, 3 * B, 5 * B), data, "from the extent");
    }
}

#[test]
fn write_is_not_answered_before_a_quorum_has_it() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    cluster.lose = is_append;
    let io = cluster.begin(leader, HostOp::Write(Span { offset: 0, len: B }), pattern(1, BLOCK));
    cluster.pass(50);
    assert_eq!(cluster.reply(leader, io), None);
    cluster.lose = |_| false;
    cluster.pass(500);
    assert_eq!(cluster.reply(leader, io), Some(Status::Ok));
    cluster.nodes[leader].mem.host.remove(&io);
    cluster.audit();
}

#[test]
fn leader_dies_and_the_next_one_serves_every_acknowledged_write() {
    let mut cluster = Cluster::new(3);
    let first = cluster.leader();
    for at in 0..20 {
        assert_eq!(cluster.write(first, at * B, &pattern(at as u8, BLOCK)), Status::Ok);
    }
    cluster.kill(first);
    let next = cluster.leader();
    assert_ne!(next, first);
    for at in 0..20 {
        assert_eq!(cluster.read(next, at * B, B), pattern(at as u8, BLOCK));
    }
    assert_eq!(cluster.write(next, 0, &pattern(99, BLOCK)), Status::Ok);
    assert_eq!(cluster.read(next, 0, B), pattern(99, BLOCK));
    cluster.audit();
}

#[test]
fn sub_block_write_zeroes_and_compare_and_write_go_through_the_log() {
    let mut cluster = Cluster::new(3);
    let first = cluster.leader();
    let base = pattern(1, 2 * BLOCK);
    cluster.write(first, 0, &base);
    assert_eq!(cluster.write(first, 512, &[7; 512]), Status::Ok);
    let (status, _) = cluster.host(first, HostOp::Zero(Span { offset: B, len: 1024 }), Vec::new());
    assert_eq!(status, Status::Ok);
    let mut expected = base;
    expected[512..1024].fill(7);
    expected[BLOCK..BLOCK + 1024].fill(0);
    assert_eq!(cluster.read(first, 0, 2 * B), expected);
    let span = Span { offset: 512, len: 512 };
    assert_eq!(cluster.host(first, HostOp::CompareWrite(span), vec![1; 1024]).0, Status::Miscompare { at: 0 });
    let good = [[7u8; 512], [9; 512]].concat();
    assert_eq!(cluster.host(first, HostOp::CompareWrite(span), good).0, Status::Ok);
    expected[512..1024].fill(9);
    cluster.kill(first);
    let next = cluster.leader();
    assert_eq!(cluster.read(next, 0, 2 * B), expected);
    cluster.audit();
}

#[test]
fn resize_is_ordered_at_the_leader_and_takes_hold_everywhere() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    cluster.write(leader, 0, &pattern(5, 200 * BLOCK));
    let other = (leader + 1) % 3;
    let refused = cluster.order(other, Order::Resize { segment: SEGMENT, blocks: 50 });
    assert_eq!(refused, Err(OrderError::NotLeader(Some(NodeId([leader as u8 + 1; 16])))));
    cluster.order(leader, Order::Resize { segment: SEGMENT, blocks: 50 }).unwrap();
    cluster.agree();
    for node in &cluster.nodes {
        assert_eq!(node.store.replicas()[0].shape.blocks, 50);
    }
    assert_eq!(cluster.write(leader, 50 * B, &[0; 512]), Status::OutOfRange);
    cluster.order(leader, Order::Resize { segment: SEGMENT, blocks: 300 }).unwrap();
    assert!(cluster.read(leader, 50 * B, 100 * B).iter().all(|byte| *byte == 0));
    cluster.audit();
}

#[test]
fn member_that_heard_nothing_gets_what_it_missed_from_the_ring() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    let lagging = (leader + 1) % 3;
    cluster.isolate(lagging);
    for at in 0..30 {
        assert_eq!(cluster.write(leader, at * 4 * B, &pattern(at as u8, 4 * BLOCK)), Status::Ok);
    }
    assert!(cluster.applied(lagging) + 30 <= cluster.applied(leader));
    let before = cluster.payload_blocks;
    cluster.cut.clear();
    cluster.agree();
    assert!(cluster.payload_blocks >= before + 120, "the payload was sent again");
    assert_eq!(cluster.nodes[lagging].store.data_blocks().len(), 120);
    let leader = cluster.leader();
    for at in 0..30 {
        assert_eq!(cluster.read(leader, at * 4 * B, 4 * B), pattern(at as u8, 4 * BLOCK));
    }
    cluster.audit();
}

#[test]
fn words_that_are_read_back_do_not_keep_each_other_from_memory() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    let lagging = (leader + 1) % 3;
    cluster.isolate(lagging);
    for (block, blocks) in [(0, 10), (100, 60)] {
        assert_eq!(cluster.write(leader, block * B, &pattern(1, blocks * BLOCK)), Status::Ok);
    }
    cluster.pass(1000);
    // There is enough for both, once it is given back; each word that comes meanwhile, the same again, could take the first's.
    let mem = &mut cluster.nodes[leader].mem;
    mem.limit = 100;
    let taken: Vec<BufId> = (0..9).map(|_| mem.alloc(10).expect("there is enough")).collect();
    cluster.cut.clear();
    for buf in taken {
        cluster.pass(200);
        cluster.nodes[leader].mem.free(buf);
    }
    cluster.agree();
    cluster.audit();
}

#[test]
fn entries_that_never_reached_a_quorum_are_replaced_and_their_hosts_told_to_try_elsewhere() {
    let mut cluster = Cluster::new(3);
    let old = cluster.leader();
    cluster.write(old, 0, &pattern(1, BLOCK));
    cluster.isolate(old);
    let lost: Vec<u32> = (0..5).map(|at| cluster.begin(old, HostOp::Write(Span { offset: at * B, len: B }), pattern(66, BLOCK))).collect();
    cluster.pass(400);
    for io in &lost {
        assert_eq!(cluster.reply(old, *io), Some(Status::NotReady), "a leader that no quorum hears gives up by itself");
    }
    let next = cluster.leader();
    assert_ne!(next, old);
    assert_eq!(cluster.write(next, 0, &pattern(2, BLOCK)), Status::Ok);
    cluster.cut.clear();
    cluster.agree();
    for io in lost {
        assert_eq!(cluster.reply(old, io), Some(Status::NotReady));
        cluster.nodes[old].mem.host.remove(&io);
    }
    let leader = cluster.leader();
    assert_eq!(cluster.read(leader, 0, 5 * B), [pattern(2, BLOCK), vec![0; 4 * BLOCK]].concat());
    cluster.audit();
}

#[test]
fn cut_off_leader_answers_no_read() {
    let mut cluster = Cluster::new(3);
    let old = cluster.leader();
    cluster.write(old, 0, &pattern(1, BLOCK));
    cluster.isolate(old);
    let read = cluster.begin(old, HostOp::Read(Span { offset: 0, len: B }), vec![0; BLOCK]);
    cluster.pass(1000);
    assert_eq!(cluster.reply(old, read), Some(Status::NotReady));
}

#[test]
fn leadership_is_handed_over_by_order() {
    let mut cluster = Cluster::new(3);
    let old = cluster.leader();
    let to = (old + 1) % 3;
    cluster.write(old, 0, &pattern(1, BLOCK));
    let no = peer::MemberNo(to as u64 + 1);
    cluster.order(old, Order::Transfer { segment: SEGMENT, to: no }).unwrap();
    cluster.pass(50);
    assert_eq!(cluster.leader(), to);
    assert_eq!(cluster.read(to, 0, B), pattern(1, BLOCK));
    cluster.audit();
}

#[test]
fn idle_group_sleeps_and_its_stores_need_no_time() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    cluster.write(leader, 0, &pattern(1, BLOCK));
    cluster.pass(8000);
    for node in &cluster.nodes {
        assert!(node.store.view().quiescent, "{:?}", node.store.view());
    }
    let before = cluster.delivered;
    assert_eq!(cluster.read(leader, 0, B), pattern(1, BLOCK));
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    assert!(cluster.delivered > before);
    cluster.audit();
}

#[test]
fn fenced_leader_stops_its_group_and_the_others_go_on() {
    let mut cluster = Cluster::new(3);
    let old = cluster.leader();
    cluster.write(old, 0, &pattern(1, BLOCK));
    let node = &mut cluster.nodes[old];
    node.store.apply(Event::Fence(FenceReason::Drive), &mut node.mem, &mut node.fx);
    cluster.run();
    assert!(cluster.nodes[old].notices.iter().any(|notice| matches!(notice, Notice::GroupStopped { .. })));
    assert_eq!(cluster.write(old, 0, &pattern(3, BLOCK)), Status::NotReady);
    cluster.up[old] = false;
    let next = cluster.leader();
    assert_eq!(cluster.read(next, 0, B), pattern(1, BLOCK));
    assert_eq!(cluster.write(next, 0, &pattern(2, BLOCK)), Status::Ok);
}

#[test]
fn leader_on_a_slow_drive_hands_over_once_and_the_next_one_keeps_it() {
    let mut cluster = Cluster::new(3);
    let slow = cluster.leader();
    assert_eq!(cluster.write(slow, 0, &pattern(1, BLOCK)), Status::Ok);
    cluster.nodes[slow].late = 30;
    let mut written = 0;
    while cluster.standing(slow).serves {
        written += 1;
        assert!(written < 100, "it leads on");
        let status = cluster.write(slow, written * B, &pattern(written as u8, BLOCK));
        assert!(matches!(status, Status::Ok | Status::NotReady), "{status:?}");
    }
    let next = cluster.leader();
    assert_ne!(next, slow);
    let to = NodeId([next as u8 + 1; 16]);
    let told = |notice: &&Notice| matches!(notice, Notice::SteppingAside { .. });
    let no = cluster.nodes[slow].store.replica_of(SEGMENT).unwrap();
    assert_eq!(cluster.nodes[slow].notices.iter().filter(told).collect::<Vec<_>>(), [&Notice::SteppingAside { replica: no, to }]);
    assert_eq!(cluster.nodes[slow].store.view().counters.stepped_aside, 1);
    let term = cluster.standing(next).term;
    for at in 1..=written {
        assert_eq!(cluster.write(next, at * B, &pattern(at as u8, BLOCK)), Status::Ok);
    }
    cluster.pass(3000);
    assert_eq!((cluster.standing(next).term, cluster.standing(next).serves), (term, true), "it is not given back");
    cluster.nodes[slow].late = 0;
    cluster.audit();
    assert_eq!(cluster.read(next, written * B, B), pattern(written as u8, BLOCK));
}

#[test]
fn leader_whose_followers_are_as_slow_or_one_of_them_dead_leads_on() {
    for dead in [false, true] {
        let mut cluster = Cluster::new(3);
        let leader = cluster.leader();
        let others = [(leader + 1) % 3, (leader + 2) % 3];
        cluster.nodes[leader].late = 30;
        if dead {
            cluster.kill(others[0]);
        } else {
            cluster.nodes[others[0]].late = 30;
            cluster.nodes[others[1]].late = 30;
        }
        for at in 0..60 {
            assert_eq!(cluster.write(leader, at * B, &pattern(at as u8, BLOCK)), Status::Ok);
        }
        assert_eq!(cluster.nodes[leader].store.view().counters.stepped_aside, 0, "nothing would be gained; dead: {dead}");
    }
}

#[test]
fn store_stops_while_it_leads_and_answers_everyone() {
    let mut cluster = Cluster::new(3);
    let old = cluster.leader();
    cluster.lose = carries_payload;
    let io = cluster.begin(old, HostOp::Write(Span { offset: 0, len: B }), pattern(1, BLOCK));
    cluster.run();
    cluster.order(old, Order::Stop).unwrap();
    assert_eq!(cluster.reply(old, io), Some(Status::NotReady));
    cluster.nodes[old].mem.host.remove(&io);
    assert_eq!(cluster.nodes[old].mem.held(), 0);
    assert_eq!(cluster.nodes[old].store.view().stage, Stage::Stopped);
}

#[test]
fn deleted_member_leaves_its_group_and_gives_everything_back() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    cluster.write(leader, 0, &pattern(1, 40 * BLOCK));
    let gone = (leader + 1) % 3;
    cluster.order(gone, Order::Delete { segment: SEGMENT }).unwrap();
    cluster.up[gone] = false;
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    let node = &mut cluster.nodes[gone];
    for _ in 0..100 {
        node.tick(10);
    }
    node.order(Order::Drain).unwrap();
    node.audit();
    assert_eq!(node.mem.held(), 0);
    assert!(node.store.members().is_empty());
}

#[test]
fn log_many_times_over_its_ring_keeps_the_newest_everywhere() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    for round in 0..60u8 {
        for at in 0..10u64 {
            assert_eq!(cluster.write(leader, at * 60 * B, &pattern(round ^ at as u8, 40 * BLOCK)), Status::Ok);
        }
        cluster.pass(10);
    }
    for at in 0..10u64 {
        assert_eq!(cluster.read(leader, at * 60 * B, 40 * B), pattern(59 ^ at as u8, 40 * BLOCK));
    }
    assert!(cluster.nodes.iter().all(|node| node.store.view().counters.checkpoints > 3));
    cluster.audit();
    cluster.kill(leader);
    let next = cluster.leader();
    for at in 0..10u64 {
        assert_eq!(cluster.read(next, at * 60 * B, 40 * B), pattern(59 ^ at as u8, 40 * BLOCK));
    }
}
