//! A command allocates nothing on its way through the loop, once warm: writes, reads and zeroes from within the process, one at a
//! time and many. The drain is background work with slices of its own; the oplog is large enough that it does not begin here.

mod load;

use std::alloc::System;
use std::sync::mpsc;

use penstock_node::inproc::{self, Activity, HostOp, LendBuf, LocalDone, Span, Volume};
use stats_alloc::{INSTRUMENTED_SYSTEM, Stats, StatsAlloc};

#[global_allocator]
static COUNTED: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 1024;
const COUNT: u64 = 1500;
/// Allocations in a phase that are lists which grow, and none of a command.
const DOUBLINGS: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Write,
    Read,
    Zero,
}

/// What is done, one after the other. The first of each kind and depth warms up, the second is counted.
const PHASES: [(Kind, usize); 6] =
    [(Kind::Write, 1), (Kind::Read, 1), (Kind::Zero, 1), (Kind::Write, 32), (Kind::Read, 32), (Kind::Zero, 32)];

struct Load {
    volume: Volume,
    phase: usize,
    /// Whether the phase's second round is under way.
    counted: bool,
    started: u64,
    finished: u64,
    failed: u64,
    before: Stats,
    free: Vec<LendBuf>,
    done: Vec<LocalDone>,
    /// Allocations of each phase, and the commands that failed.
    found: Vec<(Kind, usize, usize, u64)>,
    report: mpsc::Sender<Vec<(Kind, usize, usize, u64)>>,
}

fn allocations(stats: &Stats) -> usize {
    stats.allocations + stats.reallocations
}

impl Load {
    fn turn(&mut self) -> Activity {
        self.volume.reap(&mut self.done);
        for done in self.done.drain(..) {
            self.finished += 1;
            self.failed += u64::from(!done.status.is_success());
            self.free.extend(done.buf);
        }
        let (kind, depth) = PHASES[self.phase];
        while self.started < COUNT && self.started - self.finished < depth as u64 {
            let n = self.started;
            self.started += 1;
            let span = Span { offset: n * 1663 % BLOCKS * BLOCK, len: BLOCK };
            match kind {
                Kind::Write => self.volume.submit(HostOp::Write(span), self.free.pop(), n),
                Kind::Read => self.volume.submit(HostOp::Read(span), self.free.pop(), n),
                Kind::Zero => self.volume.submit(HostOp::Zero(span), None, n),
            }
        }
        if self.finished == COUNT {
            return self.next();
        }
        Activity::Busy
    }

    fn next(&mut self) -> Activity {
        let (kind, depth) = PHASES[self.phase];
        (self.started, self.finished) = (0, 0);
        if !std::mem::replace(&mut self.counted, true) {
            self.before = COUNTED.stats();
            return Activity::Busy;
        }
        let allocated = allocations(&COUNTED.stats()) - allocations(&self.before);
        self.found.push((kind, depth, allocated, self.failed));
        self.counted = false;
        self.phase += 1;
        if self.phase < PHASES.len() {
            return Activity::Busy;
        }
        self.phase = 0;
        self.free.clear();
        let _ = self.report.send(std::mem::take(&mut self.found));
        inproc::stop();
        // The poller is dropped with its thread, and does nothing until then.
        self.started = COUNT;
        Activity::Idle
    }
}

#[test]
fn command_after_warm_up_allocates_nothing() {
    let (report, outcome) = mpsc::channel();
    load::run("malloc:m0?size=384MiB", BLOCKS * BLOCK, 128 << 20, move |volume| {
        let mut load = Load {
            volume,
            phase: 0,
            counted: false,
            started: 0,
            finished: 0,
            failed: 0,
            before: COUNTED.stats(),
            free: inproc::buffers(32, BLOCK as usize).expect("memory"),
            done: Vec::with_capacity(64),
            found: Vec::with_capacity(PHASES.len()),
            report,
        };
        move || load.turn()
    });
    let found = outcome.try_recv().expect("the load ran to its end");
    for (kind, depth, allocated, failed) in &found {
        println!("{kind:?} at depth {depth}: {allocated} allocations in {COUNT} commands");
        assert_eq!(*failed, 0, "{found:?}");
    }
    assert_eq!(found.len(), PHASES.len());
    // A list that is as long as the log, or as the most that was ever out at a time, doubles now and then; one allocation a command
    // would be a thousand times as many.
    assert!(found.iter().all(|(_, _, allocated, _)| *allocated <= DOUBLINGS), "{found:?}");
}
