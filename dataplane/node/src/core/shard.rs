//! A store as its core holds it: the engine's machine, where it lies on which drive, and what it wants done.

use penstock_engine::{DiskKind, DiskOp, Effects, Event, Millis, OrderId, Part, Stage, Store, StoreConfig};
use penstock_wire::{BlockAddr, NodeId};

use crate::disk::{Command, CoreDisks, DiskIndex};
use crate::memory::{NodeMemory, Owner};

/// A drive as the app thread numbers those that it has opened. Never reused while the process lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DriveKey(pub u32);

pub struct Shard {
    /// Its place on the core, by which memory knows it.
    at: u32,
    pub drive: DriveKey,
    /// Which store of the drive.
    pub store_no: u32,
    pub store: Store,
    pub fx: Effects,
    pub disk: DiskIndex,
    /// Where the store begins on the drive.
    start: BlockAddr,
    /// Something came for it in this turn.
    pub touched: bool,
    /// Nothing to do until the next event: ticks may pass it by.
    pub quiescent: bool,
    /// Ticks when opening began, and how long it took.
    pub opened_at: u64,
    pub recovery_ms: Option<u64>,
    /// It fell, and is not run again (see [`super::quarantine`]).
    pub quarantined: bool,
    /// Device commands that are out for it.
    pub out: u32,
    /// Orders that it has not answered.
    pub orders: Vec<OrderId>,
    /// The clock as the store knows it.
    told: Millis,
    /// The node that it is on, as groups name it.
    pub node: NodeId,
}

impl Shard {
    pub fn new(at: usize, drive: DriveKey, config: StoreConfig, disk: DiskIndex, start: BlockAddr, now_ticks: u64) -> Self {
        let (store_no, node) = (config.store, config.replication.node);
        let store = Store::new(config);
        Self {
            at: at as u32,
            drive,
            store_no,
            store,
            fx: Effects::default(),
            disk,
            start,
            touched: true,
            quiescent: false,
            opened_at: now_ticks,
            recovery_ms: None,
            quarantined: false,
            out: 0,
            orders: Vec::new(),
            told: Millis::default(),
            node,
        }
    }

    /// The first event after the clock has moved is the clock: what the store decides by time, it decides by what time it is, also in a process
    /// that stood still.
    pub fn apply(&mut self, event: Event, now: Millis, memory: &mut NodeMemory) {
        if self.quarantined {
            return;
        }
        self.touched = true;
        self.quiescent = false;
        // While the store runs, memory is taken in its name; whoever catches a panic finds there whose it was.
        memory.owner = Owner::Store(self.at);
        let is_tick = matches!(event, Event::Tick { .. });
        if std::mem::replace(&mut self.told, now) != now && !is_tick {
            self.store.apply(Event::Tick { now }, memory, &mut self.fx);
        }
        self.store.apply(event, memory, &mut self.fx);
        memory.owner = Owner::Core;
    }

    pub fn settle(&mut self, memory: &mut NodeMemory) {
        self.touched = false;
        memory.owner = Owner::Store(self.at);
        self.store.settle(memory, &mut self.fx);
        memory.owner = Owner::Core;
    }

    /// It runs no more, and no command of it is out.
    pub fn is_stopped(&self) -> bool {
        if self.quarantined {
            return self.out == 0;
        }
        let view = self.store.view();
        matches!(view.stage, Stage::Stopped | Stage::Failed) && view.disk_out == 0
    }

    /// Sends one of the engine's commands to the drive. `token` names it to the core.
    pub fn send(&mut self, op: &DiskOp, parts: &[Part], token: u64, memory: &mut NodeMemory, disks: &mut CoreDisks) {
        let at = self.start.plus(op.at.0);
        let command = match op.kind {
            DiskKind::Read => {
                let mut targets = disks.targets();
                targets.extend(parts.iter().map(|&part| memory.lend_target(part)));
                Command::Read(targets)
            }
            DiskKind::Write => {
                let mut sources = disks.sources();
                sources.extend(parts.iter().map(|&part| memory.lend_source(part)));
                Command::Write(sources)
            }
            DiskKind::Flush => Command::Flush,
        };
        self.out += 1;
        disks.submit(self.disk, token, at, u64::from(op.blocks), command);
    }
}
