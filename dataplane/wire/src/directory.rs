//! A checkpoint's directory: the replicas, where their map pages lie, and which extents are taken.
//!
//! One stream of bytes, cut into parts of one extent each; a part names the next. The superblock names the first, their
//! number and the stream's checksum.

use crate::codec::{PREFIX, Put, Take, seal, unseal_versions};
use crate::layer::{FrozenRow, ROW_HEAD};
use crate::page::EXTENTS_PER_PAGE;
use crate::peer::{MEMBERS_MAX, MemberNo, Members, Opening, OpeningId, Past, Seen};
use crate::reservation::Reservations;
use crate::{DecodeError, EXTENT, Incarnation, Index, ReplicaShape, Seq, Term};

const MAGIC: &[u8; 8] = b"PENSDIR1";
/// The version that is written. Read too are version 1, whose pages do not say how many extents they hold, 2, which knows no members of groups, and
/// 3, which knows neither reservations nor anything of other members, and whose replicas have one layer each.
pub const VERSION: u32 = 4;
const WHAT: &str = "directory part";
const HEAD: usize = 64;
/// Bytes of the stream that one part carries.
pub const PART_PAYLOAD: usize = EXTENT - HEAD;
/// Most replicas that a store holds.
pub const REPLICAS_MAX: usize = 4096;
/// Numbers of replicas stay below this. They are never used twice, so it bounds how many a store sees in its life.
pub const REPLICA_NO_LIMIT: u32 = 1 << 24;
/// Bytes of a page's row, by version.
const fn row_bytes(version: u32) -> usize {
    if version == 1 { 12 } else { 13 }
}
/// A page whose extents were not counted.
const NOT_COUNTED: u8 = u8::MAX;
const _: () = assert!(EXTENTS_PER_PAGE < NOT_COUNTED as usize);

/// A part of the chain, without its payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Of this part and of the stream in it.
    pub version: u32,
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
        seal(extent, MAGIC, self.version);
    }

    /// # Errors
    /// When `extent` is not a whole part that this build reads.
    pub fn decode(extent: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let version = unseal_versions(extent, WHAT, MAGIC)?;
        if !(1..=VERSION).contains(&version) {
            return Err(DecodeError::Version { what: WHAT, found: version, known: VERSION });
        }
        let mut r = Take::new(extent, PREFIX, WHAT);
        let (incarnation, store, part) = (Incarnation(r.id()?), r.u32()?, r.u32()?);
        let (checkpoint, next, len, twin) = (r.u64()?, r.u32()?, r.u32()?, r.u32()?);
        let part = Self { version, incarnation, store, checkpoint, part, next, twin, len };
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
    /// Extents that the page holds a place of; `None` where that was not counted, as in version 1.
    pub extents: Option<u8>,
}

/// A replica in the directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaRow {
    pub no: u32,
    /// Deleted, its space not all given back yet.
    pub deleting: bool,
    pub term: Term,
    /// Highest index that was applied when the checkpoint was taken.
    pub applied: Index,
    pub shape: ReplicaShape,
    /// Number of the live layer, and its pages.
    pub layer: u32,
    /// Entry of the newest snapshot's marker, 0 where there never was one.
    pub since: Index,
    pub pages: Vec<PageRow>,
    /// Layers beneath the live one, lowest first.
    pub frozen: Vec<FrozenRow>,
    /// Of a clone: the replica and its frozen layer that the lowest of these lies over.
    pub origin: Option<(u32, u32)>,
    /// Of a member of a group of several.
    pub member: Option<MemberRow>,
    /// As of `applied`; none where no host ever registered.
    pub reservations: Option<Box<Reservations>>,
}

/// What a member of a group is beside a replica. Its ballot's term is the row's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemberRow {
    /// `MemberNo(0)` for nobody.
    pub vote: MemberNo,
    /// Of the entry `applied`.
    pub applied_term: Term,
    /// As of `applied`.
    pub members: Members,
    /// It may have acknowledged entries that it does not have any more: none beyond the end of a log that ends like this.
    pub doubt: Option<(Index, Term)>,
    /// It answers nothing any more, for good: what it holds cannot be vouched for.
    pub stopped: bool,
    /// Its content is whole as of that entry alone, and is being copied from another.
    pub rebuild: Option<Index>,
    /// Of the openings of its store, and what it knows of the others'.
    pub past: Past,
    pub seen: Vec<Seen>,
}

