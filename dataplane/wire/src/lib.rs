//! Bytes on disk: what they mean, their checksums and versions. `docs/disk-format.md` is the prose of this crate.
//!
//! Pure: takes and gives byte slices. Nothing here decides anything (that is the engine's) and nothing does I/O.
//! Every decoder validates all that it reads and never panics, whatever the bytes.
//!
//! All integers are little-endian. Every record starts `magic[8] version:u32 crc:u32`; the CRC-32C is over the whole
//! record with the crc field as zero. Adding a record: a module here with encode, decode, [`DecodeError`]s that name both
//! sides, a round-trip and a mutation test, its sample in tests/sample, a golden file under tests/golden, and its table in docs/disk-format.md.

#![forbid(unsafe_code)]

pub mod batch;
mod codec;
pub mod directory;
mod ids;
pub mod label;
pub mod layer;
pub mod page;
pub mod peer;
pub mod reservation;
pub mod superblock;

// One sample of each record for the tests here, the golden files and the fuzz targets; it names this crate as those see it.
#[cfg(test)]
extern crate self as penstock_wire;
#[cfg(test)]
#[path = "../tests/sample/mod.rs"]
pub mod sample;

pub use codec::{DecodeError, crc32c};
pub use ids::{ClusterId, DriveId, HostId, Incarnation, NodeId, ReplicaId, SegmentId, SnapshotId, VolumeId};

/// Bytes of a block, the unit of everything inside.
pub const BLOCK: usize = 4096;
/// Blocks of an extent, the unit of allocation.
pub const EXTENT_BLOCKS: u64 = 16;
/// Bytes of an extent.
pub const EXTENT: usize = BLOCK * EXTENT_BLOCKS as usize;

/// Every count that grows (sequences, generations, ring positions, terms, indices) stays below this: nothing lives long
/// enough to get there, so a record that says otherwise is refused, and sums of counts never overflow.
pub const COUNT_LIMIT: u64 = 1 << 62;

/// A 4 KiB block's place on a drive or in a store, as the owner of the field says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Default)]
pub struct BlockAddr(pub u64);

impl BlockAddr {
    #[must_use]
    pub fn plus(self, blocks: u64) -> Self {
        Self(self.0 + blocks)
    }
}

/// A batch's place in its stream: 1 is the first of a store's life.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Default)]
pub struct Seq(pub u64);

impl Seq {
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Counts the opens of a store; grows with each.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Default)]
pub struct Generation(pub u64);

/// A place in the ring that never goes back: blocks since the store's first batch, padding included.
/// Its block within the ring is the remainder by the ring's size.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Default)]
pub struct RingPos(pub u64);

/// Raft term of an entry. Always 1 while a volume has one replica.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Default)]
pub struct Term(pub u64);

/// Raft index of an entry within its segment: 1 is the first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Default)]
pub struct Index(pub u64);

/// What a replica is, as its drive tells it: enough for control's store to be rebuilt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaShape {
    pub volume: VolumeId,
    pub segment: SegmentId,
    pub replica: ReplicaId,
    /// Which slice of the volume this segment is; 0 while volumes have one.
    pub segment_no: u32,
    /// Size in 4 KiB blocks.
    pub blocks: u64,
    /// Logical block that hosts see: 512 or 4096 bytes.
    pub logical_block: u32,
    /// The volume's name, at most [`NAME_MAX`] bytes of UTF-8.
    pub name: String,
}

/// Longest volume name in bytes.
pub const NAME_MAX: usize = 64;
/// Largest volume in 4 KiB blocks: 2^32 extents, 256 TiB.
pub const VOLUME_BLOCKS_MAX: u64 = (1 << 32) * EXTENT_BLOCKS;

impl ReplicaShape {
    /// Bytes of the encoded shape.
    pub fn encoded_len(&self) -> usize {
        16 * 3 + 4 + 8 + 4 + 2 + self.name.len()
    }

    pub(crate) fn put(&self, w: &mut codec::Put<'_>) {
        w.bytes(&self.volume.0);
        w.bytes(&self.segment.0);
        w.bytes(&self.replica.0);
        w.u32(self.segment_no);
        w.u64(self.blocks);
        w.u32(self.logical_block);
        w.u16(self.name.len() as u16);
        w.bytes(self.name.as_bytes());
    }

    pub(crate) fn take(r: &mut codec::Take<'_>) -> Result<Self, DecodeError> {
        let volume = VolumeId(r.id()?);
        let segment = SegmentId(r.id()?);
        let replica = ReplicaId(r.id()?);
        let segment_no = r.u32()?;
        let blocks = r.u64()?;
        let logical_block = r.u32()?;
        let name_len = usize::from(r.u16()?);
        if name_len > NAME_MAX {
            return Err(DecodeError::Limit { what: "volume name length", found: name_len as u64, limit: NAME_MAX as u64 });
        }
        let name = std::str::from_utf8(r.bytes(name_len)?).map_err(|_| DecodeError::Value { what: "volume name (not UTF-8)", found: 0 })?;
        let shape = Self { volume, segment, replica, segment_no, blocks, logical_block, name: name.to_owned() };
        shape.check()?;
        Ok(shape)
    }

    /// Whether the shape is one that a store can hold.
    ///
    /// # Errors
    /// Names the field that is out of its limits.
    pub fn check(&self) -> Result<(), DecodeError> {
        if self.name.len() > NAME_MAX {
            return Err(DecodeError::Limit { what: "volume name length", found: self.name.len() as u64, limit: NAME_MAX as u64 });
        }
        if self.blocks == 0 || self.blocks > VOLUME_BLOCKS_MAX {
            return Err(DecodeError::Limit { what: "volume size in blocks", found: self.blocks, limit: VOLUME_BLOCKS_MAX });
        }
        if self.logical_block != 512 && self.logical_block != 4096 {
            return Err(DecodeError::Value { what: "logical block size", found: u64::from(self.logical_block) });
        }
        Ok(())
    }
}
