//! Clones: volumes that begin as a snapshot of another volume is, at no cost. Each replica of one stands over the origin's in the same store, so it is made
//! where the origin has one; and what a clone stands on is not removed before it.
//!
//! A replica of a clone that is replaced later has its own content like any, wherever it is. The clone counts as standing on its origin all the same, as
//! long as it is desired: which of its replicas still do, nodes that are away cannot tell.

use std::collections::BTreeMap;

use penstock_api::http::{ApiError, VolumeCreateBody};
use penstock_api::rpc::{BlockSize, ErrorCode, Origin};
use penstock_api::{ByteSize, DriveId, NodeId, SnapshotId, VolumeId, VolumeName};

use crate::change::{check_replicas, present_volume};
use crate::desired::{Desired, DesiredReplica, DesiredVolume};
use crate::observed::{Observed, ObservedVolume};

/// What a new volume is to be: what is asked for, and where a clone is and nothing is said, as its origin is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub size: ByteSize,
    pub block_size: BlockSize,
    pub replicas: u8,
    pub log_only: u8,
    pub origin: Option<Origin>,
}

impl Shape {
    pub fn replicas_in_all(&self) -> usize {
        usize::from(self.replicas) + usize::from(self.log_only)
    }
}

/// Replicas that stay, those with data first.
fn staying(volume: &DesiredVolume) -> impl Iterator<Item = &DesiredReplica> {
    let of = |log_only| volume.replicas.iter().filter(move |replica| !replica.left && replica.log_only == log_only);
    of(false).chain(of(true))
}

pub fn shape(desired: &Desired, observed: &BTreeMap<NodeId, &Observed>, body: &VolumeCreateBody) -> Result<Shape, ApiError> {
    let Some(from) = &body.from else {
        let size = body.size.ok_or_else(|| {
            ApiError::new(ErrorCode::Invalid, format!("no size is given for volume {}", body.name))
                .with_hint("give one, or a snapshot that it is to be a clone of")
        })?;
        let (replicas, log_only) = (body.replicas.unwrap_or(1), body.log_only);
        check_replicas(replicas, log_only)?;
        return Ok(Shape { size, block_size: body.block_size.unwrap_or_default(), replicas, log_only, origin: None });
    };
    let (volume_id, volume) = present_volume(desired, &from.volume)?;
    let (of, hint) =
        (format!("snapshot {} of volume {}", from.snapshot, volume.name), format!("see `penstock snapshot ls {}`", volume.name));
    let snapshot = volume.find_snapshot(&from.snapshot).ok_or_else(|| {
        ApiError::new(ErrorCode::NotFound, format!("volume {} has no snapshot {}", volume.name, from.snapshot)).with_hint(hint.clone())
    })?;
    if !snapshot.phase.is_present() {
        return Err(ApiError::new(ErrorCode::Busy, format!("{of} is being removed")).with_hint(hint));
    }
    if volume.change.is_some() {
        let message =
            format!("a replica of volume {} is on its way to another place, and a clone is made where its origin is", volume.name);
        return Err(ApiError::new(ErrorCode::Busy, message).with_hint(format!("wait for it: `penstock replica ls {}`", volume.name)));
    }
    let seen = volume.replicas.iter().filter_map(|replica| observed.get(&replica.node_id)?.volumes.get(&volume_id));
    let taken = seen.flat_map(|seen| &seen.snapshots).find(|seen| seen.snapshot_id == snapshot.snapshot_id);
    let Some(least) = taken.filter(|_| snapshot.made).map(|seen| seen.size) else {
        let error = ApiError::new(ErrorCode::NotReady, format!("{of} is not there, as far as the nodes show that answer"));
        return Err(error.with_hint(hint));
    };
    if let Some(asked) = body.size.filter(|asked| *asked < least) {
        let error = ApiError::new(ErrorCode::Invalid, format!("{of} has {least}, and a clone of {asked} would cut it off"));
        return Err(error.with_hint("leave the size out, or name a larger one"));
    }
    if let Some(asked) = body.block_size.filter(|asked| *asked != volume.block_size) {
        let message = format!("volume {} has blocks of {} bytes, and a clone of it cannot have {asked}", volume.name, volume.block_size);
        return Err(ApiError::new(ErrorCode::Invalid, message).with_hint("leave the block size out"));
    }
    let own = |log_only| staying(volume).filter(|replica| replica.log_only == log_only).count() as u8;
    let (replicas, log_only) = match body.replicas {
        Some(replicas) => (replicas, body.log_only),
        None => (own(false), own(true)),
    };
    check_replicas(replicas, log_only)?;
    Ok(Shape {
        size: body.size.unwrap_or(least),
        block_size: volume.block_size,
        replicas,
        log_only,
        origin: Some(Origin { volume_id, segment_id: volume.segment_id, snapshot_id: snapshot.snapshot_id }),
    })
}

