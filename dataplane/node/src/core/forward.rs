//! Commands of doors that have one path by nature (vhost, vfio-user), to a volume of several replicas: carried out here while this node's member
//! leads, else by the node whose member does, and held while nobody does. And the other side: what such nodes ask of a leader.
//!
//! ```text
//! a host's command -> Outward: its number, its turn -> the store here | Forward to the leader of a term
//! the store's answer | Forwarded                    -> the host, or, where it was not done, Outward again
//! Forward of a peer -> leads in that very term? -> Visitor: not twice -> the store -> Forwarded
//! ```
//! A leader of another term refuses, so nothing that was meant for an old one is carried out late; and a command whose term is lost may be in
//! the log of the next leader, in front of all that it does itself: before the command comes again. Not here: the order ([`super::outward`]), and
//! what makes a command of a node count once ([`super::visitor`]).

use std::collections::{BTreeMap, HashMap, VecDeque};

use penstock_engine::{BufId, Event, HostOp, IoId, Memory, Part, PeerWord, Span, Standing, Status};
use penstock_wire::peer::{Deed, FORWARD_BYTES_MAX, Forward, Forwarded, Outcome};
use penstock_wire::{BLOCK, HostId, Incarnation, NodeId, SegmentId, Term};
use spdk_rs::lend::Payload;

use super::Core;
use super::host::Pending;
use super::outward::{Outward, Target};
use super::port::VolumeSlot;
use super::visitor::{Verdict, Visitor};
use super::volume::OpClass;
use crate::status::NvmeStatus;

/// A command on its way to whoever leads.
#[derive(Clone, Copy, Debug)]
struct Way {
    slot: VolumeSlot,
    id: u64,
    op: HostOp,
}

/// A volume's.
#[derive(Default)]
struct Outgoing {
    queue: Outward,
    ios: BTreeMap<u64, IoId>,
    /// The store stops: what is not done by now is not done.
    closed: bool,
}

/// A peer's word about commands.
type Said = (NodeId, PeerWord, Option<BufId>);

/// Who waits for the answer to a peer's command.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker {
    pub node: NodeId,
    pub id: u64,
    pub session: Incarnation,
    pub segment: SegmentId,
    pub term: Term,
    pub deed: Deed,
    /// Blocks that come back.
    pub blocks: u32,
}

/// See the module.
#[derive(Default)]
pub(super) struct Ways {
    by_io: Vec<Option<Way>>,
    outgoing: HashMap<VolumeSlot, Outgoing>,
    visitors: HashMap<(SegmentId, NodeId), Visitor>,
    said: VecDeque<Said>,
    /// Volumes whose commands may go on.
    due: Vec<VolumeSlot>,
}

impl Ways {
    /// No command waits for another node, or for anybody at all.
    pub fn are_idle(&self) -> bool {
        self.outgoing.values().all(|outgoing| outgoing.queue.is_idle())
    }

    pub fn say(&mut self, said: Said) {
        self.said.push_back(said);
    }

    pub fn are_due(&self) -> bool {
        !self.due.is_empty() || !self.said.is_empty()
    }

    fn of(&self, io: IoId) -> Option<Way> {
        *self.by_io.get(io.0 as usize)?
    }

    /// It is answered, or never will be by its store.
    pub fn forget(&mut self, io: IoId) {
        let Some(way) = self.by_io.get_mut(io.0 as usize).and_then(Option::take) else { return };
        if let Some(outgoing) = self.outgoing.get_mut(&way.slot) {
            outgoing.queue.done(way.id);
            outgoing.ios.remove(&way.id);
        }
    }
}

/// What a command is between nodes; none for one that does not leave its node.
pub(super) fn deed_of(op: HostOp) -> Option<(Deed, Span)> {
    Some(match op {
        HostOp::Read(span) => (Deed::Read, span),
        HostOp::Write(span) => (Deed::Write, span),
        HostOp::Zero(span) => (Deed::Zero, span),
        HostOp::CompareWrite(span) => (Deed::CompareWrite, span),
        HostOp::Flush => (Deed::Flush, Span { offset: 0, len: 0 }),
        HostOp::Reserve(_) | HostOp::ReadSnapshot(..) => return None,
    })
}

