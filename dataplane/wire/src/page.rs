//! Pages of a replica's map: where 48 extents of a volume lie, what each block is, and its checksum.

use crate::codec::{PREFIX, Put, Take, seal, unseal};
use crate::{BLOCK, DecodeError, EXTENT_BLOCKS, Incarnation};

const MAGIC: &[u8; 8] = b"PENSMAP1";
const VERSION: u32 = 1;
const WHAT: &str = "map page";
/// Extents that one page maps: 3 MiB of a volume.
pub const EXTENTS_PER_PAGE: usize = 48;
/// Last page of the largest volume.
pub const PAGE_NO_MAX: u32 = ((crate::VOLUME_BLOCKS_MAX / EXTENT_BLOCKS - 1) / EXTENTS_PER_PAGE as u64) as u32;
const HEAD: usize = 64;
const ENTRY: usize = 80;
const _: () = assert!(HEAD + EXTENTS_PER_PAGE * ENTRY <= BLOCK);
/// An extent that has no place on the drive.
pub const UNALLOCATED: u32 = u32::MAX;

/// What a block of a layer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockState {
    /// As the layer beneath says; zeros where there is none.
    Inherit,
    Zero,
    /// In the extent, under its checksum.
    Data,
    /// Its bytes are gone: reads fail until it is written.
    Lost,
}

/// One extent of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExtentEntry {
    /// Extent number on the store, or [`UNALLOCATED`].
    pub place: u32,
    /// Two bits a block, block 0 lowest.
    states: u32,
    /// Raft index of the last entry that changed it: what changed between two points is known without reading data.
    pub changed: u64,
    /// Checksum of each block that is data; 0 elsewhere.
    pub crcs: [u32; EXTENT_BLOCKS as usize],
}

impl ExtentEntry {
    pub const EMPTY: Self = Self { place: UNALLOCATED, states: 0, changed: 0, crcs: [0; EXTENT_BLOCKS as usize] };

    #[inline]
    pub fn state(&self, block: usize) -> BlockState {
        match self.states >> (2 * block) & 3 {
            0 => BlockState::Inherit,
            1 => BlockState::Zero,
            2 => BlockState::Data,
            _ => BlockState::Lost,
        }
    }

    /// Sets a block's state; `crc` counts for data alone.
    pub fn set(&mut self, block: usize, state: BlockState, crc: u32) {
        let bits = match state {
            BlockState::Inherit => 0,
            BlockState::Zero => 1,
            BlockState::Data => 2,
            BlockState::Lost => 3,
        };
        self.states = self.states & !(3 << (2 * block)) | bits << (2 * block);
        self.crcs[block] = if state == BlockState::Data { crc } else { 0 };
    }

    /// Whether any block needs the extent's place.
    pub fn has_data(&self) -> bool {
        // Data is 0b10: the high bit without the low one.
        self.states >> 1 & !self.states & 0x5555_5555 != 0
    }

    /// Whether the entry says nothing: a page of such entries need not exist.
    pub fn is_empty(&self) -> bool {
        self.states == 0 && self.place == UNALLOCATED
    }
}

/// A page in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    pub extents: [ExtentEntry; EXTENTS_PER_PAGE],
}

impl Page {
    pub fn empty() -> Box<Self> {
        Box::new(Self { extents: [ExtentEntry::EMPTY; EXTENTS_PER_PAGE] })
    }

    pub fn is_empty(&self) -> bool {
        self.extents.iter().all(ExtentEntry::is_empty)
    }

    /// Extents that have their place here.
    pub fn places(&self) -> u8 {
        self.extents.iter().filter(|entry| entry.place != UNALLOCATED).count() as u8
    }
}

/// Which page it is: part of what its checksum covers, so that a misdirected page is not believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageName {
    pub incarnation: Incarnation,
    pub replica: u32,
    /// 0 until snapshots come.
    pub layer: u32,
    pub page_no: u32,
}

