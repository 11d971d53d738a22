//! Reads: where each block lies, the device reads for them, and the check of every block before it leaves.
//!
//! A block that does not match its checksum may have been overwritten in place by the drain while it was read: look again,
//! read again. The same place bad twice, with no drain at work on it, is corruption: then the other members of its group are asked for the block
//! (`repair`).

use crate::config::{Canary, Stage};
use crate::host::{Chunk, JobId};
use crate::index::{Group, GroupKey, Version};
use crate::map::{Known, LayerKey, PageKey};
use crate::port::*;
use crate::repair::{Fetched, Waiter};
use crate::store::{Owner, PageWaiter, Store};
use penstock_wire::page::BlockState;
use penstock_wire::{BLOCK, BlockAddr, EXTENT_BLOCKS};
use std::hint::black_box;

/// Where a block's newest version lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Block of the store, and checksum.
    At(BlockAddr, u32),
    Zero,
    Lost,
    /// Not wanted: a merge overwrites all of it.
    Unread,
    /// As the layer beneath says, which was not asked.
    Beneath,
}

/// Why a chunk cannot be read now.
enum NotThere {
    Lost,
    NotLoaded(PageKey),
}

/// Same place bad this often is corruption.
const STRIKES: u32 = 2;

impl Store {
    /// Where a block lies, or which page would tell.
    pub(crate) fn place_of(&self, layer: LayerKey, block: u64) -> Result<Place, PageKey> {
        for layer in self.map.stack(layer) {
            if let Some(place) = self.place_in_layer(layer, block)? {
                return Ok(place);
            }
        }
        Ok(Place::Zero)
    }

    /// Where a layer itself has a block; `None` where that is as the layer beneath says.
    pub(crate) fn place_in_layer(&self, layer: LayerKey, block: u64) -> Result<Option<Place>, PageKey> {
        let (extent, at) = ((block / EXTENT_BLOCKS) as u32, (block % EXTENT_BLOCKS) as usize);
        let group = self.index.find(GroupKey { layer, extent }).map(|id| self.index.group(id));
        self.place_in(layer, extent, at, group, self.map.known(layer, extent))
    }

    /// Where a layer and the removed ones that are to be merged into it have a block; `deep`: with what a clone's lowest stands on.
    pub(crate) fn place_in_fold(&self, layer: LayerKey, deep: bool, block: u64) -> Result<Place, PageKey> {
        for layer in self.map.fold(layer) {
            if let Some(place) = self.place_in_layer(layer, block)? {
                return Ok(place);
            }
        }
        match self.map.beneath_fold(layer) {
            None => Ok(Place::Zero),
            Some(beneath) if deep && beneath.replica != layer.replica => self.place_of(beneath, block),
            Some(_) => Ok(Place::Beneath),
        }
    }

    /// Where a layer has a block; `None` where that is as the layer beneath says.
    #[inline]
    fn place_in(&self, layer: LayerKey, extent: u32, at: usize, group: Option<&Group>, known: Known<'_>) -> Result<Option<Place>, PageKey> {
        if let Some(slot) = group.and_then(|group| group.slots[at]) {
            return Ok(match slot.version {
                Version::Log { at, crc } => Some(Place::At(self.ring_block(at), crc)),
                Version::Zero => Some(Place::Zero),
                Version::Lost => Some(Place::Lost),
                Version::Inherit => None,
            });
        }
        match known {
            Known::Nothing => Ok(None),
            Known::NotLoaded => Err(PageKey::of(layer, extent).0),
            Known::Entry(entry) => Ok(match entry.state(at) {
                BlockState::Inherit => None,
                BlockState::Zero => Some(Place::Zero),
                BlockState::Lost => Some(Place::Lost),
                BlockState::Data => Some(Place::At(self.extent_block(entry.place, at as u64), entry.crcs[at])),
            }),
        }
    }

