//! A node's oplog stream as far as a group can tell: records in order, durable after a barrier, of which some are torn, lost or rotten
//! after a crash; and the checkpoint that the log begins after.

use crate::rng::Rng;
use penstock_engine::replica::{Ballot, LogEnd, Mark, Persist, Recovered};
use penstock_wire::peer::{Entry, Members};
use penstock_wire::{Index, Term};
use std::collections::BTreeMap;

/// State of the machine that entries are applied to: value and the entry that wrote it, by block.
pub type Registers = BTreeMap<u64, (u32, Index)>;

/// How a record stands on the media.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Media {
    Whole,
    /// Its header tells what it was; its payload is bad.
    BadPayload,
    /// Something is there; nothing of it can be believed.
    BadHeader,
    /// What was there before.
    Absent,
}

#[derive(Clone, Debug)]
struct Record {
    /// `None`: a seal.
    what: Option<Persist>,
    durable_to: u64,
    media: Media,
}

/// What the log begins after.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub applied: Index,
    pub term: Term,
    pub members: Members,
    pub registers: Registers,
}

#[derive(Debug)]
pub struct Disk {
    /// Sequence of `records[i]` is `i + 1`.
    records: Vec<Record>,
    /// All up to here are behind a barrier.
    durable: u64,
    pub checkpoint: Checkpoint,
    /// The checkpoint before each install that is behind no barrier yet, by the install's sequence: what counts if that is lost.
    before: Vec<(u64, Checkpoint)>,
    pub ballot: Ballot,
    /// Term of each durable entry, and every ballot that was durable and sealed.
    entries: BTreeMap<u64, Term>,
    ballots: Vec<Ballot>,
    told: u64,
    last_mark: Mark,
    /// Ballots need no seal: a seeded bug.
    unsealed: bool,
    /// The doubt that stands in the stream, as durable as what it is about was.
    pub floor: Option<LogEnd>,
}

/// What recovery cannot judge: the last entry of it and its term, where the descriptors tell.
#[derive(Clone, Copy, Debug)]
pub struct Doubt {
    pub last: Option<(Index, Term)>,
}

impl Disk {
    pub fn new(members: Members, unsealed: bool) -> Self {
        let checkpoint = Checkpoint { applied: Index(0), term: Term(0), members, registers: Registers::new() };
        Self {
            records: Vec::new(),
            durable: 0,
            checkpoint,
            before: Vec::new(),
            ballot: Ballot::default(),
            entries: BTreeMap::new(),
            ballots: vec![Ballot::default()],
            told: 0,
            last_mark: Mark(0),
            unsealed,
            floor: None,
        }
    }

    pub fn last(&self) -> u64 {
        self.records.len() as u64
    }

    pub fn is_behind(&self) -> bool {
        self.durable < self.last()
    }

    pub fn write(&mut self, persist: Persist) {
        self.records.push(Record { what: Some(persist), durable_to: self.durable, media: Media::Whole });
    }

    /// Highest sequence that a durable record knows durable.
    fn sealed(&self) -> u64 {
        if self.unsealed {
            self.durable
        } else {
            self.records[..self.durable as usize].iter().map(|record| record.durable_to).max().unwrap_or(0)
        }
    }

    /// A barrier passed for everything up to `to`. What may be told the group: the newest mark of which all before are promised.
    pub fn barrier(&mut self, to: u64) -> Option<Mark> {
        for at in self.durable..to {
            if let Some(persist) = self.records[at as usize].what.clone() {
                self.enter(&persist);
            }
        }
        self.durable = self.durable.max(to);
        self.before.retain(|(seq, _)| *seq > to);
        let sealed = self.sealed();
        let before = self.last_mark;
        while self.told < self.durable {
            if let Some(persist) = &self.records[self.told as usize].what {
                if persist.ballot.is_some() && self.told + 1 > sealed {
                    break;
                }
                self.ballots.extend(persist.ballot);
                self.last_mark = persist.mark;
            }
            self.told += 1;
        }
        (self.last_mark > before).then_some(self.last_mark)
    }

    /// A durable ballot waits for a record that says so.
    pub fn wants_seal(&self) -> bool {
        !self.is_behind() && self.told < self.durable
    }

    pub fn seal(&mut self) {
        self.records.push(Record { what: None, durable_to: self.durable, media: Media::Whole });
    }

    fn enter(&mut self, persist: &Persist) {
        if let Some(install) = &persist.install {
            self.entries.clear();
            self.entries.insert(install.index.0, install.index_term);
        }
        for entry in &persist.entries {
            self.entries.split_off(&entry.index.0);
            self.entries.insert(entry.index.0, entry.term);
        }
    }

    pub fn has(&self, index: Index) -> Option<Term> {
        self.entries.get(&index.0).copied()
    }

    pub fn holds(&self, index: Index) -> bool {
        let checkpoint = self.before.first().map_or(&self.checkpoint, |(_, before)| before);
        index <= checkpoint.applied || self.entries.contains_key(&index.0)
    }

    /// The vote, or the campaign for oneself, that was durable before it was spoken.
    pub fn voted(&self, ballot: Ballot) -> bool {
        self.ballots.contains(&ballot)
    }

