//! `penstock-sim`: runs seeds, prints what they did and what they violated, and proves that seeded bugs are caught.
//!
//! Exit code 0 when nothing was violated and every canary was caught, 1 otherwise, 2 for a wrong command line.

#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use penstock_sim::canaries::{Bug, SEEDED};
use penstock_sim::report::{canary_rows, summary_table, violation_rows};
use penstock_sim::run::{Simulator, hunt, run_many, threads};

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
    /// After the seeds, prove that each seeded bug of what is simulated is caught.
    #[arg(long, conflicts_with_all = ["seed", "canary"])]
    canaries: bool,
    /// Most seeds that a canary may take, where its row says more.
    #[arg(long, default_value_t = 2000)]
    canary_seeds: u64,
    /// Threads; default one per core.
    #[arg(long)]
    threads: Option<usize>,
    /// Stop after so many violations.
    #[arg(long, default_value_t = 5)]
    violations: usize,
}

/// Seeds that are run twice, to show that they repeat.
const TWICE: u64 = 20;

fn main() -> ExitCode {
    let args = Args::parse();
    let simulators = match (args.all, args.cluster, args.fleet) {
        (true, ..) => Simulator::ALL.to_vec(),
        (_, true, _) => vec![Simulator::Groups],
        (_, _, true) => vec![Simulator::Fleets],
        _ => vec![Simulator::Node],
    };
    let bug = match args.canary.as_deref().map(bug_called).transpose() {
        Ok(bug) => bug,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    if let Some(seed) = args.seed {
        let outcome = simulators[0].run(seed, bug, args.trace);
        println!("seed {seed}: {} events, trace hash {:016x}", outcome.events, outcome.hash);
        print!("{}", violation_rows(&outcome));
        return if outcome.violation.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let start = Instant::now();
    let mut violations = 0;
    for simulator in &simulators {
        if simulators.len() > 1 {
            println!("== {}", simulator.title());
        }
        violations += run_seeds(&args, *simulator, bug);
    }
    let (bugs, caught) = if args.canaries { prove(&args, &simulators) } else { (0, 0) };
    if args.all {
        println!("\nviolations {violations}, canaries caught {caught}/{bugs}, {:.0} s", start.elapsed().as_secs_f64());
    }
    if violations == 0 && caught == bugs { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn bug_called(name: &str) -> Result<Bug, String> {
    let all = || SEEDED.iter().map(|seeded| seeded.bug);
    let found = all().find(|bug| bug.name().eq_ignore_ascii_case(name));
    found.ok_or_else(|| format!("no canary is called {name}; there are {:?}", all().map(Bug::name).collect::<Vec<_>>()))
}

fn run_seeds(args: &Args, simulator: Simulator, bug: Option<Bug>) -> usize {
    let start = Instant::now();
    let live = std::io::stderr().is_terminal();
    let run = |seed| simulator.run(seed, bug, false);
    let summary = run_many(args.from, args.seeds, args.threads.unwrap_or_else(threads), args.violations, &run, &|s| {
        if live && s.seeds % 5 == 0 {
            eprint!("\r{} of {} seeds, {} events, {} violations ", s.seeds, args.seeds, s.events, s.violations.len());
            let _ = std::io::stderr().flush();
        }
    });
    if live {
        eprintln!();
    }
    print!("{}", summary_table(&summary, args.from, start.elapsed()));
    // A seed that does not repeat cannot be replayed: that is a violation too.
    let few = args.seeds.min(TWICE);
    let hash = || run_many(args.from, few, args.threads.unwrap_or_else(threads), usize::MAX, &run, &|_| {}).hash;
    let (once, again) = (hash(), hash());
    let same = if once == again { "the same" } else { "NOT THE SAME" };
    println!("seeds {few} from {}, run twice: hash {once:016x} and {again:016x}, {same}", args.from);
    summary.violations.len() + usize::from(once != again)
}

/// How many seeded bugs these simulators have to see, and how many each of those that have to did.
fn prove(args: &Args, simulators: &[Simulator]) -> (usize, usize) {
    let start = Instant::now();
    println!("\nseeded bugs");
    let (mut bugs, mut caught) = (0, 0);
    for seeded in SEEDED {
        let hunts = hunt(seeded, simulators, args.from, args.canary_seeds, args.threads.unwrap_or_else(threads));
        if hunts.is_empty() {
            continue;
        }
        print!("{}", canary_rows(seeded, &hunts));
        bugs += 1;
        caught += usize::from(hunts.iter().all(|hunt| hunt.caught.is_some()));
    }
    println!("canaries caught {caught}/{bugs} in {:.1} s", start.elapsed().as_secs_f64());
    (bugs, caught)
}