    /// Reads what looking up a command's first block will read, and leaves it at that. Done for all commands of a turn before any of them is
    /// applied, it has what is not in the core's cache come all at once; one after the other costs a miss or three each.
    pub fn look_ahead(&self, replica: ReplicaNo, op: HostOp) {
        let Some(span) = op.span() else { return };
        let (layer, block) = (self.map.live_layer(replica), span.offset / BLOCK as u64);
        let (extent, at) = ((block / EXTENT_BLOCKS) as u32, (block % EXTENT_BLOCKS) as usize);
        if let Known::Entry(entry) = self.map.known(layer, extent) {
            black_box((entry.place, entry.crcs[at]));
        }
        if let Some(id) = self.index.find(GroupKey { layer, extent }) {
            let group = self.index.group(id);
            black_box((group.queued, group.slots[at].is_some()));
        }
    }

    /// Where each wanted block of the chunk lies; index and map are asked once an extent.
    fn find_places(&self, layer: LayerKey, op: HostOp, chunk: &Chunk, places: &mut Vec<Place>) -> Result<(), NotThere> {
        let all = op.reads();
        let mut i = 0;
        while i < chunk.blocks {
            let block = chunk.first + i;
            let extent = (block / EXTENT_BLOCKS) as u32;
            let group = self.index.find(GroupKey { layer, extent }).map(|id| self.index.group(id));
            let known = self.map.known(layer, extent);
            let stop = chunk.blocks.min(i + EXTENT_BLOCKS - block % EXTENT_BLOCKS);
            while i < stop {
                let at = ((chunk.first + i) % EXTENT_BLOCKS) as usize;
                places.push(if all || Self::wanted(op, chunk, i) {
                    let beneath = || self.map.beneath(layer).map_or(Ok(Place::Zero), |beneath| self.place_of(beneath, chunk.first + i));
                    match self.place_in(layer, extent, at, group, known).and_then(|place| place.map_or_else(beneath, Ok)) {
                        Ok(Place::Lost) => return Err(NotThere::Lost),
                        Ok(place) => place,
                        Err(page) => return Err(NotThere::NotLoaded(page)),
                    }
                } else {
                    Place::Unread
                });
                i += 1;
            }
        }
        Ok(())
    }

    /// The layer that a command reads, while it stands.
    fn layer_of(&self, no: ReplicaNo, op: HostOp) -> Option<LayerKey> {
        let replica = self.map.live(no)?;
        let layer = match op {
            HostOp::ReadSnapshot(layer, _) => replica.kept(layer)?.layer.no,
            _ => replica.live.no,
        };
        Some(LayerKey { replica: no, layer })
    }

    /// Whether the drain is at work on an extent, in a layer or in one beneath it.
    pub(crate) fn is_moving(&self, layer: LayerKey, extent: u64) -> bool {
        let group = |layer| self.index.find(GroupKey { layer, extent: extent as u32 });
        self.map.stack(layer).filter_map(group).any(|id| self.index.group(id).draining)
    }

    /// Whether a merge needs what a block holds now.
    fn wanted(op: HostOp, chunk: &Chunk, i: u64) -> bool {
        match op {
            HostOp::Write(_) | HostOp::Zero(_) => {
                i == 0 && chunk.skip != 0 || i == chunk.blocks - 1 && !(u64::from(chunk.skip) + chunk.bytes).is_multiple_of(BLOCK as u64)
            }
            _ => true,
        }
    }

