//! What a member of a group holds and what its volume's blocks are, for those who judge it from outside: the simulator, and tests.
//!
//! Not here: what people are shown ([`Store::view`]). Nothing of this is cheap, and nothing of the store uses it; one thing of it makes a state wrong
//! ([`Store::falsify`]).

use crate::audit::AuditError;
use crate::index::{GroupKey, Slot, Version};
use crate::map::{Known, LayerKey, PageKey};
use crate::member::MemberStage;
use crate::port::{LayerNo, ReplicaNo};
use crate::replica::{Ballot, GroupView};
use crate::store::Store;
use penstock_wire::page::{BlockState, EXTENTS_PER_PAGE};
use penstock_wire::peer::{Entry, MemberNo};
use penstock_wire::{BLOCK, BlockAddr, EXTENT_BLOCKS, Index, Term};
use std::collections::BTreeMap;

/// A member from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemberLook {
    pub me: MemberNo,
    /// `None` while it is doubtful, and once it has stopped.
    pub view: Option<GroupView>,
    pub doubtful: bool,
    /// The others believe its drive.
    pub admitted: bool,
    pub stopped: bool,
    /// Its blocks are being copied from another: they are not what its applied index says.
    pub rebuilding: bool,
    /// It is a clone's, over the origin's layer on this store.
    pub stands: bool,
    pub applied: Index,
    pub applied_term: Term,
    /// Newest that went into the stream.
    pub ballot: Ballot,
    /// The entry before the first of its log, and its term.
    pub start: Index,
    pub start_term: Term,
    pub last: Index,
}

/// Checksum of each block of a volume that is not zeros; `None` for one that is lost.
pub type Contents = BTreeMap<u64, Option<u32>>;

impl Store {
    /// The member that a replica is, if it is one.
    pub fn look(&self, no: ReplicaNo) -> Option<MemberLook> {
        let replica = self.map.get(no)?;
        let member = replica.member.as_ref()?;
        let view = if let MemberStage::Up(group) = &member.stage { group.view() } else { None };
        Some(MemberLook {
            me: member.me,
            view,
            doubtful: member.doubts.is_some(),
            admitted: member.admission.admitted,
            stopped: matches!(member.stage, MemberStage::Stopped(_)),
            rebuilding: member.rebuild.is_some(),
            stands: replica.origin.is_some(),
            applied: replica.applied,
            applied_term: member.applied_term,
            ballot: member.ballot,
            start: member.start,
            start_term: member.start_term,
            last: member.last(),
        })
    }

    /// What a member's log has of the entries from `first` to `last`.
    pub fn logged(&self, no: ReplicaNo, first: Index, last: Index) -> Vec<Entry> {
        let member = self.map.get(no).and_then(|replica| replica.member.as_ref());
        let entries = member.map(|member| (first.0..=last.0).filter_map(|index| member.get(Index(index))));
        entries.map(|entries| entries.map(|logged| logged.entry.clone()).collect()).unwrap_or_default()
    }

    /// What a volume's blocks are as of what is applied. `read` gives blocks of the store, for map pages that are not loaded.
    ///
    /// # Errors
    /// When a page cannot be read.
    pub fn contents(&self, no: ReplicaNo, read: impl FnMut(BlockAddr) -> [u8; BLOCK]) -> Result<Contents, AuditError> {
        self.contents_of(self.map.live_layer(no), read)
    }

    /// The same of a snapshot, which froze a layer.
    ///
    /// # Errors
    /// When a page cannot be read.
    pub fn snapshot_contents(
        &self,
        replica: ReplicaNo,
        layer: LayerNo,
        read: impl FnMut(BlockAddr) -> [u8; BLOCK],
    ) -> Result<Contents, AuditError> {
        self.contents_of(LayerKey { replica, layer }, read)
    }

