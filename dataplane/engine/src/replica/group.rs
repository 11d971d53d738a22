//! The calls of a group, and how raft's `Ready` becomes what the store is to do.

use super::change::{one_step, raft_change};
use super::check::{Checker, Refused};
use super::log::LogStore;
use super::pace::{Log, Pace};
use super::rounds::Rounds;
use super::{
    Ballot, Canary, GroupConfig, GroupView, LogEnd, Mark, OpenError, Output, Part, Persist, ProposeError, Recovered, Stop, convert, resolve,
};
use crate::port::Millis;
use penstock_wire::peer::{Entry, EntryKind, Install, MemberNo, Members, Message, MessageBody, Verified};
use penstock_wire::{COUNT_LIMIT, Index, Term, batch};
use raft::eraftpb::{EntryType, HardState};
use raft::{ReadOnlyOption, SnapshotStatus, StateRole};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Appends to one member that may be out, each of a frame's payload at most.
const APPENDS_OUT_MAX: usize = 64;
/// Bytes of descriptors of one append at most.
const APPEND_BYTES_MAX: u64 = 64 << 10;

/// The election timeout of a member in doubt, in ticks. It counts them all the same: a lease that its leader held must end.
const NEVER: usize = usize::MAX - 1;

/// A `Ready` that is not retired.
struct Pending {
    number: u64,
    /// Goes out when everything up to here is persisted.
    held: Vec<raft::eraftpb::Message>,
    ballot: Option<Ballot>,
    /// The state that it installs: applied once it is durable.
    installed: Option<Index>,
    persisted: bool,
}

/// One member of one group.
pub struct Group {
    config: GroupConfig,
    state: Result<Box<Live>, Stop>,
}

struct Live {
    config: GroupConfig,
    raw: raft::RawNode<LogStore>,
    members: Members,
    pending: VecDeque<Pending>,
    /// Newest ballot handed out to be persisted, and the newest that is.
    ballot_sent: Ballot,
    ballot_durable: Ballot,
    rounds: Rounds,
    pace: Pace,
    /// Ticks for which votes are withheld after the opening.
    withhold: u32,
    asleep: bool,
    /// Ticks since something happened.
    idle: u32,
    /// To go out at the next settle, beside raft's.
    notes: Vec<Message>,
    /// Ticks since each member was sent an install that it has not answered.
    installing: Vec<(u64, u32)>,
    /// See [`Recovered::floor`].
    floor: Option<LogEnd>,
    /// The floor went and nobody was told yet.
    resolved: bool,
    /// See [`Group::set_rebuilding`].
    rebuilding: bool,
    /// Who was asked last to lead in this member's place, which cannot serve.
    asked: MemberNo,
    /// An entry that it could not send when it led, and that was not committed.
    unsent: u64,
    /// What members had acknowledged to this leader, in this term, when they restarted.
    shown: Vec<(MemberNo, Term, Index)>,
}

fn timing_error(config: &GroupConfig) -> Option<String> {
    let timing = &config.timing;
    // The margin of the lease (0.8 of the timeout) must outweigh the tick by which a timeout may come early.
    let sound =
        timing.election >= 5 && timing.heartbeat > 0 && timing.heartbeat * 2 <= timing.election && timing.stride > 0 && timing.tick > 0;
    (!sound).then(|| format!("{timing:?}; election must be at least 5 ticks and twice the heartbeat, nothing 0"))
}

fn check_log(from: &Recovered) -> Result<(), OpenError> {
    let last = from.start.0 + from.entries.len() as u64;
    if !(from.start.0..=last).contains(&from.applied.0) {
        return Err(OpenError::Applied { start: from.start.0, last, applied: from.applied.0 });
    }
    let at_applied = match from.applied.0 - from.start.0 {
        0 => from.start_term,
        behind => from.entries[behind as usize - 1].term,
    };
    let (mut expected, mut before) = (from.start.0 + 1, from.start_term.0);
    for entry in &from.entries {
        if entry.index.0 != expected {
            return Err(OpenError::Gap { found: entry.index.0, expected });
        }
        if entry.term.0 < before || entry.term > from.ballot.term {
            return Err(OpenError::Term { index: expected, term: entry.term.0, before, ballot: from.ballot.term.0 });
        }
        entry.check().map_err(|error| OpenError::Entry { index: expected, error })?;
        (expected, before) = (expected + 1, entry.term.0);
    }
    let whole = |index: Index, term: Term| term <= from.ballot.term && (index.0 == 0) == (term.0 == 0);
    if !whole(from.start, from.start_term) || !whole(from.applied, from.applied_term) || at_applied != from.applied_term {
        let (index, term, ballot) = (from.applied.0, from.applied_term.0, from.ballot.term.0);
        return Err(OpenError::Term { index, term, before: at_applied.0, ballot });
    }
    from.members.check().map_err(OpenError::Members)
}

