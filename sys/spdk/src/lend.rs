//! Memory lent to devices by the piece, so that its owner can stay safe code that keeps the whole.
//!
//! A [`LendBuf`] is DMA memory of ours; a [`HostSlab`] holds host commands and their payloads. Either lends pieces: a
//! [`SourcePart`] for a device to read, a [`TargetPart`] for one to fill. Loans are counted. While a piece is out as a
//! target its owner may not look at the bytes; while any piece is out it may not change them, give the memory away, or
//! complete the command: each of these panics. A part keeps the memory alive by itself.
//!
//! For one core: nothing here is `Send`. Lending, returning and completing allocate nothing. Not here: pools and their
//! policy, and what the bytes mean.

use crate::app;
use crate::bdev::{IoMemory, IoMemoryMut, Ranges};
use crate::dma::DmaBuf;
use crate::module::HostIo;
use crate::status::Status;
use crate::thread::{Core, current_core};
use penstock_uring::{AlignedBuf, SliceSink, StableBuf, StableBufMut};
use std::cell::{Cell, RefCell};
use std::mem::ManuallyDrop;
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::rc::Rc;

#[derive(Default)]
struct Loans {
    source: Cell<u32>,
    target: Cell<u32>,
}

impl Loans {
    fn count(&self, role: Role) -> &Cell<u32> {
        match role {
            Role::Source => &self.source,
            Role::Target => &self.target,
        }
    }
    fn any(&self) -> bool {
        self.source.get() != 0 || self.target.get() != 0
    }
}

#[derive(Clone, Copy)]
enum Role {
    Source,
    Target,
}

/// What keeps a buffer's bytes allocated. Only ever dropped: the bytes are reached by pointer.
enum Backing {
    Dma(#[expect(dead_code, reason = "owned for its drop")] Rc<DmaBuf>),
    Heap(#[expect(dead_code, reason = "owned for its drop")] AlignedBuf),
}

struct BufInner {
    pointer: NonNull<u8>,
    len: usize,
    loans: Loans,
    backing: Backing,
}

impl BufInner {
    fn assert_mapped(&self) {
        if matches!(self.backing, Backing::Dma(_)) {
            assert!(app::env_is_up(), "DMA memory is gone once the app has ended");
        }
    }
}

/// A buffer, 4 KiB aligned, that can be lent to devices.
pub struct LendBuf {
    inner: Rc<BufInner>,
}

impl LendBuf {
    /// Cuts `memory` into equal buffers of `piece_len` bytes, a multiple of 4096. What is left over is not used.
    pub fn carve(mut memory: DmaBuf, piece_len: usize) -> Vec<LendBuf> {
        assert!(piece_len > 0 && piece_len.is_multiple_of(4096), "pieces of {piece_len} bytes are not made of 4 KiB blocks");
        let count = memory.len() / piece_len;
        let base = NonNull::from(&mut memory[..]).cast::<u8>();
        let memory = Rc::new(memory);
        (0..count)
            .map(|at| {
                // SAFETY: at < count, so the piece lies inside `memory`.
                let pointer = unsafe { base.add(at * piece_len) };
                let backing = Backing::Dma(memory.clone());
                LendBuf { inner: Rc::new(BufInner { pointer, len: piece_len, loans: Loans::default(), backing }) }
            })
            .collect()
    }

    /// On the heap: for tests, and for drives that are files. User-space drivers cannot reach it.
    pub fn heap(len: usize) -> LendBuf {
        let mut memory = AlignedBuf::zeroed(len);
        let pointer = NonNull::from(&mut memory[..]).cast::<u8>();
        LendBuf { inner: Rc::new(BufInner { pointer, len, loans: Loans::default(), backing: Backing::Heap(memory) }) }
    }

    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.inner.len
    }

    pub fn is_lent(&self) -> bool {
        self.inner.loans.any()
    }

    /// Panics while a device fills any of it.
    pub fn bytes(&self) -> &[u8] {
        self.inner.assert_mapped();
        assert_eq!(self.inner.loans.target.get(), 0, "a buffer was read while a device fills it");
        // SAFETY: `len` initialised bytes (zeroed when made) that we keep allocated. Nobody writes them while `self` is
        // borrowed: bytes_mut and lend_target want it mutably, and no target is out.
        unsafe { std::slice::from_raw_parts(self.inner.pointer.as_ptr(), self.inner.len) }
    }

    /// Panics while a device has any of it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.inner.assert_mapped();
        assert!(!self.inner.loans.any(), "a buffer was changed while a device has it");
        // SAFETY: as above; no part is out, and making one needs `self`.
        unsafe { std::slice::from_raw_parts_mut(self.inner.pointer.as_ptr(), self.inner.len) }
    }

