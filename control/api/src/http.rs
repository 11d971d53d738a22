//! Bodies of penstock-control's HTTP API, `/v1/…`. The paths are in [`path`].
//!
//! Bodies refuse unknown fields; answers may grow fields, and clients ignore those they do not know. Not here:
//! handlers, status codes' choice (control/server), rendering (control/cli).

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::drive::DriveSpec;
use crate::id::{ClusterId, DriveId, Id, NodeId, ReplicaId, SegmentId, SnapshotId, VolumeId};
use crate::name::{NodeName, VolumeName};
use crate::rpc::{
    BlockSize, Door, DriveInfo, ErrorCode, ExportInfo, GroupPart, NodeInfo, RecoveryReceipt, ScrubAction, SnapshotInfo, VolumeInfo,
};
use crate::size::ByteSize;

/// Most bytes of a request's body.
pub const BODY_BYTES_MAX: usize = 64 * 1024;
/// Most ids that one call issues.
pub const IDS_MAX: u32 = 10_000;

/// Paths of the API. `{}` parts are a volume's name or id, or a drive's id.
pub mod path {
    /// The only node, where there is one.
    pub const NODE: &str = "/v1/node";
    pub const NODES: &str = "/v1/nodes";
    pub const DRIVES: &str = "/v1/pool/drives";
    pub const IMPORT: &str = "/v1/pool/import";
    pub const VOLUMES: &str = "/v1/volumes";
    pub const IDS: &str = "/v1/ids";
    pub const DRAIN: &str = "/v1/drain";
    pub const OPENAPI: &str = "/openapi.json";
    pub const METRICS: &str = "/metrics";
    pub const HEALTH: &str = "/healthz";

    /// `node` is a name or id.
    pub fn node(node: &str) -> String {
        format!("{NODES}/{node}")
    }
    pub fn drive(drive: super::DriveId) -> String {
        format!("{DRIVES}/{drive}")
    }
    pub fn scrub(drive: super::DriveId) -> String {
        format!("{DRIVES}/{drive}/scrub")
    }
    pub fn clear_fence(drive: super::DriveId) -> String {
        format!("{DRIVES}/{drive}/clear-fence")
    }
    /// `volume` is a name or id: neither holds a character that a path must escape.
    pub fn volume(volume: &str) -> String {
        format!("{VOLUMES}/{volume}")
    }
    pub fn export(volume: &str) -> String {
        format!("{VOLUMES}/{volume}/export")
    }
    pub fn unexport(volume: &str) -> String {
        format!("{VOLUMES}/{volume}/unexport")
    }
    pub fn transfer(volume: &str) -> String {
        format!("{VOLUMES}/{volume}/transfer")
    }
    pub fn snapshots(volume: &str) -> String {
        format!("{VOLUMES}/{volume}/snapshots")
    }
    /// `snapshot` is a name or id.
    pub fn snapshot(volume: &str, snapshot: &str) -> String {
        format!("{VOLUMES}/{volume}/snapshots/{snapshot}")
    }
    /// What is asked of a volume's replicas: `move`, `replace`, `give-up` or `recover`.
    pub fn replicas(volume: &str, what: &str) -> String {
        format!("{VOLUMES}/{volume}/replicas/{what}")
    }
}

/// Every answer that is not 2xx.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ApiError {
    pub code: ErrorCode,
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ApiError {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// How far what is desired has come to be observed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Progress {
    /// Observed and desired agree.
    Settled,
    /// On its way; `reason` says what is waited for.
    Pending { reason: String },
    /// The node refuses; `message` and `hint` are its own. Tried again when something changes.
    Refused {
        code: ErrorCode,
        message: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
    /// Being taken away.
    Removing { reason: String },
}

impl Progress {
    pub fn is_settled(&self) -> bool {
        matches!(self, Self::Settled)
    }
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Settled => "ok",
            Self::Pending { .. } => "pending",
            Self::Refused { .. } => "refused",
            Self::Removing { .. } => "removing",
        }
    }
}

/// `GET /v1/node` and `GET /v1/nodes/{node}`: one node, as control desires and sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NodeView {
    pub name: NodeName,
    /// Control's own; absent until the first drive is added or imported.
    #[serde(default)]
    pub cluster_id: Option<ClusterId>,
    /// Absent until the node is needed for something.
    #[serde(default)]
    pub node_id: Option<NodeId>,
    /// Where the other nodes reach it, and hosts over NVMe/TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, example = "10.0.0.1:7700"))]
    pub peer_address: Option<SocketAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, example = "10.0.0.1:4420"))]
    pub nvmf_address: Option<SocketAddr>,
    pub control_version: String,
    pub control_pid: u32,
    pub control_uptime_s: u64,
    /// Whether penstockd answered last time.
    pub reachable: bool,
    /// Why not, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreachable_reason: Option<String>,
    /// As last seen, which is now if `reachable`.
    #[serde(default)]
    pub node: Option<NodeInfo>,
    /// Whether everything desired of this node is observed.
    pub settled: bool,
    /// What is not, one line each.
    #[serde(default)]
    pub unsettled: Vec<String>,
}

