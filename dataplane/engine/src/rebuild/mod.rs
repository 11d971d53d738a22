//! Rebuilding a member that needs more than the group's log has: its log begins anew at an index S of the leader's, and its content is brought up
//! beside it, extent by extent.
//!
//! ```text
//! install: S counts as applied, the log begins after it     ask for a range → take what differs through the own log → ... → whole
//! the content is whole as of an older entry                 meanwhile it votes, counts, takes and applies entries, and serves nothing
//! ```
//!
//! It asks who leads, and where that one cannot give, whoever else is whole. An extent is copied as of what its source had applied, A. What keeps
//! copies and entries from harming each other:
//!
//! - A copy goes through this store's own log, as a record of its own, and sets no block that an entry after A in the member's log writes
//!   ([`Store::mask_of`]). So it does not matter in which order the two take effect, live or when the log is redone. Where such an entry is
//!   replaced before it is committed, its extent is copied again.
//! - Entries up to A that are applied after the copy turn blocks back for a while; the last of them that wrote a block brings what the copy had. So the
//!   content is whole once every extent was answered and everything up to the highest A is applied.
//! - What changed an extent last says what is in it only where nothing came after the entry that all content is whole as of. Beyond that the member
//!   asks for whatever there is: entries from S on agree in both places over content that does not.
//!
//! After a restart it begins at the first extent again; what agrees costs nothing.
//!
//! **Layers.** An install brings the volume's layers. Those frozen by what the content is whole as of are whole; the others are copied one after the
//! other, lowest first: each says what changed over those beneath, and removed layers count to the one above them, at both ends. Zeros are said
//! over what is there, so while a layer beneath is not whole they may be said too little: a layer's copies are as of an entry that was applied here
//! when all beneath it were whole, or later. A layer that begins meanwhile is walked in its turn. No layer is merged that copies may still go to; into one
//! that they go to, others are. So no copy is of before the last removal that is applied here, and none says anew that a block is as the layer
//! beneath says: that may be merged before the copy takes effect. But where the block is lost or wrong here it has to, and no merge begins before it is drained. Where answers are of after a removal that is applied here later, the layer is walked
//! once more: zeros over what lay beneath may have been forgotten with it.
//!
//! Files: `source` (the giving side), `member` (the asking), here what both the log and the asking know. Not here: raft's part
//! ([`crate::replica`]), and what recovery finds of it (`rejoin`).

mod member;
mod source;

pub(crate) use member::{Rebuild, is_sound};
pub(crate) use source::Source;

use crate::carry::{Carries, Item};
use crate::config::Canary;
use crate::index::{GroupKey, Slot, Version};
use crate::map::LayerKey;
use crate::member::Member;
use crate::port::*;
use crate::reserve::Guard;
use crate::store::Store;
use penstock_wire::batch::{CopyOp, Op, Section, StackOp, WHOLE_LEN, copy_len, forced_len, install_len, layers_len};
use penstock_wire::layer::KeptRow;
use penstock_wire::page::BlockState;
use penstock_wire::peer::{Install, Members};
use penstock_wire::reservation::Reservations;
use penstock_wire::{EXTENT_BLOCKS, Index, Seq, Term};

/// Layers that one record carries: with the longest names they take most of a section.
const LAYERS_CARRIED: usize = 24;

/// The store's own word on a member, on its way through the log.
#[derive(Debug)]
pub(crate) enum Own {
    Install {
        as_of: Index,
        index: Index,
        index_term: Term,
        members: Members,
        reservations: Option<Box<Reservations>>,
        stack: Option<StackOp>,
    },
    /// Some of the layers of the install that follows.
    Layers(Vec<KeptRow>),
    Whole {
        blocks: u64,
    },
    Copy(Copy),
    /// It goes on without the others: see `force`.
    Forced {
        term: Term,
        members: Members,
    },
}

/// An extent that came from another member.
#[derive(Debug)]
pub(crate) struct Copy {
    pub op: CopyOp,
    /// What its source had applied.
    pub applied: Index,
    pub buf: Option<BufId>,
    pub promises: u32,
    pub why: Why,
}

