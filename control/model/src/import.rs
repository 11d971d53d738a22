//! Rebuilds desired state from what drives say of themselves. Adds what is unknown, changes nothing that is known:
//! importing twice is importing once, and a crash between is finished by importing again.

use std::collections::BTreeSet;

use penstock_api::http::{ApiError, ImportReport};
use penstock_api::id::Incarnation;
use penstock_api::rpc::{DriveLabel, ErrorCode, GroupInfo, MemberRole};
use penstock_api::{ClusterId, DriveId, DriveSpec, NodeId, VolumeName};

use crate::desired::{
    ChangeReason, Desired, DesiredChange, DesiredDoor, DesiredDrive, DesiredGroup, DesiredReplica, DesiredVolume, NOBODY, Phase, Record,
};
use crate::issuer::Identity;
use crate::observed::{Observed, ObservedVolume};
use crate::snapshots;

/// Whether this control may speak for the cluster that drives name: it is theirs already, or it has nothing of its own. Answers the
/// identity to take, if it is not taken yet; which node is which is [`crate::enroll`]'s.
pub fn adopt(desired: &Desired, cluster_id: ClusterId, node_id: NodeId) -> Result<Option<Identity>, ApiError> {
    let (cluster, node) = (cluster_id.0.parts(), node_id.0.parts());
    if cluster.cluster != node.cluster || ClusterId::of(cluster.cluster) != cluster_id || node.node.get() == 0 {
        let message = format!("node {node_id} is not of cluster {cluster_id}: the label is damaged or not ours");
        return Err(ApiError::new(ErrorCode::Invalid, message));
    }
    if NodeId::of(node.cluster, node.node) != node_id {
        return Err(ApiError::new(ErrorCode::Invalid, format!("{node_id} is not a node's id: the label is damaged or not ours")));
    }
    let found = Identity { cluster: cluster.cluster, node: node.node, incarnation: Incarnation::FIRST };
    match desired.identity {
        Some(identity) if identity.cluster_id() == cluster_id => Ok(None),
        Some(identity) if !desired.drives.is_empty() || !desired.volumes.is_empty() => {
            let message =
                format!("the drives belong to node {node_id} of cluster {cluster_id}, this control to cluster {}", identity.cluster_id());
            Err(ApiError::new(ErrorCode::Conflict, message)
                .with_hint("import into a control with an empty state directory, or remove this one's drives first"))
        }
        // What was issued under another cluster's tag cannot meet this one's ids. The first look at the drives
        // raises the incarnation above all that they show (Issuer::on_seen).
        Some(_) | None => Ok(Some(found)),
    }
}

/// A drive named for import: it carries `label`.
pub fn import_drive(desired: &Desired, spec: &DriveSpec, label: &DriveLabel, volatile: bool) -> Vec<Record> {
    match desired.drives.get(&label.drive_id) {
        // It may have moved to another place since.
        Some(drive) if drive.phase.is_present() && drive.spec == *spec => vec![],
        Some(drive) => {
            let drive = DesiredDrive { spec: spec.clone(), phase: Phase::Present, made: true, ..drive.clone() };
            vec![Record::PutDrive(label.drive_id, drive)]
        }
        None => vec![Record::PutDrive(label.drive_id, drive_as_found(label.node_id, spec, volatile))],
    }
}

pub(crate) fn drive_as_found(node_id: NodeId, spec: &DriveSpec, volatile: bool) -> DesiredDrive {
    let (stores, oplog_bytes) = (spec.stores, None);
    DesiredDrive { node_id, spec: spec.clone(), phase: Phase::Present, volatile, stores, oplog_bytes, force: false, made: true }
}

pub fn empty_report(identity: &Identity) -> ImportReport {
    ImportReport {
        cluster_id: identity.cluster_id(),
        node_id: identity.node_id(),
        drives: vec![],
        volumes: vec![],
        exports: 0,
        known: 0,
        renamed: vec![],
    }
}

