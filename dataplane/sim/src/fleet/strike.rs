//! The faults of a fleet: what strikes, where, and for how long.
//!
//! Not here: what drives do by themselves (`drives`) and what the network does to each frame (`net`).

use penstock_wire::Index;

use super::node::Phase;
use super::plan::Strike;
use super::world::{Coming, World};

impl World {
    /// Who leads some group, by its own account.
    fn leader(&self) -> Option<usize> {
        let leads = |node: &usize| self.nodes[*node].alive() && self.nodes[*node].standings.values().any(|standing| standing.serves);
        (0..self.nodes.len()).find(leads)
    }

    pub fn strike(&mut self) {
        if self.calm {
            return;
        }
        let wait = self.rng.within(10_000, 2 * self.plan.every_us);
        self.after(wait, Coming::Strike);
        if self.plan.strikes.is_empty() {
            return;
        }
        let count = self.nodes.len() as u64;
        let (node, other) = (self.rng.below(count) as usize, self.rng.below(count) as usize);
        let node = if self.rng.one_in(2) { self.leader().unwrap_or(node) } else { node };
        let length = self.rng.within(30_000, 1_200_000);
        let until = self.now + length;
        let strikes = self.plan.strikes.clone();
        let what = self.rng.pick(&strikes);
        self.trace.note(self.now, &[8, node as u64, what as u64], || format!("{what:?} strikes {node}, other {other}, for {length} us"));
        match what {
            Strike::Kill => self.doom(node, false),
            Strike::KillPair if node != other => {
                self.tally.fault("two processes killed at once (13, 16)");
                self.doom(node, false);
                self.doom(other, false);
            }
            Strike::KillPair => {}
            Strike::PowerCut => self.doom(node, true),
            Strike::PowerCutOfAll => {
                self.tally.fault("power cut at every node (14)");
                for node in 0..self.nodes.len() {
                    self.die(node, true);
                }
            }
            Strike::Isolate => {
                self.tally.fault("node isolated (8)");
                for peer in 0..self.nodes.len() {
                    self.cut[node][peer] = until;
                    self.cut[peer][node] = until;
                }
                self.insist_until(node, length);
            }
            Strike::OneWay => {
                self.tally.fault("one-way partition (9)");
                self.cut[node][other] = until;
            }
            Strike::Deaf => {
                self.tally.fault("node hears nobody (9)");
                for peer in 0..self.nodes.len() {
                    self.cut[peer][node] = until;
                }
                self.insist_until(node, length);
            }
            Strike::Bridge => {
                self.tally.fault("bridge partition (9)");
                self.split(until, Some(node));
            }
            Strike::Split => {
                self.tally.fault("two halves apart (8)");
                self.split(until, None);
                self.insist_until(node, length);
            }
            Strike::Pause => {
                if self.nodes[node].alive() {
                    self.tally.fault("process paused (11)");
                    self.nodes[node].paused = until;
                    // Hosts go on sending: what waits in its sockets comes first when it wakes.
                    self.insist(node);
                    self.after(length, Coming::Insist { node });
                }
            }
            Strike::Freeze => {
                if self.nodes[node].alive() {
                    self.tally.fault("machine stopped, its clock with it (11)");
                    let it = &mut self.nodes[node];
                    (it.paused, it.frozen) = (until, self.now);
                    self.insist(node);
                    self.after(length, Coming::Insist { node });
                }
            }
            Strike::Leap => {
                self.tally.fault("clock leaps ahead (11)");
                let ms = self.rng.within(50, 5_000);
                self.nodes[node].offset += ms;
                self.insist(node);
            }
            Strike::Replay => {
                for (from, to, bytes) in std::mem::take(&mut self.old_frames) {
                    self.tally.fault("frame of long ago comes again (10)");
                    let delay = self.rng.within(20, 20_000);
                    self.after(delay, Coming::Frame { from, to, bytes, flip: None });
                }
            }
            Strike::SlowDrive => {
                self.tally.fault("slow drive (12)");
                self.nodes[node].slow = until;
                self.nodes[node].slowness = self.rng.within(100, 1000);
            }
            Strike::SlowLink => {
                self.tally.fault("slow link (12)");
                self.nodes[node].lag = until;
            }
            Strike::Transfer => {
                self.transfer(node, other);
                if self.rng.one_in(3) {
                    // And back again, while hosts still wait for what the first has.
                    let wait = self.rng.within(60_000, 400_000);
                    self.after(wait, Coming::Transfer { from: other, to: node });
                } else if self.rng.one_in(2) {
                    // The old leader hears no more of what follows.
                    for peer in 0..self.nodes.len() {
                        self.cut[peer][node] = self.now + 300_000;
                    }
                    self.insist_until(node, 300_000);
                }
            }
            Strike::Wipe => self.wipe(node),
            Strike::PutBack => self.put_back(node),
            Strike::CutOff => {
                if let Some(leader) = self.leader().filter(|leader| *leader != other) {
                    // First nothing passes between a leader and one other; what follows makes that one its rival.
                    self.cut_between(leader, other, self.now + 900_000);
                    let wait = self.rng.within(140_000, 330_000);
                    self.after(wait, Coming::CutOff { node: leader, other });
                }
            }
        }
    }

