//! Volumes with several replicas: who is a member, where the nodes reach each other, and how a member stands.
//!
//! Members are numbered from 1 in the order in which they joined; a number is never used again. A group has one member a node.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{BlockSize, Origin, VolumeCreateParams};
use crate::id::{DriveId, NodeId, ReplicaId, SegmentId, VolumeId};
use crate::name::VolumeName;
use crate::size::ByteSize;

/// What a member counts for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum MemberRole {
    #[default]
    Voter,
    /// Takes the log, counts in no quorum.
    Learner,
    /// A voter that keeps the log and no extents.
    LogOnly,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct GroupMember {
    /// From 1.
    pub member: u64,
    pub role: MemberRole,
    pub replica_id: ReplicaId,
    pub node_id: NodeId,
}

/// The whole membership, in order of number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct GroupMembers {
    /// The number that the next one to join gets.
    pub next: u64,
    pub list: Vec<GroupMember>,
}

/// As [`super::VolumeCreateParams`], for the one replica of the group that is on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberCreateParams {
    pub volume_id: VolumeId,
    pub segment_id: SegmentId,
    /// The one of `members` that is on this node.
    pub replica_id: ReplicaId,
    pub name: VolumeName,
    /// A multiple of 4096, more than 0.
    pub size_bytes: ByteSize,
    pub block_size: BlockSize,
    pub drive_id: DriveId,
    /// As in [`VolumeCreateParams`]; one that keeps the log alone needs no replica of the origin beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The same for all first members.
    pub members: GroupMembers,
}

impl MemberCreateParams {
    pub fn new(volume: VolumeCreateParams, members: GroupMembers) -> Self {
        let VolumeCreateParams { volume_id, segment_id, replica_id, name, size_bytes, block_size, drive_id, origin } = volume;
        Self { volume_id, segment_id, replica_id, name, size_bytes, block_size, drive_id, origin, members }
    }

    /// All but the members.
    pub fn volume(&self) -> VolumeCreateParams {
        VolumeCreateParams {
            volume_id: self.volume_id,
            segment_id: self.segment_id,
            replica_id: self.replica_id,
            name: self.name.clone(),
            size_bytes: self.size_bytes,
            block_size: self.block_size,
            drive_id: self.drive_id,
            origin: self.origin,
        }
    }

    /// The one of the members that this is.
    pub fn own(&self) -> Option<&GroupMember> {
        self.members.list.iter().find(|member| member.replica_id == self.replica_id)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupChangeParams {
    pub volume_id: VolumeId,
    /// After the change, which is one step: a learner or a log-only member more, a learner promoted, or a member less.
    pub members: GroupMembers,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupTransferParams {
    pub volume_id: VolumeId,
    pub to: NodeId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupRecoverParams {
    pub volume_id: VolumeId,
    /// Though what this replica has is itself in question.
    pub regardless: bool,
}

/// An entry of a group's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LogPoint {
    pub term: u64,
    pub index: u64,
}

/// What a recovery by force kept, and what it may have lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RecoveryReceipt {
    /// The one that goes on.
    pub member: u64,
    /// As they were; all others are cut off.
    pub members: GroupMembers,
    /// Those of the others that answered, and are cut off all the same: too few.
    pub heard: Vec<u64>,
    pub term: u64,
    /// No entry from here on is of an older one.
    pub new_term: u64,
    /// Kept, like all before it. What the others acknowledged after it is lost.
    pub last: LogPoint,
    /// Nothing up to here is lost, as far as the member knew.
    pub committed: u64,
    /// The member itself may have acknowledged entries as far as this, and does not have them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledged: Option<LogPoint>,
    /// Its content was being copied from others, and was whole as of this entry alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_as_of: Option<u64>,
    /// Why it had stopped before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
}

/// Where a node listens for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerAddress {
    pub node_id: NodeId,
    pub address: SocketAddr,
}

/// Replaces what the node knew; its own row, if there, is no peer. Kept by the node through restarts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeersSetParams {
    pub peers: Vec<PeerAddress>,
}

