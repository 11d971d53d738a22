//! Wishes checked against what stands.

use penstock_api::id::Id;
use penstock_api::rpc::BlockSize;
use proptest::prelude::*;

use super::*;
use crate::observed::{ObservedDrive, ObservedVolume};

fn id(n: u64) -> Id {
    Id::from_u128(0x0194_a5c1_b2d3_8001_8000_0000_0000_0000 + u128::from(n)).unwrap()
}

fn drive_body(spec: &str) -> DriveAddBody {
    DriveAddBody { spec: spec.parse().unwrap(), volatile: false, stores: None, oplog_bytes: None, force: false }
}

fn with_drives(n: u64) -> Desired {
    let mut desired = Desired::default();
    for at in 1..=n {
        let records = add_drive(&desired, DriveId(id(at)), &drive_body(&format!("file:/d{at}?size=1GiB")), false).unwrap();
        desired.apply(&records);
    }
    desired
}

fn create(desired: &mut Desired, n: u64, name: &str, drive: u64) -> VolumeId {
    let ids = VolumeIds { volume: VolumeId(id(n)), segment: SegmentId(id(n + 1)), replica: ReplicaId(id(n + 2)) };
    let body = VolumeCreateBody { name: name.parse().unwrap(), size: ByteSize::mib(8), block_size: BlockSize::B4096, drive_id: None };
    let records = create_volume(desired, ids, &body, DriveId(id(drive))).unwrap();
    desired.apply(&records);
    ids.volume
}

fn code(judged: Judged) -> ErrorCode {
    let error = judged.unwrap_err();
    error.code
}

#[test]
fn add_drive_at_a_known_place_refused() {
    let desired = with_drives(1);
    let judged = add_drive(&desired, DriveId(id(9)), &drive_body("file:/d1?size=2GiB"), false);
    assert_eq!(code(judged), ErrorCode::AlreadyExists);
}

#[test]
fn create_volume_of_a_taken_name_refused_also_while_it_is_removed() {
    let mut desired = with_drives(1);
    create(&mut desired, 10, "a", 1);
    assert_eq!(check_name_free(&desired, &"a".parse().unwrap()).unwrap_err().code, ErrorCode::AlreadyExists);
    let records = remove_volume(&desired, None, "a", false).unwrap();
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
    let records = export(&desired, "a", &Door::Vhost { name: None }).unwrap();
    desired.apply(&records);
    let error = remove_volume(&desired, None, "a", false).unwrap_err();
    assert!(error.code == ErrorCode::Busy && error.message.contains("vhost"), "{error}");
    assert!(remove_volume(&desired, None, "a", true).is_ok());

    let volume = &desired.volumes[&volume_id];
    let mut observed = Observed::default();
    let seen = ObservedVolume {
        segment_id: volume.segment_id,
        replica_id: volume.replica_id,
        name: volume.name.clone(),
        size: volume.size,
        block_size: volume.block_size,
        drive_id: volume.drive_id,
        state: penstock_api::rpc::VolumeState::Serving,
        reason: None,
        doors: [].into(),
        connections: 2,
    };
    observed.volumes.insert(volume_id, seen);
    let error = remove_volume(&desired, Some(&observed), "a", false).unwrap_err();
    assert!(error.message.contains("in use by 2 hosts"), "{error}");
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
    let records = export(&desired, "a", &Door::Vhost { name: Some("b".parse().unwrap()) }).unwrap();
    desired.apply(&records);
    assert_eq!(code(export(&desired, "b", &Door::Vhost { name: None })), ErrorCode::AlreadyExists);
    assert!(export(&desired, "b", &Door::VfioUser { name: None }).is_ok());
    assert_eq!(code(unexport(&desired, "b", &Door::Vhost { name: None }, false)), ErrorCode::NotFound);
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
    assert_eq!(place(&desired, Some(&observed), None), Ok(DriveId(id(2))));
    create(&mut desired, 10, "a", 2);
    create(&mut desired, 20, "b", 2);
    assert_eq!(place(&desired, Some(&observed), None), Ok(DriveId(id(1))), "16 of its 20 MiB are promised");
    assert_eq!(place(&desired, None, None), Ok(DriveId(id(1))), "unseen: the first");
    assert_eq!(place(&Desired::default(), None, None).unwrap_err().code, ErrorCode::NotFound);
}

proptest! {
    #[test]
    fn changes_of_random_targets_never_panic(text in "\\PC{0,40}", size: u64, force: bool) {
        let mut desired = with_drives(1);
        create(&mut desired, 10, "a", 1);
        let _ = resize_volume(&desired, &text, ByteSize(size), force);
        let _ = resize_volume(&desired, "a", ByteSize(size), force);
        let _ = remove_volume(&desired, None, &text, force);
        let _ = unexport(&desired, &text, &Door::Vhost { name: None }, force);
    }
}
