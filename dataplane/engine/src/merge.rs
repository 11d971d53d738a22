//! Merging: what a removed snapshot's layer holds goes to the layer above it where that one inherits, and the rest is given back.
//!
//! A page of the layer at a time, in the drain's turn, so that the map stands still under it and nothing of the layer is undrained. An extent
//! that the layer above does not have moves as it is. Where both have one, the smaller part is copied into the other's extent, to places that
//! nobody reads there: what the layer above inherits, or what it covers. So a crash at any point leaves the durable map's blocks as they were,
//! but for covered ones of a layer that is removed. What is freed is taken again only after a checkpoint: until then the durable map reads it.
//!
//! Not here: clearing zeros from pages that lie over nothing any more and that the merged layer did not have. They cost a page, and no more.

use crate::alloc::ExtentNo;
use crate::config::{Canary, FenceReason};
use crate::drain::DrainStage;
use crate::index::GroupKey;
use crate::map::{Frozen, Known, LayerKey, PageKey, Replica};
use crate::member::Member;
use crate::port::*;
use crate::store::{Owner, PageWaiter, Store};
use penstock_wire::page::{BlockState, EXTENTS_PER_PAGE, ExtentEntry, UNALLOCATED};
use penstock_wire::{BLOCK, EXTENT_BLOCKS, Seq};

const BLOCKS: usize = EXTENT_BLOCKS as usize;
/// Layers and pages without reads and writes that one turn gets through.
const STEPS_MAX: usize = 16;
/// Pages that merging one page makes dirty: the layer's own, and that of the one above.
pub(crate) const DIRTIES: usize = 2;

/// Blocks of one extent on their way into another.
#[derive(Debug)]
struct Join {
    extent: u32,
    from: u32,
    to: u32,
    /// Blocks to copy, and those of them that turned out bad, one bit each.
    mask: u16,
    bad: u16,
    buf: BufId,
    out: u32,
    failed: bool,
    again: bool,
    writing: bool,
}

/// A page that is being merged.
#[derive(Debug)]
pub(crate) struct Merge {
    page: PageKey,
    above: LayerKey,
    joins: Vec<Join>,
    left: u32,
}

/// Blocks of an entry in a state, one bit each.
fn blocks_in(entry: &ExtentEntry, state: BlockState) -> u16 {
    (0..BLOCKS).filter(|at| entry.state(*at) == state).fold(0, |mask, at| mask | 1 << at)
}

/// Runs of set bits, as first and count.
fn runs(mask: u16, whole: bool) -> impl Iterator<Item = (u32, u32)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        at += (u32::from(mask) >> at).trailing_zeros().min(32 - at);
        let count = if whole { (u32::from(mask) >> at.min(31)).trailing_ones() } else { 1 };
        let run = (at < BLOCKS as u32).then_some((at, count));
        at += count;
        run
    })
}

impl Store {
    /// A layer that is to be merged, once the log is drained up to there. Not while copies of other members' layers may still go to it or a clone stands on it, nor
    /// what entries bring that the log had when the store was opened: the index does not know of those, and extents may hold them already. Nor into one that is to be
    /// merged itself: what is covered there may be overwritten by a merge that a crash has undone. One that a clone stands on was never begun with.
    fn may_merge(&self, replica: &Replica, at: usize) -> Option<Seq> {
        let frozen = &replica.frozen[at];
        let as_of = replica.member.as_deref().and_then(Member::rebuilt_from);
        let is_loose = |of: &Frozen| self.map.is_loose(LayerKey { replica: replica.no, layer: of.layer.no });
        let stays = !replica.frozen.get(at + 1).is_some_and(is_loose);
        let may = is_loose(frozen) && stays && replica.has_caught_up() && as_of.is_none_or(|as_of| frozen.at <= as_of);
        frozen.removed.filter(|_| may)
    }

    /// What has to be drained before a layer is merged, if it may be.
    pub(crate) fn merges_after(&self, layer: LayerKey) -> Option<Seq> {
        let replica = self.map.live(layer.replica)?;
        let at = replica.frozen.iter().position(|frozen| frozen.layer.no == layer.layer)?;
        self.may_merge(replica, at)
    }

    /// Removed layers that can be merged: whose, where among the frozen ones, and what has to be drained before.
    fn merges(&self) -> impl Iterator<Item = (&Replica, usize, Seq)> {
        let replicas = self.map.iter().filter(|replica| !replica.deleting);
        let layers = replicas.flat_map(|replica| (0..replica.frozen.len()).map(move |at| (replica, at)));
        layers.filter_map(|(replica, at)| Some((replica, at, self.may_merge(replica, at)?)))
    }

    pub(crate) fn count_merges(&mut self) {
        self.drain.merges = self.merges().count() as u32;
    }

    /// Whether there is one that needs no more than this drained.
    pub(crate) fn has_merges(&self, drained: Seq) -> bool {
        self.merges().any(|(.., by)| by <= drained)
    }

