//! What a node was seen to hold, reduced to what reconciling needs. Lists, not events: each look is complete.

use std::collections::{BTreeMap, BTreeSet};

use penstock_api::id::Id;
use penstock_api::rpc::{
    BlockSize, Door, DriveInfo, DriveState, GroupInfo, NodeInfo, Origin, PeerAddress, SnapshotInfo, VolumeInfo, VolumeState,
};
use penstock_api::{ByteSize, ClusterId, DriveId, DriveSpec, NodeId, ReplicaId, SegmentId, SnapshotId, VolumeId, VolumeName};

/// One look at a node. The lists are of one moment: the node answers them without serving a change between.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    pub cluster_id: Option<ClusterId>,
    pub node_id: Option<NodeId>,
    /// The other nodes that it knows, in order.
    pub peers: Vec<PeerAddress>,
    /// Those of them that it hears.
    pub connected: BTreeSet<NodeId>,
    pub drives: BTreeMap<DriveId, ObservedDrive>,
    pub volumes: BTreeMap<VolumeId, ObservedVolume>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedDrive {
    pub spec: DriveSpec,
    pub state: DriveState,
    pub reason: Option<String>,
    pub volatile: bool,
    pub free: ByteSize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedVolume {
    pub segment_id: SegmentId,
    pub replica_id: ReplicaId,
    pub name: VolumeName,
    pub size: ByteSize,
    pub block_size: BlockSize,
    pub drive_id: DriveId,
    /// Space that it takes on its drive.
    pub allocated: ByteSize,
    pub state: VolumeState,
    pub reason: Option<String>,
    pub doors: BTreeSet<Door>,
    /// Oldest first.
    pub snapshots: Vec<ObservedSnapshot>,
    /// What it was made as a clone of.
    pub origin: Option<Origin>,
    pub connections: u32,
    pub group: Option<GroupInfo>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedSnapshot {
    pub snapshot_id: SnapshotId,
    pub name: VolumeName,
    /// Of the volume, as of then.
    pub size: ByteSize,
}

impl ObservedVolume {
    pub fn has_snapshot(&self, id: SnapshotId) -> bool {
        self.snapshots.iter().any(|there| there.snapshot_id == id)
    }

    /// Whether what only a leader takes is taken here.
    pub fn is_served(&self) -> bool {
        self.group.as_ref().is_none_or(|group| group.serves)
    }
}

/// Bytes of an extent (DESIGN 6).
const EXTENT_BYTES: u64 = 64 * 1024;

impl Observed {
    pub fn new(node: &NodeInfo, drives: &[DriveInfo], volumes: &[VolumeInfo]) -> Self {
        let mut peers: Vec<PeerAddress> =
            node.peers.iter().map(|peer| PeerAddress { node_id: peer.node_id, address: peer.address }).collect();
        peers.sort_by_key(|peer| peer.node_id);
        Self {
            cluster_id: node.cluster_id,
            node_id: node.node_id,
            peers,
            connected: node.peers.iter().filter(|peer| peer.connected).map(|peer| peer.node_id).collect(),
            drives: drives.iter().map(|drive| (drive.drive_id, ObservedDrive::from(drive))).collect(),
            volumes: volumes.iter().map(|volume| (volume.volume_id, ObservedVolume::from(volume))).collect(),
        }
    }

    /// Whether the drive's list of volumes is whole: an absent volume is really not there.
    pub fn is_serving(&self, drive_id: DriveId) -> bool {
        self.drives.get(&drive_id).is_some_and(|drive| drive.state == DriveState::Serving)
    }

    /// Every counted id that was seen.
    pub fn ids(&self) -> impl Iterator<Item = Id> + '_ {
        let drives = self.drives.keys().map(|id| id.0);
        let volumes = self.volumes.iter().flat_map(|(id, volume)| [id.0, volume.segment_id.0, volume.replica_id.0]);
        let snapshots = self.volumes.values().flat_map(|volume| volume.snapshots.iter().map(|seen| seen.snapshot_id.0));
        drives.chain(volumes).chain(snapshots)
    }
}

impl From<&DriveInfo> for ObservedDrive {
    fn from(drive: &DriveInfo) -> Self {
        let extents_free: u64 = drive.stores.iter().map(|store| store.extents_free).sum();
        Self {
            spec: drive.spec.clone(),
            state: drive.state,
            reason: drive.reason.clone(),
            volatile: drive.volatile,
            free: ByteSize(extents_free.saturating_mul(EXTENT_BYTES)),
        }
    }
}

impl From<&SnapshotInfo> for ObservedSnapshot {
    fn from(snapshot: &SnapshotInfo) -> Self {
        Self { snapshot_id: snapshot.snapshot_id, name: snapshot.name.clone(), size: snapshot.size_bytes }
    }
}

impl From<&VolumeInfo> for ObservedVolume {
    fn from(volume: &VolumeInfo) -> Self {
        Self {
            segment_id: volume.segment_id,
            replica_id: volume.replica_id,
            name: volume.name.clone(),
            size: volume.size_bytes,
            block_size: volume.block_size,
            drive_id: volume.drive_id,
            allocated: volume.allocated_bytes,
            state: volume.state,
            reason: volume.reason.clone(),
            doors: volume.exports.iter().map(|export| export.door.clone()).collect(),
            snapshots: volume.snapshots.iter().map(ObservedSnapshot::from).collect(),
            origin: volume.origin,
            connections: volume.connections,
            group: volume.group.clone(),
        }
    }
}