/// What a restart knows committed: what its log says, and who proposed a change of members had applied the one before.
fn committed_at_open(from: &Recovered) -> u64 {
    let changes = from.unapplied().iter().filter(|entry| entry.kind == EntryKind::Members);
    let mut last_two = (from.applied.0, from.applied.0);
    for change in changes {
        last_two = (last_two.1, change.index.0);
    }
    last_two.0.max(from.committed.0)
}

impl Group {
    /// Builds the member from what recovery found and resolved.
    ///
    /// # Errors
    /// When that contradicts itself.
    pub fn open(config: GroupConfig, from: Recovered) -> Result<Self, OpenError> {
        if let Some(why) = timing_error(&config) {
            return Err(OpenError::Timing(why));
        }
        check_log(&from)?;
        let hard =
            HardState { term: from.ballot.term.0, vote: from.ballot.vote.0, commit: committed_at_open(&from), ..HardState::default() };
        let applied = from.applied;
        let entries = from.entries.into_iter().map(convert::raft_entry).collect();
        let store = LogStore::new(from.start, from.start_term, entries, hard, &from.members);
        let timing = config.timing;
        let lease = cfg!(feature = "canary") && config.canary == Some(Canary::RaftLease);
        let raft_config = raft::Config {
            id: config.me.0,
            election_tick: timing.election as usize,
            heartbeat_tick: timing.heartbeat as usize,
            min_election_tick: timing.election as usize,
            max_election_tick: NEVER + 1,
            applied: applied.0,
            max_size_per_msg: APPEND_BYTES_MAX,
            max_inflight_msgs: APPENDS_OUT_MAX,
            check_quorum: true,
            pre_vote: true,
            read_only_option: if lease { ReadOnlyOption::LeaseBased } else { ReadOnlyOption::Safe },
            ..raft::Config::default()
        };
        let built = catch_unwind(AssertUnwindSafe(|| {
            let logger = slog::Logger::root(slog::Discard, slog::o!());
            raft::RawNode::new(&raft_config, store, &logger)
        }));
        let raw = match built {
            Ok(Ok(raw)) => raw,
            Ok(Err(error)) => return Err(OpenError::Timing(error.to_string())),
            Err(panic) => return Ok(Self { config, state: Err(Stop::Quarantined(text_of(&*panic))) }),
        };
        let ballot = from.ballot;
        let mut live = Live {
            config: config.clone(),
            raw,
            members: from.members,
            pending: VecDeque::new(),
            ballot_sent: ballot,
            ballot_durable: ballot,
            rounds: Rounds::default(),
            pace: Pace::default(),
            withhold: timing.election,
            asleep: false,
            idle: 0,
            notes: Vec::new(),
            installing: Vec::new(),
            floor: from.floor,
            resolved: false,
            rebuilding: false,
            asked: MemberNo(0),
            unsent: 0,
            shown: Vec::new(),
        };
        live.look_at_floor();
        live.set_timeout();
        Ok(Self { config, state: Ok(Box::new(live)) })
    }

    /// Why the group answers nothing any more, if so.
    pub fn stopped(&self) -> Option<&Stop> {
        self.state.as_ref().err()
    }

    /// Whatever raft breaks on stays in this group.
    fn guard<T>(&mut self, call: impl FnOnce(&mut Live) -> T) -> Option<T> {
        let live = self.state.as_mut().ok()?;
        match catch_unwind(AssertUnwindSafe(|| {
            let result = call(live);
            live.set_timeout();
            live.assert_progress();
            result
        })) {
            Ok(result) => Some(result),
            Err(panic) => {
                self.state = Err(Stop::Quarantined(text_of(&*panic)));
                None
            }
        }
    }

    /// One tick of the group's time. A sleeping group needs none.
    pub fn tick(&mut self) {
        self.guard(Live::tick);
    }

