//! SPDK in this process: started on the main thread, steered from an ordinary one over our own JSON-RPC socket.
//!
//! Deliberately not here: loads. The steering thread is never on an I/O's way.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use penstock_node::config::{Config, Poll};
use penstock_node::node::{self, Node};
use penstock_node::peer::key::ClusterKey;
use serde_json::Value;
use spdk_rs::app::{self, App, LogLevel};
use spdk_rs::bdev::{Bdev, BdevEvent, Geometry};
use spdk_rs::thread::app_thread;

use crate::memory::Memory;
use crate::rpc::{RpcClient, RpcError};
use crate::scratch;
use crate::target::{Reconnect, Target, Which, bdev_name};
use crate::units::Nanos;
use crate::volume;

/// Longest wait for an attach or create call.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for SPDK to start.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How SPDK is started.
#[derive(Debug, Clone)]
pub struct HostOptions {
    /// Cores as a mask (`0x2`) or list (`[0,1]`).
    pub core_mask: String,
    pub hugepages: bool,
    pub mem_mib: u32,
    /// SPDK's own JSON configuration.
    pub json_config: Option<Vec<u8>>,
    /// Print all that SPDK says, not just its warnings and errors, each kind once.
    pub is_verbose: bool,
    /// Sleep between events (SPDK's interrupt mode) in place of polling.
    pub sleeps: bool,
    /// Run a node in this process: `penstock_*` calls are answered, and its volumes' bdevs can be opened.
    pub node: Option<NodeOptions>,
}

/// A node beside the load, for volumes without a front door.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Holds its sockets and state.
    pub directory: PathBuf,
    /// The directory goes when the node has ended.
    pub is_scratch: bool,
    pub cores: Vec<u32>,
    /// Memory for the engine's buffers, over all cores.
    pub buffer_mib: u32,
    /// Where other nodes reach it, and the file with the key that they share.
    pub peers: Option<(SocketAddr, PathBuf)>,
    /// As [`HostOptions::sleeps`].
    pub sleeps: bool,
}

/// What SPDK's own pools take of the process's memory; the node reckons with it when it sizes its buffers.
pub const SPDK_POOLS_MIB: u32 = 430;

impl NodeOptions {
    fn config(&self) -> Result<Config, HostError> {
        let key = self.peers.as_ref().map(|(_, key)| ClusterKey::read(key)).transpose();
        Ok(Config {
            poll: if self.sleeps { Poll::Adaptive } else { Poll::Busy },
            peer_listen: self.peers.as_ref().map(|(listen, _)| *listen),
            cluster_key: key.map_err(|(what, _)| HostError::Key(what))?,
            run_dir: self.directory.join("run"),
            state_dir: self.directory.join("state"),
            cores: self.cores.clone(),
            mem_mib: Some(SPDK_POOLS_MIB + self.buffer_mib),
            ..Config::default()
        })
    }

    fn prepare(&self) -> Result<Config, HostError> {
        let config = self.config()?;
        for directory in [&config.run_dir, &config.state_dir, &config.vhost_dir(), &config.vfio_user_dir()] {
            std::fs::create_dir_all(directory).map_err(HostError::Directory)?;
        }
        node::register_rpc().map_err(HostError::Node)?;
        Ok(config)
    }
}

/// Why something could not be done with SPDK here.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error(transparent)]
    App(#[from] spdk_rs::app::AppError),
    #[error("SPDK was not up within {} s; its log above says what it waits for", START_LIMIT.as_secs())]
    NotUp,
    #[error("the directory for our RPC socket could not be made: {0}")]
    Directory(std::io::Error),
    #[error(transparent)]
    Rpc(#[from] RpcError),
    #[error("{method} answered {answer}, in which there is no bdev's name")]
    NoBdev { method: &'static str, answer: Value },
    #[error("bdev `{name}` cannot be opened: {errno}; `bdev:NAME` needs --bdev-json with a configuration that makes it")]
    Open { name: String, errno: spdk_rs::Errno },
    #[error(
        "{0} needs hugepages, since SPDK's initiator shares them by file: reserve and mount some (penstock-hugepages reserve, mount) and give --hugepages"
    )]
    Hugepages(String),
    #[error("the volume cannot be opened: {0}")]
    Volume(String),
    #[error("SPDK refuses a method of the node: {0}")]
    Node(spdk_rs::Errno),
    #[error("{0}")]
    Key(String),
    #[error("the device `{name}` cannot be made: {errno}")]
    Memory { name: String, errno: spdk_rs::Errno },
    #[error("SPDK is stopping")]
    Stopping,
}

