//! The node: drives, volumes and exports as the app thread holds them, and the way between control's calls and the cores.
//!
//! Everything here runs on SPDK's app thread and is reached through an `Rc`; no borrow is held across a call into SPDK or to a
//! continuation. Cores are asked by message and answer by message. Not here: I/O, which never passes this thread.

mod drives;
mod exports;
mod groups;
mod info;
mod opening;
mod peers;
mod quarantine;
mod rpc;
mod snapshots;
mod stop;
mod volumes;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Instant;

use penstock_api::rpc::{ErrorCode, RpcError};
use penstock_api::{ClusterId, DriveId, NodeId, VolumeId};
use penstock_engine::{Order, OrderError, OrderId};
use spdk_rs::thread::{Poller, ThreadHandle};

use crate::config::Config;
use crate::core::{self, Core, CoreIndex, CoreOptions, DriveKey, Peer, Report};
use crate::door::Target;
use crate::state::{StateError, StateFile};

pub use rpc::register as register_rpc;
pub use stop::take_signals;

use drives::Drive;
use volumes::{Place, Volume};

/// How a call is answered, now or later.
pub type Answer<R> = Box<dyn FnOnce(Result<R, RpcError>)>;

pub(crate) fn fail(code: ErrorCode, message: impl Into<String>, hint: impl Into<String>) -> RpcError {
    RpcError::new(code, message).with_hint(hint)
}

/// One core and its loop.
#[derive(Clone, Debug)]
struct CoreHandle {
    index: CoreIndex,
    core: u32,
    thread: ThreadHandle,
}

type Continuation = Box<dyn FnOnce(&Rc<Node>, Box<dyn Any>)>;
/// What happens later, with the node at hand.
type Later = Box<dyn FnOnce(&Rc<Node>)>;
/// A core that has started, on its way to the others.
type StartedCore = (CoreHandle, Peer, crossbeam_channel::Receiver<core::Parcel>);
/// What happens when the node serves.
pub type Ready = Box<dyn FnOnce(&Rc<Node>)>;
type OrderWaiter = Box<dyn FnOnce(&Rc<Node>, Result<(), OrderError>)>;

pub struct Node {
    pub(crate) config: Config,
    cores: RefCell<Vec<CoreHandle>>,
    state: RefCell<StateFile>,
    target: RefCell<Option<Rc<Target>>>,
    drives: RefCell<BTreeMap<DriveId, Drive>>,
    volumes: RefCell<BTreeMap<VolumeId, Volume>>,
    continuations: RefCell<HashMap<u64, Continuation>>,
    orders: RefCell<HashMap<u64, OrderWaiter>>,
    /// Drives whose operator has accepted that part of the oplog is lost; used when they are opened next.
    accepting: RefCell<BTreeSet<DriveId>>,
    next_number: Cell<u64>,
    next_key: Cell<u32>,
    started: Instant,
    incarnation: u64,
    ready: Cell<bool>,
    /// Hosts are let in.
    listening: Cell<bool>,
    on_ready: RefCell<Option<Ready>>,
    stop: stop::StopState,
    pollers: RefCell<Vec<Poller>>,
}

thread_local! {
    static NODE: RefCell<Option<Rc<Node>>> = const { RefCell::new(None) };
}

/// The node of this process, on the app thread; `None` before it starts and after it ended.
pub(crate) fn current() -> Option<Rc<Node>> {
    NODE.with_borrow(Clone::clone)
}

/// How long an adaptive core sleeps at most between looks at an NVMe drive, which may have no event to wake it.
const NVME_POLL_US: u64 = 1000;

/// Bytes of buffers that a node takes for the engine, over all cores.
fn buffer_bytes(config: &Config) -> usize {
    match config.mem_mib {
        // SPDK's own pools take some 420 MiB of what there is.
        Some(mib) => (mib.saturating_sub(430) as usize).clamp(24, 2048) << 20,
        None => 512 << 20,
    }
}

/// A number that no other run of this node has had.
pub(crate) fn run_number() -> u64 {
    use std::io::Read;
    let mut bytes = [0; 8];
    match std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)) {
        Ok(()) => u64::from_le_bytes(bytes) >> 11,
        Err(_) => std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |d| d.as_micros() as u64) >> 3,
    }
}

