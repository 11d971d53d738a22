//! The random lives, and scenes of their own.

use penstock_api::id::{ClusterTag, NodeNumber};
use penstock_api::rpc::ErrorCode;
use penstock_api::{ByteSize, ClusterId, NodeId, ReplicaId};
use proptest::prelude::*;

use super::event::{Event, any_event, happen, refs};
use super::{World, loss, node_id};
use crate::change;
use crate::desired::{DesiredNode, Record};
use crate::issuer::Issuer;
use crate::reconcile::{NodeStep, Step, reconcile};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn world_after_any_crashes_agrees_again(events in proptest::collection::vec(any_event(), 1..50)) {
        let mut world = World::new();
        for event in events {
            happen(&mut world, event);
        }
        world.converge();
        world.assert_agreed();
    }
}

/// One node with a drive and a volume, settled; the other two have nothing to do.
fn small() -> World {
    let mut world = World::new();
    happen(&mut world, Event::AddDrive { node: 0, place: 0, volatile: false });
    happen(&mut world, Event::Create { name: 0, size: 1, pick: None, replicas: 1 });
    world.converge();
    world
}

/// Three nodes with a drive each, and a volume on all of them.
fn wide() -> World {
    let mut world = World::new();
    (0..3).for_each(|node| happen(&mut world, Event::AddDrive { node, place: 0, volatile: false }));
    world.converge();
    happen(&mut world, Event::Create { name: 0, size: 1, pick: None, replicas: 3 });
    world
}

/// A whole round at each of these nodes, in this order.
fn rounds(world: &mut World, nodes: &[u16]) {
    for node in nodes {
        world.round(node_id(*node), usize::MAX, false);
    }
}

fn plan_of(world: &World, n: u16) -> crate::Plan {
    reconcile(&world.desired, node_id(n), &world.observe(node_id(n)))
}

#[test]
fn world_swapped_blank_drive_is_not_formatted_and_its_volumes_are_not_replaced() {
    let mut world = small();
    let node = world.nodes.get_mut(&node_id(0)).unwrap();
    node.crash(&[]);
    node.media.clear();
    let plan = plan_of(&world, 0);
    let Step::Node(claim) = &plan.steps[0] else { panic!("{plan:?}") };
    world.call(node_id(0), claim).unwrap();
    let plan = plan_of(&world, 0);
    let add = plan.steps.iter().find_map(|step| match step {
        Step::Node(step @ NodeStep::AddDrive(_)) => Some(step.clone()),
        _ => None,
    });
    assert_eq!(world.call(node_id(0), &add.unwrap()).unwrap_err().kind(), Some(ErrorCode::NotFound));
    assert_eq!(world.nodes[&node_id(0)].media.values().next().unwrap().label, None);
}

#[test]
fn world_volume_gone_from_a_serving_drive_is_reported_lost_not_made_anew() {
    let mut world = small();
    let id = *world.desired.volumes.keys().next().unwrap();
    world.nodes.get_mut(&node_id(0)).unwrap().media.values_mut().for_each(|medium| medium.volumes.clear());
    let plan = plan_of(&world, 0);
    assert_eq!((plan.steps, plan.lost), (vec![], vec![id]));
}

#[test]
fn world_node_of_another_cluster_is_left_alone_and_the_others_are_not() {
    let mut world = wide();
    let other = ClusterTag::new(9).unwrap();
    world.nodes.get_mut(&node_id(1)).unwrap().claim = Some((ClusterId::of(other), NodeId::of(other, NodeNumber::new(1).unwrap())));
    let plan = plan_of(&world, 1);
    assert!(plan.steps.is_empty() && plan.blocked.unwrap().contains("belongs to cluster"));
    assert!(plan_of(&world, 0).steps.iter().any(|step| matches!(step, Step::Node(NodeStep::CreateMember(_)))));
}

