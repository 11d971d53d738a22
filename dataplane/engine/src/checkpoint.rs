//! Checkpoints: dirty map pages copied on write, the directory twice, then the superblock twice; only then is the log
//! trimmed and what the checkpoint before referred to reused.
//!
//! ```text
//! pages → directory chains → flush (extents, pages, chains) → superblock → flush → its copy → flush → trim, release
//! ```
//! A crash anywhere before the first superblock is durable leaves the checkpoint before, whole, and the log that it needs.

use crate::alloc::{ExtentNo, SlotNo};
use crate::config::{Barrier, Canary, FenceReason, Stage};
use crate::map::{Frozen, PageKey};
use crate::member::{Member, MemberStage};
use crate::port::*;
use crate::replica::Stop;
use crate::store::{Owner, Store};
use penstock_wire::directory::{Directory, MemberRow, PART_PAYLOAD, ReplicaRow};
use penstock_wire::label::Geometry;
use penstock_wire::reservation::Reservations;
use penstock_wire::superblock::{NO_EXTENT, Superblock};
use penstock_wire::{BLOCK, EXTENT, EXTENT_BLOCKS, Index, Seq, Term};
use rustc_hash::FxHashMap;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum CheckpointStage {
    #[default]
    Idle,
    Pages,
    Parts,
    /// One barrier for all that the superblock will speak of: extents drained before, pages, both chains.
    FlushParts,
    Super,
    FlushSuper,
    SuperCopy,
    FlushSuperCopy,
}

/// Commands of a checkpoint that may be out at a time.
const OUT_MAX: usize = 32;

/// A member at one moment: what the extents have applied, its ballot's term, the rest of its row, and its volume's reservations.
type AsOf = (Index, Term, MemberRow, Option<Box<Reservations>>);

#[derive(Debug, Default)]
pub(crate) struct Checkpoint {
    stage: CheckpointStage,
    /// Everything that was applied of the log up to here is in the extents, and the log is kept from `first` on.
    covers: Seq,
    first: Seq,
    /// Members of groups, as of the beginning: what is applied later may lie in batches up to `covers` and not be drained.
    members: FxHashMap<ReplicaNo, AsOf>,
    out: usize,
    bufs: Vec<BufId>,
    pages: Vec<PageKey>,
    /// Slots that the durable checkpoint refers to and the one being written does not.
    pub dropped: Vec<SlotNo>,
    /// Extents of the directory chains: the durable ones and those being written.
    pub chains: [Vec<ExtentNo>; 2],
    new_chains: [Vec<ExtentNo>; 2],
    directory: Vec<u8>,
    directory_crc: u32,
    /// Parts written so far, over both chains.
    parts_sent: usize,
    pub count: u64,
    pub write_count: u64,
}

impl Checkpoint {
    pub fn is_idle(&self) -> bool {
        self.stage == CheckpointStage::Idle
    }

    /// Extents that hold the durable directory.
    pub fn chain_extents(&self) -> impl Iterator<Item = ExtentNo> + '_ {
        self.chains.iter().flatten().copied()
    }
}

/// What the directory says of a member. Its ballot may be newer than what is durable of it in the log: then it was not spoken yet.
fn member_row(member: &Member) -> MemberRow {
    let doubt = member.group().and_then(|group| group.floor()).map(|floor| (floor.index, floor.term));
    MemberRow {
        vote: member.ballot.vote,
        applied_term: member.applied_term,
        members: member.members.clone(),
        doubt,
        stopped: matches!(member.stage, MemberStage::Stopped(Stop::Quarantined(_))),
        rebuild: member.rebuilt_from(),
        past: member.admission.past,
        seen: member.known.iter().map(|known| known.seen).collect(),
    }
}

