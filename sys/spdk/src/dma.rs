//! Memory that devices can reach: single buffers, and a fixed pool of equal slabs without allocation per use.
//!
//! Memory is aligned to 4 KiB. Not here: registering foreign memory; guests' memory is registered by vhost itself.

use crate::app;
use crate::bdev::{IoMemory, IoMemoryMut, Ranges};
use crate::status::Errno;
use std::cell::{Cell, RefCell};
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::rc::Rc;

/// Alignment of all memory here, in bytes.
pub const DMA_ALIGNMENT: usize = 4096;
const SPDK_MALLOC_DMA: u32 = 1;
const ANY_NUMA_NODE: i32 = -1;

/// One zeroed buffer.
pub struct DmaBuf {
    pointer: NonNull<u8>,
    len: usize,
}

// SAFETY: owns its memory alone, and spdk_free may be called from any thread.
unsafe impl Send for DmaBuf {}
// SAFETY: shared access is reading only.
unsafe impl Sync for DmaBuf {}

impl DmaBuf {
    /// `len` bytes, zeroed. Fails before the app's start closure runs, and when memory is out.
    pub fn zeroed(len: usize) -> Result<DmaBuf, Errno> {
        if len == 0 {
            return Err(Errno::INVAL);
        }
        if !app::env_is_up() {
            return Err(Errno::SHUTDOWN);
        }
        // SAFETY: the environment is up; no pointers go in.
        let pointer = unsafe { spdk_sys::spdk_zmalloc(len, DMA_ALIGNMENT, std::ptr::null_mut(), ANY_NUMA_NODE, SPDK_MALLOC_DMA) };
        NonNull::new(pointer.cast::<u8>()).map(|pointer| DmaBuf { pointer, len }).ok_or(Errno::NOMEM)
    }
}

impl std::fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DmaBuf({} bytes)", self.len)
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        // After the app has ended DPDK has unmapped it all.
        if app::env_is_up() {
            // SAFETY: allocated in `zeroed`, freed once.
            unsafe { spdk_sys::spdk_free(self.pointer.as_ptr().cast()) };
        }
    }
}

impl Deref for DmaBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        assert!(app::env_is_up(), "DMA memory is gone once the app has ended");
        // SAFETY: we own `len` initialised bytes there.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }
}

impl DerefMut for DmaBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        assert!(app::env_is_up(), "DMA memory is gone once the app has ended");
        // SAFETY: we own them alone, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }
}

// SAFETY: the heap range stays where it is until drop, wherever the owner moves.
unsafe impl IoMemory for DmaBuf {
    fn ranges(&self, out: &mut Ranges<'_>) {
        out.push(self.pointer.as_ptr(), self.len);
    }
}
// SAFETY: sole owner.
unsafe impl IoMemoryMut for DmaBuf {}

struct PoolInner {
    memory: DmaBuf,
    slab_len: usize,
    /// Free slabs; its capacity is all of them, so that a push never allocates.
    free: RefCell<Vec<u32>>,
    /// How many [`SharedBuf`]s, or one [`PoolBuf`], hold each slab.
    holders: Box<[Cell<u32>]>,
}

impl PoolInner {
    fn base(&self, slab: u32) -> *mut u8 {
        // SAFETY: slab < holders.len() by construction, so this stays inside `memory`.
        unsafe { self.memory.pointer.as_ptr().add(slab as usize * self.slab_len) }
    }

    fn release(&self, slab: u32) {
        let holders = &self.holders[slab as usize];
        holders.set(holders.get() - 1);
        if holders.get() == 0 {
            self.free.borrow_mut().push(slab);
        }
    }
}

/// Equal slabs in one allocation, for one core. Taking and giving back allocates nothing.
#[derive(Clone)]
pub struct DmaPool {
    inner: Rc<PoolInner>,
}

impl DmaPool {
    /// `count` slabs of `slab_len` bytes each; `slab_len` is a multiple of 4096.
    pub fn new(count: u32, slab_len: usize) -> Result<DmaPool, Errno> {
        if count == 0 || slab_len == 0 || !slab_len.is_multiple_of(DMA_ALIGNMENT) {
            return Err(Errno::INVAL);
        }
        let total = slab_len.checked_mul(count as usize).ok_or(Errno::INVAL)?;
        let inner = PoolInner {
            memory: DmaBuf::zeroed(total)?,
            slab_len,
            free: RefCell::new((0..count).rev().collect()),
            holders: (0..count).map(|_| Cell::new(0)).collect(),
        };
        Ok(DmaPool { inner: Rc::new(inner) })
    }

