//! What people may ask for: each function judges one wish against what is desired and observed, and answers the
//! records to make durable, or an error that says what to do next. Nothing happens at a node here.

use penstock_api::http::{ApiError, DriveAddBody, VolumeCreateBody};
use penstock_api::rpc::{Door, DriveState, ErrorCode};
use penstock_api::{ByteSize, DriveId, ReplicaId, SegmentId, VolumeId, VolumeName};

use crate::desired::{Desired, DesiredDoor, DesiredDrive, DesiredVolume, Phase, Record};
use crate::observed::Observed;

/// Blocks inside are 4 KiB (DESIGN 6), so sizes are multiples of it.
pub const SIZE_MULTIPLE: u64 = 4096;
/// Doors of one volume, the bound on a record's size.
pub const DOORS_MAX: usize = 16;

pub type Judged = Result<Vec<Record>, ApiError>;

fn not_found(what: &str, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("{what} does not exist")).with_hint(hint)
}

fn volume<'a>(desired: &'a Desired, name_or_id: &str) -> Result<(VolumeId, &'a DesiredVolume), ApiError> {
    desired.find_volume(name_or_id).ok_or_else(|| not_found(&format!("volume {name_or_id}"), "see `penstock volume ls`"))
}

/// As [`volume`], for changes that make no sense on a volume that is going away.
fn present_volume<'a>(desired: &'a Desired, name_or_id: &str) -> Result<(VolumeId, &'a DesiredVolume), ApiError> {
    let (id, found) = volume(desired, name_or_id)?;
    if found.phase.is_present() {
        return Ok((id, found));
    }
    Err(ApiError::new(ErrorCode::Busy, format!("volume {} is being removed", found.name)))
}

fn drive(desired: &Desired, id: DriveId) -> Result<&DesiredDrive, ApiError> {
    desired.drives.get(&id).ok_or_else(|| not_found(&format!("drive {id}"), "see `penstock pool ls`"))
}

/// Where a drive of this spec's place is desired already.
pub fn drive_at(desired: &Desired, place: &str) -> Option<DriveId> {
    desired.drives.iter().find(|(_, drive)| drive.spec.place() == place).map(|(id, _)| *id)
}

pub fn add_drive(desired: &Desired, id: DriveId, body: &DriveAddBody, volatile: bool) -> Judged {
    if let Some(known) = drive_at(desired, &body.spec.place()) {
        let error = ApiError::new(ErrorCode::AlreadyExists, format!("{} is in the pool as drive {known}", body.spec.place()));
        return Err(error.with_hint("see `penstock pool ls`"));
    }
    let drive = DesiredDrive {
        spec: body.spec.clone(),
        phase: Phase::Present,
        volatile,
        stores: body.stores.or(body.spec.stores),
        oplog_bytes: body.oplog_bytes,
        force: body.force,
        made: false,
    };
    Ok(vec![Record::PutDrive(id, drive)])
}

/// Without `force` only a drive that holds no volumes. With it, the volumes stay on the drive and leave with it.
pub fn remove_drive(desired: &Desired, id: DriveId, force: bool) -> Judged {
    let mut drive = drive(desired, id)?.clone();
    let names: Vec<&str> =
        desired.volumes_on(id).filter(|(_, volume)| volume.phase.is_present()).map(|(_, volume)| volume.name.as_str()).collect();
    if !names.is_empty() && !force {
        let shown = names.iter().take(5).copied().collect::<Vec<_>>().join(", ");
        let more = if names.len() > 5 { ", …" } else { "" };
        let error = ApiError::new(ErrorCode::Busy, format!("{} volumes live on drive {id}: {shown}{more}", names.len()));
        return Err(error.with_hint(
            "remove them first, or use --force to detach the drive with them: nothing is erased, `penstock pool import` brings them back",
        ));
    }
    let force = force || matches!(drive.phase, Phase::Removing { force: true });
    drive.phase = Phase::Removing { force };
    Ok(vec![Record::PutDrive(id, drive)])
}

/// Takes back a drive that the node refused to add.
pub fn withdraw_drive(desired: &Desired, id: DriveId) -> Vec<Record> {
    match desired.drives.get(&id) {
        Some(drive) if !drive.made && desired.volumes_on(id).next().is_none() => {
            let mut drive = drive.clone();
            drive.phase = Phase::Removing { force: false };
            vec![Record::PutDrive(id, drive)]
        }
        _ => vec![],
    }
}

