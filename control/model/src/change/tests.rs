//! Wishes checked against what stands.

use penstock_api::id::Id;
use penstock_api::rpc::{BlockSize, GroupInfo, GroupPart, MemberRole};
use proptest::prelude::*;

use super::*;
use crate::desired::DesiredNode;
use crate::observed::{ObservedDrive, ObservedVolume};
use crate::reconcile::LocalStep;
use penstock_api::id::{ClusterTag, NodeNumber};

mod clone;

fn id(n: u64) -> Id {
    Id::from_u128(0x0194_a5c1_b2d3_8001_8000_0000_0000_0000 + u128::from(n)).unwrap()
}

fn drive_body(spec: &str) -> DriveAddBody {
    DriveAddBody { spec: spec.parse().unwrap(), node: None, volatile: false, stores: None, oplog_bytes: None, force: false }
}

fn node(n: u16) -> NodeId {
    NodeId::of(ClusterTag::new(7).unwrap(), NodeNumber::new(n).unwrap())
}

/// Drives of node 1.
fn with_drives(n: u64) -> Desired {
    let mut desired = Desired::default();
    for at in 1..=n {
        let records = add_drive(&desired, DriveId(id(at)), node(1), &drive_body(&format!("file:/d{at}?size=1GiB")), false).unwrap();
        desired.apply(&records);
    }
    desired
}

/// Nodes 1 to `n` with a drive each: drive `n` on node `n`.
fn with_nodes(n: u16) -> Desired {
    let mut desired = Desired::default();
    for at in 1..=n {
        let (peer, nvmf) = (Some(SocketAddr::from(([10, 0, 0, at as u8], 7700))), Some(SocketAddr::from(([10, 0, 0, at as u8], 4420))));
        let named = DesiredNode { name: format!("n{at}").parse().unwrap(), peer, nvmf, gone: false };
        desired.apply(&[Record::PutNode(node(at), named)]);
        let records = add_drive(&desired, DriveId(id(at.into())), node(at), &drive_body("file:/d?size=1GiB"), false).unwrap();
        desired.apply(&records);
    }
    desired
}

fn plain(replicas: u8, log_only: u8) -> Shape {
    Shape { size: ByteSize::mib(8), block_size: BlockSize::B4096, replicas, log_only, origin: None }
}

fn create(desired: &mut Desired, n: u64, name: &str, drive: u64) -> VolumeId {
    create_on(desired, n, name, &[(node(1), DriveId(id(drive)))])
}

fn create_on(desired: &mut Desired, n: u64, name: &str, places: &[(NodeId, DriveId)]) -> VolumeId {
    let replicas: Vec<ReplicaId> = (0..places.len() as u64).map(|at| ReplicaId(id(n + 2 + at))).collect();
    let ids = VolumeIds { volume: VolumeId(id(n)), segment: SegmentId(id(n + 1)), replicas };
    let records = create_volume(desired, &ids, &name.parse().unwrap(), &plain(places.len() as u8, 0), places).unwrap();
    desired.apply(&records);
    ids.volume
}

fn opened(desired: &Desired, name: &str, door: &Door) -> Judged {
    let (_, volume) = desired.find_volume(name).unwrap();
    export(desired, name, &doors_meant(desired, volume, door, None)?)
}

fn nobody() -> BTreeMap<NodeId, &'static Observed> {
    BTreeMap::new()
}

fn code(judged: Judged) -> ErrorCode {
    let error = judged.unwrap_err();
    error.code
}

#[test]
fn add_drive_at_a_known_place_refused() {
    let desired = with_drives(1);
    let judged = add_drive(&desired, DriveId(id(9)), node(1), &drive_body("file:/d1?size=2GiB"), false);
    assert_eq!(code(judged), ErrorCode::AlreadyExists);
}

#[test]
fn create_volume_of_a_taken_name_refused_also_while_it_is_removed() {
    let mut desired = with_drives(1);
    create(&mut desired, 10, "a", 1);
    assert_eq!(check_name_free(&desired, &"a".parse().unwrap()).unwrap_err().code, ErrorCode::AlreadyExists);
    let records = remove_volume(&desired, &nobody(), "a", false).unwrap();
    desired.apply(&records);
    let error = check_name_free(&desired, &"a".parse().unwrap()).unwrap_err();
    assert!(error.message.contains("still being removed"), "{error}");
}

