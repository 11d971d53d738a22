//! One thing that can be changed on the machine. Both ways are written as "bring it there from wherever it is now", so
//! that undoing works from any state that a crash may have left.
//!
//! To add a kind of change: a variant, its `make`, its `unmake`, its words, and a step in `tests/crashes.rs`.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::drives::{Binding, PCI_DEVICES, PCI_DRIVERS};
use crate::kernel::Kernel;
use crate::pages::{mounts, pool_dir, read_number};
use crate::pci::PciAddress;
use crate::size::Bytes;
use crate::{Outcome, Problem};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Change {
    /// Hugepages of one size on one node, from one number to a larger one.
    Pages { node: u32, page_kib: u64, from: u64, to: u64 },
    /// A directory that does not exist yet.
    Directory { path: String },
    /// hugetlbfs on an existing directory.
    Mount { path: String, page_kib: u64 },
    /// A drive from one driver to another.
    Driver { pci: PciAddress, from: Binding, to: Binding },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |binding: &Binding| binding.driver.clone().unwrap_or("no driver".into());
        match self {
            Self::Pages { node, page_kib, from, to } => {
                write!(f, "node {node}: {from} -> {to} hugepages of {}", Bytes(page_kib << 10))
            }
            Self::Directory { path } => write!(f, "make directory {path}"),
            Self::Mount { path, page_kib } => write!(f, "mount hugetlbfs with pages of {} at {path}", Bytes(page_kib << 10)),
            Self::Driver { pci, from, to } => write!(f, "drive {pci}: {} -> {}", name(from), name(to)),
        }
    }
}

impl Change {
    /// Makes it so.
    pub fn make(&self, kernel: &mut dyn Kernel) -> Outcome<()> {
        match self {
            Self::Pages { node, page_kib, to, .. } => {
                let got = set_pages(kernel, *node, *page_kib, *to)?;
                if got >= *to {
                    return Ok(());
                }
                let what = format!("node {node} gave only {got} of {to} hugepages of {}", Bytes(page_kib << 10));
                let next = "its memory is too fragmented or too full: write 1 to /proc/sys/vm/compact_memory and try again, \
                            ask for less, use 2MiB pages, or reserve at boot (hugepages= on the kernel's command line)";
                Err(Problem::new(what, next))
            }
            Self::Directory { path } => match kernel.make_dir(path) {
                Err(err) if err.kind() != std::io::ErrorKind::AlreadyExists => Err(Problem::io(path, &err)),
                _ => Ok(()),
            },
            Self::Mount { path, page_kib } => {
                kernel.mount_hugetlbfs(path, *page_kib).map_err(|e| Problem::io(format!("mounting hugetlbfs at {path}"), &e))
            }
            Self::Driver { pci, to, .. } => drive_to(kernel, *pci, to),
        }
    }

    /// Brings back what was before, from any state in between. What others changed meanwhile stays.
    pub fn unmake(&self, kernel: &mut dyn Kernel) -> Outcome<()> {
        match self {
            Self::Pages { node, page_kib, from, to } => {
                let now = read_number(kernel, &pool_dir(kernel, *node, *page_kib), "nr_hugepages")?;
                // Not made, or made in part: back to what was. More than we made: take ours, leave theirs.
                let target = if now < *to { now.min(*from) } else { now - (to - from) };
                let got = if target == now { now } else { set_pages(kernel, *node, *page_kib, target)? };
                if got == target {
                    return Ok(());
                }
                let what = format!("node {node} still has {got} hugepages instead of {target}");
                Err(Problem::new(what, "stop the processes that use them (penstockd, QEMU), then run undo again"))
            }
            Self::Directory { path } => match kernel.remove_dir(path) {
                Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(()),
                // Somebody uses the directory meanwhile: it is theirs now.
                Err(err) if err.kind() == std::io::ErrorKind::DirectoryNotEmpty => Ok(()),
                other => other.map_err(|e| Problem::io(format!("removing {path}"), &e)),
            },
            Self::Mount { path, .. } => {
                if !mounts(kernel)?.iter().any(|m| m.path == *path) {
                    return Ok(());
                }
                kernel.unmount(path).map_err(|e| Problem::io(format!("unmounting {path}"), &e))
            }
            Self::Driver { pci, from, .. } => {
                if !kernel.exists(&format!("{PCI_DEVICES}/{pci}")) {
                    return Ok(()); // pulled out: nothing of ours is left on it
                }
                drive_to(kernel, *pci, from)
            }
        }
    }
}

fn set_pages(kernel: &mut dyn Kernel, node: u32, page_kib: u64, pages: u64) -> Outcome<u64> {
    let dir = pool_dir(kernel, node, page_kib);
    let path = format!("{dir}/nr_hugepages");
    kernel.write(&path, &format!("{pages}\n")).map_err(|e| Problem::io(&path, &e))?;
    read_number(kernel, &dir, "nr_hugepages")
}

/// Gives a drive the driver and the override of `to`.
fn drive_to(kernel: &mut dyn Kernel, pci: PciAddress, to: &Binding) -> Outcome<()> {
    let dir = format!("{PCI_DEVICES}/{pci}");
    if Binding::of(kernel, pci).driver != to.driver {
        // The override decides which driver the probe below picks, and keeps others from taking the drive in between.
        if to.driver.is_some() {
            set_override(kernel, pci, to.driver.as_deref())?;
        }
        if Binding::of(kernel, pci).driver.is_some() {
            let path = format!("{dir}/driver/unbind");
            kernel.write(&path, &pci.to_string()).map_err(|e| Problem::io(&path, &e))?;
        }
        if let Some(driver) = &to.driver {
            // What counts is who has it afterwards; the write's own answer only explains a failure.
            let probe = kernel.write("/sys/bus/pci/drivers_probe", &pci.to_string());
            let now = Binding::of(kernel, pci).driver;
            if now.as_deref() != Some(driver) {
                let has = now.map_or("no driver has it".into(), |d| format!("{d} has it"));
                let why = probe.err().map(|e| format!(" ({e})")).unwrap_or_default();
                let what = format!("{driver} did not take drive {pci}: {has}{why}");
                let loaded = kernel.exists(&format!("{PCI_DRIVERS}/{driver}"));
                let next = if loaded { "see the kernel's log (dmesg)".into() } else { format!("modprobe {driver}") };
                return Err(Problem::new(what, next));
            }
        }
    }
    set_override(kernel, pci, to.driver_override.as_deref())
}

fn set_override(kernel: &mut dyn Kernel, pci: PciAddress, driver: Option<&str>) -> Outcome<()> {
    if Binding::of(kernel, pci).driver_override.as_deref() == driver {
        return Ok(());
    }
    let path = format!("{PCI_DEVICES}/{pci}/driver_override");
    kernel.write(&path, &format!("{}\n", driver.unwrap_or(""))).map_err(|e| Problem::io(&path, &e))
}
