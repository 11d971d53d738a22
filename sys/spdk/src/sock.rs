//! Stream sockets of SPDK: for one core, without a syscall per write, and without a copy into a buffer of the library's.
//!
//! A write takes memory and gives it back when the kernel has it all; writes leave in order, when the group is polled, after 64
//! ranges, or on [`Connection::flush`]. Reads go straight into the caller's bytes. Not here: messages, their limits, and trust.

use crate::app;
use crate::bdev::{IoMemory, Ranges};
use crate::callback::c_string;
use crate::status::Errno;
use std::cell::{Cell, RefCell, UnsafeCell};
use std::ffi::{c_int, c_void};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::rc::Rc;

/// What happens on a connection, told to the closure that it was made with.
#[derive(Debug)]
pub enum SockEvent<M> {
    /// A [`Connection::connect`] came through, or did not; then nothing else follows.
    Connected(Result<(), Errno>),
    /// There may be something to read, or the peer has closed: read until AGAIN.
    Readable,
    /// A write is done. Err: it may have been sent in part, and the connection is of no more use.
    Written { token: u64, result: Result<(), Errno>, memory: M },
}

/// A write that was not taken, with its memory.
pub struct RefusedWrite<M> {
    /// AGAIN: as many are queued as the connection was made for. INVAL: more ranges than [`RANGES_MAX`], or none.
    pub errno: Errno,
    pub memory: M,
}

impl<M> std::fmt::Debug for RefusedWrite<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RefusedWrite({})", self.errno)
    }
}

/// Ranges that one write may have.
pub const RANGES_MAX: usize = 64;

struct GroupInner {
    pointer: NonNull<spdk_sys::spdk_sock_group>,
}

impl Drop for GroupInner {
    fn drop(&mut self) {
        if app::env_is_up() {
            let mut pointer = self.pointer.as_ptr();
            // SAFETY: made once, closed once; connections hold this, so none is left in it.
            unsafe { spdk_sys::spdk_sock_group_close(&mut pointer) };
        }
    }
}

/// The connections that one thread polls together.
#[derive(Clone)]
pub struct SockGroup {
    inner: Rc<GroupInner>,
}

impl SockGroup {
    /// On the SPDK thread that will poll it.
    pub fn new() -> Result<SockGroup, Errno> {
        // SAFETY: reads a thread-local of SPDK's.
        if unsafe { spdk_sys::spdk_get_thread() }.is_null() {
            return Err(Errno::new(libc::EPERM));
        }
        // SAFETY: on an SPDK thread; no context.
        let pointer = unsafe { spdk_sys::spdk_sock_group_create(std::ptr::null_mut()) };
        let pointer = NonNull::new(pointer).ok_or(Errno::NOMEM)?;
        Ok(SockGroup { inner: Rc::new(GroupInner { pointer }) })
    }

    /// Sends what is queued, and calls the closures of connections where something happened. Returns how many had something.
    /// Not from inside such a closure.
    pub fn poll(&self) -> Result<usize, Errno> {
        let keep = self.inner.clone();
        // SAFETY: open, on its own thread (not Send), and kept through the call, in which closures may drop the last handle.
        let count = unsafe { spdk_sys::spdk_sock_group_poll(keep.pointer.as_ptr()) };
        usize::try_from(count).map_err(|_| Errno::new(count.abs()))
    }

    /// For [`crate::thread::FdEvent`] in interrupt mode: readable when a poll would find something.
    pub fn fd(&self) -> Option<RawFd> {
        // SAFETY: open.
        let fd = unsafe { spdk_sys::spdk_sock_group_get_interruptfd(self.inner.pointer.as_ptr()) };
        (fd >= 0).then_some(fd)
    }
}

/// Accepts connections.
pub struct Listener {
    pointer: NonNull<spdk_sys::spdk_sock>,
}

