//! What lies on drives: data of others, drives of other clusters, labels and superblocks that rot. Nothing of others is ever
//! overwritten unasked; whatever is unreadable is said by name; the node and its other drives serve on.

use penstock::process::dice;
use penstock::process::house::House;
use penstock::process::image::Image;
use penstock::process::ledger::{End, Ledger};
use penstock::process::witness::Witness;
use penstock_api::rpc::{
    Drain, DrainParams, DriveAdd, DriveAddParams, DriveRemove, DriveRemoveParams, DriveState, Empty, ExportAdd, ExportAddParams, NodeGet,
};
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
const TOLD: [End; 4] = [End::Told, End::Told, End::Told, End::Told];

fn digest(path: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    std::fs::read(path).unwrap().hash(&mut hasher);
    hasher.finish()
}

fn house_with_witness() -> (House, Witness) {
    let mut house = House::new().unwrap();
    house.add_drive("well", "64MiB", "--oplog 8MiB");
    let witness = Witness::new(&mut house);
    (house, witness)
}

#[test]
fn foreign_data_is_refused_by_name_and_never_touched() {
    let (mut house, mut witness) = house_with_witness();
    let before = house.drives().unwrap().len();
    let random: Vec<u8> = (0..BLOCK as u64).map(|i| ((i * 2_654_435_761) >> 7) as u8).collect();
    let last = 64 * MIB - BLOCK as u64;
    for (name, at, bytes) in [
        ("ext4", 1080, b"\x53\xef".as_slice()),
        ("GPT", 512, b"EFI PART"),
        ("XFS", 0, b"XFSB"),
        ("LUKS", 0, b"LUKS\xba\xbe"),
        ("btrfs", 65600, b"_BHRfS_M"),
        ("LVM", 512, b"LABELONE"),
        ("MBR", 510, b"\x55\xaa"),
        ("unknown data", 0, &random),
        ("unknown data", 900_000, b"x"),
        ("backup GPT", last, b"EFI PART"),
        ("damaged Penstock label", 0, b"PENSTOCK and then something else"),
    ] {
        let path = house.path("foreign.img");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(64 * MIB).unwrap();
        Image::open(&path).unwrap().write(at, bytes).unwrap();
        let was = digest(&path);
        for command in ["pool add", "pool import"] {
            let said = house.refused(&format!("{command} file:{}", path.display()));
            assert!(command == "pool import" || said.contains(name) && said.contains("force"), "{command}, {name}: {said}");
            assert_eq!(digest(&path), was, "{command} over {name}");
        }
        witness.look(&mut house, name).unwrap();
    }
    assert_eq!(house.drives().unwrap().len(), before);
    house.settle().unwrap();
    // Said with force it is destroyed, and the drive is ours.
    let path = house.path("foreign.img");
    house.did(&format!("pool add file:{} --force", path.display()));
    assert_eq!(house.drives().unwrap().len(), before + 1);
}

#[test]
fn drive_of_another_cluster_is_refused_naming_both_and_never_touched() {
    let mut house = House::new().unwrap();
    let theirs = house.add_drive("theirs", "64MiB", "--oplog 8MiB");
    house.did("volume create precious 8MiB");
    let cluster = |house: &House| house.asked("node show")["cluster_id"].as_str().unwrap().to_owned();
    let first = cluster(&house);
    assert_eq!(house.stop_control().unwrap().code(), Some(0));
    assert_eq!(house.stop_node().unwrap().code(), Some(0));
    for state in ["control", "state"] {
        std::fs::remove_dir_all(house.path(state)).unwrap();
    }
    let was = digest(&theirs);
    house.start_node().unwrap();
    house.start_control().unwrap();
    house.add_drive("ours", "64MiB", "--oplog 8MiB");
    let mut witness = Witness::new(&mut house);
    let second = cluster(&house);
    assert_ne!(first, second);
    for command in ["pool add", "pool import"] {
        let said = house.refused(&format!("{command} file:{}", theirs.display()));
        assert!(said.contains(&first) && said.contains(&second), "{command}: {first} and {second} are to be in: {said}");
        assert_eq!(digest(&theirs), was, "{command}");
    }
    witness.look(&mut house, "a drive of another cluster").unwrap();
    assert_eq!(house.drives().unwrap().len(), 1);
    house.settle().unwrap();
}

