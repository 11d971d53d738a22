//! What recovery does about replicas that are members of groups, beside the walk of the log (`recover`).
//!
//! Up to the index that the directory calls applied everything was committed; what the extents do not have of that is redone. What comes after
//! may be committed or not: it goes into the member's log, and its group finds out. Entries replace what stood at and after their index, so
//! nothing of a group is redone before the whole log was read. A ballot is the newest of directory and log.
//!
//! How a bad record counts for a member whose entries it may have held:
//!
//! | record | its descriptors | verdict |
//! |---|---|---|
//! | bad payload, known durable, entry applied | whole | redone, the bad blocks lost; the log begins after it |
//! | bad payload, known durable, entry not applied | whole | the log ends before it; in doubt as far as it went |
//! | bad payload, not known durable | whole | the same |
//! | no header, not known durable, some trace of one | in the next header | in doubt as far as it went |
//! | no header, not known durable, some trace of one | gone | in doubt: anything that its ballot allowed |
//! | no header, not known durable, no trace | – | the log ends here: what is not there was never acknowledged |
//! | no header, known durable, covered by the checkpoint | gone | in doubt; the log ends before it |
//! | no header, known durable, not covered | gone | stopped for good: its ballot may have been there |
//!
//! A **trace** is a block that cannot be read, or one at the place of the next batch that does not decode and has the magic, the incarnation,
//! the sequence or the place of that batch. A tear leaves one as rot does; nothing can tell them apart, and to take one for the other
//! would lose what was acknowledged. Doubt ([`crate::replica::resolve`]) is named in the Open batch, which lies over the trace, and in each
//! checkpoint, until the log is as far again or the others have said that nothing is lost.

use crate::config::Stage;
use crate::doubt::Doubts;
use crate::index::{Slot, Version};
use crate::member::{Logged, Member, MemberStage, Payload};
use crate::port::*;
use crate::recover::Recovery;
use crate::replica::resolve::unknown_floor;
use crate::replica::{Ballot, LogEnd, Recovered, Stop};
use crate::store::Store;
use penstock_wire::batch::{EVERY_MEMBER, Entry, Op, decode_section};
use penstock_wire::directory::ReplicaRow;
use penstock_wire::peer::{self, Members};
use penstock_wire::{EXTENT_BLOCKS, Index, Seq, Term};

/// Doubts that the Open batch has room for, in one block and without the section before it.
const NAMED_MAX: usize = 80;

/// An entry of a group's log where the walk found it.
#[derive(Debug)]
struct Placed {
    entry: peer::Entry,
    seq: Seq,
    /// Ring block of its payload.
    at: u32,
    /// Blocks of its payload that are lost.
    bad: Vec<u32>,
}

/// What the walk has found of one member so far.
#[derive(Debug)]
pub(crate) struct Walked {
    applied: Index,
    applied_term: Term,
    members: Members,
    ballot: Ballot,
    /// One after the other.
    list: Vec<Placed>,
    /// In doubt as far as this, or without a bound.
    doubt: Option<Option<LogEnd>>,
    stopped: Option<String>,
}

impl Walked {
    pub fn born(members: Members) -> Self {
        let (applied, applied_term, ballot) = (Index(0), Term(0), Ballot::default());
        Self { applied, applied_term, members, ballot, list: Vec::new(), doubt: None, stopped: None }
    }

    pub fn of_row(row: &ReplicaRow) -> Option<Self> {
        let member = row.member.as_ref()?;
        Some(Self {
            applied: row.applied,
            applied_term: member.applied_term,
            ballot: Ballot { term: row.term, vote: member.vote },
            doubt: member.doubt.map(|(index, term)| Some(LogEnd { term, index })),
            stopped: member.stopped.then(|| "it was stopped in an earlier life".to_owned()),
            ..Self::born(member.members.clone())
        })
    }

