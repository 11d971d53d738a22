//! Layers of a replica: what a snapshot is, as its marker in the log and the directory tell it, the directory's rows of them, and the stack that a
//! member of a group begins anew with.
//!
//! Not here: what a layer's blocks are (`page`) and which layer an entry belongs to (the engine's map).

use crate::codec::{Put, Take};
use crate::directory::{PageRow, put_pages, take_pages};
use crate::{DecodeError, Index, NAME_MAX, SnapshotId};

/// Most snapshots of a volume.
pub const SNAPSHOTS_MAX: usize = 256;
/// Most layers of one replica that snapshots have frozen: with those of removed snapshots, which each member merges away in its own time.
const FROZEN_MAX: usize = 1 << 20;
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

/// A layer that a snapshot holds, as members tell it to each other: its pages are each member's own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeptRow {
    pub layer: u32,
    pub at: Index,
    pub blocks: u64,
    pub snapshot: SnapshotShape,
}

impl KeptRow {
    pub fn encoded_len(&self) -> usize {
        4 + 8 + 8 + self.snapshot.encoded_len()
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.encoded_len()];
        let mut w = Put::new(&mut bytes, 0);
        w.u32(self.layer);
        w.u64(self.at.0);
        w.u64(self.blocks);
        self.snapshot.put(&mut w);
        bytes
    }

    pub(crate) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (layer, at, blocks) = (r.u32()?, Index(r.count("marker of a layer")?), take_size(r)?);
        if layer >= LAYER_NO_LIMIT || at.0 == 0 {
            return Err(DecodeError::Value { what: "number or marker of a layer, number", found: layer.into() });
        }
        Ok(Self { layer, at, blocks, snapshot: SnapshotShape::take(r)? })
    }
}

/// The layers of a volume as of an entry: those that snapshots hold, lowest first, and the number of the live one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stack {
    pub live: u32,
    /// Entry of the newest marker.
    pub since: Index,
    pub kept: Vec<KeptRow>,
}

impl Stack {
    const HEAD: usize = 4 + 8 + 4;
    pub const LEN_MAX: usize = Self::HEAD + SNAPSHOTS_MAX * (4 + 8 + 8 + 16 + 2 + NAME_MAX);

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; Self::HEAD];
        let mut w = Put::new(&mut bytes, 0);
        w.u32(self.live);
        w.u64(self.since.0);
        w.u32(self.kept.len() as u32);
        self.kept.iter().for_each(|row| bytes.extend(row.encode()));
        bytes
    }

    /// # Errors
    /// When the bytes are not those of a stack that a volume can have.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Take::new(bytes, 0, "layers");
        let (live, since, count) = (r.u32()?, Index(r.count("newest marker of a volume")?), r.u32()? as usize);
        if count > SNAPSHOTS_MAX {
            return Err(DecodeError::Limit { what: "snapshots of a volume", found: count as u64, limit: SNAPSHOTS_MAX as u64 });
        }
        let kept = (0..count).map(|_| KeptRow::take(&mut r)).collect::<Result<_, _>>()?;
        if r.left() > 0 {
            return Err(DecodeError::Value { what: "bytes after the layers of a volume", found: r.left() as u64 });
        }
        let stack = Self { live, since, kept };
        stack.check()?;
        Ok(stack)
    }

    /// Whether numbers and markers grow from layer to layer.
    ///
    /// # Errors
    /// Names the layer that does not fit.
    pub fn check(&self) -> Result<(), DecodeError> {
        let grows = self.kept.windows(2).all(|pair| pair[0].layer < pair[1].layer && pair[0].at < pair[1].at);
        let newest = self.kept.last().is_none_or(|row| row.layer < self.live && row.at <= self.since);
        let fits = grows && newest && (1..LAYER_NO_LIMIT).contains(&self.live) && self.since.0 > 0;
        if fits { Ok(()) } else { Err(DecodeError::Value { what: "number or marker of a layer, number", found: self.live.into() }) }
    }
}

/// Number of a layer that lies over another.
pub(crate) fn take_upper(r: &mut Take<'_>) -> Result<u32, DecodeError> {
    match r.u32()? {
        layer @ 1..LAYER_NO_LIMIT => Ok(layer),
        other => Err(DecodeError::Value { what: "number of a layer", found: other.into() }),
    }
}

fn take_size(r: &mut Take<'_>) -> Result<u64, DecodeError> {
    let blocks = r.u64()?;
    if blocks == 0 || blocks > crate::VOLUME_BLOCKS_MAX {
        return Err(DecodeError::Limit { what: "size of a snapshot in blocks", found: blocks, limit: crate::VOLUME_BLOCKS_MAX });
    }
    Ok(blocks)
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
        let (at, blocks) = (Index(r.count("marker of a layer")?), take_size(r)?);
        if flags & !REMOVED != 0 {
            return Err(DecodeError::Value { what: "flags of a layer", found: flags.into() });
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
        let mut rows: Vec<Self> = Vec::with_capacity((count as usize).min(SNAPSHOTS_MAX));
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
