//! Asking another member: for the block with a certain checksum, after a read that failed its own, and for entries of the log that
//! recovery could not judge.

use super::group::Entry;
use super::members::MemberNo;
use super::{Grow, check_payload, limit, take_pair, zeros};
use crate::codec::Take;
use crate::{BLOCK, DecodeError, Index, SegmentId, Term};

/// Entries of one answer at most.
const ENTRIES_MAX: u32 = 1024;

/// Who has the block of the volume with this checksum? Any version but that is of no use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FetchAsk {
    /// The asker's own number for it; the answer repeats it.
    pub id: u64,
    pub segment: SegmentId,
    pub from: MemberNo,
    pub to: MemberNo,
    pub block: u64,
    /// What the asker has applied: who has less may come to have the block.
    pub applied: Index,
    pub crc: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FetchResult {
    /// The block follows as payload.
    Found { crc: u32 },
    /// There is another version here, or none.
    Differs,
    /// Its bytes are bad here too.
    Unreadable,
    /// Not now: ask again, or someone else.
    Busy,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FetchAnswer {
    pub id: u64,
    pub segment: SegmentId,
    pub from: MemberNo,
    pub to: MemberNo,
    pub result: FetchResult,
}

impl FetchAsk {
    pub const ENCODED_LEN: usize = 8 + 16 + 8 + 8 + 8 + 8 + 4 + 4;

    pub(super) fn put(&self, w: &mut Grow) {
        w.u64(self.id);
        w.bytes(&self.segment.0);
        w.u64(self.from.0);
        w.u64(self.to.0);
        w.u64(self.block);
        w.u64(self.applied.0);
        w.u32(self.crc);
        w.zeros(4);
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (id, segment) = (r.u64()?, SegmentId(r.id()?));
        let (from, to) = take_pair(r)?;
        let (block, applied, crc) = (r.u64()?, Index(r.u64()?), r.u32()?);
        zeros(r, 4)?;
        limit("block of a fetch", block, crate::VOLUME_BLOCKS_MAX - 1)?;
        Ok(Self { id, segment, from, to, block, applied, crc })
    }
}

impl FetchAnswer {
    pub const ENCODED_LEN: usize = 8 + 16 + 8 + 8 + 4 + 4;

    pub fn payload_blocks(&self) -> u32 {
        u32::from(matches!(self.result, FetchResult::Found { .. }))
    }

    /// Whether `payload` is the block with the checksum that was asked for.
    ///
    /// # Errors
    /// When it is not.
    pub fn check(&self, asked: u32, payload: &[u8]) -> Result<(), DecodeError> {
        match self.result {
            FetchResult::Found { crc } if crc == asked => check_payload([crc].iter(), payload),
            FetchResult::Found { crc } => Err(DecodeError::Checksum { what: "block that was fetched", found: asked, computed: crc }),
            _ => Err(DecodeError::Short { what: "block that was fetched", need: BLOCK, left: 0 }),
        }
    }

    pub(super) fn put(&self, w: &mut Grow) {
        w.u64(self.id);
        w.bytes(&self.segment.0);
        w.u64(self.from.0);
        w.u64(self.to.0);
        let (code, crc) = match self.result {
            FetchResult::Found { crc } => (0, crc),
            FetchResult::Differs => (1, 0),
            FetchResult::Unreadable => (2, 0),
            FetchResult::Busy => (3, 0),
        };
        w.u32(code);
        w.u32(crc);
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (id, segment) = (r.u64()?, SegmentId(r.id()?));
        let (from, to) = take_pair(r)?;
        let (code, crc) = (r.u32()?, r.u32()?);
        let result = match code {
            0 => FetchResult::Found { crc },
            1 => FetchResult::Differs,
            2 => FetchResult::Unreadable,
            3 => FetchResult::Busy,
            other => return Err(DecodeError::Value { what: "result of a fetch", found: other.into() }),
        };
        if code != 0 && crc != 0 {
            return Err(DecodeError::Value { what: "checksum of a fetch that found nothing", found: crc.into() });
        }
        Ok(Self { id, segment, from, to, result })
    }
}

/// What stands in your log of this group from `first` on, as far as `last`, or from its end on where that is before `first`? Asked by a member whose
/// recovery found what it cannot judge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EntriesAsk {
    pub id: u64,
    pub segment: SegmentId,
    pub from: MemberNo,
    pub to: MemberNo,
    pub first: Index,
    pub last: Index,
}

/// What a member has of one entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EntryState {
    /// Intact; its payload follows.
    Whole(Entry),
    /// Intact, of that term; not sent along.
    Held(Term),
    /// It may have had it: it cannot judge its own log there.
    Unknown,
}

