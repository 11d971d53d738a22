//! A volume that has lost the majority of its replicas for good: which of those that are left may go on alone, and what is lost with the others.
//!
//! The node that is asked looks itself whether a quorum answers; this is for people, before. Nothing here is desired state: the group's members are its
//! log's to tell, and the replicas that it has no more stay here until they are replaced.

use std::collections::BTreeMap;

use penstock_api::http::{ApiError, LeftView};
use penstock_api::rpc::{ErrorCode, GroupInfo, MemberRole};
use penstock_api::{NodeId, VolumeId};

use crate::change::present_volume;
use crate::desired::{Desired, DesiredVolume};
use crate::membership::leader;
use crate::observed::Observed;

/// Who would go on, and what is known of each replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    pub volume_id: VolumeId,
    pub survivor: NodeId,
    pub replicas: Vec<LeftView>,
    /// It goes on alone already.
    pub is_done: bool,
}

/// Of a volume that is to have several replicas, its group has this one.
fn is_alone(volume: &DesiredVolume, group: &GroupInfo) -> bool {
    group.members.list.len() == 1 && volume.replicas.len() > 1
}

/// Whether a replica serves the volume alone.
pub fn is_recovered(desired: &Desired, observed: &BTreeMap<NodeId, &Observed>, id: VolumeId) -> bool {
    let served = desired.volumes.get(&id).map(|volume| (volume, leader(id, volume, |node_id| observed.get(&node_id).copied())));
    served.is_some_and(|(volume, leader)| leader.is_some_and(|(_, group)| is_alone(volume, group)))
}

fn group<'a>(observed: &BTreeMap<NodeId, &'a Observed>, id: VolumeId, node_id: NodeId) -> Option<&'a GroupInfo> {
    observed.get(&node_id).copied()?.volumes.get(&id)?.group.as_ref()
}

