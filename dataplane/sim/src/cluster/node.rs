//! One machine of the cluster: a group's member over its stream, and what a crash leaves of both.

use super::disk::{Checkpoint, Disk, Doubt, Registers};
use super::judge::Operation;
use penstock_engine::Millis;
use penstock_engine::replica::resolve::{Answer, Unknown};
use penstock_engine::replica::{Canary, Group, GroupConfig, Output, Recovered, Timing};
use penstock_wire::batch::{Op, decode_ops};
use penstock_wire::peer::{Entry, EntryKind, MemberNo, Members};
use penstock_wire::{Index, SegmentId, Term};
use std::collections::BTreeMap;

pub const SEGMENT: SegmentId = SegmentId([7; 16]);

/// Before the group is built: what recovery found, and what the others say of what it could not judge.
pub struct Resolving {
    pub recovered: Recovered,
    pub unknown: Unknown,
    pub answers: BTreeMap<MemberNo, (Answer, Vec<Entry>)>,
}

pub enum Stage {
    Down,
    Resolving(Box<Resolving>),
    Up(Box<Group>),
}

pub struct Node {
    pub no: MemberNo,
    pub stage: Stage,
    /// Counts the lives: what was for an earlier one is not for this.
    pub life: u64,
    pub disk: Disk,
    pub registers: Registers,
    pub applied: Index,
    pub applied_term: Term,
    pub members: Members,
    /// Until when the process stands still, in global milliseconds.
    pub paused: u64,
    /// Until when its drive is slow.
    pub slow: u64,
    /// A promised record rotted, and what it held is not back yet.
    pub rotten: bool,
    pub barrier_out: bool,
    /// Its clock: thousandths of real time, and where it began.
    pub rate: u64,
    pub offset: u64,
    pub out: Output,
    /// Clients' operations that this member holds, by entry and by read.
    pub writes: BTreeMap<u64, (Term, Operation)>,
    pub reads: BTreeMap<u64, Operation>,
}

impl Node {
    pub fn clock(&self, now: u64) -> Millis {
        Millis(self.offset + now * self.rate / 1000)
    }

    pub fn group(&self) -> Option<&Group> {
        if let Stage::Up(group) = &self.stage { Some(group) } else { None }
    }

    pub fn group_mut(&mut self) -> Option<&mut Group> {
        if let Stage::Up(group) = &mut self.stage { Some(group) } else { None }
    }

    /// The process ends. Clients never learn what became of what it held.
    pub fn stop(&mut self) {
        self.stage = Stage::Down;
        self.life += 1;
        self.barrier_out = false;
        self.paused = 0;
        self.writes.clear();
        self.reads.clear();
        self.out.clear();
    }

    /// The process starts: reads its stream. A doubt keeps the group from being built.
    pub fn start(&mut self, timing: Timing, canary: Option<Canary>, unknown_is_absent: bool) -> Result<bool, String> {
        let (recovered, doubt) = self.disk.recover();
        let Checkpoint { applied, term, members, registers } = self.disk.checkpoint.clone();
        (self.applied, self.applied_term, self.members, self.registers) = (applied, term, members, registers);
        for entry in &recovered.entries {
            if entry.kind == EntryKind::Members {
                self.members = Members::decode(&entry.bytes).map_err(|error| error.to_string())?;
            }
        }
        match doubt {
            Some(Doubt { last }) if !unknown_is_absent => {
                let unknown = Unknown::of(&recovered, last);
                self.stage = Stage::Resolving(Box::new(Resolving { recovered, unknown, answers: BTreeMap::new() }));
                Ok(false)
            }
            _ => {
                self.disk.drop_bad();
                self.open(recovered, timing, canary).map(|()| true)
            }
        }
    }

    pub fn open(&mut self, recovered: Recovered, timing: Timing, canary: Option<Canary>) -> Result<(), String> {
        self.disk.begin_life();
        self.rotten = false;
        self.members = recovered.members.clone();
        let config = GroupConfig { segment: SEGMENT, me: self.no, timing, canary };
        let group = Group::open(config, recovered).map_err(|error| format!("{:?} cannot be opened: {error}", self.no))?;
        self.stage = Stage::Up(Box::new(group));
        Ok(())
    }

    /// Applies an entry: block and value, by what its op says.
    pub fn apply(&mut self, entry: &Entry) {
        self.applied = entry.index;
        self.applied_term = entry.term;
        if entry.kind == EntryKind::Members {
            return;
        }
        for op in decode_ops(&entry.bytes).expect("checked when it came in") {
            if let Op::Zero { block, count } = op {
                self.registers.insert(block, (count, entry.index));
            }
        }
    }
}
