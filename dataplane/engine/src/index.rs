//! Undrained blocks: for each, where in the log its newest version lies. Grouped by extent, since the drain moves extents.
//!
//! Groups queue in the order of the oldest version that they may hold; so the front of the queue tells how far the log is needed. The drain takes of
//! a group what is old enough, and the rest queues where its batch belongs, as does what a group of several replicas commits late.

use crate::map::LayerKey;
use crate::port::ReplicaNo;
use penstock_wire::{EXTENT_BLOCKS, Seq};
use rustc_hash::FxHashMap;
use std::collections::{BTreeSet, VecDeque};

const BLOCKS: usize = EXTENT_BLOCKS as usize;

/// An extent of a layer: what is written after a snapshot's marker meets nothing that was written before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct GroupKey {
    pub layer: LayerKey,
    pub extent: u32,
}

/// Newest undrained version of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    /// Block of the ring, and checksum.
    Log {
        at: u32,
        crc: u32,
    },
    Zero,
    Lost,
    /// As the layer beneath says: a copy of another member's layer may say so.
    Inherit,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    /// The batch that wrote it.
    pub seq: Seq,
    pub version: Version,
}

/// Aligned, so that what is looked at beside one slot lies in one line of the core's cache.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub struct Group {
    pub key: GroupKey,
    pub slots: [Option<Slot>; BLOCKS],
    /// Raft index of the newest entry in it.
    pub changed: u64,
    /// No version of it is of an older batch; there may be none of this one any more.
    pub first_seq: Seq,
    pub queued: bool,
    /// Holds a promise of an extent.
    pub promised: bool,
    /// The drain is moving it.
    pub draining: bool,
}

impl Group {
    /// Sets a block's newest version; returns the undrained one that was there.
    #[inline]
    pub fn put(&mut self, block: usize, slot: Slot) -> Option<Slot> {
        self.slots[block].replace(slot)
    }

    /// Batch of the oldest version.
    fn oldest(&self) -> Option<Seq> {
        self.slots.iter().flatten().map(|slot| slot.seq).min()
    }

    /// Blocks that the log holds data of.
    pub fn in_log(&self) -> i64 {
        self.slots.iter().filter(|slot| Slot::in_log(slot)).count() as i64
    }
}

impl Slot {
    /// A block that the log holds data of.
    #[inline]
    pub fn in_log(slot: &Option<Slot>) -> bool {
        matches!(slot, Some(Slot { version: Version::Log { .. }, .. }))
    }
}

/// A group's place in memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct GroupId(u32);

#[derive(Debug, Default)]
pub struct Index {
    by_key: FxHashMap<GroupKey, GroupId>,
    groups: Vec<Group>,
    free: Vec<GroupId>,
    /// Groups that queued in order: nearly all.
    queue: VecDeque<GroupId>,
    /// Those that came when later ones were in the queue.
    late: BTreeSet<(Seq, GroupId)>,
    /// The queue is not in order: see [`Self::any_order`].
    unordered: bool,
}

impl Index {
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    #[inline]
    pub fn find(&self, key: GroupKey) -> Option<GroupId> {
        self.by_key.get(&key).copied()
    }

    #[inline]
    pub fn group(&self, id: GroupId) -> &Group {
        &self.groups[id.0 as usize]
    }

    pub fn group_mut(&mut self, id: GroupId) -> &mut Group {
        &mut self.groups[id.0 as usize]
    }

    /// What batches after `seq` wrote reads as lost. Says of which replicas how many blocks of data are gone from the log.
    pub fn hide_after(&mut self, seq: Seq) -> Vec<(ReplicaNo, i64)> {
        let mut hidden = Vec::new();
        for at in self.by_key.values().map(|id| id.0 as usize) {
            let group = &mut self.groups[at];
            let before = group.in_log();
            for slot in group.slots.iter_mut().flatten().filter(|slot| slot.seq > seq) {
                slot.version = Version::Lost;
            }
            hidden.push((group.key.layer.replica, before - group.in_log()));
        }
        hidden
    }

    /// Newest undrained version of a volume's block.
    #[cfg(test)]
    pub fn lookup(&self, layer: LayerKey, block: u64) -> Option<Slot> {
        let key = GroupKey { layer, extent: (block / EXTENT_BLOCKS) as u32 };
        let id = self.find(key)?;
        self.groups[id.0 as usize].slots[(block % EXTENT_BLOCKS) as usize]
    }

    /// The group of an extent that batch `seq` writes to: made if there is none, and queued for the drain.
    #[inline]
    pub fn touch(&mut self, key: GroupKey, seq: Seq, changed: u64) -> GroupId {
        let id = match self.by_key.get(&key) {
            Some(id) => *id,
            None => self.insert(key),
        };
        let group = &mut self.groups[id.0 as usize];
        // A copy may be as of a later entry than one that is applied after it.
        group.changed = group.changed.max(changed);
        if !group.queued {
            group.queued = true;
            group.first_seq = seq;
            self.enqueue(id);
        } else if seq < group.first_seq {
            // Applied late, into a group that a later batch of another of its blocks had queued.
            self.dequeue(id);
            self.groups[id.0 as usize].first_seq = seq;
            self.enqueue(id);
        }
        id
    }

