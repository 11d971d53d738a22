//! Replicas, their layers and maps in memory: which page lies where, which are loaded, which are dirty.
//!
//! A replica is a stack of layers: the live one, which entries change, over those that snapshots have frozen. What a layer says nothing of is as
//! the layer beneath says. Each entry belongs to the layer that was live at its index, whenever it is drained or redone: nothing of an entry
//! crosses a snapshot's marker.
//!
//! Pages load on first use. A page that cannot be read becomes one whose blocks are all lost: its extents stay taken, reads
//! of them fail, and writes make it whole again block by block.

use crate::alloc::SlotNo;
use crate::config::{ReplicaUsage, SnapshotView};
use crate::port::{LayerNo, ReplicaNo};
use penstock_wire::directory::PageRow;
use penstock_wire::layer::{FrozenRow, KeptRow, SnapshotShape, Stack};
use penstock_wire::page::{BlockState, EXTENTS_PER_PAGE, ExtentEntry, Page, UNALLOCATED};
use penstock_wire::{EXTENT_BLOCKS, Index as RaftIndex, ReplicaShape, SegmentId, Seq, SnapshotId, Term};
use rustc_hash::FxHashMap;

/// A layer of a store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct LayerKey {
    pub replica: ReplicaNo,
    pub layer: LayerNo,
}

/// A page of a layer's map.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PageKey {
    pub layer: LayerKey,
    pub page_no: u32,
}

