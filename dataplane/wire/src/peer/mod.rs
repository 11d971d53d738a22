//! Bytes between nodes: frames, and what each kind of frame carries. `docs/protocol.md` is the prose of this module.
//!
//! A connection joins one core's shard of a node to one of another. It is a sequence of frames: a fixed header with its own checksum,
//! a body with its checksum, then whole payload blocks, whose checksums stand in the body's descriptors. So a receiver learns
//! from 48 trusted bytes how much to read and can put payload straight into aligned memory.
//!
//! Not here: sockets, proofs of identity (the node's, over the fields of [`Hello`]), and what a message may do to a group
//! (the engine's, which checks it against the group's state before raft sees it).
//!
//! Adding a kind: a variant of [`Kind`] and [`Body`], encode, decode with every bound checked, a sample in tests/sample/peer.rs
//! (tests, golden files and the fuzz target follow it), and its table in docs/protocol.md. A changed kind needs a new [`PROTOCOL`].

mod admit;
mod beat;
mod copy;
mod digest;
mod fetch;
mod forward;
mod group;
mod hello;
mod members;

pub use admit::{AdmitAnswer, AdmitAsk, Belief, Opening, OpeningId, Past, Seen};
pub use beat::{Beat, Drive, DriveState, Room, Space};
pub use copy::{COPY_LISTED_MAX, Copied, CopyAnswer, CopyAsk, EXTENTS_END, States};
pub use digest::{DigestAnswer, DigestAsk, Digests, ExtentDigest};
pub use fetch::{EntriesAnswer, EntriesAsk, EntryState, FetchAnswer, FetchAsk, FetchResult};
pub use forward::{Deed, FORWARD_BYTES_MAX, Forward, Forwarded, Outcome};
pub use group::{Append, Entry, EntryKind, Install, Message, MessageBody, Round, Verified};
pub use hello::{Hello, NONCE, PROOF, agree};
pub use members::{MEMBERS_MAX, Member, MemberNo, Members, Role, VOTERS_MAX};

use crate::codec::{PREFIX, Put, Take, crc32c, seal, unseal_versions};
use crate::{BLOCK, DecodeError};

const MAGIC: &[u8; 8] = b"PENSPEER";
const WHAT: &str = "peer frame";

/// Version of the protocol that this build speaks, and the oldest that it still speaks: the one before, where there is one.
pub const PROTOCOL: u32 = 2;
pub const PROTOCOL_OLDEST: u32 = 1;

/// Bytes of a frame's header.
pub const HEADER: usize = 48;
/// Bytes of a body at most: a receiver never sets aside more for a header that it trusts.
pub const BODY_MAX: usize = 256 << 10;
/// Payload blocks of a frame at most: 4 MiB.
pub const FRAME_BLOCKS_MAX: u32 = 1024;

/// What a frame's body is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Hello = 1,
    Beat = 2,
    Groups = 3,
    FetchAsk = 4,
    FetchAnswer = 5,
    EntriesAsk = 6,
    EntriesAnswer = 7,
    CopyAsk = 8,
    CopyAnswer = 9,
    Forward = 10,
    Forwarded = 11,
    AdmitAsk = 20,
    AdmitAnswer = 21,
    DigestAsk = 22,
    DigestAnswer = 23,
}

impl Kind {
    pub const ALL: [Self; 15] = [
        Self::Hello,
        Self::Beat,
        Self::Groups,
        Self::FetchAsk,
        Self::FetchAnswer,
        Self::EntriesAsk,
        Self::EntriesAnswer,
        Self::CopyAsk,
        Self::CopyAnswer,
        Self::AdmitAsk,
        Self::AdmitAnswer,
        Self::DigestAsk,
        Self::DigestAnswer,
        Self::Forward,
        Self::Forwarded,
    ];

    /// The version of the protocol that has it first.
    pub fn since(self) -> u32 {
        match self {
            Self::FetchAsk | Self::FetchAnswer | Self::AdmitAsk | Self::AdmitAnswer => 2,
            Self::DigestAsk | Self::DigestAnswer | Self::Forward | Self::Forwarded => 2,
            _ => 1,
        }
    }

