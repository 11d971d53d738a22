//! Replicas that move to another node, or are replaced where they were lost.

use std::collections::BTreeMap;

use penstock_api::http::ApiError;
use penstock_api::rpc::{Door, DriveState, ErrorCode, GroupInfo, GroupPart, MemberRole};
use penstock_api::{DriveId, NodeId, ReplicaId, VolumeId};

use super::{Judged, drive, not_found, present_volume, ranked};
use crate::clones;
use crate::desired::{ChangeReason, Desired, DesiredChange, DesiredDoor, DesiredReplica, DesiredVolume, NOBODY, Phase, Record};
use crate::membership::{joined_by, leader};
use crate::observed::Observed;

/// What a wish about a volume's replicas is judged by.
struct Scene<'a> {
    desired: &'a Desired,
    observed: &'a BTreeMap<NodeId, &'a Observed>,
    id: VolumeId,
    volume: &'a DesiredVolume,
}

/// The replica that goes.
struct Going {
    member: u64,
    node_id: NodeId,
    /// It keeps the log alone, and so does the one that comes.
    log_only: bool,
}

impl<'a> Scene<'a> {
    fn of(desired: &'a Desired, observed: &'a BTreeMap<NodeId, &'a Observed>, name_or_id: &str) -> Result<Self, ApiError> {
        let (id, volume) = present_volume(desired, name_or_id)?;
        if volume.group.is_none() {
            let message = format!("volume {} has one replica, which cannot move: nobody could take over from it", volume.name);
            return Err(ApiError::new(ErrorCode::Invalid, message).with_hint("volumes made with --replicas 3 or 5 have a group"));
        }
        Ok(Self { desired, observed, id, volume })
    }

    fn name(&self, node_id: NodeId) -> String {
        self.desired.node_name(node_id)
    }

    fn node(&self, text: &str) -> Result<NodeId, ApiError> {
        let by_id = || text.parse::<NodeId>().ok().filter(|id| self.volume.replica_on(*id).is_some());
        let found = self.desired.find_node(text).map(|(id, _)| id).or_else(by_id);
        found.ok_or_else(|| not_found(&format!("node {text}"), "see `penstock node ls`"))
    }

    /// The replica on a node that a wish is about.
    fn replica(&self, node_id: NodeId) -> Result<Going, ApiError> {
        let name = self.name(node_id);
        let going = |replica: &DesiredReplica| Going { member: replica.member, node_id, log_only: replica.log_only };
        let Some(found) = self.volume.replica_on(node_id) else {
            // One that no drive told of when this state was rebuilt from drives, or, where the volume lacks one, nobody.
            let members = self.leading().map(|group| group.members.list.as_slice()).unwrap_or_default();
            let forgotten =
                members.iter().find(|member| member.node_id == node_id).map(|found| (found.member, found.role == MemberRole::LogOnly));
            let lacking = || self.lacks().map(|log_only| (NOBODY, log_only));
            return forgotten.or_else(lacking).map(|(member, log_only)| Going { member, node_id, log_only }).ok_or_else(|| {
                let on: Vec<String> = self.volume.replicas.iter().map(|replica| self.name(replica.node_id)).collect();
                let message = format!("volume {} has no replica on node {name}", self.volume.name);
                ApiError::new(ErrorCode::NotFound, message).with_hint(format!("it has replicas on {}", on.join(", ")))
            });
        };
        if !found.left {
            return Ok(going(found));
        }
        // The next one on the same node, which waits for the old one to be deleted.
        self.volume.change.as_ref().and_then(|change| change.waits.as_ref()).filter(|waits| waits.node_id == node_id).map(going).ok_or_else(
            || {
                let message = format!("the replica of volume {} on node {name} has left already, and is deleted there", self.volume.name);
                ApiError::new(ErrorCode::Busy, message).with_hint("see `penstock replica ls`")
            },
        )
    }

    /// Whether the volume has fewer replicas than it was made with, and if so, whether what it lacks keeps the log alone.
    fn lacks(&self) -> Option<bool> {
        let first = &self.volume.group.as_ref()?.first.list;
        let kept = self.volume.replicas.iter().filter(|replica| replica.log_only).count();
        let made = first.iter().filter(|member| member.role == MemberRole::LogOnly).count();
        (self.volume.replicas.len() < first.len()).then_some(kept < made)
    }

