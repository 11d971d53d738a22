//! The groups of a store: time, peers' nodes, and the turn of each group that something happened to.
//!
//! ```text
//! tell what is persisted → propose what is ready → Group::settle → log and queue what is to persist (carry), send (send), apply (below),
//! answer reads (lead) → again while a group was touched, a few times
//! ```
//! Here too: what is committed takes effect, and how a group ends. Not here: hosts (`lead`), what peers say (`follow`), batches (`carry`).

use crate::carry::Item;
use crate::compare::Compare;
use crate::config::{Canary, MemberView, Stage};
use crate::force::Force;
use crate::host::Proposed;
use crate::map::{PageKey, Replica};
use crate::member::{Member, MemberStage, Payload};
use crate::port::*;
use crate::rebuild::{Own, Source};
use crate::repair::Repair;
use crate::replica::{Group, GroupConfig, Output, Part as GroupPart, Recovered, Stop};
use crate::send::Waiting;
use crate::store::Store;
use penstock_wire::batch::{Op, Section};
use penstock_wire::peer::{Entry, EntryKind, MemberNo, Members};
use penstock_wire::{Incarnation, NodeId, Seq};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// Times that groups are settled in one turn at most: what is left goes on in the next.
const ROUNDS: usize = 4;

/// What the groups of a store share.
#[derive(Default, Debug)]
pub(crate) struct Groups {
    /// Replicas that are members, in order of their birth or recovery.
    pub list: Vec<ReplicaNo>,
    /// Those to settle in this turn.
    touched: Vec<ReplicaNo>,
    /// Those with marks that are not told yet.
    pub marked: Vec<ReplicaNo>,
    out: Output,
    /// To go into batches, in order.
    pub queue: VecDeque<Item>,
    pub section: Section,
    /// Owners of a buffer that several entries share, and its blocks.
    refs: FxHashMap<BufId, (u32, u32)>,
    /// Blocks of peers' payloads that are held: see `HELD_MAX` in `follow`.
    pub held_blocks: u64,
    /// Named by what was sent in this turn: freed when the next one is settled.
    limbo: Vec<BufId>,
    /// Ops whose entries were replaced while the device has their payload: answered with their batch.
    pub orphans: Vec<(Seq, Vec<Proposed>)>,
    pub sends: VecDeque<Waiting>,
    pub next_send: u32,
    /// Of words that are answered: see `number_word`.
    pub next_word: u32,
    /// A follower found no space for what came: everything is to be drained.
    pub wants_space: bool,
    /// Members that are being rebuilt, and those that others are rebuilt from; and what of it is on its way through the log.
    pub rebuilding: Vec<ReplicaNo>,
    pub source: Source,
    pub own: FxHashMap<u32, Own>,
    pub next_own: u32,
    /// Blocks that are asked of other members, and that they ask of this one.
    pub repair: Repair,
    /// Pages that are compared with what other members have, and extents that differed.
    pub compare: Compare,
    /// Pages that may tell that there is more space than it seems.
    pub pages: Vec<PageKey>,
    /// Members of which others want to hear that their opening is recorded; and somebody has news of an opening of ours to tell.
    pub asked: Vec<ReplicaNo>,
    pub tells: bool,
    /// Members that are to go on alone.
    pub forces: Vec<Force>,
    /// Members whose openings are believed, until their own drives know that.
    pub claims: Vec<ReplicaNo>,
    /// Members that ask the others how their logs end.
    pub doubtful: Vec<ReplicaNo>,
    awake: usize,
    ticked: Option<Millis>,
    /// What each node showed last.
    nodes: FxHashMap<NodeId, Incarnation>,
}

impl Groups {
    /// A peer's payload came in.
    pub fn take_in(&mut self, buf: BufId, blocks: u32) {
        self.refs.insert(buf, (1, blocks));
        self.held_blocks += u64::from(blocks);
    }

    /// One more owner.
    pub fn hold(&mut self, buf: BufId) {
        self.refs.get_mut(&buf).expect("a buffer has an owner before it has two").0 += 1;
    }