#[test]
fn create_volume_of_an_odd_size_names_the_next_even_one() {
    for (size, next) in [(0, "4KiB"), (1, "4KiB"), (4097, "8KiB")] {
        let error = check_size(ByteSize(size)).unwrap_err();
        assert!(error.hint.as_ref().unwrap().ends_with(next), "{error:?}");
    }
    assert!(check_size(ByteSize(u64::MAX)).is_err());
}

#[test]
fn remove_drive_with_volumes_refused_unless_told_so() {
    let mut desired = with_drives(1);
    create(&mut desired, 10, "a", 1);
    let error = remove_drive(&desired, DriveId(id(1)), false).unwrap_err();
    assert!(error.code == ErrorCode::Busy && error.message.ends_with(": a"), "{error}");
    let records = remove_drive(&desired, DriveId(id(1)), true).unwrap();
    desired.apply(&records);
    assert!(desired.volumes.values().all(|volume| volume.phase.is_present()), "nothing on the drive is erased");
}

#[test]
fn remove_volume_in_use_refused_unless_told_so() {
    let mut desired = with_drives(1);
    let volume_id = create(&mut desired, 10, "a", 1);
    let records = opened(&desired, "a", &Door::Vhost { name: None }).unwrap();
    desired.apply(&records);
    let error = remove_volume(&desired, &nobody(), "a", false).unwrap_err();
    assert!(error.code == ErrorCode::Busy && error.message.contains("vhost"), "{error}");
    assert!(remove_volume(&desired, &nobody(), "a", true).is_ok());

    let mut observed = Observed::default();
    let volume = &desired.volumes[&volume_id];
    let seen = ObservedVolume { connections: 2, ..shown(volume, &volume.replicas[0]) };
    observed.volumes.insert(volume_id, seen);
    let error = remove_volume(&desired, &[(node(1), &observed)].into(), "a", false).unwrap_err();
    assert!(error.message.contains("in use by 2 hosts"), "{error}");
}

#[test]
fn remove_volume_with_snapshots_refused_unless_told_so() {
    let mut desired = with_drives(1);
    let id = penstock_api::SnapshotId(create(&mut desired, 10, "a", 1).0);
    let taken = crate::snapshots::take(&desired, id, "a", &"monday".parse().unwrap()).unwrap();
    desired.apply(&taken);
    assert_eq!(code(crate::snapshots::take(&desired, id, "a", &"monday".parse().unwrap())), ErrorCode::AlreadyExists);
    assert_eq!(code(crate::snapshots::remove(&desired, "a", "tuesday")), ErrorCode::NotFound);
    let error = remove_volume(&desired, &nobody(), "a", false).unwrap_err();
    assert!(error.code == ErrorCode::Busy && error.message.contains("1 in all"), "{error}");
    assert!(remove_volume(&desired, &nobody(), "a", true).is_ok());
}

#[test]
fn resize_smaller_needs_permission_which_ends_with_the_wish() {
    let mut desired = with_drives(1);
    let volume_id = create(&mut desired, 10, "a", 1);
    assert_eq!(code(resize_volume(&desired, "a", ByteSize::mib(4), false)), ErrorCode::Invalid);
    let records = resize_volume(&desired, "a", ByteSize::mib(4), true).unwrap();
    desired.apply(&records);
    assert!(desired.volumes[&volume_id].allow_shrink);
    let records = resize_volume(&desired, "a", ByteSize::mib(4), false).unwrap();
    desired.apply(&records);
    assert!(desired.volumes[&volume_id].allow_shrink, "the same wish again takes nothing back");
    let records = crate::LocalStep::ShrinkDone(volume_id).records(&desired);
    desired.apply(&records);
    let records = resize_volume(&desired, "a", ByteSize::mib(16), true).unwrap();
    desired.apply(&records);
    assert!(!desired.volumes[&volume_id].allow_shrink, "growing needs no such permission");
}

#[test]
fn export_to_a_taken_socket_refused() {
    let mut desired = with_drives(1);
    create(&mut desired, 10, "a", 1);
    create(&mut desired, 20, "b", 1);
    let records = opened(&desired, "a", &Door::Vhost { name: Some("b".parse().unwrap()) }).unwrap();
    desired.apply(&records);
    assert_eq!(code(opened(&desired, "b", &Door::Vhost { name: None })), ErrorCode::AlreadyExists);
    assert!(opened(&desired, "b", &Door::VfioUser { name: None }).is_ok());
    assert_eq!(unexport(&desired, "b", &Door::Vhost { name: None }, None, false).unwrap_err().code, ErrorCode::NotFound);
}