fn op_of(deed: Deed, span: Span) -> HostOp {
    match deed {
        Deed::Read => HostOp::Read(span),
        Deed::Write => HostOp::Write(span),
        Deed::Zero => HostOp::Zero(span),
        Deed::CompareWrite => HostOp::CompareWrite(span),
        Deed::Flush => HostOp::Flush,
    }
}

fn outcome_of(status: Status) -> (Outcome, u32) {
    let at = if let Status::Miscompare { at } = status { at } else { 0 };
    let outcome = match status {
        Status::Ok => Outcome::Ok,
        Status::OutOfRange => Outcome::OutOfRange,
        Status::Invalid => Outcome::Invalid,
        Status::NoSpace => Outcome::NoSpace,
        Status::Miscompare { .. } => Outcome::Miscompare,
        Status::Conflict => Outcome::Conflict,
        Status::Unrecovered => Outcome::Unrecovered,
        Status::Fenced => Outcome::Fenced,
        Status::NotReady => Outcome::NotReady,
    };
    (outcome, at)
}

fn status_of(outcome: Outcome, at: u32) -> Status {
    match outcome {
        Outcome::Ok => Status::Ok,
        Outcome::OutOfRange => Status::OutOfRange,
        Outcome::Invalid => Status::Invalid,
        Outcome::NoSpace => Status::NoSpace,
        Outcome::Miscompare => Status::Miscompare { at },
        Outcome::Conflict => Status::Conflict,
        Outcome::Unrecovered => Status::Unrecovered,
        Outcome::Fenced => Status::Fenced,
        Outcome::NotReady => Status::NotReady,
    }
}

fn target_of(standing: Standing, me: NodeId) -> Option<Target> {
    match standing.leader {
        _ if standing.serves => Some(Target::Here(standing.term)),
        Some(node) if node != me => Some(Target::There { node, term: standing.term }),
        _ => None,
    }
}

impl Core {
    /// Takes a command of a door that has no other path.
    pub(super) fn set_out(&mut self, slot: VolumeSlot, io: IoId, op: HostOp) {
        let outgoing = self.ways.outgoing.entry(slot).or_default();
        if outgoing.closed {
            return self.on_reply(io, NvmeStatus::PATH_INACCESSIBLE);
        }
        let (deed, span) = deed_of(op).expect("refused where it came in");
        let id = outgoing.queue.take(span.offset..span.offset.saturating_add(span.len), deed.changes());
        outgoing.ios.insert(id, io);
        let at = io.0 as usize;
        if at >= self.ways.by_io.len() {
            self.ways.by_io.resize(at + 1, None);
        }
        self.ways.by_io[at] = Some(Way { slot, id, op });
        self.push_on(slot);
    }

    /// Who leads a volume may be another now.
    pub(super) fn aim(&mut self, slot: VolumeSlot) {
        if self.ways.outgoing.contains_key(&slot) {
            self.ways.due.push(slot);
            self.waker.wake();
        }
    }

    /// Everything that may go on: part of a turn.
    pub(super) fn work_ways(&mut self, ticked: bool) {
        while let Some((from, word, payload)) = self.ways.said.pop_front() {
            match word {
                PeerWord::Forward(forward) => self.on_forward(from, &forward, payload),
                PeerWord::Forwarded(answer) => self.on_forwarded(from, &answer, payload),
                _ => unreachable!("a store's word"),
            }
        }
        let mut due = std::mem::take(&mut self.ways.due);
        if ticked {
            due.extend(self.ways.outgoing.iter().filter(|(_, outgoing)| !outgoing.queue.is_idle()).map(|(slot, _)| *slot));
        }
        for slot in due.drain(..) {
            self.push_on(slot);
            if ticked {
                self.say_again(slot);
            }
        }
        self.ways.due = due;
    }

