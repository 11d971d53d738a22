//! One node on one thread: virtual time, the stores with their loops, and what happens next.
//!
//! The loop around each store is the daemon's: events in, `settle`, effects carried out in order; here any turn may be
//! the last one of this life. Not here: what hosts send (`hosts`), which faults strike (`faults`), dying and opening
//! (`life`), and the closing phase (`liveness`).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use penstock_engine::{
    DiskId, DiskKind, DiskOp, Effect, Effects, Event, FenceReason, Millis, Notice, OpenError, Order, OrderError, OrderId, ReplicaNo, Store,
    StoreConfig,
};
use penstock_wire::batch::Batch;
use penstock_wire::label::{Geometry, Label, Share};
use penstock_wire::{ClusterId, DriveId, Incarnation, NodeId};

use crate::canaries::Bug;
use crate::device::{Out, in_ring};
use crate::drive::{Drive, Kind};
use crate::evidence::Evidence;
use crate::hosts::Volume;
use crate::memory::SimMemory;
use crate::oracle::{Command, Oracle};
use crate::plan::{Occasion, Plan};
use crate::probe::barrier_of;
use crate::rng::Rng;
use crate::run::{Life, stuck};
use crate::snapshots::Snapshot;
use crate::tally::{Tally, Trace};

/// Virtual time that the hosts' commands may take, faults and all.
const HOSTS_PATIENCE_US: u64 = 600_000_000;

/// Something that will happen.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Coming {
    Turn {
        shard: usize,
        life: u32,
    },
    DiskDone {
        shard: usize,
        life: u32,
        id: u32,
    },
    Tick {
        shard: usize,
        life: u32,
    },
    Think {
        volume: u32,
    },
    Reopen {
        life: u32,
    },
    /// Somebody looks after a fence.
    Operator,
}

/// Where a store stands, as the loop was told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    Opening,
    Serving,
    Failed(OpenError),
    Stopped,
}

/// One store with its loop.
pub struct Shard {
    pub drive: usize,
    pub share: Share,
    pub geometry: Geometry,
    pub config: StoreConfig,
    pub store: Option<Store>,
    pub mem: SimMemory,
    pub fx: Effects,
    pub inbox: Vec<Event>,
    pub turn_due: bool,
    pub tick_due: bool,
    pub out: BTreeMap<DiskId, Out>,
    /// Commands that the store has not answered, by `IoId`.
    pub ios: BTreeMap<u32, Command>,
    pub free_ios: Vec<u32>,
    pub io_count: u32,
    pub orders: BTreeMap<u64, Order>,
    pub done: BTreeMap<u64, Result<(), OrderError>>,
    /// What the node remembers off the drive.
    pub fence: Option<FenceReason>,
    /// This life began fenced.
    pub opened_fenced: bool,
    /// Serial of the first command sent after the fence was told.
    pub fenced_at: Option<u64>,
    pub standing: Standing,
    pub replicas: BTreeMap<ReplicaNo, u32>,
    pub evidence: Evidence,
    /// A fault struck this store's metadata: it may refuse to open.
    pub clouded: bool,
    /// A command of the drive failed in this life's opening.
    pub struck_in_opening: bool,
    /// A write or flush of the drive failed since fences were last cleared.
    pub command_failed: bool,
    /// Serial of the first command sent after this life's recovery was over.
    pub serves_since: u64,
    /// It began to serve in this turn.
    pub look_over: bool,
    pub turns: u64,
}

