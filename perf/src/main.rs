//! The command `penstock-perf`: arguments in, files and exit codes out.
//!
//! Exit codes: 0 all well; 1 a check, an operation or a benchmark failed; 2 it could not be run as asked.
#![forbid(unsafe_code)]

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;

use penstock_perf::agent;
use penstock_perf::args::{AgentArgs, Cli, Command, HostArgs, OnError, RatioArgs, RunArgs, VerifyArgs, ZeroOrAny};
use penstock_perf::expect::{Initial, TrimReads};
use penstock_perf::host::{self, HostError, HostOptions, NodeOptions};
use penstock_perf::html;
use penstock_perf::pace::{Pace, fresh_seed};
use penstock_perf::paths::PathsOptions;
use penstock_perf::ratio::{self, RatioOptions};
use penstock_perf::report::{Report, verify_text};
use penstock_perf::run::{End, RunOptions, VERIFY_PLACES, VerifyOptions, VerifyOutcome, run, run_over, verify, verify_over};
use penstock_perf::scratch;
use penstock_perf::session::Ending;
use penstock_perf::target::{Reconnect, Target};
use penstock_perf::units::{ByteOffset, Nanos};
use penstock_perf::workload::Workload;

const DEFAULT_DURATION: Nanos = Nanos(10_000_000_000);

/// Buffers of a node in an agent, for each core.
const NODE_BUFFER_MIB: u32 = 256;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Run(args) => command_run(&args),
        Command::Verify(args) => command_verify(&args),
        Command::Ratio(args) => command_ratio(&args),
        Command::Agent(args) => command_agent(&args),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("penstock-perf: {error}");
            ExitCode::from(2)
        }
    }
}

fn host_options(args: &HostArgs, target: &Target) -> Result<HostOptions, Failure> {
    if target.needs_hugepages() && !args.hugepages {
        return Err(HostError::Hugepages(target.to_string()).into());
    }
    let core = args.core.unwrap_or_else(|| u32::from(std::thread::available_parallelism().is_ok_and(|cores| cores.get() > 1)));
    let json_config = args.bdev_json.as_ref().map(|path| std::fs::read(path).map_err(|error| format!("{}: {error}", path.display())));
    Ok(HostOptions {
        core_mask: format!("[{core}]"),
        hugepages: args.hugepages,
        mem_mib: args.mem_mib,
        json_config: json_config.transpose()?,
        is_verbose: args.verbose,
        sleeps: false,
        node: matches!(target, Target::Volume { .. }).then(|| node_options(args, core)).transpose()?,
    })
}

/// A node of this process alone, on the load's core.
fn node_options(args: &HostArgs, core: u32) -> Result<NodeOptions, Failure> {
    let directory = scratch::directory(&std::env::temp_dir(), "penstock-perf-node")?;
    let buffer_mib = args.mem_mib.saturating_sub(host::SPDK_POOLS_MIB) / 2;
    Ok(NodeOptions { directory, is_scratch: true, cores: vec![core], buffer_mib, peers: None, sleeps: false })
}

fn run_options(args: &RunArgs) -> RunOptions {
    let duration = args.duration.or_else(|| args.operations.is_none().then_some(DEFAULT_DURATION));
    let verify = (args.verify || args.journal.is_some()).then(|| VerifyOptions {
        journal: args.journal.clone(),
        is_resumed: args.resume,
        initial: if args.initial == ZeroOrAny::Zero { Initial::Zero } else { Initial::Unknown },
        trim_reads: if args.trim_reads == ZeroOrAny::Zero { TrimReads::Zero } else { TrimReads::Unknown },
        final_pass: !args.no_final_pass,
    });
    RunOptions {
        target: args.target.clone(),
        reconnect: Reconnect { keep_trying_s: args.reconnect, delay_s: 1, fail_io_after_s: args.fail_io_after },
        workload: Workload {
            seed: args.seed.unwrap_or_else(fresh_seed),
            block_size: args.block_size,
            mix: args.mix,
            access: args.access,
            depth: args.depth,
            range_offset: ByteOffset(args.offset.0),
            range_length: args.length,
        },
        pace: match args.rate {
            None => Pace::Closed,
            Some(rate) if args.poisson => Pace::Poisson(rate),
            Some(rate) => Pace::Fixed(rate),
        },
        ending: Ending { warmup: args.warmup, duration, operations: args.operations, stop_on_error: args.on_error == OnError::Stop },
        dead_after: args.dead_after,
        verify,
        handicap: args.handicap,
        block_bytes: args.host.block_bytes,
        is_quiet: args.host.quiet,
    }
}

