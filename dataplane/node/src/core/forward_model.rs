//! Commands of a node's one-path doors against a group of three as nodes see it, from seeds: frames are lost, doubled and late, leaders die or do not
//! know yet that they lead no more, what an old term has in its log survives or does not, and the door's node comes back in another life.
//!
//! Judged: nothing takes effect after it was answered, or after an answer to a later life of the door's node about the same block; in one term nothing
//! takes effect twice; a read has what was written last; in the end all is answered. The order ([`super::outward`]) and the leader's memory
//! ([`super::visitor`]) are the ones that run; what [`super::forward`] decides between them is said again here in a line each.

use std::collections::{BTreeMap, BTreeSet};

use penstock_engine::Millis;
use penstock_wire::peer::Outcome;
use penstock_wire::{Incarnation, NodeId, Term};

use super::outward::{Outward, Target};
use super::visitor::{Verdict, Visitor};

/// The door is on this node, which may lead too.
const HOME: usize = 0;
const NODES: usize = 3;
const BLOCKS: u64 = 3;
const OUT_MAX: usize = 6;

/// A mistake that the judges have to see.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mistake {
    None,
    /// A leader takes what was meant for another term.
    AnyTerm,
    /// A leader does not remember what it was asked.
    NoMemory,
    /// Commands that overlap do not wait for each other.
    NoOrder,
    /// What a node asked for in its last life counts.
    AnyLife,
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// Numbers commands over all lives.
type Serial = u64;

#[derive(Clone, Copy, Debug)]
struct Command {
    serial: Serial,
    life: u8,
    id: u64,
    block: u64,
    writes: bool,
}

#[derive(Clone, Copy, Debug)]
enum Frame {
    Ask { to: usize, command: Command, done: u64, term: u64 },
    Answer { from: usize, command: Command, term: u64, outcome: Outcome, value: Serial },
}

/// What a node believes, and what its engine has.
#[derive(Default)]
struct Node {
    /// The term that it leads, as far as it knows.
    leads: Option<u64>,
    /// Taken in, not proposed: with the term that it was for.
    held: Vec<(Command, u64)>,
    /// In its log, not committed.
    tail: Vec<(Command, u64)>,
    visitor: Visitor,
    /// The life of the door's node that it is connected to.
    knows: u8,
}

#[derive(Default, Debug)]
struct Seen {
    twice: u64,
    again: u64,
    stale: u64,
    lives: u64,
    answered: u64,
}

struct Model {
    dice: Dice,
    mistake: Mistake,
    nodes: Vec<Node>,
    term: u64,
    leader: Option<usize>,
    net: Vec<Frame>,
    now: u64,
    life: u8,
    outward: Outward,
    /// Of this life, not answered.
    open: BTreeMap<u64, Command>,
    serials: Serial,
    /// What blocks hold by what is committed.
    blocks: [Serial; BLOCKS as usize],
    /// What a read may find: what was answered last, and what other lives left open.
    may: Vec<BTreeSet<Serial>>,
    answered: BTreeSet<Serial>,
    /// Writes of this and other lives that nothing may hear of any more.
    buried: BTreeSet<Serial>,
    effects: BTreeMap<Serial, u64>,
    in_term: BTreeSet<(Serial, u64)>,
    seen: Seen,
}

fn life(life: u8) -> Incarnation {
    Incarnation([life; 16])
}

fn node_id(node: usize) -> NodeId {
    NodeId([node as u8; 16])
}

type Judged = Result<(), String>;

impl Model {
    fn new(seed: u64, mistake: Mistake) -> Self {
        Self {
            dice: Dice(seed),
            mistake,
            nodes: (0..NODES).map(|_| Node { knows: 1, ..Node::default() }).collect(),
            term: 0,
            leader: None,
            net: Vec::new(),
            now: 0,
            life: 1,
            outward: Outward::default(),
            open: BTreeMap::new(),
            serials: 0,
            blocks: [0; BLOCKS as usize],
            may: vec![BTreeSet::from([0]); BLOCKS as usize],
            answered: BTreeSet::new(),
            buried: BTreeSet::new(),
            effects: BTreeMap::new(),
            in_term: BTreeSet::new(),
            seen: Seen::default(),
        }
    }

