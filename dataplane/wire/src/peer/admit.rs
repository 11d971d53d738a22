//! A member tells the others of each opening of its store, and is told whether they believe it: what a drive that was wiped, or put back from
//! an older copy, cannot get right.
//!
//! Not here: what makes an opening believed, and how many must (the engine's: see ARCHITECTURE.md).

use super::members::MemberNo;
use super::{Grow, take_pair, zeros};
use crate::codec::{Put, Take};
use crate::{DecodeError, Generation, Incarnation, Index, SegmentId, Seq, Term};

/// One opening of a member's store for writing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opening {
    /// The drive, in which of its lives; which store of it; and which replica of that, by a number that it never gives twice.
    pub drive: Incarnation,
    pub store: u32,
    pub replica: u32,
    /// How often the store was opened, this time included.
    pub generation: Generation,
    /// Drawn anew for each opening: two of one generation are told apart by it.
    pub life: Incarnation,
}

impl Opening {
    pub const BYTES: usize = 16 + 4 + 4 + 8 + 16;

    pub fn id(&self) -> OpeningId {
        OpeningId { generation: self.generation, life: self.life }
    }

    /// Whether both are of one replica that was never made anew.
    pub fn same_replica(&self, other: &Self) -> bool {
        (self.drive, self.store, self.replica) == (other.drive, other.store, other.replica)
    }

    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let mut w = Put::new(&mut bytes, 0);
        w.bytes(&self.drive.0);
        w.u32(self.store);
        w.u32(self.replica);
        w.u64(self.generation.0);
        w.bytes(&self.life.0);
        bytes
    }

    pub(crate) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let (drive, store, replica) = (Incarnation(r.id()?), r.u32()?, r.u32()?);
        let generation = Generation(r.count("generation of an opening")?);
        if generation.0 == 0 {
            return Err(DecodeError::Value { what: "generation of an opening", found: 0 });
        }
        Ok(Self { drive, store, replica, generation, life: Incarnation(r.id()?) })
    }
}

/// Which opening of a replica's store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpeningId {
    pub generation: Generation,
    pub life: Incarnation,
}

impl OpeningId {
    pub const BYTES: usize = 8 + 16;

    /// `None` as zeros.
    pub(crate) fn encode(id: Option<Self>) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let mut w = Put::new(&mut bytes, 0);
        w.u64(id.map_or(0, |id| id.generation.0));
        w.bytes(&id.map_or([0; 16], |id| id.life.0));
        bytes
    }

    pub(crate) fn take(r: &mut Take<'_>) -> Result<Option<Self>, DecodeError> {
        let (generation, life) = (Generation(r.count("generation of an opening")?), Incarnation(r.id()?));
        match (generation.0, life.0) {
            (0, life) if life != [0; 16] => Err(DecodeError::Value { what: "generation of an opening", found: 0 }),
            (0, _) => Ok(None),
            _ => Ok(Some(Self { generation, life })),
        }
    }
}

/// What a drive knows of the openings of a member's store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Past {
    /// The last one that enough of the others believed.
    pub believed: Option<OpeningId>,
    /// The first batch of the first one after that.
    pub opened: Option<Seq>,
    /// One after that was not vouched for.
    pub unvouched: bool,
}

impl Past {
    /// Bytes in a directory: the last is a flag there.
    pub const BYTES: usize = OpeningId::BYTES + 8;

    /// The store is opened, and `first` is the first batch.
    pub fn open(&mut self, first: Seq, vouched: bool) {
        self.opened.get_or_insert(first);
        self.unvouched |= !vouched;
    }

    pub fn believe(&mut self, id: OpeningId) {
        *self = Self { believed: Some(id), opened: None, unvouched: false };
    }
}

/// What a member knows of another: its newest opening, and how far its log was known durable when it told of it last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    pub no: MemberNo,
    pub opening: Opening,
    pub sealed: Seq,
}

impl Seen {
    /// Without the member's number.
    pub const BYTES: usize = Opening::BYTES + 8;
}

/// Believe this opening of mine; or record it, once it is the one that was believed last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AdmitAsk {
    pub segment: SegmentId,
    pub from: MemberNo,
    pub to: MemberNo,
    pub opening: Opening,
    /// The last one that enough of the others believed.
    pub believed: Option<OpeningId>,
    /// Newest batch that was on the drive when it was opened first after that, and the newest that it knows durable now.
    pub found: Seq,
    pub sealed: Seq,
    /// Its term, and where its log ends, or may have ended.
    pub term: Term,
    pub last: Index,
    pub last_term: Term,
}

