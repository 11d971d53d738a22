//! The faults: what strikes, where, and for how long.

use super::judge::Verdict;
use super::node::Stage;
use super::world::{Event, NODES_MAX, World, index_of, member};
use penstock_wire::Term;
use penstock_wire::peer::{MemberNo, Role};

impl World {
    fn crash(&mut self, node: usize, power: bool) {
        if matches!(self.nodes[node].stage, Stage::Down) {
            return;
        }
        let mut rng = self.rng.fork(3);
        // Rot at more members than the group can lose takes what was acknowledged, and nothing could bring it back.
        let spare = self.nodes.iter().filter(|it| it.rotten).count() < self.bootstrap.voters().count().div_ceil(2) - 1;
        let it = &mut self.nodes[node];
        it.stop();
        if power {
            let rot = self.plan.rot && spare && rng.one_in(2);
            let (torn, rotten) = it.disk.power_cut(&mut rng, self.plan.tears, rot);
            it.rotten |= rotten > 0;
            self.tally.faults("record torn or lost by a power cut (1, 2)", torn);
            self.tally.faults("rot of the newest promised record (5)", rotten);
        }
        let back = if self.rng.one_in(3) { self.rng.within(2, 40) } else { self.rng.within(50, 1500) };
        self.after(back, Event::Start { node });
    }

    pub(super) fn fault(&mut self) -> Verdict {
        if self.calm {
            return Ok(());
        }
        let wait = self.rng.within(10, 2 * self.plan.every);
        self.after(wait, Event::Fault);
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        let other = self.rng.below(self.nodes.len() as u64) as usize;
        let node = if self.rng.one_in(2) { self.leader().unwrap_or(node) } else { node };
        let until = self.now + self.rng.within(50, 1500);
        let what = self.rng.below(16);
        self.trace.note(self.now, &[8, node as u64, what], || format!("fault {what} at {node}"));
        match what {
            0 | 1 => {
                self.tally.fault("power cut at one node (2)");
                self.crash(node, true);
            }
            2 => {
                self.tally.fault("process killed (13)");
                self.crash(node, false);
            }
            3 => {
                self.tally.fault("power cut at every node (14)");
                for node in 0..self.nodes.len() {
                    self.crash(node, true);
                }
            }
            4 => {
                self.tally.fault("node isolated (8)");
                for peer in 0..self.nodes.len() {
                    self.cut[node][peer] = until;
                    self.cut[peer][node] = until;
                }
            }
            5 => {
                self.tally.fault("one-way partition (9)");
                self.cut[node][other] = until;
            }
            6 => {
                self.tally.fault("node hears nobody (9)");
                for peer in 0..self.nodes.len() {
                    self.cut[peer][node] = until;
                }
            }
            7 => {
                self.tally.fault("process paused (11)");
                self.nodes[node].paused = until;
                // What waited in its sockets comes first.
                self.after(until - self.now, Event::Reads { node });
            }
            8 if self.rng.one_in(4) => self.lag[node] = until,
            8 => {
                self.tally.fault("slow drive (12)");
                self.nodes[node].slow = until;
            }
            9 | 10 => return self.transfer(node, other),
            11 => {
                // First nothing passes between a leader and one other; what follows makes that one its rival.
                if let Some(leader) = self.leader().filter(|leader| *leader != other) {
                    self.cut_between(leader, other, self.now + 900);
                    // Just before the timeouts that the rival can have.
                    let wait = self.rng.pick(&[200, 250, 300, 350]) - self.rng.within(0, 60);
                    // Without writes the rival's log stays as good as the others'.
                    self.only_reads = self.now + wait;
                    if self.rng.one_in(2) {
                        self.lag[leader] = self.now + wait;
                    }
                    self.after(wait, Event::CutOff { node: leader, other });
                }
            }
            12 if self.plan.members => return self.change(),
            12 => {
                // Two that do not reach each other, and everyone reaches the others.
                self.tally.fault("partial partition (9)");
                self.cut_between(node, other, until);
            }
            13 => {
                self.tally.fault("two processes killed at once (13, 16)");
                self.crash(node, false);
                self.crash(other, false);
            }
            14 => {
                // Two halves, which may have one in both.
                let bridge = if self.rng.one_in(2) { node } else { usize::MAX };
                self.tally.fault(if bridge == node { "bridge partition (9)" } else { "two halves apart (8)" });
                let side: Vec<bool> = self.nodes.iter().map(|_| self.rng.one_in(2)).collect();
                for a in (0..side.len()).filter(|a| *a != bridge) {
                    for b in (0..side.len()).filter(|b| *b != bridge && side[a] != side[*b]) {
                        self.cut[a][b] = until;
                    }
                }
            }
            _ => {
                for (to, bytes) in std::mem::take(&mut self.old_frames) {
                    self.tally.fault("frame of long ago comes again (10)");
                    let delay = self.rng.within(1, 30);
                    self.after(delay, Event::Frame { to, bytes, payload_ok: true });
                }
            }
        }
        Ok(())
    }