/// SPDK, up and running.
pub struct Host {
    rpc: RpcClient,
    is_stopping: Arc<AtomicBool>,
    memories: HashMap<String, Arc<Memory>>,
}

/// Starts SPDK, runs `work` on a thread of its own beside it, and stops SPDK when that returns.
///
/// SPDK waits without limit for outstanding I/O when it stops, so a process whose target is dead may need
/// [`app::exit_now`] at the end of `work`; the caller decides.
pub fn run<R: Send + 'static>(options: &HostOptions, work: impl FnOnce(&mut Host) -> R + Send + 'static) -> Result<R, HostError> {
    let directory = scratch::directory(&std::env::temp_dir(), "penstock-perf").map_err(HostError::Directory)?;
    let socket = directory.join("rpc.sock");
    let (up_tx, up_rx) = bounded::<()>(1);
    let is_stopping = Arc::new(AtomicBool::new(false));
    let node_config = options.node.as_ref().map(NodeOptions::prepare).transpose()?;
    let has_node = node_config.is_some();
    let steering = {
        let (socket, is_stopping) = (socket.clone(), is_stopping.clone());
        // Before DPDK pins this thread, whose affinity new threads inherit.
        std::thread::Builder::new().name("steering".into()).spawn(move || steer(&up_rx, &socket, is_stopping, has_node, work))
    };
    let steering = steering.map_err(HostError::Directory)?;
    let level = if options.is_verbose { LogLevel::Notice } else { LogLevel::Warn };
    let mut app = App::new("penstock-perf")
        .core_mask(options.core_mask.clone())
        .memory_mib(options.mem_mib)
        .no_pci()
        .interrupt_mode(options.sleeps)
        .rpc_socket(socket)
        .log_level(level);
    if !options.is_verbose {
        let seen = Mutex::new(HashSet::new());
        app = app.log(move |line| {
            // A target that is away gives the same dozen lines a second. Each place in SPDK is heard once.
            let is_new = line.level <= LogLevel::Warn && seen.lock().is_ok_and(|mut seen| seen.insert((line.file.to_owned(), line.line)));
            if is_new {
                eprintln!("spdk {:?}: {}", line.level, line.text.trim_end());
            }
        });
    }
    app = if options.hugepages { app.single_file_segments() } else { app.no_hugepages() };
    if let Some(json) = &options.json_config {
        app = app.json_config(json.clone());
    }
    let outcome = app.run(move || {
        let up = move || {
            let _ = up_tx.send(());
        };
        match node_config {
            None => up(),
            Some(config) => {
                if let Err(error) = Node::start(config, Box::new(move |_| up())) {
                    eprintln!("the node does not start: {error}");
                    app::stop(1);
                }
            }
        }
    });
    is_stopping.store(true, Ordering::SeqCst);
    let _ = std::fs::remove_dir_all(&directory); // where SPDK never came up; else it is gone already
    if let Some(node) = options.node.as_ref().filter(|node| node.is_scratch) {
        let _ = std::fs::remove_dir_all(&node.directory);
    }
    let result = steering.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    match (outcome, result) {
        // SPDK's own failure explains more than "was not up".
        (Err(error), _) => Err(error.into()),
        (Ok(()), result) => result,
    }
}

