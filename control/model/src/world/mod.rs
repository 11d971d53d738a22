//! Tests: a control and three nodes in one small world, driven by random wishes, crashes and refusals, against the rule
//! that once the trouble stops, desired and observed agree, nothing was lost that nobody removed, and no id came
//! twice, and no step of a group's membership is one that a group cannot take.

mod event;
mod group;
mod loss;
mod node;
mod tests;

use core::net::SocketAddr;
use std::collections::{BTreeMap, BTreeSet};

use penstock_api::id::{ClusterTag, Id, Incarnation, NodeNumber};
use penstock_api::rpc::{DriveState, ErrorCode, GroupMember, MemberRole, RpcError};
use penstock_api::{DriveId, NodeId, VolumeId};

use crate::change;
use crate::clones::clones_of;
use crate::desired::{Desired, DesiredNode, DesiredReplica, DesiredVolume};
use crate::issuer::{Identity, Issuer, Mark, Take};
use crate::observed::{Observed, ObservedSnapshot, ObservedVolume};
use crate::reconcile::{NodeStep, Step, reconcile};
use node::Node;

struct World {
    /// Control's disk and, being in step with it, its memory.
    desired: Desired,
    mark: Option<Mark>,
    issuer: Issuer,
    issued: BTreeSet<Id>,
    nodes: BTreeMap<NodeId, Node>,
    /// Replicas that were settled once and that nobody removed since: they must be there in the end.
    kept: BTreeSet<(VolumeId, NodeId)>,
    groups: BTreeMap<VolumeId, group::Log>,
    /// Control was rebuilt from drives: a member whose drive was away then is not known any more.
    has_imported: bool,
    /// Replicas that somebody deleted at their node.
    wiped: BTreeSet<(VolumeId, NodeId)>,
}

const NODES: u16 = 4;

fn identity() -> Identity {
    let (cluster, node) = (ClusterTag::new(7).unwrap(), NodeNumber::new(1).unwrap());
    Identity { cluster, node, incarnation: Incarnation::FIRST }
}

fn node_id(n: u16) -> NodeId {
    NodeId::of(identity().cluster, NodeNumber::new(1 + n % NODES).unwrap())
}

fn named() -> BTreeMap<NodeId, DesiredNode> {
    let address = |port| Some(SocketAddr::from(([127, 0, 0, 1], port)));
    let named = |n| DesiredNode { name: format!("n{n}").parse().unwrap(), peer: address(7700 + n), nvmf: address(4420 + n), gone: false };
    (0..NODES).map(|n| (node_id(n), named(n))).collect()
}

impl World {
    fn new() -> Self {
        let desired = Desired { identity: Some(identity()), nodes: named(), ..Desired::default() };
        let issuer = Issuer::open(identity(), None);
        let nodes = (0..NODES).map(|n| (node_id(n), Node::default())).collect();
        Self {
            desired,
            mark: None,
            issuer,
            issued: BTreeSet::new(),
            nodes,
            kept: BTreeSet::new(),
            groups: BTreeMap::new(),
            has_imported: false,
            wiped: BTreeSet::new(),
        }
    }

    fn observe(&self, node_id: NodeId) -> Observed {
        let mut observed = self.nodes[&node_id].observe();
        self.show_groups(node_id, &mut observed.volumes);
        observed
    }

    fn observe_all(&self) -> BTreeMap<NodeId, Observed> {
        self.nodes.keys().map(|id| (*id, self.observe(*id))).collect()
    }

