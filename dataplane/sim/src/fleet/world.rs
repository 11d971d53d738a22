//! One queue of what will happen, in simulated microseconds, and the loop around each store: events in, `settle`, effects carried out in order; any
//! turn may be the last of a life. Not here: the network (`net`), drives (`drives`), hosts (`hosts`), orders (`orders`), faults (`strike`).

use std::collections::BTreeMap;
use std::rc::Rc;

use penstock_engine::replica::Part as GroupPart;
use penstock_engine::{DiskId, Effect, Effects, Event, Notice, Order, Stage};

use super::hosts::{Linger, Volume};
use super::judge::Judge;
use super::node::{Node, Phase};
use super::plan::Plan;
use super::snapshots::Snapshot;
use crate::canaries::Bug;
use crate::memory::SimMemory;
use crate::oracle::Oracle;
use crate::rng::{Rng, mix};
use crate::tally::{Tally, Trace};

/// Node heartbeats.
pub const BEAT_US: u64 = 50_000;
pub const SILENT_US: u64 = 150_000;
/// A store's tick, of its own clock.
pub const TICK_US: u64 = 10_000;

/// Something that will happen.
#[derive(Debug)]
pub enum Coming {
    Turn {
        node: usize,
        life: u64,
    },
    DiskDone {
        node: usize,
        life: u64,
        id: DiskId,
    },
    Tick {
        node: usize,
        life: u64,
    },
    Beat {
        node: usize,
        life: u64,
    },
    Frame {
        from: usize,
        to: usize,
        bytes: Rc<Vec<u8>>,
        flip: Option<usize>,
    },
    Start {
        node: usize,
    },
    Think {
        volume: u32,
    },
    Impatient {
        node: usize,
        life: u64,
        serial: u64,
    },
    Strike,
    CutOff {
        node: usize,
        other: usize,
    },
    /// Leadership is given on.
    Transfer {
        from: usize,
        to: usize,
    },
    /// Hosts read and write at one node, whoever leads.
    Insist {
        node: usize,
    },
    /// Somebody looks after a fence.
    Operator {
        node: usize,
    },
}

pub struct World {
    pub plan: Plan,
    pub rng: Rng,
    pub now: u64,
    count: u64,
    queue: BTreeMap<(u64, u64), Coming>,
    pub nodes: Vec<Node>,
    /// `cut[a][b]`: until when nothing gets from a to b.
    pub cut: Vec<Vec<u64>>,
    /// Some frames, for coming again long after.
    pub old_frames: Vec<(usize, usize, Rc<Vec<u8>>)>,
    pub volumes: BTreeMap<u32, Volume>,
    /// Commands of which nobody knows what became, until a later term is served.
    pub lingering: BTreeMap<u64, Linger>,
    pub snapshots: BTreeMap<u32, Snapshot>,
    pub next_snapshot: u32,
    /// Members that took another's place, by volume and node.
    pub seats: BTreeMap<(u32, usize), penstock_wire::peer::MemberNo>,
    pub oracle: Oracle,
    /// Of recoveries by force, by volume.
    pub receipts: BTreeMap<u32, Box<penstock_engine::Receipt>>,
    pub judge: Judge,
    pub trace: Trace,
    pub tally: Tally,
    pub calm: bool,
    pub next_serial: u64,
    pub next_write: u64,
    pub next_order: u64,
    /// The order that was answered last, and how.
    pub answered: Option<(u64, Result<(), penstock_engine::OrderError>)>,
    /// Hosts ask nothing until then.
    pub nap_until: u64,
    pub served: u64,
    pub resting: bool,
    /// A block that was made to rot on every drive.
    pub ruined: Option<(u32, u64)>,
    /// What one node has otherwise than the others, with its checksums right.
    pub wrong: Option<super::wrong::Wrong>,
}

impl World {
    pub fn new(seed: u64, bug: Option<Bug>, print: bool) -> World {
        let plan = Plan::draw(seed);
        let mut rng = Rng::new(mix(seed ^ 0xF1));
        let nodes = (0..plan.nodes).map(|no| Node::new(no, plan.nodes, seed, &plan, bug, &mut rng)).collect();
        let mut world = World {
            rng,
            now: 1_000,
            count: 0,
            queue: BTreeMap::new(),
            nodes,
            cut: vec![vec![0; plan.nodes]; plan.nodes],
            old_frames: Vec::new(),
            volumes: BTreeMap::new(),
            lingering: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            next_snapshot: 0,
            seats: BTreeMap::new(),
            oracle: Oracle::default(),
            receipts: BTreeMap::new(),
            judge: Judge::default(),
            trace: Trace::new(print),
            tally: Tally::default(),
            calm: false,
            next_serial: 1,
            next_write: 1,
            next_order: 1,
            answered: None,
            nap_until: 0,
            served: 0,
            resting: false,
            ruined: None,
            wrong: None,
            plan,
        };
        for node in 0..world.nodes.len() {
            let when = world.rng.within(1, 20_000);
            world.after(when, Coming::Start { node });
        }
        world.add_volumes();
        let first = world.rng.within(300_000, 900_000);
        world.after(first, Coming::Strike);
        world
    }