    /// Whether a replica that stays is on a node, or is counted there by the group.
    fn is_taken(&self, node_id: NodeId) -> bool {
        let members = self.leading().map(|group| group.members.list.as_slice()).unwrap_or_default();
        self.volume.replica_on(node_id).is_some() || members.iter().any(|member| member.node_id == node_id)
    }

    fn leading(&self) -> Result<&'a GroupInfo, ApiError> {
        let there = |node_id| self.observed.get(&node_id).copied();
        leader(self.id, self.volume, there).map(|(_, group)| group).ok_or_else(|| {
            let on: Vec<String> = self.volume.replicas.iter().map(|replica| self.name(replica.node_id)).collect();
            let message = format!("no replica of volume {} leads now, and the leader changes the members", self.volume.name);
            let hint = format!("most of {} have to be there and serve: see `penstock node ls` and `penstock replica ls`", on.join(", "));
            ApiError::new(ErrorCode::NotReady, message).with_hint(hint)
        })
    }

    fn has_joined(&self, number: u64) -> Result<bool, ApiError> {
        Ok(self.leading()?.role(number).is_some())
    }

    /// The drive on a node for a new replica: the one named, else the one with the most room.
    fn drive_on(&self, node_id: NodeId, asked: Option<DriveId>, wanted: u64) -> Result<DriveId, ApiError> {
        let name = self.name(node_id);
        let Some(node) = self.observed.get(&node_id) else {
            let error = ApiError::new(ErrorCode::NotReady, format!("node {name} is away"));
            return Err(error.with_hint("start its penstockd, or name another node"));
        };
        if self.desired.nodes.get(&node_id).is_none_or(|node| node.peer.is_none()) {
            let error = ApiError::new(ErrorCode::Invalid, format!("the other nodes do not know where to reach node {name}"));
            return Err(error.with_hint("start penstock-control with --node NAME=SOCKET,peer=ADDR:PORT for each node"));
        }
        let id = match asked {
            Some(id) if drive(self.desired, id)?.node_id != node_id => {
                let error = ApiError::new(ErrorCode::Invalid, format!("drive {id} is not of node {name}"));
                return Err(error.with_hint("see `penstock pool ls`"));
            }
            Some(id) => id,
            None => {
                let best = ranked(self.desired, self.observed).filter(|(of, _)| *of == node_id).map(|(_, rank)| rank).max();
                best.map(|(_, id)| id.0).ok_or_else(|| {
                    ApiError::new(ErrorCode::NotFound, format!("node {name} has no drive in the pool"))
                        .with_hint(format!("add one: penstock pool add SPEC --node {name}"))
                })?
            }
        };
        let seen = node.drives.get(&id).filter(|seen| seen.state == DriveState::Serving);
        let is_leaving = !drive(self.desired, id)?.phase.is_present();
        let Some(seen) = seen.filter(|_| !is_leaving) else {
            let error = ApiError::new(ErrorCode::NotReady, format!("drive {id} of node {name} does not serve now"));
            return Err(error.with_hint("see `penstock pool ls`, or name another with --drive"));
        };
        if seen.free.0 < wanted {
            let message = format!(
                "drive {id} of node {name} has {} free, and a replica of volume {} takes {} now",
                seen.free.rounded(),
                self.volume.name,
                penstock_api::ByteSize(wanted).rounded()
            );
            return Err(ApiError::new(ErrorCode::Capacity, message).with_hint("add a drive there, or name another node or --drive"));
        }
        Ok(id)
    }

    /// Space that the one that comes takes now: the most that any with data shows.
    fn wanted(&self, from: &Going) -> u64 {
        if from.log_only {
            return 0;
        }
        let each = self.volume.replicas.iter().filter_map(|replica| self.observed.get(&replica.node_id)?.volumes.get(&self.id));
        each.map(|seen| seen.allocated.0).max().unwrap_or(0)
    }

    /// Without the one that goes the group must still hold a majority that is well.
    fn refuse_too_few(&self, why: ChangeReason, group: &GroupInfo, from: &Going) -> Result<(), ApiError> {
        let others = group.members.list.iter().filter(|other| other.role != MemberRole::Learner && other.member != from.member);
        let is_well = |node_id: NodeId| {
            let there = self.observed.get(&node_id).and_then(|seen| seen.volumes.get(&self.id)?.group.as_ref());
            there.is_some_and(|group| group.rebuild.is_none() && !matches!(group.part, GroupPart::Stopped | GroupPart::Doubtful))
        };
        let (well, sick): (Vec<_>, Vec<_>) = others.map(|other| other.node_id).partition(|node_id| is_well(*node_id));
        let comes = usize::from(why == ChangeReason::Move);
        if well.len() + comes > (well.len() + sick.len() + comes) / 2 {
            return Ok(());
        }
        let sick: Vec<String> = sick.into_iter().map(|node_id| self.name(node_id)).collect();
        let (name, verb) = (self.name(from.node_id), if sick.len() > 1 { "are" } else { "is" });
        let message =
            format!("volume {} needs its replica on node {name}: the one on {} {verb} not well", self.volume.name, sick.join(", "));
        Err(ApiError::new(ErrorCode::NotReady, message).with_hint("mend or replace that one first: see `penstock replica ls`"))
    }

    fn refuse_second(&self) -> Result<(), ApiError> {
        let Some(change) = &self.volume.change else { return Ok(()) };
        let to = change.waits.as_ref().or_else(|| self.volume.member(change.to)).map_or_else(String::new, |to| self.name(to.node_id));
        let message = format!("a replica of volume {} is on its way to node {to} already, and one changes at a time", self.volume.name);
        let hint = format!("see `penstock replica ls {0}`; `penstock replica give-up {0}` takes that one back", self.volume.name);
        Err(ApiError::new(ErrorCode::Busy, message).with_hint(hint))
    }

    /// The one that goes is deleted before another comes on its node, and is not while a clone stands on it there.
    fn refuse_under_clones(&self, node_id: NodeId) -> Result<(), ApiError> {
        let there = self.observed.get(&node_id).filter(|seen| seen.volumes.contains_key(&self.id));
        let Some(clone) = there.and_then(|seen| clones::standing_on(self.desired, seen, self.id)) else { return Ok(()) };
        let (name, own) = (self.name(node_id), &self.volume.name);
        let message =
            format!("the replica of volume {own} on node {name} cannot be made anew there: that of its clone {clone} stands on it");
        let may_move = self.desired.find_volume(clone.as_str()).is_some_and(|(_, clone)| clone.group.is_some());
        let first = if may_move {
            format!("move that one away first: penstock replica move {clone} {name} NODE")
        } else {
            format!("remove {clone} first")
        };
        let hint = format!("name another node with --on, or {first}");
        Err(ApiError::new(ErrorCode::Busy, message).with_hint(hint))
    }

    fn begin(&self, why: ChangeReason, id: ReplicaId, from: &Going, (node_id, drive_id): (NodeId, DriveId)) -> Judged {
        let group = self.leading()?;
        self.refuse_too_few(why, group, from)?;
        let Some(share) = self.volume.free_share() else {
            return Err(ApiError::new(ErrorCode::Capacity, "the volume has as many replicas as it can, counting those that leave"));
        };
        let member = group.members.next;
        let mut to = DesiredReplica { share, log_only: from.log_only, ..DesiredReplica::first(member, id, node_id, drive_id) };
        to.joins = Some(joined_by(&group.members, &to));
        let mut volume = self.volume.clone();
        let is_there = self.volume.replica_on(node_id).is_some();
        if is_there {
            self.refuse_under_clones(node_id)?;
        }
        volume.change = Some(Box::new(DesiredChange {
            why,
            from: from.member,
            to: member,
            waits: is_there.then(|| to.clone()),
            reach: None,
            is_off: false,
        }));
        if !is_there {
            if from.node_id != node_id {
                volume.doors.extend(self.doors_for(from.node_id, node_id));
            }
            volume.replicas.push(to);
        }
        Ok(vec![Record::PutVolume(self.id, volume)])
    }

    /// NVMe/TCP doors at the old node's own address are opened at the new node's.
    fn doors_for(&self, from: NodeId, to: NodeId) -> Vec<DesiredDoor> {
        let own = |node_id: NodeId| self.desired.nodes.get(&node_id).and_then(|node| node.nvmf);
        let (Some(old), Some(new)) = (own(from), own(to)) else { return vec![] };
        let there = self.volume.doors.iter().filter(|door| door.node_id == from && door.phase.is_present());
        let moved = there.filter_map(|door| match &door.door {
            Door::Nvmf { address, port, nqn } if (*address, *port) == (old.ip(), old.port()) => {
                let door = Door::Nvmf { address: new.ip(), port: new.port(), nqn: nqn.clone() };
                Some(DesiredDoor { node_id: to, door, phase: Phase::Present })
            }
            _ => None,
        });
        moved.collect()
    }
}

