//! Dying and opening: a node's process is killed or its power cut at any turn, and its stores open again.
//!
//! Not here: what must hold afterwards (`invariants`).

use penstock_engine::{DiskKind, Effects, Event, FenceReason, Millis, OpenError, Store};

use crate::device::Landing;
use crate::drive::Cut;
use crate::memory::SimMemory;
use crate::world::{Coming, Standing, World};

/// Openings that faults may spoil in a row before they are let be.
const SPOILED_MAX: u32 = 3;

impl World {
    /// Starts every store of the node.
    pub fn open_all(&mut self) {
        self.alive = true;
        for shard in 0..self.shards.len() {
            let fail = if self.stormy && self.spoiled < SPOILED_MAX { self.plan.faults.alloc_fail_one_in } else { 0 };
            let limit = if self.stormy && self.spoiled < SPOILED_MAX { self.plan.memory_blocks } else { 100_000 };
            let mem = SimMemory::new(limit, fail, self.rng.fork(7));
            let s = &mut self.shards[shard];
            s.mem = mem;
            let mut config = s.config.clone();
            config.fenced = s.fence;
            s.opened_fenced = s.fence.is_some();
            s.store = Some(Store::new(config));
            s.standing = Standing::Opening;
            s.struck_in_opening = false;
            let now = Millis(self.now / 1000);
            self.feed(shard, Event::Tick { now });
        }
    }

    /// The process ends here; the drives' caches may end with it.
    pub fn die(&mut self) {
        let power = self.rng.percent(self.plan.faults.power_percent);
        self.count_work();
        self.tally.fault(if power { "power cut (2, 3, 14)" } else { "process killed (13)" });
        if self.shards.iter().any(|s| s.standing == Standing::Opening) {
            self.tally.fault("death during recovery (17)");
        }
        if self.shards.iter().any(|s| s.out.values().any(|o| o.op.kind == DiskKind::Flush && !o.carried_out)) {
            self.tally.fault("death with a flush out (23)");
        }
        self.trace.note(self.now, &[20, u64::from(power)], || {
            format!("the node dies, {}", if power { "and its power with it" } else { "its drives stay powered" })
        });
        for s in &mut self.shards {
            let drive = &mut self.drives[s.drive];
            for out in std::mem::take(&mut s.out).into_values() {
                if out.carried_out {
                    continue;
                }
                match out.op.kind {
                    DiskKind::Write => {
                        if out.land_partly(s.share.start.0, drive, &s.mem, &mut self.rng) == Landing::Torn {
                            self.tally.fault("torn write (1)");
                        }
                    }
                    DiskKind::Flush if self.rng.one_in(2) => {
                        drive.flush(out.upto);
                    }
                    DiskKind::Flush | DiskKind::Read => {}
                }
            }
            s.store = None;
            s.inbox.clear();
            s.turn_due = false;
            s.tick_due = false;
            s.fx = Effects::default();
            s.ios.clear();
            s.free_ios.clear();
            s.io_count = 0;
            s.orders.clear();
            s.replicas.clear();
            s.evidence.died();
            s.look_over = false;
            s.standing = Standing::Opening;
        }
        if power {
            for drive in &mut self.drives {
                let cut = self.rng.pick(&[Cut::AllLost, Cut::AllKept, Cut::PerBlock, Cut::PerSector, Cut::PerSector]);
                let lost = drive.power_cut(cut, &mut self.rng);
                self.tally.faults("blocks lost or torn from a cache (1, 2, 3)", lost);
            }
        }
        for drive in &mut self.drives {
            let lost = drive.released();
            self.tally.faults("forgotten blocks gone at a reset (7)", lost);
        }
        if let Err(wrong) = self.oracle.crashed() {
            panic!("{wrong}");
        }
        for v in self.volumes.values_mut() {
            v.node_died();
        }
        self.life += 1;
        self.alive = false;
        self.dies_at = None;
        if self.stormy && self.deaths_left > 0 {
            self.deaths_left -= 1;
            if self.deaths_left > 0 {
                let soon = self.rng.percent(self.plan.faults.nested_percent);
                let turns = if soon { self.rng.within(1, 40) } else { self.rng.within(30, self.plan.host.commands * 2) };
                self.dies_at = Some(self.turns + turns);
            }
        }
        self.check_after_death();
        let (wait, life) = (self.rng.within(100, 50_000), self.life);
        self.after(wait, Coming::Reopen { life });
    }

    /// A store refused to open. If a command failed under it, the node is started again.
    pub fn after_refusal(&mut self, shard: usize) {
        let s = &self.shards[shard];
        let passing = s.struck_in_opening || s.standing == Standing::Failed(OpenError::NoMemory);
        if passing && self.spoiled < SPOILED_MAX + 2 {
            self.spoiled += 1;
            let turns = self.turns + self.rng.within(1, 5);
            self.dies_at = Some(self.dies_at.map_or(turns, |t| t.min(turns)));
        } else {
            assert!(s.clouded, "shard {shard} does not open even when nothing fails: {:?}", s.standing);
        }
    }

    /// The operator comes in mid-storm: what the next lives make of the drive shows whether it could be trusted again.
    pub fn operator_looks(&mut self) {
        if !self.stormy || self.shards.iter().all(|s| s.fence.is_none()) {
            return;
        }
        if !self.alive {
            self.after(5_000, Coming::Operator);
            return;
        }
        // The life that comes back is cut off too, and flushes may fail it again.
        self.deaths_left = self.deaths_left.max(2);
        if self.plan.faults.flush_fails_after.is_none() && self.rng.one_in(3) {
            self.plan.faults.flush_fails_after = Some(self.drive_commands.iter().max().expect("a drive") + self.rng.within(1, 200));
        }
        self.tally.did("fences cleared in mid-storm", 1);
        self.clear_fences();
    }

    /// An operator accepts what the fences stand for, and the node is started again.
    pub fn clear_fences(&mut self) {
        // Who accepts that the log lost nobody knows what gives up what the volumes hold.
        let lost = |w: &World, shard: usize| w.shards[shard].fence == Some(FenceReason::LogLost);
        for no in self.volumes.values().filter(|v| !v.doomed && lost(self, v.shard)).map(|v| v.no).collect::<Vec<_>>() {
            self.doom(no);
        }
        for s in &mut self.shards {
            s.config.accept_lost_log |= s.fence == Some(FenceReason::LogLost);
            s.fence = None;
            s.fenced_at = None;
            s.command_failed = false;
        }
        self.tally.did("fences cleared", 1);
        self.die();
    }
}
