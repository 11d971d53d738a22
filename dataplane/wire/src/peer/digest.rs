//! Comparing what members have: each says of the extents of a page how what it reads there is summed up, and between which entries that stands.
//!
//! Not here: who is right where they differ, and what becomes of who is not (the engine's: see ARCHITECTURE.md).

use super::members::MemberNo;
use super::{Grow, States, limit, take_pair, zeros};
use crate::codec::{Take, crc32c};
use crate::layer::LAYER_NO_LIMIT;
use crate::page::{BlockState, EXTENTS_PER_PAGE, PAGE_NO_MAX};
use crate::{DecodeError, EXTENT_BLOCKS, Index, SegmentId};

/// An extent whose digest a member cannot tell.
const UNTOLD: u64 = u64::MAX;

/// What an extent of a layer reads as, with all that the layer lies over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExtentDigest {
    /// It is so since this entry, 0 for ever.
    pub since: Index,
    pub digest: u32,
}

impl ExtentDigest {
    /// Sums an extent up: the checksum of each block that is data, `None` for one that is zeros.
    pub fn sum(crcs: &[Option<u32>; EXTENT_BLOCKS as usize]) -> u32 {
        let mut states = States::default();
        let mut bytes = [0; 4 + 4 * EXTENT_BLOCKS as usize];
        for (at, crc) in crcs.iter().enumerate() {
            if let Some(crc) = crc {
                states.set(at, BlockState::Data);
                bytes[4 + 4 * at..][..4].copy_from_slice(&crc.to_le_bytes());
            }
        }
        bytes[..4].copy_from_slice(&states.0.to_le_bytes());
        crc32c(&bytes)
    }
}

/// What a member says of the extents of a page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Digests {
    /// They are so up to this entry: the last that is applied, or the last that changed the layer.
    pub as_of: Index,
    /// `None`: it cannot be told.
    pub extents: Box<[Option<ExtentDigest>; EXTENTS_PER_PAGE]>,
}

impl Digests {
    pub const BYTES: usize = 8 + EXTENTS_PER_PAGE * 12;

    /// Nothing can be told.
    pub fn untold() -> Self {
        Self { as_of: Index(0), extents: Box::new([None; EXTENTS_PER_PAGE]) }
    }

    fn put(&self, w: &mut Grow) {
        w.u64(self.as_of.0);
        for extent in &*self.extents {
            let (since, digest) = extent.map_or((UNTOLD, 0), |extent| (extent.since.0, extent.digest));
            w.u64(since);
            w.u32(digest);
        }
    }

    fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let as_of = Index(r.count("entry that digests are as of")?);
        let mut extents = Box::new([None; EXTENTS_PER_PAGE]);
        for extent in &mut *extents {
            let (since, digest) = (r.u64()?, r.u32()?);
            if since != UNTOLD {
                limit("entry that changed an extent", since, as_of.0)?;
                *extent = Some(ExtentDigest { since: Index(since), digest });
            } else if digest != 0 {
                return Err(DecodeError::Value { what: "digest of an extent that is not told", found: digest.into() });
            }
        }
        Ok(Self { as_of, extents })
    }
}

/// What have you on this page of a layer? This is what the asker has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DigestAsk {
    /// The asker's own number for it; the answer repeats it.
    pub id: u64,
    pub segment: SegmentId,
    pub from: MemberNo,
    pub to: MemberNo,
    pub layer: u32,
    pub page_no: u32,
    pub digests: Digests,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DigestAnswer {
    pub id: u64,
    pub segment: SegmentId,
    pub from: MemberNo,
    pub to: MemberNo,
    pub digests: Digests,
}

impl DigestAsk {
    pub const BYTES: usize = 8 + 16 + 8 + 8 + 4 + 4 + Digests::BYTES;

    pub(super) fn put(&self, w: &mut Grow) {
        w.u64(self.id);
        w.bytes(&self.segment.0);
        w.u64(self.from.0);
        w.u64(self.to.0);
        w.u32(self.layer);
        w.u32(self.page_no);
        self.digests.put(w);
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (id, segment) = (r.u64()?, SegmentId(r.id()?));
        let (from, to) = take_pair(r)?;
        let (layer, page_no) = (r.u32()?, r.u32()?);
        limit("number of a layer", layer.into(), u64::from(LAYER_NO_LIMIT) - 1)?;
        limit("page of a digest", page_no.into(), PAGE_NO_MAX.into())?;
        Ok(Self { id, segment, from, to, layer, page_no, digests: Digests::take(r)? })
    }
}

impl DigestAnswer {
    pub const BYTES: usize = 8 + 16 + 8 + 8 + 8 + Digests::BYTES;

    pub(super) fn put(&self, w: &mut Grow) {
        w.u64(self.id);
        w.bytes(&self.segment.0);
        w.u64(self.from.0);
        w.u64(self.to.0);
        w.zeros(8);
        self.digests.put(w);
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (id, segment) = (r.u64()?, SegmentId(r.id()?));
        let (from, to) = take_pair(r)?;
        zeros(r, 8)?;
        Ok(Self { id, segment, from, to, digests: Digests::take(r)? })
    }
}
