//! From desired and observed to the steps between them.
//!
//! Deterministic, and one round at a time: a round holds only steps whose preconditions are observed, so a round is
//! planned, tried, and planned anew from a fresh look. Every step is idempotent; losing any of them, or doing one
//! twice, changes nothing but the number of rounds.
//!
//! What it never does: touch a volume or drive that is not desired-to-be-removed; format a drive that held data;
//! put an empty volume in the place of a lost one; shrink without permission.

use penstock_api::rpc::{
    Door, DriveAddParams, DriveRemoveParams, DriveState, ExportAddParams, ExportRemoveParams, GroupChangeParams, GroupTransferParams,
    MemberCreateParams, NodeClaimParams, Origin, PeersSetParams, SnapshotCreateParams, SnapshotDeleteParams, VolumeCreateParams,
    VolumeDeleteParams, VolumeResizeParams, VolumeState,
};
use penstock_api::{DriveId, NodeId, SnapshotId, VolumeId};

use crate::clones;
use crate::desired::{Desired, DesiredChange, DesiredReplica, DesiredVolume, Phase, Reach, Record};
use crate::issuer::Identity;
use crate::membership;
use crate::observed::{Observed, ObservedVolume};
use crate::snapshots;

impl Step {
    pub fn subject(&self) -> Subject {
        match self {
            Self::Local(step) => step.subject(),
            Self::Node(step) => step.subject(),
        }
    }
}

/// What a step at one node is about, and what its failure is remembered under.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    Node,
    Peers,
    Drive(DriveId),
    /// The volume's replica on the node.
    Volume(VolumeId),
    /// The members of the volume's group.
    Members(VolumeId),
    Door(VolumeId, Door),
    Snapshot(VolumeId, SnapshotId),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Local(LocalStep),
    Node(NodeStep),
}

/// A step in control's own store: it records that something was observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalStep {
    DriveMade(DriveId),
    ReplicaMade(VolumeId, NodeId),
    ShrinkDone(VolumeId),
    /// With the volumes of one replica that lived on it, which stay on the drive as they are. Replicas of others stay in their volumes: their
    /// groups count on them.
    ForgetDrive(DriveId),
    /// With the volume, where it was the last.
    ForgetReplica(VolumeId, NodeId),
    ForgetDoor(VolumeId, NodeId, Door),
    /// The group has this member no more.
    ReplicaLeft(VolumeId, u64),
    /// What the member that comes must have applied, and that it has.
    ReachSet(VolumeId, u64, u64),
    Reached(VolumeId, u64, u64),
    /// The change to this member.
    ChangeEnded(VolumeId, u64),
    SnapshotMade(VolumeId, SnapshotId),
    ForgetSnapshot(VolumeId, SnapshotId),
}

/// A step at the node: one JSON-RPC call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeStep {
    Claim(NodeClaimParams),
    SetPeers(PeersSetParams),
    AddDrive(DriveAddParams),
    RemoveDrive(DriveRemoveParams),
    CreateVolume(VolumeCreateParams),
    CreateMember(MemberCreateParams),
    ResizeVolume(VolumeResizeParams),
    DeleteVolume(VolumeDeleteParams),
    AddExport(ExportAddParams),
    RemoveExport(ExportRemoveParams),
    ChangeMembers(GroupChangeParams),
    StepAside(GroupTransferParams),
    TakeSnapshot(SnapshotCreateParams),
    RemoveSnapshot(SnapshotDeleteParams),
}

