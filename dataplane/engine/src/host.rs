//! What a store holds of its hosts: the slab of commands that are not answered, and the queues that they wait in.
//!
//! Not here: what is done with them (`write`, `read`, `lead`).

use crate::map::LayerKey;
use crate::port::*;
use crate::read::Place;
use crate::stream::Stream;
use crate::write::Short;
use penstock_wire::batch::OP_HEAD;
use penstock_wire::layer::SnapshotShape;
use penstock_wire::peer::Members;
use penstock_wire::reservation::Reservations;
use penstock_wire::{BLOCK, HostId, Index as RaftIndex, ReplicaShape, SegmentId, SnapshotId};
use std::collections::VecDeque;

/// A host command in the slab.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JobId(pub u32);

/// Where the bytes of a proposed write lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    Host { offset: u32 },
    Buf { buf: BufId },
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum What {
    Write {
        source: Source,
    },
    Zero,
    Create(Box<ReplicaShape>),
    CreateMember(Box<Birth>),
    Clone(Box<Cloned>),
    Delete,
    /// New size in `block`.
    Resize,
    /// All of the volume's reservations.
    Reserve(Box<Reservations>),
    /// Of the volume with as many blocks as `block` says.
    Snapshot(Box<SnapshotShape>),
    Unsnapshot(SnapshotId),
}

/// A replica that begins as the member of a group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Birth {
    pub shape: ReplicaShape,
    pub members: Members,
}

/// A replica that begins as a snapshot of another, the member of a group or alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cloned {
    pub shape: ReplicaShape,
    pub members: Option<Members>,
    pub origin: SegmentId,
    pub snapshot: SnapshotId,
    /// What it will stand on; nothing where it keeps the log alone.
    pub on: Option<LayerKey>,
}

/// An op on its way into the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proposed {
    pub job: Option<JobId>,
    pub io: Option<IoId>,
    pub order: Option<OrderId>,
    pub replica: ReplicaNo,
    pub block: u64,
    pub blocks: u64,
    pub what: What,
    /// Promises of extents that are held for it.
    pub promises: u32,
    /// Raft index of its entry, once it is in a batch.
    pub index: RaftIndex,
}

impl What {
    /// Whether it makes a replica that is the member of a group.
    pub fn begins_member(&self) -> bool {
        matches!(self, Self::CreateMember(_)) || matches!(self, Self::Clone(clone) if clone.members.is_some())
    }
}

impl Proposed {
    pub fn payload_blocks(&self) -> u32 {
        if matches!(self.what, What::Write { .. }) { self.blocks as u32 } else { 0 }
    }

    /// Blocks that it writes.
    pub fn written(&self) -> std::ops::Range<u64> {
        self.block..self.block + u64::from(self.payload_blocks())
    }

    /// Bytes of descriptors beyond the op's head.
    pub fn section_bytes(&self) -> usize {
        match &self.what {
            What::Write { .. } => 4 * self.blocks as usize,
            What::Create(shape) => shape.encoded_len(),
            What::Snapshot(shape) => shape.encoded_len(),
            What::Unsnapshot(_) => 16,
            What::Clone(clone) => {
                let members = clone.members.as_ref().map_or(0, |members| OP_HEAD + members.encode().len());
                clone.shape.encoded_len() + members + OP_HEAD + 32
            }
            What::CreateMember(birth) => birth.shape.encoded_len() + OP_HEAD + birth.members.encode().len(),
            What::Reserve(state) => state.encoded_len(),
            _ => 0,
        }
    }
    /// Whether no op may follow it in its entry.
    pub fn ends_entry(&self) -> bool {
        matches!(self.what, What::Snapshot(_))
    }
    pub fn overlaps(&self, replica: ReplicaNo, first: u64, end: u64) -> bool {
        self.replica == replica && self.block < end && first < self.block + self.blocks
    }
}

