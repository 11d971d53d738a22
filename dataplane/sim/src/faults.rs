//! Faults of drives: where and when they strike, and the note that is made of what they destroy.
//!
//! Damage to data on the media is injected afterwards, on blocks at rest: a write that was lost or misdirected looks like
//! one that was whole and now is not. Every block that is damaged is either a host's data, whose image the oracle is told,
//! or metadata, and then all of that store may be reported lost, but never be wrong. What nobody could detect with one
//! copy is not injected (`evidence`). To add a fault: draw its rate in `plan`, strike here, name its class in the tally.

use std::rc::Rc;

use penstock_engine::{DiskId, DiskKind, Event, FenceReason};

use crate::device::in_ring;
use crate::drive::Page;
use crate::rng::Rng;
use crate::stamp::{BLOCK, block_of};
use crate::world::{Standing, World};

/// What lies on a block of a drive.
pub enum Lying {
    /// Never written.
    Nothing,
    /// Zeros that were written: they do not say whose they are, so nothing is done to them.
    Zeros,
    Data,
    Metadata,
}

pub fn lying(page: Option<&Rc<Page>>) -> Lying {
    match page {
        None => Lying::Nothing,
        Some(p) if **p == [0; BLOCK] => Lying::Zeros,
        Some(p) if block_of(&p[..]).is_some() => Lying::Data,
        Some(_) => Lying::Metadata,
    }
}

impl World {
    /// After each turn: decay of what lies at rest.
    pub fn strike(&mut self, shard: usize) {
        if !self.stormy {
            return;
        }
        let f = self.plan.faults.clone();
        if self.rng.one_in(f.rot_one_in)
            && let Some(at) = self.victim(shard, true)
        {
            let mut page = **self.drives[self.shards[shard].drive].look(at).expect("victims hold something");
            rot(&mut page, &mut self.rng);
            self.damage(shard, at, Some(Rc::new(page)), "bit rot (5)");
        }
        if self.rng.one_in(f.lost_write_one_in)
            && let Some(at) = self.victim(shard, true)
            && let Some(before) = self.drives[self.shards[shard].drive].before(at)
        {
            self.damage(shard, at, before, "lost write (2)");
        }
        if self.rng.one_in(f.misdirected_one_in)
            && let (Some(meant), Some(hit)) = (self.victim(shard, true), self.victim(shard, false))
            && meant != hit
        {
            let drive = &self.drives[self.shards[shard].drive];
            if let Some(before) = drive.before(meant) {
                let page = drive.look(meant).cloned();
                self.damage(shard, hit, page, "misdirected write (4)");
                self.damage(shard, meant, before, "misdirected write (4)");
            }
        }
        if self.rng.one_in(f.latent_one_in)
            && let Some(at) = self.victim(shard, true)
        {
            let d = self.shards[shard].drive;
            let page = self.drives[d].look(at).cloned();
            self.damage(shard, at, page, "latent sector error (5)");
            self.drives[d].set_latent(at);
        }
    }

    /// A block at rest that may be damaged: `written` ones hold something, others may hold nothing.
    fn victim(&mut self, shard: usize, written: bool) -> Option<u64> {
        let s = &self.shards[shard];
        let drive = &self.drives[s.drive];
        let start = s.share.start.0;
        let occupied = if written { drive.occupied(start..start + s.share.blocks) } else { Vec::new() };
        for _ in 0..30 {
            let at = if written {
                if occupied.is_empty() {
                    return None;
                }
                self.rng.pick(&occupied)
            } else {
                start + self.rng.below(s.share.blocks)
            };
            if self.may_be_damaged(shard, at, written) {
                return Some(at);
            }
        }
        None
    }

    pub fn may_be_damaged(&self, shard: usize, at: u64, written: bool) -> bool {
        let s = &self.shards[shard];
        let drive = &self.drives[s.drive];
        let block = at - s.share.start.0;
        let busy = s.out.values().any(|o| o.op.kind == DiskKind::Write && o.blocks().contains(&block));
        if busy || drive.is_cached(at) {
            return false;
        }
        if in_ring(&s.geometry, &(block..block + 1)) && !s.evidence.is_free_or_vouched_for(block) {
            return false;
        }
        match lying(drive.look(at)) {
            Lying::Nothing => !written,
            Lying::Zeros => false,
            Lying::Data => true,
            Lying::Metadata => self.plan.faults.metadata,
        }
    }

    fn damage(&mut self, shard: usize, at: u64, page: Option<Rc<Page>>, class: &'static str) {
        self.note_destroyed(shard, at);
        let d = self.shards[shard].drive;
        self.drives[d].corrupt(at, page);
        self.tally.fault(class);
        self.trace.note(self.now, &[21, at], || {
            format!("{class} at block {at} of drive {d}, {} of shard {shard}", at - self.shards[shard].share.start.0)
        });
    }

