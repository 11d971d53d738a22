//! Two members with content and one that keeps the log alone: it counts, and brings the others up to what it alone has, but gives no host anything.

use super::B;
use super::cluster::{Cluster, members, shape};
use super::join::change;
use super::repair::{counters, rot};
use crate::bench::{DRIVE_BLOCKS, SEGMENT, pattern};
use penstock_engine::replica::Part as GroupPart;
use penstock_engine::*;
use penstock_wire::peer::{Member, MemberNo, Role};
use penstock_wire::*;

const LOG: usize = 2;

/// The first two have content; and who leads of them.
fn two_and_log() -> (Cluster, usize, usize) {
    let mut all = members(3);
    all.list[LOG].role = Role::LogOnly;
    let mut cluster = Cluster::of(all, &[DRIVE_BLOCKS; 3]);
    let leader = cluster.leader();
    assert_ne!(leader, LOG);
    (cluster, leader, 1 - leader)
}

fn write(cluster: &mut Cluster, at: usize, blocks: std::ops::Range<u64>, seed: u8) {
    for block in blocks {
        assert_eq!(cluster.write(at, block * B, &pattern(seed, BLOCK)), Status::Ok);
    }
}

fn holds(cluster: &mut Cluster, at: usize, blocks: std::ops::Range<u64>, seed: u8) {
    for block in blocks {
        assert!(cluster.read(at, block * B, B) == pattern(seed, BLOCK), "block {block}");
    }
}

/// `at` is away while the other writes, which then is gone: the log-only member alone has what counts.
fn log_alone_has_it() -> (Cluster, usize, usize) {
    let (mut cluster, leader, other) = two_and_log();
    write(&mut cluster, leader, 0..10, 1);
    cluster.agree();
    cluster.isolate(other);
    write(&mut cluster, leader, 5..30, 2);
    cluster.agree_among(&[leader, LOG]);
    cluster.kill(leader);
    cluster.cut.clear();
    (cluster, leader, other)
}

fn check_all(cluster: &mut Cluster, leader: usize, other: usize) {
    assert_eq!(cluster.leader(), other);
    holds(cluster, other, 0..5, 1);
    holds(cluster, other, 5..30, 2);
    write(cluster, other, 30..40, 3);
    cluster.restart(leader);
    cluster.audit();
    assert_eq!(cluster.contents(0), cluster.contents(1));
    assert!(cluster.contents(LOG).is_empty());
}

#[test]
fn log_only_member_counts_and_takes_no_space() {
    let (mut cluster, leader, other) = two_and_log();
    let free = cluster.nodes[LOG].store.view().extents_free;
    cluster.kill(other);
    write(&mut cluster, leader, 0..200, 1);
    let (status, _) = cluster.host(leader, HostOp::Zero(Span { offset: 0, len: 16 * B }), Vec::new());
    assert_eq!(status, Status::Ok);
    cluster.agree();
    let view = cluster.nodes[LOG].store.view();
    assert_eq!((view.undrained_extents, view.extents_free), (0, free));
    assert!(cluster.contents(LOG).is_empty());
    cluster.restart(other);
    cluster.audit();
    assert_eq!(cluster.contents(0), cluster.contents(1));
}

#[test]
fn log_only_member_with_the_longest_log_brings_a_data_member_up_which_serves() {
    let (mut cluster, leader, other) = log_alone_has_it();
    let before = cluster.standing(LOG).term;
    for _ in 0..300 {
        cluster.pass(10);
        assert!(!cluster.standing(LOG).serves);
        if cluster.standing(other).serves {
            break;
        }
    }
    assert_eq!(cluster.standing(other).term, Term(before.0 + 2), "the log-only member won, and handed over");
    check_all(&mut cluster, leader, other);
}

#[test]
fn log_only_member_that_restarts_still_has_what_counts() {
    let (mut cluster, leader, other) = log_alone_has_it();
    cluster.restart(LOG);
    let view = cluster.nodes[LOG].store.view();
    assert_eq!(view.undrained_extents, 0, "nothing of it is redone as content");
    check_all(&mut cluster, leader, other);
}

#[test]
fn log_only_member_keeps_what_a_checkpoint_of_its_own_does_not_need() {
    let (mut cluster, leader, other) = log_alone_has_it();
    cluster.order(LOG, Order::Drain).unwrap();
    cluster.restart(LOG);
    assert!(cluster.view(LOG).group.unwrap().first <= cluster.view(other).group.unwrap().last);
    check_all(&mut cluster, leader, other);
}

#[test]
fn log_only_leader_refuses_hosts() {
    let (mut cluster, _, other) = log_alone_has_it();
    cluster.kill(other);
    cluster.pass(3000);
    assert_ne!(cluster.standing(LOG).part, GroupPart::Leader, "one of three");
    cluster.lose = |word| matches!(word, PeerWord::Group(message) if message.body == penstock_wire::peer::MessageBody::Campaign);
    cluster.restart(other);
    for _ in 0..300 {
        cluster.pass(10);
        if cluster.standing(LOG).part == GroupPart::Leader {
            break;
        }
    }
    assert_eq!(cluster.standing(LOG).part, GroupPart::Leader);
    cluster.pass(500);
    for op in [HostOp::Read(Span { offset: 0, len: B }), HostOp::Write(Span { offset: 0, len: B }), HostOp::Flush] {
        let payload = if op == HostOp::Flush { Vec::new() } else { pattern(1, BLOCK) };
        assert_eq!(cluster.host(LOG, op, payload).0, Status::NotReady, "{op:?}");
    }
}

