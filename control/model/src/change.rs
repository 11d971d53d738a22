//! What people may ask for: each function judges one wish against what is desired and observed, and answers the
//! records to make durable, or an error that says what to do next. Nothing happens at a node here.

use core::net::{Ipv4Addr, SocketAddr};
use std::collections::{BTreeMap, BTreeSet};

use penstock_api::http::{ApiError, DriveAddBody};
use penstock_api::rpc::{Door, DriveState, ErrorCode};
use penstock_api::{ByteSize, DriveId, NodeId, ReplicaId, SegmentId, VolumeId, VolumeName};

use crate::clones::{self, Shape};
use crate::desired::{Desired, DesiredDoor, DesiredDrive, DesiredGroup, DesiredReplica, DesiredVolume, Phase, Record};
use crate::observed::Observed;

/// Blocks inside are 4 KiB (DESIGN 6), so sizes are multiples of it.
pub const SIZE_MULTIPLE: u64 = 4096;
/// Doors of one volume on one node, the bound on a record's size.
pub const DOORS_MAX: usize = 16;
/// How many replicas with data, and how many that keep the log alone, a volume may be made with. Two would hold no majority without both.
pub const REPLICAS: [(u8, u8); 4] = [(1, 0), (3, 0), (5, 0), (2, 1)];
/// Where a node listens for hosts unless it was said otherwise.
const NVMF_DEFAULT: SocketAddr = SocketAddr::new(core::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 4420);

pub type Judged = Result<Vec<Record>, ApiError>;

fn not_found(what: &str, hint: &str) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("{what} does not exist")).with_hint(hint)
}

fn volume<'a>(desired: &'a Desired, name_or_id: &str) -> Result<(VolumeId, &'a DesiredVolume), ApiError> {
    desired.find_volume(name_or_id).ok_or_else(|| not_found(&format!("volume {name_or_id}"), "see `penstock volume ls`"))
}

/// As [`volume`], for changes that make no sense on a volume that is going away.
pub(crate) fn present_volume<'a>(desired: &'a Desired, name_or_id: &str) -> Result<(VolumeId, &'a DesiredVolume), ApiError> {
    let (id, found) = volume(desired, name_or_id)?;
    if found.phase.is_present() {
        return Ok((id, found));
    }
    Err(ApiError::new(ErrorCode::Busy, format!("volume {} is being removed", found.name)))
}

fn drive(desired: &Desired, id: DriveId) -> Result<&DesiredDrive, ApiError> {
    desired.drives.get(&id).ok_or_else(|| not_found(&format!("drive {id}"), "see `penstock pool ls`"))
}

/// The drive of a node that is desired at this spec's place already.
pub fn drive_at(desired: &Desired, node_id: NodeId, place: &str) -> Option<DriveId> {
    desired.drives.iter().find(|(_, drive)| drive.node_id == node_id && drive.spec.place() == place).map(|(id, _)| *id)
}

