//! A majority is lost for good: what is left goes on alone, and the lost ones are heard no more.

use super::cluster::{Cluster, is_append};
use crate::bench::{SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::peer::{Member, MemberNo, Role};
use penstock_wire::*;

/// Gives the order, and its answer when there is one.
fn recover(cluster: &mut Cluster, at: usize, regardless: bool) -> Result<Receipt, OrderError> {
    let id = begin(cluster, at, regardless);
    for _ in 0..500 {
        cluster.pass(10);
        if let Some(result) = cluster.nodes[at].orders.get(&id) {
            return result.clone().map(|()| receipt(cluster, at));
        }
    }
    panic!("the order is not answered in five seconds");
}

fn begin(cluster: &mut Cluster, at: usize, regardless: bool) -> u64 {
    let node = &mut cluster.nodes[at];
    let id = node.orders.len() as u64 + 1;
    let order = Order::Recover { segment: SEGMENT, regardless };
    node.store.apply(Event::Order { id: OrderId(id), order }, &mut node.mem, &mut node.fx);
    id
}

fn receipt(cluster: &Cluster, at: usize) -> Receipt {
    let newest = cluster.nodes[at].notices.iter().rev().find_map(|notice| match notice {
        Notice::Recovered { receipt, .. } => Some((**receipt).clone()),
        _ => None,
    });
    newest.expect("a receipt comes before the answer")
}

fn is_alone(cluster: &Cluster, at: usize) -> bool {
    cluster.view(at).members.list.iter().map(|member| member.no.0).eq([at as u64 + 1])
}

/// Three members, a write that all have, and member `at` alone left.
fn left(at: usize) -> Cluster {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
    cluster.agree();
    (0..3).filter(|other| *other != at).for_each(|other| cluster.kill(other));
    cluster
}

#[test]
fn member_that_is_left_goes_on_alone_and_after_restarts_too() {
    let mut cluster = left(1);
    let before = cluster.view(1);
    let receipt = recover(&mut cluster, 1, false).unwrap();
    assert_eq!((receipt.me, receipt.members.clone(), receipt.heard.len()), (MemberNo(2), before.members.clone(), 0));
    assert_eq!((receipt.last.index, receipt.floor, receipt.whole_as_of, receipt.stopped), (before.applied, None, None, None));
    assert_eq!(receipt.committed, before.applied);
    assert!(receipt.new_term > receipt.term);
    for life in 1..4 {
        assert_eq!(cluster.leader(), 1);
        assert!(is_alone(&cluster, 1) && cluster.standing(1).term >= receipt.new_term);
        assert_eq!(cluster.read(1, 0, BLOCK as u64), pattern(life, BLOCK));
        assert_eq!(cluster.write(1, 0, &pattern(life + 1, BLOCK)), Status::Ok);
        if life == 2 {
            assert_eq!(cluster.order(1, Order::Drain), Ok(()));
        }
        cluster.restart(1);
    }
    cluster.leader();
    assert_eq!(recover(&mut cluster, 1, false).map(|receipt| receipt.members.list.len()), Ok(1), "ordered again");
}

#[test]
fn lost_members_that_come_back_are_stopped_and_the_one_that_was_left_takes_new_ones() {
    let mut cluster = left(0);
    recover(&mut cluster, 0, false).unwrap();
    assert_eq!(cluster.leader(), 0);
    assert_eq!(cluster.write(0, 0, &pattern(2, BLOCK)), Status::Ok);
    for lost in [1, 2] {
        cluster.restart(lost);
        cluster.pass(200);
        let why = cluster.view(lost).stopped.unwrap_or_else(|| panic!("member {lost} goes on"));
        assert!(why.contains("removed"), "{why}");
        assert!(!cluster.view(lost).admitted && !cluster.standing(lost).serves);
    }
    cluster.pass(2000);
    [1, 2].into_iter().for_each(|lost| cluster.kill(lost));
    assert_eq!(cluster.leader(), 0);
    assert_eq!(cluster.read(0, 0, BLOCK as u64), pattern(2, BLOCK));
    let mut members = cluster.view(0).members;
    members.list.push(Member { no: MemberNo(5), role: Role::Learner, replica: ReplicaId([9; 16]), node: NodeId([2; 16]) });
    members.next = MemberNo(6);
    assert_eq!(cluster.order(0, Order::Change { segment: SEGMENT, members: Box::new(members) }), Ok(()));
}

#[test]
fn members_that_were_cut_off_meanwhile_are_stopped_when_they_are_heard() {
    let mut cluster = Cluster::new(3);
    cluster.leader();
    cluster.agree();
    cluster.isolate(2);
    recover(&mut cluster, 2, false).unwrap();
    cluster.pass(500);
    let other = (0..2).find(|at| cluster.standing(*at).serves).expect("they are a quorum, and know nothing of it");
    assert!(cluster.standing(2).serves);
    cluster.cut.clear();
    assert_eq!(cluster.write(other, 0, &pattern(2, BLOCK)), Status::Ok);
    cluster.pass(2000);
    assert!((0..2).all(|at| cluster.view(at).stopped.is_some()));
    assert!(cluster.standing(2).serves);
}

#[test]
fn what_the_lost_ones_alone_had_is_lost_and_the_receipt_says_from_where() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
    cluster.agree();
    let sure = cluster.applied(leader);
    // The one that will be left hears of nothing more, and has a write of its own that nobody took.
    cluster.isolate(leader);
    cluster.begin(leader, HostOp::Write(Span { offset: 4 * BLOCK as u64, len: BLOCK as u64 }), pattern(3, BLOCK));
    cluster.pass(1000);
    let other = (0..3).find(|at| *at != leader && cluster.standing(*at).serves).expect("two of three");
    assert_eq!(cluster.write(other, 0, &pattern(2, BLOCK)), Status::Ok);
    (0..3).filter(|other| *other != leader).for_each(|other| cluster.kill(other));
    let receipt = recover(&mut cluster, leader, false).unwrap();
    assert_eq!((receipt.committed.0, receipt.last.index.0), (sure, sure + 1));
    cluster.leader();
    assert_eq!(cluster.read(leader, 0, BLOCK as u64), pattern(1, BLOCK));
    assert_eq!(cluster.read(leader, 4 * BLOCK as u64, BLOCK as u64), pattern(3, BLOCK), "what its log has is kept");
}

