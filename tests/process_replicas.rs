//! Volumes with three replicas, through control and the command penstock: made, written over all paths, the leader killed -9, everything
//! acknowledged still there on each replica. Not here: partitions and pauses (chaos), what one node does with a group (fleet).

use penstock::guest::wait::wait_for;
use penstock::process::cluster::{Cluster, VOLUME};
use penstock::process::dice;
use penstock::process::house::LIMIT;
use penstock::process::perf::{self, LASTING};
use std::time::Duration;

#[test]
fn leader_killed_under_load_loses_nothing_and_comes_back() {
    let mut dice = dice("leader killed");
    let mut cluster = Cluster::with_volume(3, "64MiB").unwrap();
    let first = cluster.wait_for_leader_but(VOLUME, 0).unwrap();
    let journal = cluster.path("journal");
    let load = format!("--mix 20:70:10 --depth 8 --rate 1500 {LASTING} --seed {}", dice.roll());
    let running = perf::start_run_over(&cluster.doors(VOLUME).unwrap(), &journal, &load).unwrap();
    wait_for("the load to be under way", LIMIT, || Ok((cluster.answered(VOLUME).unwrap() > 300).then_some(()))).unwrap();
    std::thread::sleep(Duration::from_millis(dice.below(500)));

    cluster.kill(first).unwrap();
    let second = cluster.wait_for_leader_but(VOLUME, first).unwrap();
    println!("n{first} led and was killed, n{second} leads");
    // Writes go on with two of three.
    let before = cluster.answered(VOLUME).unwrap();
    wait_for("writes without the dead node", LIMIT, || Ok((cluster.answered(VOLUME).unwrap() > before + 300).then_some(()))).unwrap();
    cluster.start(first).unwrap();

    let outcome = perf::stop(running).unwrap().expect_ok("a load over three paths");
    println!("{}", outcome.out);
    cluster.settle(VOLUME).unwrap();
    cluster.verify(VOLUME, &journal).unwrap();
    cluster.did("volume unexport v");
    cluster.did("volume rm v");
}

#[test]
fn control_killed_changes_nothing_for_hosts() {
    let mut dice = dice("control killed");
    let mut cluster = Cluster::with_volume(3, "32MiB").unwrap();
    let journal = cluster.path("journal");
    let doors = cluster.doors(VOLUME).unwrap();
    let load = format!("--mix 20:80:0 --depth 4 --operations 3000 --no-final-pass --seed {}", dice.roll());
    let running = perf::start_run_over(&doors, &journal, &load).unwrap();
    cluster.kill_control().unwrap();
    // Nodes find each other and elect without it.
    perf::finish(running).unwrap().expect_ok("a load without control");
    for at in 1..=3 {
        cluster.kill(at).unwrap();
        cluster.start(at).unwrap();
    }
    let (is_good, report) = perf::verify_over(&doors, &journal).unwrap();
    assert!(is_good, "{report:#}");
    cluster.start_control().unwrap();
    cluster.settle(VOLUME).unwrap();
    cluster.verify(VOLUME, &journal).unwrap();
}
