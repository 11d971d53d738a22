//! SPDK threads pinned to cores, pollers, and ways to wake them.
//!
//! [`ThreadHandle`] is the one thing here that crosses threads. `send` boxes a closure and is for control; a [`Waker`]
//! costs no allocation and, while its thread polls, no syscall. No executor, and no thread that wanders between cores.

use crate::app;
use crate::callback::c_string;
use crate::status::Errno;
use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_int, c_void};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// A reactor core by the system's number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Core(pub u32);

/// A pointer that may be looked at from any thread but used only as `spdk_thread_send_msg` allows.
struct ThreadPointer(NonNull<spdk_sys::spdk_thread>);
// SAFETY: the pointer is only ever passed to spdk_thread_send_msg, which is made for other threads, and compared.
unsafe impl Send for ThreadPointer {}

struct Inner {
    name: String,
    core: Core,
    /// None once the thread exits or the app stops. The lock keeps the thread alive while a message is being sent.
    pointer: Mutex<Option<ThreadPointer>>,
}

/// All threads made here, so that stopping the app can close their handles.
static THREADS: Mutex<Vec<Arc<Inner>>> = Mutex::new(Vec::new());
static APP_THREAD: OnceLock<ThreadHandle> = OnceLock::new();

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while holding these locks, and what they guard is whole at every step.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub(crate) fn close_all() {
    for thread in lock(&THREADS).drain(..) {
        lock(&thread.pointer).take();
    }
}

pub(crate) fn adopt_app_thread() {
    // SAFETY: called on the app thread.
    let pointer = unsafe { spdk_sys::spdk_get_thread() };
    let core = current_core().unwrap_or(Core(0));
    if let Some(pointer) = NonNull::new(pointer) {
        let handle = ThreadHandle::register("app_thread".into(), core, pointer);
        let _ = APP_THREAD.set(handle);
    }
}

/// The thread that runs the start closure, and on which bdevs, subsystems and controllers are made. None before it runs.
pub fn app_thread() -> Option<ThreadHandle> {
    APP_THREAD.get().cloned()
}

pub fn is_app_thread() -> bool {
    app_thread().is_some_and(|thread| thread.is_current())
}

/// Asserts a rule of SPDK's that nothing else would check.
pub(crate) fn assert_app_thread(what: &str) {
    assert!(is_app_thread(), "{what} is for the app thread alone");
}

/// The core that is running this, if it is a reactor.
pub fn current_core() -> Option<Core> {
    // SAFETY: reads a thread-local of DPDK's.
    let core = unsafe { spdk_sys::ps_current_core() };
    (core != u32::MAX).then_some(Core(core))
}

/// Names a thread for others; it does not keep it running.
#[derive(Clone)]
pub struct ThreadHandle {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for ThreadHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ThreadHandle({} on core {})", self.inner.name, self.inner.core.0)
    }
}

impl ThreadHandle {
    fn register(name: String, core: Core, pointer: NonNull<spdk_sys::spdk_thread>) -> ThreadHandle {
        let inner = Arc::new(Inner { name, core, pointer: Mutex::new(Some(ThreadPointer(pointer))) });
        lock(&THREADS).push(inner.clone());
        ThreadHandle { inner }
    }

    /// The handle of the SPDK thread that is running this, if it was made here.
    pub fn current() -> Option<ThreadHandle> {
        // SAFETY: reads a thread-local of SPDK's.
        let current = NonNull::new(unsafe { spdk_sys::spdk_get_thread() })?;
        lock(&THREADS)
            .iter()
            .find(|thread| lock(&thread.pointer).as_ref().is_some_and(|pointer| pointer.0 == current))
            .map(|inner| ThreadHandle { inner: inner.clone() })
    }

    pub fn name(&self) -> &str {
        &self.inner.name
    }

    pub fn core(&self) -> Core {
        self.inner.core
    }

    pub fn is_current(&self) -> bool {
        // SAFETY: reads a thread-local of SPDK's.
        let current = unsafe { spdk_sys::spdk_get_thread() };
        !current.is_null() && lock(&self.inner.pointer).as_ref().is_some_and(|pointer| pointer.0.as_ptr() == current)
    }