    fn run(seed: u64, mistake: Mistake) -> Result<Seen, String> {
        let mut model = Self::new(seed, mistake);
        for _ in 0..600 {
            model.step().map_err(|why| format!("seed {seed}: {why}"))?;
        }
        model.settle().map_err(|why| format!("seed {seed}: {why}"))?;
        Ok(model.seen)
    }

    fn step(&mut self) -> Judged {
        match self.dice.below(20) {
            0..4 => self.ask(),
            4..10 => return self.deliver(false),
            10..15 => {
                let node = self.dice.below(NODES);
                return self.engine(node);
            }
            15 => {
                self.now += 1000;
                self.tick();
            }
            16 => self.learn(),
            17 if self.dice.one_in(3) => self.elect()?,
            18 if self.dice.one_in(4) => {
                let node = self.dice.below(NODES);
                self.step_down(node)?;
            }
            19 if self.dice.one_in(10) => self.restart()?,
            _ => {}
        }
        Ok(())
    }

    /// A host of the door asks for something.
    fn ask(&mut self) {
        if self.open.len() >= OUT_MAX {
            return;
        }
        let (block, writes) = (self.dice.below(BLOCKS as usize) as u64, !self.dice.one_in(3));
        self.serials += 1;
        let range = if self.mistake == Mistake::NoOrder { self.serials + 100..self.serials + 101 } else { block..block + 1 };
        let id = self.outward.take(range, writes);
        self.open.insert(id, Command { serial: self.serials, life: self.life, id, block, writes });
        self.push_on();
    }

    fn push_on(&mut self) {
        while let Some((id, target)) = self.outward.next() {
            self.send(id, target);
            self.outward.went(id, Millis(self.now));
        }
    }

    fn send(&mut self, id: u64, target: Target) {
        let command = self.open[&id];
        self.seen.again += u64::from(self.outward.is_again(id));
        match target {
            Target::Here(_) => match self.nodes[HOME].leads {
                Some(term) => self.nodes[HOME].held.push((command, term)),
                None => self.net.push(Frame::Answer { from: HOME, command, term: 0, outcome: Outcome::NotReady, value: 0 }),
            },
            Target::There { node, term } => {
                let to = usize::from(node.0[0]);
                self.net.push(Frame::Ask { to, command, done: self.outward.oldest(), term: term.0 });
            }
        }
    }

    fn tick(&mut self) {
        self.push_on();
        let Some(target @ Target::There { .. }) = self.outward.target() else { return };
        for id in self.outward.late(Millis(self.now)) {
            self.send(id, target);
        }
    }

    fn deliver(&mut self, is_calm: bool) -> Judged {
        if self.net.is_empty() {
            return Ok(());
        }
        let at = self.dice.below(self.net.len());
        let frame = self.net[at];
        // What a store here says to its own core is neither lost nor doubled.
        let is_here = matches!(frame, Frame::Answer { from: HOME, .. });
        let fate = if is_calm || is_here { 0 } else { self.dice.below(10) };
        if fate != 1 {
            self.net.swap_remove(at);
        }
        match frame {
            _ if fate == 2 => Ok(()),
            Frame::Ask { to, command, done, term } => self.on_ask(to, command, done, term),
            Frame::Answer { from, command, term, outcome, value } => self.on_answer(from, command, term, outcome, value),
        }
    }

