//! The closing phase: faults stop, and then everything must come to an end (25): a leader for each volume, all blocks read back, all members equal, all
//! drained, space that adds up, memory given back.

use penstock_engine::{Event, HostOp, Order, OrderId, Span, Stage};

use super::drives::may_be_damaged;
use super::hosts::plain;
use super::node::{Node, Phase};
use super::orders::Made;
use super::world::World;
use crate::run::stuck;
use crate::stamp::BLOCK;

/// From the last fault to a leader of every volume (25).
pub const LEADER_US: u64 = 10_000_000;
/// Anything else.
pub const PATIENCE_US: u64 = 20_000_000;
/// One way in which a seed may end.
const FILLED: &str = "seeds that end with a drive that others filled while a member was away";

impl World {
    /// Hosts ask nothing any more.
    pub fn hosts_rest(&self) -> bool {
        self.resting
    }

    pub fn close(&mut self) {
        self.heal();
        for node in 0..self.nodes.len() {
            self.operator(node);
        }
        if !self.within(LEADER_US, World::all_lead) {
            let lost = |volume: u32| self.may_have_lost(volume) || self.log_was_full(volume);
            if self.groups().into_iter().all(|volume| self.leader_of(volume).is_some() || lost(volume)) && self.all_serve() {
                self.tally.did("seeds that end with a group that may have lost what counts with a quorum", 1);
                return;
            }
            stuck(format!("no leader of each volume ten seconds after the last fault (25): {}", self.describe()));
        }
        self.tally.check("a leader within ten seconds (25)");
        self.until(PATIENCE_US, "members whose drive is not what it was are stopped (12)", World::gone_are_out);
        let served = self.served;
        self.until(PATIENCE_US, "hosts are served", |w| w.served >= served + 10);
        if !self.replace_gone() {
            self.tally.did(FILLED, 1);
            return;
        }
        self.resting = true;
        if !self.within(PATIENCE_US, World::all_answered) {
            let beyond = self.proposed_beyond_space();
            assert!(!beyond, "invariant 15: a leader took in what the other members have no space for: {}", self.describe());
            self.still_not(PATIENCE_US, "every command is answered, volumes are made");
        }
        self.finish_orders();
        self.read_back();
        if self.is_short_of_space() && !self.within(5_000_000, World::all_applied) {
            // A node whose drive failed a command is away until somebody has looked at it.
            let away = !self.plan.strikes.is_empty() || self.tally.work.contains_key("fences");
            assert!(away, "invariant 15: nobody was away, and a member has no space for what is committed: {}", self.describe());
            self.tally.did(FILLED, 1);
            return;
        }
        self.until(PATIENCE_US, "all members have applied the same", World::all_applied);
        self.tally.check("members have applied the same (25)");
        self.drain();
        self.repair();
        self.rest();
        self.compare();
        if self.plan.habits.snapshots {
            self.remove_snapshots();
        }
        self.rot_everywhere();
        if super::plan::RECOVERS && self.rng.one_in(3) {
            self.start_again();
        }
        self.lose_majority();
        self.stop();
    }

    fn all_answered(&self) -> bool {
        self.nodes.iter().all(|it| it.ios.is_empty() && it.orders.is_empty()) && self.all_lead()
    }

    /// Entries wait at a leader, and a follower that has all before them is nearly full.
    fn proposed_beyond_space(&self) -> bool {
        let waits = self.groups().into_iter().any(|volume| {
            let view = |node: usize| {
                let it = &self.nodes[node];
                it.replica_of(volume).and_then(|no| it.store.as_ref()?.look(no)?.view)
            };
            let led = self.leader_of(volume).and_then(view);
            led.is_some_and(|led| {
                led.committed < led.last && (0..self.nodes.len()).filter_map(view).any(|other| other.last == led.committed)
            })
        });
        waits && self.is_short_of_space()
    }

    /// A member that was away finds its drive filled by others: leaders count on members alone that are there.
    fn is_short_of_space(&self) -> bool {
        (0..self.nodes.len()).any(|node| self.is_short(node))
    }