impl Node {
    /// Starts the node on the app thread, once SPDK is up; `ready` is called when it serves.
    ///
    /// # Errors
    /// When the state directory cannot be used; the caller stops SPDK.
    pub fn start(config: Config, ready: Ready) -> Result<(), StateError> {
        let state = StateFile::open(&config.state_dir)?;
        let node = Rc::new(Self {
            config,
            cores: RefCell::default(),
            state: RefCell::new(state),
            target: RefCell::default(),
            drives: RefCell::default(),
            volumes: RefCell::default(),
            continuations: RefCell::default(),
            orders: RefCell::default(),
            accepting: RefCell::default(),
            next_number: Cell::new(1),
            next_key: Cell::new(1),
            started: Instant::now(),
            incarnation: run_number(),
            ready: Cell::new(false),
            listening: Cell::new(false),
            on_ready: RefCell::default(),
            stop: stop::StopState::default(),
            pollers: RefCell::default(),
        });
        NODE.with_borrow_mut(|place| *place = Some(node.clone()));
        if let Err(errno) = spdk_rs::nvme::enable_flush() {
            // Without it a flush would succeed unsent, and nothing acknowledged would be durable.
            tracing::error!(%errno, "SPDK does not let flushes reach NVMe drives");
            spdk_rs::app::stop(1);
            return Ok(());
        }
        if spdk_rs::thread::interrupt_mode()
            && let Err(errno) = spdk_rs::nvme::poll_every(NVME_POLL_US)
        {
            tracing::warn!(%errno, "NVMe drives that raise no events cannot be used");
        }
        node.watch_signals();
        *node.on_ready.borrow_mut() = Some(ready);
        node.start_cores();
        Ok(())
    }

    fn start_cores(self: &Rc<Self>) {
        let app = spdk_rs::thread::app_thread().expect("the node starts on the app thread");
        let wanted = spdk_rs::app::cores();
        let memory_bytes = buffer_bytes(&self.config) / wanted.len();
        let count = wanted.len();
        let peers: Rc<RefCell<Vec<Option<StartedCore>>>> = Rc::new(RefCell::new((0..count).map(|_| None).collect()));
        for (at, core) in wanted.into_iter().enumerate() {
            let index = CoreIndex(at as u16);
            let reporter = app.clone();
            let report: Box<dyn Fn(Report) + Send> = Box::new(move |report| {
                let sent = reporter.send(move || {
                    if let Some(node) = current() {
                        node.on_report(report);
                    }
                });
                if sent.is_err() {
                    tracing::debug!("a report came after the node had ended");
                }
            });
            let options = CoreOptions { index, memory_bytes, report };
            let peers = peers.clone();
            let (token, _) = self.continue_with(move |node, result: Result<(ThreadHandle, spdk_rs::thread::Waker), spdk_rs::Errno>| {
                let (thread, waker) = match result {
                    Ok(started) => started,
                    Err(errno) => {
                        tracing::error!(core = core.0, %errno, "a core's loop does not start");
                        return spdk_rs::app::stop(1);
                    }
                };
                let (sender, receiver) = crossbeam_channel::bounded(core::port::PARCELS_MAX);
                let handle = CoreHandle { index, core: core.0, thread };
                peers.borrow_mut()[at] = Some((handle, Peer { core, sender, waker }, receiver));
                if peers.borrow().iter().all(Option::is_some) {
                    let all: Vec<_> = peers.borrow_mut().drain(..).flatten().collect();
                    node.install_ports(all);
                }
            });
            let replier = Replier::<Result<(ThreadHandle, spdk_rs::thread::Waker), spdk_rs::Errno>>::new(token, app.clone());
            let spawned = spdk_rs::thread::spawn(&format!("penstock_{}", core.0), core, move || {
                let me = ThreadHandle::current().expect("a thread of ours");
                replier.reply(core::start(options).map(|waker| (me, waker)));
            });
            if let Err(errno) = spawned {
                tracing::error!(core = core.0, %errno, "a core's thread does not start");
                return spdk_rs::app::stop(1);
            }
        }
    }

