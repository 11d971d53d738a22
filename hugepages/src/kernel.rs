//! The one door to the machine: sysfs, proc, device nodes, mounts. Everything else in this crate goes through
//! [`Kernel`], so that tests can stand another machine behind it, one that dies at any step.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

/// What is asked of the machine. Paths are absolute, as on the real machine.
pub trait Kernel {
    fn read(&self, path: &str) -> io::Result<String>;
    /// One write to a file that exists: how sysfs is told something.
    fn write(&mut self, path: &str, text: &str) -> io::Result<()>;
    /// Names in a directory, sorted; none if it is absent.
    fn list(&self, path: &str) -> io::Result<Vec<String>>;
    /// The last part of what a link points to; `None` if there is no link.
    fn link(&self, path: &str) -> Option<String>;
    fn exists(&self, path: &str) -> bool;
    /// Reads up to `buf.len()` bytes of a device; fewer only at its end.
    fn read_device(&self, path: &str, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
    /// Whether the kernel or a process holds the block device exclusively.
    fn is_claimed(&self, path: &str) -> io::Result<bool>;
    fn make_dir(&mut self, path: &str) -> io::Result<()>;
    fn remove_dir(&mut self, path: &str) -> io::Result<()>;
    fn mount_hugetlbfs(&mut self, path: &str, page_kib: u64) -> io::Result<()>;
    fn unmount(&mut self, path: &str) -> io::Result<()>;
}

/// The machine itself; or, for tests of the command line, a tree of files that looks like one.
pub struct Machine {
    root: PathBuf,
}

impl Machine {
    /// `root` is `/`, or a directory with `sys`, `proc` and `dev` below it.
    pub fn at(root: &Path) -> Self {
        Self { root: root.into() }
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn only_for_real(&self) -> io::Result<()> {
        if self.root == Path::new("/") {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::Unsupported, "mounts are made on the real machine alone, not under --root"))
    }
}

impl Kernel for Machine {
    fn read(&self, path: &str) -> io::Result<String> {
        fs::read_to_string(self.path(path))
    }

    fn write(&mut self, path: &str, text: &str) -> io::Result<()> {
        OpenOptions::new().write(true).truncate(true).open(self.path(path))?.write_all(text.as_bytes())
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.path(path)) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names = entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect::<io::Result<Vec<_>>>()?;
        names.sort_unstable();
        Ok(names)
    }

    fn link(&self, path: &str) -> Option<String> {
        let target = fs::read_link(self.path(path)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    fn read_device(&self, path: &str, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let device = fs::File::open(self.path(path))?;
        let mut got = 0;
        while got < buf.len() {
            match device.read_at(&mut buf[got..], offset + got as u64) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        Ok(got)
    }

    fn is_claimed(&self, path: &str) -> io::Result<bool> {
        let exclusive = rustix::fs::OFlags::EXCL.bits() as i32;
        match OpenOptions::new().read(true).custom_flags(exclusive).open(self.path(path)) {
            Ok(_) => Ok(false),
            Err(err) if err.kind() == io::ErrorKind::ResourceBusy => Ok(true),
            Err(err) => Err(err),
        }
    }

    fn make_dir(&mut self, path: &str) -> io::Result<()> {
        fs::create_dir(self.path(path))
    }

    fn remove_dir(&mut self, path: &str) -> io::Result<()> {
        fs::remove_dir(self.path(path))
    }

    fn mount_hugetlbfs(&mut self, path: &str, page_kib: u64) -> io::Result<()> {
        self.only_for_real()?;
        let options = std::ffi::CString::new(format!("pagesize={page_kib}K,mode=0700")).expect("digits");
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        Ok(rustix::mount::mount("hugetlbfs", self.path(path), "hugetlbfs", flags, options.as_c_str())?)
    }

    fn unmount(&mut self, path: &str) -> io::Result<()> {
        self.only_for_real()?;
        Ok(rustix::mount::unmount(self.path(path), UnmountFlags::empty())?)
    }
}
