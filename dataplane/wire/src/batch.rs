//! Batches of the log: a header of one or two blocks, then the payload blocks, written in one device command.
//!
//! The header tells its own place and the batch's descriptors, and repeats the descriptors of the batch before it, so that
//! one rotten header does not hide what was in it. See docs/disk-format.md for how recovery judges what it finds.

use crate::codec::{PREFIX, Put, Take, check_magic, seal, unseal_versions};
use crate::layer::{KeptRow, LAYER_NO_LIMIT, SnapshotShape};
use crate::page::BlockState;
use crate::peer::{self, EntryKind, MemberNo, Members, Opening, OpeningId, Seen, States};
use crate::reservation::Reservations;
use crate::{BLOCK, DecodeError, EXTENT_BLOCKS, Generation, Incarnation, Index, ReplicaShape, RingPos, SegmentId, Seq, SnapshotId, Term};

mod lens;
mod section;

pub use lens::{
    BALLOT_LEN, BELIEVED_LEN, COMMITTED_LEN, RESOLVED_LEN, SEEN_LEN, WHOLE_LEN, copy_len, forced_len, install_len, layers_len, logged_len,
};
pub use section::Section;

const MAGIC: &[u8; 8] = b"PENSLOG1";
/// The version that is written. Read too are version 1, which has no ops of groups, and 2, which has no reservations, snapshots and openings of members.
const VERSION: u32 = 3;
const WHAT: &str = "batch header";
const WHAT_OPS: &str = "batch descriptors";

/// Payload blocks of a batch at most: 1 MiB.
pub const PAYLOAD_BLOCKS_MAX: u32 = 256;
/// Header blocks of a batch at most.
pub const HEADER_BLOCKS_MAX: u32 = 2;
/// Bytes of the fixed part.
const FIXED: usize = 128;
/// Where sequence and place stand in it.
const SEQ_AT: usize = PREFIX + 16;
const PLACE_AT: usize = SEQ_AT + 24;
/// Bytes of descriptors of one batch at most: two batches' worth fit a header of two blocks.
pub const SECTION_MAX: usize = (HEADER_BLOCKS_MAX as usize * BLOCK - FIXED) / 2;
/// Bytes of an entry's head within a section.
pub const ENTRY_HEAD: usize = 24;
/// Bytes of one entry's ops at most: it must fit a section, whoever writes it.
pub const OPS_MAX: usize = SECTION_MAX - ENTRY_HEAD;
/// Bytes of an op without its checksums.
pub const OP_HEAD: usize = 12;
/// Most blocks that one zero op covers (24 bits): 64 GiB.
pub const ZERO_BLOCKS_MAX: u32 = (1 << 24) - 1;

/// What a batch is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Entries of replicas.
    Data,
    /// Written when a stream falls idle: carries `durable_to` past the last data.
    Seal,
    /// The first batch of a generation, over whatever recovery cut away.
    Open,
}

/// The fixed part of a header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    pub incarnation: Incarnation,
    /// Which store of the drive.
    pub store: u32,
    pub kind: Kind,
    pub seq: Seq,
    pub generation: Generation,
    /// Highest sequence known durable when this was written.
    pub durable_to: Seq,
    /// Its own place in the ring.
    pub at: RingPos,
    pub payload_blocks: u32,
    /// The batch before it: where it was and how long its payload is. `None` for the first of a generation.
    pub prev: Option<Prev>,
}

/// Where the batch before lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Prev {
    pub seq: Seq,
    pub at: RingPos,
    pub header_blocks: u32,
    pub payload_blocks: u32,
}

/// Blocks of a header that carries sections of these lengths.
pub fn header_blocks(own: usize, prev: usize) -> u32 {
    (FIXED + own + prev).div_ceil(BLOCK) as u32
}