#[test]
fn recovery_is_refused_while_a_quorum_answers_and_changes_nothing() {
    let mut cluster = left(0);
    cluster.restart(1);
    let refused = recover(&mut cluster, 0, true);
    assert_eq!(refused, Err(OrderError::QuorumHeard { heard: vec![MemberNo(2)], quorum: 2 }));
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    assert!([0, 1].iter().all(|at| cluster.view(*at).members.list.len() == 3));
}

#[test]
fn recovery_at_a_member_whose_drive_is_an_older_copy_is_refused_unless_told_again() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
    cluster.agree();
    let media = cluster.nodes[2].media.clone();
    cluster.restart(2);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    cluster.agree();
    cluster.kill(2);
    cluster.nodes[2].media = media;
    for found_out in [false, true] {
        if !found_out {
            cluster.isolate(2);
        }
        cluster.restart(2);
        cluster.pass(500);
        assert_eq!(cluster.view(2).stopped.is_some(), found_out);
        assert!(matches!(recover(&mut cluster, 2, false), Err(OrderError::Unsound(_))), "found out: {found_out}");
        cluster.cut.clear();
    }
    // The two others are a quorum.
    assert!(matches!(recover(&mut cluster, 2, true), Err(OrderError::QuorumHeard { .. })));
    (0..2).for_each(|at| cluster.kill(at));
    let receipt = recover(&mut cluster, 2, true).unwrap();
    assert!(receipt.stopped.is_some_and(|why| why.contains("older copy")));
    for _ in 0..2 {
        assert_eq!(cluster.leader(), 2);
        assert_eq!(cluster.read(2, 0, BLOCK as u64), pattern(1, BLOCK));
        cluster.restart(2);
    }
}

#[test]
fn change_of_members_that_was_never_committed_changes_nothing_after_the_recovery() {
    let mut cluster = Cluster::new(3);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
    cluster.agree();
    cluster.lose = is_append;
    let mut members = cluster.view(leader).members;
    members.list.retain(|member| member.no.0 != (leader as u64 + 1) % 3 + 1);
    let node = &mut cluster.nodes[leader];
    let order = Order::Change { segment: SEGMENT, members: Box::new(members) };
    node.store.apply(Event::Order { id: OrderId(99), order }, &mut node.mem, &mut node.fx);
    cluster.run();
    let last = cluster.view(leader).group.unwrap().last;
    (0..3).filter(|other| *other != leader).for_each(|other| cluster.kill(other));
    let receipt = recover(&mut cluster, leader, false).unwrap();
    assert_eq!((receipt.last.index, receipt.members.next), (last, MemberNo(4)));
    assert!(receipt.committed < last);
    for life in 0..3 {
        cluster.leader();
        assert!(is_alone(&cluster, leader) && cluster.applied(leader) > last.0, "life {life}");
        if life == 1 {
            assert_eq!(cluster.order(leader, Order::Drain), Ok(()));
        }
        cluster.restart(leader);
    }
}

#[test]
fn crash_at_any_turn_of_a_recovery_leaves_the_group_or_the_one_that_is_left() {
    let (mut before, mut unanswered, mut after) = (0, 0, 0);
    for turns in 0..40 {
        let mut cluster = left(1);
        let id = begin(&mut cluster, 1, false);
        cluster.pass(1990);
        cluster.nodes[1].pass(20);
        for _ in 0..turns {
            cluster.nodes[1].turns(1);
        }
        let answered = cluster.nodes[1].orders.contains_key(&id);
        cluster.restart(1);
        let alone = is_alone(&cluster, 1);
        assert!(alone || !answered, "it was answered after {turns} turns, and is not so any more");
        before += usize::from(!alone);
        unanswered += usize::from(alone && !answered);
        after += usize::from(answered);
        if !alone {
            // As if nothing had been ordered; or it is ordered again.
            if turns % 2 == 0 {
                recover(&mut cluster, 1, false).unwrap();
            } else {
                [0, 2].into_iter().for_each(|other| cluster.restart(other));
            }
        }
        let leader = cluster.leader();
        assert_eq!(cluster.read(leader, 0, BLOCK as u64), pattern(1, BLOCK), "{turns} turns");
        assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    }
    assert!(before > 0 && unanswered > 0 && after > 0, "{before} crashes came before, {unanswered} before the answer, {after} after");
}
