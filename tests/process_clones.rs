//! Clones by the command penstock: volumes that begin as a snapshot is, which hosts read and write beside their origin, through kills of the node; and what
//! goes before what. Not here: every write of either against what both hold (the engine's model test, the simulator).

use penstock::guest::replay::Dice;
use penstock::guest::wait::wait_for;
use penstock::process::cluster::{Cluster, VOLUME as GROUP};
use penstock::process::dice;
use penstock::process::house::{House, LIMIT, TcpDoor};
use penstock::process::ledger::{End, Ledger, work_while};
use penstock::process::perf::{self, LASTING};
use penstock::process::program::Running;
use penstock_api::http::{ReplicaView, VolumeView};
use std::path::{Path, PathBuf};
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

/// What hosts write to the one and to the other, and what each has to be found with.
struct Both {
    cluster: Cluster,
    journal: PathBuf,
    branch: PathBuf,
}

const CLONE: &str = "test";

impl Both {
    /// A volume of `replicas` on the first three of so many nodes, written before and after its snapshot "monday", and a clone of that, with doors.
    fn new(nodes: usize, replicas: &str, dice: &mut Dice) -> Self {
        let cluster = Cluster::with_volume_of(nodes, "32MiB", replicas).unwrap();
        let (journal, branch) = (cluster.path("journal"), cluster.path("branch"));
        let load = |more: &str, seed| format!("--mix 20:70:10 --depth 8 --operations 3000 --no-final-pass --seed {seed} {more}");
        let doors = cluster.doors_on(GROUP, &cluster.data_nodes_of(GROUP).unwrap()).unwrap();
        perf::finish(perf::start_run_over(&doors, &journal, &load("", dice.roll())).unwrap()).unwrap().expect_ok("a first load");
        cluster.did("snapshot create v monday");
        std::fs::copy(&journal, &branch).unwrap();
        perf::finish(perf::start_run_over(&doors, &journal, &load("--resume", dice.roll())).unwrap()).unwrap().expect_ok("a load after it");

        let on: Vec<String> = cluster.volume(GROUP).unwrap().replicas.into_iter().map(|replica| replica.node).collect();
        let made = cluster.did(&format!("volume create {CLONE} --from v@monday")).out;
        assert!(made.contains(&format!("as v@monday of 32MiB on {}", on.join(", "))), "{made}");
        cluster.did(&format!("volume export {CLONE} --nvmf"));
        cluster.wait_for_leader_but(CLONE, 0).unwrap();
        Both { cluster, journal, branch }
    }

    fn journal(&self, volume: &str) -> &Path {
        if volume == CLONE { &self.branch } else { &self.journal }
    }

    /// A load on a volume that lasts until it is stopped.
    fn load(&self, volume: &str, seed: u64) -> Running {
        let doors = self.cluster.doors_on(volume, &self.cluster.data_nodes_of(volume).unwrap()).unwrap();
        let load = format!("--mix 20:70:10 --depth 4 --rate 400 {LASTING} --resume --seed {seed}");
        perf::start_run_over(&doors, self.journal(volume), &load).unwrap()
    }

    /// Waits for writes of loads.
    fn written(&self, volumes: &[&str]) {
        for volume in volumes {
            let before = self.cluster.answered(volume).unwrap();
            wait_for("writes", LIMIT, || Ok((self.cluster.answered(volume)? > before + 200).then_some(()))).unwrap();
        }
    }

    fn settle_and_verify(&self, volume: &str) {
        self.cluster.settle(volume).unwrap();
        self.cluster.verify(volume, self.journal(volume)).unwrap();
    }

    /// Both are written, and read, while the node is killed that leads the origin.
    fn written_while_a_leader_dies(&mut self, dice: &mut Dice) {
        self.settle_and_verify(CLONE);
        let running = [GROUP, CLONE].map(|volume| self.load(volume, dice.roll()));
        self.written(&[GROUP, CLONE]);
        let leader = self.cluster.wait_for_leader_but(GROUP, 0).unwrap();
        self.cluster.kill(leader).unwrap();
        for volume in [GROUP, CLONE] {
            self.cluster.wait_for_leader_but(volume, leader).unwrap();
        }
        self.written(&[GROUP, CLONE]);
        self.cluster.start(leader).unwrap();
        running.into_iter().for_each(|load| drop(perf::stop(load).unwrap().expect_ok("a load on one of the two")));
        [GROUP, CLONE].into_iter().for_each(|volume| self.settle_and_verify(volume));
    }

    /// The clone goes, then what it stood on, and the origin has what was written to it.
    fn go_in_order(&self) {
        self.cluster.refused("snapshot rm v monday", "test is a clone that stands on it");
        self.cluster.refused("volume rm v --force", "test is a clone");
        self.cluster.did("volume rm test --force");
        self.cluster.did("snapshot rm v monday");
        self.settle_and_verify(GROUP);
    }
}