/// Entries from `first` on, one after the other; what comes after the last of them is absent from this member's log,
/// unless `more` says that the answer was cut short. To a member in doubt only the log's end matters: then `first` is the last entry, and alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EntriesAnswer {
    pub id: u64,
    pub segment: SegmentId,
    pub from: MemberNo,
    pub to: MemberNo,
    /// The answerer's term, persisted, and whether it leads it.
    pub term: Term,
    pub leads: bool,
    pub more: bool,
    pub first: Index,
    pub entries: Vec<EntryState>,
}

impl EntriesAsk {
    pub(super) fn put(&self, w: &mut Grow) {
        w.u64(self.id);
        w.bytes(&self.segment.0);
        w.u64(self.from.0);
        w.u64(self.to.0);
        w.u64(self.first.0);
        w.u64(self.last.0);
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (id, segment) = (r.u64()?, SegmentId(r.id()?));
        let (from, to) = take_pair(r)?;
        let first = Index(r.count("first entry that is asked for")?);
        let last = Index(r.count("last entry that is asked for")?);
        if first.0 == 0 {
            return Err(DecodeError::Value { what: "first entry that is asked for", found: 0 });
        }
        limit("first entry that is asked for", first.0, last.0)?;
        Ok(Self { id, segment, from, to, first, last })
    }
}

impl EntriesAnswer {
    pub fn payload_blocks(&self) -> u32 {
        let whole = |state: &EntryState| if let EntryState::Whole(entry) = state { entry.payload_blocks } else { 0 };
        self.entries.iter().map(whole).sum()
    }

    /// Whether `payload` is that of the entries here.
    ///
    /// # Errors
    /// When it is not.
    pub fn check(&self, payload: &[u8]) -> Result<(), DecodeError> {
        let mut at = 0;
        for state in &self.entries {
            if let EntryState::Whole(entry) = state {
                let len = entry.payload_blocks as usize * BLOCK;
                let Some(own) = payload.get(at..at + len) else {
                    return Err(DecodeError::Short { what: "payload of an answer", need: at + len, left: payload.len() });
                };
                entry.check_payload(own)?;
                at += len;
            }
        }
        check_payload([].iter(), &payload[at..])
    }

    pub(super) fn put(&self, w: &mut Grow) {
        w.u64(self.id);
        w.bytes(&self.segment.0);
        w.u64(self.from.0);
        w.u64(self.to.0);
        w.u64(self.term.0);
        w.u64(self.first.0);
        w.u32(self.entries.len() as u32);
        w.u8(u8::from(self.leads));
        w.u8(u8::from(self.more));
        w.zeros(2);
        for state in &self.entries {
            match state {
                EntryState::Whole(entry) => {
                    w.u64(1);
                    entry.put(w);
                }
                EntryState::Unknown => w.u64(0),
                EntryState::Held(term) => {
                    w.u64(2);
                    w.u64(term.0);
                }
            }
        }
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (id, segment) = (r.u64()?, SegmentId(r.id()?));
        let (from, to) = take_pair(r)?;
        let term = Term(r.count("term of an answer")?);
        let first = Index(r.count("first entry of an answer")?);
        let count = r.u32()?;
        limit("entries of an answer", count.into(), ENTRIES_MAX.into())?;
        limit("entries of an answer", count.into(), (r.left() / 8) as u64)?;
        let (leads, more) = (take_bool(r)?, take_bool(r)?);
        zeros(r, 2)?;
        let mut entries = Vec::with_capacity(count as usize);
        let mut before = Term(0);
        for i in 0..u64::from(count) {
            entries.push(match r.u64()? {
                0 => EntryState::Unknown,
                1 => {
                    let entry = Entry::take(r)?;
                    if entry.index.0 != first.0 + i || entry.term < before || entry.term > term {
                        return Err(DecodeError::Value { what: "index or term of an answered entry, index", found: entry.index.0 });
                    }
                    before = entry.term;
                    EntryState::Whole(entry)
                }
                2 => {
                    let held = Term(r.u64()?);
                    if held.0 == 0 || held < before || held > term {
                        return Err(DecodeError::Value { what: "term of an entry that is held", found: held.0 });
                    }
                    before = held;
                    EntryState::Held(held)
                }
                other => return Err(DecodeError::Value { what: "state of an answered entry", found: other }),
            });
        }
        Ok(Self { id, segment, from, to, term, leads, more, first, entries })
    }
}

fn take_bool(r: &mut Take<'_>) -> Result<bool, DecodeError> {
    match r.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(DecodeError::Value { what: "yes or no", found: other.into() }),
    }
}