impl Store {
    /// `covers`: up to here nothing in the index needs the log. `first`: from here on somebody else does, or will.
    pub(crate) fn begin_checkpoint<M: Memory>(&mut self, covers: Seq, first: Seq, mem: &mut M, fx: &mut Effects) {
        assert!(self.checkpoint.is_idle() && self.drain.is_idle());
        assert!(first <= covers.next(), "the log is kept from {first:?}, the extents have it up to {covers:?}");
        self.counters.checkpoints += 1;
        self.drain.unsaved = false;
        self.checkpoint.covers = covers;
        self.checkpoint.first = first.max(self.stream.first_kept());
        self.checkpoint.members.clear();
        for replica in self.map.iter() {
            if let Some(member) = &replica.member {
                let reservations = self.reservations(replica.no);
                let (applied, applied_term) = member.drained(replica.applied, covers);
                let row = MemberRow { applied_term, ..member_row(member) };
                self.checkpoint.members.insert(replica.no, (applied, member.ballot.term, row, reservations));
            }
        }
        self.checkpoint.pages = self.map.take_dirty();
        self.checkpoint.pages.reverse();
        self.checkpoint.stage = CheckpointStage::Pages;
        self.step_checkpoint(mem, fx);
    }

    pub(crate) fn on_checkpoint_done<M: Memory>(&mut self, ok: bool, mem: &mut M, fx: &mut Effects) {
        self.checkpoint.out -= 1;
        if !ok {
            let flush = matches!(
                self.checkpoint.stage,
                CheckpointStage::FlushParts | CheckpointStage::FlushSuper | CheckpointStage::FlushSuperCopy
            );
            self.fence(if flush { FenceReason::FlushFailed } else { FenceReason::CheckpointWriteFailed }, mem, fx);
        }
        if self.checkpoint.out > 0 {
            return;
        }
        for buf in std::mem::take(&mut self.checkpoint.bufs) {
            mem.free(buf);
        }
        if self.fenced() {
            return;
        }
        use CheckpointStage as S;
        let next = match self.checkpoint.stage {
            S::Idle => unreachable!("no checkpoint is under way"),
            // More of the same, until `step` finds nothing left.
            stage @ (S::Pages | S::Parts) => stage,
            S::FlushParts => S::Super,
            S::Super => S::FlushSuper,
            S::FlushSuper => S::SuperCopy,
            S::SuperCopy => S::FlushSuperCopy,
            S::FlushSuperCopy => {
                self.end_checkpoint();
                return;
            }
        };
        self.checkpoint.stage = next;
        self.step_checkpoint(mem, fx);
    }

