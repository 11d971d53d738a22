//! Memory that the kernel may use while a request is in flight.
//!
//! The rule: a request owns its buffer. The ring keeps the buffer until the kernel has answered, so nobody can free
//! it, and hands it back with the completion. What a type must promise for that is written on the two traits; who
//! guarantees it is the author of the `unsafe impl`, and all of those live under `sys/`. Code outside of `sys/`
//! composes: vectors, arrays, pairs, [`Either`] and (for writes) `Rc` of buffers are buffers.
//!
//! Not here: pools, and memory for DMA by user-space drivers (that is `spdk-rs`).

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;

/// Memory that the kernel may read while the ring owns `self`.
///
/// # Safety
/// The implementor promises, for every slice that [`push_slices`](Self::push_slices) pushes:
/// * it is allocated, readable memory, and stays so until `self` is dropped or used mutably, even when `self` is moved
///   or leaked;
/// * while `self` is only moved or borrowed shared, nothing writes to that memory from safe Rust;
/// * pushing is repeatable: no call changes which memory is named.
pub unsafe trait StableBuf: 'static {
    /// Names the memory, in the order of the bytes on the drive.
    fn push_slices(&self, out: &mut SliceSink<'_>);
}

/// Memory that the kernel may also write while the ring owns `self`.
///
/// # Safety
/// On top of [`StableBuf`]: the memory is writable, every byte pattern is valid in it, and while `self` is only moved
/// nothing else reads or writes it from safe Rust: no clone of a shared handle reaches it.
pub unsafe trait StableBufMut: StableBuf {}

/// Gathers the slices of one request. Slices that touch in memory become one.
pub struct SliceSink<'a> {
    iovecs: &'a mut Vec<libc::iovec>,
    bytes: u64,
}

impl<'a> SliceSink<'a> {
    pub(crate) fn new(iovecs: &'a mut Vec<libc::iovec>) -> Self {
        iovecs.clear();
        Self { iovecs, bytes: 0 }
    }

    /// Adds `len` bytes at `ptr`. Empty slices are dropped. Safe to call: the ring only uses what an implementor of
    /// [`StableBuf`] pushed, and its `unsafe impl` is the promise.
    pub fn push(&mut self, ptr: NonNull<u8>, len: usize) {
        if len == 0 {
            return;
        }
        self.bytes = self.bytes.saturating_add(len as u64);
        if let Some(last) = self.iovecs.last_mut()
            && last.iov_base as usize + last.iov_len == ptr.as_ptr() as usize
        {
            last.iov_len += len;
            return;
        }
        self.iovecs.push(libc::iovec { iov_base: ptr.as_ptr().cast(), iov_len: len });
    }

    /// Bytes pushed so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// A piece of memory whose owner stands elsewhere: a host's request that stays pending, a slab that outlives the ring.
/// Neither `Copy` nor `Clone`: the promise ends when the value does.
#[derive(Debug)]
pub struct RawSlice {
    ptr: NonNull<u8>,
    len: usize,
}

impl RawSlice {
    /// Names `len` bytes at `ptr`.
    ///
    /// # Safety
    /// For as long as the value exists the memory stays allocated, readable and writable, and no Rust reference to it
    /// is used: not to write, and not to read either if the value goes into a read request.
    pub unsafe fn new(ptr: NonNull<u8>, len: usize) -> Self {
        Self { ptr, len }
    }

    pub fn as_ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

// SAFETY: the promise of `RawSlice::new` is the trait's, for as long as the value exists.
unsafe impl StableBuf for RawSlice {
    fn push_slices(&self, out: &mut SliceSink<'_>) {
        out.push(self.ptr, self.len);
    }
}

// SAFETY: `RawSlice::new` promises writable memory that nobody else touches while the value exists.
unsafe impl StableBufMut for RawSlice {}

/// Zeroed heap memory with an alignment fit for direct I/O. For tools, probes and tests; the data path brings
/// hugepage memory of its own.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    layout: Layout,
}

impl AlignedBuf {
    /// Direct I/O of every device we know is content with this.
    pub const ALIGN: usize = 4096;

    /// `len` zero bytes, aligned to [`Self::ALIGN`].
    ///
    /// # Panics
    /// If `len` is 0 or more than `isize::MAX` rounded down to the alignment.
    pub fn zeroed(len: usize) -> Self {
        assert!(len > 0, "a buffer of 0 bytes");
        let layout = Layout::from_size_align(len, Self::ALIGN).expect("a length that fits an address space");
        // SAFETY: the layout's size is not zero (asserted above).
        let Some(ptr) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        Self { ptr, layout }
    }

    /// A buffer holding a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: allocated in `zeroed` with this size, initialised to zero, and owned by `self` alone.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with the same layout, freed once, here.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.layout.size())
    }
}

// SAFETY: the memory is on the heap, owned by `self` alone, and reached only through borrows of `self`; it goes away
// when `self` is dropped, and moving `self` does not move it.
unsafe impl StableBuf for AlignedBuf {
    fn push_slices(&self, out: &mut SliceSink<'_>) {
        out.push(self.ptr, self.layout.size());
    }
}

// SAFETY: bytes, exclusively owned; any pattern is valid.
unsafe impl StableBufMut for AlignedBuf {}

// SAFETY: plain owned bytes, no thread in it.
unsafe impl Send for AlignedBuf {}
// SAFETY: `&AlignedBuf` gives `&[u8]` only.
unsafe impl Sync for AlignedBuf {}

/// One of two kinds of buffer.
#[derive(Debug)]
pub enum Either<A, B> {
    A(A),
    B(B),
}