/// `POST /v1/pool/drives`. Answers a [`DriveView`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DriveAddBody {
    pub spec: DriveSpec,
    /// Name or id; the only one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Accept a drive whose content is gone with the process.
    #[serde(default)]
    pub volatile: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stores: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oplog_bytes: Option<ByteSize>,
    /// Destroy foreign data.
    #[serde(default)]
    pub force: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DriveView {
    pub drive_id: DriveId,
    pub node_id: NodeId,
    /// The node's name, or its id where it has none here.
    pub node: String,
    pub spec: DriveSpec,
    pub volatile: bool,
    pub progress: Progress,
    /// Names of the volumes that live on it.
    pub volumes: Vec<VolumeName>,
    /// As last observed.
    #[serde(default)]
    pub observed: Option<DriveInfo>,
}

/// `POST /v1/pool/import`: learn drives and volumes from the drives' own labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ImportBody {
    /// Drives to open first. Those that the nodes have open already are imported without being named.
    #[serde(default)]
    pub specs: Vec<DriveSpec>,
    /// The node whose drives they are, by name or id; the only one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Also take up the doors that the nodes serve now.
    #[serde(default = "yes")]
    pub exports: bool,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ImportReport {
    pub cluster_id: ClusterId,
    pub node_id: NodeId,
    pub drives: Vec<DriveId>,
    pub volumes: Vec<VolumeName>,
    pub exports: u32,
    /// What was already known and so left as it was.
    pub known: u32,
    /// Volumes that took another name because theirs was taken: `old -> new`.
    #[serde(default)]
    pub renamed: Vec<String>,
}

/// What became of `DELETE /v1/nodes/{node}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NodeRemovedView {
    pub node_id: NodeId,
    pub name: NodeName,
    /// Volumes whose replica there is replaced on another node; `change` of each says how far it is.
    pub replaced: Vec<VolumeName>,
}

/// `POST /v1/volumes`. Answers 201 with a [`VolumeView`] when the volume is observed, 202 while the node is away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VolumeCreateBody {
    pub name: VolumeName,
    /// Bytes, or text such as `10GiB`. A multiple of 4096. Only a clone needs none: it has the snapshot's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// 4096 if absent; a clone has its origin's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<BlockSize>,
    /// With data: 1, 3 or 5, each on another node; or 2 beside one that keeps the log alone. One if absent; for a clone as its origin has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u8>,
    /// Beside these, replicas that keep the log alone: they count in majorities, take no space, and serve no host. 0, or 1 with `replicas` 2.
    #[serde(default)]
    pub log_only: u8,
    /// One for each replica, of distinct nodes, last of all for those that keep the log alone; those with the most free space if none is named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drive_ids: Vec<DriveId>,
    /// It is to be a clone: to begin as this snapshot, where that volume's replicas are, and to share what neither overwrites.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<SnapshotName>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SnapshotName {
    /// Name or id.
    pub volume: String,
    pub snapshot: String,
}

/// The snapshot that a clone began as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct OriginView {
    pub volume_id: VolumeId,
    /// Names, or ids of what has none here.
    pub volume: String,
    pub snapshot_id: SnapshotId,
    pub snapshot: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VolumeView {
    pub volume_id: VolumeId,
    pub segment_id: SegmentId,
    pub name: VolumeName,
    /// Desired.
    pub size: ByteSize,
    pub block_size: BlockSize,
    /// Of a clone. It goes before that snapshot and that volume do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<OriginView>,
    pub progress: Progress,
    pub replicas: Vec<ReplicaView>,
    /// How many more replicas may be lost, whichever they are, and the volume goes on; absent for a volume with one, or while nobody leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spare: Option<u8>,
    /// One replica takes the place of another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<ChangeView>,
    pub exports: Vec<ExportView>,
    /// Oldest first.
    #[serde(default)]
    pub snapshots: Vec<SnapshotView>,
    /// As last observed where it is served: at the only replica, or at the one that leads.
    #[serde(default)]
    pub observed: Option<VolumeInfo>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReplicaView {
    pub replica_id: ReplicaId,
    /// Its number in the group, from 1.
    pub member: u64,
    pub node_id: NodeId,
    /// The node's name, or its id where it has none here.
    pub node: String,
    pub drive_id: DriveId,
    /// It keeps the log alone, and no data.
    #[serde(default)]
    pub log_only: bool,
    pub progress: Progress,
    /// Whether its node answered last time; what follows is as last observed.
    pub reachable: bool,
    /// Absent for the replica of a volume that has one alone.
    #[serde(default)]
    pub part: Option<GroupPart>,
    #[serde(default)]
    pub term: Option<u64>,
    /// Index of the last entry that was applied.
    #[serde(default)]
    pub applied: Option<u64>,
    /// Entries that the leader has committed and this one has not applied; the two were not looked at in the same moment.
    #[serde(default)]
    pub lag: Option<u64>,
    /// While its data are copied from another: whole per cent that are done, and blocks of 4 KiB to go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebuilt_percent: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks_to_copy: Option<u64>,
    #[serde(default)]
    pub observed: Option<VolumeInfo>,
}

/// `POST /v1/volumes/{volume}/replicas/recover`: a majority of the replicas is lost for good, and one that is left goes on alone. Answers a
/// [`RecoveryView`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReplicaRecoverBody {
    /// The node whose replica goes on; needed where several are left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Without it nothing is done, and the answer says what would be.
    #[serde(default)]
    pub force: bool,
    /// Though what that replica has is itself in question.
    #[serde(default)]
    pub regardless: bool,
}

