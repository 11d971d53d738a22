//! What the members of a group say to each other: raft's messages in our own bytes, with every bound that can be checked without
//! knowing the group checked here. Raft's own encoding never leaves a process and is never decoded.

use super::members::{MemberNo, Members};
use super::{Body, Grow, Header, Kind, check_payload, limit, zeros};
use crate::batch::{OPS_MAX, Op, decode_ops, is_marker, marker_is_last};
use crate::codec::Take;
use crate::layer::Stack;
use crate::reservation::{RESERVATIONS_MAX, Reservations};
use crate::{BLOCK, DecodeError, Index, SegmentId, Term};

/// Bytes of a message without its body.
pub(super) const MESSAGE_HEAD: usize = 16 + 8 + 8 + 8 + 8;
/// Bytes of an entry without what it holds.
const ENTRY_HEAD: usize = 24;
/// Entries of one append at most.
const ENTRIES_MAX: u32 = 4096;

/// What an entry holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryKind {
    /// Ops, as in a batch's section; none for the entry with which a leader begins its term.
    Ops,
    /// The group's membership from here on ([`Members::encode`]).
    Members,
}

/// An entry of a group's log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub term: Term,
    pub index: Index,
    pub kind: EntryKind,
    pub bytes: Vec<u8>,
    /// Blocks that its writes have, which its ops say too.
    pub payload_blocks: u32,
}

impl Entry {
    pub fn encoded_len(&self) -> usize {
        ENTRY_HEAD + self.bytes.len()
    }

    pub(super) fn put(&self, w: &mut Grow) {
        w.u64(self.term.0);
        w.u64(self.index.0);
        w.u16(self.payload_blocks as u16);
        w.u8(match self.kind {
            EntryKind::Ops => 0,
            EntryKind::Members => 1,
        });
        w.u8(0);
        w.u32(self.bytes.len() as u32);
        w.bytes(&self.bytes);
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let term = Term(r.count("term of an entry")?);
        let index = Index(r.count("index of an entry")?);
        let payload_blocks = u32::from(r.u16()?);
        let kind = match r.u8()? {
            0 => EntryKind::Ops,
            1 => EntryKind::Members,
            other => return Err(DecodeError::Value { what: "kind of an entry", found: other.into() }),
        };
        zeros(r, 1)?;
        let len = r.u32()?;
        limit("bytes of an entry", len.into(), OPS_MAX as u64)?;
        let entry = Self { term, index, kind, bytes: r.bytes(len as usize)?.to_vec(), payload_blocks };
        entry.check()?;
        Ok(entry)
    }

    /// The entry's ops; none for a membership.
    ///
    /// # Errors
    /// When its bytes are not what its kind says, or hold what does not travel between nodes.
    pub fn ops(&self) -> Result<Vec<Op>, DecodeError> {
        match self.kind {
            EntryKind::Ops => decode_ops(&self.bytes),
            EntryKind::Members => Members::decode(&self.bytes).map(|_| Vec::new()),
        }
    }

    /// Whether a snapshot's marker is in it.
    pub fn is_marker(&self) -> bool {
        self.kind == EntryKind::Ops && is_marker(&self.bytes)
    }

    /// Whether this is an entry that a group's log may hold.
    ///
    /// # Errors
    /// Names what is wrong.
    pub fn check(&self) -> Result<(), DecodeError> {
        if self.term.0 == 0 || self.index.0 == 0 {
            return Err(DecodeError::Value { what: "term and index of an entry", found: self.index.0 });
        }
        let ops = self.ops()?;
        let travels = |op: &Op| {
            matches!(op, Op::Write { .. } | Op::Zero { .. } | Op::Resize { .. } | Op::Reserve(_) | Op::Snapshot { .. } | Op::Unsnapshot(_))
        };
        if !ops.iter().all(travels) || !marker_is_last(&ops) {
            return Err(DecodeError::Value { what: "op that is none of an entry's ops, kind of entry", found: 0 });
        }
        let counted: u32 = ops.iter().map(Op::payload_blocks).sum();
        if counted != self.payload_blocks {
            return Err(DecodeError::Mismatch {
                what: "payload blocks of an entry",
                found: self.payload_blocks.to_string(),
                expected: format!("{counted} by its ops"),
            });
        }
        Ok(())
    }

