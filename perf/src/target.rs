//! What a load is aimed at, as users type it, and the SPDK calls that make a bdev of it in this process.
//!
//! Deliberately not here: running them (see [`crate::host`]).

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde_json::{Value, json};

use crate::units::ByteCount;

/// A target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An NVMe-oF subsystem over TCP.
    NvmfTcp {
        address: String,
        port: u16,
        nqn: String,
    },
    /// A vhost-user-blk socket.
    Vhost {
        socket: PathBuf,
    },
    /// The directory of a vfio-user NVMe controller (holds `cntrl`).
    VfioUser {
        directory: PathBuf,
    },
    /// A bdev that `--bdev-json` made.
    Bdev {
        name: String,
    },
    /// A malloc or null bdev of this process, to measure the tool itself.
    Malloc {
        size: ByteCount,
    },
    Null {
        size: ByteCount,
    },
    /// A volume of ours, opened in this process without a front door: what a store costs by itself.
    Volume {
        which: Which,
        /// As `penstock pool add` takes it.
        drive: String,
    },
}

/// Which volume of a drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// One that is on it.
    Named(String),
    /// A new one on a blank drive, of that size.
    New(ByteCount),
}

/// Why a target was not understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "target `{0}` is not understood: use nvmf:tcp:ADDRESS:PORT:NQN, vhost:/path/to/socket, vfio-user:/path/to/directory, bdev:NAME (with --bdev-json), volume:NAME@DRIVE, volume:SIZE@DRIVE (a blank drive; as `penstock pool add` takes it), malloc:SIZE or null:SIZE"
)]
pub struct TargetError(String);

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let bad = || TargetError(text.to_owned());
        let (kind, rest) = text.split_once(':').ok_or_else(bad)?;
        if rest.is_empty() {
            return Err(bad());
        }
        match kind {
            "nvmf" => {
                let rest = rest.strip_prefix("tcp:").ok_or_else(bad)?;
                let (address, rest) = match rest.strip_prefix('[') {
                    Some(rest) => rest.split_once("]:").ok_or_else(bad)?,
                    None => rest.split_once(':').ok_or_else(bad)?,
                };
                let (port, nqn) = rest.split_once(':').ok_or_else(bad)?;
                let port = port.parse().map_err(|_| bad())?;
                if address.is_empty() || nqn.is_empty() {
                    return Err(bad());
                }
                Ok(Self::NvmfTcp { address: address.to_owned(), port, nqn: nqn.to_owned() })
            }
            "vhost" => Ok(Self::Vhost { socket: rest.into() }),
            "vfio-user" => Ok(Self::VfioUser { directory: rest.into() }),
            "bdev" => Ok(Self::Bdev { name: rest.to_owned() }),
            "volume" => {
                let (which, drive) =
                    rest.split_once('@').filter(|(which, drive)| !which.is_empty() && !drive.is_empty()).ok_or_else(bad)?;
                // Names of volumes begin with a letter.
                let which = if which.starts_with(|c: char| c.is_ascii_digit()) {
                    Which::New(which.parse().map_err(|_| bad())?)
                } else {
                    Which::Named(which.to_owned())
                };
                Ok(Self::Volume { which, drive: drive.to_owned() })
            }
            "malloc" => Ok(Self::Malloc { size: rest.parse().map_err(|_| bad())? }),
            "null" => Ok(Self::Null { size: rest.parse().map_err(|_| bad())? }),
            _ => Err(bad()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NvmfTcp { address, port, nqn } if address.contains(':') => write!(f, "nvmf:tcp:[{address}]:{port}:{nqn}"),
            Self::NvmfTcp { address, port, nqn } => write!(f, "nvmf:tcp:{address}:{port}:{nqn}"),
            Self::Vhost { socket } => write!(f, "vhost:{}", socket.display()),
            Self::VfioUser { directory } => write!(f, "vfio-user:{}", directory.display()),
            Self::Bdev { name } => write!(f, "bdev:{name}"),
            Self::Malloc { size } => write!(f, "malloc:{size}"),
            Self::Null { size } => write!(f, "null:{size}"),
            Self::Volume { which: Which::Named(name), drive } => write!(f, "volume:{name}@{drive}"),
            Self::Volume { which: Which::New(size), drive } => write!(f, "volume:{size}@{drive}"),
        }
    }
}

/// What happens to I/O while an NVMe-oF target is away, in whole seconds (SPDK's unit).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reconnect {
    /// How long the controller is kept and tried again; I/O waits meanwhile.
    pub keep_trying_s: u32,
    /// Gap between two attempts; at least 1.
    pub delay_s: u32,
    /// I/O fails after this long without a connection; 0: not before `keep_trying_s`.
    pub fail_io_after_s: u32,
}

/// One JSON-RPC call.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    pub method: &'static str,
    pub params: Value,
}

fn call(method: &'static str, params: Value) -> Call {
    Call { method, params }
}

