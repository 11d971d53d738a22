//! After the storm: members whose drive was wiped or put back are replaced, under load, while processes still die: removed from their group, deleted, made anew
//! under a number that was never used, brought up as learners, promoted. From there on they have to be like any other.
//!
//! Not here: replacing while other faults strike.

use penstock_engine::{MemberView, Order};
use penstock_wire::peer::{Member, MemberNo, Members, Role};

use super::calm::{LEADER_US, PATIENCE_US};
use super::node::{member_no, node_id};
use super::orders::{Made, replica_id};
use super::world::World;
use crate::orders::segment_of;

impl World {
    /// The number of a node's member.
    pub fn seat(&self, volume: u32, node: usize) -> MemberNo {
        self.seats.get(&(volume, node)).copied().unwrap_or_else(|| member_no(node))
    }

    /// False if the storm ends here: somebody who joins has no space for what the others took in while nobody was there.
    pub fn replace_gone(&mut self) -> bool {
        for node in 0..self.nodes.len() {
            // Nobody joins a group as its log-only member yet.
            if self.nodes[node].gone.is_none() || self.plan.singles > 0 || self.plan.log_only || self.rng.one_in(3) {
                continue;
            }
            // What stands on others goes before them.
            let (clones, others): (Vec<u32>, Vec<u32>) =
                self.groups().into_iter().partition(|volume| self.volumes[volume].origin.is_some());
            for volume in clones.into_iter().rev().chain(others) {
                let old = self.seat(volume, node);
                self.change(volume, |members| members.list.retain(|member| member.no != old));
                self.order_again(node, Order::Delete { segment: segment_of(volume) });
                self.nodes[node].standings.remove(&volume);
                self.judge.forget(volume, node);
            }
            self.nodes[node].gone = None;
            if !self.groups().into_iter().all(|volume| self.join(volume, node)) {
                return false;
            }
            self.tally.did("members replaced", 1);
            self.tally.fault("members change while processes die (18)");
        }
        true
    }

    fn join(&mut self, volume: u32, node: usize) -> bool {
        let mut no = MemberNo(0);
        let make = |members: &mut Members| {
            let row = |no| Member { no, role: Role::Learner, replica: replica_id(volume, no), node: node_id(node) };
            if !members.list.iter().any(|member| member.node == node_id(node)) {
                members.list.push(row(members.next));
                members.next = MemberNo(members.next.0 + 1);
            }
        };
        let members = self.change(volume, make);
        members.list.iter().filter(|member| member.node == node_id(node)).for_each(|member| no = member.no);
        self.seats.insert((volume, node), no);
        let v = self.volumes.get_mut(&volume).expect("there");
        v.made[node] = Made::Done;
        let mut shape = Box::new(v.shape.clone());
        shape.replica = replica_id(volume, no);
        if !self.join_standing(volume, node, &members) {
            self.order_again(node, Order::CreateMember { shape, members: Box::new(members) });
        }
        let has_joined = |w: &World| {
            let leader = w.leader_of(volume).and_then(|leader| w.member_of(volume, leader));
            let joined = w.member_of(volume, node);
            leader.zip(joined).is_some_and(|(leader, joined)| {
                joined.admitted && joined.rebuild.is_none() && joined.applied.0 > 0 && joined.applied.0 + 50 >= leader.applied.0
            })
        };
        if !self.within(PATIENCE_US, has_joined) {
            if self.is_short(node) {
                return false;
            }
            self.still_not(PATIENCE_US, "a new member has what the leader has");
        }
        self.change(volume, |members| {
            members.list.iter_mut().filter(|member| member.no == no).for_each(|member| member.role = Role::Voter);
        });
        true
    }

    /// A clone's member may begin where the origin's has come to stand again.
    fn join_standing(&mut self, volume: u32, node: usize, members: &Members) -> bool {
        let Some(of) = self.volumes[&volume].origin else { return false };
        if !self.snapshots.contains_key(&of.snapshot) || self.rng.one_in(2) {
            return false;
        }
        for _ in 0..400 {
            self.until(PATIENCE_US, "the node serves", |w| w.nodes[node].phase == super::node::Phase::Serving);
            let order = self.clone_order(volume, node, members.clone()).expect("it is a clone");
            if self.order_for(node, order) == Some(Ok(())) {
                self.tally.did("members of clones that join where the origin is", 1);
                return true;
            }
            let until = self.now + 20_000;
            while self.now < until && self.step() {}
        }
        panic!("a clone's member does not come to stand: {}", self.describe());
    }

    fn member_of(&self, volume: u32, node: usize) -> Option<MemberView> {
        let it = &self.nodes[node];
        it.store.as_ref()?.member_view(it.replica_of(volume)?)
    }

    /// Until the group's membership is so; the order is given again to whoever leads by then.
    fn change(&mut self, volume: u32, step: impl Fn(&mut Members)) -> Members {
        for _ in 0..100 {
            self.until(LEADER_US, "somebody leads, to change members", |w| w.leader_of(volume).is_some());
            let leader = self.leader_of(volume).expect("just seen");
            let Some(view) = self.member_of(volume, leader) else { continue };
            let mut wanted = view.members.clone();
            step(&mut wanted);
            if wanted == view.members {
                return wanted;
            }
            let id = self.order(leader, Order::Change { segment: segment_of(volume), members: Box::new(wanted) });
            if self.rng.one_in(6) {
                let until = self.now + self.rng.below(20_000);
                while self.now < until && self.step() {}
                let victim = self.rng.below(self.nodes.len() as u64) as usize;
                self.die(victim, false);
            }
            self.until(PATIENCE_US, "a change of members is answered", |w| !w.nodes[leader].orders.contains_key(&id));
        }
        panic!("members of volume {volume} do not change: {}", self.describe());
    }

    /// A death of the process forgets it: then it is given again.
    fn order_again(&mut self, node: usize, order: Order) {
        for _ in 0..20 {
            self.until(PATIENCE_US, "the node serves", |w| w.nodes[node].phase == super::node::Phase::Serving);
            let life = self.nodes[node].life;
            self.order_well(node, order.clone(), "an order about a replica is carried out");
            if self.nodes[node].life == life {
                return;
            }
        }
        panic!("node {node} dies on and on");
    }
}