    fn crcs(&self) -> Result<Vec<u32>, DecodeError> {
        let mut crcs = Vec::with_capacity(self.payload_blocks as usize);
        for op in self.ops()? {
            if let Op::Write { crcs: of, .. } = op {
                crcs.extend(of);
            }
        }
        Ok(crcs)
    }

    /// Whether `payload` is what the entry's checksums are of.
    ///
    /// # Errors
    /// When it is not, or not whole.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), DecodeError> {
        check_payload(self.crcs()?.iter(), payload)
    }
}

/// Entries for a follower's log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Append {
    /// The entry before the first.
    pub prev: Index,
    pub prev_term: Term,
    /// What the leader knows committed; may be beyond the entries here.
    pub commit: Index,
    pub entries: Vec<Entry>,
}

/// A group's state to begin from, where the log is trimmed too far. The state itself comes beside, and is checked against the digest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Install {
    pub index: Index,
    pub index_term: Term,
    pub digest: [u8; 16],
    pub members: Members,
    /// The volume's, as of `index`; none where no host ever registered.
    pub reservations: Option<Box<Reservations>>,
    /// The volume's layers as of `index`; none where there never was a snapshot.
    pub stack: Option<Box<Stack>>,
}

/// A proof of leadership that was asked for: never the same twice.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Round {
    pub term: Term,
    pub count: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MessageBody {
    Append(Append),
    /// All up to `index` is persisted here, as the leader of this term has it. `room`: extents that the sender's store can still promise, beside all that
    /// it has taken in.
    Appended {
        index: Index,
        commit: Index,
        room: Option<u64>,
    },
    /// There is no such entry `index` here; the logs may agree at `hint`.
    AppendRefused {
        index: Index,
        hint: Index,
        hint_term: Term,
        commit: Index,
    },
    /// A candidate's log ends at `last`. `pre`: only asking. `forced`: the leader stepped aside for it.
    Vote {
        pre: bool,
        forced: bool,
        last: Index,
        last_term: Term,
        commit: Index,
        commit_term: Term,
    },
    Voted {
        pre: bool,
        granted: bool,
        commit: Index,
        commit_term: Term,
    },
    Heartbeat {
        commit: Index,
        round: Option<Round>,
    },
    HeartbeatDone {
        commit: Index,
        round: Option<Round>,
        room: Option<u64>,
    },
    /// The leader steps aside: the receiver is to campaign at once.
    Campaign,
    Install(Install),
    /// Everything up to `last` is committed everywhere and nothing is going on: no more heartbeats until something is.
    Sleep {
        last: Index,
    },
}

/// One member's message to another of its group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    pub segment: SegmentId,
    pub from: MemberNo,
    pub to: MemberNo,
    pub term: Term,
    pub body: MessageBody,
}

const APPEND: u8 = 1;
const APPENDED: u8 = 2;
const APPEND_REFUSED: u8 = 3;
const VOTE: u8 = 4;
const VOTED: u8 = 5;
const HEARTBEAT: u8 = 6;
const HEARTBEAT_DONE: u8 = 7;
const CAMPAIGN: u8 = 8;
const INSTALL: u8 = 9;
const SLEEP: u8 = 10;

const FLAG_PRE: u8 = 1;
const FLAG_FORCED: u8 = 2;
const FLAG_GRANTED: u8 = 4;
const FLAG_ROUND: u8 = 8;
/// From version 2 on, as what follows.
const FLAG_RESERVED: u8 = 16;
const FLAG_ROOM: u8 = 32;
/// The volume has layers.
const FLAG_LAYERED: u8 = 64;

impl Message {
    pub fn payload_blocks(&self) -> u32 {
        match &self.body {
            MessageBody::Append(append) => append.entries.iter().map(|entry| entry.payload_blocks).sum(),
            _ => 0,
        }
    }

    /// Bytes of the message in a body.
    pub fn encoded_len(&self) -> usize {
        let of = |is_there: bool, bytes: usize| if is_there { bytes } else { 0 };
        MESSAGE_HEAD
            + match &self.body {
                MessageBody::Append(append) => 32 + append.entries.iter().map(Entry::encoded_len).sum::<usize>(),
                MessageBody::AppendRefused { .. } | MessageBody::Vote { .. } => 32,
                MessageBody::Appended { room, .. } => 16 + of(room.is_some(), 8),
                MessageBody::Voted { .. } => 16,
                MessageBody::Heartbeat { round, .. } => 8 + of(round.is_some(), 16),
                MessageBody::HeartbeatDone { round, room, .. } => 8 + of(round.is_some(), 16) + of(room.is_some(), 8),
                MessageBody::Campaign => 0,
                MessageBody::Install(install) => {
                    let reserved = install.reservations.as_ref().map_or(0, |state| 4 + state.encoded_len());
                    32 + install.members.encode().len() + reserved + install.stack.as_ref().map_or(0, |stack| 4 + stack.encode().len())
                }
                MessageBody::Sleep { .. } => 8,
            }
    }

