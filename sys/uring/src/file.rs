//! An opened drive: a regular file or a block device, with `O_DIRECT`, a size, a block size and an exclusive lock.
//! Not here: I/O (see [`crate::Ring`]), and drive labels (the engine's).

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Errno, OpenError};
use crate::media::{self, Barrier, DeviceNumber, Mount};

/// What stands behind the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    Regular,
    BlockDevice,
}

/// What a discard does to a regular file. A block device always deallocates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileDiscard {
    /// The range reads as zeros and keeps its space, so that a later write can't meet a full file system. Needs
    /// `FALLOC_FL_ZERO_RANGE` (ext4, xfs, btrfs).
    #[default]
    KeepSpace,
    /// The range goes back to the file system as a hole. A later write may then fail with ENOSPC.
    Release,
}

/// How to open a drive.
#[derive(Clone, Debug)]
pub struct OpenOpts {
    /// Bytes, a multiple of 4096. If the file is absent (or empty, as a crash while creating leaves it) it is created
    /// with this size and its space is reserved; if present, its size must be this one.
    pub size: Option<u64>,
    /// Writes, barriers and discards are refused. The lock is exclusive all the same.
    pub read_only: bool,
    pub discard: FileDiscard,
    /// How long to wait for a drive in use. A child of a fork holds the lock until its exec: seen. A process killed
    /// under load was never seen to leave it behind (100 kills), but its requests may keep the file open while they last.
    pub lock_wait: Duration,
}

impl Default for OpenOpts {
    fn default() -> Self {
        Self { size: None, read_only: false, discard: FileDiscard::default(), lock_wait: Duration::from_secs(2) }
    }
}

/// An opened and locked drive. Closing it releases the lock. All cores of a process share one (`Arc`).
#[derive(Debug)]
pub struct UringFile {
    fd: OwnedFd,
    path: PathBuf,
    kind: FileKind,
    size: u64,
    block_size: u32,
    memory_align: u32,
    read_only: bool,
    discard: FileDiscard,
    barrier: Barrier,
    volatile: bool,
}

/// A size must be a multiple of this: the block of the engine, and of every file system that matters.
const SIZE_STEP: u64 = 4096;

impl UringFile {
    /// Barrier and volatility that a file would have which is made at `path`: those of the file system of its directory.
    ///
    /// # Errors
    /// When the directory is not there or cannot be entered.
    pub fn prospect(path: impl AsRef<Path>) -> Result<(Barrier, bool), OpenError> {
        let path = path.as_ref();
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let stat = Stat::of_path(dir).map_err(|errno| os(path, errno, "Make its directory first"))?;
        Ok(media::of_file(DeviceNumber::of(stat.0.st_dev)))
    }

