//! kill -9 of penstockd at moments that nobody chose, under verified writes: what was acknowledged is there afterwards.
//! Not here: power loss (guests and the simulator), kills of penstock-control (process_control).

use penstock::guest::replay::Dice;
use penstock::guest::wait::wait_for;
use penstock::process::dice;
use penstock::process::house::{House, LIMIT, TcpDoor};
use penstock::process::ledger::{End, Ledger, Progress, Verified};
use penstock::process::perf::{self, LASTING};
use penstock_api::rpc::{Drain, DrainParams, DriveState};
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Holds until the workers had that many answers.
fn wait_for_answers(progress: &Progress, count: u64) {
    wait_for("acknowledged writes", LIMIT, || Ok((progress.acknowledged() >= count).then_some(()))).unwrap();
}

/// A moment between 0 and `most_ms` later.
fn random_moment(dice: &mut Dice, most_ms: u64) {
    std::thread::sleep(Duration::from_micros(dice.below(most_ms * 1000)));
}

/// Workers write until penstockd is killed at a random moment; none may have been refused or have read what it may not.
fn write_and_kill(house: &mut House, door: &TcpDoor, ledger: &mut Ledger, dice: &mut Dice, answers: u64, most_ms: u64) -> u64 {
    let kill = |progress: &Progress| {
        wait_for_answers(progress, answers);
        random_moment(dice, most_ms);
        house.kill_node()
    };
    let (killed, ends, acknowledged) = ledger.work_while(door.address, &door.nqn, kill).unwrap();
    killed.unwrap();
    assert!(ends.iter().all(|end| matches!(end, End::Cut(_))), "{ends:?}");
    acknowledged
}

fn verify(house: &House, name: &str, ledger: &mut Ledger) -> Verified {
    let door = house.wait_for_door(name).unwrap();
    ledger.expect_good(door.address, &door.nqn).unwrap()
}

#[test]
fn writes_smaller_than_a_block_killed_at_random_moments_are_all_there() {
    let mut dice = dice("kills under small writes");
    let mut house = House::new().unwrap();
    house.add_drive("d0", "192MiB", "--oplog 8MiB");
    let door = house.add_volume("v", "32MiB", 512);
    let mut ledger = Ledger::new(dice.roll(), 32 * MIB);
    let (mut acknowledged, mut in_doubt) = (0, 0);
    for round in 0..6 {
        acknowledged += write_and_kill(&mut house, &door, &mut ledger, &mut dice, 200, 400);
        house.start_node().unwrap();
        let verified = verify(&house, "v", &mut ledger);
        in_doubt += verified.in_doubt_old + verified.in_doubt_new;
        println!("round {round}: {acknowledged} acknowledged so far, {verified:?}");
    }
    assert!(in_doubt > 0, "in 6 kills of 4 writers something must have been under way");
    house.settle().unwrap();
}

/// A load of penstock-perf that keeps a journal, killed from under it; then every block of the journal is read.
#[test]
fn deep_queues_killed_while_the_oplog_wraps_lose_nothing() {
    let mut dice = dice("kills under deep queues");
    let mut house = House::new().unwrap();
    house.add_drive("d0", "256MiB", "--oplog 8MiB");
    let door = house.add_volume("v", "64MiB", 4096);
    let journal = house.path("journal");
    for round in 0..2 {
        let seed = dice.roll();
        let again = if round == 0 { "" } else { "--resume" };
        let load = format!("--mix 10:80:10 --block-size 32KiB --depth 24 {LASTING} --dead-after 5s --reconnect 20 --seed {seed} {again}");
        let before = house.volume("v").unwrap().counters.write_bytes;
        let running = perf::start_run(&door.perf_target(), &journal, &load).unwrap();
        wait_for("three oplogs full of writes", LIMIT, || Ok((house.volume("v")?.counters.write_bytes > before + 24 * MIB).then_some(())))
            .unwrap();
        random_moment(&mut dice, 300);
        house.kill_node().unwrap();
        let ended = perf::finish(running).unwrap();
        assert!(ended.said().contains("target died"), "the load is to end by the kill: {}", ended.said());
        house.start_node().unwrap();
        house.wait_for_door("v").unwrap();
        let (is_good, report) = perf::verify(&door.perf_target(), &journal).unwrap();
        println!("round {round}: {report}");
        assert!(is_good, "{report:#}");
        assert!(report["acknowledged"].as_u64() > Some(1000), "{report}");
    }
}

#[test]
fn one_load_goes_on_over_kills_without_an_error() {
    let mut dice = dice("kills under one load");
    let mut house = House::new().unwrap();
    house.add_drive("d0", "192MiB", "--oplog 16MiB");
    let door = house.add_volume("v", "32MiB", 512);
    let journal = house.path("journal");
    // Rate and range are small: the load is to last for the restarts, not to fill anything.
    let load = format!("--mix 30:60:10 --block-size 2560 --depth 8 --rate 800 {LASTING} --seed {}", dice.roll());
    let running = perf::start_run(&door.perf_target(), &journal, &load).unwrap();
    let under_way = |house: &House| {
        wait_for("the load to be under way", LIMIT, || Ok((house.volume("v")?.counters.writes > 100).then_some(()))).unwrap();
    };
    for _ in 0..2 {
        under_way(&house);
        random_moment(&mut dice, 500);
        house.kill_node().unwrap();
        random_moment(&mut dice, 300);
        house.start_node().unwrap();
        house.wait_for_door("v").unwrap();
    }
    under_way(&house);
    let outcome = perf::stop(running).unwrap().expect_ok("a load that reconnects");
    println!("{}", outcome.out);
    let (is_good, report) = perf::verify(&door.perf_target(), &journal).unwrap();
    assert!(is_good, "{report:#}");
}

