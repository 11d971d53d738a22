//! Says, for one drive, replica, volume or door, how far what is desired has come. For people and for calls that wait.

use std::collections::BTreeMap;

use penstock_api::http::Progress;
use penstock_api::rpc::{DriveState, ErrorCode, GroupInfo, GroupMember, GroupPart, MemberRole, Origin, VolumeState};
use penstock_api::{DriveId, NodeId, VolumeId};

use crate::clones;
use crate::desired::{Desired, DesiredDoor, DesiredReplica, DesiredSnapshot, DesiredVolume, Phase};
use crate::membership::{self, NEAR, Next};
use crate::observed::{Observed, ObservedVolume};
use crate::reconcile::{Subject, claim_conflict, conflict};
use crate::retry::Refusals;

/// One node. `observed` is `None` while it is away.
#[derive(Clone, Copy)]
pub struct NodeLook<'a> {
    pub observed: Option<&'a Observed>,
    pub refusals: &'a Refusals,
}

/// What progress is judged by.
#[derive(Clone)]
pub struct Look<'a> {
    pub desired: &'a Desired,
    /// Those that this control was told how to reach.
    pub nodes: BTreeMap<NodeId, NodeLook<'a>>,
}

fn pending(reason: impl Into<String>) -> Progress {
    Progress::Pending { reason: reason.into() }
}

fn refused(code: ErrorCode, message: String, hint: &str) -> Progress {
    Progress::Refused { code, message, hint: Some(hint.to_owned()) }
}

