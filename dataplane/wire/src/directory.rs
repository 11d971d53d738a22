//! A checkpoint's directory: the replicas, where their map pages lie, and which extents are taken.
//!
//! One stream of bytes, cut into parts of one extent each; a part names the next. The superblock names the first, their
//! number and the stream's checksum.

use crate::codec::{PREFIX, Put, Take, seal, unseal};
use crate::{DecodeError, EXTENT, Incarnation, Index, ReplicaShape, Term};

const MAGIC: &[u8; 8] = b"PENSDIR1";
const VERSION: u32 = 1;
const WHAT: &str = "directory part";
const HEAD: usize = 64;
/// Bytes of the stream that one part carries.
pub const PART_PAYLOAD: usize = EXTENT - HEAD;
/// Most replicas that a store holds.
pub const REPLICAS_MAX: usize = 4096;
/// Numbers of replicas stay below this. They are never used twice, so it bounds how many a store sees in its life.
pub const REPLICA_NO_LIMIT: u32 = 1 << 24;
/// Bytes of a page's row.
const ROW: usize = 12;

/// A part of the chain, without its payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    pub incarnation: Incarnation,
    pub store: u32,
    pub checkpoint: u64,
    pub part: u32,
    /// Extent of the next part, or [`crate::superblock::NO_EXTENT`].
    pub next: u32,
    /// Extent of the same part in the chain's copy.
    pub twin: u32,
    pub len: u32,
}

impl Part {
    /// Fills `extent` (64 KiB) with the sealed part.
    pub fn encode_into(&self, extent: &mut [u8], payload: &[u8]) {
        assert_eq!(extent.len(), EXTENT);
        assert!(payload.len() == self.len as usize && payload.len() <= PART_PAYLOAD);
        let mut w = Put::new(extent, PREFIX);
        w.bytes(&self.incarnation.0);
        w.u32(self.store);
        w.u32(self.part);
        w.u64(self.checkpoint);
        w.u32(self.next);
        w.u32(self.len);
        w.u32(self.twin);
        let at = w.at();
        extent[at..HEAD].fill(0);
        extent[HEAD..HEAD + payload.len()].copy_from_slice(payload);
        extent[HEAD + payload.len()..].fill(0);
        seal(extent, MAGIC, VERSION);
    }

    /// # Errors
    /// When `extent` is not a whole part that this build reads.
    pub fn decode(extent: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        unseal(extent, WHAT, MAGIC, VERSION)?;
        let mut r = Take::new(extent, PREFIX, WHAT);
        let (incarnation, store, part) = (Incarnation(r.id()?), r.u32()?, r.u32()?);
        let (checkpoint, next, len, twin) = (r.u64()?, r.u32()?, r.u32()?, r.u32()?);
        let part = Self { incarnation, store, checkpoint, part, next, twin, len };
        if part.len as usize > PART_PAYLOAD || extent.len() < HEAD + part.len as usize {
            return Err(DecodeError::Limit { what: "length of a directory part", found: u64::from(part.len), limit: PART_PAYLOAD as u64 });
        }
        Ok((part, &extent[HEAD..HEAD + part.len as usize]))
    }
}

/// Where a page lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRow {
    pub page_no: u32,
    /// Block of the extents' area.
    pub slot: u32,
    /// CRC-32C of the whole page.
    pub crc: u32,
}

/// A replica in the directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaRow {
    pub no: u32,
    /// Deleted, its space not all given back yet.
    pub deleting: bool,
    pub term: Term,
    pub voted_for: [u8; 16],
    /// Highest index that the checkpoint covers.
    pub applied: Index,
    pub shape: ReplicaShape,
    pub pages: Vec<PageRow>,
}

/// The whole directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Directory {
    /// Number that the next replica gets.
    pub next_replica: u32,
    pub replicas: Vec<ReplicaRow>,
    /// One bit an extent, set when taken, lowest bit first.
    pub taken: Vec<u8>,
}

impl Directory {
    pub fn encode(&self) -> Vec<u8> {
        let rows: usize = self.replicas.iter().map(|r| 52 + r.shape.encoded_len() + r.pages.len() * ROW).sum();
        let mut bytes = vec![0; 16 + rows + self.taken.len()];
        let mut w = Put::new(&mut bytes, 0);
        w.u32(self.next_replica);
        w.u32(self.replicas.len() as u32);
        for replica in &self.replicas {
            w.u32(replica.no);
            w.u32(u32::from(replica.deleting));
            w.u64(replica.term.0);
            w.bytes(&replica.voted_for);
            w.u64(replica.applied.0);
            w.u32(0); // layers above the base, none until snapshots come
            w.u32(replica.shape.encoded_len() as u32);
            replica.shape.put(&mut w);
            w.u32(replica.pages.len() as u32);
            for page in &replica.pages {
                w.u32(page.page_no);
                w.u32(page.slot);
                w.u32(page.crc);
            }
        }
        w.u64(self.taken.len() as u64);
        w.bytes(&self.taken);
        let len = w.at();
        bytes.truncate(len);
        bytes
    }

