//! Says, for one drive, volume or door, how far what is desired has come. For people and for calls that wait.

use penstock_api::DriveId;
use penstock_api::VolumeId;
use penstock_api::http::Progress;
use penstock_api::rpc::{DriveState, ErrorCode, VolumeState};

use crate::desired::{Desired, DesiredDoor, DesiredVolume, Phase};
use crate::observed::Observed;
use crate::reconcile::{Subject, claim_conflict, conflict};
use crate::retry::Refusals;

/// What progress is judged by. `observed` is `None` while the node is away.
#[derive(Clone, Copy)]
pub struct Look<'a> {
    pub desired: &'a Desired,
    pub observed: Option<&'a Observed>,
    pub refusals: &'a Refusals,
}

fn pending(reason: impl Into<String>) -> Progress {
    Progress::Pending { reason: reason.into() }
}

fn refused(code: ErrorCode, message: String, hint: &str) -> Progress {
    Progress::Refused { code, message, hint: Some(hint.to_owned()) }
}

const AWAY: &str = "the node is away";

impl Look<'_> {
    fn refusal(&self, subject: &Subject) -> Option<Progress> {
        let refusal = self.refusals.get(subject)?;
        let code = refusal.error.kind().unwrap_or(ErrorCode::Internal);
        // The node will take it in time by itself: that is waiting, not refusing.
        if code == ErrorCode::NotReady {
            return Some(pending(refusal.error.message.clone()));
        }
        let hint = refusal.error.hint().map(str::to_owned);
        Some(Progress::Refused { code, message: refusal.error.message.clone(), hint })
    }

    /// The whole node: why nothing can go on, if so.
    fn node(&self) -> Option<Progress> {
        let Some(observed) = self.observed else {
            return Some(pending(AWAY));
        };
        let identity = self.desired.identity.as_ref()?;
        if let Some(conflict) = claim_conflict(identity, observed) {
            return Some(refused(
                ErrorCode::Conflict,
                conflict,
                "point this control at its own node, or start it with an empty state directory and import",
            ));
        }
        self.refusal(&Subject::Node)
    }

    pub fn drive(&self, id: DriveId) -> Progress {
        let Some(drive) = self.desired.drives.get(&id) else {
            return Progress::Settled;
        };
        let blocked = self.node().or_else(|| self.refusal(&Subject::Drive(id)));
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
        let seen = self.observed.and_then(|observed| observed.drives.get(&id));
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

    /// Of the volume itself; its doors are judged apart.
    pub fn volume(&self, id: VolumeId) -> Progress {
        let Some(volume) = self.desired.volumes.get(&id) else {
            return Progress::Settled;
        };
        let drive = self.desired.drives.get(&volume.drive_id);
        if drive.is_none_or(|drive| drive.phase == Phase::Removing { force: true }) {
            return Progress::Removing { reason: "it leaves with its drive".to_owned() };
        }
        let blocked = self.node().or_else(|| self.refusal(&Subject::Volume(id))).or_else(|| self.drive_in_the_way(volume));
        if !volume.phase.is_present() {
            return match blocked {
                Some(Progress::Pending { reason }) => Progress::Removing { reason },
                Some(other) => other,
                None => Progress::Removing { reason: "the node deletes it".to_owned() },
            };
        }
        if let Some(blocked) = blocked {
            return blocked;
        }
        let Some(seen) = self.observed.and_then(|observed| observed.volumes.get(&id)) else {
            let volatile = drive.is_some_and(|drive| drive.volatile);
            if volume.made && !volatile {
                return refused(
                    ErrorCode::NotFound,
                    format!("the volume was on drive {} and is not there any more: its data is lost there", volume.drive_id),
                    "check that this is the right drive; `penstock volume rm --force` gives the volume up",
                );
            }
            return pending("the node makes it");
        };
        if let Some(conflict) = conflict(volume, seen) {
            return refused(ErrorCode::Conflict, conflict, "nothing is done until a person has looked: remove the wrong one");
        }
        match seen.state {
            VolumeState::Serving => {}
            VolumeState::Opening => return pending("the node recovers it"),
            VolumeState::Deleting => return pending("the node deletes it"),
            VolumeState::Unavailable => {
                let reason = seen.reason.clone().unwrap_or_else(|| "no reason given".to_owned());
                return refused(ErrorCode::NotReady, format!("the volume is unavailable: {reason}"), "see `penstock pool ls`");
            }
        }
        if seen.size > volume.size && !volume.allow_shrink {
            return refused(
                ErrorCode::Conflict,
                format!("the volume has {} on the node and {} here", seen.size, volume.size),
                "`penstock volume resize` to the size that is right",
            );
        }
        if seen.size != volume.size {
            return pending("the node resizes it");
        }
        if !volume.made || volume.allow_shrink { pending("it serves, which is being recorded") } else { Progress::Settled }
    }

    fn drive_in_the_way(&self, volume: &DesiredVolume) -> Option<Progress> {
        if self.observed.is_some_and(|observed| observed.is_serving(volume.drive_id)) {
            return None;
        }
        match self.drive(volume.drive_id) {
            Progress::Settled | Progress::Removing { .. } => None,
            Progress::Pending { reason } => Some(pending(format!("its drive {}: {reason}", volume.drive_id))),
            Progress::Refused { code, message, hint } => {
                Some(Progress::Refused { code, message: format!("its drive {}: {message}", volume.drive_id), hint })
            }
        }
    }

    pub fn door(&self, id: VolumeId, volume: &DesiredVolume, desired: &DesiredDoor) -> Progress {
        let subject = Subject::Door(id, desired.door.clone());
        let blocked = self.node().or_else(|| self.refusal(&subject));
        let seen = self.observed.and_then(|observed| observed.volumes.get(&id));
        let served = seen.is_some_and(|seen| seen.doors.contains(&desired.door));
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
        match self.volume(id) {
            Progress::Settled => pending("the node opens it"),
            other => other,
        }
    }

    /// Everything that does not agree yet, a line each. Empty means desired and observed agree.
    pub fn unsettled(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut note = |what: String, progress: Progress| match progress {
            Progress::Settled => {}
            Progress::Pending { reason } => lines.push(format!("{what} is pending: {reason}")),
            Progress::Removing { reason } => lines.push(format!("{what} is being removed: {reason}")),
            Progress::Refused { message, .. } => lines.push(format!("{what} is refused: {message}")),
        };
        for id in self.desired.drives.keys() {
            note(format!("drive {id}"), self.drive(*id));
        }
        for (id, volume) in &self.desired.volumes {
            note(format!("volume {}", volume.name), self.volume(*id));
            for door in &volume.doors {
                note(format!("export {} of volume {}", door.door, volume.name), self.door(*id, volume, door));
            }
            let undesired = self.observed.and_then(|observed| observed.volumes.get(id)).into_iter().flat_map(|seen| &seen.doors);
            for door in undesired.filter(|door| volume.door(door).is_none()) {
                let refusal = self.refusal(&Subject::Door(*id, door.clone()));
                let closing = Progress::Removing { reason: "nobody desires it".to_owned() };
                note(format!("export {door} of volume {}", volume.name), refusal.unwrap_or(closing));
            }
        }
        if let Some(observed) = self.observed {
            for id in crate::reconcile::reconcile(self.desired, observed).strays {
                let name = &observed.volumes[&id].name;
                lines.push(format!("volume {name} ({id}) is on the node and unknown here: `penstock pool import` takes it up"));
            }
        }
        lines
    }
}
