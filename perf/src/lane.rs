//! One load on one core: the adapter between a [`Load`] and SPDK's bdev layer.
//!
//! A lane owns a channel, one DMA buffer per place in the queue, and a poller. A completion is handled where SPDK calls
//! back, and its place is filled again at once. Windows of figures leave through a channel, so nothing is shared per I/O.
//! Deliberately not here: what to submit (the load), and printing.

use std::cell::RefCell;
use std::rc::{Rc, Weak};

use crossbeam_channel::{Receiver, Sender};
use spdk_rs::app;
use spdk_rs::bdev::{Bdev, BdevChannel, Done};
use spdk_rs::dma::DmaBuf;
use spdk_rs::thread::{self, Activity, Core, Poller};

use crate::handicap::Handicap;
use crate::load::Load;
use crate::sample::Sample;
use crate::session::{Outcome, Submission, Tag};
use crate::units::Nanos;
use crate::workload::{Op, OpKind};

/// What may be told to a running lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// No more starts; wait for what is outstanding.
    Stop,
    /// The target is dead: finish now, what is outstanding is in doubt.
    Abandon,
}

/// What a lane tells.
pub enum Notice<L> {
    /// A window of figures, and how long nothing has completed.
    Window { sample: Box<Sample>, silence: Nanos, is_draining: bool },
    /// The load is over, with its last window still inside it.
    Finished(Box<L>),
    /// It never started.
    Failed(String),
}

/// How a lane is set up.
pub struct LaneSetup<L> {
    pub bdev: Bdev,
    pub core: Core,
    pub load: L,
    /// Bytes of the largest operation, and operations at a time.
    pub io_bytes: usize,
    pub depth: u32,
    /// How often a window is sent.
    pub window: Nanos,
    pub handicap: Handicap,
    /// Read the clock once a turn of the reactor instead of at each completion. Latencies are then off by up to a turn, and the
    /// generator costs less; for arms whose figure is a rate.
    pub is_clock_coarse: bool,
}

/// Ticks of the CPU as nanoseconds; one multiplication per reading.
#[derive(Clone, Copy)]
struct Clock {
    start: u64,
    /// Nanoseconds a tick, times 2^32.
    scale: u64,
}

impl Clock {
    fn new() -> Self {
        let hz = app::ticks_hz().max(1);
        Self { start: app::ticks(), scale: ((1_000_000_000u128 << 32) / u128::from(hz)) as u64 }
    }

    fn now(&self) -> Nanos {
        let ticks = app::ticks().wrapping_sub(self.start);
        Nanos(((u128::from(ticks) * u128::from(self.scale)) >> 32) as u64)
    }
}

struct Lane<L: Load> {
    load: Option<Box<L>>,
    channel: Option<BdevChannel<DmaBuf>>,
    /// One per tag; away while its operation is in flight.
    buffers: Vec<Option<DmaBuf>>,
    /// What each tag's operation is, to fill in what SPDK does not say.
    block_bytes: u64,
    clock: Clock,
    is_clock_coarse: bool,
    /// When this turn of the reactor began.
    turn_began: Nanos,
    window: Nanos,
    next_window: Nanos,
    handicap: Handicap,
    orders: Receiver<Order>,
    notices: Sender<Notice<L>>,
    spare: Receiver<Sample>,
    poller: Option<Poller>,
}

/// What the names of lanes' threads begin with.
pub const THREAD_NAME: &str = "perf_lane";
/// A load that is over, and what its lane held for it.
type Finished<L> = (Option<BdevChannel<DmaBuf>>, Option<Poller>, Box<L>);

/// Turns between two looks at the orders and the window; keeps those off the per-I/O path.
const TURNS_PER_LOOK: u32 = 64;

impl<L: Load + Send + 'static> Lane<L> {
    /// Submits as much as the load gives. One reading of the clock serves them all: what submitting takes counts as latency.
    fn pump(&mut self, now: Nanos) -> bool {
        let mut did = false;
        let Some(mut load) = self.load.take() else { return false };
        while let Some(submission) = load.next(now) {
            did = true;
            self.handicap.apply();
            if !self.submit(&mut load, submission) {
                break;
            }
        }
        self.load = Some(load);
        did
    }

    fn buffer(&mut self, op: &Op, tag: Tag) -> DmaBuf {
        let length = op.length.0 as usize;
        let kept = self.buffers[tag.0 as usize].take().expect("a free place has its buffer");
        if kept.len() == length {
            return kept;
        }
        // Only a verify pass reads pieces of different lengths; what it wants is exactly that long.
        DmaBuf::zeroed(length).unwrap_or_else(|error| panic!("no DMA memory for {length} bytes: {error}"))
    }

    /// False when the target takes no more for now.
    fn submit(&mut self, load: &mut L, submission: Submission) -> bool {
        let Submission { tag, op } = submission;
        let channel = self.channel.as_ref().expect("open while the load runs");
        let (offset, blocks) = (op.offset.0 / self.block_bytes, op.length.0 / self.block_bytes);
        let token = u64::from(tag.0);
        let refused = match op.kind {
            OpKind::Trim => channel.unmap(offset, blocks, token).err().map(|errno| (errno, None)),
            OpKind::Read | OpKind::Write => {
                let mut buffer = self.buffer(&op, tag);
                let channel = self.channel.as_ref().expect("open while the load runs");
                let outcome = if op.kind == OpKind::Read {
                    channel.read(buffer, offset, blocks, token)
                } else {
                    load.prepare(tag, &mut buffer);
                    channel.write(buffer, offset, blocks, token)
                };
                outcome.err().map(|refused| (refused.errno, refused.memory))
            }
        };
        let Some((errno, memory)) = refused else { return true };
        if let Some(memory) = memory {
            self.buffers[tag.0 as usize] = Some(memory);
        }
        let now = self.clock.now();
        if matches!(errno, spdk_rs::Errno::NOMEM | spdk_rs::Errno::AGAIN) {
            load.refused(tag, now);
            return false;
        }
        load.done(tag, &Outcome::Failed(format!("not submitted: {errno}")), now, &[]);
        true
    }

    fn completed(&mut self, done: Done<DmaBuf>, now: Nanos) {
        let tag = Tag(done.token as u32);
        let memory = done.memory;
        if let Some(load) = self.load.as_mut().filter(|load| !load.is_finished()) {
            let data = memory.as_deref().unwrap_or(&[]);
            match done.result {
                Ok(()) => load.done(tag, &Outcome::Ok, now, data),
                Err(status) => load.done(tag, &Outcome::Failed(status.to_string()), now, data),
            }
        }
        if let Some(memory) = memory {
            self.buffers[tag.0 as usize] = Some(memory);
        }
    }

    fn look(&mut self) {
        let now = self.clock.now();
        let Some(load) = self.load.as_mut() else { return };
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Stop => load.stop(now),
                Order::Abandon => load.abandon(now),
            }
        }
        load.turn(now);
        if now >= self.next_window && !load.is_finished() {
            self.next_window = now.plus(self.window);
            let empty = self.spare.try_recv().unwrap_or_default();
            let sample = load.take_window(empty, now);
            let notice = Notice::Window { sample: Box::new(sample), silence: load.silence(now), is_draining: load.is_draining() };
            if self.notices.send(notice).is_err() {
                load.stop(now); // nobody listens any more
            }
        }
    }

    /// What to drop once the load is over: the caller drops it outside of any borrow.
    fn take_if_finished(&mut self) -> Option<Finished<L>> {
        let load = self.load.take_if(|load| load.is_finished())?;
        Some((self.channel.take(), self.poller.take(), load))
    }
}

