//! The groups of the world: the truth of each one's log, as far as control can see it. Whoever of its voters is open first leads, unless it stepped
//! aside for another; what is decided needs a majority that is open. Each step of the membership is judged here.

use std::collections::BTreeMap;

use penstock_api::rpc::{ErrorCode, GroupMember, GroupMembers, GroupPart, MemberRole, RpcError};
use penstock_api::{NodeId, VolumeId};

use super::World;
use crate::membership::NEAR;

/// Entries that hosts add while a node is looked at.
const GROWTH: u64 = 1000;

#[derive(Clone, Debug)]
pub(super) struct Log {
    pub members: GroupMembers,
    pub committed: u64,
    /// Who was asked to lead last.
    heir: Option<NodeId>,
}

fn voters(log: &Log) -> impl Iterator<Item = &GroupMember> {
    log.members.list.iter().filter(|member| member.role == MemberRole::Voter)
}

impl World {
    pub(super) fn is_open(&self, node_id: NodeId, id: VolumeId) -> bool {
        self.nodes[&node_id].observe().volumes.contains_key(&id)
    }

    /// Those that are there: a node may hold another member than the one that counts on it.
    fn open_voters<'a>(&self, id: VolumeId, log: &'a Log) -> impl Iterator<Item = NodeId> + use<'a, '_> {
        let shows = move |node_id: NodeId| self.nodes[&node_id].observe().volumes.get(&id)?.group.as_ref().map(|group| group.member);
        voters(log).filter(move |voter| shows(voter.node_id) == Some(voter.member)).map(|voter| voter.node_id)
    }

    pub(super) fn has_majority(&self, id: VolumeId) -> bool {
        let log = &self.groups[&id];
        self.open_voters(id, log).count() > voters(log).count() / 2
    }

    pub(super) fn leads(&self, id: VolumeId) -> Option<NodeId> {
        let log = self.groups.get(&id).filter(|_| self.has_majority(id))?;
        let heir = self.open_voters(id, log).find(|node| log.heir == Some(*node));
        heir.or_else(|| self.open_voters(id, log).min())
    }

    /// What the members on a node show of their group.
    pub(super) fn show_groups(&self, node_id: NodeId, volumes: &mut BTreeMap<VolumeId, crate::observed::ObservedVolume>) {
        for (id, volume) in volumes {
            let (Some(group), Some(log)) = (&mut volume.group, self.groups.get(id)) else { continue };
            group.serves = self.leads(*id) == Some(node_id);
            group.term = 1;
            // Whoever is removed hears of nothing any more.
            if let Some(own) = log.members.list.iter().find(|member| member.member == group.member) {
                group.part = if own.role == MemberRole::Learner { GroupPart::Learner } else { GroupPart::Follower };
                group.leader = self.leads(*id);
                group.members = log.members.clone();
            }
            if group.serves {
                (group.part, group.committed) = (GroupPart::Leader, log.committed);
            }
        }
    }

    /// Time goes by at a node: its members hear from their leaders.
    pub(super) fn catch_up(&mut self, node_id: NodeId) {
        let led: Vec<(VolumeId, u64)> =
            self.groups.keys().filter(|id| self.leads(**id).is_some()).map(|id| (*id, self.groups[id].committed)).collect();
        for (id, committed) in led {
            let is_member = self.groups[&id].members.list.iter().any(|member| member.node_id == node_id);
            let group = self.nodes.get_mut(&node_id).unwrap().volume(id).and_then(|volume| volume.group.as_mut());
            if let Some(group) = group.filter(|_| is_member) {
                group.applied = committed;
            }
            self.groups.get_mut(&id).unwrap().committed += GROWTH;
        }
    }

    /// Deletes a replica at its node, if all others of its group are whole and stay as they are.
    pub(super) fn wipe(&mut self, pick: usize, node_id: NodeId) {
        let Some((id, volume)) = self.name(pick).and_then(|name| self.desired.find_volume(&name).map(|(id, volume)| (id, volume.clone())))
        else {
            return;
        };
        let is_whole = volume.replicas.iter().all(|replica| replica.made && self.is_open(replica.node_id, id));
        let has_it = volume.replica_on(node_id).is_some();
        if volume.group.is_some() && volume.change.is_none() && is_whole && has_it && volume.replicas.len() > 2 {
            self.nodes.get_mut(&node_id).unwrap().media.values_mut().for_each(|medium| drop(medium.volumes.remove(&id)));
            self.nodes.get_mut(&node_id).unwrap().doors.remove(&id);
            self.wiped.insert((id, node_id));
        }
    }

    pub(super) fn found_group(&mut self, id: VolumeId, members: &GroupMembers) {
        let log = Log { members: members.clone(), committed: 1, heir: None };
        self.groups.entry(id).or_insert(log);
    }

    pub(super) fn step_aside(&mut self, node_id: NodeId, id: VolumeId, to: NodeId) -> Result<(), RpcError> {
        if self.leads(id) != Some(node_id) {
            return Err(RpcError::new(ErrorCode::NotReady, "another node leads"));
        }
        self.groups.get_mut(&id).unwrap().heir = Some(to);
        Ok(())
    }

    pub(super) fn change_members(&mut self, node_id: NodeId, id: VolumeId, members: &GroupMembers) -> Result<(), RpcError> {
        let before = self.groups[&id].clone();
        // Said again a moment later, though the majority went with it.
        if before.members == *members {
            return Ok(());
        }
        if self.leads(id) != Some(node_id) {
            return Err(RpcError::new(ErrorCode::NotReady, "it does not lead, or hears no majority"));
        }
        let find = |members: &GroupMembers, number: u64| members.list.iter().find(|member| member.member == number).cloned();
        assert!(members.list.iter().any(|member| member.node_id == node_id), "the leader may not remove itself");
        let joined: Vec<_> = members.list.iter().filter(|member| find(&before.members, member.member).is_none()).collect();
        let left = before.members.list.iter().filter(|member| find(members, member.member).is_none()).count();
        let risen: Vec<_> = members.list.iter().filter(|m| find(&before.members, m.member).is_some_and(|b| b.role != m.role)).collect();
        assert_eq!(joined.len() + left + risen.len(), 1, "one step at a time: {before:?} {members:?}");
        if let [learner] = joined[..] {
            assert_eq!((learner.role, learner.member, members.next), (MemberRole::Learner, before.members.next, before.members.next + 1));
            assert!(before.members.list.iter().all(|member| member.node_id != learner.node_id), "one member a node");
        }
        if let [voter] = risen[..] {
            let there = self.nodes[&voter.node_id].observe().volumes.get(&id).and_then(|volume| volume.group.clone());
            // It was seen to have what was committed at its mark, and the mark was near.
            let lag = there.map(|group| before.committed.saturating_sub(group.applied));
            assert!(lag.is_none_or(|lag| lag <= 20 * NEAR), "{voter:?} becomes a voter and is {lag:?} behind");
        }
        let whole = |members: &GroupMembers| {
            let voters: Vec<_> = members.list.iter().filter(|member| member.role == MemberRole::Voter).collect();
            // What lies on memory may go at any moment, after the wish too.
            let forgets =
                |node: &NodeId| self.desired.volumes[&id].replica_on(*node).is_some_and(|replica| self.is_volatile(replica.drive_id));
            let has = |node: &NodeId| forgets(node) || self.nodes[node].media.values().any(|medium| medium.volumes.contains_key(&id));
            voters.iter().filter(|voter| has(&voter.node_id)).count() > voters.len() / 2
        };
        assert!(whole(members) || !whole(&before.members), "a majority that has the data became one that has not: {before:?} {members:?}");
        self.groups.get_mut(&id).unwrap().members = members.clone();
        Ok(())
    }
}
