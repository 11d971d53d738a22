//! The simulator's own acceptance: seeds run clean, the same seed runs the same, and every seeded bug is caught.

#![forbid(unsafe_code)]

use std::time::Instant;

use penstock_sim::report::{canary_row, summary_table, violation_rows};
use penstock_sim::run::{Outcome, canaries, run_canaries, run_many, run_seed};

const SEEDS: u64 = 500;
/// Most seeds that a seeded bug may take to be caught.
const CANARY_SEEDS: u64 = 100;

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

#[test]
fn five_hundred_seeds_violate_nothing() {
    let start = Instant::now();
    let s = run_many(0, SEEDS, threads(), 3, &|seed| run_seed(seed, None, false), &|_| {});
    // The table is for people: `make test` shows it.
    println!("{}", summary_table(&s, 0, start.elapsed()));
    assert!(s.violations.is_empty(), "{}", s.violations.iter().map(violation_rows).collect::<String>());
    assert_eq!(s.seeds, SEEDS);
    // A fault that never strikes tests nothing.
    for class in [
        "torn write (1)",
        "power cut (2, 3, 14)",
        "blocks lost or torn from a cache (1, 2, 3)",
        "lost write (2)",
        "misdirected write (4)",
        "bit rot (5)",
        "latent sector error (5)",
        "read of a latent error (5)",
        "read failed once (5)",
        "flush failed (7)",
        "write failed",
        "slow command (12)",
        "process killed (13)",
        "full drive (15)",
        "death during recovery (17)",
        "death with a flush out (23)",
        "bad span from a host (28)",
        "malformed record (29)",
        "metadata hit (29)",
    ] {
        assert!(
            s.tally.faults.get(class).is_some_and(|n| *n >= 5),
            "fault class {class:?} struck {:?} times in {SEEDS} seeds",
            s.tally.faults.get(class)
        );
    }
}

#[test]
fn same_seed_gives_the_same_trace_hash() {
    for seed in [1, 17, 99] {
        let (a, b) = (run_seed(seed, None, false), run_seed(seed, None, false));
        assert_eq!((a.hash, a.events), (b.hash, b.events), "seed {seed}");
        assert!(a.events > 100, "seed {seed} did next to nothing: {} events", a.events);
        assert_ne!(a.hash, run_seed(seed + 1, None, false).hash);
    }
}

#[test]
fn every_seeded_bug_is_caught() {
    let row = |name: &str, outcome: Option<&Outcome>, seeds| println!("{}", canary_row(name, outcome, seeds));
    let caught = run_canaries(0, CANARY_SEEDS, threads(), &canaries(), &row);
    let free: Vec<_> = caught.iter().filter(|(_, seeds)| seeds.is_none()).map(|(name, _)| name).collect();
    assert!(free.is_empty(), "not caught in {CANARY_SEEDS} seeds: {free:?}");
}