impl Listener {
    /// Port 0: any free one.
    pub fn bind(address: SocketAddr) -> Result<Listener, Errno> {
        let ip = c_string(&address.ip().to_string())?;
        // SAFETY: the string outlives the call.
        let pointer = unsafe { spdk_sys::spdk_sock_listen(ip.as_ptr(), c_int::from(address.port()), std::ptr::null()) };
        // SPDK leaves the reason in errno, if anywhere.
        NonNull::new(pointer).map(|pointer| Listener { pointer }).ok_or_else(last_errno)
    }

    pub fn port(&self) -> Result<u16, Errno> {
        // SAFETY: open.
        let port = unsafe { spdk_sys::ps_sock_local_port(self.pointer.as_ptr()) };
        u16::try_from(port).map_err(|_| Errno::new(port.abs()))
    }

    /// A connection that waits, if there is one. `depth` writes may be queued on it.
    pub fn accept<M: 'static>(
        &self,
        group: &SockGroup,
        depth: usize,
        on_event: impl Fn(SockEvent<M>) + 'static,
    ) -> Result<Option<Connection<M>>, Errno> {
        // SAFETY: open, and non-blocking as SPDK makes all of its sockets.
        let pointer = unsafe { spdk_sys::spdk_sock_accept(self.pointer.as_ptr()) };
        let Some(pointer) = NonNull::new(pointer) else { return Ok(None) };
        let connection = Connection { inner: ConnectionInner::new(group, depth, on_event) };
        connection.attach(pointer)?;
        Ok(Some(connection))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if app::env_is_up() {
            let mut pointer = self.pointer.as_ptr();
            // SAFETY: opened once, closed once.
            unsafe { spdk_sys::spdk_sock_close(&mut pointer) };
        }
    }
}

fn last_errno() -> Errno {
    Errno::new(std::io::Error::last_os_error().raw_os_error().filter(|errno| *errno != 0).unwrap_or(libc::EIO))
}

struct Write<M> {
    owner: *const ConnectionInner<M>,
    token: u64,
    memory: Option<M>,
    /// SPDK's request and its ranges; u64s for the alignment.
    request: Box<[u64]>,
}

struct ConnectionInner<M> {
    pointer: Cell<Option<NonNull<spdk_sys::spdk_sock>>>,
    group: Rc<GroupInner>,
    on_event: Box<dyn Fn(SockEvent<M>)>,
    /// `connect` has given a count to `on_connected`, which has not been called.
    connecting: Cell<bool>,
    free: RefCell<Vec<usize>>,
    /// One that is not in `free` belongs to SPDK until `on_written`.
    writes: Box<[UnsafeCell<Write<M>>]>,
    /// Reused by each write; SPDK copies it.
    ranges: RefCell<Vec<spdk_sys::iovec>>,
}

impl<M: 'static> ConnectionInner<M> {
    fn new(group: &SockGroup, depth: usize, on_event: impl Fn(SockEvent<M>) + 'static) -> Rc<ConnectionInner<M>> {
        // SAFETY: a sum.
        let request_size = unsafe { spdk_sys::ps_sock_request_size(RANGES_MAX as c_int) };
        let words = request_size.div_ceil(8);
        let inner = Rc::new(ConnectionInner {
            pointer: Cell::new(None),
            group: group.inner.clone(),
            on_event: Box::new(on_event),
            connecting: Cell::new(false),
            free: RefCell::new((0..depth).rev().collect()),
            writes: (0..depth)
                .map(|_| {
                    let request = vec![0; words].into_boxed_slice();
                    UnsafeCell::new(Write { owner: std::ptr::null(), token: 0, memory: None, request })
                })
                .collect(),
            ranges: RefCell::new(Vec::with_capacity(RANGES_MAX)),
        });
        for write in &inner.writes {
            // SAFETY: nothing is queued yet.
            unsafe { (*write.get()).owner = Rc::as_ptr(&inner) };
        }
        inner
    }
}

/// One stream, on the thread of its group. Dropped, it closes: queued writes come back with an error.
pub struct Connection<M: 'static> {
    inner: Rc<ConnectionInner<M>>,
}

