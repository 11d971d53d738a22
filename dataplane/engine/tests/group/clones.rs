//! Clones of a volume with several replicas: each member over its own store's layer, or with all of it in its own where there is none.

use super::B;
use super::cluster::{Cluster, members, shape};
use super::join::change;
use super::snapshots::{fill, id, remove, take};
use crate::bench::{Bench, DRIVE_BLOCKS, SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::peer::{Member, MemberNo, Members, Role};
use penstock_wire::*;

const CLONE: SegmentId = SegmentId([8; 16]);

fn clone_shape(no: u8) -> ReplicaShape {
    let (volume, replica) = (VolumeId([8; 16]), ReplicaId([no + 80; 16]));
    ReplicaShape { volume, segment: CLONE, replica, name: "clone".into(), ..shape(no) }
}

fn clone_members(of: &Members) -> Members {
    let mut all = of.clone();
    all.list.iter_mut().for_each(|member| member.replica = ReplicaId([member.node.0[0] + 80; 16]));
    all
}

fn order_clone(cluster: &mut Cluster, at: usize, all: &Members) -> Result<(), OrderError> {
    let (shape, members) = (Box::new(clone_shape(at as u8 + 1)), Some(Box::new(all.clone())));
    cluster.order(at, Order::Clone { shape, members, origin: SEGMENT, snapshot: id(1) })
}

/// As control does: again until it is done.
fn clone_at(cluster: &mut Cluster, at: usize, all: &Members) {
    for _ in 0..100 {
        match order_clone(cluster, at, all) {
            Ok(()) => return,
            Err(OrderError::NotYet(_) | OrderError::NoSuchSnapshot) => cluster.pass(20),
            Err(error) => panic!("{error:?}"),
        }
    }
    panic!("member {at} never begins");
}

/// A volume with a snapshot of 300 blocks and more written since, and a clone of it; who leads that, and what it reads as.
fn cloned(all: Members) -> (Cluster, usize, Vec<u8>) {
    let mut cluster = Cluster::of(all.clone(), &vec![DRIVE_BLOCKS; all.list.len()]);
    let leader = cluster.leader();
    fill(&mut cluster, leader, 1, 0, 300);
    assert_eq!(take(&mut cluster, leader, 1), Ok(()));
    fill(&mut cluster, leader, 2, 20, 40);
    for at in 0..cluster.nodes.len() {
        clone_at(&mut cluster, at, &clone_members(&all));
        assert_eq!(order_clone(&mut cluster, at, &clone_members(&all)), Ok(()), "the same again");
    }
    cluster.about(CLONE);
    let leader = cluster.leader();
    let model = pattern(1, 300 * BLOCK);
    reads(&mut cluster, leader, &model);
    (cluster, leader, model)
}

fn reads(cluster: &mut Cluster, at: usize, model: &[u8]) {
    for (no, bytes) in model.chunks(100 * BLOCK).enumerate() {
        assert!(cluster.read(at, no as u64 * 100 * B, bytes.len() as u64) == bytes, "blocks from {}", no * 100);
    }
}

fn write(cluster: &mut Cluster, at: usize, model: &mut Vec<u8>, seed: u8, first: u64, blocks: u64) {
    fill(cluster, at, seed, first, blocks);
    let end = (first + blocks) as usize * BLOCK;
    if model.len() < end {
        model.resize(end, 0);
    }
    model[first as usize * BLOCK..end].copy_from_slice(&pattern(seed, (blocks * B) as usize));
}

fn zero(cluster: &mut Cluster, at: usize, model: &mut [u8], first: u64, blocks: u64) {
    let zeroed = cluster.host(at, HostOp::Zero(Span { offset: first * B, len: blocks * B }), Vec::new());
    assert_eq!(zeroed.0, Status::Ok);
    model[first as usize * BLOCK..(first + blocks) as usize * BLOCK].fill(0);
}

fn taken(cluster: &Cluster, at: usize) -> u64 {
    let store = &cluster.nodes[at].store;
    store.usage(store.replica_of(CLONE).expect("it stands")).allocated_extents
}

fn all_equal(cluster: &mut Cluster, with_content: &[usize]) {
    cluster.audit();
    let first = cluster.contents(with_content[0]);
    for at in with_content {
        assert!(cluster.contents(*at) == first, "member {at} has other blocks");
    }
}

#[test]
fn clone_begins_as_the_snapshot_at_every_member_and_goes_its_own_way() {
    let (mut cluster, leader, mut model) = cloned(members(3));
    write(&mut cluster, leader, &mut model, 3, 5, 4);
    zero(&mut cluster, leader, &mut model, 100, 20);
    write(&mut cluster, leader, &mut model, 4, 400, 2);
    all_equal(&mut cluster, &[0, 1, 2]);
    assert!((0..3).all(|at| taken(&cluster, at) == 2), "what was written, and no more");
    for at in 0..3 {
        cluster.restart(at);
    }
    let leader = cluster.leader();
    reads(&mut cluster, leader, &model);
    all_equal(&mut cluster, &[0, 1, 2]);
    cluster.about(SEGMENT);
    let leader = cluster.leader();
    let mut origin = pattern(1, 300 * BLOCK);
    origin[20 * BLOCK..60 * BLOCK].copy_from_slice(&pattern(2, 40 * BLOCK));
    reads(&mut cluster, leader, &origin);
    cluster.audit();
}

#[test]
fn clone_serves_after_a_restart_though_nobody_hears_of_the_origin() {
    let (mut cluster, leader, mut model) = cloned(members(3));
    write(&mut cluster, leader, &mut model, 3, 5, 4);
    cluster.lose = |word| word.segment() == SEGMENT;
    for at in 0..3 {
        cluster.restart(at);
    }
    let leader = cluster.leader();
    reads(&mut cluster, leader, &model);
}

#[test]
fn member_whose_origin_is_behind_is_not_made_before_it_has_the_snapshot() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    let (behind, all) = ((leader + 1) % 3, clone_members(&members(3)));
    fill(&mut cluster, leader, 1, 0, 300);
    cluster.agree();
    cluster.isolate(behind);
    assert_eq!(take(&mut cluster, leader, 1), Ok(()));
    assert_eq!(order_clone(&mut cluster, behind, &all), Err(OrderError::NoSuchSnapshot));
    for round in 0..300u64 {
        fill(&mut cluster, leader, round as u8, 300 + round % 40 * 40, 40);
    }
    for at in (0..3).filter(|at| *at != behind) {
        clone_at(&mut cluster, at, &all);
    }
    assert!(cluster.view(leader).group.unwrap().first > cluster.view(behind).group.unwrap().last, "it has to be rebuilt");
    cluster.lose = |word| matches!(word, PeerWord::CopyAnswer(_));
    cluster.cut.clear();
    cluster.pass(1000);
    assert!(cluster.view(behind).rebuild.is_some());
    assert!(matches!(order_clone(&mut cluster, behind, &all), Err(OrderError::NotYet(_))), "its content is not whole");
    cluster.lose = |_| false;
    clone_at(&mut cluster, behind, &all);
    cluster.about(CLONE);
    let leader = cluster.leader();
    reads(&mut cluster, leader, &pattern(1, 300 * BLOCK));
    all_equal(&mut cluster, &[0, 1, 2]);
}

