//! Members that need more than the log has are rebuilt by copying, while hosts go on: what they hold in the end is what was written, block by block.

use super::B;
use super::cluster::{Cluster, SMALL, is_append};
use super::compare::lose_map_page;
use super::snapshots::{remove, take};
use crate::bench::{SEGMENT, pattern};
use penstock_engine::replica::Part as GroupPart;
use penstock_engine::*;
use penstock_wire::peer::MessageBody;
use penstock_wire::*;

const BLOCKS: u64 = 2000;

/// A cluster and what its volume must read as.
struct Volume {
    cluster: Cluster,
    model: Vec<u8>,
    dice: u64,
}

fn is_copy(word: &PeerWord) -> bool {
    matches!(word, PeerWord::CopyAnswer(_))
}

impl Volume {
    fn new() -> Self {
        Self::over(Cluster::new(3))
    }

    fn led_by_the_first() -> Self {
        let mut volume = Self::new();
        let leader = volume.cluster.leader();
        if leader != 0 {
            volume.cluster.order(leader, Order::Transfer { segment: SEGMENT, to: peer::MemberNo(1) }).unwrap();
            volume.cluster.pass(300);
        }
        volume
    }

    fn over(cluster: Cluster) -> Self {
        Self { cluster, model: vec![0; BLOCKS as usize * BLOCK], dice: 7 }
    }

    fn roll(&mut self, below: u64) -> u64 {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.dice >> 33) % below
    }

    fn write(&mut self, at: usize, block: u64, blocks: u64) {
        let seed = self.roll(251) as u8;
        let bytes = pattern(seed, blocks as usize * BLOCK);
        assert_eq!(self.cluster.write(at, block * B, &bytes), Status::Ok);
        self.model[block as usize * BLOCK..][..bytes.len()].copy_from_slice(&bytes);
    }

    fn zero(&mut self, at: usize, block: u64, blocks: u64) {
        let (status, _) = self.cluster.host(at, HostOp::Zero(Span { offset: block * B, len: blocks * B }), Vec::new());
        assert_eq!(status, Status::Ok);
        self.model[block as usize * BLOCK..][..blocks as usize * BLOCK].fill(0);
    }

    /// One command of a busy host: writes mostly, of whole extents and single blocks, and zeroes of all lengths.
    fn busy(&mut self, at: usize) {
        let block = self.roll(BLOCKS);
        let most = (BLOCKS - block).min(40);
        let blocks = 1 + self.roll(most);
        match self.roll(5) {
            0 => self.zero(at, block, (blocks * 4).min(BLOCKS - block)),
            1 | 2 => self.write(at, block, 1),
            _ => self.write(at, block, blocks),
        }
    }

    /// So much that the log no longer has what `at` missed.
    fn leave_behind(&mut self, at: usize) {
        self.cluster.isolate(at);
        let leader = self.cluster.leader();
        for _ in 0..400 {
            self.busy(leader);
        }
        self.see_left_behind(leader, at);
    }

    fn see_left_behind(&mut self, leader: usize, at: usize) {
        self.cluster.pass(2000);
        let log_begins = self.cluster.view(leader).group.unwrap().first;
        assert!(log_begins > self.cluster.view(at).group.unwrap().last, "the leader's log still has it all");
    }

    fn rebuilds(&self, at: usize) -> u64 {
        self.cluster.nodes[at].store.view().counters.rebuilds
    }

    /// Until copies with content are held back.
    fn wait_copies(&mut self) {
        for _ in 0..100 {
            self.cluster.pass(10);
            // The first answer of all is that it is to be asked again.
            if self.cluster.held.iter().any(|(.., word, _)| word.payload_blocks() > 0) {
                break;
            }
            self.cluster.release();
        }
    }

    fn wait_whole(&mut self, at: usize) {
        for _ in 0..500 {
            if self.cluster.view(at).rebuild.is_none() {
                return;
            }
            self.cluster.pass(10);
        }
        panic!("it is not whole in 5 s: {:?}", self.cluster.view(at));
    }

    /// It is whole in the end, and has what was written.
    fn comes_whole(&mut self, at: usize) {
        self.wait_whole(at);
        self.check();
        self.check_reads(at);
        self.cluster.audit();
    }

    /// Every member holds what was written.
    fn check(&mut self) {
        self.cluster.agree();
        for at in (0..3).filter(|at| self.cluster.up[*at]) {
            let contents = self.cluster.contents(at);
            for (block, bytes) in self.model.chunks_exact(BLOCK).enumerate() {
                let expected = (contents.contains_key(&(block as u64)) || bytes.iter().any(|byte| *byte != 0)).then(|| Some(crc32c(bytes)));
                assert_eq!(contents.get(&(block as u64)).copied(), expected, "block {block} of member {at}");
            }
            assert!(contents.keys().all(|block| *block < BLOCKS));
        }
    }

    /// And reads give it, at `at`.
    fn check_reads(&mut self, at: usize) {
        let to = self.cluster.view(at).me;
        // The leader hears that a member is whole by its not asking any more.
        self.cluster.pass(2100);
        let leader = self.cluster.leader();
        if leader != at {
            self.cluster.order(leader, Order::Transfer { segment: SEGMENT, to }).unwrap();
            self.cluster.pass(200);
        }
        assert_eq!(self.cluster.leader(), at);
        for block in (0..BLOCKS).step_by(200) {
            let expected = &self.model[block as usize * BLOCK..][..200 * BLOCK];
            assert!(self.cluster.read(at, block * B, 200 * B) == expected, "blocks from {block} on");
        }
    }
}