    /// Each member of the node is believed in its present opening: a quorum has it on its drives. And none of the others is newborn: as long as one
    /// waits to be believed for the first time, its group cannot spare another.
    fn is_believed(&self, node: usize) -> bool {
        let it = &self.nodes[node];
        let groups = self.volumes.values().filter(|v| v.replicated).count();
        let believed = |store: &penstock_engine::Store| it.replicas.keys().all(|no| store.look(*no).is_some_and(|look| look.admitted));
        let everyone = |volume: u32| (0..self.nodes.len()).all(|node| self.judge.took_part(volume, node));
        let grown = self.volumes.values().filter(|v| v.replicated).all(|v| everyone(v.no));
        grown && it.phase == Phase::Serving && it.fence.is_none() && it.replicas.len() == groups && it.store.as_ref().is_some_and(believed)
    }

    /// What a node has of volumes, others have. Where a log-only member is all that is left beside one with content, what that one lacks is in the log; and where a
    /// member is being rebuilt, one that is whole reaches up to where that one's log begins: with both gone a group has lost two.
    fn content_outlives(&self, node: usize) -> bool {
        let look = |volume: u32, at: usize| {
            let it = &self.nodes[at];
            it.replica_of(volume).and_then(|no| it.store.as_ref()?.look(no))
        };
        self.volumes.values().filter(|v| v.replicated && !self.is_log_only(v.no, node)).all(|v| {
            let others: Vec<usize> = (0..self.nodes.len()).filter(|other| *other != node).collect();
            let reaches = |at: usize, from: Index| look(v.no, at).map(|look| !look.rebuilding && !look.stopped && from <= look.last);
            let Some(log) = others.iter().find(|other| self.is_log_only(v.no, **other)) else {
                let mut rebuilt = others.iter().filter_map(|other| look(v.no, *other)).filter(|look| look.rebuilding);
                return rebuilt.all(|look| others.iter().any(|other| reaches(*other, look.start).unwrap_or(true)));
            };
            let Some(begins) = look(v.no, *log).map(|look| look.start) else { return false };
            others.iter().filter(|other| *other != log).all(|other| reaches(*other, begins).unwrap_or(false))
        })
    }

    fn wipe(&mut self, node: usize) {
        if self.is_believed(node) && self.spare() && self.content_outlives(node) {
            self.tally.fault("drive wiped (19)");
            self.die(node, false);
            self.nodes[node].wipe();
            // Control makes again what it finds missing.
            for v in self.volumes.values_mut().filter(|v| v.replicated) {
                v.made[node] = super::orders::Made::No;
            }
        }
    }

    /// The drive is as it was before it was opened last, or earlier.
    fn put_back(&mut self, node: usize) {
        if !self.is_believed(node) || !self.spare() || !self.content_outlives(node) {
            return;
        }
        let Some(copy) = self.nodes[node].copy.take() else { return };
        self.tally.fault("drive put back from an older copy (19)");
        self.die(node, false);
        let forgets = self.rng.one_in(2);
        let it = &mut self.nodes[node];
        it.change_drive(copy, super::node::Gone::PutBack);
        if forgets {
            it.witness = None;
        }
    }

    /// The node dies in its next turn, in the middle of what that does.
    fn doom(&mut self, node: usize, power: bool) {
        let it = &mut self.nodes[node];
        if it.alive() {
            if it.paused > self.now {
                self.die(node, power);
            } else {
                it.dies = Some(power);
                let now = it.clock(self.now);
                self.feed(node, penstock_engine::Event::Tick { now });
            }
        }
    }

    /// The nodes fall into two halves, drawn by lot; `bridge` is in both.
    fn split(&mut self, until: u64, bridge: Option<usize>) {
        let side: Vec<bool> = self.nodes.iter().map(|_| self.rng.one_in(2)).collect();
        for a in 0..side.len() {
            for b in (0..side.len()).filter(|b| side[a] != side[*b] && bridge != Some(a) && bridge != Some(*b)) {
                self.cut[a][b] = until;
            }
        }
    }

    fn cut_between(&mut self, a: usize, b: usize, until: u64) {
        self.cut[a][b] = until;
        self.cut[b][a] = until;
    }

    /// Hosts go on with a node that others do not reach.
    fn insist_until(&mut self, node: usize, length: u64) {
        (1..=length / 40_000).for_each(|turn| self.after(turn * 40_000, Coming::Insist { node }));
    }

    /// The leader is cut off and everyone who answered it restarts at once: nobody remembers its lease but by withholding votes.
    pub fn cut_off(&mut self, leader: usize, other: usize) {
        if self.calm {
            return;
        }
        self.tally.fault("leader cut off while its followers restart (8, 13)");
        (1..=25).for_each(|turn| self.after(turn * 10_000, Coming::Insist { node: leader }));
        for node in (0..self.nodes.len()).filter(|node| *node != leader) {
            self.cut_between(leader, node, self.now + 500_000);
            if node != other && self.nodes[node].phase == Phase::Serving {
                self.die(node, false);
                self.after(1_000, Coming::Start { node });
            }
        }
    }

    /// Faults stop.
    pub fn heal(&mut self) {
        self.calm = true;
        self.cut.iter_mut().for_each(|row| row.fill(0));
        self.old_frames.clear();
        for node in 0..self.nodes.len() {
            let it = &mut self.nodes[node];
            it.thaw(self.now);
            (it.paused, it.slow, it.lag, it.dies) = (0, 0, 0, None);
            it.mem.calm();
            if it.turn_due {
                // It may wait for the end of a pause that is over.
                let life = it.life;
                self.after(0, Coming::Turn { node, life });
            }
        }
        self.nap_until = 0;
    }
}
