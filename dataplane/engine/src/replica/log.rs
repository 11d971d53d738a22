//! What raft reads its log from: the descriptors in memory from the trim point on. The truth is the stream; this is what of it was
//! read at recovery and appended since.
//!
//! An entry is here before it is persisted, as raft wants; raft itself keeps count of what is.

use super::convert;
use penstock_wire::peer::{Install, MemberNo, Members};
use penstock_wire::{Index, Term};
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Storage, StorageError};
use std::cell::Cell;
use std::collections::VecDeque;

pub(super) struct LogStore {
    /// The entry before the first, and its term.
    trimmed: u64,
    trimmed_term: u64,
    entries: VecDeque<Entry>,
    /// What raft begins with; not kept up after that.
    hard: HardState,
    conf: ConfState,
    /// What to give a member that needs more than is here.
    offer: Option<Install>,
    /// Up to here entries are not sent any more.
    unsendable: u64,
    wanted: Cell<Option<MemberNo>>,
}

pub(super) fn conf_state(members: &Members) -> ConfState {
    let mut conf = ConfState::default();
    conf.set_voters(members.voters().map(|no| no.0).collect());
    conf.set_learners(members.learners().map(|no| no.0).collect());
    conf
}

impl LogStore {
    pub fn new(trimmed: Index, trimmed_term: Term, entries: VecDeque<Entry>, hard: HardState, members: &Members) -> Self {
        let conf = conf_state(members);
        Self { trimmed: trimmed.0, trimmed_term: trimmed_term.0, entries, hard, conf, offer: None, unsendable: 0, wanted: Cell::new(None) }
    }

    pub fn first(&self) -> u64 {
        self.trimmed + 1
    }

    pub fn last(&self) -> u64 {
        self.trimmed + self.entries.len() as u64
    }

    /// Puts entries at their place; all that stood from there on is gone.
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(
            first.index > self.trimmed && first.index <= self.last() + 1,
            "entry {} after {}..={}",
            first.index,
            self.trimmed,
            self.last()
        );
        self.entries.truncate((first.index - self.trimmed - 1) as usize);
        self.entries.extend(entries.iter().cloned());
    }

    /// Lets go of everything up to `to`.
    pub fn trim(&mut self, to: Index) {
        while self.trimmed < to.0 {
            let entry = self.entries.pop_front().expect("what is trimmed is here");
            self.trimmed = entry.index;
            self.trimmed_term = entry.term;
        }
    }

    /// Begins anew after an install.
    pub fn install(&mut self, install: &Install) {
        self.entries.clear();
        self.trimmed = install.index.0;
        self.trimmed_term = install.index_term.0;
    }

    /// Members that need this entry or one before it need more than the log has.
    pub fn cannot_send(&mut self, index: Index) {
        self.unsendable = self.unsendable.max(index.0);
    }

    pub fn offer(&mut self, install: Install) {
        self.offer = Some(install);
    }

    pub fn take_wanted(&self) -> Option<MemberNo> {
        self.wanted.take()
    }

    /// Of an entry that is here, or the one before the first.
    pub fn term_at(&self, index: u64) -> u64 {
        if index == self.trimmed { self.trimmed_term } else { self.get(index).map_or(0, |entry| entry.term) }
    }

    pub fn get(&self, index: u64) -> Option<&Entry> {
        self.entries.get(index.checked_sub(self.trimmed + 1)? as usize)
    }
}

impl Storage for LogStore {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard.clone(), self.conf.clone()))
    }

    fn entries(&self, low: u64, high: u64, max_size: impl Into<Option<u64>>, of: GetEntriesContext) -> raft::Result<Vec<Entry>> {
        // To be sent alone they may wait, as raft says it.
        if low <= self.trimmed || low <= self.unsendable && of.can_async() {
            return Err(Error::Store(StorageError::Compacted));
        }
        assert!(high <= self.last() + 1, "entries to {high} are asked for, the last is {}", self.last());
        let max_size = max_size.into().unwrap_or(u64::MAX);
        let (mut bytes, mut blocks) = (0, 0);
        let mut taken = Vec::new();
        // Raft counts descriptors; what a message drags along is the payload.
        for entry in self.entries.range((low - self.trimmed - 1) as usize..(high - self.trimmed - 1) as usize) {
            bytes += entry.data.len() as u64 + 32;
            blocks += convert::payload_blocks(entry);
            if !taken.is_empty() && (bytes > max_size || max_size != u64::MAX && blocks > super::APPEND_BLOCKS_MAX) {
                break;
            }
            taken.push(entry.clone());
        }
        Ok(taken)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.trimmed {
            return Ok(self.trimmed_term);
        }
        if index < self.trimmed {
            return Err(Error::Store(StorageError::Compacted));
        }
        self.get(index).map(|entry| entry.term).ok_or(Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        // A member that the offered membership does not know would not take it.
        match self.offer.as_ref().filter(|offer| offer.members.get(MemberNo(to)).is_some()) {
            Some(offer) if offer.index.0 >= request_index.max(self.trimmed).max(self.unsendable) => Ok(convert::snapshot(offer)),
            _ => {
                self.wanted.set(Some(MemberNo(to)));
                Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable))
            }
        }
    }
}