    /// Runs `f` there, soon, in the order sent. Boxed: for control, not for I/O. Err(SHUTDOWN) if the thread has exited or the
    /// app is stopping; `f` is then dropped here.
    pub fn send(&self, f: impl FnOnce() + Send + 'static) -> Result<(), Errno> {
        type Message = Box<dyn FnOnce() + Send>;
        extern "C" fn run(arg: *mut c_void) {
            // SAFETY: SPDK delivers each message once, with the argument that `send` made.
            let message = unsafe { Box::from_raw(arg.cast::<Message>()) };
            message();
        }
        let guard = lock(&self.inner.pointer);
        let Some(pointer) = guard.as_ref() else { return Err(Errno::SHUTDOWN) };
        let message: Message = Box::new(f);
        let arg = Box::into_raw(Box::new(message));
        // SAFETY: the thread exists: it is taken out of the handle, under this lock, before it is told to exit.
        let rc = unsafe { spdk_sys::spdk_thread_send_msg(pointer.0.as_ptr(), Some(run), arg.cast()) };
        if rc != 0 {
            // SAFETY: not sent, so still ours.
            drop(unsafe { Box::from_raw(arg) });
            return Err(Errno::new(rc.abs()));
        }
        Ok(())
    }
}

/// Makes an SPDK thread that only ever runs on `core`, and runs `init` on it. The core must be one of the app's.
pub fn spawn(name: &str, core: Core, init: impl FnOnce() + Send + 'static) -> Result<ThreadHandle, Errno> {
    if !app::cores().contains(&core) {
        return Err(Errno::INVAL);
    }
    let c_name = c_string(name)?;
    // SAFETY: the environment is up (cores() is empty otherwise); SPDK copies the name.
    let pointer = unsafe { spdk_sys::ps_thread_create(c_name.as_ptr(), core.0) };
    let handle = ThreadHandle::register(name.into(), core, NonNull::new(pointer).ok_or(Errno::NOMEM)?);
    handle.send(init)?;
    Ok(handle)
}

/// Ends the running SPDK thread, once its messages are handled. Drop its pollers and channels first: SPDK waits 5 s for them.
/// Not for the app thread, which [`app::stop`] ends.
pub fn exit_current() {
    assert!(!is_app_thread(), "the app thread ends with app::stop");
    let Some(handle) = ThreadHandle::current() else { return };
    lock(&handle.inner.pointer).take();
    lock(&THREADS).retain(|thread| !Arc::ptr_eq(thread, &handle.inner));
    // SAFETY: we run on it, and no handle reaches it any more.
    unsafe { spdk_sys::spdk_thread_exit(spdk_sys::spdk_get_thread()) };
}

/// Where a reactor's time went since the app started, in [`app::ticks`]. While it sleeps in interrupt mode neither grows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReactorTicks {
    pub busy: u64,
    pub idle: u64,
}

/// From any thread; the numbers are a moment old. None: not one of the app's cores.
pub fn reactor_ticks(core: Core) -> Option<ReactorTicks> {
    if !app::cores().contains(&core) {
        return None;
    }
    let mut ticks = ReactorTicks { busy: 0, idle: 0 };
    // SAFETY: the reactor exists while the app runs; two aligned words that its core alone writes.
    unsafe { spdk_sys::ps_reactor_ticks(core.0, &mut ticks.busy, &mut ticks.idle) }.then_some(ticks)
}

/// What a poller's turn came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activity {
    /// Nothing to do.
    Idle,
    /// Something was done; all that was there is done.
    Busy,
    /// There is more: call again even if nobody wakes us.
    Again,
}

impl Activity {
    fn to_c(self) -> c_int {
        match self {
            Activity::Idle => spdk_sys::SPDK_POLLER_IDLE as c_int,
            Activity::Busy | Activity::Again => spdk_sys::SPDK_POLLER_BUSY as c_int,
        }
    }
}

struct PollerInner {
    run: RefCell<Box<dyn FnMut() -> Activity>>,
    poller: Cell<*mut spdk_sys::spdk_poller>,
    interrupt: Cell<*mut spdk_sys::spdk_interrupt>,
    waker: Option<Waker>,
    /// SPDK keeps pointers to the names.
    name: CString,
}

impl PollerInner {
    fn turn(&self) -> Activity {
        // A closure that gets back here (by running a nested poll) would be a bug of the caller; skip, as SPDK does.
        let Ok(mut run) = self.run.try_borrow_mut() else { return Activity::Idle };
        let activity = run();
        if activity == Activity::Again
            && let Some(waker) = &self.waker
        {
            waker.wake();
        }
        activity
    }
}

/// Calls a closure again and again on the thread that registered it, until dropped. Dropping it from inside the closure is fine.
pub struct Poller {
    inner: Rc<PollerInner>,
}

