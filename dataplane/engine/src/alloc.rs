//! Which extents are taken, and the 4 KiB slots of map pages within extents that were taken for them.
//!
//! `taken` is the truth that a checkpoint writes down; `busy` is what must not be handed out: all that is taken, what a
//! durable checkpoint still refers to, and what reads may still look at; `claimed` is what something in memory is known to
//! use, so that no two users of one extent are ever believed. Space is promised before a write is proposed
//! ([`Space::promise`]), so that applying and draining never run out.

use crate::epoch::{Epoch, Epochs};
use penstock_wire::EXTENT_BLOCKS;
use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// An extent of the store, counted from its first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct ExtentNo(pub u32);

/// A block of the extents' area that holds a map page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct SlotNo(pub u32);

const SLOTS: u64 = EXTENT_BLOCKS;
/// What a promise costs: the extent, and a slot for the page that may have to map it.
const PROMISE_SLOTS: u64 = SLOTS + 1;

#[derive(Debug)]
pub struct Bits(Vec<u64>);

impl Bits {
    fn new(len: u64) -> Self {
        Self(vec![0; len.div_ceil(64) as usize])
    }
    pub fn get(&self, i: u32) -> bool {
        self.0[i as usize / 64] >> (i % 64) & 1 != 0
    }
    fn set(&mut self, i: u32, on: bool) {
        let bit = 1 << (i % 64);
        if on {
            self.0[i as usize / 64] |= bit;
        } else {
            self.0[i as usize / 64] &= !bit;
        }
    }
}

#[derive(Debug)]
pub struct Space {
    extents: u64,
    taken: Bits,
    busy: Bits,
    claimed: Bits,
    /// Extents that are not busy.
    free: u64,
    /// Where the search for a free extent goes on.
    cursor: u32,
    /// Promised and not yet used, in extents.
    promised: u64,
    /// Extents that hold map pages: one bit a slot that is used or must not be reused yet.
    paged: FxHashMap<u32, u16>,
    /// Slots that can be handed out, last first.
    slots: Vec<SlotNo>,
    /// Given back, not free until the reads of their epoch have left.
    waiting: VecDeque<(Epoch, ExtentNo)>,
}

impl Space {
    pub fn new(extents: u64) -> Self {
        Self {
            extents,
            taken: Bits::new(extents),
            busy: Bits::new(extents),
            claimed: Bits::new(extents),
            free: extents,
            cursor: 0,
            promised: 0,
            paged: FxHashMap::default(),
            slots: Vec::new(),
            waiting: VecDeque::new(),
        }
    }

    /// Takes over a checkpoint's bitmap, its directory's extents and its pages' slots.
    ///
    /// # Errors
    /// The first extent that two of them use, or that the bitmap does not know as taken.
    pub fn load(&mut self, taken: &[u8], chains: &[ExtentNo], slots: impl Iterator<Item = SlotNo>) -> Result<(), ExtentNo> {
        *self = Self::new(self.extents);
        for i in 0..self.extents as u32 {
            if taken[i as usize / 8] >> (i % 8) & 1 != 0 {
                self.taken.set(i, true);
                self.busy.set(i, true);
                self.free -= 1;
            }
        }
        for extent in chains {
            if !self.claim(*extent) {
                return Err(*extent);
            }
        }
        for slot in slots {
            let extent = ExtentNo(slot.0 / SLOTS as u32);
            if !self.paged.contains_key(&extent.0) && !self.claim(extent) {
                return Err(extent);
            }
            let used = self.paged.entry(extent.0).or_insert(0);
            let bit = 1 << (slot.0 % SLOTS as u32);
            if *used & bit != 0 {
                return Err(extent);
            }
            *used |= bit;
        }
        let mut paged: Vec<u32> = self.paged.keys().copied().collect();
        paged.sort_unstable();
        for extent in paged {
            let used = self.paged[&extent];
            for s in 0..SLOTS as u32 {
                if used >> s & 1 == 0 {
                    self.slots.push(SlotNo(extent * SLOTS as u32 + s));
                }
            }
        }
        Ok(())
    }

