//! Zeroing: what discards, write-zeroes and shrinks change, at a cost by what is there and not by length.
//!
//! In a layer with nothing beneath it a block that is zeros says nothing, and takes no page. Over frozen layers it must say so, or theirs would show
//! again: that takes a page for 3 MiB at worst, which is promised like an extent before it is proposed.

use crate::index::{GroupKey, Version};
use crate::map::{Known, LayerKey, PageKey};
use crate::port::ReplicaNo;
use crate::read::Place;
use crate::store::Store;
use penstock_wire::page::EXTENTS_PER_PAGE;
use penstock_wire::{EXTENT_BLOCKS, Seq};

const PAGE_BLOCKS: u64 = EXTENTS_PER_PAGE as u64 * EXTENT_BLOCKS;

impl Store {
    /// Promises what zeroing `block..end` of the live layer may take. `None`: there is no space.
    pub(crate) fn promise_zeros(&mut self, no: ReplicaNo, block: u64, end: u64) -> Option<u32> {
        let freezing = self.map.get(no).is_some_and(|replica| replica.freezing > 0);
        let pages = self.pages_to_begin(self.map.live_layer(no), freezing, block, end).len() as u32;
        for promised in 0..pages {
            if !self.space.promise(0) {
                self.give_up_promises(promised);
                return None;
            }
        }
        Some(pages)
    }

    /// The same for an entry that is redone: it had its promises before the crash.
    pub(crate) fn promise_zeros_again(&mut self, no: ReplicaNo, block: u64, end: u64, index: u64) -> u32 {
        let pages = self.pages_to_begin(self.map.layer_at(no, index), false, block, end).len() as u32;
        (0..pages).for_each(|_| self.space.promise_again());
        pages
    }

    /// Pages that a layer does not have and that zeroing may begin. `ahead`: in one that will lie over this.
    pub(crate) fn pages_to_begin(&self, layer: LayerKey, ahead: bool, block: u64, end: u64) -> Vec<u64> {
        if !ahead && self.map.beneath(layer).is_none() {
            return Vec::new();
        }
        let mut pages = self.pages_there(layer, block, end);
        pages.retain(|page_no| ahead || self.map.page(PageKey { layer, page_no: *page_no as u32 }).is_none());
        pages
    }

    /// Pages of a range with something on them, in a layer, in the log or beneath.
    fn pages_there(&self, layer: LayerKey, block: u64, end: u64) -> Vec<u64> {
        let stack: Vec<LayerKey> = self.map.stack(layer).collect();
        let on_pages = stack.iter().filter_map(|layer| self.map.layer(*layer)).flat_map(|layer| layer.pages.keys());
        let mut pages: Vec<u64> = on_pages.map(|page_no| u64::from(*page_no)).collect();
        let grouped = self.index.iter().filter(|group| stack.contains(&group.key.layer));
        pages.extend(grouped.map(|group| u64::from(group.key.extent) * EXTENT_BLOCKS / PAGE_BLOCKS));
        pages.retain(|page_no| (page_no + 1) * PAGE_BLOCKS > block && page_no * PAGE_BLOCKS < end);
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// Zeroes `block..end` by what the map and the index hold of it, however long it is.
    pub(crate) fn zero_what_is_there(&mut self, no: ReplicaNo, block: u64, end: u64, seq: Seq, index: u64, promises: &mut u32) {
        if self.map.live(no).is_none() {
            return;
        }
        let layer = self.map.layer_at(no, index);
        for page_no in self.pages_there(layer, block, end) {
            let first = (page_no * PAGE_BLOCKS).max(block);
            self.zero_in_page(layer, first, ((page_no + 1) * PAGE_BLOCKS).min(end), seq, index, promises);
        }
    }

    /// Zeroes what exists of a range, in the index; the drain gives the extents back. What it needs of `promises` it takes.
    pub(crate) fn apply_zero(&mut self, no: ReplicaNo, block: u64, blocks: u64, seq: Seq, index: u64, promises: &mut u32) {
        if self.map.live(no).is_none() || blocks == 0 {
            return;
        }
        let (layer, end) = (self.map.layer_at(no, index), block + blocks);
        let pages: usize = self.map.stack(layer).filter_map(|layer| self.map.layer(layer)).map(|layer| layer.pages.len()).sum();
        if blocks / PAGE_BLOCKS > (pages + self.index.len()) as u64 {
            self.zero_what_is_there(no, block, end, seq, index, promises);
            return;
        }
        let mut at = block;
        while at < end {
            let page_end = ((at / PAGE_BLOCKS + 1) * PAGE_BLOCKS).min(end);
            let page_no = (at / PAGE_BLOCKS) as u32;
            if self.index.len() > 0 || self.map.stack(layer).any(|layer| self.map.page(PageKey { layer, page_no }).is_some()) {
                self.zero_in_page(layer, at, page_end, seq, index, promises);
            }
            at = page_end;
        }
    }

    fn zero_in_page(&mut self, layer: LayerKey, block: u64, end: u64, seq: Seq, index: u64, promises: &mut u32) {
        let over_frozen = self.map.beneath(layer).is_some();
        let mut begins = self.map.page(PageKey::of(layer, (block / EXTENT_BLOCKS) as u32).0).is_none();
        let mut at = block;
        while at < end {
            let extent = (at / EXTENT_BLOCKS) as u32;
            let stop = ((u64::from(extent) + 1) * EXTENT_BLOCKS).min(end);
            let there = self.map.stack(layer).any(|layer| self.is_there(layer, extent));
            // What reads as zeros over a frozen layer stays as it is, or every discard would grow the map.
            let is_zeros = || (at..stop).all(|block| self.place_of(layer, block) == Ok(Place::Zero));
            if there && !(over_frozen && is_zeros()) {
                for block in at..stop {
                    let id = self.put_version(layer, block, Version::Zero, seq, index);
                    let group = self.index.group_mut(id);
                    if begins && *promises > 0 && !group.promised {
                        group.promised = true;
                        *promises -= 1;
                        begins = false;
                    }
                }
            }
            at = stop;
        }
    }

    /// Whether a layer says anything of an extent, as far as is known without loading a page.
    fn is_there(&self, layer: LayerKey, extent: u32) -> bool {
        self.index.find(GroupKey { layer, extent }).is_some()
            || match self.map.known(layer, extent) {
                Known::Nothing => false,
                Known::NotLoaded => true,
                Known::Entry(entry) => !entry.is_empty(),
            }
    }
}
