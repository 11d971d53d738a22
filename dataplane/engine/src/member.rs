//! A replica that is a member of a group of several: what the store keeps of it beside the map. Volumes of one replica have none of this.
//!
//! The group (crate raft, in [`crate::replica`]) knows descriptors; the store knows where each entry lies: its batch and the ring blocks of its
//! payload. `log` is that knowledge, one row an entry, from the trim point on, in step with the group's own list.

use crate::port::BufId;
use crate::replica::{Ballot, Group, Mark, Stop};
use penstock_wire::peer::{Entry, MemberNo, Members};
use penstock_wire::{Index, Seq, Term};
use std::collections::VecDeque;

/// Where an entry's payload can be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Payload {
    /// It has none.
    None,
    /// In the buffer in which it came in from the leader, from this block of it on: the batch is not persisted yet.
    Staged { buf: BufId, first: u32 },
    /// In the host commands that it was made of, and their buffers: see `Proposal` of the leading side.
    Host,
    /// On the drive, from this block of the ring on.
    Ring { at: u32 },
}

/// An entry of the group's log: its descriptors, and where it lies.
#[derive(Clone, Debug)]
pub(crate) struct Logged {
    pub entry: Entry,
    /// Its batch; `None` until it is in one. An entry that recovery found has the batch that it was found in.
    pub seq: Option<Seq>,
    pub payload: Payload,
}

/// Something of the group's that is in the stream: told to the group, in order, once it is durable (and sealed, where it has a ballot).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Marked {
    pub mark: Mark,
    /// The last batch with a part of it.
    pub seq: Seq,
    pub ballot: bool,
}

/// Whether the member may speak.
pub(crate) enum MemberStage {
    /// Recovery found what it could not judge: the others are asked, and the group is not built yet.
    Doubtful(Box<crate::doubt::Doubts>),
    Up(Box<Group>),
    /// Answers nothing any more.
    Stopped(Stop),
}

impl std::fmt::Debug for MemberStage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Doubtful(_) => "Doubtful",
            Self::Up(_) => "Up",
            Self::Stopped(_) => "Stopped",
        })
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Member {
    pub me: MemberNo,
    pub stage: MemberStage,
    /// The membership as of what is applied, and the term of the last applied entry (`Replica::applied` has its index).
    pub members: Members,
    pub applied_term: Term,
    /// Newest ballot that went into the stream; a checkpoint carries it.
    pub ballot: Ballot,
    /// The entry before the first in `log`, and its term.
    pub start: Index,
    pub start_term: Term,
    pub log: VecDeque<Logged>,
    /// In order.
    pub marks: VecDeque<Marked>,
}

impl Member {
    pub fn last(&self) -> Index {
        Index(self.start.0 + self.log.len() as u64)
    }

    pub fn get(&self, index: Index) -> Option<&Logged> {
        self.log.get(index.0.checked_sub(self.start.0 + 1)? as usize)
    }

    /// Puts an entry at its place; all that stood from there on is gone.
    pub fn put(&mut self, logged: Logged) {
        let at = (logged.entry.index.0 - self.start.0 - 1) as usize;
        assert!(at <= self.log.len(), "entry {:?} after {:?}", logged.entry.index, self.last());
        self.log.truncate(at);
        self.log.push_back(logged);
    }

    /// First batch that the entries after `applied` need.
    pub fn needed_from(&self, applied: Index) -> Option<Seq> {
        self.log.iter().skip(applied.0.saturating_sub(self.start.0) as usize).find_map(|logged| logged.seq)
    }
}