impl PageKey {
    pub fn of(layer: LayerKey, extent: u32) -> (Self, usize) {
        (Self { layer, page_no: extent / EXTENTS_PER_PAGE as u32 }, extent as usize % EXTENTS_PER_PAGE)
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

/// What a replica's entries between two markers changed.
#[derive(Debug)]
pub struct Layer {
    pub no: LayerNo,
    pub pages: FxHashMap<u32, PageState>,
    /// Extents that its pages hold the places of, of those pages that were counted.
    pub allocated: u64,
}

impl Layer {
    pub fn empty(no: LayerNo) -> Self {
        Self { no, pages: FxHashMap::default(), allocated: 0 }
    }

    /// As a checkpoint has it; nothing of it is loaded.
    pub fn of_rows(no: u32, rows: &[PageRow]) -> Self {
        let page = |row: &PageRow| {
            let on_disk = Some((SlotNo(row.slot), row.crc));
            (row.page_no, PageState { on_disk, cached: None, extents: row.extents, dirty: false, loading: false, misread: false })
        };
        let allocated = rows.iter().map(|row| u64::from(row.extents.unwrap_or(0))).sum();
        Self { no: LayerNo(no), pages: rows.iter().map(page).collect(), allocated }
    }

    /// What a checkpoint says of it.
    pub fn rows(&self) -> Vec<PageRow> {
        let row = |(page_no, state): (&u32, &PageState)| {
            state.on_disk.map(|(slot, crc)| PageRow { page_no: *page_no, slot: slot.0, crc, extents: state.extents })
        };
        let mut rows: Vec<PageRow> = self.pages.iter().filter_map(row).collect();
        rows.sort_unstable_by_key(|row| row.page_no);
        rows
    }
}

/// A layer that a snapshot has frozen: what it holds are the blocks as of its marker.
#[derive(Debug)]
pub struct Frozen {
    pub layer: Layer,
    pub snapshot: SnapshotShape,
    /// Entry of the marker: entries up to here belong to this layer or to one beneath.
    pub at: RaftIndex,
    /// Size of the volume as of the marker.
    pub blocks: u64,
    /// Its snapshot is gone: it is merged into the layer above once the log up to here is drained, and with it all that belongs here.
    pub removed: Option<Seq>,
}

impl Frozen {
    fn of_kept(row: &KeptRow, layer: Layer) -> Self {
        Self { layer, snapshot: row.snapshot.clone(), at: row.at, blocks: row.blocks, removed: None }
    }

    pub fn of_row(row: FrozenRow) -> Self {
        Self {
            layer: Layer::of_rows(row.layer, &row.pages),
            snapshot: row.snapshot,
            at: row.at,
            blocks: row.blocks,
            removed: row.removed.then_some(Seq(0)),
        }
    }

    pub fn row(&self) -> FrozenRow {
        let (layer, pages) = (self.layer.no.0, self.layer.rows());
        FrozenRow { layer, snapshot: self.snapshot.clone(), removed: self.removed.is_some(), at: self.at, blocks: self.blocks, pages }
    }
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
    pub live: Layer,
    /// Beneath the live layer, lowest first.
    pub frozen: Vec<Frozen>,
    /// Entry of the newest marker.
    pub since: RaftIndex,
    /// Of a clone: what its lowest layer lies over.
    pub origin: Option<LayerKey>,
    /// Snapshots that are proposed and not applied: writes behind them find no place in the layer that will be live.
    pub freezing: u32,
    /// Blocks whose newest version is in the log alone.
    pub undrained: u64,
    /// Of a volume with several replicas.
    pub member: Option<Box<crate::member::Member>>,
    /// Of one with which a host ever registered.
    pub guard: Option<Box<crate::reserve::Guard>>,
}

impl Replica {
    /// Whether all that the log had when the store was opened is applied again. Before that extents may hold more than the map knows, and match no
    /// checksum.
    pub fn has_caught_up(&self) -> bool {
        self.member.as_deref().is_none_or(|member| self.applied >= member.recovered)
    }

    pub fn usage(&self) -> ReplicaUsage {
        let snapshot_extents = self.frozen.iter().map(|frozen| frozen.layer.allocated).sum();
        ReplicaUsage { allocated_extents: self.live.allocated + snapshot_extents, snapshot_extents, undrained_blocks: self.undrained }
    }

    /// All layers, the live one last.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.frozen.iter().map(|frozen| &frozen.layer).chain([&self.live])
    }

    fn layer_mut(&mut self, no: LayerNo) -> Option<&mut Layer> {
        if no == self.live.no {
            return Some(&mut self.live);
        }
        let at = self.frozen.binary_search_by_key(&no, |frozen| frozen.layer.no).ok()?;
        Some(&mut self.frozen[at].layer)
    }

    #[inline]
    fn layer(&self, no: LayerNo) -> Option<&Layer> {
        if no == self.live.no {
            return Some(&self.live);
        }
        Some(&self.frozen(no)?.layer)
    }

    pub fn frozen(&self, no: LayerNo) -> Option<&Frozen> {
        let at = self.frozen.binary_search_by_key(&no, |frozen| frozen.layer.no).ok()?;
        Some(&self.frozen[at])
    }

    /// A layer that a snapshot holds.
    pub fn kept(&self, no: LayerNo) -> Option<&Frozen> {
        self.frozen(no).filter(|frozen| frozen.removed.is_none())
    }

    /// Whether a layer's snapshot is gone: blocks of it that the layer above covers may be anything.
    pub fn is_removed(&self, no: LayerNo) -> bool {
        self.frozen(no).is_some_and(|frozen| frozen.removed.is_some())
    }

    pub fn snapshot(&self, id: SnapshotId) -> Option<&Frozen> {
        self.frozen.iter().find(|frozen| frozen.snapshot.id == id && frozen.removed.is_none())
    }

    pub fn snapshots(&self) -> Vec<SnapshotView> {
        let view = |frozen: &Frozen| SnapshotView {
            snapshot: frozen.snapshot.clone(),
            layer: frozen.layer.no,
            at: frozen.at,
            blocks: frozen.blocks,
            allocated_extents: frozen.layer.allocated,
        };
        self.frozen.iter().filter(|frozen| frozen.removed.is_none()).map(view).collect()
    }

    /// Its layers as other members may have them; none where there never was a snapshot.
    pub fn stack(&self) -> Option<Stack> {
        let row =
            |frozen: &Frozen| KeptRow { layer: frozen.layer.no.0, at: frozen.at, blocks: frozen.blocks, snapshot: frozen.snapshot.clone() };
        let kept = self.frozen.iter().filter(|frozen| frozen.removed.is_none()).map(row).collect();
        (self.since.0 > 0).then_some(Stack { live: self.live.no.0, since: self.since, kept })
    }

    /// The lowest layer above `no` that a snapshot holds, or the live one; none above that.
    pub fn kept_above(&self, no: Option<LayerNo>) -> Option<LayerNo> {
        let kept = self.frozen.iter().filter(|frozen| frozen.removed.is_none()).map(|frozen| frozen.layer.no).chain([self.live.no]);
        kept.into_iter().find(|layer| no.is_none_or(|no| *layer > no))
    }

    /// The last entry that belongs to a frozen layer.
    pub fn end_of(&self, no: LayerNo) -> Option<RaftIndex> {
        self.frozen(no).map(|frozen| frozen.at)
    }

    /// The layer that was live at an entry.
    #[inline]
    pub fn layer_at(&self, index: u64) -> LayerKey {
        let layer = match self.frozen.last() {
            Some(newest) if index <= newest.at.0 => self.frozen[self.frozen.partition_point(|frozen| frozen.at.0 < index)].layer.no,
            _ => self.live.no,
        };
        LayerKey { replica: self.no, layer }
    }
}

/// What the map says of an extent, without loading anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Known<'a> {
    /// No page: all of it is as the layer beneath says.
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
    /// What a clone will stand on that is on its way into the log.
    pub held: Option<LayerKey>,
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

