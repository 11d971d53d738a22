//! Snapshots of a volume with three replicas: ordered where it leads, the same everywhere, and brought by a rebuild.

use super::B;
use super::cluster::{Cluster, is_append};
use crate::bench::{SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::layer::SnapshotShape;
use penstock_wire::*;

const BLOCKS: u64 = 400;

pub fn id(no: u8) -> SnapshotId {
    SnapshotId([no; 16])
}

pub fn take(cluster: &mut Cluster, at: usize, no: u8) -> Result<(), OrderError> {
    cluster.order(
        at,
        Order::Snapshot { segment: cluster.nodes[at].segment, snapshot: Box::new(SnapshotShape { id: id(no), name: format!("s{no}") }) },
    )
}

pub fn remove(cluster: &mut Cluster, at: usize, no: u8) -> Result<(), OrderError> {
    cluster.order(at, Order::Unsnapshot { segment: cluster.nodes[at].segment, snapshot: id(no) })
}

pub fn fill(cluster: &mut Cluster, at: usize, seed: u8, first: u64, blocks: u64) {
    assert_eq!(cluster.write(at, first * B, &pattern(seed, (blocks * B) as usize)), Status::Ok);
}

/// Number of the snapshot, its marker's entry, its size and what it holds.
type Held = (SnapshotId, Index, u64, Contents);

fn held(cluster: &Cluster, at: usize) -> Vec<Held> {
    let node = &cluster.nodes[at];
    let views = node.store.snapshots(ReplicaNo(0));
    let start = node.label.stores[0].start.0;
    let read = |block: BlockAddr| node.media[(start + block.0) as usize * BLOCK..][..BLOCK].try_into().unwrap();
    let contents = |layer| node.store.snapshot_contents(ReplicaNo(0), layer, read).unwrap();
    views.into_iter().map(|view| (view.snapshot.id, view.at, view.blocks, contents(view.layer))).collect()
}

fn all_hold(cluster: &mut Cluster, snapshots: &[u8]) {
    cluster.agree();
    let first = held(cluster, 0);
    assert_eq!(first.iter().map(|(id, ..)| *id).collect::<Vec<_>>(), snapshots.iter().map(|no| id(*no)).collect::<Vec<_>>());
    for at in 1..3 {
        assert!(held(cluster, at) == first, "member {at} has other snapshots, or other blocks in them");
    }
}

#[test]
fn snapshot_is_taken_and_removed_where_the_volume_leads_and_is_the_same_everywhere() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    fill(&mut cluster, leader, 1, 0, 40);
    for order in [take, remove] {
        assert!(matches!(order(&mut cluster, (leader + 1) % 3, 1), Err(OrderError::NotLeader(Some(_)))));
    }
    assert_eq!(take(&mut cluster, leader, 1), Ok(()));
    assert_eq!(take(&mut cluster, leader, 1), Ok(()), "the same again");
    fill(&mut cluster, leader, 2, 10, 20);
    let zeroed = cluster.host(leader, HostOp::Zero(Span { offset: 35 * B, len: 5 * B }), Vec::new());
    assert_eq!(zeroed.0, Status::Ok);
    assert_eq!(take(&mut cluster, leader, 2), Ok(()));
    fill(&mut cluster, leader, 3, 0, 5);
    all_hold(&mut cluster, &[1, 2]);
    let layer = cluster.nodes[leader].store.snapshots(ReplicaNo(0))[0].layer;
    let span = Span { offset: 0, len: 40 * B };
    let (status, bytes) = cluster.host(leader, HostOp::ReadSnapshot(layer, span), vec![0; span.len as usize]);
    assert!(status == Status::Ok && bytes == pattern(1, span.len as usize), "the first is as it was");
    assert_eq!(remove(&mut cluster, leader, 1), Ok(()));
    assert_eq!(remove(&mut cluster, leader, 1), Ok(()), "the same again");
    all_hold(&mut cluster, &[2]);
    // Another that leads knows them too.
    let next = (leader + 1) % 3;
    let to = cluster.view(next).me;
    cluster.order(leader, Order::Transfer { segment: SEGMENT, to }).unwrap();
    cluster.pass(300);
    assert_eq!(cluster.leader(), next);
    assert_eq!(take(&mut cluster, next, 3), Ok(()));
    all_hold(&mut cluster, &[2, 3]);
}