impl NodeStep {
    pub fn subject(&self) -> Subject {
        match self {
            Self::Claim(_) => Subject::Node,
            Self::SetPeers(_) => Subject::Peers,
            Self::AddDrive(params) => Subject::Drive(params.drive_id),
            Self::RemoveDrive(params) => Subject::Drive(params.drive_id),
            Self::CreateVolume(params) => Subject::Volume(params.volume_id),
            Self::CreateMember(params) => Subject::Volume(params.volume_id),
            Self::ResizeVolume(params) => Subject::Volume(params.volume_id),
            Self::DeleteVolume(params) => Subject::Volume(params.volume_id),
            Self::AddExport(params) => Subject::Door(params.volume_id, params.door.clone()),
            Self::RemoveExport(params) => Subject::Door(params.volume_id, params.door.clone()),
            Self::ChangeMembers(params) => Subject::Members(params.volume_id),
            Self::StepAside(params) => Subject::Members(params.volume_id),
            Self::TakeSnapshot(params) => Subject::Snapshot(params.volume_id, params.snapshot_id),
            Self::RemoveSnapshot(params) => Subject::Snapshot(params.volume_id, params.snapshot_id),
        }
    }

    pub const fn word(&self) -> &'static str {
        match self {
            Self::Claim(_) => "claim node",
            Self::SetPeers(_) => "set peers",
            Self::AddDrive(_) => "add drive",
            Self::RemoveDrive(_) => "remove drive",
            Self::CreateVolume(_) => "create volume",
            Self::CreateMember(_) => "create member",
            Self::ResizeVolume(_) => "resize volume",
            Self::DeleteVolume(_) => "delete volume",
            Self::AddExport(_) => "add export",
            Self::RemoveExport(_) => "remove export",
            Self::ChangeMembers(_) => "change members",
            Self::StepAside(_) => "let another lead",
            Self::TakeSnapshot(_) => "take snapshot",
            Self::RemoveSnapshot(_) => "remove snapshot",
        }
    }
}

/// One round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<Step>,
    /// Why nothing may be done at this node at all.
    pub blocked: Option<String>,
    /// Volumes on the node that nobody desires. Left alone: an import takes them up.
    pub strays: Vec<VolumeId>,
    /// Volumes that were there and are not, though their drive serves.
    pub lost: Vec<VolumeId>,
}

/// Whether the node belongs to us; otherwise says why not.
pub fn claim_conflict(identity: &Identity, node_id: NodeId, observed: &Observed) -> Option<String> {
    let ours = identity.cluster_id();
    match (observed.cluster_id, observed.node_id) {
        (Some(cluster), _) if cluster != ours => Some(format!("the node belongs to cluster {cluster}, this control to {ours}")),
        (_, Some(node)) if node != node_id => Some(format!("the node is {node}, this control is for {node_id}")),
        _ => None,
    }
}

/// The round of one node. It follows from what is desired and from that node alone: others may be away, or seen at another time.
pub fn reconcile(desired: &Desired, node_id: NodeId, observed: &Observed) -> Plan {
    let mut plan = Plan { strays: strays(desired, node_id, observed), ..Plan::default() };
    let Some(identity) = &desired.identity else {
        return plan;
    };
    let has_replicas = || desired.volumes.values().any(|volume| volume.replica_on(node_id).is_some());
    if !desired.drives.values().any(|drive| drive.node_id == node_id) && !has_replicas() {
        return plan; // nothing to do at the node, so it need not be claimed: an import may still adopt its cluster
    }
    plan.blocked = claim_conflict(identity, node_id, observed);
    if plan.blocked.is_some() {
        return plan;
    }
    if observed.cluster_id.is_none() || observed.node_id.is_none() {
        let claim = NodeClaimParams { cluster_id: identity.cluster_id(), node_id };
        plan.steps.push(Step::Node(NodeStep::Claim(claim)));
        return plan;
    }
    let peers = desired.peers_of(node_id);
    if peers != observed.peers {
        plan.steps.push(Step::Node(NodeStep::SetPeers(PeersSetParams { peers })));
    }
    plan_drives(desired, node_id, observed, identity, &mut plan);
    for (&volume_id, volume) in &desired.volumes {
        let Some(replica) = volume.replica_on(node_id) else { continue };
        match desired.drives.get(&replica.drive_id).map(|drive| drive.phase) {
            // The drive may come back by an import, and its group counts on it until then.
            None if volume.group.is_some() && volume.phase.is_present() && !replica.left => {}
            None => plan.steps.push(Step::Local(LocalStep::ForgetReplica(volume_id, node_id))),
            Some(Phase::Removing { force: true }) => {} // leaves with its drive, untouched
            Some(_) => plan_replica(desired, observed, (volume_id, volume), replica, &mut plan),
        }
    }
    // What is taken away goes first: it may be in the way of what is to come. The sort is stable.
    plan.steps.sort_by_key(rank);
    plan
}

