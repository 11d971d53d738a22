//! How one replica takes the place of another: one step of the group's membership at a time, planned at the node that leads from the members that it
//! shows. What only the node of the one that comes can see is recorded by that node's own round.
//!
//! ```text
//! move                    make, add as learner, let it catch up, promote, remove the old one, delete it
//! replace elsewhere       make, add, let it catch up, remove the old one, promote; delete the old one when its node is there
//! replace on its node     remove the old one, delete it, make, add, let it catch up, promote
//! one that keeps the log  the same without learning: it counts at once, so that in a replacement the old one goes first
//! given up                remove the one that came, delete it
//! overtaken               delete the one that was to come
//! ```
//! It has caught up when it has applied what the leader had committed a moment ago and needs no copying. Not here: wishes (change).

use penstock_api::rpc::{GroupChangeParams, GroupInfo, GroupMember, GroupMembers, GroupPart, GroupTransferParams, MemberRole};
use penstock_api::{NodeId, VolumeId};

use crate::desired::{ChangeReason, Desired, DesiredReplica, DesiredVolume, Reach};
use crate::observed::{Observed, ObservedVolume};
use crate::reconcile::{LocalStep, NodeStep, Step};

/// Entries that a replica may be behind and still counts as being with the others: nodes are not looked at in the same moment.
pub const NEAR: u64 = 10_000;

/// What is to be done next about a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// By others: the one that comes is to be made, or to catch up.
    Wait,
    Record(LocalStep),
    Members(GroupMembers),
    /// The leader itself is to go.
    StepAside,
}

fn without(group: &GroupInfo, member: u64) -> Next {
    if group.member == member {
        return Next::StepAside;
    }
    let mut members = group.members.clone();
    members.list.retain(|other| other.member != member);
    Next::Members(members)
}

fn shares_node(group: &GroupInfo, replica: &DesiredReplica) -> bool {
    group.members.list.iter().any(|other| other.node_id == replica.node_id && other.member != replica.member)
}

/// As the leader's group stands; `None` where the volume has no change.
pub fn next(id: VolumeId, volume: &DesiredVolume, group: &GroupInfo) -> Option<Next> {
    let change = volume.change.as_ref()?;
    let (old, new) = (group.role(change.from), group.role(change.to));
    let unrecorded = |member: u64| volume.member(member).is_some_and(|replica| !replica.left);
    if change.is_off && new.is_none_or(|role| role == MemberRole::Learner) {
        return Some(match new {
            Some(_) => without(group, change.to),
            None if old.is_none() && unrecorded(change.from) => Next::Record(LocalStep::ReplicaLeft(id, change.from)),
            None if unrecorded(change.to) => Next::Record(LocalStep::ReplicaLeft(id, change.to)),
            None => Next::Record(LocalStep::ChangeEnded(id, change.to)),
        });
    }
    // A recovery by force came between, after which its number is none any more.
    if new.is_none() && group.members.next > change.to {
        let step = if unrecorded(change.to) { LocalStep::ReplicaLeft(id, change.to) } else { LocalStep::ChangeEnded(id, change.to) };
        return Some(Next::Record(step));
    }
    if old.is_none() && unrecorded(change.from) {
        return Some(Next::Record(LocalStep::ReplicaLeft(id, change.from)));
    }
    Some(match (new, old) {
        (None, _) => match volume.member(change.to).or(change.waits.as_ref()) {
            // They share a node, which can have one member. And what keeps the log alone counts at once, which may not be beside one that is lost.
            Some(replica) if old.is_some() && (shares_node(group, replica) || replica.log_only && change.why == ChangeReason::Replace) => {
                without(group, change.from)
            }
            Some(replica) if replica.made => Next::Members(joined_by(&group.members, replica)),
            _ => Next::Wait,
        },
        (Some(now @ (MemberRole::Learner | MemberRole::LogOnly)), _) => match change.reach {
            Some(reach) if !reach.is_reached => Next::Wait,
            Some(reach) if group.committed.saturating_sub(reach.index) <= NEAR => match (now, old, change.why) {
                (MemberRole::Learner, Some(_), ChangeReason::Replace) | (MemberRole::LogOnly, Some(_), _) => without(group, change.from),
                (MemberRole::LogOnly, None, _) => Next::Record(LocalStep::ChangeEnded(id, change.to)),
                _ => Next::Members(promoted(&group.members, change.to)),
            },
            // It took so long that as much has come since.
            _ => Next::Record(LocalStep::ReachSet(id, change.to, group.committed)),
        },
        (Some(_), Some(_)) => without(group, change.from),
        (Some(_), None) => Next::Record(LocalStep::ChangeEnded(id, change.to)),
    })
}

