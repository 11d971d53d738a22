//! From desired and observed to the steps between them.
//!
//! Deterministic, and one round at a time: a round holds only steps whose preconditions are observed, so a round is
//! planned, tried, and planned anew from a fresh look. Every step is idempotent; losing any of them, or doing one
//! twice, changes nothing but the number of rounds.
//!
//! What it never does: touch a volume or drive that is not desired-to-be-removed; format a drive that held data;
//! put an empty volume in the place of a lost one; shrink without permission.

use penstock_api::rpc::{
    Door, DriveAddParams, DriveRemoveParams, DriveState, ExportAddParams, ExportRemoveParams, NodeClaimParams, VolumeCreateParams,
    VolumeDeleteParams, VolumeResizeParams, VolumeState,
};
use penstock_api::{DriveId, VolumeId};

use crate::desired::{Desired, DesiredVolume, Phase, Record};
use crate::issuer::Identity;
use crate::observed::{Observed, ObservedVolume};

impl Step {
    pub fn subject(&self) -> Subject {
        match self {
            Self::Local(step) => step.subject(),
            Self::Node(step) => step.subject(),
        }
    }
}

/// What a step is about, and what its failure is remembered under.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    Node,
    Drive(DriveId),
    Volume(VolumeId),
    Door(VolumeId, Door),
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
    VolumeMade(VolumeId),
    ShrinkDone(VolumeId),
    /// With the volumes that lived on it, which stay on the drive as they are.
    ForgetDrive(DriveId),
    ForgetVolume(VolumeId),
    ForgetDoor(VolumeId, Door),
}

/// A step at the node: one JSON-RPC call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeStep {
    Claim(NodeClaimParams),
    AddDrive(DriveAddParams),
    RemoveDrive(DriveRemoveParams),
    CreateVolume(VolumeCreateParams),
    ResizeVolume(VolumeResizeParams),
    DeleteVolume(VolumeDeleteParams),
    AddExport(ExportAddParams),
    RemoveExport(ExportRemoveParams),
}

impl NodeStep {
    pub fn subject(&self) -> Subject {
        match self {
            Self::Claim(_) => Subject::Node,
            Self::AddDrive(params) => Subject::Drive(params.drive_id),
            Self::RemoveDrive(params) => Subject::Drive(params.drive_id),
            Self::CreateVolume(params) => Subject::Volume(params.volume_id),
            Self::ResizeVolume(params) => Subject::Volume(params.volume_id),
            Self::DeleteVolume(params) => Subject::Volume(params.volume_id),
            Self::AddExport(params) => Subject::Door(params.volume_id, params.door.clone()),
            Self::RemoveExport(params) => Subject::Door(params.volume_id, params.door.clone()),
        }
    }

