//! Clones: what they are made as, what stays as long as they do, and what is said of one whose snapshot is lost.

use penstock_api::SnapshotId;
use penstock_api::http::{Progress, SnapshotName, VolumeCreateBody};
use penstock_api::rpc::Origin;

use super::*;
use crate::observed::ObservedSnapshot;
use crate::progress::{Look, NodeLook};
use crate::retry::Refusals;
use crate::{NodeStep, Step};

/// Volume "a" on nodes 1 to 3 with a snapshot "monday" of 4 MiB, which all of them show, and those nodes.
fn with_snapshot() -> (Desired, VolumeId, SnapshotId, Vec<Observed>) {
    let mut desired = with_nodes(4);
    let volume_id = create_on(&mut desired, 10, "a", &[1, 2, 3].map(|at| (node(at), DriveId(self::id(at.into())))));
    let snapshot_id = SnapshotId(self::id(20));
    desired.apply(&crate::snapshots::take(&desired, snapshot_id, "a", &"monday".parse().unwrap()).unwrap());
    desired.apply(&LocalStep::SnapshotMade(volume_id, snapshot_id).records(&desired));
    let seen = |at| {
        let part = if at == 2 { GroupPart::Leader } else { GroupPart::Follower };
        let mut seen = seen_member(&desired, volume_id, at, part, (1, 10));
        let snapshot = ObservedSnapshot { snapshot_id, name: "monday".parse().unwrap(), size: ByteSize::mib(4) };
        seen.volumes.get_mut(&volume_id).unwrap().snapshots.push(snapshot);
        seen
    };
    let seen = [1, 2, 3].map(seen).to_vec();
    (desired, volume_id, snapshot_id, seen)
}

fn from(volume: &str, snapshot: &str) -> VolumeCreateBody {
    let from = SnapshotName { volume: volume.to_owned(), snapshot: snapshot.to_owned() };
    let name = "c".parse().unwrap();
    VolumeCreateBody { name, size: None, block_size: None, replicas: None, log_only: 0, drive_ids: vec![], from: Some(from) }
}

/// Makes volume "c" as its clone, and answers the id.
fn clone_a(desired: &mut Desired, seen: &[Observed]) -> VolumeId {
    let shape = clones::shape(desired, &at_nodes(seen), &from("a", "monday")).unwrap();
    let places = place(desired, &at_nodes(seen), &[], &shape).unwrap();
    let replicas = [32, 33, 34].map(|n| ReplicaId(id(n))).to_vec();
    let ids = VolumeIds { volume: VolumeId(id(30)), segment: SegmentId(id(31)), replicas };
    desired.apply(&create_volume(desired, &ids, &"c".parse().unwrap(), &shape, &places).unwrap());
    ids.volume
}

/// Node 1 is of the cluster.
fn claim(desired: &mut Desired, seen: &mut Observed) {
    let (cluster, number) = (ClusterTag::new(7).unwrap(), NodeNumber::new(1).unwrap());
    let identity = crate::issuer::Identity { cluster, node: number, incarnation: penstock_api::id::Incarnation::FIRST };
    desired.apply(&[Record::Identity(identity)]);
    (seen.cluster_id, seen.node_id) = (Some(identity.cluster_id()), Some(node(1)));
}

fn at_nodes(seen: &[Observed]) -> BTreeMap<NodeId, &Observed> {
    (1..).zip(seen).map(|(at, seen)| (node(at), seen)).collect()
}

