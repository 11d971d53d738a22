//! Who is right: the rule alone.

use penstock_wire::Index;
use penstock_wire::peer::MemberNo;

/// An extent is this from one entry to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Said {
    pub since: Index,
    pub as_of: Index,
    pub digest: u32,
}

impl Said {
    /// As of some entry both are known.
    fn meets(self, other: Self) -> bool {
        self.since.max(other.since) <= self.as_of.min(other.as_of)
    }

    /// As of some entry both are known, and not the same.
    pub fn contradicts(self, other: Self) -> bool {
        self.meets(other) && self.digest != other.digest
    }
}

/// What comes of comparing an extent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// Nobody else tells anything as of an entry that is known here.
    Alone,
    Same,
    /// It differs from what others have, and is what most have.
    Others,
    /// Most have another, these among them: it is to be copied from one of them.
    Ours(Vec<MemberNo>),
    /// It differs, and no majority of at least three has one thing, of so many others that tell something as of an entry that is known here.
    Open(usize),
}

/// Judges what is here of an extent by what others say. `None`: what is here is known to be lost, and who is as of the newest entry is right unless others say
/// otherwise of that.
pub(super) fn judge(own: Option<Said>, others: &[(MemberNo, Said)]) -> Verdict {
    let Some(known) = own.or(others.iter().map(|(_, other)| *other).max_by_key(|other| other.as_of)) else { return Verdict::Alone };
    let others: Vec<_> = others.iter().filter(|(_, other)| known.meets(*other)).collect();
    let who_say = |digest: u32| others.iter().filter(move |(_, other)| other.digest == digest).map(|(no, _)| *no);
    let count = others.len() + usize::from(own.is_some());
    let least = if own.is_some() { 3 } else { 1 };
    let mine = own.map(|own| own.digest);
    let voices = |digest: u32| who_say(digest).count() + usize::from(mine == Some(digest));
    let is_most = |digest: &u32| count >= least && voices(*digest) * 2 > count;
    if others.is_empty() {
        return Verdict::Alone;
    }
    if others.iter().all(|(_, other)| Some(other.digest) == mine) {
        return Verdict::Same;
    }
    match others.iter().map(|(_, other)| other.digest).chain(mine).find(is_most) {
        None => Verdict::Open(others.len()),
        Some(digest) if Some(digest) == mine => Verdict::Others,
        Some(digest) => Verdict::Ours(who_say(digest).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said((since, as_of, digest): (u64, u64, u32)) -> Said {
        Said { since: Index(since), as_of: Index(as_of), digest }
    }

    fn verdict(own: Option<(u64, u64, u32)>, others: &[(u64, u64, u32)]) -> Verdict {
        let others: Vec<_> = (2..).zip(others).map(|(no, other)| (MemberNo(no), said(*other))).collect();
        judge(own.map(said), &others)
    }

    #[test]
    fn minority_of_three_is_ours_or_anothers() {
        let (good, bad) = ((5, 9, 1), (5, 9, 2));
        assert_eq!(verdict(Some(good), &[good, good]), Verdict::Same);
        assert_eq!(verdict(Some(bad), &[good, good]), Verdict::Ours(vec![MemberNo(2), MemberNo(3)]));
        assert_eq!(verdict(Some(good), &[bad, good]), Verdict::Others);
        assert_eq!(verdict(Some(good), &[bad, (5, 9, 3)]), Verdict::Open(2));
    }

    #[test]
    fn two_that_differ_are_not_decided() {
        assert_eq!(verdict(Some((5, 9, 1)), &[(5, 9, 2)]), Verdict::Open(1));
        assert_eq!(verdict(Some((5, 9, 1)), &[(5, 9, 1)]), Verdict::Same);
        assert_eq!(verdict(Some((5, 9, 1)), &[(5, 9, 2), (5, 9, 2), (5, 9, 1)]), Verdict::Open(3));
    }

    #[test]
    fn what_has_no_entry_in_common_is_not_compared() {
        assert_eq!(verdict(Some((5, 9, 1)), &[(10, 12, 2), (10, 12, 2)]), Verdict::Alone);
        assert_eq!(verdict(Some((10, 12, 1)), &[(5, 9, 2), (9, 10, 1)]), Verdict::Same);
        assert_eq!(verdict(Some((5, 12, 1)), &[(5, 9, 2), (2, 4, 1)]), Verdict::Open(1), "one of them is of another time");
        assert_eq!(verdict(Some((0, 9, 1)), &[(9, 12, 2), (0, 9, 2)]), Verdict::Ours(vec![MemberNo(2), MemberNo(3)]));
    }

    #[test]
    fn what_is_lost_here_is_whatever_others_agree_on() {
        assert_eq!(verdict(None, &[]), Verdict::Alone);
        assert_eq!(verdict(None, &[(5, 9, 1)]), Verdict::Ours(vec![MemberNo(2)]));
        assert_eq!(verdict(None, &[(5, 9, 1), (5, 9, 2)]), Verdict::Open(2));
        assert_eq!(verdict(None, &[(5, 9, 1), (10, 12, 2)]), Verdict::Ours(vec![MemberNo(3)]), "the other is of another time");
    }

    proptest! {
        /// Members say what one history says of the entries between which they stand, but for one.
        #[test]
        fn members_that_tell_the_truth_never_differ_and_one_that_does_not_is_alone_at_fault(
            changes in proptest::collection::vec(1u64..4, 1..8),
            stands in proptest::collection::vec((any::<prop::sample::Index>(), 0u64..4), 3..6),
            liar in proptest::option::of(any::<prop::sample::Index>()),
        ) {
            // The extent is `at` from the entry at which it changed for the at-th time.
            let begins: Vec<u64> = changes.iter().scan(0, |at, step| { *at += step; Some(*at) }).collect();
            let of = |(which, more): &(prop::sample::Index, u64)| {
                let at = which.index(begins.len());
                let end = begins.get(at + 1).map_or(begins[at] + more, |next| next - 1).min(begins[at] + more);
                (begins[at], end, at as u32)
            };
            let mut all: Vec<_> = stands.iter().map(of).collect();
            let liar = liar.map(|which| which.index(all.len()));
            liar.into_iter().for_each(|at| all[at].2 = 99);
            for me in 0..all.len() {
                let others: Vec<_> = (0..all.len()).filter(|at| *at != me).map(|at| (MemberNo(at as u64), said(all[at]))).collect();
                let is_near = |at: &usize| *at != me && said(all[me]).meets(said(all[*at]));
                let near: Vec<usize> = (0..all.len()).filter(is_near).collect();
                let expected = match liar {
                    _ if near.is_empty() => Verdict::Alone,
                    Some(at) if at == me && near.len() > 1 => Verdict::Ours(near.iter().map(|at| MemberNo(*at as u64)).collect()),
                    Some(at) if at == me => Verdict::Open(near.len()),
                    Some(at) if near.contains(&at) && near.len() > 1 => Verdict::Others,
                    Some(at) if near.contains(&at) => Verdict::Open(near.len()),
                    _ => Verdict::Same,
                };
                // Two that stand at different entries may both meet a liar that claims to be as of both.
                let split = liar == Some(me) && near.iter().any(|at| all[*at].2 != all[near[0]].2);
                if !split {
                    prop_assert_eq!(judge(Some(said(all[me])), &others), expected);
                }
            }
        }
    }
}
