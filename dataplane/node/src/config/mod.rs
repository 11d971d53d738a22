//! What penstockd is told: flags over the config file over defaults, checked before anything starts.
//!
//! Every refusal names where the value stands (file and line, or flag), what was found, and what would be right. Not here:
//! desired state (drives that control adds, exports), which lives in `state` and in control.
//!
//! To add a setting: a field in [`Config`], in `file::FileConfig` and in `flags::Flags`, one line in [`Config::resolve`], a row
//! in docs/operations.md.

mod file;
mod flags;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use penstock_api::DriveSpec;
use penstock_api::rpc::PeerAddress;
use serde::Deserialize;

pub use file::FileConfig;
pub use flags::Flags;

use crate::peer::key::{ClusterKey, HOW_TO_MAKE};

/// How a core waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Poll {
    /// Spins: lowest latency, one whole core each.
    Busy,
    /// Sleeps when there is nothing to do.
    Adaptive,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub const fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// The least time that a member of a group waits for a word from its leader before it wants to lead itself.
pub fn election_timeout() -> std::time::Duration {
    let timing = penstock_engine::Replication::default().timing;
    std::time::Duration::from_millis(u64::from(timing.election) * u64::from(timing.tick))
}

/// Smallest memory that SPDK's default pools fit into without hugepages, in MiB.
pub const MEM_MIB_MIN: u32 = 448;
/// What is taken without hugepages if nothing was said: SPDK's pools and some 190 MiB for buffers of our own.
pub const MEM_MIB_NO_HUGE: u32 = 640;
/// Highest core number that can be named.
pub const CORE_MAX: u32 = 255;

/// Settings, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub run_dir: PathBuf,
    pub state_dir: PathBuf,
    /// Rising, without duplicates, not empty.
    pub cores: Vec<u32>,
    pub no_huge: bool,
    /// `None`: as much as is needed, from hugepages.
    pub mem_mib: Option<u32>,
    pub poll: Poll,
    /// Addresses that the NVMe/TCP target listens on from the start.
    pub nvmf_listen: Vec<SocketAddr>,
    /// Where other nodes reach this one's first core; each further core listens on the next port. `None`: nobody does.
    pub peer_listen: Option<SocketAddr>,
    /// Other nodes, beside those that control names.
    pub peers: Vec<PeerAddress>,
    /// What the nodes of the cluster share.
    pub cluster_key: Option<ClusterKey>,
    /// Where something of peers was said, for what is wrong with it together.
    pub peers_said: Option<Place>,
    /// Drives to open at the start. They must carry a label.
    pub drives: Vec<DriveSpec>,
    pub log_level: LogLevel,
    pub log_format: LogFormat,
    /// How long SIGTERM may take to answer what is held and to drain.
    pub stop_timeout_s: u32,
    /// Stop once everything is drained (for scripts and tests).
    pub exit_after_drain: bool,
    /// A seeded bug; only a build with feature `canary` can be told one.
    pub canary: Option<penstock_engine::Canary>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: "/run/penstock".into(),
            state_dir: "/var/lib/penstock".into(),
            cores: vec![0],
            no_huge: false,
            mem_mib: None,
            poll: Poll::Busy,
            nvmf_listen: Vec::new(),
            peer_listen: None,
            peers: Vec::new(),
            cluster_key: None,
            peers_said: None,
            drives: Vec::new(),
            log_level: LogLevel::Info,
            log_format: LogFormat::Text,
            stop_timeout_s: 30,
            exit_after_drain: false,
            canary: None,
        }
    }
}

/// Where a value was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    File { path: PathBuf, line: usize },
    Flag(&'static str),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the config file {}: {why}. Name one that exists with --config, or leave --config out", path.display())]
    Unreadable { path: PathBuf, why: String },
    #[error("{place}: {what}. {right}")]
    Wrong { place: Place, what: String, right: String },
}

