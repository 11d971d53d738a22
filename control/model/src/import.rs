//! Rebuilds desired state from what drives say of themselves. Adds what is unknown, changes nothing that is known:
//! importing twice is importing once, and a crash between is finished by importing again.

use std::collections::BTreeSet;

use penstock_api::http::{ApiError, ImportReport};
use penstock_api::id::Incarnation;
use penstock_api::rpc::{DriveLabel, ErrorCode};
use penstock_api::{ClusterId, DriveId, DriveSpec, NodeId, VolumeName};

use crate::desired::{Desired, DesiredDoor, DesiredDrive, DesiredVolume, Phase, Record};
use crate::issuer::Identity;
use crate::observed::Observed;

/// Whether this control may speak for the cluster and node that drives name: it is theirs already, or it has
/// nothing of its own. Answers the identity to take, if it is not taken yet.
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
        Some(identity) if identity.cluster_id() == cluster_id && identity.node_id() == node_id => Ok(None),
        Some(identity) if !desired.drives.is_empty() || !desired.volumes.is_empty() => {
            let ours = identity.cluster_id();
            let message = format!(
                "the drives belong to node {node_id} of cluster {cluster_id}, this control to node {} of {ours}",
                identity.node_id()
            );
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
        None => vec![Record::PutDrive(label.drive_id, drive_as_found(spec, volatile))],
    }
}

fn drive_as_found(spec: &DriveSpec, volatile: bool) -> DesiredDrive {
    let (stores, oplog_bytes) = (spec.stores, None);
    DesiredDrive { spec: spec.clone(), phase: Phase::Present, volatile, stores, oplog_bytes, force: false, made: true }
}

/// Takes up every drive and volume that the node has open and that is unknown here.
pub fn import_observed(desired: &Desired, observed: &Observed, identity: &Identity, with_exports: bool) -> (Vec<Record>, ImportReport) {
    let mut records = Vec::new();
    let mut report = ImportReport {
        cluster_id: identity.cluster_id(),
        node_id: identity.node_id(),
        drives: vec![],
        volumes: vec![],
        exports: 0,
        known: 0,
        renamed: vec![],
    };
    let mut drives: BTreeSet<DriveId> = BTreeSet::new();
    for (&drive_id, seen) in &observed.drives {
        match desired.drives.get(&drive_id) {
            Some(drive) if drive.phase.is_present() => {
                report.known += 1;
                drives.insert(drive_id);
            }
            Some(_) => {} // on its way out: a person wanted that
            None => {
                records.push(Record::PutDrive(drive_id, drive_as_found(&seen.spec, seen.volatile)));
                report.drives.push(drive_id);
                drives.insert(drive_id);
            }
        }
    }
    let mut names: BTreeSet<VolumeName> = desired.volumes.values().map(|volume| volume.name.clone()).collect();
    for (&volume_id, seen) in &observed.volumes {
        if desired.volumes.contains_key(&volume_id) {
            report.known += 1;
            continue;
        }
        if !drives.contains(&seen.drive_id) {
            continue;
        }
        let name = free_name(&names, &seen.name);
        if name != seen.name {
            report.renamed.push(format!("{} -> {name}", seen.name));
        }
        names.insert(name.clone());
        let doors: Vec<DesiredDoor> =
            seen.doors.iter().filter(|_| with_exports).map(|door| DesiredDoor { door: door.clone(), phase: Phase::Present }).collect();
        report.exports += doors.len() as u32;
        report.volumes.push(name.clone());
        let volume = DesiredVolume {
            name,
            segment_id: seen.segment_id,
            replica_id: seen.replica_id,
            size: seen.size,
            allow_shrink: false,
            block_size: seen.block_size,
            drive_id: seen.drive_id,
            phase: Phase::Present,
            made: true,
            doors,
        };
        records.push(Record::PutVolume(volume_id, volume));
    }
    (records, report)
}

/// `name`, or the first of `name-2`, `name-3`, … that nobody has.
fn free_name(taken: &BTreeSet<VolumeName>, name: &VolumeName) -> VolumeName {
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
