//! The closing phase: faults stop, and then everything must come to an end (25).
//!
//! Whatever is out is answered, fences that an operator clears are gone, all is drained and checkpointed, every block that
//! was ever touched reads back, space adds up, memory is given back, and a next life finds the same.

use penstock_engine::{HostOp, Order, Span, Stage};

use crate::run::stuck;
use crate::stamp::BLOCK;
use crate::world::{Standing, World};

/// Virtual time that anything may take once nothing fails: 60 s.
const PATIENCE_US: u64 = 60_000_000;

impl World {
    pub fn close(&mut self) {
        self.stormy = false;
        self.commands_left = 0;
        self.deaths_left = 0;
        self.dies_at = None;
        self.plan.faults.slow_one_in = 0;
        for s in &mut self.shards {
            s.mem.calm();
        }
        self.until("what is out is answered", |w| !w.hosts_wait() && w.settled());
        // Opening may find a reason of its own to fence.
        for _ in 0..3 {
            if self.shards.iter().any(|s| s.fence.is_some()) {
                self.clear_fences();
                self.until("fences are cleared and stores serve", |w| w.alive && w.settled());
            }
        }
        self.finish_orders();
        // Everything once more through the front, which loads what it must and drains what it can.
        self.drain("first");
        self.read_back();
        self.write_a_little();
        self.drain("second");
        for shard in 0..self.shards.len() {
            if self.shards[shard].standing != Standing::Serving {
                continue;
            }
            self.until("the store is quiescent", |w| w.view(shard).is_none_or(|v| v.quiescent));
            let view = self.view(shard).expect("serves");
            assert_eq!(view.undrained_extents, 0, "shard {shard} is drained and has undrained extents");
            self.audit(shard, "at rest");
            self.tally.check("accounting at rest (24)");
        }
        self.remove_snapshots();
        self.stop();
        self.count_work();
        self.tally.check("all served and drained after faults (25)");
    }

    fn settled(&self) -> bool {
        self.alive && self.shards.iter().all(|s| s.standing != Standing::Opening)
    }

    pub fn view(&self, shard: usize) -> Option<penstock_engine::StoreView> {
        let s = &self.shards[shard];
        if s.standing == Standing::Serving { s.store.as_ref().map(|st| st.view()) } else { None }
    }

    fn until(&mut self, what: &str, done: impl Fn(&World) -> bool) {
        let end = self.now + PATIENCE_US;
        while !done(self) {
            let more = self.step();
            if !more {
                stuck(format!("nothing will happen any more, and still not: {what}: {}", self.describe()));
            }
            if self.now >= end {
                stuck(format!("60 s without a fault, and still not: {what}: {}", self.describe()));
            }
        }
    }

    fn finish_orders(&mut self) {
        // Clones before what they stand on: they came later.
        for no in self.volumes.keys().rev().copied().collect::<Vec<_>>() {
            let shard = self.volumes[&no].shard;
            if self.shards[shard].standing != Standing::Serving {
                continue;
            }
            self.retry_orders(no);
            self.until("orders are done", |w| w.shards[shard].orders.is_empty());
            let v = &self.volumes[&no];
            assert!(v.pending.is_none(), "volume {no} still waits for {:?}: {:?}", v.pending, self.shards[shard].done);
        }
    }

    fn drain(&mut self, which: &str) {
        for shard in 0..self.shards.len() {
            if self.shards[shard].standing != Standing::Serving {
                continue;
            }
            let id = self.order(shard, Order::Drain);
            self.until("the drain is done", |w| w.shards[shard].done.contains_key(&id));
            let done = &self.shards[shard].done[&id];
            assert!(done.is_ok(), "the {which} drain of shard {shard} was refused: {done:?}");
            self.tally.check("drained and checkpointed (25)");
        }
    }

    fn live_volumes(&self) -> Vec<u32> {
        let serves = |shard: usize| self.shards[shard].standing == Standing::Serving;
        self.volumes.values().filter(|v| v.created && !v.doomed && v.replica.is_some() && serves(v.shard)).map(|v| v.no).collect()
    }

