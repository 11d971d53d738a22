//! Snapshots of volumes: a volume as it was at one entry of its log.
//!
//! Of a volume with several replicas, the node that leads takes and removes them (NotReady elsewhere), and every node with a replica shows
//! those that it has applied, in [`super::VolumeInfo`].

use serde::{Deserialize, Serialize};

use crate::id::{SegmentId, SnapshotId, VolumeId};
use crate::name::VolumeName;
use crate::size::ByteSize;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreateParams {
    pub volume_id: VolumeId,
    pub snapshot_id: SnapshotId,
    /// Of the same alphabet as a volume's. It stands in the marker, so that control's store can be rebuilt from drives.
    pub name: VolumeName,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotDeleteParams {
    pub volume_id: VolumeId,
    pub snapshot_id: SnapshotId,
}

/// The snapshot that a clone began as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Origin {
    pub volume_id: VolumeId,
    pub segment_id: SegmentId,
    pub snapshot_id: SnapshotId,
}

/// A snapshot, as one replica has it. Those that are removed and not merged away yet are not among them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SnapshotInfo {
    pub snapshot_id: SnapshotId,
    pub name: VolumeName,
    /// Entry of its marker in the volume's log.
    pub index: u64,
    /// Size of the volume as of the marker.
    pub size_bytes: ByteSize,
    /// Space on the drive of what was written between the marker before and this one: whole extents of 64 KiB.
    pub allocated_bytes: ByteSize,
}