impl Copy {
    /// Whether blocks that are otherwise here become as the layer beneath says.
    fn inherits(&self) -> bool {
        self.op.blocks().any(|(_, state, _)| state == BlockState::Inherit)
    }
}

/// What an extent is copied for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Why {
    Rebuild,
    /// A block was bad, and is put back.
    Repair,
    /// It was otherwise than others have it: see `compare`.
    Mend,
}

impl Store {
    pub(crate) fn queue_own(&mut self, no: ReplicaNo, own: Own) {
        let (blocks, bytes) = match &own {
            Own::Install { members, reservations, stack, .. } => (0, install_len(members, reservations.as_deref(), stack.is_some())),
            Own::Layers(rows) => (0, layers_len(rows)),
            Own::Whole { .. } => (0, WHOLE_LEN),
            Own::Forced { members, .. } => (0, forced_len(members)),
            Own::Copy(copy) => (copy.op.crcs.len() as u32, copy_len(copy.op.crcs.len() as u32)),
        };
        let id = self.groups.next_own;
        self.groups.next_own = id.wrapping_add(1);
        self.groups.own.insert(id, own);
        self.groups.queue.push_back(Item { replica: no, carries: Carries::Own { id, blocks, bytes: bytes as u32 }, mark: None });
    }

    /// Raft begins anew after an entry: so does the member, with content that is whole as of what it had applied before.
    pub(crate) fn begin_rebuild<M: Memory>(&mut self, no: ReplicaNo, install: Install, mem: &mut M, fx: &mut Effects) {
        let first = self.member(no).map_or(Index(1), |member| Index(member.start.0 + 1));
        self.void_items(no, first);
        self.truncate(no, first, mem, fx);
        let replica = self.map.get_mut(no).expect("a group that persists has its member");
        let member = replica.member.as_deref_mut().expect("a group that persists has its member");
        let Install { index, index_term, members, reservations, stack, .. } = install;
        member.markers.clear();
        replica.guard = Guard::of(reservations.clone());
        let before = member.rebuild.take();
        let applied = replica.applied;
        let as_of = before.as_ref().map_or(applied, |rebuild| rebuild.as_of);
        (member.start, member.start_term) = (index, index_term);
        (replica.applied, member.applied_term, replica.proposed) = (index, index_term, index);
        member.members = members.clone();
        let mut rebuild = Rebuild::new(as_of, index, index, member.has_content());
        rebuild.out = before.map_or(0, |before| before.out);
        member.rebuild = Some(Box::new(rebuild));
        if let Some(group) = member.group_mut() {
            group.set_rebuilding(true);
        }
        if !self.groups.rebuilding.contains(&no) {
            self.groups.rebuilding.push(no);
        }
        self.drain.unsaved = true;
        self.counters.rebuilds += 1;
        let stack = stack.map(|stack| {
            self.map.restack(no, &stack, applied, self.stream.persisted());
            self.count_merges();
            for rows in stack.kept.chunks(LAYERS_CARRIED) {
                self.queue_own(no, Own::Layers(rows.to_vec()));
            }
            StackOp { live: stack.live, since: stack.since, kept: stack.kept.len() as u32, applied }
        });
        self.queue_own(no, Own::Install { as_of, index, index_term, members, reservations, stack });
    }

    /// What a leader gives a member that its log does not reach: what is applied here.
    pub(crate) fn offer_install(&mut self, no: ReplicaNo) {
        let reservations = self.reservations(no);
        let Some(replica) = self.map.get_mut(no) else { return };
        let (index, stack) = (replica.applied, replica.stack().map(Box::new));
        let gives = |member: &&mut Member| member.has_content() && member.rebuild.is_none() && index.0 > 0;
        let Some(member) = replica.member.as_deref_mut().filter(gives) else { return };
        let (index_term, members) = (member.applied_term, member.members.clone());
        let install = Install { index, index_term, digest: [0; 16], members, reservations, stack };
        if let Some(group) = member.group_mut() {
            group.offer_install(install);
        }
    }