#[test]
fn place_prefers_the_serving_drive_with_the_most_unpromised_room() {
    let mut desired = with_drives(3);
    let mut observed = Observed::default();
    for (n, free, state) in [(1, 10, DriveState::Serving), (2, 20, DriveState::Serving), (3, 99, DriveState::Fenced)] {
        let spec = desired.drives[&DriveId(id(n))].spec.clone();
        let drive = ObservedDrive { spec, state, reason: None, volatile: false, free: ByteSize::mib(free) };
        observed.drives.insert(DriveId(id(n)), drive);
    }
    let one =
        |desired: &Desired, observed: &BTreeMap<NodeId, &Observed>| place(desired, observed, &[], &plain(1, 0)).map(|places| places[0].1);
    let there = [(node(1), &observed)].into();
    assert_eq!(one(&desired, &there), Ok(DriveId(id(2))));
    create(&mut desired, 10, "a", 2);
    create(&mut desired, 20, "b", 2);
    assert_eq!(one(&desired, &there), Ok(DriveId(id(1))), "16 of its 20 MiB are promised");
    assert_eq!(one(&desired, &nobody()), Ok(DriveId(id(1))), "unseen: the first");
    assert_eq!(one(&Desired::default(), &nobody()).unwrap_err().code, ErrorCode::NotFound);
}

#[test]
fn place_puts_replicas_on_distinct_nodes_the_emptiest_first() {
    let desired = with_nodes(4);
    let observed: BTreeMap<NodeId, Observed> = (1..=4u16)
        .map(|n| {
            let drive_id = DriveId(id(n.into()));
            let spec = desired.drives[&drive_id].spec.clone();
            let free = ByteSize::mib(u64::from(n) * 10);
            let drive = ObservedDrive { spec, state: DriveState::Serving, reason: None, volatile: false, free };
            (node(n), Observed { drives: [(drive_id, drive)].into(), ..Observed::default() })
        })
        .collect();
    let there: BTreeMap<NodeId, &Observed> = observed.iter().filter(|(id, _)| **id != node(3)).map(|(id, seen)| (*id, seen)).collect();
    let placed: Vec<NodeId> = place(&desired, &there, &[], &plain(3, 0)).unwrap().into_iter().map(|(id, _)| id).collect();
    assert_eq!(placed, [node(4), node(2), node(1)], "node 3 is away");

    let refused = |desired: &Desired, asked: &[u64], replicas: u8| {
        let asked: Vec<DriveId> = asked.iter().map(|n| DriveId(id(*n))).collect();
        place(desired, &there, &asked, &plain(replicas, 0)).unwrap_err()
    };
    assert!(refused(&desired, &[], 5).message.contains("4 of the pool's nodes"));
    assert!(refused(&desired, &[1, 2], 3).message.contains("2 drives are named for 3"));
    assert!(refused(&desired, &[1, 2, 2], 3).message.contains("two of the drives are of node n2"));
    let mut unreachable = desired.clone();
    unreachable.nodes.get_mut(&node(4)).unwrap().peer = None;
    assert!(refused(&unreachable, &[], 3).message.contains("where to reach node n4"));
    assert!(place(&unreachable, &there, &[], &plain(1, 0)).is_ok(), "alone, nobody has to reach it");
}