    /// Claims an extent for a user that was read from the drive: false when it is not taken, or is another's.
    fn claim(&mut self, extent: ExtentNo) -> bool {
        let ours = u64::from(extent.0) < self.extents && self.taken.get(extent.0) && !self.claimed.get(extent.0);
        if ours {
            self.claimed.set(extent.0, true);
        }
        ours
    }

    /// Claims all the extents that a page names, or none.
    pub fn claim_all(&mut self, extents: impl Iterator<Item = ExtentNo> + Clone) -> bool {
        for (count, extent) in extents.clone().enumerate() {
            if !self.claim(extent) {
                extents.take(count).for_each(|extent| self.claimed.set(extent.0, false));
                return false;
            }
        }
        true
    }

    /// Part that promises never touch: checkpoints (pages copied on write, two directories) and deletes live off it.
    fn reserve(&self) -> u64 {
        (self.extents / 64).max(24)
    }

    /// Part of what can be promised that only leaders on other nodes may count on, for entries that are on their way here: see `room`.
    pub fn slack(&self) -> u64 {
        (self.extents / 32).clamp(8, 2048)
    }

    /// Dirty pages that a checkpoint can always write out of the reserve.
    pub fn dirty_limit(&self) -> usize {
        // A quarter of the reserve for pages; the rest holds the directories' old and new chains.
        (self.reserve() * SLOTS / 4).min(4096) as usize
    }

    /// Extents that the drain may take now and leave a checkpoint what it needs.
    pub fn places(&self) -> u64 {
        self.free.saturating_sub(self.reserve() / 2)
    }

    pub fn extents(&self) -> u64 {
        self.extents
    }

    pub fn free(&self) -> u64 {
        self.free
    }

    pub fn is_taken(&self, extent: ExtentNo) -> bool {
        self.taken.get(extent.0)
    }

    /// Extents that can still be promised.
    pub fn room(&self) -> u64 {
        // What waits for reads to leave does not count: they may stay long, and a promise may be used at once.
        let have = self.free * SLOTS + self.slots.len() as u64;
        (have.saturating_sub(self.reserve() * SLOTS) / PROMISE_SLOTS).saturating_sub(self.promised)
    }

    /// Promises one extent, with the slot to map it, and leaves room for `spare` more; or says that there is no space.
    pub fn promise(&mut self, spare: u64) -> bool {
        let is_there = self.room() > spare;
        self.promised += u64::from(is_there);
        is_there
    }

    /// Whether extents were given back that are free once the reads of them have left.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Promises without asking: recovery redoes what had its promise before the crash.
    pub fn promise_again(&mut self) {
        self.promised += 1;
    }

    pub fn unpromise(&mut self) {
        assert!(self.promised > 0, "a promise of space was given back twice");
        self.promised -= 1;
    }

    pub fn promised(&self) -> u64 {
        self.promised
    }

    fn take_any(&mut self) -> Option<ExtentNo> {
        if self.free == 0 {
            return None;
        }
        let words = self.busy.0.len();
        let start = self.cursor as usize / 64;
        for step in 0..=words {
            let word = (start + step) % words;
            let mut open = !self.busy.0[word];
            if step == 0 {
                open &= u64::MAX << (self.cursor % 64);
            }
            if open != 0 {
                let extent = word as u64 * 64 + u64::from(open.trailing_zeros());
                if extent < self.extents {
                    let extent = extent as u32;
                    self.busy.set(extent, true);
                    self.taken.set(extent, true);
                    self.claimed.set(extent, true);
                    self.free -= 1;
                    self.cursor = extent;
                    return Some(ExtentNo(extent));
                }
            }
        }
        None
    }

    /// An extent for data, against a promise that the caller holds and hereby uses.
    pub fn take_promised(&mut self) -> Option<ExtentNo> {
        let extent = self.take_any()?;
        self.unpromise();
        Some(extent)
    }

