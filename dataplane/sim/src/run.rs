//! Running seeds: one, many on all cores, and the canaries. What a run came to, and how to replay it.
//!
//! Each world lives on one thread; threads share nothing but the next seed. Not here: the command line (`main`).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use penstock_engine::Canary;

use crate::tally::Tally;
use crate::world::World;

/// What a seed came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub seed: u64,
    pub hash: u64,
    pub events: u64,
    pub tally: Tally,
    /// What was violated, and where the check stands.
    pub violation: Option<String>,
    /// The command line that shows this run again.
    pub replay: String,
}

thread_local! {
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics of runs are results: kept for the outcome instead of printed. Call once, before any run.
pub fn catch_quietly() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            let text =
                info.payload().downcast_ref::<String>().cloned().or_else(|| info.payload().downcast_ref::<&str>().map(|s| (*s).to_owned()));
            let place = info.location().map_or(String::new(), |l| format!(" ({}:{})", l.file(), l.line()));
            LAST_PANIC.with(|p| *p.borrow_mut() = text.unwrap_or_default() + &place);
        }));
    });
}

/// What the last panic of this thread said, and where.
pub fn last_panic() -> String {
    LAST_PANIC.with(|p| p.borrow().clone())
}

/// Runs one seed to its end or its first violation.
pub fn run_seed(seed: u64, canary: Option<Canary>, print: bool) -> Outcome {
    catch_quietly();
    LAST_PANIC.with(|p| p.borrow_mut().clear());
    let world: RefCell<Option<World>> = RefCell::new(None);
    let ran = catch_unwind(AssertUnwindSafe(|| {
        *world.borrow_mut() = Some(World::new(seed, canary, print));
        world.borrow_mut().as_mut().expect("just made").run();
    }));
    let violation = ran.err().map(|_| LAST_PANIC.with(|p| p.borrow().clone()));
    let world = world.into_inner();
    let (hash, events, mut tally) = world.map_or((0, 0, Tally::default()), |w| (w.trace.hash(), w.trace.events(), w.tally));
    tally.did("events", events);
    let replay = format!("penstock-sim --seed {seed}{} --trace", canary.map_or(String::new(), |c| format!(" --canary {c:?}")));
    Outcome { seed, hash, events, tally, violation, replay }
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

/// A seeded bug by its name, and how one seed runs with it.
pub type Seeded = (String, Box<dyn Fn(u64) -> Outcome + Sync>);

/// The seeded bugs of a single node.
pub fn canaries() -> Vec<Seeded> {
    let run = |canary| Box::new(move |seed| run_seed(seed, Some(canary), false)) as Box<dyn Fn(u64) -> Outcome + Sync>;
    Canary::ALL.into_iter().map(|canary| (format!("{canary:?}"), run(canary))).collect()
}

/// For each seeded bug the seeds that it took to catch it, `None` where `limit` did not.
pub fn run_canaries(
    from: u64,
    limit: u64,
    threads: usize,
    canaries: &[Seeded],
    progress: &(dyn Fn(&str, Option<&Outcome>, u64) + Sync),
) -> BTreeMap<String, Option<u64>> {
    let mut caught = BTreeMap::new();
    for (name, run) in canaries {
        let s = run_many(from, limit, threads, 1, &**run, &|_| {});
        progress(name, s.violations.first(), s.seeds);
        caught.insert(name.clone(), (!s.violations.is_empty()).then_some(s.seeds));
    }
    caught
}
