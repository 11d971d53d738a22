//! The cluster simulator's own acceptance: seeds run clean, the same seed runs the same, faults strike, and every seeded bug is caught.

#![forbid(unsafe_code)]

use penstock_sim::cluster::{Bug, Outcome, run_seed};
use penstock_sim::tally::Tally;

const SEEDS: u64 = 1000;
/// Most seeds that a seeded bug may take to be caught.
const BUG_SEEDS: u64 = 200;

/// Runs seeds on two threads until one is violated.
fn run_many(seeds: u64, bug: Option<Bug>) -> (Tally, u64, Option<Outcome>) {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()) as u64;
    let next = std::sync::atomic::AtomicU64::new(0);
    let found = std::sync::Mutex::new((Tally::default(), 0, None::<Outcome>));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if seed >= seeds || found.lock().expect("nobody panics with it").2.is_some() {
                        return;
                    }
                    let outcome = run_seed(seed, bug, false);
                    let mut found = found.lock().expect("nobody panics with it");
                    found.0.add(&outcome.tally);
                    found.1 += 1;
                    if outcome.violation.is_some() && found.2.as_ref().is_none_or(|other| other.seed > seed) {
                        found.2 = Some(outcome);
                    }
                }
            });
        }
    });
    found.into_inner().expect("threads are joined")
}

#[test]
fn a_thousand_seeds_of_clusters_violate_nothing() {
    let (tally, seeds, violated) = run_many(SEEDS, None);
    if let Some(outcome) = violated {
        panic!(
            "seed {}: {}\n  replay: penstock-sim --cluster --seed {} --trace",
            outcome.seed,
            outcome.violation.unwrap_or_default(),
            outcome.seed
        );
    }
    assert_eq!(seeds, SEEDS);
    for (rows, least) in [(&tally.faults, 21), (&tally.checks, 10), (&tally.work, 9)] {
        println!("{rows:#?}");
        assert!(rows.len() >= least && rows.values().all(|n| *n >= 20), "something hardly ever happens: {rows:#?}");
    }
}

#[test]
fn same_seed_of_a_cluster_gives_the_same_trace_hash() {
    for seed in [1, 17, 99] {
        let (a, b) = (run_seed(seed, None, false), run_seed(seed, None, false));
        assert_eq!((a.hash, a.events), (b.hash, b.events), "seed {seed}");
        assert!(a.events > 1000, "seed {seed} did next to nothing: {} events", a.events);
        assert_ne!(a.hash, run_seed(seed + 1, None, false).hash);
    }
}

#[test]
fn every_seeded_bug_of_clusters_is_caught() {
    let mut free = Vec::new();
    for bug in Bug::ALL {
        let (_, seeds, violated) = run_many(BUG_SEEDS, Some(bug));
        match violated {
            Some(outcome) => println!("{:<20} caught in {seeds:>4} seeds: {}", bug.name(), outcome.violation.unwrap_or_default()),
            None => free.push(bug.name()),
        }
    }
    assert!(free.is_empty(), "not caught in {BUG_SEEDS} seeds: {free:?}");
}
