//! Drives as a core sees them: commands in, completions out, in an order that the engine may rely on.
//!
//! [`Backend`] is an opened drive, shared by all cores. [`CoreDisks`] is one core's way to all of them: one io_uring for the files and
//! block devices, SPDK channels for the rest. A command that a device does not take now waits here, in order, and is offered again
//! each turn; the engine never hears of it. Not here: labels, stores, and whether a drive should be used at all (`drives`).

mod backend;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use penstock_uring::{ByteOffset, FileIndex, Finished, Refusal, Ring, RingOpts, Token};
use penstock_wire::{BLOCK, BlockAddr};
use spdk_rs::bdev::{BdevChannel, Done};
use spdk_rs::lend::{SourcePart, TargetPart};
use spdk_rs::thread::Waker;

use backend::Medium;
pub use backend::{Backend, BackendError, barrier_in_use, open_bdev, open_file, prospect};

/// Pieces of memory of one command, in the order of its bytes. The vectors go round: no allocation per command.
pub type Sources = Vec<SourcePart>;
pub type Targets = Vec<TargetPart>;

/// A drive's place among those that this core uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskIndex(pub u16);

/// What a device is asked. Blocks are 4 KiB, from the drive's start.
pub enum Command {
    Read(Targets),
    Write(Sources),
    Flush,
}

struct Request {
    token: u64,
    at: BlockAddr,
    blocks: u64,
    command: Command,
}

/// Room for commands per drive and core.
const CHANNEL_DEPTH: usize = 512;
const RING_DEPTH: u32 = 1024;

enum Queue {
    File(FileIndex),
    Bdev { reads: BdevChannel<Targets>, writes: BdevChannel<Sources>, lbas_per_block: u64, lbas: u64 },
}

struct Disk {
    queue: Queue,
    waiting: VecDeque<Request>,
    out: u32,
    counters: DiskCounters,
    /// Keeps the drive open.
    backend: Backend,
}

impl Disk {
    fn barrier_answered(&mut self, ok: bool) -> bool {
        self.counters.flush_errors += u64::from(!ok);
        self.backend.barrier_counts(ok)
    }
}

/// Counts of one drive on one core, since it was attached.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct DiskCounters {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub read_errors: u64,
    pub write_errors: u64,
    pub flush_errors: u64,
    /// Times a device did not take a command at once.
    pub refusals: u64,
}

/// Completions of bdevs since the last turn, pushed by SPDK's callbacks on this thread.
#[derive(Default)]
struct BdevDone {
    reads: Vec<Done<Targets>>,
    writes: Vec<Done<Sources>>,
}

/// All drives of one core.
pub struct CoreDisks {
    ring: Option<Ring<Targets, Sources>>,
    disks: Vec<Option<Disk>>,
    bdev_done: Rc<RefCell<BdevDone>>,
    bdev_taken: BdevDone,
    waker: Waker,
    spare_sources: Vec<Sources>,
    spare_targets: Vec<Targets>,
}

/// One completion, as the core hears it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskDone {
    pub token: u64,
    pub ok: bool,
}

impl CoreDisks {
    /// `waker` wakes this core's loop.
    pub fn new(waker: Waker) -> Self {
        Self {
            ring: None,
            disks: Vec::new(),
            bdev_done: Rc::default(),
            bdev_taken: BdevDone::default(),
            waker,
            spare_sources: Vec::new(),
            spare_targets: Vec::new(),
        }
    }

