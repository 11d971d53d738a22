//! Replicas and their maps in memory: which page lies where, which are loaded, which are dirty.
//!
//! Pages load on first use. A page that cannot be read becomes one whose blocks are all lost: its extents stay taken, reads
//! of them fail, and writes make it whole again block by block.

use crate::alloc::SlotNo;
use crate::config::ReplicaUsage;
use crate::port::ReplicaNo;
use penstock_wire::page::{BlockState, EXTENTS_PER_PAGE, ExtentEntry, Page, UNALLOCATED};
use penstock_wire::{EXTENT_BLOCKS, Index as RaftIndex, ReplicaShape, SegmentId, Term};
use rustc_hash::FxHashMap;

/// A page of a replica's map.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PageKey {
    pub replica: ReplicaNo,
    pub page_no: u32,
}

impl PageKey {
    pub fn of(replica: ReplicaNo, extent: u32) -> (Self, usize) {
        (Self { replica, page_no: extent / EXTENTS_PER_PAGE as u32 }, extent as usize % EXTENTS_PER_PAGE)
    }
}

/// Where a page is.
#[derive(Debug)]
pub struct PageState {
    /// Its slot and checksum in the newest durable checkpoint, if it is in it.
    pub on_disk: Option<(SlotNo, u32)>,
    pub cached: Option<Box<Page>>,
    /// Extents that it holds the place of; `None` in one of an old checkpoint that was not loaded since.
    pub extents: Option<u8>,
    pub dirty: bool,
    pub loading: bool,
    /// Was read, and was not what it should be: once may be the path's fault.
    pub misread: bool,
}

/// A replica of this store.
#[derive(Debug)]
pub struct Replica {
    pub no: ReplicaNo,
    pub shape: ReplicaShape,
    /// What hosts may reach: a shrink takes hold here when it is ordered, in `shape` when it is applied.
    pub limit_blocks: u64,
    pub deleting: bool,
    pub term: Term,
    /// Raft index of the last entry proposed, and of the last applied.
    pub proposed: RaftIndex,
    pub applied: RaftIndex,
    pub pages: FxHashMap<u32, PageState>,
    /// Extents that its pages hold the places of, of those pages that were counted.
    pub allocated: u64,
    /// Blocks whose newest version is in the log alone.
    pub undrained: u64,
    /// Of a volume with several replicas.
    pub member: Option<Box<crate::member::Member>>,
    /// Of one with which a host ever registered.
    pub guard: Option<Box<crate::reserve::Guard>>,
}

impl Replica {
    pub fn usage(&self) -> ReplicaUsage {
        ReplicaUsage { allocated_extents: self.allocated, undrained_blocks: self.undrained }
    }
}

/// What the map says of an extent, without loading anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Known<'a> {
    /// No page: all of it reads as zeros.
    Nothing,
    NotLoaded,
    Entry(&'a ExtentEntry),
}

#[derive(Debug, Default)]
pub struct Map {
    replicas: Vec<Option<Box<Replica>>>,
    by_segment: FxHashMap<SegmentId, ReplicaNo>,
    dirty: Vec<PageKey>,
    cached: u64,
}

impl Map {
    pub fn add(&mut self, replica: Box<Replica>) {
        let at = replica.no.0 as usize;
        if self.replicas.len() <= at {
            self.replicas.resize_with(at + 1, || None);
        }
        assert!(self.replicas[at].is_none(), "replica number {at} is used twice");
        if !replica.deleting {
            self.by_segment.insert(replica.shape.segment, replica.no);
        }
        self.replicas[at] = Some(replica);
    }

    /// Number that a new replica gets: numbers are never reused.
    pub fn next_no(&self) -> u32 {
        self.replicas.len() as u32
    }

    /// Makes sure that numbers below `next` are never given again.
    pub fn reserve_numbers(&mut self, next: u32) {
        if self.replicas.len() < next as usize {
            self.replicas.resize_with(next as usize, || None);
        }
    }

    #[inline]
    pub fn get(&self, no: ReplicaNo) -> Option<&Replica> {
        self.replicas.get(no.0 as usize)?.as_deref()
    }

    pub fn get_mut(&mut self, no: ReplicaNo) -> Option<&mut Replica> {
        self.replicas.get_mut(no.0 as usize)?.as_deref_mut()
    }

    /// A replica that is not being deleted.
    #[inline]
    pub fn live(&self, no: ReplicaNo) -> Option<&Replica> {
        self.get(no).filter(|replica| !replica.deleting)
    }

    pub fn by_segment(&self, segment: SegmentId) -> Option<ReplicaNo> {
        self.by_segment.get(&segment).copied()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().flatten().map(|replica| &**replica)
    }

    pub fn mark_deleting(&mut self, no: ReplicaNo) {
        if let Some(replica) = self.get_mut(no) {
            replica.deleting = true;
            let segment = replica.shape.segment;
            if self.by_segment.get(&segment) == Some(&no) {
                self.by_segment.remove(&segment);
            }
        }
    }

