//! SPDK's NVMe-oF target: transports, subsystems, listeners, namespaces, and who is connected.
//!
//! All of it is for the app thread, but for the Identify hook, which runs on the connections' threads. Each call takes a closure
//! that is called exactly once with the outcome, also where SPDK refuses at once. Not here: which path is optimized, when to fence.

use crate::callback::{self, Done, c_string};
use crate::status::Errno;
use crate::thread;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::NonNull;
use std::sync::OnceLock;

/// Where hosts connect.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Listen {
    /// An IP address (not a name) and a port.
    Tcp { address: std::net::IpAddr, port: u16 },
    /// A directory; the guest's end is the socket `cntrl` in it. SPDK does not make the directory.
    VfioUser { directory: String },
}

/// Asymmetric namespace access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AnaState {
    Optimized,
    NonOptimized,
    Inaccessible,
}

impl AnaState {
    fn to_c(self) -> c_int {
        (match self {
            AnaState::Optimized => spdk_sys::SPDK_NVME_ANA_OPTIMIZED_STATE,
            AnaState::NonOptimized => spdk_sys::SPDK_NVME_ANA_NON_OPTIMIZED_STATE,
            AnaState::Inaccessible => spdk_sys::SPDK_NVME_ANA_INACCESSIBLE_STATE,
        }) as c_int
    }
}

/// A [`Listen`] in C's terms; the strings live in here.
struct CListen {
    address: CString,
    service: CString,
    transport: &'static CStr,
}

impl CListen {
    fn new(listen: &Listen) -> Result<CListen, Errno> {
        Ok(match listen {
            Listen::Tcp { address, port } => {
                CListen { address: c_string(&address.to_string())?, service: c_string(&port.to_string())?, transport: c"TCP" }
            }
            Listen::VfioUser { directory } => CListen { address: c_string(directory)?, service: c_string("0")?, transport: c"VFIOUSER" },
        })
    }

    fn with_state(&self, state: AnaState) -> spdk_sys::ps_listen {
        spdk_sys::ps_listen {
            transport: self.transport.as_ptr(),
            address: self.address.as_ptr(),
            service: self.service.as_ptr(),
            ana_state: state.to_c(),
        }
    }
}

/// What a transport is made with; 0 leaves SPDK's default.
#[derive(Clone, Debug, Default)]
pub struct TransportOptions {
    /// Bytes.
    pub io_unit_size: u32,
    /// Bytes; hosts see it as MDTS. A multiple of 4096.
    pub max_io_size: u32,
    /// Bytes; TCP writes up to this come with their command.
    pub in_capsule_data_size: u32,
    pub max_queue_depth: u32,
    pub max_qpairs_per_controller: u32,
    pub shared_buffers: u32,
    pub buffer_cache: u32,
    pub abort_timeout_s: u32,
    /// Microseconds between looks for new connections, while polling.
    pub acceptor_poll_us: u32,
    /// Does not advertise Copy, which SPDK emulates.
    pub mask_copy: bool,
    /// vfio-user in interrupt mode: doorbells must make a noise.
    pub unmapped_doorbells: bool,
}

/// Which transport.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    Tcp,
    VfioUser,
}

/// The app's NVMe-oF target, `nvmf_tgt`, with a poll group on each core. App thread.
#[derive(Clone, Copy)]
pub struct Target {
    pointer: NonNull<spdk_sys::spdk_nvmf_tgt>,
}

impl Target {
    /// The one that SPDK's nvmf subsystem made at start. From now on it identifies itself by [`honest_identify`], or by the hook.
    pub fn get() -> Result<Target, Errno> {
        thread::assert_app_thread("the NVMe-oF target");
        // Always: without it, SPDK hands Identify Namespace in a passthrough subsystem to the device as a raw command.
        // SAFETY: stores a function pointer, the same each time.
        unsafe { spdk_sys::ps_nvmf_set_identify_hook(Some(on_identify)) };
        // SAFETY: on the app thread, where targets come and go; NULL names the only one.
        let pointer = unsafe { spdk_sys::spdk_nvmf_get_tgt(std::ptr::null()) };
        NonNull::new(pointer).map(|pointer| Target { pointer }).ok_or(Errno::NODEV)
    }

