//! One core's ring: requests in, one syscall per turn, completions out.
//!
//! A turn of the loop is [`reap`](Ring::reap), then deciding, then [`submit`](Ring::submit). To sleep, pass
//! [`event_fd`](Ring::event_fd) to the loop's poller; on waking call [`clear_event`](Ring::clear_event) **before**
//! `reap`, so that a completion in between wakes again.
//!
//! Not here: threads. A ring stays on the core that made it (`!Send`), and blocks in [`wait`](Ring::wait) and drop only.

use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};

use crate::buf::{StableBuf, StableBufMut};
use crate::error::{Errno, IoFault, Refusal, Refused};
use crate::file::UringFile;
use crate::slot::{Held, Slot, check_range};

/// The caller's name for a request; comes back with its completion. The ring does not look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// Bytes from the start of a drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteOffset(pub u64);

/// A file attached to one ring. Once detached, an index names nothing for good: another file never answers to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIndex {
    at: u16,
    generation: u32,
}

impl FileIndex {
    pub(crate) const NONE: Self = Self { at: u16::MAX, generation: u32::MAX };
}

/// A finished request, with what it owned.
#[derive(Debug)]
pub struct Done<R, W> {
    pub token: Token,
    pub file: FileIndex,
    pub what: Finished<R, W>,
    /// Bytes transferred: for reads and writes all that were asked for; 0 for barriers and discards. On an error the
    /// range's content is unknown, and after a failed barrier so is every write since the last good one.
    pub result: Result<u32, IoFault>,
}

/// What finished.
#[derive(Debug)]
pub enum Finished<R, W> {
    Read(R),
    Write(W),
    Sync,
    Discard,
}

/// How to set a ring up.
#[derive(Clone, Copy, Debug)]
pub struct RingOpts {
    /// Requests in flight, 1 to 4096; one more is refused.
    pub depth: u32,
    /// How long dropping the ring waits for the kernel to let go of the buffers. After that the process aborts,
    /// because freeing memory that a device may still write is worse.
    pub drop_wait: Duration,
}

impl Default for RingOpts {
    fn default() -> Self {
        Self { depth: 256, drop_wait: Duration::from_secs(30) }
    }
}

/// What a ring has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingCounters {
    /// Requests accepted.
    pub requests: u64,
    /// Requests handed back.
    pub completions: u64,
    /// Requests refused.
    pub refusals: u64,
    /// `io_uring_enter` calls of `submit`.
    pub submit_syscalls: u64,
    /// Transfers that stopped early and were continued.
    pub continued_transfers: u64,
}

#[derive(Default)]
struct Place {
    file: Option<Arc<UringFile>>,
    generation: u32,
    in_flight: u32,
}

/// One core's ring. `R` is the buffer type of reads, `W` that of writes ([`crate::NoBuf`] if there are none).
pub struct Ring<R: StableBufMut, W: StableBuf> {
    ring: IoUring,
    slots: Box<[Slot<R, W>]>,
    free: Vec<u32>,
    places: Vec<Place>,
    /// Entries in the submission queue that the kernel has not taken yet.
    queued: u32,
    event: Option<OwnedFd>,
    counters: RingCounters,
    drop_wait: Duration,
    per_core: PhantomData<*mut ()>,
}

const DEPTH_LIMIT: u32 = 4096;
const FILES_LIMIT: usize = 1024;
/// Attempts of one transfer that the kernel may put off (EINTR, EAGAIN) before that is an error.
const STALLS_LIMIT: u8 = 16;

