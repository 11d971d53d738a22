//! What people see of a drive or volume: desired, observed and the progress between.

use penstock_api::http::{DriveView, ExportView, Progress, VolumeView};
use penstock_api::{DriveId, VolumeId};
use penstock_model::DesiredVolume;

use crate::control::State;

pub fn drive(state: &State, id: DriveId) -> Option<DriveView> {
    let desired = state.desired.drives.get(&id)?;
    let observed = state.seen.as_ref().and_then(|seen| seen.drives.iter().find(|drive| drive.drive_id == id)).cloned();
    Some(DriveView {
        drive_id: id,
        spec: desired.spec.clone(),
        volatile: desired.volatile,
        progress: state.look().drive(id),
        volumes: state.desired.volumes_on(id).map(|(_, volume)| volume.name.clone()).collect(),
        observed,
    })
}

pub fn volume(state: &State, id: VolumeId) -> Option<VolumeView> {
    let desired = state.desired.volumes.get(&id)?;
    let observed = state.seen.as_ref().and_then(|seen| seen.volumes.iter().find(|volume| volume.volume_id == id));
    let exports = desired.doors.iter().map(|door| {
        let served = observed.and_then(|volume| volume.exports.iter().find(|export| export.door == door.door));
        ExportView { door: door.door.clone(), progress: state.look().door(id, desired, door), observed: served.cloned() }
    });
    Some(VolumeView {
        volume_id: id,
        segment_id: desired.segment_id,
        replica_id: desired.replica_id,
        name: desired.name.clone(),
        size: desired.size,
        block_size: desired.block_size,
        drive_id: desired.drive_id,
        progress: state.look().volume(id),
        exports: exports.collect(),
        observed: observed.cloned(),
    })
}

pub fn export(state: &State, id: VolumeId, volume: &DesiredVolume, door: &penstock_api::rpc::Door) -> Option<ExportView> {
    let desired = volume.door(door)?;
    let seen = state.seen.as_ref().and_then(|seen| seen.volumes.iter().find(|volume| volume.volume_id == id));
    let observed = seen.and_then(|volume| volume.exports.iter().find(|export| export.door == *door)).cloned();
    Some(ExportView { door: door.clone(), progress: state.look().door(id, volume, desired), observed })
}

/// Whether waiting longer may help.
pub fn is_under_way(progress: &Progress) -> bool {
    matches!(progress, Progress::Pending { .. } | Progress::Removing { .. })
}
