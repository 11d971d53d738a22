//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::handicap::HandicapKind;
use crate::target::Target;
use crate::units::{ByteCount, Nanos};
use crate::workload::{Access, Mix};

/// Load generator and verifier for block targets, and benchmarks of Penstock against stock SPDK.
#[derive(Debug, Parser)]
#[command(name = "penstock-perf", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run one load against one target and report it.
    Run(Box<RunArgs>),
    /// Compare a target with the journal of an earlier run: every acknowledged block, bit for bit.
    Verify(VerifyArgs),
    /// Run benchmark 4, 6, 7 or 8 against its SPDK peer, side by side; exit code 1 when a limit is missed.
    Ratio(RatioArgs),
    /// Serve turns of load to `ratio` over standard input and output.
    #[command(hide = true)]
    Agent(AgentArgs),
}

#[derive(Debug, Args)]
pub struct RatioArgs {
    /// 1: cost of a write with three replicas. 2: its latency. 3: with one of them slow. 4: oplog append bandwidth. 6: cost of a volume over its
    /// device. 7: front doors. 8: scaling to two cores. 9: gap while a leader is lost.
    pub number: u32,
    /// Pairs of turns that must be left in each comparison.
    #[arg(long, default_value_t = 12, value_name = "N", value_parser = clap::value_parser!(u16).range(3..=1000))]
    pub pairs: u16,
    /// Pairs of each negative control.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u16).range(3..=1000))]
    pub control_pairs: u16,
    /// Only comparisons whose name holds this.
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
    /// Leave out the negative controls.
    #[arg(long)]
    pub no_control: bool,
    /// Where large files go (benchmark 4's uring device).
    #[arg(long, value_name = "DIRECTORY")]
    pub scratch: Option<PathBuf>,
    /// Run all processes on hugepages; the vhost comparison needs it.
    #[arg(long)]
    pub hugepages: bool,
    /// Keep turns in which others used up to this many per cent of the machine. Above 1 the figures are for orientation only and
    /// nothing passes.
    #[arg(long, default_value_t = 1.0, value_name = "PERCENT")]
    pub foreign_max: f64,
    /// Write all pairs as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Seed of places and resamples.
    #[arg(long, default_value = "1", value_parser = parse_seed, value_name = "SEED")]
    pub seed: u64,
}

#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Cores, the first of which answers calls.
    #[arg(long, value_delimiter = ',', required = true)]
    pub cores: Vec<u32>,
    #[arg(long)]
    pub mem_mib: u32,
    #[arg(long)]
    pub hugepages: bool,
    /// Run a node in this process too, with its sockets and state in this directory.
    #[arg(long)]
    pub node: Option<PathBuf>,
    /// Where other nodes reach that node.
    #[arg(long, requires_all = ["node", "cluster_key_file"])]
    pub peer_listen: Option<SocketAddr>,
    /// What the nodes share.
    #[arg(long)]
    pub cluster_key_file: Option<PathBuf>,
    /// Sleep between events in place of polling.
    #[arg(long)]
    pub sleep: bool,
}