#[test]
fn world_older_control_state_never_shrinks_or_deletes() {
    let mut world = small();
    let copy = (world.desired.clone(), world.mark);
    happen(&mut world, Event::Resize { pick: 0, size: 8, shrink: false });
    for _ in 0..2000 {
        world.id();
    }
    happen(&mut world, Event::Create { name: 1, size: 1, pick: None, replicas: 1 });
    world.converge();
    (world.desired, world.mark) = copy;
    world.issuer = Issuer::open(world.desired.identity.unwrap(), world.mark);
    let plan = plan_of(&world, 0);
    assert_eq!(plan.steps, vec![]);
    assert_eq!(plan.strays.len(), 1);
    world.round(node_id(0), usize::MAX, false);
    assert_eq!(world.issuer.identity().incarnation.get(), 1, "the drives show ids that this state never issued");
    happen(&mut world, Event::Create { name: 2, size: 1, pick: None, replicas: 1 });
}

#[test]
fn world_members_are_told_the_same_membership_and_doors_wait_for_a_majority() {
    let mut world = wide();
    happen(&mut world, Event::Export { pick: 0, port: 0 });
    let first = |world: &World, n: u16| {
        plan_of(world, n).steps.into_iter().find_map(|step| match step {
            Step::Node(NodeStep::CreateMember(params)) => Some(params),
            _ => None,
        })
    };
    let (a, b) = (first(&world, 0).unwrap(), first(&world, 2).unwrap());
    assert_eq!((&a.members, a.segment_id, a.volume_id), (&b.members, b.segment_id, b.volume_id));
    assert!(a.replica_id != b.replica_id && a.members.list.len() == 3 && a.members.next == 4);

    let opens = |world: &World, n: u16| plan_of(world, n).steps.iter().any(|step| matches!(step, Step::Node(NodeStep::AddExport(_))));
    world.round(node_id(0), usize::MAX, false); // made
    world.round(node_id(0), usize::MAX, false); // recorded
    assert!(!opens(&world, 0), "one of three is made");
    world.round(node_id(1), usize::MAX, false);
    world.round(node_id(1), usize::MAX, false);
    assert!(opens(&world, 0) && opens(&world, 1) && !opens(&world, 2), "node 3 is away, and holds up nobody");
    world.converge();
    world.assert_agreed();
}

#[test]
fn world_member_that_its_drive_forgot_is_never_made_again() {
    let mut world = wide();
    world.converge();
    let id = *world.desired.volumes.keys().next().unwrap();
    world.nodes.get_mut(&node_id(1)).unwrap().media.values_mut().for_each(|medium| medium.volumes.clear());
    let plan = plan_of(&world, 1);
    assert_eq!((plan.steps, plan.lost), (vec![], vec![id]));
    happen(&mut world, Event::Remove { pick: 0, force: false });
    world.converge();
    assert!(world.desired.volumes.is_empty());
}

#[test]
fn world_nodes_know_each_other_and_hear_of_changes() {
    let mut world = wide();
    world.converge();
    let peers = |world: &World, n: u16| world.nodes[&node_id(n)].peers.iter().map(|peer| peer.node_id).collect::<Vec<_>>();
    assert_eq!(peers(&world, 0), [node_id(1), node_id(2), node_id(3)]);
    assert_eq!(peers(&world, 2), [node_id(0), node_id(1), node_id(3)]);
    let moved = DesiredNode { peer: Some("127.0.0.1:9".parse().unwrap()), ..world.desired.nodes[&node_id(1)].clone() };
    world.desired.apply(&[Record::PutNode(node_id(1), moved)]);
    assert!(plan_of(&world, 1).steps.is_empty());
    world.converge();
    assert_eq!(world.nodes[&node_id(0)].peers[0].address.port(), 9);
}

/// As [`wide`], settled, and a fourth node with a drive.
fn movable() -> World {
    let mut world = wide();
    happen(&mut world, Event::AddDrive { node: 3, place: 0, volatile: false });
    world.converge();
    world
}

fn asked_to_move(world: &World, from: u16, to: u16) -> change::Judged {
    let observed = world.observe_all();
    let (from, to) = (node_id(from).to_string(), node_id(to).to_string());
    change::move_replica(&world.desired, &refs(&observed), ReplicaId(world.issued.last().copied().unwrap()), "v0", (&from, &to), None)
}