    /// An extent out of the reserve, for a checkpoint.
    pub fn take_reserved(&mut self) -> Option<ExtentNo> {
        self.take_any()
    }

    /// Gives a data extent back. It stays busy until the reads that may look at it have left.
    pub fn give_back(&mut self, extent: ExtentNo, epochs: &mut Epochs) {
        assert!(self.taken.get(extent.0), "extent {} was given back twice", extent.0);
        self.taken.set(extent.0, false);
        self.waiting.push_back((epochs.close(), extent));
    }

    /// Lets go of an extent that was taken from the map before the checkpoint that is durable now, once the reads of it have left.
    pub fn let_go(&mut self, extent: ExtentNo, epochs: &mut Epochs) {
        self.waiting.push_back((epochs.close(), extent));
    }

    /// Frees what no read can look at any more.
    pub fn settle(&mut self, epochs: &Epochs) {
        while self.waiting.front().is_some_and(|(epoch, _)| epochs.passed(*epoch)) {
            let (_, extent) = self.waiting.pop_front().expect("just seen");
            self.release(extent);
        }
    }

    /// Marks an extent as not part of the checkpoint being written; it stays busy.
    pub fn untake(&mut self, extent: ExtentNo) {
        assert!(self.taken.get(extent.0), "extent {} is not taken", extent.0);
        self.taken.set(extent.0, false);
    }

    /// Lets go of an extent that is no longer taken and that nothing refers to.
    pub fn release(&mut self, extent: ExtentNo) {
        assert!(!self.taken.get(extent.0) && self.busy.get(extent.0), "extent {} released while in use", extent.0);
        self.busy.set(extent.0, false);
        self.claimed.set(extent.0, false);
        self.free += 1;
    }

    /// A slot for a map page.
    pub fn take_slot(&mut self) -> Option<SlotNo> {
        if self.slots.is_empty() {
            let extent = self.take_any()?;
            self.paged.insert(extent.0, 0);
            for s in (0..SLOTS as u32).rev() {
                self.slots.push(SlotNo(extent.0 * SLOTS as u32 + s));
            }
        }
        let slot = self.slots.pop()?;
        *self.paged.get_mut(&(slot.0 / SLOTS as u32)).expect("a slot's extent is paged") |= 1 << (slot.0 % SLOTS as u32);
        Some(slot)
    }

    /// Lets go of slots that no durable checkpoint refers to. Extents left without pages go back whole.
    pub fn release_slots(&mut self, released: &mut Vec<SlotNo>) {
        let mut emptied = false;
        for slot in released.drain(..) {
            let used = self.paged.get_mut(&(slot.0 / SLOTS as u32)).expect("a slot's extent is paged");
            let bit = 1 << (slot.0 % SLOTS as u32);
            assert!(*used & bit != 0, "slot {} was released twice", slot.0);
            *used &= !bit;
            emptied |= *used == 0;
            self.slots.push(slot);
        }
        // Whole extents are kept while few: the next checkpoint wants slots.
        if emptied && self.slots.len() > 4 * SLOTS as usize {
            let paged = &self.paged;
            self.slots.retain(|slot| paged[&(slot.0 / SLOTS as u32)] != 0);
            let mut empty: Vec<u32> = self.paged.iter().filter(|(_, used)| **used == 0).map(|(extent, _)| *extent).collect();
            empty.sort_unstable();
            for extent in empty {
                self.paged.remove(&extent);
                self.taken.set(extent, false);
                self.release(ExtentNo(extent));
            }
        }
    }

