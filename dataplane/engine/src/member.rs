//! A replica that is a member of a group of several: what the store keeps of it beside the map. Volumes of one replica have none of this.
//!
//! The group (crate raft, in [`crate::replica`]) knows descriptors; the store knows where each entry lies: its batch and the ring blocks of its
//! payload. `log` is that knowledge, one row an entry, from the trim point on, in step with the group's own list.

use crate::admit::{Admission, Known};
use crate::host::{JobId, Proposed};
use crate::port::{BufId, LayerNo, OrderId, Standing};
use crate::replica::{Ballot, Group, Mark, Stop};
use penstock_wire::peer::{Entry, EntryKind, MemberNo, Members};
use penstock_wire::{Index, NodeId, Seq, Term};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// Members that the applied membership does not know and whose nodes are remembered.
const STRANGERS_MAX: usize = 8;

/// Where an entry's payload can be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Payload {
    /// It has none.
    None,
    /// In the buffer in which it came in from the leader, from this block of it on: the batch is not persisted yet.
    Staged { buf: BufId, first: u32 },
    /// In the host commands that it was made of, and their buffers: see [`Proposal`].
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
    /// Extents that count on a promise in `Member::promised` until it is applied.
    pub promised: Vec<Promise>,
}

/// What an entry counts on until it is applied, in the layer that it will change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Promise {
    Extent(LayerNo, u32),
    /// A page of the map, for zeros over frozen layers.
    Page(LayerNo, u32),
}

/// An entry that this member made of its hosts' commands and orders.
#[derive(Debug)]
pub(crate) struct Proposal {
    pub index: Index,
    pub term: Term,
    pub ops: Vec<Proposed>,
    /// Until the entry is in `log`, which has them from then on.
    pub promised: Vec<Promise>,
    /// The term is over: who waits for it is told to try elsewhere, once the payload is on the drive.
    pub lost: bool,
}

/// An entry's payload that came in, until the group has taken the entry or has not.
#[derive(Debug)]
pub(crate) struct Staged {
    pub index: Index,
    pub term: Term,
    /// Its buffer, and the first block there; none where it has no payload and counts on pages alone.
    pub payload: Option<(BufId, u32)>,
    pub promised: Vec<Promise>,
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
    Up(Box<Group>),
    /// Answers nothing any more.
    Stopped(Stop),
}

impl std::fmt::Debug for MemberStage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
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
    /// Where the log ended when the store was opened, as far as it stands: what of that counts as applied no more may be in extents.
    pub recovered: Index,
    /// All up to here is in extents that a durable checkpoint knows.
    pub saved: Index,
    /// What the others say to this opening of its store, and what it knows of theirs.
    pub admission: Admission,
    pub known: Vec<Known>,
    /// What the others say to a member whose log may have been longer.
    pub doubts: Option<Box<crate::doubt::Doubts>>,
    /// Its content is being copied from another.
    pub rebuild: Option<Box<crate::rebuild::Rebuild>>,
    /// In order.
    pub marks: VecDeque<Marked>,
    /// Entries of hosts here that are not applied, in order.
    pub proposals: VecDeque<Proposal>,
    pub staged: Vec<Staged>,
    /// Extents promised to entries that are not applied, and how many of those count on each: a log of writes to one extent needs it once.
    pub promised: FxHashMap<Promise, u32>,
    /// Entries that are snapshots' markers and are not applied, in order.
    pub markers: Vec<Index>,
    /// Those that came in and that the group has not taken yet, and the entry from which on what came in replaces the log.
    pub staged_markers: Vec<Index>,
    pub replaced_from: Option<Index>,
    /// Payload blocks of hosts here that are ready or proposed, and not applied.
    pub out_blocks: u64,
    /// Blocks of entries that were applied since the log was told last what is committed.
    pub untold_blocks: u32,
    /// Jobs that go on once it is known that this member leads.
    pub asking: Vec<JobId>,
    /// The term in which hosts are served here.
    pub serving: Option<Term>,
    /// As it was told last.
    pub standing: Option<Standing>,
    /// Space at the others, while hosts are served here.
    pub rooms: crate::room::Rooms,
    /// A change of members that an order waits for.
    pub change: Option<(OrderId, Index)>,
    /// Nodes of members that the applied membership does not know, the newest first.
    pub strangers: Vec<(MemberNo, NodeId)>,
    /// In the lists of those to settle and of those with marks, and counted as awake: see `groups`.
    pub touched: bool,
    pub marked: bool,
    pub awake: bool,
}

