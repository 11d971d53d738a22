//! A member whose state is silently wrong is found by comparing, and copied anew where others agree; where nobody can tell who is right it is told.

use super::B;
use super::cluster::{Cluster, is_append, members};
use super::snapshots::{remove, take};
use crate::bench::{DRIVE_BLOCKS, SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::peer::{MemberNo, Members, Role};
use penstock_wire::*;

fn counters(cluster: &Cluster, at: usize) -> Counters {
    cluster.nodes[at].store.view().counters
}

fn drain(cluster: &mut Cluster) {
    for at in (0..cluster.nodes.len()).filter(|at| cluster.up[*at]).collect::<Vec<_>>() {
        cluster.order(at, Order::Drain).unwrap();
    }
}

/// Members with some hundred blocks of data in their extents, and who leads.
fn written(all: Members) -> (Cluster, usize) {
    let drives = vec![DRIVE_BLOCKS; all.list.len()];
    let mut cluster = Cluster::of(all, &drives);
    let leader = cluster.leader();
    for at in [0, 3, 200, 1700] {
        assert_eq!(cluster.write(leader, at * B, &pattern(at as u8, 40 * BLOCK)), Status::Ok);
    }
    cluster.agree();
    drain(&mut cluster);
    (cluster, leader)
}

/// What a member has of a block is another, and all checksums are right; or it is gone without a trace.
fn falsify(cluster: &mut Cluster, at: usize, block: u64, gone: bool) {
    let wrong = pattern(0xee, BLOCK);
    let node = &mut cluster.nodes[at];
    let no = node.store.replica_of(SEGMENT).unwrap();
    let rests = node.store.data_blocks().into_iter().find(|(of, at, ..)| (*of, *at) == (no, block));
    let (.., place, _) = rests.expect("it holds data");
    assert!(node.store.falsify(no, block, place, (!gone).then(|| crc32c(&wrong))), "it rests in an extent");
    let first = (node.label.stores[0].start.0 + place.0) as usize * BLOCK;
    node.media[first..first + BLOCK].copy_from_slice(&wrong);
}

fn scrub(cluster: &mut Cluster, at: usize) {
    cluster.order(at, Order::ScrubStart).unwrap();
    for _ in 0..1000 {
        if cluster.nodes[at].store.view().scrub_permille.is_none() {
            return cluster.pass(1000);
        }
        cluster.pass(10);
    }
    panic!("the scrub does not end");
}

/// The first member's scrub has asked for digests, member 3 has not heard it, and then its answer is as of a write that member 2's is not.
fn scrub_with_one_answer_of_another_time(cluster: &mut Cluster, after_the_write: impl FnOnce(&mut Cluster)) {
    let leader = cluster.leader();
    cluster.hold = |word| matches!(word, PeerWord::DigestAsk(ask) if ask.to == MemberNo(3));
    cluster.order(0, Order::ScrubStart).unwrap();
    while cluster.held.is_empty() {
        assert!(cluster.nodes[0].store.view().scrub_permille.is_some());
        cluster.pass(10);
    }
    assert_eq!(cluster.write(leader, 4 * B, &pattern(77, BLOCK)), Status::Ok);
    cluster.agree();
    after_the_write(cluster);
    cluster.hold = |_| false;
    cluster.release();
    cluster.pass(2000);
    drain(cluster);
}

/// The first map page of a layer of a member rots, wherever it is on the drive.
pub fn lose_map_page(cluster: &mut Cluster, at: usize, layer: u32) {
    let name = [layer.to_le_bytes(), [0; 4]].concat();
    let is_page = |block: &&mut [u8]| block.starts_with(b"PENSMAP1") && block[36..44] == name;
    let pages: Vec<&mut [u8]> = cluster.nodes[at].media.chunks_exact_mut(BLOCK).filter(is_page).collect();
    assert!(!pages.is_empty());
    pages.into_iter().for_each(|page| page[100] ^= 1);
}

/// The same of the volume's only layer, and the member comes back.
fn lose_map_pages(cluster: &mut Cluster, at: usize) {
    cluster.pass(1000);
    drain(cluster);
    lose_map_page(cluster, at, 0);
    cluster.restart(at);
    cluster.agree();
}

fn told(cluster: &Cluster, at: usize) -> Vec<(u64, bool)> {
    let of = |notice: &Notice| if let Notice::Differs { block, mends, .. } = notice { Some((*block, *mends)) } else { None };
    cluster.nodes[at].notices.iter().filter_map(of).collect()
}

#[test]
fn block_that_is_silently_wrong_is_copied_anew_whoever_scrubs() {
    for (gone, leads, scrubs_itself) in
        [(false, true, true), (false, false, true), (true, true, false), (true, false, false), (false, false, false)]
    {
        let (mut cluster, leader) = written(members(3));
        let wrong = if leads { leader } else { (leader + 1) % 3 };
        let scrubs = if scrubs_itself { wrong } else { (wrong + 1) % 3 };
        let good = cluster.contents(wrong);
        falsify(&mut cluster, wrong, 5, gone);
        assert!(cluster.contents(wrong) != good);
        scrub(&mut cluster, scrubs);
        drain(&mut cluster);
        assert!(cluster.contents(wrong) == good, "gone: {gone}, leads: {leads}, scrubs: {scrubs_itself}");
        assert_eq!(told(&cluster, wrong), [(0, true)]);
        assert_eq!((counters(&cluster, wrong).differing_extents, counters(&cluster, wrong).mended_extents), (1, 1));
        let others: Vec<usize> = (0..3).filter(|at| *at != wrong).collect();
        assert!(others.iter().all(|at| told(&cluster, *at).is_empty() && counters(&cluster, *at).mended_extents == 0));
        let leader = cluster.leader();
        assert!(cluster.read(leader, 3 * B, 40 * B) == pattern(3, 40 * BLOCK));
        cluster.audit();
        (0..3).for_each(|at| scrub(&mut cluster, at));
        assert!((0..3).all(|at| counters(&cluster, at).differing_extents == u64::from(at == wrong)), "once is enough");
        assert!(counters(&cluster, scrubs).compared_extents >= 96);
    }
}

#[test]
fn block_that_is_wrong_stays_mended_over_a_restart() {
    let (mut cluster, leader) = written(members(3));
    let wrong = (leader + 1) % 3;
    let good = cluster.contents(wrong);
    falsify(&mut cluster, wrong, 1701, false);
    scrub(&mut cluster, wrong);
    assert_eq!(counters(&cluster, wrong).mended_extents, 1);
    // The copy is in the log alone.
    cluster.restart(wrong);
    cluster.agree();
    assert!(cluster.contents(wrong) == good);
    cluster.audit();
    assert!(cluster.contents(wrong) == good);
}

#[test]
fn members_that_write_meanwhile_differ_nowhere() {
    let (mut cluster, leader) = written(members(3));
    (0..3).for_each(|at| cluster.order(at, Order::ScrubStart).unwrap());
    for round in 0..60u64 {
        let at = round * 31 % 500;
        assert_eq!(cluster.write(leader, at * B, &pattern(round as u8, 30 * BLOCK)), Status::Ok);
        let span = Span { offset: (round * 17 % 600) * B, len: 9 * B };
        assert_eq!(cluster.host(leader, HostOp::Zero(span), Vec::new()).0, Status::Ok);
    }
    cluster.pass(2000);
    for at in 0..3 {
        let of = counters(&cluster, at);
        assert!(of.compared_extents > 40 && of.differing_extents == 0, "{of:?}");
    }
    cluster.audit();
}

#[test]
fn extent_that_is_written_on_while_it_is_mended_keeps_what_is_newer() {
    let (mut cluster, leader) = written(members(3));
    falsify(&mut cluster, leader, 5, false);
    cluster.hold = |word| matches!(word, PeerWord::CopyAnswer(_));
    scrub(&mut cluster, leader);
    assert_eq!(cluster.write(leader, 4 * B, &pattern(77, BLOCK)), Status::Ok);
    cluster.hold = |_| false;
    cluster.release();
    cluster.pass(2000);
    drain(&mut cluster);
    let other = (leader + 1) % 3;
    assert!(cluster.contents(leader) == cluster.contents(other));
    let leader = cluster.leader();
    assert!(cluster.read(leader, 4 * B, B) == pattern(77, BLOCK));
    cluster.audit();
}

#[test]
fn two_that_differ_are_told_of_and_left() {
    let mut all = members(3);
    all.list[2].role = Role::LogOnly;
    let (mut cluster, leader) = written(all);
    let other = 1 - leader;
    falsify(&mut cluster, other, 5, false);
    let before = [cluster.contents(0), cluster.contents(1)];
    scrub(&mut cluster, leader);
    for at in 0..2 {
        assert_eq!(told(&cluster, at), [(0, false)], "node {at}");
        assert_eq!((counters(&cluster, at).differing_extents, counters(&cluster, at).mended_extents), (1, 0));
    }
    assert!(told(&cluster, 2).is_empty());
    drain(&mut cluster);
    assert!([cluster.contents(0), cluster.contents(1)] == before, "nothing is guessed");
    scrub(&mut cluster, leader);
    assert_eq!((told(&cluster, leader).len(), told(&cluster, other).len()), (2, 1), "each pass tells it");
}

#[test]
fn two_of_three_that_differ_wait_for_the_third_to_decide() {
    let (mut cluster, leader) = written(members(3));
    let (wrong, away) = ((leader + 1) % 3, (leader + 2) % 3);
    let good = cluster.contents(wrong);
    falsify(&mut cluster, wrong, 5, false);
    cluster.isolate(away);
    cluster.order(wrong, Order::ScrubStart).unwrap();
    cluster.pass(1000);
    assert!(told(&cluster, wrong).is_empty());
    cluster.cut.clear();
    cluster.pass(4000);
    drain(&mut cluster);
    assert!(cluster.contents(wrong) == good);
    assert_eq!(told(&cluster, wrong), [(0, true)]);
    cluster.isolate(away);
    falsify(&mut cluster, wrong, 1701, false);
    cluster.order(wrong, Order::ScrubStart).unwrap();
    cluster.pass(6000);
    assert_eq!(told(&cluster, wrong)[1..], [(1696, false)], "it may not come back");
}

#[test]
fn answers_as_of_different_entries_decide_once_they_are_asked_for_together() {
    let (mut cluster, _) = written(members(3));
    scrub_with_one_answer_of_another_time(&mut cluster, |cluster| {
        drain(cluster);
        falsify(cluster, 0, 5, false);
    });
    assert_eq!(told(&cluster, 0), [(0, true)]);
    assert!(cluster.contents(0) == cluster.contents(1));
    assert!(told(&cluster, 1).is_empty() && told(&cluster, 2).is_empty());
    cluster.audit();
}

#[test]
fn extent_that_the_map_has_forgotten_was_not_always_nothing() {
    let (mut cluster, leader) = written(members(5));
    // It alone is on its page of the map.
    assert_eq!(cluster.write(leader, 1000 * B, &pattern(9, BLOCK)), Status::Ok);
    cluster.agree();
    drain(&mut cluster);
    cluster.hold = |word| matches!(word, PeerWord::DigestAsk(ask) if (ask.to, ask.page_no) == (MemberNo(3), 1));
    cluster.order(0, Order::ScrubStart).unwrap();
    while cluster.held.is_empty() {
        assert!(cluster.nodes[0].store.view().scrub_permille.is_some());
        cluster.pass(10);
    }
    // The others have answered, and one more is waited for.
    let span = Span { offset: 1000 * B, len: B };
    assert_eq!(cluster.host(leader, HostOp::Zero(span), Vec::new()).0, Status::Ok);
    cluster.agree();
    cluster.order(0, Order::Drain).unwrap();
    cluster.hold = |_| false;
    cluster.release();
    cluster.pass(2000);
    assert!((0..5).all(|at| told(&cluster, at).is_empty()), "{:?}", told(&cluster, 0));
    cluster.audit();
}

#[test]
fn blocks_that_are_lost_are_what_who_is_as_of_the_newest_entry_has() {
    let (mut cluster, _) = written(members(3));
    lose_map_pages(&mut cluster, 0);
    scrub_with_one_answer_of_another_time(&mut cluster, |_| ());
    assert!((0..3).all(|at| told(&cluster, at).is_empty()));
    assert!(cluster.contents(0) == cluster.contents(1), "{:?}", counters(&cluster, 0));
}

#[test]
fn member_that_is_rebuilt_or_lags_is_not_held_against_anybody() {
    let (mut cluster, leader) = written(members(3));
    let behind = (leader + 1) % 3;
    cluster.isolate(behind);
    for round in 0..400 {
        assert_eq!(cluster.write(leader, (20 + round) * B, &pattern(round as u8, 40 * BLOCK)), Status::Ok);
    }
    (0..3).for_each(|at| cluster.order(at, Order::ScrubStart).unwrap());
    cluster.cut.clear();
    for _ in 0..300 {
        cluster.pass(10);
    }
    assert_eq!(counters(&cluster, behind).rebuilds, 1);
    assert!(cluster.view(behind).rebuild.is_none(), "it is whole");
    (0..3).for_each(|at| scrub(&mut cluster, at));
    assert!((0..3).all(|at| counters(&cluster, at).differing_extents == 0));
    cluster.audit();
}

#[test]
fn blocks_of_a_map_page_that_is_lost_come_back_from_the_others() {
    let (mut cluster, leader) = written(members(3));
    let wrong = (leader + 1) % 3;
    let good = cluster.contents(wrong);
    lose_map_pages(&mut cluster, wrong);
    scrub(&mut cluster, wrong);
    drain(&mut cluster);
    assert!(cluster.contents(wrong) == good, "{:?}", counters(&cluster, wrong));
    assert!(counters(&cluster, wrong).mended_extents > 2);
    scrub(&mut cluster, wrong);
    let to = cluster.view(wrong).me;
    cluster.pass(2100);
    cluster.order(leader, Order::Transfer { segment: SEGMENT, to }).unwrap();
    cluster.pass(200);
    assert_eq!(cluster.leader(), wrong);
    assert!(cluster.read(wrong, 3 * B, 40 * B) == pattern(3, 40 * BLOCK));
}

#[test]
fn snapshot_that_is_silently_wrong_is_mended_in_its_layer() {
    let (mut cluster, leader) = written(members(3));
    let wrong = (leader + 1) % 3;
    let take = |cluster: &mut Cluster, no: u8| {
        let shape = layer::SnapshotShape { id: SnapshotId([no; 16]), name: "s".into() };
        cluster.order(leader, Order::Snapshot { segment: SEGMENT, snapshot: Box::new(shape) }).unwrap();
    };
    falsify(&mut cluster, wrong, 5, false);
    falsify(&mut cluster, wrong, 201, true);
    take(&mut cluster, 1);
    assert_eq!(cluster.write(leader, 202 * B, &pattern(8, 3 * BLOCK)), Status::Ok);
    take(&mut cluster, 2);
    cluster.agree();
    drain(&mut cluster);
    scrub(&mut cluster, (wrong + 1) % 3);
    scrub(&mut cluster, wrong);
    drain(&mut cluster);
    let whole = cluster.contents(leader);
    assert!(cluster.contents(wrong) == whole);
    let kept = |cluster: &Cluster, at: usize| {
        let node = &cluster.nodes[at];
        let (start, no) = (node.label.stores[0].start.0, node.store.replica_of(SEGMENT).unwrap());
        let read = |block: BlockAddr| node.media[(start + block.0) as usize * BLOCK..][..BLOCK].try_into().unwrap();
        let of = |view: SnapshotView| node.store.snapshot_contents(no, view.layer, read).unwrap();
        node.store.snapshots(no).into_iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(kept(&cluster, wrong).len(), 2);
    assert!(kept(&cluster, wrong) == kept(&cluster, leader));
    cluster.audit();
}

#[test]
fn extent_is_not_mended_by_who_still_has_the_snapshot_beneath() {
    let (mut cluster, leader) = written(members(3));
    if leader != 1 {
        cluster.order(leader, Order::Transfer { segment: SEGMENT, to: MemberNo(2) }).unwrap();
        cluster.pass(300);
    }
    assert_eq!(take(&mut cluster, 1, 1), Ok(()));
    assert_eq!(cluster.write(1, 4 * B, &pattern(8, BLOCK)), Status::Ok);
    cluster.agree();
    drain(&mut cluster);
    cluster.lose = |word| is_append(word) && matches!(word, PeerWord::Group(message) if message.to == MemberNo(1));
    assert_eq!(remove(&mut cluster, 1, 1), Ok(()));
    cluster.pass(1000);
    let layers = |cluster: &Cluster, at: usize| cluster.nodes[at].store.usage(ReplicaNo(0)).snapshot_extents > 0;
    assert_eq!([0, 1, 2].map(|at| layers(&cluster, at)), [true, false, false]);
    let good = cluster.contents(2);
    falsify(&mut cluster, 2, 4, false);
    scrub(&mut cluster, 2);
    cluster.pass(3000);
    drain(&mut cluster);
    assert_eq!(counters(&cluster, 2).mended_extents, 1);
    assert!(cluster.contents(2) == good);
    cluster.lose = |_| false;
    cluster.audit();
    assert!(cluster.contents(2) == cluster.contents(0));
}