    pub fn release(&mut self, buf: BufId) {
        let (count, blocks) = self.refs.get_mut(&buf).expect("a buffer is let go of by its owners alone");
        *count -= 1;
        if *count == 0 {
            self.held_blocks -= u64::from(*blocks);
            self.refs.remove(&buf);
            self.limbo.push(buf);
        }
    }

    pub fn free_later(&mut self, buf: BufId) {
        self.limbo.push(buf);
    }

    /// Payload blocks that wait for a batch, a header's worth for each entry.
    pub fn queued_blocks(&self) -> u64 {
        self.queue.iter().map(|item| u64::from(item.blocks()) + 1).sum()
    }

    /// A member that was stopped is not any more.
    pub fn woke(&mut self) {
        self.awake += 1;
    }

    /// Nothing is under way; sleeping groups need no time.
    pub fn are_idle(&self) -> bool {
        self.awake == 0
            && self.is_flushed()
            && self.touched.is_empty()
            && self.sends.is_empty()
            && self.forces.is_empty()
            && self.rebuilding.is_empty()
            && self.source.is_idle()
            && self.repair.is_idle()
            && self.compare.is_idle()
    }

    /// Nothing waits for the stream, and no memory is held.
    pub fn is_flushed(&self) -> bool {
        self.queue.is_empty()
            && self.marked.is_empty()
            && self.asked.is_empty()
            && self.claims.is_empty()
            && self.limbo.is_empty()
            && self.orphans.is_empty()
    }
}

impl Store {
    #[inline]
    pub(crate) fn member(&self, no: ReplicaNo) -> Option<&Member> {
        self.map.get(no)?.member.as_deref()
    }

    #[inline]
    pub(crate) fn member_mut(&mut self, no: ReplicaNo) -> Option<&mut Member> {
        self.map.get_mut(no)?.member.as_deref_mut()
    }

    /// See [`Replica::has_caught_up`].
    pub(crate) fn has_caught_up(&self, no: ReplicaNo) -> bool {
        self.map.get(no).is_none_or(Replica::has_caught_up)
    }

    pub(crate) fn touch(&mut self, no: ReplicaNo) {
        if let Some(member) = self.member_mut(no)
            && !std::mem::replace(&mut member.touched, true)
        {
            self.groups.touched.push(no);
        }
    }

    /// A member that stands in the map takes part from here on.
    pub(crate) fn enlist(&mut self, no: ReplicaNo) {
        let Some(member) = self.member_mut(no) else { return };
        member.awake = !matches!(member.stage, MemberStage::Stopped(_));
        self.groups.awake += usize::from(member.awake);
        self.groups.list.push(no);
        self.groups.tells = true;
        self.promise_log(no);
        self.touch(no);
    }

    /// Builds the group of a member from what is known of it. What contradicts itself stops this group alone.
    pub(crate) fn raise_group(&self, no: ReplicaNo, me: MemberNo, from: Recovered) -> MemberStage {
        let replication = &self.config.replication;
        let segment = self.map.get(no).map(|replica| replica.shape.segment).expect("a member's replica stands");
        let config = GroupConfig { segment, me, timing: replication.timing, canary: replication.canary };
        match Group::open(config, from) {
            Ok(group) => MemberStage::Up(Box::new(group)),
            Err(error) => MemberStage::Stopped(Stop::Quarantined(error.to_string())),
        }
    }

    /// Frees what the sends of the turn before named: they are carried out by now.
    #[inline]
    pub(crate) fn free_sent<M: Memory>(&mut self, mem: &mut M) {
        while let Some(buf) = self.groups.limbo.pop() {
            mem.free(buf);
        }
    }

    /// Frees a buffer of a host's command, unless something that leaves in this turn may name it.
    pub(crate) fn let_go<M: Memory>(&mut self, no: ReplicaNo, buf: BufId, mem: &mut M) {
        if self.member(no).is_some() {
            self.groups.free_later(buf);
        } else {
            mem.free(buf);
        }
    }

