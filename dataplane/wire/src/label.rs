//! The drive's label: whose it is, and how it is cut into stores. Written once at format, in block 0 and again in the last block.

use crate::codec::{PREFIX, Put, Take, seal, unseal};
use crate::{BLOCK, BlockAddr, ClusterId, DecodeError, DriveId, EXTENT_BLOCKS, Incarnation, NodeId};

const MAGIC: &[u8; 8] = b"PENSTOCK";
const VERSION: u32 = 1;
const WHAT: &str = "drive label";
/// Most stores a drive can be cut into.
pub const STORES_MAX: usize = 64;
/// Smallest ring in blocks: the batches that may be out, twice over. 8 MiB.
pub const RING_BLOCKS_MIN: u64 = 2048;
/// Largest ring in blocks: places in it fit 31 bits. 4 TiB.
pub const RING_BLOCKS_MAX: u64 = 1 << 30;
/// Fewest extents of a store. 8 MiB.
pub const EXTENTS_MIN: u64 = 128;
/// Most extents of a store: slots of map pages are 32-bit block numbers. 8 TiB.
pub const EXTENTS_MAX: u64 = 1 << 27;
/// Blocks before the ring: the superblock's two slots, each with a copy.
const SUPERBLOCKS: u64 = 4;

/// A store's share of the drive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Share {
    /// First block on the drive.
    pub start: BlockAddr,
    pub blocks: u64,
    pub ring_blocks: u64,
}

/// Where things lie within a store, in store blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    pub ring_start: BlockAddr,
    pub ring_blocks: u64,
    pub extents_start: BlockAddr,
    pub extents: u64,
}

impl Geometry {
    /// Where a superblock with this write count lies: first its own block, then its copy, written in that order with a
    /// barrier between them. So a torn write leaves the slot before, and rot of one block leaves its copy.
    pub fn superblock_slots(write_count: u64) -> [BlockAddr; 2] {
        let first = write_count % 2 * 2;
        [BlockAddr(first), BlockAddr(first + 1)]
    }
    /// Blocks that hold superblocks, from the store's start.
    pub const SUPERBLOCK_BLOCKS: u32 = SUPERBLOCKS as u32;

