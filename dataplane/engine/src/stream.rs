//! The log's way out: what was proposed in a turn becomes one batch, batches are persisted in stream order, then applied.
//!
//! A batch counts as persisted when it and all before it are written and the drive's barrier has passed after that.

use crate::carry::{Carried, part_of_op};
use crate::config::{BATCHES_OUT_MAX, Barrier, Canary, FenceReason, Stage};
use crate::epoch::{Epoch, Epochs};
use crate::host::{Proposed, Source, What};
use crate::index::{GroupId, GroupKey, Slot, Version};
use crate::map::LayerKey;
use crate::orders::NOTHING;
use crate::port::*;
use crate::store::{Owner, Store};
use penstock_wire::batch::{
    ENTRY_HEAD, EVERY_MEMBER, Header, Kind, OP_HEAD, PAYLOAD_BLOCKS_MAX, Prev, SECTION_MAX, Section, header_blocks,
};
use penstock_wire::label::Geometry;
use penstock_wire::{BLOCK, EXTENT_BLOCKS, Generation, Index as RaftIndex, RingPos, Seq, Term};
use std::collections::VecDeque;

/// A batch between its submission and its application.
#[derive(Debug)]
struct Batch {
    at: RingPos,
    header_blocks: u32,
    header: BufId,
    ops: Vec<Proposed>,
    /// Checksum of each payload block of `ops`.
    crcs: Vec<u32>,
    /// Entries of groups, behind the ops.
    carried: Vec<Carried>,
    /// What its header says is durable.
    durable_to: Seq,
    written: bool,
}

/// What a batch is made of, besides the descriptors in `Stream::section`.
pub(crate) struct Load {
    kind: Kind,
    ops: Vec<Proposed>,
    crcs: Vec<u32>,
    /// Of the groups' queue, from its front.
    items: usize,
    payload: u32,
    /// Blocks of the ring that may be used with it.
    limit: u64,
}

impl Load {
    /// Nothing but the record itself.
    pub fn bare(kind: Kind) -> Self {
        Self { kind, ops: Vec::new(), crcs: Vec::new(), items: 0, payload: 0, limit: u64::MAX }
    }
}

/// What of the queues goes into the next batch.
#[derive(Default)]
struct Plan {
    ops: usize,
    items: usize,
    payload: u32,
    section: usize,
}

impl Plan {
    /// Takes one more in, if it fits; the first always does.
    fn takes(&mut self, blocks: u32, bytes: usize, enough: u32) -> bool {
        let empty = self.ops + self.items == 0;
        if !empty && (self.payload + blocks > enough || self.section + bytes > SECTION_MAX) {
            return false;
        }
        self.payload += blocks;
        self.section += bytes;
        true
    }
}

#[derive(Debug)]
pub(crate) struct Stream {
    ring_blocks: u64,
    pub generation: Generation,
    /// Where the next batch goes, padding aside, and its sequence.
    head: RingPos,
    next: Seq,
    /// From here on the ring is in use: by the log, or by reads of what was trimmed.
    tail: RingPos,
    tails: VecDeque<(Epoch, RingPos)>,
    /// First batch that is kept, and where each batch from there on lies.
    first: Seq,
    places: VecDeque<RingPos>,
    out: VecDeque<Batch>,
    /// All up to here are on the drive, and all up to here are behind a barrier.
    written: Seq,
    persisted: Seq,
    /// Newest batch that a durable record says is durable.
    sealed_to: Seq,
    /// Highest batch that recovery found known durable.
    pub proven: Seq,
    /// The newest batch that recovery kept, and the first of this generation.
    pub found: Seq,
    pub opened: Seq,
    /// No batch before that is of an older generation.
    pub found_generation: Generation,
    flushing: Option<Seq>,
    /// The batch before, for the next header.
    prev: Option<Prev>,
    prev_section: Section,
    section: Section,
    /// Whether the newest durable batch is known durable by a later record.
    sealed: bool,
    pub last_write: Millis,
    /// Blocks that may still be admitted while the log is under pressure.
    pub credit: u64,
    spare_ops: Vec<Vec<Proposed>>,
    spare_crcs: Vec<Vec<u32>>,
    spare_carried: Vec<Vec<Carried>>,
    parts: Vec<Part>,
}