impl Member {
    pub fn new(me: MemberNo, stage: MemberStage, members: Members) -> Self {
        Self {
            me,
            stage,
            members,
            applied_term: Term(0),
            ballot: Ballot::default(),
            start: Index(0),
            start_term: Term(0),
            log: VecDeque::new(),
            recovered: Index(0),
            saved: Index(0),
            admission: Admission::default(),
            known: Vec::new(),
            doubts: None,
            rebuild: None,
            marks: VecDeque::new(),
            proposals: VecDeque::new(),
            staged: Vec::new(),
            promised: FxHashMap::default(),
            markers: Vec::new(),
            staged_markers: Vec::new(),
            replaced_from: None,
            out_blocks: 0,
            untold_blocks: 0,
            asking: Vec::new(),
            serving: None,
            standing: None,
            rooms: Default::default(),
            change: None,
            strangers: Vec::new(),
            touched: false,
            marked: false,
            awake: false,
        }
    }

    /// A snapshot's marker has its place in the log.
    pub fn note_marker(&mut self, index: Index) {
        self.markers.retain(|marker| *marker < index);
        self.markers.push(index);
    }

    /// Whether entries take effect on content here; a log-only member keeps them for the others.
    pub fn has_content(&self) -> bool {
        self.members.has_content(self.me)
    }

    pub fn last(&self) -> Index {
        Index(self.start.0 + self.log.len() as u64)
    }

    pub fn get(&self, index: Index) -> Option<&Logged> {
        self.log.get(index.0.checked_sub(self.start.0 + 1)? as usize)
    }

    pub fn get_mut(&mut self, index: Index) -> Option<&mut Logged> {
        self.log.get_mut(index.0.checked_sub(self.start.0 + 1)? as usize)
    }

    /// The entry of that index and term, if the log has it.
    pub fn holds(&self, index: Index, term: Term) -> Option<&Logged> {
        self.get(index).filter(|logged| logged.entry.term == term)
    }

    pub fn term_at(&self, index: Index) -> Option<Term> {
        if index == self.start { Some(self.start_term) } else { self.get(index).map(|logged| logged.entry.term) }
    }

    /// Puts an entry at its place; all that stood from there on is gone.
    pub fn put(&mut self, logged: Logged) {
        let index = logged.entry.index;
        let at = (index.0 - self.start.0 - 1) as usize;
        assert!(at <= self.log.len(), "entry {index:?} after {:?}", self.last());
        if logged.entry.is_marker() {
            self.note_marker(index);
        }
        self.log.truncate(at);
        self.log.push_back(logged);
    }

    pub fn proposal(&self, index: Index, term: Term) -> Option<&Proposal> {
        let at = self.proposals.binary_search_by_key(&index, |proposal| proposal.index).ok()?;
        Some(&self.proposals[at]).filter(|proposal| proposal.term == term)
    }

    /// How far all that is `applied` lies in batches up to `covers`, and the term there. What is applied beyond is in the log alone: if its record rots, a
    /// checkpoint that called it applied would leave a hole that nobody sees. A membership is in the directory as it is applied, so nothing goes back beyond one.
    pub fn drained(&self, applied: Index, covers: Seq) -> (Index, Term) {
        let mut at = applied;
        while let Some(logged) = self.get(at).filter(|logged| logged.seq.is_some_and(|seq| seq > covers))
            && logged.entry.kind == EntryKind::Ops
        {
            at.0 -= 1;
        }
        (at, self.term_at(at).unwrap_or(self.applied_term))
    }

    /// First batch that the entries after `applied` need.
    pub fn needed_from(&self, applied: Index) -> Option<Seq> {
        self.log.iter().skip(applied.0.saturating_sub(self.start.0) as usize).find_map(|logged| logged.seq)
    }

    pub fn group(&self) -> Option<&Group> {
        match &self.stage {
            MemberStage::Up(group) => Some(group),
            _ => None,
        }
    }

    pub fn group_mut(&mut self) -> Option<&mut Group> {
        match &mut self.stage {
            MemberStage::Up(group) => Some(group),
            _ => None,
        }
    }

    /// Where a member is that the applied membership does not know; the newest word on it counts.
    pub fn meet(&mut self, no: MemberNo, node: NodeId) {
        if self.members.get(no).is_some() {
            return;
        }
        self.strangers.retain(|(stranger, _)| *stranger != no);
        self.strangers.truncate(STRANGERS_MAX - 1);
        self.strangers.insert(0, (no, node));
    }

    pub fn node_of(&self, no: MemberNo) -> Option<NodeId> {
        let known = self.members.get(no).map(|member| member.node);
        known.or_else(|| self.strangers.iter().find(|(other, _)| *other == no).map(|(_, node)| *node))
    }
}
