//! kill -9 of penstockd at moments that nobody chose, under verified writes: what was acknowledged is there afterwards.
//! Not here: power loss (guests and the simulator), kills of penstock-control (process_control).

use penstock::guest::replay::Dice;
use penstock::guest::wait::wait_for;
use penstock::process::dice;
use penstock::process::house::{House, LIMIT, TcpDoor};
use penstock::process::ledger::{End, Ledger, Progress, Verified};
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
    for round in 0..8 {
        acknowledged += write_and_kill(&mut house, &door, &mut ledger, &mut dice, 200, 400);
        house.start_node().unwrap();
        let verified = verify(&house, "v", &mut ledger);
        in_doubt += verified.in_doubt_old + verified.in_doubt_new;
        println!("round {round}: {acknowledged} acknowledged so far, {verified:?}");
    }
    assert!(in_doubt > 0, "in 8 kills of 4 writers something must have been under way");
    house.settle().unwrap();
}
