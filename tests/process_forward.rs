//! Doors with one path by nature on nodes that do not lead: what their hosts ask for is carried out by whoever does, once, and none of them sees a
//! leader come or go. Not here: QEMU (guest tests), and the order in which a node sends what it holds (penstock-node's own tests).

use penstock::guest::wait::wait_for;
use penstock::process::dice;
use penstock::process::fleet::{Fleet, Plan};
use penstock::process::house::LIMIT;
use penstock::process::perf::{self, LASTING, PerfTarget};
use penstock_api::ByteSize;
use penstock_api::rpc::Door;
use std::path::Path;
use std::time::Duration;

/// Writes that the volume's members have carried out, as the one counts that has most.
fn written(fleet: &Fleet) -> u64 {
    (0..fleet.len()).filter_map(|at| fleet.volume(at).ok()).map(|volume| volume.counters.writes).max().unwrap_or(0)
}

/// A fleet, a node of it that a guest can reach, and the one that leads.
fn led_elsewhere() -> (Fleet, usize, usize) {
    // Alone on its core.
    let home = 1;
    let fleet = Fleet::new(Plan { oplog: ByteSize::mib(64), spins: Some(home), ..Plan::default() }).unwrap();
    fleet.wait_for_leader().unwrap();
    fleet.transfer(0).unwrap();
    (fleet, home, 0)
}

#[test]
fn vfio_user_host_of_a_node_that_does_not_lead_sees_no_error_while_leaders_die_and_change() {
    let mut dice = dice("forwarded load");
    let (mut fleet, home, first) = led_elsewhere();
    let door = fleet.open(home, Door::VfioUser { name: None }).unwrap();
    let target = PerfTarget(format!("vfio-user:{door}"));
    let journal = fleet.path("journal");
    let load = format!("--mix 20:70:10 --depth 8 --rate 600 {LASTING} --seed {}", dice.roll());
    let running = perf::start_run(&target, &journal, &load).unwrap();
    let under_way = |fleet: &Fleet, more: u64| {
        let before = written(fleet);
        wait_for("the load to go on", LIMIT, || Ok((written(fleet) > before + more).then_some(())))
            .unwrap_or_else(|e| panic!("{e}\n{}", fleet.last_words()));
    };
    under_way(&fleet, 200);
    std::thread::sleep(Duration::from_millis(dice.below(300)));

    fleet.kill(first).unwrap();
    let second = wait_for("another leader", LIMIT, || Ok(fleet.leader().filter(|at| *at != first))).unwrap();
    println!("node {} led and was killed, node {} leads, the door is node {}'s", first + 1, second + 1, home + 1);
    under_way(&fleet, 100);
    fleet.start(first).unwrap();
    fleet.wait_for_leader().unwrap();
    // Carried out here, there, and here again.
    for to in [home, first, home, 2] {
        fleet.transfer(to).unwrap();
        under_way(&fleet, 50);
    }
    let outcome = perf::stop(running).unwrap().expect_ok("a load of a door whose node does not lead");
    println!("{}", outcome.out);
    fleet.wait_until_equal().unwrap();
    let (is_good, report) = perf::verify(&target, &journal).unwrap();
    assert!(is_good, "through the same door: {report:#}");
    (0..3).for_each(|at| verify_at(&fleet, at, &journal));
}

/// Every block as one node leads it. No block may be wrong; what cannot be read is read again where, and only where, the node led no more by the end.
fn verify_at(fleet: &Fleet, at: usize, journal: &Path) {
    let whole = wait_for("a node to lead as long as all is read", LIMIT, || {
        fleet.transfer(at)?;
        let began = fleet.group(at).map(|group| (group.term, group.serves));
        let (is_good, report) = perf::verify(&fleet.doors()[at].perf_target(), journal)?;
        let ended = fleet.group(at).map(|group| (group.term, group.serves));
        assert_eq!(report["bad"]["count"], 0, "at node {}: {report:#}", at + 1);
        assert!(is_good || began != ended, "node {} led all the time, and yet: {report:#}\n{}", at + 1, fleet.last_words());
        Ok(is_good.then_some(()))
    });
    whole.unwrap_or_else(|e| panic!("{e}\n{}", fleet.last_words()));
}

#[test]
fn node_whose_guest_waits_for_a_leader_stops_when_it_is_told_to() {
    let (mut fleet, home, _) = led_elsewhere();
    let door = fleet.open(home, Door::VfioUser { name: None }).unwrap();
    let journal = fleet.path("journal");
    let target = PerfTarget(format!("vfio-user:{door}"));
    let running = perf::start_run(&target, &journal, &format!("--mix 0:100:0 --depth 4 --rate 200 {LASTING} --seed 7")).unwrap();
    let before = written(&fleet);
    wait_for("the load to be under way", LIMIT, || Ok((written(&fleet) > before + 50).then_some(()))).unwrap();
    // Nobody leads, and nobody can.
    for at in (0..3).filter(|at| *at != home) {
        fleet.kill(at).unwrap();
    }
    std::thread::sleep(Duration::from_secs(1));
    fleet.stop(home).unwrap();
    assert!(!fleet.last_words().contains("stopping takes too long"), "{}", fleet.last_words());
    drop(running);
}
