//! What groups want persisted, on its way through the log: queued in order, put into batches beside what is not replicated, told to its group
//! once it is durable, and sealed where it has a ballot.
//!
//! A queue of small items and not of entries: where an entry and its payload lie is known to `Member::log` alone.

use crate::config::{BATCHES_OUT_MAX, Canary};
use crate::host::{Proposed, Source, What};
use crate::member::{Marked, Member, Payload};
use crate::port::*;
use crate::replica::{Ballot, LogEnd, Mark, Persist};
use crate::store::Store;
use crate::stream::{BATCH_BLOCKS_MAX, Load};
use penstock_wire::batch::{BALLOT_LEN, BELIEVED_LEN, COMMITTED_LEN, Kind, RESOLVED_LEN, SEEN_LEN, Section, logged_len};
use penstock_wire::peer::{MemberNo, OpeningId};
use penstock_wire::{Index, Seq, Term};

/// Blocks of entries that are applied before the log is told.
const COMMITTED_BLOCKS: u32 = 64;

/// What an item puts into the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Carries {
    Ballot(Ballot),
    Entry {
        index: Index,
        term: Term,
        /// Payload blocks, and bytes of the section.
        blocks: u32,
        bytes: u32,
    },
    /// The member is in doubt no more.
    Resolved,
    /// The store's own word on a rebuild: see [`crate::rebuild::Own`].
    Own {
        id: u32,
        blocks: u32,
        bytes: u32,
    },
    /// What is known of another member's openings.
    Seen(MemberNo),
    /// The store's opening is believed.
    Believed(OpeningId),
    /// The log is known to be committed so far.
    Committed(LogEnd),
    /// An entry that was replaced before it got anywhere.
    Nothing,
}

impl Carries {
    /// Somebody waits for it without whom nothing goes on, and it is small: it waits for no batch, and may use what hosts leave of the ring.
    fn is_urgent(&self) -> bool {
        matches!(self, Self::Ballot(_) | Self::Seen(_) | Self::Believed(_) | Self::Own { blocks: 0, .. })
    }
}

/// Something of a group's that waits for a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Item {
    pub replica: ReplicaNo,
    pub carries: Carries,
    /// The last of what this names, and whether that has a ballot.
    pub mark: Option<(Mark, bool)>,
}

impl Item {
    pub fn blocks(&self) -> u32 {
        match self.carries {
            Carries::Entry { blocks, .. } | Carries::Own { blocks, .. } => blocks,
            _ => 0,
        }
    }

    pub fn section_bytes(&self) -> usize {
        match self.carries {
            Carries::Ballot(_) => BALLOT_LEN,
            Carries::Entry { bytes, .. } | Carries::Own { bytes, .. } => bytes as usize,
            Carries::Resolved => RESOLVED_LEN,
            Carries::Seen(_) => SEEN_LEN,
            Carries::Believed(_) => BELIEVED_LEN,
            Carries::Committed(_) => COMMITTED_LEN,
            Carries::Nothing => 0,
        }
    }
}

/// An entry in a batch that is out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Carried {
    replica: ReplicaNo,
    index: Index,
    term: Term,
    blocks: u32,
    /// Held until the device has given the batch back.
    buf: Option<BufId>,
    /// Not an entry, but this.
    own: Option<u32>,
}

impl Store {
    /// Puts what a group wants persisted into its log and the queue.
    pub(crate) fn queue_persist<M: Memory>(&mut self, no: ReplicaNo, persist: Persist, mem: &mut M, fx: &mut Effects) {
        if let Some(ballot) = persist.ballot {
            self.member_mut(no).expect("a group that persists has its member").ballot = ballot;
            self.groups.queue.push_back(Item { replica: no, carries: Carries::Ballot(ballot), mark: None });
        }
        let sealed = persist.ballot.is_some() || persist.install.is_some();
        if let Some(install) = persist.install {
            self.begin_rebuild(no, install, mem, fx);
        }
        if !persist.entries.is_empty() {
            self.queue_committed(no);
        }
        for entry in persist.entries {
            let bytes = logged_len(&entry) as u32;
            let carries = Carries::Entry { index: entry.index, term: entry.term, blocks: entry.payload_blocks, bytes };
            self.log_entry(no, entry, mem, fx);
            self.groups.queue.push_back(Item { replica: no, carries, mark: None });
        }
        let last = self.groups.queue.back_mut().expect("what is to be persisted is not empty");
        last.mark = Some((persist.mark, sealed));
    }

