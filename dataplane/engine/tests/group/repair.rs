//! Blocks that rot on one member's drive come back from another's, wherever the rot is found; what rots everywhere is lost alone.

use super::B;
use super::cluster::{Cluster, is_append};
use crate::bench::{SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::*;

/// One byte of a block of the volume turns, where the member's drive has it.
pub fn rot(cluster: &mut Cluster, at: usize, block: u64) {
    let newest = cluster.contents(at)[&block].expect("it is not lost");
    let node = &mut cluster.nodes[at];
    let found = node.store.data_blocks().into_iter().find(|(_, of, _, crc)| (*of, *crc) == (block, newest));
    let (_, _, place, crc) = found.expect("the member has it");
    let first = (node.label.stores[0].start.0 + place.0) as usize * BLOCK;
    let bytes = &mut node.media[first..first + BLOCK];
    assert_eq!(crc32c(bytes), crc, "it is whole before");
    bytes[77] ^= 4;
}

/// Every block that a member has is what its checksum says.
fn is_whole(cluster: &Cluster, at: usize) -> bool {
    let node = &cluster.nodes[at];
    let start = node.label.stores[0].start.0;
    let bytes = |place: BlockAddr| &node.media[(start + place.0) as usize * BLOCK..][..BLOCK];
    let blocks = node.store.data_blocks();
    !blocks.is_empty() && blocks.iter().all(|(_, _, place, crc)| crc32c(bytes(*place)) == *crc)
}

pub fn counters(cluster: &Cluster, at: usize) -> Counters {
    cluster.nodes[at].store.view().counters
}

fn drain(cluster: &mut Cluster) {
    for at in (0..3).filter(|at| cluster.up[*at]).collect::<Vec<_>>() {
        cluster.order(at, Order::Drain).unwrap();
    }
}

/// A volume with ten blocks of data that all members have, in their extents or in their logs.
fn written(drained: bool) -> (Cluster, usize, Vec<u8>) {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    let data = pattern(3, 10 * BLOCK);
    assert_eq!(cluster.write(leader, 0, &data), Status::Ok);
    cluster.agree();
    if drained {
        drain(&mut cluster);
    }
    (cluster, leader, data)
}

#[test]
fn block_that_rots_at_the_leader_is_read_from_a_follower_and_put_back() {
    for (drained, direct) in [(true, false), (true, true), (false, false), (false, true)] {
        let (mut cluster, leader, data) = written(drained);
        cluster.nodes[leader].mem.direct = direct;
        rot(&mut cluster, leader, 4);
        rot(&mut cluster, leader, 5);
        assert!(!is_whole(&cluster, leader));
        assert!(cluster.read(leader, 0, 10 * B) == data);
        cluster.pass(50);
        let of = counters(&cluster, leader);
        assert_eq!((of.corrupt_blocks, of.fetched_blocks, of.repaired_blocks, of.unrepaired_blocks), (2, 2, 2, 0));
        drain(&mut cluster);
        assert!(is_whole(&cluster, leader));
        assert!(cluster.contents(leader) == cluster.contents(3 - leader - (leader + 1) % 3));
        cluster.audit();
    }
}

#[test]
fn partial_write_merges_with_the_block_that_came_from_a_follower() {
    let (mut cluster, leader, mut data) = written(true);
    rot(&mut cluster, leader, 4);
    assert_eq!(cluster.write(leader, 4 * B + 512, &[7; 512]), Status::Ok);
    data[4 * BLOCK + 512..][..512].fill(7);
    assert!(cluster.read(leader, 0, 10 * B) == data);
    cluster.audit();
}

#[test]
fn block_that_rots_at_a_follower_is_found_by_its_scrub_and_put_back() {
    let (mut cluster, leader, _) = written(true);
    let follower = (leader + 1) % 3;
    rot(&mut cluster, follower, 7);
    cluster.order(follower, Order::ScrubStart).unwrap();
    cluster.pass(500);
    assert_eq!(counters(&cluster, follower).repaired_blocks, 1);
    cluster.order(follower, Order::Drain).unwrap();
    assert!(is_whole(&cluster, follower));
    cluster.audit();
}

#[test]
fn block_that_rots_in_the_log_is_whole_after_the_drain() {
    let (mut cluster, leader, data) = written(false);
    rot(&mut cluster, leader, 2);
    cluster.order(leader, Order::Drain).unwrap();
    cluster.pass(50);
    assert_eq!(counters(&cluster, leader).repaired_blocks, 1);
    cluster.order(leader, Order::Drain).unwrap();
    assert!(is_whole(&cluster, leader));
    assert!(cluster.read(leader, 0, 10 * B) == data);
    cluster.audit();
}

#[test]
fn applied_entry_that_rots_in_the_log_is_known_by_its_checksum_after_a_restart() {
    let (mut cluster, leader, data) = written(false);
    rot(&mut cluster, leader, 2);
    let other = (leader + 1) % 3;
    let whole = cluster.contents(other);
    cluster.kill(leader);
    cluster.restart(leader);
    cluster.agree();
    assert!(cluster.contents(leader) == whole);
    let leader = cluster.leader();
    assert!(cluster.read(leader, 0, 10 * B) == data);
    drain(&mut cluster);
    cluster.pass(50);
    drain(&mut cluster);
    assert!((0..3).all(|at| is_whole(&cluster, at)));
}

#[test]
fn block_that_rots_everywhere_fails_alone_until_it_is_written() {
    let (mut cluster, leader, data) = written(true);
    (0..3).for_each(|at| rot(&mut cluster, at, 4));
    let read = |cluster: &mut Cluster, first: u64, blocks: u64| {
        let span = Span { offset: first * B, len: blocks * B };
        cluster.host(leader, HostOp::Read(span), vec![0xcc; (blocks * B) as usize])
    };
    assert_eq!(read(&mut cluster, 3, 3).0, Status::Unrecovered);
    assert!(read(&mut cluster, 4, 1) == (Status::Unrecovered, vec![0xcc; BLOCK]));
    assert!(read(&mut cluster, 0, 4) == (Status::Ok, data[..4 * BLOCK].to_vec()));
    assert!(read(&mut cluster, 5, 5) == (Status::Ok, data[5 * BLOCK..].to_vec()));
    assert!(counters(&cluster, leader).unrepaired_blocks > 0);
    assert_eq!(cluster.write(leader, 4 * B, &pattern(9, BLOCK)), Status::Ok);
    assert!(read(&mut cluster, 4, 1) == (Status::Ok, pattern(9, BLOCK)));
    cluster.audit();
}

#[test]
fn older_block_of_a_member_that_lags_is_never_taken() {
    let (mut cluster, leader, _) = written(true);
    let (lags, other) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.isolate(lags);
    let newer = pattern(9, BLOCK);
    assert_eq!(cluster.write(leader, 4 * B, &newer), Status::Ok);
    cluster.agree_among(&[leader, other]);
    rot(&mut cluster, leader, 4);
    rot(&mut cluster, other, 4);
    cluster.cut.clear();
    cluster.lose = is_append;
    let read = |cluster: &mut Cluster| {
        let (status, bytes) = cluster.host_within(leader, HostOp::Read(Span { offset: 4 * B, len: B }), vec![0xcc; BLOCK], 4000);
        assert!(bytes.iter().all(|byte| *byte == 0xcc), "nothing of it was answered");
        assert_eq!(counters(cluster, leader).fetched_blocks, 0);
        status
    };
    assert_eq!(read(&mut cluster), Status::NotReady, "who lags may come to have it");
    cluster.lose = |_| false;
    cluster.pass(5000);
    assert_eq!(read(&mut cluster), Status::Unrecovered);
    assert!(cluster.view(lags).rebuild.is_none(), "it is whole but for what nobody has");
}

#[test]
fn block_that_only_a_member_that_is_away_may_have_is_not_said_to_be_lost() {
    let (mut cluster, leader, data) = written(true);
    let (away, other) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.isolate(away);
    rot(&mut cluster, leader, 4);
    rot(&mut cluster, other, 4);
    let op = HostOp::Read(Span { offset: 4 * B, len: B });
    assert_eq!(cluster.host_within(leader, op, vec![0xcc; BLOCK], 4000).0, Status::NotReady);
    cluster.cut.clear();
    cluster.pass(500);
    assert!(cluster.read(leader, 0, 10 * B) == data);
}

fn is_ask(word: &PeerWord) -> bool {
    matches!(word, PeerWord::FetchAsk(_))
}

#[test]
fn block_that_is_overwritten_while_others_are_asked_for_it_is_read_as_it_is_then() {
    let (mut cluster, leader, _) = written(true);
    rot(&mut cluster, leader, 4);
    cluster.lose = is_ask;
    let span = Span { offset: 4 * B, len: B };
    let io = cluster.begin(leader, HostOp::Read(span), vec![0xcc; BLOCK]);
    cluster.pass(50);
    let newer = pattern(9, BLOCK);
    assert_eq!(cluster.write(leader, 4 * B, &newer), Status::Ok);
    cluster.lose = |_| false;
    cluster.pass(2500);
    assert_eq!(cluster.reply(leader, io), Some(Status::Ok), "all others differ, and are right");
    assert!(cluster.nodes[leader].mem.host.remove(&io) == Some(newer));
    cluster.audit();
}

#[test]
fn fenced_drive_tells_a_partial_write_of_a_member_to_try_elsewhere() {
    let (mut cluster, leader, _) = written(true);
    cluster.nodes[leader].late = 50;
    let io = cluster.begin(leader, HostOp::Write(Span { offset: 4 * B + 512, len: 512 }), vec![7; 512]);
    cluster.run();
    assert!(cluster.nodes[leader].store.view().disk_out > 0, "what it merges with is being read");
    let node = &mut cluster.nodes[leader];
    node.store.apply(Event::Fence(FenceReason::Drive), &mut node.mem, &mut node.fx);
    cluster.pass(100);
    assert_eq!(cluster.reply(leader, io), Some(Status::NotReady));
}

#[test]
fn copies_to_a_member_that_is_rebuilt_are_whole_where_the_source_rots() {
    let (mut cluster, leader, _) = written(true);
    let behind = (leader + 1) % 3;
    cluster.isolate(behind);
    for round in 0..400 {
        assert_eq!(cluster.write(leader, (20 + round) * B, &pattern(round as u8, 40 * BLOCK)), Status::Ok);
    }
    drain(&mut cluster);
    for block in [100, 101, 333] {
        rot(&mut cluster, leader, block);
    }
    cluster.cut.clear();
    cluster.pass(1000);
    assert!(cluster.view(behind).rebuild.is_none(), "it is whole");
    assert_eq!(counters(&cluster, behind).rebuilds, 1);
    assert!(cluster.contents(behind) == cluster.contents(leader));
    assert_eq!(counters(&cluster, leader).fetched_blocks, 3);
}

#[test]
fn entry_that_rots_in_the_leaders_log_is_sent_with_a_block_of_another_member() {
    let (mut cluster, leader, _) = written(true);
    let behind = (leader + 1) % 3;
    cluster.isolate(behind);
    assert_eq!(cluster.write(leader, 4 * B, &pattern(9, BLOCK)), Status::Ok);
    rot(&mut cluster, leader, 4);
    cluster.cut.clear();
    cluster.pass(500);
    cluster.agree();
    assert_eq!(counters(&cluster, behind).rebuilds, 0, "its log was enough");
    assert!(cluster.contents(behind) == cluster.contents(leader));
}

#[test]
fn entry_that_rots_and_that_nobody_can_give_is_replaced_by_an_install() {
    let (mut cluster, leader, _) = written(true);
    let behind = (leader + 1) % 3;
    cluster.isolate(behind);
    assert_eq!(cluster.write(leader, 4 * B, &pattern(9, BLOCK)), Status::Ok);
    rot(&mut cluster, leader, 4);
    // Nobody has that version as its newest any more.
    assert_eq!(cluster.write(leader, 4 * B, &pattern(10, BLOCK)), Status::Ok);
    assert_eq!(cluster.write(leader, 9 * B, &pattern(11, BLOCK)), Status::Ok);
    cluster.cut.clear();
    cluster.pass(5000);
    cluster.agree();
    assert_eq!(counters(&cluster, behind).rebuilds, 1);
    assert!(cluster.view(behind).rebuild.is_none(), "it is whole");
    assert!(cluster.contents(behind) == cluster.contents(leader));
    assert!(cluster.read(leader, 4 * B, B) == pattern(10, BLOCK));
    cluster.audit();
    let to = cluster.view(behind).me;
    cluster.pass(2100);
    cluster.order(leader, Order::Transfer { segment: SEGMENT, to }).unwrap();
    cluster.pass(200);
    assert_eq!(cluster.leader(), behind);
    assert!(cluster.read(behind, 9 * B, B) == pattern(11, BLOCK));
}

#[test]
fn leader_that_cannot_send_what_is_not_committed_gives_way_to_one_without_it() {
    let (mut cluster, leader, data) = written(true);
    let (a, b) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.isolate(leader);
    let alone = pattern(9, BLOCK);
    cluster.begin(leader, HostOp::Write(Span { offset: 0, len: B }), alone.clone());
    cluster.run();
    let media = &mut cluster.nodes[leader].media;
    let at = media.chunks_exact(BLOCK).position(|block| block == alone).expect("it is in the log");
    media[at * BLOCK + 77] ^= 4;
    // Apart, neither of the others can win against the longest log.
    cluster.cut = vec![(a, b), (b, a)];
    let before = cluster.standing(leader).term;
    (0..3).for_each(|at| cluster.restart(at));
    cluster.pass(3000);
    assert!(cluster.standing(leader).term > before, "it was elected again");
    cluster.cut.clear();
    let next = cluster.leader();
    assert_ne!(next, leader);
    assert!(cluster.read(next, 0, 10 * B) == data);
    assert_eq!(cluster.write(next, 0, &pattern(5, BLOCK)), Status::Ok);
    cluster.audit();
    assert!(cluster.contents(leader) == cluster.contents(next));
}

#[test]
fn extent_that_holds_more_than_is_applied_after_a_restart_is_not_called_corrupt() {
    let (mut cluster, leader, _) = written(true);
    let (at, other) = ((leader + 1) % 3, (leader + 2) % 3);
    assert_eq!(cluster.write(leader, 4 * B, &pattern(9, BLOCK)), Status::Ok);
    cluster.agree();
    let before = counters(&cluster, at);
    let node = &mut cluster.nodes[at];
    node.store.apply(Event::Order { id: OrderId(77), order: Order::Drain }, &mut node.mem, &mut node.fx);
    while node.store.view().counters.drained_extents == before.drained_extents {
        node.turns(1);
    }
    assert_eq!(counters(&cluster, at).checkpoints, before.checkpoints, "the map on the drive is older than the extent");
    cluster.kill(other);
    cluster.kill(leader);
    cluster.restart(at);
    cluster.order(at, Order::ScrubStart).unwrap();
    cluster.pass(500);
    assert_eq!((counters(&cluster, at).scrubbed_blocks > 0, counters(&cluster, at).corrupt_blocks), (true, 0));
    cluster.restart(leader);
    cluster.restart(other);
    cluster.leader();
    cluster.agree();
    assert!(cluster.contents(at) == cluster.contents(leader));
    cluster.audit();
    assert!(is_whole(&cluster, at));
}