/// The node that leads a volume's group, as far as the nodes that are there say: of two that believe it, the one of the later term.
pub fn leader<'a>(
    id: VolumeId,
    volume: &DesiredVolume,
    observed: impl Fn(NodeId) -> Option<&'a Observed>,
) -> Option<(NodeId, &'a GroupInfo)> {
    let there = volume.replicas.iter().filter_map(|replica| {
        let group = observed(replica.node_id)?.volumes.get(&id)?.group.as_ref().filter(|group| group.serves)?;
        Some((replica.node_id, group))
    });
    there.max_by_key(|(_, group)| group.term)
}

/// With one more, of the number that its desired replica has: a learner, or one that keeps the log alone.
pub fn joined_by(members: &GroupMembers, replica: &DesiredReplica) -> GroupMembers {
    let mut members = members.clone();
    let DesiredReplica { member, replica_id, node_id, .. } = *replica;
    members.list.retain(|other| other.node_id != node_id);
    let role = if replica.log_only { MemberRole::LogOnly } else { MemberRole::Learner };
    members.list.push(GroupMember { member, role, replica_id, node_id });
    members.next = member + 1;
    members
}

fn promoted(members: &GroupMembers, member: u64) -> GroupMembers {
    let mut members = members.clone();
    members.list.iter_mut().filter(|other| other.member == member).for_each(|other| other.role = MemberRole::Voter);
    members
}

/// Whether the leader's node hears the node of a voter, or is it, and the drive of that stays: of those it can be sure.
fn is_sure(desired: &Desired, volume: &DesiredVolume, group: &GroupInfo, observed: &Observed, voter: &GroupMember) -> bool {
    let drive = volume.member(voter.member).map(|replica| desired.drives.get(&replica.drive_id));
    let stays = drive.is_none_or(|drive| drive.is_some_and(|drive| drive.phase.is_present()));
    stays && (voter.member == group.member || observed.connected.contains(&voter.node_id))
}

/// The steps at the node of a replica that is there: the leader's about the group, and the joining one's about itself.
pub(crate) fn plan(
    desired: &Desired,
    observed: &Observed,
    (id, volume): (VolumeId, &DesiredVolume),
    replica: &DesiredReplica,
    seen: &ObservedVolume,
    steps: &mut Vec<Step>,
) {
    let (Some(change), Some(group)) = (&volume.change, &seen.group) else { return };
    if group.serves {
        let voters = |but: u64| group.members.list.iter().filter(move |voter| voter.role != MemberRole::Learner && voter.member != but);
        let is_sure = |voter: &&GroupMember| is_sure(desired, volume, group, observed, voter);
        // More may have been lost since the wish was judged: then the one that goes is needed.
        let is_spared = |member: u64| voters(member).filter(is_sure).count() > voters(member).count() / 2;
        match next(id, volume, group) {
            None | Some(Next::Wait) => {}
            Some(Next::Record(step)) => steps.push(Step::Local(step)),
            Some(Next::Members(members)) => {
                let leaves = voters(0).find(|voter| members.list.iter().all(|stays| stays.member != voter.member));
                if leaves.is_none_or(|voter| is_spared(voter.member)) {
                    steps.push(Step::Node(NodeStep::ChangeMembers(GroupChangeParams { volume_id: id, members })));
                }
            }
            // To the one that comes last, since hosts may not have found its door yet.
            Some(Next::StepAside) if is_spared(group.member) => {
                let others = voters(group.member).filter(|other| other.role == MemberRole::Voter).filter(is_sure);
                // And to one that may be gone (on memory, or that no drive told of) only where there is no other.
                let is_risky = |other: &GroupMember| {
                    volume.member(other.member).and_then(|to| desired.drives.get(&to.drive_id)).is_none_or(|drive| drive.volatile)
                };
                let heir = others.min_by_key(|other| (is_risky(other), other.member == change.to, other.member));
                let aside = heir.map(|heir| NodeStep::StepAside(GroupTransferParams { volume_id: id, to: heir.node_id }));
                steps.extend(aside.map(Step::Node));
            }
            Some(Next::StepAside) => {}
        }
    }
    if let Some(Reach { index, is_reached: false }) = change.reach.filter(|_| change.to == replica.member)
        && group.applied >= index
        && group.rebuild.is_none()
        && !matches!(group.part, GroupPart::Stopped | GroupPart::Doubtful)
    {
        steps.push(Step::Local(LocalStep::Reached(id, change.to, index)));
    }
}
