//! From what somebody wants to the changes that get there, or to the reasons why not. Looks, and changes nothing. What
//! is as wanted already needs no change.

use std::collections::BTreeSet;

use crate::change::Change;
use crate::drives::{self, Binding, Drive, DriveState, PCI_DEVICES, PCI_DRIVERS};
use crate::kernel::Kernel;
use crate::pages::{self, PagePool};
use crate::pci::PciAddress;
use crate::size::Bytes;
use crate::{Outcome, Problem};

/// Which driver shall hand drives to user space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DriverChoice {
    /// vfio-pci where there is an IOMMU, else uio_pci_generic.
    #[default]
    Auto,
    VfioPci,
    UioPciGeneric,
}

const VFIO: &str = "vfio-pci";
const UIO: &str = "uio_pci_generic";

/// The page size to use: the one named, else the smallest there is.
fn page_size(pools: &[PagePool], wanted: Option<Bytes>) -> Outcome<Bytes> {
    let sizes: BTreeSet<Bytes> = pools.iter().map(|p| p.page_size).collect();
    match wanted {
        Some(size) if !sizes.contains(&size) => {
            let known: Vec<String> = sizes.iter().map(Bytes::to_string).collect();
            Err(Problem::new(format!("this machine has no hugepages of {size}"), format!("choose one of {}", known.join(", "))))
        }
        Some(size) => Ok(size),
        None => Ok(*sizes.first().expect("pools are never empty")),
    }
}

/// Changes after which each node (all of them, if none is named) has `want` of **free** hugepages.
pub fn reserve(kernel: &dyn Kernel, want: Bytes, page: Option<Bytes>, nodes: &[u32]) -> Outcome<Vec<Change>> {
    let pools = pages::pools(kernel)?;
    let page = page_size(&pools, page)?;
    if want.0 == 0 || !want.0.is_multiple_of(page.0) {
        let next = format!("ask for a multiple, for instance {}", Bytes(want.0.div_ceil(page.0).max(1).saturating_mul(page.0)));
        return Err(Problem::new(format!("{want} is not a number of whole pages of {page}"), next));
    }
    let known: Vec<u32> = pools.iter().filter(|p| p.page_size == page).map(|p| p.node).collect();
    if let Some(node) = nodes.iter().find(|n| !known.contains(n)) {
        let next = format!("choose from {known:?}, or leave --node out for all");
        return Err(Problem::new(format!("this machine has no NUMA node {node}"), next));
    }
    let mut changes = Vec::new();
    for pool in pools.iter().filter(|p| p.page_size == page && (nodes.is_empty() || nodes.contains(&p.node))) {
        let missing = (want.0 / page.0).saturating_sub(pool.pages_free);
        if missing == 0 {
            continue;
        }
        if let Some(room) = room_on(kernel, pool.node)
            && missing.saturating_mul(page.0) > room.0
        {
            let what = format!("node {} has {room} of memory to give, {} more are needed", pool.node, Bytes(missing * page.0));
            return Err(Problem::new(what, "ask for less, name another --node, or stop what uses the memory"));
        }
        let to = pool.pages + missing;
        changes.push(Change::Pages { node: pool.node, page_kib: page.0 >> 10, from: pool.pages, to });
    }
    Ok(changes)
}

/// Memory of a node that is free or only caches files; asking for more makes the kernel swap and kill.
fn room_on(kernel: &dyn Kernel, node: u32) -> Option<Bytes> {
    let text = kernel.read(&format!("/sys/devices/system/node/node{node}/meminfo")).ok()?;
    let kib = |name: &str| -> Option<u64> {
        let line = text.lines().find(|l| l.contains(name))?;
        line.rsplit_once(':')?.1.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(Bytes((kib(" MemFree:")? + kib(" FilePages:").unwrap_or(0)) << 10))
}

/// Changes after which hugetlbfs is mounted at `path`.
pub fn mount(kernel: &dyn Kernel, path: &str, page: Option<Bytes>) -> Outcome<Vec<Change>> {
    let page = page_size(&pages::pools(kernel)?, page)?;
    if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
        return Err(Problem::new(format!("{path} is no absolute path"), "name one, for instance /dev/hugepages"));
    }
    let path = match path.trim_end_matches('/') {
        "" => return Err(Problem::new("hugetlbfs can't be mounted over /", "name a directory, for instance /dev/hugepages")),
        path => path.to_string(),
    };
    match pages::mounts(kernel)?.into_iter().rev().find(|m| m.path == path) {
        Some(there) if there.page_size == page => return Ok(Vec::new()),
        Some(there) => {
            let what = format!("{path} is hugetlbfs already, with pages of {} instead of {page}", there.page_size);
            return Err(Problem::new(what, "name another path, or unmount that one"));
        }
        None => {}
    }
    if kernel.exists(&path) && !kernel.list(&path).map_err(|e| Problem::io(&path, &e))?.is_empty() {
        return Err(Problem::new(format!("{path} is not empty; a mount would hide what is in it"), "name an empty directory"));
    }
    let mut changes = Vec::new();
    let mut missing = path.as_str();
    while !missing.is_empty() && !kernel.exists(missing) {
        changes.push(Change::Directory { path: missing.into() });
        missing = missing.rsplit_once('/').map_or("", |(parent, _)| parent);
    }
    changes.reverse();
    changes.push(Change::Mount { path, page_kib: page.0 >> 10 });
    Ok(changes)
}