/// A batch's largest size in blocks.
pub(crate) const BATCH_BLOCKS_MAX: u64 = PAYLOAD_BLOCKS_MAX as u64 + penstock_wire::batch::HEADER_BLOCKS_MAX as u64;

impl Stream {
    pub fn new(geometry: &Geometry) -> Self {
        Self {
            ring_blocks: geometry.ring_blocks,
            generation: Generation(0),
            head: RingPos(0),
            next: Seq(1),
            tail: RingPos(0),
            tails: VecDeque::new(),
            first: Seq(1),
            places: VecDeque::new(),
            out: VecDeque::new(),
            written: Seq(0),
            persisted: Seq(0),
            sealed_to: Seq(0),
            proven: Seq(0),
            found: Seq(0),
            opened: Seq(0),
            found_generation: Generation(0),
            flushing: None,
            prev: None,
            prev_section: Section::default(),
            section: Section::default(),
            sealed: true,
            last_write: Millis(0),
            credit: 0,
            spare_ops: Vec::new(),
            spare_crcs: Vec::new(),
            spare_carried: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Takes over where recovery ended: batches `first..next` stand at `places`, the next goes to `head`.
    pub fn resume(&mut self, first: Seq, places: VecDeque<RingPos>, next: Seq, head: RingPos, tail: RingPos, generation: Generation) {
        self.first = first;
        self.places = places;
        self.next = next;
        self.head = head;
        self.tail = tail;
        self.generation = generation;
        self.written = Seq(next.0 - 1);
        self.persisted = self.written;
        (self.found, self.opened) = (self.written, next);
    }

    pub fn ring_blocks(&self) -> u64 {
        self.ring_blocks
    }
    pub fn used(&self) -> u64 {
        self.head.0 - self.tail.0
    }
    /// Blocks that a host's writes may fill; the rest is for orders, seals and the padding of wraps.
    pub fn host_limit(&self) -> u64 {
        self.ring_blocks - 2 * BATCH_BLOCKS_MAX - 64
    }
    /// Newest batch that was sent out.
    pub fn last_sent(&self) -> Seq {
        Seq(self.next.0 - 1)
    }
    pub fn persisted(&self) -> Seq {
        self.persisted
    }
    pub fn sealed_to(&self) -> Seq {
        self.sealed_to
    }
    /// Newest batch that a record says is durable, or will when it is durable itself.
    pub fn durable_said(&self) -> Seq {
        self.out.back().map_or(self.sealed_to, |batch| batch.durable_to.max(self.sealed_to))
    }
    pub fn clear_section(&mut self) {
        self.section.clear();
    }
    /// First batch from which on the log takes `blocks` at most.
    pub fn first_within(&self, blocks: u64) -> Seq {
        let at = self.places.partition_point(|place| self.head.0 - place.0 > blocks);
        Seq(self.first.0 + at as u64)
    }
    pub fn first_kept(&self) -> Seq {
        self.first
    }
    /// The oldest generation that a batch from `first` on may be of.
    pub fn generation_from(&self, first: Seq) -> Generation {
        if first >= self.opened { self.generation } else { self.found_generation }
    }
    pub fn is_idle(&self) -> bool {
        self.out.is_empty() && self.flushing.is_none()
    }
    /// Nothing that is kept waits for a later record to say that it is durable.
    pub fn is_sealed(&self) -> bool {
        self.sealed || self.persisted < self.first
    }

    /// Where batch `seq` is, or will be if it is the next.
    pub fn place_of(&self, seq: Seq) -> RingPos {
        match self.places.get((seq.0 - self.first.0) as usize) {
            Some(at) => *at,
            None => self.head,
        }
    }

    /// Where a batch of `blocks` goes: batches never wrap.
    fn place(&self, blocks: u64) -> RingPos {
        let at = self.head.0 % self.ring_blocks;
        if at + blocks <= self.ring_blocks { self.head } else { RingPos(self.head.0 + self.ring_blocks - at) }
    }

    fn fits(&self, at: RingPos, blocks: u64, limit: u64) -> bool {
        at.0 + blocks - self.tail.0 <= limit
    }

    /// Forgets batches before `first`; their blocks are free once the reads of them have left.
    pub fn trim(&mut self, first: Seq, epochs: &mut Epochs) {
        assert!(first >= self.first, "the log is trimmed backwards, from {:?} to {first:?}", self.first);
        let at = self.place_of(first);
        while self.first < first {
            self.places.pop_front();
            self.first = self.first.next();
        }
        self.tails.push_back((epochs.close(), at));
    }

    pub fn settle_tail(&mut self, epochs: &Epochs) {
        while self.tails.front().is_some_and(|(epoch, _)| epochs.passed(*epoch)) {
            self.tail = self.tails.pop_front().expect("just seen").1;
        }
    }

    /// Every op that is out, for those who must not overtake it.
    pub fn ops_out(&self) -> impl Iterator<Item = &Proposed> {
        self.out.iter().flat_map(|batch| batch.ops.iter())
    }

    /// Promises of space that ops in batches hold.
    pub fn promises(&self) -> u64 {
        self.ops_out().map(|op| u64::from(op.promises)).sum()
    }

    pub fn out_count(&self) -> usize {
        self.out.len()
    }
}

impl Store {
    /// Sends out what is ready, as far as the ring and the number of batches out allow.
    pub(crate) fn settle_stream<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        if !matches!(self.stage, Stage::Serving | Stage::Stopping) {
            return;
        }
        let limits = self.config.limits;
        if self.barrier() == Barrier::Flush {
            // At the end of the turn: one barrier for all that was found written in it.
            self.flush_log(fx);
        }
        self.pass_void_items();
        while self.stream.out.len() < BATCHES_OUT_MAX as usize && !(self.host.ready.is_empty() && self.groups.queue.is_empty()) {
            let small_waits = self.stream.out.len() >= limits.batches_out as usize;
            if small_waits && !self.host.fills_batch(limits.batch_blocks) && !self.queue_is_urgent(limits.batch_blocks) {
                break;
            }
            if !self.send_batch(mem, fx) {
                break;
            }
            self.pass_void_items();
        }
        if !self.groups.list.is_empty() {
            self.seal_awaited(mem, fx);
        }
    }

    /// What the next batch takes: from the front of the ready queue, if `with_ops`, then from that of the groups.
    fn plan(&self, with_ops: bool) -> Plan {
        let mut plan = Plan::default();
        let enough = self.config.limits.batch_blocks.min(PAYLOAD_BLOCKS_MAX);
        for op in self.host.ready.iter().filter(|_| with_ops) {
            if !plan.takes(op.payload_blocks(), ENTRY_HEAD + OP_HEAD + op.section_bytes(), enough) {
                return plan;
            }
            plan.ops += 1;
            if op.ends_entry() {
                break;
            }
        }
        for item in &self.groups.queue {
            if !plan.takes(item.blocks(), item.section_bytes(), enough) {
                break;
            }
            plan.items += 1;
        }
        plan
    }

    /// Makes one batch of the front of the queues. False when there is no room or memory for it now.
    fn send_batch<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) -> bool {
        let room = |plan: &Plan, limit: u64| {
            let head = header_blocks(SECTION_MAX.min(plan.section), self.stream.prev_section.bytes().len());
            let at = self.stream.place(u64::from(head + plan.payload));
            // Planned with an entry head for each op, which grouping makes smaller; so what is asked for here is enough.
            self.stream.fits(at, u64::from(head + plan.payload), limit)
        };
        let mut plan = self.plan(true);
        let mut limit = self.stream.host_limit();
        if !room(&plan, limit) {
            // Groups may use what hosts may not: by that the log comes to be trimmed.
            plan = self.plan(false);
            limit = self.items_limit(plan.items);
            if plan.items == 0 || !room(&plan, limit) {
                return false;
            }
        }
        let mut ops = self.stream.spare_ops.pop().unwrap_or_default();
        ops.extend(self.host.ready.drain(..plan.ops));
        if ops.windows(2).any(|pair| pair[0].replica != pair[1].replica) {
            // One entry a replica; order within a replica stays, and between replicas there is none.
            ops.sort_by_key(|op| op.replica);
        }
        let mut crcs = self.stream.spare_crcs.pop().unwrap_or_default();
        self.stream.section.clear();
        let mut replica = None;
        for op in &mut ops {
            if replica != Some(op.replica) {
                replica = Some(op.replica);
                let (term, index) = self.next_entry(op);
                self.stream.section.entry(op.replica.0, term, index);
            }
            op.index = self.map.get(op.replica).map_or(RaftIndex(1), |replica| replica.proposed);
            let from = crcs.len();
            match &op.what {
                What::Write { source, .. } => {
                    for i in 0..op.blocks as u32 {
                        crcs.push(match *source {
                            Source::Host { offset } => {
                                mem.host_crc(op.io.expect("a host payload has its command"), offset + i * BLOCK as u32)
                            }
                            Source::Buf { buf } => penstock_wire::crc32c(&mem.bytes(buf)[i as usize * BLOCK..][..BLOCK]),
                        });
                    }
                    self.stream.section.write(op.block, &crcs[from..]);
                }
                What::Zero => self.stream.section.zero(op.block, op.blocks as u32),
                What::Create(shape) => self.stream.section.create(shape),
                What::CreateMember(birth) => {
                    self.stream.section.create(&birth.shape);
                    self.stream.section.members(&birth.members);
                }
                What::Clone(clone) => {
                    self.stream.section.create(&clone.shape);
                    clone.members.iter().for_each(|members| self.stream.section.members(members));
                    self.stream.section.origin(clone.origin, clone.snapshot);
                }
                What::Delete => self.stream.section.delete(),
                What::Resize => self.stream.section.resize(op.block),
                What::Reserve(state) => self.stream.section.reserve(state),
                What::Snapshot(shape) => self.stream.section.snapshot(op.block, shape),
                What::Unsnapshot(id) => self.stream.section.unsnapshot(*id),
            }
        }
        if plan.items > 0 {
            let mut section = std::mem::take(&mut self.stream.section);
            self.describe_items(plan.items, &mut section);
            self.stream.section = section;
        }
        if self.write_batch(Load { kind: Kind::Data, ops, crcs, items: plan.items, payload: plan.payload, limit }, mem, fx) {
            self.stream.last_write = self.now;
            return true;
        }
        false
    }

