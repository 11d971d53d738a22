//! Replicas that move to another node and that are replaced where their drive was lost, by the command penstock, while hosts write and control is
//! killed in the middle. Not here: leaders killed under load (process_replicas), what control plans (control/model).

use penstock::process::cluster::{Cluster, VOLUME};
use penstock::process::dice;
use penstock::process::perf::{self, LASTING};

#[test]
fn leading_replica_moved_under_load_loses_nothing_though_control_is_killed() {
    let mut dice = dice("replica moved");
    let mut cluster = Cluster::with_volume(4, "64MiB").unwrap();
    let from = cluster.wait_for_leader_but(VOLUME, 0).unwrap();
    let before = cluster.nodes_of(VOLUME).unwrap();
    let to = (1..=4).find(|at| !before.contains(at)).unwrap();
    let mut after: Vec<usize> = before.iter().copied().filter(|at| *at != from).chain([to]).collect();
    after.sort_unstable();

    let doors = cluster.doors_on(VOLUME, &before).unwrap();
    let journal = cluster.path("journal");
    let load = format!("--mix 20:70:10 --depth 8 --rate 1000 {LASTING} --seed {}", dice.roll());
    let mut running = perf::start_run_over(&doors, &journal, &load).unwrap();
    let taken = cluster.commands().run(&format!("replica move v n{from} n{to} --timeout 0")).unwrap();
    assert!(matches!(taken.code, Some(0 | 4)), "{taken:?}");
    let second = cluster.commands().run(&format!("replica move v n{} n{to}", before.iter().find(|at| **at != from).unwrap())).unwrap();
    if cluster.volume(VOLUME).unwrap().change.is_some() {
        assert!(second.code == Some(1) && second.err.contains("give-up"), "one at a time, and what to do: {second:?}");
    }
    std::thread::sleep(std::time::Duration::from_millis(dice.below(600)));
    cluster.kill_control().unwrap();
    cluster.start_control().unwrap();
    // Equal they are for a moment at most, as long as the load goes on.
    cluster.arrive_on(VOLUME, &after).unwrap();

    // Who came last may lead, to which the load has no path.
    running.interrupt().unwrap();
    let stays = *before.iter().find(|at| **at != from).unwrap();
    let outcome = cluster.finish_while_led_by(VOLUME, stays, running).expect_ok("a load while the leader moves");
    println!("{}", outcome.out);
    cluster.settle(VOLUME).unwrap();
    cluster.verify(VOLUME, &journal).unwrap();
    let said = cluster.did(&format!("replica ls {VOLUME}")).out;
    assert!(said.contains("leader") && !said.contains("removing"), "{said}");
    cluster.refused(&format!("replica move v n{from} n{to}"), "no replica on node");
}