    /// The store's own word on it, in the order of the log.
    pub fn own_word(&mut self, op: &Op) {
        match op {
            Op::Ballot { term, vote } => self.ballot = Ballot { term: *term, vote: *vote },
            Op::Doubt { floor } => self.lose(floor.map(|(index, term)| LogEnd { term, index })),
            Op::Resolved => self.doubt = None,
            _ => {}
        }
    }

    /// Entries may be gone as far as `to`.
    fn lose(&mut self, to: Option<LogEnd>) {
        self.doubt = Some(match self.doubt {
            None => to,
            Some(before) => before.zip(to).map(|(before, to)| before.max(to)),
        });
    }

    fn put(&mut self, placed: Placed) {
        let index = placed.entry.index;
        let first = self.list.first().map_or(index, |first| first.entry.index);
        let at = index.0.checked_sub(first.0).map(|at| at as usize);
        match at {
            Some(at) if at <= self.list.len() => self.list.truncate(at),
            // It replaces what the log began with, or what is missing before it is applied.
            None => self.list.clear(),
            Some(_) if index.0 <= self.applied.0 + 1 => self.list.clear(),
            Some(_) => {
                self.lose(None);
                return;
            }
        }
        self.list.push(placed);
    }

    /// Batches are gone, descriptors and all. What is covered by the checkpoint is lost to the log alone.
    pub fn lost_batches(&mut self, covered: bool) {
        if covered {
            let applied = self.applied;
            self.list.retain(|placed| placed.entry.index <= applied);
            self.lose(None);
        } else {
            self.stopped.get_or_insert("batches of the log are lost, and its vote may have been in one of them".to_owned());
        }
    }

    /// Ends the list where it may be relied on, and gives what stands in it that is applied and not covered.
    fn end(&mut self, covered: Seq) -> Vec<Placed> {
        let applied = self.applied;
        if let Some(bad) = self.list.iter().position(|placed| placed.entry.index > applied && !placed.bad.is_empty()) {
            let last = self.list.last().expect("one of it is bad");
            self.lose(Some(LogEnd { term: last.entry.term, index: last.entry.index }));
            self.list.truncate(bad);
        }
        let known = self.list.iter().take_while(|placed| placed.entry.index <= applied).count();
        let rest = self.list.split_off(known);
        let mut redo = std::mem::replace(&mut self.list, rest);
        // The log begins after what a laggard could not be sent any more. The entry before the first tells its term.
        let whole = redo.iter().rposition(|placed| !placed.bad.is_empty()).map_or(0, |bad| bad + 1);
        let reaches = redo.last().is_some_and(|last| last.entry.index == applied);
        if reaches {
            let kept = redo[whole..].iter().map(|placed| Placed { entry: placed.entry.clone(), bad: Vec::new(), ..*placed });
            self.list.splice(..0, kept);
        }
        redo.retain(|placed| placed.seq > covered);
        redo
    }

    /// What the group is opened with, and where each entry of it lies. After [`Self::end`].
    fn recovered(&mut self) -> (Recovered, Vec<Logged>) {
        let (mut start, mut start_term) = (self.applied, self.applied_term);
        match self.list.first().map(|first| &first.entry) {
            Some(first) if first.index.0 > self.applied.0 + 1 => {
                self.stopped.get_or_insert(format!("its log lacks what comes after entry {}", self.applied.0));
                self.list.clear();
            }
            Some(first) if first.index.0 == 1 => (start, start_term) = (Index(0), Term(0)),
            Some(first) if first.index <= self.applied => {
                (start, start_term) = (first.index, first.term);
                self.list.remove(0);
            }
            _ => {}
        }
        let floor = self.doubt.map(|floor| floor.unwrap_or_else(|| unknown_floor(self.ballot.term)));
        let entries = self.list.iter().map(|placed| placed.entry.clone()).collect();
        let (applied, applied_term) = (self.applied, self.applied_term);
        let members = self.members.clone();
        let recovered = Recovered { ballot: self.ballot, start, start_term, applied, applied_term, members, entries, floor };
        let logged = self.list.drain(..).map(|placed| {
            let payload = if placed.entry.payload_blocks == 0 { Payload::None } else { Payload::Ring { at: placed.at } };
            Logged { entry: placed.entry, seq: Some(placed.seq), payload, promises: 0 }
        });
        (recovered, logged.collect())
    }
}

