//! Volumes from inside the process: for penstock-perf, which measures the engine and its loop without a door before them.
//!
//! [`run`] starts SPDK and a node on one drive, makes a volume, and calls back on the volume's home core. There the caller registers
//! a poller, submits through [`Volume`] and reaps. Not here: anything that hosts use.

use std::path::PathBuf;
use std::rc::Rc;

use penstock_api::id::{CLUSTER_MAX, ClusterTag, Id, IdParts, Incarnation, NodeNumber, Sequence};
use penstock_api::rpc::{BlockSize, DriveAddParams, DriveInfo, RpcError, VolumeCreateParams};
use penstock_api::{ByteSize, ClusterId, DriveId, DriveSpec, NodeId, ReplicaId, SegmentId, VolumeId, VolumeName};

use crate::config::Config;
use crate::core::{self, VolumeSlot};
use crate::node::{self, Node};
use crate::run::{RunError, launch};

pub use crate::core::{LocalDone, LocalIo};
pub use crate::status::NvmeStatus;
pub use penstock_engine::{HostOp, Span};
pub use spdk_rs::dma::DmaBuf;
pub use spdk_rs::lend::LendBuf;
pub use spdk_rs::thread::{Activity, Poller};

/// What to run on.
#[derive(Clone, Debug)]
pub struct Options {
    /// Cores, polling, memory, log; its run and state directories must exist for this process alone.
    pub config: Config,
    /// Formatted if blank.
    pub drive: DriveSpec,
    /// Bytes of oplog per store; by the drive's size if `None`.
    pub oplog_bytes: Option<u64>,
    /// Bytes, a multiple of 4096.
    pub volume_bytes: u64,
    pub block_size: BlockSize,
}

impl Options {
    /// One busy core, no hugepages, a scratch directory for sockets and state.
    pub fn new(drive: DriveSpec, scratch: PathBuf) -> Self {
        let config = Config {
            run_dir: scratch.join("run"),
            state_dir: scratch.join("state"),
            no_huge: true,
            mem_mib: Some(1024),
            ..Config::default()
        };
        Self { config, drive, oplog_bytes: None, volume_bytes: 1 << 30, block_size: BlockSize::B4096 }
    }
}

/// A volume, on its home core.
#[derive(Clone, Copy, Debug)]
pub struct Volume {
    slot: VolumeSlot,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub block_size: u32,
}

impl Volume {
    /// Hands a command to the loop, which takes it in its next turn. The buffer's first bytes are the payload: as many as the span has,
    /// twice that for compare-and-write. On the home core, outside of the loop's own turn (a poller's closure is).
    pub fn submit(&self, op: HostOp, buf: Option<LendBuf>, tag: u64) {
        core::with(|core| core.submit_local(LocalIo { slot: self.slot, op, buf, tag })).expect("volumes are used on their home core");
    }

    /// Moves what was answered on this core to `out`.
    pub fn reap(&self, out: &mut Vec<LocalDone>) {
        core::with(|core| core.take_local_done(out));
    }
}

/// Buffers that commands may carry, 4 KiB aligned, each of `len` bytes (a multiple of 4096).
///
/// # Errors
/// When memory is out.
pub fn buffers(count: usize, len: usize) -> Result<Vec<LendBuf>, spdk_rs::Errno> {
    Ok(LendBuf::carve(DmaBuf::zeroed(count * len)?, len))
}

/// Starts everything and blocks until [`stop`]. `ready` runs on the volume's home core, or with an error on the app thread.
///
/// # Errors
/// When SPDK or the node does not start.
pub fn run(options: Options, ready: impl FnOnce(Result<Volume, String>) + Send + 'static) -> Result<(), RunError> {
    let Options { config, drive, oplog_bytes, volume_bytes, block_size } = options;
    launch(
        config,
        Box::new(move |node: &Rc<Node>| {
            let tag = ClusterTag::new(node::run_number() & CLUSTER_MAX).expect("masked");
            let id = |sequence| {
                Id::from_parts(IdParts {
                    cluster: tag,
                    node: NodeNumber::new(1).expect("in range"),
                    incarnation: Incarnation::FIRST,
                    sequence: Sequence::new(sequence).expect("in range"),
                })
            };
            let drive_id = DriveId(id(1));
            let add = DriveAddParams {
                spec: drive,
                drive_id,
                cluster_id: ClusterId::of(tag),
                node_id: NodeId::of(tag, NodeNumber::new(1).expect("in range")),
                stores: None,
                oplog_bytes: oplog_bytes.map(ByteSize),
                force: false,
                open_only: false,
            };
            let create = VolumeCreateParams {
                volume_id: VolumeId(id(2)),
                segment_id: SegmentId(id(3)),
                replica_id: ReplicaId(id(4)),
                name: "perf".parse::<VolumeName>().expect("a valid name"),
                size_bytes: ByteSize(volume_bytes),
                block_size,
                drive_id,
                origin: None,
            };
            let node_again = node.clone();
            let added = move |result: Result<DriveInfo, RpcError>| match result {
                Ok(_) => node_again.clone().make_local(create, ready),
                Err(error) => ready(Err(explain(&error))),
            };
            node.drive_add(add, Box::new(added));
        }),
    )
}

pub(crate) fn explain(error: &RpcError) -> String {
    match error.hint() {
        Some(hint) => format!("{}. {hint}", error.message),
        None => error.message.clone(),
    }
}

impl Volume {
    pub(crate) fn new(slot: VolumeSlot, size: u64, block_size: u32) -> Self {
        Self { slot, size, block_size }
    }
}

/// Ends what [`run`] started: drains, closes, and lets it return. From any SPDK thread.
pub fn stop() {
    if let Some(app) = spdk_rs::thread::app_thread() {
        let sent = app.send(|| {
            if let Some(node) = node::current() {
                node.stop("the caller's request");
            }
        });
        if sent.is_err() {
            tracing::debug!("the node had ended already");
        }
    }
}
