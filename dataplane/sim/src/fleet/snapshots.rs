//! Snapshots of a fleet's volumes: taken and removed by order while hosts go on and leaders change, read at whoever leads, and equal everywhere at rest.
//!
//! As with one node a snapshot is another volume to the oracle: what was sent between the first order and its answer may be in it, whichever of the orders
//! took effect. Not here: that oracle, and orders that are given once ([`super::orders`]).

use penstock_engine::{HostOp, LayerNo, Order, Span};

use super::hosts::plain;
use super::node::Phase;
use super::world::World;
use crate::oracle::Command;
use crate::orders::segment_of;
use crate::snapshots::{id_of, shape_of};
use crate::stamp::BLOCK;

/// Snapshots of a volume at a time.
const SNAPSHOTS_MAX: usize = 5;
/// The oracle's volumes from here on are snapshots.
const FIRST: u32 = 1000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// It is ordered until somebody says that it stands.
    Coming,
    /// Of so many blocks.
    Stands(u64),
    /// It is ordered away until somebody says that it is gone; it had so many blocks.
    Going(u64),
}

/// A snapshot, under its number as the oracle's volume.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot {
    pub of: u32,
    pub stage: Stage,
}

impl World {
    /// The volume whose store, path and leader a command is for.
    pub fn home_of(&self, volume: u32) -> u32 {
        self.snapshots.get(&volume).map_or(volume, |snapshot| snapshot.of)
    }

    fn of(&self, volume: u32, stage: impl Fn(Stage) -> bool) -> Vec<u32> {
        self.snapshots.iter().filter(|(_, s)| s.of == volume && stage(s.stage)).map(|(no, _)| *no).collect()
    }

    /// One comes or goes now and then.
    pub fn choose_snapshot(&mut self, volume: u32) {
        let unsettled = |stage| !matches!(stage, Stage::Stands(_));
        let growing = self.volumes[&volume].growing.is_some();
        let may = self.plan.habits.snapshots && !self.calm && self.volumes[&volume].replicated && !growing;
        if may && self.rng.one_in(25) && self.of(volume, unsettled).is_empty() {
            let stand = self.of(volume, |stage| matches!(stage, Stage::Stands(_)));
            if stand.len() >= SNAPSHOTS_MAX || !stand.is_empty() && self.rng.percent(35) {
                let no = self.rng.pick(&stand);
                // Control keeps what clones stand on; the engine is asked all the same now and then.
                if !self.is_cloned(no) || self.are_clones_made(no) && self.rng.one_in(4) {
                    self.goes(no);
                }
            } else {
                let no = self.next_snapshot.max(FIRST);
                self.next_snapshot = no + 1;
                self.oracle.begin_snapshot(volume, no);
                self.snapshots.insert(no, Snapshot { of: volume, stage: Stage::Coming });
            }
        }
        self.order_snapshots(volume);
    }

    pub fn goes(&mut self, no: u32) {
        let snapshot = self.snapshots.get_mut(&no).expect("it stands");
        if let Stage::Stands(blocks) = snapshot.stage {
            snapshot.stage = Stage::Going(blocks);
        }
    }

    /// Something stands on a snapshot that was ordered away.
    pub fn snapshot_kept(&mut self, order: &Order) {
        let Order::Unsnapshot { snapshot, .. } = order else { return };
        let Some((no, kept)) = self.snapshots.iter_mut().find(|(no, _)| id_of(**no) == *snapshot) else { return };
        if let Stage::Going(blocks) = kept.stage {
            kept.stage = Stage::Stands(blocks);
        }
        let no = *no;
        assert!(self.is_cloned(no), "snapshot {no} is kept for a clone, and has none");
        self.tally.check("what a clone stands on is not removed");
    }

    /// Orders what is not settled from who leads.
    pub fn order_snapshots(&mut self, volume: u32) {
        let guess = self.volumes[&volume].guess;
        let segment = segment_of(volume);
        for no in self.of(volume, |stage| !matches!(stage, Stage::Stands(_))) {
            let order = match self.snapshots[&no].stage {
                Stage::Coming => Order::Snapshot { segment, snapshot: Box::new(shape_of(no)) },
                _ => Order::Unsnapshot { segment, snapshot: id_of(no) },
            };
            let it = &self.nodes[guess];
            let busy = it.orders.values().any(|other| *other == order);
            let leads = it.phase == Phase::Serving && it.leads(volume);
            if leads && !busy {
                self.order(guess, order);
            } else if !leads {
                // Hosts may have no room to send anything before it is settled, and hear of no leader.
                self.look_elsewhere(volume);
                return;
            }
        }
    }

