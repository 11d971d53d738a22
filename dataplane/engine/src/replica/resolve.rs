//! What to do with records that recovery could not judge, before the group is built: a table.
//!
//! Above what a stream knows durable, a bad record may be a tear, or the rot of one that was acknowledged and counted. So the member
//! asks the others, and neither votes nor campaigns meanwhile. Terms and votes are never among such records (they are sealed), so
//! the member's own term is known, and every entry that it can have acknowledged is of that term or an earlier one.
//!
//! Safe against answers that cross with late appends: a member that says "absent" counts towards dropping only if its term is
//! later than ours, for then it takes no append any more that could complete a quorum with the acknowledgement that we forgot;
//! or if everyone has answered, the leader of our term among them, who has the entry as long as it can count it.

use super::Recovered;
use penstock_wire::peer::{EntriesAnswer, EntryState, MemberNo};
use penstock_wire::{Index, Term};

/// What recovery could not judge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unknown {
    /// The first entry that is not known committed, even where the bad record's descriptors tell a later one: our own entries before that one
    /// may be of a leader that lost, and a copy behind them would be a log that nobody else has.
    pub first: Index,
    /// Terms of the member's own good entries from `first` on.
    pub own: Vec<Term>,
    /// The last one and its term, where the descriptors tell; `None` where not even they are whole: any entry from `first` on.
    pub last: Option<(Index, Term)>,
    /// The member's persisted term.
    pub term: Term,
}

/// What another member has said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    pub from: MemberNo,
    /// Votes in the group (those of learners count for nothing; a copy from one is as good as any).
    pub votes: bool,
    pub term: Term,
    pub leads: bool,
    /// Term of its entry at each index from `Unknown::first` on; `None` where it cannot judge its own log. Beyond the list: absent.
    pub has: Vec<Option<Term>>,
}

impl Answer {
    /// A whole answer of the wire (`more` is unset: cut ones are asked on).
    pub fn of(answer: &EntriesAnswer, votes: bool) -> Self {
        let has = answer
            .entries
            .iter()
            .map(|state| match state {
                EntryState::Whole(entry) => Some(entry.term),
                EntryState::Unknown => None,
            })
            .collect();
        Self { from: answer.from, votes, term: answer.term, leads: answer.leads, has }
    }

    /// Whole entries from the first unknown on, without a hole.
    fn whole(&self) -> usize {
        self.has.iter().take_while(|state| state.is_some()).count()
    }

    /// How much this log has, as elections compare logs.
    fn rank(&self) -> (Option<Term>, usize) {
        let whole = self.whole();
        (self.has[..whole].last().copied().flatten(), whole)
    }

    fn judges_all(&self) -> bool {
        self.whole() == self.has.len()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Take that member's whole entries from the first unknown on, `count` of them, in place of ours, and persist them; then build the group.
    Copy { from: MemberNo, count: usize },
    /// Nobody can have counted what is unknown: drop it, keep what is good, then build the group.
    Drop,
    /// Not enough is known. Ask those who have not answered, and again those whose answer may change.
    Wait,
}

/// Judges by what has been answered so far. `others`: voters besides this member; `quorum` of all voters.
pub fn judge(unknown: &Unknown, others: usize, quorum: usize, answers: &[Answer]) -> Verdict {
    // A leader of our term or a later one has everything that can have been counted with our help, or it was never counted.
    let leader = answers.iter().filter(|answer| answer.leads && answer.term >= unknown.term).max_by_key(|answer| answer.term);
    if let Some(leader) = leader
        && leader.judges_all()
    {
        return unknown.take(leader);
    }
    let voters = || answers.iter().filter(|answer| answer.votes);
    let judging = voters().filter(|answer| answer.judges_all()).count();
    let fenced = voters().filter(|answer| answer.judges_all() && answer.term > unknown.term).count();
    // Of a counted entry at least quorum - 1 others have a copy: so many answers contain one of them.
    let enough = others + 1 - quorum;
    if judging == others && voters().count() == others || fenced > enough {
        // The most up-to-date log of them has every entry that any quorum with us in it can have committed.
        return match answers.iter().max_by_key(|answer| answer.rank()) {
            Some(best) => unknown.take(best),
            None => Verdict::Drop,
        };
    }
    // With every other voter's answer in, those that cannot judge their own logs are all that is missing: nobody has a whole copy beyond
    // what is listed, so nothing better will come.
    if voters().count() == others {
        let best = answers.iter().max_by_key(|answer| answer.rank());
        return best.map_or(Verdict::Drop, |best| unknown.take(best));
    }
    // Where the entry is known one copy of that very entry settles it; another term's at its index would not.
    if let Some((last, term)) = unknown.last {
        let span = (last.0 + 1 - unknown.first.0) as usize;
        let copy = answers.iter().filter(|answer| answer.whole() >= span && answer.has[span - 1] == Some(term));
        if let Some(best) = copy.max_by_key(|answer| answer.rank()) {
            return unknown.take(best);
        }
    }
    Verdict::Wait
}

impl Unknown {
    /// What to ask about. `last`: the last unknown entry and its term, where the bad record's descriptors tell.
    pub fn of(recovered: &Recovered, last: Option<(Index, Term)>) -> Self {
        let own = recovered.unapplied().iter().map(|entry| entry.term).collect();
        Self { first: Index(recovered.applied.0 + 1), own, last, term: recovered.ballot.term }
    }

