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
//! | bad payload, known durable, entry applied | whole | redone: whoever reads the bad blocks finds them so; the log begins after it |
//! | bad payload, known durable, entry not applied | whole | in the log: whoever reads these blocks finds them lost |
//! | bad payload, not known durable | whole | the log ends before it; in doubt as far as it went |
//! | no header, not known durable, some trace of one | in the next header | in doubt as far as it went |
//! | no header, not known durable, some trace of one | gone | in doubt: anything that its ballot allowed |
//! | no header, not known durable, no trace | – | the log ends here: what is not there was never acknowledged |
//! | no header, known durable, covered by the checkpoint | gone | in doubt; the log ends before it |
//! | no header, known durable, not covered | gone | stopped for good: its ballot may have been there |
//!
//! A **trace** is a block that cannot be read, or one at the place of the next batch that does not decode and has the magic, the incarnation,
//! the sequence or the place of that batch. A tear leaves one as rot does; nothing can tell them apart, and to take one for the other
//! would lose what was acknowledged. And a log is never cut for rot in the middle: other drives may have rot in other entries, and all that came
//! after would be gone everywhere. Doubt ([`crate::replica::resolve`]) is named in the Open batch, which lies over the trace, and in each
//! checkpoint, until the log is as far again or the others have said that nothing is lost.

use crate::admit::{Admission, Known};
use crate::config::{Canary, Stage};
use crate::doubt::Doubts;
use crate::index::{Slot, Version};
use crate::member::{Logged, Member, MemberStage, Payload};
use crate::orders::SNAPSHOT_ITSELF;
use crate::port::*;
use crate::rebuild::Rebuild;
use crate::recover::Recovery;
use crate::replica::resolve::unknown_floor;
use crate::replica::{Ballot, LogEnd, Recovered, Stop};
use crate::reserve::Guard;
use crate::store::Store;
use penstock_wire::batch::{EVERY_MEMBER, Entry, Op, StackOp, decode_section};
use penstock_wire::directory::ReplicaRow;
use penstock_wire::layer::{KeptRow, SnapshotShape, Stack};
use penstock_wire::peer::{self, Members, Past, Seen};
use penstock_wire::reservation::Reservations;
use penstock_wire::{Index, Seq, SnapshotId, Term};
use std::collections::BTreeMap;

/// Doubts that the Open batch has room for, in one block and without the section before it.
const NAMED_MAX: usize = 80;

/// An entry of a group's log where the walk found it.
#[derive(Clone, Debug)]
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
    /// What the directory says of that.
    saved: Index,
    members: Members,
    ballot: Ballot,
    /// The last entry that the log said to be committed.
    committed: Option<LogEnd>,
    /// It began as a snapshot of another volume, in this log.
    stands: bool,
    /// By index: what was found of the log as it stands.
    list: BTreeMap<Index, Placed>,
    /// In doubt as far as this, or without a bound.
    doubt: Option<Option<LogEnd>>,
    stopped: Option<String>,
    /// Its content is whole as of this entry alone.
    rebuild: Option<Index>,
    /// The volume's reservations as of `applied`, where its log began anew there and the directory does not know them.
    reservations: Option<Option<Box<Reservations>>>,
    /// Of the store's openings, and what it knows of other members'.
    past: Past,
    seen: Vec<Seen>,
    /// Times that its log began anew, and what it held before each: it may be in extents in part.
    era: u32,
    earlier: Vec<(u32, Placed)>,
    /// Layers that were told for the install that comes, and those that installs brought: from which life of the log on, and how far the one before was
    /// applied.
    rows: Vec<KeptRow>,
    stacks: Vec<(u32, Stack, Index)>,
    /// Extents that were copied, and what made it whole.
    own: Vec<Redone>,
}

/// What of a rebuild takes effect once more.
#[derive(Debug)]
struct Redone {
    era: u32,
    op: Op,
    seq: Seq,
    at: u32,
    bad: Vec<u32>,
}

/// What changes a replica's layers when the log is redone.
#[derive(Debug)]
enum Restack {
    Installed(Stack, Index),
    Frozen(SnapshotShape, u64, Index),
    Removed(SnapshotId),
}

