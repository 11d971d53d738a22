//! The pitfalls that others met (RAFT rules), one test each, over a few members joined by queues. Faults by the thousand are the
//! cluster simulator's.

mod doubt;
mod unsent;

use super::*;
use penstock_wire::batch::{ENTRY_HEAD, Section};
use penstock_wire::peer::{Append, EntryKind, Member, MessageBody, Role, Round, Verified};
use penstock_wire::{NodeId, ReplicaId};
use raft::Storage;

const SEGMENT: SegmentId = SegmentId([1; 16]);

fn timing() -> Timing {
    Timing { election: 8, heartbeat: 2, stride: 2, tick: 25, sleep: None, aside: None, lease: true }
}

fn member(no: u64, role: Role) -> Member {
    Member { no: MemberNo(no), role, replica: ReplicaId([no as u8; 16]), node: NodeId([no as u8; 16]) }
}

fn members(count: u64) -> Members {
    Members { next: MemberNo(count + 1), list: (1..=count).map(|no| member(no, Role::Voter)).collect() }
}

fn fresh(count: u64) -> Recovered {
    let (ballot, members, none) = (Ballot::default(), members(count), (Index(0), Term(0)));
    let (start, start_term) = none;
    let (applied, applied_term, committed) = (start, start_term, start);
    Recovered { ballot, start, start_term, applied, applied_term, members, entries: vec![], committed, floor: None }
}

fn config(me: u64) -> GroupConfig {
    GroupConfig { segment: SEGMENT, me: MemberNo(me), timing: timing(), canary: None }
}

fn ops(value: u32) -> Vec<u8> {
    let mut section = Section::default();
    section.entry(0, Term(0), Index(0));
    section.zero(7, value);
    section.bytes()[ENTRY_HEAD..].to_vec()
}

fn message(from: u64, to: u64, term: u64, body: MessageBody) -> Verified {
    Verified::bare(Message { segment: SEGMENT, from: MemberNo(from), to: MemberNo(to), term: Term(term), body }).unwrap()
}

fn entry(term: u64, index: u64) -> Entry {
    Entry { term: Term(term), index: Index(index), kind: EntryKind::Ops, bytes: ops(index as u32), payload_blocks: 0 }
}

fn append(prev: u64, prev_term: u64, commit: u64, entries: Vec<Entry>) -> MessageBody {
    MessageBody::Append(Append { prev: Index(prev), prev_term: Term(prev_term), commit: Index(commit), entries })
}

/// Members joined by queues that deliver at once, drives that persist when they are told to.
struct Bench {
    groups: Vec<Group>,
    now: u64,
    /// Persists that are out, by member.
    out: Vec<Vec<Persist>>,
    /// Whether a member's drive persists at once.
    fast: Vec<bool>,
    /// Whether a member is reached.
    linked: Vec<bool>,
    applied: Vec<Vec<Index>>,
    reads: Vec<Vec<u64>>,
    refused: Vec<Vec<u64>>,
    sent: Vec<Message>,
}

impl Bench {
    fn new(count: u64) -> Self {
        Self::of((1..=count).map(|me| Group::open(config(me), fresh(count)).unwrap()).collect())
    }

    fn of(groups: Vec<Group>) -> Self {
        let n = groups.len();
        Self {
            groups,
            now: 1000,
            out: vec![vec![]; n],
            fast: vec![true; n],
            linked: vec![true; n],
            applied: vec![vec![]; n],
            reads: vec![vec![]; n],
            refused: vec![vec![]; n],
            sent: vec![],
        }
    }

    /// Carries everything out until nothing is left to do.
    fn run(&mut self) {
        for _ in 0..200 {
            let mut mail = Vec::new();
            let mut busy = false;
            for at in 0..self.groups.len() {
                let mut out = Output::default();
                self.groups[at].settle(Millis(self.now), &mut out);
                busy |= !out.persist.is_empty();
                self.out[at].append(&mut out.persist);
                if self.fast[at] {
                    self.persist(at);
                }
                // Without the entries that terms begin with.
                self.applied[at].extend(out.apply.iter().filter(|entry| !entry.bytes.is_empty()).map(|entry| entry.index));
                self.reads[at].append(&mut out.reads);
                self.refused[at].append(&mut out.reads_refused);
                self.sent.extend(out.send.iter().cloned());
                if self.linked[at] {
                    mail.append(&mut out.send);
                }
            }
            if mail.is_empty() && !busy {
                return;
            }
            for message in mail {
                let to = message.to.0 as usize - 1;
                if to < self.groups.len() && self.linked[to] {
                    let _ = self.groups[to].step(Verified::bare(message).unwrap());
                }
            }
        }
        panic!("200 turns and still something to say");
    }