    /// Takes a message whose payload is here and right.
    ///
    /// # Errors
    /// When it does not fit the group; nothing has changed then.
    pub fn step(&mut self, message: Verified) -> Result<(), Refused> {
        self.guard(|live| live.step(message.into_message())).unwrap_or(Err(Refused::Stopped))
    }

    /// Puts `ops` into the log as one entry. `term` is the one in which they were decided: what was decided under another term, or
    /// came in on an older connection, never gets in.
    ///
    /// # Errors
    /// When this member does not lead that term, or is stepping aside.
    pub fn propose(&mut self, term: Term, ops: Vec<u8>) -> Result<Index, ProposeError> {
        self.guard(|live| live.propose(term, ops)).unwrap_or(Err(ProposeError::Stopped))
    }

    /// Proposes the group's membership after one step: a learner more, a learner promoted, or one member less.
    ///
    /// # Errors
    /// When it is not one step, or the step before is not applied yet.
    pub fn change(&mut self, term: Term, members: &Members) -> Result<Index, ProposeError> {
        self.guard(|live| live.change(term, members)).unwrap_or(Err(ProposeError::Stopped))
    }

    /// A read wants proof of leadership: all reads of a turn share one round. Answered in [`Output::reads`] or refused there.
    pub fn read(&mut self, id: u64) {
        if self.guard(|live| live.rounds.read(id)).is_none() {
            // Refused at the next settle, which has nothing else to do.
            debug_assert!(self.state.is_err());
        }
    }

    /// Whether a read may be served from what is applied, without a round.
    pub fn may_read(&self, now: Millis) -> bool {
        self.state.as_ref().is_ok_and(|live| live.may_read(now))
    }

    /// Steps aside for `to`, once it has everything. The lease is gone at once, for all of this term.
    pub fn transfer(&mut self, to: MemberNo) {
        self.guard(|live| live.transfer(to));
    }

    /// Everything named by `mark` and before it is durable, and sealed where it has a ballot.
    pub fn on_persisted(&mut self, mark: Mark) {
        self.guard(|live| live.on_persisted(mark));
    }

    /// Something did not get onto the drive: nothing of this group counts any more.
    pub fn on_persist_failed(&mut self) {
        self.state = Err(Stop::PersistFailed);
    }

    /// Messages to `member` may be lost: its queue was full, or its connection went.
    pub fn on_unreachable(&mut self, member: MemberNo) {
        self.guard(|live| live.raw.report_unreachable(member.0));
    }

    /// The member's node shows another incarnation: what it acknowledged must be shown again.
    pub fn on_restarted(&mut self, member: MemberNo) {
        self.guard(|live| live.on_restarted(member));
    }

    /// A peer's node changed, came or went, or somebody wants something.
    pub fn wake(&mut self) {
        self.guard(Live::wake);
    }

    /// Lets go of the log up to `to`, which is applied.
    pub fn trim(&mut self, to: Index) {
        self.guard(|live| {
            assert!(to.0 <= live.raw.raft.raft_log.applied, "trim to {to:?} beyond what is applied");
            live.raw.mut_store().trim(to);
        });
    }

    /// What to give members that need more than the log has.
    pub fn offer_install(&mut self, install: Install) {
        self.guard(|live| live.raw.mut_store().offer(install));
    }

    /// The payload of an entry cannot be had any more: members that need it are given an install, of it or of a later one, if it is committed. If not,
    /// this member can bring nobody on, and gives leadership up to whoever has the entry, or wins without it.
    pub fn cannot_send(&mut self, index: Index) {
        self.guard(|live| live.cannot_send(index));
    }

    /// Its content is not what its log says: it votes and counts like any, campaigns when the others had their chance, and leads to hand over alone.
    pub fn set_rebuilding(&mut self, rebuilding: bool) {
        self.guard(|live| live.rebuilding = rebuilding);
    }

    /// The member has installed, or could not.
    pub fn on_install_result(&mut self, member: MemberNo, done: bool) {
        self.guard(|live| live.raw.report_snapshot(member.0, if done { SnapshotStatus::Finish } else { SnapshotStatus::Failure }));
    }

    /// What is to be done after all that came in this turn.
    pub fn settle(&mut self, now: Millis, out: &mut Output) {
        if self.guard(|live| live.settle(now, out)).is_none() {
            // What a panic left half said is not said.
            out.clear();
        }
    }

