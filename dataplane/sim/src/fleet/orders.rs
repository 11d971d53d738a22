//! Orders of the control side to a fleet: replicas are made on every node, by the same membership, until each is; volumes grow; leaders step aside.
//!
//! Not here: hosts, and which orders strike when (`strike`).

use penstock_engine::{Event, Notice, Order, OrderError, OrderId, ReplicaNo};
use penstock_wire::peer::{Member, MemberNo, Members, Role};
use penstock_wire::{ReplicaId, ReplicaShape, VolumeId};

use super::hosts::Volume;
use super::node::{Phase, member_no, node_id};
use super::world::{Coming, World};
use crate::orders::{segment_of, volume_of};

/// How far a replica has been made on one node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Made {
    No,
    Ordered(u64),
    Done,
}

pub fn replica_id(volume: u32, no: MemberNo) -> ReplicaId {
    let mut id = [0xaf + no.0 as u8; 16];
    id[..4].copy_from_slice(&volume.to_le_bytes());
    ReplicaId(id)
}

impl World {
    /// Whether a node's member of a volume's group keeps the log alone.
    pub fn is_log_only(&self, volume: u32, node: usize) -> bool {
        self.plan.log_only
            && self.root_of(volume) as usize % self.nodes.len() == node
            && self.volumes.get(&volume).is_none_or(|v| v.replicated)
    }

    fn members_of(&self, volume: u32) -> Members {
        let count = self.nodes.len();
        let member = |node| {
            let role = if self.is_log_only(volume, node) { Role::LogOnly } else { Role::Voter };
            Member { no: member_no(node), role, replica: replica_id(volume, member_no(node)), node: node_id(node) }
        };
        Members { next: MemberNo(count as u64 + 1), list: (0..count).map(member).collect() }
    }

    pub fn add_volumes(&mut self) {
        let (groups, singles) = (self.plan.groups, self.plan.singles);
        for i in 0..groups + singles {
            let no = i as u32 + 1;
            let replicated = i < groups;
            let home = self.rng.below(self.nodes.len() as u64) as usize;
            let (lo, hi) = self.plan.habits.volume_blocks;
            let blocks = self.rng.within(lo, hi);
            let mut volume = [0xa0; 16];
            volume[..4].copy_from_slice(&no.to_le_bytes());
            let shape = ReplicaShape {
                volume: VolumeId(volume),
                segment: segment_of(no),
                replica: replica_id(no, member_no(home)),
                segment_no: 0,
                blocks,
                logical_block: self.rng.pick(&[512, 512, 4096]),
                name: format!("v{no}"),
            };
            let mut hot = Vec::new();
            let count = self.plan.habits.hot_blocks.min(blocks);
            while (hot.len() as u64) < count {
                let at = self.rng.below(blocks);
                let run = self.rng.within(1, 10);
                hot.extend((at..(at + run).min(blocks)).take(count as usize - hot.len()));
            }
            let made = (0..self.nodes.len()).map(|node| if replicated || node == home { Made::No } else { Made::Done }).collect();
            self.oracle.add_volume(no, blocks);
            self.volumes.insert(no, Volume { made, ..Volume::new(no, shape, replicated, home, hot) });
            let first = self.rng.within(1_000, 30_000);
            self.after(first, Coming::Think { volume: no });
        }
    }

    pub fn order(&mut self, node: usize, order: Order) -> u64 {
        let id = self.next_order;
        self.next_order += 1;
        self.nodes[node].orders.insert(id, order.clone());
        self.feed(node, Event::Order { id: OrderId(id), order });
        id
    }

    /// Gives what is still to be ordered, where that can be taken in.
    pub fn retry_orders(&mut self, volume: u32) {
        for node in 0..self.nodes.len() {
            let v = &self.volumes[&volume];
            if v.made[node] != Made::No
                || self.nodes[node].phase != Phase::Serving
                || self.nodes[node].fence.is_some()
                || self.rng.one_in(3)
            {
                continue;
            }
            let mut shape = Box::new(v.shape.clone());
            shape.replica = replica_id(volume, member_no(node));
            // Where the drive is not what it was there is nothing that it could stand on.
            let of_clone = self.clone_order(volume, node, self.members_of(volume)).filter(|_| self.nodes[node].gone.is_none());
            let order = match of_clone {
                Some(order) => order,
                None if v.replicated => Order::CreateMember { shape, members: Box::new(self.members_of(volume)) },
                None => Order::Create(shape),
            };
            let id = self.order(node, order);
            self.volumes.get_mut(&volume).expect("there").made[node] = Made::Ordered(id);
        }
        let v = &self.volumes[&volume];
        if self.plan.habits.resizes && !self.calm && v.replicated && v.growing.is_none() && self.rng.one_in(300) && self.is_settled(volume)
        {
            let blocks = v.shape.blocks + self.rng.within(1, 60);
            self.volumes.get_mut(&volume).expect("there").growing = Some(blocks);
        }
        self.grow(volume);
        self.choose_snapshot(volume);
        self.choose_clone(volume);
        self.choose_scrub();
    }