fn rank(step: &Step) -> u8 {
    match step {
        Step::Local(_) => 0,
        Step::Node(NodeStep::Claim(_)) => 1,
        Step::Node(NodeStep::SetPeers(_)) => 2,
        Step::Node(NodeStep::RemoveExport(_)) => 3,
        Step::Node(NodeStep::DeleteVolume(_)) => 4,
        Step::Node(NodeStep::RemoveDrive(_)) => 5,
        Step::Node(NodeStep::AddDrive(_)) => 6,
        Step::Node(NodeStep::ResizeVolume(_)) => 7,
        Step::Node(NodeStep::CreateVolume(_) | NodeStep::CreateMember(_)) => 8,
        Step::Node(NodeStep::ChangeMembers(_) | NodeStep::StepAside(_) | NodeStep::TakeSnapshot(_) | NodeStep::RemoveSnapshot(_)) => 9,
        Step::Node(NodeStep::AddExport(_)) => 10,
    }
}

fn strays(desired: &Desired, node_id: NodeId, observed: &Observed) -> Vec<VolumeId> {
    let leaving = |drive_id| desired.drives.get(&drive_id).is_some_and(|drive| !drive.phase.is_present());
    let known = |id: &VolumeId| desired.volumes.get(id).is_some_and(|volume| volume.replica_on(node_id).is_some());
    let stray = |(id, volume): (&VolumeId, &ObservedVolume)| {
        let unknown = !known(id) && !leaving(volume.drive_id) && volume.state != VolumeState::Deleting;
        unknown.then_some(*id)
    };
    observed.volumes.iter().filter_map(stray).collect()
}

fn plan_drives(desired: &Desired, node_id: NodeId, observed: &Observed, identity: &Identity, plan: &mut Plan) {
    for (&drive_id, drive) in desired.drives.iter().filter(|(_, drive)| drive.node_id == node_id) {
        let seen = observed.drives.get(&drive_id);
        let occupied = desired.volumes_on(drive_id).next().is_some();
        let step = match (drive.phase, seen) {
            // Its volumes are still to be deleted, for which it must be open.
            (Phase::Present, _) | (Phase::Removing { force: false }, _) if drive.phase.is_present() || occupied => match seen {
                Some(seen) if seen.state == DriveState::Serving && !drive.made => Step::Local(LocalStep::DriveMade(drive_id)),
                Some(seen) if seen.state != DriveState::Missing => continue,
                _ => Step::Node(NodeStep::AddDrive(DriveAddParams {
                    spec: drive.spec.clone(),
                    drive_id,
                    cluster_id: identity.cluster_id(),
                    node_id,
                    stores: drive.stores,
                    oplog_bytes: drive.oplog_bytes,
                    force: drive.force && !drive.made,
                    open_only: drive.made && !drive.volatile,
                })),
            },
            (Phase::Present, _) => continue,
            (Phase::Removing { .. }, None) => Step::Local(LocalStep::ForgetDrive(drive_id)),
            (Phase::Removing { force }, Some(_)) => Step::Node(NodeStep::RemoveDrive(DriveRemoveParams { drive_id, force })),
        };
        plan.steps.push(step);
    }
}

