//! `penstock-sim`: runs seeds, prints what they did and what they violated, and proves that seeded bugs are caught.
//!
//! Exit code 0 when nothing was violated and every canary was caught, 1 otherwise, 2 for a wrong command line.

#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use penstock_engine::Canary;
use penstock_sim::cluster::{self, Bug};
use penstock_sim::report::{canary_row, summary_table, violation_rows};
use penstock_sim::run::{catch_quietly, run_canaries, run_many, run_seed};

/// Runs the data plane's engine over simulated, faulty drives.
#[derive(Parser)]
#[command(name = "penstock-sim", version)]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 500, conflicts_with = "seed")]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0, conflicts_with = "seed")]
    from: u64,
    /// Run this one seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Groups of several nodes instead of one node's store (with --seed).
    #[arg(long, requires = "seed")]
    cluster: bool,
    /// Print every event (with --seed).
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Run with this seeded bug.
    #[arg(long)]
    canary: Option<String>,
    /// After the seeds, prove that each seeded bug is caught.
    #[arg(long, conflicts_with_all = ["seed", "canary"])]
    canaries: bool,
    /// Most seeds that a canary may take.
    #[arg(long, default_value_t = 100)]
    canary_seeds: u64,
    /// Threads; default one per core.
    #[arg(long)]
    threads: Option<usize>,
    /// Stop after so many violations.
    #[arg(long, default_value_t = 5)]
    violations: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    catch_quietly();
    if let Some(seed) = args.seed.filter(|_| args.cluster) {
        return run_cluster(seed, args.canary.as_deref(), args.trace);
    }
    let canary = match args.canary.as_deref().map(canary_named).transpose() {
        Ok(canary) => canary,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    if let Some(seed) = args.seed {
        let outcome = run_seed(seed, canary, args.trace);
        println!("seed {seed}: {} events, trace hash {:016x}", outcome.events, outcome.hash);
        print!("{}", violation_rows(&outcome));
        return if outcome.violation.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let start = Instant::now();
    let live = std::io::stderr().is_terminal();
    let summary = run_many(args.from, args.seeds, threads, canary, args.violations, &|s| {
        if live && s.seeds % 5 == 0 {
            eprint!("\r{} of {} seeds, {} events, {} violations ", s.seeds, args.seeds, s.events, s.violations.len());
            let _ = std::io::stderr().flush();
        }
    });
    if live {
        eprintln!();
    }
    print!("{}", summary_table(&summary, args.from, start.elapsed()));
    let mut fine = summary.violations.is_empty();
    if args.canaries {
        let start = Instant::now();
        println!("\nseeded bugs");
        let caught = run_canaries(args.from, args.canary_seeds, threads, &|canary, outcome, seeds| {
            println!("{}", canary_row(canary, outcome, seeds));
        });
        let (n, k) = (caught.len(), caught.values().flatten().count());
        println!("canaries caught {k}/{n} in {:.1} s", start.elapsed().as_secs_f64());
        fine &= k == n;
    }
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_cluster(seed: u64, bug: Option<&str>, trace: bool) -> ExitCode {
    let bug = match bug.map(|name| Bug::ALL.into_iter().find(|bug| bug.name().eq_ignore_ascii_case(name)).ok_or(name)).transpose() {
        Ok(bug) => bug,
        Err(name) => {
            eprintln!("no seeded bug of clusters is called {name}; there are {:?}", Bug::ALL.map(Bug::name));
            return ExitCode::from(2);
        }
    };
    let outcome = cluster::run_seed(seed, bug, trace);
    println!("seed {seed}: {} events, trace hash {:016x}", outcome.events, outcome.hash);
    if let Some(text) = &outcome.violation {
        println!("VIOLATION, seed {seed}: {text}");
    }
    if outcome.violation.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn canary_named(name: &str) -> Result<Canary, String> {
    Canary::ALL
        .into_iter()
        .find(|c| format!("{c:?}").eq_ignore_ascii_case(name))
        .ok_or_else(|| format!("no canary is called {name}; there are {:?}", Canary::ALL))
}
