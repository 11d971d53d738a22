//! Clones of a fleet's volumes: made of a snapshot while hosts go on and members come and go, written to like any other volume, and gone at the end, before
//! or after what they stand on was ordered away.
//!
//! To the oracle a clone is a volume that begins as the snapshot is. Not here: hosts and checks, for which it is a volume like any other.

use penstock_engine::{Order, OrderError};
use penstock_wire::VolumeId;

use super::calm::PATIENCE_US;
use super::hosts::Volume;
use super::node::{Phase, member_no};
use super::orders::{Made, replica_id};
use super::world::{Coming, World};
use crate::orders::segment_of;
use crate::snapshots::id_of;

/// Clones that a seed makes at most.
const CLONES_MAX: usize = 3;

/// What a clone was made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Origin {
    pub volume: u32,
    pub snapshot: u32,
}

impl World {
    /// The volume that a clone, or a clone of one, comes from: members keep the log alone where its do.
    pub fn root_of(&self, volume: u32) -> u32 {
        let origin = |no: &u32| self.volumes.get(no).and_then(|v| v.origin).map(|origin| origin.volume);
        std::iter::successors(Some(volume), origin).last().expect("it begins with one")
    }

    fn clones(&self) -> Vec<u32> {
        self.volumes.values().filter(|v| v.origin.is_some()).map(|v| v.no).collect()
    }

    pub fn is_stood_on(&self, volume: u32) -> bool {
        self.volumes.values().any(|v| v.origin.is_some_and(|origin| origin.volume == volume))
    }

    fn clones_of(&self, snapshot: u32) -> impl Iterator<Item = &Volume> {
        self.volumes.values().filter(move |v| v.origin.is_some_and(|origin| origin.snapshot == snapshot))
    }

    pub fn is_cloned(&self, snapshot: u32) -> bool {
        self.clones_of(snapshot).next().is_some()
    }

    /// Whether every member of the clones of a snapshot was made: who was not finds nothing to stand on once that is gone.
    pub fn are_clones_made(&self, snapshot: u32) -> bool {
        self.clones_of(snapshot).all(|v| v.made.iter().all(|made| *made == Made::Done))
    }

    /// One is made now and then, of a snapshot that stands.
    pub fn choose_clone(&mut self, volume: u32) {
        let whole = self.nodes.iter().all(|it| it.gone.is_none());
        if !self.plan.habits.clones || self.calm || !whole || self.clones().len() >= CLONES_MAX || !self.rng.one_in(60) {
            return;
        }
        let stand = self.standing(volume);
        if stand.is_empty() {
            return;
        }
        let (snapshot, blocks) = self.rng.pick(&stand);
        let no = self.volumes.keys().max().expect("there is one") + 1;
        let blocks = blocks + if self.rng.one_in(2) { self.rng.within(1, 60) } else { 0 };
        let of = &self.volumes[&volume];
        let mut id = [0xa0; 16];
        id[..4].copy_from_slice(&no.to_le_bytes());
        let mut shape = of.shape.clone();
        (shape.volume, shape.segment, shape.replica) = (VolumeId(id), segment_of(no), replica_id(no, member_no(0)));
        (shape.blocks, shape.name) = (blocks, format!("v{no}"));
        let (hot, guess, made) = (of.hot.clone(), of.guess, vec![Made::No; self.nodes.len()]);
        self.oracle.add_clone(snapshot, no, blocks).unwrap_or_else(|wrong| panic!("{wrong}"));
        let origin = Some(Origin { volume, snapshot });
        self.volumes.insert(no, Volume { made, guess, origin, ..Volume::new(no, shape, true, 0, hot) });
        // A drive that is put back from before it was made is one on which nobody ordered it.
        self.nodes.iter_mut().for_each(|it| it.copy = None);
        self.after(1_000, Coming::Think { volume: no });
        self.tally.did("clones", 1);
    }

    /// The order for a member of a clone that begins where the origin is.
    pub fn clone_order(&self, volume: u32, node: usize, members: penstock_wire::peer::Members) -> Option<Order> {
        let v = &self.volumes[&volume];
        let of = v.origin?;
        let mut shape = Box::new(v.shape.clone());
        shape.replica = replica_id(volume, self.seat(volume, node));
        Some(Order::Clone { shape, members: Some(Box::new(members)), origin: segment_of(of.volume), snapshot: id_of(of.snapshot) })
    }

