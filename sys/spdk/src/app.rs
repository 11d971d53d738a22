//! The SPDK application: environment, reactors, subsystems, JSON-RPC server. Once per process, since DPDK can be started once.
//!
//! Signals are left to the caller: SPDK's handlers would wait for outstanding I/O before anybody could answer it.

use crate::callback::c_string;
use crate::status::Errno;
use crate::thread;
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// Severity of a log line, as SPDK grades it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum LogLevel {
    Error,
    Warn,
    Notice,
    Info,
    Debug,
}

impl LogLevel {
    fn from_c(level: c_int) -> LogLevel {
        match level {
            spdk_sys::SPDK_LOG_ERROR => LogLevel::Error,
            spdk_sys::SPDK_LOG_WARN => LogLevel::Warn,
            spdk_sys::SPDK_LOG_NOTICE => LogLevel::Notice,
            spdk_sys::SPDK_LOG_INFO => LogLevel::Info,
            _ => LogLevel::Debug,
        }
    }

    fn to_c(self) -> c_int {
        match self {
            LogLevel::Error => spdk_sys::SPDK_LOG_ERROR,
            LogLevel::Warn => spdk_sys::SPDK_LOG_WARN,
            LogLevel::Notice => spdk_sys::SPDK_LOG_NOTICE,
            LogLevel::Info => spdk_sys::SPDK_LOG_INFO,
            LogLevel::Debug => spdk_sys::SPDK_LOG_DEBUG,
        }
    }
}

/// A line that SPDK logged.
#[derive(Clone, Copy, Debug)]
pub struct LogLine<'a> {
    pub level: LogLevel,
    /// Source file and line within SPDK; empty and 0 where unknown.
    pub file: &'a str,
    pub line: u32,
    pub text: &'a str,
}