/// Where a clone's replicas are made: those with data where the origin has some, on those nodes first that are there and whole.
pub fn place(
    desired: &Desired,
    observed: &BTreeMap<NodeId, &Observed>,
    origin: Origin,
    asked: &[DriveId],
    shape: &Shape,
) -> Result<Vec<(NodeId, DriveId)>, ApiError> {
    let (id, volume) = present_volume(desired, &origin.volume_id.to_string())?;
    let is_whole = |replica: &DesiredReplica| {
        let seen = observed.get(&replica.node_id).and_then(|seen| seen.volumes.get(&id));
        seen.is_some_and(|seen| {
            seen.has_snapshot(origin.snapshot_id) && seen.group.as_ref().is_none_or(|group| group.is_well() && group.rebuild.is_none())
        })
    };
    let names = || {
        let each = staying(volume).map(|replica| format!("{} on {}", replica.drive_id, desired.node_name(replica.node_id)));
        each.collect::<Vec<_>>().join(", ")
    };
    let is_meant = |replica: &&DesiredReplica| asked.is_empty() || asked.contains(&replica.drive_id);
    let mut with_data: Vec<&DesiredReplica> = staying(volume).filter(|replica| !replica.log_only).filter(is_meant).collect();
    with_data.sort_by_key(|replica| !is_whole(replica)); // stable
    let wanted = usize::from(shape.replicas);
    if with_data.len() < wanted || !asked.is_empty() && asked.len() != shape.replicas_in_all() {
        let message = format!("a clone of {wanted} replicas with data is made where volume {} has its own: {}", volume.name, names());
        return Err(ApiError::new(ErrorCode::Invalid, message).with_hint("ask for no more of them, and leave the drives out or name these"));
    }
    let spare = with_data.split_off(wanted);
    with_data.sort_by_key(|replica| replica.member);
    // What keeps the log alone stands over nothing, and may be beside whatever is not taken.
    let logs = staying(volume).filter(|replica| replica.log_only && is_meant(replica)).chain(spare).take(usize::from(shape.log_only));
    let places: Vec<_> = with_data.iter().copied().chain(logs).map(|replica| (replica.node_id, replica.drive_id)).collect();
    if places.len() < shape.replicas_in_all() {
        let message = format!("volume {} has no place for a replica that keeps the log alone: {}", volume.name, names());
        return Err(ApiError::new(ErrorCode::Invalid, message).with_hint("ask for as many replicas as it has"));
    }
    match places.iter().find(|(_, drive)| desired.drives.get(drive).is_none_or(|drive| !drive.phase.is_present())) {
        Some((_, drive)) => Err(ApiError::new(ErrorCode::Busy, format!("drive {drive}, where a replica of it would be, leaves the pool"))),
        None => Ok(places),
    }
}

/// The volumes that are clones of a volume, or of one snapshot of it, in order of name.
pub fn clones_of(desired: &Desired, volume_id: VolumeId, snapshot: Option<SnapshotId>) -> Vec<&DesiredVolume> {
    let is_of = |origin: &Origin| origin.volume_id == volume_id && snapshot.is_none_or(|snapshot| origin.snapshot_id == snapshot);
    let mut clones: Vec<_> = desired.volumes.values().filter(|volume| volume.origin.as_deref().is_some_and(is_of)).collect();
    clones.sort_by(|a, b| a.name.cmp(&b.name));
    clones
}

/// What a replica stands on when it is made. Who joins later has the content copied, and what keeps the log alone stands on nothing.
pub(crate) fn ground<'a>(volume: &'a DesiredVolume, replica: &DesiredReplica) -> Option<&'a Origin> {
    volume.origin.as_deref().filter(|_| replica.joins.is_none() && !replica.log_only)
}

/// The name of a clone that a node shows to stand on its replica of a volume. What is copied, and what keeps the log alone, stands on nothing.
pub(crate) fn standing_on(desired: &Desired, observed: &Observed, volume_id: VolumeId) -> Option<VolumeName> {
    let stands = |seen: &ObservedVolume| seen.origin.is_some_and(|origin| origin.volume_id == volume_id);
    let (id, seen) = observed.volumes.iter().find(|(_, seen)| stands(seen))?;
    Some(desired.volumes.get(id).map_or_else(|| seen.name.clone(), |clone| clone.name.clone()))
}

/// Neither goes while a clone stands on it.
pub(crate) fn refuse_under_clones(
    desired: &Desired,
    volume_id: VolumeId,
    snapshot: Option<SnapshotId>,
    what: impl FnOnce() -> String,
) -> Result<(), ApiError> {
    let clones = clones_of(desired, volume_id, snapshot);
    let Some(first) = clones.first() else { return Ok(()) };
    let names: Vec<&str> = clones.iter().map(|clone| clone.name.as_str()).collect();
    let verb = if clones.len() > 1 { "are clones that stand" } else { "is a clone that stands" };
    let error = ApiError::new(ErrorCode::Busy, format!("{} cannot go: {} {verb} on it", what(), names.join(", ")));
    Err(error.with_hint(match first.phase.is_present() {
        true => format!("remove what stands on it first: penstock volume rm {}", first.name),
        false => format!("{} is being removed: wait for that", first.name),
    }))
}
