//! Members whose drive is not what it was: wiped, put back from an older copy, made anew. None of them is heard in its group again.

use super::cluster::{Cluster, members, shape};
use crate::bench::{Bench, DRIVE_BLOCKS, SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::*;

/// What a node's drive holds, and the generation that its node has written down.
type Copy = (Vec<u8>, Option<Generation>);

fn copy(cluster: &Cluster, at: usize) -> Copy {
    (cluster.nodes[at].media.clone(), cluster.nodes[at].witness)
}

/// The drive is put back from a copy. Its node remembers how often it opened it, or not.
fn put_back(cluster: &mut Cluster, at: usize, media: Vec<u8>, witness: Option<Generation>) {
    cluster.kill(at);
    cluster.nodes[at].media = media;
    cluster.nodes[at].witness = witness;
    cluster.restart(at);
}

fn stopped(cluster: &Cluster, at: usize) -> Option<String> {
    cluster.view(at).stopped
}

/// It is stopped for this, and the others serve without it.
fn is_out(cluster: &mut Cluster, at: usize, why: &str) {
    cluster.pass(1000);
    let text = stopped(cluster, at).unwrap_or_else(|| panic!("it is not stopped: {:?}", cluster.view(at)));
    assert!(text.contains(why) && text.contains("replace this replica"), "{text}");
    assert!(cluster.nodes[at].sent.iter().all(|(_, word, _)| !matches!(word, PeerWord::Group(_))));
    cluster.up[at] = false;
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(77, BLOCK)), Status::Ok);
    cluster.up[at] = true;
}

/// Three members with some writes; what member `at`'s drive held before it was opened last and took more of them.
fn older(at: usize) -> (Cluster, Copy) {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
    cluster.agree();
    let before = copy(&cluster, at);
    cluster.restart(at);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    cluster.agree();
    (cluster, before)
}

#[test]
fn drive_put_back_from_before_its_last_opening_is_stopped_for_good() {
    let (mut cluster, (media, _)) = older(2);
    let witness = cluster.nodes[2].witness;
    put_back(&mut cluster, 2, media, witness);
    is_out(&mut cluster, 2, "older copy");
    // Even when it comes back with nobody to ask.
    cluster.order(2, Order::Drain).unwrap();
    cluster.isolate(2);
    cluster.restart(2);
    assert!(stopped(&cluster, 2).is_some_and(|why| why.contains("earlier life")));
}

#[test]
fn drive_put_back_whose_node_forgot_is_stopped_by_the_others() {
    for drained in [false, true] {
        let (mut cluster, (media, _)) = older(2);
        if drained {
            // What they recorded outlives the log and themselves.
            for at in [0, 1] {
                cluster.order(at, Order::Drain).unwrap();
            }
            cluster.pass(1000);
        }
        cluster.kill(2);
        for at in [0, 1] {
            cluster.restart(at);
        }
        put_back(&mut cluster, 2, media, None);
        is_out(&mut cluster, 2, "generation");
    }
}

#[test]
fn drive_put_back_is_not_believed_by_the_one_that_missed_its_last_opening() {
    let mut cluster = Cluster::new(3);
    cluster.leader();
    cluster.agree();
    let (media, _) = copy(&cluster, 2);
    // Member 3 is opened again and takes a write while member 2 is away.
    cluster.kill(1);
    cluster.restart(2);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    // Then member 1, which knows, is away.
    cluster.kill(0);
    cluster.kill(2);
    cluster.restart(1);
    put_back(&mut cluster, 2, media, None);
    for _ in 0..300 {
        cluster.pass(10);
        assert!([1, 2].iter().all(|at| !cluster.standing(*at).serves), "the write is lost");
        assert!(!cluster.view(2).admitted);
    }
    cluster.restart(0);
    cluster.pass(1000);
    assert!(stopped(&cluster, 2).is_some_and(|why| why.contains("older copy")));
    cluster.up[2] = false;
    let leader = cluster.leader();
    assert_eq!(cluster.read(leader, 0, BLOCK as u64), pattern(2, BLOCK));
}

