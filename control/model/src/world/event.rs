//! What happens in the world, at random: wishes of people, rounds that die in their middle, crashes.

use penstock_api::http::{DriveAddBody, SnapshotName, VolumeCreateBody};
use penstock_api::rpc::{BlockSize, Door};
use penstock_api::{ByteSize, DriveId, NodeId, ReplicaId, SegmentId, SnapshotId, VolumeId};
use proptest::prelude::*;
use std::collections::BTreeMap;

use super::{NODES, World, loss, node_id};
use crate::change::{self, VolumeIds};
use crate::clones::{self, Shape};
use crate::issuer::Issuer;
use crate::observed::Observed;
use crate::snapshots;

#[derive(Clone, Debug)]
pub(super) enum Event {
    AddDrive {
        node: u16,
        place: u8,
        volatile: bool,
    },
    RemoveDrive {
        pick: usize,
        force: bool,
    },
    Create {
        name: u8,
        size: u64,
        pick: Option<usize>,
        replicas: u8,
    },
    Clone {
        pick: usize,
        snapshot: u8,
        name: u8,
    },
    Resize {
        pick: usize,
        size: u64,
        shrink: bool,
    },
    Remove {
        pick: usize,
        force: bool,
    },
    Snapshot {
        pick: usize,
        name: u8,
    },
    RemoveSnapshot {
        pick: usize,
        name: u8,
    },
    Export {
        pick: usize,
        port: u16,
    },
    Unexport {
        pick: usize,
        port: u16,
    },
    /// A round that dies after `upto` steps; what was done stays done.
    Round {
        node: u16,
        upto: usize,
        lost_answer: bool,
    },
    ControlCrash,
    NodeCrash {
        node: u16,
    },
    Move {
        pick: usize,
        from: u16,
        to: u16,
    },
    Replace {
        pick: usize,
        node: u16,
        on: Option<u16>,
    },
    GiveUp {
        pick: usize,
    },
    /// Somebody deletes a replica at its node, of a group that is whole.
    Wipe {
        pick: usize,
        node: u16,
    },
    /// Control loses its whole state and is rebuilt from the drives.
    Import,
}

pub(super) fn any_event() -> impl Strategy<Value = Event> {
    let pick = 0usize..8;
    prop_oneof![
        4 => (0..NODES, 0u8..2, any::<bool>()).prop_map(|(node, place, volatile)| Event::AddDrive { node, place, volatile }),
        1 => (pick.clone(), any::<bool>()).prop_map(|(pick, force)| Event::RemoveDrive { pick, force }),
        2 => (0u8..6, 1u64..9, proptest::option::of(pick.clone())).prop_map(|(name, size, pick)| Event::Create { name, size, pick, replicas: 1 }),
        3 => (0u8..6, 1u64..9).prop_map(|(name, size)| Event::Create { name, size, pick: None, replicas: 3 }),
        2 => (pick.clone(), 0u8..3, 0u8..3).prop_map(|(pick, snapshot, name)| Event::Clone { pick, snapshot, name }),
        2 => (pick.clone(), 1u64..9, any::<bool>()).prop_map(|(pick, size, shrink)| Event::Resize { pick, size, shrink }),
        2 => (pick.clone(), any::<bool>()).prop_map(|(pick, force)| Event::Remove { pick, force }),
        3 => (pick.clone(), 0u8..3).prop_map(|(pick, name)| Event::Snapshot { pick, name }),
        2 => (pick.clone(), 0u8..3).prop_map(|(pick, name)| Event::RemoveSnapshot { pick, name }),
        3 => (pick.clone(), 0u16..3).prop_map(|(pick, port)| Event::Export { pick, port }),
        2 => (pick.clone(), 0u16..3).prop_map(|(pick, port)| Event::Unexport { pick, port }),
        12 => (0..NODES, 0usize..6, any::<bool>()).prop_map(|(node, upto, lost_answer)| Event::Round { node, upto, lost_answer }),
        2 => Just(Event::ControlCrash),
        3 => (0..NODES).prop_map(|node| Event::NodeCrash { node }),
        3 => (pick.clone(), 0..NODES, 0..NODES).prop_map(|(pick, from, to)| Event::Move { pick, from, to }),
        3 => (pick.clone(), 0..NODES, proptest::option::of(0..NODES)).prop_map(|(pick, node, on)| Event::Replace { pick, node, on }),
        1 => pick.clone().prop_map(|pick| Event::GiveUp { pick }),
        2 => (pick.clone(), 0..NODES).prop_map(|(pick, node)| Event::Wipe { pick, node }),
        1 => Just(Event::Import),
    ]
}

pub(super) fn refs(observed: &BTreeMap<NodeId, Observed>) -> BTreeMap<NodeId, &Observed> {
    observed.iter().map(|(id, seen)| (*id, seen)).collect()
}

fn wish(world: &mut World, pick: usize, judge: impl FnOnce(&mut World, &str, ReplicaId) -> change::Judged) {
    let Some(name) = world.name(pick) else { return };
    let id = ReplicaId(world.id());
    let judged = judge(world, &name, id);
    world.commit(judged);
}

fn door(port: u16) -> Door {
    match port {
        0 => Door::NVMF_ANYWHERE,
        _ => Door::Vhost { name: Some(format!("s{port}").parse().unwrap()) },
    }
}