extern "C" fn on_readable<M: 'static>(arg: *mut c_void, _group: *mut spdk_sys::spdk_sock_group, _sock: *mut spdk_sys::spdk_sock) {
    let pointer = arg.cast::<ConnectionInner<M>>().cast_const();
    // SAFETY: the connection leaves the group before it lets go of this; the extra count keeps it through the call, in which the
    // closure may drop the connection.
    let inner = unsafe {
        Rc::increment_strong_count(pointer);
        Rc::from_raw(pointer)
    };
    (inner.on_event)(SockEvent::Readable);
}

extern "C" fn on_connected<M: 'static>(arg: *mut c_void, status: c_int) {
    // SAFETY: `connect` gave one count to this callback, which SPDK calls at most once.
    let inner = unsafe { Rc::from_raw(arg.cast::<ConnectionInner<M>>().cast_const()) };
    inner.connecting.set(false);
    (inner.on_event)(SockEvent::Connected(Errno::check(status)));
}

extern "C" fn on_written<M: 'static>(arg: *mut c_void, status: c_int) {
    let write = arg.cast::<Write<M>>();
    // SAFETY: `write` gave this slot to SPDK together with one count of its connection; SPDK calls once for each request.
    let (inner, token, memory) = unsafe { (Rc::from_raw((*write).owner), (*write).token, (*write).memory.take()) };
    // SAFETY: an element of `writes`; UnsafeCell has its content's layout.
    let index = unsafe { write.cast_const().cast::<UnsafeCell<Write<M>>>().offset_from(inner.writes.as_ptr()) };
    inner.free.borrow_mut().push(index as usize);
    let memory = memory.expect("put there by write");
    (inner.on_event)(SockEvent::Written { token, result: Errno::check(status), memory });
}