    /// Looks up the chunk's blocks and reads them; goes on at once when there is nothing to read.
    pub(crate) fn issue_reads<M: Memory>(&mut self, id: JobId, mem: &mut M, fx: &mut Effects) {
        let job = self.host.job(id);
        let (replica, io, op, chunk, done) = (job.replica, job.io, job.op, job.chunk, job.done);
        let is_read = op.reads();
        let mut places = std::mem::take(&mut job.places);
        places.clear();
        let Some(layer) = self.layer_of(replica, op) else {
            self.host.job(id).places = places;
            self.finish_job(id, Status::NotReady, mem, fx);
            return;
        };
        if let Err(refusal) = self.find_places(layer, op, &chunk, &mut places) {
            self.host.job(id).places = places;
            match refusal {
                NotThere::Lost => self.finish_job(id, Status::Unrecovered, mem, fx),
                NotThere::NotLoaded(page) => self.want_page(page, PageWaiter::Job(id), mem, fx),
            }
            return;
        }
        let whole_runs = self.host.job(id).strikes == 0;
        let direct = is_read && chunk.is_aligned() && done.is_multiple_of(BLOCK as u64) && mem.host_direct(io);
        if !direct && self.host.job(id).buf.is_none() {
            match mem.alloc(chunk.blocks as u32) {
                Some(buf) => self.host.job(id).buf = Some(buf),
                None => {
                    self.host.job(id).places = places;
                    self.host.starved.push_back(id);
                    return;
                }
            }
        }
        let buf = self.host.job(id).buf;
        let mut out = 0;
        let mut i = 0;
        while i < places.len() {
            let Place::At(at, _) = places[i] else {
                if places[i] == Place::Zero {
                    match buf {
                        Some(buf) => mem.bytes_mut(buf)[i * BLOCK..][..BLOCK].fill(0),
                        None => mem.host_zero(io, done as u32 + (i * BLOCK) as u32, BLOCK as u32),
                    }
                }
                i += 1;
                continue;
            };
            let mut run = 1;
            // Again after a failure: block by block, so that the one that cannot be read is known and takes no other with it.
            while whole_runs && i + run < places.len() && matches!(places[i + run], Place::At(next, _) if next == at.plus(run as u64)) {
                run += 1;
            }
            if at < self.config.geometry.extents_start {
                self.counters.reads_from_log += run as u64;
            } else {
                self.counters.reads_from_extents += run as u64;
            }
            let part = match buf {
                Some(buf) => Part::Buf { buf, first: i as u32, blocks: run as u32 },
                None => Part::Host { io, offset: done as u32 + (i * BLOCK) as u32, blocks: run as u32 },
            };
            self.submit(fx, DiskKind::Read, at, &[part], Owner::Job(id));
            out += 1;
            i += run;
        }
        let epoch = (out > 0).then(|| self.epochs.enter());
        let job = self.host.job(id);
        job.places = places;
        job.out = out;
        job.read_failed = false;
        if out == 0 {
            self.chunk_read(id, mem, fx);
        } else {
            self.host.job(id).epoch = epoch;
        }
    }

    pub(crate) fn on_job_read<M: Memory>(&mut self, id: JobId, ok: bool, mem: &mut M, fx: &mut Effects) {
        let job = self.host.job(id);
        job.out -= 1;
        job.read_failed |= !ok;
        if job.out > 0 {
            return;
        }
        let epoch = job.epoch.take();
        // A failed command does not tell which block it could not read: what verifies is good all the same.
        let failed = job.read_failed;
        let bad = self.first_mismatch(id, mem);
        if let Some(epoch) = epoch {
            self.epochs.leave(epoch);
        }
        match bad {
            None => self.chunk_read(id, mem, fx),
            Some(at) => self.read_again(id, at, failed, mem, fx),
        }
    }

    /// First block of the chunk whose bytes are not what they should be.
    fn first_mismatch<M: Memory>(&self, id: JobId, mem: &M) -> Option<usize> {
        if self.canary(Canary::SkipReadVerify) {
            return None;
        }
        let job = &self.host.jobs[id.0 as usize];
        job.places.iter().enumerate().position(|(i, place)| match place {
            Place::At(_, crc) => {
                let found = match job.buf {
                    Some(buf) => penstock_wire::crc32c(&mem.bytes(buf)[i * BLOCK..][..BLOCK]),
                    None => mem.host_crc(job.io, job.done as u32 + (i * BLOCK) as u32),
                };
                found != *crc
            }
            _ => false,
        })
    }