/// What a job is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JobStage {
    /// In the held queue: waits for room in the log, its turn, memory or space.
    Held,
    /// Its blocks are locked by another's merge.
    Blocked,
    /// Has locked its blocks; waits until nothing on them is out.
    Locking,
    /// Waits until a change of the volume's reservations is applied.
    Parked,
    /// Waits for a proof that this member leads.
    Proving,
    Reading,
    Proposed,
}

/// The part of a command that is being worked on: whole blocks around at most 1 MiB of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Chunk {
    pub first: u64,
    pub blocks: u64,
    /// Bytes of the first block before the command's.
    pub skip: u32,
    /// Bytes of the command in this chunk.
    pub bytes: u64,
}

impl Chunk {
    pub fn of(span: Span, done: u64, blocks_max: u64) -> Self {
        let start = span.offset + done;
        let first = start / BLOCK as u64;
        let end = (span.offset + span.len).min((first + blocks_max) * BLOCK as u64);
        Self { first, blocks: end.div_ceil(BLOCK as u64) - first, skip: (start % BLOCK as u64) as u32, bytes: end - start }
    }
    pub fn end(&self) -> u64 {
        self.first + self.blocks
    }
    pub fn is_aligned(&self) -> bool {
        self.skip == 0 && self.bytes.is_multiple_of(BLOCK as u64)
    }
}

#[derive(Debug)]
pub struct Job {
    pub io: IoId,
    pub replica: ReplicaNo,
    pub host: HostId,
    pub op: HostOp,
    pub span: Span,
    /// Bytes of the command that are done.
    pub done: u64,
    pub chunk: Chunk,
    pub stage: JobStage,
    pub buf: Option<BufId>,
    /// Device reads that are out for it.
    pub out: u32,
    /// A device read of it failed.
    pub read_failed: bool,
    /// Times the same block at the same place was bad.
    pub strikes: u32,
    /// Where each block of the chunk was read from.
    pub places: Vec<Place>,
    pub epoch: Option<crate::epoch::Epoch>,
    pub locked: bool,
    /// Answered before its time: by a canary alone.
    pub replied: bool,
    /// Was counted as held.
    pub held: bool,
    /// What was found here, which is said once it is proven that nobody else leads.
    pub verdict: Option<Status>,
    /// What it was decided under is over: it is refused when what it waits for has come.
    pub lost: bool,
    pub live: bool,
}

/// Blocks that a merge keeps for itself.
#[derive(Clone, Copy, Debug)]
pub struct Lock {
    pub job: JobId,
    pub replica: ReplicaNo,
    pub first: u64,
    pub end: u64,
}

/// All host commands of a store that are not answered.
#[derive(Debug, Default)]
pub(crate) struct HostSide {
    pub jobs: Vec<Job>,
    pub free: Vec<JobId>,
    pub count: u64,
    /// Writes in order of arrival that are not proposed yet.
    pub held: VecDeque<JobId>,
    /// Reads that wait for memory.
    pub starved: VecDeque<JobId>,
    pub locks: Vec<Lock>,
    /// Jobs whose blocks another's lock covers, in order.
    pub blocked: VecDeque<JobId>,
    /// Jobs that hold their lock and wait for what is out.
    pub locking: Vec<JobId>,
    /// Proposed and not yet in a batch.
    pub ready: VecDeque<Proposed>,
    /// The same, of members: not in an entry of their group yet.
    pub grouped: VecDeque<Proposed>,
    pub ready_blocks: u64,
    /// Jobs that wait until the drain of their extents is over.
    pub after_drain: Vec<JobId>,
    /// A write found no space; it is refused only after everything was drained.
    pub wants_space: bool,
    /// What it waits for, or one before it that was not told since.
    pub short: Option<Short>,
}

impl HostSide {
    pub fn job(&mut self, id: JobId) -> &mut Job {
        let job = &mut self.jobs[id.0 as usize];
        assert!(job.live, "job {} is used after its reply", id.0);
        job
    }

