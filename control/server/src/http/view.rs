//! What people see of a drive or volume: desired, observed and the progress between.

use penstock_api::http::{ChangeView, DriveView, ExportView, OriginView, Progress, ReplicaView, SnapshotView, VolumeView};
use penstock_api::rpc::{Door, Origin, VolumeInfo};
use penstock_api::{DriveId, NodeId, SnapshotId, VolumeId};
use penstock_model::{DesiredReplica, DesiredVolume, clones, membership};

use crate::control::State;

pub fn drive(state: &State, id: DriveId) -> Option<DriveView> {
    let desired = state.desired.drives.get(&id)?;
    let seen = state.node(desired.node_id).and_then(|node| node.seen.as_ref());
    let observed = seen.and_then(|seen| seen.drives.iter().find(|drive| drive.drive_id == id)).cloned();
    Some(DriveView {
        drive_id: id,
        node_id: desired.node_id,
        node: state.desired.node_name(desired.node_id),
        spec: desired.spec.clone(),
        volatile: desired.volatile,
        progress: state.look().drive(id),
        volumes: state.desired.volumes_on(id).map(|(_, volume)| volume.name.clone()).collect(),
        observed,
    })
}

/// As last seen on a node, be it away now or not.
fn last_seen(state: &State, node_id: NodeId, id: VolumeId) -> Option<&VolumeInfo> {
    state.node(node_id)?.seen.as_ref()?.volume(id)
}

/// The node that leads a volume's group now, and what it says of the volume.
pub fn leader(state: &State, id: VolumeId) -> Option<(NodeId, &VolumeInfo)> {
    let volume = state.desired.volumes.get(&id)?;
    let there = |node_id| Some(&state.node(node_id)?.present()?.observed);
    let (node_id, _) = membership::leader(id, volume, there)?;
    Some((node_id, last_seen(state, node_id, id)?))
}

pub fn volume(state: &State, id: VolumeId) -> Option<VolumeView> {
    let desired = state.desired.volumes.get(&id)?;
    let leader = leader(state, id).map(|(_, info)| info);
    let seen = || desired.replicas.iter().find_map(|replica| last_seen(state, replica.node_id, id));
    Some(VolumeView {
        volume_id: id,
        segment_id: desired.segment_id,
        name: desired.name.clone(),
        size: desired.size,
        block_size: desired.block_size,
        origin: desired.origin.as_deref().map(|origin| self::origin(state, origin)),
        progress: state.look().volume(id),
        replicas: desired.replicas.iter().map(|replica| self::replica(state, (id, desired), replica)).collect(),
        spare: state.look().spare(id, desired),
        change: change(state, id, desired),
        exports: desired.doors.iter().map(|door| export(state, id, desired, door.node_id, &door.door)).collect::<Option<_>>()?,
        snapshots: desired.snapshots.iter().filter_map(|known| snapshot(state, id, known.snapshot_id)).collect(),
        observed: leader.or_else(seen).cloned(),
    })
}

fn origin(state: &State, &Origin { volume_id, snapshot_id, .. }: &Origin) -> OriginView {
    let volume = state.desired.volumes.get(&volume_id);
    let snapshot = volume.and_then(|volume| volume.snapshots.iter().find(|known| known.snapshot_id == snapshot_id));
    OriginView {
        volume_id,
        volume: volume.map_or_else(|| volume_id.to_string(), |volume| volume.name.to_string()),
        snapshot_id,
        snapshot: snapshot.map_or_else(|| snapshot_id.to_string(), |snapshot| snapshot.name.to_string()),
    }
}

fn change(state: &State, id: VolumeId, volume: &DesiredVolume) -> Option<ChangeView> {
    let change = volume.change.as_ref()?;
    let node = |member: u64| {
        let found = volume.member(member).or(change.waits.as_ref().filter(|waits| waits.member == member));
        found.map_or_else(String::new, |replica| state.desired.node_name(replica.node_id))
    };
    Some(ChangeView {
        from: change.from,
        from_node: node(change.from),
        to: change.to,
        to_node: node(change.to),
        given_up: change.is_off,
        progress: state.look().change(id, volume)?,
    })
}

fn replica(state: &State, (id, volume): (VolumeId, &DesiredVolume), replica: &DesiredReplica) -> ReplicaView {
    let observed = last_seen(state, replica.node_id, id);
    let group = observed.and_then(|info| info.group.as_ref());
    let look = state.look();
    let rebuild = group.and_then(|group| group.rebuild);
    ReplicaView {
        replica_id: replica.replica_id,
        member: replica.member,
        node_id: replica.node_id,
        node: state.desired.node_name(replica.node_id),
        drive_id: replica.drive_id,
        log_only: replica.log_only,
        progress: look.standing(id, volume, replica),
        reachable: state.node(replica.node_id).is_some_and(|node| node.present().is_some()),
        part: group.map(|group| group.part),
        term: group.map(|group| group.term),
        applied: group.map(|group| group.applied),
        lag: look.lag(id, volume, replica),
        rebuilt_percent: rebuild.map(|rebuild| rebuild.percent()),
        blocks_to_copy: rebuild.map(|rebuild| rebuild.blocks_left()),
        observed: observed.cloned(),
    }
}

pub fn export(state: &State, id: VolumeId, volume: &DesiredVolume, node_id: NodeId, door: &Door) -> Option<ExportView> {
    let desired = volume.door(node_id, door)?;
    let observed = last_seen(state, node_id, id).and_then(|info| info.exports.iter().find(|export| export.door == *door));
    Some(ExportView {
        node_id,
        node: state.desired.node_name(node_id),
        door: door.clone(),
        progress: state.look().door(id, volume, desired),
        observed: observed.cloned(),
    })
}

pub fn snapshot(state: &State, id: VolumeId, snapshot_id: SnapshotId) -> Option<SnapshotView> {
    let volume = state.desired.volumes.get(&id)?;
    let snapshot = volume.snapshots.iter().find(|snapshot| snapshot.snapshot_id == snapshot_id)?;
    let look = state.look();
    let served_by = look.served(id, volume).map(|(node_id, _)| node_id);
    let seen = served_by.and_then(|node_id| last_seen(state, node_id, id));
    Some(SnapshotView {
        snapshot_id,
        name: snapshot.name.clone(),
        clones: clones::clones_of(&state.desired, id, Some(snapshot_id)).into_iter().map(|clone| clone.name.clone()).collect(),
        progress: look.snapshot(id, volume, snapshot),
        observed: seen.and_then(|info| info.snapshots.iter().find(|seen| seen.snapshot_id == snapshot_id)).cloned(),
    })
}

/// Whether waiting longer may help.
pub fn is_under_way(progress: &Progress) -> bool {
    matches!(progress, Progress::Pending { .. } | Progress::Removing { .. })
}