    fn read_again<M: Memory>(&mut self, id: JobId, at: usize, failed: bool, mem: &mut M, fx: &mut Effects) {
        self.counters.read_retries += 1;
        let job = self.host.job(id);
        let (replica, op, block, was) = (job.replica, job.op, job.chunk.first + at as u64, job.places[at]);
        let layer = self.layer_of(replica, op);
        let (moving, same) =
            layer.map_or((false, false), |layer| (self.is_moving(layer, block / EXTENT_BLOCKS), self.place_of(layer, block) == Ok(was)));
        if moving && !failed {
            self.host.after_drain.push(id);
            return;
        }
        let job = self.host.job(id);
        job.strikes += u32::from(same || failed);
        let struck = job.strikes >= STRIKES;
        match was {
            Place::At(place, crc) if struck && (same || failed) => {
                self.found_bad(replica, block, place, fx);
                if !self.begin_fetch(replica, block, place, crc, Waiter::Job { job: id, at }) {
                    self.finish_job(id, self.unread(replica), mem, fx);
                }
            }
            _ => self.issue_reads(id, mem, fx),
        }
    }

    /// What a host is told of a block that is bad here and that nobody else has. Where this member leads no more somebody else may: hosts try again,
    /// as they do while a majority is away.
    fn unread(&self, replica: ReplicaNo) -> Status {
        let leads = self.member(replica).is_none_or(|member| member.serving.is_some() && self.stage == Stage::Serving);
        if leads { Status::Unrecovered } else { Status::NotReady }
    }

    /// A block of a chunk that is bad here came from another member, or nobody has it.
    pub(crate) fn job_fetched<M: Memory>(&mut self, id: JobId, at: usize, what: Fetched, mem: &mut M, fx: &mut Effects) {
        let job = self.host.job(id);
        let (replica, op, io, done, target) = (job.replica, job.op, job.io, job.done, job.buf);
        let Fetched::Here(block) = what else {
            let (of, was) = (job.chunk.first + at as u64, job.places[at]);
            let stands = self.layer_of(replica, op).is_some_and(|layer| self.place_of(layer, of) == Ok(was));
            match what {
                // Others differ because it was overwritten, or its snapshot removed, while they were asked.
                Fetched::Nowhere if !stands && self.stage == Stage::Serving => self.issue_reads(id, mem, fx),
                Fetched::Nowhere => self.finish_job(id, self.unread(replica), mem, fx),
                // Who is away may have it.
                _ => self.finish_job(id, Status::NotReady, mem, fx),
            }
            return;
        };
        match target {
            Some(target) => mem.copy_block(block, target, at),
            None => mem.buf_to_host(block, 0, io, done as u32 + (at * BLOCK) as u32, BLOCK as u32),
        }
        if self.canary(Canary::RepairOlder)
            && let Place::At(_, crc) = &mut self.host.job(id).places[at]
        {
            *crc = penstock_wire::crc32c(&mem.bytes(block)[..BLOCK]);
        }
        match self.first_mismatch(id, mem) {
            None => self.chunk_read(id, mem, fx),
            Some(at) => self.read_again(id, at, false, mem, fx),
        }
    }

    /// Every block of the chunk is verified: hand it on.
    fn chunk_read<M: Memory>(&mut self, id: JobId, mem: &mut M, fx: &mut Effects) {
        let job = self.host.job(id);
        let job_is_lost = job.lost;
        if !job.op.reads() {
            if job_is_lost {
                self.finish_job(id, Status::NotReady, mem, fx);
            } else if self.fenced() {
                self.finish_job(id, Status::Fenced, mem, fx);
            } else {
                self.merged(id, mem, fx);
            }
            return;
        }
        let (io, chunk, done) = (job.io, job.chunk, job.done);
        if let Some(buf) = job.buf.take() {
            mem.buf_to_host(buf, chunk.skip, io, done as u32, chunk.bytes as u32);
            mem.free(buf);
        }
        let job = self.host.job(id);
        job.done += chunk.bytes;
        if job.done == job.span.len {
            self.finish_job(id, Status::Ok, mem, fx);
        } else {
            self.next_read_chunk(id);
            self.issue_reads(id, mem, fx);
        }
    }
}