/// Fills `block` with the sealed page; returns the CRC-32C of the whole block, which the directory keeps.
pub fn encode_into(block: &mut [u8], name: &PageName, checkpoint: u64, page: &Page) -> u32 {
    assert_eq!(block.len(), BLOCK);
    let mut w = Put::new(block, PREFIX);
    w.bytes(&name.incarnation.0);
    w.u32(name.replica);
    w.u32(name.layer);
    w.u32(name.page_no);
    w.u32(0);
    w.u64(checkpoint);
    w.u64(0);
    for extent in &page.extents {
        w.u32(extent.place);
        w.u32(extent.states);
        w.u64(extent.changed);
        for crc in extent.crcs {
            w.u32(crc);
        }
    }
    let end = w.at();
    block[end..].fill(0);
    seal(block, MAGIC, VERSION);
    crate::crc32c(block)
}

/// Decodes a page that must be `name` and fit a store of `extents`.
///
/// # Errors
/// When the bytes are not that page.
pub fn decode(block: &[u8], name: &PageName, extents: u64) -> Result<Box<Page>, DecodeError> {
    unseal(block, WHAT, MAGIC, VERSION)?;
    let mut r = Take::new(block, PREFIX, WHAT);
    let found = PageName { incarnation: Incarnation(r.id()?), replica: r.u32()?, layer: r.u32()?, page_no: r.u32()? };
    if found != *name {
        return Err(DecodeError::Mismatch { what: WHAT, found: format!("{found:?}"), expected: format!("{name:?}") });
    }
    r.u32()?;
    r.u64()?;
    r.u64()?;
    let mut page = Page::empty();
    for entry in &mut page.extents {
        entry.place = r.u32()?;
        entry.states = r.u32()?;
        entry.changed = r.u64()?;
        for crc in &mut entry.crcs {
            *crc = r.u32()?;
        }
        if entry.place != UNALLOCATED && u64::from(entry.place) >= extents {
            return Err(DecodeError::Limit { what: "place of an extent", found: u64::from(entry.place), limit: extents });
        }
        if entry.has_data() && entry.place == UNALLOCATED {
            return Err(DecodeError::Value { what: "place of an extent with data", found: u64::from(entry.place) });
        }
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{PAGE_EXTENTS, page, page_name};
    use proptest::prelude::*;

    #[test]
    fn page_round_trips_under_its_name_alone() {
        let name = page_name();
        let mut block = vec![1; BLOCK];
        let crc = encode_into(&mut block, &name, 6, &page());
        assert_eq!(crc, crate::crc32c(&block));
        assert_eq!(decode(&block, &name, PAGE_EXTENTS).unwrap(), page());
        assert!(matches!(decode(&block, &PageName { page_no: 9, ..name }, PAGE_EXTENTS), Err(DecodeError::Mismatch { .. })));
        assert!(matches!(decode(&block, &name, PAGE_EXTENTS - 1), Err(DecodeError::Limit { .. })));
    }

    #[test]
    fn states_are_two_bits_each_and_only_data_needs_a_place() {
        let page = page();
        let first = &page.extents[0];
        let states = [0, 1, 3, 15].map(|block| first.state(block));
        assert_eq!(states, [BlockState::Zero, BlockState::Inherit, BlockState::Data, BlockState::Lost]);
        assert!(first.has_data() && !page.extents[1].has_data());
        let mut zero = ExtentEntry::EMPTY;
        zero.set(0, BlockState::Zero, 7);
        assert_eq!(zero.crcs[0], 0, "a zero block carries no checksum");
        assert!(!zero.has_data());
        let mut lost = ExtentEntry::EMPTY;
        lost.set(1, BlockState::Lost, 0);
        assert!(!lost.has_data() && !lost.is_empty());
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_seen(bit in 0..BLOCK * 8) {
            let mut block = vec![0; BLOCK];
            encode_into(&mut block, &page_name(), 6, &page());
            block[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode(&block, &page_name(), PAGE_EXTENTS).is_err());
        }

        #[test]
        fn any_sealed_bytes_decode_or_fail_cleanly(mut block in proptest::collection::vec(any::<u8>(), BLOCK)) {
            seal(&mut block, MAGIC, VERSION);
            let _ = decode(&block, &page_name(), PAGE_EXTENTS);
        }
    }
}
