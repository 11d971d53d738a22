//! The hosts of a fleet: which commands they send to which node, what they make of the answers, and what nobody will ever tell them.
//!
//! A command that was answered [`Status::NotReady`], or never, may have taken effect or may still: its entry may stand in a log. That ends when a host is
//! answered under a *later* term: who leads it has applied all that can have been before. An attempt is judged by the term that its member was in when
//! the store took it in; so a store that holds a command over a change of terms and proposes it then is seen to (invariant 8). A retry is a new
//! command with the same payload.

use std::collections::VecDeque;

use penstock_engine::replica::Part;
use penstock_engine::{Event, HostOp, IoId, ReplicaNo, Span, Standing, Status};
use penstock_wire::{HostId, ReplicaShape, Term};

use super::node::{Attempt, Node, Phase};
use super::orders::Made;
use super::world::{Coming, World};
use crate::content::{bytes_of, payload_of};
use crate::oracle::{Command, Pieces, pieces_of};
use crate::register::Patch;
use crate::stamp::{BLOCK, SECTOR, ZEROS};

/// For so long a leader may go by what a member said of its space.
const NEWS_US: u64 = 2_000_000;

/// A volume, with its host.
pub struct Volume {
    pub no: u32,
    pub shape: ReplicaShape,
    pub replicated: bool,
    pub origin: Option<super::clones::Origin>,
    /// The node of one that is not.
    pub home: usize,
    /// By node.
    pub made: Vec<Made>,
    /// A larger size that was ordered and not acknowledged.
    pub growing: Option<u64>,
    pub grown: bool,
    pub out: u32,
    pub hot: Vec<u64>,
    /// Who was last heard to lead.
    pub guess: usize,
    pub again: VecDeque<Command>,
}

impl Volume {
    pub fn new(no: u32, shape: ReplicaShape, replicated: bool, home: usize, hot: Vec<u64>) -> Self {
        let (made, again) = (Vec::new(), VecDeque::new());
        Self { no, shape, replicated, origin: None, home, made, growing: None, grown: false, out: 0, hot, guess: home, again }
    }
}

/// A command of which nobody knows what became.
pub struct Linger {
    pub term: Term,
    pub command: Command,
}

fn changes(op: &HostOp) -> bool {
    matches!(op, HostOp::Write(_) | HostOp::Zero(_) | HostOp::CompareWrite(_))
}

impl World {
    /// A member's part in its group changed.
    pub fn stands(&mut self, node: usize, replica: ReplicaNo, standing: Standing) {
        if let Some(volume) = self.nodes[node].replicas.get(&replica).copied() {
            self.judge_standing(node, volume, standing);
            self.nodes[node].standings.insert(volume, standing);
        }
    }

    /// The store took these commands in in this turn.
    /// `led`: the volumes whose member led when the turn began.
    pub fn taken_in(&mut self, node: usize, ios: &[u32], led: &[u32]) {
        let it = &mut self.nodes[node];
        for io in ios {
            let Some(attempt) = it.ios.get_mut(io) else { continue };
            let volume = attempt.home;
            if let Some(standing) = it.standings.get(&volume) {
                attempt.term = standing.term;
                attempt.leads = standing.part == Part::Leader;
                attempt.led = attempt.leads || led.contains(&volume);
            } else {
                attempt.term = Term(0);
            }
        }
    }

    /// A host gets its turn: sends some commands, or waits.
    pub fn think(&mut self, volume: u32) {
        if self.hosts_rest() || !self.volumes.contains_key(&volume) {
            return;
        }
        let pause = self.rng.within(50, self.plan.habits.think_us);
        self.after(pause, Coming::Think { volume });
        self.retry_orders(volume);
        let v = &self.volumes[&volume];
        if v.made.iter().filter(|made| **made == Made::Done).count() < v.made.len() / 2 + 1 || self.now < self.nap_until {
            return;
        }
        if self.plan.habits.naps && !self.calm && self.rng.one_in(150) {
            self.nap_until = self.now + self.rng.within(600_000, 1_500_000);
            self.tally.did("naps of the hosts", 1);
        }
        let free = self.plan.habits.queue_depth.saturating_sub(v.out);
        for _ in 0..self.rng.within(1, 4).min(u64::from(free)) {
            let Some(node) = self.path(volume) else { return };
            let again = self.volumes.get_mut(&volume).expect("there").again.pop_front();
            let kept = again.is_none() && self.plan.habits.snapshots && self.rng.percent(10);
            let kept = if kept { self.read_of_snapshot(node, volume) } else { None };
            let Some(command) = again.or(kept).or_else(|| self.choose(volume)) else { return };
            self.send_command(node, command);
        }
    }