    fn on_ask(&mut self, to: usize, command: Command, done: u64, term: u64) -> Judged {
        let node = &mut self.nodes[to];
        if command.life > node.knows {
            // A connection begins with who is there.
            node.knows = command.life;
        }
        if command.life < node.knows && self.mistake != Mistake::AnyLife {
            self.seen.stale += 1;
            return Ok(());
        }
        let answer = |outcome| Frame::Answer { from: to, command, term, outcome, value: 0 };
        let leads = node.leads.is_some_and(|leads| leads == term || self.mistake == Mistake::AnyTerm);
        if !leads {
            self.seen.stale += 1;
            self.net.push(answer(Outcome::NotReady));
            return Ok(());
        }
        let verdict = match self.mistake {
            Mistake::NoMemory => Verdict::Run,
            _ => node.visitor.ask(life(command.life), command.id, done),
        };
        match verdict {
            Verdict::Run => node.held.push((command, term)),
            Verdict::Ignore => {}
            Verdict::Say(outcome, _) => self.net.push(answer(outcome)),
        }
        Ok(())
    }

    fn on_answer(&mut self, from: usize, command: Command, term: u64, outcome: Outcome, value: Serial) -> Judged {
        if command.life != self.life {
            return Ok(());
        }
        if from != HOME && !self.outward.is_out(command.id, Target::There { node: node_id(from), term: Term(term) }) {
            return Ok(());
        }
        if outcome == Outcome::NotReady {
            self.outward.back(command.id);
            return Ok(());
        }
        if self.open.remove(&command.id).is_none() {
            return Ok(());
        }
        self.seen.answered += 1;
        self.answered.insert(command.serial);
        let may = &mut self.may[command.block as usize];
        if command.writes {
            // Whatever another life left open stood in front of this, or never comes.
            self.buried.extend(may.iter().filter(|serial| **serial != command.serial));
            *may = BTreeSet::from([command.serial]);
        } else if may.contains(&value) {
            self.buried.extend(may.iter().filter(|serial| **serial != value));
            *may = BTreeSet::from([value]);
        } else {
            return Err(format!("{command:?} has read {value}, not one of {may:?}"));
        }
        self.outward.done(command.id);
        self.push_on();
        Ok(())
    }

    /// A node's engine goes on by one thing.
    fn engine(&mut self, at: usize) -> Judged {
        let node = &mut self.nodes[at];
        if node.held.is_empty() && node.tail.is_empty() {
            return Ok(());
        }
        if !node.held.is_empty() && (node.tail.is_empty() || self.dice.one_in(2)) {
            let next = self.dice.below(node.held.len());
            let (command, term) = node.held.remove(next);
            if self.dice.one_in(12) {
                return self.reply(at, command, term, Outcome::NotReady, 0);
            }
            // Under the term in which it leads now.
            node.tail.push((command, term));
            return Ok(());
        }
        if self.leader != Some(at) {
            return Ok(()); // Nothing of an old term is committed any more.
        }
        let (command, term) = node.tail.remove(0);
        self.effect(command, self.term)?;
        let value = self.blocks[command.block as usize];
        self.reply(at, command, term, Outcome::Ok, value)
    }

    fn reply(&mut self, at: usize, command: Command, term: u64, outcome: Outcome, value: Serial) -> Judged {
        if at == HOME && command.life == self.life {
            return self.on_answer(HOME, command, term, outcome, value);
        }
        self.nodes[at].visitor.end(command.id, outcome, 0, command.writes);
        self.net.push(Frame::Answer { from: at, command, term, outcome, value });
        Ok(())
    }

    fn effect(&mut self, command: Command, term: u64) -> Judged {
        if !command.writes {
            return Ok(());
        }
        let Command { serial, block, .. } = command;
        if self.answered.contains(&serial) || self.buried.contains(&serial) {
            return Err(format!("{command:?} takes effect after its answer, or one that hides it"));
        }
        if !self.in_term.insert((serial, term)) {
            return Err(format!("{command:?} takes effect twice in term {term}"));
        }
        let times = self.effects.entry(serial).or_default();
        *times += 1;
        self.seen.twice += u64::from(*times == 2);
        self.blocks[block as usize] = serial;
        Ok(())
    }