/// The replica on `from` goes, and a new one on `to` takes its place; it counts until the new one has everything. Said twice it is one wish.
pub fn move_replica(
    desired: &Desired,
    observed: &BTreeMap<NodeId, &Observed>,
    id: ReplicaId,
    volume: &str,
    (from, to): (&str, &str),
    asked: Option<DriveId>,
) -> Judged {
    let scene = Scene::of(desired, observed, volume)?;
    let (from, to) = (scene.node(from)?, scene.node(to)?);
    let replica = scene.replica(from)?;
    if let Some(change) = &scene.volume.change
        && (change.why, change.from, change.is_off) == (ChangeReason::Move, replica.member, false)
        && scene.volume.member(change.to).is_some_and(|there| there.node_id == to)
    {
        return Ok(vec![]);
    }
    scene.refuse_second()?;
    let (old, new) = (scene.name(from), scene.name(to));
    if from == to {
        let error = ApiError::new(ErrorCode::Invalid, format!("the replica of volume {volume} is on node {old} already"));
        return Err(error.with_hint(format!("`penstock replica replace {volume} {old}` makes it anew there")));
    }
    if scene.is_taken(to) {
        let error = ApiError::new(ErrorCode::AlreadyExists, format!("volume {volume} has a replica on node {new} already"));
        return Err(error.with_hint("each replica is on another node: name one that has none, see `penstock node ls`"));
    }
    if observed.get(&from).is_none_or(|seen| !seen.volumes.contains_key(&scene.id)) {
        let message = format!("the replica of volume {volume} on node {old} is not there now, so it cannot help until another is whole");
        return Err(ApiError::new(ErrorCode::NotReady, message).with_hint(format!("`penstock replica replace {volume} {old} --on {new}`")));
    }
    let bound = scene.volume.doors.iter().find(|door| door.node_id == from && !matches!(door.door, Door::Nvmf { .. }));
    if let Some(bound) = bound {
        let message = format!("volume {volume} has the door {} on node {old}, which its guests cannot follow to another node", bound.door);
        return Err(
            ApiError::new(ErrorCode::Busy, message).with_hint(format!("close it first: penstock volume unexport {volume} --node {old}"))
        );
    }
    scene.leading()?;
    let drive_id = scene.drive_on(to, asked, scene.wanted(&replica))?;
    scene.begin(ChangeReason::Move, id, &replica, (to, drive_id))
}

