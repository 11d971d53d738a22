//! One replica's state is silently wrong: a block has other bytes, or is gone, and all checksums are right. Comparing has to find it, and to mend it where a
//! majority can tell; and never to find what is not so.
//!
//! At rest, while hosts ask nothing: a wrong block that is read is an error that nobody can see. That members do not differ by themselves is checked
//! all the time, for scrubs run in the storm too. Not here: bytes that do not match their checksums ([`super::drives`]).

use std::rc::Rc;

use penstock_engine::{Contents, Order};
use penstock_wire::BlockAddr;

use super::calm::PATIENCE_US;
use super::drives::may_be_damaged;
use super::node::Phase;
use super::world::World;
use crate::drive::Page;
use crate::faults::rot;

/// A block that is wrong at one node.
pub struct Wrong {
    node: usize,
    volume: u32,
    block: u64,
    /// Where it lies on the node's drive, what was there, and its checksum.
    at: u64,
    before: Rc<Page>,
    crc: u32,
    /// Nodes that told that it differs, and cannot say who is right.
    told: Vec<usize>,
    mended: bool,
}

impl Wrong {
    pub fn is_of(&self, node: usize, volume: u32) -> bool {
        (self.node, self.volume) == (node, volume)
    }
}

impl World {
    /// A drive is scrubbed now and then.
    pub fn choose_scrub(&mut self) {
        if self.plan.habits.scrubs && !self.calm && self.rng.one_in(40) {
            let node = self.rng.below(self.nodes.len() as u64) as usize;
            if self.nodes[node].phase == Phase::Serving {
                self.order(node, Order::ScrubStart);
            }
        }
    }

    /// A block of one member is another, or is gone where most members can tell.
    pub fn make_wrong(&mut self) {
        let rotten = self.rotten();
        for _ in 0..8 {
            let node = self.rng.pick(&self.whole_nodes());
            let it = &self.nodes[node];
            let (start, blocks) = (it.share.start.0, it.store.as_ref().expect("alive").data_blocks());
            if blocks.is_empty() {
                continue;
            }
            let (no, block, place, crc) = self.rng.pick(&blocks);
            let (volume, at) = (it.replicas[&no], start + place.0);
            let holders = self.holders(volume).len();
            let rots = rotten.iter().any(|(_, of, bad)| (*of, *bad) == (volume, block));
            let newest = self.contents_at(node, volume).get(&block) == Some(&Some(crc));
            if !self.volumes[&volume].replicated || holders < 2 || rots || !newest || !may_be_damaged(it, at) {
                continue;
            }
            let before = it.drive.look(at).expect("it holds a host's data").clone();
            let mut page = *before;
            rot(&mut page, &mut self.rng);
            let gone = holders > 2 && self.rng.one_in(3);
            let other = (!gone).then(|| penstock_wire::crc32c(&page));
            let store = self.nodes[node].store.as_mut().expect("alive");
            // A layer beneath may have the same bytes.
            if !store.falsify(no, block, place, other) {
                continue;
            }
            if !gone {
                self.damage(node, at, Some(Rc::new(page)), "one replica's state silently wrong (30)");
            } else {
                self.tally.fault("one replica's state silently wrong (30)");
            }
            self.wrong = Some(Wrong { node, volume, block, at, before, crc, told: Vec::new(), mended: false });
            return;
        }
    }

    /// Some die over it, with their map on the drive or without: says whether one did. Where the map was not, the block is what its checksum does not say.
    pub fn die_while_it_is_wrong(&mut self) -> bool {
        let Some(wrong) = &self.wrong else { return false };
        let (node, volume) = (wrong.node, wrong.volume);
        if self.holders(volume).len() < 3 || !self.rng.one_in(4) {
            return false;
        }
        let node = if self.rng.one_in(2) { node } else { self.rng.pick(&self.whole_nodes()) };
        let end = self.now + self.rng.below(60_000);
        while self.now < end && self.step() {}
        let power = self.rng.one_in(2);
        self.die(node, power);
        self.until(PATIENCE_US, "who died over a wrong block is back", World::all_lead);
        self.until(PATIENCE_US, "who died over a wrong block has applied the same", World::all_applied);
        self.drain();
        true
    }

    fn contents_at(&self, node: usize, volume: u32) -> Contents {
        let it = &self.nodes[node];
        let (start, store) = (it.share.start.0, it.store.as_ref().expect("alive"));
        let contents = store.contents(it.replica_of(volume).expect("made"), |at| it.drive.bytes(start + at.0));
        contents.unwrap_or_else(|error| panic!("node {node}: {error}"))
    }

    /// Whether a block is still wrong, and somebody can mend it.
    pub fn is_wrong(&self) -> bool {
        let Some(wrong) = &self.wrong else { return false };
        let holders = self.holders(wrong.volume);
        let of = |node: &usize| self.contents_at(*node, wrong.volume).get(&wrong.block).copied();
        holders.len() > 2 && holders.iter().any(|node| of(node) != Some(Some(wrong.crc)))
    }

    /// Whether nobody can tell who is right, and somebody has not told that they differ.
    pub fn is_untold(&self) -> bool {
        let Some(wrong) = &self.wrong else { return false };
        let holders = self.holders(wrong.volume);
        holders.len() < 3 && holders.iter().any(|holder| !wrong.told.contains(holder))
    }

    /// A node tells that it has an extent otherwise than others.
    pub fn told_to_differ(&mut self, node: usize, volume: Option<u32>, first: u64, mends: bool) {
        let holders = volume.map_or(0, |volume| self.holders(volume).len());
        let wrong = self.wrong.as_mut().filter(|wrong| (Some(wrong.volume), wrong.block / 16 * 16) == (volume, first));
        let Some(wrong) = wrong else {
            panic!(
                "invariant 6: node {node} finds the extent at block {first} of volume {volume:?} otherwise at others, and nobody made it so"
            )
        };
        if mends {
            assert_eq!(node, wrong.node, "node {node} would take what node {} has wrong for right", wrong.node);
            wrong.mended = true;
            self.tally.did("wrong extents found", 1);
        } else {
            assert!(holders < 3, "{holders} nodes have volume {volume:?}, and node {node} cannot tell who has block {first} wrong");
            wrong.told.push(node);
        }
    }

    /// What is wrong was mended; or, where nobody can tell who is right, told by both, and somebody looks after it.
    pub fn check_wrong(&mut self) {
        let (is_wrong, is_untold) = (self.is_wrong(), self.is_untold());
        let Some(wrong) = self.wrong.take() else { return };
        let Wrong { node, volume, block, at, before, crc, told, mended } = wrong;
        assert!(!is_wrong, "invariant 6: after scrubs node {node} still has block {block} of volume {volume} wrong: {}", self.describe());
        let holders = self.holders(volume);
        if holders.len() > 2 {
            self.tally.check(if mended { "silently wrong state is mended (6, 25)" } else { "silently wrong state is gone with a crash" });
            return;
        }
        assert!(!is_untold, "nodes {holders:?} have volume {volume}, one of them wrong, and {told:?} told of it");
        let it = &mut self.nodes[node];
        let no = it.replica_of(volume).expect("made");
        let place = BlockAddr(at - it.share.start.0);
        assert!(it.store.as_mut().expect("alive").falsify(no, block, place, Some(crc)), "block {block} of node {node} is at rest");
        it.drive.corrupt(at, Some(before));
        self.drain();
        self.tally.check("replicas that differ are told of where nobody can tell who is right (6)");
    }
}