    /// Another term, with what survives of the last one's log in front.
    fn elect(&mut self) -> Judged {
        if let Some(old) = self.leader.take() {
            let kept = self.dice.below(self.nodes[old].tail.len() + 1);
            let survivors: Vec<_> = self.nodes[old].tail[..kept].to_vec();
            for (command, _) in survivors {
                self.effect(command, self.term)?;
            }
        }
        self.term += 1;
        let next = self.dice.below(NODES);
        // What it held as the leader of an older term it has given back before it is one again.
        self.step_down(next)?;
        self.leader = Some(next);
        self.nodes[next].leads = Some(self.term);
        if next == HOME {
            self.learn();
        }
        Ok(())
    }

    /// A node finds that it leads no more; one that does lead does not.
    fn step_down(&mut self, at: usize) -> Judged {
        if self.leader == Some(at) {
            return Ok(());
        }
        let node = &mut self.nodes[at];
        node.leads = None;
        let lost: Vec<_> = node.held.drain(..).chain(node.tail.drain(..)).collect();
        for (command, term) in lost {
            self.reply(at, command, term, Outcome::NotReady, 0)?;
        }
        Ok(())
    }

    /// The door's node hears who leads.
    fn learn(&mut self) {
        let term = Term(self.term);
        let target = self.leader.map(|at| if at == HOME { Target::Here(term) } else { Target::There { node: node_id(at), term } });
        self.outward.aim(target);
        self.push_on();
    }

    /// The door's node dies and comes back; its hosts have no answer to what was open.
    fn restart(&mut self) -> Judged {
        if self.leader == Some(HOME) {
            self.elect()?;
        }
        if self.leader == Some(HOME) {
            return Ok(());
        }
        self.nodes[HOME] = Node { knows: self.life + 1, ..Node::default() };
        self.life += 1;
        self.seen.lives += 1;
        self.outward = Outward::default();
        for (_, command) in std::mem::take(&mut self.open) {
            if command.writes {
                self.may[command.block as usize].insert(command.serial);
            }
        }
        // What the others heard of it before: a new connection says who is there now.
        for node in &mut self.nodes {
            if self.dice.one_in(2) {
                node.knows = self.life;
            }
        }
        self.net.retain(|frame| !matches!(frame, Frame::Answer { from: HOME, .. }));
        Ok(())
    }

    /// Faults end: everything is answered.
    fn settle(&mut self) -> Judged {
        self.elect()?;
        for at in 0..NODES {
            self.step_down(at)?;
        }
        self.learn();
        for _ in 0..200 {
            self.now += 1000;
            self.tick();
            for _ in 0..40 {
                self.deliver(true)?;
                for at in 0..NODES {
                    self.engine(at)?;
                }
            }
            if self.open.is_empty() {
                return Ok(());
            }
        }
        Err(format!("never answered: {:?}", self.open))
    }
}

#[test]
fn no_forwarded_command_takes_effect_after_its_answer_and_all_are_answered() {
    let mut all = Seen::default();
    for seed in 0..3000 {
        let seen = Model::run(seed, Mistake::None).unwrap();
        all.twice += seen.twice;
        all.again += seen.again;
        all.stale += seen.stale;
        all.lives += seen.lives;
        all.answered += seen.answered;
    }
    // What it is about was there.
    assert!(all.answered > 20_000 && all.twice > 1000 && all.again > 10_000 && all.stale > 10_000 && all.lives > 1000, "{all:?}");
}

#[test]
fn judges_see_each_mistake_of_forwarding() {
    for mistake in [Mistake::AnyTerm, Mistake::NoMemory, Mistake::NoOrder, Mistake::AnyLife] {
        let caught = (0..3000).find_map(|seed| Model::run(seed, mistake).err());
        assert!(caught.is_some(), "{mistake:?} is not seen");
    }
}