    fn call(&mut self, node_id: NodeId, step: &NodeStep) -> Result<(), RpcError> {
        let of_the_log = match step {
            NodeStep::ResizeVolume(params) => Some(params.volume_id),
            NodeStep::TakeSnapshot(params) => Some(params.volume_id),
            NodeStep::RemoveSnapshot(params) => Some(params.volume_id),
            _ => None,
        };
        if let Some(id) = of_the_log
            && self.observe(node_id).volumes.get(&id).is_none_or(|seen| !seen.is_served())
        {
            return Err(RpcError::new(ErrorCode::NotReady, "it is not served here"));
        }
        let stands_on = match step {
            NodeStep::DeleteVolume(params)
                if self.desired.volumes.get(&params.volume_id).is_some_and(|volume| !volume.phase.is_present()) =>
            {
                Some((params.volume_id, None))
            }
            NodeStep::RemoveSnapshot(params) => Some((params.volume_id, Some(params.snapshot_id))),
            _ => None,
        };
        if let Some((id, snapshot)) = stands_on {
            assert!(clones_of(&self.desired, id, snapshot).is_empty(), "{step:?} under a clone");
        }
        let known = |world: &Self, id| {
            let there = world.nodes.values().flat_map(|node| node.media.values()).find_map(|m| m.volumes.get(&id));
            there.map(|volume| (volume.size, volume.snapshots.clone()))
        };
        let (changed, content) = match step {
            NodeStep::ResizeVolume(params) => {
                (params.volume_id, known(self, params.volume_id).map(|(_, snapshots)| (params.size_bytes, snapshots)))
            }
            NodeStep::CreateMember(params) => (params.volume_id, known(self, params.volume_id)),
            NodeStep::TakeSnapshot(params) => {
                self.everywhere(params.volume_id, |volume| {
                    if !volume.has_snapshot(params.snapshot_id) {
                        volume.snapshots.push(ObservedSnapshot {
                            snapshot_id: params.snapshot_id,
                            name: params.name.clone(),
                            size: volume.size,
                        });
                    }
                });
                return Ok(());
            }
            NodeStep::RemoveSnapshot(params) => {
                self.everywhere(params.volume_id, |volume| volume.snapshots.retain(|seen| seen.snapshot_id != params.snapshot_id));
                return Ok(());
            }
            NodeStep::ChangeMembers(params) => return self.change_members(node_id, params.volume_id, &params.members),
            NodeStep::StepAside(params) => return self.step_aside(node_id, params.volume_id, params.to),
            _ => return self.nodes.get_mut(&node_id).unwrap().call(step),
        };
        self.nodes.get_mut(&node_id).unwrap().call(step)?;
        if let NodeStep::CreateMember(params) = step {
            self.found_group(params.volume_id, &params.members);
            self.wiped.remove(&(params.volume_id, node_id));
        }
        if let Some((size, snapshots)) = content {
            self.everywhere(changed, |volume| (volume.size, volume.snapshots) = (size, snapshots.clone()));
        }
        Ok(())
    }

    /// By the group's log, wherever a member is.
    fn everywhere(&mut self, id: VolumeId, change: impl FnMut(&mut ObservedVolume)) {
        let media = self.nodes.values_mut().flat_map(|node| node.media.values_mut());
        media.filter_map(|medium| medium.volumes.get_mut(&id)).for_each(change);
    }

    fn id(&mut self) -> Id {
        loop {
            match self.issuer.take(1).unwrap() {
                Take::Reserve(mark) => {
                    self.mark = Some(mark);
                    self.issuer.on_durable(mark);
                }
                Take::Issued(ids) => {
                    assert!(self.issued.insert(ids[0]), "{} issued twice", ids[0]);
                    return ids[0];
                }
            }
        }
    }

    fn commit(&mut self, judged: change::Judged) {
        // A refused wish changes nothing.
        if let Ok(records) = judged {
            self.desired.apply(&records);
        }
    }