    /// That log, unless ours is as good.
    fn take(&self, answer: &Answer) -> Verdict {
        if answer.rank() > (self.own.last().copied(), self.own.len()) {
            Verdict::Copy { from: answer.from, count: answer.whole() }
        } else {
            Verdict::Drop
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(from: u64, term: u64, leads: bool, has: &[Option<u64>]) -> Answer {
        let has = has.iter().map(|term| term.map(Term)).collect();
        Answer { from: MemberNo(from), votes: true, term: Term(term), leads, has }
    }

    fn known() -> Unknown {
        Unknown { first: Index(9), own: vec![], last: Some((Index(10), Term(5))), term: Term(5) }
    }

    fn open_ended() -> Unknown {
        Unknown { last: None, ..known() }
    }

    fn copy(from: u64, count: usize) -> Verdict {
        Verdict::Copy { from: MemberNo(from), count }
    }

    const HAS: &[Option<u64>] = &[Some(5), Some(5)];
    const NONE: &[Option<u64>] = &[];
    const UNSURE: &[Option<u64>] = &[None];

    #[test]
    fn unknown_of_three_members_is_judged_as_the_table_says() {
        // answers, verdict when the entries are known, verdict when not even that
        let table = [
            (vec![], Verdict::Wait, Verdict::Wait),
            (vec![answer(2, 5, false, NONE)], Verdict::Wait, Verdict::Wait),
            // Absent from one at a later term: one of three is not more than N - quorum.
            (vec![answer(2, 6, false, NONE)], Verdict::Wait, Verdict::Wait),
            (vec![answer(2, 5, false, HAS)], copy(2, 2), Verdict::Wait),
            // Half of it is not a copy.
            (vec![answer(2, 5, false, &[Some(5)])], Verdict::Wait, Verdict::Wait),
            // Another term's entries at its indices are no copy.
            (vec![answer(2, 5, false, &[Some(4), Some(4)])], Verdict::Wait, Verdict::Wait),
            (vec![answer(2, 5, false, NONE), answer(3, 5, false, NONE)], Verdict::Drop, Verdict::Drop),
            (vec![answer(2, 5, false, NONE), answer(3, 5, false, HAS)], copy(3, 2), copy(3, 2)),
            (vec![answer(2, 5, false, UNSURE), answer(3, 5, false, NONE)], Verdict::Drop, Verdict::Drop),
            (vec![answer(2, 5, false, &[Some(5), None]), answer(3, 5, false, NONE)], copy(2, 1), copy(2, 1)),
            // The leader of our term or a later one answers for all; an earlier one's word is stale.
            (vec![answer(2, 5, true, NONE)], Verdict::Drop, Verdict::Drop),
            (vec![answer(2, 6, true, &[Some(5), Some(6), Some(6)])], copy(2, 3), copy(2, 3)),
            (vec![answer(2, 4, true, NONE)], Verdict::Wait, Verdict::Wait),
            // The later log has what was committed before it.
            (vec![answer(2, 6, false, &[Some(6)]), answer(3, 6, false, HAS)], copy(2, 1), copy(2, 1)),
        ];
        for (no, (answers, of_known, of_open)) in table.into_iter().enumerate() {
            assert_eq!(judge(&known(), 2, 2, &answers), of_known, "row {no}, known");
            assert_eq!(judge(&open_ended(), 2, 2, &answers), of_open, "row {no}, open-ended");
        }
    }

    #[test]
    fn absence_at_five_members_counts_only_from_a_later_term() {
        // The leader of term 5 (member 2) is cut off from us and still counts our acknowledgement: one of the three may yet take the
        // entry late, and with it the leader commits.
        let at = |term| vec![answer(3, term, false, NONE), answer(4, term, false, NONE), answer(5, term, false, NONE)];
        assert_eq!(judge(&known(), 4, 3, &at(5)), Verdict::Wait);
        assert_eq!(judge(&known(), 4, 3, &at(6)), Verdict::Drop);
        assert_eq!(judge(&known(), 4, 3, &at(6)[..2]), Verdict::Wait);
    }

    #[test]
    fn own_log_that_is_as_good_is_kept() {
        let unknown = Unknown { own: vec![Term(5), Term(5)], ..open_ended() };
        let answers = [answer(2, 5, false, HAS), answer(3, 5, false, NONE)];
        assert_eq!(judge(&unknown, 2, 2, &answers), Verdict::Drop);
        let stale = Unknown { own: vec![Term(4); 3], ..open_ended() };
        assert_eq!(judge(&stale, 2, 2, &answers), copy(2, 2), "what is unknown may have replaced it");
    }

    #[test]
    fn verdict_never_depends_on_the_order_of_answers() {
        let kinds = [NONE, HAS, UNSURE, &[Some(4)], &[Some(6)]];
        for a in kinds {
            for b in kinds {
                for leads in [false, true] {
                    for term in [5, 6] {
                        let (x, y) = (answer(2, term, leads, a), answer(3, 5, false, b));
                        let forward = judge(&known(), 2, 2, &[x.clone(), y.clone()]);
                        let backward = judge(&known(), 2, 2, &[y, x]);
                        let count = |verdict| if let Verdict::Copy { count, .. } = verdict { Some(count) } else { None };
                        assert_eq!(count(forward), count(backward), "{a:?} {b:?} {leads} {term}");
                        assert_eq!(forward == Verdict::Wait, backward == Verdict::Wait);
                    }
                }
            }
        }
    }
}
