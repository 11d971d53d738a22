//! The requests in flight: what each one owns until the kernel has answered, and the check of what it asks for.
//! Not here: the ring itself.

use std::ptr::NonNull;

use crate::buf::{SliceSink, StableBuf, StableBufMut};
use crate::error::Refusal;
use crate::file::UringFile;
use crate::ring::{ByteOffset, FileIndex, Token};

/// The kernel's limit on slices per request (UIO_MAXIOV).
pub(crate) const SLICES_LIMIT: usize = 1024;
/// Below the kernel's MAX_RW_COUNT (2 GiB less a page), so that no length overflows an i32.
pub(crate) const REQUEST_BYTES_LIMIT: u64 = 1 << 30;

/// What a busy slot holds.
pub(crate) enum Held<R, W> {
    Free,
    Read(R),
    Write(W),
    Sync,
    Discard,
}

/// One request. `iovecs` keeps its capacity from request to request.
pub(crate) struct Slot<R, W> {
    pub held: Held<R, W>,
    pub iovecs: Vec<libc::iovec>,
    /// First slice that still has bytes to go.
    pub first: usize,
    pub token: Token,
    pub file: FileIndex,
    pub offset: ByteOffset,
    /// Bytes asked for, and bytes done by earlier attempts.
    pub want: u32,
    pub done: u32,
    /// Attempts that the kernel put off.
    pub stalls: u8,
}

impl<R: StableBufMut, W: StableBuf> Slot<R, W> {
    pub fn empty() -> Self {
        let (token, file, offset) = (Token(0), FileIndex::NONE, ByteOffset(0));
        Self { held: Held::Free, iovecs: Vec::new(), first: 0, token, file, offset, want: 0, done: 0, stalls: 0 }
    }

    /// Takes over the slices of `buf` after checking them against the drive; the length in bytes, or why not.
    pub fn take_slices<B: StableBuf>(&mut self, buf: &B, file: &UringFile, offset: ByteOffset) -> Result<u32, Refusal> {
        let mut sink = SliceSink::new(&mut self.iovecs);
        buf.push_slices(&mut sink);
        let len = sink.bytes();
        let slices = self.iovecs.len();
        if slices > SLICES_LIMIT {
            return Err(Refusal::TooManySlices { slices, limit: SLICES_LIMIT });
        }
        if len > REQUEST_BYTES_LIMIT {
            return Err(Refusal::TooLong { len, limit: REQUEST_BYTES_LIMIT });
        }
        check_range(file, offset, len)?;
        let (block_size, align) = (file.block_size(), file.memory_align());
        for iovec in &self.iovecs {
            let (address, value) = (iovec.iov_base as usize, iovec.iov_len as u64);
            if address % align as usize != 0 {
                return Err(Refusal::MisalignedMemory { address, align });
            }
            if value % u64::from(block_size) != 0 {
                return Err(Refusal::Misaligned { value, block_size });
            }
        }
        Ok(len as u32)
    }

    /// Moves past `bytes` more bytes; what remains can be submitted again.
    pub fn advance(&mut self, bytes: u32) {
        self.done += bytes;
        let mut left = bytes as usize;
        while left > 0 {
            let iovec = &mut self.iovecs[self.first];
            let step = left.min(iovec.iov_len);
            iovec.iov_len -= step;
            let base = NonNull::new(iovec.iov_base.cast::<u8>()).expect("slices start at a NonNull");
            // SAFETY: `step` is at most the slice's length, so this stays inside of it or one past its end.
            iovec.iov_base = unsafe { base.add(step) }.as_ptr().cast();
            left -= step;
            if iovec.iov_len == 0 {
                self.first += 1;
            }
        }
    }
}

/// A range of whole blocks within the drive.
pub(crate) fn check_range(file: &UringFile, offset: ByteOffset, len: u64) -> Result<(), Refusal> {
    let (size, block_size) = (file.size(), file.block_size());
    if len == 0 {
        return Err(Refusal::Empty);
    }
    if offset.0.checked_add(len).is_none_or(|end| end > size) {
        return Err(Refusal::OutOfRange { offset, len, size });
    }
    match [offset.0, len].into_iter().find(|value| value % u64::from(block_size) != 0) {
        Some(value) => Err(Refusal::Misaligned { value, block_size }),
        None => Ok(()),
    }
}