#[test]
fn clone_is_as_its_snapshot_is_and_lies_where_its_origin_does() {
    let (desired, volume_id, snapshot_id, mut seen) = with_snapshot();
    let shape = |body: &VolumeCreateBody| clones::shape(&desired, &at_nodes(&seen), body);
    let whole = shape(&from("a", "monday")).unwrap();
    let origin = Some(Origin { volume_id, segment_id: desired.volumes[&volume_id].segment_id, snapshot_id });
    assert_eq!(whole, Shape { size: ByteSize::mib(4), block_size: BlockSize::B4096, replicas: 3, log_only: 0, origin });
    let larger = VolumeCreateBody { size: Some(ByteSize::mib(6)), replicas: Some(1), ..from("a", "monday") };
    let alone = shape(&larger).unwrap();
    assert_eq!((alone.size, alone.replicas), (ByteSize::mib(6), 1));
    let smaller = VolumeCreateBody { size: Some(ByteSize::mib(3)), ..from("a", "monday") };
    assert!(shape(&smaller).unwrap_err().message.contains("would cut it off"));
    let other_blocks = VolumeCreateBody { block_size: Some(BlockSize::B512), ..from("a", "monday") };
    assert!(shape(&other_blocks).unwrap_err().message.contains("blocks of 4096"));
    assert_eq!(shape(&from("a", "tuesday")).unwrap_err().code, ErrorCode::NotFound);
    assert_eq!(shape(&VolumeCreateBody { from: None, ..from("a", "monday") }).unwrap_err().code, ErrorCode::Invalid);

    let placed = |seen: &[Observed], asked: &[u64], shape: &Shape| {
        let asked: Vec<DriveId> = asked.iter().map(|n| DriveId(id(*n))).collect();
        let placed = place(&desired, &at_nodes(seen), &asked, shape);
        placed.map(|places| places.into_iter().map(|(at, _)| at).collect::<Vec<_>>())
    };
    assert_eq!(placed(&seen, &[], &whole), Ok([1, 2, 3].map(node).to_vec()));
    assert_eq!(placed(&seen, &[3], &alone), Ok(vec![node(3)]));
    assert!(placed(&seen, &[4], &alone).unwrap_err().message.contains("on n1, "), "node 4 has nothing of it");
    assert!(placed(&seen, &[], &Shape { replicas: 5, ..whole }).is_err());
    // Whoever does not show the snapshot comes last.
    seen[0].volumes.get_mut(&volume_id).unwrap().snapshots.clear();
    assert_eq!(placed(&seen, &[], &alone), Ok(vec![node(2)]));
    assert_eq!(placed(&seen, &[], &whole), Ok([1, 2, 3].map(node).to_vec()));
}

#[test]
fn what_a_clone_stands_on_is_not_removed_before_it() {
    let (mut desired, _, _, seen) = with_snapshot();
    let clone_id = clone_a(&mut desired, &seen);
    let refused = crate::snapshots::remove(&desired, "a", "monday").unwrap_err();
    assert!(refused.code == ErrorCode::Busy && refused.message.contains("c is a clone that stands on it"), "{refused}");
    assert!(refused.hint.unwrap().contains("penstock volume rm c"));
    assert!(remove_volume(&desired, &nobody(), "a", true).unwrap_err().message.contains("c is a clone"), "forced or not");
    desired.apply(&remove_volume(&desired, &nobody(), "c", false).unwrap());
    assert!(crate::snapshots::remove(&desired, "a", "monday").unwrap_err().hint.unwrap().contains("wait for that"));
    desired.apply(&[Record::DropVolume(clone_id)]);
    assert!(crate::snapshots::remove(&desired, "a", "monday").is_ok());
    assert!(remove_volume(&desired, &nobody(), "a", true).is_ok());
}

/// Node 1 shows clone "c", as standing on `origin`.
fn show_clone(desired: &Desired, seen: &mut Observed, clone_id: VolumeId, origin: Option<Origin>) {
    let mut there = seen_member(desired, clone_id, 1, GroupPart::Follower, (1, 10));
    there.volumes.get_mut(&clone_id).unwrap().origin = origin;
    seen.volumes.append(&mut there.volumes);
}