/// A member that came back to a log that no longer reaches it, with the copies to it held back.
fn begun() -> (Volume, usize, usize) {
    let mut volume = Volume::new();
    let leader = volume.cluster.leader();
    let behind = (leader + 1) % 3;
    for _ in 0..60 {
        volume.busy(leader);
    }
    volume.cluster.agree();
    volume.leave_behind(behind);
    volume.cluster.hold = is_copy;
    volume.cluster.cut.clear();
    volume.wait_copies();
    assert_eq!(volume.rebuilds(behind), 1);
    assert!(!volume.cluster.held.is_empty(), "nothing was copied: {:?}", volume.cluster.view(behind));
    let leader = volume.cluster.leader();
    (volume, leader, behind)
}

#[test]
fn member_that_the_log_no_longer_reaches_is_rebuilt_and_serves() {
    let (mut volume, _, behind) = begun();
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.comes_whole(behind);
}

#[test]
fn extent_that_is_lost_while_another_comes_twice_is_copied_all_the_same() {
    let (mut volume, _, behind) = begun();
    // As many as the end of the answer says, and one of them is missing.
    assert!(volume.cluster.held.len() > 2);
    volume.cluster.held[1] = volume.cluster.held[0].clone();
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.wait_whole(behind);
    volume.check();
    volume.check_reads(behind);
}

#[test]
fn ask_that_comes_twice_is_answered_once() {
    let (mut volume, leader, behind) = begun();
    let sent = |volume: &Volume| volume.cluster.nodes[leader].store.view().counters.copies_sent;
    volume.cluster.hold = |word| matches!(word, PeerWord::CopyAsk(_));
    volume.cluster.release();
    let (asked, before) = (volume.cluster.held.clone(), sent(&volume));
    assert_eq!(asked.len(), 1);
    volume.cluster.release();
    let after = sent(&volume);
    assert!(after > before, "it was answered");
    volume.cluster.held = asked;
    volume.cluster.release();
    assert_eq!(sent(&volume), after);
    volume.cluster.hold = |_| false;
    volume.wait_whole(behind);
    volume.check();
}

#[test]
fn hosts_write_and_discard_while_a_member_is_rebuilt() {
    let (mut volume, leader, behind) = begun();
    let mut rounds = 0;
    while volume.cluster.view(behind).rebuild.is_some() {
        rounds += 1;
        assert!(rounds < 500, "{:?}", volume.cluster.view(behind));
        for _ in 0..3 {
            volume.busy(leader);
        }
        volume.cluster.release();
        volume.cluster.pass(10);
    }
    assert!(rounds > 3, "there was nothing to do");
    volume.check();
    volume.cluster.audit();
    volume.check_reads(behind);
}