    /// Orders the larger size from who leads.
    pub fn grow(&mut self, volume: u32) {
        let v = &self.volumes[&volume];
        let Some(blocks) = v.growing else { return };
        let (segment, guess) = (v.shape.segment, v.guess);
        let it = &self.nodes[guess];
        let busy = it.orders.values().any(|order| matches!(order, Order::Resize { segment: other, .. } if *other == segment));
        if it.phase == Phase::Serving && !busy && it.leads(volume) {
            self.order(guess, Order::Resize { segment, blocks });
        }
    }

    /// `node` steps aside for `other` in every group that it leads.
    pub fn transfer(&mut self, node: usize, other: usize) {
        for volume in self.volumes.values().filter(|v| v.replicated).map(|v| v.no).collect::<Vec<_>>() {
            if self.nodes[node].leads(volume) && node != other {
                self.order(node, Order::Transfer { segment: segment_of(volume), to: self.seat(volume, other) });
                self.tally.fault("leader transfer");
            }
        }
    }

    /// The store says that an order is done or refused.
    pub fn ordered(&mut self, node: usize, id: OrderId, result: &Result<(), OrderError>) {
        let order = self.nodes[node].orders.remove(&id.0).unwrap_or_else(|| panic!("order {id:?} was answered twice or never given"));
        self.tally.check("orders answered");
        self.answered = Some((id.0, result.clone()));
        let v = self.volumes.values_mut().find(|v| v.made[node] == Made::Ordered(id.0));
        match (v, result) {
            (Some(v), Ok(())) => {
                v.made[node] = Made::Done;
                let no = v.no;
                assert!(self.nodes[node].replica_of(no).is_some(), "node {node} made volume {no} and did not announce it");
            }
            (Some(v), Err(OrderError::NotServing | OrderError::Fenced | OrderError::Stopping)) => v.made[node] = Made::No,
            (Some(v), Err(OrderError::NotYet(_) | OrderError::NoSuchSnapshot)) if v.origin.is_some() => v.made[node] = Made::No,
            (Some(v), Err(error)) => panic!("volume {} was not made on node {node}: {error:?}", v.no),
            (None, Ok(())) => match order {
                Order::Resize { segment, blocks } => self.grown(volume_of(&segment), blocks),
                order => self.snapshot_ordered(node, &order),
            },
            (None, Err(OrderError::CloneStands(..))) => self.snapshot_kept(&order),
            // A clone's member that joins waits for the origin's.
            (None, Err(OrderError::NotYet(_) | OrderError::NoSuchSnapshot)) if matches!(order, Order::Clone { .. }) => {}
            // Its receiver may be on the way to being whole.
            // One before may be under way.
            (None, Err(OrderError::Invalid(_))) if matches!(order, Order::Transfer { .. } | Order::Change { .. }) => {}
            (None, Err(error)) if matches!(order, Order::Recover { .. }) => panic!("node {node}: {order:?}: {error:?}"),
            (None, Err(error)) => assert!(
                !matches!(error, OrderError::NoSuchSegment | OrderError::Conflict(_) | OrderError::Invalid(_)),
                "{order:?} was refused at node {node}: {error:?}"
            ),
        }
    }

    fn grown(&mut self, volume: u32, blocks: u64) {
        let v = self.volumes.get_mut(&volume).expect("there");
        if blocks > self.oracle.size_blocks(volume) {
            self.oracle.resize(volume, blocks);
            v.shape.blocks = blocks;
            v.grown = true;
            self.tally.did("volumes grown", 1);
        }
        if v.growing.is_some_and(|growing| growing <= blocks) {
            v.growing = None;
        }
    }

    /// A node died: what it was ordered and did not answer is to be ordered again.
    pub fn orders_forgotten(&mut self, node: usize) {
        for v in self.volumes.values_mut() {
            if matches!(v.made[node], Made::Ordered(_)) {
                v.made[node] = Made::No;
            }
        }
    }

    /// The store tells of a replica.
    pub fn replica_told(&mut self, node: usize, replica: ReplicaNo, shape: &ReplicaShape, gone: bool) {
        let no = volume_of(&shape.segment);
        let told = Notice::Replica { replica, shape: Box::new(shape.clone()), gone };
        let Some(v) = self.volumes.get(&no) else { panic!("node {node} tells of a volume that was never made: {told:?}") };
        if gone && self.nodes[node].gone.is_some() {
            self.nodes[node].replicas.remove(&replica);
            return;
        }
        if gone && self.resting && v.origin.is_some() {
            self.nodes[node].replicas.remove(&replica);
            return;
        }
        assert!(!gone, "volume {no} is gone, and nobody ordered it: {told:?}");
        assert!(v.replicated || v.home == node, "volume {no} is of node {}: {told:?}", v.home);
        if let Some(other) = self.nodes[node].replicas.insert(replica, no) {
            assert_eq!(other, no, "replica {replica:?} is two volumes");
        }
        let mut expected = v.shape.clone();
        (expected.replica, expected.blocks) = (replica_id(no, self.seat(no, node)), shape.blocks);
        assert_eq!(expected, *shape, "volume {no} comes back as another");
    }
}
