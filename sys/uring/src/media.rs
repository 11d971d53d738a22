//! What the kernel says about the media under a drive: the file system, and whether a barrier means anything there.
//! Not here: proof. A device that lies about its cache is found by crash tests, not by reading sysfs.

use std::path::Path;

/// Whether an asynchronous fdatasync makes data durable on this drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Barrier {
    /// The device has a volatile cache, and a barrier flushes it.
    Flush,
    /// The device declares no volatile write cache: what it completed is durable.
    NotNeeded,
    /// The barrier ends before the media. Such a drive is refused unless the operator declares it power-safe.
    Missing { why: String },
}

/// A device number, as in `st_dev` and `st_rdev`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceNumber {
    pub major: u32,
    pub minor: u32,
}

impl DeviceNumber {
    pub fn of(dev: libc::dev_t) -> Self {
        Self { major: libc::major(dev), minor: libc::minor(dev) }
    }
}

/// One line of mountinfo, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub fs: String,
    options: Vec<String>,
}

impl Mount {
    /// The mount that holds files of device `dev`.
    pub fn of(dev: DeviceNumber) -> Option<Self> {
        Self::find(&std::fs::read_to_string("/proc/self/mountinfo").ok()?, dev)
    }

    /// Format: proc_pid_mountinfo(5). The last mount of a device wins; its super options are the same for all.
    fn find(mountinfo: &str, dev: DeviceNumber) -> Option<Self> {
        let wanted = format!("{}:{}", dev.major, dev.minor);
        mountinfo.lines().rev().find_map(|line| {
            let (head, tail) = line.split_once(" - ")?;
            if head.split(' ').nth(2)? != wanted {
                return None;
            }
            let mut fields = tail.split(' ');
            let fs = fields.next()?.to_string();
            let options = fields.nth(1).unwrap_or("").split(',').map(str::to_string).collect();
            Some(Self { fs, options })
        })
    }

    fn barrier(&self) -> Barrier {
        let off = self.options.iter().find(|o| ["nobarrier", "barrier=0", "volatile"].contains(&o.as_str()));
        match off {
            Some(option) => Barrier::Missing { why: format!("{} is mounted with {option}", self.fs) },
            None => Barrier::Flush,
        }
    }

    fn is_volatile(&self) -> bool {
        ["tmpfs", "ramfs", "devtmpfs", "hugetlbfs"].contains(&self.fs.as_str())
    }
}

/// Barrier and volatility of a regular file whose file system sits on `dev`.
pub(crate) fn of_file(dev: DeviceNumber) -> (Barrier, bool) {
    match Mount::of(dev) {
        Some(mount) => (mount.barrier(), mount.is_volatile()),
        // File systems with several devices (btrfs) show a device number that no mount has; they do honour fsync.
        None => (Barrier::Flush, false),
    }
}

/// Barrier and volatility of block device `dev`, a partition or a whole one.
pub(crate) fn of_block_device(sys_dev_block: &Path, dev: DeviceNumber) -> (Barrier, bool) {
    let dir = sys_dev_block.join(format!("{}:{}", dev.major, dev.minor));
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    // A partition has no queue of its own; its parent is one up (the entry is a link, so `..` is the disk).
    let cache = read("queue/write_cache").or_else(|| read("../queue/write_cache"));
    let barrier = match cache.as_deref().map(str::trim) {
        Some("write through") => Barrier::NotNeeded,
        Some("write back") => Barrier::Flush,
        Some(other) => Barrier::Missing { why: format!("the kernel reports an unknown write cache, \"{other}\"") },
        None => Barrier::Missing { why: "the kernel does not say whether the device caches writes".into() },
    };
    let uevent = read("uevent").unwrap_or_default();
    let name = uevent.lines().find_map(|l| l.strip_prefix("DEVNAME=")).unwrap_or("");
    (barrier, name.starts_with("zram") || name.starts_with("ram"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const MOUNTINFO: &str = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,errors=remount-ro
30 22 0:26 / /dev/shm rw,nosuid - tmpfs tmpfs rw,size=24684092k
31 22 8:1 / /mnt/with\\040space rw,noatime - xfs /dev/sda1 rw,nobarrier,inode64
32 22 8:2 / /old rw - ext4 /dev/sda2 rw,barrier=0
garbage
";

    fn mount(major: u32, minor: u32) -> Option<Mount> {
        Mount::find(MOUNTINFO, DeviceNumber { major, minor })
    }

    #[test]
    fn mountinfo_tells_file_system_and_barrier() {
        let root = mount(254, 0).unwrap();
        assert_eq!((root.fs.as_str(), root.barrier(), root.is_volatile()), ("ext4", Barrier::Flush, false));
        let shm = mount(0, 26).unwrap();
        assert_eq!((shm.fs.as_str(), shm.is_volatile()), ("tmpfs", true));
        let xfs = mount(8, 1).unwrap().barrier();
        assert_eq!(xfs, Barrier::Missing { why: "xfs is mounted with nobarrier".into() });
        assert!(matches!(mount(8, 2).unwrap().barrier(), Barrier::Missing { .. }));
        assert_eq!(mount(8, 3), None);
    }

    #[test]
    fn block_device_write_cache_decides_the_barrier() {
        let sys = tempfile::tempdir().unwrap();
        let disk = sys.path().join("8:0");
        fs::create_dir_all(disk.join("queue")).unwrap();
        fs::create_dir_all(disk.join("sda1")).unwrap();
        std::os::unix::fs::symlink(disk.join("sda1"), sys.path().join("8:1")).unwrap();
        let ask = |minor| of_block_device(sys.path(), DeviceNumber { major: 8, minor });

        assert!(matches!(ask(0), (Barrier::Missing { .. }, false)));
        fs::write(disk.join("queue/write_cache"), "write back\n").unwrap();
        fs::write(disk.join("uevent"), "MAJOR=8\nDEVNAME=sda\n").unwrap();
        assert_eq!(ask(0), (Barrier::Flush, false));
        assert_eq!(ask(1), (Barrier::Flush, false), "a partition asks its disk");
        fs::write(disk.join("queue/write_cache"), "write through\n").unwrap();
        fs::write(disk.join("uevent"), "DEVNAME=zram0\n").unwrap();
        assert_eq!(ask(0), (Barrier::NotNeeded, true));
    }
}