impl Walked {
    pub fn born(members: Members) -> Self {
        let (applied, applied_term, ballot) = (Index(0), Term(0), Ballot::default());
        let (rebuild, reservations, seen, era, earlier, own) = (None, None, Vec::new(), 0, Vec::new(), Vec::new());
        let (rows, stacks) = (Vec::new(), Vec::new());
        let (list, doubt, stopped, past) = (BTreeMap::new(), None, None, Past::default());
        Self {
            applied,
            applied_term,
            members,
            ballot,
            committed: None,
            stands: false,
            saved: Index(0),
            list,
            doubt,
            stopped,
            rebuild,
            reservations,
            past,
            seen,
            era,
            earlier,
            rows,
            stacks,
            own,
        }
    }

    /// A clone's member begins with an entry that no log has.
    fn born_over(members: Members) -> Self {
        let (applied, applied_term) = SNAPSHOT_ITSELF;
        Self { applied, applied_term, ballot: Ballot { term: applied_term, ..Ballot::default() }, stands: true, ..Self::born(members) }
    }

    pub fn of_row(row: &ReplicaRow) -> Option<Self> {
        let member = row.member.as_ref()?;
        Some(Self {
            applied: row.applied,
            applied_term: member.applied_term,
            ballot: Ballot { term: row.term, vote: member.vote },
            doubt: member.doubt.map(|(index, term)| Some(LogEnd { term, index })),
            stopped: member.stopped.then(|| "it was stopped in an earlier life, for good: replace this replica".to_owned()),
            rebuild: member.rebuild,
            saved: row.applied,
            past: member.past,
            seen: member.seen.clone(),
            ..Self::born(member.members.clone())
        })
    }

    /// The store's own word on it, in the order of the log.
    pub fn own_word(&mut self, op: &Op, seq: Seq) {
        match op {
            Op::Ballot { term, vote } => self.ballot = Ballot { term: *term, vote: *vote },
            Op::Doubt { floor } => self.lose(floor.map(|(index, term)| LogEnd { term, index })),
            Op::Resolved => self.doubt = None,
            Op::Committed { index, term } => self.committed = Some(LogEnd { term: *term, index: *index }),
            Op::Install { as_of, index, index_term, members } => {
                self.rebuild = Some(*as_of);
                // A checkpoint may know more than that.
                if *index >= self.applied {
                    (self.applied, self.applied_term, self.members) = (*index, *index_term, (**members).clone());
                    self.reservations = Some(None);
                }
            }
            // It follows its install.
            Op::Reserve(state) => {
                if let Some(known) = &mut self.reservations {
                    *known = Some(state.clone());
                }
            }
            Op::Whole { .. } => self.end_rebuild(),
            Op::Layer(row) => self.rows.push((**row).clone()),
            Op::Stack(op) => self.take_stack(op),
            Op::Seen(seen) => {
                self.seen.retain(|before| before.no != seen.no);
                self.seen.push(**seen);
            }
            Op::Forced { term, members } => {
                (self.ballot, self.members) = (Ballot { term: *term, vote: peer::MemberNo(0) }, (**members).clone());
                (self.doubt, self.stopped, self.rebuild) = (None, None, None);
                self.seen.retain(|seen| !members.was_removed(seen.no));
            }
            Op::Believed(id) => self.past.believe(*id),
            Op::Opened { vouched } => self.past.open(seq, *vouched),
            _ => {}
        }
    }

    /// What earlier logs held after the entry that all content was whole as of was copied since, if it was applied; and if not it may never have been
    /// committed, and nobody knew that it was to be copied.
    fn end_rebuild(&mut self) {
        if let Some(as_of) = self.rebuild.take() {
            self.earlier.retain(|(_, placed)| placed.entry.index <= as_of);
        }
    }

    /// Of earlier logs what the checkpoint has is not redone. What was applied late it does not have, however old its batch is.
    fn drop_saved(&mut self, covered: Seq) {
        let saved = self.saved;
        self.earlier.retain(|(_, placed)| placed.seq > covered || placed.entry.index > saved);
    }