    pub fn add(&mut self, io: IoId, replica: ReplicaNo, host: HostId, op: HostOp, span: Span) -> JobId {
        let id = self.free.pop().unwrap_or(JobId(self.jobs.len() as u32));
        let at = id.0 as usize;
        // The list of places keeps its capacity from command to command.
        let mut places = self.jobs.get_mut(at).map(|job| std::mem::take(&mut job.places)).unwrap_or_default();
        places.clear();
        let job = Job {
            io,
            replica,
            host,
            op,
            span,
            done: 0,
            chunk: Chunk::default(),
            stage: JobStage::Held,
            buf: None,
            out: 0,
            read_failed: false,
            strikes: 0,
            places,
            epoch: None,
            locked: false,
            replied: false,
            held: false,
            verdict: None,
            lost: false,
            live: true,
        };
        match self.jobs.get_mut(at) {
            Some(place) => *place = job,
            None => self.jobs.push(job),
        }
        self.count += 1;
        id
    }

    pub fn is_idle(&self) -> bool {
        self.count == 0 && self.ready.is_empty() && self.grouped.is_empty()
    }

    pub fn held(&self) -> u64 {
        self.count
    }

    pub fn reply_early(&mut self, id: JobId, fx: &mut Effects) {
        let job = self.job(id);
        // Only where the payload is not needed any more would a reply not be caught at once by its owner.
        if !job.replied && job.buf.is_some() && job.done + job.chunk.bytes == job.span.len {
            job.replied = true;
            fx.list.push(Effect::Reply { io: job.io, status: Status::Ok });
        }
    }

    pub fn is_locked(&self, replica: ReplicaNo, first: u64, end: u64, but: JobId) -> bool {
        self.locks.iter().any(|lock| lock.job != but && lock.replica == replica && lock.first < end && first < lock.end)
    }

    pub fn is_out(&self, stream: &Stream, replica: ReplicaNo, first: u64, end: u64) -> bool {
        self.ready.iter().chain(stream.ops_out()).any(|op| op.overlaps(replica, first, end))
    }

    /// Whether a command's lock covers a block.
    pub fn locks_any(&self, replica: ReplicaNo, first: u64, end: u64) -> bool {
        self.locks.iter().any(|lock| lock.replica == replica && lock.first < end && first < lock.end)
    }

    /// Whether what is ready has at least `blocks` of payload.
    pub fn fills_batch(&self, blocks: u32) -> bool {
        let mut left = blocks;
        self.ready.iter().any(|op| {
            left = left.saturating_sub(op.payload_blocks());
            left == 0
        })
    }

    /// Jobs of a replica that are not proposed, out of their queues. Those that wait for something else are refused when it comes.
    pub fn take_waiting(&mut self, no: ReplicaNo) -> Vec<JobId> {
        let mut taken = Vec::new();
        let jobs = &self.jobs;
        let mut keep = |id: &JobId| {
            let other = jobs[id.0 as usize].replica != no;
            if !other {
                taken.push(*id);
            }
            other
        };
        self.held.retain(&mut keep);
        self.blocked.retain(&mut keep);
        self.locking.retain(&mut keep);
        for (at, job) in self.jobs.iter_mut().enumerate().filter(|(_, job)| job.live && job.replica == no) {
            if job.stage == JobStage::Proving {
                taken.push(JobId(at as u32));
            } else if !job.op.reads() && matches!(job.stage, JobStage::Held | JobStage::Reading) {
                job.lost = true;
            }
        }
        taken
    }

    /// Whether a job of a replica's waits for proof that it leads.
    pub fn is_proving(&self, id: JobId, no: ReplicaNo) -> bool {
        let job = &self.jobs[id.0 as usize];
        job.live && job.stage == JobStage::Proving && job.replica == no
    }

    /// Ops of a member that are in no entry yet.
    pub fn take_grouped(&mut self, no: ReplicaNo) -> Vec<Proposed> {
        let (taken, kept) = std::mem::take(&mut self.grouped).into_iter().partition(|op| op.replica == no);
        self.grouped = kept;
        Vec::from(taken as VecDeque<Proposed>)
    }

    /// Promises that ops not yet in a batch hold.
    pub fn promises(&self) -> u64 {
        self.ready.iter().chain(&self.grouped).map(|op| u64::from(op.promises)).sum()
    }
}
