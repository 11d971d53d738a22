//! Batches of the log: a header of one or two blocks, then the payload blocks, written in one device command.
//!
//! The header tells its own place and the batch's descriptors, and repeats the descriptors of the batch before it, so that
//! one rotten header does not hide what was in it. See docs/disk-format.md for how recovery judges what it finds.

use crate::codec::{PREFIX, Put, Take, check_magic, seal, unseal_versions};
use crate::layer::SnapshotShape;
use crate::page::BlockState;
use crate::peer::{self, EntryKind, MemberNo, Members, Opening, OpeningId, Seen, States};
use crate::reservation::Reservations;
use crate::{BLOCK, DecodeError, EXTENT_BLOCKS, Generation, Incarnation, Index, ReplicaShape, RingPos, SegmentId, Seq, SnapshotId, Term};

mod lens;

pub use lens::{BALLOT_LEN, BELIEVED_LEN, RESOLVED_LEN, SEEN_LEN, WHOLE_LEN, copy_len, forced_len, install_len, logged_len};

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

/// Builds a section: the descriptors of one batch. Keeps its capacity from batch to batch.
#[derive(Default, Debug)]
pub struct Section {
    bytes: Vec<u8>,
    /// Where the current entry's op count lies.
    entry_at: usize,
}

impl Section {
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.entry_at = 0;
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A section read back, to be repeated in the next header.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), entry_at: 0 }
    }

    /// Starts an entry; ops follow.
    pub fn entry(&mut self, replica: u32, term: Term, index: Index) {
        self.entry_at = self.bytes.len();
        self.bytes.extend_from_slice(&replica.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&term.0.to_le_bytes());
        self.bytes.extend_from_slice(&index.0.to_le_bytes());
    }

    fn op(&mut self, kind: u8, count: u32, block: u64) {
        assert!(count <= ZERO_BLOCKS_MAX);
        let at = self.entry_at + 4;
        let ops = u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]]) + 1;
        self.bytes[at..at + 2].copy_from_slice(&ops.to_le_bytes());
        self.bytes.extend_from_slice(&(u32::from(kind) | count << 8).to_le_bytes());
        self.bytes.extend_from_slice(&block.to_le_bytes());
    }

    /// Blocks from `block`, one checksum each; their payload is next in the batch.
    pub fn write(&mut self, block: u64, crcs: &[u32]) {
        self.op(OP_WRITE, crcs.len() as u32, block);
        for crc in crcs {
            self.bytes.extend_from_slice(&crc.to_le_bytes());
        }
    }

    /// `count` blocks from `block` read as zeros from here on.
    pub fn zero(&mut self, block: u64, count: u32) {
        self.op(OP_ZERO, count, block);
    }

    /// A decoded op, as the bytes that it was decoded from.
    pub fn push(&mut self, op: &Op) {
        match op {
            Op::Write { block, crcs } => self.write(*block, crcs),
            Op::Zero { block, count } => self.zero(*block, *count),
            Op::Create(shape) => self.create(shape),
            Op::Delete => self.delete(),
            Op::Resize { blocks } => self.resize(*blocks),
            Op::Members(members) => self.members(members),
            Op::Ballot { term, vote } => self.ballot(*term, *vote),
            Op::Doubt { floor } => self.doubt(*floor),
            Op::Resolved => self.resolved(),
            Op::Install { as_of, index, index_term, members } => self.install(*as_of, *index, *index_term, members),
            Op::Whole { blocks } => self.whole(*blocks),
            Op::Copy(copy) => self.copy(copy),
            Op::Reserve(state) => self.reserve(state),
            Op::Snapshot(shape) => self.snapshot(shape),
            Op::Unsnapshot(id) => self.unsnapshot(*id),
            Op::Origin { segment, snapshot } => self.origin(*segment, *snapshot),
            Op::Seen(seen) => self.seen(seen),
            Op::Believed(id) => self.believed(*id),
            Op::Opened { vouched } => self.opened(*vouched),
            Op::Forced { term, members } => self.forced(*term, members),
        }
    }

    /// The replica begins.
    pub fn create(&mut self, shape: &ReplicaShape) {
        let len = shape.encoded_len();
        self.op(OP_CREATE, len as u32, 0);
        let at = self.bytes.len();
        self.bytes.resize(at + len, 0);
        shape.put(&mut Put::new(&mut self.bytes, at));
    }

    /// The replica ends.
    pub fn delete(&mut self) {
        self.op(OP_DELETE, 0, 0);
    }

    /// The replica has `blocks` from here on.
    pub fn resize(&mut self, blocks: u64) {
        self.op(OP_RESIZE, 0, blocks);
    }

    /// The group's members from here on: with `create` at the birth of a member replica, alone in an entry of its log.
    pub fn members(&mut self, members: &Members) {
        self.members_bytes(&members.encode());
    }

    fn members_bytes(&mut self, bytes: &[u8]) {
        self.op(OP_MEMBERS, bytes.len() as u32, 0);
        self.bytes.extend_from_slice(bytes);
    }

    /// The replica's term and vote from here on. `MemberNo(0)` is a vote for nobody.
    pub fn ballot(&mut self, term: Term, vote: MemberNo) {
        self.op(OP_BALLOT, 8, term.0);
        self.bytes.extend_from_slice(&vote.0.to_le_bytes());
    }

    /// The replica may have acknowledged entries that stood after what stands before this, and are gone: none beyond the end of a log that ends like
    /// `floor`. `None`: whatever its ballot allowed.
    pub fn doubt(&mut self, floor: Option<(Index, Term)>) {
        let (index, term) = floor.unwrap_or_default();
        self.op(OP_DOUBT, 8, index.0);
        self.bytes.extend_from_slice(&term.0.to_le_bytes());
    }

    /// All doubt about the replica before this is settled.
    pub fn resolved(&mut self) {
        self.op(OP_RESOLVED, 0, 0);
    }

    /// The replica's log begins anew.
    pub fn install(&mut self, as_of: Index, index: Index, index_term: Term, members: &Members) {
        let members = members.encode();
        self.op(OP_INSTALL, 16 + members.len() as u32, as_of.0);
        self.bytes.extend_from_slice(&index.0.to_le_bytes());
        self.bytes.extend_from_slice(&index_term.0.to_le_bytes());
        self.bytes.extend_from_slice(&members);
    }

    /// The replica's content is whole.
    pub fn whole(&mut self, blocks: u64) {
        self.op(OP_WHOLE, 0, blocks);
    }

    /// An extent that was copied; the payload of what is data is next in the batch.
    pub fn copy(&mut self, copy: &CopyOp) {
        self.op(OP_COPY, 16 + 4 * copy.crcs.len() as u32, u64::from(copy.extent) * EXTENT_BLOCKS);
        self.bytes.extend_from_slice(&copy.changed.to_le_bytes());
        self.bytes.extend_from_slice(&copy.states.0.to_le_bytes());
        self.bytes.extend_from_slice(&copy.mask.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 2]);
        for crc in &copy.crcs {
            self.bytes.extend_from_slice(&crc.to_le_bytes());
        }
    }

    /// The volume's reservations are these from here on.
    pub fn reserve(&mut self, state: &Reservations) {
        self.op(OP_RESERVE, state.encoded_len() as u32, 0);
        self.bytes.extend_from_slice(&state.encode());
    }

    /// The volume as of here is a snapshot: the last op of its entry.
    pub fn snapshot(&mut self, shape: &SnapshotShape) {
        let len = shape.encoded_len();
        self.op(OP_SNAPSHOT, len as u32, 0);
        let at = self.bytes.len();
        self.bytes.resize(at + len, 0);
        shape.put(&mut Put::new(&mut self.bytes, at));
    }

    /// The snapshot is no more.
    pub fn unsnapshot(&mut self, id: SnapshotId) {
        self.op(OP_UNSNAPSHOT, 16, 0);
        self.bytes.extend_from_slice(&id.0);
    }

    /// The replica, which has just begun, is a clone.
    pub fn origin(&mut self, segment: SegmentId, snapshot: SnapshotId) {
        self.op(OP_ORIGIN, 32, 0);
        self.bytes.extend_from_slice(&segment.0);
        self.bytes.extend_from_slice(&snapshot.0);
    }

    /// What the replica knows of another member's openings.
    pub fn seen(&mut self, seen: &Seen) {
        self.op(OP_SEEN, Seen::BYTES as u32, seen.no.0);
        self.bytes.extend_from_slice(&seen.opening.encode());
        self.bytes.extend_from_slice(&seen.sealed.0.to_le_bytes());
    }

    /// Enough of the other members believe this opening of the store.
    pub fn believed(&mut self, id: OpeningId) {
        self.op(OP_BELIEVED, OpeningId::BYTES as u32, 0);
        self.bytes.extend_from_slice(&OpeningId::encode(Some(id)));
    }

    /// The store is opened with this batch, and its node has written down the opening before, or not.
    pub fn opened(&mut self, vouched: bool) {
        self.op(OP_OPENED, u32::from(vouched), 0);
    }

    /// The group is these members from here on, by force: no entry is of an older term, and no change of members before this counts.
    pub fn forced(&mut self, term: Term, members: &Members) {
        let members = members.encode();
        self.op(OP_FORCED, members.len() as u32, term.0);
        self.bytes.extend_from_slice(&members);
    }

    /// A whole entry of ops that [`decode_ops`] took before.
    pub fn raw(&mut self, replica: u32, term: Term, index: Index, ops: &[u8]) {
        self.entry(replica, term, index);
        let count = RawOps(ops).count() as u16;
        self.bytes[self.entry_at + 4..self.entry_at + 6].copy_from_slice(&count.to_le_bytes());
        self.bytes.extend_from_slice(ops);
    }

    /// The entry that was put last stands in an earlier batch too: it replaces nothing, but its payload may be read here.
    pub fn again(&mut self) {
        self.bytes[self.entry_at + 6] = AGAIN;
    }

    /// A whole entry of a group's log, of either kind; takes [`logged_len`] bytes.
    pub fn logged(&mut self, replica: u32, entry: &peer::Entry) {
        match entry.kind {
            EntryKind::Ops => self.raw(replica, entry.term, entry.index, &entry.bytes),
            EntryKind::Members => {
                self.entry(replica, entry.term, entry.index);
                self.members_bytes(&entry.bytes);
            }
        }
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
const OP_SEEN: u8 = 24;
const OP_BELIEVED: u8 = 25;
const OP_OPENED: u8 = 26;
const OP_FORCED: u8 = 27;

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
    Snapshot(Box<SnapshotShape>),
    /// The snapshot is no more.
    Unsnapshot(SnapshotId),
    /// The replica, which has just begun, is a clone of that snapshot of another of the same store.
    Origin {
        segment: SegmentId,
        snapshot: SnapshotId,
    },
    /// What the replica knows of another member's openings.
    Seen(Box<Seen>),
    /// Enough of the other members believe this opening of the store.
    Believed(OpeningId),
    /// The store is opened with this batch: for every replica that is a member of a group.
    Opened {
        vouched: bool,
    },
    /// The group is these members from here on, by force: no entry is of an older term, and no change of members before this counts.
    Forced {
        term: Term,
        members: Box<Members>,
    },
}

