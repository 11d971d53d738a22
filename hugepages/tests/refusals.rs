//! What is refused, and what the refusal says; what is chosen when nothing is named.

mod machine;

use std::fs;

use machine::{BLANK, FakeKernel, GPT_ONLY, IN_UIO, LVM, MOUNTED, NETWORK, NO_DRIVER, build, pci};
use penstock_hugepages::change::Change;
use penstock_hugepages::drives::{self, DriveState};
use penstock_hugepages::plan::{self, DriverChoice};
use penstock_hugepages::size::Bytes;
use penstock_hugepages::{Outcome, Problem};

struct Fixture {
    root: tempfile::TempDir,
    kernel: FakeKernel,
}

fn fixture() -> Fixture {
    let root = tempfile::tempdir().unwrap();
    build(root.path());
    let kernel = FakeKernel::at(root.path());
    Fixture { root, kernel }
}

impl Fixture {
    fn bind(&self, address: &str) -> Outcome<Vec<Change>> {
        plan::bind(&self.kernel, &[pci(address)], DriverChoice::Auto, &[])
    }

    fn remove(&self, path: &str) {
        fs::remove_dir_all(self.root.path().join(path)).unwrap();
    }

    fn put(&self, path: &str, text: &[u8]) {
        fs::write(self.root.path().join(path), text).unwrap();
    }
}

#[track_caller]
fn refused(outcome: Outcome<Vec<Change>>, what: &[&str]) -> Problem {
    let problem = outcome.unwrap_err();
    for part in what {
        assert!(problem.to_string().contains(part), "{part:?} is not in: {problem}");
    }
    problem
}

#[test]
fn drives_are_told_apart() {
    let f = fixture();
    let all = drives::all(&f.kernel).unwrap();
    let told: Vec<(String, &str)> = all
        .iter()
        .map(|d| {
            let state = match d.state {
                DriveState::Free => "free",
                DriveState::UserSpace => "user space",
                DriveState::Taken(_) => "taken",
            };
            (d.pci.to_string(), state)
        })
        .collect();
    let expected = [(BLANK, "free"), (MOUNTED, "taken"), (IN_UIO, "user space"), (LVM, "taken"), (NO_DRIVER, "taken"), (GPT_ONLY, "taken")];
    assert_eq!(told, expected.map(|(address, state)| (address.to_string(), state)));
    assert_eq!(all[0].model.as_deref(), Some("Fake NVMe"));
    assert_eq!((all[0].namespaces[0].device.as_str(), all[0].namespaces[0].size), ("nvme0n1", Bytes(1 << 20)));
}

#[test]
fn drive_in_use_or_with_data_is_left_alone_with_every_reason() {
    let f = fixture();
    refused(f.bind(MOUNTED), &["nvme1n1 is partitioned (nvme1n1p1)", "nvme1n1p1 is mounted at /srv", "--force 0000:00:05.0"]);
    refused(f.bind(LVM), &["nvme2n1 is used by dm-0"]);
    refused(f.bind(NO_DRIVER), &["no kernel driver has it"]);
    refused(f.bind(GPT_ONLY), &["nvme3n1 holds a GPT partition table"]);
}

#[test]
fn each_way_of_being_in_use_is_enough() {
    let swap = fixture();
    swap.put("proc/swaps", b"Filename Type Size Used Priority\n/dev/nvme0n1 partition 1 0 -2\n");
    refused(swap.bind(BLANK), &["nvme0n1 is a swap device"]);

    let claimed = fixture();
    claimed.put("dev/nvme0n1.claimed", b"");
    refused(claimed.bind(BLANK), &["nvme0n1 is held exclusively"]);

    let unreadable = fixture();
    fs::remove_file(unreadable.root.path().join("dev/nvme0n1")).unwrap();
    refused(unreadable.bind(BLANK), &["what nvme0n1 holds can't be read"]);

    let untold = fixture();
    untold.remove("sys/class/block/nvme0n1");
    refused(untold.bind(BLANK), &["nvme0n1 has no entry in /sys/class/block"]);

    let numberless = fixture();
    fs::remove_file(numberless.root.path().join("sys/class/block/nvme0n1/dev")).unwrap();
    refused(numberless.bind(BLANK), &["whether nvme0n1 is in use can't be told"]);
}

#[test]
fn force_takes_the_drive_it_names_and_no_other() {
    let f = fixture();
    let all = [pci(MOUNTED), pci(GPT_ONLY)];
    refused(plan::bind(&f.kernel, &all, DriverChoice::Auto, &[pci(MOUNTED)]), &["drive 0000:00:09.0 is left alone"]);
    let changes = plan::bind(&f.kernel, &all, DriverChoice::Auto, &all).unwrap();
    assert_eq!(changes.len(), 2);
    refused(plan::bind(&f.kernel, &[pci(BLANK)], DriverChoice::Auto, &[pci(MOUNTED)]), &["not to be bound"]);
}

#[test]
fn what_is_no_nvme_drive_is_refused() {
    let f = fixture();
    refused(f.bind(NETWORK), &["class 0x020000", "status"]);
    refused(f.bind("0000:7f:00.0"), &["there is no PCI device 0000:7f:00.0"]);
}

