//! What goes into a store and what comes out: events, effects, and the memory that both sides share.
//!
//! A [`crate::Store`] is a closed machine. The loop around it (a core's poller, or the simulator) feeds it
//! [`Event`]s, calls `settle` once a turn, and carries out the [`Effect`]s in order. Nothing in here does I/O,
//! and nothing of an effect happens before the loop carries it out.
//!
//! Ownership: a host command is known by [`IoId`] from its `Event::Host` until its [`Effect::Reply`]; a buffer by
//! [`BufId`] from [`Memory::alloc`] until [`Memory::free`]. While a [`DiskOp`] that names them is out, the device owns
//! their bytes: the engine touches none of them, and the adapter may assert so.

use crate::replica::{LogEnd, Part as GroupPart};
use crate::reserve::rules::Reserve;
use penstock_wire::peer::{
    AdmitAnswer, AdmitAsk, Body, CopyAnswer, CopyAsk, DigestAnswer, DigestAsk, EntriesAnswer, EntriesAsk, FetchAnswer, FetchAsk, Forward,
    Forwarded, Kind, MemberNo, Members, Message, PROTOCOL_OLDEST,
};
use penstock_wire::{BLOCK, BlockAddr, HostId, Incarnation, Index, NodeId, SegmentId, SnapshotId, Term, VolumeId};

/// One host command that has not been answered. Chosen by the adapter, dense from 0, reused after the reply.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct IoId(pub u32);

/// Device-visible memory that the engine holds, 4 KiB aligned. Chosen by the adapter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct BufId(pub u32);

/// One device command that is out. Chosen by the engine, never 0, reused only after its `DiskDone`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct DiskId(pub u32);

/// One order of the control side that has not been answered. Chosen by the adapter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct OrderId(pub u64);

/// A replica's number within its store: given at its creation, never reused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct ReplicaNo(pub u32);

/// A layer of a replica: 0 is the first, and each snapshot begins another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Default)]
pub struct LayerNo(pub u32);

/// Milliseconds since an arbitrary start; only differences count. Never goes back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord, Default)]
pub struct Millis(pub u64);

/// Bytes of a volume: `offset` from its start, `len` bytes. Both in bytes, whatever the logical block is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    pub offset: u64,
    pub len: u64,
}

impl Span {
    /// First byte after the span, or `None` where that does not fit.
    pub fn end(self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }
}

/// What a host asks of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostOp {
    /// Fill the command's payload with the span.
    Read(Span),
    /// Fill the command's payload with the span as a snapshot has it, which froze this layer.
    ReadSnapshot(LayerNo, Span),
    /// Store the command's payload (`span.len` bytes). Acknowledged is durable.
    Write(Span),
    /// Make the span read as zeros and give its space back (discard and write-zeroes alike).
    Zero(Span),
    /// Answered when every command answered before it is durable, which is at once: see DESIGN 4, step 8.
    Flush,
    /// Payload is `2 × span.len` bytes: first what is expected, then what to write if it is found.
    CompareWrite(Span),
    /// Ask for, or after, the volume's reservations. The payload of a report is filled, the others have none.
    Reserve(Reserve),
}

impl HostOp {
    /// Whether it fills its payload and changes nothing.
    #[inline]
    pub fn reads(self) -> bool {
        matches!(self, HostOp::Read(_) | HostOp::ReadSnapshot(..))
    }

    /// The bytes that it is about, where it is about any.
    #[inline]
    pub fn span(self) -> Option<Span> {
        match self {
            HostOp::Read(span) | HostOp::ReadSnapshot(_, span) | HostOp::Write(span) | HostOp::Zero(span) | HostOp::CompareWrite(span) => {
                Some(span)
            }
            HostOp::Flush | HostOp::Reserve(_) => None,
        }
    }
}

/// Why the engine answers a host command as it does. The front door turns it into NVMe or virtio status.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Ok,
    /// The span leaves the volume.
    OutOfRange,
    /// Length or alignment that the volume does not offer.
    Invalid,
    /// No space left on the store. Reads, discards and deletes still work.
    NoSpace,
    /// Compare-and-write found something else at byte `at` of the span.
    Miscompare {
        at: u32,
    },
    /// The volume's reservations do not let this host do that.
    Conflict,
    /// The media's bytes do not match their checksum, or the block is known to be lost.
    Unrecovered,
    /// The drive is fenced: its state after a failed write or barrier is unknown.
    Fenced,
    /// Not serving (opening, stopping, volume gone): try again, on another path if there is one.
    NotReady,
}

