//! One node of a fleet: a whole store over its drive, with memory and a clock, and what a crash leaves of it.
//!
//! Not here: what it is told (`world`, `net`, `hosts`), and what must hold (`judge`).

use std::collections::BTreeMap;

use penstock_engine::{DiskId, DiskKind, Effects, Event, FenceReason, Millis, Order, ReplicaNo, Replication, Standing, Store, StoreConfig};
use penstock_wire::label::{Geometry, Label, Share};
use penstock_wire::peer::MemberNo;
use penstock_wire::{ClusterId, DriveId, Generation, Incarnation, NodeId, Term};

use crate::canaries::Bug;
use crate::device::{Landing, Out};
use crate::drive::{Cut, Drive, WHOLE};
use crate::evidence::Evidence;
use crate::memory::SimMemory;
use crate::oracle::Command;
use crate::plan::DrivePlan;
use crate::probe::barrier_of;
use crate::rng::Rng;
use crate::tally::Tally;

pub fn node_id(node: usize) -> NodeId {
    NodeId([node as u8 + 1; 16])
}

pub fn member_no(node: usize) -> MemberNo {
    MemberNo(node as u64 + 1)
}

/// Where a node stands, as its loop was told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Down,
    Opening,
    Serving,
    Failed,
    Stopped,
}

/// A host's command at one node.
#[derive(Clone, Debug)]
pub struct Attempt {
    pub command: Command,
    /// The volume that it is sent to; a snapshot's reads are commands of another.
    pub home: u32,
    /// The member's term at the end of the turn in which the store took the command in, and whether it led then.
    pub term: Term,
    pub leads: bool,
    /// It led then, or before that turn.
    pub led: bool,
    /// Its host gave up on this path.
    pub given_up: bool,
    /// A later term was served: it has taken effect by then or never will.
    pub lapsed: bool,
}

/// How a node's drive came not to be what it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gone {
    Wiped,
    PutBack,
    /// Its node was given up, and its group went on without it.
    Lost,
}

/// What a node has heard of another.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heard {
    pub last: u64,
    pub life: u64,
    pub up: bool,
}

pub struct Node {
    pub no: usize,
    pub drive: Drive,
    pub plan: DrivePlan,
    pub share: Share,
    pub geometry: Geometry,
    pub config: StoreConfig,
    pub phase: Phase,
    /// Counts the lives: what was for an earlier one is not for this.
    pub life: u64,
    pub store: Option<Store>,
    pub mem: SimMemory,
    pub fx: Effects,
    pub inbox: Vec<Event>,
    pub turn_due: bool,
    pub tick_due: bool,
    pub out: BTreeMap<DiskId, Out>,
    pub ios: BTreeMap<u32, Attempt>,
    pub free_ios: Vec<u32>,
    pub io_count: u32,
    pub orders: BTreeMap<u64, Order>,
    pub replicas: BTreeMap<ReplicaNo, u32>,
    pub standings: BTreeMap<u32, Standing>,
    pub heard: Vec<Heard>,
    /// When another told it last of next to no space.
    pub heard_short: Option<u64>,
    pub evidence: Evidence,
    /// What the node has written down of its drive's openings, off the drive.
    pub witness: Option<Generation>,
    /// The drive as it was when a life began.
    pub copy: Option<Drive>,
    pub gone: Option<Gone>,
    /// It does not come back by itself.
    pub lost: bool,
    pub fence: Option<FenceReason>,
    /// Serial of the first command sent after the fence was told.
    pub fenced_at: Option<u64>,
    /// This life began fenced.
    pub opened_fenced: bool,
    /// A write or flush of its drive failed since fences were last cleared.
    pub command_failed: bool,
    pub drive_commands: u64,
    /// Its drive decays: fewer do than could take a quorum's copies.
    pub decays: bool,
    /// A promised record rotted, and what it held is not back yet.
    pub rotten: bool,
    /// It dies in its next turn, with its power or without.
    pub dies: Option<bool>,
    /// Until when the process stands still, its drive is slow, its links are slow: microseconds.
    pub paused: u64,
    pub slow: u64,
    pub lag: u64,
    /// By how much a slow drive is slow.
    pub slowness: u64,
    /// Since when its clock stands still, while it is paused; 0 if it does not.
    pub frozen: u64,
    /// Its clock: thousandths of real time, and where it began.
    pub rate: u64,
    pub offset: u64,
}

/// A drive that was just formatted.
fn blank(no: usize, plan: &DrivePlan, incarnation: Incarnation) -> (Drive, Label) {
    let share_blocks = (2 + plan.ring_blocks).next_multiple_of(16) + plan.extents * 16;
    let blocks = 2 + share_blocks;
    let label = Label::plan(ClusterId([1; 16]), node_id(no), DriveId([no as u8; 16]), incarnation, blocks, 1, plan.ring_blocks)
        .expect("the plan's drives are large enough");
    let mut drive = Drive::new(plan.kind, plan.resets, blocks);
    for (at, bytes) in penstock_engine::format::format(&label).expect("the plan's drives are large enough") {
        let page = bytes.as_slice().try_into().expect("one block");
        drive.write(at.0, std::rc::Rc::new(page), WHOLE);
    }
    drive.flush(drive.now());
    (drive, label)
}

