//! One core's loop: events in, the engine's decisions, effects out. Everything that this core owns is in [`Core`], and nothing of
//! it is shared.
//!
//! A turn: take what came (commands, completions, time), apply it to the stores, settle those that were touched, carry out
//! their effects, hand the kernel its batch, answer hosts. Called by one SPDK poller; never blocks. Not here: control, which
//! sends closures to the core ([`with`]), and doors, which push onto the core's [`port`].

mod forward;
#[cfg(test)]
mod forward_model;
mod host;
mod job;
mod outward;
mod peers;
pub mod port;
pub mod quarantine;
mod shard;
mod view;
mod visitor;
mod volume;

use std::cell::RefCell;
use std::os::fd::RawFd;
use std::vec::Drain;

use penstock_engine::{
    DiskId, Effect, Effects, Event, FenceReason, Millis, Notice, OpenError, Order, OrderError, OrderId, Receipt, RecoveryReport, ReplicaNo,
    Standing, StoreConfig,
};
use penstock_wire::{BlockAddr, NodeId, ReplicaShape};
use spdk_rs::lend::RoamingIo;
use spdk_rs::thread::{Activity, FdEvent, Poller, ThreadHandle, Waker};

use crate::disk::{Backend, BackendError, CoreDisks, DiskDone, DiskIndex};
use crate::memory::{NodeMemory, Owner, Source};

pub use host::{LocalDone, LocalIo};
pub use job::{Job, Outcome, Step};
pub use port::{CoreIndex, Parcel, Peer, Request, VolumeSlot};
pub use shard::DriveKey;
pub use view::{CoreCounters, CoreView, LATENCY_BOUNDS_US, ShardView, VolumeView};
pub use volume::OpClass;

use forward::Ways;
use host::Pending;
use peers::{Heard, PeerEnd};
use shard::Shard;
use volume::CoreVolume;

/// What a core tells the app thread. None of it is per command.
#[derive(Debug)]
pub enum Report {
    Serving {
        drive: DriveKey,
        store: u32,
        report: RecoveryReport,
        ms: u64,
    },
    OpenFailed {
        drive: DriveKey,
        store: u32,
        why: OpenError,
    },
    Fenced {
        drive: DriveKey,
        store: u32,
        reason: FenceReason,
    },
    Replica {
        drive: DriveKey,
        store: u32,
        core: CoreIndex,
        slot: VolumeSlot,
        shape: ReplicaShape,
        /// It is a member of a group of several.
        is_member: bool,
        gone: bool,
    },
    /// A volume's part in its group changed.
    Standing {
        core: CoreIndex,
        slot: VolumeSlot,
        standing: Standing,
        /// Another node leads a volume that was served here: nothing is taken from hosts before [`Core::unbar`].
        is_barred: bool,
    },
    /// A volume's leader hands over to another node's member, since its own drive is slow.
    SteppingAside {
        core: CoreIndex,
        slot: VolumeSlot,
        to: NodeId,
    },
    /// A volume's member goes on without the others.
    Recovered {
        core: CoreIndex,
        slot: VolumeSlot,
        receipt: Box<Receipt>,
    },
    /// A volume's group answers nothing any more, in words.
    GroupStopped {
        core: CoreIndex,
        slot: VolumeSlot,
        why: String,
    },
    Corrupt {
        drive: DriveKey,
        store: u32,
        slot: Option<VolumeSlot>,
        block: u64,
    },
    /// A replica has an extent otherwise than others of its volume have it.
    Differs {
        core: CoreIndex,
        slot: VolumeSlot,
        block: u64,
        mends: bool,
    },
    ScrubDone {
        drive: DriveKey,
        store: u32,
        blocks: u64,
        corrupt: u64,
    },
    Stopped {
        drive: DriveKey,
        store: u32,
    },
    /// A store fell and is not run again; what fell, in words.
    Quarantined {
        drive: DriveKey,
        store: u32,
        panic: String,
    },
    OrderDone {
        id: OrderId,
        result: Result<(), OrderError>,
    },
}

