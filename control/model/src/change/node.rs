//! Nodes that are lost for good.

use std::collections::BTreeMap;

use penstock_api::http::ApiError;
use penstock_api::rpc::ErrorCode;
use penstock_api::{NodeId, ReplicaId, VolumeId, VolumeName};

use super::{not_found, replace_replica};
use crate::desired::{Desired, DesiredNode, DesiredVolume, Record};
use crate::observed::Observed;
use crate::reconcile::LocalStep;

/// What goes with a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Farewell {
    pub node_id: NodeId,
    pub records: Vec<Record>,
    /// Volumes whose replica there is replaced elsewhere.
    pub replaced: Vec<VolumeName>,
}

/// How many replicas would be replaced with a node.
pub fn replicas_on(desired: &Desired, name_or_id: &str) -> usize {
    let Some((node_id, _)) = desired.find_node(name_or_id) else { return 0 };
    desired.volumes.values().filter(|volume| volume.replica_on(node_id).is_some()).count()
}

/// A node that is away leaves the cluster. With `force` though it has something: its drives are forgotten, and the replicas on them are replaced on other
/// nodes, each with one of `ids`; all of them or nothing.
pub fn remove_node(
    desired: &Desired,
    observed: &BTreeMap<NodeId, &Observed>,
    ids: &[ReplicaId],
    name_or_id: &str,
    force: bool,
) -> Result<Farewell, ApiError> {
    let (node_id, node) =
        desired.find_node(name_or_id).ok_or_else(|| not_found(&format!("node {name_or_id}"), "see `penstock node ls`"))?;
    let name = &node.name;
    if observed.contains_key(&node_id) {
        let error = ApiError::new(ErrorCode::Conflict, format!("node {name} is there"));
        return Err(error.with_hint(format!(
            "`penstock replica move VOLUME {name} NODE` and `penstock pool rm DRIVE` empty it; then stop its penstockd, and it can be removed"
        )));
    }
    let there: Vec<(VolumeId, &DesiredVolume)> =
        desired.volumes.iter().filter(|(_, volume)| volume.replica_on(node_id).is_some()).map(|(id, volume)| (*id, volume)).collect();
    let drives: Vec<_> = desired.drives.iter().filter(|(_, drive)| drive.node_id == node_id).map(|(id, _)| *id).collect();
    let is_empty = there.is_empty() && drives.is_empty();
    if !is_empty && !force {
        let message = format!("node {name} is away and has {} drives with replicas of {} volumes", drives.len(), there.len());
        return Err(ApiError::new(ErrorCode::Busy, message)
            .with_hint("start it again; if it is lost for good, --force forgets its drives and replaces its replicas on other nodes"));
    }
    let only: Vec<&str> = there
        .iter()
        .filter(|(_, volume)| volume.group.is_none() && volume.phase.is_present())
        .map(|(_, volume)| volume.name.as_str())
        .collect();
    if !only.is_empty() {
        let message = format!("volumes have their only replica on node {name}: {}", only.join(", "));
        let hint = "their data are lost with it: `penstock volume rm VOLUME --force --timeout 0` gives each of them up, then ask again";
        return Err(ApiError::new(ErrorCode::Busy, message).with_hint(hint));
    }
    let mut ids = ids.iter();
    let (mut after, mut records, mut replaced) = (desired.clone(), Vec::new(), Vec::new());
    for (id, volume) in there {
        // The next one may wait there for the old one to be deleted.
        let waits = volume.change.as_ref().and_then(|change| change.waits.as_ref()).is_some_and(|waits| waits.node_id == node_id);
        let has_left = !waits && volume.replica_on(node_id).is_some_and(|replica| replica.left);
        let more = match (volume.phase.is_present(), has_left) {
            (true, false) => {
                let id = ids.next().ok_or_else(|| ApiError::new(ErrorCode::Busy, "volumes changed meanwhile").with_hint("ask again"))?;
                replaced.push(volume.name.clone());
                replace_replica(&after, observed, *id, volume.name.as_str(), (name.as_str(), None), None).map_err(|error| {
                    let message = format!("node {name} cannot be removed yet: {}", error.message);
                    ApiError { message, ..error }
                })?
            }
            // Those that are gone from their group already, or go with their volume.
            _ => LocalStep::ForgetReplica(id, node_id).records(&after),
        };
        after.apply(&more);
        records.extend(more);
    }
    records.extend(drives.into_iter().map(Record::DropDrive));
    // Its number is never another's.
    records.push(Record::PutNode(node_id, DesiredNode { gone: true, ..node.clone() }));
    Ok(Farewell { node_id, records, replaced })
}