    pub fn is_short(&self, node: usize) -> bool {
        self.nodes[node].store.as_ref().map(|store| store.view()).is_some_and(|view| view.extents_free <= view.extents / 4 + 16)
    }

    pub fn until(&mut self, limit: u64, what: &str, done: impl Fn(&World) -> bool) {
        let end = self.now + limit;
        while !done(self) {
            let more = self.step();
            if !more {
                stuck(format!("nothing will happen any more, and still not: {what}: {}", self.describe()));
            }
            if self.now >= end {
                self.still_not(limit, what);
            }
        }
    }

    pub fn still_not(&self, limit: u64, what: &str) -> ! {
        stuck(format!("{limit} us without a fault, and still not: {what}: {}", self.describe()))
    }

    pub fn groups(&self) -> Vec<u32> {
        self.volumes.values().filter(|v| v.replicated).map(|v| v.no).collect()
    }

    pub fn leader_of(&self, volume: u32) -> Option<usize> {
        (0..self.nodes.len()).find(|node| self.nodes[*node].alive() && self.nodes[*node].leads(volume))
    }

    fn all_serve(&self) -> bool {
        self.nodes.iter().all(|it| it.phase == Phase::Serving && it.fence.is_none())
    }

    pub fn all_lead(&self) -> bool {
        self.all_serve()
            && self.volumes.values().all(|v| v.made.iter().all(|made| *made == Made::Done))
            && self.groups().into_iter().all(|volume| self.leader_of(volume).is_some())
    }

    /// Whose drive is not what it was takes no part, and says so.
    pub fn gone_are_out(&self) -> bool {
        self.nodes.iter().filter(|it| it.gone.is_some()).all(|it| {
            let look = |no: &penstock_engine::ReplicaNo| it.store.as_ref().and_then(|store| store.look(*no));
            it.replicas.len() == self.groups().len() && it.replicas.keys().all(|no| look(no).is_some_and(|look| look.stopped))
        })
    }

    pub fn all_applied(&self) -> bool {
        self.groups().into_iter().all(|volume| {
            let look = |node: usize| {
                let it = &self.nodes[node];
                it.replica_of(volume).and_then(|no| it.store.as_ref()?.look(no))
            };
            let looks: Vec<_> = (0..self.nodes.len()).filter(|node| self.nodes[*node].gone.is_none()).map(look).collect();
            looks.iter().all(|look| {
                look.is_some_and(|look| {
                    look.view.is_some() && !look.rebuilding && looks[0].is_some_and(|first| first.applied == look.applied)
                })
            }) && looks.iter().flatten().all(|look| look.applied == look.last)
        })
    }

    pub fn within(&mut self, us: u64, done: impl Fn(&World) -> bool) -> bool {
        let end = self.now + us;
        while !done(self) && self.now < end && self.step() {}
        done(self)
    }

    /// Some members are gone for good, and so many others are in doubt of what they acknowledged that the rest is no quorum: what those two kinds alone
    /// had may count, and nobody can tell. That is for `replica recover --force`.
    fn may_have_lost(&self, volume: u32) -> bool {
        let look = |it: &Node| it.replica_of(volume).and_then(|no| it.store.as_ref()?.look(no));
        let gone = self.nodes.iter().filter(|it| it.gone.is_some()).count();
        let others: Vec<_> = self.nodes.iter().filter(|it| it.gone.is_none()).filter_map(look).collect();
        let sure = others.iter().filter(|look| !look.doubtful).count();
        gone > 0 && others.iter().all(|look| look.admitted && !look.stopped) && sure < (gone + others.len()) / 2 + 1
    }