    /// The layer that a snapshot froze, even where that was removed since.
    fn frozen_by(&self, segment: SegmentId, snapshot: SnapshotId) -> Option<LayerKey> {
        let of = self.by_segment(segment).and_then(|of| self.live(of))?;
        let layer = of.frozen.iter().rev().find(|frozen| frozen.snapshot.id == snapshot)?.layer.no;
        Some(LayerKey { replica: of.no, layer })
    }

    /// A replica that was made in the log begins as a snapshot of an older one.
    pub fn stand_on(&mut self, no: ReplicaNo, segment: SegmentId, snapshot: SnapshotId) {
        let layer = self.frozen_by(segment, snapshot).filter(|layer| layer.replica < no);
        if let (Some(layer), Some(replica)) = (layer, self.get_mut(no).filter(|replica| !replica.deleting)) {
            replica.origin.get_or_insert(layer);
        }
    }

    /// Whether a replica stands on that snapshot.
    pub fn stands_on(&self, replica: &Replica, segment: SegmentId, snapshot: SnapshotId) -> bool {
        replica.origin.is_some() && replica.origin == self.frozen_by(segment, snapshot)
    }

    /// A clone that stands on a layer of a replica, or on any of them.
    pub fn clone_on(&self, no: ReplicaNo, layer: Option<LayerNo>) -> Option<&Replica> {
        let on = |origin: LayerKey| origin.replica == no && layer.is_none_or(|layer| origin.layer == layer);
        self.iter().find(|replica| replica.origin.is_some_and(on))
    }

    /// Whether a layer's snapshot is gone, and nothing stands on it any more.
    pub fn is_loose(&self, key: LayerKey) -> bool {
        let removed = self.get(key.replica).is_some_and(|replica| replica.is_removed(key.layer));
        removed && self.held != Some(key) && self.clone_on(key.replica, Some(key.layer)).is_none()
    }

    pub fn mark_deleting(&mut self, no: ReplicaNo) {
        if let Some(replica) = self.get_mut(no) {
            replica.deleting = true;
            // What it stood on may go before all of its own is given back.
            replica.origin = None;
            let segment = replica.shape.segment;
            if self.by_segment.get(&segment) == Some(&no) {
                self.by_segment.remove(&segment);
            }
        }
    }

    /// Forgets a replica whose pages are all gone.
    pub fn remove(&mut self, no: ReplicaNo) {
        let gone = self.replicas[no.0 as usize].take().expect("only a replica that stands is removed");
        assert!(gone.layers().all(|layer| layer.pages.is_empty()), "replica {no:?} went with pages left");
    }

    /// The layer of a replica that entries change.
    #[inline]
    pub fn live_layer(&self, no: ReplicaNo) -> LayerKey {
        LayerKey { replica: no, layer: self.get(no).map_or(LayerNo(0), |replica| replica.live.no) }
    }

    /// The layer that was live at an entry of a replica.
    #[inline]
    pub fn layer_at(&self, no: ReplicaNo, index: u64) -> LayerKey {
        self.get(no).map_or(LayerKey { replica: no, layer: LayerNo(0) }, |replica| replica.layer_at(index))
    }

    #[inline]
    pub fn layer(&self, key: LayerKey) -> Option<&Layer> {
        self.get(key.replica)?.layer(key.layer)
    }

