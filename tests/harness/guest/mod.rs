//! Guests under QEMU: Debian's cloud kernel, an initramfs made here, and a serial line that runs commands in it.
//!
//! Three routes are driven from here: Linux's own nvme-tcp initiator, virtio-blk over vhost-user-blk, and a program inside
//! the guest that drives QEMU's NVMe controller from user space over a drive that records its writes and flushes.
//! Deliberately not here: KVM (a guest must also run where KVM is absent or hangs), downloads (`tests/guest/deps.sh` does
//! them), and any timing assertion. Emulation is slow, so every wait is bounded and none is measured.

pub mod acks;
pub mod channel;
pub mod cpio;
pub mod image;
pub mod initiator;
pub mod inside;
pub mod judge;
pub mod logged_drive;
pub mod machine;
pub mod modules;
pub mod penstock_target;
pub mod proto;
pub mod replay;
pub mod rpc;
pub mod scenario;
pub mod spdk_target;
pub mod target;
pub mod wait;
pub mod writelog;

use std::path::{Path, PathBuf};
use std::time::Duration;

/// What can go wrong between the host side of a guest test and the guest. Shown the same way by `{}` and `{:?}`, since
/// tests unwrap it and logs in it have many lines.
#[derive(thiserror::Error)]
pub enum GuestError {
    #[error("{what} is missing: {remedy}")]
    Missing { what: String, remedy: String },
    #[error("{doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{what} did not happen within {limit:?}{detail}")]
    Timeout { what: String, limit: Duration, detail: String },
    #[error("{what}: {detail}")]
    Failed { what: String, detail: String },
}

pub type Result<T> = std::result::Result<T, GuestError>;

impl std::fmt::Debug for GuestError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl GuestError {
    pub(crate) fn failed(what: impl Into<String>, detail: impl Into<String>) -> Self {
        GuestError::Failed { what: what.into(), detail: detail.into() }
    }
}

/// Names the file and the deed in an I/O error, which the standard library leaves out.
pub(crate) trait At<T> {
    fn at(self, doing: &'static str, path: &Path) -> Result<T>;
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, doing: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| GuestError::Io { doing, path: path.to_owned(), source })
    }
}

/// Where built things are kept outside the checkout: `$PENSTOCK_CACHE`, else `~/.cache/penstock`.
pub fn cache_dir() -> PathBuf {
    match std::env::var_os("PENSTOCK_CACHE") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/penstock"),
    }
}