#[test]
fn replica_that_a_clone_stands_on_is_replaced_elsewhere_and_not_on_its_node() {
    let (mut desired, _, _, mut seen) = with_snapshot();
    let clone_id = clone_a(&mut desired, &seen);
    seen.push(Observed::default());
    for (n, at) in (1..).zip(&mut seen) {
        at.drives.insert(DriveId(id(n)), serving_drive());
    }
    let replace =
        |seen: &[Observed], on: Option<&str>| replace_replica(&desired, &at_nodes(seen), ReplicaId(id(40)), "a", ("n1", on), None);
    assert!(replace(&seen, None).is_ok(), "node 1 shows no clone: it was lost with the drive");
    show_clone(&desired, &mut seen[0], clone_id, None);
    assert!(replace(&seen, None).is_ok(), "the clone's own was copied there, or keeps the log alone");
    show_clone(&desired, &mut seen[0], clone_id, desired.volumes[&clone_id].origin.as_deref().copied());
    let refused = replace(&seen, None).unwrap_err();
    assert!(refused.code == ErrorCode::Busy && refused.message.contains("its clone c stands on it"), "{refused}");
    let hint = refused.hint.unwrap();
    assert!(hint.contains("--on") && hint.contains("penstock replica move c n1"), "{hint}");
    assert!(replace(&seen, Some("n4")).is_ok());
}