/// An order from the control side; answered once by [`Effect::OrderDone`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Order {
    /// Make an empty replica. Idempotent for the same ids and shape.
    Create(Box<penstock_wire::ReplicaShape>),
    /// Make a replica that begins as a snapshot of another on this store is, at no cost but that of what is written to it. The snapshot stands, and so does its
    /// volume, as long as the clone does. With `members` it is the one of them that is on this node, and every first member is made like this: one that keeps the
    /// log alone needs nothing to stand on. Idempotent for the same ids and shape.
    Clone {
        shape: Box<penstock_wire::ReplicaShape>,
        members: Option<Box<Members>>,
        origin: SegmentId,
        snapshot: SnapshotId,
    },
    /// Make an empty replica that is a member of a group: the one of `members` that is on this node. Every first member is made with the
    /// same membership. Idempotent for the same ids and shape.
    CreateMember {
        shape: Box<penstock_wire::ReplicaShape>,
        members: Box<Members>,
    },
    /// The group's membership after one step (see [`crate::replica::Group::change`]). Answered when it is applied here; refused where this
    /// member does not lead.
    Change {
        segment: SegmentId,
        members: Box<Members>,
    },
    /// Step aside for `to`. Answered when it was begun; refused where this member does not lead.
    Transfer {
        segment: SegmentId,
        to: MemberNo,
    },
    /// Go on without the other members, with the log that is here: for a group of which a majority is lost for good. Refused while a quorum answers; and at a
    /// member whose own content is in question, unless `regardless`. [`Notice::Recovered`] comes before the answer. Idempotent.
    Recover {
        segment: SegmentId,
        regardless: bool,
    },
    /// Delete a replica and give its space back in the background. Idempotent.
    Delete {
        segment: SegmentId,
    },
    /// New size in 4 KiB blocks. What a shrink cuts off reads as zeros if the volume grows again.
    Resize {
        segment: SegmentId,
        blocks: u64,
    },
    /// Keep the volume as of here, whatever its size, at no cost but that of what is written afterwards. Every write that was answered before
    /// this was ordered is in it. Idempotent for the same id.
    Snapshot {
        segment: SegmentId,
        snapshot: Box<penstock_wire::layer::SnapshotShape>,
    },
    /// Remove a snapshot and give its space back in the background. Idempotent.
    Unsnapshot {
        segment: SegmentId,
        snapshot: SnapshotId,
    },
    /// Answered when everything acknowledged before it is drained and checkpointed.
    Drain,
    /// Read all media once and verify it. Answered at once; progress is in [`crate::StoreView`].
    ScrubStart,
    ScrubStop,
    /// Take no more host I/O, answer what is held, persist what is accepted, drain, checkpoint, stop.
    Stop,
}

/// Why an order was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OrderError {
    NotServing,
    Fenced,
    NoSuchSegment,
    /// Same segment id, other shape: says what stands.
    Conflict(Box<penstock_wire::ReplicaShape>),
    NoSpace,
    /// The same id stands for another: a snapshot's name says what.
    OtherSnapshot(String),
    NoSuchSnapshot,
    /// Not now, and soon: says what it waits for.
    NotYet(&'static str),
    /// A clone, of this name and volume, stands on it.
    CloneStands(String, VolumeId),
    Invalid(&'static str),
    /// This member does not lead its group: says which node does, where that is known.
    NotLeader(Option<NodeId>),
    /// A group is not lost: these members answer, and with this one where it is well they are so many.
    QuorumHeard {
        heard: Vec<MemberNo>,
        quorum: usize,
    },
    /// What this member has is in question, in words.
    Unsound(String),
    Stopping,
}

/// What a member went on with when a majority of its group was lost. Nothing up to `committed` is lost where the member was well (`floor`, `whole_as_of` and
/// `stopped` are none); of what came after, what its log has is kept, and the rest is gone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Receipt {
    pub me: MemberNo,
    /// As they were; all but `me` are cut off.
    pub members: Members,
    /// Those of them that answered all the same.
    pub heard: Vec<MemberNo>,
    pub term: Term,
    /// No entry from here on is of an older one.
    pub new_term: Term,
    pub last: LogEnd,
    /// As far as this member knew.
    pub committed: Index,
    /// It may have acknowledged entries as far as this, which it does not have.
    pub floor: Option<LogEnd>,
    /// Its content was being copied from others, and was whole as of this entry alone.
    pub whole_as_of: Option<Index>,
    /// Why it was stopped before.
    pub stopped: Option<String>,
}