    /// Begins to use a drive on this core, whose SPDK thread must be running. `Some(fd)` when the ring was made just now: it becomes
    /// readable when there is something to reap.
    ///
    /// # Errors
    /// When the kernel has no io_uring, or SPDK no channel.
    pub fn attach(&mut self, backend: &Backend) -> Result<(DiskIndex, Option<RawFd>), BackendError> {
        let mut fd = None;
        let queue = match &backend.medium {
            Medium::File(file) => {
                if self.ring.is_none() {
                    let mut ring = Ring::new(RingOpts { depth: RING_DEPTH, ..Default::default() }).map_err(BackendError::Ring)?;
                    if spdk_rs::thread::interrupt_mode() {
                        fd = Some(ring.event_fd().map_err(BackendError::Ring)?.as_raw_fd());
                    }
                    self.ring = Some(ring);
                }
                Queue::File(self.ring.as_mut().expect("made above").attach(file.clone()))
            }
            Medium::Bdev(open) => {
                let (done, waker) = (self.bdev_done.clone(), self.waker.clone());
                let on_read = move |d: Done<Targets>| {
                    done.borrow_mut().reads.push(d);
                    waker.wake();
                };
                let (done, waker) = (self.bdev_done.clone(), self.waker.clone());
                let on_write = move |d: Done<Sources>| {
                    done.borrow_mut().writes.push(d);
                    waker.wake();
                };
                let geometry = open.bdev.geometry();
                Queue::Bdev {
                    reads: open.bdev.channel(CHANNEL_DEPTH, on_read).map_err(BackendError::Channel)?,
                    writes: open.bdev.channel(CHANNEL_DEPTH, on_write).map_err(BackendError::Channel)?,
                    lbas_per_block: BLOCK as u64 / u64::from(geometry.block_size),
                    lbas: geometry.block_count,
                }
            }
        };
        let disk = Disk { queue, waiting: VecDeque::new(), out: 0, counters: DiskCounters::default(), backend: backend.clone() };
        let at = match self.disks.iter().position(Option::is_none) {
            Some(at) => {
                self.disks[at] = Some(disk);
                at
            }
            None => {
                self.disks.push(Some(disk));
                self.disks.len() - 1
            }
        };
        Ok((DiskIndex(at as u16), fd))
    }

    /// Lets go of a drive; false while commands are out.
    pub fn detach(&mut self, disk: DiskIndex) -> bool {
        let slot = &mut self.disks[usize::from(disk.0)];
        let Some(found) = slot else { return true };
        if found.out > 0 || !found.waiting.is_empty() {
            return false;
        }
        if let (Queue::File(file), Some(ring)) = (&found.queue, &mut self.ring) {
            ring.detach(*file);
        }
        *slot = None;
        true
    }

    pub fn sources(&mut self) -> Sources {
        self.spare_sources.pop().unwrap_or_default()
    }

    pub fn targets(&mut self) -> Targets {
        self.spare_targets.pop().unwrap_or_default()
    }

    /// Sends a command, or holds it until the device takes it.
    pub fn submit(&mut self, disk: DiskIndex, token: u64, at: BlockAddr, blocks: u64, command: Command) {
        let request = Request { token, at, blocks, command };
        let slot = self.disks[usize::from(disk.0)].as_mut().expect("the drive is attached");
        slot.out += 1;
        slot.counters.started(&request);
        if !slot.waiting.is_empty() {
            slot.waiting.push_back(request);
            return;
        }
        if let Err(back) = send(slot, self.ring.as_mut(), &self.bdev_done, disk, request) {
            slot.counters.refusals += 1;
            slot.waiting.push_back(back);
        }
    }

    /// Offers again what was not taken, and hands the kernel its batch: one syscall at most. Call at the end of a turn.
    ///
    /// # Errors
    /// When the ring is of no more use: the process cannot go on.
    pub fn flush_submissions(&mut self) -> std::io::Result<()> {
        for (at, slot) in self.disks.iter_mut().enumerate() {
            let Some(disk) = slot else { continue };
            while let Some(request) = disk.waiting.pop_front() {
                if let Err(back) = send(disk, self.ring.as_mut(), &self.bdev_done, DiskIndex(at as u16), request) {
                    disk.waiting.push_front(back);
                    break;
                }
            }
        }
        match &mut self.ring {
            Some(ring) => ring.submit().map(|_| ()),
            None => Ok(()),
        }
    }

    pub fn counters(&self, disk: DiskIndex) -> DiskCounters {
        self.disks[usize::from(disk.0)].as_ref().map(|disk| disk.counters).unwrap_or_default()
    }

