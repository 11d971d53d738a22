//! One member of one Raft group, over crate `raft`: proposals, messages and finished writes go in, messages, what to persist, what
//! to apply and proofs of leadership come out. Nothing outside this module knows that crate.
//!
//! A turn: [`Group::step`], [`Group::propose`], [`Group::read`], [`Group::on_persisted`] as things come, then once
//! [`Group::settle`]; its [`Output`] is carried out in full before the group is touched again. Time comes as
//! [`Group::tick`] and as the `now` of `settle`; there is no clock and no randomness that counts here.
//!
//! Files: [`group`](Group) (the calls, and how raft's `Ready` is handled), `log` (raft's storage), `convert` (raft's messages and ours), `check` (every
//! message against the group's state before raft sees it), `rounds` (reads and the lease), `pace` (a leader whose drive is slow), [`resolve`] (the doubt of a member whose log may have been longer).
//!
//! Not here: payload (the store's; an append comes only [`Verified`](penstock_wire::peer::Verified)), sockets, the stream that persists, and what ops mean.

mod change;
mod check;
mod convert;
mod group;
mod log;
mod pace;
pub mod resolve;
mod rounds;
#[cfg(test)]
mod tests;

pub use check::Refused;
pub use group::Group;

use crate::port::Millis;
use penstock_wire::peer::{Entry, Install, MemberNo, Members, Message};
use penstock_wire::{Index, SegmentId, Term};
use thiserror::Error;

/// Payload blocks of an append at most, which one entry may have too: 1 MiB. Larger would bind a receiver's memory for little.
const APPEND_BLOCKS_MAX: u32 = penstock_wire::batch::PAYLOAD_BLOCKS_MAX;

/// How long things take, in ticks but for one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// Without a word from a leader for this long a member may campaign, and until then it votes for nobody else.
    pub election: u32,
    /// Between two heartbeats of a leader.
    pub heartbeat: u32,
    /// Between the election timeouts of two members.
    pub stride: u32,
    /// A tick in milliseconds: ticks never come more often than that.
    pub tick: u32,
    /// Idle for this long, a group goes to sleep; `None`: never.
    pub sleep: Option<u32>,
    /// A leader whose drive has been behind the others' for so long hands over; `None`: never.
    pub aside: Option<u32>,
    /// Whether a proof of leadership holds for a while, or for the reads before it alone.
    pub lease: bool,
}

impl Timing {
    /// Leadership that was proven by a round sent at `sent` holds until then: 0.8 of the smallest timeout, less what a clock's step hides.
    fn lease_end(&self, sent: Millis) -> Millis {
        Millis(sent.0 + (u64::from(self.election) * u64::from(self.tick) * 8 / 10).saturating_sub(1))
    }
}

/// What a group is opened with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupConfig {
    pub segment: SegmentId,
    pub me: MemberNo,
    pub timing: Timing,
    /// A seeded bug; ignored without the feature `canary`.
    pub canary: Option<Canary>,
}

/// Term and vote: spoken only after they are persisted, and known to be so by a later record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ballot {
    pub term: Term,
    /// `MemberNo(0)` for nobody.
    pub vote: MemberNo,
}

/// The end of a log, compared as elections compare logs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord, Default)]
pub struct LogEnd {
    pub term: Term,
    pub index: Index,
}

/// What recovery found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recovered {
    pub ballot: Ballot,
    /// The entry before the first in `entries`, and its term: at `applied` or before it.
    pub start: Index,
    pub start_term: Term,
    /// What is applied, and its term.
    pub applied: Index,
    pub applied_term: Term,
    /// Of `applied`.
    pub members: Members,
    pub entries: Vec<Entry>,
    /// Entries up to here are known to be committed; they are in `entries`, or applied.
    pub committed: Index,
    /// The member may have acknowledged entries that are gone, none beyond the end of such a log: until its own is that far again it votes for
    /// nobody whose log is not, and does not campaign. See [`resolve`].
    pub floor: Option<LogEnd>,
}

impl Recovered {
    /// Entries that are not applied.
    pub fn unapplied(&self) -> &[Entry] {
        let known = (self.applied.0 - self.start.0) as usize;
        self.entries.get(known..).unwrap_or(&[])
    }
}

/// Why a group cannot be opened: what recovery found contradicts itself.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum OpenError {
    #[error("entry {found} stands where entry {expected} belongs: the log has a gap")]
    Gap { found: u64, expected: u64 },
    #[error("entry {index} is of term {term}, after one of term {before}, with a ballot of term {ballot}")]
    Term { index: u64, term: u64, before: u64, ballot: u64 },
    #[error("the log is kept after {start} and ends at {last}; {applied} is applied")]
    Applied { start: u64, last: u64, applied: u64 },
    #[error("entry {index}: {error}")]
    Entry { index: u64, error: penstock_wire::DecodeError },
    #[error("membership: {0}")]
    Members(penstock_wire::DecodeError),
    #[error("the group's timing is not one: {0}")]
    Timing(String),
}

