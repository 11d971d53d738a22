//! Getting a machine ready for a data plane in user space: hugepages reserved and mounted, NVMe drives handed from the
//! kernel to user space, and all of it taken back.
//!
//! * [`kernel`]: the one door to sysfs, proc, devices and mounts; tests stand another machine behind it.
//! * [`pages`], [`drives`]: what is there. [`signature`]: what a drive holds. [`size`], [`pci`]: words of the command line.
//! * [`change`]: one thing that can be changed, made and unmade from any state in between.
//! * [`journal`]: every change is written down before it is made, so that `undo` works after a crash too.
//! * [`plan`]: from wishes to changes, or to the reasons why not.
//! * [`report`]: what `status` and `plan` show.
//!
//! Deliberately not in it: anything that survives a reboot (kernel command line, sysctl files, udev rules), loading of
//! kernel modules, and SPDK. It depends on nothing else of this project.
#![forbid(unsafe_code)]

pub mod change;
pub mod drives;
pub mod journal;
pub mod kernel;
pub mod pages;
pub mod pci;
pub mod plan;
pub mod report;
pub mod signature;
pub mod size;

/// What went wrong, and what to do next.
#[derive(Debug, thiserror::Error)]
#[error("{what}\n  next: {next}")]
pub struct Problem {
    pub what: String,
    pub next: String,
}

impl Problem {
    pub fn new(what: impl Into<String>, next: impl Into<String>) -> Self {
        Self { what: what.into(), next: next.into() }
    }

    /// A call to the kernel that failed: `doing` names it.
    pub fn io(doing: impl std::fmt::Display, err: &std::io::Error) -> Self {
        let next = match err.kind() {
            std::io::ErrorKind::PermissionDenied => "run it as root",
            std::io::ErrorKind::ReadOnlyFilesystem => "sysfs is read-only here; run it on the host, not in a container",
            std::io::ErrorKind::ResourceBusy => "something still uses it; stop penstockd and other users, then try again",
            std::io::ErrorKind::NotFound => "see `penstock-hugepages status` for what this machine has",
            _ => "see the kernel's log (dmesg)",
        };
        Self::new(format!("{doing}: {err}"), next)
    }
}

pub type Outcome<T> = Result<T, Problem>;