impl<R: StableBufMut, W: StableBuf> Ring<R, W> {
    /// Makes a ring on the calling thread, which must be the only one to use it.
    ///
    /// # Errors
    /// `InvalidInput` for a depth out of bounds; `Unsupported` where the kernel is too old (5.11 is needed) or
    /// io_uring is switched off, saying which switch.
    pub fn new(opts: RingOpts) -> std::io::Result<Self> {
        if !(1..=DEPTH_LIMIT).contains(&opts.depth) {
            let what = format!("a ring of {} requests; it takes 1 to {DEPTH_LIMIT}", opts.depth);
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, what));
        }
        let mut builder = IoUring::builder();
        builder.dontfork();
        let ring = builder.build(opts.depth.next_power_of_two()).map_err(explain_setup)?;
        require_features(&ring)?;
        Ok(Self {
            ring,
            slots: (0..opts.depth).map(|_| Slot::empty()).collect(),
            free: (0..opts.depth).rev().collect(),
            places: Vec::new(),
            queued: 0,
            event: None,
            counters: RingCounters::default(),
            drop_wait: opts.drop_wait,
            per_core: PhantomData,
        })
    }

    /// Lets requests name `file`. The same file may be attached to one ring per core.
    ///
    /// # Panics
    /// At more than 1024 files on one ring.
    pub fn attach(&mut self, file: Arc<UringFile>) -> FileIndex {
        let at = self.places.iter().position(|p| p.file.is_none()).unwrap_or_else(|| {
            assert!(self.places.len() < FILES_LIMIT, "more than {FILES_LIMIT} files on one ring");
            self.places.push(Place::default());
            self.places.len() - 1
        });
        let place = &mut self.places[at];
        place.file = Some(file);
        place.generation += 1;
        FileIndex { at: at as u16, generation: place.generation }
    }

    /// Forgets a file. `None` if it is not attached or has requests in flight: reap those first.
    pub fn detach(&mut self, file: FileIndex) -> Option<Arc<UringFile>> {
        self.file(file)?;
        let place = &mut self.places[usize::from(file.at)];
        if place.in_flight == 0 { place.file.take() } else { None }
    }

    /// The file behind an index.
    pub fn file(&self, file: FileIndex) -> Option<&Arc<UringFile>> {
        let place = self.places.get(usize::from(file.at))?;
        if place.generation == file.generation { place.file.as_ref() } else { None }
    }

    /// Queues a read into `buf`, over all of its slices. A refusal hands `buf` back.
    pub fn submit_readv(&mut self, token: Token, file: FileIndex, at: ByteOffset, buf: R) -> Result<(), Refused<R>> {
        match self.prepare(&buf, token, file, at, false) {
            Ok(slot) => {
                self.slots[slot].held = Held::Read(buf);
                self.push_transfer(slot);
                Ok(())
            }
            Err(why) => Err(self.refused(buf, why)),
        }
    }

    /// Queues a write of `buf`, all of its slices. A refusal hands `buf` back. Durable only after a barrier submitted
    /// when this write's completion had been reaped.
    pub fn submit_writev(&mut self, token: Token, file: FileIndex, at: ByteOffset, buf: W) -> Result<(), Refused<W>> {
        match self.prepare(&buf, token, file, at, true) {
            Ok(slot) => {
                self.slots[slot].held = Held::Write(buf);
                self.push_transfer(slot);
                Ok(())
            }
            Err(why) => Err(self.refused(buf, why)),
        }
    }

    /// Queues an asynchronous fdatasync: the barrier over every write **whose completion was reaped before**. The
    /// kernel reports a failed write-back once for all users of the file: a failure here concerns every core on it.
    pub fn submit_fsync(&mut self, token: Token, file: FileIndex) -> Result<(), Refusal> {
        let fd = self.writable(file).map(UringFile::raw_fd).inspect_err(|_| self.counters.refusals += 1)?;
        let slot = self.occupy(token, file, ByteOffset(0)).inspect_err(|_| self.counters.refusals += 1)?;
        self.slots[slot].held = Held::Sync;
        self.push(opcode::Fsync::new(Fd(fd)).flags(FsyncFlags::DATASYNC).build(), slot);
        Ok(())
    }

    /// Queues a discard of whole blocks; the range reads as zeros afterwards. Runs on a kernel worker, never in line.
    /// Completes with EOPNOTSUPP where file system or device can't (see [`crate::FileDiscard`]).
    pub fn submit_discard(&mut self, token: Token, file: FileIndex, at: ByteOffset, len: u64) -> Result<(), Refusal> {
        let checked = self.writable(file).and_then(|f| check_range(f, at, len).map(|()| (f.raw_fd(), f.discard_mode())));
        let (fd, mode) = checked.inspect_err(|_| self.counters.refusals += 1)?;
        let slot = self.occupy(token, file, at).inspect_err(|_| self.counters.refusals += 1)?;
        self.slots[slot].held = Held::Discard;
        self.push(opcode::Fallocate::new(Fd(fd), len).offset(at.0).mode(mode).build(), slot);
        Ok(())
    }

    /// Hands everything queued to the kernel with one syscall; none if nothing is queued. Call once per turn.
    /// Returns how many entries are still queued: not 0 if the kernel is short of memory just now; call again next
    /// turn.
    ///
    /// # Errors
    /// Anything but a passing shortage; the ring is then of no more use.
    pub fn submit(&mut self) -> std::io::Result<u32> {
        if self.queued == 0 {
            return Ok(0);
        }
        self.counters.submit_syscalls += 1;
        match self.ring.submit() {
            Ok(_) => {}
            Err(err) if is_passing(&err) => {}
            Err(err) => return Err(err),
        }
        self.queued = self.ring.submission().len() as u32;
        Ok(self.queued)
    }

    /// Hands at most `budget` completions to `each`, without a syscall; returns how many. Transfers that stopped
    /// early are continued here and complete later: `submit` after `reap`, even if there is nothing new.
    pub fn reap(&mut self, budget: usize, mut each: impl FnMut(Done<R, W>)) -> usize {
        let (_, mut submission, mut completion) = self.ring.split();
        let mut handed = 0;
        while handed < budget {
            let Some(entry) = completion.next() else { break };
            let index = entry.user_data() as usize;
            let slot = &mut self.slots[index];
            let place = &mut self.places[usize::from(slot.file.at)];
            let file = place.file.as_deref().expect("a file with requests stays attached");
            let result = match outcome(slot, file, entry.result()) {
                Outcome::Finished(result) => result,
                Outcome::Continue => {
                    let again = transfer(slot, file).user_data(index as u64);
                    // SAFETY: as in `push`: the slot owns buffer and slices until its completion is reaped.
                    unsafe { submission.push(&again) }.expect("the queue has a place for every slot");
                    self.queued += 1;
                    self.counters.continued_transfers += 1;
                    continue;
                }
            };
            let what = match std::mem::replace(&mut slot.held, Held::Free) {
                Held::Read(buf) => Finished::Read(buf),
                Held::Write(buf) => Finished::Write(buf),
                Held::Sync => Finished::Sync,
                Held::Discard => Finished::Discard,
                Held::Free => unreachable!("the kernel completed slot {index}, which holds no request"),
            };
            place.in_flight -= 1;
            self.free.push(index as u32);
            self.counters.completions += 1;
            handed += 1;
            each(Done { token: slot.token, file: slot.file, what, result });
        }
        handed
    }

    /// Submits, then blocks until there is something to reap, at most for `timeout`. False on a timeout. For tools,
    /// tests and shutdown; the loop sleeps on `event_fd`.
    pub fn wait(&mut self, timeout: Duration) -> std::io::Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            if !self.ring.completion().is_empty() {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.in_flight() == 0 {
                return Ok(false);
            }
            let limit = Timespec::new().sec(left.as_secs()).nsec(left.subsec_nanos());
            match self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&limit)) {
                Ok(_) => {}
                Err(err) if err.raw_os_error() == Some(libc::ETIME) || is_passing(&err) => {}
                Err(err) => return Err(err),
            }
            self.queued = self.ring.submission().len() as u32;
        }
    }

    /// An eventfd that becomes readable when a request completes. Made and registered on first use, so that a ring
    /// that is only polled pays nothing for it.
    pub fn event_fd(&mut self) -> std::io::Result<BorrowedFd<'_>> {
        if self.event.is_none() {
            // SAFETY: plain integers.
            let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
            if fd < 0 {
                return Err(std::io::Error::last_os_error());
            }
            // SAFETY: just made, owned by nobody else.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            self.ring.submitter().register_eventfd(fd.as_raw_fd())?;
            self.event = Some(fd);
        }
        Ok(self.event.as_ref().expect("made above").as_fd())
    }

    /// Takes the signal off the eventfd. Call before `reap`.
    pub fn clear_event(&self) {
        let Some(event) = &self.event else { return };
        let mut count = 0u64;
        // SAFETY: an open descriptor and room for 8 bytes. EAGAIN (nothing signalled) is as good as success.
        unsafe { libc::read(event.as_raw_fd(), std::ptr::from_mut(&mut count).cast(), 8) };
    }

    /// Switches the eventfd's signals off while the loop polls anyway, and on before it sleeps. After switching on,
    /// reap once more before sleeping.
    pub fn wake_on_completion(&mut self, on: bool) {
        let completion = self.ring.completion();
        if on { completion.enable_eventfd() } else { completion.disable_eventfd() }
    }

    /// Requests that own a buffer or a place now: queued, with the kernel, or waiting to be reaped.
    pub fn in_flight(&self) -> u32 {
        (self.slots.len() - self.free.len()) as u32
    }

    /// Requests that would be accepted before `Refusal::Full`.
    pub fn room(&self) -> u32 {
        self.free.len() as u32
    }

    /// Entries that the next `submit` will hand over.
    pub fn queued(&self) -> u32 {
        self.queued
    }

    pub fn counters(&self) -> RingCounters {
        self.counters
    }

    fn refused<B>(&mut self, buf: B, why: Refusal) -> Refused<B> {
        self.counters.refusals += 1;
        Refused { buf, why }
    }

    fn attached(&self, file: FileIndex) -> Result<&UringFile, Refusal> {
        self.file(file).map(|f| &**f).ok_or(Refusal::NotAttached)
    }

    fn writable(&self, file: FileIndex) -> Result<&UringFile, Refusal> {
        let found = self.attached(file)?;
        if found.read_only() { Err(Refusal::ReadOnly) } else { Ok(found) }
    }

    /// A slot with the slices of `buf` checked and taken over. On a refusal nothing is held.
    fn prepare<B: StableBuf>(&mut self, buf: &B, token: Token, file: FileIndex, at: ByteOffset, write: bool) -> Result<usize, Refusal> {
        if write {
            self.writable(file)?
        } else {
            self.attached(file)?
        };
        let next = *self.free.last().ok_or(self.full())? as usize;
        let drive = self.places[usize::from(file.at)].file.as_deref().expect("checked above");
        let want = self.slots[next].take_slices(buf, drive, at)?;
        let slot = self.occupy(token, file, at)?;
        self.slots[slot].want = want;
        Ok(slot)
    }

    fn full(&self) -> Refusal {
        Refusal::Full { depth: self.slots.len() as u32 }
    }

    fn occupy(&mut self, token: Token, file: FileIndex, offset: ByteOffset) -> Result<usize, Refusal> {
        let index = self.free.pop().ok_or(self.full())? as usize;
        self.places[usize::from(file.at)].in_flight += 1;
        let slot = &mut self.slots[index];
        (slot.token, slot.file, slot.offset) = (token, file, offset);
        (slot.first, slot.want, slot.done, slot.stalls) = (0, 0, 0, 0);
        Ok(index)
    }

    fn push_transfer(&mut self, index: usize) {
        let slot = &self.slots[index];
        let file = self.places[usize::from(slot.file.at)].file.as_deref();
        let entry = transfer(slot, file.expect("checked by the caller"));
        self.push(entry, index);
    }

    fn push(&mut self, entry: squeue::Entry, index: usize) {
        let entry = entry.user_data(index as u64);
        // SAFETY: everything the entry points to lives until the kernel has answered: the slices in the slot's own
        // vector, which nobody touches while it is busy; the bytes in the buffer that the slot owns (`StableBuf`); the
        // descriptor in `places`, which keeps files with requests. Dropping the ring waits for all of them first.
        unsafe { self.ring.submission().push(&entry) }.expect("the queue has a place for every slot");
        self.queued += 1;
        self.counters.requests += 1;
    }
}

