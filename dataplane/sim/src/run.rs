//! Running seeds: one, many on all cores, and the canaries. What a run came to, and how to replay it.
//!
//! Each world lives on one thread; threads share nothing but the next seed. Not here: the command line (`main`), and the table of canaries
//! (`canaries`).

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::canaries::{Bug, Seeded};
use crate::tally::{Tally, Trace};
use crate::{cluster, fleet, world};

/// What is simulated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Simulator {
    /// One node's stores ([`world`]).
    Node,
    /// Groups without stores ([`cluster`]).
    Groups,
    /// Whole nodes under everything ([`fleet`]).
    Fleets,
}

impl Simulator {
    pub const ALL: [Simulator; 3] = [Simulator::Node, Simulator::Groups, Simulator::Fleets];

    pub fn title(self) -> &'static str {
        match self {
            Simulator::Node => "one node's stores",
            Simulator::Groups => "groups of several nodes",
            Simulator::Fleets => "fleets of whole nodes",
        }
    }

    /// What chooses it on the command line.
    fn flag(self) -> &'static str {
        match self {
            Simulator::Node => "",
            Simulator::Groups => " --cluster",
            Simulator::Fleets => " --fleet",
        }
    }

    /// Runs one seed to its end or its first violation.
    pub fn run(self, seed: u64, bug: Option<Bug>, print: bool) -> Outcome {
        let canary = bug.map_or(String::new(), |bug| format!(" --canary {}", bug.name()));
        let replay = format!("penstock-sim{} --seed {seed}{canary} --trace", self.flag());
        match self {
            Simulator::Node => live(seed, replay, || world::World::new(seed, bug, print)),
            Simulator::Groups => live(seed, replay, || cluster::world::World::new(seed, bug, print)),
            Simulator::Fleets => live(seed, replay, || fleet::World::new(seed, bug, print)),
        }
    }
}

/// A world, as one seed runs it.
pub trait Life {
    /// The storm, then the calm. Panics on any violation.
    fn live(&mut self);
    fn end(self) -> (Trace, Tally);
}

/// How a violation showed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// A check of the simulator failed.
    Check,
    /// Something that must come did not, after so long without a fault (25).
    Stuck,
    /// Code that is simulated fell.
    Fell,
}

#[derive(Clone, Debug)]
pub struct Violation {
    pub how: How,
    /// What was violated, and where the check stands.
    pub text: String,
}

/// What a seed came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub seed: u64,
    pub hash: u64,
    pub events: u64,
    pub tally: Tally,
    pub violation: Option<Violation>,
    /// The command line that shows this run again.
    pub replay: String,
}

struct Stuck(String);

/// Ends a run in which something does not come.
#[track_caller]
pub fn stuck(what: String) -> ! {
    panic_any(Stuck(what))
}

thread_local! {
    static LAST_PANIC: RefCell<Option<Violation>> = const { RefCell::new(None) };
}

/// Panics of runs are results: kept for the outcome instead of printed. Call once, before any run.
pub fn catch_quietly() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            let payload = info.payload();
            let stuck = payload.downcast_ref::<Stuck>().map(|stuck| stuck.0.clone());
            let ours = info.location().is_some_and(|place| place.file().contains("sim/src"));
            let how = match (&stuck, ours) {
                (Some(_), _) => How::Stuck,
                (None, true) => How::Check,
                (None, false) => How::Fell,
            };
            let text = stuck.or_else(|| payload.downcast_ref::<String>().cloned());
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default();
            let place = info.location().map_or(String::new(), |place| format!(" ({}:{})", place.file(), place.line()));
            LAST_PANIC.with(|last| *last.borrow_mut() = Some(Violation { how, text: text + &place }));
        }));
    });
}

fn live<L: Life>(seed: u64, replay: String, make: impl FnOnce() -> L) -> Outcome {
    catch_quietly();
    let mut life = None;
    let ran = catch_unwind(AssertUnwindSafe(|| life.insert(make()).live()));
    let violation = ran.err().and_then(|_| LAST_PANIC.with(|last| last.borrow_mut().take()));
    let (trace, mut tally) = life.map_or_else(|| (Trace::new(false), Tally::default()), Life::end);
    tally.did("events", trace.events());
    Outcome { seed, hash: trace.hash(), events: trace.events(), tally, violation, replay }
}

/// What many seeds came to.
#[derive(Default, Debug)]
pub struct Summary {
    pub seeds: u64,
    pub events: u64,
    pub tally: Tally,
    pub violations: Vec<Outcome>,
    /// Exclusive or over all hashes: the same for the same seeds, whatever thread ran which.
    pub hash: u64,
}

/// As many as there are cores.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Runs `count` seeds from `from` on `threads` threads; stops early after `violations_limit` violations.
pub fn run_many(
    from: u64,
    count: u64,
    threads: usize,
    violations_limit: usize,
    run: &(dyn Fn(u64) -> Outcome + Sync),
    progress: &(dyn Fn(&Summary) + Sync),
) -> Summary {
    let next = AtomicU64::new(from);
    let stop = AtomicBool::new(false);
    let summary = Mutex::new(Summary::default());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count {
                        return;
                    }
                    let outcome = run(seed);
                    let mut s = summary.lock().expect("no thread panics while it holds this");
                    s.seeds += 1;
                    s.events += outcome.events;
                    s.hash ^= outcome.hash;
                    s.tally.add(&outcome.tally);
                    if outcome.violation.is_some() {
                        s.violations.push(outcome);
                        if s.violations.len() >= violations_limit {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                    progress(&s);
                }
            });
        }
    });
    summary.into_inner().expect("threads are joined")
}

/// What became of a seeded bug in one simulator.
pub struct Hunt {
    pub simulator: Simulator,
    pub seeds: u64,
    pub caught: Option<Outcome>,
}

/// Runs a seeded bug in each of these simulators that has to see it, in `most` seeds if that is fewer than its row says.
pub fn hunt(seeded: &Seeded, simulators: &[Simulator], from: u64, most: u64, threads: usize) -> Vec<Hunt> {
    let one = |(simulator, within): &(Simulator, u64)| {
        let run = |seed| {
            let mut outcome = simulator.run(seed, Some(seeded.bug), false);
            outcome.violation.take_if(|violation| violation.how != How::Check);
            outcome
        };
        let s = run_many(from, most.min(*within), threads, 1, &run, &|_| {});
        Hunt { simulator: *simulator, seeds: s.seeds, caught: s.violations.into_iter().next() }
    };
    seeded.by.iter().filter(|(simulator, _)| simulators.contains(simulator)).map(one).collect()
}
