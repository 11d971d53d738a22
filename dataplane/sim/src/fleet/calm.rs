//! The closing phase: faults stop, and then everything must come to an end (25): a leader for each volume, all blocks read back, all members equal, all
//! drained, space that adds up, memory given back.

use penstock_engine::{Event, HostOp, Order, OrderId, Span, Stage};

use super::hosts::plain;
use super::node::{Node, Phase};
use super::orders::Made;
use super::world::World;
use crate::run::stuck;
use crate::stamp::BLOCK;

/// From the last fault to a leader of every volume (25).
const LEADER_US: u64 = 10_000_000;
/// Anything else.
const PATIENCE_US: u64 = 20_000_000;

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
            if self.groups().into_iter().all(|volume| self.leader_of(volume).is_some() || self.may_have_lost(volume)) && self.all_serve() {
                self.tally.did("seeds that end with a group that may have lost what counts with a quorum", 1);
                return;
            }
            stuck(format!("no leader of each volume ten seconds after the last fault (25): {}", self.describe()));
        }
        self.tally.check("a leader within ten seconds (25)");
        self.until(PATIENCE_US, "members whose drive is not what it was are stopped (12)", World::gone_are_out);
        let served = self.served;
        self.until(PATIENCE_US, "hosts are served", |w| w.served >= served + 10);
        self.resting = true;
        self.until(PATIENCE_US, "every command is answered, volumes are made", |w| {
            w.nodes.iter().all(|it| it.ios.is_empty() && it.orders.is_empty()) && w.all_lead()
        });
        self.finish_orders();
        self.read_back();
        if (self.plan.decay.rots() || self.plan.decay.newest) && !self.within(2_000_000, World::all_applied) {
            // What a leader cannot read it cannot send again, and nobody else is asked for it yet.
            self.tally.did("seeds that end with a bad entry in a leader's log", 1);
            return;
        }
        if self.is_short_of_space() && !self.within(5_000_000, World::all_applied) {
            let away = !self.plan.strikes.is_empty();
            assert!(away, "invariant 15: nobody was away, and a member has no space for what is committed: {}", self.describe());
            self.tally.did("seeds that end with a drive that others filled while a member was away", 1);
            return;
        }
        self.until(PATIENCE_US, "all members have applied the same", World::all_applied);
        self.tally.check("members have applied the same (25)");
        self.drain();
        // A checkpoint that is half way has space that neither it nor the one before is told to have.
        self.until(PATIENCE_US, "no drive has anything to do", |w| w.nodes.iter().all(|it| it.out.is_empty() && it.inbox.is_empty()));
        self.compare();
        if super::plan::RECOVERS && self.rng.one_in(3) {
            self.start_again();
        }
        self.stop();
    }

    /// A member that was away finds its drive filled by others: leaders count on members alone that are there.
    fn is_short_of_space(&self) -> bool {
        let views = self.nodes.iter().filter_map(|it| it.store.as_ref()).map(|store| store.view());
        views.into_iter().any(|view| view.extents_free <= view.extents / 4 + 16)
    }

    fn until(&mut self, limit: u64, what: &str, done: impl Fn(&World) -> bool) {
        let end = self.now + limit;
        while !done(self) {
            let more = self.step();
            if !more {
                stuck(format!("nothing will happen any more, and still not: {what}: {}", self.describe()));
            }
            if self.now >= end {
                stuck(format!("{limit} us without a fault, and still not: {what}: {}", self.describe()));
            }
        }
    }

    fn groups(&self) -> Vec<u32> {
        self.volumes.values().filter(|v| v.replicated).map(|v| v.no).collect()
    }

    fn leader_of(&self, volume: u32) -> Option<usize> {
        (0..self.nodes.len()).find(|node| self.nodes[*node].alive() && self.nodes[*node].leads(volume))
    }

    fn all_serve(&self) -> bool {
        self.nodes.iter().all(|it| it.phase == Phase::Serving && it.fence.is_none())
    }

    fn all_lead(&self) -> bool {
        self.all_serve()
            && self.volumes.values().all(|v| v.made.iter().all(|made| *made == Made::Done))
            && self.groups().into_iter().all(|volume| self.leader_of(volume).is_some())
    }

    /// Whose drive is not what it was takes no part, and says so.
    fn gone_are_out(&self) -> bool {
        self.nodes.iter().filter(|it| it.gone.is_some()).all(|it| {
            let look = |no: &penstock_engine::ReplicaNo| it.store.as_ref().and_then(|store| store.look(*no));
            it.replicas.len() == self.groups().len() && it.replicas.keys().all(|no| look(no).is_some_and(|look| look.stopped))
        })
    }

    fn all_applied(&self) -> bool {
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

    fn within(&mut self, us: u64, done: impl Fn(&World) -> bool) -> bool {
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
        }
    }

    /// Every block that was ever touched, at the leader.
    fn read_back(&mut self) {
        for volume in self.volumes.keys().copied().collect::<Vec<_>>() {
            let (touched, size) = (self.oracle.touched(volume), self.oracle.size_blocks(volume));
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
            let v = &self.volumes[&volume];
            let node = if v.replicated { self.leader_of(volume) } else { Some(v.home) };
            let Some(node) = node else {
                self.until(LEADER_US, "a leader is there again", |w| w.leader_of(volume).is_some());
                continue;
            };
            if !self.oracle.has_room(volume, span) {
                // Too many commands on these blocks of which nobody knows what became.
                return;
            }
            let (served, lost) = (self.served, self.lost());
            self.send_command(node, plain(volume, HostOp::Read(span)));
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

    fn drain(&mut self) {
        for node in 0..self.nodes.len() {
            let id = self.next_order;
            self.next_order += 1;
            self.nodes[node].orders.insert(id, Order::Drain);
            self.feed(node, Event::Order { id: OrderId(id), order: Order::Drain });
            self.until(PATIENCE_US, "the drain is done", |w| !w.nodes[node].orders.contains_key(&id));
            let view = self.nodes[node].store.as_ref().expect("alive").view();
            assert_eq!(view.undrained_extents, 0, "node {node} is drained and has undrained extents");
            self.tally.check("drained and checkpointed (25)");
        }
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
                let Some(other) = &first else {
                    first = Some(contents);
                    continue;
                };
                for block in other.keys().chain(contents.keys()) {
                    let (a, b) = (other.get(block), contents.get(block));
                    let lost = matches!(a, Some(None)) || matches!(b, Some(None));
                    assert!(
                        a == b || lost && self.oracle.may_be_lost(volume, *block),
                        "invariant 6: at rest volume {volume} block {block} is {a:08x?} on node 0 and {b:08x?} on node {node}"
                    );
                }
                self.tally.check("replicas are equal block by block (6, 25)");
            }
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
