//! A majority that is lost for good, through control and the command penstock: refused while a quorum may answer, explained, done with a receipt, and the
//! volume made whole again. Not here: what a recovery loses and keeps (the engine's tests, the simulator).

use penstock::guest::wait::wait_for;
use penstock::process::cluster::{Cluster, VOLUME};
use penstock::process::dice;
use penstock::process::house::LIMIT;
use penstock::process::perf;
use penstock_api::http::RecoveryView;
use penstock_api::rpc::GroupPart;

fn recovery(cluster: &Cluster, more: &str) -> RecoveryView {
    let out = cluster.did(&format!("-o json replica recover {VOLUME} {more}")).out;
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"))
}

fn refused(cluster: &Cluster, command: &str) -> String {
    let outcome = cluster.commands().run(command).unwrap();
    assert_eq!(outcome.code, Some(1), "penstock {command}: {}", outcome.said());
    outcome.err
}

#[test]
fn majority_lost_for_good_then_one_replica_goes_on_alone_and_the_volume_becomes_whole_again() {
    let mut dice = dice("recover by force");
    let mut cluster = Cluster::with_volume(3, "32MiB").unwrap();
    let doors = cluster.doors(VOLUME).unwrap();
    let journal = cluster.path("journal");
    let load = |more: &str, seed| format!("--mix 20:70:10 --depth 8 --operations 4000 --no-final-pass --seed {seed} {more}");
    perf::finish(perf::start_run_over(&doors, &journal, &load("", dice.roll())).unwrap()).unwrap().expect_ok("a first load");
    cluster.settle(VOLUME).unwrap();
    // Without a leader, which a busy machine may be for a moment, it has its quorum still.
    wait_for("a leader's answer", LIMIT, || {
        let said = refused(&cluster, "replica recover v --force");
        assert!(said.contains("is served") && said.contains("replica replace") || said.contains("has its quorum"), "{said}");
        Ok(said.contains("is served").then_some(()))
    })
    .unwrap();

    // One of three is away: the others are a quorum, whoever leads at the moment.
    let left = 1 + dice.below(3) as usize;
    let lost: Vec<usize> = (1..=3).filter(|at| *at != left).collect();
    cluster.kill(lost[0]).unwrap();
    let said = refused(&cluster, "replica recover v --force");
    assert!(said.contains("is served") || said.contains("has its quorum"), "{said}");
    cluster.kill(lost[1]).unwrap();
    cluster.wait_until_away(&lost).unwrap();
    // The one that is left may have led, and is served for as long as it has not missed the others.
    wait_for("the last leader to step down", LIMIT, || Ok(cluster.leader(VOLUME).is_none().then_some(()))).unwrap();

    let told = cluster.did("replica recover v").out;
    assert!(told.contains("nothing has been done") && told.contains(&format!("replica recover v --on n{left} --force")), "{told}");
    let plan = recovery(&cluster, "");
    assert!(plan.node == format!("n{left}") && plan.receipt.is_none(), "{plan:?}");
    let is_heard = |at: &usize| plan.replicas.iter().any(|one| one.node == format!("n{at}") && one.part.is_some());
    assert!(is_heard(&left) && !lost.iter().any(is_heard), "{plan:?}");
    let said = refused(&cluster, &format!("replica recover v --on n{} --force", lost[0]));
    assert!(said.contains("is not there"), "{said}");

    let done = recovery(&cluster, "--force");
    let receipt = done.receipt.clone().unwrap_or_else(|| panic!("{done:?}"));
    assert!(receipt.members.list.len() == 3 && receipt.heard.is_empty() && receipt.stopped.is_none(), "{receipt:?}");
    assert!(receipt.committed <= receipt.last.index && receipt.new_term > receipt.term, "{receipt:?}");
    assert_eq!(recovery(&cluster, "--force").receipt, Some(receipt), "asked again, the same receipt");
    // All had everything when they were lost.
    let alone = cluster.doors_on(VOLUME, &[left]).unwrap();
    let (is_good, report) = perf::verify_over(&alone, &journal).unwrap();
    assert!(is_good, "{report:#}");
    perf::finish(perf::start_run_over(&alone, &journal, &load("--resume", dice.roll())).unwrap()).unwrap().expect_ok("a load on one");

    // They come back, hear that they were removed, and serve nobody, though they are two of three as they knew it.
    lost.iter().for_each(|at| cluster.start(*at).unwrap());
    for at in &lost {
        cluster.wait_for_part(VOLUME, *at, GroupPart::Stopped).unwrap();
    }
    assert_eq!(cluster.wait_for_leader_but(VOLUME, 0).unwrap(), left);
    for at in &lost {
        cluster.did(&format!("replica replace v n{at}"));
    }
    cluster.settle_on(VOLUME, &[1, 2, 3]).unwrap();
    perf::finish(perf::start_run_over(&doors, &journal, &load("--resume", dice.roll())).unwrap()).unwrap().expect_ok("a load on three");
    cluster.settle(VOLUME).unwrap();
    cluster.verify(VOLUME, &journal).unwrap();
    // And it is a group again that one may leave.
    cluster.kill(left).unwrap();
    cluster.wait_for_leader_but(VOLUME, left).unwrap();
    let rest = cluster.doors_on(VOLUME, &lost).unwrap();
    perf::finish(perf::start_run_over(&rest, &journal, &load("--resume", dice.roll())).unwrap()).unwrap().expect_ok("a load without it");
}
