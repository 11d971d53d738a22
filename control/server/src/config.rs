//! Flags of penstock-control.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Parser;
use penstock_api::NodeName;
use penstock_model::DesiredNode;

/// Longest path of a Unix socket: sun_path has 108 bytes, one of them the closing zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The control daemon of Penstock: owns what is desired, and brings the nodes to it.
#[derive(Clone, Debug, Parser)]
#[command(
    version,
    args_override_self = true,
    after_help = "\
Examples:
  penstock-control --state-dir /var/lib/penstock/control
  penstock-control --state-dir ./state --node-socket ./run/penstockd.sock --listen unix:./run/control.sock
  penstock-control --state-dir ./state --listen 127.0.0.1:7600
  penstock-control --state-dir ./state --node n1=/run/n1/penstockd.sock,peer=10.0.0.1:7700,nvmf=10.0.0.1:4420 \\
      --node n2=/run/n2/penstockd.sock,peer=10.0.0.2:7700,nvmf=10.0.0.2:4420 --node n3=…

Exit codes: 0 left on SIGTERM or SIGINT, 1 failed, 2 wrong flags.
The log level is set by PENSTOCK_LOG, for example PENSTOCK_LOG=debug."
)]
pub struct Config {
    /// Directory of control's own store. Made if absent, for the owner alone.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/penstock/control")]
    pub state_dir: PathBuf,

    /// JSON-RPC socket of penstockd, for one node, which is named `local`.
    #[arg(long, value_name = "PATH", default_value = "/run/penstock/penstockd.sock", conflicts_with = "node")]
    pub node_socket: PathBuf,

    /// A node of several: its name, its penstockd's socket, where the other nodes reach it, and where hosts do. Repeat for each.
    #[arg(long, value_name = "NAME=SOCKET[,peer=ADDR:PORT][,nvmf=ADDR:PORT]")]
    pub node: Vec<NodeFlag>,

    /// Where the API listens: unix:PATH, or a loopback address and port.
    #[arg(long, value_name = "unix:PATH|ADDR:PORT", default_value = "unix:/run/penstock/control.sock")]
    pub listen: Listen,

    /// This state directory was restored from a copy and its original is gone: go on under a new incarnation.
    #[arg(long)]
    pub restored: bool,

    /// Milliseconds between looks at the node when nothing happens.
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub period_ms: u64,

    /// Milliseconds that a call of the API waits for the node before it answers 202.
    #[arg(long, value_name = "MS", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(0..=600_000))]
    pub wait_ms: u64,

    /// How the log is written.
    #[arg(long, value_enum, default_value_t = LogForm::Text)]
    pub log: LogForm,
}

impl Config {
    /// The nodes, in the order in which they were given.
    ///
    /// # Errors
    /// When two have one name.
    pub fn nodes(&self) -> Result<Vec<NodeFlag>, String> {
        if self.node.is_empty() {
            let named = DesiredNode { name: "local".parse().expect("a name"), peer: None, nvmf: None, gone: false };
            return Ok(vec![NodeFlag { named, socket: self.node_socket.clone() }]);
        }
        for (at, node) in self.node.iter().enumerate() {
            let same = |other: &&NodeFlag| other.named.name == node.named.name || other.socket == node.socket;
            if let Some(other) = self.node[..at].iter().find(same) {
                return Err(format!("--node {} and --node {} have one name or one socket", other.named.name, node.named.name));
            }
        }
        Ok(self.node.clone())
    }

    pub fn period(&self) -> Duration {
        Duration::from_millis(self.period_ms)
    }
    pub fn wait(&self) -> Duration {
        Duration::from_millis(self.wait_ms)
    }
}

/// One `--node`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFlag {
    pub named: DesiredNode,
    pub socket: PathBuf,
}

