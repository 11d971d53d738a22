//! NVMe drives: who drives each one now, and whether anything would be lost by taking it from the kernel.

use serde::{Deserialize, Serialize};

use crate::kernel::Kernel;
use crate::pci::{PciAddress, namespace_device};
use crate::size::Bytes;
use crate::{Outcome, Problem, signature};

pub const PCI_DEVICES: &str = "/sys/bus/pci/devices";
pub const PCI_DRIVERS: &str = "/sys/bus/pci/drivers";
/// Drivers that hand a device to user space.
pub const USER_SPACE_DRIVERS: [&str; 3] = ["vfio-pci", "uio_pci_generic", "igb_uio"];
/// PCI class code of an NVMe controller: mass storage, non-volatile memory, NVM Express.
const NVME_CLASS: &str = "0x010802";

/// Which driver a PCI function has, and which one it is told to take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    pub driver: Option<String>,
    pub driver_override: Option<String>,
}

impl Binding {
    pub fn of(kernel: &dyn Kernel, pci: PciAddress) -> Self {
        let dir = format!("{PCI_DEVICES}/{pci}");
        let text = kernel.read(&format!("{dir}/driver_override")).unwrap_or_default();
        let driver_override = Some(text.trim()).filter(|t| !t.is_empty() && *t != "(null)").map(str::to_string);
        Self { driver: kernel.link(&format!("{dir}/driver")), driver_override }
    }

