//! A machine made of files, with the parts of the kernel's behaviour that matter here: drivers take and lose devices,
//! namespaces come and go with the nvme driver, memory runs out, and the process can die at any step.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::panic::panic_any;
use std::path::{Path, PathBuf};

use penstock_hugepages::kernel::{Kernel, Machine};
use penstock_hugepages::pci::PciAddress;

pub const BLANK: &str = "0000:00:04.0";
pub const MOUNTED: &str = "0000:00:05.0";
pub const IN_UIO: &str = "0000:00:06.0";
pub const LVM: &str = "0000:00:07.0";
pub const NO_DRIVER: &str = "0000:00:08.0";
pub const GPT_ONLY: &str = "0000:00:09.0";
pub const NETWORK: &str = "0000:00:03.0";

pub fn pci(text: &str) -> PciAddress {
    text.parse().unwrap()
}

/// What a killed process unwinds with.
pub struct Died;

/// When the process dies: at the n-th step, before or after the step took effect.
#[derive(Clone, Copy, Debug)]
pub struct Death {
    pub step: u32,
    pub after: bool,
}

pub struct FakeKernel {
    pub machine: Machine,
    root: PathBuf,
    pub death: Option<Death>,
    pub steps: u32,
    /// Pages that each node can give at most.
    pub page_limit: u64,
    /// A driver that refuses every device.
    pub stubborn_driver: Option<&'static str>,
}

impl FakeKernel {
    pub fn at(root: &Path) -> Self {
        let machine = Machine::at(root);
        Self { machine, root: root.into(), death: None, steps: 0, page_limit: 1000, stubborn_driver: None }
    }

    /// Dies here if it is time to; `effect` in between.
    fn step<T>(&mut self, effect: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        let now = self.death.filter(|d| d.step == self.steps);
        self.steps += 1;
        if now.is_some_and(|d| !d.after) {
            panic_any(Died);
        }
        let outcome = effect(self);
        if now.is_some() {
            panic_any(Died);
        }
        outcome
    }

    fn file(&self, path: &str) -> PathBuf {
        self.machine.path(path)
    }

    fn unbind(&self, address: &str) -> io::Result<()> {
        let device = self.file(&format!("/sys/bus/pci/devices/{address}"));
        if self.machine.link(&format!("/sys/bus/pci/devices/{address}/driver")).as_deref() == Some("nvme") {
            fs::rename(device.join("nvme"), self.root.join("asleep").join(address))?;
        }
        fs::remove_file(device.join("driver"))
    }

    fn probe(&self, address: &str) -> io::Result<()> {
        let path = format!("/sys/bus/pci/devices/{address}");
        let device = self.file(&path);
        if device.join("driver").exists() {
            return Ok(());
        }
        let wanted = self.machine.read(&format!("{path}/driver_override"))?;
        let driver = match wanted.trim() {
            "(null)" => "nvme",
            name => name,
        };
        let there = self.file(&format!("/sys/bus/pci/drivers/{driver}"));
        if !there.exists() || self.stubborn_driver == Some(driver) {
            return Err(io::Error::from_raw_os_error(22));
        }
        symlink(&there, device.join("driver"))?;
        if driver == "nvme" {
            fs::rename(self.root.join("asleep").join(address), device.join("nvme"))?;
        }
        Ok(())
    }
}

impl Kernel for FakeKernel {
    fn read(&self, path: &str) -> io::Result<String> {
        self.machine.read(path)
    }