/// Another node, as a node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PeerInfo {
    pub node_id: NodeId,
    #[cfg_attr(feature = "openapi", schema(value_type = String, example = "127.0.0.1:7700"))]
    pub address: SocketAddr,
    pub connected: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Of its process, as in its NodeInfo; absent while it is not connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<u64>,
    /// Connections that stand: one for each pair of cores.
    #[serde(default)]
    pub connections: u32,
    /// What waits to be sent to it.
    #[serde(default)]
    pub queued_bytes: u64,
    #[serde(default)]
    pub counters: PeerCounters,
}

/// Since the node was told of the peer, over all cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PeerCounters {
    pub frames_sent: u64,
    pub frames_received: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// Words that were not sent: the queue was full, or there was no connection.
    pub words_dropped: u64,
    /// Words that came for a segment that the node does not have, or while memory was short.
    pub words_unplaced: u64,
    /// Connections that came to stand, and that ended.
    pub connects: u64,
    pub disconnects: u64,
}

/// A member's part in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum GroupPart {
    Leader,
    Follower,
    Candidate,
    Learner,
    /// It found what it cannot judge alone and asks the others; it does not vote yet.
    Doubtful,
    /// It answers nothing any more.
    Stopped,
}

impl GroupPart {
    pub const fn word(self) -> &'static str {
        match self {
            Self::Leader => "leader",
            Self::Follower => "follower",
            Self::Candidate => "candidate",
            Self::Learner => "learner",
            Self::Doubtful => "doubtful",
            Self::Stopped => "stopped",
        }
    }
}

/// How the member on this node stands. Positions are indices of log entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct GroupInfo {
    /// Its number.
    pub member: u64,
    pub part: GroupPart,
    /// Why, where it is doubtful or stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub term: u64,
    /// Who leads that term, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<NodeId>,
    /// Hosts are served here.
    pub serves: bool,
    pub asleep: bool,
    pub last: u64,
    /// The term of that entry.
    #[serde(default)]
    pub last_term: u64,
    pub persisted: u64,
    pub committed: u64,
    pub applied: u64,
    /// Its data are being copied from another member: what it has of them is not used until it is whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebuild: Option<RebuildInfo>,
    /// As of what is applied here.
    pub members: GroupMembers,
}

impl GroupInfo {
    /// What it counts for itself, as far as it knows.
    pub fn own_role(&self) -> Option<MemberRole> {
        self.role(self.member)
    }

    /// What a member counts for, if it is one.
    pub fn role(&self, member: u64) -> Option<MemberRole> {
        self.members.list.iter().find(|other| other.member == member).map(|other| other.role)
    }

    /// It takes part, as far as its node tells.
    pub fn is_well(&self) -> bool {
        matches!(self.part, GroupPart::Leader | GroupPart::Follower | GroupPart::Candidate)
    }

    /// As a member stands that was just made: it follows, has nothing, and knows of no leader.
    pub fn newborn(member: u64, members: GroupMembers) -> Self {
        Self {
            member,
            part: GroupPart::Follower,
            reason: None,
            term: 0,
            leader: None,
            serves: false,
            asleep: false,
            last: 0,
            last_term: 0,
            persisted: 0,
            committed: 0,
            applied: 0,
            rebuild: None,
            members,
        }
    }
}

/// In extents of the volume, 64 KiB each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RebuildInfo {
    pub done: u64,
    pub total: u64,
}

impl RebuildInfo {
    /// Whole per cent, 100 only when nothing is left.
    pub fn percent(&self) -> u64 {
        self.done.min(self.total).saturating_mul(100).checked_div(self.total).unwrap_or(100)
    }

    /// Blocks of 4 KiB in the extents that are still to be asked for.
    pub fn blocks_left(&self) -> u64 {
        self.total.saturating_sub(self.done).saturating_mul(16)
    }
}