#[test]
fn copy_that_comes_late_leaves_newer_writes_alone() {
    let (mut volume, leader, behind) = begun();
    // Everything that is on its way was read before this.
    for block in (0..BLOCKS).step_by(8) {
        volume.write(leader, block, 3);
    }
    volume.cluster.agree();
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.wait_whole(behind);
    volume.check();
    volume.check_reads(behind);
}

#[test]
fn member_that_dies_while_it_is_rebuilt_goes_on_after_that() {
    for step in 1..6 {
        let (mut volume, leader, behind) = begun();
        for round in 0..12 {
            volume.busy(leader);
            volume.cluster.release();
            volume.cluster.pass(10);
            if round % step == 0 {
                volume.cluster.kill(behind);
                volume.busy(leader);
                volume.cluster.restart(behind);
            }
        }
        volume.cluster.hold = |_| false;
        volume.cluster.release();
        volume.wait_whole(behind);
        volume.check();
        volume.cluster.restart(behind);
        assert_eq!(volume.cluster.view(behind).rebuild, None, "whole for good");
        volume.check();
        volume.check_reads(behind);
        volume.cluster.audit();
    }
}

#[test]
fn source_dies_or_steps_aside_while_a_member_is_rebuilt_from_it() {
    for dies in [true, false] {
        let (mut volume, leader, behind) = begun();
        volume.cluster.release();
        let third = 3 - leader - behind;
        if dies {
            volume.cluster.kill(leader);
        } else {
            let to = volume.cluster.view(third).me;
            volume.cluster.order(leader, Order::Transfer { segment: SEGMENT, to }).unwrap();
            volume.cluster.pass(200);
        }
        assert_eq!(volume.cluster.leader(), third, "the one that is whole");
        for _ in 0..10 {
            volume.busy(third);
            volume.cluster.release();
            volume.cluster.pass(100);
        }
        volume.cluster.hold = |_| false;
        volume.cluster.release();
        volume.wait_whole(behind);
        if dies {
            volume.cluster.restart(leader);
        }
        volume.check();
        volume.check_reads(behind);
        volume.cluster.audit();
    }
}

#[test]
fn member_that_is_rebuilt_is_not_asked_to_lead() {
    let (mut volume, leader, behind) = begun();
    let to = volume.cluster.view(behind).me;
    let refused = volume.cluster.order(leader, Order::Transfer { segment: SEGMENT, to });
    assert!(matches!(refused, Err(OrderError::Invalid(_))), "{refused:?}");
}

/// A member that is rebuilt has entries that count and the third lacks, and the leader that had them too is gone.
fn longest_log_is_rebuilt() -> (Volume, usize, usize, usize) {
    let (mut volume, leader, behind) = begun();
    let third = 3 - leader - behind;
    volume.cluster.isolate(third);
    (0..5).for_each(|_| volume.busy(leader));
    volume.cluster.agree_among(&[leader, behind]);
    volume.cluster.kill(leader);
    volume.cluster.cut.clear();
    (volume, leader, behind, third)
}

#[test]
fn member_that_is_rebuilt_and_has_the_longest_log_brings_a_whole_one_up_which_leads() {
    let (mut volume, leader, behind, third) = longest_log_is_rebuilt();
    let before = volume.cluster.standing(behind).term;
    for _ in 0..300 {
        volume.cluster.pass(10);
        assert!(!volume.cluster.standing(behind).serves && volume.cluster.view(behind).rebuild.is_some());
        if volume.cluster.standing(third).serves {
            break;
        }
    }
    assert_eq!(volume.cluster.leader(), third);
    assert_eq!(volume.cluster.standing(third).term, Term(before.0 + 2), "the third wins by what the other brought it");
    (0..5).for_each(|_| volume.busy(third));
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.wait_whole(behind);
    volume.cluster.restart(leader);
    volume.check();
    volume.check_reads(behind);
    volume.cluster.audit();
}

