//! The drives of a fleet: commands and when they complete, which fail, what decays, and the ends of lives.
//!
//! Damage is noted with the oracle exactly as in [`crate::faults`]: a block that is damaged is a host's data, whose image is told; metadata is left to
//! the one-node simulator. A member that can ask its peers for what rotted answers; who cannot may say so. Never anything else.

use std::rc::Rc;

use penstock_engine::{DiskId, DiskKind, DiskOp, Part};
use penstock_wire::batch::Batch;

use super::node::{Attempt, Phase};
use super::world::{Coming, World};
use crate::device::{Out, in_ring};
use crate::drive::{Kind, Page};
use crate::faults::{Lying, lying, rot};
use crate::stamp::block_of;

/// Blocks behind a record in which those of the same turns lie.
const NEAR: u64 = 64;

impl World {
    pub fn submit(&mut self, node: usize, op: DiskOp, parts: &[Part]) {
        let it = &mut self.nodes[node];
        let out = Out::take(op, parts, &it.share, &it.geometry, it.out.values(), &mut it.mem, &it.drive);
        self.tally.check("device commands well formed");
        if op.kind == DiskKind::Write && in_ring(&it.geometry, &out.blocks()) {
            let bytes = out.first_bytes(2, &it.mem);
            let header = Batch::decode(&bytes).expect("what is written to the ring begins with a header").header;
            it.evidence.submitted(op.id, out.blocks(), header.seq, header.durable_to);
        }
        it.out.insert(op.id, out);
        it.drive_commands += 1;
        let (lo, hi) = it.plan.latency_us;
        let mut us = self.rng.within(lo, hi) + u64::from(op.blocks) / 4;
        if op.kind == DiskKind::Flush {
            us += hi;
        }
        if it.slow > self.now {
            us = (us * it.slowness).min(1_000_000);
            self.tally.fault("command of a slow drive (12)");
        }
        let life = it.life;
        self.after(us, Coming::DiskDone { node, life, id: op.id });
    }

    /// The drive carries a command out and says so.
    pub fn disk_done(&mut self, node: usize, id: DiskId) {
        let failure = self.drive_fails(node, id);
        let it = &mut self.nodes[node];
        let start = it.share.start.0;
        let out = it.out.get_mut(&id).expect("out");
        out.carried_out = true;
        let op = out.op;
        let ring = in_ring(&it.geometry, &out.blocks());
        if !failure {
            match op.kind {
                DiskKind::Read => out.fill(start, &it.drive, &mut it.mem, &mut self.rng),
                DiskKind::Write => {
                    out.land_whole(start, &mut it.drive, &it.mem);
                    if ring {
                        it.evidence.completed(id, it.drive.now(), it.drive.kind() == Kind::Volatile);
                    }
                }
                DiskKind::Flush => {
                    let upto = out.upto;
                    it.drive.flush(upto);
                    it.evidence.flushed(upto);
                }
            }
        }
        self.feed(node, penstock_engine::Event::DiskDone { id, ok: !failure });
    }

    /// Whether the command fails, and what it does to the drive in failing.
    fn drive_fails(&mut self, node: usize, id: DiskId) -> bool {
        let spare = self.spare();
        let it = &mut self.nodes[node];
        let out = &it.out[&id];
        let start = it.share.start.0;
        let due = |after: Option<u64>| after.is_some_and(|n| it.drive_commands >= n) && !self.calm && spare;
        match out.op.kind {
            DiskKind::Read => {
                let latent = out.blocks().any(|b| it.drive.is_latent(start + b));
                if latent {
                    self.tally.fault("read of a latent error (5)");
                    out.fill_with_rubbish(&mut it.mem);
                }
                latent
            }
            DiskKind::Write if due(self.plan.decay.write_fails_after) => {
                self.plan.decay.write_fails_after = None;
                out.land_partly(start, &mut it.drive, &it.mem, &mut self.rng);
                it.command_failed = true;
                self.tally.fault("write failed");
                true
            }
            DiskKind::Flush if due(self.plan.decay.flush_fails_after) => {
                self.plan.decay.flush_fails_after = None;
                let whole = 0..it.drive.blocks();
                let forgotten = it.drive.flush_fails(whole, &mut self.rng);
                it.evidence.died();
                it.command_failed = true;
                self.tally.faults("blocks forgotten by a failed flush", forgotten);
                self.tally.fault("flush failed (7)");
                true
            }
            DiskKind::Write | DiskKind::Flush => false,
        }
    }