impl<R: StableBufMut, W: StableBuf> Drop for Ring<R, W> {
    /// Waits until the kernel has let go of every buffer, at most `drop_wait`; then aborts the process.
    fn drop(&mut self) {
        // A buffer whose own drop panics would unwind past requests in flight.
        let unwinding = AbortOnUnwind;
        let deadline = Instant::now() + self.drop_wait;
        while self.in_flight() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            let waited = self.wait(left);
            self.reap(usize::MAX, drop);
            if self.in_flight() > 0 && (waited.is_err() || left.is_zero()) {
                eprintln!(
                    "penstock-uring: the kernel still holds {} requests {} ms after the ring was dropped ({waited:?}); \
                     aborting, because their memory can't be freed. Is a drive stuck?",
                    self.in_flight(),
                    self.drop_wait.as_millis(),
                );
                std::process::abort();
            }
        }
        std::mem::forget(unwinding);
    }
}

struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        std::process::abort();
    }
}

/// The submission entry for what remains of a read or write.
fn transfer<R, W>(slot: &Slot<R, W>, file: &UringFile) -> squeue::Entry {
    let slices = &slot.iovecs[slot.first..];
    let (fd, at) = (Fd(file.raw_fd()), slot.offset.0 + u64::from(slot.done));
    match slot.held {
        Held::Write(_) => opcode::Writev::new(fd, slices.as_ptr(), slices.len() as u32).offset(at).build(),
        _ => opcode::Readv::new(fd, slices.as_ptr(), slices.len() as u32).offset(at).build(),
    }
}

