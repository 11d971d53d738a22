//! Raft's messages and entries as ours, and ours as raft's. Raft's own encoding is used for one thing only: the change that a
//! leader proposes to itself, which raft insists on decoding; it leaves no process.

use super::log::conf_state;
use penstock_wire::layer::Stack;
use penstock_wire::peer::{Append, BODY_MAX, Entry, EntryKind, Install, MemberNo, Members, Message, MessageBody, Round};
use penstock_wire::reservation::Reservations;
use penstock_wire::{Index, SegmentId, Term, batch};
use raft::eraftpb::{self, EntryType, MessageType};

/// What raft marks a forced campaign with.
const FORCED: &[u8] = raft::CAMPAIGN_TRANSFER;

/// An entry's ops or membership: a membership stands in the context, since raft has its own idea of the data.
fn bytes_of(entry: &eraftpb::Entry) -> (EntryKind, &[u8]) {
    match entry.get_entry_type() {
        EntryType::EntryNormal => (EntryKind::Ops, &entry.data),
        _ => (EntryKind::Members, &entry.context),
    }
}

pub(super) fn payload_blocks(entry: &eraftpb::Entry) -> u32 {
    match bytes_of(entry) {
        (EntryKind::Ops, bytes) => batch::payload_blocks_of(bytes),
        _ => 0,
    }
}

pub(super) fn entry(entry: &eraftpb::Entry) -> Entry {
    let (kind, bytes) = bytes_of(entry);
    Entry { term: Term(entry.term), index: Index(entry.index), kind, bytes: bytes.to_vec(), payload_blocks: payload_blocks(entry) }
}

pub(super) fn raft_entry(entry: Entry) -> eraftpb::Entry {
    let mut to = eraftpb::Entry { term: entry.term.0, index: entry.index.0, ..Default::default() };
    match entry.kind {
        EntryKind::Ops => to.data = entry.bytes.into(),
        EntryKind::Members => {
            to.set_entry_type(EntryType::EntryConfChangeV2);
            to.context = entry.bytes.into();
        }
    }
    to
}

pub(super) fn round_bytes(round: Round) -> Vec<u8> {
    [round.term.0.to_le_bytes(), round.count.to_le_bytes()].concat()
}

pub(super) fn round(bytes: &[u8]) -> Option<Round> {
    let (term, count) = bytes.split_first_chunk::<8>()?;
    let count = count.try_into().ok()?;
    Some(Round { term: Term(u64::from_le_bytes(*term)), count: u64::from_le_bytes(count) })
}

pub(super) fn snapshot(install: &Install) -> eraftpb::Snapshot {
    let state = install.reservations.as_ref().map(|state| state.encode()).unwrap_or_default();
    let stack = install.stack.as_ref().map(|stack| stack.encode()).unwrap_or_default();
    let mut data = install.digest.to_vec();
    for piece in [install.members.encode(), state, stack] {
        data.extend((piece.len() as u32).to_le_bytes());
        data.extend(piece);
    }
    let data = data.into();
    let mut snapshot = eraftpb::Snapshot { data, ..Default::default() };
    let metadata = snapshot.mut_metadata();
    metadata.index = install.index.0;
    metadata.term = install.index_term.0;
    metadata.set_conf_state(conf_state(&install.members));
    snapshot
}

/// Bytes in front of which their number stands, and what comes after them.
fn piece(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*len) as usize)
}

pub(super) fn install(snapshot: &eraftpb::Snapshot) -> Option<Install> {
    let (digest, rest) = snapshot.data.split_first_chunk::<16>()?;
    let (members, rest) = piece(rest)?;
    let (state, rest) = piece(rest)?;
    let (stack, _) = piece(rest)?;
    let reservations = if state.is_empty() { None } else { Some(Box::new(Reservations::decode(state).ok()?)) };
    let stack = if stack.is_empty() { None } else { Some(Box::new(Stack::decode(stack).ok()?)) };
    let metadata = snapshot.get_metadata();
    Some(Install {
        index: Index(metadata.index),
        index_term: Term(metadata.term),
        digest: *digest,
        members: Members::decode(members).ok()?,
        reservations,
        stack,
    })
}