impl Recovery {
    /// Takes an entry that a group's log holds, or the store's own word on a member. False when it is neither.
    pub(crate) fn walk_entry(&mut self, entry: &Entry, seq: Seq, at: u32, bad: Vec<u32>) -> bool {
        let counts = seq > self.covered;
        if entry.replica == EVERY_MEMBER {
            let all = self.walked.values_mut().filter(|_| counts);
            all.for_each(|walked| entry.ops.iter().for_each(|op| walked.own_word(op)));
            return true;
        }
        if let (Index(0), [Op::Create(_), Op::Members(members)]) = (entry.index, &entry.ops[..])
            && counts
        {
            self.walked.entry(entry.replica).or_insert_with(|| Walked::born((**members).clone()));
            return false; // the replica itself is made as any other
        }
        let Some(walked) = self.walked.get_mut(&entry.replica) else { return false };
        if entry.index.0 == 0 {
            if counts {
                entry.ops.iter().for_each(|op| walked.own_word(op));
            }
            return !entry.ops.iter().any(|op| matches!(op, Op::Delete));
        }
        match entry.logged() {
            Ok(entry) => walked.put(Placed { entry, seq, at, bad }),
            Err(error) => _ = walked.stopped.get_or_insert(format!("entry {}: {error}", entry.index.0)),
        }
        true
    }

    /// The log ends here, over a record that cannot be judged: whoever may have had entries in it is in doubt.
    pub(crate) fn doubt_what_is_cut(&mut self) {
        let mut told: Vec<Vec<Entry>> = Vec::new();
        let mut expected = self.seq;
        match self.bad_entries.take() {
            Some(entries) => told.push(entries),
            None if !self.trace => return,
            None => match self.found.iter().find(|found| found.follows(expected)) {
                Some(found) => told.extend(found.entries_before()),
                None => {
                    self.walked.values_mut().for_each(|walked| walked.lose(None));
                    return;
                }
            },
        }
        // Later records that are whole are cut with it. Between them and the next that is not there nobody was promised anything.
        for found in &self.found {
            if found.header.seq == expected.next() {
                told.extend(decode_section(&found.section, found.header.payload_blocks).ok());
                expected = found.header.seq;
            }
        }
        for entry in told.into_iter().flatten().filter(|entry| entry.index.0 > 0) {
            if let Some(walked) = self.walked.get_mut(&entry.replica) {
                walked.lose(Some(LogEnd { term: entry.term, index: entry.index }));
            }
        }
    }
}

impl Store {
    /// The whole log was read: what is applied takes effect, groups are built.
    pub(crate) fn rejoin(&mut self, rec: &mut Recovery) {
        let mut redo = Vec::new();
        for (no, mut walked) in std::mem::take(&mut rec.walked) {
            let no = ReplicaNo(no);
            if self.map.live(no).is_none() {
                continue;
            }
            redo.extend(walked.end(rec.covered).into_iter().map(|placed| (no, placed)));
            self.rejoin_group(no, walked);
            if let Some(floor) = self.member(no).and_then(|member| member.group()?.floor()) {
                rec.doubts.push((no.0, Some((floor.index, floor.term))));
            }
        }
        if rec.doubts.len() > NAMED_MAX {
            rec.doubts = vec![(EVERY_MEMBER, None)];
        }
        // In the order of the log, as at any other time.
        redo.sort_by_key(|(_, placed)| placed.seq);
        for (no, placed) in redo {
            self.drain.unsaved = true;
            rec.report.lost_blocks += placed.bad.len() as u64;
            self.redo_placed(no, &placed);
        }
    }