impl<'a> Look<'a> {
    fn observed(&self, node_id: NodeId) -> Option<&'a Observed> {
        self.nodes.get(&node_id)?.observed
    }

    fn seen(&self, node_id: NodeId, id: VolumeId) -> Option<&'a ObservedVolume> {
        self.observed(node_id)?.volumes.get(&id)
    }

    /// With one node there is nothing to tell it from.
    fn node_word(&self, node_id: NodeId) -> String {
        if self.desired.nodes.len() < 2 { "the node".to_owned() } else { format!("node {}", self.desired.node_name(node_id)) }
    }

    fn refusal(&self, node_id: NodeId, subject: &Subject) -> Option<Progress> {
        let refusal = self.nodes.get(&node_id)?.refusals.get(subject)?;
        let code = refusal.error.kind().unwrap_or(ErrorCode::Internal);
        // The node will take it in time by itself: that is waiting, not refusing.
        if code == ErrorCode::NotReady {
            return Some(pending(refusal.error.message.clone()));
        }
        let hint = refusal.error.hint().map(str::to_owned);
        Some(Progress::Refused { code, message: refusal.error.message.clone(), hint })
    }

    /// A whole node: why nothing can go on there, if so.
    fn node(&self, node_id: NodeId) -> Option<Progress> {
        let Some(node) = self.nodes.get(&node_id) else {
            return Some(pending(format!(
                "{} is not among those that penstock-control was started with (--node)",
                self.node_word(node_id)
            )));
        };
        let Some(observed) = node.observed else {
            return Some(pending(format!("{} is away", self.node_word(node_id))));
        };
        let identity = self.desired.identity.as_ref()?;
        if let Some(conflict) = claim_conflict(identity, node_id, observed) {
            return Some(refused(
                ErrorCode::Conflict,
                conflict,
                "point this control at its own node, or start it with an empty state directory and import",
            ));
        }
        self.refusal(node_id, &Subject::Node)
    }

    pub fn drive(&self, id: DriveId) -> Progress {
        let Some(drive) = self.desired.drives.get(&id) else {
            return Progress::Settled;
        };
        let blocked = self.node(drive.node_id).or_else(|| self.refusal(drive.node_id, &Subject::Drive(id)));
        if !drive.phase.is_present() {
            return match blocked {
                Some(Progress::Pending { reason }) => Progress::Removing { reason },
                Some(other) => other,
                None => Progress::Removing { reason: "the node detaches it".to_owned() },
            };
        }
        if let Some(blocked) = blocked {
            return blocked;
        }
        let seen = self.observed(drive.node_id).and_then(|observed| observed.drives.get(&id));
        let because = |seen: &crate::observed::ObservedDrive| seen.reason.clone().unwrap_or_else(|| "no reason given".to_owned());
        match seen {
            None => pending("the node opens it"),
            Some(seen) => match seen.state {
                DriveState::Serving if drive.made => Progress::Settled,
                DriveState::Serving => pending("it serves, which is being recorded"),
                DriveState::Opening => pending("the node recovers it"),
                DriveState::Fenced => refused(
                    ErrorCode::Fenced,
                    format!("the drive is fenced: {}", because(seen)),
                    "find out whether the drive can be trusted, then `penstock pool clear-fence`",
                ),
                DriveState::Quarantined => refused(
                    ErrorCode::Fenced,
                    format!("the drive is quarantined: {}", because(seen)),
                    "its other stores serve; report the fault, then `penstock pool clear-fence` runs the store again",
                ),
                DriveState::Missing => refused(
                    ErrorCode::NotFound,
                    format!("the drive is missing: {}", because(seen)),
                    "bring it back; it is tried again by itself",
                ),
            },
        }
    }

    /// Of the volume: of its replicas, the one that is furthest from what is desired. Its doors are judged apart, and so is a replica that is on
    /// its way in or out.
    pub fn volume(&self, id: VolumeId) -> Progress {
        let Some(volume) = self.desired.volumes.get(&id) else {
            return Progress::Settled;
        };
        let is_worse = |progress: &Progress| match progress {
            Progress::Settled => 0,
            Progress::Pending { .. } | Progress::Removing { .. } => 1,
            Progress::Refused { .. } => 2,
        };
        let each = staying(volume).map(|replica| (replica, self.replica(id, volume, replica)));
        // The first of the worst.
        let worst = each.reduce(|worst, next| if is_worse(&next.1) > is_worse(&worst.1) { next } else { worst });
        let Some((replica, progress)) = worst else { return Progress::Settled };
        if volume.group.is_none() {
            return progress;
        }
        let on = |text: String| format!("its replica on {}: {text}", self.desired.node_name(replica.node_id));
        match progress {
            Progress::Settled => Progress::Settled,
            Progress::Pending { reason } => pending(on(reason)),
            Progress::Removing { reason } => Progress::Removing { reason: on(reason) },
            Progress::Refused { code, message, hint } => Progress::Refused { code, message: on(message), hint },
        }
    }

    /// Whether waiting longer may change what [`Self::volume`] says, while nodes that are away stay away.
    pub fn volume_may_go_on(&self, id: VolumeId) -> bool {
        let Some(volume) = self.desired.volumes.get(&id) else { return false };
        staying(volume).any(|replica| {
            let progress = self.replica(id, volume, replica);
            self.observed(replica.node_id).is_some() && matches!(progress, Progress::Pending { .. } | Progress::Removing { .. })
        })
    }

    fn leader(&self, id: VolumeId, volume: &DesiredVolume) -> Option<(NodeId, &'a GroupInfo)> {
        membership::leader(id, volume, |node_id| self.observed(node_id))
    }

    /// Whether nobody leads, and most of the replicas are there and well: somebody will soon.
    pub fn is_electing(&self, id: VolumeId) -> bool {
        let Some(volume) = self.desired.volumes.get(&id).filter(|volume| volume.group.is_some()) else { return false };
        let is_well = |replica: &&DesiredReplica| {
            let seen = self.seen(replica.node_id, id).and_then(|seen| seen.group.as_ref());
            seen.is_some_and(|group| group.member == replica.member && group.is_well())
        };
        self.leader(id, volume).is_none() && volume.replicas.iter().filter(is_well).count() > volume.replicas.len() / 2
    }

    /// Entries that the leader has committed and this replica has not applied; the two were not looked at in the same moment.
    pub fn lag(&self, id: VolumeId, volume: &DesiredVolume, replica: &DesiredReplica) -> Option<u64> {
        let (_, leader) = self.leader(id, volume)?;
        let group = self.seen(replica.node_id, id)?.group.as_ref()?;
        Some(leader.committed.saturating_sub(group.applied))
    }

    /// As [`Self::replica`], and whether it has what the others have.
    pub fn standing(&self, id: VolumeId, volume: &DesiredVolume, replica: &DesiredReplica) -> Progress {
        let shape = self.replica(id, volume, replica);
        if !shape.is_settled() {
            return shape;
        }
        if let Some(rebuild) = self.seen(replica.node_id, id).and_then(|seen| seen.group.as_ref()?.rebuild) {
            return pending(format!("its data are copied from another: {} %, {} blocks to go", rebuild.percent(), rebuild.blocks_left()));
        }
        match (self.lag(id, volume, replica), &volume.change) {
            (Some(lag), _) if lag > NEAR => pending(format!("it is {lag} entries behind")),
            (_, Some(change)) if change.to == replica.member && change.is_off => {
                Progress::Removing { reason: "it was given up".to_owned() }
            }
            (_, Some(change)) if change.to == replica.member => pending("it becomes a voter"),
            (_, Some(change)) if change.from == replica.member && !change.is_off => {
                let node = volume.member(change.to).map_or(replica.node_id, |to| to.node_id);
                pending(format!("it makes way for the one on {}", self.desired.node_name(node)))
            }
            _ => Progress::Settled,
        }
    }

    /// How far one replica has come to take another's place; `None` where none does.
    pub fn change(&self, id: VolumeId, volume: &DesiredVolume) -> Option<Progress> {
        let change = volume.change.as_ref()?;
        let name = |member: u64| {
            let found = volume.member(member).or(change.waits.as_ref().filter(|waits| waits.member == member));
            found
                .map_or_else(|| format!("member {member}"), |replica| format!("the replica on {}", self.desired.node_name(replica.node_id)))
        };
        let Some((leader, group)) = self.leader(id, volume) else {
            return Some(pending("no replica leads: most of those that vote have to be there"));
        };
        // Whatever is refused is tried again: membership may only have changed under it.
        let refused = self.nodes.get(&leader).and_then(|node| node.refusals.get(&Subject::Members(id)));
        if let Some(refusal) = refused {
            return Some(pending(format!("the leader refuses for now: {}", refusal.error.message)));
        }
        let old_is_there = volume.member(change.from).is_some_and(|old| old.left);
        Some(match (membership::next(id, volume, group)?, volume.member(change.to)) {
            (Next::Wait, Some(to)) if !to.made => match self.replica(id, volume, to) {
                Progress::Settled => pending("its node makes it"),
                other => other,
            },
            (Next::Wait, None) if old_is_there => pending(format!("{} is deleted first", name(change.from))),
            (Next::Wait, Some(to)) => match self.standing(id, volume, to) {
                Progress::Settled => pending("it catches up"),
                other => other,
            },
            (Next::StepAside, _) => pending("the leader is the one that goes, and lets another lead"),
            (Next::Wait | Next::Record(_) | Next::Members(_), _) => pending("its group's members change"),
        })
    }

    /// How many more replicas may be lost, whichever they are: those that are well above a quorum, and as many with data but one.
    pub fn spare(&self, id: VolumeId, volume: &DesiredVolume) -> Option<u8> {
        let (_, group) = self.leader(id, volume)?;
        let counts = || group.members.list.iter().filter(|member| member.role != MemberRole::Learner);
        let is_well = |member: &&GroupMember| {
            let seen = self.seen(member.node_id, id).and_then(|seen| seen.group.as_ref());
            seen.is_some_and(|seen| seen.member == member.member && seen.is_well() && seen.rebuild.is_none())
        };
        let (well, quorum) = (counts().filter(is_well).count(), counts().count() / 2 + 1);
        let with_data = counts().filter(is_well).filter(|member| member.role == MemberRole::Voter).count();
        Some(well.saturating_sub(quorum).min(with_data.saturating_sub(1)) as u8)
    }

    /// The node where the volume is served, and what it shows there.
    pub fn served(&self, id: VolumeId, volume: &DesiredVolume) -> Option<(NodeId, &'a ObservedVolume)> {
        let node_id = match &volume.group {
            None => volume.replicas.first()?.node_id,
            Some(_) => self.leader(id, volume)?.0,
        };
        Some((node_id, self.seen(node_id, id).filter(|seen| seen.is_served())?))
    }

    pub fn snapshot(&self, id: VolumeId, volume: &DesiredVolume, snapshot: &DesiredSnapshot) -> Progress {
        let Some((node_id, seen)) = self.served(id, volume) else { return pending("its volume is not served now") };
        let refusal = self.refusal(node_id, &Subject::Snapshot(id, snapshot.snapshot_id));
        match (snapshot.phase, refusal) {
            (Phase::Present, None) if !snapshot.made => pending("the node takes it"),
            (Phase::Present, None) if !seen.has_snapshot(snapshot.snapshot_id) => refused(
                ErrorCode::NotFound,
                "it was taken and is not there any more".to_owned(),
                "its drive was put back or replaced; `penstock snapshot rm` forgets it",
            ),
            (Phase::Present, None) => Progress::Settled,
            (Phase::Removing { .. }, None) => Progress::Removing { reason: "the node removes it".to_owned() },
            (Phase::Removing { .. }, Some(Progress::Pending { reason })) => Progress::Removing { reason },
            (_, Some(other)) => other,
        }
    }

    pub fn replica(&self, id: VolumeId, volume: &DesiredVolume, replica: &DesiredReplica) -> Progress {
        let node_id = replica.node_id;
        let drive = self.desired.drives.get(&replica.drive_id);
        if self.desired.is_gone(node_id) {
            return Progress::Removing { reason: "its node was given up".to_owned() };
        }
        if replica.left && drive.is_none() {
            return Progress::Removing { reason: "it has left its group".to_owned() };
        }
        if drive.is_none() && volume.group.is_some() && volume.phase.is_present() {
            return refused(
                ErrorCode::NotFound,
                format!("its drive {} was taken out of the pool", replica.drive_id),
                "`penstock pool import` of the drive brings it back",
            );
        }
        if drive.is_none_or(|drive| drive.phase == Phase::Removing { force: true }) {
            return Progress::Removing { reason: "it leaves with its drive".to_owned() };
        }
        let blocked = self.node(node_id).or_else(|| self.refusal(node_id, &Subject::Volume(id))).or_else(|| self.drive_in_the_way(replica));
        let blocked = blocked.or_else(|| self.without_ground(id, volume, replica));
        if !volume.phase.is_present() || replica.left {
            let stands = self.observed(node_id).and_then(|observed| clones::standing_on(self.desired, observed, id));
            return match (blocked, stands) {
                (Some(Progress::Pending { reason }), _) => Progress::Removing { reason },
                (Some(other), _) => other,
                (None, Some(clone)) if replica.left => Progress::Removing { reason: format!("its clone {clone} stands on it there") },
                (None, _) => Progress::Removing { reason: "the node deletes it".to_owned() },
            };
        }
        if let Some(blocked) = blocked {
            return blocked;
        }
        let Some(seen) = self.seen(node_id, id) else {
            let volatile = drive.is_some_and(|drive| drive.volatile);
            if replica.made && volume.group.is_some() {
                return Progress::Refused {
                    code: ErrorCode::NotFound,
                    message: format!(
                        "it was on drive {} and is not there any more; the volume goes on with its other replicas",
                        replica.drive_id
                    ),
                    hint: Some(format!(
                        "check that this is the right drive; if it is, `penstock replica replace {} {}` makes a new replica",
                        volume.name,
                        self.desired.node_name(node_id)
                    )),
                };
            }
            if replica.made && !volatile {
                return refused(
                    ErrorCode::NotFound,
                    format!("the volume was on drive {} and is not there any more: its data is lost there", replica.drive_id),
                    "check that this is the right drive; `penstock volume rm --force` gives the volume up",
                );
            }
            return pending("the node makes it");
        };
        if let Some(conflict) = conflict(volume, replica, seen) {
            return refused(ErrorCode::Conflict, conflict, "nothing is done until a person has looked: remove the wrong one");
        }
        seen_replica(volume, replica, seen)
    }

    /// A replica of a clone that would be made, and of which what it is to stand on is not there: for good, or until the origin's own is replaced.
    fn without_ground(&self, id: VolumeId, volume: &DesiredVolume, replica: &DesiredReplica) -> Option<Progress> {
        let is_wanted = volume.phase.is_present() && !replica.left && self.seen(replica.node_id, id).is_none();
        let is_volatile = self.desired.drives.get(&replica.drive_id).is_some_and(|drive| drive.volatile);
        if !is_wanted || replica.made && (volume.group.is_some() || !is_volatile) {
            return None;
        }
        let ground = clones::ground(volume, replica)?;
        if let Some((of, snapshot)) = self.lost_snapshot(ground) {
            let what = if replica.made { "its data is lost" } else { "it cannot be made" };
            return Some(Progress::Refused {
                code: ErrorCode::NotFound,
                message: format!("{what}: it stood on snapshot {} of volume {}, which is not there any more", snapshot.name, of.name),
                hint: Some(format!(
                    "`penstock volume rm {} --force` gives it up; then take a new snapshot of what is to be cloned, and make another --from that",
                    volume.name
                )),
            });
        }
        if self.seen(replica.node_id, ground.volume_id).is_some_and(|of| of.has_snapshot(ground.snapshot_id)) {
            return None;
        }
        let of = self.desired.volumes.get(&ground.volume_id)?;
        let snapshot = &of.find_snapshot(&ground.snapshot_id.to_string())?.name;
        let node = self.node_word(replica.node_id);
        Some(pending(format!("snapshot {snapshot} of volume {}, which it is to stand on, is not on {node} now", of.name)))
    }

    /// The snapshot that a clone stands on, or of clones that stand on one another the lowest that is lost.
    fn lost_snapshot(&self, origin: &Origin) -> Option<(&'a DesiredVolume, &'a DesiredSnapshot)> {
        let of = self.desired.volumes.get(&origin.volume_id)?;
        let snapshot = of.find_snapshot(&origin.snapshot_id.to_string())?;
        if self.served(origin.volume_id, of).is_some() {
            let is_lost = matches!(self.snapshot(origin.volume_id, of, snapshot), Progress::Refused { code: ErrorCode::NotFound, .. });
            return is_lost.then_some((of, snapshot));
        }
        // Ids are counted: what a clone stands on is older than it is.
        of.origin.as_deref().filter(|next| next.volume_id < origin.volume_id).and_then(|next| self.lost_snapshot(next))
    }

    fn drive_in_the_way(&self, replica: &DesiredReplica) -> Option<Progress> {
        if self.observed(replica.node_id).is_some_and(|observed| observed.is_serving(replica.drive_id)) {
            return None;
        }
        match self.drive(replica.drive_id) {
            Progress::Settled | Progress::Removing { .. } => None,
            Progress::Pending { reason } => Some(pending(format!("its drive {}: {reason}", replica.drive_id))),
            Progress::Refused { code, message, hint } => {
                Some(Progress::Refused { code, message: format!("its drive {}: {message}", replica.drive_id), hint })
            }
        }
    }

    pub fn door(&self, id: VolumeId, volume: &DesiredVolume, desired: &DesiredDoor) -> Progress {
        let node_id = desired.node_id;
        let subject = Subject::Door(id, desired.door.clone());
        let blocked = self.node(node_id).or_else(|| self.refusal(node_id, &subject));
        let served = self.seen(node_id, id).is_some_and(|seen| seen.doors.contains(&desired.door));
        if !desired.phase.is_present() || !volume.phase.is_present() {
            return match blocked {
                Some(Progress::Pending { reason }) => Progress::Removing { reason },
                Some(other) => other,
                None => Progress::Removing { reason: "the node closes it".to_owned() },
            };
        }
        if let Some(blocked) = blocked {
            return blocked;
        }
        if served {
            return Progress::Settled;
        }
        match volume.replica_on(node_id).map(|replica| self.replica(id, volume, replica)) {
            Some(Progress::Settled) if !volume.is_founded() => pending("a majority of its replicas is made first"),
            Some(Progress::Settled) | None => pending("the node opens it"),
            Some(other) => other,
        }
    }

    /// Everything that does not agree yet, a line each. Empty means desired and observed agree.
    pub fn unsettled(&self) -> Vec<String> {
        self.desired.nodes.keys().filter(|id| !self.desired.is_gone(**id)).flat_map(|id| self.unsettled_on(*id)).collect()
    }

    /// As [`Self::unsettled`], of one node.
    pub fn unsettled_on(&self, node_id: NodeId) -> Vec<String> {
        let mut lines = Vec::new();
        let mut note = |what: String, progress: Progress| match progress {
            Progress::Settled => {}
            Progress::Pending { reason } => lines.push(format!("{what} is pending: {reason}")),
            Progress::Removing { reason } => lines.push(format!("{what} is being removed: {reason}")),
            Progress::Refused { message, .. } => lines.push(format!("{what} is refused: {message}")),
        };
        let desired = self.desired;
        for (id, _) in desired.drives.iter().filter(|(_, drive)| drive.node_id == node_id) {
            note(format!("drive {id}"), self.drive(*id));
        }
        for (id, volume) in &desired.volumes {
            let Some(replica) = volume.replica_on(node_id) else { continue };
            note(format!("volume {}", volume.name), self.standing(*id, volume, replica));
            for door in volume.doors.iter().filter(|door| door.node_id == node_id) {
                note(format!("export {} of volume {}", door.door, volume.name), self.door(*id, volume, door));
            }
            if let Some((_, seen)) = self.served(*id, volume).filter(|(served_by, _)| *served_by == node_id) {
                for snapshot in &volume.snapshots {
                    note(format!("snapshot {} of volume {}", snapshot.name, volume.name), self.snapshot(*id, volume, snapshot));
                }
                for stray in crate::snapshots::strays(volume, seen) {
                    let name = &stray.name;
                    note(format!("snapshot {name} of volume {}", volume.name), pending("unknown here: `penstock pool import` takes it up"));
                }
            }
            let undesired = self.seen(node_id, *id).into_iter().flat_map(|seen| &seen.doors);
            for door in undesired.filter(|door| volume.door(node_id, door).is_none()) {
                let refusal = self.refusal(node_id, &Subject::Door(*id, door.clone()));
                let closing = Progress::Removing { reason: "nobody desires it".to_owned() };
                note(format!("export {door} of volume {}", volume.name), refusal.unwrap_or(closing));
            }
        }
        let Some(observed) = self.observed(node_id) else { return lines };
        let plan = crate::reconcile::reconcile(desired, node_id, observed);
        if plan.steps.iter().any(|step| step.subject() == Subject::Peers) {
            note("its list of other nodes".to_owned(), self.refusal(node_id, &Subject::Peers).unwrap_or(pending("the node is told")));
        }
        for id in plan.strays {
            let name = &observed.volumes[&id].name;
            lines.push(format!("volume {name} ({id}) is on the node and unknown here: `penstock pool import` takes it up"));
        }
        lines
    }
}