    fn write(&mut self, path: &str, text: &str) -> io::Result<()> {
        self.step(|this| {
            if path.ends_with("/driver/unbind") {
                return this.unbind(text.trim());
            }
            if path == "/sys/bus/pci/drivers_probe" {
                return this.probe(text.trim());
            }
            if path.ends_with("/driver_override") && text.trim().is_empty() {
                return this.machine.write(path, "(null)\n");
            }
            if let Some(dir) = path.strip_suffix("/nr_hugepages") {
                let number = |name: &str| -> u64 { this.read(&format!("{dir}/{name}")).unwrap().trim().parse().unwrap() };
                let used = number("nr_hugepages") - number("free_hugepages");
                let pages = text.trim().parse::<u64>().unwrap().clamp(used, this.page_limit.max(used));
                this.machine.write(&format!("{dir}/free_hugepages"), &format!("{}\n", pages - used))?;
                return this.machine.write(path, &format!("{pages}\n"));
            }
            this.machine.write(path, text)
        })
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        self.machine.list(path)
    }

    fn link(&self, path: &str) -> Option<String> {
        self.machine.link(path)
    }

    fn exists(&self, path: &str) -> bool {
        self.machine.exists(path)
    }

    fn read_device(&self, path: &str, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.machine.read_device(path, offset, buf)
    }

    fn is_claimed(&self, path: &str) -> io::Result<bool> {
        Ok(self.machine.exists(&format!("{path}.claimed")))
    }

    fn make_dir(&mut self, path: &str) -> io::Result<()> {
        self.step(|this| this.machine.make_dir(path))
    }

    fn remove_dir(&mut self, path: &str) -> io::Result<()> {
        self.step(|this| this.machine.remove_dir(path))
    }

    fn mount_hugetlbfs(&mut self, path: &str, page_kib: u64) -> io::Result<()> {
        self.step(|this| {
            assert!(this.file(path).is_dir(), "mounting at {path}, which is no directory");
            let mounts = this.read("/proc/self/mounts")?;
            let line = format!("hugetlbfs {path} hugetlbfs rw,relatime,pagesize={}M 0 0\n", page_kib >> 10);
            fs::write(this.file("/proc/self/mounts"), mounts + &line)
        })
    }

    fn unmount(&mut self, path: &str) -> io::Result<()> {
        self.step(|this| {
            let mounts = this.read("/proc/self/mounts")?;
            let kept: Vec<&str> = mounts.lines().filter(|l| l.split(' ').nth(1) != Some(path)).collect();
            assert_eq!(kept.len() + 1, mounts.lines().count(), "{path} is mounted once");
            fs::write(this.file("/proc/self/mounts"), kept.join("\n") + "\n")
        })
    }
}

/// A tree under construction.
struct Tree<'a>(&'a Path);

impl Tree<'_> {
    fn put(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.0.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn dir(&self, path: &str) {
        fs::create_dir_all(self.0.join(path.trim_start_matches('/'))).unwrap();
    }

    fn link(&self, path: &str, to: &str) {
        symlink(self.0.join(to.trim_start_matches('/')), self.0.join(path.trim_start_matches('/'))).unwrap();
    }

    fn device(&self, address: &str, class: &str, driver: Option<&str>, group: u32) {
        let dir = format!("/sys/bus/pci/devices/{address}");
        self.put(&format!("{dir}/class"), format!("{class}\n"));
        self.put(&format!("{dir}/numa_node"), "0\n");
        self.put(&format!("{dir}/driver_override"), "(null)\n");
        self.put(&format!("/sys/kernel/iommu_groups/{group}/devices/{address}"), "");
        self.link(&format!("{dir}/iommu_group"), &format!("/sys/kernel/iommu_groups/{group}"));
        if let Some(driver) = driver {
            self.link(&format!("{dir}/driver"), &format!("/sys/bus/pci/drivers/{driver}"));
        }
    }

    /// A namespace of 1 MiB; `path_name` is its name under the controller.
    fn namespace(&self, address: &str, controller: &str, path_name: &str, disk: &str, minor: u32) {
        let dir = format!("/sys/bus/pci/devices/{address}/nvme/{controller}");
        self.put(&format!("{dir}/model"), "Fake NVMe    \n");
        self.dir(&format!("{dir}/{path_name}"));
        self.put(&format!("/sys/class/block/{disk}/size"), "2048\n");
        self.put(&format!("/sys/class/block/{disk}/dev"), format!("259:{minor}\n"));
        self.dir(&format!("/sys/class/block/{disk}/holders"));
        self.put(&format!("/dev/{disk}"), vec![0; 1 << 20]);
    }
}