/// An extent that was copied from another member.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopyOp {
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

    /// Checksums of its payload blocks.
    pub fn crcs(&self) -> &[u32] {
        match self {
            Op::Write { crcs, .. } => crcs,
            Op::Copy(copy) => &copy.crcs,
            _ => &[],
        }
    }
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
            Op::Create(_) | Op::Members(_) | Op::Ballot { .. } | Op::Delete | Op::Resolved => self.replica != EVERY_MEMBER,
            Op::Install { .. } | Op::Whole { .. } | Op::Copy(_) | Op::Reserve(_) | Op::Origin { .. } => self.replica != EVERY_MEMBER,
            Op::Seen(_) | Op::Believed(_) | Op::Forced { .. } => self.replica != EVERY_MEMBER,
            Op::Write { .. } | Op::Zero { .. } | Op::Resize { .. } | Op::Snapshot(_) | Op::Unsnapshot(_) => false,
        };
        let marked = self.ops.iter().position(|op| matches!(op, Op::Snapshot(_)));
        let fits = match self.index.0 {
            0 => self.term.0 == 0 && self.ops.iter().all(own),
            _ => self.ops.iter().all(|op| match op {
                Op::Ballot { .. } | Op::Doubt { .. } | Op::Resolved => false,
                Op::Install { .. } | Op::Whole { .. } | Op::Copy(_) => false,
                Op::Seen(_) | Op::Believed(_) | Op::Opened { .. } | Op::Forced { .. } => false,
                Op::Members(_) => self.ops.len() == 1,
                _ => true,
            }),
        };
        let fits = fits && marked.is_none_or(|at| at + 1 == self.ops.len());
        if fits { Ok(()) } else { Err(DecodeError::Value { what: "index of an entry, by its term and ops", found: self.index.0 }) }
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
            | OP_SEEN | OP_BELIEVED | OP_FORCED => count as usize,
            _ => 0,
        };
        self.0 = rest.get(OP_HEAD - 4 + after..).unwrap_or(&[]);
        Some((kind, count))
    }
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
            if block == 0 || block > crate::VOLUME_BLOCKS_MAX {
                return Err(DecodeError::Limit { what: "volume size in blocks", found: block, limit: crate::VOLUME_BLOCKS_MAX });
            }
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
            if block == 0 || block > crate::VOLUME_BLOCKS_MAX {
                return Err(DecodeError::Limit { what: "volume size in blocks", found: block, limit: crate::VOLUME_BLOCKS_MAX });
            }
            Op::Whole { blocks: block }
        }
        OP_COPY => {
            check_range(block, EXTENT_BLOCKS as u32)?;
            let mut r = Take::new(r.bytes(count as usize)?, 0, WHAT_OPS);
            let (changed, states, mask) = (r.count("entry that changed an extent")?, States::take(&mut r)?, r.u16()?);
            if r.u16()? != 0 || block % EXTENT_BLOCKS != 0 || r.left() != 4 * states.data_blocks() as usize {
                return Err(DecodeError::Value { what: "extent of a copy, or its checksums, first block", found: block });
            }
            let crcs = (0..states.data_blocks()).map(|_| r.u32()).collect::<Result<_, _>>()?;
            Op::Copy(Box::new(CopyOp { extent: (block / EXTENT_BLOCKS) as u32, changed, states, mask, crcs }))
        }
        OP_RESERVE => {
            zero_block(block)?;
            Op::Reserve(Box::new(Reservations::decode(r.bytes(count as usize)?)?))
        }
        OP_SNAPSHOT => {
            zero_block(block)?;
            Op::Snapshot(Box::new(SnapshotShape::take(&mut Take::new(r.bytes(count as usize)?, 0, WHAT_OPS))?))
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