impl Header {
    /// Fills `to` (whole blocks, as [`header_blocks`] says) with the sealed header.
    pub fn encode_into(&self, to: &mut [u8], own: &[u8], prev: &[u8]) {
        assert!(
            own.len() <= SECTION_MAX && prev.len() <= SECTION_MAX,
            "sections of {} and {} bytes, limit {SECTION_MAX}",
            own.len(),
            prev.len()
        );
        let blocks = header_blocks(own.len(), prev.len());
        assert_eq!(to.len(), blocks as usize * BLOCK);
        let mut w = Put::new(to, PREFIX);
        w.bytes(&self.incarnation.0);
        w.u64(self.seq.0);
        w.u64(self.generation.0);
        w.u64(self.durable_to.0);
        w.u64(self.at.0);
        w.u8(match self.kind {
            Kind::Data => 0,
            Kind::Seal => 1,
            Kind::Open => 2,
        });
        w.u8(blocks as u8);
        w.u16(self.payload_blocks as u16);
        w.u16(own.len() as u16);
        w.u16(prev.len() as u16);
        w.u32(self.store);
        let before = self.prev.unwrap_or(Prev { seq: Seq(0), at: RingPos(0), header_blocks: 0, payload_blocks: 0 });
        w.u16(before.header_blocks as u16);
        w.u16(before.payload_blocks as u16);
        w.u64(before.seq.0);
        w.u64(before.at.0);
        let at = w.at();
        to[at..FIXED].fill(0);
        to[FIXED..FIXED + own.len()].copy_from_slice(own);
        to[FIXED + own.len()..FIXED + own.len() + prev.len()].copy_from_slice(prev);
        to[FIXED + own.len() + prev.len()..].fill(0);
        seal(to, MAGIC, VERSION);
    }
}

/// A decoded header with its sections still as bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Batch<'a> {
    pub header: Header,
    pub header_blocks: u32,
    pub own: &'a [u8],
    pub prev: &'a [u8],
}

impl<'a> Batch<'a> {
    /// Blocks of the batch in the ring.
    pub fn blocks(&self) -> u64 {
        u64::from(self.header_blocks + self.header.payload_blocks)
    }

    /// Whether a header may start here: cheap, for scans.
    pub fn looks_like(bytes: &[u8]) -> bool {
        check_magic(bytes, WHAT, MAGIC).is_ok()
    }