    /// With entries and not for itself, so that a restart knows but for some blocks what is committed. A member that comes back with a long log and knows nothing
    /// of it can trim none of it before it has all that the next leader has, for which its log may have no room.
    fn queue_committed(&mut self, no: ReplicaNo) {
        let Some(index) = self.map.get(no).map(|replica| replica.applied) else { return };
        let Some(member) = self.member_mut(no).filter(|member| member.untold_blocks >= COMMITTED_BLOCKS) else { return };
        member.untold_blocks = 0;
        let end = LogEnd { index, term: member.applied_term };
        self.groups.queue.push_back(Item { replica: no, carries: Carries::Committed(end), mark: None });
    }

    /// The log is as far again as it may have been, or nothing of it is lost: the next life need not ask. Until it is durable that one may.
    pub(crate) fn queue_resolved(&mut self, no: ReplicaNo) {
        self.member_mut(no).expect("a group that was in doubt has its member").doubts = None;
        self.groups.queue.push_back(Item { replica: no, carries: Carries::Resolved, mark: None });
    }

    /// Items of entries that are replaced carry nothing any more; what they tell is still told in its turn.
    pub(crate) fn void_items(&mut self, no: ReplicaNo, from: Index) {
        for item in &mut self.groups.queue {
            if item.replica == no && matches!(item.carries, Carries::Entry { index, .. } if index >= from) {
                item.carries = Carries::Nothing;
            }
        }
    }

    /// Items at the front that carry nothing need no batch.
    pub(crate) fn pass_void_items(&mut self) {
        while let Some(item) = self.groups.queue.front().copied().filter(|item| item.carries == Carries::Nothing) {
            self.groups.queue.pop_front();
            self.mark(item, self.stream.last_sent());
        }
    }

    fn mark(&mut self, item: Item, seq: Seq) {
        let Some((mark, ballot)) = item.mark else { return };
        let Some(member) = self.member_mut(item.replica) else { return };
        member.marks.push_back(Marked { mark, seq, ballot });
        if !std::mem::replace(&mut member.marked, true) {
            self.groups.marked.push(item.replica);
        }
    }

    /// Whether something in the queue is not to wait until batches come back.
    pub(crate) fn queue_is_urgent(&self, blocks: u32) -> bool {
        let mut left = blocks;
        self.groups.queue.iter().any(|item| {
            left = left.saturating_sub(item.blocks());
            left == 0 || item.carries.is_urgent()
        })
    }

    /// How far a batch of groups' items alone may fill the ring: entries were admitted under the hosts' limit, what is small and lets a group
    /// commit and the log be trimmed may go beyond it, and what is urgent anywhere.
    pub(crate) fn items_limit(&self, items: usize) -> u64 {
        let urgent = self.groups.queue.iter().take(items).any(|item| item.carries.is_urgent());
        if urgent { self.stream.ring_blocks() } else { self.stream.ring_blocks() - BATCH_BLOCKS_MAX - 64 }
    }