impl Node {
    pub fn new(no: usize, nodes: usize, seed: u64, plan: &super::plan::Plan, bug: Option<Bug>, rng: &mut Rng) -> Node {
        let d = plan.drives[no].clone();
        let mut incarnation = [no as u8 + 1; 16];
        incarnation[..8].copy_from_slice(&seed.to_le_bytes());
        let (drive, label) = blank(no, &d, Incarnation(incarnation));
        let share = label.stores[0];
        let geometry = Geometry::of(&share).expect("checked by the plan");
        let config = StoreConfig {
            geometry,
            incarnation: label.incarnation,
            store: 0,
            barrier: barrier_of(d.kind),
            fenced: None,
            accept_lost_log: false,
            limits: plan.limits,
            replication: Replication { node: node_id(no), timing: plan.timing, canary: bug.and_then(Bug::group), ..Replication::default() },
            canary: bug.and_then(Bug::store),
        };
        Node {
            no,
            drive,
            share,
            geometry,
            config,
            phase: Phase::Down,
            life: 0,
            store: None,
            mem: SimMemory::new(1, 0, rng.fork(7)),
            fx: Effects::default(),
            inbox: Vec::new(),
            turn_due: false,
            tick_due: false,
            out: BTreeMap::new(),
            ios: BTreeMap::new(),
            free_ios: Vec::new(),
            io_count: 0,
            orders: BTreeMap::new(),
            replicas: BTreeMap::new(),
            standings: BTreeMap::new(),
            heard: vec![Heard::default(); nodes],
            heard_short: None,
            evidence: Evidence::default(),
            witness: None,
            copy: None,
            gone: None,
            lost: false,
            fence: None,
            fenced_at: None,
            opened_fenced: false,
            command_failed: false,
            drive_commands: 0,
            decays: plan.decay.rots() && no < plan.nodes.div_ceil(2) - 1,
            rotten: false,
            dies: None,
            paused: 0,
            slow: 0,
            lag: 0,
            slowness: 1,
            frozen: 0,
            rate: rng.within(plan.rates.0, plan.rates.1),
            offset: (1 << 40) + rng.below(1 << 40),
            plan: d,
        }
    }

    pub fn alive(&self) -> bool {
        self.phase != Phase::Down
    }

    /// Its clock at `now`, which is in microseconds of real time.
    pub fn clock(&self, now: u64) -> Millis {
        let now = if self.frozen > 0 { now.min(self.frozen) } else { now };
        Millis(self.offset + now * self.rate / 1_000_000)
    }

    /// Its clock goes on where it stood.
    pub fn thaw(&mut self, now: u64) {
        if self.frozen > 0 {
            let stood = now.min(self.paused) - self.frozen;
            self.offset -= stood * self.rate / 1_000_000;
            self.frozen = 0;
        }
    }

    pub fn replica_of(&self, volume: u32) -> Option<ReplicaNo> {
        self.replicas.iter().find(|(_, no)| **no == volume).map(|(replica, _)| *replica)
    }

    /// The drive is not what it was: another one, or an older copy of it.
    pub fn change_drive(&mut self, drive: Drive, gone: Gone) {
        assert!(!self.alive(), "drives are changed while nobody uses them");
        (self.drive, self.gone, self.copy) = (drive, Some(gone), None);
        self.evidence = Evidence::default();
    }

    /// A new drive of the same size takes the place of the old one.
    pub fn wipe(&mut self) {
        let mut incarnation = self.config.incarnation;
        incarnation.0[15] ^= 0x80;
        let (drive, label) = blank(self.no, &self.plan, incarnation);
        self.change_drive(drive, Gone::Wiped);
        (self.config.incarnation, self.witness) = (label.incarnation, None);
    }

    pub fn leads(&self, volume: u32) -> bool {
        self.standings.get(&volume).is_some_and(|standing| standing.serves)
    }

    /// The process starts over its drive.
    pub fn start(&mut self, mem: SimMemory, now: u64) {
        self.mem = mem;
        let mut config = StoreConfig { fenced: self.fence, ..self.config.clone() };
        let mut life = [self.no as u8; 16];
        life[..8].copy_from_slice(&self.life.to_le_bytes());
        (config.replication.life, config.replication.witness) = (Incarnation(life), self.witness);
        self.store = Some(Store::new(config));
        self.phase = Phase::Opening;
        self.opened_fenced = self.fence.is_some();
        self.inbox.push(Event::Tick { now: self.clock(now) });
    }

    /// The process ends, and its power with it or not. Returns the commands that nobody will answer.
    pub fn stop(&mut self, power: bool, rng: &mut Rng, tally: &mut Tally) -> Vec<Attempt> {
        let start = self.share.start.0;
        for out in std::mem::take(&mut self.out).into_values().filter(|out| !out.carried_out) {
            match out.op.kind {
                DiskKind::Write => {
                    if out.land_partly(start, &mut self.drive, &self.mem, rng) == Landing::Torn {
                        tally.fault("torn write (1)");
                    }
                }
                DiskKind::Flush if rng.one_in(2) => {
                    self.drive.flush(out.upto);
                }
                DiskKind::Flush | DiskKind::Read => {}
            }
        }
        self.store = None;
        self.phase = Phase::Down;
        self.life += 1;
        self.inbox.clear();
        (self.turn_due, self.tick_due) = (false, false);
        self.fx = Effects::default();
        self.free_ios.clear();
        self.io_count = 0;
        self.orders.clear();
        self.replicas.clear();
        self.standings.clear();
        self.heard.fill(Heard::default());
        self.evidence.died();
        self.dies = None;
        (self.paused, self.frozen) = (0, 0);
        if power {
            let cut = rng.pick(&[Cut::AllLost, Cut::AllKept, Cut::PerBlock, Cut::PerSector, Cut::PerSector]);
            let lost = self.drive.power_cut(cut, rng);
            tally.faults("blocks lost or torn from a cache (1, 2, 3)", lost);
        }
        let lost = self.drive.released();
        tally.faults("forgotten blocks gone at a reset (7)", lost);
        std::mem::take(&mut self.ios).into_values().collect()
    }
}