/// How a core's loop is made.
pub struct CoreOptions {
    pub index: CoreIndex,
    /// Bytes that the engine's buffers on this core may take.
    pub memory_bytes: usize,
    pub report: Box<dyn Fn(Report) + Send>,
}

const TICK_US: u64 = 10_000;
/// Ticks without work after which the clock stops.
const IDLE_TICKS: u32 = 100;
const JOB_TOKEN: u64 = 1 << 47;

pub struct Core {
    index: CoreIndex,
    memory: NodeMemory,
    disks: CoreDisks,
    shards: Vec<Option<Shard>>,
    volumes: Vec<CoreVolume>,
    pending: Vec<Pending>,
    jobs: Vec<Option<Job>>,
    report: Box<dyn Fn(Report) + Send>,
    waker: Waker,
    counters: CoreCounters,
    started: u64,
    /// The time as this turn goes by.
    clock: Millis,
    hz: u64,
    /// Microseconds a tick, times 2^64.
    us_per_tick: u64,
    /// The clock as the answers of the effects at hand read it.
    answered_at: Option<u64>,
    /// For busy_fraction: when it was last worked out, from which busy ticks, and what it was.
    looked: (u64, u64, f64),
    local: Vec<LocalIo>,
    local_done: Vec<LocalDone>,
    asks: Vec<Request>,
    disk_done: Vec<DiskDone>,
    tick_due: bool,
    /// The clock, which runs while a store has something to do.
    ticker: Option<Poller>,
    /// Ticks of the clock since then.
    idle_ticks: u32,
    ring_event: Option<FdEvent>,
    peer_end: PeerEnd,
    ways: Ways,
    /// Drives of which a store was fenced in this turn.
    fenced_now: Vec<DriveKey>,
}

thread_local! {
    static CORE: RefCell<Option<Core>> = const { RefCell::new(None) };
    static SCRATCH: RefCell<Vec<(RoamingIo, spdk_rs::Status)>> = const { RefCell::new(Vec::new()) };
    static POLLERS: RefCell<Vec<Poller>> = const { RefCell::new(Vec::new()) };
}

/// Starts the loop on the running SPDK thread; returns what wakes it. [`port::install`] follows, when all cores have theirs.
///
/// # Errors
/// When SPDK refuses a poller.
pub fn start(options: CoreOptions) -> Result<Waker, spdk_rs::Errno> {
    let (poller, waker) = Poller::event_driven("penstock", turn)?;
    let now = spdk_rs::app::ticks();
    let core = Core {
        index: options.index,
        memory: NodeMemory::new(Source::Dma, options.memory_bytes),
        disks: CoreDisks::new(waker.clone()),
        shards: Vec::new(),
        volumes: Vec::new(),
        pending: Vec::with_capacity(1024),
        jobs: Vec::new(),
        report: options.report,
        waker: waker.clone(),
        counters: CoreCounters::default(),
        started: now,
        clock: Millis::default(),
        hz: spdk_rs::app::ticks_hz().max(1),
        us_per_tick: ((1_000_000u128 << 64) / u128::from(spdk_rs::app::ticks_hz().max(1_000_001))) as u64,
        answered_at: None,
        looked: (now, 0, 0.0),
        local: Vec::new(),
        local_done: Vec::new(),
        asks: Vec::with_capacity(1024),
        disk_done: Vec::with_capacity(1024),
        tick_due: false,
        ticker: None,
        idle_ticks: 0,
        ring_event: None,
        peer_end: PeerEnd::default(),
        ways: Ways::default(),
        fenced_now: Vec::new(),
    };
    CORE.with_borrow_mut(|place| {
        assert!(place.is_none(), "a core has one loop");
        *place = Some(core);
    });
    POLLERS.with_borrow_mut(|pollers| pollers.push(poller));
    Ok(waker)
}

/// Ends the loop on the running SPDK thread. Its stores must have stopped.
pub fn end() {
    POLLERS.with_borrow_mut(Vec::clear);
    let core = CORE.with_borrow_mut(Option::take);
    if let Some(mut core) = core {
        // Before the ring, whose event it watches.
        core.ring_event = None;
        core.ticker = None;
        core.close_peers();
    }
}

