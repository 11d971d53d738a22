//! Copying a volume's content to a member that is being rebuilt: it asks for ranges of extents and says what it has of each; another
//! that is whole sends those that differ, each as of what it had applied when it was read.
//!
//! Not here: how entries that are newer than a copy come to lie over it (the store's: see ARCHITECTURE.md).

use super::members::MemberNo;
use super::{Grow, check_payload, limit, take_pair, zeros};
use crate::codec::Take;
use crate::layer::LAYER_NO_LIMIT;
use crate::page::BlockState;
use crate::{DecodeError, EXTENT_BLOCKS, Index, SegmentId, VOLUME_BLOCKS_MAX};

/// Extents of the largest volume.
pub const EXTENTS_END: u64 = VOLUME_BLOCKS_MAX / EXTENT_BLOCKS;
/// Extents that one ask says something of, each by itself, at most.
pub const COPY_LISTED_MAX: usize = 512;

/// Send what differs of extents `first .. until`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopyAsk {
    /// The asker's own number for it; the answers repeat it.
    pub id: u64,
    pub segment: SegmentId,
    pub from: MemberNo,
    pub to: MemberNo,
    /// Of which layer: each says what changed over those beneath that snapshots hold.
    pub layer: u32,
    /// Of a clone: the asker stands on the origin's layer. Who does not is sent what is there with the lowest layer.
    pub stands: bool,
    pub first: u64,
    pub until: u64,
    /// Extents that may be answered with.
    pub room: u32,
    /// Of each extent from `first` on: the entry that changed it last where all of it is here as of that, 0 where there is nothing,
    /// [`CopyAsk::ANY`] where whatever there is must be sent. Extents after these have nothing here.
    pub changed: Vec<u64>,
}

impl CopyAsk {
    pub const ANY: u64 = u64::MAX;

    /// What the asker has of an extent.
    pub fn has(&self, extent: u64) -> u64 {
        self.changed.get((extent - self.first) as usize).copied().unwrap_or(0)
    }

    pub fn encoded_len(&self) -> usize {
        8 + 16 + 8 + 8 + 8 + 8 + 4 + 4 + 8 * self.changed.len() + if self.has_tail() { 8 } else { 0 }
    }

    /// Whether it says anything that version 1 has no place for.
    fn has_tail(&self) -> bool {
        self.layer > 0 || self.stands
    }

    pub(super) fn put(&self, w: &mut Grow) {
        w.u64(self.id);
        w.bytes(&self.segment.0);
        w.u64(self.from.0);
        w.u64(self.to.0);
        w.u64(self.first);
        w.u64(self.until);
        w.u32(self.room);
        w.u32(self.changed.len() as u32);
        for changed in &self.changed {
            w.u64(*changed);
        }
        if self.has_tail() {
            w.u32(self.layer);
            w.u32(self.stands.into());
        }
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (id, segment) = (r.u64()?, SegmentId(r.id()?));
        let (from, to) = take_pair(r)?;
        let (first, until, room, count) = (r.u64()?, r.u64()?, r.u32()?, r.u32()?);
        limit("last extent of a copy", until, EXTENTS_END)?;
        limit("extents listed in a copy", count.into(), COPY_LISTED_MAX as u64)?;
        if first >= until || u64::from(count) > until - first || room == 0 {
            return Err(DecodeError::Value { what: "first extent of a copy, or its room", found: first });
        }
        let mut changed = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let of = r.u64()?;
            if of != Self::ANY {
                limit("entry that changed an extent", of, crate::COUNT_LIMIT - 1)?;
            }
            changed.push(of);
        }
        let (mut layer, mut stands) = (0, false);
        if r.left() > 0 {
            (layer, stands) = match (r.u32()?, r.u32()?) {
                (layer, flag @ 0..=1) if layer < LAYER_NO_LIMIT && (layer > 0 || flag > 0) => (layer, flag > 0),
                (layer, _) => return Err(DecodeError::Value { what: "layer of a copy, or its flag", found: layer.into() }),
            };
        }
        Ok(Self { id, segment, from, to, layer, stands, first, until, room, changed })
    }
}

/// What the blocks of an extent are, two bits each, block 0 lowest: 0 zeros, 1 as the layer beneath says, 2 data, 3 lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct States(pub u32);