#[test]
fn doors_of_several_replicas_are_at_each_nodes_own_address() {
    let mut desired = with_nodes(3);
    let places: Vec<_> = (1..=3u16).map(|n| (node(n), DriveId(id(n.into())))).collect();
    create_on(&mut desired, 10, "a", &places);
    let volume = desired.find_volume("a").unwrap().1.clone();
    let shown = |door: &Door, node| doors_meant(&desired, &volume, door, node).map(|doors| doors.iter().map(|d| d.1.to_string()).collect());
    let all: Vec<String> = shown(&Door::NVMF_ANYWHERE, None).unwrap();
    assert_eq!(all, ["nvmf=10.0.0.1:4420", "nvmf=10.0.0.2:4420", "nvmf=10.0.0.3:4420"]);
    let fixed = Door::Nvmf { address: [127, 0, 0, 1].into(), port: 9, nqn: None };
    assert!(shown(&fixed, None).unwrap_err().message.contains("3 nodes cannot all listen at 127.0.0.1:9"));
    assert_eq!(shown(&fixed, Some("n2")).unwrap(), ["nvmf=127.0.0.1:9"]);
    assert_eq!(shown(&fixed, Some("n7")).unwrap_err().code, ErrorCode::NotFound);
    let ranges: Vec<_> = (1..=3).map(|n| volume.controllers(node(n)).unwrap()).collect();
    assert!(ranges.windows(2).all(|pair| pair[0].first <= pair[0].last && pair[0].last < pair[1].first), "{ranges:?}");

    let records = opened(&desired, "a", &Door::NVMF_ANYWHERE).unwrap();
    desired.apply(&records);
    let (_, volume) = desired.find_volume("a").unwrap();
    assert_eq!(volume.doors.len(), 3);
    let door = volume.doors[1].door.clone();
    let (closed, _) = unexport(&desired, "a", &door, None, false).unwrap();
    assert_eq!(closed, [node(2)]);
    let mut nowhere = desired.clone();
    nowhere.nodes.get_mut(&node(1)).unwrap().nvmf = None;
    assert!(opened(&nowhere, "a", &Door::NVMF_ANYWHERE).unwrap_err().hint.unwrap().contains("nvmf=ADDR:PORT"));
}

fn serving_drive() -> ObservedDrive {
    let (spec, free) = ("file:/d?size=1GiB".parse().unwrap(), ByteSize::gib(1));
    ObservedDrive { spec, state: DriveState::Serving, volatile: false, free, reason: None }
}

/// A replica as its node shows it.
fn shown(volume: &DesiredVolume, replica: &DesiredReplica) -> ObservedVolume {
    ObservedVolume {
        name: volume.name.clone(),
        segment_id: volume.segment_id,
        replica_id: replica.replica_id,
        size: volume.size,
        block_size: volume.block_size,
        drive_id: replica.drive_id,
        allocated: ByteSize(0),
        state: penstock_api::rpc::VolumeState::Serving,
        reason: None,
        doors: [].into(),
        snapshots: vec![],
        origin: None,
        connections: 0,
        group: None,
    }
}

/// A node that has a member of the volume.
fn seen_member(desired: &Desired, id: VolumeId, at: u16, part: GroupPart, (last_term, last): (u64, u64)) -> Observed {
    let volume = &desired.volumes[&id];
    let replica = volume.replica_on(node(at)).unwrap();
    let members = volume.group.as_ref().unwrap().first.clone();
    let group = GroupInfo { part, last, last_term, serves: part == GroupPart::Leader, ..GroupInfo::newborn(replica.member, members) };
    let seen = ObservedVolume { group: Some(group), ..shown(volume, replica) };
    Observed { volumes: [(id, seen)].into(), ..Observed::default() }
}

fn recovered(desired: &Desired, there: &[(u16, &Observed)], on: Option<&str>, regardless: bool) -> Result<NodeId, ApiError> {
    let observed = there.iter().map(|(at, seen)| (node(*at), *seen)).collect();
    crate::recovery::recover(desired, &observed, "a", on, regardless).map(|judged| judged.survivor)
}

#[test]
fn recover_is_refused_while_a_quorum_is_there_and_takes_the_one_that_is_left() {
    let mut desired = with_nodes(3);
    let id = create_on(&mut desired, 10, "a", &[1, 2, 3].map(|at| (node(at), DriveId(self::id(at.into())))));
    let seen = |at, part| seen_member(&desired, id, at, part, (3, 70));
    let (one, two, stopped) = (seen(1, GroupPart::Candidate), seen(2, GroupPart::Follower), seen(2, GroupPart::Stopped));
    assert_eq!(recovered(&desired, &[], None, false).unwrap_err().code, ErrorCode::NotReady);
    assert_eq!(recovered(&desired, &[(1, &one)], None, false), Ok(node(1)));
    assert_eq!(recovered(&desired, &[(1, &one), (2, &stopped)], None, false), Ok(node(1)));
    let quorum = recovered(&desired, &[(1, &one), (2, &two)], Some("n1"), true).unwrap_err();
    assert!(quorum.code == ErrorCode::Conflict && quorum.message.contains("n1, n2"), "{quorum}");
    let served = recovered(&desired, &[(1, &seen(1, GroupPart::Leader))], None, true).unwrap_err();
    assert!(served.code == ErrorCode::Conflict && served.message.contains("node n1 leads"), "{served}");
    // What has stopped goes on only if it is named and that is accepted.
    assert!(recovered(&desired, &[(2, &stopped)], None, true).unwrap_err().hint.unwrap().contains("--regardless"));
    assert!(recovered(&desired, &[(2, &stopped)], Some("n2"), false).unwrap_err().hint.unwrap().contains("--regardless"));
    assert_eq!(recovered(&desired, &[(2, &stopped)], Some("n2"), true), Ok(node(2)));
    assert_eq!(recovered(&desired, &[(1, &one)], Some("n3"), true).unwrap_err().code, ErrorCode::NotReady);
}

