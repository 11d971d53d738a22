//! Layers of a replica: what a snapshot is, as its marker in the log and the directory tell it, and the directory's rows of them.
//!
//! Not here: what a layer's blocks are (`page`) and which layer an entry belongs to (the engine's map).

use crate::codec::{Put, Take};
use crate::directory::{PageRow, put_pages, take_pages};
use crate::{DecodeError, Index, NAME_MAX, SnapshotId};

/// Most layers of one replica that snapshots have frozen.
pub const FROZEN_MAX: usize = 256;
/// Numbers of layers stay below this. They are never used twice, so it bounds how many snapshots a replica sees in its life.
pub const LAYER_NO_LIMIT: u32 = 1 << 24;

/// What a snapshot is: enough for control's state to be rebuilt from drives.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotShape {
    pub id: SnapshotId,
    /// At most [`NAME_MAX`] bytes of UTF-8.
    pub name: String,
}

impl SnapshotShape {
    /// Bytes of the encoded shape.
    pub fn encoded_len(&self) -> usize {
        16 + 2 + self.name.len()
    }

    pub(crate) fn put(&self, w: &mut Put<'_>) {
        w.bytes(&self.id.0);
        w.u16(self.name.len() as u16);
        w.bytes(self.name.as_bytes());
    }

    pub(crate) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (id, len) = (SnapshotId(r.id()?), usize::from(r.u16()?));
        if len > NAME_MAX {
            return Err(DecodeError::Limit { what: "snapshot name length", found: len as u64, limit: NAME_MAX as u64 });
        }
        let name = std::str::from_utf8(r.bytes(len)?).map_err(|_| DecodeError::Value { what: "snapshot name (not UTF-8)", found: 0 })?;
        Ok(Self { id, name: name.to_owned() })
    }

    /// Whether the shape is one that a store can hold.
    ///
    /// # Errors
    /// Names the field that is out of its limits.
    pub fn check(&self) -> Result<(), DecodeError> {
        match self.name.len() {
            found if found > NAME_MAX => {
                Err(DecodeError::Limit { what: "snapshot name length", found: found as u64, limit: NAME_MAX as u64 })
            }
            _ => Ok(()),
        }
    }
}

/// A layer that a snapshot froze, in the directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrozenRow {
    pub layer: u32,
    pub snapshot: SnapshotShape,
    /// Removed: what of it the layer above needs is being merged into that.
    pub removed: bool,
    /// Entry of its marker: what came after it belongs to layers above.
    pub at: Index,
    /// Size of the volume as of the marker.
    pub blocks: u64,
    pub pages: Vec<PageRow>,
}

const REMOVED: u32 = 1;
/// Bytes of a row without the shape's and the pages'.
pub(crate) const ROW_HEAD: usize = 4 + 4 + 8 + 8 + 4 + 4;

impl FrozenRow {
    pub(crate) fn put(&self, w: &mut Put<'_>) {
        w.u32(self.layer);
        w.u32(if self.removed { REMOVED } else { 0 });
        w.u64(self.at.0);
        w.u64(self.blocks);
        w.u32(self.snapshot.encoded_len() as u32);
        self.snapshot.put(w);
        put_pages(w, &self.pages);
    }

    fn take(r: &mut Take<'_>, version: u32, extents: u64) -> Result<Self, DecodeError> {
        let (layer, flags) = (r.u32()?, r.u32()?);
        let (at, blocks) = (Index(r.count("marker of a layer")?), r.u64()?);
        if flags & !REMOVED != 0 {
            return Err(DecodeError::Value { what: "flags of a layer", found: flags.into() });
        }
        if blocks == 0 || blocks > crate::VOLUME_BLOCKS_MAX {
            return Err(DecodeError::Limit { what: "size of a snapshot in blocks", found: blocks, limit: crate::VOLUME_BLOCKS_MAX });
        }
        let len = r.u32()? as usize;
        let snapshot = SnapshotShape::take(&mut Take::new(r.bytes(len)?, 0, "snapshot"))?;
        Ok(Self { layer, snapshot, removed: flags & REMOVED != 0, at, blocks, pages: take_pages(r, version, extents)? })
    }

    /// Rows of `count` layers, lowest first, under a live one numbered `live`.
    pub(crate) fn take_all(r: &mut Take<'_>, count: u32, live: u32, version: u32, extents: u64) -> Result<Vec<Self>, DecodeError> {
        if count as usize > FROZEN_MAX {
            return Err(DecodeError::Limit { what: "frozen layers of a replica", found: count.into(), limit: FROZEN_MAX as u64 });
        }
        if live >= LAYER_NO_LIMIT {
            return Err(DecodeError::Limit { what: "number of a layer", found: live.into(), limit: LAYER_NO_LIMIT.into() });
        }
        let mut rows: Vec<Self> = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let row = Self::take(r, version, extents)?;
            if row.layer >= live || rows.last().is_some_and(|below| below.layer >= row.layer || below.at >= row.at) {
                return Err(DecodeError::Value { what: "number or marker of a layer, number", found: row.layer.into() });
            }
            rows.push(row);
        }
        Ok(rows)
    }
}