fn steer<R>(
    up: &Receiver<()>,
    socket: &std::path::Path,
    is_stopping: Arc<AtomicBool>,
    has_node: bool,
    work: impl FnOnce(&mut Host) -> R,
) -> Result<R, HostError> {
    // A failed start drops the closure that would have told us.
    match up.recv_timeout(START_LIMIT) {
        Ok(()) => {}
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Err(HostError::NotUp),
    }
    struct StopApp {
        has_node: bool,
    }
    impl Drop for StopApp {
        fn drop(&mut self) {
            if self.has_node {
                penstock_node::inproc::stop(); // drains, closes its drives, and stops the app
            } else {
                app::stop(0);
            }
        }
    }
    let _stop = StopApp { has_node }; // also when `work` panics: else the main thread would never return
    let rpc = RpcClient::connect_within(socket, Duration::from_secs(5))?;
    // Nobody else is to connect, and a process that is killed leaves nothing behind.
    let _ = socket.parent().map(std::fs::remove_dir_all);
    let mut host = Host { rpc, is_stopping, memories: HashMap::new() };
    Ok(work(&mut host))
}

impl Host {
    /// One JSON-RPC call to SPDK in this process.
    pub fn call(&mut self, method: &str, params: &Value) -> Result<Value, HostError> {
        Ok(self.rpc.call(method, params, CALL_LIMIT)?)
    }

    /// Makes a bdev of the target and gives its name.
    pub fn attach(&mut self, target: &Target, name: &str, reconnect: Reconnect, block_bytes: u32) -> Result<String, HostError> {
        match target {
            Target::Bdev { name } => return Ok(name.clone()),
            Target::Volume { which, drive } => {
                let opened = match which {
                    Which::Named(name) => volume::open_named(&mut self.rpc, name, drive),
                    Which::New(size) => volume::open_new(&mut self.rpc, size.0, drive),
                };
                return opened.map_err(HostError::Volume);
            }
            _ => {}
        }
        let mut last = None;
        for call in target.attach_calls(name, reconnect, block_bytes) {
            last = Some((call.method, self.call(call.method, &call.params)?));
        }
        let (method, answer) = last.expect("every other target has calls");
        bdev_name(&answer).ok_or(HostError::NoBdev { method, answer })
    }

    /// Runs `f` on the app thread and waits for what it gives.
    pub fn on_app_thread<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> Result<R, HostError> {
        let (tx, rx) = bounded(1);
        let thread = app_thread().ok_or(HostError::Stopping)?;
        thread
            .send(move || {
                let _ = tx.send(f());
            })
            .map_err(|_| HostError::Stopping)?;
        rx.recv_timeout(CALL_LIMIT).map_err(|_| HostError::Stopping)
    }

    /// Opens a bdev for loads. Its removal is only noted: I/O then fails, and the load counts that.
    pub fn open(&self, name: &str, writable: bool) -> Result<(Bdev, Geometry), HostError> {
        let asked = name.to_owned();
        let opened = self.on_app_thread(move || {
            Bdev::open(&asked, writable, |event| {
                if event == BdevEvent::Removed {
                    eprintln!("the target's device was removed");
                }
            })
            .map(|bdev| {
                let geometry = bdev.geometry();
                (bdev, geometry)
            })
        })?;
        opened.map_err(|errno| HostError::Open { name: name.to_owned(), errno })
    }

    /// Makes a device of so many bytes of memory that answers after `delay`, or gives the one that there is another delay.
    pub fn memory(&mut self, name: &str, bytes: u64, delay: Nanos) -> Result<(), HostError> {
        if let Some(device) = self.memories.get(name) {
            device.set(delay);
            return Ok(());
        }
        let asked = name.to_owned();
        let made = self.on_app_thread(move || Memory::register(&asked, bytes, delay))?;
        let device = made.map_err(|errno| HostError::Memory { name: name.to_owned(), errno })?;
        self.memories.insert(name.to_owned(), device);
        Ok(())
    }

    /// True once SPDK is on its way down.
    pub fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::SeqCst)
    }
}