#[test]
fn replica_whose_file_was_deleted_is_replaced_elsewhere_and_then_on_its_own_node() {
    let mut dice = dice("replica replaced");
    let mut cluster = Cluster::with_volume(4, "64MiB").unwrap();
    let before = cluster.nodes_of(VOLUME).unwrap();
    let doors = cluster.doors_on(VOLUME, &before).unwrap();
    let journal = cluster.path("journal");
    let load = |more: &str, seed| format!("--mix 20:70:10 --depth 8 --operations 6000 --no-final-pass --seed {seed} {more}");
    perf::finish(perf::start_run_over(&doors, &journal, &load("", dice.roll())).unwrap()).unwrap().expect_ok("a first load");

    // The file goes while its node is down.
    let (lost, fresh) = (before[0], (1..=4).find(|at| !before.contains(at)).unwrap());
    let image = cluster.path(&format!("n{lost}.img"));
    cluster.kill(lost).unwrap();
    std::fs::remove_file(&image).unwrap();
    cluster.start(lost).unwrap();
    cluster.wait_for_leader_but(VOLUME, lost).unwrap();
    let running = perf::start_run_over(&doors[1..], &journal, &load("--resume", dice.roll())).unwrap();
    cluster.did(&format!("replica replace v n{lost} --on n{fresh}"));
    let outcome = cluster.finish_while_led_by(VOLUME, before[1], running);
    outcome.expect_ok("a load while a replica is replaced");
    cluster.did(&format!("pool rm file:{} --force", image.display()));
    let mut after: Vec<usize> = before[1..].iter().copied().chain([fresh]).collect();
    after.sort_unstable();
    cluster.settle_on(VOLUME, &after).unwrap();
    cluster.verify(VOLUME, &journal).unwrap();

    // The next one gets an empty drive in the place of its own, and its replica anew there.
    let lost = after[0];
    let image = cluster.path(&format!("n{lost}.img"));
    cluster.kill(lost).unwrap();
    std::fs::remove_file(&image).unwrap();
    cluster.start(lost).unwrap();
    cluster.wait_for_leader_but(VOLUME, lost).unwrap();
    cluster.did(&format!("pool rm file:{} --force", image.display()));
    cluster.did(&format!("pool add file:{}?size=512MiB --node n{lost} --oplog 128MiB", image.display()));
    cluster.did(&format!("replica replace v n{lost}"));
    cluster.settle_on(VOLUME, &after).unwrap();
    cluster.verify(VOLUME, &journal).unwrap();
}

#[test]
fn node_that_is_lost_for_good_is_removed_and_its_replica_comes_on_another() {
    let mut dice = dice("node removed");
    let mut cluster = Cluster::with_volume(4, "32MiB").unwrap();
    let before = cluster.nodes_of(VOLUME).unwrap();
    let fresh = (1..=4).find(|at| !before.contains(at)).unwrap();
    let lost = before[dice.below(3) as usize];
    let doors = cluster.doors_on(VOLUME, &before.iter().copied().filter(|at| *at != lost).collect::<Vec<_>>()).unwrap();
    let journal = cluster.path("journal");
    let load = |more: &str, seed| format!("--mix 20:70:10 --depth 8 --operations 4000 --no-final-pass --seed {seed} {more}");
    // The one that will be lost may lead now.
    let all = cluster.doors_on(VOLUME, &before).unwrap();
    perf::finish(perf::start_run_over(&all, &journal, &load("", dice.roll())).unwrap()).unwrap().expect_ok("a first load");
    cluster.refused(&format!("node rm n{lost} --force"), "is there");
    // A volume that has nothing but what is there is not given up on the way.
    let drive = cluster.path(&format!("n{lost}.img"));
    cluster.did(&format!("volume create only 8MiB --drive file:{}", drive.display()));
    cluster.kill(lost).unwrap();
    cluster.wait_until_away(&[lost]).unwrap();
    cluster.wait_for_leader_but(VOLUME, lost).unwrap();
    cluster.refused(&format!("node rm n{lost}"), "--force forgets its drives");
    cluster.refused(&format!("node rm n{lost} --force"), "their only replica on node");
    let given_up = cluster.commands().run("volume rm only --force --timeout 0").unwrap();
    assert!(matches!(given_up.code, Some(0 | 4)), "{}", given_up.said());

    let running = perf::start_run_over(&doors, &journal, &load("--resume", dice.roll())).unwrap();
    cluster.did(&format!("node rm n{lost} --force"));
    let stays = before.iter().copied().find(|at| *at != lost).unwrap();
    cluster.finish_while_led_by(VOLUME, stays, running).expect_ok("a load while a node is removed");
    let mut after: Vec<usize> = before.iter().copied().filter(|at| *at != lost).chain([fresh]).collect();
    after.sort_unstable();
    cluster.settle_among(VOLUME, &after).unwrap();
    cluster.verify(VOLUME, &journal).unwrap();
    let listed = cluster.did("pool ls").out + &cluster.did("volume ls").out;
    assert!(!listed.contains(&drive.display().to_string()) && !listed.contains("only"), "{listed}");
    cluster.refused(&format!("node rm n{lost} --force"), "does not exist");
}