    /// Goes on as far as memory allows; called again each turn while something is left.
    pub(crate) fn step_checkpoint<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        use CheckpointStage as S;
        while self.checkpoint.out == 0 && matches!(self.stage, Stage::Serving | Stage::Stopping) {
            match self.checkpoint.stage {
                S::Idle => return,
                S::Pages => {
                    if !self.checkpoint.pages.is_empty() {
                        if !self.send_pages(mem, fx) {
                            return;
                        }
                    } else {
                        self.plan_directory();
                        self.checkpoint.stage = S::Parts;
                    }
                }
                S::Parts => {
                    if self.checkpoint.parts_sent < self.checkpoint.new_chains[0].len() * 2 {
                        if !self.send_parts(mem, fx) {
                            return;
                        }
                    } else {
                        self.barrier_then(S::FlushParts, S::Super, fx);
                    }
                }
                S::Super | S::SuperCopy => {
                    if !self.send_superblock(mem, fx) {
                        return;
                    }
                }
                S::FlushSuper if self.barrier() == Barrier::NotNeeded => self.checkpoint.stage = S::SuperCopy,
                S::FlushSuperCopy if self.barrier() == Barrier::NotNeeded => {
                    self.end_checkpoint();
                    return;
                }
                S::FlushParts | S::FlushSuper | S::FlushSuperCopy => {
                    self.checkpoint.out = 1;
                    self.flush(fx, Owner::Checkpoint);
                }
            }
        }
    }

    fn barrier_then(&mut self, flush: CheckpointStage, without: CheckpointStage, fx: &mut Effects) {
        if self.barrier() == Barrier::Flush && !self.canary(Canary::CheckpointBeforeFlush) {
            self.checkpoint.stage = flush;
            self.checkpoint.out = 1;
            self.flush(fx, Owner::Checkpoint);
        } else {
            self.checkpoint.stage = without;
        }
    }

    fn checkpoint_write(&mut self, buf: BufId, at: penstock_wire::BlockAddr, blocks: u32, fx: &mut Effects) {
        self.checkpoint.bufs.push(buf);
        self.checkpoint.out += 1;
        self.submit(fx, DiskKind::Write, at, &[Part::Buf { buf, first: 0, blocks }], Owner::Checkpoint);
    }

    /// Sends dirty pages to new slots. False when memory is short and nothing is out.
    fn send_pages<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) -> bool {
        while self.checkpoint.out < OUT_MAX {
            let Some(key) = self.checkpoint.pages.pop() else { break };
            let Some(state) = self.map.page(key) else { continue };
            let page = state.cached.as_ref().expect("a dirty page is loaded");
            if page.is_empty() {
                if let Some(slot) = self.map.drop_page(key) {
                    self.checkpoint.dropped.push(slot);
                }
                continue;
            }
            let Some(buf) = mem.alloc(1) else {
                self.checkpoint.pages.push(key);
                break;
            };
            let slot = self.space.take_slot().expect("the reserve holds the slots of a checkpoint");
            let name = self.page_name(key);
            let count = self.checkpoint.count + 1;
            let state = self.map.page_mut(key).expect("just seen");
            let page = state.cached.as_ref().expect("just seen");
            let crc = penstock_wire::page::encode_into(&mut mem.bytes_mut(buf)[..BLOCK], &name, count, page);
            state.dirty = false;
            if let Some((old, _)) = state.on_disk.replace((slot, crc)) {
                self.checkpoint.dropped.push(old);
            }
            self.counters.checkpoint_pages += 1;
            let at = self.extent_block(0, u64::from(slot.0));
            self.checkpoint_write(buf, at, 1, fx);
        }
        if self.canary(Canary::ReuseSlotEarly) {
            let mut dropped = std::mem::take(&mut self.checkpoint.dropped);
            self.space.release_slots(&mut dropped);
        }
        self.checkpoint.out > 0 || self.checkpoint.pages.is_empty()
    }

    /// Everything that the directory says is settled now: places for its chains, the bitmap with them in it.
    fn plan_directory(&mut self) {
        let bitmap_len = self.space.extents().div_ceil(8) as usize;
        let covered = self.checkpoint.covers;
        let mut directory = Directory { next_replica: self.map.next_no(), covered, replicas: Vec::new(), taken: vec![0; bitmap_len] };
        for replica in self.map.iter() {
            // A member that was born meanwhile has nothing in the batches that are covered.
            let member = replica.member.as_ref().map(|member| {
                let now = || (replica.applied, member.ballot.term, member_row(member), self.reservations(replica.no));
                self.checkpoint.members.get(&replica.no).cloned().unwrap_or_else(now)
            });
            let alone = || (replica.applied, replica.term, None, self.reservations(replica.no));
            let (applied, term, member, reservations) =
                member.map_or_else(alone, |(applied, term, row, reservations)| (applied, term, Some(row), reservations));
            directory.replicas.push(ReplicaRow {
                no: replica.no.0,
                deleting: replica.deleting,
                term,
                applied,
                shape: replica.shape.clone(),
                layer: replica.live.no.0,
                since: replica.since,
                pages: replica.live.rows(),
                frozen: replica.frozen.iter().map(Frozen::row).collect(),
                origin: replica.origin.map(|origin| (origin.replica.0, origin.layer.0)),
                member,
                reservations,
            });
        }
        let parts = directory.encode().len().div_ceil(PART_PAYLOAD);
        for chain in 0..2 {
            self.checkpoint.new_chains[chain] =
                (0..parts).map(|_| self.space.take_reserved().expect("the reserve holds the directories of a checkpoint")).collect();
        }
        let old: Vec<ExtentNo> = self.checkpoint.chain_extents().collect();
        for extent in old {
            self.space.untake(extent);
        }
        directory.taken = self.space.bitmap(&self.checkpoint.dropped);
        self.checkpoint.directory = directory.encode();
        self.checkpoint.directory_crc = penstock_wire::crc32c(&self.checkpoint.directory);
        self.checkpoint.parts_sent = 0;
    }

    fn send_parts<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) -> bool {
        let parts = self.checkpoint.new_chains[0].len();
        while self.checkpoint.out < OUT_MAX && self.checkpoint.parts_sent < parts * 2 {
            let Some(buf) = mem.alloc(EXTENT_BLOCKS as u32) else { break };
            let (chain, no) = (self.checkpoint.parts_sent / parts, self.checkpoint.parts_sent % parts);
            let extents = &self.checkpoint.new_chains[chain];
            let from = no * PART_PAYLOAD;
            let payload = &self.checkpoint.directory[from..(from + PART_PAYLOAD).min(self.checkpoint.directory.len())];
            let part = penstock_wire::directory::Part {
                version: penstock_wire::directory::VERSION,
                incarnation: self.config.incarnation,
                store: self.config.store,
                checkpoint: self.checkpoint.count + 1,
                part: no as u32,
                next: extents.get(no + 1).map_or(NO_EXTENT, |extent| extent.0),
                twin: self.checkpoint.new_chains[1 - chain][no].0,
                len: payload.len() as u32,
            };
            part.encode_into(&mut mem.bytes_mut(buf)[..EXTENT], payload);
            let at = self.extent_block(extents[no].0, 0);
            self.checkpoint.parts_sent += 1;
            self.checkpoint_write(buf, at, EXTENT_BLOCKS as u32, fx);
        }
        self.checkpoint.out > 0
    }

    fn send_superblock<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) -> bool {
        let Some(buf) = mem.alloc(1) else { return false };
        let copy = usize::from(self.checkpoint.stage == CheckpointStage::SuperCopy);
        let write_count = self.checkpoint.write_count + 1;
        let first = self.checkpoint.first;
        let superblock = Superblock {
            incarnation: self.config.incarnation,
            store: self.config.store,
            write_count,
            generation: self.stream.generation,
            log_seq: first,
            log_at: self.stream.place_of(first),
            log_generation: self.stream.generation_from(first),
            checkpoint: self.checkpoint.count + 1,
            directory: [self.checkpoint.new_chains[0][0].0, self.checkpoint.new_chains[1][0].0],
            directory_parts: self.checkpoint.new_chains[0].len() as u32,
            directory_len: self.checkpoint.directory.len() as u64,
            directory_crc: self.checkpoint.directory_crc,
        };
        superblock.encode_into(&mut mem.bytes_mut(buf)[..BLOCK]);
        let at = Geometry::superblock_slots(write_count)[copy];
        self.checkpoint_write(buf, at, 1, fx);
        true
    }

    /// The checkpoint is durable, twice: let go of what only the one before needed.
    fn end_checkpoint(&mut self) {
        self.checkpoint.stage = CheckpointStage::Idle;
        self.checkpoint.count += 1;
        self.checkpoint.write_count += 1;
        let old: Vec<ExtentNo> = self.checkpoint.chain_extents().collect();
        for extent in old {
            self.space.release(extent);
        }
        self.checkpoint.chains = std::mem::take(&mut self.checkpoint.new_chains);
        let mut dropped = std::mem::take(&mut self.checkpoint.dropped);
        self.space.release_slots(&mut dropped);
        self.checkpoint.dropped = dropped;
        self.checkpoint.directory.clear();
        for extent in std::mem::take(&mut self.drain.freed) {
            self.space.let_go(extent, &mut self.epochs);
        }
        let first = self.checkpoint.first;
        if first > self.stream.first_kept() {
            self.stream.trim(first, &mut self.epochs);
            self.trim_members();
        }
        for (no, (applied, ..)) in std::mem::take(&mut self.checkpoint.members) {
            self.member_mut(no).into_iter().for_each(|member| member.saved = applied);
        }
        self.drain.for_clone = false;
        self.stream.credit += 64;
    }
}