/// The replica on `node` is given up for a new one, there or `on` another node; where nothing is said, there if it can be.
pub fn replace_replica(
    desired: &Desired,
    observed: &BTreeMap<NodeId, &Observed>,
    id: ReplicaId,
    volume: &str,
    (node, on): (&str, Option<&str>),
    asked: Option<DriveId>,
) -> Judged {
    let scene = Scene::of(desired, observed, volume)?;
    let node = scene.node(node)?;
    let replica = scene.replica(node)?;
    let on = on.map(|text| scene.node(text)).transpose()?;
    let is_same = |change: &DesiredChange| {
        let to = change.waits.as_ref().or_else(|| scene.volume.member(change.to));
        change.why == ChangeReason::Replace
            && change.from == replica.member
            && !change.is_off
            && on.is_none_or(|on| to.is_some_and(|to| to.node_id == on))
    };
    match &scene.volume.change {
        Some(change) if is_same(change) => return Ok(vec![]),
        // The one that comes got lost itself, when there was no way back any more.
        Some(change) if change.to == replica.member && scene.volume.member(change.from).is_none_or(|old| old.left) => {
            if !scene.has_joined(change.to)? {
                let name = scene.name(replica.node_id);
                let message = format!(
                    "the new replica of volume {volume} on node {name} has not joined the others yet, and has a number to join with"
                );
                let hint = format!("wait for it, or take it back first: penstock replica give-up {volume}");
                return Err(ApiError::new(ErrorCode::Busy, message).with_hint(hint));
            }
        }
        _ => scene.refuse_second()?,
    }
    scene.leading()?;
    let wanted = scene.wanted(&replica);
    let place = match (on, asked) {
        (Some(on), _) => (on, scene.drive_on(on, asked, wanted)?),
        (None, Some(id)) => {
            let on = drive(desired, id)?.node_id;
            (on, scene.drive_on(on, asked, wanted)?)
        }
        (None, None) => scene.place_for(node, wanted)?,
    };
    if place.0 != node && scene.is_taken(place.0) {
        let message = format!("volume {volume} has a replica on node {} already", scene.name(place.0));
        return Err(ApiError::new(ErrorCode::AlreadyExists, message).with_hint("each replica is on another node: name one that has none"));
    }
    scene.begin(ChangeReason::Replace, id, &replica, place)
}