/// What C holds: a pointer into the Rc whose count the Poller owns.
extern "C" fn poll(arg: *mut c_void) -> c_int {
    let pointer = arg.cast::<PollerInner>().cast_const();
    // SAFETY: SPDK calls pollers only until spdk_poller_unregister, and the Poller keeps the Rc until then. The extra count
    // keeps it through this call, in which the closure may drop the Poller.
    let inner = unsafe {
        Rc::increment_strong_count(pointer);
        Rc::from_raw(pointer)
    };
    inner.turn().to_c()
}

extern "C" fn woken(arg: *mut c_void) -> c_int {
    let pointer = arg.cast::<PollerInner>().cast_const();
    // SAFETY: as in `poll`; interrupts are unregistered at the same place.
    let inner = unsafe {
        Rc::increment_strong_count(pointer);
        Rc::from_raw(pointer)
    };
    if let Some(waker) = &inner.waker {
        waker.inner.clear();
    }
    inner.turn().to_c()
}

impl Poller {
    /// Every turn of the reactor. In interrupt mode this keeps the core spinning: prefer [`Poller::event_driven`].
    pub fn busy(name: &str, run: impl FnMut() -> Activity + 'static) -> Result<Poller, Errno> {
        Poller::register(name, 0, None, run)
    }

    /// Every `period_us` microseconds at most. Sleeps properly in interrupt mode.
    pub fn timed(name: &str, period_us: u64, run: impl FnMut() -> Activity + 'static) -> Result<Poller, Errno> {
        if period_us == 0 {
            return Err(Errno::INVAL);
        }
        Poller::register(name, period_us, None, run)
    }

    /// Polling: every turn of the reactor. Interrupt mode: when the [`Waker`] is used, and again while the closure says
    /// [`Activity::Again`]; otherwise the core sleeps.
    pub fn event_driven(name: &str, run: impl FnMut() -> Activity + 'static) -> Result<(Poller, Waker), Errno> {
        let waker = Waker::new()?;
        let poller = Poller::register(name, 0, Some(waker.clone()), run)?;
        Ok((poller, waker))
    }

    fn register(name: &str, period_us: u64, waker: Option<Waker>, run: impl FnMut() -> Activity + 'static) -> Result<Poller, Errno> {
        // SAFETY: reads a thread-local of SPDK's.
        if unsafe { spdk_sys::spdk_get_thread() }.is_null() {
            return Err(Errno::new(libc::EPERM));
        }
        let inner = Rc::new(PollerInner {
            run: RefCell::new(Box::new(run)),
            poller: Cell::new(std::ptr::null_mut()),
            interrupt: Cell::new(std::ptr::null_mut()),
            waker,
            name: c_string(name)?,
        });
        let arg = Rc::as_ptr(&inner).cast_mut().cast::<c_void>();
        // SAFETY: on an SPDK thread; `arg` stays valid until the Poller's drop unregisters; the name lives in `inner`.
        let poller = unsafe { spdk_sys::spdk_poller_register_named(Some(poll), arg, period_us, inner.name.as_ptr()) };
        if poller.is_null() {
            return Err(Errno::NOMEM);
        }
        inner.poller.set(poller);
        let registered = Poller { inner };
        if let Some(waker) = &registered.inner.waker
            && interrupt_mode()
        {
            // SAFETY: our own poller on our own thread; in this mode the shim's callback leaves it asleep.
            unsafe { spdk_sys::ps_poller_mark_event_driven(poller) };
            // SAFETY: the eventfd lives in the waker, which `inner` holds; unregistered together with the poller.
            let interrupt =
                unsafe { spdk_sys::spdk_interrupt_register(waker.inner.fd.as_raw_fd(), Some(woken), arg, registered.inner.name.as_ptr()) };
            if interrupt.is_null() {
                return Err(Errno::NOMEM);
            }
            registered.inner.interrupt.set(interrupt);
            // The first turn, for whatever was there before.
            waker.wake();
        }
        Ok(registered)
    }

    pub fn pause(&self) {
        // SAFETY: registered, and we are on its thread since Poller is not Send.
        unsafe { spdk_sys::spdk_poller_pause(self.inner.poller.get()) };
    }