fn plan_replica(
    desired: &Desired,
    observed: &Observed,
    (volume_id, volume): (VolumeId, &DesiredVolume),
    replica: &DesiredReplica,
    plan: &mut Plan,
) {
    let node_id = replica.node_id;
    let Some(seen) = observed.volumes.get(&volume_id) else {
        if observed.is_serving(replica.drive_id) {
            plan_absent_replica(desired, observed, (volume_id, volume), replica, plan);
        }
        return;
    };
    if conflict(volume, replica, seen).is_some() || seen.state == VolumeState::Deleting {
        return;
    }
    if !replica.made {
        plan.steps.push(Step::Local(LocalStep::ReplicaMade(volume_id, node_id)));
    }
    for door in &seen.doors {
        let desired_phase = volume.door(node_id, door).map(|desired| desired.phase);
        let force = match (volume.phase, desired_phase) {
            (Phase::Removing { force }, _) => force,
            _ if replica.left => true,
            (Phase::Present, Some(Phase::Present)) => continue,
            (Phase::Present, Some(Phase::Removing { force })) => force,
            (Phase::Present, None) => false,
        };
        let params = ExportRemoveParams { volume_id, door: door.clone(), force };
        plan.steps.push(Step::Node(NodeStep::RemoveExport(params)));
    }
    let going = if replica.left { Phase::Removing { force: true } } else { volume.phase };
    if let Phase::Removing { force } = going {
        // The node would refuse it time and again, and be asked late once it does not.
        let waits = replica.left && clones::standing_on(desired, observed, volume_id).is_some();
        if (seen.doors.is_empty() || force) && !waits {
            plan.steps.push(Step::Node(NodeStep::DeleteVolume(VolumeDeleteParams { volume_id, force })));
        }
        return;
    }
    membership::plan(desired, observed, (volume_id, volume), replica, seen, &mut plan.steps);
    snapshots::plan((volume_id, volume), seen, &mut plan.steps);
    if seen.is_served() {
        let nowhere = volume.replicas.iter().filter(|other| other.left && desired.is_gone(other.node_id));
        plan.steps.extend(nowhere.map(|other| Step::Local(LocalStep::ForgetReplica(volume_id, other.node_id))));
    }
    // A group's size is changed where it is led, and comes to the others by its log.
    if seen.is_served() {
        if seen.size < volume.size || (seen.size > volume.size && volume.allow_shrink) {
            let params = VolumeResizeParams { volume_id, size_bytes: volume.size, allow_shrink: volume.allow_shrink };
            plan.steps.push(Step::Node(NodeStep::ResizeVolume(params)));
        } else if seen.size == volume.size && volume.allow_shrink {
            plan.steps.push(Step::Local(LocalStep::ShrinkDone(volume_id)));
        }
    }
    for desired in volume.doors.iter().filter(|desired| desired.node_id == node_id) {
        match desired.phase {
            Phase::Present if !seen.doors.contains(&desired.door) && seen.state == VolumeState::Serving && volume.is_founded() => {
                let params = ExportAddParams { volume_id, door: desired.door.clone(), controllers: volume.controllers(node_id) };
                plan.steps.push(Step::Node(NodeStep::AddExport(params)));
            }
            Phase::Removing { .. } if !seen.doors.contains(&desired.door) => {
                plan.steps.push(Step::Local(LocalStep::ForgetDoor(volume_id, node_id, desired.door.clone())));
            }
            _ => {}
        }
    }
}