    fn persist(&mut self, at: usize) {
        if let Some(last) = self.out[at].last() {
            self.groups[at].on_persisted(last.mark);
        }
        self.out[at].clear();
    }

    fn tick(&mut self, ticks: u64) {
        for _ in 0..ticks {
            self.now += 25;
            self.groups.iter_mut().for_each(Group::tick);
            self.run();
        }
    }

    fn view(&self, at: usize) -> GroupView {
        self.groups[at].view().unwrap_or_else(|| panic!("group {at} stopped: {:?}", self.groups[at].stopped()))
    }

    /// Ticks until a linked member leads, and gives it.
    fn leader(&mut self) -> usize {
        for _ in 0..60 {
            if let Some(at) = (0..self.groups.len()).find(|at| self.linked[*at] && self.view(*at).part == Part::Leader) {
                return at;
            }
            self.tick(1);
        }
        panic!("nobody leads after 60 ticks");
    }

    fn propose(&mut self, at: usize, value: u32) -> Index {
        let term = self.view(at).term;
        let index = self.groups[at].propose(term, ops(value)).unwrap();
        self.run();
        index
    }

    fn other(&self, at: usize) -> usize {
        (at + 1) % self.groups.len()
    }
}

#[test]
fn three_members_elect_a_leader_and_apply_the_same() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    let index = bench.propose(leader, 5);
    bench.tick(3);
    assert!((0..3).all(|at| bench.applied[at] == [index]), "{:?}", bench.applied);
    assert!((0..3).all(|at| bench.view(at).leader.0 as usize == leader + 1));
}

#[test]
fn the_same_inputs_elect_the_same_leader_every_time() {
    // Raft draws its timeouts at random; ours replace them.
    let run = || {
        let mut bench = Bench::new(5);
        let leader = bench.leader();
        bench.linked[leader] = false;
        let second = bench.leader();
        (leader, second, bench.now, bench.sent.len())
    };
    let first = run();
    for _ in 0..10 {
        assert_eq!(run(), first);
    }
}

#[test]
fn follower_answers_only_after_its_write_is_durable() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    let follower = bench.other(leader);
    bench.fast[follower] = false;
    bench.sent.clear();
    let index = bench.propose(leader, 5);
    let answered = |bench: &Bench| {
        bench.sent.iter().any(|message| {
            message.from.0 as usize == follower + 1 && matches!(message.body, MessageBody::Appended { index: of, .. } if of == index)
        })
    };
    assert!(!answered(&bench));
    bench.persist(follower);
    bench.run();
    assert!(answered(&bench));
}

#[test]
fn leader_sends_before_it_persists_and_counts_itself_only_after() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    let (a, b) = (bench.other(leader), bench.other(bench.other(leader)));
    bench.fast[leader] = false;
    bench.linked[b] = false;
    let index = bench.propose(leader, 5);
    assert_eq!(bench.view(a).last, index, "it was sent");
    assert!(bench.view(leader).committed < index, "one copy of three is durable");
    bench.persist(leader);
    bench.run();
    assert_eq!(bench.view(leader).committed, index);
}

#[test]
fn leader_applies_nothing_that_is_not_persisted_here() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    bench.fast[leader] = false;
    let index = bench.propose(leader, 5);
    let view = bench.view(leader);
    assert_eq!((view.committed, view.applied), (index, Index(index.0 - 1)), "both others hold it");
    assert!(bench.applied[leader].is_empty());
    bench.persist(leader);
    bench.run();
    assert_eq!(bench.applied[leader], [index]);
}

#[test]
fn sole_voter_commits_only_what_is_persisted() {
    let mut bench = Bench::new(1);
    bench.fast[0] = false;
    bench.tick(20);
    assert_eq!(bench.view(0).committed, Index(0), "its own vote and first entry are not durable");
    bench.persist(0);
    bench.run();
    bench.persist(0);
    bench.run();
    let index = bench.propose(0, 5);
    assert!(bench.view(0).committed < index);
    bench.persist(0);
    bench.run();
    assert_eq!((bench.view(0).committed, &bench.applied[0][..]), (index, &[index][..]));
}

#[test]
fn sole_voter_tells_its_learner_nothing_of_a_term_that_is_not_durable() {
    let list = vec![member(1, Role::Voter), member(2, Role::Learner)];
    let from = Recovered { members: Members { next: MemberNo(3), list }, ..fresh(1) };
    let mut bench = Bench::of(vec![Group::open(config(1), from.clone()).unwrap(), Group::open(config(2), from).unwrap()]);
    bench.fast[0] = false;
    bench.tick(20);
    assert_eq!(bench.view(0).part, Part::Leader);
    assert_eq!(bench.view(1).term, Term(0), "a crash now would let it give out the same term twice");
    bench.persist(0);
    bench.run();
    assert_eq!(bench.view(1).term, Term(1));
}