    /// Members with content are gone for good, and the log-only member let go of what the last one lacks, for others needed the log.
    fn log_was_full(&self, volume: u32) -> bool {
        let look = |node: usize| self.nodes[node].replica_of(volume).and_then(|no| self.nodes[node].store.as_ref()?.look(no));
        let Some(log) = (0..self.nodes.len()).find(|node| self.is_log_only(volume, *node)) else { return false };
        let left: Vec<_> = (0..self.nodes.len()).filter(|node| *node != log && self.nodes[*node].gone.is_none()).filter_map(look).collect();
        left.len() + 2 == self.nodes.len() && look(log).is_some_and(|log| left.iter().all(|data| data.last < log.start))
    }

    fn finish_orders(&mut self) {
        for volume in self.groups() {
            for _ in 0..200 {
                if self.volumes[&volume].growing.is_none() {
                    break;
                }
                if let Some(leader) = self.leader_of(volume) {
                    self.volumes.get_mut(&volume).expect("there").guess = leader;
                }
                self.grow(volume);
                let end = self.now + 20_000;
                while self.now < end && self.step() {}
            }
            assert!(self.volumes[&volume].growing.is_none(), "volume {volume} does not grow: {}", self.describe());
            self.settle_snapshots(volume);
        }
    }

    /// Snapshots that are on their way come to stand, or to be gone.
    pub fn settle_snapshots(&mut self, volume: u32) {
        let end = self.now + PATIENCE_US;
        while !self.is_settled(volume) {
            if let Some(leader) = self.leader_of(volume) {
                self.volumes.get_mut(&volume).expect("there").guess = leader;
            }
            self.order_snapshots(volume);
            let more = self.step();
            assert!(more && self.now < end, "snapshots of volume {volume} neither come nor go: {}", self.describe());
        }
    }

    /// Snapshots go, and give back all that they held.
    fn remove_snapshots(&mut self) {
        self.end_clones();
        for volume in self.groups() {
            if self.end_snapshots(volume) {
                self.settle_snapshots(volume);
            }
        }
        self.until(PATIENCE_US, "all members have applied that snapshots are gone", World::all_applied);
        self.drain();
        let bare = |volume: &u32| self.standing(*volume).is_empty() && !self.is_stood_on(*volume);
        let bare: Vec<u32> = self.groups().into_iter().filter(bare).collect();
        for volume in bare {
            for it in self.nodes.iter().filter(|it| it.gone.is_none()) {
                let store = it.store.as_ref().expect("alive");
                let usage = store.usage(it.replica_of(volume).expect("made"));
                assert_eq!(usage.snapshot_extents, 0, "node {}: volume {volume} has no snapshots, and extents for them", it.no);
                self.tally.check("snapshots give back what they held (24)");
            }
        }
        self.rest();
        self.compare();
        if self.plan.habits.clones {
            self.read_back();
        }
    }

    /// Every block that was ever touched, at the leader.
    pub fn read_back(&mut self) {
        let kept = self.snapshots.keys().flat_map(|no| self.standing(self.home_of(*no)).into_iter().filter(move |(other, _)| other == no));
        let live = self.volumes.keys().map(|no| (*no, self.oracle.size_blocks(*no)));
        for (volume, size) in live.chain(kept).collect::<Vec<_>>() {
            let touched = self.oracle.touched(volume);
            let mut at = 0;
            while at < touched.len() {
                let first = touched[at];
                // Runs make long reads; where something may be lost, block by block, or one would hide the others.
                let mut run = 1;
                while at + run < touched.len()
                    && run < 64
                    && touched[at + run] == first + run as u64
                    && !self.oracle.may_be_lost(volume, first)
                    && !self.oracle.may_be_lost(volume, touched[at + run])
                {
                    run += 1;
                }
                at += run;
                if first + run as u64 <= size {
                    self.read_well(volume, Span { offset: first * BLOCK as u64, len: (run * BLOCK) as u64 });
                }
            }
            self.tally.check("volumes read back at the leader (1, 25)");
        }
    }