/// Takes up every drive and replica that a node has open and that is unknown here. Node by node; a volume comes with the first of its
/// replicas, and the others join it as their nodes are looked at.
pub fn import_observed(
    desired: &Desired,
    node_id: NodeId,
    observed: &Observed,
    with_exports: bool,
    report: &mut ImportReport,
) -> Vec<Record> {
    let mut records = Vec::new();
    let mut drives: BTreeSet<DriveId> = BTreeSet::new();
    for (&drive_id, seen) in &observed.drives {
        match desired.drives.get(&drive_id) {
            Some(drive) if drive.phase.is_present() => {
                report.known += 1;
                drives.insert(drive_id);
            }
            Some(_) => {} // on its way out: a person wanted that
            None => {
                records.push(Record::PutDrive(drive_id, drive_as_found(node_id, &seen.spec, seen.volatile)));
                report.drives.push(drive_id);
                drives.insert(drive_id);
            }
        }
    }
    let mut names: BTreeSet<VolumeName> = desired.volumes.values().map(|volume| volume.name.clone()).collect();
    for (&volume_id, seen) in observed.volumes.iter().filter(|(_, seen)| drives.contains(&seen.drive_id)) {
        let volume = match desired.volumes.get(&volume_id) {
            Some(known) if known.replica_on(node_id).is_some() || known.group.is_none() || !known.phase.is_present() => {
                report.known += 1;
                // Where the volume is served, so that one that a follower has not heard to be removed stays removed.
                let mut known = known.clone();
                if known.phase.is_present() && seen.is_served() && snapshots::take_up(&mut known, seen) {
                    records.push(Record::PutVolume(volume_id, known));
                }
                continue;
            }
            Some(known) => known.clone(),
            None => {
                let name = free_name(names.iter(), &seen.name);
                if name != seen.name {
                    report.renamed.push(format!("{} -> {name}", seen.name));
                }
                names.insert(name.clone());
                report.volumes.push(name.clone());
                volume_as_found(name, seen)
            }
        };
        records.push(Record::PutVolume(volume_id, with_replica(volume, node_id, seen, with_exports, report)));
    }
    records
}

fn volume_as_found(name: VolumeName, seen: &ObservedVolume) -> DesiredVolume {
    DesiredVolume {
        name,
        segment_id: seen.segment_id,
        size: seen.size,
        allow_shrink: false,
        block_size: seen.block_size,
        replicas: vec![],
        change: None,
        group: seen.group.as_ref().map(|group| DesiredGroup { first: group.members.clone(), first_size: seen.size }),
        phase: Phase::Present,
        doors: vec![],
        origin: None,
        snapshots: vec![],
    }
}

fn with_replica(
    mut volume: DesiredVolume,
    node_id: NodeId,
    seen: &ObservedVolume,
    with_exports: bool,
    report: &mut ImportReport,
) -> DesiredVolume {
    let member = seen.group.as_ref().map_or(1, |group| group.member);
    let role = seen.group.as_ref().and_then(GroupInfo::own_role);
    let log_only = role == Some(MemberRole::LogOnly);
    if let (Some(group), Some(MemberRole::Learner)) = (&seen.group, role) {
        volume.change = Some(Box::new(change_as_found(group)));
    }
    let mut replica = DesiredReplica { made: true, log_only, ..DesiredReplica::first(member, seen.replica_id, node_id, seen.drive_id) };
    if volume.replicas.iter().any(|other| other.share == replica.share) {
        replica.share = volume.free_share().unwrap_or(replica.share);
    }
    volume.replicas.push(replica);
    volume.replicas.sort_by_key(|replica| replica.member);
    snapshots::take_up(&mut volume, seen);
    // Replicas that were replaced stand on nothing, and do not tell.
    volume.origin = volume.origin.or(seen.origin.map(Box::new));
    if with_exports {
        report.exports += seen.doors.len() as u32;
        volume.doors.extend(seen.doors.iter().map(|door| DesiredDoor { node_id, door: door.clone(), phase: Phase::Present }));
    }
    volume
}

/// The change that a learner came with. Whose place it was to take is not known any more: where the others are an odd number it is one too many, and goes
/// again; else one has gone already, and it becomes a voter.
fn change_as_found(learner: &GroupInfo) -> DesiredChange {
    let others = learner.members.list.iter().filter(|member| member.role != MemberRole::Learner).count();
    DesiredChange { why: ChangeReason::Replace, from: NOBODY, to: learner.member, waits: None, reach: None, is_off: others % 2 == 1 }
}

/// `name`, or the first of `name-2`, `name-3`, … that nobody has.
pub(crate) fn free_name<'a>(taken: impl Iterator<Item = &'a VolumeName>, name: &VolumeName) -> VolumeName {
    let taken: BTreeSet<&VolumeName> = taken.collect();
    if !taken.contains(name) {
        return name.clone();
    }
    let numbered = |n: usize| {
        let suffix = format!("-{n}");
        let stem: String = name.as_str().chars().take(penstock_api::name::NAME_BYTES_MAX - suffix.len()).collect();
        format!("{stem}{suffix}").parse::<VolumeName>().ok().filter(|candidate| !taken.contains(candidate))
    };
    // One of the first `taken + 1` numbers is free; a form that reads as an id is skipped.
    (2..).find_map(numbered).expect("the names in use are finite")
}