    /// Opens `path` for direct I/O and locks it. Blocking; for the start of a drive, not for the loop.
    ///
    /// # Errors
    /// [`OpenError`] names the path, what was found and what to do: absent without a size, a size that differs, no
    /// `O_DIRECT` on this file system (refused at once, or taken silently as buffered), in use by another process or by
    /// the kernel (mounted, swap, part of a volume group), no space.
    pub fn open(path: impl AsRef<Path>, opts: &OpenOpts) -> Result<Arc<Self>, OpenError> {
        let path = path.as_ref();
        let before = match Stat::of_path(path) {
            Ok(stat) => Some(stat),
            Err(Errno(libc::ENOENT)) => None,
            Err(errno) => return Err(os(path, errno, "Check that the directory can be entered")),
        };
        let creating = before.is_none();
        if creating && opts.size.is_none() {
            return Err(OpenError::Absent { path: path.into() });
        }
        if let Some(size) = opts.size {
            check_size(path, size)?;
        }
        let is_block = match before.map(|s| s.0.st_mode & libc::S_IFMT) {
            None | Some(libc::S_IFREG) => false,
            Some(libc::S_IFBLK) => true,
            Some(other) => return Err(OpenError::NotADrive { path: path.into(), found: name_of_type(other) }),
        };

        let mut flags = libc::O_CLOEXEC | libc::O_DIRECT;
        flags |= if opts.read_only { libc::O_RDONLY } else { libc::O_RDWR };
        flags |= if is_block { libc::O_EXCL } else { 0 };
        flags |= if creating { libc::O_CREAT } else { 0 };
        let deadline = Instant::now() + opts.lock_wait;
        let fd = match until(deadline, libc::EBUSY, || open(path, flags)) {
            Ok(fd) => fd,
            Err(Errno(libc::EINVAL)) => {
                if creating {
                    remove_if_empty(path);
                }
                return Err(OpenError::NoDirectIo { path: path.into(), fs: fs_name(path) });
            }
            Err(Errno(libc::EBUSY)) => {
                return Err(OpenError::InUse { path: path.into(), by: " by the kernel (mounted, swap, or held)".into() });
            }
            Err(errno) => return Err(os(path, errno, "Check its permissions and those of its directory")),
        };
        let stat = Stat::of_fd(&fd).map_err(|errno| os(path, errno, "The file could not be examined"))?;
        lock(path, &fd, &stat, deadline)?;

        let mut file = Self {
            fd,
            path: path.into(),
            kind: if is_block { FileKind::BlockDevice } else { FileKind::Regular },
            size: 0,
            block_size: 0,
            memory_align: 0,
            read_only: opts.read_only,
            discard: opts.discard,
            barrier: Barrier::Flush,
            volatile: false,
        };
        file.prove_direct_io().inspect_err(|_| {
            if creating {
                remove_if_empty(path);
            }
        })?;
        if is_block {
            file.measure_block_device(&stat, opts)?;
        } else {
            file.measure_regular(&stat, opts)?;
        }
        Ok(Arc::new(file))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Usable bytes: whole blocks.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Logical block size in bytes, a power of two: offsets and lengths are multiples of it.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Bytes to which the address of every slice must be aligned.
    pub fn memory_align(&self) -> u32 {
        self.memory_align
    }

    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// What the kernel says a barrier is worth here.
    pub fn barrier(&self) -> &Barrier {
        &self.barrier
    }

    /// The media is memory: nothing survives a power cut (tmpfs, zram).
    pub fn is_volatile(&self) -> bool {
        self.volatile
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The fallocate mode of a discard.
    pub(crate) fn discard_mode(&self) -> i32 {
        let keep_size = libc::FALLOC_FL_KEEP_SIZE;
        match (self.kind, self.discard) {
            (FileKind::Regular, FileDiscard::KeepSpace) => libc::FALLOC_FL_ZERO_RANGE | keep_size,
            _ => libc::FALLOC_FL_PUNCH_HOLE | keep_size,
        }
    }

    /// Some file systems take `O_DIRECT` and go through the page cache all the same (encryption, data journalling);
    /// statx tells. Where it tells nothing (kernels before 6.1, btrfs), 4096 serves every direct I/O there is.
    fn prove_direct_io(&mut self) -> Result<(), OpenError> {
        let mut buf = MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: an open descriptor, an empty C string with AT_EMPTY_PATH, and room for one statx.
        let rc = unsafe { libc::statx(self.raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, buf.as_mut_ptr()) };
        // SAFETY: zeroed at first, and statx is plain integers.
        let statx = unsafe { buf.assume_init() };
        if rc != 0 || statx.stx_mask & libc::STATX_DIOALIGN == 0 {
            (self.block_size, self.memory_align) = (4096, 4096);
            return Ok(());
        }
        if statx.stx_dio_mem_align == 0 || statx.stx_dio_offset_align == 0 {
            let fs = format!("{}, which takes it and caches all the same", fs_name(&self.path));
            return Err(OpenError::NoDirectIo { path: self.path.clone(), fs });
        }
        (self.block_size, self.memory_align) = (statx.stx_dio_offset_align.max(512), statx.stx_dio_mem_align);
        Ok(())
    }

    fn measure_block_device(&mut self, stat: &Stat, opts: &OpenOpts) -> Result<(), OpenError> {
        let failed = |errno| os(&self.path, errno, "The device does not tell its size; is it really a disk?");
        let (mut bytes, mut block) = (0u64, 0i32);
        ioctl_read(&self.fd, BLKGETSIZE64, &mut bytes).map_err(failed)?;
        ioctl_read(&self.fd, BLKSSZGET, &mut block).map_err(failed)?;
        self.block_size = block as u32;
        self.memory_align = self.memory_align.min(self.block_size);
        (self.barrier, self.volatile) = media::of_block_device(Path::new("/sys/dev/block"), DeviceNumber::of(stat.0.st_rdev));
        if bytes == 0 {
            return Err(OpenError::BadSize { path: self.path.clone(), size: 0, why: "the device holds no medium" });
        }
        self.accept_size(bytes, opts)
    }

    fn measure_regular(&mut self, stat: &Stat, opts: &OpenOpts) -> Result<(), OpenError> {
        (self.barrier, self.volatile) = media::of_file(DeviceNumber::of(stat.0.st_dev));
        let found = stat.0.st_size as u64;
        match opts.size {
            Some(size) if found == 0 && !self.read_only => {
                self.reserve(size)?;
                self.accept_size(size, opts)
            }
            _ if found == 0 => Err(OpenError::BadSize { path: self.path.clone(), size: 0, why: "it is empty; give a size to fill it" }),
            _ => self.accept_size(found, opts),
        }
    }

    fn accept_size(&mut self, found: u64, opts: &OpenOpts) -> Result<(), OpenError> {
        if let Some(wanted) = opts.size.filter(|&wanted| wanted != found) {
            return Err(OpenError::SizeDiffers { path: self.path.clone(), found, wanted });
        }
        self.size = found - found % u64::from(self.block_size);
        if self.size == 0 {
            return Err(OpenError::BadSize { path: self.path.clone(), size: found, why: "it is less than one block" });
        }
        Ok(())
    }

    /// Space first, size after: a crash in between leaves an empty file, which the next open fills again.
    fn reserve(&self, size: u64) -> Result<(), OpenError> {
        let reserved = retry(|| {
            // SAFETY: an open descriptor and plain integers; `size` fits (checked in `check_size`).
            unsafe { libc::fallocate(self.raw_fd(), libc::FALLOC_FL_KEEP_SIZE, 0, size as i64) }
        });
        let outcome = reserved.and_then(|()| {
            // SAFETY: as above.
            retry(|| unsafe { libc::ftruncate(self.raw_fd(), size as i64) })?;
            // SAFETY: as above.
            retry(|| unsafe { libc::fsync(self.raw_fd()) })?;
            sync_directory(&self.path)
        });
        let Err(errno) = outcome else { return Ok(()) };
        // SAFETY: as above; gives back what was reserved so far.
        let _ = unsafe { libc::ftruncate(self.raw_fd(), 0) };
        remove_if_empty(&self.path);
        let path = self.path.clone();
        Err(match errno {
            e if e.is_no_space() || e.0 == libc::EFBIG => {
                OpenError::NoSpace { fs: fs_name(&path), free: free_bytes(&path), wanted: size, path }
            }
            e if e.is_unsupported() => os(&path, e, "This file system can't reserve space; use one that can (ext4, xfs)"),
            e => os(&path, e, "Its space could not be reserved"),
        })
    }
}

fn check_size(path: &Path, size: u64) -> Result<(), OpenError> {
    let why = match size {
        0 => "it must be more than nothing",
        s if s % SIZE_STEP != 0 => "it must be a multiple of 4096",
        s if s > i64::MAX as u64 => "no file can be that large",
        _ => return Ok(()),
    };
    Err(OpenError::BadSize { path: path.into(), size, why })
}

fn os(path: &Path, errno: Errno, next: &'static str) -> OpenError {
    OpenError::Os { path: path.into(), errno, next }
}

/// flock is per open file description, so it keeps out a second open in this process too.
fn lock(path: &Path, fd: &OwnedFd, stat: &Stat, deadline: Instant) -> Result<(), OpenError> {
    // SAFETY: an open descriptor.
    let attempt = || retry(|| unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) });
    match until(deadline, libc::EWOULDBLOCK, attempt) {
        Ok(()) => Ok(()),
        Err(Errno(libc::EWOULDBLOCK)) => {
            // The list is not read in one piece, so that an entry can be missed while others come and go.
            let dev = DeviceNumber::of(stat.0.st_dev);
            let look = |_| lock_holder(&std::fs::read_to_string("/proc/locks").ok()?, dev, stat.0.st_ino);
            let by = (0..5).find_map(look).map(|pid| format!(" by process {pid}")).unwrap_or_default();
            Err(OpenError::InUse { path: path.into(), by })
        }
        Err(errno) => Err(os(path, errno, "The file system can't lock it; use a local one")),
    }
}