    /// Index of the entry that `op` begins.
    fn next_entry(&mut self, op: &Proposed) -> (penstock_wire::Term, RaftIndex) {
        match self.map.get_mut(op.replica) {
            // The store's own word on a member: in no group's log.
            Some(replica) if replica.member.is_some() => (penstock_wire::Term(0), RaftIndex(0)),
            None if op.what.begins_member() => (penstock_wire::Term(0), RaftIndex(0)),
            Some(replica) => {
                replica.proposed = RaftIndex(replica.proposed.0 + 1);
                (replica.term, replica.proposed)
            }
            // A create: the replica begins with this entry.
            None => (penstock_wire::Term(1), RaftIndex(1)),
        }
    }

    /// Writes a batch whose descriptors are in `stream.section`. On refusal (no memory) the ops go back to the queue.
    pub(crate) fn write_batch<M: Memory>(&mut self, load: Load, mem: &mut M, fx: &mut Effects) -> bool {
        let Load { kind, ops, crcs, items, payload, limit } = load;
        let head = header_blocks(self.stream.section.bytes().len(), self.stream.prev_section.bytes().len());
        let blocks = u64::from(head + payload);
        let at = self.stream.place(blocks);
        let room = self.stream.fits(at, blocks, limit.min(self.stream.ring_blocks));
        let Some(header) = (if room { mem.alloc(head) } else { None }) else {
            self.unsend(ops, crcs);
            return false;
        };
        let seq = self.stream.next;
        let fixed = Header {
            incarnation: self.config.incarnation,
            store: self.config.store,
            kind,
            seq,
            generation: self.stream.generation,
            // What recovery read may lie in the drive's cache alone: the Open batch's own barrier makes it durable, so the batch
            // itself must not say that it is.
            durable_to: if kind == Kind::Open { self.stream.proven } else { self.stream.persisted },
            at,
            payload_blocks: payload,
            prev: self.stream.prev,
        };
        let to = &mut mem.bytes_mut(header)[..head as usize * BLOCK];
        fixed.encode_into(to, self.stream.section.bytes(), self.stream.prev_section.bytes());
        let mut parts = std::mem::take(&mut self.stream.parts);
        parts.clear();
        parts.push(Part::Buf { buf: header, first: 0, blocks: head });
        parts.extend(ops.iter().filter_map(part_of_op));
        if items > 0 {
            self.parts_of_items(items, &mut parts);
        }
        let ring_at = (at.0 % self.stream.ring_blocks) as u32;
        self.submit(fx, DiskKind::Write, self.ring_block(ring_at), &parts, Owner::Batch(seq));
        self.stream.parts = parts;
        let mut carried = self.stream.spare_carried.pop().unwrap_or_default();
        if items > 0 {
            self.carry_items(items, seq, &mut carried);
        }
        let stream = &mut self.stream;
        stream.head = RingPos(at.0 + blocks);
        stream.places.push_back(at);
        stream.next = seq.next();
        stream.prev = Some(Prev { seq, at, header_blocks: head, payload_blocks: payload });
        std::mem::swap(&mut stream.section, &mut stream.prev_section);
        stream.sealed = kind == Kind::Seal;
        self.counters.log_header_blocks += u64::from(head);
        self.counters.log_payload_blocks += u64::from(payload);
        match kind {
            Kind::Data => self.counters.log_batches += 1,
            Kind::Seal => self.counters.log_seals += 1,
            Kind::Open => {}
        }
        self.stream.out.push_back(Batch {
            at,
            header_blocks: head,
            header,
            ops,
            crcs,
            carried,
            durable_to: fixed.durable_to,
            written: false,
        });
        if self.canary(Canary::AckEarly) {
            self.ack_early(fx);
        }
        if self.canary(Canary::FreeBufEarly) {
            mem.free(header);
        }
        true
    }