pub struct World {
    pub seed: u64,
    pub plan: Plan,
    pub rng: Rng,
    /// Virtual microseconds.
    pub now: u64,
    heap: BinaryHeap<Reverse<(u64, u64, Coming)>>,
    queued: u64,
    pub drives: Vec<Drive>,
    pub shards: Vec<Shard>,
    pub volumes: BTreeMap<u32, Volume>,
    pub snapshots: BTreeMap<u32, Snapshot>,
    pub oracle: Oracle,
    pub tally: Tally,
    pub trace: Trace,
    /// Counts deaths: events of an earlier life are dropped.
    pub life: u32,
    pub alive: bool,
    pub next_serial: u64,
    pub next_write: u64,
    pub next_volume: u32,
    pub next_order: u64,
    pub commands_left: u64,
    pub turns: u64,
    /// Turn at which the node dies next.
    pub dies_at: Option<u64>,
    pub deaths_left: u64,
    /// Openings that faults have spoiled.
    pub spoiled: u32,
    /// Faults strike.
    pub stormy: bool,
    pub drive_commands: Vec<u64>,
    /// Commands that must be refused.
    pub bad_serials: std::collections::BTreeSet<u64>,
}

impl Life for World {
    fn live(&mut self) {
        self.run();
    }

    fn end(self) -> (Trace, Tally) {
        (self.trace, self.tally)
    }
}

impl World {
    pub fn new(seed: u64, bug: Option<Bug>, print: bool) -> World {
        let plan = Plan::draw(seed);
        let mut rng = Rng::new(seed);
        let (mut drives, mut shards) = (Vec::new(), Vec::new());
        for (no, d) in plan.drives.iter().enumerate() {
            let share_blocks = (2 + d.ring_blocks).next_multiple_of(16) + d.extents * 16;
            let blocks = 2 + share_blocks * d.stores as u64;
            let mut incarnation = [no as u8 + 1; 16];
            incarnation[..8].copy_from_slice(&seed.to_le_bytes());
            let label = Label::plan(
                ClusterId([1; 16]),
                NodeId([2; 16]),
                DriveId([no as u8; 16]),
                Incarnation(incarnation),
                blocks,
                d.stores,
                d.ring_blocks,
            )
            .expect("the plan's drives are large enough");
            let mut drive = Drive::new(d.kind, d.resets, blocks);
            for (at, bytes) in penstock_engine::format::format(&label).expect("the plan's drives are large enough") {
                let page = bytes.as_slice().try_into().expect("one block");
                drive.write(at.0, std::rc::Rc::new(page), crate::drive::WHOLE);
                let upto = drive.now();
                drive.flush(upto);
            }
            drives.push(drive);
            for (i, share) in label.stores.iter().enumerate() {
                let geometry = Geometry::of(share).expect("checked by the plan");
                let config = StoreConfig {
                    geometry,
                    incarnation: label.incarnation,
                    store: i as u32,
                    barrier: barrier_of(d.kind),
                    fenced: None,
                    accept_lost_log: false,
                    limits: plan.limits,
                    replication: penstock_engine::Replication::default(),
                    canary: bug.and_then(Bug::store),
                };
                shards.push(Shard {
                    drive: no,
                    share: *share,
                    geometry,
                    config,
                    store: None,
                    mem: SimMemory::new(plan.memory_blocks, plan.faults.alloc_fail_one_in, rng.fork(7)),
                    fx: Effects::default(),
                    inbox: Vec::new(),
                    turn_due: false,
                    tick_due: false,
                    out: BTreeMap::new(),
                    ios: BTreeMap::new(),
                    free_ios: Vec::new(),
                    io_count: 0,
                    orders: BTreeMap::new(),
                    done: BTreeMap::new(),
                    fence: None,
                    fenced_at: None,
                    opened_fenced: false,
                    standing: Standing::Opening,
                    replicas: BTreeMap::new(),
                    evidence: Evidence::default(),
                    clouded: false,
                    struck_in_opening: false,
                    command_failed: false,
                    serves_since: u64::MAX,
                    look_over: false,
                    turns: 0,
                });
            }
        }
        let mut world = World {
            seed,
            rng,
            now: 1_000,
            heap: BinaryHeap::new(),
            queued: 0,
            drive_commands: vec![0; drives.len()],
            drives,
            shards,
            volumes: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            oracle: Oracle::default(),
            tally: Tally::default(),
            trace: Trace::new(print),
            life: 0,
            alive: false,
            next_serial: 1,
            next_write: 1,
            next_volume: 1,
            next_order: 1,
            commands_left: plan.host.commands,
            turns: 0,
            dies_at: None,
            deaths_left: plan.faults.crashes,
            spoiled: 0,
            bad_serials: std::collections::BTreeSet::new(),
            stormy: true,
            plan,
        };
        if world.deaths_left > 0 {
            world.dies_at = Some(world.rng.within(20, world.plan.host.commands * 3));
        }
        world.open_all();
        world
    }