    /// The storm, then the calm. Panics on any violation; the caller catches and names the seed.
    pub fn run(&mut self) {
        let end = self.plan.storm_us;
        while self.now < end && self.step() {}
        self.close();
    }

    pub fn after(&mut self, us: u64, what: Coming) {
        self.count += 1;
        self.queue.insert((self.now + us, self.count), what);
    }

    /// Whether something that a node sent is still on its way.
    pub fn is_on_its_way(&self, node: usize) -> bool {
        self.queue.values().any(|what| matches!(what, Coming::Frame { from, .. } if *from == node))
    }

    /// The next thing happens. False when nothing will.
    pub fn step(&mut self) -> bool {
        let Some(((when, _), what)) = self.queue.pop_first() else { return false };
        self.now = self.now.max(when);
        match what {
            Coming::Turn { node, life } => self.turn(node, life),
            Coming::DiskDone { node, life, id } if life == self.nodes[node].life => self.disk_done(node, id),
            Coming::Tick { node, life } if life == self.nodes[node].life => {
                let it = &mut self.nodes[node];
                it.tick_due = false;
                let now = it.clock(self.now);
                self.feed(node, Event::Tick { now });
            }
            Coming::Beat { node, life } if life == self.nodes[node].life => self.beat(node),
            Coming::Frame { from, to, bytes, flip } => self.frame(from, to, &bytes, flip),
            Coming::Start { node } => self.start(node),
            Coming::Think { volume } => self.think(volume),
            Coming::Impatient { node, life, serial } if life == self.nodes[node].life => self.impatient(node, serial),
            Coming::Strike => self.strike(),
            Coming::CutOff { node, other } => self.cut_off(node, other),
            Coming::Transfer { from, to } if !self.calm => self.transfer(from, to),
            Coming::Insist { node } => self.insist(node),
            Coming::Operator { node } => self.operator(node),
            Coming::Transfer { .. } | Coming::DiskDone { .. } | Coming::Tick { .. } | Coming::Beat { .. } | Coming::Impatient { .. } => {}
        }
        true
    }

    /// An event for a store's next turn.
    pub fn feed(&mut self, node: usize, event: Event) {
        let it = &mut self.nodes[node];
        if it.store.is_none() {
            return;
        }
        it.inbox.push(event);
        self.want_turn(node);
    }

    fn want_turn(&mut self, node: usize) {
        let it = &mut self.nodes[node];
        if !it.turn_due {
            it.turn_due = true;
            let life = it.life;
            let delay = if self.rng.one_in(3) { self.rng.below(40) } else { 0 };
            self.after(delay, Coming::Turn { node, life });
        }
    }

    fn start(&mut self, node: usize) {
        if self.nodes[node].alive() || self.nodes[node].lost {
            return;
        }
        let fail = if self.calm { 0 } else { self.plan.alloc_fail_one_in };
        let limit = if self.calm { 100_000 } else { self.plan.memory_blocks };
        let mem = SimMemory::new(limit, fail, self.rng.fork(7));
        let now = self.now;
        let made = self.volumes.values().all(|v| v.made[node] == super::orders::Made::Done);
        let keeps = made && (self.nodes[node].copy.is_none() || self.rng.one_in(2));
        let it = &mut self.nodes[node];
        if keeps {
            it.copy = Some(it.drive.clone());
        }
        it.start(mem, now);
        let life = it.life;
        self.trace.note(now, &[1, node as u64, life], || format!("node {node} starts its life {life}"));
        self.tally.did("starts", 1);
        self.want_turn(node);
        let first = self.rng.within(1, BEAT_US);
        self.after(first, Coming::Beat { node, life });
    }