    /// A read that must be served, by whoever leads by then.
    fn read_well(&mut self, volume: u32, span: Span) {
        for _ in 0..20 {
            let home = self.home_of(volume);
            let v = &self.volumes[&home];
            let node = if v.replicated { self.leader_of(home) } else { Some(v.home) };
            let Some(node) = node else {
                self.until(LEADER_US, "a leader is there again", |w| w.leader_of(home).is_some());
                continue;
            };
            if !self.oracle.has_room(volume, span) {
                // Too many commands on these blocks of which nobody knows what became.
                return;
            }
            let (served, lost) = (self.served, self.lost());
            let op = match home == volume {
                true => HostOp::Read(span),
                false => HostOp::ReadSnapshot(self.layer_at(node, volume).expect("who leads has all that was acknowledged"), span),
            };
            self.send_command(node, plain(volume, op));
            self.until(PATIENCE_US, "a read is answered", |w| w.nodes[node].ios.is_empty());
            if self.served > served || self.lost() > lost {
                return;
            }
        }
        stuck(format!("volume {volume}: a read was refused twenty times in calm: {}", self.describe()));
    }

    fn lost(&self) -> u64 {
        self.tally.work.get("answers Unrecovered").copied().unwrap_or(0)
    }

    pub fn order_well(&mut self, node: usize, order: Order, what: &str) {
        let id = self.next_order;
        self.next_order += 1;
        self.nodes[node].orders.insert(id, order.clone());
        self.feed(node, Event::Order { id: OrderId(id), order });
        self.until(PATIENCE_US, what, |w| !w.nodes[node].orders.contains_key(&id));
    }

    pub fn drain(&mut self) {
        for node in 0..self.nodes.len() {
            let undrained = |w: &World| w.nodes[node].store.as_ref().expect("alive").view().undrained_extents;
            // What is put back or copied anew comes when it comes.
            for _ in 0..5 {
                self.order_well(node, Order::Drain, "the drain is done");
                if undrained(self) == 0 {
                    break;
                }
            }
            assert_eq!(undrained(self), 0, "node {node} is drained and has undrained extents");
            self.tally.check("drained and checkpointed (25)");
        }
    }

    /// A drain that is done may leave a checkpoint half way, of what came since: its space neither it nor the one before is told to have.
    fn rest(&mut self) {
        self.until(PATIENCE_US, "no drive has anything to do", |w| w.nodes.iter().all(|it| it.out.is_empty() && it.inbox.is_empty()));
    }