    /// Blocks of an extent that a copy as of `applied` may set: those that no entry after it writes, as far as the log of this member goes. The
    /// second is the last such entry that is not applied.
    fn mask_of(&self, no: ReplicaNo, layer: LayerNo, extent: u32, applied: Index) -> (u16, Option<Index>) {
        if self.canary(Canary::CopyOverNewer) {
            return (u16::MAX, None);
        }
        let Some(replica) = self.map.get(no) else { return (0, None) };
        let Some(member) = replica.member.as_deref().filter(|member| member.start <= applied) else { return (0, None) };
        // What comes after the layer's marker changes another.
        let end = replica.end_of(layer).or(member.markers.first().copied()).unwrap_or(Index(u64::MAX));
        let (mut mask, mut last) = (u16::MAX, None);
        let first = u64::from(extent) * EXTENT_BLOCKS;
        let newer = member.log.iter().skip((applied.0 - member.start.0) as usize);
        for logged in newer.take_while(|logged| logged.entry.index <= end) {
            let before = mask;
            for op in logged.entry.ops().unwrap_or_default() {
                let (from, end) = match &op {
                    Op::Write { block, crcs } => (*block, block + crcs.len() as u64),
                    Op::Zero { block, count } => (*block, block + u64::from(*count)),
                    Op::Resize { blocks } => (*blocks, u64::MAX),
                    _ => continue,
                };
                for at in 0..EXTENT_BLOCKS {
                    if (from..end).contains(&(first + at)) {
                        mask &= !(1 << at);
                    }
                }
            }
            if mask != before && logged.entry.index > replica.applied {
                last = Some(logged.entry.index);
            }
        }
        (mask, last)
    }

    /// What a copy says in the log: as things stand, which is as they will stand behind it.
    fn record_of(&self, no: ReplicaNo, copy: &Copy) -> (CopyOp, Option<Index>) {
        let (free, last) = self.mask_of(no, LayerNo(copy.op.layer), copy.op.extent, copy.applied);
        // Where some of it is newer, it is none of any one entry. What is put back changes nothing, and what is mended is found again where that entry never comes.
        let changed = if copy.why != Why::Rebuild || free == u16::MAX { copy.op.changed } else { copy.op.changed.max(copy.applied.0) };
        (CopyOp { mask: copy.op.mask & free, changed, ..copy.op.clone() }, last)
    }

    pub(crate) fn describe_own(&self, no: ReplicaNo, id: u32, section: &mut Section) {
        section.entry(no.0, Term(0), Index(0));
        match &self.groups.own[&id] {
            Own::Install { as_of, index, index_term, members, reservations, stack } => {
                section.install(*as_of, *index, *index_term, members);
                reservations.iter().for_each(|state| section.reserve(state));
                stack.iter().for_each(|stack| section.stack(stack));
            }
            Own::Layers(rows) => rows.iter().for_each(|row| section.layer(row)),
            Own::Whole { blocks } => section.whole(*blocks),
            Own::Forced { term, members } => section.forced(*term, members),
            Own::Copy(copy) => section.copy(&self.record_of(no, copy).0),
        }
    }

    pub(crate) fn part_of_own(&self, id: u32) -> Option<Part> {
        match &self.groups.own[&id] {
            Own::Copy(Copy { op, buf: Some(buf), .. }) => Some(Part::Buf { buf: *buf, first: 0, blocks: op.crcs.len() as u32 }),
            _ => None,
        }
    }

    /// It is in a batch: what it sets is settled.
    pub(crate) fn carry_own(&mut self, no: ReplicaNo, id: u32) {
        let Some(Own::Copy(copy)) = self.groups.own.get(&id) else { return };
        let (extent, applied, why) = (copy.op.extent, copy.applied, copy.why);
        let (record, last) = self.record_of(no, copy);
        if let Some(Own::Copy(copy)) = self.groups.own.get_mut(&id) {
            copy.op = record;
        }
        let Some(member) = self.member_mut(no) else { return };
        let trimmed = member.start > applied;
        if let Some(rebuild) = member.rebuild.as_mut().filter(|_| why == Why::Rebuild) {
            if trimmed {
                rebuild.again.insert(extent);
            } else if let Some(last) = last {
                rebuild.covered.push((extent, last));
            }
        }
    }