    fn turn(&mut self, node: usize, life: u64) {
        let now = self.now;
        let it = &mut self.nodes[node];
        if it.life != life {
            return;
        }
        if it.paused > now {
            let rest = it.paused - now;
            self.after(rest, Coming::Turn { node, life });
            return;
        }
        it.thaw(now);
        it.turn_due = false;
        it.evidence.turn_begins();
        let mut store = it.store.take().expect("turns are for the living");
        let led: Vec<u32> = it.standings.iter().filter(|(_, s)| s.part == GroupPart::Leader).map(|(volume, _)| *volume).collect();
        let mut came = Vec::new();
        // What time it is comes first: what comes after a pause is judged as of now.
        let tick = Event::Tick { now: it.clock(now) };
        for event in std::iter::once(tick).chain(std::mem::take(&mut it.inbox)) {
            let words = event_words(&event);
            self.trace.note(now, &words, || format!("{node} <- {event:?}"));
            match &event {
                Event::DiskDone { id, .. } => it.out.remove(id).expect("out").release(&mut it.mem),
                Event::Host { io, .. } => came.push(io.0),
                _ => {}
            }
            store.apply(event, &mut it.mem, &mut it.fx);
        }
        store.settle(&mut it.mem, &mut it.fx);
        it.store = Some(store);
        let fx = std::mem::take(&mut it.fx);
        let dies = self.nodes[node].dies;
        // Death may come between any two effects.
        let reach = if dies.is_some() { self.rng.below(fx.list.len() as u64 + 1) as usize } else { fx.list.len() };
        for effect in &fx.list {
            if let Effect::Notice(Notice::Standing { replica, standing }) = effect {
                self.stands(node, *replica, *standing);
            }
        }
        self.taken_in(node, &came, &led);
        for effect in &fx.list[..reach] {
            let words = effect_words(effect);
            self.trace.note(now, &words, || format!("{node} -> {effect:?}"));
            self.carry_out(node, effect, &fx);
        }
        if let Some(power) = dies {
            self.doubts_end(node);
            self.die(node, power);
            return;
        }
        let it = &mut self.nodes[node];
        it.fx = fx;
        it.fx.clear();
        self.look_over(node);
        self.decay(node);
        let it = &mut self.nodes[node];
        let view = it.store.as_ref().expect("put back").view();
        if !view.quiescent && !it.tick_due {
            it.tick_due = true;
            let wait = (TICK_US * 1000).div_ceil(it.rate);
            self.after(wait, Coming::Tick { node, life });
        }
    }

    fn carry_out(&mut self, node: usize, effect: &Effect, fx: &Effects) {
        match effect {
            Effect::Disk(op) => self.submit(node, *op, fx.parts_of(op)),
            Effect::Reply { io, status } => self.replied(node, *io, *status),
            Effect::OrderDone { id, result } => self.ordered(node, *id, result),
            Effect::Notice(notice) => self.noticed(node, notice),
            Effect::Send { node: to, word, first_part, part_count } => {
                let parts = &fx.parts[*first_part as usize..(*first_part + *part_count) as usize];
                self.send(node, *to, word, parts);
            }
        }
    }

    fn noticed(&mut self, node: usize, notice: &Notice) {
        let calm = self.calm;
        let it = &mut self.nodes[node];
        match notice {
            Notice::Serving(report) => {
                it.phase = Phase::Serving;
                it.witness = it.witness.max(Some(penstock_wire::Generation(report.generation)));
                it.evidence.recovered();
                self.tally.did("recoveries", 1);
                self.tally.did("batches recovered", report.batches);
                self.tally.did("torn batches dropped", report.dropped_batches);
                self.tally.did("blocks found lost", report.lost_blocks);
                assert!(
                    report.lost_batches == 0,
                    "node {node}: recovery lost {} batches, and no header that was promised is ever destroyed twice",
                    report.lost_batches
                );
            }
            Notice::OpenFailed(error) => {
                let reason = it.command_failed || self.plan.alloc_fail_one_in > 0 || !calm;
                assert!(reason, "node {node} did not open, and no fault gave it a reason: {error}");
                it.phase = Phase::Failed;
                it.dies = Some(false);
                self.tally.did("opens refused", 1);
                self.want_turn(node);
            }
            Notice::Fenced(reason) => {
                assert!(it.command_failed || it.fence.is_some(), "node {node} is fenced ({reason:?}), and no command of its drive failed");
                it.fence.get_or_insert(*reason);
                it.fenced_at.get_or_insert(self.next_serial);
                self.tally.did("fences", 1);
                let soon = self.rng.within(200_000, 2_000_000);
                self.after(soon, Coming::Operator { node });
            }
            // A drive that was put back from a copy has the copy's blocks under a newer map, or the other way round.
            Notice::Corrupt { .. } if it.gone.is_some() => {}
            Notice::Corrupt { replica, block, .. } => {
                if let Some(volume) = it.replicas.get(replica) {
                    assert!(
                        self.oracle.may_be_lost(*volume, *block),
                        "node {node} calls volume {volume} block {block} corrupt, and no fault was injected there"
                    );
                    self.tally.check("corruption reports true (14)");
                }
            }
            Notice::Replica { replica, shape, gone } => self.replica_told(node, *replica, shape, *gone),
            Notice::Differs { replica, block, mends, .. } => {
                let volume = it.replicas.get(replica).copied();
                self.told_to_differ(node, volume, *block, *mends);
            }
            Notice::ScrubDone { .. } | Notice::Standing { .. } => {}
            Notice::Recovered { replica, receipt, .. } => {
                if let Some(volume) = it.replicas.get(replica) {
                    self.receipts.insert(*volume, receipt.clone());
                }
            }
            Notice::SteppingAside { .. } => self.tally.did("leaders that stepped aside", 1),
            Notice::GroupStopped { replica, why } => {
                let fenced = it.fence.is_some() || it.command_failed;
                let of = it.replicas.get(replica).map(|volume| crate::orders::segment_of(*volume));
                if it.orders.values().any(|order| matches!(order, Order::Delete { segment } if Some(*segment) == of)) {
                    return;
                }
                assert!(fenced || it.gone.is_some(), "node {node}: the group of {replica:?} has stopped, and its drive is well: {why}");
                self.tally.did(if fenced { "groups stopped by a fence" } else { "members stopped for their drive" }, 1);
            }
            Notice::Stopped => it.phase = Phase::Stopped,
        }
    }