    /// Whether a node's member stands on the origin's layer.
    fn has_beneath(&self, volume: u32, node: usize) -> bool {
        let it = &self.nodes[node];
        let look = it.replica_of(volume).and_then(|no| it.store.as_ref()?.look(no));
        look.is_some_and(|look| look.stands)
    }

    /// At the end: what clones stand on is ordered away under them, and most of the time they go then.
    pub fn end_clones(&mut self) {
        for clone in self.clones() {
            let of = self.volumes[&clone].origin.expect("it is one");
            self.ask_origin_away(clone, of);
            if self.rng.one_in(2) && self.snapshots.contains_key(&of.snapshot) {
                self.ask_snapshot_away(of.snapshot);
            }
        }
        let keeps = self.rng.one_in(4);
        for clone in self.clones().into_iter().rev().filter(|_| !keeps) {
            for node in 0..self.nodes.len() {
                self.gone_for_good(clone, node);
            }
            self.volumes.remove(&clone);
            let kept: Vec<u32> = self.snapshots.iter().filter(|(_, s)| s.of == clone).map(|(no, _)| *no).collect();
            for no in kept {
                self.snapshots.remove(&no);
                self.oracle.drop_volume(no);
            }
            self.oracle.drop_volume(clone);
            self.tally.did("clones deleted", 1);
        }
    }

    /// A volume that something stands on is not deleted.
    fn ask_origin_away(&mut self, clone: u32, of: Origin) {
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        if !self.has_beneath(clone, node) {
            return;
        }
        let answer = self.order_for(node, Order::Delete { segment: segment_of(of.volume) });
        assert!(
            matches!(answer, Some(Err(OrderError::CloneStands(..)))),
            "node {node} is to delete volume {}, and says {answer:?}",
            of.volume
        );
        self.tally.check("what a clone stands on is not deleted");
    }

    /// A snapshot is ordered away under what stands on it. Who leads and has nothing standing there does it: the others keep what theirs stand on.
    fn ask_snapshot_away(&mut self, snapshot: u32) {
        let volume = self.snapshots[&snapshot].of;
        let clones: Vec<u32> = self.clones_of(snapshot).map(|v| v.no).collect();
        let bare = |node: &usize| clones.iter().all(|clone| !self.has_beneath(*clone, *node)) && self.holders(volume).contains(node);
        let bare = (0..self.nodes.len()).find(bare);
        if let (Some(leader), Some(bare)) = (self.leader_of(volume), bare) {
            self.order_for(leader, Order::Transfer { segment: segment_of(volume), to: self.seat(volume, bare) });
            self.within(2_000_000, |w| w.leader_of(volume) == Some(bare));
        }
        let everywhere = clones.iter().any(|clone| (0..self.nodes.len()).all(|node| self.has_beneath(*clone, node)));
        self.goes(snapshot);
        self.settle_snapshots(volume);
        if !self.snapshots.contains_key(&snapshot) {
            assert!(!everywhere, "snapshot {snapshot} is removed, and a clone stands on it everywhere");
            self.tally.did("snapshots removed under clones", 1);
        }
    }

    /// Gives an order in calm, and what it is answered; none where the process dies over it.
    pub fn order_for(&mut self, node: usize, order: Order) -> Option<Result<(), OrderError>> {
        let id = self.order(node, order);
        self.until(PATIENCE_US, "an order about a clone is answered", |w| !w.nodes[node].orders.contains_key(&id));
        self.answered.take().filter(|(of, _)| *of == id).map(|(_, result)| result)
    }

    /// A volume's replica goes from a node.
    fn gone_for_good(&mut self, volume: u32, node: usize) {
        self.until(PATIENCE_US, "the node serves", |w| w.nodes[node].phase == Phase::Serving);
        let answer = self.order_for(node, Order::Delete { segment: segment_of(volume) });
        assert_eq!(answer, Some(Ok(())), "node {node} does not delete volume {volume}, on which nothing stands any more");
        self.nodes[node].standings.remove(&volume);
        self.judge.forget(volume, node);
    }
}