    /// Goes on with a removed layer of some replica that nothing in the log needs any more.
    pub(crate) fn begin_merge<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        if self.copies_inherit() {
            return;
        }
        let drained = self.drained_to();
        for _ in 0..STEPS_MAX {
            if self.dirty_room() < DIRTIES {
                return;
            }
            let Some((replica, at, _)) = self.merges().find(|(.., by)| *by <= drained) else { return };
            let (of, above) = (&replica.frozen[at].layer, replica.frozen.get(at + 1).map_or(&replica.live, |frozen| &frozen.layer));
            let page_no = of.pages.keys().min().copied();
            let [layer, above] = [of, above].map(|layer| LayerKey { replica: replica.no, layer: layer.no });
            self.drain.unsaved = true;
            let Some(page_no) = page_no else {
                self.map.drop_layer(layer);
                self.count_merges();
                continue;
            };
            self.drain.merge = Some(Merge { page: PageKey { layer, page_no }, above, joins: Vec::new(), left: 0 });
            self.load_merge(mem, fx);
            if !self.drain.is_idle() {
                return;
            }
        }
    }

    /// Loads both pages, then plans.
    pub(crate) fn load_merge<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        let merge = self.drain.merge.as_ref().expect("a page is being merged");
        let keys = [merge.page, PageKey { layer: merge.above, ..merge.page }];
        match keys.into_iter().find(|key| self.map.page(*key).is_some_and(|page| page.cached.is_none())) {
            Some(key) => {
                self.drain.stage = DrainStage::Loading;
                self.want_page(key, PageWaiter::Drain, mem, fx);
            }
            None => self.plan_merge(mem, fx),
        }
    }

    fn entry_of(&self, layer: LayerKey, extent: u32) -> ExtentEntry {
        match self.map.known(layer, extent) {
            Known::Entry(entry) => *entry,
            Known::Nothing => ExtentEntry::EMPTY,
            Known::NotLoaded => unreachable!("both pages of a merge are loaded, and the map stands still"),
        }
    }

    /// What needs no copy is settled at once, the rest is read, as far as memory goes.
    fn plan_merge<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        let mut merge = self.drain.merge.take().expect("a page is being merged");
        self.drain.stage = DrainStage::Idle;
        if self.map.live(merge.above.replica).is_none() {
            return;
        }
        let most = self.config.limits.drain_slice as usize;
        for at in 0..EXTENTS_PER_PAGE as u32 {
            let extent = merge.page.page_no * EXTENTS_PER_PAGE as u32 + at;
            let (lower, upper) = (self.entry_of(merge.page.layer, extent), self.entry_of(merge.above, extent));
            if lower == ExtentEntry::EMPTY {
                continue;
            }
            let wanted = blocks_in(&lower, BlockState::Data) & blocks_in(&upper, BlockState::Inherit);
            let covers = blocks_in(&upper, BlockState::Data);
            if wanted == 0 || covers == 0 {
                let keep = if wanted == 0 { upper.place } else { lower.place };
                self.settle_merge(&merge, extent, keep, 0, 0);
                continue;
            }
            let buf = if merge.joins.len() < most { mem.alloc(BLOCKS as u32) } else { None };
            let Some(buf) = buf else { continue };
            let (from, to, mask) = match covers.count_ones() < wanted.count_ones() {
                true => (upper.place, lower.place, covers),
                false => (lower.place, upper.place, wanted),
            };
            merge.joins.push(Join { extent, from, to, mask, bad: 0, buf, out: 0, failed: false, again: false, writing: false });
        }
        merge.left = merge.joins.len() as u32;
        if merge.left == 0 {
            self.end_merge(&merge);
            return;
        }
        self.drain.stage = DrainStage::Moving;
        let count = merge.joins.len();
        self.drain.merge = Some(merge);
        for at in 0..count {
            self.submit_join(at as u32, fx);
        }
    }

    fn submit_join(&mut self, at: u32, fx: &mut Effects) {
        let merge = self.drain.merge.as_mut().expect("a page is being merged");
        let join = &mut merge.joins[at as usize];
        let (buf, mask) = (join.buf, if join.writing { join.mask & !join.bad } else { join.mask });
        let (kind, place) = if join.writing { (DiskKind::Write, join.to) } else { (DiskKind::Read, join.from) };
        join.failed = false;
        let runs: Vec<(u32, u32)> = runs(mask, !join.again || join.writing).collect();
        join.out = runs.len() as u32;
        for (first, blocks) in &runs {
            let part = Part::Buf { buf, first: *first, blocks: *blocks };
            self.submit(fx, kind, self.extent_block(place, u64::from(*first)), &[part], Owner::Merge { join: at });
        }
    }

    pub(crate) fn on_merge_done<M: Memory>(&mut self, at: u32, ok: bool, mem: &mut M, fx: &mut Effects) {
        let merge = self.drain.merge.as_mut().expect("a page is being merged");
        let (page, above) = (merge.page.layer, merge.above);
        let join = &mut merge.joins[at as usize];
        join.out -= 1;
        join.failed |= !ok;
        if join.writing && !ok {
            self.fence(FenceReason::DrainWriteFailed, mem, fx);
        }
        let join = &mut self.drain.merge.as_mut().expect("just seen").joins[at as usize];
        if join.out > 0 {
            return;
        }
        let (extent, writing, mask, place) = (join.extent, join.writing, join.mask, join.from);
        if !writing && !self.fenced() {
            let (lower, upper) = (self.entry_of(page, extent), self.entry_of(above, extent));
            let of = if lower.place == place { lower } else { upper };
            let is_member = self.member(above.replica).is_some();
            let join = &mut self.drain.merge.as_mut().expect("just seen").joins[at as usize];
            let bytes = mem.bytes(join.buf);
            let is_bad = |at: &usize| mask >> at & 1 != 0 && penstock_wire::crc32c(&bytes[at * BLOCK..][..BLOCK]) != of.crcs[*at];
            let bad = (0..BLOCKS).filter(is_bad).fold(0u16, |bad, at| bad | 1 << at);
            // The second time block by block: one that cannot be read must not take its neighbours with it.
            if bad != 0 && !std::mem::replace(&mut join.again, true) {
                mem.bytes_mut(join.buf).fill(0xa5);
                self.submit_join(at, fx);
                return;
            }
            // A member's bad block moves on with its checksum: others have it.
            let lost = if is_member { 0 } else { bad };
            (join.bad, join.writing) = (lost, true);
            for (first, _) in runs(bad, false) {
                let block = u64::from(extent) * EXTENT_BLOCKS + u64::from(first);
                let place = self.extent_block(place, u64::from(first));
                self.counters.corrupt_blocks += 1;
                fx.list.push(Effect::Notice(Notice::Corrupt { replica: page.replica, block, place }));
            }
            if mask & !lost != 0 {
                self.submit_join(at, fx);
                return;
            }
        }
        let merge = self.drain.merge.as_mut().expect("just seen");
        merge.left -= 1;
        if merge.left > 0 {
            return;
        }
        let merge = self.drain.merge.take().expect("just seen");
        self.drain.stage = DrainStage::Idle;
        for join in &merge.joins {
            mem.free(join.buf);
        }
        // Fenced, nobody knows what was written, and nothing points there.
        if self.fenced() || self.map.live(above.replica).is_none() {
            return;
        }
        for join in &merge.joins {
            self.settle_merge(&merge, join.extent, join.to, join.mask, join.bad);
        }
        self.end_merge(&merge);
    }

    /// The layer above has what it needs of an extent, in `keep`; the other place goes. `copied` were copied there, `bad` of them are lost.
    fn settle_merge(&mut self, merge: &Merge, extent: u32, keep: u32, copied: u16, bad: u16) {
        let (lower, upper) = (self.entry_of(merge.page.layer, extent), self.entry_of(merge.above, extent));
        let zero = if self.map.beneath(merge.page.layer).is_some() { BlockState::Zero } else { BlockState::Inherit };
        let entry = self.map.entry_mut(merge.above, extent);
        for at in 0..BLOCKS {
            let inherits = upper.state(at) == BlockState::Inherit;
            let of = if inherits { &lower } else { &upper };
            match of.state(at) {
                BlockState::Data if copied & bad & 1 << at != 0 => entry.set(at, BlockState::Lost, 0),
                BlockState::Data => entry.set(at, BlockState::Data, of.crcs[at]),
                BlockState::Zero => entry.set(at, zero, 0),
                state => entry.set(at, state, 0),
            }
        }
        entry.changed = upper.changed.max(lower.changed);
        let has_data = entry.has_data();
        let key = GroupKey { layer: merge.above, extent };
        let keep = if has_data || self.index.find(key).is_some() || self.touches(key) { keep } else { UNALLOCATED };
        self.map.set_place(merge.above, extent, keep);
        self.map.set_place(merge.page.layer, extent, UNALLOCATED);
        *self.map.entry_mut(merge.page.layer, extent) = ExtentEntry::EMPTY;
        for place in [lower.place, upper.place] {
            if place != UNALLOCATED && place != keep {
                if self.canary(Canary::ReuseMergedEarly) {
                    self.space.give_back(ExtentNo(place), &mut self.epochs);
                    continue;
                }
                self.space.untake(ExtentNo(place));
                self.drain.freed.push(ExtentNo(place));
            }
        }
    }

    /// A page that says nothing any more goes.
    fn end_merge(&mut self, merge: &Merge) {
        let done = self.map.page(merge.page).and_then(|page| page.cached.as_ref()).is_some_and(|page| page.is_empty());
        if done && let Some(slot) = self.map.drop_page(merge.page) {
            self.checkpoint.dropped.push(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn runs_cover_each_set_bit_once() {
        for (mask, whole) in
            [(0, vec![]), (1, vec![(0, 1)]), (0xffff, vec![(0, 16)]), (0x8000, vec![(15, 1)]), (0b1101_1000, vec![(3, 2), (6, 2)])]
        {
            assert_eq!(runs(mask, true).collect::<Vec<_>>(), whole, "{mask:x}");
            let single: Vec<u32> = runs(mask, false).map(|(first, _)| first).collect();
            assert_eq!(single, (0..16).filter(|at| mask >> at & 1 != 0).collect::<Vec<u32>>());
        }
    }
}