    /// Both phases. Panics on any violation; the caller catches and names the seed.
    pub fn run(&mut self) {
        self.add_volumes();
        while self.commands_left > 0 || self.hosts_wait() {
            if !self.step() {
                if self.hosts_wait() && !self.anyone_failed() {
                    stuck(format!("commands are out and nothing will ever happen: {}", self.describe()));
                }
                break;
            }
            if self.now >= HOSTS_PATIENCE_US {
                stuck(format!("ten minutes of virtual time, and the hosts are not done: {}", self.describe()));
            }
            if self.all_failed() {
                break;
            }
        }
        self.close();
    }

    pub fn at(&mut self, when: u64, what: Coming) {
        self.queued += 1;
        self.heap.push(Reverse((when, self.queued, what)));
    }

    pub fn after(&mut self, us: u64, what: Coming) {
        self.at(self.now + us, what);
    }

    pub fn all_failed(&self) -> bool {
        self.shards.iter().all(|s| matches!(s.standing, Standing::Failed(_)))
    }

    pub fn anyone_failed(&self) -> bool {
        self.shards.iter().any(|s| matches!(s.standing, Standing::Failed(_)))
    }

    /// The next thing happens. False when nothing will.
    pub fn step(&mut self) -> bool {
        let Some(Reverse((when, _, what))) = self.heap.pop() else { return false };
        self.now = self.now.max(when);
        match what {
            Coming::Turn { shard, life } if life == self.life => self.turn(shard),
            Coming::DiskDone { shard, life, id } if life == self.life => self.disk_done(shard, DiskId(id)),
            Coming::Tick { shard, life } if life == self.life => {
                self.shards[shard].tick_due = false;
                let now = Millis(self.now / 1000);
                self.feed(shard, Event::Tick { now });
            }
            Coming::Think { volume } => self.think(volume),
            Coming::Reopen { life } if life == self.life => self.open_all(),
            Coming::Operator => self.operator_looks(),
            _ => {}
        }
        true
    }

    /// An event for a store's next turn.
    pub fn feed(&mut self, shard: usize, event: Event) {
        let s = &mut self.shards[shard];
        if s.store.is_none() {
            return;
        }
        s.inbox.push(event);
        if !s.turn_due {
            s.turn_due = true;
            let delay = if self.rng.one_in(3) { self.rng.below(40) } else { 0 };
            let life = self.life;
            self.after(delay, Coming::Turn { shard, life });
        }
    }

    fn turn(&mut self, shard: usize) {
        self.turns += 1;
        let dies = self.dies_at.is_some_and(|t| self.turns >= t);
        let now = self.now;
        let s = &mut self.shards[shard];
        s.turn_due = false;
        s.turns += 1;
        s.evidence.turn_begins();
        let mut store = s.store.take().expect("turns are for the living");
        for event in std::mem::take(&mut s.inbox) {
            let words = event_words(&event);
            self.trace.note(now, &words, || format!("shard {shard} <- {event:?}"));
            if let Event::DiskDone { id, .. } = &event {
                let out = s.out.remove(id).expect("out");
                out.release(&mut s.mem);
            }
            store.apply(event, &mut s.mem, &mut s.fx);
        }
        store.settle(&mut s.mem, &mut s.fx);
        s.store = Some(store);
        let fx = std::mem::take(&mut s.fx);
        // Death may come between any two effects.
        let reach = if dies { self.rng.below(fx.list.len() as u64 + 1) as usize } else { fx.list.len() };
        for effect in &fx.list[..reach] {
            let words = effect_words(effect);
            self.trace.note(now, &words, || format!("shard {shard} -> {effect:?}"));
            self.carry_out(shard, effect, &fx);
        }
        if dies {
            self.die();
            return;
        }
        let s = &mut self.shards[shard];
        s.fx = fx;
        s.fx.clear();
        self.check_cheap(shard);
        self.look_over(shard);
        let s = &mut self.shards[shard];
        let restless = !s.store.as_ref().expect("put back").view().quiescent;
        if restless && !s.tick_due {
            s.tick_due = true;
            let life = self.life;
            let delay = self.rng.within(1_000, 10_000);
            self.after(delay, Coming::Tick { shard, life });
        }
        self.strike(shard);
    }

