//! The simulators' own acceptance: seeds run clean, the same seed runs the same, faults strike, and seeded bugs are caught.

#![forbid(unsafe_code)]

use std::time::Instant;

use penstock_sim::canaries::SEEDED;
use penstock_sim::report::{canary_rows, summary_table, violation_rows};
use penstock_sim::run::Simulator::{self, Fleets, Groups, Node};
use penstock_sim::run::{hunt, run_many, threads};
use penstock_sim::tally::Tally;

/// Seeded bugs that their rows give more seeds than this are `make sim`'s.
const QUICK: u64 = 300;

/// What `seeds` seeds did, none of which violated anything. The table is for people: `make test` shows it.
fn clean(simulator: Simulator, seeds: u64) -> Tally {
    let start = Instant::now();
    let s = run_many(0, seeds, threads(), 3, &|seed| simulator.run(seed, None, false), &|_| {});
    println!("{}", summary_table(&s, 0, start.elapsed()));
    assert!(s.violations.is_empty(), "{}", s.violations.iter().map(violation_rows).collect::<String>());
    assert_eq!(s.seeds, seeds);
    s.tally
}

/// A fault that never strikes tests nothing.
fn struck(tally: &Tally, classes: &[&str]) {
    for class in classes {
        let count = tally.faults.get(class);
        assert!(count.is_some_and(|n| *n >= 5), "fault class {class:?} struck {count:?} times");
    }
}

fn repeats(simulator: Simulator, least: u64) {
    for seed in [1, 17, 99] {
        let run = |seed| simulator.run(seed, None, false);
        let (a, b) = (run(seed), run(seed));
        assert_eq!((a.hash, a.events), (b.hash, b.events), "seed {seed}");
        assert!(a.events > least, "seed {seed} did next to nothing: {} events", a.events);
        assert_ne!(a.hash, run(seed + 1).hash);
    }
}

fn catches(simulator: Simulator) {
    let mut free = Vec::new();
    let quick = |by: &[(Simulator, u64)]| by.iter().any(|(of, within)| *of == simulator && *within <= QUICK);
    for seeded in SEEDED.iter().filter(|seeded| quick(seeded.by)) {
        let hunts = hunt(seeded, &[simulator], 0, QUICK, threads());
        println!("{}", canary_rows(seeded, &hunts));
        assert_eq!(hunts.len(), 1);
        free.extend(hunts.iter().filter(|hunt| hunt.caught.is_none()).map(|_| seeded.bug));
    }
    assert!(free.is_empty(), "not caught in {}: {free:?}", simulator.title());
}

#[test]
fn five_hundred_seeds_of_one_node_violate_nothing() {
    let tally = clean(Node, 500);
    let classes = [
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
    ];
    struck(&tally, &classes);
}

#[test]
fn a_thousand_seeds_of_groups_violate_nothing() {
    let tally = clean(Groups, 1000);
    for (rows, least) in [(&tally.faults, 21), (&tally.checks, 10), (&tally.work, 9)] {
        assert!(rows.len() >= least && rows.values().all(|n| *n >= 20), "something hardly ever happens: {rows:#?}");
    }
}

#[test]
fn three_hundred_seeds_of_fleets_violate_nothing() {
    let tally = clean(Fleets, 300);
    assert!(tally.work["leaders that stepped aside"] >= 5, "{:#?}", tally.work);
    for (rows, least) in [(&tally.faults, 24), (&tally.checks, 20), (&tally.work, 16)] {
        let usual = rows.values().filter(|n| **n >= 5).count();
        assert!(usual >= least, "something hardly ever happens: {rows:#?}");
    }
}

#[test]
fn same_seed_of_one_node_gives_the_same_trace_hash() {
    repeats(Node, 100);
}

#[test]
fn same_seed_of_groups_gives_the_same_trace_hash() {
    repeats(Groups, 1000);
}

#[test]
fn same_seed_of_a_fleet_gives_the_same_trace_hash() {
    repeats(Fleets, 1000);
}

#[test]
fn seeded_bugs_are_caught_by_one_node() {
    catches(Node);
}

#[test]
fn seeded_bugs_are_caught_by_groups() {
    catches(Groups);
}

#[test]
fn seeded_bugs_are_caught_by_fleets() {
    catches(Fleets);
}