    /// Nodes whose drive is what it was.
    pub fn whole_nodes(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|node| self.nodes[*node].gone.is_none()).collect()
    }

    /// Blocks of volumes with several replicas that are not what their maps say: node, volume, block.
    pub fn rotten(&self) -> Vec<(usize, u32, u64)> {
        let of = |it: &Node| {
            let (start, store) = (it.share.start.0, it.store.as_ref().expect("alive"));
            let replicated = store.data_blocks().into_iter().filter(|(no, ..)| self.volumes[&it.replicas[no]].replicated);
            let bad = replicated.filter(move |(_, _, place, crc)| {
                it.drive.is_latent(start + place.0) || penstock_wire::crc32c(&it.drive.bytes(start + place.0)) != *crc
            });
            bad.map(|(no, block, ..)| (it.no, it.replicas[&no], block)).collect::<Vec<_>>()
        };
        self.whole_nodes().into_iter().flat_map(|node| of(&self.nodes[node])).collect()
    }

    /// Those of them that have a volume's content.
    pub fn holders(&self, volume: u32) -> Vec<usize> {
        self.whole_nodes().into_iter().filter(|node| !self.is_log_only(volume, *node)).collect()
    }

    /// Some of what one member's drive has rots; half of it hosts read where the volume is led.
    fn rot_one(&mut self) {
        let node = self.rng.pick(&self.whole_nodes());
        let it = &self.nodes[node];
        let blocks = it.store.as_ref().expect("alive").data_blocks().into_iter();
        let replicated: Vec<_> = blocks.filter(|(no, ..)| self.volumes[&it.replicas[no]].replicated).collect();
        for _ in 0..6.min(replicated.len()) {
            let (no, block, place, _) = self.rng.pick(&replicated);
            let (volume, at) = (self.nodes[node].replicas[&no], self.nodes[node].share.start.0 + place.0);
            // Beside a log-only member and one that is gone for good it would be the last copy.
            if !may_be_damaged(&self.nodes[node], at) || self.holders(volume).len() < 2 {
                continue;
            }
            self.ruin(node, at, "bit rot (5)");
            if self.rng.one_in(2) {
                self.read_well(volume, Span { offset: block * BLOCK as u64, len: BLOCK as u64 });
            }
        }
    }

    /// What rotted on one member's drive is whole again after scrubs, and what is silently wrong is found (5, 6, 25).
    fn repair(&mut self) {
        self.rot_one();
        let before = self.rotten().len();
        self.make_wrong();
        for pass in 0..5 {
            for node in self.whole_nodes() {
                self.order_well(node, Order::ScrubStart, "the scrub begins");
            }
            let died = pass == 0 && self.die_while_it_is_wrong();
            let scrubs = |it: &Node| it.store.as_ref().is_some_and(|store| store.view().scrub_permille.is_some());
            self.until(PATIENCE_US, "scrubs end", |w| !w.nodes.iter().any(scrubs));
            let end = self.now + 100_000;
            while self.now < end && self.step() {}
            self.drain();
            // A scrub that was on its way when the pass began does not see again what it has behind it, one of a node that died sees nothing, and its map is not loaded.
            if !died && self.rotten().is_empty() && !self.is_wrong() && !self.is_untold() {
                break;
            }
        }
        let left = self.rotten();
        assert!(left.is_empty(), "rot that scrubs leave, though others have the blocks: {left:?}: {}", self.describe());
        self.tally.checks("rot is mended by scrubs (5, 25)", before as u64);
        self.rest();
        self.check_wrong();
    }

    /// A block that rots on all drives is lost alone (6). While a member that others do not let in is counted, nobody can know that.
    fn rot_everywhere(&mut self) {
        let nodes = self.whole_nodes();
        // A block of several versions is not told from its others by its place.
        if nodes.len() < self.nodes.len() || !self.snapshots.is_empty() || self.volumes.values().any(|v| v.origin.is_some()) {
            return;
        }
        let first = &self.nodes[nodes[0]];
        let blocks = first.store.as_ref().expect("alive").data_blocks();
        let candidates: Vec<(u32, u64)> = blocks.iter().map(|(no, block, ..)| (first.replicas[no], *block)).collect();
        let replicated: Vec<(u32, u64)> = candidates.into_iter().filter(|(volume, _)| self.volumes[volume].replicated).collect();
        if replicated.is_empty() {
            return;
        }
        let (volume, block) = self.rng.pick(&replicated);
        let holders = self.holders(volume);
        let mut copies: Vec<(usize, u64)> = holders.iter().filter_map(|node| Some((*node, self.place_of(*node, volume, block)?))).collect();
        if copies.len() < holders.len() {
            return;
        }
        let content = self.nodes[copies[0].0].drive.bytes(copies[0].1);
        for node in nodes.into_iter().filter(|node| self.is_log_only(volume, *node)) {
            copies.extend(self.nodes[node].drive.holding(&content).into_iter().map(|at| (node, at)));
        }
        if !copies.iter().all(|(node, at)| may_be_damaged(&self.nodes[*node], *at)) {
            return;
        }
        for (node, at) in copies {
            self.ruin(node, at, "bit rot of all copies (6)");
        }
        self.ruined = Some((volume, block));
        let lost = self.lost();
        let size = BLOCK as u64;
        self.read_well(volume, Span { offset: block * size, len: size });
        if self.oracle.has_room(volume, Span { offset: block * size, len: size }) {
            assert!(self.lost() > lost, "volume {volume} block {block} rots on every drive and is read");
        }
        let (_, other) = *replicated.iter().find(|other| **other != (volume, block) && other.0 == volume).unwrap_or(&(volume, block));
        self.read_well(volume, Span { offset: other * size, len: size });
        self.tally.check("rot on all copies is an error for that block alone (6)");
    }

    /// Where a node's drive has a block of a volume.
    fn place_of(&self, node: usize, volume: u32, block: u64) -> Option<u64> {
        let it = &self.nodes[node];
        let found = it.store.as_ref()?.data_blocks().into_iter().find(|(no, of, ..)| (it.replicas[no], *of) == (volume, block));
        found.map(|(_, _, place, _)| it.share.start.0 + place.0)
    }

    /// All replicas are equal, block by block, and hold what their maps say (6, 24, 25).
    fn compare(&mut self) {
        for volume in self.groups() {
            let mut first = None;
            for node in (0..self.nodes.len()).filter(|node| self.nodes[*node].gone.is_none()) {
                let it = &self.nodes[node];
                let start = it.share.start.0;
                let (no, store) = (it.replica_of(volume).expect("made"), it.store.as_ref().expect("alive"));
                let contents = store.contents(no, |at| it.drive.bytes(start + at.0)).unwrap_or_else(|error| panic!("node {node}: {error}"));
                if self.is_log_only(volume, node) {
                    assert!(
                        contents.is_empty(),
                        "node {node} keeps the log of volume {volume} alone, and has {} blocks of it",
                        contents.len()
                    );
                    self.tally.check("a log-only member has no content");
                    continue;
                }
                let Some(other) = &first else {
                    first = Some(contents);
                    continue;
                };
                for block in other.keys().chain(contents.keys()) {
                    let (a, b) = (other.get(block), contents.get(block));
                    assert!(
                        a == b && a != Some(&None),
                        "invariant 6: at rest volume {volume} block {block} is {a:08x?} on node 0 and {b:08x?} on node {node}"
                    );
                }
                self.tally.check("replicas are equal block by block (6, 25)");
            }
            self.compare_snapshots(volume);
        }
        for it in self.nodes.iter().filter(|it| it.gone.is_none()) {
            let (start, store) = (it.share.start.0, it.store.as_ref().expect("alive"));
            store.audit(|at| it.drive.bytes(start + at.0)).unwrap_or_else(|error| panic!("node {}: audit at rest: {error}", it.no));
            for (no, block, place, crc) in store.data_blocks() {
                let volume = it.replicas[&no];
                let found = penstock_wire::crc32c(&it.drive.bytes(start + place.0));
                assert!(
                    found == crc || self.oracle.may_be_lost(volume, block),
                    "node {}: volume {volume} block {block} at {place:?} is {found:08x}, its map says {crc:08x}",
                    it.no
                );
            }
        }
        self.tally.checks("space adds up, and maps are true (24)", self.nodes.len() as u64);
    }

    /// The power of all goes once more, at rest: everything is there again.
    fn start_again(&mut self) {
        for node in 0..self.nodes.len() {
            self.die(node, true);
        }
        self.until(LEADER_US, "each volume has a leader after all came back (14, 25)", World::all_lead);
        self.read_back();
        self.until(PATIENCE_US, "all members have applied the same after all came back", World::all_applied);
        self.tally.check("all back after a power cut at rest (14)");
    }

    fn stop(&mut self) {
        for node in 0..self.nodes.len() {
            let id = self.next_order;
            self.next_order += 1;
            self.nodes[node].orders.insert(id, Order::Stop);
            self.feed(node, Event::Order { id: OrderId(id), order: Order::Stop });
            self.until(PATIENCE_US, "the store has stopped", |w| !w.nodes[node].orders.contains_key(&id));
            let it = &self.nodes[node];
            assert!(it.out.is_empty(), "a stopped store has device commands out");
            assert_eq!(it.store.as_ref().expect("alive").view().stage, Stage::Stopped);
            // What came in the turns since is not the store's any more.
            assert_eq!(it.mem.out_blocks(), 0, "node {node} has stopped and holds memory");
            self.count_work(node);
            self.tally.check("memory given back");
        }
    }
}