/// The drive a new volume goes to: the one asked for, else the serving one with the most space that no volume of
/// ours has a claim on yet.
pub fn place(desired: &Desired, observed: Option<&Observed>, asked: Option<DriveId>) -> Result<DriveId, ApiError> {
    if let Some(id) = asked {
        return match drive(desired, id)?.phase {
            Phase::Present => Ok(id),
            Phase::Removing { .. } => Err(ApiError::new(ErrorCode::Busy, format!("drive {id} is being removed"))),
        };
    }
    let present = || desired.drives.iter().filter(|(_, drive)| drive.phase.is_present());
    if present().next().is_none() {
        let error = ApiError::new(ErrorCode::NotFound, "the pool has no drive");
        return Err(error.with_hint("add one first, for example: penstock pool add 'file:/var/lib/penstock/d0.img?size=10GiB'"));
    }
    let room = |id: DriveId| {
        let seen = observed?.drives.get(&id).filter(|drive| drive.state == DriveState::Serving)?;
        // Thin volumes of this drive may still grow into the free space; what they could take is set off.
        let promised: u64 = desired.volumes_on(id).map(|(_, volume)| volume.size.0).fold(0, u64::saturating_add);
        Some(i128::from(seen.free.0) - i128::from(promised))
    };
    // Serving drives first, by room, then by id so that the choice is the same each time.
    let best = present().max_by_key(|(id, _)| (room(**id), std::cmp::Reverse(**id)));
    Ok(*best.expect("the pool has a drive").0)
}

/// Ids that a new volume carries.
#[derive(Clone, Copy, Debug)]
pub struct VolumeIds {
    pub volume: VolumeId,
    pub segment: SegmentId,
    pub replica: ReplicaId,
}

fn check_size(size: ByteSize) -> Result<(), ApiError> {
    if size.0 > 0 && size.0.is_multiple_of(SIZE_MULTIPLE) {
        return Ok(());
    }
    let next = size.0.max(1).checked_next_multiple_of(SIZE_MULTIPLE).unwrap_or(u64::MAX - (SIZE_MULTIPLE - 1));
    let error = ApiError::new(ErrorCode::Invalid, format!("size {size} is not a multiple of {SIZE_MULTIPLE} bytes above 0"));
    Err(error.with_hint(format!("the next that is: {}", ByteSize(next))))
}

pub fn check_name_free(desired: &Desired, name: &VolumeName) -> Result<(), ApiError> {
    match desired.volumes.values().find(|volume| volume.name == *name) {
        None => Ok(()),
        Some(volume) if volume.phase.is_present() => {
            let error = ApiError::new(ErrorCode::AlreadyExists, format!("a volume named {name} exists already"));
            Err(error.with_hint(format!("choose another name, or see `penstock volume show {name}`")))
        }
        Some(_) => {
            let error = ApiError::new(ErrorCode::AlreadyExists, format!("a volume named {name} is still being removed"));
            Err(error.with_hint(format!("wait for it, see `penstock volume show {name}`, or choose another name")))
        }
    }
}

pub fn create_volume(desired: &Desired, ids: VolumeIds, body: &VolumeCreateBody, drive_id: DriveId) -> Judged {
    check_name_free(desired, &body.name)?;
    check_size(body.size)?;
    let volume = DesiredVolume {
        name: body.name.clone(),
        segment_id: ids.segment,
        replica_id: ids.replica,
        size: body.size,
        allow_shrink: false,
        block_size: body.block_size,
        drive_id,
        phase: Phase::Present,
        made: false,
        doors: vec![],
    };
    Ok(vec![Record::PutVolume(ids.volume, volume)])
}

/// Takes back a volume that the node refused to make.
pub fn withdraw_volume(desired: &Desired, id: VolumeId) -> Vec<Record> {
    match desired.volumes.get(&id) {
        Some(volume) if !volume.made => {
            vec![Record::PutVolume(id, DesiredVolume { phase: Phase::Removing { force: false }, ..volume.clone() })]
        }
        _ => vec![],
    }
}

pub fn resize_volume(desired: &Desired, name_or_id: &str, size: ByteSize, allow_shrink: bool) -> Judged {
    let (id, volume) = present_volume(desired, name_or_id)?;
    check_size(size)?;
    if size < volume.size && !allow_shrink {
        let error = ApiError::new(ErrorCode::Invalid, format!("volume {} has {}, {size} is smaller", volume.name, volume.size));
        return Err(error.with_hint("shrinking destroys what lies beyond the new end: use --allow-shrink if that is meant"));
    }
    // A permission given for an earlier wish lasts until some wished size is reached: the node may still hold more.
    let allow_shrink = size < volume.size || volume.allow_shrink;
    Ok(vec![Record::PutVolume(id, DesiredVolume { size, allow_shrink, ..volume.clone() })])
}

/// Takes back a resize that the node refused: back to the size that is there.
pub fn withdraw_resize(desired: &Desired, id: VolumeId, observed: ByteSize) -> Vec<Record> {
    match desired.volumes.get(&id) {
        Some(volume) => vec![Record::PutVolume(id, DesiredVolume { size: observed, allow_shrink: false, ..volume.clone() })],
        None => vec![],
    }
}