/// Why a proposal was not taken. None of it is in the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum ProposeError {
    #[error("this member does not lead the term in which that was decided")]
    NotLeader,
    #[error("the leader is stepping aside; ask the next one")]
    SteppingAside,
    #[error("the entry cannot be in a log")]
    Invalid,
    #[error("a change of members is under way; wait for it")]
    ChangePending,
    #[error("a change must add a learner under the next number, promote one, or remove one member")]
    NotOneStep,
    #[error("the leader cannot remove itself: transfer first")]
    TransferFirst,
    #[error("the group has stopped")]
    Stopped,
}

/// Why a group answers nothing any more.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Stop {
    /// Raft broke on something that the checks let through, or what the drive has of it cannot be vouched for. The drive and the other groups are well.
    #[error("{0}")]
    Quarantined(String),
    /// What was to be persisted is not: the drive is fenced.
    #[error("its drive is fenced")]
    PersistFailed,
    /// For a moment.
    #[error("it is being recovered by force")]
    Forced,
}

/// A member's part in its group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    Follower,
    Candidate,
    Leader,
}

/// The group as this member sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupView {
    pub part: Part,
    pub term: Term,
    /// `MemberNo(0)` for nobody.
    pub leader: MemberNo,
    pub first: Index,
    pub last: Index,
    pub last_term: Term,
    pub committed: Index,
    pub persisted: Index,
    pub applied: Index,
    /// Leads, and has applied what its term begins with.
    pub serves: bool,
    pub asleep: bool,
}

/// Names one thing to be persisted; grows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Mark(pub u64);

/// Goes into the stream, in order; when it and all before it are durable, [`Group::on_persisted`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Persist {
    pub mark: Mark,
    /// Durable only when a later durable record says so (see ARCHITECTURE.md): never among the records that recovery cannot judge.
    pub ballot: Option<Ballot>,
    /// The first may replace one that is there already: then all from it on are gone.
    pub entries: Vec<Entry>,
    /// The state to begin from: replaces the whole log, atomically, before `entries`.
    pub install: Option<Install>,
}

/// What a group wants done, in this order. Reused from turn to turn.
#[derive(Default, Debug)]
pub struct Output {
    pub persist: Vec<Persist>,
    pub send: Vec<Message>,
    /// Committed and persisted here: to be applied, in order, before the group is called again. Every entry, also those without ops with
    /// which terms begin.
    pub apply: Vec<Entry>,
    /// Reads that may be served from what is applied after this turn, and those that this member may not serve.
    pub reads: Vec<u64>,
    pub reads_refused: Vec<u64>,
    /// Who asked for more than the log still has: offer an install.
    pub wants_install: Option<MemberNo>,
    /// The membership, when it changed.
    pub members: Option<Members>,
    /// The member was in doubt and is not any more.
    pub resolved: bool,
    /// It leads, and its drive is what everyone waits for: leadership is better given to another.
    pub too_slow: bool,
}

impl Output {
    pub fn clear(&mut self) {
        self.persist.clear();
        self.send.clear();
        self.apply.clear();
        self.reads.clear();
        self.reads_refused.clear();
        self.wants_install = None;
        self.members = None;
        self.resolved = false;
        self.too_slow = false;
    }
}

/// Seeded bugs that the simulator must catch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Canary {
    /// A follower answers before its write is durable.
    AnswerEarly,
    /// A leader counts its own entries before they are durable.
    CountUnpersisted,
    /// Term and vote are not persisted.
    ForgetBallot,
    /// A lease runs from when the answers came, not from when the round was sent.
    LeaseFromReceive,
    /// A lease outlives the beginning of a transfer.
    LeaseOverTransfer,
    /// A restarted member votes at once.
    VoteAtOnce,
    /// A round's number is used again in the next round.
    ReuseRound,
    /// A sleeping leader keeps its lease.
    LeaseAsleep,
    /// Reads are served on being leader alone.
    ReadUnproven,
    /// Messages reach raft unchecked.
    StepUnchecked,
    /// A member votes although its log may have been longer.
    ForgetFloor,
    /// Reads are served on the lease of crate `raft`, which runs by ticks.
    RaftLease,
    /// A member that is being rebuilt campaigns and serves like any.
    ServeUnrebuilt,
}

impl Canary {
    pub const ALL: [Canary; 13] = [
        Canary::AnswerEarly,
        Canary::CountUnpersisted,
        Canary::ForgetBallot,
        Canary::LeaseFromReceive,
        Canary::LeaseOverTransfer,
        Canary::VoteAtOnce,
        Canary::ReuseRound,
        Canary::LeaseAsleep,
        Canary::ReadUnproven,
        Canary::StepUnchecked,
        Canary::ForgetFloor,
        Canary::RaftLease,
        Canary::ServeUnrebuilt,
    ];
}