    fn lend(&self, range: Range<usize>, role: Role) -> Part {
        assert!(range.start < range.end && range.end <= self.inner.len, "{range:?} of a buffer of {} bytes", self.inner.len);
        let count = self.inner.loans.count(role);
        count.set(count.get() + 1);
        Part { of: Of::Buf(self.inner.clone()), role, start: range.start, end: range.end }
    }

    /// Bytes for a device to read. Panics when the range leaves the buffer.
    pub fn lend_source(&self, range: Range<usize>) -> SourcePart {
        SourcePart(self.lend(range, Role::Source))
    }

    /// Bytes for a device to fill. Takes `self` mutably, so that nobody is looking.
    pub fn lend_target(&mut self, range: Range<usize>) -> TargetPart {
        TargetPart(self.lend(range, Role::Target))
    }
}

/// A command on its way: it may cross to another core, and is completed on the core it came to. Its payload may be reached
/// on any core, by whoever holds it.
///
/// Threads of SPDK must stay on their cores (the static scheduler, SPDK's default).
pub struct RoamingIo {
    /// The SPDK thread and the core that it came to are noted in its view.
    io: ManuallyDrop<HostIo>,
}

// SAFETY: a live I/O's fields and payload may be read from any thread; what must happen on its own is completion, which checks
// the core, and so is dropping, which never happens: a RoamingIo that is dropped is leaked.
unsafe impl Send for RoamingIo {}

impl RoamingIo {
    /// On the thread that the command came to.
    pub fn new(mut io: HostIo) -> RoamingIo {
        let home = current_core().expect("commands arrive on reactors");
        // SAFETY: reads a thread-local of SPDK's. HostIo is not Send, so this is the thread that it came to.
        let owner = unsafe { spdk_sys::spdk_get_thread() };
        let view = io.view_mut();
        (view.owner, view.home) = (owner, home.0);
        RoamingIo { io: ManuallyDrop::new(io) }
    }

    /// The core where it must be completed.
    pub fn home(&self) -> Core {
        Core(self.io.view().home)
    }

    /// Answers the host, from any SPDK thread of the home core; panics elsewhere. Never from inside `submit` of a device.
    pub fn complete(self, status: Status) {
        assert_eq!(current_core(), Some(self.home()), "a command is completed on the core that it came to");
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not touched again.
        let io = unsafe { ManuallyDrop::take(&mut this.io) };
        let owner = io.view().owner;
        // SAFETY: reads a thread-local of SPDK's.
        let current = unsafe { spdk_sys::spdk_get_thread() };
        if owner == current {
            io.complete(status);
            return;
        }
        // SAFETY: the owner lives, since a channel of its own has this I/O; it runs on this core alone, so it is not running now, and nothing
        // else can run on it until we set the current thread back.
        unsafe { spdk_sys::spdk_set_thread(owner) };
        io.complete(status);
        // SAFETY: the thread that was current when this was called, on the same core.
        unsafe { spdk_sys::spdk_set_thread(current) };
    }
}

impl Drop for RoamingIo {
    fn drop(&mut self) {
        app::log_error(&format!("{:?} of a host was dropped without an answer, away from its thread", *self.io));
    }
}

impl Deref for RoamingIo {
    type Target = HostIo;
    fn deref(&self) -> &HostIo {
        &self.io
    }
}

/// A host command's payload, or what stands for it.
pub enum Payload {
    /// Payload in front of which a network stands belongs to this process until completion. Guest memory, and an initiator's that
    /// is mapped here, does not: it changes at any time, so it is only ever copied.
    Io(RoamingIo),
    /// A command from within the process, whose payload is the first `len` bytes of a buffer.
    Buf { buf: LendBuf, len: usize },
    /// A command without payload.
    None,
}

struct Slot {
    payload: Option<Payload>,
    len: usize,
    direct: bool,
    loans: Loans,
}