/// As [`movable`], with a replica on its way from node 1 to node 3: made, recorded, added as a learner.
fn moving() -> World {
    let mut world = movable();
    happen(&mut world, Event::Move { pick: 0, from: 1, to: 3 });
    rounds(&mut world, &[3, 3, 0]);
    assert_eq!(members(&world), [1, 2, 3, 4]);
    world
}

fn members(world: &World) -> Vec<u64> {
    world.groups.values().next().unwrap().members.list.iter().map(|member| member.member).collect()
}

#[test]
fn world_replica_that_leads_moves_and_its_node_has_nothing_of_it_left() {
    let mut world = movable();
    happen(&mut world, Event::Move { pick: 0, from: 0, to: 3 });
    assert_eq!(asked_to_move(&world, 0, 3), Ok(vec![]), "said twice it is one wish");
    let second = asked_to_move(&world, 1, 3).unwrap_err();
    assert!(second.code == ErrorCode::Busy && second.hint.unwrap().contains("give-up v0"), "{}", second.message);
    world.converge();
    world.assert_agreed();
    assert_eq!(members(&world), [2, 3, 4]);
    assert!(world.nodes[&node_id(0)].media.values().all(|medium| medium.volumes.is_empty()));
    let shares: Vec<u8> = world.desired.volumes.values().next().unwrap().replicas.iter().map(|replica| replica.share).collect();
    assert_eq!(shares, [1, 2, 3], "controller ids never meet");
    let again = asked_to_move(&world, 0, 3).unwrap_err();
    assert!(again.code == ErrorCode::NotFound && again.hint.unwrap().contains("n1, n2, n3"), "{}", again.message);
}

#[test]
fn world_move_without_room_or_to_a_node_that_has_one_is_refused() {
    let mut world = movable();
    let taken = asked_to_move(&world, 0, 1).unwrap_err();
    assert!(taken.code == ErrorCode::AlreadyExists, "{}", taken.message);
    let (_, drive) = world.nodes.get_mut(&node_id(3)).unwrap().open.values_mut().next().unwrap();
    drive.free = ByteSize(0);
    world.nodes.get_mut(&node_id(0)).unwrap().media.values_mut().flat_map(|medium| medium.volumes.values_mut()).for_each(|volume| {
        volume.allocated = ByteSize::mib(1);
    });
    let full = asked_to_move(&world, 0, 3).unwrap_err();
    assert!(full.code == ErrorCode::Capacity && full.message.contains("1 MiB"), "{}", full.message);
}

#[test]
fn world_replica_that_is_needed_is_not_given_up() {
    let mut world = movable();
    happen(&mut world, Event::Wipe { pick: 0, node: 1 });
    let observed = world.observe_all();
    let (good, bad) = (node_id(2).to_string(), node_id(1).to_string());
    let id = ReplicaId(world.issued.last().copied().unwrap());
    let ask = |node: &str| change::replace_replica(&world.desired, &refs(&observed), id, "v0", (node, None), None);
    let needed = ask(&good).unwrap_err();
    assert!(needed.code == ErrorCode::NotReady && needed.message.contains("the one on n1 is not well"), "{}", needed.message);
    assert!(ask(&bad).is_ok(), "the one that was lost is");
    happen(&mut world, Event::Replace { pick: 0, node: 1, on: None });
    world.converge();
    world.assert_agreed();
    assert_eq!(members(&world), [1, 3, 4]);
}

#[test]
fn world_leader_that_is_to_be_replaced_stays_where_another_was_lost_meanwhile() {
    let mut world = wide();
    world.converge();
    let lost = world.desired.drives.iter().find(|(_, drive)| drive.node_id == node_id(1)).map(|(id, _)| *id).unwrap();
    let gone = change::remove_drive(&world.desired, lost, true);
    world.commit(gone);
    assert_eq!(world.leads(*world.desired.volumes.keys().next().unwrap()), Some(node_id(0)));
    happen(&mut world, Event::Replace { pick: 0, node: 0, on: None });
    world.converge();
    assert_eq!(members(&world), [1, 2, 3], "without it one of two would be left");
}