    /// Whether one more member may lose what it promised, without a quorum losing it.
    pub fn spare(&self) -> bool {
        let hurt = self.nodes.iter().filter(|it| it.rotten || it.command_failed || it.decays || it.gone.is_some()).count();
        hurt + 1 < self.nodes.len().div_ceil(2)
    }

    /// After each turn: decay of what lies at rest.
    pub fn decay(&mut self, node: usize) {
        if self.calm || !self.nodes[node].decays {
            return;
        }
        let d = self.plan.decay.clone();
        if self.rng.one_in(d.rot_one_in)
            && let Some(at) = self.victim(node)
        {
            let mut page = **self.nodes[node].drive.look(at).expect("victims hold something");
            rot(&mut page, &mut self.rng);
            self.damage(node, at, Some(Rc::new(page)), "bit rot (5)");
        }
        if self.rng.one_in(d.lost_write_one_in)
            && let Some(at) = self.victim(node)
            && let Some(before) = self.nodes[node].drive.before(at)
        {
            self.damage(node, at, before, "lost write (2)");
        }
        if self.rng.one_in(d.misdirected_one_in)
            && let (Some(meant), Some(hit)) = (self.victim(node), self.victim(node))
            && meant != hit
            && let Some(before) = self.nodes[node].drive.before(meant)
        {
            let page = self.nodes[node].drive.look(meant).cloned();
            self.damage(node, hit, page, "misdirected write (4)");
            self.damage(node, meant, before, "misdirected write (4)");
        }
        if self.rng.one_in(d.latent_one_in)
            && let Some(at) = self.victim(node)
        {
            let page = self.nodes[node].drive.look(at).cloned();
            self.damage(node, at, page, "latent sector error (5)");
            self.nodes[node].drive.set_latent(at);
        }
    }

    /// A block of a host's data at rest.
    fn victim(&mut self, node: usize) -> Option<u64> {
        let it = &self.nodes[node];
        let start = it.share.start.0;
        let occupied = it.drive.occupied(start..start + it.share.blocks);
        if occupied.is_empty() {
            return None;
        }
        (0..20).map(|_| self.rng.pick(&occupied)).find(|at| may_be_damaged(it, *at))
    }

    /// A byte of a block turns, on a drive at rest.
    pub fn ruin(&mut self, node: usize, at: u64, class: &'static str) {
        let mut page = **self.nodes[node].drive.look(at).expect("it holds something");
        rot(&mut page, &mut self.rng);
        self.damage(node, at, Some(Rc::new(page)), class);
    }

    pub fn damage(&mut self, node: usize, at: u64, page: Option<Rc<Page>>, class: &'static str) {
        let it = &mut self.nodes[node];
        if let Some(old) = it.drive.look(at)
            && let Some((place, image)) = block_of(&old[..])
        {
            self.oracle.destroy(place, image);
        }
        it.drive.corrupt(at, page);
        self.tally.fault(class);
        let start = it.share.start.0;
        self.trace.note(self.now, &[21, node as u64, at], || format!("{class} at block {at} of node {node}, {} of its store", at - start));
    }

    /// The process of a node ends, and its power with it or not.
    pub fn die(&mut self, node: usize, power: bool) {
        if !self.nodes[node].alive() {
            return;
        }
        self.tally.fault(if power { "power cut (2, 3)" } else { "process killed (13)" });
        if self.nodes[node].phase == Phase::Opening {
            self.tally.fault("death during recovery (17)");
        }
        self.trace.note(self.now, &[20, node as u64, u64::from(power)], || format!("node {node} dies, power cut: {power}"));
        let mut rng = self.rng.fork(3);
        self.count_work(node);
        let spare = self.nodes[node].decays || self.spare();
        let rots = power && self.plan.decay.newest && !self.calm && spare && self.rng.one_in(2);
        let newest = if rots { self.nodes[node].evidence.newest_known() } else { Vec::new() };
        let it = &mut self.nodes[node];
        let attempts = it.stop(power, &mut rng, &mut self.tally);
        if let Some(block) = (!newest.is_empty() && !self.is_undescribed_without(node, &newest)).then(|| self.rng.pick(&newest)) {
            let at = self.nodes[node].share.start.0 + block;
            self.rot_newest(node, at);
        }
        for attempt in attempts {
            self.abandoned(node, attempt);
        }
        let singles: Vec<u32> = self.volumes.values().filter(|v| !v.replicated && v.home == node).map(|v| v.no).collect();
        for no in singles {
            self.oracle.crashed_volume(no).unwrap_or_else(|wrong| panic!("{wrong}"));
        }
        self.orders_forgotten(node);
        let back = if self.calm || self.rng.one_in(3) { self.rng.within(1_000, 40_000) } else { self.rng.within(50_000, 1_500_000) };
        self.after(back, Coming::Start { node });
    }