    pub fn resume(&self) {
        // SAFETY: as above.
        unsafe { spdk_sys::spdk_poller_resume(self.inner.poller.get()) };
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        if !app::env_is_up() {
            return; // SPDK took its threads, pollers included, down already.
        }
        let mut interrupt = self.inner.interrupt.replace(std::ptr::null_mut());
        if !interrupt.is_null() {
            // SAFETY: registered on this thread and not unregistered yet.
            unsafe { spdk_sys::spdk_interrupt_unregister(&mut interrupt) };
        }
        let mut poller = self.inner.poller.replace(std::ptr::null_mut());
        if !poller.is_null() {
            // SAFETY: registered on this thread (not Send) and not unregistered yet. SPDK allows it from within the poller.
            unsafe { spdk_sys::spdk_poller_unregister(&mut poller) };
        }
    }
}

/// Whether the app was started in interrupt mode.
pub fn interrupt_mode() -> bool {
    // SAFETY: reads a flag that is fixed once the app has started.
    unsafe { spdk_sys::spdk_interrupt_mode_is_enabled() }
}

struct WakerInner {
    fd: OwnedFd,
    /// Only then is there anybody to wake.
    sleeps: bool,
    /// Set by the first wake since the last turn, so that a stream of them costs one syscall.
    pending: AtomicBool,
}

impl WakerInner {
    fn clear(&self) {
        let mut count = [0u8; 8];
        // SAFETY: reads 8 bytes into 8 bytes; the descriptor is an eventfd and non-blocking.
        let _ = unsafe { libc::read(self.fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        // After the read and before the turn: a wake from now on writes again, and an earlier one is seen by the turn.
        self.pending.store(false, Ordering::SeqCst);
    }
}

/// Wakes an event-driven poller from any thread. Free while its reactor polls. No allocation.
#[derive(Clone)]
pub struct Waker {
    inner: Arc<WakerInner>,
}

impl Waker {
    fn new() -> Result<Waker, Errno> {
        // SAFETY: no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(Errno::new(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)));
        }
        // SAFETY: just made, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Waker { inner: Arc::new(WakerInner { fd, sleeps: interrupt_mode(), pending: AtomicBool::new(false) }) })
    }

    /// What the poller will look at must be in place before this is called.
    pub fn wake(&self) {
        if !self.inner.sleeps || self.inner.pending.swap(true, Ordering::SeqCst) {
            return;
        }
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes from 8 bytes. It cannot fail short of 2^64 wakes unread, and `pending` allows one.
        let _ = unsafe { libc::write(self.inner.fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

/// Calls a closure when a file descriptor becomes readable. Interrupt mode only: while polling, poll it yourself.
pub struct FdEvent {
    pointer: *mut spdk_sys::spdk_interrupt,
    run: Rc<FdEventInner>,
    _not_send: PhantomData<*mut ()>,
}

struct FdEventInner {
    run: RefCell<Box<dyn FnMut() -> Activity>>,
    name: CString,
}

impl FdEvent {
    /// `fd` must stay open until this is dropped. Err(NOTSUP) when not in interrupt mode.
    pub fn register(name: &str, fd: RawFd, run: impl FnMut() -> Activity + 'static) -> Result<FdEvent, Errno> {
        extern "C" fn ready(arg: *mut c_void) -> c_int {
            let pointer = arg.cast::<FdEventInner>().cast_const();
            // SAFETY: as in `poll`: unregistered before the FdEvent lets go of the Rc.
            let inner = unsafe {
                Rc::increment_strong_count(pointer);
                Rc::from_raw(pointer)
            };
            let Ok(mut run) = inner.run.try_borrow_mut() else { return Activity::Idle.to_c() };
            run().to_c()
        }
        if !interrupt_mode() {
            return Err(Errno::NOTSUP);
        }
        let run = Rc::new(FdEventInner { run: RefCell::new(Box::new(run)), name: c_string(name)? });
        let arg = Rc::as_ptr(&run).cast_mut().cast::<c_void>();
        // SAFETY: `arg` and the name live until drop unregisters; a closed fd makes epoll silent, not unsound.
        let pointer = unsafe { spdk_sys::spdk_interrupt_register(fd, Some(ready), arg, run.name.as_ptr()) };
        if pointer.is_null() {
            return Err(Errno::INVAL);
        }
        Ok(FdEvent { pointer, run, _not_send: PhantomData })
    }
}

impl Drop for FdEvent {
    fn drop(&mut self) {
        // Kept alive until here for C's sake.
        let _ = &self.run;
        if app::env_is_up() {
            // SAFETY: registered on this thread (not Send), unregistered once.
            unsafe { spdk_sys::spdk_interrupt_unregister(&mut self.pointer) };
        }
    }
}