    /// What an install says of layers. Of the log before it only what was applied counts: what was not may be in no layer of anyone's.
    fn take_stack(&mut self, op: &StackOp) {
        let rows = std::mem::take(&mut self.rows);
        let kept = rows[rows.len().saturating_sub(op.kept as usize)..].to_vec();
        let stack = Stack { live: op.live, since: op.since, kept };
        if stack.kept.len() != op.kept as usize || stack.check().is_err() {
            self.stopped.get_or_insert(format!("an install's {} layers are not before it in the log", op.kept));
            return;
        }
        let era = self.era;
        self.earlier.retain(|(of, placed)| of + 1 != era || placed.entry.index <= op.applied);
        self.stacks.push((era, stack, op.applied));
    }

    /// Snapshots that came and went and layers that installs brought, each with what it comes in front of: all of it before anything else is redone.
    fn markers(&self, known: &[Placed]) -> Vec<(u32, Restack)> {
        let mut all: Vec<(u32, Restack)> =
            self.stacks.iter().map(|(era, stack, applied)| (*era, Restack::Installed(stack.clone(), *applied))).collect();
        // Who began anew without layers had a marker before that alone.
        let had_layers = |(era, _): &&(u32, Placed)| self.stacks.iter().any(|(of, ..)| *of == era + 1);
        let mut entries: Vec<(u32, &Placed)> = self.earlier.iter().filter(had_layers).map(|(era, placed)| (*era, placed)).collect();
        entries.extend(known.iter().map(|placed| (self.era, placed)));
        entries.sort_by_key(|(era, placed)| (*era, placed.entry.index));
        for (era, placed) in entries {
            let index = placed.entry.index;
            let of = |op| match op {
                Op::Snapshot { blocks, shape } => Some((era, Restack::Frozen(*shape, blocks, index))),
                Op::Unsnapshot(id) => Some((era, Restack::Removed(id))),
                _ => None,
            };
            all.extend(placed.entry.ops().unwrap_or_default().into_iter().filter_map(of));
        }
        all.sort_by_key(|(era, _)| *era);
        all
    }

    /// Entries may be gone as far as `to`.
    fn lose(&mut self, to: Option<LogEnd>) {
        self.doubt = Some(match self.doubt {
            None => to,
            Some(before) => before.zip(to).map(|(before, to)| before.max(to)),
        });
    }

    fn put(&mut self, placed: Placed, again: bool) {
        let (index, term) = (placed.entry.index, placed.entry.term);
        if !again {
            self.list.split_off(&index);
        } else if self.list.get(&index).is_some_and(|stands| stands.entry.term != term) {
            return;
        }
        self.list.insert(index, placed);
    }

    /// Batches are gone, descriptors and all. What is covered by the checkpoint is lost to the log alone.
    pub fn lost_batches(&mut self, covered: bool) {
        if covered {
            let applied = self.applied;
            self.list.split_off(&Index(applied.0 + 1));
            self.lose(None);
        } else {
            self.stopped.get_or_insert("batches of the log are lost, and its vote may have been in one of them".to_owned());
        }
    }

    /// What the log may be relied on for: what the group is opened with, where each entry of it lies, and what of it is applied and is to be redone.
    fn end(&mut self, covered: Seq) -> (Recovered, Vec<Logged>, Vec<Placed>) {
        let applied = self.applied;
        let mut rest = self.list.split_off(&Index(applied.0 + 1));
        let mut known = std::mem::take(&mut self.list);
        // Up to where one follows the other.
        let whole = rest.keys().zip(applied.0 + 1..).take_while(|(found, index)| found.0 == *index).count();
        if whole < rest.len() {
            rest.split_off(&Index(applied.0 + 1 + whole as u64));
            self.lose(None);
        }
        // Back to where one follows the other and can be sent to a laggard. The entry before the first tells its term.
        let mut first = applied;
        while let Some(placed) = known.get(&first).filter(|placed| placed.bad.is_empty()) {
            first = Index(placed.entry.index.0 - 1);
        }
        let (mut start, mut start_term) = (applied, self.applied_term);
        let mut list = Vec::new();
        if first < applied {
            list = known.range(Index(first.0 + 1)..).map(|(_, placed)| placed.clone()).collect();
            (start, start_term) = (first, Term(0));
            if first.0 > 0 {
                let before = list.remove(0).entry;
                (start, start_term) = (before.index, before.term);
            }
        }
        list.extend(rest.into_values());
        let floor = self.doubt.map(|floor| floor.unwrap_or_else(|| unknown_floor(self.ballot.term)));
        let entries = list.iter().map(|placed| placed.entry.clone()).collect();
        let (applied_term, members) = (self.applied_term, self.members.clone());
        let stands = |end: &LogEnd| list.iter().any(|placed| (placed.entry.index, placed.entry.term) == (end.index, end.term));
        let committed = self.committed.filter(stands).map_or(applied, |end| end.index.max(applied));
        let recovered = Recovered { ballot: self.ballot, start, start_term, applied, applied_term, members, entries, committed, floor };
        let logged = list.into_iter().map(|placed| {
            let payload = if placed.entry.payload_blocks == 0 { Payload::None } else { Payload::Ring { at: placed.at } };
            Logged { entry: placed.entry, seq: Some(placed.seq), payload, promised: Vec::new() }
        });
        known.retain(|_, placed| placed.seq > covered);
        (recovered, logged.collect(), known.into_values().collect())
    }
}