#[test]
fn recovery_killed_over_and_over_ends_with_everything_there() {
    let mut dice = dice("kills in recovery");
    let mut house = House::new().unwrap();
    house.add_drive("d0", "768MiB", "--oplog 256MiB");
    let door = house.add_volume("v", "256MiB", 4096);
    let journal = house.path("journal");
    let load = format!("--mix write --block-size 128KiB --depth 32 {LASTING} --dead-after 5s --reconnect 20 --seed {}", dice.roll());
    let running = perf::start_run(&door.perf_target(), &journal, &load).unwrap();
    // As long as it goes on it may take its time.
    for written in (50..=400).step_by(50) {
        wait_for("an oplog with much to redo", LIMIT, || Ok((house.volume("v")?.counters.write_bytes > written * MIB).then_some(())))
            .unwrap();
    }
    house.kill_node().unwrap();
    perf::finish(running).unwrap();
    let mut hit = 0;
    for _ in 0..6 {
        house.start_node().unwrap();
        let drives = house.drives().unwrap();
        if drives.iter().any(|drive| drive.state == DriveState::Opening) {
            random_moment(&mut dice, 40);
            hit += usize::from(house.drives().unwrap().iter().any(|drive| drive.state == DriveState::Opening));
        }
        house.kill_node().unwrap();
    }
    println!("{hit} of 6 kills surely fell into recovery");
    assert!(hit > 0, "recovery of 256 MiB of oplog is to be seen by a call that takes 4 ms");
    house.start_node().unwrap();
    house.wait_for_door("v").unwrap();
    println!("{:?}", house.drives().unwrap()[0].stores);
    let (is_good, report) = perf::verify(&door.perf_target(), &journal).unwrap();
    assert!(is_good, "{report:#}");
}

#[test]
fn sigterm_answers_drains_and_leaves_nothing_to_redo() {
    let mut dice = dice("SIGTERM");
    let mut house = House::new().unwrap();
    house.add_drive("d0", "192MiB", "--oplog 16MiB");
    let door = house.add_volume("v", "32MiB", 512);
    let mut ledger = Ledger::new(dice.roll(), 32 * MIB);
    let stop = |progress: &Progress| {
        wait_for_answers(progress, 300);
        random_moment(&mut dice, 100);
        house.stop_node()
    };
    let (stopped, ends, acknowledged) = ledger.work_while(door.address, &door.nqn, stop).unwrap();
    assert_eq!(stopped.unwrap().code(), Some(0), "a clean stop exits with 0");
    for end in &ends {
        // Status code type 3 is a path error: the host tries elsewhere, or here again later.
        let is_fine = matches!(end, End::Cut(_)) || matches!(end, End::Refused(refusal) if refusal.code_type == 3);
        assert!(is_fine, "{ends:?}");
    }
    house.start_node().unwrap();
    let verified = verify(&house, "v", &mut ledger);
    println!("{acknowledged} acknowledged, {verified:?}");
    let drives = house.drives().unwrap();
    let recovery = drives[0].stores[0].recovery.expect("it serves");
    assert_eq!((recovery.entries, recovery.lost_blocks, recovery.dropped_batches), (0, 0, 0), "nothing to redo: {recovery:?}");
}

/// The judge is judged: a drive that goes back to an older state loses acknowledged writes, and both verifiers say so.
#[test]
fn drive_restored_from_an_older_copy_is_found_out_by_both_verifiers() {
    let mut dice = dice("older copy");
    let mut house = House::new().unwrap();
    let image = house.add_drive("d0", "128MiB", "--oplog 8MiB");
    let (small, large) = (house.add_volume("small", "8MiB", 512), house.add_volume("large", "16MiB", 4096));
    let mut ledger = Ledger::new(dice.roll(), 8 * MIB);
    let journal = house.path("journal");
    let copy = house.path("older.img");
    for round in 0..2 {
        let (_, ends, _) = ledger.work_while(small.address, &small.nqn, |progress| wait_for_answers(progress, 300)).unwrap();
        assert_eq!(ends, [End::Told, End::Told, End::Told, End::Told]);
        let again = if round == 0 { "" } else { "--resume" };
        let load = format!("--mix write --depth 8 --operations 500 --seed {} {again}", dice.roll());
        perf::finish(perf::start_run(&large.perf_target(), &journal, &load).unwrap()).unwrap().expect_ok("a load");
        house.rpc::<Drain>(&DrainParams::default()).unwrap();
        house.kill_node().unwrap();
        if round == 0 {
            std::fs::copy(&image, &copy).unwrap();
        } else {
            std::fs::copy(&copy, &image).unwrap();
        }
        house.start_node().unwrap();
        let (small, large) = (house.wait_for_door("small").unwrap(), house.wait_for_door("large").unwrap());
        let judged = ledger.verify(&mut small.connect().unwrap()).unwrap();
        let (is_good, report) = perf::verify(&large.perf_target(), &journal).unwrap();
        assert_eq!((judged.is_ok(), is_good), (round == 0, round == 0), "round {round}: {judged:?} {report:#}");
    }
}
