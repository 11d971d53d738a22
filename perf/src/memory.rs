//! A device in memory that answers after so long: no time at all for malloc, some µs for the media of a drive, or some ms for a drive that has gone slow.
//!
//! SPDK has `malloc` and `delay` for that, and both poll: a process that is to sleep between events spins with either. Here a timer wakes it; where the
//! process polls anyway, so does this.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};
use spdk_rs::Errno;
use spdk_rs::module::{Device, DeviceParams, FrontEnd, HostIo, IoKind, register};
use spdk_rs::status::{NvmeStatus, Status};
use spdk_rs::thread::{Activity, FdEvent, Poller, interrupt_mode};

use crate::units::Nanos;

const BLOCK: u64 = 4096;

/// The device.
pub struct Memory {
    /// One thread uses it at a time, so that nobody ever waits.
    bytes: Mutex<Vec<u8>>,
    nanos: AtomicU64,
}

struct Late {
    due: Instant,
    io: HostIo,
}

/// What one thread has waiting. The delay is the same for all, so they fall due in order; one that was made shorter waits for those before it.
struct Queue {
    waiting: RefCell<VecDeque<Late>>,
    timer: Option<OwnedFd>,
}

/// One thread's way in.
pub struct MemoryChannel {
    device: Arc<Memory>,
    queue: Rc<Queue>,
    _poller: Option<Poller>,
    _event: Option<FdEvent>,
}

impl Memory {
    /// Makes one of so many bytes. App thread.
    pub fn register(name: &str, bytes: u64, delay: Nanos) -> Result<Arc<Self>, Errno> {
        let params = DeviceParams {
            name: name.to_owned(),
            product: "Memory".to_owned(),
            uuid: [0; 16],
            block_count: bytes / BLOCK,
            block_size: BLOCK as u32,
            nvme_nsid: 0,
            compare_and_write_blocks: 0,
            front_end: FrontEnd::Other,
        };
        let length = usize::try_from(bytes).map_err(|_| Errno::INVAL)?;
        // Touched: the first write to a page is not to cost more than the next.
        let device = Arc::new(Self { bytes: Mutex::new(vec![0xa5; length]), nanos: AtomicU64::new(delay.0) });
        register(&params, device.clone())?; // for as long as the process lives
        Ok(device)
    }

    /// Another delay from now on.
    pub fn set(&self, delay: Nanos) {
        self.nanos.store(delay.0, Ordering::Relaxed);
    }
}

impl Queue {
    /// Answers what is due; true if there was any.
    fn answer_due(&self) -> bool {
        let now = Instant::now();
        let mut did = false;
        loop {
            // Not borrowed while answering: the answer may bring the next command.
            let late = {
                let mut waiting = self.waiting.borrow_mut();
                match waiting.front() {
                    Some(late) if late.due <= now => waiting.pop_front(),
                    _ => None,
                }
            };
            let Some(late) = late else { break };
            late.io.complete(Status::Success);
            did = true;
        }
        self.arm();
        did
    }

    /// Sets the timer for what falls due first.
    fn arm(&self) {
        let (Some(timer), Some(due)) = (&self.timer, self.waiting.borrow().front().map(|late| late.due)) else { return };
        // Nothing at all would disarm it.
        let left = due.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let value = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        timerfd_settime(timer, TimerfdTimerFlags::empty(), &once).expect("a valid time for a timer of ours");
    }

    fn push(&self, late: Late) {
        let is_first = {
            let mut waiting = self.waiting.borrow_mut();
            waiting.push_back(late);
            waiting.len() == 1
        };
        if is_first {
            self.arm();
        }
    }
}

fn open(device: &Arc<Memory>) -> Result<MemoryChannel, Errno> {
    let timer = interrupt_mode()
        .then(|| timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC))
        .transpose()
        .map_err(|errno| Errno::new(errno.raw_os_error()))?;
    let queue = Rc::new(Queue { waiting: RefCell::default(), timer });
    let (mut poller, mut event) = (None, None);
    let due = queue.clone();
    match &queue.timer {
        None => {
            poller = Some(Poller::busy("perf_memory", move || if due.answer_due() { Activity::Busy } else { Activity::Idle })?);
        }
        Some(timer) => {
            event = Some(FdEvent::register("perf_memory", timer.as_raw_fd(), move || {
                let _ = due.timer.as_ref().map(|timer| rustix::io::read(timer, &mut [0; 8]));
                if due.answer_due() { Activity::Busy } else { Activity::Idle }
            })?);
        }
    }
    Ok(MemoryChannel { device: device.clone(), queue, _poller: poller, _event: event })
}

impl Device for Memory {
    type Channel = MemoryChannel;

    fn supports(&self, kind: IoKind) -> bool {
        matches!(kind, IoKind::Read | IoKind::Write)
    }

    fn open_channel(self: &Arc<Self>) -> Option<MemoryChannel> {
        open(self).ok()
    }

    fn submit(channel: &MemoryChannel, mut io: HostIo) {
        let device = &channel.device;
        let at = (io.offset_blocks() * BLOCK) as usize;
        let range = at..at + io.payload_len(); // within the device: SPDK has checked it
        {
            let mut bytes = device.bytes.lock().unwrap_or_else(PoisonError::into_inner);
            match io.kind() {
                IoKind::Read => io.copy_in(0, &bytes[range]),
                IoKind::Write => io.copy_out(0, &mut bytes[range]),
                IoKind::Reset => return io.complete(Status::Success),
                _ => return io.complete(Status::Nvme(NvmeStatus::INVALID_OPCODE)),
            }
        }
        match device.nanos.load(Ordering::Relaxed) {
            0 => io.complete(Status::Success),
            nanos => channel.queue.push(Late { due: Instant::now() + Duration::from_nanos(nanos), io }),
        }
    }
}