    /// The node that the next command goes to.
    fn path(&mut self, volume: u32) -> Option<usize> {
        let v = &self.volumes[&volume];
        let node = if !v.replicated {
            v.home
        } else if self.rng.percent(self.plan.habits.astray_percent) {
            self.rng.below(self.nodes.len() as u64) as usize
        } else {
            v.guess
        };
        let there = self.nodes[node].replica_of(volume).is_some() && self.nodes[node].phase == Phase::Serving;
        if !there && self.volumes[&volume].replicated {
            self.look_elsewhere(volume);
        }
        there.then_some(node)
    }

    pub fn look_elsewhere(&mut self, volume: u32) {
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        self.volumes.get_mut(&volume).expect("there").guess = node;
    }

    /// Sends a command, which has everything but its serial.
    pub fn send_command(&mut self, node: usize, mut command: Command) {
        let volume = command.volume;
        let Some(span) = command.op.span() else { return self.send_flush(node, command) };
        if !self.oracle.has_room(volume, span) {
            return;
        }
        command.serial = self.next_serial;
        self.next_serial += 1;
        let h = &self.plan.habits;
        let direct = command.other.is_none() && !self.rng.percent(h.guest_percent);
        let meddles = !direct && command.other.is_none() && matches!(command.op, HostOp::Write(_)) && self.rng.percent(h.meddle_percent);
        if meddles {
            command.other = Some(command.id + 1);
        }
        let other = command.other.map(|id| payload_of(volume, span, id));
        let payload = match command.op {
            HostOp::Read(span) | HostOp::ReadSnapshot(_, span) => vec![0xcd; span.len as usize],
            HostOp::Write(span) => payload_of(volume, span, command.id),
            HostOp::CompareWrite(span) => {
                let mut both = bytes_of(volume, &command.expect);
                both.extend(payload_of(volume, span, command.id));
                both
            }
            HostOp::Zero(_) | HostOp::Flush | HostOp::Reserve(_) => Vec::new(),
        };
        self.oracle.begin(&command);
        self.hand_over(node, command, payload, direct, other);
    }

    fn send_flush(&mut self, node: usize, mut command: Command) {
        command.serial = self.next_serial;
        self.next_serial += 1;
        self.hand_over(node, command, Vec::new(), true, None);
    }

    fn hand_over(&mut self, node: usize, command: Command, payload: Vec<u8>, direct: bool, other: Option<Vec<u8>>) {
        let home = self.home_of(command.volume);
        let it = &mut self.nodes[node];
        let Some(replica) = it.replica_of(home) else { panic!("no path to {command:?} at {node}") };
        let io = it.free_ios.pop().unwrap_or_else(|| {
            it.io_count += 1;
            it.io_count - 1
        });
        it.mem.put(IoId(io), payload, direct, other);
        let (op, serial, life) = (command.op, command.serial, it.life);
        it.ios.insert(io, Attempt { command, home, term: Term(u64::MAX), leads: false, led: false, given_up: false, lapsed: false });
        self.volumes.get_mut(&home).expect("there").out += 1;
        self.tally.did("host commands", 1);
        self.feed(node, Event::Host { io: IoId(io), replica, host: HostId::default(), op });
        let patience = self.plan.habits.patience_us;
        self.after(patience, Coming::Impatient { node, life, serial });
    }