#[test]
fn drive_put_back_and_opened_again_and_again_before_anyone_answers_is_stopped() {
    for forgets in [false, true] {
        let (mut cluster, (media, _)) = older(2);
        let witness = cluster.nodes[2].witness.filter(|_| !forgets);
        cluster.isolate(2);
        put_back(&mut cluster, 2, media, witness);
        for _ in 0..5 {
            cluster.pass(100);
            cluster.restart(2);
        }
        cluster.cut.clear();
        cluster.restart(2);
        is_out(&mut cluster, 2, "older copy");
    }
}

#[test]
fn drive_put_back_and_opened_again_is_not_vouched_for_by_the_openings_since() {
    let mut cluster = Cluster::new(3);
    cluster.leader();
    cluster.agree();
    // All that it tells of its log is in the copy.
    cluster.pass(2000);
    let (media, _) = copy(&cluster, 2);
    cluster.kill(1);
    cluster.restart(2);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    cluster.kill(0);
    cluster.kill(2);
    cluster.restart(1);
    let witness = cluster.nodes[2].witness;
    put_back(&mut cluster, 2, media, witness);
    for drained in [false, true] {
        cluster.restart(2);
        cluster.pass(2000);
        assert!(!cluster.view(2).admitted && [1, 2].iter().all(|at| !cluster.standing(*at).serves), "the write is lost");
        if !drained {
            // The checkpoint knows it too.
            cluster.order(2, Order::Drain).unwrap();
        }
    }
}

#[test]
fn drive_put_back_within_its_last_opening_is_stopped_by_the_leader_that_it_acknowledged_to() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    let at = (leader + 1) % 3;
    assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
    cluster.agree();
    let (media, witness) = copy(&cluster, at);
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    cluster.agree();
    put_back(&mut cluster, at, media, witness);
    is_out(&mut cluster, at, "acknowledgement of entry");
}

#[test]
fn drive_put_back_within_its_last_opening_is_stopped_by_those_who_were_told_how_far_it_was() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    let at = (leader + 1) % 3;
    let (media, witness) = copy(&cluster, at);
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    cluster.agree();
    // Told once in a while, as long as something happens; kept by the next checkpoint.
    cluster.pass(1500);
    for other in (0..3).filter(|other| *other != at) {
        assert_eq!(cluster.order(other, Order::Drain), Ok(()));
    }
    (0..3).for_each(|node| cluster.kill(node));
    for other in (0..3).filter(|other| *other != at) {
        cluster.restart(other);
    }
    put_back(&mut cluster, at, media, witness);
    is_out(&mut cluster, at, "generation");
}

#[test]
fn drive_wiped_and_its_replica_made_anew_is_stopped_by_the_others() {
    for lives in [0, 1] {
        let mut cluster = Cluster::new(3);
        let leader = cluster.leader();
        assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
        cluster.agree();
        let at = (leader + 1) % 3;
        cluster.kill(at);
        let no = at as u8 + 1;
        cluster.nodes[at] = Bench::on_drive(no, 33, DRIVE_BLOCKS);
        let order = Order::CreateMember { shape: Box::new(shape(no)), members: Box::new(members(3)) };
        cluster.nodes[at].order(order).unwrap();
        // That its node knows the new drive by then says nothing about the replica.
        (0..lives).for_each(|_| cluster.nodes[at].reopen());
        cluster.restart(at);
        is_out(&mut cluster, at, "wiped");
    }
}

#[test]
fn replica_deleted_and_made_anew_under_its_number_is_stopped_by_the_others() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    cluster.agree();
    let at = (leader + 1) % 3;
    cluster.order(at, Order::Delete { segment: SEGMENT }).unwrap();
    let order = Order::CreateMember { shape: Box::new(shape(at as u8 + 1)), members: Box::new(members(3)) };
    cluster.order(at, order).unwrap();
    is_out(&mut cluster, at, "made anew");
}

#[test]
fn member_that_restarts_with_one_other_alone_takes_part_when_its_node_vouches_and_not_otherwise() {
    for vouched in [true, false] {
        let mut cluster = Cluster::new(3);
        let leader = cluster.leader();
        cluster.agree();
        cluster.kill(leader);
        let at = (leader + 1) % 3;
        if !vouched {
            cluster.nodes[at].witness = None;
        }
        cluster.restart(at);
        cluster.pass(2000);
        assert_eq!(cluster.view(at).admitted, vouched);
        assert_eq!((0..3).any(|at| cluster.up[at] && cluster.standing(at).serves), vouched);
        cluster.restart(leader);
        cluster.leader();
        assert!(cluster.view(at).admitted);
    }
}

