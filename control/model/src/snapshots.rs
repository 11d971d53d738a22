//! Snapshots of volumes: taken and removed where the volume is served, and each taken once. One that was seen and is gone is never taken again: it
//! would be of another moment under the same name.
//!
//! A volume is removed with its snapshots, where that is forced.

use penstock_api::http::ApiError;
use penstock_api::rpc::{ErrorCode, SnapshotCreateParams, SnapshotDeleteParams, VolumeState};
use penstock_api::{SnapshotId, VolumeId, VolumeName};

use crate::change::{Judged, present_volume};
use crate::clones;
use crate::desired::{Desired, DesiredSnapshot, DesiredVolume, Phase, Record};
use crate::observed::{ObservedSnapshot, ObservedVolume};
use crate::reconcile::{LocalStep, NodeStep, Step};

/// Snapshots of one volume at most, those that are being removed among them.
pub const SNAPSHOTS_MAX: usize = 256;

/// At the node where `seen` is.
pub(crate) fn plan((volume_id, volume): (VolumeId, &DesiredVolume), seen: &ObservedVolume, steps: &mut Vec<Step>) {
    if !seen.is_served() || seen.state != VolumeState::Serving {
        return;
    }
    let step = |snapshot: &DesiredSnapshot| {
        let snapshot_id = snapshot.snapshot_id;
        match (snapshot.phase, seen.has_snapshot(snapshot_id)) {
            (Phase::Present, _) if snapshot.made => None,
            (Phase::Present, true) => Some(Step::Local(LocalStep::SnapshotMade(volume_id, snapshot_id))),
            (Phase::Present, false) => {
                let params = SnapshotCreateParams { volume_id, snapshot_id, name: snapshot.name.clone() };
                Some(Step::Node(NodeStep::TakeSnapshot(params)))
            }
            (Phase::Removing { .. }, true) => Some(Step::Node(NodeStep::RemoveSnapshot(SnapshotDeleteParams { volume_id, snapshot_id }))),
            (Phase::Removing { .. }, false) => Some(Step::Local(LocalStep::ForgetSnapshot(volume_id, snapshot_id))),
        }
    };
    steps.extend(volume.snapshots.iter().filter_map(step));
}

pub fn take(desired: &Desired, id: SnapshotId, volume: &str, name: &VolumeName) -> Judged {
    let (volume_id, volume) = present_volume(desired, volume)?;
    if let Some(there) = volume.find_snapshot(name.as_str()) {
        let state = if there.phase.is_present() { "exists already" } else { "is still being removed" };
        let message = format!("a snapshot named {name} of volume {} {state}", volume.name);
        let hint = format!("choose another name, or see `penstock snapshot ls {}`", volume.name);
        return Err(ApiError::new(ErrorCode::AlreadyExists, message).with_hint(hint));
    }
    if volume.snapshots.len() >= SNAPSHOTS_MAX {
        let message = format!("volume {} has {SNAPSHOTS_MAX} snapshots, which is the most", volume.name);
        return Err(ApiError::new(ErrorCode::Capacity, message).with_hint("remove some with `penstock snapshot rm`"));
    }
    let mut volume = volume.clone();
    volume.snapshots.push(DesiredSnapshot { snapshot_id: id, name: name.clone(), phase: Phase::Present, made: false });
    Ok(vec![Record::PutVolume(volume_id, volume)])
}

/// Takes back a snapshot that the node refused to take. It may have been taken all the same.
pub fn withdraw(desired: &Desired, volume_id: VolumeId, id: SnapshotId) -> Vec<Record> {
    removing(desired, volume_id, |snapshot| snapshot.snapshot_id == id && !snapshot.made)
}

pub fn remove(desired: &Desired, volume: &str, name_or_id: &str) -> Judged {
    let (volume_id, volume) = present_volume(desired, volume)?;
    let Some(snapshot) = volume.find_snapshot(name_or_id) else {
        let message = format!("volume {} has no snapshot {name_or_id}", volume.name);
        return Err(ApiError::new(ErrorCode::NotFound, message).with_hint(format!("see `penstock snapshot ls {}`", volume.name)));
    };
    let id = snapshot.snapshot_id;
    let what = || format!("snapshot {} of volume {}", snapshot.name, volume.name);
    clones::refuse_under_clones(desired, volume_id, Some(id), what)?;
    Ok(removing(desired, volume_id, |snapshot| snapshot.snapshot_id == id))
}

fn removing(desired: &Desired, volume_id: VolumeId, is_meant: impl Fn(&DesiredSnapshot) -> bool) -> Vec<Record> {
    let Some(mut volume) = desired.volumes.get(&volume_id).cloned() else { return vec![] };
    volume.snapshots.iter_mut().filter(|snapshot| is_meant(snapshot)).for_each(|it| it.phase = Phase::Removing { force: false });
    vec![Record::PutVolume(volume_id, volume)]
}

/// Those that a replica shows and nobody knows of here.
pub(crate) fn strays<'a>(volume: &DesiredVolume, seen: &'a ObservedVolume) -> impl Iterator<Item = &'a ObservedSnapshot> {
    seen.snapshots.iter().filter(|seen| volume.snapshots.iter().all(|known| known.snapshot_id != seen.snapshot_id))
}

/// As an import does; whether there were any.
pub(crate) fn take_up(volume: &mut DesiredVolume, seen: &ObservedVolume) -> bool {
    let strays: Vec<_> = strays(volume, seen).cloned().collect();
    for seen in &strays {
        let name = crate::import::free_name(volume.snapshots.iter().map(|known| &known.name), &seen.name);
        volume.snapshots.push(DesiredSnapshot { snapshot_id: seen.snapshot_id, name, phase: Phase::Present, made: true });
    }
    !strays.is_empty()
}