    /// Err(EXIST) if it was added before.
    pub fn add_transport(&self, transport: Transport, options: &TransportOptions, done: impl FnOnce(Result<(), Errno>) + 'static) {
        let name = match transport {
            Transport::Tcp => c"TCP",
            Transport::VfioUser => c"VFIOUSER",
        };
        let c = spdk_sys::ps_transport_opts {
            io_unit_size: options.io_unit_size,
            max_io_size: options.max_io_size,
            in_capsule_data_size: options.in_capsule_data_size,
            max_queue_depth: options.max_queue_depth,
            max_qpairs_per_ctrlr: options.max_qpairs_per_controller,
            num_shared_buffers: options.shared_buffers,
            buf_cache_size: options.buffer_cache,
            abort_timeout_s: options.abort_timeout_s,
            acceptor_poll_us: options.acceptor_poll_us,
            mask_copy: options.mask_copy,
            disable_mappable_bar0: options.unmapped_doorbells,
        };
        callback::start(done, |arg| {
            // SAFETY: the target lives as long as the app; the options are copied.
            unsafe { spdk_sys::ps_nvmf_transport_add(self.pointer.as_ptr(), name.as_ptr(), &c, Some(callback::on_status), arg) }
        });
    }

    /// Opens the address for connections. Once for each address, however many subsystems are reached there.
    pub fn listen(&self, listen: &Listen) -> Result<(), Errno> {
        let c = CListen::new(listen)?;
        // SAFETY: strings outlive the call.
        Errno::check(unsafe { spdk_sys::ps_nvmf_tgt_listen(self.pointer.as_ptr(), &c.with_state(AnaState::Optimized)) })
    }

    /// Closes the address and ends all connections made through it.
    pub fn stop_listening(&self, listen: &Listen) -> Result<(), Errno> {
        let c = CListen::new(listen)?;
        // SAFETY: strings outlive the call.
        Errno::check(unsafe { spdk_sys::ps_nvmf_tgt_stop_listen(self.pointer.as_ptr(), &c.with_state(AnaState::Optimized)) })
    }

    /// A subsystem without namespaces, inactive. `passthrough`: every I/O command reaches the bdev raw.
    pub fn create_subsystem(&self, options: &SubsystemOptions) -> Result<Subsystem, Errno> {
        let nqn = c_string(&options.nqn)?;
        let serial = c_string(&options.serial_number)?;
        let model = c_string(&options.model_number)?;
        // SAFETY: strings are copied.
        let pointer =
            unsafe { spdk_sys::ps_nvmf_subsystem_create(self.pointer.as_ptr(), nqn.as_ptr(), options.namespaces_max, options.passthrough) };
        // SPDK says no more than NULL: a name that exists or is malformed, or no room.
        let subsystem = Subsystem { pointer: NonNull::new(pointer).ok_or(Errno::EXIST)?, target: *self };
        let configure = || {
            let pointer = subsystem.pointer.as_ptr();
            // SAFETY: a new, inactive subsystem; strings are copied.
            unsafe {
                Errno::check(spdk_sys::spdk_nvmf_subsystem_set_sn(pointer, serial.as_ptr()))?;
                Errno::check(spdk_sys::spdk_nvmf_subsystem_set_mn(pointer, model.as_ptr()))?;
                Errno::check(spdk_sys::spdk_nvmf_subsystem_set_allow_any_host(pointer, options.allow_any_host))?;
                Errno::check(spdk_sys::spdk_nvmf_subsystem_set_ana_reporting(pointer, options.ana_reporting))?;
                let (low, high) = options.cntlid_range;
                Errno::check(spdk_sys::spdk_nvmf_subsystem_set_cntlid_range(pointer, low, high))
            }
        };
        match configure() {
            Ok(()) => Ok(subsystem),
            Err(errno) => {
                subsystem.destroy(|_| ());
                Err(errno)
            }
        }
    }

    /// An existing subsystem, by its name.
    pub fn find_subsystem(&self, nqn: &str) -> Option<Subsystem> {
        let nqn = c_string(nqn).ok()?;
        // SAFETY: looks the name up; the string outlives the call.
        let pointer = unsafe { spdk_sys::spdk_nvmf_tgt_find_subsystem(self.pointer.as_ptr(), nqn.as_ptr()) };
        NonNull::new(pointer).map(|pointer| Subsystem { pointer, target: *self })
    }
}

#[derive(Clone, Debug)]
pub struct SubsystemOptions {
    /// `nqn.2024-01.org.example:name`, at most 223 bytes.
    pub nqn: String,
    /// At most 20 printable bytes.
    pub serial_number: String,
    /// At most 40 printable bytes.
    pub model_number: String,
    pub namespaces_max: u32,
    pub passthrough: bool,
    pub allow_any_host: bool,
    pub ana_reporting: bool,
    /// First and last controller id, from 1 to 0xffef. Disjoint on nodes that export the same subsystem.
    pub cntlid_range: (u16, u16),
}

