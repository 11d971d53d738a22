//! Replicas that move to another node and that are replaced where their drive was lost, by the command penstock, while hosts write and control is
//! killed in the middle. Not here: leaders killed under load (process_replicas), what control plans (control/model).

use penstock::guest::wait::wait_for;
use penstock::process::cluster::Cluster;
use penstock::process::dice;
use penstock::process::house::LIMIT;
use penstock::process::perf;
use penstock_api::http::VolumeView;

const NAME: &str = "v";

fn nodes_of(volume: &VolumeView) -> Vec<usize> {
    let mut nodes: Vec<usize> = volume.replicas.iter().map(|replica| replica.node[1..].parse().unwrap()).collect();
    nodes.sort_unstable();
    nodes
}

fn wait_until_on(cluster: &Cluster, nodes: &[usize]) {
    let mut last = String::new();
    let arrived = wait_for("the replicas to be where they are to be", LIMIT, || {
        let volume = cluster.volume(NAME)?;
        last = format!("{:?} {:?}", volume.change, volume.replicas);
        Ok((volume.change.is_none() && nodes_of(&volume) == nodes).then_some(()))
    });
    arrived.unwrap_or_else(|e| panic!("{e}\n{last}\n{}", cluster.last_words()));
    cluster.settle(NAME).unwrap();
}

/// Reads what the journal promises from each replica in turn, which has to lead for it.
fn verify(cluster: &Cluster, nodes: &[usize], journal: &std::path::Path) {
    let doors = cluster.doors(NAME).unwrap();
    for &at in nodes {
        // Refused for a moment, as long as the leader has not heard that a member is whole.
        let led = wait_for("the transfer", LIMIT, || {
            Ok((cluster.commands().run(&format!("volume transfer {NAME} --to n{at}"))?.code == Some(0)).then_some(()))
        });
        led.unwrap_or_else(|e| panic!("{e}\n{}", cluster.last_words()));
        let (is_good, report) = perf::verify_over(&doors[at - 1..at], journal).unwrap();
        assert!(is_good, "on n{at}: {report:#}");
        println!("n{at}: {report}");
    }
}

#[test]
fn leading_replica_moved_under_load_loses_nothing_though_control_is_killed() {
    let mut dice = dice("replica moved");
    let mut cluster = Cluster::new(4, "512MiB").unwrap();
    cluster.did("volume create v --size 64MiB --replicas 3");
    cluster.did("volume export v --nvmf");
    let from = cluster.wait_for_leader_but(NAME, 0).unwrap();
    cluster.settle(NAME).unwrap();
    let before = nodes_of(&cluster.volume(NAME).unwrap());
    let to = (1..=4).find(|at| !before.contains(at)).unwrap();
    let mut after: Vec<usize> = before.iter().copied().filter(|at| *at != from).chain([to]).collect();
    after.sort_unstable();

    let doors: Vec<_> = before.iter().map(|at| cluster.doors(NAME).unwrap()[at - 1].clone()).collect();
    let journal = cluster.path("journal");
    let load = format!("--mix 20:70:10 --depth 8 --rate 1000 --duration 12s --no-final-pass --seed {}", dice.roll());
    let running = perf::start_run_over(&doors, &journal, &load).unwrap();
    let taken = cluster.commands().run(&format!("replica move v n{from} n{to} --timeout 0")).unwrap();
    assert!(matches!(taken.code, Some(0 | 4)), "{taken:?}");
    let second = cluster.commands().run(&format!("replica move v n{} n{to}", before.iter().find(|at| **at != from).unwrap())).unwrap();
    if cluster.volume(NAME).unwrap().change.is_some() {
        assert!(second.code == Some(1) && second.err.contains("give-up"), "one at a time, and what to do: {second:?}");
    }
    std::thread::sleep(std::time::Duration::from_millis(dice.below(600)));
    cluster.kill_control().unwrap();
    cluster.start_control().unwrap();
    wait_until_on(&cluster, &after);

    let outcome = perf::finish(running).unwrap().expect_ok("a load while the leader moves");
    println!("{}", outcome.out);
    cluster.settle(NAME).unwrap();
    verify(&cluster, &after, &journal);
    let said = cluster.did(&format!("replica ls {NAME}")).out;
    assert!(said.contains("leader") && !said.contains("removing"), "{said}");
    let again = cluster.commands().run(&format!("replica move v n{from} n{to}")).unwrap();
    assert!(again.code == Some(1) && again.err.contains("no replica on node"), "{again:?}");
}

#[test]
fn replica_whose_file_was_deleted_is_replaced_elsewhere_and_then_on_its_own_node() {
    let mut dice = dice("replica replaced");
    let mut cluster = Cluster::new(4, "512MiB").unwrap();
    cluster.did("volume create v --size 64MiB --replicas 3");
    cluster.did("volume export v --nvmf");
    cluster.wait_for_leader_but(NAME, 0).unwrap();
    cluster.settle(NAME).unwrap();
    let before = nodes_of(&cluster.volume(NAME).unwrap());
    let doors: Vec<_> = before.iter().map(|at| cluster.doors(NAME).unwrap()[at - 1].clone()).collect();
    let journal = cluster.path("journal");
    let load = |more: &str, seed| format!("--mix 20:70:10 --depth 8 --operations 6000 --no-final-pass --seed {seed} {more}");
    perf::finish(perf::start_run_over(&doors, &journal, &load("", dice.roll())).unwrap()).unwrap().expect_ok("a first load");

    // The file goes while its node is down.
    let (lost, fresh) = (before[0], (1..=4).find(|at| !before.contains(at)).unwrap());
    let image = cluster.path(&format!("n{lost}.img"));
    cluster.kill(lost).unwrap();
    std::fs::remove_file(&image).unwrap();
    cluster.start(lost).unwrap();
    cluster.wait_for_leader_but(NAME, lost).unwrap();
    let running = perf::start_run_over(&doors[1..], &journal, &load("--resume", dice.roll())).unwrap();
    cluster.did(&format!("replica replace v n{lost} --on n{fresh}"));
    perf::finish(running).unwrap().expect_ok("a load while a replica is replaced");
    cluster.did(&format!("pool rm file:{} --force", image.display()));
    let mut after: Vec<usize> = before[1..].iter().copied().chain([fresh]).collect();
    after.sort_unstable();
    wait_until_on(&cluster, &after);
    verify(&cluster, &after, &journal);

    // The next one gets an empty drive in the place of its own, and its replica anew there.
    let lost = after[0];
    let image = cluster.path(&format!("n{lost}.img"));
    cluster.kill(lost).unwrap();
    std::fs::remove_file(&image).unwrap();
    cluster.start(lost).unwrap();
    cluster.wait_for_leader_but(NAME, lost).unwrap();
    cluster.did(&format!("pool rm file:{} --force", image.display()));
    cluster.did(&format!("pool add file:{}?size=512MiB --node n{lost} --oplog 128MiB", image.display()));
    cluster.did(&format!("replica replace v n{lost}"));
    wait_until_on(&cluster, &after);
    verify(&cluster, &after, &journal);
}