#[test]
fn world_change_is_given_up_until_the_old_replica_has_left() {
    let mut world = moving();
    happen(&mut world, Event::GiveUp { pick: 0 });
    world.converge();
    world.assert_agreed();
    assert_eq!(members(&world), [1, 2, 3]);
    assert!(world.nodes[&node_id(3)].media.values().all(|medium| medium.volumes.is_empty()));
}

#[test]
fn world_clone_of_what_was_forgotten_before_it_was_made_holds_up_nothing() {
    let mut world = World::new();
    happen(&mut world, Event::AddDrive { node: 0, place: 0, volatile: true });
    happen(&mut world, Event::AddDrive { node: 0, place: 1, volatile: false });
    happen(&mut world, Event::Create { name: 0, size: 1, pick: Some(0), replicas: 1 });
    happen(&mut world, Event::Snapshot { pick: 0, name: 0 });
    world.converge();
    happen(&mut world, Event::Clone { pick: 0, snapshot: 0, name: 0 });
    happen(&mut world, Event::NodeCrash { node: 0 });
    happen(&mut world, Event::Create { name: 1, size: 1, pick: Some(1), replicas: 1 });
    world.converge();
    world.assert_agreed();
    let made: Vec<bool> = ["v0", "c0", "v1"].map(|name| world.desired.find_volume(name).unwrap().1.replicas[0].made).to_vec();
    assert_eq!(made, [true, false, true]);
}

#[test]
fn world_learner_whose_change_was_forgotten_goes_again_where_it_is_one_too_many() {
    let mut world = moving();
    loss::import_amid(&mut world);
    world.converge();
    world.assert_agreed();
    assert_eq!(members(&world), [1, 2, 3]);
    assert!(world.nodes[&node_id(3)].media.values().all(|medium| medium.volumes.is_empty()));
}

#[test]
fn world_learner_whose_change_was_forgotten_becomes_a_voter_where_one_lacks() {
    let mut world = movable();
    happen(&mut world, Event::Wipe { pick: 0, node: 1 });
    happen(&mut world, Event::Replace { pick: 0, node: 1, on: None });
    // The lost one is removed, and recorded as gone; the next one waits no longer, is made, recorded, added as a learner.
    rounds(&mut world, &[0, 0, 1, 1, 1, 0]);
    assert_eq!(members(&world), [1, 3, 4]);
    assert!(world.desired.volumes.values().all(|volume| volume.change.is_some()));
    loss::import_amid(&mut world);
    world.converge();
    world.assert_agreed();
    assert_eq!(members(&world), [1, 3, 4]);
}

#[test]
fn world_new_replica_that_never_joined_is_taken_back_before_another_comes() {
    let mut world = movable();
    happen(&mut world, Event::Wipe { pick: 0, node: 1 });
    happen(&mut world, Event::Replace { pick: 0, node: 1, on: None });
    // The lost one is removed, and recorded as gone.
    rounds(&mut world, &[0, 0, 1]);
    assert_eq!(members(&world), [1, 3]);
    let again = |world: &World| {
        let (observed, id) = (world.observe_all(), ReplicaId(world.issued.last().copied().unwrap()));
        let (node, on) = (node_id(1).to_string(), node_id(3).to_string());
        change::replace_replica(&world.desired, &refs(&observed), id, "v0", (&node, Some(&on)), None)
    };
    let early = again(&world).unwrap_err();
    assert!(early.code == ErrorCode::Busy && early.hint.unwrap().contains("give-up v0"), "{}", early.message);
    happen(&mut world, Event::GiveUp { pick: 0 });
    world.converge();
    assert_eq!(members(&world), [1, 3]);
    happen(&mut world, Event::Replace { pick: 0, node: 1, on: Some(3) });
    world.converge();
    world.assert_agreed();
    assert_eq!(members(&world), [1, 3, 4]);
}