    /// Entries from `first` on, for a member that resolves what its recovery could not judge: what is persisted here, and at a leader
    /// all, since it may have counted others' copies before its own.
    pub fn entries(&self, first: Index, count: usize) -> Vec<Entry> {
        let Ok(live) = &self.state else { return Vec::new() };
        let last = if live.leads() { live.raw.store().last() } else { live.raw.raft.raft_log.persisted };
        (first.0..=last).take(count).map_while(|index| live.raw.store().get(index)).map(convert::entry).collect()
    }

    /// The floor of a member in doubt.
    pub fn floor(&self) -> Option<LogEnd> {
        self.state.as_ref().ok()?.floor
    }

    /// The others were asked: what was acknowledged here and counts is in a log that ends like this. The floor never rises: any of them will do.
    pub fn lower_floor(&mut self, to: LogEnd) {
        self.guard(|live| {
            live.floor = live.floor.map(|floor| floor.min(to));
            live.look_at_floor();
        });
    }

    /// What this member answers to one that is in doubt: nothing while a state is being installed, whose log is neither the old one nor yet the new one.
    pub fn standing(&self) -> Option<resolve::Standing> {
        self.state.as_ref().ok().filter(|live| !live.installs()).map(|live| live.standing())
    }

    pub fn members(&self) -> Option<&Members> {
        self.state.as_ref().ok().map(|live| &live.members)
    }

    /// What a member has acknowledged to this leader and cannot have, where its log ends like `last` in term `term`. In the term of one leader nothing
    /// that was acknowledged is replaced.
    pub fn forgotten(&self, member: MemberNo, term: Term, last: LogEnd) -> Option<Index> {
        let live = self.state.as_ref().ok().filter(|live| live.leads() && term <= live.term() && last.term <= live.term())?;
        let before = live.shown.iter().filter(|(no, of, _)| (*no, *of) == (member, live.term())).map(|(_, _, index)| *index);
        let now = live.raw.raft.prs().get(member.0).map(|progress| Index(progress.matched));
        before.chain(now).max().filter(|index| *index > last.index)
    }

    pub fn config(&self) -> &GroupConfig {
        &self.config
    }

    /// The last entry that each member is known to have, as the leader knows it; empty where another leads.
    pub fn matched(&self) -> Vec<(MemberNo, Index)> {
        let Some(live) = self.state.as_ref().ok().filter(|live| live.leads()) else { return Vec::new() };
        let prs = live.raw.raft.prs();
        live.members.list.iter().filter_map(|member| Some((member.no, Index(prs.get(member.no.0)?.matched)))).collect()
    }

    pub fn view(&self) -> Option<GroupView> {
        self.state.as_ref().ok().map(|live| live.view())
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("raft panicked without a text").to_owned()
}

impl Live {
    fn canary(&self, canary: Canary) -> bool {
        cfg!(feature = "canary") && self.config.canary == Some(canary)
    }