pub fn add_drive(desired: &Desired, id: DriveId, node_id: NodeId, body: &DriveAddBody, volatile: bool) -> Judged {
    if let Some(known) = drive_at(desired, node_id, &body.spec.place()) {
        let error = ApiError::new(ErrorCode::AlreadyExists, format!("{} is in the pool as drive {known}", body.spec.place()));
        return Err(error.with_hint("see `penstock pool ls`"));
    }
    let drive = DesiredDrive {
        node_id,
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
        let more = if names.len() > 5 { format!(", … ({} in all)", names.len()) } else { String::new() };
        let error = ApiError::new(ErrorCode::Busy, format!("drive {id} holds volumes: {shown}{more}"));
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

pub fn check_replicas(replicas: u8, log_only: u8) -> Result<(), ApiError> {
    if REPLICAS.contains(&(replicas, log_only)) {
        return Ok(());
    }
    let of = if log_only == 0 { replicas.to_string() } else { format!("{replicas}+{log_only}") };
    let error = ApiError::new(ErrorCode::Invalid, format!("a volume of {of} replicas is not offered"));
    Err(error.with_hint("use 1, 3, 5, or 2+log for two and one that keeps the log alone"))
}

/// The drives a new volume goes to: those asked for, else on as many nodes as it has replicas the serving one with the most space that no
/// volume of ours has a claim on yet, the emptiest nodes first. The last of them are for the replicas without data. `observed` are the nodes that are there.
pub fn place(
    desired: &Desired,
    observed: &BTreeMap<NodeId, &Observed>,
    asked: &[DriveId],
    shape: &Shape,
) -> Result<Vec<(NodeId, DriveId)>, ApiError> {
    if let Some(origin) = shape.origin {
        return clones::place(desired, observed, origin, asked, shape);
    }
    let replicas = shape.replicas_in_all();
    let chosen = if asked.is_empty() { emptiest(desired, observed, replicas)? } else { named(desired, asked, replicas)? };
    let unreachable = chosen.iter().find(|(node_id, _)| desired.nodes.get(node_id).is_none_or(|node| node.peer.is_none()));
    if let (2.., Some((node_id, _))) = (replicas, unreachable) {
        let name = desired.node_name(*node_id);
        let error = ApiError::new(ErrorCode::Invalid, format!("the other nodes do not know where to reach node {name}"));
        return Err(error.with_hint("start penstock-control with --node NAME=SOCKET,peer=ADDR:PORT for each node"));
    }
    Ok(chosen)
}

fn named(desired: &Desired, asked: &[DriveId], replicas: usize) -> Result<Vec<(NodeId, DriveId)>, ApiError> {
    if asked.len() != replicas {
        let error = ApiError::new(ErrorCode::Invalid, format!("{} drives are named for {replicas} replicas", asked.len()));
        return Err(error.with_hint("name as many drives as replicas, each of another node, or none"));
    }
    let mut nodes = BTreeSet::new();
    let each = asked.iter().map(|id| {
        let found = drive(desired, *id)?;
        if !found.phase.is_present() {
            return Err(ApiError::new(ErrorCode::Busy, format!("drive {id} is being removed")));
        }
        if !nodes.insert(found.node_id) {
            let message = format!("two of the drives are of node {}: it would take two replicas with it", desired.node_name(found.node_id));
            return Err(ApiError::new(ErrorCode::Invalid, message).with_hint("name drives of distinct nodes, see `penstock pool ls`"));
        }
        Ok((found.node_id, *id))
    });
    each.collect()
}

/// How good each drive is for a replica, of those that stay in the pool: serving ones first, by room, then by id so that the choice is the same
/// each time.
fn ranked<'a>(
    desired: &'a Desired,
    observed: &'a BTreeMap<NodeId, &Observed>,
) -> impl Iterator<Item = (NodeId, (Option<i128>, std::cmp::Reverse<DriveId>))> + 'a {
    let room = |id: DriveId, drive: &DesiredDrive| {
        let seen = observed.get(&drive.node_id)?.drives.get(&id).filter(|drive| drive.state == DriveState::Serving)?;
        // Thin volumes of this drive may still grow into the free space; what they could take is set off.
        let grows = |volume: &DesiredVolume| volume.replicas.iter().any(|replica| replica.drive_id == id && !replica.log_only);
        let promised: u64 =
            desired.volumes_on(id).filter(|(_, volume)| grows(volume)).map(|(_, volume)| volume.size.0).fold(0, u64::saturating_add);
        Some(i128::from(seen.free.0) - i128::from(promised))
    };
    let present = desired.drives.iter().filter(|(_, drive)| drive.phase.is_present());
    present.map(move |(&id, drive)| (drive.node_id, (room(id, drive), std::cmp::Reverse(id))))
}

fn emptiest(desired: &Desired, observed: &BTreeMap<NodeId, &Observed>, replicas: usize) -> Result<Vec<(NodeId, DriveId)>, ApiError> {
    let mut best: BTreeMap<NodeId, (Option<i128>, std::cmp::Reverse<DriveId>)> = BTreeMap::new();
    for (node_id, rank) in self::ranked(desired, observed) {
        let best = best.entry(node_id).or_insert(rank);
        *best = rank.max(*best);
    }
    if best.is_empty() {
        let error = ApiError::new(ErrorCode::NotFound, "the pool has no drive");
        return Err(error.with_hint("add one first, for example: penstock pool add 'file:/var/lib/penstock/d0.img?size=10GiB'"));
    }
    if best.len() < replicas {
        let message = format!("{replicas} replicas want drives on {replicas} nodes, and {} of the pool's nodes have one", best.len());
        return Err(
            ApiError::new(ErrorCode::Capacity, message).with_hint("add drives of further nodes: penstock pool add SPEC --node NAME")
        );
    }
    let mut ranked: Vec<_> = best.into_iter().collect();
    ranked.sort_by_key(|(_, rank)| std::cmp::Reverse(*rank));
    Ok(ranked.into_iter().take(replicas).map(|(node_id, (_, std::cmp::Reverse(drive_id)))| (node_id, drive_id)).collect())
}