/// The replicas that are neither on their way in nor out. All of a volume that is removed.
fn staying(volume: &DesiredVolume) -> impl Iterator<Item = &DesiredReplica> {
    let comes = |replica: &DesiredReplica| volume.change.as_ref().is_some_and(|change| change.to == replica.member);
    volume.replicas.iter().filter(move |replica| !volume.phase.is_present() || (!replica.left && !comes(replica)))
}

/// A replica that its node shows.
fn seen_replica(volume: &DesiredVolume, replica: &DesiredReplica, seen: &ObservedVolume) -> Progress {
    let why = || seen.reason.clone().unwrap_or_else(|| "no reason given".to_owned());
    match seen.state {
        VolumeState::Serving => {}
        VolumeState::Opening => return pending("the node recovers it"),
        VolumeState::Deleting => return pending("the node deletes it"),
        VolumeState::Unavailable => {
            return refused(ErrorCode::NotReady, format!("the volume is unavailable: {}", why()), "see `penstock pool ls`");
        }
    }
    if let Some(group) = &seen.group {
        let why = || group.reason.clone().map(|reason| format!(": {reason}")).unwrap_or_default();
        match group.part {
            GroupPart::Stopped => {
                return refused(
                    ErrorCode::Fenced,
                    format!("it has stopped{}", why()),
                    "see its node's log; the volume goes on with the others, and `penstock replica replace` makes a new one",
                );
            }
            GroupPart::Doubtful => return pending(format!("it asks the others about what it cannot judge alone{}", why())),
            GroupPart::Leader if group.serves => {}
            _ if group.leader.is_none() => return pending("its group elects a leader"),
            GroupPart::Leader => return pending("it leads, and takes up what its group has"),
            _ if seen.size != volume.size => return pending("it has not heard of the new size yet"),
            _ => {}
        }
    }
    if seen.is_served() && seen.size > volume.size && !volume.allow_shrink {
        return refused(
            ErrorCode::Conflict,
            format!("the volume has {} on the node and {} here", seen.size, volume.size),
            "`penstock volume resize` to the size that is right",
        );
    }
    if seen.size != volume.size {
        return pending("the node resizes it");
    }
    if !replica.made || volume.allow_shrink { pending("it serves, which is being recorded") } else { Progress::Settled }
}