/// The whole directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Directory {
    /// Number that the next replica gets.
    pub next_replica: u32,
    /// Batches up to here are in the extents and pages as far as the rows say applied; the log may begin before it, for those who lag. 0
    /// in versions before 3, where the log begins after it.
    pub covered: Seq,
    pub replicas: Vec<ReplicaRow>,
    /// One bit an extent, set when taken, lowest bit first.
    pub taken: Vec<u8>,
}

impl Directory {
    /// The stream, in version [`VERSION`].
    pub fn encode(&self) -> Vec<u8> {
        /// Bytes of a row at most, without shape, members and pages.
        const MOST: usize = 106 + Past::BYTES + MEMBERS_MAX * (8 + Seen::BYTES);
        let members = |row: &ReplicaRow| row.member.as_ref().map(|member| member.members.encode()).unwrap_or_default();
        let pages = |pages: &[PageRow]| pages.len() * row_bytes(VERSION);
        let reserved = |row: &ReplicaRow| row.reservations.as_ref().map_or(0, |state| 4 + state.encoded_len());
        let frozen = |row: &FrozenRow| ROW_HEAD + row.snapshot.encoded_len() + pages(&row.pages);
        let row_len = |row: &ReplicaRow| {
            let layers = pages(&row.pages) + row.frozen.iter().map(frozen).sum::<usize>();
            MOST + row.shape.encoded_len() + members(row).len() + reserved(row) + layers
        };
        let rows: usize = self.replicas.iter().map(row_len).sum();
        let mut bytes = vec![0; 24 + rows + self.taken.len()];
        let mut w = Put::new(&mut bytes, 0);
        w.u32(self.next_replica);
        w.u32(self.replicas.len() as u32);
        w.u64(self.covered.0);
        for replica in &self.replicas {
            let member = replica.member.as_ref();
            let doubt = member.and_then(|member| member.doubt);
            let rebuild = member.and_then(|member| member.rebuild);
            let flag = |set: bool, flag: u32| if set { flag } else { 0 };
            w.u32(replica.no);
            w.u32(
                flag(replica.deleting, DELETING)
                    | flag(member.is_some_and(|member| member.stopped), STOPPED)
                    | flag(doubt.is_some(), DOUBTFUL)
                    | flag(rebuild.is_some(), REBUILT)
                    | flag(replica.reservations.is_some(), RESERVED)
                    | flag(replica.origin.is_some(), CLONE)
                    | flag(member.is_some_and(|member| !member.seen.is_empty()), SEEN)
                    | flag(member.is_some_and(|member| member.past.unvouched), UNVOUCHED),
            );
            w.u64(replica.term.0);
            w.u64(member.map_or(0, |member| member.vote.0));
            w.u64(member.map_or(0, |member| member.applied_term.0));
            w.u64(replica.applied.0);
            w.u32(replica.frozen.len() as u32);
            w.u32(replica.shape.encoded_len() as u32);
            replica.shape.put(&mut w);
            let members = members(replica);
            w.u32(members.len() as u32);
            w.bytes(&members);
            if let Some((index, term)) = doubt {
                w.u64(index.0);
                w.u64(term.0);
            }
            if let Some(as_of) = rebuild {
                w.u64(as_of.0);
            }
            if let Some(past) = member.map(|member| member.past) {
                w.bytes(&OpeningId::encode(past.believed));
                w.u64(past.opened.map_or(0, |first| first.0));
            }
            if let Some(member) = member.filter(|member| !member.seen.is_empty()) {
                w.u16(member.seen.len() as u16);
                for seen in &member.seen {
                    w.u64(seen.no.0);
                    w.bytes(&seen.opening.encode());
                    w.u64(seen.sealed.0);
                }
            }
            if let Some(state) = &replica.reservations {
                w.u32(state.encoded_len() as u32);
                w.bytes(&state.encode());
            }
            if let Some((origin, layer)) = replica.origin {
                w.u32(origin);
                w.u32(layer);
            }
            w.u32(replica.layer);
            w.u64(replica.since.0);
            replica.frozen.iter().for_each(|row| row.put(&mut w));
            put_pages(&mut w, &replica.pages);
        }
        w.u64(self.taken.len() as u64);
        w.bytes(&self.taken);
        let len = w.at();
        bytes.truncate(len);
        bytes
    }