    /// The groups' part of a turn.
    pub(crate) fn settle_groups<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        let aside = self.groups.source.is_idle() && self.groups.repair.is_idle() && self.groups.compare.is_idle();
        if self.groups.list.is_empty() && self.groups.sends.is_empty() && aside {
            return;
        }
        if self.stage != Stage::Serving {
            self.settle_sends(mem, fx);
            self.settle_source(mem, fx);
            self.settle_repair(mem, fx);
            self.settle_compares(mem, fx);
            return;
        }
        self.tell_claims();
        if self.groups.tells {
            self.tell_openings(fx);
        }
        self.answer_recorded(fx);
        self.settle_forces(mem, fx);
        for _ in 0..ROUNDS {
            self.tell_marks();
            self.gather(mem, fx);
            if self.groups.touched.is_empty() {
                break;
            }
            for no in std::mem::take(&mut self.groups.touched) {
                self.settle_group(no, mem, fx);
            }
            // What was applied, or never will be, may be what merges wait for.
            self.retry_waiters(mem, fx);
        }
        for key in std::mem::take(&mut self.groups.pages) {
            if self.map.page(key).is_some_and(|page| page.cached.is_none()) {
                self.load_page(key, mem, fx);
            }
        }
        self.settle_repair(mem, fx);
        self.settle_sends(mem, fx);
        self.settle_source(mem, fx);
        self.settle_rebuilds(mem, fx);
        self.settle_compares(mem, fx);
    }

    fn settle_group<M: Memory>(&mut self, no: ReplicaNo, mem: &mut M, fx: &mut Effects) {
        let now = self.now;
        let Some(member) = self.member_mut(no) else { return };
        member.touched = false;
        let asking = std::mem::take(&mut member.asking);
        let (flushes, reads): (Vec<_>, Vec<_>) = asking.into_iter().partition(|id| self.host.job(*id).op == HostOp::Flush);
        let mut out = std::mem::take(&mut self.groups.out);
        let Some(group) = self.member_mut(no).and_then(Member::group_mut) else { return };
        // Asked now and not when the command came: what came in the same turn after it may have ended this member's leading.
        let may_read = group.may_read(now);
        for id in reads.iter().filter(|_| !may_read) {
            group.read(u64::from(id.0));
        }
        group.settle(now, &mut out);
        let stopped = group.stopped().cloned();
        match stopped {
            Some(stop) => self.stop_group(no, stop, mem, fx),
            None => {
                self.carry_out(no, &mut out, mem, fx);
                self.drop_staged(no);
                self.stand(no, mem, fx);
                for id in flushes.into_iter().chain(reads.into_iter().filter(|_| may_read)) {
                    if self.host.is_proving(id, no) {
                        self.proven(id, mem, fx);
                    }
                }
            }
        }
        out.clear();
        self.groups.out = out;
    }

    /// Does what a group wants done, in its order.
    fn carry_out<M: Memory>(&mut self, no: ReplicaNo, out: &mut Output, mem: &mut M, fx: &mut Effects) {
        for persist in out.persist.drain(..) {
            self.queue_persist(no, persist, mem, fx);
        }
        if out.resolved {
            self.queue_resolved(no);
        }
        if out.too_slow {
            self.step_aside(no, fx);
        }
        if out.wants_install.is_some() {
            self.offer_install(no);
        }
        for message in out.send.drain(..) {
            let to = message.to;
            self.send_word(no, to, PeerWord::Group(message), fx);
        }
        for entry in out.apply.drain(..) {
            self.apply_entry(no, &entry, mem, fx);
        }
        self.applied_to(no);
        for id in out.reads.drain(..) {
            self.proven(crate::host::JobId(id as u32), mem, fx);
        }
        for id in out.reads_refused.drain(..) {
            self.finish_job(crate::host::JobId(id as u32), Status::NotReady, mem, fx);
        }
    }

    /// An entry that is committed and persisted here takes effect. Whoever waits for it is answered.
    fn apply_entry<M: Memory>(&mut self, no: ReplicaNo, entry: &Entry, mem: &mut M, fx: &mut Effects) {
        self.drain.unsaved = true;
        let member = self.member_mut(no).expect("a group that applies has its member");
        member.untold_blocks = member.untold_blocks.saturating_add(entry.payload_blocks + 1);
        let logged = member.get_mut(entry.index).expect("what is applied is in the log");
        let seq = logged.seq.expect("what is applied is persisted");
        let promised = std::mem::take(&mut logged.promised);
        let mut at = match logged.payload {
            Payload::Ring { at } => at,
            Payload::None => 0,
            other => unreachable!("what is applied is on the drive, not {other:?}"),
        };
        let ours = member.proposals.front().is_some_and(|proposal| proposal.index == entry.index);
        let proposal = if ours { member.proposals.pop_front() } else { None };
        let (mut promises, mut pages) = self.take_promised(no, &promised);
        match entry.kind {
            EntryKind::Members => {
                let members = Members::decode(&entry.bytes).expect("checked when it came in");
                let member = self.member_mut(no).expect("seen above");
                if !members.precedes(&member.members) {
                    member.known.retain(|known| !members.was_removed(known.seen.no));
                    member.members = members;
                }
            }
            EntryKind::Ops => {
                let content = self.member(no).is_some_and(Member::has_content);
                for op in entry.ops().expect("checked when it came in") {
                    let blocks = op.payload_blocks();
                    match op {
                        Op::Write { .. } | Op::Zero { .. } if !content => {}
                        Op::Write { block, crcs } => self.apply_write(no, block, entry.index.0, seq, at, &crcs, &mut promises),
                        Op::Zero { block, count } => self.apply_zero(no, block, u64::from(count), seq, entry.index.0, &mut pages),
                        Op::Resize { blocks } => {
                            self.apply_resize(no, blocks, seq, entry.index.0, &mut pages, fx);
                            self.note_resized(no, entry.index);
                        }
                        Op::Reserve(state) => self.apply_reserve(no, *state),
                        Op::Snapshot { blocks, shape } => self.map.freeze(no, *shape, blocks, entry.index),
                        Op::Unsnapshot(id) => {
                            self.apply_unsnapshot(no, id, self.stream.persisted());
                            self.note_removed(no, entry.index);
                        }
                        _ => unreachable!("a store's own op in a group's log"),
                    }
                    at += blocks;
                }
            }
        }
        self.give_up_promises(promises + pages);
        if let Some(member) = self.member_mut(no).filter(|member| !member.markers.is_empty()) {
            member.markers.retain(|marker| *marker > entry.index);
        }
        for op in proposal.into_iter().flat_map(|proposal| proposal.ops) {
            self.op_done(op, Status::Ok, mem, fx);
        }
        self.change_applied(no, entry.index, fx);
    }

    /// Entries without ops are not handed out one by one.
    fn applied_to(&mut self, no: ReplicaNo) {
        let Some(replica) = self.map.get_mut(no) else { return };
        let had_caught_up = replica.has_caught_up();
        let Some(member) = replica.member.as_deref_mut() else { return };
        let Some(view) = member.group().and_then(Group::view) else { return };
        if view.applied > replica.applied {
            replica.applied = view.applied;
            member.applied_term = member.term_at(view.applied).expect("what is applied is in the log");
            self.drain.unsaved = true;
            if replica.has_caught_up() && !had_caught_up {
                self.count_merges();
            }
        }
    }

    /// Tells what the member's part has become, and gives up serving where it is over.
    fn stand<M: Memory>(&mut self, no: ReplicaNo, mem: &mut M, fx: &mut Effects) {
        let Some(member) = self.member_mut(no) else { return };
        let view = member.group().and_then(Group::view);
        let awake = view.is_some_and(|view| !view.asleep);
        let was_awake = std::mem::replace(&mut member.awake, awake);
        let serving = view.filter(|view| view.serves).map(|view| view.term);
        let standing = match view {
            Some(view) => Standing { part: view.part, term: view.term, leader: member.node_of(view.leader), serves: serving.is_some() },
            None => Standing { part: GroupPart::Follower, term: member.ballot.term, leader: None, serves: false },
        };
        let over = member.serving.is_some() && member.serving != serving;
        member.serving = serving;
        let changed = member.standing != Some(standing);
        member.standing = Some(standing);
        self.groups.awake = self.groups.awake + usize::from(awake) - usize::from(was_awake);
        if over {
            self.step_down(no, mem, fx);
        }
        if changed {
            fx.list.push(Effect::Notice(Notice::Standing { replica: no, standing }));
        }
    }

    /// The group says nothing any more. Its log stays: what is not applied is what the next life begins from.
    pub(crate) fn stop_group<M: Memory>(&mut self, no: ReplicaNo, stop: Stop, mem: &mut M, fx: &mut Effects) {
        let Some(member) = self.member_mut(no).filter(|member| !matches!(member.stage, MemberStage::Stopped(_))) else { return };
        let why = (stop != Stop::Forced).then(|| stop.to_string());
        member.stage = MemberStage::Stopped(stop);
        member.marks.clear();
        // What is in no batch will never be in one.
        let kept = member.log.iter().take_while(|logged| logged.seq.is_some()).count() as u64;
        let from = penstock_wire::Index(member.start.0 + kept + 1);
        self.void_items(no, from);
        self.groups.marked.retain(|marked| *marked != no);
        if let Some(member) = self.member_mut(no) {
            member.marked = false;
        }
        self.drop_staged(no);
        self.stop_rebuild(no);
        self.step_down(no, mem, fx);
        self.truncate(no, from, mem, fx);
        // The device has these.
        let member = self.member_mut(no).expect("seen above");
        for proposal in std::mem::take(&mut member.proposals) {
            let seq = self.member(no).and_then(|member| member.get(proposal.index)).and_then(|logged| logged.seq);
            self.groups.orphans.push((seq.expect("what is in no batch was cut off"), proposal.ops));
        }
        self.stand(no, mem, fx);
        fx.list.extend(why.map(|why| Effect::Notice(Notice::GroupStopped { replica: no, why })));
    }

    /// The drive is fenced: nothing of any group counts any more.
    pub(crate) fn stop_groups<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        for no in self.groups.list.clone() {
            if let Some(group) = self.member_mut(no).and_then(Member::group_mut) {
                group.on_persist_failed();
            }
            self.stop_group(no, Stop::PersistFailed, mem, fx);
        }
        self.end_forces(None, &OrderError::Fenced, fx);
    }

    /// The store stops: groups say nothing more, and hosts are sent elsewhere. What is in the queue still goes to the drive.
    pub(crate) fn freeze_groups<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        self.end_forces(None, &OrderError::Stopping, fx);
        for no in self.groups.list.clone() {
            self.drop_staged(no);
            self.cancel_sends(no);
            let Some(member) = self.member_mut(no) else { continue };
            member.marks.clear();
            member.marked = false;
            let was_awake = std::mem::take(&mut member.awake);
            let served = member.serving.take().is_some();
            let standing = member.standing.map(|standing| Standing { serves: false, ..standing });
            let changed = standing != member.standing;
            member.standing = standing;
            self.groups.awake -= usize::from(was_awake);
            if served {
                self.step_down(no, mem, fx);
            }
            if let Some(standing) = standing.filter(|_| changed) {
                fx.list.push(Effect::Notice(Notice::Standing { replica: no, standing }));
            }
        }
        self.groups.marked.clear();
        // Nobody is told any more what waits here for a seal: others ask again in the next life, and so does this store.
        self.groups.asked.clear();
        self.groups.claims.clear();
        self.groups.queue.iter_mut().for_each(|item| item.mark = None);
    }

    /// The replica of a member is gone for good.
    pub(crate) fn drop_member<M: Memory>(&mut self, no: ReplicaNo, mem: &mut M, fx: &mut Effects) {
        let Some(member) = self.member(no) else { return };
        let first = penstock_wire::Index(member.start.0 + 1);
        self.void_items(no, first);
        self.truncate(no, first, mem, fx);
        self.stop_rebuild(no);
        self.end_forces(Some(no), &OrderError::NoSuchSegment, fx);
        self.groups.list.retain(|listed| *listed != no);
        self.groups.doubtful.retain(|listed| *listed != no);
    }

    /// Time for every group: as many ticks as have passed, but not all at once what passed while nobody looked.
    pub(crate) fn tick_groups(&mut self) {
        let timing = self.config.replication.timing;
        let tick = u64::from(timing.tick.max(1));
        let since = self.groups.ticked.unwrap_or(self.now);
        let passed = (self.now.0 - since.0) / tick;
        self.groups.ticked = Some(if passed > u64::from(timing.heartbeat) { self.now } else { Millis(since.0 + passed * tick) });
        let ticks = passed.min(u64::from(timing.heartbeat));
        if ticks == 0 {
            return;
        }
        for at in 0..self.groups.list.len() {
            let no = self.groups.list[at];
            let Some(member) = self.member_mut(no) else { continue };
            let (awake, speaks) = (member.awake, member.speaks());
            if let Some(group) = member.group_mut().filter(|_| speaks) {
                for _ in 0..ticks {
                    group.tick();
                }
            }
            if awake {
                self.touch(no);
            }
        }
    }

    pub(crate) fn on_peer_up(&mut self, node: NodeId, incarnation: Incarnation) {
        let restarted = self.groups.nodes.insert(node, incarnation) != Some(incarnation);
        self.tell_again(node);
        self.tell_of_node(node, |group, no| {
            group.wake();
            if restarted {
                group.on_restarted(no);
            }
        });
    }

    pub(crate) fn on_peer_down(&mut self, node: NodeId) {
        self.tell_of_node(node, |group, no| {
            group.wake();
            group.on_unreachable(no);
        });
    }

    pub(crate) fn on_peer_lost(&mut self, node: NodeId) {
        self.tell_of_node(node, |group, no| group.on_unreachable(no));
    }

    /// Tells every group that has a member on `node`.
    fn tell_of_node(&mut self, node: NodeId, tell: impl Fn(&mut Group, MemberNo)) {
        if node == self.config.replication.node {
            return;
        }
        for at in 0..self.groups.list.len() {
            let no = self.groups.list[at];
            let Some(member) = self.member_mut(no) else { continue };
            let Some(there) = member.members.list.iter().find(|other| other.node == node).map(|other| other.no) else { continue };
            if let MemberStage::Up(group) = &mut member.stage {
                tell(group, there);
                self.touch(no);
            }
        }
    }

    /// First batch that entries need which are not applied, and whose they are.
    pub(crate) fn unapplied_first(&self) -> Option<(Seq, ReplicaNo)> {
        let needed = |no: &ReplicaNo| {
            let replica = self.map.get(*no)?;
            Some((replica.member.as_deref()?.needed_from(replica.applied)?, *no))
        };
        self.groups.list.iter().filter_map(needed).min()
    }

    /// First batch that some group keeps for members that lag: what a leader knows not all to have, and all that a follower or a log-only member has.
    fn wanted_from(&self) -> Option<Seq> {
        let wanted = |no: &ReplicaNo| {
            let replica = self.map.get(*no)?;
            let member = replica.member.as_deref()?;
            let from = match member.group().map(Group::matched) {
                _ if !member.has_content() && self.canary(Canary::TrimLogOnly) => replica.applied,
                Some(matched) if member.has_content() && !matched.is_empty() => {
                    matched.iter().map(|(_, index)| *index).min().expect("not empty")
                }
                _ => member.start,
            };
            // One more than that: after a restart only the entry before the first that is kept can tell what stands before the rest.
            let lags = from < member.last();
            member.needed_from(penstock_wire::Index(from.0.saturating_sub(u64::from(lags))))
        };
        self.groups.list.iter().filter_map(wanted).min()
    }

    /// First batch of what members that are being rebuilt keep: see [`crate::rebuild::Rebuild::reached`].
    fn kept_from(&self) -> Option<Seq> {
        let kept = |no: &ReplicaNo| {
            let member = self.member(*no)?;
            let reached = member.rebuild.as_ref()?.reached;
            // One more, as above.
            (reached < member.last()).then(|| member.needed_from(penstock_wire::Index(reached.0.saturating_sub(1))))?
        };
        self.groups.list.iter().filter_map(kept).min()
    }

    /// How far a checkpoint may let go of the log, where undrained blocks need nothing up to `drained`: never what is not applied, and,
    /// while the log is at most half used by it, nothing that members that lag may ask for. Nor, while copies have room
    /// in it, what no whole member may have.
    pub(crate) fn log_covers(&self, drained: Seq) -> Seq {
        if self.groups.list.is_empty() {
            return drained;
        }
        let mut covers = drained;
        if let Some((seq, _)) = self.unapplied_first() {
            covers = covers.min(Seq(seq.0 - 1));
        }
        let (used, limit) = (self.stream.used(), self.stream.host_limit());
        if let Some(wanted) = self.wanted_from() {
            // Less of it when there is hardly room for what is new.
            let share = if used * 8 > limit * 7 { limit / 4 } else { limit / 2 };
            covers = covers.min(Seq(wanted.max(self.stream.first_within(share)).0 - 1));
        }
        if let Some(kept) = self.kept_from().filter(|_| self.room_for_copies() > 0) {
            covers = covers.min(Seq(kept.0 - 1));
        }
        covers.max(Seq(self.stream.first_kept().0 - 1))
    }

    /// The log was trimmed: groups let go of entries whose batch is gone.
    pub(crate) fn trim_members(&mut self) {
        let first = self.stream.first_kept();
        for at in 0..self.groups.list.len() {
            let no = self.groups.list[at];
            let Some(replica) = self.map.get_mut(no) else { continue };
            let applied = replica.applied;
            let Some(member) = replica.member.as_deref_mut() else { continue };
            let before = member.start;
            while let Some(front) = member.log.front()
                && front.entry.index <= applied
                && front.seq.is_some_and(|seq| seq < first)
            {
                (member.start, member.start_term) = (front.entry.index, front.entry.term);
                member.log.pop_front();
            }
            let start = member.start;
            if let Some(group) = member.group_mut().filter(|_| start > before) {
                group.trim(start);
            }
        }
    }

    /// Promises of space that entries hold which are not applied.
    pub(crate) fn groups_promises(&self) -> u64 {
        let held = self.groups.list.iter().filter_map(|no| self.member(*no)).map(|member| member.promised.len() as u64);
        held.sum::<u64>() + self.copy_promises()
    }

    /// What each member shows of its group.
    pub fn members(&self) -> Vec<MemberView> {
        self.groups.list.iter().filter_map(|no| self.member_view(*no)).collect()
    }

    /// What a member shows of its group; nothing for a replica that is none.
    pub fn member_view(&self, no: ReplicaNo) -> Option<MemberView> {
        let replica = self.map.get(no)?;
        let member = replica.member.as_deref()?;
        let stopped = if let MemberStage::Stopped(stop) = &member.stage { Some(stop.to_string()) } else { None };
        Some(MemberView {
            no,
            segment: replica.shape.segment,
            me: member.me,
            members: member.members.clone(),
            standing: member.standing,
            doubtful: member.doubts.is_some(),
            admitted: member.admission.admitted,
            stopped,
            group: member.group().and_then(Group::view),
            applied: replica.applied,
            matched: member.group().map(Group::matched).unwrap_or_default(),
            rebuild: member.rebuild.as_ref().map(|rebuild| rebuild.view(replica)),
        })
    }
}
