//! The cluster simulator's own acceptance: seeds run clean, the same seed runs the same, faults strike, and every seeded bug is caught.

#![forbid(unsafe_code)]

use penstock_sim::cluster::{canaries, run_seed};
use penstock_sim::report::{canary_row, violation_rows};
use penstock_sim::run::{Outcome, run_canaries, run_many};

const SEEDS: u64 = 1000;
/// Most seeds that a seeded bug may take to be caught.
const BUG_SEEDS: u64 = 200;

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

#[test]
fn a_thousand_seeds_of_clusters_violate_nothing() {
    let s = run_many(0, SEEDS, threads(), 1, &|seed| run_seed(seed, None, false), &|_| {});
    assert!(s.violations.is_empty(), "{}", s.violations.iter().map(violation_rows).collect::<String>());
    let tally = s.tally;
    assert_eq!(s.seeds, SEEDS);
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
    let row = |name: &str, outcome: Option<&Outcome>, seeds| println!("{}", canary_row(name, outcome, seeds));
    let caught = run_canaries(0, BUG_SEEDS, threads(), &canaries(), &row);
    let free: Vec<_> = caught.iter().filter(|(_, seeds)| seeds.is_none()).map(|(name, _)| name).collect();
    assert!(free.is_empty(), "not caught in {BUG_SEEDS} seeds: {free:?}");
}