    fn rejoin_group(&mut self, no: ReplicaNo, mut walked: Walked) {
        let (recovered, mut logged) = walked.recovered();
        let shape = &self.map.get(no).expect("seen to be live").shape;
        let me = self.own_number(shape, &walked.members);
        if me.is_none() {
            walked.stopped.get_or_insert("it is no member of its group any more".to_owned());
        }
        let me = me.unwrap_or_default();
        let unapplied = (recovered.applied.0 - recovered.start.0) as usize;
        let (start, start_term) = (recovered.start, recovered.start_term);
        let last = start.0 + recovered.entries.len() as u64;
        let stage = match walked.stopped {
            Some(why) => MemberStage::Stopped(Stop::Quarantined(why)),
            None => self.raise_group(no, me, recovered),
        };
        for logged in logged.iter_mut().skip(unapplied) {
            logged.promises = self.promise_entry_again(no, &logged.entry);
        }
        let mut member = Member::new(me, stage, walked.members);
        (member.applied_term, member.ballot) = (walked.applied_term, walked.ballot);
        (member.start, member.start_term, member.log) = (start, start_term, logged.into());
        member.doubts = member.group().and_then(|group| group.floor()).map(|_| Box::new(Doubts::new(walked.ballot.term)));
        let replica = self.map.get_mut(no).expect("seen to be live");
        (replica.term, replica.applied, replica.proposed) = (walked.ballot.term, walked.applied, Index(last));
        replica.member = Some(Box::new(member));
    }

    /// Space for an entry that may still be committed: it had its promise before the crash.
    fn promise_entry_again(&mut self, no: ReplicaNo, entry: &peer::Entry) -> u32 {
        let mut promises = 0;
        for op in entry.ops().unwrap_or_default() {
            let Op::Write { block, crcs } = op else { continue };
            for extent in block / EXTENT_BLOCKS..=(block + crcs.len() as u64 - 1) / EXTENT_BLOCKS {
                if !self.has_place(crate::index::GroupKey { replica: no, extent: extent as u32 }) {
                    self.space.promise_again();
                    promises += 1;
                }
            }
        }
        promises
    }

    fn redo_placed(&mut self, no: ReplicaNo, placed: &Placed) {
        let (seq, index) = (placed.seq, placed.entry.index);
        let mut first = 0;
        for op in placed.entry.ops().unwrap_or_default() {
            match op {
                Op::Write { block, crcs } => {
                    for (i, crc) in crcs.iter().enumerate() {
                        let at = first + i as u32;
                        let version = if placed.bad.contains(&at) { Version::Lost } else { Version::Log { at: placed.at + at, crc: *crc } };
                        self.redo_block(no, block + i as u64, Slot { seq, version }, index);
                    }
                    first += crcs.len() as u32;
                }
                Op::Zero { block, count } => self.apply_zero(no, block, u64::from(count), seq, index.0),
                Op::Resize { blocks } => self.resize_replica(no, blocks, seq, index.0),
                // None of them stands among the ops of a group's entry.
                Op::Create(_) | Op::Delete | Op::Members(_) | Op::Ballot { .. } | Op::Doubt { .. } | Op::Resolved => {}
                Op::Install { .. } | Op::Whole { .. } | Op::Copy(_) => {}
            }
        }
    }

    /// The store serves, or is fenced: members take part, or say that they do not.
    pub(crate) fn enlist_members(&mut self, stage: Stage, fx: &mut Effects) {
        let members: Vec<ReplicaNo> = self.map.iter().filter(|replica| replica.member.is_some()).map(|replica| replica.no).collect();
        for no in members {
            let member = self.member_mut(no).expect("just seen");
            if matches!(stage, Stage::Fenced(_)) {
                member.stage = MemberStage::Stopped(Stop::PersistFailed);
            }
            if let MemberStage::Stopped(stop) = &member.stage {
                fx.list.push(Effect::Notice(Notice::GroupStopped { replica: no, why: stop.to_string() }));
            }
            if member.doubts.is_some() {
                self.groups.doubtful.push(no);
            }
            self.enlist(no);
        }
    }
}
