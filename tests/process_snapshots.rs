//! Snapshots by the command penstock, of volumes that hosts write to, of one replica and of three: what they keep takes space, removing them gives it
//! back, they last through kills and changes of leader, and drives tell of them. Not here: what a snapshot holds, which hosts read by
//! clones (process_clones).

use penstock::guest::wait::wait_for;
use penstock::process::cluster::{Cluster, VOLUME as GROUP};
use penstock::process::dice;
use penstock::process::house::{House, LIMIT};
use penstock::process::ledger::{End, Ledger};
use penstock::process::perf::{self, LASTING};
use penstock_api::http::SnapshotView;
use penstock_api::rpc::{Drain, DrainParams};
use std::time::Duration;

const VOLUME: u64 = 8 << 20;

fn write(ledger: &mut Ledger, house: &House) {
    let door = house.wait_for_door("v").unwrap();
    let (_, ends, _) = ledger.work_while(door.address, &door.nqn, |_| std::thread::sleep(Duration::from_millis(400))).unwrap();
    assert!(ends.iter().all(|end| *end == End::Told), "{ends:?}");
}

fn allocated(house: &House) -> u64 {
    house.rpc::<Drain>(&DrainParams::default()).unwrap();
    house.volume("v").unwrap().allocated_bytes.0
}

fn snapshots(house: &House) -> Vec<SnapshotView> {
    serde_json::from_value(house.asked("snapshot ls v")).unwrap()
}

#[test]
fn snapshots_take_what_is_overwritten_give_it_back_and_last_through_kills() {
    let mut dice = dice("snapshots");
    let mut house = House::new().unwrap();
    house.add_drive("d0", "128MiB", "--oplog 8MiB");
    house.add_volume("v", "8MiB", 512);
    let mut ledger = Ledger::new(dice.roll(), VOLUME);
    write(&mut ledger, &house);
    let before = allocated(&house);

    house.did("snapshot create v monday");
    assert_eq!(allocated(&house), before, "a snapshot takes nothing by itself");
    write(&mut ledger, &house);
    house.did("snapshot create v tuesday");
    write(&mut ledger, &house);
    let grown = allocated(&house);
    assert!(grown > before, "{grown} bytes after overwrites, {before} before");
    let names = |house: &House| -> Vec<String> { snapshots(house).iter().map(|known| known.name.to_string()).collect() };
    assert_eq!(names(&house), ["monday", "tuesday"]);
    let shown = snapshots(&house);
    assert!(shown.iter().all(|known| known.progress.is_settled()), "{shown:?}");
    let index = |at: usize| shown[at].observed.as_ref().unwrap().index;
    assert!(index(0) < index(1), "{shown:?}");

    let again = house.refused("snapshot create v monday");
    assert!(again.contains("exists already"), "{again}");
    house.did("volume unexport v");
    let refused = house.refused("volume rm v");
    assert!(refused.contains("2 in all"), "{refused}");
    house.did(&format!("volume export v --nvmf=127.0.0.1:{}", house.port()));

    house.kill_control().unwrap();
    house.kill_node().unwrap();
    house.start_node().unwrap();
    house.start_control().unwrap();
    let door = house.wait_for_door("v").unwrap();
    ledger.expect_good(door.address, &door.nqn).unwrap();
    assert_eq!(names(&house), ["monday", "tuesday"]);

    house.did("snapshot rm v monday");
    assert_eq!(names(&house), ["tuesday"]);
    house.did("snapshot rm v tuesday");
    assert!(snapshots(&house).is_empty());
    wait_for("the space of removed snapshots", LIMIT, || Ok((allocated(&house) <= before.max(VOLUME)).then_some(()))).unwrap();
    ledger.expect_good(door.address, &door.nqn).unwrap();
    house.settle().unwrap();
}

/// What the replicas say, each for itself, in the order of the nodes.
fn at_each(cluster: &Cluster) -> Vec<Vec<String>> {
    let volume = cluster.volume(GROUP).unwrap();
    let names = |of: &penstock_api::rpc::VolumeInfo| of.snapshots.iter().map(|seen| seen.name.to_string()).collect();
    volume.replicas.iter().filter_map(|replica| replica.observed.as_ref()).map(names).collect()
}

fn listed(cluster: &Cluster) -> Vec<(String, bool)> {
    let known = cluster.volume(GROUP).unwrap().snapshots;
    known.iter().map(|known| (known.name.to_string(), known.progress.is_settled() && known.observed.is_some())).collect()
}

#[test]
fn snapshots_of_three_replicas_are_the_same_everywhere_though_the_leader_dies_and_control_forgets() {
    let mut dice = dice("snapshots of a group");
    let mut cluster = Cluster::with_volume(3, "32MiB").unwrap();
    let first = cluster.wait_for_leader_but(GROUP, 0).unwrap();
    let journal = cluster.path("journal");
    let load = format!("--mix 20:70:10 --depth 8 --rate 1000 {LASTING} --seed {}", dice.roll());
    let running = perf::start_run_over(&cluster.doors(GROUP).unwrap(), &journal, &load).unwrap();
    cluster.did("snapshot create v monday");
    cluster.kill(first).unwrap();
    cluster.wait_for_leader_but(GROUP, first).unwrap();
    cluster.did("snapshot create v tuesday");
    assert_eq!(listed(&cluster), [("monday".to_owned(), true), ("tuesday".to_owned(), true)]);
    cluster.did("snapshot rm v monday");
    cluster.start(first).unwrap();
    perf::stop(running).unwrap().expect_ok("a load over snapshots");
    cluster.settle(GROUP).unwrap();
    assert_eq!(at_each(&cluster), [["tuesday"], ["tuesday"], ["tuesday"]]);

    // Nobody leads: it is taken in, and taken when somebody does.
    let nodes = cluster.nodes_of(GROUP).unwrap();
    nodes[..2].iter().for_each(|at| cluster.kill(*at).unwrap());
    let waits = cluster.commands().run("snapshot create v wednesday --timeout 1").unwrap();
    assert_eq!(waits.code, Some(4), "{}", waits.said());
    cluster.kill_control().unwrap();
    nodes[..2].iter().for_each(|at| cluster.start(*at).unwrap());
    cluster.start_control().unwrap();
    cluster.settle(GROUP).unwrap();
    assert_eq!(listed(&cluster), [("tuesday".to_owned(), true), ("wednesday".to_owned(), true)]);
    cluster.verify(GROUP, &journal).unwrap();

    cluster.kill_control().unwrap();
    std::fs::remove_dir_all(cluster.path("control")).unwrap();
    cluster.start_control().unwrap();
    cluster.did("pool import");
    cluster.settle(GROUP).unwrap();
    assert_eq!(listed(&cluster), [("tuesday".to_owned(), true), ("wednesday".to_owned(), true)]);
    cluster.did("snapshot rm v tuesday");
    cluster.did("snapshot rm v wednesday");
    cluster.settle(GROUP).unwrap();
    assert_eq!(at_each(&cluster), [[""; 0]; 3]);
    cluster.verify(GROUP, &journal).unwrap();
}
