//! Volumes and the doors they are exported through.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{GroupInfo, Origin, SnapshotInfo};
use crate::id::{DriveId, ReplicaId, SegmentId, VolumeId};
use crate::name::{Nqn, VolumeName};
use crate::size::ByteSize;

/// The logical block a volume shows its hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum BlockSize {
    B512,
    #[default]
    B4096,
}

impl BlockSize {
    pub const fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = String;
    fn try_from(bytes: u32) -> Result<Self, String> {
        match bytes {
            512 => Ok(Self::B512),
            4096 => Ok(Self::B4096),
            other => Err(format!("block size {other} is not offered: use 512 or 4096")),
        }
    }
}

impl From<BlockSize> for u32 {
    fn from(size: BlockSize) -> u32 {
        size.bytes()
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeCreateParams {
    pub volume_id: VolumeId,
    pub segment_id: SegmentId,
    pub replica_id: ReplicaId,
    pub name: VolumeName,
    /// A multiple of 4096, more than 0.
    pub size_bytes: ByteSize,
    pub block_size: BlockSize,
    pub drive_id: DriveId,
    /// It is a clone: it begins as this snapshot, whose volume has a replica on that drive, is of that block size and no smaller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeDeleteParams {
    pub volume_id: VolumeId,
    /// Though it is exported or in use.
    #[serde(default)]
    pub force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeResizeParams {
    pub volume_id: VolumeId,
    pub size_bytes: ByteSize,
    /// Without it a smaller size is Invalid: what lies beyond is lost.
    #[serde(default)]
    pub allow_shrink: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VolumeInfo {
    pub volume_id: VolumeId,
    pub segment_id: SegmentId,
    pub replica_id: ReplicaId,
    pub name: VolumeName,
    pub size_bytes: ByteSize,
    pub block_size: BlockSize,
    pub drive_id: DriveId,
    /// Of a clone: what the replica on this node stands on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    pub core: u32,
    pub state: VolumeState,
    /// Why, in every state but `serving`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Space on its drive: whole extents of 64 KiB.
    pub allocated_bytes: ByteSize,
    /// What was written and lies in the oplog alone yet.
    pub undrained_bytes: ByteSize,
    #[serde(default)]
    pub exports: Vec<ExportInfo>,
    /// Oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    /// Hosts connected over all doors.
    pub connections: u32,
    pub counters: VolumeCounters,
    pub latency: VolumeLatency,
    /// Of a volume with several replicas: how the one on this node stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupInfo>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum VolumeState {
    Opening,
    Serving,
    /// Its drive is fenced or missing.
    Unavailable,
    Deleting,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VolumeCounters {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub write_zeroes: u64,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub errors: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VolumeLatency {
    pub read: LatencyInfo,
    pub write: LatencyInfo,
}

/// Of the I/O since the volume was opened, submit to completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LatencyInfo {
    pub p50_us: u64,
    pub p99_us: u64,
    pub p999_us: u64,
    pub max_us: u64,
}

/// A way for hosts to reach a volume. Absent names and NQNs are chosen by the node from the volume's name or id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Door {
    /// NVMe over TCP.
    Nvmf {
        #[cfg_attr(feature = "openapi", schema(value_type = String, example = "127.0.0.1"))]
        address: IpAddr,
        port: u16,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nqn: Option<Nqn>,
    },
    /// vhost-user-blk, a socket in the run dir's `vhost/`.
    Vhost {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<VolumeName>,
    },
    /// NVMe over vfio-user, a directory in the run dir's `vfio-user/`.
    VfioUser {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<VolumeName>,
    },
    /// A bdev in the data plane's own process, for what runs in there: benchmarks, and front ends of SPDK that Penstock does not
    /// set up itself. Its user must leave a command's memory alone until the command is completed.
    Local,
}

impl Door {
    /// NVMe over TCP at the node's own address, whatever that is: for control alone, a node is told a real one.
    pub const NVMF_ANYWHERE: Self = Self::Nvmf { address: IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), port: 0, nqn: None };

    pub const fn kind_word(&self) -> &'static str {
        match self {
            Self::Nvmf { .. } => "nvmf",
            Self::Vhost { .. } => "vhost",
            Self::VfioUser { .. } => "vfio-user",
            Self::Local => "local",
        }
    }
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nvmf { address, port, .. } => {
                write!(f, "nvmf={}", std::net::SocketAddr::new(*address, *port))
            }
            Self::Vhost { name } | Self::VfioUser { name } => match name {
                Some(name) => write!(f, "{}={name}", self.kind_word()),
                None => f.write_str(self.kind_word()),
            },
            Self::Local => f.write_str(self.kind_word()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportAddParams {
    pub volume_id: VolumeId,
    pub door: Door,
    /// Ids of NVMe controllers that this node may give for this volume; all if absent. Nodes that export the same volume have ranges that do
    /// not meet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controllers: Option<ControllerRange>,
}

/// Controller ids (NVMe's CNTLID) from `first` to `last`, both in 1 to 0xFFEF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ControllerRange {
    pub first: u16,
    pub last: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportRemoveParams {
    pub volume_id: VolumeId,
    pub door: Door,
    /// Though hosts are connected.
    #[serde(default)]
    pub force: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ExportInfo {
    /// Exactly as asked for: what the node chose itself is in the fields below, so that asked and served compare equal.
    pub door: Door,
    /// `127.0.0.1:4420`, the path of the socket or directory, or the name of the bdev.
    pub address: String,
    /// For doors that speak NVMe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nqn: Option<Nqn>,
    /// Host NQNs, or a count of sessions rendered as text for doors without host names.
    #[serde(default)]
    pub connected_hosts: Vec<String>,
}