/// Runs `f` on this core's state, outside of a turn. `None` where no loop runs on this core.
pub fn with<R>(f: impl FnOnce(&mut Core) -> R) -> Option<R> {
    CORE.with_borrow_mut(|core| core.as_mut().map(f))
}

/// Sends `f` to run on the core of `thread`.
///
/// # Errors
/// When the thread is going away.
pub fn send(thread: &ThreadHandle, f: impl FnOnce(&mut Core) + Send + 'static) -> Result<(), spdk_rs::Errno> {
    thread.send(move || {
        with(f);
    })
}

fn turn() -> Activity {
    let again = CORE.with_borrow_mut(|core| core.as_mut().map(Core::turn));
    let Some(mut activity) = again else { return Activity::Idle };
    // Hosts' next commands may come in while their last ones are answered, so nothing is borrowed from here on.
    let rest = port::with(|port| {
        let left = port.send_outgoing();
        let answered = SCRATCH.with_borrow_mut(|scratch| port.complete_answers(scratch));
        (left, answered)
    });
    if let Some((left, answered)) = rest {
        if answered > 0 && activity == Activity::Idle {
            activity = Activity::Busy;
        }
        if left {
            activity = Activity::Again;
        }
    }
    activity
}

impl Core {
    pub fn index(&self) -> CoreIndex {
        self.index
    }

    fn now(&self) -> Millis {
        self.millis(spdk_rs::app::ticks())
    }

    fn millis(&self, ticks: u64) -> Millis {
        Millis((ticks - self.started) / (self.hz / 1000).max(1))
    }

    fn turn(&mut self) -> Activity {
        let begun = spdk_rs::app::ticks();
        self.clock = self.millis(begun);
        let mut worked = self.tick_due;
        let mut asks = std::mem::take(&mut self.asks);
        port::with(|port| port.collect(&mut asks, self.peer_end.strays()));
        worked |= self.hear();
        let mut local = std::mem::take(&mut self.local);
        let mut done = std::mem::take(&mut self.disk_done);
        self.disks.reap(&mut done);
        worked |= !asks.is_empty() || !local.is_empty() || !done.is_empty() || self.ways.are_due();
        {
            // What a store that falls leaves undone is gone on with from where it was.
            let (mut asks, mut local, mut done) = (asks.drain(..), local.drain(..), done.drain(..));
            let mut heard = self.take_heard();
            let mut words = heard.drain(..);
            worked |= self.guarded(|core| core.work(&mut asks, &mut local, &mut done, &mut words));
            drop(words);
            self.keep_heard(heard);
        }
        self.flush_words();
        self.asks = asks;
        self.local = local;
        self.disk_done = done;
        self.run_clock();
        if let Err(error) = self.disks.flush_submissions() {
            // The kernel no longer takes commands: nothing that hosts were told can be kept, so nothing more is told.
            panic!("io_uring refuses to go on: {error}");
        }
        self.counters.turns += 1;
        if worked {
            self.counters.busy_turns += 1;
            self.counters.busy_ticks += spdk_rs::app::ticks() - begun;
        }
        if self.disks.waiting() > 0 || self.peer_end.wants_turn(self.now().0) {
            Activity::Again
        } else if worked {
            Activity::Busy
        } else {
            Activity::Idle
        }
    }