    /// # Errors
    /// When the share is too small for its ring and the fewest extents.
    pub fn of(share: &Share) -> Result<Self, DecodeError> {
        if share.ring_blocks < RING_BLOCKS_MIN || share.ring_blocks > RING_BLOCKS_MAX {
            let limit = if share.ring_blocks < RING_BLOCKS_MIN { RING_BLOCKS_MIN } else { RING_BLOCKS_MAX };
            return Err(DecodeError::Limit { what: "ring blocks", found: share.ring_blocks, limit });
        }
        let extents_start = (SUPERBLOCKS + share.ring_blocks).next_multiple_of(EXTENT_BLOCKS);
        let extents = share.blocks.saturating_sub(extents_start) / EXTENT_BLOCKS;
        if extents < EXTENTS_MIN {
            return Err(DecodeError::Limit { what: "extents of a store (too few)", found: extents, limit: EXTENTS_MIN });
        }
        let extents = extents.min(EXTENTS_MAX);
        Ok(Self { ring_start: BlockAddr(SUPERBLOCKS), ring_blocks: share.ring_blocks, extents_start: BlockAddr(extents_start), extents })
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Label {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub drive: DriveId,
    pub incarnation: Incarnation,
    /// Blocks of the drive at format. A larger drive is fine; a smaller one is refused.
    pub drive_blocks: u64,
    pub stores: Vec<Share>,
}

impl Label {
    /// Cuts a drive of `drive_blocks` into `stores` equal shares, each with a ring of `ring_blocks`.
    ///
    /// # Errors
    /// When the shares would be too small.
    pub fn plan(
        cluster: ClusterId,
        node: NodeId,
        drive: DriveId,
        incarnation: Incarnation,
        drive_blocks: u64,
        stores: usize,
        ring_blocks: u64,
    ) -> Result<Self, DecodeError> {
        if stores == 0 || stores > STORES_MAX {
            return Err(DecodeError::Limit { what: "stores of a drive", found: stores as u64, limit: STORES_MAX as u64 });
        }
        let share = drive_blocks.saturating_sub(2) / stores as u64;
        let stores = (0..stores as u64).map(|i| Share { start: BlockAddr(1 + i * share), blocks: share, ring_blocks }).collect();
        let label = Self { cluster, node, drive, incarnation, drive_blocks, stores };
        label.check()?;
        Ok(label)
    }

    fn check(&self) -> Result<(), DecodeError> {
        let mut next = 1;
        for share in &self.stores {
            if share.start.0 < next {
                return Err(DecodeError::Value { what: "start of a store (overlaps)", found: share.start.0 });
            }
            next = share.start.0.checked_add(share.blocks).ok_or(DecodeError::Value { what: "size of a store", found: share.blocks })?;
            Geometry::of(share)?;
        }
        // The last block is the label's copy.
        if next.checked_add(1).is_none_or(|end| end > self.drive_blocks) {
            return Err(DecodeError::Limit { what: "end of the last store", found: next, limit: self.drive_blocks });
        }
        Ok(())
    }

    /// One block.
    pub fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        let mut w = Put::new(&mut block, PREFIX);
        w.bytes(&self.cluster.0);
        w.bytes(&self.node.0);
        w.bytes(&self.drive.0);
        w.bytes(&self.incarnation.0);
        w.u64(self.drive_blocks);
        w.u32(self.stores.len() as u32);
        w.u32(0);
        for share in &self.stores {
            w.u64(share.start.0);
            w.u64(share.blocks);
            w.u64(share.ring_blocks);
        }
        seal(&mut block, MAGIC, VERSION);
        block
    }

    /// # Errors
    /// When `block` is not a whole label that this build reads.
    pub fn decode(block: &[u8]) -> Result<Self, DecodeError> {
        unseal(block, WHAT, MAGIC, VERSION)?;
        let mut r = Take::new(block, PREFIX, WHAT);
        let cluster = ClusterId(r.id()?);
        let node = NodeId(r.id()?);
        let drive = DriveId(r.id()?);
        let incarnation = Incarnation(r.id()?);
        let drive_blocks = r.u64()?;
        let count = r.u32()? as usize;
        r.u32()?;
        if count == 0 || count > STORES_MAX {
            return Err(DecodeError::Limit { what: "stores of a drive", found: count as u64, limit: STORES_MAX as u64 });
        }
        let mut stores = Vec::with_capacity(count);
        for _ in 0..count {
            stores.push(Share { start: BlockAddr(r.u64()?), blocks: r.u64()?, ring_blocks: r.u64()? });
        }
        let label = Self { cluster, node, drive, incarnation, drive_blocks, stores };
        label.check()?;
        Ok(label)
    }

    /// Whether `block` starts like a label, however damaged the rest: such a drive is not blank.
    pub fn looks_like(block: &[u8]) -> bool {
        block.starts_with(MAGIC)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::label;
    use proptest::prelude::*;

    #[test]
    fn label_round_trips() {
        assert_eq!(Label::decode(&label().encode()).unwrap(), label());
    }

    #[test]
    fn label_of_too_small_a_drive_is_refused() {
        let made = Label::plan(ClusterId([1; 16]), NodeId([2; 16]), DriveId([3; 16]), Incarnation([4; 16]), 4500, 1, 4096);
        assert!(matches!(made, Err(DecodeError::Limit { .. })), "{made:?}");
    }

    #[test]
    fn shares_do_not_overlap_and_leave_the_copy_its_block() {
        let label = Label::plan(ClusterId([1; 16]), NodeId([2; 16]), DriveId([3; 16]), Incarnation([4; 16]), 100_000, 2, 8192).unwrap();
        assert!(label.stores[0].start.0 + label.stores[0].blocks <= label.stores[1].start.0);
        assert!(label.stores[1].start.0 + label.stores[1].blocks < label.drive_blocks);
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_seen(bit in 0..BLOCK * 8) {
            let mut block = label().encode();
            block[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Label::decode(&block).is_err());
        }

        #[test]
        fn any_sealed_bytes_decode_or_fail_cleanly(mut block in proptest::collection::vec(any::<u8>(), BLOCK)) {
            seal(&mut block, MAGIC, VERSION);
            let _ = Label::decode(&block);
        }
    }
}
