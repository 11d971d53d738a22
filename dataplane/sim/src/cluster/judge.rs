//! What must hold at every event, whoever fails: one leader a term, one history, nothing promised before it is durable, nothing
//! acknowledged lost, each block a linearizable register.

use super::disk::{Disk, Registers};
use crate::tally::Tally;
use penstock_engine::replica::{Ballot, Group, GroupView, Part};
use penstock_wire::peer::{Entry, MemberNo, Message, MessageBody};
use penstock_wire::{Index, Term};
use std::collections::BTreeMap;

pub type Verdict = Result<(), String>;

/// A client's read or write that is out.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    pub block: u64,
    /// Written value; 0 for a read.
    pub value: u32,
    /// The newest version of the block that anyone had seen when it began.
    pub floor: Index,
}

#[derive(Default)]
pub struct Judge {
    leaders: BTreeMap<Term, MemberNo>,
    /// Whom each member gave its vote of a term.
    votes: BTreeMap<(MemberNo, Term), MemberNo>,
    /// The latest term that each member has spoken in.
    spoken: BTreeMap<MemberNo, Term>,
    /// The one history: entry's term and bytes.
    history: BTreeMap<u64, (Term, Vec<u8>)>,
    /// The term of whoever applied it first: it was committed in that term or before.
    known: BTreeMap<u64, Term>,
    /// Newest version that was acknowledged or read, by block.
    seen: BTreeMap<u64, Index>,
    acknowledged: Vec<(Index, Vec<u8>)>,
}

impl Judge {
    pub fn begin(&self, block: u64, value: u32) -> Operation {
        Operation { block, value, floor: self.seen.get(&block).copied().unwrap_or_default() }
    }