    /// Takes what came to the stores, and settles those that were touched; true when there were any. Called again after a fall.
    fn work(
        &mut self,
        asks: &mut Drain<'_, Request>,
        local: &mut impl Iterator<Item = LocalIo>,
        done: &mut impl Iterator<Item = DiskDone>,
        heard: &mut impl Iterator<Item = Heard>,
    ) -> bool {
        self.look_ahead(asks.as_slice());
        for request in asks {
            self.on_request(request);
        }
        for io in local {
            self.on_local(io);
        }
        for completion in done {
            self.on_disk_done(completion);
        }
        for one in heard {
            self.on_heard(one);
        }
        let ticked = std::mem::take(&mut self.tick_due);
        self.work_ways(ticked);
        if ticked {
            self.counters.ticks += 1;
            self.idle_ticks += 1;
            let now = self.clock;
            for shard in self.shards.iter_mut().flatten().filter(|shard| !shard.quiescent) {
                shard.apply(Event::Tick { now }, now, &mut self.memory);
            }
        }
        let mut settled = false;
        for at in 0..self.shards.len() {
            if self.shards[at].as_ref().is_some_and(|shard| shard.touched) {
                self.settle(at);
                settled = true;
            }
        }
        // A failed barrier may have lost what any store of the drive wrote: they hear of it in this same turn.
        while let Some(drive) = self.fenced_now.pop() {
            self.fence_stores(drive, FenceReason::Drive);
            for at in 0..self.shards.len() {
                if self.shards[at].as_ref().is_some_and(|shard| shard.touched) {
                    self.settle(at);
                }
            }
        }
        settled
    }

    /// Starts the clock when a store has something to do, and stops it when none had for a while: a sleeping core is not woken.
    fn run_clock(&mut self) {
        if self.shards.iter().flatten().any(|shard| !shard.quiescent) || !self.ways.are_idle() {
            self.idle_ticks = 0;
            if self.ticker.is_none() {
                let ticker = Poller::timed("penstock_tick", TICK_US, || {
                    CORE.with_borrow_mut(|core| {
                        if let Some(core) = core {
                            core.tick_due = true;
                            core.waker.wake();
                        }
                    });
                    Activity::Idle
                });
                match ticker {
                    Ok(ticker) => self.ticker = Some(ticker),
                    // Tried again in the next turn, and there are turns as long as anything is out.
                    Err(errno) => tracing::error!(%errno, "the clock does not start"),
                }
            }
        } else if self.idle_ticks >= IDLE_TICKS {
            self.ticker = None;
        }
    }

    fn settle(&mut self, at: usize) {
        let Some(shard) = &mut self.shards[at] else { return };
        shard.settle(&mut self.memory);
        let mut fx = std::mem::take(&mut shard.fx);
        self.carry_out(at, &mut fx);
        fx.clear();
        if let Some(shard) = &mut self.shards[at] {
            shard.fx = fx;
            shard.quiescent = shard.store.view().quiescent;
        }
    }

    fn carry_out(&mut self, at: usize, fx: &mut Effects) {
        self.answered_at = None;
        for effect in fx.list.drain(..) {
            match effect {
                Effect::Disk(op) => {
                    let shard = self.shards[at].as_mut().expect("it was just settled");
                    let parts = &fx.parts[op.first_part as usize..(op.first_part + op.part_count) as usize];
                    let token = (at as u64) << 32 | u64::from(op.id.0);
                    shard.send(&op, parts, token, &mut self.memory, &mut self.disks);
                }
                Effect::Reply { io, status } => self.on_answer(io, status),
                Effect::OrderDone { id, result } => {
                    let shard = self.shards[at].as_mut().expect("it was just settled");
                    shard.orders.retain(|order| *order != id);
                    (self.report)(Report::OrderDone { id, result });
                }
                Effect::Notice(notice) => self.on_notice(at, notice),
                Effect::Send { node, word, first_part, part_count } => {
                    let parts = &fx.parts[first_part as usize..(first_part + part_count) as usize];
                    self.send_word(at, node, *word, parts);
                }
            }
        }
    }