#[test]
fn leader_that_is_rebuilt_refuses_hosts_and_serves_once_a_whole_member_has_given_it_everything() {
    let (mut volume, leader, behind, third) = longest_log_is_rebuilt();
    volume.cluster.lose = |word| matches!(word, PeerWord::Group(message) if message.body == MessageBody::Campaign);
    let leads = |volume: &Volume| volume.cluster.standing(behind).part == GroupPart::Leader;
    for _ in 0..300 {
        volume.cluster.pass(10);
        if leads(&volume) {
            break;
        }
    }
    assert!(leads(&volume), "{:?}", volume.cluster.standing(behind));
    volume.cluster.pass(1000);
    for op in [HostOp::Read(Span { offset: 0, len: B }), HostOp::Write(Span { offset: 0, len: B }), HostOp::Flush] {
        let payload = if op == HostOp::Flush { Vec::new() } else { pattern(1, BLOCK) };
        assert_eq!(volume.cluster.host(behind, op, payload).0, Status::NotReady, "{op:?}");
    }
    assert!(leads(&volume) && volume.cluster.view(behind).rebuild.is_some());
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.wait_whole(behind);
    assert_eq!(volume.cluster.leader(), behind);
    assert!(volume.cluster.nodes[third].store.view().counters.copies_sent > 0, "who follows gives");
    // Whom it asked to lead last has its time to.
    volume.cluster.pass(300);
    volume.busy(behind);
    volume.cluster.lose = |_| false;
    volume.cluster.restart(leader);
    volume.check();
    volume.check_reads(behind);
    volume.cluster.audit();
}

/// Two members are being rebuilt, one of them leads and has an entry of its term, and the only whole one lacks that and is away.
fn only_whole_one_is_away() -> (Volume, usize, [usize; 2]) {
    let (mut volume, leader, behind) = begun();
    let third = 3 - leader - behind;
    volume.leave_behind(third);
    volume.cluster.cut.clear();
    volume.cluster.pass(1000);
    // Answers tell how far the source is, and each a part of the content.
    volume.cluster.release();
    volume.cluster.pass(100);
    volume.cluster.kill(leader);
    // One of the two leads, which takes an entry of its term, and cannot serve.
    volume.cluster.pass(3000);
    let whole_has = volume.cluster.view(leader).group.unwrap().last;
    for at in [behind, third] {
        let view = volume.cluster.view(at);
        assert!(view.rebuild.is_some() && view.applied > whole_has, "{view:?}");
        volume.cluster.nodes[at].create_other(1000);
    }
    (volume, leader, [behind, third])
}

/// Another volume writes as much on these nodes.
fn write_other(volume: &mut Volume, nodes: [usize; 2], seed: u8) {
    for at in nodes {
        let node = &mut volume.cluster.nodes[at];
        node.segment = node.store.replicas().last().unwrap().shape.segment;
        for block in (0..300).step_by(20) {
            assert_eq!(node.write(block * B, &pattern(seed, 20 * BLOCK)), Status::Ok);
        }
        node.segment = SEGMENT;
    }
    volume.cluster.pass(2000);
}

#[test]
fn members_that_are_rebuilt_keep_the_log_that_brings_the_only_whole_one_on() {
    let (mut volume, leader, [behind, third]) = only_whole_one_is_away();
    // More than members that lag are given of the log.
    for seed in 0..3 {
        write_other(&mut volume, [behind, third], seed);
        volume.cluster.restart(third);
    }
    assert!(!(0..3).any(|at| volume.cluster.up[at] && volume.cluster.standing(at).serves));
    volume.cluster.restart(leader);
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    assert_eq!(volume.cluster.leader(), leader, "who is whole");
    volume.wait_whole(behind);
    volume.wait_whole(third);
    volume.check();
    volume.check_reads(behind);
    volume.cluster.audit();
}

#[test]
fn who_is_behind_the_log_of_who_asks_is_asked_again_after_a_while() {
    let (mut volume, leader, others) = only_whole_one_is_away();
    // More than they can keep: what the whole one lacks is in no log any more.
    for seed in 0..5 {
        write_other(&mut volume, others, seed);
    }
    volume.cluster.restart(leader);
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.cluster.pass(1000);
    assert!(others.iter().all(|at| volume.cluster.view(*at).group.unwrap().first > volume.cluster.view(leader).group.unwrap().last));
    let sent = volume.cluster.nodes[leader].store.view().counters.copies_sent;
    assert!(sent < 50, "{sent} copies that nobody can use");
}

