//! Builds what a guest boots from: a kernel found in the cache and an initramfs made of busybox, kernel modules, the
//! programs a test wants with their shared libraries, and an init script that starts the agent.
//!
//! The slow part (modules, fio, libraries) is a base archive, cached outside the checkout under a key of everything that
//! went into it. What changes with each build (the agent, programs of ours) is an overlay appended per run.
//! Not here: downloads. `tests/guest/deps.sh` does those, and its name is in the error when something is missing.

use super::cpio::Archive;
use super::modules::ModuleTree;
use super::{At, GuestError, Result, cache_dir};
use std::collections::BTreeSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

const REMEDY: &str = "run tests/guest/deps.sh";

/// An unpacked kernel: `vmlinuz` and the directory of its modules.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub vmlinuz: PathBuf,
    pub modules: PathBuf,
}

impl Kernel {
    /// `$PENSTOCK_GUEST_KERNEL`, else the last by name under the cache's `guest-kernel/`.
    pub fn find() -> Result<Self> {
        if let Some(dir) = std::env::var_os("PENSTOCK_GUEST_KERNEL") {
            return Self::at(Path::new(&dir));
        }
        let root = cache_dir().join("guest-kernel");
        let mut found: Vec<PathBuf> = std::fs::read_dir(&root)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|dir| !dir.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.')))
            .filter(|dir| dir.join("vmlinuz").is_file())
            .collect();
        found.sort();
        match found.pop() {
            Some(dir) => Self::at(&dir),
            None => Err(GuestError::Missing { what: format!("a guest kernel under {}", root.display()), remedy: REMEDY.into() }),
        }
    }

    fn at(dir: &Path) -> Result<Self> {
        let kernel = Kernel { vmlinuz: dir.join("vmlinuz"), modules: dir.join("modules") };
        if kernel.vmlinuz.is_file() && kernel.modules.is_dir() {
            Ok(kernel)
        } else {
            Err(GuestError::Missing { what: format!("vmlinuz or modules/ in {}", dir.display()), remedy: REMEDY.into() })
        }
    }
}

/// What goes into a base archive.
#[derive(Debug, Clone)]
pub struct ImageSpec {
    pub name: &'static str,
    /// Loaded by init in this order, dependencies first.
    pub modules: Vec<&'static str>,
    /// Host programs, put into /usr/bin with the libraries that ldd names.
    pub programs: Vec<PathBuf>,
    /// Single host files and where they go (no leading slash).
    pub files: Vec<(PathBuf, String)>,
}

const MODULES_ALWAYS: [&str; 3] = ["virtio_pci", "virtio_console", "virtio_rng"];

impl ImageSpec {
    /// A guest that is a host of storage: Linux's initiators, file system tools and fio.
    pub fn storage_host() -> Result<Self> {
        Ok(ImageSpec {
            name: "storage-host",
            modules: vec!["virtio_net", "virtio_blk", "nvme_tcp", "crc32c_intel", "crc32c_generic"],
            programs: vec![program("fio")?, program("mkfs.ext4")?, program("e2fsck")?],
            files: Vec::new(),
        })
    }

    /// A guest that runs the data plane itself: NVMe through uio, hugepages, and Linux's initiator to reach it over
    /// loopback. The programs of ours go into the overlay; `libraries_of` names one whose libraries are wanted.
    pub fn data_plane() -> Result<Self> {
        let mut files = Vec::new();
        let openssl = PathBuf::from("/etc/ssl/openssl.cnf"); // SPDK's sock layer reads it at start
        if openssl.is_file() {
            files.push((openssl, "usr/lib/ssl/openssl.cnf".to_owned()));
        }
        Ok(ImageSpec {
            name: "data-plane",
            modules: vec!["uio_pci_generic", "virtio_net", "virtio_blk", "nvme_tcp", "crc32c_intel", "crc32c_generic"],
            programs: Vec::new(),
            files,
        })
    }

    /// Builds the base archive, or finds it built.
    pub fn build(&self) -> Result<Image> {
        let kernel = Kernel::find()?;
        let contents = self.contents(&kernel)?;
        let root = cache_dir();
        std::fs::create_dir_all(&root).at("create", &root)?;
        let prefix = format!("guest-{}-", self.name);
        let base = root.join(format!("{prefix}{:016x}.cpio", contents.key()));
        if !base.is_file() {
            let unfinished = tempfile::NamedTempFile::new_in(&root).at("create a file in", &root)?;
            contents.write(unfinished.as_file()).at("write", unfinished.path())?;
            unfinished.persist(&base).map_err(|e| e.error).at("name", &base)?;
            remove_older(&root, &prefix, &base);
        }
        Ok(Image { kernel, base })
    }

    fn contents(&self, kernel: &Kernel) -> Result<Contents> {
        let mut contents = Contents::default();
        contents.add(program("busybox")?, "bin/busybox");
        let wanted: Vec<&str> = MODULES_ALWAYS.iter().chain(&self.modules).copied().collect();
        for (place, module) in ModuleTree::scan(&kernel.modules)?.load_order(&wanted)?.into_iter().enumerate() {
            let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
            contents.add(module, &format!("modules/{place:03}-{name}"));
        }
        for host in &self.programs {
            let name = host.file_name().unwrap_or_default().to_string_lossy().into_owned();
            contents.add(host.clone(), &format!("usr/bin/{name}"));
            contents.libraries(host)?;
        }
        for (host, place) in &self.files {
            contents.add(host.clone(), place);
        }
        Ok(contents)
    }
}

/// Something to boot: a kernel and the base archive.
#[derive(Debug, Clone)]
pub struct Image {
    pub kernel: Kernel,
    base: PathBuf,
}