    /// The bitmap that a checkpoint writes: taken extents, of which those that will hold no page any more are left out.
    /// `dropped` are the slots that the checkpoint does not refer to.
    pub fn bitmap(&self, dropped: &[SlotNo]) -> Vec<u8> {
        let mut bytes = vec![0u8; self.extents.div_ceil(8) as usize];
        for (i, word) in self.taken.0.iter().enumerate() {
            for (j, byte) in word.to_le_bytes().into_iter().enumerate() {
                if let Some(to) = bytes.get_mut(i * 8 + j) {
                    *to = byte;
                }
            }
        }
        let mut left: FxHashMap<u32, u16> = self.paged.clone();
        for slot in dropped {
            *left.get_mut(&(slot.0 / SLOTS as u32)).expect("a slot's extent is paged") &= !(1 << (slot.0 % SLOTS as u32));
        }
        for (extent, used) in left {
            if used == 0 {
                bytes[extent as usize / 8] &= !(1 << (extent % 8));
            }
        }
        bytes
    }

    /// Extents that hold map pages.
    pub fn paged(&self) -> impl Iterator<Item = ExtentNo> + '_ {
        self.paged.keys().map(|extent| ExtentNo(*extent))
    }

    /// How many extents are taken.
    pub fn taken(&self) -> u64 {
        self.taken.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_stop_before_the_reserve_and_come_back() {
        let mut space = Space::new(200);
        let mut promises = 0;
        while space.promise(0) {
            promises += 1;
        }
        assert!(promises > 150 && promises < 176, "{promises}");
        space.unpromise();
        assert!(space.promise(0));
        assert!(!space.promise(0));
    }

    #[test]
    fn extent_given_back_waits_for_its_readers() {
        let mut space = Space::new(200);
        let mut epochs = Epochs::default();
        assert!(space.promise(0));
        let extent = space.take_promised().unwrap();
        let reader = epochs.enter();
        space.give_back(extent, &mut epochs);
        space.settle(&epochs);
        assert_eq!(space.free(), 199);
        epochs.leave(reader);
        space.settle(&epochs);
        assert_eq!(space.free(), 200);
    }

    #[test]
    fn bitmap_leaves_out_extents_whose_last_page_is_dropped() {
        let mut space = Space::new(200);
        let slot = space.take_slot().unwrap();
        let extent = slot.0 / 16;
        assert_eq!(space.bitmap(&[])[extent as usize / 8] >> (extent % 8) & 1, 1);
        assert_eq!(space.bitmap(&[slot])[extent as usize / 8] >> (extent % 8) & 1, 0);
    }

    #[test]
    fn loaded_space_hands_out_the_open_slots_of_paged_extents_first() {
        let mut space = Space::new(200);
        let mut taken = vec![0; 25];
        taken[0] = 0b100;
        space.load(&taken, &[], [SlotNo(33)].into_iter()).unwrap();
        let slot = space.take_slot().unwrap();
        assert_eq!(slot.0 / 16, 2);
        assert_ne!(slot.0, 33);
        assert_eq!(space.taken(), 1);
    }

    #[test]
    fn extent_with_two_users_is_refused_whoever_they_are() {
        let mut taken = vec![0; 25];
        taken[0] = 0b1110;
        let mut space = Space::new(200);
        assert_eq!(space.load(&taken, &[ExtentNo(1), ExtentNo(1)], [].into_iter()), Err(ExtentNo(1)));
        assert_eq!(space.load(&taken, &[ExtentNo(1)], [SlotNo(16)].into_iter()), Err(ExtentNo(1)));
        assert_eq!(space.load(&taken, &[], [SlotNo(16), SlotNo(16)].into_iter()), Err(ExtentNo(1)));
        assert_eq!(space.load(&taken, &[ExtentNo(9)], [].into_iter()), Err(ExtentNo(9)), "not taken");
        assert_eq!(space.load(&taken, &[ExtentNo(1)], [SlotNo(32)].into_iter()), Ok(()));
        assert!(!space.claim_all([ExtentNo(3), ExtentNo(2)].into_iter()), "one of them holds pages");
        assert!(!space.claim_all([ExtentNo(3), ExtentNo(3)].into_iter()));
        assert!(space.claim_all([ExtentNo(3)].into_iter()), "a refusal claims nothing");
        assert!(!space.claim_all([ExtentNo(3)].into_iter()));
    }
}
