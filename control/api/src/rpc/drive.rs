//! Drives: probing, adding, listing, scrubbing, draining.

use serde::{Deserialize, Serialize};

use crate::drive::DriveSpec;
use crate::id::{ClusterId, DriveId, NodeId, VolumeId};
use crate::size::ByteSize;

/// What every drive of ours says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DriveLabel {
    pub cluster_id: ClusterId,
    pub node_id: NodeId,
    pub drive_id: DriveId,
    /// How often the drive was opened for writing.
    pub incarnation: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveProbeParams {
    pub spec: DriveSpec,
}

/// What lies on a drive. Nothing is written to find out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DriveProbeInfo {
    /// 0 for a file that does not exist yet and is named without a size.
    pub size: ByteSize,
    pub content: DriveContent,
    pub barrier: Barrier,
    /// Everything on it is gone with the process.
    pub volatile: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum DriveContent {
    Blank,
    Ours {
        label: DriveLabel,
    },
    Foreign {
        /// What it is, as a person would say: `ext4 file system`, `GPT partition table`, `unknown data`.
        what: String,
        /// Byte offset where it was seen.
        #[serde(rename = "where")]
        at: ByteSize,
    },
}

/// How the drive makes writes durable: what it is used with, when it is probed as when it is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Barrier {
    /// A flush reaches it.
    Flush,
    /// It has no volatile cache; or no flush reaches it, and it was declared power-safe or is volatile.
    NoneNeeded,
    /// It has a cache and no flush: refused unless declared power-safe.
    Missing,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveAddParams {
    pub spec: DriveSpec,
    pub drive_id: DriveId,
    pub cluster_id: ClusterId,
    pub node_id: NodeId,
    /// Only looked at when formatting; more particular than the spec's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stores: Option<u16>,
    /// Bytes of oplog per store; only looked at when formatting. The node chooses by size if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oplog_bytes: Option<ByteSize>,
    /// Destroys foreign data, or another cluster's.
    #[serde(default)]
    pub force: bool,
    /// Only open a drive that carries this very label; a blank one is NotFound and is not formatted. Control sets it
    /// for drives that held data before, so that a disk swapped for an empty one never passes for the old one.
    #[serde(default)]
    pub open_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveRemoveParams {
    pub drive_id: DriveId,
    /// Detach though volumes live on it. Nothing is erased.
    #[serde(default)]
    pub force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveClearFenceParams {
    pub drive_id: DriveId,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DriveInfo {
    pub drive_id: DriveId,
    pub spec: DriveSpec,
    pub size: ByteSize,
    pub state: DriveState,
    /// Why, in every state but `serving`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub incarnation: u64,
    pub barrier: Barrier,
    pub volatile: bool,
    pub stores: Vec<StoreInfo>,
    pub counters: DriveCounters,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum DriveState {
    Opening,
    Serving,
    /// A flush failed; no writes until an operator clears it.
    Fenced,
    /// A store of it fell, by a fault of penstockd's own, and is not run until an operator clears it; its other stores serve.
    Quarantined,
    /// It was there and is gone.
    Missing,
}

/// One core's share of one drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StoreInfo {
    pub store: u16,
    pub core: u32,
    /// What it said when it fell; it is not run any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarantined: Option<String>,
    pub oplog_bytes: ByteSize,
    pub oplog_used: ByteSize,
    pub undrained_bytes: ByteSize,
    /// Extents are 64 KiB.
    pub extents_total: u64,
    pub extents_free: u64,
    /// What opening it took; absent while it is opening.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<RecoveryInfo>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RecoveryInfo {
    pub entries: u64,
    pub bytes: ByteSize,
    pub ms: u64,
    /// Blocks that were acknowledged and cannot be read back.
    pub lost_blocks: u64,
    /// Batches at the end of the stream that were never acknowledged and did not survive.
    pub dropped_batches: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DriveCounters {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub read_errors: u64,
    pub write_errors: u64,
    pub flush_errors: u64,
    pub checksum_errors: u64,
    /// Blocks that were bad here and that another replica's node gave back.
    pub repaired_blocks: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubParams {
    pub drive_id: DriveId,
    pub action: ScrubAction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ScrubAction {
    Start,
    Stop,
    Status,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ScrubInfo {
    pub drive_id: DriveId,
    pub running: bool,
    /// Of the pass that runs, or of the last one.
    pub extents_done: u64,
    pub extents_total: u64,
    pub blocks_verified: u64,
    pub blocks_bad: u64,
    pub passes: u64,
    /// Volumes that hold bad blocks.
    #[serde(default)]
    pub volumes_bad: Vec<VolumeId>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainParams {
    /// All drives if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drive_id: Option<DriveId>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DrainInfo {
    pub drained_bytes: ByteSize,
    pub ms: u64,
}
