//! The store's books, checked: every extent is taken exactly once by what refers to it, and nothing else is taken.
//!
//! For tests, the simulator and offline checks; walks everything.

use crate::alloc::ExtentNo;
use crate::index::{GroupKey, Version};
use crate::map::{Known, LayerKey, PageKey};
use crate::store::Store;
use penstock_wire::page::{BlockState, UNALLOCATED};
use penstock_wire::{BLOCK, BlockAddr, EXTENT_BLOCKS};
use rustc_hash::FxHashMap;
use thiserror::Error;

#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum AuditError {
    #[error("extent {extent} is used by {first} and by {second}")]
    UsedTwice { extent: u32, first: String, second: String },
    #[error("extent {extent} is used by {user} and not marked taken")]
    NotTaken { extent: u32, user: String },
    #[error("{taken} extents are marked taken, {reachable} are reachable")]
    Leaked { taken: u64, reachable: u64 },
    #[error("promises of space: {promised} stand, {held} are held by undrained extents")]
    Promises { promised: u64, held: u64 },
    #[error("replica {replica} layer {layer} extent {extent} waits for the drain, has no place, and no space is promised to it")]
    Unpromised { replica: u32, layer: u32, extent: u32 },
    #[error("replica {replica} layer {layer} extent {extent} waits for the drain, and its layer is to be merged without that")]
    Unwaited { replica: u32, layer: u32, extent: u32 },
    #[error("replica {replica} counts {counted} {what}, it has {found}")]
    Usage { replica: u32, what: &'static str, counted: u64, found: u64 },
    #[error("{0}")]
    Other(String),
}

impl Store {
    /// Checks the books of a quiescent store. `read` gives a block of the store as the device has it.
    ///
    /// # Errors
    /// The first thing that does not add up. Extents of pages that could not be read count as leaked: expect that after
    /// corruption of a page was injected.
    pub fn audit(&self, mut read: impl FnMut(BlockAddr) -> [u8; BLOCK]) -> Result<(), AuditError> {
        let mut used: FxHashMap<u32, String> = FxHashMap::default();
        let mut claim = |extent: u32, user: String| -> Result<(), AuditError> {
            if !self.space.is_taken(ExtentNo(extent)) {
                return Err(AuditError::NotTaken { extent, user });
            }
            match used.insert(extent, user.clone()) {
                Some(first) => Err(AuditError::UsedTwice { extent, first, second: user }),
                None => Ok(()),
            }
        };
        for extent in self.checkpoint.chain_extents() {
            claim(extent.0, "the directory".into())?;
        }
        for extent in self.space.paged() {
            claim(extent.0, "map pages".into())?;
        }
        for replica in self.map.iter() {
            let mut allocated = 0;
            let pages = replica.layers().flat_map(|layer| layer.pages.iter().map(|(page_no, state)| (layer.no, *page_no, state)));
            for (layer, page_no, state) in pages {
                let key = PageKey { layer: LayerKey { replica: replica.no, layer }, page_no };
                let loaded;
                let page = match (&state.cached, state.on_disk) {
                    (Some(page), _) => page,
                    (None, Some((slot, _))) => {
                        let block = read(self.extent_block(0, u64::from(slot.0)));
                        loaded = penstock_wire::page::decode(&block, &self.page_name(key), self.space.extents())
                            .map_err(|error| AuditError::Other(format!("page {key:?}: {error}")))?;
                        &loaded
                    }
                    (None, None) => return Err(AuditError::Other(format!("page {key:?} is nowhere"))),
                };
                for (i, entry) in page.extents.iter().enumerate() {
                    if entry.place != UNALLOCATED {
                        allocated += 1;
                        claim(
                            entry.place,
                            format!("replica {} layer {} extent {}", replica.no.0, layer.0, page_no as usize * page.extents.len() + i),
                        )?;
                    }
                }
            }
            let counted = replica.usage().allocated_extents;
            if counted != allocated {
                return Err(AuditError::Usage { replica: replica.no.0, what: "extents", counted, found: allocated });
            }
            let in_log = self.index.iter().filter(|group| group.key.layer.replica == replica.no).map(|group| group.in_log() as u64).sum();
            if replica.undrained != in_log {
                let (counted, what) = (replica.undrained, "undrained blocks");
                return Err(AuditError::Usage { replica: replica.no.0, what, counted, found: in_log });
            }
        }
        let (taken, reachable) = (self.space.taken(), used.len() as u64);
        if taken != reachable {
            return Err(AuditError::Leaked { taken, reachable });
        }
        self.audit_promises()
    }

    /// Checks that whatever is to be drained has its place, or space that was promised to it, and that merges wait for it. Walks what is not drained, and
    /// nothing else.
    ///
    /// # Errors
    /// The first that does not.
    pub fn audit_promises(&self) -> Result<(), AuditError> {
        for group in self.index.iter() {
            let GroupKey { layer, extent } = group.key;
            let newest = group.slots.iter().flatten().map(|slot| slot.seq).max();
            if self.merges_after(layer).is_some_and(|by| newest > Some(by)) {
                return Err(AuditError::Unwaited { replica: layer.replica.0, layer: layer.layer.0, extent });
            }
        }
        for group in self.index.iter().filter(|group| group.in_log() > 0 && !group.promised && !group.draining) {
            let GroupKey { layer, extent } = group.key;
            let placed = match self.map.known(layer, extent) {
                Known::Entry(entry) => entry.place != UNALLOCATED,
                Known::Nothing => false,
                Known::NotLoaded => true,
            };
            if !placed && self.map.live(layer.replica).is_some() {
                return Err(AuditError::Unpromised { replica: layer.replica.0, layer: layer.layer.0, extent });
            }
        }
        let held = self.index.iter().filter(|group| group.promised).count() as u64;
        let proposed = self.host.promises() + self.stream.promises() + self.groups_promises();
        if self.space.promised() != held + proposed {
            return Err(AuditError::Promises { promised: self.space.promised(), held: held + proposed });
        }
        Ok(())
    }

    /// Every block of a volume that holds data, in whatever layer, with its checksum and place: for tests that corrupt on purpose.
    pub fn data_blocks(&self) -> Vec<(crate::ReplicaNo, u64, BlockAddr, u32)> {
        let mut blocks = Vec::new();
        for replica in self.map.iter().filter(|replica| !replica.deleting) {
            for (page_no, state) in replica.layers().flat_map(|layer| &layer.pages) {
                let Some(page) = &state.cached else { continue };
                for (i, entry) in page.extents.iter().enumerate() {
                    let extent = u64::from(*page_no) * page.extents.len() as u64 + i as u64;
                    for at in 0..EXTENT_BLOCKS {
                        if entry.state(at as usize) == BlockState::Data {
                            let place = self.extent_block(entry.place, at);
                            blocks.push((replica.no, extent * EXTENT_BLOCKS + at, place, entry.crcs[at as usize]));
                        }
                    }
                }
            }
        }
        for group in self.index.iter() {
            for (at, slot) in group.slots.iter().enumerate() {
                if let Some(crate::index::Slot { version: Version::Log { at: ring, crc }, .. }) = slot {
                    blocks.push((
                        group.key.layer.replica,
                        u64::from(group.key.extent) * EXTENT_BLOCKS + at as u64,
                        self.ring_block(*ring),
                        *crc,
                    ));
                }
            }
        }
        blocks.sort_unstable_by_key(|(replica, block, place, _)| (*replica, *block, *place));
        blocks
    }
}