    /// Makes the map name another checksum for a block of the live layer, or call it zeros: with such bytes where it says it is a state that is silently wrong, and
    /// has all checksums right. For those who check that it is found. False: the block does not rest at this place.
    pub fn falsify(&mut self, no: ReplicaNo, block: u64, place: BlockAddr, crc: Option<u32>) -> bool {
        let (layer, extent, at) = (self.map.live_layer(no), (block / EXTENT_BLOCKS) as u32, (block % EXTENT_BLOCKS) as usize);
        let Known::Entry(entry) = self.map.known(layer, extent) else { return false };
        let is_there = entry.state(at) == BlockState::Data && self.extent_block(entry.place, at as u64) == place;
        let moves = !self.drain.is_idle() || !self.checkpoint.is_idle() || self.index.find(GroupKey { layer, extent }).is_some();
        if !is_there || moves {
            return false;
        }
        let state = if crc.is_some() { BlockState::Data } else { BlockState::Inherit };
        self.map.entry_mut(layer, extent).set(at, state, crc.unwrap_or(0));
        self.drain.unsaved = true;
        true
    }

    fn contents_of(&self, layer: LayerKey, mut read: impl FnMut(BlockAddr) -> [u8; BLOCK]) -> Result<Contents, AuditError> {
        let mut contents = Contents::new();
        // What lies above covers what lies beneath.
        let stack: Vec<LayerKey> = self.map.stack(layer).collect();
        for layer in stack.into_iter().rev() {
            self.lay_over(&mut contents, layer, &mut read)?;
        }
        Ok(contents)
    }

    fn lay_over(&self, contents: &mut Contents, of: LayerKey, read: &mut impl FnMut(BlockAddr) -> [u8; BLOCK]) -> Result<(), AuditError> {
        let Some(layer) = self.map.layer(of) else { return Ok(()) };
        // Of these the page's word is out of date.
        let said = |slot: &Option<Slot>| matches!(slot, Some(Slot { version: Version::Inherit, .. }));
        let inherits = |extent: usize, at: usize| {
            self.index.find(GroupKey { layer: of, extent: extent as u32 }).is_some_and(|id| said(&self.index.group(id).slots[at]))
        };
        for (page_no, state) in &layer.pages {
            let loaded;
            let page = match (&state.cached, state.on_disk) {
                (Some(page), _) => page,
                (None, Some((slot, _))) => {
                    let key = PageKey { layer: of, page_no: *page_no };
                    let block = read(self.extent_block(0, u64::from(slot.0)));
                    loaded = penstock_wire::page::decode(&block, &self.page_name(key), self.space.extents())
                        .map_err(|error| AuditError::Other(format!("page {key:?}: {error}")))?;
                    &loaded
                }
                (None, None) => continue,
            };
            for (i, entry) in page.extents.iter().enumerate() {
                let extent = *page_no as usize * EXTENTS_PER_PAGE + i;
                let first = extent as u64 * EXTENT_BLOCKS;
                for at in (0..EXTENT_BLOCKS as usize).filter(|at| !inherits(extent, *at)) {
                    match entry.state(at) {
                        BlockState::Data => contents.insert(first + at as u64, Some(entry.crcs[at])),
                        BlockState::Lost => contents.insert(first + at as u64, None),
                        BlockState::Zero => contents.remove(&(first + at as u64)),
                        BlockState::Inherit => None,
                    };
                }
            }
        }
        for group in self.index.iter().filter(|group| group.key.layer == of) {
            for (at, slot) in group.slots.iter().enumerate() {
                let block = u64::from(group.key.extent) * EXTENT_BLOCKS + at as u64;
                match slot.map(|slot| slot.version) {
                    Some(Version::Log { crc, .. }) => contents.insert(block, Some(crc)),
                    Some(Version::Lost) => contents.insert(block, None),
                    Some(Version::Zero) => contents.remove(&block),
                    Some(Version::Inherit) | None => None,
                };
            }
        }
        Ok(())
    }
}