#[test]
fn vote_is_spoken_only_after_it_is_persisted() {
    let mut group = Group::open(config(2), fresh(3)).unwrap();
    (0..8).for_each(|_| group.tick());
    let ask = MessageBody::Vote { pre: false, forced: false, last: Index(0), last_term: Term(0), commit: Index(0), commit_term: Term(0) };
    group.step(message(3, 2, 5, ask)).unwrap();
    let mut out = Output::default();
    group.settle(Millis(0), &mut out);
    assert!(out.send.is_empty());
    assert_eq!(out.persist[0].ballot, Some(Ballot { term: Term(5), vote: MemberNo(3) }));
    let mark = out.persist[0].mark;
    out.clear();
    group.on_persisted(mark);
    group.settle(Millis(0), &mut out);
    assert!(matches!(out.send[..], [Message { body: MessageBody::Voted { granted: true, .. }, .. }]));
}

#[test]
fn marks_that_complete_out_of_order_are_retired_in_order() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    bench.fast = vec![false; 3];
    let (_, b) = (bench.propose(leader, 5), bench.propose(leader, 6));
    let follower = bench.other(leader);
    let marks: Vec<_> = bench.out[follower].iter().map(|persist| persist.mark).collect();
    assert!(marks.len() >= 2 && marks.windows(2).all(|pair| pair[0] < pair[1]), "{marks:?}");
    // Telling the first alone acknowledges no more than it: the second is not durable.
    bench.groups[follower].on_persisted(marks[0]);
    bench.run();
    assert!(bench.view(follower).persisted < b);
}

#[test]
fn failed_persist_stops_the_group_for_good() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    bench.fast[leader] = false;
    bench.propose(leader, 5);
    bench.groups[leader].on_persist_failed();
    let mut out = Output::default();
    bench.groups[leader].on_persisted(Mark(u64::MAX));
    bench.groups[leader].settle(Millis(0), &mut out);
    assert!(out.send.is_empty() && out.apply.is_empty());
    assert_eq!(bench.groups[leader].stopped(), Some(&Stop::PersistFailed));
}

#[test]
fn restarted_member_withholds_its_vote_for_one_timeout() {
    let mut group = Group::open(config(1), fresh(3)).unwrap();
    let ask = MessageBody::Vote { pre: true, forced: false, last: Index(9), last_term: Term(4), commit: Index(0), commit_term: Term(0) };
    assert_eq!(group.step(message(2, 1, 5, ask.clone())), Err(Refused::JustRestarted));
    (0..8).for_each(|_| group.tick());
    assert_eq!(group.step(message(2, 1, 5, ask)), Ok(()));
}

#[test]
fn proposal_of_another_term_or_at_a_follower_is_refused() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    let term = bench.view(leader).term;
    let follower = bench.other(leader);
    assert_eq!(bench.groups[follower].propose(term, ops(1)), Err(ProposeError::NotLeader), "nothing is forwarded");
    assert_eq!(bench.groups[leader].propose(Term(term.0 - 1), ops(1)), Err(ProposeError::NotLeader), "a ghost of an earlier term");
    assert_eq!(bench.groups[leader].propose(term, vec![]), Err(ProposeError::Invalid));
}

#[test]
fn reads_of_a_turn_share_one_round_and_wait_for_a_quorum() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    bench.tick(2);
    bench.sent.clear();
    bench.groups[leader].read(1);
    bench.groups[leader].read(2);
    bench.run();
    assert_eq!(bench.reads[leader], [1, 2]);
    let rounds: std::collections::BTreeSet<Round> = bench
        .sent
        .iter()
        .filter_map(|message| if let MessageBody::Heartbeat { round, .. } = message.body { round } else { None })
        .collect();
    assert_eq!(rounds.len(), 1);
    bench.linked = vec![false; 3];
    bench.groups[leader].read(3);
    bench.run();
    assert_eq!(bench.reads[leader], [1, 2], "nobody answers");
    bench.tick(20);
    assert_eq!(bench.refused[leader], [3], "it has stepped down");
}

#[test]
fn rounds_are_never_numbered_twice() {
    let mut rounds = rounds::Rounds::default();
    let seen: std::collections::BTreeSet<_> = (0..8)
        .map(|read| {
            rounds.read(read);
            rounds.begin(Term(1), Millis(0), false).unwrap()
        })
        .collect();
    assert_eq!(seen.len(), 8);
}

#[test]
fn lease_runs_from_when_the_round_was_sent() {
    let mut rounds = rounds::Rounds::default();
    rounds.read(1);
    let round = rounds.begin(Term(3), Millis(100), false).unwrap();
    rounds.answered(round, 0, &timing(), Millis(250), false, false);
    // 0.8 of 8 ticks of 25 ms, less one.
    assert!(rounds.lease_holds(Term(3), Millis(258)) && !rounds.lease_holds(Term(3), Millis(259)));
    assert!(!rounds.lease_holds(Term(4), Millis(101)));
}

