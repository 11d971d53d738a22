//! The bdev client: devices that SPDK knows, opened by name and used through a channel per thread.
//!
//! Submission takes memory, completion gives it back, and a refused submission gives it back at once. Nothing is cancelled by
//! being dropped: a channel lives until its last I/O has completed. No allocation per I/O. A device's data is not
//! interpreted here, and geometry is reported, not believed: whether a flush reaches media is for the caller to prove.

use crate::app;
use crate::callback::{self, c_string};
use crate::status::{Errno, NvmeStatus};
use crate::thread::{self, ThreadHandle};
use std::cell::{Cell, RefCell, UnsafeCell};
use std::ffi::{CStr, c_char, c_void};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

/// Where [`IoMemory`] puts its ranges.
pub struct Ranges<'a> {
    iovs: &'a mut Vec<spdk_sys::iovec>,
    total: usize,
}

impl<'a> Ranges<'a> {
    pub(crate) fn new(iovs: &'a mut Vec<spdk_sys::iovec>) -> Ranges<'a> {
        Ranges { iovs, total: 0 }
    }

    /// `len` bytes at `start`, which the device will reach as they are.
    pub fn push(&mut self, start: *mut u8, len: usize) {
        self.total += len;
        self.iovs.push(spdk_sys::iovec { iov_base: start.cast(), iov_len: len });
    }
}

/// Memory that a device may read while this value exists.
///
/// # Safety
/// Each range that `ranges` pushes must be DMA-able memory (or the bdev must copy), valid and in one place until the value is
/// dropped, wherever the value itself moves, and must not be written by safe code meanwhile.
pub unsafe trait IoMemory {
    fn ranges(&self, out: &mut Ranges<'_>);
}

/// Memory that a device may also write.
///
/// # Safety
/// As [`IoMemory`], and nobody else may read or write it through safe code while the value is elsewhere.
pub unsafe trait IoMemoryMut: IoMemory {}

// SAFETY: a vector owns its elements; each keeps its own promise, and moving the vector does not move their ranges.
unsafe impl<M: IoMemory> IoMemory for Vec<M> {
    fn ranges(&self, out: &mut Ranges<'_>) {
        for memory in self {
            memory.ranges(out);
        }
    }
}
// SAFETY: as above.
unsafe impl<M: IoMemoryMut> IoMemoryMut for Vec<M> {}

// SAFETY: either side keeps its promise.
unsafe impl<A: IoMemory, B: IoMemory> IoMemory for (A, B) {
    fn ranges(&self, out: &mut Ranges<'_>) {
        self.0.ranges(out);
        self.1.ranges(out);
    }
}
// SAFETY: as above.
unsafe impl<A: IoMemoryMut, B: IoMemoryMut> IoMemoryMut for (A, B) {}

/// What a device says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub block_count: u64,
    /// Bytes.
    pub block_size: u32,
    /// Bytes.
    pub physical_block_size: u32,
    /// Blocks; 0 where there is none.
    pub optimal_io_boundary: u32,
    /// Bytes that buffers must be aligned to, or SPDK copies.
    pub buffer_alignment: u32,
    /// Bytes a block.
    pub metadata_size: u32,
    pub write_cache: bool,
    pub can_flush: bool,
    pub can_unmap: bool,
    pub can_write_zeroes: bool,
    pub can_nvme_io: bool,
    pub can_nvme_admin: bool,
    pub uuid: [u8; 16],
}

/// What happens to an open device. Delivered on the thread that opened it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BdevEvent {
    /// Going away: drop channels and the [`Bdev`], or it waits for ever.
    Removed,
    Resized,
    /// Something happened to the media underneath.
    Media,
    Other(u32),
}

struct Descriptor {
    pointer: NonNull<spdk_sys::spdk_bdev_desc>,
    owner: ThreadHandle,
    /// The event closure, boxed for C.
    events: *mut EventHook,
}

type EventHook = Box<dyn Fn(BdevEvent)>;

