//! A second life on a copy: opens a store over a copied drive, carries its commands out at once, and asks it things.
//!
//! So a promise is checked at the moment it is given: whatever the engine believes, would a fresh one find it?
//! Not here: faults. A probe's drive works; what lies on it may be anything.

use std::collections::BTreeMap;

use penstock_engine::{
    DiskKind, Effect, Effects, Event, FenceReason, HostOp, IoId, LayerNo, Millis, Notice, OpenError, Order, OrderError, OrderId,
    RecoveryReport, ReplicaNo, Span, Status, Store, StoreConfig,
};
use penstock_wire::label::Share;
use penstock_wire::{HostId, ReplicaShape};

use crate::device::Out;
use crate::drive::{Drive, Kind};
use crate::memory::SimMemory;
use crate::rng::Rng;
use crate::stamp::BLOCK;

/// Turns that anything may take: recovery of a full log needs a few hundred.
const TURNS_MAX: u32 = 200_000;
/// Blocks that one read asks for at most.
const TOGETHER_MAX: u64 = 64;

pub struct Probe {
    store: Store,
    mem: SimMemory,
    fx: Effects,
    drive: Drive,
    share: Share,
    config: StoreConfig,
    out: Vec<Out>,
    inbox: Vec<Event>,
    rng: Rng,
    now_ms: u64,
    pub report: Option<RecoveryReport>,
    pub failed: Option<OpenError>,
    pub fenced: Option<FenceReason>,
    pub replicas: BTreeMap<ReplicaNo, ReplicaShape>,
    replies: BTreeMap<u32, Status>,
    orders: BTreeMap<u64, Result<(), OrderError>>,
}

impl Probe {
    /// Opens the store that lies in `share` of `drive` and waits until it serves or has failed.
    pub fn open(drive: Drive, share: Share, config: StoreConfig, rng: Rng) -> Result<Probe, String> {
        let mut rng = rng;
        let mem = SimMemory::new(100_000, 0, rng.fork(1));
        let mut p = Probe {
            store: Store::new(config.clone()),
            mem,
            fx: Effects::default(),
            drive,
            share,
            config,
            out: Vec::new(),
            inbox: Vec::new(),
            rng,
            now_ms: 1,
            report: None,
            failed: None,
            fenced: None,
            replicas: BTreeMap::new(),
            replies: BTreeMap::new(),
            orders: BTreeMap::new(),
        };
        p.until("the store serves or fails", |p| p.report.is_some() || p.failed.is_some())?;
        Ok(p)
    }

    /// Its process ends with all that it had out: the drive as it is, and what the store was opened with.
    pub fn end(self) -> (Drive, StoreConfig) {
        (self.drive, self.config)
    }