    /// Every block that was ever touched, through the front.
    fn read_back(&mut self) {
        let live = self.live_volumes();
        let taken = live.iter().flat_map(|of| self.taken(*of).into_iter().map(|(no, layer, _)| (*of, no, Some(layer))));
        let views: Vec<_> = live.iter().map(|no| (*no, *no, None)).chain(taken).collect();
        for (of, no, layer) in views {
            let touched = self.oracle.touched(no);
            let size = self.oracle.size_blocks(no);
            let mut i = 0;
            while i < touched.len() {
                let first = touched[i];
                // Runs make long reads; where something may be lost, block by block, or one would hide the others.
                let mut run = 1;
                while i + run < touched.len()
                    && run < 64
                    && touched[i + run] == first + run as u64
                    && !self.oracle.may_be_lost(no, first)
                    && !self.oracle.may_be_lost(no, touched[i + run])
                {
                    run += 1;
                }
                i += run;
                if first + run as u64 <= size {
                    let span = Span { offset: first * BLOCK as u64, len: (run * BLOCK) as u64 };
                    let op = layer.map_or(HostOp::Read(span), |layer| HostOp::ReadSnapshot(layer, span));
                    self.send(no, op, false);
                }
                if self.volumes[&of].out > 32 {
                    self.until("reads are answered", |w| w.volumes[&of].out < 8);
                }
            }
            self.until("reads are answered", |w| w.volumes[&of].out == 0);
            self.tally.check("volumes read back (25)");
        }
    }

    /// A store that was full or hurt takes writes again once space is given back.
    fn write_a_little(&mut self) {
        for no in self.live_volumes() {
            let bytes = self.oracle.size_blocks(no) * BLOCK as u64;
            self.send(no, HostOp::Zero(Span { offset: 0, len: bytes }), false);
            self.until("a zero is answered", |w| w.volumes[&no].out == 0);
        }
        self.drain("discarding");
        for no in self.live_volumes() {
            let shard = self.volumes[&no].shard;
            let before = self.tally.faults.get("full drive (15)").copied().unwrap_or(0);
            self.send(no, HostOp::Write(Span { offset: 0, len: BLOCK as u64 }), false);
            self.until("a write is answered", |w| w.volumes[&no].out == 0);
            let after = self.tally.faults.get("full drive (15)").copied().unwrap_or(0);
            let kept = self.volumes.values().any(|v| v.shard == shard && !self.taken(v.no).is_empty());
            assert!(
                before == after || kept,
                "shard {shard} has no space for one block after everything was discarded: {}",
                self.describe()
            );
        }
        self.read_back();
    }

    /// Snapshots go, most of the time, and give back all that they held.
    fn remove_snapshots(&mut self) {
        if self.rng.one_in(3) {
            return;
        }
        for of in self.live_volumes() {
            let shard = self.volumes[&of].shard;
            for (no, ..) in self.taken(of).into_iter().filter(|(no, ..)| !self.has_clone(*no)).collect::<Vec<_>>() {
                self.snapshots.get_mut(&no).expect("taken").removed = true;
                let order = self.removal_order(no);
                let id = self.order(shard, order);
                self.until("a snapshot is removed", |w| w.shards[shard].done.contains_key(&id));
                self.snapshot_removed(shard, no);
            }
        }
        self.drain("third");
        for of in self.live_volumes() {
            let (shard, replica) = (self.volumes[&of].shard, self.volumes[&of].number.expect("told"));
            self.until("the store is quiescent", |w| w.view(shard).is_none_or(|v| v.quiescent));
            let usage = self.shards[shard].store.as_ref().expect("serves").usage(replica);
            assert!(usage.snapshot_extents == 0 || self.is_origin(of), "volume {of} has no snapshots, and extents for them");
            self.audit(shard, "without snapshots");
            self.tally.check("snapshots give back what they held (24)");
        }
        self.read_back();
    }

    fn stop(&mut self) {
        for shard in 0..self.shards.len() {
            if self.shards[shard].standing != Standing::Serving {
                continue;
            }
            let id = self.order(shard, Order::Stop);
            self.until("the store has stopped", |w| {
                w.shards[shard].done.contains_key(&id) && w.shards[shard].standing == Standing::Stopped
            });
            let s = &self.shards[shard];
            assert!(s.out.is_empty(), "a stopped store has device commands out");
            assert_eq!(s.mem.out_blocks(), 0, "a stopped store holds memory");
            assert_eq!(s.store.as_ref().expect("alive").view().stage, Stage::Stopped);
            self.tally.check("memory given back");
            // Stopped cleanly: nothing may be lost even if the power goes this moment.
            let mut rng = self.rng.fork(6);
            let twin = self.drives[self.shards[shard].drive].after_cut(crate::drive::Cut::AllLost, &mut rng);
            self.check_all(shard, twin, "after a clean stop");
            for _ in 0..self.plan.malformed {
                self.check_malformed(shard);
            }
        }
    }
}
