//! Host commands from arrival to reply, and the writing half of them: checks, admission, copies, merges, proposals. Their slab is in `host`.
//!
//! What must be decided is decided here, before proposing. A write that covers whole blocks is proposed at once; one that
//! does not, and compare-and-write, locks its blocks, waits until nothing on them is out, reads, decides, and then proposes
//! whole blocks. So the log carries outcomes, and applying never fails.

use crate::config::{Canary, Stage};
use crate::host::{Chunk, Job, JobId, JobStage, Lock, Proposed, Source, What};
use crate::index::GroupKey;
use crate::map::{Known, LayerKey, PageKey};
use crate::port::*;
use crate::reserve::rules::Reserve;
use crate::room::Verdict;
use crate::store::{PageWaiter, Store};
use penstock_wire::batch::PAYLOAD_BLOCKS_MAX;
use penstock_wire::page::UNALLOCATED;
use penstock_wire::{BLOCK, EXTENT_BLOCKS, HostId, Index as RaftIndex, Seq};
use std::ops::RangeInclusive;

/// Most bytes of a compare-and-write.
pub const COMPARE_MAX: u64 = 128 * 1024;
/// Blocks that one zero op covers at most: 1 GiB.
const ZERO_CHUNK: u64 = 1 << 18;
/// What a write waits for that found no space, before it is refused though the store is still at work: one whose snapshots come and go is never at rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Short {
    /// All that was logged by then is drained, and what was deleted and removed by then is tidied up.
    Tidy { by: Seq },
    /// A checkpoint gives back what that freed. `before`: those that were begun until then.
    Save { before: u64 },
}

/// What became of a held write that was to begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Start {
    /// It is on its way, or answered, or waits elsewhere.
    Done,
    /// It goes on waiting, and those behind it with it.
    First,
    /// It goes on waiting, and those behind it for the same volume.
    Later,
}

impl Store {
    pub(crate) fn on_host<M: Memory>(&mut self, io: IoId, replica: ReplicaNo, host: HostId, op: HostOp, mem: &mut M, fx: &mut Effects) {
        let refused = match self.check_host(replica, op) {
            Err(status) => Some(status),
            // Which blocks the lost batches wrote is unknown, so none can be vouched for until the operator accepts the loss.
            Ok(()) if op.reads() && self.report.lost_batches > 0 && !self.config.accept_lost_log => Some(Status::Unrecovered),
            Ok(()) => None,
        };
        if let Some(status) = refused {
            self.counters.host_refused += u64::from(status != Status::Ok);
            fx.list.push(Effect::Reply { io, status });
            return;
        }
        let span = op.span().unwrap_or(Span { offset: 0, len: 0 });
        match op {
            HostOp::Read(_) | HostOp::ReadSnapshot(..) => {
                self.counters.host_reads += 1;
                self.counters.host_read_blocks += span.len / BLOCK as u64;
            }
            HostOp::Write(_) => {
                self.counters.host_writes += 1;
                self.counters.host_write_blocks += span.len / BLOCK as u64;
            }
            HostOp::Zero(_) => self.counters.host_zeros += 1,
            HostOp::CompareWrite(_) => self.counters.host_compares += 1,
            HostOp::Flush => self.counters.host_flushes += 1,
            HostOp::Reserve(_) => self.counters.host_reserves += 1,
        }
        let job = self.host.add(io, replica, host, op, span);
        if self.is_guarded(replica) || matches!(op, HostOp::Reserve(_)) {
            self.pass_guard(job, mem, fx);
        } else {
            self.admit(job, mem, fx);
        }
    }