    /// Whether a block that does not decode may be what is left of the header of batch `seq` at `at`: some of what tells one is there.
    pub fn is_hinted(bytes: &[u8], incarnation: Incarnation, seq: Seq, at: RingPos) -> bool {
        let word = |from: usize| bytes.get(from..from + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        Self::looks_like(bytes)
            || bytes.get(PREFIX..PREFIX + 16) == Some(&incarnation.0)
            || word(SEQ_AT) == Some(seq.0)
            || at.0 > 0 && word(PLACE_AT) == Some(at.0)
    }

    /// Decodes the header at the start of `bytes`, which may go on beyond it.
    ///
    /// # Errors
    /// When no whole header that this build reads starts here.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        check_magic(bytes, WHAT, MAGIC)?;
        if bytes.len() < BLOCK {
            return Err(DecodeError::Short { what: WHAT, need: BLOCK, left: bytes.len() });
        }
        // Where the count of blocks lies is needed before the checksum can be: bounded here, trusted after it.
        let header_blocks = u32::from(bytes[65]);
        if header_blocks == 0 || header_blocks > HEADER_BLOCKS_MAX {
            return Err(DecodeError::Limit { what: "header blocks", found: u64::from(header_blocks), limit: u64::from(HEADER_BLOCKS_MAX) });
        }
        let len = header_blocks as usize * BLOCK;
        if bytes.len() < len {
            return Err(DecodeError::Short { what: WHAT, need: len, left: bytes.len() });
        }
        let record = &bytes[..len];
        let version = unseal_versions(record, WHAT, MAGIC)?;
        if !(1..=VERSION).contains(&version) {
            return Err(DecodeError::Version { what: WHAT, found: version, known: VERSION });
        }
        let mut r = Take::new(record, PREFIX, WHAT);
        let incarnation = Incarnation(r.id()?);
        let seq = Seq(r.count("sequence of a batch")?);
        let generation = Generation(r.count("generation of a batch")?);
        let durable_to = Seq(r.count("durable sequence of a batch")?);
        let at = RingPos(r.count("place of a batch")?);
        let kind = match r.u8()? {
            0 => Kind::Data,
            1 => Kind::Seal,
            2 => Kind::Open,
            other => return Err(DecodeError::Value { what: "batch kind", found: u64::from(other) }),
        };
        r.u8()?;
        let payload_blocks = u32::from(r.u16()?);
        if payload_blocks > PAYLOAD_BLOCKS_MAX {
            return Err(DecodeError::Limit {
                what: "payload blocks",
                found: u64::from(payload_blocks),
                limit: u64::from(PAYLOAD_BLOCKS_MAX),
            });
        }
        let own_len = usize::from(r.u16()?);
        let prev_len = usize::from(r.u16()?);
        let store = r.u32()?;
        let prev_header_blocks = u32::from(r.u16()?);
        let prev_payload_blocks = u32::from(r.u16()?);
        let prev_seq = Seq(r.u64()?);
        let prev_at = RingPos(r.u64()?);
        if own_len > SECTION_MAX || prev_len > SECTION_MAX || FIXED + own_len + prev_len > len {
            return Err(DecodeError::Limit {
                what: "descriptors of a header",
                found: (own_len + prev_len) as u64,
                limit: (len - FIXED) as u64,
            });
        }
        if seq.0 == 0
            || durable_to >= seq
            || prev_seq >= seq
            || (prev_seq.0 != 0 && prev_at >= at)
            || prev_payload_blocks > PAYLOAD_BLOCKS_MAX
            || prev_header_blocks > HEADER_BLOCKS_MAX
        {
            return Err(DecodeError::Value { what: "sequence of a batch", found: seq.0 });
        }
        let prev = (prev_seq.0 != 0).then_some(Prev {
            seq: prev_seq,
            at: prev_at,
            header_blocks: prev_header_blocks,
            payload_blocks: prev_payload_blocks,
        });
        let header = Header { incarnation, store, kind, seq, generation, durable_to, at, payload_blocks, prev };
        Ok(Self { header, header_blocks, own: &record[FIXED..FIXED + own_len], prev: &record[FIXED + own_len..FIXED + own_len + prev_len] })
    }
}

const OP_WRITE: u8 = 1;
const OP_ZERO: u8 = 2;
const OP_CREATE: u8 = 3;
const OP_DELETE: u8 = 4;
const OP_RESIZE: u8 = 5;
const OP_MEMBERS: u8 = 6;
const OP_BALLOT: u8 = 7;
const OP_DOUBT: u8 = 8;
const OP_RESOLVED: u8 = 9;
const OP_INSTALL: u8 = 10;
const OP_WHOLE: u8 = 11;
const OP_COPY: u8 = 12;
const OP_SNAPSHOT: u8 = 13;
const OP_UNSNAPSHOT: u8 = 14;
const OP_ORIGIN: u8 = 15;
const OP_RESERVE: u8 = 16;
const OP_LAYER: u8 = 17;
const OP_STACK: u8 = 18;
const OP_SEEN: u8 = 24;
const OP_BELIEVED: u8 = 25;
const OP_OPENED: u8 = 26;
const OP_FORCED: u8 = 27;
const OP_COMMITTED: u8 = 28;

/// A doubt of this replica is one of every replica that is a member of a group: there were too many to name.
pub const EVERY_MEMBER: u32 = u32::MAX;