    /// What a layer lies over.
    #[inline]
    pub fn beneath(&self, key: LayerKey) -> Option<LayerKey> {
        let replica = self.get(key.replica)?;
        match replica.frozen.partition_point(|frozen| frozen.layer.no < key.layer) {
            0 => replica.origin,
            above => Some(LayerKey { layer: replica.frozen[above - 1].layer.no, ..key }),
        }
    }

    /// A layer and all that it lies over, from the top.
    pub fn stack(&self, key: LayerKey) -> impl Iterator<Item = LayerKey> {
        std::iter::successors(Some(key), |key| self.beneath(*key))
    }

    /// The live layer becomes a snapshot's, and an empty one lies over it. Nothing where that is known already: a checkpoint may know of
    /// markers that are redone over it.
    pub fn freeze(&mut self, no: ReplicaNo, snapshot: SnapshotShape, blocks: u64, at: RaftIndex) {
        let Some(replica) = self.get_mut(no).filter(|replica| replica.since < at) else { return };
        replica.since = at;
        let live = Layer::empty(LayerNo(replica.live.no.0 + 1));
        let layer = std::mem::replace(&mut replica.live, live);
        replica.frozen.push(Frozen { layer, snapshot, at, blocks, removed: None });
    }

    /// A layer and the removed ones under it, which are to be merged into it, from the top. Together they say what another member's layer of that
    /// number says.
    pub fn fold(&self, key: LayerKey) -> impl Iterator<Item = LayerKey> {
        let is_removed = |key: &LayerKey| self.get(key.replica).is_some_and(|replica| replica.is_removed(key.layer));
        let beneath = self.stack(key).skip(1).take_while(move |beneath| beneath.replica == key.replica && is_removed(beneath));
        [key].into_iter().chain(beneath)
    }

    /// What a layer and the removed ones under it lie over.
    pub fn beneath_fold(&self, key: LayerKey) -> Option<LayerKey> {
        self.fold(key).last().and_then(|lowest| self.beneath(lowest))
    }

    /// The layers are those of another member from here on, as of an entry before which this one has applied all up to `applied`. The same again
    /// changes nothing, nor does what is older than is known here. What belongs to layers that go is in the log up to `seq` at most.
    pub fn restack(&mut self, no: ReplicaNo, stack: &Stack, applied: RaftIndex, seq: Seq) {
        let Some(replica) = self.get_mut(no) else { return };
        let live = replica.live.no.0;
        let is_kept = |frozen: &Frozen| stack.kept.iter().any(|row| row.layer == frozen.layer.no.0);
        for frozen in replica.frozen.iter_mut().filter(|frozen| frozen.layer.no.0 < stack.live && frozen.removed.is_none()) {
            if !is_kept(frozen) {
                frozen.removed = Some(seq);
            }
        }
        if live >= stack.live {
            return;
        }
        let top = std::mem::replace(&mut replica.live, Layer::empty(LayerNo(stack.live)));
        let mut rows = stack.kept.iter().filter(|row| row.layer >= live).peekable();
        if rows.peek().is_none_or(|row| row.layer > live) {
            // The others have merged it already: what of it was applied here is merged too.
            let at = RaftIndex(applied.0.max(replica.since.0 + 1));
            let snapshot = SnapshotShape { id: SnapshotId([0; 16]), name: String::new() };
            replica.frozen.push(Frozen { layer: top, snapshot, at, blocks: replica.shape.blocks, removed: Some(seq) });
        } else if let Some(row) = rows.next() {
            replica.frozen.push(Frozen::of_kept(row, top));
        }
        replica.frozen.extend(rows.map(|row| Frozen::of_kept(row, Layer::empty(LayerNo(row.layer)))));
        replica.since = stack.since;
    }

    /// Nothing of layers that are to be merged is beyond `seq` in the log.
    pub fn settle_removed(&mut self, no: ReplicaNo, seq: Seq) {
        let Some(replica) = self.get_mut(no) else { return };
        replica.frozen.iter_mut().filter_map(|frozen| frozen.removed.as_mut()).for_each(|by| *by = seq);
    }

    /// Something of a layer is in the log in batch `seq`: entries that are applied late, and blocks that are put back under a clone, may come after its
    /// snapshot has gone.
    #[inline]
    pub fn note_undrained(&mut self, layer: LayerKey, seq: Seq) {
        let Some(replica) = self.get_mut(layer.replica).filter(|replica| replica.live.no != layer.layer) else { return };
        let frozen = replica.frozen.iter_mut().find(|frozen| frozen.layer.no == layer.layer);
        frozen.and_then(|frozen| frozen.removed.as_mut()).into_iter().for_each(|by| *by = seq.max(*by));
    }