/// The pointers of a descriptor on their way to the thread that must close it.
struct Closing {
    pointer: NonNull<spdk_sys::spdk_bdev_desc>,
    events: *mut EventHook,
}
// SAFETY: carried to the opening thread and used only there; the closure was made there, and is dropped there.
unsafe impl Send for Closing {}

impl Closing {
    /// Must run on the thread that opened it, or after the app has ended.
    fn close(self) {
        if app::env_is_up() {
            // SAFETY: opened on this thread, closed once; the last channel is gone since each holds the descriptor.
            unsafe { spdk_sys::spdk_bdev_close(self.pointer.as_ptr()) };
        }
        // SAFETY: made by Box::into_raw in `open`; a closed descriptor delivers no event.
        drop(unsafe { Box::from_raw(self.events) });
    }
}

// SAFETY: all that other threads do with it is get a channel of their own and read geometry, both of which SPDK allows from any
// SPDK thread; closing is sent to the owner. The event closure runs and is dropped on the owner alone.
unsafe impl Send for Descriptor {}
// SAFETY: as above.
unsafe impl Sync for Descriptor {}

impl Drop for Descriptor {
    fn drop(&mut self) {
        let closing = Closing { pointer: self.pointer, events: self.events };
        if self.owner.is_current() || !app::env_is_up() {
            closing.close();
            return;
        }
        // A refusal means that the app is stopping and the owner takes no messages. Then the descriptor must not be touched from
        // here: it stays open to the end, which costs its memory. (A refused closure is dropped, and Closing has no drop.)
        let _ = self.owner.send(move || closing.close());
    }
}

/// An open device. Clones share it; it closes when the last clone and channel are gone.
#[derive(Clone)]
pub struct Bdev {
    descriptor: Arc<Descriptor>,
}

impl std::fmt::Debug for Bdev {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Bdev").field(&self.name()).finish()
    }
}

extern "C" fn on_event(kind: spdk_sys::spdk_bdev_event_type, _bdev: *mut spdk_sys::spdk_bdev, arg: *mut c_void) {
    let event = match kind {
        spdk_sys::SPDK_BDEV_EVENT_REMOVE => BdevEvent::Removed,
        spdk_sys::SPDK_BDEV_EVENT_RESIZE => BdevEvent::Resized,
        spdk_sys::SPDK_BDEV_EVENT_MEDIA_MANAGEMENT => BdevEvent::Media,
        other => BdevEvent::Other(other),
    };
    // SAFETY: the hook lives until the descriptor is closed, on this same thread, after which SPDK delivers nothing.
    let hook = unsafe { &*arg.cast::<EventHook>() };
    hook(event);
}

impl Bdev {
    /// Opens `name` on the running SPDK thread, which must be one of ours. EPERM: the device is for
    /// NVMe-oF alone. `on_event` runs there too; it must not drop this Bdev
    /// from inside itself, but send that to the thread instead.
    pub fn open(name: &str, writable: bool, on_event_fn: impl Fn(BdevEvent) + 'static) -> Result<Bdev, Errno> {
        let owner = ThreadHandle::current().ok_or(Errno::new(libc::EPERM))?;
        let name = c_string(name)?;
        let events: *mut EventHook = Box::into_raw(Box::new(Box::new(on_event_fn)));
        let mut pointer = std::ptr::null_mut();
        // SAFETY: on an SPDK thread; the hook outlives the descriptor.
        let rc = unsafe { spdk_sys::spdk_bdev_open_ext(name.as_ptr(), writable, Some(on_event), events.cast(), &mut pointer) };
        match (Errno::check(rc), NonNull::new(pointer)) {
            (Ok(()), Some(pointer)) => {
                let bdev = Bdev { descriptor: Arc::new(Descriptor { pointer, owner, events }) };
                // SAFETY: open. Its device takes every I/O for one of the NVMe-oF target, which ours would not be.
                let nvmf_only = unsafe { spdk_sys::ps_bdev_is_nvmf_only(bdev.raw()) };
                if nvmf_only { Err(Errno::new(libc::EPERM)) } else { Ok(bdev) }
            }
            (outcome, _) => {
                // SAFETY: not opened, so nobody else has it.
                drop(unsafe { Box::from_raw(events) });
                Err(outcome.err().unwrap_or(Errno::IO))
            }
        }
    }

