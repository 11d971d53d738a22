//! Control loses its whole state and is rebuilt from the drives.

use std::collections::BTreeSet;

use penstock_api::id::Id;
use penstock_api::rpc::DriveLabel;
use penstock_api::{ClusterId, DriveId, NodeId, VolumeId};

use super::{World, named};
use crate::desired::{Desired, DesiredNode, DesiredReplica, Record};
use crate::import;
use crate::issuer::Issuer;
use crate::observed::Observed;

/// Control's disk is gone. An operator starts an empty control and imports every persistent drive there is.
pub(super) fn import(world: &mut World) {
    world.converge();
    import_amid(world);
}

/// The same in the middle of whatever is under way.
pub(super) fn import_amid(world: &mut World) {
    let before = world.desired.clone();
    // A drive that was taken away and comes back later may hold ids that are issued again: nothing shows them now.
    for (id, node) in &mut world.nodes {
        let known: BTreeSet<String> = before.drives.values().filter(|drive| drive.node_id == *id).map(|drive| drive.spec.place()).collect();
        node.media.retain(|place, _| known.contains(place));
    }
    world.desired = Desired::default();
    world.has_imported = true;
    let label = |drive: &crate::DesiredDrive| world.nodes[&drive.node_id].media.get(&drive.spec.place())?.label;
    let found: Vec<(penstock_api::DriveSpec, (ClusterId, NodeId, DriveId), bool)> =
        before.drives.values().filter_map(|drive| Some((drive.spec.clone(), label(drive)?, drive.volatile))).collect();
    let Some((_, (cluster_id, node_id, _), _)) = found.first() else {
        world.desired = before;
        return;
    };
    let adopted = import::adopt(&world.desired, *cluster_id, *node_id).unwrap().expect("an empty control adopts");
    world.desired.apply(&[Record::Identity(adopted)]);
    world.mark = None;
    world.issuer = Issuer::open(adopted, None);
    // Those that say who they are first: the others get numbers that are free then.
    let mut names: Vec<(Option<NodeId>, DesiredNode)> =
        named().into_iter().map(|(id, node)| (world.nodes[&id].claim.map(|claim| claim.1), node)).collect();
    names.sort_by_key(|(shown, _)| shown.is_none());
    for (shown, node) in &names {
        // Unclaimed means that nothing of the cluster was ever there, so any id will do for it.
        if shown.is_some() {
            let (_, records) = crate::enroll(&world.desired, node, *shown).unwrap();
            world.desired.apply(&records);
        }
    }
    for (spec, (cluster_id, node_id, drive_id), volatile) in &found {
        let label = DriveLabel { cluster_id: *cluster_id, node_id: *node_id, drive_id: *drive_id, incarnation: 1 };
        let records = import::import_drive(&world.desired, spec, &label, *volatile);
        world.desired.apply(&records);
    }
    let nodes: Vec<NodeId> = world.nodes.keys().copied().collect();
    for id in nodes {
        world.round(id, usize::MAX, false);
    }
    let observed = world.observe_all();
    let take_up = |world: &mut World| {
        let mut report = import::empty_report(&adopted);
        let mut changed = 0;
        for (id, seen) in &observed {
            let records = import::import_observed(&world.desired, *id, seen, true, &mut report);
            changed += records.len();
            world.desired.apply(&records);
        }
        changed
    };
    take_up(world);
    assert_eq!(take_up(world), 0, "importing twice changed something");
    for (id, node) in &before.nodes {
        world.desired.apply(&[Record::PutNode(*id, node.clone())]);
    }
    // Ids that lie on no drive are known to nobody now; those of things removed before do not matter either.
    let alive: BTreeSet<Id> = observed.values().flat_map(Observed::ids).collect();
    world.issued.retain(|id| alive.contains(id));
    // Replicas that are nowhere any more (on a drive that was taken away, or that forgot) are not found again.
    let majority = |id: &VolumeId| !world.groups.contains_key(id) || world.has_majority(*id);
    let facts = |desired: &Desired| {
        let there = |id: &VolumeId, node_id: &NodeId| observed[node_id].volumes.contains_key(id);
        let replicas = desired.volumes.iter().flat_map(|(id, volume)| {
            let here = volume.replicas.iter().filter(|replica| there(id, &replica.node_id));
            // Nor are doors that never opened.
            let opened = |node_id| volume.doors.iter().filter(|door| door.node_id == node_id && volume.is_founded()).count();
            // Without a majority a wish for another size waits, and is forgotten.
            let size = majority(id).then_some(volume.size);
            here.map(move |replica| {
                let DesiredReplica { member, replica_id, node_id, drive_id, made, .. } = *replica;
                (*id, size, (member, replica_id, node_id, drive_id, made), opened(node_id))
            })
        });
        replicas.collect::<Vec<_>>()
    };
    assert_eq!(facts(&world.desired), facts(&before));
    assert_eq!(world.desired.drives.keys().collect::<Vec<_>>(), before.drives.keys().collect::<Vec<_>>());
}