type LogHook = Box<dyn Fn(LogLine<'_>) + Send + Sync>;
static LOG_HOOK: OnceLock<LogHook> = OnceLock::new();
static USED: AtomicBool = AtomicBool::new(false);

/// Whether DPDK's memory may be allocated and freed: from the start closure until `run` returns.
const ENV_NOT_STARTED: u8 = 0;
const ENV_UP: u8 = 1;
const ENV_GONE: u8 = 2;
static ENV: AtomicU8 = AtomicU8::new(ENV_NOT_STARTED);

pub(crate) fn env_is_up() -> bool {
    ENV.load(Ordering::Acquire) == ENV_UP
}

type Start = Box<dyn FnOnce()>;
thread_local! {
    /// Called on the app thread when SPDK itself asks for a stop (JSON-RPC `spdk_kill_instance`).
    static ON_SHUTDOWN: Cell<Option<Start>> = const { Cell::new(None) };
}

#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error("SPDK can run once per process, and this process has used its turn")]
    AlreadyUsed,
    #[error("the {0} holds a NUL byte")]
    NulByte(&'static str),
    #[error("without hugepages SPDK needs a memory limit of at least 448 MiB (its pools do not fit in less); {0} MiB was asked for")]
    TooLittleMemory(u32),
    #[error("SPDK did not start or stopped with code {0}; its log says why")]
    Failed(i32),
}

/// What to start. Build it, then [`App::run`].
pub struct App {
    name: String,
    core_mask: String,
    main_core: Option<u32>,
    memory_mib: Option<u32>,
    hugepages: bool,
    pci: bool,
    single_file_segments: bool,
    in_memory: bool,
    interrupt_mode: bool,
    lock_cores: bool,
    rpc_socket: Option<PathBuf>,
    json_config: Option<Vec<u8>>,
    log_level: LogLevel,
    log: Option<LogHook>,
    on_shutdown: Option<Start>,
}

impl App {
    /// One core (core 0), hugepages, PCI drives, polling, no RPC socket, log level notice.
    pub fn new(name: impl Into<String>) -> App {
        App {
            name: name.into(),
            core_mask: "0x1".into(),
            main_core: None,
            memory_mib: None,
            hugepages: true,
            pci: true,
            single_file_segments: false,
            in_memory: false,
            interrupt_mode: false,
            lock_cores: false,
            rpc_socket: None,
            json_config: None,
            log_level: LogLevel::Notice,
            log: None,
            on_shutdown: None,
        }
    }

    /// Cores as a mask (`0x3`) or list (`[0,1]`).
    pub fn core_mask(mut self, mask: impl Into<String>) -> App {
        self.core_mask = mask.into();
        self
    }

    /// The core of the app thread; the first of the mask if not given.
    pub fn main_core(mut self, core: u32) -> App {
        self.main_core = Some(core);
        self
    }

    /// With hugepages: memory to start with. Without: a hard limit, of which 448 MiB is the least.
    pub fn memory_mib(mut self, mib: u32) -> App {
        self.memory_mib = Some(mib);
        self
    }

    /// Runs on ordinary memory. No physical addresses, so no PCI drives through uio. Set `memory_mib` too.
    pub fn no_hugepages(mut self) -> App {
        self.hugepages = false;
        self
    }

    /// Leaves PCI devices alone.
    pub fn no_pci(mut self) -> App {
        self.pci = false;
        self
    }

    /// One file for all hugepages: what an initiator on hugepages needs that shares them with another process.
    pub fn single_file_segments(mut self) -> App {
        self.single_file_segments = true;
        self
    }

    /// Hugepages as files without names, which other processes map by descriptor: a process that is killed leaves none behind. Not for
    /// a vhost-user initiator, which finds its own files by their names.
    pub fn unnamed_hugepages(mut self) -> App {
        self.in_memory = true;
        self
    }

    /// Reactors sleep until an event instead of polling. Every poller of ours must then be event driven or timed.
    pub fn interrupt_mode(mut self, on: bool) -> App {
        self.interrupt_mode = on;
        self
    }

    /// Refuses to start where another SPDK process claimed one of the cores. Off: several may share a core.
    pub fn lock_cores(mut self, on: bool) -> App {
        self.lock_cores = on;
        self
    }

    /// Where SPDK's JSON-RPC server listens. The socket checks nobody: put it into a directory of mode 0700.
    pub fn rpc_socket(mut self, path: impl Into<PathBuf>) -> App {
        self.rpc_socket = Some(path.into());
        self
    }

    /// SPDK's own JSON configuration, loaded before the start closure runs.
    pub fn json_config(mut self, json: impl Into<Vec<u8>>) -> App {
        self.json_config = Some(json.into());
        self
    }

    pub fn log_level(mut self, level: LogLevel) -> App {
        self.log_level = level;
        self
    }

    /// Takes SPDK's log lines instead of its stderr. Called from any thread, reactors included: must not block.
    pub fn log(mut self, hook: impl Fn(LogLine<'_>) + Send + Sync + 'static) -> App {
        self.log = Some(Box::new(hook));
        self
    }

    /// Called on the app thread when SPDK itself asks for a stop. Without it that stops the app at once.
    pub fn on_shutdown(mut self, hook: impl FnOnce() + 'static) -> App {
        self.on_shutdown = Some(Box::new(hook));
        self
    }

    /// Starts SPDK, runs `start` on the app thread (which is the calling thread), and blocks until [`stop`].
    pub fn run(self, start: impl FnOnce() + 'static) -> Result<(), AppError> {
        let name = CString::new(self.name).map_err(|_| AppError::NulByte("app's name"))?;
        let core_mask = CString::new(self.core_mask).map_err(|_| AppError::NulByte("core mask"))?;
        let rpc = self
            .rpc_socket
            .map(|path| CString::new(path.into_os_string().into_encoded_bytes()))
            .transpose()
            .map_err(|_| AppError::NulByte("RPC socket's path"))?;
        let memory = self.memory_mib.unwrap_or(if self.hugepages { 0 } else { 512 });
        if !self.hugepages && memory < 448 {
            return Err(AppError::TooLittleMemory(memory));
        }
        if USED.swap(true, Ordering::SeqCst) {
            return Err(AppError::AlreadyUsed);
        }
        let has_log = self.log.is_some();
        if let Some(hook) = self.log {
            // USED lets one caller in, so nobody has set it.
            let _ = LOG_HOOK.set(hook);
        }
        ON_SHUTDOWN.set(Some(self.on_shutdown.unwrap_or_else(|| Box::new(|| stop(0)))));
        let json = self.json_config.unwrap_or_default();
        let options = spdk_sys::ps_app_opts {
            name: name.as_ptr(),
            core_mask: core_mask.as_ptr(),
            rpc_addr: rpc.as_ref().map_or(std::ptr::null(), |path| path.as_ptr()),
            json: if json.is_empty() { std::ptr::null() } else { json.as_ptr().cast() },
            json_len: json.len(),
            mem_mib: i32::try_from(memory).unwrap_or(i32::MAX),
            main_core: self.main_core.map_or(-1, |core| core as i32),
            no_huge: !self.hugepages,
            no_pci: !self.pci,
            interrupt_mode: self.interrupt_mode,
            lock_cores: self.lock_cores,
            single_file_segments: self.single_file_segments,
            in_memory: self.in_memory,
            log_level: self.log_level.to_c(),
            log: has_log.then_some(on_log as _),
            on_shutdown: Some(on_shutdown),
        };
        let start: Start = Box::new(start);
        let arg: *mut Option<Start> = Box::into_raw(Box::new(Some(start)));
        // SAFETY: all pointers in `options` outlive the call, which blocks until SPDK has stopped and copied what it keeps.
        let code = unsafe { spdk_sys::ps_app_run(&options, Some(on_start), arg.cast()) };
        thread::close_all();
        ENV.store(ENV_GONE, Ordering::Release);
        // SAFETY: made above; on_start only takes the closure out and SPDK is done with the pointer.
        drop(unsafe { Box::from_raw(arg) });
        if code == 0 { Ok(()) } else { Err(AppError::Failed(code)) }
    }
}

extern "C" fn on_start(arg: *mut c_void) {
    ENV.store(ENV_UP, Ordering::Release);
    thread::adopt_app_thread();
    // SAFETY: `run` passed a Box of this type, keeps it until after SPDK stopped, and does not touch it meanwhile.
    let start = unsafe { (*arg.cast::<Option<Start>>()).take() };
    if let Some(start) = start {
        start();
    }
}

extern "C" fn on_shutdown() {
    if let Some(hook) = ON_SHUTDOWN.take() {
        hook();
    }
}

extern "C" fn on_log(level: c_int, file: *const c_char, line: c_int, text: *const c_char, len: usize) {
    let Some(hook) = LOG_HOOK.get() else { return };
    let file = if file.is_null() {
        ""
    } else {
        // SAFETY: __FILE__ of SPDK's sources: a static NUL-terminated string.
        unsafe { CStr::from_ptr(file) }.to_str().unwrap_or("")
    };
    // SAFETY: the shim passes its buffer and the bytes that it wrote there.
    let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), len) };
    let text = String::from_utf8_lossy(bytes);
    hook(LogLine { level: LogLevel::from_c(level), file, line: u32::try_from(line).unwrap_or(0), text: &text });
}