impl<M: 'static> Connection<M> {
    /// Starts to connect. `Connected` says how it went, possibly before this returns, and then perhaps beside an error. Timeout 0: the system's.
    pub fn connect(
        group: &SockGroup,
        address: SocketAddr,
        timeout_ms: u32,
        depth: usize,
        on_event: impl Fn(SockEvent<M>) + 'static,
    ) -> Result<Connection<M>, Errno> {
        let ip = c_string(&address.ip().to_string())?;
        let connection = Connection { inner: ConnectionInner::new(group, depth, on_event) };
        connection.inner.connecting.set(true);
        let arg = Rc::into_raw(connection.inner.clone());
        // SAFETY: the string outlives the call; the callback owns the count in `arg`.
        let pointer = unsafe {
            spdk_sys::ps_sock_connect(ip.as_ptr(), c_int::from(address.port()), timeout_ms, Some(on_connected::<M>), arg.cast_mut().cast())
        };
        let Some(pointer) = NonNull::new(pointer) else {
            let errno = last_errno();
            // Without a socket SPDK has called back for some errors (no route to there), and not for others.
            if connection.inner.connecting.take() {
                // SAFETY: no socket and no callback yet, so none will come: the count is ours again.
                drop(unsafe { Rc::from_raw(arg) });
            }
            return Err(errno);
        };
        connection.attach(pointer)?;
        Ok(connection)
    }

    /// Joins the group. On failure the connection's drop closes the socket.
    fn attach(&self, pointer: NonNull<spdk_sys::spdk_sock>) -> Result<(), Errno> {
        self.inner.pointer.set(Some(pointer));
        let arg = Rc::as_ptr(&self.inner).cast_mut().cast();
        // SAFETY: both open, on their thread; `arg` lives until the connection has left the group.
        let rc =
            unsafe { spdk_sys::spdk_sock_group_add_sock(self.inner.group.pointer.as_ptr(), pointer.as_ptr(), Some(on_readable::<M>), arg) };
        Errno::check(rc)
    }

    fn pointer(&self) -> *mut spdk_sys::spdk_sock {
        self.inner.pointer.get().map_or(std::ptr::null_mut(), NonNull::as_ptr)
    }

    /// Reads what is there, at most `to.len()` bytes. 0: the peer has closed. AGAIN: nothing for now.
    pub fn read(&self, to: &mut [u8]) -> Result<usize, Errno> {
        // SAFETY: open while the connection exists; writes only into `to`.
        let count = unsafe { spdk_sys::spdk_sock_recv(self.pointer(), to.as_mut_ptr().cast(), to.len()) };
        usize::try_from(count).map_err(|_| last_errno())
    }

    /// Reads into several places, in order.
    pub fn read_vectored(&self, to: &mut [std::io::IoSliceMut<'_>]) -> Result<usize, Errno> {
        let count = to.len().min(RANGES_MAX) as c_int;
        // SAFETY: IoSliceMut has iovec's layout by its documentation; writes only into the slices.
        let count = unsafe { spdk_sys::spdk_sock_readv(self.pointer(), to.as_mut_ptr().cast(), count) };
        usize::try_from(count).map_err(|_| last_errno())
    }

    /// Queues a write of all of `memory`. `Written` gives it back. No allocation.
    pub fn write(&self, memory: M, token: u64) -> Result<(), RefusedWrite<M>>
    where
        M: IoMemory,
    {
        let mut ranges = self.inner.ranges.borrow_mut();
        ranges.clear();
        memory.ranges(&mut Ranges::new(&mut ranges));
        if ranges.is_empty() || ranges.len() > RANGES_MAX {
            return Err(RefusedWrite { errno: Errno::INVAL, memory });
        }
        let Some(index) = self.inner.free.borrow_mut().pop() else {
            return Err(RefusedWrite { errno: Errno::AGAIN, memory });
        };
        let write = self.inner.writes[index].get();
        // SAFETY: the slot was free, so SPDK does not have it.
        let request = unsafe {
            (*write).token = token;
            (*write).memory = Some(memory);
            (*write).request.as_mut_ptr()
        };
        std::mem::forget(self.inner.clone()); // SPDK's count, which on_written takes back
        let (list, count) = (ranges.as_ptr(), ranges.len() as c_int);
        // SPDK may call back before it returns, where the connection is broken, and the closure may then write again.
        drop(ranges);
        // SAFETY: open; the request and the memory stay in the slot until on_written. The shim copies the list before it calls
        // SPDK, so that a write from within finds it free to reuse.
        unsafe { spdk_sys::ps_sock_write(self.pointer(), request.cast(), list, count, Some(on_written::<M>), write.cast()) };
        Ok(())
    }

    /// Sends what is queued now instead of at the group's next poll: what a core does before it sleeps.
    pub fn flush(&self) -> Result<(), Errno> {
        // SAFETY: open.
        let rc = unsafe { spdk_sys::spdk_sock_flush(self.pointer()) };
        if rc >= 0 { Ok(()) } else { Err(last_errno()) }
    }

    pub fn is_connected(&self) -> bool {
        // SAFETY: open.
        unsafe { spdk_sys::spdk_sock_is_connected(self.pointer()) }
    }

    /// Writes that have been taken and not given back.
    pub fn queued(&self) -> usize {
        self.inner.writes.len() - self.inner.free.borrow().len()
    }
}

impl<M: 'static> Drop for Connection<M> {
    fn drop(&mut self) {
        let Some(pointer) = self.inner.pointer.take() else { return };
        if !app::env_is_up() {
            return;
        }
        let mut pointer = pointer.as_ptr();
        // SAFETY: open, on its thread. Left the group, it gets no more Readable; closing calls on_written for what is queued, now
        // or when the callback that we are in returns, and each of these holds its own count.
        unsafe {
            spdk_sys::spdk_sock_group_remove_sock(self.inner.group.pointer.as_ptr(), pointer);
            spdk_sys::spdk_sock_close(&mut pointer);
        }
    }
}