#[test]
fn term_in_which_a_transfer_began_has_no_lease_any_more() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    bench.tick(3);
    assert!(bench.groups[leader].may_read(Millis(bench.now)));
    let to = bench.other(leader);
    bench.linked[to] = false;
    bench.groups[leader].transfer(MemberNo(to as u64 + 1));
    assert!(!bench.groups[leader].may_read(Millis(bench.now)));
    bench.run();
    // The transfer is given up after a timeout, but who was told to campaign may still do so.
    bench.tick(12);
    assert_eq!(bench.view(leader).part, Part::Leader);
    assert!(bench.propose(leader, 1).0 > 0, "it takes proposals again");
    assert!(!bench.groups[leader].may_read(Millis(bench.now)));
}

#[test]
fn transferred_leadership_moves_to_the_member_that_was_named() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    let to = bench.other(leader);
    bench.groups[leader].transfer(MemberNo(to as u64 + 1));
    bench.run();
    assert_eq!(bench.view(to).part, Part::Leader);
    let index = bench.propose(to, 9);
    bench.tick(2);
    assert!(bench.applied.iter().all(|applied| applied.last() == Some(&index)));
}

#[test]
fn cut_off_leader_steps_down_and_the_rest_elect_another() {
    // Pre-vote and check-quorum together: the one cut off neither leads on nor raises the term.
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    let term = bench.view(leader).term;
    bench.linked[leader] = false;
    let second = bench.leader();
    bench.tick(30);
    assert_ne!(bench.view(leader).part, Part::Leader);
    assert_eq!(bench.view(leader).term, term);
    bench.linked[leader] = true;
    bench.tick(10);
    assert_eq!(bench.view(second).part, Part::Leader, "its return disturbs nobody");
}

#[test]
fn heartbeat_beyond_the_log_is_a_lost_promise_and_not_a_panic() {
    let mut group = Group::open(config(1), fresh(3)).unwrap();
    let beat = MessageBody::Heartbeat { commit: Index(9), round: None };
    assert_eq!(group.step(message(2, 1, 5, beat)), Err(Refused::PromiseLost { commit: Index(9), last: Index(0) }));
    assert_eq!(group.stopped(), None);
}

#[test]
fn second_leader_of_a_term_is_refused() {
    let mut group = Group::open(config(1), fresh(3)).unwrap();
    group.step(message(2, 1, 5, append(0, 0, 0, vec![]))).unwrap();
    let refused = Refused::SecondLeader { term: Term(5), leader: MemberNo(2) };
    assert_eq!(group.step(message(3, 1, 5, append(0, 0, 0, vec![]))), Err(refused));
    assert_eq!(group.step(message(3, 1, 6, append(0, 0, 0, vec![]))), Ok(()));
}

#[test]
fn removed_member_or_stranger_is_not_heard() {
    let list = vec![member(1, Role::Voter), member(3, Role::Voter)];
    let from = Recovered { members: Members { next: MemberNo(4), list }, ..fresh(3) };
    let mut group = Group::open(config(1), from).unwrap();
    let beat = || MessageBody::Heartbeat { commit: Index(0), round: None };
    assert_eq!(group.step(message(2, 1, 5, beat())), Err(Refused::RemovedSender));
    assert_eq!(
        group.step(message(9, 1, 5, MessageBody::HeartbeatDone { commit: Index(0), round: None, room: None })),
        Err(Refused::NoMember)
    );
    assert_eq!(group.step(message(9, 1, 5, beat())), Ok(()), "one that joined while this member was behind");
    assert_eq!(group.step(message(3, 2, 5, beat())), Err(Refused::NotOurs));
}

#[test]
fn told_to_campaign_by_anyone_but_the_leader_it_stays() {
    let mut group = Group::open(config(1), fresh(3)).unwrap();
    group.step(message(2, 1, 5, append(0, 0, 0, vec![]))).unwrap();
    assert_eq!(group.step(message(3, 1, 5, MessageBody::Campaign)), Err(Refused::NotTheLeader));
    assert_eq!(group.step(message(2, 1, 4, MessageBody::Campaign)), Err(Refused::NotTheLeader));
    assert_eq!(group.step(message(2, 1, 5, MessageBody::Campaign)), Ok(()));
    assert_eq!(group.view().unwrap().part, Part::Candidate);
}