/// Calls `each(pointer, len)` for the pieces of memory that hold bytes `start..end` of the payload.
fn walk(payload: &Payload, start: usize, end: usize, mut each: impl FnMut(NonNull<u8>, usize)) {
    match payload {
        Payload::None => panic!("payload bytes {start}..{end} of a command without payload"),
        Payload::Buf { buf, len } => {
            assert!(end <= *len, "payload bytes {start}..{end} of {len}");
            // SAFETY: within the buffer: end <= len <= buf.len(), checked when it was put.
            each(unsafe { buf.inner.pointer.add(start) }, end - start);
        }
        Payload::Io(io) => {
            let (first, second) = io.all_iovs();
            let mut at = 0;
            for iov in first.iter().chain(second) {
                let (from, to) = (start.max(at), end.min(at + iov.iov_len));
                if from < to {
                    // SAFETY: from - at < iov_len, so this stays inside the piece, which SPDK keeps until completion.
                    let pointer = unsafe { iov.iov_base.cast::<u8>().add(from - at) };
                    each(NonNull::new(pointer).expect("SPDK gives no null pieces"), to - from);
                }
                at += iov.iov_len;
                if at >= end {
                    return;
                }
            }
            panic!("payload bytes {start}..{end} of {at}");
        }
    }
}

/// Host commands that have not been answered, by slot. Slots are dense from 0 and reused.
#[derive(Default)]
pub struct HostSlab {
    // RefCell for the parts, which look up their memory when they are submitted.
    slots: Rc<RefCell<Vec<Slot>>>,
    free: Vec<u32>,
    /// For looking at what is not in one place; grows to the longest look and stays.
    scratch: RefCell<Vec<u8>>,
}

impl HostSlab {
    pub fn with_capacity(slots: usize) -> HostSlab {
        HostSlab { slots: Rc::new(RefCell::new(Vec::with_capacity(slots))), free: Vec::with_capacity(slots), scratch: RefCell::default() }
    }

    /// Holds a command; `direct` payloads (see [`HostSlab::is_direct`]) may be lent.
    pub fn put(&mut self, payload: Payload) -> u32 {
        let (len, direct) = match &payload {
            Payload::None => (0, false),
            Payload::Buf { buf, len } => {
                assert!(*len <= buf.len(), "a payload of {len} bytes in a buffer of {}", buf.len());
                (*len, len.is_multiple_of(4096))
            }
            Payload::Io(io) => {
                let (first, second) = io.all_iovs();
                let mut len = 0;
                let mut aligned = true;
                for iov in first.iter().chain(second) {
                    len += iov.iov_len;
                    aligned &= (iov.iov_base as usize).is_multiple_of(4096) && iov.iov_len.is_multiple_of(4096);
                }
                (len, aligned && io.payload_is_private())
            }
        };
        let slot = Slot { payload: Some(payload), len, direct, loans: Loans::default() };
        let mut slots = self.slots.borrow_mut();
        match self.free.pop() {
            Some(at) => {
                slots[at as usize] = slot;
                at
            }
            None => {
                slots.push(slot);
                slots.len() as u32 - 1
            }
        }
    }

    /// Gives the command back, to be completed. Panics while a piece of it is lent.
    pub fn take(&mut self, at: u32) -> Payload {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[at as usize];
        assert!(!slot.loans.any(), "a host command was taken while a device has its payload");
        let payload = slot.payload.take().expect("the slot holds a command");
        self.free.push(at);
        payload
    }

    /// Commands held.
    pub fn held(&self) -> usize {
        self.slots.borrow().len() - self.free.len()
    }

    /// Whether a device has a piece of the payload.
    pub fn is_lent(&self, at: u32) -> bool {
        self.slots.borrow()[at as usize].loans.any()
    }

    /// Bytes of the payload.
    pub fn len_of(&self, at: u32) -> usize {
        self.slots.borrow()[at as usize].len
    }

    /// Whether the payload is ours until completion and lies in whole, aligned 4 KiB pieces, so that it can be lent.
    pub fn is_direct(&self, at: u32) -> bool {
        self.slots.borrow()[at as usize].direct
    }

    fn with<R>(&self, at: u32, f: impl FnOnce(&Slot, &Payload) -> R) -> R {
        let slots = self.slots.borrow();
        let slot = &slots[at as usize];
        f(slot, slot.payload.as_ref().expect("the slot holds a command"))
    }

    /// Copies payload bytes from `offset` to `out`. Panics while a device fills the payload.
    pub fn copy_out(&self, at: u32, offset: usize, out: &mut [u8]) {
        self.with(at, |slot, payload| {
            assert_eq!(slot.loans.target.get(), 0, "a payload was read while a device fills it");
            let mut done = 0;
            walk(payload, offset, offset + out.len(), |pointer, len| {
                // SAFETY: `len` readable bytes there; `out` has room, since the pieces add up to its length; ours is distinct.
                unsafe { std::ptr::copy_nonoverlapping(pointer.as_ptr(), out[done..done + len].as_mut_ptr(), len) };
                done += len;
            });
        });
    }