    /// No answer for long: the host tries another path.
    pub fn impatient(&mut self, node: usize, serial: u64) {
        let Some(attempt) = self.nodes[node].ios.values_mut().find(|attempt| attempt.command.serial == serial) else { return };
        let home = attempt.home;
        if attempt.given_up || !self.volumes[&home].replicated {
            return;
        }
        attempt.given_up = true;
        let command = attempt.command.clone();
        self.tally.did("commands given up on a path", 1);
        let v = self.volumes.get_mut(&home).expect("there");
        v.out = v.out.saturating_sub(1);
        self.look_elsewhere(home);
        self.send_again(command);
    }

    fn send_again(&mut self, command: Command) {
        if changes(&command.op) && self.rng.percent(self.plan.habits.again_percent) {
            self.tally.did("commands sent again", 1);
            self.volumes.get_mut(&command.volume).expect("there").again.push_back(command);
        }
    }

    /// Every block that hosts care for is read at one node, and one is written, whoever leads.
    pub fn insist(&mut self, node: usize) {
        if self.hosts_rest() {
            return;
        }
        for volume in self.volumes.values().filter(|v| v.replicated).map(|v| v.no).collect::<Vec<_>>() {
            if self.nodes[node].replica_of(volume).is_none() || self.nodes[node].phase != Phase::Serving {
                continue;
            }
            for block in self.volumes[&volume].hot.iter().take(4).copied().collect::<Vec<_>>() {
                let span = Span { offset: block * BLOCK as u64, len: BLOCK as u64 };
                self.send_command(node, plain(volume, HostOp::Read(span)));
            }
            if let Some(command) = self.choose(volume).filter(|_| self.rng.one_in(3)) {
                self.send_command(node, command);
            }
        }
    }

    fn choose(&mut self, volume: u32) -> Option<Command> {
        let h = self.plan.habits.clone();
        let v = &self.volumes[&volume];
        let (total, unit) = (self.oracle.size_blocks(volume), u64::from(v.shape.logical_block));
        if self.rng.percent(2) {
            return Some(plain(volume, HostOp::Flush));
        }
        let hot = self.rng.pick(&v.hot).min(total - 1);
        let blocks = if self.rng.percent(h.big_percent) {
            self.rng.within(64, 600)
        } else if self.rng.percent(h.multi_percent) {
            self.rng.within(2, 12)
        } else {
            1
        };
        let first = if self.rng.percent(85) { hot } else { self.rng.below(total) };
        let blocks = blocks.min(total - first);
        let mut span = Span { offset: first * BLOCK as u64, len: blocks * BLOCK as u64 };
        if unit < BLOCK as u64 && self.rng.percent(h.sub_block_percent) {
            let cut = self.rng.below(8) * SECTOR as u64;
            span.offset += cut;
            span.len -= cut;
            let tail = self.rng.below((span.len / SECTOR as u64).min(8)) * SECTOR as u64;
            span.len -= tail;
        }
        if !self.oracle.has_room(volume, span) {
            return None;
        }
        let roll = self.rng.below(100) as u32;
        let reads = if self.calm { 30 } else { h.read_percent };
        let mut command = plain(volume, HostOp::Read(span));
        if roll >= reads {
            command.op = if roll < reads + h.zero_percent {
                HostOp::Zero(span)
            // What is there of a clone's origin is stamped as that one's.
            } else if roll < reads + h.zero_percent + h.compare_percent && span.len <= 2 * BLOCK as u64 && v.origin.is_none() {
                HostOp::CompareWrite(span)
            } else {
                HostOp::Write(span)
            };
        }
        if matches!(command.op, HostOp::Write(_) | HostOp::CompareWrite(_)) {
            command.id = self.next_write;
            self.next_write += 2;
        }
        if matches!(command.op, HostOp::CompareWrite(_)) {
            command.expect = self.guess_content(volume, span);
        }
        Some(command)
    }

    /// What a host expects to find: mostly one of the values that may be there.
    fn guess_content(&mut self, volume: u32, span: Span) -> Pieces {
        let mut pieces = pieces_of(span, 0);
        for (block, patch) in &mut pieces {
            let all = self.oracle.possible(volume, *block).unwrap_or_else(|wrong| panic!("{wrong}"));
            let image = self.rng.pick(&all);
            *patch = Patch { mask: patch.mask, image: Patch { image, ..*patch }.over(&ZEROS) };
            if self.rng.percent(15) {
                let s = patch.mask.trailing_zeros() as usize;
                patch.image[s] = if patch.image[s] == 0 { self.next_write + 1_000_000_000 } else { 0 };
            }
        }
        pieces
    }