#[test]
fn log_only_member_left_behind_takes_the_log_anew_and_copies_nothing() {
    let (mut cluster, leader, _) = two_and_log();
    cluster.isolate(LOG);
    cluster.order(leader, Order::Resize { segment: SEGMENT, blocks: 3000 }).unwrap();
    for round in 0..40 {
        for block in (0..2000).step_by(40) {
            assert_eq!(cluster.write(leader, block * B, &pattern(round, 40 * BLOCK)), Status::Ok);
        }
    }
    cluster.pass(2000);
    assert!(cluster.view(leader).group.unwrap().first > cluster.view(LOG).group.unwrap().last, "the leader's log still has it all");
    cluster.cut.clear();
    cluster.pass(1000);
    cluster.agree();
    let counters = cluster.nodes[LOG].store.view().counters;
    assert_eq!((counters.rebuilds, counters.copies_taken), (1, 0));
    assert_eq!(cluster.view(LOG).rebuild, None);
    assert_eq!(cluster.nodes[LOG].store.replicas()[0].shape.blocks, 3000);
    assert!(cluster.contents(LOG).is_empty());
    cluster.audit();
}

#[test]
fn log_only_member_is_not_asked_to_lead() {
    let (mut cluster, leader, _) = two_and_log();
    let refused = cluster.order(leader, Order::Transfer { segment: SEGMENT, to: MemberNo(LOG as u64 + 1) });
    assert!(matches!(refused, Err(OrderError::Invalid(_))), "{refused:?}");
}

#[test]
fn block_that_rots_before_the_other_data_member_has_it_comes_from_the_log() {
    let (mut cluster, leader, other) = two_and_log();
    write(&mut cluster, leader, 0..10, 1);
    cluster.agree();
    for drained in [false, true] {
        cluster.isolate(other);
        write(&mut cluster, leader, 4..7, 2);
        if drained {
            cluster.order(leader, Order::Drain).unwrap();
        }
        rot(&mut cluster, leader, 5);
        holds(&mut cluster, leader, 4..7, 2);
        // The other gets it from the log of the leader, where it may not be mended.
        cluster.cut.clear();
        cluster.pass(500);
        cluster.agree();
        assert_eq!(counters(&cluster, other).rebuilds, 0, "its log was enough");
        assert_eq!(cluster.contents(0), cluster.contents(1));
    }
    assert!(counters(&cluster, LOG).fetches_answered >= 2);
    cluster.audit();
}

#[test]
fn block_that_rots_in_the_log_too_is_lost_alone() {
    let (mut cluster, leader, other) = two_and_log();
    write(&mut cluster, leader, 0..10, 1);
    cluster.agree();
    cluster.isolate(other);
    let lost = pattern(2, BLOCK);
    assert_eq!(cluster.write(leader, 5 * B, &lost), Status::Ok);
    rot(&mut cluster, leader, 5);
    for block in cluster.nodes[LOG].media.chunks_exact_mut(BLOCK).filter(|block| **block == lost[..]) {
        block[77] ^= 4;
    }
    cluster.kill(other);
    let read = HostOp::Read(Span { offset: 5 * B, len: B });
    assert_eq!(cluster.host_within(leader, read, vec![0xcc; BLOCK], 4000).0, Status::NotReady, "who is away may have it");
    cluster.restart(other);
    cluster.cut.clear();
    cluster.pass(5000);
    let leader = cluster.leader();
    assert_eq!(cluster.host_within(leader, read, vec![0xcc; BLOCK], 4000).0, Status::Unrecovered);
    holds(&mut cluster, leader, 0..5, 1);
}

#[test]
fn log_only_member_that_is_lost_is_replaced_and_the_new_one_counts() {
    let (mut cluster, leader, other) = two_and_log();
    write(&mut cluster, leader, 0..10, 1);
    cluster.agree();
    cluster.kill(LOG);
    change(&mut cluster, leader, |members| members.list.retain(|member| member.no != MemberNo(LOG as u64 + 1)));
    cluster.restart(LOG);
    cluster.order(LOG, Order::Delete { segment: SEGMENT }).unwrap();
    let mut shape = shape(LOG as u8 + 1);
    shape.replica = ReplicaId([99; 16]);
    let row = Member { no: MemberNo(4), role: Role::LogOnly, replica: shape.replica, node: NodeId([LOG as u8 + 1; 16]) };
    let mut joined = cluster.view(leader).members;
    joined.list.push(row);
    joined.next = MemberNo(5);
    // It is there before the others know of it, and says nothing that counts.
    cluster.order(LOG, Order::CreateMember { shape: Box::new(shape), members: Box::new(joined.clone()) }).unwrap();
    cluster.pass(3000);
    assert!(cluster.standing(leader).serves);
    change(&mut cluster, leader, |members| *members = joined.clone());
    cluster.pass(500);
    cluster.agree();
    assert!(cluster.contents(LOG).is_empty());
    // The other one with content goes, and then who leads: what counts comes from the new one's log.
    cluster.isolate(other);
    write(&mut cluster, leader, 5..30, 2);
    cluster.agree_among(&[leader, LOG]);
    cluster.kill(leader);
    cluster.cut.clear();
    check_all(&mut cluster, leader, other);
}