#[test]
fn member_left_behind_twice_is_rebuilt_from_the_second_install() {
    let (mut volume, _, behind) = begun();
    volume.cluster.release();
    volume.leave_behind(behind);
    volume.cluster.cut.clear();
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.cluster.pass(300);
    volume.wait_whole(behind);
    assert_eq!(volume.rebuilds(behind), 2);
    volume.check();
    volume.check_reads(behind);
    volume.cluster.audit();
}

#[test]
fn rebuilt_member_has_the_size_that_the_volume_came_to_meanwhile() {
    let mut volume = Volume::new();
    let leader = volume.cluster.leader();
    let behind = (leader + 1) % 3;
    volume.cluster.isolate(behind);
    volume.cluster.order(leader, Order::Resize { segment: SEGMENT, blocks: 3000 }).unwrap();
    volume.leave_behind(behind);
    assert_eq!(volume.cluster.write(leader, 2500 * B, &pattern(9, BLOCK)), Status::Ok);
    volume.cluster.cut.clear();
    volume.cluster.pass(300);
    volume.wait_whole(behind);
    assert_eq!(volume.rebuilds(behind), 1);
    let shape = volume.cluster.nodes[behind].store.replicas()[0].shape.clone();
    assert_eq!(shape.blocks, 3000);
    volume.check_reads(behind);
    assert_eq!(volume.cluster.read(behind, 2500 * B, B), pattern(9, BLOCK));
}

#[test]
fn rebuilt_member_has_the_reservations_as_of_its_install_and_what_came_after() {
    let mut volume = Volume::new();
    let leader = volume.cluster.leader();
    let behind = (leader + 1) % 3;
    let host = HostId([7; 16]);
    let ask = |volume: &mut Volume, what| {
        volume.cluster.nodes[leader].host = host;
        assert_eq!(volume.cluster.host(leader, HostOp::Reserve(what), Vec::new()).0, Status::Ok);
    };
    volume.cluster.isolate(behind);
    ask(&mut volume, Reserve::Register { new: 3 });
    volume.leave_behind(behind);
    let state = |volume: &Volume, at: usize| volume.cluster.nodes[at].store.reservations(ReplicaNo(0));
    assert_eq!(state(&volume, behind), None);
    volume.cluster.cut.clear();
    volume.cluster.hold = is_copy;
    volume.cluster.pass(300);
    assert_eq!(volume.rebuilds(behind), 1);
    assert_eq!(state(&volume, behind), state(&volume, leader), "with the install");
    // Which is in the log alone now.
    volume.cluster.restart(behind);
    assert_eq!(state(&volume, behind), state(&volume, leader));
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.cluster.pass(300);
    volume.wait_whole(behind);
    ask(&mut volume, Reserve::Acquire { key: 3, kind: penstock_wire::reservation::ReservationKind::ExclusiveAccess });
    volume.cluster.agree();
    assert_eq!(state(&volume, behind), state(&volume, leader));
    assert!(state(&volume, behind).is_some_and(|state| state.held.is_some()));
    volume.cluster.order(behind, Order::Drain).unwrap();
    volume.cluster.restart(behind);
    assert_eq!(state(&volume, behind), state(&volume, leader));
}

#[test]
fn full_member_takes_what_gives_space_back_before_what_needs_it() {
    let mut volume = Volume::over(Cluster::on_drives(&[SMALL; 3]));
    let leader = volume.cluster.leader();
    let behind = (leader + 1) % 3;
    for block in (1000..2000).step_by(40) {
        volume.write(leader, block, 40);
    }
    volume.cluster.agree();
    volume.cluster.isolate(behind);
    volume.zero(leader, 1000, 1000);
    volume.cluster.pass(2000);
    for _ in 0..10 {
        for block in (0..1000).step_by(40) {
            volume.write(leader, block, 40);
        }
    }
    volume.see_left_behind(leader, behind);
    volume.cluster.cut.clear();
    volume.cluster.pass(500);
    volume.wait_whole(behind);
    assert_eq!(volume.rebuilds(behind), 1);
    volume.check();
}