#[test]
fn snapshot_and_origin_do_not_go_before_the_clone() {
    let (mut cluster, _, model) = cloned(members(3));
    cluster.about(SEGMENT);
    let leader = cluster.leader();
    let stands = Err(OrderError::CloneStands("clone".into(), VolumeId([8; 16])));
    assert_eq!(remove(&mut cluster, leader, 1), stands);
    assert_eq!(cluster.order(0, Order::Delete { segment: SEGMENT }), stands);
    // Where no clone stands the leader does not know of the others: their stores keep what theirs stands on.
    cluster.order(leader, Order::Delete { segment: CLONE }).unwrap();
    assert_eq!(remove(&mut cluster, leader, 1), Ok(()));
    fill(&mut cluster, leader, 9, 0, 300);
    cluster.audit();
    for at in (0..3).filter(|at| *at != leader) {
        assert!(cluster.nodes[at].store.snapshots(ReplicaNo(0)).is_empty());
        cluster.restart(at);
    }
    cluster.audit();
    cluster.about(CLONE);
    let other = cluster.leader();
    reads(&mut cluster, other, &model);
    let held = cluster.nodes[other].store.usage(ReplicaNo(0)).snapshot_extents;
    assert!(held > 0);
    // The origin's other members have it no more: the clone's have.
    super::repair::rot(&mut cluster, other, 7);
    cluster.order(other, Order::ScrubStart).unwrap();
    cluster.pass(3000);
    assert_eq!(cluster.nodes[other].store.view().counters.repaired_blocks, 1);
    reads(&mut cluster, other, &model);
    cluster.order(other, Order::Delete { segment: CLONE }).unwrap();
    cluster.about(SEGMENT);
    cluster.audit();
    assert_eq!(cluster.nodes[other].store.usage(ReplicaNo(0)).snapshot_extents, 0, "it is merged now");
}

