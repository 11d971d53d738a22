//! Clones by the command penstock: volumes that begin as a snapshot is, which hosts read and write beside their origin, through kills of the node; and what
//! goes before what. Not here: every write of either against what both hold (the engine's model test, the simulator).

use penstock::guest::wait::wait_for;
use penstock::process::cluster::{Cluster, VOLUME as GROUP};
use penstock::process::dice;
use penstock::process::house::{House, LIMIT, TcpDoor};
use penstock::process::ledger::{End, Ledger, work_while};
use penstock::process::perf::{self, LASTING};
use penstock_api::http::VolumeView;
use std::time::Duration;

const VOLUME: u64 = 8 << 20;

fn exported(house: &House, volume: &str) -> TcpDoor {
    house.did(&format!("volume export {volume} --nvmf=127.0.0.1:{}", house.port()));
    house.wait_for_door(volume).unwrap()
}

fn moment() {
    std::thread::sleep(Duration::from_millis(400));
}

fn verify(house: &House, volume: &str, ledger: &mut Ledger) {
    let door = house.wait_for_door(volume).unwrap();
    let verified = ledger.expect_good(door.address, &door.nqn).unwrap_or_else(|e| panic!("volume {volume}: {e}"));
    println!("{volume}: {verified:?}");
}

fn origin(house: &House, volume: &str) -> (String, String) {
    let view: VolumeView = serde_json::from_value(house.asked(&format!("volume show {volume}"))).unwrap();
    let origin = view.origin.expect("it is a clone");
    (origin.volume, origin.snapshot)
}

#[test]
fn clone_and_origin_are_written_beside_each_other_and_go_in_order() {
    let mut dice = dice("clones");
    let mut house = House::new().unwrap();
    house.add_drive("d0", "192MiB", "--oplog 8MiB");
    let door = house.add_volume("v", "8MiB", 512);
    let mut own = Ledger::new(dice.roll(), VOLUME);
    let (_, ends, _) = own.work_while(door.address, &door.nqn, |_| moment()).unwrap();
    assert!(ends.iter().all(|end| *end == End::Told), "{ends:?}");
    house.did("snapshot create v monday");
    // What the snapshot is for good, for a clone that nobody writes to.
    let mut frozen = own.clone();
    let (_, ends, _) = own.work_while(door.address, &door.nqn, |_| moment()).unwrap();
    assert!(ends.iter().all(|end| *end == End::Told), "{ends:?}");

    let made = house.did("volume create test --from v@monday").out;
    assert!(made.contains("as v@monday of 8MiB"), "{made}");
    let test = exported(&house, "test");
    let mut branch = frozen.branch(dice.roll());
    verify(&house, "test", &mut branch);
    verify(&house, "v", &mut own);

    for round in 0..3 {
        let kill = |_: &_| {
            moment();
            house.kill_node()
        };
        let both = &mut [(&mut own, door.address, door.nqn.as_str()), (&mut branch, test.address, test.nqn.as_str())];
        let (killed, ends, acknowledged) = work_while(both, kill).unwrap();
        killed.unwrap();
        assert!(ends.iter().all(|end| matches!(end, End::Cut(_))), "{ends:?}");
        println!("round {round}: {acknowledged} acknowledged by both");
        house.start_node().unwrap();
        verify(&house, "v", &mut own);
        verify(&house, "test", &mut branch);
    }
    house.did("volume create old --from v@monday --size 16MiB");
    let old = exported(&house, "old");
    assert_eq!(old.connect().unwrap().size(), 2 * VOLUME);
    verify(&house, "old", &mut frozen);

    // In the wrong order nothing goes, and it is said what stands in the way.
    let refused = house.refused("snapshot rm v monday");
    assert!(refused.contains("old, test are clones that stand on it") && refused.contains("penstock volume rm old"), "{refused}");
    let refused = house.refused("volume rm v --force");
    assert!(refused.contains("old, test are clones"), "{refused}");
    assert!(house.did("snapshot ls v").out.contains("old,test"));
    house.kill_control().unwrap();
    std::fs::remove_dir_all(house.path("control")).unwrap();
    house.start_control().unwrap();
    house.did("pool import");
    assert_eq!(origin(&house, "test"), ("v".to_owned(), "monday".to_owned()), "the drive tells");

    house.did("volume unexport old");
    house.did("volume rm old");
    assert!(house.refused("snapshot rm v monday").contains("test is a clone"));
    house.did("snapshot create test mine");
    house.did("volume create deep --from test@mine");
    exported(&house, "deep");
    let mut deep = branch.branch(dice.roll());
    verify(&house, "deep", &mut deep);
    assert!(house.refused("volume rm test --force").contains("deep is a clone"));
    house.did("volume rm deep --force");
    house.did("volume rm test --force");
    house.did("snapshot rm v monday");
    verify(&house, "v", &mut own);
    house.did("volume rm v --force");
    house.settle().unwrap();
    assert!(house.volumes().unwrap().is_empty());
}

