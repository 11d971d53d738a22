//! Scrub: reads every allocated extent within a pass and verifies every block of it, a few extents a tick.
//!
//! What is bad is told and counted, and asked for at the other members of its group (`repair`); each page that was read is compared with what they have (`compare`). With one copy there is nothing to repair from:
//! reads of it fail by themselves.

use crate::map::{Known, Layer, LayerKey, Map, PageKey};
use crate::port::*;
use crate::repair::Waiter;
use crate::store::{Owner, Store};
use penstock_wire::page::{BlockState, EXTENTS_PER_PAGE, ExtentEntry};
use penstock_wire::{BLOCK, EXTENT_BLOCKS};

const BLOCKS: usize = EXTENT_BLOCKS as usize;

#[derive(Debug)]
struct Item {
    layer: LayerKey,
    extent: u32,
    entry: ExtentEntry,
    buf: BufId,
    epoch: crate::epoch::Epoch,
    /// The second time, block by block: one that cannot be read must not be held against its neighbours.
    again: bool,
    /// Reads of it that are out.
    out: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Scrub {
    on: bool,
    /// Next extent: replica number, layer, page, extent within the page.
    replica: u32,
    layer: LayerNo,
    page: u32,
    at: usize,
    items: Vec<Option<Item>>,
    out: u32,
    blocks: u64,
    corrupt: u64,
}

impl Scrub {
    pub fn start(&mut self) {
        if !self.on {
            self.on = true;
            (self.replica, self.layer, self.page, self.at, self.blocks, self.corrupt) = (0, LayerNo(0), 0, 0, 0, 0);
        }
    }
    pub fn stop(&mut self) {
        self.on = false;
    }
    pub fn is_on(&self) -> bool {
        self.on || self.out > 0
    }
    /// Share of the replicas that this pass has seen, in 1/1000.
    pub fn permille(&self, map: &Map) -> Option<u32> {
        self.on.then(|| (u64::from(self.replica) * 1000 / u64::from(map.next_no().max(1))) as u32)
    }
}

impl Store {
    /// Starts the reads of one tick.
    pub(crate) fn scrub_slice<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        let mut budget = self.config.limits.scrub_per_tick;
        while self.scrub.on && budget > self.scrub.out {
            let no = ReplicaNo(self.scrub.replica);
            if no.0 >= self.map.next_no() {
                if self.scrub.out == 0 && !self.groups.compare.is_comparing() {
                    self.scrub.on = false;
                    fx.list.push(Effect::Notice(Notice::ScrubDone { blocks: self.scrub.blocks, corrupt: self.scrub.corrupt }));
                }
                return;
            }
            let from = (self.scrub.layer, self.scrub.page);
            let next_of = |layer: &Layer| layer.pages.keys().map(|page| (layer.no, *page)).filter(|next| *next >= from).min();
            let Some((layer, page_no)) = self.map.live(no).and_then(|replica| {
                let mut layers = replica.layers().filter(|layer| !self.map.is_loose(LayerKey { replica: no, layer: layer.no }));
                layers.find_map(next_of)
            }) else {
                self.scrub.replica += 1;
                (self.scrub.layer, self.scrub.page, self.scrub.at) = (LayerNo(0), 0, 0);
                continue;
            };
            if (layer, page_no) > from {
                (self.scrub.layer, self.scrub.page, self.scrub.at) = (layer, page_no, 0);
            }
            let layer = LayerKey { replica: no, layer };
            let key = PageKey { layer, page_no };
            if self.map.page(key).is_some_and(|page| page.cached.is_none()) {
                if let std::collections::hash_map::Entry::Vacant(waiters) = self.page_waiters.entry(key) {
                    // Nobody is woken: the next tick finds it loaded.
                    waiters.insert(Vec::new());
                    self.load_page(key, mem, fx);
                }
                return;
            }
            if self.scrub.at == EXTENTS_PER_PAGE {
                if !self.begin_compare(key) {
                    return;
                }
                (self.scrub.page, self.scrub.at) = (page_no + 1, 0);
                continue;
            }
            let extent = page_no * EXTENTS_PER_PAGE as u32 + self.scrub.at as u32;
            if !self.scrub_extent(layer, extent, mem, fx) {
                return;
            }
            self.scrub.at += 1;
            budget = budget.saturating_sub(1);
        }
    }