    /// A snapshot is gone; what belongs to its layer is in the log up to `seq` at most.
    pub fn unsnapshot(&mut self, no: ReplicaNo, id: SnapshotId, seq: Seq) {
        let Some(replica) = self.get_mut(no) else { return };
        if let Some(frozen) = replica.frozen.iter_mut().find(|frozen| frozen.snapshot.id == id && frozen.removed.is_none()) {
            frozen.removed = Some(seq);
        }
    }

    /// The log was redone up to `seq`: so far it may hold something of any removed layer.
    pub fn redone(&mut self, seq: Seq) {
        let removed =
            self.replicas.iter_mut().flatten().flat_map(|replica| &mut replica.frozen).filter_map(|frozen| frozen.removed.as_mut());
        removed.for_each(|by| *by = seq);
    }

    /// Forgets a removed layer whose pages are all gone.
    pub fn drop_layer(&mut self, key: LayerKey) {
        let Some(replica) = self.get_mut(key.replica) else { return };
        replica.frozen.retain(|frozen| frozen.layer.no != key.layer || !frozen.layer.pages.is_empty());
    }

    #[inline]
    pub fn known(&self, layer: LayerKey, extent: u32) -> Known<'_> {
        let (key, at) = PageKey::of(layer, extent);
        let Some(layer) = self.layer(layer) else { return Known::Nothing };
        match layer.pages.get(&key.page_no) {
            None => Known::Nothing,
            Some(PageState { cached: Some(page), .. }) => Known::Entry(&page.extents[at]),
            Some(_) => Known::NotLoaded,
        }
    }

    pub fn page(&self, key: PageKey) -> Option<&PageState> {
        self.layer(key.layer)?.pages.get(&key.page_no)
    }

    fn layer_mut(&mut self, key: LayerKey) -> Option<&mut Layer> {
        self.get_mut(key.replica)?.layer_mut(key.layer)
    }

    pub fn page_mut(&mut self, key: PageKey) -> Option<&mut PageState> {
        self.layer_mut(key.layer)?.pages.get_mut(&key.page_no)
    }

    /// The entry of an extent for changing; makes the page if there is none. The page must not be one that is not loaded.
    pub fn entry_mut(&mut self, layer: LayerKey, extent: u32) -> &mut ExtentEntry {
        let (key, at) = PageKey::of(layer, extent);
        let replica = self.replicas[layer.replica.0 as usize].as_deref_mut().expect("entries change of replicas that stand");
        let page =
            replica.layer_mut(layer.layer).expect("entries change of layers that stand").pages.entry(key.page_no).or_insert_with(|| {
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
    pub fn set_place(&mut self, layer: LayerKey, extent: u32, place: u32) {
        let entry = self.entry_mut(layer, extent);
        let was = std::mem::replace(&mut entry.place, place);
        let change = i8::from(place != UNALLOCATED) - i8::from(was != UNALLOCATED);
        let key = PageKey::of(layer, extent).0;
        let layer = self.layer_mut(layer).expect("its entry was just changed");
        layer.allocated = layer.allocated.checked_add_signed(i64::from(change)).expect("an extent is counted once");
        let page = layer.pages.get_mut(&key.page_no).expect("its entry was just changed");
        page.extents = page.extents.map(|count| count.checked_add_signed(change).expect("an extent is counted once"));
    }

    /// So many blocks of a replica, if it stands, are in the log alone now, or no longer.
    /// Blocks of all replicas that the log alone holds.
    pub fn undrained_blocks(&self) -> u64 {
        self.replicas.iter().flatten().map(|replica| replica.undrained).sum()
    }

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
        let layer = self.layer_mut(key.layer).expect("its page was just there");
        layer.allocated = layer.allocated - was + u64::from(count);
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
        let layer = self.layer_mut(key.layer)?;
        let state = layer.pages.remove(&key.page_no)?;
        layer.allocated -= u64::from(state.extents.unwrap_or(0));
        if state.cached.is_some() {
            self.cached -= 1;
        }
        state.on_disk.map(|(slot, _)| slot)
    }

    pub fn cached(&self) -> u64 {
        self.cached
    }
}