enum Outcome {
    Finished(Result<u32, IoFault>),
    Continue,
}

/// What a completion means. A transfer that stopped early goes on from the last whole block, as direct I/O can't
/// start within one; no progress ends it.
fn outcome<R: StableBufMut, W: StableBuf>(slot: &mut Slot<R, W>, file: &UringFile, result: i32) -> Outcome {
    let is_transfer = matches!(slot.held, Held::Read(_) | Held::Write(_));
    if result < 0 {
        // A transfer interrupted before its first byte has simply not happened yet.
        if is_transfer && slot.stalls < STALLS_LIMIT && (-result == libc::EINTR || -result == libc::EAGAIN) {
            slot.stalls += 1;
            return Outcome::Continue;
        }
        return Outcome::Finished(Err(IoFault::Os(Errno(-result))));
    }
    let (got, left) = (result as u32, slot.want - slot.done);
    if !is_transfer || got == left {
        return Outcome::Finished(Ok(slot.want));
    }
    assert!(got < left, "the kernel moved {got} bytes where {left} were asked for");
    match got - got % file.block_size() {
        0 => Outcome::Finished(Err(IoFault::Short { want: slot.want, got: slot.done + got })),
        whole => {
            slot.advance(whole);
            Outcome::Continue
        }
    }
}