    /// The store answered a command.
    pub fn replied(&mut self, node: usize, io: IoId, status: Status) {
        let it = &mut self.nodes[node];
        let attempt = it.ios.remove(&io.0).unwrap_or_else(|| panic!("node {node} answers {io:?}, which is not out"));
        let payload = it.mem.take(io);
        it.free_ios.push(io.0);
        let command = attempt.command.clone();
        let (fenced_before, unproven) = (it.fenced_at.is_some_and(|at| command.serial >= at), it.opened_fenced);
        let home = attempt.home;
        let v = self.volumes.get_mut(&home).expect("there");
        let replicated = v.replicated;
        if !attempt.given_up {
            v.out = v.out.saturating_sub(1);
        }
        self.check_status(node, &attempt, status);
        let unknown = match status {
            Status::NotReady | Status::Fenced => true,
            Status::OutOfRange => {
                if !attempt.lapsed {
                    self.oracle.withdrawn(&command).unwrap_or_else(|wrong| panic!("{wrong}"));
                }
                return;
            }
            Status::NoSpace => command.op.span().is_some_and(|span| span.len > 255 * BLOCK as u64) || matches!(command.op, HostOp::Zero(_)),
            Status::Unrecovered => command.op.span().is_some_and(|span| pieces_of(span, 0).len() > 1),
            _ => false,
        };
        if replicated && matches!(status, Status::NotReady | Status::Fenced) {
            self.look_elsewhere(home);
            if !attempt.given_up {
                self.send_again(command.clone());
            }
        }
        if attempt.lapsed {
            return;
        }
        if replicated && changes(&command.op) && unknown {
            self.unknown(node, attempt);
            return;
        }
        if let Err(wrong) = self.oracle.answered(&command, status, &payload, fenced_before, unproven) {
            panic!("node {node}, term {:?}, command {} {:?} answered {status:?}: {wrong}", attempt.term, command.serial, command.op);
        }
        self.tally.check("answers against the oracle (1, 2, 3, 4, 8, 14, 17, 19)");
        if matches!(status, Status::Ok | Status::Miscompare { .. }) {
            self.served += 1;
            if replicated {
                self.volumes.get_mut(&home).expect("there").guess = node;
                // What a snapshot holds is so whoever leads: nothing is proven by it.
                if !matches!(command.op, HostOp::Flush | HostOp::ReadSnapshot(..)) && attempt.leads {
                    self.served_under(command.volume, attempt.term);
                }
            }
            if status == Status::Ok && changes(&command.op) {
                self.tally.did(if replicated { "writes acknowledged by a quorum" } else { "writes acknowledged by one" }, 1);
            }
        }
    }

    /// Whether the store may say this now.
    fn check_status(&mut self, node: usize, attempt: &Attempt, status: Status) {
        let command = &attempt.command;
        let it = &self.nodes[node];
        let replicated = self.volumes[&attempt.home].replicated;
        match status {
            // What was answered before is durable, whoever leads.
            Status::Ok | Status::Miscompare { .. } if replicated && command.op != HostOp::Flush => {
                assert!(
                    attempt.led,
                    "invariant 17: node {node} answered {:?} of volume {} with {status:?}; it did not lead when that came, in {:?}",
                    command.op, command.volume, attempt.term
                );
                self.tally.check("answers by a leader (17)");
            }
            Status::Ok => {}
            Status::Miscompare { .. } => assert!(matches!(command.op, HostOp::CompareWrite(_)), "{command:?} was answered {status:?}"),
            Status::Fenced => assert!(it.fence.is_some() || it.command_failed, "{command:?} was answered Fenced, and no command failed"),
            Status::NotReady => {
                assert!(
                    replicated || it.phase != Phase::Serving || it.store.is_none(),
                    "{command:?} was answered NotReady by a node that serves"
                );
            }
            Status::Unrecovered => {
                let ruined = |(volume, block): (u32, u64)| {
                    let of = |span: Span| (span.offset / BLOCK as u64..(span.offset + span.len).div_ceil(BLOCK as u64)).contains(&block);
                    volume == command.volume && command.op.span().is_some_and(of)
                };
                assert!(
                    !replicated || !self.resting || self.ruined.is_some_and(ruined),
                    "node {node} says that {:?} of volume {} is lost, and others have it",
                    command.op,
                    command.volume
                );
                self.tally.did("answers Unrecovered", 1);
            }
            Status::NoSpace => {
                self.tally.fault("full drive (15)");
                self.check_full(node, command);
            }
            // Who does not know yet that it leads no more may not know how the volume has grown either.
            Status::OutOfRange if replicated && self.outgrown(node, attempt) => {}
            Status::OutOfRange | Status::Invalid | Status::Conflict => panic!("{command:?} is well formed and was answered {status:?}"),
        }
    }