    /// On its way with a command that may be carried out.
    pub(crate) fn admit<M: Memory>(&mut self, id: JobId, mem: &mut M, fx: &mut Effects) {
        let job = self.host.job(id);
        let is_member = self.map.get(job.replica).is_some_and(|replica| replica.member.is_some());
        match job.op {
            HostOp::Read(_) | HostOp::Flush if is_member => self.prove(id),
            HostOp::Flush => self.finish_job(id, Status::Ok, mem, fx),
            // What a snapshot holds nobody changes, whoever leads.
            HostOp::Read(_) | HostOp::ReadSnapshot(..) => {
                self.next_read_chunk(id);
                self.issue_reads(id, mem, fx);
            }
            _ => {
                job.stage = JobStage::Held;
                self.host.held.push_back(id);
            }
        }
    }

    pub(crate) fn check_host(&self, replica: ReplicaNo, op: HostOp) -> Result<(), Status> {
        let writes = !op.reads() && !matches!(op, HostOp::Reserve(Reserve::Report { .. }));
        match self.stage {
            Stage::Serving => {}
            Stage::Fenced(_) if !writes => {}
            // The other members go on.
            Stage::Fenced(_) if self.member(replica).is_some() => return Err(Status::NotReady),
            Stage::Fenced(_) => return Err(Status::Fenced),
            _ => return Err(Status::NotReady),
        }
        let replica = self.map.live(replica).ok_or(Status::NotReady)?;
        if replica.member.as_deref().is_some_and(|member| member.serving.is_none()) {
            return Err(Status::NotReady);
        }
        let Some(span) = op.span() else { return Ok(()) };
        let blocks = match op {
            HostOp::ReadSnapshot(layer, _) => replica.kept(layer).ok_or(Status::NotReady)?.blocks,
            _ => replica.limit_blocks,
        };
        let logical = u64::from(replica.shape.logical_block);
        if span.len == 0 || span.offset % logical != 0 || span.len % logical != 0 {
            return Err(Status::Invalid);
        }
        if matches!(op, HostOp::CompareWrite(_)) && span.len > COMPARE_MAX
            || !matches!(op, HostOp::Zero(_)) && span.len > u64::from(u32::MAX)
        {
            return Err(Status::Invalid);
        }
        match span.end() {
            Some(end) if end <= blocks * BLOCK as u64 => Ok(()),
            _ => Err(Status::OutOfRange),
        }
    }

    pub(crate) fn next_read_chunk(&mut self, id: JobId) {
        let job = self.host.job(id);
        job.stage = JobStage::Reading;
        job.chunk = Chunk::of(job.span, job.done, u64::from(PAYLOAD_BLOCKS_MAX));
        job.strikes = 0;
    }

