//! The doubt of a member whose log may have been longer than what recovery found of it: a table.
//!
//! Above what a stream knows durable, a bad record may be a tear, or the rot of one that was acknowledged and counted. Terms and votes are never
//! among such records (they are sealed), so the member's own term is known, and every entry that it can have acknowledged is of that
//! term or an earlier one.
//!
//! So it takes part as if its log still ended where it may have ended, its **floor**: it votes only for candidates whose log is at least that
//! far, and does not campaign before its own is. That is what a member with the lost entries would do, so elections stay what they were;
//! and it acknowledges what it really has. It learns what is committed from appends alone, which show what stands before them: a heartbeat goes by
//! what was acknowledged. Where the descriptors of the bad record tell, the floor is its last entry. Where they do not, it is the end of
//! the longest log that its ballot allowed: only entries of a later term are beyond that.
//!
//! Raft itself then brings the entries back, and a leader of a later term ends every doubt. Until then others are asked for the end of
//! their logs, since without it a member in doubt is no help when the leader goes:
//!
//! | known | floor |
//! |---|---|
//! | a leader of our term or a later one, itself in no doubt | the end of its log: it has all that was counted, or it is never counted |
//! | all other voters, none in doubt; or more than N - quorum of them, none in doubt, of a later term than ours | the end of the best log |
//! | all other voters, some in doubt | the end of the best log: nobody has more |
//! | anything less | as it is |
//!
//! Safe against answers that cross with late appends: a member without an entry counts towards dropping it only if its term is later than
//! ours, for then it takes no append any more that could complete a quorum with the acknowledgement that we forgot; or if everyone has
//! answered, the leader of our term among them, who has the entry as long as it can count it.

use super::LogEnd;
use penstock_wire::peer::{EntriesAnswer, EntriesAsk, EntryState, MemberNo};
use penstock_wire::{Index, Term};

/// What a member says of itself to one that is in doubt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// Persisted.
    pub term: Term,
    pub leads: bool,
    pub end: LogEnd,
    /// It is in no doubt itself.
    pub sure: bool,
}

impl Standing {
    pub fn answer(&self, ask: &EntriesAsk) -> EntriesAnswer {
        let mut entries = Vec::new();
        if self.end.index.0 > 0 {
            entries.push(EntryState::Held(self.end.term));
        }
        if !self.sure {
            entries.push(EntryState::Unknown);
        }
        EntriesAnswer {
            id: ask.id,
            segment: ask.segment,
            from: ask.to,
            to: ask.from,
            term: self.term,
            leads: self.leads,
            more: false,
            first: self.end.index,
            entries,
        }
    }
}

/// What another member has said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer {
    pub from: MemberNo,
    /// Votes in the group; those of learners count for nothing.
    pub votes: bool,
    pub standing: Standing,
}

