//! The fleet simulator's own acceptance: seeds run clean, the same seed runs the same, faults strike, and seeded bugs are caught.

#![forbid(unsafe_code)]

use penstock_sim::fleet::{canaries, run_seed};
use penstock_sim::report::{canary_row, violation_rows};
use penstock_sim::run::{Outcome, run_canaries, run_many};

const SEEDS: u64 = 300;
/// Most seeds that a seeded bug may take to be caught.
const BUG_SEEDS: u64 = 2000;
/// Seeded bugs that are caught within a few seeds: the others are `make sim`'s.
const QUICK: [&str; 4] = ["CountBeforeBarrier", "AnswerEarly", "ReadUnproven", "CountUnpersisted"];

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

#[test]
fn three_hundred_seeds_of_fleets_violate_nothing() {
    let s = run_many(0, SEEDS, threads(), 1, &|seed| run_seed(seed, None, false), &|_| {});
    assert!(s.violations.is_empty(), "{}", s.violations.iter().map(violation_rows).collect::<String>());
    assert_eq!(s.seeds, SEEDS);
    for (rows, least) in [(&s.tally.faults, 24), (&s.tally.checks, 20), (&s.tally.work, 16)] {
        println!("{rows:#?}");
        assert!(rows.len() >= least && rows.values().filter(|n| **n >= 5).count() >= least, "something hardly ever happens: {rows:#?}");
    }
}

#[test]
fn same_seed_of_a_fleet_gives_the_same_trace_hash() {
    for seed in [1, 17, 99] {
        let (a, b) = (run_seed(seed, None, false), run_seed(seed, None, false));
        assert_eq!((a.hash, a.events), (b.hash, b.events), "seed {seed}");
        assert!(a.events > 1000, "seed {seed} did next to nothing: {} events", a.events);
        assert_ne!(a.hash, run_seed(seed + 1, None, false).hash);
    }
}

#[test]
fn seeded_bugs_of_fleets_are_caught() {
    let quick: Vec<_> = canaries().into_iter().filter(|(name, _)| QUICK.contains(&name.as_str())).collect();
    assert_eq!(quick.len(), QUICK.len());
    let row = |name: &str, outcome: Option<&Outcome>, seeds| println!("{}", canary_row(name, outcome, seeds));
    let caught = run_canaries(0, BUG_SEEDS, threads(), &quick, &row);
    let free: Vec<_> = caught.iter().filter(|(_, seeds)| seeds.is_none()).map(|(name, _)| name).collect();
    assert!(free.is_empty(), "not caught in {BUG_SEEDS} seeds: {free:?}");
}