#[test]
fn member_left_behind_gets_the_snapshots_that_it_missed_and_loses_those_that_went() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    let behind = (leader + 1) % 3;
    fill(&mut cluster, leader, 1, 0, 64);
    assert_eq!((take(&mut cluster, leader, 1), take(&mut cluster, leader, 2)), (Ok(()), Ok(())));
    fill(&mut cluster, leader, 2, 8, 30);
    cluster.agree();
    cluster.isolate(behind);
    let leader = cluster.leader();
    assert_eq!(take(&mut cluster, leader, 3), Ok(()));
    assert_eq!(cluster.host(leader, HostOp::Zero(Span { offset: 16 * B, len: 40 * B }), Vec::new()).0, Status::Ok);
    assert_eq!(take(&mut cluster, leader, 4), Ok(()));
    assert_eq!(remove(&mut cluster, leader, 1), Ok(()));
    for round in 0..200u64 {
        fill(&mut cluster, leader, round as u8, 64 + round * 16 % (BLOCKS - 128), 40);
        if round == 100 {
            assert_eq!((take(&mut cluster, leader, 5), remove(&mut cluster, leader, 3)), (Ok(()), Ok(())));
        }
    }
    cluster.pass(2000);
    let begins = cluster.view(leader).group.unwrap().first;
    assert!(begins > cluster.view(behind).group.unwrap().last, "the leader's log still has it all");
    cluster.cut.clear();
    for _ in 0..500 {
        cluster.pass(10);
        if cluster.view(behind).rebuild.is_none() && cluster.nodes[behind].store.view().counters.rebuilds > 0 {
            break;
        }
    }
    assert_eq!(cluster.nodes[behind].store.view().counters.rebuilds, 1);
    all_hold(&mut cluster, &[2, 4, 5]);
    // And knows them after a restart.
    cluster.kill(behind);
    cluster.restart(behind);
    all_hold(&mut cluster, &[2, 4, 5]);
}

#[test]
fn marker_that_comes_twice_in_a_turn_counts_once_for_what_is_behind_it() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    fill(&mut cluster, leader, 1, 0, 64);
    if leader == 2 {
        cluster.order(leader, Order::Transfer { segment: SEGMENT, to: peer::MemberNo(1) }).unwrap();
        cluster.pass(300);
    }
    let leader = cluster.leader();
    assert_eq!(take(&mut cluster, leader, 1), Ok(()));
    cluster.agree();
    cluster.hold = |word| is_append(word) && matches!(word, PeerWord::Group(message) if message.to == peer::MemberNo(3));
    assert_eq!(take(&mut cluster, leader, 2), Ok(()));
    fill(&mut cluster, leader, 2, 20, 1);
    // It hears that they are committed with what follows.
    while cluster.held.pop_if(|(.., payload)| payload.is_empty()).is_some() {}
    let first = cluster.held.clone();
    assert_eq!(take(&mut cluster, leader, 3), Ok(()));
    fill(&mut cluster, leader, 3, 20, 1);
    let second = std::mem::replace(&mut cluster.held, [first.clone(), first.clone()].concat()).split_off(first.len());
    cluster.hold = |_| false;
    cluster.release();
    cluster.held = second;
    cluster.release();
    assert_eq!(cluster.applied(2), cluster.applied(leader));
    cluster.nodes[2].store.audit_promises().unwrap();
    all_hold(&mut cluster, &[1, 2, 3]);
    cluster.audit();
}