/// How SPDK runs in this process.
#[derive(Debug, Args)]
pub struct HostArgs {
    /// Core that generates the load.
    #[arg(long, value_name = "N")]
    pub core: Option<u32>,
    /// Memory of this process in MiB; without hugepages a hard limit.
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    pub mem_mib: u32,
    /// Use hugepages (needed for vhost targets).
    #[arg(long)]
    pub hugepages: bool,
    /// SPDK JSON configuration for `bdev:NAME` targets.
    #[arg(long, value_name = "FILE")]
    pub bdev_json: Option<PathBuf>,
    /// Block size of malloc: and null: targets.
    #[arg(long, default_value_t = 4096, value_name = "BYTES")]
    pub block_bytes: u32,
    /// Show SPDK's notices.
    #[arg(short, long)]
    pub verbose: bool,
    /// No live line.
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnError {
    /// The first failed operation ends the run.
    Stop,
    /// Failed operations are counted and the run goes on.
    Continue,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ZeroOrAny {
    Zero,
    Any,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// nvmf:tcp:ADDRESS:PORT:NQN, vhost:SOCKET, vfio-user:DIRECTORY, bdev:NAME, volume:NAME@DRIVE (one of ours, in process), volume:SIZE@DRIVE
    /// (a new one on a blank drive), malloc:SIZE or null:SIZE.
    #[arg(short, long)]
    pub target: Target,
    /// NVMe/TCP: a further address of the same subsystem; repeat for each. What a path refuses, or does not answer, goes to the next, over
    /// plain sockets instead of SPDK's initiator; the report has the longest gap in completions.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub path: Vec<SocketAddr>,
    /// With --path: give a path up that has not answered a command for this long.
    #[arg(long, default_value = "1s", value_name = "TIME")]
    pub path_timeout: Nanos,
    /// Bytes of one operation.
    #[arg(short, long, default_value = "4KiB", value_name = "SIZE")]
    pub block_size: ByteCount,
    /// read, write, trim, or shares in per cent as READ:WRITE:TRIM.
    #[arg(short, long, default_value = "70:30")]
    pub mix: Mix,
    /// random, sequential, or zipf:EXPONENT.
    #[arg(short, long, default_value = "random")]
    pub access: Access,
    /// Operations at a time.
    #[arg(short = 'd', long, default_value_t = 32, value_name = "N")]
    pub depth: u32,
    /// Open loop: operations a second, started on schedule whatever the target does. Latencies count from the schedule.
    #[arg(short, long, value_name = "PER_SECOND")]
    pub rate: Option<f64>,
    /// With --rate: exponential gaps instead of equal ones.
    #[arg(long, requires = "rate")]
    pub poisson: bool,
    /// First byte of the range to use.
    #[arg(long, default_value = "0", value_name = "SIZE")]
    pub offset: ByteCount,
    /// Length of the range to use; to the end of the device if not given.
    #[arg(long, value_name = "SIZE")]
    pub length: Option<ByteCount>,
    /// How long to measure [default: 10s, or until --operations are done].
    #[arg(long, value_name = "TIME")]
    pub duration: Option<Nanos>,
    /// How many operations to measure.
    #[arg(long, value_name = "N")]
    pub operations: Option<u64>,
    /// Run this long before measuring.
    #[arg(long, default_value = "0s", value_name = "TIME")]
    pub warmup: Nanos,
    /// Seed of everything that is drawn; a fresh one is printed if not given.
    #[arg(long, value_parser = parse_seed, value_name = "SEED")]
    pub seed: Option<u64>,
    /// Write blocks that describe themselves, check every read, and read all back in the end.
    #[arg(long)]
    pub verify: bool,
    /// As --verify, and keep a journal of what was issued and acknowledged, for `penstock-perf verify`.
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// Go on with an existing journal: what it promises is checked too.
    #[arg(long, requires = "journal")]
    pub resume: bool,
    /// Leave out the final read of all touched blocks.
    #[arg(long)]
    pub no_final_pass: bool,
    /// What blocks hold before this run: zero (a fresh thin volume) or any.
    #[arg(long, value_enum, default_value = "any")]
    pub initial: ZeroOrAny,
    /// What trimmed blocks read as.
    #[arg(long, value_enum, default_value = "zero")]
    pub trim_reads: ZeroOrAny,
    #[arg(long, value_enum, default_value = "stop")]
    pub on_error: OnError,
    /// The target counts as dead after this long without any completion; the run then ends with its report and journal.
    #[arg(long, value_name = "TIME")]
    pub dead_after: Option<Nanos>,
    /// NVMe-oF: keep reconnecting this long; I/O waits meanwhile and does not fail.
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub reconnect: u32,
    /// NVMe-oF: fail I/O after this long without a connection (0: not before --reconnect).
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    pub fail_io_after: u32,
    /// Write the report as JSON (`-`: to standard output instead of the text).
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the percentile distribution in HdrHistogram's format.
    #[arg(long, value_name = "FILE")]
    pub hgrm: Option<PathBuf>,
    /// Write the report as one self-contained HTML page with the percentile curve.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Extra work per operation; the negative control of benchmarks.
    #[arg(long, hide = true, default_value = "none", env = "PENSTOCK_PERF_HANDICAP")]
    pub handicap: HandicapKind,
    #[command(flatten)]
    pub host: HostArgs,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The target, as for `run`.
    #[arg(short, long)]
    pub target: Target,
    /// NVMe/TCP: a further address of the same subsystem; repeat for each. What a path refuses, or does not answer, goes to the next, over
    /// plain sockets instead of SPDK's initiator; the report has the longest gap in completions.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub path: Vec<SocketAddr>,
    /// With --path: give a path up that has not answered a command for this long.
    #[arg(long, default_value = "1s", value_name = "TIME")]
    pub path_timeout: Nanos,
    /// The journal that `run --journal` kept.
    #[arg(long, value_name = "FILE")]
    pub journal: PathBuf,
    /// Write the result as JSON (`-`: to standard output instead of the text).
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub host: HostArgs,
}

/// Decimal, or hexadecimal as reports print it.
fn parse_seed(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| format!("{error}; a seed is a number below 2^64, decimal or 0x…"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_with_sizes_times_and_mix_parses() {
        let line = "penstock-perf run -t malloc:64MiB -b 64k -m 0:90:10 -a zipf:1.1 -d 8 --rate 5000 --duration 2s --seed 0x2a";
        let Command::Run(args) = Cli::try_parse_from(line.split(' ')).unwrap().command else { panic!("not run") };
        assert_eq!((args.block_size, args.seed, args.duration), (ByteCount(65536), Some(42), Some(Nanos(2_000_000_000))));
        assert_eq!(args.mix, Mix { read: 0, write: 90, trim: 10 });
    }

    #[test]
    fn run_with_a_bad_size_says_what_would_be_right() {
        let error = Cli::try_parse_from(["penstock-perf", "run", "-t", "malloc:1GiB", "-b", "big"]).unwrap_err();
        assert!(error.to_string().contains("4KiB"), "{error}");
    }
}