/// Changes after which the drives are in user space. A drive that is in use or holds data is refused, unless `force`
/// names it.
pub fn bind(kernel: &dyn Kernel, wanted: &[PciAddress], choice: DriverChoice, force: &[PciAddress]) -> Outcome<Vec<Change>> {
    if let Some(stray) = force.iter().find(|f| !wanted.contains(f)) {
        return Err(Problem::new(
            format!("--force {stray} names a drive that is not to be bound"),
            format!("bind {stray} --force {stray}"),
        ));
    }
    let mut changes = Vec::new();
    for pci in wanted.iter().collect::<BTreeSet<_>>() {
        let drive = drives::at(kernel, *pci)?;
        if let DriveState::Taken(reasons) = &drive.state
            && !force.contains(pci)
        {
            let what = format!("drive {pci} is left alone: {}", reasons.join("; "));
            let next = format!("name another drive; or, if all of it may be lost, bind {pci} --force {pci}");
            return Err(Problem::new(what, next));
        }
        let driver = choose_driver(kernel, &drive, choice)?;
        if driver == VFIO {
            check_group(kernel, &drive, wanted)?;
        }
        let to = Binding { driver: Some(driver.into()), driver_override: Some(driver.into()) };
        if drive.binding != to {
            changes.push(Change::Driver { pci: *pci, from: drive.binding, to });
        }
    }
    Ok(changes)
}

/// Changes after which the kernel's own nvme driver has the drives again.
pub fn unbind(kernel: &dyn Kernel, wanted: &[PciAddress]) -> Outcome<Vec<Change>> {
    let mut changes = Vec::new();
    for pci in wanted.iter().collect::<BTreeSet<_>>() {
        let drive = drives::at(kernel, *pci)?;
        // Where the kernel has no nvme driver, free of any driver is all there is to give back.
        let driver = kernel.exists(&format!("{PCI_DRIVERS}/nvme")).then(|| "nvme".to_string());
        let to = Binding { driver, driver_override: None };
        if drive.binding.in_user_space() || drive.binding.driver.is_none() && drive.binding != to {
            changes.push(Change::Driver { pci: *pci, from: drive.binding, to });
        }
    }
    Ok(changes)
}

pub fn is_loaded(kernel: &dyn Kernel, driver: &str) -> bool {
    kernel.exists(&format!("{PCI_DRIVERS}/{driver}"))
}

fn choose_driver(kernel: &dyn Kernel, drive: &Drive, choice: DriverChoice) -> Outcome<&'static str> {
    let has_iommu = drive.iommu_group.is_some();
    let without = kernel.read("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode").is_ok_and(|v| v.trim() == "Y");
    let (vfio, uio) = (is_loaded(kernel, VFIO), is_loaded(kernel, UIO));
    let missing = |driver: &str| Problem::new(format!("driver {driver} is not loaded"), format!("modprobe {driver}"));
    match choice {
        DriverChoice::Auto if vfio && has_iommu => Ok(VFIO),
        DriverChoice::Auto if uio => Ok(UIO),
        DriverChoice::Auto if vfio && without => Ok(VFIO),
        DriverChoice::Auto if has_iommu => Err(missing(VFIO)),
        DriverChoice::Auto => Err(missing(UIO)),
        DriverChoice::UioPciGeneric if uio => Ok(UIO),
        DriverChoice::UioPciGeneric => Err(missing(UIO)),
        DriverChoice::VfioPci if !vfio => Err(missing(VFIO)),
        DriverChoice::VfioPci if has_iommu || without => Ok(VFIO),
        DriverChoice::VfioPci => {
            let next = "switch the IOMMU on (intel_iommu=on or amd_iommu=on on the kernel's command line), or use --driver uio_pci_generic";
            Err(Problem::new(format!("drive {} is behind no IOMMU, which vfio-pci needs", drive.pci), next))
        }
    }
}

/// vfio hands out IOMMU groups whole: no member may stay with a driver that does DMA for the kernel.
fn check_group(kernel: &dyn Kernel, drive: &Drive, wanted: &[PciAddress]) -> Outcome<()> {
    let Some(group) = &drive.iommu_group else { return Ok(()) };
    let members = kernel.list(&format!("/sys/kernel/iommu_groups/{group}/devices")).unwrap_or_default();
    for name in members.iter().filter(|m| m.parse().is_ok_and(|pci: PciAddress| !wanted.contains(&pci))) {
        let Some(driver) = kernel.link(&format!("{PCI_DEVICES}/{name}/driver")) else { continue };
        if ![VFIO, "pci-stub", "pcieport"].contains(&driver.as_str()) {
            let what = format!("drive {} shares IOMMU group {group} with {name}, which {driver} uses", drive.pci);
            return Err(Problem::new(what, format!("give both to vfio-pci, or use --driver {UIO}")));
        }
    }
    Ok(())
}