    /// False when memory is short.
    fn scrub_extent<M: Memory>(&mut self, layer: LayerKey, extent: u32, mem: &mut M, fx: &mut Effects) -> bool {
        let Known::Entry(&entry) = self.map.known(layer, extent) else { return true };
        if !entry.has_data() {
            return true;
        }
        let Some(buf) = mem.alloc(BLOCKS as u32) else { return false };
        let item = Item { layer, extent, entry, buf, epoch: self.epochs.enter(), again: false, out: 0 };
        let free = self.scrub.items.iter().position(Option::is_none);
        let at = free.unwrap_or_else(|| {
            self.scrub.items.push(None);
            self.scrub.items.len() - 1
        });
        self.scrub.items[at] = Some(item);
        self.scrub.out += 1;
        self.read_scrub(at as u32, fx);
        true
    }

    fn read_scrub(&mut self, at: u32, fx: &mut Effects) {
        let item = self.scrub.items[at as usize].as_mut().expect("an item that is read stands");
        let (buf, place) = (item.buf, item.entry.place);
        let run = if item.again { 1 } else { BLOCKS as u32 };
        item.out = BLOCKS as u32 / run;
        for first in (0..BLOCKS as u32).step_by(run as usize) {
            let part = Part::Buf { buf, first, blocks: run };
            self.submit(fx, DiskKind::Read, self.extent_block(place, u64::from(first)), &[part], Owner::Scrub { item: at });
        }
    }

    pub(crate) fn on_scrub_read<M: Memory>(&mut self, at: u32, ok: bool, mem: &mut M, fx: &mut Effects) {
        let item = self.scrub.items[at as usize].as_mut().expect("an item that was read stands");
        item.out -= 1;
        if item.out > 0 {
            return;
        }
        // A failed read leaves bytes that do not verify: of blocks read one by one, the checksum alone tells.
        let ok = ok || item.again;
        let item = self.scrub.items[at as usize].as_ref().expect("an item that was read stands");
        let bytes = mem.bytes(item.buf);
        let data = |i: &usize| item.entry.state(*i) == BlockState::Data;
        let bad: Vec<usize> = (0..BLOCKS)
            .filter(data)
            .filter(|i| !ok || penstock_wire::crc32c(&bytes[i * BLOCK..][..BLOCK]) != item.entry.crcs[*i])
            .collect();
        let seen = (0..BLOCKS).filter(data).count() as u64;
        let (layer, extent, entry) = (item.layer, item.extent, item.entry);
        // The drain may have been at it: only what still stands, with nothing newer above, is held against the media.
        let kept = self.map.live(layer.replica).is_some() && !self.map.is_loose(layer);
        let still = kept
            && self.has_caught_up(layer.replica)
            && self.map.known(layer, extent) == Known::Entry(&entry)
            && self.index.find(crate::index::GroupKey { layer, extent }).is_none();
        if !bad.is_empty() && still && !item.again {
            let item = self.scrub.items[at as usize].as_mut().expect("just seen");
            item.again = true;
            // Whatever the first read left must not pass for what the second finds.
            mem.bytes_mut(item.buf).fill(0xa5);
            self.read_scrub(at, fx);
            return;
        }
        let item = self.scrub.items[at as usize].take().expect("just seen");
        self.scrub.out -= 1;
        self.epochs.leave(item.epoch);
        mem.free(item.buf);
        self.scrub.blocks += seen;
        self.counters.scrubbed_blocks += seen;
        if still {
            for i in bad {
                self.scrub.corrupt += 1;
                let (block, place) = (u64::from(extent) * EXTENT_BLOCKS + i as u64, self.extent_block(entry.place, i as u64));
                self.found_bad(layer.replica, block, place, fx);
                self.begin_fetch(self.asked_for(layer), block, place, entry.crcs[i], Waiter::Nobody);
            }
        }
    }
}