fn progress(desired: &Desired, seen: &Observed, what: impl Fn(&Look<'_>) -> Progress) -> Progress {
    let refusals = Refusals::default();
    what(&Look { desired, nodes: [(node(1), NodeLook { observed: Some(seen), refusals: &refusals })].into() })
}

#[test]
fn replica_of_a_clone_is_made_where_its_node_shows_what_it_stands_on() {
    let (mut desired, volume_id, snapshot_id, mut seen) = with_snapshot();
    let clone_id = clone_a(&mut desired, &seen);
    let mut there = seen.swap_remove(0);
    there.drives.insert(DriveId(id(1)), serving_drive());
    claim(&mut desired, &mut there);
    let told = |desired: &Desired, there: &Observed| {
        let steps = crate::reconcile::reconcile(desired, node(1), there).steps;
        steps.into_iter().find_map(|step| match step {
            Step::Node(NodeStep::CreateMember(params)) if params.volume_id == clone_id => Some(params.origin),
            _ => None,
        })
    };
    let origin = Some(Origin { volume_id, segment_id: desired.volumes[&volume_id].segment_id, snapshot_id });
    assert_eq!(told(&desired, &there), Some(origin));
    let mut without = there.clone();
    without.volumes.get_mut(&volume_id).unwrap().snapshots.clear();
    assert_eq!(told(&desired, &without), None, "it would be asked for in vain, until the origin's own replica is replaced");
    let volume = &desired.volumes[&clone_id];
    let Progress::Pending { reason } = progress(&desired, &without, |look| look.replica(clone_id, volume, &volume.replicas[0])) else {
        panic!("it may come");
    };
    assert_eq!(reason, "snapshot monday of volume a, which it is to stand on, is not on node n1 now");

    let with = |change: fn(&mut DesiredVolume)| {
        let mut desired = desired.clone();
        change(desired.volumes.get_mut(&clone_id).unwrap());
        told(&desired, &without)
    };
    let joins = |volume: &mut DesiredVolume| volume.replicas[0].joins = Some(volume.group.as_ref().unwrap().first.clone());
    assert_eq!(with(joins), Some(None), "who joins later has the content copied");
    assert_eq!(with(|volume| volume.replicas[0].log_only = true), Some(origin), "what keeps the log alone stands on nothing");
}

#[test]
fn replica_that_left_and_has_a_clone_on_it_is_deleted_once_that_is_gone() {
    let (mut desired, volume_id, _, mut seen) = with_snapshot();
    let clone_id = clone_a(&mut desired, &seen);
    desired.apply(&LocalStep::ReplicaLeft(volume_id, 1).records(&desired));
    let mut seen = seen.swap_remove(0);
    seen.drives.insert(DriveId(id(1)), serving_drive());
    claim(&mut desired, &mut seen);
    let deletes = |seen: &Observed| {
        let steps = crate::reconcile::reconcile(&desired, node(1), seen).steps;
        steps.iter().any(|step| matches!(step, Step::Node(NodeStep::DeleteVolume(params)) if params.volume_id == volume_id))
    };
    let reason = |seen: &Observed| {
        let volume = &desired.volumes[&volume_id];
        match progress(&desired, seen, |look| look.replica(volume_id, volume, &volume.replicas[0])) {
            Progress::Removing { reason } => reason,
            other => panic!("{other:?}"),
        }
    };
    show_clone(&desired, &mut seen, clone_id, desired.volumes[&clone_id].origin.as_deref().copied());
    assert!(!deletes(&seen), "the node would refuse it");
    assert_eq!(reason(&seen), "its clone c stands on it there");
    show_clone(&desired, &mut seen, clone_id, None);
    assert!(deletes(&seen), "the clone's own has what was beneath it");
    assert_eq!(reason(&seen), "the node deletes it");
}

/// Volume "a" of one replica on memory, a clone "b" of its snapshot, and a clone "c" of that one's; and node 1, which has "a" alone.
fn on_memory() -> (Desired, [VolumeId; 3], Observed) {
    let mut desired = with_nodes(1);
    desired.drives.get_mut(&DriveId(id(1))).unwrap().volatile = true;
    let mut seen = Observed { drives: [(DriveId(id(1)), serving_drive())].into(), ..Observed::default() };
    claim(&mut desired, &mut seen);
    let mut origin = None;
    let ids = [("a", 10), ("b", 20), ("c", 30)].map(|(name, n)| {
        let volume_id = create(&mut desired, n, name, 1);
        desired.volumes.get_mut(&volume_id).unwrap().origin = origin.take().map(Box::new);
        let snapshot_id = SnapshotId(id(n + 5));
        desired.apply(&crate::snapshots::take(&desired, snapshot_id, name, &"monday".parse().unwrap()).unwrap());
        desired.apply(&LocalStep::SnapshotMade(volume_id, snapshot_id).records(&desired));
        desired.apply(&LocalStep::ReplicaMade(volume_id, node(1)).records(&desired));
        origin = Some(Origin { volume_id, segment_id: desired.volumes[&volume_id].segment_id, snapshot_id });
        volume_id
    });
    let of = &desired.volumes[&ids[0]];
    seen.volumes.insert(ids[0], shown(of, &of.replicas[0]));
    (desired, ids, seen)
}

#[test]
fn clone_whose_snapshot_went_with_its_memory_is_said_to_be_lost_and_what_to_do() {
    let (mut desired, [a, b, c], seen) = on_memory();
    for (id, name) in [(b, "b"), (c, "c")] {
        let Progress::Refused { code, message, hint } = progress(&desired, &seen, |look| look.volume(id)) else {
            panic!("{name} is lost");
        };
        assert_eq!(code, ErrorCode::NotFound);
        assert_eq!(message, "its data is lost: it stood on snapshot monday of volume a, which is not there any more");
        assert!(hint.unwrap().contains(&format!("`penstock volume rm {name} --force`")));
    }
    assert!(progress(&desired, &seen, |look| look.volume(a)).is_settled(), "made anew, as on memory it is meant");
    // As long as its origin is not there, or has the snapshot, it may still be made.
    let is_pending = |seen: &Observed| matches!(progress(&desired, seen, |look| look.volume(b)), Progress::Pending { .. });
    let mut whole = seen.clone();
    let snapshot = ObservedSnapshot { snapshot_id: SnapshotId(id(15)), name: "monday".parse().unwrap(), size: ByteSize::mib(4) };
    whole.volumes.get_mut(&a).unwrap().snapshots.push(snapshot);
    assert!(is_pending(&whole));
    whole.volumes.clear();
    assert!(is_pending(&whole));
    // It goes as any volume does.
    desired.apply(&remove_volume(&desired, &nobody(), "c", true).unwrap());
    assert!(matches!(progress(&desired, &seen, |look| look.volume(c)), Progress::Removing { .. }));
}