    /// Whether payload may follow the body.
    pub fn carries(self) -> bool {
        matches!(self, Self::Groups | Self::FetchAnswer | Self::EntriesAnswer | Self::CopyAnswer | Self::Forward | Self::Forwarded)
    }

    fn of(code: u16) -> Result<Self, DecodeError> {
        let found = Self::ALL.into_iter().find(|kind| *kind as u16 == code);
        found.ok_or(DecodeError::Value { what: "kind of a peer frame", found: code.into() })
    }
}

/// A frame's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Of the protocol, as both agreed in their hellos; a hello itself carries the sender's newest.
    pub version: u32,
    pub kind: Kind,
    /// Bytes of the body, which follows the header.
    pub body_len: u32,
    pub body_crc: u32,
    /// Blocks of payload, which follow the body.
    pub payload_blocks: u32,
    /// Counts the frames of one direction of one connection, from 1: a gap or a repeat ends the connection.
    pub sequence: u64,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut w = Put::new(&mut bytes, PREFIX);
        w.u16(self.kind as u16);
        w.u16(0);
        w.u32(self.body_len);
        w.u32(self.body_crc);
        w.u32(self.payload_blocks);
        w.u64(self.sequence);
        seal(&mut bytes, MAGIC, self.version);
        bytes
    }

    /// Decodes the first [`HEADER`] bytes of a frame. A version beyond what this build speaks is only taken in a hello, so that
    /// two builds can tell each other what they speak.
    ///
    /// # Errors
    /// When no whole header of a frame that this build takes starts here: the connection is of no use any more.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let Some(record) = bytes.get(..HEADER) else {
            return Err(DecodeError::Short { what: WHAT, need: HEADER, left: bytes.len() });
        };
        let version = unseal_versions(record, WHAT, MAGIC)?;
        let mut r = Take::new(record, PREFIX, WHAT);
        let kind = r.u16()?;
        if kind != Kind::Hello as u16 && !(PROTOCOL_OLDEST..=PROTOCOL).contains(&version) {
            return Err(DecodeError::Version { what: WHAT, found: version, known: PROTOCOL });
        }
        let kind = Kind::of(kind)?;
        if version < kind.since() {
            return Err(DecodeError::Version { what: "peer frame of its kind", found: version, known: kind.since() });
        }
        zeros(&mut r, 2)?;
        let body_len = r.u32()?;
        let body_crc = r.u32()?;
        let payload_blocks = r.u32()?;
        let sequence = r.count("sequence of a peer frame")?;
        zeros(&mut r, 8)?;
        limit("bytes of a peer frame's body", body_len.into(), BODY_MAX as u64)?;
        limit("payload blocks of a peer frame", payload_blocks.into(), FRAME_BLOCKS_MAX.into())?;
        if payload_blocks > 0 && !kind.carries() {
            return Err(DecodeError::Value { what: "payload of a frame that carries none", found: payload_blocks.into() });
        }
        if sequence == 0 {
            return Err(DecodeError::Value { what: "sequence of a peer frame", found: 0 });
        }
        Ok(Self { version, kind, body_len, body_crc, payload_blocks, sequence })
    }
}

/// What a frame says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    Hello(Hello),
    Beat(Beat),
    /// Messages of any number of groups, in the order in which they are to be stepped.
    Groups(Vec<Message>),
    FetchAsk(FetchAsk),
    FetchAnswer(FetchAnswer),
    EntriesAsk(EntriesAsk),
    EntriesAnswer(EntriesAnswer),
    CopyAsk(CopyAsk),
    CopyAnswer(CopyAnswer),
    AdmitAsk(AdmitAsk),
    AdmitAnswer(AdmitAnswer),
    DigestAsk(DigestAsk),
    DigestAnswer(DigestAnswer),
    Forward(Forward),
    Forwarded(Forwarded),
}