/// A namespace to add.
#[derive(Clone, Debug)]
pub struct NamespaceOptions {
    pub bdev: String,
    /// 0: the next free one.
    pub nsid: u32,
    pub nguid: [u8; 16],
    pub uuid: [u8; 16],
    /// 0: the same as nsid.
    pub ana_group: u32,
}

/// A subsystem of the target. App thread; not `Clone`, since [`Subsystem::destroy`] consumes it.
pub struct Subsystem {
    pointer: NonNull<spdk_sys::spdk_nvmf_subsystem>,
    target: Target,
}

extern "C" fn on_state(_subsystem: *mut spdk_sys::spdk_nvmf_subsystem, arg: *mut c_void, status: c_int) {
    callback::on_status(arg, status);
}

extern "C" fn on_destroyed(arg: *mut c_void) {
    callback::on_status(arg, 0);
}

type Change =
    unsafe extern "C" fn(*mut spdk_sys::spdk_nvmf_subsystem, spdk_sys::spdk_nvmf_subsystem_state_change_done, *mut c_void) -> c_int;

impl Subsystem {
    fn change(&self, change: Change, done: impl FnOnce(Result<(), Errno>) + 'static) {
        callback::start(done, |arg| {
            // SAFETY: the subsystem exists until destroyed; SPDK queues changes and calls back once each.
            unsafe { change(self.pointer.as_ptr(), Some(on_state), arg) }
        });
    }

    /// Lets hosts in.
    pub fn start(&self, done: impl FnOnce(Result<(), Errno>) + 'static) {
        self.change(spdk_sys::spdk_nvmf_subsystem_start, done);
    }

    /// Ends all associations; waits for their I/O.
    pub fn stop(&self, done: impl FnOnce(Result<(), Errno>) + 'static) {
        self.change(spdk_sys::spdk_nvmf_subsystem_stop, done);
    }

    /// Holds admin commands, so that listeners, namespaces and ANA states may change. I/O goes on (namespace 0).
    pub fn pause(&self, done: impl FnOnce(Result<(), Errno>) + 'static) {
        callback::start(done, |arg| {
            // SAFETY: as in `change`.
            unsafe { spdk_sys::spdk_nvmf_subsystem_pause(self.pointer.as_ptr(), 0, Some(on_state), arg) }
        });
    }

    /// Holds I/O of one namespace too: what removing it needs. Waits for its outstanding I/O.
    pub fn pause_namespace(&self, nsid: u32, done: impl FnOnce(Result<(), Errno>) + 'static) {
        callback::start(done, |arg| {
            // SAFETY: as in `change`.
            unsafe { spdk_sys::spdk_nvmf_subsystem_pause(self.pointer.as_ptr(), nsid, Some(on_state), arg) }
        });
    }

    pub fn resume(&self, done: impl FnOnce(Result<(), Errno>) + 'static) {
        self.change(spdk_sys::spdk_nvmf_subsystem_resume, done);
    }

    /// Makes the subsystem reachable at an address that the target listens on. While inactive or paused.
    pub fn add_listener(&self, listen: &Listen, state: AnaState, done: impl FnOnce(Result<(), Errno>) + 'static) {
        let c = match CListen::new(listen) {
            Ok(c) => c,
            Err(errno) => return done(Err(errno)),
        };
        callback::start(done, |arg| {
            // SAFETY: the address is copied.
            unsafe { spdk_sys::ps_nvmf_add_listener(self.pointer.as_ptr(), &c.with_state(state), Some(callback::on_status), arg) }
        });
    }

    /// Takes the address away and ends this subsystem's associations through it. While inactive or paused.
    pub fn remove_listener(&self, listen: &Listen, done: impl FnOnce(Result<(), Errno>) + 'static) {
        let c = match CListen::new(listen) {
            Ok(c) => c,
            Err(errno) => return done(Err(errno)),
        };
        callback::start(done, |arg| {
            // SAFETY: as above; the target lives as long as the app.
            unsafe {
                spdk_sys::ps_nvmf_remove_listener(
                    self.target.pointer.as_ptr(),
                    self.pointer.as_ptr(),
                    &c.with_state(AnaState::Optimized),
                    Some(callback::on_status),
                    arg,
                )
            }
        });
    }