    /// Descriptors of the first `items` of the queue.
    pub(crate) fn describe_items(&self, items: usize, section: &mut Section) {
        for item in self.groups.queue.iter().take(items) {
            match item.carries {
                Carries::Ballot(ballot) => {
                    section.entry(item.replica.0, Term(0), Index(0));
                    section.ballot(ballot.term, ballot.vote);
                }
                Carries::Entry { index, term, .. } => {
                    let logged = self.member(item.replica).and_then(|member| member.holds(index, term));
                    section.logged(item.replica.0, &logged.expect("what is in the queue is in the log").entry);
                }
                Carries::Resolved => {
                    section.entry(item.replica.0, Term(0), Index(0));
                    section.resolved();
                }
                Carries::Seen(of) => {
                    // Nothing where that member was removed meanwhile.
                    if let Some(known) = self.member(item.replica).and_then(|member| member.known.iter().find(|known| known.seen.no == of))
                    {
                        section.entry(item.replica.0, Term(0), Index(0));
                        section.seen(&known.seen);
                    }
                }
                Carries::Believed(id) => {
                    section.entry(item.replica.0, Term(0), Index(0));
                    section.believed(id);
                }
                Carries::Committed(end) => {
                    section.entry(item.replica.0, Term(0), Index(0));
                    section.committed(end.index, end.term);
                }
                Carries::Own { id, .. } => self.describe_own(item.replica, id, section),
                Carries::Nothing => {}
            }
        }
    }

    /// Memory of the first `items` of the queue.
    pub(crate) fn parts_of_items(&self, items: usize, parts: &mut Vec<Part>) {
        for item in self.groups.queue.iter().take(items) {
            if let Carries::Own { id, .. } = item.carries {
                parts.extend(self.part_of_own(id));
            } else if let Carries::Entry { index, term, blocks, .. } = item.carries
                && blocks > 0
            {
                let member = self.member(item.replica).expect("what is in the queue has its member");
                let known = parts_of_entry(member, index, term, parts);
                assert!(known, "an entry goes to the drive from memory");
            }
        }
    }

    /// The first `items` of the queue are in batch `seq`.
    pub(crate) fn carry_items(&mut self, items: usize, seq: Seq, carried: &mut Vec<Carried>) {
        for _ in 0..items {
            let item = self.groups.queue.pop_front().expect("counted");
            if let Carries::Entry { index, term, blocks, .. } = item.carries {
                let logged =
                    self.member_mut(item.replica).and_then(|member| member.get_mut(index)).expect("what is in the queue is in the log");
                logged.seq = Some(seq);
                let buf = match logged.payload {
                    Payload::Staged { buf, .. } => Some(buf),
                    _ => None,
                };
                if let Some(buf) = buf {
                    self.groups.hold(buf);
                }
                carried.push(Carried { replica: item.replica, index, term, blocks, buf, own: None });
            } else if let Carries::Own { id, blocks, .. } = item.carries {
                self.carry_own(item.replica, id);
                let (index, term) = (Index(0), Term(0));
                carried.push(Carried { replica: item.replica, index, term, blocks, buf: None, own: Some(id) });
            }
            if let Carries::Seen(of) = item.carries
                && let Some(member) = self.member_mut(item.replica)
                && let Some(known) = member.known.iter_mut().find(|known| known.seen.no == of)
            {
                known.batch = Some(seq);
            }
            if let Carries::Believed(_) = item.carries
                && let Some(member) = self.member_mut(item.replica)
            {
                member.admission.claimed_in(seq);
            }
            self.mark(item, seq);
        }
    }

    /// Batch `seq` counts: from here on its entries' payload is in the ring, from block `at` on.
    pub(crate) fn carried_persisted<M: Memory>(
        &mut self,
        carried: &mut Vec<Carried>,
        seq: Seq,
        mut at: u32,
        mem: &mut M,
        fx: &mut Effects,
    ) {
        for Carried { replica, index, term, blocks, buf, own } in carried.drain(..) {
            if let Some(id) = own {
                self.own_persisted(replica, id, seq, at, fx);
            }
            if let Some(member) = self.member_mut(replica)
                && let Some(logged) = member.get_mut(index).filter(|logged| logged.entry.term == term && logged.seq == Some(seq))
            {
                if blocks > 0 {
                    let was = std::mem::replace(&mut logged.payload, Payload::Ring { at });
                    if let Payload::Staged { buf, .. } = was {
                        self.groups.release(buf);
                    }
                }
                self.lost_persisted(replica, index, term, mem, fx);
            }
            if let Some(buf) = buf {
                self.groups.release(buf);
            }
            at += blocks;
        }
    }