    /// Puts a group where its batch belongs: nearly always at the end.
    fn enqueue(&mut self, id: GroupId) {
        let seq = self.groups[id.0 as usize].first_seq;
        if self.unordered || self.queue.back().is_none_or(|last| self.groups[last.0 as usize].first_seq <= seq) {
            self.queue.push_back(id);
        } else {
            self.late.insert((seq, id));
        }
    }

    /// Takes a queued group out, wherever it stands.
    fn dequeue(&mut self, id: GroupId) {
        if !self.late.remove(&(self.groups[id.0 as usize].first_seq, id)) {
            self.queue.retain(|queued| *queued != id);
        }
    }

    /// Who is first, and whether that is of those that came late.
    fn front(&self) -> Option<(Seq, GroupId, bool)> {
        let queued = self.queue.front().map(|id| (self.groups[id.0 as usize].first_seq, *id, false));
        let late = self.late.first().map(|(seq, id)| (*seq, *id, true));
        match (queued, late) {
            (Some(queued), Some(late)) => Some(if late.0 < queued.0 { late } else { queued }),
            (queued, late) => queued.or(late),
        }
    }

    /// While a log is redone, groups come in any order; nobody asks for the oldest before [`Self::put_in_order`].
    pub fn any_order(&mut self) {
        self.unordered = true;
    }

    pub fn put_in_order(&mut self) {
        self.unordered = false;
        let groups = &self.groups;
        self.queue.make_contiguous().sort_by_key(|id| groups[id.0 as usize].first_seq);
    }

    /// Puts a newer version over whatever is there; returns the undrained one that was absorbed.
    pub fn put(&mut self, layer: LayerKey, block: u64, slot: Slot, changed: u64) -> (GroupId, Option<Slot>) {
        let id = self.touch(GroupKey { layer, extent: (block / EXTENT_BLOCKS) as u32 }, slot.seq, changed);
        (id, self.groups[id.0 as usize].put((block % EXTENT_BLOCKS) as usize, slot))
    }

    fn insert(&mut self, key: GroupKey) -> GroupId {
        let group = Group { key, slots: [None; BLOCKS], changed: 0, first_seq: Seq(0), queued: false, promised: false, draining: false };
        let id = match self.free.pop() {
            Some(id) => {
                self.groups[id.0 as usize] = group;
                id
            }
            None => {
                self.groups.push(group);
                GroupId(self.groups.len() as u32 - 1)
            }
        };
        self.by_key.insert(key, id);
        id
    }

    /// The group that holds the oldest version, for the drain.
    pub fn pop(&mut self) -> Option<GroupId> {
        let (_, id, is_late) = self.front()?;
        if is_late {
            self.late.pop_first();
        } else {
            self.queue.pop_front();
        }
        let group = &mut self.groups[id.0 as usize];
        group.queued = false;
        group.draining = true;
        Some(id)
    }

    /// Puts a group back that was popped, to where it was or where what it holds by now belongs.
    pub fn unpop(&mut self, id: GroupId) {
        let group = &mut self.groups[id.0 as usize];
        group.draining = false;
        let oldest = group.oldest().unwrap_or(group.first_seq);
        if group.queued && group.first_seq <= oldest {
            return;
        }
        if std::mem::replace(&mut group.queued, true) {
            // Written again meanwhile: the older place in the queue is the one that counts.
            self.dequeue(id);
        }
        self.groups[id.0 as usize].first_seq = oldest;
        self.enqueue(id);
    }

    /// The drain is done with a group: it goes when nothing is left in it.
    pub fn finish(&mut self, id: GroupId) {
        let group = &mut self.groups[id.0 as usize];
        if group.oldest().is_some() {
            self.unpop(id);
            return;
        }
        group.draining = false;
        let key = group.key;
        if std::mem::take(&mut group.queued) {
            // Written again meanwhile as it was: another entry of the same batch made the same blocks zeros.
            self.dequeue(id);
        }
        self.by_key.remove(&key);
        self.free.push(id);
    }

    /// First batch that some undrained block needs, among the queued groups.
    pub fn needed_from(&self) -> Option<Seq> {
        self.front().map(|(seq, ..)| seq)
    }

    pub fn queued(&self) -> usize {
        self.queue.len() + self.late.len()
    }