/// A fourth node, which has nothing of the origin, takes the place of `gone`.
fn replace(cluster: &mut Cluster, leader: usize, gone: usize) {
    let no = cluster.view(gone).me;
    change(cluster, leader, |members| members.list.retain(|member| member.no != no));
    cluster.order(gone, Order::Delete { segment: CLONE }).unwrap();
    let at = cluster.nodes.len();
    cluster.nodes.push(Bench::on_drive(at as u8 + 1, 9, DRIVE_BLOCKS));
    cluster.up.push(true);
    cluster.about(CLONE);
    let shape = clone_shape(at as u8 + 1);
    let row = |no| Member { no, role: Role::Learner, replica: shape.replica, node: NodeId([at as u8 + 1; 16]) };
    let members = change(cluster, leader, |members| {
        members.list.push(row(members.next));
        members.next = MemberNo(members.next.0 + 1);
    });
    cluster.order(at, Order::CreateMember { shape: Box::new(shape.clone()), members: Box::new(members) }).unwrap();
    for _ in 0..300 {
        cluster.pass(10);
        let view = cluster.view(at);
        if view.rebuild.is_none() && view.applied.0 > 0 {
            break;
        }
    }
    change(cluster, leader, |members| members.list.iter_mut().for_each(|member| member.role = Role::Voter));
}

#[test]
fn member_that_joins_where_the_origin_is_not_gets_all_of_it() {
    for kept in [false, true] {
        let (mut cluster, leader, mut model) = cloned(members(3));
        write(&mut cluster, leader, &mut model, 3, 5, 4);
        zero(&mut cluster, leader, &mut model, 100, 20);
        if kept {
            assert_eq!(take(&mut cluster, leader, 5), Ok(()));
            write(&mut cluster, leader, &mut model, 4, 30, 4);
        }
        let gone = (leader + 1) % 3;
        replace(&mut cluster, leader, gone);
        assert_eq!(cluster.nodes[3].store.view().counters.rebuilds, 1);
        let left: Vec<usize> = (0..4).filter(|at| *at != gone).collect();
        all_equal(&mut cluster, &left);
        assert!(taken(&cluster, 3) >= 300 / 16, "it stands on nothing");
        // It can lead: what it serves is its own. That it asks no more is known after a while.
        cluster.pass(2500);
        let to = cluster.view(3).me;
        cluster.order(leader, Order::Transfer { segment: CLONE, to }).unwrap();
        cluster.pass(500);
        assert_eq!(cluster.leader(), 3);
        write(&mut cluster, 3, &mut model, 7, 290, 20);
        cluster.restart(3);
        let leader = cluster.leader();
        reads(&mut cluster, leader, &model);
        all_equal(&mut cluster, &left);
    }
}

#[test]
fn member_left_behind_is_rebuilt_over_what_it_stands_on_or_without() {
    for flat in [false, true] {
        let (mut cluster, leader, mut model) = cloned(members(3));
        let gone = (leader + 1) % 3;
        if flat {
            replace(&mut cluster, leader, gone);
        }
        let (leader, behind) = (cluster.leader(), if flat { 3 } else { gone });
        let leader = if leader == behind {
            let to = cluster.view((0..3).find(|at| *at != gone).unwrap()).me;
            cluster.order(leader, Order::Transfer { segment: CLONE, to }).unwrap();
            cluster.pass(500);
            cluster.leader()
        } else {
            leader
        };
        let before = cluster.nodes[behind].store.view().counters;
        cluster.isolate(behind);
        for round in 0..300u64 {
            write(&mut cluster, leader, &mut model, round as u8, 200 + round % 4 * 40, 40);
        }
        zero(&mut cluster, leader, &mut model, 100, 30);
        cluster.cut.clear();
        for _ in 0..500 {
            cluster.pass(10);
            if cluster.view(behind).rebuild.is_none() && cluster.nodes[behind].store.view().counters.rebuilds > before.rebuilds {
                break;
            }
        }
        let after = cluster.nodes[behind].store.view().counters;
        assert_eq!(after.rebuilds, before.rebuilds + 1, "flat: {flat}");
        let copied = after.copies_taken - before.copies_taken;
        assert!(copied > 0 && copied <= 14, "what was written since and no more: {copied}");
        let all: Vec<usize> = (0..cluster.nodes.len()).filter(|at| !flat || *at != gone).collect();
        all_equal(&mut cluster, &all);
        reads(&mut cluster, leader, &model);
    }
}

