//! What a blank drive is written with: the label twice, and for each store a first superblock.

use penstock_wire::label::{Geometry, Label};
use penstock_wire::superblock::Superblock;
use penstock_wire::{BLOCK, BlockAddr, DecodeError};

/// Blocks to write on the drive, in order; a barrier belongs before the last, which is what makes the drive ours.
///
/// The blocks before it wipe each store's superblocks and the first block of its ring, so that a drive that had an earlier
/// life starts clean (its records carry another incarnation besides).
///
/// # Errors
/// When the label's shares are too small.
pub fn format(label: &Label) -> Result<Vec<(BlockAddr, Vec<u8>)>, DecodeError> {
    let mut blocks = Vec::new();
    for (no, share) in label.stores.iter().enumerate() {
        let geometry = Geometry::of(share)?;
        let first = Superblock::first(label.incarnation, no as u32);
        let mut block = vec![0; BLOCK];
        for other in Geometry::superblock_slots(0) {
            blocks.push((share.start.plus(other.0), block.clone()));
        }
        blocks.push((share.start.plus(geometry.ring_start.0), block.clone()));
        first.encode_into(&mut block);
        for slot in Geometry::superblock_slots(first.write_count) {
            blocks.push((share.start.plus(slot.0), block.clone()));
        }
    }
    let block = label.encode();
    blocks.push((BlockAddr(label.drive_blocks - 1), block.clone()));
    blocks.push((BlockAddr(0), block));
    Ok(blocks)
}