fn is_passing(err: &std::io::Error) -> bool {
    matches!(err.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR))
}

fn explain_setup(err: std::io::Error) -> std::io::Error {
    let why = match err.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no io_uring; Linux 5.11 or later is needed".to_string(),
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is switched off here: see sysctl kernel.io_uring_disabled, or the container's seccomp profile".into()
        }
        Some(libc::ENOMEM) => format!("no memory for a ring ({err}); raise RLIMIT_MEMLOCK or use a smaller depth"),
        _ => return err,
    };
    std::io::Error::new(std::io::ErrorKind::Unsupported, why)
}

fn require_features(ring: &IoUring) -> std::io::Result<()> {
    let missing = |what: &str| {
        let why = format!("this kernel's io_uring lacks {what}; Linux 5.11 or later is needed");
        Err(std::io::Error::new(std::io::ErrorKind::Unsupported, why))
    };
    if !ring.params().is_feature_nodrop() {
        return missing("completions that are never dropped");
    }
    if !ring.params().is_feature_ext_arg() {
        return missing("waiting with a timeout");
    }
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        (opcode::Readv::CODE, "readv"),
        (opcode::Writev::CODE, "writev"),
        (opcode::Fsync::CODE, "fsync"),
        (opcode::Fallocate::CODE, "fallocate"),
    ];
    match needed.into_iter().find(|(code, _)| !probe.is_supported(*code)) {
        Some((_, name)) => missing(name),
        None => Ok(()),
    }
}