#[test]
fn recover_with_several_left_names_the_one_whose_log_has_most() {
    let mut desired = with_nodes(5);
    let id = create_on(&mut desired, 10, "a", &[1, 2, 3, 4, 5].map(|at| (node(at), DriveId(self::id(at.into())))));
    let (long, late) =
        (seen_member(&desired, id, 1, GroupPart::Follower, (3, 90)), seen_member(&desired, id, 4, GroupPart::Follower, (4, 80)));
    let several = recovered(&desired, &[(1, &long), (4, &late)], None, false).unwrap_err();
    assert!(several.hint.as_ref().unwrap().contains("--on n4 has most"), "{several:?}");
    assert_eq!(recovered(&desired, &[(1, &long), (4, &late)], Some("n1"), false), Ok(node(1)));
}

#[test]
fn replacement_that_a_recovery_by_force_overtook_ends_and_can_be_asked_for_again() {
    let mut desired = with_nodes(4);
    let id = create_on(&mut desired, 10, "a", &[1, 2, 3].map(|at| (node(at), DriveId(self::id(at.into())))));
    let mut one = seen_member(&desired, id, 1, GroupPart::Leader, (1, 10));
    let two = seen_member(&desired, id, 2, GroupPart::Follower, (1, 10));
    let four = Observed { drives: [(DriveId(self::id(4)), serving_drive())].into(), ..Observed::default() };
    let replace = |desired: &Desired, one: &Observed, n| {
        let observed = [(node(1), one), (node(2), &two), (node(4), &four)].into();
        replace_replica(desired, &observed, ReplicaId(self::id(n)), "a", ("n3", Some("n4")), None)
    };
    desired.apply(&replace(&desired, &one, 30).unwrap());
    let group = one.volumes.get_mut(&id).unwrap().group.as_mut().unwrap();
    group.members.list.retain(|member| member.node_id == node(1));
    group.members.next += 2;
    // It takes a step for each that is in the way.
    for _ in 0..3 {
        let step = match crate::membership::next(id, &desired.volumes[&id], one.volumes[&id].group.as_ref().unwrap()) {
            Some(crate::membership::Next::Record(step)) => step,
            other => panic!("{other:?}"),
        };
        desired.apply(&step.records(&desired));
        if desired.volumes[&id].change.is_none() {
            break;
        }
    }
    let volume = &desired.volumes[&id];
    assert!(volume.change.is_none() && volume.replica_on(node(4)).unwrap().left && !volume.replica_on(node(3)).unwrap().left);
    desired.apply(&LocalStep::ForgetReplica(id, node(4)).records(&desired));
    desired.apply(&replace(&desired, &one, 40).unwrap());
    let change = desired.volumes[&id].change.as_ref().unwrap();
    assert_eq!(change.to, one.volumes[&id].group.as_ref().unwrap().members.next);
}