/// A decoded op.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// One checksum a block.
    Write {
        block: u64,
        crcs: Vec<u32>,
    },
    Zero {
        block: u64,
        count: u32,
    },
    Create(Box<ReplicaShape>),
    Delete,
    Resize {
        blocks: u64,
    },
    /// The group's membership from here on.
    Members(Box<Members>),
    /// The replica's term and vote from here on.
    Ballot {
        term: Term,
        vote: MemberNo,
    },
    /// The replica may have acknowledged entries that are gone: as far as a log that ends like `floor`, or whatever its ballot allowed.
    Doubt {
        floor: Option<(Index, Term)>,
    },
    /// All doubt about the replica is settled.
    Resolved,
    /// The replica's log begins anew after entry `index`, which counts as applied. Its content is whole as of `as_of` alone: the rest is copied.
    Install {
        as_of: Index,
        index: Index,
        index_term: Term,
        members: Box<Members>,
    },
    /// Nothing of the replica's content is missing any more; the volume has `blocks`.
    Whole {
        blocks: u64,
    },
    /// An extent as another member had it: the blocks in `mask` become that.
    Copy(Box<CopyOp>),
    /// The volume's reservations from here on: all of them, whatever they were.
    Reserve(Box<Reservations>),
    /// The volume as of here is kept. The last op of its entry, so that an entry's index tells which layer its ops belong to.
    Snapshot {
        /// Size of the volume.
        blocks: u64,
        shape: Box<SnapshotShape>,
    },
    /// The snapshot is no more.
    Unsnapshot(SnapshotId),
    /// The replica, which has just begun, is a clone of that snapshot of another of the same store.
    Origin {
        segment: SegmentId,
        snapshot: SnapshotId,
    },
    /// A layer of the stack that the next install brings.
    Layer(Box<KeptRow>),
    /// The replica's layers from the install before it on: the last `kept` of those that ops [`Op::Layer`] told, lowest first, and an empty live one.
    Stack(StackOp),
    /// What the replica knows of another member's openings.
    Seen(Box<Seen>),
    /// Enough of the other members believe this opening of the store.
    Believed(OpeningId),
    /// The store is opened with this batch: for every replica that is a member of a group.
    Opened {
        vouched: bool,
    },
    /// The log is known to be committed up to this entry.
    Committed {
        index: Index,
        term: Term,
    },
    /// The group is these members from here on, by force: no entry is of an older term, and no membership before is newer.
    Forced {
        term: Term,
        members: Box<Members>,
    },
}

/// What an install says of layers, beside those that snapshots hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StackOp {
    pub live: u32,
    pub since: Index,
    pub kept: u32,
    /// Entry up to which the log before the install was applied.
    pub applied: Index,
}

/// An extent that was copied from another member.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopyOp {
    pub layer: u32,
    pub extent: u32,
    /// Entry that changed it last.
    pub changed: u64,
    pub states: States,
    /// Blocks that are set, one bit each.
    pub mask: u16,
    /// One a block that is data.
    pub crcs: Vec<u32>,
}

impl CopyOp {
    /// Each block that is set, and its place among the payload where it is data.
    pub fn blocks(&self) -> impl Iterator<Item = (u64, BlockState, usize)> + '_ {
        let mut at = 0;
        (0..EXTENT_BLOCKS as usize).filter_map(move |block| {
            let (state, here) = (self.states.state(block), at);
            at += usize::from(state == BlockState::Data);
            (self.mask >> block & 1 != 0).then_some((u64::from(self.extent) * EXTENT_BLOCKS + block as u64, state, here))
        })
    }
}

impl Op {
    /// Blocks that the op has in its batch's payload.
    pub fn payload_blocks(&self) -> u32 {
        match self {
            Op::Write { crcs, .. } => crcs.len() as u32,
            Op::Copy(copy) => copy.crcs.len() as u32,
            _ => 0,
        }
    }