    /// It was opened fenced: what nothing proves durable reads as lost.
    pub fn began_fenced(&self) -> bool {
        self.config.fenced.is_some()
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Reads blocks of a volume, or of the snapshot that froze a layer, and shows each with how its read was answered: neighbours in one read,
    /// up to as many as chance says, and alone where such a read is not answered well.
    pub fn read_each(
        &mut self,
        replica: ReplicaNo,
        layer: Option<LayerNo>,
        blocks: &[u64],
        mut show: impl FnMut(u64, Status, &[u8]),
    ) -> Result<(), String> {
        let mut left = blocks;
        while let [first, ..] = left {
            let most = if self.rng.one_in(4) { 1 } else { self.rng.within(1, TOGETHER_MAX) } as usize;
            let run = left.iter().zip(*first..).take(most).take_while(|(at, next)| *at == next).count();
            let (together, later) = left.split_at(run);
            left = later;
            let (status, bytes) = self.read(replica, layer, *first, run)?;
            if status == Status::Ok || run == 1 {
                together.iter().zip(bytes.chunks_exact(BLOCK)).for_each(|(block, bytes)| show(*block, status, bytes));
                continue;
            }
            for block in together {
                let (status, bytes) = self.read(replica, layer, *block, 1)?;
                show(*block, status, &bytes);
            }
        }
        Ok(())
    }

    fn read(&mut self, replica: ReplicaNo, layer: Option<LayerNo>, first: u64, blocks: usize) -> Result<(Status, Vec<u8>), String> {
        let io = IoId(0);
        let span = Span { offset: first * BLOCK as u64, len: (blocks * BLOCK) as u64 };
        let direct = self.rng.one_in(2);
        self.mem.put(io, vec![0xab; blocks * BLOCK], direct, None);
        let op = layer.map_or(HostOp::Read(span), |layer| HostOp::ReadSnapshot(layer, span));
        self.inbox.push(Event::Host { io, replica, host: HostId::default(), op });
        self.until("a read is answered", |p| p.replies.contains_key(&0))?;
        let status = self.replies.remove(&0).expect("waited for");
        Ok((status, self.mem.take(io)))
    }

    pub fn order(&mut self, order: Order) -> Result<Result<(), OrderError>, String> {
        self.inbox.push(Event::Order { id: OrderId(1), order });
        self.until("an order is done", |p| p.orders.contains_key(&1))?;
        Ok(self.orders.remove(&1).expect("waited for"))
    }

    /// Drains all and waits until nothing is left to do.
    pub fn come_to_rest(&mut self) -> Result<(), String> {
        match self.order(Order::Drain)? {
            Ok(()) => self.until("the store is quiescent", |p| p.store.view().quiescent),
            Err(error) => Err(format!("a drain was refused: {error:?}")),
        }
    }

    pub fn audit(&self) -> Result<(), String> {
        let start = self.share.start.0;
        self.store.audit(|at| self.drive.bytes(start + at.0)).map_err(|e| format!("audit: {e}"))
    }

    fn until(&mut self, what: &str, done: impl Fn(&Probe) -> bool) -> Result<(), String> {
        for turn in 0..TURNS_MAX {
            if done(self) {
                return Ok(());
            }
            if self.inbox.is_empty() && self.out.is_empty() || turn % 64 == 63 {
                self.now_ms += 10;
                self.inbox.push(Event::Tick { now: Millis(self.now_ms) });
            }
            self.turn();
        }
        Err(format!("on a copy of the drive, with nothing failing, {what} did not come in {TURNS_MAX} turns: {:?}", self.store.view()))
    }

    fn turn(&mut self) {
        for event in std::mem::take(&mut self.inbox) {
            if let Event::DiskDone { id, .. } = event {
                let i = self.out.iter().position(|o| o.op.id == id).expect("out");
                self.out.swap_remove(i).release(&mut self.mem);
            }
            self.store.apply(event, &mut self.mem, &mut self.fx);
        }
        self.store.settle(&mut self.mem, &mut self.fx);
        let fx = std::mem::take(&mut self.fx);
        for effect in &fx.list {
            match effect {
                Effect::Disk(op) => {
                    let out =
                        Out::take(*op, fx.parts_of(op), &self.share, &self.config.geometry, self.out.iter(), &mut self.mem, &self.drive);
                    self.out.push(out);
                }
                Effect::Reply { io, status } => {
                    let twice = self.replies.insert(io.0, *status);
                    assert!(twice.is_none(), "{io:?} was answered twice");
                }
                Effect::OrderDone { id, result } => {
                    self.orders.insert(id.0, result.clone());
                }
                Effect::Notice(Notice::Serving(report)) => self.report = Some(*report),
                Effect::Notice(Notice::OpenFailed(error)) => self.failed = Some(error.clone()),
                Effect::Notice(Notice::Fenced(reason)) => self.fenced = Some(*reason),
                Effect::Notice(Notice::Replica { replica, shape, gone }) => {
                    if *gone {
                        self.replicas.remove(replica);
                    } else {
                        self.replicas.insert(*replica, (**shape).clone());
                    }
                }
                Effect::Notice(_) => {}
                // Nobody hears it.
                Effect::Send { .. } => {}
            }
        }
        self.fx = fx;
        self.fx.clear();
        // Carried out in any order, all of them before the next turn or only some.
        let mut waiting: Vec<usize> = (0..self.out.len()).filter(|i| !self.out[*i].carried_out).collect();
        while !waiting.is_empty() {
            let i = waiting.swap_remove(self.rng.below(waiting.len() as u64) as usize);
            let out = &mut self.out[i];
            out.carried_out = true;
            let start = self.share.start.0;
            let mut ok = true;
            match out.op.kind {
                DiskKind::Write => out.land_whole(start, &mut self.drive, &self.mem),
                DiskKind::Flush => {
                    self.drive.flush(out.upto);
                }
                DiskKind::Read => {
                    ok = out.blocks().all(|b| !self.drive.is_latent(start + b));
                    if ok {
                        out.fill(start, &self.drive, &mut self.mem, &mut self.rng);
                    } else {
                        out.fill_with_rubbish(&mut self.mem);
                    }
                }
            }
            self.inbox.push(Event::DiskDone { id: out.op.id, ok });
            if self.rng.one_in(6) {
                break;
            }
        }
    }
}

/// What a drive of this kind needs for its writes to last.
pub fn barrier_of(kind: Kind) -> penstock_engine::Barrier {
    match kind {
        Kind::Volatile => penstock_engine::Barrier::Flush,
        Kind::PowerSafe => penstock_engine::Barrier::NotNeeded,
    }
}