fn interruption() -> Result<Arc<AtomicBool>, Failure> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    Ok(interrupted)
}

/// Ends without SPDK's shutdown: the target may hold I/O that never ends, and SPDK would wait for it.
fn leave(is_failed: bool) -> ! {
    let _ = std::io::stdout().flush();
    spdk_rs::app::exit_now(i32::from(is_failed))
}

fn write_out(path: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn command_run(args: &RunArgs) -> Result<bool, Failure> {
    if args.rate.is_some_and(|rate| !(rate > 0.0 && rate <= 1e8)) {
        return Err(
            format!("--rate {} is out of range: use more than 0 and at most 1e8 operations a second", args.rate.unwrap_or(0.0)).into()
        );
    }
    let options = run_options(args);
    let interrupted = interruption()?;
    let files = (args.json.clone(), args.hgrm.clone(), args.html.clone());
    if !args.path.is_empty() {
        let paths = paths_options(&args.target, &args.path, args.path_timeout, options.workload.depth.max(VERIFY_PLACES))?;
        let outcome = run_over(paths, &options, &interrupted)?;
        let is_good = publish(&outcome.report, outcome.end, &files)?;
        return Ok(is_good && outcome.end != End::TargetDead);
    }
    let host_options = host_options(&args.host, &args.target)?;
    let has_node = host_options.node.is_some();
    host::run(&host_options, move |host| {
        let outcome = run(host, &options, &interrupted)?;
        let is_good = publish(&outcome.report, outcome.end, &files)?;
        // A node of this process always comes to an end, and is to drain.
        if !has_node && (outcome.end != End::Whole || !is_good) {
            leave(!is_good || outcome.end == End::TargetDead);
        }
        Ok(is_good)
    })?
}

/// Places of a queue over paths: their commands' numbers are those of its tags.
const PATHS_DEPTH_MAX: u32 = 127;

fn paths_options(target: &Target, more: &[SocketAddr], silence: Nanos, depth: u32) -> Result<PathsOptions, Failure> {
    let Target::NvmfTcp { address, port, nqn } = target else {
        return Err(format!("--path is for nvmf:tcp targets, not for {target}").into());
    };
    let first: std::net::IpAddr = address.parse().map_err(|_| format!("--path needs the target's address as numbers, not {address}"))?;
    if nqn.len() > 223 {
        return Err(format!("the NQN has {} bytes, the most is 223", nqn.len()).into());
    }
    if depth > PATHS_DEPTH_MAX {
        return Err(format!("--depth {depth} is too much for --path: at most {PATHS_DEPTH_MAX}").into());
    }
    let mut addresses = vec![SocketAddr::new(first, *port)];
    for path in more {
        // The target's own again: sockets are wanted, and one path.
        if !addresses.contains(path) {
            addresses.push(*path);
        }
    }
    Ok(PathsOptions { addresses, nqn: nqn.clone(), depth, silence })
}

type Files = (Option<std::path::PathBuf>, Option<std::path::PathBuf>, Option<std::path::PathBuf>);

fn publish(report: &Report, end: End, (json, hgrm, page): &Files) -> Result<bool, Failure> {
    let is_json_shown = json.as_deref() == Some(Path::new("-"));
    if is_json_shown {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        print!("{}", report.text());
        if let Some(path) = json {
            write_out(path, &serde_json::to_string_pretty(report)?)?;
        }
    }
    if let Some(path) = hgrm {
        write_out(path, &report.hgrm())?;
    }
    if let Some(path) = page {
        write_out(path, &html::page(report))?;
    }
    match end {
        End::Whole => {}
        End::Interrupted => eprintln!("interrupted; the figures are of the time until then"),
        End::TargetDead => {
            eprintln!("the target died; what was outstanding is in doubt. Next: restart it, then penstock-perf verify --journal")
        }
    }
    Ok(report.is_good())
}

fn command_verify(args: &VerifyArgs) -> Result<bool, Failure> {
    let interrupted = interruption()?;
    let (target, journal, json) = (args.target.clone(), args.journal.clone(), args.json.clone());
    let (block_bytes, is_quiet) = (args.host.block_bytes, args.host.quiet);
    if !args.path.is_empty() {
        let paths = paths_options(&target, &args.path, args.path_timeout, VERIFY_PLACES)?;
        return publish_verified(&verify_over(paths, &journal, is_quiet, &interrupted)?, json.as_deref());
    }
    let host_options = host_options(&args.host, &args.target)?;
    host::run(&host_options, move |host| -> Result<bool, Failure> {
        let outcome = verify(host, &target, &journal, block_bytes, is_quiet, &interrupted)?;
        let is_good = publish_verified(&outcome, json.as_deref())?;
        if outcome.report.unreadable > 0 {
            leave(true);
        }
        Ok(is_good)
    })?
}

fn publish_verified(outcome: &VerifyOutcome, json: Option<&Path>) -> Result<bool, Failure> {
    let encoded = serde_json::to_string_pretty(&outcome.report)?;
    match json {
        Some(path) if path == Path::new("-") => println!("{encoded}"),
        other => {
            if let Some(path) = other {
                write_out(path, &encoded)?;
            }
            let end = if outcome.is_clean { "" } else { " (its writer was killed)" };
            println!("journal{end}: {} mutations acknowledged, {} in doubt", outcome.acknowledged, outcome.in_doubt);
            print!("{}", verify_text(&outcome.report));
            println!("in {:.2} s", outcome.span.as_secs_f64());
        }
    }
    Ok(outcome.report.is_good())
}

fn command_ratio(args: &RatioArgs) -> Result<bool, Failure> {
    let options = RatioOptions {
        pairs: args.pairs.into(),
        control_pairs: args.control_pairs.into(),
        only: args.only.clone(),
        is_without_control: args.no_control,
        scratch: args.scratch.clone(),
        hugepages: args.hugepages,
        seed: args.seed,
        foreign_max: args.foreign_max / 100.0,
    };
    let outcomes = ratio::run(args.number, &options)?;
    println!("\n{}", ratio::table(&outcomes));
    if let Some(path) = &args.json {
        write_out(path, &serde_json::to_string_pretty(&outcomes)?)?;
    }
    if outcomes.is_empty() {
        return Err("no comparison was run; see --only and what was said above".into());
    }
    Ok(outcomes.iter().all(ratio::Outcome::is_good))
}

fn command_agent(args: &AgentArgs) -> Result<bool, Failure> {
    let cores = args.cores.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let options = HostOptions {
        core_mask: format!("[{cores}]"),
        hugepages: args.hugepages,
        mem_mib: args.mem_mib,
        json_config: None,
        is_verbose: false,
        sleeps: args.sleep,
        node: args.node.clone().map(|directory| NodeOptions {
            directory,
            is_scratch: false,
            cores: args.cores.clone(),
            buffer_mib: NODE_BUFFER_MIB * args.cores.len() as u32,
            peers: args.peer_listen.zip(args.cluster_key_file.clone()),
            sleeps: args.sleep,
        }),
    };
    host::run(&options, |host| {
        let served = agent::serve(host, std::io::stdin().lock(), std::io::stdout().lock());
        // Whoever gave the orders is gone, and with it any interest in a clean end.
        spdk_rs::app::exit_now(i32::from(served.is_err()))
    })?
}