    fn ack_early(&mut self, fx: &mut Effects) {
        let ops: Vec<_> = self.stream.out.back().map(|batch| batch.ops.clone()).unwrap_or_default();
        for op in ops {
            if let Some(job) = op.job {
                self.host.reply_early(job, fx);
            }
        }
    }

    fn unsend(&mut self, mut ops: Vec<Proposed>, mut crcs: Vec<u32>) {
        // The entries were numbered; nothing was written under those numbers.
        let mut replica = None;
        for op in &ops {
            if replica != Some(op.replica) {
                replica = Some(op.replica);
                if let Some(replica) = self.map.get_mut(op.replica).filter(|replica| replica.member.is_none()) {
                    replica.proposed = RaftIndex(replica.proposed.0 - 1);
                }
            }
        }
        for op in ops.drain(..).rev() {
            self.host.ready.push_front(op);
        }
        crcs.clear();
        self.stream.spare_ops.push(ops);
        self.stream.spare_crcs.push(crcs);
    }

    /// The first batch of a generation, over whatever recovery cut away. `before` is the last good batch and its section.
    /// `doubts` are of members of groups: what they are in doubt of lies under this batch. Of these too: whether the opening is `vouched` for.
    pub(crate) fn write_open<M: Memory>(
        &mut self,
        before: Option<(Prev, &[u8])>,
        doubts: &[(u32, Option<(RaftIndex, Term)>)],
        vouched: Option<bool>,
        mem: &mut M,
        fx: &mut Effects,
    ) -> bool {
        self.stream.section.clear();
        for (replica, floor) in doubts {
            self.stream.section.entry(*replica, Term(0), RaftIndex(0));
            self.stream.section.doubt(*floor);
        }
        if let Some(vouched) = vouched {
            self.stream.section.entry(EVERY_MEMBER, Term(0), RaftIndex(0));
            self.stream.section.opened(vouched);
        }
        self.stream.prev_section.clear();
        self.stream.prev = None;
        // Exactly where the log was cut, over whatever stands there: so near the ring's end it leaves the copy out and takes
        // one block, which always fits.
        let room = self.stream.ring_blocks - self.stream.head.0 % self.stream.ring_blocks;
        if let Some((prev, section)) = before
            && u64::from(header_blocks(self.stream.section.bytes().len(), section.len())) <= room
        {
            self.stream.prev = Some(prev);
            self.stream.prev_section = Section::from_bytes(section);
        }
        self.write_batch(Load::bare(Kind::Open), mem, fx)
    }

