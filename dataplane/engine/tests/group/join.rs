//! Members that join a group whose members changed before: the log that they are given tells of memberships without them.

use super::cluster::{Cluster, shape};
use crate::bench::{SEGMENT, pattern};
use penstock_engine::*;
use penstock_wire::peer::{Member, MemberNo, Members, Role};
use penstock_wire::*;

pub fn change(cluster: &mut Cluster, leader: usize, step: impl Fn(&mut Members)) -> Members {
    let mut members = cluster.view(leader).members;
    step(&mut members);
    assert_eq!(cluster.order(leader, Order::Change { segment: cluster.nodes[leader].segment, members: Box::new(members.clone()) }), Ok(()));
    members
}

#[test]
fn member_that_joins_after_other_changes_takes_the_whole_log_and_restarts_within_it() {
    let mut cluster = Cluster::new(4);
    let leader = cluster.leader();
    assert_eq!(cluster.write(leader, 0, &pattern(1, BLOCK)), Status::Ok);
    cluster.agree();
    let gone: Vec<usize> = (0..4).filter(|at| *at != leader).take(2).collect();
    for at in &gone {
        cluster.kill(*at);
        let no = cluster.view(*at).me;
        change(&mut cluster, leader, |members| members.list.retain(|member| member.no != no));
    }
    let at = gone[0];
    cluster.restart(at);
    cluster.order(at, Order::Delete { segment: SEGMENT }).unwrap();
    let mut shape = shape(at as u8 + 1);
    shape.replica = ReplicaId([99; 16]);
    let row = Member { no: MemberNo(5), role: Role::Learner, replica: shape.replica, node: NodeId([at as u8 + 1; 16]) };
    let members = change(&mut cluster, leader, |members| {
        members.list.push(row);
        members.next = MemberNo(6);
    });
    cluster.order(at, Order::CreateMember { shape: Box::new(shape), members: Box::new(members.clone()) }).unwrap();
    for _ in 0..2 {
        cluster.pass(500);
        assert_eq!((cluster.view(at).stopped, cluster.view(at).members), (None, members.clone()));
        assert_eq!(cluster.applied(at), cluster.applied(leader));
        cluster.restart(at);
    }
    cluster.pass(500);
    change(&mut cluster, leader, |members| members.list.iter_mut().for_each(|member| member.role = Role::Voter));
    assert_eq!(cluster.write(leader, 0, &pattern(2, BLOCK)), Status::Ok);
    cluster.agree();
}