impl Target {
    /// The calls that make a bdev of it, named after `name`; the last one answers with the bdev's name or names.
    /// Empty for a bdev that exists, and for volumes, which [`crate::volume`] opens.
    pub fn attach_calls(&self, name: &str, reconnect: Reconnect, block_bytes: u32) -> Vec<Call> {
        match self {
            Self::Bdev { .. } | Self::Volume { .. } => Vec::new(),
            Self::NvmfTcp { address, port, nqn } => vec![
                // Retried without limit while the controller is kept: an acknowledged loss would be the target's, not ours.
                call("bdev_nvme_set_options", json!({"bdev_retry_count": -1, "keep_alive_timeout_ms": 30_000})),
                call(
                    "bdev_nvme_attach_controller",
                    json!({
                        "name": name, "trtype": "TCP", "traddr": address, "trsvcid": port.to_string(), "subnqn": nqn,
                        "adrfam": if address.contains(':') { "IPv6" } else { "IPv4" },
                        "ctrlr_loss_timeout_sec": reconnect.keep_trying_s,
                        "reconnect_delay_sec": reconnect.delay_s,
                        "fast_io_fail_timeout_sec": reconnect.fail_io_after_s,
                    }),
                ),
            ],
            Self::VfioUser { directory } => {
                vec![call("bdev_nvme_attach_controller", json!({"name": name, "trtype": "VFIOUSER", "traddr": directory}))]
            }
            Self::Vhost { socket } => vec![call(
                "bdev_virtio_attach_controller",
                json!({"name": name, "trtype": "user", "traddr": socket, "dev_type": "blk", "vq_count": 1, "vq_size": 256}),
            )],
            Self::Malloc { size } => vec![call(
                "bdev_malloc_create",
                json!({"name": name, "num_blocks": size.0 / u64::from(block_bytes), "block_size": block_bytes}),
            )],
            Self::Null { size } => vec![call(
                "bdev_null_create",
                json!({"name": name, "num_blocks": size.0 / u64::from(block_bytes), "block_size": block_bytes}),
            )],
        }
    }

    /// True where SPDK's initiator shares its own memory with the target by file, which only hugepages have.
    pub fn needs_hugepages(&self) -> bool {
        matches!(self, Self::Vhost { .. })
    }
}

/// The bdev's name in the answer of the last attach call: a string, or a list of one or more.
pub fn bdev_name(answer: &Value) -> Option<String> {
    let first = answer.as_array().map_or(answer, |names| names.first().unwrap_or(answer));
    first.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_printed_reads_back_equal() {
        for text in [
            "nvmf:tcp:127.0.0.1:4420:nqn.2026-11.io.penstock:volume:a",
            "nvmf:tcp:[::1]:4420:nqn.x",
            "vhost:/run/v0",
            "vfio-user:/run/vf/0",
            "bdev:Malloc0",
            "malloc:256MiB",
            "null:1GiB",
            "volume:db-1@file:/data/d0.img",
            "volume:2GiB@malloc:m?size=4GiB",
        ] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn nqn_keeps_its_colons() {
        let target: Target = "nvmf:tcp:127.0.0.1:4420:nqn.2026-11.io:a:b".parse().unwrap();
        assert!(matches!(target, Target::NvmfTcp { port: 4420, nqn, .. } if nqn == "nqn.2026-11.io:a:b"));
    }

    #[test]
    fn target_that_is_not_understood_lists_what_is() {
        for text in [
            "",
            "nvmf:rdma:1.2.3.4:1:n",
            "nvmf:tcp:1.2.3.4:port:n",
            "nvmf:tcp:1.2.3.4:1:",
            "disk:/dev/sda",
            "bdev:",
            "malloc:x",
            "volume:a",
            "volume:@file:/x",
            "volume:1XB@file:/x",
        ] {
            assert!(text.parse::<Target>().unwrap_err().to_string().contains("vhost:/path"), "{text}");
        }
    }

    #[test]
    fn reconnect_rules_reach_the_controller() {
        let target: Target = "nvmf:tcp:127.0.0.1:4420:nqn.x".parse().unwrap();
        let calls = target.attach_calls("P", Reconnect { keep_trying_s: 60, delay_s: 1, fail_io_after_s: 5 }, 4096);
        let params = &calls[1].params;
        assert_eq!((&params["ctrlr_loss_timeout_sec"], &params["fast_io_fail_timeout_sec"]), (&json!(60), &json!(5)));
        assert_eq!(calls[0].params["bdev_retry_count"], json!(-1));
    }

    #[test]
    fn bdev_name_is_found_in_either_shape() {
        assert_eq!(bdev_name(&json!("V")), Some("V".into()));
        assert_eq!(bdev_name(&json!(["Pn1", "Pn2"])), Some("Pn1".into()));
        assert_eq!(bdev_name(&json!(true)), None);
    }
}
