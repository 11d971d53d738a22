//! A member in doubt asks the others how their logs end, and lowers its floor by what they say. What a floor is, and the judgement, is
//! [`crate::replica::resolve`]'s; how doubt comes about is `rejoin`'s. Here: when to ask, whom, and whose answer counts.

use crate::member::Member;
use crate::port::*;
use crate::replica::resolve::{Answer, Verdict, judge};
use crate::replica::{Group, LogEnd};
use crate::store::Store;
use penstock_wire::peer::{EntriesAnswer, EntriesAsk, EntryKind, Members};
use penstock_wire::{Index, NodeId, Term};

/// Between two rounds of asking.
const ASK_MS: u64 = 100;

/// What a member in doubt has been told.
#[derive(Debug)]
pub(crate) struct Doubts {
    /// Its own term when it came to doubt.
    pub term: Term,
    answers: Vec<Answer>,
    asked: Option<Millis>,
}

impl Doubts {
    pub fn new(term: Term) -> Self {
        Self { term, answers: Vec::new(), asked: None }
    }
}

/// The newest membership that the log has, committed or not.
pub(crate) fn newest_members(member: &Member) -> Members {
    let change = member.log.iter().rev().find(|logged| logged.entry.kind == EntryKind::Members);
    let newest = change.and_then(|logged| Members::decode(&logged.entry.bytes).ok()).filter(|members| !members.precedes(&member.members));
    newest.unwrap_or_else(|| member.members.clone())
}

impl Store {
    /// Asks for every member in doubt whose time it is.
    pub(crate) fn ask_in_doubt(&mut self, fx: &mut Effects) {
        if self.groups.doubtful.is_empty() {
            return;
        }
        let now = self.now;
        let mut doubtful = std::mem::take(&mut self.groups.doubtful);
        doubtful.retain(|no| self.member(*no).is_some_and(|member| member.doubts.is_some()));
        for no in &doubtful {
            let segment = self.map.get(*no).map(|replica| replica.shape.segment).expect("a member's replica stands");
            let member = self.member_mut(*no).expect("just seen");
            let doubts = member.doubts.as_mut().expect("just seen");
            if doubts.asked.is_some_and(|asked| now.0 < asked.0 + ASK_MS) {
                continue;
            }
            doubts.asked = Some(now);
            let (id, from, last) = (doubts.term.0, member.me, Index(member.last().0 + 1));
            let others = newest_members(member);
            others.list.iter().filter(|other| other.no != from).for_each(|other| member.meet(other.no, other.node));
            for other in others.list.iter().map(|other| other.no).filter(|other| *other != from) {
                let ask = EntriesAsk { id, segment, from, to: other, first: last, last };
                self.send_word(*no, other, PeerWord::EntriesAsk(ask), fx);
            }
        }
        self.groups.doubtful = doubtful;
    }

    /// A member in doubt asks how our log ends. In doubt ourselves we say that, too.
    pub(crate) fn on_entries_ask(&mut self, from: NodeId, ask: &EntriesAsk, fx: &mut Effects) {
        let Some(no) = self.map.by_segment(ask.segment) else { return };
        let Some(member) = self.member(no).filter(|member| member.me == ask.to && member.node_of(ask.from) == Some(from)) else { return };
        if !member.speaks() {
            return;
        }
        if let Some(standing) = member.group().and_then(Group::standing) {
            self.send_word(no, ask.from, PeerWord::EntriesAnswer(standing.answer(ask)), fx);
        }
    }

    pub(crate) fn on_entries_answer(&mut self, from: NodeId, answer: &EntriesAnswer) {
        let Some(no) = self.map.by_segment(answer.segment) else { return };
        let Some(member) = self.member_mut(no).filter(|member| member.me == answer.to && member.node_of(answer.from) == Some(from)) else {
            return;
        };
        let (me, members) = (member.me, newest_members(member));
        let Some(doubts) = member.doubts.as_mut().filter(|doubts| doubts.term.0 == answer.id) else { return };
        let votes = members.get(answer.from).is_some_and(|other| other.role.votes());
        let Some(answer) = Answer::of(answer, votes) else { return };
        doubts.answers.retain(|other| other.from != answer.from);
        doubts.answers.push(answer);
        let voters = members.voters().count();
        let others = members.voters().filter(|other| *other != me).count();
        let verdict = judge(doubts.term, others, voters / 2 + 1, &doubts.answers);
        if let Verdict::Floor(end) = verdict {
            self.lower_floor(no, end);
        }
    }

    fn lower_floor(&mut self, no: ReplicaNo, to: LogEnd) {
        if let Some(group) = self.member_mut(no).and_then(Member::group_mut) {
            group.lower_floor(to);
            self.touch(no);
        }
    }
}
