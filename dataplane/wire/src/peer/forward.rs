//! Commands of hosts that have one path by nature (vhost, vfio-user): a node whose member does not lead sends them to the one that does, and is
//! answered once. Not here: what is sent again, and when (the node's: see ARCHITECTURE.md).

use super::{FRAME_BLOCKS_MAX, Grow, check_payload, limit, zeros};
use crate::codec::Take;
use crate::{BLOCK, DecodeError, Incarnation, SegmentId, Term, VOLUME_BLOCKS_MAX};

/// What is asked of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Deed {
    Read = 1,
    Write = 2,
    Zero = 3,
    Flush = 4,
    /// What is expected, then what to write.
    CompareWrite = 5,
}

impl Deed {
    pub const ALL: [Self; 5] = [Self::Read, Self::Write, Self::Zero, Self::Flush, Self::CompareWrite];

    /// Doing it twice may be seen.
    pub fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::Flush)
    }

    /// Bytes of payload that go with it, of those that come back, where it is about `len` bytes of the volume.
    pub fn payload(self, len: u64) -> (u64, u64) {
        match self {
            Self::Read => (0, len),
            Self::Write => (len, 0),
            Self::CompareWrite => (2 * len, 0),
            Self::Zero | Self::Flush => (0, 0),
        }
    }
}

/// Bytes of a forwarded command's payload at most.
pub const FORWARD_BYTES_MAX: u64 = FRAME_BLOCKS_MAX as u64 * BLOCK as u64;

/// A command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Forward {
    /// Counts the commands of one life of one node to one volume, in the order in which they came.
    pub id: u64,
    /// All before this one are answered, and will not be asked for again.
    pub done: u64,
    /// The life of the node that asks.
    pub session: Incarnation,
    pub segment: SegmentId,
    /// Only who leads in this term is meant.
    pub term: Term,
    pub deed: Deed,
    /// Bytes of the volume.
    pub offset: u64,
    pub len: u64,
    /// One a block of payload, the last filled up with zeros.
    pub crcs: Vec<u32>,
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Ok = 0,
    OutOfRange = 1,
    Invalid = 2,
    NoSpace = 3,
    Miscompare = 4,
    Unrecovered = 5,
    Fenced = 6,
    /// Not done here, and not by this node in this term.
    NotReady = 7,
    Conflict = 8,
}

impl Outcome {
    pub const ALL: [Self; 9] = [
        Self::Ok,
        Self::OutOfRange,
        Self::Invalid,
        Self::NoSpace,
        Self::Miscompare,
        Self::Unrecovered,
        Self::Fenced,
        Self::NotReady,
        Self::Conflict,
    ];
}

/// The answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Forwarded {
    pub id: u64,
    pub session: Incarnation,
    pub segment: SegmentId,
    /// As in the command.
    pub term: Term,
    pub outcome: Outcome,
    /// Where a comparison found another byte; else 0.
    pub at: u32,
    /// Of what was read.
    pub crcs: Vec<u32>,
}

fn take_crcs(r: &mut Take<'_>) -> Result<Vec<u32>, DecodeError> {
    let count = r.u32()?;
    limit("payload blocks of a forwarded command", count.into(), FRAME_BLOCKS_MAX.into())?;
    (0..count).map(|_| r.u32()).collect()
}

fn put_crcs(crcs: &[u32], w: &mut Grow) {
    w.u32(crcs.len() as u32);
    crcs.iter().for_each(|crc| w.u32(*crc));
}

impl Forward {
    pub fn payload_blocks(&self) -> u32 {
        self.crcs.len() as u32
    }

    pub fn encoded_len(&self) -> usize {
        8 + 8 + 16 + 16 + 8 + 8 + 8 + 8 + 4 + 4 * self.crcs.len()
    }

    /// # Errors
    /// When `payload` is not that of the command.
    pub fn check(&self, payload: &[u8]) -> Result<(), DecodeError> {
        check_payload(self.crcs.iter(), payload)
    }

    pub(super) fn put(&self, w: &mut Grow) {
        w.u64(self.id);
        w.u64(self.done);
        w.bytes(&self.session.0);
        w.bytes(&self.segment.0);
        w.u64(self.term.0);
        w.u8(self.deed as u8);
        w.zeros(7);
        w.u64(self.offset);
        w.u64(self.len);
        put_crcs(&self.crcs, w);
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (id, done) = (r.count("number of a forwarded command")?, r.count("number of a forwarded command")?);
        let (session, segment) = (Incarnation(r.id()?), SegmentId(r.id()?));
        let term = Term(r.count("term of a forwarded command")?);
        let code = r.u8()?;
        let deed = Deed::ALL.into_iter().find(|deed| *deed as u8 == code);
        let deed = deed.ok_or(DecodeError::Value { what: "kind of a forwarded command", found: code.into() })?;
        zeros(r, 7)?;
        let (offset, len) = (r.u64()?, r.u64()?);
        let size = VOLUME_BLOCKS_MAX * BLOCK as u64;
        limit("last byte of a forwarded command", offset, size)?;
        limit("last byte of a forwarded command", len, size - offset)?;
        let (goes, comes) = deed.payload(len);
        limit("bytes of a forwarded command", goes.max(comes), FORWARD_BYTES_MAX)?;
        let crcs = take_crcs(r)?;
        if id < done || term.0 == 0 || crcs.len() as u64 != goes.div_ceil(BLOCK as u64) || (deed == Deed::Flush) != (len == 0) {
            return Err(DecodeError::Value { what: "number, term, length or payload of a forwarded command, number", found: id });
        }
        Ok(Self { id, done, session, segment, term, deed, offset, len, crcs })
    }
}

impl Forwarded {
    pub fn payload_blocks(&self) -> u32 {
        self.crcs.len() as u32
    }

    pub fn encoded_len(&self) -> usize {
        8 + 16 + 16 + 8 + 4 + 4 + 4 + 4 * self.crcs.len()
    }

    /// # Errors
    /// When `payload` is not that of the answer.
    pub fn check(&self, payload: &[u8]) -> Result<(), DecodeError> {
        check_payload(self.crcs.iter(), payload)
    }

    pub(super) fn put(&self, w: &mut Grow) {
        w.u64(self.id);
        w.bytes(&self.session.0);
        w.bytes(&self.segment.0);
        w.u64(self.term.0);
        w.u8(self.outcome as u8);
        w.zeros(3);
        w.u32(self.at);
        put_crcs(&self.crcs, w);
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let id = r.count("number of a forwarded command")?;
        let (session, segment) = (Incarnation(r.id()?), SegmentId(r.id()?));
        let term = Term(r.count("term of a forwarded command")?);
        let code = r.u8()?;
        let outcome = Outcome::ALL.into_iter().find(|outcome| *outcome as u8 == code);
        let outcome = outcome.ok_or(DecodeError::Value { what: "outcome of a forwarded command", found: code.into() })?;
        zeros(r, 3)?;
        let at = r.u32()?;
        let crcs = take_crcs(r)?;
        if term.0 == 0 || at != 0 && outcome != Outcome::Miscompare || !crcs.is_empty() && outcome != Outcome::Ok {
            return Err(DecodeError::Value { what: "term, place or payload of an answer, number", found: id });
        }
        Ok(Self { id, session, segment, term, outcome, at, crcs })
    }
}
