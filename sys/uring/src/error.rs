//! Errors: what could not be opened and why, what was refused before it reached the kernel, and what the kernel
//! answered. Not here: any decision about what a failure means for a drive (that is the engine's).

use std::fmt;
use std::path::PathBuf;

use crate::ring::ByteOffset;

/// An errno of the kernel, positive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    pub(crate) fn last() -> Self {
        Self(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    }

    /// The medium or the file system has no space left for this write.
    pub fn is_no_space(self) -> bool {
        self.0 == libc::ENOSPC || self.0 == libc::EDQUOT
    }

    /// The file system or the device does not know the operation (discard, most of the time).
    pub fn is_unsupported(self) -> bool {
        self.0 == libc::EOPNOTSUPP || self.0 == libc::ENOSYS
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl From<std::io::Error> for Errno {
    fn from(err: std::io::Error) -> Self {
        Self(err.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// Why a request that reached the kernel failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoFault {
    #[error("the kernel answered: {0}")]
    Os(Errno),
    /// The kernel stopped early and a further attempt made no progress: the rest of the range is unknown.
    #[error("only {got} of {want} bytes were transferred and the rest made no progress")]
    Short { want: u32, got: u32 },
}

/// Why a request was refused before anything reached the kernel. Nothing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the ring already holds its {depth} requests; reap completions and submit again")]
    Full { depth: u32 },
    #[error("bytes {}..{} are outside of the drive, which has {size} bytes", offset.0, offset.0.saturating_add(*len))]
    OutOfRange { offset: ByteOffset, len: u64, size: u64 },
    #[error("offset or length {value} is not a multiple of the drive's block size, {block_size}")]
    Misaligned { value: u64, block_size: u32 },
    #[error("a slice's address {address:#x} is not aligned to the {align} bytes that this drive's direct I/O needs")]
    MisalignedMemory { address: usize, align: u32 },
    #[error("{slices} slices are more than one request may carry, {limit}")]
    TooManySlices { slices: usize, limit: usize },
    #[error("{len} bytes are more than one request may carry, {limit}")]
    TooLong { len: u64, limit: u64 },
    #[error("a request over no bytes; check the length before submitting")]
    Empty,
    #[error("the drive was opened read-only")]
    ReadOnly,
    #[error("the file is not attached to this ring, or was detached from it")]
    NotAttached,
}

/// A refused request and the buffer it brought, handed back untouched.
pub struct Refused<B> {
    pub buf: B,
    pub why: Refusal,
}

impl<B> fmt::Debug for Refused<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refused").field("why", &self.why).finish_non_exhaustive()
    }
}

impl<B> std::error::Error for Refused<B> {}

impl<B> fmt::Display for Refused<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.why.fmt(f)
    }
}

/// Why a file or block device cannot serve as a drive.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{path}: {errno}. {next}", path = path.display())]
    Os { path: PathBuf, errno: Errno, next: &'static str },
    #[error(
        "{path}: the file system here ({fs}) refuses O_DIRECT, and a drive without it would hide writes in the page \
         cache. Use a file on ext4 or xfs, or a block device",
        path = path.display()
    )]
    NoDirectIo { path: PathBuf, fs: String },
    #[error("{path} does not exist. Give a size to create it, for instance file:{path}?size=10GiB", path = path.display())]
    Absent { path: PathBuf },
    #[error(
        "{path} has {found} bytes, but the size asked for is {wanted}. Leave the size out to use it as it is, or name \
         another file",
        path = path.display()
    )]
    SizeDiffers { path: PathBuf, found: u64, wanted: u64 },
    #[error("{path}: a size of {size} bytes cannot serve: {why}", path = path.display())]
    BadSize { path: PathBuf, size: u64, why: &'static str },
    #[error(
        "{path}: no space for {wanted} bytes, the file system ({fs}) has {free} free. Choose a smaller size or another \
         file system",
        path = path.display()
    )]
    NoSpace { path: PathBuf, wanted: u64, free: u64, fs: String },
    #[error("{path} is {found}; a drive is a regular file or a block device", path = path.display())]
    NotADrive { path: PathBuf, found: &'static str },
    #[error("{path} is in use{by}. Two processes must never use one drive: stop the other one, or name another drive", path = path.display())]
    InUse { path: PathBuf, by: String },
}
