//! The loop: events in order of time, each handed to one node, whose group is then settled and whose wishes are carried out; the
//! network between; and the faults.

use super::disk::{Checkpoint, Disk};
use super::judge::{Judge, Verdict};
use super::node::{Node, Stage};
use crate::canaries::Bug;
use crate::rng::{Rng, mix};
use crate::run::stuck;
use crate::tally::{Tally, Trace};
use penstock_engine::replica::{Canary, Output, Part, Stop, Timing};
use penstock_wire::batch::{ENTRY_HEAD, Section};
use penstock_wire::peer::{Body, HEADER, Header, Install, Member, MemberNo, Members, Message, PROTOCOL, Role, Verified};
use penstock_wire::{Index, NodeId, ReplicaId, Term};
use std::collections::BTreeMap;

pub(super) const TICK: u64 = 25;
const BLOCKS: u64 = 3;
/// Faults strike this long, then everything heals.
const STORM: u64 = 12_000;
const CALM: u64 = 10_000;
const SILENT_AFTER: u64 = 150;
/// Frames that are kept to come again.
const OLD_FRAMES_MAX: usize = 64;
pub(super) const NODES_MAX: usize = 9;

pub(super) enum Event {
    Tick {
        node: usize,
        life: u64,
    },
    Frame {
        to: usize,
        bytes: Vec<u8>,
        payload_ok: bool,
    },
    Barrier {
        node: usize,
        life: u64,
        to: u64,
    },
    Start {
        node: usize,
    },
    Ask {
        node: usize,
        life: u64,
    },
    Client,
    /// Hosts read every block at one node.
    Reads {
        node: usize,
    },
    Fault,
    /// The second half of [`World::cut_off`].
    CutOff {
        node: usize,
        other: usize,
    },
}

/// What this seed does.
pub(super) struct Plan {
    pub(super) loss: u32,
    pub(super) double: u32,
    pub(super) late: u32,
    /// Records torn by power cuts; newest promised records that rot.
    pub(super) tears: bool,
    pub(super) rot: bool,
    /// Members come and go; logs are trimmed. (Not with tears: see ARCHITECTURE.md, what resolving does not cover yet.)
    pub(super) members: bool,
    pub(super) trim: bool,
    pub(super) timing: Timing,
    pub(super) every: u64,
}

pub struct World {
    pub(super) now: u64,
    pub(super) count: u64,
    pub(super) queue: BTreeMap<(u64, u64), Event>,
    pub(super) rng: Rng,
    pub(super) nodes: Vec<Node>,
    /// What every member begins with, those that join later too: the log tells them the rest.
    pub(super) bootstrap: Members,
    /// `cut[a][b]`: until when nothing gets from a to b.
    pub(super) cut: Vec<Vec<u64>>,
    /// Until when hosts only read.
    pub(super) only_reads: u64,
    /// Until when messages to a node are late.
    pub(super) lag: Vec<u64>,
    /// When `a` last heard a beat of `b`, which life of it, and whether it was missed since.
    pub(super) heard: Vec<Vec<(u64, u64, bool)>>,
    /// Some frames, for coming again long after.
    pub(super) old_frames: Vec<(usize, Vec<u8>)>,
    pub(super) installs: BTreeMap<[u8; 16], Checkpoint>,
    pub(super) judge: Judge,
    pub(super) plan: Plan,
    pub(super) bug: Option<Bug>,
    pub(super) next_value: u32,
    pub(super) next_read: u64,
    pub(super) calm: bool,
    pub(super) served: u64,
    pub trace: Trace,
    pub tally: Tally,
}

fn members_of(count: u64) -> Members {
    let list = (1..=count).map(|no| member(MemberNo(no), Role::Voter)).collect();
    Members { next: MemberNo(count + 1), list }
}

pub(super) fn member(no: MemberNo, role: Role) -> Member {
    Member { no, role, replica: ReplicaId([no.0 as u8; 16]), node: NodeId([no.0 as u8; 16]) }
}

pub(super) fn index_of(no: MemberNo) -> usize {
    no.0 as usize - 1
}