    fn code(&self, version: u32) -> (u8, u8) {
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        match &self.body {
            MessageBody::Append(_) => (APPEND, 0),
            MessageBody::Appended { room, .. } => (APPENDED, flag(said(*room, version).is_some(), FLAG_ROOM)),
            MessageBody::AppendRefused { .. } => (APPEND_REFUSED, 0),
            MessageBody::Vote { pre, forced, .. } => (VOTE, flag(*pre, FLAG_PRE) | flag(*forced, FLAG_FORCED)),
            MessageBody::Voted { pre, granted, .. } => (VOTED, flag(*pre, FLAG_PRE) | flag(*granted, FLAG_GRANTED)),
            MessageBody::Heartbeat { round, .. } => (HEARTBEAT, flag(round.is_some(), FLAG_ROUND)),
            MessageBody::HeartbeatDone { round, room, .. } => {
                (HEARTBEAT_DONE, flag(round.is_some(), FLAG_ROUND) | flag(said(*room, version).is_some(), FLAG_ROOM))
            }
            MessageBody::Campaign => (CAMPAIGN, 0),
            MessageBody::Install(install) => {
                (INSTALL, flag(install.reservations.is_some(), FLAG_RESERVED) | flag(install.stack.is_some(), FLAG_LAYERED))
            }
            MessageBody::Sleep { .. } => (SLEEP, 0),
        }
    }