impl States {
    pub fn state(self, block: usize) -> BlockState {
        match self.0 >> (2 * block) & 3 {
            0 => BlockState::Zero,
            1 => BlockState::Inherit,
            2 => BlockState::Data,
            _ => BlockState::Lost,
        }
    }

    pub fn set(&mut self, block: usize, state: BlockState) {
        let bits = match state {
            BlockState::Zero => 0,
            BlockState::Inherit => 1,
            BlockState::Data => 2,
            BlockState::Lost => 3,
        };
        self.0 = self.0 & !(3 << (2 * block)) | bits << (2 * block);
    }

    /// Blocks that are data.
    pub fn data_blocks(self) -> u32 {
        (self.0 >> 1 & !self.0 & 0x5555_5555).count_ones()
    }

    pub(crate) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        Ok(Self(r.u32()?))
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Copied {
    /// An extent; the blocks that are data follow as payload, one checksum each.
    Extent { extent: u64, changed: u64, states: States, crcs: Vec<u32> },
    /// All that differs of the extents before `until` was sent, in so many answers. The volume has `blocks`.
    Done { until: u64, answers: u32, blocks: u64 },
}

/// A part of what was asked for, as of entry `applied` or later.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopyAnswer {
    pub id: u64,
    pub segment: SegmentId,
    pub from: MemberNo,
    pub to: MemberNo,
    pub applied: Index,
    pub copied: Copied,
}

impl CopyAnswer {
    pub fn payload_blocks(&self) -> u32 {
        match &self.copied {
            Copied::Extent { crcs, .. } => crcs.len() as u32,
            Copied::Done { .. } => 0,
        }
    }

    pub fn encoded_len(&self) -> usize {
        let copied = match &self.copied {
            Copied::Extent { crcs, .. } => 24 + 4 * crcs.len(),
            Copied::Done { .. } => 24,
        };
        8 + 16 + 8 + 8 + 8 + 4 + copied
    }

    /// Whether `payload` is that of the extent here.
    ///
    /// # Errors
    /// When it is not.
    pub fn check(&self, payload: &[u8]) -> Result<(), DecodeError> {
        match &self.copied {
            Copied::Extent { crcs, .. } => check_payload(crcs.iter(), payload),
            Copied::Done { .. } => check_payload([].iter(), payload),
        }
    }

    pub(super) fn put(&self, w: &mut Grow) {
        w.u64(self.id);
        w.bytes(&self.segment.0);
        w.u64(self.from.0);
        w.u64(self.to.0);
        w.u64(self.applied.0);
        match &self.copied {
            Copied::Extent { extent, changed, states, crcs } => {
                w.u32(0);
                w.u64(*extent);
                w.u64(*changed);
                w.u32(states.0);
                w.zeros(4);
                for crc in crcs {
                    w.u32(*crc);
                }
            }
            Copied::Done { until, answers, blocks } => {
                w.u32(1);
                w.u64(*until);
                w.u64(*blocks);
                w.u32(*answers);
                w.zeros(4);
            }
        }
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (id, segment) = (r.u64()?, SegmentId(r.id()?));
        let (from, to) = take_pair(r)?;
        let applied = Index(r.count("entry that a copy is as of")?);
        let copied = match r.u32()? {
            0 => {
                let (extent, changed) = (r.u64()?, r.u64()?);
                let states = States::take(r)?;
                zeros(r, 4)?;
                limit("extent of a copy", extent, EXTENTS_END - 1)?;
                limit("entry that changed an extent", changed, applied.0)?;
                let crcs = (0..states.data_blocks()).map(|_| r.u32()).collect::<Result<_, _>>()?;
                Copied::Extent { extent, changed, states, crcs }
            }
            1 => {
                let (until, blocks, answers) = (r.u64()?, r.u64()?, r.u32()?);
                zeros(r, 4)?;
                limit("last extent of a copy", until, EXTENTS_END)?;
                limit("volume size in blocks", blocks, VOLUME_BLOCKS_MAX)?;
                if blocks == 0 {
                    return Err(DecodeError::Value { what: "volume size in blocks", found: 0 });
                }
                Copied::Done { until, answers, blocks }
            }
            other => return Err(DecodeError::Value { what: "kind of a copy's answer", found: other.into() }),
        };
        Ok(Self { id, segment, from, to, applied, copied })
    }
}