    fn raw(&self) -> *mut spdk_sys::spdk_bdev {
        // SAFETY: an open descriptor always has its bdev.
        unsafe { spdk_sys::spdk_bdev_desc_get_bdev(self.descriptor.pointer.as_ptr()) }
    }

    pub fn geometry(&self) -> Geometry {
        let mut c = std::mem::MaybeUninit::<spdk_sys::ps_bdev_geometry>::zeroed();
        // SAFETY: an open bdev; the shim fills all of it.
        let c = unsafe {
            spdk_sys::ps_bdev_geometry(self.raw(), c.as_mut_ptr());
            c.assume_init()
        };
        Geometry {
            block_count: c.block_count,
            block_size: c.block_size,
            physical_block_size: c.physical_block_size,
            optimal_io_boundary: c.optimal_io_boundary,
            buffer_alignment: c.buffer_alignment,
            metadata_size: c.metadata_size,
            write_cache: c.write_cache,
            can_flush: c.can_flush,
            can_unmap: c.can_unmap,
            can_write_zeroes: c.can_write_zeroes,
            can_nvme_io: c.can_nvme_io,
            can_nvme_admin: c.can_nvme_admin,
            uuid: c.uuid,
        }
    }

    pub fn name(&self) -> String {
        // SAFETY: open, and the name lives as long as the bdev.
        text(unsafe { spdk_sys::spdk_bdev_get_name(self.raw()) })
    }

    /// Such as "Malloc disk" or a drive's model.
    pub fn product_name(&self) -> String {
        // SAFETY: as above.
        text(unsafe { spdk_sys::spdk_bdev_get_product_name(self.raw()) })
    }

    /// The bdev module behind it, such as `malloc` or `nvme`.
    pub fn module_name(&self) -> String {
        // SAFETY: as above.
        text(unsafe { spdk_sys::spdk_bdev_get_module_name(self.raw()) })
    }

    /// A channel for the running SPDK thread, with room for `depth` I/Os at a time.
    ///
    /// `on_done` is called on this thread for each completion, never from inside a submission. Depth bounds memory: all slots are
    /// made here.
    pub fn channel<M: 'static>(&self, depth: usize, on_done: impl Fn(Done<M>) + 'static) -> Result<BdevChannel<M>, Errno> {
        let block_size = self.geometry().block_size;
        // SAFETY: an open descriptor, on an SPDK thread (SPDK answers NULL elsewhere).
        let channel = unsafe { spdk_sys::spdk_bdev_get_io_channel(self.descriptor.pointer.as_ptr()) };
        let channel = NonNull::new(channel).ok_or(Errno::NOMEM)?;
        let slots: Box<[UnsafeCell<Slot<M>>]> = (0..depth)
            .map(|_| UnsafeCell::new(Slot { owner: std::ptr::null(), token: 0, memory: None, iovs: Vec::with_capacity(4) }))
            .collect();
        let inner = Rc::new(ChannelInner {
            channel,
            block_size,
            free: RefCell::new((0..depth).rev().collect()),
            slots,
            on_done: Box::new(on_done),
            descriptor: self.descriptor.clone(),
            submitted: Cell::new(0),
        });
        for slot in &inner.slots {
            // SAFETY: nothing is in flight yet and nobody else holds the slots.
            unsafe { (*slot.get()).owner = Rc::as_ptr(&inner) };
        }
        Ok(BdevChannel { inner })
    }
}

fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: a NUL-terminated string of SPDK's that outlives the copy.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

/// The names of all devices, on the app thread.
pub fn names() -> Vec<String> {
    thread::assert_app_thread("listing devices");
    let mut names = Vec::new();
    // SAFETY: on the app thread, where alone bdevs come and go.
    let mut bdev = unsafe { spdk_sys::spdk_bdev_first() };
    while !bdev.is_null() {
        // SAFETY: as above.
        unsafe {
            names.push(text(spdk_sys::spdk_bdev_get_name(bdev)));
            bdev = spdk_sys::spdk_bdev_next(bdev);
        }
    }
    names
}