/// Who holds the flock. Format: `1: FLOCK ADVISORY WRITE pid major:minor:inode 0 EOF`, the device in hex.
fn lock_holder(proc_locks: &str, dev: DeviceNumber, inode: u64) -> Option<u32> {
    let wanted = format!("{:02x}:{:02x}:{inode}", dev.major, dev.minor);
    proc_locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let holds = fields.get(1) == Some(&"FLOCK") && fields.get(5) == Some(&wanted.as_str());
        if holds { fields[4].parse().ok() } else { None }
    })
}

fn remove_if_empty(path: &Path) {
    if std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == 0) {
        let _ = std::fs::remove_file(path);
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn sync_directory(path: &Path) -> Result<(), Errno> {
    Ok(std::fs::File::open(directory_of(path))?.sync_all()?)
}

fn fs_name(path: &Path) -> String {
    let stat = Stat::of_path(path).or_else(|_| Stat::of_path(directory_of(path)));
    let mount = stat.ok().and_then(|s| Mount::of(DeviceNumber::of(s.0.st_dev)));
    mount.map_or_else(|| "of unknown kind".into(), |m| m.fs)
}

fn free_bytes(path: &Path) -> u64 {
    let Ok(dir) = c_path(directory_of(path)) else { return 0 };
    let mut buf = MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: a C string, and room for one statvfs.
    let rc = unsafe { libc::statvfs(dir.as_ptr(), buf.as_mut_ptr()) };
    // SAFETY: zeroed at first; plain integers.
    let vfs = unsafe { buf.assume_init() };
    if rc == 0 { vfs.f_bavail * vfs.f_frsize } else { 0 }
}

fn name_of_type(mode: u32) -> &'static str {
    match mode {
        libc::S_IFDIR => "a directory",
        libc::S_IFCHR => "a character device",
        libc::S_IFIFO => "a pipe",
        libc::S_IFSOCK => "a socket",
        _ => "neither a file nor a device",
    }
}

