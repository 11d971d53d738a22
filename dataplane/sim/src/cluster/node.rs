//! One machine of the cluster: a group's member over its stream, and what a crash leaves of both.

use super::disk::{Checkpoint, Disk, Doubt, Registers};
use super::judge::Operation;
use penstock_engine::Millis;
use penstock_engine::replica::resolve::{Answer, unknown_floor};
use penstock_engine::replica::{Canary, Group, GroupConfig, LogEnd, Output, Recovered, Timing};
use penstock_wire::batch::{Op, decode_ops};
use penstock_wire::peer::{Entry, EntryKind, MemberNo, Members};
use penstock_wire::{Index, SegmentId, Term};
use std::collections::BTreeMap;

pub const SEGMENT: SegmentId = SegmentId([7; 16]);

/// What the others say to a member whose log may have been longer.
pub struct Doubts {
    /// Its own term when it came to doubt.
    pub term: Term,
    pub answers: BTreeMap<MemberNo, Answer>,
}

pub enum Stage {
    Down,
    Up(Box<Group>),
}

pub struct Node {
    pub no: MemberNo,
    pub stage: Stage,
    /// Counts the lives: what was for an earlier one is not for this.
    pub life: u64,
    pub disk: Disk,
    pub doubts: Option<Doubts>,
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
        self.doubts = None;
        self.life += 1;
        self.barrier_out = false;
        self.paused = 0;
        self.writes.clear();
        self.reads.clear();
        self.out.clear();
    }

    /// The process starts: reads its stream. False when it is in doubt of what it found.
    pub fn start(&mut self, timing: Timing, canary: Option<Canary>, unknown_is_absent: bool) -> Result<bool, String> {
        let (recovered, doubt) = self.disk.recover();
        let Checkpoint { applied, term, members, registers } = self.disk.checkpoint.clone();
        (self.applied, self.applied_term, self.members, self.registers) = (applied, term, members, registers);
        for entry in &recovered.entries {
            if entry.kind == EntryKind::Members {
                self.members = Members::decode(&entry.bytes).map_err(|error| error.to_string())?;
            }
        }
        let ballot = recovered.ballot;
        let floor = doubt.filter(|_| !unknown_is_absent).map(|Doubt { last }| {
            let told = last.map(|(index, term)| LogEnd { term, index });
            told.unwrap_or_else(|| unknown_floor(ballot.term))
        });
        let floor = floor.into_iter().chain(self.disk.floor.filter(|_| !unknown_is_absent)).max();
        // The first batch of this life names the doubt, and lies over what it is about.
        self.disk.drop_bad();
        self.disk.floor = floor;
        self.open(Recovered { floor, ..recovered }, timing, canary)?;
        let doubtful = self.group().and_then(Group::floor).is_some();
        self.rotten &= doubtful;
        self.doubts = doubtful.then(|| Doubts { term: ballot.term, answers: BTreeMap::new() });
        Ok(!doubtful)
    }

    pub fn open(&mut self, recovered: Recovered, timing: Timing, canary: Option<Canary>) -> Result<(), String> {
        self.disk.begin_life();
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