    fn carry_out(&mut self, shard: usize, effect: &Effect, fx: &Effects) {
        match effect {
            Effect::Disk(op) => self.submit(shard, *op, fx.parts_of(op)),
            Effect::Reply { io, status } => self.replied(shard, *io, *status),
            Effect::OrderDone { id, result } => self.ordered(shard, *id, result),
            Effect::Notice(notice) => self.noticed(shard, notice),
            Effect::Send { .. } => unreachable!("no volume here has several replicas"),
        }
    }

    fn submit(&mut self, shard: usize, op: DiskOp, parts: &[penstock_engine::Part]) {
        let s = &mut self.shards[shard];
        let drive = &self.drives[s.drive];
        let out = Out::take(op, parts, &s.share, &s.geometry, s.out.values(), &mut s.mem, drive);
        self.tally.check("device commands well formed");
        if op.kind == DiskKind::Write && in_ring(&s.geometry, &out.blocks()) {
            let bytes = out.first_bytes(2, &s.mem);
            let header = Batch::decode(&bytes).expect("what is written to the ring begins with a header").header;
            s.evidence.submitted(op.id, out.blocks(), header.seq, header.durable_to);
        }
        let occasion = match op.kind {
            DiskKind::Flush => Occasion::Flush,
            DiskKind::Write if out.blocks().start < s.geometry.ring_start.0 => Occasion::Superblock,
            DiskKind::Write if out.blocks().start >= s.geometry.extents_start.0 => Occasion::Extents,
            _ => Occasion::None,
        };
        s.out.insert(op.id, out);
        let rare = if occasion == Occasion::Superblock { 2 } else { 40 };
        if occasion != Occasion::None
            && occasion == self.plan.faults.occasion
            && self.stormy
            && self.deaths_left > 0
            && self.rng.one_in(rare)
        {
            let soon = self.turns + self.rng.within(1, 3);
            self.dies_at = Some(self.dies_at.map_or(soon, |t| t.min(soon)));
        }
        if occasion == Occasion::Superblock && self.stormy && self.rng.one_in(self.plan.checkpoint_probe_one_in) {
            self.check_checkpoint(shard);
        }
        let s = &self.shards[shard];
        self.drive_commands[s.drive] += 1;
        let (lo, hi) = self.plan.drives[s.drive].latency_us;
        let mut us = self.rng.within(lo, hi) + u64::from(op.blocks) / 4;
        if op.kind == DiskKind::Flush {
            us += hi;
        }
        if self.stormy && self.rng.one_in(self.plan.faults.slow_one_in) {
            us *= self.rng.within(100, 1000);
            self.tally.fault("slow command (12)");
        }
        let life = self.life;
        self.after(us, Coming::DiskDone { shard, life, id: op.id.0 });
    }