    fn on_notice(&mut self, at: usize, notice: Notice) {
        let shard = self.shards[at].as_mut().expect("it was just settled");
        let (drive, store, shard_node) = (shard.drive, shard.store_no, shard.node);
        let report = match notice {
            Notice::Serving(report) => {
                let ms = (spdk_rs::app::ticks() - shard.opened_at) / (self.hz / 1000).max(1);
                shard.recovery_ms = Some(ms);
                Report::Serving { drive, store, report, ms }
            }
            Notice::OpenFailed(why) => Report::OpenFailed { drive, store, why },
            Notice::Fenced(reason) => {
                if reason != FenceReason::Drive {
                    self.fenced_now.push(drive);
                }
                Report::Fenced { drive, store, reason }
            }
            Notice::Corrupt { replica, block, .. } => Report::Corrupt { drive, store, slot: self.slot_of(at, replica), block },
            Notice::Differs { replica, block, mends, .. } => match self.slot_of(at, replica) {
                Some(slot) => Report::Differs { core: self.index, slot, block, mends },
                None => return,
            },
            Notice::ScrubDone { blocks, corrupt } => Report::ScrubDone { drive, store, blocks, corrupt },
            Notice::Stopped => Report::Stopped { drive, store },
            Notice::Standing { replica, standing } => match self.slot_of(at, replica) {
                Some(slot) => {
                    let me = shard_node;
                    let volume = &mut self.volumes[slot.0 as usize];
                    volume.standing = Some(standing);
                    let is_barred = volume.stand(standing.serves, standing.leader.is_some_and(|leader| leader != me));
                    self.aim(slot);
                    Report::Standing { core: self.index, slot, standing, is_barred }
                }
                None => return,
            },
            Notice::SteppingAside { replica, to } => match self.slot_of(at, replica) {
                Some(slot) => Report::SteppingAside { core: self.index, slot, to },
                None => return,
            },
            Notice::Recovered { replica, receipt, .. } => match self.slot_of(at, replica) {
                Some(slot) => Report::Recovered { core: self.index, slot, receipt },
                None => return,
            },
            Notice::GroupStopped { replica, why } => match self.slot_of(at, replica) {
                Some(slot) => Report::GroupStopped { core: self.index, slot, why },
                None => return,
            },
            Notice::Replica { replica, shape, gone } => {
                let slot = match self.slot_of(at, replica) {
                    Some(slot) => slot,
                    None => {
                        self.volumes.push(CoreVolume::new(at, replica, (*shape).clone()));
                        VolumeSlot(self.volumes.len() as u32 - 1)
                    }
                };
                let volume = &mut self.volumes[slot.0 as usize];
                volume.shape = (*shape).clone();
                volume.gone = gone;
                self.place_here(shape.segment, at, gone);
                if gone {
                    self.close_way(slot);
                }
                let is_member = self.shards[at].as_ref().is_some_and(|shard| shard.store.member_view(replica).is_some());
                Report::Replica { drive, store, core: self.index, slot, shape: *shape, is_member, gone }
            }
        };
        (self.report)(report);
    }

    fn slot_of(&self, shard: usize, replica: ReplicaNo) -> Option<VolumeSlot> {
        let found = self.volumes.iter().position(|v| v.shard == shard && v.replica == replica);
        found.map(|at| VolumeSlot(at as u32))
    }

    fn on_disk_done(&mut self, completion: DiskDone) {
        self.counters.disk_completions += 1;
        let DiskDone { token, ok } = completion;
        if token & JOB_TOKEN != 0 {
            let at = (token & !JOB_TOKEN) as usize;
            let mut job = self.jobs[at].take().expect("a job lives until its last step");
            if !job.on_done(ok, token, &mut self.memory, &mut self.disks) {
                self.jobs[at] = Some(job);
            }
            return;
        }
        let at = (token >> 32) as usize;
        let shard = self.shards[at].as_mut().expect("a store outlives its commands");
        shard.out -= 1;
        if shard.quarantined {
            return self.on_quarantined_done(at);
        }
        shard.apply(Event::DiskDone { id: DiskId(token as u32), ok }, self.clock, &mut self.memory);
    }

    // ---- control ----

    /// Begins to use a drive.
    ///
    /// # Errors
    /// As [`CoreDisks::attach`].
    pub fn attach_drive(&mut self, backend: &Backend) -> Result<DiskIndex, BackendError> {
        let (disk, fd) = self.disks.attach(backend)?;
        if let Some(fd) = fd {
            self.ring_event = Some(self.watch(fd).map_err(BackendError::Channel)?);
        }
        Ok(disk)
    }