/// A member that was whole as of a snapshot, and copies of what changed since on their way to it, which leave most of an extent to the snapshot's layer.
/// `lost`: it has lost what it knew of the layer above that.
fn begun_over_a_snapshot(lost: bool) -> (Volume, usize, usize) {
    let mut volume = Volume::new();
    let leader = volume.cluster.leader();
    let behind = (leader + 1) % 3;
    volume.write(leader, 0, 40);
    assert_eq!(take(&mut volume.cluster, leader, 1), Ok(()));
    if lost {
        volume.write(leader, 4, 1);
    }
    volume.cluster.agree();
    if lost {
        volume.cluster.order(behind, Order::Drain).unwrap();
        lose_map_page(&mut volume.cluster, behind, 1);
        volume.cluster.restart(behind);
        volume.cluster.agree();
        // Its pages are loaded, and it compares them with nobody.
        volume.cluster.lose = |word| matches!(word, PeerWord::DigestAsk(_));
        volume.cluster.order(behind, Order::ScrubStart).unwrap();
        volume.cluster.pass(3000);
        volume.cluster.lose = |_| false;
    }
    volume.cluster.isolate(behind);
    let leader = volume.cluster.leader();
    volume.write(leader, 4, 1);
    for round in 0..300 {
        volume.write(leader, 1000 + round % 24 * 40, 40);
    }
    volume.see_left_behind(leader, behind);
    volume.cluster.hold = is_copy;
    volume.cluster.cut.clear();
    volume.wait_copies();
    volume.cluster.order(behind, Order::Drain).unwrap();
    (volume, leader, behind)
}

fn is_merged(volume: &Volume, at: usize) -> bool {
    volume.cluster.nodes[at].store.usage(ReplicaNo(0)).snapshot_extents == 0
}

#[test]
fn copy_from_before_a_removal_leaves_what_was_merged_alone() {
    let (mut volume, leader, behind) = begun_over_a_snapshot(false);
    assert_eq!(remove(&mut volume.cluster, leader, 1), Ok(()));
    volume.cluster.order(behind, Order::Drain).unwrap();
    assert!(is_merged(&volume, behind));
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.comes_whole(behind);
}

/// The snapshot goes while copies that came before that are on their way into the log. Whether its layer is merged before they are there.
fn remove_under_copies(volume: &mut Volume, leader: usize, behind: usize) -> bool {
    volume.cluster.hold = |word| match word {
        PeerWord::Group(message) => match &message.body {
            MessageBody::Append(append) => append.entries.is_empty(),
            body => matches!(body, MessageBody::Heartbeat { .. }),
        },
        word => is_copy(word),
    };
    assert_eq!(remove(&mut volume.cluster, leader, 1), Ok(()));
    assert!(!is_merged(volume, behind), "it has not heard that the removal is committed");
    let taken = |volume: &Volume| volume.cluster.nodes[behind].store.view().counters.copies_taken;
    volume.cluster.nodes[behind].late = 50;
    let (copies, others): (Vec<_>, Vec<_>) = std::mem::take(&mut volume.cluster.held).into_iter().partition(|(.., word, _)| is_copy(word));
    volume.cluster.held = copies;
    volume.cluster.release();
    // What it is sent next is lost: nothing tells it that its sources have removed the snapshot.
    volume.cluster.held = others;
    volume.cluster.release();
    let node = &mut volume.cluster.nodes[behind];
    node.store.apply(Event::Order { id: OrderId(77), order: Order::Drain }, &mut node.mem, &mut node.fx);
    volume.cluster.run();
    assert_eq!(taken(volume), 0);
    let merged = is_merged(volume, behind);
    volume.cluster.nodes[behind].late = 0;
    volume.cluster.hold = |_| false;
    volume.cluster.pass(60);
    assert!(taken(volume) > 0);
    volume.cluster.release();
    merged
}

#[test]
fn copy_on_its_way_into_the_log_leaves_what_is_merged_meanwhile_alone() {
    let (mut volume, leader, behind) = begun_over_a_snapshot(false);
    assert!(remove_under_copies(&mut volume, leader, behind));
    volume.comes_whole(behind);
}

#[test]
fn copy_that_leaves_lost_blocks_to_the_layer_beneath_finds_it_there() {
    let (mut volume, leader, behind) = begun_over_a_snapshot(true);
    assert!(!remove_under_copies(&mut volume, leader, behind), "the copy is waited for");
    volume.wait_whole(behind);
    volume.check();
    volume.check_reads(behind);
}