    /// The device has given the batch back and it never counts.
    pub(crate) fn carried_failed(&mut self, carried: &mut Vec<Carried>) {
        for carried in carried.drain(..) {
            if let Some(buf) = carried.buf {
                self.groups.release(buf);
            }
            if let Some(id) = carried.own {
                self.drop_own(id);
            }
        }
    }

    /// Whose entries were replaced while they were out is answered when their batch is back: those of the batches that `back` names.
    pub(crate) fn answer_orphans<M: Memory>(&mut self, back: impl Fn(Seq) -> bool, mem: &mut M, fx: &mut Effects) {
        let mut at = 0;
        while at < self.groups.orphans.len() {
            if back(self.groups.orphans[at].0) {
                let (_, ops) = self.groups.orphans.remove(at);
                self.fail_ops(ops, Status::NotReady, mem, fx);
            } else {
                at += 1;
            }
        }
    }

    /// Tells groups what of theirs is durable.
    pub(crate) fn tell_marks(&mut self) {
        if self.groups.marked.is_empty() {
            return;
        }
        let (persisted, sealed) = (self.stream.persisted(), self.stream.sealed_to());
        let skip = self.canary(Canary::SkipSeal);
        for no in std::mem::take(&mut self.groups.marked) {
            let Some(member) = self.member_mut(no) else { continue };
            let mut told = None;
            while let Some(front) =
                member.marks.front().filter(|front| front.seq <= persisted && (!front.ballot || front.seq <= sealed || skip))
            {
                told = Some(front.mark);
                member.marks.pop_front();
            }
            if let Some((group, mark)) = member.group_mut().zip(told) {
                group.on_persisted(mark);
            }
            member.marked = !member.marks.is_empty();
            if member.marked {
                self.groups.marked.push(no);
            }
            if told.is_some() {
                self.touch(no);
            }
        }
    }

    /// A ballot, or what is recorded of openings, counts when a later record says that it is durable: writes that record, unless one that says so
    /// is out.
    pub(crate) fn seal_awaited<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        let (persisted, said) = (self.stream.persisted(), self.stream.durable_said());
        let waits = |seq: Seq| seq <= persisted && seq > said;
        let ballot = |no: &ReplicaNo| self.member(*no)?.marks.front().filter(|front| front.ballot).map(|front| front.seq);
        let awaited = self.groups.marked.iter().filter_map(ballot).chain(self.seals_awaited()).any(waits);
        if self.stream.out_count() < BATCHES_OUT_MAX as usize && awaited {
            self.stream.clear_section();
            self.write_batch(Load::bare(Kind::Seal), mem, fx);
        }
    }
}

/// Where an entry's payload lies in memory; false where it does not, or is not known.
pub(crate) fn parts_of_entry(member: &Member, index: Index, term: Term, parts: &mut Vec<Part>) -> bool {
    let Some(logged) = member.holds(index, term) else { return false };
    match logged.payload {
        Payload::None => true,
        Payload::Ring { .. } => false,
        Payload::Staged { buf, first } => {
            parts.push(Part::Buf { buf, first, blocks: logged.entry.payload_blocks });
            true
        }
        Payload::Host => {
            let proposal = member.proposal(index, term).expect("an entry of a host's is held as its proposal");
            parts.extend(proposal.ops.iter().filter_map(part_of_op));
            true
        }
    }
}

/// The memory of a write.
pub(crate) fn part_of_op(op: &Proposed) -> Option<Part> {
    let blocks = op.blocks as u32;
    match op.what {
        What::Write { source: Source::Host { offset } } => {
            Some(Part::Host { io: op.io.expect("a host payload has its command"), offset, blocks })
        }
        What::Write { source: Source::Buf { buf } } => Some(Part::Buf { buf, first: 0, blocks }),
        _ => None,
    }
}