    /// Power goes: what is behind no barrier may be whole, torn or not there; `rot`: so may the newest promised record be, which no later one vouches for.
    pub fn power_cut(&mut self, rng: &mut Rng, tears: bool, rot: bool) -> (u64, u64) {
        let (mut torn, mut rotten) = (0, 0);
        let sealed = self.sealed_for_rot();
        for at in 0..self.records.len() {
            let seq = at as u64 + 1;
            let newest = seq == self.durable && seq > sealed && rot;
            let record = &mut self.records[at];
            let has_entries = record.what.as_ref().is_some_and(|persist| !persist.entries.is_empty());
            if seq > self.durable {
                record.media = match rng.below(4) {
                    0 => Media::Whole,
                    1 if tears && has_entries => Media::BadPayload,
                    2 if tears => Media::BadHeader,
                    _ => Media::Absent,
                };
                torn += u64::from(record.media != Media::Whole);
            } else if newest && record.what.as_ref().is_some_and(|persist| persist.install.is_none()) {
                record.media = if has_entries && rng.one_in(2) && record.what.as_ref().is_some_and(|persist| persist.ballot.is_none()) {
                    Media::BadPayload
                } else {
                    Media::BadHeader
                };
                rotten += 1;
            }
        }
        (torn, rotten)
    }

    fn sealed_for_rot(&self) -> u64 {
        self.records[..self.durable as usize].iter().map(|record| record.durable_to).max().unwrap_or(0)
    }

    /// Walks the stream as recovery does. What was read is durable then: the next generation's first batch sees to it. What is bad stays until
    /// [`Disk::drop_bad`], so that a crash before that comes to the same doubt.
    pub fn recover(&mut self) -> (Recovered, Option<Doubt>) {
        let known = self
            .records
            .iter()
            .filter(|record| matches!(record.media, Media::Whole | Media::BadPayload))
            .map(|record| record.durable_to)
            .max();
        let known = known.unwrap_or(0);
        let kept = self.records.iter().position(|record| record.media != Media::Whole).unwrap_or(self.records.len()) as u64;
        if let Some(at) = self.before.iter().position(|(seq, _)| *seq > kept) {
            self.checkpoint = self.before.swap_remove(at).1;
        }
        self.before.clear();
        let checkpoint = self.checkpoint.clone();
        let mut ballot = Ballot::default();
        let mut log: Vec<Entry> = Vec::new();
        let mut cut = self.records.len();
        let mut bad = None;
        for (at, record) in self.records.iter().enumerate() {
            match record.media {
                Media::Whole => take(record.what.as_ref(), &checkpoint, &mut ballot, &mut log),
                Media::Absent => {
                    assert!(at as u64 + 1 > known, "a promised record is absent: the simulator's own mistake");
                    cut = at;
                    break;
                }
                Media::BadPayload | Media::BadHeader => {
                    bad = Some(at);
                    cut = at;
                    break;
                }
            }
        }
        let doubt = bad.and_then(|at| self.doubt(at));
        self.durable = cut as u64;
        self.entries = log.iter().map(|entry| (entry.index.0, entry.term)).collect();
        for record in &self.records[..cut] {
            self.ballots.extend(record.what.as_ref().and_then(|persist| persist.ballot));
        }
        self.ballot = ballot;
        let Checkpoint { applied, term, members, .. } = checkpoint;
        let (start, start_term, applied_term, committed) = (applied, term, term, applied);
        let recovered = Recovered { ballot, start, start_term, applied, applied_term, members, entries: log, committed, floor: None };
        (recovered, doubt)
    }

    /// `None` when all that is bad is known to have held no entries.
    fn doubt(&self, bad: usize) -> Option<Doubt> {
        // The descriptors of a bad header stand in the next one too, if that is whole and the two are neighbours.
        let told = |at: usize| {
            let record = &self.records[at];
            let next = self.records.get(at + 1).is_some_and(|next| matches!(next.media, Media::Whole | Media::BadPayload));
            record.media != Media::BadHeader || next
        };
        let mut last = None;
        for at in bad..self.records.len() {
            if self.records[at].media == Media::Absent {
                break;
            }
            if !told(at) {
                return Some(Doubt { last: None });
            }
            if let Some(persist) = &self.records[at].what
                && let Some(entry) = persist.entries.last()
            {
                last = Some((entry.index, entry.term));
            }
        }
        last.map(|last| Doubt { last: Some(last) })
    }

    /// Cuts the stream where recovery found its end.
    pub fn drop_bad(&mut self) {
        self.records.truncate(self.durable as usize);
    }

    /// A new life: everything that stands is durable, marks begin again.
    pub fn begin_life(&mut self) {
        self.durable = self.last();
        self.told = self.durable;
        self.last_mark = Mark(0);
    }

    /// The record that is written next installs `checkpoint`, if it lasts.
    pub fn install(&mut self, checkpoint: Checkpoint) {
        let before = std::mem::replace(&mut self.checkpoint, checkpoint);
        self.before.push((self.last() + 1, before));
    }

    /// The log begins after `checkpoint` from here on; older entries stay readable in memory only.
    pub fn checkpoint(&mut self, checkpoint: Checkpoint) {
        self.checkpoint = checkpoint;
    }
}

fn take(what: Option<&Persist>, checkpoint: &Checkpoint, ballot: &mut Ballot, log: &mut Vec<Entry>) {
    let Some(persist) = what else { return };
    if let Some(new) = persist.ballot {
        *ballot = new;
    }
    // An install that was not finished before the crash left the old state and log as they were.
    if persist.install.as_ref().is_some_and(|install| install.index <= checkpoint.applied) {
        log.clear();
    }
    for entry in &persist.entries {
        if entry.index <= checkpoint.applied {
            // It is in the checkpoint, and what stood after it is gone all the same.
            log.clear();
            continue;
        }
        let at = (entry.index.0 - checkpoint.applied.0 - 1) as usize;
        if at <= log.len() {
            log.truncate(at);
            log.push(entry.clone());
        }
    }
}