    /// Tells the oracle what the block holds, which is about to be lost.
    pub fn note_destroyed(&mut self, shard: usize, at: u64) {
        let page = self.drives[self.shards[shard].drive].look(at).cloned();
        match lying(page.as_ref()) {
            Lying::Nothing | Lying::Zeros => {}
            Lying::Data => {
                let (place, image) = block_of(&page.expect("data")[..]).expect("data");
                self.oracle.destroy(place, image);
            }
            Lying::Metadata => self.cloud(shard),
        }
    }

    /// Metadata of the store was hit: anything of it may be reported lost.
    pub fn cloud(&mut self, shard: usize) {
        self.shards[shard].clouded = true;
        for v in self.volumes.values().filter(|v| v.shard == shard) {
            self.oracle.cloud(v.no);
        }
        self.tally.fault("metadata hit (29)");
    }

    /// Whether the command fails, and what it does to the drive in failing.
    pub fn drive_fails(&mut self, shard: usize, id: DiskId) -> bool {
        let (op, blocks) = {
            let out = &self.shards[shard].out[&id];
            (out.op, out.blocks())
        };
        let (d, start) = (self.shards[shard].drive, self.shards[shard].share.start.0);
        match op.kind {
            DiskKind::Read => {
                let latent = blocks.clone().any(|b| self.drives[d].is_latent(start + b));
                let passing = self.stormy && self.rng.one_in(self.plan.faults.read_error_one_in) && self.all_data(shard, blocks.clone());
                if !latent && !passing {
                    return false;
                }
                if passing {
                    // A read that fails tells nothing of the block: what it holds may be called lost while it fails.
                    for b in blocks {
                        self.note_destroyed(shard, start + b);
                    }
                    self.shards[shard].struck_in_opening |= self.shards[shard].standing == Standing::Opening;
                }
                self.tally.fault(if latent { "read of a latent error (5)" } else { "read failed once (5)" });
                let s = &mut self.shards[shard];
                s.out[&id].fill_with_rubbish(&mut s.mem);
                true
            }
            DiskKind::Write => {
                if !self.stormy || self.plan.faults.write_fails_after.is_none_or(|n| self.drive_commands[d] < n) {
                    return false;
                }
                self.plan.faults.write_fails_after = None;
                let s = &mut self.shards[shard];
                s.out[&id].land_partly(start, &mut self.drives[d], &s.mem, &mut self.rng);
                self.command_fails(shard, "write failed");
                true
            }
            DiskKind::Flush => {
                if !self.stormy || self.plan.faults.flush_fails_after.is_none_or(|n| self.drive_commands[d] < n) {
                    return false;
                }
                self.plan.faults.flush_fails_after = None;
                let whole = 0..self.drives[d].blocks();
                let forgotten = self.drives[d].flush_fails(whole, &mut self.rng);
                self.tally.faults("blocks forgotten by a failed flush", forgotten);
                self.command_fails(shard, "flush failed (7)");
                for other in 0..self.shards.len() {
                    if self.shards[other].drive == d {
                        self.check_forgotten(other);
                    }
                }
                // It is told once, to one store; what it forgot may be another's.
                for s in self.shards.iter_mut().filter(|s| s.drive == d) {
                    s.evidence.died();
                }
                for other in 0..self.shards.len() {
                    if other != shard && self.shards[other].drive == d {
                        let s = &mut self.shards[other];
                        s.command_failed = true;
                        if s.standing == Standing::Opening {
                            // It is told of no fence that the node told it of: it comes up fenced, and what is unproven is hidden.
                            s.opened_fenced = true;
                            s.fence.get_or_insert(FenceReason::FlushFailed);
                        }
                        self.feed(other, Event::Fence(FenceReason::FlushFailed));
                    }
                }
                true
            }
        }
    }

    fn command_fails(&mut self, shard: usize, class: &'static str) {
        self.tally.fault(class);
        let s = &mut self.shards[shard];
        s.command_failed = true;
        s.struck_in_opening |= s.standing == Standing::Opening;
    }

    fn all_data(&self, shard: usize, blocks: std::ops::Range<u64>) -> bool {
        let s = &self.shards[shard];
        blocks.into_iter().all(|b| matches!(lying(self.drives[s.drive].look(s.share.start.0 + b)), Lying::Data))
    }
}

/// Changes a page as decay does: one bit, some bytes, a sector, all of it, or to zeros.
pub fn rot(page: &mut Page, rng: &mut Rng) {
    let old = *page;
    while *page == old {
        match rng.below(5) {
            0 => page[rng.below(BLOCK as u64) as usize] ^= 1 << rng.below(8),
            1 => {
                let at = rng.below(BLOCK as u64 - 16) as usize;
                for b in &mut page[at..at + 16] {
                    *b = rng.draw() as u8;
                }
            }
            2 => {
                let at = rng.below(8) as usize * 512;
                page[at..at + 512].fill(0);
            }
            3 => {
                for b in page.iter_mut() {
                    *b = rng.draw() as u8;
                }
            }
            _ => page.fill(0),
        }
    }
}