    /// `version` is that of the parts that carried the stream.
    ///
    /// # Errors
    /// When the bytes are not the directory of a store of `extents`.
    pub fn decode(bytes: &[u8], version: u32, extents: u64) -> Result<Self, DecodeError> {
        let mut r = Take::new(bytes, 0, "directory");
        let next_replica = r.u32()?;
        let count = r.u32()? as usize;
        let covered = Seq(if version < 3 { 0 } else { r.count("covered sequence of a directory")? });
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
            let flags = r.u32()?;
            let term = Term(r.count("term of a replica")?);
            let vote = MemberNo(r.count("vote of a replica")?);
            let applied_term = Term(r.count("term of a replica's entry")?);
            let applied = Index(r.count("index of a replica")?);
            let layers = r.u32()?;
            if version < 4 && layers != 0 {
                return Err(DecodeError::Value { what: "layers of a replica", found: u64::from(layers) });
            }
            let shape_len = r.u32()? as usize;
            let shape = ReplicaShape::take(&mut Take::new(r.bytes(shape_len)?, 0, "replica"))?;
            let known = if version >= 4 { flags & (RESERVED | CLONE) } else { 0 };
            let member = take_member(&mut r, version, flags & !known, vote, applied_term)?;
            let reservations = if known & RESERVED != 0 { Some(take_reservations(&mut r)?) } else { None };
            let origin = if known & CLONE != 0 { Some((r.u32()?, r.u32()?)) } else { None };
            // Origins are older than their clones, so no layer lies over itself.
            let stands = |(no, layer): &(u32, u32)| {
                let origin = replicas.iter().find(|row| row.no == *no);
                origin.is_some_and(|row| row.frozen.iter().any(|frozen| frozen.layer == *layer))
            };
            if let Some((no, _)) = origin.filter(|origin| !stands(origin)) {
                return Err(DecodeError::Value { what: "origin of a clone", found: no.into() });
            }
            let (layer, since) = if version < 4 { (0, Index(0)) } else { (r.u32()?, Index(r.count("newest marker of a replica")?)) };
            let frozen = FrozenRow::take_all(&mut r, layers, layer, version, extents)?;
            if frozen.last().is_some_and(|newest| newest.at > since) {
                return Err(DecodeError::Value { what: "newest marker of a replica", found: since.0 });
            }
            let pages = take_pages(&mut r, version, extents)?;
            replicas.push(ReplicaRow {
                no,
                deleting: flags & DELETING != 0,
                term,
                applied,
                shape,
                layer,
                since,
                pages,
                frozen,
                origin,
                member,
                reservations,
            });
        }
        let len = r.u64()?;
        if len != extents.div_ceil(8) {
            return Err(DecodeError::Value { what: "bytes of the allocation bitmap", found: len });
        }
        let taken = r.bytes(len as usize)?.to_vec();
        if r.left() != 0 {
            return Err(DecodeError::Value { what: "bytes after the directory", found: r.left() as u64 });
        }
        Ok(Self { next_replica, covered, replicas, taken })
    }
}

const DELETING: u32 = 1;
const STOPPED: u32 = 2;
const DOUBTFUL: u32 = 4;
const REBUILT: u32 = 8;
const RESERVED: u32 = 16;
const CLONE: u32 = 64;
const SEEN: u32 = 32;
const UNVOUCHED: u32 = 128;

fn take_reservations(r: &mut Take<'_>) -> Result<Box<Reservations>, DecodeError> {
    let len = r.u32()? as usize;
    Ok(Box::new(Reservations::decode(r.bytes(len)?)?))
}

pub(crate) fn put_pages(w: &mut Put<'_>, pages: &[PageRow]) {
    w.u32(pages.len() as u32);
    for page in pages {
        w.u32(page.page_no);
        w.u32(page.slot);
        w.u32(page.crc);
        w.bytes(&[page.extents.unwrap_or(NOT_COUNTED)]);
    }
}