/// Ids that a new volume carries.
#[derive(Clone, Debug)]
pub struct VolumeIds {
    pub volume: VolumeId,
    pub segment: SegmentId,
    /// One each.
    pub replicas: Vec<ReplicaId>,
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

/// `places`: a node and a drive of it for each replica.
pub fn create_volume(desired: &Desired, ids: &VolumeIds, name: &VolumeName, shape: &Shape, places: &[(NodeId, DriveId)]) -> Judged {
    check_name_free(desired, name)?;
    check_size(shape.size)?;
    assert_eq!(ids.replicas.len(), places.len(), "an id for each replica");
    let replica = |((member, &replica_id), &(node_id, drive_id))| {
        let log_only = member > u64::from(shape.replicas);
        DesiredReplica { log_only, ..DesiredReplica::first(member, replica_id, node_id, drive_id) }
    };
    let replicas: Vec<DesiredReplica> = (1..).zip(&ids.replicas).zip(places).map(replica).collect();
    let volume = DesiredVolume {
        name: name.clone(),
        segment_id: ids.segment,
        size: shape.size,
        allow_shrink: false,
        block_size: shape.block_size,
        group: (replicas.len() > 1).then(|| DesiredGroup::of(&replicas, shape.size)),
        replicas,
        change: None,
        phase: Phase::Present,
        doors: vec![],
        origin: shape.origin.map(Box::new),
        snapshots: vec![],
    };
    Ok(vec![Record::PutVolume(ids.volume, volume)])
}

/// Takes back a volume that a node refused to make.
pub fn withdraw_volume(desired: &Desired, id: VolumeId) -> Vec<Record> {
    match desired.volumes.get(&id) {
        Some(volume) if volume.doors.is_empty() && volume.replicas.iter().any(|replica| !replica.made) => {
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

pub fn remove_volume(desired: &Desired, observed: &BTreeMap<NodeId, &Observed>, name_or_id: &str, force: bool) -> Judged {
    let (id, volume) = volume(desired, name_or_id)?;
    clones::refuse_under_clones(desired, id, None, || format!("volume {}", volume.name))?;
    let connections: u32 = observed.values().filter_map(|observed| observed.volumes.get(&id)).map(|seen| seen.connections).sum();
    let doors: Vec<String> = volume.doors.iter().map(|desired| desired.door.to_string()).collect();
    if !force && connections > 0 {
        let error = ApiError::new(ErrorCode::Busy, format!("volume {} is in use by {connections} hosts", volume.name));
        return Err(error.with_hint("disconnect them first, or use --force to destroy it under them"));
    }
    if !force && !doors.is_empty() {
        let error = ApiError::new(ErrorCode::Busy, format!("volume {} is exported: {}", volume.name, doors.join(", ")));
        return Err(error.with_hint(format!("`penstock volume unexport {}` first, or use --force", volume.name)));
    }
    let snapshots = volume.snapshots.len();
    if !force && snapshots > 0 {
        let error = ApiError::new(ErrorCode::Busy, format!("volume {} has snapshots, {snapshots} in all", volume.name));
        return Err(error.with_hint("remove them first with `penstock snapshot rm`, or use --force to destroy them with it"));
    }
    let force = force || matches!(volume.phase, Phase::Removing { force: true });
    Ok(vec![Record::PutVolume(id, DesiredVolume { phase: Phase::Removing { force }, ..volume.clone() })])
}

/// Takes back a removal that the node refused, so that the volume lives on.
pub fn withdraw_removal(desired: &Desired, id: VolumeId) -> Vec<Record> {
    match desired.volumes.get(&id) {
        Some(volume) if volume.replicas.iter().all(|replica| replica.made) && matches!(volume.phase, Phase::Removing { force: false }) => {
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

/// The doors that one wish means: on the node named, else on every node that has a replica; with the node's own address where the wish has none.
pub fn doors_meant(desired: &Desired, volume: &DesiredVolume, door: &Door, node: Option<&str>) -> Result<Vec<(NodeId, Door)>, ApiError> {
    let nodes: Vec<NodeId> = match node {
        // What keeps the log alone serves no host.
        None => volume.replicas.iter().filter(|replica| !replica.log_only).map(|replica| replica.node_id).collect(),
        Some(text) => {
            let (id, node) = desired.find_node(text).ok_or_else(|| not_found(&format!("node {text}"), "see `penstock node ls`"))?;
            if volume.replica_on(id).is_none() {
                let message = format!("volume {} has no replica on node {}", volume.name, node.name);
                return Err(
                    ApiError::new(ErrorCode::Invalid, message).with_hint(format!("`penstock volume show {}` says where", volume.name))
                );
            }
            if volume.replica_on(id).is_some_and(|replica| replica.log_only) {
                let message = format!("the replica of volume {} on node {} keeps the log alone and serves no host", volume.name, node.name);
                return Err(ApiError::new(ErrorCode::Invalid, message).with_hint("open the door on the nodes of the others"));
            }
            vec![id]
        }
    };
    let Door::Nvmf { address, port, nqn } = door else { return Ok(nodes.into_iter().map(|id| (id, door.clone())).collect()) };
    let is_open = address.is_unspecified() && *port == 0;
    if !is_open && nodes.len() > 1 {
        let message = format!("{} nodes cannot all listen at {}", nodes.len(), SocketAddr::new(*address, *port));
        return Err(
            ApiError::new(ErrorCode::Invalid, message).with_hint("leave the address out, which takes each node's own, or name one --node")
        );
    }
    let at = |id: NodeId| {
        let own = desired.nodes.get(&id).and_then(|node| node.nvmf).or((volume.group.is_none()).then_some(NVMF_DEFAULT));
        let at = if is_open { own } else { Some(SocketAddr::new(*address, *port)) };
        let at = at.ok_or_else(|| {
            let message = format!("node {} has no address for hosts", desired.node_name(id));
            ApiError::new(ErrorCode::Invalid, message).with_hint("start penstock-control with --node NAME=SOCKET,…,nvmf=ADDR:PORT")
        })?;
        Ok((id, Door::Nvmf { address: at.ip(), port: at.port(), nqn: nqn.clone() }))
    };
    nodes.into_iter().map(at).collect()
}

pub fn export(desired: &Desired, name_or_id: &str, doors: &[(NodeId, Door)]) -> Judged {
    let (id, volume) = present_volume(desired, name_or_id)?;
    let mut volume = volume.clone();
    for (node_id, door) in doors {
        if let Some(place) = door_place(door, &volume.name) {
            let is_taken = |holder: &DesiredVolume| {
                let mut there = holder.doors.iter().filter(|desired| desired.node_id == *node_id);
                there.any(|desired| door_place(&desired.door, &holder.name).as_ref() == Some(&place))
            };
            if let Some((_, holder)) = desired.volumes.iter().find(|(other, holder)| **other != id && is_taken(holder)) {
                return Err(ApiError::new(ErrorCode::AlreadyExists, format!("{place} is a door of volume {}", holder.name)));
            }
        }
        let (node_id, door) = (*node_id, door.clone());
        if let Some(desired) = volume.doors.iter_mut().find(|desired| desired.node_id == node_id && desired.door == door) {
            desired.phase = Phase::Present;
        } else if volume.doors.iter().filter(|desired| desired.node_id == node_id).count() < DOORS_MAX {
            volume.doors.push(DesiredDoor { node_id, door, phase: Phase::Present });
        } else {
            return Err(ApiError::new(ErrorCode::Capacity, format!("volume {} has {DOORS_MAX} doors, the most", volume.name)));
        }
    }
    Ok(vec![Record::PutVolume(id, volume)])
}

/// Closes a door wherever it is open, or on one node. Answers which.
pub fn unexport(
    desired: &Desired,
    name_or_id: &str,
    door: &Door,
    node: Option<NodeId>,
    force: bool,
) -> Result<(Vec<NodeId>, Vec<Record>), ApiError> {
    let (id, volume) = volume(desired, name_or_id)?;
    let mut volume = volume.clone();
    let mut closed = Vec::new();
    let meant = |desired: &&mut DesiredDoor| desired.door == *door && node.is_none_or(|node| desired.node_id == node);
    for desired in volume.doors.iter_mut().filter(meant) {
        let force = force || matches!(desired.phase, Phase::Removing { force: true });
        desired.phase = Phase::Removing { force };
        closed.push(desired.node_id);
    }
    if !closed.is_empty() {
        return Ok((closed, vec![Record::PutVolume(id, volume)]));
    }
    let doors: Vec<String> = volume.doors.iter().map(|desired| desired.door.to_string()).collect();
    let has = if doors.is_empty() { "it has none".to_owned() } else { format!("it has {}", doors.join(", ")) };
    Err(ApiError::new(ErrorCode::NotFound, format!("volume {} has no door {door}: {has}", volume.name)))
}

/// Takes back an export or unexport that the node refused. `phase` is what the door returns to; `None` drops it.
pub fn withdraw_door(desired: &Desired, id: VolumeId, node_id: NodeId, door: &Door, phase: Option<Phase>) -> Vec<Record> {
    let Some(volume) = desired.volumes.get(&id).filter(|volume| volume.door(node_id, door).is_some()) else {
        return vec![];
    };
    let mut volume = volume.clone();
    let is_it = |desired: &DesiredDoor| desired.node_id == node_id && desired.door == *door;
    match phase {
        Some(phase) => volume.doors.iter_mut().filter(|desired| is_it(desired)).for_each(|desired| desired.phase = phase),
        None => volume.doors.retain(|desired| !is_it(desired)),
    }
    vec![Record::PutVolume(id, volume)]
}

mod node;
mod replica;
pub use node::{Farewell, remove_node, replicas_on};
pub use replica::{give_up_change, move_replica, replace_replica};

#[cfg(test)]
mod tests;