    fn cut_between(&mut self, a: usize, b: usize, until: u64) {
        self.cut[a][b] = until;
        self.cut[b][a] = until;
    }

    /// The leader is cut off and everyone who answered it restarts at once: nobody remembers its lease but by withholding votes.
    pub(super) fn cut_off(&mut self, leader: usize, other: usize) -> Verdict {
        if self.calm {
            return Ok(());
        }
        (1..=30).for_each(|turn| self.after(10 * turn, Event::Reads { node: leader }));
        self.tally.fault("leader cut off while its followers restart (8, 13)");
        for node in (0..self.nodes.len()).filter(|node| *node != leader) {
            self.cut_between(leader, node, self.now + 500);
            if node != other && !matches!(self.nodes[node].stage, Stage::Down) {
                self.nodes[node].stop();
                let back = self.rng.within(1, 5);
                self.after(back, Event::Start { node });
            }
        }
        Ok(())
    }

    fn transfer(&mut self, node: usize, other: usize) -> Verdict {
        self.tally.fault("leader transfer");
        let to = self.nodes[other].no;
        if let Some(group) = self.nodes[node].group_mut() {
            group.transfer(to);
        }
        self.settle(node)?;
        if self.rng.one_in(2) {
            // The old leader hears no more of what follows.
            let until = self.now + 300;
            for peer in 0..self.nodes.len() {
                self.cut[peer][node] = until;
            }
        }
        Ok(())
    }

    /// One step of the membership, at the leader.
    fn change(&mut self) -> Verdict {
        let Some(node) = self.leader() else { return Ok(()) };
        let me = self.nodes[node].no;
        let mut members = self.nodes[node].members.clone();
        let learner = members.learners().next();
        let added = if let Some(no) = learner.filter(|_| self.rng.one_in(2)) {
            if let Some(member) = members.list.iter_mut().find(|member| member.no == no) {
                member.role = Role::Voter;
            }
            None
        } else if members.voters().count() > 2 && self.rng.one_in(2) {
            let out: Vec<_> = members.list.iter().map(|member| member.no).filter(|no| *no != me).collect();
            let out = self.rng.pick(&out);
            members.list.retain(|member| member.no != out);
            None
        } else if index_of(members.next) < NODES_MAX {
            let no = members.next;
            members.list.push(member(no, Role::Learner));
            members.next = MemberNo(no.0 + 1);
            Some(no)
        } else {
            return Ok(());
        };
        let Some(group) = self.nodes[node].group_mut() else { return Ok(()) };
        let term = group.view().map_or(Term(0), |view| view.term);
        if group.change(term, &members).is_ok() {
            self.tally.fault("membership change (18)");
            // The number is taken once somebody's proposal names it; the machine is the same whoever's change wins.
            if let Some(no) = added
                && index_of(no) == self.nodes.len()
            {
                self.add_node(no);
            }
        }
        self.settle(node)
    }

    pub(super) fn heal(&mut self) {
        self.calm = true;
        self.cut.iter_mut().for_each(|row| row.fill(0));
        self.lag.fill(0);
        self.old_frames.clear();
        self.only_reads = 0;
        for node in 0..self.nodes.len() {
            self.nodes[node].paused = 0;
            self.nodes[node].slow = 0;
        }
    }
}