    /// Its batch counts. `at`: ring block of its payload.
    pub(crate) fn own_persisted(&mut self, no: ReplicaNo, id: u32, seq: Seq, at: u32, fx: &mut Effects) {
        self.drain.unsaved = true;
        match self.groups.own.remove(&id) {
            Some(Own::Copy(copy)) => self.copy_persisted(no, copy, seq, at),
            Some(Own::Whole { blocks }) => self.whole_persisted(no, blocks, fx),
            Some(Own::Forced { .. }) => self.forced_in(no, seq),
            Some(Own::Install { .. } | Own::Layers(_)) | None => {}
        }
    }

    fn copy_persisted(&mut self, no: ReplicaNo, copy: Copy, seq: Seq, at: u32) {
        if let Some(buf) = copy.buf {
            self.groups.release(buf);
        }
        let mut promises = copy.promises;
        // What is put into a layer that is being merged could come behind that.
        let key = key_of(no, &copy.op);
        let merges = copy.why != Why::Rebuild && self.map.is_loose(key.layer);
        if self.map.live(no).is_some() && !merges {
            self.apply_copy(no, &copy.op, seq, at);
            let takes = promises > 0 && !self.has_place(key);
            if let Some(id) = self.index.find(key).filter(|id| takes && !self.index.group(*id).promised) {
                self.index.group_mut(id).promised = true;
                promises -= 1;
            }
            let counted = match copy.why {
                Why::Rebuild => &mut self.counters.copies_taken,
                Why::Repair => &mut self.counters.repaired_blocks,
                Why::Mend => &mut self.counters.mended_extents,
            };
            *counted += 1;
            if copy.inherits() {
                self.map.settle_removed(no, seq);
            }
        }
        self.give_up_promises(promises);
        if let Some(rebuild) = self.member_mut(no).and_then(|member| member.rebuild.as_mut()).filter(|_| copy.why == Why::Rebuild) {
            rebuild.out -= 1;
        }
    }

    /// Sets the blocks of a copy that count.
    pub(crate) fn apply_copy(&mut self, no: ReplicaNo, op: &CopyOp, seq: Seq, at: u32) {
        let layer = key_of(no, op).layer;
        if self.map.layer(layer).is_none() {
            return;
        }
        for (block, state, of) in op.blocks() {
            let version = match state {
                BlockState::Data => Version::Log { at: at + of as u32, crc: op.crcs[of] },
                BlockState::Lost => Version::Lost,
                BlockState::Zero => Version::Zero,
                BlockState::Inherit => Version::Inherit,
            };
            self.put_slot(layer, block, Slot { seq, version }, op.changed);
        }
    }

    /// Recovery: a record of a rebuild takes effect once more.
    pub(crate) fn redo_own(&mut self, no: ReplicaNo, op: &Op, seq: Seq, at: u32) {
        match op {
            Op::Copy(copy) => {
                self.apply_copy(no, copy, seq, at);
                let over = copy.layer > 0 || self.map.beneath(key_of(no, copy).layer).is_some();
                let takes = |(_, state, _)| state == BlockState::Data || over;
                if copy.blocks().any(takes)
                    && let Some(id) = self.index.find(key_of(no, copy))
                    && !std::mem::replace(&mut self.index.group_mut(id).promised, true)
                {
                    self.space.promise_again();
                }
            }
            Op::Whole { blocks } => {
                if let Some(replica) = self.map.get_mut(no) {
                    (replica.shape.blocks, replica.limit_blocks) = (*blocks, *blocks);
                }
            }
            _ => unreachable!("of a rebuild copies and its end alone are kept"),
        }
    }