/// The replica is not there, and its drive has told of all it holds.
fn plan_absent_replica(
    desired: &Desired,
    observed: &Observed,
    (volume_id, volume): (VolumeId, &DesiredVolume),
    replica: &DesiredReplica,
    plan: &mut Plan,
) {
    if !volume.phase.is_present() || replica.left {
        plan.steps.push(Step::Local(LocalStep::ForgetReplica(volume_id, replica.node_id)));
        return;
    }
    let drive = &desired.drives[&replica.drive_id];
    // A member that forgot what it promised must never speak under its old id, so one of a group is not made anew on memory either.
    if replica.made && (!drive.volatile || volume.group.is_some()) {
        plan.lost.push(volume_id);
        return;
    }
    let is_off = volume.change.as_ref().is_some_and(|change| change.is_off && change.to == replica.member);
    // Where the origin is lost it may come back, when its own replica is replaced.
    let has = |ground: &Origin| observed.volumes.get(&ground.volume_id).is_some_and(|of| of.has_snapshot(ground.snapshot_id));
    if !drive.phase.is_present() || is_off || !clones::ground(volume, replica).is_none_or(has) {
        return;
    }
    let shape = VolumeCreateParams {
        volume_id,
        segment_id: volume.segment_id,
        replica_id: replica.replica_id,
        name: volume.name.clone(),
        size_bytes: match &volume.group {
            None => volume.size,
            Some(group) if replica.joins.is_none() => group.first_size,
            // Of what it hears, the log from its beginning or a copy of what there is now, neither goes beyond.
            Some(group) => group.first_size.max(volume.size),
        },
        block_size: volume.block_size,
        drive_id: replica.drive_id,
        // One that joins has the content copied.
        origin: volume.origin.as_deref().copied().filter(|_| replica.joins.is_none()),
    };
    plan.steps.push(Step::Node(match &volume.group {
        None => NodeStep::CreateVolume(shape),
        Some(group) => NodeStep::CreateMember(MemberCreateParams::new(shape, replica.joins.clone().unwrap_or_else(|| group.first.clone()))),
    }));
}

/// Both sides know the id and mean different things by it: nothing is done until a person has looked.
pub fn conflict(desired: &DesiredVolume, replica: &DesiredReplica, seen: &ObservedVolume) -> Option<String> {
    let differ = |what: &str, ours: String, theirs: String| Some(format!("{what} is {theirs} on the node and {ours} in control"));
    if desired.segment_id != seen.segment_id {
        return differ("the segment", desired.segment_id.to_string(), seen.segment_id.to_string());
    }
    if replica.replica_id != seen.replica_id {
        return differ("the replica", replica.replica_id.to_string(), seen.replica_id.to_string());
    }
    if desired.block_size != seen.block_size {
        return differ("the block size", desired.block_size.to_string(), seen.block_size.to_string());
    }
    if replica.drive_id != seen.drive_id {
        return differ("the drive", replica.drive_id.to_string(), seen.drive_id.to_string());
    }
    match (&desired.group, &seen.group) {
        (Some(_), Some(group)) if group.member != replica.member => {
            differ("the member's number", replica.member.to_string(), group.member.to_string())
        }
        (None, Some(group)) => differ("the number of replicas", "1".to_owned(), group.members.list.len().to_string()),
        (Some(_), None) => differ("the number of replicas", desired.replicas.len().to_string(), "1".to_owned()),
        _ => None,
    }
}

impl LocalStep {
    pub fn subject(&self) -> Subject {
        match self {
            Self::DriveMade(id) | Self::ForgetDrive(id) => Subject::Drive(*id),
            Self::ReplicaMade(id, _) | Self::ShrinkDone(id) | Self::ForgetReplica(id, _) => Subject::Volume(*id),
            Self::ForgetDoor(id, _, door) => Subject::Door(*id, door.clone()),
            Self::SnapshotMade(id, snapshot) | Self::ForgetSnapshot(id, snapshot) => Subject::Snapshot(*id, *snapshot),
            Self::ReplicaLeft(id, _) | Self::ReachSet(id, ..) | Self::Reached(id, ..) | Self::ChangeEnded(id, _) => Subject::Members(*id),
        }
    }