    /// Before a message leaves: what it promises is durable (invariants 7 and 9).
    pub fn sent(&mut self, message: &Message, disk: &Disk, tally: &mut Tally) -> Verdict {
        if !matches!(message.body, MessageBody::Vote { pre: true, .. } | MessageBody::Voted { pre: true, .. }) {
            let spoken = self.spoken.entry(message.from).or_default();
            *spoken = (*spoken).max(message.term);
        }
        match message.body {
            MessageBody::Voted { pre: false, granted: true, .. } => {
                self.votes(message.from, message.term, message.to)?;
                tally.check("a vote is durable before it is sent (7)");
                let ballot = Ballot { term: message.term, vote: message.to };
                if !disk.voted(ballot) {
                    return Err(format!(
                        "invariant 7: {:?} votes for {:?} in {:?}, which is not durable",
                        message.from, message.to, message.term
                    ));
                }
            }
            MessageBody::Vote { pre: false, .. } => {
                self.votes(message.from, message.term, message.from)?;
                let ballot = Ballot { term: message.term, vote: message.from };
                if !disk.voted(ballot) {
                    return Err(format!("invariant 7: {:?} campaigns in {:?}, its own vote is not durable", message.from, message.term));
                }
            }
            MessageBody::Appended { index, .. } => {
                tally.check("an entry is durable before it is acknowledged (9)");
                if !disk.holds(index) {
                    return Err(format!(
                        "invariant 9: {:?} acknowledges entry {} to {:?}, which is not durable",
                        message.from, index.0, message.to
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A member votes for one in a term (7).
    fn votes(&mut self, from: MemberNo, term: Term, to: MemberNo) -> Verdict {
        let first = *self.votes.entry((from, term)).or_insert(to);
        if first != to {
            return Err(format!("invariant 7: {from:?} votes for {first:?} and for {to:?} in {term:?}"));
        }
        Ok(())
    }

    /// A member is built: it has not forgotten a term that it spoke in (10).
    pub fn built(&mut self, me: MemberNo, group: &Group, tally: &mut Tally) -> Verdict {
        tally.check("a term does not go back (10)");
        let (Some(spoken), Some(view)) = (self.spoken.get(&me), group.view()) else { return Ok(()) };
        if view.term < *spoken {
            return Err(format!("invariant 10: {me:?} restarts in {:?}, it has spoken in {spoken:?}", view.term));
        }
        Ok(())
    }

    /// An entry is applied at a member: it is durable there (10), and the same everywhere (1, 6).
    pub fn applied(&mut self, entry: &Entry, under: Term, disk: &Disk, tally: &mut Tally) -> Verdict {
        tally.check("applied entries are the same everywhere (6)");
        if disk.has(entry.index) != Some(entry.term) && entry.index > disk.checkpoint.applied {
            return Err(format!("invariant 10: entry {} is applied and not persisted", entry.index.0));
        }
        self.known.entry(entry.index.0).or_insert(under);
        let (term, bytes) = self.history.entry(entry.index.0).or_insert_with(|| (entry.term, entry.bytes.clone()));
        if (*term, &*bytes) != (entry.term, &entry.bytes) {
            return Err(format!("invariant 6: entry {} is applied in two versions, of {term:?} and {:?}", entry.index.0, entry.term));
        }
        Ok(())
    }

    /// Whoever leads: alone in its term (7), with everything that was committed before its term (1). Who wins late, when another leads a later
    /// term already, does not have what that one committed.
    pub fn leads(&mut self, me: MemberNo, group: &Group, view: &GroupView, tally: &mut Tally) -> Verdict {
        if view.part != Part::Leader {
            return Ok(());
        }
        tally.check("a term has one leader (7)");
        match self.leaders.insert(view.term, me) {
            Some(before) if before == me => return Ok(()),
            Some(before) => return Err(format!("invariant 7: {before:?} and {me:?} both lead {:?}", view.term)),
            None => {}
        }
        tally.check("a new leader has everything committed (1)");
        let before = self.history.range(view.first.0..).filter(|(index, _)| self.known[index] < view.term);
        for (index, (term, bytes)) in before {
            let own = group.entries(Index(*index), 1);
            if own.first().is_none_or(|own| own.term != *term || own.bytes != *bytes) {
                return Err(format!("invariant 1: {me:?} leads {:?} without entry {index} of {term:?}, which was applied", view.term));
            }
        }
        Ok(())
    }

    /// A write is acknowledged as entry `index`.
    pub fn acknowledged(&mut self, operation: &Operation, index: Index, bytes: &[u8], tally: &mut Tally) -> Verdict {
        tally.check("acknowledged writes are in the history (1)");
        if index <= operation.floor {
            return Err(format!(
                "invariant 2: a write of block {} took effect at {} before it began, {} was seen",
                operation.block, index.0, operation.floor.0
            ));
        }
        self.acknowledged.push((index, bytes.to_vec()));
        let seen = self.seen.entry(operation.block).or_default();
        *seen = (*seen).max(index);
        Ok(())
    }

    /// A read is answered from a member's registers.
    pub fn read(&mut self, operation: &Operation, registers: &Registers, tally: &mut Tally) -> Verdict {
        tally.check("reads are linearizable (2)");
        let (_, index) = registers.get(&operation.block).copied().unwrap_or((0, Index(0)));
        if index < operation.floor {
            return Err(format!(
                "invariant 2: block {} is read as of entry {}, entry {} was seen before the read began",
                operation.block, index.0, operation.floor.0
            ));
        }
        let seen = self.seen.entry(operation.block).or_default();
        *seen = (*seen).max(index);
        Ok(())
    }

    /// At the end: nothing acknowledged is lost.
    pub fn end(&self, tally: &mut Tally) -> Verdict {
        for (index, bytes) in &self.acknowledged {
            tally.check("acknowledged writes survive to the end (1)");
            if self.history.get(&index.0).is_none_or(|(_, stands)| stands != bytes) {
                return Err(format!("invariant 1: the write acknowledged as entry {} is not in the history", index.0));
            }
        }
        Ok(())
    }
}