#[test]
fn late_copy_of_a_refusal_never_takes_progress_back() {
    // raft-rs #555: in a probe, a refusal of the entry that is acknowledged moves `next` to or below `matched`.
    let mut progress = raft::Progress::new(6, 8);
    progress.matched = 5;
    assert!(progress.maybe_decr_to(5, 2, 0) && progress.next_idx <= progress.matched, "crate raft still has it; else drop the guard");
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    bench.propose(leader, 5);
    let index = bench.propose(leader, 6);
    let (term, follower) = (bench.view(leader).term.0, bench.other(leader) as u64 + 1);
    bench.groups[leader].on_unreachable(MemberNo(follower));
    let late = MessageBody::AppendRefused { index, hint: Index(1), hint_term: Term(1), commit: Index(0) };
    assert_eq!(
        bench.groups[leader].step(message(follower, leader as u64 + 1, term, late)),
        Err(Refused::Overtaken { index, matched: index })
    );
    let beyond = MessageBody::Appended { index: Index(index.0 + 5), commit: Index(0), room: None };
    let refused = bench.groups[leader].step(message(follower, leader as u64 + 1, term, beyond));
    assert_eq!(refused, Err(Refused::BeyondLog { index: Index(index.0 + 5), last: index }));
    let next = bench.propose(leader, 7);
    assert_eq!(bench.view(leader).committed, next);
    assert!(bench.groups[leader].matched().iter().all(|(_, matched)| *matched == next), "{:?}", bench.groups[leader].matched());
}

#[test]
fn member_that_lost_what_a_late_word_acknowledges_is_sent_it_again() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    let index = bench.propose(leader, 5);
    let (term, follower) = (bench.view(leader).term, bench.other(leader));
    let (no, leads) = (MemberNo(follower as u64 + 1), leader as u64 + 1);
    let ballot = Ballot { term, vote: MemberNo(leads) };
    bench.groups[follower] = Group::open(config(no.0), Recovered { ballot, ..fresh(3) }).unwrap();
    bench.groups[leader].on_restarted(no);
    // Said in the life before, and heard after the news of the restart.
    let late = MessageBody::Appended { index, commit: Index(0), room: None };
    bench.groups[leader].step(message(no.0, leads, term.0, late)).unwrap();
    let next = bench.propose(leader, 6);
    bench.tick(20);
    assert_eq!((bench.view(leader).term, bench.view(follower).applied), (term, next));
    assert_eq!(bench.groups[leader].forgotten(no, term, LogEnd { term, index: Index(0) }), Some(next));
}

#[test]
fn acknowledgement_of_a_replaced_entry_does_not_count_for_its_successor() {
    // Entries of term 2 are on their way to the drive when a leader of term 3 replaces them.
    let mut group = Group::open(config(1), fresh(3)).unwrap();
    let mut out = Output::default();
    group.step(message(2, 1, 2, append(0, 0, 0, vec![entry(2, 1), entry(2, 2)]))).unwrap();
    group.settle(Millis(0), &mut out);
    let old = out.persist[0].mark;
    out.clear();
    group.step(message(3, 1, 3, append(0, 0, 0, vec![entry(3, 1)]))).unwrap();
    group.settle(Millis(0), &mut out);
    let new = out.persist.last().unwrap().mark;
    out.clear();
    group.on_persisted(old);
    group.settle(Millis(0), &mut out);
    assert!(out.send.iter().all(|message| message.term == Term(2)), "{:?}", out.send);
    assert_eq!(group.view().unwrap().persisted, Index(0));
    group.on_persisted(new);
    group.settle(Millis(0), &mut out);
    assert_eq!(group.view().unwrap().persisted, Index(1));
}

#[test]
fn restart_knows_committed_the_change_of_members_before_the_last() {
    let change = |index, next| Entry {
        term: Term(1),
        index: Index(index),
        kind: EntryKind::Members,
        bytes: Members { next: MemberNo(next), ..members(3) }.encode(),
        payload_blocks: 0,
    };
    let open = |entries| {
        let from = Recovered { ballot: Ballot { term: Term(1), vote: MemberNo(0) }, entries, ..fresh(3) };
        Group::open(config(1), from).unwrap().view().unwrap().committed
    };
    assert_eq!(open(vec![entry(1, 1), entry(1, 2)]), Index(0));
    assert_eq!(open(vec![entry(1, 1), change(2, 4)]), Index(0));
    assert_eq!(open(vec![entry(1, 1), change(2, 5), entry(1, 3), change(4, 6), entry(1, 5)]), Index(2));
}