    /// The records that carry it out, judged by what is desired **now**: the wish may have changed since the look.
    pub fn records(&self, desired: &Desired) -> Vec<Record> {
        match self {
            Self::DriveMade(id) => match desired.drives.get(id) {
                Some(drive) if !drive.made || drive.force => {
                    let mut drive = drive.clone();
                    (drive.made, drive.force) = (true, false);
                    vec![Record::PutDrive(*id, drive)]
                }
                _ => vec![],
            },
            Self::ReplicaMade(id, node_id) => change_volume(desired, *id, |volume| {
                volume.replicas.iter_mut().filter(|replica| replica.node_id == *node_id).for_each(|replica| replica.made = true);
            }),
            Self::ShrinkDone(id) => change_volume(desired, *id, |volume| volume.allow_shrink = false),
            Self::ForgetDrive(id) => match desired.drives.get(id) {
                Some(drive) if !drive.phase.is_present() => {
                    let alone = desired.volumes_on(*id).filter(|(_, volume)| volume.group.is_none());
                    let volumes = alone.map(|(volume_id, _)| Record::DropVolume(*volume_id));
                    volumes.chain([Record::DropDrive(*id)]).collect()
                }
                _ => vec![],
            },
            Self::ForgetReplica(id, node_id) => forget_replica(desired, *id, *node_id),
            Self::ForgetDoor(id, node_id, door) => change_volume(desired, *id, |volume| {
                let gone =
                    |desired: &crate::DesiredDoor| desired.node_id == *node_id && desired.door == *door && !desired.phase.is_present();
                volume.doors.retain(|desired| !gone(desired));
            }),
            Self::ReplicaLeft(id, member) => change_volume(desired, *id, |volume| {
                volume.replicas.iter_mut().filter(|replica| replica.member == *member).for_each(|replica| replica.left = true);
            }),
            Self::SnapshotMade(id, snapshot) => change_volume(desired, *id, |volume| {
                volume.snapshots.iter_mut().filter(|known| known.snapshot_id == *snapshot).for_each(|known| known.made = true);
            }),
            Self::ForgetSnapshot(id, snapshot) => change_volume(desired, *id, |volume| {
                volume.snapshots.retain(|known| known.snapshot_id != *snapshot || known.phase.is_present());
            }),
            Self::ReachSet(id, to, index) => {
                change_change(desired, *id, *to, |change| change.reach = Some(Reach { index: *index, is_reached: false }))
            }
            Self::Reached(id, to, index) => change_change(desired, *id, *to, |change| {
                change.reach.iter_mut().filter(|reach| reach.index == *index).for_each(|reach| reach.is_reached = true);
            }),
            Self::ChangeEnded(id, to) => change_volume(desired, *id, |volume| drop(volume.change.take_if(|change| change.to == *to))),
        }
    }
}

fn forget_replica(desired: &Desired, id: VolumeId, node_id: NodeId) -> Vec<Record> {
    let Some(volume) = desired.volumes.get(&id) else { return vec![] };
    let Some(replica) = volume.replica_on(node_id) else { return vec![] };
    let is_homeless = volume.group.is_none() && !desired.drives.contains_key(&replica.drive_id);
    let is_wanted = volume.phase.is_present() && !is_homeless && !replica.left;
    let lives_on = volume.phase.is_present() && replica.left;
    match (is_wanted, volume.replicas.len()) {
        (true, _) => vec![],
        (false, 1) if !lives_on => vec![Record::DropVolume(id)],
        (false, _) => change_volume(desired, id, |volume| {
            volume.replicas.retain(|replica| replica.node_id != node_id);
            let heir = volume.change.as_mut().and_then(|change| change.waits.take_if(|waits| waits.node_id == node_id));
            match heir {
                Some(replica) => volume.replicas.push(replica),
                None => volume.doors.retain(|desired| desired.node_id != node_id),
            }
        }),
    }
}

fn change_change(desired: &Desired, id: VolumeId, to: u64, how: impl FnOnce(&mut DesiredChange)) -> Vec<Record> {
    change_volume(desired, id, |volume| {
        if let Some(change) = volume.change.as_mut().filter(|change| change.to == to) {
            how(change);
        }
    })
}

fn change_volume(desired: &Desired, id: VolumeId, change: impl FnOnce(&mut DesiredVolume)) -> Vec<Record> {
    let Some(before) = desired.volumes.get(&id) else {
        return vec![];
    };
    let mut after = before.clone();
    change(&mut after);
    if after == *before { vec![] } else { vec![Record::PutVolume(id, after)] }
}