#[test]
fn clone_of_three_replicas_is_where_they_are_and_is_written_beside_them_though_leaders_die() {
    let mut dice = dice("clones of a group");
    let mut both = Both::new(3, "3", &mut dice);
    both.written_while_a_leader_dies(&mut dice);
    both.cluster.refused("replica replace v n1", "its clone test stands on it");
    both.go_in_order();
}

#[test]
fn clone_of_two_replicas_and_a_log_is_written_beside_them_though_a_leader_dies_and_the_log_is_made_anew() {
    let mut dice = dice("clones of a group with a log");
    let mut both = Both::new(3, "2+log", &mut dice);
    let log = |both: &Both, volume: &str| {
        let replicas = both.cluster.volume(volume).unwrap().replicas;
        replicas.into_iter().find(|replica| replica.log_only).expect("one keeps the log alone").node
    };
    assert_eq!(log(&both, CLONE), log(&both, GROUP));
    both.written_while_a_leader_dies(&mut dice);
    // What keeps the log alone stands on nothing.
    both.cluster.did(&format!("replica replace v {}", log(&both, GROUP)));
    both.go_in_order();
}

#[test]
fn replica_of_a_clone_that_moves_has_all_of_it_where_its_origin_is_not_and_what_it_stood_on_may_move_too() {
    let mut dice = dice("replica of a clone moved");
    let both = Both::new(4, "3", &mut dice);
    let before = both.cluster.nodes_of(CLONE).unwrap();
    let (from, to) = (before[dice.below(3) as usize], (1..=4).find(|at| !before.contains(at)).unwrap());
    let after: Vec<usize> = (1..=4).filter(|at| *at != from).collect();

    let mut running = both.load(CLONE, dice.roll());
    both.written(&[CLONE]);
    // The origin's goes first, and is kept on its old node for the clone's.
    both.cluster.did(&format!("replica move v n{from} n{to}"));
    both.cluster.arrive_on(GROUP, &[1, 2, 3, 4]).unwrap();
    let kept = both.cluster.did("replica ls v").out;
    assert!(kept.contains("its clone test stands on it there"), "{kept}");
    both.cluster.did(&format!("replica move test n{from} n{to}"));
    running.interrupt().unwrap();
    let stays = before.into_iter().find(|at| *at != from).unwrap();
    both.cluster.finish_while_led_by(CLONE, stays, running).expect_ok("a load while a replica of the clone moves");
    both.cluster.arrive_on(GROUP, &after).unwrap();
    both.cluster.arrive_on(CLONE, &after).unwrap();
    both.settle_and_verify(CLONE);
    let stands = |replica: &ReplicaView| replica.observed.as_ref().is_some_and(|seen| seen.origin.is_some());
    let flat: Vec<String> =
        both.cluster.volume(CLONE).unwrap().replicas.iter().filter(|one| !stands(one)).map(|one| one.node.clone()).collect();
    assert_eq!(flat, [format!("n{to}")]);
    both.go_in_order();
}

#[test]
fn clones_whose_origin_was_on_memory_are_said_to_be_lost_with_it_and_what_to_do() {
    let mut house = House::new().unwrap();
    house.did("pool add malloc:m0?size=128MiB --volatile --oplog 8MiB");
    house.add_volume("v", "8MiB", 512);
    house.did("snapshot create v monday");
    house.did("volume create test --from v@monday");
    house.did("snapshot create test mine");
    house.did("volume create deep --from test@mine");
    exported(&house, "deep");
    house.kill_node().unwrap();
    house.start_node().unwrap();

    let lost = |volume: &str| {
        let said = wait_for("the loss to show", LIMIT, || {
            let said = house.cli(&format!("volume show {volume}"))?.out;
            Ok(said.contains("it stood on snapshot monday of volume v, which is not there any more").then_some(said))
        });
        let said = said.unwrap();
        assert!(said.contains("refused: its data is lost"), "{said}");
        assert!(said.contains(&format!("hint: `penstock volume rm {volume} --force` gives it up")), "{said}");
    };
    lost("test");
    lost("deep");
    let listed = house.did("volume ls").out;
    assert!(listed.contains("refused: its data is lost") && listed.contains("hint: `penstock volume rm deep --force`"), "{listed}");
    assert!(house.did("snapshot ls v").out.contains("hint: "), "of the snapshot too");
    // What is said helps.
    house.did("volume rm deep --force");
    house.did("volume rm test --force");
    house.did("snapshot rm v monday");
    house.did("snapshot create v tuesday");
    house.did("volume create test --from v@tuesday");
    house.settle().unwrap();
}