#[test]
fn log_that_contradicts_itself_is_not_opened() {
    let ballot = Ballot { term: Term(3), vote: MemberNo(1) };
    let open = |entries: Vec<Entry>| Group::open(config(1), Recovered { ballot, entries, ..fresh(3) }).err();
    assert_eq!(open(vec![entry(1, 1), entry(3, 2)]), None);
    assert!(matches!(open(vec![entry(1, 2)]), Some(OpenError::Gap { .. })));
    assert!(matches!(open(vec![entry(2, 1), entry(1, 2)]), Some(OpenError::Term { .. })));
    assert!(matches!(open(vec![entry(4, 1)]), Some(OpenError::Term { .. })), "of a term that was never voted on");
    let begins = |start, start_term, applied, applied_term| {
        let (start, start_term, applied, applied_term) = (Index(start), Term(start_term), Index(applied), Term(applied_term));
        let entries = vec![entry(2, 5), entry(3, 6)];
        Group::open(config(1), Recovered { ballot, start, start_term, applied, applied_term, entries, ..fresh(3) }).err()
    };
    assert_eq!(begins(4, 1, 4, 1), None);
    assert_eq!(begins(4, 1, 5, 2), None);
    assert_eq!(begins(4, 1, 6, 3), None);
    assert!(matches!(begins(4, 1, 3, 1), Some(OpenError::Applied { .. })));
    assert!(matches!(begins(4, 1, 7, 3), Some(OpenError::Applied { .. })));
    assert!(matches!(begins(4, 1, 5, 3), Some(OpenError::Term { .. })), "applied is another entry");
    assert!(matches!(begins(4, 3, 4, 3), Some(OpenError::Term { .. })), "the log goes back in terms");
    assert!(matches!(begins(4, 0, 5, 2), Some(OpenError::Term { .. })), "what is before has a term");
    let timing = Timing { election: 4, ..timing() };
    assert!(matches!(Group::open(GroupConfig { timing, ..config(1) }, fresh(3)), Err(OpenError::Timing(_))));
}

#[test]
fn restarted_leader_sends_a_laggard_what_it_had_applied_before() {
    let ballot = Ballot { term: Term(1), vote: MemberNo(0) };
    let entries: Vec<_> = (3..=8).map(|index| entry(1, index)).collect();
    let ahead = Recovered {
        ballot,
        start: Index(2),
        start_term: Term(1),
        applied: Index(7),
        applied_term: Term(1),
        entries: entries.clone(),
        ..fresh(3)
    };
    let behind = Recovered { entries: (1..=4).map(|index| entry(1, index)).collect(), ballot, ..fresh(3) };
    let mut bench = Bench::of(vec![
        Group::open(config(1), ahead.clone()).unwrap(),
        Group::open(config(2), ahead).unwrap(),
        Group::open(config(3), behind).unwrap(),
    ]);
    assert_eq!(bench.view(0).first, Index(3));
    let leader = bench.leader();
    bench.tick(3);
    assert_ne!(leader, 2, "its log is behind");
    let last = bench.view(leader).last;
    assert_eq!((bench.view(2).last, bench.view(2).applied), (last, last));
    assert_eq!(bench.applied[2], (1..=8).map(Index).collect::<Vec<_>>());
    assert_eq!(bench.applied[leader], [Index(8)], "what was applied is not applied again");
}

#[test]
fn membership_changes_one_step_at_a_time() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    bench.tick(2);
    let term = bench.view(leader).term;
    let group = &mut bench.groups[leader];
    let mut with = members(3);
    with.list.push(member(4, Role::Voter));
    with.next = MemberNo(5);
    assert_eq!(group.change(term, &with), Err(ProposeError::NotOneStep), "a member with content begins as a learner");
    with.list[3].role = Role::Learner;
    let mut two = with.clone();
    two.list.push(member(5, Role::Learner));
    two.next = MemberNo(6);
    assert_eq!(group.change(term, &two), Err(ProposeError::NotOneStep));
    let mut without = members(3);
    without.list.remove(leader);
    assert_eq!(group.change(term, &without), Err(ProposeError::TransferFirst));
    assert!(group.change(term, &with).is_ok());
    let mut less = members(3);
    less.list.remove((leader + 1) % 3);
    assert_eq!(group.change(term, &less), Err(ProposeError::ChangePending));
    bench.run();
    bench.tick(3);
    assert!((0..3).all(|at| bench.groups[at].members() == Some(&with)));
    with.list[3].role = Role::LogOnly;
    assert_eq!(bench.groups[leader].change(term, &with), Err(ProposeError::NotOneStep), "what learned content keeps it");
    with.list[3].role = Role::Voter;
    assert!(bench.groups[leader].change(term, &with).is_ok());
    bench.run();
    bench.tick(3);
    assert!((0..3).all(|at| bench.groups[at].members() == Some(&with)));
}