#[test]
fn zeros_over_a_snapshot_that_goes_while_a_member_is_rebuilt_stay() {
    let mut volume = Volume::led_by_the_first();
    volume.write(0, 0, 40);
    assert_eq!(take(&mut volume.cluster, 0, 1), Ok(()));
    volume.cluster.agree();
    volume.cluster.isolate(1);
    volume.zero(0, 0, 40);
    for round in 0..300 {
        volume.write(0, 1000 + round % 24 * 40, 40);
    }
    volume.see_left_behind(0, 1);
    volume.cluster.hold = is_copy;
    volume.cluster.cut.clear();
    volume.wait_copies();
    // It hears of the removal last, and what it is sent is as of after that.
    volume.cluster.hold = |word| is_append(word) && matches!(word, PeerWord::Group(message) if message.to == peer::MemberNo(2));
    volume.cluster.held.clear();
    assert_eq!(remove(&mut volume.cluster, 0, 1), Ok(()));
    volume.cluster.order(0, Order::Drain).unwrap();
    assert!(is_merged(&volume, 0) && !is_merged(&volume, 1));
    volume.cluster.pass(3000);
    assert!(volume.cluster.view(1).rebuild.is_some());
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.comes_whole(1);
}

#[test]
fn what_a_source_applies_while_it_answers_was_not_compared() {
    let mut volume = Volume::led_by_the_first();
    volume.cluster.isolate(1);
    for round in 0..300 {
        volume.write(0, 1000 + round % 24 * 40, 40);
    }
    volume.see_left_behind(0, 1);
    // The third has the last write and does not know that it is committed; the leader is not asked.
    volume.cluster.hold = |word| match word {
        PeerWord::Group(message) if message.to == peer::MemberNo(3) => match &message.body {
            MessageBody::Append(append) => append.entries.is_empty(),
            body => matches!(body, MessageBody::Heartbeat { .. }),
        },
        PeerWord::CopyAsk(ask) => ask.to == peer::MemberNo(1),
        _ => false,
    };
    volume.write(0, 100, 40);
    assert!(volume.cluster.applied(2) < volume.cluster.applied(0));
    volume.cluster.nodes[2].late = 50;
    volume.cluster.cut.clear();
    let reads = |volume: &Volume| volume.cluster.nodes[2].store.view().counters.disk_reads;
    let before = reads(&volume);
    for _ in 0..300 {
        volume.cluster.pass(10);
        if reads(&volume) > before {
            break;
        }
    }
    assert!(reads(&volume) > before && volume.rebuilds(1) == 1, "it reads what it is asked for");
    assert!(volume.cluster.applied(2) < volume.cluster.applied(0));
    let of_group = |held: &mut (usize, usize, PeerWord, Vec<u8>)| matches!(held.2, PeerWord::Group(_));
    let heard: Vec<_> = volume.cluster.held.extract_if(.., of_group).collect();
    let asks = std::mem::replace(&mut volume.cluster.held, heard);
    volume.cluster.hold = |word| matches!(word, PeerWord::CopyAsk(ask) if ask.to == peer::MemberNo(1));
    volume.cluster.release();
    assert_eq!(volume.cluster.applied(2), volume.cluster.applied(0));
    volume.cluster.pass(1000);
    volume.cluster.nodes[2].late = 0;
    volume.cluster.held.extend(asks);
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.wait_whole(1);
    assert_eq!(volume.rebuilds(1), 1);
    volume.check();
    volume.check_reads(1);
    volume.cluster.audit();
}

/// A member that led, and has in its log alone what it proposed to nobody, is on its way back to a log that no longer reaches it.
fn led_and_left_behind(propose: impl Fn(&mut Volume)) -> Volume {
    let mut volume = Volume::led_by_the_first();
    volume.write(0, 0, 40);
    volume.cluster.audit();
    volume.cluster.isolate(0);
    propose(&mut volume);
    volume.cluster.pass(1000);
    let next = volume.cluster.leader();
    for round in 0..300 {
        volume.write(next, 1000 + round % 8 * 40, 40);
    }
    volume.see_left_behind(next, 0);
    volume.cluster.cut.clear();
    volume
}