    /// A slab with whatever its last holder left in it; None when all are in use.
    pub fn take(&self) -> Option<PoolBuf> {
        let slab = self.inner.free.borrow_mut().pop()?;
        self.inner.holders[slab as usize].set(1);
        Some(PoolBuf { pool: self.inner.clone(), slab })
    }

    pub fn free_count(&self) -> usize {
        self.inner.free.borrow().len()
    }

    pub fn slab_count(&self) -> usize {
        self.inner.holders.len()
    }

    pub fn slab_len(&self) -> usize {
        self.inner.slab_len
    }
}

/// One slab, held alone: writable. Goes back to the pool when dropped.
pub struct PoolBuf {
    pool: Rc<PoolInner>,
    slab: u32,
}

impl PoolBuf {
    /// Gives up writing so that several may hold it: an I/O, the index, a read that is being answered.
    pub fn share(self) -> SharedBuf {
        let shared = SharedBuf { pool: self.pool.clone(), slab: self.slab, start: 0, end: self.pool.slab_len as u32 };
        self.pool.holders[self.slab as usize].set(2); // ours and the shared one; dropping `self` leaves one
        shared
    }
}

impl Drop for PoolBuf {
    fn drop(&mut self) {
        self.pool.release(self.slab);
    }
}

impl Deref for PoolBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        assert!(app::env_is_up(), "DMA memory is gone once the app has ended");
        // SAFETY: the slab is ours alone, initialised (the pool was zeroed) and inside the pool, which we keep alive.
        unsafe { std::slice::from_raw_parts(self.pool.base(self.slab), self.pool.slab_len) }
    }
}

impl DerefMut for PoolBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        assert!(app::env_is_up(), "DMA memory is gone once the app has ended");
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pool.base(self.slab), self.pool.slab_len) }
    }
}

// SAFETY: slabs do not move, and this one is not given out again until dropped.
unsafe impl IoMemory for PoolBuf {
    fn ranges(&self, out: &mut Ranges<'_>) {
        out.push(self.pool.base(self.slab), self.pool.slab_len);
    }
}
// SAFETY: the sole holder of the slab.
unsafe impl IoMemoryMut for PoolBuf {}

/// A range of a slab that several may hold, read-only.
pub struct SharedBuf {
    pool: Rc<PoolInner>,
    slab: u32,
    start: u32,
    end: u32,
}

impl SharedBuf {
    /// A part of it, in bytes relative to this one. Panics if out of range.
    pub fn slice(&self, range: Range<usize>) -> SharedBuf {
        assert!(range.start <= range.end && range.end <= self.len(), "slice {range:?} of a buffer of {} bytes", self.len());
        let mut slice = self.clone();
        slice.start = self.start + range.start as u32;
        slice.end = self.start + range.end as u32;
        slice
    }

    /// Writable again if nobody else holds the slab; else given back.
    pub fn try_unshare(self) -> Result<PoolBuf, SharedBuf> {
        if self.pool.holders[self.slab as usize].get() != 1 {
            return Err(self);
        }
        let holder = PoolBuf { pool: self.pool.clone(), slab: self.slab };
        self.pool.holders[self.slab as usize].set(2); // dropping `self` leaves one
        Ok(holder)
    }
}

impl Clone for SharedBuf {
    fn clone(&self) -> SharedBuf {
        let holders = &self.pool.holders[self.slab as usize];
        holders.set(holders.get() + 1);
        SharedBuf { pool: self.pool.clone(), slab: self.slab, start: self.start, end: self.end }
    }
}

impl Drop for SharedBuf {
    fn drop(&mut self) {
        self.pool.release(self.slab);
    }
}

impl Deref for SharedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        assert!(app::env_is_up(), "DMA memory is gone once the app has ended");
        // SAFETY: inside the slab (slice checks), which nobody writes while it is shared.
        unsafe { std::slice::from_raw_parts(self.pool.base(self.slab).add(self.start as usize), (self.end - self.start) as usize) }
    }
}

// SAFETY: slabs do not move, and a slab is not given out again while held.
unsafe impl IoMemory for SharedBuf {
    fn ranges(&self, out: &mut Ranges<'_>) {
        // SAFETY: inside the slab.
        let start = unsafe { self.pool.base(self.slab).add(self.start as usize) };
        out.push(start, (self.end - self.start) as usize);
    }
}