    /// One round of reconciling at one node, of which the first `upto` steps happen before a crash. Answers how many there were.
    fn round(&mut self, node_id: NodeId, upto: usize, lost_answer: bool) -> usize {
        self.catch_up(node_id);
        let observed = self.observe(node_id);
        for id in observed.ids() {
            if let Some(mark) = self.issuer.on_seen(id).unwrap() {
                self.mark = Some(mark);
                self.issuer.on_durable(mark);
            }
        }
        let plan = reconcile(&self.desired, node_id, &observed);
        assert_eq!(plan, reconcile(&self.desired, node_id, &observed), "not deterministic");
        assert_eq!(plan.blocked, None);
        assert!(plan.lost.iter().all(|id| self.is_forgetful(*id, node_id)), "lost {:?}", plan.lost);
        let mut in_vain = 0;
        for (at, step) in plan.steps.iter().take(upto).enumerate() {
            match step {
                Step::Local(local) => {
                    let records = local.records(&self.desired);
                    self.desired.apply(&records);
                }
                Step::Node(step) => {
                    let first = self.call(node_id, step);
                    in_vain += usize::from(self.may_fail_for_ever(node_id, step, &first));
                    // Done at the node, but the answer never came: the step happens once more.
                    if lost_answer && at + 1 == upto && !matches!(step, NodeStep::StepAside(_)) {
                        assert_eq!(self.call(node_id, step).is_ok(), first.is_ok(), "{step:?} is not idempotent");
                    }
                }
            }
        }
        self.remember_kept();
        plan.steps.len() - in_vain
    }

    fn may_fail_for_ever(&self, node_id: NodeId, step: &NodeStep, answer: &Result<(), RpcError>) -> bool {
        match step {
            // Of a group that has lost its majority.
            NodeStep::ChangeMembers(_) => answer.is_err(),
            // To one that was lost after the wish.
            NodeStep::StepAside(params) => self.leads(params.volume_id) == Some(node_id),
            _ => false,
        }
    }

    /// A member on memory, which is not made anew when it is gone, or one that was deleted.
    fn is_forgetful(&self, id: VolumeId, node_id: NodeId) -> bool {
        let replica = self.desired.volumes[&id].replica_on(node_id).expect("planned here");
        self.wiped.contains(&(id, node_id)) || self.is_volatile(replica.drive_id)
    }

    fn is_volatile(&self, id: DriveId) -> bool {
        self.desired.drives.get(&id).is_some_and(|drive| drive.volatile)
    }

    fn remember_kept(&mut self) {
        let mut kept = BTreeSet::new();
        for (id, volume) in &self.desired.volumes {
            for replica in &volume.replicas {
                let serving = self.desired.drives.get(&replica.drive_id).is_some_and(|drive| drive.phase.is_present() && !drive.volatile);
                let goes = replica.left || volume.change.as_ref().is_some_and(|change| [change.from, change.to].contains(&replica.member));
                let is_there = !goes && !self.wiped.contains(&(*id, replica.node_id));
                if replica.made && volume.phase.is_present() && serving && is_there {
                    kept.insert((*id, replica.node_id));
                }
            }
        }
        self.kept = kept;
    }

    fn converge(&mut self) {
        let nodes: Vec<NodeId> = self.nodes.keys().copied().collect();
        for _ in 0..40 {
            let steps: usize = nodes.iter().map(|id| self.round(*id, usize::MAX, false)).sum();
            if steps == 0 {
                return;
            }
        }
        let left: Vec<_> = nodes.iter().map(|id| reconcile(&self.desired, *id, &self.observe(*id)).steps).collect();
        panic!("forty quiet rounds and still {left:?}");
    }