    fn leads(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    fn term(&self) -> Term {
        Term(self.raw.raft.term)
    }

    fn view(&self) -> GroupView {
        let raft = &self.raw.raft;
        GroupView {
            part: match raft.state {
                StateRole::Leader => Part::Leader,
                StateRole::Follower => Part::Follower,
                StateRole::Candidate | StateRole::PreCandidate => Part::Candidate,
            },
            term: self.term(),
            leader: MemberNo(raft.leader_id),
            first: Index(self.raw.store().first()),
            last: Index(raft.raft_log.last_index()),
            last_term: Term(raft.raft_log.last_term()),
            committed: Index(raft.raft_log.committed),
            persisted: Index(raft.raft_log.persisted),
            applied: Index(raft.raft_log.applied),
            serves: self.leads() && self.is_whole() && raft.apply_to_current_term(),
            asleep: self.asleep,
        }
    }

    /// The end of the log that counts here: persisted, and at a leader all, since it may have counted others' copies before its own.
    fn standing(&self) -> resolve::Standing {
        let index = if self.leads() { self.raw.store().last() } else { self.raw.raft.raft_log.persisted };
        let end = LogEnd { term: Term(self.raw.store().term_at(index)), index: Index(index) };
        // A ballot on its way to the drive fences nothing yet.
        let term = if self.leads() { self.term() } else { self.ballot_durable.term };
        resolve::Standing { term: term.max(end.term), leads: self.leads(), end, sure: self.floor.is_none() }
    }

    /// Whether the log is as far again as it may have been.
    fn look_at_floor(&mut self) {
        let persisted = self.raw.raft.raft_log.persisted;
        let end = LogEnd { term: Term(self.raw.store().term_at(persisted)), index: Index(persisted) };
        if self.floor.is_some_and(|floor| end >= floor) {
            self.floor = None;
            self.resolved = true;
        }
    }

    /// Raft draws its election timeout at random whenever it changes its state; this puts ours in its place before it is looked at.
    /// Distinct between members, and rotating with the term, so that it is not always the same one that comes first.
    fn set_timeout(&mut self) {
        let voters = self.members.voters().count() as u64;
        let rank = self.members.voters().take_while(|no| *no != self.config.me).count() as u64;
        let place = if voters == 0 { 0 } else { (rank + self.raw.raft.term) % (voters + 1) };
        let timing = &self.config.timing;
        let (election, stride) = (timing.election as usize, timing.stride as usize);
        let mut timeout = election + place as usize * stride;
        if !self.is_whole() || self.unsent > self.raw.raft.raft_log.committed {
            // Whoever could serve has campaigned twice by then.
            timeout += 2 * (election + (voters as usize + 1) * stride);
        }
        if self.floor.is_some() && !self.canary(Canary::ForgetFloor) {
            timeout = NEVER;
        }
        self.raw.raft.set_randomized_election_timeout(timeout);
    }

    /// Whether hosts could be served here: the content is what the log says.
    fn is_whole(&self) -> bool {
        self.members.has_content(self.config.me) && (!self.rebuilding || self.canary(Canary::ServeUnrebuilt))
    }

    fn cannot_send(&mut self, index: Index) {
        if index.0 <= self.raw.raft.raft_log.committed {
            self.raw.mut_store().cannot_send(index);
            return;
        }
        // No install stands for it. Whoever leads no more by the time that its words fail leads again some day.
        self.unsent = self.unsent.max(index.0);
        if self.leads() {
            let term = self.raw.raft.term;
            self.raw.raft.become_follower(term, raft::INVALID_ID);
        }
    }

    /// A leader that cannot serve brings the others' logs up to its own, which somebody had to who has more than they do, and asks those that have
    /// it all to lead, one after the other: who cannot serve either refuses, and has its election timeout to do so.
    fn hand_over(&mut self) {
        if !self.leads() || self.is_whole() || self.raw.raft.lead_transferee.is_some() {
            return;
        }
        let (last, prs) = (self.raw.raft.raft_log.last_index(), self.raw.raft.prs());
        let is_level = |no: &MemberNo| {
            *no != self.config.me && self.members.has_content(*no) && prs.get(no.0).is_some_and(|progress| progress.matched == last)
        };
        let level: Vec<MemberNo> = self.members.voters().filter(is_level).collect();
        if let Some(to) = level.iter().find(|no| **no > self.asked).or(level.first()) {
            self.asked = *to;
            self.transfer(*to);
        }
    }

    /// What raft-rs itself should hold (raft-rs #555): nothing is sent again from within what is acknowledged.
    fn assert_progress(&self) {
        if self.leads() {
            for (id, progress) in self.raw.raft.prs().iter() {
                assert!(
                    progress.next_idx > progress.matched || *id == self.config.me.0,
                    "member {id}: next {} after matched {}",
                    progress.next_idx,
                    progress.matched
                );
                assert!(progress.matched <= self.raw.raft.raft_log.last_index(), "member {id} has acknowledged more than there is");
            }
        }
    }

    fn tick(&mut self) {
        self.withhold = self.withhold.saturating_sub(1);
        if self.asleep {
            return;
        }
        self.idle = self.idle.saturating_add(1);
        // Raft would look for changes of members among entries that the install has replaced.
        if self.installs() {
            return;
        }
        // A sole voter wins the moment that it campaigns, so only with everything persisted; raft asserts that.
        if !self.leads() && !self.pending.is_empty() && self.members.voters().count() == 1 {
            return;
        }
        self.raw.tick();
        self.offer_again();
        if self.config.timing.lease && self.leads() && self.raw.raft.heartbeat_elapsed() == 0 {
            self.rounds.renew();
        }
        self.consider_sleep();
    }

    /// A state is being installed: nothing to campaign with until it is durable.
    fn installs(&self) -> bool {
        self.pending.iter().any(|pending| pending.installed.is_some())
    }

    /// An install may be lost on the way, and raft waits for its result for ever: after two timeouts without it is offered anew.
    fn offer_again(&mut self) {
        let waits = |progress: &raft::Progress| progress.state == raft::ProgressState::Snapshot;
        let mut waiting: Vec<_> = self.raw.raft.prs().iter().filter(|(_, progress)| waits(progress)).map(|(id, _)| (*id, 0)).collect();
        waiting.sort_unstable();
        for (id, ticks) in &mut waiting {
            *ticks = self.installing.iter().find(|(other, _)| other == id).map_or(0, |(_, ticks)| ticks + 1);
            if *ticks >= 2 * self.config.timing.election {
                self.raw.report_snapshot(*id, SnapshotStatus::Failure);
                *ticks = 0;
            }
        }
        self.installing = waiting;
    }

    fn step(&mut self, mut message: Message) -> Result<(), Refused> {
        if let MessageBody::Heartbeat { commit, .. } = &mut message.body
            && self.floor.is_some()
            && !self.canary(Canary::ForgetFloor)
        {
            // It goes by what this member acknowledged, which may be what is lost: other entries may stand there. An append shows what it is about.
            *commit = Index(0);
        }
        let restarted = self.withhold > 0 && !self.canary(Canary::VoteAtOnce);
        let floor = self.floor.filter(|_| !self.canary(Canary::ForgetFloor));
        let checker = Checker { segment: self.config.segment, me: self.config.me, members: &self.members, restarted, floor };
        if !self.canary(Canary::StepUnchecked) {
            let checked = checker.check(&self.raw, &message);
            if matches!(checked, Err(Refused::Overtaken { .. })) {
                // Its copy is late, or what it acknowledged is lost and the acknowledgement was late: it shows again what it has.
                self.on_restarted(message.from);
            }
            checked?;
        }
        if matches!(message.body, MessageBody::Campaign) && (self.rebuilding || self.installs()) {
            return Err(Refused::Installing);
        }
        if let MessageBody::Sleep { last } = message.body {
            self.on_sleep(&message, last);
            return Ok(());
        }
        self.wake();
        if matches!(message.body, MessageBody::Append(ref append) if !append.entries.is_empty()) {
            self.idle = 0;
        }
        if let Some(message) = convert::incoming(message) {
            // What raft refuses by an error (an answer from no member) was refused above.
            let _ = self.raw.step(message);
        }
        Ok(())
    }

    fn may_propose(&mut self, term: Term) -> Result<(), ProposeError> {
        if !self.leads() || self.term() != term {
            return Err(ProposeError::NotLeader);
        }
        if self.raw.raft.lead_transferee.is_some() {
            return Err(ProposeError::SteppingAside);
        }
        self.wake();
        Ok(())
    }

    fn propose(&mut self, term: Term, ops: Vec<u8>) -> Result<Index, ProposeError> {
        if ops.is_empty() || ops.len() > batch::OPS_MAX {
            return Err(ProposeError::Invalid);
        }
        self.may_propose(term)?;
        self.idle = 0;
        self.raw.propose(Vec::new(), ops).map_err(|_| ProposeError::NotLeader)?;
        let index = self.raw.raft.raft_log.last_index();
        assert!(index < COUNT_LIMIT, "indices are used up");
        Ok(Index(index))
    }

    fn change(&mut self, term: Term, members: &Members) -> Result<Index, ProposeError> {
        members.check().map_err(|_| ProposeError::Invalid)?;
        self.may_propose(term)?;
        if members.get(self.config.me).is_none() {
            return Err(ProposeError::TransferFirst);
        }
        let change = one_step(&self.members, members).ok_or(ProposeError::NotOneStep)?;
        if self.raw.raft.has_pending_conf() {
            return Err(ProposeError::ChangePending);
        }
        self.idle = 0;
        self.raw.propose_conf_change(members.encode(), change).map_err(|_| ProposeError::ChangePending)?;
        Ok(Index(self.raw.raft.raft_log.last_index()))
    }

    fn may_read(&self, now: Millis) -> bool {
        if self.canary(Canary::ReadUnproven) {
            return self.leads();
        }
        if self.asleep {
            // Nobody renews it: whoever wakes first may lead by now.
            return self.leads() && self.canary(Canary::LeaseAsleep);
        }
        self.leads() && self.raw.raft.apply_to_current_term() && self.rounds.lease_holds(self.term(), now)
    }

    fn transfer(&mut self, to: MemberNo) {
        if self.leads() && to != self.config.me && self.members.get(to).is_some_and(|member| member.role.votes()) {
            self.wake();
            if !self.canary(Canary::LeaseOverTransfer) {
                self.rounds.transfer_begins(self.term());
                self.rounds.drop_lease();
            }
            self.raw.transfer_leader(to.0);
        }
    }

    fn on_persisted(&mut self, mark: Mark) {
        for pending in &mut self.pending {
            if pending.number > mark.0 {
                break;
            }
            pending.persisted = true;
        }
    }

    fn on_restarted(&mut self, member: MemberNo) {
        self.wake();
        let (last, term) = (self.raw.raft.raft_log.last_index(), self.term());
        self.shown.retain(|(_, of, _)| *of == term);
        if self.leads()
            && member != self.config.me
            && let Some(progress) = self.raw.raft.mut_prs().get_mut(member.0)
        {
            let matched = Index(progress.matched);
            match self.shown.iter_mut().find(|(no, ..)| *no == member) {
                Some((_, _, shown)) => *shown = matched.max(*shown),
                None => self.shown.push((member, term, matched)),
            }
            progress.matched = 0;
            progress.become_probe();
            progress.next_idx = last + 1;
        }
    }

    fn wake(&mut self) {
        if self.asleep {
            self.asleep = false;
            self.idle = 0;
            // It was silent by agreement: a quorum need not have been heard of in the timeout that was running.
            self.raw.raft.election_elapsed = 0;
        }
    }

    fn settled(&self) -> bool {
        let log = &self.raw.raft.raft_log;
        let last = log.last_index();
        self.pending.is_empty() && log.committed == last && log.persisted == last && log.applied == last && !self.raw.has_ready()
    }

    fn consider_sleep(&mut self) {
        let Some(after) = self.config.timing.sleep else { return };
        let last = self.raw.raft.raft_log.last_index();
        if !self.leads()
            || !self.is_whole()
            || self.idle < after
            || !self.settled()
            || !self.rounds.is_idle()
            || self.raw.raft.lead_transferee.is_some()
        {
            return;
        }
        if !self.raw.raft.apply_to_current_term() || self.raw.raft.prs().iter().any(|(_, progress)| progress.matched != last) {
            return;
        }
        let (segment, from, term) = (self.config.segment, self.config.me, self.term());
        let others = self.members.list.iter().map(|member| member.no).filter(|no| *no != from);
        self.notes.extend(others.map(|to| Message { segment, from, to, term, body: MessageBody::Sleep { last: Index(last) } }));
        self.rounds.drop_lease();
        self.asleep = true;
    }

    fn on_sleep(&mut self, message: &Message, last: Index) {
        let raft = &self.raw.raft;
        let follows = raft.state == StateRole::Follower && raft.term == message.term.0 && raft.leader_id == message.from.0;
        if follows && raft.raft_log.last_index() == last.0 && self.settled() {
            self.asleep = true;
        }
    }

    fn settle(&mut self, now: Millis, out: &mut Output) {
        self.hand_over();
        self.begin_round(now);
        loop {
            self.retire(out);
            if !self.raw.has_ready() {
                break;
            }
            self.handle_ready(now, out);
        }
        if self.floor.is_some() {
            self.look_at_floor();
        }
        out.resolved |= std::mem::take(&mut self.resolved);
        if self.leads() {
            self.rounds.served(self.raw.raft.raft_log.applied, &mut out.reads);
        } else {
            self.rounds.lost(&mut out.reads_refused);
        }
        out.too_slow = self.is_too_slow(now);
        out.send.append(&mut self.notes);
        if let Some(wanted) = self.raw.store().take_wanted() {
            out.wants_install = Some(wanted);
        }
    }

    /// See [`Pace`].
    fn is_too_slow(&mut self, now: Millis) -> bool {
        let Some(limit) = self.config.timing.aside.filter(|_| self.leads() && self.raw.raft.lead_transferee.is_none()) else {
            return false;
        };
        let log = &self.raw.raft.raft_log;
        let log = Log { term: self.raw.raft.term, last: log.last_index(), committed: log.committed, persisted: log.persisted };
        self.pace.look(now, log, u64::from(limit) * u64::from(self.config.timing.tick))
    }

    fn begin_round(&mut self, now: Millis) {
        // Before an entry of its own term is committed a leader does not know what is: raft would drop the question.
        if self.leads() && self.raw.raft.commit_to_current_term() {
            let reuse = self.canary(Canary::ReuseRound);
            if let Some(round) = self.rounds.begin(self.term(), now, reuse) {
                self.wake();
                self.raw.read_index(convert::round_bytes(round));
            }
        }
    }

    fn handle_ready(&mut self, now: Millis, out: &mut Output) {
        let mut ready = self.raw.ready();
        let mut persist = Persist { mark: Mark(ready.number()), ballot: None, entries: Vec::new(), install: None };
        if !ready.snapshot().is_empty() {
            let install = convert::install(ready.snapshot()).expect("made from a checked install");
            self.raw.mut_store().install(&install);
            self.members = install.members.clone();
            out.members = Some(install.members.clone());
            persist.install = Some(install);
        }
        let entries = ready.take_entries();
        self.raw.mut_store().append(&entries);
        persist.entries = entries.iter().map(convert::entry).collect();
        if let Some(hard) = ready.hs() {
            let ballot = Ballot { term: Term(hard.term), vote: MemberNo(hard.vote) };
            if ballot != self.ballot_sent {
                self.ballot_sent = ballot;
                persist.ballot = Some(ballot);
            }
        }
        for state in ready.take_read_states() {
            if let Some(round) = convert::round(&state.request_ctx) {
                let (receive, over) = (self.canary(Canary::LeaseFromReceive), self.canary(Canary::LeaseOverTransfer));
                self.rounds.answered(round, state.index, &self.config.timing, now, receive, over);
            }
        }
        // A sole voter leads before its new term is persisted: its learners must not hear of a term that a crash could give out twice.
        let promised = self.ballot_durable == self.ballot_sent;
        let mut held = ready.take_messages();
        let mut sent = Vec::new();
        if self.leads() && promised {
            sent = std::mem::take(&mut held);
        }
        held.extend(ready.take_persisted_messages());
        if self.canary(Canary::AnswerEarly) {
            sent.append(&mut held);
        }
        for message in sent {
            convert::outgoing(self.config.segment, message, &mut out.send);
        }
        let committed = ready.take_committed_entries();
        let number = ready.number();
        self.raw.advance_append_async(ready);
        let ballot = persist.ballot;
        if self.canary(Canary::ForgetBallot) {
            persist.ballot = None;
        }
        let bare = persist.ballot.is_none() && persist.entries.is_empty() && persist.install.is_none();
        let installed = persist.install.as_ref().map(|install| install.index);
        self.pending.push_back(Pending { number, held, ballot, installed, persisted: bare });
        if !bare {
            out.persist.push(persist);
        }
        if self.canary(Canary::CountUnpersisted) && self.leads() {
            self.raw.on_persist_ready(number);
        }
        self.apply(committed, out);
    }

    /// Retires what is persisted, strictly in order.
    fn retire(&mut self, out: &mut Output) {
        while self.pending.front().is_some_and(|pending| pending.persisted) {
            let pending = self.pending.pop_front().expect("just seen");
            if let Some(ballot) = pending.ballot {
                self.ballot_durable = ballot;
            }
            self.raw.on_persist_ready(pending.number);
            if let Some(index) = pending.installed {
                self.raw.advance_apply_to(index.0);
            }
            for message in pending.held {
                convert::outgoing(self.config.segment, message, &mut out.send);
            }
        }
    }

    fn apply(&mut self, committed: Vec<raft::eraftpb::Entry>, out: &mut Output) {
        let Some(last) = committed.last().map(|entry| entry.index) else { return };
        for entry in committed {
            if entry.get_entry_type() == EntryType::EntryNormal {
                out.apply.push(convert::entry(&entry));
                continue;
            }
            let members = Members::decode(&entry.context).expect("checked when it came in");
            if members.precedes(&self.members) {
                out.apply.push(convert::entry(&entry));
                continue;
            }
            if let Some(change) = raft_change(&self.members, &members) {
                self.raw.apply_conf_change(&change).unwrap_or_else(|error| panic!("a change of members that raft refuses: {error}"));
            }
            self.members = members;
            out.members = Some(self.members.clone());
            out.apply.push(convert::entry(&entry));
        }
        self.raw.advance_apply_to(last);
        if self.leads() && !self.members.voters().any(|no| no == self.config.me) {
            // Raft would go on leading a group that it has left.
            let term = self.raw.raft.term;
            self.raw.raft.become_follower(term, raft::INVALID_ID);
        }
    }
}