/// Whether an opening is believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Belief {
    /// It is on the answering member's drive.
    Recorded,
    /// Nothing is known that it does not come after.
    Believed,
    /// Known is a replica that was made before this one: its drive was wiped, or it was made anew.
    Recreated,
    /// Known is an opening that this one does not come after, or log that it does not have.
    Restored,
    /// It has acknowledged an entry that it does not have.
    Forgot,
    /// It is no member any more.
    Removed,
}

/// The answer, and what is known instead where it is no.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AdmitAnswer {
    pub segment: SegmentId,
    pub from: MemberNo,
    pub to: MemberNo,
    /// Of the opening that was asked for.
    pub life: Incarnation,
    pub belief: Belief,
    pub generation: Generation,
    pub sealed: Seq,
    /// Where the belief is [`Belief::Forgot`].
    pub entry: Index,
}

impl AdmitAsk {
    pub const BYTES: usize = 16 + 8 + 8 + Opening::BYTES + OpeningId::BYTES + 5 * 8;

    /// Enough of the others believe it: it is to be recorded.
    pub fn is_believed(&self) -> bool {
        self.believed == Some(self.opening.id())
    }

    /// The answer of who knows nothing against it.
    pub fn believed(&self) -> AdmitAnswer {
        AdmitAnswer {
            segment: self.segment,
            from: self.to,
            to: self.from,
            life: self.opening.life,
            belief: if self.is_believed() { Belief::Recorded } else { Belief::Believed },
            generation: self.opening.generation,
            sealed: self.sealed,
            entry: Index(0),
        }
    }

    pub(super) fn put(&self, w: &mut Grow) {
        w.bytes(&self.segment.0);
        w.u64(self.from.0);
        w.u64(self.to.0);
        w.bytes(&self.opening.encode());
        w.bytes(&OpeningId::encode(self.believed));
        w.u64(self.found.0);
        w.u64(self.sealed.0);
        w.u64(self.term.0);
        w.u64(self.last.0);
        w.u64(self.last_term.0);
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let segment = SegmentId(r.id()?);
        let (from, to) = take_pair(r)?;
        let (opening, believed) = (Opening::take(r)?, OpeningId::take(r)?);
        if believed.is_some_and(|id| id.generation >= opening.generation && id != opening.id()) {
            return Err(DecodeError::Value { what: "opening that was believed, and came later", found: opening.generation.0 });
        }
        let (found, sealed) = (Seq(r.count("batch that an opening found")?), Seq(r.count("batch known durable")?));
        if found > sealed {
            return Err(DecodeError::Value { what: "batch that an opening found, beyond what it knows durable", found: found.0 });
        }
        let term = Term(r.count("term of a member")?);
        let (last, last_term) = (Index(r.count("end of a log")?), Term(r.count("term of the end of a log")?));
        Ok(Self { segment, from, to, opening, believed, found, sealed, term, last, last_term })
    }
}

impl AdmitAnswer {
    pub const BYTES: usize = 16 + 8 + 8 + 16 + 8 + 3 * 8;

    pub(super) fn put(&self, w: &mut Grow) {
        w.bytes(&self.segment.0);
        w.u64(self.from.0);
        w.u64(self.to.0);
        w.bytes(&self.life.0);
        w.u8(match self.belief {
            Belief::Recorded => 0,
            Belief::Recreated => 1,
            Belief::Restored => 2,
            Belief::Forgot => 3,
            Belief::Removed => 4,
            Belief::Believed => 5,
        });
        w.zeros(7);
        w.u64(self.generation.0);
        w.u64(self.sealed.0);
        w.u64(self.entry.0);
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let segment = SegmentId(r.id()?);
        let (from, to) = take_pair(r)?;
        let life = Incarnation(r.id()?);
        let belief = match r.u8()? {
            0 => Belief::Recorded,
            1 => Belief::Recreated,
            2 => Belief::Restored,
            3 => Belief::Forgot,
            4 => Belief::Removed,
            5 => Belief::Believed,
            other => return Err(DecodeError::Value { what: "belief in an opening", found: other.into() }),
        };
        zeros(r, 7)?;
        let generation = Generation(r.count("generation of an opening")?);
        let (sealed, entry) = (Seq(r.count("batch known durable")?), Index(r.count("entry of a log")?));
        Ok(Self { segment, from, to, life, belief, generation, sealed, entry })
    }
}