    /// Forgets a replica whose pages are all gone.
    pub fn remove(&mut self, no: ReplicaNo) {
        let gone = self.replicas[no.0 as usize].take().expect("only a replica that stands is removed");
        assert!(gone.pages.is_empty(), "replica {no:?} went with pages left");
    }

    #[inline]
    pub fn known(&self, no: ReplicaNo, extent: u32) -> Known<'_> {
        let Some(replica) = self.get(no) else { return Known::Nothing };
        let (key, at) = PageKey::of(no, extent);
        match replica.pages.get(&key.page_no) {
            None => Known::Nothing,
            Some(PageState { cached: Some(page), .. }) => Known::Entry(&page.extents[at]),
            Some(_) => Known::NotLoaded,
        }
    }

    pub fn page(&self, key: PageKey) -> Option<&PageState> {
        self.get(key.replica)?.pages.get(&key.page_no)
    }

    pub fn page_mut(&mut self, key: PageKey) -> Option<&mut PageState> {
        self.get_mut(key.replica)?.pages.get_mut(&key.page_no)
    }

    /// The entry of an extent for changing; makes the page if there is none. The page must not be one that is not loaded.
    pub fn entry_mut(&mut self, no: ReplicaNo, extent: u32) -> &mut ExtentEntry {
        let (key, at) = PageKey::of(no, extent);
        let replica = self.replicas[no.0 as usize].as_deref_mut().expect("entries change of replicas that stand");
        let page = replica.pages.entry(key.page_no).or_insert_with(|| {
            self.cached += 1;
            PageState { on_disk: None, cached: Some(Page::empty()), extents: Some(0), dirty: false, loading: false, misread: false }
        });
        if !page.dirty {
            page.dirty = true;
            self.dirty.push(key);
        }
        &mut page.cached.as_mut().expect("a page is loaded before it is changed").extents[at]
    }

    /// Gives an extent its place, or takes it away with [`UNALLOCATED`].
    pub fn set_place(&mut self, no: ReplicaNo, extent: u32, place: u32) {
        let entry = self.entry_mut(no, extent);
        let was = std::mem::replace(&mut entry.place, place);
        let change = i8::from(place != UNALLOCATED) - i8::from(was != UNALLOCATED);
        let replica = self.get_mut(no).expect("its entry was just changed");
        replica.allocated = replica.allocated.checked_add_signed(i64::from(change)).expect("an extent is counted once");
        let page = replica.pages.get_mut(&PageKey::of(no, extent).0.page_no).expect("its entry was just changed");
        page.extents = page.extents.map(|count| count.checked_add_signed(change).expect("an extent is counted once"));
    }

    /// So many blocks of a replica, if it stands, are in the log alone now, or no longer.
    pub fn undrained(&mut self, no: ReplicaNo, change: i64) {
        if let Some(replica) = self.get_mut(no) {
            replica.undrained = replica.undrained.checked_add_signed(change).expect("a block is counted once");
        }
    }

    /// A page's bytes have come: `None` when they are not the page, which then becomes one of lost blocks.
    pub fn loaded(&mut self, key: PageKey, page: Option<Box<Page>>) {
        let Some(state) = self.page_mut(key) else { return };
        state.loading = false;
        state.misread = false;
        if state.cached.is_some() {
            return;
        }
        let whole = page.is_some();
        let page = page.unwrap_or_else(|| {
            let mut page = Page::empty();
            for extent in &mut page.extents {
                for block in 0..EXTENT_BLOCKS as usize {
                    extent.set(block, BlockState::Lost, 0);
                }
            }
            page
        });
        let (was, count) = (u64::from(state.extents.unwrap_or(0)), page.places());
        state.extents = Some(count);
        state.cached = Some(page);
        let replica = self.get_mut(key.replica).expect("its page was just there");
        replica.allocated = replica.allocated - was + u64::from(count);
        self.cached += 1;
        if !whole {
            let state = self.page_mut(key).expect("just there");
            if !state.dirty {
                state.dirty = true;
                self.dirty.push(key);
            }
        }
    }

    pub fn dirty(&self) -> usize {
        self.dirty.len()
    }

    /// The dirty pages in order of place in the volumes, for a checkpoint. They stay marked until [`Self::cleaned`].
    pub fn take_dirty(&mut self) -> Vec<PageKey> {
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.retain(|key| self.page(*key).is_some());
        dirty.sort_unstable();
        dirty
    }

    /// Drops a page from memory and from the next checkpoint; returns its slot.
    pub fn drop_page(&mut self, key: PageKey) -> Option<SlotNo> {
        let replica = self.get_mut(key.replica)?;
        let state = replica.pages.remove(&key.page_no)?;
        replica.allocated -= u64::from(state.extents.unwrap_or(0));
        if state.cached.is_some() {
            self.cached -= 1;
        }
        state.on_disk.map(|(slot, _)| slot)
    }

    pub fn cached(&self) -> u64 {
        self.cached
    }
}
