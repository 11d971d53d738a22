//! What a person does at a bad moment: sizes changed, doors closed and volumes removed while hosts write, drives' files cut
//! short, removed or named twice; with kills in between. Not here: kills amid a life of commands without I/O (process_control),
//! damage to what lies on a drive (process_labels).

use penstock::guest::initiator::{Namespace, Refusal};
use penstock::guest::wait::wait_for;
use penstock::process::house::{House, LIMIT, Plan};
use penstock::process::image::Image;
use penstock::process::ledger::{End, Ledger, Progress, work_while};
use penstock::process::witness::Witness;
use penstock::process::{dice, program};
use penstock_api::rpc::{Drain, DrainParams, DriveInfo, DriveState};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const TOLD: [End; 4] = [End::Told, End::Told, End::Told, End::Told];
const CAPACITY_EXCEEDED: Refusal = Refusal::CAPACITY_EXCEEDED;

fn wait_for_answers(progress: &Progress, count: u64) {
    let wanted = progress.acknowledged() + count;
    wait_for("acknowledged writes", LIMIT, || Ok((progress.acknowledged() >= wanted).then_some(()))).unwrap();
}

fn moment(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

fn drain(house: &House) {
    house.rpc::<Drain>(&DrainParams::default()).unwrap();
}

fn verify(house: &House, volume: &str, ledger: &mut Ledger) {
    let door = house.wait_for_door(volume).unwrap();
    ledger.expect_good(door.address, &door.nqn).unwrap_or_else(|e| panic!("volume {volume}: {e}"));
}

fn restart(house: &mut House) {
    house.kill_node().unwrap();
    house.start_node().unwrap();
}

fn content(round: u64, block: u64) -> Vec<u8> {
    let mut bytes = vec![0xc0 | round as u8; BLOCK as usize];
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes
}

fn expect_zeros(line: &mut Namespace, from: u64, to: u64) {
    for at in (from..to).step_by(128 << 10) {
        let length = (to - at).min(128 << 10) as usize;
        let bytes = line.read(at, length).unwrap();
        let found = bytes.iter().position(|byte| *byte != 0);
        assert_eq!(found, None, "zeros are due from byte {from} to {to}; at {at} there is something else");
    }
}

#[test]
fn volume_grown_again_and_again_under_writes_and_kills_has_a_size_that_was_said_and_all_its_data() {
    let mut dice = dice("growing");
    let mut house = House::new().unwrap();
    house.add_drive("d0", "192MiB", "--oplog 8MiB");
    let door = house.add_volume("v", "8MiB", 512);
    let mut ledger = Ledger::new(dice.roll(), 8 * MIB);
    let mut size = 8;
    for round in 0..5 {
        let commands = house.commands();
        let (asked, done) = (std::cell::Cell::new(size), std::sync::atomic::AtomicU64::new(size));
        let kill_after = dice.below(250);
        let meanwhile = |progress: &Progress| {
            wait_for_answers(progress, 100);
            std::thread::scope(|scope| {
                let person = scope.spawn(|| {
                    let mut asked = size;
                    for _ in 0..20 {
                        asked += 1;
                        let outcome = commands.run(&format!("volume resize v {asked}MiB")).unwrap();
                        match outcome.code {
                            // Mostly also when the node dies in the middle: control does it when the node is back.
                            Some(0) => done.store(asked, std::sync::atomic::Ordering::Relaxed),
                            Some(1 | 4) => break,
                            _ => panic!("{outcome:?}"),
                        }
                    }
                    asked
                });
                moment(kill_after);
                house.kill_node().unwrap();
                house.start_node().unwrap();
                asked.set(person.join().unwrap());
            });
        };
        let ((), ends, acknowledged) = ledger.work_while(door.address, &door.nqn, meanwhile).unwrap();
        assert!(ends.iter().all(|end| matches!(end, End::Cut(_))), "{ends:?}");
        house.settle().unwrap();
        verify(&house, "v", &mut ledger);
        let said = done.into_inner();
        let found = house.volume("v").unwrap().size_bytes.bytes() / MIB;
        println!("round {round}: {acknowledged} acknowledged; {said} MiB were said to be, {} asked for, {found} are there", asked.get());
        assert!((said..=asked.get()).contains(&found), "{found} MiB; said {said}, asked {}", asked.get());
        let mut line = house.wait_for_door("v").unwrap().connect().unwrap();
        assert_eq!(line.size(), found * MIB, "what hosts see");
        for (at, written) in [(8, round > 0), (size - 1, round > 0)] {
            let due = if written { content(at, at) } else { vec![0; BLOCK as usize] };
            assert!(size == 8 || line.read(at * MIB, BLOCK as usize).unwrap() == due, "MiB {at} of round {round}");
        }
        expect_zeros(&mut line, size.max(9) * MIB, found * MIB);
        for at in 8..found {
            line.write(at * MIB, &content(at, at)).unwrap();
        }
        size = found;
    }
}

#[test]
fn volume_shrunk_and_grown_over_kills_shows_zeros_where_it_was_cut() {
    let mut dice = dice("shrinking");
    let mut house = House::new().unwrap();
    house.add_drive("d0", "96MiB", "--oplog 8MiB");
    house.add_volume("v", "4MiB", 4096);
    for round in 0..4u64 {
        let mut line = house.wait_for_door("v").unwrap().connect().unwrap();
        for block in 0..1024 {
            line.write(block * BLOCK, &content(round, block)).unwrap();
        }
        drop(line);
        if round & 1 != 0 {
            drain(&house);
        }
        let said = house.refused("volume resize v 1MiB");
        assert!(said.contains("--allow-shrink"), "{said}");
        let kept = 1 + dice.below(600);
        let shrink = format!("volume resize v {} --allow-shrink", kept * BLOCK);
        assert!(house.refused(&shrink).contains("unexport"), "hosts would lose what they see");
        house.did("volume unexport v");
        house.did(&shrink);
        if round & 2 != 0 {
            restart(&mut house);
            house.settle().unwrap();
        }
        house.did("volume resize v 4MiB");
        if round & 1 != 0 {
            restart(&mut house);
        } else {
            drain(&house);
        }
        house.did(&format!("volume export v --nvmf=127.0.0.1:{}", house.port()));
        let mut line = house.wait_for_door("v").unwrap().connect().unwrap();
        assert_eq!(line.size(), 4 * MIB);
        for block in 0..kept {
            assert_eq!(line.read(block * BLOCK, BLOCK as usize).unwrap(), content(round, block), "block {block} of {kept} kept");
        }
        expect_zeros(&mut line, kept * BLOCK, 4 * MIB);
        println!("round {round}: {kept} blocks kept");
    }
    house.settle().unwrap();
}

/// A host whose door is taken away is cut off, or told first that this path is no more (path error, inaccessible).
fn lost_its_door(end: &End) -> bool {
    matches!(end, End::Cut(_) | End::Refused(Refusal { code_type: 3, code: 2 }))
}

#[test]
fn doors_closed_and_volumes_removed_under_writes_cut_their_own_hosts_alone() {
    let mut dice = dice("closing doors");
    let mut house = House::new().unwrap();
    house.add_drive("d0", "128MiB", "--oplog 8MiB");
    house.add_volume("a", "8MiB", 512);
    house.add_volume("b", "8MiB", 512);
    let (mut a, mut b) = (Ledger::new(dice.roll(), 8 * MIB), Ledger::new(dice.roll(), 8 * MIB));
    let port = house.port();
    for round in 0..3 {
        let doors = ["a", "b"].map(|name| house.wait_for_door(name).unwrap());
        let mut both = [(&mut a, doors[0].address, doors[0].nqn.as_str()), (&mut b, doors[1].address, doors[1].nqn.as_str())];
        let (said, ends, acknowledged) = work_while(&mut both, |progress| {
            wait_for_answers(progress, 200);
            let said = house.refused("volume unexport a");
            wait_for_answers(progress, 200);
            house.did("volume unexport a --force");
            wait_for_answers(progress, 200);
            said
        })
        .unwrap();
        assert!(said.contains("connected") && said.contains("force"), "{said}");
        assert!(ends[..4].iter().all(lost_its_door), "{ends:?}");
        assert_eq!(ends[4..], TOLD, "the other volume's hosts");
        println!("round {round}: {acknowledged} acknowledged");
        if round == 1 {
            restart(&mut house);
        }
        house.did(&format!("volume export a --nvmf=127.0.0.1:{port}"));
        verify(&house, "a", &mut a);
        verify(&house, "b", &mut b);
    }
    // The volume itself goes, and one of the same name and size takes its place at once.
    let doors = ["a", "b"].map(|name| house.wait_for_door(name).unwrap());
    let mut both = [(&mut a, doors[0].address, doors[0].nqn.as_str()), (&mut b, doors[1].address, doors[1].nqn.as_str())];
    let (said, ends, _) = work_while(&mut both, |progress| {
        wait_for_answers(progress, 200);
        let said = house.refused("volume rm a");
        house.did("volume rm a --force");
        house.did("volume create a 8MiB --block-size 512");
        house.did(&format!("volume export a --nvmf=127.0.0.1:{port}"));
        wait_for_answers(progress, 200);
        said
    })
    .unwrap();
    assert!(said.contains("force"), "{said}");
    assert!(ends[..4].iter().all(lost_its_door), "{ends:?}");
    assert_eq!(ends[4..], TOLD);
    for _ in 0..2 {
        let mut line = house.wait_for_door("a").unwrap().connect().unwrap();
        expect_zeros(&mut line, 0, 8 * MIB);
        drop(line);
        verify(&house, "b", &mut b);
        restart(&mut house);
    }
    house.settle().unwrap();
}

#[test]
fn volume_that_is_written_whole_is_overwritten_on_a_drive_that_others_filled_through_kills() {
    let mut house = House::new().unwrap();
    house.add_drive("d0", "48MiB", "--oplog 8MiB");
    let (whole, greedy) = (house.add_volume("whole", "4MiB", 4096), house.add_volume("greedy", "64MiB", 4096));
    let mut line = whole.connect().unwrap();
    let write_all = |line: &mut Namespace, round: u64| {
        for block in 0..1024 {
            assert_eq!(line.try_write(block * BLOCK, &content(round, block)).unwrap(), Ok(()), "block {block} in round {round}");
        }
    };
    write_all(&mut line, 0);
    drain(&house);
    let mut filler = greedy.connect().unwrap();
    let fill = |filler: &mut Namespace, from: u64| {
        for block in from..16 * 1024 {
            match filler.try_write(block * BLOCK, &content(9, block)).unwrap() {
                Ok(()) => {}
                Err(refusal) => {
                    assert_eq!(refusal, CAPACITY_EXCEEDED);
                    return block;
                }
            }
        }
        panic!("a drive of 48 MiB does not take 64 MiB");
    };
    let mut full = fill(&mut filler, 0);
    for round in 1..4 {
        // Twice, so that more is written than the oplog holds.
        write_all(&mut line, round + 10);
        write_all(&mut line, round);
        drop((line, filler));
        if round == 2 {
            drain(&house);
        }
        restart(&mut house);
        line = house.wait_for_door("whole").unwrap().connect().unwrap();
        filler = house.wait_for_door("greedy").unwrap().connect().unwrap();
        for block in 0..1024 {
            assert_eq!(line.read(block * BLOCK, BLOCK as usize).unwrap(), content(round, block), "block {block} in round {round}");
        }
        let more = fill(&mut filler, full);
        println!("round {round}: {full} blocks of the other, {more} after a restart");
        full = more;
        for block in (0..full).step_by(29) {
            assert_eq!(filler.read(block * BLOCK, BLOCK as usize).unwrap(), content(9, block), "block {block} of the other");
        }
    }
    house.settle().unwrap();
}

#[test]
fn stop_cut_short_by_a_second_sigterm_or_a_kill_loses_nothing() {
    let mut dice = dice("stop cut short");
    let mut house = House::with(Plan { flags: program::words("--stop-timeout-s 20"), ..Plan::default() }).unwrap();
    house.add_drive("d0", "256MiB", "--oplog 48MiB");
    house.add_volume("v", "64MiB", 512);
    let mut ledger = Ledger::new(dice.roll(), 64 * MIB);
    for round in 0..6 {
        let door = house.wait_for_door("v").unwrap();
        let stop = |progress: &Progress| {
            wait_for_answers(progress, 1500);
            house.node().terminate().unwrap();
            moment(dice.below(40));
            match round % 3 {
                0 => house.kill_node().unwrap(),
                1 => {
                    // It may have left by itself already.
                    let _ = house.node().terminate();
                    let status = house.node().wait_ended(LIMIT).unwrap();
                    println!("round {round}: after a second SIGTERM {status}");
                }
                _ => assert_eq!(house.node().wait_ended(LIMIT).unwrap().code(), Some(0)),
            }
        };
        let ((), ends, acknowledged) = ledger.work_while(door.address, &door.nqn, stop).unwrap();
        for end in &ends {
            let is_fine = matches!(end, End::Cut(_)) || matches!(end, End::Refused(refusal) if refusal.code_type == 3);
            assert!(is_fine, "{ends:?}");
        }
        house.start_node().unwrap();
        verify(&house, "v", &mut ledger);
        let recovery = house.drives().unwrap()[0].stores[0].recovery.expect("it serves");
        println!("round {round}: {acknowledged} acknowledged, {} entries redone", recovery.entries);
        assert_eq!(recovery.lost_blocks, 0);
    }
    house.settle().unwrap();
}

fn house_with_victim(dice: &mut penstock::guest::replay::Dice) -> (House, Witness, std::path::PathBuf, Ledger) {
    let mut house = House::new().unwrap();
    house.add_drive("well", "64MiB", "--oplog 8MiB");
    let witness = Witness::new(&mut house);
    let path = house.add_drive("victim", "64MiB", "--oplog 8MiB");
    // The ledger has its first half.
    house.did(&format!("volume create v 16MiB --block-size 512 --drive file:{}?size=64MiB", path.display()));
    house.did(&format!("volume export v --nvmf=127.0.0.1:{}", house.port()));
    let mut ledger = Ledger::new(dice.roll(), 8 * MIB);
    let door = house.wait_for_door("v").unwrap();
    let (_, ends, _) = ledger.work_while(door.address, &door.nqn, |progress| wait_for_answers(progress, 1500)).unwrap();
    assert_eq!(ends, TOLD);
    (house, witness, path, ledger)
}

/// No block of the volume reads as something else than was acknowledged; whether all of it reads.
fn no_lies(house: &House, ledger: &mut Ledger, when: &str) -> bool {
    let mut line = house.wait_for_door("v").unwrap().connect().unwrap();
    match ledger.verify(&mut line).unwrap() {
        Ok(_) => true,
        Err(faults) => {
            assert!(faults.iter().all(|fault| fault.is_unreadable), "{when}: {faults:#?}");
            println!("{when}: {} places and more cannot be read", faults.len());
            false
        }
    }
}

#[test]
fn file_of_a_drive_cut_short_while_it_serves_gives_errors_and_never_other_bytes() {
    let mut dice = dice("cut short");
    for round in 0..2 {
        let (mut house, mut witness, path, mut ledger) = house_with_victim(&mut dice);
        drain(&house);
        let image = Image::open(&path).unwrap();
        let zones = &image.zones().unwrap()[0];
        let written = ledger.written();
        let places = image.find(&zones.extents, &ledger.mark(written[written.len() / 2])).unwrap();
        // In the middle of its data, or in the middle of its oplog.
        let cut = if round == 0 { *places.first().expect("it was drained") } else { zones.oplog.start + 5 * MIB } / BLOCK * BLOCK;
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(cut).unwrap();
        assert!(!no_lies(&house, &mut ledger, "cut short"), "what was cut off cannot be read");
        witness.look(&mut house, "a file cut short").unwrap();
        // Hosts go on writing, where that goes.
        let mut line = house.wait_for_door("v").unwrap().connect().unwrap();
        let taken: Vec<u64> =
            (2048..4096).step_by(7).filter(|block| line.try_write(block * BLOCK, &content(round, *block)).unwrap().is_ok()).collect();
        println!("round {round}: cut at {cut}; {} of 293 writes taken; {:?}", taken.len(), house.drive_at(&path).state);
        let expect_taken = |line: &mut Namespace, when: &str| {
            let answers = taken.iter().map(|block| (block, line.try_read(block * BLOCK, BLOCK as usize).unwrap()));
            let readable = answers.filter_map(|(block, answer)| answer.ok().map(|bytes| (block, bytes)));
            let readable = readable.inspect(|(block, bytes)| assert_eq!(*bytes, content(round, **block), "{when}: block {block}")).count();
            println!("round {round}: {when} {readable} of {} read", taken.len());
            readable
        };
        assert_eq!(expect_taken(&mut line, "at once"), taken.len());
        drop(line);
        witness.look(&mut house, "writes to a file cut short").unwrap();
        // Too short for its label, it is not opened; given its length again it is, and nothing lies.
        restart(&mut house);
        witness.expect_restarted(&mut house).unwrap();
        let settled = house.settled_drive(&path);
        println!("round {round}: after a restart {:?}: {:?}", settled.state, settled.reason);
        assert_eq!(settled.state, DriveState::Missing);
        assert!(settled.reason.is_some_and(|reason| reason.contains("formatted")), "both sizes are said");
        witness.look(&mut house, "a restart on a file cut short").unwrap();
        file.set_len(64 * MIB).unwrap();
        let settled = wait_for("control to try the drive again", LIMIT, || {
            let again = |drive: &DriveInfo| !drive.reason.as_ref().is_some_and(|reason| reason.contains("formatted"));
            Ok(Some(house.drive_at(&path)).filter(|drive| drive.state != DriveState::Opening && again(drive)))
        })
        .unwrap();
        println!("round {round}: long again {:?}: {:?}", settled.state, settled.reason);
        if settled.state == DriveState::Missing {
            // What was cut off held its map: then nothing is shown rather than a part.
            assert!(settled.reason.is_some_and(|reason| reason.contains("unreadable")), "what is lost is said");
        } else {
            expect_taken(&mut house.wait_for_door("v").unwrap().connect().unwrap(), "long again");
            no_lies(&house, &mut ledger, "long again");
        }
        witness.look(&mut house, "a file that is long again").unwrap();
    }
}

#[test]
fn file_of_a_drive_removed_while_it_serves_is_missed_and_not_made_anew() {
    let mut dice = dice("removed");
    let (mut house, mut witness, path, mut ledger) = house_with_victim(&mut dice);
    let kept = house.path("kept.img");
    std::fs::hard_link(&path, &kept).unwrap();
    // Under another name it is the same drive.
    let link = house.path("link.img");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    for other in [&kept, &link] {
        for command in ["pool add", "pool import", "pool add --force"] {
            let said = house.refused(&format!("{command} file:{}", other.display()));
            assert!(said.contains("in use"), "{command}: {said}");
        }
    }
    std::fs::remove_file(&path).unwrap();
    let door = house.wait_for_door("v").unwrap();
    let (_, ends, _) = ledger.work_while(door.address, &door.nqn, |progress| wait_for_answers(progress, 300)).unwrap();
    assert_eq!(ends, TOLD, "whoever has it open has it");
    restart(&mut house);
    witness.expect_restarted(&mut house).unwrap();
    let gone =
        wait_for("the drive to be missed", LIMIT, || Ok(Some(house.drive_at(&path)).filter(|drive| drive.state != DriveState::Opening)))
            .unwrap();
    println!("{:?}: {:?}", gone.state, gone.reason);
    assert_eq!(gone.state, DriveState::Missing, "{gone:?}");
    assert!(gone.reason.is_some_and(|reason| reason.contains("victim.img") && reason.contains("put back")), "what to do is said");
    moment(500); // control tries again meanwhile
    assert!(!path.exists(), "a drive that held data is not made anew");
    witness.look(&mut house, "a file removed").unwrap();
    // An empty one in its place is not taken for it either.
    std::fs::File::create(&path).unwrap().set_len(64 * MIB).unwrap();
    moment(500);
    let replaced = house.drive_at(&path);
    assert_ne!(replaced.state, DriveState::Serving, "{replaced:?}");
    assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0), "a blank file in its place is left alone");
    std::fs::rename(&kept, &path).unwrap();
    house.settle().unwrap();
    verify(&house, "v", &mut ledger);
    witness.look(&mut house, "it is back").unwrap();
}