impl World {
    pub fn new(seed: u64, bug: Option<Bug>, print: bool) -> Self {
        let mut rng = Rng::new(mix(seed ^ 0xC1));
        let kind = rng.below(4);
        let lease = rng.one_in(2);
        let timing =
            Timing { election: 8, heartbeat: 2, stride: 2, tick: TICK as u32, sleep: rng.one_in(2).then_some(12), aside: None, lease };
        let plan = Plan {
            loss: rng.pick(&[0, 1, 5, 15]),
            double: rng.pick(&[0, 2, 10]),
            late: rng.pick(&[0, 2, 8]),
            tears: kind < 3,
            rot: kind == 2,
            members: kind == 3,
            trim: kind == 3 && rng.one_in(2),
            timing,
            every: rng.pick(&[150, 400, 900]),
        };
        let count = rng.pick(&[3, 3, 3, 3, 5, 5, 7]);
        let mut world = Self {
            now: 0,
            count: 0,
            queue: BTreeMap::new(),
            rng,
            nodes: Vec::new(),
            bootstrap: members_of(count),
            cut: vec![vec![0; NODES_MAX]; NODES_MAX],
            only_reads: 0,
            lag: vec![0; NODES_MAX],
            heard: vec![vec![(0, 0, false); NODES_MAX]; NODES_MAX],
            old_frames: Vec::new(),
            installs: BTreeMap::new(),
            judge: Judge::default(),
            plan,
            bug,
            next_value: 1,
            next_read: 1,
            calm: false,
            served: 0,
            trace: Trace::new(print),
            tally: Tally::default(),
        };
        for no in 1..=count {
            world.add_node(MemberNo(no));
        }
        world.after(30, Event::Client);
        world.after(500, Event::Fault);
        world
    }

    pub(super) fn add_node(&mut self, no: MemberNo) {
        let members = self.bootstrap.clone();
        let rate = if self.plan.timing.lease { self.rng.within(960, 1040) } else { self.rng.within(700, 1400) };
        let disk = Disk::new(members.clone(), self.bug == Some(Bug::Unsealed));
        self.nodes.push(Node {
            no,
            stage: Stage::Down,
            life: 0,
            disk,
            registers: BTreeMap::new(),
            applied: Index(0),
            applied_term: Term(0),
            members,
            paused: 0,
            slow: 0,
            rotten: false,
            doubts: None,
            barrier_out: false,
            rate,
            offset: self.rng.below(1 << 40),
            out: Output::default(),
            writes: BTreeMap::new(),
            reads: BTreeMap::new(),
        });
        self.after(1, Event::Start { node: index_of(no) });
    }

    pub(super) fn after(&mut self, delay: u64, event: Event) {
        self.count += 1;
        self.queue.insert((self.now + delay, self.count), event);
    }

    pub(super) fn canary(&self) -> Option<Canary> {
        self.bug.and_then(Bug::group)
    }

    /// Runs the storm, then the calm, then asks whether everything is well again (invariant 25).
    pub fn run(&mut self) -> Verdict {
        self.run_to(STORM)?;
        self.heal();
        let served = self.served;
        self.run_to(STORM + CALM)?;
        self.end(served)
    }

    fn run_to(&mut self, end: u64) -> Verdict {
        while let Some((key, _)) = self.queue.first_key_value()
            && key.0 <= end
        {
            let (key, event) = self.queue.pop_first().expect("just seen");
            self.now = key.0;
            self.handle(event)?;
        }
        self.now = end;
        Ok(())
    }

    /// Whether the event must wait for a node that stands still.
    fn stands_still(&self, event: &Event) -> Option<u64> {
        let (Event::Tick { node, .. } | Event::Frame { to: node, .. } | Event::Barrier { node, .. } | Event::Ask { node, .. }) = event
        else {
            return None;
        };
        let until = self.nodes[*node].paused;
        (until > self.now).then(|| until - self.now)
    }

    fn handle(&mut self, event: Event) -> Verdict {
        if let Some(delay) = self.stands_still(&event) {
            self.after(delay, event);
            return Ok(());
        }
        match event {
            Event::Tick { node, life } => self.tick(node, life),
            Event::Frame { to, bytes, payload_ok } => self.frame(to, &bytes, payload_ok),
            Event::Barrier { node, life, to } => self.barrier(node, life, to),
            Event::Start { node } => self.start(node),
            Event::Ask { node, life } => self.ask(node, life),
            Event::Client => self.client(),
            Event::Reads { node } => (0..BLOCKS).try_for_each(|block| self.command(node, block, false)),
            Event::Fault => self.fault(),
            Event::CutOff { node, other } => self.cut_off(node, other),
        }
    }