    fn assert_agreed(&self) {
        let observed = self.observe_all();
        for (id, drive) in &self.desired.drives {
            assert!(drive.phase.is_present() && drive.made, "{drive:?}");
            assert_eq!(observed[&drive.node_id].drives[id].state, DriveState::Serving);
        }
        assert!(observed.values().flat_map(|seen| seen.drives.keys()).all(|id| self.desired.drives.contains_key(id)));
        for (id, volume) in &self.desired.volumes {
            assert!(volume.phase.is_present(), "{volume:?}");
            // Its drive was taken away, or forgot it, or it was deleted there: the others go on.
            let is_gone = |replica: &DesiredReplica| {
                let is_away = self.desired.drives.get(&replica.drive_id).is_none_or(|drive| drive.volatile);
                // Memory that forgot it forgot what it stands on too.
                let is_made_anew = volume.group.is_none() && volume.origin.is_none();
                let is_lost = !is_made_anew && (is_away || self.wiped.contains(&(*id, replica.node_id)));
                // A clone that came after what it was to stand on had gone.
                let is_late = volume.origin.is_some() && !replica.made;
                (is_lost || is_late) && !self.is_open(replica.node_id, *id)
            };
            let has_majority = !self.groups.contains_key(id) || self.has_majority(*id);
            if has_majority && !volume.replicas.iter().any(is_gone) {
                self.assert_changed(*id, volume);
            }
            for replica in volume.replicas.iter().filter(|replica| !is_gone(replica)) {
                let Some(seen) = observed[&replica.node_id].volumes.get(id) else {
                    assert!(!replica.made && volume.change.is_some(), "{volume:?}");
                    continue; // others are gone, so it may never come to be a member
                };
                assert!(replica.made, "{volume:?}");
                assert_eq!(seen.drive_id, replica.drive_id);
                assert!(seen.size == volume.size || !has_majority, "{seen:?} {volume:?}");
                let doors = volume.doors.iter().filter(|desired| desired.node_id == replica.node_id && volume.is_founded());
                assert_eq!(seen.doors, doors.map(|desired| desired.door.clone()).collect());
                assert!(!volume.allow_shrink || observed.values().all(|seen| seen.volumes.get(id).is_none_or(|seen| !seen.is_served())));
            }
        }
        for (id, volume) in &self.desired.volumes {
            let served = observed.values().filter_map(|seen| seen.volumes.get(id)).find(|seen| seen.is_served());
            let is_forgetful = volume.replicas.iter().any(|replica| self.is_volatile(replica.drive_id));
            let Some(seen) = served.filter(|_| !is_forgetful) else { continue };
            assert!(volume.snapshots.iter().all(|known| known.made && known.phase.is_present()), "{volume:?}");
            assert!(
                volume.snapshots.iter().map(|known| known.snapshot_id).eq(seen.snapshots.iter().map(|seen| seen.snapshot_id)),
                "{volume:?} {seen:?}"
            );
        }
        for (id, node_id) in &self.kept {
            assert!(observed[node_id].volumes.contains_key(id), "{id} on {node_id} was kept by nobody's wish but is gone");
        }
    }

    /// No replica is on its way, and the group has those that are desired, all of them voters.
    fn assert_changed(&self, id: VolumeId, volume: &DesiredVolume) {
        assert_eq!(volume.change, None);
        assert!(volume.replicas.iter().all(|replica| !replica.left), "{volume:?}");
        let Some(log) = self.groups.get(&id).filter(|_| volume.group.is_some()) else { return };
        let known = |member: &&GroupMember| !self.has_imported || volume.member(member.member).is_some();
        let members: Vec<_> = log.members.list.iter().filter(known).map(|member| (member.member, member.node_id, member.role)).collect();
        let desired: Vec<_> = volume.replicas.iter().map(|replica| (replica.member, replica.node_id, MemberRole::Voter)).collect();
        assert_eq!(members, desired);
    }

    fn drive(&self, pick: usize) -> Option<DriveId> {
        self.desired.drives.keys().nth(pick % self.desired.drives.len().max(1)).copied()
    }

    fn name(&self, pick: usize) -> Option<String> {
        self.desired.volumes.values().nth(pick % self.desired.volumes.len().max(1)).map(|volume| volume.name.to_string())
    }

    fn volatile_places(&self, node_id: NodeId) -> Vec<String> {
        let drives = self.desired.drives.values().filter(|drive| drive.node_id == node_id && drive.volatile);
        drives.map(|drive| drive.spec.place()).collect()
    }
}