    fn whole_persisted(&mut self, no: ReplicaNo, blocks: u64, fx: &mut Effects) {
        let persisted = self.stream.persisted();
        let Some(replica) = self.map.get_mut(no) else { return };
        let resized = replica.shape.blocks != blocks;
        let Some(member) = replica.member.as_deref_mut() else { return };
        // A second install may have come behind it.
        if member.rebuild.take_if(|rebuild| rebuild.whole).is_none() {
            return;
        }
        if let Some(group) = member.group_mut() {
            group.set_rebuilding(false);
        }
        (replica.shape.blocks, replica.limit_blocks) = (blocks, blocks);
        if resized {
            fx.list.push(Effect::Notice(Notice::Replica { replica: no, shape: Box::new(replica.shape.clone()), gone: false }));
        }
        self.groups.rebuilding.retain(|listed| *listed != no);
        self.map.settle_removed(no, persisted);
        self.count_merges();
        self.touch(no);
    }

    /// It never got into the log, or its batch never counts.
    pub(crate) fn drop_own(&mut self, id: u32) {
        if let Some(Own::Copy(copy)) = self.groups.own.remove(&id) {
            self.give_up_promises(copy.promises);
            if let Some(buf) = copy.buf {
                self.groups.release(buf);
            }
        }
    }

    /// The member says nothing any more: what waits for a batch is dropped.
    pub(crate) fn stop_rebuild(&mut self, no: ReplicaNo) {
        let mut dropped = Vec::new();
        for item in self.groups.queue.iter_mut().filter(|item| item.replica == no) {
            if let Carries::Own { id, .. } = item.carries {
                item.carries = Carries::Nothing;
                dropped.push(id);
            }
        }
        for id in dropped {
            self.drop_own(id);
        }
        self.groups.rebuilding.retain(|listed| *listed != no);
        self.feed_no_more(no);
    }

    /// Entries of a member from `from` on are gone: what a copy left to them is to be copied again.
    pub(crate) fn uncover(&mut self, no: ReplicaNo, from: Index) {
        let Some(rebuild) = self.member_mut(no).and_then(|member| member.rebuild.as_mut()) else { return };
        let again = &mut rebuild.again;
        rebuild.covered.retain(|(extent, last)| {
            if *last >= from {
                again.insert(*extent);
            }
            *last < from
        });
    }

    /// A log that begins anew, or a membership by force, is not durable yet: no checkpoint begins that would know of it before the log does.
    pub(crate) fn is_installing(&self) -> bool {
        self.groups.own.values().any(|own| matches!(own, Own::Install { .. } | Own::Layers(_) | Own::Forced { .. }))
    }

    /// Whether a copy is on its way that leaves blocks to the layer beneath: a merge in front of it would take what is wrong there for what covers that.
    pub(crate) fn copies_inherit(&self) -> bool {
        self.groups.own.values().any(|own| matches!(own, Own::Copy(copy) if copy.inherits()))
    }

    /// Extents that copies on their way count on, and promises that they hold.
    pub(crate) fn copies_touch(&self, key: GroupKey) -> bool {
        let of = |item: &Own| matches!(item, Own::Copy(copy) if copy.op.extent == key.extent && copy.op.layer == key.layer.layer.0);
        self.member(key.layer.replica).is_some() && self.groups.own.values().any(of)
    }

    pub(crate) fn copy_promises(&self) -> u64 {
        self.groups.own.values().map(|own| if let Own::Copy(copy) = own { u64::from(copy.promises) } else { 0 }).sum()
    }
}

fn key_of(no: ReplicaNo, op: &CopyOp) -> GroupKey {
    GroupKey { layer: LayerKey { replica: no, layer: LayerNo(op.layer) }, extent: op.extent }
}

impl Member {
    /// As of which entry its content is whole, where that is not what is applied.
    pub fn rebuilt_from(&self) -> Option<Index> {
        self.rebuild.as_ref().map(|rebuild| rebuild.as_of)
    }
}