    fn push_on(&mut self, slot: VolumeSlot) {
        let volume = &self.volumes[slot.0 as usize];
        let Some(me) = self.shards[volume.shard].as_ref().map(|shard| shard.node) else { return };
        let target = volume.standing.and_then(|standing| target_of(standing, me));
        let Some(outgoing) = self.ways.outgoing.get_mut(&slot) else { return };
        outgoing.queue.aim(target);
        while let Some((id, target)) = self.ways.outgoing.get(&slot).and_then(|outgoing| outgoing.queue.next()) {
            let io = self.ways.outgoing[&slot].ios[&id];
            let way = self.ways.of(io).expect("what waits has its way");
            let went = match target {
                Target::Here(_) => {
                    self.run_here(slot, io, way.op);
                    true
                }
                Target::There { node, term } => self.send_there(way, io, node, term),
            };
            let now = self.clock;
            match self.ways.outgoing.get_mut(&slot) {
                // It may have been answered already.
                Some(outgoing) if went && outgoing.ios.contains_key(&id) => outgoing.queue.went(id, now),
                _ if went => {}
                _ => break,
            }
        }
    }

    fn run_here(&mut self, slot: VolumeSlot, io: IoId, op: HostOp) {
        let (shard, replica) = (self.volumes[slot.0 as usize].shard, self.volumes[slot.0 as usize].replica);
        let shard = self.shards[shard].as_mut().expect("a volume that stands has its store");
        shard.apply(Event::Host { io, replica, host: HostId::default(), op }, self.clock, &mut self.memory);
    }

    fn say_again(&mut self, slot: VolumeSlot) {
        let now = self.clock;
        let Some(outgoing) = self.ways.outgoing.get_mut(&slot) else { return };
        let Some(Target::There { node, term }) = outgoing.queue.target() else { return };
        for id in outgoing.queue.late(now) {
            let io = self.ways.outgoing[&slot].ios[&id];
            let way = self.ways.of(io).expect("what is out has its way");
            if !self.send_there(way, io, node, term) {
                break;
            }
        }
    }

    /// Sends a command to the leader of a term. False: not now. A guest may change its memory meanwhile: what is sent is a copy.
    fn send_there(&mut self, way: Way, io: IoId, node: NodeId, term: Term) -> bool {
        let Some((deed, span)) = deed_of(way.op) else { unreachable!("refused where it came in") };
        let (goes, comes) = deed.payload(span.len);
        if goes.max(comes) > FORWARD_BYTES_MAX {
            self.finish_way(io, NvmeStatus::INVALID_FIELD);
            return true;
        }
        let Some(session) = self.peer_end.incarnation() else { return false };
        let blocks = goes.div_ceil(BLOCK as u64) as u32;
        let mut crcs = Vec::with_capacity(blocks as usize);
        let mut buf = None;
        if blocks > 0 {
            let Some(taken) = self.memory.alloc(blocks) else { return false };
            self.memory.host_to_buf(io, 0, taken, 0, goes as u32);
            self.memory.bytes_mut(taken)[goes as usize..].fill(0);
            crcs.extend(self.memory.bytes(taken).chunks(BLOCK).map(penstock_wire::crc32c));
            buf = Some(taken);
        }
        let segment = self.volumes[way.slot.0 as usize].shape.segment;
        let done = self.ways.outgoing[&way.slot].queue.oldest();
        let forward = Forward { id: way.id, done, session, segment, term, deed, offset: span.offset, len: span.len, crcs };
        let parts = buf.map(|buf| Part::Buf { buf, first: 0, blocks });
        let taken = self.peer_end.say(node, PeerWord::Forward(forward), parts.as_slice(), &self.memory);
        buf.into_iter().for_each(|buf| self.memory.free(buf));
        taken
    }

    /// The store here has answered a command. True: it was one of these.
    pub(super) fn on_way_back(&mut self, io: IoId, status: Status) -> bool {
        let Some(way) = self.ways.of(io) else { return false };
        let outgoing = self.ways.outgoing.get_mut(&way.slot).expect("a way is a volume's");
        if status == Status::NotReady && !outgoing.closed {
            // Looked at again with the clock, or when the standing changes.
            outgoing.queue.back(way.id);
        } else {
            self.answer_way(io, way, status);
        }
        true
    }

    fn on_forwarded(&mut self, from: NodeId, answer: &Forwarded, payload: Option<BufId>) {
        self.take_answer(from, answer, payload);
        payload.into_iter().for_each(|buf| self.memory.free(buf));
    }