#[test]
fn volume_with_a_log_places_it_last_promises_no_space_for_it_and_opens_no_door_there() {
    assert!(check_replicas(3, 1).unwrap_err().hint.unwrap().contains("2+log"));
    assert!(check_replicas(2, 0).unwrap_err().hint.unwrap().contains("1, 3, 5"));
    let mut desired = with_nodes(3);
    let ids = VolumeIds { volume: VolumeId(id(10)), segment: SegmentId(id(11)), replicas: [12, 13, 14].map(|n| ReplicaId(id(n))).to_vec() };
    let places = [1, 2, 3].map(|at| (node(at), DriveId(id(at.into()))));
    desired.apply(&create_volume(&desired, &ids, &"a".parse().unwrap(), &plain(2, 1), &places).unwrap());
    let volume = &desired.volumes[&ids.volume];
    let roles: Vec<_> = volume.group.as_ref().unwrap().first.list.iter().map(|member| member.role).collect();
    assert_eq!(roles, [MemberRole::Voter, MemberRole::Voter, MemberRole::LogOnly]);
    let open = Door::Nvmf { address: Ipv4Addr::UNSPECIFIED.into(), port: 0, nqn: None };
    let doors = doors_meant(&desired, volume, &open, None).unwrap();
    assert_eq!(doors.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [node(1), node(2)]);
    let refused = doors_meant(&desired, volume, &open, Some("n3")).unwrap_err();
    assert!(refused.message.contains("keeps the log alone"), "{refused}");
}

#[test]
fn log_that_is_replaced_leaves_before_the_next_one_joins_which_counts_at_once() {
    use crate::membership::{Next, next};
    let mut desired = with_nodes(4);
    let ids = VolumeIds { volume: VolumeId(id(10)), segment: SegmentId(id(11)), replicas: [12, 13, 14].map(|n| ReplicaId(id(n))).to_vec() };
    let places = [1, 2, 3].map(|at| (node(at), DriveId(id(at.into()))));
    desired.apply(&create_volume(&desired, &ids, &"a".parse().unwrap(), &plain(2, 1), &places).unwrap());
    let mut one = seen_member(&desired, ids.volume, 1, GroupPart::Leader, (1, 10));
    let two = seen_member(&desired, ids.volume, 2, GroupPart::Follower, (1, 10));
    // No room at all: it takes none.
    let full = ObservedDrive { free: ByteSize(0), ..serving_drive() };
    let four = Observed { drives: [(DriveId(id(4)), full)].into(), ..Observed::default() };
    let observed = [(node(1), &one), (node(2), &two), (node(4), &four)].into();
    desired.apply(&replace_replica(&desired, &observed, ReplicaId(id(30)), "a", ("n3", Some("n4")), None).unwrap());
    let step = |desired: &Desired, one: &Observed| {
        next(ids.volume, &desired.volumes[&ids.volume], one.volumes[&ids.volume].group.as_ref().unwrap()).unwrap()
    };
    let become_next = |desired: &Desired, one: &mut Observed| {
        let Next::Members(members) = step(desired, one) else { panic!("{:?}", step(desired, one)) };
        one.volumes.get_mut(&ids.volume).unwrap().group.as_mut().unwrap().members = members.clone();
        members
    };
    let members = become_next(&desired, &mut one);
    assert_eq!(members.list.len(), 2, "the old one is gone first");
    let record = |desired: &mut Desired, one: &Observed| match step(desired, one) {
        Next::Record(step) => desired.apply(&step.records(desired)),
        other => panic!("{other:?}"),
    };
    record(&mut desired, &one);
    desired.apply(&LocalStep::ReplicaMade(ids.volume, node(4)).records(&desired));
    let members = become_next(&desired, &mut one);
    assert_eq!((members.list[2].role, members.list[2].node_id), (MemberRole::LogOnly, node(4)));
    record(&mut desired, &one);
    assert_eq!(step(&desired, &one), Next::Wait, "it has the log before it is done");
    let reach = desired.volumes[&ids.volume].change.as_ref().unwrap().reach.unwrap();
    desired.apply(&LocalStep::Reached(ids.volume, 4, reach.index).records(&desired));
    record(&mut desired, &one);
    assert!(desired.volumes[&ids.volume].change.is_none());
}