impl Config {
    /// Defaults, then the file, then the flags.
    ///
    /// # Errors
    /// The first value that cannot be used.
    pub fn resolve(flags: &Flags) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        if let Some(path) = &flags.config {
            let text = std::fs::read_to_string(path).map_err(|e| ConfigError::Unreadable { path: path.clone(), why: e.to_string() })?;
            file::apply(&mut config, path, &text)?;
        }
        flags::apply(&mut config, flags)?;
        config.settle()?;
        Ok(config)
    }

    /// What depends on more than one value.
    fn settle(&mut self) -> Result<(), ConfigError> {
        if self.no_huge {
            self.mem_mib.get_or_insert(MEM_MIB_NO_HUGE);
        }
        let Some(place) = self.peers_said.clone() else { return Ok(()) };
        let wrong = |what: &str, right: String| ConfigError::Wrong { place, what: what.to_owned(), right };
        if self.cluster_key.is_none() {
            let right = format!("Name it with cluster_key_file. {HOW_TO_MAKE}");
            return Err(wrong("nodes that speak to each other need the cluster's key", right));
        }
        let Some(listen) = self.peer_listen else {
            return Err(wrong(
                "peers are named, and they cannot reach this node",
                "Say where with peer_listen, for example 10.0.0.1:4700".to_owned(),
            ));
        };
        let last = usize::from(listen.port()) + self.cores.len() - 1;
        if listen.port() == 0 || last > usize::from(u16::MAX) {
            let what = format!("peer_listen is {listen}, and each of {} cores needs the next port", self.cores.len());
            return Err(wrong(&what, "Use a fixed port with enough of them above it".to_owned()));
        }
        Ok(())
    }

    pub fn rpc_socket(&self) -> PathBuf {
        self.run_dir.join("penstockd.sock")
    }
    pub fn vhost_dir(&self) -> PathBuf {
        self.run_dir.join("vhost")
    }
    pub fn vfio_user_dir(&self) -> PathBuf {
        self.run_dir.join("vfio-user")
    }
}

/// Reads `0x3`, `0,2` or `0-3,6`.
pub(crate) fn parse_cores(text: &str) -> Result<Vec<u32>, String> {
    let mut cores = Vec::new();
    let text = text.trim();
    if let Some(mask) = text.strip_prefix("0x") {
        let mask = u128::from_str_radix(mask, 16).map_err(|_| format!("\"{text}\" is not a mask of cores"))?;
        cores.extend((0..128).filter(|core| mask >> core & 1 == 1));
    } else {
        for part in text.trim_matches(['[', ']']).split(',') {
            let number = |text: &str| {
                let core = text.trim().parse::<u32>().map_err(|_| format!("\"{part}\" is neither a core nor a range of cores"))?;
                if core > CORE_MAX { Err(format!("core {core} is above the highest that can be named, {CORE_MAX}")) } else { Ok(core) }
            };
            match part.split_once('-') {
                Some((first, last)) => {
                    let (first, last) = (number(first)?, number(last)?);
                    if first > last {
                        return Err(format!("the range \"{part}\" runs backwards"));
                    }
                    cores.extend(first..=last);
                }
                None => cores.push(number(part)?),
            }
        }
    }
    cores.sort_unstable();
    cores.dedup();
    if cores.is_empty() {
        return Err(format!("\"{text}\" names no core"));
    }
    Ok(cores)
}

pub(crate) const CORES_RIGHT: &str = "Write a mask such as 0x3 or a list such as 0,1 or 0-3";

/// Reads `NODE=ADDRESS`.
pub(crate) fn parse_peer(text: &str) -> Result<PeerAddress, String> {
    let right = "write it as NODE=ADDRESS:PORT, for example 0194a5c1-b2d3-8002-8000-000000000000=10.0.0.2:4700";
    let (node, address) = text.split_once('=').ok_or_else(|| format!("\"{text}\" is not a peer: {right}"))?;
    let node_id = node.trim().parse().map_err(|e| format!("{e}; {right}"))?;
    let address = address.trim().parse().map_err(|_| format!("\"{address}\" is not an address and port: {right}"))?;
    Ok(PeerAddress { node_id, address })
}

/// Cheap checks that are the same wherever a value came from.
pub(crate) fn check_mem(mem_mib: u32) -> Result<u32, (String, String)> {
    if mem_mib < MEM_MIB_MIN {
        let what = format!("{mem_mib} MiB is too little memory");
        return Err((what, format!("SPDK's pools alone need {MEM_MIB_MIN}; {MEM_MIB_NO_HUGE} is a good start")));
    }
    Ok(mem_mib)
}

pub(crate) fn check_dir(path: &Path) -> Result<PathBuf, (String, String)> {
    if !path.is_absolute() {
        return Err((format!("the directory \"{}\" is relative", path.display()), "Write an absolute path".to_owned()));
    }

    Ok(path.to_owned())
}

/// The run directory becomes part of socket paths, which the kernel bounds.
pub(crate) fn check_run_dir(path: &Path) -> Result<PathBuf, (String, String)> {
    const SUN_PATH: usize = 107;
    let path = check_dir(path)?;
    let longest = path.as_os_str().len() + "/penstockd.sock".len();
    if longest > SUN_PATH {
        let what = format!("the run directory \"{}\" makes socket paths of {longest} bytes", path.display());
        return Err((what, format!("The kernel takes at most {SUN_PATH}: use a shorter path")));
    }
    Ok(path)
}

#[cfg(test)]
mod tests;