    /// A store's own word on its member of a group: it stands under index 0, and in no entry that members share.
    pub fn is_own(&self) -> bool {
        match self {
            Self::Ballot { .. } | Self::Doubt { .. } | Self::Resolved | Self::Install { .. } | Self::Whole { .. } | Self::Copy(_) => true,
            Self::Layer(_) | Self::Stack(_) | Self::Seen(_) | Self::Believed(_) | Self::Opened { .. } | Self::Forced { .. } => true,
            Self::Committed { .. } => true,
            Self::Create(_) | Self::Delete | Self::Members(_) | Self::Origin { .. } | Self::Reserve(_) => false,
            Self::Write { .. } | Self::Zero { .. } | Self::Resize { .. } | Self::Snapshot { .. } | Self::Unsnapshot(_) => false,
        }
    }

    /// Checksums of its payload blocks.
    pub fn crcs(&self) -> &[u32] {
        match self {
            Op::Write { crcs, .. } => crcs,
            Op::Copy(copy) => &copy.crcs,
            _ => &[],
        }
    }
}

/// Whether nothing follows a marker: an entry's index tells the layer of all its ops.
pub(crate) fn marker_is_last(ops: &[Op]) -> bool {
    ops.iter().position(|op| matches!(op, Op::Snapshot { .. })).is_none_or(|at| at + 1 == ops.len())
}

/// Flag of an entry's head.
const AGAIN: u8 = 1;

/// A decoded entry. Index 0 (of term 0) is none of a log, but the store's own word on the replica: its birth, ballot or end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub replica: u32,
    pub term: Term,
    pub index: Index,
    pub ops: Vec<Op>,
    /// It stands in an earlier batch too, and replaces nothing that came after it there.
    pub again: bool,
}

impl Entry {
    /// The entry as members of a group have it.
    ///
    /// # Errors
    /// When it is none that a group's log may hold.
    pub fn logged(&self) -> Result<peer::Entry, DecodeError> {
        let mut section = Section::default();
        section.entry(0, Term(0), Index(0));
        let (kind, bytes) = match &self.ops[..] {
            [Op::Members(members)] => (EntryKind::Members, members.encode()),
            ops => {
                ops.iter().for_each(|op| section.push(op));
                (EntryKind::Ops, section.bytes.split_off(ENTRY_HEAD))
            }
        };
        let payload_blocks = self.ops.iter().map(Op::payload_blocks).sum();
        let entry = peer::Entry { term: self.term, index: self.index, kind, bytes, payload_blocks };
        entry.check()?;
        Ok(entry)
    }

    /// Whether its ops may stand in an entry of its index.
    fn check(&self) -> Result<(), DecodeError> {
        let own = |op: &Op| match op {
            Op::Doubt { .. } => true,
            Op::Opened { .. } => self.replica == EVERY_MEMBER,
            Op::Create(_) | Op::Delete | Op::Members(_) | Op::Reserve(_) | Op::Origin { .. } => self.replica != EVERY_MEMBER,
            op => op.is_own() && self.replica != EVERY_MEMBER,
        };
        let fits = match self.index.0 {
            0 => self.term.0 == 0 && self.ops.iter().all(own),
            _ => self.ops.iter().all(|op| if let Op::Members(_) = op { self.ops.len() == 1 } else { !op.is_own() }),
        };
        if fits && marker_is_last(&self.ops) {
            Ok(())
        } else {
            Err(DecodeError::Value { what: "index of an entry, by its term and ops", found: self.index.0 })
        }
    }
}