    /// Changes what hosts are told of an address. While inactive or paused. `ana_group` 0: all groups.
    pub fn set_ana_state(&self, listen: &Listen, state: AnaState, ana_group: u32, done: impl FnOnce(Result<(), Errno>) + 'static) {
        let c = match CListen::new(listen) {
            Ok(c) => c,
            Err(errno) => return done(Err(errno)),
        };
        callback::start(done, |arg| {
            // SAFETY: the address is copied.
            unsafe {
                spdk_sys::ps_nvmf_set_ana_state(self.pointer.as_ptr(), &c.with_state(state), ana_group, Some(callback::on_status), arg)
            }
        });
    }

    /// Adds a bdev; returns its namespace id. While inactive or paused. The target claims the bdev for itself.
    pub fn add_namespace(&self, options: &NamespaceOptions) -> Result<u32, Errno> {
        let bdev = c_string(&options.bdev)?;
        // SAFETY: all inputs are copied.
        let nsid = unsafe {
            spdk_sys::ps_nvmf_add_ns(
                self.pointer.as_ptr(),
                bdev.as_ptr(),
                options.nsid,
                options.nguid.as_ptr(),
                options.uuid.as_ptr(),
                options.ana_group,
            )
        };
        // SPDK's log says which: no such bdev, claimed by another, nsid taken, not fit for passthrough.
        if nsid == 0 { Err(Errno::INVAL) } else { Ok(nsid) }
    }

    /// While inactive, or paused with [`Subsystem::pause_namespace`].
    pub fn remove_namespace(&self, nsid: u32) -> Result<(), Errno> {
        // SAFETY: exists until destroyed.
        Errno::check(unsafe { spdk_sys::spdk_nvmf_subsystem_remove_ns(self.pointer.as_ptr(), nsid) })
    }

    /// Lets this host in, where not every host is.
    pub fn allow_host(&self, host_nqn: &str) -> Result<(), Errno> {
        let nqn = c_string(host_nqn)?;
        // SAFETY: the string is copied; no parameters.
        Errno::check(unsafe { spdk_sys::spdk_nvmf_subsystem_add_host(self.pointer.as_ptr(), nqn.as_ptr(), std::ptr::null()) })
    }

    /// Starts to end every association with this subsystem; `done` when each has been told, with an error where one could not be.
    pub fn disconnect_all(&self, done: impl FnOnce(Result<(), Errno>) + 'static) {
        callback::start(done, |arg| {
            // SAFETY: the subsystem must outlive the round over the poll groups; destroying needs a stop, which queues behind.
            unsafe { spdk_sys::ps_nvmf_disconnect_all(self.pointer.as_ptr(), Some(callback::on_status), arg) }
        });
    }

    /// The hosts that are connected, by NQN, one entry for each association.
    pub fn hosts(&self) -> Vec<String> {
        extern "C" fn push(sink: *mut c_void, host: *const c_char) {
            // SAFETY: our vector, for the length of the call below, and a string inside a controller.
            unsafe { (*sink.cast::<Vec<String>>()).push(CStr::from_ptr(host).to_string_lossy().into_owned()) };
        }
        thread::assert_app_thread("listing hosts");
        let mut hosts = Vec::new();
        // SAFETY: controllers come and go on the subsystem's thread, the app thread.
        unsafe { spdk_sys::ps_nvmf_hosts(self.pointer.as_ptr(), Some(push), (&raw mut hosts).cast()) };
        hosts
    }

    /// While inactive: never started, or stopped.
    pub fn destroy(self, done: impl FnOnce(Result<(), Errno>) + 'static) {
        let arg = callback::into_arg(Box::new(done) as Done);
        // SAFETY: consumed here, so destroyed once.
        let rc = unsafe { spdk_sys::spdk_nvmf_subsystem_destroy(self.pointer.as_ptr(), Some(on_destroyed), arg) };
        if rc != -libc::EINPROGRESS {
            // Done at once or refused: in both cases the callback will not come.
            callback::on_status(arg, rc);
        }
    }

    pub fn nqn(&self) -> String {
        // SAFETY: a string inside the subsystem.
        unsafe { CStr::from_ptr(spdk_sys::spdk_nvmf_subsystem_get_nqn(self.pointer.as_ptr())) }.to_string_lossy().into_owned()
    }
}

// ---- who is connected ----

/// Identifies a controller (an association) while it lives; the number may be used again afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ControllerId(usize);

/// The state of the association that a command came through, as of now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControllerState {
    pub controller: ControllerId,
    /// The connection is up and the controller enabled. If not, the command is a ghost: its host is gone or has given up on it.
    pub live: bool,
    /// As the host named itself when it connected; zeros where it did not.
    pub host_id: [u8; 16],
}