/// Two NUMA nodes and six NVMe drives, each in another state.
pub fn build(root: &Path) {
    let tree = Tree(root);
    for node in 0..2 {
        let dir = format!("/sys/devices/system/node/node{node}");
        tree.put(&format!("{dir}/meminfo"), format!("Node {node} MemFree:  4194304 kB\nNode {node} FilePages:  1024 kB\n"));
        for (kib, pages) in [(2048, 3), (1_048_576, 0)] {
            tree.put(&format!("{dir}/hugepages/hugepages-{kib}kB/nr_hugepages"), format!("{pages}\n"));
            // One page is in use, where there are any.
            tree.put(&format!("{dir}/hugepages/hugepages-{kib}kB/free_hugepages"), format!("{}\n", u32::max(pages, 1) - 1));
        }
    }
    tree.put("/proc/meminfo", "Hugepagesize:       2048 kB\n");
    tree.put("/proc/self/mounts", "/dev/vda / ext4 rw 0 0\n");
    tree.put("/proc/self/mountinfo", "36 35 259:11 / /srv rw shared:1 - ext4 /dev/nvme1n1p1 rw\n");
    tree.put("/proc/swaps", "Filename Type Size Used Priority\n");
    tree.put("/proc/sys/kernel/random/boot_id", "boot-1\n");
    tree.put("/sys/bus/pci/drivers_probe", "");
    for driver in ["nvme", "vfio-pci", "uio_pci_generic", "virtio-pci"] {
        tree.put(&format!("/sys/bus/pci/drivers/{driver}/unbind"), "");
    }
    tree.dir("/sys/class/iommu/dmar0");
    tree.dir("/asleep");
    tree.dir("/mnt");

    tree.device(NETWORK, "0x020000", Some("virtio-pci"), 3);
    tree.device(BLANK, "0x010802", Some("nvme"), 4);
    tree.namespace(BLANK, "nvme0", "nvme0n1", "nvme0n1", 0);
    tree.device(MOUNTED, "0x010802", Some("nvme"), 5);
    tree.namespace(MOUNTED, "nvme1", "nvme1n1", "nvme1n1", 10);
    tree.put("/sys/class/block/nvme1n1/nvme1n1p1/partition", "1\n");
    tree.put("/sys/class/block/nvme1n1p1/dev", "259:11\n");
    tree.dir("/sys/class/block/nvme1n1p1/holders");
    tree.device(IN_UIO, "0x010802", Some("uio_pci_generic"), 6);
    tree.device(LVM, "0x010802", Some("nvme"), 7);
    tree.namespace(LVM, "nvme2", "nvme2c2n1", "nvme2n1", 20);
    tree.dir("/sys/class/block/nvme2n1/holders/dm-0");
    tree.device(NO_DRIVER, "0x010802", None, 8);
    tree.dir(&format!("/asleep/{NO_DRIVER}"));
    tree.device(GPT_ONLY, "0x010802", Some("nvme"), 9);
    tree.namespace(GPT_ONLY, "nvme3", "nvme3n1", "nvme3n1", 30);
    let mut disk = vec![0; 1 << 20];
    disk[512..520].copy_from_slice(b"EFI PART");
    tree.put("/dev/nvme3n1", disk);
}

/// Everything below `root` but the journal: files with their content, links with their targets, directories.
pub fn snapshot(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            if path.starts_with(root.join("run")) || path.starts_with(root.join("dev")) {
                continue;
            }
            let content = if meta.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else if meta.is_dir() {
                todo.push(path.clone());
                "directory".into()
            } else {
                fs::read_to_string(&path).unwrap()
            };
            all.insert(path, content);
        }
    }
    all
}