/// Decodes a section and checks that its writes account for exactly `payload_blocks`.
///
/// # Errors
/// When the bytes are not a section, or count another payload.
pub fn decode_section(bytes: &[u8], payload_blocks: u32) -> Result<Vec<Entry>, DecodeError> {
    let mut r = Take::new(bytes, 0, WHAT_OPS);
    let mut entries = Vec::new();
    let mut payload = 0u32;
    while r.left() > 0 {
        let replica = r.u32()?;
        let count = r.u16()?;
        let flags = r.u16()?;
        let term = Term(r.count("term of an entry")?);
        let index = Index(r.count("index of an entry")?);
        let mut ops = Vec::with_capacity(usize::from(count).min(bytes.len() / OP_HEAD));
        for _ in 0..count {
            let op = take_op(&mut r)?;
            payload += op.payload_blocks();
            ops.push(op);
        }
        let again = flags == u16::from(AGAIN);
        let entry = Entry { replica, term, index, ops, again };
        entry.check()?;
        if flags > u16::from(AGAIN) || again && index.0 == 0 {
            return Err(DecodeError::Value { what: "flags of an entry", found: flags.into() });
        }
        entries.push(entry);
    }
    if payload != payload_blocks {
        return Err(DecodeError::Value { what: "payload blocks by the descriptors", found: u64::from(payload) });
    }
    Ok(entries)
}

/// Decodes the ops of one entry, as they lie in a section after the entry's head and in an append between nodes.
///
/// # Errors
/// When the bytes are not ops that a store may apply.
pub fn decode_ops(bytes: &[u8]) -> Result<Vec<Op>, DecodeError> {
    if bytes.len() > OPS_MAX {
        return Err(DecodeError::Limit { what: "bytes of an entry's ops", found: bytes.len() as u64, limit: OPS_MAX as u64 });
    }
    let mut r = Take::new(bytes, 0, WHAT_OPS);
    let mut ops = Vec::new();
    let mut payload = 0;
    while r.left() > 0 {
        let op = take_op(&mut r)?;
        payload += op.payload_blocks();
        ops.push(op);
    }
    if payload > PAYLOAD_BLOCKS_MAX {
        return Err(DecodeError::Limit { what: "payload blocks of an entry", found: payload.into(), limit: PAYLOAD_BLOCKS_MAX.into() });
    }
    Ok(ops)
}

/// Kind and count of each op. Looks no further: for bytes that [`decode_ops`] took before.
struct RawOps<'a>(&'a [u8]);

impl Iterator for RawOps<'_> {
    type Item = (u8, u32);

    fn next(&mut self) -> Option<(u8, u32)> {
        let (word, rest) = self.0.split_first_chunk::<4>()?;
        let word = u32::from_le_bytes(*word);
        let (kind, count) = ((word & 0xff) as u8, word >> 8);
        let after = match kind {
            OP_WRITE => 4 * count as usize,
            OP_CREATE | OP_MEMBERS | OP_BALLOT | OP_DOUBT | OP_INSTALL | OP_COPY | OP_RESERVE | OP_SNAPSHOT | OP_UNSNAPSHOT | OP_ORIGIN
            | OP_LAYER | OP_STACK | OP_SEEN | OP_BELIEVED | OP_FORCED | OP_COMMITTED => count as usize,
            _ => 0,
        };
        self.0 = rest.get(OP_HEAD - 4 + after..).unwrap_or(&[]);
        Some((kind, count))
    }
}

/// Whether an entry's ops end with a snapshot's marker. Looks no further: for bytes that [`decode_ops`] took before.
pub(crate) fn is_marker(ops: &[u8]) -> bool {
    RawOps(ops).any(|(kind, _)| kind == OP_SNAPSHOT)
}

/// Payload blocks that an entry's ops have. Looks no further: for bytes that [`decode_ops`] took before.
pub fn payload_blocks_of(ops: &[u8]) -> u32 {
    RawOps(ops).map(|(kind, count)| if kind == OP_WRITE { count } else { 0 }).sum()
}