/// A completed I/O.
pub struct Done<M> {
    /// What the submission was given.
    pub token: u64,
    /// Err carries the device's status; SPDK's own failures come as internal device error.
    pub result: Result<(), NvmeStatus>,
    /// Dword 0 of an NVMe completion; 0 elsewhere.
    pub cdw0: u32,
    pub memory: Option<M>,
}

/// A submission that the device did not take, with the memory.
pub struct Refused<M> {
    /// AGAIN: all slots of the channel are in use. NOMEM: SPDK is out of I/O objects for now. Both pass with the next completion.
    pub errno: Errno,
    pub memory: Option<M>,
}

impl<M> std::fmt::Debug for Done<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Done(token {}, {:?})", self.token, self.result)
    }
}

impl<M> std::fmt::Debug for Refused<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Refused({})", self.errno)
    }
}

impl<M> Refused<M> {
    /// Whether it is worth trying again after a completion.
    pub fn is_transient(&self) -> bool {
        matches!(self.errno, Errno::NOMEM | Errno::AGAIN)
    }
}

struct Slot<M> {
    /// The channel; fixed.
    owner: *const ChannelInner<M>,
    token: u64,
    memory: Option<M>,
    /// SPDK reads these until completion. Grows to the longest list seen and stays.
    iovs: Vec<spdk_sys::iovec>,
}

struct ChannelInner<M> {
    channel: NonNull<spdk_sys::spdk_io_channel>,
    block_size: u32,
    free: RefCell<Vec<usize>>,
    /// A slot that is not in `free` belongs to its I/O, and only `submit` and `on_complete` touch it.
    slots: Box<[UnsafeCell<Slot<M>>]>,
    on_done: Box<dyn Fn(Done<M>)>,
    descriptor: Arc<Descriptor>,
    submitted: Cell<u64>,
}

impl<M> Drop for ChannelInner<M> {
    fn drop(&mut self) {
        if app::env_is_up() {
            // SAFETY: got on this thread (Rc, so not Send), put once; no I/O is in flight since each holds a count.
            unsafe { spdk_sys::spdk_put_io_channel(self.channel.as_ptr()) };
        }
    }
}

/// One thread's way to a device. `M` is the memory that its I/Os carry.
pub struct BdevChannel<M> {
    inner: Rc<ChannelInner<M>>,
}

extern "C" fn on_complete<M>(io: *mut spdk_sys::spdk_bdev_io, success: bool, arg: *mut c_void) {
    let slot = arg.cast::<Slot<M>>();
    let mut c = spdk_sys::ps_nvme_status { success: false, sct: 0, sc: 0, cdw0: 0 };
    // SAFETY: the I/O is ours until freed, here, once.
    unsafe {
        spdk_sys::ps_bdev_io_status(io, success, &mut c);
        spdk_sys::spdk_bdev_free_io(io);
    }
    // SAFETY: the submission gave this slot to the I/O together with one count of its channel, which is taken back here.
    let (inner, token, memory) = unsafe {
        let inner = Rc::from_raw((*slot).owner);
        (*slot).iovs.clear();
        (inner, (*slot).token, (*slot).memory.take())
    };
    let base = inner.slots.as_ptr();
    // SAFETY: `slot` is an element of `slots`; UnsafeCell has its content's layout.
    let index = unsafe { slot.cast_const().cast::<UnsafeCell<Slot<M>>>().offset_from(base) };
    inner.free.borrow_mut().push(index as usize);
    let result = if c.success {
        Ok(())
    } else if c.sct == 0 && c.sc == 0 {
        Err(NvmeStatus::INTERNAL_DEVICE_ERROR)
    } else {
        Err(NvmeStatus { sct: c.sct, sc: c.sc })
    };
    (inner.on_done)(Done { token, result, cdw0: c.cdw0, memory });
}

type Completion = spdk_sys::spdk_bdev_io_completion_cb;
type Desc = *mut spdk_sys::spdk_bdev_desc;
type Channel = *mut spdk_sys::spdk_io_channel;