/// What a recovery by force does, or, with a receipt, did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RecoveryView {
    pub volume_id: VolumeId,
    pub name: VolumeName,
    /// Whose replica goes on.
    pub node_id: NodeId,
    pub node: String,
    /// It does so already.
    pub done: bool,
    /// As they were when it was asked for.
    pub replicas: Vec<LeftView>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<RecoveryReceipt>,
}

/// What is left of a replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LeftView {
    pub member: u64,
    pub node_id: NodeId,
    pub node: String,
    /// Absent where it is not there, like what follows.
    #[serde(default)]
    pub part: Option<GroupPart>,
    /// Index of the last entry that it has.
    #[serde(default)]
    pub last: Option<u64>,
    #[serde(default)]
    pub committed: Option<u64>,
    /// Why it is not there, or takes no part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A replica that takes the place of another: their numbers, and where they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ChangeView {
    pub from: u64,
    pub from_node: String,
    pub to: u64,
    pub to_node: String,
    /// Taken back: the one that comes goes again.
    pub given_up: bool,
    pub progress: Progress,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExportView {
    pub node_id: NodeId,
    /// The node's name, or its id where it has none here.
    pub node: String,
    pub door: Door,
    pub progress: Progress,
    #[serde(default)]
    pub observed: Option<ExportInfo>,
}

/// `POST /v1/volumes/{volume}/snapshots`. Answers 201 with a [`SnapshotView`] when it is taken. Taken in but not done (202), it is taken as soon as the
/// volume is served, and is of that moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SnapshotCreateBody {
    /// No other snapshot of the volume has it.
    pub name: VolumeName,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SnapshotView {
    pub snapshot_id: SnapshotId,
    pub name: VolumeName,
    /// Volumes that are clones of it: it stays as long as they do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clones: Vec<VolumeName>,
    pub progress: Progress,
    /// As last observed where the volume is served.
    #[serde(default)]
    pub observed: Option<SnapshotInfo>,
}

/// `PATCH /v1/volumes/{volume}`. Answers a [`VolumeView`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VolumeResizeBody {
    pub size: ByteSize,
    #[serde(default)]
    pub allow_shrink: bool,
}

/// Query of `DELETE` on a drive or volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForceQuery {
    #[serde(default)]
    pub force: bool,
}

/// `POST /v1/volumes/{volume}/export`. Answers a list of [`ExportView`], one for each node. Idempotent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExportBody {
    /// `nvmf` with address 0.0.0.0 and port 0 means each node's own address.
    pub door: Door,
    /// On this node alone, by name or id; on every node with a replica if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// `POST /v1/volumes/{volume}/transfer`. Answers a [`VolumeView`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TransferBody {
    /// The node that is to lead, by name or id.
    pub to: String,
}

/// `POST /v1/volumes/{volume}/replicas/move`. Answers a [`VolumeView`]. Idempotent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReplicaMoveBody {
    /// Nodes, by name or id.
    pub from: String,
    pub to: String,
    /// The one with the most room of the node if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drive_id: Option<DriveId>,
}

/// `POST /v1/volumes/{volume}/replicas/replace`. Answers a [`VolumeView`]. Idempotent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReplicaReplaceBody {
    /// Node of the replica that is given up, by name or id.
    pub node: String,
    /// Node of the new one, by name or id; the same if it can, else the one with the most room, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drive_id: Option<DriveId>,
}

/// `POST /v1/volumes/{volume}/unexport`. Answers a list of [`ExportView`] while any is still open. Idempotent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct UnexportBody {
    pub door: Door,
    /// On this node alone, by name or id; wherever it is open if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Though hosts are connected.
    #[serde(default)]
    pub force: bool,
}

/// `POST /v1/pool/drives/{drive}/scrub`. Answers [`crate::rpc::ScrubInfo`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ScrubBody {
    pub action: ScrubAction,
}

/// `POST /v1/drain`. Answers [`crate::rpc::DrainInfo`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DrainBody {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drive_id: Option<DriveId>,
}

/// `POST /v1/ids`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct IdsBody {
    /// 1 to [`IDS_MAX`].
    #[serde(default = "one")]
    pub count: u32,
}

fn one() -> u32 {
    1
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct IdsView {
    pub ids: Vec<Id>,
}