    fn tick(&mut self, node: usize, life: u64) -> Verdict {
        if self.nodes[node].life != life {
            return Ok(());
        }
        let every = (TICK * 1000).div_ceil(self.nodes[node].rate);
        self.after(every, Event::Tick { node, life });
        self.beats(node);
        let (trim, now) = (self.plan.trim && self.rng.one_in(40), self.now);
        let it = &mut self.nodes[node];
        if trim && it.applied > it.disk.checkpoint.applied {
            let checkpoint =
                Checkpoint { applied: it.applied, term: it.applied_term, members: it.members.clone(), registers: it.registers.clone() };
            it.disk.checkpoint(checkpoint);
            let to = it.applied;
            if let Some(group) = it.group_mut() {
                group.trim(to);
            }
            self.tally.did("logs trimmed", 1);
        }
        if let Some(group) = self.nodes[node].group_mut() {
            group.tick();
        }
        self.trace.note(now, &[1, node as u64], || format!("tick {node}"));
        self.settle(node)
    }

    /// Beats between nodes: a new life or a missed beat wakes the group.
    fn beats(&mut self, node: usize) {
        for other in 0..self.nodes.len() {
            if other == node {
                continue;
            }
            let there = &self.nodes[other];
            let (no, life) = (there.no, there.life);
            let comes = !matches!(there.stage, Stage::Down) && there.paused <= self.now && self.cut[other][node] <= self.now;
            let (last, of, missed) = self.heard[node][other];
            let Some(group) = self.nodes[node].group_mut() else { return };
            if comes {
                if of != life {
                    group.on_restarted(no);
                }
                if of != life || missed {
                    group.wake();
                }
                self.heard[node][other] = (self.now, life, false);
            } else if !missed && self.now > last + SILENT_AFTER {
                group.wake();
                group.on_unreachable(no);
                self.heard[node][other].2 = true;
            }
        }
    }

    fn frame(&mut self, to: usize, bytes: &[u8], payload_ok: bool) -> Verdict {
        let Ok(header) = Header::decode(bytes) else {
            self.tally.fault("frame with a flipped bit (29)");
            return Ok(());
        };
        let body = match Body::decode(&header, &bytes[HEADER..]) {
            Ok(body) if payload_ok => body,
            Ok(_) => return Err("a frame with a flipped bit decodes".to_owned()),
            Err(error) if payload_ok => return Err(format!("a frame that was sent does not decode: {error}")),
            Err(_) => {
                self.tally.fault("frame with a flipped bit (29)");
                return Ok(());
            }
        };
        self.trace.note(self.now, &[2, to as u64, header.body_crc.into()], || format!("{to} receives {body:?}"));
        match body {
            Body::Groups(messages) => {
                for message in Verified::all(messages, &[]).map_err(|error| error.to_string())? {
                    let Some(group) = self.nodes[to].group_mut() else { continue };
                    if let Err(refused) = group.step(message) {
                        self.tally.did("messages refused", 1);
                        self.trace.note(self.now, &[3], || format!("  refused: {refused}"));
                    }
                }
                self.settle(to)
            }
            Body::EntriesAsk(ask) => self.answer(to, &ask),
            Body::EntriesAnswer(answer) => self.answered(to, &answer),
            _ => Err("a frame that nobody sends".to_owned()),
        }
    }

    fn barrier(&mut self, node: usize, life: u64, to: u64) -> Verdict {
        if self.nodes[node].life != life {
            return Ok(());
        }
        self.trace.note(self.now, &[4, node as u64, to], || format!("{node} has durable to {to}"));
        let it = &mut self.nodes[node];
        it.barrier_out = false;
        if let Some(mark) = it.disk.barrier(to)
            && let Some(group) = it.group_mut()
        {
            group.on_persisted(mark);
        }
        self.settle(node)
    }