impl<M: 'static> BdevChannel<M> {
    /// Takes a slot, puts the I/O's belongings there, and calls SPDK. Its work on the way back: [`on_complete`].
    fn submit(
        &self,
        token: u64,
        memory: Option<M>,
        ranges: impl FnOnce(&M, &mut Ranges<'_>),
        expected_len: Option<u64>,
        call: impl FnOnce(Desc, Channel, *mut spdk_sys::iovec, i32, Completion, *mut c_void) -> i32,
    ) -> Result<(), Refused<M>> {
        let Some(index) = self.inner.free.borrow_mut().pop() else { return Err(Refused { errno: Errno::AGAIN, memory }) };
        let slot = self.inner.slots[index].get();
        // SAFETY: the slot was free, so no I/O has it, and nothing below re-enters this channel before it is handed over.
        let slot_ref = unsafe { &mut *slot };
        slot_ref.iovs.clear();
        let mut list = Ranges { iovs: &mut slot_ref.iovs, total: 0 };
        if let Some(memory) = &memory {
            ranges(memory, &mut list);
        }
        let total = list.total as u64;
        if expected_len.is_some_and(|expected| expected != total) {
            self.inner.free.borrow_mut().push(index);
            return Err(Refused { errno: Errno::INVAL, memory });
        }
        slot_ref.token = token;
        slot_ref.memory = memory;
        let (iovs, count) = (slot_ref.iovs.as_mut_ptr(), slot_ref.iovs.len() as i32);
        // The I/O's own count keeps the channel, its slots and the descriptor until it completes.
        std::mem::forget(self.inner.clone());
        let desc = self.inner.descriptor.pointer.as_ptr();
        let rc = call(desc, self.inner.channel.as_ptr(), iovs, count, Some(on_complete::<M>), slot.cast());
        if rc == 0 {
            self.inner.submitted.set(self.inner.submitted.get() + 1);
            return Ok(());
        }
        // SAFETY: SPDK refused, so there will be no completion: the count and the slot are still ours.
        let memory = unsafe {
            Rc::decrement_strong_count(Rc::as_ptr(&self.inner));
            (*slot).memory.take()
        };
        self.inner.free.borrow_mut().push(index);
        Err(Refused { errno: Errno::new(rc.abs()), memory })
    }

    fn bytes(&self, blocks: u64) -> Option<u64> {
        // A product that does not fit can never equal the memory's length.
        Some(blocks.saturating_mul(u64::from(self.inner.block_size)))
    }

    /// Reads blocks into `memory`, whose ranges must add up to exactly that (else INVAL).
    pub fn read(&self, memory: M, offset_blocks: u64, blocks: u64, token: u64) -> Result<(), Refused<M>>
    where
        M: IoMemoryMut,
    {
        self.submit(token, Some(memory), M::ranges, self.bytes(blocks), |desc, ch, iovs, count, done, arg| {
            // SAFETY: the descriptor and channel are open; iovs and memory stay in the slot until completion.
            unsafe { spdk_sys::spdk_bdev_readv_blocks(desc, ch, iovs, count, offset_blocks, blocks, done, arg) }
        })
    }

    /// Writes `memory`, whose ranges must add up to exactly `blocks` (else INVAL).
    pub fn write(&self, memory: M, offset_blocks: u64, blocks: u64, token: u64) -> Result<(), Refused<M>>
    where
        M: IoMemory,
    {
        self.submit(token, Some(memory), M::ranges, self.bytes(blocks), |desc, ch, iovs, count, done, arg| {
            // SAFETY: as in `read`.
            unsafe { spdk_sys::spdk_bdev_writev_blocks(desc, ch, iovs, count, offset_blocks, blocks, done, arg) }
        })
    }

    fn without_memory(&self, token: u64, call: impl FnOnce(Desc, Channel, Completion, *mut c_void) -> i32) -> Result<(), Errno> {
        self.submit(token, None, |_, _| (), None, |desc, ch, _, _, done, arg| call(desc, ch, done, arg)).map_err(|r| r.errno)
    }

    /// Asks for all completed writes of the range to be made durable. NVMe drives send it only where `enable_flush` was set.
    pub fn flush(&self, offset_blocks: u64, blocks: u64, token: u64) -> Result<(), Errno> {
        self.without_memory(token, |desc, ch, done, arg| {
            // SAFETY: the descriptor and channel are open.
            unsafe { spdk_sys::spdk_bdev_flush_blocks(desc, ch, offset_blocks, blocks, done, arg) }
        })
    }

    pub fn unmap(&self, offset_blocks: u64, blocks: u64, token: u64) -> Result<(), Errno> {
        self.without_memory(token, |desc, ch, done, arg| {
            // SAFETY: the descriptor and channel are open.
            unsafe { spdk_sys::spdk_bdev_unmap_blocks(desc, ch, offset_blocks, blocks, done, arg) }
        })
    }

    pub fn write_zeroes(&self, offset_blocks: u64, blocks: u64, token: u64) -> Result<(), Errno> {
        self.without_memory(token, |desc, ch, done, arg| {
            // SAFETY: the descriptor and channel are open.
            unsafe { spdk_sys::spdk_bdev_write_zeroes_blocks(desc, ch, offset_blocks, blocks, done, arg) }
        })
    }

    /// Resets the device, for all its users.
    pub fn reset(&self, token: u64) -> Result<(), Errno> {
        self.without_memory(token, |desc, ch, done, arg| {
            // SAFETY: the descriptor and channel are open.
            unsafe { spdk_sys::spdk_bdev_reset(desc, ch, done, arg) }
        })
    }

    /// A raw NVMe command (64 bytes; SPDK sets the namespace and the pointers). `memory` is one range, or none.
    pub fn nvme(&self, queue: NvmeQueue, command: &[u8; 64], memory: Option<M>, token: u64) -> Result<(), Refused<M>>
    where
        M: IoMemoryMut,
    {
        self.submit(token, memory, M::ranges, None, |desc, ch, iovs, count, done, arg| {
            let (buffer, len) = match count {
                0 => (std::ptr::null_mut(), 0),
                // SAFETY: one entry, written by `ranges`.
                1 => unsafe { ((*iovs).iov_base, (*iovs).iov_len) },
                _ => return -libc::EINVAL,
            };
            let admin = queue == NvmeQueue::Admin;
            // SAFETY: open; the command is copied; the memory stays in the slot until completion.
            unsafe { spdk_sys::ps_bdev_nvme(desc, ch, admin, command.as_ptr().cast(), buffer, len, done, arg) }
        })
    }

    /// I/Os that have been submitted and not completed.
    pub fn in_flight(&self) -> usize {
        self.inner.slots.len() - self.inner.free.borrow().len()
    }

    /// I/Os that SPDK took since the channel was made: a cost counter.
    pub fn submitted(&self) -> u64 {
        self.inner.submitted.get()
    }

    /// Bytes a block, as it was when the channel was made.
    pub fn block_size(&self) -> u32 {
        self.inner.block_size
    }
}

/// Which queue a raw NVMe command goes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NvmeQueue {
    Io,
    Admin,
}

/// Makes a device of memory. App thread. Volatile, for tests and demos.
pub fn create_malloc(name: &str, uuid: [u8; 16], blocks: u64, block_size: u32) -> Result<(), Errno> {
    thread::assert_app_thread("creating a malloc device");
    let name = c_string(name)?;
    // SAFETY: SPDK copies the name and the uuid.
    Errno::check(unsafe { spdk_sys::ps_malloc_create(name.as_ptr(), uuid.as_ptr(), blocks, block_size) })
}

/// Removes a device that [`create_malloc`] made, once its users have let go. App thread.
pub fn delete_malloc(name: &str, done: impl FnOnce(Result<(), Errno>) + 'static) {
    thread::assert_app_thread("deleting a malloc device");
    let Ok(name) = c_string(name) else { return done(Err(Errno::INVAL)) };
    callback::start(done, |arg| {
        // SAFETY: SPDK looks the name up before it returns, and calls back once.
        unsafe { spdk_sys::ps_malloc_delete(name.as_ptr(), Some(callback::on_status), arg) };
        0
    });
}
