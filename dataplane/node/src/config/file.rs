//! The TOML file. Unknown keys are refused: a typo must not be a default.

use std::path::{Path, PathBuf};

use penstock_api::rpc::PeerAddress;
use serde::Deserialize;
use toml::Spanned;

use super::{CORES_RIGHT, Config, ConfigError, LogFormat, LogLevel, Place, Poll, check_dir, check_mem, check_run_dir, parse_cores};
use crate::peer::key::ClusterKey;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    run_dir: Option<Spanned<PathBuf>>,
    state_dir: Option<Spanned<PathBuf>>,
    cores: Option<Spanned<String>>,
    no_huge: Option<bool>,
    mem_mib: Option<Spanned<u32>>,
    poll: Option<Poll>,
    #[serde(default)]
    drives: Vec<Spanned<String>>,
    stop_timeout_s: Option<Spanned<u32>>,
    peer_listen: Option<Spanned<String>>,
    cluster_key_file: Option<Spanned<PathBuf>>,
    #[serde(default)]
    peer: Vec<Peer>,
    #[serde(default)]
    nvmf: Nvmf,
    #[serde(default)]
    log: Log,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    node: Spanned<String>,
    address: Spanned<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nvmf {
    #[serde(default)]
    listen: Vec<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Log {
    level: Option<LogLevel>,
    format: Option<LogFormat>,
}

/// Line of a byte offset, from 1.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|&&b| b == b'\n').count()
}

pub(super) fn apply(config: &mut Config, path: &Path, text: &str) -> Result<(), ConfigError> {
    let wrong = |offset: usize, what: String, right: String| ConfigError::Wrong {
        place: Place::File { path: path.to_owned(), line: line_of(text, offset) },
        what,
        right,
    };
    let file: FileConfig = toml::from_str(text).map_err(|e| {
        let offset = e.span().map_or(0, |span| span.start);
        wrong(offset, e.message().trim().to_owned(), "The settings are described in docs/operations.md".to_owned())
    })?;

    if let Some(dir) = file.run_dir {
        config.run_dir = check_run_dir(dir.get_ref()).map_err(|(what, right)| wrong(dir.span().start, what, right))?;
    }
    if let Some(dir) = file.state_dir {
        config.state_dir = check_dir(dir.get_ref()).map_err(|(what, right)| wrong(dir.span().start, what, right))?;
    }
    if let Some(cores) = file.cores {
        config.cores = parse_cores(cores.get_ref()).map_err(|what| wrong(cores.span().start, what, CORES_RIGHT.to_owned()))?;
    }
    if let Some(mem) = file.mem_mib {
        config.mem_mib = Some(check_mem(*mem.get_ref()).map_err(|(what, right)| wrong(mem.span().start, what, right))?);
    }
    if let Some(seconds) = file.stop_timeout_s {
        if *seconds.get_ref() == 0 {
            let right = "Give it a second or more, in which what is held is answered".to_owned();
            return Err(wrong(seconds.span().start, "stop_timeout_s is 0".to_owned(), right));
        }
        config.stop_timeout_s = *seconds.get_ref();
    }
    for drive in file.drives {
        let spec = drive.get_ref().parse().map_err(|e: penstock_api::drive::DriveSpecError| {
            wrong(drive.span().start, e.to_string(), "A drive reads like file:/srv/d0.img or nvme:0000:00:04.0".to_owned())
        })?;
        config.drives.push(spec);
    }
    for listen in file.nvmf.listen {
        let address = listen.get_ref().parse().map_err(|_| {
            let what = format!("\"{}\" is not an address and port", listen.get_ref());
            wrong(listen.span().start, what, "Write for example 127.0.0.1:4420 or [::1]:4420".to_owned())
        })?;
        config.nvmf_listen.push(address);
    }
    let place = |offset: usize| Some(Place::File { path: path.to_owned(), line: line_of(text, offset) });
    let socket = |text: &Spanned<String>| {
        text.get_ref().parse().map_err(|_| {
            let what = format!("\"{}\" is not an address and port", text.get_ref());
            wrong(text.span().start, what, "Write for example 10.0.0.1:4700 or [fd00::1]:4700".to_owned())
        })
    };
    for peer in &file.peer {
        let node_id = peer.node.get_ref().parse().map_err(|e: penstock_api::id::IdError| {
            wrong(peer.node.span().start, e.to_string(), "A node's id is shown by `penstock node show` there".to_owned())
        })?;
        config.peers.push(PeerAddress { node_id, address: socket(&peer.address)? });
        config.peers_said = place(peer.node.span().start);
    }
    if let Some(listen) = &file.peer_listen {
        config.peer_listen = Some(socket(listen)?);
        config.peers_said = place(listen.span().start);
    }
    if let Some(file) = &file.cluster_key_file {
        config.cluster_key = Some(ClusterKey::read(file.get_ref()).map_err(|(what, right)| wrong(file.span().start, what, right))?);
    }
    config.no_huge = file.no_huge.unwrap_or(config.no_huge);
    config.poll = file.poll.unwrap_or(config.poll);
    config.log_level = file.log.level.unwrap_or(config.log_level);
    config.log_format = file.log.format.unwrap_or(config.log_format);
    Ok(())
}