impl Recovery {
    /// Takes an entry that a group's log holds, or the store's own word on a member. False when it is neither.
    pub(crate) fn walk_entry(&mut self, entry: &Entry, seq: Seq, at: u32, bad: Vec<u32>) -> bool {
        let counts = seq > self.covered;
        if entry.replica == EVERY_MEMBER {
            let all = self.walked.values_mut().filter(|_| counts);
            all.for_each(|walked| entry.ops.iter().for_each(|op| walked.own_word(op, seq)));
            return true;
        }
        if let (Index(0), [Op::Create(_), Op::Members(members), over @ ..]) = (entry.index, &entry.ops[..])
            && counts
        {
            let born = if over.is_empty() { Walked::born } else { Walked::born_over };
            self.walked.entry(entry.replica).or_insert_with(|| born((**members).clone()));
            return false; // the replica itself is made as any other
        }
        let Some(walked) = self.walked.get_mut(&entry.replica) else { return false };
        if entry.index.0 == 0 {
            for op in &entry.ops {
                if matches!(op, Op::Install { .. }) {
                    // What stood before is of another log. Committed or not: what it touched is copied. Where the checkpoint has the install, it has
                    // all that was applied before, and its row is of the new log.
                    let (era, before) = (walked.era, std::mem::take(&mut walked.list));
                    if counts {
                        walked.earlier.extend(before.into_values().map(|placed| (era, placed)));
                    }
                    walked.era += 1;
                }
                if counts {
                    walked.own_word(op, seq);
                }
                if counts && matches!(op, Op::Whole { .. } | Op::Copy(_)) {
                    walked.own.push(Redone { era: walked.era, op: op.clone(), seq, at, bad: bad.clone() });
                }
            }
            return !entry.ops.iter().any(|op| matches!(op, Op::Delete));
        }
        let again = entry.again;
        match entry.logged() {
            Ok(entry) => walked.put(Placed { entry, seq, at, bad }, again),
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
        let vouched = self.config.replication.witness.is_some_and(|witness| rec.newest_generation() >= witness);
        rec.vouched = (!rec.walked.is_empty()).then_some(vouched);
        for (no, mut walked) in std::mem::take(&mut rec.walked) {
            let no = ReplicaNo(no);
            if self.map.live(no).is_none() {
                continue;
            }
            let (recovered, logged, known) = walked.end(rec.covered);
            // Of each log that it began, what was copied and then its entries: those that are newer than a copy lie over it.
            walked.drop_saved(rec.covered);
            for (_, restack) in walked.markers(&known) {
                match restack {
                    Restack::Installed(stack, applied) => self.map.restack(no, &stack, applied, Seq(0)),
                    Restack::Frozen(shape, blocks, at) => self.map.freeze(no, shape, blocks, at),
                    Restack::Removed(id) => self.map.unsnapshot(no, id, Seq(0)),
                }
            }
            redo.extend(walked.earlier.drain(..).map(|(era, placed)| ((no, era, 1, placed.entry.index.0), Ok(placed))));
            redo.extend(walked.own.drain(..).map(|own| ((no, own.era, 0, own.seq.0), Err(own))));
            redo.extend(known.into_iter().map(|placed| ((no, walked.era, 1, placed.entry.index.0), Ok(placed))));
            walked.past.open(rec.seq, vouched);
            self.rejoin_group(no, walked, recovered, logged);
            if let Some(floor) = self.member(no).and_then(|member| member.group()?.floor())
                && !self.canary(Canary::ForgetDoubt)
            {
                rec.doubts.push((no.0, Some((floor.index, floor.term))));
            }
        }
        if rec.doubts.len() > NAMED_MAX {
            rec.doubts = vec![(EVERY_MEMBER, None)];
        }
        // Each group's in its order: by index, and so by batch, but for what was carried forward.
        redo.sort_by_key(|(order, _)| *order);
        for ((no, ..), what) in redo {
            self.drain.unsaved = true;
            match what {
                Ok(placed) => {
                    rec.report.lost_blocks += placed.bad.len() as u64;
                    self.redo_placed(no, &placed);
                }
                Err(own) => {
                    rec.report.lost_blocks += own.bad.len() as u64;
                    self.redo_own(no, &own.op, own.seq, own.at);
                }
            }
        }
    }

    fn rejoin_group(&mut self, no: ReplicaNo, mut walked: Walked, recovered: Recovered, logged: Vec<Logged>) {
        let shape = &self.map.get(no).expect("seen to be live").shape;
        let me = self.own_number(shape, &walked.members);
        if me.is_none() {
            walked.stopped.get_or_insert("it is no member of its group any more".to_owned());
        }
        let me = me.unwrap_or_default();
        if walked.stands && walked.members.has_content(me) && self.map.get(no).is_none_or(|replica| replica.origin.is_none()) {
            walked.stopped.get_or_insert("the snapshot that it is a clone of is not on this drive".to_owned());
        }
        let (start, start_term, applied) = (recovered.start, recovered.start_term, recovered.applied);
        let last = start.0 + recovered.entries.len() as u64;
        let stage = match walked.stopped {
            Some(why) => MemberStage::Stopped(Stop::Quarantined(why)),
            None => self.raise_group(no, me, recovered),
        };
        let mut member = Member::new(me, stage, walked.members);
        (member.applied_term, member.ballot) = (walked.applied_term, walked.ballot);
        member.markers = logged
            .iter()
            .map(|logged| &logged.entry)
            .filter(|entry| entry.index > applied && entry.is_marker())
            .map(|entry| entry.index)
            .collect();
        (member.start, member.start_term, member.log, member.recovered) = (start, start_term, logged.into(), Index(last));
        member.saved = walked.saved;
        member.admission = Admission::new(walked.past);
        member.known = walked.seen.into_iter().map(Known::recovered).collect();
        member.doubts = member.group().and_then(|group| group.floor()).map(|_| Box::new(Doubts::new(walked.ballot.term)));
        member.rebuild = walked.rebuild.map(|as_of| Box::new(Rebuild::new(as_of, walked.applied, start, member.has_content())));
        if let Some(group) = member.group_mut().filter(|_| walked.rebuild.is_some()) {
            group.set_rebuilding(true);
        }
        let replica = self.map.get_mut(no).expect("seen to be live");
        (replica.term, replica.applied, replica.proposed) = (walked.ballot.term, walked.applied, Index(last));
        replica.member = Some(Box::new(member));
        if let Some(state) = walked.reservations {
            replica.guard = Guard::of(state);
        }
    }

    fn redo_placed(&mut self, no: ReplicaNo, placed: &Placed) {
        let (seq, index) = (placed.seq, placed.entry.index);
        let content = self.member(no).is_none_or(Member::has_content);
        let mut first = 0;
        for op in placed.entry.ops().unwrap_or_default() {
            match op {
                Op::Write { .. } | Op::Zero { .. } if !content => {}
                Op::Write { block, crcs } => {
                    for (i, crc) in crcs.iter().enumerate() {
                        let at = first + i as u32;
                        // Bad or not: whoever reads it finds out, and asks the others for what has this checksum.
                        let version = Version::Log { at: placed.at + at, crc: *crc };
                        self.redo_block(no, block + i as u64, Slot { seq, version }, index);
                    }
                    first += crcs.len() as u32;
                }
                Op::Zero { block, count } => self.redo_zero(no, block, u64::from(count), seq, index),
                Op::Resize { blocks } => self.redo_resize(no, blocks, seq, index),
                // What is applied of these the directory has, or an install.
                Op::Reserve(_) => {}
                // These were first: each entry's index tells its layer.
                Op::Snapshot { .. } | Op::Unsnapshot(_) => {}
                // None of them stands among the ops of a group's entry.
                Op::Create(_) | Op::Delete | Op::Members(_) | Op::Origin { .. } => {}
                own => debug_assert!(own.is_own(), "{own:?} is never redone"),
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
            let member = self.member(no).expect("just seen");
            if member.rebuild.is_some() && member.group().is_some() {
                self.groups.rebuilding.push(no);
            }
            self.enlist(no);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_wire::peer::EntryKind;

    fn placed(term: u64, index: u64, seq: u64) -> Placed {
        let entry = peer::Entry { term: Term(term), index: Index(index), kind: EntryKind::Ops, bytes: vec![], payload_blocks: 0 };
        Placed { entry, seq: Seq(seq), at: 0, bad: vec![] }
    }

    fn bad(term: u64, index: u64, seq: u64) -> Placed {
        Placed { bad: vec![0], ..placed(term, index, seq) }
    }

    /// Applied up to entry 5 of term 2, in a term 9; what stands in it: `(start, start term, entries as (term, index), floor)`.
    type Ended = (u64, u64, Vec<(u64, u64)>, Option<(u64, u64)>);

    fn end(found: Vec<(Placed, bool)>) -> (Ended, Vec<u64>) {
        let members = Members { next: peer::MemberNo(1), list: vec![] };
        let mut walked = Walked { applied: Index(5), applied_term: Term(2), ..Walked::born(members) };
        walked.ballot.term = Term(9);
        found.into_iter().for_each(|(placed, again)| walked.put(placed, again));
        let (recovered, logged, redo) = walked.end(Seq(10));
        assert_eq!(recovered.entries.len(), logged.len());
        let entries = recovered.entries.iter().map(|entry| (entry.term.0, entry.index.0)).collect();
        let floor = recovered.floor.map(|floor| (floor.term.0, floor.index.0));
        ((recovered.start.0, recovered.start_term.0, entries, floor), redo.iter().map(|placed| placed.entry.index.0).collect())
    }

    fn once(found: Vec<Placed>) -> (Ended, Vec<u64>) {
        end(found.into_iter().map(|placed| (placed, false)).collect())
    }

    #[test]
    fn log_begins_and_ends_as_the_table_says() {
        let unknown = Some((10, 0));
        let table: [(Vec<Placed>, Ended, &[u64]); 11] = [
            (vec![], (5, 2, vec![], None), &[]),
            (vec![placed(2, 6, 11)], (5, 2, vec![(2, 6)], None), &[]),
            // The first that is kept tells the term before the rest; what is covered is not redone.
            (vec![placed(2, 3, 9), placed(2, 4, 10), placed(2, 5, 11), placed(3, 6, 12)], (3, 2, vec![(2, 4), (2, 5), (3, 6)], None), &[5]),
            (vec![placed(1, 1, 11), placed(1, 2, 12)], (5, 2, vec![], None), &[1, 2]),
            (
                (1..=6).map(|index| placed(2, index, 10 + index)).collect(),
                (0, 0, (1..=6).map(|index| (2, index)).collect(), None),
                &[1, 2, 3, 4, 5],
            ),
            // Entries replace what stood from their index on: nothing of a leader that lost is redone.
            (vec![placed(1, 5, 11), placed(1, 6, 12), placed(1, 7, 13), placed(2, 5, 14)], (5, 2, vec![], None), &[5]),
            (vec![placed(1, 6, 11), placed(1, 7, 12), placed(3, 6, 13)], (5, 2, vec![(3, 6)], None), &[]),
            // Applied and bad: redone with what is lost, and not for laggards.
            (vec![placed(2, 3, 11), bad(2, 4, 12), placed(2, 5, 13), placed(2, 6, 14)], (5, 2, vec![(2, 6)], None), &[3, 4, 5]),
            // Not applied and bad: what it is, and what comes after it, is known all the same.
            (vec![placed(2, 6, 11), bad(3, 7, 12), placed(3, 8, 13)], (5, 2, vec![(2, 6), (3, 7), (3, 8)], None), &[]),
            (vec![placed(2, 6, 11), bad(3, 7, 12), placed(4, 7, 13)], (5, 2, vec![(2, 6), (4, 7)], None), &[]),
            // A hole: nobody knows what was in it.
            (vec![placed(2, 6, 11), placed(3, 8, 13)], (5, 2, vec![(2, 6)], unknown), &[]),
        ];
        for (row, (found, ended, redo)) in table.into_iter().enumerate() {
            assert_eq!(once(found), (ended, redo.to_vec()), "row {row}");
        }
    }

    #[test]
    fn entry_carried_forward_replaces_nothing() {
        let first = || vec![(placed(2, 6, 11), false), (placed(2, 7, 12), false), (placed(2, 8, 13), false)];
        let log = vec![(2, 6), (2, 7), (2, 8)];
        let again = |index, seq| (placed(2, index, seq), true);
        let mut found = first();
        found.extend([again(6, 14), again(7, 15)]);
        assert_eq!(end(found).0, (5, 2, log.clone(), None));
        // What stood first is trimmed.
        let found = vec![(placed(2, 8, 13), false), again(6, 14), again(7, 15), (placed(2, 9, 16), false)];
        assert_eq!(end(found).0.2, [(2, 6), (2, 7), (2, 8), (2, 9)]);
        // Replaced afterwards, it is gone like any other.
        let mut found = first();
        found.extend([again(7, 14), (placed(3, 7, 15), false)]);
        assert_eq!(end(found).0.2, [(2, 6), (3, 7)]);
    }

    /// Entries before an install that are redone, of a checkpoint with entry 5 applied that covers batches up to 10.
    fn redone_under_install(seq: u64) -> Vec<u64> {
        let members = Members { next: peer::MemberNo(1), list: vec![] };
        let row = Walked { applied: Index(5), saved: Index(5), ..Walked::born(members.clone()) };
        let mut rec = Recovery::default();
        (rec.covered, rec.walked) = (Seq(10), [(7, row)].into());
        let zero = vec![Op::Zero { block: 3, count: 1 }];
        let install = Op::Install { as_of: Index(5), index: Index(5), index_term: Term(3), members: Box::new(members) };
        for (seq, term, index, ops) in [(7, 2, 5, zero.clone()), (8, 2, 6, zero), (seq, 0, 0, vec![install])] {
            let entry = Entry { replica: 7, term: Term(term), index: Index(index), ops, again: false };
            assert!(rec.walk_entry(&entry, Seq(seq), 0, Vec::new()));
        }
        let walked = rec.walked.get_mut(&7).expect("it stays");
        walked.drop_saved(rec.covered);
        walked.earlier.iter().map(|(_, placed)| placed.entry.index.0).collect()
    }

    #[test]
    fn entry_applied_late_is_redone_under_an_install_that_the_checkpoint_does_not_have_alone() {
        assert_eq!(redone_under_install(12), [6]);
        assert_eq!(redone_under_install(9), []);
    }

    #[test]
    fn doubts_add_up_and_end_together() {
        let members = Members { next: peer::MemberNo(1), list: vec![] };
        let floor = |term, index| Some((Index(index), Term(term)));
        let mut walked = Walked::born(members);
        walked.own_word(&Op::Doubt { floor: floor(3, 9) }, Seq(1));
        walked.own_word(&Op::Doubt { floor: floor(4, 2) }, Seq(1));
        walked.own_word(&Op::Doubt { floor: floor(3, 10) }, Seq(1));
        assert_eq!(walked.doubt, Some(Some(LogEnd { term: Term(4), index: Index(2) })));
        walked.own_word(&Op::Doubt { floor: None }, Seq(1));
        walked.own_word(&Op::Doubt { floor: floor(4, 2) }, Seq(1));
        assert_eq!(walked.doubt, Some(None));
        walked.own_word(&Op::Resolved, Seq(1));
        assert_eq!(walked.doubt, None);
    }
}