#[test]
fn clone_of_two_and_a_log_has_a_log_only_member_that_needs_nothing() {
    let mut all = members(3);
    all.list[2].role = Role::LogOnly;
    let (mut cluster, leader, mut model) = cloned(all);
    write(&mut cluster, leader, &mut model, 3, 5, 4);
    cluster.kill(1 - leader);
    write(&mut cluster, leader, &mut model, 4, 9, 4);
    cluster.restart(1 - leader);
    for at in 0..3 {
        cluster.restart(at);
    }
    let leader = cluster.leader();
    reads(&mut cluster, leader, &model);
    all_equal(&mut cluster, &[0, 1]);
    assert_eq!(taken(&cluster, 2), 0);
}

#[test]
fn block_of_the_origin_that_rots_under_a_clone_comes_back_from_another_member() {
    let (mut cluster, leader, model) = cloned(members(3));
    all_equal(&mut cluster, &[0, 1, 2]);
    super::repair::rot(&mut cluster, leader, 7);
    reads(&mut cluster, leader, &model);
    cluster.pass(200);
    let counters = cluster.nodes[leader].store.view().counters;
    assert_eq!((counters.fetched_blocks, counters.repaired_blocks), (1, 1));
    assert_eq!(taken(&cluster, leader), 0, "it is put back where it lay");
    all_equal(&mut cluster, &[0, 1, 2]);
    cluster.lose = |word| matches!(word, PeerWord::FetchAsk(_));
    reads(&mut cluster, leader, &model);
}

#[test]
fn block_that_is_put_back_to_a_removed_origin_is_drained_before_that_is_merged() {
    let (mut cluster, _, model) = cloned(members(3));
    cluster.about(SEGMENT);
    let of = cluster.leader();
    cluster.order(of, Order::Delete { segment: CLONE }).unwrap();
    assert_eq!(remove(&mut cluster, of, 1), Ok(()));
    cluster.audit();
    cluster.about(CLONE);
    let other = cluster.leader();
    super::repair::rot(&mut cluster, other, 7);
    reads(&mut cluster, other, &model);
    cluster.pass(100);
    let node = &cluster.nodes[other].store;
    assert_eq!((node.view().counters.repaired_blocks, node.usage(ReplicaNo(0)).undrained_blocks), (1, 1));
    cluster.order(other, Order::Delete { segment: CLONE }).unwrap();
    assert_eq!(cluster.nodes[other].store.audit_promises(), Ok(()));
    cluster.about(SEGMENT);
    cluster.audit();
    assert_eq!(cluster.nodes[other].store.usage(ReplicaNo(0)).snapshot_extents, 0, "it is merged now");
}

#[test]
fn members_with_and_without_the_origin_find_no_difference_when_they_compare() {
    let (mut cluster, leader, mut model) = cloned(members(3));
    write(&mut cluster, leader, &mut model, 3, 5, 4);
    let gone = (leader + 1) % 3;
    replace(&mut cluster, leader, gone);
    all_equal(&mut cluster, &(0..4).filter(|at| *at != gone).collect::<Vec<_>>());
    for at in (0..4).filter(|at| *at != gone) {
        cluster.order(at, Order::ScrubStart).unwrap();
        cluster.pass(3000);
        let counters = cluster.nodes[at].store.view().counters;
        assert_eq!((counters.differing_extents, counters.corrupt_blocks), (0, 0), "node {at}");
    }
    assert!(cluster.nodes[3].store.view().counters.compared_extents > 0);
    reads(&mut cluster, leader, &model);
}

#[test]
fn zeros_that_a_member_without_the_origin_has_forgotten_come_to_one_that_stands_on_it() {
    let (mut cluster, leader, mut model) = cloned(members(3));
    let (gone, behind) = ((leader + 1) % 3, (leader + 2) % 3);
    replace(&mut cluster, leader, gone);
    cluster.pass(2500);
    let to = cluster.view(3).me;
    cluster.order(leader, Order::Transfer { segment: CLONE, to }).unwrap();
    cluster.pass(500);
    assert_eq!(cluster.leader(), 3);
    cluster.isolate(behind);
    zero(&mut cluster, 3, &mut model, 0, 300);
    let before = cluster.nodes[behind].store.view().counters.rebuilds;
    for round in 0..300u64 {
        write(&mut cluster, 3, &mut model, round as u8, 800 + round % 4 * 40, 40);
    }
    cluster.order(3, Order::Drain).unwrap();
    cluster.cut.clear();
    for _ in 0..500 {
        cluster.pass(10);
        if cluster.view(behind).rebuild.is_none() && cluster.nodes[behind].store.view().counters.rebuilds > before {
            break;
        }
    }
    assert_eq!(cluster.nodes[behind].store.view().counters.rebuilds, before + 1);
    all_equal(&mut cluster, &[leader, behind, 3]);
    let at = cluster.leader();
    reads(&mut cluster, at, &model);
}