#[test]
fn rotten_labels_and_superblocks_are_healed_from_their_copies_or_named() {
    let mut dice = dice("labels");
    let (mut house, mut witness) = house_with_witness();
    let path = house.add_drive("d0", "64MiB", "--oplog 8MiB");
    house.did(&format!("volume create v 8MiB --block-size 512 --drive file:{}?size=64MiB", path.display()));
    house.did(&format!("volume export v --nvmf=127.0.0.1:{}", house.port()));
    let mut ledger = Ledger::new(dice.roll(), 8 * MIB);
    let door = house.wait_for_door("v").unwrap();
    let (_, ends, _) = ledger.work_while(door.address, &door.nqn, |_| std::thread::sleep(Duration::from_millis(150))).unwrap();
    assert_eq!(ends, TOLD);
    let good = house.path("good.img");
    let last = 64 * MIB - BLOCK as u64;
    let superblocks = Image::open(&path).unwrap().zones().unwrap()[0].superblocks.clone();
    let noise: Vec<u8> = (0..5 * BLOCK).map(|_| dice.roll() as u8).collect();
    let zeros = vec![0; 5 * BLOCK];
    // Where, what, and whether a copy makes good for it.
    for (deed, damage, is_healed) in [
        ("noise over the label", vec![(0, &noise[..BLOCK])], false),
        ("zeros over the label", vec![(0, &zeros[..BLOCK])], true),
        ("a torn label", vec![(512, &noise[..512])], true),
        ("noise over the label's copy", vec![(last, &noise[..BLOCK])], true),
        ("zeros over both labels", vec![(0, &zeros[..BLOCK]), (last, &zeros[..BLOCK])], false),
        ("noise over both labels", vec![(0, &noise[..BLOCK]), (last, &noise[..BLOCK])], false),
        ("noise over one superblock", vec![(superblocks.start, &noise[..BLOCK])], true),
        ("noise over the copy of one", vec![(superblocks.start + 3 * BLOCK as u64, &noise[..BLOCK])], true),
        ("noise over all superblocks", vec![(superblocks.start, &noise[..4 * BLOCK])], false),
        ("zeros over all superblocks", vec![(superblocks.start, &zeros[..4 * BLOCK])], false),
    ] {
        assert_eq!(house.stop_node().unwrap().code(), Some(0), "before {deed}");
        std::fs::copy(&path, &good).unwrap();
        let image = Image::open(&path).unwrap();
        damage.iter().for_each(|(at, bytes)| image.write(*at, bytes).unwrap());
        house.start_node().unwrap();
        witness.expect_restarted(&mut house).unwrap();
        let found = house.settled_drive(&path);
        println!("{deed}: {:?} {:?}", found.state, found.reason);
        if is_healed {
            assert_eq!(found.state, DriveState::Serving, "{deed}: {:?}", found.reason);
            let door = house.wait_for_door("v").unwrap();
            ledger.expect_good(door.address, &door.nqn).unwrap_or_else(|e| panic!("{deed}: {e}"));
        } else {
            assert_ne!(found.state, DriveState::Serving, "{deed}");
            assert!(found.reason.is_some_and(|reason| !reason.is_empty()), "{deed} is to be named");
            let shown = house.did("pool ls").out;
            assert!(shown.contains("d0.img"), "{shown}");
        }
        witness.look(&mut house, deed).unwrap();
        if !is_healed {
            assert_eq!(house.stop_node().unwrap().code(), Some(0), "after {deed}");
            std::fs::copy(&good, &path).unwrap();
            house.start_node().unwrap();
            witness.expect_restarted(&mut house).unwrap();
            let door = house.wait_for_door("v").unwrap();
            ledger.expect_good(door.address, &door.nqn).unwrap_or_else(|e| panic!("{deed}, put right again: {e}"));
        }
    }
    house.settle().unwrap();
}