impl FromStr for NodeFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || format!("\"{text}\" is not a node: write NAME=SOCKET[,peer=ADDR:PORT][,nvmf=ADDR:PORT]");
        let (name, rest) = text.split_once('=').ok_or_else(form)?;
        let name: NodeName = name.parse().map_err(|error| format!("the node's name: {error}"))?;
        let mut parts = rest.split(',');
        let socket = parts.next().filter(|socket| !socket.is_empty() && !socket.starts_with("peer=")).ok_or_else(form)?;
        let mut named = DesiredNode { name, peer: None, nvmf: None, gone: false };
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(form)?;
            let place = match key {
                "peer" => &mut named.peer,
                "nvmf" => &mut named.nvmf,
                _ => return Err(format!("node {} has no option {key}: peer and nvmf are", named.name)),
            };
            let at: SocketAddr = value.parse().map_err(|_| format!("{key}={value} is not an address and port such as 10.0.0.1:7700"))?;
            if at.ip().is_unspecified() || at.port() == 0 {
                return Err(format!("{key}={value} is no address that others reach: name one of the node's own"));
            }
            *place = Some(at);
        }
        Ok(Self { named, socket: socket.into() })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogForm {
    Text,
    Json,
}

/// An address that only this machine reaches: the API checks nobody, so nothing else is accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    Unix(PathBuf),
    Loopback(SocketAddr),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err("a path is missing: write for example unix:/run/penstock/control.sock".to_owned());
            }
            if path.len() > SOCKET_PATH_BYTES_MAX {
                return Err(format!("the path has {} bytes, a Unix socket's may have {SOCKET_PATH_BYTES_MAX}", path.len()));
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let address: SocketAddr =
            text.parse().map_err(|_| format!("\"{text}\" is neither unix:PATH nor an address and port such as 127.0.0.1:7600"))?;
        if !address.ip().is_loopback() {
            let message =
                format!("{} is not loopback: the API checks nobody, so it listens on unix:PATH, 127.0.0.1 or [::1] alone", address.ip());
            return Err(message);
        }
        Ok(Self::Loopback(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn config_flags_are_consistent() {
        Config::command().debug_assert();
    }

    #[test]
    fn nodes_have_names_sockets_and_addresses() {
        let node: NodeFlag = "n1=/run/a.sock,peer=10.0.0.1:7700,nvmf=[::1]:4420".parse().unwrap();
        assert_eq!(node.socket, PathBuf::from("/run/a.sock"));
        assert_eq!((node.named.peer.unwrap().port(), node.named.nvmf.unwrap().port()), (7700, 4420));
        for (text, part) in [
            ("n1", "is not a node"),
            ("n1=", "is not a node"),
            ("a/b=/x", "name"),
            ("n1=/x,peer=host:1", "not an address"),
            ("n1=/x,peer=0.0.0.0:7700", "no address that others reach"),
            ("n1=/x,pear=10.0.0.1:1", "no option pear"),
        ] {
            let error = text.parse::<NodeFlag>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        let twice = Config::try_parse_from(["c", "--node", "a=/x", "--node", "a=/y"]).unwrap();
        assert!(twice.nodes().unwrap_err().contains("one name"));
        let old = Config::try_parse_from(["c", "--node-socket", "/x"]).unwrap();
        assert_eq!(old.nodes().unwrap()[0].named.name.as_str(), "local");
    }

    #[test]
    fn listen_takes_unix_and_loopback_alone() {
        assert_eq!("unix:/x".parse(), Ok(Listen::Unix("/x".into())));
        assert!(matches!("127.0.0.1:0".parse(), Ok(Listen::Loopback(_))));
        assert!(matches!("[::1]:80".parse(), Ok(Listen::Loopback(_))));
        for (text, part) in [
            ("0.0.0.0:7600", "not loopback"),
            ("10.0.0.1:7600", "not loopback"),
            ("[::]:7600", "not loopback"),
            ("localhost:7600", "neither"),
            ("unix:", "missing"),
            ("/run/x.sock", "neither"),
            (&format!("unix:/{}", "x".repeat(107)), "108 bytes"),
        ] {
            let error = text.parse::<Listen>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