impl Scene<'_> {
    /// The node itself, if it can take a new replica, else the one with the most room of those that have none.
    fn place_for(&self, node: NodeId, wanted: u64) -> Result<(NodeId, DriveId), ApiError> {
        let there = match self.drive_on(node, None, wanted) {
            Ok(drive_id) => return Ok((node, drive_id)),
            Err(error) => error,
        };
        let mut others: Vec<_> = ranked(self.desired, self.observed).filter(|(of, _)| !self.is_taken(*of)).collect();
        others.sort_by_key(|(_, rank)| std::cmp::Reverse(*rank));
        let found = others.into_iter().find_map(|(of, (_, id))| Some((of, self.drive_on(of, Some(id.0), wanted).ok()?)));
        found.ok_or_else(|| {
            let message =
                format!("no node can take a new replica of volume {}; on node {}: {}", self.volume.name, self.name(node), there.message);
            ApiError::new(there.code, message).with_hint("add a drive: penstock pool add SPEC --node NAME")
        })
    }
}

/// Takes back a change that is under way, as long as the one that was to go is still of the group, or the one that comes is not yet.
pub fn give_up_change(desired: &Desired, observed: &BTreeMap<NodeId, &Observed>, volume: &str) -> Judged {
    let scene = Scene::of(desired, observed, volume)?;
    let Some(change) = &scene.volume.change else {
        let error = ApiError::new(ErrorCode::NotFound, format!("no replica of volume {volume} is on its way"));
        return Err(error.with_hint(format!("see `penstock replica ls {volume}`")));
    };
    let is_gone = scene.volume.member(change.from).is_none_or(|old| old.left) || !scene.has_joined(change.from)?;
    if is_gone && scene.has_joined(change.to)? {
        let message = format!("the replica of volume {volume} that was to go has gone already");
        let to = scene.volume.member(change.to).or(change.waits.as_ref()).map_or_else(String::new, |to| scene.name(to.node_id));
        let hint = format!("wait for the new one; if node {to} cannot make it: penstock replica replace {volume} {to} --on NODE");
        return Err(ApiError::new(ErrorCode::Busy, message).with_hint(hint));
    }
    let mut volume = scene.volume.clone();
    match volume.change.as_mut().filter(|change| is_gone || change.waits.is_none()) {
        Some(change) => (change.is_off, change.waits) = (true, None),
        None => volume.change = None,
    }
    Ok(vec![Record::PutVolume(scene.id, volume)])
}