pub(crate) fn take_pages(r: &mut Take<'_>, version: u32, extents: u64) -> Result<Vec<PageRow>, DecodeError> {
    let row_bytes = row_bytes(version);
    let pages = r.u32()? as usize;
    if pages > r.left() / row_bytes {
        return Err(DecodeError::Short { what: "pages of a replica", need: pages.saturating_mul(row_bytes), left: r.left() });
    }
    let mut rows: Vec<PageRow> = Vec::with_capacity(pages);
    for _ in 0..pages {
        let (page_no, slot, crc) = (r.u32()?, r.u32()?, r.u32()?);
        let extents_held = if version == 1 { NOT_COUNTED } else { r.bytes(1)?[0] };
        if usize::from(extents_held) > EXTENTS_PER_PAGE && extents_held != NOT_COUNTED {
            return Err(DecodeError::Value { what: "extents of a map page", found: u64::from(extents_held) });
        }
        let row = PageRow { page_no, slot, crc, extents: (extents_held != NOT_COUNTED).then_some(extents_held) };
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
    Ok(rows)
}

fn take_member(r: &mut Take<'_>, version: u32, flags: u32, vote: MemberNo, applied_term: Term) -> Result<Option<MemberRow>, DecodeError> {
    let len = if version < 3 { 0 } else { r.u32()? as usize };
    if len == 0 {
        if flags & !DELETING != 0 || vote.0 != 0 || applied_term.0 != 0 {
            return Err(DecodeError::Value { what: "flags, vote or term of a replica of no group, flags", found: flags.into() });
        }
        return Ok(None);
    }
    let members = Members::decode(r.bytes(len)?)?;
    let known = DELETING | STOPPED | DOUBTFUL | REBUILT | if version < 4 { 0 } else { SEEN | UNVOUCHED };
    if flags & !known != 0 {
        return Err(DecodeError::Value { what: "flags of a replica", found: flags.into() });
    }
    let mut doubt = None;
    if flags & DOUBTFUL != 0 {
        let (index, term) = (Index(r.count("last entry of a doubt")?), Term(r.count("term of a doubt")?));
        if term.0 == 0 {
            return Err(DecodeError::Value { what: "term of a doubt", found: term.0 });
        }
        doubt = Some((index, term));
    }
    let rebuild = if flags & REBUILT != 0 { Some(Index(r.count("entry that a replica is whole as of")?)) } else { None };
    let mut past = Past::default();
    if version >= 4 {
        let (believed, first) = (OpeningId::take(r)?, Seq(r.count("first batch of an opening")?));
        past = Past { believed, opened: (first.0 != 0).then_some(first), unvouched: flags & UNVOUCHED != 0 };
    }
    let mut seen = Vec::new();
    if flags & SEEN != 0 {
        let count = usize::from(r.u16()?);
        if count == 0 || count > MEMBERS_MAX {
            return Err(DecodeError::Limit {
                what: "members whose openings a replica knows",
                found: count as u64,
                limit: MEMBERS_MAX as u64,
            });
        }
        for _ in 0..count {
            let no = MemberNo(r.count("member whose opening is known")?);
            seen.push(Seen { no, opening: Opening::take(r)?, sealed: Seq(r.count("batch known durable")?) });
        }
    }
    Ok(Some(MemberRow { vote, applied_term, members, doubt, stopped: flags & STOPPED != 0, rebuild, past, seen }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{DIRECTORY_EXTENTS, directory, layered_directory, part};
    use proptest::prelude::*;

    #[test]
    fn directory_round_trips() {
        for directory in [directory(), layered_directory()] {
            assert_eq!(Directory::decode(&directory.encode(), VERSION, DIRECTORY_EXTENTS).unwrap(), directory);
        }
    }

    #[test]
    fn layers_out_of_order_and_clones_of_nothing_are_refused() {
        let refused = |change: fn(&mut Directory)| {
            let mut directory = layered_directory();
            change(&mut directory);
            assert!(matches!(Directory::decode(&directory.encode(), VERSION, DIRECTORY_EXTENTS), Err(DecodeError::Value { .. })));
        };
        refused(|directory| directory.replicas[1].frozen.reverse());
        refused(|directory| directory.replicas[1].frozen[1].at = Index(0x0102));
        refused(|directory| directory.replicas[1].layer = 0x0102);
        refused(|directory| directory.replicas[2].origin = Some((3, 1)));
        refused(|directory| directory.replicas[0].origin = Some((3, 0)));
    }

    #[test]
    fn page_with_more_extents_than_it_has_places_is_refused() {
        let mut directory = directory();
        directory.replicas[1].pages[0].extents = Some(49);
        let refused = Directory::decode(&directory.encode(), VERSION, DIRECTORY_EXTENTS);
        assert_eq!(refused, Err(DecodeError::Value { what: "extents of a map page", found: 49 }));
    }

    #[test]
    fn replica_of_no_group_with_a_members_flag_or_vote_is_refused() {
        // The first row: number, flags, term, vote.
        for at in [16 + 4, 16 + 16, 16 + 24] {
            let mut bytes = directory().encode();
            bytes[at] |= 2;
            assert!(Directory::decode(&bytes, VERSION, DIRECTORY_EXTENTS).is_err(), "byte {at}");
        }
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
            let mut bytes = layered_directory().encode();
            let at = usize::from(at) % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len() - usize::from(cut) % 8);
            for version in 1..=VERSION {
                let _ = Directory::decode(&bytes, version, DIRECTORY_EXTENTS);
            }
        }

        #[test]
        fn any_bytes_as_a_directory_decode_or_fail_cleanly(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            for version in 1..=VERSION {
                let _ = Directory::decode(&bytes, version, 40);
            }
        }
    }
}