    /// As that version of the protocol says it: an older one leaves out what it does not know.
    pub(super) fn put(&self, w: &mut Grow, version: u32) {
        let (code, flags) = self.code(version);
        w.bytes(&self.segment.0);
        w.u64(self.from.0);
        w.u64(self.to.0);
        w.u64(self.term.0);
        w.u8(code);
        w.u8(flags);
        w.zeros(6);
        match &self.body {
            MessageBody::Append(append) => {
                w.u64(append.prev.0);
                w.u64(append.prev_term.0);
                w.u64(append.commit.0);
                w.u32(append.entries.len() as u32);
                w.zeros(4);
                for entry in &append.entries {
                    entry.put(w);
                }
            }
            MessageBody::Appended { index, commit, room } => {
                w.u64(index.0);
                w.u64(commit.0);
                said(*room, version).into_iter().for_each(|room| w.u64(room));
            }
            MessageBody::AppendRefused { index, hint, hint_term, commit } => {
                w.u64(index.0);
                w.u64(hint.0);
                w.u64(hint_term.0);
                w.u64(commit.0);
            }
            MessageBody::Vote { last, last_term, commit, commit_term, .. } => {
                w.u64(last.0);
                w.u64(last_term.0);
                w.u64(commit.0);
                w.u64(commit_term.0);
            }
            MessageBody::Voted { commit, commit_term, .. } => {
                w.u64(commit.0);
                w.u64(commit_term.0);
            }
            MessageBody::Heartbeat { commit, round } | MessageBody::HeartbeatDone { commit, round, .. } => {
                w.u64(commit.0);
                if let Some(round) = round {
                    w.u64(round.term.0);
                    w.u64(round.count);
                }
                if let MessageBody::HeartbeatDone { room, .. } = &self.body {
                    said(*room, version).into_iter().for_each(|room| w.u64(room));
                }
            }
            MessageBody::Campaign => {}
            MessageBody::Install(install) => {
                w.u64(install.index.0);
                w.u64(install.index_term.0);
                w.bytes(&install.digest);
                install.members.put(w);
                if let Some(state) = &install.reservations {
                    w.u32(state.encoded_len() as u32);
                    w.bytes(&state.encode());
                }
                if let Some(stack) = &install.stack {
                    let bytes = stack.encode();
                    w.u32(bytes.len() as u32);
                    w.bytes(&bytes);
                }
            }
            MessageBody::Sleep { last } => w.u64(last.0),
        }
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let segment = SegmentId(r.id()?);
        let from = MemberNo(r.count("number of a member")?);
        let to = MemberNo(r.count("number of a member")?);
        let term = Term(r.count("term of a message")?);
        let (code, flags) = (r.u8()?, r.u8()?);
        zeros(r, 6)?;
        if from.0 == 0 || to.0 == 0 || from == to || term.0 == 0 {
            return Err(DecodeError::Value { what: "sender, receiver or term of a message, sender", found: from.0 });
        }
        let may = match code {
            VOTE => FLAG_PRE | FLAG_FORCED,
            VOTED => FLAG_PRE | FLAG_GRANTED,
            INSTALL => FLAG_RESERVED | FLAG_LAYERED,
            HEARTBEAT => FLAG_ROUND,
            HEARTBEAT_DONE => FLAG_ROUND | FLAG_ROOM,
            APPENDED => FLAG_ROOM,
            _ => 0,
        };
        if flags & !may != 0 || flags == FLAG_PRE | FLAG_FORCED {
            return Err(DecodeError::Value { what: "flags of a message", found: flags.into() });
        }
        let body = match code {
            APPEND => MessageBody::Append(take_append(r, term)?),
            APPENDED => MessageBody::Appended { index: take_index(r)?, commit: take_index(r)?, room: take_room(r, flags)? },
            APPEND_REFUSED => {
                let (index, hint) = (take_index(r)?, take_index(r)?);
                let hint_term = take_term(r, term)?;
                limit("hint of a refused append", hint.0, index.0)?;
                MessageBody::AppendRefused { index, hint, hint_term, commit: take_index(r)? }
            }
            VOTE => {
                let (last, last_term) = (take_index(r)?, take_term(r, term)?);
                let (commit, commit_term) = (take_index(r)?, take_term(r, term)?);
                limit("commit of a candidate", commit.0, last.0)?;
                limit("term of a candidate's commit", commit_term.0, last_term.0)?;
                MessageBody::Vote { pre: flags & FLAG_PRE != 0, forced: flags & FLAG_FORCED != 0, last, last_term, commit, commit_term }
            }
            VOTED => {
                let (commit, commit_term) = (take_index(r)?, take_term(r, term)?);
                MessageBody::Voted { pre: flags & FLAG_PRE != 0, granted: flags & FLAG_GRANTED != 0, commit, commit_term }
            }
            HEARTBEAT => MessageBody::Heartbeat { commit: take_index(r)?, round: take_round(r, flags, term)? },
            HEARTBEAT_DONE => {
                MessageBody::HeartbeatDone { commit: take_index(r)?, round: take_round(r, flags, term)?, room: take_room(r, flags)? }
            }
            CAMPAIGN => MessageBody::Campaign,
            INSTALL => {
                let (index, index_term) = (take_index(r)?, take_term(r, term)?);
                if index.0 == 0 || index_term.0 == 0 {
                    return Err(DecodeError::Value { what: "index of an install", found: index.0 });
                }
                let (digest, members) = (r.array()?, Members::take(r)?);
                let mut reservations = None;
                if flags & FLAG_RESERVED != 0 {
                    let len = r.u32()?;
                    limit("bytes of reservations", len.into(), RESERVATIONS_MAX as u64)?;
                    reservations = Some(Box::new(Reservations::decode(r.bytes(len as usize)?)?));
                }
                let mut stack = None;
                if flags & FLAG_LAYERED != 0 {
                    let len = r.u32()?;
                    limit("bytes of layers", len.into(), Stack::LEN_MAX as u64)?;
                    stack = Some(Box::new(Stack::decode(r.bytes(len as usize)?)?));
                }
                MessageBody::Install(Install { index, index_term, digest, members, reservations, stack })
            }
            SLEEP => MessageBody::Sleep { last: take_index(r)? },
            other => return Err(DecodeError::Value { what: "kind of a message", found: other.into() }),
        };
        Ok(Self { segment, from, to, term, body })
    }
}

/// A member's room, which version 1 does not speak of.
fn said(room: Option<u64>, version: u32) -> Option<u64> {
    room.filter(|_| version >= 2)
}

fn take_index(r: &mut Take<'_>) -> Result<Index, DecodeError> {
    Ok(Index(r.count("index of a message")?))
}