#[test]
fn members_that_all_restart_at_once_are_admitted_within_a_tick_or_two() {
    let mut cluster = Cluster::new(3);
    cluster.leader();
    cluster.agree();
    (0..3).for_each(|at| cluster.kill(at));
    (0..3).for_each(|at| cluster.restart(at));
    cluster.pass(20);
    assert!((0..3).all(|at| cluster.view(at).admitted), "{:?}", (0..3).map(|at| cluster.view(at)).collect::<Vec<_>>());
    cluster.leader();
}

#[test]
fn newborn_members_wait_for_a_quorum_of_others() {
    let mut cluster = Cluster::new(3);
    cluster.kill(2);
    cluster.pass(2000);
    assert!([0, 1].iter().all(|at| !cluster.view(*at).admitted && !cluster.standing(*at).serves));
    cluster.up[2] = true;
    cluster.leader();
}

#[test]
fn member_that_was_opened_fenced_in_between_is_still_vouched_for() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    cluster.agree();
    let at = (leader + 1) % 3;
    cluster.kill(at);
    // Nothing is written, so the drive will not know of this opening.
    cluster.nodes[at].reopen_as(Some(FenceReason::Drive));
    cluster.kill(leader);
    cluster.restart(at);
    cluster.pass(2000);
    assert!(cluster.view(at).admitted, "{:?}", cluster.view(at));
    assert!((0..3).any(|at| cluster.up[at] && cluster.standing(at).serves));
}

#[test]
fn opening_that_is_told_after_what_was_acknowledged_in_it_is_believed() {
    fn tells(word: &PeerWord, member: u64) -> bool {
        matches!(word, PeerWord::AdmitAsk(ask) if ask.to.0 == member)
    }
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
    cluster.agree();
    let at = (leader + 1) % 3;
    let late: [fn(&PeerWord) -> bool; 3] = [|word| tells(word, 1), |word| tells(word, 2), |word| tells(word, 3)];
    cluster.hold = late[leader];
    cluster.restart(at);
    cluster.pass(1000);
    assert!(cluster.view(at).admitted, "its node vouches and one other believes it");
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    cluster.agree();
    assert_eq!(cluster.leader(), leader);
    cluster.hold = |_| false;
    cluster.release();
    assert_eq!(stopped(&cluster, at), None);
    // The two go on without the third.
    cluster.pass(2000);
    cluster.kill(3 - leader - at);
    assert_eq!(cluster.write(leader, 0, &pattern(3, BLOCK)), Status::Ok);
    assert_eq!(stopped(&cluster, at), None);
}

#[test]
fn store_that_is_asked_to_record_an_opening_while_it_stops_stops() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
    cluster.agree();
    cluster.hold = |word| matches!(word, PeerWord::AdmitAsk(_));
    cluster.restart(2);
    let asks = std::mem::take(&mut cluster.held);
    assert!(asks.iter().any(|(_, to, ..)| *to == 0));
    for (from, to, word, payload) in asks.into_iter().filter(|(_, to, ..)| *to == 0) {
        cluster.hand_over(from, to, &word, &payload);
    }
    cluster.order(0, Order::Stop).unwrap();
    assert_eq!(cluster.nodes[0].store.view().stage, Stage::Stopped);
}

#[test]
fn store_stops_while_its_own_opening_waits_for_a_seal() {
    for ms in (0..200).step_by(10) {
        let mut cluster = Cluster::new(3);
        cluster.leader();
        cluster.nodes[0].late = 20;
        cluster.restart(0);
        cluster.pass(ms);
        assert_eq!(cluster.order(0, Order::Stop), Ok(()), "{ms} ms after it came back");
        assert_eq!((cluster.nodes[0].store.view().stage, cluster.nodes[0].mem.held()), (Stage::Stopped, 0));
    }
}