impl Answer {
    /// `None` for what does not say how a log ends.
    pub fn of(answer: &EntriesAnswer, votes: bool) -> Option<Self> {
        let (end, rest) = match &answer.entries[..] {
            [EntryState::Held(term), rest @ ..] if answer.first.0 > 0 => (LogEnd { term: *term, index: answer.first }, rest),
            rest if answer.first.0 == 0 => (LogEnd::default(), rest),
            _ => return None,
        };
        let sure = match rest {
            [] => true,
            [EntryState::Unknown] => false,
            _ => return None,
        };
        let standing = Standing { term: answer.term, leads: answer.leads, end, sure };
        (!answer.more).then_some(Self { from: answer.from, votes, standing })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// What is lost and may count is in a log that ends like this; if ours does too, nothing is lost.
    Floor(LogEnd),
    /// Not enough is known. Ask those who have not answered, and again those whose answer may change.
    Wait,
}

/// The floor of a member of whose lost entries nothing is known: only a later term is beyond what its ballot allowed.
pub fn unknown_floor(ballot: Term) -> LogEnd {
    LogEnd { term: Term(ballot.0 + 1), index: Index(0) }
}

/// Judges by what has been answered so far. `term`: the member's own, persisted, when it came to doubt. `others`: voters besides it; `quorum` of all voters.
pub fn judge(term: Term, others: usize, quorum: usize, answers: &[Answer]) -> Verdict {
    let leader = answers.iter().map(|answer| &answer.standing).filter(|it| it.leads && it.term >= term).max_by_key(|it| it.term);
    if let Some(leader) = leader.filter(|leader| leader.sure) {
        return Verdict::Floor(leader.end);
    }
    let voters = || answers.iter().filter(|answer| answer.votes).map(|answer| &answer.standing);
    let fenced = voters().filter(|it| it.sure && it.term > term).count();
    // Of a counted entry at least quorum - 1 others have a copy: so many answers contain one of them. With every other voter's answer in, those that
    // are in doubt themselves are all that is missing: nothing better will come.
    let enough = others + 1 - quorum;
    if voters().count() == others || fenced > enough {
        return Verdict::Floor(answers.iter().map(|answer| answer.standing.end).max().unwrap_or_default());
    }
    Verdict::Wait
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(term: u64, index: u64) -> LogEnd {
        LogEnd { term: Term(term), index: Index(index) }
    }

    fn answer(from: u64, term: u64, leads: bool, at: LogEnd, sure: bool) -> Answer {
        Answer { from: MemberNo(from), votes: true, standing: Standing { term: Term(term), leads, end: at, sure } }
    }

    fn floor(term: u64, index: u64) -> Verdict {
        Verdict::Floor(end(term, index))
    }

    #[test]
    fn doubt_of_three_members_is_judged_as_the_table_says() {
        let (short, long) = (end(5, 8), end(5, 10));
        let table = [
            (vec![], Verdict::Wait),
            (vec![answer(2, 5, false, short, true)], Verdict::Wait),
            // One of three at a later term is not more than N - quorum.
            (vec![answer(2, 6, false, short, true)], Verdict::Wait),
            (vec![answer(2, 5, false, long, true)], Verdict::Wait),
            (vec![answer(2, 5, false, short, true), answer(3, 5, false, short, true)], floor(5, 8)),
            (vec![answer(2, 5, false, short, true), answer(3, 5, false, long, true)], floor(5, 10)),
            (vec![answer(2, 5, false, short, false), answer(3, 5, false, short, true)], floor(5, 8)),
            (vec![answer(2, 5, false, long, false), answer(3, 5, false, short, true)], floor(5, 10)),
            // The leader of our term or a later one answers for all; an earlier one's word is stale, and one in doubt leads nobody.
            (vec![answer(2, 5, true, short, true)], floor(5, 8)),
            (vec![answer(2, 6, true, end(6, 9), true)], floor(6, 9)),
            (vec![answer(2, 4, true, short, true)], Verdict::Wait),
            (vec![answer(2, 6, true, short, false)], Verdict::Wait),
            // The later log has what was committed before it.
            (vec![answer(2, 6, false, end(6, 7), true), answer(3, 6, false, long, true)], floor(6, 7)),
        ];
        for (row, (answers, verdict)) in table.into_iter().enumerate() {
            assert_eq!(judge(Term(5), 2, 2, &answers), verdict, "row {row}");
            let backward: Vec<_> = answers.iter().rev().copied().collect();
            assert_eq!(judge(Term(5), 2, 2, &backward), verdict, "row {row}, the other way round");
        }
    }

    #[test]
    fn absence_at_five_members_counts_only_from_a_later_term() {
        // The leader of term 5 (member 2) is cut off from us and still counts our acknowledgement: one of the three may yet take the
        // entry late, and with it the leader commits.
        let at = |term| [3, 4, 5].map(|no| answer(no, term, false, end(5, 8), true));
        assert_eq!(judge(Term(5), 4, 3, &at(5)), Verdict::Wait);
        assert_eq!(judge(Term(5), 4, 3, &at(6)), floor(5, 8));
        assert_eq!(judge(Term(5), 4, 3, &at(6)[..2]), Verdict::Wait);
    }

    #[test]
    fn answer_says_how_a_log_ends_or_nothing() {
        let ask = EntriesAsk {
            id: 7,
            segment: penstock_wire::SegmentId([1; 16]),
            from: MemberNo(1),
            to: MemberNo(2),
            first: Index(1),
            last: Index(1),
        };
        for at in [end(0, 0), end(3, 9)] {
            for sure in [false, true] {
                let standing = Standing { term: Term(4), leads: false, end: at, sure };
                assert_eq!(Answer::of(&standing.answer(&ask), true), Some(Answer { from: MemberNo(2), votes: true, standing }));
            }
        }
        let good = Standing { term: Term(4), leads: true, end: end(3, 9), sure: true }.answer(&ask);
        let cut = EntriesAnswer { more: true, ..good.clone() };
        let none = EntriesAnswer { entries: vec![], ..good.clone() };
        let two = EntriesAnswer { entries: vec![EntryState::Held(Term(3)); 2], ..good };
        assert_eq!([cut, none, two].map(|answer| Answer::of(&answer, true)), [None; 3]);
    }
}
