//! Boxed closures across C for control paths: each is called exactly once. Not for I/O; that path allocates nothing.

use crate::status::Errno;
use std::ffi::{c_int, c_void};

/// A closure that takes the outcome of an asynchronous call.
pub(crate) type Done = Box<dyn FnOnce(Result<(), Errno>)>;

/// Boxed twice: a `dyn` pointer is two words, C hands back one.
pub(crate) fn into_arg(done: Done) -> *mut c_void {
    Box::into_raw(Box::new(done)).cast()
}

/// Takes back what [`into_arg`] gave.
///
/// # Safety
/// `arg` came from `into_arg` and has not been taken back yet.
pub(crate) unsafe fn from_arg(arg: *mut c_void) -> Done {
    // SAFETY: the caller's promise; into_arg made it from a Box of this type.
    *unsafe { Box::from_raw(arg.cast::<Done>()) }
}

/// `ps_status_fn` and everything of its shape.
pub(crate) extern "C" fn on_status(arg: *mut c_void, status: c_int) {
    // SAFETY: C calls a completion once, with the argument that it was given, which into_arg made.
    let done = unsafe { from_arg(arg) };
    done(Errno::check(status));
}

/// Runs `call` with a trampoline's argument. Where C refuses at once it will not call back, so the closure is called here.
pub(crate) fn start(done: impl FnOnce(Result<(), Errno>) + 'static, call: impl FnOnce(*mut c_void) -> c_int) {
    let arg = into_arg(Box::new(done));
    let rc = call(arg);
    if rc != 0 {
        // SAFETY: C refused, so nobody else has or will take it.
        let done = unsafe { from_arg(arg) };
        done(Err(Errno::new(rc.abs())));
    }
}

/// A string for C, or EINVAL where it holds a NUL.
pub(crate) fn c_string(text: &str) -> Result<std::ffi::CString, Errno> {
    std::ffi::CString::new(text).map_err(|_| Errno::INVAL)
}