#[derive(Clone, Copy)]
struct Stat(libc::stat);

impl Stat {
    fn of_path(path: &Path) -> Result<Self, Errno> {
        let path = c_path(path)?;
        // SAFETY: a C string and room for one stat.
        Self::fill(|buf| unsafe { libc::stat(path.as_ptr(), buf) })
    }

    fn of_fd(fd: &OwnedFd) -> Result<Self, Errno> {
        // SAFETY: an open descriptor and room for one stat.
        Self::fill(|buf| unsafe { libc::fstat(fd.as_raw_fd(), buf) })
    }

    fn fill(call: impl Fn(*mut libc::stat) -> i32) -> Result<Self, Errno> {
        let mut buf = MaybeUninit::<libc::stat>::zeroed();
        retry(|| call(buf.as_mut_ptr()))?;
        // SAFETY: zeroed at first; plain integers.
        Ok(Self(unsafe { buf.assume_init() }))
    }
}

fn c_path(path: &Path) -> Result<CString, Errno> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno(libc::EINVAL))
}

fn open(path: &Path, flags: i32) -> Result<OwnedFd, Errno> {
    let path = c_path(path)?;
    let mut fd = -1;
    retry(|| {
        // SAFETY: a C string; the mode is only read with O_CREAT.
        fd = unsafe { libc::open(path.as_ptr(), flags, 0o600 as libc::mode_t) };
        fd
    })?;
    // SAFETY: just opened, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attempts again, a hundred times a second until `deadline`, while the answer is `busy`.
fn until<T>(deadline: Instant, busy: i32, mut attempt: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        let outcome = attempt();
        if !matches!(outcome, Err(Errno(errno)) if errno == busy) || Instant::now() >= deadline {
            return outcome;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a call that returns a negative number on error, again as long as a signal interrupts it.
fn retry(mut call: impl FnMut() -> i32) -> Result<(), Errno> {
    loop {
        if call() >= 0 {
            return Ok(());
        }
        match Errno::last() {
            Errno(libc::EINTR) => continue,
            errno => return Err(errno),
        }
    }
}

// include/uapi/linux/fs.h: _IOR(0x12, 114, size_t) and _IO(0x12, 104).
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const BLKSSZGET: libc::c_ulong = 0x1268;

fn ioctl_read<T: Copy>(fd: &OwnedFd, request: libc::c_ulong, out: &mut T) -> Result<(), Errno> {
    // SAFETY: both requests of this module write one integer of the type their only callers pass.
    retry(|| unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(out)) })
}

#[cfg(test)]
impl UringFile {
    /// Wraps a descriptor that is no drive (a pipe), for tests of requests that never complete.
    pub(crate) fn for_test(fd: OwnedFd) -> Arc<Self> {
        Arc::new(Self {
            fd,
            path: "test".into(),
            kind: FileKind::Regular,
            size: 1 << 30,
            block_size: 512,
            memory_align: 512,
            read_only: false,
            discard: FileDiscard::KeepSpace,
            barrier: Barrier::Flush,
            volatile: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_holder_is_found_by_device_and_inode() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 fe:00:77 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 22 fe:00:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 33 fe:00:77 0 EOF\nshort\n";
        let dev = DeviceNumber { major: 254, minor: 0 };
        assert_eq!(lock_holder(locks, dev, 77), Some(22));
        assert_eq!(lock_holder(locks, dev, 78), None);
    }
}