// SAFETY: owns an `A` or a `B`, and names just that one's memory.
unsafe impl<A: StableBuf, B: StableBuf> StableBuf for Either<A, B> {
    fn push_slices(&self, out: &mut SliceSink<'_>) {
        match self {
            Either::A(a) => a.push_slices(out),
            Either::B(b) => b.push_slices(out),
        }
    }
}

// SAFETY: as above; both may be written.
unsafe impl<A: StableBufMut, B: StableBufMut> StableBufMut for Either<A, B> {}

/// The buffer type of a ring that never reads, or never writes.
#[derive(Debug)]
pub enum NoBuf {}

// SAFETY: no value exists.
unsafe impl StableBuf for NoBuf {
    fn push_slices(&self, _: &mut SliceSink<'_>) {
        match *self {}
    }
}

// SAFETY: no value exists.
unsafe impl StableBufMut for NoBuf {}

// SAFETY: a vector owns its elements; elements' memory does not move with them, nor when the vector does.
unsafe impl<B: StableBuf> StableBuf for Vec<B> {
    fn push_slices(&self, out: &mut SliceSink<'_>) {
        self.iter().for_each(|b| b.push_slices(out));
    }
}

// SAFETY: as above.
unsafe impl<B: StableBufMut> StableBufMut for Vec<B> {}

// SAFETY: a box owns its content.
unsafe impl<B: StableBuf> StableBuf for Box<B> {
    fn push_slices(&self, out: &mut SliceSink<'_>) {
        (**self).push_slices(out);
    }
}

// SAFETY: as above.
unsafe impl<B: StableBufMut> StableBufMut for Box<B> {}

// SAFETY: an array owns its elements.
unsafe impl<B: StableBuf, const N: usize> StableBuf for [B; N] {
    fn push_slices(&self, out: &mut SliceSink<'_>) {
        self.iter().for_each(|b| b.push_slices(out));
    }
}

// SAFETY: as above.
unsafe impl<B: StableBufMut, const N: usize> StableBufMut for [B; N] {}

// SAFETY: a pair owns both.
unsafe impl<A: StableBuf, B: StableBuf> StableBuf for (A, B) {
    fn push_slices(&self, out: &mut SliceSink<'_>) {
        self.0.push_slices(out);
        self.1.push_slices(out);
    }
}

// SAFETY: as above.
unsafe impl<A: StableBufMut, B: StableBufMut> StableBufMut for (A, B) {}

// SAFETY: other clones can only borrow the buffer shared, which (first rule: nothing changes it before it is dropped
// or used mutably) leaves the memory in place and unwritten; `Rc::get_mut` fails while the ring holds a clone. For
// writes to the drive only: no `StableBufMut`, as a clone could read what the kernel writes.
unsafe impl<B: StableBuf> StableBuf for Rc<B> {
    fn push_slices(&self, out: &mut SliceSink<'_>) {
        (**self).push_slices(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slices_of(buf: &impl StableBuf) -> (Vec<(usize, usize)>, u64) {
        let mut iovecs = Vec::new();
        let mut sink = SliceSink::new(&mut iovecs);
        buf.push_slices(&mut sink);
        let bytes = sink.bytes();
        (iovecs.iter().map(|v| (v.iov_base as usize, v.iov_len)).collect(), bytes)
    }

    #[test]
    fn aligned_buf_fresh_is_aligned_and_zero() {
        let buf = AlignedBuf::zeroed(8192);
        assert_eq!(buf.as_ptr() as usize % AlignedBuf::ALIGN, 0);
        assert!(buf.iter().all(|&b| b == 0));
        assert_eq!(slices_of(&buf), (vec![(buf.as_ptr() as usize, 8192)], 8192));
    }

    #[test]
    fn raw_slices_that_touch_become_one_in_order() {
        let mut owner = AlignedBuf::zeroed(4 * 4096);
        let base = NonNull::new(owner.as_mut_ptr()).unwrap();
        // SAFETY: `owner` outlives the slices and is not used meanwhile; the offset stays inside of it.
        let piece = |block: usize, blocks: usize| unsafe { RawSlice::new(base.add(block * 4096), blocks * 4096) };
        let at = base.as_ptr() as usize;
        let touching = vec![piece(0, 1), piece(1, 2), piece(3, 1)];
        assert_eq!(slices_of(&touching), (vec![(at, 16384)], 16384));
        let apart = (piece(2, 1), [piece(0, 1), piece(1, 1)]);
        assert_eq!(slices_of(&apart), (vec![(at + 8192, 4096), (at, 8192)], 12288));
    }

    #[test]
    fn raw_slice_of_no_bytes_is_dropped() {
        let mut owner = AlignedBuf::zeroed(4096);
        let base = NonNull::new(owner.as_mut_ptr()).unwrap();
        // SAFETY: no byte is named.
        let empty = unsafe { RawSlice::new(base, 0) };
        assert!(empty.is_empty());
        assert_eq!(slices_of(&vec![empty]), (vec![], 0));
    }

    #[test]
    fn either_names_the_side_it_holds() {
        let a: Either<AlignedBuf, Rc<AlignedBuf>> = Either::A(AlignedBuf::zeroed(4096));
        let b: Either<AlignedBuf, Rc<AlignedBuf>> = Either::B(Rc::new(AlignedBuf::zeroed(8192)));
        assert_eq!(slices_of(&a).1, 4096);
        assert_eq!(slices_of(&b).1, 8192);
        assert_eq!(slices_of(&Box::new(b)).1, 8192);
    }
}