    /// Carries out what the group wants, and looks whether it may want that.
    pub(super) fn settle(&mut self, node: usize) -> Verdict {
        let clock = self.nodes[node].clock(self.now);
        let it = &mut self.nodes[node];
        let Stage::Up(group) = &mut it.stage else { return Ok(()) };
        let mut out = std::mem::take(&mut it.out);
        out.clear();
        group.settle(clock, &mut out);
        if let Some(Stop::Quarantined(why)) = group.stopped() {
            return Err(format!("{:?} is quarantined: {why}", it.no));
        }
        let view = group.view().expect("it has not stopped");
        if view.applied > view.persisted || view.applied > view.committed {
            return Err(format!("invariant 10: applied beyond persisted or committed: {view:?}"));
        }
        for persist in out.persist.drain(..) {
            if let Some(install) = &persist.install {
                let checkpoint = self.installs.get(&install.digest).ok_or("an install of a state that nobody offered")?.clone();
                (it.applied, it.applied_term, it.registers) = (checkpoint.applied, checkpoint.term, checkpoint.registers.clone());
                it.members = checkpoint.members.clone();
                // State and log position change in one step: what was there before counts until it does.
                it.disk.install(checkpoint);
                self.tally.did("installs", 1);
            }
            it.disk.write(persist);
        }
        let leader = view.part == Part::Leader;
        let mut sent = std::mem::take(&mut out.send);
        for entry in out.apply.drain(..) {
            self.judge.applied(&entry, view.term, &self.nodes[node].disk, &mut self.tally)?;
            self.nodes[node].apply(&entry);
            if let Some((term, operation)) = self.nodes[node].writes.remove(&entry.index.0)
                && term == entry.term
            {
                self.judge.acknowledged(&operation, entry.index, &entry.bytes, &mut self.tally)?;
                self.served += 1;
                self.tally.did("writes acknowledged", 1);
            }
        }
        if out.resolved {
            self.resolved(node);
        }
        if let Some(members) = out.members.take() {
            self.tally.did("changes of members applied", 1);
            self.nodes[node].members = members;
        }
        let it = &self.nodes[node];
        if let Some(group) = it.group() {
            self.judge.leads(it.no, group, &view, &mut self.tally)?;
        }
        for id in out.reads.drain(..) {
            if let Some(operation) = self.nodes[node].reads.remove(&id) {
                self.judge.read(&operation, &self.nodes[node].registers, &mut self.tally)?;
                self.served += 1;
                self.tally.did("reads by round", 1);
            }
        }
        for id in out.reads_refused.drain(..) {
            self.nodes[node].reads.remove(&id);
        }
        if !leader {
            self.nodes[node].writes.clear();
        }
        if out.wants_install.take().is_some() {
            self.offer(node);
        }
        for message in sent.drain(..) {
            self.judge.sent(&message, &self.nodes[node].disk, &mut self.tally)?;
            self.send(node, message);
        }
        out.send = sent;
        self.nodes[node].out = out;
        self.pump(node);
        Ok(())
    }

    fn offer(&mut self, node: usize) {
        let checkpoint = self.nodes[node].disk.checkpoint.clone();
        let mut digest = [0; 16];
        digest[..8].copy_from_slice(&checkpoint.applied.0.to_le_bytes());
        digest[8..].copy_from_slice(&checkpoint.term.0.to_le_bytes());
        let (index, index_term, members) = (checkpoint.applied, checkpoint.term, checkpoint.members.clone());
        let install = Install { index, index_term, digest, members, reservations: None, stack: None };
        self.installs.insert(digest, checkpoint);
        if install.index.0 > 0
            && let Some(group) = self.nodes[node].group_mut()
        {
            group.offer_install(install);
        }
    }

    /// Keeps the drive at work: one barrier at a time, a seal where a ballot waits for one.
    fn pump(&mut self, node: usize) {
        let slow = self.nodes[node].slow > self.now;
        let it = &mut self.nodes[node];
        if it.barrier_out {
            return;
        }
        if it.disk.wants_seal() {
            it.disk.seal();
        }
        if it.disk.is_behind() {
            it.barrier_out = true;
            let (life, to) = (it.life, it.disk.last());
            let delay = if slow { self.rng.within(50, 400) } else { self.rng.within(1, 4) };
            self.after(delay, Event::Barrier { node, life, to });
        }
    }

    fn send(&mut self, from: usize, message: Message) {
        let to = index_of(message.to);
        self.transmit(from, to, Body::Groups(vec![message]).encode(PROTOCOL, 1));
    }