/// Any few bytes of the metadata of a drive that still has a log to redo: it opens, or says why not; never a crash, never bytes
/// that nobody wrote.
#[test]
fn random_damage_to_metadata_and_oplog_never_ends_the_node_or_shows_wrong_bytes() {
    let mut dice = dice("random damage");
    let (mut house, mut witness) = house_with_witness();
    let path = house.add_drive("d0", "64MiB", "--oplog 8MiB");
    house.did(&format!("volume create v 8MiB --block-size 512 --drive file:{}?size=64MiB", path.display()));
    house.did(&format!("volume export v --nvmf=127.0.0.1:{}", house.port()));
    let mut ledger = Ledger::new(dice.roll(), 8 * MIB);
    let door = house.wait_for_door("v").unwrap();
    let write = |ledger: &mut Ledger, ms| {
        let (_, ends, _) = ledger.work_while(door.address, &door.nqn, |_| std::thread::sleep(Duration::from_millis(ms))).unwrap();
        assert_eq!(ends, TOLD);
    };
    write(&mut ledger, 150);
    house.rpc::<Drain>(&DrainParams::default()).unwrap();
    write(&mut ledger, 50);
    // Cut off in the middle, so that there is a log to redo. Control would open the drive between our damages.
    house.kill_control().unwrap();
    let known = house.drive_at(&path);
    let exported = house.volume("v").unwrap().exports[0].door.clone();
    let node = house.rpc::<NodeGet>(&Empty {}).unwrap();
    house.kill_node().unwrap();
    let good = house.path("good.img");
    std::fs::copy(&path, &good).unwrap();
    house.start_node().unwrap();
    witness.expect_restarted(&mut house).unwrap();
    let remove = |house: &House| house.rpc::<DriveRemove>(&DriveRemoveParams { drive_id: known.drive_id, force: true });
    house.settled_drive(&path);
    remove(&house).unwrap();
    let zone = Image::open(&good).unwrap().zones().unwrap()[0].clone();
    // Only where something is: damage to what was never written proves nothing.
    let full = |range: std::ops::Range<u64>| {
        let sectors = Image::open(&good).unwrap().read(range.start, (range.end - range.start) as usize).unwrap();
        let sectors = sectors.chunks(512).zip((range.start..).step_by(512)).filter(|(bytes, _)| bytes.iter().any(|b| *b != 0));
        sectors.map(|(_, at)| at).collect::<Vec<u64>>()
    };
    let targets = [full(0..zone.superblocks.end), full(zone.oplog.clone()), full(zone.oplog), full(zone.extents)];
    let (mut opened, mut verified, mut refused, mut faults) = (0, 0, 0, 0);
    for round in 0..40 {
        std::fs::copy(&good, &path).unwrap();
        let image = Image::open(&path).unwrap();
        for _ in 0..1 + dice.below(3) {
            let target = &targets[dice.below(4) as usize];
            let at = target[dice.below(target.len() as u64) as usize];
            match dice.below(3) {
                0 => image.flip_bit(at + dice.below(512), (dice.below(8)) as u8).unwrap(),
                1 => image.write(at + dice.below(504), &dice.roll().to_le_bytes()).unwrap(),
                _ => image.write(at, &[dice.roll() as u8; 512]).unwrap(),
            }
        }
        let params = DriveAddParams {
            spec: known.spec.clone(),
            drive_id: known.drive_id,
            cluster_id: node.cluster_id.unwrap(),
            node_id: node.node_id.unwrap(),
            stores: None,
            oplog_bytes: None,
            force: false,
            open_only: true,
        };
        match house.rpc::<DriveAdd>(&params) {
            Ok(_) => {
                opened += 1;
                // A volume that is gone with what was damaged serves none.
                if let Ok(volume) = house.volume("v") {
                    let params = ExportAddParams { volume_id: volume.volume_id, door: exported.clone(), controllers: None };
                    house.rpc::<ExportAdd>(&params).unwrap();
                    let mut line = door.connect().unwrap();
                    verified += 1;
                    if let Err(found) = ledger.clone().verify(&mut line).unwrap() {
                        faults += 1;
                        // A block that is lost reads as an error. Anything else would be a lie.
                        let lies: Vec<_> = found.iter().filter(|fault| !fault.is_unreadable).collect();
                        assert!(lies.is_empty(), "round {round}: {lies:?}");
                    }
                }
            }
            Err(error) => {
                refused += 1;
                assert!(error.code != 0 && !error.message.is_empty(), "round {round}: {error:?}");
            }
        }
        witness_without_control(&mut witness, &mut house, round);
        let _ = remove(&house); // one that did not open is not there
    }
    println!("{opened} opened, {verified} verified, {faults} of them with blocks that cannot be read; {refused} refused");
    assert!(verified > 10, "small damage does not make a whole drive unreadable each time");
    assert!(faults + refused > 0, "some damage is to be seen, or none was done");
}

fn witness_without_control(witness: &mut Witness, house: &mut House, round: usize) {
    house.node().expect_alive().unwrap();
    witness.look_at_node(house, &format!("random damage {round}")).unwrap();
}