#[test]
fn clone_of_three_replicas_is_where_they_are_and_is_written_beside_them_though_leaders_die() {
    let mut dice = dice("clones of a group");
    let mut cluster = Cluster::with_volume(3, "32MiB").unwrap();
    let (journal, branch) = (cluster.path("journal"), cluster.path("branch"));
    let load = |more: &str, seed| format!("--mix 20:70:10 --depth 8 --operations 3000 --no-final-pass --seed {seed} {more}");
    let doors = cluster.doors(GROUP).unwrap();
    perf::finish(perf::start_run_over(&doors, &journal, &load("", dice.roll())).unwrap()).unwrap().expect_ok("a first load");
    cluster.did("snapshot create v monday");
    std::fs::copy(&journal, &branch).unwrap();
    perf::finish(perf::start_run_over(&doors, &journal, &load("--resume", dice.roll())).unwrap()).unwrap().expect_ok("a load after it");

    let made = cluster.did("volume create test --from v@monday").out;
    assert!(made.contains("as v@monday of 32MiB on n1, n2, n3"), "{made}");
    cluster.did("volume export test --nvmf");
    cluster.wait_for_leader_but("test", 0).unwrap();
    cluster.settle("test").unwrap();
    cluster.verify("test", &branch).unwrap();

    let lasting = |seed| format!("--mix 20:70:10 --depth 4 --rate 400 {LASTING} --resume --seed {seed}");
    let copies = cluster.doors("test").unwrap();
    let running = [
        perf::start_run_over(&doors, &journal, &lasting(dice.roll())).unwrap(),
        perf::start_run_over(&copies, &branch, &lasting(dice.roll())).unwrap(),
    ];
    let written = |cluster: &Cluster| {
        for volume in [GROUP, "test"] {
            let before = cluster.answered(volume).unwrap();
            wait_for("writes", LIMIT, || Ok((cluster.answered(volume)? > before + 200).then_some(()))).unwrap();
        }
    };
    written(&cluster);
    let leader = cluster.wait_for_leader_but("test", 0).unwrap();
    cluster.kill(leader).unwrap();
    for volume in [GROUP, "test"] {
        cluster.wait_for_leader_but(volume, leader).unwrap();
    }
    written(&cluster);
    cluster.start(leader).unwrap();
    running.into_iter().for_each(|load| drop(perf::stop(load).unwrap().expect_ok("a load on one of the two")));
    for (volume, journal) in [(GROUP, &journal), ("test", &branch)] {
        cluster.settle(volume).unwrap();
        cluster.verify(volume, journal).unwrap();
    }

    let refused = |command: &str, why: &str| {
        let outcome = cluster.commands().run(command).unwrap();
        assert!(outcome.code == Some(1) && outcome.err.contains(why), "penstock {command}: {}", outcome.said());
    };
    refused("snapshot rm v monday", "test is a clone that stands on it");
    refused("volume rm v --force", "test is a clone");
    refused("replica replace v n1", "its clone test stands on it");
    cluster.did("volume rm test --force");
    cluster.did("snapshot rm v monday");
    cluster.settle(GROUP).unwrap();
    cluster.verify(GROUP, &journal).unwrap();
}
