//! Command line flags; each overrides the file's setting of the same name.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use penstock_api::DriveSpec;
use penstock_api::rpc::PeerAddress;

use super::{
    CORES_RIGHT, Config, ConfigError, LogFormat, LogLevel, Place, Poll, check_dir, check_mem, check_run_dir, parse_cores, parse_peer,
};
use crate::peer::key::ClusterKey;

const EXAMPLES: &str = "Examples:
  A laptop without hugepages, sleeping when idle:
    penstockd --no-huge --poll adaptive --run-dir /tmp/p/run --state-dir /tmp/p/state
  A host with two dedicated cores and a config file:
    penstockd --config /etc/penstock/penstockd.toml --cores 2,3
  Is the config right?
    penstockd --config /etc/penstock/penstockd.toml --check-config

Drives and volumes are added at run time: see `penstock pool add --help`.
SIGTERM answers what is held, drains and leaves; a second SIGTERM leaves at once.";

/// The data plane of a Penstock node: serves volumes over NVMe/TCP, vhost-user-blk and vfio-user.
#[derive(Debug, Default, Clone, Parser)]
#[command(name = "penstockd", version, after_help = EXAMPLES)]
pub struct Flags {
    /// Config file (TOML). Flags override what it says
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory for sockets, created with mode 0700 [default: /run/penstock]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Directory for what the node remembers: drives, exports, fences [default: /var/lib/penstock]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Cores to run on: a mask (0x3) or a list (0,1 or 0-3) [default: 0]
    #[arg(long, value_name = "CORES")]
    pub cores: Option<String>,
    /// Run without hugepages. Excludes NVMe drives on uio_pci_generic
    #[arg(long)]
    pub no_huge: bool,
    /// Memory for SPDK in MiB; with --no-huge a hard cap [default: 640 with --no-huge]
    #[arg(long, value_name = "MIB")]
    pub mem_mib: Option<u32>,
    /// How cores wait: busy spins, adaptive sleeps when idle [default: busy]
    #[arg(long, value_enum)]
    pub poll: Option<Poll>,
    /// Address and port that NVMe/TCP listens on from the start; may be given several times
    #[arg(long, value_name = "ADDR:PORT")]
    pub nvmf_listen: Vec<SocketAddr>,
    /// Address and port where other nodes reach this one; each core but the first takes the next port. Needs --cluster-key-file
    #[arg(long, value_name = "ADDR:PORT")]
    pub peer_listen: Option<SocketAddr>,
    /// Another node and where it is reached, beside those that control names; may be given several times
    #[arg(long = "peer", value_name = "NODE=ADDR:PORT", value_parser = parse_peer)]
    pub peers: Vec<PeerAddress>,
    /// File with the key that the nodes of a cluster share: 32 bytes or more, or twice as many hexadecimal digits
    #[arg(long, value_name = "FILE")]
    pub cluster_key_file: Option<PathBuf>,
    /// Drive to open at the start; it must carry a label. May be given several times
    #[arg(long = "drive", value_name = "SPEC")]
    pub drives: Vec<DriveSpec>,
    /// [default: info]
    #[arg(long, value_enum)]
    pub log_level: Option<LogLevel>,
    /// [default: text]
    #[arg(long, value_enum)]
    pub log_format: Option<LogFormat>,
    /// Seconds that SIGTERM may take to answer what is held and to drain [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub stop_timeout_s: Option<u32>,
    /// Stop as soon as all drives named at the start are drained
    #[arg(long)]
    pub exit_after_drain: bool,
    /// Check flags and config file, print the settings, and leave
    #[arg(long)]
    pub check_config: bool,
    /// A seeded bug to run with, as count-before-barrier: this build is for tests that must fail
    #[cfg(feature = "canary")]
    #[arg(long, value_name = "NAME", value_parser = parse_canary)]
    pub canary: Option<penstock_engine::Canary>,
}

#[cfg(feature = "canary")]
fn parse_canary(name: &str) -> Result<penstock_engine::Canary, String> {
    use penstock_engine::Canary;
    let mut all = Canary::ALL.into_iter().chain([Canary::PanicOnWrite]);
    let found = all.find(|canary| format!("{canary:?}").eq_ignore_ascii_case(&name.replace('-', "")));
    found.ok_or_else(|| format!("no such bug; there are {:?} and {:?}", Canary::ALL, Canary::PanicOnWrite))
}

pub(super) fn apply(config: &mut Config, flags: &Flags) -> Result<(), ConfigError> {
    let wrong = |flag, what, right| ConfigError::Wrong { place: Place::Flag(flag), what, right };
    if let Some(dir) = &flags.run_dir {
        config.run_dir = check_run_dir(dir).map_err(|(what, right)| wrong("--run-dir", what, right))?;
    }
    if let Some(dir) = &flags.state_dir {
        config.state_dir = check_dir(dir).map_err(|(what, right)| wrong("--state-dir", what, right))?;
    }
    if let Some(cores) = &flags.cores {
        config.cores = parse_cores(cores).map_err(|what| wrong("--cores", what, CORES_RIGHT.to_owned()))?;
    }
    if let Some(mem) = flags.mem_mib {
        config.mem_mib = Some(check_mem(mem).map_err(|(what, right)| wrong("--mem-mib", what, right))?);
    }
    config.no_huge |= flags.no_huge;
    config.exit_after_drain |= flags.exit_after_drain;
    #[cfg(feature = "canary")]
    {
        config.canary = flags.canary;
    }
    config.poll = flags.poll.unwrap_or(config.poll);
    config.log_level = flags.log_level.unwrap_or(config.log_level);
    config.log_format = flags.log_format.unwrap_or(config.log_format);
    config.stop_timeout_s = flags.stop_timeout_s.unwrap_or(config.stop_timeout_s);
    // Lists on the command line replace the file's, so that a flag can take something away.
    if !flags.nvmf_listen.is_empty() {
        config.nvmf_listen.clone_from(&flags.nvmf_listen);
    }
    if !flags.peers.is_empty() {
        config.peers.clone_from(&flags.peers);
        config.peers_said = Some(Place::Flag("--peer"));
    }
    if let Some(listen) = flags.peer_listen {
        config.peer_listen = Some(listen);
        config.peers_said = Some(Place::Flag("--peer-listen"));
    }
    if let Some(file) = &flags.cluster_key_file {
        config.cluster_key = Some(ClusterKey::read(file).map_err(|(what, right)| wrong("--cluster-key-file", what, right))?);
    }
    if !flags.drives.is_empty() {
        config.drives.clone_from(&flags.drives);
    }
    Ok(())
}