    /// Whether others may have made the volume larger than this node knows: the leader of the newest term knows.
    fn outgrown(&self, node: usize, attempt: &Attempt) -> bool {
        let volume = attempt.home;
        let term = |it: &Node| it.standings.get(&volume).map_or(Term(0), |standing| standing.term);
        let newest = self.nodes.iter().map(term).max() == Some(term(&self.nodes[node]));
        self.volumes[&volume].grown && !(attempt.leads && newest)
    }

    /// No space: only where space is short, at some member, or was when it said so last.
    fn check_full(&mut self, node: usize, command: &Command) {
        let short = self.nodes.iter().any(|it| {
            it.store.as_ref().map(|store| store.view()).is_none_or(|v| v.extents_free <= v.undrained_extents + 80 + v.extents / 4)
        });
        // What is promised to entries that are not applied counts too.
        let waits = self.nodes.iter().any(|it| {
            let looks = it.replicas.keys().filter_map(|no| it.store.as_ref()?.look(*no));
            looks.into_iter().any(|look| look.last.0 > look.applied.0 + 8)
        });
        let told = self.nodes[node].heard_short.is_some_and(|at| self.now < at + NEWS_US);
        assert!(short || waits || told, "{command:?} was answered NoSpace, and no node is short of it: {}", self.describe());
        self.tally.check("NoSpace only when space is short (15)");
    }

    /// What became of it nobody knows: it may be in a log.
    pub fn unknown(&mut self, node: usize, attempt: Attempt) {
        let command = attempt.command;
        if !changes(&command.op) {
            if command.op != HostOp::Flush {
                self.oracle.withdrawn(&command).unwrap_or_else(|wrong| panic!("node {node}: {wrong}"));
            }
            return;
        }
        self.tally.did("writes of which nobody knows what became", 1);
        // One that never got into the store is in no log.
        if attempt.term == Term(u64::MAX) {
            self.oracle.withdrawn(&command).unwrap_or_else(|wrong| panic!("node {node}: {wrong}"));
            return;
        }
        self.lingering.insert(command.serial, Linger { term: attempt.term, command });
    }

    /// A host was answered under `term`: what was taken in under an earlier one has taken effect by now, or never will (8).
    fn served_under(&mut self, volume: u32, term: Term) {
        let mut over: Vec<Command> = Vec::new();
        self.lingering.retain(|_, linger| {
            let lapses = linger.command.volume == volume && linger.term < term;
            if lapses {
                over.push(linger.command.clone());
            }
            !lapses
        });
        for it in &mut self.nodes {
            for attempt in it.ios.values_mut().filter(|attempt| attempt.command.volume == volume && attempt.term < term) {
                if changes(&attempt.command.op) && !attempt.lapsed {
                    attempt.lapsed = true;
                    over.push(attempt.command.clone());
                }
            }
        }
        for command in over {
            self.oracle.lapsed(&command).unwrap_or_else(|wrong| panic!("command {} {:?}: {wrong}", command.serial, command.op));
            self.tally.check("commands of an earlier term never take effect late (8)");
        }
    }
}

pub fn plain(volume: u32, op: HostOp) -> Command {
    Command { serial: 0, volume, op, id: 0, other: None, expect: Vec::new() }
}