/// An association of a host with a subsystem.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Association {
    pub controller: ControllerId,
    pub host_nqn: String,
    pub host_id: [u8; 16],
    pub subsystem_nqn: String,
    pub cntlid: u16,
    /// 0 is the admin queue.
    pub queue: u16,
    pub live: bool,
    /// Where the host connected: address (or directory) and port.
    pub listen_address: String,
    pub listen_service: String,
}

fn fixed(text: &[c_char]) -> String {
    let bytes: Vec<u8> = text.iter().map(|c| *c as u8).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Association {
    fn from_c(c: &spdk_sys::ps_association) -> Association {
        Association {
            controller: ControllerId(c.ctrlr as usize),
            host_nqn: fixed(&c.host_nqn),
            host_id: c.host_id,
            subsystem_nqn: fixed(&c.subsystem_nqn),
            cntlid: c.cntlid,
            queue: c.qid,
            live: c.live,
            listen_address: fixed(&c.listen_addr),
            listen_service: fixed(&c.listen_service),
        }
    }
}

pub(crate) fn association_of(io: *mut spdk_sys::spdk_bdev_io) -> Option<Association> {
    let mut c = std::mem::MaybeUninit::<spdk_sys::ps_association>::zeroed();
    // SAFETY: HostIo calls this for devices registered for an NVMe-oF front end, whose I/O is not split, and the shim fills it.
    let rc = unsafe { spdk_sys::ps_io_association(io, c.as_mut_ptr()) };
    // SAFETY: plain data, zeroed at least.
    (rc == 0).then(|| Association::from_c(unsafe { c.assume_init_ref() }))
}

pub(crate) fn controller_of(io: *mut spdk_sys::spdk_bdev_io) -> Option<ControllerState> {
    let (mut live, mut host_id) = (false, [0; 16]);
    // SAFETY: as above.
    let controller = unsafe { spdk_sys::ps_io_controller(io, &mut live, host_id.as_mut_ptr()) };
    (!controller.is_null()).then_some(ControllerState { controller: ControllerId(controller as usize), live, host_id })
}

// ---- identify ----

/// What a host asks the target to identify. The data are as SPDK filled them in, and the hook may change them.
pub enum Identify<'a> {
    /// Identify Controller (CNS 1): every association sends it, so this is also the notice that it exists.
    Controller { association: &'a Association, data: &'a mut [u8; 4096] },
    /// Identify Namespace (CNS 0).
    Namespace { association: &'a Association, nsid: u32, data: &'a mut [u8; 4096] },
}

type IdentifyHook = Box<dyn Fn(Identify<'_>) + Send + Sync>;
static IDENTIFY: OnceLock<IdentifyHook> = OnceLock::new();

/// What the target says by itself that is not true of us: see [`honest_identify`].
pub const IDENTIFY_VWC: usize = 525;
pub const IDENTIFY_DLFEAT: usize = 33;

/// No volatile write cache; deallocated blocks read as zeroes, by Write Zeroes too.
pub fn honest_identify(identify: &mut Identify<'_>) {
    match identify {
        // Byte 525: bit 0 present; bits 2:1 what a flush to all namespaces does, which stays.
        Identify::Controller { data, .. } => data[IDENTIFY_VWC] &= !1,
        // Byte 33: bits 2:0 are 1 for zeroes; bit 3 says that Write Zeroes may deallocate, which SPDK's target refuses.
        Identify::Namespace { data, .. } => data[IDENTIFY_DLFEAT] = 1,
    }
}

/// Sees, and may change, what hosts are told, in place of [`honest_identify`], which it may call. Once, before hosts connect. Runs
/// on the connections' threads: must not block.
pub fn set_identify_hook(hook: impl Fn(Identify<'_>) + Send + Sync + 'static) -> Result<(), Errno> {
    IDENTIFY.set(Box::new(hook)).map_err(|_| Errno::EXIST)
}

extern "C" fn on_identify(kind: spdk_sys::ps_identify_kind, who: *const spdk_sys::ps_association, nsid: u32, data: *mut u8) {
    // SAFETY: the shim's own, for the length of this call.
    let association = Association::from_c(unsafe { &*who });
    // SAFETY: the shim's buffer of 4096 bytes, which nobody else has.
    let data = unsafe { &mut *data.cast::<[u8; 4096]>() };
    let mut identify = match kind {
        spdk_sys::PS_IDENTIFY_CONTROLLER => Identify::Controller { association: &association, data },
        _ => Identify::Namespace { association: &association, nsid, data },
    };
    match IDENTIFY.get() {
        Some(hook) => hook(identify),
        None => honest_identify(&mut identify),
    }
}