    pub(super) fn transmit(&mut self, from: usize, to: usize, bytes: Vec<u8>) {
        if to < self.nodes.len() && self.old_frames.len() < OLD_FRAMES_MAX && self.rng.one_in(60) {
            self.old_frames.push((to, bytes.clone()));
        }
        if to >= self.nodes.len() || self.cut[from][to] > self.now {
            self.tally.fault("message into a partition (8, 9)");
            return;
        }
        if !self.calm && self.rng.percent(self.plan.loss) {
            self.tally.fault("message lost (10)");
            return;
        }
        let copies = if !self.calm && self.rng.percent(self.plan.double) {
            self.tally.fault("message doubled (10)");
            2
        } else {
            1
        };
        for _ in 0..copies {
            let mut bytes = bytes.clone();
            let mut delay = self.rng.within(1, 4);
            if !self.calm && self.rng.percent(self.plan.late) {
                self.tally.fault("message delayed (10)");
                delay = self.rng.within(5, 700);
            }
            if self.lag[to] > self.now {
                self.tally.fault("message over a slow link (12)");
                delay += self.rng.within(50, 250);
            }
            let flip = !self.calm && self.rng.one_in(500);
            if flip {
                let bit = self.rng.below(bytes.len() as u64 * 8) as usize;
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            self.after(delay, Event::Frame { to, bytes, payload_ok: !flip });
        }
    }

    fn client(&mut self) -> Verdict {
        let wait = self.rng.within(3, 15);
        self.after(wait, Event::Client);
        let leading: Vec<usize> = (0..self.nodes.len())
            .filter(|node| {
                let it = &self.nodes[*node];
                it.paused <= self.now && it.group().and_then(|group| group.view()).is_some_and(|view| view.part == Part::Leader)
            })
            .collect();
        if leading.is_empty() {
            return Ok(());
        }
        // Sometimes nobody asks for long, so that groups fall asleep.
        if self.plan.timing.sleep.is_some() && self.now / 1500 % 2 == 1 && !self.rng.one_in(60) {
            return Ok(());
        }
        let node = self.rng.pick(&leading);
        let (block, write) = (self.rng.below(BLOCKS), self.rng.one_in(2) && self.only_reads <= self.now);
        self.command(node, block, write)
    }

    /// A host's command comes to `node`.
    fn command(&mut self, node: usize, block: u64, write: bool) -> Verdict {
        let clock = self.nodes[node].clock(self.now);
        if write {
            let value = self.next_value;
            self.next_value += 1;
            let operation = self.judge.begin(block, value);
            let mut section = Section::default();
            section.entry(0, Term(0), Index(0));
            section.zero(block, value);
            let Some(group) = self.nodes[node].group_mut() else { return Ok(()) };
            let term = group.view().map_or(Term(0), |view| view.term);
            if let Ok(index) = group.propose(term, section.bytes()[ENTRY_HEAD..].to_vec()) {
                self.nodes[node].writes.insert(index.0, (term, operation));
            }
        } else {
            let operation = self.judge.begin(block, 0);
            let id = self.next_read;
            self.next_read += 1;
            let Some(group) = self.nodes[node].group_mut() else { return Ok(()) };
            if group.may_read(clock) {
                self.judge.read(&operation, &self.nodes[node].registers, &mut self.tally)?;
                self.served += 1;
                self.tally.did("reads by lease", 1);
            } else {
                group.read(id);
                self.nodes[node].reads.insert(id, operation);
            }
        }
        self.trace.note(self.now, &[7, node as u64], || format!("a client at {node}"));
        self.settle(node)
    }

    pub(super) fn leader(&self) -> Option<usize> {
        let leads =
            |node: &Node| node.group().and_then(|group| group.view()).filter(|view| view.part == Part::Leader).map(|view| view.term);
        (0..self.nodes.len()).filter(|node| leads(&self.nodes[*node]).is_some()).max_by_key(|node| leads(&self.nodes[*node]))
    }

    /// Everything is well again: a leader, operations served, all members the same, and idle groups asleep.
    fn end(&mut self, served: u64) -> Verdict {
        self.judge.end(&mut self.tally)?;
        let leader = self.leader().unwrap_or_else(|| stuck("invariant 25: nobody leads 10 s after the faults stopped".to_owned()));
        if self.served < served + 50 {
            stuck(format!("invariant 25: {} operations were served in 10 s of calm", self.served - served));
        }
        // No more clients: everything settles.
        self.queue.retain(|_, event| !matches!(event, Event::Client));
        self.run_to(STORM + CALM + 3000)?;
        let leader = self.leader().unwrap_or(leader);
        let members = self.nodes[leader].members.clone();
        for member in &members.list {
            self.tally.check("members are the same at the end (6, 25)");
            let (it, of) = (&self.nodes[index_of(member.no)], &self.nodes[leader]);
            if it.registers != of.registers || it.group().is_none() {
                stuck(format!("invariant 25: {:?} has applied {:?}, the leader {:?}", it.no, it.applied, of.applied));
            }
            if self.plan.timing.sleep.is_some() && it.group().and_then(|group| group.view()).is_none_or(|view| !view.asleep) {
                stuck(format!("{:?} is awake 3 s after the last operation: {:?}", it.no, it.group().and_then(|group| group.view())));
            }
        }
        Ok(())
    }
}