/// Says something through the log hook, or stderr where there is none. For faults of the caller that have no other way out.
pub(crate) fn log_error(text: &str) {
    match LOG_HOOK.get() {
        Some(hook) => hook(LogLine { level: LogLevel::Error, file: "", line: 0, text }),
        None => eprintln!("spdk-rs: {text}"),
    }
}

/// Ends the app: subsystems finish, then [`App::run`] returns, with an error unless `code` is 0. From any thread; once is enough.
///
/// SPDK waits for outstanding I/O first, without limit: answer it, drop bdevs, channels and pollers, then call this.
pub fn stop(code: i32) {
    if !env_is_up() {
        return;
    }
    // From here on no handle reaches a thread that may be going away.
    thread::close_all();
    // SAFETY: the app thread exists while the environment is up.
    unsafe { spdk_sys::ps_app_stop(code) };
}

/// Ends the process at once, without SPDK's shutdown and without any destructor: the way out when I/O is outstanding that will
/// never end (a dead target), which [`stop`] would wait for. `std::process::exit` would run destructors under live reactors.
/// What must be on disk has to be written before.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit touches nothing of this process.
    unsafe { libc::_exit(code) }
}

/// Turns on SPDK's debug log of one component, such as `nvmf_tcp`. Needs log level info or debug.
pub fn log_component(name: &str) -> Result<(), Errno> {
    let name = c_string(name)?;
    // SAFETY: the string outlives the call.
    Errno::check(unsafe { spdk_sys::spdk_log_set_flag(name.as_ptr()) })
}

/// The cores of the mask, ascending. Empty before the start closure runs.
pub fn cores() -> Vec<thread::Core> {
    if !env_is_up() {
        return Vec::new();
    }
    let mut cores = Vec::new();
    // SAFETY: reads DPDK's tables, which are set up before the start closure and fixed from then on.
    let mut core = unsafe { spdk_sys::ps_first_core() };
    while core != u32::MAX {
        cores.push(thread::Core(core));
        // SAFETY: as above.
        core = unsafe { spdk_sys::ps_next_core(core) };
    }
    cores
}

/// The CPU's time stamp counter, and its rate a second. Monotonic on one machine.
pub fn ticks() -> u64 {
    // SAFETY: reads the counter.
    unsafe { spdk_sys::spdk_get_ticks() }
}

/// Ticks a second; 0 before the start closure runs.
pub fn ticks_hz() -> u64 {
    // SAFETY: reads a variable that DPDK set when it started.
    unsafe { spdk_sys::spdk_get_ticks_hz() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn app_without_hugepages_and_too_little_memory_is_refused_before_it_starts() {
        let refused = App::new("t").no_hugepages().memory_mib(384).run(|| unreachable!());
        assert!(matches!(refused, Err(AppError::TooLittleMemory(384))));
        // The refusal did not use up the process's turn.
        assert!(!USED.load(Ordering::SeqCst));
    }

    #[test]
    fn log_level_survives_a_trip_through_c() {
        for level in [LogLevel::Error, LogLevel::Warn, LogLevel::Notice, LogLevel::Info, LogLevel::Debug] {
            assert_eq!(LogLevel::from_c(level.to_c()), level);
        }
    }
}