#[test]
fn write_that_was_never_committed_stays_undone_when_a_rebuilt_member_restarts() {
    let span = Span { offset: 4 * B, len: B };
    let mut volume = led_and_left_behind(|volume| _ = volume.cluster.begin(0, HostOp::Write(span), pattern(66, BLOCK)));
    let checkpoints = |volume: &Volume| volume.cluster.nodes[0].store.view().counters.checkpoints;
    let before = checkpoints(&volume);
    while volume.rebuilds(0) == 0 || volume.cluster.view(0).rebuild.is_some() {
        volume.cluster.pass(10);
    }
    assert_eq!(checkpoints(&volume), before, "all of it is in the log");
    volume.cluster.restart(0);
    assert_eq!(volume.cluster.view(0).rebuild, None, "whole for good");
    volume.check();
    volume.check_reads(0);
}

#[test]
fn snapshot_that_was_never_committed_is_not_there_when_a_member_that_is_rebuilt_restarts() {
    let mut volume = led_and_left_behind(|volume| {
        let snapshot = Box::new(layer::SnapshotShape { id: SnapshotId([1; 16]), name: "s".into() });
        let node = &mut volume.cluster.nodes[0];
        let order = Order::Snapshot { segment: SEGMENT, snapshot };
        node.store.apply(Event::Order { id: OrderId(77), order }, &mut node.mem, &mut node.fx);
    });
    volume.cluster.hold = is_copy;
    volume.wait_copies();
    assert_eq!(volume.rebuilds(0), 1);
    volume.cluster.restart(0);
    assert_eq!(volume.cluster.nodes[0].store.snapshots(ReplicaNo(0)), []);
    volume.cluster.hold = |_| false;
    volume.cluster.release();
    volume.comes_whole(0);
}

#[test]
fn entry_applied_after_a_checkpoint_that_covers_its_batch_is_redone_under_an_install() {
    let mut cluster = Volume::led_by_the_first().cluster;
    let (leader, behind) = (0, 1);
    assert_eq!(cluster.write(leader, 40 * B, &pattern(1, BLOCK)), Status::Ok);
    cluster.agree();
    // It has the entry, and does not hear that it is committed before its checkpoint.
    cluster.lose = |word| {
        let PeerWord::Group(message) = word else { return false };
        let tells = matches!(&message.body, MessageBody::Append(append) if append.entries.is_empty());
        message.to == peer::MemberNo(2) && (tells || matches!(message.body, MessageBody::Heartbeat { .. }))
    };
    assert_eq!(cluster.write(leader, 4 * B, &pattern(2, BLOCK)), Status::Ok);
    let (last, applied) = (cluster.view(behind).group.unwrap().last, cluster.applied(behind));
    assert!(applied < last.0, "{applied} of {last:?} is applied");
    cluster.nodes[behind].order(Order::Drain).unwrap();
    assert_eq!(cluster.applied(behind), applied);
    let checkpoints = cluster.nodes[behind].store.view().counters.checkpoints;
    cluster.lose = |_| false;
    // The newest change of the extent is after the checkpoint, at everyone.
    assert_eq!(cluster.write(leader, 10 * B, &pattern(3, BLOCK)), Status::Ok);
    cluster.agree();
    cluster.isolate(behind);
    for round in 0..200u64 {
        assert_eq!(cluster.write(leader, (64 + round * 16 % 320) * B, &pattern(round as u8, 40 * BLOCK)), Status::Ok);
    }
    cluster.cut.clear();
    cluster.lose = is_copy;
    for _ in 0..20 {
        if cluster.view(behind).rebuild.is_none() {
            cluster.pass(10);
        }
    }
    assert!(cluster.view(behind).rebuild.is_some());
    assert_eq!(cluster.nodes[behind].store.view().counters.checkpoints, checkpoints);
    cluster.kill(behind);
    cluster.lose = |_| false;
    cluster.restart(behind);
    for _ in 0..500 {
        if cluster.view(behind).rebuild.is_some() {
            cluster.pass(10);
        }
    }
    cluster.audit();
    assert!(cluster.contents(behind) == cluster.contents(leader));
}