pub fn remove_volume(desired: &Desired, observed: Option<&Observed>, name_or_id: &str, force: bool) -> Judged {
    let (id, volume) = volume(desired, name_or_id)?;
    let connections = observed.and_then(|observed| observed.volumes.get(&id)).map_or(0, |seen| seen.connections);
    let doors: Vec<String> = volume.doors.iter().map(|desired| desired.door.to_string()).collect();
    if !force && connections > 0 {
        let error = ApiError::new(ErrorCode::Busy, format!("volume {} is in use by {connections} hosts", volume.name));
        return Err(error.with_hint("disconnect them first, or use --force to destroy it under them"));
    }
    if !force && !doors.is_empty() {
        let error = ApiError::new(ErrorCode::Busy, format!("volume {} is exported: {}", volume.name, doors.join(", ")));
        return Err(error.with_hint(format!("`penstock volume unexport {}` first, or use --force", volume.name)));
    }
    let force = force || matches!(volume.phase, Phase::Removing { force: true });
    Ok(vec![Record::PutVolume(id, DesiredVolume { phase: Phase::Removing { force }, ..volume.clone() })])
}

/// Takes back a removal that the node refused, so that the volume lives on.
pub fn withdraw_removal(desired: &Desired, id: VolumeId) -> Vec<Record> {
    match desired.volumes.get(&id) {
        Some(volume) if volume.made && matches!(volume.phase, Phase::Removing { force: false }) => {
            vec![Record::PutVolume(id, DesiredVolume { phase: Phase::Present, ..volume.clone() })]
        }
        _ => vec![],
    }
}

/// What two doors may not share: a socket's path, or an NVMe subsystem's name.
fn door_place(door: &Door, volume: &VolumeName) -> Option<String> {
    match door {
        Door::Nvmf { nqn, .. } => nqn.as_ref().map(|nqn| nqn.to_string()),
        Door::Vhost { name } => Some(format!("vhost/{}", name.as_ref().unwrap_or(volume))),
        Door::VfioUser { name } => Some(format!("vfio-user/{}", name.as_ref().unwrap_or(volume))),
        Door::Local => None,
    }
}

pub fn export(desired: &Desired, name_or_id: &str, door: &Door) -> Judged {
    let (id, volume) = present_volume(desired, name_or_id)?;
    if let Some(place) = door_place(door, &volume.name) {
        let taken = desired.volumes.iter().find(|(other, holder)| {
            **other != id && holder.doors.iter().any(|desired| door_place(&desired.door, &holder.name).as_ref() == Some(&place))
        });
        if let Some((_, holder)) = taken {
            return Err(ApiError::new(ErrorCode::AlreadyExists, format!("{place} is a door of volume {}", holder.name)));
        }
    }
    let mut volume = volume.clone();
    if let Some(desired) = volume.doors.iter_mut().find(|desired| desired.door == *door) {
        desired.phase = Phase::Present;
    } else if volume.doors.len() < DOORS_MAX {
        volume.doors.push(DesiredDoor { door: door.clone(), phase: Phase::Present });
    } else {
        return Err(ApiError::new(ErrorCode::Capacity, format!("volume {} has {DOORS_MAX} doors, the most", volume.name)));
    }
    Ok(vec![Record::PutVolume(id, volume)])
}

pub fn unexport(desired: &Desired, name_or_id: &str, door: &Door, force: bool) -> Judged {
    let (id, volume) = volume(desired, name_or_id)?;
    let mut volume = volume.clone();
    if let Some(desired) = volume.doors.iter_mut().find(|desired| desired.door == *door) {
        let force = force || matches!(desired.phase, Phase::Removing { force: true });
        desired.phase = Phase::Removing { force };
        return Ok(vec![Record::PutVolume(id, volume)]);
    }
    let doors: Vec<String> = volume.doors.iter().map(|desired| desired.door.to_string()).collect();
    let has = if doors.is_empty() { "it has none".to_owned() } else { format!("it has {}", doors.join(", ")) };
    Err(ApiError::new(ErrorCode::NotFound, format!("volume {} has no door {door}: {has}", volume.name)))
}

/// Takes back an export or unexport that the node refused. `phase` is what the door returns to; `None` drops it.
pub fn withdraw_door(desired: &Desired, id: VolumeId, door: &Door, phase: Option<Phase>) -> Vec<Record> {
    let Some(volume) = desired.volumes.get(&id).filter(|volume| volume.door(door).is_some()) else {
        return vec![];
    };
    let mut volume = volume.clone();
    match phase {
        Some(phase) => volume.doors.iter_mut().filter(|desired| desired.door == *door).for_each(|desired| desired.phase = phase),
        None => volume.doors.retain(|desired| desired.door != *door),
    }
    vec![Record::PutVolume(id, volume)]
}

#[cfg(test)]
mod tests;