    /// Copies `from` to the payload at `offset`. Panics while a device has the payload.
    pub fn copy_in(&mut self, at: u32, offset: usize, from: &[u8]) {
        self.with(at, |slot, payload| {
            assert!(!slot.loans.any(), "a payload was changed while a device has it");
            let mut done = 0;
            walk(payload, offset, offset + from.len(), |pointer, len| {
                // SAFETY: `len` writable bytes there (a read's payload is for us to fill); ours is distinct.
                unsafe { std::ptr::copy_nonoverlapping(from[done..done + len].as_ptr(), pointer.as_ptr(), len) };
                done += len;
            });
        });
    }

    /// Zeros payload bytes. Panics while a device has the payload.
    pub fn zero(&mut self, at: u32, offset: usize, len: usize) {
        self.with(at, |slot, payload| {
            assert!(!slot.loans.any(), "a payload was changed while a device has it");
            walk(payload, offset, offset + len, |pointer, len| {
                // SAFETY: `len` writable bytes there.
                unsafe { std::ptr::write_bytes(pointer.as_ptr(), 0, len) };
            });
        });
    }

    /// Shows `len` payload bytes from `offset`: in place where the payload is direct and they lie together, else a copy.
    pub fn look<R>(&self, at: u32, offset: usize, len: usize, f: impl FnOnce(&[u8]) -> R) -> R {
        let whole = self.with(at, |slot, payload| {
            assert_eq!(slot.loans.target.get(), 0, "a payload was read while a device fills it");
            if !slot.direct {
                return None;
            }
            let mut whole = None;
            walk(payload, offset, offset + len, |pointer, piece| whole = (piece == len).then_some(pointer));
            whole
        });
        match whole {
            // SAFETY: `len` bytes that belong to the transport of this process, which leaves them alone until completion; `self` is
            // borrowed, so the command is neither completed nor lent as a target meanwhile.
            Some(pointer) => f(unsafe { std::slice::from_raw_parts(pointer.as_ptr(), len) }),
            None => {
                let mut scratch = self.scratch.borrow_mut();
                if scratch.len() < len {
                    scratch.resize(len, 0);
                }
                self.copy_out(at, offset, &mut scratch[..len]);
                f(&scratch[..len])
            }
        }
    }

    fn lend(&self, at: u32, range: Range<usize>, role: Role) -> Part {
        self.with(at, |slot, _| {
            assert!(slot.direct, "only a direct payload can be lent");
            assert!(range.start < range.end && range.end <= slot.len, "{range:?} of a payload of {} bytes", slot.len);
            let count = slot.loans.count(role);
            count.set(count.get() + 1);
        });
        Part { of: Of::Host(self.slots.clone(), at), role, start: range.start, end: range.end }
    }

    /// Payload bytes for a device to read.
    pub fn lend_source(&self, at: u32, range: Range<usize>) -> SourcePart {
        SourcePart(self.lend(at, range, Role::Source))
    }

    /// Payload bytes for a device to fill.
    pub fn lend_target(&mut self, at: u32, range: Range<usize>) -> TargetPart {
        TargetPart(self.lend(at, range, Role::Target))
    }
}

enum Of {
    Buf(Rc<BufInner>),
    Host(Rc<RefCell<Vec<Slot>>>, u32),
}

struct Part {
    of: Of,
    role: Role,
    start: usize,
    end: usize,
}

