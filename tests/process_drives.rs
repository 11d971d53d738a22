//! Drives that are full, rot, refuse a write, come in twos, or are taken up again by a control that has forgotten them.
//! What lies on a drive that is not ours, or no longer readable, is process_labels' part.

use penstock::guest::initiator::{Namespace, Refusal};
use penstock::guest::wait::wait_for;
use penstock::process::dice;
use penstock::process::house::{House, LIMIT, Plan};
use penstock::process::image::Image;
use penstock::process::ledger::{End, Ledger, Progress, SECTOR, work_while};
use penstock::process::program;
use penstock_api::rpc::{Barrier, Drain, DrainParams, DriveProbe, DriveProbeParams, DriveState, ScrubInfo, VolumeInfo};
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const CAPACITY_EXCEEDED: Refusal = Refusal::CAPACITY_EXCEEDED;
const UNRECOVERED_READ: Refusal = Refusal { code_type: 2, code: 0x81 };
const TOLD: [End; 4] = [End::Told, End::Told, End::Told, End::Told];

/// Lets workers write for a moment.
fn write_for(ledger: &mut Ledger, house: &House, volume: &str, ms: u64) -> Vec<End> {
    let door = house.wait_for_door(volume).unwrap();
    let (_, ends, _) = ledger.work_while(door.address, &door.nqn, |_| std::thread::sleep(Duration::from_millis(ms))).unwrap();
    ends
}

fn expect_good(ledger: &mut Ledger, house: &House, volume: &str) {
    let door = house.wait_for_door(volume).unwrap();
    ledger.expect_good(door.address, &door.nqn).unwrap_or_else(|e| panic!("volume {volume}: {e}"));
}

fn drain(house: &House) {
    house.rpc::<Drain>(&DrainParams::default()).unwrap();
}

fn content(block: u64) -> [u8; BLOCK as usize] {
    let mut bytes = [0x5a; BLOCK as usize];
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes
}

