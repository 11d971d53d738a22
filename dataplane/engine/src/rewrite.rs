//! The last step before a log is built upon: what recovery believes and nothing proves durable is written again.
//!
//! A record that was read may lie in a cache alone. The barrier after the Open batch makes it durable, unless a barrier failed
//! before this life: a page cache then calls lost pages clean, shows them to every reader, saves them at no later barrier and
//! loses them when the power goes. Nobody knows for certain that none failed (the process may have died before it could say
//! so, or a barrier of an opening failed), so every opening rewrites, not only one after a fence; it is little, since a batch
//! is never more than a few ahead of the last one known durable.
//!
//! ```text
//! superblock → flush → its copy → batches above the highest `durable_to` → (recover) Open batch → flush → serve
//! ```
//! Same bytes to the same places: a crash anywhere in here leaves what a crash before it would. The superblock is left
//! alone when its copy is whole too, since the copy is written only once a barrier has passed over the first. What else
//! recovery believes needs no rewriting: pages, directory and extents were behind a barrier before the superblock that
//! refers to them was written, and what the drain overwrote in place since is in the log, to be drained again.

use crate::config::{Barrier, Canary, OpenError};
use crate::port::*;
use crate::recover::{Recovery, bad_payload};
use crate::store::{Owner, Store};
use penstock_wire::batch::{Batch, decode_section};
use penstock_wire::label::Geometry;
use penstock_wire::superblock::Superblock;
use penstock_wire::{BLOCK, RingPos, Seq};
use std::collections::VecDeque;

/// A batch that the walk found whole.
#[derive(Clone, Copy, Debug)]
struct Found {
    seq: Seq,
    at: RingPos,
    blocks: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum RewriteStage {
    #[default]
    Super,
    FlushSuper,
    SuperCopy,
    Read,
    Write,
}

#[derive(Debug, Default)]
pub(crate) struct Rewrite {
    stage: RewriteStage,
    /// Batches that nothing proves durable yet.
    tail: VecDeque<Found>,
    /// The batch at hand was read, and was not what the walk had found.
    again: bool,
}

impl Rewrite {
    pub fn walked(&mut self, seq: Seq, at: RingPos, blocks: u32) {
        self.tail.push_back(Found { seq, at, blocks });
    }

    /// All up to here are durable for certain.
    pub fn proven(&mut self, to: Seq) {
        while self.tail.front().is_some_and(|found| found.seq <= to) {
            self.tail.pop_front();
        }
    }
}

impl Store {
    /// Sends the next command out. True when nothing is left to rewrite.
    pub(crate) fn step_rewrite<M: Memory>(&mut self, rec: &mut Recovery, mem: &mut M, fx: &mut Effects) -> bool {
        if self.barrier() == Barrier::NotNeeded || self.canary(Canary::TrustTail) {
            return true;
        }
        if rec.rewrite.stage == RewriteStage::Super && rec.superblock_is_doubled() {
            rec.rewrite.stage = RewriteStage::Read;
        }
        match rec.rewrite.stage {
            RewriteStage::Super => self.rewrite_superblock(rec, 0, mem, fx),
            RewriteStage::SuperCopy => self.rewrite_superblock(rec, 1, mem, fx),
            RewriteStage::FlushSuper => {
                rec.out = true;
                self.flush(fx, Owner::Recovery);
            }
            RewriteStage::Read => {
                let Some(found) = rec.rewrite.tail.front() else { return true };
                let at = self.ring_block((found.at.0 % self.stream.ring_blocks()) as u32);
                self.read_for_recovery(rec, at, u64::from(found.blocks), mem, fx);
            }
            RewriteStage::Write => unreachable!("a batch is written as soon as it was read"),
        }
        false
    }

    fn rewrite_superblock<M: Memory>(&mut self, rec: &mut Recovery, copy: usize, mem: &mut M, fx: &mut Effects) {
        let Some(buf) = mem.alloc(1) else { return };
        let superblock = rec.superblock();
        superblock.encode_into(&mut mem.bytes_mut(buf)[..BLOCK]);
        rec.buf = Some(buf);
        rec.out = true;
        let at = Geometry::superblock_slots(superblock.write_count)[copy];
        self.submit(fx, DiskKind::Write, at, &[Part::Buf { buf, first: 0, blocks: 1 }], Owner::Recovery);
    }

    pub(crate) fn on_rewrite_done<M: Memory>(&mut self, rec: &mut Recovery, ok: bool, mem: &mut M, fx: &mut Effects) {
        use RewriteStage as S;
        if rec.rewrite.stage == S::Read {
            let found = *rec.rewrite.tail.front().expect("it is being read");
            let buf = rec.buf.expect("it is read into a buffer");
            let at = self.ring_block((found.at.0 % self.stream.ring_blocks()) as u32);
            if ok && is_whole(&mem.bytes(buf)[..found.blocks as usize * BLOCK], found) {
                rec.rewrite.stage = S::Write;
                rec.rewrite.again = false;
                rec.out = true;
                self.submit(fx, DiskKind::Write, at, &[Part::Buf { buf, first: 0, blocks: found.blocks }], Owner::Recovery);
                return;
            }
            // It was whole when the walk read it. Nothing was built on it yet, so the next opening may judge it anew.
            if std::mem::replace(&mut rec.rewrite.again, true) {
                self.open_failed(OpenError::ReadFailed(at.0), fx);
            }
        } else if !ok {
            self.open_failed(OpenError::WriteFailed, fx);
        } else {
            rec.rewrite.stage = match rec.rewrite.stage {
                S::Super => S::FlushSuper,
                S::FlushSuper => S::SuperCopy,
                S::SuperCopy => S::Read,
                S::Write => {
                    rec.rewrite.tail.pop_front();
                    self.report.rewritten_batches += 1;
                    S::Read
                }
                S::Read => unreachable!("handled above"),
            };
        }
        if let Some(buf) = rec.buf.take() {
            mem.free(buf);
        }
    }
}

/// Whether these are the bytes that the walk believed.
fn is_whole(bytes: &[u8], found: Found) -> bool {
    let Ok(batch) = Batch::decode(bytes) else { return false };
    batch.header.seq == found.seq
        && batch.header.at == found.at
        && batch.blocks() == u64::from(found.blocks)
        && decode_section(batch.own, batch.header.payload_blocks)
            .is_ok_and(|entries| bad_payload(&bytes[batch.header_blocks as usize * BLOCK..], &entries).is_empty())
}

/// Whether both blocks of the newest superblock's slot hold it.
pub(crate) fn doubled(superblock: &Superblock, read: &[Superblock]) -> bool {
    read.iter().filter(|other| *other == superblock).count() == Geometry::superblock_slots(superblock.write_count).len()
}