#[test]
fn node_that_is_lost_is_removed_with_all_its_replicas_replaced_or_not_at_all() {
    let mut desired = with_nodes(4);
    let volume_id = create_on(&mut desired, 10, "a", &[1, 2, 3].map(|at| (node(at), DriveId(id(at.into())))));
    let (one, two) = (
        seen_member(&desired, volume_id, 1, GroupPart::Leader, (1, 10)),
        seen_member(&desired, volume_id, 2, GroupPart::Follower, (1, 10)),
    );
    let four = Observed { drives: [(DriveId(id(4)), serving_drive())].into(), ..Observed::default() };
    let ids = [ReplicaId(id(30)), ReplicaId(id(31))];
    let all: BTreeMap<NodeId, &Observed> = [(node(1), &one), (node(2), &two), (node(4), &four)].into();
    let without = |at: u16| all.iter().filter(|(id, _)| **id != node(at)).map(|(id, seen)| (*id, *seen)).collect::<BTreeMap<_, _>>();
    let removed = |desired: &Desired, observed: &BTreeMap<NodeId, &Observed>, force| remove_node(desired, observed, &ids, "n3", force);
    assert_eq!(remove_node(&desired, &all, &ids, "n4", true).unwrap_err().code, ErrorCode::Conflict, "it is there");
    assert_eq!(removed(&desired, &all, false).unwrap_err().code, ErrorCode::Busy);
    let no_leader = removed(&desired, &without(1), true).unwrap_err();
    assert!(no_leader.code == ErrorCode::NotReady && no_leader.message.starts_with("node n3 cannot be removed yet"), "{no_leader}");
    assert!(removed(&desired, &without(2), true).unwrap_err().message.contains("n2 is not well"));
    assert!(removed(&desired, &without(4), true).is_err(), "no other node can take it");
    let mut with_single = desired.clone();
    create_on(&mut with_single, 20, "b", &[(node(3), DriveId(id(3)))]);
    assert!(removed(&with_single, &all, true).unwrap_err().message.ends_with(": b"));
    with_single.apply(&remove_volume(&with_single, &nobody(), "b", true).unwrap());
    for desired in [&mut desired, &mut with_single] {
        let farewell = removed(desired, &all, true).unwrap();
        assert_eq!(farewell.replaced.iter().map(|name| name.as_str()).collect::<Vec<_>>(), ["a"]);
        desired.apply(&farewell.records);
        assert!(desired.volumes.len() == 1 && desired.volumes[&volume_id].change.is_some());
        assert!(desired.find_node("n3").is_none() && !desired.drives.contains_key(&DriveId(id(3))));
        let others = |desired: &Desired| desired.peers_of(node(1)).iter().map(|peer| peer.node_id).collect::<Vec<_>>();
        assert_eq!(others(desired), [node(2), node(3), node(4)], "should it come back, it has to hear of it");
        // The name is free, and the number is not.
        let again = DesiredNode { gone: false, ..desired.nodes[&node(3)].clone() };
        let identity = crate::issuer::Identity {
            cluster: ClusterTag::new(7).unwrap(),
            node: NodeNumber::new(1).unwrap(),
            incarnation: penstock_api::id::Incarnation::FIRST,
        };
        desired.apply(&[Record::Identity(identity)]);
        let (next, records) = crate::enroll(desired, &again, None).unwrap();
        let mut with_next = desired.clone();
        with_next.apply(&records);
        assert_eq!((next, others(&with_next)), (node(5), vec![node(2), node(4), node(5)]));
        assert_eq!(crate::enroll(desired, &again, Some(node(3))).unwrap().0, node(3), "unless it is that node");
    }
    // The group has let go of it: its record goes too, though its node never says so.
    desired.apply(&LocalStep::ReplicaLeft(volume_id, 3).records(&desired));
    let one = Observed { cluster_id: desired.identity.map(|identity| identity.cluster_id()), node_id: Some(node(1)), ..one.clone() };
    let plan = crate::reconcile::reconcile(&desired, node(1), &one);
    let forgets = |step: &crate::reconcile::Step| *step == crate::reconcile::Step::Local(LocalStep::ForgetReplica(volume_id, node(3)));
    assert!(plan.steps.iter().any(forgets), "{:?}", plan.steps);
    desired.apply(&LocalStep::ForgetReplica(volume_id, node(3)).records(&desired));
    assert!(desired.volumes[&volume_id].replica_on(node(3)).is_none());
}

proptest! {
    #[test]
    fn changes_of_random_targets_never_panic(text in "\\PC{0,40}", size: u64, force: bool) {
        let mut desired = with_drives(1);
        create(&mut desired, 10, "a", 1);
        let _ = resize_volume(&desired, &text, ByteSize(size), force);
        let _ = resize_volume(&desired, "a", ByteSize(size), force);
        let _ = remove_volume(&desired, &nobody(), &text, force);
        let _ = unexport(&desired, &text, &Door::Vhost { name: None }, None, force);
    }
}