    /// Commands that wait for a device to take them.
    pub fn waiting(&self) -> usize {
        self.disks.iter().flatten().map(|disk| disk.waiting.len()).sum()
    }

    /// Commands that are out or wait.
    pub fn out(&self) -> u32 {
        self.disks.iter().flatten().map(|disk| disk.out).sum()
    }

    /// Takes the signal off the ring's event.
    pub fn clear_event(&self) {
        if let Some(ring) = &self.ring {
            ring.clear_event();
        }
    }

    /// Hands over what completed. Costs no syscall.
    pub fn reap(&mut self, out: &mut Vec<DiskDone>) {
        let Self { ring, disks, bdev_done, bdev_taken, spare_sources, spare_targets, .. } = self;
        if let Some(ring) = ring {
            ring.reap(usize::MAX, |done| {
                let mut ok = done.result.is_ok();
                if let Err(fault) = &done.result {
                    tracing::warn!(token = done.token.0, %fault, "a drive failed a command");
                }
                let disk = disks.iter_mut().flatten().find(|d| matches!(d.queue, Queue::File(f) if f == done.file));
                let disk = disk.expect("a drive with commands out stays attached");
                disk.out -= 1;
                match done.what {
                    Finished::Read(memory) => {
                        disk.counters.read_errors += u64::from(!ok);
                        keep(spare_targets, memory);
                    }
                    Finished::Write(memory) => {
                        disk.counters.write_errors += u64::from(!ok);
                        keep(spare_sources, memory);
                    }
                    Finished::Sync => ok = disk.barrier_answered(ok),
                    Finished::Discard => {}
                }
                out.push(DiskDone { token: done.token.0, ok });
            });
        }
        {
            let mut fresh = bdev_done.borrow_mut();
            if fresh.reads.is_empty() && fresh.writes.is_empty() {
                return;
            }
            std::mem::swap(&mut *fresh, bdev_taken);
        }
        // A bdev's tokens carry the drive in their top bits: see `tag`.
        for done in bdev_taken.reads.drain(..) {
            let (disk, token) = untag(done.token);
            let ok = done.result.is_ok();
            if let Err(status) = &done.result {
                tracing::warn!(token, %status, "a drive failed a read");
            }
            let disk = disks[disk].as_mut().expect("a drive with commands out stays attached");
            disk.out -= 1;
            disk.counters.read_errors += u64::from(!ok);
            keep(spare_targets, done.memory.unwrap_or_default());
            out.push(DiskDone { token, ok });
        }
        for done in bdev_taken.writes.drain(..) {
            let (disk, token) = untag(done.token);
            let mut ok = done.result.is_ok();
            if let Err(status) = &done.result {
                tracing::warn!(token, %status, "a drive failed a write or flush");
            }
            let disk = disks[disk].as_mut().expect("a drive with commands out stays attached");
            disk.out -= 1;
            match done.memory {
                Some(memory) => {
                    disk.counters.write_errors += u64::from(!ok);
                    keep(spare_sources, memory);
                }
                None => ok = disk.barrier_answered(ok),
            }
            out.push(DiskDone { token, ok });
        }
    }
}

fn keep<P>(spare: &mut Vec<Vec<P>>, mut memory: Vec<P>) {
    // Dropping the parts gives the memory back to its owner.
    memory.clear();
    spare.push(memory);
}

