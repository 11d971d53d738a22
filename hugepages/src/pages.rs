//! Hugepages: what each NUMA node has, and where hugetlbfs is mounted.

use serde::Serialize;

use crate::kernel::Kernel;
use crate::size::Bytes;
use crate::{Outcome, Problem};

/// Pages of one size on one NUMA node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PagePool {
    pub node: u32,
    pub page_size: Bytes,
    /// Pages reserved, and those of them that nobody uses.
    pub pages: u64,
    pub pages_free: u64,
}

/// A mounted hugetlbfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HugeMount {
    pub path: String,
    pub page_size: Bytes,
}

const NODES: &str = "/sys/devices/system/node";
const WHOLE_MACHINE: &str = "/sys/kernel/mm/hugepages";

/// Where the kernel keeps the pool's numbers. Kernels without NUMA have one place for all; it is called node 0 here.
pub fn pool_dir(kernel: &dyn Kernel, node: u32, page_kib: u64) -> String {
    let of_node = format!("{NODES}/node{node}/hugepages");
    let place = if kernel.exists(&of_node) { of_node } else { WHOLE_MACHINE.into() };
    format!("{place}/hugepages-{page_kib}kB")
}

/// All pools, by node and page size.
pub fn pools(kernel: &dyn Kernel) -> Outcome<Vec<PagePool>> {
    let names = kernel.list(NODES).map_err(|e| Problem::io(NODES, &e))?;
    let mut nodes: Vec<u32> = names.iter().filter_map(|n| n.strip_prefix("node")?.parse().ok()).collect();
    nodes.sort_unstable();
    nodes.retain(|node| kernel.exists(&format!("{NODES}/node{node}/hugepages")));
    let mut places: Vec<(u32, String)> = nodes.into_iter().map(|n| (n, format!("{NODES}/node{n}/hugepages"))).collect();
    if places.is_empty() && kernel.exists(WHOLE_MACHINE) {
        places.push((0, WHOLE_MACHINE.into()));
    }
    let mut pools = Vec::new();
    for (node, place) in places {
        let names = kernel.list(&place).map_err(|e| Problem::io(&place, &e))?;
        let mut sizes: Vec<u64> = names.iter().filter_map(|n| page_kib_of(n)).collect();
        sizes.sort_unstable();
        for page_kib in sizes {
            let dir = format!("{place}/hugepages-{page_kib}kB");
            let (pages, pages_free) = (read_number(kernel, &dir, "nr_hugepages")?, read_number(kernel, &dir, "free_hugepages")?);
            pools.push(PagePool { node, page_size: Bytes(page_kib << 10), pages, pages_free });
        }
    }
    if pools.is_empty() {
        let next = "use a kernel with CONFIG_HUGETLBFS, or start penstockd with --no-huge";
        return Err(Problem::new("this kernel has no hugepages", next));
    }
    Ok(pools)
}

fn page_kib_of(name: &str) -> Option<u64> {
    let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    (kib > 0 && kib < 1 << 40).then_some(kib)
}

pub fn read_number(kernel: &dyn Kernel, dir: &str, name: &str) -> Outcome<u64> {
    let path = format!("{dir}/{name}");
    let text = kernel.read(&path).map_err(|e| Problem::io(&path, &e))?;
    text.trim().parse().map_err(|_| Problem::new(format!("{path} says {:?}, not a number", text.trim()), "is this sysfs?"))
}

/// Mounted hugetlbfs instances, in mount order.
pub fn mounts(kernel: &dyn Kernel) -> Outcome<Vec<HugeMount>> {
    let path = "/proc/self/mounts";
    let text = kernel.read(path).map_err(|e| Problem::io(path, &e))?;
    let default = default_page_size(kernel).unwrap_or(Bytes(2 << 20));
    Ok(text.lines().filter_map(|line| huge_mount(line, default)).collect())
}

fn default_page_size(kernel: &dyn Kernel) -> Option<Bytes> {
    let meminfo = kernel.read("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("Hugepagesize:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024).map(Bytes)
}

/// Format: fstab(5), with blanks as \040.
fn huge_mount(line: &str, default: Bytes) -> Option<HugeMount> {
    let mut fields = line.split(' ').skip(1);
    let (path, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
    if kind != "hugetlbfs" {
        return None;
    }
    let size = options.split(',').find_map(|o| o.strip_prefix("pagesize=")?.parse().ok()).unwrap_or(default);
    Some(HugeMount { path: unescape(path), page_size: size })
}

/// Undoes proc's octal escapes.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut out = parts.next().unwrap_or("").to_string();
    for part in parts {
        match part.get(..3).and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                out.push_str(&part[3..]);
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hugetlbfs_mounts_are_found_with_their_page_size() {
        let default = Bytes(2 << 20);
        let found = |line| huge_mount(line, default).map(|m| (m.path, m.page_size.0));
        assert_eq!(found("none /dev/hugepages hugetlbfs rw,relatime,pagesize=2M 0 0"), Some(("/dev/hugepages".into(), 2 << 20)));
        assert_eq!(found("x /mnt/a\\040b hugetlbfs rw,pagesize=1024M 0 0"), Some(("/mnt/a b".into(), 1 << 30)));
        assert_eq!(found("x /mnt hugetlbfs rw 0 0"), Some(("/mnt".into(), 2 << 20)));
        assert_eq!(found("/dev/vda / ext4 rw 0 0"), None);
        assert_eq!(found("short"), None);
    }

    #[test]
    fn page_sizes_come_from_directory_names() {
        assert_eq!(page_kib_of("hugepages-2048kB"), Some(2048));
        for name in ["hugepages-kB", "hugepages-0kB", "nr_hugepages", "hugepages-2048", "hugepages-99999999999999999kB"] {
            assert_eq!(page_kib_of(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_line_is_a_mount_or_not(line in ".*", escaped in "[\\\\0-7a-zé]*") {
            let _ = huge_mount(&line, Bytes(0));
            let _ = unescape(&escaped);
            let _ = huge_mount(&format!("a {escaped} hugetlbfs pagesize={line} 0 0"), Bytes(0));
        }
    }
}