/// Starts a lane on its core. Orders come and notices go through the channels; spare windows come back through `spare`.
pub fn start<L: Load + Send + 'static>(
    setup: LaneSetup<L>,
    orders: Receiver<Order>,
    notices: Sender<Notice<L>>,
    spare: Receiver<Sample>,
) -> Result<(), spdk_rs::Errno> {
    let core = setup.core;
    let started = move || {
        let failed = notices.clone();
        if let Err(text) = begin(setup, orders, notices, spare) {
            let _ = failed.send(Notice::Failed(text));
            thread::exit_current();
        }
    };
    thread::spawn(&format!("{THREAD_NAME}_{}", core.0), core, started).map(|_| ())
}

fn begin<L: Load + Send + 'static>(
    setup: LaneSetup<L>,
    orders: Receiver<Order>,
    notices: Sender<Notice<L>>,
    spare: Receiver<Sample>,
) -> Result<(), String> {
    let mut buffers = Vec::with_capacity(setup.depth as usize);
    for tag in 0..setup.depth {
        let mut buffer = DmaBuf::zeroed(setup.io_bytes)
            .map_err(|error| format!("no DMA memory for {} buffers of {} bytes: {error}; raise --mem-mib", setup.depth, setup.io_bytes))?;
        // Not zero: a target may treat zeroes as a case of its own.
        crate::content::fill_noise(&mut buffer, u64::from(tag));
        buffers.push(Some(buffer));
    }
    let clock = Clock::new();
    let lane = Rc::new(RefCell::new(Lane {
        load: Some(Box::new(setup.load)),
        channel: None,
        buffers,
        block_bytes: u64::from(setup.bdev.geometry().block_size),
        clock,
        is_clock_coarse: setup.is_clock_coarse,
        turn_began: clock.now(),
        window: setup.window,
        next_window: clock.now().plus(setup.window),
        handicap: setup.handicap,
        orders,
        notices,
        spare,
        poller: None,
    }));
    let weak: Weak<RefCell<Lane<L>>> = Rc::downgrade(&lane);
    let on_done = move |done| {
        if let Some(lane) = weak.upgrade() {
            let mut lane = lane.borrow_mut();
            let now = if lane.is_clock_coarse { lane.turn_began } else { lane.clock.now() };
            lane.completed(done, now);
            lane.pump(now);
        }
    };
    let channel = setup.bdev.channel(setup.depth as usize, on_done).map_err(|error| format!("no I/O channel: {error}"))?;
    {
        let mut lane = lane.borrow_mut();
        lane.channel = Some(channel);
        let now = lane.clock.now();
        lane.load.as_mut().expect("just put there").begin(now);
    }
    let mut turns = 0u32;
    let driven = lane.clone();
    let mut bdev = Some(setup.bdev);
    let turn = move || {
        let mut lane = driven.borrow_mut();
        turns = turns.wrapping_add(1);
        if turns.is_multiple_of(TURNS_PER_LOOK) {
            lane.look();
        }
        let now = lane.clock.now();
        lane.turn_began = now;
        let did = lane.pump(now);
        let Some((channel, poller, load)) = lane.take_if_finished() else {
            return if did { Activity::Busy } else { Activity::Idle };
        };
        let notices = lane.notices.clone();
        drop(lane);
        // What is still in flight keeps the channel until it ends; the lane itself is done.
        drop((channel, poller));
        bdev.take();
        // Before the news: whoever hears it may stop the app, after which no thread can leave in good order.
        thread::exit_current();
        let _ = notices.send(Notice::Finished(load));
        Activity::Idle
    };
    let poller = Poller::busy("perf_lane", turn).map_err(|error| format!("no poller: {error}"))?;
    lane.borrow_mut().poller = Some(poller);
    Ok(())
}
