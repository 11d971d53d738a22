//! Flags of penstock-control.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Parser;

/// Longest path of a Unix socket: sun_path has 108 bytes, one of them the closing zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The control daemon of Penstock: owns what is desired, and brings the node to it.
#[derive(Clone, Debug, Parser)]
#[command(
    version,
    args_override_self = true,
    after_help = "\
Examples:
  penstock-control --state-dir /var/lib/penstock/control
  penstock-control --state-dir ./state --node-socket ./run/penstockd.sock --listen unix:./run/control.sock
  penstock-control --state-dir ./state --listen 127.0.0.1:7600

Exit codes: 0 left on SIGTERM or SIGINT, 1 failed, 2 wrong flags.
The log level is set by PENSTOCK_LOG, for example PENSTOCK_LOG=debug."
)]
pub struct Config {
    /// Directory of control's own store. Made if absent, for the owner alone.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/penstock/control")]
    pub state_dir: PathBuf,

    /// JSON-RPC socket of penstockd.
    #[arg(long, value_name = "PATH", default_value = "/run/penstock/penstockd.sock")]
    pub node_socket: PathBuf,

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
    pub fn period(&self) -> Duration {
        Duration::from_millis(self.period_ms)
    }
    pub fn wait(&self) -> Duration {
        Duration::from_millis(self.wait_ms)
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