    /// A node says that an order is done.
    pub fn snapshot_ordered(&mut self, node: usize, order: &Order) {
        match order {
            Order::Snapshot { snapshot, .. } => {
                let Some((no, of)) = self.snapshots.iter().map(|(no, s)| (*no, s.of)).find(|(no, _)| id_of(*no) == snapshot.id) else {
                    return;
                };
                let it = &self.nodes[node];
                let views = it.replica_of(of).zip(it.store.as_ref()).map(|(replica, store)| store.snapshots(replica)).unwrap_or_default();
                let view = views.iter().find(|view| view.snapshot.id == snapshot.id);
                let view = view.unwrap_or_else(|| panic!("node {node} has taken snapshot {no} of volume {of}, and has it not"));
                let snapshot = self.snapshots.get_mut(&no).expect("just found");
                if snapshot.stage == Stage::Coming {
                    snapshot.stage = Stage::Stands(view.blocks);
                    self.oracle.end_snapshot(no).unwrap_or_else(|wrong| panic!("{wrong}"));
                    self.tally.did("snapshots", 1);
                }
            }
            Order::Unsnapshot { snapshot, .. } => {
                let gone = |(no, s): &(&u32, &Snapshot)| id_of(**no) == *snapshot && matches!(s.stage, Stage::Going(_));
                let Some(no) = self.snapshots.iter().find(gone).map(|(no, _)| *no) else { return };
                self.snapshots.remove(&no);
                self.oracle.drop_volume(no);
                self.tally.did("snapshots removed", 1);
            }
            _ => {}
        }
    }

    /// A read of a snapshot at a node that leads, mostly of blocks that were written.
    pub fn read_of_snapshot(&mut self, node: usize, volume: u32) -> Option<Command> {
        let stand = self.of(volume, |stage| matches!(stage, Stage::Stands(_)));
        if stand.is_empty() {
            return None;
        }
        let no = self.rng.pick(&stand);
        let Stage::Stands(size) = self.snapshots[&no].stage else { return None };
        let touched = self.oracle.touched(no);
        let first = if touched.is_empty() || self.rng.one_in(8) { self.rng.below(size) } else { self.rng.pick(&touched) };
        let blocks = self.rng.within(1, 20).min(size.checked_sub(first).filter(|left| *left > 0)?);
        let span = Span { offset: first * BLOCK as u64, len: blocks * BLOCK as u64 };
        Some(plain(no, HostOp::ReadSnapshot(self.layer_at(node, no)?, span)))
    }

    /// What a snapshot is called at a node, which may not know of it.
    pub fn layer_at(&self, node: usize, no: u32) -> Option<LayerNo> {
        let it = &self.nodes[node];
        let views = it.store.as_ref()?.snapshots(it.replica_of(self.home_of(no))?);
        views.iter().find(|view| view.snapshot.id == id_of(no)).map(|view| view.layer)
    }

    /// At rest: every node has the snapshots that stand, and no others, with the same blocks.
    pub fn compare_snapshots(&mut self, volume: u32) {
        let stand = self.of(volume, |_| true);
        let mut first: Vec<Option<penstock_engine::Contents>> = vec![None; stand.len()];
        for node in (0..self.nodes.len()).filter(|node| self.nodes[*node].gone.is_none()) {
            let it = &self.nodes[node];
            let start = it.share.start.0;
            let (replica, store) = (it.replica_of(volume).expect("made"), it.store.as_ref().expect("alive"));
            let views = store.snapshots(replica);
            let mut found: Vec<_> = views.iter().map(|view| (view.snapshot.id, Stage::Stands(view.blocks))).collect();
            let mut expected: Vec<_> = stand.iter().map(|no| (id_of(*no), self.snapshots[no].stage)).collect();
            found.sort_unstable_by_key(|(id, _)| *id);
            expected.sort_unstable_by_key(|(id, _)| *id);
            assert_eq!(found, expected, "node {node} has other snapshots of volume {volume} than were taken");
            if self.is_log_only(volume, node) {
                continue;
            }
            for (no, first) in stand.iter().zip(&mut first) {
                let layer = views.iter().find(|view| view.snapshot.id == id_of(*no)).expect("just seen").layer;
                let contents = store.snapshot_contents(replica, layer, |at| it.drive.bytes(start + at.0));
                let contents = contents.unwrap_or_else(|error| panic!("node {node}: {error}"));
                let Some(other) = first else {
                    *first = Some(contents);
                    continue;
                };
                for block in other.keys().chain(contents.keys()) {
                    let (a, b) = (other.get(block), contents.get(block));
                    let lost = matches!(a, Some(None)) || matches!(b, Some(None));
                    assert!(
                        a == b || lost && self.oracle.may_be_lost(*no, *block),
                        "invariant 6: at rest snapshot {no} of volume {volume} has block {block} as {a:08x?} on node 0 and as {b:08x?} on node {node}"
                    );
                }
                self.tally.check("snapshots are equal block by block (6, 25)");
            }
        }
    }

    /// Most of the time all snapshots of a volume go at the end.
    pub fn end_snapshots(&mut self, volume: u32) -> bool {
        let stand = self.of(volume, |_| true);
        let goes = !stand.is_empty() && self.rng.percent(70);
        for no in stand.into_iter().filter(|_| goes) {
            if !self.is_cloned(no) {
                self.goes(no);
            }
        }
        goes
    }

    pub fn is_settled(&self, volume: u32) -> bool {
        self.of(volume, |stage| !matches!(stage, Stage::Stands(_))).is_empty()
    }

    /// Snapshots of a volume that stand, with their sizes.
    pub fn standing(&self, volume: u32) -> Vec<(u32, u64)> {
        let stands = |(no, s): (&u32, &Snapshot)| if let Stage::Stands(blocks) = s.stage { Some((*no, blocks)) } else { None };
        self.snapshots.iter().filter(|(_, s)| s.of == volume).filter_map(stands).collect()
    }
}