/// A term of the log: never beyond that of the message.
fn take_term(r: &mut Take<'_>, most: Term) -> Result<Term, DecodeError> {
    let found = r.u64()?;
    limit("term of the log in a message", found, most.0)?;
    Ok(Term(found))
}

fn take_round(r: &mut Take<'_>, flags: u8, term: Term) -> Result<Option<Round>, DecodeError> {
    if flags & FLAG_ROUND == 0 {
        return Ok(None);
    }
    let round = Round { term: take_term(r, term)?, count: r.count("count of a round")? };
    if round.term != term || round.count == 0 {
        return Err(DecodeError::Value { what: "round of another term, or count", found: round.count });
    }
    Ok(Some(round))
}

fn take_room(r: &mut Take<'_>, flags: u8) -> Result<Option<u64>, DecodeError> {
    if flags & FLAG_ROOM == 0 { Ok(None) } else { r.count("room of a member").map(Some) }
}

fn take_append(r: &mut Take<'_>, term: Term) -> Result<Append, DecodeError> {
    let (prev, prev_term) = (take_index(r)?, take_term(r, term)?);
    let commit = take_index(r)?;
    if (prev.0 == 0) != (prev_term.0 == 0) {
        return Err(DecodeError::Value { what: "term of the entry before", found: prev_term.0 });
    }
    let count = r.u32()?;
    zeros(r, 4)?;
    limit("entries of an append", count.into(), ENTRIES_MAX.into())?;
    limit("entries of an append", count.into(), (r.left() / ENTRY_HEAD) as u64)?;
    let mut entries = Vec::with_capacity(count as usize);
    let (mut index, mut before) = (prev, prev_term);
    for _ in 0..count {
        let entry = Entry::take(r)?;
        index = Index(index.0 + 1);
        if entry.index != index || entry.term < before || entry.term > term {
            return Err(DecodeError::Mismatch {
                what: "entry of an append",
                found: format!("index {} of term {}", entry.index.0, entry.term.0),
                expected: format!("index {} of a term from {} to {}", index.0, before.0, term.0),
            });
        }
        before = entry.term;
        entries.push(entry);
    }
    Ok(Append { prev, prev_term, commit, entries })
}

/// A message whose payload is all there and is what its checksums say: the only kind that a group steps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verified(Message);

impl Verified {
    /// Takes the messages of one frame with the frame's payload, which follows in their order.
    ///
    /// # Errors
    /// When a block is missing or wrong: none of the frame's messages may be stepped, for those after it were sent knowing it before them.
    pub fn all(messages: Vec<Message>, payload: &[u8]) -> Result<Vec<Self>, DecodeError> {
        let mut crcs = Vec::new();
        for message in &messages {
            if let MessageBody::Append(append) = &message.body {
                for entry in append.entries.iter().filter(|entry| entry.payload_blocks > 0) {
                    crcs.extend(entry.crcs()?);
                }
            }
        }
        check_payload(crcs.iter(), payload)?;
        Ok(messages.into_iter().map(Self).collect())
    }

    /// A message without payload.
    ///
    /// # Errors
    /// When it should have some.
    pub fn bare(message: Message) -> Result<Self, DecodeError> {
        match message.payload_blocks() {
            0 => Ok(Self(message)),
            blocks => Err(DecodeError::Short { what: "payload of a message", need: blocks as usize * BLOCK, left: 0 }),
        }
    }

    /// Decodes a whole frame of messages, payload and all.
    ///
    /// # Errors
    /// When anything of it is not as it must be.
    pub fn frame(bytes: &[u8]) -> Result<Vec<Self>, DecodeError> {
        let header = Header::decode(bytes)?;
        let rest = &bytes[super::HEADER..];
        let Some((body, payload)) = rest.split_at_checked(header.body_len as usize) else {
            return Err(DecodeError::Short { what: "peer frame", need: header.body_len as usize, left: rest.len() });
        };
        match Body::decode(&header, body)? {
            Body::Groups(messages) => Self::all(messages, payload),
            _ => Err(DecodeError::Value { what: "kind of a frame that should carry messages", found: header.kind as u64 }),
        }
    }

    pub fn message(&self) -> &Message {
        &self.0
    }

    pub fn into_message(self) -> Message {
        self.0
    }
}

const _: () = assert!(Kind::Groups as u16 == 3, "the frame's kind is part of the format");