    pub const fn word(&self) -> &'static str {
        match self {
            Self::Claim(_) => "claim node",
            Self::AddDrive(_) => "add drive",
            Self::RemoveDrive(_) => "remove drive",
            Self::CreateVolume(_) => "create volume",
            Self::ResizeVolume(_) => "resize volume",
            Self::DeleteVolume(_) => "delete volume",
            Self::AddExport(_) => "add export",
            Self::RemoveExport(_) => "remove export",
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
pub fn claim_conflict(identity: &Identity, observed: &Observed) -> Option<String> {
    let (ours, our_node) = (identity.cluster_id(), identity.node_id());
    match (observed.cluster_id, observed.node_id) {
        (Some(cluster), _) if cluster != ours => Some(format!("the node belongs to cluster {cluster}, this control to {ours}")),
        (_, Some(node)) if node != our_node => Some(format!("the node is {node}, this control is for {our_node}")),
        _ => None,
    }
}

pub fn reconcile(desired: &Desired, observed: &Observed) -> Plan {
    let mut plan = Plan { strays: strays(desired, observed), ..Plan::default() };
    let Some(identity) = &desired.identity else {
        return plan;
    };
    if desired.drives.is_empty() && desired.volumes.is_empty() {
        return plan; // nothing to do at the node, so it need not be claimed: an import may still adopt its cluster
    }
    plan.blocked = claim_conflict(identity, observed);
    if plan.blocked.is_some() {
        return plan;
    }
    if observed.cluster_id.is_none() || observed.node_id.is_none() {
        let claim = NodeClaimParams { cluster_id: identity.cluster_id(), node_id: identity.node_id() };
        plan.steps.push(Step::Node(NodeStep::Claim(claim)));
        return plan;
    }
    plan_drives(desired, observed, identity, &mut plan);
    for (&volume_id, volume) in &desired.volumes {
        match desired.drives.get(&volume.drive_id).map(|drive| drive.phase) {
            None => plan.steps.push(Step::Local(LocalStep::ForgetVolume(volume_id))),
            Some(Phase::Removing { force: true }) => {} // leaves with its drive, untouched
            Some(_) => plan_volume(desired, observed, volume_id, volume, &mut plan),
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
        Step::Node(NodeStep::RemoveExport(_)) => 2,
        Step::Node(NodeStep::DeleteVolume(_)) => 3,
        Step::Node(NodeStep::RemoveDrive(_)) => 4,
        Step::Node(NodeStep::AddDrive(_)) => 5,
        Step::Node(NodeStep::ResizeVolume(_)) => 6,
        Step::Node(NodeStep::CreateVolume(_)) => 7,
        Step::Node(NodeStep::AddExport(_)) => 8,
    }
}

fn strays(desired: &Desired, observed: &Observed) -> Vec<VolumeId> {
    let leaving = |drive_id| desired.drives.get(&drive_id).is_some_and(|drive| !drive.phase.is_present());
    let stray = |(id, volume): (&VolumeId, &ObservedVolume)| {
        let unknown = !desired.volumes.contains_key(id) && !leaving(volume.drive_id) && volume.state != VolumeState::Deleting;
        unknown.then_some(*id)
    };
    observed.volumes.iter().filter_map(stray).collect()
}

fn plan_drives(desired: &Desired, observed: &Observed, identity: &Identity, plan: &mut Plan) {
    for (&drive_id, drive) in &desired.drives {
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
                    node_id: identity.node_id(),
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

fn plan_volume(desired: &Desired, observed: &Observed, volume_id: VolumeId, volume: &DesiredVolume, plan: &mut Plan) {
    let Some(seen) = observed.volumes.get(&volume_id) else {
        if observed.is_serving(volume.drive_id) {
            plan_absent_volume(desired, volume_id, volume, plan);
        }
        return;
    };
    if conflict(volume, seen).is_some() || seen.state == VolumeState::Deleting {
        return;
    }
    if !volume.made {
        plan.steps.push(Step::Local(LocalStep::VolumeMade(volume_id)));
    }
    for door in &seen.doors {
        let desired_phase = volume.door(door).map(|desired| desired.phase);
        let force = match (volume.phase, desired_phase) {
            (Phase::Removing { force }, _) => force,
            (Phase::Present, Some(Phase::Present)) => continue,
            (Phase::Present, Some(Phase::Removing { force })) => force,
            (Phase::Present, None) => false,
        };
        let params = ExportRemoveParams { volume_id, door: door.clone(), force };
        plan.steps.push(Step::Node(NodeStep::RemoveExport(params)));
    }
    if let Phase::Removing { force } = volume.phase {
        if seen.doors.is_empty() || force {
            plan.steps.push(Step::Node(NodeStep::DeleteVolume(VolumeDeleteParams { volume_id, force })));
        }
        return;
    }
    if seen.size < volume.size || (seen.size > volume.size && volume.allow_shrink) {
        let params = VolumeResizeParams { volume_id, size_bytes: volume.size, allow_shrink: volume.allow_shrink };
        plan.steps.push(Step::Node(NodeStep::ResizeVolume(params)));
    } else if seen.size == volume.size && volume.allow_shrink {
        plan.steps.push(Step::Local(LocalStep::ShrinkDone(volume_id)));
    }
    for desired in &volume.doors {
        match desired.phase {
            Phase::Present if !seen.doors.contains(&desired.door) && seen.state == VolumeState::Serving => {
                let params = ExportAddParams { volume_id, door: desired.door.clone(), controllers: None };
                plan.steps.push(Step::Node(NodeStep::AddExport(params)));
            }
            Phase::Removing { .. } if !seen.doors.contains(&desired.door) => {
                plan.steps.push(Step::Local(LocalStep::ForgetDoor(volume_id, desired.door.clone())));
            }
            _ => {}
        }
    }
}

/// The volume is not there, and its drive has told of all it holds.
fn plan_absent_volume(desired: &Desired, volume_id: VolumeId, volume: &DesiredVolume, plan: &mut Plan) {
    if !volume.phase.is_present() {
        plan.steps.push(Step::Local(LocalStep::ForgetVolume(volume_id)));
        return;
    }
    let drive = &desired.drives[&volume.drive_id];
    if volume.made && !drive.volatile {
        plan.lost.push(volume_id);
        return;
    }
    if !drive.phase.is_present() {
        return;
    }
    plan.steps.push(Step::Node(NodeStep::CreateVolume(VolumeCreateParams {
        volume_id,
        segment_id: volume.segment_id,
        replica_id: volume.replica_id,
        name: volume.name.clone(),
        size_bytes: volume.size,
        block_size: volume.block_size,
        drive_id: volume.drive_id,
    })));
}

/// Both sides know the id and mean different things by it: nothing is done until a person has looked.
pub fn conflict(desired: &DesiredVolume, seen: &ObservedVolume) -> Option<String> {
    let differ = |what: &str, ours: String, theirs: String| Some(format!("{what} is {theirs} on the node and {ours} in control"));
    if desired.segment_id != seen.segment_id {
        return differ("the segment", desired.segment_id.to_string(), seen.segment_id.to_string());
    }
    if desired.replica_id != seen.replica_id {
        return differ("the replica", desired.replica_id.to_string(), seen.replica_id.to_string());
    }
    if desired.block_size != seen.block_size {
        return differ("the block size", desired.block_size.to_string(), seen.block_size.to_string());
    }
    if desired.drive_id != seen.drive_id {
        return differ("the drive", desired.drive_id.to_string(), seen.drive_id.to_string());
    }
    None
}

impl LocalStep {
    pub fn subject(&self) -> Subject {
        match self {
            Self::DriveMade(id) | Self::ForgetDrive(id) => Subject::Drive(*id),
            Self::VolumeMade(id) | Self::ShrinkDone(id) | Self::ForgetVolume(id) => Subject::Volume(*id),
            Self::ForgetDoor(id, door) => Subject::Door(*id, door.clone()),
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
            Self::VolumeMade(id) => change_volume(desired, *id, |volume| volume.made = true),
            Self::ShrinkDone(id) => change_volume(desired, *id, |volume| volume.allow_shrink = false),
            Self::ForgetDrive(id) => match desired.drives.get(id) {
                Some(drive) if !drive.phase.is_present() => {
                    let volumes = desired.volumes_on(*id).map(|(volume_id, _)| Record::DropVolume(*volume_id));
                    volumes.chain([Record::DropDrive(*id)]).collect()
                }
                _ => vec![],
            },
            Self::ForgetVolume(id) => match desired.volumes.get(id) {
                Some(volume) if !volume.phase.is_present() || !desired.drives.contains_key(&volume.drive_id) => {
                    vec![Record::DropVolume(*id)]
                }
                _ => vec![],
            },
            Self::ForgetDoor(id, door) => change_volume(desired, *id, |volume| {
                volume.doors.retain(|desired| desired.door != *door || desired.phase.is_present());
            }),
        }
    }
}

fn change_volume(desired: &Desired, id: VolumeId, change: impl FnOnce(&mut DesiredVolume)) -> Vec<Record> {
    let Some(before) = desired.volumes.get(&id) else {
        return vec![];
    };
    let mut after = before.clone();
    change(&mut after);
    if after == *before { vec![] } else { vec![Record::PutVolume(id, after)] }
}