    fn take_answer(&mut self, from: NodeId, answer: &Forwarded, payload: Option<BufId>) -> Option<()> {
        let slot = self.slot_of_segment(answer.segment)?;
        let ours = self.peer_end.incarnation() == Some(answer.session);
        let outgoing = self.ways.outgoing.get_mut(&slot).filter(|_| ours)?;
        let target = Target::There { node: from, term: answer.term };
        let io = *outgoing.ios.get(&answer.id).filter(|_| outgoing.queue.is_out(answer.id, target))?;
        if matches!(answer.outcome, Outcome::NotReady | Outcome::Fenced) {
            // Whose drive takes nothing more leads no longer.
            outgoing.queue.back(answer.id);
            return None;
        }
        let way = self.ways.of(io)?;
        let (deed, span) = deed_of(way.op)?;
        let (_, comes) = deed.payload(span.len);
        if comes > 0 && answer.outcome == Outcome::Ok {
            // What is not what it says is as good as lost: it is asked for again.
            let buf = payload.filter(|_| u64::from(answer.payload_blocks()) == comes.div_ceil(BLOCK as u64))?;
            answer.check(&self.memory.bytes(buf)[..answer.payload_blocks() as usize * BLOCK]).ok()?;
            self.memory.buf_to_host(buf, 0, io, 0, comes as u32);
        }
        self.answer_way(io, way, status_of(answer.outcome, answer.at));
        Some(())
    }

    fn answer_way(&mut self, io: IoId, way: Way, status: Status) {
        let is_again = self.ways.outgoing.get(&way.slot).is_some_and(|outgoing| outgoing.queue.is_again(way.id));
        let told = match status {
            // It may have met what it wrote itself.
            Status::Miscompare { .. } if is_again => NvmeStatus::COMMAND_INTERRUPTED,
            status => status.into(),
        };
        self.finish_way(io, told);
    }

    fn finish_way(&mut self, io: IoId, status: NvmeStatus) {
        let slot = self.ways.of(io).map(|way| way.slot);
        self.ways.forget(io);
        self.on_reply(io, status);
        // It may have held up others.
        if let Some(slot) = slot.filter(|slot| self.ways.outgoing[slot].queue.wants()) {
            self.aim(slot);
        }
    }

    /// A store stops: commands that it does not have are told that there is no way, and so is who comes later.
    pub(super) fn close_ways(&mut self, shard: usize) {
        for at in (0..self.volumes.len()).filter(|at| self.volumes[*at].shard == shard).collect::<Vec<_>>() {
            self.close_way(VolumeSlot(at as u32));
        }
    }

    /// The same, of one volume, which is gone.
    pub(super) fn close_way(&mut self, slot: VolumeSlot) {
        let outgoing = self.ways.outgoing.entry(slot).or_default();
        outgoing.closed = true;
        let ios: Vec<IoId> = outgoing.queue.elsewhere().iter().map(|id| outgoing.ios[id]).collect();
        ios.into_iter().for_each(|io| self.finish_way(io, NvmeStatus::PATH_INACCESSIBLE));
    }

    // ---- the leader's side ----

    fn slot_of_segment(&self, segment: SegmentId) -> Option<VolumeSlot> {
        let at = self.volumes.iter().position(|volume| !volume.gone && volume.shape.segment == segment)?;
        Some(VolumeSlot(at as u32))
    }

    fn on_forward(&mut self, from: NodeId, forward: &Forward, payload: Option<BufId>) {
        if let Some(Verdict::Say(outcome, at)) = self.judge_forward(from, forward, payload) {
            self.answer_forward(from, forward.id, forward.session, forward.segment, forward.term, (outcome, at));
        }
    }