    /// For a panic's message.
    pub fn describe(&self) -> String {
        let mut text = format!("at {} us", self.now);
        for it in &self.nodes {
            let view = it.store.as_ref().map(|store| store.view());
            let stage = view.map(|v| v.stage).unwrap_or(Stage::Stopped);
            text += &format!(
                "\n  node {}: {:?}, {stage:?}, {} commands, {} device commands, {} orders out, fence {:?}, memory {} blocks out",
                it.no,
                it.phase,
                it.ios.len(),
                it.out.len(),
                it.orders.len(),
                it.fence,
                it.mem.out_blocks()
            );
            for (no, volume) in &it.replicas {
                if let Some(look) = it.store.as_ref().and_then(|store| store.look(*no)) {
                    text += &format!("\n    volume {volume}: {look:?}");
                }
            }
            for attempt in it.ios.values() {
                text += &format!("\n    waits: {:?} of volume {}, {:?}", attempt.command.op, attempt.command.volume, attempt.term);
            }
            if let Some(v) = view {
                text += &format!(
                    "; log {} of {}, {} undrained, {} of {} extents free, {} held, quiescent {}",
                    v.ring_used, v.ring_blocks, v.undrained_extents, v.extents_free, v.extents, v.held, v.quiescent
                );
            }
        }
        text
    }
}

fn event_words(e: &Event) -> [u64; 4] {
    match e {
        Event::Host { io, replica, .. } => [1, u64::from(io.0), u64::from(replica.0), 0],
        Event::DiskDone { id, ok } => [2, u64::from(id.0), u64::from(*ok), 0],
        Event::Order { id, .. } => [3, id.0, 0, 0],
        Event::Tick { now } => [4, now.0, 0, 0],
        Event::Fence(_) => [5, 0, 0, 0],
        Event::Peer { from, payload, .. } => [6, u64::from(from.0[0]), payload.map_or(0, |buf| u64::from(buf.0) + 1), 0],
        Event::PeerUp { node, incarnation } => [7, u64::from(node.0[0]), u64::from(incarnation.0[0]), 0],
        Event::PeerDown { node } => [8, u64::from(node.0[0]), 0, 0],
        Event::PeerLost { node } => [9, u64::from(node.0[0]), 0, 0],
    }
}

fn effect_words(e: &Effect) -> [u64; 4] {
    match e {
        Effect::Disk(op) => [11, u64::from(op.id.0), op.at.0, u64::from(op.blocks) << 8 | op.kind as u64],
        Effect::Reply { io, status } => [12, u64::from(io.0), text_word(&format!("{status:?}")), 0],
        Effect::OrderDone { id, result } => [13, id.0, u64::from(result.is_ok()), 0],
        Effect::Notice(n) => [14, text_word(&format!("{n:?}")), 0, 0],
        Effect::Send { node, word, part_count, .. } => [15, u64::from(node.0[0]), u64::from(word.payload_blocks()), u64::from(*part_count)],
    }
}

fn text_word(text: &str) -> u64 {
    text.bytes().fold(0, |h, b| mix(h ^ u64::from(b)))
}