/// What a replica of one node says to a replica of another, both of one group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PeerWord {
    Group(Message),
    EntriesAsk(EntriesAsk),
    EntriesAnswer(EntriesAnswer),
    CopyAsk(CopyAsk),
    CopyAnswer(CopyAnswer),
    AdmitAsk(AdmitAsk),
    AdmitAnswer(AdmitAnswer),
    FetchAsk(FetchAsk),
    FetchAnswer(FetchAnswer),
    DigestAsk(DigestAsk),
    DigestAnswer(DigestAnswer),
    /// Between the loops of two nodes, beside the stores' words: a host's command, and what came of it. No store says or takes one.
    Forward(Forward),
    Forwarded(Forwarded),
}

impl PeerWord {
    pub fn segment(&self) -> SegmentId {
        match self {
            Self::Group(message) => message.segment,
            Self::EntriesAsk(ask) => ask.segment,
            Self::EntriesAnswer(answer) => answer.segment,
            Self::CopyAsk(ask) => ask.segment,
            Self::CopyAnswer(answer) => answer.segment,
            Self::AdmitAsk(ask) => ask.segment,
            Self::AdmitAnswer(answer) => answer.segment,
            Self::FetchAsk(ask) => ask.segment,
            Self::FetchAnswer(answer) => answer.segment,
            Self::DigestAsk(ask) => ask.segment,
            Self::DigestAnswer(answer) => answer.segment,
            Self::Forward(forward) => forward.segment,
            Self::Forwarded(answer) => answer.segment,
        }
    }

    /// The version of the protocol that it came with.
    pub fn since(&self) -> u32 {
        match self {
            Self::FetchAsk(_) => Kind::FetchAsk.since(),
            Self::FetchAnswer(_) => Kind::FetchAnswer.since(),
            Self::AdmitAsk(_) => Kind::AdmitAsk.since(),
            Self::AdmitAnswer(_) => Kind::AdmitAnswer.since(),
            Self::DigestAsk(_) => Kind::DigestAsk.since(),
            Self::DigestAnswer(_) => Kind::DigestAnswer.since(),
            Self::Forward(_) => Kind::Forward.since(),
            Self::Forwarded(_) => Kind::Forwarded.since(),
            _ => PROTOCOL_OLDEST,
        }
    }

    /// The words of a frame; a frame that has none is given back.
    ///
    /// # Errors
    /// When it is for the nodes themselves.
    pub fn of(body: Body) -> Result<Vec<Self>, Box<Body>> {
        Ok(match body {
            Body::Groups(messages) => messages.into_iter().map(Self::Group).collect(),
            Body::EntriesAsk(ask) => vec![Self::EntriesAsk(ask)],
            Body::EntriesAnswer(answer) => vec![Self::EntriesAnswer(answer)],
            Body::CopyAsk(ask) => vec![Self::CopyAsk(ask)],
            Body::CopyAnswer(answer) => vec![Self::CopyAnswer(answer)],
            Body::FetchAsk(ask) => vec![Self::FetchAsk(ask)],
            Body::FetchAnswer(answer) => vec![Self::FetchAnswer(answer)],
            Body::AdmitAsk(ask) => vec![Self::AdmitAsk(ask)],
            Body::AdmitAnswer(answer) => vec![Self::AdmitAnswer(answer)],
            Body::DigestAsk(ask) => vec![Self::DigestAsk(ask)],
            Body::DigestAnswer(answer) => vec![Self::DigestAnswer(answer)],
            Body::Forward(forward) => vec![Self::Forward(forward)],
            Body::Forwarded(answer) => vec![Self::Forwarded(answer)],
            body @ (Body::Hello(_) | Body::Beat(_)) => return Err(Box::new(body)),
        })
    }

    /// Payload blocks that go with it.
    pub fn payload_blocks(&self) -> u32 {
        match self {
            Self::Group(message) => message.payload_blocks(),
            Self::EntriesAsk(_) | Self::CopyAsk(_) | Self::FetchAsk(_) | Self::AdmitAsk(_) | Self::AdmitAnswer(_) => 0,
            Self::DigestAsk(_) | Self::DigestAnswer(_) => 0,
            Self::EntriesAnswer(answer) => answer.payload_blocks(),
            Self::CopyAnswer(answer) => answer.payload_blocks(),
            Self::FetchAnswer(answer) => answer.payload_blocks(),
            Self::Forward(forward) => forward.payload_blocks(),
            Self::Forwarded(answer) => answer.payload_blocks(),
        }
    }
}