    /// # Errors
    /// When the bytes are not the directory of a store of `extents`.
    pub fn decode(bytes: &[u8], extents: u64) -> Result<Self, DecodeError> {
        let mut r = Take::new(bytes, 0, "directory");
        let next_replica = r.u32()?;
        let count = r.u32()? as usize;
        if next_replica > REPLICA_NO_LIMIT {
            return Err(DecodeError::Limit {
                what: "number of the next replica",
                found: u64::from(next_replica),
                limit: u64::from(REPLICA_NO_LIMIT),
            });
        }
        if count > REPLICAS_MAX {
            return Err(DecodeError::Limit { what: "replicas of a store", found: count as u64, limit: REPLICAS_MAX as u64 });
        }
        let mut replicas: Vec<ReplicaRow> = Vec::with_capacity(count);
        for _ in 0..count {
            let no = r.u32()?;
            if no >= next_replica || replicas.last().is_some_and(|last| last.no >= no) {
                return Err(DecodeError::Value { what: "number of a replica", found: u64::from(no) });
            }
            let deleting = r.u32()? != 0;
            let term = Term(r.count("term of a replica")?);
            let voted_for = r.id()?;
            let applied = Index(r.count("index of a replica")?);
            let layers = r.u32()?;
            if layers != 0 {
                return Err(DecodeError::Value { what: "layers of a replica", found: u64::from(layers) });
            }
            let shape_len = r.u32()? as usize;
            let shape = ReplicaShape::take(&mut Take::new(r.bytes(shape_len)?, 0, "replica"))?;
            let pages = r.u32()? as usize;
            if pages > r.left() / ROW {
                return Err(DecodeError::Short { what: "pages of a replica", need: pages.saturating_mul(ROW), left: r.left() });
            }
            let mut rows: Vec<PageRow> = Vec::with_capacity(pages);
            for _ in 0..pages {
                let row = PageRow { page_no: r.u32()?, slot: r.u32()?, crc: r.u32()? };
                if u64::from(row.slot) >= extents * crate::EXTENT_BLOCKS || rows.last().is_some_and(|last| last.page_no >= row.page_no) {
                    return Err(DecodeError::Value { what: "slot of a map page", found: u64::from(row.slot) });
                }
                if row.page_no > crate::page::PAGE_NO_MAX {
                    return Err(DecodeError::Limit {
                        what: "number of a map page",
                        found: u64::from(row.page_no),
                        limit: u64::from(crate::page::PAGE_NO_MAX),
                    });
                }
                rows.push(row);
            }
            replicas.push(ReplicaRow { no, deleting, term, voted_for, applied, shape, pages: rows });
        }
        let len = r.u64()?;
        if len != extents.div_ceil(8) {
            return Err(DecodeError::Value { what: "bytes of the allocation bitmap", found: len });
        }
        let taken = r.bytes(len as usize)?.to_vec();
        if r.left() != 0 {
            return Err(DecodeError::Value { what: "bytes after the directory", found: r.left() as u64 });
        }
        Ok(Self { next_replica, replicas, taken })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{DIRECTORY_EXTENTS, directory, part};
    use proptest::prelude::*;

    #[test]
    fn directory_round_trips() {
        assert_eq!(Directory::decode(&directory().encode(), DIRECTORY_EXTENTS).unwrap(), directory());
    }

    #[test]
    fn part_round_trips_and_any_payload_bit_counts() {
        let payload: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        let part = part(&payload);
        let mut extent = vec![0xee; EXTENT];
        part.encode_into(&mut extent, &payload);
        assert_eq!(Part::decode(&extent).unwrap(), (part, &payload[..]));
        extent[HEAD + 500] ^= 1;
        assert!(matches!(Part::decode(&extent), Err(DecodeError::Checksum { .. })));
    }

    proptest! {
        #[test]
        fn mutated_directory_decodes_or_fails_cleanly(at: u16, byte: u8, cut: u16) {
            let mut bytes = directory().encode();
            let at = usize::from(at) % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len() - usize::from(cut) % 8);
            let _ = Directory::decode(&bytes, DIRECTORY_EXTENTS);
        }

        #[test]
        fn any_bytes_as_a_directory_decode_or_fail_cleanly(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Directory::decode(&bytes, DIRECTORY_EXTENTS);
        }
    }
}
