//! NVMe drives and remote namespaces as bdevs: SPDK's own driver, attached and detached at run time.
//!
//! Not here: binding PCIe drives to vfio or uio (hugepages/), and proof that a flush reaches media.

use crate::callback::{self, c_string};
use crate::status::Errno;
use crate::thread;
use std::ffi::{CStr, c_char, c_int, c_void};

/// Where a controller is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NvmeAddress {
    /// `0000:00:04.0`, bound to vfio-pci or uio_pci_generic.
    Pcie(String),
    /// A vfio-user directory, which holds the socket `cntrl`.
    VfioUser(String),
    Tcp {
        address: std::net::IpAddr,
        port: u16,
        subsystem_nqn: String,
    },
}

/// Makes flushes reach drives that have a volatile cache; by default SPDK answers them without asking the drive. Before the first
/// attach (else EPERM). App thread.
pub fn enable_flush() -> Result<(), Errno> {
    thread::assert_app_thread("NVMe options");
    // SAFETY: reads and writes SPDK's options, on their thread.
    Errno::check(unsafe { spdk_sys::ps_nvme_enable_flush() })
}

/// Looks for completions every so many microseconds; 0, the default, is all the time. In interrupt mode a thread sleeps in between, and
/// controllers that raise no events (bound to uio_pci_generic, or over vfio-user) can be attached only with a period (our patch 0004).
///
/// # Errors
/// `EPERM` after the first attach. App thread.
pub fn poll_every(period_us: u64) -> Result<(), Errno> {
    thread::assert_app_thread("NVMe options");
    // SAFETY: reads and writes SPDK's options, on their thread.
    Errno::check(unsafe { spdk_sys::ps_nvme_poll_every(period_us) })
}

type Attached = Box<dyn FnOnce(Result<Vec<String>, Errno>)>;

extern "C" fn on_attached(arg: *mut c_void, names: *const *const c_char, count: usize, rc: c_int) {
    // SAFETY: made by `attach`, called back once.
    let done = *unsafe { Box::from_raw(arg.cast::<Attached>()) };
    done(Errno::check(rc).map(|()| {
        // SAFETY: so many names, valid for this call.
        (0..count).map(|at| unsafe { CStr::from_ptr(*names.add(at)) }.to_string_lossy().into_owned()).collect()
    }));
}

/// Attaches a controller as `base_name`; `done` gets the names of its namespaces' bdevs, such as `drive0n1`. App thread.
pub fn attach(address: &NvmeAddress, base_name: &str, done: impl FnOnce(Result<Vec<String>, Errno>) + 'static) {
    thread::assert_app_thread("attaching a drive");
    let (transport, place, service, nqn) = match address {
        NvmeAddress::Pcie(address) => (c"PCIE", address.clone(), String::new(), String::new()),
        NvmeAddress::VfioUser(directory) => (c"VFIOUSER", directory.clone(), String::new(), String::new()),
        NvmeAddress::Tcp { address, port, subsystem_nqn } => (c"TCP", address.to_string(), port.to_string(), subsystem_nqn.clone()),
    };
    let strings = || Ok((c_string(&place)?, c_string(&service)?, c_string(&nqn)?, c_string(base_name)?));
    let (place, service, nqn, base_name) = match strings() {
        Ok(strings) => strings,
        Err(errno) => return done(Err(errno)),
    };
    let arg: *mut Attached = Box::into_raw(Box::new(Box::new(done)));
    // SAFETY: on the app thread; the strings are copied.
    let rc = unsafe {
        spdk_sys::ps_nvme_attach(
            transport.as_ptr(),
            place.as_ptr(),
            service.as_ptr(),
            nqn.as_ptr(),
            base_name.as_ptr(),
            Some(on_attached),
            arg.cast(),
        )
    };
    if rc != 0 {
        on_attached(arg.cast(), std::ptr::null(), 0, rc);
    }
}

/// Detaches what was attached as `base_name`; its bdevs' users are told to let go. App thread.
pub fn detach(base_name: &str, done: impl FnOnce(Result<(), Errno>) + 'static) {
    thread::assert_app_thread("detaching a drive");
    let Ok(base_name) = c_string(base_name) else { return done(Err(Errno::INVAL)) };
    callback::start(done, |arg| {
        // SAFETY: on the app thread; the name is copied; a refusal does not call back.
        unsafe { spdk_sys::ps_nvme_detach(base_name.as_ptr(), Some(callback::on_status), arg) }
    });
}