impl Body {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Beat(_) => Kind::Beat,
            Self::Groups(_) => Kind::Groups,
            Self::FetchAsk(_) => Kind::FetchAsk,
            Self::FetchAnswer(_) => Kind::FetchAnswer,
            Self::EntriesAsk(_) => Kind::EntriesAsk,
            Self::EntriesAnswer(_) => Kind::EntriesAnswer,
            Self::CopyAsk(_) => Kind::CopyAsk,
            Self::CopyAnswer(_) => Kind::CopyAnswer,
            Self::AdmitAsk(_) => Kind::AdmitAsk,
            Self::AdmitAnswer(_) => Kind::AdmitAnswer,
            Self::DigestAsk(_) => Kind::DigestAsk,
            Self::DigestAnswer(_) => Kind::DigestAnswer,
            Self::Forward(_) => Kind::Forward,
            Self::Forwarded(_) => Kind::Forwarded,
        }
    }

    /// Payload blocks that must follow the body.
    pub fn payload_blocks(&self) -> u32 {
        match self {
            Self::Groups(messages) => messages.iter().map(Message::payload_blocks).sum(),
            Self::FetchAnswer(answer) => answer.payload_blocks(),
            Self::EntriesAnswer(answer) => answer.payload_blocks(),
            Self::CopyAnswer(answer) => answer.payload_blocks(),
            Self::Forward(forward) => forward.payload_blocks(),
            Self::Forwarded(answer) => answer.payload_blocks(),
            _ => 0,
        }
    }

    fn put(&self, w: &mut Grow, version: u32) {
        match self {
            Self::Hello(hello) => hello.put(w),
            Self::Beat(beat) => beat.put(w),
            Self::Groups(messages) => {
                w.u32(messages.len() as u32);
                for message in messages {
                    message.put(w, version);
                }
            }
            Self::FetchAsk(ask) => ask.put(w),
            Self::FetchAnswer(answer) => answer.put(w),
            Self::EntriesAsk(ask) => ask.put(w),
            Self::EntriesAnswer(answer) => answer.put(w),
            Self::CopyAsk(ask) => ask.put(w),
            Self::CopyAnswer(answer) => answer.put(w),
            Self::AdmitAsk(ask) => ask.put(w),
            Self::AdmitAnswer(answer) => answer.put(w),
            Self::DigestAsk(ask) => ask.put(w),
            Self::DigestAnswer(answer) => answer.put(w),
            Self::Forward(forward) => forward.put(w),
            Self::Forwarded(answer) => answer.put(w),
        }
    }

    /// Header and body as they go out; the payload follows them.
    ///
    /// # Panics
    /// When the body or its payload is beyond a frame's limits: whoever gathers messages counts them with
    /// [`Message::encoded_len`] and [`Message::payload_blocks`].
    pub fn encode(&self, version: u32, sequence: u64) -> Vec<u8> {
        let mut w = Grow(vec![0; HEADER]);
        self.put(&mut w, version);
        let mut bytes = w.0;
        let body = &bytes[HEADER..];
        assert!(body.len() <= BODY_MAX, "a body of {} bytes; the limit is {BODY_MAX}", body.len());
        let payload_blocks = self.payload_blocks();
        assert!(payload_blocks <= FRAME_BLOCKS_MAX, "{payload_blocks} blocks of payload; the limit is {FRAME_BLOCKS_MAX}");
        let body_len = body.len() as u32;
        let header = Header { version, kind: self.kind(), body_len, body_crc: crc32c(body), payload_blocks, sequence };
        bytes[..HEADER].copy_from_slice(&header.encode());
        bytes
    }

    /// Decodes the body that `header` announced. Payload is checked apart, by [`Verified`] and the answers' own `check`.
    ///
    /// # Errors
    /// When the bytes are not exactly such a body.
    pub fn decode(header: &Header, bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() != header.body_len as usize {
            return Err(DecodeError::Short { what: WHAT, need: header.body_len as usize, left: bytes.len() });
        }
        let computed = crc32c(bytes);
        if computed != header.body_crc {
            return Err(DecodeError::Checksum { what: "body of a peer frame", found: header.body_crc, computed });
        }
        let mut r = Take::new(bytes, 0, WHAT);
        let body = match header.kind {
            Kind::Hello => Self::Hello(Hello::take(&mut r)?),
            Kind::Beat => Self::Beat(Beat::take(&mut r)?),
            Kind::Groups => {
                let count = r.u32()? as usize;
                // A message takes some bytes: so many cannot be here.
                limit("messages of a frame", count as u64, (bytes.len() / group::MESSAGE_HEAD) as u64)?;
                let mut messages = Vec::with_capacity(count);
                for _ in 0..count {
                    messages.push(Message::take(&mut r)?);
                }
                Self::Groups(messages)
            }
            Kind::FetchAsk => Self::FetchAsk(FetchAsk::take(&mut r)?),
            Kind::FetchAnswer => Self::FetchAnswer(FetchAnswer::take(&mut r)?),
            Kind::EntriesAsk => Self::EntriesAsk(EntriesAsk::take(&mut r)?),
            Kind::EntriesAnswer => Self::EntriesAnswer(EntriesAnswer::take(&mut r)?),
            Kind::CopyAsk => Self::CopyAsk(CopyAsk::take(&mut r)?),
            Kind::CopyAnswer => Self::CopyAnswer(CopyAnswer::take(&mut r)?),
            Kind::AdmitAsk => Self::AdmitAsk(AdmitAsk::take(&mut r)?),
            Kind::AdmitAnswer => Self::AdmitAnswer(AdmitAnswer::take(&mut r)?),
            Kind::DigestAsk => Self::DigestAsk(DigestAsk::take(&mut r)?),
            Kind::DigestAnswer => Self::DigestAnswer(DigestAnswer::take(&mut r)?),
            Kind::Forward => Self::Forward(Forward::take(&mut r)?),
            Kind::Forwarded => Self::Forwarded(Forwarded::take(&mut r)?),
        };
        if r.left() > 0 {
            return Err(DecodeError::Value { what: "bytes after a peer frame's body", found: r.left() as u64 });
        }
        let counted = body.payload_blocks();
        if counted != header.payload_blocks {
            return Err(DecodeError::Mismatch {
                what: "payload blocks of a peer frame",
                found: header.payload_blocks.to_string(),
                expected: format!("{counted} by its descriptors"),
            });
        }
        Ok(body)
    }
}

