//! Groups whose drives are not of one size: hosts are told that there is no space before some member could not take what is committed.

use super::B;
use super::cluster::{Cluster, SMALL};
use crate::bench::{DRIVE_BLOCKS, SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::*;

const EXTENT: usize = EXTENT_BLOCKS as usize * BLOCK;

/// The first drive's member leads.
fn led_from_the_largest(drives: &[u64]) -> Cluster {
    let mut cluster = Cluster::on_drives(drives);
    let leader = cluster.leader();
    if leader != 0 {
        cluster.order(leader, Order::Transfer { segment: SEGMENT, to: peer::MemberNo(1) }).unwrap();
        cluster.pass(100);
    }
    assert_eq!(cluster.leader(), 0);
    cluster
}

/// Writes extent after extent until one is refused; which.
fn fill(cluster: &mut Cluster) -> u64 {
    for extent in 0..125 {
        match patiently(cluster, HostOp::Write(Span { offset: extent * EXTENT as u64, len: EXTENT as u64 }), pattern(extent as u8, EXTENT))
        {
            Status::Ok => {}
            Status::NoSpace => return extent,
            other => panic!("extent {extent} was answered {other:?}"),
        }
    }
    panic!("the volume is larger than two of the drives, and all of it was written");
}

fn patiently(cluster: &mut Cluster, op: HostOp, payload: Vec<u8>) -> Status {
    let io = cluster.begin(0, op, payload);
    for _ in 0..500 {
        cluster.run();
        if let Some(status) = cluster.reply(0, io) {
            cluster.nodes[0].mem.host.remove(&io);
            return status;
        }
        cluster.pass(10);
    }
    panic!("{op:?} is not answered in five seconds");
}

#[test]
fn members_on_small_drives_are_full_and_hosts_are_told_while_overwrites_and_discards_go_on() {
    let mut cluster = led_from_the_largest(&[DRIVE_BLOCKS, SMALL, SMALL]);
    let refused = fill(&mut cluster);
    assert!(refused > 50, "{refused}");
    cluster.agree();
    let extent = |no: u64| Span { offset: no * EXTENT as u64, len: EXTENT as u64 };
    assert_eq!(patiently(&mut cluster, HostOp::Write(extent(3)), pattern(9, EXTENT)), Status::Ok);
    assert_eq!(patiently(&mut cluster, HostOp::Write(extent(refused + 1)), pattern(9, EXTENT)), Status::NoSpace);
    for no in 10..20 {
        assert_eq!(patiently(&mut cluster, HostOp::Zero(extent(no)), Vec::new()), Status::Ok);
    }
    cluster.agree();
    // Drains and checkpoints give it back on their own.
    cluster.pass(3000);
    assert_eq!(patiently(&mut cluster, HostOp::Write(extent(refused + 1)), pattern(7, EXTENT)), Status::Ok);
    assert_eq!(cluster.read(0, extent(refused + 1).offset, EXTENT as u64), pattern(7, EXTENT));
    assert_eq!(cluster.read(0, 12 * EXTENT as u64, B), vec![0; BLOCK]);
    cluster.agree();
    cluster.audit();
}

#[test]
fn group_that_fell_asleep_full_asks_again_before_it_refuses() {
    let mut cluster = led_from_the_largest(&[DRIVE_BLOCKS, SMALL, SMALL]);
    let refused = fill(&mut cluster);
    for no in 0..30 {
        let span = Span { offset: no * EXTENT as u64, len: EXTENT as u64 };
        assert_eq!(patiently(&mut cluster, HostOp::Zero(span), Vec::new()), Status::Ok);
    }
    // What the members said last is from before they drained.
    cluster.pass(10_000);
    let span = Span { offset: refused * EXTENT as u64, len: EXTENT as u64 };
    assert_eq!(patiently(&mut cluster, HostOp::Write(span), pattern(1, EXTENT)), Status::Ok);
    cluster.agree();
}

#[test]
fn member_whose_node_was_silent_for_a_moment_is_counted_on_and_one_that_stays_away_is_not() {
    let mut cluster = led_from_the_largest(&[DRIVE_BLOCKS, DRIVE_BLOCKS, SMALL]);
    let refused = fill(&mut cluster);
    cluster.isolate(2);
    let leader = &mut cluster.nodes[0];
    leader.store.apply(Event::PeerDown { node: NodeId([3; 16]) }, &mut leader.mem, &mut leader.fx);
    let write = HostOp::Write(Span { offset: refused * EXTENT as u64, len: EXTENT as u64 });
    assert_eq!(patiently(&mut cluster, write, pattern(1, EXTENT)), Status::NoSpace);
    cluster.pass(1100);
    assert_eq!(patiently(&mut cluster, write, pattern(1, EXTENT)), Status::Ok);
}

#[test]
fn merges_that_come_together_take_no_more_than_the_members_have() {
    let mut cluster = led_from_the_largest(&[DRIVE_BLOCKS, SMALL, SMALL]);
    let refused = fill(&mut cluster);
    for no in 0..3 {
        let span = Span { offset: no * EXTENT as u64, len: EXTENT as u64 };
        assert_eq!(patiently(&mut cluster, HostOp::Zero(span), Vec::new()), Status::Ok);
    }
    cluster.agree();
    cluster.pass(3000);
    let part = |no: u64| HostOp::Write(Span { offset: (refused + no) * EXTENT as u64, len: 512 });
    let ios: Vec<u32> = (0..24).map(|no| cluster.begin(0, part(no), vec![7; 512])).collect();
    cluster.pass(3000);
    let answers: Vec<Option<Status>> = ios.iter().map(|io| cluster.reply(0, *io)).collect();
    assert!(answers.iter().all(|answer| matches!(answer, Some(Status::Ok | Status::NoSpace))), "{answers:?}");
    assert!(answers.contains(&Some(Status::Ok)) && answers.contains(&Some(Status::NoSpace)), "{answers:?}");
    cluster.agree();
    cluster.audit();
}

#[test]
fn extent_that_is_empty_here_and_still_has_its_place_needs_one_where_it_was_given_back() {
    let mut cluster = led_from_the_largest(&[DRIVE_BLOCKS, SMALL, SMALL]);
    let refused = fill(&mut cluster);
    let extent = |no: u64| Span { offset: no * EXTENT as u64, len: EXTENT as u64 };
    (0..30).for_each(|no| assert_eq!(patiently(&mut cluster, HostOp::Zero(extent(no)), Vec::new()), Status::Ok));
    // The leader has no time to drain, and the others do.
    let holds = |cluster: &Cluster| cluster.nodes[0].store.usage(ReplicaNo(0)).allocated_extents;
    let before = holds(&cluster);
    for at in [1, 2] {
        cluster.order(at, Order::Drain).unwrap();
    }
    // And say so.
    cluster.pass(60);
    for no in refused..refused + 20 {
        assert_eq!(patiently(&mut cluster, HostOp::Write(extent(no)), pattern(1, EXTENT)), Status::Ok);
    }
    assert!(holds(&cluster) >= before, "it has let go of places");
    let answers: Vec<Status> = (0..30).map(|no| patiently(&mut cluster, HostOp::Write(extent(no)), pattern(2, EXTENT))).collect();
    assert!(answers.iter().all(|answer| matches!(answer, Status::Ok | Status::NoSpace)), "{answers:?}");
    assert!(answers.contains(&Status::NoSpace), "{answers:?}");
    cluster.agree();
    cluster.audit();
}
