//! vhost-user-blk controllers: a bdev as a Unix socket that QEMU connects to.
//!
//! With our patch to SPDK (sys/patches) a guest's memory stays mapped until its I/O is answered. Not here: how long to hold I/O.

use crate::callback::c_string;
use crate::status::Errno;
use crate::thread;

/// The directory for controllers' sockets. Before any is created; it must exist, and should be of mode 0700.
pub fn set_socket_directory(directory: &str) -> Result<(), Errno> {
    let directory = c_string(directory)?;
    // SAFETY: SPDK copies it.
    Errno::check(unsafe { spdk_sys::spdk_vhost_set_socket_path(directory.as_ptr()) })
}

/// How to make a controller.
#[derive(Clone, Debug)]
pub struct ControllerOptions {
    /// Also the socket's name in the directory.
    pub name: String,
    pub bdev: String,
    /// Cores as a mask (`0x1`); None: any of the app's. The controller runs on one thread there.
    pub core_mask: Option<String>,
    pub readonly: bool,
}

/// Makes the controller and its socket. App thread. EPERM: the bdev is for NVMe-oF alone.
pub fn create(options: &ControllerOptions) -> Result<(), Errno> {
    thread::assert_app_thread("creating a vhost controller");
    let name = c_string(&options.name)?;
    let bdev = c_string(&options.bdev)?;
    let mask = options.core_mask.as_deref().map(c_string).transpose()?;
    let mask = mask.as_ref().map_or(std::ptr::null(), |mask| mask.as_ptr());
    // SAFETY: on the app thread, where bdevs come and go, so one that is found stays for this call.
    let nvmf_only = unsafe {
        let found = spdk_sys::spdk_bdev_get_by_name(bdev.as_ptr());
        !found.is_null() && spdk_sys::ps_bdev_is_nvmf_only(found)
    };
    if nvmf_only {
        return Err(Errno::new(libc::EPERM));
    }
    // SAFETY: all strings are copied. Packed rings stay off: only split rings survive our restart.
    Errno::check(unsafe { spdk_sys::ps_vhost_blk_create(name.as_ptr(), mask, bdev.as_ptr(), options.readonly, false) })
}

/// Removes the controller and its socket. App thread. BUSY while a guest is connected.
pub fn remove(name: &str) -> Result<(), Errno> {
    thread::assert_app_thread("removing a vhost controller");
    let name = c_string(name)?;
    // SAFETY: looked up by name within the call.
    Errno::check(unsafe { spdk_sys::ps_vhost_remove(name.as_ptr()) })
}

/// How many guests are connected to a controller.
pub fn sessions(name: &str) -> Result<usize, Errno> {
    let name = c_string(name)?;
    // SAFETY: looked up by name, and counted under SPDK's locks.
    let count = unsafe { spdk_sys::ps_vhost_sessions(name.as_ptr()) };
    usize::try_from(count).map_err(|_| Errno::new(count.abs()))
}
