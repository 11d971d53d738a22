//! `penstock-sim`: runs seeds, prints what they did and what they violated, and proves that seeded bugs are caught.
//!
//! Exit code 0 when nothing was violated and every canary was caught, 1 otherwise, 2 for a wrong command line.

#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use penstock_engine::Canary;
use penstock_sim::report::{canary_row, summary_table, violation_rows};
use penstock_sim::run::{self, Outcome, Seeded, catch_quietly, run_canaries, run_many, run_seed};
use penstock_sim::{cluster, fleet};

/// Runs the data plane's engine over simulated, faulty drives and networks.
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
    /// Groups of several nodes, without stores, instead of one node's store.
    #[arg(long)]
    cluster: bool,
    /// Fleets of whole nodes instead of one node's store.
    #[arg(long, conflicts_with = "cluster")]
    fleet: bool,
    /// One node's stores, groups and fleets, one after the other.
    #[arg(long, conflicts_with_all = ["seed", "cluster", "fleet", "canary"])]
    all: bool,
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
    #[arg(long, default_value_t = 2000)]
    canary_seeds: u64,
    /// Threads; default one per core.
    #[arg(long)]
    threads: Option<usize>,
    /// Stop after so many violations.
    #[arg(long, default_value_t = 5)]
    violations: usize,
}

/// What is simulated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Node,
    Groups,
    Fleets,
}

impl What {
    fn title(self) -> &'static str {
        match self {
            What::Node => "one node's stores",
            What::Groups => "groups of several nodes",
            What::Fleets => "fleets of whole nodes",
        }
    }

    fn canaries(self) -> Vec<Seeded> {
        match self {
            What::Node => run::canaries(),
            What::Groups => cluster::canaries(),
            What::Fleets => fleet::canaries(),
        }
    }

    /// Runs a seed, with the seeded bug of that name.
    fn run(self, seed: u64, bug: Option<&str>, trace: bool) -> Outcome {
        fn of<T: Copy>(all: &[T], name: impl Fn(T) -> String, bug: Option<&str>) -> Option<T> {
            all.iter().copied().find(|each| bug.is_some_and(|bug| name(*each).eq_ignore_ascii_case(bug)))
        }
        match self {
            What::Node => run_seed(seed, of(&Canary::ALL, |c| format!("{c:?}"), bug), trace),
            What::Groups => cluster::run_seed(seed, of(&cluster::Bug::ALL, cluster::Bug::name, bug), trace),
            What::Fleets => fleet::run_seed(seed, of(&fleet::Bug::ALL, fleet::Bug::name, bug), trace),
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    catch_quietly();
    let whats = match (args.all, args.cluster, args.fleet) {
        (true, ..) => vec![What::Node, What::Groups, What::Fleets],
        (_, true, _) => vec![What::Groups],
        (_, _, true) => vec![What::Fleets],
        _ => vec![What::Node],
    };
    if let Some(name) = &args.canary {
        let known: Vec<String> = whats[0].canaries().into_iter().map(|(name, _)| name).collect();
        if !known.iter().any(|each| each.eq_ignore_ascii_case(name)) {
            eprintln!("no canary of {} is called {name}; there are {known:?}", whats[0].title());
            return ExitCode::from(2);
        }
    }
    if let Some(seed) = args.seed {
        let outcome = whats[0].run(seed, args.canary.as_deref(), args.trace);
        println!("seed {seed}: {} events, trace hash {:016x}", outcome.events, outcome.hash);
        print!("{}", violation_rows(&outcome));
        return if outcome.violation.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let (mut violations, mut bugs, mut caught) = (0, 0, 0);
    for what in &whats {
        if whats.len() > 1 {
            println!("== {}", what.title());
        }
        violations += run_seeds(&args, *what);
        if args.canaries {
            let (n, k) = prove(&args, *what);
            (bugs, caught) = (bugs + n, caught + k);
        }
    }
    if args.all {
        println!("\nviolations {violations}, canaries caught {caught}/{bugs}");
    }
    if violations == 0 && caught == bugs { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn threads(args: &Args) -> usize {
    args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
}

fn run_seeds(args: &Args, what: What) -> usize {
    let start = Instant::now();
    let live = std::io::stderr().is_terminal();
    let bug = args.canary.as_deref();
    let summary = run_many(args.from, args.seeds, threads(args), args.violations, &|seed| what.run(seed, bug, false), &|s| {
        if live && s.seeds % 5 == 0 {
            eprint!("\r{} of {} seeds, {} events, {} violations ", s.seeds, args.seeds, s.events, s.violations.len());
            let _ = std::io::stderr().flush();
        }
    });
    if live {
        eprintln!();
    }
    print!("{}", summary_table(&summary, args.from, start.elapsed()));
    summary.violations.len()
}

/// How many seeded bugs there are, and how many were caught.
fn prove(args: &Args, what: What) -> (usize, usize) {
    let start = Instant::now();
    println!("\nseeded bugs in {}", what.title());
    let row = |name: &str, outcome: Option<&Outcome>, seeds| println!("{}", canary_row(name, outcome, seeds));
    let caught = run_canaries(args.from, args.canary_seeds, threads(args), &what.canaries(), &row);
    let (n, k) = (caught.len(), caught.values().flatten().count());
    println!("canaries caught {k}/{n} in {:.1} s", start.elapsed().as_secs_f64());
    (n, k)
}