fn take_op(r: &mut Take<'_>) -> Result<Op, DecodeError> {
    let word = r.u32()?;
    let (kind, count) = ((word & 0xff) as u8, word >> 8);
    let block = r.u64()?;
    Ok(match kind {
        OP_WRITE => {
            if count == 0 || count > PAYLOAD_BLOCKS_MAX {
                return Err(DecodeError::Limit {
                    what: "blocks of a write",
                    found: u64::from(count),
                    limit: u64::from(PAYLOAD_BLOCKS_MAX),
                });
            }
            check_range(block, count)?;
            let mut crcs = Vec::with_capacity(count as usize);
            for _ in 0..count {
                crcs.push(r.u32()?);
            }
            Op::Write { block, crcs }
        }
        OP_ZERO => {
            check_range(block, count)?;
            Op::Zero { block, count }
        }
        OP_CREATE => Op::Create(Box::new(ReplicaShape::take(&mut Take::new(r.bytes(count as usize)?, 0, WHAT_OPS))?)),
        OP_DELETE => Op::Delete,
        OP_RESIZE => {
            check_size(block)?;
            Op::Resize { blocks: block }
        }
        OP_MEMBERS => {
            zero_block(block)?;
            Op::Members(Box::new(Members::decode(r.bytes(count as usize)?)?))
        }
        OP_BALLOT => {
            let vote = MemberNo(r.count("vote of a ballot")?);
            if count != 8 || block >= crate::COUNT_LIMIT || block == 0 {
                return Err(DecodeError::Value { what: "term of a ballot", found: block });
            }
            Op::Ballot { term: Term(block), vote }
        }
        OP_DOUBT => {
            let (index, term) = (Index(block), Term(r.count("term of a doubt")?));
            if count != 8 || block >= crate::COUNT_LIMIT || block > 0 && term.0 == 0 {
                return Err(DecodeError::Value { what: "last entry of a doubt", found: block });
            }
            Op::Doubt { floor: (term.0 != 0).then_some((index, term)) }
        }
        OP_RESOLVED => {
            zero_block(block)?;
            Op::Resolved
        }
        OP_INSTALL => {
            let mut r = Take::new(r.bytes(count as usize)?, 0, WHAT_OPS);
            let (index, index_term) = (Index(r.count("index of an install")?), Term(r.count("term of an install")?));
            if index.0 == 0 || index_term.0 == 0 || block > index.0 {
                return Err(DecodeError::Value { what: "index of an install", found: index.0 });
            }
            let members = Box::new(Members::decode(r.bytes(r.left())?)?);
            Op::Install { as_of: Index(block), index, index_term, members }
        }
        OP_WHOLE => {
            check_size(block)?;
            Op::Whole { blocks: block }
        }
        OP_COPY => {
            check_range(block, EXTENT_BLOCKS as u32)?;
            let mut r = Take::new(r.bytes(count as usize)?, 0, WHAT_OPS);
            let (changed, states, mask) = (r.count("entry that changed an extent")?, States::take(&mut r)?, r.u16()?);
            let layer = match r.u16()? {
                0 => 0,
                1 => crate::layer::take_upper(&mut r)?,
                other => return Err(DecodeError::Value { what: "flags of a copy", found: other.into() }),
            };
            if block % EXTENT_BLOCKS != 0 || r.left() != 4 * states.data_blocks() as usize {
                return Err(DecodeError::Value { what: "extent of a copy, or its checksums, first block", found: block });
            }
            let crcs = (0..states.data_blocks()).map(|_| r.u32()).collect::<Result<_, _>>()?;
            Op::Copy(Box::new(CopyOp { layer, extent: (block / EXTENT_BLOCKS) as u32, changed, states, mask, crcs }))
        }
        OP_RESERVE => {
            zero_block(block)?;
            Op::Reserve(Box::new(Reservations::decode(r.bytes(count as usize)?)?))
        }
        OP_SNAPSHOT => {
            check_size(block)?;
            Op::Snapshot { blocks: block, shape: Box::new(SnapshotShape::take(&mut Take::new(r.bytes(count as usize)?, 0, WHAT_OPS))?) }
        }
        OP_UNSNAPSHOT => {
            zero_block(block)?;
            expect_len(count, 16)?;
            Op::Unsnapshot(SnapshotId(r.id()?))
        }
        OP_ORIGIN => {
            zero_block(block)?;
            expect_len(count, 32)?;
            Op::Origin { segment: SegmentId(r.id()?), snapshot: SnapshotId(r.id()?) }
        }
        OP_LAYER => {
            zero_block(block)?;
            let mut r = Take::new(r.bytes(count as usize)?, 0, WHAT_OPS);
            let row = KeptRow::take(&mut r)?;
            expect_len(r.left() as u32, 0)?;
            Op::Layer(Box::new(row))
        }
        OP_STACK => {
            expect_len(count, 16)?;
            let (live, kept, applied) = (r.u32()?, r.u32()?, Index(r.count("entry that was applied")?));
            if !(1..LAYER_NO_LIMIT).contains(&live) || block == 0 || block >= crate::COUNT_LIMIT {
                return Err(DecodeError::Value { what: "number or marker of a layer, number", found: live.into() });
            }
            Op::Stack(StackOp { live, since: Index(block), kept, applied })
        }
        OP_SEEN => {
            let mut r = Take::new(r.bytes(count as usize)?, 0, WHAT_OPS);
            let (opening, sealed) = (Opening::take(&mut r)?, Seq(r.count("batch known durable")?));
            if block == 0 || block >= crate::COUNT_LIMIT || r.left() > 0 {
                return Err(DecodeError::Value { what: "member whose opening is recorded", found: block });
            }
            Op::Seen(Box::new(Seen { no: MemberNo(block), opening, sealed }))
        }
        OP_BELIEVED => {
            zero_block(block)?;
            expect_len(count, OpeningId::BYTES as u32)?;
            Op::Believed(OpeningId::take(r)?.ok_or(DecodeError::Value { what: "generation of an opening", found: 0 })?)
        }
        OP_FORCED => {
            if block == 0 || block >= crate::COUNT_LIMIT {
                return Err(DecodeError::Value { what: "term of a membership by force", found: block });
            }
            Op::Forced { term: Term(block), members: Box::new(Members::decode(r.bytes(count as usize)?)?) }
        }
        OP_COMMITTED => {
            expect_len(count, 8)?;
            let term = Term(r.count("term of an entry")?);
            if block == 0 || block >= crate::COUNT_LIMIT || term.0 == 0 {
                return Err(DecodeError::Value { what: "index or term of a committed entry, index", found: block });
            }
            Op::Committed { index: Index(block), term }
        }
        OP_OPENED => {
            zero_block(block)?;
            if count > 1 {
                return Err(DecodeError::Value { what: "whether an opening is vouched for", found: count.into() });
            }
            Op::Opened { vouched: count == 1 }
        }
        other => return Err(DecodeError::Value { what: "kind of an op", found: u64::from(other) }),
    })
}

/// The block number of an op that has no use for one.
fn zero_block(block: u64) -> Result<(), DecodeError> {
    if block == 0 { Ok(()) } else { Err(DecodeError::Value { what: "block of an op without one", found: block }) }
}

fn check_size(blocks: u64) -> Result<(), DecodeError> {
    match blocks {
        1..=crate::VOLUME_BLOCKS_MAX => Ok(()),
        found => Err(DecodeError::Limit { what: "volume size in blocks", found, limit: crate::VOLUME_BLOCKS_MAX }),
    }
}

fn expect_len(found: u32, len: u32) -> Result<(), DecodeError> {
    if found == len { Ok(()) } else { Err(DecodeError::Value { what: "bytes of an op", found: found.into() }) }
}

fn check_range(block: u64, count: u32) -> Result<(), DecodeError> {
    match block.checked_add(u64::from(count)) {
        Some(end) if end <= crate::VOLUME_BLOCKS_MAX => Ok(()),
        _ => Err(DecodeError::Limit { what: "block of an op", found: block, limit: crate::VOLUME_BLOCKS_MAX }),
    }
}

#[cfg(test)]
mod tests;
