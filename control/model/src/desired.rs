//! What is desired: control's durable state, a set of records that each stand alone.
//!
//! Things to be taken away stay as records in phase `Removing` until they are observed gone, so that a crash at any
//! moment leaves either the wish or its fulfilment. Permissions that destroy (`force`, `allow_shrink`) are part of
//! one wish and end with it. Not here: who may change it how (change), what follows from it (reconcile).

use core::net::SocketAddr;
use std::collections::BTreeMap;

use penstock_api::rpc::{BlockSize, ControllerRange, Door, GroupMember, GroupMembers, MemberRole, Origin, PeerAddress};
use penstock_api::{ByteSize, DriveId, DriveSpec, NodeId, NodeName, ReplicaId, SegmentId, SnapshotId, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

use crate::issuer::Identity;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Absent until the first drive is added or imported, or the first id issued.
    pub identity: Option<Identity>,
    pub nodes: BTreeMap<NodeId, DesiredNode>,
    pub drives: BTreeMap<DriveId, DesiredDrive>,
    pub volumes: BTreeMap<VolumeId, DesiredVolume>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Present,
    Removing { force: bool },
}

impl Phase {
    pub fn is_present(self) -> bool {
        self == Self::Present
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredNode {
    pub name: NodeName,
    /// Where the other nodes reach it.
    pub peer: Option<SocketAddr>,
    /// Where hosts reach it over NVMe/TCP, unless a door says otherwise.
    pub nvmf: Option<SocketAddr>,
    /// It was given up. Its number is never another's, and the others go on to tell it so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gone: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredDrive {
    pub node_id: NodeId,
    pub spec: DriveSpec,
    pub phase: Phase,
    pub volatile: bool,
    pub stores: Option<u16>,
    pub oplog_bytes: Option<ByteSize>,
    /// Permission to format over foreign data. Ends when the drive is made.
    pub force: bool,
    /// It was seen serving: from then on it is opened and never formatted again (unless it is volatile).
    pub made: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredVolume {
    pub name: VolumeName,
    pub segment_id: SegmentId,
    pub size: ByteSize,
    /// Permission to cut off what lies beyond `size`. Ends when the size is reached.
    pub allow_shrink: bool,
    pub block_size: BlockSize,
    /// On distinct nodes, in order of member number. Those of a volume that is going away leave one by one.
    pub replicas: Vec<DesiredReplica>,
    /// Absent for a volume that was made with one replica, which has no group.
    pub group: Option<DesiredGroup>,
    /// One replica takes the place of another.
    pub change: Option<Box<DesiredChange>>,
    pub phase: Phase,
    pub doors: Vec<DesiredDoor>,
    /// It was made as a clone of this snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Box<Origin>>,
    /// In the order in which they were asked for, each of another name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<DesiredSnapshot>,
}

/// What a volume with several replicas has beside them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredGroup {
    /// As its members were first made: what each of them is told, whenever it is made. What changed since comes to it by the group's log.
    pub first: GroupMembers,
    pub first_size: ByteSize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredReplica {
    /// Its number in the group, from 1.
    pub member: u64,
    pub replica_id: ReplicaId,
    pub node_id: NodeId,
    pub drive_id: DriveId,
    /// It was seen: if it is absent later, it was lost, and an empty one must not take its place.
    pub made: bool,
    /// Which of the sixteenths of NVMe's controller ids its doors give.
    pub share: u8,
    /// What it is told as its group's members when it is made, where it is none of the first.
    pub joins: Option<GroupMembers>,
    /// It keeps its group's log and no data.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub log_only: bool,
    /// The group has it no more: its node deletes what is there of it, and then it is forgotten.
    pub left: bool,
}

/// The number of no member.
pub const NOBODY: u64 = 0;

/// One replica takes the place of another. What is done next follows from this and from the members that the node that leads shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredChange {
    pub why: ChangeReason,
    /// Numbers of the member that goes and of the one that comes.
    pub from: u64,
    pub to: u64,
    /// The one that comes, while the one that goes is still on its node: a node has one replica of a volume.
    pub waits: Option<DesiredReplica>,
    /// What the one that comes must have applied, and whether it was seen to have.
    pub reach: Option<Reach>,
    /// Given up: the one that comes goes again.
    pub is_off: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeReason {
    /// The one that goes counts until the other one does.
    Move,
    /// The one that goes is of no use: it stops to count before the other one begins to, so that nobody has to wait for it.
    Replace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reach {
    pub index: u64,
    pub is_reached: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredDoor {
    pub node_id: NodeId,
    /// With a real address: where it says none when it is asked for, the node's own is put in.
    pub door: Door,
    pub phase: Phase,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredSnapshot {
    pub snapshot_id: SnapshotId,
    pub name: VolumeName,
    pub phase: Phase,
    /// It was seen: if it is absent later it was lost, and one of another moment must not take its place.
    pub made: bool,
}

/// One durable change. A list of them is committed at once or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    Identity(Identity),
    PutNode(NodeId, DesiredNode),
    DropNode(NodeId),
    PutDrive(DriveId, DesiredDrive),
    DropDrive(DriveId),
    PutVolume(VolumeId, DesiredVolume),
    DropVolume(VolumeId),
}

impl Desired {
    /// Applies what has been made durable.
    pub fn apply(&mut self, records: &[Record]) {
        for record in records {
            match record.clone() {
                Record::Identity(identity) => self.identity = Some(identity),
                Record::PutNode(id, node) => drop(self.nodes.insert(id, node)),
                Record::DropNode(id) => drop(self.nodes.remove(&id)),
                Record::PutDrive(id, drive) => drop(self.drives.insert(id, drive)),
                Record::DropDrive(id) => drop(self.drives.remove(&id)),
                Record::PutVolume(id, volume) => drop(self.volumes.insert(id, volume)),
                Record::DropVolume(id) => drop(self.volumes.remove(&id)),
            }
        }
    }

    /// Finds a volume by id, else by name.
    pub fn find_volume(&self, name_or_id: &str) -> Option<(VolumeId, &DesiredVolume)> {
        if let Ok(id) = name_or_id.parse::<VolumeId>() {
            return self.volumes.get(&id).map(|volume| (id, volume));
        }
        self.volumes.iter().find(|(_, volume)| volume.name.as_str() == name_or_id).map(|(id, volume)| (*id, volume))
    }

    pub fn volumes_on(&self, drive_id: DriveId) -> impl Iterator<Item = (&VolumeId, &DesiredVolume)> {
        self.volumes.iter().filter(move |(_, volume)| volume.replicas.iter().any(|replica| replica.drive_id == drive_id))
    }

    /// Finds a node by id, else by name.
    pub fn find_node(&self, name_or_id: &str) -> Option<(NodeId, &DesiredNode)> {
        if let Ok(id) = name_or_id.parse::<NodeId>() {
            return self.nodes.get(&id).filter(|node| !node.gone).map(|node| (id, node));
        }
        self.nodes.iter().find(|(_, node)| !node.gone && node.name.as_str() == name_or_id).map(|(id, node)| (*id, node))
    }

    pub fn is_gone(&self, id: NodeId) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.gone)
    }

    /// A node's name, or its id where it has none here.
    pub fn node_name(&self, id: NodeId) -> String {
        self.nodes.get(&id).map_or_else(|| id.to_string(), |node| node.name.to_string())
    }

    /// The nodes that `node_id` has to reach: none where it cannot be reached itself, since then it is no part of any group. One that was given up is among
    /// them, until another has its address: should it come back, it has to hear that its replicas were removed.
    pub fn peers_of(&self, node_id: NodeId) -> Vec<PeerAddress> {
        if self.nodes.get(&node_id).is_none_or(|node| node.peer.is_none()) {
            return vec![];
        }
        let is_taken = |address| self.nodes.values().any(|node| !node.gone && node.peer == address);
        let others = self.nodes.iter().filter(|(id, node)| **id != node_id && !(node.gone && is_taken(node.peer)));
        others.filter_map(|(id, node)| Some(PeerAddress { node_id: *id, address: node.peer? })).collect()
    }
}

/// Replicas of a volume at most, and so shares of NVMe's controller ids 1 to 0xFFEF.
pub const REPLICAS_MAX: u8 = 16;
/// Controllers of one replica's doors.
const CONTROLLERS: u16 = 0xFFEF / REPLICAS_MAX as u16;

impl DesiredVolume {
    pub fn door(&self, node_id: NodeId, door: &Door) -> Option<&DesiredDoor> {
        self.doors.iter().find(|desired| desired.node_id == node_id && desired.door == *door)
    }

    /// Finds a snapshot by id, else by name.
    pub fn find_snapshot(&self, name_or_id: &str) -> Option<&DesiredSnapshot> {
        let id = name_or_id.parse::<SnapshotId>().ok();
        self.snapshots.iter().find(|snapshot| id.map_or(snapshot.name.as_str() == name_or_id, |id| snapshot.snapshot_id == id))
    }

    pub fn replica_on(&self, node_id: NodeId) -> Option<&DesiredReplica> {
        self.replicas.iter().find(|replica| replica.node_id == node_id)
    }

    /// Whether a majority of its replicas was seen: nothing that hosts write can be in members that are yet to be made.
    pub fn is_founded(&self) -> bool {
        self.replicas.iter().filter(|replica| replica.made).count() > self.replicas.len() / 2
    }

    /// The controller ids of the doors on a node.
    pub fn controllers(&self, node_id: NodeId) -> Option<ControllerRange> {
        self.group.as_ref()?;
        let share = u16::from(self.replica_on(node_id)?.share);
        Some(ControllerRange { first: 1 + share * CONTROLLERS, last: (share + 1) * CONTROLLERS })
    }

    /// The first share of the controller ids that no replica has.
    pub fn free_share(&self) -> Option<u8> {
        (0..REPLICAS_MAX).find(|share| self.replicas.iter().all(|replica| replica.share != *share))
    }

    pub fn member(&self, number: u64) -> Option<&DesiredReplica> {
        self.replicas.iter().find(|replica| replica.member == number)
    }
}

impl DesiredReplica {
    /// One of those that a volume is made with.
    pub fn first(member: u64, replica_id: ReplicaId, node_id: NodeId, drive_id: DriveId) -> Self {
        let share = ((member - 1) % u64::from(REPLICAS_MAX)) as u8;
        Self { member, replica_id, node_id, drive_id, made: false, share, joins: None, log_only: false, left: false }
    }
}

impl DesiredGroup {
    pub fn of(replicas: &[DesiredReplica], first_size: ByteSize) -> Self {
        let member = |replica: &DesiredReplica| GroupMember {
            member: replica.member,
            role: if replica.log_only { MemberRole::LogOnly } else { MemberRole::Voter },
            replica_id: replica.replica_id,
            node_id: replica.node_id,
        };
        let next = replicas.iter().map(|replica| replica.member).max().unwrap_or(0) + 1;
        Self { first: GroupMembers { next, list: replicas.iter().map(member).collect() }, first_size }
    }
}