/// Judges whether the volume may go on with the replica on `on`; where nothing is said, with the only one that is left and well. `regardless`: one that is
/// stopped or in doubt may be named too.
pub fn recover(
    desired: &Desired,
    observed: &BTreeMap<NodeId, &Observed>,
    name_or_id: &str,
    on: Option<&str>,
    regardless: bool,
) -> Result<Recovery, ApiError> {
    let (id, volume) = present_volume(desired, name_or_id)?;
    let name = |node_id: NodeId| desired.node_name(node_id);
    let names = |nodes: &[NodeId]| nodes.iter().map(|node_id| name(*node_id)).collect::<Vec<_>>().join(", ");
    if volume.group.is_none() {
        let message = format!("volume {} has one replica: there are no others that it could go on without", volume.name);
        return Err(ApiError::new(ErrorCode::Invalid, message).with_hint("see `penstock volume show` for what is in its way"));
    }
    let asked = on.map(|text| place(desired, volume, text)).transpose()?;
    if let Some((node_id, group)) = leader(id, volume, |node_id| observed.get(&node_id).copied()) {
        if is_alone(volume, group) && asked.is_none_or(|asked| asked == node_id) {
            return Ok(Recovery { volume_id: id, survivor: node_id, replicas: left(desired, observed, id, volume), is_done: true });
        }
        let message = format!("volume {} is served, node {} leads: nothing has to be recovered", volume.name, name(node_id));
        let hint = format!("replicas that are lost are replaced: penstock replica replace {} NODE", volume.name);
        return Err(ApiError::new(ErrorCode::Conflict, message).with_hint(hint));
    }
    let there: Vec<(NodeId, &GroupInfo)> = volume
        .replicas
        .iter()
        .filter(|replica| !replica.left)
        .filter_map(|replica| Some((replica.node_id, group(observed, id, replica.node_id)?)))
        .collect();
    let well: Vec<NodeId> = there.iter().filter(|(_, group)| group.is_well()).map(|(node_id, _)| *node_id).collect();
    for (_, group) in there.iter().filter(|(_, group)| group.is_well()) {
        let voters = group.members.list.iter().filter(|member| member.role != MemberRole::Learner);
        let (heard, lost): (Vec<_>, Vec<_>) = voters.map(|member| member.node_id).partition(|node_id| well.contains(node_id));
        if heard.len() > lost.len() {
            let message = format!("volume {} has its quorum: the replicas on {} are there", volume.name, names(&heard));
            let hint =
                "they elect a leader within seconds; if they do not, see whether these nodes hear each other: `penstock node show NODE`";
            return Err(ApiError::new(ErrorCode::Conflict, message).with_hint(hint));
        }
    }
    let may: Vec<(NodeId, &GroupInfo)> = there.into_iter().filter(|(_, group)| group.own_role() == Some(MemberRole::Voter)).collect();
    let survivor = match (asked, may.iter().filter(|(_, group)| group.is_well()).collect::<Vec<_>>().as_slice()) {
        (Some(asked), _) => match may.iter().find(|(node_id, _)| *node_id == asked) {
            Some((_, group)) if group.is_well() || regardless => asked,
            Some((_, group)) => {
                let why = group.reason.clone().unwrap_or_else(|| format!("it is {}", group.part.word()));
                let message = format!("what the replica of volume {} on node {} has is in question: {why}", volume.name, name(asked));
                let hint = "recover at another replica; if none is left, --regardless takes this one all the same";
                return Err(ApiError::new(ErrorCode::Conflict, message).with_hint(hint));
            }
            None => {
                let message = format!("the replica of volume {} on node {} is not there, or holds no data", volume.name, name(asked));
                return Err(
                    ApiError::new(ErrorCode::NotReady, message).with_hint("start that node, or name another: see `penstock replica ls`")
                );
            }
        },
        (None, [only]) => only.0,
        (None, []) => {
            let message = format!("no replica of volume {} is there and well", volume.name);
            let hint = if may.is_empty() {
                "start the penstockd of a node that has one".to_owned()
            } else {
                let there: Vec<NodeId> = may.iter().map(|(node_id, _)| *node_id).collect();
                format!("mend or start another first; if none can be, name one of {} with --on and add --regardless", names(&there))
            };
            return Err(ApiError::new(ErrorCode::NotReady, message).with_hint(hint));
        }
        (None, several) => {
            // Of two logs the one that ends in the later term has more, and else the longer one.
            let log = |group: &GroupInfo| format!("to entry {} in term {}", group.last, group.last_term);
            let each: Vec<String> = several.iter().map(|(node_id, group)| format!("{} ({})", name(*node_id), log(group))).collect();
            let most = several.iter().max_by_key(|(_, group)| (group.last_term, group.last)).expect("there are several");
            let message = format!("several replicas of volume {} are left: {}", volume.name, each.join(", "));
            let hint = format!("one goes on alone: --on {} has most", name(most.0));
            return Err(ApiError::new(ErrorCode::Invalid, message).with_hint(hint));
        }
    };
    Ok(Recovery { volume_id: id, survivor, replicas: left(desired, observed, id, volume), is_done: false })
}

fn place(desired: &Desired, volume: &DesiredVolume, text: &str) -> Result<NodeId, ApiError> {
    let by_id = || text.parse::<NodeId>().ok();
    let found = desired.find_node(text).map(|(id, _)| id).or_else(by_id).filter(|id| volume.replica_on(*id).is_some());
    found.ok_or_else(|| {
        let on: Vec<String> = volume.replicas.iter().map(|replica| desired.node_name(replica.node_id)).collect();
        ApiError::new(ErrorCode::NotFound, format!("volume {} has no replica on a node {text}", volume.name))
            .with_hint(format!("it has replicas on {}", on.join(", ")))
    })
}

fn left(desired: &Desired, observed: &BTreeMap<NodeId, &Observed>, id: VolumeId, volume: &DesiredVolume) -> Vec<LeftView> {
    let view = |replica: &crate::DesiredReplica| {
        let found = group(observed, id, replica.node_id);
        let absent = || match observed.contains_key(&replica.node_id) {
            true => "its node is there and does not have it",
            false => "its node is away",
        };
        LeftView {
            member: replica.member,
            node_id: replica.node_id,
            node: desired.node_name(replica.node_id),
            part: found.map(|group| group.part),
            last: found.map(|group| group.last),
            committed: found.map(|group| group.committed),
            reason: found.map_or_else(|| Some(absent().to_owned()), |group| group.reason.clone()),
        }
    };
    volume.replicas.iter().map(view).collect()
}
