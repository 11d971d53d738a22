//! A member whose log may have been longer than what recovery found of it.

use super::*;

fn end(term: u64, index: u64) -> LogEnd {
    LogEnd { term: Term(term), index: Index(index) }
}

/// Member 1 of three, whose log ends at entry 2 of term 1 and may have ended at `floor`.
fn doubtful(floor: LogEnd) -> Group {
    let ballot = Ballot { term: Term(2), vote: MemberNo(0) };
    let mut group =
        Group::open(config(1), Recovered { ballot, entries: vec![entry(1, 1), entry(1, 2)], floor: Some(floor), ..fresh(3) }).unwrap();
    (0..20).for_each(|_| group.tick());
    group
}

#[test]
fn member_in_doubt_votes_for_no_log_below_its_floor() {
    let vote = |last: LogEnd| {
        let (last, last_term) = (last.index, last.term);
        message(2, 1, 3, MessageBody::Vote { pre: false, forced: false, last, last_term, commit: Index(0), commit_term: Term(0) })
    };
    let mut group = doubtful(end(2, 5));
    for candidate in [end(1, 2), end(1, 9), end(2, 4)] {
        let refused = group.step(vote(candidate));
        assert_eq!(refused, Err(Refused::BelowFloor { theirs: candidate, floor: end(2, 5) }));
    }
    let mut out = Output::default();
    group.step(vote(end(2, 5))).unwrap();
    group.settle(Millis(1), &mut out);
    assert_eq!(out.persist[0].ballot, Some(Ballot { term: Term(3), vote: MemberNo(2) }));
    assert!(!out.resolved);
}

#[test]
fn member_in_doubt_does_not_campaign() {
    let mut group = doubtful(end(2, 5));
    let mut out = Output::default();
    (0..100).for_each(|_| group.tick());
    group.settle(Millis(1), &mut out);
    assert_eq!((group.view().unwrap().part, out.send.len()), (Part::Follower, 0));
    group.step(message(2, 1, 2, append(2, 1, 0, vec![]))).unwrap();
    assert_eq!(group.step(message(2, 1, 2, MessageBody::Campaign)), Err(Refused::InDoubt));
}

#[test]
fn member_in_doubt_commits_nothing_on_a_heartbeat_alone() {
    // Its entry 2 is of a leader that lost; the one that replaced it was acknowledged and is gone.
    let mut group = doubtful(end(2, 3));
    let heartbeat = |commit| message(2, 1, 2, MessageBody::Heartbeat { commit: Index(commit), round: None });
    group.step(heartbeat(2)).unwrap();
    group.step(heartbeat(3)).unwrap();
    assert_eq!(group.view().unwrap().committed, Index(0));
    group.step(message(2, 1, 2, append(1, 1, 3, vec![entry(2, 2), entry(2, 3)]))).unwrap();
    assert_eq!(group.view().unwrap().committed, Index(3));
}

#[test]
fn doubt_ends_when_the_log_is_durably_as_far_again() {
    let mut group = doubtful(end(2, 4));
    let mut out = Output::default();
    group.step(message(2, 1, 2, append(2, 1, 0, vec![entry(2, 3), entry(2, 4)]))).unwrap();
    group.settle(Millis(1), &mut out);
    assert_eq!((group.floor(), out.resolved), (Some(end(2, 4)), false), "not durable yet");
    let mark = out.persist.last().unwrap().mark;
    out.clear();
    group.on_persisted(mark);
    group.settle(Millis(1), &mut out);
    assert_eq!((group.floor(), out.resolved), (None, true));
}

#[test]
fn doubt_ends_when_the_others_have_nothing_more() {
    let mut group = doubtful(resolve::unknown_floor(Term(2)));
    let mut out = Output::default();
    group.lower_floor(end(2, 7));
    assert_eq!(group.floor(), Some(end(2, 7)));
    group.lower_floor(end(2, 9));
    assert_eq!(group.floor(), Some(end(2, 7)), "it never rises");
    group.lower_floor(end(1, 2));
    group.settle(Millis(1), &mut out);
    assert_eq!((group.floor(), out.resolved), (None, true));
    out.clear();
    group.settle(Millis(1), &mut out);
    assert!(!out.resolved, "it is said once");
}

#[test]
fn member_in_doubt_answers_that_it_is() {
    let standing = doubtful(end(2, 4)).standing().unwrap();
    assert_eq!(standing, resolve::Standing { term: Term(2), leads: false, end: end(1, 2), sure: false });
}

#[test]
fn log_that_is_as_far_as_it_may_have_been_is_in_no_doubt() {
    for floor in [end(1, 2), end(1, 1), end(0, 0)] {
        assert_eq!(doubtful(floor).floor(), None);
    }
}