impl From<PeerWord> for Body {
    /// The word in a frame of its own.
    fn from(word: PeerWord) -> Self {
        match word {
            PeerWord::Group(message) => Self::Groups(vec![message]),
            PeerWord::EntriesAsk(ask) => Self::EntriesAsk(ask),
            PeerWord::EntriesAnswer(answer) => Self::EntriesAnswer(answer),
            PeerWord::CopyAsk(ask) => Self::CopyAsk(ask),
            PeerWord::CopyAnswer(answer) => Self::CopyAnswer(answer),
            PeerWord::FetchAsk(ask) => Self::FetchAsk(ask),
            PeerWord::FetchAnswer(answer) => Self::FetchAnswer(answer),
            PeerWord::AdmitAsk(ask) => Self::AdmitAsk(ask),
            PeerWord::AdmitAnswer(answer) => Self::AdmitAnswer(answer),
            PeerWord::DigestAsk(ask) => Self::DigestAsk(ask),
            PeerWord::DigestAnswer(answer) => Self::DigestAnswer(answer),
            PeerWord::Forward(forward) => Self::Forward(forward),
            PeerWord::Forwarded(answer) => Self::Forwarded(answer),
        }
    }
}

/// A replica's part in its group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    pub part: GroupPart,
    pub term: Term,
    /// Who leads that term, where it is known.
    pub leader: Option<NodeId>,
    /// Leads, and has applied what its term begins with: hosts are served here.
    pub serves: bool,
}

/// A fact for the engine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    Host {
        io: IoId,
        replica: ReplicaNo,
        /// Who asks, as reservations name hosts; zeros for one that has no such name.
        host: HostId,
        op: HostOp,
    },
    DiskDone {
        id: DiskId,
        ok: bool,
    },
    Order {
        id: OrderId,
        order: Order,
    },
    /// The drive is not to be written any more: another store on it was fenced, or it went away. The loop tells all stores
    /// of the drive in the turn in which it hears of it, since one failed barrier may have lost any store's writes.
    Fence(crate::FenceReason),
    /// A word for a replica of this store. `payload`: its payload blocks in order, not verified yet, in a buffer that is the store's from
    /// here on; `None` where the word has none. What does not fit is dropped, whoever said it.
    Peer {
        from: NodeId,
        word: Box<PeerWord>,
        payload: Option<BufId>,
    },
    /// A node can be reached, and shows this incarnation of its process.
    PeerUp {
        node: NodeId,
        incarnation: Incarnation,
    },
    /// A node cannot be reached, or was silent for too long.
    PeerDown {
        node: NodeId,
    },
    /// Words to a node were dropped on this side: its queue was full, or it could not be reached.
    PeerLost {
        node: NodeId,
    },
    /// Time passes: at least every 10 ms while anything is out, none are needed while `StoreView::quiescent`.
    Tick {
        now: Millis,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskKind {
    Read,
    Write,
    /// The drive's barrier: everything that completed before it was submitted is durable when it completes.
    Flush,
}

/// A piece of a device command's memory, in order. All lengths are whole 4 KiB blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// `blocks` of buffer `buf` from its block `first`.
    Buf { buf: BufId, first: u32, blocks: u32 },
    /// `blocks` of host command `io`'s payload from byte `offset` (only for `host_direct` payloads).
    Host { io: IoId, offset: u32, blocks: u32 },
}

impl Part {
    pub fn blocks(self) -> u32 {
        match self {
            Part::Buf { blocks, .. } | Part::Host { blocks, .. } => blocks,
        }
    }
}

/// One device command. Its parts are `Effects::parts[first_part .. first_part + part_count]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskOp {
    pub id: DiskId,
    pub kind: DiskKind,
    /// 4 KiB block within the store (the adapter adds the store's start on the drive).
    pub at: BlockAddr,
    pub blocks: u32,
    pub first_part: u32,
    pub part_count: u32,
}