#[test]
fn learner_that_joins_catches_up_and_votes_once_promoted() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    bench.propose(leader, 1);
    let mut with = members(3);
    with.list.push(member(4, Role::Learner));
    with.next = MemberNo(5);
    let term = bench.view(leader).term;
    bench.groups.push(Group::open(config(4), fresh(3)).unwrap());
    bench.out.push(vec![]);
    bench.fast.push(true);
    bench.linked.push(true);
    bench.applied.push(vec![]);
    bench.reads.push(vec![]);
    bench.refused.push(vec![]);
    bench.groups[leader].change(term, &with).unwrap();
    bench.tick(4);
    assert_eq!(bench.view(3).applied, bench.view(leader).applied);
    with.list[3].role = Role::Voter;
    bench.groups[leader].change(term, &with).unwrap();
    bench.tick(4);
    // Four voters: three of them are a quorum without the leader.
    bench.linked[leader] = false;
    let second = bench.leader();
    assert!(bench.propose(second, 2) <= bench.view(second).committed);
}

/// A leader, and a member that has to install entry `index` and does not get it onto its drive.
fn installing() -> (Bench, usize, usize, Index) {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    let behind = bench.other(leader);
    bench.linked[behind] = false;
    let index = (0..5).map(|value| bench.propose(leader, value)).last().unwrap();
    let view = bench.view(leader);
    bench.groups[leader].trim(index);
    bench.groups[leader].offer_install(Install {
        index,
        index_term: view.term,
        digest: [9; 16],
        members: members(3),
        reservations: None,
        stack: None,
    });
    bench.linked[behind] = true;
    bench.fast[behind] = false;
    bench.tick(5);
    (bench, leader, behind, index)
}

#[test]
fn member_that_installs_neither_campaigns_nor_breaks() {
    let (mut bench, leader, behind, index) = installing();
    let campaign = message(leader as u64 + 1, behind as u64 + 1, bench.view(leader).term.0, MessageBody::Campaign);
    assert_eq!(bench.groups[behind].step(campaign), Err(Refused::Installing));
    assert_eq!(bench.groups[behind].standing(), None, "nor does it say how its log ends");
    bench.linked[leader] = false;
    bench.sent.clear();
    bench.tick(40);
    assert_eq!(bench.groups[behind].stopped(), None);
    assert!(!bench.sent.iter().any(|message| message.from.0 as usize == behind + 1 && matches!(message.body, MessageBody::Vote { .. })));
    bench.persist(behind);
    bench.fast[behind] = true;
    bench.run();
    assert_eq!(bench.view(behind).applied, index);
    assert_eq!(bench.groups[behind].standing().map(|it| it.end.index), Some(index));
}

#[test]
fn install_without_a_result_is_offered_again() {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    let behind = bench.other(leader);
    bench.linked[behind] = false;
    let index = (0..5).map(|value| bench.propose(leader, value)).last().unwrap();
    let term = bench.view(leader).term;
    bench.groups[leader].trim(index);
    bench.groups[leader].offer_install(Install {
        index,
        index_term: term,
        digest: [9; 16],
        members: members(3),
        reservations: None,
        stack: None,
    });
    let says = |body| message(behind as u64 + 1, leader as u64 + 1, term.0, body);
    let offers = |bench: &Bench| {
        let to = MemberNo(behind as u64 + 1);
        bench.sent.iter().filter(|message| message.to == to && matches!(message.body, MessageBody::Install(_))).count()
    };
    let refused = MessageBody::AppendRefused { index, hint: Index(0), hint_term: Term(0), commit: Index(0) };
    bench.groups[leader].step(says(refused)).unwrap();
    bench.run();
    assert_eq!(offers(&bench), 1);
    for (ticks, expected) in [(10, 1), (10, 2)] {
        bench.tick(ticks);
        bench.groups[leader].step(says(MessageBody::HeartbeatDone { commit: Index(0), round: None, room: None })).unwrap();
        bench.run();
        assert_eq!(offers(&bench), expected, "the first was lost; it is offered again after two timeouts");
    }
    bench.linked[behind] = true;
    bench.tick(60);
    assert_eq!(bench.view(behind).applied, bench.view(leader).last);
}

#[test]
fn member_behind_the_trim_point_is_given_an_install() {
    let (mut bench, leader, behind, index) = installing();
    let install = bench.out[behind].iter().find_map(|persist| persist.install.clone()).expect("an install is to be persisted");
    assert_eq!((install.index, install.digest), (index, [9; 16]));
    assert!(bench.view(behind).persisted < index, "not before it is durable");
    bench.persist(behind);
    bench.fast[behind] = true;
    bench.run();
    assert_eq!(bench.view(behind).applied, index);
    let next = bench.propose(leader, 9);
    bench.tick(3);
    assert_eq!((bench.view(behind).last, bench.applied[behind].last()), (next, Some(&next)));
}