    /// The drive carries a command out and says so.
    fn disk_done(&mut self, shard: usize, id: DiskId) {
        let failure = self.drive_fails(shard, id);
        let s = &mut self.shards[shard];
        let drive = &mut self.drives[s.drive];
        let start = s.share.start.0;
        let out = s.out.get_mut(&id).expect("out");
        out.carried_out = true;
        let op = out.op;
        let ring = in_ring(&s.geometry, &out.blocks());
        if !failure {
            match op.kind {
                DiskKind::Read => out.fill(start, drive, &mut s.mem, &mut self.rng),
                DiskKind::Write => {
                    out.land_whole(start, drive, &s.mem);
                    if ring {
                        s.evidence.completed(id, drive.now(), drive.kind() == Kind::Volatile);
                    }
                }
                DiskKind::Flush => {
                    let upto = out.upto;
                    drive.flush(upto);
                    s.evidence.flushed(upto);
                }
            }
        }
        let ok = !failure;
        self.trace.note(self.now, &[9, shard as u64, u64::from(id.0), u64::from(ok)], || {
            format!("drive of shard {shard}: {op:?} {}", if ok { "done" } else { "FAILED" })
        });
        self.feed(shard, Event::DiskDone { id, ok });
    }

    pub fn noticed(&mut self, shard: usize, notice: &Notice) {
        let s = &mut self.shards[shard];
        match notice {
            Notice::Serving(report) => {
                s.standing = Standing::Serving;
                s.evidence.recovered();
                s.serves_since = self.next_serial;
                self.tally.did("recoveries", 1);
                self.tally.did("batches recovered", report.batches);
                self.tally.did("torn batches dropped", report.dropped_batches);
                self.tally.did("headers from their second copy", report.repaired_headers);
                self.tally.did("blocks found lost", report.lost_blocks);
                self.check_recovered(shard, report);
            }
            Notice::OpenFailed(error) => {
                assert!(
                    s.clouded || s.struck_in_opening || *error == OpenError::NoMemory && self.plan.faults.alloc_fail_one_in > 0,
                    "shard {shard} did not open, and no fault gave it a reason: {error}"
                );
                s.standing = Standing::Failed(error.clone());
                self.tally.did("opens refused", 1);
                self.after_refusal(shard);
            }
            Notice::Fenced(reason) => {
                assert!(
                    s.command_failed || s.clouded || s.fence.is_some(),
                    "shard {shard} is fenced ({reason:?}), and no command of its drive failed"
                );
                let s = &mut self.shards[shard];
                s.fence.get_or_insert(*reason);
                s.fenced_at.get_or_insert(self.next_serial);
                self.tally.did("fences", 1);
                if self.stormy && self.plan.faults.operator {
                    let soon = self.rng.within(2_000, 100_000);
                    self.after(soon, Coming::Operator);
                }
                if self.stormy && self.rng.one_in(2) {
                    // A fence must outlive the process that met it.
                    let soon = self.turns + self.rng.within(1, 60);
                    self.dies_at = Some(self.dies_at.map_or(soon, |t| t.min(soon)));
                }
            }
            Notice::Corrupt { replica, block, .. } => {
                if let Some(volume) = s.replicas.get(replica).copied().filter(|no| !self.volumes[no].doomed) {
                    let clouded = s.clouded;
                    // The drain may have read what was cut off meanwhile, of which nobody keeps account.
                    let is_cut = *block >= self.oracle.size_blocks(volume);
                    assert!(
                        clouded || is_cut || self.in_any_layer(volume).any(|no| self.oracle.may_be_lost(no, *block)),
                        "shard {shard} calls volume {volume} block {block} corrupt, and no fault was injected there"
                    );
                    self.tally.check("corruption reports true");
                }
            }
            Notice::Replica { replica, shape, gone } => self.replica_told(shard, *replica, shape, *gone),
            Notice::ScrubDone { .. } => self.tally.did("scrubs", 1),
            Notice::Stopped => s.standing = Standing::Stopped,
            Notice::Standing { .. }
            | Notice::SteppingAside { .. }
            | Notice::Recovered { .. }
            | Notice::GroupStopped { .. }
            | Notice::Differs { .. } => {
                unreachable!("no volume here has several replicas")
            }
        }
    }