impl DiskCounters {
    fn started(&mut self, request: &Request) {
        let bytes = request.blocks * BLOCK as u64;
        match request.command {
            Command::Read(_) => {
                self.reads += 1;
                self.read_bytes += bytes;
            }
            Command::Write(_) => {
                self.writes += 1;
                self.write_bytes += bytes;
            }
            Command::Flush => self.flushes += 1,
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.read_bytes += other.read_bytes;
        self.write_bytes += other.write_bytes;
        self.read_errors += other.read_errors;
        self.write_errors += other.write_errors;
        self.flush_errors += other.flush_errors;
        self.refusals += other.refusals;
    }
}

const TAG_SHIFT: u32 = 48;

fn tag(disk: DiskIndex, token: u64) -> u64 {
    debug_assert!(token >> TAG_SHIFT == 0, "tokens have {TAG_SHIFT} bits");
    u64::from(disk.0) << TAG_SHIFT | token
}

fn untag(token: u64) -> (usize, u64) {
    ((token >> TAG_SHIFT) as usize, token & ((1 << TAG_SHIFT) - 1))
}

/// Offers a command to its device. A refusal that can pass gives it back; one that cannot is a failed command.
fn send(
    disk: &mut Disk,
    ring: Option<&mut Ring<Targets, Sources>>,
    failed: &Rc<RefCell<BdevDone>>,
    index: DiskIndex,
    request: Request,
) -> Result<(), Request> {
    let Request { token, at, blocks, command } = request;
    match &disk.queue {
        Queue::File(file) => {
            let ring = ring.expect("a file is attached through the ring");
            let offset = ByteOffset(at.0 * BLOCK as u64);
            let passing = |why: &Refusal| matches!(why, Refusal::Full { .. });
            let (why, command) = match command {
                Command::Read(memory) => match ring.submit_readv(Token(token), *file, offset, memory) {
                    Ok(()) => return Ok(()),
                    Err(refused) => (refused.why, Command::Read(refused.buf)),
                },
                Command::Write(memory) => match ring.submit_writev(Token(token), *file, offset, memory) {
                    Ok(()) => return Ok(()),
                    Err(refused) => (refused.why, Command::Write(refused.buf)),
                },
                Command::Flush => match ring.submit_fsync(Token(token), *file) {
                    Ok(()) => return Ok(()),
                    Err(why) => (why, Command::Flush),
                },
            };
            if passing(&why) {
                return Err(Request { token, at, blocks, command });
            }
            tracing::error!(token, %why, "a command could not be sent to its drive");
            fail(failed, index, token, command);
            Ok(())
        }
        Queue::Bdev { reads, writes, lbas_per_block, lbas } => {
            let tagged = tag(index, token);
            let (offset, count) = (at.0 * lbas_per_block, blocks * lbas_per_block);
            let (errno, transient, command) = match command {
                Command::Read(memory) => match reads.read(memory, offset, count, tagged) {
                    Ok(()) => return Ok(()),
                    Err(refused) => (refused.errno, refused.is_transient(), Command::Read(refused.memory.unwrap_or_default())),
                },
                Command::Write(memory) => match writes.write(memory, offset, count, tagged) {
                    Ok(()) => return Ok(()),
                    Err(refused) => (refused.errno, refused.is_transient(), Command::Write(refused.memory.unwrap_or_default())),
                },
                Command::Flush => match writes.flush(0, *lbas, tagged) {
                    Ok(()) => return Ok(()),
                    Err(errno) => (errno, errno == spdk_rs::Errno::NOMEM || errno == spdk_rs::Errno::AGAIN, Command::Flush),
                },
            };
            if transient {
                return Err(Request { token, at, blocks, command });
            }
            tracing::error!(token, %errno, "a command could not be sent to its drive");
            fail(failed, index, token, command);
            Ok(())
        }
    }
}

/// A command that no device will ever take completes as failed, on the next turn, like any other.
fn fail(failed: &Rc<RefCell<BdevDone>>, index: DiskIndex, token: u64, command: Command) {
    let result = Err(spdk_rs::NvmeStatus::INTERNAL_DEVICE_ERROR);
    let token = tag(index, token);
    let mut failed = failed.borrow_mut();
    match command {
        Command::Read(memory) => failed.reads.push(Done { token, result, cdw0: 0, memory: Some(memory) }),
        Command::Write(memory) => failed.writes.push(Done { token, result, cdw0: 0, memory: Some(memory) }),
        Command::Flush => failed.writes.push(Done { token, result, cdw0: 0, memory: None }),
    }
}