/// Raft's message as those that go out: an append that carries too much for a frame becomes several.
pub(super) fn outgoing(segment: SegmentId, mut from: eraftpb::Message, out: &mut Vec<Message>) {
    let (commit, index) = (Index(from.commit), Index(from.index));
    let (log_term, commit_term) = (Term(from.log_term), Term(from.commit_term));
    let message = |body| Message { segment, from: MemberNo(from.from), to: MemberNo(from.to), term: Term(from.term), body };
    let body = match from.get_msg_type() {
        MessageType::MsgAppend => {
            let entries: Vec<Entry> = from.entries.iter().map(entry).collect();
            for append in split(Append { prev: index, prev_term: log_term, commit, entries }) {
                out.push(message(MessageBody::Append(append)));
            }
            return;
        }
        MessageType::MsgAppendResponse if from.reject => {
            MessageBody::AppendRefused { index, hint: Index(from.reject_hint), hint_term: log_term, commit }
        }
        MessageType::MsgAppendResponse => MessageBody::Appended { index, commit, room: None },
        MessageType::MsgRequestVote | MessageType::MsgRequestPreVote => MessageBody::Vote {
            pre: from.get_msg_type() == MessageType::MsgRequestPreVote,
            forced: from.context == FORCED,
            last: index,
            last_term: log_term,
            commit,
            commit_term,
        },
        MessageType::MsgRequestVoteResponse | MessageType::MsgRequestPreVoteResponse => MessageBody::Voted {
            pre: from.get_msg_type() == MessageType::MsgRequestPreVoteResponse,
            granted: !from.reject,
            commit,
            commit_term,
        },
        MessageType::MsgHeartbeat => MessageBody::Heartbeat { commit, round: round(&from.context) },
        MessageType::MsgHeartbeatResponse => MessageBody::HeartbeatDone { commit, round: round(&from.context), room: None },
        MessageType::MsgTimeoutNow => MessageBody::Campaign,
        MessageType::MsgSnapshot => match install(&from.take_snapshot()) {
            Some(install) => MessageBody::Install(install),
            None => unreachable!("a snapshot is made from an install"),
        },
        other => unreachable!("{other:?} never leaves: nothing is forwarded"),
    };
    out.push(Message { segment, from: MemberNo(from.from), to: MemberNo(from.to), term: Term(from.term), body });
}

fn split(append: Append) -> Vec<Append> {
    let (mut blocks, mut bytes) = (0, 0);
    let mut parts: Vec<Append> = Vec::with_capacity(1);
    let (mut prev, mut prev_term) = (append.prev, append.prev_term);
    for entry in append.entries {
        blocks += entry.payload_blocks;
        bytes += entry.encoded_len();
        let fits = blocks <= super::APPEND_BLOCKS_MAX && bytes <= BODY_MAX / 2;
        let (term, index) = (entry.term, entry.index);
        match parts.last_mut() {
            Some(part) if fits => part.entries.push(entry),
            _ => {
                (blocks, bytes) = (entry.payload_blocks, entry.encoded_len());
                parts.push(Append { prev, prev_term, commit: append.commit, entries: vec![entry] });
            }
        }
        (prev, prev_term) = (index, term);
    }
    if parts.is_empty() {
        parts.push(Append { prev, prev_term, commit: append.commit, entries: Vec::new() });
    }
    parts
}

/// A checked message as raft's. `None` for what raft has no word for.
pub(super) fn incoming(message: Message) -> Option<eraftpb::Message> {
    let mut to = eraftpb::Message { from: message.from.0, to: message.to.0, term: message.term.0, ..Default::default() };
    let kind = match message.body {
        MessageBody::Append(append) => {
            to.index = append.prev.0;
            to.log_term = append.prev_term.0;
            to.commit = append.commit.0;
            to.set_entries(append.entries.into_iter().map(raft_entry).collect::<Vec<_>>().into());
            MessageType::MsgAppend
        }
        MessageBody::Appended { index, commit, .. } => {
            to.index = index.0;
            to.commit = commit.0;
            MessageType::MsgAppendResponse
        }
        MessageBody::AppendRefused { index, hint, hint_term, commit } => {
            to.reject = true;
            to.index = index.0;
            to.reject_hint = hint.0;
            to.log_term = hint_term.0;
            to.commit = commit.0;
            MessageType::MsgAppendResponse
        }
        MessageBody::Vote { pre, forced, last, last_term, commit, commit_term } => {
            to.index = last.0;
            to.log_term = last_term.0;
            to.commit = commit.0;
            to.commit_term = commit_term.0;
            if forced {
                to.context = FORCED.into();
            }
            if pre { MessageType::MsgRequestPreVote } else { MessageType::MsgRequestVote }
        }
        MessageBody::Voted { pre, granted, commit, commit_term } => {
            to.reject = !granted;
            to.commit = commit.0;
            to.commit_term = commit_term.0;
            if pre { MessageType::MsgRequestPreVoteResponse } else { MessageType::MsgRequestVoteResponse }
        }
        MessageBody::Heartbeat { commit, round } => {
            to.commit = commit.0;
            to.context = round.map(round_bytes).unwrap_or_default().into();
            MessageType::MsgHeartbeat
        }
        MessageBody::HeartbeatDone { commit, round, .. } => {
            to.commit = commit.0;
            to.context = round.map(round_bytes).unwrap_or_default().into();
            MessageType::MsgHeartbeatResponse
        }
        MessageBody::Campaign => MessageType::MsgTimeoutNow,
        MessageBody::Install(install) => {
            to.set_snapshot(snapshot(&install));
            MessageType::MsgSnapshot
        }
        MessageBody::Sleep { .. } => return None,
    };
    to.set_msg_type(kind);
    Some(to)
}