    fn watch(&self, fd: RawFd) -> Result<FdEvent, spdk_rs::Errno> {
        FdEvent::register("penstock_ring", fd, || {
            CORE.with_borrow_mut(|core| {
                if let Some(core) = core {
                    core.disks.clear_event();
                }
            });
            turn()
        })
    }

    /// Lets go of a drive whose stores are closed; false while commands are out.
    pub fn detach_drive(&mut self, disk: DiskIndex) -> bool {
        self.disks.detach(disk)
    }

    /// Opens a store; [`Report::Serving`] or [`Report::OpenFailed`] follows.
    pub fn open_store(&mut self, drive: DriveKey, config: StoreConfig, disk: DiskIndex, start: BlockAddr) {
        let shard = Shard::new(self.shards.len(), drive, config, disk, start, spdk_rs::app::ticks());
        self.shards.push(Some(shard));
        self.greet(self.shards.len() - 1);
        self.waker.wake();
    }

    /// Forgets a drive's stores, which must have stopped or failed; false while one has not.
    pub fn close_stores(&mut self, drive: DriveKey) -> bool {
        let of_drive = |shard: &Option<Shard>| shard.as_ref().is_some_and(|s| s.drive == drive);
        if self.shards.iter().any(|shard| of_drive(shard) && !shard.as_ref().is_some_and(Shard::is_stopped)) {
            return false;
        }
        let mut closed = Vec::new();
        for (at, shard) in self.shards.iter_mut().enumerate() {
            if of_drive(shard) {
                *shard = None;
                // A store that stopped has given all back; one that fell has not.
                self.memory.take_back(Owner::Store(at as u32));
                self.volumes.iter_mut().filter(|v| v.shard == at).for_each(|v| v.gone = true);
                closed.push(at);
            }
        }
        closed.into_iter().for_each(|at| self.forget_places(at));
        true
    }

    /// The drive is not to be written any more: told to each of its stores here.
    pub fn fence_drive(&mut self, drive: DriveKey, reason: FenceReason) {
        self.clock = self.now();
        self.guarded(|core| core.fence_stores(drive, reason));
        self.waker.wake();
    }

    fn fence_stores(&mut self, drive: DriveKey, reason: FenceReason) {
        for shard in self.shards.iter_mut().flatten().filter(|shard| shard.drive == drive) {
            shard.apply(Event::Fence(reason), self.clock, &mut self.memory);
        }
    }

    /// Gives an order to a store; [`Report::OrderDone`] follows.
    pub fn order(&mut self, drive: DriveKey, store: u32, id: OrderId, order: Order) {
        self.counters.orders += 1;
        let found = self.shards.iter().position(|s| s.as_ref().is_some_and(|s| s.drive == drive && s.store_no == store));
        let Some((at, shard)) = found.and_then(|at| self.shards[at].as_mut().map(|shard| (at, shard))) else {
            return (self.report)(Report::OrderDone { id, result: Err(OrderError::NotServing) });
        };
        if shard.quarantined {
            return self.order_quarantined(at, id, &order);
        }
        shard.orders.push(id);
        self.clock = self.now();
        if order == Order::Stop {
            self.close_ways(at);
        }
        let mut order = Some(order);
        self.guarded(|core| {
            if let (Some(shard), Some(order)) = (core.shards[at].as_mut(), order.take()) {
                shard.apply(Event::Order { id, order }, core.clock, &mut core.memory);
            }
        });
        self.waker.wake();
    }

    /// Hosts that were connected while another node came to lead are gone: what comes now was sent since.
    pub fn unbar(&mut self, slot: VolumeSlot) {
        self.volumes[slot.0 as usize].is_barred = false;
    }

    /// Runs plain reads and writes on a drive.
    pub fn run_job(&mut self, job: Job) {
        let at = self.jobs.iter().position(Option::is_none).unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        let mut job = job;
        if !job.advance(JOB_TOKEN | at as u64, &mut self.memory, &mut self.disks) {
            self.jobs[at] = Some(job);
        }
        self.waker.wake();
    }
}