impl Part {
    fn each(&self, mut each: impl FnMut(NonNull<u8>, usize)) {
        match &self.of {
            // SAFETY: start < end <= len, checked when it was lent.
            Of::Buf(buf) => each(unsafe { buf.pointer.add(self.start) }, self.end - self.start),
            Of::Host(slots, at) => {
                let slots = slots.borrow();
                let payload = slots[*at as usize].payload.as_ref().expect("a command is not taken while lent");
                walk(payload, self.start, self.end, each);
            }
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let less = |loans: &Loans| {
            let count = loans.count(self.role);
            count.set(count.get() - 1);
        };
        match &self.of {
            Of::Buf(buf) => less(&buf.loans),
            Of::Host(slots, at) => less(&slots.borrow()[*at as usize].loans),
        }
    }
}

/// Bytes that a device may read while this exists.
pub struct SourcePart(Part);
/// Bytes that a device may fill while this exists.
pub struct TargetPart(Part);

// SAFETY: the part keeps the memory allocated (Rc), or the command uncompleted (take panics); neither moves. While it is out
// every safe way to change the bytes panics.
unsafe impl IoMemory for SourcePart {
    fn ranges(&self, out: &mut Ranges<'_>) {
        self.0.each(|pointer, len| out.push(pointer.as_ptr(), len));
    }
}
// SAFETY: as above.
unsafe impl IoMemory for TargetPart {
    fn ranges(&self, out: &mut Ranges<'_>) {
        self.0.each(|pointer, len| out.push(pointer.as_ptr(), len));
    }
}
// SAFETY: while a target is out every safe way to read the bytes panics, too. Two targets of the same bytes are two devices that
// overwrite each other, which no safe code sees.
unsafe impl IoMemoryMut for TargetPart {}
// SAFETY: as IoMemory above.
unsafe impl StableBuf for SourcePart {
    fn push_slices(&self, out: &mut SliceSink<'_>) {
        self.0.each(|pointer, len| out.push(pointer, len));
    }
}
// SAFETY: as IoMemory above.
unsafe impl StableBuf for TargetPart {
    fn push_slices(&self, out: &mut SliceSink<'_>) {
        self.0.each(|pointer, len| out.push(pointer, len));
    }
}
// SAFETY: as IoMemoryMut above.
unsafe impl StableBufMut for TargetPart {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_lent_comes_back_when_the_part_is_dropped() {
        let mut buf = LendBuf::heap(8192);
        buf.bytes_mut().fill(7);
        let part = buf.lend_source(4096..8192);
        assert_eq!(buf.bytes()[5000], 7, "reading beside a reading device is fine");
        assert!(buf.is_lent());
        drop(part);
        buf.bytes_mut()[0] = 1;
    }

    #[test]
    fn part_keeps_the_memory_when_its_buffer_is_gone() {
        let mut buf = LendBuf::heap(4096);
        buf.bytes_mut().fill(9);
        let part = buf.lend_source(0..4096);
        drop(buf);
        let mut sum = 0usize;
        part.0.each(|pointer, len| {
            // SAFETY: the part keeps it; nobody writes.
            sum += unsafe { std::slice::from_raw_parts(pointer.as_ptr(), len) }.iter().map(|&b| b as usize).sum::<usize>();
        });
        assert_eq!(sum, 9 * 4096);
    }

    #[test]
    #[should_panic(expected = "read while a device fills it")]
    fn buffer_read_while_it_is_a_target_panics() {
        let mut buf = LendBuf::heap(4096);
        let _part = buf.lend_target(0..4096);
        buf.bytes();
    }

    #[test]
    #[should_panic(expected = "changed while a device has it")]
    fn buffer_changed_while_it_is_a_source_panics() {
        let mut buf = LendBuf::heap(4096);
        let _part = buf.lend_source(0..4096);
        buf.bytes_mut();
    }

    #[test]
    fn payload_in_a_buffer_is_copied_shown_and_lent() {
        let mut slab = HostSlab::default();
        let mut buf = LendBuf::heap(8192);
        buf.bytes_mut()[4096..].fill(3);
        let at = slab.put(Payload::Buf { buf, len: 8192 });
        assert!(slab.is_direct(at));
        let mut out = [0; 10];
        slab.copy_out(at, 4091, &mut out);
        assert_eq!(out, [0, 0, 0, 0, 0, 3, 3, 3, 3, 3]);
        slab.copy_in(at, 0, b"abc");
        slab.zero(at, 1, 1);
        slab.look(at, 0, 3, |bytes| assert_eq!(bytes, b"a\0c"));
        drop(slab.lend_source(at, 0..4096));
        drop(slab.lend_target(at, 4096..8192));
        assert!(matches!(slab.take(at), Payload::Buf { len: 8192, .. }));
        assert_eq!(slab.put(Payload::Buf { buf: LendBuf::heap(4096), len: 0 }), at, "slots are reused");
        assert_eq!(slab.held(), 1);
    }

    #[test]
    #[should_panic(expected = "taken while a device has its payload")]
    fn command_taken_while_lent_panics() {
        let mut slab = HostSlab::default();
        let at = slab.put(Payload::Buf { buf: LendBuf::heap(4096), len: 4096 });
        let _part = slab.lend_source(at, 0..4096);
        slab.take(at);
    }
}