#[test]
fn idle_group_falls_asleep_and_wakes_for_a_proposal() {
    let timing = Timing { sleep: Some(6), ..timing() };
    let open = |me| Group::open(GroupConfig { timing, ..config(me) }, fresh(3)).unwrap();
    let mut bench = Bench::of(vec![open(1), open(2), open(3)]);
    let leader = bench.leader();
    bench.propose(leader, 1);
    bench.tick(20);
    assert!((0..3).all(|at| bench.view(at).asleep));
    assert!(!bench.groups[leader].may_read(Millis(bench.now)), "a sleeping leader holds no lease");
    bench.sent.clear();
    bench.tick(50);
    assert!(bench.sent.is_empty(), "asleep, it says nothing: {:?}", bench.sent);
    let index = bench.propose(leader, 2);
    assert_eq!(bench.view(leader).committed, index);
    bench.tick(20);
    // Its node is gone: the others are told, wake and elect.
    bench.linked[leader] = false;
    bench.groups.iter_mut().for_each(Group::wake);
    assert_ne!(bench.leader(), leader);
}

#[test]
fn panic_inside_raft_stops_that_group_alone() {
    let mut group = Group::open(config(1), fresh(3)).unwrap();
    group.trim(Index(0));
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    group.trim(Index(5)); // beyond what is applied
    std::panic::set_hook(hook);
    assert!(matches!(group.stopped(), Some(Stop::Quarantined(why)) if why.contains("beyond what is applied")));
    let mut out = Output::default();
    group.settle(Millis(0), &mut out);
    assert_eq!(group.propose(Term(1), ops(1)), Err(ProposeError::Stopped));
    assert!(out.send.is_empty() && group.view().is_none());
}

#[test]
fn append_is_cut_by_payload_and_not_by_descriptors() {
    // 64 entries of 1 MiB of payload each: a few KiB of descriptors.
    let crcs = [0u32; 256];
    let mut section = Section::default();
    section.entry(0, Term(0), Index(0));
    section.write(0, &crcs);
    let bytes = section.bytes()[ENTRY_HEAD..].to_vec();
    let big = |index| Entry { bytes: bytes.clone(), payload_blocks: 256, ..entry(1, index) };
    let entries: std::collections::VecDeque<_> = (1..=64).map(|index| convert::raft_entry(big(index))).collect();
    let store = log::LogStore::new(Index(0), Term(0), entries.clone(), raft::eraftpb::HardState::default(), &members(3));
    let taken = store.entries(1, 65, 64 << 10, raft::GetEntriesContext::empty(false)).unwrap();
    assert_eq!(taken.len(), 1, "1 MiB, what an append has at most");
    assert_eq!(store.entries(1, 65, None, raft::GetEntriesContext::empty(false)).unwrap().len(), 64, "to be applied: all");
    let mut message = raft::eraftpb::Message::default();
    message.set_msg_type(raft::eraftpb::MessageType::MsgAppend);
    (message.from, message.to, message.term) = (1, 2, 1);
    message.set_entries(entries.into_iter().collect::<Vec<_>>().into());
    let mut out = Vec::new();
    convert::outgoing(SEGMENT, message, &mut out);
    assert_eq!(out.len(), 64);
    assert!(out.iter().all(|message| message.payload_blocks() == 256));
    for (at, message) in out.iter().enumerate() {
        let MessageBody::Append(append) = &message.body else { panic!("{message:?}") };
        assert_eq!((append.prev.0, append.entries.len()), (at as u64, 1));
    }
}

#[test]
fn every_message_of_the_codec_survives_raft_and_back() {
    let round = Some(Round { term: Term(3), count: 9 });
    let bodies = [
        append(4, 2, 3, vec![entry(2, 5), entry(3, 6)]),
        MessageBody::Appended { index: Index(6), commit: Index(3), room: None },
        MessageBody::AppendRefused { index: Index(6), hint: Index(2), hint_term: Term(1), commit: Index(1) },
        MessageBody::Vote { pre: true, forced: false, last: Index(6), last_term: Term(3), commit: Index(3), commit_term: Term(2) },
        MessageBody::Vote { pre: false, forced: true, last: Index(6), last_term: Term(3), commit: Index(3), commit_term: Term(2) },
        MessageBody::Voted { pre: true, granted: false, commit: Index(3), commit_term: Term(2) },
        MessageBody::Voted { pre: false, granted: true, commit: Index(0), commit_term: Term(0) },
        MessageBody::Heartbeat { commit: Index(3), round },
        MessageBody::HeartbeatDone { commit: Index(3), round: None, room: None },
        MessageBody::Campaign,
        MessageBody::Install(Install {
            index: Index(3),
            index_term: Term(2),
            digest: [4; 16],
            members: members(3),
            reservations: None,
            stack: None,
        }),
    ];
    for body in bodies {
        let whole = Message { segment: SEGMENT, from: MemberNo(1), to: MemberNo(2), term: Term(3), body };
        let mut back = Vec::new();
        convert::outgoing(SEGMENT, convert::incoming(whole.clone()).unwrap(), &mut back);
        assert_eq!(back, [whole]);
    }
}