/// What is appended to a base archive for one run.
#[derive(Debug, Default)]
pub struct Overlay {
    contents: Contents,
}

impl Overlay {
    /// The init script and the agent that every guest needs.
    pub fn with_agent(agent: &Path) -> Result<Self> {
        let mut overlay = Overlay::default();
        overlay.program(agent, "agent")?;
        Ok(overlay)
    }

    /// A program of ours as /usr/bin/`name`, with its libraries.
    pub fn program(&mut self, host: &Path, name: &str) -> Result<()> {
        if !host.is_file() {
            return Err(GuestError::Missing { what: format!("program {}", host.display()), remedy: "build it first".into() });
        }
        self.contents.add(host.to_owned(), &format!("usr/bin/{name}"));
        self.contents.libraries(host)
    }

    /// A host file at `place` (no leading slash).
    pub fn file(&mut self, host: &Path, place: &str) {
        self.contents.add(host.to_owned(), place);
    }
}

impl Image {
    /// Writes base and overlay as one initramfs to `place`.
    pub fn assemble(&self, overlay: &Overlay, place: &Path) -> Result<()> {
        std::fs::copy(&self.base, place).at("copy the base archive to", place)?;
        let file = File::options().append(true).open(place).at("open", place)?;
        overlay.contents.write(&file).at("write", place)
    }
}

/// Guest path to host path, and whether init is written too.
#[derive(Debug, Default)]
struct Contents {
    members: Vec<(String, PathBuf)>,
    present: BTreeSet<String>,
}

impl Contents {
    fn add(&mut self, host: PathBuf, place: &str) {
        if self.present.insert(place.to_owned()) {
            self.members.push((place.to_owned(), host));
        }
    }

    /// Adds what the loader would load, each at the very path where it was found, so that run paths stay true.
    fn libraries(&mut self, host: &Path) -> Result<()> {
        let output = Command::new("ldd").arg(host).output().at("run ldd on", host)?;
        let listing = String::from_utf8_lossy(&output.stdout);
        for line in listing.lines() {
            if line.contains("not found") {
                return Err(GuestError::Missing {
                    what: format!("a library of {}: {}", host.display(), line.trim()),
                    remedy: "install the package that holds it".into(),
                });
            }
            if let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')) {
                self.add(PathBuf::from(path), path.trim_start_matches('/'));
            }
        }
        Ok(())
    }

    fn key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        INIT.hash(&mut hasher);
        for (place, host) in &self.members {
            place.hash(&mut hasher);
            host.hash(&mut hasher);
            if let Ok(meta) = std::fs::metadata(host) {
                meta.len().hash(&mut hasher);
                meta.modified().ok().hash(&mut hasher);
            }
        }
        hasher.finish()
    }

    fn write(&self, file: &File) -> std::io::Result<()> {
        let mut archive = Archive::new(BufWriter::new(file));
        archive.console()?;
        for dir in ["proc", "sys", "run", "tmp", "var/run", "var/tmp", "mnt", "bin", "sbin", "etc"] {
            archive.directory(dir)?;
        }
        archive.file("init", 0o755, INIT.as_bytes())?;
        for (place, host) in &self.members {
            let named = |e: std::io::Error| std::io::Error::new(e.kind(), format!("{}: {e}", host.display()));
            archive.file(place, 0o755, &std::fs::read(host).map_err(named)?)?;
        }
        archive.finish()?.into_inner().map_err(|e| e.into_error())?;
        Ok(())
    }
}

const INIT: &str = r#"#!/bin/busybox sh
export PATH=/usr/bin:/bin:/sbin:/usr/sbin HOME=/ TERM=dumb
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/hugepages /dev/shm
mount -t hugetlbfs hugetlbfs /dev/hugepages
mount -t tmpfs tmpfs /dev/shm
echo 1 > /proc/sys/kernel/panic_on_oops
for module in /modules/*; do insmod $module || echo "init: $module did not load"; done
ifconfig lo 127.0.0.1 up
# QEMU's user networking: the guest is 10.0.2.15, the host's loopback is 10.0.2.2
[ -e /sys/class/net/eth0 ] && ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
exec /usr/bin/agent
"#;

/// A program of the host by name, in PATH or where administrators' programs live.
pub(super) fn program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/sbin", "/usr/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| GuestError::Missing { what: format!("program {name}"), remedy: REMEDY.into() })
}

/// Archives of the same name with another key are of no use any more.
fn remove_older(root: &Path, prefix: &str, keep: &Path) {
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let path = entry.path();
        let ours = entry.file_name().to_string_lossy().starts_with(prefix) && path.extension().is_some_and(|e| e == "cpio");
        if ours && path != keep {
            let _ = std::fs::remove_file(path); // a leftover costs space, nothing else
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_given_one_place_twice_keep_the_first() {
        let mut contents = Contents::default();
        contents.add("/a".into(), "lib/x");
        contents.add("/b".into(), "lib/x");
        assert_eq!(contents.members, [("lib/x".to_owned(), PathBuf::from("/a"))]);
    }

    #[test]
    fn key_changes_when_a_file_changes_size() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        let mut contents = Contents::default();
        contents.add(file.clone(), "f");
        std::fs::write(&file, "1").unwrap();
        let before = contents.key();
        std::fs::write(&file, "22").unwrap();
        assert_ne!(before, contents.key());
    }

    #[test]
    fn overlay_of_an_absent_program_says_which() {
        let err = Overlay::with_agent(Path::new("/nonexistent/agent")).unwrap_err();
        assert!(err.to_string().contains("/nonexistent/agent"), "{err}");
    }
}
