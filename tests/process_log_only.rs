//! Two replicas with data and one that keeps the log alone, through control and the command penstock: writes go on without either of the two, the log
//! takes no space, and what keeps it is replaced like any other. Not here: how it brings the others up (the engine's tests, the simulator).

use penstock::guest::wait::wait_for;
use penstock::process::cluster::{Cluster, VOLUME};
use penstock::process::dice;
use penstock::process::house::LIMIT;
use penstock::process::perf::{self, LASTING};
use penstock_api::rpc::GroupPart;

/// The node whose replica keeps the log alone, and the two with data, the one that leads first.
fn nodes(cluster: &Cluster) -> (usize, [usize; 2]) {
    let leader = cluster.wait_for_leader_but(VOLUME, 0).unwrap();
    let data = cluster.data_nodes_of(VOLUME).unwrap();
    let log = cluster.nodes_of(VOLUME).unwrap().into_iter().find(|at| !data.contains(at)).unwrap();
    let other = data.iter().copied().find(|at| *at != leader).unwrap();
    (log, [leader, other])
}

#[test]
fn data_replicas_killed_in_turn_then_writes_go_on_with_the_log_and_its_keeper_is_replaced() {
    let mut dice = dice("log-only replica");
    let mut cluster = Cluster::with_volume_of(3, "32MiB", "2+log").unwrap();
    cluster.refused("volume create other --size 32MiB --replicas 3+log", "2+log");
    let (log, [leader, other]) = nodes(&cluster);
    let shown = cluster.did("volume show v").out;
    assert!(shown.contains("log-only") && shown.contains("any 1 more"), "{shown}");
    cluster.refused(&format!("volume transfer v --to n{log}"), "keeps the log alone");

    let journal = cluster.path("journal");
    let doors = cluster.doors_on(VOLUME, &[leader, other]).unwrap();
    let load = format!("--mix 20:70:10 --depth 8 --rate 1000 {LASTING} --seed {}", dice.roll());
    let running = perf::start_run_over(&doors, &journal, &load).unwrap();
    wait_for("the load to be under way", LIMIT, || Ok((cluster.answered(VOLUME).unwrap() > 300).then_some(()))).unwrap();
    cluster.kill(leader).unwrap();
    assert_eq!(cluster.wait_for_leader_but(VOLUME, leader).unwrap(), other);
    let before = cluster.answered(VOLUME).unwrap();
    wait_for("writes with the log and one replica", LIMIT, || Ok((cluster.answered(VOLUME).unwrap() > before + 300).then_some(())))
        .unwrap();
    let shown = cluster.did("volume show v").out;
    assert!(shown.contains("none more"), "{shown}");
    cluster.start(leader).unwrap();
    perf::stop(running).unwrap().expect_ok("a load without the leader");
    cluster.settle(VOLUME).unwrap();
    cluster.verify(VOLUME, &journal).unwrap();
    // Stores that nobody writes to drain.
    let takes = |at: usize| {
        let volume = cluster.volume(VOLUME).unwrap();
        let replica = volume.replicas.iter().find(|replica| replica.node == format!("n{at}")).unwrap();
        replica.observed.as_ref().unwrap().allocated_bytes.0
    };
    wait_for("data replicas to drain", LIMIT, || Ok((takes(leader) > 0 && takes(other) > 0).then_some(()))).unwrap();
    assert_eq!(takes(log), 0);

    // Its drive is lost; a new one takes its place there.
    let image = cluster.path(&format!("n{log}.img"));
    cluster.kill(log).unwrap();
    std::fs::remove_file(&image).unwrap();
    cluster.start(log).unwrap();
    cluster.did(&format!("pool rm file:{} --force", image.display()));
    cluster.did(&format!("pool add file:{}?size=512MiB --node n{log} --oplog 128MiB", image.display()));
    cluster.did(&format!("replica replace v n{log}"));
    cluster.settle(VOLUME).unwrap();
    assert_eq!(cluster.data_nodes_of(VOLUME).unwrap().len(), 2);
    // It counts: the other data replica goes, and then everything is still there.
    let (_, [leader, other]) = nodes(&cluster);
    cluster.kill(other).unwrap();
    let alone = cluster.doors_on(VOLUME, &[leader]).unwrap();
    let more = format!("--mix 0:100:0 --depth 8 --operations 3000 --no-final-pass --resume --seed {}", dice.roll());
    perf::finish(perf::start_run_over(&alone, &journal, &more).unwrap()).unwrap().expect_ok("a load with the new log");
    cluster.start(other).unwrap();
    cluster.settle(VOLUME).unwrap();
    cluster.verify(VOLUME, &journal).unwrap();
    cluster.wait_for_part(VOLUME, log, GroupPart::Follower).unwrap();
}