    /// Begins what may be begun; otherwise says what is to be said. The payload is used, or free.
    fn judge_forward(&mut self, from: NodeId, forward: &Forward, payload: Option<BufId>) -> Option<Verdict> {
        let not_now = Some(Verdict::Say(Outcome::NotReady, 0));
        let bytes = payload.map_or(&[][..], |buf| &self.memory.bytes(buf)[..forward.payload_blocks() as usize * BLOCK]);
        // A node that was here in another life has nothing more to say; and what is not what it says is as good as lost.
        let counts = self.peer_end.is_up_as(from, forward.session) && forward.check(bytes).is_ok();
        let free = |core: &mut Self| payload.into_iter().for_each(|buf| core.memory.free(buf));
        let slot = self.slot_of_segment(forward.segment).filter(|_| counts);
        let Some(slot) = slot else {
            free(self);
            return None;
        };
        let volume = &self.volumes[slot.0 as usize];
        let leads = volume.standing.is_some_and(|standing| standing.serves && standing.term == forward.term);
        let runs = self.shards[volume.shard].as_ref().is_some_and(|shard| !shard.quarantined);
        if !leads || !runs {
            free(self);
            return not_now;
        }
        let visitor = self.ways.visitors.entry((forward.segment, from)).or_default();
        let verdict = visitor.ask(forward.session, forward.id, forward.done);
        if verdict != Verdict::Run {
            free(self);
            return Some(verdict);
        }
        let (goes, comes) = forward.deed.payload(forward.len);
        let blocks = comes.div_ceil(BLOCK as u64) as u32;
        let payload = match (payload, blocks) {
            (Some(buf), _) => Payload::Buf { buf: self.memory.take_buf(buf), len: goes as usize },
            (None, 0) => Payload::None,
            (None, blocks) => match self.memory.alloc(blocks) {
                Some(buf) => {
                    // What lies behind the last byte that is read leaves this node too.
                    self.memory.bytes_mut(buf)[comes as usize..].fill(0);
                    Payload::Buf { buf: self.memory.take_buf(buf), len: blocks as usize * BLOCK }
                }
                None => {
                    self.visitor_ends(from, forward.segment, forward.id, (Outcome::NotReady, 0), false);
                    return not_now;
                }
            },
        };
        let op = op_of(forward.deed, Span { offset: forward.offset, len: forward.len });
        let (class, bytes) = OpClass::of(op);
        let io = self.memory.put_io(payload);
        let Forward { id, session, segment, term, deed, .. } = *forward;
        let asker = Asker { node: from, id, session, segment, term, deed, blocks };
        self.set_pending(io, Pending::Forwarded { slot, class, bytes, since: spdk_rs::app::ticks(), asker });
        self.volumes[slot.0 as usize].held += 1;
        self.run_here(slot, io, op);
        None
    }

    /// The store has carried out a peer's command, or has not.
    pub(super) fn on_visit_over(&mut self, io: IoId, asker: Asker, status: Status) {
        let (outcome, at) = outcome_of(status);
        let reads = asker.blocks > 0 && outcome == Outcome::Ok;
        let crcs = if reads { (0..asker.blocks).map(|at| self.memory.host_crc(io, at * BLOCK as u32)).collect() } else { Vec::new() };
        let Asker { id, session, segment, term, blocks, .. } = asker;
        let part = reads.then_some(Part::Host { io, offset: 0, blocks });
        let answer = Forwarded { id, session, segment, term, outcome, at, crcs };
        self.peer_end.say(asker.node, PeerWord::Forwarded(answer), part.as_slice(), &self.memory);
        self.visitor_ends(asker.node, segment, id, (outcome, at), asker.deed.changes());
        self.let_go_of_visit(io);
    }

    /// The store will never answer a peer's command.
    pub(super) fn give_up_visit(&mut self, io: IoId, asker: Asker) {
        self.visitor_ends(asker.node, asker.segment, asker.id, (Outcome::NotReady, 0), false);
        self.answer_forward(asker.node, asker.id, asker.session, asker.segment, asker.term, (Outcome::NotReady, 0));
        self.let_go_of_visit(io);
    }

    fn let_go_of_visit(&mut self, io: IoId) {
        if let Payload::Buf { buf, .. } = self.memory.take_io(io) {
            self.memory.put_buf(buf);
        }
    }

    fn visitor_ends(&mut self, node: NodeId, segment: SegmentId, id: u64, outcome: (Outcome, u32), changes: bool) {
        if let Some(visitor) = self.ways.visitors.get_mut(&(segment, node)) {
            visitor.end(id, outcome.0, outcome.1, changes);
        }
    }

    /// An answer without payload. One that is lost is asked for again.
    fn answer_forward(&mut self, to: NodeId, id: u64, session: Incarnation, segment: SegmentId, term: Term, outcome: (Outcome, u32)) {
        let (outcome, at) = outcome;
        let answer = Forwarded { id, session, segment, term, outcome, at, crcs: Vec::new() };
        self.peer_end.say(to, PeerWord::Forwarded(answer), &[], &self.memory);
    }
}