    /// An idle stream says that its last batch is durable, so that later rot of it is not taken for a tear.
    pub(crate) fn seal_if_idle<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        let idle = self.stream.is_idle()
            && self.host.ready.is_empty()
            && self.groups.queue.is_empty()
            && self.now.0 >= self.stream.last_write.0 + 10;
        if idle && !self.stream.sealed && self.stream.persisted >= self.stream.first {
            self.stream.section.clear();
            self.write_batch(Load::bare(Kind::Seal), mem, fx);
        }
    }

    pub(crate) fn on_batch_written<M: Memory>(&mut self, seq: Seq, ok: bool, mem: &mut M, fx: &mut Effects) {
        let front = Seq(self.stream.next.0 - self.stream.out.len() as u64);
        let batch = &mut self.stream.out[(seq.0 - front.0) as usize];
        if !ok || !matches!(self.stage, Stage::Serving | Stage::Stopping | Stage::Opening) {
            // Nothing counts any more, but the device has given this batch's memory back.
            let ops = std::mem::take(&mut batch.ops);
            let mut carried = std::mem::take(&mut batch.carried);
            mem.free(batch.header);
            if self.stage == Stage::Opening {
                self.open_failed(crate::OpenError::WriteFailed, fx);
                return;
            }
            self.fail_ops(ops, Status::Fenced, mem, fx);
            self.fence(FenceReason::LogWriteFailed, mem, fx);
            self.carried_failed(&mut carried);
            self.answer_orphans(|of| of == seq, mem, fx);
            return;
        }
        batch.written = true;
        let mut at = (self.stream.written.0 + 1).saturating_sub(front.0) as usize;
        while self.stream.out.get(at).is_some_and(|batch| batch.written) {
            self.stream.written = self.stream.written.next();
            at += 1;
        }
        if self.barrier() == Barrier::NotNeeded || self.canary(Canary::CountBeforeBarrier) {
            self.persisted_to(self.stream.written, mem, fx);
        } else if self.stage == Stage::Opening {
            self.flush_log(fx);
        }
    }

    /// Gives up what is written but not persisted; what the device still holds follows when it comes back.
    pub(crate) fn fail_written<M: Memory>(&mut self, status: Status, mem: &mut M, fx: &mut Effects) {
        for at in 0..self.stream.out.len() {
            let batch = &mut self.stream.out[at];
            if batch.written {
                let ops = std::mem::take(&mut batch.ops);
                let mut carried = std::mem::take(&mut batch.carried);
                mem.free(batch.header);
                let seq = Seq(self.stream.next.0 - self.stream.out.len() as u64 + at as u64);
                self.fail_ops(ops, status, mem, fx);
                self.carried_failed(&mut carried);
                self.answer_orphans(|of| of == seq, mem, fx);
            }
        }
    }

    /// Sends a barrier for all that is written, one at a time. While many batches are out it waits until half of them are written: the
    /// device does as well with far fewer barriers, and has enough to do meanwhile.
    fn flush_log(&mut self, fx: &mut Effects) {
        let (out, waiting) = (self.stream.out.len() as u64, self.stream.written.0 - self.stream.persisted.0);
        let is_worth = out <= u64::from(self.config.limits.batches_out) || waiting * 2 >= out;
        if self.stream.flushing.is_none() && waiting > 0 && is_worth {
            self.stream.flushing = Some(self.stream.written);
            self.counters.log_flushes += 1;
            self.flush(fx, Owner::LogFlush);
        }
    }

    pub(crate) fn on_log_flushed<M: Memory>(&mut self, ok: bool, mem: &mut M, fx: &mut Effects) {
        let to = self.stream.flushing.take().expect("a flush was out");
        if !ok && self.stage == Stage::Opening {
            self.open_failed(crate::OpenError::WriteFailed, fx);
        } else if !ok {
            self.fence(FenceReason::FlushFailed, mem, fx);
        }
        if !ok || !matches!(self.stage, Stage::Serving | Stage::Stopping | Stage::Opening) {
            return;
        }
        self.persisted_to(to, mem, fx);
        if self.stage == Stage::Opening {
            self.flush_log(fx);
        }
    }

    fn persisted_to<M: Memory>(&mut self, to: Seq, mem: &mut M, fx: &mut Effects) {
        while self.stream.persisted < to {
            self.stream.persisted = self.stream.persisted.next();
            let seq = self.stream.persisted;
            let batch = self.stream.out.pop_front().expect("what is persisted was out");
            if !self.canary(Canary::FreeBufEarly) {
                mem.free(batch.header);
            }
            if self.stage == Stage::Opening {
                self.opened(fx);
                continue;
            }
            self.stream.sealed_to = self.stream.sealed_to.max(batch.durable_to);
            let mut ops = batch.ops;
            let mut carried = batch.carried;
            let mut block = (batch.at.0 % self.stream.ring_blocks) as u32 + batch.header_blocks;
            let mut crcs = batch.crcs;
            let mut from = 0;
            for op in ops.drain(..) {
                let count = op.payload_blocks();
                self.apply_op(&op, seq, block, &crcs[from..from + count as usize], mem, fx);
                block += count;
                from += count as usize;
                self.op_done(op, Status::Ok, mem, fx);
            }
            crcs.clear();
            self.stream.spare_ops.push(ops);
            self.stream.spare_crcs.push(crcs);
            if !carried.is_empty() {
                self.carried_persisted(&mut carried, seq, block, mem, fx);
            }
            self.stream.spare_carried.push(carried);
        }
        if !self.groups.orphans.is_empty() {
            let persisted = self.stream.persisted;
            self.answer_orphans(|of| of <= persisted, mem, fx);
        }
        self.retry_waiters(mem, fx);
    }

    /// Makes a persisted op take effect. `at` is the ring block of its payload.
    fn apply_op<M: Memory>(&mut self, op: &Proposed, seq: Seq, at: u32, crcs: &[u32], mem: &mut M, fx: &mut Effects) {
        self.drain.unsaved = true;
        if let Some(replica) = self.map.get_mut(op.replica) {
            replica.applied = replica.applied.max(op.index);
        }
        let mut promises = op.promises;
        match &op.what {
            What::Write { .. } => self.apply_write(op.replica, op.block, op.index.0, seq, at, crcs, &mut promises),
            What::Zero => self.apply_zero(op.replica, op.block, op.blocks, seq, op.index.0, &mut promises),
            What::Create(shape) => self.apply_create(op.replica, (**shape).clone(), fx),
            What::CreateMember(birth) => self.apply_birth(op.replica, &birth.shape, &birth.members, NOTHING, fx),
            What::Clone(clone) => self.apply_clone(op.replica, clone, fx),
            What::Delete => {
                self.drop_member(op.replica, mem, fx);
                self.apply_delete(op.replica, fx);
            }
            What::Resize => self.apply_resize(op.replica, op.block, seq, op.index.0, &mut promises, fx),
            What::Reserve(state) => self.apply_reserve(op.replica, (**state).clone()),
            What::Snapshot(shape) => self.map.freeze(op.replica, (**shape).clone(), op.block, op.index),
            What::Unsnapshot(id) => self.apply_unsnapshot(op.replica, *id, seq),
        }
        self.give_up_promises(promises);
    }

    /// Puts a write's blocks into the index, as of Raft index `index`. A group whose extent has no place takes one of the write's promises.
    #[expect(clippy::too_many_arguments)] // each is a number that the caller has at hand; a struct would only be taken apart again
    pub(crate) fn apply_write(&mut self, no: ReplicaNo, block: u64, index: u64, seq: Seq, at: u32, crcs: &[u32], promises: &mut u32) {
        if self.map.live(no).is_none() {
            return;
        }
        self.fall_if_told(block, crcs.len() as u64);
        let layer = self.map.layer_at(no, index);
        self.map.note_undrained(layer, seq);
        let mut at = at;
        let mut block = block;
        let mut crcs = crcs;
        while !crcs.is_empty() {
            let first = (block % EXTENT_BLOCKS) as usize;
            let (here, rest) = crcs.split_at(crcs.len().min(EXTENT_BLOCKS as usize - first));
            let key = self.key_across(GroupKey { layer, extent: (block / EXTENT_BLOCKS) as u32 });
            let id = self.index.touch(key, seq, index);
            let group = self.index.group_mut(id);
            let mut fresh = here.len() as i64;
            for (i, crc) in here.iter().enumerate() {
                let absorbed = group.put(first + i, Slot { seq, version: Version::Log { at: at + i as u32, crc: *crc } });
                self.counters.absorbed_blocks += u64::from(absorbed.is_some());
                fresh -= i64::from(Slot::in_log(&absorbed));
            }
            self.map.undrained(no, fresh);
            if !group.promised && *promises > 0 && !self.has_place(key) {
                self.index.group_mut(id).promised = true;
                *promises -= 1;
            }
            at += here.len() as u32;
            block += here.len() as u64;
            crcs = rest;
        }
    }

    /// See [`Canary::PanicOnWrite`].
    pub(crate) fn fall_if_told(&self, block: u64, blocks: u64) {
        let falls = self.canary(Canary::PanicOnWrite) && (block..block + blocks).contains(&Canary::FALLS_AT);
        assert!(!falls, "a seeded fall over block {}", Canary::FALLS_AT);
    }

    /// With a canary: the frozen group of an extent that is not drained yet takes what comes after its marker too.
    fn key_across(&self, key: GroupKey) -> GroupKey {
        if !self.canary(Canary::AbsorbAcrossMarker) {
            return key;
        }
        let older = |layer| GroupKey { layer, ..key };
        self.map.beneath(key.layer).map(older).filter(|older| self.index.find(*older).is_some()).unwrap_or(key)
    }

    /// Whether an extent is known to have its place on the drive.
    pub(crate) fn has_place(&self, key: GroupKey) -> bool {
        matches!(self.map.known(key.layer, key.extent), crate::map::Known::Entry(entry) if entry.place != penstock_wire::page::UNALLOCATED)
    }

    pub(crate) fn put_version(&mut self, layer: LayerKey, block: u64, version: Version, seq: Seq, index: u64) -> GroupId {
        self.put_slot(layer, block, Slot { seq, version }, index)
    }

    /// Puts a block's newest version into the index and the replica's books.
    pub(crate) fn put_slot(&mut self, layer: LayerKey, block: u64, slot: Slot, index: u64) -> GroupId {
        self.map.note_undrained(layer, slot.seq);
        let (id, old) = self.index.put(layer, block, slot, index);
        self.map.undrained(layer.replica, i64::from(Slot::in_log(&Some(slot))) - i64::from(Slot::in_log(&old)));
        id
    }
}
