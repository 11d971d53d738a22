//! Every message against the group's state, before raft sees it: crate `raft` panics on some that a faulty or forged sender can make.
//!
//! The codec has checked what a message says by itself (bounds, order, terms within it); this is what needs the group.

use super::LogEnd;
use super::log::LogStore;
use penstock_wire::peer::{MemberNo, Members, Message, MessageBody};
use penstock_wire::{Index, SegmentId, Term};
use raft::{RawNode, StateRole};
use thiserror::Error;

/// Why a message was not stepped. The group is as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum Refused {
    #[error("it is for another group or member")]
    NotOurs,
    #[error("its sender was removed from the group, for good")]
    RemovedSender,
    #[error("its sender answers, and is no member")]
    NoMember,
    #[error("it comes from a second leader of term {}: {} leads", term.0, leader.0)]
    SecondLeader { term: Term, leader: MemberNo },
    /// The leader counts on entries that this member acknowledged and does not have: the drive was wiped, restored, or lied. The
    /// replica must come back under a new id.
    #[error("it counts on entry {}, which this member acknowledged; its log ends at {}", commit.0, last.0)]
    PromiseLost { commit: Index, last: Index },
    #[error("it acknowledges entry {}; the log ends at {}", index.0, last.0)]
    BeyondLog { index: Index, last: Index },
    /// A late copy of an answer that has been overtaken (raft-rs #555).
    #[error("it refuses entry {}; its sender has acknowledged up to {}", index.0, matched.0)]
    Overtaken { index: Index, matched: Index },
    #[error("it replaces entry {}, which is committed", index.0)]
    ReplacesCommitted { index: Index },
    #[error("a vote is asked within one timeout of the restart: a lease may still hold")]
    JustRestarted,
    #[error("it tells to campaign and does not come from the leader of this term")]
    NotTheLeader,
    #[error("it tells to campaign, and a state is being installed")]
    Installing,
    #[error("its log ends at entry {} of term {}; ours may have ended at {} of term {}", theirs.index.0, theirs.term.0, floor.index.0, floor.term.0)]
    BelowFloor { theirs: LogEnd, floor: LogEnd },
    #[error("it tells to campaign, and our log may have been longer than it is")]
    InDoubt,
    #[error("the state to install does not have this member, or is older than what is here")]
    BadInstall,
    #[error("the group has stopped")]
    Stopped,
}

pub(super) struct Checker<'a> {
    pub segment: SegmentId,
    pub me: MemberNo,
    pub members: &'a Members,
    /// Within one election timeout of the opening.
    pub restarted: bool,
    pub floor: Option<LogEnd>,
}

impl Checker<'_> {
    pub fn check(&self, raw: &RawNode<LogStore>, message: &Message) -> Result<(), Refused> {
        let raft = &raw.raft;
        if message.segment != self.segment || message.to != self.me {
            return Err(Refused::NotOurs);
        }
        if self.members.was_removed(message.from) {
            return Err(Refused::RemovedSender);
        }
        let last = Index(raft.raft_log.last_index());
        let current = message.term.0 == raft.term;
        // A leader's word, of its own term.
        let leads = matches!(
            message.body,
            MessageBody::Append(_) | MessageBody::Heartbeat { .. } | MessageBody::Install(_) | MessageBody::Sleep { .. }
        );
        if leads && current && (raft.state == StateRole::Leader || raft.leader_id != 0 && raft.leader_id != message.from.0) {
            return Err(Refused::SecondLeader { term: message.term, leader: MemberNo(raft.leader_id) });
        }
        match &message.body {
            MessageBody::Heartbeat { commit, .. } if message.term.0 >= raft.term && *commit > last => {
                Err(Refused::PromiseLost { commit: *commit, last })
            }
            MessageBody::Append(append) if message.term.0 >= raft.term => {
                let committed = raft.raft_log.committed;
                if append.prev.0 < committed {
                    return Ok(()); // raft answers with what it has committed and takes nothing
                }
                let replaced = append.entries.iter().find(|entry| entry.index.0 <= committed);
                replaced.map_or(Ok(()), |entry| Err(Refused::ReplacesCommitted { index: entry.index }))
            }
            MessageBody::Appended { index, .. } => {
                self.member(raw, message.from)?;
                if current && raft.state == StateRole::Leader && *index > last {
                    return Err(Refused::BeyondLog { index: *index, last });
                }
                Ok(())
            }
            MessageBody::AppendRefused { index, .. } => {
                self.member(raw, message.from)?;
                let matched = Index(raft.prs().get(message.from.0).map_or(0, |progress| progress.matched));
                if current && raft.state == StateRole::Leader && *index <= matched {
                    return Err(Refused::Overtaken { index: *index, matched });
                }
                Ok(())
            }
            MessageBody::HeartbeatDone { .. } | MessageBody::Voted { .. } => self.member(raw, message.from),
            MessageBody::Vote { forced: false, .. } if self.restarted => Err(Refused::JustRestarted),
            MessageBody::Vote { last, last_term, .. }
                if self.floor.is_some_and(|floor| LogEnd { term: *last_term, index: *last } < floor) =>
            {
                let theirs = LogEnd { term: *last_term, index: *last };
                Err(Refused::BelowFloor { theirs, floor: self.floor.unwrap_or_default() })
            }
            MessageBody::Campaign if self.floor.is_some() => Err(Refused::InDoubt),
            MessageBody::Campaign if !current || raft.leader_id != message.from.0 => Err(Refused::NotTheLeader),
            MessageBody::Install(install) if message.term.0 >= raft.term => {
                if install.members.get(self.me).is_none() || install.members.next < self.members.next {
                    return Err(Refused::BadInstall);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn member(&self, raw: &RawNode<LogStore>, from: MemberNo) -> Result<(), Refused> {
        raw.raft.prs().get(from.0).map(|_| ()).ok_or(Refused::NoMember)
    }
}