    pub fn in_user_space(&self) -> bool {
        self.driver.as_deref().is_some_and(|d| USER_SPACE_DRIVERS.contains(&d))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Namespace {
    pub device: String,
    pub size: Bytes,
}

/// What stands in the way of user space taking a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "because")]
pub enum DriveState {
    /// With the kernel, and holds nothing that anybody would miss.
    Free,
    /// Already in user space.
    UserSpace,
    /// In use, or holds data.
    Taken(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Drive {
    pub pci: PciAddress,
    #[serde(flatten)]
    pub binding: Binding,
    pub numa_node: Option<u32>,
    pub iommu_group: Option<String>,
    pub model: Option<String>,
    pub namespaces: Vec<Namespace>,
    #[serde(flatten)]
    pub state: DriveState,
}

/// All NVMe controllers, by address.
pub fn all(kernel: &dyn Kernel) -> Outcome<Vec<Drive>> {
    let names = kernel.list(PCI_DEVICES).map_err(|e| Problem::io(PCI_DEVICES, &e))?;
    let is_nvme = |name: &String| kernel.read(&format!("{PCI_DEVICES}/{name}/class")).is_ok_and(|c| c.trim() == NVME_CLASS);
    names.iter().filter(|n| is_nvme(n)).filter_map(|n| n.parse().ok()).map(|pci| one(kernel, pci)).collect()
}

/// The NVMe controller at an address.
pub fn at(kernel: &dyn Kernel, pci: PciAddress) -> Outcome<Drive> {
    let next = "see `penstock-hugepages status` for the NVMe drives of this machine";
    let class = kernel.read(&format!("{PCI_DEVICES}/{pci}/class"));
    let class = class.map_err(|_| Problem::new(format!("there is no PCI device {pci}"), next))?;
    if class.trim() != NVME_CLASS {
        return Err(Problem::new(format!("{pci} has class {}, it is no NVMe controller ({NVME_CLASS})", class.trim()), next));
    }
    one(kernel, pci)
}

fn one(kernel: &dyn Kernel, pci: PciAddress) -> Outcome<Drive> {
    let dir = format!("{PCI_DEVICES}/{pci}");
    let binding = Binding::of(kernel, pci);
    let controllers = kernel.list(&format!("{dir}/nvme")).map_err(|e| Problem::io(&dir, &e))?;
    let mut namespaces = Vec::new();
    let mut model = None;
    for controller in &controllers {
        let place = format!("{dir}/nvme/{controller}");
        model = kernel.read(&format!("{place}/model")).ok().map(|m| m.trim().to_string()).or(model);
        let names = kernel.list(&place).map_err(|e| Problem::io(&place, &e))?;
        for device in names.iter().filter_map(|n| namespace_device(n)) {
            let size = Bytes(sectors(kernel, &device).unwrap_or(0) * 512);
            namespaces.push(Namespace { device, size });
        }
    }
    let state = if binding.in_user_space() {
        DriveState::UserSpace
    } else if binding.driver.is_none() {
        let why = "no kernel driver has it, so that what it holds can't be read (let the kernel's nvme driver take it first)";
        DriveState::Taken(vec![why.into()])
    } else {
        let mut reasons = Vec::new();
        for namespace in &namespaces {
            reasons.extend(reasons_to_leave(kernel, namespace));
        }
        if reasons.is_empty() { DriveState::Free } else { DriveState::Taken(reasons) }
    };
    let numa_node = kernel.read(&format!("{dir}/numa_node")).ok().and_then(|n| n.trim().parse().ok());
    let iommu_group = kernel.link(&format!("{dir}/iommu_group"));
    Ok(Drive { pci, binding, numa_node, iommu_group, model, namespaces, state })
}

fn sectors(kernel: &dyn Kernel, device: &str) -> Option<u64> {
    kernel.read(&format!("/sys/class/block/{device}/size")).ok()?.trim().parse().ok()
}

/// Everything that speaks against taking a namespace; what can't be found out speaks against it too.
fn reasons_to_leave(kernel: &dyn Kernel, namespace: &Namespace) -> Vec<String> {
    let disk = &namespace.device;
    let sys = format!("/sys/class/block/{disk}");
    if !kernel.exists(&sys) {
        return vec![format!("{disk} has no entry in /sys/class/block, so that its use can't be told")];
    }
    let children = kernel.list(&sys).unwrap_or_default();
    let partitions: Vec<&String> = children.iter().filter(|c| kernel.exists(&format!("{sys}/{c}/partition"))).collect();
    let mut reasons = Vec::new();
    if !partitions.is_empty() {
        let names: Vec<&str> = partitions.iter().map(|p| p.as_str()).collect();
        reasons.push(format!("{disk} is partitioned ({})", names.join(", ")));
    }
    for device in std::iter::once(disk).chain(partitions) {
        let sys = format!("/sys/class/block/{device}");
        match use_of(kernel, device, &sys) {
            Ok(found) => reasons.extend(found),
            Err(err) => reasons.push(format!("whether {device} is in use can't be told: {err}")),
        }
    }
    let node = format!("/dev/{disk}");
    match kernel.is_claimed(&node) {
        Ok(false) => {}
        // Mounts and holders, told above, are claims as well.
        Ok(true) if !reasons.is_empty() => {}
        Ok(true) => reasons.push(format!("{disk} is held exclusively, by the kernel or a process")),
        Err(err) => reasons.push(format!("{node} can't be opened: {err}")),
    }
    let mut read = |offset: u64, buf: &mut [u8]| kernel.read_device(&node, offset, buf);
    match signature::find(&mut read, namespace.size.0) {
        Ok(found) => reasons.extend(found.iter().map(|what| format!("{disk} holds {what}"))),
        Err(err) => reasons.push(format!("what {disk} holds can't be read: {err}")),
    }
    reasons
}

/// How the kernel uses a disk or partition right now.
fn use_of(kernel: &dyn Kernel, device: &str, sys: &str) -> std::io::Result<Vec<String>> {
    let mut uses = Vec::new();
    let number = kernel.read(&format!("{sys}/dev"))?;
    let mountinfo = kernel.read("/proc/self/mountinfo")?;
    let point = mountinfo.lines().find_map(|line| mount_point(line, number.trim(), device));
    uses.extend(point.map(|p| format!("{device} is mounted at {p}")));
    let swaps = kernel.read("/proc/swaps").unwrap_or_default(); // absent from kernels without swap
    if swaps.lines().skip(1).any(|line| line.split_ascii_whitespace().next() == Some(&format!("/dev/{device}"))) {
        uses.push(format!("{device} is a swap device"));
    }
    let holders = kernel.list(&format!("{sys}/holders"))?;
    if !holders.is_empty() {
        uses.push(format!("{device} is used by {}", holders.join(", ")));
    }
    Ok(uses)
}

/// Where a line of mountinfo (proc_pid_mountinfo(5)) mounts the device: by number, or by name where the file system
/// has a number of its own (btrfs).
fn mount_point<'a>(line: &'a str, number: &str, device: &str) -> Option<&'a str> {
    let (head, tail) = line.split_once(" - ")?;
    let mut head = head.split(' ').skip(2);
    let (mounted, point) = (head.next()?, head.nth(1)?);
    let source = tail.split(' ').nth(1)?;
    (mounted == number || source.strip_prefix("/dev/") == Some(device)).then_some(point)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mounts_are_told_by_number_and_by_name() {
        let ext4 = "36 35 259:1 / /mnt rw,noatime shared:1 - ext4 /dev/root rw";
        let btrfs = "40 35 0:44 /sub /data rw - btrfs /dev/nvme0n1p2 rw";
        assert_eq!(mount_point(ext4, "259:1", "nvme0n1p1"), Some("/mnt"));
        assert_eq!(mount_point(ext4, "259:2", "nvme0n1p2"), None);
        assert_eq!(mount_point(btrfs, "259:2", "nvme0n1p2"), Some("/data"));
        assert_eq!(mount_point(btrfs, "259:3", "nvme0n1p"), None);
    }

    proptest! {
        #[test]
        fn any_line_is_a_mount_or_not(line in ".*") {
            let _ = mount_point(&line, "1:1", "sda");
            let _ = mount_point(&format!("1 2 {line} - {line}"), "1:1", "sda");
        }
    }
}