    /// What the stores of this life did goes into the tally, at its end.
    pub fn count_work(&mut self) {
        for s in &self.shards {
            let Some(store) = &s.store else { continue };
            let c = store.view().counters;
            for (name, n) in [
                ("log batches", c.log_batches),
                ("checkpoints", c.checkpoints),
                ("map pages written", c.checkpoint_pages),
                ("map pages loaded", c.page_loads),
                ("blocks drained", c.drained_blocks),
                ("blocks absorbed", c.absorbed_blocks),
                ("merges", c.merges),
                ("writes held for the log", c.held_for_log),
                ("reads tried again", c.read_retries),
            ] {
                self.tally.did(name, n);
            }
            self.tally.did("payloads changed by the guest", s.mem.scribbles.get());
            self.tally.did("allocations refused", s.mem.alloc_failures);
            if c.held_for_log > 0 {
                self.tally.fault("full log (15)");
            }
        }
    }

    pub fn order(&mut self, shard: usize, order: Order) -> u64 {
        let id = self.next_order;
        self.next_order += 1;
        self.shards[shard].orders.insert(id, order.clone());
        self.feed(shard, Event::Order { id: OrderId(id), order });
        id
    }

    /// For a panic's message.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for (i, s) in self.shards.iter().enumerate() {
            let view = s.store.as_ref().map(|st| st.view()).map(|v| {
                format!(
                    "{:?}, log {} of {}, {} undrained, {} of {} extents free, {} held, {} checkpoints, quiescent {}",
                    v.stage,
                    v.ring_used,
                    v.ring_blocks,
                    v.undrained_extents,
                    v.extents_free,
                    v.extents,
                    v.held,
                    v.counters.checkpoints,
                    v.quiescent
                )
            });
            text += &format!(
                "\n  shard {i}: {:?}, {} commands and {} device commands out, {} orders, fence {:?}, memory {} blocks out; {view:?}",
                s.standing,
                s.ios.len(),
                s.out.len(),
                s.orders.len(),
                s.fence,
                s.mem.out_blocks()
            );
        }
        text
    }
}

fn event_words(e: &Event) -> [u64; 4] {
    match e {
        Event::Host { io, replica, op, .. } => [1, u64::from(io.0), u64::from(replica.0), op_word(op)],
        Event::DiskDone { id, ok } => [2, u64::from(id.0), u64::from(*ok), 0],
        Event::Order { id, .. } => [3, id.0, 0, 0],
        Event::Tick { now } => [4, now.0, 0, 0],
        #[allow(unreachable_patterns, reason = "the port may grow; a new event still enters the hash")]
        _ => [5, 0, 0, 0],
    }
}

fn op_word(op: &penstock_engine::HostOp) -> u64 {
    use penstock_engine::HostOp::{CompareWrite, Flush, Read, ReadSnapshot, Reserve, Write, Zero};
    let (kind, span) = match op {
        Read(s) => (1, Some(s)),
        ReadSnapshot(layer, s) => (6 + u64::from(layer.0), Some(s)),
        Write(s) => (2, Some(s)),
        Zero(s) => (3, Some(s)),
        CompareWrite(s) => (4, Some(s)),
        Flush => (5, None),
        Reserve(_) => (6, None),
    };
    span.map_or(kind, |s| crate::rng::mix(s.offset ^ s.len.rotate_left(40)) ^ kind)
}

fn effect_words(e: &Effect) -> [u64; 4] {
    match e {
        Effect::Disk(op) => [11, u64::from(op.id.0), op.at.0, u64::from(op.blocks) << 8 | op.kind as u64],
        Effect::Reply { io, status } => [12, u64::from(io.0), status_word(*status), 0],
        Effect::OrderDone { id, result } => [13, id.0, u64::from(result.is_ok()), 0],
        Effect::Notice(n) => [14, text_word(&format!("{n:?}")), 0, 0],
        Effect::Send { .. } => [15, 0, 0, 0],
    }
}

fn status_word(s: penstock_engine::Status) -> u64 {
    text_word(&format!("{s:?}"))
}

fn text_word(text: &str) -> u64 {
    text.bytes().fold(0, |h, b| crate::rng::mix(h ^ u64::from(b)))
}