/// Something an operator, the control side or the node's own state must hear of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    /// Recovery is over and the store serves.
    Serving(crate::RecoveryReport),
    /// Recovery cannot go on; nothing was changed on the drive.
    OpenFailed(crate::OpenError),
    /// The store takes no more writes; must be recorded off this drive.
    Fenced(crate::FenceReason),
    /// Media that does not match its checksum, by volume block.
    Corrupt {
        replica: ReplicaNo,
        block: u64,
        place: BlockAddr,
    },
    /// An extent, by its first block, is otherwise here than other members have it, and has its own checksums right: it is copied anew from those who are in the
    /// majority, or, where there is none, left as it is.
    Differs {
        replica: ReplicaNo,
        layer: LayerNo,
        block: u64,
        mends: bool,
    },
    /// A replica appeared, changed size, or went (also told once per replica when recovery is over).
    Replica {
        replica: ReplicaNo,
        shape: Box<penstock_wire::ReplicaShape>,
        gone: bool,
    },
    ScrubDone {
        blocks: u64,
        corrupt: u64,
    },
    /// A replica's part in its group changed.
    Standing {
        replica: ReplicaNo,
        standing: Standing,
    },
    /// This member's drive is behind the others' for so long that it hands leadership over.
    SteppingAside {
        replica: ReplicaNo,
        to: NodeId,
    },
    /// A member went on alone: comes before the answer to its order.
    Recovered {
        replica: ReplicaNo,
        order: OrderId,
        receipt: Box<Receipt>,
    },
    /// A group answers nothing any more, in words; the store and its other groups go on.
    GroupStopped {
        replica: ReplicaNo,
        why: String,
    },
    Stopped,
}

/// An imperative for the loop, carried out in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    Disk(DiskOp),
    Reply {
        io: IoId,
        status: Status,
    },
    OrderDone {
        id: OrderId,
        result: Result<(), OrderError>,
    },
    Notice(Notice),
    /// `word` to a node. Its payload is `Effects::parts[first_part .. first_part + part_count]`, in order, to be copied out while this effect
    /// is carried out and not after (a device write of the same memory may be out: nobody changes it meanwhile). A word that cannot go
    /// is dropped, and said so by [`Event::PeerLost`].
    Send {
        node: NodeId,
        word: Box<PeerWord>,
        first_part: u32,
        part_count: u32,
    },
}

/// What one turn wants done. Reused from turn to turn: `clear` keeps the capacity.
#[derive(Default, Debug)]
pub struct Effects {
    pub list: Vec<Effect>,
    pub parts: Vec<Part>,
}

impl Effects {
    pub fn clear(&mut self) {
        self.list.clear();
        self.parts.clear();
    }

    pub fn parts_of(&self, op: &DiskOp) -> &[Part] {
        &self.parts[op.first_part as usize..(op.first_part + op.part_count) as usize]
    }
}

/// Memory that the loop owns and the engine names: its own buffers, and the payloads of host commands.
///
/// Offsets and lengths of host payloads are bytes from the payload's start, whatever pieces it lies in.
pub trait Memory {
    /// A buffer of `blocks` × 4 KiB, contents undefined; `None` when memory is short (the engine then waits).
    fn alloc(&mut self, blocks: u32) -> Option<BufId>;
    fn free(&mut self, buf: BufId);
    fn bytes(&self, buf: BufId) -> &[u8];
    fn bytes_mut(&mut self, buf: BufId) -> &mut [u8];

    /// Copies the first block of `from` to block `at` of another buffer.
    fn copy_block(&mut self, from: BufId, to: BufId, at: usize) {
        let mut block = [0; BLOCK];
        block.copy_from_slice(&self.bytes(from)[..BLOCK]);
        self.bytes_mut(to)[at * BLOCK..][..BLOCK].copy_from_slice(&block);
    }

    /// True when nobody else can change the payload before the reply and every 4 KiB of it lies in whole, 4 KiB
    /// aligned pieces: then it may go to the device as it is. False for guest memory.
    fn host_direct(&self, io: IoId) -> bool;
    /// CRC-32C of the payload's 4096 bytes from `offset`.
    fn host_crc(&self, io: IoId, offset: u32) -> u32;
    /// Copies payload bytes from `offset` into `buf` at byte `at`.
    fn host_to_buf(&mut self, io: IoId, offset: u32, buf: BufId, at: u32, len: u32);
    /// Copies bytes of `buf` from `at` into the payload at `offset`.
    fn buf_to_host(&mut self, buf: BufId, at: u32, io: IoId, offset: u32, len: u32);
    /// Fills payload bytes with zeros.
    fn host_zero(&mut self, io: IoId, offset: u32, len: u32);
    /// First byte from which payload `offset..offset + len` differs from `buf` at `at`, if any.
    fn host_differs(&self, io: IoId, offset: u32, buf: BufId, at: u32, len: u32) -> Option<u32>;
}