pub(super) fn happen(world: &mut World, event: Event) {
    match event {
        Event::AddDrive { node, place, volatile } => {
            let node_id = node_id(node);
            let text = if volatile { format!("malloc:m{place}?size=1GiB") } else { format!("file:/d{place}?size=1GiB") };
            let spec: penstock_api::DriveSpec = text.parse().unwrap();
            // As the server does: a drive of ours is imported, not added.
            if world.nodes[&node_id].media.get(&spec.place()).is_some_and(|medium| medium.label.is_some()) {
                return;
            }
            let body = DriveAddBody { spec, node: None, volatile, stores: None, oplog_bytes: None, force: false };
            let id = DriveId(world.id());
            let judged = change::add_drive(&world.desired, id, node_id, &body, volatile);
            world.commit(judged);
        }
        Event::RemoveDrive { pick, force } => {
            if let Some(id) = world.drive(pick) {
                let judged = change::remove_drive(&world.desired, id, force);
                world.commit(judged);
            }
        }
        Event::Create { name, size, pick, replicas } => {
            let (volume, segment) = (VolumeId(world.id()), SegmentId(world.id()));
            let ids = VolumeIds { volume, segment, replicas: (0..replicas).map(|_| ReplicaId(world.id())).collect() };
            let (name, size) = (format!("v{name}").parse().unwrap(), ByteSize::mib(size));
            let drive_ids: Vec<DriveId> = pick.and_then(|pick| world.drive(pick)).into_iter().collect();
            let shape = Shape { size, block_size: BlockSize::B4096, replicas, log_only: 0, origin: None };
            let observed = world.observe_all();
            let judged = change::place(&world.desired, &refs(&observed), &drive_ids, &shape)
                .and_then(|places| change::create_volume(&world.desired, &ids, &name, &shape, &places));
            world.commit(judged);
        }
        Event::Clone { pick, snapshot, name } => wish(world, pick, |world, volume, id| {
            let from = SnapshotName { volume: volume.to_owned(), snapshot: format!("s{snapshot}") };
            let (name, drive_ids) = (format!("c{name}").parse().unwrap(), vec![]);
            let body = VolumeCreateBody { name, size: None, block_size: None, replicas: None, log_only: 0, drive_ids, from: Some(from) };
            let observed = world.observe_all();
            let shape = clones::shape(&world.desired, &refs(&observed), &body)?;
            let places = change::place(&world.desired, &refs(&observed), &[], &shape)?;
            let replicas = places.iter().map(|_| ReplicaId(world.id())).collect();
            let ids = VolumeIds { volume: VolumeId(id.0), segment: SegmentId(world.id()), replicas };
            change::create_volume(&world.desired, &ids, &body.name, &shape, &places)
        }),
        Event::Resize { pick, size, shrink } => {
            if let Some(name) = world.name(pick) {
                let judged = change::resize_volume(&world.desired, &name, ByteSize::mib(size), shrink);
                world.commit(judged);
            }
        }
        Event::Remove { pick, force } => {
            if let Some(name) = world.name(pick) {
                let judged = change::remove_volume(&world.desired, &BTreeMap::new(), &name, force);
                world.commit(judged);
            }
        }
        Event::Snapshot { pick, name } => wish(world, pick, |world, volume, id| {
            snapshots::take(&world.desired, SnapshotId(id.0), volume, &format!("s{name}").parse().unwrap())
        }),
        Event::RemoveSnapshot { pick, name } => {
            wish(world, pick, |world, volume, _| snapshots::remove(&world.desired, volume, &format!("s{name}")));
        }
        Event::Export { pick, port } => {
            if let Some(name) = world.name(pick) {
                let (_, volume) = world.desired.find_volume(&name).unwrap();
                let judged = change::doors_meant(&world.desired, volume, &door(port), None)
                    .and_then(|doors| change::export(&world.desired, &name, &doors));
                world.commit(judged);
            }
        }
        Event::Unexport { pick, port } => {
            if let Some(name) = world.name(pick) {
                let (_, volume) = world.desired.find_volume(&name).unwrap();
                if let Some(door) = volume.doors.get(usize::from(port)).map(|desired| desired.door.clone()) {
                    let judged = change::unexport(&world.desired, &name, &door, None, false).map(|(_, records)| records);
                    world.commit(judged);
                }
            }
        }
        Event::Round { node, upto, lost_answer } => {
            world.round(node_id(node), upto, lost_answer);
        }
        Event::ControlCrash => {
            let json = |value: &crate::DesiredVolume| serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap();
            world.desired.volumes = world.desired.volumes.iter().map(|(id, volume)| (*id, json(volume))).collect();
            world.issuer = Issuer::open(world.desired.identity.unwrap(), world.mark);
        }
        Event::NodeCrash { node } => {
            let places = world.volatile_places(node_id(node));
            world.nodes.get_mut(&node_id(node)).unwrap().crash(&places);
        }
        Event::Move { pick, from, to } => wish(world, pick, |world, name, id| {
            let (from, to) = (node_id(from).to_string(), node_id(to).to_string());
            change::move_replica(&world.desired, &refs(&world.observe_all()), id, name, (&from, &to), None)
        }),
        Event::Replace { pick, node, on } => wish(world, pick, |world, name, id| {
            let (node, on) = (node_id(node).to_string(), on.map(|on| node_id(on).to_string()));
            change::replace_replica(&world.desired, &refs(&world.observe_all()), id, name, (&node, on.as_deref()), None)
        }),
        Event::GiveUp { pick } => {
            wish(world, pick, |world, name, _| change::give_up_change(&world.desired, &refs(&world.observe_all()), name));
        }
        Event::Wipe { pick, node } => world.wipe(pick, node_id(node)),
        Event::Import => loss::import(world),
    }
}