    /// Starts held writes as far as the log has room; reads that lacked memory try again.
    pub(crate) fn settle_host<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        for _ in 0..self.host.starved.len() {
            let job = self.host.starved.pop_front().expect("counted");
            self.resume_job(job, mem, fx);
        }
        if !matches!(self.stage, Stage::Serving | Stage::Stopping) {
            return;
        }
        if self.host.wants_space {
            // All is drained, so no promise is held in vain: whoever finds no space now is told so.
            let at_rest = self.index.len() == 0 && self.drain_is_done() && !self.space.is_waiting();
            self.host.wants_space = !at_rest && !self.has_waited_for_space();
        }
        let ready = self.host.ready.iter().chain(&self.host.grouped);
        self.host.ready_blocks = ready.map(|op| u64::from(op.payload_blocks())).sum::<u64>() + self.groups.queued_blocks();
        let mut later: Vec<JobId> = Vec::new();
        while let Some(&job) = self.host.held.front() {
            if self.group_is_full(job, &later) {
                later.extend(self.host.held.pop_front());
                continue;
            }
            if self.host.wants_space || !self.log_has_room(job) {
                let job = self.host.job(job);
                if !std::mem::replace(&mut job.held, true) {
                    self.counters.held_for_log += 1;
                }
                break;
            }
            self.host.held.pop_front();
            match self.start_write(job, mem, fx) {
                Start::Done => {}
                Start::Later => later.push(job),
                Start::First => {
                    self.host.held.push_front(job);
                    break;
                }
            }
        }
        while let Some(job) = later.pop() {
            self.host.held.push_front(job);
        }
        if !self.host.wants_space {
            self.host.short = None;
        }
    }

    /// Between two steps of the drain, no checkpoint being written.
    pub(crate) fn look_short(&mut self) {
        if let Some(Short::Tidy { by }) = self.host.short
            && self.drained_to() >= by
            && self.drain.deletions == 0
            && !self.has_merges(by)
        {
            self.host.short = Some(Short::Save { before: self.counters.checkpoints });
        }
    }

    /// Whether what was to be given back when a write found no space has been: the next checkpoint is over when one more was begun.
    fn has_waited_for_space(&self) -> bool {
        matches!(self.host.short, Some(Short::Save { before }) if self.counters.checkpoints > before + 1)
    }

    /// What is not applied cannot be trimmed: a group without a quorum must not fill the log, nor hold up those behind it. `later`: jobs
    /// that wait for this already.
    fn group_is_full(&self, id: JobId, later: &[JobId]) -> bool {
        let job = &self.host.jobs[id.0 as usize];
        let Some(member) = self.member(job.replica) else { return false };
        let blocks = Self::log_blocks(job);
        member.out_blocks > 0 && member.out_blocks + blocks > self.stream.host_limit() / 8
            || later.iter().any(|other| self.host.jobs[other.0 as usize].replica == job.replica)
    }

    /// Blocks of log that a write's next chunk may take.
    fn log_blocks(job: &Job) -> u64 {
        match job.op {
            HostOp::Write(_) | HostOp::CompareWrite(_) => {
                (job.span.len - job.done).div_ceil(BLOCK as u64).min(u64::from(PAYLOAD_BLOCKS_MAX)) + 1
            }
            _ => 1,
        }
    }

    /// Back-pressure: three quarters of the ring are free of it; beyond, writers get what the drain gives back, scaled by the room left.
    fn log_has_room(&mut self, id: JobId) -> bool {
        let job = &self.host.jobs[id.0 as usize];
        let blocks = Self::log_blocks(job);
        let (used, limit) = (self.stream.used(), self.stream.host_limit());
        if used + self.host.ready_blocks + blocks > limit || self.index.len() as u64 > self.stream.ring_blocks() {
            return false;
        }
        if used * 4 > limit * 3 {
            if self.stream.credit < blocks {
                return false;
            }
            self.stream.credit -= blocks;
        }
        self.host.ready_blocks += blocks;
        true
    }

    /// Begins a write's next chunk.
    fn start_write<M: Memory>(&mut self, id: JobId, mem: &mut M, fx: &mut Effects) -> Start {
        let job = self.host.job(id);
        let (replica, io, span, done) = (job.replica, job.io, job.span, job.done);
        let zero = matches!(job.op, HostOp::Zero(_));
        let compare = matches!(job.op, HostOp::CompareWrite(_));
        if !self.serves(replica) {
            self.finish_job(id, Status::NotReady, mem, fx);
            return Start::Done;
        }
        if self.is_guarded(replica) && !self.may_go_on(id, mem, fx) {
            return Start::Done;
        }
        let mut chunk = Chunk::of(span, done, if zero { ZERO_CHUNK } else { u64::from(PAYLOAD_BLOCKS_MAX) });
        if zero && chunk.skip != 0 {
            chunk = Chunk::of(span, done, 1);
        } else if zero && !chunk.is_aligned() && chunk.blocks > 1 {
            // Whole blocks first, the rest of the last block after them.
            chunk.blocks -= 1;
            chunk.bytes = chunk.blocks * BLOCK as u64;
        }
        self.host.job(id).chunk = chunk;
        if self.host.is_locked(replica, chunk.first, chunk.end(), id) {
            self.host.job(id).stage = JobStage::Blocked;
            self.host.blocked.push_back(id);
            return Start::Done;
        }
        if zero && chunk.is_aligned() {
            let Some(promises) = self.promise_zeros(replica, chunk.first, chunk.end()) else { return self.no_space(id, None, mem, fx) };
            match self.members_have_room(replica, promises, 0..0) {
                Verdict::Room => self.propose(id, What::Zero, promises),
                verdict => return self.no_room(id, verdict, promises, mem, fx),
            }
            return Start::Done;
        }
        let direct = !compare && chunk.is_aligned() && done.is_multiple_of(BLOCK as u64) && !zero && mem.host_direct(io);
        let buf = if direct { None } else { mem.alloc(chunk.blocks as u32) };
        if !direct && buf.is_none() {
            return Start::First;
        }
        let promises = match self.promise_space(replica, chunk) {
            Ok(promises) => promises,
            Err(unloaded) => {
                if let Some(buf) = buf {
                    mem.free(buf);
                }
                return self.no_space(id, unloaded, mem, fx);
            }
        };
        let verdict = self.members_have_room(replica, promises, chunk.first..chunk.end());
        if verdict != Verdict::Room {
            buf.into_iter().for_each(|buf| mem.free(buf));
            return self.no_room(id, verdict, promises, mem, fx);
        }
        if direct {
            self.propose(id, What::Write { source: Source::Host { offset: done as u32 } }, promises);
            return Start::Done;
        }
        let buf = buf.expect("allocated above");
        self.host.job(id).buf = Some(buf);
        if chunk.is_aligned() && !compare {
            mem.host_to_buf(io, done as u32, buf, 0, chunk.bytes as u32);
            self.counters.copied_blocks += chunk.blocks;
            self.propose(id, What::Write { source: Source::Buf { buf } }, promises);
            return Start::Done;
        }
        // A merge keeps no promise while it waits: it takes it again when it knows what to write.
        self.give_up_promises(promises);
        self.counters.merges += 1;
        let job = self.host.job(id);
        job.locked = true;
        job.stage = JobStage::Locking;
        self.host.locks.push(Lock { job: id, replica, first: chunk.first, end: chunk.end() });
        self.try_merge(id, mem, fx);
        Start::Done
    }

    /// Some other member has no room for what a write promised here.
    fn no_room<M: Memory>(&mut self, id: JobId, verdict: Verdict, promises: u32, mem: &mut M, fx: &mut Effects) -> Start {
        self.give_up_promises(promises);
        if verdict == Verdict::Wait {
            return Start::Later;
        }
        self.finish_job(id, Status::NoSpace, mem, fx);
        Start::Done
    }

    pub(crate) fn give_up_promises(&mut self, promises: u32) {
        for _ in 0..promises {
            self.space.unpromise();
        }
    }

    /// Promises an extent for each that the chunk touches and that is not known to have one. On refusal says whether a page
    /// that is not loaded could tell more.
    fn promise_space(&mut self, replica: ReplicaNo, chunk: Chunk) -> Result<u32, Option<PageKey>> {
        if self.canary(Canary::ApplyWithoutSpace) {
            return Ok(0);
        }
        let spare = self.slack();
        // Behind a marker that is on its way none of the places counts.
        let freezing = self.map.get(replica).is_some_and(|replica| replica.freezing > 0);
        let extents = chunk.first / EXTENT_BLOCKS..=(chunk.end() - 1) / EXTENT_BLOCKS;
        self.promise_extents(self.map.live_layer(replica), freezing, extents, spare)
    }

    /// Leaves room for `spare` extents more. `ahead`: in the layer that will lie over this.
    pub(crate) fn promise_extents(
        &mut self,
        layer: LayerKey,
        ahead: bool,
        extents: RangeInclusive<u64>,
        spare: u64,
    ) -> Result<u32, Option<PageKey>> {
        let mut promises = 0;
        for extent in extents {
            let known = if ahead { Known::Nothing } else { self.map.known(layer, extent as u32) };
            if matches!(known, Known::Entry(entry) if entry.place != UNALLOCATED) {
                continue;
            }
            let unloaded = known == Known::NotLoaded;
            if !self.space.promise(spare) {
                self.give_up_promises(promises);
                return Err(unloaded.then(|| PageKey::of(layer, extent as u32).0));
            }
            promises += 1;
        }
        Ok(promises)
    }

    /// A write finds no space: look closer (load the page), then wait until all is drained, then say so.
    fn no_space<M: Memory>(&mut self, id: JobId, unloaded: Option<PageKey>, mem: &mut M, fx: &mut Effects) -> Start {
        if let Some(page) = unloaded {
            self.host.job(id).stage = JobStage::Held;
            self.want_page(page, PageWaiter::Job(id), mem, fx);
            return Start::Done;
        }
        let busy = self.index.len() > 0
            || !self.host.ready.is_empty()
            || !self.host.grouped.is_empty()
            || !self.groups.queue.is_empty()
            || self.stream.out_count() > 0
            || !self.drain_is_done()
            || self.space.is_waiting();
        if busy && !self.has_waited_for_space() {
            self.host.wants_space = true;
            self.host.short.get_or_insert(Short::Tidy { by: self.stream.persisted() });
            return Start::First;
        }
        self.finish_job(id, Status::NoSpace, mem, fx);
        Start::Done
    }

    /// A job that locked its blocks reads them once nothing on them is out.
    fn try_merge<M: Memory>(&mut self, id: JobId, mem: &mut M, fx: &mut Effects) {
        let job = self.host.job(id);
        let (replica, chunk) = (job.replica, job.chunk);
        if !self.canary(Canary::MergeAgainstApplied) && self.is_out(replica, chunk.first, chunk.end()) {
            self.host.locking.push(id);
            return;
        }
        let job = self.host.job(id);
        job.stage = JobStage::Reading;
        job.strikes = 0;
        self.issue_reads(id, mem, fx);
    }

    /// Whether a block is written by something that is proposed and not applied.
    fn is_out(&self, replica: ReplicaNo, first: u64, end: u64) -> bool {
        match self.member(replica) {
            None => self.host.is_out(&self.stream, replica, first, end),
            Some(_) => self.proposals_overlap(replica, first, end),
        }
    }

    /// Whether something on its way may count on an extent's place staying where it is.
    pub(crate) fn touches(&self, key: GroupKey) -> bool {
        let no = key.layer.replica;
        let first = u64::from(key.extent) * EXTENT_BLOCKS;
        let end = first + EXTENT_BLOCKS;
        self.host.locks_any(no, first, end)
            || self.is_out(no, first, end)
            || self.member(no).is_some_and(|member| !member.staged.is_empty())
            || self.member(no).is_some() && self.log_touches(no, first, end)
            || self.copies_touch(key)
    }

    /// The blocks of a merge are in its buffer: decide and propose.
    pub(crate) fn merged<M: Memory>(&mut self, id: JobId, mem: &mut M, fx: &mut Effects) {
        let no = self.host.job(id).replica;
        if self.is_guarded(no) && !self.may_go_on(id, mem, fx) {
            return;
        }
        let job = self.host.job(id);
        let (io, op, chunk, span, done) = (job.io, job.op, job.chunk, job.span, job.done);
        let buf = job.buf.expect("a merge has its buffer");
        let mut from = done as u32;
        match op {
            HostOp::Zero(_) => mem.bytes_mut(buf)[chunk.skip as usize..][..chunk.bytes as usize].fill(0),
            HostOp::CompareWrite(_) => {
                if let Some(at) = mem.host_differs(io, 0, buf, chunk.skip, span.len as u32) {
                    self.tell(id, Status::Miscompare { at }, mem, fx);
                    return;
                }
                from = span.len as u32;
                mem.host_to_buf(io, from, buf, chunk.skip, chunk.bytes as u32);
            }
            _ => mem.host_to_buf(io, from, buf, chunk.skip, chunk.bytes as u32),
        }
        self.counters.copied_blocks += chunk.blocks;
        let Ok(promises) = self.promise_space(no, chunk) else { return self.finish_job(id, Status::NoSpace, mem, fx) };
        // Others were proposed since it began, and may have taken what there was.
        match self.members_have_room(no, promises, chunk.first..chunk.end()) {
            Verdict::Room => self.propose(id, What::Write { source: Source::Buf { buf } }, promises),
            Verdict::Wait => {
                self.give_up_promises(promises);
                let job = self.host.job(id);
                job.stage = JobStage::Held;
                job.buf.take().into_iter().for_each(|buf| mem.free(buf));
                self.host.held.push_front(id);
            }
            Verdict::Full => {
                self.give_up_promises(promises);
                return self.finish_job(id, Status::NoSpace, mem, fx);
            }
        }
        self.unlock(id);
        self.retry_waiters(mem, fx);
    }

    fn unlock(&mut self, id: JobId) {
        self.host.job(id).locked = false;
        self.host.locks.retain(|lock| lock.job != id);
    }

    fn propose(&mut self, id: JobId, what: What, promises: u32) {
        let job = self.host.job(id);
        job.stage = JobStage::Proposed;
        let op = Proposed {
            job: Some(id),
            io: Some(job.io),
            order: None,
            replica: job.replica,
            block: job.chunk.first,
            blocks: job.chunk.blocks,
            what,
            promises,
            index: RaftIndex(0),
        };
        self.make_ready(op);
    }

    /// Into the log with it: a member's group's, or the store's own.
    pub(crate) fn make_ready(&mut self, op: Proposed) {
        let own = matches!(op.what, What::Create(_) | What::CreateMember(_) | What::Clone(_) | What::Delete);
        match self.member_mut(op.replica) {
            Some(member) if !own => {
                member.out_blocks += u64::from(op.payload_blocks());
                self.host.grouped.push_back(op);
            }
            _ => self.host.ready.push_back(op),
        }
    }

    /// Something was applied or unlocked: whoever waited for it tries again, in order.
    pub(crate) fn retry_waiters<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        if !self.host.locking.is_empty() {
            for job in std::mem::take(&mut self.host.locking) {
                self.try_merge(job, mem, fx);
            }
        }
        if !self.host.blocked.is_empty() && self.host.blocked.iter().any(|id| self.is_unblocked(*id)) {
            // Back to the front of the queue, oldest first.
            for job in std::mem::take(&mut self.host.blocked).into_iter().rev() {
                self.host.job(job).stage = JobStage::Held;
                self.host.held.push_front(job);
            }
        }
    }

    fn is_unblocked(&self, id: JobId) -> bool {
        let job = &self.host.jobs[id.0 as usize];
        !self.host.is_locked(job.replica, job.chunk.first, job.chunk.end(), id)
    }

    /// What a job waited for has come.
    pub(crate) fn resume_job<M: Memory>(&mut self, id: JobId, mem: &mut M, fx: &mut Effects) {
        let stage = self.host.job(id).stage;
        match stage {
            _ if self.host.job(id).lost => self.finish_job(id, Status::NotReady, mem, fx),
            JobStage::Reading => self.issue_reads(id, mem, fx),
            JobStage::Held if self.fenced() => self.finish_job(id, Status::Fenced, mem, fx),
            JobStage::Held => self.host.held.push_front(id),
            stage => unreachable!("a job that is {stage:?} waits for nothing"),
        }
    }

    /// A proposed op took effect, or never will.
    pub(crate) fn op_done<M: Memory>(&mut self, op: Proposed, status: Status, mem: &mut M, fx: &mut Effects) {
        if let Some(member) = self.member_mut(op.replica) {
            member.out_blocks -= u64::from(op.payload_blocks());
        }
        if op.ends_entry()
            && let Some(replica) = self.map.get_mut(op.replica)
        {
            replica.freezing -= 1;
        }
        if let Some(order) = op.order {
            self.order_out = None;
            let result = match status {
                Status::Ok => Ok(()),
                Status::NotReady => Err(OrderError::NotLeader(self.leader_of(op.replica))),
                _ => Err(OrderError::Fenced),
            };
            fx.list.push(Effect::OrderDone { id: order, result });
        }
        let Some(id) = op.job else { return };
        if matches!(op.what, What::Reserve(_)) {
            self.finish_job(id, status, mem, fx);
            self.reserve_done(op.replica, id, mem, fx);
            return;
        }
        if let Some(buf) = self.host.job(id).buf.take() {
            self.let_go(op.replica, buf, mem);
        }
        let job = self.host.job(id);
        job.done += job.chunk.bytes;
        if status != Status::Ok || job.done == job.span.len {
            self.finish_job(id, status, mem, fx);
        } else if self.stage == Stage::Stopping {
            self.finish_job(id, Status::NotReady, mem, fx);
        } else {
            job.stage = JobStage::Held;
            self.host.held.push_front(id);
        }
    }

    pub(crate) fn finish_job<M: Memory>(&mut self, id: JobId, status: Status, mem: &mut M, fx: &mut Effects) {
        let job = self.host.job(id);
        assert_eq!(job.out, 0, "a command is answered while the device holds its memory");
        let (buf, no) = (job.buf.take(), job.replica);
        if let Some(buf) = buf {
            self.let_go(no, buf, mem);
        }
        let job = self.host.job(id);
        if let Some(epoch) = job.epoch.take() {
            self.epochs.leave(epoch);
        }
        let job = self.host.job(id);
        if !job.replied {
            fx.list.push(Effect::Reply { io: job.io, status });
        }
        let locked = job.locked;
        if locked {
            self.unlock(id);
        }
        self.host.job(id).live = false;
        self.host.free.push(id);
        self.host.count -= 1;
        if locked {
            self.retry_waiters(mem, fx);
        }
    }

    pub(crate) fn fail_ops<M: Memory>(&mut self, ops: Vec<Proposed>, status: Status, mem: &mut M, fx: &mut Effects) {
        for op in ops {
            self.give_up_promises(op.promises);
            self.op_done(op, status, mem, fx);
        }
    }

    /// Refuses what has not been proposed.
    pub(crate) fn refuse_held<M: Memory>(&mut self, status: Status, mem: &mut M, fx: &mut Effects) {
        self.host.wants_space = false;
        // Blocked ones first: finishing those that hold locks would wake them.
        let mut jobs: Vec<JobId> = self.host.held.drain(..).collect();
        jobs.extend(self.host.blocked.drain(..));
        for job in jobs {
            self.finish_job(job, status, mem, fx);
        }
        for job in std::mem::take(&mut self.host.locking) {
            self.finish_job(job, status, mem, fx);
        }
        let guarded: Vec<ReplicaNo> = self.map.iter().filter(|replica| replica.guard.is_some()).map(|replica| replica.no).collect();
        for job in guarded.into_iter().flat_map(|no| self.take_parked(no)).collect::<Vec<_>>() {
            self.finish_job(job, status, mem, fx);
        }
    }

    /// After a fence: every write that can be answered is, the rest when the device gives its memory back.
    pub(crate) fn fail_writes<M: Memory>(&mut self, status: Status, mem: &mut M, fx: &mut Effects) {
        self.refuse_held(status, mem, fx);
        let ready: Vec<Proposed> = self.host.ready.drain(..).collect();
        self.fail_ops(ready, status, mem, fx);
        self.fail_written(status, mem, fx);
        // What finished above may have been the next chunk's turn.
        self.refuse_held(status, mem, fx);
    }
}