#[test]
fn full_drive_refuses_writes_for_capacity_and_reads_discards_and_deletes_work() {
    let mut house = House::new().unwrap();
    house.add_drive("d0", "40MiB", "--oplog 8MiB");
    let (door, other) = (house.add_volume("v", "64MiB", 4096), house.add_volume("other", "4MiB", 4096));
    other.connect().unwrap().write(0, &content(7)).unwrap();
    let mut line: Namespace = door.connect().unwrap();
    let mut written = 0;
    let refusal = loop {
        match line.try_write(written * BLOCK, &content(written)).unwrap() {
            Ok(()) => written += 1,
            Err(refusal) => break refusal,
        }
        assert!(written * BLOCK < 64 * MIB, "a drive of 40 MiB does not take 64 MiB");
    };
    assert_eq!(refusal, CAPACITY_EXCEEDED);
    println!("{written} blocks fit");
    assert!(written * BLOCK > 16 * MIB, "most of the drive is to be usable, not {written} blocks");
    for block in 0..written {
        assert_eq!(line.read(block * BLOCK, BLOCK as usize).unwrap(), content(block), "block {block}");
    }
    // Also what is written already can be written again: no new space is needed for that, or it is refused cleanly.
    let again = line.try_write(0, &content(0)).unwrap();
    assert!(matches!(again, Ok(()) | Err(CAPACITY_EXCEEDED)), "{again:?}");
    // Full through a kill as well.
    house.kill_node().unwrap();
    house.start_node().unwrap();
    let mut line = house.wait_for_door("v").unwrap().connect().unwrap();
    for block in (0..written).step_by(37) {
        assert_eq!(line.read(block * BLOCK, BLOCK as usize).unwrap(), content(block), "block {block}");
    }
    let half = written / 2;
    for from in (0..half).step_by(64) {
        let count = 64.min(half - from);
        assert_eq!(line.try_discard(from * BLOCK, (count * BLOCK) as usize).unwrap(), Ok(()), "discards at block {from}");
    }
    assert_eq!(line.read(0, BLOCK as usize).unwrap(), vec![0; BLOCK as usize]);
    assert_eq!(line.read((half + 1) * BLOCK, BLOCK as usize).unwrap(), content(half + 1));
    drain(&house);
    for block in written..written + half / 2 {
        assert_eq!(line.try_write(block * BLOCK, &content(block)).unwrap(), Ok(()), "block {block} after discards");
    }
    drop(line);
    // A delete gives back the rest.
    house.did("volume rm v --force");
    let stores = |house: &House| house.drives().unwrap()[0].stores[0].clone();
    wait_for("the space of a deleted volume", LIMIT, || {
        let store = stores(&house);
        Ok((store.extents_free + 8 >= store.extents_total).then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}", stores(&house)));
    assert_eq!(house.wait_for_door("other").unwrap().connect().unwrap().read(0, BLOCK as usize).unwrap(), content(7));
    house.settle().unwrap();
}

/// Rot in the data of one sector of the volume; answers the first byte of its 4 KiB block in the volume.
fn rot(image: &Path, ledger: &Ledger, nth: usize) -> u64 {
    let image = Image::open(image).unwrap();
    let zones = image.zones().unwrap();
    let written = ledger.written();
    let sector = written[written.len() * nth / 7];
    let places: Vec<u64> = zones.iter().flat_map(|zone| image.find(&zone.extents, &ledger.mark(sector)).unwrap()).collect();
    assert!(!places.is_empty(), "sector {sector} was drained, so it is in an extent");
    for place in places {
        image.flip_bit(place + 200, 3).unwrap();
    }
    sector * SECTOR as u64 / BLOCK * BLOCK
}

#[test]
fn bits_flipped_in_extents_fail_reads_of_their_block_alone_and_scrub_finds_them() {
    let mut dice = dice("bit flips");
    let mut house = House::new().unwrap();
    let image = house.add_drive("d0", "96MiB", "--oplog 8MiB");
    house.add_volume("v", "8MiB", 512);
    house.add_volume("other", "8MiB", 512);
    let (mut ledger, mut other) = (Ledger::new(dice.roll(), 8 * MIB), Ledger::new(dice.roll(), 8 * MIB));
    assert_eq!(write_for(&mut ledger, &house, "v", 300), TOLD);
    assert_eq!(write_for(&mut other, &house, "other", 200), TOLD);
    drain(&house);
    let spec = format!("file:{}?size=96MiB", image.display());
    for (round, is_stopped) in [(1, false), (2, true)] {
        if is_stopped {
            assert_eq!(house.stop_node().unwrap().code(), Some(0));
        }
        let bad = rot(&image, &ledger, round);
        if is_stopped {
            house.start_node().unwrap();
        }
        let door = house.wait_for_door("v").unwrap();
        let mut line = door.connect().unwrap();
        // In every size and at every place within the block, and never the rotten bytes.
        for (offset, length) in [(0, 4096), (0, 512), (2048, 1024), (3584, 512)] {
            assert_eq!(line.try_read(bad + offset, length).unwrap(), Err(UNRECOVERED_READ), "{length} bytes at +{offset}");
        }
        for neighbour in [bad.wrapping_sub(BLOCK), bad + BLOCK] {
            if neighbour < 8 * MIB {
                assert!(line.try_read(neighbour, 4096).unwrap().is_ok(), "the block at {neighbour}, beside {bad}");
            }
        }
        // Part of a rotten block cannot be written either: what to merge with is not known.
        let part = line.try_write(bad, &[1; SECTOR]).unwrap();
        assert!(part.is_err(), "512 bytes were merged into a block that cannot be read");
        assert!(house.drives().unwrap()[0].counters.checksum_errors > 0);

        house.did(&format!("scrub {spec} start"));
        let scrub = wait_for("the end of the scrub", LIMIT, || {
            let scrub: ScrubInfo = serde_json::from_value(house.asked(&format!("scrub {spec} status"))).unwrap();
            Ok((!scrub.running && scrub.passes > 0).then_some(scrub))
        })
        .unwrap();
        println!("round {round}: {scrub:?}");
        let volume: VolumeInfo = house.volume("v").unwrap();
        assert_eq!((scrub.blocks_bad, scrub.volumes_bad), (1, vec![volume.volume_id]), "what the scrub says");

        assert_eq!(write_for(&mut other, &house, "other", 100), TOLD);
        expect_good(&mut other, &house, "other");
        let faults = ledger.verify(&mut line).unwrap().expect_err("the verifier sees that the block is gone");
        assert!(matches!(faults.as_slice(), [fault] if fault.is_unreadable && fault.sector * SECTOR as u64 == bad), "{faults:?}");
        // A write over the whole block makes it good again.
        line.write(bad, &[0; BLOCK as usize]).unwrap();
        assert_eq!(line.read(bad, BLOCK as usize).unwrap(), vec![0; BLOCK as usize]);
        ledger.forget(bad, BLOCK);
        drain(&house);
        expect_good(&mut ledger, &house, "v");
    }
    house.settle().unwrap();
}

#[test]
fn two_drives_on_two_cores_killed_under_writes_lose_nothing() {
    let mut dice = dice("two drives");
    let mut house = House::with(Plan { cores: "0,1", ..Plan::default() }).unwrap();
    let drives = ["d0", "d1"].map(|name| house.add_drive(name, "128MiB", "--oplog 8MiB"));
    for (at, name) in ["a", "b", "c", "d"].iter().enumerate() {
        house.did(&format!("volume create {name} 8MiB --block-size 512 --drive file:{}?size=128MiB", drives[at % 2].display()));
        house.did(&format!("volume export {name} --nvmf=127.0.0.1:{}", house.port()));
    }
    let volumes = house.volumes().unwrap();
    let cores: std::collections::BTreeSet<u32> = volumes.iter().map(|volume| volume.core).collect();
    let used: std::collections::BTreeSet<_> = volumes.iter().map(|volume| volume.drive_id).collect();
    assert_eq!((cores.len(), used.len()), (2, 2), "{volumes:?}");
    let mut ledgers = ["a", "b", "c", "d"].map(|name| (name, Ledger::new(dice.roll(), 8 * MIB)));
    for _ in 0..2 {
        let doors = ["a", "b", "c", "d"].map(|name| house.wait_for_door(name).unwrap());
        let moment = Duration::from_millis(200 + dice.below(300));
        let mut all: Vec<_> = ledgers.iter_mut().zip(&doors).map(|((_, ledger), door)| (ledger, door.address, door.nqn.as_str())).collect();
        let kill = |_: &Progress| {
            std::thread::sleep(moment);
            house.kill_node()
        };
        let (killed, ends, acknowledged) = work_while(&mut all, kill).unwrap();
        killed.unwrap();
        assert!(ends.len() == 16 && ends.iter().all(|end| matches!(end, End::Cut(_))), "{ends:?}");
        println!("{acknowledged} acknowledged on four volumes");
        house.start_node().unwrap();
        for (name, ledger) in &mut ledgers {
            expect_good(ledger, &house, name);
        }
    }
    house.settle().unwrap();
}

fn ids(house: &House) -> Vec<(String, String)> {
    let mut ids: Vec<_> = house.volumes().unwrap().iter().map(|v| (v.name.to_string(), v.volume_id.to_string())).collect();
    ids.sort();
    ids
}

#[test]
fn control_that_lost_its_state_takes_everything_up_from_the_drives() {
    let mut dice = dice("import");
    let mut house = House::new().unwrap();
    let image = house.add_drive("d0", "96MiB", "--oplog 8MiB");
    let door = house.add_volume("v", "8MiB", 512);
    house.did("volume create w 4MiB");
    let mut ledger = Ledger::new(dice.roll(), 8 * MIB);
    assert_eq!(write_for(&mut ledger, &house, "v", 150), TOLD);
    let before = ids(&house);

    // Control's state is gone; the node goes on serving, and tells what it has.
    assert_eq!(house.stop_control().unwrap().code(), Some(0));
    std::fs::remove_dir_all(house.path("control")).unwrap();
    house.start_control().unwrap();
    assert_eq!(house.asked("volume ls").as_array().map(Vec::len), Some(0));
    house.did("pool import");
    house.settle().unwrap();
    assert_eq!(ids(&house), before);
    assert_eq!(house.wait_for_door("v").unwrap(), door, "the door stayed open");
    expect_good(&mut ledger, &house, "v");
    house.did("volume create x 4MiB");
    let x = house.volume("x").unwrap().volume_id.to_string();
    assert!(before.iter().all(|(_, id)| *id != x), "no id is issued twice: {x}");
    house.did("volume rm x");

    // The node's state is gone too: nothing but the drives is left.
    assert_eq!(house.stop_control().unwrap().code(), Some(0));
    assert_eq!(house.stop_node().unwrap().code(), Some(0));
    std::fs::remove_dir_all(house.path("control")).unwrap();
    std::fs::remove_dir_all(house.path("state")).unwrap();
    house.start_node().unwrap();
    house.start_control().unwrap();
    assert_eq!(house.volumes().unwrap(), []);
    house.did(&format!("pool import file:{}", image.display()));
    house.settle().unwrap();
    assert_eq!(ids(&house), before);
    house.did(&format!("volume export v --nvmf=127.0.0.1:{}", house.port()));
    expect_good(&mut ledger, &house, "v");
    assert_eq!(write_for(&mut ledger, &house, "v", 100), TOLD);
    expect_good(&mut ledger, &house, "v");
}

#[test]
fn drive_that_refused_a_write_is_fenced_over_restarts_until_an_operator_clears_it() {
    let mut dice = dice("fence");
    let mut house = House::with(Plan { survives_file_limit: true, ..Plan::default() }).unwrap();
    house.add_drive("small", "64MiB", "--oplog 8MiB");
    house.did("volume create well 8MiB --block-size 512");
    house.did(&format!("volume export well --nvmf=127.0.0.1:{}", house.port()));
    let large = house.add_drive("large", "256MiB", "--oplog 8MiB --stores 2");
    let spec = format!("file:{}?size=256MiB", large.display());
    for name in ["first", "second"] {
        house.did(&format!("volume create {name} 8MiB --block-size 512 --drive {spec}"));
        house.did(&format!("volume export {name} --nvmf=127.0.0.1:{}", house.port()));
    }
    let mut ledgers = ["well", "first", "second"].map(|name| (name, Ledger::new(dice.roll(), 8 * MIB)));
    for (name, ledger) in &mut ledgers {
        assert_eq!(write_for(ledger, &house, name, 100), TOLD);
    }
    // From here on the kernel refuses every write of this process beyond 100 MiB of a file: the small drive and the first store
    // of the large one are below that, the second store is above.
    let pid = house.node().id().unwrap();
    let limit = program::words(&format!("--pid {pid} --fsize={}", 100 * MIB));
    program::run(Path::new("/usr/bin/prlimit"), &limit, LIMIT).unwrap().expect_ok("prlimit");
    let state = |house: &House| house.drives().unwrap().into_iter().find(|drive| drive.spec.to_string() == spec).unwrap();
    let refused = |ends: &[End]| ends.iter().all(|end| matches!(end, End::Refused(_)));
    let mut fenced_by = Vec::new();
    for (name, ledger) in &mut ledgers[1..] {
        // Background writes may have met the limit already: then the whole drive is fenced, and both stores refuse.
        let door = fenced_door(&house, name);
        let (_, ends, _) = ledger.work_while(door.0, &door.1, |_| std::thread::sleep(Duration::from_millis(300))).unwrap();
        if refused(&ends) {
            fenced_by.push((*name, ends));
        } else {
            assert_eq!(ends, TOLD, "volume {name}");
        }
    }
    println!("{fenced_by:?}");
    assert!(!fenced_by.is_empty(), "one of two stores lies beyond the limit");
    let drive =
        wait_for("the drive to be fenced", LIMIT, || Ok(Some(state(&house)).filter(|drive| drive.state == DriveState::Fenced))).unwrap();
    println!("{:?}", drive.reason);
    assert!(drive.reason.is_some_and(|reason| reason.contains("failed")), "the reason says what failed");
    let kept = std::fs::read_to_string(house.path("state/node.toml")).unwrap();
    assert!(kept.contains("[[fences]]"), "{kept}");

    // A new process has no limit, so its writes would succeed; the fence stands all the same.
    for round in 0..2 {
        if round == 0 {
            house.kill_node().unwrap()
        } else {
            assert_eq!(house.stop_node().unwrap().code(), Some(0))
        }
        house.start_node().unwrap();
        wait_for("the drive to be open", LIMIT, || Ok(Some(state(&house).state).filter(|state| *state != DriveState::Opening))).unwrap();
        assert_eq!(state(&house).state, DriveState::Fenced, "round {round}");
        let (name, well) = &mut ledgers[0];
        assert_eq!(write_for(well, &house, name, 100), TOLD, "the other drive is well");
        expect_good(well, &house, name);
        for (name, ledger) in &mut ledgers[1..] {
            let door = fenced_door(&house, name);
            let mut line = Namespace::connect(door.0, &door.1).unwrap();
            // A fenced drive gets no barrier, so the newest writes, which no record on it knows to be durable, are not shown
            // until the fence is cleared. Everything else reads as it was.
            if let Err(hidden) = ledger.clone().verify(&mut line).unwrap() {
                println!("{name}: {} blocks are not shown while fenced", hidden.len());
                assert!(hidden.iter().all(|fault| fault.is_unreadable), "volume {name} on a fenced drive: {hidden:?}");
            }
            let shown = (0..128).filter(|at| line.try_read(at * 64 * 1024, BLOCK as usize).unwrap().is_ok()).count();
            assert!(shown > 64, "only {shown} of 128 places of volume {name} are read while fenced");
            let write = line.try_write(0, &[9; SECTOR]).unwrap();
            assert!(write.is_err(), "volume {name} took a write while fenced");
        }
    }
    house.did(&format!("pool clear-fence {spec}"));
    house.settle().unwrap();
    for (name, ledger) in &mut ledgers {
        expect_good(ledger, &house, name);
        assert_eq!(write_for(ledger, &house, name, 100), TOLD, "volume {name}");
        expect_good(ledger, &house, name);
    }
    house.kill_node().unwrap();
    house.start_node().unwrap();
    wait_for("the drive to serve after its fence was cleared", LIMIT, || Ok((state(&house).state == DriveState::Serving).then_some(())))
        .unwrap();
}

/// The door of a volume that may not be writable, and so is not reported as serving.
fn fenced_door(house: &House, name: &str) -> (std::net::SocketAddr, String) {
    wait_for("a door", LIMIT, || {
        let volume = house.volume(name)?;
        let export = volume.exports.iter().find(|export| !export.address.is_empty());
        Ok(export.and_then(|export| Some((export.address.parse().ok()?, export.nqn.as_ref()?.to_string()))))
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}", house.volume(name)))
}

#[test]
fn names_taken_and_volumes_in_use_are_refused_until_forced() {
    let house = House::new().unwrap();
    let image = house.add_drive("d0", "96MiB", "--oplog 8MiB");
    let door = house.add_volume("v", "8MiB", 4096);
    let spec = format!("file:{}?size=96MiB", image.display());
    let mut unclear = Vec::new();
    for (command, words) in [
        ("volume create v 4MiB".to_owned(), vec!["named v exists", "another name"]),
        ("volume create huge 900PiB".to_owned(), vec!["900"]),
        ("volume rm v".to_owned(), vec!["export", "--force"]),
        ("volume resize v 4MiB".to_owned(), vec!["smaller", "--allow-shrink"]),
        ("volume resize absent 4MiB".to_owned(), vec!["absent", "does not exist"]),
        ("volume rm absent".to_owned(), vec!["absent", "does not exist"]),
        (format!("pool rm {spec}"), vec!["v", "--force"]),
        (format!("pool add {spec}"), vec!["in the pool"]),
        ("pool add malloc:m0?size=64MiB".to_owned(), vec!["--volatile"]),
    ] {
        let said = house.refused(&command);
        let missing: Vec<_> = words.into_iter().filter(|word| !said.contains(word)).collect();
        if !missing.is_empty() {
            unclear.push(format!("penstock {command}: {missing:?} is not in: {said}"));
        }
    }
    assert!(unclear.is_empty(), "{}", unclear.join("\n"));
    // A host that is connected holds the door open.
    let mut line = door.connect().unwrap();
    line.write(0, &content(1)).unwrap();
    wait_for("the host to be seen", LIMIT, || Ok((house.volume("v")?.connections > 0).then_some(()))).unwrap();
    let said = house.refused("volume unexport v");
    assert!(said.contains("connected") && said.contains("force"), "{said}");
    assert_eq!(line.read(0, BLOCK as usize).unwrap(), content(1), "refused means that nothing changed");
    house.did("volume unexport v --force");
    assert!(line.try_read(0, BLOCK as usize).is_err(), "the association ends with the door");
    house.did("volume rm v");

    // A drive that is let go by force leaves with its volumes, and comes back with them.
    house.add_volume("kept", "8MiB", 4096).connect().unwrap().write(0, &content(3)).unwrap();
    house.did(&format!("pool rm {spec} --force"));
    house.settle().unwrap();
    assert_eq!((house.volumes().unwrap().len(), house.drives().unwrap().len()), (0, 0));
    house.did(&format!("pool import {spec}"));
    house.settle().unwrap();
    house.did(&format!("volume export kept --nvmf=127.0.0.1:{}", house.port()));
    assert_eq!(house.wait_for_door("kept").unwrap().connect().unwrap().read(0, BLOCK as usize).unwrap(), content(3));
}

#[test]
fn file_that_memory_would_hold_wants_volatile_and_leaves_nothing_when_refused() {
    let house = House::new().unwrap();
    let dir = tempfile::Builder::new().prefix("penstock-").tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("d.img");
    let refused = house.refused(&format!("pool add file:{}?size=64MiB", path.display()));
    assert!(refused.contains("is volatile") && refused.contains("--volatile"), "{refused}");
    assert!(!path.exists(), "what is refused is not made");
    assert_eq!(house.drives().unwrap(), []);
    let refused = house.refused(&format!("pool add file:{}/no/d.img?size=64MiB", dir.path().display()));
    assert!(refused.contains("Make its directory first"), "{refused}");
}

#[test]
fn power_safe_drive_that_a_flush_reaches_is_flushed_and_says_so_before_and_after() {
    let house = House::new().unwrap();
    let spec = format!("file:{}?size=96MiB&power_safe=true", house.path("d0.img").display());
    let probe = || house.rpc::<DriveProbe>(&DriveProbeParams { spec: spec.parse().unwrap() }).unwrap();
    assert_eq!(probe().barrier, Barrier::Flush, "before there is a file");
    house.did(&format!("pool add {spec} --oplog 8MiB"));
    let drive = || house.drives().unwrap().remove(0);
    assert_eq!((probe().barrier, drive().barrier), (Barrier::Flush, Barrier::Flush));
    let flushes = drive().counters.flushes;
    house.add_volume("v", "4MiB", 4096).connect().unwrap().write(0, &content(0)).unwrap();
    assert!(drive().counters.flushes > flushes, "an acknowledged write was flushed");
}