    /// All groups, for the audit.
    pub fn iter(&self) -> impl Iterator<Item = &Group> {
        self.by_key.values().map(|id| &self.groups[id.0 as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(replica: u32) -> LayerKey {
        LayerKey { replica: ReplicaNo(replica), layer: crate::port::LayerNo(0) }
    }

    fn log(seq: u64, at: u32) -> Slot {
        Slot { seq: Seq(seq), version: Version::Log { at, crc: at } }
    }

    #[test]
    fn group_zeroed_twice_in_one_batch_is_gone_once_it_is_drained() {
        let mut index = Index::default();
        let zero = Slot { seq: Seq(1), version: Version::Zero };
        index.put(layer(1), 3, zero, 1);
        let id = index.pop().expect("queued");
        // The next entry of the same batch is applied while the drain has the first.
        index.put(layer(1), 3, zero, 2);
        index.group_mut(id).slots[3] = None;
        index.finish(id);
        assert_eq!((index.len(), index.queued(), index.needed_from()), (0, 0, None));
    }

    #[test]
    fn newer_version_absorbs_and_the_queue_keeps_the_oldest_need() {
        let mut index = Index::default();
        let r = layer(1);
        assert_eq!(index.put(r, 5, log(1, 10), 1).1, None);
        assert_eq!(index.put(r, 40, log(2, 11), 2).1, None);
        assert_eq!(index.put(r, 5, log(3, 12), 3).1, Some(log(1, 10)));
        assert_eq!(index.lookup(r, 5), Some(log(3, 12)));
        assert_eq!(index.lookup(r, 6), None);
        assert_eq!(index.needed_from(), Some(Seq(1)));
        assert_eq!(index.len(), 2);
    }

    #[test]
    fn write_during_a_drain_queues_the_group_again_and_survives_it() {
        let mut index = Index::default();
        let r = layer(1);
        index.put(r, 5, log(1, 10), 1);
        let id = index.pop().unwrap();
        assert_eq!(index.needed_from(), None);
        index.put(r, 5, log(7, 12), 2);
        assert_eq!(index.needed_from(), Some(Seq(7)));
        index.finish(id);
        assert_eq!(index.lookup(r, 5), Some(log(7, 12)));
        let id = index.pop().unwrap();
        index.group_mut(id).slots[5] = None;
        index.finish(id);
        assert_eq!(index.len(), 0);
    }

    #[test]
    fn group_put_back_is_the_oldest_again() {
        let mut index = Index::default();
        let r = layer(1);
        index.put(r, 5, log(1, 10), 1);
        index.put(r, 99, log(2, 11), 1);
        let id = index.pop().unwrap();
        index.put(r, 6, log(9, 12), 2);
        index.unpop(id);
        assert_eq!(index.needed_from(), Some(Seq(1)));
        assert_eq!(index.queued(), 2);
    }

    #[test]
    fn group_drained_in_part_queues_where_what_is_left_belongs() {
        let mut index = Index::default();
        let r = layer(1);
        for (block, seq) in [(5, 1), (99, 2), (6, 4), (200, 3), (300, 5)] {
            index.put(r, block, log(seq, 10), 1);
        }
        let id = index.pop().expect("the group of blocks 5 and 6");
        index.group_mut(id).slots[5] = None;
        index.finish(id);
        assert_eq!((index.needed_from(), index.queued()), (Some(Seq(2)), 4));
        // Its oldest version is overwritten in the log: known when somebody looks.
        index.put(r, 99, log(6, 11), 1);
        assert_eq!(index.needed_from(), Some(Seq(2)));
        let id = index.pop().unwrap();
        index.unpop(id);
        let order: Vec<_> = std::iter::from_fn(|| index.pop().map(|id| index.group(id).first_seq.0)).collect();
        assert_eq!(order, [3, 4, 5, 6]);
    }

    #[test]
    fn version_applied_late_queues_where_its_batch_belongs() {
        let mut index = Index::default();
        index.put(layer(1), 5, log(7, 10), 1);
        index.put(layer(1), 99, log(9, 11), 2);
        index.put(layer(2), 5, log(8, 12), 1);
        index.put(layer(2), 99, log(3, 13), 2);
        assert_eq!(index.needed_from(), Some(Seq(3)));
        let order: Vec<_> = std::iter::from_fn(|| index.pop().map(|id| index.group(id).first_seq)).collect();
        assert_eq!(order, [Seq(3), Seq(7), Seq(8), Seq(9)]);
    }

    #[test]
    fn groups_redone_in_any_order_are_drained_in_theirs() {
        let mut index = Index::default();
        index.any_order();
        for (block, seq) in [(5, 9), (50, 4), (100, 6), (150, 4)] {
            index.put(layer(1), block, log(seq, 10), 1);
        }
        index.put_in_order();
        index.put(layer(1), 200, log(5, 10), 1);
        let order: Vec<_> = std::iter::from_fn(|| index.pop().map(|id| index.group(id).first_seq.0)).collect();
        assert_eq!(order, [4, 4, 5, 6, 9]);
    }

    #[test]
    fn hide_after_loses_what_later_batches_wrote_alone() {
        let mut index = Index::default();
        let slot = |seq, at| Slot { seq: Seq(seq), version: Version::Log { at, crc: 7 } };
        index.put(layer(0), 3, slot(4, 10), 1);
        index.put(layer(0), 4, slot(5, 11), 2);
        assert_eq!(index.hide_after(Seq(4)), [(ReplicaNo(0), 1)]);
        assert_eq!(index.lookup(layer(0), 3), Some(slot(4, 10)));
        assert_eq!(index.lookup(layer(0), 4), Some(Slot { seq: Seq(5), version: Version::Lost }));
    }
}