    fn install_ports(self: &Rc<Self>, all: Vec<StartedCore>) {
        let peers: Vec<Peer> = all.iter().map(|(_, peer, _)| peer.clone()).collect();
        let mut handles = Vec::new();
        for (handle, peer, receiver) in all {
            let (index, peers) = (handle.index, peers.clone());
            let sent = handle.thread.send(move || core::port::install(index, peer.waker, receiver, peers));
            if sent.is_err() {
                return;
            }
            handles.push(handle);
        }
        *self.cores.borrow_mut() = handles;
        let node = self.clone();
        Target::open(self.config.vhost_dir(), self.config.vfio_user_dir(), move |result| match result {
            Ok(target) => {
                *node.target.borrow_mut() = Some(target);
                node.open_for_business();
            }
            Err(error) => {
                tracing::error!(%error, "the front doors do not open");
                spdk_rs::app::stop(1);
            }
        });
    }

    fn open_for_business(self: &Rc<Self>) {
        self.ready.set(true);
        let cores: Vec<u32> = self.cores.borrow().iter().map(|c| c.core).collect();
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            pid = std::process::id(),
            ?cores,
            socket = %self.config.rpc_socket().display(),
            "penstockd serves"
        );
        self.spread_peers();
        self.restore();
        let ready = self.on_ready.borrow_mut().take();
        if let Some(ready) = ready {
            ready(self);
        }
    }

    /// Lets hosts in: the doors of the last run are up, or have had their time.
    fn let_hosts_in(self: &Rc<Self>) {
        let Some(target) = self.target.borrow().clone() else { return };
        if self.listening.replace(true) {
            return;
        }
        target.open_gate();
        for address in &self.config.nvmf_listen {
            let listen = spdk_rs::nvmf::Listen::Tcp { address: address.ip(), port: address.port() };
            if let Err(error) = target.listen(&listen) {
                tracing::error!(%address, %error, "cannot listen");
                return spdk_rs::app::stop(1);
            }
        }
    }

    fn number(&self) -> u64 {
        let number = self.next_number.get();
        self.next_number.set(number + 1);
        number
    }

    fn next_drive_key(&self) -> DriveKey {
        let key = self.next_key.get();
        self.next_key.set(key + 1);
        DriveKey(key)
    }

    fn core(&self, index: CoreIndex) -> CoreHandle {
        self.cores.borrow()[usize::from(index.0)].clone()
    }

    /// Registers what happens when the answer with this token comes.
    fn continue_with<T: 'static>(&self, then: impl FnOnce(&Rc<Node>, T) + 'static) -> (u64, std::marker::PhantomData<T>) {
        let token = self.number();
        let continuation: Continuation = Box::new(move |node, value| match value.downcast::<T>() {
            Ok(value) => then(node, *value),
            Err(_) => unreachable!("a continuation gets the type that it was made for"),
        });
        self.continuations.borrow_mut().insert(token, continuation);
        (token, std::marker::PhantomData)
    }

    fn resolve(self: &Rc<Self>, token: u64, value: Box<dyn Any>) {
        let continuation = self.continuations.borrow_mut().remove(&token);
        if let Some(continuation) = continuation {
            continuation(self, value);
        }
    }

    /// Runs `f` on a core; `then` here when it has replied.
    fn ask_core<T: Send + 'static>(
        self: &Rc<Self>,
        index: CoreIndex,
        f: impl FnOnce(&mut Core, Replier<T>) + Send + 'static,
        then: impl FnOnce(&Rc<Node>, T) + 'static,
    ) {
        let app = spdk_rs::thread::app_thread().expect("on the app thread");
        let (token, _) = self.continue_with(then);
        let replier = Replier::new(token, app);
        if core::send(&self.core(index).thread, move |core| f(core, replier)).is_err() {
            // The app is going down; nobody waits any more.
            self.continuations.borrow_mut().remove(&token);
        }
    }

    /// Gives an order to a store; `then` here when it is done.
    fn order(
        self: &Rc<Self>,
        core: CoreIndex,
        drive: DriveKey,
        store: u32,
        order: Order,
        then: impl FnOnce(&Rc<Node>, Result<(), OrderError>) + 'static,
    ) {
        let id = OrderId(self.number());
        self.orders.borrow_mut().insert(id.0, Box::new(then));
        if core::send(&self.core(core).thread, move |core| core.order(drive, store, id, order)).is_err() {
            self.orders.borrow_mut().remove(&id.0);
        }
    }

    fn on_report(self: &Rc<Self>, report: Report) {
        match report {
            Report::OrderDone { id, result } => {
                let waiter = self.orders.borrow_mut().remove(&id.0);
                if let Some(waiter) = waiter {
                    waiter(self, result);
                }
            }
            Report::Serving { drive, store, report, ms } => self.on_store_serving(drive, store, report, ms),
            Report::OpenFailed { drive, store, why } => self.on_store_failed(drive, store, &why),
            Report::Fenced { drive, store, reason } => self.on_fenced(drive, store, reason),
            Report::Quarantined { drive, store, panic } => self.on_quarantined(drive, store, panic),
            Report::Replica { drive, store, core, slot, shape, is_member, gone } => {
                self.on_replica(Place { key: drive, store, core, slot }, shape, is_member, gone);
            }
            Report::Standing { core, slot, standing, is_barred } => {
                self.on_standing(core, slot, standing);
                if is_barred {
                    self.end_hosts(core, slot);
                }
            }
            Report::SteppingAside { core, slot, to } => self.on_stepping_aside(core, slot, to),
            Report::Recovered { core, slot, receipt } => self.on_recovered(core, slot, &receipt),
            Report::GroupStopped { core, slot, why } => self.on_group_stopped(core, slot, why),
            Report::Corrupt { drive, store, slot, block } => self.on_corrupt(drive, store, slot, block),
            Report::Differs { core, slot, block, mends } => self.on_differs(core, slot, block, mends),
            Report::ScrubDone { drive, store, blocks, corrupt } => {
                tracing::info!(drive = drive.0, store, blocks, corrupt, "scrub is done");
                self.on_scrub_done(drive, blocks, corrupt);
            }
            Report::Stopped { drive, store } => tracing::debug!(drive = drive.0, store, "a store stopped"),
        }
    }

    /// Binds the node to a cluster, or confirms it.
    fn claim(self: &Rc<Self>, cluster: ClusterId, node: NodeId) -> Result<(), RpcError> {
        let (of_cluster, of_node) = {
            let state = self.state.borrow();
            (state.get().cluster_id, state.get().node_id)
        };
        if let (Some(c), Some(n)) = (of_cluster, of_node) {
            if (c, n) == (cluster, node) {
                return Ok(());
            }
            let message = format!("this node is node {n} of cluster {c}, and cannot become node {node} of cluster {cluster}");
            return Err(fail(ErrorCode::Conflict, message, "use the control of its own cluster, or give penstockd a fresh --state-dir"));
        }
        self.remember(|state| {
            state.cluster_id = Some(cluster);
            state.node_id = Some(node);
        })?;
        // It may have been named peers before it knew whose it is.
        self.spread_peers();
        Ok(())
    }

    /// Changes the node's durable state.
    fn remember(&self, change: impl FnOnce(&mut crate::state::NodeState)) -> Result<(), RpcError> {
        self.state.borrow_mut().change(change).map_err(|error| {
            tracing::error!(%error, "the node's state cannot be kept");
            fail(ErrorCode::Internal, error.to_string(), "check the state directory's file system")
        })
    }
}

/// The way of a core's answer back to the app thread.
pub(crate) struct Replier<T> {
    token: u64,
    app: ThreadHandle,
    _answer: std::marker::PhantomData<fn(T)>,
}

impl<T: Send + 'static> Replier<T> {
    fn new(token: u64, app: ThreadHandle) -> Self {
        Self { token, app, _answer: std::marker::PhantomData }
    }

    pub(crate) fn reply(self, value: T) {
        let token = self.token;
        let sent = self.app.send(move || {
            if let Some(node) = current() {
                node.resolve(token, Box::new(value));
            }
        });
        if sent.is_err() {
            tracing::debug!("an answer came after the node had ended");
        }
    }
}