/// Whether `payload` is the blocks that `crcs` are of, in order.
fn check_payload<'a>(crcs: impl Iterator<Item = &'a u32>, payload: &[u8]) -> Result<(), DecodeError> {
    let (blocks, rest) = payload.as_chunks::<BLOCK>();
    let mut blocks = blocks.iter();
    for crc in crcs {
        let block = blocks.next().ok_or(DecodeError::Short { what: "payload of a peer frame", need: BLOCK, left: rest.len() })?;
        let computed = crc32c(block);
        if computed != *crc {
            return Err(DecodeError::Checksum { what: "payload block of a peer frame", found: *crc, computed });
        }
    }
    match blocks.len() * BLOCK + rest.len() {
        0 => Ok(()),
        more => Err(DecodeError::Value { what: "bytes of payload beyond the descriptors", found: more as u64 }),
    }
}

fn limit(what: &'static str, found: u64, limit: u64) -> Result<(), DecodeError> {
    if found > limit { Err(DecodeError::Limit { what, found, limit }) } else { Ok(()) }
}

/// Bytes that mean nothing yet: a later version may fill them, this one refuses to overlook them.
fn zeros(r: &mut Take<'_>, len: usize) -> Result<(), DecodeError> {
    match r.bytes(len)?.iter().find(|byte| **byte != 0) {
        Some(byte) => Err(DecodeError::Value { what: "bytes without a meaning", found: (*byte).into() }),
        None => Ok(()),
    }
}

fn take_pair(r: &mut Take<'_>) -> Result<(MemberNo, MemberNo), DecodeError> {
    let from = MemberNo(r.count("number of a member")?);
    let to = MemberNo(r.count("number of a member")?);
    if from.0 == 0 || to.0 == 0 || from == to {
        return Err(DecodeError::Value { what: "sender and receiver, sender", found: from.0 });
    }
    Ok((from, to))
}

/// A writer that grows: bodies have no size known before.
struct Grow(Vec<u8>);

impl Grow {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
    fn u8(&mut self, v: u8) {
        self.0.push(v);
    }
    fn u16(&mut self, v: u16) {
        self.bytes(&v.to_le_bytes());
    }
    fn u32(&mut self, v: u32) {
        self.bytes(&v.to_le_bytes());
    }
    fn u64(&mut self, v: u64) {
        self.bytes(&v.to_le_bytes());
    }
    fn zeros(&mut self, len: usize) {
        self.0.resize(self.0.len() + len, 0);
    }
}

#[cfg(test)]
mod tests;