    /// Whether the power cut took the record after this one, in which the second copy of its descriptors is, and left a later one that knows it durable:
    /// rot of its own copy would then be the second loss of a header that was promised.
    fn is_undescribed_without(&self, node: usize, record: &[u64]) -> bool {
        let it = &self.nodes[node];
        let look = |block: u64| it.drive.bytes(it.share.start.0 + block);
        let seq = |block: u64| Some(Batch::decode(&[look(block), look(block + 1)].concat()).ok()?.header.seq);
        let (Some(first), Some(last)) = (record.iter().min(), record.iter().max()) else { return false };
        let Some(own) = seq(*first) else { return false };
        let is_later = |block: u64| seq(block).is_some_and(|of| of > own);
        !is_later(last + 1) && (last + 2..last + NEAR).any(is_later)
    }

    fn rot_newest(&mut self, node: usize, at: u64) {
        let it = &mut self.nodes[node];
        if it.drive.is_cached(at) || matches!(lying(it.drive.look(at)), Lying::Nothing) {
            return;
        }
        let mut page = **it.drive.look(at).expect("it holds something");
        if let Some((place, image)) = block_of(&page) {
            self.oracle.destroy(place, image);
        }
        // A header that is gone without a trace cannot be told from one that never was: some of it stays.
        let first = self.rng.below(crate::stamp::BLOCK as u64 - 16) as usize;
        page[first..first + 16].iter_mut().for_each(|byte| *byte ^= 1 << self.rng.below(8));
        it.drive.corrupt(at, Some(Rc::new(page)));
        it.rotten = true;
        self.tally.fault("rot of the newest promised record (5)");
        self.trace.note(self.now, &[22, node as u64, at], || format!("the newest promised record of node {node} rots, at block {at}"));
    }

    /// A command that its node will never answer.
    fn abandoned(&mut self, node: usize, attempt: Attempt) {
        if !attempt.given_up
            && let Some(v) = self.volumes.get_mut(&attempt.home)
        {
            v.out = v.out.saturating_sub(1);
        }
        if !attempt.lapsed && self.volumes.get(&attempt.home).is_some_and(|v| v.replicated) {
            self.unknown(node, attempt);
        }
    }

    /// An operator looked at a fence, and starts the node again without it.
    pub fn operator(&mut self, node: usize) {
        let it = &mut self.nodes[node];
        if it.fence.is_none() {
            return;
        }
        (it.fence, it.fenced_at, it.command_failed) = (None, None, false);
        self.tally.did("fences cleared", 1);
        self.die(node, false);
    }

    /// What a life's store did goes into the tally, at its end.
    pub fn count_work(&mut self, node: usize) {
        let it = &self.nodes[node];
        let Some(store) = &it.store else { return };
        let c = store.view().counters;
        for (name, n) in [
            ("log batches", c.log_batches),
            ("checkpoints", c.checkpoints),
            ("blocks drained", c.drained_blocks),
            ("merges", c.merges),
            ("bad blocks that came from another member", c.fetched_blocks),
            ("bad blocks that were put back", c.repaired_blocks),
            ("bad blocks that nobody gave in time", c.unrepaired_blocks),
            ("writes held for the log", c.held_for_log),
            ("extents copied to members that are rebuilt", c.copies_taken),
        ] {
            self.tally.did(name, n);
        }
        self.tally.faults("log trimmed past a member, which is rebuilt (21)", c.rebuilds);
        self.tally.did("payloads changed by the guest", it.mem.scribbles.get());
        self.tally.did("allocations refused", it.mem.alloc_failures);
        if c.held_for_log > 0 {
            self.tally.fault("full log (15)");
        }
    }
}

/// Whether a block is a host's data, at rest.
pub fn may_be_damaged(it: &super::node::Node, at: u64) -> bool {
    let block = at - it.share.start.0;
    let busy = it.out.values().any(|o| o.op.kind == DiskKind::Write && o.blocks().contains(&block));
    if busy || it.drive.is_cached(at) {
        return false;
    }
    if in_ring(&it.geometry, &(block..block + 1)) && !it.evidence.is_free_or_vouched_for(block) {
        return false;
    }
    matches!(lying(it.drive.look(at)), Lying::Data)
}