#[test]
fn driver_follows_the_machine_unless_named() {
    let driver_of = |outcome: Outcome<Vec<Change>>| match outcome.unwrap().remove(0) {
        Change::Driver { to, .. } => to.driver.unwrap(),
        other => panic!("{other:?}"),
    };
    let f = fixture();
    assert_eq!(driver_of(f.bind(BLANK)), "vfio-pci");
    let named = plan::bind(&f.kernel, &[pci(BLANK)], DriverChoice::UioPciGeneric, &[]);
    assert_eq!(driver_of(named), "uio_pci_generic");

    fs::remove_file(f.root.path().join("sys/bus/pci/devices").join(BLANK).join("iommu_group")).unwrap();
    assert_eq!(driver_of(f.bind(BLANK)), "uio_pci_generic");
    refused(plan::bind(&f.kernel, &[pci(BLANK)], DriverChoice::VfioPci, &[]), &["behind no IOMMU", "intel_iommu=on"]);

    f.remove("sys/bus/pci/drivers/uio_pci_generic");
    refused(f.bind(BLANK), &["modprobe uio_pci_generic"]);
    fs::create_dir_all(f.root.path().join("sys/module/vfio/parameters")).unwrap();
    f.put("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", b"Y\n");
    assert_eq!(driver_of(f.bind(BLANK)), "vfio-pci");
    f.remove("sys/bus/pci/drivers/vfio-pci");
    refused(plan::bind(&f.kernel, &[pci(BLANK)], DriverChoice::VfioPci, &[]), &["modprobe vfio-pci"]);
}

#[test]
fn group_shared_with_a_device_of_the_kernel_is_refused() {
    let f = fixture();
    f.put(&format!("sys/kernel/iommu_groups/4/devices/{NETWORK}"), b"");
    refused(f.bind(BLANK), &["shares IOMMU group 4 with 0000:00:03.0, which virtio-pci uses"]);
    // A drive that comes along is no obstacle.
    let f = fixture();
    f.put(&format!("sys/kernel/iommu_groups/4/devices/{IN_UIO}"), b"");
    refused(f.bind(BLANK), &["shares IOMMU group 4"]);
    assert_eq!(plan::bind(&f.kernel, &[pci(BLANK), pci(IN_UIO)], DriverChoice::VfioPci, &[]).unwrap().len(), 2);
}

#[test]
fn unbind_gives_drives_back_to_the_kernel() {
    let f = fixture();
    let changes = plan::unbind(&f.kernel, &[pci(IN_UIO), pci(BLANK)]).unwrap();
    assert_eq!(changes.len(), 1, "the blank one is the kernel's already");
    assert_eq!(changes[0].to_string(), "drive 0000:00:06.0: uio_pci_generic -> nvme");
    f.remove("sys/bus/pci/drivers/nvme");
    let changes = plan::unbind(&f.kernel, &[pci(IN_UIO)]).unwrap();
    assert_eq!(changes[0].to_string(), "drive 0000:00:06.0: uio_pci_generic -> no driver");
}

#[test]
fn impossible_reservations_are_refused() {
    let f = fixture();
    let reserve = |want: u64, page, nodes: &[u32]| plan::reserve(&f.kernel, Bytes(want), page, nodes);
    refused(reserve(3 << 20, None, &[]), &["not a number of whole pages of 2MiB", "for instance 4MiB"]);
    refused(reserve(0, None, &[]), &["for instance 2MiB"]);
    refused(reserve(u64::MAX, None, &[]), &["whole pages"]);
    refused(reserve(64 << 20, Some(Bytes(4096)), &[]), &["no hugepages of 4KiB", "2MiB, 1GiB"]);
    refused(reserve(64 << 20, None, &[7]), &["no NUMA node 7", "[0, 1]"]);
    refused(reserve(1 << 40, None, &[]), &["node 0 has", "ask for less"]);
    let changes = reserve(1 << 30, Some(Bytes(1 << 30)), &[1]).unwrap();
    assert_eq!(changes, [Change::Pages { node: 1, page_kib: 1 << 20, from: 0, to: 1 }]);
}

#[test]
fn machine_without_hugepages_says_so() {
    let f = fixture();
    f.remove("sys/devices/system/node");
    refused(plan::reserve(&f.kernel, Bytes(2 << 20), None, &[]), &["no hugepages", "--no-huge"]);
    // Without NUMA there is one pool, for the whole machine.
    let pool = f.root.path().join("sys/kernel/mm/hugepages/hugepages-2048kB");
    fs::create_dir_all(&pool).unwrap();
    fs::write(pool.join("nr_hugepages"), "0\n").unwrap();
    fs::write(pool.join("free_hugepages"), "0\n").unwrap();
    assert_eq!(plan::reserve(&f.kernel, Bytes(2 << 20), None, &[]).unwrap().len(), 1);
}

#[test]
fn mounts_that_would_hide_or_clash_are_refused() {
    let f = fixture();
    let mount = |path: &str, page| plan::mount(&f.kernel, path, page);
    refused(mount("/", None), &["over /"]);
    refused(mount("huge", None), &["no absolute path"]);
    refused(mount("/mnt/../etc", None), &["no absolute path"]);
    refused(mount("/proc", None), &["/proc is not empty"]);
    f.put("proc/self/mounts", b"none /mnt hugetlbfs rw,pagesize=1024M 0 0\n");
    refused(mount("/mnt", None), &["hugetlbfs already, with pages of 1GiB instead of 2MiB"]);
    assert_eq!(mount("/mnt", Some(Bytes(1 << 30))).unwrap(), []);
}
